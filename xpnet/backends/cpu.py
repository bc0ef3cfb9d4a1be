"""The CPU: NumPy, with a few primitives replaced by faster ones that agree with the reference within rounding."""

import contextlib
import functools
import importlib
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import numpy

from xpnet.backends.arrays import Array, DType
from xpnet.backends.base import Backend
from xpnet.backends.sliding import Windows
from xpnet.backends.threads import Team

_log = logging.getLogger(__name__)

_SPLIT_PRODUCT = 2**20  # multiplications from which on a product is worth two threads' meeting
_FEW_CHANNELS = 4
_ALIGNMENT = 64  # bytes: a cache line, and an AVX-512 register


class CPUBackend(Backend):
    """NumPy on the host."""

    # 64 KiB of float32: five such pieces (weights, gradient, two moments, scratch) stay in a core's level-2 cache.
    chunk_elements = 16384

    # The patches of a convolution, twice: half a core's level-2 cache.
    chunk_bytes = 512 * 1024

    def __init__(self) -> None:
        super().__init__("cpu", numpy)
        self._team = Team()
        self._ones: dict[DType, Array] = {}

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

    def sum_rows(self, a: Array, out: Array) -> Array:
        # BLAS sums the rows of a matrix three times as fast as a reduction, but both add them one after the other: of
        # many rows the rounding errors add up.
        if len(a) > 4096:
            compiled = self._compiled(a)
            if compiled is None:
                out[...] = numpy.sum(a, axis=0, dtype=numpy.float64)
            else:
                out[...] = self._sum(len(a), out.shape, lambda rows, sums: compiled.sum_columns(a[rows], sums))
            return out
        ones = self._ones.get(a.dtype)
        if ones is None or len(ones) < len(a):
            ones = self._ones[a.dtype] = numpy.ones(len(a), dtype=a.dtype)
        return numpy.dot(ones[: len(a)], a, out=out)

    def gather(self, a: Array, rows: Array, out: Array) -> Array:
        # mode="clip" because the default makes a hidden temporary the size of `out`.
        if a.dtype == out.dtype:
            return numpy.take(a, rows, axis=0, out=out, mode="clip")
        out[...] = numpy.take(a, rows, axis=0, mode="clip")
        return out

    # A batch in parts ------------------------------------------------------------------------------------------------

    @property
    def shards(self) -> int:
        return self._team.size

    def own_threads(self) -> AbstractContextManager[Any]:
        return self._team.working()

    def in_chunks(self, count: int, bytes_each: int, work: Callable[[slice, int], None]) -> None:
        room = min(self.chunk_bytes, self.workspace_bytes // self.shards)
        size = max(1, room // max(1, bytes_each))

        def part(rows: slice, shard: int) -> None:
            for start in range(rows.start, rows.stop, size):
                work(slice(start, min(start + size, rows.stop)), shard)

        self._split(count, part)

    def _split(self, count: int, work: Callable[[slice, int], None]) -> None:
        with self._team.working():
            self._team.split(count, work)

    def matmul(self, a: Array, b: Array, out: Array) -> Array:
        if not self._team.splits or len(out) * b.size < _SPLIT_PRODUCT:
            return numpy.matmul(a, b, out=out)
        self._team.split(len(out), lambda rows, _: numpy.matmul(a[rows], b, out=out[rows]))
        return out

    def add_to_rows(self, a: Array, row: Array) -> Array:
        compiled = self._compiled(a)
        if compiled is None:
            return super().add_to_rows(a, row)
        self._team.split(len(a), lambda rows, _: compiled.add_to_rows(a[rows], row))
        return a

    def relu(self, x: Array, out: Array) -> Array:
        plain, compiled = super().relu, self._compiled(x, out)

        def part(rows: slice, _: int) -> None:
            if compiled is None:
                plain(x[rows], out[rows])
            else:
                compiled.relu(x[rows].reshape(-1), out[rows].reshape(-1))

        self._team.split(len(x), part)
        return out

    def relu_grad(self, grad: Array, y: Array, out: Array) -> Array:
        plain, compiled = super().relu_grad, self._compiled(grad, y, out)

        def part(rows: slice, _: int) -> None:
            if compiled is None:
                plain(grad[rows], y[rows], out[rows])
            else:
                compiled.relu_grad(grad[rows].reshape(-1), y[rows].reshape(-1), out[rows].reshape(-1))

        self._team.split(len(grad), part)
        return out

    # Columns of a matrix ---------------------------------------------------------------------------------------------

    def moments(self, x: Array) -> tuple[Array, Array]:
        compiled = self._compiled(x)
        if compiled is None:
            return super().moments(x)
        shift = x[0].astype(numpy.float64)  # so near the mean that one pass loses no digits
        sums = self._sum(len(x), (2, x.shape[1]), lambda rows, sums: compiled.sum_powers(x[rows], shift, sums))
        offset, square = sums / len(x)
        return (shift + offset).astype(x.dtype), (square - offset * offset).clip(0.0).astype(x.dtype)

    def sum_products(self, a: Array, b: Array, center: Array, out: Array) -> Array:
        compiled = self._compiled(a, b)
        if compiled is None:
            return super().sum_products(a, b, center, out)
        sums = self._sum(len(a), out.shape, lambda rows, sums: compiled.sum_products(a[rows], b[rows], center, sums))
        out[...] = sums
        return out

    def scale_shift(self, x: Array, scale: Array, shift: Array, out: Array) -> Array:
        compiled = self._compiled(x, out)
        if compiled is None:
            return super().scale_shift(x, scale, shift, out)
        self._team.split(len(x), lambda rows, _: compiled.scale_shift(x[rows], scale, shift, out[rows]))
        return out

    def combine(self, g: Array, a: Array, x: Array, b: Array, c: Array, out: Array) -> Array:
        compiled = self._compiled(g, x, out)
        if compiled is None:
            return super().combine(g, a, x, b, c, out)
        self._team.split(len(g), lambda rows, _: compiled.combine(g[rows], a, x[rows], b, c, out[rows]))
        return out

    def _sum(self, count: int, shape: Sequence[int], add: Callable[[slice, Array], None]) -> Array:
        """add(rows, sums) adds up some rows; this adds up the sums of all parts, in float64."""
        sums = numpy.zeros((self._team.size if self._team.splits else 1, *shape))
        self._team.split(count, lambda rows, shard: add(rows, sums[shard]))
        return sums.sum(axis=0)

    def _compiled(self, *arrays: Array) -> Any:
        """The compiled loops, for passes that work in shards, and arrays as the loops want them; else None.

        Nothing else loads Numba, which takes a while.
        """
        fit = self._team.at_work and all(a.flags.c_contiguous for a in arrays)
        return kernels() if fit else None

    # Windows, by compiled loops where Numba is installed -------------------------------------------------------------

    def patches(self, x: Array, windows: Windows, out: Array) -> Array:
        compiled = self._compiled(x, out)
        if compiled is None:
            return super().patches(x, windows, out)
        make = compiled.patches if x.shape[-1] > _FEW_CHANNELS else compiled.patches_of_few_channels
        make(x, windows.strides, windows.dilation, windows.before, out)
        return out

    def fold(self, patches: Array, windows: Windows, out: Array) -> Array:
        compiled = self._compiled(patches, out)
        if compiled is None:
            return super().fold(patches, windows, out)
        compiled.fold(patches, windows.strides, windows.dilation, windows.before, out)
        return out

    def max_pool(self, x: Array, windows: Windows, out: Array, choice: Array) -> Array:
        plain, place = super().max_pool, (windows.strides, windows.kernel, windows.before)
        squares = windows.kernel == windows.strides == (2, 2) and not windows.padded

        def part(rows: slice, _: int) -> None:
            compiled = self._compiled(x, out)
            if compiled is None:
                plain(x[rows], windows, out[rows], choice[rows])
            elif squares:
                compiled.max_pool_2x2(x[rows], out[rows], choice[rows])
            else:
                compiled.max_pool(x[rows], *place, out[rows], choice[rows])

        self._split(len(x), part)
        return out

    def unpool_max(self, grad: Array, choice: Array, windows: Windows, out: Array) -> Array:
        plain, place = super().unpool_max, (windows.strides, windows.kernel, windows.before)

        def part(rows: slice, _: int) -> None:
            compiled = self._compiled(grad, out)
            if compiled is None:
                plain(grad[rows], choice[rows], windows, out[rows])
            else:
                compiled.unpool_max(grad[rows], choice[rows], *place, out[rows])

        self._split(len(grad), part)
        return out

    def describe(self) -> list[tuple[str, str]]:
        blas, threads = blas_and_threads()
        return [("device", f"{_processor()}, {os.cpu_count()} logical cores"), ("BLAS", f"{blas}, {threads} threads")]


@functools.cache
def kernels() -> ModuleType | None:
    """The compiled loops; None without Numba, or where XPNET_FAST=0 in the environment turns them off."""
    if os.environ.get("XPNET_FAST") == "0":
        return None
    try:
        return importlib.import_module("xpnet.backends.cpu_kernels")
    except Exception as error:  # not installed; or made for another NumPy, which Numba says in many ways
        _log.info("no compiled kernels, plain NumPy instead: %s", error)
        return None


def to_host(a: Any) -> Any:
    """Whatever holds an array on some device, as something NumPy takes. Lists and numbers pass as they are."""
    if isinstance(a, numpy.ndarray):
        return a
    if hasattr(a, "detach"):  # a PyTorch tensor, perhaps with a gradient, perhaps on a GPU
        a = a.detach()
    if hasattr(a, "__cuda_array_interface__"):
        return a.get() if hasattr(a, "get") else a.cpu()
    if not hasattr(a, "__array__") and hasattr(a, "__dlpack__"):
        return numpy.from_dlpack(a)
    return a


def blas_and_threads() -> tuple[str, int]:
    """(name and version of the BLAS under NumPy, the number of threads it uses)."""
    numpy.dot(numpy.ones((2, 2)), numpy.ones((2, 2)))  # so that the library is loaded and found
    with contextlib.suppress(ImportError):  # the source tree also runs on machines that have little but NumPy
        import threadpoolctl

        for pool in threadpoolctl.threadpool_info():
            if pool["user_api"] == "blas":
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
