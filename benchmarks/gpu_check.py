"""Check and measure xpnet on a GPU machine, in four minutes and without a network.

    python -m benchmarks.gpu_check --data .data               # writes benchmarks/results/gpu-DATE.md
    python -m benchmarks.gpu_check --emulated --out /tmp/out  # the same without a GPU, to test this program

The parts: the machine; training steps of xpnet, PyTorch and JAX in one process (gpu_steps.py); the same for attention,
an LSTM and a GPT; the kernels of a step (profile.py); examples/mnist.py with its three models; and then, at the same
time, the GPU tests, and memcheck of compute-sanitizer with captured training (sanitized_training.py) and with the
kernel tests. Nothing else runs during the measurements.

Each part is a process with a time limit. A part that exceeds it is killed with its children. The record is rewritten
after each part, and has what the part printed before it was killed. The exit status is 0 if all parts ended by
themselves and found no error.

--data is the parent of a folder `mnist/` with the four files of MNIST, by default $XPNET_DATA_DIR, or `.data` in the
checkout. $XPNET_COMMIT names the commit of a copy without a git repository.
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
MIN_SECONDS = 3.0  # a part that has less time is not started
WORKERS = 12  # of pytest-xdist
MAX_LISTED = 60  # failed tests in the record
PRECISIONS = ("float32", "tf32", "bfloat16")


class Outcome(NamedTuple):
    """How a part ended. status: the exit status; None if it did not end by itself, with the reason in `problem`."""

    status: int | None
    seconds: float
    text: str
    problem: str = ""

    @property
    def messages(self) -> list[dict[str, Any]]:
        return messages.parse(self.text)


class Section(NamedTuple):
    """The section of a part in the record, and whether the part found no error."""

    lines: list[str]
    ok: bool


class Part(NamedTuple):
    """One process. command: a function of its time limit.  report: a function that writes its section of the record.
    limit: the largest time limit, in seconds.  reserve: seconds that earlier parts leave for it.
    """

    name: str
    title: str
    command: Callable[[float], Sequence[str]]
    report: Callable[[Outcome], Section]
    limit: float
    reserve: float
    environment: Mapping[str, str] = {}  # never changed


# Processes -----------------------------------------------------------------------------------------------------------


class Process:
    """A running part, in its own session, with its output in a file."""

    def __init__(self, part: Part, limit: float, folder: Path) -> None:
        self.part, self.limit = part, limit
        self._start = time.monotonic()
        self._path = folder / f"{part.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._problem = ""
        environment = {**os.environ, **part.environment}
        try:
            with self._path.open("wb") as log:
                self._process = subprocess.Popen(
                    part.command(limit), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                    env=environment, start_new_session=True,
                )  # fmt: skip
        except Exception as error:  # the other parts run nevertheless
            self._problem = f"it could not be started: {type(error).__name__}: {error}"

    def outcome(self) -> Outcome | None:
        """How the part ended, or None if it is still running. Kills it if it exceeds its limit."""
        seconds = time.monotonic() - self._start
        if self._process is None:
            return Outcome(None, seconds, "", self._problem)
        status = self._process.poll()
        if status is None and seconds < self.limit:
            return None
        if status is None:
            self._problem = f"it was killed at its limit of {self.limit:.0f} s"
        self.kill()  # also kills children that outlive a part
        return Outcome(status, seconds, self.text(), self._problem)

    def text(self) -> str:
        with contextlib.suppress(OSError):
            return self._path.read_text(encoding="utf-8", errors="replace")
        return ""

    def kill(self) -> None:
        if self._process is None:
            return
        for _ in range(10):  # repeated, because a process may start others meanwhile
            members = session_processes(self._process.pid)
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            for pid in members:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.2)
            if not members:
                return


def session_processes(leader: int) -> list[int]:
    """The processes of the session of this leader, in all process groups, without zombies."""
    found = []
    for stat in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # "pid (name) state parent group session ..."; the name may contain spaces and parentheses.
            fields = Path(stat).read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(stat.split("/")[2]))
    return found


class Record:
    """The Markdown file with the results so far."""

    def __init__(self, folder: Path, parts: Sequence[Part], emulated: bool) -> None:
        self.date, self.commit, self.emulated = time.strftime("%Y-%m-%d"), commit(), emulated
        self.path = folder / f"gpu-{'emulated-' if emulated else ''}{self.date}.md"
        self._start = time.monotonic()
        self._sections: dict[str, tuple[str, list[str]]] = {part.name: (part.title, ["Not run."]) for part in parts}
        self.complete = False
        self.problems: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, part: Part, outcome: Outcome) -> None:
        """Add the section of a part, and write the file."""
        try:
            lines, ok = part.report(outcome)
        except Exception:  # unexpected output of one part must not prevent the record of the others
            lines, ok = [f"The output cannot be read: {traceback.format_exc().splitlines()[-1]}"], False
        if outcome.problem:
            lines = [*lines, "", f"Incomplete: {outcome.problem}."]
        if not ok or outcome.problem:
            self.problems.append(part.name)
            lines = [*lines, "", *tail(outcome.text)]
        self._sections[part.name] = (part.title, [*lines, "", f"({outcome.seconds:.1f} s)"])
        self.write()

    def text(self) -> str:
        lines = []
        if self.emulated:
            lines += ["**Everything in this record was emulated on a CPU. Its times mean nothing.**", ""]
        lines += [f"# GPU check, {self.date}, commit {self.commit}", ""]
        packages = ", ".join(f"{name} {version}" for name, version in versions().items())
        lines += [f"{packages}.", ""]
        seconds = time.monotonic() - self._start
        if not self.complete:
            lines += [f"The check was still running when this was written, after {seconds:.0f} s."]
        elif self.problems:
            lines += [f"Took {seconds:.0f} s. Parts with problems: {', '.join(self.problems)}."]
        else:
            lines += [f"Took {seconds:.0f} s. All parts were completed, and nothing failed."]
        for title, section in self._sections.values():
            lines += ["", f"## {title}", "", *section]
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(self.text(), encoding="utf-8")
        temporary.replace(self.path)


def run(stages: Sequence[Sequence[Part]], seconds: float, record: Record) -> None:
    """Run the stages one after the other, and the parts of each stage at the same time."""
    start = time.monotonic()
    record.write()
    running: list[Process] = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        try:
            for number, stage in enumerate(stages):
                reserved = sum(max(part.reserve for part in later) for later in stages[number + 1 :] if later)
                for part in stage:
                    limit = min(part.limit, seconds - (time.monotonic() - start) - reserved)
                    if limit < MIN_SECONDS:
                        record.add(part, Outcome(None, 0.0, "", "it was not started, because no time was left"))
                        continue
                    log(start, f"{part.name}: started, for at most {limit:.0f} s")
                    running.append(Process(part, limit, Path(folder)))
                _wait(running, record, start)
        finally:
            for process in running:
                process.kill()
                record.add(process.part, Outcome(None, 0.0, process.text(), "the check was stopped"))


def _wait(running: list[Process], record: Record, start: float) -> None:
    """Wait until all processes have ended."""
    logged = time.monotonic()
    while running:
        for process in list(running):
            outcome = process.outcome()
            if outcome is not None:
                running.remove(process)
                record.add(process.part, outcome)
                log(start, f"{process.part.name}: ended after {outcome.seconds:.1f} s {outcome.problem}".rstrip())
        if running and time.monotonic() - logged > 15.0:
            logged = time.monotonic()
            for process in running:
                last = process.text().strip().splitlines()[-1:] or [""]
                log(start, f"{process.part.name}: running; {last[0][:100]}")
        if running:
            time.sleep(0.05)


def log(start: float, text: str) -> None:
    print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)


def tail(text: str, lines: int = 15) -> list[str]:
    """The last lines of an output, without messages."""
    rest = [line[:300] for line in text.splitlines() if line.strip() and messages.MARK not in line]
    # The summary that the tests print must not be mistaken for the line of this record.
    rest = [line.replace("```", "'''") for line in rest if not line.startswith("GPU tests, ")]
    return ["The end of its output:", "", "```text", *rest[-lines:], "```"] if rest else []


# Sections of the record ----------------------------------------------------------------------------------------------


def report_environment(outcome: Outcome) -> Section:
    facts = [message for message in outcome.messages if message["kind"] == "fact"]
    lines = [f"- {fact['what']}: {fact['text']}" for fact in facts]
    return Section([*lines, *_problems(outcome)], outcome.status == 0)


def report_steps(outcome: Outcome) -> Section:
    """A table for each precision: µs per step of each peer, and the ratio of xpnet's time to it."""
    rows = [message for message in outcome.messages if message["kind"] == "steps"]
    lines = []
    if rows:
        lines = [
            f"µs per step, medians of at least {min(row['rounds'] for row in rows)} rounds in one process. In brackets "
            "xpnet's time in the same precision / this time, the median over the rounds; below 1, xpnet is faster."
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
    lines += _start_times(outcome)
    lines += _problems(outcome)
    own_fails = any(m["kind"] == "failed" and m["what"].startswith(("xpnet", "floor")) for m in outcome.messages)
    return Section(lines, outcome.status == 0 and bool(rows) and not own_fails)


def _start_times(outcome: Outcome) -> list[str]:
    """The start times of each peer, mostly imports and compilation: of its first start, then of later ones."""
    starts = collections.defaultdict(list)
    for message in outcome.messages:
        if message["kind"] == "started":
            starts[message["what"]].append(message["seconds"])
    texts = [
        f"{name} {first:.1f}, then {' '.join(f'{s:.1f}' for s in later)}" for name, (first, *later) in starts.items()
    ]
    return ["", f"Seconds to start: {'; '.join(texts)}."] if texts else []


def precision_of(name: str) -> str:
    """The same as peers.precision_of; this program imports nothing that may fail."""
    return next((precision for precision in PRECISIONS if name.endswith(precision)), "float32")


def _step_cell(row: dict[str, Any], name: str) -> str:
    if name not in row["seconds"]:
        return ""
    ratio = row["ratios"].get(name)
    in_brackets = "" if ratio is None or name in ("xpnet", f"xpnet-{precision_of(name)}") else f" ({ratio:.2f})"
    return f"{1e6 * row['seconds'][name]:.1f}{in_brackets}"


def report_profile(outcome: Outcome) -> Section:
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
    complete = all(any(k["net"] == net and "whole step" in k["what"] for k in kernels) for net in ("mlp", "cnn"))
    return Section(lines + _problems(outcome), outcome.status == 0 and complete)


_TRAINED = re.compile(r"^trained for [\d.]+ s.*", re.MULTILINE)
_ACCURACY = re.compile(r"^test accuracy: [\d.]+", re.MULTILINE)
_EPOCH = re.compile(r"^epoch (\d+/\d+) .*?([\d,]+) samples/s", re.MULTILINE)


def report_example(outcome: Outcome) -> Section:
    trained, accuracy = _TRAINED.search(outcome.text), _ACCURACY.search(outcome.text)
    epochs, has_mnist = _EPOCH.findall(outcome.text), "was not found" not in outcome.text
    lines = []
    if trained:
        lines.append(f"- {trained[0]}")
    if epochs:
        lines.append(f"- in epoch {epochs[0][0]} {epochs[0][1]} samples/s, in epoch {epochs[-1][0]} {epochs[-1][1]}")
    if accuracy:
        lines.append(f"- {accuracy[0]}")
    if not has_mnist:
        lines.append("- MNIST was not found, so these are the digits that ship with xpnet")
    return Section(lines, outcome.status == 0 and bool(trained and accuracy) and has_mnist)


_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed|xpassed|warnings?)")


