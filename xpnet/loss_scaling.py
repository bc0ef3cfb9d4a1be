"""Loss scaling, for gradients that float16 would round to 0.

The gradient of the loss is multiplied by a scale before it goes back through the model, and divided by it before it is
used. A gradient that overflows is not used, and halves the scale; after many that did not, it is doubled. All on the
device. Micikevicius et al. 2018, "Mixed precision training".
"""

from typing import Any

from xpnet.backends import Array, Backend
from xpnet.parameters import ParameterStore

_START = 2.0**16
_LARGEST = 2.0**24
_EVERY = 2000  # updates without overflow, after which the scale is doubled


class LossScale:
    """The scale of one model's gradient.

    gate: 1 where the latest gradient can be used, 0 where it has overflowed; in float64 without axes, as an update
    takes it.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        with backend.device():
            self.numbers = backend.asarray(
                [_START, 0.0], dtype="float64"
            )  # the scale, and updates since it last changed
            self.gate = backend.asarray(1.0, dtype="float64")

    def scale(self, grad: Array) -> None:
        """grad ← grad · scale."""
        grad *= self.numbers[0].astype(grad.dtype)

    def unscale(self, store: ParameterStore) -> None:
        """Take the scale out of all gradients, and see whether any has overflowed."""
        xp: Any = self._backend.xp
        store.grads *= (1.0 / self.numbers[0]).astype(store.dtype)
        finite = xp.isfinite(store.grads).all()
        self.gate[...] = finite
        scale, since = self.numbers[0], (self.numbers[1] + 1.0) * self.gate
        due = since >= _EVERY
        factor = xp.where(finite, xp.where(due, 2.0, 1.0), 0.5)
        self.numbers[0] = xp.minimum(xp.maximum(scale * factor, 1.0), _LARGEST)
        self.numbers[1] = xp.where(due, 0.0, since)
