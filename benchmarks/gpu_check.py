"""Everything that a GPU machine can tell about xpnet, in four minutes and without a network.

    python -m benchmarks.gpu_check --data .data               # writes benchmarks/results/gpu-DATE.md
    python -m benchmarks.gpu_check --emulated --out /tmp/out  # the same without a GPU, to see that it works

The parts: the machine; training steps beside PyTorch and JAX in one process (gpu_steps.py); a step kernel by kernel
(profile.py); examples/mnist.py for its three models; and then, all at once, the whole GPU test suite and
compute-sanitizer's memcheck over captured training (sanitized_training.py) and over the kernel tests. Nothing else runs
while something is timed.

Each part is a process with a time limit. Past its limit it is killed with its children; what it has told until then
stays in the record, which is written anew after each part. Exit status 0 where all parts ran to their end and found
nothing wrong.

--data is a folder with MNIST's four files in `mnist/`. Without it: $XPNET_DATA_DIR, or `.data` in the checkout. Where
there is no git repository, $XPNET_COMMIT names the commit.
"""

import argparse
import collections
import contextlib
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import messages
from benchmarks.versions import ROOT, commit, versions

SECONDS = 240.0
LEAST = 3.0  # seconds: with less a part is not started
WORKERS = 12  # of the test suite
LONGEST_LIST = 60  # failed tests that are named
PRECISIONS = ("float32", "tf32", "bfloat16")


class Outcome(NamedTuple):
    """How a part ended. status: the exit status, None where it did not end by itself.  trouble: why, or ""."""

    status: int | None
    seconds: float
    text: str
    trouble: str = ""

    @property
    def messages(self) -> list[dict[str, Any]]:
        return messages.received(self.text)


class Told(NamedTuple):
    """A part's section of the record, and whether all was well."""

    lines: list[str]
    well: bool


class Part(NamedTuple):
    """One process. command: made from the seconds that it may take.  limit: those seconds, at most.  reserve: seconds
    that the parts before it leave to it.  tell: what the record says.
    """

    name: str
    title: str
    command: Callable[[float], Sequence[str]]
    tell: Callable[[Outcome], Told]
    limit: float
    reserve: float
    environment: Mapping[str, str] = {}  # never written to


# Processes -----------------------------------------------------------------------------------------------------------


class Process:
    """A part under way, in a session of its own, its output in a file."""

    def __init__(self, part: Part, limit: float, folder: Path) -> None:
        self.part, self.limit = part, limit
        self.begun = time.monotonic()
        self._path = folder / f"{part.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._trouble = ""
        environment = {**os.environ, **part.environment}
        try:
            with self._path.open("wb") as log:
                self._process = subprocess.Popen(
                    part.command(limit), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                    env=environment, start_new_session=True,
                )  # fmt: skip
        except Exception as error:  # the other parts go on
            self._trouble = f"it could not be started: {type(error).__name__}: {error}"

    def outcome(self) -> Outcome | None:
        """How it ended, or None where it still runs within its limit."""
        seconds = time.monotonic() - self.begun
        if self._process is None:
            return Outcome(None, seconds, "", self._trouble)
        status = self._process.poll()
        if status is None and seconds < self.limit:
            return None
        if status is None:
            self._trouble = f"it was killed at its limit of {self.limit:.0f} s"
        self.kill()  # of a part that has ended, the children that it left behind
        return Outcome(status, seconds, self.text(), self._trouble)

    def text(self) -> str:
        with contextlib.suppress(OSError):
            return self._path.read_text(encoding="utf-8", errors="replace")
        return ""

    def kill(self) -> None:
        if self._process is None:
            return
        for _ in range(10):  # a process may have started another meanwhile
            members = session(self._process.pid)
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            for pid in members:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.2)
            if not members:
                return


def session(leader: int) -> list[int]:
    """The processes of the session that this one leads, whatever their process groups; no zombies."""
    found = []
    for stat in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # pid (name) state parent group session ...; the name may have spaces and brackets.
            fields = Path(stat).read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(stat.split("/")[2]))
    return found


