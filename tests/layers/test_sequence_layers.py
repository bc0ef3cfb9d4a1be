"""Conv1D, pooling of sequences and Masking against loops over steps: values, gradients, masks, and refusals."""

import copy
import functools

import numpy as np
import pytest
from every import LAYERS
from small_models import assert_same_state
from strict import StrictBackend

import xpnet
from xpnet import layers
from xpnet.config import fits
from xpnet.errors import ArgumentError, ShapeError

N, C = 3, 4
CONVOLUTIONS = {
    "one step": ({"kernel_size": 1}, 1),
    "valid": ({"kernel_size": 3}, 7),
    "the whole sequence": ({"kernel_size": 5}, 5),
    "strided": ({"kernel_size": 3, "strides": 2}, 8),
    "same": ({"kernel_size": 4, "padding": "same", "strides": 3}, 7),
    "same, wider than the sequence": ({"kernel_size": 5, "padding": "same", "dilation": 2}, 3),
    "padded": ({"kernel_size": 2, "padding": 3, "strides": 2}, 1),
    "causal": ({"kernel_size": 3, "padding": "causal", "dilation": 2}, 6),
    "causal, strided": ({"kernel_size": 2, "padding": "causal", "strides": 2}, 5),
    "causal, one step": ({"kernel_size": 3, "padding": "causal"}, 1),
    "in groups": ({"kernel_size": 3, "groups": 2, "padding": "same", "use_bias": False}, 5),
    "each channel by itself": ({"kernel_size": 2, "groups": 4, "dilation": 3}, 9),
}
POOLS = {
    "adjacent": ({}, 6),
    "with a remainder": ({"pool_size": 3}, 8),
    "overlapping": ({"pool_size": 3, "strides": 1}, 5),
    "padded": ({"pool_size": 3, "strides": 2, "padding": 1}, 6),
    "same": ({"pool_size": 3, "strides": 2, "padding": "same"}, 5),
    "one step": ({"pool_size": 1}, 1),
    "strides beyond the window": ({"pool_size": 2, "strides": 4}, 9),
}


