"""Callbacks: when each is called, what it sees, and what the built-in ones do."""

import csv
import io
import logging
import math
import re

import numpy as np
import pytest

import xpnet
from xpnet import datasets, layers, optimizers, schedules
from xpnet.callbacks import Callback, CSVLogger, EarlyStopping, ProgressBar, ReduceLROnPlateau
from xpnet.errors import ArgumentError

X, Y = datasets.blobs(50, classes=3, seed=1)


def net(backend="cpu"):
    return xpnet.Sequential([layers.Dense(8), layers.Tanh(), layers.Dense(3)], (2,), backend)


def weights_of(model):
    return np.concatenate([a.ravel() for a in model.state_dict().values()])


class Recorder(Callback):
    """Notes every call."""

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


class Fed(Callback):
    """Puts figures into the logs, for callbacks after it to follow."""

    def __init__(self, **figures):
        self.figures = {name: iter(values) for name, values in figures.items()}

    def on_epoch_end(self, model, epoch, logs):
        logs.update({name: next(values) for name, values in self.figures.items()})


def fit(*callbacks, model=None, **kwargs):
    model = model or net()
    return model, model.fit(X, Y, callbacks=callbacks, **({"batch_size": 20, "verbose": 0} | kwargs))


# The base class ----------------------------------------------------------------------------------------------------


def test_calls_come_in_order_and_count_over_the_models_life(backend):
    model, recorder = net(backend), Recorder()
    fit(recorder, model=model, epochs=2)
    fit(recorder, model=model, accumulate=2)
    assert recorder.calls == [
        "train begin",
        "epoch 0 begin", "step 1", "step 2", "step 3", "epoch 0 end",
        "epoch 1 begin", "step 4", "step 5", "step 6", "epoch 1 end",
        "train end",
        "train begin", "epoch 2 begin", "step 7", "step 8", "epoch 2 end", "train end",
    ]  # fmt: skip


def test_several_callbacks_are_called_in_their_order_and_ended_in_reverse():
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


def test_one_callback_needs_no_list():
    recorder = Recorder()
    net().fit(X, Y, callbacks=recorder, verbose=0)
    assert recorder.calls[-1] == "train end"


def test_the_run_tells_where_training_stands(backend):
    class Look(Callback):
        def on_train_begin(self, model):
            run = self.run
            assert (run.epochs, run.steps, run.samples, run.batch_size) == (2, 3, 50, 20)
            assert run.model is model and run.logs() == {}

        def on_step_end(self, model, step):
            seen.append(self.run.logs())
            rates.append(self.run.state.learning_rate)

        def on_epoch_end(self, model, epoch, logs):
            assert logs == seen[-1] == {name: values[-1] for name, values in self.run.history.items()}

    seen, rates = [], []
    fit(Look(), model=net(backend), epochs=2, optimizer=optimizers.SGD(schedules.StepDecay(1.0, every=2, factor=0.5)))
    assert all(set(logs) == {"loss", "accuracy"} for logs in seen)
    assert rates == [1.0, 0.5, 0.5, 0.25, 0.25, 0.125]


@pytest.mark.parametrize("where", ["on_train_begin", "on_epoch_begin", "on_step_end", "on_epoch_end", "on_train_end"])
def test_an_error_inside_a_callback_comes_out_and_still_ends_all(where):
    def fail(*args):
        raise KeyError(where)

    calls = []
    before, failing, after = Recorder(calls), Recorder(calls), Recorder(calls)
    setattr(failing, where, fail)
    with pytest.raises(KeyError, match=where):
        fit(before, failing, after)
    begun = calls.count("train begin") + (where == "on_train_begin")
    assert calls.count("train end") == begun - (where == "on_train_end")


