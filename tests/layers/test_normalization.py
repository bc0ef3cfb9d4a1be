"""Normalization layers against their formulas in float64, and the operators on columns."""

import contextlib
import copy
import functools
import pickle

import numpy as np
import pytest
from small_models import assert_same_state
from strict import StrictBackend

import xpnet
from xpnet import layers, optimizers
from xpnet.errors import ArgumentError, DivergenceError, ShapeError

SHAPES = [(4,), (3, 4), (2, 3, 4)]
CHOICES = {"both": (True, True), "no beta": (False, True), "no gamma": (True, False), "neither": (False, False)}
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_choice = pytest.mark.parametrize(("center", "scale"), CHOICES.values(), ids=CHOICES.keys())
F32, F64 = np.dtype("float32"), np.dtype("float64")


def data(rng, shape, rows=6, dtype="float64"):
    """Columns with different means and variances, none of which are 0 and 1."""
    features = shape[-1]
    return (rng.normal(size=(rows, *shape)) * np.arange(1, features + 1) + np.arange(features) - 5).astype(dtype)


def built(layer, backend, shape, rng, dtype="float64", training=True):
    """The layer outside a model, with gamma, beta and running statistics that differ from the initial ones."""
    layer.build(shape, backend=backend, dtype=dtype)
    layer.context.training = training
    for parameter in layer.parameters:
        parameter.value = rng.uniform(0.5, 2.0, parameter.shape) * rng.choice([-1.0, 1.0], parameter.shape)
    for buffer in layer.context.store.buffers:
        buffer.value[...] = backend.asarray(rng.uniform(0.5, 2.0, buffer.value.shape).astype(dtype))
    return layer


def host(layer, name, otherwise=None):
    array = getattr(layer, name, None)
    return otherwise if array is None else layer.backend.to_numpy(array.value).astype(F64)


def normalized(x, mean, variance, layer):
    gamma, beta = host(layer, "gamma", 1.0), host(layer, "beta", 0.0)
    return (x - mean) / np.sqrt(variance + layer.epsilon) * gamma + beta


def batch_moments(x):
    axes = tuple(range(x.ndim - 1))
    return x.mean(axis=axes), x.var(axis=axes)


# BatchNorm ---------------------------------------------------------------------------------------------------------


@each_shape
@each_choice
def test_training_normalizes_a_batch_by_its_own_mean_and_variance(backend, rng, shape, center, scale):
    layer, x = layers.BatchNorm(center=center, scale=scale), data(rng, shape)
    built(layer, backend, shape, rng)
    assert [p.name for p in layer.parameters] == ["gamma"] * scale + ["beta"] * center
    y = backend.to_numpy(layer.forward(backend.asarray(x)))
    assert layer.output_shape == shape
    np.testing.assert_allclose(y, normalized(x, *batch_moments(x), layer), rtol=1e-12, atol=1e-12)


