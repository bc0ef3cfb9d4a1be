"""CPUBackend: NumPy on the host, with its memory and the description of processor and BLAS."""

import contextlib
import ctypes
import functools
import importlib
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from xpnet.backends.arrays import Array, DType, to_host
from xpnet.backends.base import Memory
from xpnet.backends.cpu.operators import CPUOperators, loop_compiler

_ALIGNMENT = 64  # bytes: a cache line, and an AVX-512 register


class CPUBackend(CPUOperators):
    """NumPy on the host."""

    # 64 KiB of float32: five such pieces (weights, gradient, two moments, scratch) fit into a core's level-2 cache.
    chunk_elements = 16384

    def __init__(self) -> None:
        super().__init__("cpu", numpy)

    def __reduce__(self) -> tuple[Any, ...]:
        return cpu_backend, ()

    def asarray(self, a: Any, dtype: DType = None) -> Array:
        return numpy.asarray(to_host(a), dtype=dtype)

    def to_numpy(self, a: Any) -> numpy.ndarray[Any, Any]:
        return numpy.asarray(to_host(a))

    def empty(self, shape: Sequence[int], dtype: DType) -> Array:
        dtype = numpy.dtype(dtype)
        length = int(numpy.prod(shape, dtype=numpy.int64)) * dtype.itemsize
        raw = numpy.empty(length + _ALIGNMENT, dtype=numpy.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        return raw[start : start + length].view(dtype).reshape(tuple(shape))

    def zeros(self, shape: Sequence[int], dtype: DType) -> Array:
        out = self.empty(shape, dtype)
        out.fill(0)
        return out

    def memory(self) -> Memory:
        """The memory of the whole process, as the system reports it or limits it; 0 and None if it does not."""
        used, free, total = 0, None, None
        with contextlib.suppress(OSError, ValueError, AttributeError, ImportError):
            page = os.sysconf("SC_PAGE_SIZE")
            free, total = (os.sysconf(name) * page for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
            with open("/proc/self/statm", encoding="ascii") as statm:
                mapped, resident = (int(pages) * page for pages in statm.read().split()[:2])
            used = resident
            resource: Any = importlib.import_module("resource")  # not on Windows
            limit = resource.getrlimit(resource.RLIMIT_AS)[0]
            if limit != resource.RLIM_INFINITY:
                free, total = min(free, max(0, limit - mapped)), min(total, limit)
        return Memory(used, used, free, total)

    def free_memory(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # only the C library of most Linux systems has it
            ctypes.CDLL(None).malloc_trim(0)

    def describe(self) -> list[tuple[str, str]]:
        blas, threads = blas_and_threads()
        return [("device", f"{_processor()}, {os.cpu_count()} logical cores"), ("BLAS", f"{blas}, {threads} threads")]

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "compiled loops": loop_compiler()}


@functools.cache
def cpu_backend() -> CPUBackend:
    """The one CPU backend of this process."""
    return CPUBackend()


def blas_and_threads() -> tuple[str, int]:
    """(name and version of NumPy's BLAS, how many threads it uses)."""
    numpy.dot(numpy.ones((2, 2)), numpy.ones((2, 2)))  # loads the library, so that threadpoolctl finds it
    with contextlib.suppress(ImportError):  # the source tree also runs with NumPy alone
        import threadpoolctl

        pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
        # NumPy's first: Numba loads SciPy's wheel, which has its own BLAS.
        pools.sort(key=lambda pool: "numpy" not in pool["filepath"])
        for pool in pools[:1]:
            kernels = f" ({pool['architecture']})" if pool.get("architecture") else ""
            return f"{pool['internal_api']} {pool['version']}{kernels}", int(pool["num_threads"])
    built: Mapping[str, Any] = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{built.get('name', 'unknown')} {built.get('version', '')}".strip(), os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
