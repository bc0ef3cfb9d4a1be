"""Dense: every output is a weighted sum of all inputs."""

from typing import Any

from xpnet.backends import Array
from xpnet.config import flag, integer, penalties
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape


class Dense(Layer):
    """y = x @ weight + bias, over the last axis: (N, ..., in) → (N, ..., units).

    weight is (in, units), bias (units,); `use_bias=False` leaves the bias out. Initializers are names, objects, numbers
    or arrays. `l1`, `l2` ≥ 0 penalize the weight, not the bias: l1·Σ|w| + l2·Σw² is added to the loss.
    """

    def __init__(
        self,
        units: int,
        *,
        use_bias: bool = True,
        weight_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        l1: float = 0.0,
        l2: float = 0.0,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.units, self.use_bias = integer(self, "units", units), flag(self, "use_bias", use_bias)
        self.weight_initializer, self.bias_initializer = weight_initializer, bias_initializer
        self.l1, self.l2 = penalties(self, l1, l2)

    def build(self, input_shape: Shape) -> Shape:
        if not input_shape:
            raise self.refuse("(N, ..., features)", input_shape)
        shape = (input_shape[-1], self.units)
        self.weight = self.add_parameter("weight", shape, self.weight_initializer, l1=self.l1, l2=self.l2)
        if self.use_bias:
            self.bias = self.add_parameter("bias", (self.units,), self.bias_initializer, decay=False)
        return (*input_shape[:-1], self.units)

    def forward(self, x: Array) -> Array:
        """y = x @ weight + bias, with x as rows (R, in). In half precision the product takes rounded copies of both."""
        work, backend = self.work, self.backend
        work.x, work.weight = backend.cast(x.reshape(-1, x.shape[-1])), backend.cast(self.weight.value)
        y = work.buffer("y", (len(work.x), self.units))
        backend.matmul(work.x, work.weight, out=y)
        if self.use_bias:
            backend.add_to_rows(y, self.bias.value)
        return y.reshape(*x.shape[:-1], self.units)

    def backward(self, grad_y: Array) -> Array | None:
        """With y_j = Σ_i x_i w_ij + b_j for each row:

        ∂L/∂w_ij = Σ_rows x_i ∂L/∂y_j,   ∂L/∂b_j = Σ_rows ∂L/∂y_j,   ∂L/∂x_i = Σ_j ∂L/∂y_j w_ij;

        ∂L/∂w = xᵀ @ ∂L/∂y is (in, units), and ∂L/∂x = ∂L/∂y @ wᵀ is (R, in).
        """
        work, backend = self.work, self.backend
        grad_rows = grad_y.reshape(-1, self.units)
        grad = backend.cast(grad_rows)
        backend.matmul(work.x.T, grad, out=self.weight.grad)
        if self.use_bias:
            backend.sum_rows(grad_rows, out=self.bias.grad)
        if not self.wants_input_grad:
            return None
        grad_x = work.buffer("grad_x", work.x.shape)
        backend.matmul(grad, work.weight.T, out=grad_x)
        return grad_x.reshape(*grad_y.shape[:-1], work.x.shape[1])
