"""Sequential: the two passes, prediction, state, copies, moves, nesting, and what its constructor refuses."""

import copy
import pickle

import numpy as np
import pytest
from own_layers import Counted
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


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def grads(model):
    return {p.name: model.backend.to_numpy(p.grad).copy() for p in model.parameters}


def adam():
    return optimizers.Adam(0.05, weight_decay=0.01)


# The two passes ----------------------------------------------------------------------------------------------------


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
def test_changing_what_passes_return_or_took_changes_nothing(backend, make):
    model = xpnet.Sequential(make(), (4,), backend)
    x = backend.asarray(X.copy())
    y = model.forward(x)
    values, grad = backend.to_numpy(y).copy(), backend.asarray(np.ones(y.shape, "float32"))
    y *= 0
    dx = model.backward(grad)
    dx_values, by_parameters = backend.to_numpy(dx).copy(), grads(model)
    np.testing.assert_array_equal(backend.to_numpy(x), X)
    np.testing.assert_array_equal(backend.to_numpy(grad), np.ones(y.shape))
    dx *= 0
    again = model.forward(x)
    np.testing.assert_array_equal(backend.to_numpy(again), values)
    np.testing.assert_array_equal(backend.to_numpy(model.backward(grad)), dx_values)
    for name, value in grads(model).items():
        np.testing.assert_array_equal(value, by_parameters[name])


def test_outputs_live_on_the_models_device(backend):
    model = net(backend)
    y = model.forward(X)
    assert isinstance(y, backend.xp.ndarray) and isinstance(model.backward(np.ones((20, 2))), backend.xp.ndarray)


def test_forward_drops_out_only_in_training(backend):
    model = xpnet.Sequential([layers.Dropout(0.5)], (4,), backend)
    np.testing.assert_array_equal(backend.to_numpy(model.forward(X)), X)
    y = backend.to_numpy(model.forward(X, training=True))
    assert 0 < (y == 0).mean() < 1
    np.testing.assert_allclose(y[y != 0], 2 * X[y != 0])


def test_backward_is_refused_without_a_forward_of_its_own(backend):
    model = net(backend)
    ones, first = np.ones((20, 2)), r"call model\.forward\(x\) first"
    with pytest.raises(StateError, match=first):
        model.backward(ones)
    model.forward(X)
    model.backward(ones)
    model.fit(X, Y, verbose=0)
    with pytest.raises(StateError, match=first):
        model.backward(ones)
    model.forward(X)
    model.train_on_batch(X, Y)
    with pytest.raises(StateError, match=first):
        model.backward(ones)
    model.forward(X)
    model.to(model.backend)  # no move, so nothing is lost
    model.backward(ones)
    model.to(model.backend, dtype="float64")
    with pytest.raises(StateError, match=first):
        model.backward(ones)


@pytest.mark.parametrize("shape", [(20, 3), (19, 2), (20,), (2,), ()])
def test_backward_refuses_gradients_of_another_shape_than_the_outputs(backend, shape):
    model = net(backend)
    model.forward(X)
    with pytest.raises(ShapeError, match=r"outputs, \(20, 2\)"):
        model.backward(np.ones(shape))


@pytest.mark.parametrize("nested", [False, True])
def test_without_input_grad_backward_returns_none_and_fills_the_same_gradients(backend, nested):
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
    for name, value in grads(model).items():
        np.testing.assert_array_equal(value, grads(other)[name])
    assert model.backward(grad) is not None  # and the next one may ask again


def test_no_layer_before_the_first_with_parameters_is_asked_its_way_back_in_vain(backend):
    class Asked(layers.Identity):
        def backward(self, grad_y):
            asked.append(self)
            return grad_y

    asked = []
    model = xpnet.Sequential([Asked(), layers.Dense(5), Asked(), layers.Dense(2)], (4,), backend)
    model.forward(X)
    model.backward(np.ones((20, 2)), input_grad=False)
    assert asked == [model.layers[2]]
    asked.clear()
    model.fit(X, Y, batch_size=None, verbose=0)
    assert asked == [model.layers[2]]


def test_backward_is_the_gradient_of_forward(backend):
    model = net(backend, dtype="float64")
    w = np.random.default_rng(1).normal(size=(20, 2))
    model.forward(X)
    dx = backend.to_numpy(model.backward(w))
    h = np.zeros_like(X, dtype="float64")
    h[3, 1] = 1e-6
    difference = (w * (model.predict(X + h) - model.predict(X - h))).sum() / 2e-6
    assert difference == pytest.approx(dx[3, 1], rel=1e-6)


