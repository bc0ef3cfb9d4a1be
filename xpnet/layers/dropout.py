"""Dropout: in training, a random part of the features is set to 0."""

from xpnet.backends import Array
from xpnet.config import number
from xpnet.layers.base import Layer


class Dropout(Layer):
    """In training, each element is 0 with probability `rate`, else divided by 1 - rate. In inference, y = x.

    Any shape. The mask is a hash of (seed, layer, step, element), the same on every device. Srivastava et al. 2014,
    "Dropout: a simple way to prevent neural networks from overfitting".
    """

    _changeable = frozenset(("rate",))

    def __init__(self, rate: float, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.rate = number(self, "rate", rate, at_least=0, below=1)

    def forward(self, x: Array) -> Array:
        """y = mask · x, with a mask of 0 and 1 / (1 - rate)."""
        work = self.work
        if not (self.context.training and self.rate):
            work.mask = None
            return x
        work.mask = work.buffer("mask", x.shape)
        by_row = work.mask.reshape(len(x), -1)
        self.backend.dropout_mask(self.noise_key, self.rate, out=by_row, first_row=self.context.first_row)
        return self.xp.multiply(x, work.mask, out=work.buffer("y", x.shape))

    def backward(self, grad_y: Array) -> Array:
        """∂y/∂x = mask, so ∂L/∂x = mask · ∂L/∂y."""
        work = self.work
        if work.mask is None:
            return grad_y
        return self.xp.multiply(grad_y, work.mask, out=work.buffer("grad_x", grad_y.shape))
