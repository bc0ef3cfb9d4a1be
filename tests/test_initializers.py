"""Initializers: their distributions, fans and seeds."""

import math

import numpy as np
import pytest
from names import stable_repr
from small_models import dense_net

import xpnet
from xpnet import initializers, layers
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError


def draw(spec, shape, seed=0):
    return initializers.get(spec)(shape, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("shape", "fans"),
    [((5,), (1, 5)), ((4, 5), (4, 5)), ((3, 2, 4, 5), (24, 30)), ((3, 3, 1, 8), (9, 72)), ((1, 1), (1, 1))],
)
def test_fans_include_the_window_of_a_convolution(shape, fans):
    assert initializers.fans(shape) == fans


# name, variance as a function of (fan_in, fan_out), whether the distribution is uniform
SCALED = [
    ("glorot_uniform", lambda i, o: 2 / (i + o), True),
    ("glorot_normal", lambda i, o: 2 / (i + o), False),
    ("he_uniform", lambda i, o: 2 / i, True),
    ("he_normal", lambda i, o: 2 / i, False),
    ("lecun_uniform", lambda i, o: 1 / i, True),
    ("lecun_normal", lambda i, o: 1 / i, False),
]


@pytest.mark.parametrize(("shape", "fan_in", "fan_out"), [((200, 300), 200, 300), ((3, 5, 40, 90), 600, 1350)], ids=str)
@pytest.mark.parametrize(("name", "variance", "uniform"), SCALED)
def test_scaled_initializers_have_mean_zero_and_the_published_variance(name, variance, uniform, shape, fan_in, fan_out):
    w, var = draw(name, shape), variance(fan_in, fan_out)
    spread = math.sqrt(2 * var**2 / w.size)  # upper bound of the standard deviation of a sample variance
    assert w.dtype == np.float64
    assert w.shape == shape
    assert abs(w.mean()) < 5 * math.sqrt(var / w.size)
    assert abs(w.var() - var) < 5 * spread
    fourth = (w**4).mean() / var**2
    assert fourth == pytest.approx(1.8 if uniform else 3.0, rel=0.05)  # the kurtosis distinguishes both distributions
    if uniform:
        assert 0.999 * math.sqrt(3 * var) < np.abs(w).max() <= math.sqrt(3 * var)


def test_uniform_and_normal_have_the_requested_bounds_and_moments():
    w = draw(initializers.Uniform(0, 1), (300, 300))
    assert 0 <= w.min() < 1e-3
    assert 1 - 1e-3 < w.max() < 1
    assert w.mean() == pytest.approx(0.5, abs=5 / math.sqrt(12 * w.size))
    w = draw(initializers.Normal(2, 0.1), (300, 300))
    assert w.mean() == pytest.approx(2, abs=5 * 0.1 / 300)
    assert w.std() == pytest.approx(0.1, rel=0.02)
    assert np.abs(draw("uniform", (300, 300))).max() <= 0.05
    assert draw("normal", (300, 300)).std() == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize("shape", [(6, 6), (8, 3), (3, 8), (3, 3, 2, 5), (2, 1, 2, 9)], ids=str)
@pytest.mark.parametrize("gain", [1.0, 2.5])
def test_orthogonal_has_orthonormal_rows_or_columns_times_gain(shape, gain):
    w = draw(initializers.Orthogonal(gain), shape)
    assert w.shape == shape
    matrix = w.reshape(-1, shape[-1])
    small = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    np.testing.assert_allclose(small, gain**2 * np.eye(len(small)), atol=1e-12)


def test_orthogonal_is_uniform_over_rotations_and_reflections():
    draws = np.array([draw("orthogonal", (2, 2), seed) for seed in range(400)])
    assert abs(draws.mean(axis=0)).max() < 5 * math.sqrt(0.5 / 400)  # the signs of R make both signs equally likely
    assert 150 < (np.linalg.det(draws) > 0).sum() < 250


def test_constants_are_one_number_or_a_whole_array():
    assert draw("zeros", (2, 2)).tolist() == [[0, 0], [0, 0]]
    assert draw("ones", (2,)).tolist() == [1, 1]
    assert draw(0.5, (2,)).tolist() == [0.5, 0.5]
    assert draw([[1, 2], [3, 4]], (2, 2)).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ShapeError, match=r"array has shape \(2,\), but the parameter's is \(2, 2\)"):
        draw([1, 2], (2, 2))


def test_a_constant_array_is_copied():
    values = np.ones((1, 2))
    model = xpnet.Sequential([layers.Dense(2, weight_initializer=values)], 1, "cpu", dtype="float64")
    model.parameters[0].value += 1
    assert values.tolist() == [[1, 1]]


# Seeds

NAMES = ["uniform", "normal", "orthogonal", *(name for name, *_ in SCALED)]


def weights(backend="cpu", extra=0, **kwargs):
    stack = [layers.Dense(8, weight_initializer=name) for name in NAMES] + [layers.Dense(8) for _ in range(extra)]
    model = xpnet.Sequential(stack, input_shape=8, backend=backend, **kwargs)
    return model.state_dict()


def equal(a, b):
    return [np.array_equal(a[f"{i}.weight"], b[f"{i}.weight"]) for i in range(len(NAMES))]


def test_equal_seeds_give_equal_weights_on_every_device(backend):
    assert all(equal(weights(backend, seed=3), weights("cpu", seed=3)))


def test_different_seeds_give_different_weights():
    assert not any(equal(weights(seed=3), weights(seed=4)))


def test_an_additional_layer_does_not_change_the_others():
    assert all(equal(weights(), weights(extra=1)))


