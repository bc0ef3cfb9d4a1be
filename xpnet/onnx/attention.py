"""Import and export attention, which is several nodes in ONNX: softmax(scale · q kᵀ + mask) v."""

import math
from typing import Any, NamedTuple

import numpy
from onnx import numpy_helper

from xpnet import layers
from xpnet.errors import ArgumentError
from xpnet.onnx.patterns import Input, source
from xpnet.onnx.reader import Node, Value
from xpnet.onnx.tensors import Call, Constant, Rearranged, Tensor, axes_of, joined, rearranged, reshaped
from xpnet.onnx.writer import FileTensor, GraphWriter, exports

# Import ---------------------------------------------------------------------------------------------------------------

#: This number, or any below it, makes a probability 0 if it is added to the score.
_EXCLUDED = -1e4


class _Scores(NamedTuple):
    """The input of a softmax over an axis: scale · q kᵀ, without later keys if `causal`."""

    product: Node
    scale: float
    causal: bool
    axis: int


class _Projection(NamedTuple):
    """How queries, keys or values (heads, T, D) are computed from x (T, features): x @ weight + bias."""

    x: Call
    weight: Constant
    bias: Constant | None


def attend(node: Node) -> Value:
    """The product of probabilities and v, by a MultiHeadAttention whose output projection is the identity.

    A projection that follows becomes its output projection, see simplifying.py. Raises ArgumentError if the nodes
    compute something else.
    """
    scores = _scores(node)
    if scores is None:
        raise node.error("has a weight that is not constant, which is supported only in attention, softmax(q kᵀ) v")
    given = [scores.product.rearranged(0), scores.product.rearranged(1), node.rearranged(1)]
    node.read_all_inputs()
    q, k, v = (axes_of(x) for x in given)
    if scores.axis not in (-1, len(q.axes) - 1):
        raise node.error(f"of a softmax over axis {scores.axis} is not supported, only over the keys")
    k = Rearranged(k.tensor, (*k.axes[:-2], k.axes[-1], k.axes[-2]))
    if not q.sizes[:-2] == k.sizes[:-2] == v.sizes[:-2] or not any(size.of_batch for size in q.sizes[:-2]):
        raise node.error("of queries, keys and values in different orders is not supported")
    heads, length, features = _heads(q).shape
    factor, width = scores.scale * math.sqrt(features), heads * features
    query, key, value = (_projection(node, _heads(x), number) for x, number in ((q, factor), (k, 1.0), (v, 1.0)))
    if key.x is not value.x or {a.weight.shape[1] for a in (key, value)} != {width} or len(query.weight) != width:
        raise node.error("of keys and values of other tensors or sizes than the layer takes is not supported")
    parts = {"query": query, "key": key, "value": value}
    weights: dict[str, Any] = {f"{name}_weight": part.weight for name, part in parts.items()}
    weights["output_weight"] = numpy.eye(width, dtype=query.weight.dtype)
    if use_bias := any(part.bias is not None for part in parts.values()):
        zeros = numpy.zeros(width, query.weight.dtype)
        weights |= {f"{name}_bias": zeros if part.bias is None else part.bias for name, part in parts.items()}
        weights["output_bias"] = zeros
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


def _projection(node: Node, heads: Tensor, factor: float) -> _Projection:
    """The projection that computes these heads (heads, T, D) times a factor, found by following its elements.

    It is the identity if the heads are not the output of a Dense layer, in another order.
    """
    chain, call = list[Call](), heads.call
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
    if elements.shape[1] != length:
        raise node.error("of heads of a part of a sequence is not supported")
    columns, number = columns.reshape(-1), heads.dtype.type(1 if math.isclose(factor, 1, rel_tol=1e-6) else factor)
    if not isinstance(call.layer, layers.Dense):
        return _Projection(call, (numpy.eye(units, dtype=heads.dtype) * number)[:, columns], None)
    (x,), weight, bias = call.inputs, call.weights["weight"], call.weights.get("bias")
    memory = [a.__array_interface__["data"] for a in call.weights.values()]
    made = node.once(
        (*memory, columns.tobytes(), number),
        lambda: (weight[:, columns] * number, None if bias is None else bias[columns] * number),
    )
    return _Projection(x, *made)


def _is_factor(call: Call) -> bool:
    return isinstance(call.layer, layers.Rescale) and call.layer.offset == 0


def _scores(node: Node) -> _Scores | None:
    """The input of the softmax that is the first input of a node, if they are attention."""
    value = Input(node, 0)
    if (dropout := source(value, "Dropout")) is not None:
        if dropout.version < 7 or any(isinstance(a, numpy.ndarray) and a.any() for a in dropout.values[2:]):
            return None
        value = Input(dropout, 0)
    softmax = source(value, "Softmax")
    if softmax is None or softmax.version < 13:
        return None
    value, scale, causal = Input(softmax, 0), 1.0, False
    while (before := value.source) is not None:
        if before.operator == "MatMul":
            return _Scores(before, scale, causal, softmax.attribute("axis"))
        number = before.scalar(1)
        if before.operator in ("Mul", "Div") and number:
            value, scale = Input(before, 0), scale * (number if before.operator == "Mul" else 1 / number)
        elif before.operator in ("Add", "Where") and (excluded := _mask(before)) is not None:
            position, mask = excluded
            if mask.size != math.prod(mask.shape[-2:]):  # it may differ between heads or samples, or give more of them
                return None
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


