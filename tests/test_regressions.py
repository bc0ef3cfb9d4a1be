"""What reviews found and was mended: one short test a finding, so that none comes back."""

import copy
import math
import os
import signal

import numpy as np
import pytest

import xpnet
from xpnet import callbacks, layers, losses, metrics, optimizers, schedules
from xpnet.backends import Backend
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, DivergenceError, FileError, ShapeError, StateError

X = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
Y = (X.sum(axis=1) > 0).astype(int)
QUIET = {"verbose": 0, "batch_size": 5}


def net(dtype="float32", seed=0, outputs=2):
    return xpnet.Sequential([layers.Dense(5), layers.Tanh(), layers.Dense(outputs)], (4,), "cpu", seed, dtype)


def dense(units=2, inputs=4, dtype="float32", **kwargs):
    return xpnet.Sequential([layers.Dense(units, **kwargs)], (inputs,), "cpu", dtype=dtype)


def weights(model):
    return model.context.store.values.copy()


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


class Do(callbacks.Callback):
    """Calls `action(self, model)` at every one of these moments."""

    def __init__(self, action, at="on_step_end"):
        setattr(self, at, lambda model, *rest: action(self, model))


# 1-3: layers and their places, files -------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_a_refused_model_leaves_the_model_whose_layer_it_wanted_whole(nested):
    shared = layers.Dense(3)
    owner = xpnet.Sequential([shared, layers.Tanh()], (4,), "cpu")
    before, names = owner.predict(X), [p.name for p in owner.parameters]
    free = layers.Dense(4)
    wanted = [free, layers.Sequential([layers.Tanh(), shared])] if nested else [free, shared]
    with pytest.raises(StateError, match="place"):
        xpnet.Sequential(wanted, (4,), "cpu")
    assert shared.is_built and shared.path == "0" and len(shared.parameters) == 2
    assert [p.name for p in owner.parameters] == names == ["0.weight", "0.bias"]
    np.testing.assert_array_equal(owner.predict(X), before)
    assert not free.is_built and xpnet.Sequential([free], (4,), "cpu").predict(X).shape == (20, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, path: model.fit(X, Y, **QUIET),
        lambda model, path: model.train_on_batch(X, Y, "softmax_cross_entropy", "sgd"),
        lambda model, path: model.evaluate(X, Y, "softmax_cross_entropy"),
        lambda model, path: model.predict(X),
        lambda model, path: model.state_dict(),
        lambda model, path: model.load_state_dict({}),
        lambda model, path: model.save(path),
        lambda model, path: model.to("cpu", dtype="float64"),
    ],
    ids=["fit", "train_on_batch", "evaluate", "predict", "state_dict", "load_state_dict", "save", "to"],
)
def test_a_model_inside_another_refuses_what_belongs_to_the_whole(tmp_path, call):
    inner = xpnet.Sequential([layers.Dense(2)], backend="cpu")
    outer = xpnet.Sequential([inner], (4,), "cpu")
    before = outer.predict(X)
    with pytest.raises(StateError, match="another model"):
        call(inner, tmp_path / "inner")
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(outer.predict(X), before)
    outer.fit(X, Y, **QUIET)
    outer.load_state_dict(outer.state_dict())
    outer.save(tmp_path / "outer")
    assert (outer.to("cpu", dtype="float64").predict(X) != before).any()


class Doubled(layers.Sequential):
    """A container that is more than one."""

    def forward(self, x):
        return super().forward(x) * 2

    def backward(self, grad_y):
        return super().backward(grad_y * 2)


class ReLU(layers.Layer):
    """Named like a built-in, but another function."""

    def forward(self, x):
        return -x

    def backward(self, grad_y):
        return -grad_y


@pytest.mark.parametrize("layer", [lambda: Doubled([layers.Dense(4), layers.Tanh()]), ReLU], ids=["Doubled", "ReLU"])
def test_own_layers_compute_the_same_after_load_and_never_become_built_in_ones(tmp_path, layer):
    own, path = layer(), tmp_path / "model"
    model = xpnet.Sequential([layers.Sequential([own]), layers.ReLU()], (4,), "cpu")
    model.save(path)
    with pytest.raises(FileError, match=type(own).__name__):
        xpnet.load(path, "cpu")
    loaded = xpnet.load(path, "cpu", custom_layers=[type(own)])
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))
    assert type(loaded.layers[0].layers[0]) is type(own) and type(loaded.layers[1]) is layers.ReLU


@pytest.mark.parametrize("from_end", [1, 7, 40])
def test_one_flipped_bit_in_the_weights_of_a_file_is_noticed(tmp_path, from_end):
    path = tmp_path / "model"
    net().save(path)
    content = bytearray(path.read_bytes())
    content[-from_end] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match="SHA-256"):
        xpnet.load(path, "cpu")


