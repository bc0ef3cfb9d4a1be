"""A process that measures one peer: it reads one question per line and prints the answer.

    python -m benchmarks.worker xpnet mlp 128 cpu

`step N`, `predict N`: the mean seconds of N training steps, or of N calls of predict on one batch.  `epoch`: the
seconds of one epoch; the first epoch is not measured.  `memory`: the peak memory of the process, in bytes.
"""

import resource
import sys
import time
from collections.abc import Callable

from benchmarks.nets import NETS, Net, epoch_size
from benchmarks.peers import KINDS, Peer, settings, start
from benchmarks.samples import batch_of


def main(name: str, net_name: str, batch: str, device: str) -> None:
    net, size = NETS[net_name], int(batch)
    peer = start(name, net, size, device)
    with settings(peer):
        answer(peer, net, size, KINDS[name].dtype)


def answer(peer: Peer, net: Net, size: int, dtype: str) -> None:
    """Answer the questions on stdin until it is closed."""
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
            start = time.perf_counter()
            own_time = peer.epoch(all_x, all_y)
            peer.synchronize()
            result = time.perf_counter() - start if own_time is None else own_time
        elif what == "predict":
            result = seconds(peer.predict, (x,), int(count[0]), peer.synchronize)
        else:
            steps = getattr(peer, "steps_per_call", 1)
            result = seconds(peer.step, (), -(-int(count[0]) // steps), peer.synchronize) / steps
        print(result, flush=True)


def seconds(work: Callable[..., object], arguments: tuple, count: int, synchronize: Callable[[], None]) -> float:
    """The mean seconds of a call, over `count` calls."""
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        work(*arguments)
    synchronize()
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main(*sys.argv[1:])
