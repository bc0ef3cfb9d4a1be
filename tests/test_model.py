"""Sequential: forward and backward, prediction, state, copies, moves, nesting, and invalid arguments."""

import copy
import pickle

import numpy as np
import pytest
from custom_layers import Counted
from small_models import LABELS, QUIET, SAMPLES, assert_same_state, gradients_of, small_net
from strict import StrictBackend

import xpnet
from xpnet import layers, losses, optimizers
from xpnet.backends import Backend
from xpnet.errors import ArgumentError, ArgumentTypeError, BackendError, DataError, ShapeError, StateError

X = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
Y = (X.sum(axis=1) > 0).astype(int)


def net(backend="cpu", seed=0, dtype="float32"):
    return xpnet.Sequential(
        [layers.Dense(5), layers.Tanh(), layers.Dropout(0.4), Counted(), layers.Dense(2)], (4,), backend, seed, dtype
    )


def adam():
    return optimizers.Adam(0.05, weight_decay=0.01)


# forward and backward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: [layers.Dense(3)],
        lambda: [layers.Dense(3), layers.ReLU()],
        lambda: [layers.Dense(3), layers.Identity()],
        lambda: [layers.Identity()],
        lambda: [layers.Flatten()],
        lambda: [layers.Sequential([layers.Dense(3), layers.Sigmoid()])],
    ],
)
def test_changing_returned_arrays_does_not_affect_the_model(backend, make):
    model = xpnet.Sequential(make(), (4,), backend)
    x = backend.asarray(X.copy())
    y = model.forward(x)
    values, grad = backend.to_numpy(y).copy(), backend.asarray(np.ones(y.shape, "float32"))
    y *= 0
    dx = model.backward(grad)
    dx_values, by_parameters = backend.to_numpy(dx).copy(), gradients_of(model)
    np.testing.assert_array_equal(backend.to_numpy(x), X)
    np.testing.assert_array_equal(backend.to_numpy(grad), np.ones(y.shape))
    dx *= 0
    repeated = model.forward(x)
    np.testing.assert_array_equal(backend.to_numpy(repeated), values)
    np.testing.assert_array_equal(backend.to_numpy(model.backward(grad)), dx_values)
    for name, value in gradients_of(model).items():
        np.testing.assert_array_equal(value, by_parameters[name])


def test_outputs_and_gradients_are_on_the_device_of_the_model(backend):
    model = net(backend)
    y = model.forward(X)
    assert isinstance(y, backend.xp.ndarray) and isinstance(model.backward(np.ones((20, 2))), backend.xp.ndarray)


def test_forward_applies_dropout_only_in_training(backend):
    model = xpnet.Sequential([layers.Dropout(0.5)], (4,), backend)
    np.testing.assert_array_equal(backend.to_numpy(model.forward(X)), X)
    y = backend.to_numpy(model.forward(X, training=True))
    assert 0 < (y == 0).mean() < 1
    np.testing.assert_allclose(y[y != 0], 2 * X[y != 0])


def test_backward_requires_a_preceding_forward(backend):
    model = net(backend)
    ones, message = np.ones((20, 2)), r"call model\.forward\(x\) first"
    with pytest.raises(StateError, match=message):
        model.backward(ones)
    model.forward(X)
    model.backward(ones)
    model.fit(X, Y, verbose=0)
    with pytest.raises(StateError, match=message):
        model.backward(ones)
    model.forward(X)
    model.train_on_batch(X, Y)
    with pytest.raises(StateError, match=message):
        model.backward(ones)
    model.forward(X)
    model.to(model.backend)  # does not move anything, so backward still works
    model.backward(ones)
    model.to(model.backend, dtype="float64")
    with pytest.raises(StateError, match=message):
        model.backward(ones)


@pytest.mark.parametrize("shape", [(20, 3), (19, 2), (20,), (2,), ()])
def test_backward_refuses_gradients_that_differ_in_shape_from_the_outputs(backend, shape):
    model = net(backend)
    model.forward(X)
    with pytest.raises(ShapeError, match=r"outputs, \(20, 2\)"):
        model.backward(np.ones(shape))


