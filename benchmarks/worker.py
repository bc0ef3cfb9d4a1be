"""One fresh process of one peer: it reads a line, does what it says, and prints the seconds that took.

    python -m benchmarks.worker xpnet mlp 128 cpu

`step N` and `predict N`: the mean of N training steps, or of N calls of predict on a batch.  `epoch`: one pass through
many made-up samples, after a first one that is not counted.  `memory`: the most that the process has had, in bytes.
"""

import resource
import sys
import time
from collections.abc import Callable

from benchmarks.nets import NETS, Net, epoch_size
from benchmarks.peers import KINDS, Peer, start, turn
from benchmarks.samples import batch_of


def main(name: str, net_name: str, batch: str, device: str) -> None:
    net, size = NETS[net_name], int(batch)
    peer = start(name, net, size, device)
    with turn(peer):
        answer(peer, net, size, KINDS[name].dtype)


def answer(peer: Peer, net: Net, size: int, dtype: str) -> None:
    """What each line asks, until there are no more."""
    x, (all_x, all_y) = batch_of(net, size, dtype)[0], (None, None)
    print("ready", flush=True)
    for line in sys.stdin:
        what, *count = line.split()
        if what == "memory":
            result = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        elif what == "epoch":
            if all_x is None:
                all_x, all_y = batch_of(net, epoch_size(net), dtype)
                peer.epoch(all_x, all_y)
            peer.synchronize()
            begun = time.perf_counter()
            told = peer.epoch(all_x, all_y)
            peer.synchronize()
            result = time.perf_counter() - begun if told is None else told
        elif what == "predict":
            result = seconds(peer.predict, (x,), int(count[0]), peer.synchronize)
        else:
            at_once = getattr(peer, "steps_at_once", 1)
            result = seconds(peer.step, (), -(-int(count[0]) // at_once), peer.synchronize) / at_once
        print(result, flush=True)


def seconds(work: Callable[..., object], arguments: tuple, count: int, synchronize: Callable[[], None]) -> float:
    """The mean of so many calls."""
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        work(*arguments)
    synchronize()
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main(*sys.argv[1:])
