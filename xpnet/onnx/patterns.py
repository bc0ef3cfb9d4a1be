"""Patterns of several ONNX nodes that are one layer of xpnet, as exporters write them in older opsets."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy

from xpnet import layers
from xpnet.layers.base import Layer
from xpnet.onnx.reader import Node
from xpnet.onnx.tensors import Constant, Tensor, joined


class Input(NamedTuple):
    """An input of a node."""

    node: Node
    position: int

    @property
    def source(self) -> Node | None:
        """The node that computes it."""
        return self.node.source(self.position)

    @property
    def tensor(self) -> Tensor | None:
        value = self.node.values[self.position]
        return value if isinstance(value, Tensor) else None

    def equals(self, other: "Input") -> bool:
        """Whether both are the same value."""
        same_name = self.node.proto.input[self.position] == other.node.proto.input[other.position]
        return same_name or (self.tensor is not None and self.tensor is other.tensor)


def product(node: Node) -> Tensor | None:
    """SiLU, Mish, HardSwish, GELU or RMSNorm, if this product of x and a function of x completes one, or a multiple."""
    for a, b in ((Input(node, 0), Input(node, 1)), (Input(node, 1), Input(node, 0))):
        if gated := _gated(a.tensor, b.tensor):
            return gated
        if normalized := _by_reciprocal(a, b):
            return normalized
        for double_phi, outer in factors(b):
            for x, approximate in _gelu(double_phi):
                for same, factor in factors(a):
                    if same.equals(x) and (read := _read_by(node, x)):
                        gelu, rest = read.add(layers.GELU(approximate)), 2.0 * outer * factor
                        return gelu if rest == 1 else gelu.add(layers.Rescale(rest))
    return None


def _read_by(last: Node, x: Input) -> Tensor | None:
    """The tensor of an input of an earlier node, for a pattern that ends in the node `last`.

    None if only one of the two nodes reads its inputs with the batch first: the result would have the wrong axes.
    """
    return x.tensor if x.node.is_unwrapped == last.is_unwrapped else None


def _by_reciprocal(x: Input, factor: Input) -> Tensor | None:
    """RMSNorm, if x is multiplied by 1 / √(mean(x²) + epsilon)."""
    if reciprocal := source(factor, "Reciprocal"):
        return _rms_norm(x, Input(reciprocal, 0))
    division = source(factor, "Div")
    return _rms_norm(x, Input(division, 1)) if division and division.scalar(0) == 1 else None


def _gated(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """x · y for y = σ(x), tanh(log(1 + e^x)), or min(max(x + 3, 0), 6), perhaps times a number."""
    if x is None or y is None:
        return None
    match _layers_between(x, y):
        case [layers.Sigmoid()]:
            return x.add(layers.SiLU())
        case [layers.Softplus(), layers.Tanh()]:
            return x.add(layers.Mish())
        case [layers.HardSigmoid()]:
            return x.add(layers.HardSwish())
        case [layers.Rescale(scale=1.0, offset=3.0), layers.ReLU6()]:
            return x.add(layers.HardSwish()).add(layers.Rescale(6.0))
        case [layers.Rescale(scale=1.0, offset=3.0), layers.ReLU6(), layers.Rescale(scale=scale, offset=0.0)]:
            return x.add(layers.HardSwish()).add(layers.Rescale(6.0 * scale))
    return None


def _layers_between(x: Tensor, y: Tensor) -> list[Layer]:
    """The layers that compute y from x, at most 3; an empty list if y is not computed so."""
    found: list[Layer] = []
    call = y.call
    while call is not x.call and call.layer is not None and len(found) < 3 and len(call.inputs) == 1:
        found.insert(0, call.layer)
        (call,) = call.inputs
    return found if call is x.call and x.channels_first == y.channels_first else []


def _gelu(double_phi: Input) -> Iterator[tuple[Input, str]]:
    """(x, approximate) for a value of 1 + erf(x / √2), or of 1 + tanh(√(2/π) (x + 0.044715 x³))."""
    function = _other_term(double_phi, 1.0)
    erf, tanh = source(function, "Erf"), source(function, "Tanh")
    for x, factor in factors(Input(erf, 0)) if erf else ():
        if math.isclose(factor, math.sqrt(0.5), rel_tol=1e-6):
            yield x, "none"
    for inner, factor in factors(Input(tanh, 0)) if tanh else ():
        add = source(inner, "Add")
        if add and math.isclose(factor, math.sqrt(2.0 / math.pi), rel_tol=1e-6):
            for x, cubic in ((Input(add, 0), Input(add, 1)), (Input(add, 1), Input(add, 0))):
                if any(math.isclose(k, 0.044715, rel_tol=1e-6) and _is_cube(cube, x) for cube, k in factors(cubic)):
                    yield x, "tanh"


def _is_cube(value: Input, x: Input) -> bool:
    """Whether value = x³, as a power or as a product."""
    if (power := source(value, "Pow")) is not None:
        return power.scalar(1) == 3 and Input(power, 0).equals(x)
    if (outer := source(value, "Mul")) is None:
        return False
    for i in (0, 1):
        inner = source(Input(outer, 1 - i), "Mul")
        if inner and all(factor.equals(x) for factor in (Input(outer, i), Input(inner, 0), Input(inner, 1))):
            return True
    return False


def logarithm(node: Node) -> Tensor | None:
    """Softplus, log(1 + e^x), or log σ(x) = -log(1 + e^-x), if this logarithm completes one."""
    sigmoid = source(Input(node, 0), "Sigmoid")
    if sigmoid and (x := _read_by(node, Input(sigmoid, 0))):
        return x.add(layers.Rescale(-1.0)).add(layers.Softplus()).add(layers.Rescale(-1.0))
    exp = source(_other_term(Input(node, 0), 1.0), "Exp")
    x = _read_by(node, Input(exp, 0)) if exp else None
    return x.add(layers.Softplus()) if x else None


def selection(node: Node) -> Tensor | None:
    """Softplus, if this Where is x where x > threshold, log(1 + e^x) elsewhere, and both are equal above it."""
    greater, x = source(Input(node, 0), "Greater"), Input(node, 1)
    softplus = Input(node, 2).tensor
    if not (greater and x.tensor and softplus and Input(greater, 0).equals(x)):
        return None
    same_order = softplus.channels_first == x.tensor.channels_first
    threshold, follows = greater.scalar(1), same_order and softplus.call.inputs == (x.tensor.call,)
    # log(1 + e^x) - x < e^-x, which is below half a unit in the last place of x.
    enough = 15.0 if x.tensor.dtype.name == "float32" else 33.5
    if follows and isinstance(softplus.call.layer, layers.Softplus) and threshold is not None and threshold >= enough:
        return softplus
    return None


def quotient(node: Node) -> Tensor | None:
    """LayerNorm or RMSNorm, if this division completes it."""
    return _layer_norm(node) or _rms_norm(Input(node, 0), Input(node, 1))


def _rms_norm(x: Input, root: Input) -> Tensor | None:
    """RMSNorm with a gamma of 1, if x is divided by the root √(mean(x²) + epsilon), the mean over the last axis."""
    sqrt = source(root, "Sqrt")
    mean, epsilon = _term_and_number(Input(sqrt, 0)) if sqrt else (None, 0.0)
    if x.tensor is None or mean is None or epsilon <= 0:
        return None
    axes = len(x.tensor.shape)
    squared = _mean_of(mean, axes, axes)
    if squared is None or not _is_square(squared, x):
        return None
    samples = x.tensor.in_file_order()
    return samples.add(layers.RMSNorm(epsilon=epsilon), gamma=numpy.ones(samples.shape[-1], samples.dtype))


def _layer_norm(node: Node) -> Tensor | None:
    """LayerNorm without gamma and beta, (x - μ) / √(σ² + epsilon), if this division completes it.

    μ and σ² are means over the last axis, or over the channels of images (N, C, H, W).
    """
    centered, root = Input(node, 0), source(Input(node, 1), "Sqrt")
    subtraction = source(centered, "Sub")
    if subtraction is None or root is None:
        return None
    x, variance, epsilon = Input(subtraction, 0), *_term_and_number(Input(root, 0))
    read = _read_by(node, x)
    if read is None or variance is None or epsilon <= 0:
        return None
    layer = layers.LayerNorm(epsilon=epsilon, center=False, scale=False)
    axes = len(read.shape)
    for axis, samples in ((axes, read.in_file_order()), (1, read.with_features_last())):
        mean, squared = (_mean_of(value, axis, axes) for value in (Input(subtraction, 1), variance))
        if mean and mean.equals(x) and squared and _is_square(squared, centered):
            return samples.add(layer)
    return None


def _is_square(value: Input, x: Input) -> bool:
    """Whether value = x², as a power or as a product."""
    node = value.source
    if node is None or not Input(node, 0).equals(x):
        return False
    return (node.operator == "Pow" and node.scalar(1) == 2) or (node.operator == "Mul" and Input(node, 1).equals(x))


def first_rows(node: Node, shape: Sequence[int]) -> Constant | None:
    """The table (positions, features) of which a constant input is the first T rows, for samples (T, features).

    With the whole table, the layer is the same for sequences of other lengths.
    """
    for i in (0, 1):
        part = source(Input(node, i), "Slice") or source(Input(node, i), "Gather")
        rows, table = node.values[i], part.values[0] if part else None
        if not isinstance(table, numpy.ndarray) or not isinstance(rows, numpy.ndarray) or len(shape) != 2:
            continue
        if table.ndim in (2, 3) and table.shape[:-2] in ((), (1,)) and table.shape[-1] == shape[1]:
            table = table.reshape(-1, shape[1])
            if rows.size == math.prod(shape) and numpy.array_equal(rows.reshape(shape), table[: shape[0]]):
                return table
    return None


def dot(product: Tensor) -> Tensor | None:
    """The dot products over the last axis of the two tensors whose product this is."""
    inputs = product.call.inputs
    if not isinstance(product.call.layer, layers.Multiply) or product.channels_first or len(inputs) != 2:
        return None
    a, b = (dataclasses.replace(product, call=call) for call in inputs)
    return joined(layers.Dot(), [a, b]) if a.shape == b.shape else None


def group_norm(node: Node, sizes: Sequence[int]) -> Tensor | None:
    """GroupNorm without gamma and beta, if this Reshape to samples of these sizes completes it.

    Exporters write it as an InstanceNormalization of (N, groups, the numbers of a group), between two Reshapes.
    """
    norm = source(Input(node, 0), "InstanceNormalization")
    before = source(Input(norm, 0), "Reshape") if norm else None
    rows, x = (Input(norm, 0).tensor, Input(before, 0).tensor) if norm and before else (None, None)
    if norm is None or rows is None or x is None or x.file_shape != tuple(sizes):
        return None
    groups, gamma, beta = rows.file_shape[0], norm.constant(1, "scale"), norm.constant(2, "bias")
    if x.file_shape[0] % groups or (gamma != 1).any() or beta.any():
        return None
    layer = layers.GroupNorm(groups, epsilon=norm.attribute("epsilon"), center=False, scale=False)
    return x.with_features_last().add(layer)


def source(value: Input | None, operator: str) -> Node | None:
    """The node that computes a value, if it has this operator."""
    source = value.source if value else None
    return source if source is not None and source.operator == operator else None


def factors(value: Input) -> Iterator[tuple[Input, float]]:
    """(a, b) with value = a · b for numbers b: the value itself, then what it is computed from."""
    factor = 1.0
    while True:
        yield value, factor
        node = value.source
        if node is None or node.operator not in ("Mul", "Div"):
            return
        number = node.scalar(1)
        if number is not None and number != 0:
            value, factor = Input(node, 0), factor * (number if node.operator == "Mul" else 1.0 / number)
        elif node.operator == "Mul" and (number := node.scalar(0)) is not None:
            value, factor = Input(node, 1), factor * number
        else:
            return


def _term_and_number(value: Input) -> tuple[Input | None, float]:
    """(a, b) with value = a + b, for a number b; (None, 0) if it is no such sum."""
    node = source(value, "Add")
    if node is not None:
        for i in (0, 1):
            if (number := node.scalar(i)) is not None:
                return Input(node, 1 - i), number
    return None, 0.0


def _other_term(value: Input, wanted: float) -> Input | None:
    """a of value = a + wanted."""
    term, number = _term_and_number(value)
    return term if number == wanted else None


def _mean_of(value: Input, axis: int, axes: int) -> Input | None:
    """The input of a mean over one axis of samples with this number of axes, if the mean keeps that axis."""
    node = source(value, "ReduceMean")
    if node is not None and node.attribute("keepdims") == 1 and node.list_of("axes", 1) in ([axis], [axis - axes - 1]):
        return Input(node, 0)
    return None