class Record:
    """The Markdown file: what is known so far."""

    def __init__(self, folder: Path, parts: Sequence[Part], emulated: bool) -> None:
        self.date, self.commit, self.emulated = time.strftime("%Y-%m-%d"), commit(), emulated
        self.path = folder / f"gpu-{'emulated-' if emulated else ''}{self.date}.md"
        self._begun = time.monotonic()
        self._sections: dict[str, tuple[str, list[str]]] = {part.name: (part.title, ["Not run."]) for part in parts}
        self.complete = False
        self.troubles: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, part: Part, outcome: Outcome) -> None:
        """Take in how a part ended, and write the file."""
        try:
            lines, well = part.tell(outcome)
        except Exception:  # what the part printed is not what was expected: the other sections stand
            lines, well = [f"The output cannot be read: {traceback.format_exc().splitlines()[-1]}"], False
        if outcome.trouble:
            lines = [*lines, "", f"Incomplete: {outcome.trouble}."]
        if not well or outcome.trouble:
            self.troubles.append(part.name)
            lines = [*lines, "", *tail(outcome.text)]
        self._sections[part.name] = (part.title, [*lines, "", f"({outcome.seconds:.1f} s)"])
        self.write()

    def text(self) -> str:
        lines = []
        if self.emulated:
            lines += ["**Everything in this record was emulated on a CPU. No time in it means anything.**", ""]
        lines += [f"# GPU check, {self.date}, commit {self.commit}", ""]
        packages = ", ".join(f"{name} {version}" for name, version in versions().items())
        lines += [f"{packages}.", ""]
        seconds = time.monotonic() - self._begun
        if not self.complete:
            lines += [f"The check had not ended when this was written, after {seconds:.0f} s."]
        elif self.troubles:
            lines += [f"Took {seconds:.0f} s. Not all was well: {', '.join(self.troubles)}."]
        else:
            lines += [f"Took {seconds:.0f} s. All parts ran to their end, and nothing failed."]
        for title, section in self._sections.values():
            lines += ["", f"## {title}", "", *section]
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(self.text(), encoding="utf-8")
        temporary.replace(self.path)


def run(stages: Sequence[Sequence[Part]], seconds: float, record: Record) -> None:
    """The stages one after the other, the parts of each at the same time."""
    begun = time.monotonic()
    record.write()
    running: list[Process] = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        try:
            for number, stage in enumerate(stages):
                kept = sum(max(part.reserve for part in later) for later in stages[number + 1 :] if later)
                for part in stage:
                    limit = min(part.limit, seconds - (time.monotonic() - begun) - kept)
                    if limit < LEAST:
                        record.add(part, Outcome(None, 0.0, "", "it was not started, for no time was left"))
                        continue
                    say(begun, f"{part.name}: started, for at most {limit:.0f} s")
                    running.append(Process(part, limit, Path(folder)))
                _wait(running, record, begun)
        finally:
            for process in running:
                process.kill()
                record.add(process.part, Outcome(None, 0.0, process.text(), "the check was stopped"))


def _wait(running: list[Process], record: Record, begun: float) -> None:
    """Until all of them have ended."""
    told = time.monotonic()
    while running:
        for process in list(running):
            outcome = process.outcome()
            if outcome is not None:
                running.remove(process)
                record.add(process.part, outcome)
                say(begun, f"{process.part.name}: ended after {outcome.seconds:.1f} s {outcome.trouble}".rstrip())
        if running and time.monotonic() - told > 15.0:
            told = time.monotonic()
            for process in running:
                last = process.text().strip().splitlines()[-1:] or [""]
                say(begun, f"{process.part.name}: runs; {last[0][:100]}")
        if running:
            time.sleep(0.05)


def say(begun: float, text: str) -> None:
    print(f"[{time.monotonic() - begun:6.1f} s] {text}", flush=True)


def tail(text: str, lines: int = 15) -> list[str]:
    """The last lines of an output, without messages."""
    rest = [line[:300] for line in text.splitlines() if line.strip() and messages.MARK not in line]
    # A block of text for records, which the tests' own summary prints, would look like a line of this record.
    rest = [line.replace("```", "'''") for line in rest if not line.startswith("GPU tests, ")]
    return ["The end of its output:", "", "```text", *rest[-lines:], "```"] if rest else []


