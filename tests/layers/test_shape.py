"""Layers that change shape or scale: Flatten, Reshape, Permute, Slice, Rescale."""

import numpy as np
import pytest
from names import stable_repr
from small_models import standalone_output

import xpnet
from xpnet import layers
from xpnet.errors import ShapeError


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (layers.Flatten(), lambda x: x.reshape(len(x), -1)),
        (layers.Reshape((4, 6)), lambda x: x.reshape(-1, 4, 6)),
        (layers.Reshape((-1, 3)), lambda x: x.reshape(len(x), -1, 3)),
        (layers.Permute((2, 0, 1)), lambda x: x.transpose(0, 3, 1, 2)),
        (layers.Permute((1, 0, 2)), lambda x: x.transpose(0, 2, 1, 3)),
    ],
    ids=stable_repr,
)
@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64"])
def test_shape_layers_equal_numpy_and_keep_the_dtype(backend, layer, expected, dtype):
    layer = type(layer)(**layer.get_config())
    x = np.arange(5 * 24).reshape(5, 2, 3, 4).astype(dtype)
    y = standalone_output(layer, backend, x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, expected(x))
    assert layer.output_shape == y.shape[1:]
    grad_x = layer.backward(backend.asarray(y.astype("float32")))
    np.testing.assert_array_equal(backend.to_numpy(grad_x), x)


@pytest.mark.parametrize("dtype", ["float32", "int64"])
@pytest.mark.parametrize(
    ("arguments", "part"), [((1,), np.s_[:, 1:]), ((-3, -1, -1), np.s_[..., -3:-1]), ((0, 9, 1), np.s_[:, :, :9])]
)
def test_slice_takes_a_part_and_gives_the_rest_no_gradient(backend, arguments, part, dtype):
    layer, x = layers.Slice(*arguments), np.arange(5 * 24).reshape(5, 2, 3, 4).astype(dtype)
    y = standalone_output(layer, backend, x)
    assert y.dtype == dtype and layer.output_shape == y.shape[1:]
    np.testing.assert_array_equal(y, x[part])
    grad_x = backend.to_numpy(layer.backward(backend.asarray(y.astype("float32"))))
    expected = np.zeros_like(x)
    expected[part] = x[part]
    np.testing.assert_array_equal(grad_x, expected)


@pytest.mark.parametrize(("arguments", "match"), [((2,), "from 2 to None"), ((0, 1, 3), "an axis 3 after the batch")])
def test_slice_refuses_what_does_not_exist(arguments, match):
    with pytest.raises(ShapeError, match=match):
        layers.Slice(*arguments).build((2, 3), backend="cpu")


@pytest.mark.parametrize(
    "layer", [layers.Slice(2), layers.Slice(-3), layers.Slice(0, 3), layers.Slice(-2, 0)], ids=repr
)
def test_slice_refuses_sequences_without_its_part(layer):
    model = xpnet.Sequential([layer], (None, 4), "cpu")
    with pytest.raises(ShapeError, match=rf"Slice.*elements from {layer.start} to .*but the input is \(N, 2, 4\)"):
        model.predict(np.ones((3, 2, 4)))


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32"])
def test_rescale_converts_integers_to_the_dtype_of_the_model(backend, dtype):
    x = np.array([[0, 51, 255]], dtype)
    y = standalone_output(layers.Rescale(1 / 255, offset=-0.5), backend, x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, [[-0.5, -0.3, 0.5]], rtol=1e-6)


def test_rescale_computes_the_input_gradient_only_if_wanted(backend):
    layer, x = layers.Rescale(0.5), np.ones((1, 2), np.float32)
    standalone_output(layer, backend, x)
    assert backend.to_numpy(layer.backward(backend.asarray(x))).tolist() == [[0.5, 0.5]]
    layer.wants_input_grad = False
    assert layer.backward(backend.asarray(x)) is None


def test_outputs_for_integer_inputs_are_floats(backend):
    plain = xpnet.Sequential([layers.Flatten(), layers.Identity()], input_shape=2, backend=backend)
    assert plain.predict(np.array([[3, 4]], np.uint8)).dtype == np.float32
    scaled = xpnet.Sequential([layers.Flatten(), layers.Rescale(0.5)], input_shape=2, backend=backend)
    assert scaled.predict(np.array([[3, 255]], np.uint8)).tolist() == [[1.5, 127.5]]


def test_permute_keeps_fractions_of_floats_after_integers(backend):
    model = xpnet.Sequential([layers.Permute((1, 0)), layers.Rescale(1.0)], input_shape=(1, 2), backend=backend)
    model.predict(np.zeros((1, 1, 2), np.uint8))
    assert model.predict([[[0.25, 0.5]]]).ravel().tolist() == [0.25, 0.5]