@each_shape
@each_choice
def test_inference_uses_the_running_mean_and_variance_unchanged(backend, rng, shape, center, scale):
    layer, x = layers.BatchNorm(center=center, scale=scale), data(rng, shape)
    built(layer, backend, shape, rng, training=False)
    mean, variance = host(layer, "running_mean"), host(layer, "running_var")
    y = backend.to_numpy(layer.forward(backend.asarray(x)))
    np.testing.assert_allclose(y, normalized(x, mean, variance, layer), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(host(layer, "running_mean"), mean)
    np.testing.assert_array_equal(host(layer, "running_var"), variance)


@each_shape
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_mean_and_unbiased_variance_are_moving_averages(backend, rng, shape, momentum):
    layer = layers.BatchNorm(momentum)
    layer.build(shape, backend=backend, dtype="float64")
    layer.context.training = True
    mean, variance = np.zeros(4), np.ones(4)
    for rows in (6, 3, 9):
        x = data(rng, shape, rows)
        layer.forward(backend.asarray(x))
        flat = x.reshape(-1, 4)
        mean += momentum * (flat.mean(axis=0) - mean)
        variance += momentum * (flat.var(axis=0, ddof=1) - variance)
    np.testing.assert_allclose(host(layer, "running_mean"), mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(host(layer, "running_var"), variance, rtol=1e-12)


@each_shape
@each_choice
def test_gradients_of_batch_norm_equal_finite_differences(backend, rng, shape, center, scale):
    stack = [layers.BatchNorm(center=center, scale=scale), layers.Tanh(), layers.BatchNorm()]
    model = xpnet.Sequential(stack, shape, backend)
    errors = xpnet.check_gradients(model, data(rng, shape), rng.normal(size=(6, *shape)), inputs=True)
    assert max(errors.values()) < 1e-6
    assert len(errors) == center + scale + 3


@each_shape
@each_choice
def test_gradients_in_inference_treat_the_running_statistics_as_constants(backend, rng, shape, center, scale):
    layer, x, g = layers.BatchNorm(center=center, scale=scale), data(rng, shape), rng.normal(size=(6, *shape))
    built(layer, backend, shape, rng, training=False)
    layer.forward(backend.asarray(x))
    layer.context.training = True  # backward follows the mode of the forward pass
    grad_x = backend.to_numpy(layer.backward(backend.asarray(g)))
    sigma, axes = np.sqrt(host(layer, "running_var") + layer.epsilon), tuple(range(x.ndim - 1))
    np.testing.assert_allclose(grad_x, g * host(layer, "gamma", 1.0) / sigma, rtol=1e-12)
    if scale:
        expected = (g * (x - host(layer, "running_mean")) / sigma).sum(axis=axes)
        np.testing.assert_allclose(backend.to_numpy(layer.gamma.grad), expected, rtol=1e-11)
    if center:
        np.testing.assert_allclose(backend.to_numpy(layer.beta.grad), g.sum(axis=axes), rtol=1e-12)


def test_a_batch_of_one_row_is_normalized_by_the_running_statistics(backend, rng):
    layer, x, g = layers.BatchNorm(), data(rng, (4,), rows=1), rng.normal(size=(1, 4))
    built(layer, backend, (4,), rng)
    mean, variance = host(layer, "running_mean"), host(layer, "running_var")
    y = backend.to_numpy(layer.forward(backend.asarray(x)))
    np.testing.assert_allclose(y, normalized(x, mean, variance, layer), rtol=1e-12, atol=1e-12)
    grad_x = backend.to_numpy(layer.backward(backend.asarray(g)))
    np.testing.assert_allclose(grad_x, g * host(layer, "gamma") / np.sqrt(variance + layer.epsilon), rtol=1e-12)
    np.testing.assert_array_equal(host(layer, "running_mean"), mean)


def test_every_pixel_of_an_image_counts_as_a_row(backend, rng):
    layer, x = layers.BatchNorm(), data(rng, (2, 3, 4), rows=1)
    built(layer, backend, (2, 3, 4), rng)
    y = backend.to_numpy(layer.forward(backend.asarray(x)))
    np.testing.assert_allclose(y, normalized(x, *batch_moments(x), layer), rtol=1e-12, atol=1e-12)


def test_training_continues_after_a_last_batch_of_one_row(backend, rng):
    model, x = net(backend), data(rng, (4,), rows=9, dtype="float32")
    history = model.fit(x, x[:, :2], loss="mse", batch_size=4, epochs=3, verbose=0)
    assert np.isfinite(history["loss"]).all()
    assert all(np.isfinite(value).all() for value in model.state_dict().values())


def test_a_constant_column_becomes_beta(backend):
    layer = layers.BatchNorm()
    layer.build((2,), backend=backend)
    layer.context.training = True
    layer.beta.value = [3.0, -1.0]
    x = backend.asarray(np.full((5, 2), 7.0, F32))
    np.testing.assert_array_equal(backend.to_numpy(layer.forward(x)), np.tile([3.0, -1.0], (5, 1)))
    assert np.isfinite(backend.to_numpy(layer.backward(x))).all()


def test_float32_is_exact_for_a_small_variance_around_a_large_mean(backend, rng):
    x = (1e3 + rng.normal(size=(2000, 3))).astype(F32)
    wide, g = x.astype(F64), rng.normal(size=(2000, 3)).astype(F32)
    results = []
    for dtype in (F32, F64):
        layer = layers.BatchNorm(momentum=1.0)
        layer.build((3,), backend=backend, dtype=dtype)
        layer.context.training = True
        arrays = layer.forward(backend.asarray(x, dtype=dtype)), layer.backward(backend.asarray(g, dtype=dtype))
        results.append([backend.to_numpy(a) for a in (*arrays, layer.gamma.grad)])
        assert {a.dtype for a in results[-1]} == {dtype}
        np.testing.assert_allclose(host(layer, "running_var"), wide.var(axis=0, ddof=1), rtol=1e-6)
    (y, grad_x, grad_gamma), (true_y, true_x, true_gamma) = results
    rounding = 1e3 * np.finfo(F32).eps  # of x, whose standard deviation is 1
    np.testing.assert_allclose(y, true_y, rtol=0, atol=rounding)
    np.testing.assert_allclose(grad_x, true_x, rtol=0, atol=rounding / 4)
    np.testing.assert_allclose(grad_gamma, true_gamma, rtol=0, atol=rounding * np.abs(g.sum(axis=0)).max())


def test_a_frozen_batch_norm_keeps_its_parameters_and_running_statistics_and_normalizes_by_them(backend, rng):
    model, x = net(backend), data(rng, (4,), rows=16, dtype="float32")
    model.layers[1].trainable = False
    before = model.state_dict()
    model.fit(x, x[:, :2], loss="mse", epochs=2, batch_size=8, verbose=0)
    after = model.state_dict()
    unchanged = {name for name in before if np.array_equal(before[name], after[name])}
    assert unchanged == {"1.gamma", "1.beta", "1.running_mean", "1.running_var"}
    outputs = [backend.to_numpy(model.forward(x, training=training)) for training in (True, False)]
    np.testing.assert_array_equal(*outputs)


def test_weight_decay_does_not_apply_to_norms(backend, rng):
    model = xpnet.Sequential([layers.BatchNorm(), layers.LayerNorm()], (4,), backend)
    assert not any(p.decay for p in model.parameters)


def test_evaluation_between_forward_and_backward_changes_nothing(backend, rng):
    x, g = data(rng, (4,), dtype="float32"), rng.normal(size=(6, 2)).astype(F32)
    model, other = net(backend), net(backend)
    for m in (model, other):
        m.forward(x, training=True)
    model.predict(data(rng, (4,), rows=50))
    model.evaluate(x, x[:, :2], loss="mse")
    np.testing.assert_array_equal(backend.to_numpy(model.backward(g)), backend.to_numpy(other.backward(g)))
    assert_same_state(model.state_dict(), other.state_dict())


def test_running_statistics_converge_to_those_of_the_data(backend, rng):
    model, x = xpnet.Sequential([layers.BatchNorm()], (4,), backend), data(rng, (4,), rows=200, dtype="float32")
    for _ in range(100):
        y = backend.to_numpy(model.forward(x, training=True))
    np.testing.assert_allclose(y.mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.std(axis=0), 1.0, atol=1e-4)
    np.testing.assert_allclose(model.predict(x), y, atol=0.02)


def test_running_mean_and_variance_are_restored_after_divergence(backend, rng):
    model, x = net(backend), data(rng, (4,), rows=16, dtype="float32")
    before = model.state_dict()
    with pytest.raises(xpnet.errors.DivergenceError):
        model.fit(x, 1e30 * x[:, :2], loss="mse", optimizer=optimizers.SGD(1e30), verbose=0, batch_size=4)
    assert_same_state(model.state_dict(), before)


# LayerNorm ---------------------------------------------------------------------------------------------------------


@each_shape
@each_choice
@pytest.mark.parametrize("training", [True, False])
def test_layer_norm_normalizes_each_row(backend, rng, shape, center, scale, training):
    layer, x = layers.LayerNorm(center=center, scale=scale), data(rng, shape)
    built(layer, backend, shape, rng, training=training)
    assert [p.name for p in layer.parameters] == ["gamma"] * scale + ["beta"] * center
    y = backend.to_numpy(layer.forward(backend.asarray(x)))
    moments = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    np.testing.assert_allclose(y, normalized(x, *moments, layer), rtol=1e-12, atol=1e-12)


@each_shape
@each_choice
def test_gradients_of_layer_norm_equal_finite_differences(backend, rng, shape, center, scale):
    model = xpnet.Sequential([layers.LayerNorm(center=center, scale=scale), layers.Dense(3)], shape, backend)
    errors = xpnet.check_gradients(model, data(rng, shape), rng.normal(size=(6, *shape[:-1], 3)), inputs=True)
    assert max(errors.values()) < 1e-6
    assert len(errors) == center + scale + 3


def test_layer_norm_of_one_feature_is_beta(backend):
    layer = layers.LayerNorm()
    layer.build((1,), backend=backend)
    layer.beta.value = 2.0
    assert backend.to_numpy(layer.forward(backend.asarray(np.array([[5.0], [-3.0]], F32)))).tolist() == [[2.0], [2.0]]


# Both --------------------------------------------------------------------------------------------------------------


# GroupNorm and InstanceNorm ----------------------------------------------------------------------------------------

BY_GROUP = {
    "one group": (functools.partial(layers.GroupNorm, 1), 1),
    "two groups": (functools.partial(layers.GroupNorm, 2), 2),
    "instances": (layers.InstanceNorm, 4),
}
each_grouping = pytest.mark.parametrize(("make", "groups"), BY_GROUP.values(), ids=BY_GROUP.keys())


@each_shape
@each_choice
@each_grouping
def test_groups_of_features_are_normalized(backend, rng, shape, center, scale, make, groups):
    if make is layers.InstanceNorm and len(shape) == 1:
        pytest.skip("there is nothing to normalize over")
    layer, x = make(center=center, scale=scale), data(rng, shape)
    built(layer, backend, shape, rng)
    assert [p.name for p in layer.parameters] == ["gamma"] * scale + ["beta"] * center
    y = backend.to_numpy(layer.forward(backend.asarray(x)))
    split = x.reshape(len(x), -1, groups, 4 // groups)
    moments = (
        np.broadcast_to(f(split, axis=(1, 3), keepdims=True), split.shape).reshape(x.shape) for f in (np.mean, np.var)
    )
    np.testing.assert_allclose(y, normalized(x, *moments, layer), rtol=1e-11, atol=1e-11)


@each_choice
@each_grouping
def test_gradients_of_groups_equal_finite_differences(backend, rng, center, scale, make, groups):
    model = xpnet.Sequential([make(center=center, scale=scale), layers.Dense(3)], (2, 3, 4), backend)
    errors = xpnet.check_gradients(model, data(rng, (2, 3, 4)), rng.normal(size=(6, 2, 3, 3)), inputs=True)
    assert max(errors.values()) < 1e-6
    assert len(errors) == center + scale + 3


def net(backend, **kwargs):
    stack = [layers.Dense(5), layers.BatchNorm(), layers.ReLU(), layers.LayerNorm(), layers.Dense(2)]
    return xpnet.Sequential(stack, (4,), backend, **kwargs)


@pytest.mark.parametrize(
    "kind",
    [layers.BatchNorm, layers.LayerNorm, functools.partial(layers.GroupNorm, 2), layers.InstanceNorm],
    ids=["BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm"],
)
@pytest.mark.parametrize("training", [True, False])
def test_inputs_are_not_modified_and_backward_can_be_repeated(backend, rng, kind, training):
    layer, x, g = kind(), data(rng, (3, 4)), rng.normal(size=(6, 3, 4))
    built(layer, backend, (3, 4), rng, training=training)
    device_x, device_g = backend.asarray(x.copy()), backend.asarray(g.copy())
    layer.forward(device_x)
    first = backend.to_numpy(layer.backward(device_g)).copy()
    grads = [backend.to_numpy(p.grad).copy() for p in layer.parameters]
    np.testing.assert_array_equal(backend.to_numpy(layer.backward(device_g)), first)
    layer.wants_input_grad = False
    assert layer.backward(device_g) is None
    for p, grad in zip(layer.parameters, grads, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(p.grad), grad)
    np.testing.assert_array_equal(backend.to_numpy(device_x), x)
    np.testing.assert_array_equal(backend.to_numpy(device_g), g)


def test_state_dict_has_the_expected_names(backend):
    assert list(net(backend).state_dict()) == [
        "0.weight", "0.bias", "1.gamma", "1.beta", "3.gamma", "3.beta", "4.weight", "4.bias",
        "1.running_mean", "1.running_var",
    ]  # fmt: skip


@pytest.mark.parametrize("copied", ["file", "deepcopy", "pickle", "to", "load_state_dict"])
def test_copies_predict_and_train_like_the_model(backend, rng, tmp_path, copied):
    model, x = net(backend, seed=3), data(rng, (4,), rows=20, dtype="float32")
    model.fit(x, x[:, :2], loss="mse", batch_size=8, verbose=0)
    if copied == "file":
        model.save(tmp_path / "m")
        other = xpnet.load(tmp_path / "m", backend)
    elif copied == "load_state_dict":
        other = net(backend, seed=3)
        other.load_state_dict(model.state_dict())
    elif copied == "to":
        other = copy.deepcopy(model).to(StrictBackend()).to(backend)
    else:
        other = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(other.predict(x), model.predict(x))
    for m in (model, other):
        before = m.state_dict()["1.running_mean"]
        m.forward(x, training=True)
        assert (m.state_dict()["1.running_mean"] != before).all()
    assert_same_state(other.state_dict(), model.state_dict())


def test_to_float64_converts_the_running_mean_and_variance(backend, rng):
    model, x = net(backend), data(rng, (4,), rows=20)
    model.forward(x, training=True)
    before = model.predict(x)
    assert model.to(backend, "float64").state_dict()["1.running_var"].dtype == F64
    np.testing.assert_allclose(model.predict(x), before, rtol=1e-4, atol=1e-5)


def test_strict_trains_like_the_reference_bit_for_bit(reference, rng):
    x = data(rng, (4,), rows=30, dtype="float32")
    one, other = net(StrictBackend()), net(reference)
    histories = [m.fit(x, x[:, :2], loss="mse", batch_size=8, epochs=3, verbose=0) for m in (one, other)]
    assert_same_state(one.state_dict(), other.state_dict())
    assert dict(histories[0]) == dict(histories[1])


def test_passes_read_nothing_back_and_stay_float32(rng):
    backend = StrictBackend()
    model, x = net(backend), backend.asarray(data(rng, (4,), dtype="float32"))
    with backend.no_host_reads(), backend.watch_dtypes() as seen:
        for rows, training in ((6, True), (6, False), (1, True)):
            y = model.forward_pass(x[:rows], training=training)
            model.backward_pass(y)
        model.forward_pass(x, inference=True)
    assert seen <= {F32, np.dtype(bool)}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layers.BatchNorm(momentum=1.5), ArgumentError, "BatchNorm: momentum .* from 0 to 1, not 1.5"),
        (lambda: layers.BatchNorm(momentum="0.1"), ArgumentError, "not '0.1'"),
        (lambda: layers.BatchNorm(epsilon=0), ArgumentError, "BatchNorm: epsilon .* above 0, not 0"),
        (lambda: layers.LayerNorm(-1e-5), ArgumentError, "LayerNorm: epsilon .* above 0, not -1e-05"),
        (lambda: layers.LayerNorm(64), ArgumentError, "LayerNorm: epsilon must be below 1, not 64.*layer before"),
        (lambda: layers.GroupNorm(0), ArgumentError, "GroupNorm: groups must be an integer of at least 1, not 0"),
        (lambda: layers.GroupNorm(3).build((4,)), ShapeError, r"that groups=3 divides, but the input is \(N, 4\)"),
        (lambda: layers.InstanceNorm().build((4,)), ShapeError, r"with axes in between.*, but the input is \(N, 4\)"),
        (lambda: layers.GroupNorm(1).build(()), ShapeError, r"expects \(N, ..., features\), but the input is \(N,\)"),
        (lambda: layers.BatchNorm().build(()), ShapeError, r"expects \(N, ..., features\), but the input is \(N,\)"),
        (lambda: layers.LayerNorm().build(()), ShapeError, r"expects \(N, ..., features\)"),
    ],
)
def test_invalid_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# The operators on columns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (7, 1), (5, 4), (5000, 3), (64, 300)], ids=str)
def test_operators_on_columns_equal_their_formulas(backend, rng, dtype, shape):
    columns = shape[1:]
    x, g = (rng.normal(size=shape).astype(dtype) + dtype.type(shift) for shift in (50, 0))
    a, b, c, m = (rng.normal(size=columns).astype(dtype) for _ in range(4))
    m += dtype.type(50)
    wide_x, wide_g, wide_a, wide_b, wide_c, wide_m = (array.astype(F64) for array in (x, g, a, b, c, m))
    on_device = [backend.asarray(array) for array in (x, g, a, b, c, m)]
    device_x, device_g, device_a, device_b, device_c, device_m = on_device

    def same(got, expected, scale=1.0):
        assert got.dtype == dtype and got.shape == expected.shape
        np.testing.assert_allclose(backend.to_numpy(got), expected, rtol=0, atol=16 * scale * np.finfo(dtype).eps)

    mean, variance = backend.moments(device_x)
    same(mean, wide_x.mean(axis=0), 50)
    same(variance, wide_x.var(axis=0), variance.max().item() + 1)
    out = backend.empty(shape, dtype)
    assert backend.scale_shift(device_x, device_m, device_a, device_b, out=out) is out
    same(out, (wide_x - wide_m) * wide_a + wide_b, 3)
    assert backend.combine(device_g, device_a, device_x, device_m, device_b, device_c, out=out) is out
    same(out, wide_g * wide_a + (wide_x - wide_m) * wide_b + wide_c, 3)
    sums = backend.empty(columns, dtype)
    assert backend.sum_products(device_g, device_x, device_a, out=sums) is sums
    products = wide_g * (wide_x - wide_a)
    same(sums, products.sum(axis=0), np.abs(products).sum(axis=0).max())
    for array, before in zip(on_device, (x, g, a, b, c, m), strict=True):
        np.testing.assert_array_equal(backend.to_numpy(array), before)
    assert backend.scale_shift(out, device_m, device_a, device_b, out=out) is out
    assert np.isfinite(backend.to_numpy(out)).all()


