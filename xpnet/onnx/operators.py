"""Convert ONNX operators to layers: for each operator, a function from a node to its output."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import onnx
from onnx import numpy_helper

from xpnet import layers
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape
from xpnet.onnx.reader import BATCH, Constant, LoadedLayer, Node, Tensor, converts, copy_of, file_shape, transposition

# Elementwise operators ------------------------------------------------------------------------------------------------

_ELEMENTWISE: dict[str, Callable[[dict[str, Any]], Layer]] = {
    "Relu": lambda a: layers.ReLU(),
    "Sigmoid": lambda a: layers.Sigmoid(),
    "Tanh": lambda a: layers.Tanh(),
    "Softplus": lambda a: layers.Softplus(),
    "LeakyRelu": lambda a: layers.LeakyReLU(a.get("alpha", 0.01)),
    "Elu": lambda a: layers.ELU(a.get("alpha", 1.0)),
    "Gelu": lambda a: layers.GELU(a.get("approximate", b"none").decode()),
}


@converts(*_ELEMENTWISE)
def _elementwise(node: Node) -> Tensor:
    return node.tensor().add(_ELEMENTWISE[node.operator](node.attributes))


@converts("Identity", "Dropout", "Cast")
def _identity(node: Node) -> Any:
    return node.inputs[0]


@converts("Constant")
def _constant(node: Node) -> Constant:
    value = next(iter(node.attributes.values()))
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else numpy.asarray(value)


@converts("GreaterOrEqual")
def _step(node: Node) -> Tensor:
    threshold = node.constant(1, "threshold")
    if threshold.size != 1:
        raise node.error(f"has a threshold of shape {threshold.shape}; only one number is supported")
    return node.tensor().add(layers.Step(float(threshold.reshape(()))))


@converts("Softmax", "LogSoftmax")
def _softmax(node: Node) -> Tensor:
    x = node.tensor()
    axis = node.attributes.get("axis", -1) % (len(x.shape) + 1)
    if axis != (1 if x.channels_first else len(x.shape)):
        raise node.error(f"over axis {axis} is not supported, only over the features")
    return x.resolve_flatten().add(getattr(layers, node.operator)())


_WITH_A_NUMBER: dict[str, Callable[[float], Layer]] = {
    "Mul": layers.Rescale,
    "Div": lambda number: layers.Rescale(1.0 / number),
    "Add": lambda number: layers.Rescale(1.0, number),
    "Sub": lambda number: layers.Rescale(1.0, -number),
}
_NOT_RESIDUAL = "joins two branches of the graph, and is not the sum of a residual block"


@converts(*_WITH_A_NUMBER)
def _arithmetic(node: Node) -> Tensor:
    a, b = node.inputs
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _two_branches(node, a, b)
    place = 1 if node.operator in ("Mul", "Add") and not isinstance(a, Tensor) else 0
    x, other = node.tensor(place), node.constant(1 - place, "operand")
    if other.size == 1:
        return x.add(_WITH_A_NUMBER[node.operator](float(other.reshape(()))))
    last = x.layers[-1] if x.layers else None
    if node.operator == "Add" and last and isinstance(last.layer, layers.Dense) and not last.layer.use_bias:
        weights = {**last.weights, "bias": other.reshape(-1)}
        return x._replace(layers=(*x.layers[:-1], last._replace(layer=layers.Dense(last.layer.units), weights=weights)))
    raise node.error(f"has an operand of shape {other.shape}, which is neither one number nor a Dense bias")


def _two_branches(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """x · sigmoid(x), or the sum of the two branches of a residual block."""
    shared = 0
    while shared < min(len(a.layers), len(b.layers)) and a.layers[shared] is b.layers[shared]:
        shared += 1
    long, short = (a, b) if len(a.layers) >= len(b.layers) else (b, a)
    inner, skip = long.layers[shared:], short.layers[shared:]
    if node.operator == "Mul" and not skip and len(inner) == 1 and isinstance(inner[0].layer, layers.Sigmoid):
        return short.add(layers.SiLU())
    if node.operator != "Add" or not inner:
        raise node.error(_NOT_RESIDUAL)
    projection = None
    if skip:
        projection = skip[0].layer if len(skip) == 1 else layers.Sequential([loaded.layer for loaded in skip])
    block = layers.Residual(*[loaded.layer for loaded in inner], projection=projection)
    return long._replace(layers=(*long.layers[:shared], LoadedLayer(block, {}, long.shape, (inner, skip))))


# Normalization --------------------------------------------------------------------------------------------------------


@converts("BatchNormalization")
def _batch_norm(node: Node) -> Tensor:
    x = node.tensor().resolve_flatten()
    if len(x.shape) > 1 and not x.channels_first:
        raise node.error("over axis 1 is not supported here, because the features are on the last axis")
    gamma, beta, mean, variance = (node.constant(index, "parameter") for index in range(1, 5))
    get = node.attributes.get
    layer = layers.BatchNorm(momentum=1.0 - get("momentum", 0.9), epsilon=get("epsilon", 1e-5))
    return x.add(layer, gamma=gamma, beta=beta, running_mean=mean, running_var=variance)


@converts("LayerNormalization")
def _layer_norm(node: Node) -> Tensor:
    x = node.tensor().in_file_order()
    axis = node.attributes.get("axis", -1)
    if axis % (len(x.shape) + 1) != len(x.shape):
        raise node.error(f"over the axes from {axis} on is not supported, only over the last axis")
    gamma, beta = node.constant(1, "scale"), node.optional(2, "bias")
    layer = layers.LayerNorm(epsilon=node.attributes.get("epsilon", 1e-5), center=beta is not None)
    return x.add(layer, gamma=gamma, beta=beta)


# Operators with weights -----------------------------------------------------------------------------------------------


@converts("Gemm", "MatMul")
def _dense(node: Node) -> Tensor:
    x, weight, bias = node.tensor(), node.constant(1, "weight"), node.optional(2, "bias")
    get, number = node.attributes.get, weight.dtype.type
    if get("transA", 0):
        raise node.error("with transA is not supported")
    weight = weight.T if get("transB", 0) else weight
    x = x.in_file_order() if x.channels_first else x
    if weight.ndim != 2 or x.shape[-1] != len(weight):
        raise node.error(f"has a weight of shape {weight.shape} for samples of shape {x.shape}")
    units = weight.shape[1]
    if bias is not None:
        if bias.size not in (1, units):
            raise node.error(f"has a bias of shape {bias.shape} for {units} outputs")
        bias = numpy.broadcast_to(bias.reshape(-1), units) * number(get("beta", 1.0))
    if x.flattened_from is not None:  # reorder the rows of the weight to channels last
        height, width, channels = x.flattened_from
        weight = weight.reshape(channels, height, width, units).transpose(1, 2, 0, 3).reshape(weight.shape)
        x = x._replace(flattened_from=None)
    return x.add(layers.Dense(units, use_bias=bias is not None), weight=weight * number(get("alpha", 1.0)), bias=bias)


@converts("Gather")
def _gather(node: Node) -> Any:
    table, index = node.inputs
    if isinstance(index, Tensor):
        weight = node.constant(0, "table")
        if not index.layers and weight.ndim == 2 and node.attributes.get("axis", 0) == 0:
            return index.add(layers.Embedding(*weight.shape), weight=weight)
    elif isinstance(table, list | numpy.ndarray):
        return table[int(node.constant(1, "index").reshape(()))]
    raise node.error("is supported only as an embedding of the input")


@converts("Conv")
def _conv(node: Node) -> Tensor:
    x, weight, bias = node.image(), node.constant(1, "weight"), node.optional(2, "bias")
    if weight.ndim != 4:
        raise node.error(f"is supported for images, not with a weight of shape {weight.shape}")
    kernel, strides, dilation = weight.shape[2:], node.pair("strides"), node.pair("dilations")
    padding, groups = _padding(node, x.shape, kernel, strides, dilation), node.attributes.get("group", 1)
    layer = layers.Conv2D(len(weight), kernel, strides, padding, dilation, groups, use_bias=bias is not None)
    return x.add(layer, weight=weight.transpose(2, 3, 1, 0), bias=bias)


@converts("ConvTranspose")
def _conv_transpose(node: Node) -> Tensor:
    x, weight, bias = node.image(), node.constant(1, "weight"), node.optional(2, "bias")
    kernel, strides, dilation = weight.shape[2:], node.pair("strides"), node.pair("dilations")
    pads, extra = node.pads(), list(node.attributes.get("output_padding", (0, 0)))
    groups = node.attributes.get("group", 1)
    ours = numpy.concatenate(numpy.split(weight, groups), axis=1).transpose(2, 3, 0, 1)
    wanted = [
        (x.shape[a] - 1) * strides[a] + dilation[a] * (kernel[a] - 1) + 1 + extra[a] - pads[a] - pads[a + 2]
        for a in (0, 1)
    ]
    # Conv2DTranspose has symmetric padding; less padding at the end than at the beginning is more output_padding.
    candidates: list[tuple[Any, Any]] = [("same", 0)]
    uneven = tuple(extra[a] - pads[a + 2] + pads[a] for a in (0, 1))
    if min(uneven) >= 0:
        candidates.insert(0, ((pads[0], pads[1]), uneven))
    for padding, output_padding in candidates:
        try:
            layer = layers.Conv2DTranspose(
                weight.shape[1] * groups, kernel, strides, padding, dilation, groups, output_padding,
                use_bias=bias is not None,
            )  # fmt: skip
            built = copy_of(layer)
            shape = built.build(x.shape, backend="cpu")
        except ArgumentError:
            continue
        if list(shape[:2]) == wanted and list(vars(built)["windows"].before) == pads[:2]:
            return x.add(layer, weight=ours, bias=bias)
    raise node.error(f"has pads {pads} and output_padding {extra}, which Conv2DTranspose does not support")


def _padding(node: Node, shape: Shape, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int]) -> Any:
    """The argument `padding` of a layer for the pads of a node: "valid", the pixels on both sides, or "same"."""
    automatic = node.attributes.get("auto_pad", b"NOTSET")
    if automatic not in (b"NOTSET", b"VALID", b""):
        raise node.error(f"with auto_pad {automatic.decode()} is not supported, only with pads")
    pads = node.pads()
    reach = [dilation[a] * (kernel[a] - 1) + 1 for a in (0, 1)]
    grid = [(shape[a] + pads[a] + pads[a + 2] - reach[a]) // strides[a] + 1 for a in (0, 1)]
    before = (pads[0], pads[1])
    if all((shape[a] + 2 * before[a] - reach[a]) // strides[a] + 1 == grid[a] for a in (0, 1)):
        return before if any(before) else "valid"
    same = [math.ceil(shape[a] / strides[a]) for a in (0, 1)]
    ours = [max((same[a] - 1) * strides[a] + reach[a] - shape[a], 0) // 2 for a in (0, 1)]
    if same == grid and ours == list(before):
        return "same"
    raise node.error(f'has pads {pads}, which are neither the same on both sides nor those of "same"')


# Pooling and resizing of images ---------------------------------------------------------------------------------------


@converts("MaxPool", "AveragePool")
def _pool(node: Node) -> Tensor:
    x, size, strides = node.image(), tuple(node.attributes["kernel_shape"]), node.pair("strides")
    if any(n != 1 for n in node.pair("dilations")) or len(size) != 2:
        raise node.error("is supported only for images, and without dilations")
    uncovered = [(x.shape[a] + sum(node.pads()[a::2]) - size[a]) % strides[a] for a in (0, 1)]
    if node.attributes.get("ceil_mode", 0) and any(uncovered):
        raise node.error("with ceil_mode is supported only if the windows cover the image exactly")
    padding = _padding(node, x.shape, size, strides, (1, 1))
    if node.operator == "MaxPool":
        return x.add(layers.MaxPool2D(size, strides, padding))
    count = bool(node.attributes.get("count_include_pad", 0))
    return x.add(layers.AvgPool2D(size, strides, padding, count_include_pad=count))


@converts("GlobalAveragePool", "ReduceMean")
def _global_average(node: Node) -> Tensor:
    x, axes = node.image(), node.axes()
    if node.operator == "ReduceMean" and sorted(axis % 4 for axis in axes) != [2, 3]:
        raise node.error(f"over axes {axes} is not supported, only over height and width")
    x = x.add(layers.GlobalAveragePool2D())
    if not node.attributes.get("keepdims", 1):
        return x
    return x.add(layers.Reshape((1, 1, *x.shape)), channels_first=True)


@converts("Resize", "Upsample")
def _resize(node: Node) -> Tensor:
    x = node.image()
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        scales = [node.inputs[3][axis + 2] / x.shape[axis] for axis in (0, 1)]
    else:
        scales = [float(s) for s in node.constant(2, "scale")[2:]]
    get = node.attributes.get
    mode, rounding = get("mode", b"nearest").decode(), get("nearest_mode", b"round_prefer_floor").decode()
    coordinates = get("coordinate_transformation_mode", b"half_pixel").decode()
    nearest = mode == "nearest" and coordinates == "asymmetric" and rounding == "floor"
    bilinear = mode == "linear" and coordinates in ("half_pixel", "pytorch_half_pixel")
    if any(s != int(s) for s in scales) or not (nearest or bilinear):
        raise node.error(f"by {scales} in mode {mode!r}, {coordinates!r}, {rounding!r} is not supported by Upsample2D")
    return x.add(layers.Upsample2D((int(scales[0]), int(scales[1])), "nearest" if nearest else "bilinear"))


# Shapes ---------------------------------------------------------------------------------------------------------------


@converts("Transpose")
def _transpose(node: Node) -> Any:
    perm = list(node.attributes.get("perm", ()))
    if isinstance(node.inputs[0], numpy.ndarray):
        return node.inputs[0].transpose(perm or None)
    x = node.tensor().resolve_flatten()
    if len(x.shape) > 1 and perm == transposition(len(x.shape), channels_first=not x.channels_first):
        return x._replace(channels_first=not x.channels_first)
    if not perm or perm[0] != 0:
        raise node.error(f"in the order {perm} moves the batch axis")
    return x.in_file_order().add(layers.Permute([axis - 1 for axis in perm[1:]]))


@converts("Flatten")
def _flatten(node: Node) -> Tensor:
    if node.attributes.get("axis", 1) != 1:
        raise node.error(f"with axis {node.attributes['axis']} flattens the batch axis")
    return _flat(node.tensor())


def _flat(x: Tensor) -> Tensor:
    if len(x.shape) == 1:
        return x
    last = x.layers[-1].layer if x.layers else None
    if x.channels_first and x.shape[:2] == (1, 1) and isinstance(last, layers.Reshape):  # drop the Reshape
        return Tensor(x.layers[:-1], x.shape[2:])
    if x.channels_first and len(x.shape) != 3:
        x = x.in_file_order()
    flat = x.add(layers.Flatten())
    return flat._replace(flattened_from=x.shape) if x.channels_first and x.shape[2] > 1 else flat


@converts("Reshape")
def _reshape(node: Node) -> Any:
    if isinstance(node.inputs[0], numpy.ndarray):
        return node.inputs[0].reshape([int(n) for n in node.constant(1, "shape")])
    x, target = node.tensor(), list(node.inputs[1])
    features = math.prod(x.shape)
    batch, *sizes = target
    # The batch axis is kept if it is symbolic, 0, -1 or the fixed batch size, or if -1 is among the other axes.
    keeps_batch = batch is BATCH or int(batch) in (0, -1, node.batch_size) or -1 in sizes
    in_file = file_shape(x.shape, x.channels_first)
    sizes = [int(in_file[i] if n == 0 else n) for i, n in enumerate(sizes)]
    if -1 in sizes:
        sizes[sizes.index(-1)] = features // max(1, math.prod(n for n in sizes if n != -1))
    if not keeps_batch or math.prod(sizes) != features:
        raise node.error(f"to {target} changes the batch axis")
    return _flat(x) if len(sizes) == 1 else x.in_file_order().add(layers.Reshape(sizes), channels_first=False)


@converts("Squeeze", "Unsqueeze")
def _squeeze(node: Node) -> Any:
    x = node.inputs[0]
    if isinstance(x, list):
        return x
    if not isinstance(x, Tensor):
        return [x] if node.operator == "Unsqueeze" else numpy.squeeze(x)
    axes = node.axes()
    on_pixels = sorted(axis % 4 for axis in axes or (2, 3)) == [2, 3]
    if node.operator == "Squeeze" and x.channels_first and x.shape[:2] == (1, 1) and on_pixels:
        return _flat(x)
    raise node.error(f"over axes {axes} is not supported")


# Arithmetic with shapes, which contain the symbolic BATCH -------------------------------------------------------------


@converts("Shape")
def _shape(node: Node) -> list[Any]:
    x = node.tensor()
    return [BATCH, *file_shape(x.shape, x.channels_first)]


@converts("Slice")
def _slice(node: Node) -> Any:
    if not isinstance(node.inputs[0], list):
        raise node.error("is supported only for shapes")
    start, end = (int(node.constant(index, "bound").reshape(())) for index in (1, 2))
    return node.inputs[0][start:end]


@converts("Concat")
def _concat(node: Node) -> list[Any]:
    if any(isinstance(a, Tensor) for a in node.inputs):
        raise node.error(_NOT_RESIDUAL)
    return [n for a in node.inputs for n in (a if isinstance(a, list) else numpy.asarray(a).reshape(-1).tolist())]
