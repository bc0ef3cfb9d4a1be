"""Gradients of layers and losses against central differences, and the numbers of published worked examples."""

import copy
import functools
import math

import every
import numpy as np
import pytest

import xpnet
from xpnet import layers, losses, optimizers

TOLERANCE = 1e-6
BATCHES = ["one", "odd", "strided", "reversed"]


def away_from_kinks(rng, shape):
    """Numbers of either sign whose magnitude is at least 0.1, so that no central difference straddles 0."""
    return rng.uniform(0.1, 2.0, shape) * rng.choice([-1.0, 1.0], shape)


def batch(kind, draw, shape):
    """Samples of `shape`: a single one, seven, or seven with another memory layout."""
    if kind == "strided":
        return draw((7, *shape[:-1], 2 * shape[-1]))[..., ::2]
    if kind == "reversed":
        return draw((14, *shape))[::-2]
    return draw((1 if kind == "one" else 7, *shape))


LAYERS = {
    # The gradient of Step is a convention and is tested below. Embedding takes no floats (see test_embedding.py).
    **{
        f"example {i}, {type(layer).__name__}": (shape, lambda layer=layer: [copy.deepcopy(layer)])
        for i, (shape, layer) in enumerate(every.LAYERS)
        if not isinstance(layer, layers.Step | layers.Embedding)
    },
    "Dense": ((4,), lambda: [layers.Dense(3)]),
    "Dense without bias": ((4,), lambda: [layers.Dense(3, use_bias=False)]),
    "Dense on (N, T, F)": ((3, 4), lambda: [layers.Dense(2)]),
    "Dense with penalties": ((4,), lambda: [layers.Dense(3, l1=0.05, l2=0.1), layers.Tanh(), layers.Dense(2, l2=0.3)]),
    "ELU": ((4,), lambda: [layers.ELU(0.7)]),
    "GELU": ((4,), lambda: [layers.GELU()]),
    "GELU by tanh": ((4,), lambda: [layers.GELU(approximate="tanh")]),
    "PReLU": ((2, 3), lambda: [layers.Dense(3), layers.PReLU(), layers.Dense(2)]),
    "PReLU with one slope": ((2, 3), lambda: [layers.PReLU(shared=True), layers.Dense(2)]),
    "HardTanh": ((4,), lambda: [layers.HardTanh(-1.05, 0.55), layers.Dense(2)]),
    "HardSwish on both sides": ((4,), lambda: [layers.Rescale(3.0), layers.HardSwish(), layers.Dense(2)]),
    "HardSigmoid on both sides": ((4,), lambda: [layers.Rescale(3.0), layers.HardSigmoid(), layers.Dense(2)]),
    "Softmax on (N, T, F)": ((2, 3), lambda: [layers.Softmax()]),
    "Dropout": ((4,), lambda: [layers.Dense(16), layers.Dropout(0.5), layers.Dense(2)]),
    "Dropout alone": ((16,), lambda: [layers.Dropout(0.3)]),
    "Flatten": ((2, 3), lambda: [layers.Flatten(), layers.Dense(2)]),
    "Reshape": ((2, 6), lambda: [layers.Reshape((3, -1)), layers.Dense(2), layers.Reshape((6,))]),
    "Slice": ((4, 3), lambda: [layers.Dense(4), layers.Slice(1, -1), layers.Slice(-2, axis=1), layers.Dense(2)]),
    "Permute": ((2, 3, 4), lambda: [layers.Permute((2, 0, 1)), layers.Dense(2), layers.Permute((1, 2, 0))]),
    "Rescale": ((4,), lambda: [layers.Rescale(0.3, offset=-1.0), layers.Dense(2)]),
    "Conv2D": ((4, 5, 3), lambda: [layers.Conv2D(2, 3, padding="same"), layers.Tanh(), layers.Conv2D(3, (2, 1), 2)]),
    "Conv2D in groups": ((4, 5, 4), lambda: [layers.Conv2D(6, 2, padding=1, dilation=2, groups=2)]),
    "DepthwiseConv2D": ((4, 5, 3), lambda: [layers.DepthwiseConv2D(3, 2, "same", depth_multiplier=2)]),
    "Conv2DTranspose": ((2, 3, 4), lambda: [layers.Conv2DTranspose(6, 3, 2, 1, groups=2, output_padding=1)]),
    "MaxPool2D": ((4, 5, 2), lambda: [layers.Tanh(), layers.MaxPool2D(2, strides=1, padding="same")]),
    "AvgPool2D": ((4, 5, 2), lambda: [layers.AvgPool2D(3, strides=2, padding=1, count_include_pad=False)]),
    "GlobalAveragePool2D": ((4, 5, 2), lambda: [layers.GlobalAveragePool2D()]),
    "GlobalMaxPool2D": ((4, 5, 2), lambda: [layers.Tanh(), layers.GlobalMaxPool2D()]),
    "ZeroPadding2D": ((2, 3, 2), lambda: [layers.ZeroPadding2D((1, (0, 2))), layers.Conv2D(2, 2)]),
    "Upsample2D": ((2, 3, 2), lambda: [layers.Upsample2D((2, 3)), layers.Upsample2D(2, "bilinear")]),
    "BatchNorm": ((4,), lambda: [layers.BatchNorm(), layers.Tanh(), layers.Dense(2)]),
    "BatchNorm of images": ((2, 3, 4), lambda: [layers.BatchNorm(), layers.Tanh()]),
    "LayerNorm": ((4,), lambda: [layers.LayerNorm(), layers.Dense(2)]),
    "LayerNorm on (N, T, F)": ((3, 4), lambda: [layers.LayerNorm(), layers.Tanh()]),
    "GroupNorm": ((4, 5, 6), lambda: [layers.GroupNorm(2), layers.Tanh()]),
    "GroupNorm on (N, T, F)": ((3, 4), lambda: [layers.GroupNorm(4, scale=False), layers.Tanh(), layers.Dense(2)]),
    "InstanceNorm": ((4, 5, 2), lambda: [layers.InstanceNorm(), layers.Tanh()]),
    "Residual": ((4,), lambda: [layers.Residual(layers.Dense(4), layers.Tanh()), layers.Dense(2)]),
    "Residual with a learned skip": ((4,), lambda: [layers.Residual(layers.Dense(3), layers.Tanh()), layers.Dense(2)]),
    "nested": (
        (2, 2),
        lambda: [
            layers.Flatten(),
            layers.Sequential([layers.Dense(5), layers.Tanh(), layers.Sequential([layers.Dense(3), layers.GELU()])]),
            layers.Dense(2),
        ],
    ),
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_layers_equal_finite_differences(backend, rng, name, kind):
    shape, make = LAYERS[name]
    x = batch(kind, functools.partial(away_from_kinks, rng), shape)
    model = xpnet.Sequential(make(), input_shape=shape, backend=backend)
    y = rng.normal(size=(len(x), *model.output_shape))
    errors = xpnet.check_gradients(model, x, y, inputs=True)
    assert errors.keys() == {*(p.name for p in model.parameters), "inputs"}
    assert max(errors.values()) < TOLERANCE
    assert xpnet.check_gradients(model, x, y) == {name: e for name, e in errors.items() if name != "inputs"}


def memory_layouts(backend, a):
    """The same numbers on the device in several memory layouts."""
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]))
    wide[..., ::2] = a
    axes = tuple(range(a.ndim))[::-1]
    yield backend.asarray(a)
    yield backend.asarray(wide)[..., ::2]
    yield backend.asarray(a[::-1].copy())[::-1]
    yield backend.asarray(np.ascontiguousarray(a.transpose(axes))).transpose(axes)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_accept_any_memory_layout_and_do_not_modify_their_inputs(backend, rng, name):
    shape, make = LAYERS[name]
    stack = layers.Sequential(make())
    output_shape = stack.build(shape, backend=backend, dtype="float64")
    x, grad = away_from_kinks(rng, (5, *shape)), rng.normal(size=(5, *output_shape))
    results = []
    for device_x, device_grad in zip(
        memory_layouts(backend, x.copy()), memory_layouts(backend, grad.copy()), strict=True
    ):
        arrays = [stack.forward(device_x), stack.backward(device_grad), *(p.grad for p in stack.parameters)]
        results.append([backend.to_numpy(a).copy() for a in arrays])
        np.testing.assert_array_equal(backend.to_numpy(device_x), x)
        np.testing.assert_array_equal(backend.to_numpy(device_grad), grad)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_gradients_after_rescaled_integers_equal_finite_differences(backend, rng):
    x = np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5)
    model = xpnet.Sequential([layers.Rescale(1 / 255), layers.Dense(3), layers.Tanh()], input_shape=5, backend=backend)
    assert max(xpnet.check_gradients(model, x, rng.normal(size=(5, 3))).values()) < TOLERANCE


