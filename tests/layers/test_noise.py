"""Noise outside of fit: it advances with every training pass, repeats with the seed, and leaves fit alone."""

import copy

import numpy as np
import pytest
from small_models import assert_same_state

import xpnet
from xpnet import augment, callbacks, layers

X = np.random.default_rng(0).normal(size=(40, 6)).astype("float32")
Y = np.arange(40) % 2


def net(backend="cpu", seed=0):
    stack = [layers.Dense(32), layers.ReLU(), layers.Sequential([layers.Dropout(0.5)]), layers.Dense(2)]
    return xpnet.Sequential(stack, (6,), backend, seed=seed)


def masks(model):
    """Which hidden units the latest training pass kept."""
    return model.backend.to_numpy(model.layers[2].layers[0].work.mask) > 0


def test_each_training_pass_by_hand_has_new_noise(backend):
    model, seen = net(backend), []
    for _ in range(30):
        model.forward(X, training=True)
        seen.append(masks(model)[0])
    assert len({mask.tobytes() for mask in seen}) == 30
    assert (np.array(seen).sum(axis=0) > 3).all()  # each unit is trained


def loop(model, passes=10):
    for _ in range(passes):
        outputs = model.backend.to_numpy(model.forward(X, training=True))
        model.backward((outputs - np.eye(2)[Y]) / len(X))
        for parameter in model.parameters:
            parameter.value = parameter.value - 0.1 * parameter.grad
    return model.state_dict()


def test_a_loop_by_hand_repeats_with_the_seed(backend):
    assert_same_state(loop(net(backend)), loop(net(backend)))
    before, after = net(), net()
    loop(before)
    twin = copy.deepcopy(before)
    assert_same_state(loop(before), loop(twin))
    assert (loop(after)["0.weight"] != loop(net(seed=1))["0.weight"]).any()


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (layers.Dropout(0.5), np.ones((8, 30))),
        (layers.Sequential([layers.Identity(), layers.Dropout(0.5)]), np.ones((8, 30))),
        (layers.Residual(layers.Dropout(0.5)), np.ones((8, 30))),
        (augment.RandomAffine(shift=3, rotation=20), np.random.default_rng(1).normal(size=(4, 9, 9))),
        (augment.ElasticDistortion(20.0, 2.0), np.random.default_rng(1).normal(size=(4, 9, 9))),
    ],
    ids=lambda value: repr(value) if isinstance(value, layers.Layer) else "",
)
def test_a_layer_outside_a_model_has_new_noise_in_each_training_pass(backend, layer, x):
    layer, twin, x = copy.deepcopy(layer), copy.deepcopy(layer), backend.asarray(x, dtype="float32")
    for one in (layer, twin):
        one.build(x.shape[1:], backend=backend)
        one.context.training = True
    outputs = [backend.to_numpy(layer.forward(x)) for _ in range(4)]
    assert all((outputs[i] != outputs[j]).any() for i in range(4) for j in range(i))
    for output in outputs:
        np.testing.assert_array_equal(backend.to_numpy(twin.forward(x)), output)


def test_passes_by_hand_do_not_change_fit(backend):
    class ByHand(callbacks.Callback):
        def on_step_end(self, model, step):
            model.forward(X, training=True)
            seen.append(masks(model).tobytes())
            model.forward(X, training=True)
            seen.append(masks(model).tobytes())

    seen, plain, watched = [], net(backend), net(backend)
    watched.forward(X, training=True)
    want = plain.fit(X, Y, epochs=2, batch_size=10, verbose=0)
    assert watched.fit(X, Y, epochs=2, batch_size=10, callbacks=[ByHand()], verbose=0) == want
    assert_same_state(watched.state_dict(), plain.state_dict())
    assert len(set(seen)) == 16


def test_noise_between_batches_differs_from_that_of_the_batches():
    model, seen = net(), []
    for _ in range(4):
        model.forward(X, training=True)
        seen.append(masks(model).tobytes())
        model.train_on_batch(X, Y, "softmax_cross_entropy", "sgd")
        seen.append(masks(model).tobytes())
    assert len(set(seen)) == 8


def test_the_first_pass_by_hand_has_the_noise_of_the_step_that_it_replaces():
    model, plain = net(), net()
    for step in range(4):
        plain.train_on_batch(X, Y, "softmax_cross_entropy", "sgd")
        if step % 2:
            model.train_on_batch(X, Y, "softmax_cross_entropy", "sgd")
        else:
            model.backward(model.forward(X, training=True))
            model.apply_gradients("sgd")
        assert (masks(model) == masks(plain)).all()


def test_the_step_of_a_pass_by_hand_is_the_number_of_updates():
    class Steps(layers.Layer):
        seen = ()

        def forward(self, x):
            self.seen = (*self.seen, self.context.step)
            return x

        def backward(self, grad_y):
            return grad_y

    watch = Steps()
    model = xpnet.Sequential([watch, layers.Dense(2)], (6,), "cpu")
    model.forward(X, training=True)
    model.train_on_batch(X, Y, "softmax_cross_entropy", "sgd")
    model.train_on_batch(X, Y, "softmax_cross_entropy", "sgd")
    assert watch.seen == (0, 0, 1)


def test_check_gradients_has_the_same_masks_in_all_passes():
    model = net()
    loop(model, 3)
    assert max(xpnet.check_gradients(model, X, Y, "softmax_cross_entropy").values()) < 1e-5