@pytest.mark.parametrize("nested", [False, True])
def test_backward_without_input_grad_returns_none_and_computes_the_same_gradients(backend, nested):
    def make():
        inner = [layers.Rescale(0.5), layers.Dense(5), layers.Tanh(), layers.Dense(2)]
        return xpnet.Sequential([layers.Sequential(inner)] if nested else inner, (4,), backend)

    model, other = make(), make()
    grad = np.random.default_rng(1).normal(size=(20, 2))
    for m in (model, other):
        m.forward(X)
    assert model.backward(grad, input_grad=False) is None
    dx = other.backward(grad)
    assert dx.shape == X.shape
    for name, value in gradients_of(model).items():
        np.testing.assert_array_equal(value, gradients_of(other)[name])
    assert model.backward(grad) is not None  # the next call may ask for it again


def test_backward_skips_layers_before_the_first_with_parameters(backend):
    class CallRecorder(layers.Identity):
        def backward(self, grad_y):
            called.append(self)
            return grad_y

    called = []
    model = xpnet.Sequential([CallRecorder(), layers.Dense(5), CallRecorder(), layers.Dense(2)], (4,), backend)
    model.forward(X)
    model.backward(np.ones((20, 2)), input_grad=False)
    assert called == [model.layers[2]]
    called.clear()
    model.fit(X, Y, batch_size=None, verbose=0)
    assert called == [model.layers[2]]


def test_backward_equals_a_finite_difference_of_forward(backend):
    model = net(backend, dtype="float64")
    w = np.random.default_rng(1).normal(size=(20, 2))
    model.forward(X)
    dx = backend.to_numpy(model.backward(w))
    h = np.zeros_like(X, dtype="float64")
    h[3, 1] = 1e-6
    difference = (w * (model.predict(X + h) - model.predict(X - h))).sum() / 2e-6
    assert difference == pytest.approx(dx[3, 1], rel=1e-6)


def test_evaluation_between_forward_and_backward_changes_neither_gradients_nor_buffers(backend):
    model, other = net(backend), net(backend)
    grad = np.random.default_rng(1).normal(size=(20, 2))
    big, labels = np.tile(X, (10, 1)), np.tile(Y, 10)
    for m in (model, other):
        m.forward(X, training=True)
    sizes = {n: b.shape for layer in model.layers for n, b in layer.work._buffers.items()}
    model.evaluate(big, labels, loss="softmax_cross_entropy")
    model.predict(big)
    assert {n: b.shape for layer in model.layers for n, b in layer.work._buffers.items()} == sizes
    np.testing.assert_array_equal(backend.to_numpy(model.backward(grad)), backend.to_numpy(other.backward(grad)))
    for name, value in gradients_of(model).items():
        np.testing.assert_array_equal(value, gradients_of(other)[name])


def test_a_smaller_batch_reuses_the_buffers_of_a_larger_one(backend):
    model = net(backend)
    model.forward(X, training=True)
    before = [b for layer in model.layers for b in layer.work._buffers.values()]
    model.forward(X[:7], training=True)
    after = [b for layer in model.layers for b in layer.work._buffers.values()]
    assert all(a is b for a, b in zip(before, after, strict=True))


# predict and evaluate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 6, 19, 20, 1024, None])
def test_predict_equals_forward_for_every_batch_size(backend, size):
    model = net(backend)
    y = model.predict(X, batch_size=size)
    assert type(y) is np.ndarray and y.dtype == np.float32 and y.shape == (20, 2)
    np.testing.assert_allclose(y, backend.to_numpy(model.forward(X)), rtol=1e-5, atol=1e-6)
    kept = y.copy()
    model.predict(2 * X, batch_size=size)
    np.testing.assert_array_equal(y, kept)


def test_evaluate_does_not_depend_on_the_batch_size(backend):
    model = net(backend)
    whole = model.evaluate(X, Y, loss="softmax_cross_entropy")
    for size in (1, 6, 20, 50):
        assert model.evaluate(X, Y, loss="softmax_cross_entropy", batch_size=size) == pytest.approx(whole, rel=1e-5)
    assert whole["accuracy"] == np.mean(model.predict(X).argmax(axis=1) == Y)


