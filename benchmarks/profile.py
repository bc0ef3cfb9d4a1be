"""Times of all kernels of one training step on a GPU in float32, or of all calls of a step on the CPU.

    python -m benchmarks.profile --nets mlp cnn --batch 128
    python -m benchmarks.profile --device cpu --nets mlp

Each kernel is captured many times in one CUDA graph, so that the time of its launches is not measured. The floor of a
kernel is a lower bound of its time: the time for the bytes of its arrays at the speed of a large copy, or for its
multiplications at the speed of a large matrix product. The few small kernels of CuPy are not measured one by one; they
and the gaps between kernels are the difference between the whole step and the sum. On the CPU, the calls and their
times are those of `xpnet.explain_step`.
"""

import argparse
import contextlib
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

Call = tuple[str, Callable[[], None], int, int]  # name, function that repeats it, bytes, multiplications


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["mlp", "cnn"])
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
        calls = _calls_of_a_step(own)
        sums = [0.0, 0.0]
        for what, repeat, size, multiplications in calls:
            seconds = _seconds(backend, repeat, repeats)
            floor = max(size * per_byte, multiplications * per_multiplication)
            sums = [sums[0] + seconds, sums[1] + floor]
            yield f"{net}: {what}", seconds, floor
        yield f"{net}: all of these", sums[0], sums[1]
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


def _calls_of_a_step(own: Own) -> list[Call]:
    """The kernels of kernels.cu and the matrix products of cuBLAS that an eager step calls."""
    backend, calls = own.model.backend, []
    launch, cublas = backend.kernels.launch, backend.cublas()
    product = cublas.matmul

    def record_launch(name: str, real: Any, grid: Any, block: Any, values: dict[str, Any]) -> None:
        arguments = real, grid, block, values
        arrays = {id(a): a for a in values.values() if isinstance(a, backend.xp.ndarray)}.values()
        largest = max(arrays, key=lambda a: a.nbytes)
        size = sum(a.nbytes for a in arrays)
        calls.append((f"{name} {largest.shape}", lambda: launch(name, *arguments), size, 0))
        launch(name, *arguments)

    def record_product(a: Any, b: Any, out: Any, add: bool, tf32: bool) -> bool:
        (rows, inner), columns = a.shape, b.shape[1]
        size = 4 * (rows * inner + inner * columns + rows * columns)
        what = f"matmul {rows} x {inner} x {columns}"
        calls.append((what, lambda: product(a, b, out, add, tf32), size, rows * inner * columns))
        return product(a, b, out, add, tf32)

    with contextlib.ExitStack() as stack:
        for owner, name, recorder in ((backend.kernels, "launch", record_launch), (cublas, "matmul", record_product)):
            setattr(owner, name, recorder)
            stack.callback(delattr, owner, name)
        own.executor._run_eagerly(own._steps_data[0], own._metrics)
    return [call for call in calls if not call[0].startswith("set_numbers")]  # not in a captured step


if __name__ == "__main__":
    main()
