"""Write an ONNX graph: its nodes and constants, and a table of the functions that add the nodes of each layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import onnx
from onnx import helper, numpy_helper

from xpnet import layers
from xpnet._version import __version__
from xpnet.errors import ArgumentError
from xpnet.layers.containers import Container
from xpnet.layers.graph import Graph
from xpnet.layers.structure import as_tuple
from xpnet.onnx.tensors import file_shape, transposition
from xpnet.parameters import Buffer, Parameter

_OPSET, _IR_VERSION = 20, 9  # the first opset with Gelu, and the IR version of the same ONNX release

#: Layers whose outputs depend on the mask of their inputs.
_RESPECT_MASKS = (layers.Bidirectional, layers.GRU, layers.GlobalAveragePool1D, layers.GlobalMaxPool1D, layers.LSTM,
                  layers.MultiHeadAttention, layers.SimpleRNN)  # fmt: skip


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the graph: its name, dtype, the shape of a sample in xpnet, and whether its channels come first."""

    name: str
    dtype: numpy.dtype[Any]
    shape: tuple[int, ...]
    channels_first: bool = False

    @property
    def info(self) -> onnx.ValueInfoProto:
        """Its description as an input or output of the file."""
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        return helper.make_tensor_value_info(
            self.name, kind, ["N", *map(self._size, file_shape(self.shape, self.channels_first))]
        )

    def _size(self, size: int | None) -> int | str:
        """A size in the file. Open ones have different names, because tools take equal names for equal sizes."""
        return f"{self.name}_steps" if size is None else size