def test_evaluate_defaults_to_the_loss_and_metrics_of_the_last_training(backend):
    model = net(backend)
    with pytest.raises(ArgumentError, match="never trained: give a loss"):
        model.evaluate(X, Y)
    model.fit(X, np.eye(2)[Y], loss=losses.HalfSquaredError("sum"), metrics=["mae", "accuracy"], verbose=0)
    assert set(model.evaluate(X, np.eye(2)[Y])) == {"loss", "mae", "accuracy"}
    assert set(model.evaluate(X, np.eye(2)[Y], metrics="r2")) == {"loss", "r2"}
    assert set(model.evaluate(X, Y, loss="softmax_cross_entropy")) == {"loss", "accuracy"}
    assert set(model.evaluate(X, Y, loss="softmax_cross_entropy", metrics=[])) == {"loss"}


@pytest.mark.parametrize("size", [0, -1, 2.5, "all"])
def test_invalid_batch_sizes_are_refused(size):
    for call in (lambda m: m.predict(X, size), lambda m: m.evaluate(X, Y, loss="mse", batch_size=size)):
        with pytest.raises(ArgumentError, match="batch_size must be an integer of at least 1, or None, not"):
            call(net())


# State -------------------------------------------------------------------------------------------------------------


def test_state_dict_has_host_copies_of_parameters_and_buffers_in_order(backend):
    model = net(backend)
    state = model.state_dict()
    assert list(state) == ["0.weight", "0.bias", "3.gain", "4.weight", "4.bias", "3.count"]
    assert all(type(a) is np.ndarray for a in state.values())
    state["0.weight"][...] = 7
    assert not (model.state_dict()["0.weight"] == 7).any()


def test_load_state_dict_restores_a_trained_model(backend):
    model, other = net(backend), net(backend, seed=1)
    model.fit(X, Y, verbose=0)
    other.load_state_dict(model.state_dict())
    assert_same_state(model.state_dict(), other.state_dict())
    np.testing.assert_array_equal(model.predict(X), other.predict(X))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("0.bias"), r"missing \['0.bias'\]"),
        (lambda s: s.update(more=np.ones(2)), r"unexpected \['more'\]"),
        (
            lambda s: s.update({"0.weight": np.ones((5, 4))}),
            r"0.weight has shape \(4, 5\), but the state's has \(5, 4\)",
        ),
        (lambda s: s.update({"3.count": np.ones(4)}), "3.count has shape"),
    ],
)
def test_a_state_with_other_names_or_shapes_is_refused_and_changes_nothing(backend, change, match):
    model = net(backend)
    before = copy.deepcopy(model)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    change(state)
    with pytest.raises(ArgumentError, match=match):
        model.load_state_dict(state)
    assert_same_state(model.state_dict(), before.state_dict())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (np.array(["a", "b"]), ArgumentTypeError),
        (np.array([1, None], dtype=object), ArgumentTypeError),
        (np.array([1j, 2]), ArgumentTypeError),
        (None, ArgumentTypeError),
        ([[1.0], [1.0, 2.0]], ArgumentTypeError),
        (np.array([1.0, 1e300]), DataError),  # inf in float32
        (np.ones(3), ShapeError),
        (1.0, ShapeError),
    ],
)
def test_a_state_that_is_not_of_numbers_is_refused_and_changes_nothing(backend, bad, error, strict):
    model = net(backend)
    before = copy.deepcopy(model)
    state = {name: value + 1 for name, value in model.state_dict().items()} | {"4.bias": bad}
    with pytest.raises(error, match="4.bias"):
        model.load_state_dict(state, strict=strict)
    assert_same_state(model.state_dict(), before.state_dict())


def test_a_state_may_be_loaded_in_part(backend):
    model = net(backend)
    before = model.state_dict()
    given = {"more": np.ones(2), "4.bias": [5, 6], "0.weight": np.full((4, 5), np.nan)}
    missing, unused = result = model.load_state_dict(given, strict=False)
    assert (result.missing, result.unused) == (missing, unused)
    assert missing == [name for name in before if name not in given] and unused == ["more"]
    after = model.state_dict()
    assert after["4.bias"].tolist() == [5, 6] and np.isnan(after["0.weight"]).all()
    assert_same_state({name: after[name] for name in missing}, {name: before[name] for name in missing})
    assert model.load_state_dict(before) == ([], [])
    assert model.load_state_dict({3: np.ones(2)}, strict=False).unused == ["3"]
    with pytest.raises(ArgumentError, match="strict=False"):
        model.load_state_dict({**before, "4.bais": np.ones(2), 3: np.ones(2)})
    with pytest.raises(ArgumentError, match="strict must be True or False"):
        model.load_state_dict(before, strict=1)


