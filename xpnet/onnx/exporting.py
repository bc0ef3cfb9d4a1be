"""A model as an ONNX file.

ONNX has images with their channels first, xpnet last. Images are turned before the first layer that needs it, and back
before the first that needs the other order, so a chain of image layers holds no transposition.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy
import onnx
from onnx import helper, numpy_helper

import xpnet
from xpnet import augment, layers
from xpnet.backends.sliding import Windows
from xpnet.checkpoints import write_atomically
from xpnet.errors import ArgumentError, ArgumentTypeError, StateError
from xpnet.layers.grid import pair
from xpnet.layers.normalization import Normalization
from xpnet.onnx.reader import FIRST, IMAGES, LAST

_OPSET, _IR_VERSION = 20, 9  # the first with Gelu, and the format's version of the same release


class _Value(NamedTuple):
    """A tensor of the graph: its name, xpnet's shape of a sample, and whether it has its channels first."""

    name: str
    shape: tuple[int, ...]
    first: bool = False


def export_onnx(
    model: layers.Sequential, path: Any, *, channels_first: bool = False, input_dtype: str | None = None
) -> None:
    """Write a model to an ONNX file that maps the input "x", (N, *input_shape), to the output "y", as `predict` does.

    channels_first: take and give images as (N, channels, H, W), as most other tools have them.
    input_dtype: of x, such as "uint8" for a model that begins with Rescale; None is int64 before an Embedding, else the
    model's own.

    Raises ArgumentError for a layer that ONNX has no meaning for, such as one of your own.
    """
    if not isinstance(model, layers.Sequential):
        raise ArgumentTypeError(f"export_onnx takes a model, not {model!r}.")
    if not model.is_built:
        raise StateError("the model is not built yet: give it an input_shape, or train it first.")
    shape = model.input_shape
    if channels_first and len(shape) != 3:
        raise ArgumentError(f"channels_first is for images (H, W, channels), and this model takes {shape}.")
    graph = _Graph(model)
    inside = numpy.dtype("int64") if isinstance(_first_layer(model), layers.Embedding) else graph.dtype
    try:
        dtype = inside if input_dtype is None else numpy.dtype(input_dtype)
    except TypeError as error:
        raise ArgumentError(
            f"input_dtype must name a type of numbers, such as 'uint8', not {input_dtype!r}."
        ) from error
    x = _Value("x", shape, channels_first)
    if dtype != inside:
        x = graph.node("Cast", x, to=helper.np_dtype_to_tensor_dtype(inside))
    y = graph.put(model, x)
    y = graph.turned(y, first=channels_first and len(y.shape) == 3)
    file = graph.finish(y, _axes(shape, channels_first), dtype)
    helper.set_model_props(file, {IMAGES: FIRST if channels_first else LAST})
    onnx.checker.check_model(file, full_check=True)
    write_atomically(path, file.SerializeToString())


def _first_layer(model: layers.Sequential) -> layers.Layer | None:
    """The first that does not only pass on what comes."""
    for layer in model.layers:
        found = _first_layer(layer) if isinstance(layer, layers.Sequential) else layer
        if found is not None and found.accepts_integers is not None:
            return found
    return None


def _axes(shape: Sequence[int], first: bool) -> list[int]:
    return [shape[2], shape[0], shape[1]] if first else list(shape)


