"""fit and train_on_batch: batches, histories, weights, accumulation, state between fits, divergence, interrupts."""

import copy
import os
import signal
import threading

import numpy as np
import pytest
from custom_layers import Spy
from small_models import LABELS, QUIET, SAMPLES, Do, assert_same_state, dense_net, small_net, values_of

import xpnet
from xpnet import callbacks, datasets, layers, losses, metrics, optimizers, schedules
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, DivergenceError, ShapeError, StateError
from xpnet.training.state import Untrained

X, Y = datasets.blobs(103, classes=3, seed=3)
ONE_HOT = np.eye(3)[Y]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def mlp(backend, *, seed=0, dtype="float32", dropout=0.0, l2=0.0, outputs=3):
    inner = [layers.Dropout(dropout)] if dropout else []
    return xpnet.Sequential(
        [layers.Dense(8, l2=l2), layers.Tanh(), *inner, layers.Dense(outputs)], (2,), backend, seed=seed, dtype=dtype
    )


def linear(backend, **kwargs):
    return xpnet.Sequential([layers.Dense(1, **kwargs)], (2,), backend, dtype="float64")


def assert_same_metrics(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], err_msg=name, **CLOSE)


def weights_of(model):
    return np.concatenate([a.ravel() for a in model.state_dict().values()])


def slots_of(model):
    return {name: model.backend.to_numpy(slot) for name, slot in model._state.optimizer_state.slots.items()}


class AtStep(callbacks.Callback):
    """Calls `action(self, model)` after the step of this number, and records the numbers of all steps."""

    def __init__(self, number, action):
        self.number, self.action, self.steps = number, action, []

    def on_step_end(self, model, step):
        self.steps.append(step)
        if step == self.number:
            self.action(self, model)


def fit_numbers(backend, n=103, **kwargs):
    """Fit on the samples 0 … n - 1; return the batches as arrays of sample numbers."""
    spy = Spy()
    model = xpnet.Sequential([spy, layers.Dense(1)], (1,), backend)
    x = np.arange(n, dtype="float32")[:, None]
    model.fit(x, x / n, loss="mse", optimizer=optimizers.SGD(1e-6), verbose=0, **kwargs)
    return [batch.ravel().astype(int) for batch in spy.seen]


# Batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(10, [10] * 10 + [3]), (None, [103]), (1, [1] * 103), (103, [103]), (1000, [103])]
)
def test_every_sample_is_used_once_per_epoch(backend, eager_steps, batch_size, sizes, shuffle):
    batches = fit_numbers(backend, epochs=2, batch_size=batch_size, shuffle=shuffle)
    assert [len(batch) for batch in batches] == sizes * 2
    first, second = (np.concatenate(part).tolist() for part in (batches[: len(sizes)], batches[len(sizes) :]))
    assert sorted(first) == sorted(second) == list(range(103))
    shuffled = shuffle and len(sizes) > 1
    assert (first != list(range(103))) == shuffled
    assert (first != second) == shuffled


@pytest.mark.parametrize("batch_size", [None, 1, 7, 64])
def test_training_works_with_any_batch_size(backend, batch_size):
    model = mlp(backend)
    epochs = 3 if batch_size == 1 else 30
    history = model.fit(X, Y, optimizer=optimizers.Adam(0.02), epochs=epochs, batch_size=batch_size, verbose=0)
    assert history["loss"][-1] < history["loss"][0]
    assert model.evaluate(X, Y)["accuracy"] > 0.9


# Metrics of an epoch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_history_is_the_mean_over_samples_before_their_updates(backend, reduction, weighted):
    w = np.random.default_rng(0).uniform(0.5, 2, 103) if weighted else np.ones(103)
    loss, optimizer = losses.HalfSquaredError(reduction), optimizers.SGD(1e-3)
    model, stepwise = mlp(backend, dtype="float64"), mlp(backend, dtype="float64")
    history = model.fit(X, ONE_HOT, loss=loss, optimizer=optimizer, metrics="mae", batch_size=10, epochs=2,
                        shuffle=False, sample_weight=w if weighted else None, verbose=0)  # fmt: skip
    for epoch in range(2):
        sums, weight = {"loss": 0.0, "mae": 0.0}, 0.0
        for rows in (slice(i, i + 10) for i in range(0, 103, 10)):
            args = X[rows], ONE_HOT[rows]
            weights = w[rows] if weighted else None
            before = stepwise.evaluate(*args, loss=loss, metrics="mae", sample_weight=weights)
            logs = stepwise.train_on_batch(*args, loss=loss, optimizer=optimizer, metrics="mae", sample_weight=weights)
            assert logs == pytest.approx(before, rel=1e-12)
            total = w[rows].sum()
            sums["loss"] += logs["loss"] * (1 if reduction == "sum" else total)
            sums["mae"] += logs["mae"] * total
            weight += total
        assert history["loss"][epoch] == pytest.approx(sums["loss"] / weight, rel=1e-12)
        assert history["mae"][epoch] == pytest.approx(sums["mae"] / weight, rel=1e-12)
    np.testing.assert_allclose(weights_of(model), weights_of(stepwise), rtol=1e-12)


def test_evaluate_returns_the_sum_or_mean_that_the_loss_defines(backend):
    model = mlp(backend, dtype="float64")
    halves = 0.5 * ((model.predict(X) - ONE_HOT) ** 2).sum(axis=1)
    w = np.linspace(0, 1, 103)
    for weight, each in ((None, np.ones(103)), (w, w)):
        for size in (None, 10):
            sums = model.evaluate(
                X, ONE_HOT, loss=losses.HalfSquaredError("sum"), sample_weight=weight, batch_size=size
            )
            mean = model.evaluate(X, ONE_HOT, loss="half_squared_error", sample_weight=weight, batch_size=size)
            assert sums["loss"] == pytest.approx((each * halves).sum(), rel=1e-12)
            assert mean["loss"] == pytest.approx((each * halves).sum() / each.sum(), rel=1e-12)


def test_history_has_one_python_float_per_epoch(backend):
    history = mlp(backend).fit(
        X, Y, epochs=3, validation_data=(X, Y), metrics=["accuracy", "top_k_accuracy"], verbose=0
    )
    names = {"loss", "accuracy", "top_k_accuracy"}
    assert set(history) == names | {f"val_{name}" for name in names} | {"learning_rate"}
    assert all(len(v) == 3 and all(type(f) is float for f in v) for v in history.values())
    assert len(history.seconds) == 3 and history.stopped is None


@pytest.mark.parametrize(
    ("loss", "y", "chosen", "names"),
    [
        ("softmax_cross_entropy", Y, None, {"loss", "accuracy"}),
        ("mse", ONE_HOT, None, {"loss"}),
        ("mse", ONE_HOT, metrics.MeanAbsoluteError(), {"loss", "mae"}),
        (losses.SoftmaxCrossEntropy(), ONE_HOT, ["accuracy", metrics.F1("micro")], {"loss", "accuracy", "f1"}),
        (losses.SoftmaxCrossEntropy(), Y, [], {"loss"}),
    ],
)
def test_metrics_may_be_names_or_objects_and_depend_on_the_loss_by_default(backend, loss, y, chosen, names):
    model = mlp(backend)
    assert set(model.fit(X, y, loss=loss, metrics=chosen, verbose=0)) == names | {"learning_rate"}
    assert set(model.evaluate(X, y)) == names  # as in the last fit
    assert set(model.train_on_batch(X, y)) == names


