"""Run the attacks: `python -m reliability [--only NAME ...] [--scale 1.0] [--seed 0] [--write docs/reliability.md]`."""

import argparse
import datetime
import importlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reliability.results import Result

#: The modules of this package that have `run(scale, seed, folder) -> list[Result]`, in the order of the summary.
PARTS: tuple[str, ...] = (
    "misuse", "file_fuzzing", "coverage_fuzzing", "onnx_graphs", "architectures", "trainings", "storage_faults",
    "memory_faults", "interrupts", "kills", "threads", "long_runs", "page",
)  # fmt: skip

_BEGIN, _END = "<!-- results -->\n", "<!-- end of results -->\n"
_HEADER = "| attack | tried | bad | note | date, commit |\n|---|---|---|---|---|\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reliability", description="Attack xpnet, and count what breaks.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the attacks to run; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="times the full number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="PATH", help="a page whose table of results gets these results")
    options = parser.parse_args(arguments)
    results: list[Result] = []
    for part in options.only:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            results += importlib.import_module(f"reliability.{part}").run(options.scale, options.seed, Path(folder))
        print(f"{part} took {time.monotonic() - start:.0f} s", flush=True)
    print("\n".join(map(str, results)))
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        options.write.write_text(with_results(page, results, f"{datetime.date.today()}, {_commit()}"), encoding="utf-8")
    return 1 if any(result.bad for result in results) else 0


def with_results(page: str, results: list[Result], when: str) -> str:
    """The page with these results in its table. Rows of other attacks, which did not run, stay."""
    before, rest = page.split(_BEGIN)
    table, after = rest.split(_END)
    rows = {line.split(" | ")[0]: line for line in table.splitlines()[2:]}
    for result in results:
        row = f"| {result.cases} | {result.tried:,} | {len(result.bad):,} | {result.note} | {when} |"
        rows[row.split(" | ")[0]] = row
    return before + _BEGIN + _HEADER + "".join(f"{row}\n" for row in rows.values()) + _END + after


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # Git is not installed
        found = ""
    return found or "unknown commit"


if __name__ == "__main__":
    sys.exit(main())
