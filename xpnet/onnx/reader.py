"""Read an ONNX graph as a chain of layers, node by node. Nothing in a file is executed.

ONNX operators expect images with channels first, and xpnet's images have channels last, so every tensor records the
order of its axes in the file.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy
import onnx
from onnx import numpy_helper

from xpnet import layers
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape

#: The metadata that export_onnx writes: whether images have channels first or last in the file.
IMAGE_LAYOUT, CHANNELS_FIRST, CHANNELS_LAST = "xpnet.images", "channels first", "channels last"

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
_ELEMENTWISE = ("Relu", "Sigmoid", "Tanh", "Softplus", "LeakyRelu", "Elu", "Gelu", "Cast", "Identity", "Mul", "Add",
                "Sub", "Div", "Dropout")  # fmt: skip
_ON_IMAGES = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "BatchNormalization", "Resize")


class LoadedLayer(NamedTuple):
    """A layer, its weights by their names in xpnet, and the shape of a sample of its output.

    branches: the layers and the skip connection of a Residual.
    """

    layer: Layer
    weights: dict[str, numpy.ndarray[Any, Any]]
    shape: Shape
    branches: tuple[tuple["LoadedLayer", ...], ...] = ()


class Tensor(NamedTuple):
    """A tensor of the graph: the layers that compute it from the input, and the shape of a sample in xpnet.

    channels_first: whether the features are on axis 1 in the file. flattened_from: the (H, W, C) of an image that the
    file flattened with its channels first; xpnet flattens it in another order.
    """

    layers: tuple[LoadedLayer, ...]
    shape: Shape
    channels_first: bool = False
    flattened_from: Shape | None = None

    def add(self, layer: Layer, channels_first: bool | None = None, **weights: Any) -> "Tensor":
        """The output of a layer with this input. channels_first: of the output; None means as in the input."""
        shape = copy_of(layer).build(self.shape, backend="cpu")
        loaded = LoadedLayer(layer, {name: numpy.asarray(a) for name, a in weights.items() if a is not None}, shape)
        first = self.channels_first if channels_first is None else channels_first
        return Tensor((*self.layers, loaded), shape, first and len(shape) > 1, self.flattened_from)

    def in_file_order(self) -> "Tensor":
        """The same with its axes and features in the order of the file, by Permute layers."""
        x, axes = self.resolve_flatten(), len(self.shape)
        if not x.channels_first:
            return x
        return x.add(layers.Permute((axes - 1, *range(axes - 1))), channels_first=False)

    def resolve_flatten(self) -> "Tensor":
        """The same with its features in the order of the file, by a Permute before the Flatten of an image."""
        if self.flattened_from is None:
            return self
        index = max(i for i, loaded in enumerate(self.layers) if isinstance(loaded.layer, layers.Flatten))
        height, width, channels = self.flattened_from
        permute = LoadedLayer(layers.Permute((2, 0, 1)), {}, (channels, height, width))
        return self._replace(layers=(*self.layers[:index], permute, *self.layers[index:]), flattened_from=None)


def copy_of(layer: Layer) -> Layer:
    """A new layer with the same arguments, which can be built to learn its shapes."""
    return type(layer).from_config(layer.get_config())


def file_shape(shape: Sequence[int], channels_first: bool) -> list[int]:
    """The shape that a sample of this shape has in the file."""
    return [shape[-1], *shape[:-1]] if channels_first else list(shape)


def transposition(axes: int, channels_first: bool) -> list[int]:
    """The permutation that moves channels to the front, or back to the end, of samples with so many axes."""
    return [0, axes, *range(1, axes)] if channels_first else [0, *range(2, axes + 1), 1]


class BatchSize:
    """A placeholder for the size of the batch in a shape."""

    def __repr__(self) -> str:
        return "N"


BATCH = BatchSize()
Constant: TypeAlias = numpy.ndarray[Any, Any]


class Reader:
    """Reads the graph of one file. Its tensors, constants and shapes (lists of integers and BATCH) are kept by name."""

    def __init__(self, path: Any, file: onnx.ModelProto) -> None:
        self._path, self._graph = path, file.graph
        graph = file.graph
        self._image_layout = {p.key: p.value for p in file.metadata_props}.get(IMAGE_LAYOUT)
        self._constants = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
        inputs = [i for i in graph.input if i.name not in self._constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise self.error(f"the graph must have 1 input and 1 output, not {len(inputs)} and {len(graph.output)}")
        shape = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
        batch, sizes = shape[:1], shape[1:]
        if not sizes or not all(n > 0 for n in sizes):
            raise self.error(f"the shape of the input must be fixed except for the batch, not {shape}")
        floats = [c.data_type for c in graph.initializer if c.data_type in _FLOATS]
        self.dtype = "float64" if onnx.TensorProto.DOUBLE in floats else "float32"
        self.batch_size: int | None = batch[0] or None  # None if it is not fixed
        self._input = inputs[0].name
        channels_last = self._image_layout != CHANNELS_FIRST if self._image_layout else self._input_is_channels_last()
        self._channels_first = len(sizes) == 3 and not channels_last
        self.input_shape: Shape = (*sizes[1:], sizes[0]) if self._channels_first else tuple(sizes)

    def read(self) -> Tensor:
        """The output of the graph."""
        values: dict[str, Any] = {**self._constants, self._input: Tensor((), self.input_shape, self._channels_first)}
        for node in self._graph.node:
            if node.op_type not in CONVERTERS:
                raise self.error(f"operator {node.op_type} is not supported")
            inputs = [values[name] if name else None for name in node.input]
            values[node.output[0]] = CONVERTERS[node.op_type](Node(self, node, inputs))
        output = values[self._graph.output[0].name]
        if not isinstance(output, Tensor):
            raise self.error("the output does not depend on the input")
        # Images have channels last in the model; everything else has the order of the file.
        if len(output.shape) != 3 or self._image_layout == CHANNELS_LAST:
            return output.in_file_order()
        if not output.channels_first and self._image_layout == CHANNELS_FIRST:
            return output.add(layers.Permute((1, 2, 0)))
        return output.resolve_flatten()

    def _input_is_channels_last(self) -> bool:
        """Whether the images of the input are transposed before the first operator on images."""
        names = {self._input}
        for node in self._graph.node:
            if names & set(node.input):
                if node.op_type in _ON_IMAGES:
                    return False
                if node.op_type not in _ELEMENTWISE:
                    return True
                names.add(node.output[0])
        return True

    def error(self, reason: str) -> ArgumentError:
        return ArgumentError(f"{self._path}: {reason}. xpnet imports chains of the layers that it exports.")


class Node:
    """A node of the graph with its inputs: a Tensor, a Constant or a shape each, or None for an optional input."""

    def __init__(self, reader: Reader, node: Any, inputs: list[Any]) -> None:
        self.operator: str = node.op_type
        self.inputs, self.batch_size = inputs, reader.batch_size
        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        self._reader, self._name = reader, node.name or node.output[0]

    def error(self, reason: str) -> ArgumentError:
        """An error that says what is not supported about this node."""
        return self._reader.error(f"operator {self.operator} {reason} (node {self._name!r})")

    def tensor(self, index: int = 0) -> Tensor:
        """An input that must depend on the graph's input."""
        if isinstance(value := self.inputs[index], Tensor):
            return value
        raise self.error("is applied to constants, or to a shape in an unsupported way")

    def image(self) -> Tensor:
        """The first input, which must be images, with channels first in the file."""
        image = self.tensor()
        if len(image.shape) != 3 or not image.channels_first:
            raise self.error(f"is supported for images (N, C, H, W), not for samples of shape {image.shape}")
        return image

    def constant(self, index: int, name: str) -> Constant:
        """An input that must be constant."""
        value = self.inputs[index]
        if isinstance(value, list) and BATCH not in value:
            return numpy.asarray(value)
        if not isinstance(value, numpy.ndarray):
            raise self.error(f"has a {name} that is not constant")
        return value

    def optional(self, index: int, name: str) -> Constant | None:
        """An input that must be constant or left out."""
        missing = index >= len(self.inputs) or self.inputs[index] is None
        return None if missing else self.constant(index, name)

    def pair(self, name: str) -> tuple[int, ...]:
        """An attribute with a number for each of two axes, 1 by default."""
        return tuple(self.attributes.get(name, (1, 1)))

    def pads(self) -> list[int]:
        """The padding (top, left, bottom, right)."""
        return list(self.attributes.get("pads", (0, 0, 0, 0)))

    def axes(self) -> list[int]:
        """The axes that an attribute or, in later versions, the second input lists; empty if neither does."""
        if "axes" in self.attributes:
            return list(self.attributes["axes"])
        axes = self.optional(1, "axis")
        return [] if axes is None else axes.reshape(-1).tolist()


#: node → its output.
Converter: TypeAlias = Callable[[Node], Any]
CONVERTERS: dict[str, Converter] = {}


def converts(*operators: str) -> Callable[[Converter], Converter]:
    """Register a function that converts nodes with these operators."""

    def register(converter: Converter) -> Converter:
        CONVERTERS.update(dict.fromkeys(operators, converter))
        return converter

    return register