def test_the_gradient_of_step_is_that_of_the_identity(backend, rng):
    x, y, w = rng.normal(size=(7, 4)), rng.normal(size=(7, 3)), rng.normal(size=(4, 3))
    model = xpnet.Sequential([layers.Dense(3, weight_initializer=w), layers.Step(0.2)], 4, backend, dtype="float64")
    out = backend.to_numpy(model.forward(x))
    grad_x = backend.to_numpy(model.backward(out - y))
    np.testing.assert_array_equal(out, x @ w >= 0.2)
    np.testing.assert_allclose(grad_x, (out - y) @ w.T, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(backend.to_numpy(model.parameters[0].grad), x.T @ (out - y), rtol=1e-12, atol=1e-14)


# Losses

SMOOTH = {"label_smoothing": 0.1}
LOSSES = {
    **{repr(loss): (loss, targets) for loss, targets in every.LOSSES},
    "huber": (losses.Huber(), "real"),
    "binary": (losses.BinaryCrossEntropy(), "yes or no"),
    "binary, of probabilities": (losses.BinaryCrossEntropy(), "in [0, 1]"),
    "softmax of labels": (losses.SoftmaxCrossEntropy(), "labels"),
    "softmax of one-hot": (losses.SoftmaxCrossEntropy(), "one-hot"),
    "softmax of labels, smoothed": (losses.SoftmaxCrossEntropy(**SMOOTH), "labels"),
}
WEIGHTED = [
    (1, lambda weights: losses.BinaryCrossEntropy(**SMOOTH, class_weight=weights), "yes or no"),
    (3, lambda weights: losses.SoftmaxCrossEntropy(class_weight=weights), "labels"),
    (3, lambda weights: losses.SoftmaxCrossEntropy(class_weight=weights), "probabilities"),
]


def targets_of(rng, kind, outputs):
    """Targets that keep |output - target| away from the kinks at 0, 0.4 and 1."""
    n, k = outputs.shape
    if kind == "real":
        return outputs + rng.choice([-1.0, 1.0], (n, k)) * rng.choice([0.1, 0.2, 0.7, 1.5, 3.0], (n, k))
    probabilities = rng.dirichlet(np.ones(k), n)
    return {
        "yes or no": lambda: rng.integers(0, 2, (n, k)),
        "in [0, 1]": lambda: rng.random((n, k)),
        "labels": lambda: rng.integers(0, k, n),
        "one-hot": lambda: np.eye(k)[rng.integers(0, k, n)],
        "probabilities": lambda: probabilities,
    }[kind]()


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_losses_equal_finite_differences(backend, rng, name, kind):
    loss, targets = LOSSES[name]
    x = batch(kind, lambda shape: rng.normal(size=shape), (3,))
    y = targets_of(rng, targets, x)
    model = xpnet.Sequential([layers.Dense(3, weight_initializer=np.eye(3))], input_shape=3, backend=backend)
    errors = xpnet.check_gradients(model, x, y, loss=loss, inputs=True)
    assert errors.keys() == {"0.weight", "0.bias", "inputs"}
    assert max(errors.values()) < TOLERANCE


@pytest.mark.parametrize("weights", [{0: 2.0}, {1: 0.0}, {0: 0.5, 1: 3.0}], ids=str)
@pytest.mark.parametrize(("outputs", "make", "targets"), WEIGHTED)
def test_gradients_of_losses_with_class_weights_equal_finite_differences(backend, rng, outputs, make, targets, weights):
    x = rng.normal(size=(7, outputs))
    model = xpnet.Sequential([layers.Dense(outputs)], input_shape=outputs, backend=backend)
    errors = xpnet.check_gradients(model, x, targets_of(rng, targets, x), loss=make(weights), inputs=True)
    assert max(errors.values()) < TOLERANCE


# Published numbers. Each test also asserts that slightly different weights give other numbers.


def net(backend, *stack, features=2):
    return xpnet.Sequential(stack, input_shape=features, backend=backend, dtype="float64")


def dense(weight, bias):
    weight = np.array(weight, dtype=float)
    return layers.Dense(weight.shape[1], weight_initializer=weight, bias_initializer=bias)


def assert_published(model, results, rel, nudge=1e-3):
    """Assert that `results(model)`, [(got, published)], are equal, and all unequal after a change of the weights."""
    for got, published in results(model):
        assert got == pytest.approx(published, rel=rel, abs=0)
    model.parameters[0].value += nudge
    assert all(got != pytest.approx(published, rel=rel, abs=0) for got, published in results(model))


def test_a_neuron_has_the_published_output(backend):
    neuron = net(backend, dense([[0], [1]], 4.0), layers.Sigmoid())
    assert_published(neuron, lambda m: [(m.predict([[2, 3]]).item(), 0.9990889488055994)], rel=1e-15)


def test_a_two_two_one_net_has_the_published_outputs(backend):
    hidden = layers.Sequential([dense([[0, 0], [1, 1]], 0.0), layers.Sigmoid()])

    def results(model):
        out = model.predict([[2, 3]]).item()
        after_hidden = backend.to_numpy(model.layers[0].forward(backend.asarray([[2.0, 3.0]])))
        return [
            (after_hidden[0, 0], 0.9525741268224334),
            (after_hidden[0, 1], 0.9525741268224334),
            (out, 0.7216325609518421),
        ]

    assert_published(net(backend, hidden, dense([[0], [1]], 0.0), layers.Sigmoid()), results, rel=1e-15)


def test_a_two_two_one_net_has_the_published_gradient(backend):
    def results(model):
        out = backend.to_numpy(model.forward([[-2, -1]]))
        model.backward(2 * (out - 1))  # MSE of one output against y = 1
        return [(out.item(), 0.5237), (float(model.parameters[0].grad[0, 0]), 0.0214695)]

    ones = [dense(np.ones((2, 2)), 0.0), layers.Sigmoid(), dense([[1], [1]], 0.0), layers.Sigmoid()]
    assert_published(net(backend, *ones), results, rel=5e-5)


def test_the_mean_squared_error_of_four_samples():
    assert losses.MeanSquaredError()([[1], [0], [0], [1]], [[0], [0], [0], [0]]) == 0.5


X_OR, Y_OR = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], float), np.array([[0], [1], [1], [1]], float)


