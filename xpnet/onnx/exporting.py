"""Export a model to an ONNX file.

ONNX operators expect images with channels first; xpnet's images have channels last. A Transpose node is added only
before a layer that needs the other order, so there is none inside a chain of image layers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy
import onnx
from onnx import helper, numpy_helper

from xpnet import augment, layers
from xpnet._version import __version__
from xpnet.backends.reference.windows import Windows
from xpnet.config import choice, flag
from xpnet.data.files import write_atomically
from xpnet.errors import ArgumentError, ArgumentTypeError, StateError
from xpnet.layers.windows import pair
from xpnet.onnx.reader import CHANNELS_FIRST, CHANNELS_LAST, IMAGE_LAYOUT
from xpnet.onnx.tensors import file_shape, transposition
from xpnet.parameters import Buffer, Parameter

_OPSET, _IR_VERSION = 20, 9  # the first opset with Gelu, and the IR version of the same ONNX release


class _Tensor(NamedTuple):
    """A tensor of the graph: its name, the shape of a sample in xpnet, and whether its channels come first."""

    name: str
    shape: tuple[int, ...]
    channels_first: bool = False


def export_onnx(
    model: layers.Sequential,
    path: Any,
    *,
    channels_first: bool = False,
    input_dtype: str | None = None,
    dtype: str | None = None,
) -> None:
    """Write a model to an ONNX file that computes what `predict` does: the output "y" from the input "x".

    channels_first: whether images in x and y are (N, channels, H, W), as in most other tools, rather than channels
    last. input_dtype: the dtype of x, such as "uint8" for a model that begins with Rescale. None means int64 for a
    model that begins with Embedding, and the file's dtype otherwise.  dtype: "float32" or "float64", in which the file
    computes. None means float32, also for a float64 model, whose outputs then differ in the seventh digit: ONNX Runtime
    has no float64 version of many operators, such as Conv, AveragePool and Elu, and cannot run files that need them.

    Raises ArgumentError for a layer that has no ONNX equivalent, such as a layer of your own, and for a weight that is
    too large for float32; and StateError for a model that is not built.
    """
    if not isinstance(model, layers.Sequential):
        raise ArgumentTypeError(f"model must be an xpnet model, not {model!r}.")
    if not model.is_built:
        raise StateError("the model is not built yet: give it an input_shape, or train it first.")
    shape = model.input_shape
    if flag("", "channels_first", channels_first) and len(shape) != 3:
        raise ArgumentError(f"channels_first=True is for models of images (H, W, channels), not of inputs {shape}.")
    graph = _Graph(model, choice("", "dtype", "float32" if dtype is None else dtype, ("float32", "float64")))
    needed = numpy.dtype("int64") if isinstance(_first_layer(model), layers.Embedding) else graph.dtype
    try:
        x_dtype = needed if input_dtype is None else numpy.dtype(input_dtype)
    except TypeError as error:
        raise ArgumentError(f"input_dtype must be a dtype such as 'uint8', not {input_dtype!r}.") from error
    x = _Tensor("x", shape, channels_first)
    if x_dtype != needed:
        x = graph.add_node("Cast", x, to=helper.np_dtype_to_tensor_dtype(needed))
    y = graph.add_layer(model, x)
    y = graph.transposed(y, channels_first=channels_first and len(y.shape) == 3)
    file = graph.finish(y, file_shape(shape, channels_first), x_dtype)
    helper.set_model_props(file, {IMAGE_LAYOUT: CHANNELS_FIRST if channels_first else CHANNELS_LAST})
    onnx.checker.check_model(file, full_check=True)
    write_atomically(path, file.SerializeToString())


def _first_layer(model: layers.Sequential) -> layers.Layer | None:
    """The first layer that does not just pass its input on."""
    for layer in model.layers:
        found = _first_layer(layer) if isinstance(layer, layers.Sequential) else layer
        if found is not None and found.accepts_integers is not None:
            return found
    return None


class _Graph:
    """The nodes and constants of an ONNX graph in construction."""

    def __init__(self, model: layers.Sequential, dtype: str) -> None:
        self.to_numpy = model.backend.to_numpy
        self.dtype = numpy.dtype(dtype)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def add_node(self, kind: str, x: _Tensor, *more: str, **attributes: Any) -> _Tensor:
        """Add a node and return its output, which has the order of axes of x. more: names of further inputs."""
        name = f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, [x.name, *more], [name], name=name, **attributes))
        return x._replace(name=name)

    def add_constant(self, values: Any, dtype: Any = None, name: str = "") -> str:
        """Add a constant and return its name."""
        name = name or f"constant_{len(self._constants)}"
        given = self.to_numpy(values)
        with numpy.errstate(over="ignore"):
            array = numpy.ascontiguousarray(given, dtype=dtype or self.dtype)
        if numpy.isinf(array).any() and not numpy.isinf(given).any():
            raise ArgumentError(f"{name} is too large for {array.dtype}: give export_onnx dtype='float64'.")
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
        return self.add_node("Transpose", x, perm=perm)._replace(channels_first=channels_first)

    def add_layer(self, layer: layers.Layer, x: _Tensor) -> _Tensor:
        """Add the nodes of a layer with the input x and return its output."""
        kind = next((kind for kind in type(layer).__mro__ if kind in _CONVERTERS), None)
        # A subclass that a user has written may compute something else.
        if kind is not None and (type(layer).forward is kind.forward or type(layer).__module__.startswith("xpnet.")):
            return _CONVERTERS[kind](self, layer, x)._replace(shape=layer.output_shape)
        raise ArgumentError(
            f"layer {layer.path} ({type(layer).__name__}) cannot be exported to ONNX. Replace it with layers of "
            "xpnet.layers."
        )

    def add_layers(self, stack: Sequence[layers.Layer], x: _Tensor) -> _Tensor:
        return functools.reduce(lambda x, layer: self.add_layer(layer, x), stack, x)

    def finish(self, y: _Tensor, input_axes: Sequence[int], input_dtype: Any) -> onnx.ModelProto:
        """The ONNX file of this graph, with y as its output "y"."""
        kinds = [helper.np_dtype_to_tensor_dtype(dtype) for dtype in (input_dtype, self.dtype)]
        self._nodes.append(helper.make_node("Identity", [y.name], ["y"], name="y"))
        graph = helper.make_graph(
            self._nodes, "xpnet",
            [helper.make_tensor_value_info("x", kinds[0], ["N", *input_axes])],
            [helper.make_tensor_value_info("y", kinds[1], ["N", *file_shape(y.shape, y.channels_first)])],
            list(self._constants.values()),
        )  # fmt: skip
        return helper.make_model(
            graph, producer_name="xpnet", producer_version=__version__, ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid("", _OPSET)],
        )  # fmt: skip


_Converter = Callable[[_Graph, Any, _Tensor], _Tensor]
_CONVERTERS: dict[type[layers.Layer], _Converter] = {}


def _converts(*kinds: type[layers.Layer]) -> Callable[[_Converter], _Converter]:
    """Register a function that adds the nodes of these layers to a graph."""

    def register(converter: _Converter) -> _Converter:
        _CONVERTERS.update(dict.fromkeys(kinds, converter))
        return converter

    return register


# Containers, layers that change nothing in inference, and activations -------------------------------------------------


@_converts(
    layers.Identity, layers.Dropout, augment.Distortion, augment.GaussianNoise, augment.MixUp, augment.RandomErasing,
    augment.RandomFlip,
)  # fmt: skip
def _identity(graph: _Graph, layer: layers.Layer, x: _Tensor) -> _Tensor:
    return x


_CONVERTERS |= {
    layers.Sequential: lambda graph, layer, x: graph.add_layers(layer.layers, x),
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
    *inner, projection = layer.layers
    y = graph.add_layers(inner, x)
    skip = graph.transposed(graph.add_layer(projection, x), channels_first=y.channels_first)
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
    given, size = ((getattr(layer, "gamma", None), 1.0), (getattr(layer, "beta", None), 0.0)), layer.output_shape[-1]
    return [graph.add_weight(p) if p is not None else graph.add_constant([value] * size) for p, value in given]


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
    return graph.add_node("Gather", x._replace(name=graph.add_weight(layer.weight)), x.name)


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
    return graph.add_node("Flatten", pooled)._replace(channels_first=False)


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
