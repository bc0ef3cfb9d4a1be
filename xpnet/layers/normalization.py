"""BatchNorm, LayerNorm, RMSNorm, GroupNorm, InstanceNorm: a mean of 0 and a variance of 1, by batch or by sample."""

from typing import Any, ClassVar

from xpnet.backends import Array
from xpnet.config import flag, integer, is_integer, number
from xpnet.errors import ArgumentError, shown
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape


class _Normalization(Layer):
    """What all have in common: y = gamma · x̂ + beta for the normalized x̂, with one gamma and beta per feature."""

    _changeable = frozenset(("epsilon",))

    def __init__(
        self, epsilon: float = 1e-5, *, center: bool = True, scale: bool = True, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        self.epsilon = number(self, "epsilon", epsilon, above=0, finite=True)
        if self.epsilon >= 1:
            raise ArgumentError(
                f"{type(self).__name__}: epsilon must be below 1, not {shown(epsilon)}. The number of features is "
                "known from the layer before."
            )
        self.center, self.scale = flag(self, "center", center), flag(self, "scale", scale)

    def build(self, input_shape: Shape) -> Shape:
        if not input_shape or input_shape[-1] is None:
            raise self.refuse("(N, ..., features)", input_shape)
        features = input_shape[-1:]
        if self.scale:
            self.gamma = self.add_parameter("gamma", features, "ones", decay=False)
        if self.center:
            self.beta = self.add_parameter("beta", features, "zeros", decay=False)
        return input_shape


class BatchNorm(_Normalization):
    """Normalizes each feature by its mean and variance over the batch: (N, ..., features) → the same shape.

        y = gamma · x̂ + beta,   x̂ = (x - μ) / √(σ² + epsilon)

    In training, μ and σ² are those of the feature over the batch and all axes in between; for images (N, H, W, C), over
    N · H · W pixels. In inference they are the running mean and variance, `running_mean` and `running_var`, which each
    training batch updates: running += momentum · (new - running), with the unbiased variance. A batch of a single row
    has no variance: it is normalized by the running mean and variance, also in training, and does not update them.

    `scale=False` leaves out gamma, `center=False` beta. Weight decay applies to neither. If the layer is frozen
    (`trainable = False`), it normalizes by the running mean and variance in training too, and does not update them.

    If several processes share a batch, μ and σ² are those of the whole batch, or of each rank's own rows: see
    `distributed.Communicator`.

    Ioffe and Szegedy 2015, "Batch normalization: accelerating deep network training by reducing internal covariate
    shift".
    """

    _changeable = frozenset(("momentum", "epsilon"))

    def __init__(
        self,
        momentum: float = 0.1,
        epsilon: float = 1e-5,
        *,
        center: bool = True,
        scale: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(epsilon, center=center, scale=scale, name=name)
        try:
            self.momentum = number(self, "momentum", momentum, at_least=0, at_most=1)
        except ArgumentError as error:
            hint = " The number of features is known from the layer before." if is_integer(momentum) else ""
            raise ArgumentError(f"{error}{hint}") from None

    def build(self, input_shape: Shape) -> Shape:
        output_shape = super().build(input_shape)
        self.running_mean = self.add_buffer("running_mean", [0.0] * input_shape[-1])
        self.running_var = self.add_buffer("running_var", [1.0] * input_shape[-1])
        return output_shape

    def forward(self, x: Array) -> Array:
        """With σ = √(variance + epsilon), and x as rows (R, features):

        y = slope · (x - μ) + beta,   slope = gamma / σ.
        """
        xp, work = self.xp, self.work
        work.x = rows = x.reshape(-1, x.shape[-1])
        work.by_batch = False
        if self.context.training and self.trainable:
            work.mean, variance, work.count = self.context.batch_moments(rows)
            work.by_batch = work.count > 1
        if work.by_batch:
            self._update_running(work.mean, variance, work.count)
        else:
            work.mean, variance = self.running_mean.value, self.running_var.value
        work.sigma = xp.sqrt(variance + self.epsilon)
        work.slope = xp.divide(self.gamma.value if self.scale else 1.0, work.sigma)
        beta = self.beta.value if self.center else xp.zeros_like(work.mean)
        y = work.buffer("y", rows.shape)
        return self.backend.scale_shift(rows, work.mean, work.slope, beta, out=y).reshape(x.shape)

    def backward(self, grad_y: Array) -> Array | None:
        """With N rows, g = ∂L/∂y, and sums over the rows of a feature:

        ∂L/∂beta = Σ g,   ∂L/∂gamma = Σ g·x̂ = Σ g·(x - μ) / σ.

        x_j changes its own x̂_j directly, and every x̂_i through μ and σ: from ∂μ/∂x_j = 1/N and ∂σ/∂x_j = x̂_j/N,

        ∂x̂_i/∂x_j = (δ_ij - 1/N - x̂_i x̂_j/N) / σ,

        ∂L/∂x = gamma/σ · (g - ∂L/∂beta/N - x̂ · ∂L/∂gamma/N) = a·g + b·(x - μ) + c,

        a = gamma/σ,   b = -a/(N σ) · ∂L/∂gamma,   c = -a/N · ∂L/∂beta.

        The running mean and variance do not depend on x: with them, ∂L/∂x = a·g.
        """
        xp, backend, work = self.xp, self.backend, self.work
        rows, features = grad_y.reshape(work.x.shape), work.x.shape[1:]
        # Without gamma or beta, ∂L/∂x still needs these sums.
        grad_beta = self.beta.grad if self.center else work.buffer("grad_beta", features)
        grad_gamma = self.gamma.grad if self.scale else work.buffer("grad_gamma", features)
        backend.sum_rows(rows, out=grad_beta)
        backend.sum_products(rows, work.x, work.mean, out=grad_gamma)  # Σ g·(x - μ)
        grad_gamma /= work.sigma
        if not self.wants_input_grad:
            return None
        a, grad_x = work.slope, work.buffer("grad_x", work.x.shape)
        if not work.by_batch:
            return xp.multiply(rows, a, out=grad_x).reshape(grad_y.shape)
        grad_beta, grad_gamma = self.context.batch_sums(grad_beta, grad_gamma)
        per_row = a * (-1.0 / work.count)
        b = per_row * grad_gamma / work.sigma
        c = per_row * grad_beta
        return backend.combine(rows, a, work.x, work.mean, b, c, out=grad_x).reshape(grad_y.shape)

    def _update_running(self, mean: Array, variance: Array, count: int) -> None:
        """running += momentum · (new - running), where the new variance is unbiased: count / (count - 1) · variance."""
        weights = self.momentum, self.momentum * count / (count - 1)
        for running, new, weight in zip((self.running_mean, self.running_var), (mean, variance), weights, strict=True):
            running.value *= 1.0 - self.momentum
            running.value += new * weight


class _RowNormalization(_Normalization):
    """What LayerNorm and RMSNorm have in common: x as rows (R, features), each of which is normalized by itself."""

    #: Whether the mean of a row is subtracted.
    centered: ClassVar[bool] = True

    def _forward(self, x: Array) -> Array:
        work, rows = self.work, x.reshape(-1, x.shape[-1])
        work.normalized, work.sigma = work.buffer("normalized", rows.shape), work.buffer("sigma", (len(rows), 1))
        y = self.backend.normalize_and_scale(
            rows, self.centered, self.epsilon, self.gamma.value if self.scale else None,
            self.beta.value if self.center else None, work.normalized, work.sigma, out=work.buffer("y", rows.shape),
        )  # fmt: skip
        return y.reshape(x.shape)

    def _backward(self, grad_y: Array) -> Array | None:
        work, rows = self.work, grad_y.reshape(self.work.normalized.shape)
        grad_x = self.backend.normalize_and_scale_grad(
            rows, self.centered, self.gamma.value if self.scale else None, work.normalized, work.sigma,
            self.gamma.grad if self.scale else None, self.beta.grad if self.center else None,
            out=work.buffer("grad_x", rows.shape),
        )  # fmt: skip
        return grad_x.reshape(grad_y.shape) if self.wants_input_grad else None


class LayerNorm(_RowNormalization):
    """Normalizes each sample by the mean and variance of its features: (N, ..., features) → the same shape.

        y = gamma · x̂ + beta,   x̂ = (x - μ) / √(σ² + epsilon),   μ and σ² over the last axis

    It does the same in training and in inference. `scale=False` leaves out gamma, `center=False` beta. Weight decay
    applies to neither.

    Ba, Kiros and Hinton 2016, "Layer normalization".
    """

    def forward(self, x: Array) -> Array:
        """y = gamma · x̂ + beta, with x as rows (R, features)."""
        return self._forward(x)

    def backward(self, grad_y: Array) -> Array | None:
        """With g = ∂L/∂y, h = g · gamma = ∂L/∂x̂, means over the F features of a row, sums over the rows:

        ∂L/∂beta = Σ g,   ∂L/∂gamma = Σ g·x̂.

        As in BatchNorm, but over the features of a row, ∂x̂_i/∂x_j = (δ_ij - 1/F - x̂_i x̂_j/F) / σ, so

        ∂L/∂x = (h - mean(h) - x̂ · mean(h·x̂)) / σ.
        """
        return self._backward(grad_y)


class RMSNorm(_RowNormalization):
    """Divides each sample by the root mean square of its features: (N, ..., features) → the same shape.

        y = gamma · x̂,   x̂ = x / σ,   σ = √(mean(x²) + epsilon),   the mean over the last axis

    It is LayerNorm without the mean and without beta. Weight decay does not apply to gamma.

    Zhang and Sennrich 2019, "Root mean square layer normalization".
    """

    centered = False

    def __init__(self, epsilon: float = 1e-6, *, name: str | None = None) -> None:
        super().__init__(epsilon, center=False, name=name)

    def forward(self, x: Array) -> Array:
        """y = gamma · x̂, with x as rows (R, features)."""
        return self._forward(x)

    def backward(self, grad_y: Array) -> Array | None:
        """With g = ∂L/∂y, h = g · gamma = ∂L/∂x̂, means over the F features of a row, sums over the rows:

        ∂L/∂gamma = Σ g·x̂.

        From ∂σ/∂x_j = x_j / (F σ) = x̂_j / F follows ∂x̂_i/∂x_j = (δ_ij - x̂_i x̂_j / F) / σ, so

        ∂L/∂x = (h - x̂ · mean(h·x̂)) / σ.
        """
        return self._backward(grad_y)


class GroupNorm(_Normalization):
    """Normalizes groups of neighboring features of each sample: (N, ..., features) → the same shape.

        y = gamma · x̂ + beta,   x̂ = (x - μ) / √(σ² + epsilon)

    μ and σ² are those of the features / groups features of a group over all axes in between; for images (N, H, W, C),
    over H · W · C / groups numbers. `groups` must divide the number of features. gamma and beta are per feature;
    `scale=False` leaves out gamma, `center=False` beta. Weight decay applies to neither. It does the same in training
    and in inference, and does not depend on the other samples of the batch.

    Wu and He 2018, "Group normalization".
    """

    causal = False

    def __init__(
        self, groups: int, epsilon: float = 1e-5, *, center: bool = True, scale: bool = True, name: str | None = None
    ) -> None:
        super().__init__(epsilon, center=center, scale=scale, name=name)
        self.groups = integer(self, "groups", groups)

    def build(self, input_shape: Shape) -> Shape:
        output_shape = super().build(input_shape)
        if input_shape[-1] % self.groups:
            raise self.refuse(f"a number of features that groups={self.groups} divides", input_shape)
        return output_shape

    def forward(self, x: Array) -> Array:
        """y = gamma · x̂ + beta, where x̂ is computed of rows (N · groups, P · F): P positions, F features of a group."""
        backend, work, by_group = self.backend, self.work, self._by_group(x)
        rows = self.context.scratch("rows", (len(x) * self.groups, x.size // (len(x) * self.groups)))
        rows.reshape(by_group.shape)[...] = by_group
        work.normalized, work.sigma = work.buffer("normalized", rows.shape), work.buffer("sigma", (len(rows), 1))
        backend.normalize_rows(rows, self.epsilon, work.normalized, work.sigma)
        y = work.buffer("y", x.shape)
        self.xp.multiply(work.normalized.reshape(by_group.shape), self._gamma_by_group(), out=self._by_group(y))
        if self.center:
            backend.add_to_rows(y.reshape(-1, x.shape[-1]), self.beta.value)
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """With g = ∂L/∂y, h = g · gamma = ∂L/∂x̂, means over the numbers of a group, sums over samples and positions:

        ∂L/∂beta = Σ g,   ∂L/∂gamma = Σ g·x̂.

        As in LayerNorm, but over the numbers of a group,

        ∂L/∂x = (h - mean(h) - x̂ · mean(h·x̂)) / σ.
        """
        xp, backend, work, features = self.xp, self.backend, self.work, grad_y.shape[-1]
        by_group, normalized = self._by_group(grad_y), work.normalized
        if self.center:
            backend.sum_rows(grad_y.reshape(-1, features), out=self.beta.grad)
        if self.scale:
            products = self.context.scratch("products", grad_y.shape)
            xp.multiply(by_group, normalized.reshape(by_group.shape), out=self._by_group(products))
            backend.sum_rows(products.reshape(-1, features), out=self.gamma.grad)
        if not self.wants_input_grad:
            return None
        rows = self.context.scratch("rows", normalized.shape)
        xp.multiply(by_group, self._gamma_by_group(), out=rows.reshape(by_group.shape))
        backend.normalize_rows_grad(rows, normalized, work.sigma, out=rows)
        grad_x = work.buffer("grad_x", grad_y.shape)
        self._by_group(grad_x)[...] = rows.reshape(by_group.shape)
        return grad_x

    def _by_group(self, x: Array) -> Array:
        """x (N, ..., features) as (N, groups, P, F), for P positions and F features of a group."""
        return x.reshape(len(x), -1, self.groups, x.shape[-1] // self.groups).transpose(0, 2, 1, 3)

    def _gamma_by_group(self) -> Any:
        """gamma as (groups, 1, F), or 1."""
        return self.gamma.value.reshape(self.groups, 1, -1) if self.scale else 1.0


class InstanceNorm(GroupNorm):
    """Normalizes each feature of each sample by itself: (N, ..., features) → the same shape.

        y = gamma · x̂ + beta,   x̂ = (x - μ) / √(σ² + epsilon)

    μ and σ² are those of a feature over all axes in between; for images (N, H, W, C), over H · W pixels. That is
    GroupNorm with as many groups as features, and the arguments are the same.

    Ulyanov, Vedaldi and Lempitsky 2016, "Instance normalization: the missing ingredient for fast stylization".
    """

    def __init__(
        self, epsilon: float = 1e-5, *, center: bool = True, scale: bool = True, name: str | None = None
    ) -> None:
        super().__init__(1, epsilon, center=center, scale=scale, name=name)

    def build(self, input_shape: Shape) -> Shape:
        if len(input_shape) < 2:
            raise self.refuse("(N, ..., features) with axes in between, over which it normalizes", input_shape)
        self.groups = input_shape[-1]
        return super().build(input_shape)
