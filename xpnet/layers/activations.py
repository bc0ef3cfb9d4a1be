"""Activations: functions that are applied to each element, and softmax and log-softmax over the last axis.

x, y, ∂L/∂y and ∂L/∂x have the same shape, (N, ...). For an elementwise function, ∂L/∂x = ∂L/∂y · dy/dx. NaN stays NaN,
and at ±∞ each function takes its limit.
"""

import math
from typing import Any

from xpnet.backends import Array
from xpnet.config import choice, flag, number
from xpnet.layers.base import Layer, checked_initializer
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

    _changeable = frozenset(("threshold",))

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

    _changeable = frozenset(("negative_slope",))

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


class PReLU(Layer):
    """y = x if x > 0, else weight · x, with a learned slope for each feature of the last axis: (N, ..., features).

    For images (N, H, W, C) that is one slope per channel. `shared=True` learns a single slope, as PyTorch does by
    default. Weight decay does not apply to the slopes: it would pull the layer towards a ReLU.

    He et al. 2015, "Delving deep into rectifiers: surpassing human-level performance on ImageNet classification".
    """

    def __init__(self, *, shared: bool = False, weight_initializer: Any = 0.25, name: str | None = None) -> None:
        super().__init__(name=name)
        self.shared = flag(self, "shared", shared)
        self.weight_initializer = checked_initializer(self, "weight_initializer", weight_initializer)

    def build(self, input_shape: Shape) -> Shape:
        shape = _with_features(self, input_shape)
        slopes = (1,) if self.shared else shape[-1:]
        self.weight = self.add_parameter("weight", slopes, self.weight_initializer, decay=False)
        return shape

    def forward(self, x: Array) -> Array:
        """y = max(x, 0) + weight · min(x, 0)."""
        xp, work = self.xp, self.work
        work.x = x
        y = xp.minimum(x, 0.0, out=work.buffer("y", x.shape))
        y *= self.weight.value
        y += xp.maximum(x, 0.0)
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """With g = ∂L/∂y: ∂y/∂weight = min(x, 0), so ∂L/∂weight = Σ g · min(x, 0) over all elements of a feature.

        dy/dx = 1 if x > 0, else weight.
        """
        xp, work = self.xp, self.work
        products = xp.minimum(work.x, 0.0, out=self.context.scratch("products", grad_y.shape))
        products *= grad_y
        self.backend.sum_rows(products.reshape(-1, len(self.weight.value)), out=self.weight.grad)
        if not self.wants_input_grad:
            return None
        grad_x = xp.multiply(grad_y, self.weight.value, out=work.buffer("grad_x", grad_y.shape))
        xp.copyto(grad_x, grad_y, where=work.x > 0)
        return grad_x


