"""Dropout: in training, silence a random part of the features."""

from xpnet.backends import Array
from xpnet.config import is_number
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer


class Dropout(Layer):
    """In training, each element is 0 with probability `rate` and otherwise divided by 1 - rate; else y = x.

    Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting". The mask is a hash of
    (seed, layer, step, element), the same on every device.
    """

    def __init__(self, rate: float) -> None:
        if not (is_number(rate) and 0 <= rate < 1):
            raise ArgumentError(f"Dropout: rate must be at least 0 and below 1, not {rate!r}.")
        self.rate = rate

    def forward(self, x: Array) -> Array:
        work = self.work
        if not (self.context.training and self.rate):
            work.mask = None
            return x
        work.mask = work.buffer("mask", x.shape)
        by_row = work.mask.reshape(len(x), -1)
        self.backend.dropout_mask(self.noise_key, self.rate, out=by_row, first_row=self.context.first_row)
        return self.xp.multiply(x, work.mask, out=work.buffer("y", x.shape))

    def backward(self, grad_y: Array) -> Array:
        """∂y/∂x = mask."""
        work = self.work
        if work.mask is None:
            return grad_y
        return self.xp.multiply(grad_y, work.mask, out=work.buffer("grad_x", grad_y.shape))
