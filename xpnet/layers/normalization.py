"""Normalisation: to mean 0 and variance 1, of each feature over the batch or of each sample over its features."""

import math

from xpnet.backends import Array
from xpnet.config import is_number
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer, Shape


class Normalization(Layer):
    """What both share: y = gamma · x̂ + beta for normalised x̂, with a gamma and a beta for each feature."""

    def __init__(self, epsilon: float, center: bool, scale: bool) -> None:
        if not (is_number(epsilon) and 0 < epsilon < math.inf):
            raise ArgumentError(f"{type(self).__name__}: epsilon must be a finite number above 0, not {epsilon!r}.")
        self.epsilon, self.center, self.scale = epsilon, center, scale

    def build(self, input_shape: Shape) -> Shape:
        if not input_shape:
            raise self.refuse("(N, ..., features)", "(N,)")
        features = input_shape[-1:]
        if self.scale:
            self.gamma = self.add_parameter("gamma", features, "ones", decay=False)
        if self.center:
            self.beta = self.add_parameter("beta", features, "zeros", decay=False)
        return input_shape

    def room(self, gradient_of: str, features: int) -> Array:
        """Where the gradient of gamma or beta goes: to the parameter if there is one, for x's gradient needs it too."""
        parameter = getattr(self, gradient_of, None)
        return self.work.buffer(f"grad_{gradient_of}", (features,)) if parameter is None else parameter.grad


class BatchNorm(Normalization):
    """Each feature with the mean and the variance of the batch: (N, ..., features) → the same shape.

        y = gamma · x̂ + beta,   x̂ = (x - μ) / √(σ² + epsilon)

    In training, μ and σ² are those of the feature over the batch and all axes between: of images (N, H, W, C), over
    N · H · W pixels. Otherwise they are the running figures `running_mean` and `running_var`, which each training batch
    moves by running += momentum · (batch's - running), the variance unbiased. A batch of a single row has no variance:
    in training too, the running figures serve it, and it leaves them alone.

    `scale=False` leaves gamma out, `center=False` beta. Neither decays. Frozen (`trainable = False`), gamma and beta
    stay, but in training the layer goes on normalising by the batch, and the running figures go on following it.

    Where several ranks share a batch, μ and σ are those of the whole batch, or of each rank's own rows: see
    `distributed.Communicator`.

    Ioffe and Szegedy 2015, "Batch normalization: accelerating deep network training by reducing internal covariate
    shift".
    """

    def __init__(self, momentum: float = 0.1, epsilon: float = 1e-5, center: bool = True, scale: bool = True) -> None:
        super().__init__(epsilon, center, scale)
        if not (is_number(momentum) and 0 <= momentum <= 1):
            raise ArgumentError(f"BatchNorm: momentum is the weight of the new, from 0 to 1, not {momentum!r}.")
        self.momentum = momentum

    def build(self, input_shape: Shape) -> Shape:
        output_shape = super().build(input_shape)
        self.running_mean = self.add_buffer("running_mean", [0.0] * input_shape[-1])
        self.running_var = self.add_buffer("running_var", [1.0] * input_shape[-1])
        return output_shape

    def forward(self, x: Array) -> Array:
        """By one product and one sum: with σ for √(σ² + epsilon), y = gamma/σ · x + (beta - μ · gamma/σ)."""
        xp, work = self.xp, self.work
        work.x = rows = x.reshape(-1, x.shape[-1])
        work.count, together = len(rows), self._together
        if self.context.training and together:
            work.mean, variance, work.count = self._moments_of_all(rows)
        work.by_batch = self.context.training and work.count > 1
        if work.by_batch:
            if not together:
                work.mean, variance = self.backend.moments(rows)
            self._follow(work.mean, variance, work.count)
        else:
            work.mean, variance = self.running_mean.value, self.running_var.value
        work.sigma = xp.sqrt(variance + self.epsilon)
        work.slope = xp.divide(self.gamma.value if self.scale else 1.0, work.sigma)
        shift = -work.mean * work.slope
        if self.center:
            shift += self.beta.value
        return self.backend.scale_shift(rows, work.slope, shift, out=work.buffer("y", rows.shape)).reshape(x.shape)

    @property
    def _together(self) -> bool:
        """Whether several ranks normalise by the batch that they share."""
        ranks = self.context.ranks
        return ranks.size > 1 and ranks.synchronized

    def _moments_of_all(self, rows: Array) -> tuple[Array, Array, int]:
        """Mean and variance of each feature over the rows of all ranks, and how many those are.

        From each rank's count n, mean m and sum of squares about it s: the mean is M = Σ n m / N, and the squares about
        it are Σ s + n (m - M)² (Chan et al. 1979).
        """
        xp, context = self.xp, self.context
        mean, variance = (a.astype(xp.float64) for a in self.backend.moments(rows))
        counts = context.ranks.gather(0 if context.idle else len(rows))
        own, count = counts[context.ranks.rank], max(1, sum(counts))
        whole = mean * (own / count)
        context.ranks.add_up(whole)
        squares = (variance + xp.square(mean - whole)) * (own / count)
        context.ranks.add_up(squares)
        return whole.astype(rows.dtype), squares.astype(rows.dtype), sum(counts)

    def _follow(self, mean: Array, variance: Array, count: int) -> None:
        """Move the running figures a step towards those of a batch of `count` rows."""
        weights = self.momentum, self.momentum * count / (count - 1)  # which makes the variance unbiased
        for running, new, weight in zip((self.running_mean, self.running_var), (mean, variance), weights, strict=True):
            running.value *= 1.0 - self.momentum
            running.value += new * weight

    def backward(self, grad_y: Array) -> Array | None:
        """With N rows, g = ∂L/∂y, and sums over the rows of a feature:

        ∂L/∂beta = Σ g,   ∂L/∂gamma = Σ g·x̂ = Σ g·(x - μ) / σ.

        A row moves its own x̂ by 1/σ, and everyone's through μ and σ: from ∂μ/∂x_j = 1/N and ∂σ/∂x_j = x̂_j/N,

        ∂x̂_i/∂x_j = (δ_ij - 1/N - x̂_i x̂_j/N) / σ,

        ∂L/∂x = gamma/σ · (g - ∂L/∂beta/N - x̂ · ∂L/∂gamma/N) = a·g + b·x + c,

        a = gamma/σ,   b = -a/(N σ) · ∂L/∂gamma,   c = -a/N · ∂L/∂beta - b·μ.

        Of running figures, μ and σ are constants: ∂L/∂x = a·g.
        """
        xp, backend, work = self.xp, self.backend, self.work
        rows, features = grad_y.reshape(work.x.shape), work.x.shape[1]
        grad_beta = backend.sum_rows(rows, out=self.room("beta", features))
        grad_gamma = backend.sum_products(rows, work.x, work.mean, out=self.room("gamma", features))
        grad_gamma /= work.sigma
        if not self.wants_input_grad:
            return None
        a, grad_x = work.slope, work.buffer("grad_x", work.x.shape)
        if not work.by_batch:
            return xp.multiply(rows, a, out=grad_x).reshape(grad_y.shape)
        if self._together:  # the sums over all rows, of which each rank's gradient keeps its own
            grad_beta, grad_gamma = (grad * (0.0 if self.context.idle else 1.0) for grad in (grad_beta, grad_gamma))
            self.context.ranks.add_up(grad_beta)
            self.context.ranks.add_up(grad_gamma)
        per_row = a * (-1.0 / work.count)
        b = per_row * grad_gamma / work.sigma
        c = per_row * grad_beta - b * work.mean
        return backend.combine(rows, a, work.x, b, c, out=grad_x).reshape(grad_y.shape)


