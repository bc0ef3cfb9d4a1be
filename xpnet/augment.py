"""Random distortions of images: layers for the head of a model, at work in training only.

Each training step sees the images anew, as they could have been drawn. The draw is a hash of (seed, layer, step,
image), the same on every device and for every shard of a batch.
"""

import math
from typing import Any

from xpnet.backends import Array
from xpnet.config import is_number
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer, Shape

__all__ = ["Distortion", "ElasticDistortion", "RandomAffine"]


_MOST = 1e6  # pixels, degrees, factors: beyond these no image is left, and float32 would overflow


class Distortion(Layer):
    """In training, each pixel of an output image is fetched from somewhere in its input; else y = x.

    (N, H, W) or (N, H, W, C) → the same shape in the model's dtype, integers unscaled. A subclass writes `positions`.
    What lies between pixels is interpolated, what lies outside is 0.
    """

    accepts_integers = True

    def build(self, input_shape: Shape) -> Shape:
        if len(input_shape) not in (2, 3):
            raise self.refuse("(N, height, width) or (N, height, width, channels)", f"(N, {str(input_shape)[1:]}")
        return input_shape

    def positions(self, rows: int) -> tuple[Array, Array]:
        """Where to fetch each pixel from: vertical and horizontal, (rows, H, W) each, counted in pixels from 0.

        Where pixel (i, j) has the position (i, j), it stays as it is.
        """
        raise NotImplementedError(f"{type(self).__name__} must define positions(rows).")

    def uniform(self, rows: int, *shape: int) -> Array:
        """Noise (rows, *shape) between -1 and 1, the same whenever it is asked for within one step."""
        noise = self.work.buffer("noise", (rows, *shape))
        noise[...] = self.random_bits(noise)
        noise *= 2.0**-31
        noise -= 1.0
        return noise

    def forward(self, x: Array) -> Array:
        """Bilinear: y = (1-r)(1-s) x[i, j] + (1-r)s x[i, j+1] + r(1-s) x[i+1, j] + rs x[i+1, j+1] at (i+r, j+s)."""
        xp, work = self.xp, self.work
        if not self.context.training:
            work.index = None
            return x.astype(self.context.dtype, copy=False)
        rows, (height, width) = len(x), self.input_shape[:2]
        plane, shape = (rows, height, width), (rows, height, width, math.prod(self.input_shape[2:]))
        vertical, horizontal = self.positions(rows)
        vertical = xp.clip(vertical, -1.0, float(height), out=work.buffer("vertical", plane))
        horizontal = xp.clip(horizontal, -1.0, float(width), out=work.buffer("horizontal", plane))

        # Split into the pixel above and to the left, and the fractions r and s of the way to the next.
        above = xp.floor(vertical, out=work.buffer("above", plane))
        left = xp.floor(horizontal, out=work.buffer("left", plane))
        work.r = xp.subtract(vertical[..., None], above[..., None], out=work.buffer("r", shape))
        work.s = xp.subtract(horizontal[..., None], left[..., None], out=work.buffer("s", shape))

        # The number of that pixel among those of all images, each in a border of zeros.
        first = xp.arange(rows) * (height + 2) * (width + 2) + width + 3
        column = work.buffer("column", plane, xp.intp)
        column[...] = left
        work.index = work.buffer("index", plane, xp.intp)
        work.index[...] = above
        work.index *= width + 2
        work.index += column
        work.index += first[:, None, None]

        pixels = self._bordered("pixels", rows)
        self._inside(pixels)[...] = x.reshape(shape)
        corners = [
            self.backend.gather(pixels[offset:], work.index, out=work.buffer(f"corner {offset}", shape))
            for offset in (0, 1, width + 2, width + 3)
        ]
        upper, lower = _mix(corners[0], corners[1], work.s), _mix(corners[2], corners[3], work.s)
        return _mix(upper, lower, work.r).reshape(x.shape)

    def backward(self, grad_y: Array) -> Array | None:
        """∂y/∂x: each pixel of y hands its gradient to the four that it was mixed from, in the same shares."""
        if not self.wants_input_grad:
            return None
        xp, work = self.xp, self.work
        if work.index is None:
            return grad_y
        pixels = self._bordered("grad_pixels", len(grad_y))
        grad = grad_y.reshape(work.r.shape)
        lower = grad * work.r
        for half, offset in ((grad - lower, 0), (lower, self.input_shape[1] + 2)):
            right = half * work.s
            xp.add.at(pixels[offset:], work.index, half - right)
            xp.add.at(pixels[offset + 1 :], work.index, right)
        grad_x = work.buffer("grad_x", grad_y.shape)
        grad_x[...] = self._inside(pixels).reshape(grad_y.shape)
        return grad_x

    def _bordered(self, name: str, rows: int) -> Array:
        """Zeros for so many images with a border of one pixel, (pixels, channels).

        There is an image more, so that the neighbours of the last border exist too.
        """
        height, width = self.input_shape[:2]
        shape = ((rows + 1) * (height + 2) * (width + 2), math.prod(self.input_shape[2:]))
        pixels = self.work.buffer(name, shape)
        pixels[...] = 0.0
        return pixels

    def _inside(self, pixels: Array) -> Array:
        """The images without their borders: a view (N, H, W, C) of `_bordered`."""
        height, width = self.input_shape[:2]
        return pixels.reshape(-1, height + 2, width + 2, pixels.shape[1])[:-1, 1:-1, 1:-1]


def _mix(a: Array, b: Array, share: Array) -> Array:
    """a + share (b - a), in b: exactly a where the share is 0."""
    b -= a
    b *= share
    b += a
    return b


