"""Embedding: lookup of rows, gradients summed over equal integers, and integers out of range."""

import copy
import pickle

import numpy as np
import pytest
from small_models import assert_same_state
from strict import StrictBackend

import xpnet
from xpnet import layers, optimizers
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError

SHAPES = [(), (5,), (2, 3)]
F32 = np.dtype("float32")


def net(backend, **kwargs):
    """Two layers that only change the shape, an embedding in a container, and Dense."""
    stack = [layers.Reshape((2, 3)), layers.Permute((1, 0)), layers.Sequential([layers.Embedding(7, 4)]),
             layers.Flatten(), layers.Dense(2)]  # fmt: skip
    return xpnet.Sequential(stack, (6,), backend, **kwargs)


def integers(rng, rows=9, dtype="int64"):
    return rng.integers(0, 7, (rows, 6)).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "int8", "uint64", "bool"])
def test_each_integer_is_replaced_by_its_row(backend, rng, shape, dtype):
    weight, x = rng.normal(size=(9, 4)), rng.integers(0, 9, (6, *shape)).astype(dtype)
    layer = layers.Embedding(9, 4, weight_initializer=weight)
    assert layer.build(shape, backend=backend, dtype="float64") == (*shape, 4)
    y = backend.to_numpy(layer.forward(backend.asarray(x)))
    np.testing.assert_array_equal(y, weight[x.astype(int)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_equal_integers_add_up(backend, rng, shape):
    x, g = rng.integers(0, 4, (12, *shape)), rng.normal(size=(12, *shape, 3))
    layer = layers.Embedding(6, 3)
    layer.build(shape, backend=backend, dtype="float64")
    layer.forward(backend.asarray(x))
    expected = np.zeros((6, 3))
    for v, row in zip(x.ravel(), g.reshape(-1, 3), strict=True):
        expected[v] += row
    for _ in range(2):  # the gradient of an earlier pass is overwritten
        assert layer.backward(backend.asarray(g)) is None
        np.testing.assert_allclose(backend.to_numpy(layer.weight.grad), expected, rtol=1e-12, atol=1e-14)
    assert not backend.to_numpy(layer.weight.grad)[4:].any()


def test_gradients_equal_finite_differences(backend, rng):
    model = net(backend)
    errors = xpnet.check_gradients(model, integers(rng), rng.normal(size=(9, 2)))
    assert errors.keys() == {"2.0.weight", "4.weight", "4.bias"}
    assert max(errors.values()) < 1e-6
    decayed = xpnet.Sequential([layers.Embedding(7, 2, l1=0.1, l2=0.2)], (6,), backend)
    assert max(xpnet.check_gradients(decayed, integers(rng), rng.normal(size=(9, 6, 2))).values()) < 1e-6


@pytest.mark.parametrize("input_grad", [True, False])
def test_integer_inputs_have_no_gradient(backend, rng, input_grad):
    model = net(backend)
    model.forward(integers(rng))
    assert model.backward(rng.normal(size=(9, 2)), input_grad) is None
    assert backend.to_numpy(model.parameters[0].grad).any()


def test_an_inner_layer_that_returns_no_gradient_is_an_error(backend, rng):
    class NoGradient(layers.Identity):
        def backward(self, grad_y):
            pass

    model = xpnet.Sequential([layers.Dense(3), NoGradient(), layers.Dense(2)], (4,), backend)
    model.forward(np.ones((5, 4)))
    with pytest.raises(ShapeError, match=r"layer 1 \(NoGradient\): backward must return ∂L/∂x, .* but returned None"):
        model.backward(np.ones((5, 2)))


def test_a_model_with_an_embedding_learns(backend, rng):
    x = rng.integers(0, 20, (200, 5))
    y = (x < 4).any(axis=1).astype(int)
    stack = [layers.Embedding(20, 4), layers.Flatten(), layers.Dense(16), layers.ReLU(), layers.Dense(2)]
    model = xpnet.Sequential(stack, (5,), backend)
    history = model.fit(x, y, optimizer=optimizers.Adam(0.02), epochs=12, batch_size=32, verbose=0)
    assert history["accuracy"][-1] > 0.9
    assert model.evaluate(x.tolist(), y.tolist())["accuracy"] > 0.9
    np.testing.assert_array_equal(model.predict(x.astype("uint8")), model.predict(x))


# Padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["normal", np.ones((7, 4))], ids=["drawn", "given"])
def test_the_padding_row_is_zero_and_not_trained(backend, rng, weight):
    stack = [layers.Embedding(7, 4, padding_index=2, weight_initializer=weight, l1=0.1), layers.Flatten()]
    model, x = xpnet.Sequential([*stack, layers.Dense(2)], (6,), backend), integers(rng, dtype="uint8")
    before = model.state_dict()["0.weight"]
    model.fit(x, np.zeros(9, int), optimizer=optimizers.AdamW(0.1, weight_decay=0.5), epochs=3, verbose=0)
    after = model.state_dict()["0.weight"]
    assert [row for row in range(7) if not before[row].any()] == [2]
    assert [row for row in range(7) if (before[row] == after[row]).all()] == [2]
    assert max(xpnet.check_gradients(model, x, rng.normal(size=(9, 2)), samples=28).values()) < 1e-6


def test_a_loaded_padding_row_has_no_effect(backend, rng):
    model = xpnet.Sequential([layers.Embedding(7, 4, padding_index=0)], (None,), backend)
    model.load_state_dict({"0.weight": rng.normal(size=(7, 4)).astype("float32")})
    x = np.array([[0, 3, 0, 1]])
    assert model.predict(x)[0].any(axis=1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_the_padding_index_starts_the_mask_of_sequences_only(backend, dtype):
    x = np.array([[1, 0, 1], [0, 0, 0]], dtype)
    layer = layers.Embedding(300, 2, padding_index=0)
    layer.build((3,), backend=backend)
    layer.forward(backend.asarray(x))
    assert backend.to_numpy(layer.start_mask(backend.asarray(x))).tolist() == x.astype(bool).tolist()
    assert layer.starts_mask
    for shape, index in [((), 0), ((2, 3), 0), ((3,), None)]:
        other = layers.Embedding(300, 2, padding_index=index)
        other.build(shape, backend=backend)
        assert not other.starts_mask


# Invalid inputs and arguments --------------------------------------------------------------------------------------

RANGE = r"layer 2\.0 \(Embedding\) takes integers from 0 to 6"
REFUSED = {
    "too large": (lambda x: 7, rf"x holds 7 in sample 3, but {RANGE}. Number the words from 0"),
    "negative": (lambda x: -1, rf"x holds -1 in sample 3, but {RANGE}"),
}
CALLS = {
    "fit": lambda m, x, y: m.fit(x, y, verbose=0),
    "train_on_batch": lambda m, x, y: m.train_on_batch(x, y, loss="softmax_cross_entropy", optimizer="sgd"),
    "evaluate": lambda m, x, y: m.evaluate(x, y, loss="softmax_cross_entropy"),
    "predict": lambda m, x, y: m.predict(x),
    "forward": lambda m, x, y: m.forward(x),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(("value", "message"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("dtype", ["int64", "int8"])
def test_integers_out_of_range_are_refused_and_change_nothing(backend, rng, call, value, message, dtype):
    model, x = net(backend), integers(rng, dtype=dtype)
    x[3, 2], x[5, 0] = value(x), 8
    before = model.state_dict()
    with pytest.raises(DataError, match=message):
        call(model, x, np.zeros(9, int))
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_floats_are_refused_with_advice(backend, rng, call):
    x = integers(rng)
    with pytest.raises(
        DataError, match=rf"x holds floats, but {RANGE}.*All are whole numbers, so convert them: numpy\.asarray\(x, "
    ):
        call(net(backend), x.astype(float), np.zeros(9, int))
    with pytest.raises(DataError, match=rf"x holds floats, but {RANGE}.*use Dense for measurements"):
        call(net(backend), (x + 0.5).tolist(), np.zeros(9, int))


def test_validation_data_out_of_range_is_refused(backend, rng):
    model, x, y = net(backend), integers(rng), np.zeros(9, int)
    with pytest.raises(DataError, match=r"holds 9 in sample 0, but layer 2\.0"):
        model.fit(x, y, validation_data=(np.full((9, 6), 9), y), verbose=0)


def test_an_embedding_of_floats_from_another_layer_is_refused(backend):
    model = xpnet.Sequential([layers.Dense(3), layers.Embedding(5, 2)], (4,), backend)
    with pytest.raises(
        ArgumentTypeError,
        match=r"layer 1 \(Embedding\).*takes integers from 0 to 4, not float32. Make it the first layer",
    ):
        model.forward(np.ones((2, 4)))


def test_a_model_without_an_embedding_accepts_any_integers(backend):
    model = xpnet.Sequential([layers.Flatten(), layers.Dense(3)], (4,), backend)
    assert model.predict(np.full((2, 4), -7)).shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.Embedding(0, 4), "Embedding: vocabulary_size must be an integer of at least 1, not 0"),
        (
            lambda: layers.Embedding(4, 2, padding_index=4),
            "Embedding: padding_index must be an integer from 0 to 3, or None, not 4",
        ),
        (lambda: layers.Embedding(4, 2.5), "Embedding: features must be an integer of at least 1, not 2.5"),
        (
            lambda: layers.Embedding(4, 2, l1=-1).build((3,), backend="cpu"),
            "weight: l1 must be a finite number of at least 0, not -1",
        ),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


# Training, copies and devices --------------------------------------------------------------------------------------


def test_a_frozen_embedding_does_not_change(backend, rng):
    model = net(backend)
    model.layers[2].trainable = False
    before = model.state_dict()
    model.fit(integers(rng), np.zeros(9, int), verbose=0)
    after = model.state_dict()
    assert {name for name in before if np.array_equal(before[name], after[name])} == {"2.0.weight"}


@pytest.mark.parametrize("copied", ["file", "deepcopy", "pickle", "to"])
def test_copies_predict_the_same(backend, rng, tmp_path, copied):
    model, x = net(backend, seed=3), integers(rng)
    if copied == "file":
        model.save(tmp_path / "m")
        other = xpnet.load(tmp_path / "m", backend)
    elif copied == "to":
        other = copy.deepcopy(model).to(StrictBackend()).to(backend)
    else:
        other = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert list(other.state_dict()) == ["2.0.weight", "4.weight", "4.bias"]
    assert_same_state(other.state_dict(), model.state_dict())
    np.testing.assert_array_equal(other.predict(x), model.predict(x))
    with pytest.raises(DataError):
        other.predict(x + 7)


def test_strict_trains_like_the_reference_bit_for_bit(reference, rng):
    x, y = integers(rng, rows=40), rng.integers(0, 2, 40)
    one, other = net(StrictBackend()), net(reference)
    histories = [m.fit(x, y, batch_size=8, epochs=3, verbose=0) for m in (one, other)]
    assert_same_state(one.state_dict(), other.state_dict())
    assert dict(histories[0]) == dict(histories[1])


def test_passes_read_nothing_back_and_stay_float32(rng):
    backend = StrictBackend()
    model, x = net(backend), backend.asarray(integers(rng))
    with backend.no_host_reads(), backend.watch_dtypes() as seen:
        y = model.forward_pass(x, training=True)
        model.backward_pass(y)
        model.forward_pass(x, inference=True)
    assert seen == {F32, x.dtype}


def test_a_standalone_embedding_refuses_integers_out_of_range(backend):
    layer = layers.Embedding(5, 2)
    layer.build((2,), backend=backend)
    with pytest.raises(DataError, match="holds 7 in sample 0"):
        layer.forward(backend.asarray(np.array([[0, 7]])))
