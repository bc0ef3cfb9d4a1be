"""Parameters: all weights of a model are stored in one flat vector, and each Parameter is a named view of it.

Therefore an update is a few elementwise lines over one array, clipping one norm, and a checkpoint a table of views.
"""

import copy
import math
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import numpy

from xpnet.backends import Array, Backend
from xpnet.backends.arrays import refuse_masked
from xpnet.concurrency.guard import ModelGuard
from xpnet.config import ExplainedAttributes, flag, number
from xpnet.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    DeviceMemoryError,
    ShapeError,
    StateError,
)
from xpnet.initializers import Initializer

__all__ = ["Buffer", "ModelArray", "Parameter", "ParameterStore", "Parameters", "Snapshot"]

_ALIGNMENT = 16  # elements: each parameter starts on a cache line, in float32 and in float64
_SETTINGS = frozenset(("trainable", "decay", "l1", "l2", "shared_l2"))  # which models that share a parameter share too
_WEIGHT_STREAM = 1  # keeps the random numbers of weights apart from those of the epochs' permutations


A = TypeVar("A", bound="Parameter | Buffer")


class ModelArray(ExplainedAttributes):
    """A named array of a model. Assigning to `value` writes into the array, which stays the same object."""

    name: str
    shape: tuple[int, ...]
    _value: Array = None
    _root: "ModelArray | None" = None  # the array of another model whose memory this one shares
    _backend: Backend | None = None
    _guard: ModelGuard | None = None

    @property
    def root(self) -> "ModelArray":
        """This array, or the one of another model whose memory it shares."""
        return self if self._root is None else self._root

    @property
    def value(self) -> Array:
        return self._value

    @value.setter
    def value(self, new: Any) -> None:
        self.assign(new)

    def assign(self, new: Any, label: str = "") -> None:
        """Write an array of this shape, or one number, into `value`. label: what errors call it."""
        self._fill(self._value, new, label or self.name)

    def _fill(self, view: Array, new: Any, label: str) -> None:
        if new is view and view is not None:  # after view *= 2
            return
        if self._backend is None or self._guard is None:
            raise StateError(f"{label} has no values yet: build the model first.")
        refuse_masked(new, label)
        self._guard.refuse_beside_training()
        with self._guard.lock, self._backend.device():
            array = None if new is None else self._converted(new)
            if array is None or array.dtype.kind not in "fiub":
                what = f"an array of {new.dtype}" if hasattr(new, "dtype") else repr(new)
                raise ArgumentTypeError(f"{label} must be real numbers, not {what}.")
            if array.shape not in (view.shape, ()):
                raise ShapeError(f"{label} has shape {tuple(view.shape)}, but the new value has shape {array.shape}.")
            with numpy.errstate(over="ignore"):
                converted = array.astype(view.dtype, copy=False)
            isfinite = self._backend.xp.isfinite
            if (
                array.dtype.kind == "f"
                and converted is not array
                and bool((isfinite(array) & ~isfinite(converted)).any())
            ):
                raise DataError(f"{label}: the new value has numbers that are too large for {view.dtype}.")
            view[...] = converted

    def _converted(self, new: Any) -> Array | None:
        try:
            return self._backend.asarray(new)  # type: ignore[union-attr]
        except (TypeError, ValueError):  # ragged lists; on a GPU, text
            return None

    def __bool__(self) -> bool:
        return True  # despite __len__, since `if self.bias:` asks whether there is a bias

    def _not_an_array(self, *_: Any, **__: Any) -> Any:
        """Raise ArgumentTypeError: this object was used as an array.

        numpy.asarray is refused too: writes into a copy would be lost, and a captured step would keep it as a constant.
        """
        raise ArgumentTypeError(f"{self._what}, not an array. {self._use_value}")

    @property
    def _what(self) -> str:
        return f"{self.__dict__.get('name', 'this')} is a {type(self).__name__}"

    @property
    def _described(self) -> str:
        return f"{self._what}, which"

    @property
    def _use_value(self) -> str:
        return f"Its array is its value: layer.{self.name.rpartition('.')[2]}.value."

    def _attribute_suggestion(self, name: str) -> str:
        return self._use_value

    def _settable(self) -> Sequence[str]:
        return "trainable", "initializer"

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__:
            self._refuse_misnamed(name)
        super().__setattr__(name, value)

    if not TYPE_CHECKING:  # type checkers would accept any operand
        __array__ = __array_ufunc__ = __array_function__ = _not_an_array
        __getitem__ = __setitem__ = __len__ = __iter__ = __contains__ = __float__ = __int__ = _not_an_array
        __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = __matmul__ = _not_an_array
        __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = _not_an_array
        __rmatmul__ = __neg__ = __pos__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = _not_an_array