def geometry(steps, extent, stride, padding):
    """(the number of windows, the zeros before the first step, those after the last)."""
    if padding == "causal":
        before, after = extent - 1, 0
    elif padding == "same":
        total = max((-(-steps // stride) - 1) * stride + extent - steps, 0)
        before, after = total // 2, total - total // 2
    else:
        before = after = 0 if padding == "valid" else padding
    return (steps + before + after - extent) // stride + 1, before, after


def convolved(x, weight, bias, strides=1, padding="valid", dilation=1, groups=1, **_):
    """A convolution by loops over windows, groups and cells."""
    k, ins, filters = weight.shape
    windows, before, after = geometry(x.shape[1], dilation * (k - 1) + 1, strides, padding)
    padded = np.pad(x, ((0, 0), (before, after), (0, 0)))
    y = np.zeros((len(x), windows, filters)) + bias
    for t in range(windows):
        for f in range(filters):
            group = f // (filters // groups)
            for a in range(k):
                seen = padded[:, t * strides + a * dilation, group * ins : (group + 1) * ins]
                y[:, t, f] += seen @ weight[a, :, f]
    return y


def pooled(x, reduce, fill, pool_size=2, strides=None, padding="valid"):
    """`reduce` of each window; the padding holds `fill`."""
    strides = strides or pool_size
    windows, before, after = geometry(x.shape[1], pool_size, strides, padding)
    padded = np.pad(x, ((0, 0), (before, after), (0, 0)), constant_values=fill)
    starts = range(0, windows * strides, strides)
    return np.stack([reduce(padded[:, start : start + pool_size], axis=1) for start in starts], axis=1)


def numeric_gradient(function, x, grad, h=1e-6):
    """∂ Σ grad · function(x) / ∂x, by central differences."""
    result = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        nudge = np.zeros_like(x)
        nudge[i] = h
        result[i] = ((function(x + nudge) - function(x - nudge)) * grad).sum() / (2 * h)
    return result


@pytest.mark.parametrize("steps_known", [True, False], ids=["known length", "open length"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_equals_loops_over_its_windows(backend, rng, name, steps_known):
    arguments, steps = CONVOLUTIONS[name]
    layer, x = layers.Conv1D(8, **arguments, bias_initializer="normal"), rng.normal(size=(N, steps, C))
    shape = layer.build((steps if steps_known else None, C), backend=backend, dtype="float64")
    weight = backend.to_numpy(layer.weight.value)
    bias = backend.to_numpy(layer.bias.value) if layer.use_bias else np.zeros(8)
    assert weight.shape == (arguments["kernel_size"], C // arguments.get("groups", 1), 8)
    want = convolved(x, weight, bias, **arguments)
    assert shape == (want.shape[1] if steps_known else None, 8)
    np.testing.assert_allclose(backend.to_numpy(layer.forward(backend.asarray(x))), want, rtol=1e-12, atol=1e-12)

    grad = rng.normal(size=want.shape)
    grad_x = backend.to_numpy(layer.backward(backend.asarray(grad)))
    expected = numeric_gradient(lambda x: convolved(x, weight, bias, **arguments), x, grad)
    np.testing.assert_allclose(grad_x, expected, rtol=1e-7, atol=1e-8)
    expected = numeric_gradient(lambda w: convolved(x, w, bias, **arguments), weight, grad)
    np.testing.assert_allclose(backend.to_numpy(layer.weight.grad), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", POOLS)
def test_pooling_equals_loops_over_its_windows(backend, rng, name):
    arguments, steps = POOLS[name]
    x = rng.permutation(N * steps * C).reshape(N, steps, C) / 10.0
    means = {
        "AvgPool1D": (layers.AvgPool1D(**arguments), lambda x: pooled(x, np.mean, 0.0, **arguments)),
        "without the padding": (
            layers.AvgPool1D(**arguments, count_include_pad=False),
            lambda x: pooled(x, np.nanmean, np.nan, **arguments),
        ),
        "MaxPool1D": (layers.MaxPool1D(**arguments), lambda x: pooled(x, np.max, -np.inf, **arguments)),
    }
    for layer, formula in means.values():
        want = formula(x)
        assert layer.build((None, C), backend=backend, dtype="float64") == (None, C)
        np.testing.assert_allclose(backend.to_numpy(layer.forward(backend.asarray(x))), want, rtol=1e-12)
        grad = rng.normal(size=want.shape)
        got = backend.to_numpy(layer.backward(backend.asarray(grad)))
        np.testing.assert_allclose(got, numeric_gradient(formula, x, grad, h=1e-4), rtol=1e-7, atol=1e-8)


def test_a_causal_output_does_not_depend_on_later_steps(backend, rng):
    layer, x = layers.Conv1D(5, 3, padding="causal", dilation=2), rng.normal(size=(N, 8, C))
    layer.build((None, C), backend=backend, dtype="float64")
    whole = backend.to_numpy(layer.forward(backend.asarray(x)))
    for end in (1, 5):
        part = backend.to_numpy(layer.forward(backend.asarray(x[:, :end].copy())))
        np.testing.assert_allclose(part, whole[:, :end], rtol=1e-12, atol=1e-14)


# Masks -------------------------------------------------------------------------------------------------------------

LENGTHS = np.array([5, 2, 0, 3])
COUNTED = np.arange(5) < LENGTHS[:, None]
POOLING = {
    layers.GlobalAveragePool1D: lambda steps: steps.mean(axis=0) if len(steps) else np.zeros(C),
    layers.GlobalMaxPool1D: lambda steps: steps.max(axis=0) if len(steps) else np.zeros(C),
}


@pytest.mark.parametrize("kind", POOLING, ids=lambda kind: kind.__name__)
def test_global_pooling_ignores_padded_steps(backend, rng, kind):
    x = rng.normal(size=(4, 5, C))
    x[~COUNTED] = 7.0
    model = xpnet.Sequential([layers.Masking(7.0), kind()], (None, C), backend, dtype="float64")
    want = np.stack([POOLING[kind](x[n, : LENGTHS[n]]) for n in range(4)])
    np.testing.assert_allclose(model.predict(x), want, rtol=1e-12)
    np.testing.assert_allclose(model.predict(x[1:2, :2]), want[1:2], rtol=1e-12)  # without padding, a single sample
    grad = rng.normal(size=(4, C))
    model.forward(x)
    got = backend.to_numpy(model.backward(grad))
    assert not got[~COUNTED].any()
    np.testing.assert_allclose(got.sum(axis=1), grad * (LENGTHS > 0)[:, None], rtol=1e-12, atol=1e-14)
    assert max(xpnet.check_gradients(model, x[:2, :2], grad[:2], inputs=True).values()) < 1e-6


def test_a_step_counts_if_any_feature_differs(backend):
    x = np.array([[[0.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 0.0]]])
    layer = layers.Masking()
    layer.build((None, 2), backend=backend)
    assert backend.to_numpy(layer.start_mask(backend.asarray(x))).tolist() == [[False, True, True, False]]
    np.testing.assert_array_equal(backend.to_numpy(layer.forward(backend.asarray(x))), x)


@pytest.mark.parametrize(
    ("layer", "kept"),
    [
        (layers.Conv1D(C, 3, padding="same"), True),
        (layers.Conv1D(C, 3, padding="causal"), True),
        (layers.Conv1D(C, 1), False),
        (layers.Conv1D(C, 3, 2, padding="same"), False),
        (layers.MaxPool1D(1), False),
        (layers.AvgPool1D(3, 1, "same"), False),
    ],
    ids=repr,
)
def test_convolutions_that_keep_each_step_keep_the_mask(rng, layer, kept):
    x = rng.normal(size=(4, 5, C)) * COUNTED[..., None]
    pooled = xpnet.Sequential([layers.Masking(), layer, layers.GlobalMaxPool1D()], (5, C), "cpu", dtype="float64")
    outputs = xpnet.Model(pooled.inputs, pooled.output_of("1")).predict(x)
    if kept:
        want = [outputs[n, :length].max(axis=0) if length else np.zeros(C) for n, length in enumerate(LENGTHS)]
    else:
        want = outputs.max(axis=1)
    np.testing.assert_allclose(pooled.predict(x), want, rtol=1e-12)


# Training and refusals ---------------------------------------------------------------------------------------------


def net(backend, length=7):
    embedding = layers.Embedding(9, C, padding_index=0)
    inner = [embedding, layers.Conv1D(6, 3, padding="same"), layers.ReLU(), layers.MaxPool1D(2), layers.Conv1D(5, 2)]
    return xpnet.Sequential([*inner, layers.GlobalAveragePool1D(), layers.Dense(3)], (length,), backend)


def test_strict_trains_like_the_reference_bit_for_bit_and_each_device_alike(backend, reference, rng):
    x, y = rng.integers(0, 9, (40, 7)), rng.integers(0, 3, 40)
    one, other = net(backend), net(reference)
    for model in (one, other):
        model.fit(x, y, batch_size=8, epochs=3, verbose=0)
    if isinstance(backend, StrictBackend):
        assert_same_state(one.state_dict(), other.state_dict())
    for name, value in one.state_dict().items():
        np.testing.assert_allclose(value, other.state_dict()[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_model_of_open_length_trains_on_batches_of_each_length(backend, rng):
    model = net(backend, length=None)
    for length in (4, 9, 5):
        x, y = rng.integers(0, 9, (6, length)), rng.integers(0, 3, 6)
        fixed = net(backend, length)
        fixed.load_state_dict(model.state_dict())
        np.testing.assert_allclose(model.predict(x), fixed.predict(x), rtol=1e-5, atol=1e-6)
        losses = [m.train_on_batch(x, y, "softmax_cross_entropy", "sgd")["loss"] for m in (model, fixed)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(ShapeError, match=r"Conv1D\) expects sequences of at least 2 steps.*but the input is one of 1"):
        model.predict(np.ones((2, 3), int))


@pytest.mark.parametrize(
    ("shape", "layer"), LAYERS, ids=[f"{i}-{type(one).__name__}" for i, (_, one) in enumerate(LAYERS)]
)
def test_a_layer_takes_an_open_first_axis_of_any_size_or_refuses_it(rng, shape, layer):
    layer = copy.deepcopy(layer)
    try:
        output_shape = layer.build((None, *shape[1:]), backend="cpu")
    except ShapeError as error:
        assert "(N, T" in str(error)
        return
    for steps in (5, 4):
        x = (
            rng.integers(0, 9, (2, steps, *shape[1:]))
            if layer.accepts_integers
            else rng.normal(size=(2, steps, *shape[1:]))
        )
        x = x if layer.accepts_integers else x.astype("float32")
        y = layer.forward(x)
        assert fits(y.shape[1:], output_shape)
        if not layer.accepts_integers:
            assert layer.backward(np.ones_like(y)).shape == x.shape


@pytest.mark.parametrize("layer", [layers.BatchNorm, functools.partial(layers.GroupNorm, 2), layers.LayerNorm])
def test_normalizations_without_parameters_refuse_an_open_number_of_features(layer):
    with pytest.raises(ShapeError, match=r"expects \(N, ..., features\), but the input is \(N, T\)"):
        layer(center=False, scale=False).build((None,), backend="cpu")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layers.Conv1D(4, (3, 3)), ArgumentError, "Conv1D: kernel_size must be an integer of at least 1"),
        (lambda: layers.Conv1D(4, 3, padding="casual"), ArgumentError, "Did you mean 'causal'"),
        (lambda: layers.Conv1D(4, 3, padding=-1), ArgumentError, "padding must be an integer of at least 0"),
        (lambda: layers.MaxPool1D(2, padding="causal"), ArgumentError, '"valid" or "same", or a number of steps'),
        (lambda: layers.MaxPool1D(2, padding=2), ArgumentError, "padding must be below pool_size=2, not 2"),
        (lambda: layers.Conv1D(4, 3).build((8, 4, 2), backend="cpu"), ShapeError, "expects sequences"),
        (lambda: layers.Conv1D(4, 3).build((8,), backend="cpu"), ShapeError, r"Put Reshape\(\(steps, 1\)\) before"),
        (lambda: layers.Conv1D(4, 3).build((2, 4), backend="cpu"), ShapeError, "at least 3 steps, .*one of 2"),
        (lambda: layers.Conv1D(4, 3, groups=3).build((5, 4), backend="cpu"), ShapeError, "groups=3 divides"),
        (lambda: layers.AvgPool1D(4, padding=1).build((1, 4), backend="cpu"), ShapeError, "at least 2 steps"),
        (lambda: layers.GlobalMaxPool1D().build((4,), backend="cpu"), ShapeError, "expects sequences"),
        (lambda: layers.Masking().build((4,), backend="cpu"), ShapeError, "expects sequences"),
        (lambda: layers.Masking(np.nan), ArgumentError, "Masking: value must be a finite number"),
    ],
)
def test_invalid_arguments_and_shapes_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
