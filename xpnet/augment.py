"""Augmentation: layers at the beginning of a model that distort images at random, in training only.

The random numbers are a hash of (seed, layer, step, image), so each step distorts the images differently, but in the
same way on every device.
"""

import math
from typing import Any

from xpnet.backends import Array
from xpnet.config import number, one_or_pair
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape

__all__ = ["Distortion", "ElasticDistortion", "RandomAffine"]

_LIMIT = 10**6  # of pixels, degrees and factors: beyond it nothing of an image is left, and float32 would overflow


class Distortion(Layer):
    """In training, each pixel of y is the value of x at a random position near it. In inference, y = x.

    (N, H, W) or (N, H, W, C) → the same shape in the model's dtype; integers are not scaled. A subclass defines
    `positions`. Values between pixels are interpolated; outside the image they are 0.
    """

    accepts_integers = True

    def build(self, input_shape: Shape) -> Shape:
        if len(input_shape) not in (2, 3):
            raise self.refuse("(N, height, width) or (N, height, width, channels)", input_shape)
        return input_shape

    def positions(self, rows: int) -> tuple[Array, Array]:
        """Return the positions in x of the pixels of y: vertical and horizontal, (rows, H, W) each, in pixels from 0.

        For pixel (i, j), the identity returns i and j.
        """
        raise NotImplementedError(f"{type(self).__name__} must define positions(rows).")

    def uniform(self, rows: int, *shape: int) -> Array:
        """Uniform noise (rows, *shape) between -1 and 1. All calls in one step return the same numbers."""
        noise = self.work.buffer("noise", (rows, *shape))
        noise[...] = self.random_bits(noise)
        noise *= 2.0**-31
        noise -= 1.0
        return noise

    def forward(self, x: Array) -> Array:
        """At the position (i+r, j+s), y = (1-r)(1-s) x[i, j] + (1-r)s x[i, j+1] + r(1-s) x[i+1, j] + rs x[i+1, j+1]."""
        xp, work = self.xp, self.work
        if not self.context.training:
            work.index = None
            return x.astype(self.context.dtype, copy=False)
        rows, (height, width) = len(x), self.input_shape[:2]
        plane, shape = (rows, height, width), (rows, height, width, math.prod(self.input_shape[2:]))
        vertical, horizontal = self.positions(rows)
        vertical = xp.clip(vertical, -1.0, float(height), out=work.buffer("vertical", plane))
        horizontal = xp.clip(horizontal, -1.0, float(width), out=work.buffer("horizontal", plane))

        # i and j, the pixel above and to the left, and the fractions r and s.
        above = xp.floor(vertical, out=work.buffer("above", plane))
        left = xp.floor(horizontal, out=work.buffer("left", plane))
        work.r = xp.subtract(vertical[..., None], above[..., None], out=work.buffer("r", shape))
        work.s = xp.subtract(horizontal[..., None], left[..., None], out=work.buffer("s", shape))

        # The index of pixel (i, j) among the pixels of all images, each padded with zeros.
        first = xp.arange(rows) * (height + 2) * (width + 2) + width + 3
        column = work.buffer("column", plane, xp.intp)
        column[...] = left
        work.index = work.buffer("index", plane, xp.intp)
        work.index[...] = above
        work.index *= width + 2
        work.index += column
        work.index += first[:, None, None]

        pixels = self._padded("pixels", rows)
        self._without_padding(pixels)[...] = x.reshape(shape)
        corners = [
            self.backend.gather(pixels[offset:], work.index, out=work.buffer(f"corner {offset}", shape))
            for offset in (0, 1, width + 2, width + 3)
        ]
        upper, lower = _interpolate(corners[0], corners[1], work.s), _interpolate(corners[2], corners[3], work.s)
        return _interpolate(upper, lower, work.r).reshape(x.shape)

    def backward(self, grad_y: Array) -> Array | None:
        """y is a weighted sum of four pixels of x: each of them gets ∂L/∂y times its weight in `forward`."""
        if not self.wants_input_grad:
            return None
        xp, work = self.xp, self.work
        if work.index is None:
            return grad_y
        pixels = self._padded("grad_pixels", len(grad_y))
        grad = grad_y.reshape(work.r.shape)
        lower = grad * work.r
        for half, offset in ((grad - lower, 0), (lower, self.input_shape[1] + 2)):
            right = half * work.s
            xp.add.at(pixels[offset:], work.index, half - right)
            xp.add.at(pixels[offset + 1 :], work.index, right)
        grad_x = work.buffer("grad_x", grad_y.shape)
        grad_x[...] = self._without_padding(pixels).reshape(grad_y.shape)
        return grad_x

    def _padded(self, name: str, rows: int) -> Array:
        """Zeros (pixels, channels) for so many images, each with a border of one pixel.

        There is one image more, since `forward` reads the neighbors of the last pixel too.
        """
        height, width = self.input_shape[:2]
        shape = ((rows + 1) * (height + 2) * (width + 2), math.prod(self.input_shape[2:]))
        pixels = self.work.buffer(name, shape)
        pixels[...] = 0.0
        return pixels

    def _without_padding(self, pixels: Array) -> Array:
        """The images without their borders: a view (N, H, W, C) of the array of `_padded`."""
        height, width = self.input_shape[:2]
        return pixels.reshape(-1, height + 2, width + 2, pixels.shape[1])[:-1, 1:-1, 1:-1]


