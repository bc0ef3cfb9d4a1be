"""The primitives on the CPU: faster ones, that agree with the reference within rounding.

The parts of a batch are worked on side by side, in threads of our own, by loops that Numba has compiled where it is
installed. Only passes of models that hold a layer which `works_in_shards` do so. In all others NumPy works with the
threads of its BLAS, which for nothing but products of matrices are faster, and Numba, slow to load, stays unloaded.
"""

import functools
import importlib.metadata
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import numpy

from xpnet.backends.arrays import Array, DType
from xpnet.backends.base import Backend
from xpnet.backends.sliding import Windows
from xpnet.backends.threads import Team

_log = logging.getLogger(__name__)

_SPLIT_PRODUCT = 2**20  # multiplications from which on a product is worth the meeting of threads
_MANY_ROWS = 4096
_FEW_ROWS, _LARGE = 32, 2**15  # of a matrix times a large transposed one; see matmul
_FEW_CHANNELS = 3


class ThreadedPrimitives(Backend):
    """A backend on NumPy, with a team of threads."""

    #: Patches of a convolution are made, used and left for these many bytes at a time: about a core's level-2 cache.
    chunk_bytes = 2**20

    def __init__(self, name: str, xp: ModuleType) -> None:
        super().__init__(name, xp)
        self._team = Team()
        self._ones: dict[DType, Array] = {}
        self._rooms = threading.local()

    # A batch in parts ------------------------------------------------------------------------------------------------

    @property
    def shards(self) -> int:
        return self._team.size

    def working(self, in_shards: bool = True) -> AbstractContextManager[Any]:
        return self._team.working(in_shards)

    def in_chunks(self, count: int, bytes_each: int, work: Callable[[slice, int], None]) -> None:
        with self._team.working():
            room = min(self.chunk_bytes, self.workspace_bytes // self.shards)
            size = max(1, room // max(1, bytes_each))

            def part(rows: slice, shard: int) -> None:
                for start in range(rows.start, rows.stop, size):
                    work(slice(start, min(start + size, rows.stop)), shard)

            self._team.split(count, part)

    def _compiled(self, *arrays: Array) -> Any:
        """The compiled loops, if the team is at work and these arrays lie as the loops want them; else None."""
        if not self._team.at_work:
            return None
        for a in arrays:
            if not a.flags.c_contiguous:
                return None
        return kernels()

    def _best(self, plain: Callable[..., Any], *arrays: Array) -> Callable[..., Any]:
        """The compiled twin of a plain formula, or the formula."""
        compiled = self._compiled(*arrays)
        return plain if compiled is None else getattr(compiled, plain.__name__)

    def _by_rows(self, name: str, *arrays: Array, whole: Sequence[Any] = ()) -> None:
        """The formula of this name, or its twin, on the arrays' rows in parts; what is `whole` goes to each part."""
        best = getattr(self._compiled(*arrays) or super(), name)
        if self._team.splits:
            self._team.split(len(arrays[0]), lambda rows, _: best(*[a[rows] for a in arrays], *whole))
        else:
            best(*arrays, *whole)

    def _sum(self, shape: Sequence[int], count: int, add: Callable[[slice, Array], None]) -> Array:
        """add(rows, sums) adds some rows to float64 sums; this adds up the sums of all parts."""
        sums = numpy.zeros((self._team.size if self._team.splits else 1, *shape))
        self._team.split(count, lambda rows, shard: add(rows, sums[shard]))
        return sums.sum(axis=0)

    # Products, sums, elements ----------------------------------------------------------------------------------------

    def matmul(self, a: Array, b: Array, out: Array) -> Array:
        if a.shape[1] == 1:  # a batch of one sample: matmul leaves the BLAS aside, and takes ten times as long
            return numpy.multiply(a, b, out=out)
        if len(a) <= _FEW_ROWS and b.size >= _LARGE and b.T.flags.c_contiguous:
            # For a few rows the BLAS would take longer to rearrange b than to multiply: (a b)ᵀ = bᵀ aᵀ spares it that.
            out[...] = numpy.matmul(b.T, a.T, out=self._room((b.shape[1], len(a)), out.dtype)).T
            return out
        if len(out) * b.size < _SPLIT_PRODUCT or not self._team.splits:
            return numpy.matmul(a, b, out)
        self._team.split(len(out), lambda rows, _: numpy.matmul(a[rows], b, out=out[rows]))
        return out

    def _room(self, shape: tuple[int, int], dtype: DType) -> Array:
        """An uninitialised matrix, this thread's own until it asks again."""
        kept: Array | None = getattr(self._rooms, "kept", None)
        size = shape[0] * shape[1] * dtype.itemsize
        if kept is None or kept.size < size:
            kept = self._rooms.kept = numpy.empty(size, dtype=numpy.uint8)
        return kept[:size].view(dtype).reshape(shape)

    def sum_rows(self, a: Array, out: Array) -> Array:
        # BLAS sums the rows of a matrix three times as fast as a reduction, but both add them one after the other: of
        # many rows the rounding errors add up.
        if len(a) > _MANY_ROWS:
            compiled = self._compiled(a)
            if compiled is None:
                out[...] = numpy.sum(a, axis=0, dtype=numpy.float64)
            else:
                out[...] = self._sum(out.shape, len(a), lambda rows, sums: compiled.add_rows(a[rows], sums))
            return out
        ones = self._ones.get(a.dtype)
        if ones is None:
            ones = self._ones[a.dtype] = numpy.ones(_MANY_ROWS, dtype=a.dtype)
        return numpy.dot(ones[: len(a)], a, out=out)

    def gather(self, a: Array, rows: Array, out: Array) -> Array:
        # mode="clip" because the default makes a hidden temporary the size of `out`.
        if a.dtype == out.dtype:
            return numpy.take(a, rows, axis=0, out=out, mode="clip")
        compiled = self._compiled(a, rows, out)
        if compiled is None or not _readable(a):
            return super().gather(a, rows, out)
        compiled.gather(a.reshape(len(a), -1), rows, out.reshape(len(out), -1))
        return out

    def add_to_rows(self, a: Array, row: Array) -> Array:
        self._by_rows("add_to_rows", a, whole=(row,))
        return a

    def rescale(self, x: Array, scale: float, offset: float, out: Array) -> Array:
        compiled = self._compiled(x, out)
        if compiled is None or not _readable(x):
            return super().rescale(x, scale, offset, out)
        number = out.dtype.type
        self._team.split(len(x), lambda rows, _: compiled.rescale(x[rows], number(scale), number(offset), out[rows]))
        return out

    def count_hits(self, outputs: Array, labels: Array) -> Array:
        compiled = self._compiled(outputs, labels)
        if compiled is None or labels.dtype.kind not in "iu":
            return super().count_hits(outputs, labels)
        sums = numpy.empty(2, dtype=numpy.int64)
        sums[0], sums[1] = compiled.count_hits(outputs, labels), len(outputs)
        return sums

    def relu(self, x: Array, out: Array) -> Array:
        self._by_rows("relu", x, out)
        return out

    def relu_grad(self, grad: Array, y: Array, out: Array) -> Array:
        self._by_rows("relu_grad", grad, y, out)
        return out

    def dropout_mask(self, key: Sequence[int], rate: float, out: Array, first_row: int = 0) -> Array:
        compiled = self._compiled(out)
        if compiled is None:
            return super().dropout_mask(key, rate, out, first_row)
        by_row, word = self._noise_of_rows(key, len(out), first_row)
        numbers = numpy.uint32(word), numpy.uint32(int(rate * 2**32)), out.dtype.type(1.0 / (1.0 - rate))
        self._team.split(len(out), lambda rows, _: compiled.dropout_mask(by_row[rows], *numbers, out[rows]))
        return out

    def cross_entropy(
        self, logits: Array, labels: Array, smoothing: float, losses: Array, grad: Array
    ) -> tuple[Array, Array]:
        compiled = self._compiled(logits, labels, losses, grad)
        if compiled is None:
            return super().cross_entropy(logits, labels, smoothing, losses, grad)
        number = logits.dtype.type
        share, rest = number(1.0 - smoothing), number(smoothing / logits.shape[1])
        compiled.cross_entropy(logits, labels, share, rest, losses, grad)
        return losses, grad

    def fused_update(self, name: str, runs: list[slice], vectors: Sequence[Array], numbers: Sequence[float]) -> bool:
        compiled = self._compiled(*vectors)
        if compiled is None:
            return False
        update, number = getattr(compiled, name), vectors[0].dtype.type
        given = [number(n) for n in numbers]

        def part(rows: slice, _: int) -> None:
            update(*[vector[rows] for vector in pieces], *given)

        for run in runs:
            pieces = [vector[run] for vector in vectors]
            self._team.split(len(pieces[0]), part)
        return True

    # Columns of a matrix ---------------------------------------------------------------------------------------------

    def moments(self, x: Array) -> tuple[Array, Array]:
        compiled = self._compiled(x)
        if compiled is None:
            return super().moments(x)
        shift = x[0].copy()  # so near the mean that one pass loses no digits
        sums = self._sum((2, x.shape[1]), len(x), lambda rows, sums: compiled.add_powers(x[rows], shift, sums))
        offset, square = sums / len(x)
        return (shift + offset).astype(x.dtype), (square - offset * offset).clip(0.0).astype(x.dtype)

    def sum_products(self, a: Array, b: Array, center: Array, out: Array) -> Array:
        compiled = self._compiled(a, b)
        if compiled is None:
            return super().sum_products(a, b, center, out)
        out[...] = self._sum(
            out.shape, len(a), lambda rows, sums: compiled.add_products(a[rows], b[rows], center, sums)
        )
        return out

    def scale_shift(self, x: Array, scale: Array, shift: Array, out: Array) -> Array:
        scale_shift = self._best(super().scale_shift, x, out)
        self._team.split(len(x), lambda rows, _: scale_shift(x[rows], scale, shift, out[rows]))
        return out

    def combine(self, g: Array, a: Array, x: Array, b: Array, c: Array, out: Array) -> Array:
        combine = self._best(super().combine, g, x, out)
        self._team.split(len(g), lambda rows, _: combine(g[rows], a, x[rows], b, c, out[rows]))
        return out

    # Windows ---------------------------------------------------------------------------------------------------------

    def lay_out_patches(self, room: Array) -> Array:
        # Of few channels, the pixels under one cell of all windows make longer runs than those of one window.
        if room.shape[-1] > _FEW_CHANNELS:
            return room
        images, rows, columns, kh, kw, channels = room.shape
        return room.reshape(kh, kw, channels, images, rows, columns).transpose(3, 4, 5, 0, 1, 2)

    def patches(self, x: Array, windows: Windows, out: Array) -> Array:
        _fit(x, windows, out)
        by_cell = out.transpose(3, 4, 5, 0, 1, 2)
        if (compiled := self._compiled(x, by_cell)) is not None:
            compiled.patches_by_cell(x, windows, by_cell)
        else:
            self._best(super().patches, x, out)(x, windows, out)
        return out

    def fold(self, patches: Array, windows: Windows, out: Array) -> Array:
        _fit(out, windows, patches)
        by_cell = patches.transpose(3, 4, 5, 0, 1, 2)
        if (compiled := self._compiled(by_cell, out)) is not None:
            compiled.fold_by_cell(by_cell, windows, out)
        else:
            self._best(super().fold, patches, out)(patches, windows, out)
        return out

    def max_pool(self, x: Array, windows: Windows, out: Array, choice: Array) -> Array:
        _fit(x, windows, out)
        with self._team.working():
            max_pool = self._best(super().max_pool, x, out)
            self._team.split(len(x), lambda rows, _: max_pool(x[rows], windows, out[rows], choice[rows]))
        return out

    def unpool_max(self, grad: Array, choice: Array, windows: Windows, out: Array) -> Array:
        _fit(out, windows, grad)
        with self._team.working():
            unpool = self._best(super().unpool_max, grad, out)
            self._team.split(len(grad), lambda rows, _: unpool(grad[rows], choice[rows], windows, out[rows]))
        return out

    def sum_pool(self, x: Array, windows: Windows, out: Array) -> Array:
        plain = super().sum_pool
        self._team.split(len(x), lambda rows, _: plain(x[rows], windows, out[rows]))
        return out

    def unpool_sum(self, grad: Array, windows: Windows, out: Array) -> Array:
        plain = super().unpool_sum
        self._team.split(len(grad), lambda rows, _: plain(grad[rows], windows, out[rows]))
        return out

    def depthwise(self, x: Array, weight: Array, windows: Windows, out: Array) -> Array:
        plain = super().depthwise
        self._team.split(len(x), lambda rows, _: plain(x[rows], weight, windows, out[rows]))
        return out

    def depthwise_input_grad(self, grad: Array, weight: Array, windows: Windows, out: Array) -> Array:
        plain = super().depthwise_input_grad
        self._team.split(len(grad), lambda rows, _: plain(grad[rows], weight, windows, out[rows]))
        return out


def _readable(data: Array) -> bool:
    """Whether a compiled loop takes a user's own data: Numba knows neither float16 nor another machine's byte order."""
    return bool(data.dtype.isnative) and data.dtype.char != "e"


def _fit(images: Array, windows: Windows, results: Array) -> None:
    """A compiled loop would read and write beyond arrays that are not of one batch, size and number of channels."""
    if images.shape != (len(results), *windows.image, results.shape[-1]) or results.shape[1:3] != windows.grid:
        raise ValueError(f"images {images.shape} and results {results.shape} do not fit {windows}.")


def loops_to_use() -> str:
    """The name and version of what compiles loops, or "none"; does not load it."""
    if os.environ.get("XPNET_FAST") == "0" or importlib.util.find_spec("numba") is None:
        return "none"
    return f"Numba {importlib.metadata.version('numba')}"


@functools.cache
def kernels() -> ModuleType | None:
    """The compiled loops; None without Numba, or where XPNET_FAST=0 in the environment turns them off."""
    if os.environ.get("XPNET_FAST") == "0":
        return None
    try:
        return importlib.import_module("xpnet.backends.cpu_kernels")
    except Exception as error:  # not installed; or made for another NumPy, which Numba says in many ways
        _log.info("no compiled loops, plain NumPy instead: %s", error)
        return None
