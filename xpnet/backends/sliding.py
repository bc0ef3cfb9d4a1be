"""Windows that slide over images, and the plain formulas of what convolution and pooling do with them.

An image is (H, W, C), its windows stand in a grid (rows, columns), and each has kh × kw cells. Every formula goes
through the cells: one cell of all windows at once is a strided slice of the images. No pixel occurs twice in such a
slice, so adding to it needs no scatter with duplicate indices. These are the references of a device's primitives.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from xpnet.backends.arrays import Array

Pair = tuple[int, int]
_MANY_CELLS = 256


class Windows(NamedTuple):
    """Where the windows stand on images of one size: pairs are (vertical, horizontal).

    Cell (a, b) of window (i, j) lies on pixel (i · strides[0] + a · dilation[0] - before[0], …), or off the image.
    """

    image: Pair
    grid: Pair
    kernel: Pair
    strides: Pair = (1, 1)
    dilation: Pair = (1, 1)
    before: Pair = (0, 0)

    def cells(self) -> Iterator[tuple[int, int, tuple[slice, slice], tuple[slice, slice]]]:
        """(a, b, the windows whose cell (a, b) lies on the image, the pixels on which it lies), in row-major order."""
        for a in range(self.kernel[0]):
            windows_down, pixels_down = self._on_image(0, a)
            for b in range(self.kernel[1]):
                windows_across, pixels_across = self._on_image(1, b)
                yield a, b, (windows_down, windows_across), (pixels_down, pixels_across)

    def _on_image(self, axis: int, cell: int) -> tuple[slice, slice]:
        stride, first_pixel = self.strides[axis], cell * self.dilation[axis] - self.before[axis]
        first = max(0, -(first_pixel // stride))
        end = min(self.grid[axis], (self.image[axis] - 1 - first_pixel) // stride + 1)
        if end <= first:
            return slice(0, 0), slice(0, 0)
        start = first * stride + first_pixel
        return slice(first, end), slice(start, start + (end - first - 1) * stride + 1, stride)

    def cells_on_image(self, axis: int) -> list[int]:
        """How many cells of each window of the grid lie on the image, along one axis."""
        counts = [0] * self.grid[axis]
        for cell in range(self.kernel[axis]):
            windows, _ = self._on_image(axis, cell)
            for i in range(windows.start, windows.stop):
                counts[i] += 1
        return counts

    @property
    def padded(self) -> bool:
        """Whether any cell of any window lies off the image."""
        return any(min(self.cells_on_image(axis)) < self.kernel[axis] for axis in (0, 1))


def patches(x: Array, windows: Windows, out: Array) -> Array:
    """out[n, i, j, a, b, c] = the pixel of x (N, H, W, C) under cell (a, b) of window (i, j), 0 off the image."""
    if windows.padded:
        out[...] = 0.0
    for a, b, (i, j), (h, w) in windows.cells():
        out[:, i, j, a, b] = x[:, h, w]
    return out


def fold(patches: Array, windows: Windows, out: Array) -> Array:
    """The adjoint of `patches`: out[n, h, w, c] = the sum of all elements of the patches that came from this pixel."""
    out[...] = 0.0
    for a, b, (i, j), (h, w) in windows.cells():
        out[:, h, w] += patches[:, i, j, a, b]
    return out


def max_pool(xp: Any, x: Array, windows: Windows, out: Array, choice: Array) -> Array:
    """out[n, i, j, c] = the largest pixel of the window; choice = the number of its cell, the first in row-major order.

    NaN counts as larger than all numbers. Every window must have a cell on the image.
    """
    out[...] = -math.inf
    for a, b, (i, j), (h, w) in reversed(list(windows.cells())):
        pixels, best = x[:, h, w], out[:, i, j]
        wins = (pixels >= best) | (pixels != pixels)  # from the last to the first: of equals, the first one stays
        xp.copyto(best, pixels, where=wins)
        xp.copyto(choice[:, i, j], a * windows.kernel[1] + b, where=wins)
    return out


def unpool_max(xp: Any, grad: Array, choice: Array, windows: Windows, out: Array) -> Array:
    """The adjoint of `max_pool`: each window's gradient goes to the pixel that it chose."""
    out[...] = 0.0
    zero = xp.zeros((), dtype=grad.dtype)
    for a, b, (i, j), (h, w) in windows.cells():
        chosen = choice[:, i, j] == a * windows.kernel[1] + b
        out[:, h, w] += xp.where(chosen, grad[:, i, j], zero)
    return out


def sum_pool(xp: Any, x: Array, windows: Windows, out: Array) -> Array:
    """out[n, i, j, c] = the sum of the pixels of the window; of a large one in float64."""
    total = xp.zeros(out.shape, dtype=xp.float64) if math.prod(windows.kernel) > _MANY_CELLS else out
    total[...] = 0.0
    for _, _, (i, j), (h, w) in windows.cells():
        total[:, i, j] += x[:, h, w]
    if total is not out:
        out[...] = total
    return out


def unpool_sum(grad: Array, windows: Windows, out: Array) -> Array:
    """The adjoint of `sum_pool`: each window's gradient goes to all its pixels."""
    out[...] = 0.0
    for _, _, (i, j), (h, w) in windows.cells():
        out[:, h, w] += grad[:, i, j]
    return out


def depthwise(x: Array, weight: Array, windows: Windows, out: Array) -> Array:
    """out[n, i, j, c, m] = Σ_ab pixel c under cell (a, b) · weight[a, b, c, m]."""
    out[...] = 0.0
    for a, b, (i, j), (h, w) in windows.cells():
        out[:, i, j] += x[:, h, w, :, None] * weight[a, b]
    return out


def depthwise_input_grad(xp: Any, grad: Array, weight: Array, windows: Windows, out: Array) -> Array:
    """The adjoint of `depthwise` in x."""
    out[...] = 0.0
    for a, b, (i, j), (h, w) in windows.cells():
        out[:, h, w] += xp.sum(grad[:, i, j] * weight[a, b], axis=-1)
    return out


def depthwise_weight_grad(xp: Any, x: Array, grad: Array, windows: Windows, out: Array) -> Array:
    """The adjoint of `depthwise` in the weight."""
    for a, b, (i, j), (h, w) in windows.cells():
        out[a, b] = xp.sum(x[:, h, w, :, None] * grad[:, i, j], axis=(0, 1, 2))
    return out
