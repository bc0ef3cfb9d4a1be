"""The operators of the CPU: the reference formulas or compiled loops, on parts of the batch in parallel.

Compiled loops and the thread pool are used only inside parallel regions, which large models, convolutions and max
pooling enter. Elsewhere Numba, whose import is slow, is not loaded, and the BLAS uses its own threads.
"""

import functools
import importlib.util
import inspect
import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, TypeVar, cast

import numpy
from numpy import ndarray

from xpnet.backends.arrays import Array, DType
from xpnet.backends.cpu.attention import CPUAttention
from xpnet.backends.cpu.recurrent import CPURecurrent
from xpnet.backends.cpu.thread_pool import ThreadPool
from xpnet.backends.reference import Backend
from xpnet.backends.reference.updates import Runs
from xpnet.backends.reference.windows import Windows
from xpnet.backends.step_numbers import of_step
from xpnet.concurrency.forks import held_in_forks

_log = logging.getLogger(__name__)

_SPLIT_MATMUL = 2**20  # multiplications: a smaller matrix product is not worth splitting among threads
_SPLIT_LOGITS = 2**14  # logits: cross-entropy of fewer is not worth splitting
_MANY_ROWS = 4096
_MAX_PACKED_BYTES = 2**20  # of a second matrix that fits into the level-2 cache; for larger ones, the BLAS is faster
_FEW_ROWS, _LARGE = 32, 2**15  # the product of a few rows and a large transposed matrix; see matmul
_FEW_CHANNELS = 3

F = TypeVar("F", bound=Callable[..., Any])


def compiled(operator: Callable[..., Any]) -> Any:
    """Call the decorated method with the compiled loops if these can process its arrays, else the reference formula."""
    reference = getattr(Backend, operator.__name__)

    @functools.wraps(reference)
    def choose(self: "CPUOperators", *args: Any, **kwargs: Any) -> Any:
        loops = self.loops((*args, *kwargs.values()) if kwargs else args)
        if loops is None:
            return reference(self, *args, **kwargs)
        return operator(self, loops, *args, **kwargs)

    return choose


def by_rows(formula: F, *batched: str) -> F:
    """An operator that processes the rows of a batch in parallel, by the compiled loop of its name or the formula.

    batched: the parameters that have a row for each sample; workers get slices of them, and all other arguments whole.
    """
    parameters = list(inspect.signature(formula).parameters)[1:]
    sliced = [name in batched for name in parameters]
    first, result = parameters.index(batched[0]), parameters.index(batched[-1])
    name = formula.__name__

    @functools.wraps(formula)
    def operator(self: "CPUOperators", *args: Any, **kwargs: Any) -> Any:
        workers = self.threads.region_workers
        if workers is None:
            return formula(self, *args, **kwargs)
        if kwargs:
            args = (*args, *[kwargs[name] for name in parameters[len(args) :]])
        loop = getattr(self.loops(args), name, None) or functools.partial(formula, self)
        if workers == 1:
            loop(*args)
        else:
            self.threads.parallel_for(
                len(args[first]),
                lambda rows, _: loop(*[a[rows] if part else a for a, part in zip(args, sliced, strict=True)]),
            )
        return args[result]

    return cast(F, operator)


