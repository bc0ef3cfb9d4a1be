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
    """A process of `benchmarks.worker`, which measures one value per question."""

    def __init__(self, name: str, net: str, batch: int, device: str, threads: int) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", name, net, str(batch), device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(name, threads),
            preexec_fn=(lambda: limit_cores(threads)) if device == "cpu" else None,
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
            raise SystemExit(f"{self.name} ended with exit status {self._process.wait()}; its message is above.")
        return line


def environment(name: str, threads: int) -> dict[str, str]:
    count = str(threads)
    counts = {f"{library}_NUM_THREADS": count for library in ("OMP", "OPENBLAS", "MKL")}
    return {**os.environ, **counts, **KINDS[name].environment}


def limit_cores(threads: int) -> None:
    """Limit this process to `threads` cores, because some libraries start one thread per core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


@contextlib.contextmanager
def workers(names: Sequence[str], net: str, batch: int, device: str, threads: int) -> Iterator[list[Worker]]:
    with contextlib.ExitStack() as stack:
        started = []
        for name in names:
            started.append(Worker(name, net, batch, device, threads))
            stack.callback(started[-1].stop)
        yield started


def interleaved(workers: Sequence[Worker], what: str, rounds: int) -> dict[str, Measurement]:
    """Measure `what` ("step", "predict", "epoch") of each worker in turn; every second round in reverse order."""
    questions = {w.name: what if what == "epoch" else f"{what} {w.repetitions(what)}" for w in workers}
    values: dict[str, list[float]] = {w.name: [] for w in workers}
    for i in range(rounds):
        for worker in workers if i % 2 else reversed(workers):
            values[worker.name].append(worker.ask_after_pause(questions[worker.name]))
    return {name: Measurement(seconds) for name, seconds in values.items()}