def summary_counts(text: str) -> dict[str, int]:
    """The counts in the last line of pytest, such as "3 failed, 10 passed in 2.31s"; {} if it is missing."""
    for line in reversed(text.splitlines()):
        if re.search(r"\bin [\d.]+s\b", line) and (found := _COUNT.findall(line)):
            return {what.rstrip("s") if what.startswith(("error", "warning")) else what: int(n) for n, what in found}
    return {}


class Tests(NamedTuple):
    """The results of a test run. failed: {test: message}.  collected: the number of all tests, if known."""

    passed: int
    failed: dict[str, str]
    skipped: int
    collected: int | None


def parse_results(text: str) -> Tests:
    """Parse the results file of pytest_plugin.py, one line of JSON per result. The last line may be truncated."""
    results: dict[str, tuple[str, str]] = {}
    collected = None
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            result = json.loads(line)
            if result["kind"] == "collected":
                collected = result["count"]
            elif results.get(result["test"], ("",))[0] != "failed":  # a test may pass and fail in its teardown
                results[result["test"]] = (result["kind"], result.get("message", ""))
    counts = collections.Counter(kind for kind, _ in results.values())
    failed = {test: message for test, (kind, message) in results.items() if kind == "failed"}
    return Tests(counts["passed"], failed, counts["skipped"], collected)