def test_evaluating_between_the_passes_disturbs_neither_way_nor_buffers(backend):
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
    for name, value in grads(model).items():
        np.testing.assert_array_equal(value, grads(other)[name])


def test_a_smaller_batch_uses_the_buffers_of_a_larger_one(backend):
    model = net(backend)
    model.forward(X, training=True)
    before = [b for layer in model.layers for b in layer.work._buffers.values()]
    model.forward(X[:7], training=True)
    after = [b for layer in model.layers for b in layer.work._buffers.values()]
    assert all(a is b for a, b in zip(before, after, strict=True))


# predict and evaluate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 6, 19, 20, 1024, None])
def test_predict_is_forward_on_the_host_whatever_the_batch_size(backend, size):
    model = net(backend)
    y = model.predict(X, batch_size=size)
    assert type(y) is np.ndarray and y.dtype == np.float32 and y.shape == (20, 2)
    np.testing.assert_allclose(y, backend.to_numpy(model.forward(X)), rtol=1e-5, atol=1e-6)
    kept = y.copy()
    model.predict(2 * X, batch_size=size)
    np.testing.assert_array_equal(y, kept)


def test_evaluate_agrees_over_batch_sizes(backend):
    model = net(backend)
    whole = model.evaluate(X, Y, loss="softmax_cross_entropy")
    for size in (1, 6, 20, 50):
        assert model.evaluate(X, Y, loss="softmax_cross_entropy", batch_size=size) == pytest.approx(whole, rel=1e-5)
    assert whole["accuracy"] == np.mean(model.predict(X).argmax(axis=1) == Y)


def test_evaluate_defaults_to_the_last_trainings_choices(backend):
    model = net(backend)
    with pytest.raises(ArgumentError, match="never trained: say which loss"):
        model.evaluate(X, Y)
    model.fit(X, np.eye(2)[Y], loss=losses.HalfSquaredError("sum"), metrics=["mae", "accuracy"], verbose=0)
    assert set(model.evaluate(X, np.eye(2)[Y])) == {"loss", "mae", "accuracy"}
    assert set(model.evaluate(X, np.eye(2)[Y], metrics="r2")) == {"loss", "r2"}
    assert set(model.evaluate(X, Y, loss="softmax_cross_entropy")) == {"loss", "accuracy"}
    assert set(model.evaluate(X, Y, loss="softmax_cross_entropy", metrics=[])) == {"loss"}


@pytest.mark.parametrize("size", [0, -1, 2.5, "all"])
def test_batch_sizes_that_cannot_work_are_refused(size):
    for call in (lambda m: m.predict(X, size), lambda m: m.evaluate(X, Y, loss="mse", batch_size=size)):
        with pytest.raises(ArgumentError, match="batch_size must be a whole number"):
            call(net())


# State -------------------------------------------------------------------------------------------------------------


def test_state_dict_holds_host_copies_of_parameters_and_buffers_in_order(backend):
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
    assert_same_state(model, other)
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
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(backend, change, match):
    model = net(backend)
    before = copy.deepcopy(model)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    change(state)
    with pytest.raises(ArgumentError, match=match):
        model.load_state_dict(state)
    assert_same_state(model, before)


def test_a_state_of_text_is_refused_and_nothing_changes(backend):
    model = net(backend)
    before = copy.deepcopy(model)
    state = {name: value + 1 for name, value in model.state_dict().items()} | {"4.bias": np.array(["a", "b"])}
    with pytest.raises(ArgumentTypeError, match="4.bias"):
        model.load_state_dict(state)
    assert_same_state(model, before)


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
def test_copies_of_a_trained_model_train_on_identically_and_apart(backend, copied):
    model = net(backend)
    optimizer = adam()
    model.fit(X, Y, optimizer=optimizer, epochs=2, batch_size=6, verbose=0)
    other = copied(model)
    assert other.backend is model.backend
    assert_same_state(model, other)
    ours, theirs = set(map(id, model.parameters)), set(map(id, other.parameters))
    assert not ours & theirs and theirs == set(map(id, other.context.store.parameters))
    kept = copied(model)
    one = model.fit(X, Y, optimizer=optimizer, epochs=2, batch_size=6, verbose=0)
    assert_same_state(other, kept)  # training one leaves the other alone
    two = other.fit(X, Y, optimizer=adam(), epochs=2, batch_size=6, verbose=0)
    assert_same_state(model, other)
    assert dict(one) == dict(two)


