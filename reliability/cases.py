"""Numbered cases, run in subprocesses with bounds of time and memory: a crash or a hang is counted as a bad case.

`python -m reliability.cases MODULE:CLASS SEED CASE` repeats one case and shows its traceback.
"""

import collections
import contextlib
import gc
import importlib
import mmap
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from reliability.results import Result
from xpnet.errors import XpnetError

_PATIENCE = 60.0  # seconds for which a worker may show no progress: other processes may use the cores

# The state of a case, one byte in a file that the worker and its parent share. Lower numbers are outcomes of the cases.
_NOT_RUN, _BAD, _IN_REFERENCE, _RUNNING = 0, 253, 254, 255


class TooSlowError(BaseException):
    """A case took too much time. It is no Exception, so that nothing swallows it."""


class Cases:
    """Cases that `run_cases` tries. A case is a number; everything random follows from it and the seed.

    OUTCOMES: what `run` may return. Everything that it raises is a fault. FOUND_OUTSIDE: the outcome if another
    implementation, which a case compares with, crashes or hangs.
    """

    OUTCOMES: ClassVar[tuple[str, ...]] = ()
    FOUND_OUTSIDE: ClassVar[str] = "the reference failed"
    SECONDS: ClassVar[float] = 1.0  # of processor time for a case
    MEGABYTES: ClassVar[int] = 200  # that a case may allocate

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed

    def run(self, case: int) -> str:
        """Try one case. Returns its outcome."""
        raise NotImplementedError

    @contextlib.contextmanager
    def in_reference(self) -> Any:
        """While another implementation runs, whose crashes are no faults. Its limit of time is the parent's."""
        self._state(_IN_REFERENCE)
        timer = signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            yield
        finally:
            self._state(_RUNNING)
            signal.setitimer(signal.ITIMER_PROF, timer[0])

    def _state(self, state: int) -> None:
        """Note the state of the current case. The worker replaces this method."""


def refused(error: XpnetError) -> str:
    """ "refused", the outcome of a case that ends in an error of xpnet. Raises it again if memory ran out before."""
    cause: BaseException | None = error
    while cause is not None:
        if (isinstance(cause, MemoryError) and not isinstance(cause, XpnetError)) or "Unable to allocate" in str(cause):
            raise AssertionError(f"too much memory was asked for before this was refused: {error}") from error
        cause = cause.__cause__ or cause.__context__
    return "refused"


def run_cases(title: str, cases: type[Cases], count: int, seed: int, folder: Path, processes: int = 2) -> Result:
    """Try this number of cases of a class, in parallel."""
    name = f"{cases.__module__}:{cases.__name__}"
    table = folder / f"{cases.__name__}.states"
    table.write_bytes(bytes(count))
    outside, step = len(cases.OUTCOMES) + 1, min(processes, count)
    workers = [_Worker(name, seed, table, first, step, outside) for first in range(step)]
    bad: list[str] = []
    try:
        while any(not worker.done for worker in workers):
            time.sleep(0.05)
            for worker in workers:
                worker.watch(bad)
    finally:
        for worker in workers:
            worker.close()
    states = collections.Counter(table.read_bytes())
    outcomes = [*cases.OUTCOMES, cases.FOUND_OUTSIDE]
    note = [f"{states[number]:,} {outcome}" for number, outcome in enumerate(outcomes, 1) if states[number]]
    return Result(title, count - states[_NOT_RUN], sorted(bad), ", ".join(note))


