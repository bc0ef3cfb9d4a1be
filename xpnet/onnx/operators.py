"""Convert ONNX operators to layers: for each operator, a function from a node to its first output.

Operators on images are in images.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from xpnet import layers
from xpnet.layers.base import Layer
from xpnet.onnx import patterns, schemas
from xpnet.onnx.reader import Node, UnsupportedError, Value, converts
from xpnet.onnx.tensors import (
    BATCH,
    Constant,
    ShapeVector,
    Tensor,
    copy_of,
    joined,
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
    "HardSwish": lambda node: layers.HardSwish(),
    "Mish": lambda node: layers.Mish(),
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


@converts("HardSigmoid")
def _hard_sigmoid(node: Node) -> Tensor:
    slope, offset = node.attribute("alpha"), node.attribute("beta")
    if math.isclose(slope, 1 / 6, rel_tol=1e-6) and offset == 0.5:
        return node.tensor().add(layers.HardSigmoid())
    return node.tensor().add(layers.Rescale(slope, offset)).add(layers.HardTanh(0.0, 1.0))


@converts("Selu")
def _selu(node: Node) -> Tensor:
    return node.tensor().add(layers.ELU(node.attribute("alpha"))).add(layers.Rescale(node.attribute("gamma")))


@converts("Celu")
def _celu(node: Node) -> Tensor:
    """alpha · ELU(x / alpha)."""
    if (alpha := node.attribute("alpha")) <= 0:
        raise node.error(f"with alpha={alpha} is not supported, only above 0")
    return node.tensor().add(layers.Rescale(1 / alpha)).add(layers.ELU()).add(layers.Rescale(alpha))


@converts("Clip")
def _clip(node: Node) -> Tensor:
    if node.version < 11:
        low, high = node.attribute("min"), node.attribute("max")
    else:
        low, high = (None if (a := node.optional(i, "limit")) is None else float(a.reshape(())) for i in (1, 2))
    return _clipped(node, node.tensor(), -math.inf if low is None else low, math.inf if high is None else high)


@converts("Max", "Min", since=8)
def _maximum(node: Node) -> Tensor:
    """The maximum or minimum of tensors and numbers: min(a, b) = -max(-a, -b)."""
    values = [node.value(i) for i in range(len(node.values))]
    tensors = [value for value in values if isinstance(value, Tensor)]
    is_minimum = node.operator == "Min"
    x = tensors[0]
    if len(tensors) > 1:
        negative = [tensor.add(layers.Rescale(-1.0)) for tensor in tensors] if is_minimum else tensors
        x = _joined(node, layers.Maximum(), negative)
        x = x.add(layers.Rescale(-1.0)) if is_minimum else x
    limits = [_number(node, x, i, "limit") for i, value in enumerate(values) if not isinstance(value, Tensor)]
    if is_minimum:
        return _clipped(node, x, -math.inf, min(limits, default=math.inf))
    return _clipped(node, x, max(limits, default=-math.inf), math.inf)


def _clipped(node: Node, x: Tensor, low: float, high: float) -> Tensor:
    """min(max(x, low), high)."""
    largest = float(numpy.finfo(_of_floats(node, x).dtype).max)
    low, high = (-math.inf if low <= -largest else low), (math.inf if high >= largest else high)
    if low >= high:
        raise node.error(f"with the limits {low} and {high} is not supported: the first must be below the second")
    if (low, high) == (-math.inf, math.inf):
        return x
    named: dict[tuple[float, float], type[Layer]] = {(0.0, math.inf): layers.ReLU, (0.0, 6.0): layers.ReLU6}
    return x.add(named[low, high]() if (low, high) in named else layers.HardTanh(low, high))


@converts("PRelu", since=7)
def _prelu(node: Node) -> Tensor:
    x, slope = node.tensor(), node.constant(1, "slope")
    if slope.size == 1 and slope.ndim <= len(x.shape) + 1:
        return x.add(layers.PReLU(shared=True), weight=slope.reshape(1))
    slope = _like_samples(node, x, slope)
    if slope.size == slope.shape[-1] == x.shape[-1]:
        return x.add(layers.PReLU(), weight=slope.reshape(-1))
    slopes = numpy.broadcast_to(slope, x.shape).reshape(-1)
    flat = x.add(layers.Flatten(), channels_first=False)
    return flat.add(layers.PReLU(), weight=slopes).add(layers.Reshape(x.shape), channels_first=x.channels_first)


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
def _cast(node: Node) -> Value:
    if node.operator == "Cast":
        dtype = schemas.float_or_integer(node.attribute("to"))
    else:
        dtype = None if (like := node.value(1)) is None else like.dtype
    if dtype is None:
        raise node.error("to this type is not supported")
    node.ignore("saturate", "round_mode")  # both apply only to 8-bit floats
    if isinstance(x := node.value(0), numpy.ndarray):
        return x.astype(dtype)
    return node.tensor().with_cast(dtype)


@converts("GreaterOrEqual")
def _step(node: Node) -> Tensor:
    x = node.tensor()
    return x.add(layers.Step(_number(node, x, 1, "threshold"))).as_comparison()


def _number(node: Node, x: Tensor, index: int, name: str) -> float:
    """An input that must be a single constant, which adds no axis to x."""
    number = node.constant(index, name)
    if number.size != 1 or number.ndim > len(x.shape) + 1:
        raise node.error(f"with a {name} of shape {number.shape} is not supported, only with one number")
    return float(number.reshape(()))


# Arithmetic -----------------------------------------------------------------------------------------------------------


@converts("Add", "Sub", "Mul", "Div", since=7)
def _arithmetic(node: Node) -> Tensor:
    if fused := _fused(node):
        return fused
    a, b = node.value(0), node.value(1)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if node.operator == "Div":
            raise node.error("by a tensor that is not constant is not supported")
        merge = {"Add": layers.Add, "Sub": layers.Subtract, "Mul": layers.Multiply}[node.operator]
        return _joined(node, merge(), [a, b])
    if isinstance(a, Tensor):
        return _with_constant(node, a, node.constant(1, "operand"), may_merge=node.is_only_reader(0))
    may_merge = node.is_only_reader(1)
    return _with_constant(node, node.tensor(1), node.constant(0, "operand"), may_merge, constant_first=True)


@converts("Sum", since=8)
def _sum(node: Node) -> Tensor:
    values = [node.value(i) for i in range(len(node.values))]
    tensors = [value for value in values if isinstance(value, Tensor)]
    total = _joined(node, layers.Add(), tensors) if len(tensors) > 1 else tensors[0]
    for i, value in enumerate(values):
        if not isinstance(value, Tensor):
            total = _with_constant(node, total, node.constant(i, "operand"), may_merge=False)
    return total


@converts("Mean", since=8)
def _mean(node: Node) -> Tensor:
    tensors = [node.tensor(i) for i in range(len(node.values))]
    return _joined(node, layers.Average(), tensors) if len(tensors) > 1 else tensors[0]


_EXPONENTS = (1, 2, 3, 4)


@converts("Pow", since=7)
def _power(node: Node) -> Tensor:
    x = node.tensor()
    exponent = _number(node, x, 1, "exponent")
    if exponent not in _EXPONENTS:
        raise node.error(f"with the exponent {exponent} is not supported, only with {_EXPONENTS}")
    return x if exponent == 1 else _joined(node, layers.Multiply(), [x] * int(exponent))


@converts("Abs")
def _absolute(node: Node) -> Tensor:
    """max(x, -x)."""
    x = node.tensor()
    return _joined(node, layers.Maximum(), [x, x.add(layers.Rescale(-1.0))])


def _joined(node: Node, layer: Layer, tensors: Sequence[Tensor]) -> Tensor:
    """A layer of several inputs, in one order of axes. An axis of size 1 is broadcast, as in NumPy."""
    if len({len(_of_floats(node, x).shape) for x in tensors}) > 1:
        shapes = ", ".join(str(x.file_shape) for x in tensors)
        raise node.error(f"of samples of shapes {shapes} is not supported, only with the same number of axes")
    if any(x.channels_first for x in tensors):
        tensors = [x.with_features_last() for x in tensors]
    return joined(layer, tensors)


@converts("Log", "Where")
def _only_fused(node: Node) -> Tensor:
    if fused := _fused(node):
        return fused
    raise _refusal(node, "is not supported")


_PATTERNS = {"Mul": patterns.product, "Div": patterns.quotient, "Log": patterns.logarithm, "Where": patterns.selection}


def _fused(node: Node) -> Tensor | None:
    """The output of a pattern of nodes that ends in this one."""
    pattern = _PATTERNS.get(node.operator)
    fused = pattern(node) if pattern else None
    if fused:
        node.read_all_inputs()
    return fused


def _refusal(node: Node, reason: str) -> UnsupportedError:
    """The error of the first input that is not supported, or else an error with this reason."""
    return next((value for value in node.values if isinstance(value, UnsupportedError)), node.error(reason))


def _with_constant(node: Node, x: Tensor, c: Constant, may_merge: bool, constant_first: bool = False) -> Tensor:
    """scale · x + offset, with a constant as the scale or offset.

    may_merge: whether the constant may become a weight of the layer that computes x.
    """
    c = _like_samples(node, _of_floats(node, x), c)
    if node.operator == "Div" and constant_first:
        raise node.error("of a constant by a tensor is not supported")
    with numpy.errstate(all="ignore"):
        number = 1 / c if node.operator == "Div" else -c if node.operator == "Sub" and not constant_first else c
    if not numpy.isfinite(number).all():
        raise node.error("with a constant operand that is 0 as a divisor, infinite or NaN is not supported")
    is_offset = node.operator in ("Add", "Sub", "Sum")
    sign = -1.0 if node.operator == "Sub" and constant_first else 1.0
    if may_merge and sign == 1 and (merged := _merged(x, number, is_offset)):
        return merged
    if number.size == 1:
        value = float(number.reshape(()))
        return x.add(layers.Rescale(sign, value) if is_offset else layers.Rescale(value))
    return _per_feature(x, number, is_offset, sign)


def _like_samples(node: Node, x: Tensor, c: Constant) -> Constant:
    """A constant that is broadcast to x, with the axes of a sample in xpnet."""
    axes = len(x.shape) + 1
    if c.ndim > axes or (c.ndim == axes and c.shape[0] != 1):
        raise node.error(f"has an operand of shape {c.shape}, which changes the batch axis of samples {x.file_shape}")
    c = c[0] if c.ndim == axes else c.reshape((1,) * (axes - 1 - c.ndim) + c.shape)
    if numpy.broadcast_shapes(c.shape, x.file_shape) != x.file_shape:
        raise node.error(f"broadcasts samples of shape {x.file_shape} to those of an operand of shape {c.shape}")
    return c.transpose(*range(1, c.ndim), 0) if x.channels_first else c


def _merged(x: Tensor, number: Constant, is_offset: bool) -> Tensor | None:
    """x with the constant as the bias, beta or gamma of its last layer, if that layer lacks it."""
    call = x.call
    if call.layer is None or not x.shape or number.shape[-1] != x.shape[-1] or number.size != x.shape[-1]:
        return None
    layer, vector, config = call.layer, number.reshape(-1), call.layer.get_config()
    weighted = layers.Dense, layers.Conv2D, layers.DepthwiseConv2D, layers.Conv2DTranspose
    if is_offset and isinstance(layer, weighted) and not layer.use_bias:
        return x.replace_last(type(layer).from_config(config | {"use_bias": True}), **call.weights, bias=vector)
    if isinstance(layer, layers.LayerNorm | layers.GroupNorm) and not layer.center and (is_offset or not layer.scale):
        name, option = ("beta", "center") if is_offset else ("gamma", "scale")
        return x.replace_last(type(layer).from_config(config | {option: True}), **call.weights, **{name: vector})
    return None


def _per_feature(x: Tensor, number: Constant, is_offset: bool, sign: float) -> Tensor:
    """scale · x + offset for each feature, by a depthwise convolution of 1 × 1 pixel."""
    by_channel = number.size == number.shape[-1] == x.shape[-1]
    channels = x.shape[-1] if by_channel else math.prod(x.shape)
    vector = (number if by_channel else numpy.broadcast_to(number, x.shape)).reshape(-1)
    weight = numpy.full(channels, sign, x.dtype) if is_offset else vector
    image = x if by_channel and len(x.shape) == 3 else x.add(layers.Reshape((1, -1, channels)))
    layer = layers.DepthwiseConv2D(1, use_bias=is_offset)
    y = image.add(layer, weight=weight.reshape(1, 1, 1, -1), bias=vector if is_offset else None)
    return y if image is x else y.add(layers.Reshape(x.shape), channels_first=x.channels_first)


# Over axes: softmax, normalization and reductions ---------------------------------------------------------------------


@converts("Softmax", "LogSoftmax")
def _softmax(node: Node) -> Tensor:
    x, layer = node.tensor(), getattr(layers, node.operator)()
    (axis,) = _axes(node, [node.attribute("axis")], len(x.shape) + 1)
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


def _axes(node: Node, given: Sequence[int], axes: int) -> list[int]:
    """Axes counted from 0, sorted. The batch must not be among them."""
    found = sorted(node.axis(axis, axes) for axis in given)
    if 0 in found:
        raise node.error("over axis 0 is not supported: it is the batch")
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
    (axis,) = _axes(node, [node.attribute("axis")], len(x.shape) + 1)
    shape = x.file_shape[axis - 1 :]
    gamma, beta = (
        None if a is None else numpy.broadcast_to(a, shape).reshape(-1)
        for a in (node.constant(1, "scale"), node.optional(2, "bias"))
    )
    layer = layers.LayerNorm(epsilon=node.attribute("epsilon"), center=beta is not None)
    return _over_trailing_axes(x, axis, layer, gamma=gamma, beta=beta)


@converts("InstanceNormalization")
def _instance_norm(node: Node) -> Tensor:
    gamma, beta = node.constant(1, "scale"), node.constant(2, "bias")
    layer = layers.InstanceNorm(epsilon=node.attribute("epsilon"))
    return node.tensor().with_features_last().add(layer, gamma=gamma, beta=beta)


@converts("GroupNormalization", since=21)  # before, scale and bias are those of the groups
def _group_norm(node: Node) -> Tensor:
    gamma, beta = node.constant(1, "scale"), node.constant(2, "bias")
    layer = layers.GroupNorm(node.attribute("num_groups"), epsilon=node.attribute("epsilon"))
    return node.tensor().with_features_last().add(layer, gamma=gamma, beta=beta)


@converts("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum")
def _reduce(node: Node) -> Tensor:
    x, given = node.tensor(), node.list_of("axes", 1)
    if not given and node.attribute("noop_with_empty_axes"):
        return x
    axes = _axes(node, given or range(len(x.shape) + 1), len(x.shape) + 1)
    x, shape = _of_floats(node, x), x.file_shape
    after = [1 if axis + 1 in axes else n for axis, n in enumerate(shape)]
    if not node.attribute("keepdims"):
        after = [n for axis, n in enumerate(shape) if axis + 1 not in axes]
    if node.operator == "ReduceSum" and axes == [len(shape)] and (dot := patterns.dot(x)):
        return _reshaped(node, dot, after)
    # Over the height and width of images as they are; over others, as those of an image (reduced, 1, kept).
    image = x.with_features_last()
    if len(shape) != 3 or axes != [2, 3]:
        reduced = [axis - 1 for axis in axes]
        kept = [axis for axis in range(len(shape)) if axis not in reduced]
        image = x.in_file_order().add(layers.Permute((*reduced, *kept)))
        image = image.add(layers.Reshape((math.prod(shape[i] for i in reduced), 1, math.prod(shape[i] for i in kept))))
    if node.operator == "ReduceMax":
        y = image.add(layers.GlobalMaxPool2D(), channels_first=False)
    elif node.operator == "ReduceMin":
        y = (
            image.add(layers.Rescale(-1.0))
            .add(layers.GlobalMaxPool2D(), channels_first=False)
            .add(layers.Rescale(-1.0))
        )
    else:
        y = image.add(layers.GlobalAveragePool2D(), channels_first=False)
        if node.operator == "ReduceSum":
            y = y.add(layers.Rescale(math.prod(image.shape[:2])))
    return _reshaped(node, y.with_channels_first(False), after)


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
        bias = _times(numpy.broadcast_to(rows[0], units), beta)
    layer = layers.Dense(units, use_bias=bias is not None)
    return x.add(layer, weight=_times(weight, alpha), bias=bias)


def _times(weight: Constant, factor: float) -> Constant:
    """Not copied by a factor of 1, so that nodes with the same weight share a layer."""
    return weight if factor == 1 else weight * weight.dtype.type(factor)


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
    return patterns.group_norm(node, sizes) or _reshaped(node, x, sizes)


@converts("Squeeze")
def _squeeze(node: Node) -> Tensor:
    x, given = node.tensor(), node.list_of("axes", 1)
    shape = x.file_shape
    if given is None:
        if node.batch_size in (None, 1):
            raise node.error("without axes would remove the batch axis of a single sample")
        given = [axis for axis, n in enumerate((0, *shape)) if n == 1]
    axes = _axes(node, given, len(shape) + 1)
    if any(shape[axis - 1] != 1 for axis in axes):
        raise node.error(f"removes the axes {axes} of samples of shape {shape}, which are not all 1")
    return _reshaped(node, x, [n for axis, n in enumerate(shape) if axis + 1 not in axes])


@converts("Unsqueeze")
def _unsqueeze(node: Node) -> Tensor:
    x, given = node.tensor(), node.list_of("axes", 1) or []
    axes = _axes(node, given, len(x.shape) + 1 + len(given))
    sizes = list(x.file_shape)
    for axis in axes:
        sizes.insert(axis - 1, 1)
    return _reshaped(node, x, sizes)


@converts("Expand")
def _expand(node: Node) -> Tensor:
    """Copies of images of one row or column; a shape that changes nothing."""
    x, target = node.tensor(), node.sizes(1, "shape")
    shape: list[Any] = [node.batch_size or BATCH, *x.file_shape]
    sizes = [1] * (len(shape) - len(target)) + [node.batch_size or n if n is BATCH else n for n in target]
    times: dict[int, Any] = {axis: n for axis, (n, m) in enumerate(zip(sizes, shape, strict=False)) if n not in (1, m)}
    is_image = len(shape) == 4 and times.keys() <= {2, 3} and all(shape[axis] == 1 for axis in times)
    if len(target) > len(shape) or (times and not is_image):
        raise node.error(f"of samples of shape {x.file_shape} to {target} is not supported")
    return x.with_features_last().add(layers.Upsample2D((times.get(2, 1), times.get(3, 1)))) if times else x


@converts("Concat", since=4)
def _concat(node: Node) -> Tensor:
    tensors = [node.tensor(i) for i in range(len(node.values))]
    first = any(x.channels_first for x in tensors)
    axes = len(tensors[0].shape)
    (axis,) = _axes(node, [node.attribute("axis")], axes + 1)
    if len(tensors) == 1:
        return tensors[0]
    position = axis - 1 if not first else axes - 1 if axis == 1 else axis - 2
    return _joined(node, layers.Concatenate(position), tensors)


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
