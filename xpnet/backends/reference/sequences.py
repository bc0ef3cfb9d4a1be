"""Operators on sequences (N, T, C): the mean and the maximum over the steps that count.

A mask (N, T) is nonzero where a step counts; without one (None) all steps count. What a masked step holds, NaN too, has
no effect.
"""

import math

from xpnet.backends.arrays import Array
from xpnet.backends.base import Device


class SequenceOperators(Device):
    def mean_steps(self, x: Array, mask: Array | None, out: Array) -> Array:
        """out (N, C) = the mean of x (N, T, C) over the steps that count, summed in float64; 0 where none counts."""
        xp = self.xp
        if mask is None:
            return xp.mean(x, axis=1, dtype=xp.float64, out=out)
        counted = xp.where(mask[:, :, None], x, xp.zeros((), dtype=x.dtype))
        return xp.multiply(xp.sum(counted, axis=1, dtype=xp.float64), self._inverse_counts(mask), out=out)

    def mean_steps_grad(self, grad: Array, mask: Array | None, out: Array) -> Array:
        """The adjoint of `mean_steps`: out (N, T, C) = grad (N, C) / the number of steps that count, or 0."""
        if mask is None:
            return self.xp.multiply(grad[:, None], 1.0 / out.shape[1], out=out)
        return self.xp.multiply((grad * self._inverse_counts(mask))[:, None], mask[:, :, None], out=out)

    def _inverse_counts(self, mask: Array) -> Array:
        """1 / the number of steps that count, (N, 1) in float64."""
        counts = self.xp.sum(mask, axis=1, keepdims=True, dtype=self.xp.float64)
        return 1.0 / self.xp.maximum(counts, 1.0)

    def max_steps(self, x: Array, mask: Array | None, out: Array, choice: Array) -> Array:
        """out (N, C) = the largest of x (N, T, C) over the steps that count; choice (N, C) = the number of its step.

        Where no step counts, they are 0 and -1. Of equal numbers the first is chosen. NaN counts as larger than any.
        """
        xp = self.xp
        if mask is not None:
            x = xp.where(mask[:, :, None], x, xp.full((), -math.inf, dtype=x.dtype))
        choice[...] = xp.argmax(x, axis=1)
        xp.max(x, axis=1, out=out)
        if mask is not None:
            empty = xp.logical_not(xp.any(mask, axis=1, keepdims=True))
            xp.copyto(out, 0.0, where=empty)
            xp.copyto(choice, -1, where=empty)
        return out

    def max_steps_grad(self, grad: Array, choice: Array, out: Array) -> Array:
        """The gradient of `max_steps` with respect to x: out (N, T, C) = grad (N, C) at the chosen step, else 0."""
        xp = self.xp
        xp.equal(xp.arange(out.shape[1])[:, None], choice[:, None], out=out)
        return xp.multiply(out, grad[:, None], out=out)
