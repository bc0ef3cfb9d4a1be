"""Layer: the base of every layer, built in or your own."""

import functools
import inspect
import math
import sys
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, ClassVar, Self, TypeVar

from xpnet import initializers
from xpnet.backends import Array, Backend, get_backend
from xpnet.backends.arrays import refuse_masked
from xpnet.config import Configured, as_shape, fits, flag, is_custom, missing_method
from xpnet.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    DeviceMemoryError,
    ShapeError,
    StateError,
    shape_text,
    shown,
)
from xpnet.layers import tensors
from xpnet.layers.building import building, standalone
from xpnet.layers.context import Context, Shape, Workspace
from xpnet.layers.past import Past
from xpnet.layers.structure import as_tuple, first_of, mapped, shapes_of
from xpnet.layers.tensors import check_name
from xpnet.parameters import Buffer, ModelArray, Parameter, Parameters, ParameterStore

#: Attributes for models and containers only. dir() does not list them.
_INTERNAL = frozenset((
    "add_tied_parameter", "backward_in_context", "backward_pass", "calls", "check_input", "connections",
    "drop_workspaces", "execution_context", "forward_in_context", "forward_pass", "gives_probabilities",
    "has_mask", "in_this_model", "inference_outputs", "inner_layers", "keeps_mask", "mask",
    "masked_outputs", "noise_key", "output_mask", "output_masks", "place", "run_in_given_order", "shape_for",
    "shared_copy", "splits_batch", "spread_masks", "start_mask", "starts_mask", "takes_list", "unplace",
))  # fmt: skip

#: Attributes for authors of layers only. Errors suggest them only for custom layers.
_FOR_AUTHORS = frozenset((
    "accepts_integers", "add_buffer", "add_parameter", "build", "causal", "check_inputs", "check_output", "context",
    "has_custom_layers", "is_custom", "past", "path", "random_bits", "random_normal",
    "refuse", "wants_input_grad", "work", "wrong_output", "xp",
))  # fmt: skip

L = TypeVar("L", bound="Layer")