def test_a_confusion_matrix_is_accepted_by_evaluate_but_not_by_fit(backend):
    model = mlp(backend)
    with pytest.raises(ArgumentError, match=r"evaluate\(\)"):
        model.fit(X, Y, metrics="confusion_matrix", verbose=0)
    table = model.evaluate(X, Y, loss="softmax_cross_entropy", metrics="confusion_matrix")["confusion_matrix"]
    assert isinstance(table, np.ndarray) and table.sum() == 103


def test_validation_metrics_equal_those_of_evaluate_after_the_epoch(backend):
    model = mlp(backend)
    w = np.linspace(1, 2, 20)
    history = model.fit(X, Y, validation_data=(X[:20], Y[:20], w), verbose=0)
    after = model.evaluate(X[:20], Y[:20], sample_weight=w)
    assert history["val_loss"] == [pytest.approx(after["loss"], rel=1e-6)]
    assert history["val_accuracy"] == [pytest.approx(after["accuracy"], rel=1e-6)]


def test_validation_split_uses_the_last_samples(backend):
    w = np.linspace(1, 2, 103)
    a, b = mlp(backend), mlp(backend)
    split = a.fit(X, Y, validation_split=0.2, sample_weight=w, batch_size=16, verbose=0)  # round(20.6) = 21
    explicit = b.fit(
        X[:82], Y[:82], validation_data=(X[82:], Y[82:], w[82:]), sample_weight=w[:82], batch_size=16, verbose=0
    )
    assert dict(split) == dict(explicit)
    np.testing.assert_array_equal(weights_of(a), weights_of(b))


def test_validation_split_accepts_lists():
    assert "val_loss" in mlp("cpu").fit(X.tolist(), Y.tolist(), validation_split=0.5, verbose=0)


class Table:
    """The part of a data frame that fit uses: rows by .iloc, and conversion to an array by __array__."""

    def __init__(self, values):
        self.values, self.iloc = values, self

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        return Table(self.values[rows])

    def __len__(self):
        return len(self.values)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype=dtype)


def test_validation_split_accepts_data_frames():
    a, b = mlp("cpu"), mlp("cpu")
    a.fit(Table(X), Table(Y), validation_split=0.3, verbose=0)
    b.fit(X, Y, validation_split=0.3, verbose=0)
    np.testing.assert_array_equal(weights_of(a), weights_of(b))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"validation_split": 1.0}, "validation_split"),
        ({"validation_split": -0.1}, "validation_split"),
        ({"validation_split": 0.001}, "leaves one part empty"),
        ({"validation_split": 0.5, "validation_data": (X, Y)}, "not both"),
        ({"validation_data": X}, "validation_data must be"),
        ({"validation_data": (X, Y, None, None)}, "validation_data must be"),
        ({"validation_data": (X[:5], Y)}, "validation x has 5 samples, but validation y has 103"),
        ({"validation_data": (X * np.nan, Y)}, "validation x contains NaN"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "all"}, "batch_size"),
        ({"accumulate": 0}, "accumulate"),
        ({"accumulate": None}, "accumulate"),
        ({"distributed": 2}, "distributed must be True, False or a Communicator"),
        ({"loss": "softmax_cross_entrpy"}, "softmax_cross_entropy"),
        ({"optimizer": "adm"}, "'adam'"),
        ({"metrics": "acuracy"}, "'accuracy'"),
        ({"metrics": ["accuracy", "accuracy"]}, "each needs its own name"),
        ({"class_weight": {}}, "class_weight"),
        ({"class_weight": {0: -1.0}}, "class_weight"),
        ({"class_weight": {0: np.nan}}, "class_weight"),
        ({"class_weight": {-1: 1.0}}, "class_weight"),
        ({"sample_weight": np.ones(5)}, "sample_weight must have shape"),
        ({"sample_weight": np.ones((103, 1))}, "sample_weight must have shape"),
        ({"sample_weight": np.zeros(103)}, "sample_weight"),
        ({"sample_weight": -np.ones(103)}, "sample_weight must not be negative"),
        ({"sample_weight": np.full(103, np.inf)}, "sample_weight contains NaN or infinity"),
    ],
)
def test_invalid_arguments_are_refused_before_training(kwargs, match):
    model = mlp("cpu")
    before = weights_of(model)
    with pytest.raises(ArgumentError, match=match):
        model.fit(X, Y, **({"verbose": 0} | kwargs))
    np.testing.assert_array_equal(weights_of(model), before)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"loss": 3}, "loss must be a name"),
        ({"loss": losses.MeanSquaredError}, r"pass an object, MeanSquaredError\(...\)"),
        ({"optimizer": None}, "optimizer must be a name"),
        ({"optimizer": optimizers.Adam}, r"Adam\(...\)"),
        ({"callbacks": [print]}, "callbacks must be Callback objects"),
        ({"sample_weight": ["a"] * 103}, "sample_weight must be an array of real numbers"),
    ],
)
def test_arguments_of_a_wrong_type_raise_type_errors(kwargs, match):
    with pytest.raises(ArgumentTypeError, match=match):
        mlp("cpu").fit(X, Y, **({"verbose": 0} | kwargs))


# Weights of samples and classes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        ("softmax_cross_entropy", Y),
        ("softmax_cross_entropy", ONE_HOT),
        ("mse", ONE_HOT),
        (losses.HalfSquaredError("sum"), ONE_HOT),
        ("binary_cross_entropy", ONE_HOT),
    ],
)
def test_an_integer_weight_equals_repeating_the_sample(backend, loss, y):
    repetitions = np.arange(103) % 4
    a, b = mlp(backend, dtype="float64", l2=0.01), mlp(backend, dtype="float64", l2=0.01)
    kwargs = {"loss": loss, "optimizer": optimizers.SGD(0.001, momentum=0.9), "batch_size": None, "epochs": 5}
    kwargs |= {"metrics": "mse" if y.ndim == 2 else "accuracy", "verbose": 0}
    weighted = a.fit(X, y, sample_weight=repetitions, **kwargs)
    repeated = b.fit(np.repeat(X, repetitions, 0), np.repeat(y, repetitions, 0), **kwargs)
    np.testing.assert_allclose(weights_of(a), weights_of(b), **CLOSE)
    assert_same_metrics(weighted, repeated)


def test_scaling_all_weights_does_not_change_a_mean(backend):
    a, b = mlp(backend, dtype="float64"), mlp(backend, dtype="float64")
    w = np.linspace(0.1, 1, 103)
    one = a.fit(X, Y, sample_weight=w, batch_size=10, verbose=0)
    other = b.fit(X, Y, sample_weight=1000 * w, batch_size=10, verbose=0)
    np.testing.assert_allclose(weights_of(a), weights_of(b), **CLOSE)
    np.testing.assert_allclose(one["loss"], other["loss"], **CLOSE)


