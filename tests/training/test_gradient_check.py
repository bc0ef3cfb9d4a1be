"""check_gradients: it finds wrong gradients, changes nothing, and refuses invalid arguments."""

import copy

import numpy as np
import pytest
from custom_layers import Counted
from small_models import LABELS, SAMPLES, assert_same_state, gradients_of, small_net

import xpnet
from xpnet import layers, losses
from xpnet.errors import ArgumentError, ShapeError


@pytest.mark.parametrize("bad", [{"samples": 0}, {"samples": -1}, {"samples": 2.5}, {"step": 0}, {"step": -1e-5}])
def test_invalid_numbers_of_samples_and_steps_are_refused(bad):
    (name,) = bad
    with pytest.raises(ArgumentError, match=name):
        xpnet.check_gradients(small_net(), SAMPLES, SAMPLES[:, :2], **bad)


def test_integer_inputs_have_no_gradient_to_check():
    model = xpnet.Sequential([layers.Embedding(5, 3), layers.Flatten(), layers.Dense(1)], (4,), "cpu")
    wrong = xpnet.check_gradients(model, np.zeros((6, 4), int), np.ones((6, 1)), inputs=True)
    assert list(wrong) == ["0.weight", "2.weight", "2.bias"]
    assert max(wrong.values()) < 1e-6


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        ("softmax_cross_entropy", LABELS),
        (losses.SoftmaxCrossEntropy(class_weight={1: 3.0}), LABELS),
        ("mse", np.eye(2)[LABELS]),
        (losses.HalfSquaredError("sum"), np.eye(2)[LABELS]),
        ("binary_cross_entropy", np.eye(2)[LABELS]),
    ],
)
def test_check_gradients_accepts_correct_gradients_and_restores_the_model(backend, loss, y):
    model = xpnet.Sequential(
        [layers.Dense(5, l1=0.01, l2=0.02), layers.Tanh(), layers.Dropout(0.4), layers.Dense(2)], (4,), backend
    )
    model.fit(SAMPLES, y, loss=loss, verbose=0)
    before, state = copy.deepcopy(model), gradients_of(model)
    errors = xpnet.check_gradients(model, SAMPLES, y, loss=loss, inputs=True)
    assert list(errors) == ["0.weight", "0.bias", "3.weight", "3.bias", "inputs"]
    assert max(errors.values()) < 1e-8 and all(type(e) is float for e in errors.values())
    assert_same_state(model.state_dict(), before.state_dict())
    assert model.dtype == "float32" and model.backend is backend
    for name, value in gradients_of(model).items():
        np.testing.assert_array_equal(value, state[name])


@pytest.mark.parametrize("wrong", ["input", "weight"])
def test_check_gradients_reports_a_wrong_backward(backend, wrong):
    class Wrong(Counted):
        def backward(self, grad_y):
            grad_x = super().backward(grad_y)
            if wrong == "weight":
                self.gain.grad[...] *= 1.01
            return grad_x * 1.01 if wrong == "input" else grad_x

    model = xpnet.Sequential([layers.Dense(5), Wrong(), layers.Tanh(), layers.Dense(2)], (4,), backend)
    errors = xpnet.check_gradients(model, SAMPLES, LABELS, loss="softmax_cross_entropy")
    suspects = {"0.weight", "0.bias"} if wrong == "input" else {"1.gain"}
    assert {name for name, error in errors.items() if error > 1e-3} == suspects
    assert all(error < 1e-8 for name, error in errors.items() if name not in suspects)


def test_check_gradients_of_inputs_accepts_a_transposed_array(backend, rng):
    model = xpnet.Sequential([layers.Dense(3)], input_shape=4, backend=backend)
    x, y = rng.normal(size=(4, 7)).T, rng.normal(size=(7, 3))
    assert max(xpnet.check_gradients(model, x, y, inputs=True).values()) < 1e-6


def test_check_gradients_does_not_change_the_model_or_the_data(backend, rng):
    model = xpnet.Sequential([layers.Dense(3), layers.Dropout(0.5)], input_shape=4, backend=backend)
    x, y = rng.normal(size=(5, 4)), rng.normal(size=(5, 3))
    before, x_before = model.state_dict(), x.copy()
    xpnet.check_gradients(model, x, y, inputs=True)
    assert model.dtype == "float32"
    np.testing.assert_array_equal(x, x_before)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("initial", ["ones", "zeros", 0.5])
@pytest.mark.parametrize("shape", [(1,), (3,)])
def test_a_forgotten_factor_is_found_whatever_the_initial_value_is(backend, initial, shape, rng):
    class Scale(layers.Layer):
        def __init__(self, factor_in_backward):
            self.factor_in_backward = factor_in_backward

        def build(self, input_shape):
            self.weight = self.add_parameter("weight", shape, initial)
            return input_shape

        def forward(self, x):
            self.work.x = x
            return self.xp.multiply(x, 1.0 + self.weight.value, out=self.work.buffer("y", x.shape))

        def backward(self, grad_y):
            product = self.work.x * grad_y
            self.weight.grad[...] = product.sum(axis=0) if self.weight.shape != (1,) else product.sum()
            return grad_y * (1.0 + self.weight.value) if self.factor_in_backward else grad_y * 1.0

    x, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    for right in (True, False):
        model = xpnet.Sequential([layers.Dense(3), Scale(right), layers.Dense(2)], (3,), backend)
        before = model.state_dict()
        wrong = xpnet.check_gradients(model, x, y)
        assert (max(wrong.values()) < 1e-6) is right, wrong
        assert all(np.array_equal(value, before[name]) for name, value in model.state_dict().items())


