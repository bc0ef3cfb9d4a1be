"""Recurrent layers against PyTorch's: outputs and all gradients, in both directions, with padding against packing."""

import numpy as np
import pytest
import torch
from torch.nn.utils import rnn

import xpnet
from xpnet import layers

KINDS = {"RNN": layers.SimpleRNN, "LSTM": layers.LSTM, "GRU": layers.GRU}
TOLERANCES = {"float64": 1e-9, "float32": 1e-4}
PARTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
#: (samples, steps, features, units)
SIZES = [(3, 5, 4, 7), (1, 1, 3, 2), (4, 6, 3, 1), (33, 3, 5, 96)]


def set_parameters(layer, net, suffix, kind):
    """Give the layer the parameters of one direction of a network of PyTorch."""
    given = {name: getattr(net, f"{name}_l0{suffix}").detach().numpy() for name in PARTS}
    layer.weight, layer.recurrent_weight = given["weight_ih"].T, given["weight_hh"].T
    if kind == "GRU":
        layer.bias, layer.recurrent_bias = given["bias_ih"], given["bias_hh"]
    else:
        layer.bias = given["bias_ih"] + given["bias_hh"]


def gradients(layer, net, suffix, kind):
    """(gradient, the same gradient of PyTorch) of each parameter of one direction."""
    theirs = {name: getattr(net, f"{name}_l0{suffix}").grad.numpy() for name in PARTS}
    yield layer.weight.grad, theirs["weight_ih"].T
    yield layer.recurrent_weight.grad, theirs["weight_hh"].T
    yield layer.bias.grad, theirs["bias_ih"]
    if kind == "GRU":
        yield layer.recurrent_bias.grad, theirs["bias_hh"]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sequences", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bidirectional_network_equals_that_of_pytorch(rng, kind, sizes, padded, sequences, dtype):
    samples, steps, features, units = sizes
    net = getattr(torch.nn, kind)(features, units, batch_first=True, bidirectional=True).to(getattr(torch, dtype))
    both = layers.Bidirectional(KINDS[kind](units, return_sequences=sequences))
    model = xpnet.Sequential([layers.Masking(0.0), both], (None, features), "cpu", dtype=dtype)
    directions = list(zip(both.layers, ["", "_reverse"], strict=False))
    for layer, suffix in directions:
        set_parameters(layer, net, suffix, kind)

    lengths = rng.integers(1, steps + 1, samples) if padded else np.full(samples, steps)
    x = rng.normal(size=(samples, steps, features)) * (np.arange(steps) < lengths[:, None])[..., None]
    x = x.astype(dtype)
    their_x = torch.tensor(x, requires_grad=True)
    packed = rnn.pack_padded_sequence(their_x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    packed, state = net(packed)
    state = state[0] if kind == "LSTM" else state
    whole, _ = rnn.pad_packed_sequence(packed, batch_first=True, total_length=steps)
    expected = whole if sequences else torch.cat([*state], dim=-1)
    grad = rng.normal(size=expected.shape).astype(dtype)
    expected.backward(torch.tensor(grad))

    pairs = [(model.forward(x), expected.detach().numpy()), (model.backward(grad), their_x.grad.numpy())]
    for layer, suffix in directions:
        pairs += gradients(layer, net, suffix, kind)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_without_biases_equals_that_of_pytorch(rng, kind):
    net = getattr(torch.nn, kind)(3, 4, num_layers=2, bias=False, batch_first=True).double()
    stack = [KINDS[kind](4, use_bias=False) for _ in range(2)]
    model = xpnet.Sequential(stack, (5, 3), "cpu", dtype="float64")
    for i, layer in enumerate(stack):
        layer.weight = getattr(net, f"weight_ih_l{i}").detach().numpy().T
        layer.recurrent_weight = getattr(net, f"weight_hh_l{i}").detach().numpy().T
    x = rng.normal(size=(2, 5, 3))
    np.testing.assert_allclose(model.predict(x), net(torch.tensor(x))[0].detach().numpy(), rtol=1e-9, atol=1e-12)