@pytest.mark.parametrize("at", ["step", "epoch"])
def test_stop_ends_training_after_the_step_or_epoch_with_its_reason(backend, at):
    class Stop(Recorder):
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
    ("figures", "kwargs", "stopped_at", "best_epoch"),
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
def test_early_stopping_waits_patience_epochs_for_something_better(figures, kwargs, stopped_at, best_epoch):
    early = EarlyStopping(**kwargs)
    epochs = len(next(iter(figures.values())))
    _, history = fit(Fed(**figures), early, epochs=epochs)
    assert len(history["loss"]) == (epochs if stopped_at is None else stopped_at + 1)
    assert history.stopped == (None if stopped_at is None else "early stopping")
    assert early.best_epoch == best_epoch and early.best == next(iter(figures.values()))[best_epoch]


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("stops", [True, False])
def test_early_stopping_puts_the_weights_and_buffers_of_the_best_epoch_back(backend, restore, stops):
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
    fit(Fed(val_loss=[3, 1, 2, 2, 2]), early, Keep(), model=model, epochs=5)
    assert len(kept) == (4 if stops else 5) and not np.array_equal(kept[1], kept[-1])
    np.testing.assert_array_equal(weights_of(model), kept[1 if restore else -1])


def test_early_stopping_follows_real_validation_data(backend):
    early = EarlyStopping(patience=0)
    model, history = fit(
        early, model=net(backend), epochs=50, validation_data=(X, 2 - Y), optimizer=optimizers.Adam(0.1)
    )
    assert history.stopped == "early stopping" and early.best == min(history["val_loss"])
    assert model.evaluate(X, 2 - Y)["loss"] == pytest.approx(early.best, rel=1e-6)


def test_a_second_fit_with_the_same_early_stopping_starts_anew():
    early, model = EarlyStopping(patience=0), net()
    fit(Fed(val_loss=[1, 2]), early, model=model, epochs=2)
    fit(Fed(val_loss=[5, 6]), early, model=model, epochs=2)
    assert (early.best, early.best_epoch) == (5, 2)


def test_early_stopping_takes_a_number_for_better_than_nan():
    early = EarlyStopping(patience=2)
    fit(Fed(val_loss=[math.nan, 2.0, 1.0, 3.0]), early, epochs=4)
    assert early.best == 1.0


def test_a_plateau_lowers_the_rate_and_the_schedule_stays():
    class Rates(Callback):
        def on_epoch_end(self, model, epoch, logs):
            rates.append(self.run.state.learning_rate)

    rates = []
    model = net()
    optimizer = optimizers.SGD(lambda step: 8.0 if step < 15 else 4.0)
    plateau = ReduceLROnPlateau(factor=0.5, patience=1, min_rate=0.9)
    fit(Fed(val_loss=[1, 2, 2, 0, 2, 2, 2, 2, 2, 2]), plateau, Rates(), model=model, epochs=10, optimizer=optimizer)
    # Lowered after the epochs 2, 5, 7 and 9; the schedule halves after epoch 4.
    assert rates == pytest.approx([8, 8, 4, 4, 2, 1, 1, 0.9, 0.9, 0.9])
    assert optimizer.learning_rate(0) == 8.0
    fit(Rates(), model=model, optimizer=optimizer)
    assert rates[-1] == pytest.approx(0.9)  # it stays with the model


def test_a_plateau_changes_the_steps_that_follow(backend):
    fast, slow = net(backend), net(backend)
    sgd = optimizers.SGD(0.1)
    fit(Fed(val_loss=[1, 1]), ReduceLROnPlateau(factor=0.5, patience=0), model=fast, epochs=2, optimizer=sgd)
    for m in (fast, slow):
        m.load_state_dict(net(backend).state_dict())
    fit(model=fast, optimizer=sgd, shuffle=False)
    fit(model=slow, optimizer=optimizers.SGD(0.05), shuffle=False)
    np.testing.assert_allclose(weights_of(fast), weights_of(slow), rtol=1e-6)


@pytest.mark.parametrize("kind", [EarlyStopping, ReduceLROnPlateau])
@pytest.mark.parametrize("kwargs", [{"mode": "up"}, {"patience": -1}, {"min_delta": -0.1}])
def test_monitors_refuse_what_cannot_work(kind, kwargs):
    with pytest.raises(ArgumentError, match=f"{kind.__name__}: .*{next(iter(kwargs))}"):
        kind(**kwargs)


@pytest.mark.parametrize("factor", [0, 1, -0.5, 2])
def test_a_plateaus_factor_lies_between_0_and_1(factor):
    with pytest.raises(ArgumentError, match="factor must lie between 0 and 1"):
        ReduceLROnPlateau(factor=factor)