def test_a_skipped_batch_does_not_change_the_running_statistics(backend, rng):
    model = xpnet.Sequential([layers.Dense(4), layers.BatchNorm(), layers.Dense(1)], (3,), backend)
    x = rng.normal(size=(8, 3)).astype(np.float32)
    model.train_on_batch(x, x.sum(axis=1), loss="mse", optimizer="sgd")
    before = model.state_dict()
    extreme = x.copy()
    extreme[:2] = [[3e38], [-3e38]]
    for bad, y in ((extreme, x.sum(axis=1)), (x + 100, np.full(8, 1e30))):
        with pytest.raises(DivergenceError, match="which was skipped"):
            model.train_on_batch(bad, y)
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_an_overflow_of_the_running_variance_is_reported(backend, rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    x[0] = 1e25
    for train in ("fit", "train_on_batch"):
        model = xpnet.Sequential([layers.BatchNorm(), layers.Dense(1)], (3,), backend)
        before = model.state_dict()
        options = {"verbose": 0} if train == "fit" else {}
        with pytest.raises(DivergenceError, match="0.running_var became NaN or infinite"):
            getattr(model, train)(x, np.zeros((8, 1)), loss="mse", optimizer="sgd", **options)
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(value, before[name], err_msg=name)


CONSTANTS = [100000.1, 1e7 + 1, 3.3e9, -1e30]


@pytest.mark.parametrize(
    "layer",
    [layers.LayerNorm, layers.BatchNorm, functools.partial(layers.GroupNorm, 2)],
    ids=["LayerNorm", "BatchNorm", "GroupNorm"],
)
@pytest.mark.parametrize("value", CONSTANTS)
@pytest.mark.parametrize("looped", [False, True])
def test_equal_features_are_normalized_to_zero_whatever_their_size(backend, layer, value, looped):
    layer = layer()
    layer.build((10,), backend=backend)
    layer.context.training = True
    with backend.parallel_region() if looped else contextlib.nullcontext():
        y = backend.to_numpy(layer.forward(backend.asarray(np.full((10, 10), value, dtype="float32"))))
    np.testing.assert_array_equal(y, np.zeros((10, 10)))


@pytest.mark.parametrize(("kind", "axis"), [(layers.LayerNorm, 1), (layers.BatchNorm, 0)])
@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6])
def test_a_large_mean_costs_few_digits_in_either_direction(backend, rng, kind, axis, mean):
    """Against float64. The mean of a column is rounded to float32, so BatchNorm may be off by half a unit of it."""
    x, g = (mean + 4 * rng.normal(size=(40, 40))).astype("float32"), rng.normal(size=(40, 40)).astype("float32")
    results = []
    for dtype in ("float64", "float32"):
        layer = kind()
        layer.build((40,), backend=backend, dtype=dtype)
        layer.context.training = True
        y = layer.forward(backend.asarray(x, dtype=dtype))
        grad_x = layer.backward(backend.asarray(g, dtype=dtype))
        results.append([backend.to_numpy(a) for a in (y, grad_x, layer.gamma.grad, layer.beta.grad)])
    tolerance = 2e-5 + (np.spacing(np.float32(mean)) / 4 if axis == 0 else 0)
    for exact, got in zip(*results, strict=True):
        np.testing.assert_allclose(got, exact, rtol=0, atol=tolerance * max(1, np.abs(exact).max()))


def test_the_gradient_of_layer_norm_is_exact_for_large_equal_gradients(backend, rng):
    layer = layers.LayerNorm()
    layer.build((10,), backend=backend)
    layer.forward(backend.asarray(rng.normal(size=(3, 10)), dtype="float32"))
    grad_x = layer.backward(backend.asarray(np.full((3, 10), 100000.1), dtype="float32"))
    np.testing.assert_array_equal(backend.to_numpy(grad_x), np.zeros((3, 10)))
