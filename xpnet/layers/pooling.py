"""Layers that make images (N, H, W, C) smaller or larger, channel by channel, without parameters."""

from typing import Any

from xpnet.backends import Array
from xpnet.backends.sliding import Windows
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer, Shape
from xpnet.layers.grid import Padding, Size, checked_padding, checked_size, image_and_channels, pair, slide


class _Pooling(Layer):
    """What pooling layers share: windows that by default stand side by side. A last odd row or column is left out."""

    works_in_shards = True
    windows: Windows

    def __init__(self, pool_size: Size = 2, strides: Size | None = None, padding: Padding = "valid") -> None:
        self.pool_size, self.padding = checked_size(self, "pool_size", pool_size), checked_padding(self, padding)
        self.strides = None if strides is None else checked_size(self, "strides", strides)
        # A window that lies wholly in the padding would have nothing in it.
        if not isinstance(self.padding, str) and any(pair(self.padding)[a] >= pair(self.pool_size)[a] for a in (0, 1)):
            kind = type(self).__name__
            raise ArgumentError(f"{kind}: padding must be below pool_size={pool_size!r}, not {padding!r}.")

    def build(self, input_shape: Shape) -> Shape:
        image, channels = image_and_channels(self, input_shape)
        self.windows = slide(self, image, self.pool_size, self.strides or self.pool_size, self.padding)
        return (*self.windows.grid, channels)


class MaxPool2D(_Pooling):
    """The largest pixel of each window: (N, H, W, C) → (N, rows, columns, C).

    pool_size, strides: a number or (vertical, horizontal); strides default to pool_size.  padding: "valid", "same" or a
    number, as Conv2D's; what lies off the image never wins.
    """

    picks_largest = True

    def forward(self, x: Array) -> Array:
        work, backend = self.work, self.backend
        y = work.buffer("y", (len(x), *self.output_shape))
        cells = self.windows.kernel[0] * self.windows.kernel[1]
        work.choice = work.buffer("choice", y.shape, backend.xp.uint8 if cells <= 256 else backend.xp.int32)
        return backend.max_pool(x, self.windows, out=y, choice=work.choice)

    def backward(self, grad_y: Array) -> Array | None:
        """∂y/∂x = 1 for the largest pixel of the window, else 0; of equal ones, for the first in row-major order."""
        if not self.wants_input_grad:
            return None
        work = self.work
        grad_x = work.buffer("grad_x", (len(grad_y), *self.input_shape))
        return self.backend.unpool_max(grad_y, work.choice, self.windows, out=grad_x)


class AvgPool2D(_Pooling):
    """The mean of each window: (N, H, W, C) → (N, rows, columns, C).

    Arguments as MaxPool2D's. Zeros of the padding count in the mean, as in PyTorch; with `count_include_pad=False` it
    is the mean of the pixels on the image.
    """

    def __init__(
        self,
        pool_size: Size = 2,
        strides: Size | None = None,
        padding: Padding = "valid",
        count_include_pad: bool = True,
    ) -> None:
        super().__init__(pool_size, strides, padding)
        self.count_include_pad = count_include_pad

    def forward(self, x: Array) -> Array:
        work = self.work
        y = self.backend.sum_pool(x, self.windows, out=work.buffer("y", (len(x), *self.output_shape)))
        y *= self._share()
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """∂y/∂x = 1 / number of pixels in the mean, for each of them."""
        if not self.wants_input_grad:
            return None
        work = self.work
        grad = self.xp.multiply(grad_y, self._share(), out=work.buffer("shares", grad_y.shape))
        grad_x = work.buffer("grad_x", (len(grad_y), *self.input_shape))
        return self.backend.unpool_sum(grad, self.windows, out=grad_x)

    def _share(self) -> Any:
        """One over the number of pixels in each mean: a number, or (rows, columns, 1) where they differ."""
        windows, work = self.windows, self.work
        if self.count_include_pad or not windows.padded:
            return 1.0 / (windows.kernel[0] * windows.kernel[1])
        if not hasattr(work, "share"):
            down, across = windows.cells_on_image(0), windows.cells_on_image(1)
            shares = [[[1.0 / (rows * columns)] for columns in across] for rows in down]
            work.share = self.backend.asarray(shares, dtype=self.context.dtype)
        return work.share