class Layer(Configured):
    """The base of every layer. A subclass defines

    - `build(input_shape)`: declares parameters with `add_parameter` and returns the output shape. Shapes leave out the
      batch. Without `build`, a layer has no parameters and keeps the shape.
    - `forward(x)`: (N, *input_shape) → (N, *output_shape). Keeps on `self.work` what backward needs.
    - `backward(grad_y)`: takes ∂L/∂y, (N, *output_shape); writes the gradient of each parameter into its `.grad`;
      returns ∂L/∂x, (N, *input_shape), or None if `wants_input_grad` is False.

    Compute with `self.xp` and `self.backend`, never with numpy or cupy. Do not write into x or grad_y. Write results
    into `self.work.buffer(name, shape)`: inside a model, these buffers pass from layer to layer without a copy.

    To use a layer outside a model, call `layer.build((4,), backend="cpu", seed=0, dtype="float32")`, then forward and
    backward. `layer.context.training = True` switches to training.

    A layer with several inputs is called on a list of tensors. Its `build` takes a list of shapes, its `forward` a list
    of arrays, and its `backward` returns a list of gradients, one for each input. A layer with several outputs returns
    a list of shapes from `build` and a list of arrays from `forward`, and its `backward` takes a list of gradients.

    Every layer takes `name=`, which replaces its number in the names of its parameters: "digit.weight" instead of
    "2.weight". A subclass need not declare it. Assigning an array to an attribute that is a parameter or a buffer, as
    in `layer.weight = array`, writes into it.
    """

    _advice = "layer"
    _too_many_hint = (
        "The size of the input is known from the layer before, and an activation is a layer of its own, such as "
        "layers.ReLU()."
    )

    #: Whether integer inputs stay integers. None: the layer passes on integers and floats alike, as Flatten does.
    accepts_integers: ClassVar[bool | None] = False
    #: Whether the outputs are probabilities, which a loss on logits would mistake for logits.
    gives_probabilities: ClassVar[bool] = False
    #: Whether its operators divide a batch among CPU threads. The BLAS must then use one thread. Only for speed.
    splits_batch: bool = False
    #: Whether it can have several inputs, and so be called on a list. A custom layer always can.
    takes_list: ClassVar[bool] = False
    #: Whether the outputs have the mask of the inputs. None: if both have as many steps, the axis after the batch.
    keeps_mask: bool | None = None
    #: Whether the output of a step depends on no later step, in sequences (N, T, ...); see also `past`.
    causal: bool = True
    #: Whether it starts a mask, see `start_mask`.
    starts_mask: bool = False
    #: Whether its class is not part of xpnet, so that a model checks what it returns.
    is_custom: ClassVar[bool] = False
    #: The constructor arguments that may be assigned after the layer is built, because each pass reads them.
    _changeable: ClassVar[frozenset[str]] = frozenset()
    #: Whether backward must return ∂L/∂x. The container sets it before each backward.
    wants_input_grad: bool = True

    #: What `shared_copy` does not share: attributes that each copy has for itself.
    _own_attributes: ClassVar[frozenset[str]] = frozenset((
        "_context", "_executor", "_parameters", "_placed", "_shared_copies", "_shared_with", "_sites", "_workspaces",
        "has_custom_layers", "input_shape", "layers", "output_shape", "path", "splits_batch", "wants_input_grad",
    ))  # fmt: skip
    name: str | None = None  # replaces the number in `path`
    path: str = ""  # the position of this layer in its model, such as "1.0" or "block.digit"
    input_shape: Shape = ()
    output_shape: Shape = ()
    _context: Context | None = None
    _parameters: tuple[Parameter, ...] = ()
    _trainable: bool = True
    _shared_with: "Layer | None" = None  # the layer whose parameters this copy shares
    _shared_copies: "tuple[weakref.ref[Layer], ...]" = ()  # which share the parameters of this layer
    _workspaces: dict[bool, Workspace]  # by context.inference

    __eq__ = object.__eq__  # unlike other configured objects: a layer has its own parameters
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *, name: str | None = None) -> None:
        if name is not None:  # a subclass whose constructor does not take it has set it already
            self.name = name

    def __call__(self, inputs: Any, *others: Any) -> Any:
        """Return the symbolic output of this layer for a symbolic tensor, or for a list of them. See `xpnet.Model`.

        A layer that is called several times has its parameters once, and the gradients of all uses add up. Raises
        ShapeError if the layer does not accept the shape, and ArgumentTypeError for anything but symbolic tensors.
        """
        if others:
            kind = type(self).__name__
            raise ArgumentTypeError(f"{kind}: give several inputs as one list: layers.{kind}(...)([a, b]).")
        return tensors.call(self, inputs)

    # A subclass defines: -----------------------------------------------------------------------------------------

    @standalone
    def build(self, input_shape: Shape) -> Shape:
        """Declare parameters for inputs (N, *input_shape); return the output shape, without the batch."""
        return input_shape

    def forward(self, x: Array) -> Array:
        """Return outputs (N, *output_shape) for inputs x (N, *input_shape)."""
        raise missing_method(self, "forward(x)")

    def backward(self, grad_y: Array) -> Array | None:
        """Write the parameters' gradients and return ∂L/∂x, given grad_y = ∂L/∂y (N, *output_shape)."""
        raise missing_method(self, "backward(grad_y)")

    def start_mask(self, x: Array) -> Array:
        """The mask (N, T) that starts at inputs x: True where a step counts. Only if `starts_mask`."""
        raise missing_method(self, "start_mask(x)")

    def check_inputs(self, x: Array, name: str) -> None:
        """Raise DataError if x, a whole dataset called `name`, holds values that this layer does not accept.

        A model calls it once per dataset, before any pass, on the first layer that does not pass on integers and floats
        alike. Only here may a layer read the device.
        """

    # A subclass uses: --------------------------------------------------------------------------------------------

    def add_parameter(
        self, name: str, shape: Sequence[int], initializer: Any, *, decay: bool = True, l1: float = 0.0, l2: float = 0.0
    ) -> Parameter:
        """Declare an array to be trained. `initializer` is a name, an Initializer, a number or an array.

        `decay=False` exempts it from the optimizer's weight decay; `l1` and `l2` add l1·Σ|w| + l2·Σw² to the loss.
        """
        self._refuse_unless_building("add_parameter")
        self._check_array_name(name)
        shape = self._checked_parameter_shape(name, shape)
        if None in shape:
            hint = " Only the steps of sequences (N, T, features) may be of any number."
            raise self.refuse("a fixed number of features", self.input_shape, hint)
        if self._shared_with is not None:
            shared: Parameter = self._shared(name, shape)
            self._parameters = (*self._parameters, shared)
            return shared
        held = self.__dict__.get(name)
        if isinstance(held, ModelArray):
            self._qualified(name)  # raises, since it is declared already
        if (hasattr(held, "shape") or isinstance(held, list)) and held is not initializer:
            raise StateError(
                f"{self._label}: {name} was assigned before the layer was built, which would be lost. Assign it after "
                f"the model is built (give it input_shape), or pass the array as {name}_initializer."
            )
        given = checked_initializer(self, name, initializer)
        parameter = Parameter(self._qualified(name), shape, initializers.get(given), decay, l1, l2)
        parameter.trainable = self._trainable
        self.context.store.parameters.append(parameter)
        self._parameters = (*self._parameters, parameter)
        return parameter

    def _check_array_name(self, name: Any) -> None:
        if not (isinstance(name, str) and name.isprintable() and name.strip()):
            raise ArgumentTypeError(
                f"{self._label}: the name of a parameter or buffer must be text, not {shown(name)}."
            )

    def _checked_parameter_shape(self, name: str, shape: Any) -> Shape:
        """The shape as a tuple of integers. A shape with None is returned as it is, and the caller refuses it."""
        if isinstance(shape, tuple) and None in shape:
            return shape
        try:
            return as_shape(shape)
        except ArgumentError as error:
            raise ArgumentError(f"{self._label}: {name}: {error}") from error

    def add_tied_parameter(self, name: str, layer: "Layer") -> Any:
        """Declare that this layer also uses, and trains, the parameter of this name of a layer before it."""
        if self.context.shapes_only:
            return None
        owner = self._shared_with or layer
        if not owner.is_built:
            raise StateError(
                f"{self._label} is tied to {type(layer).__name__}, which is not built. It must come before this layer, "
                "in the same model."
            )
        parameter, store = getattr(owner, name), owner.context.store
        tied = self.context.store.share(parameter, store, lambda: self._qualified(name))
        tied.is_tied = True
        self._parameters = (*self._parameters, tied)
        return tied

    def in_this_model(self, layer: L) -> L:
        """The copy of a layer that is in the same model as this one; the layer itself if there is none."""
        copies = (reference() for reference in layer._shared_copies)
        return next((twin for twin in copies if twin is not None and twin._context is self._context), layer)  # type: ignore[return-value]

    def add_buffer(self, name: str, value: Any) -> Buffer:
        """Declare an array that is saved and moved with the model but not trained."""
        self._refuse_unless_building("add_buffer")
        self._check_array_name(name)
        array = self.backend.asarray(self._real(value, f"buffer {name}"), dtype=self.context.dtype)
        if self._shared_with is not None:
            return self._shared(name, tuple(array.shape))  # type: ignore[no-any-return]
        buffer = Buffer(self._qualified(name), self.backend, array, self.context.guard)
        self.context.store.buffers.append(buffer)
        return buffer

    def _real(self, value: Any, what: str) -> Array:
        """The value as an array on the device. Raises ArgumentTypeError if it is not one of real numbers."""
        refuse_masked(value, what)
        try:
            array = self.backend.asarray(value)
        except (TypeError, ValueError) as error:
            raise ArgumentTypeError(f"{self._label}: {what} cannot be converted to an array: {error}") from error
        if array.dtype.kind not in "fiub":
            raise ArgumentTypeError(f"{self._label}: {what} must be real numbers, not an array of {array.dtype}.")
        return array

    def _shared(self, name: str, shape: Shape) -> Any:
        """The parameter or buffer of this copy, which has the memory of the one with this name in `_shared_with`."""
        assert self._shared_with is not None
        store, path = self._shared_with.context.store, self._shared_with.path
        array = next((a for a in store.arrays() if a.name == (f"{path}.{name}" if path else name)), None)
        if array is None or array.shape != shape:
            has = "it has none" if array is None else f"it has one of shape {array.shape}"
            raise ShapeError(
                f"{self._shared_with._label} is called again, on inputs {shape_text(self.input_shape)}, which need a "
                f"{name} of shape {shape}; but {has}. Call it on inputs like the first, or make another layer."
            )
        return self.context.store.share(array, store, lambda: self._qualified(name))

    def _refuse_unless_building(self, method: str) -> None:
        if self._context is None:
            raise StateError(f"{type(self).__name__}: call {method} in build, which knows the shapes, not before.")
        if self.context.store.allocated:
            raise StateError(
                f"{self._label}: call {method} in build, not later: when a model is built, all its parameters and "
                "buffers are allocated together."
            )

    @property
    def context(self) -> Context:
        """What this layer shares with its model; `context.training` and `context.step` describe the current pass."""
        if self._context is None:
            raise StateError(f"this {type(self).__name__} is not built yet: put it in a model, or call its build(...).")
        return self._context

    @property
    def work(self) -> Workspace:
        """What this layer keeps from forward to backward, and its buffers. Inference has its own workspace."""
        context = self._context or self.context
        work = self._workspaces.get(context.inference)
        if work is None:
            work = self._workspaces[context.inference] = Workspace(context)
        return work

    @property
    def mask(self) -> Any:
        """The mask of the inputs of this pass, bool (N, T), True where a step counts; None if all do.

        A list, with an item for each input, if the layer was called on a list and any of them has a mask.
        """
        return getattr(self.work, "given_mask", None)

    @property
    def past(self) -> Past | None:
        """What this layer keeps of the steps before those of x, if x continues a sequence; None if x is all of it.

        A causal layer of xpnet then gives the outputs that these steps have in the whole sequence.
        """
        continuation = (self._context or self.context).continuation
        return None if continuation is None else continuation.past_of(self)

    @property
    def backend(self) -> Backend:
        """The backend of the model."""
        return (self._context or self.context).backend  # `context` raises an error if there is none

    @property
    def xp(self) -> Any:
        """The array module: numpy or cupy."""
        return (self._context or self.context).backend.xp

    @property
    def noise_key(self) -> tuple[int, int, int]:
        """The key of this pass's noise: (seed, layer, step). A `forward` outside of fit has its own number as step."""
        return self.context.seed, zlib.crc32(self.path.encode()), self.context.noise_step

    def random_bits(self, x: Array) -> Array:
        """Uniform uint32 noise in x's shape, a function of (seed, layer, step, element): the same on every device."""
        columns = math.prod(x.shape[1:])
        return self.backend.random_bits(self.noise_key, len(x), columns, self.context.first_row).reshape(x.shape)

    def random_normal(self, x: Array) -> Array:
        """Normal noise of mean 0 and variance 1 in x's shape, in a buffer, made from `random_bits`.

        From uniform numbers u, v: √(-2 log u) cos 2πv and √(-2 log u) sin 2πv. Box and Muller 1958, "A note on the
        generation of random normal deviates".
        """
        xp, rows, elements = self.xp, len(x), math.prod(x.shape[1:])
        half = (elements + 1) // 2
        noise = self._noise(rows, 2 * half)
        radius = xp.sqrt(xp.log(noise[:, :half]) * -2.0)
        angle = noise[:, half:] * (2.0 * math.pi)
        noise[:, :half] = radius * xp.cos(angle)
        noise[:, half:] = radius * xp.sin(angle)
        return noise[:, :elements].reshape(x.shape)

    def _noise(self, rows: int, columns: int) -> Array:
        """Uniform noise (rows, columns) above 0 and at most 1, in a buffer."""
        noise = self.work.buffer("noise", (rows, columns))
        noise[...] = self.random_bits(noise)
        noise += 0.5  # so that it is never 0
        noise *= 2.0**-32
        return noise

    def refuse(self, expected: str, got: Any, hint: str = "") -> ShapeError:
        """Return the ShapeError to raise for a wrong input. `got` is a shape without the batch, or several, or text."""
        got = shape_text(got) if isinstance(got, tuple | list) else got
        return ShapeError(f"{self._label} expects {expected}, but the input is {got}.{hint}")

    def check_output(self, x: Array, y: Any) -> None:
        """Raise ShapeError unless y, the outputs of x, has the dtype and the shape that `build` returned."""
        x, shapes = first_of(x), shapes_of(self.output_shape)
        dtype = x.dtype if self.accepts_integers is None and x.dtype.kind != "f" else self.context.dtype
        outputs = y if isinstance(y, list | tuple) and len(shapes) > 1 else [y]
        if len(outputs) != len(shapes):
            raise ShapeError(f"{self._label}: forward must return a list of {len(shapes)} arrays, not {len(outputs)}.")
        for shape, output in zip(shapes, outputs, strict=True):
            if (
                not isinstance(output, self.xp.ndarray)
                or len(output) != len(x)
                or not fits(output.shape[1:], shape)
                or output.dtype != dtype
            ):
                raise self.wrong_output((len(x), *shape), dtype, output)

    def wrong_output(self, shape: Shape, dtype: Any, y: Any) -> ShapeError:
        """Return the ShapeError to raise for outputs y that do not have this shape (N, ...) and dtype."""
        return wrong_array(f"{self._label}: forward must return", shape, dtype, self.xp, y, ", as its build says")

    @property
    def _label(self) -> str:
        """This layer in an error text: "layer 1.0 (Dense)", or "Dense" outside a model."""
        return f"layer {self.path} ({type(self).__name__})" if self.path else type(self).__name__

    def _qualified(self, name: str) -> str:
        """The full name of a parameter, buffer or inner layer, which must be new."""
        name = f"{self.path}.{name}" if self.path else name
        if any(array.name == name for array in self.context.store.arrays()):
            raise ArgumentError(f"{type(self).__name__}: there is a parameter or buffer called {name!r} already.")
        return name

    # A model uses: -----------------------------------------------------------------------------------------------

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.is_custom = is_custom(cls)
        if "__init__" in cls.__dict__:
            cls.__init__ = _taking_name(cls.__init__)  # type: ignore[method-assign]
        if "build" in cls.__dict__:
            cls.build = standalone(cls.build)  # type: ignore[method-assign]

    def _suggestible(self) -> Set[str]:
        names = super()._suggestible()
        return names if self.is_custom and self._advice == "layer" else names - _FOR_AUTHORS

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.__dict__.get(name)
        if isinstance(held, ModelArray) and held is not value and self.context.store.allocated:
            if isinstance(held, Parameter) and (method := self._running_pass()):
                raise StateError(
                    f"{self._label}: {method} assigns self.{name}, the parameter. To set its "
                    f"gradient, write self.{name}.grad[...] = ...; to keep values for backward, use self.work."
                )
            held.assign(value.value if isinstance(value, ModelArray) else value, f"{self._label}: {name}")
            return
        declared = getattr(type(self), name, None)
        if isinstance(declared, property) and declared.fset is None:
            raise StateError(f"{self._label}: {name} is read-only.")
        super().__setattr__(name, self._checked_name(value) if name == "name" else value)
        if self._shared_copies and name not in self._own_attributes:
            for reference in self._shared_copies:
                if (twin := reference()) is not None:
                    setattr(twin, name, value)

    def _running_pass(self) -> str:
        """ "forward" or "backward" if this thread is executing this method of the layer, else ""."""
        frame: Any = sys._getframe()  # a flag would cost time in every pass, and would have to be one per thread
        while frame is not None:
            code = frame.f_code
            first = code.co_varnames[:1]
            if code.co_name in ("forward", "backward") and first and frame.f_locals.get(first[0]) is self:
                return str(code.co_name)
            frame = frame.f_back
        return ""

    def _checked_assignment(self, name: str, value: Any) -> Any:
        if name == "name":
            return value
        if self.is_built and self.context.store.allocated and name not in self._changeable:
            raise StateError(
                f"{self._label}: {name} cannot change after the layer is built. Make a new layer, "
                f"{type(self).__name__}(..., {name}=...)."
            )
        return super()._checked_assignment(name, value)

    def __delattr__(self, name: str) -> None:
        if self.is_built and (name == "layers" or isinstance(self.__dict__.get(name), ModelArray)):
            raise StateError(f"{self._label}: the layer is built, so {name} cannot be deleted.")
        super().__delattr__(name)

    def _checked_name(self, name: Any) -> str | None:
        """Return this name if a layer can have it: it takes the place of a number in dotted names."""
        kind = type(self).__name__
        if self.is_built and name != self.name:
            raise StateError(f"{kind}: set the name before the layer is built; its parameters are named after it.")
        if name is None:
            return None
        check_name(kind, name)
        return str(name)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, by name; `name` only if there is one."""
        config = super().get_config()
        config.pop("name", None)
        return self._with_name(config)

    def _with_name(self, config: dict[str, Any]) -> dict[str, Any]:
        return config if self.name is None else {**config, "name": self.name}

    def __dir__(self) -> Iterable[str]:
        """The public attributes, without those for models and containers only."""
        return [n for n in super().__dir__() if n not in _INTERNAL and (n[:1] != "_" or n[:2] == "__")]

    @property
    def parameters(self) -> list[Parameter]:
        """This layer's parameters, in the order of their declaration."""
        return Parameters(self._parameters)

    @property
    def trainable(self) -> bool:
        """Whether any parameter is trained. Set it to False to freeze all of them."""
        return any(p.trainable for p in self.parameters) if self.parameters else self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = flag(self, "trainable", value)
        for parameter in self.parameters:
            parameter.trainable = self._trainable

    @property
    def is_built(self) -> bool:
        """Whether `build` has been called."""
        return self._context is not None

    def spread_masks(self, inputs: Sequence[bool]) -> tuple[bool, ...]:
        """Whether each output has a mask, given whether each input has one."""
        count = len(shapes_of(self.output_shape))
        return (self.starts_mask or (any(inputs) and self._keeps_mask),) * count

    @property
    def _keeps_mask(self) -> bool:
        if self.keeps_mask is not None:
            return self.keeps_mask
        before, after = shapes_of(self.input_shape)[0], shapes_of(self.output_shape)[0]
        return bool(before and after) and before[0] == after[0]

    def output_mask(self, x: Any) -> Any:
        """The mask of the outputs of x after `forward`, or None; a tuple if it differs between several outputs.

        By default, a step counts if it does in all inputs that have a mask.
        """
        masks = [mask for mask in as_tuple(self.mask) if mask is not None] if self._keeps_mask else []
        if self.starts_mask:
            masks.append(self.start_mask(x))
        if len(masks) < 2:
            return masks[0] if masks else None
        masks.sort(key=lambda mask: -mask.shape[1])  # an input with a single step is repeated for all steps
        combined = self.work.buffer("mask", masks[0].shape, masks[0].dtype)
        combined[...] = masks[0]
        for mask in masks[1:]:
            self.xp.logical_and(combined, mask, out=combined)
        return combined

    def shape_for(self, input_shape: Any) -> Any:
        """The output shape for an input shape, or for a list of shapes. The layer is built for that, and unbuilt."""
        if self.is_built and input_shape == self.input_shape:
            return self.output_shape
        with building:
            trial = self.shared_copy() if self.is_built else self
            device, dtype = (self.backend, self.context.dtype) if self.is_built else (get_backend("cpu"), "float32")
            try:
                context = Context(device, ParameterStore(device, dtype), seed=0, shapes_only=True)
                return trial.place(context, "", input_shape)
            finally:
                trial.unplace()

    def shared_copy(self) -> Self:
        """A copy of this built layer for another place or model, where it is built with the same parameters.

        It has its own shapes and workspaces. An attribute that is set later is set in the copies too.
        """
        twin = type(self).__new__(type(self))
        state = {name: value for name, value in Layer.__getstate__(self).items() if name not in ("forward", "backward")}
        vars(twin).update(state, _context=None, _shared_with=self)
        twin.unplace()
        self._shared_copies = (*(ref for ref in self._shared_copies if ref() is not None), weakref.ref(twin))
        return twin

    def place(self, context: Context, path: str, input_shape: Any) -> Any:
        """Used by the model: give this layer its place, and build it there."""
        if self._context is not None:
            raise StateError(
                f"layer {path}, a {type(self).__name__}, is built already: a layer object can be used only once. "
                "Make a new layer, or share this one in an xpnet.Model."
            )
        several = isinstance(input_shape, list) and isinstance(first_of(input_shape or [None]), tuple)
        shapes: Any = list(map(as_shape, input_shape)) if several else as_shape(input_shape)
        self.input_shape = shapes
        self._context, self.path, self._workspaces = context, path, {}
        try:
            if several and not (self.takes_list or self.is_custom):
                raise self.refuse("one input", shapes, " Join them with a layer such as layers.Concatenate().")
            self._refuse_too_large("inputs", self.input_shape)
            self.output_shape = self._checked_shape(self.build(self.input_shape))
            self._refuse_too_large("outputs", self.output_shape)
        except BaseException:
            self.unplace()
            raise
        self._shared_with = None
        return self.output_shape

    def _checked_shape(self, shape: Any) -> Any:
        """Return what `build` of a layer returned if it is a shape without the batch, or a list of them."""
        if not self.is_custom:
            return shape
        several = isinstance(shape, list) and bool(shape) and isinstance(shape[0], tuple | list)
        try:
            return list(map(as_shape, shape)) if several else as_shape(shape)
        except ArgumentError as error:
            raise ArgumentError(f"{self._label}: build must return the shape of its outputs: {error}") from error

    def _refuse_too_large(self, what: str, shapes: Shape | list[Shape]) -> None:
        """Raise DeviceMemoryError if not even one sample of these shapes fits into the device's memory."""
        needed = sum(math.prod(n or 1 for n in shape) for shape in shapes_of(shapes)) * self.context.dtype.itemsize
        if not self.backend.can_hold(needed):
            raise DeviceMemoryError(
                f"{self._label}: one sample of its {what} {shape_text(shapes)} takes {needed / 2**30:,.1f} GiB, more "
                f"than the memory of {self.backend.name}. Choose smaller sizes."
            )

    def unplace(self) -> None:
        """Used by the model: undo `place` after an error, so that the layer can be built again."""
        if self._context is not None:
            self._context.guard.refuse_beside_training()
        self._context, self.path, self._parameters, self._shared_copies = None, "", (), ()
        for name in [name for name, held in self.__dict__.items() if isinstance(held, ModelArray)]:
            del self.__dict__[name]

    def drop_workspaces(self, inference_only: bool = False) -> None:
        """Used by the model: free kept arrays and buffers, or only those of inference."""
        if self._context is not None:
            self._context.drop_scratch(inference_only)
            self._workspaces = {mode: work for mode, work in self._workspaces.items() if inference_only and not mode}

    def _checked_forward(self, x: Array) -> Array:
        """`forward` of a layer outside a model, with the checks that a model makes. Returns a new array."""
        several = isinstance(self.input_shape, list)
        arrays = [self._lone_input(a, "x") for a in (as_tuple(x) if several else (x,))]
        wanted = shapes_of(self.input_shape)
        pairs = zip(arrays, wanted, strict=False)
        if not (len(arrays) == len(wanted) and all(a.ndim and fits(a.shape[1:], w) for a, w in pairs)):
            got = ", ".join(str(tuple(a.shape)) for a in arrays)
            raise self.refuse(f"{shape_text(self.input_shape)}, the shape it was built for", got)
        if any(a.size == 0 for a in arrays):
            raise DataError(f"{self._label}: x is empty: it has shape {tuple(arrays[0].shape)}.")
        x = arrays if several else arrays[0]
        self.check_inputs(x, "x")
        return self.context.exclusively(self._lone_forward, x)

    def _lone_input(self, a: Any, name: str) -> Array:
        """The array on the device, in a dtype that the layer takes."""
        array = self._real(a, name)
        keeps = array.dtype.kind != "f" and self.accepts_integers is not False
        return array if keeps or array.dtype == self.context.dtype else array.astype(self.context.dtype)

    def _lone_forward(self, x: Array) -> Array:
        context = self.context
        context.begin_forward(context.training)
        y = type(self).forward(self, x)
        context.end_forward()
        context.lone_outputs = tuple(tuple(array.shape) for array in as_tuple(y) if hasattr(array, "shape"))
        return mapped(lambda array: array.copy() if hasattr(array, "copy") else array, y)

    def _checked_backward(self, grad_y: Array) -> Array | None:
        """`backward` of a layer outside a model. Returns a new array."""
        return self.context.exclusively(self._lone_backward, grad_y)

    def _lone_backward(self, grad_y: Array) -> Array | None:
        if self.context.forward_thread:
            self.context.check_forward()
        several = isinstance(self.output_shape, list)
        grads = [self._lone_input(grad, "grad_y") for grad in (as_tuple(grad_y) if several else (grad_y,))]
        shapes = tuple(tuple(grad.shape) for grad in grads)
        if self.context.lone_outputs not in (None, shapes):
            raise ShapeError(
                f"{self._label}: grad_y must have the shape of the outputs, {self.context.lone_outputs}, not {shapes}."
            )
        grad_x = type(self).backward(self, grads if several else grads[0])
        return mapped(lambda grad: None if grad is None else grad.copy(), grad_x)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in self.__dict__.items() if not getattr(value, "is_check", False)}
        return {**own, "_workspaces": {}, "_shared_copies": (), "_shared_with": None}


