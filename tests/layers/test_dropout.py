"""Dropout: rates, gradients, and masks that depend only on seed, layer, step and row."""

import math

import numpy as np
import pytest
from small_models import standalone_output

import xpnet
from xpnet import layers
from xpnet.backends import get_backend


def masks(backend, seed=0, step=0, first_row=0, rows=40):
    """Where the masks of two dropout layers in one model are not zero."""
    first, second = layers.Dropout(0.5), layers.Dropout(0.5)
    model = xpnet.Sequential([first, second], input_shape=(5, 4), backend=backend, seed=seed)
    model.context.step, model.context.first_row = step, first_row
    model.forward(np.ones((rows, 5, 4)), training=True)
    return [backend.to_numpy(layer.work.mask) > 0 for layer in (first, second)]


def test_dropout_zeroes_its_rate_and_scales_the_rest(backend):
    y = standalone_output(layers.Dropout(0.3), backend, np.ones((400, 250), np.float32), training=True)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.7)}
    assert abs((y == 0).mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / y.size)


@pytest.mark.parametrize(("rate", "training"), [(0.5, False), (0.0, True)])
def test_dropout_is_the_identity_outside_training_or_at_rate_zero(backend, rng, rate, training):
    x = rng.normal(size=(3, 4)).astype("float32")
    layer = layers.Dropout(rate)
    np.testing.assert_array_equal(standalone_output(layer, backend, x, training=training), x)
    np.testing.assert_array_equal(backend.to_numpy(layer.backward(backend.asarray(x))), x)


def test_the_gradient_gets_the_mask_of_the_forward_pass(backend):
    layer, ones = layers.Dropout(0.5), np.ones((20, 30), np.float32)
    y = standalone_output(layer, backend, ones, training=True)
    np.testing.assert_array_equal(backend.to_numpy(layer.backward(backend.asarray(ones))), y)


def test_dropout_masks_are_the_same_on_every_device(backend):
    np.testing.assert_array_equal(masks(backend), masks(get_backend("cpu")))


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"first_row": 40}], ids=str)
def test_dropout_masks_differ_by_seed_step_and_row(change):
    before, after = masks(get_backend("cpu"))[0], masks(get_backend("cpu"), **change)[0]
    assert 0.4 < (before == after).mean() < 0.6


def test_dropout_masks_differ_by_layer_and_a_part_of_a_batch_has_those_of_the_whole():
    first, second = masks(get_backend("cpu"))
    assert 0.4 < (first == second).mean() < 0.6
    part = masks(get_backend("cpu"), first_row=15, rows=10)
    np.testing.assert_array_equal(part, [first[15:25], second[15:25]])