def test_parameter_values_are_live_and_writable(backend):
    model = net(backend)
    weight = model.parameters[0]
    weight.value = np.zeros((4, 5))
    assert not model.state_dict()["0.weight"].any()
    weight.value[...] += 1.0
    np.testing.assert_array_equal(model.state_dict()["0.weight"], 1)
    model.fit(X, Y, verbose=0)
    np.testing.assert_array_equal(backend.to_numpy(weight.value), model.state_dict()["0.weight"])


# Copies and moves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_copies_of_a_trained_model_continue_identically_and_independently(backend, copied):
    model = net(backend)
    optimizer = adam()
    model.fit(X, Y, optimizer=optimizer, epochs=2, batch_size=6, verbose=0)
    other = copied(model)
    assert other.backend is model.backend
    assert_same_state(model.state_dict(), other.state_dict())
    ours, theirs = set(map(id, model.parameters)), set(map(id, other.parameters))
    assert not ours & theirs and theirs == set(map(id, other.context.store.parameters))
    kept = copied(model)
    one = model.fit(X, Y, optimizer=optimizer, epochs=2, batch_size=6, verbose=0)
    assert_same_state(other.state_dict(), kept.state_dict())  # training one does not change the other
    two = other.fit(X, Y, optimizer=adam(), epochs=2, batch_size=6, verbose=0)
    assert_same_state(model.state_dict(), other.state_dict())
    assert dict(one) == dict(two)


def test_an_unbuilt_model_can_be_copied():
    model = copy.deepcopy(xpnet.Sequential([layers.Dense(2)], backend="cpu"))
    model.fit(X, Y, verbose=0)
    assert model.predict(X).shape == (20, 2)


@pytest.mark.parametrize("first", [lambda: xpnet.get_backend("cpu"), lambda: Backend("reference", np)],
                         ids=["cpu", "reference"])  # fmt: skip
def test_a_moved_model_keeps_its_parameters_and_continues_training(backend, first):
    origin = first()
    model, stayed = net(origin, dtype="float64"), net(origin, dtype="float64")
    for m in (model, stayed):
        m.fit(X, Y, optimizer=adam(), epochs=2, batch_size=6, verbose=0)
    before = list(model.parameters)
    assert model.to(backend) is model
    assert model.backend is backend
    assert all(a is b for a, b in zip(model.parameters, before, strict=True))
    assert isinstance(before[0].value, backend.xp.ndarray)
    assert_same_state(model.state_dict(), stayed.state_dict())
    for m in (model, stayed):
        m.fit(X, Y, optimizer=adam(), epochs=2, batch_size=6, verbose=0)
    np.testing.assert_allclose(model.predict(X), stayed.predict(X), rtol=1e-6)
    model.to(origin)
    np.testing.assert_allclose(model.predict(X), stayed.predict(X), rtol=1e-6)


def test_a_model_can_change_its_dtype_and_continue_training(backend):
    model, stayed = net(backend, dtype="float64"), net(backend, dtype="float64")
    for m in (model, stayed):
        m.fit(X, Y, optimizer=adam(), epochs=2, batch_size=6, verbose=0)
    model.to(backend, dtype="float32")
    assert model.predict(X).dtype == np.float32
    model.to(backend, dtype="float64")
    for m in (model, stayed):
        m.fit(X, Y, optimizer=adam(), epochs=2, batch_size=6, verbose=0)
    np.testing.assert_allclose(model.predict(X), stayed.predict(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "int32", "flaot32"])
def test_a_move_to_an_unsupported_dtype_is_refused(dtype):
    model = net()
    with pytest.raises(ArgumentError, match="dtype"):
        model.to("cpu", dtype=dtype)
    assert model.dtype == "float32"


@pytest.mark.skipif(not xpnet.available_backends()["gpu"], reason="there is a GPU")
def test_a_move_to_an_unusable_device_changes_nothing():
    model = net()
    before = copy.deepcopy(model)
    with pytest.raises(BackendError):
        model.to("gpu")
    assert model.backend.name == "cpu"
    assert_same_state(model.state_dict(), before.state_dict())
    model.fit(X, Y, verbose=0)