# 5, 6: a fit inside a fit, a refused fit ---------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["on_train_begin", "on_epoch_begin", "on_step_end", "on_epoch_end", "on_train_end"])
@pytest.mark.parametrize(
    "train",
    [
        lambda model: model.fit(X, Y, **QUIET),
        lambda model: model.train_on_batch(X, Y, "softmax_cross_entropy", "sgd"),
        lambda model: model.to("cpu", dtype="float64"),
    ],
    ids=["fit", "train_on_batch", "to"],
)
def test_a_callback_cannot_train_or_move_the_model_that_trains(at, train):
    model = net()
    with pytest.raises(StateError, match="fit is running"):
        model.fit(X, Y, callbacks=[Do(lambda callback, model: train(model), at)], **QUIET)
    assert model.dtype == "float32"
    train(model)  # it runs no longer


def test_a_callback_may_evaluate_predict_and_save_without_a_change_to_the_result(tmp_path):
    def look(callback, model):
        model.evaluate(X, Y)
        model.evaluate(X, Y, loss="softmax_cross_entropy", metrics="precision", batch_size=3)
        model.predict(X)
        model.state_dict()
        model.save(tmp_path / "model")

    plain, watched = net(), net()
    history = plain.fit(X, Y, epochs=2, **QUIET)
    assert watched.fit(X, Y, epochs=2, callbacks=[Do(look)], **QUIET) == history
    assert_same_state(watched.state_dict(), plain.state_dict())
    assert_same_state(xpnet.load(tmp_path / "model", "cpu").state_dict(), plain.state_dict())


@pytest.mark.parametrize("at", ["on_train_begin", "on_step_end", "on_train_end"])
def test_after_an_error_in_a_callback_a_new_fit_works(at):
    model = net()
    with pytest.raises(ZeroDivisionError):
        model.fit(X, Y, callbacks=[Do(lambda callback, model: 1 / 0, at)], **QUIET)
    assert len(model.fit(X, Y, **QUIET)["loss"]) == 1
    assert model.train_on_batch(X, Y) and model.to("cpu", dtype="float64").dtype == "float64"


BAD_Y, BAD_X = Y + 7, np.full_like(X, np.nan)


@pytest.mark.parametrize(
    "refused",
    [
        lambda model: model.fit(X, np.eye(2)[Y], loss="mse", optimizer="adam", callbacks=[print], **QUIET),
        lambda model: model.fit(X, np.eye(2)[Y], loss="mse", optimizer="adam", verbose=7),
        lambda model: model.fit(X, np.eye(3)[Y], loss="mse", optimizer="adam", **QUIET),
        lambda model: model.fit(BAD_X, Y, loss="mse", optimizer="adam", **QUIET),
        lambda model: model.fit(X, BAD_Y, optimizer="adam", **QUIET),
        lambda model: model.fit(X, np.eye(2)[Y], loss="mse", validation_data=(X, BAD_Y), **QUIET),
        lambda model: model.fit(X, np.eye(2)[Y], loss="mse", optimizer="adm", **QUIET),
        lambda model: model.train_on_batch(X, np.eye(3)[Y], "mse", "adam"),
        lambda model: model.train_on_batch(BAD_X, np.eye(2)[Y], "mse", "adam"),
    ],
)
def test_a_refused_training_leaves_optimiser_step_and_loss(refused):
    model = net()
    model.fit(X, Y, optimizer=optimizers.SGD(0.1, momentum=0.9), **QUIET)
    state = model._state
    memory, loss, measured, slot = state.memory, state.loss, state.metrics, state.memory.slots["velocity"].copy()
    before, optimizer = weights(model), state.optimizer
    with pytest.raises((ArgumentError, ArgumentTypeError)):
        refused(model)
    assert state.memory is memory and state.loss is loss and state.metrics is measured and state.optimizer is optimizer
    assert (state.step, state.epoch, state.running) == (4, 1, False)
    np.testing.assert_array_equal(memory.slots["velocity"], slot)
    np.testing.assert_array_equal(weights(model), before)
    assert set(model.evaluate(X, Y)) == {"loss", "accuracy"}


@pytest.mark.parametrize("x", [None, "text", ["a", "b"], [["a", "b"]], np.array([[1j]]), [None, None]])
@pytest.mark.parametrize("call", ["fit", "train_on_batch", "evaluate", "predict", "forward"])
def test_a_model_refused_for_text_or_nothing_is_still_unbuilt(x, call):
    model = xpnet.Sequential([layers.Dense(2)], backend="cpu")
    with pytest.raises((ArgumentTypeError, ArgumentError)):
        getattr(model, call)(*[x, Y][: 1 if call in ("predict", "forward") else 2])
    assert not model.is_built
    assert model.predict(X).shape == (20, 2)


