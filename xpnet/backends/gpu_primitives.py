"""The primitives on a GPU: kernels.cu and cuBLAS, for arrays that lie as these want them; else the plain formula."""

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy

from xpnet.backends import cublas
from xpnet.backends.arrays import Array, DType
from xpnet.backends.base import Backend, step_word
from xpnet.backends.cublas import Cublas, Half
from xpnet.backends.gpu_compiling import CompileWatch, watch
from xpnet.backends.gpu_graphs import CapturedGraph
from xpnet.backends.gpu_kernels import NUMBERS, REALS, Kernels
from xpnet.backends.sliding import Windows
from xpnet.errors import RecordingError

_log = logging.getLogger(__name__)

_THREADS = 256
_MOST_BLOCKS = 4096  # of those that stride over their work: enough for any device to be busy
_PART_ROWS = 256  # of a sum over the rows of a matrix, for which there are at most so many blocks:
_PARTS = 1024
_MANY = 2**31  # elements; the kernels of windows count in 32 bits

_INT64 = numpy.dtype("int64")
_HALVES = ("float16", "bfloat16")


class _Here(threading.local):
    """What holds in one thread: the precision of its products, and the recording that is under way."""

    precision: str | None = None
    recording: Any = None
    lasting: Any = None  # while temporary arrays come from the pool of a graph, the allocator of all others