@pytest.mark.parametrize(
    ("y", "class_weight"),
    [
        (Y, {0: 1.0, 1: 3.0, 2: 0.5}),
        (Y, [1.0, 3.0, 0.5]),
        (ONE_HOT, {0: 1.0, 1: 3.0, 2: 0.5}),
        (Y[:, None], {1: 3.0, 2: 0.5}),
    ],
)
@pytest.mark.parametrize("on_loss", [False, True])
def test_class_weights_equal_sample_weights_by_class(backend, y, class_weight, on_loss):
    repetitions = np.random.default_rng(0).integers(1, 4, 103)
    a, b = mlp(backend, dtype="float64"), mlp(backend, dtype="float64")
    loss = losses.SoftmaxCrossEntropy(class_weight=class_weight if on_loss else None)
    chosen = {} if on_loss else {"class_weight": class_weight}
    kwargs = {"sample_weight": repetitions, "batch_size": 10, "metrics": [], "verbose": 0}
    one = a.fit(X, y, loss=loss, **(kwargs | chosen))
    other = b.fit(X, Y, **(kwargs | {"sample_weight": repetitions * np.array([1.0, 3.0, 0.5])[Y]}))
    np.testing.assert_allclose(weights_of(a), weights_of(b), **CLOSE)
    assert_same_metrics(one, other)


BALANCED = {0: 103 / (2 * 90), 2: 103 / (2 * 13)}  # by hand: scikit-learn's formula, classes that are absent left out
RARE = np.repeat([0, 2], [90, 13])


@pytest.mark.parametrize(
    "y", [RARE, RARE[:, None], RARE.astype(float), np.eye(3)[RARE], np.eye(3)[RARE] * 0.999 + 1 / 3e3]
)
def test_balanced_class_weights_count_the_classes_of_y(backend, y):
    a, b = mlp(backend, dtype="float64"), mlp(backend, dtype="float64")
    soft = y.ndim == 2 and 0 < y.min() < 1
    weights = {k: 103 / (3 * count) for k, count in enumerate(y.sum(axis=0))} if soft else BALANCED
    one = a.fit(X, y, class_weight="balanced", batch_size=10, verbose=0)
    other = b.fit(X, y, class_weight=weights, batch_size=10, verbose=0)
    np.testing.assert_allclose(weights_of(a), weights_of(b), **CLOSE)
    assert_same_metrics(one, other)


def test_balanced_class_weights_of_a_single_output(backend):
    y = np.repeat([0.0, 1.0], [90, 13])
    a, b = mlp(backend, outputs=1, dtype="float64"), mlp(backend, outputs=1, dtype="float64")
    a.fit(X, y, loss="binary_cross_entropy", class_weight="balanced", verbose=0)
    weights = {0: BALANCED[0], 1: BALANCED[2]}
    b.fit(X, y, loss="binary_cross_entropy", class_weight=weights, verbose=0)
    np.testing.assert_allclose(weights_of(a), weights_of(b), **CLOSE)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"class_weight": "balancd"}, "class_weight must be \"balanced\", or {class: weight}.*mean 'balanced'"),
        ({"class_weight": "balanced", "loss": "mse"}, "class_weight needs a classification loss"),
        ({"class_weight": "balanced", "loss": "binary_cross_entropy"}, "single yes-or-no output"),
    ],
)
def test_balanced_class_weights_that_cannot_be_counted_are_refused(arguments, match):
    with pytest.raises(ArgumentError, match=match):
        mlp("cpu").fit(X, ONE_HOT, verbose=0, **arguments)


def test_a_loss_cannot_balance_classes():
    with pytest.raises(ArgumentError, match='Give fit class_weight="balanced" instead'):
        losses.SoftmaxCrossEntropy(class_weight="balanced")
    loss = losses.SoftmaxCrossEntropy()
    with pytest.raises(ArgumentError, match='Give fit class_weight="balanced" instead'):
        loss.class_weight = "balanced"


def test_balanced_class_weights_of_a_stream_are_refused_with_a_hint():
    with pytest.raises(ArgumentError, match="needs all targets in memory: count the classes of the stream"):
        mlp("cpu").fit(datasets.Stream(X, Y), class_weight="balanced", verbose=0)


def test_class_weights_apply_to_the_loss_and_sample_weights_also_to_metrics(backend):
    repetitions = np.random.default_rng(0).integers(1, 4, 103)
    model, at = mlp(backend), {"loss": "softmax_cross_entropy"}
    hits = model.predict(X).argmax(axis=1) == Y
    log = model.train_on_batch(
        X, Y, optimizer=optimizers.SGD(0.0), class_weight={0: 9.0}, sample_weight=repetitions, **at
    )
    assert log["accuracy"] == pytest.approx((repetitions * hits).sum() / repetitions.sum())
    weights = repetitions * np.where(Y == 0, 9.0, 1.0)
    assert log["loss"] == pytest.approx(model.evaluate(X, Y, sample_weight=weights, **at)["loss"], rel=1e-6)


def test_binary_class_weights_equal_sample_weights_by_target(backend):
    y = (Y > 0).astype(float)
    a, b = mlp(backend, outputs=1, dtype="float64"), mlp(backend, outputs=1, dtype="float64")
    a.fit(X, y, loss="binary_cross_entropy", class_weight={1: 5.0}, verbose=0)
    b.fit(X, y, loss="binary_cross_entropy", sample_weight=1 + 4 * y, verbose=0)
    np.testing.assert_allclose(weights_of(a), weights_of(b), **CLOSE)


@pytest.mark.parametrize(
    ("loss", "y", "class_weight", "match"),
    [
        ("mse", ONE_HOT, {0: 1.0}, "class_weight needs a classification loss"),
        ("binary_cross_entropy", ONE_HOT, {0: 1.0}, "single yes-or-no"),
        ("softmax_cross_entropy", ONE_HOT, {3: 1.0}, "names class 3"),
        ("softmax_cross_entropy", Y, {3: 1.0}, "names class 3"),
        ("softmax_cross_entropy", Y, {"a": 1.0}, "class_weight"),
    ],
)  # fmt: skip
def test_class_weights_that_do_not_match_the_classes_are_refused(loss, y, class_weight, match):
    with pytest.raises(ArgumentError, match=match):
        mlp("cpu").fit(X, y, loss=loss, class_weight=class_weight, verbose=0)


def test_a_batch_whose_weights_are_all_zero_changes_nothing(backend):
    w = np.ones(30)
    w[10:20] = 0
    a, b = mlp(backend, dtype="float64"), mlp(backend, dtype="float64")
    sgd = optimizers.SGD(0.1)
    history = a.fit(X[:30], Y[:30], optimizer=sgd, sample_weight=w, batch_size=10, shuffle=False, verbose=0)
    kept = np.r_[0:10, 20:30]
    without = b.fit(X[kept], Y[kept], optimizer=sgd, batch_size=10, shuffle=False, verbose=0)
    np.testing.assert_allclose(weights_of(a), weights_of(b), **CLOSE)
    assert_same_metrics(history, without)