def report_tests(outcome: Outcome, results: Path, date: str, commit: str, emulated: bool) -> Section:
    """The line with the number of passed tests, and the list of failed tests."""
    tests = parse_results(results.read_text(encoding="utf-8", errors="replace") if results.exists() else "")
    counts = summary_counts(outcome.text)
    # The counts of pytest include errors outside tests, but are missing if pytest was killed.
    passed = counts.get("passed", 0) if counts else tests.passed
    failed = counts.get("failed", 0) + counts.get("error", 0) if counts else len(tests.failed)
    lines = [f"GPU tests, {date}, commit {commit}: {passed} passed, {failed} failed{' (emulated)' if emulated else ''}"]
    if not counts:
        total = f" of {tests.collected}" if tests.collected else ""
        done = tests.passed + len(tests.failed) + tests.skipped
        lines += ["", f"pytest was not completed: {done}{total} tests ran."]
    elif others := [f"{n} {what}" for what, n in counts.items() if what not in ("passed", "failed", "deselected")]:
        lines += ["", f"Also: {', '.join(others)}."]
    if tests.failed:
        lines += ["", "Failed tests, with the first and the last line of the message:", ""]
        lines += [f"- `{test}`: {code_span(message)}" for test, message in list(tests.failed.items())[:MAX_LISTED]]
        if len(tests.failed) > MAX_LISTED:
            lines.append(f"- and {len(tests.failed) - MAX_LISTED} more")
    return Section(lines, outcome.status == 0 and bool(counts) and passed > 0 and failed == 0)


