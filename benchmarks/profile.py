"""Times of all calls of a captured training step, on a GPU in float32 or on the CPU.

    python -m benchmarks.profile --nets mlp cnn --batch 128
    python -m benchmarks.profile --device cpu --nets mlp

The calls and their times are those of `xpnet.explain_step`. On a GPU, the floor of a call is a lower bound of its time:
the time for the bytes of its arrays at the speed of a large copy, or for its multiplications at the speed of a large
matrix product. The whole step takes less than the sum, because independent calls run at the same time, and a kernel
begins before the one before it has ended.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import xpnet
from benchmarks import messages
from benchmarks.graphs import Graph
from benchmarks.nets import NETS
from benchmarks.peers.own import Own

REPEATS = 200
REPEATS_OF_LARGE = 20
LARGE = 2**26  # elements of the large copy
WIDE = 4096  # rows and columns of the large matrix product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["mlp", "mlp-wide", "cnn", "torch-example"])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--batch", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--large", type=int, default=LARGE, help="elements of the large copy (default: %(default)s)")
    parser.add_argument("--wide", type=int, default=WIDE, help="rows of the large matrices (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="(default: %(default)s)")
    options = parser.parse_args()
    for net in options.nets:
        if options.device == "cpu":
            print(f"{net} at batch {options.batch}\n\n{profile_on_cpu(net, options.batch)}\n")
            continue
        for what, seconds, floor in profile_of(net, options.batch, "gpu", options.large, options.wide, options.repeats):
            kernel = what.removeprefix(f"{net}: ")
            messages.send("kernel", net=net, batch=options.batch, what=kernel, seconds=seconds, floor=floor)


def profile_on_cpu(net: str, batch: int) -> str:
    """The calls of a step on the CPU, with the median time of each."""
    own = Own(NETS[net], batch, "cpu", "")
    return xpnet.explain_step(own.model, batch, metrics=[], times=True)


def profile_of(
    net: str, batch: int, device: str, large: int = LARGE, wide: int = WIDE, repeats: int = REPEATS
) -> Iterator[tuple[str, float, float]]:
    """(name, seconds, floor in seconds) of each kernel, of their sum, and of the whole step."""
    own = Own(NETS[net], batch, device, "")
    backend = own.model.backend
    for _ in range(5):
        own.step()
    with own.model.execution_context():
        per_byte, per_multiplication = _device_speed(backend, large, wide, min(repeats, REPEATS_OF_LARGE))
    explained = xpnet.explain_step(own.model, batch, optimizer=own.optimizer, metrics=[], times=True)
    sums = [0.0, 0.0]
    for call in explained.replayed:
        floor = max(call.bytes * per_byte, call.operations / 2 * per_multiplication)
        sums = [sums[0] + (call.seconds or 0.0), sums[1] + floor]
        yield f"{net}: {call.name} {call.shapes}", call.seconds or 0.0, floor
    yield f"{net}: all of these, one after the other", sums[0], sums[1]
    own.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        own.step()
    own.synchronize()
    reason = own.fallback_reason()
    kind = "one graph" if reason is None else f"eager, because {reason}"
    yield f"{net}: the whole step, {kind}", (time.perf_counter() - start) / repeats, sums[1]
    own.close()


def _seconds(backend: Any, work: Callable[[], None], repeats: int) -> float:
    def many() -> None:
        for _ in range(repeats):
            work()

    graph, times = Graph(backend, many, warm_up=work), []
    for _ in range(5):
        backend.synchronize()
        start = time.perf_counter()
        graph.replay()
        backend.synchronize()
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)


def _device_speed(backend: Any, large: int, wide: int, repeats: int) -> tuple[float, float]:
    """(seconds per byte of a large copy, seconds per multiplication of a large matrix product)."""
    a, b = (backend.zeros((large,), "float32") for _ in range(2))
    copied = _seconds(backend, lambda: backend.rescale(a, 1.0, 0.0, out=b), repeats)
    x, y, z = (backend.zeros((wide, wide), "float32") for _ in range(3))
    multiplied = _seconds(backend, lambda: backend.matmul(x, y, out=z), repeats)
    return copied / (a.nbytes + b.nbytes), multiplied / wide**3


if __name__ == "__main__":
    main()