# Accumulation and penalties ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "k"), [(10, 3), (7, 2), (103, 4), (50, 100)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", ["softmax_cross_entropy", losses.HalfSquaredError("sum")], ids=["mean", "sum"])
def test_k_accumulated_batches_equal_one_batch_k_times_as_large(backend, b, k, weighted, loss):
    y = Y if loss == "softmax_cross_entropy" else ONE_HOT
    w = np.random.default_rng(1).uniform(0, 2, 103) if weighted else None
    kwargs = {"loss": loss, "optimizer": optimizers.SGD(0.001, momentum=0.9), "epochs": 2, "sample_weight": w}
    one, other = mlp(backend, dtype="float64", l2=0.1), mlp(backend, dtype="float64", l2=0.1)
    small = one.fit(X, y, batch_size=b, accumulate=k, verbose=0, shuffle=b * k < 103, **kwargs)
    large = other.fit(X, y, batch_size=b * k, verbose=0, **kwargs)
    np.testing.assert_allclose(weights_of(one), weights_of(other), **CLOSE)
    assert one._state.optimizer_state.step == other._state.optimizer_state.step == 2 * -(-103 // (b * k))
    assert small["loss"] == pytest.approx(large["loss"], rel=1e-12)


def test_accumulated_batches_have_the_dropout_masks_of_the_large_batch(backend):
    one, other = mlp(backend, dtype="float64", dropout=0.5), mlp(backend, dtype="float64", dropout=0.5)
    sgd = optimizers.SGD(0.1)
    one.fit(X[:20], Y[:20], optimizer=sgd, batch_size=10, accumulate=2, shuffle=False, verbose=0)
    other.fit(X[:20], Y[:20], optimizer=sgd, batch_size=20, shuffle=False, verbose=0)
    np.testing.assert_allclose(weights_of(one), weights_of(other), **CLOSE)


@pytest.mark.parametrize("weight", [None, np.linspace(1, 3, 103)], ids=["unweighted", "weighted"])
def test_penalties_are_added_to_the_loss_and_the_gradient(backend, weight):
    plain, penalized = linear(backend), linear(backend, l1=0.3, l2=0.2)
    y = X.sum(axis=1)
    start = weights_of(plain)[:2]
    kwargs = {"loss": "mse", "optimizer": optimizers.SGD(0.1), "batch_size": None, "sample_weight": weight}
    without, with_ = (m.fit(X, y, verbose=0, **kwargs)["loss"][0] for m in (plain, penalized))
    assert with_ - without == pytest.approx(0.3 * np.abs(start).sum() + 0.2 * (start**2).sum(), rel=1e-9)
    difference = weights_of(plain) - weights_of(penalized)
    np.testing.assert_allclose(difference, [*0.1 * (0.3 * np.sign(start) + 0.4 * start), 0.0], atol=1e-12)


def test_a_summed_loss_includes_the_penalty_once():
    model, plain = linear("cpu", l2=0.5), linear("cpu")
    y, loss = X.sum(axis=1), losses.HalfSquaredError("sum")
    penalty = 0.5 * (weights_of(model)[:2] ** 2).sum()
    difference = model.evaluate(X, y, loss=loss)["loss"] - plain.evaluate(X, y, loss=loss)["loss"]
    assert difference == pytest.approx(penalty)


# Targets -----------------------------------------------------------------------------------------------------------


def test_targets_n_against_outputs_n_by_1_are_reshaped(backend):
    a, b = linear(backend), linear(backend)
    y = X.sum(axis=1)
    one = a.fit(X, y, loss="mse", metrics=["mae", "r2"], verbose=0)
    other = b.fit(X, y[:, None], loss="mse", metrics=["mae", "r2"], verbose=0)
    assert dict(one) == dict(other)
    np.testing.assert_array_equal(weights_of(a), weights_of(b))


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "half_squared_error", "binary_cross_entropy"])
@pytest.mark.parametrize("shape", [(103, 2), (103, 1, 1), (103, 1), (103,), (103, 3, 1)])
def test_targets_of_another_shape_are_refused(loss, shape):
    model = mlp("cpu")
    with pytest.raises(ShapeError, match=r"\(N, 3\).*They are not broadcast"):
        model.fit(X, np.zeros(shape), loss=loss, verbose=0)


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "float32", ">i4", "bool"])
def test_labels_may_have_any_numeric_dtype(backend, dtype):
    y = Y % 2
    a, b = mlp(backend), mlp(backend)
    a.fit(X, y, verbose=0)
    b.fit(X, y.astype(dtype), verbose=0)
    np.testing.assert_array_equal(weights_of(a), weights_of(b))


# Warnings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_a_loss_on_logits_after_softmax_warns_at_the_line_of_the_call(nested):
    stack = [layers.Dense(3), layers.Softmax()]
    model = xpnet.Sequential([layers.Sequential(stack)] if nested else stack, (2,), "cpu")
    for call in (model.fit, model.evaluate):
        kwargs = {"verbose": 0} if call == model.fit else {"loss": "softmax_cross_entropy"}
        with pytest.warns(UserWarning, match="takes logits, but .*: leave out its layer Softmax") as caught:
            call(X, Y, **kwargs)
        assert caught[0].filename == __file__
    model.fit(X, ONE_HOT, loss="mse", verbose=0)  # does not warn


# State between fits ------------------------------------------------------------------------------------------------


def adam():
    return optimizers.Adam(schedules.CosineDecay(0.05, steps=80), weight_decay=0.01, clip_norm=1.0)


@pytest.mark.parametrize("same_object", [True, False])
def test_two_fits_of_5_epochs_equal_one_of_10_bit_for_bit(backend, same_object):
    once, twice = mlp(backend, dropout=0.3), mlp(backend, dropout=0.3)
    whole = once.fit(X, Y, optimizer=adam(), epochs=10, batch_size=16, verbose=0)
    optimizer = adam()
    first = twice.fit(X, Y, optimizer=optimizer, epochs=5, batch_size=16, verbose=0)
    second = twice.fit(X, Y, optimizer=optimizer if same_object else adam(), epochs=5, batch_size=16, verbose=0)
    np.testing.assert_array_equal(weights_of(once), weights_of(twice))
    assert whole["loss"] == first["loss"] + second["loss"]


def test_another_optimizer_starts_with_a_fresh_state(backend):
    a, b = mlp(backend), mlp(backend)
    a.fit(X, Y, optimizer=optimizers.Adam(0.01), epochs=2, verbose=0)
    b.load_state_dict(a.state_dict())
    a.fit(X, Y, optimizer=optimizers.Adam(0.02), batch_size=10, verbose=0)
    b.fit(X, Y, optimizer=optimizers.Adam(0.02), batch_size=10, verbose=0)
    np.testing.assert_array_equal(weights_of(a), weights_of(b))


def test_one_optimizer_object_can_train_two_models(backend):
    shared, own = optimizers.Adam(0.01), optimizers.Adam(0.01)
    a, b, c = mlp(backend), mlp(backend), mlp(backend)
    for _ in range(2):
        a.fit(X, Y, optimizer=shared, verbose=0)
        b.fit(X, Y, optimizer=shared, verbose=0)
        c.fit(X, Y, optimizer=own, verbose=0)
    np.testing.assert_array_equal(weights_of(a), weights_of(c))
    np.testing.assert_array_equal(weights_of(b), weights_of(c))


