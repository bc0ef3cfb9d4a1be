"""Convert ONNX operators to layers: for each operator, a function from a node to its first output."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from xpnet import layers
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape
from xpnet.onnx import patterns, schemas
from xpnet.onnx.reader import Node, Value, converts
from xpnet.onnx.tensors import (
    BATCH,
    Constant,
    ShapeVector,
    Tensor,
    all_layers,
    common_chain,
    copy_of,
    transposition,
)

# Elementwise operators ------------------------------------------------------------------------------------------------

_ACTIVATIONS: dict[str, Callable[[Node], Layer]] = {
    "Relu": lambda node: layers.ReLU(),
    "Sigmoid": lambda node: layers.Sigmoid(),
    "Tanh": lambda node: layers.Tanh(),
    "Softplus": lambda node: layers.Softplus(),
    "LeakyRelu": lambda node: layers.LeakyReLU(node.attribute("alpha")),
    "Elu": lambda node: layers.ELU(node.attribute("alpha")),
    "Gelu": lambda node: layers.GELU(node.attribute("approximate")),
    "Neg": lambda node: layers.Rescale(-1.0),
}


@converts(*_ACTIVATIONS)
def _activation(node: Node) -> Tensor:
    return node.tensor().add(_ACTIVATIONS[node.operator](node))


@converts("Swish")
def _swish(node: Node) -> Tensor:
    if (alpha := node.attribute("alpha")) != 1:
        raise node.error(f"with alpha={alpha} is not supported, only with 1")
    return node.tensor().add(layers.SiLU())


@converts("Clip")
def _clip(node: Node) -> Tensor:
    if node.version < 11:
        low, high = node.attribute("min"), node.attribute("max")
    else:
        low, high = (None if (a := node.optional(i, "limit")) is None else float(a.reshape(())) for i in (1, 2))
    largest = float(numpy.finfo(node.tensor().dtype).max)
    if high is not None and high < largest:
        raise node.error(f"to at most {high} is not supported")
    if low is None or low <= -largest:
        return node.tensor()
    if low != 0:
        raise node.error(f"to at least {low} is not supported, only to at least 0")
    return node.tensor().add(layers.ReLU())


@converts("PRelu", since=7)
def _prelu(node: Node) -> Tensor:
    x, slope = node.tensor(), node.constant(1, "slope")
    if slope.size != 1 or slope.ndim > len(x.shape) + 1:
        raise node.error(f"with slopes of shape {slope.shape} is not supported, only with one number")
    return x.add(layers.LeakyReLU(float(slope.reshape(()))))


@converts("Identity")
def _identity(node: Node) -> Any:
    return node.value(0)


@converts("Dropout", since=7)
def _dropout(node: Node) -> Tensor:
    node.ignore("ratio", "seed")
    training = node.optional(2, "training_mode")
    if training is not None and training.any():
        raise node.error("with training_mode is not supported")
    return node.tensor()


@converts("Cast", "CastLike")
def _cast(node: Node) -> Tensor:
    if node.operator == "Cast":
        dtype = schemas.float_or_integer(node.attribute("to"))
    else:
        dtype = None if (like := node.value(1)) is None else like.dtype
    if dtype is None:
        raise node.error("to this type is not supported")
    node.ignore("saturate", "round_mode")  # both are for 8 bits
    x = node.tensor()
    try:
        return x.with_cast(dtype)
    except ArgumentError as error:
        raise node.error(f"is not supported here: {error}") from None


@converts("GreaterOrEqual")
def _step(node: Node) -> Tensor:
    x, threshold = node.tensor(), node.constant(1, "threshold")
    if threshold.size != 1 or threshold.ndim > len(x.shape) + 1:
        raise node.error(f"has a threshold of shape {threshold.shape}; only one number is supported")
    return x.add(layers.Step(float(threshold.reshape(())))).as_comparison()


# Arithmetic -----------------------------------------------------------------------------------------------------------


@converts("Add", "Sub", "Mul", "Div", since=7)
def _arithmetic(node: Node) -> Tensor:
    pattern = {"Mul": patterns.product, "Div": patterns.quotient}.get(node.operator)
    fused = pattern(node) if pattern else None
    if fused is not None:
        node.read_all_inputs()
        return fused
    a, b = node.value(0), node.value(1)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if node.operator in ("Mul", "Div"):
            raise node.error(_NOT_RESIDUAL)
        return _sum(node, a, b if node.operator == "Add" else b.add(layers.Rescale(-1.0)))
    if isinstance(a, Tensor):
        return _with_constant(node, a, node.constant(1, "operand"))
    return _with_constant(node, node.tensor(1), node.constant(0, "operand"), constant_first=True)


@converts("Sum", since=8)
def _sum_of_all(node: Node) -> Tensor:
    total = node.tensor()
    for i in range(1, len(node.values)):
        total = _sum(node, total, node.tensor(i))
    return total


@converts("Log")
def _log(node: Node) -> Tensor:
    return _pattern(node, patterns.logarithm(node))


@converts("Where")
def _where(node: Node) -> Tensor:
    return _pattern(node, patterns.selection(node))


def _pattern(node: Node, fused: Tensor | None) -> Tensor:
    if fused is None:
        for i in range(len(node.values)):
            node.value(i)  # raises the refusal of an input
        raise node.error("is not supported")
    node.read_all_inputs()
    return fused


_DEEPEST = 50  # Residual layers inside each other
_NOT_RESIDUAL = "joins two branches of the graph, and is not the sum of a residual block"


def _sum(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """The sum of two branches, as in a residual block."""
    if a.channels_first != b.channels_first:
        a, b = a.in_file_order(), b.in_file_order()
    if a.shape != b.shape:
        raise node.error(f"{_NOT_RESIDUAL}: it broadcasts samples of shapes {a.file_shape} and {b.file_shape}")
    if a.chain is b.chain:
        return a.add(layers.Rescale(2.0))
    start = common_chain(a.chain, b.chain)
    long, short = sorted((a.layers_after(start), b.layers_after(start)), key=len, reverse=True)
    inside = all_layers(long), all_layers(short)
    if any(isinstance(loaded.layer, layers.Embedding) for loaded in (*long, *short)):
        raise node.error(f"{_NOT_RESIDUAL}: it adds embeddings of the same integers")
    if inside[0].keys() & inside[1].keys():
        raise node.error(f"{_NOT_RESIDUAL}: both need the result of the same operators")
    if max((inside[0] | inside[1]).values()) > _DEEPEST:
        raise node.error(f"{_NOT_RESIDUAL}: it is inside {_DEEPEST} others")
    return a.with_sum(start, long, short)


def _with_constant(node: Node, x: Tensor, c: Constant, constant_first: bool = False) -> Tensor:
    """scale · x + offset, with a constant as the scale or offset."""
    x = _of_floats(node, x)
    axes = len(x.shape) + 1
    if c.ndim > axes or (c.ndim == axes and c.shape[0] != 1):
        raise node.error(f"has an operand of shape {c.shape}, which changes the batch axis of samples {x.file_shape}")
    c = c.reshape((1,) * (axes - 1 - min(c.ndim, axes - 1)) + c.shape[c.ndim == axes :])
    if numpy.broadcast_shapes(c.shape, x.file_shape) != x.file_shape:
        raise node.error(f"broadcasts samples of shape {x.file_shape} to those of an operand of shape {c.shape}")
    if node.operator == "Div" and constant_first:
        raise node.error("of a constant by a tensor is not supported")
    with numpy.errstate(all="ignore"):
        number = -c if node.operator == "Sub" and not constant_first else 1 / c if node.operator == "Div" else c
    if not numpy.isfinite(number).all():
        raise node.error("with a constant operand that is 0 as a divisor, infinite or NaN is not supported")
    if x.channels_first:
        number = number.transpose(*range(1, number.ndim), 0)
    is_offset = node.operator in ("Add", "Sub")
    sign = -1.0 if node.operator == "Sub" and constant_first else 1.0
    if sign == 1 and (merged := _merged(x, number, is_offset)):
        return merged
    if number.size == 1:
        value = float(number.reshape(()))
        return x.add(layers.Rescale(sign, value) if is_offset else layers.Rescale(value))
    return _per_feature(x, number, is_offset, sign)


def _merged(x: Tensor, number: Constant, is_offset: bool) -> Tensor | None:
    """x with the constant as the bias or gamma of its last layer, if that has none."""
    loaded = x.last
    if loaded is None or number.shape[-1] != x.shape[-1] or number.size != x.shape[-1]:
        return None
    layer, vector, config = loaded.layer, number.reshape(-1), loaded.layer.get_config()
    weighted = layers.Dense, layers.Conv2D, layers.DepthwiseConv2D, layers.Conv2DTranspose
    if is_offset and isinstance(layer, weighted) and not layer.use_bias:
        return x.replace_last(type(layer).from_config(config | {"use_bias": True}), **loaded.weights, bias=vector)
    if isinstance(layer, layers.LayerNorm) and not layer.center and (is_offset or not layer.scale):
        name, option = ("beta", "center") if is_offset else ("gamma", "scale")
        return x.replace_last(layers.LayerNorm.from_config(config | {option: True}), **loaded.weights, **{name: vector})
    return None


def _per_feature(x: Tensor, number: Constant, is_offset: bool, sign: float) -> Tensor:
    """scale · x + offset for each feature, by a depthwise convolution of 1 × 1 pixel."""
    by_channel = number.size == number.shape[-1] == x.shape[-1]
    channels = x.shape[-1] if by_channel else math.prod(x.shape)
    vector = numpy.ascontiguousarray(numpy.broadcast_to(number, x.shape if not by_channel else number.shape)).reshape(
        -1
    )
    weight = numpy.full(channels, sign, x.dtype) if is_offset else vector
    image = x if by_channel and len(x.shape) == 3 else x.add(layers.Reshape((1, -1, channels)))
    layer = layers.DepthwiseConv2D(1, use_bias=is_offset)
    y = image.add(layer, weight=weight.reshape(1, 1, 1, -1), bias=vector if is_offset else None)
    return y if image is x else y.add(layers.Reshape(x.shape), channels_first=x.channels_first)


# Over one axis: softmax and normalization -----------------------------------------------------------------------------


@converts("Softmax", "LogSoftmax")
def _softmax(node: Node) -> Tensor:
    x, layer = node.tensor(), getattr(layers, node.operator)()
    axis = _axis(node, node.attribute("axis"), len(x.shape) + 1)
    if axis == 0:
        raise node.error("over axis 0 is not supported: it is the batch")
    if node.version < 13:  # over all axes from this one on
        return _over_trailing_axes(x, axis, layer)
    if axis == (1 if x.channels_first else len(x.shape)):
        return x.add(layer)
    axes = list(range(len(x.shape)))
    moved = axes.pop(axis - 2 if x.channels_first else axis - 1)
    order = (*axes, moved)
    y = x.add(layers.Permute(order), channels_first=False).add(layer)
    return y.add(layers.Permute([order.index(i) for i in range(len(order))]), channels_first=x.channels_first)


def _over_trailing_axes(x: Tensor, axis: int, layer: Layer, **weights: Any) -> Tensor:
    """A layer over all axes from this one on together. The batch is axis 0."""
    x = x.in_file_order()
    if axis == len(x.shape):
        return x.add(layer, **weights)
    return x.add(layers.Reshape((*x.shape[: axis - 1], -1))).add(layer, **weights).add(layers.Reshape(x.shape))


def _axis(node: Node, axis: int, axes: int) -> int:
    """An axis counted from 0."""
    if not -axes <= axis < axes:
        raise node.error(f"has axis {axis}, and its input has {axes} axes")
    return axis % axes


def _axes(node: Node, given: Sequence[int], axes: int) -> list[int]:
    """Axes counted from 0, sorted."""
    found = sorted(_axis(node, axis, axes) for axis in given)
    if len(set(found)) < len(found):
        raise node.error(f"has the axes {list(given)}, one of them twice")
    return found


@converts("BatchNormalization", since=7)
def _batch_norm(node: Node) -> Tensor:
    if node.attribute("training_mode", 0) or any(node.proto.output[1:]):
        raise node.error("in training mode is not supported")
    gamma, beta, mean, variance = (node.constant(index, "parameter") for index in range(1, 5))
    layer = layers.BatchNorm(momentum=1.0 - node.attribute("momentum"), epsilon=node.attribute("epsilon"))
    x = node.tensor().with_features_last()
    return x.add(layer, gamma=gamma, beta=beta, running_mean=mean, running_var=variance)


@converts("LayerNormalization")
def _layer_norm(node: Node) -> Tensor:
    x = node.tensor()
    axis = _axis(node, node.attribute("axis"), len(x.shape) + 1)
    if axis == 0:
        raise node.error("over axis 0 is not supported: it is the batch")
    shape = x.file_shape[axis - 1 :]
    gamma, beta = (
        None if a is None else numpy.broadcast_to(a, shape).reshape(-1)
        for a in (node.constant(1, "scale"), node.optional(2, "bias"))
    )
    layer = layers.LayerNorm(epsilon=node.attribute("epsilon"), center=beta is not None)
    return _over_trailing_axes(x, axis, layer, gamma=gamma, beta=beta)


# Operators with weights -----------------------------------------------------------------------------------------------


@converts("Gemm", since=7)
def _gemm(node: Node) -> Tensor:
    x, weight, bias = node.tensor(), node.constant(1, "weight"), node.optional(2, "bias")
    if node.attribute("transA"):
        raise node.error("with transA is not supported: it moves the batch axis")
    weight = weight.T if node.attribute("transB") else weight
    if len(x.shape) != 1:
        raise node.error(f"has samples of shape {x.file_shape}, and takes vectors")
    if weight.ndim != 2 or len(weight) != x.shape[0]:
        raise node.error(f"has a weight of shape {weight.shape} for samples of shape {x.file_shape}")
    units, alpha, beta = weight.shape[1], node.attribute("alpha"), node.attribute("beta")
    if bias is not None:
        rows = bias if bias.ndim == 2 else bias.reshape((1,) * (2 - min(bias.ndim, 2)) + bias.shape)
        if rows.ndim != 2 or rows.shape[0] != 1 or rows.shape[1] not in (1, units):
            raise node.error(
                f"has a bias of shape {bias.shape} for {units} outputs, which is not the same for all samples"
            )
        bias = numpy.broadcast_to(rows[0], units) * bias.dtype.type(beta)
    layer = layers.Dense(units, use_bias=bias is not None)
    return x.add(layer, weight=weight * weight.dtype.type(alpha), bias=bias)


@converts("MatMul")
def _matmul(node: Node) -> Tensor:
    if isinstance(node.value(0), numpy.ndarray):
        return _matmul_from_left(node)
    x, weight = node.tensor().in_file_order(), node.constant(1, "weight")
    if weight.ndim != 2 or x.shape[-1] != len(weight):
        raise node.error(f"has a weight of shape {weight.shape} for samples of shape {x.shape}")
    return x.add(layers.Dense(weight.shape[1], use_bias=False), weight=weight)


def _matmul_from_left(node: Node) -> Tensor:
    """weight @ x: a Dense layer over the second axis from the end."""
    weight, x = node.constant(0, "weight"), node.tensor(1).in_file_order()
    axes = len(x.shape)
    if axes < 2 or weight.ndim != 2 or weight.shape[1] != x.shape[-2]:
        raise node.error(f"has a weight of shape {weight.shape} to the left of samples of shape {x.shape}")
    swap = layers.Permute((*range(axes - 2), axes - 1, axes - 2))
    y = x.add(swap).add(layers.Dense(len(weight), use_bias=False), weight=weight.T)
    return y.add(copy_of(swap))


@converts("Gather")
def _gather(node: Node) -> Tensor:
    table, index, axis = node.value(0), node.value(1), node.attribute("axis")
    if isinstance(index, Tensor) and isinstance(table, numpy.ndarray) and table.ndim == 2 and axis == 0:
        return index.in_file_order().add(layers.Embedding(*table.shape), dtype=table.dtype, weight=table)
    raise node.error("is supported only as an embedding: of the rows of a constant (rows, features)")


# Convolutions and pooling of images -----------------------------------------------------------------------------------


@converts("Conv")
def _conv(node: Node) -> Tensor:
    x, weight, bias = node.image(), node.constant(1, "weight"), node.optional(2, "bias")
    kernel, strides, dilation = _kernel(node, weight), _pair(node, "strides"), _pair(node, "dilations")
    padding, groups = _padding(node, x.shape, kernel, strides, dilation), node.attribute("group")
    layer = layers.Conv2D(
        len(weight), kernel, strides, padding, dilation=dilation, groups=groups, use_bias=bias is not None
    )
    return x.add(layer, weight=weight.transpose(2, 3, 1, 0), bias=bias)


@converts("ConvTranspose")
def _conv_transpose(node: Node) -> Tensor:
    x, weight, bias = node.image(), node.constant(1, "weight"), node.optional(2, "bias")
    kernel, strides, dilation = _kernel(node, weight), _pair(node, "strides"), _pair(node, "dilations")
    groups = node.attribute("group")
    before, wanted = _transposed_geometry(node, x.shape, kernel, strides, dilation)
    full = [(x.shape[a] - 1) * strides[a] + dilation[a] * (kernel[a] - 1) + 1 for a in (0, 1)]
    extra = tuple(wanted[a] - full[a] + 2 * before[a] for a in (0, 1))
    # Padding is symmetric in Conv2DTranspose; less padding at the end than at the beginning is more output_padding.
    candidates: list[tuple[Any, Any]] = [("same", 0)]
    if min(*extra, *before) >= 0:
        candidates.insert(0, (tuple(before), extra))
    for padding, output_padding in candidates:
        try:
            layer = layers.Conv2DTranspose(
                weight.shape[1] * groups, kernel, strides, padding, dilation=dilation, groups=groups,
                output_padding=output_padding, use_bias=bias is not None,
            )  # fmt: skip
            built = copy_of(layer)
            shape = built.build(x.shape, backend="cpu")
        except ArgumentError:
            continue
        if list(shape[:2]) == wanted and list(vars(built)["windows"].before) == before:
            ours = numpy.concatenate(numpy.split(weight, groups), axis=1).transpose(2, 3, 0, 1)
            return x.add(layer, weight=ours, bias=bias)
    raise node.error(f"with padding {before} before and outputs of {wanted} pixels is not supported by Conv2DTranspose")


def _transposed_geometry(
    node: Node, shape: Shape, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The padding before, and the size of the output, of a ConvTranspose; each (vertical, horizontal)."""
    automatic, pads = node.attribute("auto_pad"), node.attribute("pads")
    extra, wanted = node.attribute("output_padding", [0, 0]), node.attribute("output_shape")
    if not len(extra) == 2 or not len(pads or [0] * 4) == 4 or (wanted is not None and len(wanted) != 2):
        raise node.error(f"has pads {pads}, output_padding {extra} and output_shape {wanted}, and takes images")
    full = [(shape[a] - 1) * strides[a] + dilation[a] * (kernel[a] - 1) + 1 + extra[a] for a in (0, 1)]
    if automatic in ("SAME_UPPER", "SAME_LOWER") and wanted is None:
        wanted = [shape[a] * strides[a] for a in (0, 1)]
        if any(wanted[a] > full[a] for a in (0, 1)):  # the standard and ONNX Runtime disagree
            raise node.error(f"with auto_pad {automatic} and gaps between its windows is not supported")
    if wanted is None:
        pads = [0, 0, 0, 0] if automatic == "VALID" or pads is None else pads
        return pads[:2], [full[a] - pads[a] - pads[a + 2] for a in (0, 1)]
    total = [max(full[a] - wanted[a], 0) for a in (0, 1)]
    if automatic == "SAME_UPPER":
        return [n // 2 for n in total], list(wanted)
    return [n - n // 2 for n in total], list(wanted)


def _kernel(node: Node, weight: Constant) -> tuple[int, ...]:
    """The size of the windows of a convolution."""
    if weight.ndim != 4:
        raise node.error(f"is supported for images, not with a weight of shape {weight.shape}")
    if (kernel := node.attribute("kernel_shape")) is not None and kernel != list(weight.shape[2:]):
        raise node.error(f"has kernel_shape {kernel} and a weight of shape {weight.shape}")
    return tuple(weight.shape[2:])


def _pair(node: Node, name: str) -> tuple[int, ...]:
    """An attribute with a number for each of two axes, 1 by default."""
    numbers = tuple(node.attribute(name, (1, 1)))
    if len(numbers) != 2:
        raise node.error(f"has {name} {list(numbers)}, and takes images")
    return numbers


def _padding(node: Node, shape: Shape, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int]) -> Any:
    """The argument `padding` of a layer for a node: "valid", the pixels on both sides, or "same"."""
    automatic, pads = node.attribute("auto_pad"), node.attribute("pads", [0, 0, 0, 0])
    reach = [dilation[a] * (kernel[a] - 1) + 1 for a in (0, 1)]
    same = [math.ceil(shape[a] / strides[a]) for a in (0, 1)]
    total = [max((same[a] - 1) * strides[a] + reach[a] - shape[a], 0) for a in (0, 1)]
    if automatic == "SAME_UPPER" or (automatic == "SAME_LOWER" and not any(n % 2 for n in total)):
        return "same" if any(total) else "valid"
    if automatic not in ("NOTSET", "VALID", ""):
        raise node.error(f"with auto_pad {automatic} and padding {total} is not supported")
    pads = [0, 0, 0, 0] if automatic == "VALID" else pads
    if len(pads) != 4 or min(pads) < 0:
        raise node.error(f"with pads {pads} is not supported")
    room = [shape[a] + pads[a] + pads[a + 2] - reach[a] for a in (0, 1)]
    grid = [room[a] // strides[a] + 1 for a in (0, 1)]
    if node.schema.has("ceil_mode") and node.attribute("ceil_mode"):
        grid = [_ceil_windows(node, shape[a], pads[a], pads[a + 2], room[a], strides[a]) for a in (0, 1)]
    before = (pads[0], pads[1])
    if all((shape[a] + 2 * before[a] - reach[a]) // strides[a] + 1 == grid[a] for a in (0, 1)):
        return before if any(before) else "valid"
    if same == grid and all(total[a] // 2 == before[a] for a in (0, 1)):
        return "same"
    raise node.error(f'has pads {pads}, which are neither the same on both sides nor those of "same"')


def _ceil_windows(node: Node, size: int, before: int, after: int, room: int, stride: int) -> int:
    """The number of windows if the last one may extend beyond the padding."""
    windows = -(-room // stride) + 1
    if (windows - 1) * stride >= size + before:  # some versions leave out a window that begins beyond the image
        raise node.error("with ceil_mode and a window that begins beyond the image is not supported")
    covered = room % stride == 0
    if not covered and node.schema.has("count_include_pad") and node.attribute("count_include_pad"):
        raise node.error("with ceil_mode and count_include_pad is not supported if a window extends beyond the padding")
    return windows


@converts("MaxPool", "AveragePool")
def _pool(node: Node) -> Tensor:
    x, size, strides = node.image(), tuple(node.attribute("kernel_shape")), _pair(node, "strides")
    node.ignore("storage_order")  # of the second output
    if len(size) != 2 or any(n != 1 for n in node.attribute("dilations", (1, 1))):
        raise node.error(f"with kernel_shape {list(size)} is supported only for images, and without dilations")
    padding = _padding(node, x.shape, size, strides, (1, 1))
    if node.operator == "MaxPool":
        return x.add(layers.MaxPool2D(size, strides, padding))
    counted = bool(node.schema.has("count_include_pad") and node.attribute("count_include_pad"))
    return x.add(layers.AvgPool2D(size, strides, padding, count_include_pad=counted))


@converts("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(node: Node) -> Tensor:
    x = node.image()
    if node.operator == "GlobalMaxPool":
        return x.add(layers.MaxPool2D(x.shape[:2]))
    y = x.add(layers.GlobalAveragePool2D(), channels_first=False)
    return y.add(layers.Reshape((1, 1, *y.shape)), channels_first=True)


@converts("ReduceMean", "ReduceMax", "ReduceSum")
def _reduce(node: Node) -> Tensor:
    x, given = node.tensor(), node.list_of("axes", 1)
    if (
        node.version >= 13
        and not given
        and node.schema.has("noop_with_empty_axes")
        and node.attribute("noop_with_empty_axes")
    ):
        return x
    axes = _axes(node, given or range(len(x.shape) + 1), len(x.shape) + 1)
    if 0 in axes:
        raise node.error("over axis 0 is not supported: it is the batch")
    x, shape = _of_floats(node, x), x.file_shape
    # Over the height and width of images as they are; over others, as those of an image (reduced, 1, kept).
    image = x.with_features_last()
    if len(shape) != 3 or axes != [2, 3]:
        reduced = [axis - 1 for axis in axes]
        kept = [axis for axis in range(len(shape)) if axis not in reduced]
        image = x.in_file_order().add(layers.Permute((*reduced, *kept)))
        image = image.add(layers.Reshape((math.prod(shape[i] for i in reduced), 1, math.prod(shape[i] for i in kept))))
    if node.operator == "ReduceMax":
        y = image.add(layers.MaxPool2D(image.shape[:2]))
    else:
        y = image.add(layers.GlobalAveragePool2D(), channels_first=False)
        if node.operator == "ReduceSum":
            y = y.add(layers.Rescale(math.prod(image.shape[:2])))
    after = [1 if axis + 1 in axes else n for axis, n in enumerate(shape)]
    if not node.attribute("keepdims"):
        after = [n for axis, n in enumerate(shape) if axis + 1 not in axes]
    return _reshaped(node, y.with_channels_first(False), after)


# Resizing of images ---------------------------------------------------------------------------------------------------


@converts("Resize", "Upsample", since=7)
def _resize(node: Node) -> Tensor:
    x, old = node.image(), node.version < 11
    if node.operator == "Resize" and not old:
        node.ignore("roi", "cubic_coeff_a", "extrapolation_value")  # of modes that are refused
        mode, rounding = node.attribute("mode"), node.attribute("nearest_mode")
        coordinates, antialias = node.attribute("coordinate_transformation_mode"), node.attribute("antialias", 0)
        scales, sizes = _resize_scales(node, x)
    else:
        mode, rounding, coordinates, antialias = node.attribute("mode"), "floor", "asymmetric", 0
        scales = node.attribute("scales") if node.version == 7 else node.constant(1, "scale").tolist()
        sizes = [math.floor(n * s) for n, s in zip((1, *x.file_shape), scales, strict=True)]
    times = [sizes[a + 2] // x.shape[a] for a in (0, 1)]
    fits = all(times[a] >= 1 and times[a] * x.shape[a] == sizes[a + 2] for a in (0, 1)) and scales[:2] == [1, 1]
    known = mode in ("nearest", "linear") and not antialias
    for a in (0, 1) if fits and known else ():
        centers = [_source_pixel(coordinates, i, x.shape[a], sizes[a + 2], scales[a + 2]) for i in range(sizes[a + 2])]
        known &= None not in centers
        if times[a] > 1 and known:
            known = _repeats(centers, times[a], rounding) if mode == "nearest" else _blends(centers, times[a])
    if not fits or not known:
        raise node.error(
            f"by {scales} to {sizes} in mode {mode!r}, {coordinates!r}, {rounding!r} is not supported by Upsample2D"
        )
    return x.add(layers.Upsample2D(tuple(times), "nearest" if mode == "nearest" else "bilinear"))


def _resize_scales(node: Node, x: Tensor) -> tuple[list[float], list[int]]:
    """The scales of the four axes, and the sizes of the result, with 1 for the batch."""
    axes = [_axis(node, axis, 4) for axis in node.attribute("axes", range(4))]
    before, scales = [1, *x.file_shape], [1.0] * 4
    given = node.optional(2, "scale")
    if given is not None and given.size:
        factors = given.tolist()
        if len(factors) != len(axes):
            raise node.error(f"has {len(factors)} scales for {len(axes)} axes")
        scales = [dict(zip(axes, factors, strict=True)).get(axis, 1.0) for axis in range(4)]
        node.ignore("keep_aspect_ratio_policy")
        return scales, [math.floor(n * s) for n, s in zip(before, scales, strict=True)]
    target = dict(zip(axes, node.sizes(3, "size"), strict=True))
    if 0 in target and target[0] not in (BATCH, node.batch_size):
        raise node.error(f"to {list(target.values())} changes the batch axis")
    sizes = [1, *(int(target.get(axis, before[axis])) for axis in (1, 2, 3))]
    return [size / n for size, n in zip(sizes, before, strict=True)], sizes


def _source_pixel(mode: str, i: int, before: int, after: int, scale: float) -> float | None:
    """Where pixel i of the result lies among those of the image, in a mode of ONNX; None in an unknown mode."""
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and after > 1):
        return (i + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return 0.0
    if mode == "half_pixel_symmetric":
        return before / 2 * (1 - after / (before * scale)) + (i + 0.5) / scale - 0.5
    if mode == "align_corners":
        return i * (before - 1) / (after - 1) if after > 1 else 0.0
    return i / scale if mode == "asymmetric" else None


def _repeats(centers: Sequence[Any], times: int, rounding: str) -> bool:
    """Whether the nearest pixels are those of Upsample2D: each one so many times."""
    nearest: dict[str, Callable[[float], int]] = {
        "round_prefer_floor": lambda c: math.ceil(c - 0.5), "round_prefer_ceil": lambda c: math.floor(c + 0.5),
        "floor": math.floor, "ceil": math.ceil,
    }  # fmt: skip
    last = len(centers) // times - 1
    return rounding in nearest and all(
        min(max(nearest[rounding](c), 0), last) == i // times for i, c in enumerate(centers)
    )


def _blends(centers: Sequence[Any], times: int) -> bool:
    """Whether linear interpolation is that of Upsample2D."""
    return all(math.isclose(c, (i + 0.5) / times - 0.5, abs_tol=1e-6) for i, c in enumerate(centers))


# Shapes ---------------------------------------------------------------------------------------------------------------


@converts("Transpose")
def _transpose(node: Node) -> Tensor:
    x = node.tensor()
    axes = len(x.shape)
    perm = node.attribute("perm", list(range(axes, -1, -1)))
    if sorted(perm) != list(range(axes + 1)) or perm[0] != 0:
        raise node.error(f"in the order {perm} moves the batch axis")
    if axes > 1 and perm == transposition(axes, channels_first=not x.channels_first):
        return x.with_channels_first(not x.channels_first)
    return x.in_file_order().add(layers.Permute([axis - 1 for axis in perm[1:]]))


@converts("DepthToSpace", "SpaceToDepth")
def _depth_to_space(node: Node) -> Tensor:
    x, block = node.tensor().in_file_order(), node.attribute("blocksize")
    if len(x.shape) != 3:
        raise node.error(f"is supported for images (N, C, H, W), not for samples of shape {x.shape}")
    channels, height, width = x.shape
    channels_first = node.attribute("mode", "DCR") == "CRD"
    if node.operator == "DepthToSpace":
        inner = channels // block**2
        apart = (inner, block, block, height, width) if channels_first else (block, block, inner, height, width)
        order = (0, 3, 1, 4, 2) if channels_first else (2, 3, 0, 4, 1)
        shape = (inner, height * block, width * block)
    else:
        apart = (channels, height // block, block, width // block, block)
        order = (0, 2, 4, 1, 3) if channels_first else (2, 4, 0, 1, 3)
        shape = (channels * block**2, height // block, width // block)
    return x.add(layers.Reshape(apart)).add(layers.Permute(order)).add(layers.Reshape(shape)).with_features_last()


@converts("Flatten")
def _flatten(node: Node) -> Tensor:
    x = node.tensor()
    axis, shape = node.attribute("axis"), x.file_shape
    axis += len(shape) + 1 if axis < 0 else 0
    if axis == 0 or math.prod(shape[: axis - 1]) != 1:
        raise node.error(f"with axis {axis} flattens the batch axis")
    return _reshaped(node, x, [math.prod(shape[axis - 1 :])])


@converts("Reshape", since=5)
def _reshape(node: Node) -> Tensor:
    x, target = node.tensor(), node.sizes(1, "shape")
    shape: list[Any] = [BATCH, *x.file_shape]
    if 0 in target and node.attribute("allowzero", 0):
        raise node.error(f"to {target} with allowzero is not supported")
    node.ignore("allowzero")
    if any(n == 0 and i >= len(shape) for i, n in enumerate(target)):
        raise node.error(f"to {target} copies a size of an axis that samples of shape {x.file_shape} do not have")
    target = [shape[i] if n == 0 else n for i, n in enumerate(target)]
    batch, sizes = target[:1], target[1:]
    if not sizes or BATCH in sizes or target.count(-1) > 1 or any(n < -1 for n in sizes):
        raise node.error(f"to {target} changes the batch axis")
    features = math.prod(x.shape)
    # The batch axis is kept if it is symbolic, copied, or the fixed size of the batch; or if it is inferred, and all
    # features are on the other axes.
    if batch[0] is BATCH or batch[0] == node.batch_size:
        known = math.prod(n for n in sizes if n != -1)
        sizes = [features // known if n == -1 else n for n in sizes]
        kept = math.prod(sizes) == features
    else:
        kept = batch[0] == -1 and math.prod(sizes) == features
    if not kept:
        raise node.error(f"of samples of shape {x.file_shape} to {target} changes the batch axis")
    return _reshaped(node, x, sizes)


@converts("Squeeze")
def _squeeze(node: Node) -> Tensor:
    x, given = node.tensor(), node.list_of("axes", 1)
    shape = x.file_shape
    if given is None:
        if node.batch_size in (None, 1):
            raise node.error("without axes would remove the batch axis of a single sample")
        given = [axis for axis, n in enumerate((0, *shape)) if n == 1]
    axes = _axes(node, given, len(shape) + 1)
    if 0 in axes:
        raise node.error("over axis 0 is not supported: it is the batch")
    if any(shape[axis - 1] != 1 for axis in axes):
        raise node.error(f"removes the axes {axes} of samples of shape {shape}, which are not all 1")
    return _reshaped(node, x, [n for axis, n in enumerate(shape) if axis + 1 not in axes])


@converts("Unsqueeze")
def _unsqueeze(node: Node) -> Tensor:
    x, given = node.tensor(), node.list_of("axes", 1) or []
    axes = _axes(node, given, len(x.shape) + 1 + len(given))
    if 0 in axes:
        raise node.error("over axis 0 is not supported: it is the batch")
    sizes = list(x.file_shape)
    for axis in axes:
        sizes.insert(axis - 1, 1)
    return _reshaped(node, x, sizes)


@converts("Expand")
def _expand(node: Node) -> Tensor:
    x, target = node.tensor(), node.sizes(1, "shape")
    shape: list[Any] = [BATCH, *x.file_shape]
    aligned = shape[len(shape) - len(target) :] if len(target) <= len(shape) else []
    if not aligned or any(n != 1 and n is not m and n != m for n, m in zip(target, aligned, strict=True)):
        raise node.error(f"of samples of shape {x.file_shape} to {target} is not supported")
    return x


@converts("Concat")
def _concat(node: Node) -> Tensor:
    if len(node.values) > 1:
        for i in range(len(node.values)):
            node.value(i)
        raise node.error(_NOT_RESIDUAL)
    node.ignore("axis")
    return node.tensor()


@converts("Shape")
def _shape(node: Node) -> Value:
    x = node.value(0)
    if isinstance(x, Tensor):
        shape: list[Any] = [BATCH, *x.file_shape]
    elif x is not None:
        shape = list(x.numbers.shape if isinstance(x, ShapeVector) else x.shape)
    shape = shape[slice(node.attribute("start", 0), node.attribute("end"))]
    numbers = numpy.array([0 if n is BATCH else n for n in shape], numpy.int64)
    batch = numpy.array([n is BATCH for n in shape], numpy.int64)
    return ShapeVector(numbers, batch) if batch.any() else numbers


def _reshaped(node: Node, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """x with samples of another shape, in the order of the file."""
    if not sizes:
        raise node.error("leaves samples without an axis, which is not supported")
    return x.in_file_order().add(layers.Reshape(sizes) if len(sizes) > 1 else layers.Flatten())


def _of_floats(node: Node, x: Tensor) -> Tensor:
    if x.dtype.name not in ("float32", "float64"):
        raise node.error(f"of {x.dtype} is not supported, only of float32 and float64")
    return x
