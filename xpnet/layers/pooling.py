"""Pooling, padding and upsampling: layers without parameters that change the size of images (N, H, W, C)."""

import math
from collections.abc import Sequence
from typing import Any

from xpnet.backends import Array
from xpnet.backends.reference.windows import Windows
from xpnet.config import choice, flag, integer, one_or_pair
from xpnet.errors import ArgumentError, shown
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape
from xpnet.layers.windows import Padding, Size, image_and_channels, padding_argument, pair, windows_on_image


class _Pooling(Layer):
    """The arguments that MaxPool2D and AvgPool2D share. By default the windows are adjacent."""

    splits_batch = True
    windows: Windows

    def __init__(
        self, pool_size: Size = 2, strides: Size | None = None, padding: Padding = "valid", *, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        self.pool_size = one_or_pair(integer, self, "pool_size", pool_size)
        self.padding = padding_argument(self, padding)
        self.strides = None if strides is None else one_or_pair(integer, self, "strides", strides)
        # A window that covers nothing but padding would be empty.
        if not isinstance(self.padding, str) and any(pair(self.padding)[a] >= pair(self.pool_size)[a] for a in (0, 1)):
            kind = type(self).__name__
            raise ArgumentError(f"{kind}: padding must be below pool_size={shown(pool_size)}, not {shown(padding)}.")

    def build(self, input_shape: Shape) -> Shape:
        image, channels = image_and_channels(self, input_shape)
        self.windows = windows_on_image(self, image, self.pool_size, self.strides or self.pool_size, self.padding)
        return (*self.windows.grid, channels)


class MaxPool2D(_Pooling):
    """The largest pixel of each window: (N, H, W, C) → (N, rows, columns, C).

    pool_size, strides: an integer, or a pair (vertical, horizontal); strides default to pool_size.  padding: as in
    Conv2D; it is never selected. The output size is rounded down: pixels beyond the last window are ignored.
    """

    def forward(self, x: Array) -> Array:
        """(N, H, W, C) → (N, rows, columns, C): y = the largest pixel of the window."""
        work, backend = self.work, self.backend
        y = work.buffer("y", (len(x), *self.output_shape))
        cells = self.windows.kernel[0] * self.windows.kernel[1]
        work.choice = work.buffer("choice", y.shape, backend.xp.uint8 if cells <= 256 else backend.xp.int32)
        return backend.max_pool(x, self.windows, out=y, choice=work.choice)

    def backward(self, grad_y: Array) -> Array | None:
        """(N, rows, columns, C) → (N, H, W, C).

        ∂y/∂x = 1 for the largest pixel of the window, else 0. Of equal pixels, the first in row-major order counts.
        """
        if not self.wants_input_grad:
            return None
        work = self.work
        grad_x = work.buffer("grad_x", (len(grad_y), *self.input_shape))
        return self.backend.max_pool_grad(grad_y, work.choice, self.windows, out=grad_x)


class AvgPool2D(_Pooling):
    """The mean of each window: (N, H, W, C) → (N, rows, columns, C).

    The arguments are MaxPool2D's. The zeros of the padding count in the mean, as in PyTorch; with
    `count_include_pad=False` they do not.
    """

    def __init__(
        self,
        pool_size: Size = 2,
        strides: Size | None = None,
        padding: Padding = "valid",
        *,
        count_include_pad: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(pool_size, strides, padding, name=name)
        self.count_include_pad = flag(self, "count_include_pad", count_include_pad)

    def forward(self, x: Array) -> Array:
        """(N, H, W, C) → (N, rows, columns, C): y = (Σ pixels of the window) / their number."""
        work = self.work
        y = self.backend.sum_pool(x, self.windows, out=work.buffer("y", (len(x), *self.output_shape)))
        y *= self._inverse_counts()
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """(N, rows, columns, C) → (N, H, W, C): ∂y/∂x = 1 / number of pixels, for each pixel of the window."""
        if not self.wants_input_grad:
            return None
        work = self.work
        grad = self.xp.multiply(grad_y, self._inverse_counts(), out=work.buffer("grad", grad_y.shape))
        grad_x = work.buffer("grad_x", (len(grad_y), *self.input_shape))
        return self.backend.sum_pool_grad(grad, self.windows, out=grad_x)

    def _inverse_counts(self) -> Any:
        return inverse_counts(self, self.windows, self.count_include_pad)


def inverse_counts(layer: Layer, windows: Windows, count_include_pad: bool) -> Any:
    """1 / the number of pixels in each mean: a number, or an array (rows, columns, 1) if they differ."""
    if count_include_pad or not windows.padded:
        return 1.0 / math.prod(windows.kernel)
    kept: dict[Windows, Array] = vars(layer.work).setdefault("inverse_counts", {})
    if windows not in kept:
        vertical, horizontal = windows.cells_on_image(0), windows.cells_on_image(1)
        inverse = [[[1.0 / (rows * columns)] for columns in horizontal] for rows in vertical]
        kept[windows] = layer.backend.asarray(inverse, dtype=layer.context.dtype)
    return kept[windows]


class GlobalAveragePool2D(Layer):
    """The mean of each channel over the whole image: (N, H, W, C) → (N, C). Lin et al. 2013, "Network in network"."""

    def build(self, input_shape: Shape) -> Shape:
        (self.height, self.width), channels = image_and_channels(self, input_shape)
        return (channels,)

    def forward(self, x: Array) -> Array:
        """(N, H, W, C) → (N, C), summed in float64, since a large image has many pixels."""
        y = self.work.buffer("y", (len(x), x.shape[-1]))
        return self.xp.mean(x, axis=(1, 2), dtype=self.xp.float64, out=y)

    def backward(self, grad_y: Array) -> Array | None:
        """(N, C) → (N, H, W, C): ∂y/∂x = 1 / (H · W) for each pixel."""
        if not self.wants_input_grad:
            return None
        grad_x = self.work.buffer("grad_x", (len(grad_y), *self.input_shape))
        grad_x[...] = grad_y[:, None, None]
        grad_x *= 1.0 / (self.height * self.width)
        return grad_x


class GlobalMaxPool2D(Layer):
    """The largest pixel of each channel of the image: (N, H, W, C) → (N, C)."""

    def build(self, input_shape: Shape) -> Shape:
        _, channels = image_and_channels(self, input_shape)
        return (channels,)

    def forward(self, x: Array) -> Array:
        """(N, H, W, C) → (N, C): y = the largest pixel. NaN counts as larger than any number."""
        work, shape = self.work, (len(x), x.shape[-1])
        work.choice = work.buffer("choice", shape, "int64")
        pixels = x.reshape(len(x), -1, x.shape[-1])
        return self.backend.max_steps(pixels, None, out=work.buffer("y", shape), choice=work.choice)

    def backward(self, grad_y: Array) -> Array | None:
        """(N, C) → (N, H, W, C).

        ∂y/∂x = 1 for the largest pixel, else 0. Of equal pixels, the first in row-major order counts.
        """
        if not self.wants_input_grad:
            return None
        work, (height, width, channels) = self.work, self.input_shape
        grad_x = work.buffer("grad_x", (len(grad_y), height * width, channels))
        self.backend.max_steps_grad(grad_y, work.choice, out=grad_x)
        return grad_x.reshape(len(grad_y), *self.input_shape)


class ZeroPadding2D(Layer):
    """Adds rows and columns of zeros: (N, H, W, C) → (N, top + H + bottom, left + W + right, C).

    padding: the number of pixels on all sides, or (vertical, horizontal), or ((top, bottom), (left, right)).
    """

    def __init__(self, padding: Size | Sequence[Size] = 1, *, name: str | None = None) -> None:
        super().__init__(name=name)
        given = padding if isinstance(padding, tuple | list) and len(padding) == 2 else (padding, padding)
        vertical, horizontal = (pair(one_or_pair(integer, self, "padding", side, at_least=0)) for side in given)
        self.padding = vertical, horizontal

    def build(self, input_shape: Shape) -> Shape:
        (height, width), channels = image_and_channels(self, input_shape)
        (top, bottom), (left, right) = self.padding
        return (top + height + bottom, left + width + right, channels)

    def forward(self, x: Array) -> Array:
        """(N, H, W, C) → (N, top + H + bottom, left + W + right, C)."""
        y = self.work.buffer("y", (len(x), *self.output_shape))
        y.fill(0.0)
        self._inside(y)[...] = x
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """The transpose of forward: ∂L/∂x is ∂L/∂y without the padding."""
        if not self.wants_input_grad:
            return None
        grad_x = self.work.buffer("grad_x", (len(grad_y), *self.input_shape))
        grad_x[...] = self._inside(grad_y)
        return grad_x

    def _inside(self, y: Array) -> Array:
        """The part of y that is not padding, a view."""
        (height, width, _), ((top, _), (left, _)) = self.input_shape, self.padding
        return y[:, top : top + height, left : left + width]


class Upsample2D(Layer):
    """Enlarges images `size` times: (N, H, W, C) → (N, H · size, W · size, C).

    size: an integer, or a pair (vertical, horizontal).  interpolation: "nearest" repeats pixels; "bilinear" blends the
    nearest four pixels, whose values are those at their centers (PyTorch's align_corners=False).
    """

    def __init__(self, size: Size = 2, interpolation: str = "nearest", *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.size = one_or_pair(integer, self, "size", size)
        self.interpolation = choice(self, "interpolation", interpolation, ("nearest", "bilinear"))

    def build(self, input_shape: Shape) -> Shape:
        (height, width), channels = image_and_channels(self, input_shape)
        vertical, horizontal = pair(self.size)
        return (height * vertical, width * horizontal, channels)

    def forward(self, x: Array) -> Array:
        """(N, H, W, C) → (N, H · size, W · size, C). Bilinear, in each channel: y = R x Cᵀ.

        R (H · size, H) interpolates between the rows of x, and C (W · size, W) between its columns.
        """
        backend, work = self.backend, self.work
        y = work.buffer("y", (len(x), *self.output_shape))
        if self.interpolation == "nearest":
            self._copies(y)[...] = x[:, :, None, :, None]
            return y
        vertical, horizontal = self._interpolation_matrices()
        wide = work.buffer("wide", (*x.shape[:2], *self.output_shape[1:]))
        backend.batched_matmul(horizontal, x, out=wide)
        backend.batched_matmul(vertical, _flat_rows(wide), out=_flat_rows(y))
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """(N, H · size, W · size, C) → (N, H, W, C).

        Nearest: ∂L/∂x of a pixel = Σ ∂L/∂y over its copies.   Bilinear: ∂L/∂x = Rᵀ ∂L/∂y C.
        """
        if not self.wants_input_grad:
            return None
        backend, work = self.backend, self.work
        grad_x = work.buffer("grad_x", (len(grad_y), *self.input_shape))
        if self.interpolation == "nearest":
            return self.xp.sum(self._copies(grad_y), axis=(2, 4), out=grad_x)
        vertical, horizontal = self._interpolation_matrices()
        wide = work.buffer("wide", (*grad_x.shape[:2], *self.output_shape[1:]))
        backend.batched_matmul(vertical.T, _flat_rows(grad_y), out=_flat_rows(wide))
        return backend.batched_matmul(horizontal.T, wide, out=grad_x)

    def _copies(self, y: Array) -> Array:
        """y as (N, H, vertical, W, horizontal, C): the copies of each pixel."""
        height, width, channels = self.input_shape
        vertical, horizontal = pair(self.size)
        return y.reshape(len(y), height, vertical, width, horizontal, channels)

    def _interpolation_matrices(self) -> tuple[Array, Array]:
        """R (H · size, H) and C (W · size, W)."""
        work = self.work
        if not hasattr(work, "matrices"):
            dtype, sizes = self.context.dtype, zip(self.input_shape[:2], pair(self.size), strict=True)
            work.matrices = tuple(self.backend.asarray(_interpolation(n, times), dtype=dtype) for n, times in sizes)
        vertical, horizontal = work.matrices
        return vertical, horizontal


def _flat_rows(images: Array) -> Array:
    """(N, H, W, C) → (N, H, W · C)."""
    return images.reshape(*images.shape[:2], -1)


def _interpolation(size: int, times: int) -> list[list[float]]:
    """(size · times, size). Row i: the weights of the two pixels next to (i + ½) / times - ½, new pixel i's center."""
    rows = []
    for i in range(size * times):
        center = max((i + 0.5) / times - 0.5, 0.0)
        pixel, fraction = int(center), center % 1.0
        row = [0.0] * size
        row[pixel] += 1.0 - fraction
        row[min(pixel + 1, size - 1)] += fraction
        rows.append(row)
    return rows