def test_an_error_in_a_later_epoch_keeps_the_state_of_training():
    def fail(callback, model):
        raise KeyError("callback")

    model, other = mlp("cpu"), mlp("cpu")
    optimizer = optimizers.Adam(0.01)
    with pytest.raises(KeyError):
        model.fit(X, Y, optimizer=optimizer, epochs=2, batch_size=None, callbacks=[AtStep(2, fail)], verbose=0)
    other.fit(X, Y, optimizer=optimizer, epochs=2, batch_size=None, verbose=0)
    np.testing.assert_array_equal(weights_of(model), weights_of(other))
    for m in (model, other):
        m.fit(X, Y, optimizer=optimizer, batch_size=None, verbose=0)
    np.testing.assert_array_equal(weights_of(model), weights_of(other))


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", optimizers.AdamW(0.1, weight_decay=0.5, clip_norm=0.1)], ids=str)
def test_only_frozen_layers_stay_unchanged(backend, frozen, optimizer):
    model = mlp(backend, l2=0.1)
    model.layers[frozen].trainable = False
    before = model.state_dict()
    model.fit(X, Y, optimizer=optimizer, epochs=2, verbose=0)
    after = model.state_dict()
    for name, value in before.items():
        assert np.array_equal(value, after[name]) == name.startswith(f"{frozen}."), name


def test_one_parameter_of_a_layer_can_be_frozen(backend):
    model = mlp(backend)
    model.parameters[0].trainable = False
    before = model.state_dict()
    model.fit(X, Y, verbose=0)
    after = model.state_dict()
    assert [n for n in before if np.array_equal(before[n], after[n])] == ["0.weight"]


@pytest.mark.usefixtures("exact_replays")
def test_train_on_batch_is_one_step_of_fit(backend):
    a, b = mlp(backend, dropout=0.5), mlp(backend, dropout=0.5)
    history = a.fit(X, Y, optimizer="adam", batch_size=None, epochs=3, verbose=0)
    logs = [b.train_on_batch(X, Y, loss="softmax_cross_entropy", optimizer="adam")]
    logs += [b.train_on_batch(X, Y) for _ in range(2)]  # the defaults are those of the last training
    np.testing.assert_array_equal(weights_of(a), weights_of(b))
    assert [f["loss"] for f in logs] == history["loss"]
    assert all(type(v) is float for v in logs[0].values()) and set(logs[0]) == {"loss", "accuracy"}


@pytest.mark.parametrize(("kwargs", "what"), [({"loss": "mse"}, "optimizer"), ({"optimizer": "sgd"}, "loss")])
def test_the_first_train_on_batch_requires_loss_and_optimizer(kwargs, what):
    with pytest.raises(ArgumentError, match=f"never trained: give an? {what}"):
        mlp("cpu").train_on_batch(X, ONE_HOT, **kwargs)


# Kinds of data -----------------------------------------------------------------------------------------------------


def test_uint8_images_are_not_scaled(backend):
    x, y = (a[:60] for a in datasets.digits())
    assert x.dtype == np.uint8

    def model():
        return xpnet.Sequential([layers.Flatten(), layers.Dense(10)], x.shape[1:], backend)

    a, b = model(), model()
    raw, floats = (m.fit(data, y, batch_size=16, verbose=0) for m, data in ((a, x), (b, x.astype("float32"))))
    assert dict(raw) == dict(floats)
    np.testing.assert_array_equal(weights_of(a), weights_of(b))


def test_rescale_as_the_first_layer_scales_uint8_images(backend):
    x, y = (a[:60] for a in datasets.digits())
    a = xpnet.Sequential([layers.Rescale(1 / 16), layers.Flatten(), layers.Dense(10)], x.shape[1:], backend)
    b = xpnet.Sequential([layers.Identity(), layers.Flatten(), layers.Dense(10)], x.shape[1:], backend)
    a.fit(x, y, batch_size=16, verbose=0)
    b.fit(x / 16, y, batch_size=16, verbose=0)
    np.testing.assert_allclose(weights_of(a), weights_of(b), rtol=1e-5, atol=1e-6)


def test_integer_data_stays_integers_in_memory(backend):
    class RecordDtype(callbacks.Callback):
        def on_train_begin(self, model):
            self.dtype = self.run.dataset.x.dtype

    x, y = (a[:60] for a in datasets.digits())
    callback = RecordDtype()
    model = xpnet.Sequential([layers.Flatten(), layers.Dense(10)], x.shape[1:], backend)
    model.fit(x, y, callbacks=[callback], verbose=0)
    assert callback.dtype == np.uint8


def test_a_float32_model_has_no_float64_arrays(backend):
    x, y = (a[:60] for a in datasets.digits())
    model = xpnet.Sequential(
        [layers.Rescale(1 / 16, 0.5), layers.Flatten(), layers.Dense(8, l1=0.1, l2=0.1), layers.Sigmoid(),
         layers.Dropout(0.5), layers.Dense(10)], x.shape[1:], backend)  # fmt: skip
    optimizer = optimizers.Adam(0.01, weight_decay=0.1, clip_norm=1.0)
    model.fit(x, y, optimizer=optimizer, sample_weight=np.linspace(0, 1, 60), batch_size=16, accumulate=2, verbose=0)
    store = model.context.store
    arrays = [store.values, store.grads, *model._state.optimizer_state.slots.values()]
    for layer in model.layers:
        arrays += layer.work._buffers.values()
    assert {str(a.dtype) for a in arrays} == {"float32"}
    assert model.predict(x).dtype == model.forward(x).dtype == np.float32


