"""Callbacks: when each is called, what it sees, and what the built-in ones do."""

import csv
import importlib
import io
import logging
import math
import os
import re
import signal
import struct
import sys
import time

import numpy as np
import pytest
from small_models import LABELS, QUIET, SAMPLES, Do, StopAt, assert_same_state, small_net

import xpnet
from xpnet import callbacks, datasets, layers, optimizers, schedules
from xpnet.callbacks import (
    Callback,
    CSVLogger,
    EarlyStopping,
    ExponentialMovingAverage,
    LearningRateFinder,
    ProgressBar,
    ReduceLROnPlateau,
    TensorBoard,
)
from xpnet.errors import ArgumentError, ArgumentTypeError, DivergenceError, FileError, MissingPackageError, StateError

X, Y = datasets.blobs(50, classes=3, seed=1)


def net(backend="cpu"):
    return xpnet.Sequential([layers.Dense(8), layers.Tanh(), layers.Dense(3)], (2,), backend)


def weights_of(model):
    return np.concatenate([a.ravel() for a in model.state_dict().values()])


class CallLog(Callback):
    """Records the calls of its methods."""

    def __init__(self, calls=None):
        self.calls = [] if calls is None else calls

    def on_train_begin(self, model):
        self.calls.append("train begin")

    def on_epoch_begin(self, model, epoch):
        self.calls.append(f"epoch {epoch} begin")

    def on_step_end(self, model, step):
        self.calls.append(f"step {step}")

    def on_epoch_end(self, model, epoch, logs):
        self.calls.append(f"epoch {epoch} end")

    def on_train_end(self, model):
        self.calls.append("train end")


class FakeLogs(Callback):
    """Writes chosen values into the logs, which later callbacks monitor."""

    def __init__(self, **values):
        self.values = {name: iter(each) for name, each in values.items()}

    def on_epoch_end(self, model, epoch, logs):
        logs.update({name: next(each) for name, each in self.values.items()})


def fit(*callbacks, model=None, **kwargs):
    model = model or net()
    return model, model.fit(X, Y, callbacks=callbacks, **({"batch_size": 20, "verbose": 0} | kwargs))


# The base class ----------------------------------------------------------------------------------------------------


def test_calls_are_in_order_and_numbers_continue_over_several_fits(backend):
    model, log = net(backend), CallLog()
    fit(log, model=model, epochs=2)
    fit(log, model=model, accumulate=2)
    assert log.calls == [
        "train begin",
        "epoch 0 begin", "step 1", "step 2", "step 3", "epoch 0 end",
        "epoch 1 begin", "step 4", "step 5", "step 6", "epoch 1 end",
        "train end",
        "train begin", "epoch 2 begin", "step 7", "step 8", "epoch 2 end", "train end",
    ]  # fmt: skip


def test_several_callbacks_are_called_in_order_and_ended_in_reverse_order():
    class Named(Callback):
        def __init__(self, name):
            self.name = name

        def on_epoch_end(self, model, epoch, logs):
            calls.append(f"{self.name} epoch")

        def on_train_end(self, model):
            calls.append(f"{self.name} end")

    calls = []
    fit(Named("a"), Named("b"))
    assert calls == ["a epoch", "b epoch", "b end", "a end"]


def test_a_single_callback_needs_no_list():
    log = CallLog()
    net().fit(X, Y, callbacks=log, verbose=0)
    assert log.calls[-1] == "train end"


def test_the_run_has_the_progress_of_training(backend):
    class Check(Callback):
        def on_train_begin(self, model):
            run = self.run
            assert (run.epochs, run.steps, run.samples, run.batch_size) == (2, 3, 50, 20)
            assert run.model is model and run.logs() == {}

        def on_step_end(self, model, step):
            seen.append(self.run.logs())
            rates.append(self.run.state.learning_rate)

        def on_epoch_end(self, model, epoch, logs):
            latest = {name: values[-1] for name, values in self.run.history.items()}
            assert latest.pop("learning_rate") == (0.5, 0.25)[epoch]
            assert logs == seen[-1] == latest

    seen, rates = [], []
    fit(Check(), model=net(backend), epochs=2, optimizer=optimizers.SGD(schedules.StepDecay(1.0, every=2, factor=0.5)))
    assert all(set(logs) == {"loss", "accuracy"} for logs in seen)
    assert rates == [1.0, 0.5, 0.5, 0.25, 0.25, 0.125]


@pytest.mark.parametrize("where", ["on_train_begin", "on_epoch_begin", "on_step_end", "on_epoch_end", "on_train_end"])
def test_an_error_in_a_callback_is_raised_after_all_callbacks_have_ended(where):
    def fail(*args):
        raise KeyError(where)

    calls = []
    before, failing, after = CallLog(calls), CallLog(calls), CallLog(calls)
    setattr(failing, where, fail)
    with pytest.raises(KeyError, match=where):
        fit(before, failing, after)
    started = calls.count("train begin") + (where == "on_train_begin")
    assert calls.count("train end") == started - (where == "on_train_end")


@pytest.mark.parametrize("at", ["step", "epoch"])
def test_stop_ends_training_after_the_step_or_epoch_and_records_the_reason(backend, at):
    class Stop(CallLog):
        def on_step_end(self, model, step):
            super().on_step_end(model, step)
            if at == "step" and step == 5:
                self.stop("enough")

        def on_epoch_end(self, model, epoch, logs):
            super().on_epoch_end(model, epoch, logs)
            if at == "epoch" and epoch == 1:
                self.stop("enough")

    stop = Stop()
    _, history = fit(stop, model=net(backend), epochs=9)
    assert history.stopped == "enough" and len(history["loss"]) == 2
    assert [c for c in stop.calls if c.startswith("step")][-1] == ("step 5" if at == "step" else "step 6")
    assert stop.calls[-1] == "train end"


