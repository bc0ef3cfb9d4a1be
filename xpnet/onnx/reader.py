"""Reading an ONNX graph as a chain of layers.

The graph is read node by node. A value is the chain of layers that leads to it. ONNX's images have their channels
first, ours last: a value also tells in which order the file has its axes. Nothing in a file is run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy
import onnx
from onnx import numpy_helper

from xpnet import layers
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer, Shape

#: What a file of ours says of its images.
IMAGES, FIRST, LAST = "xpnet.images", "channels first", "channels last"

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)


class Part(NamedTuple):
    """A layer of the chain, with its weights by xpnet's names; and the shape of a sample after it."""

    layer: Layer
    weights: dict[str, numpy.ndarray[Any, Any]]
    shape: Shape
    ways: tuple[tuple["Part", ...], ...] = ()  # of a Residual: the layers, the skip


class Value(NamedTuple):
    """What a tensor of the graph is in xpnet: the layers that lead to it, the shape of a sample, the order of its axes.

    first: the file's tensor has its features on axis 1, ours last.
    flat_of: the (H, W, C) of an image that was flattened with its channels first, which is another order than ours.
    """

    parts: tuple[Part, ...]
    shape: Shape
    first: bool = False
    flat_of: Shape | None = None


class BatchSize:
    """The size of the batch, among the numbers of a shape."""

    def __repr__(self) -> str:
        return "N"


Constant: TypeAlias = numpy.ndarray[Any, Any]


class Reader:
    """Reads one graph."""

    def __init__(self, path: Any, file: onnx.ModelProto) -> None:
        self._path, self._graph = path, file.graph
        graph, told = file.graph, {p.key: p.value for p in file.metadata_props}.get(IMAGES)
        self._constants = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
        self._values: dict[str, Value | Constant | list[Any]] = dict(self._constants)
        inputs = [i for i in graph.input if i.name not in self._constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise self._refuse(f"it has {len(inputs)} inputs and {len(graph.output)} outputs, not one of each")
        kind = inputs[0].type.tensor_type
        sizes = [d.dim_value for d in kind.shape.dim]
        if len(sizes) < 2 or not all(n > 0 for n in sizes[1:]):
            raise self._refuse(f"the shape of its input is {sizes}, of which all but the batch must be known")
        self._input, self._input_kind, self._sizes = inputs[0].name, kind.elem_type, sizes
        floats = [c.data_type for c in graph.initializer if c.data_type in _FLOATS]
        self.dtype = "float64" if onnx.TensorProto.DOUBLE in floats else "float32"
        self._first = len(sizes) == 4 and (told == FIRST if told else not self._is_turned())
        self._told = told

    @property
    def input_shape(self) -> Shape:
        _, *sizes = self._sizes
        return (sizes[1], sizes[2], sizes[0]) if self._first else tuple(sizes)

    def read(self) -> Value:
        """The output."""
        self._values[self._input] = Value((), self.input_shape, self._first)
        for node in self._graph.node:
            read = READERS.get(node.op_type)
            if read is None:
                raise self._refuse(f"operator {node.op_type} has no layer here")
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            inputs = [self._values[name] if name else None for name in node.input]
            self._values[node.output[0]] = read(self, node, inputs, attributes)
        value = self._values[self._graph.output[0].name]
        if not isinstance(value, Value):
            raise self._refuse("its output does not depend on its input")
        # Images stay as ours are, their channels last; anything else comes in the file's order.
        if len(value.shape) != 3 or self._told == LAST:
            return self.in_order(value)
        if not value.first and self._told == FIRST:
            return self.add(value, layers.Permute((1, 2, 0)))
        return self.settled(value)

    def _is_turned(self) -> bool:
        """Whether input images are given channels last: no operator on images comes before they are turned."""
        names = {self._input}
        for node in self._graph.node:
            if names & set(node.input):
                if node.op_type in _ON_IMAGES:
                    return False
                if node.op_type not in _OF_ELEMENTS:
                    return True
                names.add(node.output[0])
        return True

    def _refuse(self, why: str, node: Any = None) -> ArgumentError:
        where = "" if node is None else f" (node {node.name or node.output[0]!r})"
        return ArgumentError(f"{self._path}: {why}{where}. xpnet imports chains of the layers that it exports.")

    # For operators ----------------------------------------------------------------------------------------------------

    def refuse(self, node: Any, why: str) -> ArgumentError:
        return self._refuse(f"operator {node.op_type} {why}", node)

    def data(self, node: Any, value: Any) -> Value:
        """A value that depends on the input."""
        if isinstance(value, Value):
            return value
        raise self.refuse(node, "works on constants only, or on shapes in a way that is not known")

    def constant(self, node: Any, value: Any, what: str) -> Constant:
        if isinstance(value, list) and BATCH not in value:
            return numpy.asarray(value)
        if not isinstance(value, numpy.ndarray):
            raise self.refuse(node, f"has a {what} that is not a constant")
        return value

    def image(self, node: Any, value: Any) -> Value:
        """A value of images, with channels first in the file."""
        found = self.data(node, value)
        if len(found.shape) != 3 or not found.first:
            raise self.refuse(node, f"works on images (N, C, H, W), not on samples of shape {found.shape}")
        return found

    def add(self, value: Value, layer: Layer, first: bool | None = None, **weights: Any) -> Value:
        """The value after one more layer."""
        tried: Layer = type(layer).from_config(layer.get_config())
        shape = tried.build(value.shape, backend="cpu", dtype=self.dtype)
        part = Part(layer, {name: numpy.asarray(a) for name, a in weights.items() if a is not None}, shape)
        turned = value.first if first is None else first
        return Value((*value.parts, part), shape, turned and len(shape) > 1, value.flat_of)

    @property
    def batch_size(self) -> int | None:
        """With which the file was made, if for one only."""
        return self._sizes[0] or None

    def sizes(self, value: Value) -> Shape:
        """The shape of a sample in the file's order."""
        return (value.shape[-1], *value.shape[:-1]) if value.first else value.shape

    def in_order(self, value: Value) -> Value:
        """The value with its axes in the file's order."""
        value = self.settled(value)
        if not value.first:
            return value
        axes = len(value.shape)
        return self.add(value, layers.Permute((axes - 1, *range(axes - 1))), first=False)

    def settled(self, value: Value) -> Value:
        """The value with its features in the file's order, where an image was flattened with its channels first."""
        if value.flat_of is None:
            return value
        flattened = max(i for i, part in enumerate(value.parts) if isinstance(part.layer, layers.Flatten))
        before, after = value.parts[:flattened], value.parts[flattened:]
        height, width, channels = value.flat_of
        turn = Part(layers.Permute((2, 0, 1)), {}, (channels, height, width))
        return value._replace(parts=(*before, turn, *after), flat_of=None)


BATCH = BatchSize()
_OF_ELEMENTS = ("Relu", "Sigmoid", "Tanh", "Softplus", "LeakyRelu", "Elu", "Gelu", "Cast", "Identity", "Mul", "Add",
                "Sub", "Div", "Dropout")  # fmt: skip
_ON_IMAGES = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "BatchNormalization", "Resize")
Read: TypeAlias = Callable[[Reader, Any, list[Any], dict[str, Any]], Any]
READERS: dict[str, Read] = {}


def reads(*kinds: str) -> Callable[[Read], Read]:
    def note(read: Read) -> Read:
        for kind in kinds:
            READERS[kind] = read
        return read

    return note
