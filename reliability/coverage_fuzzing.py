"""Coverage-guided fuzzing of the readers of files, by Atheris: mutations of what has reached new lines of xpnet.

`nox -s fuzz -- --seconds 60` installs Atheris, and fuzzes each format for that time. The seeds, the mutations and what
is right are those of reliability/file_fuzzing.py. Each input that fails is written to a file.
"""

import argparse
import hashlib
import importlib.util
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from reliability.results import Result

FORMATS = ("IdxFiles", "GzipFiles", "ModelFiles", "Checkpoints", "OnnxFiles")
_SLOWER = 5.0  # times as much processor time, because lines are counted


def run(scale: float, seed: int, folder: Path) -> list[Result]:
    """A minute for each format at scale 1."""
    return fuzz(FORMATS, max(1, round(60 * scale)), seed, folder / "corpus", folder / "findings")


def fuzz(formats: Any, seconds: int, seed: int, corpus: Path, findings: Path) -> list[Result]:
    """Fuzz these formats, one after another.

    corpus: a folder of inputs that reach new lines, which a later run goes on from. findings: a folder for inputs that
    fail, each with a text beside it that says why.
    """
    if importlib.util.find_spec("atheris") is None:
        return [
            Result("inputs of the coverage-guided fuzzer", note="Atheris is not installed; `nox -s fuzz` installs it")
        ]
    return [_fuzz(name, seconds, seed, corpus / name, findings / name) for name in formats]


def _fuzz(name: str, seconds: int, seed: int, corpus: Path, findings: Path) -> Result:
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    known = set(findings.glob("*.txt"))
    command = [sys.executable, "-m", "reliability.coverage_fuzzing", "--worker", name, "--seconds", str(seconds)]
    command += ["--seed", str(seed), "--corpus", str(corpus), "--findings", str(findings)]
    with tempfile.TemporaryFile("w+") as output:
        code = subprocess.run(
            command, stdout=output, stderr=output, cwd=Path(__file__).parents[1], check=False
        ).returncode
        output.seek(0)
        text = output.read()
    bad = [path.read_text() for path in sorted(set(findings.glob("*.txt")) - known)]
    tried = re.search(r"stat::number_of_executed_units: +(\d+)", text)
    if code or tried is None:
        bad.append(f"{name}: the fuzzer ended with {code}: {text[-1500:]}")
    reached = re.findall(r"cov: (\d+)", text)
    note = f"{seconds} s, {int(reached[-1]):,} branches and lines reached" if reached else f"{seconds} s"
    return Result(f"{name} of the coverage-guided fuzzer", int(tried[1]) if tried else 0, bad, note)


def _work(name: str, seconds: int, seed: int, corpus: Path, findings: Path) -> None:
    """Fuzz in this process, which libFuzzer ends."""
    import atheris

    # Numba compiles functions of the backends, which must stay as they are.
    with atheris.instrument_imports(include=["xpnet"], exclude=["xpnet.backends"]):
        import xpnet.model
        import xpnet.onnx.importing  # noqa: F401

    from reliability import file_fuzzing
    from reliability.cases import bounded, place_of, prepare, quick_folder

    folder = quick_folder()
    cases = getattr(file_fuzzing, name)(Path(folder.name), seed)
    for content in cases.seeds:
        (corpus / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)
    seen = set[str]()

    def check(content: bytes) -> None:
        try:
            bounded(lambda: cases.check(content), _SLOWER * cases.SECONDS, cases.MEGABYTES)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            where = place_of(error)
            if where not in seen:
                seen.add(where)
                path = findings / hashlib.sha256(content).hexdigest()[:16]
                path.write_bytes(content)
                path.with_suffix(".txt").write_text(f"{path.name}: {type(error).__name__}: {error!s:.400} [{where}]")

    def mutate(content: bytes, limit: int, number: int) -> bytes:
        mutated = cases.mutated(random.Random(number), content)
        return mutated if len(mutated) <= limit else content

    prepare()
    options = [f"-max_total_time={seconds}", f"-seed={seed + 1}", "-max_len=60000", "-timeout=60", "-rss_limit_mb=4096",
               "-print_final_stats=1", f"-artifact_prefix={findings}/died-", str(corpus)]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], check, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m reliability.coverage_fuzzing", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=FORMATS, help="the formats; default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each format; default: 60")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--corpus", type=Path, help="a folder from which the next run goes on; default: a temporary one"
    )
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="a folder for inputs that fail")
    parser.add_argument("--worker", choices=FORMATS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.worker, options.seconds, options.seed, options.corpus, options.findings)
    with tempfile.TemporaryDirectory() as folder:
        results = fuzz(options.only, options.seconds, options.seed, options.corpus or Path(folder), options.findings)
    for result in results:
        print(result)
    return 1 if any(result.bad for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