# What parts tell -----------------------------------------------------------------------------------------------------


def tell_environment(outcome: Outcome) -> Told:
    facts = [message for message in outcome.messages if message["kind"] == "fact"]
    lines = [f"- {fact['what']}: {fact['text']}" for fact in facts]
    return Told([*lines, *_troubles(outcome)], outcome.status == 0)


def tell_steps(outcome: Outcome) -> Told:
    """A table for each precision: µs a step of each peer, with the ratio of xpnet's time to it."""
    rows = [message for message in outcome.messages if message["kind"] == "steps"]
    lines = []
    if rows:
        lines = [
            f"µs a step, medians of {min(row['rounds'] for row in rows)} or more rounds in one process; in brackets "
            "xpnet's time in the same precision / this time, the median over the rounds: below 1, xpnet is faster."
        ]
    for precision in PRECISIONS:
        names = list(dict.fromkeys(name for row in rows for name in row["seconds"] if precision_of(name) == precision))
        if not names:
            continue
        lines += ["", f"### Matrix products in {precision}", ""]
        lines += table(
            ["", *(name if name.endswith(precision) else f"{name}, {precision}" for name in names)],
            [[row["situation"], *(_step_cell(row, name) for name in names)] for row in rows],
        )
    lines += _starts(outcome)
    lines += _troubles(outcome)
    own_fails = any(m["kind"] == "failed" and m["what"].startswith(("xpnet", "floor")) for m in outcome.messages)
    return Told(lines, outcome.status == 0 and bool(rows) and not own_fails)


def _starts(outcome: Outcome) -> list[str]:
    """What each peer took to start, first and later, most of which is importing and compiling."""
    starts = collections.defaultdict(list)
    for message in outcome.messages:
        if message["kind"] == "started":
            starts[message["what"]].append(message["seconds"])
    told = [
        f"{name} {first:.1f}, then {' '.join(f'{s:.1f}' for s in later)}" for name, (first, *later) in starts.items()
    ]
    return ["", f"Seconds to start: {'; '.join(told)}."] if told else []


def precision_of(name: str) -> str:
    """As peers.precision_of, by the name alone: this program imports nothing that may fail."""
    return next((precision for precision in PRECISIONS if name.endswith(precision)), "float32")


def _step_cell(row: dict[str, Any], name: str) -> str:
    if name not in row["seconds"]:
        return ""
    ratio = row["ratios"].get(name)
    beside = "" if ratio is None or name in ("xpnet", f"xpnet-{precision_of(name)}") else f" ({ratio:.2f})"
    return f"{1e6 * row['seconds'][name]:.1f}{beside}"


def tell_profile(outcome: Outcome) -> Told:
    kernels = [message for message in outcome.messages if message["kind"] == "kernel"]
    lines = []
    for net in dict.fromkeys(kernel["net"] for kernel in kernels):
        rows = [
            [kernel["what"], f"{1e6 * kernel['seconds']:.2f}", f"{1e6 * kernel['floor']:.2f}"]
            for kernel in kernels
            if kernel["net"] == net
        ]
        batch = next(kernel["batch"] for kernel in kernels if kernel["net"] == net)
        lines += [f"### {net}, batch {batch}, float32", "", *table(["kernel", "µs", "floor, µs"], rows), ""]
    whole = all(any(k["net"] == net and "whole step" in k["what"] for k in kernels) for net in ("mlp", "cnn"))
    return Told(lines + _troubles(outcome), outcome.status == 0 and whole)


_TRAINED = re.compile(r"^trained for [\d.]+ s.*", re.MULTILINE)
_ACCURACY = re.compile(r"^test accuracy: [\d.]+", re.MULTILINE)
_EPOCH = re.compile(r"^epoch (\d+/\d+) .*?([\d,]+) samples/s", re.MULTILINE)


def tell_example(outcome: Outcome) -> Told:
    trained, accuracy = _TRAINED.search(outcome.text), _ACCURACY.search(outcome.text)
    epochs, own_data = _EPOCH.findall(outcome.text), "is not here" not in outcome.text
    lines = []
    if trained:
        lines.append(f"- {trained[0]}")
    if epochs:
        lines.append(f"- in epoch {epochs[0][0]} {epochs[0][1]} samples/s, in epoch {epochs[-1][0]} {epochs[-1][1]}")
    if accuracy:
        lines.append(f"- {accuracy[0]}")
    if not own_data:
        lines.append("- MNIST was not found, so these are the digits that come with xpnet")
    return Told(lines, outcome.status == 0 and bool(trained and accuracy) and own_data)


