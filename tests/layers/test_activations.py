"""Activations: values, derivatives, limits at infinity, NaN, and large numbers without warnings."""

import math

import numpy as np
import pytest

from xpnet import get_backend, layers
from xpnet.errors import ArgumentError, StateError
from xpnet.layers import activations

INF, NAN = math.inf, math.nan


def phi(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def logistic(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def gelu_tanh(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def hard_sigmoid(x):
    return min(max(x + 3, 0), 6) / 6


def softplus(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


# layer, its formula on Python floats, its limits at -inf and inf
CASES = [
    (layers.Identity(), lambda x: x, -INF, INF),
    (layers.Sigmoid(), logistic, 0, 1),
    (layers.Tanh(), math.tanh, -1, 1),
    (layers.ReLU(), lambda x: max(x, 0), 0, INF),
    (layers.LeakyReLU(), lambda x: x if x > 0 else 0.01 * x, -INF, INF),
    (layers.LeakyReLU(0.3), lambda x: x if x > 0 else 0.3 * x, -INF, INF),
    (layers.ELU(), lambda x: x if x > 0 else math.expm1(x), -1, INF),
    (layers.ELU(alpha=0.5), lambda x: x if x > 0 else 0.5 * math.expm1(x), -0.5, INF),
    (layers.PReLU(weight_initializer=0.3), lambda x: x if x > 0 else 0.3 * x, -INF, INF),
    (layers.PReLU(shared=True), lambda x: x if x > 0 else 0.25 * x, -INF, INF),
    (layers.ReLU6(), lambda x: min(max(x, 0), 6), 0, 6),
    (layers.HardTanh(), lambda x: min(max(x, -1), 1), -1, 1),
    (layers.HardTanh(-2.0, INF), lambda x: max(x, -2), -2, INF),
    (layers.HardSigmoid(), hard_sigmoid, 0, 1),
    (layers.HardSwish(), lambda x: x * hard_sigmoid(x), 0, INF),
    (layers.Mish(), lambda x: x * math.tanh(softplus(x)), 0, INF),
    (layers.GELU(), lambda x: x * phi(x), 0, INF),
    (layers.GELU(approximate="tanh"), gelu_tanh, 0, INF),
    (layers.SiLU(), lambda x: x * logistic(x), 0, INF),
    (layers.Softplus(), softplus, 0, INF),
]


def test_every_activation_has_a_case():
    tested = {type(layer) for layer, *_ in CASES} | {layers.Step, layers.Softmax, layers.LogSoftmax}  # tested below
    defined = [cls for cls in vars(activations).values() if getattr(cls, "__module__", "") == activations.__name__]
    assert {cls for cls in defined if not cls.__name__.startswith("_")} <= tested


def negative_slope(layer):
    """The slope of an activation that has no lower limit, for x < 0."""
    return getattr(layer, "negative_slope", getattr(layer, "weight_initializer", 1.0))


each_activation = pytest.mark.parametrize(
    ("layer", "formula", "low", "high"), CASES, ids=lambda c: repr(c) if hasattr(c, "forward") else ""
)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def run(layer, backend, x, dtype="float64", grad=None):
    """(y, ∂L/∂x) on the host, from a new layer with the same configuration; grad is ∂L/∂y, ones by default."""
    layer = type(layer)(**layer.get_config())
    x = np.asarray(x, dtype=dtype)
    assert layer.build(x.shape[1:], backend=backend, dtype=dtype) == x.shape[1:]
    y = backend.to_numpy(layer.forward(backend.asarray(x))).copy()
    grad = np.ones_like(x) if grad is None else np.asarray(grad, dtype=dtype)
    return y, backend.to_numpy(layer.backward(backend.asarray(grad)))


@each_dtype
@each_activation
def test_values_equal_the_formula(backend, rng, layer, formula, low, high, dtype):
    x = np.concatenate([np.linspace(-9, 9, 181), rng.normal(size=100)]).astype(dtype)
    y, _ = run(layer, backend, x[:, None], dtype)
    want = np.array([formula(value) for value in x.tolist()])
    tolerance = 200 if isinstance(layer, layers.GELU) else 8  # for large x, GELU computes the exponential of x²
    # Where tanh is near -1, the published approximation of GELU keeps only its absolute accuracy.
    atol = np.finfo(dtype).eps if getattr(layer, "approximate", "") == "tanh" else 0
    np.testing.assert_allclose(y[:, 0], want, rtol=tolerance * np.finfo(dtype).eps, atol=4 * atol)
    assert y.dtype == dtype


@each_dtype
@each_activation
def test_nan_stays_nan_and_infinities_go_to_the_limits(backend, layer, formula, low, high, dtype):
    y, _ = run(layer, backend, [[NAN, -INF, INF]], dtype)
    np.testing.assert_array_equal(y, [[NAN, low, high]])


@each_dtype
@each_activation
def test_large_inputs_give_the_exact_limits_without_a_warning(backend, layer, formula, low, high, dtype):
    y, grad_x = run(layer, backend, [[-1e4, 1e4]], dtype)
    slope = negative_slope(layer)
    want = np.array([[-1e4 * slope if low == -INF else low, 1e4 if high == INF else high]], dtype)
    np.testing.assert_allclose(y, want, rtol=np.finfo(dtype).eps, atol=0)
    np.testing.assert_allclose(grad_x, [[slope if low == -INF else 0, float(high == INF)]], rtol=np.finfo(dtype).eps)


@each_dtype
@each_activation
def test_derivatives_are_finite_even_at_infinity(backend, layer, formula, low, high, dtype):
    _, grad_x = run(layer, backend, [[-INF, -80, -10, -1e-30, 0, 1e-30, 10, 80, INF]], dtype)
    assert np.isfinite(grad_x).all()


@each_activation
def test_inputs_and_gradients_are_not_modified(backend, rng, layer, formula, low, high):
    x, grad = rng.normal(size=(2, 3, 4))
    before = x.copy(), grad.copy()
    run(layer, backend, x, grad=grad)
    np.testing.assert_array_equal(np.array([x, grad]), np.array(before))


def test_relu_passes_the_gradient_where_the_input_is_nan(backend):
    _, grad_x = run(layers.ReLU(), backend, [[NAN, -1, 0, 1]])
    np.testing.assert_array_equal(grad_x, [[1, 0, 0, 1]])


@pytest.mark.parametrize("threshold", [0.0, 2.0, -1.5])
def test_step_is_one_at_and_above_its_threshold(backend, threshold):
    x = [[threshold - 1, np.nextafter(threshold, -9), threshold, np.nextafter(threshold, 9), INF, -INF]]
    y, _ = run(layers.Step(threshold), backend, x)
    assert y.tolist() == [[0, 0, 1, 1, 1, 0]]


def test_step_passes_the_gradient_unchanged(backend, rng):
    grad = rng.normal(size=(3, 4))
    _, grad_x = run(layers.Step(0.5), backend, rng.normal(size=(3, 4)), grad=grad)
    np.testing.assert_array_equal(grad_x, grad)


@each_dtype
@pytest.mark.parametrize("layer", [layers.Softmax(), layers.LogSoftmax()], ids=repr)
def test_softmaxes_are_exact_for_large_logits(backend, layer, dtype):
    x = [[1e4, 0, -1e4], [1e4, 1e4, -1e4], [-1e4, -1e4, -1e4], [1e4 - 1, 1e4, -INF]]
    e = math.e
    want = np.array([[1, 0, 0], [0.5, 0.5, 0], [1 / 3] * 3, [1 / (1 + e), e / (1 + e), 0]])
    if isinstance(layer, layers.LogSoftmax):
        want = np.log(np.where(want, want, 1))
        want[0], want[1, 2], want[3, 2] = [0, -1e4, -2e4], -2e4 - math.log(2), -INF
    y, grad_x = run(layer, backend, x, dtype)
    np.testing.assert_allclose(y, want, rtol=2 * np.finfo(dtype).eps, atol=0)
    assert np.isfinite(grad_x).all()


def test_softmax_sums_to_one_over_the_last_axis(backend, rng):
    x = rng.normal(size=(2, 3, 5))
    y, _ = run(layers.Softmax(), backend, x)
    np.testing.assert_allclose(y.sum(axis=-1), 1, rtol=1e-15)
    shifted, _ = run(layers.Softmax(), backend, x + np.arange(6).reshape(2, 3, 1))
    np.testing.assert_allclose(shifted, y, rtol=1e-14)
    logs, _ = run(layers.LogSoftmax(), backend, x)
    np.testing.assert_allclose(np.exp(logs), y, rtol=1e-14)


@pytest.mark.parametrize("layer", [layers.Softmax(), layers.LogSoftmax()], ids=repr)
def test_softmaxes_keep_nan_in_its_row(backend, layer):
    y, _ = run(layer, backend, [[1, NAN, 2], [1, 2, 3]])
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


def test_only_softmax_and_sigmoid_give_probabilities():
    every = [case[0] for case in CASES] + [layers.Softmax(), layers.LogSoftmax(), layers.Step()]
    assert {type(layer).__name__ for layer in every if layer.gives_probabilities} == {"Sigmoid", "Softmax"}


def test_gelu_refuses_an_unknown_approximation():
    with pytest.raises(ArgumentError, match='"none" or "tanh", not \'fast\''):
        layers.GELU("fast")


def test_backward_before_forward_is_refused():
    layer = layers.Sigmoid()
    layer.build((2,), backend="cpu")
    with pytest.raises(StateError, match=r"backward uses work\.\w+, but .* no forward pass came before"):
        layer.backward(np.ones((1, 2)))


def test_step_keeps_nan(backend):
    assert np.isnan(run(layers.Step(), backend, [[NAN]])[0]).all()


@each_dtype
@each_activation
def test_the_largest_finite_numbers_cause_no_warning(layer, formula, low, high, dtype):
    largest = float(np.finfo(dtype).max)
    y, grad_x = run(layer, get_backend("cpu"), [[-largest, largest]], dtype)
    slope = np.dtype(dtype).type(negative_slope(layer))
    np.testing.assert_array_equal(y, [[-largest * slope if low == -INF else low, largest if high == INF else high]])
    assert np.isfinite(grad_x).all()


def test_leaky_relu_with_slope_zero_is_finite_at_minus_infinity():
    y, grad_x = run(layers.LeakyReLU(0.0), get_backend("cpu"), [[NAN, -INF, INF]], grad=[[1, 1, INF]])
    np.testing.assert_array_equal(y, [[NAN, 0, INF]])
    np.testing.assert_array_equal(grad_x, [[0, 0, INF]])
