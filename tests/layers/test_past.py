"""Layers that continue sequences: outputs of pieces equal those of the whole sequence."""

import copy

import numpy as np
import pytest
from every import LAYERS

from xpnet import layers
from xpnet.layers.containers import every_layer
from xpnet.layers.past import Continuation


def is_causal(shape, layer):
    if not layer.causal:
        return False
    layer = copy.deepcopy(layer)
    layer.build(shape, backend="cpu")  # the shape decides for some layers
    return all(inner.causal for inner in every_layer(layer))


#: Unbuilt layers that take sequences and do not look ahead.
CAUSAL = [(shape, layer) for shape, layer in LAYERS if len(shape) == 2 and is_causal(shape, layer)]


def inference(layer, x, cuts=None):
    """The outputs for x, computed in the pieces that end at these steps; None: at once."""
    context = layer.context
    context.inference = True
    if cuts is None:
        return layer.backend.to_numpy(type(layer).forward(layer, x)).copy()
    context.continuation, outputs = Continuation(layer.backend, x.shape[1]), []
    for start, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        outputs.append(layer.backend.to_numpy(type(layer).forward(layer, x[:, start:end])).copy())
        context.continuation.steps = end
    return np.concatenate(outputs, axis=1)


def test_there_are_causal_layers_of_all_kinds():
    kinds = {type(layer) for _, layer in CAUSAL}
    assert kinds >= {layers.Conv1D, layers.Dense, layers.LSTM, layers.PositionalEmbedding, layers.TransformerBlock}


@pytest.mark.parametrize("length", [None, 5])
@pytest.mark.parametrize(
    ("shape", "layer"), CAUSAL, ids=[f"{i}-{type(one).__name__}" for i, (_, one) in enumerate(CAUSAL)]
)
def test_a_causal_layer_computes_the_same_in_pieces(shape, layer, backend, length):
    layer = copy.deepcopy(layer)
    with backend.device():
        output_shape = layer.build((length, *shape[1:]), backend=backend, seed=0, dtype="float64")
        x = backend.asarray(np.random.default_rng(0).normal(size=(2, 5, *shape[1:])))
        whole, in_pieces = inference(layer, x), inference(layer, x, [2, 3])
        if len(output_shape) == 1:  # the last state of a recurrent layer
            in_pieces = in_pieces[:, -output_shape[0] :]
        np.testing.assert_allclose(in_pieces, whole, rtol=1e-10, atol=1e-12)