def test_an_unbuilt_model_is_built_where_it_was_moved_to():
    strict = StrictBackend()
    model = xpnet.Sequential([layers.Dense(2)], backend="cpu").to(strict, dtype="float64")
    assert model.predict(X).dtype == np.float64
    assert model.backend is strict


# Nesting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [xpnet.Sequential, layers.Sequential])
def test_a_nested_sequential_trains_like_a_flat_one(backend, kind):
    dense = [layers.Dense(5, weight_initializer=0.1 + np.arange(20).reshape(4, 5) / 50) for _ in range(2)]
    end = [layers.Dense(2, weight_initializer=np.arange(10).reshape(5, 2) / 10 - 0.5) for _ in range(2)]
    nested = xpnet.Sequential([kind([dense[0], layers.Tanh()]), kind([end[0]])], (4,), backend)
    flat = xpnet.Sequential([dense[1], layers.Tanh(), end[1]], (4,), backend)
    assert [p.name for p in nested.parameters] == ["0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias"]
    for m in (nested, flat):
        m.fit(X, Y, epochs=3, batch_size=6, verbose=0)
    for a, b in zip(nested.state_dict().values(), flat.state_dict().values(), strict=True):
        np.testing.assert_array_equal(a, b)
    nested.layers[0].trainable = False
    assert [p.trainable for p in nested.parameters] == [False, False, True, True]


def test_a_layer_object_cannot_be_used_twice():
    dense = layers.Dense(4)
    with pytest.raises(StateError, match="items 0 and 1 are the same Dense"):
        xpnet.Sequential([dense, dense], (4,), "cpu")
    xpnet.Sequential([dense], (4,), "cpu")
    with pytest.raises(StateError, match="built already: a layer object can be used only once"):
        xpnet.Sequential([layers.ReLU(), dense], (4,), "cpu")
    shared = layers.Dense(4)
    with pytest.raises(StateError, match="a layer object can be used only once"):
        xpnet.Sequential([layers.Sequential([shared]), layers.Sequential([shared])], (4,), "cpu")


# Building ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.fit(X, Y, verbose=0),
        lambda m: m.predict(X),
        lambda m: m.forward(X),
        lambda m: m.evaluate(X, Y, loss="softmax_cross_entropy"),
        lambda m: m.train_on_batch(X, Y, loss="softmax_cross_entropy", optimizer="sgd"),
        lambda m: xpnet.check_gradients(m, X, Y, loss="softmax_cross_entropy"),
    ],
    ids=["fit", "predict", "forward", "evaluate", "train_on_batch", "check_gradients"],
)
def test_a_model_without_input_shape_is_built_from_its_first_data(backend, use):
    lazy = xpnet.Sequential([layers.Dense(2)], backend=backend, seed=3)
    assert not lazy.is_built and "not built" in lazy.summary()
    use(lazy)
    built = xpnet.Sequential([layers.Dense(2)], (4,), backend, seed=3)
    assert lazy.input_shape == (4,)
    use(built)
    assert_same_state(lazy.state_dict(), built.state_dict())


@pytest.mark.parametrize("bad", [np.zeros(4), 3.0, None, ["a", "b"]], ids=["1-d", "0-d", "None", "text"])
def test_a_model_stays_unbuilt_after_invalid_data(bad):
    model = xpnet.Sequential([layers.Dense(2)], backend="cpu")
    with pytest.raises((ArgumentError, ArgumentTypeError)):
        model.fit(bad, Y, verbose=0)
    assert not model.is_built
    model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("call", ["state_dict", "backward"])
def test_calls_that_need_a_built_model_raise_state_error(call):
    model = xpnet.Sequential([layers.Dense(2)], backend="cpu")
    with pytest.raises(StateError):
        getattr(model, call)(*[np.ones((2, 2))] * (call == "backward"))


def test_seed_none_draws_a_seed_and_keeps_it(backend):
    one, other = (net(backend, seed=None) for _ in range(2))
    assert one.seed != other.seed
    assert_same_state(one.state_dict(), net(backend, seed=one.seed).state_dict())