# Divergence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_divergence_raises_and_restores_the_start_of_the_epoch(backend, accumulate):
    model = mlp(backend, dropout=0.2)
    diverging = optimizers.Adam(lambda step: 0.01 if step < 12 else 1e38)
    steps = -(-11 // accumulate)
    model.fit(X, Y, optimizer=diverging, epochs=12 // steps, batch_size=10, accumulate=accumulate, verbose=0)
    before, slots, step, epoch = (
        weights_of(model),
        slots_of(model),
        model._state.optimizer_state.step,
        model._state.epoch,
    )
    with pytest.raises(DivergenceError, match=rf"epoch {epoch + 1}, at step \d+ of 11.*rate.*1e\+38") as caught:
        model.fit(X, Y, optimizer=diverging, epochs=3, batch_size=10, accumulate=accumulate, verbose=0)
    assert isinstance(caught.value, RuntimeError)
    np.testing.assert_array_equal(weights_of(model), before)
    assert (model._state.optimizer_state.step, model._state.epoch) == (step, epoch)
    for name, slot in slots_of(model).items():
        np.testing.assert_array_equal(slot, slots[name])
    assert np.isfinite(model.predict(X)).all()


def test_divergence_in_the_first_step_is_attributed_to_the_inputs(backend):
    model = linear(backend)
    before = weights_of(model)
    with pytest.raises(DivergenceError, match=r"epoch 1, at step 1 of 1, before any update.*scale the inputs"):
        model.fit(1e200 * X, Y, loss="mse", verbose=0)
    np.testing.assert_array_equal(weights_of(model), before)


def test_divergence_in_the_last_update_is_reported(backend):
    model = linear(backend)
    before = weights_of(model)
    with pytest.raises(DivergenceError, match=r"the weights became NaN or infinite in epoch 1, at step 1 of 1.*rate"):
        model.fit(
            X, X.sum(axis=1), loss="mse", optimizer=optimizers.SGD(lambda step: 1e308), batch_size=None, verbose=0
        )
    np.testing.assert_array_equal(weights_of(model), before)


def test_divergence_still_ends_the_callbacks():
    ended = []

    class RecordEnd(callbacks.Callback):
        def on_train_end(self, model):
            ended.append(model)

    model = linear("cpu")
    with pytest.raises(DivergenceError):
        model.fit(1e200 * X, Y, loss="mse", callbacks=[RecordEnd()], verbose=0)
    assert ended == [model]


# Ctrl-C ------------------------------------------------------------------------------------------------------------


def press_ctrl_c(callback, model):
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_after_the_step_and_returns_the_history(backend, caplog):
    before = signal.getsignal(signal.SIGINT)
    model, callback = mlp(backend), AtStep(14, press_ctrl_c)
    history = model.fit(X, Y, epochs=5, batch_size=10, callbacks=[callback], on_interrupt="stop", verbose=0)
    assert callback.steps == list(range(1, 15)) and model.history is history
    assert history.stopped == "interrupted" and len(history["loss"]) == 1
    assert signal.getsignal(signal.SIGINT) is before
    assert "training was interrupted in epoch" in caplog.text
    assert np.isfinite(model.predict(X)).all()
    assert model.fit(X, Y, verbose=0).stopped is None


def test_a_second_ctrl_c_raises_and_the_handler_is_restored():
    ended = []

    class RecordEnd(callbacks.Callback):
        def on_train_end(self, model):
            ended.append(True)

    def twice(callback, model):
        press_ctrl_c(callback, model)
        press_ctrl_c(callback, model)

    before = signal.getsignal(signal.SIGINT)
    model = mlp("cpu")
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, epochs=5, batch_size=10, callbacks=[AtStep(3, twice), RecordEnd()], verbose=0)
    assert ended and signal.getsignal(signal.SIGINT) is before
    assert np.isfinite(model.predict(X)).all()


def test_a_custom_signal_handler_is_not_replaced():
    pressed = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        history = mlp("cpu").fit(X, Y, epochs=2, batch_size=10, callbacks=[AtStep(3, press_ctrl_c)], verbose=0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [signal.SIGINT] and history.stopped is None and len(history["loss"]) == 2


def test_fit_works_in_another_thread(backend):
    result = []
    model, other = mlp(backend), mlp(backend)
    thread = threading.Thread(target=lambda: result.append(model.fit(X, Y, epochs=2, verbose=0)))
    thread.start()
    thread.join()
    assert dict(result[0]) == dict(other.fit(X, Y, epochs=2, verbose=0))


# Invalid data, callbacks, and ends of epochs -----------------------------------------------------------------------


def test_labels_out_of_range_are_refused_before_any_step():
    callback = AtStep(1, lambda *args: None)
    with pytest.raises(DataError, match="labels range from 0 to 2, but the model's 2 outputs"):
        mlp("cpu", outputs=2).fit(X, Y, callbacks=[callback], verbose=0)
    assert callback.steps == []


@pytest.mark.parametrize("at", ["on_train_begin", "on_epoch_begin", "on_step_end", "on_epoch_end", "on_train_end"])
@pytest.mark.parametrize(
    "train",
    [
        lambda model: model.fit(SAMPLES, LABELS, **QUIET),
        lambda model: model.train_on_batch(SAMPLES, LABELS, "softmax_cross_entropy", "sgd"),
        lambda model: model.to("cpu", dtype="float64"),
    ],
    ids=["fit", "train_on_batch", "to"],
)
def test_a_callback_cannot_train_or_move_the_model_during_fit(at, train):
    model = small_net()
    with pytest.raises(StateError, match="fit is running"):
        model.fit(SAMPLES, LABELS, callbacks=[Do(lambda callback, model: train(model), at)], **QUIET)
    assert model.dtype == "float32"
    train(model)  # allowed again after fit has ended


def test_evaluating_predicting_and_saving_in_a_callback_do_not_change_the_result(tmp_path):
    def use(callback, model):
        model.evaluate(SAMPLES, LABELS)
        model.evaluate(SAMPLES, LABELS, loss="softmax_cross_entropy", metrics="precision", batch_size=3)
        model.predict(SAMPLES)
        model.state_dict()
        model.save(tmp_path / "model")

    plain, used = small_net(), small_net()
    history = plain.fit(SAMPLES, LABELS, epochs=2, **QUIET)
    assert used.fit(SAMPLES, LABELS, epochs=2, callbacks=[Do(use)], **QUIET) == history
    assert_same_state(used.state_dict(), plain.state_dict())
    assert_same_state(xpnet.load(tmp_path / "model", "cpu").state_dict(), plain.state_dict())


@pytest.mark.parametrize("at", ["on_train_begin", "on_step_end", "on_train_end"])
def test_fit_works_again_after_an_error_in_a_callback(at):
    model = small_net()
    with pytest.raises(ZeroDivisionError):
        model.fit(SAMPLES, LABELS, callbacks=[Do(lambda callback, model: 1 / 0, at)], **QUIET)
    assert len(model.fit(SAMPLES, LABELS, **QUIET)["loss"]) == 1
    assert model.train_on_batch(SAMPLES, LABELS) and model.to("cpu", dtype="float64").dtype == "float64"


BAD_Y, BAD_X = LABELS + 7, np.full_like(SAMPLES, np.nan)


@pytest.mark.parametrize(
    "refused",
    [
        lambda model: model.fit(SAMPLES, np.eye(2)[LABELS], loss="mse", optimizer="adam", callbacks=[print], **QUIET),
        lambda model: model.fit(SAMPLES, np.eye(2)[LABELS], loss="mse", optimizer="adam", verbose=7),
        lambda model: model.fit(SAMPLES, np.eye(3)[LABELS], loss="mse", optimizer="adam", **QUIET),
        lambda model: model.fit(BAD_X, LABELS, loss="mse", optimizer="adam", **QUIET),
        lambda model: model.fit(SAMPLES, BAD_Y, optimizer="adam", **QUIET),
        lambda model: model.fit(SAMPLES, np.eye(2)[LABELS], loss="mse", validation_data=(SAMPLES, BAD_Y), **QUIET),
        lambda model: model.fit(SAMPLES, np.eye(2)[LABELS], loss="mse", optimizer="adm", **QUIET),
        lambda model: model.train_on_batch(SAMPLES, np.eye(3)[LABELS], "mse", "adam"),
        lambda model: model.train_on_batch(BAD_X, np.eye(2)[LABELS], "mse", "adam"),
    ],
)
def test_a_refused_training_changes_no_state(refused):
    model = small_net()
    model.fit(SAMPLES, LABELS, optimizer=optimizers.SGD(0.1, momentum=0.9), **QUIET)
    state = model._state
    optimizer_state, loss, metrics_before = state.optimizer_state, state.loss, state.metrics
    slot = optimizer_state.slots["velocity"].copy()
    before, optimizer = values_of(model), state.optimizer
    with pytest.raises((ArgumentError, ArgumentTypeError)):
        refused(model)
    assert (
        state.optimizer_state is optimizer_state
        and state.loss is loss
        and state.metrics is metrics_before
        and state.optimizer is optimizer
    )
    assert (state.step, state.epoch, model.context.guard.in_training) == (4, 1, False)
    np.testing.assert_array_equal(optimizer_state.slots["velocity"], slot)
    np.testing.assert_array_equal(values_of(model), before)
    assert set(model.evaluate(SAMPLES, LABELS)) == {"loss", "accuracy"}


def test_the_scale_of_sample_weights_does_not_matter():
    weight, results = np.linspace(0.5, 2, 20), []
    for scale in (1.0, 1e-32):
        model = small_net("float64")
        history = model.fit(
            SAMPLES, LABELS, optimizer=optimizers.SGD(0.5), sample_weight=weight * scale, epochs=3, **QUIET
        )
        results.append((values_of(model), history["loss"], history["accuracy"]))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-9)


def test_a_batch_of_zero_weight_does_not_update_the_model():
    weight, seen = np.repeat([1.0, 0.0], 10), []
    model = small_net()
    record = Do(lambda callback, model: seen.append(values_of(model)))
    history = model.fit(
        SAMPLES, LABELS, optimizer=optimizers.SGD(0.5), sample_weight=weight, shuffle=False, callbacks=[record], **QUIET
    )
    assert len(seen) == 4 and np.isfinite(history["loss"]).all()
    assert (seen[0] != seen[1]).any()
    np.testing.assert_array_equal(seen[2], seen[1])
    np.testing.assert_array_equal(seen[3], seen[1])


@pytest.mark.parametrize(
    "bad", [{0.5: 2}, {0: 0.0, 1: 0.0}, [0, 0], {"0": 1}, {-1: 1.0}, {2: 1.0}, {0: np.nan}, {0: np.inf}, {0: -1}, 3, {}]
)
def test_invalid_class_weights_are_refused(bad):
    model = small_net()
    with pytest.raises(ArgumentError, match="class_weight"):
        model.fit(SAMPLES, LABELS, class_weight=bad, **QUIET)
    with pytest.raises(ArgumentError, match="class_weight"):
        model.fit(SAMPLES, LABELS, loss=losses.SoftmaxCrossEntropy(class_weight=bad), **QUIET)
    assert isinstance(model._state, Untrained)


@pytest.mark.parametrize("after", [layers.Identity, layers.Flatten, lambda: layers.Reshape((2,))])
def test_softmax_followed_by_a_layer_without_arithmetic_warns(after):
    for last in ([layers.Softmax(), after()], [layers.Sequential([layers.Softmax(), after()])]):
        model = xpnet.Sequential([layers.Dense(2), *last], (4,), "cpu")
        with pytest.warns(UserWarning, match="takes logits"):
            model.fit(SAMPLES, LABELS, **QUIET)


@pytest.mark.parametrize("at", ["on_step_end", "on_epoch_end"])
def test_stop_with_an_empty_reason_stops(at):
    history = small_net().fit(
        SAMPLES, LABELS, epochs=5, callbacks=[Do(lambda callback, model: callback.stop(""), at)], **QUIET
    )
    assert len(history["loss"]) == 1 and history.stopped == ""


def test_ctrl_c_in_the_last_step_of_an_epoch_completes_the_epoch():
    def interrupt(callback, model):
        if callback.run.seen == callback.run.samples:
            os.kill(os.getpid(), signal.SIGINT)

    model, plain = small_net(), small_net()
    history = model.fit(SAMPLES, LABELS, epochs=3, callbacks=[Do(interrupt)], on_interrupt="stop", **QUIET)
    assert history.stopped == "interrupted" and history == plain.fit(SAMPLES, LABELS, **QUIET)
    assert len(history.seconds) == 1 and model._state.epoch == 1
    assert_same_state(model.state_dict(), plain.state_dict())


def test_divergence_restores_the_start_of_the_epoch_and_not_the_best_epoch():
    starts, stopping = [], callbacks.EarlyStopping("loss", patience=9)
    begin = Do(lambda callback, model: starts.append(values_of(model)), "on_epoch_begin")
    # The loss rises at first, so that the best epoch is not the one before the divergence.
    optimizer = optimizers.SGD(lambda step: 1.5 if step < 12 else 1e200)
    model = dense_net(dtype="float64")
    with pytest.raises(DivergenceError, match="epoch 4"):
        model.fit(SAMPLES, SAMPLES[:, :2], "mse", optimizer, 9, callbacks=[stopping, begin], **QUIET)
    assert stopping.best_epoch == 0 and len(starts) == 4 and (starts[3] != starts[1]).any()
    np.testing.assert_array_equal(values_of(model), starts[3])
    assert (model._state.step, model._state.epoch) == (12, 3)


def test_train_on_batch_skips_a_batch_that_diverges():
    model, huge = small_net(), np.full((20, 2), 1e30)
    model.train_on_batch(SAMPLES, SAMPLES[:, :2], "mse", "adam")
    before, slot = values_of(model), model._state.optimizer_state.slots["means"].copy()
    with pytest.raises(DivergenceError, match="before step 2, which was skipped"):
        model.train_on_batch(SAMPLES, huge)
    np.testing.assert_array_equal(values_of(model), before)
    np.testing.assert_array_equal(model._state.optimizer_state.slots["means"], slot)
    assert model._state.step == 1 and np.isfinite(model.train_on_batch(SAMPLES, SAMPLES[:, :2])["loss"])


def test_divergence_in_the_last_update_of_an_epoch_is_reported_in_this_epoch():
    model = small_net()
    before = values_of(model)
    with pytest.raises(DivergenceError, match="weights became NaN or infinite in epoch 1, at step 1 of 1"):
        model.fit(SAMPLES, SAMPLES[:, :2] * 1e9, "mse", optimizers.SGD(1e38), epochs=1, batch_size=None, verbose=0)
    np.testing.assert_array_equal(values_of(model), before)
    assert model._state.step == 0


@pytest.mark.parametrize("metric", ["accuracy", "precision"])
def test_class_weights_do_not_change_metrics(metric):
    plain = small_net().fit(SAMPLES, LABELS, metrics=metric, batch_size=None, verbose=0)
    in_fit = small_net().fit(SAMPLES, LABELS, metrics=metric, class_weight={0: 1, 1: 9}, batch_size=None, verbose=0)
    loss = losses.SoftmaxCrossEntropy(class_weight={0: 1, 1: 9})
    in_loss = small_net().fit(SAMPLES, LABELS, loss, metrics=metric, batch_size=None, verbose=0)
    assert in_fit[metric] == plain[metric] == in_loss[metric]
    assert in_fit["loss"] == in_loss["loss"] != plain["loss"]


# Weights of batches ------------------------------------------------------------------------------------------------

PARTS = [(slice(0, 40), False), (slice(40, 60), True), (slice(60, 70), False), (slice(70, 103), True)]


def mixed_batches(w):
    """Batches with and without weights; and the weights of all samples."""
    every, batches = np.ones(103), []
    for rows, weighted in PARTS:
        batches.append((X[rows], Y[rows], w[rows]) if weighted else (X[rows], Y[rows]))
        every[rows] = w[rows] if weighted else 1
    return batches, every


@pytest.mark.parametrize("order", [1, -1])
def test_batches_without_weights_beside_others_have_the_weight_one(backend, order):
    batches, every = mixed_batches(np.random.default_rng(0).uniform(0, 3, 103))
    model = mlp(backend)
    chosen = {"loss": "softmax_cross_entropy", "metrics": ["accuracy", "top_k_accuracy", metrics.F1()]}
    expected = model.evaluate(X, Y, sample_weight=every, **chosen)
    assert model.evaluate(batches[::order], **chosen) == pytest.approx(expected, rel=1e-5)
    ones = [(x, y, np.ones(len(x))) for x, y, *_ in batches]
    same = model.evaluate([ones[0], batches[2], (*ones[3][:2], None)], **chosen)
    rows = np.r_[0:40, 60:103]
    assert same == pytest.approx(model.evaluate(X[rows], Y[rows], **chosen), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_training_on_batches_with_and_without_weights(backend, accumulate):
    w = np.random.default_rng(0).uniform(0, 3, 103)
    batches, every = mixed_batches(w)
    a, b = mlp(backend, dtype="float64"), mlp(backend, dtype="float64")
    options = {"optimizer": optimizers.SGD(0.1), "epochs": 3, "accumulate": accumulate, "verbose": 0}
    mixed = a.fit(batches, validation_data=(X, Y, every), **options)
    explicit = b.fit([(X[rows], Y[rows], every[rows]) for rows, _ in PARTS], validation_data=(X, Y, every), **options)
    assert_same_metrics(mixed, explicit)
    np.testing.assert_allclose(weights_of(a), weights_of(b), rtol=1e-12)


def test_a_run_on_batches_with_and_without_weights_can_be_resumed(tmp_path):
    batches, _ = mixed_batches(np.random.default_rng(0).uniform(0, 3, 103))
    save = AtStep(6, lambda self, model: self.run.save(tmp_path / "run"))
    a, b = mlp("cpu"), mlp("cpu")
    whole = a.fit(batches, epochs=3, callbacks=[save], verbose=0)
    resumed = b.fit(batches, epochs=3, callbacks=[AtStep(0, None)], resume_from=tmp_path / "run", verbose=0)
    assert dict(whole) == dict(resumed)
    np.testing.assert_array_equal(weights_of(a), weights_of(b))


ZERO = np.zeros(103)


@pytest.mark.parametrize(
    "given",
    [
        lambda: ((X, Y), {"sample_weight": ZERO}),
        lambda: (([(X, Y, ZERO)],), {}),
        lambda: (([(X[:50], Y[:50], ZERO[:50]), (X[50:], Y[50:], ZERO[50:])],), {}),
        lambda: ((lambda: iter([(X, Y, ZERO)]),), {}),
        lambda: ((datasets.Stream(X, Y, ZERO),), {}),
        lambda: ((datasets.Stream(X, Y),), {"class_weight": {0: 0, 1: 0, 2: 0}}),
        lambda: ((X, Y), {"class_weight": [0, 0, 0]}),
    ],
)
def test_weights_that_are_all_zero_are_refused_and_leave_the_model_whole(backend, given):
    args, options = given()
    model, chosen = mlp(backend), {"loss": "softmax_cross_entropy"}
    model.train_on_batch(X, Y, optimizer=optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1), **chosen)
    before, slots = weights_of(model), slots_of(copy.deepcopy(model))
    message = r"not zero for all|weight(s of all 103 samples are 0| above 0)"
    with pytest.raises(DataError, match=message):
        model.fit(*args, optimizer=optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1), epochs=2, verbose=0, **options)
    if "class_weight" not in options:
        with pytest.raises(DataError, match=message):
            model.evaluate(*args, **options)
        with pytest.raises(DataError, match=message):
            model.fit(X, Y, validation_data=(X, Y, ZERO), verbose=0)
    if args[0] is X:
        with pytest.raises(DataError, match=message):
            model.train_on_batch(*args, **options)
    np.testing.assert_array_equal(weights_of(model), before)
    np.testing.assert_array_equal(slots_of(model)["velocity"], slots["velocity"])
    assert model._state.step == 1 and np.isfinite(model.evaluate(X, Y)["loss"])


