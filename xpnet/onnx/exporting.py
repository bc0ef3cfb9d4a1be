"""Export a model to an ONNX file.

ONNX operators expect images with channels first; xpnet's images have channels last. A Transpose node is added only
before a layer that needs the other order, so there is none inside a chain of image layers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import onnx
from onnx import helper, numpy_helper

from xpnet import augment, layers
from xpnet._version import __version__
from xpnet.backends.reference.windows import Windows
from xpnet.config import choice, flag
from xpnet.data.files import write_atomically
from xpnet.errors import ArgumentError, ArgumentTypeError, StateError
from xpnet.layers.containers import Container
from xpnet.layers.graph import Graph
from xpnet.layers.structure import as_tuple, shapes_of
from xpnet.layers.windows import pair
from xpnet.onnx.reader import CHANNELS_FIRST, CHANNELS_LAST, IMAGE_LAYOUT
from xpnet.onnx.tensors import file_shape, transposition
from xpnet.parameters import Buffer, Parameter

_OPSET, _IR_VERSION = 20, 9  # the first opset with Gelu, and the IR version of the same ONNX release


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the graph: its name, dtype, the shape of a sample in xpnet, and whether its channels come first."""

    name: str
    dtype: numpy.dtype[Any]
    shape: tuple[int, ...]
    channels_first: bool = False

    @property
    def info(self) -> onnx.ValueInfoProto:
        """Its description as an input or output of the file."""
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        return helper.make_tensor_value_info(self.name, kind, ["N", *file_shape(self.shape, self.channels_first)])


def export_onnx(
    model: Container,
    path: Any,
    *,
    channels_first: bool = False,
    input_dtype: Any = None,
    dtype: str | None = None,
) -> None:
    """Write a model to an ONNX file that computes what `predict` does: the output "y" from the input "x".

    Inputs and outputs of an xpnet.Model have their names, `model.input_names` and `model.output_names`; if there is one
    without a name, it is "x" or "y" too.

    channels_first: whether images in inputs and outputs are (N, channels, H, W), as in most other tools, rather than
    channels last. input_dtype: the dtype of x, such as "uint8" for a model that begins with Rescale; a list of them
    if there are several inputs. None means int64 for an input that an Embedding reads, and the file's dtype otherwise.
    dtype: "float32" or "float64", in which the file computes. None means float32, also for a float64 model, whose
    outputs then differ in the seventh digit: ONNX Runtime has no float64 version of many operators, such as Conv,
    AveragePool and Elu, and cannot run files that need them.

    Raises ArgumentError for a layer that has no ONNX equivalent, such as a layer of your own, and for a weight that is
    too large for float32; and StateError for a model that is not built.
    """
    if not isinstance(model, Container):
        raise ArgumentTypeError(f"model must be an xpnet model, not {model!r}.")
    if not model.is_built:
        raise StateError("the model is not built yet: give it an input_shape, or train it first.")
    shapes = shapes_of(model.input_shape)
    if flag("", "channels_first", channels_first) and not any(len(shape) == 3 for shape in shapes):
        given = ", ".join(map(str, shapes))
        raise ArgumentError(f"channels_first=True is for models of images (H, W, channels), not of inputs {given}.")
    computes = numpy.dtype(choice("", "dtype", "float32" if dtype is None else dtype, ("float32", "float64")))
    input_names, output_names = _names(model)
    graph = _Graph(model, computes, [*input_names, *output_names])
    inputs = [
        _Tensor(name, kind, shape, channels_first and len(shape) == 3)
        for name, kind, shape in zip(input_names, _input_dtypes(model, input_dtype, computes), shapes, strict=True)
    ]
    outputs = as_tuple(graph.add_layer(model, inputs if len(inputs) > 1 else inputs[0]))
    file = graph.finish(inputs, [
        graph.output(graph.transposed(y, channels_first=channels_first and len(y.shape) == 3), name)
        for y, name in zip(outputs, output_names, strict=True)
    ])  # fmt: skip
    helper.set_model_props(file, {IMAGE_LAYOUT: CHANNELS_FIRST if channels_first else CHANNELS_LAST})
    onnx.checker.check_model(file, full_check=True)
    write_atomically(path, file.SerializeToString())