class Parameters(list["Parameter"]):
    """A list of parameters. Calling it, as PyTorch's method `parameters()`, raises an error that says what to do."""

    def __call__(self) -> Any:
        raise ArgumentTypeError(
            "parameters is a list, not a method: leave out the parentheses. Optimizers take no parameters: give "
            "optimizers.Adam(0.01) to fit, train_on_batch or apply_gradients."
        )


class Parameter(ModelArray):
    """An array that is trained: `value` and `grad` are live, writable views of the model's two flat vectors.

    name: its name in the model, such as "0.weight".  trainable: set it to False to freeze the parameter.  decay:
    whether the optimizer's weight decay applies.  l1, l2: penalties l1 · Σ|w| + l2 · Σw², added to the loss.
    shared_l2: another penalty, shared_l2 · Σw² / (the number of samples of the step, or the sum of their weights).
    is_table: whether rows are looked up, as in Embedding.  is_tied: whether another layer uses it too, as its weight.
    """

    _advice = "Parameter"
    is_table = is_tied = False

    def __init__(
        self, name: str, shape: Sequence[int], initializer: Initializer, decay: bool, l1: float, l2: float
    ) -> None:
        self._shared_by: weakref.WeakSet[Parameter] = weakref.WeakSet()
        self.name, self.shape, self.initializer = name, tuple(shape), initializer
        self.l1, self.l2, self.shared_l2 = l1, l2, 0.0
        self.trainable, self.decay = True, decay
        self.slot = slice(0, 0)  # of both flat vectors
        self._grad: Array = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("trainable", "decay"):
            value = flag(self.name, name, value)
        elif name in _SETTINGS:
            value = number(self.name, name, value, at_least=0, finite=True)
        super().__setattr__(name, value)
        if name in _SETTINGS and isinstance(root := self.root, Parameter):
            for other in (root, *root._shared_by):
                vars(other)[name] = value

    def sharing(self, name: str) -> "Parameter":
        """A parameter for another model, with the memory and the settings of this one."""
        twin = copy.copy(self)
        twin.name, twin._root, twin._shared_by = name, self, weakref.WeakSet()
        self._shared_by.add(twin)
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _shared_by=weakref.WeakSet())

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def grad(self) -> Array:
        return self._grad

    @grad.setter
    def grad(self, new: Any) -> None:
        self._fill(self._grad, new, f"the gradient of {self.name}")

    def bind(self, backend: Backend, values: Array, grads: Array, guard: ModelGuard) -> None:
        """Make `value` and `grad` views of these flat vectors."""
        self._backend, self._guard = backend, guard
        self._value = values[self.slot].reshape(self.shape)
        self._grad = grads[self.slot].reshape(self.shape)

    def __repr__(self) -> str:
        return f"<Parameter {self.name} {self.shape}{'' if self.trainable else ', frozen'}>"

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in self.__dict__.items() if name not in ("_root", "_shared_by")}
        return {**own, "_value": None, "_grad": None, "_backend": None}


class Buffer(ModelArray):
    """An array that is saved and moved with the model but not trained, such as running statistics."""

    _advice = "Buffer"

    def __init__(self, name: str, backend: Backend, value: Array, guard: ModelGuard) -> None:
        self.name, self.shape = name, tuple(value.shape)
        self.bind(backend, value, guard)

    def bind(self, backend: Backend, value: Array, guard: ModelGuard) -> None:
        """Make this array the value."""
        self._backend, self._value, self._guard = backend, value, guard

    def sharing(self, name: str) -> "Buffer":
        """A buffer for another model, with the memory of this one."""
        assert self._backend is not None
        assert self._guard is not None
        twin = Buffer(name, self._backend, self._value, self._guard)
        twin._root = self
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "shape": self.shape}  # the store copies the value through the host


