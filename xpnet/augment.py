"""Augmentation: layers that change their inputs at random, in training only, usually at the beginning of a model.

The random numbers are a hash of (seed, layer, step, sample), so each step changes the samples differently, but in the
same way on every device.

Invalid arguments raise ArgumentError. Layers for images raise ShapeError, when they are built, for other shapes.
"""

import math
from typing import Any

from xpnet.backends import Array
from xpnet.config import flag, integer, items_or_one, missing_method, number, one_or_pair
from xpnet.errors import ArgumentError, shown
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape

__all__ = ["Distortion", "ElasticDistortion", "GaussianNoise", "MixUp", "RandomAffine", "RandomCrop", "RandomErasing",
           "RandomFlip"]  # fmt: skip

_LIMIT = 10**6  # of pixels, degrees and factors: beyond it nothing of an image is left, and float32 would overflow
_MAX_ASPECT = 3.3  # of an erased rectangle, as in the paper


class _Augmentation(Layer):
    """The base of these layers. Integers come out in the model's dtype and are not scaled."""

    accepts_integers = True

    def _unchanged(self, x: Array) -> Array:
        return x.astype(self.context.dtype, copy=False)


def _for_broadcast(a: Array, x: Array) -> Array:
    """`a` with axes of length 1 appended, so that it broadcasts against x, whose first axes are those of `a`."""
    return a.reshape(*a.shape, *[1] * (x.ndim - a.ndim))


class _ImageAugmentation(_Augmentation):
    """The base of layers on images (N, H, W) or (N, H, W, C)."""

    def build(self, input_shape: Shape) -> Shape:
        if len(input_shape) not in (2, 3) or None in input_shape:
            raise self.refuse("(N, height, width) or (N, height, width, channels)", input_shape)
        return input_shape


