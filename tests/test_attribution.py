"""xpnet.attribution: its numbers are those of formulas and finite differences, and the model stays as it was."""

import numpy as np

import xpnet
from xpnet import attribution, layers

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 8, 6, 2))


def net(*stack, shape=(2,), backend="cpu", **options):
    return xpnet.Sequential(stack, shape, backend, **{"dtype": "float64", **options})


def cnn(backend="cpu", last=(), **options):
    model = net(
        layers.Conv2D(4, 3, name="first"), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2), layers.Dropout(0.5),
        layers.Conv2D(3, 2), layers.Tanh(), layers.Flatten(), layers.Dense(4), *last,
        shape=(8, 6, 2), backend=backend, **options,
    )  # fmt: skip
    model.train_on_batch(IMAGES, np.arange(3), "softmax_cross_entropy", "adam") if not last else None
    return model


def slopes(score, x, h=1e-6):
    """∂score/∂x by central differences, for a function score(x) (N,) of which each value depends on one sample."""
    found = np.zeros(x.shape)
    for i in np.ndindex(x.shape[1:]):
        sides = []
        for step in (h, -h):
            other = x.copy()
            other[(slice(None), *i)] += step
            sides.append(score(other))
        found[(slice(None), *i)] = (sides[0] - sides[1]) / (2 * h)
    return found


# Saliency


def test_the_saliency_of_a_linear_net_is_its_weight(backend):
    model = net(layers.Dense(3), shape=(5,), backend=backend)
    x, weight = RNG.normal(size=(4, 5)), model.state_dict()["0.weight"]
    predicted = model.predict(x).argmax(axis=1)
    assert len({*predicted.tolist()}) > 1
    for target, classes in ((None, predicted), (2, [2] * 4), ([0, 2, 1, 1], [0, 2, 1, 1])):
        found = attribution.saliency(model, x, target)
        assert type(found) is np.ndarray and found.dtype == np.float64
        np.testing.assert_array_equal(found, weight.T[classes])
    on_device = attribution.saliency(model, backend.asarray(x), np.array([0, 2, 1, 1]), as_device=True)
    assert isinstance(on_device, backend.xp.ndarray)
    np.testing.assert_array_equal(backend.to_numpy(on_device), found)


def test_the_saliency_of_a_convolutional_net_is_that_of_finite_differences(backend):
    model = cnn(backend)
    for target in (None, 1, [3, 0, 2]):
        chosen = model.predict(IMAGES).argmax(axis=1) if target is None else np.broadcast_to(target, 3)
        found = attribution.saliency(model, IMAGES, target)
        expected = slopes(lambda x, chosen=chosen: model.predict(x)[np.arange(3), chosen], IMAGES)
        np.testing.assert_allclose(found, expected, atol=1e-8)
        assert abs(found).max() > 1e-3
