"""Dense: every output is a weighted sum of all inputs."""

from typing import Any

from xpnet.backends import Array
from xpnet.config import flag, integer, penalties
from xpnet.errors import ArgumentError, ArgumentTypeError, shown
from xpnet.layers.base import Layer, checked_initializer
from xpnet.layers.context import Shape
from xpnet.layers.embedding import Embedding

_INITIALIZER = "glorot_uniform"


class Dense(Layer):
    """y = x @ weight + bias, over the last axis: (N, ..., in) → (N, ..., units).

    weight is (in, units), bias (units,); `use_bias=False` leaves the bias out. Initializers are names, objects, numbers
    or arrays. `l1`, `l2` ≥ 0 penalize the weight, not the bias: l1·Σ|w| + l2·Σw² is added to the loss.

    tied_to: an Embedding before it in the same model, whose table, transposed, is then the weight: y = x @ table.T +
    bias, and `units` must equal its vocabulary_size. The gradient of the table is the sum of those of both uses. The
    row of a padding index stays 0, so the output of that unit is its bias.
    Press and Wolf 2017, "Using the output embedding to improve language models".
    """

    _own_attributes = Layer._own_attributes | {"tied_to"}

    def __init__(
        self,
        units: int,
        *,
        use_bias: bool = True,
        weight_initializer: Any = _INITIALIZER,
        bias_initializer: Any = "zeros",
        l1: float = 0.0,
        l2: float = 0.0,
        tied_to: Embedding | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.units, self.use_bias = integer(self, "units", units), flag(self, "use_bias", use_bias)
        self.weight_initializer = checked_initializer(self, "weight_initializer", weight_initializer)
        self.bias_initializer = checked_initializer(self, "bias_initializer", bias_initializer)
        self.l1, self.l2 = penalties(self, l1, l2)
        self.tied_to = tied_to
        if tied_to is None:
            return
        if not isinstance(tied_to, Embedding):
            raise ArgumentTypeError(
                f"Dense: tied_to must be a layers.Embedding of the same model, not {shown(tied_to)}."
            )
        if self.units != tied_to.vocabulary_size:
            raise ArgumentError(
                f"Dense: units must be {tied_to.vocabulary_size}, the vocabulary_size of the Embedding in tied_to, not "
                f"{self.units}."
            )
        if not (isinstance(weight_initializer, str) and weight_initializer == _INITIALIZER) or self.l1 or self.l2:
            raise ArgumentError("Dense: with tied_to, give weight_initializer, l1 and l2 to the Embedding.")

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        return config if self.tied_to is not None else {k: v for k, v in config.items() if k != "tied_to"}

    def build(self, input_shape: Shape) -> Shape:
        if not input_shape:
            raise self.refuse("(N, ..., features)", input_shape)
        if self.tied_to is None:
            shape = (input_shape[-1], self.units)
            self.weight = self.add_parameter("weight", shape, self.weight_initializer, l1=self.l1, l2=self.l2)
        elif input_shape[-1] != self.tied_to.features:
            raise self.refuse(f"{self.tied_to.features} features, as the Embedding in tied_to has", input_shape)
        else:
            self.weight = self.add_tied_parameter("weight", self.tied_to)
            self.tied_to = self.in_this_model(self.tied_to)
        if self.use_bias:
            self.bias = self.add_parameter("bias", (self.units,), self.bias_initializer, decay=False)
        return (*input_shape[:-1], self.units)

    def forward(self, x: Array) -> Array:
        """y = x @ weight + bias, with x as rows (R, in). In half precision the product takes rounded copies of both."""
        work, backend = self.work, self.backend
        work.x, work.weight = backend.cast(x.reshape(-1, x.shape[-1])), backend.cast(self.weight.value)
        if self.tied_to is not None:
            work.weight = work.weight.T
        y = work.buffer("y", (len(work.x), self.units))
        backend.matmul(work.x, work.weight, out=y)
        if self.tied_to is not None and self.tied_to.padding_index is not None:
            y[:, self.tied_to.padding_index] = 0.0
        if self.use_bias:
            backend.add_to_rows(y, self.bias.value)
        return y.reshape(*x.shape[:-1], self.units)

    def backward(self, grad_y: Array) -> Array | None:
        """With y_j = Σ_i x_i w_ij + b_j for each row:

        ∂L/∂w_ij = Σ_rows x_i ∂L/∂y_j,   ∂L/∂b_j = Σ_rows ∂L/∂y_j,   ∂L/∂x_i = Σ_j ∂L/∂y_j w_ij;

        ∂L/∂w = xᵀ @ ∂L/∂y is (in, units), and ∂L/∂x = ∂L/∂y @ wᵀ is (R, in). For a table, ∂L/∂table = ∂L/∂yᵀ @ x.
        """
        work, backend = self.work, self.backend
        grad_rows = grad_y.reshape(-1, self.units)
        grad = backend.cast(grad_rows)
        if self.tied_to is None:
            backend.matmul(work.x.T, grad, out=self.weight.grad)
        else:
            backend.matmul(grad.T, work.x, out=self.weight.grad)
            if self.tied_to.padding_index is not None:
                self.weight.grad[self.tied_to.padding_index] = 0.0
        if self.use_bias:
            backend.sum_rows(grad_rows, out=self.bias.grad)
        if not self.wants_input_grad:
            return None
        grad_x = work.buffer("grad_x", work.x.shape)
        backend.matmul(grad, work.weight.T, out=grad_x)
        return grad_x.reshape(*grad_y.shape[:-1], work.x.shape[1])