def test_one_batch_of_weights_that_are_all_zero_is_no_error(backend):
    seen = []
    model = mlp(backend)
    batches = [(X[:50], Y[:50], ZERO[:50]), (X[50:], Y[50:])]
    watch = AtStep(1, lambda self, model: seen.append(self.run.logs()))
    before = weights_of(model)
    history = model.fit(batches, optimizer=optimizers.SGD(0.0), callbacks=[watch], verbose=0)
    assert seen == [{}]  # no sample counts so far
    assert history["loss"] == [pytest.approx(model.evaluate(X[50:], Y[50:])["loss"], rel=1e-5)]
    np.testing.assert_array_equal(weights_of(model), before)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"lr": 0.1}, r"optimizer=xpnet\.optimizers\.Adam"),
        ({"learning_rate": 0.1}, r"optimizer=xpnet\.optimizers\.Adam"),
        ({"optimizer": 0.1}, r"xpnet\.optimizers\.Adam\(0\.1\)"),
        ({"optimizer": schedules.CosineDecay(0.1, 5)}, r"xpnet\.optimizers\.Adam\(CosineDecay"),
        ({"early_stopping": True}, "EarlyStopping"),
        ({"steps_per_epoch": 3}, "all of the data"),
        ({"initial_epoch": 3}, "continues"),
        ({"verbose": "auto"}, "0 is silent"),
        ({"callbacks": [lambda: 0]}, r"derive its class from xpnet\.callbacks\.Callback"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "-".join(v),
)
def test_arguments_of_other_libraries_get_a_hint(arguments, text):
    model = xpnet.Sequential([layers.Dense(2)], (3,), "cpu")
    with pytest.raises((ArgumentError, ArgumentTypeError), match=text):
        model.fit(np.ones((4, 3)), [0, 1, 0, 1], **{"verbose": 0, **arguments})


