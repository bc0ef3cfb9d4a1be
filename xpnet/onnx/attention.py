"""Attention in ONNX, where it is several nodes: softmax(scale · q kᵀ + mask) v, both ways."""

import math
from typing import NamedTuple

import numpy

from xpnet import layers
from xpnet.onnx.patterns import Input, source
from xpnet.onnx.reader import Node, Value
from xpnet.onnx.tensors import Call, Constant, Rearranged, Tensor, axes_of, joined, rearranged, reshaped

# Import ---------------------------------------------------------------------------------------------------------------

#: A number added to a score that makes its probability 0, or any below it.
_EXCLUDED = -1e4


class _Scores(NamedTuple):
    """What a softmax is taken of: scale · q kᵀ, without the later keys if `causal`. product: the node of q kᵀ."""

    product: Node
    scale: float
    causal: bool


class _Projection(NamedTuple):
    """How queries, keys or values (heads, T, D) are computed from x (T, features): x @ weight + bias."""

    x: Call
    weight: Constant
    bias: Constant


def attend(node: Node) -> Value:
    """The product of probabilities and v, by a MultiHeadAttention whose output projection is the identity.

    A projection that follows becomes its output projection, see simplifying.py. Raises ArgumentError if the nodes
    compute something else.
    """
    scores = _scores(node)
    if scores is None:
        raise node.error("of two tensors is supported only in attention, softmax(q kᵀ) v")
    given = [scores.product.rearranged(0), scores.product.rearranged(1), node.rearranged(1)]
    node.read_all_inputs()
    q, k, v = (axes_of(x) for x in given)
    k = Rearranged(k.tensor, (*k.axes[:-2], k.axes[-1], k.axes[-2]))
    if not q.sizes[:-2] == k.sizes[:-2] == v.sizes[:-2] or not any(size.of_batch for size in q.sizes[:-2]):
        raise node.error("of queries, keys and values in different orders is not supported")
    query, key, value = (_projection(node, _heads(x)) for x in (q, k, v))
    heads, length, features = _heads(q).shape
    width = heads * features
    if key.x is not value.x or {a.weight.shape[1] for a in (key, value)} != {width} or len(query.weight) != width:
        raise node.error("of keys and values of other tensors or sizes than the layer takes is not supported")
    factor = numpy.float64(scores.scale * math.sqrt(features))
    if not math.isclose(factor, 1, rel_tol=1e-6):
        query = query._replace(weight=(query.weight * factor).astype(query.weight.dtype),
                               bias=(query.bias * factor).astype(query.bias.dtype))  # fmt: skip
    parts = {"query": query, "key": key, "value": value}
    weights = {f"{name}_weight": part.weight for name, part in parts.items()}
    weights["output_weight"] = numpy.eye(width, dtype=query.weight.dtype)
    if use_bias := any(part.bias.any() for part in parts.values()):
        weights |= {f"{name}_bias": part.bias for name, part in parts.items()}
        weights["output_bias"] = numpy.zeros_like(query.bias)
    layer = layers.MultiHeadAttention(heads, causal=scores.causal, use_bias=use_bias)
    x = Tensor(query.x, q.dtype)
    y = x.add(layer, **weights) if query.x is key.x else joined(layer, [x, Tensor(key.x, q.dtype)], **weights)
    return _in_axes_of(q, y, length)


def _in_axes_of(q: Rearranged, y: Tensor, length: int) -> Value:
    """y, samples (T, heads · D), with the axes that the queries have in the file."""
    shape = q.tensor.shape
    before = [axis for group in q.axes[:-2] for axis in group if axis]
    apart = reshaped(y, (length, *(shape[axis - 1] for axis in before), -1))
    place = {0: 0} | {axis: 2 + i for i, axis in enumerate(before)}
    groups = [tuple(place[axis] for axis in group) for group in q.axes[:-2]]
    return rearranged(apart, [*groups, (1,), (2 + len(before),)])


def _heads(x: Rearranged) -> Tensor:
    """Samples (heads, T, D) of queries, keys or values, whose heads are before T and D in the file, as the batch is."""
    heads = [axis for group in x.axes[:-2] for axis in group if axis]
    whole = rearranged(x.tensor, [(0,), heads, *x.axes[-2:]])
    assert isinstance(whole, Tensor)
    return whole