def _names(model: Container) -> tuple[list[str], list[str]]:
    """The names of the inputs and of the outputs in the file."""
    inputs, outputs = ["x"], ["y"]
    if isinstance(model, Graph) and (len(model.inputs) > 1 or model.inputs[0].name is not None):
        inputs = model.input_names
    if isinstance(model, Graph) and (len(model.outputs) > 1 or not model.output_names[0].isdigit()):
        outputs = [f"{name}_output" if name in inputs else name for name in model.output_names]
    return inputs, outputs


def _input_dtypes(model: Container, given: Any, computes: numpy.dtype[Any]) -> list[numpy.dtype[Any]]:
    """The dtype of each input: the given one, or else int64 for an Embedding and the dtype of the file for others."""
    count = len(model.input_names)
    each = [*given] if isinstance(given, list | tuple) else [given] * count
    if len(each) != count:
        raise ArgumentError(f"input_dtype has {len(each)} dtypes, and the model has {count} inputs.")
    try:
        return [
            numpy.dtype(dtype) if dtype is not None else numpy.dtype("int64") if _embeds(model, i) else computes
            for i, dtype in enumerate(each)
        ]
    except TypeError as error:
        raise ArgumentError(f"input_dtype must be a dtype such as 'uint8', not {given!r}.") from error


def _embeds(layer: layers.Layer, position: int) -> bool:
    """Whether an Embedding reads this input, with only layers in between that pass numbers on."""
    if not isinstance(layer, Container):
        return isinstance(layer, layers.Embedding)
    passed_on = {position}
    for inner, inputs, outputs, _ in layer.calls()[0]:
        for k, i in enumerate(as_tuple(inputs)):
            if i in passed_on and _embeds(inner, k):
                return True
            if i in passed_on and inner.accepts_integers is None:
                passed_on.update(as_tuple(outputs))
    return False


class _Graph:
    """The nodes and constants of an ONNX graph in construction."""

    def __init__(self, model: Container, dtype: numpy.dtype[Any], reserved: Sequence[str]) -> None:
        """reserved: the names of the inputs and outputs."""
        self.to_numpy, self.dtype, self._reserved = model.backend.to_numpy, dtype, reserved
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._conversions: dict[Any, _Tensor] = {}

    def add_node(self, kind: str, x: _Tensor, *more: str, **attributes: Any) -> _Tensor:
        """Add a node and return its output, which has the order of axes of x. more: names of further inputs."""
        name = self._free(f"{kind.lower()}_{len(self._nodes)}")
        self._nodes.append(helper.make_node(kind, [x.name, *more], [name], name=name, **attributes))
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

    def add_per_feature(self, weight: Parameter, x: _Tensor) -> str:
        """Add a parameter (features,) in a shape that is broadcast along the features of x."""
        axes = len(x.shape) - 1 if x.channels_first else 0
        return self.add_constant(weight.value.reshape(-1, *[1] * axes), name=weight.name)

    def transposed(self, x: _Tensor, channels_first: bool) -> _Tensor:
        """x with channels first or last, by a Transpose node if necessary."""
        if x.channels_first == channels_first:
            return x
        perm = transposition(len(x.shape), channels_first)
        return self._converted("Transpose", x, {"perm": perm}, channels_first=channels_first)

    def cast(self, x: _Tensor, dtype: numpy.dtype[Any]) -> _Tensor:
        """x in another dtype, by a Cast node if necessary."""
        if x.dtype == dtype:
            return x
        return self._converted("Cast", x, {"to": helper.np_dtype_to_tensor_dtype(dtype)}, dtype=dtype)

    def _converted(self, kind: str, x: _Tensor, attributes: dict[str, Any], **changed: Any) -> _Tensor:
        """x after a node that changes its dtype or the order of its axes: one node for all that read it so."""
        key = kind, x.name, *changed.values()
        if key not in self._conversions:
            self._conversions[key] = replace(self.add_node(kind, x, **attributes), **changed)
        return self._conversions[key]

    def add_layer(self, layer: layers.Layer, x: Any) -> Any:
        """Add the nodes of a layer with the input x and return its output; each a tensor, or a list of them."""
        kind = next((kind for kind in type(layer).__mro__ if kind in _CONVERTERS), None)
        known: Any = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("xpnet."))
        # A subclass that a user has written may compute something else.
        if kind is None or type(layer).forward is not known.forward:
            raise ArgumentError(
                f"layer {layer.path} ({type(layer).__name__}) cannot be exported to ONNX. Replace it with layers of "
                "xpnet.layers."
            )
        if kind in (layers.Sequential, Graph):
            return _CONVERTERS[kind](self, layer, x)
        if layer.accepts_integers is not None:
            needed = numpy.dtype("int64") if kind is layers.Embedding else self.dtype
            x = [self.cast(a, needed) for a in x] if isinstance(x, list) else self.cast(x, needed)
        return replace(_CONVERTERS[kind](self, layer, x), shape=layer.output_shape)

    def add_calls(self, container: Container, x: Any) -> Any:
        """Add the nodes of the layers of a container."""
        calls, outputs = container.calls()
        values = dict(enumerate(as_tuple(x)))
        for layer, inputs, numbers, _ in calls:
            y = self.add_layer(layer, values[inputs] if isinstance(inputs, int) else [values[i] for i in inputs])
            values.update(zip(as_tuple(numbers), as_tuple(y), strict=True))
        return values[outputs[0]] if len(outputs) == 1 else [values[i] for i in outputs]

    def output(self, y: _Tensor, name: str) -> _Tensor:
        """y as an output of the file."""
        y = self.cast(y, self.dtype)
        self._nodes.append(helper.make_node("Identity", [y.name], [name], name=name))
        return replace(y, name=name)

    def finish(self, inputs: Sequence[_Tensor], outputs: Sequence[_Tensor]) -> onnx.ModelProto:
        """The ONNX file of this graph."""
        infos = [tensor.info for tensor in inputs], [tensor.info for tensor in outputs]
        graph = helper.make_graph(self._nodes, "xpnet", infos[0], infos[1], list(self._constants.values()))
        return helper.make_model(
            graph, producer_name="xpnet", producer_version=__version__, ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid("", _OPSET)],
        )  # fmt: skip