@pytest.mark.parametrize("verbose", [True, False])
def test_verbose_may_be_a_boolean(verbose, capsys):
    model = xpnet.Sequential([layers.Dense(2)], (3,), "cpu")
    assert len(model.fit(np.ones((4, 3)), [0, 1, 0, 1], verbose=verbose)["loss"]) == 1
    assert "loss" not in capsys.readouterr().out


RENTS = 1200.0 + 300.0 * (X[:, 0] - X[:, 1])


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "half_squared_error"])
def test_targets_far_from_the_scale_of_a_short_training_warn_once(backend, loss):
    model = mlp(backend, outputs=1)
    with pytest.warns(UserWarning, match=r"targets have mean 1\.\d+e\+03 .* y\.std\(\).*after predict"):
        model.fit(X, RENTS, loss, epochs=2, verbose=0)
    model.fit(X, RENTS, loss, epochs=2, verbose=0)


def test_targets_much_smaller_than_the_first_outputs_warn(backend):
    with pytest.warns(UserWarning, match="hardly fit numbers of that size"):
        mlp(backend, outputs=1).fit(X, 1e-4 * X[:, 0], "mse", epochs=2, verbose=0)


def test_targets_that_a_training_reaches_do_not_warn(backend):
    scaled = (RENTS - RENTS.mean()) / RENTS.std()
    trainings = [
        (scaled, mlp(backend, outputs=1), optimizers.Adam()),
        (np.zeros_like(RENTS), mlp(backend, outputs=1), optimizers.Adam()),  # all equal
        (3.0 * scaled + 8.0, mlp(backend, outputs=1), optimizers.Adam()),
        (RENTS, mlp(backend, outputs=1), optimizers.SGD(1e-9)),
        (RENTS, linear(backend, bias_initializer=1200.0), optimizers.Adam()),
        (RENTS, xpnet.Sequential([layers.Dense(1), layers.Rescale(300.0, 1200.0)], (2,), backend), optimizers.Adam()),
    ]
    for y, model, optimizer in trainings:
        model.fit(X, y, "mse", optimizer=optimizer, verbose=0)
