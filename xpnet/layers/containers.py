"""Container: layers that run as one layer; Sequential: layers one after the other."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Self, SupportsIndex, overload

from xpnet.backends import Array
from xpnet.config import flag, items_of
from xpnet.errors import (
    ArgumentError,
    ArgumentTypeError,
    ShapeError,
    StateError,
    no_layer_at,
    shape_text,
    shown,
    unknown_name,
)
from xpnet.layers import tensors
from xpnet.layers.activations import ReLU
from xpnet.layers.base import Layer
from xpnet.layers.context import Context, Shape
from xpnet.layers.executor import CallSite, Executor
from xpnet.layers.pooling import MaxPool2D
from xpnet.layers.sequence_pooling import MaxPool1D
from xpnet.layers.structure import Arrays, as_tuple, first_of, one_or_tuple, shapes_of
from xpnet.parameters import Parameter, Parameters

_NOTHING = nullcontext()
_MIN_PARAMETERS_TO_COMPILE = 2**14  # parameters: training a smaller model takes less time than loading Numba


class Connection(NamedTuple):
    """An input of a model, or one output of a call of a layer.

    name: of the input, or the path of the layer.  layer: None for an input.  shape: without the batch.  inputs: the
    names of what the layer is called on.
    """

    name: str
    layer: Layer | None
    shape: Shape
    inputs: tuple[str, ...]


class Container(Layer):
    """The base of Sequential and of xpnet.Model: layers that run as one layer, by an executor.

    A subclass sets `layers`, places them in its `build`, and calls `_execute` there.
    """

    takes_list = True  # if its first layer does
    #: Whether any layer is not part of xpnet, so that the model checks its first training step.
    has_custom_layers: bool = False
    #: The layers, each once.
    layers: tuple[Layer, ...]
    _placed: tuple[Layer, ...] = ()  # the layers that run
    _sites: list[CallSite]  # in the order of the layers, which may differ from that of execution
    _executor: Executor
    _masked_outputs: tuple[bool, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "layers" and self.is_built and self.context.store.allocated:  # their parameters share one vector
            raise self._fixed_layers()
        super().__setattr__(name, value)

    def _checked_assignment(self, name: str, value: Any) -> Any:
        return value if name == "layers" else super()._checked_assignment(name, value)  # set by the container itself

    def __setitem__(self, position: Any, layer: Any) -> None:
        raise self._fixed_layers()

    def __delitem__(self, position: Any) -> None:
        raise self._fixed_layers()

    def _fixed_layers(self) -> StateError:
        return StateError(
            f"{self._label}: its layers cannot be replaced or deleted. Make another model: xpnet.Sequential of other "
            "layers, or xpnet.Model(model.inputs, tensor), which shares parameters."
        )

    def _keys(self) -> list[str]:
        """The last part of each layer's path: its name, or else its number."""
        keys = [layer.name or str(i) for i, layer in enumerate(self.layers)]
        for key, count in Counter(keys).items():
            if count > 1:
                raise ArgumentError(f"{type(self).__name__}: two of the layers have the name {key!r}. Rename one.")
        return keys

    def _execute(self, sites: Sequence[CallSite], inputs: int, outputs: Sequence[int]) -> None:
        """Run these calls of placed layers, see `Executor`."""
        self._sites = list(sites)
        self._executor = Executor(_reordered(self._sites, outputs), inputs, outputs)
        self.spread_masks([False] * inputs)  # until an outer container says otherwise

    def run_in_given_order(self) -> None:
        """Run all layers of this model, also of inner containers, in the order in which they are given."""
        for layer in every_layer(self):
            if isinstance(layer, Container):
                layer._executor = Executor(layer._sites, len(layer.input_names), layer._executor.outputs)
        self.spread_masks([False] * len(self.input_names))

    def place(self, context: Context, path: str, input_shape: Any) -> Any:
        output_shape = super().place(context, path, input_shape)
        self.splits_batch = any(layer.splits_batch for layer in self.inner_layers)
        self.has_custom_layers = self.is_custom or any(
            layer.is_custom or (isinstance(layer, Container) and layer.has_custom_layers) for layer in self.inner_layers
        )
        return output_shape

    def connections(self) -> list[Connection]:
        """The inputs, and all outputs of the layers in order."""
        shapes: Any = shapes_of(self.input_shape)
        found = [Connection(name, None, shape, ()) for name, shape in zip(self.input_names, shapes, strict=True)]
        names = dict(enumerate(self.input_names))
        for layer, inputs, outputs, _ in self._sites:
            before = tuple(names[i] for i in as_tuple(inputs))
            for k, (i, shape) in enumerate(zip(as_tuple(outputs), shapes_of(layer.output_shape), strict=True)):
                names[i] = layer.path if k == 0 else f"{layer.path}, output {k + 1}"
                found.append(Connection(names[i], layer, shape, before))
        return found

    def calls(self) -> tuple[list[CallSite], tuple[int, ...]]:
        """(the calls of the layers, in order; the numbers of the values that are outputs)."""
        return self._sites, self._executor.outputs

    def has_mask(self, inputs: int | tuple[int, ...]) -> bool:
        """Whether any of these values, by their numbers in `calls`, has a mask."""
        masked = self._executor.masked
        return bool(masked) and any(masked[i] for i in as_tuple(inputs))

    @property
    def inner_layers(self) -> tuple[Layer, ...]:
        """The layers that run. A layer that is called several times is there once for each call, as a copy."""
        return self._placed or self.layers

    @property
    def masked_outputs(self) -> tuple[bool, ...]:
        """For each output, whether it has a mask."""
        return self._masked_outputs

    def spread_masks(self, inputs: Sequence[bool]) -> tuple[bool, ...]:
        self._masked_outputs = self._executor.spread_masks(inputs)
        return self._masked_outputs

    def output_mask(self, x: Any) -> Any:
        return self.output_masks(self.context.inference)

    def output_masks(self, inference: bool = False) -> Any:
        """The masks of the outputs of the latest pass, (N, T) or None each: one, or a tuple if there are several.

        inference: whether that was an inference pass.
        """
        work = self._workspaces.get(inference)
        if not any(self._masked_outputs) or work is None:
            return one_or_tuple([None] * len(self._executor.outputs))
        return work.output_masks

    @property
    def input_names(self) -> list[str]:
        """The name of the input, in a list as in xpnet.Model."""
        return ["input_1"]

    @property
    def output_names(self) -> list[str]:
        """The name or number of the last layer, in a list as in xpnet.Model."""
        return [self.layers[-1].name or str(len(self.layers) - 1)]

    def check_input(self, index: int, x: Array, name: str) -> None:
        """`check_inputs` for one of several inputs."""
        self.check_inputs(x, name)

    def get_layer(self, name: str) -> Layer:
        """Return the layer of this name or number: "digit", "0", or "1.0" for layer 0 of layer 1.

        Raises ArgumentError if there is none, with the names that exist, and ArgumentTypeError if name is not text.
        """
        if not isinstance(name, str):
            raise ArgumentTypeError(
                f'get_layer takes a name such as "0" or "digit", not {shown(name)}; by position, use model[0].'
            )
        found: Layer = self
        for key in name.split("."):
            inner = found._by_key() if isinstance(found, Container) else {}
            if key not in inner:
                raise unknown_name("layer", name, self._names())
            found = inner[key]
        return found

    def _layer_here(self, name: str) -> Layer:
        """The layer of this name or number, which must not be inside another one."""
        layer = self.get_layer(name)
        if layer not in self.layers:
            raise ArgumentError(f"layer {name!r} is inside another layer, which has symbolic tensors of its own.")
        return layer

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    @overload
    def __getitem__(self, position: SupportsIndex) -> Layer: ...
    @overload
    def __getitem__(self, position: slice) -> tuple[Layer, ...]: ...
    def __getitem__(self, position: SupportsIndex | slice) -> Layer | tuple[Layer, ...]:
        """The layer at this position, counted from 0, or from the end if negative; a tuple of layers for a slice."""
        try:
            return self.layers[position]
        except IndexError:
            raise no_layer_at(position, type(self).__name__, len(self)) from None
        except TypeError:
            hint = f" Use get_layer({position!r})." if isinstance(position, str) else ""
            raise ArgumentTypeError(
                f"a layer's position must be an integer or a slice, not {shown(position)}.{hint}"
            ) from None

    def _by_key(self) -> dict[str, Layer]:
        """The layers by number and by name."""
        numbered: dict[str, Layer] = {str(i): layer for i, layer in enumerate(self.layers)}
        return {**numbered, **dict(zip(self._keys(), self.layers, strict=True))}

    def _names(self) -> list[str]:
        """The names that `get_layer` takes, without the numbers of named layers."""
        names = []
        for key, layer in zip(self._keys(), self.layers, strict=True):
            inner = layer._names() if isinstance(layer, Container) else []
            names += [key, *(f"{key}.{name}" for name in inner)]
        return names

    def forward(self, x: Any) -> Any:
        """The outputs of the layers, each of which runs after those that it depends on."""
        return self._executor.forward(self, x)

    def backward(self, grad_y: Any) -> Any:
        """The chain rule: each layer turns the gradient of its output into that of its input, last layer first.

        Where an array is used several times, the gradients of its uses add up. If ∂L/∂x is not wanted, layers are left
        out whose gradients no trained parameter needs.
        """
        # A subclass may need the gradient for parameters of its own.
        return self._executor.backward(self, grad_y, self.wants_input_grad or bool(self._parameters))

    def forward_pass(self, x: Arrays, training: bool = False, inference: bool = False) -> Arrays:
        """A whole pass. The result is a buffer, valid until the next pass. For the modes see `Context`.

        An inference pass does not disturb what an earlier pass kept for its backward.
        """
        with self.execution_context(len(first_of(x))):
            return self.forward_in_context(x, training, inference)

    def forward_in_context(self, x: Arrays, training: bool = False, inference: bool = False) -> Arrays:
        """`forward_pass` for a caller that is in `execution_context`, as a training step is."""
        context = self.context
        before = context.training, context.inference
        if not inference:
            context.forward_thread = 0  # the workspaces will no longer be those of a user's `forward`
        context.training, context.inference = training, inference
        try:
            y = self._run_forward(x)
        finally:
            if inference:
                context.training, context.inference = before
        for output in y if type(y) is tuple else (y,):
            if output.dtype != context.dtype:
                raise self.layers[-1].wrong_output(output.shape, context.dtype, output)
        return y

    def backward_pass(self, grad_y: Arrays, input_grad: bool = True) -> Arrays | None:
        """Backward of the latest `forward_pass` that was not inference. Returns ∂L/∂x, a buffer, if input_grad."""
        with self.execution_context():
            return self.backward_in_context(grad_y, input_grad)

    def backward_in_context(self, grad_y: Arrays, input_grad: bool = True) -> Arrays | None:
        """`backward_pass` for a caller that is in `execution_context`."""
        if self.wants_input_grad is not input_grad:
            self.wants_input_grad = input_grad
        self.context.inference = False  # which an interrupted prediction may have left behind
        return self._run_backward(grad_y)

    #: `forward` and `backward` without the checks and copies of those of a model.
    _run_forward, _run_backward = forward, backward

    def execution_context(self, samples: int | None = None) -> AbstractContextManager[Any]:
        """Used by the model: a context for a pass over this number of samples, or for a step.

        On a GPU: matrix products in the model's precision. On the CPU: compiled loops, if the model is large enough to
        need them; and threads that divide the batch, if any layer does that and there is more than one sample.
        """
        if self.context.precision is not None:
            return self.backend.matmul_precision(self.context.precision)
        if self.splits_batch or self.context.store.values.size >= _MIN_PARAMETERS_TO_COMPILE:
            return self.backend.parallel_region(self.splits_batch and samples != 1)
        return _NOTHING

    def unplace(self) -> None:
        mine = self._context
        super().unplace()
        for layer in self.inner_layers:
            if layer._context is mine:  # a layer of another model keeps its place there
                layer.unplace()
        self._placed = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def parameters(self) -> list[Parameter]:
        inner = Parameters(dict.fromkeys(parameter for layer in self.inner_layers for parameter in layer.parameters))
        if not self._parameters:
            return inner
        # A subclass may declare some of its own.
        return Parameters(sorted([*self._parameters, *inner], key=lambda p: p.slot.start))

    @property
    def trainable(self) -> bool:
        own = any(parameter.trainable for parameter in self._parameters)
        return own or any(layer.trainable for layer in self.inner_layers if layer.parameters or not self.parameters)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = flag(self, "trainable", value)
        for parameter in self._parameters:
            parameter.trainable = self._trainable
        for layer in self.inner_layers:
            layer.trainable = self._trainable

    def drop_workspaces(self, inference_only: bool = False) -> None:
        super().drop_workspaces(inference_only)
        for layer in self.inner_layers:
            layer.drop_workspaces(inference_only)


