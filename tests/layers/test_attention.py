"""Attention, positions and transformer blocks: against a formula in float64, noise, masks, and what they refuse."""

import numpy as np
import pytest

import xpnet
from xpnet import layers
from xpnet.errors import ArgumentError, ShapeError


def attended(x, memory, layer, mask, to_numpy):
    """The output of attention, one query of one head at a time, in float64."""
    weights = {p.name: to_numpy(p.value).astype("float64") for p in layer.parameters}
    q, k, v = (
        (a @ weights[f"{part}_weight"] + weights[f"{part}_bias"]).reshape(*a.shape[:2], layer.heads, -1)
        for a, part in ((x, "query"), (memory, "key"), (memory, "value"))
    )
    out = np.zeros(q.shape)
    for n, t, h in np.ndindex(q.shape[:3]):
        counts = mask[n].copy()
        if layer.causal:
            counts[max(t + 1 + memory.shape[1] - x.shape[1], 0) :] = False
        if counts.any():
            scores = k[n, counts, h] @ q[n, t, h] / np.sqrt(q.shape[3])
            p = np.exp(scores - scores.max())
            out[n, t, h] = p @ v[n, counts, h] / p.sum()
    return out.reshape(x.shape) @ weights["output_weight"] + weights["output_bias"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(5, 5), (3, 7), (1, 1), (70, 70)], ids=str)
def test_attention_equals_a_sum_for_each_query(backend, rng, causal, lengths):
    queries, keys = lengths
    x, memory = rng.normal(size=(2, queries, 6)), rng.normal(size=(2, keys, 4))
    mask = rng.random((2, keys)) < 0.6
    mask[0, -1], mask[1] = True, False  # the second sample has no key
    layer = layers.MultiHeadAttention(3, causal=causal)
    layer.build([(queries, 6), (keys, 4)], backend=backend, dtype="float64")
    for parameter in layer.parameters:
        parameter.value[...] = backend.asarray(rng.normal(size=parameter.shape))
    layer.work.given_mask = [None, backend.asarray(mask)]
    y = backend.to_numpy(layer.forward([backend.asarray(x), backend.asarray(memory)]))
    np.testing.assert_allclose(y, attended(x, memory, layer, mask, backend.to_numpy), rtol=1e-10, atol=1e-12)


def dropped(backend, rows=slice(None), first_row=0):
    """Which probabilities of two heads are kept: the values are unit vectors, and queries and keys are 0."""
    layer = layers.MultiHeadAttention(2, dropout=0.3, use_bias=False)
    layer.build((4, 8), backend=backend, dtype="float64")
    layer.context.training, layer.context.first_row = True, first_row
    for parameter, value in zip(layer.parameters, (0.0, 0.0, 1.0, 1.0), strict=True):
        parameter.value[...] = backend.asarray(np.eye(8) * value)
    x = np.tile(np.concatenate([np.eye(4), np.eye(4)], axis=1), (200, 1, 1))[rows]
    return backend.to_numpy(layer.forward(backend.asarray(x))) * 4  # each probability is 1/4


def test_dropout_of_probabilities_has_its_rate_and_the_same_noise_on_every_device(backend):
    factors = dropped(backend)
    np.testing.assert_allclose(np.unique(factors.round(9)), [0, 1 / 0.7], atol=1e-8)
    assert abs((factors == 0).mean() - 0.3) < 0.02
    np.testing.assert_allclose(factors, dropped(xpnet.get_backend("cpu")), atol=1e-12)
    assert not np.array_equal(factors[..., :4], factors[..., 4:])  # each head has noise of its own
    np.testing.assert_allclose(dropped(backend, slice(150, 200), 150), factors[150:], atol=1e-12)


def test_scores_of_rotated_queries_and_keys_depend_on_distances_alone(backend, rng):
    layer = layers.MultiHeadAttention(1, rotary=True)
    layer.build((9, 4), backend=backend, dtype="float64")
    x = np.tile(rng.normal(size=4), (1, 9, 1))  # the same vector at each position
    layer.forward(backend.asarray(x))
    q, k = (backend.to_numpy(a)[0, :, 0] for a in layer.work.given[:2])
    scores = q @ k.T
    for offset in range(-8, 9):
        np.testing.assert_allclose(np.diagonal(scores, offset), np.diagonal(scores, offset)[0], rtol=1e-10)
    assert np.ptp(scores) > 1e-3


def test_a_causal_block_does_not_see_later_positions(backend, rng):
    model = xpnet.Sequential([layers.PositionalEmbedding(6), layers.TransformerBlock(2, rotary=True)], (6, 4), backend)
    x = rng.normal(size=(2, 6, 4))
    other = x.copy()
    other[:, 4:] += 1.0
    y, changed = (backend.to_numpy(model.forward(a)) for a in (x, other))
    np.testing.assert_allclose(changed[:, :4], y[:, :4], rtol=1e-6, atol=1e-6)
    assert (abs(changed[:, 4:] - y[:, 4:]) > 1e-3).any(axis=-1).all()


def test_names_of_parameters_and_norms_without_beta():
    model = xpnet.Sequential([layers.TransformerBlock(2, use_bias=False, name="block")], (3, 4), "cpu")
    assert [p.name.removeprefix("block.") for p in model.parameters] == [
        "norm1.gamma", "attention.query_weight", "attention.key_weight", "attention.value_weight",
        "attention.output_weight", "norm2.gamma", "expand.weight", "contract.weight",
    ]  # fmt: skip
    assert model.get_layer("block.expand").units == 16


def test_a_frozen_block_stays_frozen_when_it_is_built():
    block = layers.TransformerBlock(2)
    block.trainable = False
    model = xpnet.Sequential([block, layers.Dense(2)], (3, 4), "cpu")
    assert [p.name for p in model.parameters if p.trainable] == ["1.weight", "1.bias"]


@pytest.mark.parametrize(
    ("layer", "shape", "error", "message"),
    [
        (layers.MultiHeadAttention(3), (5, 4), ShapeError, r"a number of features that heads=3 divides"),
        (layers.MultiHeadAttention(2), (4,), ShapeError, r"a sequence \(N, T, C\), or a list of two"),
        (layers.MultiHeadAttention(2, rotary=True), (5, 6), ArgumentError, r"rotary=True rotates pairs"),
        (layers.TransformerBlock(2), (4,), ShapeError, r"sequences \(N, T, C\)"),
        (layers.PositionalEmbedding(4), (5, 2), ShapeError, r"at most 4 positions"),
    ],
)
def test_what_does_not_fit_is_refused(layer, shape, error, message):
    with pytest.raises(error, match=message):
        layer.build(shape, backend="cpu")
    assert not layer.is_built