class Distortion(_ImageAugmentation):
    """In training, each pixel of y is the value of x at a random position near it. In inference, y = x.

    (N, H, W) or (N, H, W, C) → the same shape in the model's dtype; integers are not scaled. A subclass defines
    `positions`. Values between pixels are interpolated; outside the image they are 0.
    """

    def positions(self, rows: int) -> tuple[Array, Array]:
        """Return the positions in x of the pixels of y: vertical and horizontal, (rows, H, W) each, in pixels from 0.

        For pixel (i, j), the identity returns i and j.
        """
        raise missing_method(self, "positions(rows)")

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
            return self._unchanged(x)
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
        """Zeros (pixels, channels) for this number of images, each with a border of one pixel.

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

    _changeable = frozenset(("shift", "rotation", "scale", "shear"))

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

    _changeable = frozenset(("alpha", "sigma"))

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


class RandomFlip(_ImageAugmentation):
    """Mirrors each image with probability ½: left and right if `horizontal`, top and bottom if `vertical`.

    (N, H, W) or (N, H, W, C) → the same shape. With both, the two are independent.
    """

    _changeable = frozenset(("horizontal", "vertical"))

    def __init__(self, *, horizontal: bool = True, vertical: bool = False, name: str | None = None) -> None:
        super().__init__(name=name)
        self.horizontal, self.vertical = flag(self, "horizontal", horizontal), flag(self, "vertical", vertical)

    def forward(self, x: Array) -> Array:
        """y[n, i, j] = x[n, i, W - 1 - j] for mirrored images, likewise for i."""
        self.work.mirrored = self._noise(len(x), 2) < 0.5 if self.context.training else None
        return self._mirrored(x, "y")

    def backward(self, grad_y: Array) -> Array | None:
        """A mirror image is its own inverse, so ∂L/∂x is ∂L/∂y, mirrored in the same way."""
        return self._mirrored(grad_y, "grad_x") if self.wants_input_grad else None

    def _mirrored(self, x: Array, name: str) -> Array:
        mirrored = self.work.mirrored
        if mirrored is None:
            return self._unchanged(x)
        y = self.work.buffer(name, x.shape)
        y[...] = x
        for column, axis, wanted in ((0, 2, self.horizontal), (1, 1, self.vertical)):
            if wanted:
                y[...] = self.xp.where(_for_broadcast(mirrored[:, column], y), self.xp.flip(y, axis=axis), y)
        return y


class RandomCrop(_ImageAugmentation):
    """Pads each image with zeros and crops a window at a random position.

    (N, H, W) → (N, *size), (N, H, W, C) → (N, *size, C). In inference, the window is in the middle: without `size`,
    y = x.

    padding: the zeros on each side, in pixels; a number, or (vertical, horizontal). The default is 4 without `size`,
    else 0.
    size: the size of the window in pixels; a number, or (height, width). The default is the size of the image.

    Padding by 4 pixels is the augmentation of He et al. 2015, "Deep residual learning for image recognition", for
    images of 32 × 32 pixels.
    """

    def __init__(self, padding: Any = None, size: Any = None, *, name: str | None = None) -> None:
        super().__init__(name=name)
        limits = {"at_least": 0, "at_most": _LIMIT}
        self.padding = None if padding is None else one_or_pair(integer, self, "padding", padding, **limits)
        self.size = None if size is None else one_or_pair(integer, self, "size", size, at_most=_LIMIT)

    def build(self, input_shape: Shape) -> Shape:
        image = super().build(input_shape)[:2]
        default = 4 if self.size is None else 0
        self._pad = _pair(default if self.padding is None else self.padding)
        self._window = image if self.size is None else _pair(self.size)
        if any(window > n + 2 * pad for window, n, pad in zip(self._window, image, self._pad, strict=True)):
            raise self.refuse(f"images of at least {self._window} pixels with their padding", input_shape)
        return (*self._window, *input_shape[2:])

    def forward(self, x: Array) -> Array:
        """y[n, i, j] = x[n, i + top_n, j + left_n], and 0 outside the image."""
        work, rows, training = self.work, len(x), self.context.training
        if not training and self.size is None:
            work.places = None
            return self._unchanged(x)
        noise, places = self._noise(rows, 2) if training else None, []
        for axis, (n, pad, window) in enumerate(zip(self.input_shape[:2], self._pad, self._window, strict=True)):
            last = n + 2 * pad - window  # the window may begin at any pixel from 0 to this one of the padded image
            if noise is None:
                place = self.xp.full(rows, last // 2 - pad, dtype=self.xp.int64)
            else:
                place = (noise[:, axis] * (last + 1)).astype(self.xp.int64)
                place = self.xp.minimum(place, last) - pad
            places.append(place)
        work.places = places
        return self._shifted(x, "y", self._window, *places)

    def backward(self, grad_y: Array) -> Array | None:
        """∂L/∂x[n, i, j] = ∂L/∂y[n, i - top_n, j - left_n], and 0 for pixels outside the window."""
        if not self.wants_input_grad:
            return None
        if self.work.places is None:
            return grad_y
        top, left = self.work.places
        return self._shifted(grad_y, "grad_x", self.input_shape[:2], -top, -left)

    def _shifted(self, x: Array, name: str, size: Any, top: Array, left: Array) -> Array:
        """y (N, *size, …) with y[n, i, j] = x[n, i + top_n, j + left_n], and 0 outside x."""
        xp, work, rows, (height, width) = self.xp, self.work, len(x), x.shape[1:3]
        channels = math.prod(self.input_shape[2:])
        pixels = work.buffer(f"{name} pixels", (rows * height * width + 1, channels))
        pixels[:-1] = x.reshape(-1, channels)
        pixels[-1] = 0.0
        i = xp.arange(size[0]) + top[:, None]
        j = xp.arange(size[1]) + left[:, None]
        inside = ((i >= 0) & (i < height))[:, :, None] & ((j >= 0) & (j < width))[:, None, :]
        index = ((xp.arange(rows) * height)[:, None] + i)[:, :, None] * width + j[:, None, :]
        index = xp.where(inside, index, rows * height * width).reshape(-1)
        y = self.backend.gather(pixels, index, out=work.buffer(name, (rows * size[0] * size[1], channels)))
        return y.reshape(rows, *size, *self.input_shape[2:])


class RandomErasing(_ImageAugmentation):
    """Sets a random rectangle of each image to 0, with probability `rate`.

    (N, H, W) or (N, H, W, C) → the same shape; all channels are erased alike. Height divided by width is log-uniform
    from 1/3.3 to 3.3, unless a rectangle of that area would not fit into the image.

    area: the smallest and the largest fraction of the image that is erased, or one number for both.

    Zhong et al. 2017, "Random erasing data augmentation".
    """

    _changeable = frozenset(("rate", "area"))

    def __init__(self, rate: float = 0.5, area: Any = (0.02, 0.33), *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.rate = number(self, "rate", rate, at_least=0, at_most=1)
        limits: dict[str, Any] = {"at_least": 0, "at_most": 1, "also": "(smallest, largest)"}
        given = tuple(number(self, "area", share, **limits) for share in items_or_one(area))
        if len(given) not in (1, 2) or given[0] > given[-1]:
            raise ArgumentError(f"RandomErasing: area must be a share or (smallest, largest), not {shown(area)}.")
        self.area = given if len(given) == 2 else given[0]

    def forward(self, x: Array) -> Array:
        """y = 0 in the rectangle, else x."""
        xp, work = self.xp, self.work
        if not self.context.training:
            work.erased = None
            return self._unchanged(x)
        (height, width), (low, high) = self.input_shape[:2], _pair(self.area)
        chance, area, aspect, top, left = self._noise(len(x), 5).T.reshape(5, -1, 1)
        pixels = xp.maximum((area * (high - low) + low) * float(height * width), 1e-6)
        tall = xp.sqrt(pixels * xp.exp((2.0 * aspect - 1.0) * math.log(_MAX_ASPECT)))
        wide = xp.minimum(pixels / xp.minimum(tall, float(height)), float(width))
        tall = xp.minimum(pixels / wide, float(height))
        rows, columns = _inside(xp, height, tall, top), _inside(xp, width, wide, left)
        if self.rate < 1:
            rows &= chance < self.rate
        work.erased = rows[:, :, None] & columns[:, None, :]
        return self._erased(x, "y")

    def backward(self, grad_y: Array) -> Array | None:
        """∂L/∂x = 0 in the rectangle, else ∂L/∂y."""
        return self._erased(grad_y, "grad_x") if self.wants_input_grad else None

    def _erased(self, x: Array, name: str) -> Array:
        erased = self.work.erased
        if erased is None:
            return self._unchanged(x)
        y = self.work.buffer(name, x.shape)
        y[...] = x
        self.xp.copyto(y, 0.0, where=_for_broadcast(erased, y))
        return y


def _inside(xp: Any, n: int, length: Array, place: Array) -> Array:
    """(N, n): which of n pixels an interval covers. length (N, 1): in pixels; place (N, 1): from 0 (first) to 1 (last).

    A pixel belongs to the interval if its center does.
    """
    begin = place * (n - length)
    center = xp.arange(n, dtype=length.dtype) + 0.5
    return (center >= begin) & (center < begin + length)


class GaussianNoise(_Augmentation):
    """Adds normal noise of mean 0 and standard deviation `deviation` to each element of x, of any shape (N, ...)."""

    _changeable = frozenset(("deviation",))

    def __init__(self, deviation: float, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.deviation = number(self, "deviation", deviation, at_least=0, at_most=1e30)

    def forward(self, x: Array) -> Array:
        """y = x + deviation · z, with normal noise z."""
        if not self.context.training or not self.deviation:
            return self._unchanged(x)
        noise = self.random_normal(x)
        noise *= self.deviation
        y = self.work.buffer("y", x.shape)
        y[...] = x
        y += noise
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """∂L/∂x = ∂L/∂y."""
        return grad_y if self.wants_input_grad else None


class MixUp(_Augmentation):
    """Mixes each sample with another one of the batch, and the losses for their two targets in the same way.

    y_i = λ_i x_i + (1 - λ_i) x_j, for x of any shape (N, ...), with λ_i from Beta(alpha, alpha). In `fit` and
    `train_on_batch`, the loss of sample i is then λ_i ℓ(ŷ_i, t_i) + (1 - λ_i) ℓ(ŷ_i, t_j), which for cross-entropy is
    the loss of the mixed probabilities. Sample weights apply to each of the two parts. Training losses are therefore
    larger than validation losses, and training metrics, which compare ŷ_i with t_i, are worse.

    j = (s - i) modulo N, with a random s in each step; since batches are shuffled, this pairs samples at random.
    Samples are mixed only within a rank, so results depend on the number of ranks. A model can have only one MixUp.
    In a training loop of your own, use `shares` (λ, (N,)) and `partners` (j, (N,)), which are arrays on the device.

    Zhang et al. 2018, "mixup: Beyond empirical risk minimization", use alpha from 0.1 to 0.4 for images.
    """

    _changeable = frozenset(("alpha",))

    def __init__(self, alpha: float = 0.2, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.alpha = number(self, "alpha", alpha, above=0, at_most=_LIMIT)

    def build(self, input_shape: Shape) -> Shape:
        if self.context.mixup is not None:
            raise ArgumentError(f"{self._label}: the model has a MixUp already, and can have only one.")
        self.context.mixup = self
        return input_shape

    @property
    def shares(self) -> Array:
        """λ_i, (N,): the share of sample i in the mixed sample i of the latest pass."""
        return self.work.shares

    @property
    def partners(self) -> Array:
        """j, (N,): the index of the sample that sample i was mixed with in the latest pass."""
        return self.work.partners

    def forward(self, x: Array) -> Array:
        """y_i = x_j + λ_i (x_i - x_j)."""
        work = self.work
        if not self.context.training:
            work.shares = None
            return self._unchanged(x)
        self._draw(len(x))
        other = self.backend.gather(x, work.partners, out=work.buffer("other", x.shape))
        y = work.buffer("y", x.shape)
        y[...] = x
        y -= other
        y *= _for_broadcast(work.shares, y)
        y += other
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """∂L/∂x_i = λ_i ∂L/∂y_i + (1 - λ_j) ∂L/∂y_j, because i is the partner of its partner j."""
        work = self.work
        if not self.wants_input_grad:
            return None
        if work.shares is None:
            return grad_y
        own = self.xp.multiply(grad_y, _for_broadcast(work.shares, grad_y), out=work.buffer("own", grad_y.shape))
        grad_x = self.backend.gather(grad_y - own, work.partners, out=work.buffer("grad_x", grad_y.shape))
        grad_x += own
        return grad_x

    def _draw(self, rows: int) -> None:
        """Set the shares and the partners of this pass.

        λ = ½ ± ½ √(o / (1 + o)), o = (u^(-1/alpha) - 1) cos² 2πv, is exactly Beta(alpha, alpha) for uniform u and v:
        Devroye 1996, "Random variate generation in one line of code".
        """
        xp, work = self.xp, self.work
        u, v, sign, shift = self._noise(rows, 4).T
        power = xp.minimum(xp.log(u) * (-1.0 / self.alpha), 80.0)  # above, λ is 0 or 1 in float64 too
        odds = xp.expm1(power) * xp.square(xp.cos(v * (2.0 * math.pi)))
        spread = xp.sqrt(odds / (odds + 1.0)) * ((sign < 0.5).astype(u.dtype) - 0.5)
        work.shares = xp.add(spread, 0.5, out=work.buffer("shares", (rows,)))
        work.partners = work.buffer("partners", (rows,), xp.int64)
        work.partners[...] = ((shift[0] * rows).astype(xp.int64) - xp.arange(rows)) % rows