def _projection(node: Node, heads: Tensor) -> _Projection:
    """The projection that computes these heads (heads, T, D), found by following the elements of its output.

    It is the identity if the heads are not the output of a Dense layer, in another order.
    """
    chain, call, factor = list[Call](), heads.call, 1.0
    while isinstance(call.layer, layers.Reshape | layers.Permute | layers.Slice) or _is_factor(call):
        chain.append(call)
        (call,) = call.inputs
    if len(call.shape) != 2:
        raise node.error(f"of heads that are computed from samples of shape {call.shape} is not supported")
    length, units = call.shape
    elements = numpy.arange(length * units).reshape(length, units)
    for after in reversed(chain):
        match after.layer:
            case layers.Permute(axes=axes):
                elements = elements.transpose(axes)
            case layers.Slice(start=start, stop=stop, axis=axis):
                elements = elements[(*[slice(None)] * (axis % elements.ndim), slice(start, stop))]
            case layers.Rescale(scale=scale):
                factor *= scale
            case _:
                elements = elements.reshape(after.shape)
    columns = elements[:, 0]  # (heads, D)
    if (elements != columns[:, None] + numpy.arange(elements.shape[1])[:, None] * units).any():
        raise node.error("of heads that mix the steps of a sequence is not supported")
    weight, bias, x = numpy.eye(units, dtype=heads.dtype), numpy.zeros(units, heads.dtype), call
    if isinstance(call.layer, layers.Dense):
        (x,), weight, bias = call.inputs, call.weights["weight"], call.weights.get("bias", bias)
    if elements.shape[1] != length or len(x.shape) != 2:
        raise node.error("of heads of a part of a sequence is not supported")
    number = heads.dtype.type(factor)
    return _Projection(x, weight[:, columns.reshape(-1)] * number, bias[columns.reshape(-1)] * number)


def _is_factor(call: Call) -> bool:
    return isinstance(call.layer, layers.Rescale) and call.layer.offset == 0


def _scores(node: Node) -> _Scores | None:
    """What a softmax that is the first input of a node is taken of, if that is attention."""
    value = Input(node, 0)
    while (passed := source(value, "Dropout") or source(value, "Identity")) is not None:
        value = Input(passed, 0)
    softmax = source(value, "Softmax")
    if softmax is None or softmax.version < 13 or softmax.attribute("axis") != -1:
        return None
    value, scale, causal = Input(softmax, 0), 1.0, False
    while (before := value.source) is not None:
        if before.operator == "MatMul":
            return _Scores(before, scale, causal)
        number = before.scalar(1)
        if before.operator in ("Mul", "Div") and number:
            value, scale = Input(before, 0), scale * (number if before.operator == "Mul" else 1 / number)
        elif before.operator in ("Add", "Where") and (excluded := _mask(before)) is not None:
            position, mask = excluded
            if mask.any():
                rows, columns = mask.shape[-2:]
                if causal or (mask != numpy.triu(numpy.ones((rows, columns), bool), 1 + columns - rows)).any():
                    return None
                if columns < rows or scale <= 0:
                    return None
                causal = True
            value = Input(before, position)
        else:
            return None
    return None


def _mask(node: Node) -> tuple[int, Constant] | None:
    """(the input that is the scores, which scores the other inputs exclude) of an Add or a Where, if it is a mask."""
    if node.operator == "Where":
        condition, *_ = node.values
        number_if, number_else = node.scalar(1), node.scalar(2)
        if not isinstance(condition, numpy.ndarray):
            return None
        if number_if is not None and number_if <= _EXCLUDED and number_else is None:
            return 2, condition
        if number_else is not None and number_else <= _EXCLUDED and number_if is None:
            return 1, ~condition
        return None
    for i, added in enumerate(node.values):
        if isinstance(added, numpy.ndarray):
            excluded = added <= _EXCLUDED
            return (1 - i, excluded) if (excluded | (added == 0)).all() else None
    return None