@pytest.mark.parametrize(
    ("monitor", "match"),
    [
        ("val_loss", "no 'val_loss' to follow, only loss, accuracy. Give fit validation data"),
        ("f1", "no 'f1' to follow"),
    ],
)
def test_a_figure_that_is_not_there_is_named_with_those_that_are(monitor, match):
    with pytest.raises(ArgumentError, match=match):
        fit(EarlyStopping(monitor))


# CSV ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("append", [False, True])
def test_csv_holds_a_row_an_epoch(tmp_path, append):
    path = tmp_path / "log.csv"
    log, model = CSVLogger(path, append), net()
    histories = [fit(log, model=model, epochs=2, validation_data=(X, Y))[1] for _ in range(2)]
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "seconds", "loss", "accuracy", "val_loss", "val_accuracy"]
    shown = histories if append else histories[1:]
    assert [row["epoch"] for row in rows] == (["0", "1", "2", "3"] if append else ["2", "3"])
    for name in histories[0]:
        assert [float(row[name]) for row in rows] == [value for h in shown for value in h[name]]
    assert all(float(row["seconds"]) > 0 for row in rows)


def test_csv_is_on_disk_after_every_epoch_and_closed_after_an_error(tmp_path):
    class Look(Recorder):
        def on_epoch_end(self, model, epoch, logs):
            assert len((tmp_path / "log.csv").read_text().splitlines()) == epoch + 2
            if epoch == 1:
                raise KeyError

    log = CSVLogger(str(tmp_path / "log.csv"))
    with pytest.raises(KeyError):
        fit(log, Look(), epochs=3)
    assert log._file is None


# Progress ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_the_bar_shows_epoch_samples_per_second_and_figures_on_a_terminal(backend):
    terminal = Terminal()
    fit(ProgressBar(terminal, seconds=0.0), model=net(backend), epochs=2, validation_split=0.2, verbose=1)
    screen = terminal.getvalue()
    last = re.split(r"[\r\n]+", screen.strip())[-1]
    assert "epoch 1/2" in screen and "epoch 2/2" in screen
    assert re.search(r"100%.*40\.?0?/40\.?0?", last), last
    assert re.search(r"samples/s", last)
    assert re.search(r"loss \d\.\d{4}  accuracy [\d.]+  val_loss \d\.\d{4}  val_accuracy [\d.]+\]", last)


def test_the_bar_reads_figures_as_seldom_as_asked():
    class Reads(Callback):
        def on_train_begin(self, model):
            logs = self.run.logs
            self.run.logs = lambda: (counted.append(1), logs())[1]

    for seconds, least, most in ((1e9, 1, 2), (0.0, 50, 51)):
        counted = []
        fit(Reads(), ProgressBar(Terminal(), seconds), batch_size=1, verbose=1)
        assert least <= len(counted) <= most


def test_the_bar_of_a_second_fit_counts_from_1_again():
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
def test_nothing_but_verbose_2_prints_where_there_is_no_terminal(capfd, verbose):
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


@pytest.mark.parametrize(("verbose", "shown"), [(0, False), (1, True), (2, False)])
def test_verbose_1_shows_the_bar_on_a_terminal(monkeypatch, capsys, verbose, shown):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    fit(verbose=verbose)
    assert ("samples/s" in terminal.getvalue()) == shown


def test_a_bar_of_ones_own_replaces_that_of_verbose(monkeypatch):
    stderr, own = Terminal(), Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    fit(ProgressBar(own), verbose=1)
    assert own.getvalue() and not stderr.getvalue()


def test_small_figures_keep_their_digits(capsys):
    fit(verbose=2, model=xpnet.Sequential([layers.Dense(3, weight_initializer=0.0)], (2,), "cpu"),
        optimizer=optimizers.SGD(0.0), sample_weight=1e-9 + (np.arange(50) == 0), metrics=[])  # fmt: skip
    assert "loss 1.0986" in capsys.readouterr().out
    from xpnet.callbacks import format_logs

    assert format_logs({"loss": 1.23456e-5, "accuracy": 0.98765}) == "loss 1.235e-05  accuracy 0.9877"


def test_training_logs_nothing_above_info_by_itself(caplog):
    with caplog.at_level(logging.WARNING):
        fit()
    assert caplog.records == []
