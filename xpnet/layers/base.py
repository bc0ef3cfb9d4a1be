"""Layer: what every layer is, built in and of a user's own; and what a model hands to its layers."""

import functools
import math
import operator
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, TypeAlias

from xpnet import initializers
from xpnet.backends import Array, Backend, DType, get_backend
from xpnet.config import Configured
from xpnet.errors import ArgumentError, ShapeError, StateError
from xpnet.parameters import Buffer, Parameter, ParameterStore
from xpnet.ranks import ALONE, Ranks

Shape: TypeAlias = tuple[int, ...]


@dataclass
class Context:
    """What all layers of one model share: where arrays live, and where in the run a pass stands."""

    backend: Backend
    store: ParameterStore
    seed: int
    training: bool = False  # dropout drops, batch normalisation uses the batch
    inference: bool = False  # a pass without a way back, in a workspace of its own
    precision: str | None = None  # of products of matrices; see Sequential
    first_row: int = 0  # of this shard, in the global batch
    at_step: int = 0  # updates made so far; layers ask `step`
    ranks: Ranks = ALONE  # of the run that is under way
    idle: bool = False  # this rank has no rows of the batch: it goes along with one that counts nothing
    _scratch: dict[tuple[Any, ...], Array] = field(default_factory=dict)

    @property
    def dtype(self) -> DType:
        return self.store.dtype

    @property
    def step(self) -> int:
        """Updates made so far. A layer that asks for it keeps a GPU from recording its step; noise need not ask."""
        self.backend.refuse_recording("a layer asks for the number of the step")
        return self.at_step

    @step.setter
    def step(self, value: int) -> None:
        self.at_step = value

    def scratch(self, name: str, shape: Shape, shard: int = 0) -> Array:
        """An uninitialised array that all layers share: its numbers last until the next call with the same name."""
        size, key = math.prod(shape), (self.inference, name, shard)
        kept = self._scratch.get(key)
        if kept is None or kept.size < size:
            with self.backend.lasting_memory():
                kept = self._scratch[key] = self.backend.empty((size,), self.dtype)
        return kept[:size].reshape(shape)

    def forget_scratch(self, inference: bool = False) -> None:
        """Free it, or only that of inference."""
        self._scratch = {} if not inference else {key: a for key, a in self._scratch.items() if not key[0]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scratch": {}, "ranks": ALONE}


class Workspace(SimpleNamespace):
    """What one layer keeps from forward to backward, as attributes, and the buffers that it writes into."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context
        self._buffers: dict[str, Array] = {}

    def buffer(self, name: str, shape: Shape, dtype: DType = None) -> Array:
        """An uninitialised array, kept for the next call, grown for the largest batch; a smaller one gets a slice."""
        kept = self._buffers.get(name)
        dtype = self.context.store.dtype if dtype is None else dtype
        if kept is not None and kept.shape == shape and kept.dtype == dtype:
            return kept
        if kept is None or len(kept) < shape[0] or kept.shape[1:] != shape[1:] or kept.dtype != dtype:
            with self.context.backend.lasting_memory():
                kept = self._buffers[name] = self.context.backend.empty(shape, dtype)
        return kept if len(kept) == shape[0] else kept[: shape[0]]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _NothingKeptError("backward needs what forward kept, but no forward pass came before it.")


class _NothingKeptError(StateError, AttributeError):
    """An AttributeError too, so that `getattr(work, name, default)` works."""


class Layer(Configured):
    """The base of every layer. A subclass writes

    - `build(input_shape)`: declares parameters with `add_parameter`, returns the output shape. Shapes leave the batch
      out. Without it, a layer has no parameters and keeps the shape.
    - `forward(x)`: (N, *input_shape) → (N, *output_shape). Keeps on `self.work` what backward will need.
    - `backward(grad_y)`: the gradient of the loss with respect to y → with respect to x, and on the way
      fills each parameter's `.grad`.

    with `self.xp` and `self.backend` and never numpy or cupy, and does not write into x or grad_y. Arrays it makes in
    every step are best written into `self.work.buffer(name, shape)`. Inside a model, buffers pass from layer to layer
    uncopied.

    Alone, for a test: `layer.build((4,), backend="cpu", seed=0, dtype="float32")`, then forward and backward.
    `layer.context.training = True` switches to training.
    """

    #: Whether integer inputs stay integers; None means that the layer passes on whatever comes.
    accepts_integers: ClassVar[bool | None] = False

    #: Whether it works on parts of a batch side by side, so that the BLAS of the CPU has to leave the cores to them.
    works_in_shards: ClassVar[bool] = False

    #: Whether max(f(a), f(b)) is f(max(a, b)), gradients included; and whether it picks the largest of some inputs.
    keeps_largest: ClassVar[bool] = False
    picks_largest: ClassVar[bool] = False

    #: Whether the outputs are probabilities, which a loss on logits would take for logits.
    gives_probabilities: ClassVar[bool] = False

    path: str = ""
    input_shape: Shape = ()
    output_shape: Shape = ()
    #: Set by the container before each backward: False where nobody will read the gradient of the input.
    wants_input_grad: bool = True
    _context: Context | None = None
    _trainable: bool = True

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]  # a layer is a thing, not a value

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "build" in cls.__dict__:
            cls.build = _with_place(cls.build)  # type: ignore[method-assign]

    # To be written by a subclass -------------------------------------------------------------------------------

    def build(self, input_shape: Shape, *args: Any, **kwargs: Any) -> Shape:
        """Declare parameters for inputs (N, *input_shape); return the output shape, without the batch.

        Called by users too, on a layer that stands alone: `build(input_shape, backend="auto", seed=0,
        dtype="float32")` gives it a place and first values of its own.
        """
        return input_shape

    def forward(self, x: Array) -> Array:
        raise NotImplementedError(f"{type(self).__name__} must define forward(x).")

    def backward(self, grad_y: Array) -> Array | None:
        raise NotImplementedError(f"{type(self).__name__} must define backward(grad_y).")

    def check_inputs(self, x: Array, name: str) -> None:
        """Raise DataError where x, the inputs of a whole set called `name`, holds numbers that cannot work.

        Called for the first layer of a model that does not only rearrange, once a set, before any pass: here, and
        nowhere in a pass, the device may be read.
        """

    # For use in a subclass -------------------------------------------------------------------------------------

    def add_parameter(
        self, name: str, shape: Sequence[int], initializer: Any, *, decay: bool = True, l1: float = 0.0, l2: float = 0.0
    ) -> Parameter:
        """Declare a trained array. `initializer` is a name, an Initializer, a number or an array.

        `decay=False` takes it out of the optimiser's weight decay; `l1` and `l2` add l1·Σ|w| + l2·Σw² to the loss.
        """
        parameter = Parameter(self._qualified(name), shape, initializers.get(initializer), decay, l1, l2)
        parameter.trainable = self._trainable
        self._refuse_twice(parameter.name)
        self.context.store.parameters.append(parameter)
        self.parameters.append(parameter)
        return parameter

    def add_buffer(self, name: str, value: Any) -> Buffer:
        """Declare an array that is saved and moved with the model but not trained."""
        self._refuse_twice(self._qualified(name))
        buffer = Buffer(self._qualified(name), self.backend.asarray(value, dtype=self.context.dtype))
        self.context.store.buffers.append(buffer)
        return buffer

    @property
    def work(self) -> Workspace:
        """This layer's kept arrays and buffers, for the kind of pass that is under way."""
        context = self._context or self.context
        work = self._work.get(context.inference)
        if work is None:
            work = self._work[context.inference] = Workspace(context)
        return work

    @property
    def context(self) -> Context:
        """What this layer shares with its model; `context.training` and `context.step` say where the run stands."""
        if self._context is None:
            raise StateError(f"this {type(self).__name__} is not built yet: put it in a model, or call its build(...).")
        return self._context

    @property
    def backend(self) -> Backend:
        return (self._context or self.context).backend

    @property
    def xp(self) -> Any:
        return (self._context or self.context).backend.xp

    def random_bits(self, x: Array) -> Array:
        """Uniform uint32 noise in x's shape from (seed, layer, step, element): the same on every device and shard."""
        columns = math.prod(x.shape[1:])
        return self.backend.random_bits(self.noise_key, len(x), columns, self.context.first_row).reshape(x.shape)

    @property
    def noise_key(self) -> tuple[int, int, int]:
        """(seed, layer, step): what the noise of this step is a function of, beside row and column."""
        return self.context.seed, zlib.crc32(self.path.encode()), self.context.at_step

    def refuse(self, expected: str, got: Any, hint: str = "") -> ShapeError:
        """The error for an input that this layer cannot take."""
        place = f"layer {self.path} " if self.path else ""
        return ShapeError(f"{place}({type(self).__name__}) expects {expected}, but the input is {got}.{hint}")

    # For the model ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def parameters(self) -> list[Parameter]:
        """This layer's parameters, in the order of their declaration."""
        return []

    @functools.cached_property
    def _work(self) -> dict[bool, Workspace]:
        return {}

    @property
    def trainable(self) -> bool:
        """False freezes all parameters; True where any of them is trained."""
        return any(p.trainable for p in self.parameters) if self.parameters else self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = bool(value)
        for parameter in self.parameters:
            parameter.trainable = self._trainable

    def place(self, context: Context, path: str, input_shape: Shape) -> Shape:
        """Give this layer its one place in a model, and build it there."""
        if self._context is not None:
            raise StateError(
                f"this {type(self).__name__} already stands at {self.path or 'the top of a model'!r} and cannot stand "
                f"at {path!r} too: one layer object has one place. Make a second layer."
            )
        self._context, self.path = context, path
        try:
            return self.build(input_shape)
        except BaseException:
            self.unplace()
            raise

    def unplace(self) -> None:
        """Undo `place`, where the building of a model failed: its layers are free again."""
        self._context, self.path = None, ""
        self.__dict__.pop("parameters", None)
        self.__dict__.pop("forward", None)

    @property
    def is_built(self) -> bool:
        return self._context is not None

    def forget_work(self, inference: bool = False) -> None:
        """Drop kept arrays and buffers, which belong to a device, a dtype and a pass; or only those of inference."""
        if self._context is not None:
            self._context.forget_scratch(inference)
        if inference:
            self._work.pop(True, None)
        else:
            self._work.clear()

    def _refuse_twice(self, name: str) -> None:
        if any(array.name == name for array in self.context.store.arrays()):
            raise ArgumentError(f"{type(self).__name__}: there is a parameter or buffer called {name!r} already.")

    def _qualified(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_work"}


def _with_place(build: Callable[[Any, Shape], Shape]) -> Callable[..., Shape]:
    """Let `build(input_shape)` of a subclass also be called on a layer that stands alone, and note both shapes."""

    @functools.wraps(build)
    def wrapper(
        self: Layer, input_shape: Any, *, backend: Any = "auto", seed: int = 0, dtype: DType = "float32"
    ) -> Shape:
        self.input_shape = as_shape(input_shape)
        alone = self._context is None
        if alone:
            resolved = get_backend(backend)
            self._context = Context(resolved, ParameterStore(resolved, dtype), seed)
        elif self.context.store.allocated:
            raise StateError(f"this {type(self).__name__} is built already.")
        try:
            self.output_shape = build(self, self.input_shape)
            if alone:
                self.context.store.allocate(seed)
                self.forward = functools.partial(_forward_alone, self)  # type: ignore[method-assign]
        except BaseException:
            if alone:
                self.unplace()
            raise
        return self.output_shape

    return wrapper


def _forward_alone(layer: Layer, x: Array) -> Array:
    """The forward of a layer that stands alone: it checks for itself what a model would have checked."""
    if hasattr(x, "shape") and tuple(x.shape[1:]) != layer.input_shape:
        raise layer.refuse(f"(N, {str(layer.input_shape)[1:]}, as it was built for", f"{tuple(x.shape)}")
    layer.check_inputs(x, "x")
    return type(layer).forward(layer, x)


Layer.build = _with_place(Layer.build)  # type: ignore[method-assign]


def as_shape(shape: Any) -> Shape:
    """(4,) from 4, [4] or (4,); refuses what is not made of positive integers."""
    try:
        sizes = tuple(operator.index(n) for n in (shape if hasattr(shape, "__iter__") else (shape,)))
    except TypeError:
        sizes = (0,)
    if any(n < 1 for n in sizes):
        raise ArgumentError(f"a shape is one or more positive integers, without the batch, not {shape!r}.")
    return sizes
