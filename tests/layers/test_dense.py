"""Dense: values, parameters, and batches of changing size."""

import numpy as np
import pytest
from small_models import standalone_output

import xpnet
from xpnet import layers


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_multiplies_the_last_axis(backend, rng, shape, use_bias):
    w, b, x = rng.normal(size=(4, 5)), rng.normal(size=5), rng.normal(size=(6, *shape))
    layer = layers.Dense(5, use_bias=use_bias, weight_initializer=w, bias_initializer=b)
    y = standalone_output(layer, backend, x, dtype="float64")
    assert layer.output_shape == (*shape[:-1], 5)
    assert [p.name for p in layer.parameters] == ["weight", "bias"][: 1 + use_bias]
    np.testing.assert_allclose(y, np.einsum("...i,ij->...j", x, w) + use_bias * b, rtol=1e-12, atol=1e-12)


def test_a_smaller_batch_does_not_use_values_of_a_larger_one_before_it(backend, rng):
    model = xpnet.Sequential([layers.Dense(4), layers.Tanh(), layers.Dense(2)], input_shape=3, backend=backend)
    x = rng.normal(size=(9, 3)).astype("float32")
    whole = model.predict(x)
    for rows in (2, 9, 1):
        np.testing.assert_allclose(model.predict(x[:rows]), whole[:rows], rtol=1e-5, atol=1e-6)