class Sequential(Container):
    """Layers one after the other, as one layer. Names of inner parameters join with dots: "1.0.weight".

    `len(s)` is the number of layers, `s[i]` the layer at position i, `s[1:3]` a tuple of layers; iteration gives all. A
    position that does not exist raises PositionError.
    """

    def __init__(self, layers: Iterable[Layer], *, name: str | None = None) -> None:
        super().__init__(name=name)
        items = None if isinstance(layers, Layer) else items_of(layers)
        if items is None:
            raise ArgumentTypeError(
                f"{type(self).__name__}: layers must be a list of layers, not {shown(layers)}. Put them in [ ]."
            )
        self.layers: tuple[Layer, ...] = items
        if not self.layers:
            raise ArgumentError(f"{type(self).__name__}: give it at least one layer.")
        given: list[Any] = list(self.layers)
        first: dict[int, int] = {}  # the first position of each object
        for i, layer in enumerate(given):
            if not isinstance(layer, Layer):
                hint = "; did you mean an object, with ()?" if isinstance(layer, type) else "."
                if isinstance(layer, tensors.Tensor):
                    hint = ". Leave it out, and give its shape as input_shape=."
                raise ArgumentTypeError(f"{type(self).__name__}: item {i} is {shown(layer)}, not a layer{hint}")
            if first.setdefault(id(layer), i) < i:
                raise StateError(
                    f"{type(self).__name__}: items {first[id(layer)]} and {i} are the same {type(layer).__name__} "
                    "object; a layer object can be used only once. Make a second layer, or share it in an xpnet.Model."
                )
        self._keys()

    def _checked_assignment(self, name: str, value: Any) -> Any:
        if name == "layers" and not self.is_built:
            return Sequential(value).layers
        return super()._checked_assignment(name, value)

    def build(self, input_shape: Shape) -> Shape:
        sites, shape = list[CallSite](), input_shape
        for i, (layer, key) in enumerate(zip(self._chain, self._keys(), strict=False)):
            site = layer.shared_copy() if _is_whole_model(layer) else layer
            self._placed = (*self._placed, site)
            shape = site.place(self.context, self._qualified(key), shape)
            if isinstance(shape, list):
                raise ShapeError(
                    f"{site._label} has several outputs, {shape_text(shape)}, but in a row each layer takes one input. "
                    "Call the layers on symbolic tensors, and make an xpnet.Model of them."
                )
            sites.append(CallSite(site, i, i + 1, shape))
        self._execute(sites, 1, [len(sites)])
        return shape

    def shared_copy(self) -> Self:
        twin = super().shared_copy()
        vars(twin)["layers"] = tuple(layer.shared_copy() for layer in self.inner_layers)
        return twin

    @property
    def _chain(self) -> tuple[Layer, ...]:
        """The layers that are applied one after the other: here, all of them."""
        return self.layers

    @property
    def _typed_layers(self) -> list[Layer]:
        """The layers that do not pass on integers and floats alike."""
        return [layer for layer in self.layers if layer.accepts_integers is not None]

    @property
    def accepts_integers(self) -> bool | None:  # type: ignore[override]
        return self._typed_layers[0].accepts_integers if self._typed_layers else None

    @property
    def gives_probabilities(self) -> bool:  # type: ignore[override]
        return bool(self._typed_layers) and self._typed_layers[-1].gives_probabilities

    def check_inputs(self, x: Array, name: str) -> None:
        for layer in self._typed_layers[:1]:
            layer.check_inputs(x, name)

    def get_config(self) -> dict[str, Any]:
        return self._with_name({"layers": list(self.layers)})


