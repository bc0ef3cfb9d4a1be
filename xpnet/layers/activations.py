"""Activations: functions that are applied to each element, and softmax and log-softmax over the last axis.

x, y, ∂L/∂y and ∂L/∂x have the same shape, (N, ...). For an elementwise function, ∂L/∂x = ∂L/∂y · dy/dx. NaN stays NaN,
and at ±∞ each function takes its limit.
"""

import math

from xpnet.backends import Array
from xpnet.config import choice, number
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape


class Identity(Layer):
    """y = x."""

    accepts_integers = None

    def forward(self, x: Array) -> Array:
        return x

    def backward(self, grad_y: Array) -> Array:
        """∂L/∂x = ∂L/∂y."""
        return grad_y


class Step(Layer):
    """y = 1 if x ≥ threshold, else 0: the perceptron's activation. Rosenblatt 1958.

    dy/dx is 0 wherever it exists, so nothing would be trained. By convention, backward returns ∂L/∂y unchanged.
    """

    def __init__(self, threshold: float = 0.0, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.threshold = number(self, "threshold", threshold, finite=True)

    def forward(self, x: Array) -> Array:
        y = self.work.buffer("y", x.shape)
        y[...] = x >= self.threshold
        self.xp.copyto(y, x, where=x != x)  # where x is NaN
        return y

    def backward(self, grad_y: Array) -> Array:
        """∂L/∂x = ∂L/∂y. With half the squared error this gives Rosenblatt's rule, Δw = rate · (t - y) x."""
        return grad_y


class Sigmoid(Layer):
    """y = 1 / (1 + e^-x)."""

    gives_probabilities = True

    def forward(self, x: Array) -> Array:
        work = self.work
        work.y = self.backend.sigmoid(x, out=work.buffer("y", x.shape))
        return work.y

    def backward(self, grad_y: Array) -> Array:
        """dy/dx = y (1 - y)."""
        xp, work = self.xp, self.work
        slope = xp.subtract(1.0, work.y, out=work.buffer("slope", work.y.shape))
        slope *= work.y
        return xp.multiply(grad_y, slope, out=slope)


class Tanh(Layer):
    """y = tanh x."""

    def forward(self, x: Array) -> Array:
        work = self.work
        work.y = self.xp.tanh(x, out=work.buffer("y", x.shape))
        return work.y

    def backward(self, grad_y: Array) -> Array:
        """dy/dx = 1 - y²."""
        xp, work = self.xp, self.work
        slope = xp.square(work.y, out=work.buffer("slope", work.y.shape))
        xp.subtract(1.0, slope, out=slope)
        return xp.multiply(grad_y, slope, out=slope)


class ReLU(Layer):
    """y = max(x, 0)."""

    def forward(self, x: Array) -> Array:
        work = self.work
        work.y = self.backend.relu(x, out=work.buffer("y", x.shape))
        return work.y

    def backward(self, grad_y: Array) -> Array:
        """dy/dx = 1 if x > 0, else 0."""
        work = self.work
        return self.backend.relu_grad(grad_y, work.y, out=work.buffer("grad_x", work.y.shape))


class LeakyReLU(Layer):
    """y = x if x > 0, else negative_slope · x. Maas et al. 2013, "Rectifier nonlinearities improve…"."""

    def __init__(self, negative_slope: float = 0.01, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.negative_slope = number(self, "negative_slope", negative_slope, finite=True)

    def forward(self, x: Array) -> Array:
        xp, work = self.xp, self.work
        work.x = x
        y = xp.maximum(x, 0.0, out=work.buffer("y", x.shape))
        if self.negative_slope:  # 0 · -∞ would be NaN
            y += self.negative_slope * xp.minimum(x, 0.0)
        return y

    def backward(self, grad_y: Array) -> Array:
        """dy/dx = 1 if x > 0, else negative_slope."""
        xp, work = self.xp, self.work
        slope = work.buffer("slope", grad_y.shape)
        slope.fill(self.negative_slope)
        xp.copyto(slope, 1.0, where=work.x > 0)
        return xp.multiply(grad_y, slope, out=slope)


class ELU(Layer):
    """y = x if x > 0, else alpha (e^x - 1). Clevert et al. 2015, "Fast and accurate deep network learning…"."""

    def __init__(self, alpha: float = 1.0, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.alpha = number(self, "alpha", alpha, finite=True)

    def forward(self, x: Array) -> Array:
        xp, work = self.xp, self.work
        y = xp.minimum(x, 0.0, out=work.buffer("y", x.shape))
        xp.expm1(y, out=y)
        y *= self.alpha
        xp.copyto(y, x, where=x > 0)
        work.x, work.y = x, y
        return y

    def backward(self, grad_y: Array) -> Array:
        """dy/dx = 1 if x > 0, else alpha e^x = y + alpha."""
        xp, work = self.xp, self.work
        grad_x = xp.add(work.y, self.alpha, out=work.buffer("grad_x", grad_y.shape))
        grad_x *= grad_y
        xp.copyto(grad_x, grad_y, where=work.x > 0)
        return grad_x


class GELU(Layer):
    """y = x Φ(x), with the cumulative distribution function Φ of the standard normal distribution.

    approximate: "none", or "tanh" for an approximation of Φ. Hendrycks and Gimpel 2016, "Gaussian error linear units".
    """

    _TANH_SCALE, _TANH_CUBIC = math.sqrt(2.0 / math.pi), 0.044715

    def __init__(self, approximate: str = "none", *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.approximate = choice(self, "approximate", approximate, ("none", "tanh"))

    def forward(self, x: Array) -> Array:
        xp, work = self.xp, self.work
        work.x = x
        if self.approximate == "tanh":
            near = xp.clip(x, -30.0, 30.0)  # beyond them tanh is ±1, and x³ could overflow
            work.tanh = xp.tanh(self._TANH_SCALE * (near + self._TANH_CUBIC * (near * near * near)))
            work.phi = 0.5 * (1.0 + work.tanh)
        else:
            # 1 + erf would lose all digits for large negative x.
            work.phi = 0.5 * self.backend.erfc(x * -math.sqrt(0.5))
        return xp.multiply(_without_minus_infinity(self, x), work.phi, out=work.buffer("y", x.shape))

    def backward(self, grad_y: Array) -> Array:
        """dy/dx = Φ(x) + x φ(x), with φ(x) = e^(-x²/2) / √(2π).

        The approximation is Φ(x) = ½ (1 + tanh u), u = √(2/π) (x + 0.044715 x³), with φ(x) = ½ (1 - tanh² u) du/dx.
        """
        xp, work = self.xp, self.work
        if self.approximate == "tanh":
            x = xp.clip(work.x, -30.0, 30.0)
            density = 0.5 * (1.0 - work.tanh * work.tanh) * (self._TANH_SCALE * (1.0 + 3.0 * self._TANH_CUBIC * x * x))
        else:
            x = xp.clip(work.x, -40.0, 40.0)
            density = xp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
        slope = xp.add(work.phi, x * density, out=work.buffer("slope", work.phi.shape))
        return xp.multiply(grad_y, slope, out=slope)


class SiLU(Layer):
    """y = x σ(x), also called swish. Elfwing et al. 2017, "Sigmoid-weighted linear units…"."""

    def forward(self, x: Array) -> Array:
        work = self.work
        work.x = x
        work.sigma = self.backend.sigmoid(x, out=work.buffer("sigma", x.shape))
        return self.xp.multiply(_without_minus_infinity(self, x), work.sigma, out=work.buffer("y", x.shape))

    def backward(self, grad_y: Array) -> Array:
        """dy/dx = σ + x σ (1 - σ) = σ (1 + x (1 - σ))."""
        xp, work = self.xp, self.work
        slope = xp.subtract(1.0, work.sigma, out=work.buffer("slope", work.sigma.shape))
        slope *= xp.clip(work.x, -1e4, 1e4)  # at ±∞ the slope is 0 or 1, not 0 · ∞
        slope += 1.0
        slope *= work.sigma
        return xp.multiply(grad_y, slope, out=slope)


class Softplus(Layer):
    """y = log(1 + e^x)."""

    def forward(self, x: Array) -> Array:
        work = self.work
        work.x = x
        return self.backend.softplus(x, out=work.buffer("y", x.shape))

    def backward(self, grad_y: Array) -> Array:
        """dy/dx = σ(x)."""
        work = self.work
        slope = self.backend.sigmoid(work.x, out=work.buffer("slope", work.x.shape))
        return self.xp.multiply(grad_y, slope, out=slope)


class Softmax(Layer):
    """y_i = e^x_i / Σ_k e^x_k over the last axis. A model trained with a loss on logits must not end with it."""

    gives_probabilities = True

    def build(self, input_shape: Shape) -> Shape:
        return _with_features(self, input_shape)

    def forward(self, x: Array) -> Array:
        work = self.work
        work.y = self.backend.softmax(x, out=work.buffer("y", x.shape))
        return work.y

    def backward(self, grad_y: Array) -> Array:
        """∂y_i/∂x_k = y_i (δ_ik - y_k), so ∂L/∂x_k = y_k (g_k - Σ_i g_i y_i) with g = ∂L/∂y."""
        xp, work = self.xp, self.work
        grad_x = xp.multiply(grad_y, work.y, out=work.buffer("grad_x", work.y.shape))
        weighted_sum = xp.sum(grad_x, axis=-1, keepdims=True)
        xp.subtract(grad_y, weighted_sum, out=grad_x)
        grad_x *= work.y
        return grad_x


class LogSoftmax(Layer):
    """y_i = x_i - log Σ_k e^x_k over the last axis."""

    def build(self, input_shape: Shape) -> Shape:
        return _with_features(self, input_shape)

    def forward(self, x: Array) -> Array:
        work = self.work
        work.y = self.backend.log_softmax(x, out=work.buffer("y", x.shape))
        return work.y

    def backward(self, grad_y: Array) -> Array:
        """∂y_i/∂x_k = δ_ik - e^y_k, so ∂L/∂x_k = g_k - e^y_k Σ_i g_i with g = ∂L/∂y."""
        xp, work = self.xp, self.work
        grad_x = xp.exp(work.y, out=work.buffer("grad_x", work.y.shape))
        grad_x *= xp.sum(grad_y, axis=-1, keepdims=True)
        return xp.subtract(grad_y, grad_x, out=grad_x)


def _with_features(layer: Layer, input_shape: Shape) -> Shape:
    """Return the same shape. Raise ShapeError without a feature axis: the last axis would be the batch."""
    if not input_shape:
        raise layer.refuse("(N, ..., features)", input_shape)
    return input_shape


def _without_minus_infinity(layer: Layer, x: Array) -> Array:
    """x with -∞ replaced by the lowest finite number, whose product with 0 is 0 and not NaN."""
    return layer.xp.maximum(x, layer.backend.lowest(x.dtype))