class _Worker:
    """A subprocess that tries every `step`th case, and is started again after a crash.

    outside: the state of a case in which another implementation crashed.
    """

    def __init__(self, name: str, seed: int, table: Path, first: int, step: int, outside: int) -> None:
        self.name, self.seed, self.table, self.first, self.step, self.outside = name, seed, table, first, step, outside
        self.done = False
        self._start()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "reliability.cases", self.name, str(self.seed), str(self.table)]
        self._process = subprocess.Popen(
            [*command, str(self.first), str(self.step)], stdout=self._errors, stderr=self._errors,
            cwd=Path(__file__).parents[1], env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        self._changed, self._seen = time.monotonic(), b""

    def close(self) -> None:
        """End the process if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def watch(self, bad: list[str]) -> None:
        """Note what has happened since the last call."""
        if self.done:
            return
        code, states = self._process.poll(), self.table.read_bytes()
        if code is None:
            if states[self.first :: self.step] != self._seen:
                self._changed, self._seen = time.monotonic(), states[self.first :: self.step]
            elif time.monotonic() - self._changed > _PATIENCE:
                self._process.kill()
            return
        self._errors.seek(0)
        text = self._errors.read()
        self._errors.close()
        bad += [line.removeprefix("BAD ") for line in text.splitlines() if line.startswith("BAD ")]
        self.done = code == 0
        if self.done:
            return
        case = self.first + self.step * next(
            (i for i, state in enumerate(states[self.first :: self.step]) if state >= _IN_REFERENCE), len(states)
        )
        if case >= len(states):
            raise RuntimeError(f"{self.name} failed outside of its cases:\n{text[-3000:]}")
        state = self.outside
        if states[case] != _IN_REFERENCE:
            state = _BAD
            how = f"signal {-code}" if code != -signal.SIGKILL else f"no progress in {_PATIENCE:.0f} s, or killed"
            last = text.strip().splitlines()[-1:] or [""]
            bad.append(f"{self.name} {self.seed} {case}: the process died ({how}) {last[0][:200]}")
        with open(self.table, "r+b") as file:
            file.seek(case)
            file.write(bytes([state]))
        self._start()


def _class(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _work(name: str, seed: int, table: Path, first: int, step: int) -> None:
    """Try the cases of one worker."""
    with open(table, "r+b") as file, mmap.mmap(file.fileno(), 0) as states, quick_folder() as folder:
        cases = _class(name)(Path(folder), seed)
        numbers = {outcome: number for number, outcome in enumerate(cases.OUTCOMES, 1)}
        prepare()
        for case in range(first, len(states), step):
            if states[case] != _NOT_RUN:
                continue
            cases._state = lambda state, case=case: states.__setitem__(case, state)
            states[case] = _RUNNING
            try:
                outcome = bounded(lambda case=case: cases.run(case), cases.SECONDS, cases.MEGABYTES)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                states[case] = _BAD
                text = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"BAD {name} {seed} {case}: {text[:400]} [{place_of(error)}]", flush=True)
            else:
                states[case] = numbers[outcome]


def quick_folder() -> Any:
    """A temporary folder, in memory if the system has one there."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def bounded(function: Callable[[], str], seconds: float, megabytes: int) -> str:
    """Call a function within the bounds. One that is too slow is called again, because it may have compiled a loop."""
    for last in (False, True):
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, hard))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            return function()
        except TooSlowError as error:
            if last:
                raise AssertionError(f"it took more than {seconds} s of processor time") from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    raise AssertionError("unreachable")


def prepare() -> None:
    """Prepare this process for `bounded`."""
    signal.signal(signal.SIGPROF, _stop)
    gc.collect()
    gc.freeze()


def _stop(number: int, frame: Any) -> None:
    raise TooSlowError


def place_of(error: BaseException) -> str:
    """Where an error was raised: the last lines of xpnet in its traceback, or the last ones at all."""
    while isinstance(error, AssertionError | TooSlowError) and error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/xpnet/" in frame.filename] or frames
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in own[:-4:-1])


def main(arguments: list[str]) -> None:
    name, seed, third, *rest = arguments
    if rest:
        _work(name, int(seed), Path(third), int(rest[0]), int(rest[1]))
        return
    with quick_folder() as folder:
        print(_class(name)(Path(folder), int(seed)).run(int(third)))


if __name__ == "__main__":
    main(sys.argv[1:])
