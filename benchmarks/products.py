"""Matrix products by xpnet's packed loop and by NumPy's BLAS, on one thread of the CPU.

    python -m benchmarks.products
    OPENBLAS_CORETYPE=SkylakeX python -m benchmarks.products     # with other kernels of OpenBLAS

Both multiply the same matrices in turns. A ratio is time of xpnet / time of the BLAS, the median over the turns. "none"
means that xpnet calls the BLAS too, because packing does not pay.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import threadpoolctl

import xpnet

#: (x @ W, x.T @ grad or grad @ W.T; rows, depth, columns)
SHAPES = [
    ("x W", 128, 784, 128), ("xᵀ grad", 784, 128, 128), ("grad Wᵀ", 128, 128, 784), ("x W", 32, 784, 256),
    ("x W", 128, 512, 512), ("xᵀ grad", 512, 128, 512), ("grad Wᵀ", 128, 512, 512), ("x W", 512, 512, 512),
    ("x W", 768, 128, 512), ("grad Wᵀ", 768, 512, 128), ("x W", 4096, 128, 1024), ("grad Wᵀ", 4096, 1024, 128),
    ("x W", 25088, 9, 32), ("x W", 25088, 144, 32), ("xᵀ grad", 288, 25088, 64), ("x W", 1024, 1024, 1024),
]  # fmt: skip


def seconds(multiply: Callable[[], object], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        multiply()
    return (time.perf_counter() - begin) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="(default: %(default)s)")
    options = parser.parse_args()
    backend, rng = xpnet.get_backend("cpu"), np.random.default_rng(0)
    with threadpoolctl.threadpool_limits(1):
        print(backend.describe())
        print(f"{'':8} {'rows × depth × columns':>22} {'xpnet':>8} {'BLAS':>8} GFLOP/s  ratio")
        for kind, rows, depth, columns in SHAPES:
            x = rng.standard_normal((depth, rows) if kind == "xᵀ grad" else (rows, depth), dtype=np.float32)
            w = rng.standard_normal((columns, depth) if kind == "grad Wᵀ" else (depth, columns), dtype=np.float32)
            a, b = x.T if kind == "xᵀ grad" else x, w.T if kind == "grad Wᵀ" else w
            out, used = np.empty((rows, columns), np.float32), []
            packed = backend._packed_matmul
            with backend.parallel_region():
                backend._packed_matmul = lambda *args: used.append(1) or packed(*args)  # noqa: B023
                backend.matmul(a, b, out=out)
                del backend._packed_matmul
                operations = 2 * rows * depth * columns
                count = max(1, round(2e8 / operations))
                own = lambda: backend.matmul(a, b, out=out)  # noqa: B023, E731
                blas = lambda: np.matmul(a, b, out=out)  # noqa: B023, E731
                times = [(seconds(own, count), seconds(blas, count)) for _ in range(options.rounds)]
            ratio = statistics.median(x / y for x, y in times)
            speeds = [operations / statistics.median(t) / 1e9 for t in zip(*times, strict=True)]
            size = f"{rows} × {depth} × {columns}"
            print(
                f"{kind:8} {size:>22} {speeds[0]:8.0f} {speeds[1]:8.0f}          {f'{ratio:.2f}' if used else 'none'}"
            )


if __name__ == "__main__":
    main()
