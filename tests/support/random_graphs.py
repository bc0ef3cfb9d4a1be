"""Random graphs of 3 to 12 layers with fan-out, merges, shared layers, and several inputs and outputs."""

from collections import Counter
from typing import NamedTuple

import numpy as np

import xpnet
from xpnet import layers

WIDTH = 4
#: Layers that keep the shape, and have no parameters.
ACTIVATIONS = {
    "tanh": layers.Tanh,
    "sigmoid": layers.Sigmoid,
    "silu": layers.SiLU,
    "relu": layers.ReLU,
    "softplus": layers.Softplus,
}
MERGES = {
    "add": layers.Add,
    "average": layers.Average,
    "multiply": layers.Multiply,
    "maximum": layers.Maximum,
    "subtract": layers.Subtract,
}


class Call(NamedTuple):
    """A call of a layer.

    layer: the number of the layer; several calls of a shared one have the same.  kind: what it is.  inputs: the numbers
    of tensors, inputs of the graph first.  size: of its output.
    """

    layer: int
    kind: str
    inputs: list[int]
    size: int


class Graph(NamedTuple):
    """inputs: the sizes of the inputs.  calls: each after those it depends on.  outputs: the numbers of tensors."""

    inputs: list[int]
    calls: list[Call]
    outputs: list[int]

    @property
    def shared(self):
        """The layers that are called several times."""
        return [layer for layer, count in Counter(call.layer for call in self.calls).items() if count > 1]


def random_graph(seed, single=False):
    """A random graph. single: whether it has one input and one output."""
    rng = np.random.default_rng(seed)
    inputs = [int(rng.integers(2, 6)) for _ in range(1 if single else rng.integers(1, 4))]
    sizes, calls = list(inputs), list[Call]()

    def add(kind, given, size, layer=None):
        calls.append(Call(len(calls) if layer is None else layer, kind, given, size))
        sizes.append(size)
        return len(sizes) - 1

    for i, _ in enumerate(inputs):
        add("dense", [i], WIDTH)
    count = rng.integers(3, 10)
    while len(calls) < count:
        recent = [i for i in range(len(inputs), len(sizes)) if sizes[i] == WIDTH]
        pick = int(rng.choice(recent))
        match rng.integers(6):
            case 0:
                add("dense", [pick], WIDTH)
            case 1:
                add(str(rng.choice([*ACTIVATIONS])), [pick], WIDTH)
            case 2:
                add(str(rng.choice(["layer_norm", "batch_norm"])), [pick], WIDTH)
            case 3:  # a layer again, at another place
                known = [call for call in calls if call.kind not in MERGES and sizes[call.inputs[0]] == WIDTH]
                if known:
                    call = known[rng.integers(len(known))]
                    add(call.kind, [pick], WIDTH, call.layer)
            case _:
                kind = str(rng.choice([*MERGES]))
                add(
                    kind,
                    [int(rng.choice(recent)) for _ in range(2 if kind == "subtract" else rng.integers(2, 4))],
                    WIDTH,
                )
    read = {i for call in calls for i in call.inputs}
    ends = [i for i in range(len(inputs), len(sizes)) if i not in read]
    first = add("dense", [add("concatenate", ends, WIDTH * len(ends))], 2) if len(ends) > 1 else ends[0]
    outputs = [first] if single or rng.random() < 0.4 else [first, add("dense", [int(rng.choice(ends))], 3)]
    return Graph(inputs, calls, outputs)


def layer_of(call):
    """A new layer of xpnet for this call."""
    name = f"layer{call.layer}"
    if call.kind == "dense":
        return layers.Dense(call.size, name=name)
    others = {"layer_norm": layers.LayerNorm, "batch_norm": layers.BatchNorm, "concatenate": layers.Concatenate}
    return (ACTIVATIONS | MERGES | others)[call.kind](name=name)


def tensors_of(graph):
    """(the symbolic inputs, the symbolic outputs)."""
    inputs = [xpnet.Input(size) for size in graph.inputs]
    tensors, known = list(inputs), {}
    for call in graph.calls:
        layer = known.setdefault(call.layer, layer_of(call))
        given = [tensors[i] for i in call.inputs]
        tensors.append(layer(given if call.kind in MERGES or call.kind == "concatenate" else given[0]))
    return inputs, [tensors[i] for i in graph.outputs]


def model_of(graph, **kwargs):
    return xpnet.Model(*tensors_of(graph), **kwargs)


def data_of(graph, samples, seed=0):
    """(x, y): random samples, as arrays or, if there are several, as lists of arrays."""
    rng = np.random.default_rng(seed)
    sizes = [graph.calls[i - len(graph.inputs)].size for i in graph.outputs]
    x, y = ([rng.normal(size=(samples, size)).astype("float32") for size in given] for given in (graph.inputs, sizes))
    return one_or_list(x), one_or_list(y)


def one_or_list(values):
    return values[0] if len(values) == 1 else list(values)