def test_an_unbuilt_model_can_be_copied():
    model = copy.deepcopy(xpnet.Sequential([layers.Dense(2)], backend="cpu"))
    model.fit(X, Y, verbose=0)
    assert model.predict(X).shape == (20, 2)


@pytest.mark.parametrize("first", [lambda: xpnet.get_backend("cpu"), lambda: Backend("reference", np)],
                         ids=["cpu", "reference"])  # fmt: skip
def test_a_moved_model_keeps_its_parameters_and_trains_on(backend, first):
    home = first()
    model, stayed = net(home, dtype="float64"), net(home, dtype="float64")
    for m in (model, stayed):
        m.fit(X, Y, optimizer=adam(), epochs=2, batch_size=6, verbose=0)
    before = list(model.parameters)
    assert model.to(backend) is model
    assert model.backend is backend
    assert all(a is b for a, b in zip(model.parameters, before, strict=True))
    assert isinstance(before[0].value, backend.xp.ndarray)
    assert_same_state(model, stayed)
    for m in (model, stayed):
        m.fit(X, Y, optimizer=adam(), epochs=2, batch_size=6, verbose=0)
    np.testing.assert_allclose(model.predict(X), stayed.predict(X), rtol=1e-6)
    model.to(home)
    np.testing.assert_allclose(model.predict(X), stayed.predict(X), rtol=1e-6)


def test_a_model_can_change_its_dtype_and_train_on(backend):
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
def test_a_model_refuses_to_become_another_dtype(dtype):
    model = net()
    with pytest.raises(ArgumentError, match="dtype"):
        model.to("cpu", dtype=dtype)
    assert model.dtype == "float32"


@pytest.mark.skipif(not xpnet.available_backends()["gpu"], reason="there is a GPU")
def test_a_move_to_a_device_that_cannot_be_used_changes_nothing():
    model = net()
    before = copy.deepcopy(model)
    with pytest.raises(BackendError):
        model.to("gpu")
    assert model.backend.name == "cpu"
    assert_same_state(model, before)
    model.fit(X, Y, verbose=0)


def test_an_unbuilt_model_is_built_where_it_was_moved_to():
    strict = StrictBackend()
    model = xpnet.Sequential([layers.Dense(2)], backend="cpu").to(strict, dtype="float64")
    assert model.predict(X).dtype == np.float64
    assert model.backend is strict


# Nesting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [xpnet.Sequential, layers.Sequential])
def test_a_nested_sequential_trains_as_the_flat_one_does(backend, kind):
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


def test_a_layer_object_has_one_place():
    dense = layers.Dense(4)
    with pytest.raises(StateError, match="stands at 0 and 1"):
        xpnet.Sequential([dense, dense], (4,), "cpu")
    xpnet.Sequential([dense], (4,), "cpu")
    with pytest.raises(StateError, match="built already and has a place"):
        xpnet.Sequential([layers.ReLU(), dense], (4,), "cpu")
    shared = layers.Dense(4)
    with pytest.raises(StateError, match="one layer object has one place"):
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
def test_without_input_shape_a_model_is_built_by_its_first_data(backend, use):
    lazy = xpnet.Sequential([layers.Dense(2)], backend=backend, seed=3)
    assert not lazy.is_built and "not built" in lazy.summary()
    use(lazy)
    built = xpnet.Sequential([layers.Dense(2)], (4,), backend, seed=3)
    assert lazy.input_shape == (4,)
    use(built)
    assert_same_state(lazy, built)


@pytest.mark.parametrize("bad", [np.zeros(4), 3.0, None, ["a", "b"]], ids=["1-d", "0-d", "None", "text"])
def test_data_that_cannot_build_a_model_leave_it_to_be_built_by_better_ones(bad):
    model = xpnet.Sequential([layers.Dense(2)], backend="cpu")
    with pytest.raises((ArgumentError, ArgumentTypeError)):
        model.fit(bad, Y, verbose=0)
    model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("call", ["state_dict", "backward"])
def test_an_unbuilt_model_says_so(call):
    model = xpnet.Sequential([layers.Dense(2)], backend="cpu")
    with pytest.raises(StateError):
        getattr(model, call)(*[np.ones((2, 2))] * (call == "backward"))


def test_seed_none_draws_a_seed_and_keeps_it(backend):
    one, other = (net(backend, seed=None) for _ in range(2))
    assert one.seed != other.seed
    assert_same_state(one, net(backend, seed=one.seed))


