"""The operators of a GPU: kernels of kernels.cu, or the reference formulas for arrays that these do not accept."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy

from xpnet.backends.arrays import Array
from xpnet.backends.cuda.attention import CUDAAttention
from xpnet.backends.cuda.convolutions import CUDAConvolutions
from xpnet.backends.cuda.cublas import HalfMatrix
from xpnet.backends.cuda.graphs import NO_STEP, STEP_THREADS
from xpnet.backends.cuda.kernels import BLOCK, REALS, axes, signatures
from xpnet.backends.cuda.launching import MOST_BLOCKS, VECTOR, by_kernel, fused, power_of_two
from xpnet.backends.cuda.recurrent import CUDARecurrent
from xpnet.backends.reference import Backend
from xpnet.backends.reference.fused import MOST_OPERATIONS, OPERATIONS
from xpnet.backends.reference.updates import Numbers, Runs
from xpnet.backends.reference.windows import Windows

_INT64 = numpy.dtype("int64")
_LANES = 32  # of a warp
_MANY = 2**31  # elements: the kernels of windows count in 32 bits
_MOST_CLASSES, _MOST_DEPTH, _MOST_INPUTS = 16, 2**11, 2**20  # of `dense_cross_entropy`; for more, products are faster
_SINGLE_BLOCK = 2**13  # logits of `cross_entropy_sums`; for more, several blocks work, and another kernel adds losses

fused_windows = functools.partial(fused, below=_MANY)


class CUDAOperators(CUDAAttention, CUDAConvolutions, CUDARecurrent):
    """A backend on CuPy, with kernels."""

    def __init__(self, name: str, xp: Any) -> None:
        super().__init__(name, xp)
        self._parameter_masks: dict[tuple[Any, ...], Array] = {}

    # Elements --------------------------------------------------------------------------------------------------------

    relu = by_kernel(Backend.relu, each=VECTOR)
    relu_grad = by_kernel(Backend.relu_grad, each=VECTOR)
    sigmoid = by_kernel(Backend.sigmoid)
    softplus = by_kernel(Backend.softplus)
    gelu = by_kernel(Backend.gelu, each=VECTOR)
    scale_shift = by_kernel(Backend.scale_shift, each=VECTOR)
    combine = by_kernel(Backend.combine, each=VECTOR)

    @fused
    def add_to_rows(self, a: Array, row: Array) -> Array:
        return self.launch("add_to_rows", a, each=VECTOR, row=row)

    def rescale(self, x: Array, scale: float, offset: float, out: Array) -> Array:
        if x.dtype == numpy.uint8 and x.flags.c_contiguous and self.accepts(out):
            return self.launch("rescale_bytes", out, x=x, scale=scale, offset=offset)
        if self.accepts(x, out):
            return self.launch("rescale", out, x=x, scale=scale, offset=offset)
        return super().rescale(x, scale, offset, out)

    def gather(self, a: Array, rows: Array, out: Array) -> Array:
        contiguous = a.flags.c_contiguous and rows.flags.c_contiguous and out.flags.c_contiguous
        if contiguous and rows.dtype == _INT64 and rows.ndim == 1 and out.size and not self.kernels_unavailable:
            size = out.size // len(rows)
            if a.dtype == out.dtype and a.itemsize in (1, 4, 8):
                return self.launch("gather", out, a=a, rows=rows, size=size, item_bytes=a.itemsize)
            if a.dtype == numpy.uint8 and out.dtype in REALS:
                return self.launch("gather_bytes", out, a=a, rows=rows, size=size)
        return super().gather(a, rows, out)

    @fused
    def add_rows_at(self, grad_rows: Array, rows: Array, out: Array) -> Array:
        vocabulary, features = out.shape
        width = self.width_of(features, grad_rows, out)
        by_position = vocabulary > len(rows)
        if by_position:
            out[...] = 0.0
        blocks = min(vocabulary, len(rows)), -(-features // (_LANES * width))
        sizes = {"count": len(rows), "columns": features, "width": width, "by_position": int(by_position)}
        arguments = {"grad_rows": grad_rows, "rows": rows, "out": out, **sizes}
        self.kernels.launch("add_rows_at", out.dtype, blocks, (BLOCK,), arguments)
        return out

    @fused
    def rotate_pairs(self, x: Array, cosines: Array, sines: Array, out: Array) -> Array:
        steps, heads, half = x.shape[1], x.shape[2], cosines.shape[1]
        arguments = {"cosines": cosines, "sines": sines, "n": x.size // 2, "steps": steps, "heads": heads, "half": half}
        return self.launch("rotate_pairs", out, x=x, **arguments)

    # Rows ------------------------------------------------------------------------------------------------------------

    softmax = by_kernel(Backend.softmax, rowwise=True)
    log_softmax = by_kernel(Backend.log_softmax, rowwise=True)
    normalize_rows = by_kernel(Backend.normalize_rows, rowwise=True)
    normalize_rows_grad = by_kernel(Backend.normalize_rows_grad, rowwise=True)
    scale_rows = by_kernel(Backend.scale_rows, rowwise=True)
    scale_rows_grad = by_kernel(Backend.scale_rows_grad, rowwise=True)

    @fused
    def normalize_and_scale(
        self, x: Array, centered: bool, epsilon: float, gamma: Array | None, beta: Array | None, normal: Array,
        sigma: Array, out: Array,
    ) -> Array:  # fmt: skip
        arrays = {"x": x, "gamma": gamma, "beta": beta, "normal": normal, "out": out}
        return self._launch_rows_of_warps("normalize_and_scale", centered, sigma, epsilon=epsilon, **arrays)

    @fused
    def normalize_and_scale_grad(
        self, grad: Array, centered: bool, gamma: Array | None, normal: Array, sigma: Array, grad_gamma: Array | None,
        grad_beta: Array | None, out: Array,
    ) -> Array:  # fmt: skip
        if grad_gamma is not None and grad_beta is not None:
            self._sum_rows_and_products(grad, normal, None, grad_beta, grad_gamma)
        elif grad_gamma is not None:
            self._sum_products(grad, normal, None, grad_gamma)
        elif grad_beta is not None:
            self.sum_rows(grad, grad_beta)
        arrays = {"grad": grad, "gamma": gamma, "normal": normal, "out": out}
        return self._launch_rows_of_warps("normalize_and_scale_grad", centered, sigma, **arrays)

    def _launch_rows_of_warps(self, name: str, centered: bool, sigma: Array, **given: Any) -> Array:
        """Launch a kernel with a warp for each row. given: out, arrays with its shape or that of a row, numbers."""
        out = given["out"]
        rows, columns = out.shape
        width = self.width_of(columns, *[a for a in given.values() if isinstance(a, self.xp.ndarray)])
        blocks = min(-(-rows * _LANES // BLOCK), 2**16)
        sizes = {"rows": rows, "columns": columns, "width": width, "centered": int(centered)}
        return self.launch(name, out, blocks=blocks, sigma=sigma, **sizes, **given)

    @fused
    def cross_entropy(
        self, logits: Array, labels: Array, smoothing: float, losses: Array, grad: Array
    ) -> tuple[Array, Array]:
        targets = {"labels": labels, "confidence": 1.0 - smoothing, "share": smoothing / logits.shape[1]}
        self.launch_rows("cross_entropy", grad, logits=logits, **targets, losses=losses, grad=grad)
        return losses, grad

    @fused
    def count_correct(self, outputs: Array, labels: Array) -> Array:
        correct = self.xp.zeros(2, dtype=_INT64)
        self.launch("count_correct", outputs, outputs=outputs, labels=labels, n=len(outputs), correct=correct)
        return correct

    # Reductions ------------------------------------------------------------------------------------------------------

    @fused
    def sum_rows(self, a: Any, out: Array) -> Array:
        """In a captured step, a may be of the class HalfMatrix."""
        if isinstance(a, HalfMatrix):
            half = {"a": a.bits, "bfloat16": a.precision == "bfloat16"}
            self.launch_column_sums("sum_rows_in_16_bits", a.bits, real=out.dtype, **half, out=out)
        else:
            self.launch_column_sums("sum_rows", a, a=a, out=out)
        return out

    @fused
    def sum_products(self, a: Array, b: Array, center: Array, out: Array) -> Array:
        return self._sum_products(a, b, center, out)

    def _sum_products(self, a: Array, b: Array, center: Array | None, out: Array) -> Array:
        self.launch_column_sums("sum_products", a, a=a, b=b, center=center, out=out)
        return out

    @fused
    def moments(self, x: Array) -> tuple[Array, Array]:
        mean, variance = (self.xp.empty(x.shape[1], dtype=x.dtype) for _ in range(2))
        self.launch_column_sums("moments", x, per_column=2, x=x, mean=mean, variance=variance)
        return mean, variance

    def sum_to(self, x: Array, out: Array) -> None:
        if self.accepts(x):
            self.launch("sum_to", x, blocks=1, x=x, out=out)
        else:
            super().sum_to(x, out)

    # Fused operators -------------------------------------------------------------------------------------------------

    add_to_rows_relu = by_kernel(Backend.add_to_rows_relu, each=VECTOR)
    add_arrays = by_kernel(Backend.add_arrays, each=VECTOR)
    multiply_arrays = by_kernel(Backend.multiply_arrays, each=VECTOR)

    def elementwise(self, operations: Sequence[Sequence[Any]], outs: Sequence[Array]) -> None:
        arrays = [a for operation in operations for a in operation if isinstance(a, self.xp.ndarray)]
        if not self.accepts(*arrays, *outs):
            super().elementwise(operations, outs)
            return
        fields = [_operation(out, *operation) for operation, out in zip(operations, outs, strict=True)]
        fields += [[0] * len(fields[0])] * (MOST_OPERATIONS - len(fields))
        largest = max(outs, key=lambda out: int(out.size))
        self.launch("elementwise", largest, operations=fields, count=len(outs))

    @fused
    def relu_grad_sum_rows(self, grad: Any, y: Any, out: Any, sums: Array) -> Any:
        """In a captured step, grad, y and out may be of the class HalfMatrix."""
        if isinstance(out, HalfMatrix):
            halves = {"grad": grad.bits, "y": y.bits, "out": out.bits, "bfloat16": out.precision == "bfloat16"}
            self.launch_column_sums("relu_grad_sum_rows_in_16_bits", out.bits, real=sums.dtype, **halves, sums=sums)
        else:
            self.launch_column_sums("relu_grad_sum_rows", out, grad=grad, y=y, out=out, sums=sums)
        return out

    scale_shift_relu = by_kernel(Backend.scale_shift_relu, each=VECTOR)

    @fused
    def sum_rows_and_products(self, a: Array, b: Array, center: Array, sums: Array, products: Array) -> None:
        self._sum_rows_and_products(a, b, center, sums, products)

    def _sum_rows_and_products(self, a: Array, b: Array, center: Array | None, sums: Array, products: Array) -> None:
        arrays = {"a": a, "b": b, "center": center, "sums": sums, "products": products}
        self.launch_column_sums("sum_rows_and_products", a, per_column=2, **arrays)

    @fused
    def cross_entropy_sums(
        self, logits: Array, labels: Array, smoothing: float, scale: float, losses: Array, grad: Array, loss_sum: Array,
        correct: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        rows, columns = logits.shape
        lanes, blocks = min(BLOCK, power_of_two(columns)), 1
        group = lanes
        if logits.size <= _SINGLE_BLOCK:
            group = min(lanes, max(1, lanes // 8, BLOCK // power_of_two(rows)))
        else:
            blocks = min(-(-rows * group // BLOCK), MOST_BLOCKS)
        targets = {"labels": labels, "confidence": 1.0 - smoothing, "share": smoothing / columns}
        results = {"losses": losses, "grad": grad, "loss_sum": loss_sum, "correct": correct}
        sizes = {"rows": rows, "group": group, "lanes": lanes}
        arguments = {"logits": logits, **targets, **sizes, "scale": scale, **results}
        self.launch("cross_entropy_sums", grad, blocks=blocks, **arguments)
        if blocks > 1:
            self.sum_to(losses, loss_sum)
        return losses, grad

    @fused
    def dense_cross_entropy(
        self, h: Array, weight: Array, row: Array | None, labels: Array, smoothing: float, scale: float, losses: Array,
        grad: Array, correct: Array | None, grad_h: Array | None, masked: bool,
    ) -> tuple[Array, Array]:  # fmt: skip
        (rows, depth), classes = h.shape, weight.shape[1]
        arrays = {"h": h, "weight": weight, "row": row, "labels": labels}
        results = {"losses": losses, "grad": grad, "correct": correct, "grad_h": grad_h, "masked": masked}
        if not self.fits_dense_cross_entropy(rows, depth, classes):
            return super().dense_cross_entropy(**arrays, smoothing=smoothing, scale=scale, **results)
        warps = min(8, power_of_two(-(-depth // 128)))
        targets = {"confidence": 1.0 - smoothing, "share": smoothing / classes, "scale": scale}
        sizes = {"rows": rows, "depth": depth, "classes": classes, "warps": warps}
        blocks = -(-rows * warps // 8)
        self.launch("dense_cross_entropy", grad, blocks=blocks, **arrays, **targets, **results, **sizes)
        return losses, grad

    def fits_dense_cross_entropy(self, rows: int, depth: int, classes: int) -> bool:
        """Whether `dense_cross_entropy` is one kernel for these sizes. It computes in float32, in any precision."""
        return classes <= _MOST_CLASSES and depth <= _MOST_DEPTH and rows * depth <= _MOST_INPUTS

    # Windows ---------------------------------------------------------------------------------------------------------

    def im2col(self, x: Array, windows: Windows, out: Array) -> Array:
        pixel = _pixel_stride(x)
        if pixel is None or x.dtype != out.dtype or out.size >= _MANY or not self.accepts(out):
            return super().im2col(x, windows, out)
        width = self.width_of(math.gcd(x.shape[3], pixel), x, out)
        images = {"images": _address(x), "distance": pixel, "windows": windows}
        if width == 1 and self.width_of(out.size, out) == VECTOR:
            return self.launch("im2col_of_few", out, n=out.size // VECTOR, axes=axes(*out.shape[1:]), **images)
        return self._launch_windows("im2col", out, out.shape, width, **images)

    def col2im(self, patches: Array, windows: Windows, out: Array) -> Array:
        pixel = _pixel_stride(out)
        if pixel is None or patches.dtype != out.dtype or patches.size >= _MANY or not self.accepts(patches):
            return super().col2im(patches, windows, out)
        width = self.width_of(math.gcd(out.shape[3], pixel), patches, out)
        images = {"images": _address(out), "distance": pixel}
        return self._launch_windows("col2im", out, out.shape, width, patches=patches, **images, windows=windows)

    @fused_windows
    def max_pool(self, x: Array, windows: Windows, out: Array, choice: Array) -> Array:
        return self._max_pool(x, None, windows, False, out, choice)

    @fused_windows
    def add_to_rows_max_pool(
        self, x: Array, row: Array | None, windows: Windows, relu: bool, out: Array, choice: Array
    ) -> Array:
        return self._max_pool(x, row, windows, relu, out, choice)

    def _max_pool(self, x: Array, row: Array | None, windows: Windows, relu: bool, out: Array, choice: Array) -> Array:
        arrays = [a for a in (x, row, out, choice) if a is not None]
        width = self.width_of(x.shape[3], *arrays)
        arguments = {"x": x, "row": row, "relu": relu, "choice": choice, "choice_bytes": choice.itemsize}
        return self._launch_windows("max_pool", out, out.shape, width, **arguments, windows=windows)

    @fused_windows
    def max_pool_grad(self, grad: Array, choice: Array, windows: Windows, out: Array) -> Array:
        return self._max_pool_grad(grad, None, choice, windows, out)

    @fused_windows
    def relu_grad_max_pool_grad(self, grad: Array, y: Array, choice: Array, windows: Windows, out: Array) -> Array:
        return self._max_pool_grad(grad, y, choice, windows, out)

    def _max_pool_grad(self, grad: Array, y: Array | None, choice: Array, windows: Windows, out: Array) -> Array:
        images, height, breadth, channels = out.shape
        width = self.width_of(channels, *[a for a in (grad, y, choice, out) if a is not None])
        arguments = {"grad": grad, "y": y, "choice": choice, "choice_bytes": choice.itemsize, "windows": windows}
        if windows.strides == windows.kernel and windows.dilation == (1, 1) and windows.before == (0, 0):
            shape = (images, -(-height // windows.kernel[0]), -(-breadth // windows.kernel[1]), channels)
            return self._launch_windows("adjacent_max_pool_grad", out, shape, width, **arguments)
        return self._launch_windows("max_pool_grad", out, out.shape, width, **arguments)

    @fused_windows
    def sum_pool(self, x: Array, windows: Windows, out: Array) -> Array:
        width = self.width_of(x.shape[3], x, out)
        return self._launch_windows("sum_pool", out, out.shape, width, x=x, windows=windows)

    @fused_windows
    def sum_pool_grad(self, grad: Array, windows: Windows, out: Array) -> Array:
        width = self.width_of(out.shape[3], grad, out)
        return self._launch_windows("sum_pool_grad", out, out.shape, width, grad=grad, windows=windows)

    def _launch_windows(self, name: str, out: Array, shape: tuple[int, ...], width: int, **given: Any) -> Array:
        """Launch a kernel whose threads stride over an array of this shape, by vectors of `width` channels."""
        sizes = axes(*shape[1:-1], shape[-1] // width)
        return self.launch(name, out, n=math.prod(shape) // width, axes=sizes, width=width, **given)

    # Random numbers --------------------------------------------------------------------------------------------------

    def random_bits(self, key: Sequence[int], rows: int, columns: int, first_row: int = 0) -> Array:
        if self.kernels_unavailable or not rows * columns:
            return super().random_bits(key, rows, columns, first_row)
        out = self.xp.empty((rows, columns), dtype=numpy.uint32)
        return self.launch("random_bits", out, word=self.step_word(key), first_row=first_row)

    @fused
    def dropout_mask(self, key: Sequence[int], rate: float, out: Array, first_row: int = 0) -> Array:
        threshold, kept = int(rate * 2**32), 1.0 / (1.0 - rate)
        word = self.step_word(key)
        return self.launch("dropout_mask", out, word=word, first_row=first_row, threshold=threshold, kept=kept)

    # Updates ---------------------------------------------------------------------------------------------------------

    @fused
    def clip_norm(self, grads: Array, trained: Runs, limit: float) -> None:
        mask = self._parameter_mask(grads.size, trained, [])
        blocks = min(-(-grads.size // (4 * BLOCK)), BLOCK)
        parts, scale = (self.xp.empty(shape, dtype=numpy.float64) for shape in ((blocks, 2), ()))
        self.launch("square_parts", grads, blocks=blocks, g=grads, mask=mask, parts=parts)
        self.launch("clip_scale", grads, blocks=1, parts=parts, count=blocks, limit=limit, scale=scale)
        self.launch("scale_trained", grads, g=grads, mask=mask, scale=scale)

    def whole_update(
        self, name: str, trained: Runs, decayed: Runs, vectors: list[Array], numbers: Numbers, step: int, gate: Array,
        copy: HalfMatrix | None = None, last: bool = True,
    ) -> bool:  # fmt: skip
        if not self.accepts(*vectors):
            return False
        n, mask = vectors[0].size, None
        if len(trained) == 1 and trained[0].start == 0 and not decayed:
            n = trained[0].stop
        else:
            mask = self._parameter_mask(n, trained, decayed)
        given = {argument.name: vector for argument, vector in zip(signatures()[name], vectors, strict=False)}
        given |= {"mask": mask, "numbers": self.step_numbers(numbers, step), "gate": gate}
        given |= {} if copy is None else copy.as_copy
        cells = self.thread.cells
        updating, more, fields = min(-(-n // (VECTOR * STEP_THREADS)), MOST_BLOCKS), 0, NO_STEP
        if last and cells is not None and cells.ends_with_update:
            more, fields = cells.gathering_blocks, cells.fields()
        grid = {"blocks": updating + more, "threads": STEP_THREADS}
        self.launch(name, vectors[0], **grid, n=n, updating=updating, step=fields, **given)
        return True

    def _parameter_mask(self, size: int, trained: Runs, decayed: Runs) -> Array:
        """For each element of the flat vectors: 0 for frozen, 1 for trained, 2 for trained with weight decay."""
        runs = tuple(tuple((run.start, run.stop) for run in runs) for runs in (trained, decayed))
        key = (size, *runs)
        if key not in self._parameter_masks:
            mask = numpy.zeros(size, dtype=numpy.uint8)
            for value, slices in enumerate(runs, 1):
                for start, stop in slices:
                    mask[start:stop] = value
            with self.lasting_memory():
                self._parameter_masks[key] = self.asarray(mask)
        return self._parameter_masks[key]


def _operation(out: Array, name: str, a: Any, b: Any = 0.0) -> list[int]:
    """The fields of a struct Operation of kernels.cu."""
    numbers = [operand if isinstance(operand, int | float) else None for operand in (a, b)]
    arrays = [operand if number is None else None for operand, number in zip((a, b), numbers, strict=True)]
    addresses = [0 if array is None else array.data.ptr for array in arrays]
    steps = [int(array is not None and array.size == out.size) for array in arrays]
    bits = numpy.array([number or 0.0 for number in numbers], dtype=numpy.float64).view(numpy.int64).tolist()
    return [OPERATIONS.index(name), out.size, *addresses, out.data.ptr, *steps, *bits]


def _pixel_stride(images: Array) -> int | None:
    """The elements from a pixel to the next, if (N, H, W, C) are some channels of contiguous images; else None.

    Also None if there are more elements than a kernel can count, or none.
    """
    count, height, width, channels = images.shape
    per_image, per_row, per_pixel, per_channel = (stride // images.itemsize for stride in images.strides)
    regular = (
        (per_channel == 1 or channels == 1)
        and (per_row == width * per_pixel or height == 1)
        and (per_image == height * width * per_pixel or len(images) == 1)
        and per_pixel >= channels
    )
    return per_pixel if regular and 0 < count * height * width * per_pixel < _MANY else None


def _address(a: Array) -> Any:
    """The address of an array, for a kernel that gets its strides as numbers."""
    return numpy.uint64(a.data.ptr)