# Early stopping and plateaus ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kwargs", "stopped_at", "best_epoch"),
    [
        ({"val_loss": [3, 2, 1, 2, 2, 2, 0]}, {"patience": 2}, 5, 2),
        ({"val_loss": [3, 2, 1, 2, 2, 2, 0]}, {"patience": 0}, 3, 2),
        ({"val_loss": [3, 2, 1, 2, 2, 2, 0]}, {"patience": 3}, None, 6),
        ({"val_loss": [3, 2.9, 2.8, 2.7, 2.6]}, {"patience": 1, "min_delta": 0.15}, None, 4),
        ({"val_loss": [3, 2.9, 2.8, 2.7, 2.6]}, {"patience": 0, "min_delta": 0.15}, 1, 0),
        ({"val_accuracy": [0.1, 0.5, 0.4, 0.4]}, {"monitor": "val_accuracy", "patience": 1}, 3, 1),
        ({"val_accuracy": [0.1, 0.5, 0.4]}, {"monitor": "val_accuracy", "patience": 1, "mode": "min"}, 2, 0),
        ({"own": [1, 2, 3, 2]}, {"monitor": "own", "mode": "min", "patience": 1}, 2, 0),
        ({"mae": [2, 1, 3]}, {"monitor": "mae", "patience": 0}, 2, 1),
    ],
)
def test_early_stopping_waits_patience_epochs_for_an_improvement(values, kwargs, stopped_at, best_epoch):
    early = EarlyStopping(**kwargs)
    epochs = len(next(iter(values.values())))
    _, history = fit(FakeLogs(**values), early, epochs=epochs)
    assert len(history["loss"]) == (epochs if stopped_at is None else stopped_at + 1)
    assert history.stopped == (None if stopped_at is None else "early stopping")
    assert early.best_epoch == best_epoch and early.best == next(iter(values.values()))[best_epoch]


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("stops", [True, False])
def test_early_stopping_restores_the_weights_and_buffers_of_the_best_epoch(backend, restore, stops):
    class Counts(layers.Layer):
        def build(self, input_shape):
            self.count = self.add_buffer("count", [0.0])
            return input_shape

        def forward(self, x):
            if self.context.training:
                self.count.value += 1.0
            return x

        def backward(self, grad_y):
            return grad_y

    class Keep(Callback):
        def on_epoch_end(self, model, epoch, logs):
            kept.append(weights_of(model))

    kept = []
    model = xpnet.Sequential([layers.Dense(3), Counts()], (2,), backend)
    early = EarlyStopping(patience=1 if stops else 9, restore_best=restore)
    fit(FakeLogs(val_loss=[3, 1, 2, 2, 2]), early, Keep(), model=model, epochs=5)
    assert len(kept) == (4 if stops else 5) and not np.array_equal(kept[1], kept[-1])
    np.testing.assert_array_equal(weights_of(model), kept[1 if restore else -1])


def test_early_stopping_monitors_validation_data(backend):
    early = EarlyStopping(patience=0)
    model, history = fit(
        early, model=net(backend), epochs=50, validation_data=(X, 2 - Y), optimizer=optimizers.Adam(0.1)
    )
    assert history.stopped == "early stopping" and early.best == min(history["val_loss"])
    assert model.evaluate(X, 2 - Y)["loss"] == pytest.approx(early.best, rel=1e-6)


def test_early_stopping_starts_afresh_in_a_second_fit():
    early, model = EarlyStopping(patience=0), net()
    fit(FakeLogs(val_loss=[1, 2]), early, model=model, epochs=2)
    fit(FakeLogs(val_loss=[5, 6]), early, model=model, epochs=2)
    assert (early.best, early.best_epoch) == (5, 2)


def test_early_stopping_treats_any_number_as_better_than_nan():
    early = EarlyStopping(patience=2)
    fit(FakeLogs(val_loss=[math.nan, 2.0, 1.0, 3.0]), early, epochs=4)
    assert early.best == 1.0


def test_a_plateau_lowers_the_rate_and_keeps_the_schedule():
    class Rates(Callback):
        def on_epoch_end(self, model, epoch, logs):
            rates.append(self.run.state.learning_rate)

    rates = []
    model = net()
    optimizer = optimizers.SGD(lambda step: 8.0 if step < 15 else 4.0)
    plateau = ReduceLROnPlateau(factor=0.5, patience=1, min_rate=0.9)
    fit(
        FakeLogs(val_loss=[1, 2, 2, 0, 2, 2, 2, 2, 2, 2]), plateau, Rates(), model=model, epochs=10, optimizer=optimizer
    )
    # The plateau lowers the rate after epochs 2, 5, 7 and 9, and the schedule halves it after epoch 4.
    assert rates == pytest.approx([8, 8, 4, 4, 2, 1, 1, 0.9, 0.9, 0.9])
    assert optimizer.learning_rate(0) == 8.0
    fit(Rates(), model=model, optimizer=optimizer)
    assert rates[-1] == pytest.approx(0.9)  # the model keeps the lowered rate


