"""Symbolic tensors: layers are called on them to describe a graph, from which `xpnet.Model` is made."""

from collections.abc import Iterable
from typing import Any

from xpnet.config import as_shape
from xpnet.errors import ArgumentError, ArgumentTypeError, shape_text, shown
from xpnet.layers.structure import shapes_of


class Tensor:
    """An input of a graph, or an output of a layer in it. It has a shape, but no values.

    shape: without the batch.  name: of an input, or None.  node: the call of a layer that computes it, or None for an
    input.  index: its position among the outputs of that call.
    """

    def __init__(
        self, shape: tuple[int, ...], *, name: str | None = None, node: "Node | None" = None, index: int = 0
    ) -> None:
        self.shape, self.name, self.node, self.index = shape, name, node, index

    def __eq__(self, other: object) -> bool:
        if self.node is None or not isinstance(other, Tensor):
            return self is other
        return self.node is other.node and self.index == other.index

    def __hash__(self) -> int:
        return hash((id(self) if self.node is None else id(self.node), self.index))

    def __repr__(self) -> str:
        if self.node is None:
            what = "input" if self.name is None else f"input {self.name!r}"
        else:
            what = f"output of {type(self.node.layer).__name__}"
        return f"<Tensor {shape_text(self.shape)}, {what}>"


class Node:
    """One call of a layer on tensors.

    inputs: tensors.  takes_list: whether the layer was called on a list, and so takes a list of arrays.  returns_list:
    whether it has several outputs.
    """

    def __init__(self, layer: Any, inputs: tuple[Tensor, ...], takes_list: bool, output_shape: Any) -> None:
        self.layer, self.inputs, self.takes_list = layer, inputs, takes_list
        self.returns_list, self._shapes = isinstance(output_shape, list), shapes_of(output_shape)

    @property
    def outputs(self) -> list[Tensor]:
        """The output tensors."""
        # Made anew, since they refer to the node: a reference cycle would delay freeing the layers.
        return [Tensor(shape, node=self, index=i) for i, shape in enumerate(self._shapes)]


def Input(shape: int | Iterable[int], *, name: str | None = None) -> Tensor:  # noqa: N802  # reads like a layer
    """Return a symbolic tensor, an input of an `xpnet.Model`: x = Input((28, 28, 1)); y = layers.Flatten()(x).

    shape: of one sample, without the batch.  name: what `fit` and `predict` call it in dicts of arrays.
    """
    if name is not None:
        check_name("Input", name)
    return Tensor(as_shape(shape), name=name)


def call(layer: Any, inputs: Any) -> Any:
    """The symbolic outputs of a layer called on a tensor or on a list of tensors."""
    takes_list = isinstance(inputs, list | tuple)
    tensors = tuple(inputs) if takes_list else (inputs,)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        wrong = next((tensor for tensor in tensors if not isinstance(tensor, Tensor)), inputs)
        raise ArgumentTypeError(
            f"{type(layer).__name__}: a layer is called on symbolic tensors, xpnet.Input(shape) or outputs of other "
            f"layers, not on {_description(wrong)}. For arrays, use predict or forward of a model, or build the layer "
            "and call its forward."
        )
    shapes = [tensor.shape for tensor in tensors]
    node = Node(layer, tensors, takes_list, layer.shape_for(shapes if takes_list else shapes[0]))
    return node.outputs if node.returns_list else node.outputs[0]


def _description(value: Any) -> str:
    kind = type(value)
    return repr(value) if kind.__module__ == "builtins" else f"a {kind.__module__}.{kind.__name__}"


def nodes_between(inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> list[Node]:
    """The calls that compute the outputs from the inputs, each after those that it depends on.

    The order is the postorder of a depth-first search from the outputs.
    """
    known, order, seen = set(inputs), list[Node](), set[Node]()
    waiting = [(tensor, False) for tensor in reversed(list(outputs))]
    while waiting:
        tensor, inputs_done = waiting.pop()
        node = tensor.node
        if inputs_done:
            assert node is not None
            order.append(node)
        elif tensor not in known and node not in seen:
            if node is None:
                raise ArgumentError(
                    f"Model: the outputs depend on {tensor!r}, which is not among the inputs. Add it to inputs."
                )
            seen.add(node)
            waiting.append((tensor, True))
            waiting += [(inner, False) for inner in reversed(node.inputs)]
    return order


def check_name(kind: str, name: Any) -> None:
    """Raise an error unless this can be the name of a layer or an input, which takes the place of a number."""
    if not isinstance(name, str):
        raise ArgumentTypeError(f"{kind}: name must be text, not {shown(name)}.")
    if not name.strip() or not name.isprintable() or "." in name or "/" in name or name.isdigit():
        raise ArgumentError(
            f"{kind}: name must be text without dots and slashes, and not a number, since it takes the place of a "
            f'number in names such as "1.0.weight"; not {shown(name)}.'
        )