class GlobalAveragePool2D(Layer):
    """The mean of each channel over the whole image: (N, H, W, C) → (N, C). Lin et al. 2013, "Network in network"."""

    def build(self, input_shape: Shape) -> Shape:
        (self.height, self.width), channels = image_and_channels(self, input_shape)
        return (channels,)

    def forward(self, x: Array) -> Array:
        # In float64, for a large image has many pixels.
        y = self.work.buffer("y", (len(x), x.shape[-1]))
        return self.xp.mean(x, axis=(1, 2), dtype=self.xp.float64, out=y)

    def backward(self, grad_y: Array) -> Array | None:
        """∂y/∂x = 1 / (H · W) for every pixel."""
        if not self.wants_input_grad:
            return None
        grad_x = self.work.buffer("grad_x", (len(grad_y), *self.input_shape))
        grad_x[...] = grad_y[:, None, None]
        grad_x *= 1.0 / (self.height * self.width)
        return grad_x


class Upsample2D(Layer):
    """Images `size` times as high and wide: (N, H, W, C) → (N, H · size, W · size, C).

    size: a whole number, or (vertical, horizontal).  interpolation: "nearest" repeats pixels; "bilinear" blends the
    nearest four, with pixels as small squares (PyTorch's align_corners=False).
    """

    def __init__(self, size: Size = 2, interpolation: str = "nearest") -> None:
        self.size, self.interpolation = checked_size(self, "size", size), interpolation
        if interpolation not in ("nearest", "bilinear"):
            raise ArgumentError(f'Upsample2D: interpolation must be "nearest" or "bilinear", not {interpolation!r}.')

    def build(self, input_shape: Shape) -> Shape:
        (height, width), channels = image_and_channels(self, input_shape)
        down, across = pair(self.size)
        return (height * down, width * across, channels)

    def forward(self, x: Array) -> Array:
        """Bilinear: y = D x Aᵀ in each channel. D says which rows of x blend into each row of y, A which columns."""
        backend, work = self.backend, self.work
        y = work.buffer("y", (len(x), *self.output_shape))
        if self.interpolation == "nearest":
            self._squares(y)[...] = x[:, :, None, :, None]
            return y
        down, across = self._blends()
        wide = work.buffer("wide", (*x.shape[:2], *self.output_shape[1:]))
        backend.matmul_each(across, x, out=wide)
        backend.matmul_each(down, _flat_rows(wide), out=_flat_rows(y))
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """Nearest: each pixel gathers what its copies were given. Bilinear: ∂L/∂x = Dᵀ ∂L/∂y A."""
        if not self.wants_input_grad:
            return None
        backend, work = self.backend, self.work
        grad_x = work.buffer("grad_x", (len(grad_y), *self.input_shape))
        if self.interpolation == "nearest":
            return self.xp.sum(self._squares(grad_y), axis=(2, 4), out=grad_x)
        down, across = self._blends()
        wide = work.buffer("wide", (*grad_x.shape[:2], *self.output_shape[1:]))
        backend.matmul_each(down.T, _flat_rows(grad_y), out=_flat_rows(wide))
        return backend.matmul_each(across.T, wide, out=grad_x)

    def _squares(self, y: Array) -> Array:
        """(N, H, down, W, across, C): each pixel's square of copies."""
        height, width, channels = self.input_shape
        down, across = pair(self.size)
        return y.reshape(len(y), height, down, width, across, channels)

    def _blends(self) -> tuple[Array, Array]:
        """D (H · down, H) and A (W · across, W)."""
        work = self.work
        if not hasattr(work, "blends"):
            dtype = self.context.dtype
            matrices = [_blend(n, times) for n, times in zip(self.input_shape[:2], pair(self.size), strict=True)]
            work.blends = tuple(self.backend.asarray(matrix, dtype=dtype) for matrix in matrices)
        down, across = work.blends
        return down, across


def _flat_rows(images: Array) -> Array:
    """(N, H, W, C) as (N, H, W · C)."""
    return images.reshape(*images.shape[:2], -1)


def _blend(size: int, times: int) -> list[list[float]]:
    """Row i: the weights of the two pixels around the place (i + ½) / times - ½, which the new pixel's centre is at."""
    rows = []
    for i in range(size * times):
        place = max((i + 0.5) / times - 0.5, 0.0)
        pixel, after = int(place), place % 1.0
        row = [0.0] * size
        row[pixel] += 1.0 - after
        row[min(pixel + 1, size - 1)] += after
        rows.append(row)
    return rows
