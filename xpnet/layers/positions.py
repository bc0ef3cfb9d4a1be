"""PositionalEmbedding: a learned vector for each position of a sequence."""

from typing import Any

from xpnet.backends import Array
from xpnet.config import integer
from xpnet.layers.base import Layer, checked_initializer
from xpnet.layers.context import Shape


class PositionalEmbedding(Layer):
    """y_t = x_t + weight_t, one learned vector for each position t: (N, T, C) → (N, T, C).

    max_length: the number of positions, the largest T. weight is (max_length, C); a shorter sequence uses its first
    rows. Weight decay applies to it, as to Embedding.
    """

    def __init__(self, max_length: int, *, weight_initializer: Any = "normal", name: str | None = None) -> None:
        super().__init__(name=name)
        self.max_length = integer(self, "max_length", max_length)
        self.weight_initializer = checked_initializer(self, "weight_initializer", weight_initializer)

    def build(self, input_shape: Shape) -> Shape:
        if len(input_shape) != 2:
            raise self.refuse("sequences (N, T, C)", input_shape)
        self._refuse_longer(input_shape[0])
        self.weight = self.add_parameter("weight", (self.max_length, input_shape[1]), self.weight_initializer)
        self.weight.is_table = True
        return input_shape

    def forward(self, x: Array) -> Array:
        first = self.past.steps if self.past else 0
        end = first + x.shape[1]
        self._refuse_longer(end)
        return self.xp.add(x, self.weight.value[first:end], out=self.work.buffer("y", x.shape))

    def backward(self, grad_y: Array) -> Array:
        """Row t of the weight is added to position t of every sample, so with the sum over the samples,

        ∂L/∂weight_t = Σ_n ∂L/∂y_nt,   ∂L/∂x = ∂L/∂y.

        Rows from T on are not used, and their gradient is 0.
        """
        length = grad_y.shape[1]
        self.backend.sum_rows(grad_y.reshape(len(grad_y), -1), out=self.weight.grad[:length].reshape(-1))
        self.weight.grad[length:] = 0.0
        return grad_y

    def _refuse_longer(self, length: int | None) -> None:
        if length is not None and length > self.max_length:
            raise self.refuse(
                f"at most {self.max_length} positions", f"{length} long",
                " Make max_length larger, or the sequences shorter.",
            )  # fmt: skip