def test_a_plateau_lowers_the_rate_of_the_following_steps(backend):
    fast, slow = net(backend), net(backend)
    sgd = optimizers.SGD(0.1)
    fit(FakeLogs(val_loss=[1, 1]), ReduceLROnPlateau(factor=0.5, patience=0), model=fast, epochs=2, optimizer=sgd)
    for m in (fast, slow):
        m.load_state_dict(net(backend).state_dict())
    fit(model=fast, optimizer=sgd, shuffle=False)
    fit(model=slow, optimizer=optimizers.SGD(0.05), shuffle=False)
    np.testing.assert_allclose(weights_of(fast), weights_of(slow), rtol=1e-6)


@pytest.mark.parametrize("kind", [EarlyStopping, ReduceLROnPlateau])
@pytest.mark.parametrize("kwargs", [{"mode": "up"}, {"patience": -1}, {"min_delta": -0.1}])
def test_monitors_refuse_invalid_arguments(kind, kwargs):
    with pytest.raises(ArgumentError, match=f"{kind.__name__}: .*{next(iter(kwargs))}"):
        kind(**kwargs)


@pytest.mark.parametrize("factor", [0, 1, -0.5, 2])
def test_the_factor_of_a_plateau_must_be_between_0_and_1(factor):
    with pytest.raises(ArgumentError, match="factor must be a number above 0 and below 1"):
        ReduceLROnPlateau(factor=factor)


@pytest.mark.parametrize(
    ("monitor", "match"),
    [
        ("val_loss", "no 'val_loss' to monitor, only loss, accuracy. Give fit validation data"),
        ("f1", "no 'f1' to monitor"),
    ],
)
def test_an_unknown_metric_to_monitor_is_refused_and_the_known_ones_are_listed(monitor, match):
    with pytest.raises(ArgumentError, match=match):
        fit(EarlyStopping(monitor))


@pytest.mark.parametrize(
    ("monitor", "kwargs", "end"),
    [
        ("val_acc", {"validation_data": (X, Y)},
         "only loss, accuracy, val_loss, val_accuracy. Did you mean 'val_accuracy'?"),
        ("acc", {}, "only loss, accuracy. Did you mean 'accuracy'?"),
        ("val_acuracy", {"validation_split": 0.2}, "Did you mean 'val_accuracy'?"),
        ("val_accuracy_score", {"validation_data": (X, Y)}, "Did you mean 'val_accuracy'?"),
        ("val_acc", {}, "Did you mean 'val_accuracy'? Give fit validation data: "
                        "validation_data=(x, y) or validation_split=0.2."),
        ("val_accuracy", {}, "only loss, accuracy. Give fit validation data: "
                             "validation_data=(x, y) or validation_split=0.2."),
        ("f1", {}, 'only loss, accuracy. Give fit metrics=["f1"].'),
        ("val_f1", {"validation_data": (X, Y)}, 'val_accuracy. Give fit metrics=["f1"].'),
        ("val_precision", {"validation_data": (X, Y), "metrics": ["recall"]},
         'only loss, recall, val_loss, val_recall. Give fit metrics=["precision"].'),
        ("qqq", {}, "only loss, accuracy."),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "monitoring",
    [EarlyStopping, ReduceLROnPlateau, lambda name: callbacks.Checkpoint("a.safetensors", keep_best=1, monitor=name)],
    ids=["EarlyStopping", "ReduceLROnPlateau", "Checkpoint"],
)
def test_a_misspelled_monitor_is_refused_before_the_first_step(monitoring, monitor, kwargs, end):
    model, steps = net(), CallLog()
    before = weights_of(model)
    with pytest.raises(ArgumentError) as caught:
        fit(monitoring(monitor), model=model, epochs=2, **kwargs)
    assert f"the logs have no {monitor!r} to monitor, " in str(caught.value) and str(caught.value).endswith(end)
    np.testing.assert_array_equal(weights_of(model), before)
    fit(steps, model=model)  # the model still works
    assert steps.calls[1:3] == ["epoch 0 begin", "step 1"]


def test_a_checkpoint_that_keeps_no_best_epochs_monitors_nothing(tmp_path):
    fit(callbacks.Checkpoint(tmp_path / "run.safetensors"))  # monitor="val_loss" by default
    assert (tmp_path / "run.safetensors").exists()


def test_with_callbacks_that_may_add_logs_a_monitor_is_checked_after_an_epoch():
    early, log = EarlyStopping("own"), CallLog()
    with pytest.raises(ArgumentError, match="no 'own' to monitor, only loss, accuracy"):
        fit(log, early)
    assert log.calls[-2:] == ["epoch 0 end", "train end"]
    fit(FakeLogs(own=[1.0]), early)
    assert early.best == 1.0


@pytest.mark.parametrize("monitor", [None, 3, ["val_loss"], b"val_loss"])
@pytest.mark.parametrize("kind", [EarlyStopping, ReduceLROnPlateau])
def test_a_monitor_must_be_a_name(kind, monitor):
    with pytest.raises(ArgumentError, match=f'{kind.__name__}: monitor must be a name such as "val_loss", not '):
        kind(monitor)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"validation_data": (X, Y)},
        {"validation_split": 0.2, "metrics": ["f1", "recall"]},
        {"loss": "mse", "validation_split": np.float32(0.5)},
    ],
)
def test_the_run_knows_the_names_of_the_logs_before_the_first_epoch(kwargs):
    class Names(Callback):
        def on_train_begin(self, model):
            known.extend(self.run.log_names)

        def on_epoch_end(self, model, epoch, logs):
            assert known == list(logs)

    known = []
    targets = np.eye(3)[Y] if "loss" in kwargs else Y
    kwargs = {"validation_data": None} | kwargs
    net().fit(X, targets, callbacks=[Names()], verbose=0, **kwargs)
    assert known[0] == "loss"