def test_dtype_float64_computes_in_float64(backend):
    model = net(backend, dtype="float64")
    model.fit(X, Y, verbose=0)
    assert model.predict(X).dtype == np.float64
    assert {a.dtype for a in model.state_dict().values()} == {np.dtype("float64")}


@pytest.mark.parametrize("spelling", ["float64", np.float64, np.dtype("float64"), float])
def test_dtype_may_be_given_as_in_numpy(spelling):
    assert net(dtype=spelling).dtype == "float64"


@pytest.mark.parametrize("shape", [4, [4], (4,), np.int64(4)])
def test_input_shape_may_be_an_integer(shape):
    assert xpnet.Sequential([layers.Dense(2)], shape, "cpu").input_shape == (4,)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"layers": []}, ArgumentError, "at least one layer"),
        ({"layers": [layers.Dense]}, ArgumentTypeError, r"item 0 is .*with \(\)\?"),
        ({"layers": [layers.Dense(2), "relu"]}, ArgumentTypeError, "item 1 is 'relu', not a layer"),
        ({"layers": (layer for layer in [layers.Dense(2), "relu"])}, ArgumentTypeError, "item 1 is 'relu'"),
        ({"layers": layers.Dense(2)}, ArgumentTypeError, "layers"),
        ({"dtype": "float16"}, ArgumentError, "dtype must be"),
        ({"dtype": "int32"}, ArgumentError, "dtype must be"),
        ({"dtype": "flaot32"}, ArgumentError, "dtype must be"),
        ({"precision": "bfloat16"}, ArgumentError, "is not available on cpu: .*tensor cores.*Leave it out"),
        ({"precision": "bf16"}, ArgumentError, "precision must be .*, not 'bf16'. Did you mean"),
        ({"precision": 16}, ArgumentError, "precision must be .*, not 16"),
        ({"precision": "tf32", "dtype": "float64"}, ArgumentError, 'needs dtype="float32"'),
        ({"seed": -1}, ArgumentError, "seed must be"),
        ({"seed": 1.5}, ArgumentError, "seed must be"),
        ({"seed": True}, ArgumentError, "seed must be"),
        ({"seed": "a"}, ArgumentError, "seed must be"),
        ({"input_shape": (4, 0)}, ArgumentError, "positive integers"),
        ({"input_shape": -4}, ArgumentError, "positive integers"),
        ({"input_shape": "four"}, ArgumentError, "positive integers"),
        ({"input_shape": (4.5,)}, ArgumentError, "positive integers"),
        ({"backend": "tpu"}, ArgumentError, "unknown backend 'tpu'"),
        ({"backend": 3}, ArgumentTypeError, "backend must be"),
    ],
)  # fmt: skip
def test_invalid_arguments_of_the_constructor_are_refused(kwargs, error, match):
    with pytest.raises(error, match=match):
        xpnet.Sequential(**({"layers": [layers.Dense(2)], "input_shape": (4,), "backend": "cpu"} | kwargs))


# summary and repr --------------------------------------------------------------------------------------------------


def test_summary_lists_layers_shapes_and_parameters(backend):
    model = xpnet.Sequential(
        [layers.Flatten(), layers.Dense(100), layers.ReLU(), layers.Sequential([layers.Dense(10)])], (3, 5), backend
    )
    lines = model.summary().splitlines()
    rows = [line.split("  ") for line in lines]
    assert rows[0][0] == "name" and set(lines[1]) <= set("- ")
    cells = [[cell.strip() for cell in row if cell] for row in rows[2:-1]]
    assert [(row[0], row[1].split("(")[0], *row[2:]) for row in cells] == [
        ("0", "Flatten", "(N, 15)", "0"),
        ("1", "Dense", "(N, 100)", "1,600"),
        ("2", "ReLU", "(N, 100)", "0"),
        ("3", "Sequential", "(N, 10)", "1,010"),
    ]
    assert lines[-1] == "2,610 parameters"
    model.layers[1].trainable = False
    assert model.summary().splitlines()[-1] == "2,610 parameters, 1,600 of them frozen"


def test_repr_looks_like_the_constructor_call():
    model = xpnet.Sequential([layers.Dense(2), layers.ReLU()], backend="cpu")
    assert repr(model) == "Sequential([Dense(2), ReLU()], input_shape=None)"
    model.predict(X)
    assert repr(model) == "Sequential([Dense(2), ReLU()], input_shape=(4,), backend='cpu')"