_Converter = Callable[[_Graph, Any, Any], Any]
_CONVERTERS: dict[type[layers.Layer], _Converter] = {}


def _converts(*kinds: type[layers.Layer]) -> Callable[[_Converter], _Converter]:
    """Register a function that adds the nodes of these layers to a graph."""

    def register(converter: _Converter) -> _Converter:
        _CONVERTERS.update(dict.fromkeys(kinds, converter))
        return converter

    return register


# Containers, layers that change nothing in inference, and activations -------------------------------------------------


@_converts(
    layers.Identity, layers.Dropout, augment.Distortion, augment.GaussianNoise, augment.MixUp,
    augment.RandomErasing, augment.RandomFlip,
)  # fmt: skip
def _identity(graph: _Graph, layer: layers.Layer, x: _Tensor) -> _Tensor:
    return x


@_converts(layers.Sequential, Graph)
def _container(graph: _Graph, layer: Container, x: Any) -> Any:
    return graph.add_calls(layer, x)


_CONVERTERS |= {
    layers.ReLU: lambda graph, layer, x: graph.add_node("Relu", x),
    layers.Sigmoid: lambda graph, layer, x: graph.add_node("Sigmoid", x),
    layers.Tanh: lambda graph, layer, x: graph.add_node("Tanh", x),
    layers.Softplus: lambda graph, layer, x: graph.add_node("Softplus", x),
    layers.LeakyReLU: lambda graph, layer, x: graph.add_node("LeakyRelu", x, alpha=float(layer.negative_slope)),
    layers.ELU: lambda graph, layer, x: graph.add_node("Elu", x, alpha=float(layer.alpha)),
    layers.HardSigmoid: lambda graph, layer, x: graph.add_node("HardSigmoid", x, alpha=1 / 6, beta=0.5),
    layers.HardSwish: lambda graph, layer, x: graph.add_node("HardSwish", x),
    layers.Mish: lambda graph, layer, x: graph.add_node("Mish", x),
    layers.GELU: lambda graph, layer, x: graph.add_node("Gelu", x, approximate=layer.approximate),
    layers.SiLU: lambda graph, layer, x: graph.add_node("Mul", x, graph.add_node("Sigmoid", x).name),
}