# Averages of weights ------------------------------------------------------------------------------------------------


def normed(backend="cpu"):
    return xpnet.Sequential([layers.Dense(8), layers.BatchNorm(), layers.Tanh(), layers.Dense(3)], (2,), backend)


class KeepStates(Callback):
    """Keeps the state of the model after each step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, model, step):
        self.states.append(model.state_dict())


def averages_of(states, start, decay):
    """average ← d · average + (1 - d) · state, in float64."""
    average = {name: value.astype("float64") for name, value in start.items()}
    for k, state in enumerate(states, 1):
        d = min(decay, (1 + k) / (10 + k))
        average = {name: d * average[name] + (1 - d) * state[name] for name in state}
    return average


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_weights_and_buffers_are_averaged_over_the_steps(backend, decay):
    model, average, keep = normed(backend), ExponentialMovingAverage(decay), KeepStates()
    start = model.state_dict()
    fit(average, keep, model=model, epochs=4)
    want = averages_of(keep.states, start, decay)
    assert average.updates == len(keep.states) == 12 and average.applied
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value, want[name], rtol=1e-5, atol=1e-6)
    average.restore()
    assert_same_state(model.state_dict(), keep.states[-1])
    average.restore()  # which changes nothing
    assert_same_state(model.state_dict(), keep.states[-1])
    average.apply()
    np.testing.assert_allclose(model.state_dict()["0.weight"], want["0.weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("validate", [False, True])
def test_averaging_does_not_change_the_training(backend, validate):
    plain, averaged = KeepStates(), KeepStates()
    options = {"epochs": 5, "validation_data": (X, Y)}
    model, history = fit(plain, model=normed(backend), **options)
    average = ExponentialMovingAverage(0.9, validate=validate, apply_at_end=False)
    other, with_average = fit(averaged, average, model=normed(backend), **options)
    for one, two in zip(plain.states, averaged.states, strict=True):
        assert_same_state(one, two)
    assert_same_state(other.state_dict(), model.state_dict())
    assert history["loss"] == with_average["loss"]
    assert (history["val_loss"] == with_average["val_loss"]) == (not validate)
    if validate:
        average.apply()
        assert other.evaluate(X, Y)["loss"] == pytest.approx(with_average["val_loss"][-1], rel=1e-6)


def test_steps_are_captured_while_weights_are_averaged(monkeypatch):
    class Captured(ExponentialMovingAverage):
        def on_train_end(self, model):
            reasons.append((self.run.executor.captured, self.run.executor.fallback_reason))
            super().on_train_end(model)

    states, reasons = [], []
    for capture in ("1", "0"):
        monkeypatch.setenv("XPNET_CAPTURE", capture)
        model, _ = fit(Captured(0.9, validate=True), model=normed(), epochs=40, validation_data=(X, Y))
        states.append(model.state_dict())
    assert reasons[0][0] > 0 and reasons[1][0] == 0
    assert_same_state(*states)


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("stop", [2, 6, 7])  # an epoch has 3 steps
def test_averages_are_resumed_bit_for_bit(backend, tmp_path, validate, stop):
    def run(*more, **options):
        average = ExponentialMovingAverage(0.9, validate=validate)
        model, history = fit(average, *more, model=normed(backend), epochs=4, validation_data=(X, Y), **options)
        averaged = model.state_dict()
        average.restore()
        return {**averaged, **{f"trained {name}": value for name, value in model.state_dict().items()}}, history

    path = tmp_path / "run.safetensors"
    want, whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(StopAt(stop), callbacks.Checkpoint(path, minutes=0))
    got, resumed = run(callbacks.Checkpoint(path), resume_from=path)
    assert_same_state(got, want)
    assert dict(resumed) == dict(whole)
    loaded = xpnet.load(path, backend)  # the file of the last epoch
    same = all(np.array_equal(value, want[name]) for name, value in loaded.state_dict().items())
    assert same == validate


def test_damaged_averages_are_refused(tmp_path):
    class Other(ExponentialMovingAverage):
        def state(self):
            return {**super().state(), "buffer 1": np.zeros(3, "float32")}

    Other.__name__ = "ExponentialMovingAverage"
    path, model = tmp_path / "run.safetensors", normed()
    fit(Other(), callbacks.Checkpoint(path), model=normed())
    before = model.state_dict()
    with pytest.raises(FileError, match=r"its buffer 1 is float32 \(3,\), not float32 \(8,\)"):
        fit(ExponentialMovingAverage(), model=model, resume_from=path)
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_restores_the_averages_of_the_best_epoch(first):
    class Keep(Callback):
        def on_epoch_end(self, model, epoch, logs):
            kept.append(model.state_dict())

    kept = []
    early, average = EarlyStopping(patience=9), ExponentialMovingAverage(0.9, validate=True)
    both = (early, average) if first else (average, early)
    model, _ = fit(FakeLogs(val_loss=[3, 1, 2]), *both, Keep(), model=normed(), epochs=3, validation_data=(X, Y))
    assert early.best_epoch == 1
    assert_same_state(model.state_dict(), kept[1])


def test_after_divergence_the_model_has_the_weights_of_the_epochs_start():
    model, average = normed(), ExponentialMovingAverage(0.9)
    start = model.state_dict()
    with pytest.raises(DivergenceError):
        fit(average, model=model, optimizer=optimizers.SGD(1e30))
    assert_same_state(model.state_dict(), start)


def test_averages_leave_other_models_alone_that_share_layers():
    encoder = layers.Dense(4)
    inputs = xpnet.Input((2,))
    h = encoder(inputs)
    one, two = (xpnet.Model(inputs, layers.Dense(3)(h), backend="cpu", seed=seed) for seed in (0, 1))
    average = ExponentialMovingAverage(0.9, apply_at_end=False)
    fit(average, model=one, epochs=2)
    fit(model=two, epochs=2)
    other = two.state_dict()
    average.apply()
    own = [name for name, value in two.state_dict().items() if np.array_equal(value, other[name])]
    assert len(own) == 2  # the weight and the bias of its own layer; those of the shared one are averages


def test_averages_of_a_model_that_was_moved_are_refused():
    average = ExponentialMovingAverage()
    with pytest.raises(StateError, match="no averages before fit"):
        average.apply()
    model, _ = fit(average)
    model.to("cpu", dtype="float64")
    with pytest.raises(StateError, match="moved to another backend or dtype"):
        average.restore()


@pytest.mark.parametrize("decay", [-0.1, 1.0, "0.9", math.nan])
def test_the_decay_of_averages_is_a_number_below_1(decay):
    with pytest.raises(ArgumentError, match="ExponentialMovingAverage: decay must be a number of at least 0 and below"):
        ExponentialMovingAverage(decay)


# Learning rate finder ------------------------------------------------------------------------------------------------


def noisy(backend="cpu"):
    stack = [layers.Dense(8), layers.BatchNorm(), layers.Tanh(), layers.Dropout(0.3), layers.Dense(3)]
    return xpnet.Sequential(stack, (2,), backend, seed=4)


def test_the_finder_tests_rates_that_grow_exponentially(backend):
    class Watch(Callback):
        def on_step_end(self, model, step):
            rates.append(self.run.state.rate_at(step - 1))
            losses.append(self.run.step_loss())

    rates, losses = [], []
    finder = LearningRateFinder(1e-3, 1.0, steps=8, smoothing=0.5)
    _, history = fit(Watch(), finder, model=net(backend), epochs=9, optimizer=optimizers.SGD(0.5))
    assert history.stopped == "the range of learning rates was tested"
    np.testing.assert_allclose(finder.rates, np.geomspace(1e-3, 1.0, 8), rtol=1e-12)
    np.testing.assert_allclose(rates, finder.rates, rtol=1e-12)
    average = 0.0
    for k, (loss, smoothed) in enumerate(zip(losses, finder.losses, strict=True), 1):
        average = 0.5 * average + 0.5 * loss
        assert smoothed == pytest.approx(average / (1 - 0.5**k), rel=1e-12)
    model = net(backend)
    seen = [model.train_on_batch(X[i : i + 20], Y[i : i + 20], "softmax_cross_entropy", optimizers.SGD(0.1), [])["loss"]
            for i in (0, 20, 40)]  # fmt: skip
    fit(Watch(), model=net(backend), optimizer=optimizers.SGD(0.1), shuffle=False)
    np.testing.assert_allclose(losses[-3:], seen, rtol=1e-5)


@pytest.mark.parametrize("before", ["nothing", "an equal optimizer", "another optimizer"])
def test_the_finder_leaves_the_model_and_its_training_as_they_were_bit_for_bit(backend, before):
    def run(test):
        model, adam = noisy(backend), optimizers.Adam(0.01)
        if before != "nothing":
            first = adam if before == "an equal optimizer" else optimizers.SGD(0.1, momentum=0.9)
            fit(model=model, epochs=2, optimizer=first)
        state, history = model._state, getattr(model, "history", None)
        memory = getattr(state, "optimizer_state", None)
        if test:
            fit(LearningRateFinder(steps=30), model=model, epochs=20, optimizer=optimizers.Adam(0.01))
            assert model._state is state and getattr(state, "optimizer_state", None) is memory
            assert model.history is history
        fit(model=model, epochs=2, optimizer=adam)
        return {**model.state_dict(), "loss": np.array(model.history["loss"]), "step": model._state.step}

    got, want = run(True), run(False)
    assert_same_state(got, want)


def test_the_finder_ends_when_the_loss_grows_or_is_not_finite():
    for highest, reason in ((1e3, "the loss has grown"), (1e38, "the loss is NaN or infinite")):
        linear = xpnet.Sequential([layers.Dense(3)], (2,), "cpu")
        start = linear.state_dict()
        limit = {} if highest < 1e30 else {"limit": 3e38}
        finder = LearningRateFinder(1e-2, highest, steps=40, smoothing=0.0, **limit)
        options = {"epochs": 40, "optimizer": optimizers.SGD(), "callbacks": finder, "verbose": 0}
        history = linear.fit(X, np.eye(3)[Y], loss="mse", **options)
        assert history.stopped == reason and len(finder.rates) < 40
        assert_same_state(linear.state_dict(), start)


@pytest.mark.parametrize(("kwargs", "steps"), [({}, 3), ({"epochs": 2}, 6), ({"epochs": 3, "accumulate": 2}, 6)])
def test_the_finder_covers_its_range_in_a_short_fit(kwargs, steps):
    finder = LearningRateFinder(1e-3, 1e-1)
    fit(finder, **kwargs)
    assert len(finder.rates) == steps
    np.testing.assert_allclose([finder.rates[0], finder.rates[-1]], [1e-3, 1e-1], rtol=1e-12)


def test_the_finder_scales_a_schedule_and_forgets_it():
    optimizer, model, finder = optimizers.SGD(schedules.StepDecay(0.5, every=2)), net(), LearningRateFinder(steps=6)
    fit(finder, model=model, epochs=2, optimizer=optimizer)
    np.testing.assert_allclose(finder.rates, np.geomspace(1e-7, 10, 6), rtol=1e-12)
    _, history = fit(model=model, epochs=1, optimizer=optimizer)
    assert history["learning_rate"] == pytest.approx([0.05])  # of the third step


def test_the_suggestion_is_where_the_loss_falls_fastest():
    finder = LearningRateFinder()
    assert finder.suggestion is None
    finder.rates = list(np.geomspace(1e-3, 1.0, 7))
    finder.losses = [3.0, 2.9, 2.5, 1.5, 1.2, 1.1, 4.0]
    assert finder.suggestion == finder.rates[2]
    finder.losses = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert finder.suggestion is None


def test_the_suggested_rate_trains_well():
    x, y = datasets.digits()
    x = x.reshape(len(x), -1).astype("float32") / 16
    for kind in (optimizers.SGD, optimizers.Adam):
        model = xpnet.Sequential([layers.Dense(32), layers.ReLU(), layers.Dense(10)], (64,), "cpu")
        finder = LearningRateFinder()
        model.fit(x[:1400], y[:1400], optimizer=kind(), callbacks=finder, batch_size=64, epochs=5, verbose=0)
        model.fit(x[:1400], y[:1400], optimizer=kind(finder.suggestion), batch_size=64, epochs=4, verbose=0)
        assert model.evaluate(x[1400:], y[1400:])["accuracy"] > 0.85


@pytest.mark.parametrize("how", ["an error", "Ctrl-C"])
def test_the_model_is_restored_after_an_error_in_a_test(how):
    def interrupt(callback, model):
        if callback.run.state.step == 4:
            if how == "an error":
                raise KeyError
            os.kill(os.getpid(), signal.SIGINT)

    model = noisy()
    start = model.state_dict()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises((KeyError, KeyboardInterrupt)):
            fit(LearningRateFinder(), Do(interrupt), model=model, epochs=9)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same_state(model.state_dict(), start)
    assert model._state.step == 0


def test_the_finder_refuses_checkpoints_and_a_resumed_run(tmp_path):
    model, path = net(), tmp_path / "run.safetensors"
    start = model.state_dict()
    with pytest.raises(ArgumentError, match="LearningRateFinder: fit without Checkpoint"):
        fit(callbacks.Checkpoint(path), LearningRateFinder(), model=model)
    assert not path.exists()
    fit(callbacks.Checkpoint(path))
    with pytest.raises(ArgumentError, match="resume_from: a fit with LearningRateFinder is a trial"):
        fit(LearningRateFinder(), model=model, resume_from=path)
    assert_same_state(model.state_dict(), start)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"lowest": 0.0}, "lowest must be a finite number above 0"),
        ({"lowest": 1.0, "highest": 1.0}, "highest must be a finite number above 1.0"),
        ({"steps": 1}, "steps must be an integer of at least 2"),
        ({"smoothing": 1.0}, "smoothing must be a number of at least 0 and below 1"),
        ({"limit": 1.0}, "limit must be a number above 1"),
    ],
)
def test_the_finder_refuses_invalid_arguments(kwargs, match):
    with pytest.raises(ArgumentError, match=f"LearningRateFinder: {match}"):
        LearningRateFinder(**kwargs)


@pytest.mark.parametrize("weights", [None, np.linspace(0.5, 2.0, 50)])
def test_the_loss_of_a_step_is_that_of_all_its_batches_and_outputs(weights):
    class Total(Callback):
        def on_step_end(self, model, step):
            found.append((self.run.step_loss(), self.run.logs()["loss"]))

    inputs, found = xpnet.Input((2,)), []
    outputs = [layers.Dense(3, name="a", l2=0.1)(inputs), layers.Dense(3, name="b")(inputs)]
    model = xpnet.Model(inputs, outputs, backend="cpu")
    model.fit(X, [Y, Y], loss="softmax_cross_entropy", accumulate=5, batch_size=10, callbacks=Total(), verbose=0,
              sample_weight=weights, epochs=2)  # fmt: skip
    for step, epoch in found:  # one step of five batches per epoch
        assert step == pytest.approx(epoch, rel=1e-12)


# CSV ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("append", [False, True])
def test_a_csv_log_has_one_row_per_epoch(tmp_path, append):
    path = tmp_path / "log.csv"
    log, model = CSVLogger(path, append=append), net()
    histories = [fit(log, model=model, epochs=2, validation_data=(X, Y))[1] for _ in range(2)]
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "seconds", "loss", "accuracy", "val_loss", "val_accuracy"]
    logged = histories if append else histories[1:]
    assert [row["epoch"] for row in rows] == (["0", "1", "2", "3"] if append else ["2", "3"])
    for name in set(histories[0]) - {"learning_rate"}:
        assert [float(row[name]) for row in rows] == [value for h in logged for value in h[name]]
    assert all(float(row["seconds"]) > 0 for row in rows)


def test_a_csv_log_is_written_after_every_epoch_and_closed_after_an_error(tmp_path):
    class Check(CallLog):
        def on_epoch_end(self, model, epoch, logs):
            assert len((tmp_path / "log.csv").read_text().splitlines()) == epoch + 2
            if epoch == 1:
                raise KeyError

    log = CSVLogger(str(tmp_path / "log.csv"))
    with pytest.raises(KeyError):
        fit(log, Check(), epochs=3)
    assert log._file is None


# TensorBoard ----------------------------------------------------------------------------------------------------------


def events_of(path):
    """The events of a file of TensorBoard, which has records of a length (8 bytes), a check (4), data, a check (4)."""
    event = importlib.import_module("tensorboardX.proto.event_pb2").Event
    content, start, events = path.read_bytes(), 0, []
    while start < len(content):
        (length,) = struct.unpack("<Q", content[start : start + 8])
        events.append(event.FromString(content[start + 12 : start + 12 + length]))
        start += length + 16
    return events


def curves_of(folder):
    """{tag: [(step, value), …]} of all event files, and {tag: sizes of histograms}."""
    curves, histograms = {}, {}
    for path in sorted(folder.iterdir()):
        for event in events_of(path):
            for value in event.summary.value:
                if value.HasField("histo"):
                    histograms.setdefault(value.tag, []).append(value.histo.num)
                else:
                    curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves, histograms


def test_tensorboard_has_the_logs_of_epochs_and_steps_and_histograms(backend, tmp_path):
    pytest.importorskip("tensorboardX")
    board, keep = TensorBoard(tmp_path / "runs", every=2, histograms=True), []
    watch = Do(lambda callback, model: keep.append(callback.run.step_loss()))
    model, history = fit(board, watch, model=net(backend), epochs=2, validation_data=(X, Y), optimizer="sgd")
    curves, histograms = curves_of(tmp_path / "runs")
    for name, values in history.items():
        assert curves.pop(name) == [(3 * k, pytest.approx(value, rel=1e-6)) for k, value in enumerate(values, 1)]
    assert curves["step/loss"] == [(step, pytest.approx(keep[step - 1], rel=1e-6)) for step in (2, 4, 6)]
    assert curves["step/learning_rate"] == [(step, pytest.approx(0.01)) for step in (2, 4, 6)]
    assert histograms == {p.name: [p.size, p.size] for p in model.parameters}


def test_tensorboard_closes_its_file_after_an_error(tmp_path):
    pytest.importorskip("tensorboardX")
    board = TensorBoard(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        fit(board, StopAt(4), epochs=3)
    assert board._writer is None
    assert [step for step, _ in curves_of(tmp_path)[0]["loss"]] == [3]


def test_a_resumed_run_hides_what_tensorboard_had_beyond_the_checkpoint(tmp_path):
    pytest.importorskip("tensorboardX")
    path, folder = tmp_path / "run.safetensors", tmp_path / "runs"
    with pytest.raises(KeyboardInterrupt):
        fit(TensorBoard(folder, every=1), callbacks.Checkpoint(path), StopAt(5), epochs=3)
    (first,) = folder.iterdir()
    time.sleep(1.1)  # the names of the files have the second
    fit(TensorBoard(folder, every=1), callbacks.Checkpoint(path), epochs=3, resume_from=path)
    (second,) = {*folder.iterdir()} - {first}
    starts = [event.step for event in events_of(second) if event.HasField("session_log")]
    assert starts == [4]
    steps = [event.step for event in events_of(second) if event.summary.value]
    assert min(steps) == 4 and max(steps) == 9


def test_without_its_package_tensorboard_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    log = CallLog()
    with pytest.raises(
        MissingPackageError, match=r'needs the package tensorboardX.*pip install "xpnet\[tensorboard\]"'
    ):
        fit(log, TensorBoard(tmp_path / "runs"))
    assert log.calls == ["train begin", "train end"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file"):
        fit(TensorBoard(tmp_path / "file" / "runs"))


@pytest.mark.parametrize(
    ("args", "match"), [(("a", 0), "every must be an integer of at least 1, or None"), ((3,), "folder")], ids=str
)
def test_tensorboard_refuses_invalid_arguments(args, match):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"TensorBoard: {match}"):
        TensorBoard(*args)


# Progress bar ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_the_bar_shows_epoch_samples_per_second_and_metrics(backend, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    fit(ProgressBar(terminal, seconds=0.0), model=net(backend), epochs=2, validation_split=0.2, verbose=1)
    screen = terminal.getvalue()
    last = re.split(r"[\r\n]+", screen.strip())[-1]
    assert "epoch 1/2" in screen and "epoch 2/2" in screen
    assert re.search(r"100%.*40\.?0?/40\.?0?", last), last
    assert re.search(r"samples/s", last)
    assert re.search(r"loss \d\.\d{4}  accuracy [\d.]+  val_loss \d\.\d{4}  val_accuracy [\d.]+\]", last)


def test_the_bar_reads_metrics_no_more_often_than_its_interval():
    class CountReads(Callback):
        def on_train_begin(self, model):
            logs = self.run.logs
            self.run.logs = lambda: (reads.append(1), logs())[1]

    for seconds, least, most in ((1e9, 1, 2), (0.0, 50, 51)):
        reads = []
        fit(CountReads(), ProgressBar(Terminal(), seconds), batch_size=1, verbose=1)
        assert least <= len(reads) <= most


def test_the_bar_of_a_second_fit_starts_at_epoch_1():
    model = net()
    fit(model=model, epochs=3)
    terminal = Terminal()
    fit(ProgressBar(terminal), model=model, epochs=2)
    assert "epoch 1/2" in terminal.getvalue() and "epoch 4" not in terminal.getvalue()


def test_the_bar_is_closed_after_an_error():
    class Fail(Callback):
        def on_step_end(self, model, step):
            raise KeyError

    bar = ProgressBar(Terminal())
    with pytest.raises(KeyError):
        fit(bar, Fail())
    assert bar._bar is None


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_only_verbose_2_prints_without_a_terminal(capfd, verbose):
    fit(epochs=2, verbose=verbose)
    out, err = capfd.readouterr()
    assert err == ""
    if verbose < 2:
        assert out == ""
        return
    assert len(out.splitlines()) == 2
    for epoch, line in enumerate(out.splitlines(), 1):
        pattern = rf"epoch {epoch}/2  loss \d+\.\d{{4}}  accuracy \d\.\d{{4}}  [\d.e-]+ s  [\d,]+ samples/s"
        assert re.fullmatch(pattern, line), line


@pytest.mark.parametrize(("verbose", "visible"), [(0, False), (1, True), (2, False)])
def test_only_verbose_1_shows_the_bar_on_a_terminal(monkeypatch, capsys, verbose, visible):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    fit(verbose=verbose)
    assert ("samples/s" in terminal.getvalue()) == visible


def test_an_explicit_bar_replaces_that_of_verbose(monkeypatch):
    stderr, own = Terminal(), Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    fit(ProgressBar(own), verbose=1)
    assert own.getvalue() and not stderr.getvalue()


def test_small_values_keep_their_significant_digits(capsys):
    fit(verbose=2, model=xpnet.Sequential([layers.Dense(3, weight_initializer=0.0)], (2,), "cpu"),
        optimizer=optimizers.SGD(0.0), sample_weight=1e-9 + (np.arange(50) == 0), metrics=[])  # fmt: skip
    assert "loss 1.0986" in capsys.readouterr().out
    from xpnet.callbacks import format_logs

    assert format_logs({"loss": 1.23456e-5, "accuracy": 0.98765}) == "loss 1.235e-05  accuracy 0.9877"


def test_training_logs_no_warnings(caplog):
    with caplog.at_level(logging.WARNING):
        fit()
    assert caplog.records == []


def test_a_csv_log_with_other_columns_is_not_appended_to(tmp_path):
    path = tmp_path / "log.csv"
    small_net().fit(SAMPLES, LABELS, callbacks=[callbacks.CSVLogger(path)], **QUIET)
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match="columns"):
        small_net().fit(SAMPLES, LABELS, metrics=[], callbacks=[callbacks.CSVLogger(path, append=True)], **QUIET)
    assert path.read_bytes() == before
    small_net().fit(SAMPLES, LABELS, callbacks=[callbacks.CSVLogger(path, append=True)], **QUIET)
    assert path.read_bytes().startswith(before) and path.read_bytes().count(b"\n") == 3


# What fit refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [3, 2.5, "early_stopping", {"a": 1}, [3], [EarlyStopping], EarlyStopping, [None]])
def test_what_is_not_a_callback_is_refused(given):
    with pytest.raises(ArgumentTypeError, match="callbacks must be Callback objects"):
        net().fit(X, Y, callbacks=given, verbose=0)


@pytest.mark.parametrize("wrap", [tuple, iter, lambda log: (one for one in log), lambda log: log[0]])
def test_callbacks_may_come_in_any_iterable(wrap):
    calls = []
    net().fit(X, Y, callbacks=wrap([CallLog(calls)]), verbose=0)
    assert "train begin" in calls and "train end" in calls


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("on_batch_end", "on_step_end"),
        ("on_train_batch_end", "on_step_end"),
        ("on_epoch_ends", "on_epoch_end"),
        ("on_epoch_start", "on_epoch_begin"),
        ("on_train_start", "on_train_begin"),
        ("on_end", "on_step_end"),
    ],
)
def test_a_method_that_fit_never_calls_is_refused(name, nearest):
    model, before = net(), net().state_dict()
    cls = type("Mine", (Callback,), {name: lambda self, model, *rest: None})
    with pytest.raises(ArgumentError, match=rf"Mine: fit never calls {name}\. Did you mean '{nearest}'\?"):
        model.fit(X, Y, callbacks=cls(), verbose=0)
    instance = Callback()
    setattr(instance, name, print)
    with pytest.raises(ArgumentError, match=f"fit never calls {name}"):
        model.fit(X, Y, callbacks=[instance], verbose=0)
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


def test_subclasses_may_use_the_methods_of_xpnets_own_callbacks():
    class Told(EarlyStopping):
        on_nothing = None  # not a method

        def on_better(self, model, epoch):
            super().on_better(model, epoch)
            self.told = epoch

    told = Told("loss")
    net().fit(X, Y, callbacks=told, verbose=0)
    assert told.told == 0


@pytest.mark.parametrize(
    ("read", "standard", "text"),
    [
        (lambda history: history["acc"], KeyError, r"no 'acc'\. Did you mean 'accuracy'\? It has loss, accuracy"),
        (lambda history: history["val_loss"], KeyError, r"no 'val_loss'\. Give fit validation data"),
        (lambda history: history[1], KeyError, r"no 1\. It has loss"),
        (lambda history: history.loss, AttributeError, r'Read it as history\["loss"\]'),
        (lambda history: history.history, AttributeError, r'read history\["loss"\]'),
    ],
)
def test_a_value_that_the_history_lacks_gets_a_hint(read, standard, text):
    model = xpnet.Sequential([layers.Dense(2)], (3,), "cpu")
    history = model.fit(np.ones((4, 3)), [0, 1, 0, 1], verbose=0)
    with pytest.raises(standard, match=text):
        read(history)
    assert history.get("acc") is None and "acc" not in history