class _Graph:
    """Nodes and constants, as they come."""

    def __init__(self, model: layers.Sequential) -> None:
        self._to_numpy = model.backend.to_numpy
        self.dtype = numpy.dtype(model.context.dtype)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def node(self, kind: str, x: _Value, *more: str, shape: Sequence[int] | None = None, **attributes: Any) -> _Value:
        """What an operator makes of x and more inputs, in x's order of axes."""
        name = f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, [x.name, *more], [name], name=name, **attributes))
        return x._replace(name=name, shape=x.shape if shape is None else tuple(shape))

    def constant(self, name: str, values: Any, dtype: Any = None) -> str:
        """The name of a constant; parameters keep theirs."""
        array = numpy.ascontiguousarray(self._to_numpy(values), dtype=dtype or self.dtype)
        self._constants[name] = numpy_helper.from_array(array, name)
        return name

    def number(self, value: Any, dtype: Any = None) -> str:
        return self.constant(f"constant_{len(self._constants)}", numpy.asarray(value), dtype)

    def turned(self, x: _Value, first: bool) -> _Value:
        """x with channels first, or last."""
        if x.first == first:
            return x
        axes = len(x.shape)
        perm = (0, axes, *range(1, axes)) if first else (0, *range(2, axes + 1), 1)
        return self.node("Transpose", x, perm=perm)._replace(first=first)

    def put(self, layer: layers.Layer, x: _Value) -> _Value:
        """What a layer makes of x."""
        kind = next((kind for kind in type(layer).__mro__ if kind in _WRITERS), None)
        # A subclass of a user's own may compute something else.
        if kind is not None and (type(layer).forward is kind.forward or type(layer).__module__.startswith("xpnet.")):
            return _WRITERS[kind](self, layer, x)._replace(shape=layer.output_shape)
        raise ArgumentError(
            f"layer {layer.path} ({type(layer).__name__}) has no meaning in ONNX that xpnet knows of. Put layers of "
            "xpnet.layers in its place."
        )

    def finish(self, y: _Value, input_axes: Sequence[int], input_dtype: Any) -> onnx.ModelProto:
        """The file. The last value gets the name "y"."""
        kinds = [helper.np_dtype_to_tensor_dtype(dtype) for dtype in (input_dtype, self.dtype)]
        self._nodes.append(helper.make_node("Identity", [y.name], ["y"], name="y"))
        graph = helper.make_graph(
            self._nodes, "xpnet",
            [helper.make_tensor_value_info("x", kinds[0], ["N", *input_axes])],
            [helper.make_tensor_value_info("y", kinds[1], ["N", *_axes(y.shape, y.first)])],
            list(self._constants.values()),
        )  # fmt: skip
        return helper.make_model(
            graph, producer_name="xpnet", producer_version=xpnet.__version__, ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid("", _OPSET)],
        )  # fmt: skip


_Writer = Callable[[_Graph, Any, _Value], _Value]
_WRITERS: dict[type[layers.Layer], _Writer] = {}


def _writes(*kinds: type[layers.Layer]) -> Callable[[_Writer], _Writer]:
    def note(writer: _Writer) -> _Writer:
        for kind in kinds:
            _WRITERS[kind] = writer
        return writer

    return note


# Layers made of layers ------------------------------------------------------------------------------------------------


@_writes(layers.Sequential)
def _sequential(graph: _Graph, layer: layers.Sequential, x: _Value) -> _Value:
    return functools.reduce(lambda x, inner: graph.put(inner, x), layer.layers, x)


@_writes(layers.Residual)
def _residual(graph: _Graph, layer: layers.Residual, x: _Value) -> _Value:
    *way, skip = layer.layers
    y = functools.reduce(lambda x, inner: graph.put(inner, x), way, x)
    across = graph.turned(graph.put(skip, x), y.first)
    return graph.node("Add", y, across.name)


# What does nothing outside of training --------------------------------------------------------------------------------


@_writes(layers.Identity, layers.Dropout, augment.Distortion)
def _nothing(graph: _Graph, layer: layers.Layer, x: _Value) -> _Value:
    return x


# Functions of every element, and of the features ----------------------------------------------------------------------


def _operator(kind: str) -> _Writer:
    return lambda graph, layer, x: graph.node(kind, x)


for _kind in (layers.ReLU, layers.Sigmoid, layers.Tanh, layers.Softplus):
    _WRITERS[_kind] = _operator("Relu" if _kind is layers.ReLU else _kind.__name__)


@_writes(layers.LeakyReLU)
def _leaky_relu(graph: _Graph, layer: layers.LeakyReLU, x: _Value) -> _Value:
    return graph.node("LeakyRelu", x, alpha=float(layer.negative_slope))


