"""Import and export recurrent layers: the nodes LSTM, GRU and RNN.

The steps are on axis 0 in the file and the batch on axis 1, unless `layout` is 1. W is (directions, gates · units,
features), R (directions, gates · units, units), and B (directions, 2 · gates · units), the bias of the inputs before
that of the state. ONNX orders the gates of LSTM i, o, f, c, and those of GRU z, r, h; xpnet, like PyTorch, i, f, c, o
and r, z, h.
"""

from collections.abc import Sequence
from typing import Any

import numpy

from xpnet import layers
from xpnet.onnx import schemas
from xpnet.onnx.reader import Node, Value, converts
from xpnet.onnx.tensors import Constant, Rearranged, Tensor, Varying, batch_first, joined, reshaped, with_batch_at
from xpnet.onnx.writer import FileTensor, GraphWriter, exports

#: operator → (its layer, the gates of xpnet as positions of those of ONNX, and those of ONNX as positions of xpnet's)
_OPERATORS: dict[str, tuple[Any, list[int], list[int]]] = {
    "LSTM": (layers.LSTM, [0, 2, 3, 1], [0, 3, 1, 2]),
    "GRU": (layers.GRU, [1, 0, 2], [1, 0, 2]),
    "RNN": (layers.SimpleRNN, [0], [0]),
}
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}

# Import ---------------------------------------------------------------------------------------------------------------


@converts("LSTM", "GRU", "RNN", since=7)
def _recurrent(node: Node) -> list[Value]:
    """The outputs Y, (T, directions, N, units), and Y_h, (directions, N, units); with the batch first in layout 1."""
    x, batch_axis = batch_first(node.rearranged())
    layout, direction = node.attribute("layout", 0), node.attribute("direction")
    directions, reverse = (2 if direction == "bidirectional" else 1), direction == "reverse"
    given = node.constant(1, "weight"), node.constant(2, "recurrent weight"), node.optional(3, "bias")
    weights = node.once((node.operator, direction, *node.proto.input[1:4]), lambda: _weights(node, directions, *given))
    units = len(weights[0]["recurrent_weight"])
    if batch_axis != 1 - layout or len(x.shape) != 2:
        raise node.error(f"has the batch on axis {batch_axis}, and takes sequences with the batch on axis {1 - layout}")
    _check(node, directions, units)
    kind, _, _ = _OPERATORS[node.operator]
    named = weights[0]
    if directions == 2:
        sides = zip(("forward", "backward"), weights, strict=True)
        named = {f"{side}.{name}": weight for side, side_weights in sides for name, weight in side_weights.items()}

    def read(return_sequences: bool) -> Tensor:
        layer = kind(units, return_sequences=return_sequences, reverse=reverse, use_bias="bias" in weights[0])
        return x.add(layers.Bidirectional(layer) if directions == 2 else layer, **named)

    states = read(return_sequences=True)
    last = _last_step(states, directions, reverse) if node.is_read(0) else read(return_sequences=False)
    if directions == 2:
        states, last = reshaped(states, (*states.shape[:1], 2, units)), reshaped(last, (2, units))
        return [_with_batch(states, layout, 2), _with_batch(last, layout, 1)]
    if layout == 1:
        return [reshaped(states, (*states.shape[:1], 1, units)), reshaped(last, (1, units))]
    return [Rearranged(states, ((1,), (), (0,), (2,))), Rearranged(last, ((), (0,), (1,)))]


def _with_batch(x: Tensor, layout: int, axis: int) -> Tensor | Rearranged:
    return x if layout == 1 else with_batch_at(x, axis)


