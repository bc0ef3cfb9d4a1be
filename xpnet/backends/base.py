"""Backend: the array module `xp`, transfers, and the few primitives that devices do differently.

Every primitive here is the plain formula in `xp`: the reference that the faster ones of a device must agree with.
It uses only what NumPy and CuPy share, and never reads a device value back to the host.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import numpy

from xpnet.backends import columns, sliding, special
from xpnet.backends.arrays import Array, DType
from xpnet.backends.sliding import Windows
from xpnet.errors import ArgumentError

_MASK32 = 0xFFFFFFFF


class Memory(NamedTuple):
    """Bytes. used: by this process's arrays.  held: the same, and what is kept for the next ones.  free, total: of the
    device; of the CPU, None where the system does not tell.
    """

    used: int
    held: int
    free: int | None
    total: int | None


class Uploads:
    """Data on its way to the device while a model trains on what came before. On the CPU there is nothing to do."""

    def ahead(self) -> AbstractContextManager[Any]:
        """A context in which arrays are made beside the training that is under way; after it, it may use them."""
        return nullcontext()

    def used(self, *arrays: Any) -> None:
        """All training on these arrays has been asked for."""


class Backend:
    """One device and the array module that drives it.

    `name` is what `get_backend` takes ("cpu", "gpu", "gpu:1"), `xp` is numpy or cupy. Models hold a backend; there
    is no global one. Constructed with any NumPy-like module, this class runs the reference formulas on it.
    """

    #: Elementwise chains over long vectors go in pieces of this many elements; None means in one piece.
    chunk_elements: int | None = None

    def __init__(self, name: str, xp: ModuleType | Any) -> None:
        self.name = name
        self.xp = xp
        self._workspace_bytes = 256 * 2**20

    def __repr__(self) -> str:
        return f"<xpnet backend {self.name!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        from xpnet.backends import get_backend  # here, because the registry stands above this file

        return get_backend, (self.name,)

    def __deepcopy__(self, memo: Any) -> "Backend":
        return self

    @property
    def workspace_bytes(self) -> int:
        """How many bytes the patches of a convolution may take at a time, whatever the batch; yours to set.

        One image's patches are the least.
        """
        return self._workspace_bytes

    @workspace_bytes.setter
    def workspace_bytes(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float | numpy.number) or not 1 <= value < math.inf:
            raise ArgumentError(f"workspace_bytes must be a number of bytes, at least 1, not {value!r}.")
        self._workspace_bytes = int(value)

    # Transfers -------------------------------------------------------------------------------------------------

    def asarray(self, a: Any, dtype: DType = None) -> Array:
        """`a` (host or device array, list, number) as an array on this device; no copy where none is needed."""
        return self.xp.asarray(a, dtype=dtype)

    def to_numpy(self, a: Any) -> numpy.ndarray[Any, Any]:
        """`a` as a NumPy array on the host. Waits for the device."""
        return numpy.asarray(a)

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it. Returns at once on the CPU."""

    def device(self) -> AbstractContextManager[Any]:
        """A context in which `xp` allocates and computes on this backend's device."""
        return nullcontext()

    def stream(self) -> AbstractContextManager[Any]:
        """A context for a long run of work: on a GPU, with a stream of its own that is ordered with the caller's."""
        return nullcontext()

    def uploads(self) -> Uploads:
        """What moves the parts of data that come in pieces."""
        return Uploads()

    def refuse_recording(self, what: str) -> None:
        """Raise RecordingError where a step is being recorded, which cannot follow `what` from step to step."""

    def recorder(self) -> Any:
        """What records a step in order to play it again (see gpu_graphs.py); None where a device has no such thing."""
        return None

    def lasting_memory(self) -> AbstractContextManager[Any]:
        """A context for arrays that outlive a step, while temporary ones come from the memory pool of a graph."""
        return nullcontext()

    def describe(self) -> list[tuple[str, str]]:
        """(label, text) pairs that name the device and the libraries that drive it."""
        return [("device", self.name)]

    def environment(self) -> dict[str, str]:
        """What must be the same for a run to repeat itself bit for bit."""
        return {"NumPy": numpy.__version__, **{name: text for name, text in self.describe() if name != "memory"}}

    # Compiling -------------------------------------------------------------------------------------------------

    @property
    def compile_seconds(self) -> float:
        """How long this process has spent on compiling kernels for the device."""
        return 0.0

    def telling_of_compiling(self, listener: Callable[[], None]) -> AbstractContextManager[Any]:
        """A context in which `listener` is called whenever a kernel is about to be compiled."""
        return nullcontext()

    # Allocation ------------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: DType) -> Array:
        with self.device():
            return self.xp.empty(tuple(shape), dtype=dtype)

    def zeros(self, shape: Sequence[int], dtype: DType) -> Array:
        with self.device():
            return self.xp.zeros(tuple(shape), dtype=dtype)

    def memory(self) -> Memory:
        """How much memory is used, held and free."""
        return Memory(0, 0, None, None)

    def free_memory(self) -> None:
        """Give memory back to the device that is only held for later. Arrays in use stay."""

    def out_of_memory(self, error: BaseException) -> bool:
        """Whether this is the error of a device, apart from the host, that has no memory left."""
        return False

    def why_no_precision(self, precision: str) -> str | None:
        """Why products of matrices cannot be computed in "tf32", "float16" or "bfloat16" here; None if they can."""
        if precision == "float32":
            return None
        return (
            "it is what the tensor cores of a GPU compute with; the CPU would have to imitate it, more slowly than "
            "float32 and less exactly"
        )

    def lowest(self, dtype: DType) -> float:
        """The lowest finite number of a floating dtype."""
        return float(numpy.finfo(dtype).min)

    # Primitives ------------------------------------------------------------------------------------------------

    def matmul(self, a: Array, b: Array, out: Array) -> Array:
        """out = a @ b for matrices. a, b may be transposed views; out overlaps neither, and is C-contiguous or some
        columns of a matrix that is.
        """
        if out.flags.c_contiguous:
            return self.xp.matmul(a, b, out=out)
        out[...] = self.xp.matmul(a, b)
        return out

    def add_matmul(self, a: Array, b: Array, out: Array, scratch: Array) -> Array:
        """out += a @ b, by way of a C-contiguous `scratch` in out's shape."""
        out += self.xp.matmul(a, b, out=scratch)
        return out

    def matmul_each(self, a: Array, b: Array, out: Array) -> Array:
        """out[i] = a[i] @ b[i], of matrices stacked in contiguous arrays; a or b may be one matrix for them all."""
        return self.xp.matmul(a, b, out=out)

    def products(self, precision: str) -> AbstractContextManager[Any]:
        """A context in which `operand` and `matmul` work in this precision."""
        return nullcontext()

    def operand(self, a: Array) -> Array:
        """`a` as products take it in the precision of this context. A half precision makes a rounded copy of it."""
        return a

    def sum_rows(self, a: Array, out: Array) -> Array:
        """out[j] = Σ_i a[i, j]."""
        return self.xp.sum(a, axis=0, out=out)

    def sum_to(self, x: Array, out: Array) -> None:
        """out, an array of float64 without axes, = Σ x (N,)."""
        out[...] = x.sum(dtype=self.xp.float64)

    # Columns of a matrix: the formulas are in columns.py ------------------------------------------------------------

    def moments(self, x: Array) -> tuple[Array, Array]:
        """(mean, variance) of each column of x, summed in float64; the variance is Σ (x - mean)² / rows."""
        return columns.moments(self.xp, x)

    def scale_shift(self, x: Array, scale: Array, shift: Array, out: Array) -> Array:
        """out = x · scale + shift, with a scale and a shift for each column. out may be x."""
        return columns.scale_shift(self.xp, x, scale, shift, out)

    def sum_products(self, a: Array, b: Array, center: Array, out: Array) -> Array:
        """out = Σ_rows a · (b - center), with a center for each column, summed in float64."""
        return columns.sum_products(self.xp, a, b, center, out)

    def combine(self, g: Array, a: Array, x: Array, b: Array, c: Array, out: Array) -> Array:
        """out = g · a + x · b + c, with an a, b and c for each column. out overlaps neither g nor x."""
        return columns.combine(self.xp, g, a, x, b, c, out)

    # Rows, and functions of every element ----------------------------------------------------------------------------

    def add_to_rows(self, a: Array, row: Array) -> Array:
        """a[i, j] += row[j]."""
        a += row
        return a

    def gather(self, a: Array, rows: Array, out: Array) -> Array:
        """out[i] = a[rows[i]], converted to out's dtype. `rows` are known to be in range: no device would check."""
        if a.dtype == out.dtype:
            return self.xp.take(a, rows, axis=0, out=out)
        out[...] = self.xp.take(a, rows, axis=0)
        return out

    def rescale(self, x: Array, scale: float, offset: float, out: Array) -> Array:
        """out = scale · x + offset, in out's dtype. x may hold integers."""
        out[...] = x
        out *= scale
        if offset:
            out += offset
        return out

    def relu(self, x: Array, out: Array) -> Array:
        """max(x, 0)."""
        return self.xp.maximum(x, 0.0, out=out)

    def relu_grad(self, grad: Array, y: Array, out: Array) -> Array:
        """grad where y ≠ 0, else 0: where y is NaN, the gradient must not vanish in silence."""
        return self.xp.multiply(grad, self.xp.not_equal(y, 0.0, out=out), out=out)

    def sigmoid(self, x: Array, out: Array | None = None) -> Array:
        """1 / (1 + e^-x) as e^min(x, 0) / (1 + e^-|x|), in which nothing overflows."""
        xp = self.xp
        denominator = xp.exp(-xp.abs(x))
        denominator += 1.0
        out = xp.exp(xp.minimum(x, 0.0), out=out)
        return xp.divide(out, denominator, out=out)

    def softplus(self, x: Array, out: Array | None = None) -> Array:
        """log(1 + e^x) as max(x, 0) + log(1 + e^-|x|)."""
        xp = self.xp
        tail = xp.log1p(xp.exp(-xp.abs(x)))
        return xp.add(xp.maximum(x, 0.0), tail, out=out)

    def softmax(self, x: Array, out: Array | None = None) -> Array:
        """e^x / Σ e^x over the last axis, shifted by the maximum so that no exponent is positive."""
        xp = self.xp
        out = xp.subtract(x, xp.max(x, axis=-1, keepdims=True), out=out)
        xp.exp(out, out=out)
        out /= xp.sum(out, axis=-1, keepdims=True)
        return out

    def log_softmax(self, x: Array, out: Array | None = None) -> Array:
        """x - log Σ e^x over the last axis, with the same shift."""
        xp = self.xp
        out = xp.subtract(x, xp.max(x, axis=-1, keepdims=True), out=out)
        out -= xp.log(xp.sum(xp.exp(out), axis=-1, keepdims=True))
        return out

    def cross_entropy(
        self, logits: Array, labels: Array, smoothing: float, losses: Array, grad: Array
    ) -> tuple[Array, Array]:
        """losses (N,) = -Σ_k t_k log p_k and grad (N, K) = p - t, with p = softmax(logits).

        t is 1 - smoothing for the label, and smoothing / K more for each of the K classes.
        """
        xp, rest = self.xp, smoothing / logits.shape[1]
        log_p = self.log_softmax(logits, out=grad)
        rows = xp.arange(len(labels))
        xp.multiply(log_p[rows, labels], smoothing - 1.0, out=losses)
        if smoothing:
            losses -= rest * xp.sum(log_p, axis=1)
        xp.exp(log_p, out=grad)
        grad[rows, labels] -= 1.0 - smoothing
        if smoothing:
            grad -= rest
        return losses, grad

    def count_hits(self, outputs: Array, labels: Array) -> Array:
        """[hits, N] of outputs (N, K): a hit has its largest number, of equals the first, where its label says.

        NaN counts as larger than all numbers.
        """
        sums = self.xp.empty(2, dtype=self.xp.int64)
        sums[0], sums[1] = self.xp.count_nonzero(outputs.argmax(axis=-1) == labels), len(outputs)
        return sums

    def normalize_rows(self, x: Array, epsilon: float, out: Array, sigma: Array) -> Array:
        """out = (x - μ) / σ with the mean μ and σ = √(variance + epsilon) of each row; sigma (rows, 1) = σ."""
        xp = self.xp
        xp.subtract(x, xp.mean(x, axis=-1, keepdims=True), out=out)
        sigma[...] = xp.mean(xp.square(out), axis=-1, keepdims=True)
        sigma += epsilon
        xp.sqrt(sigma, out=sigma)
        out /= sigma
        return out

    def normalize_rows_grad(self, grad: Array, normal: Array, sigma: Array, out: Array) -> Array:
        """The adjoint of `normalize_rows`: (g - mean(g) - x̂ · mean(g · x̂)) / σ by rows. out may be grad."""
        xp = self.xp
        products = grad * normal
        slope = xp.mean(products, axis=-1, keepdims=True)
        xp.subtract(grad, xp.mean(grad, axis=-1, keepdims=True), out=out)
        out -= xp.multiply(normal, slope, out=products)
        out /= sigma
        return out

    def erf(self, x: Array) -> Array:
        """The error function, to a few units in the last place of x's dtype.

        On a GPU, float32 numbers below the smallest normal one, 1.2e-38, are 0, as x and as result.
        """
        return special.erf(self.xp, x)

    def erfc(self, x: Array) -> Array:
        """1 - erf(x), without losing the digits of a small result; on a GPU, float32 results below 1.2e-38 are 0."""
        return special.erfc(self.xp, x)

    # Updates of the flat vectors: the formulas are in optimizers.py -------------------------------------------------

    def clip_norm(self, grads: Array, trained: list[slice], limit: float) -> None:
        """Scale these runs of the gradient by min(1, limit / their norm), without reading the norm back.

        On a GPU, float32 elements that become smaller than 1.2e-38 are 0.
        """
        xp = self.xp
        square = xp.zeros((), dtype=xp.float64)
        for run in trained:
            g = grads[run]
            largest = xp.max(xp.abs(g))
            largest = largest + (largest == 0)
            # Divided by the largest, since squares of 1e20 are beyond float32.
            square += xp.sum(xp.square(g / largest), dtype=xp.float64) * largest.astype(xp.float64) ** 2
        scale = xp.minimum(1.0, limit / xp.maximum(xp.sqrt(square), 1e-300))
        for run in trained:
            grads[run] *= scale.astype(grads.dtype)

    def fused_update(self, name: str, runs: list[slice], vectors: Sequence[Array], numbers: Sequence[float]) -> bool:
        """Update these runs of flat vectors by the formula of this name, if the device has fused it; else False."""
        return False

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
        """The same with the decay of the runs `decayed`, in one pass over all, if the device has such a thing.

        numbers: of each step, a function of it: what decay shrinks the weight by, what it adds of it to the gradient,
        then the optimiser's own.  gate: where it holds 0, nothing is updated.
        """
        return False

    # Windows over images (N, H, W, C): the formulas, with their shapes, are in sliding.py -----------------------------

    def lay_out_patches(self, room: Array) -> Array:
        """Room for patches, (N, rows, columns, kh, kw, channels), with its axes in the order that suits the device.

        As a matrix, a row a window, it is a view: C-contiguous, or transposed.
        """
        return room

    def patches(self, x: Array, windows: Windows, out: Array) -> Array:
        return sliding.patches(x, windows, out)

    def fold(self, patches: Array, windows: Windows, out: Array) -> Array:
        return sliding.fold(patches, windows, out)

    def max_pool(self, x: Array, windows: Windows, out: Array, choice: Array) -> Array:
        return sliding.max_pool(self.xp, x, windows, out, choice)

    def unpool_max(self, grad: Array, choice: Array, windows: Windows, out: Array) -> Array:
        return sliding.unpool_max(self.xp, grad, choice, windows, out)

    def sum_pool(self, x: Array, windows: Windows, out: Array) -> Array:
        return sliding.sum_pool(self.xp, x, windows, out)

    def unpool_sum(self, grad: Array, windows: Windows, out: Array) -> Array:
        return sliding.unpool_sum(grad, windows, out)

    def depthwise(self, x: Array, weight: Array, windows: Windows, out: Array) -> Array:
        return sliding.depthwise(x, weight, windows, out)

    def depthwise_input_grad(self, grad: Array, weight: Array, windows: Windows, out: Array) -> Array:
        return sliding.depthwise_input_grad(self.xp, grad, weight, windows, out)

    def depthwise_weight_grad(self, x: Array, grad: Array, windows: Windows, out: Array) -> Array:
        return sliding.depthwise_weight_grad(self.xp, x, grad, windows, out)

    # A batch in parts ------------------------------------------------------------------------------------------------

    @property
    def shards(self) -> int:
        """How many parts of a batch are worked on side by side, at most."""
        return 1

    def working(self, in_shards: bool = True) -> AbstractContextManager[Any]:
        """A context for the work of one model. On the CPU, compiled loops run inside it, where Numba is installed.

        `in_shards`: parts of a batch are worked on side by side, and the BLAS keeps to one thread.
        """
        return nullcontext()

    def in_chunks(self, count: int, bytes_each: int, work: Callable[[slice, int], None]) -> None:
        """work(rows, shard) for slices of range(count), in each shard one after the other.

        A slice has so many rows of `bytes_each` as `workspace_bytes` allows, and on the CPU as a core's cache holds.
        """
        rows = max(1, self.workspace_bytes // max(1, bytes_each))
        for start in range(0, count, rows):
            work(slice(start, min(start + rows, count)), 0)

    # Randomness inside a step ----------------------------------------------------------------------------------

    def random_bits(self, key: Sequence[int], rows: int, columns: int, first_row: int = 0) -> Array:
        """Uniform uint32 noise (rows, columns), a pure function of (key, row, column): the same on every device.

        `first_row` is the global number of row 0, so that shards of one batch see the noise of the whole.
        """
        by_row, word = self._noise_of_rows(key, rows, first_row)
        by_column = _mix(self.xp, self.xp.arange(columns, dtype=self.xp.uint32) ^ word)
        return _mix(self.xp, by_row[:, None] ^ by_column[None, :])

    def dropout_mask(self, key: Sequence[int], rate: float, out: Array, first_row: int = 0) -> Array:
        """out (rows, columns) = 0 with probability `rate`, where this noise is low, else 1 / (1 - rate)."""
        rows, columns = out.shape
        out[...] = self.random_bits(key, rows, columns, first_row) >= int(rate * 2**32)
        out *= 1.0 / (1.0 - rate)
        return out

    def _noise_of_rows(self, key: Sequence[int], rows: int, first_row: int) -> tuple[Array, int]:
        """(What each row contributes to the noise, the word that is hashed with the number of a column)."""
        xp = self.xp
        word = _host_key(key)
        row = xp.arange(first_row, first_row + rows, dtype=xp.uint64)
        # Both halves of the row number count: batches of more than 2**32 rows do not repeat.
        high = _mix(xp, (row >> 32).astype(xp.uint32) ^ word)
        return _mix(xp, high ^ (row & _MASK32).astype(xp.uint32)), _mix_int(word ^ 0x9E3779B9)


def _mix(xp: Any, h: Array) -> Array:
    """A bijection of 32 bits that flips each output bit with probability close to ½ (Wellons' lowbias32), in place."""
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    h ^= h >> 16
    return h


def _mix_int(h: int) -> int:
    """The same bijection on a Python int."""
    h ^= h >> 16
    h = h * 0x7FEB352D & _MASK32
    h ^= h >> 15
    h = h * 0x846CA68B & _MASK32
    return h ^ h >> 16


def step_word(key: Sequence[int], step: int) -> tuple[float]:
    """What the noise of this step is hashed from: a word of 32 bits, as a number."""
    return (float(_host_key((*key, step))),)


def _host_key(key: Sequence[int]) -> int:
    """Fold (seed, layer, step) into one 32-bit word, on the host; 64-bit parts keep both halves."""
    word = 0
    for part in key:
        word = _mix_int(word ^ (part & _MASK32))
        word = _mix_int(word ^ (part >> 32 & _MASK32) ^ 0x5BD1E995)
    return word