@_converts(layers.HardTanh)
def _hard_tanh(graph: _Graph, layer: layers.HardTanh, x: _Tensor) -> _Tensor:
    limits = ["" if math.isinf(limit) else graph.add_constant(limit) for limit in (layer.low, layer.high)]
    return graph.add_node("Clip", x, *limits)


@_converts(layers.PReLU)
def _prelu(graph: _Graph, layer: layers.PReLU, x: _Tensor) -> _Tensor:
    return graph.add_node("PRelu", x, graph.add_per_feature(layer.weight, x))


@_converts(augment.RandomCrop)
def _random_crop(graph: _Graph, layer: augment.RandomCrop, x: _Tensor) -> _Tensor:
    if layer.size is not None:
        raise ArgumentError(f"layer {layer.path} (RandomCrop) with a size cannot be exported to ONNX: crop the images.")
    return x


@_converts(layers.Residual)
def _residual(graph: _Graph, layer: layers.Residual, x: _Tensor) -> _Tensor:
    y, skip = graph.add_calls(layer, x), graph.add_layer(layer.inner_layers[-1], x)
    skip = graph.transposed(skip, channels_first=y.channels_first)
    return graph.add_node("Add", y, skip.name)


@_converts(layers.Step)
def _step(graph: _Graph, layer: layers.Step, x: _Tensor) -> _Tensor:
    at_least = graph.add_node("GreaterOrEqual", x, graph.add_constant(layer.threshold))
    return graph.add_node("Cast", at_least, to=helper.np_dtype_to_tensor_dtype(graph.dtype))


@_converts(layers.Softmax, layers.LogSoftmax)
def _softmax(graph: _Graph, layer: layers.Layer, x: _Tensor) -> _Tensor:
    operator = "Softmax" if isinstance(layer, layers.Softmax) else "LogSoftmax"
    return graph.add_node(operator, x, axis=1 if x.channels_first else -1)


@_converts(layers.Rescale)
def _rescale(graph: _Graph, layer: layers.Rescale, x: _Tensor) -> _Tensor:
    y = graph.add_node("Mul", x, graph.add_constant(layer.scale))
    return graph.add_node("Add", y, graph.add_constant(layer.offset)) if layer.offset else y


# Layers with several inputs -------------------------------------------------------------------------------------------


_MERGES: dict[type[layers.Layer], str] = {
    layers.Add: "Add", layers.Maximum: "Max", layers.Multiply: "Mul", layers.Subtract: "Sub",
}  # fmt: skip


@_converts(*_MERGES)
def _merge(graph: _Graph, layer: layers.Layer, x: list[_Tensor]) -> _Tensor:
    return functools.reduce(lambda a, b: graph.add_node(_MERGES[type(layer)], a, b.name), _in_one_order(graph, x))


@_converts(layers.Average)
def _average(graph: _Graph, layer: layers.Average, x: list[_Tensor]) -> _Tensor:
    first, *others = _in_one_order(graph, x)
    return graph.add_node("Mean", first, *(other.name for other in others))


@_converts(layers.Concatenate)
def _concatenate(graph: _Graph, layer: layers.Concatenate, x: list[_Tensor]) -> _Tensor:
    first, *others = _in_one_order(graph, x)
    axes = len(first.shape)
    axis = 1 + layer.axis % axes
    axis = transposition(axes, channels_first=True).index(axis) if first.channels_first else axis
    return graph.add_node("Concat", first, *(other.name for other in others), axis=axis)


@_converts(layers.Dot)
def _dot(graph: _Graph, layer: layers.Dot, x: list[_Tensor]) -> _Tensor:
    a, b = (graph.transposed(tensor, channels_first=False) for tensor in x)
    return graph.add_node("ReduceSum", graph.add_node("Mul", a, b.name), graph.add_constant([-1], numpy.int64))


def _in_one_order(graph: _Graph, x: list[_Tensor]) -> list[_Tensor]:
    """The tensors in one order of axes."""
    channels_first = any(tensor.channels_first for tensor in x)
    return [graph.transposed(tensor, channels_first) for tensor in x]


# Normalization --------------------------------------------------------------------------------------------------------


