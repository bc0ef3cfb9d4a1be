"""Past: what layers keep of the earlier steps of sequences that `xpnet.generate` continues."""

from types import SimpleNamespace
from typing import Any

from xpnet.backends import Array, Backend


class Past(SimpleNamespace):
    """What one layer keeps of earlier steps, as attributes. It starts empty.

    steps: how many steps came before those of x.
    """

    def __init__(self, continuation: "Continuation") -> None:
        super().__init__()
        self._continuation = continuation

    @property
    def steps(self) -> int:
        return self._continuation.steps

    def joined(self, name: str, new: Array) -> Array:
        """The array `name` of all steps up to now, (N, steps + T, ...): of earlier steps, and `new` (N, T, ...)."""
        kept, end = vars(self).get(name), self.steps + new.shape[1]
        if kept is None:
            shape = (len(new), self._continuation.most_steps, *new.shape[2:])
            kept = vars(self)[name] = self._continuation.backend.empty(shape, new.dtype)
        kept[:, self.steps : end] = new
        return kept[:, :end]

    def preceded(self, name: str, new: Array, most: int) -> Array:
        """`new` (N, T, ...), after at most the last `most` of the earlier steps of the array `name`."""
        kept = vars(self).get(name)
        array = new if kept is None else self._continuation.backend.xp.concatenate([kept, new], axis=1)
        vars(self)[name] = array[:, max(array.shape[1] - most, 0) :].copy()
        return array


class Continuation:
    """Sequences that are computed in pieces: a pass takes only the steps that follow those of earlier passes.

    steps: how many steps earlier passes have computed.  most_steps: how many there will be at most.
    """

    def __init__(self, backend: Backend, most_steps: int) -> None:
        self.backend, self.most_steps, self.steps = backend, most_steps, 0
        self._pasts: dict[Any, Past] = {}

    def past_of(self, layer: Any) -> Past:
        """What a layer keeps. A layer that is called several times is another object in each call."""
        past = self._pasts.get(layer)
        if past is None:
            past = self._pasts[layer] = Past(self)
        return past