# Invalid data and calls --------------------------------------------------------------------------------------------


def test_empty_inputs_are_refused_everywhere(backend):
    for use in (net(backend).predict, net(backend).forward):
        with pytest.raises(DataError, match="x is empty"):
            use(X[:0])


@pytest.mark.parametrize("nested", [False, True])
def test_a_refused_model_does_not_change_the_owner_of_its_layer(nested):
    shared = layers.Dense(3)
    owner = xpnet.Sequential([shared, layers.Tanh()], (4,), "cpu")
    before, names = owner.predict(SAMPLES), [p.name for p in owner.parameters]
    free = layers.Dense(4)
    stack = [free, layers.Sequential([layers.Tanh(), shared])] if nested else [free, shared]
    with pytest.raises(StateError, match="built already"):
        xpnet.Sequential(stack, (4,), "cpu")
    assert shared.is_built and shared.path == "0" and len(shared.parameters) == 2
    assert [p.name for p in owner.parameters] == names == ["0.weight", "0.bias"]
    np.testing.assert_array_equal(owner.predict(SAMPLES), before)
    assert not free.is_built and xpnet.Sequential([free], (4,), "cpu").predict(SAMPLES).shape == (20, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, path: model.fit(SAMPLES, LABELS, **QUIET),
        lambda model, path: model.train_on_batch(SAMPLES, LABELS, "softmax_cross_entropy", "sgd"),
        lambda model, path: model.evaluate(SAMPLES, LABELS, "softmax_cross_entropy"),
        lambda model, path: model.predict(SAMPLES),
        lambda model, path: model.state_dict(),
        lambda model, path: model.load_state_dict({}),
        lambda model, path: model.predict_proba(SAMPLES),
        lambda model, path: model.save(path),
        lambda model, path: model.to("cpu", dtype="float64"),
    ],
    ids=[
        *["fit", "train_on_batch", "evaluate", "predict", "state_dict", "load_state_dict", "predict_proba"],
        *["save", "to"],
    ],
)
def test_a_nested_model_refuses_methods_of_the_whole_model(tmp_path, call):
    inner = xpnet.Sequential([layers.Dense(2)], backend="cpu")
    outer = xpnet.Sequential([inner], (4,), "cpu")
    before = outer.predict(SAMPLES)
    with pytest.raises(StateError, match="another model"):
        call(inner, tmp_path / "inner")
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(outer.predict(SAMPLES), before)
    outer.fit(SAMPLES, LABELS, **QUIET)
    outer.load_state_dict(outer.state_dict())
    outer.save(tmp_path / "outer")
    assert (outer.to("cpu", dtype="float64").predict(SAMPLES) != before).any()


@pytest.mark.parametrize("x", [None, "text", ["a", "b"], [["a", "b"]], np.array([[1j]]), [None, None]])
@pytest.mark.parametrize("call", ["fit", "train_on_batch", "evaluate", "predict", "forward"])
def test_a_model_stays_unbuilt_after_text_or_none(x, call):
    model = xpnet.Sequential([layers.Dense(2)], backend="cpu")
    with pytest.raises((ArgumentTypeError, ArgumentError)):
        getattr(model, call)(*[x, LABELS][: 1 if call in ("predict", "forward") else 2])
    assert not model.is_built
    assert model.predict(SAMPLES).shape == (20, 2)


@pytest.mark.parametrize("bad", [None, "float16", int, "text", 3])
def test_only_float32_and_float64_are_accepted(bad):
    with pytest.raises(ArgumentError, match="dtype"):
        xpnet.Sequential([layers.Dense(1)], (4,), "cpu", dtype=bad)


@pytest.mark.parametrize("layer", [layers.Flatten, layers.Identity, lambda: layers.Sequential([layers.Flatten()])])
def test_a_model_without_arithmetic_predicts_floats_from_bytes(layer):
    x = np.arange(12, dtype="uint8").reshape(3, 4)
    model = xpnet.Sequential([layer()], (4,), "cpu")
    y = model.predict(x)
    assert y.dtype == "float32" and model.forward(x).dtype == "float32"
    np.testing.assert_array_equal(y, x)