class RandomAffine(Distortion):
    """Each image slanted, scaled and turned about its centre, then shifted: one affine map, drawn uniformly.

    shift: up to so many pixels either way, fractions included; a number, or (vertical, horizontal).
    rotation: up to so many degrees either way.
    scale: larger or smaller by a factor of up to 1 + scale, its logarithm uniform. A number keeps the proportions; a
    pair (vertical, horizontal) draws two factors.
    shear: upright lines lean by up to so many degrees either way.
    """

    def __init__(self, shift: Any = 0.0, rotation: float = 0.0, scale: Any = 0.0, shear: float = 0.0) -> None:
        _pair("shift", shift)
        _pair("scale", scale)
        if not _is_range(rotation):
            raise ArgumentError(f"RandomAffine: rotation must be degrees from 0 to {_MOST:g}, not {rotation!r}.")
        if not (_is_range(shear) and shear < 90):
            raise ArgumentError(f"RandomAffine: shear must be degrees, at least 0 and below 90, not {shear!r}.")
        self.shift, self.scale = (tuple(a) if isinstance(a, list) else a for a in (shift, scale))
        self.rotation, self.shear = rotation, shear

    def positions(self, rows: int) -> tuple[Array, Array]:
        """The map backwards: p - centre - shift turned back, scaled back and upright again, + centre."""
        xp, work, dtype = self.xp, self.work, self.context.dtype
        height, width = self.input_shape[:2]
        middle, centre = (height - 1) / 2, (width - 1) / 2
        most_down, most_right = _pair("shift", self.shift)
        most_taller, most_wider = _pair("scale", self.scale)

        down, right, turn, taller, wider, lean = self.uniform(rows, 6).T.reshape(6, rows, 1, 1)
        taller = xp.exp(taller * math.log1p(most_taller))
        wider = taller if is_number(self.scale) else xp.exp(wider * math.log1p(most_wider))
        angle = turn * math.radians(self.rotation)
        cos, sin, lean = xp.cos(angle), xp.sin(angle), xp.tan(lean * math.radians(self.shear))

        v = xp.arange(height, dtype=dtype)[:, None] - middle - down * most_down
        h = xp.arange(width, dtype=dtype) - centre - right * most_right
        v_by_v, v_by_h = cos / taller, sin / taller
        h_by_v, h_by_h = lean * v_by_v - sin / wider, lean * v_by_h + cos / wider
        plane = (rows, height, width)
        return (
            xp.add(v_by_v * v + middle, v_by_h * h, out=work.buffer("vertical", plane)),
            xp.add(h_by_v * v + centre, h_by_h * h, out=work.buffer("horizontal", plane)),
        )


class ElasticDistortion(Distortion):
    """Each pixel fetched from a random place nearby, near neighbours from places alike: as if drawn on rubber.

    Simard, Steinkraus, Platt 2003, "Best practices for convolutional neural networks applied to visual document
    analysis": for digits of 28 × 28 pixels, alpha=34 and sigma=4. Displacements drawn from -1 to 1 are averaged under a
    Gaussian of standard deviation `sigma` pixels, whose weights add up to 1, and multiplied by `alpha`. Up and down as
    well as sideways, that leaves a standard deviation of about 0.16 alpha / sigma pixels, and less near the edges, for
    nothing lies beyond them.
    """

    def __init__(self, alpha: float, sigma: float) -> None:
        if not (_is_range(alpha) and _is_range(sigma) and sigma > 0):
            raise ArgumentError(
                f"ElasticDistortion: alpha must be from 0 and sigma above 0 to {_MOST:g} pixels, not {alpha!r} and "
                f"{sigma!r}."
            )
        self.alpha, self.sigma = alpha, sigma

    def positions(self, rows: int) -> tuple[Array, Array]:
        """Pixel (i, j) is fetched from (i, j) + alpha · G noise G, with a Gaussian G along either axis."""
        xp, work, dtype = self.xp, self.work, self.context.dtype
        height, width = self.input_shape[:2]
        if not hasattr(work, "smoothing"):
            work.smoothing = [self.backend.asarray(_gaussian(n, self.sigma), dtype) for n in (height, width)]
        by_height, by_width = work.smoothing
        noise = self.uniform(rows, 2, height, width)
        # Image by image, rather than one large product, so that no rounding depends on the others of the batch.
        field = self.backend.matmul_each(noise, by_width, out=work.buffer("field", noise.shape))
        field = self.backend.matmul_each(by_height, field, out=noise)
        field *= self.alpha
        plane = (rows, height, width)
        return (
            xp.add(field[:, 0], xp.arange(height, dtype=dtype)[:, None], out=work.buffer("vertical", plane)),
            xp.add(field[:, 1], xp.arange(width, dtype=dtype), out=work.buffer("horizontal", plane)),
        )


def _gaussian(n: int, sigma: float) -> list[list[float]]:
    """(n, n): the share of a Gaussian around pixel i that falls on pixel j."""
    below = [0.5 * math.erf((k - 0.5) / (sigma * math.sqrt(2))) for k in range(n + 1)]
    share = [below[k + 1] - below[k] for k in range(n)]
    return [[share[abs(i - j)] for j in range(n)] for i in range(n)]


def _is_range(value: Any) -> bool:
    return is_number(value) and 0 <= value <= _MOST


def _pair(name: str, value: Any) -> tuple[float, float]:
    """(vertical, horizontal) of a number for both, or of such a pair."""
    given = value.tolist() if hasattr(value, "tolist") else value
    pair = tuple(given) if isinstance(given, list | tuple) else (given, given)
    if len(pair) != 2 or not all(map(_is_range, pair)):
        raise ArgumentError(
            f"RandomAffine: {name} must be a number from 0 to {_MOST:g} or two, (vertical, horizontal), not {value!r}."
        )
    return float(pair[0]), float(pair[1])