def _taking_name(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a layer, which takes `name=` even if it does not declare it or pass it on."""
    parameters = inspect.signature(init).parameters
    passes = "name" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @functools.wraps(init)
    def wrapper(self: Layer, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("name") is not None:
            self.name = kwargs["name"]
        if not passes:
            kwargs.pop("name", None)
        init(self, *args, **kwargs)

    return wrapper


def checked_initializer(layer: Layer, name: str, spec: Any) -> Any:
    """Return `spec`, the argument of this name, if it is an initializer, or the name or the values of one."""
    try:
        initializers.get(spec)
    except (ArgumentError, ArgumentTypeError) as error:
        raise type(error)(f"{layer._label}: {name}: {error}") from error
    return spec


def wrong_array(what: str, shape: tuple[int, ...], dtype: Any, xp: Any, got: Any, why: str = "") -> ShapeError:
    """The error if `got` is no array of this shape (N, ...) and dtype. what: such as "Dense: forward must return"."""
    expected, hint = f"{what} {shape_text(shape[1:])} of {dtype}{why}", ""
    if not isinstance(got, xp.ndarray):
        if isinstance(got, list | tuple):
            text = f"a {type(got).__name__} of {len(got)}"
        else:
            text = f"a {type(got).__module__}.{type(got).__name__}" if hasattr(got, "shape") else repr(got)
        return ShapeError(f"{expected}, but returned {text}.")
    if got.shape[:1] != shape[:1]:
        expected += f", with N = {shape[0]}"
    if got.shape == shape and got.dtype.kind == "f":
        hint = " NumPy numbers promote arrays to float64, Python numbers do not; or convert it with .astype(x.dtype)."
    return ShapeError(f"{expected}, but returned {tuple(got.shape)} of {got.dtype}.{hint}")
