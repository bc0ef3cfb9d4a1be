"""The ONNX nodes of each layer: functions from a layer and its input to its output."""

import functools
import math
from dataclasses import replace
from typing import Any

import numpy
from onnx import helper

from xpnet import augment, layers
from xpnet.backends.reference.windows import Windows
from xpnet.errors import ArgumentError
from xpnet.layers.containers import Container
from xpnet.layers.graph import Graph
from xpnet.layers.windows import pair
from xpnet.onnx.tensors import file_shape, transposition
from xpnet.onnx.writer import EXPORTERS, FileTensor, GraphWriter, exports
from xpnet.parameters import Parameter

# Containers, layers that change nothing in inference, and activations -------------------------------------------------


@exports(
    layers.Identity, layers.Dropout, augment.Distortion, augment.GaussianNoise, augment.MixUp,
    augment.RandomErasing, augment.RandomFlip, layers.Masking,
)  # fmt: skip
def _identity(graph: GraphWriter, layer: layers.Layer, x: FileTensor) -> FileTensor:
    return x


@exports(layers.Sequential, layers.TransformerBlock, Graph)
def _container(graph: GraphWriter, layer: Container, x: Any) -> Any:
    return graph.add_calls(layer, x)


EXPORTERS.update({
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
})  # fmt: skip


@exports(layers.HardTanh)
def _hard_tanh(graph: GraphWriter, layer: layers.HardTanh, x: FileTensor) -> FileTensor:
    limits = ["" if math.isinf(limit) else graph.add_constant(limit) for limit in (layer.low, layer.high)]
    return graph.add_node("Clip", x, *limits)


@exports(layers.PReLU)
def _prelu(graph: GraphWriter, layer: layers.PReLU, x: FileTensor) -> FileTensor:
    return graph.add_node("PRelu", x, graph.add_per_feature(layer.weight, x))


@exports(augment.RandomCrop)
def _random_crop(graph: GraphWriter, layer: augment.RandomCrop, x: FileTensor) -> FileTensor:
    if layer.size is not None:
        raise ArgumentError(f"layer {layer.path} (RandomCrop) with a size cannot be exported to ONNX: crop the images.")
    return x


@exports(layers.Residual)
def _residual(graph: GraphWriter, layer: layers.Residual, x: FileTensor) -> FileTensor:
    y, skip = graph.add_calls(layer, x), graph.add_layer(layer.inner_layers[-1], x, layer.has_mask(0))
    skip = graph.transposed(skip, channels_first=y.channels_first)
    return graph.add_node("Add", y, skip.name)


@exports(layers.Step)
def _step(graph: GraphWriter, layer: layers.Step, x: FileTensor) -> FileTensor:
    at_least = graph.add_node("GreaterOrEqual", x, graph.add_constant(layer.threshold))
    return graph.add_node("Cast", at_least, to=helper.np_dtype_to_tensor_dtype(graph.dtype))


@exports(layers.Softmax, layers.LogSoftmax)
def _softmax(graph: GraphWriter, layer: layers.Layer, x: FileTensor) -> FileTensor:
    operator = "Softmax" if isinstance(layer, layers.Softmax) else "LogSoftmax"
    return graph.add_node(operator, x, axis=1 if x.channels_first else -1)


@exports(layers.Rescale)
def _rescale(graph: GraphWriter, layer: layers.Rescale, x: FileTensor) -> FileTensor:
    y = graph.add_node("Mul", x, graph.add_constant(layer.scale))
    return graph.add_node("Add", y, graph.add_constant(layer.offset)) if layer.offset else y


# Layers with several inputs -------------------------------------------------------------------------------------------


_MERGES: dict[type[layers.Layer], str] = {
    layers.Add: "Add", layers.Maximum: "Max", layers.Multiply: "Mul", layers.Subtract: "Sub",
}  # fmt: skip


@exports(*_MERGES)
def _merge(graph: GraphWriter, layer: layers.Layer, x: list[FileTensor]) -> FileTensor:
    return functools.reduce(lambda a, b: graph.add_node(_MERGES[type(layer)], a, b.name), _in_one_order(graph, x))


@exports(layers.Average)
def _average(graph: GraphWriter, layer: layers.Average, x: list[FileTensor]) -> FileTensor:
    first, *others = _in_one_order(graph, x)
    return graph.add_node("Mean", first, *(other.name for other in others))


