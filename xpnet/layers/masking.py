"""Masking: marks the padded steps of sequences of features."""

from xpnet.backends import Array
from xpnet.config import number
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape


class Masking(Layer):
    """y = x, (N, T, C) → (N, T, C). A step whose features all equal `value` is padding and does not count.

    The layers after it ignore the padded steps: recurrent layers, attention, global pooling, losses and metrics.
    """

    _changeable = frozenset(("value",))
    starts_mask = True

    def __init__(self, value: float = 0.0, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.value = number(self, "value", value, finite=True)

    def build(self, input_shape: Shape) -> Shape:
        if len(input_shape) != 2:
            raise self.refuse("sequences (N, T, features)", input_shape)
        return input_shape

    def start_mask(self, x: Array) -> Array:
        """Whether any feature of a step differs from `value`, (N, T)."""
        return self.xp.any(x != self.value, axis=-1, out=self.work.buffer("counted", x.shape[:2], "bool"))

    def forward(self, x: Array) -> Array:
        """y = x."""
        return x

    def backward(self, grad_y: Array) -> Array:
        """∂L/∂x = ∂L/∂y."""
        return grad_y