def code_span(text: str) -> str:
    """Text as a code span of Markdown, which shows it unchanged."""
    return f"``{text.replace('`', chr(39))}``" if text else ""


_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?")
_FOUND = re.compile(r"^=========\s+((?:Invalid|Program hit|Internal|Uninitialized|Error:|Warning:) .*)")


def sanitizer_errors(text: str) -> int | None:
    """The number of errors in all summaries of compute-sanitizer; None if it printed no summary."""
    found = _SUMMARY.findall(text)
    return sum(map(int, found)) if found else None


def report_sanitizer(outcome: Outcome, tool: str | None, needed: bool) -> Section:
    """The section of a run of compute-sanitizer. needed: whether its absence is an error."""
    errors = sanitizer_errors(outcome.text)
    lines = []
    if tool is None:
        lines.append("compute-sanitizer was not found on PATH or in /usr/local/cuda*. This ran without it.")
    elif errors is None:
        lines.append("compute-sanitizer printed no summary.")
    lines += [line.strip("= ") for line in outcome.text.splitlines() if _SUMMARY.search(line)]
    kinds = collections.Counter(found[1].strip() for line in outcome.text.splitlines() if (found := _FOUND.match(line)))
    lines += [f"- {count} times: {code_span(what[:200])}" for what, count in kinds.most_common(20)]
    trained = [message for message in outcome.messages if message["kind"] == "trained"]
    lines += [f"- captured and replayed: {message['what']}, {message['seconds']:.1f} s" for message in trained]
    counts = summary_counts(outcome.text)
    if counts:
        lines.append(f"- tests: {', '.join(f'{count} {what}' for what, count in counts.items())}")
    if stopped := "the time is up" in outcome.text:
        lines.append("- the time was up before all tests had run; those that ran are a random sample")
    lines += _problems(outcome)
    clean = (errors == 0) if tool is not None else not needed
    completed = outcome.status == 0 or (stopped and outcome.status == 2)  # 2: the run was stopped
    return Section(lines, clean and completed and not counts.get("failed", 0) + counts.get("error", 0))


def _problems(outcome: Outcome) -> list[str]:
    """What failed or was dropped, one line per reason."""
    names, situations = collections.defaultdict(dict), collections.defaultdict(dict)
    for message in outcome.messages:
        if message["kind"] in ("failed", "dropped"):
            key = message["kind"], message["why"]
            names[key][message["what"]] = situations[key][message.get("where")] = None
    lines = []
    for kind, why in names:
        what, where = (list(filter(None, found[kind, why])) for found in (names, situations))
        in_brackets = f" ({'; '.join(where)})" if where else ""
        lines.append(f"- {kind}: {', '.join(what)}{in_brackets}: {code_span(why)}")
    return ["", *lines] if lines else []


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


# The plan ------------------------------------------------------------------------------------------------------------


def compute_sanitizer() -> str | None:
    """The path of compute-sanitizer, or None."""
    places = ["/usr/local/cuda*/bin/compute-sanitizer", "/usr/local/cuda*/compute-sanitizer/compute-sanitizer"]
    found = shutil.which("compute-sanitizer")
    return found or next((path for place in places for path in sorted(glob.glob(place), reverse=True)), None)