def test_the_layers_of_a_model_cannot_be_removed():
    model = small_net()
    with pytest.raises(AttributeError):
        model.layers.pop()
    with pytest.raises(TypeError):
        del model.layers[0]
    assert len(model.layers) == 3 and model.predict(SAMPLES).shape == (20, 2)


def test_a_copy_needs_its_own_forward_before_backward():
    model = small_net()
    model.forward(SAMPLES)
    with pytest.raises(StateError, match=r"call model\.forward\(x\) first"):
        copy.deepcopy(model).backward(np.ones((20, 2)))
    model.backward(np.ones((20, 2)))


@pytest.mark.parametrize("layer", [lambda: layers.Dense(2), layers.LeakyReLU, layers.GELU, layers.Softplus])
def test_forward_keeps_its_own_copy_of_the_input(layer):
    model, x = xpnet.Sequential([layer()], (4,), "cpu"), SAMPLES.copy()
    grad = np.ones(model.forward(x).shape)
    expected, grads = model.backward(grad), model.context.store.grads.copy()
    model.forward(x)
    x *= -3
    np.testing.assert_array_equal(model.backward(grad), expected)
    np.testing.assert_array_equal(model.context.store.grads, grads)


def test_a_move_to_the_current_device_moves_nothing():
    model = small_net()
    values = [p.value for p in model.parameters]
    model.train_on_batch(SAMPLES, LABELS, "softmax_cross_entropy", "adam")
    means = model._state.optimizer_state.slots["means"]
    for same in (model.to("cpu"), model.to("cpu", dtype="float32"), model.to(model.backend)):
        assert same is model
    assert all(p.value is value for p, value in zip(model.parameters, values, strict=True))
    assert model._state.optimizer_state.slots["means"] is means


def test_refused_data_does_not_determine_the_shape_of_a_model():
    model = xpnet.Sequential([layers.Dense(2)], backend="cpu")
    for refused in (
        lambda: model.fit(np.zeros((0, 7)), np.zeros(0, int), verbose=0),
        lambda: model.train_on_batch(np.zeros((4, 7)), np.full(4, 9), optimizer="sgd", loss="softmax_cross_entropy"),
        lambda: model.predict(np.zeros((0, 7))),
    ):
        with pytest.raises(DataError):
            refused()
    model.fit(np.zeros((4, 3)), np.zeros(4, int), verbose=0)
    assert model.input_shape == (3,)


def test_backward_after_a_failed_forward_is_refused():
    class Failing(layers.Layer):
        on = False

        def forward(self, x):
            if self.on:
                raise KeyboardInterrupt
            return x

        def backward(self, grad_y):
            return grad_y

    model = xpnet.Sequential([layers.Dense(2), Failing(), layers.Tanh()], (3,), "cpu")
    y = model.forward(np.ones((4, 3)))
    model.layers[1].on = True
    with pytest.raises(KeyboardInterrupt):
        model.forward(np.ones((4, 3)))
    with pytest.raises(StateError, match="forward pass before it"):
        model.backward(np.ones_like(y))


def test_evaluate_takes_batches_of_1024_and_the_result_does_not_depend_on_them(backend):
    rng, sizes = np.random.default_rng(0), []

    class Sizes(layers.Layer):
        def forward(self, x):
            sizes.append(len(x))
            return x

    model = xpnet.Sequential([Sizes(), layers.Dense(3)], (4,), backend)
    x, y, weight = rng.normal(size=(2500, 4)).astype("float32"), rng.integers(0, 3, 2500), rng.uniform(0, 2, 2500)
    measured = ["accuracy", "f1", "confusion_matrix", xpnet.metrics.TopKAccuracy(2)]

    def result(**options):
        return model.evaluate(x, y, "softmax_cross_entropy", measured, sample_weight=weight, **options)

    default = result()
    assert sizes == [1024, 1024, 452]
    sizes.clear()
    whole = result(batch_size=None)
    assert sizes == [2500]
    for other in (whole, result(batch_size=100), result(batch_size=7)):
        assert other["loss"] == pytest.approx(default["loss"], rel=1e-6)
        for name in ("accuracy", "f1", "top_k_accuracy"):
            assert other[name] == pytest.approx(default[name], rel=1e-6)
        np.testing.assert_allclose(other["confusion_matrix"], default["confusion_matrix"], rtol=1e-5)