class CPUOperators(CPUAttention, CPURecurrent):
    """A backend on NumPy with a thread pool and compiled loops."""

    #: The patches of a convolution are made, used and dropped in chunks of this size: about a core's level-2 cache.
    chunk_bytes = 2**20
    replays_calls = True

    def __init__(self, name: str, xp: ModuleType) -> None:
        super().__init__(name, xp)
        self.threads = ThreadPool()
        self._ones: dict[DType, Array] = {}
        self._scratch = threading.local()

    # Splitting work --------------------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        return self.threads.workers

    def parallel_region(self, split: bool = True) -> AbstractContextManager[Any]:
        return self.threads.parallel_region(split)

    def in_chunks(self, count: int, bytes_each: int, work: Callable[[slice, int], None]) -> None:
        with self.threads.parallel_region():
            size = max(1, min(self.chunk_bytes, self.workspace_bytes // self.workers) // max(1, bytes_each))

            def do_part(rows: slice, worker: int) -> None:
                for start in range(rows.start, rows.stop, size):
                    work(slice(start, min(start + size, rows.stop)), worker)

            self.threads.parallel_for(count, do_part)

    def loops(self, arguments: Sequence[Any]) -> Any:
        """The compiled loops, in a parallel region and if all arrays among the arguments are contiguous; else None."""
        if self.threads.region_workers is None:
            return None
        for a in arguments:
            if isinstance(a, ndarray) and not a.flags.c_contiguous:
                return None
        return compiled_loops()

    def _sum(self, shape: Sequence[int], count: int, add: Callable[[slice, Array], None]) -> Array:
        """The sum over range(count) in float64: add(rows, totals) adds these rows to the totals of one worker."""
        totals = self.zeros((self.threads.region_workers or 1, *shape), numpy.float64)
        self.threads.parallel_for(count, lambda rows, worker: add(rows, totals[worker]))
        return totals.sum(axis=0)

    # Matrix products -------------------------------------------------------------------------------------------------

    def matmul(self, a: Array, b: Array, out: Array) -> Array:
        if a.shape[1] == 1:  # as in a batch of one sample, which NumPy's matmul does without the BLAS, ten times slower
            return numpy.multiply(a, b, out=out)
        if len(a) <= _FEW_ROWS and b.size >= _LARGE and b.T.flags.c_contiguous:
            # The BLAS would take longer to copy b in another order than to multiply; (a b)ᵀ = bᵀ aᵀ avoids the copy.
            out[...] = numpy.matmul(b.T, a.T, out=self._matrix((b.shape[1], len(a)), out.dtype)).T
            return out
        if b.nbytes <= _MAX_PACKED_BYTES and (loops := self.loops(())) is not None and len(a) >= loops.ROWS_TO_PACK:
            width = loops.panel_columns(b.itemsize)
            same = a.dtype == b.dtype == out.dtype and out.strides[1] == out.itemsize
            if same and b.dtype.char in "fd" and b.shape[1] % width == 0 and self.threads.blas_uses_one_thread:
                return self._packed_matmul(loops, a, b, out, width)
        if len(out) * b.size < _SPLIT_MATMUL or (self.threads.region_workers or 1) == 1:
            return numpy.matmul(a, b, out)
        self.threads.parallel_for(len(out), lambda rows, _: numpy.matmul(a[rows], b, out=out[rows]))
        return out

    def _packed_matmul(self, loops: Any, a: Array, b: Array, out: Array, width: int) -> Array:
        """out = a @ b, by a product of our own (loops_products.py), whose b has panels of so many columns."""
        panels = b.shape[1] // width
        packed = self._matrix((panels * len(b), width), b.dtype).reshape(panels, len(b), width)
        loops.pack(b, packed)
        if len(out) * b.size < _SPLIT_MATMUL:
            loops.packed_product(a, packed, out)
        else:
            self.threads.parallel_for(len(out), lambda rows, _: loops.packed_product(a[rows], packed, out[rows]))
        return out

    def _matrix(self, shape: tuple[int, int], dtype: DType) -> Array:
        """An uninitialized matrix for this thread, valid until the next call."""
        kept: Array | None = getattr(self._scratch, "kept", None)
        size = shape[0] * shape[1] * dtype.itemsize
        if kept is None or kept.size < size:
            kept = self._scratch.kept = numpy.empty(size, dtype=numpy.uint8)
        return kept[:size].view(dtype).reshape(shape)

    # Elements --------------------------------------------------------------------------------------------------------

    @compiled
    def gelu(self, loops: Any, x: Array, out: Array, slope: Array) -> Array:
        if x.dtype != numpy.float32:  # the loop's polynomial has the digits of float32 only
            return super().gelu(x, out, slope)

        self.threads.parallel_for(len(x), lambda rows, _: loops.gelu(x[rows], out[rows], slope[rows]))
        return out

    relu = by_rows(Backend.relu, "x", "out")
    relu_grad = by_rows(Backend.relu_grad, "grad", "y", "out")
    add_to_rows = by_rows(Backend.add_to_rows, "a")
    scale_shift = by_rows(Backend.scale_shift, "x", "out")
    combine = by_rows(Backend.combine, "g", "x", "out")

    @compiled
    def rescale(self, loops: Any, x: Array, scale: float, offset: float, out: Array) -> Array:
        if not _known_to_numba(x):
            return super().rescale(x, scale, offset, out)
        loop, number = loops.rescale, out.dtype.type
        self.threads.parallel_for(len(x), lambda rows, _: loop(x[rows], number(scale), number(offset), out[rows]))
        return out

    def gather(self, a: Array, rows: Array, out: Array) -> Array:
        # mode="clip", because the default allocates a temporary array of out's size.
        if a.dtype == out.dtype:
            return numpy.take(a, rows, axis=0, out=out, mode="clip")
        loops = self.loops((a, rows, out))
        if loops is None or not _known_to_numba(a):
            return super().gather(a, rows, out)
        loops.gather(a.reshape(len(a), -1), rows, out.reshape(len(out), -1))
        return out

    @compiled
    def add_rows_at(self, loops: Any, grad_rows: Array, rows: Array, out: Array) -> Array:
        # Workers share the columns, so that each element is a sum in the order of the rows, whatever their number.
        def add(columns: slice, _: int) -> None:
            loops.add_rows_at(grad_rows, rows, columns.start, columns.stop, out)

        self.threads.parallel_for(out.shape[1], add)
        return out

    # Rows ------------------------------------------------------------------------------------------------------------

    @compiled
    def cross_entropy(
        self, loops: Any, logits: Array, labels: Array, smoothing: float, losses: Array, grad: Array
    ) -> tuple[Array, Array]:
        number = logits.dtype.type
        confidence, share = number(1.0 - smoothing), number(smoothing / logits.shape[1])
        if logits.size < _SPLIT_LOGITS:
            loops.cross_entropy(logits, labels, confidence, share, number(1.0), losses, grad)
            return losses, grad

        def compute(rows: slice, _: int) -> None:
            loops.cross_entropy(logits[rows], labels[rows], confidence, share, number(1.0), losses[rows], grad[rows])

        self.threads.parallel_for(len(logits), compute)
        return losses, grad

    def count_correct(self, outputs: Array, labels: Array) -> Array:
        loops = self.loops((outputs, labels))
        if loops is not None and labels.dtype.kind in "iu":
            return numpy.array([loops.count_correct(outputs, labels), len(outputs)], dtype=numpy.int64)
        flat = outputs.reshape(-1)
        if math.isnan(flat.dot(flat)):  # a sum of squares is NaN only if a term is
            return super().count_correct(outputs, labels)
        sums = numpy.empty(2, dtype=numpy.int64)  # the formula without its search for NaN, which takes longer
        sums[0], sums[1] = numpy.count_nonzero(outputs.argmax(axis=-1) == labels), len(outputs)
        return sums

    def count_pairs(self, a: Array, b: Array, shape: tuple[int, int], weights: Array | None) -> Array:
        cells = a.astype(numpy.int64, copy=False) * shape[1] + b
        if weights is None:
            counts = numpy.bincount(cells, minlength=shape[0] * shape[1])
            return counts.astype(numpy.int64, copy=False).reshape(shape)
        # Not numpy.bincount, which adds up one by one: the rounding errors of many weights would accumulate.
        order = numpy.argsort(cells, kind="stable")
        cells, sums = cells[order], numpy.zeros(shape)
        first = numpy.flatnonzero(numpy.diff(cells, prepend=-1))
        sums.reshape(-1)[cells[first]] = numpy.add.reduceat(weights[order], first)
        return sums

    @compiled
    def normalize_and_scale(
        self, loops: Any, x: Array, centered: bool, epsilon: float, gamma: Array | None, beta: Array | None,
        normal: Array, sigma: Array, out: Array,
    ) -> Array:  # fmt: skip
        none = x.reshape(-1)[:0]
        given = x.dtype.type(epsilon), none if gamma is None else gamma, none if beta is None else beta
        self.threads.parallel_for(
            len(x),
            lambda rows, _: loops.normalize_and_scale(x[rows], centered, *given, normal[rows], sigma[rows], out[rows]),
        )
        return out

    @compiled
    def normalize_and_scale_grad(
        self, loops: Any, grad: Array, centered: bool, gamma: Array | None, normal: Array, sigma: Array,
        grad_gamma: Array | None, grad_beta: Array | None, out: Array,
    ) -> Array:  # fmt: skip
        scale = grad.reshape(-1)[:0] if gamma is None else gamma
        sums = self._sum(
            (2, grad.shape[1]),
            len(grad),
            lambda rows, totals: loops.normalize_and_scale_grad(
                grad[rows], centered, scale, normal[rows], sigma[rows], totals, out[rows]
            ),
        )
        for total, result in zip(sums, (grad_gamma, grad_beta), strict=True):
            if result is not None:
                result[...] = total
        return out

    # Reductions ------------------------------------------------------------------------------------------------------

    def sum_rows(self, a: Array, out: Array) -> Array:
        if len(a) > _MANY_ROWS:  # whose rounding errors would accumulate
            loops = self.loops((a,))
            if loops is None:
                out[...] = numpy.sum(a, axis=0, dtype=numpy.float64)
            else:
                out[...] = self._sum(out.shape, len(a), lambda rows, totals: loops.add_rows(a[rows], totals))
            return out
        ones = self._ones.get(a.dtype)
        if ones is None:
            ones = self._ones[a.dtype] = numpy.ones(_MANY_ROWS, dtype=a.dtype)
        return numpy.dot(ones[: len(a)], a, out=out)  # three times as fast as numpy.sum

    @compiled
    def moments(self, loops: Any, x: Array) -> tuple[Array, Array]:
        loop, shift = loops.add_powers, x[0].copy()  # so close to the mean that one pass loses no digits
        sums = self._sum((2, x.shape[1]), len(x), lambda rows, totals: loop(x[rows], shift, totals))
        offset, square = sums / len(x)
        return (shift + offset).astype(x.dtype), (square - offset * offset).clip(0.0).astype(x.dtype)

    @compiled
    def sum_products(self, loops: Any, a: Array, b: Array, center: Array, out: Array) -> Array:
        out[...] = self._sum(
            out.shape, len(a), lambda rows, totals: loops.add_products(a[rows], b[rows], center, totals)
        )
        return out

    # Windows ---------------------------------------------------------------------------------------------------------

    def im2col_layout(self, memory: Array) -> Array:
        # With few channels, the pixels under one cell of all windows form longer runs than those under one window.
        if memory.shape[-1] > _FEW_CHANNELS:
            return memory
        images, rows, columns, kh, kw, channels = memory.shape
        return memory.reshape(kh, kw, channels, images, rows, columns).transpose(3, 4, 5, 0, 1, 2)

    def im2col(self, x: Array, windows: Windows, out: Array) -> Array:
        _check_shapes(x, windows, out)
        by_cell = out.transpose(3, 4, 5, 0, 1, 2)
        if (loops := self.loops((x, by_cell))) is not None:
            loops.im2col_by_cell(x, windows, by_cell)
        elif (loops := self.loops((x, out))) is not None:
            loops.im2col(x, windows, out)
        else:
            super().im2col(x, windows, out)
        return out

    def col2im(self, patches: Array, windows: Windows, out: Array) -> Array:
        _check_shapes(out, windows, patches)
        by_cell = patches.transpose(3, 4, 5, 0, 1, 2)
        if (loops := self.loops((by_cell, out))) is not None:
            loops.col2im_by_cell(by_cell, windows, out)
        elif (loops := self.loops((patches, out))) is not None:
            loops.col2im(patches, windows, out)
        else:
            super().col2im(patches, windows, out)
        return out

    def max_pool(self, x: Array, windows: Windows, out: Array, choice: Array) -> Array:
        _check_shapes(x, windows, out)
        with self.threads.parallel_region():
            return self._max_pool(x, windows, out, choice)

    def max_pool_grad(self, grad: Array, choice: Array, windows: Windows, out: Array) -> Array:
        _check_shapes(out, windows, grad)
        with self.threads.parallel_region():
            return self._max_pool_grad(grad, choice, windows, out)

    _max_pool = by_rows(Backend.max_pool, "x", "choice", "out")
    _max_pool_grad = by_rows(Backend.max_pool_grad, "grad", "choice", "out")
    sum_pool = by_rows(Backend.sum_pool, "x", "out")
    sum_pool_grad = by_rows(Backend.sum_pool_grad, "grad", "out")
    depthwise = by_rows(Backend.depthwise, "x", "out")
    depthwise_input_grad = by_rows(Backend.depthwise_input_grad, "grad", "out")

    # Random numbers --------------------------------------------------------------------------------------------------

    @compiled
    def dropout_mask(self, loops: Any, key: Sequence[int], rate: float, out: Array, first_row: int = 0) -> Array:
        row_hash, word = self._hash_rows(key, len(out), first_row)
        numbers = numpy.uint32(word), numpy.uint32(int(rate * 2**32)), out.dtype.type(1.0 / (1.0 - rate))
        self.threads.parallel_for(len(out), lambda rows, _: loops.dropout_mask(row_hash[rows], *numbers, out[rows]))
        return out

    # Updates ---------------------------------------------------------------------------------------------------------

    @compiled
    def clip_norm(self, loops: Any, grads: Array, trained: Runs, limit: float) -> None:
        if grads.dtype != numpy.float32:  # whose squares do not overflow in float64
            super().clip_norm(grads, trained, limit)
            return
        runs = [grads[run] for run in trained]

        def square_of(g: Array) -> Array:
            return self._sum((1,), len(g), lambda rows, totals: loops.add_squares(g[rows], totals))

        squares = map(square_of, runs)
        scale = numpy.minimum(1.0, limit / numpy.maximum(numpy.sqrt(sum(squares)), 1e-300)).astype(grads.dtype)
        for g in runs:
            g *= scale

    def fused_update(self, name: str, runs: Runs, vectors: Sequence[Array], numbers: Sequence[float]) -> bool:
        loops = self.loops(vectors)
        if loops is None:
            return False
        update, number = getattr(loops, name), vectors[0].dtype.type
        given = [of_step(number, n) for n in numbers]

        def update_part(rows: slice, _: int) -> None:
            update(*[vector[rows] for vector in pieces], *given)

        for run in runs:
            pieces = [vector[run] for vector in vectors]
            self.threads.parallel_for(len(pieces[0]), update_part)
        return True


def _known_to_numba(a: Array) -> bool:
    """Whether compiled loops can read a user's array: Numba supports neither float16 nor a foreign byte order."""
    return bool(a.dtype.isnative) and a.dtype.char != "e"


def _check_shapes(images: Array, windows: Windows, results: Array) -> None:
    """Refuse arrays that differ in batch size, image size or channels: compiled loops would leave their bounds."""
    if images.shape != (len(results), *windows.image, results.shape[-1]) or results.shape[1:3] != windows.grid:
        raise ValueError(f"images {images.shape} and results {results.shape} do not fit {windows}.")


def loop_compiler() -> str:
    """The name and version of the package that compiles the loops, or "none". Does not load it."""
    return "none" if loops_unavailable_reason() else f"Numba {_installed_version()}"


def loops_unavailable_reason() -> str | None:
    """The reason why no compiled loops are used; None if they are, or will be once a model needs them."""
    if os.environ.get("XPNET_FAST") == "0":
        return "the environment variable XPNET_FAST=0 turns them off"
    if _import_error is None and not _numba_is_installed():
        return "Numba is not installed"
    return _import_error


@functools.cache
def compiled_loops() -> Any:
    """The compiled loops; None if there is a `loops_unavailable_reason`."""
    global _import_error
    with _loading:
        if (reason := loops_unavailable_reason()) is not None:
            _log.info("no compiled loops, plain NumPy instead: %s", reason)
            return None
        try:
            return importlib.import_module("xpnet.backends.cpu.loops")
        except Exception as error:  # Numba fails in many ways if it is damaged or needs another NumPy
            why = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
            _import_error = f"Numba {_installed_version()} cannot be used: {why}"
            _log.warning("no compiled loops, plain NumPy instead: %s", _import_error)
            return None


def describe_loops() -> str:
    """Say how the loops run. Imports Numba, to find out whether that works."""
    compiled_loops()
    reason = loops_unavailable_reason()
    return f"compiled by {loop_compiler()}" if reason is None else f"plain NumPy, not compiled: {reason}"


_loading = held_in_forks(threading.Lock())
#: Why the import of Numba failed.
_import_error: str | None = None


def _numba_is_installed() -> bool:
    try:
        return importlib.util.find_spec("numba") is not None
    except (ImportError, ValueError):  # as with sys.modules["numba"] = None
        return False


def _installed_version() -> str:
    import importlib.metadata  # here, because it is slow to import and only reports need it

    try:
        return importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
