"""Graph: layers that are called on one another's outputs, as one layer. `xpnet.Model` is a graph to be trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from xpnet.backends import Array
from xpnet.errors import ArgumentError, ArgumentTypeError, shape_text, shown
from xpnet.layers.activations import Identity
from xpnet.layers.base import Layer
from xpnet.layers.containers import Container
from xpnet.layers.executor import CallSite
from xpnet.layers.structure import as_tuple, one_or_tuple, shapes_of
from xpnet.layers.tensors import Input, Tensor, nodes_between


class Graph(Container):
    """The layers between symbolic tensors, as one layer with one or several inputs and outputs.

    Each layer is in `layers` once. A layer that is called several times, or that another model uses too, shares its
    parameters; but each call has shapes, workspaces and noise of its own.
    """

    def __init__(self, inputs: Any, outputs: Any, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.inputs, self.outputs = _tensors("inputs", inputs), _tensors("outputs", outputs)
        self._nodes = nodes_between(self.inputs, self.outputs)
        if clash := next((tensor for tensor in self.outputs if tensor in self.inputs), None):
            raise ArgumentError(
                f"Model: {clash!r} is an input and an output. Give layers.Identity()(tensor) as output."
            )
        self.layers = tuple(dict.fromkeys(node.layer for node in self._nodes))
        self._keys()
        names = self.input_names
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ArgumentError(f"Model: two of the inputs have the name {double!r}. Rename one.")

    def __call__(self, inputs: Any) -> Any:
        single = isinstance(inputs, list | tuple) and len(inputs) == len(self.inputs) == 1
        return super().__call__(inputs[0] if single else inputs)

    def build(self, input_shape: Any) -> Any:
        values = {tensor: i for i, tensor in enumerate(self.inputs)}
        shapes = list(shapes_of(input_shape))
        if len(shapes) != len(self.inputs):
            raise self.refuse("1 input" if len(self.inputs) == 1 else f"{len(self.inputs)} inputs", input_shape)
        keys, calls, sites = dict(zip(self.layers, self._keys(), strict=True)), dict[Layer, int](), list[CallSite]()
        for node in self._nodes:
            layer = node.layer
            calls[layer] = count = calls.get(layer, 0) + 1
            path = self._qualified(keys[layer] if count == 1 else f"{keys[layer]}#{count}")
            site = layer.shared_copy() if layer.is_built else layer
            self._placed = (*self._placed, site)
            inputs = tuple(values[tensor] for tensor in node.inputs)
            shape = site.place(
                self.context, path, [shapes[i] for i in inputs] if node.takes_list else shapes[inputs[0]]
            )
            outputs = tuple(range(len(shapes), len(shapes) + len(node.outputs)))
            values.update(zip(node.outputs, outputs, strict=True))
            shapes += shape if node.returns_list else [shape]
            sites.append(
                CallSite(
                    site,
                    inputs if node.takes_list else inputs[0],
                    outputs if node.returns_list else outputs[0],
                    () if node.returns_list else shape,
                )
            )
        given = [values[tensor] for tensor in self.outputs]
        self._execute(self._with_floats(sites, shapes), len(self.inputs), given)
        return [shapes[i] for i in given] if len(given) > 1 else shapes[given[0]]

    def output_of(self, name: str) -> Tensor:
        """The symbolic output of the layer of this name or number, where it is called first.

        `xpnet.Model(model.inputs, model.output_of("2"))` is the part of a model up to layer 2, with its parameters.
        """
        layer = self._layer_here(name)
        node = next(node for node in self._nodes if node.layer is layer)
        return node.outputs[0]

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs: those of Input, or "input_1", "input_2", …."""
        return [tensor.name or f"input_{i}" for i, tensor in enumerate(self.inputs, 1)]

    @property
    def output_names(self) -> list[str]:
        """The names or numbers of the layers that give the outputs. Further outputs of a layer have a suffix, "_2"."""
        keys, names = dict(zip(self.layers, self._keys(), strict=True)), list[str]()
        for tensor in self.outputs:
            assert tensor.node is not None
            key = keys[tensor.node.layer]
            count = sum(name == key or name.startswith(f"{key}_") for name in names)
            names.append(f"{key}_{count + 1}" if count else key)
        return names

    @property
    def accepts_integers(self) -> Any:  # type: ignore[override]
        """Whether integers stay integers; a tuple if there are several inputs."""
        kinds = []
        for i in range(len(self.inputs)):
            found = [_kind(*reader) for reader in self._readers(i)]
            kinds.append(any(found) if found else None)
        return one_or_tuple(kinds)

    @property
    def gives_probabilities(self) -> Any:  # type: ignore[override]
        """Whether the outputs are probabilities; a tuple if there are several outputs."""
        last = [self.last_layer(i) for i in range(len(self.outputs))]
        return one_or_tuple([layer is not None and layer.gives_probabilities for layer in last])

    def check_inputs(self, x: Any, name: str) -> None:
        for i, values in enumerate(as_tuple(x)):
            self.check_input(i, values, name)

    def check_input(self, index: int, x: Array, name: str) -> None:
        """`check_inputs` for one of several inputs."""
        for layer, position in self._readers(index):
            if isinstance(layer, Graph):
                layer.check_input(position, x, name)
            else:
                layer.check_inputs(x, name)

    def last_layer(self, index: int = 0) -> Layer | None:
        """The layer that gives output `index`, apart from layers such as Flatten that only pass numbers on."""
        value = self._executor.outputs[index]
        by_output = {i: site for site in self._sites for i in as_tuple(site.outputs)}
        while (site := by_output.get(value)) is not None:
            if isinstance(site.layer, Graph):
                return site.layer.last_layer(as_tuple(site.outputs).index(value))
            if site.layer.accepts_integers is not None:
                return site.layer  # type: ignore[no-any-return]
            value = as_tuple(site.inputs)[0]
        return None

    def _with_floats(self, sites: list[CallSite], shapes: list[Any]) -> list[CallSite]:
        """The calls, with a conversion of integers before each layer that takes floats where another takes integers."""
        self._sites = sites
        names, order, floats = dict(enumerate(self.input_names)), list[CallSite](), dict[int, int]()
        for i in range(len(self.inputs)):
            if not any(_kind(*reader) for reader in self._readers(i)):
                del names[i]
        for site in sites:
            inputs = list(as_tuple(site.inputs))
            for position, i in enumerate(inputs):
                kind = _kind(site.layer, position) if i in names else True
                if kind is None:
                    names.update(dict.fromkeys(as_tuple(site.outputs), f"{names[i]}, rearranged"))
                elif kind is False:
                    if i not in floats:
                        layer = _ToFloats()
                        self._placed = (*self._placed, layer)
                        layer.place(self.context, self._qualified(f"{names[i]}, as floats"), shapes[i])
                        floats[i] = len(shapes)
                        order.append(CallSite(layer, i, len(shapes), shapes[i]))
                        shapes.append(shapes[i])
                    inputs[position] = floats[i]
            order.append(site._replace(inputs=tuple(inputs) if isinstance(site.inputs, tuple) else inputs[0]))
        return order

    def _readers(self, value: int) -> Iterator[tuple[Layer, int]]:
        """The layers that read a value and do not only pass numbers on, each with the position among its inputs."""
        for site in self._sites:
            for position, i in enumerate(as_tuple(site.inputs)):
                if i == value and _kind(site.layer, position) is not None:
                    yield site.layer, position
                elif i == value:
                    for output in as_tuple(site.outputs):
                        yield from self._readers(output)

    def get_config(self) -> dict[str, Any]:
        """The layers, and how they are connected: see `tensors_of`."""
        return self._with_name({"layers": list(self.layers), **self._connections(self.layers.index)})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(*checked_tensors_of(config), name=config.get("name"))

    def _connections(self, number_of: Callable[[Layer], int]) -> dict[str, list[Any]]:
        values, calls = {tensor: i for i, tensor in enumerate(self.inputs)}, []
        for node in self._nodes:
            calls.append([number_of(node.layer), [values[tensor] for tensor in node.inputs], node.takes_list])
            values.update((tensor, len(values)) for tensor in node.outputs)
        inputs = [[list(tensor.shape), tensor.name] for tensor in self.inputs]
        return {"inputs": inputs, "calls": calls, "outputs": [values[tensor] for tensor in self.outputs]}

    def __repr__(self) -> str:
        name, shapes = "" if self.name is None else f" {self.name!r}", [tensor.shape for tensor in self.inputs]
        outputs = [tensor.shape for tensor in self.outputs]
        return f"<{type(self).__name__}{name} of {len(self)} layers: {shape_text(shapes)} → {shape_text(outputs)}>"

    def __getstate__(self) -> dict[str, Any]:
        # Symbolic tensors belong to all models made from them. A copy has tensors and layers of its own.
        state = super().__getstate__()
        if not self._placed:
            return state
        for name in ("inputs", "outputs", "_nodes", "layers"):
            del state[name]
        first = {node.layer: k for k, node in reversed(list(enumerate(self._nodes)))}
        return {**state, "_graph": self._connections(first.__getitem__)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = state.pop("_graph", None)
        super().__setstate__(state)
        if graph is not None:
            self.inputs, self.outputs = tensors_of({"layers": self._placed, **graph})
            self._nodes = nodes_between(self.inputs, self.outputs)
            vars(self)["layers"] = tuple(dict.fromkeys(node.layer for node in self._nodes))


def tensors_of(config: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """(the inputs, the outputs) of the graph that `Graph.get_config` describes.

    inputs: [shape, name] of each.  calls: [the number of a layer, the numbers of the tensors that it is called on,
    whether it takes a list].  outputs: numbers of tensors, which are counted from the inputs on.
    """
    inputs = [Input(shape, name=name) for shape, name in config["inputs"]]
    tensors = [*inputs]
    for number, positions, takes_list in config["calls"]:
        given = [numbered("tensor", tensors, i) for i in positions]
        if not isinstance(takes_list, bool) or (not takes_list and len(given) != 1):
            raise ArgumentError(f"Model: a layer cannot be called on {positions} with takes_list={takes_list!r}.")
        layer = numbered("layer", config["layers"], number)
        tensors += as_tuple(layer(given if takes_list else given[0]))
    return inputs, [numbered("tensor", tensors, i) for i in config["outputs"]]


def checked_tensors_of(config: Mapping[str, Any], more: Sequence[str] = ()) -> tuple[list[Tensor], list[Tensor]]:
    """`tensors_of` a config from a file. more: its keys besides a graph's. Unused parts raise ArgumentError."""
    if unknown := sorted(config.keys() - {"layers", "inputs", "calls", "outputs", "name", *more}):
        raise ArgumentError(f"Model: its graph has {', '.join(map(repr, unknown))}, which xpnet does not know.")
    tensors = tensors_of(config)
    if (needed := len(nodes_between(*tensors))) < len(config["calls"]):
        raise ArgumentError(f"Model: its outputs need only {needed} of its {len(config['calls'])} calls of layers.")
    if unused := set(range(len(config["layers"]))) - {number for number, *_ in config["calls"]}:
        raise ArgumentError(f"Model: no call uses layers {sorted(unused)}.")
    return tensors


def numbered(kind: str, items: Sequence[Any], number: Any) -> Any:
    """The item with this number. Raises ArgumentError if there is none, as in a damaged file."""
    if type(number) is not int or not 0 <= number < len(items):
        raise ArgumentError(f"Model: there is no {kind} number {shown(number)}.")
    return items[number]


class _ToFloats(Identity):
    """y = x in the dtype of the model: (N, *shape) → (N, *shape). A graph puts it where integers are read as floats."""

    accepts_integers = True  # type: ignore[assignment]

    def forward(self, x: Array) -> Array:
        y = self.work.buffer("y", x.shape)
        y[...] = x
        return y


def _tensors(name: str, given: Any) -> list[Tensor]:
    tensors = list(given) if isinstance(given, list | tuple) else [given]
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        hint = " Layers in a row make an xpnet.Sequential." if any(isinstance(a, Layer) for a in tensors) else ""
        raise ArgumentTypeError(
            f"Model: {name} must be a symbolic tensor or a list of them, from xpnet.Input and from layers called on "
            f"tensors, not {shown(given)}.{hint}"
        )
    if len(set(tensors)) < len(tensors) and name == "inputs":
        raise ArgumentError("Model: the same tensor is twice among the inputs.")
    return tensors


def _kind(layer: Layer, position: int) -> bool | None:
    """Whether a layer takes integers at this position of its inputs."""
    kinds: Any = layer.accepts_integers
    return kinds[position] if isinstance(kinds, tuple) else kinds  # type: ignore[no-any-return]
