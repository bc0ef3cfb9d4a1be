"""Worker processes of the attacks: what crashes, hangs or kills a worker is a result, and does not end the attack.

A worker is `python -m reliability.PART` with its task, as JSON, on standard input. It writes a line of JSON before each
case, {"case": …}, and after it, {"bad": a text or null}.
"""

import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reliability.results import Result

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"  # has the emulated GPU


def environment(**changed: str) -> dict[str, str]:
    """The environment of a worker."""
    paths = [str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **changed}


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