class LayerNorm(Normalization):
    """Each sample with the mean and the variance of its features: (N, ..., features) → the same shape.

        y = gamma · x̂ + beta,   x̂ = (x - μ) / √(σ² + epsilon),   μ and σ² over the last axis

    So it is the same in training and outside, and for any batch. `scale=False` leaves gamma out, `center=False` beta.
    Neither decays.

    Ba, Kiros and Hinton 2016, "Layer normalization".
    """

    def __init__(self, epsilon: float = 1e-5, center: bool = True, scale: bool = True) -> None:
        super().__init__(epsilon, center, scale)

    def forward(self, x: Array) -> Array:
        backend, work = self.backend, self.work
        rows = x.reshape(-1, x.shape[-1])
        work.sigma = work.buffer("sigma", (len(rows), 1))
        work.normal = backend.normalize_rows(rows, self.epsilon, work.buffer("normal", rows.shape), work.sigma)
        y = self.xp.multiply(work.normal, self.gamma.value if self.scale else 1.0, out=work.buffer("y", rows.shape))
        if self.center:
            backend.add_to_rows(y, self.beta.value)
        return y.reshape(x.shape)

    def backward(self, grad_y: Array) -> Array | None:
        """With g = ∂L/∂y, h = g · gamma = ∂L/∂x̂, means over the F features of a row, sums over the rows:

        ∂L/∂beta = Σ g,   ∂L/∂gamma = Σ g·x̂.

        As for BatchNorm, along the other axis, ∂x̂_i/∂x_j = (δ_ij - 1/F - x̂_i x̂_j/F) / σ, so

        ∂L/∂x = (h - mean(h) - x̂ · mean(h·x̂)) / σ.
        """
        xp, backend, work = self.xp, self.backend, self.work
        rows, normal = grad_y.reshape(work.normal.shape), work.normal
        if self.center:
            backend.sum_rows(rows, out=self.beta.grad)
        if self.scale:
            products = self.context.scratch("products", rows.shape)
            backend.sum_rows(xp.multiply(rows, normal, out=products), out=self.gamma.grad)
        if not self.wants_input_grad:
            return None
        grad_x = xp.multiply(rows, self.gamma.value if self.scale else 1.0, out=work.buffer("grad_x", rows.shape))
        return backend.normalize_rows_grad(grad_x, normal, work.sigma, out=grad_x).reshape(grad_y.shape)