def or_gate(backend, w=(0.1, 0.6)):
    return net(backend, dense(np.array([w]).T, 0.0), layers.Sigmoid())


def step(model, x, y, rate=1.0):
    """(cost before, ∂L/∂w, ∂L/∂b) of one update."""
    cost = model.train_on_batch(x, y, loss=losses.HalfSquaredError(), optimizer=optimizers.SGD(rate))["loss"]
    return cost, *(model.backend.to_numpy(p.grad).ravel().tolist() for p in model.parameters)


def test_or_gate_learns_one_sample_as_published(backend):
    model = or_gate(backend)
    assert model.predict([[0, 0]]).item() == 0.5
    assert step(model, X_OR[:1], Y_OR[:1]) == (0.125, [0, 0], [0.125])
    assert model.parameters[1].value.item() == -0.125
    assert model.predict([[0, 0]]).item() == pytest.approx(0.46879, abs=5e-6)
    assert model.evaluate(X_OR[:1], Y_OR[:1])["loss"] == pytest.approx(0.10988, abs=5e-6)


@pytest.mark.parametrize("nudge", [0.0, 1e-3])
def test_or_gate_learns_in_batches_as_published(backend, nudge):
    model = or_gate(backend, (0.1 + nudge, 0.6))
    got = np.hstack([np.hstack(step(model, X_OR, Y_OR)) for _ in range(2)])
    published = [0.0889129, -0.048006, -0.038659, -0.037024, 0.0840096, -0.044287, -0.035004, -0.031313]
    assert (np.abs(got - published) < 6e-7).all() == (nudge == 0)
    assert (np.abs(got - published) < 6e-7).any() == (nudge == 0)