# 7: what initialises and fills -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, lambda shape, rng: np.zeros(shape), np.array(["a"]), object(), 1j])
@pytest.mark.parametrize("argument", ["weight_initializer", "bias_initializer"])
def test_an_initializer_that_gives_no_numbers_is_refused(bad, argument):
    with pytest.raises(ArgumentTypeError, match="initializer"):
        dense(**{argument: bad})


@pytest.mark.parametrize("bad", [None, 1j, np.full((4, 2), 1j), "text", np.full((4, 2), "1")])
@pytest.mark.parametrize("which", ["value", "grad"])
def test_a_parameter_takes_real_numbers_only(bad, which):
    parameter = dense(weight_initializer="ones").parameters[0]
    parameter.grad = 1.0
    with pytest.raises(ArgumentTypeError, match="0.weight"):
        setattr(parameter, which, bad)
    np.testing.assert_array_equal(getattr(parameter, which), np.ones((4, 2)))


# 8, 9: metrics and losses by hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint64", "int64"])
def test_errors_of_unsigned_integers_do_not_wrap(dtype):
    def ints(a):
        return np.array(a, dtype)

    assert metrics.MeanAbsoluteError()(ints([0, 5]), ints([1, 3])) == 1.5
    assert metrics.MeanSquaredError()(ints([[0]]), ints([[20]])) == 400
    assert metrics.R2()(ints([0, 5]), ints([1, 3])) == -1.5
    assert metrics.MeanSquaredError()(np.zeros((1, 1)), ints([[20]])) == 400


@pytest.mark.parametrize(
    "metric",
    [metrics.Accuracy(), metrics.TopKAccuracy(2), metrics.ConfusionMatrix(), metrics.Precision(), metrics.F1()],
    ids=lambda metric: metric.name,
)
@pytest.mark.parametrize("labels", [[0, 3], [-1, 0], [[0], [3]], [0, 255]])
def test_labels_that_no_output_stands_for_are_refused(metric, labels):
    with pytest.raises(DataError, match="labels"):
        metric(np.eye(3)[[0, 1]], labels)


@pytest.mark.parametrize("metric", [metrics.Accuracy, metrics.ConfusionMatrix, metrics.Precision, metrics.Recall])
@pytest.mark.parametrize("outputs", [[0.2, 0.9], [[0.2], [0.9]]])
def test_one_output_refuses_targets_beyond_yes_and_no(metric, outputs):
    for targets in ([0, 2], [-1, 1]):
        with pytest.raises(DataError, match=r"\[0, 1\]"):
            metric()(outputs, targets)


def test_training_and_evaluation_refuse_accuracy_of_targets_beyond_yes_and_no():
    model, far = net(outputs=1), Y * 5.0
    before = weights(model)
    with pytest.raises(DataError, match="accuracy"):
        model.fit(X, far, loss="mse", metrics="accuracy", **QUIET)
    with pytest.raises(DataError, match="accuracy"):
        model.fit(X, Y, loss="mse", metrics="accuracy", validation_data=(X, far), **QUIET)
    with pytest.raises(DataError, match="accuracy"):
        model.train_on_batch(X, far, "mse", "sgd", metrics="accuracy")
    with pytest.raises(DataError, match="accuracy"):
        model.evaluate(X, far, loss="mse", metrics="accuracy")
    np.testing.assert_array_equal(weights(model), before)
    assert 0 <= model.evaluate(X, Y, loss="mse", metrics="accuracy")["accuracy"] <= 1


def test_one_precision_shared_by_a_binary_and_a_ternary_model_does_not_mix():
    shared, y3 = metrics.Precision(), np.arange(20) % 3
    ternary = net(outputs=3)
    apart = ternary.evaluate(X, y3, "softmax_cross_entropy", metrics=metrics.Precision())
    together = []

    def look(callback, model):
        together.append(ternary.evaluate(X, y3, "softmax_cross_entropy", metrics=shared))

    one = net(outputs=1).fit(X, Y, "mse", metrics=metrics.Precision(), **QUIET)
    other = net(outputs=1).fit(X, Y, "mse", metrics=shared, callbacks=[Do(look)], **QUIET)
    assert other == one and together == [apart] * 4


