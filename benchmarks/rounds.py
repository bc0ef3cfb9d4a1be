"""Interleaved measurements of several peers, each in its own process.

In each round, every peer is measured once. All other processes sleep meanwhile; a pause before each measurement lets
their threads fall asleep, because spinning threads would occupy a core. A ratio of two peers is the median of their
ratios in each round, so it is stable even if the speed of the machine drifts.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.peers import KINDS

PAUSE_SECONDS = 0.15  # for the threads of the previous worker to fall asleep
TURN_SECONDS = 0.25  # of one measurement, which has one step or more


class Measurement(NamedTuple):
    """The values of one peer in all rounds: seconds, or bytes of memory."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def minimum(self) -> float:
        return min(self.values)


def ratio(a: Measurement, b: Measurement) -> float:
    """a / b: the median over the rounds."""
    return statistics.median(x / y for x, y in zip(a.values, b.values, strict=True))


class Worker:
    """A process that answers each question, a line on its stdin, with one value, after a first line that it is ready.

    name: of what it measures, in tables.  command: a module with its arguments, such as benchmarks.worker.
    environment: all variables.  cores: how many it may use; None is all.
    """

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], cores: int | None) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            preexec_fn=None if cores is None else lambda: limit_cores(cores),
        )  # fmt: skip
        self._read()

    def ask(self, question: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def ask_after_pause(self, question: str) -> float:
        """Ask after a pause, in which the threads of the previous worker fall asleep."""
        time.sleep(PAUSE_SECONDS)
        return self.ask(question)

    def repetitions(self, what: str) -> int:
        """How many repetitions take TURN_SECONDS, from a trial that is not recorded."""
        self.ask(f"{what} 3")
        return max(1, round(TURN_SECONDS / self.ask(f"{what} 3")))

    def stop(self) -> None:
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.stop()
            raise SystemExit(f"{self.name} ended with exit status {self._process.returncode}; its message is above.")
        return line


def environment(name: str, threads: int) -> dict[str, str]:
    """The environment variables of a process with this peer and number of threads."""
    count = str(threads)
    counts = {f"{library}_NUM_THREADS": count for library in ("OMP", "OPENBLAS", "MKL")}
    return {**os.environ, **counts, **KINDS[name].environment}


def limit_cores(threads: int) -> None:
    """Limit this process to `threads` cores, because some libraries start one thread per core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


@contextlib.contextmanager
def workers(names: Sequence[str], net: str, batch: int, device: str, threads: int) -> Iterator[list[Worker]]:
    cores = threads if device == "cpu" else None
    with contextlib.ExitStack() as stack:
        started = []
        for name in names:
            command = ["benchmarks.worker", name, net, str(batch), device]
            started.append(Worker(name, command, environment(name, threads), cores))
            stack.callback(started[-1].stop)
        yield started


def interleaved(workers: Sequence[Worker], what: str, rounds: int) -> dict[str, Measurement]:
    """Measure `what` of each worker in turn; every second round in reverse order.

    A "step" and a "predict" are repeated for TURN_SECONDS in each turn; an "epoch" and a "fit" take long enough.
    """
    whole = what in ("epoch", "fit")
    questions = {w.name: what if whole else f"{what} {w.repetitions(what)}" for w in workers}
    values: dict[str, list[float]] = {w.name: [] for w in workers}
    for i in range(rounds):
        for worker in workers if i % 2 else reversed(workers):
            values[worker.name].append(worker.ask_after_pause(questions[worker.name]))
    return {name: Measurement(seconds) for name, seconds in values.items()}