@pytest.mark.parametrize(
    ("rate", "cost"), [(5e-10, 0.088913), (0.5, 0.001126), (1, 0.0005276), (5, 0.000097), (1000, 0.125)]
)
def test_or_gate_has_the_published_cost_after_5000_epochs(rate, cost):
    model = or_gate("cpu")
    kwargs = {"loss": "half_squared_error", "epochs": 5000, "batch_size": None, "verbose": 0}
    history = model.fit(X_OR, Y_OR, optimizer=optimizers.SGD(rate), **kwargs)
    assert history["loss"][-1] == pytest.approx(cost, abs=6e-7)
    if rate == 1:
        np.testing.assert_allclose(model.parameters[0].value.ravel(), [6.4342, 6.4342], atol=5e-5)
        assert model.parameters[1].value.item() == pytest.approx(-2.9730, abs=5e-5)


def test_or_gate_overshoots_at_a_learning_rate_of_50():
    model = or_gate("cpu")
    assert step(model, X_OR, Y_OR, 50)[0] == pytest.approx(0.088913, abs=6e-7)
    assert model.evaluate(X_OR, Y_OR)["loss"] == pytest.approx(0.093409, abs=6e-7)


def test_a_three_three_one_net_has_the_published_outputs(backend):
    def results(model):
        out = model.predict([[1.5, 2, 3]]).item()
        hidden = backend.to_numpy(model.layers[0].forward(backend.asarray([[1.5, 2.0, 3.0]]))).round(4)
        return [*zip(hidden[0].tolist(), [0.8909, 0.9677, 0.9910], strict=True), (out, 0.8354557)]

    hidden = layers.Sequential([dense(np.outer(np.ones(3), [0.2, 0.4, 0.6]), 0.8), layers.Sigmoid()])
    model = net(backend, hidden, dense([[0.5]] * 3, 0.2), layers.Sigmoid(), features=3)
    assert_published(model, results, rel=1e-7, nudge=0.1)