_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed|xpassed|warnings?)")


def closing_line(text: str) -> dict[str, int]:
    """The counts in the last line that pytest prints, {} where there is none: "3 failed, 10 passed in 2.31s"."""
    for line in reversed(text.splitlines()):
        if re.search(r"\bin [\d.]+s\b", line) and (found := _COUNT.findall(line)):
            return {what.rstrip("s") if what.startswith(("error", "warning")) else what: int(n) for n, what in found}
    return {}


class Tests(NamedTuple):
    """What ran. failed: {the test: its message}."""

    passed: int
    failed: dict[str, str]
    skipped: int
    collected: int | None


def tests_in(text: str) -> Tests:
    """What pytest_plugin.py has written: a line of JSON a result, the last of which may be cut off."""
    results: dict[str, tuple[str, str]] = {}
    collected = None
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            told = json.loads(line)
            if told["kind"] == "collected":
                collected = told["count"]
            elif results.get(told["test"], ("",))[0] != "failed":  # a test may pass, and fail where it is torn down
                results[told["test"]] = (told["kind"], told.get("message", ""))
    counts = collections.Counter(kind for kind, _ in results.values())
    failed = {test: message for test, (kind, message) in results.items() if kind == "failed"}
    return Tests(counts["passed"], failed, counts["skipped"], collected)


def tell_tests(outcome: Outcome, results: Path, date: str, commit: str, emulated: bool) -> Told:
    """The line of the record that says how many tests passed; then the failed ones."""
    tests = tests_in(results.read_text(encoding="utf-8", errors="replace") if results.exists() else "")
    closing = closing_line(outcome.text)
    # Where pytest came to its end, its own counts hold: they also have errors outside tests.
    passed = closing.get("passed", 0) if closing else tests.passed
    failed = closing.get("failed", 0) + closing.get("error", 0) if closing else len(tests.failed)
    lines = [f"GPU tests, {date}, commit {commit}: {passed} passed, {failed} failed{' (emulated)' if emulated else ''}"]
    if not closing:
        total = f" of {tests.collected}" if tests.collected else ""
        done = tests.passed + len(tests.failed) + tests.skipped
        lines += ["", f"pytest did not come to its end: {done}{total} tests had run."]
    elif others := [f"{n} {what}" for what, n in closing.items() if what not in ("passed", "failed", "deselected")]:
        lines += ["", f"Besides: {', '.join(others)}."]
    if tests.failed:
        lines += ["", "Failed, with the first and the last line of the message:", ""]
        lines += [f"- `{test}`: {plain(message)}" for test, message in list(tests.failed.items())[:LONGEST_LIST]]
        if len(tests.failed) > LONGEST_LIST:
            lines.append(f"- and {len(tests.failed) - LONGEST_LIST} more")
    return Told(lines, outcome.status == 0 and bool(closing) and passed > 0 and failed == 0)


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return f"``{text.replace('`', chr(39))}``" if text else ""


_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?")
_FOUND = re.compile(r"^=========\s+((?:Invalid|Program hit|Internal|Uninitialized|Error:|Warning:) .*)")


def sanitizer_errors(text: str) -> int | None:
    """How many errors compute-sanitizer counted, over all its summaries; None where it printed none."""
    found = _SUMMARY.findall(text)
    return sum(map(int, found)) if found else None