@_writes(layers.ELU)
def _elu(graph: _Graph, layer: layers.ELU, x: _Value) -> _Value:
    return graph.node("Elu", x, alpha=float(layer.alpha))


@_writes(layers.GELU)
def _gelu(graph: _Graph, layer: layers.GELU, x: _Value) -> _Value:
    return graph.node("Gelu", x, approximate=layer.approximate)


@_writes(layers.SiLU)
def _silu(graph: _Graph, layer: layers.SiLU, x: _Value) -> _Value:
    return graph.node("Mul", x, graph.node("Sigmoid", x).name)


@_writes(layers.Step)
def _step(graph: _Graph, layer: layers.Step, x: _Value) -> _Value:
    at_least = graph.node("GreaterOrEqual", x, graph.number(layer.threshold))
    return graph.node("Cast", at_least, to=helper.np_dtype_to_tensor_dtype(graph.dtype))


@_writes(layers.Softmax, layers.LogSoftmax)
def _softmax(graph: _Graph, layer: layers.Layer, x: _Value) -> _Value:
    return graph.node(type(layer).__name__, x, axis=1 if x.first else -1)


@_writes(layers.Rescale)
def _rescale(graph: _Graph, layer: layers.Rescale, x: _Value) -> _Value:
    y = graph.node("Mul", x, graph.number(layer.scale))
    return graph.node("Add", y, graph.number(layer.offset)) if layer.offset else y


@_writes(layers.BatchNorm)
def _batch_norm(graph: _Graph, layer: layers.BatchNorm, x: _Value) -> _Value:
    mean = graph.constant(layer.running_mean.name, layer.running_mean.value)
    variance = graph.constant(layer.running_var.name, layer.running_var.value)
    if len(x.shape) > 1:  # ONNX has the features on axis 1
        x = graph.turned(x, first=True)
    return graph.node("BatchNormalization", x, *_gamma_and_beta(graph, layer), mean, variance, epsilon=layer.epsilon)


@_writes(layers.LayerNorm)
def _layer_norm(graph: _Graph, layer: layers.LayerNorm, x: _Value) -> _Value:
    x = graph.turned(x, first=False)
    return graph.node("LayerNormalization", x, *_gamma_and_beta(graph, layer), axis=-1, epsilon=layer.epsilon)


def _gamma_and_beta(graph: _Graph, layer: Normalization) -> list[str]:
    features = layer.output_shape[-1]
    return [
        graph.constant(parameter.name, parameter.value) if parameter is not None else graph.number([value] * features)
        for parameter, value in ((getattr(layer, "gamma", None), 1.0), (getattr(layer, "beta", None), 0.0))
    ]


# Shapes ---------------------------------------------------------------------------------------------------------------


@_writes(layers.Reshape, layers.Flatten)
def _reshape(graph: _Graph, layer: layers.Reshape, x: _Value) -> _Value:
    x = graph.turned(x, first=False)
    return graph.node("Reshape", x, graph.number([-1, *layer.output_shape], numpy.int64))


@_writes(layers.Permute)
def _permute(graph: _Graph, layer: layers.Permute, x: _Value) -> _Value:
    return graph.node("Transpose", graph.turned(x, first=False), perm=(0, *(axis + 1 for axis in layer.axes)))


# Products -------------------------------------------------------------------------------------------------------------


@_writes(layers.Dense)
def _dense(graph: _Graph, layer: layers.Dense, x: _Value) -> _Value:
    x = graph.turned(x, first=False)
    weight = graph.constant(layer.weight.name, layer.weight.value)
    bias = [graph.constant(layer.bias.name, layer.bias.value)] if layer.use_bias else []
    if len(x.shape) == 1:
        return graph.node("Gemm", x, weight, *bias)
    y = graph.node("MatMul", x, weight)
    return graph.node("Add", y, *bias) if bias else y


