"""Small models, data and helpers that several test modules share."""

import numpy as np

import xpnet
from xpnet import augment, callbacks, layers

SAMPLES = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
LABELS = (SAMPLES.sum(axis=1) > 0).astype(int)
QUIET = {"verbose": 0, "batch_size": 5}


def small_net(dtype="float32", seed=0, outputs=2):
    return xpnet.Sequential([layers.Dense(5), layers.Tanh(), layers.Dense(outputs)], (4,), "cpu", seed, dtype)


def dense_net(units=2, inputs=4, dtype="float32", **kwargs):
    return xpnet.Sequential([layers.Dense(units, **kwargs)], (inputs,), "cpu", dtype=dtype)


def values_of(model):
    return model.context.store.values.copy()


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


class Do(callbacks.Callback):
    """Calls `action(self, model)` at every event of the kind `at`."""

    def __init__(self, action, at="on_step_end"):
        setattr(self, at, lambda model, *rest: action(self, model))


class StopAt(callbacks.Callback):
    """Raises KeyboardInterrupt after the step of this number."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, model, step):
        if step == self.step:
            raise KeyboardInterrupt


def assert_reproducible(layer, **classes):
    """Assert that the configuration and the repr of a layer each make an equal layer."""
    config = repr(layer.get_config())
    other = type(layer).from_config(layer.get_config())
    assert other is not layer and other != layer  # every layer has its own parameters
    again = eval(repr(layer), {**vars(layers), **vars(augment), **classes})
    assert repr(other.get_config()) == repr(again.get_config()) == config
    assert repr(other) == repr(again) == repr(layer)


def standalone_output(layer, backend, x, training=False, **kwargs):
    """Build this layer for x, outside a model, and return its output on the host."""
    layer.build(x.shape[1:], backend=backend, **kwargs)
    layer.context.training = training
    return backend.to_numpy(layer.forward(backend.asarray(x)))


def gradients_of(model):
    """{name: gradient}, copied to the host."""
    return {p.name: model.backend.to_numpy(p.grad).copy() for p in model.parameters}
