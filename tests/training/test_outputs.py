"""predict_proba: probabilities from logits, from probabilities, and from log-probabilities."""

import numpy as np
import pytest
from custom_layers import Spy
from small_models import LABELS, QUIET, SAMPLES, dense_net, small_net

import xpnet
from xpnet import layers, losses, optimizers
from xpnet.errors import ArgumentError, ShapeError

Z = np.array([[0.0, 1000.0, 3.0], [-2.0, 0.5, 1.0]], dtype="float32")
YES_NO = (SAMPLES[:, :1] > 0).astype("float32")
LOSS_FOR_OUTPUTS = {1: "binary_cross_entropy", 2: "softmax_cross_entropy"}


def identity(backend, *more, inputs=3, dtype="float32"):
    """A model whose logits are its inputs."""
    model = xpnet.Sequential([layers.Dense(inputs, use_bias=False), *more], (inputs,), backend, dtype=dtype)
    model.parameters[0].value = np.eye(inputs)
    return model


def trained(model, x, y, loss):
    """The model, trained with this loss at the learning rate 0."""
    model.fit(x, y, loss=loss, optimizer=optimizers.SGD(0.0), verbose=0)
    return model


def softmax(z):
    z = np.exp(np.float64(z) - np.max(z, axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-np.float64(z)))


def test_logits_of_classes_become_a_softmax(backend):
    model = identity(backend)
    for _ in range(2):  # before and after training
        found = model.predict_proba(Z)
        assert isinstance(found, np.ndarray) and found.dtype == "float32"
        np.testing.assert_allclose(found, softmax(Z), rtol=1e-6, atol=0)
        trained(model, Z, [1, 2], "softmax_cross_entropy")
    assert found[0].tolist() == [0, 1, 0]


def test_several_yes_or_no_answers_become_a_sigmoid_each(backend):
    model = trained(identity(backend), Z, [[0, 1, 1], [1, 0, 0]], "binary_cross_entropy")
    np.testing.assert_allclose(model.predict_proba(Z), sigmoid(Z), rtol=1e-6)


def test_a_single_logit_gives_two_columns_without_cancellation(backend):
    z = np.array([[0.0], [1000.0], [-1000.0], [20.0], [-20.0], [1.5]], dtype="float32")
    for model in (identity(backend, inputs=1), trained(identity(backend, inputs=1), z, z > 0, "binary_cross_entropy")):
        found = model.predict_proba(z)
        assert found.shape == (6, 2)
        exact = np.hstack([1 / (1 + np.exp(np.minimum(np.float64(z), 700))), sigmoid(np.maximum(z, -700.0))])
        np.testing.assert_allclose(found[3:], exact[3:], rtol=1e-6, atol=0)  # 1 - p would be 0 for z = 20
        assert found[:3].tolist() == [[0.5, 0.5], [0, 1], [1, 0]]


@pytest.mark.parametrize("more", [[layers.Softmax()], [layers.Sigmoid()], [layers.Softmax(), layers.Identity()]])
def test_probabilities_stay_as_they_are(backend, more):
    model = identity(backend, *[type(layer)() for layer in more])
    np.testing.assert_array_equal(model.predict_proba(Z), model.predict(Z))
    nested = identity(backend, layers.Sequential([layers.Sequential([layers.Softmax()]), layers.Flatten()]))
    np.testing.assert_array_equal(nested.predict_proba(Z), nested.predict(Z))


def test_a_single_probability_gives_two_columns_whatever_the_loss(backend):
    model = trained(identity(backend, layers.Sigmoid(), inputs=1), Z[:, :1], [[0], [1]], "mse")
    yes = model.predict(Z[:, :1])
    np.testing.assert_allclose(model.predict_proba(Z[:, :1]), np.hstack([1 - yes, yes]), rtol=1e-6)


def test_log_probabilities_become_probabilities(backend):
    np.testing.assert_allclose(identity(backend, layers.LogSoftmax()).predict_proba(Z), softmax(Z), rtol=1e-5)


def test_a_residual_gives_logits_even_if_its_last_layer_is_a_softmax():
    model = identity("cpu", layers.Residual(layers.Softmax()))
    np.testing.assert_allclose(model.predict_proba(Z), softmax(model.predict(Z)), rtol=1e-5)


def test_softmax_is_over_the_last_axis(backend):
    model = xpnet.Sequential([layers.Reshape((2, 3)), layers.Dense(4)], (6,), backend)
    x = np.random.default_rng(0).normal(size=(5, 6))
    np.testing.assert_allclose(model.predict_proba(x), softmax(model.predict(x)), rtol=1e-5)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("loss", ["mse", losses.Huber(0.5)])
def test_regressions_are_refused(outputs, loss):
    model = dense_net(outputs)
    model.fit(SAMPLES, SAMPLES[:, :outputs], loss=loss, **QUIET)
    with pytest.raises(ArgumentError, match=r"classifier.*(MeanSquaredError|Huber).*predict"):
        model.predict_proba(SAMPLES)
    model.fit(SAMPLES, YES_NO if outputs == 1 else LABELS, LOSS_FOR_OUTPUTS[outputs], **QUIET)
    assert model.predict_proba(SAMPLES).shape == (20, 2)  # the loss of the last training counts


def test_a_loaded_classifier_gives_the_same_probabilities(tmp_path):
    for model, y in ((small_net(), LABELS), (dense_net(1), YES_NO)):
        model.fit(SAMPLES, y, LOSS_FOR_OUTPUTS[model.output_shape[0]], **QUIET)
        model.save(tmp_path / "m.safetensors")
        loaded = xpnet.load(tmp_path / "m.safetensors", backend="cpu")
        np.testing.assert_array_equal(loaded.predict_proba(SAMPLES), model.predict_proba(SAMPLES))


def test_batches_and_device_arrays(backend):
    model = xpnet.Sequential([Spy(), layers.Dense(3)], (4,), backend)
    whole = model.predict_proba(SAMPLES)
    np.testing.assert_allclose(model.predict_proba(SAMPLES, batch_size=7), whole, rtol=1e-6)
    on_device = model.predict_proba(SAMPLES, as_device=True)
    assert isinstance(on_device, backend.xp.ndarray)
    np.testing.assert_array_equal(backend.to_numpy(on_device), whole)
    whole[:] = 0  # a copy, not a buffer
    assert model.predict_proba(SAMPLES).min() > 0


def test_predict_proba_builds_the_model_and_refuses_wrong_inputs_as_predict_does():
    model = xpnet.Sequential([layers.Dense(3)], backend="cpu")
    assert model.predict_proba(SAMPLES).shape == (20, 3)
    with pytest.raises(ShapeError):
        model.predict_proba(SAMPLES[:, :3])
    with pytest.raises(ArgumentError, match="batch_size"):
        model.predict_proba(SAMPLES, batch_size=0)