@pytest.mark.parametrize("bad", [1.0, [1.0], [[1.0], [1.0]], [[1.0, 1.0]], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("loss", [losses.MeanSquaredError(), losses.SoftmaxCrossEntropy(), metrics.Accuracy()])
def test_weights_of_a_wrong_shape_are_refused_by_hand(bad, loss):
    targets = np.eye(2)
    assert loss(np.eye(2), targets, [1.0, 3.0]) >= 0
    with pytest.raises(ShapeError, match="weight"):
        loss(np.eye(2), targets, bad)


# 10: layers and losses of a user's own that break their promise ----------------------------------------------------


class Liar(layers.Layer):
    def __init__(self, lie):
        self.lie = lie

    def forward(self, x):
        return {"none": None, "shape": x[:, :1], "flat": x.sum(axis=1), "dtype": x.astype("float64")}[self.lie]

    def backward(self, grad_y):
        return grad_y


@pytest.mark.parametrize("lie", ["none", "shape", "flat", "dtype"])
def test_a_last_layer_that_gives_what_its_build_did_not_promise_is_named(lie):
    model = xpnet.Sequential([layers.Dense(2), Liar(lie)], (4,), "cpu")
    for call in (
        lambda: model.forward(X),
        lambda: model.predict(X),
        lambda: model.evaluate(X, Y, "softmax_cross_entropy"),
        lambda: model.fit(X, Y, **QUIET),
        lambda: model.train_on_batch(X, Y, "softmax_cross_entropy", "sgd"),
    ):
        with pytest.raises(ShapeError, match="Liar"):
            call()


class Columns(losses.MeanSquaredError):
    """Forgets the mean over a sample's outputs."""

    def samples(self, backend, outputs, targets):
        return (outputs - targets) ** 2


class Total(Columns):
    def samples(self, backend, outputs, targets):
        return super().samples(backend, outputs, targets).sum()


@pytest.mark.parametrize("loss", [Columns(), Total()], ids=["(N, K)", "()"])
def test_a_loss_that_gives_not_one_number_a_sample_is_refused(loss):
    model, targets = net(), np.eye(2)[Y]
    before = weights(model)
    for call in (
        lambda: model.evaluate(X, targets, loss),
        lambda: model.fit(X, targets, loss, **QUIET),
        lambda: model.train_on_batch(X, targets, loss, "sgd"),
    ):
        with pytest.raises(ShapeError, match="one number a sample"):
            call()
    np.testing.assert_array_equal(weights(model), before)


# 11: logs ----------------------------------------------------------------------------------------------------------


def test_a_csv_log_does_not_append_other_columns(tmp_path):
    path = tmp_path / "log.csv"
    net().fit(X, Y, callbacks=[callbacks.CSVLogger(path)], **QUIET)
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match="columns"):
        net().fit(X, Y, metrics=[], callbacks=[callbacks.CSVLogger(path, append=True)], **QUIET)
    assert path.read_bytes() == before
    net().fit(X, Y, callbacks=[callbacks.CSVLogger(path, append=True)], **QUIET)
    assert path.read_bytes().startswith(before) and path.read_bytes().count(b"\n") == 3


# 12-14: weights and data -------------------------------------------------------------------------------------------


def test_the_scale_of_sample_weights_does_not_matter():
    weight, ends = np.linspace(0.5, 2, 20), []
    for scale in (1.0, 1e-32):
        model = net("float64")
        history = model.fit(X, Y, optimizer=optimizers.SGD(0.5), sample_weight=weight * scale, epochs=3, **QUIET)
        ends.append((weights(model), history["loss"], history["accuracy"]))
    for one, other in zip(*ends, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-9)


def test_a_batch_without_weight_changes_nothing():
    weight, seen = np.repeat([1.0, 0.0], 10), []
    model = net()
    look = Do(lambda callback, model: seen.append(weights(model)))
    history = model.fit(
        X, Y, optimizer=optimizers.SGD(0.5), sample_weight=weight, shuffle=False, callbacks=[look], **QUIET
    )
    assert len(seen) == 4 and np.isfinite(history["loss"]).all()
    assert (seen[0] != seen[1]).any()
    np.testing.assert_array_equal(seen[2], seen[1])
    np.testing.assert_array_equal(seen[3], seen[1])


@pytest.mark.parametrize(
    "bad", [{0.5: 2}, {0: 0.0, 1: 0.0}, [0, 0], {"0": 1}, {-1: 1.0}, {2: 1.0}, {0: np.nan}, {0: np.inf}, {0: -1}, 3, {}]
)
def test_useless_class_weights_are_refused(bad):
    model = net()
    with pytest.raises(ArgumentError, match="class_weight"):
        model.fit(X, Y, class_weight=bad, **QUIET)
    with pytest.raises(ArgumentError, match="class_weight"):
        model.fit(X, Y, loss=losses.SoftmaxCrossEntropy(class_weight=bad), **QUIET)
    assert model._state.memory is None


@pytest.mark.parametrize("which", ["x", "y"])
def test_data_beyond_float32_is_refused_before_training(which):
    data = {"x": X.astype("float64"), "y": X[:, :2].astype("float64")}
    data[which][3, 1] = 1e300
    model = net()
    before = weights(model)
    for call in (
        lambda: model.fit(**data, loss="mse", **QUIET),
        lambda: model.train_on_batch(**data, loss="mse", optimizer="sgd"),
        lambda: model.evaluate(**data, loss="mse"),
    ):
        with pytest.raises(DataError, match=f"^{which} .*float32.*sample 3"):
            call()
    np.testing.assert_array_equal(weights(model), before)


# 15, 16: optimisers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e24, 1e37, 1e-30])
def test_clipping_scales_huge_gradients_to_the_limit_and_leaves_tiny_ones(size):
    model = dense(weight_initializer="zeros")
    store, optimizer = model.context.store, optimizers.SGD(1.0, clip_norm=0.5)
    model.parameters[0].grad = size
    optimizer.apply(store, optimizers.OptimizerState(optimizer, store))
    expected = min(0.5, np.sqrt(8) * size)
    np.testing.assert_allclose(np.linalg.norm(store.values.astype("float64")), expected, rtol=1e-6)


def test_a_learning_rate_changed_between_fits_goes_on():
    model, optimizer = net(), optimizers.Adam(0.01)
    model.fit(X, Y, optimizer=optimizer, epochs=2, **QUIET)
    memory = model._state.memory
    optimizer.learning_rate = 0.5
    epochs = []
    model.fit(X, Y, optimizer=optimizer, callbacks=[Do(lambda c, m: epochs.append(m._state.epoch))], **QUIET)
    assert model._state.memory is memory and set(epochs) == {2}
    assert (model._state.epoch, model._state.step, model._state.learning_rate) == (3, 12, 0.5)


def test_momentum_switched_on_between_fits_starts_afresh():
    model, optimizer = net(), optimizers.SGD(0.1)
    model.fit(X, Y, optimizer=optimizer, epochs=2, **QUIET)
    optimizer.momentum = 0.9
    fresh = net()
    fresh.load_state_dict(model.state_dict())
    model.fit(X, Y, optimizer=optimizer, **QUIET)
    fresh.fit(X, Y, optimizer=optimizers.SGD(0.1, momentum=0.9), **QUIET)
    assert (model._state.epoch, model._state.step) == (1, 4)
    assert_same_state(model.state_dict(), fresh.state_dict())


# 17-20: models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, "float16", int, "text", 3])
def test_only_the_two_dtypes_are_taken(bad):
    with pytest.raises(ArgumentError, match="dtype"):
        xpnet.Sequential([layers.Dense(1)], (4,), "cpu", dtype=bad)


@pytest.mark.parametrize("layer", [layers.Flatten, layers.Identity, lambda: layers.Sequential([layers.Flatten()])])
def test_a_model_that_only_rearranges_predicts_floats_from_bytes(layer):
    x = np.arange(12, dtype="uint8").reshape(3, 4)
    model = xpnet.Sequential([layer()], (4,), "cpu")
    y = model.predict(x)
    assert y.dtype == "float32" and model.forward(x).dtype == "float32"
    np.testing.assert_array_equal(y, x)


def test_the_layers_of_a_model_cannot_be_popped():
    model = net()
    with pytest.raises(AttributeError):
        model.layers.pop()
    with pytest.raises(TypeError):
        del model.layers[0]
    assert len(model.layers) == 3 and model.predict(X).shape == (20, 2)


@pytest.mark.parametrize("after", [layers.Identity, layers.Flatten, lambda: layers.Reshape((2,))])
def test_softmax_before_a_layer_that_passes_on_still_warns(after):
    for last in ([layers.Softmax(), after()], [layers.Sequential([layers.Softmax(), after()])]):
        model = xpnet.Sequential([layers.Dense(2), *last], (4,), "cpu")
        with pytest.warns(UserWarning, match="takes logits"):
            model.fit(X, Y, **QUIET)


@pytest.mark.parametrize("at", ["on_step_end", "on_epoch_end"])
def test_stopping_without_a_reason_stops(at):
    history = net().fit(X, Y, epochs=5, callbacks=[Do(lambda callback, model: callback.stop(""), at)], **QUIET)
    assert len(history["loss"]) == 1 and history.stopped == ""


def test_ctrl_c_in_the_last_step_of_an_epoch_keeps_the_epoch():
    def interrupt(callback, model):
        if callback.run.seen == callback.run.samples:
            os.kill(os.getpid(), signal.SIGINT)

    model, plain = net(), net()
    history = model.fit(X, Y, epochs=3, callbacks=[Do(interrupt)], **QUIET)
    assert history.stopped == "interrupted" and history == plain.fit(X, Y, **QUIET)
    assert len(history.seconds) == 1 and model._state.epoch == 1
    assert_same_state(model.state_dict(), plain.state_dict())


class Twice(layers.Layer):
    def __init__(self, second):
        self.second = second

    def build(self, input_shape):
        self.add_parameter("w", (2,), "zeros")
        self.add_parameter("w", (2,), "ones") if self.second == "parameter" else self.add_buffer("w", np.zeros(2))
        return input_shape


@pytest.mark.parametrize("second", ["parameter", "buffer"])
def test_two_arrays_of_one_name_are_refused(second):
    with pytest.raises(ArgumentError, match="w'"):
        xpnet.Sequential([Twice(second)], (4,), "cpu")


def test_a_frozen_layer_stays_frozen_through_a_file(tmp_path):
    model = net()
    model.layers[0].trainable = False
    model.save(tmp_path / "model")
    loaded = xpnet.load(tmp_path / "model", "cpu")
    assert [p.trainable for p in loaded.parameters] == [False, False, True, True]
    before = loaded.state_dict()
    loaded.fit(X, Y, **QUIET)
    changed = [name for name, value in loaded.state_dict().items() if (value != before[name]).any()]
    assert changed == ["2.weight", "2.bias"]


def test_a_copy_wants_a_forward_of_its_own():
    model = net()
    model.forward(X)
    with pytest.raises(StateError, match=r"call model\.forward\(x\) first"):
        copy.deepcopy(model).backward(np.ones((20, 2)))
    model.backward(np.ones((20, 2)))


@pytest.mark.parametrize("layer", [lambda: layers.Dense(2), layers.LeakyReLU, layers.GELU, layers.Softplus])
def test_forward_keeps_its_own_copy_of_the_input(layer):
    model, x = xpnet.Sequential([layer()], (4,), "cpu"), X.copy()
    grad = np.ones(model.forward(x).shape)
    expected, grads = model.backward(grad), model.context.store.grads.copy()
    model.forward(x)
    x *= -3
    np.testing.assert_array_equal(model.backward(grad), expected)
    np.testing.assert_array_equal(model.context.store.grads, grads)


def test_a_move_to_where_the_model_is_moves_nothing():
    model = net()
    values = [p.value for p in model.parameters]
    model.train_on_batch(X, Y, "softmax_cross_entropy", "adam")
    memory = model._state.memory.slots["means"]
    for same in (model.to("cpu"), model.to("cpu", dtype="float32"), model.to(model.backend)):
        assert same is model
    assert all(p.value is value for p, value in zip(model.parameters, values, strict=True))
    assert model._state.memory.slots["means"] is memory


# 21-23: numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [np.array([0, 1]), np.eye(3)[[0, 1]]], ids=["numbers", "probabilities"])
def test_a_logit_of_minus_infinity_on_another_class_costs_nothing(backend, targets):
    loss, logits = losses.SoftmaxCrossEntropy(), [[0.0, 0.0, -np.inf], [-np.inf, 1.0, 1.0]]
    assert loss(logits, targets) == pytest.approx(np.log(2), rel=1e-12)
    outputs, y = backend.asarray(np.array(logits)), backend.asarray(targets)
    per_sample, grad = loss.samples_and_gradient(backend, outputs, y)
    for ell, gradient in ((per_sample, grad), (loss.samples(backend, outputs, y), loss.gradient(backend, outputs, y))):
        np.testing.assert_allclose(backend.to_numpy(ell), np.log([2, 2]), rtol=1e-12)
        np.testing.assert_allclose(backend.to_numpy(gradient), [[-0.5, 0.5, 0], [0, -0.5, 0.5]], rtol=1e-12)


def test_the_gradient_of_one_bias_is_right_over_many_rows():
    n, model = 200_000, dense(units=1, inputs=1)
    model.forward(np.zeros((n, 1), "float32"))
    model.backward(np.full((n, 1), 0.1), input_grad=False)
    np.testing.assert_allclose(model.layers[0].bias.grad, n * float(np.float32(0.1)), rtol=1e-6)


@pytest.mark.parametrize("bad", [{"samples": 0}, {"samples": -1}, {"samples": 2.5}, {"step": 0}, {"step": -1e-5}])
def test_a_gradient_check_of_nothing_is_refused(bad):
    (name,) = bad
    with pytest.raises(ArgumentError, match=name):
        xpnet.check_gradients(net(), X, X[:, :2], **bad)


# 24: divergence ----------------------------------------------------------------------------------------------------


def test_after_divergence_the_epochs_start_stands_though_the_best_was_to_be_restored():
    starts, stopping = [], callbacks.EarlyStopping("loss", patience=9)
    begin = Do(lambda callback, model: starts.append(weights(model)), "on_epoch_begin")
    # Up the slope at first, so that the best epoch is not the one before the divergence.
    optimizer = optimizers.SGD(lambda step: -0.05 if step < 12 else 1e200)
    model = dense(dtype="float64")
    with pytest.raises(DivergenceError, match="epoch 4"):
        model.fit(X, X[:, :2], "mse", optimizer, 9, callbacks=[stopping, begin], **QUIET)
    assert stopping.best_epoch == 0 and len(starts) == 4 and (starts[3] != starts[1]).any()
    np.testing.assert_array_equal(weights(model), starts[3])
    assert (model._state.step, model._state.epoch) == (12, 3)


def test_a_single_batch_that_diverges_is_left_out():
    model, far = net(), np.full((20, 2), 1e30)
    model.train_on_batch(X, X[:, :2], "mse", "adam")
    before, slot = weights(model), model._state.memory.slots["means"].copy()
    with pytest.raises(DivergenceError, match="update 2"):
        model.train_on_batch(X, far)
    np.testing.assert_array_equal(weights(model), before)
    np.testing.assert_array_equal(model._state.memory.slots["means"], slot)
    assert model._state.step == 1 and np.isfinite(model.train_on_batch(X, X[:, :2])["loss"])


def test_weights_lost_in_the_last_update_of_an_epoch_are_noticed_in_it():
    model = net()
    before = weights(model)
    with pytest.raises(DivergenceError, match="weights became NaN or infinite in epoch 1, at step 1 of 1"):
        model.fit(X, X[:, :2] * 1e9, "mse", optimizers.SGD(1e38), epochs=1, batch_size=None, verbose=0)
    np.testing.assert_array_equal(weights(model), before)
    assert model._state.step == 0


# 25: class weights and figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["accuracy", "precision"])
def test_class_weights_stay_out_of_the_metrics(metric):
    plain = net().fit(X, Y, metrics=metric, batch_size=None, verbose=0)
    given = net().fit(X, Y, metrics=metric, class_weight={0: 1, 1: 9}, batch_size=None, verbose=0)
    of_loss = losses.SoftmaxCrossEntropy(class_weight={0: 1, 1: 9})
    in_loss = net().fit(X, Y, of_loss, metrics=metric, batch_size=None, verbose=0)
    assert given[metric] == plain[metric] == in_loss[metric]
    assert given["loss"] == in_loss["loss"] != plain["loss"]


# Arguments of a wrong type -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["a", None, True, np.nan, np.full(2, 0.5), 1j], ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        layers.Dense,
        lambda bad: xpnet.Sequential([layers.Dense(1, l1=bad)], (2,), "cpu"),
        layers.Dropout,
        layers.LeakyReLU,
        layers.ELU,
        layers.Step,
        layers.Rescale,
        layers.Reshape,
        layers.Permute,
        losses.Huber,
        losses.SoftmaxCrossEntropy,
        optimizers.SGD,
        lambda bad: optimizers.SGD(0.1, momentum=bad),
        lambda bad: optimizers.Adam(epsilon=bad),
        lambda bad: optimizers.Adam(weight_decay=bad),
        lambda bad: schedules.CosineDecay(0.1, bad),
        metrics.TopKAccuracy,
        lambda bad: callbacks.EarlyStopping(patience=bad),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(make, bad):
    with pytest.raises(ArgumentError):
        make(bad)


def test_the_class_of_a_schedule_is_no_learning_rate():
    with pytest.raises(ArgumentError, match="a schedule, not <class"):
        optimizers.SGD(schedules.CosineDecay)


@pytest.mark.parametrize("columns", [1, 2, 64])
def test_a_sum_over_many_rows_keeps_its_digits(columns):
    backend = xpnet.get_backend("cpu")
    out = backend.sum_rows(np.full((200_000, columns), 0.1, np.float32), np.empty(columns, np.float32))
    np.testing.assert_allclose(out, np.float32(0.1) * 200_000.0, rtol=1e-6)


def test_a_layer_frozen_in_a_file_says_so_when_it_is_loaded(tmp_path):
    model = xpnet.Sequential([layers.Dense(2), layers.Dense(2)], (2,), "cpu")
    model.layers[0].trainable = False
    model.save(tmp_path / "m")
    assert [layer.trainable for layer in xpnet.load(tmp_path / "m", "cpu").layers] == [False, True]


def test_a_container_of_ones_own_is_not_taken_for_xpnets_by_its_name(tmp_path):
    class Sequential(layers.Sequential):
        def forward(self, x):
            return super().forward(x) + 1.0

    model = xpnet.Sequential([Sequential([layers.Dense(2)])], (2,), "cpu")
    model.save(tmp_path / "m")
    with pytest.raises(FileError, match="custom_layers"):
        xpnet.load(tmp_path / "m", "cpu")
    loaded = xpnet.load(tmp_path / "m", "cpu", custom_layers=[Sequential])
    np.testing.assert_array_equal(loaded.predict(np.ones((3, 2))), model.predict(np.ones((3, 2))))


class Widening(layers.Layer):
    """A layer that breaks the promise of its build, to keep the shape."""

    def forward(self, x):
        return self.xp.concatenate([x, x], axis=-1)


def test_a_layer_that_gives_another_shape_than_it_said_is_named(backend):
    model = xpnet.Sequential([layers.Conv2D(8, 1), Widening(), layers.Conv2D(4, 3)], (8, 8, 2), backend)
    for work in (model.predict, model.forward):
        with pytest.raises(ShapeError, match=r"layer 1 \(Widening\) was to give \(N, 8, 8, 8\).*\(3, 8, 8, 16\)"):
            work(np.ones((3, 8, 8, 2)))


@pytest.mark.parametrize(
    "layer", [layers.Conv2D(4, 3), layers.Conv2DTranspose(4, 3), layers.MaxPool2D(2), layers.AvgPool2D(2)], ids=repr
)
def test_a_layer_alone_refuses_images_that_it_was_not_built_for(backend, layer):
    layer = type(layer)(**layer.get_config())
    layer.build((8, 8, 2), backend=backend)
    for shape in ((2, 8, 8, 64), (2, 8, 8, 1), (2, 9, 8, 2)):
        with pytest.raises(ShapeError, match=r"expects \(N, 8, 8, 2\)"):
            layer.forward(backend.xp.ones(shape, dtype="float32"))


def test_an_embedding_alone_refuses_what_is_out_of_range(backend):
    layer = layers.Embedding(5, 2)
    layer.build((2,), backend=backend)
    with pytest.raises(DataError, match="holds 7 in sample 0"):
        layer.forward(backend.asarray(np.array([[0, 7]])))


def test_a_batch_that_is_left_out_leaves_the_running_figures_alone(backend, rng):
    model = xpnet.Sequential([layers.Dense(4), layers.BatchNorm(), layers.Dense(1)], (3,), backend)
    x = rng.normal(size=(8, 3)).astype(np.float32)
    model.train_on_batch(x, x.sum(axis=1), loss="mse", optimizer="sgd")
    before = model.state_dict()
    extreme = x.copy()
    extreme[:2] = [[3e38], [-3e38]]
    for bad, y in ((extreme, x.sum(axis=1)), (x + 100, np.full(8, 1e30))):
        with pytest.raises(DivergenceError, match="left out"):
            model.train_on_batch(bad, y)
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_a_running_variance_that_overflows_is_noticed(backend, rng):
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


def test_the_mean_of_many_pixels_keeps_its_digits(backend):
    x = np.full((1, 512, 512, 3), 0.1, np.float32)
    for layer in (layers.GlobalAveragePool2D(), layers.AvgPool2D(512)):
        model = xpnet.Sequential([layer], (512, 512, 3), backend)
        np.testing.assert_allclose(model.predict(x).ravel(), 0.1, rtol=1e-6)


def test_a_model_of_single_numbers_comes_back_from_its_file(tmp_path):
    model = xpnet.Sequential([layers.Embedding(5, 3), layers.Dense(2)], (), "cpu")
    model.save(tmp_path / "m")
    loaded = xpnet.load(tmp_path / "m", "cpu")
    np.testing.assert_array_equal(loaded.predict(np.arange(5)), model.predict(np.arange(5)))


def test_a_whole_float_is_a_depth_multiplier():
    layer = layers.DepthwiseConv2D(3, depth_multiplier=2.0)
    assert xpnet.Sequential([layer], (8, 8, 4), "cpu").output_shape == (6, 6, 8)


def test_data_that_is_refused_does_not_fix_the_shape_of_a_model():
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


def test_backward_after_a_forward_that_failed_is_refused():
    class Boom(layers.Layer):
        on = False

        def forward(self, x):
            if self.on:
                raise KeyboardInterrupt
            return x

        def backward(self, grad_y):
            return grad_y

    model = xpnet.Sequential([layers.Dense(2), Boom(), layers.Tanh()], (3,), "cpu")
    y = model.forward(np.ones((4, 3)))
    model.layers[1].on = True
    with pytest.raises(KeyboardInterrupt):
        model.forward(np.ones((4, 3)))
    with pytest.raises(StateError, match="forward pass before it"):
        model.backward(np.ones_like(y))


def test_whole_numbers_have_no_gradient_to_check():
    model = xpnet.Sequential([layers.Embedding(5, 3), layers.Flatten(), layers.Dense(1)], (4,), "cpu")
    wrong = xpnet.check_gradients(model, np.zeros((6, 4), int), np.ones((6, 1)), inputs=True)
    assert list(wrong) == ["0.weight", "2.weight", "2.bias"]
    assert max(wrong.values()) < 1e-6


@pytest.mark.parametrize("bad", [0, -1, None, "x", True, math.nan, math.inf])
def test_a_workspace_is_a_number_of_bytes(bad):
    backend = Backend("reference", np)
    with pytest.raises(ArgumentError, match="workspace_bytes"):
        backend.workspace_bytes = bad
    backend.workspace_bytes = 1e5
    assert backend.workspace_bytes == 100_000


def test_a_container_is_trainable_where_something_in_it_is():
    inner = layers.Sequential([layers.Dense(3), layers.ReLU()])
    xpnet.Sequential([inner], (4,), "cpu")
    inner.layers[0].trainable = False
    assert not inner.trainable