@exports(layers.Concatenate)
def _concatenate(graph: GraphWriter, layer: layers.Concatenate, x: list[FileTensor]) -> FileTensor:
    first, *others = _in_one_order(graph, x)
    axes = len(first.shape)
    axis = 1 + layer.axis % axes
    axis = transposition(axes, channels_first=True).index(axis) if first.channels_first else axis
    return graph.add_node("Concat", first, *(other.name for other in others), axis=axis)


@exports(layers.Dot)
def _dot(graph: GraphWriter, layer: layers.Dot, x: list[FileTensor]) -> FileTensor:
    a, b = (graph.transposed(tensor, channels_first=False) for tensor in x)
    return graph.add_node("ReduceSum", graph.add_node("Mul", a, b.name), graph.add_constant([-1], numpy.int64))


def _in_one_order(graph: GraphWriter, x: list[FileTensor]) -> list[FileTensor]:
    """The tensors in one order of axes."""
    channels_first = any(tensor.channels_first for tensor in x)
    return [graph.transposed(tensor, channels_first) for tensor in x]


# Normalization --------------------------------------------------------------------------------------------------------


@exports(layers.BatchNorm)
def _batch_norm(graph: GraphWriter, layer: layers.BatchNorm, x: FileTensor) -> FileTensor:
    statistics = [graph.add_weight(buffer) for buffer in (layer.running_mean, layer.running_var)]
    if len(x.shape) > 1:  # ONNX normalizes over axis 1
        x = graph.transposed(x, channels_first=True)
    return graph.add_node("BatchNormalization", x, *_gamma_and_beta(graph, layer), *statistics, epsilon=layer.epsilon)


@exports(layers.LayerNorm)
def _layer_norm(graph: GraphWriter, layer: layers.LayerNorm, x: FileTensor) -> FileTensor:
    x = graph.transposed(x, channels_first=False)
    return graph.add_node("LayerNormalization", x, *_gamma_and_beta(graph, layer), axis=-1, epsilon=layer.epsilon)


@exports(layers.RMSNorm)
def _rms_norm(graph: GraphWriter, layer: layers.RMSNorm, x: FileTensor) -> FileTensor:
    """x / √(mean(x²) + epsilon) · gamma: RMSNormalization is new in opset 23."""
    x = graph.transposed(x, channels_first=False)
    squares = graph.add_node("Mul", x, x.name)
    mean = graph.add_node("ReduceMean", squares, graph.add_constant([-1], numpy.int64))
    root = graph.add_node("Sqrt", graph.add_node("Add", mean, graph.add_constant(layer.epsilon)))
    return graph.add_node("Mul", graph.add_node("Div", x, root.name), graph.add_weight(layer.gamma))


@exports(layers.InstanceNorm)
def _instance_norm(graph: GraphWriter, layer: layers.InstanceNorm, x: FileTensor) -> FileTensor:
    x = graph.transposed(x, channels_first=True)
    return graph.add_node("InstanceNormalization", x, *_gamma_and_beta(graph, layer), epsilon=layer.epsilon)


@exports(layers.GroupNorm)
def _group_norm(graph: GraphWriter, layer: layers.GroupNorm, x: FileTensor) -> FileTensor:
    """InstanceNormalization of (N, groups, all numbers of a group): GroupNormalization is new in opset 21."""
    x = graph.transposed(x, channels_first=len(x.shape) > 1)
    groups, shape = layer.groups, file_shape(x.shape, x.channels_first)
    is_open = None in shape
    size = -1 if is_open else math.prod(shape) // groups
    rows = graph.add_node("Reshape", x, graph.add_constant([0 if is_open else -1, groups, size], numpy.int64))
    unit = graph.add_constant([1.0] * groups), graph.add_constant([0.0] * groups)
    normalized = graph.add_node("InstanceNormalization", rows, *unit, epsilon=layer.epsilon)
    whole = [0, *(-1 if n is None else n for n in shape)] if is_open else [-1, *shape]
    y = graph.add_node("Reshape", normalized, graph.add_constant(whole, numpy.int64))
    if layer.scale:
        y = graph.add_node("Mul", y, graph.add_per_feature(layer.gamma, y))
    return graph.add_node("Add", y, graph.add_per_feature(layer.beta, y)) if layer.center else y


def _gamma_and_beta(graph: GraphWriter, layer: layers.BatchNorm | layers.InstanceNorm | layers.LayerNorm) -> list[str]:
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