def _last_step(states: Tensor, directions: int, reverse: bool) -> Tensor:
    """The last state, (units,) or (2 · units,), from the states after each step. In reverse, it is the first one."""
    width = states.shape[1]
    first, last = (reshaped(states.add(layers.Slice(*step)), (width,)) for step in ((0, 1), (-1,)))
    if directions == 1:
        return first if reverse else last
    halves = [last.add(layers.Slice(0, width // 2)), first.add(layers.Slice(width // 2))]
    return joined(layers.Concatenate(), halves)


def _weights(
    node: Node, directions: int, weight: Constant, recurrent: Constant, bias: Constant | None
) -> list[dict[str, Constant]]:
    """The parameters of the layer for each direction, from W, R and B."""
    units, (_, order, _) = recurrent.shape[-1], _OPERATORS[node.operator]
    rows = len(order) * units
    shapes = [weight.shape[:2], recurrent.shape, (directions, 2 * rows) if bias is None else bias.shape]
    if shapes != [(directions, rows), (directions, rows, units), (directions, 2 * rows)]:
        raise node.error(f"has weights of shapes {shapes} in {directions} directions of {units} units")

    def gates(a: Constant) -> Constant:
        """The rows of a in xpnet's order of gates, as columns."""
        return numpy.concatenate([a[gate * units : (gate + 1) * units] for gate in order]).T

    found = []
    for i in range(directions):
        weights = {"weight": gates(weight[i]), "recurrent_weight": gates(recurrent[i])}
        if bias is not None:
            of_inputs, of_state = gates(bias[i, :rows]), gates(bias[i, rows:])
            weights["bias"] = of_inputs if node.operator == "GRU" else of_inputs + of_state
            if node.operator == "GRU":
                weights["recurrent_bias"] = of_state
        found.append(weights)
    return found


def _check(node: Node, directions: int, units: int) -> None:
    """Refuse what the layers do not compute."""
    expected = _ACTIVATIONS[node.operator] * directions
    given = [schemas.plain(name) for name in node.attribute("activations", expected)][: len(expected)]
    if given != expected:
        raise node.error(f"with the activations {given} is not supported")
    if (size := node.attribute("hidden_size")) not in (None, units):
        raise node.error(f"has hidden_size {size} and weights of {units} units")
    if node.operator == "GRU" and not node.attribute("linear_before_reset", 0):
        raise node.error("with linear_before_reset=0 is not supported, only with 1, as in PyTorch")
    for index, name in ((5, "initial_h"), (6, "initial_c")):
        state = node.value(index) if index < len(node.values) else None
        values = state.values if isinstance(state, Varying) else () if state is None else (state,)
        if not all(isinstance(a, numpy.ndarray) and not a.any() for a in values):
            raise node.error(f"with an {name} that is not 0 is not supported")


# Export ---------------------------------------------------------------------------------------------------------------


@exports(layers.LSTM, layers.GRU, layers.SimpleRNN)
def _recurrent_node(graph: GraphWriter, layer: Any, x: FileTensor) -> FileTensor:
    return _add(graph, [layer], "reverse" if layer.reverse else "forward", x)


@exports(layers.Bidirectional)
def _bidirectional(graph: GraphWriter, layer: layers.Bidirectional, x: FileTensor) -> FileTensor:
    return _add(graph, list(layer.layers[:2]), "bidirectional", x)


def _add(graph: GraphWriter, directions: Sequence[Any], direction: str, x: FileTensor) -> FileTensor:
    """Add the node of layers that read the same sequence, and the nodes before and after it that move the batch."""
    first = directions[0]
    operator = next(name for name, (kind, _, _) in _OPERATORS.items() if isinstance(first, kind))
    inputs = [
        graph.add_constant(numpy.stack([_rows(graph, getattr(layer, name), layer) for layer in directions]),
                           name=getattr(first, name).name)
        for name in ("weight", "recurrent_weight")
    ]  # fmt: skip
    if first.use_bias:
        bias = numpy.stack([_bias(graph, layer) for layer in directions])
        inputs.append(graph.add_constant(bias, name=first.bias.name))
    more: dict[str, Any] = {"linear_before_reset": 1} if operator == "GRU" else {}
    steps = graph.add_node("Transpose", x, perm=(1, 0, 2))
    y = graph.add_node(
        operator, steps, *inputs, hidden_size=first.units, direction=direction,
        output=0 if first.return_sequences else 1, **more,
    )  # fmt: skip
    if first.return_sequences:
        y = graph.add_node("Transpose", y, perm=(2, 0, 1, 3))
        return graph.add_node("Reshape", y, graph.add_constant([0, 0, -1], numpy.int64))
    y = graph.add_node("Transpose", y, perm=(1, 0, 2))
    return graph.add_node("Reshape", y, graph.add_constant([0, -1], numpy.int64))


def _rows(graph: GraphWriter, parameter: Any, layer: Any) -> Constant:
    """A weight (features, gates · units) or bias (gates · units,) as rows of the gates in ONNX's order."""
    order = next(order for kind, _, order in _OPERATORS.values() if isinstance(layer, kind))
    gates = numpy.split(graph.to_numpy(parameter.value).T, len(order))
    return numpy.concatenate([gates[gate] for gate in order])


def _bias(graph: GraphWriter, layer: Any) -> Constant:
    """The bias of the inputs, then that of the state, which only a GRU has."""
    of_inputs = _rows(graph, layer.bias, layer)
    of_state = _rows(graph, layer.recurrent_bias, layer) if isinstance(layer, layers.GRU) else of_inputs * 0.0
    return numpy.concatenate([of_inputs, of_state])
