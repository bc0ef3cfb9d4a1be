"""Convert elementwise ONNX operators to layers: activations, and arithmetic of tensors and constants."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from xpnet import layers
from xpnet.layers.base import Layer
from xpnet.onnx import patterns, schemas
from xpnet.onnx.reader import Node, UnsupportedError, Value, converts
from xpnet.onnx.tensors import Constant, Tensor, copy_of, joined

# Activations and others of one tensor ---------------------------------------------------------------------------------

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
        x = joined_by(node, layers.Maximum(), negative)
        x = x.add(layers.Rescale(-1.0)) if is_minimum else x
    limits = [_number(node, x, i, "limit") for i, value in enumerate(values) if not isinstance(value, Tensor)]
    if is_minimum:
        return _clipped(node, x, -math.inf, min(limits, default=math.inf))
    return _clipped(node, x, max(limits, default=-math.inf), math.inf)


def _clipped(node: Node, x: Tensor, low: float, high: float) -> Tensor:
    """min(max(x, low), high)."""
    largest = float(numpy.finfo(of_floats(node, x).dtype).max)
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
        return joined_by(node, merge(), [a, b])
    if isinstance(a, Tensor):
        return _with_constant(node, a, node.constant(1, "operand"), may_merge=node.is_only_reader(0))
    may_merge = node.is_only_reader(1)
    return _with_constant(node, node.tensor(1), node.constant(0, "operand"), may_merge, constant_first=True)


@converts("Sum", since=8)
def _sum(node: Node) -> Tensor:
    values = [node.value(i) for i in range(len(node.values))]
    tensors = [value for value in values if isinstance(value, Tensor)]
    total = joined_by(node, layers.Add(), tensors) if len(tensors) > 1 else tensors[0]
    for i, value in enumerate(values):
        if not isinstance(value, Tensor):
            total = _with_constant(node, total, node.constant(i, "operand"), may_merge=False)
    return total


@converts("Mean", since=8)
def _mean(node: Node) -> Tensor:
    tensors = [node.tensor(i) for i in range(len(node.values))]
    return joined_by(node, layers.Average(), tensors) if len(tensors) > 1 else tensors[0]


_EXPONENTS = (1, 2, 3, 4)


@converts("Pow", since=7)
def _power(node: Node) -> Tensor:
    x = node.tensor()
    exponent = _number(node, x, 1, "exponent")
    if exponent not in _EXPONENTS:
        raise node.error(f"with the exponent {exponent} is not supported, only with {_EXPONENTS}")
    return x if exponent == 1 else joined_by(node, layers.Multiply(), [x] * int(exponent))


@converts("Abs")
def _absolute(node: Node) -> Tensor:
    """max(x, -x)."""
    x = node.tensor()
    return joined_by(node, layers.Maximum(), [x, x.add(layers.Rescale(-1.0))])


def joined_by(node: Node, layer: Layer, tensors: Sequence[Tensor]) -> Tensor:
    """A layer of several inputs, in one order of axes. An axis of size 1 is broadcast, as in NumPy."""
    if len({len(of_floats(node, x).shape) for x in tensors}) > 1:
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
    c = _like_samples(node, of_floats(node, x), c)
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
    if is_offset and sign == 1 and not x.channels_first and (table := patterns.first_rows(node, x.shape)) is not None:
        return x.add(layers.PositionalEmbedding(len(table)), weight=table)
    is_rows = number.ndim == 2 and number.shape == x.shape and len(number) > 1 and not x.channels_first
    if is_offset and is_rows and sign == 1 and (may_merge or not isinstance(x.call.layer, layers.PositionalEmbedding)):
        return plus_rows(x, number)
    if number.size == 1:
        value = float(number.reshape(()))
        return x.add(layers.Rescale(sign, value) if is_offset else layers.Rescale(value))
    return _per_feature(x, number, is_offset, sign)


def plus_rows(x: Tensor, rows: Constant) -> Tensor:
    """x + rows, for samples and a constant (T, features)."""
    if isinstance(x.call.layer, layers.PositionalEmbedding):  # x has the same rows for all samples already
        return x.replace_last(copy_of(x.call.layer), weight=x.call.weights["weight"] + rows)
    return x.add(layers.PositionalEmbedding(len(rows)), weight=rows)


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
    if isinstance(layer, layers.RMSNorm) and not is_offset and (call.weights["gamma"] == 1).all():
        return x.replace_last(copy_of(layer), gamma=vector)
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


def of_floats(node: Node, x: Tensor) -> Tensor:
    if x.dtype.name not in ("float32", "float64"):
        raise node.error(f"of {x.dtype} is not supported, only of float32 and float64")
    return x
