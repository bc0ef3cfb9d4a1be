"""Peers measured in turn, each in a fresh process of its own, round after round.

Between two turns all of them sleep, and so do their threads: an idle pool that still spins would have a core. A ratio
is that of two turns of one round, and the figure is the median over the rounds: so it holds where the machine's speed
drifts, as the seconds do not.
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

PAUSE = 0.15  # seconds in which the threads of the one before fall asleep
TURN = 0.25  # seconds that a turn takes, at least one step


class Figure(NamedTuple):
    """All rounds of one peer, in seconds, or of memory in bytes."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        return min(self.values)


def ratio(a: Figure, b: Figure) -> float:
    """a over b: the median over the rounds."""
    return statistics.median(x / y for x, y in zip(a.values, b.values, strict=True))


class Worker:
    """A process of `benchmarks.worker`, that is asked for one figure at a time."""

    def __init__(self, name: str, net: str, batch: int, device: str, threads: int) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", name, net, str(batch), device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(name, threads),
            preexec_fn=(lambda: keep_to(threads)) if device == "cpu" else None,
        )  # fmt: skip
        self._read()

    def ask(self, question: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def ask_after_a_pause(self, question: str) -> float:
        """When the threads of the one before are asleep."""
        time.sleep(PAUSE)
        return self.ask(question)

    def count_for(self, what: str) -> int:
        """How many of them take a turn; those of this trial are not counted."""
        self.ask(f"{what} 3")
        return max(1, round(TURN / self.ask(f"{what} 3")))

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


def keep_to(threads: int) -> None:
    """Let this process have so many cores: some libraries count them and ask nobody."""
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


def interleaved(team: Sequence[Worker], what: str, rounds: int) -> dict[str, Figure]:
    """`what` ("step", "predict", "epoch") of each, one after the other, and in the next round backwards."""
    questions = {w.name: what if what == "epoch" else f"{what} {w.count_for(what)}" for w in team}
    values: dict[str, list[float]] = {w.name: [] for w in team}
    for i in range(rounds):
        for worker in team if i % 2 else reversed(team):
            values[worker.name].append(worker.ask_after_a_pause(questions[worker.name]))
    return {name: Figure(seconds) for name, seconds in values.items()}