def tell_sanitizer(outcome: Outcome, tool: str | None, needed: bool) -> Told:
    """needed: whether it is a fault that there is no tool."""
    errors = sanitizer_errors(outcome.text)
    lines = []
    if tool is None:
        lines.append("compute-sanitizer is not there, neither on PATH nor in /usr/local/cuda*. This ran without it.")
    elif errors is None:
        lines.append("compute-sanitizer printed no summary.")
    lines += [line.strip("= ") for line in outcome.text.splitlines() if _SUMMARY.search(line)]
    kinds = collections.Counter(found[1].strip() for line in outcome.text.splitlines() if (found := _FOUND.match(line)))
    lines += [f"- {count} times: {plain(what[:200])}" for what, count in kinds.most_common(20)]
    trained = [message for message in outcome.messages if message["kind"] == "trained"]
    lines += [f"- captured and replayed: {message['what']}, {message['seconds']:.1f} s" for message in trained]
    closing = closing_line(outcome.text)
    if closing:
        lines.append(f"- tests: {', '.join(f'{count} {what}' for what, count in closing.items())}")
    if stopped := "the time is up" in outcome.text:
        lines.append("- the time was up before all tests had run: they are a random sample")
    lines += _troubles(outcome)
    well = (errors == 0) if tool is not None else not needed
    ended = outcome.status == 0 or (stopped and outcome.status == 2)  # pytest's status where a run is interrupted
    return Told(lines, well and ended and not closing.get("failed", 0) + closing.get("error", 0))


def _troubles(outcome: Outcome) -> list[str]:
    """What failed or was dropped, each once."""
    whats, places = collections.defaultdict(dict), collections.defaultdict(dict)
    for message in outcome.messages:
        if message["kind"] in ("failed", "dropped"):
            key = message["kind"], message["why"]
            whats[key][message["what"]] = places[key][message.get("where")] = None
    lines = []
    for kind, why in whats:
        what, where = (list(filter(None, found[kind, why])) for found in (whats, places))
        beside = f" ({'; '.join(where)})" if where else ""
        lines.append(f"- {kind}: {', '.join(what)}{beside}: {plain(why)}")
    return ["", *lines] if lines else []


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


# The plan ------------------------------------------------------------------------------------------------------------


def compute_sanitizer() -> str | None:
    """Where the tool is."""
    places = ["/usr/local/cuda*/bin/compute-sanitizer", "/usr/local/cuda*/compute-sanitizer/compute-sanitizer"]
    found = shutil.which("compute-sanitizer")
    return found or next((path for place in places for path in sorted(glob.glob(place), reverse=True)), None)


def plan(data: Path, emulated: bool, work: Path, date: str, commit: str, marks: str = "gpu") -> list[list[Part]]:
    """The stages. work: a folder for files between the parts.  marks: which tests are run."""
    tool = None if emulated else compute_sanitizer()
    memcheck = [tool, "--tool", "memcheck", "--target-processes", "application-only"] if tool else []
    results = work / "tests.jsonl"
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

    def program(name: str, *arguments: str) -> list[str]:
        if emulated:
            return [sys.executable, "-m", "benchmarks.emulation", name, *arguments]
        return [sys.executable, *([] if name.endswith(".py") else ["-m"]), name, *arguments]

    def steps(seconds: float) -> list[str]:
        small = ["--nets", "mlp", "cnn", "--batch", "4", "8", "--rounds", "2", "3", "--turn", "0"] if emulated else []
        return program("benchmarks.gpu_steps", "--seconds", f"{seconds - 3.0:.1f}", *small)

    def profile(seconds: float) -> list[str]:
        small = ["--batch", "4", "--large", "1000", "--wide", "16", "--repeats", "2"] if emulated else []
        return program("benchmarks.profile", *small)

    def example(model: str) -> Callable[[float], list[str]]:
        def command(seconds: float) -> list[str]:
            few = ["--epochs", "1"] if emulated else []
            return program("examples/mnist.py", "--backend", "gpu", "--model", model, "--data-dir", str(data), *few)

        return command

    def training(seconds: float) -> list[str]:
        return [*memcheck, *program("benchmarks.sanitized_training", "--seconds", f"{0.7 * seconds:.1f}")]

    def pytest(*arguments: str) -> list[str]:
        common = ["-p", "no:benchmark", "-p", "no:cacheprovider", "-p", "benchmarks.pytest_plugin", "-q"]
        return [sys.executable, "-m", "pytest", *arguments, *common]

    def suite(seconds: float) -> list[str]:
        which = ["tests/test_gpu_kernels.py", "-k", "emulated and relu"] if emulated else ["-m", marks]
        return pytest(*which, "-n", "2" if emulated else str(WORKERS), "--dist", "worksteal")

    def kernels(seconds: float) -> list[str]:
        which = ["-k", "emulated and softmax"] if emulated else ["-m", "gpu"]
        # Set for this process alone: its end comes before its limit, and compute-sanitizer prints its summary then.
        given = [f"XPNET_CHECK_SECONDS={0.7 * seconds:.1f}", *([] if emulated else ["XPNET_CHECK_NO_POOL=1"])]
        return ["env", *given, *memcheck, *pytest("tests/test_gpu_kernels.py", *which)]

    jax = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"}
    patience = 3.0 if emulated else 1.0
    examples = [
        Part(f"mnist-{model}", f"examples/mnist.py, {model}", example(model), tell_example, limit * patience, reserve)
        for model, limit, reserve in (("mlp", 15, 5), ("cnn", 15, 6), ("resnet", 30, 18))
    ]
    return [
        [Part("environment", "Machine", lambda _: program("benchmarks.gpu_environment"), tell_environment, 20, 5)],
        [Part("steps", "Training steps", steps, tell_steps, 110 * patience, 60, jax)],
        [Part("profile", "A step kernel by kernel", profile, tell_profile, 20 * patience, 10)],
        *([part] for part in examples),
        [
            Part(
                "tests", "Tests", suite, lambda outcome: tell_tests(outcome, results, date, commit, emulated),
                100, 80, {"XPNET_CHECK_RESULTS": str(results), **one_thread},
            ),
            Part(
                "sanitizer-training", "compute-sanitizer memcheck: captured training", training,
                lambda outcome: tell_sanitizer(outcome, tool, not emulated), 100, 30, one_thread,
            ),
            Part(
                "sanitizer-kernels", "compute-sanitizer memcheck: kernel tests, without CuPy's memory pool", kernels,
                lambda outcome: tell_sanitizer(outcome, tool, not emulated), 100, 30, one_thread,
            ),
        ],
    ]  # fmt: skip