@_converts(layers.BatchNorm)
def _batch_norm(graph: _Graph, layer: layers.BatchNorm, x: _Tensor) -> _Tensor:
    statistics = [graph.add_weight(buffer) for buffer in (layer.running_mean, layer.running_var)]
    if len(x.shape) > 1:  # ONNX normalizes over axis 1
        x = graph.transposed(x, channels_first=True)
    return graph.add_node("BatchNormalization", x, *_gamma_and_beta(graph, layer), *statistics, epsilon=layer.epsilon)


@_converts(layers.LayerNorm)
def _layer_norm(graph: _Graph, layer: layers.LayerNorm, x: _Tensor) -> _Tensor:
    x = graph.transposed(x, channels_first=False)
    return graph.add_node("LayerNormalization", x, *_gamma_and_beta(graph, layer), axis=-1, epsilon=layer.epsilon)


@_converts(layers.InstanceNorm)
def _instance_norm(graph: _Graph, layer: layers.InstanceNorm, x: _Tensor) -> _Tensor:
    x = graph.transposed(x, channels_first=True)
    return graph.add_node("InstanceNormalization", x, *_gamma_and_beta(graph, layer), epsilon=layer.epsilon)


@_converts(layers.GroupNorm)
def _group_norm(graph: _Graph, layer: layers.GroupNorm, x: _Tensor) -> _Tensor:
    """InstanceNormalization of (N, groups, all numbers of a group): GroupNormalization is new in opset 21."""
    x = graph.transposed(x, channels_first=len(x.shape) > 1)
    groups, shape = layer.groups, file_shape(x.shape, x.channels_first)
    rows = graph.add_node("Reshape", x, graph.add_constant([-1, groups, math.prod(shape) // groups], numpy.int64))
    unit = graph.add_constant([1.0] * groups), graph.add_constant([0.0] * groups)
    normalized = graph.add_node("InstanceNormalization", rows, *unit, epsilon=layer.epsilon)
    y = graph.add_node("Reshape", normalized, graph.add_constant([-1, *shape], numpy.int64))
    if layer.scale:
        y = graph.add_node("Mul", y, graph.add_per_feature(layer.gamma, y))
    return graph.add_node("Add", y, graph.add_per_feature(layer.beta, y)) if layer.center else y


def _gamma_and_beta(graph: _Graph, layer: layers.BatchNorm | layers.InstanceNorm | layers.LayerNorm) -> list[str]:
    """Constants take the place of those that the layer does not have. Calls of a shared layer share them."""
    given = {name: getattr(layer, name, None) for name in ("gamma", "beta")}
    owner = next((p.name.removesuffix(name) for name, p in given.items() if p is not None), None)
    names = []
    for (name, parameter), value in zip(given.items(), (1.0, 0.0), strict=True):
        if parameter is not None:
            names.append(graph.add_weight(parameter))
        else:
            constant = [value] * layer.output_shape[-1]
            names.append(graph.add_constant(constant, name="" if owner is None else f"{owner}{name}"))
    return names


# Shapes ---------------------------------------------------------------------------------------------------------------


@_converts(layers.Reshape, layers.Flatten)
def _reshape(graph: _Graph, layer: layers.Reshape, x: _Tensor) -> _Tensor:
    x = graph.transposed(x, channels_first=False)
    return graph.add_node("Reshape", x, graph.add_constant([-1, *layer.output_shape], numpy.int64))


@_converts(layers.Permute)
def _permute(graph: _Graph, layer: layers.Permute, x: _Tensor) -> _Tensor:
    x = graph.transposed(x, channels_first=False)
    return graph.add_node("Transpose", x, perm=(0, *(axis + 1 for axis in layer.axes)))


# Layers with weights --------------------------------------------------------------------------------------------------


@_converts(layers.Dense)
def _dense(graph: _Graph, layer: layers.Dense, x: _Tensor) -> _Tensor:
    x = graph.transposed(x, channels_first=False)
    weight, bias = graph.add_weight(layer.weight), [graph.add_weight(layer.bias)] if layer.use_bias else []
    if len(x.shape) == 1:
        return graph.add_node("Gemm", x, weight, *bias)
    y = graph.add_node("MatMul", x, weight)
    return graph.add_node("Add", y, *bias) if bias else y


@_converts(layers.Embedding)
def _embedding(graph: _Graph, layer: layers.Embedding, x: _Tensor) -> _Tensor:
    return graph.add_node("Gather", replace(x, name=graph.add_weight(layer.weight), dtype=graph.dtype), x.name)


@_converts(layers.Conv2D, layers.DepthwiseConv2D)
def _convolution(graph: _Graph, layer: layers.Conv2D, x: _Tensor) -> _Tensor:
    return _convolve(graph, "Conv", layer, x, graph.to_numpy(layer.weight.value).transpose(3, 2, 0, 1))


@_converts(layers.Conv2DTranspose)
def _convolution_transpose(graph: _Graph, layer: layers.Conv2DTranspose, x: _Tensor) -> _Tensor:
    weight = graph.to_numpy(layer.weight.value).transpose(2, 3, 0, 1)  # (in / groups, filters, kh, kw)
    stacked = numpy.concatenate(numpy.split(weight, layer.groups, axis=1))  # (in, filters / groups, kh, kw)
    output_padding = [max(-n, 0) for n in _end_padding(layer.windows)]
    return _convolve(graph, "ConvTranspose", layer, x, stacked, output_padding=output_padding)


def _convolve(graph: _Graph, kind: str, layer: Any, x: _Tensor, weight: Any, **more: Any) -> _Tensor:
    inputs = [graph.add_constant(weight, name=layer.weight.name)]
    if layer.use_bias:
        inputs.append(graph.add_weight(layer.bias))
    more |= {"dilations": layer.windows.dilation, "group": layer.groups, **_window_attributes(layer.windows)}
    return graph.add_node(kind, graph.transposed(x, channels_first=True), *inputs, **more)


def _window_attributes(windows: Windows) -> dict[str, Any]:
    """Kernel, strides and padding (top, left, bottom, right) as attributes of an ONNX operator."""
    after = [max(n, 0) for n in _end_padding(windows)]
    return {"kernel_shape": windows.kernel, "strides": windows.strides, "pads": [*windows.before, *after]}


def _end_padding(windows: Windows) -> list[int]:
    """How far the last window extends beyond the end of the image, (vertically, horizontally); may be negative."""
    return [
        (windows.grid[a] - 1) * windows.strides[a] + windows.dilation[a] * (windows.kernel[a] - 1) + 1
        - windows.before[a] - windows.image[a]
        for a in (0, 1)
    ]  # fmt: skip


# Pooling and resizing of images ---------------------------------------------------------------------------------------


@_converts(layers.MaxPool2D, layers.AvgPool2D)
def _pool(graph: _Graph, layer: layers.MaxPool2D | layers.AvgPool2D, x: _Tensor) -> _Tensor:
    kind, attributes = "MaxPool", _window_attributes(layer.windows)
    if isinstance(layer, layers.AvgPool2D):
        kind, attributes["count_include_pad"] = "AveragePool", int(layer.count_include_pad)
    return graph.add_node(kind, graph.transposed(x, channels_first=True), **attributes)


@_converts(layers.GlobalAveragePool2D, layers.GlobalMaxPool2D)
def _global_pool(graph: _Graph, layer: layers.Layer, x: _Tensor) -> _Tensor:
    operator = "GlobalMaxPool" if isinstance(layer, layers.GlobalMaxPool2D) else "GlobalAveragePool"
    pooled = graph.add_node(operator, graph.transposed(x, channels_first=True))
    return replace(graph.add_node("Flatten", pooled), channels_first=False)


@_converts(layers.ZeroPadding2D)
def _zero_padding(graph: _Graph, layer: layers.ZeroPadding2D, x: _Tensor) -> _Tensor:
    (top, bottom), (left, right) = layer.padding
    pads = graph.add_constant([0, 0, top, left, 0, 0, bottom, right], numpy.int64)
    return graph.add_node("Pad", graph.transposed(x, channels_first=True), pads)


@_converts(layers.Upsample2D)
def _upsample(graph: _Graph, layer: layers.Upsample2D, x: _Tensor) -> _Tensor:
    scales = graph.add_constant([1.0, 1.0, *pair(layer.size)], numpy.float32)
    if layer.interpolation == "nearest":
        mode = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    else:
        mode = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    return graph.add_node("Resize", graph.transposed(x, channels_first=True), "", scales, **mode)