def plan(data: Path, emulated: bool, work: Path, date: str, commit: str, marks: str = "gpu") -> list[list[Part]]:
    """The stages. work: a folder for files that parts exchange.  marks: the pytest marks of the tests."""
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

    def sequences(seconds: float) -> list[str]:
        nets, batch = ["attention", "lstm", "gpt"], ["--batch", "2" if emulated else "64"]
        small = ["--small", "--rounds", "2", "3", "--turn", "0"] if emulated else []
        names = ["xpnet", "xpnet-tf32", "xpnet-bfloat16", "torch-float32", "torch-tf32", "torch-bfloat16"]
        limit = f"{seconds - 3.0:.1f}"
        return program("benchmarks.gpu_steps", "--seconds", limit, "--nets", *nets, *batch, *small, "--peers", *names)

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
        which = ["tests/backends/cuda/test_kernels.py", "-k", "emulated and relu"] if emulated else ["-m", marks]
        return pytest(*which, "-n", "2" if emulated else str(WORKERS), "--dist", "worksteal")

    def kernels(seconds: float) -> list[str]:
        which = ["-k", "emulated and softmax"] if emulated else ["-m", "gpu"]
        # It stops before its limit, because compute-sanitizer prints its summary at the end.
        variables = [f"XPNET_CHECK_SECONDS={0.7 * seconds:.1f}", *([] if emulated else ["XPNET_CHECK_NO_POOL=1"])]
        return ["env", *variables, *memcheck, *pytest("tests/backends/cuda/test_kernels.py", *which)]

    jax = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"}
    slowdown = 3.0 if emulated else 1.0
    examples = [
        Part(f"mnist-{model}", f"examples/mnist.py, {model}", example(model), report_example, limit * slowdown, reserve)
        for model, limit, reserve in (("mlp", 15, 5), ("cnn", 15, 6), ("resnet", 30, 18))
    ]
    return [
        [Part("environment", "Machine", lambda _: program("benchmarks.gpu_environment"), report_environment, 20, 5)],
        [Part("steps", "Training steps", steps, report_steps, 90 * slowdown, 50, jax)],
        [Part("sequences", "Training steps on sequences", sequences, report_steps, 40 * slowdown, 25)],
        [Part("profile", "The kernels of a step", profile, report_profile, 20 * slowdown, 10)],
        *([part] for part in examples),
        [
            Part(
                "tests", "Tests", suite, lambda outcome: report_tests(outcome, results, date, commit, emulated),
                100, 80, {"XPNET_CHECK_RESULTS": str(results), **one_thread},
            ),
            Part(
                "sanitizer-training", "compute-sanitizer memcheck: captured training", training,
                lambda outcome: report_sanitizer(outcome, tool, not emulated), 100, 30, one_thread,
            ),
            Part(
                "sanitizer-kernels", "compute-sanitizer memcheck: kernel tests, without CuPy's memory pool", kernels,
                lambda outcome: report_sanitizer(outcome, tool, not emulated), 100, 30, one_thread,
            ),
        ],
    ]  # fmt: skip


def set_environment(data: Path) -> None:
    """Set the environment variables of all parts."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["XPNET_DATA_DIR"] = str(data)
    for name in ("XPNET_BACKEND", "XPNET_CAPTURE", "XPNET_FAST", "PYTEST_ADDOPTS"):
        os.environ.pop(name, None)


def parse_limits(options: Sequence[str]) -> dict[str, float]:
    """{"tests": 100.0} from ["tests=100"]."""
    pairs = [option.partition("=") for option in options]
    return {name: float(seconds) for name, _, seconds in pairs}


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Raise SystemExit on SIGTERM and SIGHUP, so that the running parts are killed."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    before = {number: signal.signal(number, leave) for number in numbers}  # SIGHUP stays ignored under nohup
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the time limit (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=os.environ.get("XPNET_DATA_DIR") or ROOT / ".data")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="a folder for the record")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run only these parts, e.g. tests")
    parser.add_argument("--limit", nargs="+", default=[], metavar="PART=SECONDS", help="time limits of parts")
    parser.add_argument("--tests", default="gpu", metavar="MARKS", help="pytest marks of the tests (default: gpu)")
    parser.add_argument("--emulated", action="store_true", help="use an emulated GPU, and small sizes")
    options = parser.parse_args(arguments)
    data = Path(options.data).resolve()
    set_environment(data)
    with tempfile.TemporaryDirectory(prefix="gpu-check-files-") as work, exit_on_signals():
        stages = plan(data, options.emulated, Path(work), time.strftime("%Y-%m-%d"), commit(), options.tests)
        known, limits = {part.name for stage in stages for part in stage}, parse_limits(options.limit)
        if unknown := (set(options.only or ()) | set(limits)) - known:
            parser.error(f"unknown part: {', '.join(sorted(unknown))}. Known: {', '.join(sorted(known))}")
        stages = [
            [
                part._replace(limit=limits.get(part.name, part.limit))
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
    return 1 if record.problems else 0


if __name__ == "__main__":
    sys.exit(main())
