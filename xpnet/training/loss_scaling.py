"""Loss scaling: keeps gradients in float16 from being rounded to 0.

The gradient of the loss is multiplied by a scale before the backward pass and divided by it afterwards. If a gradient
overflows, the step is skipped and the scale is halved; after many steps without overflow it is doubled. All of this
happens on the device. Micikevicius et al. 2018, "Mixed precision training".
"""

from operator import attrgetter
from typing import Any

from xpnet.backends import Array, Backend
from xpnet.parameters import ParameterStore

_INITIAL_SCALE = 2.0**16
_MAX_SCALE = 2.0**24
_GROWTH_INTERVAL = 2000  # steps without overflow after which the scale is doubled


class LossScale:
    """The loss scale of one model.

    state: (2,), the scale and the number of steps since it last changed.  gate: 1 if the latest gradient can be used,
    0 if it overflowed; a 0-d float64 array, which the optimizer's update reads.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        with backend.device():
            self.state = backend.asarray([_INITIAL_SCALE, 0.0], dtype="float64")
            self.gate = backend.asarray(1.0, dtype="float64")

    def scale(self, grad: Array) -> None:
        """grad ← grad · scale."""
        grad *= self.state[0].astype(grad.dtype)

    def unscale(self, store: ParameterStore) -> None:
        """Divide all gradients that are used by the scale, note whether any overflowed, and adapt the scale."""
        xp: Any = self._backend.xp
        inverse = (1.0 / self.state[0]).astype(store.dtype)
        self.gate[...] = 1.0
        for part in store.slices(attrgetter("trainable")):
            grad = store.grads[part]
            grad *= inverse
            self.gate *= xp.isfinite(grad).all()
        scale, since = self.state[0], (self.state[1] + 1.0) * self.gate
        due = since >= _GROWTH_INTERVAL
        factor = xp.where(self.gate > 0.0, xp.where(due, 2.0, 1.0), 0.5)
        self.state[0] = xp.minimum(xp.maximum(scale * factor, 1.0), _MAX_SCALE)
        self.state[1] = xp.where(due, 0.0, since)
