"""One training step on a GPU in float32, kernel by kernel.

    python -m benchmarks.profile --nets mlp cnn --batch 128

Each kernel is captured many times into a CUDA graph, which is timed: launched one by one, the host would be measured.
The floor of a kernel is the time for the bytes of its arrays at the pace of a large copy, or for its multiplications at
the pace of a large matrix product. CuPy's own kernels (a few, small) are not measured one by one: what they and the
gaps between kernels take is the difference between the whole step and the sum.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy

from benchmarks import messages
from benchmarks.graphs import Graph
from benchmarks.nets import NETS
from benchmarks.peers.own import Own

REPEATS = 200
REPEATS_OF_LARGE = 20
LARGE = 2**26  # elements of the large copy
WIDE = 4096  # rows and columns of the large matrix product

Call = tuple[str, Callable[[], None], int, int]  # what it is, to do it again, bytes, multiplications


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["mlp", "cnn"])
    parser.add_argument("--batch", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--large", type=int, default=LARGE, help="elements of the large copy (default: %(default)s)")
    parser.add_argument("--wide", type=int, default=WIDE, help="rows of the large product (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="(default: %(default)s)")
    options = parser.parse_args()
    for net in options.nets:
        for what, seconds, floor in profile_of(net, options.batch, "gpu", options.large, options.wide, options.repeats):
            messages.send(
                "kernel",
                net=net,
                batch=options.batch,
                what=what.removeprefix(f"{net}: "),
                seconds=seconds,
                floor=floor,
            )


def profile_of(
    net: str, batch: int, device: str, large: int = LARGE, wide: int = WIDE, repeats: int = REPEATS
) -> Iterator[tuple[str, float, float]]:
    """(kernel and its sizes, seconds, seconds of its floor), then of the whole step."""
    own = Own(NETS[net], batch, device, "")
    backend = own.model.backend
    for _ in range(5):
        own.step()
    with own.model.working():
        per_byte, per_product = _paces(backend, large, wide, min(repeats, REPEATS_OF_LARGE))
        calls = _calls_of_a_step(own)
        sums = [0.0, 0.0]
        for what, again, size, products in calls:
            seconds, floor = _seconds(backend, again, repeats), max(size * per_byte, products * per_product)
            sums = [sums[0] + seconds, sums[1] + floor]
            yield f"{net}: {what}", seconds, floor
        yield f"{net}: all of these", sums[0], sums[1]
    own.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        own.step()
    own.synchronize()
    why_eager = own.why_eager()
    kind = "one graph" if why_eager is None else f"eager, because {why_eager}"
    yield f"{net}: the whole step, {kind}", (time.perf_counter() - start) / repeats, sums[1]
    own.close()


def _seconds(backend: Any, again: Callable[[], None], repeats: int) -> float:
    def many() -> None:
        for _ in range(repeats):
            again()

    graph, times = Graph(backend, many, warm_up=again), []
    for _ in range(5):
        backend.synchronize()
        start = time.perf_counter()
        graph.replay()
        backend.synchronize()
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)


def _paces(backend: Any, large: int, wide: int, repeats: int) -> tuple[float, float]:
    """Seconds a byte of a large copy, and seconds a multiplication of a large matrix product."""
    a, b = (backend.zeros((large,), "float32") for _ in range(2))
    copied = _seconds(backend, lambda: backend.rescale(a, 1.0, 0.0, out=b), repeats)
    x, y, z = (backend.zeros((wide, wide), "float32") for _ in range(3))
    multiplied = _seconds(backend, lambda: backend.matmul(x, y, out=z), repeats)
    return copied / (a.nbytes + b.nbytes), multiplied / wide**3


def _calls_of_a_step(own: Own) -> list[Call]:
    """What a step asks of kernels.cu and cuBLAS, in an eager step."""
    backend, calls = own.model.backend, []
    launch, cublas = backend._kernels.launch, backend._cublas()
    product = cublas.product

    def noted_launch(name: str, *given: Any) -> None:
        arrays = [a for a in given if hasattr(a, "nbytes") and not isinstance(a, numpy.generic)]
        largest = max(arrays, key=lambda a: a.nbytes)
        size = sum(a.nbytes for a in arrays)
        calls.append((f"{name} {largest.shape}", lambda: launch(name, *given), size, 0))
        launch(name, *given)

    def noted_product(a: Any, b: Any, out: Any, add: bool, tf32: bool) -> bool:
        (rows, inner), columns = a.shape, b.shape[1]
        size = 4 * (rows * inner + inner * columns + rows * columns)
        what = f"product {rows} x {inner} x {columns}"
        calls.append((what, lambda: product(a, b, out, add, tf32), size, rows * inner * columns))
        return product(a, b, out, add, tf32)

    with contextlib.ExitStack() as stack:
        for thing, name, noted in ((backend._kernels, "launch", noted_launch), (cublas, "product", noted_product)):
            setattr(thing, name, noted)
            stack.callback(delattr, thing, name)
        own.player._do(own._updates[0], own._figures)
    return [call for call in calls if not call[0].startswith("set_numbers")]  # a graph has none


if __name__ == "__main__":
    main()