def test_two_layers_of_one_model_start_differently():
    model = xpnet.Sequential([layers.Dense(4), layers.Dense(4)], input_shape=4, backend="cpu")
    assert not np.array_equal(model.state_dict()["0.weight"], model.state_dict()["1.weight"])


def test_initial_float32_weights_are_the_rounded_float64_weights(backend):
    single, double = weights(backend), weights(backend, dtype="float64")
    for name, value in double.items():
        assert single[name].dtype == np.float32
        np.testing.assert_array_equal(single[name], value.astype("float32"))


def test_a_layer_outside_a_model_uses_its_seed():
    weights = []
    for seed in (0, 0, 1):
        layer = layers.Dense(3)
        layer.build((4,), backend="cpu", seed=seed)
        weights.append(layer.weight.value.tolist())
    assert weights[0] == weights[1] != weights[2]


def test_a_model_without_a_seed_draws_one_and_keeps_it():
    first, second = (xpnet.Sequential([layers.Dense(3)], 2, "cpu", seed=None) for _ in range(2))
    assert first.seed != second.seed
    repeated = xpnet.Sequential([layers.Dense(3)], 2, "cpu", seed=first.seed)
    np.testing.assert_array_equal(repeated.state_dict()["0.weight"], first.state_dict()["0.weight"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: initializers.Uniform(1, 0),
            ArgumentError,
            "Uniform: high must be a finite number of at least 1, not 0",
        ),
        (lambda: initializers.Uniform(math.nan, 0), ArgumentError, "Uniform: low must be a finite number, not nan"),
        (
            lambda: initializers.Normal(0, -1),
            ArgumentError,
            "Normal: std must be a finite number of at least 0, not -1",
        ),
        (
            lambda: initializers.get("glorot"),
            ArgumentError,
            "unknown initializer 'glorot'. Did you mean .*glorot_normal",
        ),
        (lambda: initializers.get(initializers.HeNormal), ArgumentTypeError, r"pass an object, HeNormal\(...\)"),
    ],
)
def test_invalid_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_initializers_with_equal_settings_are_equal():
    assert initializers.Normal(0, 1) == initializers.Normal(0, 1) != initializers.Normal(0, 2)
    assert initializers.get("he_normal") == initializers.HeNormal() != initializers.HeUniform()
    assert initializers.Constant(np.ones(2)) == initializers.Constant([1.0, 1.0]) != initializers.Constant(1.0)
    assert initializers.Constant(1.0) != initializers.Ones()


@pytest.mark.parametrize("bad", [None, lambda shape, rng: np.zeros(shape), np.array(["a"]), object(), 1j])
@pytest.mark.parametrize("argument", ["weight_initializer", "bias_initializer"])
def test_an_initializer_must_return_numbers(bad, argument):
    with pytest.raises(ArgumentTypeError, match="initializer"):
        dense_net(**{argument: bad})


def built(initializer, dtype="float32"):
    stack = [layers.Dense(3, weight_initializer=initializer)]
    return xpnet.Sequential(stack, (4,), "cpu", dtype=dtype).state_dict()["0.weight"]


@pytest.mark.parametrize(
    "value",
    [np.nan, np.inf, -np.inf, np.full((4, 3), np.nan), None, True, 1j, "he", np.ones((4, 3), complex), [[1], [2, 3]],
     np.ma.masked_array(np.ones((4, 3)), mask=True), lambda shape, rng: np.ones(shape), 1e300],
    ids=stable_repr,
)  # fmt: skip
def test_only_finite_numbers_initialize_a_weight(value):
    with pytest.raises((ArgumentError, ArgumentTypeError)):
        built(value)


class Own(initializers.Initializer):
    def __init__(self, function):
        self.function = function

    def __call__(self, shape, rng):
        return self.function(shape)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda shape: np.ones(shape[::-1]), ShapeError, r"^0.weight: Own.*shape \(4, 3\), but returned \(3, 4\)"),
        (lambda shape: np.ones(12), ShapeError, r"\(4, 3\), but returned \(12,\)"),
        (lambda shape: np.float64(1.0), ArgumentTypeError, "returned a float64"),
        (lambda shape: 1.0, ArgumentTypeError, "returned a float"),
        (lambda shape: None, ArgumentTypeError, "returned a NoneType"),
        (lambda shape: np.ones(shape).tolist(), ArgumentTypeError, "returned a list"),
        (lambda shape: np.ones(shape, complex), ArgumentTypeError, "returned an array of complex128"),
        (lambda shape: np.ones(shape, object), ArgumentTypeError, "returned an array of object"),
        (lambda shape: np.ma.masked_all(shape), ArgumentTypeError, "returned a MaskedArray"),
        (lambda shape: np.full(shape, np.nan), ArgumentError, "NaN or infinite in float32"),
        (lambda shape: np.full(shape, 1e300), ArgumentError, "NaN or infinite in float32"),
    ],
)
def test_what_an_initializer_of_ones_own_returns_is_checked(function, error, message):
    with pytest.raises(error, match=message):
        built(Own(function))


@pytest.mark.parametrize("order", ["transposed", "Fortran", "strided", "integers", "float32"])
def test_an_initializer_may_return_any_memory_layout_and_real_dtype(order):
    want = np.arange(12.0).reshape(4, 3)
    arrays = {
        "transposed": np.ascontiguousarray(want.T).T,
        "Fortran": np.asfortranarray(want),
        "strided": np.repeat(want, 2, axis=1)[:, ::2],
        "integers": want.astype("int32"),
        "float32": want.astype("float32"),
    }
    np.testing.assert_array_equal(built(Own(lambda shape: arrays[order])), want)
    np.testing.assert_array_equal(built(arrays[order]), want)


def test_a_weight_too_large_for_float32_is_allowed_in_float64():
    assert built(1e300, "float64")[0, 0] == 1e300