class ParameterStore:
    """The two flat vectors of a model, `values` and `grads`, and its own parameters and buffers.

    Models that share layers have one pair of vectors. Each of them has a store with its own parameters, which have its
    names, and trains only the parts of the vectors that these fill.
    """

    def __init__(self, backend: Backend, dtype: Any) -> None:
        self.backend, self.dtype = backend, numpy.dtype(dtype)
        self.guard = ModelGuard()
        self.parameters: list[Parameter] = []
        self.buffers: list[Buffer] = []
        self.values: Array = None
        self.grads: Array = None
        self.models: weakref.WeakSet[Any] = weakref.WeakSet()  # the model with this store
        #: All stores with these vectors.
        self.family: weakref.WeakSet[ParameterStore] = weakref.WeakSet([self])
        self._sources: list[ParameterStore] = []  # the stores of shared parameters, until `allocate`
        self._slices: dict[tuple[bool, ...], list[slice]] = {}  # results of `slices`

    def share(self, array: A, store: "ParameterStore", name: Callable[[], str]) -> A:
        """The parameter or buffer of this store with the memory of one of another store. name: of a new one."""
        for own in self.arrays():
            if own.root is array.root:
                return own  # type: ignore[return-value]
        if (store.backend, store.dtype) != (self.backend, self.dtype):
            raise ArgumentError(
                f"{array.name} is shared with a model in {store.dtype} on {store.backend.name}, but this model is in "
                f"{self.dtype} on {self.backend.name}. Give models that share layers the same backend and dtype."
            )
        self._sources.append(store)
        twin: Any = array.root.sharing(name())  # type: ignore[attr-defined]
        (self.parameters if isinstance(twin, Parameter) else self.buffers).append(twin)
        return twin  # type: ignore[no-any-return]

    @property
    def sharing(self) -> "list[ParameterStore]":
        """This store, and those of other models that have some of its parameters."""
        roots = {parameter.root for parameter in self.parameters}
        return [
            store
            for store in self.family
            if store is self or not roots.isdisjoint(parameter.root for parameter in store.parameters)
        ]

    @property
    def allocated(self) -> bool:
        return self.values is not None

    def allocate(self, seed: int, state: Mapping[str, numpy.ndarray[Any, Any]] | None = None) -> None:
        """Make the flat vectors for all declared parameters, and draw the first values of those that are new.

        Each parameter has its own random generator, seeded by `seed` and its name, so other layers do not affect it.
        state: {name: host array} of parameters and buffers, used instead. Raises the errors of `refuse_state`.

        If parameters are shared with other models, the vectors of these grow by the new parameters.
        """
        if state is not None:
            self.refuse_state(state)  # before memory is allocated for sizes that may be wrong
        self._refuse_too_large()
        new = [parameter for parameter in self.parameters if parameter.root is parameter]
        slots, end = _slots(new)
        for parameter, slot in zip(new, slots, strict=True):
            parameter.slot = slot
        flat = numpy.zeros(end)
        for parameter in new if state is None else ():
            rng = numpy.random.default_rng([seed, _WEIGHT_STREAM, zlib.crc32(parameter.name.encode())])
            flat[parameter.slot] = self._first_values(parameter, rng).ravel()
        self._join(flat)
        if state is not None:
            for array in self.arrays():  # also those of a nested model that was built before
                array.value[...] = self.backend.asarray(state[array.name])

    def _join(self, new_values: Any) -> None:
        """Make new vectors for the parameters of this model and of all that share some with it, directly or not."""
        families = [list(family) for family in {id(s.family): s.family for s in self._sources}.values()]
        stores = [store for family in families for store in family] + [self]
        with ExitStack() as locks:
            for family in families:
                locks.enter_context(family[0].guard.lock)
                family[0].guard.refuse_during_training()
            held: dict[Any, tuple[Any, Any]] = {
                p.root: (new_values[p.slot], 0.0) for p in self.parameters if p.root is p
            }
            for family in families:
                values, grads = (self.backend.to_numpy(vector) for vector in (family[0].values, family[0].grads))
                held |= {p.root: (values[p.slot], grads[p.slot]) for store in family for p in store.parameters}
            roots: Any = list(dict.fromkeys(p.root for store in stores for p in store.parameters))
            slots, end = _slots(roots)
            values, grads, places = numpy.zeros(end), numpy.zeros(end), dict(zip(roots, slots, strict=True))
            for root, slot in places.items():
                values[slot], grads[slot] = held[root]
            together, guard = weakref.WeakSet(stores), stores[0].guard
            for store in stores:
                store.family, store.guard, store._slices = together, guard, {}
                for p in store.parameters:
                    p.slot = places[p.root]
            self._sources = []
            self._bind(values, grads)

    def gathered(self, vector: Array) -> Array:
        """The parts of a vector that belong to this model's parameters, in the layout of a model that shares none."""
        alone, size = _slots(self.parameters)
        if alone == [parameter.slot for parameter in self.parameters] and size == len(vector):
            return vector
        own = self.backend.zeros((size,), vector.dtype)
        for parameter, slot in zip(self.parameters, alone, strict=True):
            own[slot] = vector[parameter.slot]
        return own

    def scatter(self, own: Array, vector: Array) -> None:
        """Write what `gathered` returned into a vector."""
        for parameter, slot in zip(self.parameters, _slots(self.parameters)[0], strict=True):
            vector[parameter.slot] = own[slot]

    def refuse_state(self, state: Mapping[str, numpy.ndarray[Any, Any]]) -> None:
        """Raise ArgumentError or ShapeError unless names, shapes and dtypes equal those of this store."""
        own = {p.name: (p.shape, self.dtype) for p in self.parameters}
        own |= {b.name: (tuple(b.value.shape), numpy.dtype(b.value.dtype)) for b in self.buffers}
        if missing := sorted(own.keys() - state.keys()):
            raise ArgumentError(f"it lacks arrays of this model: {', '.join(missing)}.")
        if unknown := sorted(state.keys() - own.keys()):
            raise ArgumentError(f"it has arrays that this model lacks: {', '.join(unknown)}.")
        for name, (shape, dtype) in own.items():
            if state[name].shape != shape:
                raise ShapeError(f"{name} has shape {state[name].shape} there, and {shape} in this model.")
            if state[name].dtype != dtype:
                raise ArgumentError(f"{name} is {state[name].dtype} there, and {dtype} in this model.")

    def _refuse_too_large(self) -> None:
        needed = 2 * self.dtype.itemsize * sum(p.size for p in self.parameters)  # also of shared ones, which move
        if not self.backend.can_hold(needed):
            largest = max(self.parameters, key=lambda p: p.size)
            raise DeviceMemoryError(
                f"the parameters and their gradients take {needed / 2**30:,.1f} GiB, more than the memory of "
                f"{self.backend.name}. The largest is {largest.name} of shape {largest.shape}."
            )

    def _first_values(self, parameter: Parameter, rng: numpy.random.Generator) -> numpy.ndarray[Any, Any]:
        """What the initializer returns for this parameter, checked because users may write their own initializers."""
        what = f"{parameter.name}: {parameter.initializer!r}"
        try:
            values = parameter.initializer(parameter.shape, rng)
        except ShapeError as error:
            raise ShapeError(f"{parameter.name}: {error}") from error
        if not isinstance(values, numpy.ndarray) or numpy.ma.isMaskedArray(values) or values.dtype.kind not in "fiub":
            kind = f"an array of {values.dtype}" if type(values) is numpy.ndarray else f"a {type(values).__name__}"
            raise ArgumentTypeError(f"{what} must return a NumPy array of real numbers, but returned {kind}.")
        if values.shape != parameter.shape:
            raise ShapeError(f"{what} must return an array of shape {parameter.shape}, but returned {values.shape}.")
        with numpy.errstate(over="ignore"):
            if not numpy.isfinite(values.astype(self.dtype, copy=False)).all():
                raise ArgumentError(f"{what} gives values that are NaN or infinite in {self.dtype}.")
        return values

    def move(self, backend: Backend, dtype: Any) -> None:
        """Move everything to another device or dtype, in all models with these vectors. Parameter objects stay."""
        values, grads = self.backend.to_numpy(self.values), self.backend.to_numpy(self.grads)
        buffers = {b.root: self.backend.to_numpy(b.value) for store in self.family for b in store.buffers}
        dtype = numpy.dtype(dtype)
        for root, value in buffers.items():
            floating = numpy.issubdtype(value.dtype, numpy.floating)
            buffers[root] = backend.asarray(value.astype(dtype if floating else value.dtype))
        for store in self.family:
            store.backend, store.dtype = backend, dtype
            for buffer in store.buffers:
                buffer.bind(backend, buffers[buffer.root], self.guard)
        self._bind(values, grads)

    def slices(self, wanted: Callable[[Parameter], bool]) -> list[slice]:
        """The parts of the flat vectors that hold the wanted parameters; adjacent parameters share one slice."""
        choice = tuple(map(wanted, self.parameters))
        if choice not in self._slices:
            found = self._slices[choice] = []
            slots = [p.slot for p, now in zip(self.parameters, choice, strict=True) if now]
            for slot in sorted(slots, key=lambda slot: slot.start):
                adjacent = found and slot.start == _aligned(found[-1].stop)
                found.append(slice(found.pop().start if adjacent else slot.start, slot.stop))
        return self._slices[choice]

    def arrays(self) -> list[Parameter | Buffer]:
        """Everything that is saved and moved: parameters, then buffers."""
        return [*self.parameters, *self.buffers]

    def state(self) -> dict[str, numpy.ndarray[Any, Any]]:
        """{name: copy on the host} of all parameters and buffers."""
        with self.guard.lock:  # between two steps, if another thread trains the model
            return {a.name: numpy.array(self.backend.to_numpy(a.value)) for a in self.arrays()}

    def penalty(self, samples: Any = 1.0) -> Array | None:
        """Σ over trained parameters of l1 · Σ|w| + (l2 + shared_l2 / samples) · Σw², a 0-d float64 array.

        samples: the weight of all samples of the step, a number or a 0-d array. Returns None without penalties.
        """
        xp, total = self.backend.xp, None
        for p in self.penalized():
            term = xp.zeros((), dtype=xp.float64)
            if p.l1:
                term += p.l1 * xp.sum(xp.abs(p.value), dtype=xp.float64)
            if p.l2 or p.shared_l2:
                term += (p.l2 + p.shared_l2 / samples) * xp.sum(xp.square(p.value), dtype=xp.float64)
            total = term if total is None else total + term
        return total

    def add_penalty_gradients(self, samples: Any = 1.0) -> None:
        """Add ∂penalty/∂w = l1 · sign(w) + 2 · (l2 + shared_l2 / samples) · w to each gradient."""
        xp = self.backend.xp
        for p in self.penalized():
            if p.l1:
                p.grad += p.l1 * xp.sign(p.value)
            if p.l2:
                p.grad += (2.0 * p.l2) * p.value
            if p.shared_l2:
                factor = 2.0 * p.shared_l2 / samples
                if hasattr(factor, "astype"):  # float64, which must not promote a float32 gradient
                    factor = factor.astype(self.dtype)
                p.grad += factor * p.value

    def penalized(self) -> list[Parameter]:
        """The trained parameters with a penalty."""
        return [p for p in self.parameters if (p.l1 or p.l2 or p.shared_l2) and p.trainable]

    def _bind(self, values: Any, grads: Any) -> None:
        """Copy these host vectors to the device, and make all parameters of the family views of the copies."""
        with self.backend.device():
            flat_values, flat_grads = self._on_device(values), self._on_device(grads)
            for store in self.family:
                for parameter in store.parameters:
                    parameter.bind(self.backend, flat_values, flat_grads, self.guard)
                for buffer in store.buffers:
                    buffer.bind(self.backend, buffer.value, self.guard)
                store.grads, store.values = flat_grads, flat_values  # values last: `allocated` says that all is done

    def _on_device(self, host: Any) -> Array:
        """A copy of this host vector, allocated by the backend, which aligns it."""
        vector = self.backend.zeros(host.shape, self.dtype)
        vector[...] = self.backend.asarray(host, dtype=self.dtype)
        return vector

    def __getstate__(self) -> dict[str, Any]:
        # deepcopy and pickle copy through the host, whatever the device. A copy shares nothing with other models.
        own = {name: value for name, value in self.__dict__.items() if name not in ("family", "models", "_sources")}
        if not self.allocated:
            return own
        with self.guard.lock:
            values, grads = (numpy.array(self.backend.to_numpy(self.gathered(a))) for a in (self.values, self.grads))
            buffers = [(b, numpy.array(self.backend.to_numpy(b.value))) for b in self.buffers]
        return {**own, "values": values, "grads": grads, "buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, family=weakref.WeakSet([self]), models=weakref.WeakSet(), _sources=[])
        if self.allocated:
            self._slices = {}
            for parameter, slot in zip(self.parameters, _slots(self.parameters)[0], strict=True):
                parameter.slot = slot
            self.buffers = []
            for buffer, value in state["buffers"]:
                buffer.bind(self.backend, self.backend.asarray(value), self.guard)
                self.buffers.append(buffer)
            self._bind(self.values, self.grads)


def _slots(parameters: Sequence[Parameter]) -> tuple[list[slice], int]:
    """Consecutive slots for these parameters, and the length of the vector."""
    slots, end = [], 0
    for parameter in parameters:
        slots.append(slice(end, end + parameter.size))
        end += _aligned(parameter.size)
    return slots, end


def _aligned(elements: int) -> int:
    """This number, rounded up to where the next parameter can start."""
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


class Snapshot:
    """Copies, on the device, of a model's values and buffers and of `more` arrays, to restore them later.

    more: a function that returns the arrays by name. It is called each time, since an array may have been replaced by
    another one of the same shape.
    """

    def __init__(self, store: ParameterStore, more: Callable[[], Mapping[str, Array]] = dict) -> None:
        self._store, self._more, self._replaced = store, more, dict[str, Array]()
        #: {name: copy}, in the order of `arrays`.
        self.copies = {name: array.copy() for name, array in self.arrays().items()}

    def arrays(self) -> dict[str, Array]:
        """The arrays themselves, by name: the values, `more`, the buffers."""
        arrays = {"the weights": self._store.values, **self._more(), **self._replaced}
        for buffer in self._store.buffers:
            arrays[f"the buffer {buffer.name}"] = buffer.value
        return arrays

    def own_copies(self) -> list[Array]:
        """The copies, first that of the weights, without those of other models that share the vector."""
        weights, *others = self.copies.values()
        return [self._store.gathered(weights), *others]

    def set_own_weights(self, weights: Array) -> None:
        """Make these the copy of the weights, in the layout of `own_copies`."""
        self._store.scatter(weights, self.copies["the weights"])

    def replace(self, name: str, array: Array) -> None:
        """Restore this array in place of the one with this name; with zeros, if there was none."""
        old = self.copies.get(name)
        self.copies[name] = array.copy()
        self.copies[name][...] = 0 if old is None else old
        self._replaced[name] = array

    def take(self) -> None:
        """Copy the arrays again."""
        for name, array in self.arrays().items():
            self.copies[name][...] = array

    def restore(self) -> None:
        """Write the copies back into the arrays."""
        with self._store.guard.lock:
            for name, array in self.arrays().items():
                array[...] = self.copies[name]

    def swap(self) -> None:
        """Exchange the arrays and their copies."""
        with self._store.guard.lock:
            for name, array in self.arrays().items():
                copy = array.copy()
                array[...] = self.copies[name]
                self.copies[name] = copy
