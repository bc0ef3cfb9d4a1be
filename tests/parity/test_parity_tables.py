"""Embeddings with a padding index, and tables that are also the weight of the outputs, against PyTorch's."""

import numpy as np
import pytest
import torch
from torch import nn
from twins import agree, tensor

import xpnet
from xpnet import layers, optimizers

V, F = 11, 6


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3,), (2, 3, 4)], ids=str)
def test_a_padded_embedding_equals_that_of_pytorch(shape, dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(0, V, shape)
    x.reshape(-1)[0] = 4
    layer = layers.Embedding(V, F, padding_index=4)
    layer.build(shape[1:], backend="cpu", dtype=dtype)
    theirs = nn.Embedding(V, F, padding_idx=4, dtype=getattr(torch, dtype))
    layer.weight = theirs.weight.detach().numpy()
    y, grad = layer.forward(x), rng.normal(size=(*shape, F)).astype(dtype)
    expected = theirs(tensor(x))
    agree(y, expected, "y")
    layer.backward(grad)
    expected.backward(tensor(grad))
    agree(layer.weight.grad, theirs.weight.grad, "gradient of weight")


class Tied(nn.Module):
    """Embedding, Linear, tanh, and a Linear with the weight of the Embedding."""

    def __init__(self, dtype):
        super().__init__()
        dtype = getattr(torch, dtype)
        self.table, self.inner = nn.Embedding(V, F, dtype=dtype), nn.Linear(F, F, dtype=dtype)
        self.head = nn.Linear(F, V, dtype=dtype)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.table(x))))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_training_with_a_tied_table_equals_that_of_pytorch(dtype):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, V, (2, 20, 5))
    theirs, table = Tied(dtype), layers.Embedding(V, F)
    inner = [layers.Dense(F), layers.Tanh(), layers.Dense(V, tied_to=table)]
    ours = xpnet.Sequential([table, *inner], (None,), "cpu", dtype=dtype)
    given = {name: parameter.detach().numpy().copy() for name, parameter in theirs.named_parameters()}
    names = {"0.weight": given["table.weight"], "1.weight": given["inner.weight"].T, "1.bias": given["inner.bias"]}
    ours.load_state_dict({**names, "3.bias": given["head.bias"]})
    options = {"loss": "softmax_cross_entropy", "shuffle": False, "verbose": 0}
    ours.fit(x, y, optimizer=optimizers.SGD(0.5, momentum=0.9), batch_size=4, epochs=3, **options)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.5, momentum=0.9)
    for _ in range(3):
        for start in range(0, 20, 4):
            rows = slice(start, start + 4)
            sgd.zero_grad()
            outputs = theirs(tensor(x[rows]))
            nn.functional.cross_entropy(outputs.reshape(-1, V), tensor(y[rows]).reshape(-1)).backward()
            sgd.step()
    state = ours.state_dict()
    agree(state["0.weight"], theirs.table.weight, "the table")
    agree(state["1.weight"], theirs.inner.weight.T, "the inner weight")
    agree(state["3.bias"], theirs.head.bias, "the bias")