@_writes(layers.Embedding)
def _embedding(graph: _Graph, layer: layers.Embedding, x: _Value) -> _Value:
    weight = graph.constant(layer.weight.name, layer.weight.value)
    name = f"gather_{x.name}"
    graph._nodes.append(helper.make_node("Gather", [weight, x.name], [name], name=name))
    return x._replace(name=name)


@_writes(layers.Conv2D, layers.DepthwiseConv2D)
def _convolution(graph: _Graph, layer: layers.Conv2D, x: _Value) -> _Value:
    return _convolve(graph, "Conv", layer, x, numpy.asarray(graph._to_numpy(layer.weight.value)).transpose(3, 2, 0, 1))


@_writes(layers.Conv2DTranspose)
def _convolution_transpose(graph: _Graph, layer: layers.Conv2DTranspose, x: _Value) -> _Value:
    weight = graph._to_numpy(layer.weight.value).transpose(2, 3, 0, 1)  # (in / groups, filters, kh, kw)
    stacked = numpy.concatenate(numpy.split(weight, layer.groups, axis=1))  # (in, filters / groups, kh, kw)
    windows = layer.windows
    after, extra = [0, 0], [0, 0]
    for axis in (0, 1):
        reach = windows.dilation[axis] * (windows.kernel[axis] - 1) + 1
        whole = (windows.grid[axis] - 1) * windows.strides[axis] + reach
        left = whole - windows.before[axis] - windows.image[axis]
        after[axis], extra[axis] = max(left, 0), max(-left, 0)
    return _convolve(graph, "ConvTranspose", layer, x, stacked, after, output_padding=extra)


def _convolve(
    graph: _Graph, kind: str, layer: Any, x: _Value, weight: Any, after: Sequence[int] | None = None, **more: Any
) -> _Value:
    inputs = [graph.constant(layer.weight.name, weight)]
    if layer.use_bias:
        inputs.append(graph.constant(layer.bias.name, layer.bias.value))
    places = _places(layer.windows, after)
    return graph.node(
        kind,
        graph.turned(x, first=True),
        *inputs,
        **places,
        dilations=layer.windows.dilation,
        group=layer.groups,
        **more,
    )


def _places(windows: Windows, after: Sequence[int] | None = None) -> dict[str, Any]:
    """Kernel, strides and padding as ONNX says them: (top, left, bottom, right)."""
    if after is None:
        after = [
            max(0, (windows.grid[a] - 1) * windows.strides[a] + windows.dilation[a] * (windows.kernel[a] - 1) + 1
                - windows.before[a] - windows.image[a])
            for a in (0, 1)
        ]  # fmt: skip
    return {"kernel_shape": windows.kernel, "strides": windows.strides, "pads": [*windows.before, *after]}


# Pooling and sizes of images ------------------------------------------------------------------------------------------


@_writes(layers.MaxPool2D)
def _max_pool(graph: _Graph, layer: layers.MaxPool2D, x: _Value) -> _Value:
    return graph.node("MaxPool", graph.turned(x, first=True), **_places(layer.windows))


@_writes(layers.AvgPool2D)
def _avg_pool(graph: _Graph, layer: layers.AvgPool2D, x: _Value) -> _Value:
    counted = int(layer.count_include_pad)
    return graph.node("AveragePool", graph.turned(x, first=True), count_include_pad=counted, **_places(layer.windows))


@_writes(layers.GlobalAveragePool2D)
def _global_average(graph: _Graph, layer: layers.GlobalAveragePool2D, x: _Value) -> _Value:
    pooled = graph.node("GlobalAveragePool", graph.turned(x, first=True))
    return graph.node("Flatten", pooled)._replace(first=False)


@_writes(layers.Upsample2D)
def _upsample(graph: _Graph, layer: layers.Upsample2D, x: _Value) -> _Value:
    scales = graph.number([1.0, 1.0, *pair(layer.size)], numpy.float32)
    if layer.interpolation == "nearest":
        how: dict[str, Any] = {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        }
    else:
        how = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    return graph.node("Resize", graph.turned(x, first=True), "", scales, **how)
