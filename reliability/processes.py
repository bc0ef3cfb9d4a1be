"""Processes of the attacks: what crashes, hangs or kills one of them is a result, and does not end the attack.

- `attack` starts workers, `python -m reliability.PART` with a task, as JSON, on standard input. A worker writes a line
  of JSON before each case, {"case": …}, and after it, {"bad": a text or null}.
- `in_a_process` calls one function that tries all of its cases.
- `run_tests` runs tests by pytest.
"""

import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from reliability.results import Result

ROOT = Path(__file__).parents[1]


def environment(**changed: str) -> dict[str, str]:
    """The environment of a process that imports this package."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **changed}


# Workers --------------------------------------------------------------------------------------------------------------


class Worker:
    """A running worker."""

    def __init__(self, part: str, task: Mapping[str, Any], folder: Path, **variables: str) -> None:
        self._errors = open(folder / f"{part}.stderr", "w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", f"reliability.{part}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=folder,
            env=environment(**variables),
        )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task))
        self.process.stdin.close()
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def messages(self, timeout: float) -> Iterator[dict[str, Any]]:
        """What the worker reports, until its end. Raises TimeoutError if it is silent for `timeout` seconds."""
        while True:
            try:
                line = self._lines.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError from None
            if not line:
                self.process.wait()
                return
            yield json.loads(line)

    def stop(self) -> str:
        """Kill the worker if it runs. Returns the end of what it wrote to standard error, with its stacks."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGABRT)  # faulthandler prints the stacks
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self._errors.closed:
            return ""
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.seek(0)
        text = self._errors.read()
        self._errors.close()
        return text[-2000:]


def attack(
    part: str, task: Mapping[str, Any], count: int, folder: Path, result: Result, timeout: float = 20.0,
    **variables: str,
) -> None:  # fmt: skip
    """Let workers try the cases 0 to count - 1 of a task, and add them to the result.

    The task of a worker has "first" and "count" in addition. After a crash or a hang, a new worker continues with the
    next case.
    """
    first, fruitless = 0, 0
    while first < count and fruitless < 3:
        worker = Worker(part, {**task, "first": first, "count": count}, folder, **variables)
        case, began, before = "", False, first
        try:
            for message in worker.messages(timeout if began else max(timeout, 120.0)):
                began = True
                if "case" in message:
                    case = message["case"]
                    continue
                first += 1
                result.tried += 1
                if message["bad"] is not None:
                    result.bad.append(f"{case}: {message['bad']}")
        except TimeoutError:
            result.tried, first = result.tried + 1, first + 1
            result.bad.append(f"{case}: no answer for {timeout:g} s\n{worker.stop()}")
        else:
            code = worker.process.wait()
            text = worker.stop()
            if code or first < count:
                result.tried, first = result.tried + 1, first + 1
                result.bad.append(f"{case}: the worker ended with the status {code}\n{text}")
        fruitless = fruitless + 1 if first <= before + 1 else 0
    if first < count:
        result.bad.append(f"{part}: workers fail again and again, so {count - first} cases were not tried")


def read_task() -> dict[str, Any]:
    """The task of this worker. Ctrl-C raises KeyboardInterrupt in it, also if its parent ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable()
    task: dict[str, Any] = json.load(sys.stdin)
    return task


def tell(**message: Any) -> None:
    """Report to the parent."""
    print(json.dumps(message), flush=True)


# Functions and tests --------------------------------------------------------------------------------------------------


def in_a_process(module: str, name: str, cases: str, count: int, seed: int, seconds: float) -> Result:
    """Call module.CASES[name][-1](count, seed) in a process that may run for this long.

    It returns how many cases were tried, a line for each that went wrong, and perhaps a note.
    """
    code = f"import json, {module} as m; print('report', json.dumps(m.CASES[{name!r}][-1]({count}, {seed})))"
    try:
        done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=ROOT,
                              timeout=seconds, check=False)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        errors = (error.stderr or b"")[-2000:]
        return Result(cases, count, [f"{name}, seed {seed}: it still ran after {seconds:.0f} s: {errors!r}"])
    report = next((line for line in done.stdout.splitlines() if line.startswith("report ")), None)
    if done.returncode or report is None:
        return Result(cases, count, [f"{name}, seed {seed}: exit status {done.returncode}: {done.stderr[-2000:]}"])
    tried, bad, *note = json.loads(report.removeprefix("report "))
    return Result(cases, tried, [f"{name}, seed {seed}: {text}" for text in bad], *note)


def one_case(test: str, failures: list[str]) -> tuple[int, list[str]]:
    """How `run_tests` counts a test that tries one case."""
    return 1, failures


def run_tests(
    cases: str, arguments: list[str], folder: Path, count: Callable[[str, list[str]], tuple[int, list[str]]] = one_case,
    **variables: str,
) -> Result:  # fmt: skip
    """Run tests by `pytest *arguments`. Those that are skipped do not count.

    count: a function of the name of a test and the messages of its failures. It returns how many cases the test tried,
    and a text for each that went wrong.
    """
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, cwd=ROOT, check=False)
    if not report.exists():
        return Result(cases, 0, [f"pytest {' '.join(arguments)} did not report: {(done.stdout + done.stderr)[-500:]}"])
    result, skipped = Result(cases), 0
    for test in xml.etree.ElementTree.parse(report).iter("testcase"):
        if test.find("skipped") is not None:
            skipped += 1
            continue
        found = [*test.findall("failure"), *test.findall("error")]
        name = f"{test.get('classname', '').replace('.', '/')}.py::{test.get('name')}"
        tried, bad = count(name, [failure.get("message") or (failure.text or "")[-300:] for failure in found])
        result.tried += tried
        result.bad += [f"{name}: {' '.join(text.split())[:300]}" for text in bad]
    result.note = f"{skipped} skipped" if skipped else ""
    return result
