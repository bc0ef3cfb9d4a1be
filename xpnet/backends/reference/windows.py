"""Windows that slide over images, and the operators of convolution and pooling on them.

An image is (H, W, C), its windows form a grid (rows, columns), and each window has kh × kw cells. Every formula loops
over the cells: the pixels under one cell of all windows are a strided slice of the images. No pixel occurs twice in
such a slice, so adding to it needs no scatter with duplicate indices.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from xpnet.backends.arrays import Array
from xpnet.backends.base import Device

Pair = tuple[int, int]
_MANY_CELLS = 256


class Windows(NamedTuple):
    """The geometry of windows on images of one size. Pairs are (vertical, horizontal).

    Cell (a, b) of window (i, j) covers the pixel in row i · strides[0] + a · dilation[0] - before[0] and the analogous
    column, or padding if that is outside the image. `before` is the padding above and to the left.
    """

    image: Pair
    grid: Pair
    kernel: Pair
    strides: Pair = (1, 1)
    dilation: Pair = (1, 1)
    before: Pair = (0, 0)

    def cells(self) -> Iterator[tuple[int, int, tuple[slice, slice], tuple[slice, slice]]]:
        """(a, b, the windows whose cell (a, b) is on the image, the pixels under that cell), in row-major order."""
        for a in range(self.kernel[0]):
            window_rows, pixel_rows = self._on_image(0, a)
            for b in range(self.kernel[1]):
                window_columns, pixel_columns = self._on_image(1, b)
                yield a, b, (window_rows, window_columns), (pixel_rows, pixel_columns)

    def _on_image(self, axis: int, cell: int) -> tuple[slice, slice]:
        stride, offset = self.strides[axis], cell * self.dilation[axis] - self.before[axis]
        first = max(0, -(offset // stride))
        end = min(self.grid[axis], (self.image[axis] - 1 - offset) // stride + 1)
        if end <= first:
            return slice(0, 0), slice(0, 0)
        start = first * stride + offset
        return slice(first, end), slice(start, start + (end - first - 1) * stride + 1, stride)

    def cells_on_image(self, axis: int) -> list[int]:
        """How many cells of each window are on the image, along one axis."""
        counts = [0] * self.grid[axis]
        for cell in range(self.kernel[axis]):
            windows, _ = self._on_image(axis, cell)
            for i in range(windows.start, windows.stop):
                counts[i] += 1
        return counts

    @property
    def padded(self) -> bool:
        """Whether any cell of any window is outside the image."""
        return any(min(self.cells_on_image(axis)) < self.kernel[axis] for axis in (0, 1))


class WindowOperators(Device):
    def im2col_layout(self, memory: Array) -> Array:
        """A view of `memory`, an array for patches (N, rows, columns, kh, kw, C), in the order that suits the device.

        Reshaped to a matrix with a row for each window, it is a view: C-contiguous, or transposed.
        """
        return memory

    def im2col(self, x: Array, windows: Windows, out: Array) -> Array:
        """out[n, i, j, a, b, c] = the pixel of x (N, H, W, C) under cell (a, b) of window (i, j), or 0 for padding."""
        if windows.padded:
            out[...] = 0.0
        for a, b, (i, j), (h, w) in windows.cells():
            out[:, i, j, a, b] = x[:, h, w]
        return out

    def col2im(self, patches: Array, windows: Windows, out: Array) -> Array:
        """The adjoint of `im2col`: out[n, h, w, c] = the sum of the patch elements that belong to this pixel."""
        out[...] = 0.0
        for a, b, (i, j), (h, w) in windows.cells():
            out[:, h, w] += patches[:, i, j, a, b]
        return out

    def max_pool(self, x: Array, windows: Windows, out: Array, choice: Array) -> Array:
        """out[n, i, j, c] = the largest pixel of the window; choice = the number of its cell, in row-major order.

        Of equal pixels the first is chosen. NaN counts as larger than any number. Every window must have a cell on the
        image.
        """
        out[...] = -math.inf
        for a, b, (i, j), (h, w) in reversed(list(windows.cells())):  # the first of equals wins
            pixels, largest = x[:, h, w], out[:, i, j]
            wins = (pixels >= largest) | (pixels != pixels)
            self.xp.copyto(largest, pixels, where=wins)
            self.xp.copyto(choice[:, i, j], a * windows.kernel[1] + b, where=wins)
        return out

    def max_pool_grad(self, grad: Array, choice: Array, windows: Windows, out: Array) -> Array:
        """The gradient of `max_pool` with respect to x: that of each window is added to the pixel that it chose."""
        out[...] = 0.0
        zero = self.xp.zeros((), dtype=grad.dtype)
        for a, b, (i, j), (h, w) in windows.cells():
            chosen = choice[:, i, j] == a * windows.kernel[1] + b
            out[:, h, w] += self.xp.where(chosen, grad[:, i, j], zero)
        return out

    def sum_pool(self, x: Array, windows: Windows, out: Array) -> Array:
        """out[n, i, j, c] = the sum of the window's pixels; sums of large windows are in float64."""
        xp, many = self.xp, math.prod(windows.kernel) > _MANY_CELLS
        total = xp.zeros(out.shape, dtype=xp.float64) if many else out
        total[...] = 0.0
        for _, _, (i, j), (h, w) in windows.cells():
            total[:, i, j] += x[:, h, w]
        if many:
            out[...] = total
        return out

    def sum_pool_grad(self, grad: Array, windows: Windows, out: Array) -> Array:
        """The adjoint of `sum_pool`: the gradient of each window is added to all its pixels."""
        out[...] = 0.0
        for _, _, (i, j), (h, w) in windows.cells():
            out[:, h, w] += grad[:, i, j]
        return out

    def depthwise(self, x: Array, weight: Array, windows: Windows, out: Array) -> Array:
        """out[n, i, j, c, m] = Σ_ab weight[a, b, c, m] · channel c of the pixel under cell (a, b) of window (i, j)."""
        out[...] = 0.0
        for a, b, (i, j), (h, w) in windows.cells():
            out[:, i, j] += x[:, h, w, :, None] * weight[a, b]
        return out

    def depthwise_input_grad(self, grad: Array, weight: Array, windows: Windows, out: Array) -> Array:
        """The adjoint of `depthwise` in x."""
        out[...] = 0.0
        for a, b, (i, j), (h, w) in windows.cells():
            out[:, h, w] += self.xp.sum(grad[:, i, j] * weight[a, b], axis=-1)
        return out

    def depthwise_weight_grad(self, x: Array, grad: Array, windows: Windows, out: Array) -> Array:
        """The adjoint of `depthwise` in the weight."""
        for a, b, (i, j), (h, w) in windows.cells():
            out[a, b] = self.xp.sum(x[:, h, w, :, None] * grad[:, i, j], axis=(0, 1, 2))
        return out
