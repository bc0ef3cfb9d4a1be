"""Training steps of xpnet and its peers on a GPU, all in one process, in turn: medians of many rounds.

    python -m benchmarks.gpu_steps --seconds 60

Prints a line of JSON (see messages.py) for each net and batch size as soon as it is measured. A peer that is not
installed or fails is named, with its error, and left out. What does not fit into --seconds is named too.

`python -m benchmarks --device gpu` gives each peer a process of its own, and takes much longer.
"""

import argparse
import gc
import os
import time
from typing import Any

import xpnet
from benchmarks import messages
from benchmarks.nets import NETS
from benchmarks.peers import KINDS, Peer, close, compared_with, start, turn
from benchmarks.rounds import Figure, ratio
from benchmarks.worker import seconds

NAMES = [
    *("xpnet", "xpnet-tf32", "xpnet-bfloat16", "xpnet-eager", "floor", "floor-tf32", "floor-bfloat16"),
    *("torch-float32", "torch-tf32", "torch-graph-float32", "torch-graph-tf32"),
    *("jax-scan-float32", "jax-scan-tf32"),
]
NET_NAMES = ["mlp", "mlp-wide", "cnn", "torch-example"]
WARM_UP = 6  # steps: xpnet captures its second and replays from its fourth on
ROUNDS = (5, 25)  # at least and at most
ROUNDS_SECONDS = 2.0  # in which there are more than the least
FIRST_START = 0.25  # of its time, a later start is expected to take
TURN_SECONDS = 0.01


class Comparison:
    """All situations, one after the other, until the time is up."""

    def __init__(self, names: list[str], until: float, turn_seconds: float, rounds: tuple[int, int]) -> None:
        self.names, self.until, self.turn_seconds, self.rounds = names, until, turn_seconds, rounds
        self._costs: dict[str, float] = {}  # seconds that a peer is expected to take to start
        self._not_installed: set[str] = set()  # modules under benchmarks.peers

    def measure(self, net: str, batch: int) -> None:
        situation = f"{net}, batch {batch}"
        if self._left() < 1.5 * self._costs.get("xpnet", 1.0) + 2.0:
            messages.send("dropped", what="all", where=situation, why="no time was left")
            return
        team: dict[str, Peer] = {}
        try:
            for name in self.names:
                self._start(team, name, net, batch, situation)
            self._rounds(team, situation)
        finally:
            for peer in reversed(team.values()):  # the streams that they opened are nested
                close(peer)
            team.clear()
            gc.collect()

    def _start(self, team: dict[str, Peer], name: str, net: str, batch: int, situation: str) -> None:
        if KINDS[name].module in self._not_installed:
            return
        if self._left() < 1.5 * self._costs.get(name, 0.0) + 2.0:
            messages.send("dropped", what=name, where=situation, why="no time was left")
            return
        begun = time.monotonic()
        try:
            peer = start(name, NETS[net], batch, "gpu")
            with turn(peer):
                for _ in range(WARM_UP if steps_at_once(peer) == 1 else 2):
                    peer.step()
                peer.synchronize()
        except Exception as error:  # whatever a peer has against this machine
            if isinstance(error, ImportError) and not name.startswith(("xpnet", "floor")):
                self._not_installed.add(KINDS[name].module)
            messages.send("failed", what=name, where=situation, why=reason(error))
            return
        team[name] = peer
        taken = time.monotonic() - begun
        # The first start imports and compiles most of what the later ones need.
        self._costs[name] = taken if name in self._costs else FIRST_START * taken
        messages.send("started", what=name, where=situation, seconds=taken)
        why_eager = peer.why_eager() if hasattr(peer, "why_eager") and name != "xpnet-eager" else None
        if why_eager is not None:
            messages.send("failed", what=name, where=situation, why=f"its steps are eager: {why_eager}")

    def _rounds(self, team: dict[str, Peer], situation: str) -> None:
        counts: dict[str, int] = {}
        for name in list(team):
            one = self._turn(team, name, 2, situation)
            if one is not None:
                counts[name] = max(1, round(self.turn_seconds / max(one * steps_at_once(team[name]), 1e-9)))
        values: dict[str, list[float]] = {name: [] for name in team}
        least, most = self.rounds
        end = time.monotonic() + ROUNDS_SECONDS
        for i in range(most):
            if i >= least and time.monotonic() > min(end, self.until):
                break
            for name in list(team) if i % 2 else list(reversed(team)):
                one = self._turn(team, name, counts[name], situation)
                if one is None:
                    del values[name]
                else:
                    values[name].append(one)
        figures = {name: Figure(those) for name, those in values.items() if those}
        if not figures:
            return
        messages.send(
            "steps",
            situation=situation,
            rounds=max(len(figure.values) for figure in figures.values()),
            seconds={name: figure.median for name, figure in figures.items()},
            ratios={
                name: ratio(figures[own], figures[name]) for name in figures if (own := compared_with(name)) in figures
            },
        )

    def _turn(self, team: dict[str, Peer], name: str, count: int, situation: str) -> float | None:
        """Seconds a step; None, and the peer is out, where it fails."""
        peer = team[name]
        try:
            with turn(peer):
                return seconds(peer.step, (), count, peer.synchronize) / steps_at_once(peer)
        except Exception as error:
            messages.send("failed", what=name, where=situation, why=reason(error))
            del team[name]
            return None

    def _left(self) -> float:
        return self.until - time.monotonic()


def steps_at_once(peer: Peer) -> int:
    return getattr(peer, "steps_at_once", 1)


def reason(error: BaseException) -> str:
    """The last line of an error's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def main() -> None:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for everything (default: %(default)s)")
    parser.add_argument("--peers", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NET_NAMES)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512], help="(default: 128 512)")
    parser.add_argument("--rounds", type=int, nargs=2, default=ROUNDS, metavar=("LEAST", "MOST"))
    parser.add_argument("--turn", type=float, default=TURN_SECONDS, help="seconds (default: %(default)s)")
    options = parser.parse_args()
    # JAX takes most of the memory unless told otherwise.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.3")
    backend: Any = xpnet.get_backend("gpu")
    comparison = Comparison(options.peers, begun + options.seconds, options.turn, tuple(options.rounds))
    with backend.stream():
        for batch in options.batch:
            for net in options.nets:
                comparison.measure(net, batch)


if __name__ == "__main__":
    main()
