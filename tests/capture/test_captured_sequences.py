"""Captured steps of models of sequences on a GPU: they train as eager steps do, with noise and masks."""

import numpy as np
import pytest
from captured_trainings import fit

import xpnet
from xpnet import layers

TOKENS = np.random.default_rng(5).integers(0, 11, (2, 20, 6))
X, Y = TOKENS


def transformer():
    block = layers.TransformerBlock(2, dropout=0.2, rotary=True, norm="rms")
    return [layers.Embedding(11, 8), layers.PositionalEmbedding(6), block, layers.LayerNorm()]


def recurrent():
    stack = [layers.LSTM(4), layers.Bidirectional(layers.GRU(4)), layers.SimpleRNN(4)]
    return [layers.Embedding(11, 8, padding_index=0), *stack]


def network(backend, stack, precision):
    return xpnet.Sequential([*stack, layers.Dense(11)], (None,), backend=backend, seed=0, precision=precision)


@pytest.mark.parametrize(
    ("stack", "precision"), [(transformer, None), (transformer, "bfloat16"), (recurrent, None)],
    ids=["transformer", "transformer in bfloat16", "recurrent"],
)  # fmt: skip
def test_captured_and_eager_steps_train_alike(gpu, monkeypatch, stack, precision):
    states = []
    for capture in ("1", "0"):
        monkeypatch.setenv("XPNET_CAPTURE", capture)
        model = network(gpu, stack(), precision)
        _, watch = fit(model, X, Y, loss="softmax_cross_entropy", batch_size=8)
        assert (watch.captured > 0) is (capture == "1"), watch.fallback_reason
        states.append(model.state_dict())
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], rtol=0, atol=2e-2 if precision else 2e-4, err_msg=name)