class FusedPrimitives(Backend):
    """A backend on CuPy. What cannot be compiled or loaded is left to the formulas, and said once."""

    def __init__(self, name: str, xp: Any) -> None:
        super().__init__(name, xp)
        watch(xp)  # before anything is compiled
        self._kernels = Kernels(xp)
        self._here = _Here()
        self._handles: dict[int, Cublas] = {}
        self._roles: dict[tuple[Any, ...], Array] = {}
        #: The graphs that are alive, whose pools hold memory of their own.
        self.graphs: weakref.WeakSet[CapturedGraph] = weakref.WeakSet()

    # Compiling -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _compiling(self) -> CompileWatch | None:
        return watch(self.xp)

    @property
    def compile_seconds(self) -> float:
        return self._compiling.seconds if self._compiling else 0.0

    def telling_of_compiling(self, listener: Callable[[], None]) -> AbstractContextManager[Any]:
        return self._compiling.telling(listener) if self._compiling else nullcontext()

    # What there is to work with --------------------------------------------------------------------------------------

    @functools.cached_property
    def why_no_kernels(self) -> str | None:
        """Why kernels.cu cannot be used here, found out by running a small one; None if it can."""
        try:
            with self.device():
                ones = self.xp.ones(1, dtype=numpy.float32)
                self._launch("relu", ones.dtype, 1, ones, 1, ones)
        except Exception as error:  # no compiler, no headers, a device too old: all of them worth showing
            return self._without("kernels.cu does not compile", error)
        return None

    @functools.cached_property
    def why_no_cublas(self) -> str | None:
        """Why cuBLAS cannot be called directly; None if it can."""
        try:
            with self.device():
                self._cublas()
        except Exception as error:
            return self._without("cuBLAS cannot be called", error)
        return None

    def _without(self, what: str, error: Exception) -> str:
        reason = f"{what} ({type(error).__name__}: {error})"
        _log.warning("%s: %s; CuPy's own functions do the work, more slowly", self.name, reason)
        return reason

    def _cublas(self) -> Cublas:
        """The handle of the current stream."""
        stream = self.xp.cuda.get_current_stream().ptr
        handle = self._handles.get(stream)
        if handle is None:
            with self.lasting_memory():
                workspace = self.xp.empty(cublas.WORKSPACE_BYTES, dtype=numpy.uint8)
            handle = self._handles[stream] = Cublas(self._cublas_library(), stream, workspace)
        return handle

    def _cublas_library(self) -> Any:
        return _library()

    def _launch(self, name: str, real: DType, count: int, *given: Any) -> None:
        """A kernel that strides over `count` elements."""
        blocks = min(-(-count // _THREADS), _MOST_BLOCKS)
        self._kernels.launch(name, real, (blocks,), (_THREADS,), *given)

    def _launch_rows(self, name: str, x: Array, *given: Any) -> None:
        """A kernel with a block for each row of x."""
        threads = min(_THREADS, max(32, 1 << (x.shape[1] - 1).bit_length()))
        self._kernels.launch(name, x.dtype, (min(len(x), 2**16),), (threads,), *given)

    def _sum_columns(self, name: str, given: Sequence[Array], sums: int, *out: Array) -> tuple[Array, int]:
        """A kernel that sums down columns in parts; gives (parts · sums, columns) of float64, and how many parts."""
        rows, columns = given[0].shape
        across = -(-columns // 32)
        parts = min(-(-rows // _PART_ROWS), max(1, _PARTS // across))
        part_rows = -(-rows // parts)
        parts = -(-rows // part_rows)
        room = self.xp.empty((parts * sums, columns), dtype=numpy.float64)
        shape = rows, columns, part_rows
        self._kernels.launch(name, given[0].dtype, (across, parts), (32, 8), *given, *shape, room, *out)
        return room, parts

    def _takes(self, *arrays: Array) -> bool:
        """Whether the kernels take these: contiguous, not empty, of one dtype that they are compiled for."""
        dtype = arrays[0].dtype
        if dtype not in REALS or self.why_no_kernels:
            return False
        return all(a.flags.c_contiguous and a.size and a.dtype == dtype for a in arrays)

    # Numbers that change from step to step ---------------------------------------------------------------------------

    def numbers(self, of_step: Callable[[int], Sequence[float]], step: int) -> Array:
        """The numbers of this step in device memory; while a step is recorded, a place where each step's will be."""
        if self._here.recording is not None:
            place: Array = self._here.recording.place(of_step, step)
            return place
        numbers = self.xp.empty(NUMBERS, dtype=numpy.float64)
        values = (*of_step(step), *[0.0] * NUMBERS)[:NUMBERS]
        self._launch("set_numbers", numpy.dtype("float64"), 1, numbers, *values)
        return numbers

    def refuse_recording(self, what: str) -> None:
        if self._here.recording is not None:
            raise RecordingError(what)

    # Memory ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def temporary_memory(self, pool: Any) -> Iterator[None]:
        """Inside, in this thread, arrays come from this pool, except those made in `lasting_memory`."""
        cuda, before = self.xp.cuda, self._here.lasting
        self._here.lasting = before or cuda.get_allocator()
        try:
            with cuda.using_allocator(pool.malloc):
                yield
        finally:
            self._here.lasting = before

    def lasting_memory(self) -> AbstractContextManager[Any]:
        lasting = self._here.lasting
        if lasting is None:
            return nullcontext()
        context: AbstractContextManager[Any] = self.xp.cuda.using_allocator(lasting)
        return context

    # Captures --------------------------------------------------------------------------------------------------------

    @contextmanager
    def recording(self, recording: Any) -> Iterator[None]:
        """Inside, in this thread, the numbers of a step are taken from the places that `recording` hands out."""
        self._here.recording = recording
        try:
            yield
        finally:
            self._here.recording = None

    # Products --------------------------------------------------------------------------------------------------------

    @contextmanager
    def products(self, precision: str) -> Iterator[None]:
        before, self._here.precision = self._here.precision, precision
        try:
            yield
        finally:
            self._here.precision = before

    def operand(self, a: Array) -> Array:
        precision = self._here.precision
        if precision not in _HALVES or isinstance(a, Half) or a.dtype != numpy.float32:
            return a
        if not a.flags.c_contiguous and a.T.flags.c_contiguous:
            return self.operand(a.T).T
        a = self.xp.ascontiguousarray(a)
        bits = self.xp.empty(a.shape, dtype=numpy.uint16)
        self._launch(f"to_{precision}", a.dtype, a.size, a, a.size, bits)
        return Half(bits, precision)

    def matmul(self, a: Array, b: Array, out: Array) -> Array:
        if self._product(a, b, out, add=False):
            return out
        return super().matmul(a, b, out)

    def add_matmul(self, a: Array, b: Array, out: Array, scratch: Array) -> Array:
        if self._product(a, b, out, add=True):
            return out
        return super().add_matmul(a, b, out, scratch)

    def matmul_each(self, a: Array, b: Array, out: Array) -> Array:
        stacks = all(x.ndim == 2 or x.flags.c_contiguous for x in (a, b, out))
        if (
            self.why_no_cublas
            or not stacks
            or not out.size
            or not (a.dtype == b.dtype == out.dtype)
            or out.dtype not in REALS
        ):
            return super().matmul_each(a, b, out)
        a, b = (x if x.ndim == 2 else x.reshape(-1, *x.shape[-2:]) for x in (a, b))
        tf32 = self._here.precision == "tf32"
        if not self._cublas().product_each(a, b, out.reshape(-1, *out.shape[-2:]), tf32):
            return super().matmul_each(a, b, out)
        return out

    def _product(self, a: Array, b: Array, out: Array, add: bool) -> bool:
        if self.why_no_cublas or out.dtype not in REALS:
            return False
        precision = self._here.precision
        if precision in _HALVES:
            a, b = self.operand(a), self.operand(b)
        elif not a.dtype == b.dtype == out.dtype:
            return False
        return self._cublas().product(a, b, out, add, tf32=precision == "tf32")

    # Sums, elements --------------------------------------------------------------------------------------------------

    def sum_rows(self, a: Array, out: Array) -> Array:
        if a.ndim != 2 or not self._takes(a, out):
            return super().sum_rows(a, out)
        parts, count = self._sum_columns("sum_rows", [a], 1, out)
        return self._add_parts(parts, count, out)

    def _add_parts(self, parts: Array, count: int, out: Array) -> Array:
        if count > 1:
            self._launch("add_parts", out.dtype, out.size, parts, count, out.size, out)
        return out

    def sum_to(self, x: Array, out: Array) -> None:
        if not self._takes(x):
            super().sum_to(x, out)
        else:
            self._kernels.launch("sum_to", x.dtype, (1,), (_THREADS,), x, x.size, out)

    def gather(self, a: Array, rows: Array, out: Array) -> Array:
        fits = rows.dtype == _INT64 and rows.ndim == 1 and out.size and not self.why_no_kernels
        if not fits or not (a.flags.c_contiguous and rows.flags.c_contiguous and out.flags.c_contiguous):
            return super().gather(a, rows, out)
        if a.dtype == out.dtype and a.itemsize in (1, 4, 8):
            name, real = f"gather_{a.itemsize}", numpy.dtype("float32")
        elif a.dtype == numpy.uint8 and out.dtype in REALS:
            name, real = "gather_bytes", out.dtype
        else:
            return super().gather(a, rows, out)
        self._launch(name, real, out.size, a, rows, rows.size, out.size // rows.size, out)
        return out

    def rescale(self, x: Array, scale: float, offset: float, out: Array) -> Array:
        if x.dtype == numpy.uint8 and x.flags.c_contiguous and self._takes(out):
            self._launch("rescale_bytes", out.dtype, x.size, x, x.size, scale, offset, out)
        elif self._takes(x, out):
            self._launch("rescale", out.dtype, x.size, x, x.size, scale, offset, out)
        else:
            return super().rescale(x, scale, offset, out)
        return out

    def add_to_rows(self, a: Array, row: Array) -> Array:
        if not self._takes(a, row):
            return super().add_to_rows(a, row)
        self._launch("add_to_rows", a.dtype, a.size, a, row, a.size, row.size)
        return a

    def relu(self, x: Array, out: Array) -> Array:
        return self._each("relu", x, out, super().relu)

    def sigmoid(self, x: Array, out: Array | None = None) -> Array:
        return self._each("sigmoid", x, self.xp.empty_like(x) if out is None else out, super().sigmoid)

    def softplus(self, x: Array, out: Array | None = None) -> Array:
        return self._each("softplus", x, self.xp.empty_like(x) if out is None else out, super().softplus)

    def _each(self, name: str, x: Array, out: Array, plain: Callable[..., Array]) -> Array:
        if not self._takes(x, out):
            return plain(x, out=out)
        self._launch(name, x.dtype, x.size, x, x.size, out)
        return out

    def relu_grad(self, grad: Array, y: Array, out: Array) -> Array:
        if not self._takes(grad, y, out):
            return super().relu_grad(grad, y, out)
        self._launch("relu_grad", y.dtype, y.size, grad, y, y.size, out)
        return out

    # Rows ------------------------------------------------------------------------------------------------------------

    def softmax(self, x: Array, out: Array | None = None) -> Array:
        return self._each_row("softmax", x, out, super().softmax)

    def log_softmax(self, x: Array, out: Array | None = None) -> Array:
        return self._each_row("log_softmax", x, out, super().log_softmax)

    def _each_row(self, name: str, x: Array, out: Array | None, plain: Callable[..., Array]) -> Array:
        out = self.xp.empty_like(x) if out is None else out
        if not self._takes(x, out):
            return plain(x, out=out)
        rows, made = x.reshape(-1, x.shape[-1]), out.reshape(-1, x.shape[-1])
        self._launch_rows(name, rows, rows, *rows.shape, made)
        return out

    def cross_entropy(
        self, logits: Array, labels: Array, smoothing: float, losses: Array, grad: Array
    ) -> tuple[Array, Array]:
        if not self._takes(logits, losses, grad) or labels.dtype != _INT64 or not labels.flags.c_contiguous:
            return super().cross_entropy(logits, labels, smoothing, losses, grad)
        rest = smoothing / logits.shape[1]
        self._launch_rows("cross_entropy", logits, logits, labels, *logits.shape, 1.0 - smoothing, rest, losses, grad)
        return losses, grad

    def count_hits(self, outputs: Array, labels: Array) -> Array:
        if not self._takes(outputs) or labels.dtype != _INT64 or not labels.flags.c_contiguous:
            return super().count_hits(outputs, labels)
        hits = self.xp.zeros(2, dtype=_INT64)
        self._launch("count_hits", outputs.dtype, len(outputs), outputs, labels, *outputs.shape, hits)
        return hits

    def normalize_rows(self, x: Array, epsilon: float, out: Array, sigma: Array) -> Array:
        if not self._takes(x, out, sigma):
            return super().normalize_rows(x, epsilon, out, sigma)
        self._launch_rows("normalize_rows", x, x, *x.shape, epsilon, out, sigma)
        return out

    def normalize_rows_grad(self, grad: Array, normal: Array, sigma: Array, out: Array) -> Array:
        if not self._takes(grad, normal, sigma, out):
            return super().normalize_rows_grad(grad, normal, sigma, out)
        self._launch_rows("normalize_rows_grad", grad, grad, normal, sigma, *grad.shape, out)
        return out

    # Columns ---------------------------------------------------------------------------------------------------------

    def moments(self, x: Array) -> tuple[Array, Array]:
        if not self._takes(x):
            return super().moments(x)
        parts, count = self._sum_columns("sum_powers", [x], 2)
        mean, variance = (self.xp.empty(x.shape[1], dtype=x.dtype) for _ in range(2))
        self._launch("moments", x.dtype, x.shape[1], parts, count, x, *x.shape, mean, variance)
        return mean, variance

    def sum_products(self, a: Array, b: Array, center: Array, out: Array) -> Array:
        if not self._takes(a, b, center, out):
            return super().sum_products(a, b, center, out)
        parts, count = self._sum_columns("sum_products", [a, b, center], 1, out)
        return self._add_parts(parts, count, out)

    def scale_shift(self, x: Array, scale: Array, shift: Array, out: Array) -> Array:
        if not self._takes(x, scale, shift, out):
            return super().scale_shift(x, scale, shift, out)
        self._launch("scale_shift", x.dtype, x.size, x, scale, shift, x.size, x.shape[1], out)
        return out

    def combine(self, g: Array, a: Array, x: Array, b: Array, c: Array, out: Array) -> Array:
        if not self._takes(g, a, x, b, c, out):
            return super().combine(g, a, x, b, c, out)
        self._launch("combine", x.dtype, x.size, g, a, x, b, c, x.size, x.shape[1], out)
        return out

    # Windows over images ---------------------------------------------------------------------------------------------

    def patches(self, x: Array, windows: Windows, out: Array) -> Array:
        pixel = _pixel(x)
        if pixel is None or x.dtype != out.dtype or out.size >= _MANY or not self._takes(out):
            return super().patches(x, windows, out)
        given = (*_geometry(windows), x.shape[-1])
        self._launch("patches", out.dtype, out.size, _address(x), pixel, out.size, *given, out)
        return out

    def fold(self, patches: Array, windows: Windows, out: Array) -> Array:
        pixel = _pixel(out)
        if pixel is None or patches.dtype != out.dtype or patches.size >= _MANY or not self._takes(patches):
            return super().fold(patches, windows, out)
        given = (*_geometry(windows), out.shape[-1], pixel)
        self._launch("fold", out.dtype, out.size, patches, out.size, *given, _address(out))
        return out

    def max_pool(self, x: Array, windows: Windows, out: Array, choice: Array) -> Array:
        if not self._takes_windows(x, out) or not choice.flags.c_contiguous:
            return super().max_pool(x, windows, out, choice)
        given = (out.size, *_geometry(windows), out.shape[-1], out, choice)
        self._launch(f"max_pool_{choice.itemsize}", x.dtype, out.size, x, *given)
        return out

    def unpool_max(self, grad: Array, choice: Array, windows: Windows, out: Array) -> Array:
        if not self._takes_windows(grad, out) or not choice.flags.c_contiguous:
            return super().unpool_max(grad, choice, windows, out)
        given = (out.size, *_geometry(windows), out.shape[-1], out)
        self._launch(f"unpool_max_{choice.itemsize}", grad.dtype, out.size, grad, choice, *given)
        return out

    def sum_pool(self, x: Array, windows: Windows, out: Array) -> Array:
        if not self._takes_windows(x, out):
            return super().sum_pool(x, windows, out)
        self._launch("sum_pool", x.dtype, out.size, x, out.size, *_geometry(windows), out.shape[-1], out)
        return out

    def unpool_sum(self, grad: Array, windows: Windows, out: Array) -> Array:
        if not self._takes_windows(grad, out):
            return super().unpool_sum(grad, windows, out)
        self._launch("unpool_sum", grad.dtype, out.size, grad, out.size, *_geometry(windows), out.shape[-1], out)
        return out

    def _takes_windows(self, *arrays: Array) -> bool:
        return self._takes(*arrays) and max(a.size for a in arrays) < _MANY

    # Noise -----------------------------------------------------------------------------------------------------------

    def random_bits(self, key: Sequence[int], rows: int, columns: int, first_row: int = 0) -> Array:
        if self.why_no_kernels or not rows * columns:
            return super().random_bits(key, rows, columns, first_row)
        out = self.xp.empty((rows, columns), dtype=numpy.uint32)
        word = self.numbers(functools.partial(step_word, tuple(key[:-1])), key[-1])
        self._launch("random_bits", numpy.dtype("float32"), out.size, word, first_row, out.size, columns, out)
        return out

    def dropout_mask(self, key: Sequence[int], rate: float, out: Array, first_row: int = 0) -> Array:
        if not self._takes(out):
            return super().dropout_mask(key, rate, out, first_row)
        word = self.numbers(functools.partial(step_word, tuple(key[:-1])), key[-1])
        given = (out.size, out.shape[1], int(rate * 2**32), 1.0 / (1.0 - rate), out)
        self._launch("dropout_mask", out.dtype, out.size, word, first_row, *given)
        return out

    # Updates ---------------------------------------------------------------------------------------------------------

    def clip_norm(self, grads: Array, trained: list[slice], limit: float) -> None:
        if not self._takes(grads):
            super().clip_norm(grads, trained, limit)
            return
        roles = self._roles_of(grads.size, trained, [])
        blocks = min(-(-grads.size // (4 * _THREADS)), _THREADS)
        parts, scale = (self.xp.empty(shape, dtype=numpy.float64) for shape in ((blocks, 2), ()))
        kernels, real = self._kernels, grads.dtype
        kernels.launch("square_parts", real, (blocks,), (_THREADS,), grads, roles, grads.size, parts)
        kernels.launch("clip_scale", real, (1,), (_THREADS,), parts, blocks, limit, scale)
        self._launch("scale_trained", real, grads.size, grads, roles, grads.size, scale)

    def whole_update(
        self,
        name: str,
        trained: list[slice],
        decayed: list[slice],
        vectors: Sequence[Array],
        numbers: Callable[[int], Sequence[float]],
        step: int,
        gate: Array | None,
    ) -> bool:
        if not self._takes(*vectors):
            return False
        size = vectors[0].size
        roles = self._roles_of(size, trained, decayed)
        self._launch(name, vectors[0].dtype, size, *vectors, roles, size, self.numbers(numbers, step), gate)
        return True

    def _roles_of(self, size: int, trained: list[slice], decayed: list[slice]) -> Array:
        """For each element of the flat vectors: 0 to be left alone, 1 trained, 2 trained and decayed."""
        runs = tuple(tuple((run.start, run.stop) for run in runs) for runs in (trained, decayed))
        key = (size, *runs)
        if key not in self._roles:
            roles = numpy.zeros(size, dtype=numpy.uint8)
            for role, stretches in enumerate(runs, 1):
                for start, stop in stretches:
                    roles[start:stop] = role
            with self.lasting_memory():
                self._roles[key] = self.asarray(roles)
        return self._roles[key]


@functools.cache
def _library() -> Any:
    return cublas.load()


def _geometry(windows: Windows) -> tuple[int, ...]:
    """The numbers of WINDOWS in kernels.cu."""
    return (
        *windows.image, *windows.grid, *windows.kernel, *windows.strides, *windows.dilation, *windows.before
    )  # fmt: skip


def _pixel(images: Array) -> int | None:
    """How far a pixel of (N, H, W, C) lies from the next in contiguous images of these channels or more; else None."""
    _, height, width, channels = images.shape
    per_image, per_row, per_pixel, per_channel = (stride // images.itemsize for stride in images.strides)
    lies = (
        (per_channel == 1 or channels == 1)
        and (per_row == width * per_pixel or height == 1)
        and (per_image == height * width * per_pixel or len(images) == 1)
        and per_pixel >= channels
    )
    return per_pixel if lies and images.size else None


def _address(a: Array) -> Any:
    """Where an array begins, for a kernel that knows how its elements lie."""
    return numpy.uint64(a.data.ptr)