def _is_whole_model(layer: Layer) -> bool:
    """Whether this is a built model that is not part of another one. Others can share its parameters."""
    return isinstance(layer, Container) and layer.is_built and not layer.path and layer.context.store.allocated


def _reordered(sites: Sequence[CallSite], outputs: Sequence[int]) -> list[CallSite]:
    """The calls in the order of execution: a max-pooling runs before a ReLU whose only reader it is.

    The ReLU then has fewer elements to compute. That is the same function, max(relu(a), relu(b)) = relu(max(a, b)), and
    its gradients reach the same pixels.
    """
    order = list(sites)
    readers = Counter([*outputs, *(i for site in sites for i in as_tuple(site.inputs))])
    position = {site.outputs: k for k, site in enumerate(order)}
    for k, pool in enumerate(order):
        before = position.get(pool.inputs)
        if before is None or type(pool.layer) not in (MaxPool1D, MaxPool2D):
            continue
        relu = order[before]
        if type(relu.layer) is ReLU and readers[relu.outputs] == 1:
            order[before] = pool._replace(inputs=relu.inputs, outputs=relu.outputs)
            order[k] = relu._replace(inputs=relu.outputs, outputs=pool.outputs, shape=pool.shape)
    return order


def every_layer(layer: Layer) -> Iterator[Layer]:
    """A layer and all layers inside it. A layer that is called several times is there once for each call."""
    yield layer
    for inner in layer.inner_layers if isinstance(layer, Container) else ():
        yield from every_layer(inner)
