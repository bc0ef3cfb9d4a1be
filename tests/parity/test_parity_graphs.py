"""Random graphs against PyTorch's autograd: outputs, and gradients of inputs and of shared and other parameters."""

import functools

import numpy as np
import pytest
import random_graphs
import torch
import twins
from torch.nn import functional

GRAPHS = 100
TOLERANCES = {"float64": 1e-9, "float32": 1e-4}

ACTIVATIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "relu": torch.relu,
    "softplus": functional.softplus,
}
MERGES = {
    "add": lambda x: functools.reduce(torch.add, x),
    "average": lambda x: functools.reduce(torch.add, x) / len(x),
    "multiply": lambda x: functools.reduce(torch.mul, x),
    "maximum": lambda x: functools.reduce(torch.maximum, x),
    "subtract": lambda x: x[0] - x[1],
    "concatenate": lambda x: torch.cat(x, dim=-1),
}


def twin(graph, x, p):
    """The outputs of the graph in PyTorch, for inputs x and parameters p by name."""
    tensors = list(x)
    for call in graph.calls:
        given, name = [tensors[i] for i in call.inputs], f"layer{call.layer}"
        if call.kind in MERGES:
            y = MERGES[call.kind](given)
        elif call.kind == "dense":
            y = twins.dense(given[0], p[f"{name}.weight"], p[f"{name}.bias"])
        elif call.kind == "layer_norm":
            y = twins.layer_norm(given[0], p[f"{name}.gamma"], p[f"{name}.beta"])
        elif call.kind == "batch_norm":
            y = functional.batch_norm(given[0], None, None, p[f"{name}.gamma"], p[f"{name}.beta"], training=True)
        else:
            y = ACTIVATIONS[call.kind](given[0])
        tensors.append(y)
    return [tensors[i] for i in graph.outputs]


def close(got, want, tolerance):
    want = want.detach().numpy()
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * max(1.0, abs(want).max()))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("seed", range(GRAPHS))
def test_a_random_graph_equals_autograd(seed, dtype):
    graph, rng, tolerance = random_graphs.random_graph(seed), np.random.default_rng(seed), TOLERANCES[dtype]
    model = random_graphs.model_of(graph, backend="cpu", dtype=dtype)
    for parameter in model.parameters:  # so that gamma and beta take part
        parameter.value += 0.3 * rng.normal(size=parameter.shape).astype(dtype)
    x = [rng.normal(size=(7, size)).astype(dtype) for size in graph.inputs]
    y = model.forward_pass(random_graphs.one_or_list(x), training=True)
    outputs = [np.array(a) for a in (y if isinstance(y, tuple) else (y,))]
    grads = [rng.normal(size=a.shape).astype(dtype) for a in outputs]
    grad_x = model.backward_pass(random_graphs.one_or_list(grads))
    p = {a.name: torch.tensor(np.array(a.value), requires_grad=True) for a in model.parameters}
    inputs = [torch.tensor(a, requires_grad=True) for a in x]
    expected = twin(graph, inputs, p)
    torch.autograd.backward(expected, [torch.tensor(a) for a in grads])
    for got, want in zip(outputs, expected, strict=True):
        close(got, want, tolerance)
    for got, tensor in zip(grad_x if isinstance(grad_x, tuple) else (grad_x,), inputs, strict=True):
        close(got, tensor.grad, tolerance)
    for parameter in model.parameters:
        close(parameter.grad, p[parameter.name].grad, tolerance)


def test_the_graphs_have_what_they_are_meant_to_have():
    graphs = [random_graphs.random_graph(seed) for seed in range(GRAPHS)]
    assert all(3 <= len(graph.calls) <= 12 for graph in graphs)
    assert sum(bool(graph.shared) for graph in graphs) > 30
    assert sum(len(graph.inputs) > 1 for graph in graphs) > 30
    assert sum(len(graph.outputs) > 1 for graph in graphs) > 30
    kinds = {call.kind for graph in graphs for call in graph.calls}
    assert kinds == {*ACTIVATIONS, *MERGES, "dense", "layer_norm", "batch_norm"}