def prepare_environment(data: Path) -> None:
    """What all parts have in common."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["XPNET_DATA_DIR"] = str(data)
    for name in ("XPNET_BACKEND", "XPNET_CUDA_GRAPHS", "XPNET_FAST", "PYTEST_ADDOPTS"):
        os.environ.pop(name, None)


def limits(given: Sequence[str]) -> dict[str, float]:
    """{"tests": 100.0} of ["tests=100"]."""
    found = {}
    for text in given:
        name, _, seconds = text.partition("=")
        found[name] = float(seconds)
    return found


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Where this program is told to end, it kills what it has started first."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    before = {number: signal.signal(number, leave) for number in heard}  # nohup's stays
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=os.environ.get("XPNET_DATA_DIR") or ROOT / ".data")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="a folder for the record")
    parser.add_argument("--only", nargs="+", metavar="PART", help="names of parts, as the progress lines have them")
    parser.add_argument("--limit", nargs="+", default=[], metavar="PART=SECONDS", help="other limits of parts")
    parser.add_argument("--tests", default="gpu", metavar="MARKS", help="which tests (default: -m %(default)s)")
    parser.add_argument("--emulated", action="store_true", help="without a GPU, with small sizes")
    options = parser.parse_args(arguments)
    data = Path(options.data).resolve()
    prepare_environment(data)
    with tempfile.TemporaryDirectory(prefix="gpu-check-files-") as work, ended_by_signals():
        stages = plan(data, options.emulated, Path(work), time.strftime("%Y-%m-%d"), commit(), options.tests)
        known, others = {part.name for stage in stages for part in stage}, limits(options.limit)
        if unknown := (set(options.only or ()) | set(others)) - known:
            parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
        stages = [
            [
                part._replace(limit=others.get(part.name, part.limit))
                for part in stage
                if not options.only or part.name in options.only
            ]
            for stage in stages
        ]
        record = Record(options.out, [part for stage in stages for part in stage], options.emulated)
        try:
            run(stages, options.seconds, record)
            record.complete = True
        finally:
            record.write()
            print(f"\nwritten: {record.path}\n\n{record.text()}", flush=True)
    return 1 if record.troubles else 0


if __name__ == "__main__":
    sys.exit(main())
