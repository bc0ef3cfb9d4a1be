"""Every weight of a model in one flat vector, handed out as named, shaped views.

So an optimiser is a few elementwise lines over one array, clipping is one norm, and a checkpoint is a table of views.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy

from xpnet.backends import Array, Backend
from xpnet.config import is_number
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError, StateError
from xpnet.initializers import Initializer

_ALIGNMENT = 16  # elements: each parameter starts on a cache line of its own, in float32 as in float64
_WEIGHT_STREAM = 1  # keeps the draws of weights apart from those of epoch permutations


class Parameter:
    """A trained array: `value` and `grad` are live, writable views of the model's two flat vectors.

    name: where it stands, such as "0.weight".  shape: its shape.  trainable: False freezes it.
    decay: whether the optimiser's weight decay applies.  l1, l2: penalties l1 · Σ|w| + l2 · Σw² of its layer.
    """

    def __init__(
        self, name: str, shape: Sequence[int], initializer: Initializer, decay: bool, l1: float, l2: float
    ) -> None:
        if not (is_number(l1) and is_number(l2) and 0 <= l1 < math.inf and 0 <= l2 < math.inf):
            raise ArgumentError(f"{name}: penalties must be finite numbers of at least 0, but l1={l1!r} and l2={l2!r}.")
        self.name, self.shape, self.initializer = name, tuple(shape), initializer
        self.trainable, self.decay, self.l1, self.l2 = True, decay, l1, l2
        self.slot = slice(0, 0)
        self._value: Array = None
        self._grad: Array = None
        self._backend: Backend | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def value(self) -> Array:
        return self._value

    @value.setter
    def value(self, new: Any) -> None:
        self._fill(self._value, new)

    @property
    def grad(self) -> Array:
        return self._grad

    @grad.setter
    def grad(self, new: Any) -> None:
        self._fill(self._grad, new)

    def bind(self, backend: Backend, values: Array, grads: Array) -> None:
        """Become a view of these flat vectors."""
        self._backend = backend
        self._value = values[self.slot].reshape(self.shape)
        self._grad = grads[self.slot].reshape(self.shape)

    def _fill(self, view: Array, new: Any) -> None:
        if self._backend is None:
            raise StateError(f"{self.name} has no values yet: build the model first.")
        with self._backend.device():
            array = None if new is None else self._backend.asarray(new)
            if array is None or array.dtype.kind not in "fiub":
                raise ArgumentTypeError(f"{self.name} takes real numbers, not {new!r}.")
            if array.shape not in (self.shape, ()):
                raise ShapeError(f"{self.name} has shape {self.shape}, but the new value has shape {array.shape}.")
            view[...] = array

    def __repr__(self) -> str:
        return f"<Parameter {self.name} {self.shape}{'' if self.trainable else ', frozen'}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_value": None, "_grad": None, "_backend": None}


class Buffer:
    """An array that is saved and moved with the model but not trained, such as running statistics."""

    def __init__(self, name: str, value: Array) -> None:
        self.name, self.value = name, value

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "value": None}  # the store carries the value, through the host


class ParameterStore:
    """The two flat vectors of one model, `values` and `grads`, its parameters and its buffers."""

    def __init__(self, backend: Backend, dtype: Any) -> None:
        self.backend, self.dtype = backend, numpy.dtype(dtype)
        self.parameters: list[Parameter] = []
        self.buffers: list[Buffer] = []
        self.values: Array = None
        self.grads: Array = None
        self._runs: dict[tuple[bool, ...], list[slice]] = {}  # that were asked for before

    @property
    def allocated(self) -> bool:
        return self.values is not None

    def allocate(self, seed: int) -> None:
        """Lay all declared parameters out in memory and draw their first values.

        Each parameter has a random stream of its own, from the seed and its name: a layer more changes no other.
        """
        end = 0
        for parameter in self.parameters:
            parameter.slot = slice(end, end + parameter.size)
            end += -(-parameter.size // _ALIGNMENT) * _ALIGNMENT
        flat = numpy.zeros(end)
        for parameter in self.parameters:
            rng = numpy.random.default_rng([seed, _WEIGHT_STREAM, zlib.crc32(parameter.name.encode())])
            flat[parameter.slot] = parameter.initializer(parameter.shape, rng).ravel()
        self._bind(flat)

    def move(self, backend: Backend, dtype: Any) -> None:
        """Carry everything to another device or dtype; the Parameter objects stay the same."""
        values, grads = self.backend.to_numpy(self.values), self.backend.to_numpy(self.grads)
        buffers = [self.backend.to_numpy(buffer.value) for buffer in self.buffers]
        dtype = numpy.dtype(dtype)
        for buffer, value in zip(self.buffers, buffers, strict=True):
            floating = numpy.issubdtype(value.dtype, numpy.floating)
            buffer.value = backend.asarray(value.astype(dtype if floating else value.dtype))
        self.backend, self.dtype = backend, dtype
        self._bind(values, grads)

    def runs(self, wanted: Callable[[Parameter], bool]) -> list[slice]:
        """The stretches of the flat vectors that hold the wanted parameters, in as few pieces as there are runs."""
        choice = tuple(map(wanted, self.parameters))
        if choice not in self._runs:
            found = self._runs[choice] = []
            for parameter, now, before in zip(self.parameters, choice, (False, *choice), strict=False):
                if now:
                    start = found.pop().start if before else parameter.slot.start
                    found.append(slice(start, parameter.slot.stop))
        return self._runs[choice]

    def arrays(self) -> list[Parameter | Buffer]:
        """All that is saved and moved: parameters, then buffers."""
        return [*self.parameters, *self.buffers]

    def state(self) -> dict[str, numpy.ndarray[Any, Any]]:
        """{name: copy on the host} of all of them."""
        return {a.name: numpy.array(self.backend.to_numpy(a.value)) for a in self.arrays()}

    def penalty(self) -> Array | None:
        """Σ over trained parameters of l1 · Σ|w| + l2 · Σw², on the device in float64; None where there are none."""
        xp, total = self.backend.xp, None
        for p in self._penalised():
            term = xp.zeros((), dtype=xp.float64)
            if p.l1:
                term += p.l1 * xp.sum(xp.abs(p.value), dtype=xp.float64)
            if p.l2:
                term += p.l2 * xp.sum(xp.square(p.value), dtype=xp.float64)
            total = term if total is None else total + term
        return total

    def add_penalty_gradients(self) -> None:
        """Add ∂penalty/∂w = l1 · sign(w) + 2 · l2 · w to each gradient."""
        xp = self.backend.xp
        for p in self._penalised():
            if p.l1:
                p.grad += p.l1 * xp.sign(p.value)
            if p.l2:
                p.grad += (2.0 * p.l2) * p.value

    def _penalised(self) -> list[Parameter]:
        return [p for p in self.parameters if (p.l1 or p.l2) and p.trainable]

    def _bind(self, values: Any, grads: Any = None) -> None:
        with self.backend.device():
            self.values = self.backend.zeros(values.shape, self.dtype)
            self.grads = self.backend.zeros(values.shape, self.dtype)
            self.values[...] = self.backend.asarray(values, dtype=self.dtype)
            if grads is not None:
                self.grads[...] = self.backend.asarray(grads, dtype=self.dtype)
            for parameter in self.parameters:
                parameter.bind(self.backend, self.values, self.grads)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles go through the host, whatever the device.
        if not self.allocated:
            return self.__dict__
        to_numpy = self.backend.to_numpy
        buffers = [(b, to_numpy(b.value)) for b in self.buffers]
        return {**self.__dict__, "values": to_numpy(self.values), "grads": to_numpy(self.grads), "buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.allocated:
            self.buffers = []
            for buffer, value in state["buffers"]:
                buffer.value = self.backend.asarray(value)
                self.buffers.append(buffer)
            self._bind(self.values, self.grads)


class Snapshot:
    """A copy, on the device, of a model's values and buffers and of `more` arrays, to go back to."""

    def __init__(self, store: ParameterStore, more: Iterable[Array] = ()) -> None:
        self._buffers = store.buffers
        self._arrays = [(array, array.copy()) for array in (store.values, *more)]
        self._buffer_copies = [buffer.value.copy() for buffer in store.buffers]

    def take(self) -> None:
        """Overwrite the copy with what is there now."""
        for array, copy in self._arrays:
            copy[...] = array
        for buffer, copy in zip(self._buffers, self._buffer_copies, strict=True):
            copy[...] = buffer.value

    @property
    def copies(self) -> list[Array]:
        """The copies themselves, in a fixed order."""
        return [*(copy for _, copy in self._arrays), *self._buffer_copies]

    def restore(self) -> None:
        """Overwrite what is there now with the copy."""
        for array, copy in self._arrays:
            array[...] = copy
        for buffer, copy in zip(self._buffers, self._buffer_copies, strict=True):
            buffer.value[...] = copy