def test_dtype_float64_computes_in_float64(backend):
    model = net(backend, dtype="float64")
    model.fit(X, Y, verbose=0)
    assert model.predict(X).dtype == np.float64
    assert {a.dtype for a in model.state_dict().values()} == {np.dtype("float64")}


@pytest.mark.parametrize("spelling", ["float64", np.float64, np.dtype("float64"), float])
def test_dtype_may_be_spelt_as_numpy_does(spelling):
    assert net(dtype=spelling).dtype == "float64"


@pytest.mark.parametrize("shape", [4, [4], (4,), np.int64(4)])
def test_input_shape_may_be_a_number(shape):
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
        ({"precision": "bfloat16"}, ArgumentError, "cannot be had on cpu: .*tensor cores.*Leave it out"),
        ({"precision": "bf16"}, ArgumentError, "unknown precision 'bf16'. Did you mean"),
        ({"precision": 16}, ArgumentError, "unknown precision '16'"),
        ({"precision": "tf32", "dtype": "float64"}, ArgumentError, 'goes with dtype="float32"'),
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
def test_arguments_that_cannot_make_a_model_are_refused(kwargs, error, match):
    with pytest.raises(error, match=match):
        xpnet.Sequential(**({"layers": [layers.Dense(2)], "input_shape": (4,), "backend": "cpu"} | kwargs))


# Text --------------------------------------------------------------------------------------------------------------


def test_summary_lists_layers_shapes_and_parameters(backend):
    model = xpnet.Sequential(
        [layers.Flatten(), layers.Dense(100), layers.ReLU(), layers.Sequential([layers.Dense(10)])], (3, 5), backend
    )
    lines = model.summary().splitlines()
    rows = [line.split("  ") for line in lines]
    assert rows[0][0] == "layer" and set(lines[1]) <= set("- ")
    cells = [[cell.strip() for cell in row if cell] for row in rows[2:-1]]
    assert [(row[0].split("(")[0], *row[1:]) for row in cells] == [
        ("Flatten", "(N, 15)", "0"),
        ("Dense", "(N, 100)", "1,600"),
        ("ReLU", "(N, 100)", "0"),
        ("Sequential", "(N, 10)", "1,010"),
    ]
    assert lines[-1] == "2,610 parameters"
    model.layers[1].trainable = False
    assert model.summary().splitlines()[-1] == "2,610 parameters, 1,600 of them frozen"


def test_repr_reads_like_the_call():
    model = xpnet.Sequential([layers.Dense(2), layers.ReLU()], backend="cpu")
    assert repr(model) == "Sequential([Dense(2), ReLU()], input_shape=None)"
    model.predict(X)
    assert repr(model) == "Sequential([Dense(2), ReLU()], input_shape=(4,), backend='cpu')"


# check_gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        ("softmax_cross_entropy", Y),
        (losses.SoftmaxCrossEntropy(class_weight={1: 3.0}), Y),
        ("mse", np.eye(2)[Y]),
        (losses.HalfSquaredError("sum"), np.eye(2)[Y]),
        ("binary_cross_entropy", np.eye(2)[Y]),
    ],
)
def test_check_gradients_finds_right_ones_right_and_leaves_the_model_alone(backend, loss, y):
    model = xpnet.Sequential(
        [layers.Dense(5, l1=0.01, l2=0.02), layers.Tanh(), layers.Dropout(0.4), layers.Dense(2)], (4,), backend
    )
    model.fit(X, y, loss=loss, verbose=0)
    before, state = copy.deepcopy(model), grads(model)
    errors = xpnet.check_gradients(model, X, y, loss=loss, inputs=True)
    assert list(errors) == ["0.weight", "0.bias", "3.weight", "3.bias", "inputs"]
    assert max(errors.values()) < 1e-8 and all(type(e) is float for e in errors.values())
    assert_same_state(model, before)
    assert model.dtype == "float32" and model.backend is backend
    for name, value in grads(model).items():
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
    errors = xpnet.check_gradients(model, X, Y, loss="softmax_cross_entropy")
    suspects = {"0.weight", "0.bias"} if wrong == "input" else {"1.gain"}
    assert {name for name, error in errors.items() if error > 1e-3} == suspects
    assert all(error < 1e-8 for name, error in errors.items() if name not in suspects)


def test_empty_inputs_are_refused_everywhere(backend):
    for use in (net(backend).predict, net(backend).forward):
        with pytest.raises(DataError, match="x is empty"):
            use(X[:0])