@exports(layers.Reshape, layers.Flatten)
def _reshape(graph: GraphWriter, layer: layers.Reshape, x: FileTensor) -> FileTensor:
    x = graph.transposed(x, channels_first=False)
    return graph.add_node("Reshape", x, graph.add_constant([-1, *layer.output_shape], numpy.int64))


@exports(layers.Permute)
def _permute(graph: GraphWriter, layer: layers.Permute, x: FileTensor) -> FileTensor:
    x = graph.transposed(x, channels_first=False)
    return graph.add_node("Transpose", x, perm=(0, *(axis + 1 for axis in layer.axes)))


@exports(layers.Slice)
def _slice(graph: GraphWriter, layer: layers.Slice, x: FileTensor) -> FileTensor:
    x = graph.transposed(x, channels_first=False)
    stop = 2**63 - 1 if layer.stop is None else layer.stop
    part = [graph.add_constant([n], numpy.int64) for n in (layer.start, stop, 1 + layer.axis % len(x.shape))]
    return graph.add_node("Slice", x, *part)


# Sequences ------------------------------------------------------------------------------------------------------------


@exports(layers.PositionalEmbedding)
def _positions(graph: GraphWriter, layer: layers.PositionalEmbedding, x: FileTensor) -> FileTensor:
    """x + the first rows of the table: as many as there are steps, from the shape of x if that is open."""
    x = graph.transposed(x, channels_first=False)
    table, length = graph.add_weight(layer.weight), x.shape[0]
    if length == layer.max_length:
        return graph.add_node("Add", x, table)
    zero = graph.add_constant([0], numpy.int64)
    stop = (
        graph.add_node("Shape", x, start=1, end=2).name if length is None else graph.add_constant([length], numpy.int64)
    )
    return graph.add_node("Add", x, graph.add_node("Slice", replace(x, name=table), zero, stop, zero).name)


@exports(layers.Conv1D)
def _convolution_1d(graph: GraphWriter, layer: layers.Conv1D, x: FileTensor) -> FileTensor:
    weight = graph.add_constant(graph.to_numpy(layer.weight.value).transpose(2, 1, 0), name=layer.weight.name)
    bias = [graph.add_weight(layer.bias)] if layer.use_bias else []
    more = _sequence_attributes(layer, layer.kernel_size, layer.strides, layer.dilation)
    more |= {"dilations": [layer.dilation], "group": layer.groups}
    return graph.add_node("Conv", graph.transposed(x, channels_first=True), weight, *bias, **more)


@exports(layers.MaxPool1D, layers.AvgPool1D)
def _pool_1d(graph: GraphWriter, layer: layers.MaxPool1D | layers.AvgPool1D, x: FileTensor) -> FileTensor:
    kind, attributes = "MaxPool", _sequence_attributes(layer, layer.pool_size, layer.strides or layer.pool_size)
    if isinstance(layer, layers.AvgPool1D):
        kind, attributes["count_include_pad"] = "AveragePool", int(layer.count_include_pad)
    return graph.add_node(kind, graph.transposed(x, channels_first=True), **attributes)