def _interpolate(a: Array, b: Array, fraction: Array) -> Array:
    """a + fraction · (b - a), written into b. It is exactly a where the fraction is 0."""
    b -= a
    b *= fraction
    b += a
    return b


class RandomAffine(Distortion):
    """Shears, scales and rotates each image about its center, then shifts it, by random amounts.

    shift: the largest shift in either direction, in pixels and fractions of them; a number, or (vertical, horizontal).
    rotation: the largest rotation in either direction, in degrees.
    scale: the factor is log-uniform from 1 / (1 + scale) to 1 + scale. A number keeps the proportions; a pair
    (vertical, horizontal) draws two factors.
    shear: the largest angle by which vertical lines lean in either direction, in degrees.
    """

    def __init__(
        self, shift: Any = 0.0, rotation: float = 0.0, scale: Any = 0.0, shear: float = 0.0, *, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        self.shift = one_or_pair(number, self, "shift", shift, at_least=0, at_most=_LIMIT)
        self.rotation = number(self, "rotation", rotation, at_least=0, at_most=_LIMIT)
        self.scale = one_or_pair(number, self, "scale", scale, at_least=0, at_most=_LIMIT)
        self.shear = number(self, "shear", shear, at_least=0, below=90)

    def positions(self, rows: int) -> tuple[Array, Array]:
        """The inverse map: p - center - shift, rotated back, scaled back and sheared back, + center."""
        xp, work, dtype = self.xp, self.work, self.context.dtype
        height, width = self.input_shape[:2]
        center_v, center_h = (height - 1) / 2, (width - 1) / 2
        max_shift_v, max_shift_h = _pair(self.shift)
        max_scale_v, max_scale_h = _pair(self.scale)

        down, right, turn, taller, wider, lean = self.uniform(rows, 6).T.reshape(6, rows, 1, 1)
        taller = xp.exp(taller * math.log1p(max_scale_v))
        wider = taller if not isinstance(self.scale, tuple) else xp.exp(wider * math.log1p(max_scale_h))
        angle = turn * math.radians(self.rotation)
        cos, sin, lean = xp.cos(angle), xp.sin(angle), xp.tan(lean * math.radians(self.shear))

        v = xp.arange(height, dtype=dtype)[:, None] - center_v - down * max_shift_v
        h = xp.arange(width, dtype=dtype) - center_h - right * max_shift_h
        v_by_v, v_by_h = cos / taller, sin / taller
        h_by_v, h_by_h = lean * v_by_v - sin / wider, lean * v_by_h + cos / wider
        plane = (rows, height, width)
        return (
            xp.add(v_by_v * v + center_v, v_by_h * h, out=work.buffer("vertical", plane)),
            xp.add(h_by_v * v + center_h, h_by_h * h, out=work.buffer("horizontal", plane)),
        )


class ElasticDistortion(Distortion):
    """Displaces each pixel at random, and neighboring pixels by similar amounts.

    Random displacements between -1 and 1, vertical and horizontal, are smoothed by a Gaussian of standard deviation
    `sigma` pixels, whose weights sum to 1, and multiplied by `alpha`. The result has a standard deviation of about
    0.16 alpha / sigma pixels in each direction, and less near the edges, where part of the Gaussian is outside.

    Simard, Steinkraus and Platt 2003, "Best practices for convolutional neural networks applied to visual document
    analysis", use alpha=34 and sigma=4 for digits of 28 × 28 pixels.
    """

    def __init__(self, alpha: float, sigma: float, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.alpha = number(self, "alpha", alpha, at_least=0, at_most=_LIMIT)
        self.sigma = number(self, "sigma", sigma, above=0, at_most=_LIMIT)

    def positions(self, rows: int) -> tuple[Array, Array]:
        """(i, j) + alpha · (G noise G)_ij, with a Gaussian G along each axis."""
        xp, work, dtype = self.xp, self.work, self.context.dtype
        height, width = self.input_shape[:2]
        if not hasattr(work, "smoothing"):
            work.smoothing = [self.backend.asarray(_gaussian(n, self.sigma), dtype) for n in (height, width)]
        by_height, by_width = work.smoothing
        noise = self.uniform(rows, 2, height, width)
        # One product per image, so that rounding does not depend on the other images of the batch.
        field = self.backend.batched_matmul(noise, by_width, out=work.buffer("field", noise.shape))
        field = self.backend.batched_matmul(by_height, field, out=noise)
        field *= self.alpha
        plane = (rows, height, width)
        return (
            xp.add(field[:, 0], xp.arange(height, dtype=dtype)[:, None], out=work.buffer("vertical", plane)),
            xp.add(field[:, 1], xp.arange(width, dtype=dtype), out=work.buffer("horizontal", plane)),
        )


def _gaussian(n: int, sigma: float) -> list[list[float]]:
    """(n, n): the part of a Gaussian around pixel i that falls on pixel j."""
    below = [0.5 * math.erf((k - 0.5) / (sigma * math.sqrt(2))) for k in range(n + 1)]
    share = [below[k + 1] - below[k] for k in range(n)]
    return [[share[abs(i - j)] for j in range(n)] for i in range(n)]


def _pair(value: float | tuple[float, float]) -> tuple[float, float]:
    return value if isinstance(value, tuple) else (value, value)