# Export ---------------------------------------------------------------------------------------------------------------


@exports(layers.MultiHeadAttention)
def _attention(graph: GraphWriter, layer: layers.MultiHeadAttention, x: Any) -> FileTensor:
    """softmax(q kᵀ / √D + mask) v. x: a sequence, or a list [query, memory]."""
    given = [graph.transposed(tensor, channels_first=False) for tensor in (x if isinstance(x, list) else [x, x])]
    (length, features), (keys, _) = (tensor.shape for tensor in given)
    heads, width = layer.heads, features // layer.heads

    def projected(name: str, sequence: FileTensor) -> FileTensor:
        y = graph.add_node("MatMul", sequence, graph.add_weight(getattr(layer, f"{name}_weight")))
        return graph.add_node("Add", y, graph.add_weight(getattr(layer, f"{name}_bias"))) if layer.use_bias else y

    def split(name: str, sequence: FileTensor, perm: tuple[int, ...]) -> FileTensor:
        """Queries, keys or values (N, T, heads, D), with their axes in this order."""
        shape = graph.add_constant([0, 0, heads, width], numpy.int64)
        y = graph.add_node("Reshape", projected(name, sequence), shape)
        y = _rotated(graph, layer, y, width) if layer.rotary and name != "value" else y
        return graph.add_node("Transpose", y, perm=perm)

    q, k = split("query", given[0], (0, 2, 1, 3)), split("key", given[1], (0, 2, 3, 1))
    scores = graph.add_node("MatMul", q, k.name)
    scores = graph.add_node("Mul", scores, graph.add_constant(1 / math.sqrt(width)))
    if layer.causal:
        scores = graph.add_node("Add", scores, _later_keys(graph, layer, given[0], length, keys))
    probabilities = graph.add_node("Softmax", scores, axis=-1)
    out = graph.add_node("MatMul", probabilities, split("value", given[1], (0, 2, 1, 3)).name)
    out = graph.add_node("Transpose", out, perm=(0, 2, 1, 3))
    return projected("output", graph.add_node("Reshape", out, graph.add_constant([0, 0, features], numpy.int64)))


def _later_keys(graph: GraphWriter, layer: Any, query: FileTensor, length: int | None, keys: int | None) -> str:
    """A mask (T, S) with -∞ where a key is later than the query, 0 elsewhere."""
    if length is not None and keys is not None:
        if keys < length:
            raise ArgumentError(
                f"layer {layer.path} (MultiHeadAttention) is causal and has {length} queries for {keys} keys, so the "
                "first queries have none, which ONNX cannot express. Give it at least as many keys."
            )
        return graph.add_constant(numpy.triu(numpy.full((length, keys), -numpy.inf), 1 + keys - length))
    if isinstance(layer.input_shape, list):
        raise ArgumentError(
            f"layer {layer.path} (MultiHeadAttention) is causal on two sequences of open length, which ONNX cannot "
            "express. Give the model a fixed input_shape."
        )
    steps = graph.add_node("Shape", query, start=1, end=2)
    size = graph.add_node("Concat", steps, steps.name, axis=0)
    infinite = numpy_helper.from_array(numpy.array([-numpy.inf], graph.dtype))
    excluded = graph.add_node("ConstantOfShape", size, value=infinite)
    return graph.add_node("Trilu", excluded, graph.add_constant(1, numpy.int64), upper=1).name


def _rotated(graph: GraphWriter, layer: Any, x: FileTensor, width: int) -> FileTensor:
    """x (N, T, heads, D) with each pair (i, i + D/2) rotated by the angle t · 10000^(-2i/D)."""
    steps, half = x.shape[0], width // 2
    if steps is None:
        raise ArgumentError(
            f"layer {layer.path} (MultiHeadAttention) with rotary=True has an open length, and cannot be exported to "
            "ONNX. Give the model a fixed input_shape."
        )
    angles = numpy.arange(steps)[:, None] * 10000.0 ** (-numpy.arange(half) / half)
    cosines, sines = (graph.add_constant(table[:, None]) for table in (numpy.cos(angles), numpy.sin(angles)))
    first, second = (
        graph.add_node("Slice", x, *(graph.add_constant([n], numpy.int64) for n in part))
        for part in ((0, half, 3), (half, width, 3))
    )
    a = graph.add_node("Sub", graph.add_node("Mul", first, cosines), graph.add_node("Mul", second, sines).name)
    b = graph.add_node("Add", graph.add_node("Mul", first, sines), graph.add_node("Mul", second, cosines).name)
    return graph.add_node("Concat", a, b.name, axis=3)