def test_check_gradients_refuses_an_unknown_loss():
    model = xpnet.Sequential([layers.Dense(1)], input_shape=1, backend="cpu")
    with pytest.raises(ArgumentError, match=r"unknown loss 'msee'. Did you mean 'mse'"):
        xpnet.check_gradients(model, [[1.0]], [[1.0]], loss="msee")


class Faulty(Counted):
    """x · gain, whose backward does `assign(self, gradient of gain)`."""

    def __init__(self, assign):
        self.start, self.inner, self.assign = 2.0, None, assign

    def backward(self, grad_y):
        self.assign(self, self.xp.sum(grad_y * self.work.x, axis=0))
        return grad_y * self.gain.value


def add(layer, grad):
    layer.gain.grad += grad


def add_through_a_view(layer, grad):
    total = layer.gain.grad.reshape(-1)
    total += grad


def forget(layer, grad):
    pass


def write_one_row(layer, grad):
    layer.gain.grad[0] = grad[0]


def write_into_a_copy(layer, grad):
    layer.gain.grad.copy()[...] = grad


def scale_what_is_there(layer, grad):
    layer.gain.grad *= 0.0


@pytest.mark.parametrize("where", [0, 1, 3])
@pytest.mark.parametrize(
    "assign", [add, add_through_a_view, forget, write_one_row, write_into_a_copy, scale_what_is_there]
)
def test_gradients_that_are_not_assigned_are_infinitely_wrong_and_logged(backend, assign, where, caplog):
    inner = [layers.Dense(5), layers.Tanh(), layers.Dense(2)]
    inner.insert(where, Faulty(assign))
    model = xpnet.Sequential(inner, (4,), backend)
    errors = xpnet.check_gradients(model, SAMPLES, LABELS, loss="softmax_cross_entropy", samples=1, inputs=True)
    assert errors.pop(f"{where}.gain") == np.inf
    assert max(errors.values()) < 1e-6
    (message,) = caplog.messages
    assert message.startswith(f"layer {where} (Faulty): backward leaves NaN in the gradient of {where}.gain.")


def test_an_array_that_does_not_fit_a_gradient_is_named(backend):
    class NotSummed(Counted):
        def backward(self, grad_y):
            self.gain.grad[...] = grad_y * self.work.x
            return grad_y * self.gain.value

    model = xpnet.Sequential([NotSummed(), layers.Dense(2)], (4,), backend)
    match = r"layer 0 \(NotSummed\): backward writes .*\(20, 4\) .*\(4,\), .* of gain. Sum over the samples"
    with pytest.raises(ShapeError, match=match):
        xpnet.check_gradients(model, SAMPLES, LABELS, loss="softmax_cross_entropy")
    with pytest.raises(ShapeError, match=match):
        model.fit(SAMPLES, LABELS, verbose=0)


def test_another_error_of_backward_stays_as_it_is():
    class Fails(Counted):
        def backward(self, grad_y):
            raise ValueError("no gradient")

    model = xpnet.Sequential([Fails(), layers.Dense(2)], (4,), "cpu")
    with pytest.raises(ValueError, match=r"^no gradient$"):
        xpnet.check_gradients(model, SAMPLES, LABELS, loss="softmax_cross_entropy")


def replace(layer, grad):
    layer.gain.grad = grad  # writes into the view


def write_through_a_view(layer, grad):
    layer.gain.grad.reshape(-1)[:] = grad


@pytest.mark.parametrize("assign", [replace, write_through_a_view])
def test_gradients_may_be_assigned_in_any_way_that_writes_them(backend, assign):
    model = xpnet.Sequential([Faulty(assign), layers.Tanh(), layers.Dense(2)], (4,), backend)
    errors = xpnet.check_gradients(model, SAMPLES, LABELS, loss="softmax_cross_entropy", inputs=True)
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize("given", [lambda grad: None, lambda grad: grad[:-1], lambda grad: grad * np.nan])
def test_a_missing_gradient_of_the_inputs_is_infinitely_wrong(given):
    class Ends(Counted):
        def backward(self, grad_y):
            return given(super().backward(grad_y))

    model = xpnet.Sequential([Ends(), layers.Dense(2)], (4,), "cpu")
    errors = xpnet.check_gradients(model, SAMPLES, LABELS, loss="softmax_cross_entropy", inputs=True)
    assert errors.pop("inputs") == np.inf and max(errors.values()) < 1e-6


def test_a_layer_whose_gradient_is_missing_in_the_middle_is_named():
    class Ends(Counted):
        def backward(self, grad_y):
            super().backward(grad_y)

    model = xpnet.Sequential([layers.Dense(3), Ends(), layers.Dense(2)], (4,), "cpu")
    with pytest.raises(ShapeError, match=r"layer 1 \(Ends\): backward must return .*\(N, 3\).*None"):
        xpnet.check_gradients(model, SAMPLES, LABELS, loss="softmax_cross_entropy")


def test_a_backward_that_returns_another_shape_in_the_middle_is_named(backend):
    class Cut(Counted):
        def backward(self, grad_y):
            return super().backward(grad_y)[:, :-1].copy()

    model = xpnet.Sequential([layers.Dense(3), Cut(), layers.Dense(2)], (4,), backend)
    with pytest.raises(ShapeError, match=r"layer 1 \(Cut\): backward must return ∂L/∂x, \(N, 3\).*\(\d+, 2\)"):
        xpnet.check_gradients(model, SAMPLES, LABELS, loss="softmax_cross_entropy")


def test_frozen_parameters_without_a_gradient_are_left_out():
    model = xpnet.Sequential([Faulty(forget), layers.Dense(2)], (4,), "cpu")
    model.layers[0].trainable = False
    assert list(xpnet.check_gradients(model, SAMPLES, SAMPLES[:, :2])) == ["1.weight", "1.bias"]