class ELU(Layer):
    """y = x if x > 0, else alpha (e^x - 1). Clevert et al. 2015, "Fast and accurate deep network learning…"."""

    _changeable = frozenset(("alpha",))

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

    _changeable = frozenset(("approximate",))
    _TANH_SCALE, _TANH_CUBIC = math.sqrt(2.0 / math.pi), 0.044715

    def __init__(self, approximate: str = "none", *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.approximate = choice(self, "approximate", approximate, ("none", "tanh"))

    def forward(self, x: Array) -> Array:
        work, y = self.work, self.work.buffer("y", x.shape)
        work.slope = work.buffer("slope", x.shape)
        if self.approximate == "none":
            return self.backend.gelu(x, out=y, slope=work.slope)
        return self._by_tanh(x, y, work.slope)

    def _by_tanh(self, x: Array, y: Array, slope: Array) -> Array:
        xp = self.xp
        near = xp.clip(x, -30.0, 30.0)  # beyond them tanh is ±1, and x³ could overflow
        square = near * near
        tanh = xp.tanh(self._TANH_SCALE * near * (1.0 + self._TANH_CUBIC * square))
        phi = 0.5 * (1.0 + tanh)
        density = 0.5 * (1.0 - tanh * tanh) * (self._TANH_SCALE * (1.0 + 3.0 * self._TANH_CUBIC * square))
        xp.add(phi, near * density, out=slope)
        return xp.multiply(_without_minus_infinity(self, x), phi, out=y)

    def backward(self, grad_y: Array) -> Array:
        """dy/dx = Φ(x) + x φ(x), with φ(x) = e^(-x²/2) / √(2π).

        The approximation is Φ(x) = ½ (1 + tanh u), u = √(2/π) (x + 0.044715 x³), with φ(x) = ½ (1 - tanh² u) du/dx.
        """
        work = self.work
        return self.xp.multiply(grad_y, work.slope, out=work.buffer("grad_x", work.slope.shape))


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


class Mish(Layer):
    """y = x tanh(log(1 + e^x)). Misra 2019, "Mish: a self regularized non-monotonic activation function"."""

    def forward(self, x: Array) -> Array:
        xp, work = self.xp, self.work
        work.x = x
        work.tanh = self.backend.softplus(x, out=work.buffer("tanh", x.shape))
        xp.tanh(work.tanh, out=work.tanh)
        return xp.multiply(_without_minus_infinity(self, x), work.tanh, out=work.buffer("y", x.shape))

    def backward(self, grad_y: Array) -> Array:
        """With t = tanh(log(1 + e^x)) and d log(1 + e^x)/dx = σ(x): dy/dx = t + x σ (1 - t²)."""
        xp, work = self.xp, self.work
        slope = xp.square(work.tanh, out=work.buffer("slope", work.tanh.shape))
        xp.subtract(1.0, slope, out=slope)
        slope *= self.backend.sigmoid(work.x)
        slope *= xp.clip(work.x, -1e4, 1e4)  # at ±∞ the slope is 0 or 1, not 0 · ∞
        slope += work.tanh
        return xp.multiply(grad_y, slope, out=slope)


class HardTanh(Layer):
    """y = min(max(x, low), high). Either limit may be infinite. Collobert 2004, "Large scale machine learning"."""

    _changeable = frozenset(("low", "high"))

    def __init__(self, low: float = -1.0, high: float = 1.0, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.low = number(self, "low", low)
        self.high = number(self, "high", high, above=self.low)

    def forward(self, x: Array) -> Array:
        xp, work = self.xp, self.work
        work.x = x
        y = xp.maximum(x, self.low, out=work.buffer("y", x.shape))
        return xp.minimum(y, self.high, out=y)

    def backward(self, grad_y: Array) -> Array:
        """dy/dx = 1 if low < x < high, else 0."""
        return _where_between(self, grad_y, self.low, self.high)


class ReLU6(HardTanh):
    """y = min(max(x, 0), 6). Howard et al. 2017, "MobileNets: efficient convolutional neural networks…"."""

    def __init__(self, *, name: str | None = None) -> None:
        super().__init__(0.0, 6.0, name=name)


class HardSigmoid(Layer):
    """y = min(max(x + 3, 0), 6) / 6: the sigmoid, approximated by three straight lines.

    Howard et al. 2019, "Searching for MobileNetV3".
    """

    def forward(self, x: Array) -> Array:
        work = self.work
        work.x = x
        return _hard_sigmoid(self, x, out=work.buffer("y", x.shape))

    def backward(self, grad_y: Array) -> Array:
        """dy/dx = 1/6 if -3 < x < 3, else 0."""
        grad_x = _where_between(self, grad_y, -3.0, 3.0)
        grad_x *= 1.0 / 6.0
        return grad_x


class HardSwish(Layer):
    """y = x h(x), with h(x) = min(max(x + 3, 0), 6) / 6. Howard et al. 2019, "Searching for MobileNetV3"."""

    def forward(self, x: Array) -> Array:
        work = self.work
        work.x = x
        y = _hard_sigmoid(self, x, out=work.buffer("y", x.shape))
        y *= self.xp.maximum(x, -3.0)  # y is 0 below -3, where 0 · -∞ would be NaN
        return y

    def backward(self, grad_y: Array) -> Array:
        """dy/dx = h + x h' = 0 if x ≤ -3, 1 if x ≥ 3, else x/3 + 1/2."""
        xp, work = self.xp, self.work
        slope = xp.multiply(work.x, 1.0 / 3.0, out=work.buffer("slope", grad_y.shape))
        slope += 0.5
        xp.copyto(slope, 0.0, where=work.x <= -3.0)
        xp.copyto(slope, 1.0, where=work.x >= 3.0)
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


def _where_between(layer: Layer, grad_y: Array, low: float, high: float) -> Array:
    """∂L/∂y where low < x < high, else 0, for the x that forward has kept."""
    xp, work = layer.xp, layer.work
    between = xp.greater(work.x, low, out=work.buffer("grad_x", grad_y.shape))
    between *= work.x < high
    return xp.multiply(grad_y, between, out=between)


def _hard_sigmoid(layer: Layer, x: Array, out: Array) -> Array:
    """min(max(x + 3, 0), 6) / 6."""
    xp = layer.xp
    xp.add(x, 3.0, out=out)
    xp.maximum(out, 0.0, out=out)
    xp.minimum(out, 6.0, out=out)
    out *= 1.0 / 6.0
    return out


def _without_minus_infinity(layer: Layer, x: Array) -> Array:
    """x with -∞ replaced by the lowest finite number, whose product with 0 is 0 and not NaN."""
    return layer.xp.maximum(x, layer.backend.lowest(x.dtype))