# Rosenblatt's perceptron


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_step_with_half_squared_error_equals_the_perceptron_bit_for_bit(backend, dtype, seed):
    number = np.dtype(dtype).type
    x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype)
    y = np.array([[0], [0], [0], [1]], dtype)
    w = np.random.default_rng(seed).uniform(0, 1, 2).astype(dtype)
    b, rate = number(0), number(0.1)
    model = xpnet.Sequential(
        [layers.Dense(1, weight_initializer=w[:, None]), layers.Step(2.0)], 2, backend, dtype=dtype
    )
    mistakes = 1
    for _ in range(100):
        mistakes_before, mistakes = mistakes, 0
        for sample, target in zip(x, y[:, 0], strict=True):
            error = target - number(sample[0] * w[0] + sample[1] * w[1] + b >= 2)
            w, b = w + rate * error * sample, b + rate * error
            mistakes += int(error != 0)
            model.train_on_batch(sample[None], [target], loss="half_squared_error", optimizer=optimizers.SGD(0.1))
            assert model.parameters[0].value.ravel().tolist() == w.tolist()
            assert model.parameters[1].value.item() == b
        if not mistakes:
            break
    assert mistakes == 0
    assert mistakes_before > 0
    np.testing.assert_array_equal(model.predict(x), y)


def test_finite_differences_find_a_wrong_sign(backend, rng, monkeypatch):
    monkeypatch.setattr(layers.Tanh, "backward", lambda self, grad: -grad)
    model = xpnet.Sequential([layers.Dense(2), layers.Tanh()], input_shape=2, backend=backend)
    errors = xpnet.check_gradients(model, rng.normal(size=(3, 2)), rng.normal(size=(3, 2)))
    assert min(errors.values()) > 0.1
    assert math.isfinite(sum(errors.values()))
