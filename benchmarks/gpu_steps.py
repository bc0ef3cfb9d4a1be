"""Training steps of xpnet and other libraries on a GPU, interleaved in one process: medians of many rounds.

    python -m benchmarks.gpu_steps --seconds 60

Prints a message (see messages.py) for each network and batch size as soon as it is measured. A peer that is missing or
fails is left out, with a message. There is also a message for what does not fit into --seconds.

`python -m benchmarks --device gpu` runs each peer in its own process, and takes much longer.
"""

import argparse
import gc
import os
import time
from collections.abc import Mapping
from typing import Any

import xpnet
from benchmarks import messages
from benchmarks.nets import NETS, Net
from benchmarks.peers import KINDS, Peer, close, compared_with, settings, start
from benchmarks.rounds import Measurement, ratio
from benchmarks.sequences import NETS as SEQUENCES
from benchmarks.sequences import SMALL, SequenceNet
from benchmarks.worker import seconds

NAMES = [
    *("xpnet", "xpnet-tf32", "xpnet-bfloat16", "xpnet-eager", "floor", "floor-tf32", "floor-bfloat16"),
    *("torch-float32", "torch-tf32", "torch-bfloat16", "torch-graph-float32", "torch-graph-tf32"),
    *("jax-scan-float32", "jax-scan-tf32"),
]
NET_NAMES = ["mlp", "mlp-wide", "cnn", "torch-example"]
WARM_UP = 6  # steps: xpnet captures the second one and replays from the fourth on
ROUNDS = (5, 25)  # the least and the largest number
ROUNDS_SECONDS = 2.0  # no round starts after this time if the least number is reached
FIRST_START = 0.25  # the expected time of a later start, as a share of the first one
TURN_SECONDS = 0.01


class Comparison:
    """Measures one network and batch size after the other until the deadline."""

    def __init__(
        self, names: list[str], deadline: float, turn_seconds: float, rounds: tuple[int, int],
        sequences: Mapping[str, SequenceNet] = SEQUENCES,
    ) -> None:  # fmt: skip
        self.names, self.deadline, self.turn_seconds, self.rounds = names, deadline, turn_seconds, rounds
        self._nets: dict[str, Net | SequenceNet] = {**NETS, **sequences}
        self._start_seconds: dict[str, float] = {}  # the expected time for a peer to start
        self._not_installed: set[str] = set()  # modules under benchmarks.peers

    def measure(self, net: str, batch: int) -> None:
        situation = f"{net}, batch {batch}"
        if self._remaining() < 1.5 * self._start_seconds.get("xpnet", 1.0) + 2.0:
            messages.send("dropped", what="all", where=situation, why="no time was left")
            return
        peers: dict[str, Peer] = {}
        try:
            for name in self.names:
                self._start(peers, name, net, batch, situation)
            self._rounds(peers, situation)
        finally:
            for peer in reversed(peers.values()):  # in reverse order, because their streams are nested
                close(peer)
            peers.clear()
            gc.collect()

    def _start(self, peers: dict[str, Peer], name: str, net: str, batch: int, situation: str) -> None:
        if KINDS[name].module in self._not_installed:
            return
        if self._remaining() < 1.5 * self._start_seconds.get(name, 0.0) + 2.0:
            messages.send("dropped", what=name, where=situation, why="no time was left")
            return
        start_time = time.monotonic()
        try:
            peer = start(name, self._nets[net], batch, "gpu")
            with settings(peer):
                for _ in range(WARM_UP if steps_per_call(peer) == 1 else 2):
                    peer.step()
                peer.synchronize()
        except Exception as error:  # the other peers are measured nevertheless
            if isinstance(error, ImportError) and not name.startswith(("xpnet", "floor")):
                self._not_installed.add(KINDS[name].module)
            messages.send("failed", what=name, where=situation, why=reason(error))
            return
        peers[name] = peer
        elapsed = time.monotonic() - start_time
        # The first start imports and compiles most of what the later ones need.
        self._start_seconds[name] = elapsed if name in self._start_seconds else FIRST_START * elapsed
        messages.send("started", what=name, where=situation, seconds=elapsed)
        if name != "xpnet-eager" and hasattr(peer, "fallback_reason") and (why := peer.fallback_reason()) is not None:
            messages.send("failed", what=name, where=situation, why=f"its steps are eager: {why}")

    def _rounds(self, peers: dict[str, Peer], situation: str) -> None:
        counts: dict[str, int] = {}
        for name in list(peers):
            step = self._measure_once(peers, name, 2, situation)
            if step is not None:
                counts[name] = max(1, round(self.turn_seconds / max(step * steps_per_call(peers[name]), 1e-9)))
        values: dict[str, list[float]] = {name: [] for name in peers}
        least, most = self.rounds
        end = time.monotonic() + ROUNDS_SECONDS
        for i in range(most):
            if i >= least and time.monotonic() > min(end, self.deadline):
                break
            for name in list(peers) if i % 2 else list(reversed(peers)):
                step = self._measure_once(peers, name, counts[name], situation)
                if step is None:
                    del values[name]
                else:
                    values[name].append(step)
        measured = {name: Measurement(seconds) for name, seconds in values.items() if seconds}
        if not measured:
            return
        messages.send(
            "steps",
            situation=situation,
            rounds=max(len(m.values) for m in measured.values()),
            seconds={name: m.median for name, m in measured.items()},
            ratios={name: ratio(measured[own], measured[name]) for name in measured
                    if (own := compared_with(name)) in measured},
        )  # fmt: skip

    def _measure_once(self, peers: dict[str, Peer], name: str, count: int, situation: str) -> float | None:
        """The seconds of a step. A peer that fails is removed, and the result is None."""
        peer = peers[name]
        try:
            with settings(peer):
                return seconds(peer.step, (), count, peer.synchronize) / steps_per_call(peer)
        except Exception as error:
            messages.send("failed", what=name, where=situation, why=reason(error))
            del peers[name]
            return None

    def _remaining(self) -> float:
        return self.deadline - time.monotonic()


def steps_per_call(peer: Peer) -> int:
    return getattr(peer, "steps_per_call", 1)


def reason(error: BaseException) -> str:
    """The type of an error and the last line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def main() -> None:
    start_time = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="the time limit (default: %(default)s)")
    parser.add_argument("--peers", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--nets", nargs="+", choices=[*NETS, *SEQUENCES], default=NET_NAMES)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512], help="(default: 128 512)")
    parser.add_argument("--rounds", type=int, nargs=2, default=ROUNDS, metavar=("LEAST", "MOST"))
    parser.add_argument("--turn", type=float, default=TURN_SECONDS, help="seconds of a turn (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="networks on sequences of small sizes")
    options = parser.parse_args()
    # By default, JAX allocates most of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.3")
    backend: Any = xpnet.get_backend("gpu")
    sequences = SMALL if options.small else SEQUENCES
    rounds = tuple(options.rounds)
    comparison = Comparison(options.peers, start_time + options.seconds, options.turn, rounds, sequences)
    with backend.stream():
        for batch in options.batch:
            for net in options.nets:
                comparison.measure(net, batch)


if __name__ == "__main__":
    main()