class GraphWriter:
    """The nodes and constants of an ONNX graph in construction."""

    def __init__(self, model: Container, dtype: numpy.dtype[Any], reserved: Sequence[str]) -> None:
        """reserved: the names of the inputs and outputs."""
        self.to_numpy, self.dtype, self._reserved = model.backend.to_numpy, dtype, reserved
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._conversions: dict[Any, FileTensor] = {}

    def add_node(self, kind: str, x: FileTensor, *more: str, output: int = 0, **attributes: Any) -> FileTensor:
        """Add a node and return this one of its outputs, which has the order of axes of x.

        more: names of further inputs.
        """
        name = self._free(f"{kind.lower()}_{len(self._nodes)}")
        self._nodes.append(helper.make_node(kind, [x.name, *more], [*[""] * output, name], name=name, **attributes))
        return replace(x, name=name)

    def _free(self, name: str) -> str:
        return self._free(f"{name}_") if name in self._reserved else name

    def add_constant(self, values: Any, dtype: Any = None, name: str = "") -> str:
        """Add a constant and return its name. Calls of a shared layer have the same one."""
        name = name or self._free(f"constant_{len(self._constants)}")
        given = self.to_numpy(values)
        with numpy.errstate(over="ignore"):
            array = numpy.ascontiguousarray(given, dtype=dtype or self.dtype)
        if numpy.isinf(array).any() and not numpy.isinf(given).any():
            raise ArgumentError(f"{name} is too large for {array.dtype}: give export_onnx dtype='float64'.")
        if name in self._constants and tuple(self._constants[name].dims) != array.shape:
            name = f"{name} {array.shape}"
        self._constants[name] = numpy_helper.from_array(array, name)
        return name

    def add_weight(self, weight: Parameter | Buffer) -> str:
        """Add the values of a parameter or buffer as a constant of its name."""
        return self.add_constant(weight.value, name=weight.name)

    def add_per_feature(self, weight: Parameter, x: FileTensor) -> str:
        """Add a parameter (features,) in a shape that is broadcast along the features of x."""
        axes = len(x.shape) - 1 if x.channels_first else 0
        return self.add_constant(weight.value.reshape(-1, *[1] * axes), name=weight.name)

    def transposed(self, x: FileTensor, channels_first: bool) -> FileTensor:
        """x with channels first or last, by a Transpose node if necessary."""
        if x.channels_first == channels_first:
            return x
        perm = transposition(len(x.shape), channels_first)
        return self._converted("Transpose", x, {"perm": perm}, channels_first=channels_first)

    def cast(self, x: FileTensor, dtype: numpy.dtype[Any]) -> FileTensor:
        """x in another dtype, by a Cast node if necessary."""
        if x.dtype == dtype:
            return x
        return self._converted("Cast", x, {"to": helper.np_dtype_to_tensor_dtype(dtype)}, dtype=dtype)

    def _converted(self, kind: str, x: FileTensor, attributes: dict[str, Any], **changed: Any) -> FileTensor:
        """x after a node that changes its dtype or the order of its axes: one node for all that read it so."""
        key = kind, x.name, *changed.values()
        if key not in self._conversions:
            self._conversions[key] = replace(self.add_node(kind, x, **attributes), **changed)
        return self._conversions[key]

    def add_layer(self, layer: layers.Layer, x: Any, has_mask: bool = False) -> Any:
        """Add the nodes of a layer with the input x and return its output; each a tensor, or a list of them."""
        if has_mask and isinstance(layer, _RESPECT_MASKS):
            raise ArgumentError(
                f"layer {layer.path} ({type(layer).__name__}) leaves out the padded steps of a sequence, which its "
                "ONNX node cannot. Export a model without Masking and without padding_index."
            )
        kind = next((kind for kind in type(layer).__mro__ if kind in EXPORTERS), None)
        known: Any = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("xpnet."))
        # A subclass that a user has written may compute something else.
        if kind is None or type(layer).forward is not known.forward:
            raise ArgumentError(
                f"layer {layer.path} ({type(layer).__name__}) cannot be exported to ONNX. Replace it with layers of "
                "xpnet.layers."
            )
        if kind in (layers.Sequential, layers.TransformerBlock, Graph):
            return EXPORTERS[kind](self, layer, x)
        if layer.accepts_integers is not None:
            needed = numpy.dtype("int64") if kind is layers.Embedding else self.dtype
            x = [self.cast(a, needed) for a in x] if isinstance(x, list) else self.cast(x, needed)
        return replace(EXPORTERS[kind](self, layer, x), shape=layer.output_shape)

    def add_calls(self, container: Container, x: Any) -> Any:
        """Add the nodes of the layers of a container."""
        calls, outputs = container.calls()
        values = dict(enumerate(as_tuple(x)))
        for layer, inputs, numbers, _ in calls:
            given = values[inputs] if isinstance(inputs, int) else [values[i] for i in inputs]
            y = self.add_layer(layer, given, container.has_mask(inputs))
            values.update(zip(as_tuple(numbers), as_tuple(y), strict=True))
        return values[outputs[0]] if len(outputs) == 1 else [values[i] for i in outputs]

    def output(self, y: FileTensor, name: str) -> FileTensor:
        """y as an output of the file."""
        y = self.cast(y, self.dtype)
        self._nodes.append(helper.make_node("Identity", [y.name], [name], name=name))
        return replace(y, name=name)

    def finish(self, inputs: Sequence[FileTensor], outputs: Sequence[FileTensor]) -> onnx.ModelProto:
        """The ONNX file of this graph."""
        infos = [tensor.info for tensor in inputs], [tensor.info for tensor in outputs]
        graph = helper.make_graph(self._nodes, "xpnet", infos[0], infos[1], list(self._constants.values()))
        return helper.make_model(
            graph, producer_name="xpnet", producer_version=__version__, ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid("", _OPSET)],
        )  # fmt: skip


Exporter = Callable[[GraphWriter, Any, Any], Any]
EXPORTERS: dict[type[layers.Layer], Exporter] = {}


def exports(*kinds: type[layers.Layer]) -> Callable[[Exporter], Exporter]:
    """Register a function that adds the nodes of these layers to a graph."""

    def register(exporter: Exporter) -> Exporter:
        EXPORTERS.update(dict.fromkeys(kinds, exporter))
        return exporter

    return register
