"""One training step on a GPU, kernel by kernel.

Each kernel is recorded many times into a graph, which is timed: launched one by one, the host would be measured. Its
floor is the time for the bytes of its arrays at the pace of a large copy, or for its multiplications at that of a large
product. CuPy's own kernels (a few, small) are not taken apart: what they and the gaps between kernels take is what the
whole step takes more than the sum.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy

from benchmarks.nets import NETS
from benchmarks.peers.own import Own
from xpnet.backends.gpu_graphs import Recorder

REPEATS = 200
LARGE = 2**26  # elements of the large copy
WIDE = 4096  # rows and columns of the large product

Call = tuple[str, Callable[[], None], int, int]  # what it is, to do it again, bytes, multiplications


def profile_of(
    net: str, batch: int, device: str, large: int = LARGE, wide: int = WIDE
) -> Iterator[tuple[str, float, float]]:
    """(kernel and its sizes, seconds, seconds of its floor), then of the whole step."""
    own = Own(NETS[net], batch, device, "")
    backend = own.model.backend
    for _ in range(5):
        own.step()
    with own.model.working():
        recorder = Recorder(backend)
        per_byte, per_product = _paces(backend, recorder, large, wide)
        calls = _calls_of_a_step(own, recorder)
        sums = [0.0, 0.0]
        for what, again, size, products in calls:
            seconds, floor = _seconds(recorder, again), max(size * per_byte, products * per_product)
            sums = [sums[0] + seconds, sums[1] + floor]
            yield f"{net}: {what}", seconds, floor
        yield f"{net}: all of these", sums[0], sums[1]
    own.synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        own.step()
    own.synchronize()
    kind = "one graph" if own.player.recorded else f"call by call, for {own.player.why_not}"
    yield f"{net}: the whole step, {kind}", (time.perf_counter() - start) / REPEATS, sums[1]


def _seconds(recorder: Recorder, again: Callable[[], None]) -> float:
    def many() -> None:
        for _ in range(REPEATS):
            again()

    with recorder.memory():
        again()
    graph, times = recorder.record(many), []
    for _ in range(5):
        recorder.backend.synchronize()
        start = time.perf_counter()
        graph.launch()
        recorder.backend.synchronize()
        times.append((time.perf_counter() - start) / REPEATS)
    return statistics.median(times)


def _paces(backend: Any, recorder: Recorder, large: int, wide: int) -> tuple[float, float]:
    """Seconds a byte of a large copy, and seconds a multiplication of a large product."""
    a, b = (backend.zeros((large,), "float32") for _ in range(2))
    copied = _seconds(recorder, lambda: backend.rescale(a, 1.0, 0.0, out=b))
    x, y, z = (backend.zeros((wide, wide), "float32") for _ in range(3))
    multiplied = _seconds(recorder, lambda: backend.matmul(x, y, out=z))
    return copied / (a.nbytes + b.nbytes), multiplied / wide**3


def _calls_of_a_step(own: Own, recorder: Recorder) -> list[Call]:
    """What a step asks of kernels.cu and cuBLAS, done call by call."""
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

    with contextlib.ExitStack() as stack, recorder.memory():
        for thing, name, noted in ((backend._kernels, "launch", noted_launch), (cublas, "product", noted_product)):
            setattr(thing, name, noted)
            stack.callback(delattr, thing, name)
        own.player._do(own._update, own._figures)
    return [call for call in calls if not call[0].startswith("set_numbers")]  # a graph has none