def _sequence_attributes(layer: Any, size: int, stride: int, dilation: int = 1) -> dict[str, Any]:
    """Kernel, strides and padding of windows on a sequence, perhaps of open length, as attributes."""
    attributes: dict[str, Any] = {"kernel_shape": [size], "strides": [stride]}
    reach, steps = dilation * (size - 1), layer.input_shape[0]
    if layer.padding != "same":
        sides: dict[Any, list[int]] = {"valid": [0, 0], "causal": [reach, 0]}
        return attributes | {"pads": sides.get(layer.padding) or [layer.padding, layer.padding]}
    if steps is None and stride > 1 and reach:
        if dilation > 1:
            raise ArgumentError(
                f'layer {layer.path} ({type(layer).__name__}) has padding="same", strides and a dilation on sequences '
                "of open length, which ONNX Runtime refuses. Give the model a fixed input_shape."
            )
        return attributes | {"auto_pad": "SAME_UPPER"}
    total = reach if steps is None else max((math.ceil(steps / stride) - 1) * stride + reach + 1 - steps, 0)
    return attributes | {"pads": [total // 2, total - total // 2]}


@exports(layers.GlobalAveragePool1D, layers.GlobalMaxPool1D)
def _global_pool_1d(graph: GraphWriter, layer: layers.Layer, x: FileTensor) -> FileTensor:
    operator = "ReduceMax" if isinstance(layer, layers.GlobalMaxPool1D) else "ReduceMean"
    x = graph.transposed(x, channels_first=False)
    return graph.add_node(operator, x, graph.add_constant([1], numpy.int64), keepdims=0)


# Layers with weights --------------------------------------------------------------------------------------------------


@exports(layers.Dense)
def _dense(graph: GraphWriter, layer: layers.Dense, x: FileTensor) -> FileTensor:
    x = graph.transposed(x, channels_first=False)
    bias = [graph.add_weight(layer.bias)] if layer.use_bias else []
    if layer.tied_to is None:
        weight = graph.add_weight(layer.weight)
    else:
        table = replace(x, name=_table(graph, layer.weight, layer.tied_to.padding_index))
        weight = graph.add_node("Transpose", table, perm=(1, 0)).name
    if len(x.shape) == 1:
        return graph.add_node("Gemm", x, weight, *bias)
    y = graph.add_node("MatMul", x, weight)
    return graph.add_node("Add", y, *bias) if bias else y


@exports(layers.Embedding)
def _embedding(graph: GraphWriter, layer: layers.Embedding, x: FileTensor) -> FileTensor:
    table = _table(graph, layer.weight, layer.padding_index)
    return graph.add_node("Gather", replace(x, name=table, dtype=graph.dtype), x.name)


def _table(graph: GraphWriter, weight: Parameter, padding_index: int | None) -> str:
    """Add the table of an Embedding, with a padding row of zeros, although it may have been loaded with others."""
    table = numpy.array(graph.to_numpy(weight.value))
    if padding_index is not None:
        table[padding_index] = 0.0
    return graph.add_constant(table, name=weight.name)


@exports(layers.Conv2D, layers.DepthwiseConv2D)
def _convolution(graph: GraphWriter, layer: layers.Conv2D, x: FileTensor) -> FileTensor:
    return _convolve(graph, "Conv", layer, x, graph.to_numpy(layer.weight.value).transpose(3, 2, 0, 1))


@exports(layers.Conv2DTranspose)
def _convolution_transpose(graph: GraphWriter, layer: layers.Conv2DTranspose, x: FileTensor) -> FileTensor:
    weight = graph.to_numpy(layer.weight.value).transpose(2, 3, 0, 1)  # (in / groups, filters, kh, kw)
    stacked = numpy.concatenate(numpy.split(weight, layer.groups, axis=1))  # (in, filters / groups, kh, kw)
    output_padding = [max(-n, 0) for n in _end_padding(layer.windows)]
    return _convolve(graph, "ConvTranspose", layer, x, stacked, output_padding=output_padding)


def _convolve(graph: GraphWriter, kind: str, layer: Any, x: FileTensor, weight: Any, **more: Any) -> FileTensor:
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


@exports(layers.MaxPool2D, layers.AvgPool2D)
def _pool(graph: GraphWriter, layer: layers.MaxPool2D | layers.AvgPool2D, x: FileTensor) -> FileTensor:
    kind, attributes = "MaxPool", _window_attributes(layer.windows)
    if isinstance(layer, layers.AvgPool2D):
        kind, attributes["count_include_pad"] = "AveragePool", int(layer.count_include_pad)
    return graph.add_node(kind, graph.transposed(x, channels_first=True), **attributes)


@exports(layers.GlobalAveragePool2D, layers.GlobalMaxPool2D)
def _global_pool(graph: GraphWriter, layer: layers.Layer, x: FileTensor) -> FileTensor:
    operator = "GlobalMaxPool" if isinstance(layer, layers.GlobalMaxPool2D) else "GlobalAveragePool"
    pooled = graph.add_node(operator, graph.transposed(x, channels_first=True))
    return replace(graph.add_node("Flatten", pooled), channels_first=False)


@exports(layers.ZeroPadding2D)
def _zero_padding(graph: GraphWriter, layer: layers.ZeroPadding2D, x: FileTensor) -> FileTensor:
    (top, bottom), (left, right) = layer.padding
    pads = graph.add_constant([0, 0, top, left, 0, 0, bottom, right], numpy.int64)
    return graph.add_node("Pad", graph.transposed(x, channels_first=True), pads)


@exports(layers.Upsample2D)
def _upsample(graph: GraphWriter, layer: layers.Upsample2D, x: FileTensor) -> FileTensor:
    scales = graph.add_constant([1.0, 1.0, *pair(layer.size)], numpy.float32)
    mode: dict[str, Any] = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    if layer.interpolation == "nearest":
        mode = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return graph.add_node("Resize", graph.transposed(x, channels_first=True), "", scales, **mode)
