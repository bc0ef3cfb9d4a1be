"""Resuming: a run that was stopped in any way continues bit for bit like an uninterrupted one."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import every
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from small_models import StopAt, assert_same_state

import xpnet
from xpnet import augment, callbacks, layers, metrics, optimizers, schedules
from xpnet.errors import ArgumentError, ArgumentTypeError, DivergenceError, FileError

RNG = np.random.default_rng(0)
X = RNG.random((103, 8, 8, 1)).astype("float32")
Y = RNG.integers(3, size=103)
WEIGHTS = RNG.random(103)


def net(backend="cpu", seed=0, **kwargs):
    stack = [
        augment.RandomAffine(shift=1.0, rotation=10.0),
        *[layers.Conv2D(4, 3), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2), layers.Flatten()],
        *[layers.Dropout(0.3), layers.Dense(12, l2=1e-3), layers.Tanh(), layers.Dense(3)],
    ]
    return xpnet.Sequential(stack, (8, 8, 1), backend, seed=seed, **kwargs)


def arguments(**changed):
    """Arguments of a fit that uses every kind of state that a checkpoint must contain."""
    schedule = schedules.OneCycle(0.05, steps=60)
    return {
        "optimizer": optimizers.SGD(schedule, momentum=0.9, nesterov=True, weight_decay=1e-3, clip_norm=1.0),
        "metrics": ["accuracy", metrics.Precision()],
        "epochs": 6,
        "batch_size": 16,
        "sample_weight": WEIGHTS,
        "validation_split": 0.2,
        "verbose": 0,
        **changed,
    }


def stateful_callbacks():
    return [callbacks.EarlyStopping(patience=2), callbacks.ReduceLROnPlateau(patience=0, factor=0.5)]


def everything(model, history):
    return {**model.state_dict(), **{f"history {name}": np.array(values) for name, values in history.items()}}


def whole_run(backend, **changed):
    model = net(backend)
    with_state = stateful_callbacks()
    history = model.fit(X, Y, callbacks=with_state, **arguments(**changed))
    return everything(model, history), with_state


@pytest.mark.parametrize(  # an epoch has 6 updates
    "stop", [2, 6, 23, *(pytest.param(stop, marks=pytest.mark.sweep) for stop in (3, 5, 7, 12))]
)
def test_a_run_stopped_at_any_step_resumes_bit_for_bit(backend, tmp_path, stop):
    want, before = whole_run(backend)
    path = tmp_path / "run.safetensors"
    every_step = callbacks.Checkpoint(path, minutes=0)
    with pytest.raises(KeyboardInterrupt):
        net(backend).fit(X, Y, callbacks=[every_step, StopAt(stop), *stateful_callbacks()], **arguments())
    model, after = net(backend), stateful_callbacks()
    history = model.fit(X, Y, callbacks=[callbacks.Checkpoint(path), *after], resume_from=path, **arguments())
    assert_same_state(everything(model, history), want)
    assert after[0].best_epoch == before[0].best_epoch and after[0].best == before[0].best
    assert len(history.seconds) == len(history["loss"]) and all(0 < s < 60 for s in history.seconds)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_run_with_accumulated_gradients_resumes_bit_for_bit(tmp_path, accumulate):
    want, _ = whole_run("cpu", accumulate=accumulate)
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        net().fit(X, Y, callbacks=[callbacks.Checkpoint(path, minutes=0), StopAt(4), *stateful_callbacks()],
                  **arguments(accumulate=accumulate))  # fmt: skip
    model = net()
    history = model.fit(X, Y, callbacks=stateful_callbacks(), resume_from=path, **arguments(accumulate=accumulate))
    assert_same_state(everything(model, history), want)


@pytest.mark.parametrize("optimizer", every.OPTIMIZERS, ids=repr)
def test_a_run_with_every_optimizer_resumes_bit_for_bit(tmp_path, optimizer):
    check_resuming(xpnet.get_backend("cpu"), tmp_path, optimizer)


@pytest.mark.sweep
@pytest.mark.parametrize("optimizer", every.OPTIMIZERS, ids=repr)
def test_a_run_with_every_optimizer_resumes_bit_for_bit_on_every_backend(backend, tmp_path, optimizer):
    check_resuming(backend, tmp_path, optimizer)


def check_resuming(backend, tmp_path, optimizer):
    want, _ = whole_run(backend, optimizer=optimizer)
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        net(backend).fit(X, Y, callbacks=[callbacks.Checkpoint(path, minutes=0), StopAt(8), *stateful_callbacks()],
                         **arguments(optimizer=optimizer))  # fmt: skip
    model = net(backend)
    history = model.fit(X, Y, callbacks=stateful_callbacks(), resume_from=path, **arguments(optimizer=optimizer))
    assert_same_state(everything(model, history), want)


def test_a_second_fit_resumes_bit_for_bit(tmp_path):
    def after_first_fit():
        model = net()
        model.fit(X, Y, **arguments(epochs=2))
        return model

    uninterrupted = after_first_fit()
    history = uninterrupted.fit(X, Y, **arguments(epochs=3))
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        after_first_fit().fit(X, Y, callbacks=[callbacks.Checkpoint(path), StopAt(3 * 6 + 1)], **arguments(epochs=3))
    model = net()
    resumed = model.fit(X, Y, resume_from=path, **arguments(epochs=3))
    assert_same_state(everything(model, resumed), everything(uninterrupted, history))


def test_ctrl_c_writes_a_checkpoint_that_resumes_bit_for_bit(tmp_path):
    class CtrlC(callbacks.Callback):
        def on_step_end(self, model, step):
            if step == 9:
                os.kill(os.getpid(), signal.SIGINT)

    want, _ = whole_run("cpu")
    path = tmp_path / "run"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        checkpoint = callbacks.Checkpoint(path, every=100)
        history = net().fit(
            X, Y, callbacks=[checkpoint, CtrlC(), *stateful_callbacks()], on_interrupt="stop", **arguments()
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert history.stopped == "interrupted" and len(history["loss"]) == 1
    model = net()
    assert_same_state(
        everything(model, model.fit(X, Y, callbacks=stateful_callbacks(), resume_from=path, **arguments())), want
    )


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    path, model = tmp_path / "run", net()
    done = model.fit(X, Y, callbacks=[callbacks.Checkpoint(path), *stateful_callbacks()], **arguments(epochs=40))
    resumed = net()
    history = resumed.fit(X, Y, callbacks=stateful_callbacks(), resume_from=path, **arguments(epochs=40))
    # The weights are those of the best epoch, not of the last.
    assert_same_state(everything(resumed, history), everything(model, done))
    assert history.stopped == done.stopped == "early stopping"


def test_resuming_with_more_epochs_continues_training(tmp_path):
    path, uninterrupted = tmp_path / "run", net()
    want = uninterrupted.fit(X, Y, **arguments(epochs=4))
    net().fit(X, Y, callbacks=[callbacks.Checkpoint(path)], **arguments(epochs=2))
    model = net()
    assert_same_state(
        everything(model, model.fit(X, Y, resume_from=path, **arguments(epochs=4))), everything(uninterrupted, want)
    )


def test_divergence_after_resuming_restores_the_start_of_the_epoch(tmp_path):
    def burst(step):
        return 1e30 if step == 9 else 0.01

    optimizer = optimizers.SGD(burst)
    path, uninterrupted = tmp_path / "run", net()
    with pytest.raises(DivergenceError) as want:
        uninterrupted.fit(X, Y, **arguments(optimizer=optimizer))
    with pytest.raises(KeyboardInterrupt):
        net().fit(X, Y, callbacks=[callbacks.Checkpoint(path, minutes=0), StopAt(8)], **arguments(optimizer=optimizer))
    model = net()
    with pytest.raises(DivergenceError) as got:
        model.fit(X, Y, resume_from=path, **arguments(optimizer=optimizer))
    assert str(got.value) == str(want.value)
    assert_same_state(model.state_dict(), uninterrupted.state_dict())
    assert model._state.step == uninterrupted._state.step == 6


# Files of Checkpoint --------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_also_a_model_file(backend, tmp_path):
    path, model = tmp_path / "run.safetensors", net(backend)
    model.fit(X, Y, callbacks=[callbacks.Checkpoint(path)], **arguments(epochs=1))
    assert_same_state(xpnet.load(path, backend).state_dict(), model.state_dict())
    plain = safetensors.numpy.load_file(path)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(plain[name], value)


def test_the_best_epochs_have_their_own_files(tmp_path):
    values = iter([3.0, 1.0, 2.0, 0.5, 4.0, float("nan")])

    class FakeLogs(callbacks.Callback):
        def on_epoch_end(self, model, epoch, logs):
            logs["fake"] = next(values)
            weights[epoch] = model.state_dict()

    weights = {}
    checkpoint = callbacks.Checkpoint(tmp_path / "run.st", keep_best=2, monitor="fake", mode="min")
    net().fit(X, Y, callbacks=[checkpoint, FakeLogs()], **arguments())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run-epoch-0002.st", "run-epoch-0004.st", "run.st"]
    assert [epoch for _, epoch in checkpoint.kept] == [3, 1]
    assert_same_state(xpnet.load(checkpoint.file_of_epoch(3), "cpu").state_dict(), weights[3])
    assert_same_state(xpnet.load(tmp_path / "run.st", "cpu").state_dict(), weights[5])


@pytest.mark.parametrize("values", list(itertools.permutations([float("nan"), 0.6, 0.9, float("nan")]))[:12])
def test_nan_is_worse_than_everything(tmp_path, values):
    class FakeLogs(callbacks.Callback):
        def on_epoch_end(self, model, epoch, logs):
            logs["val_auc"] = values[epoch]

    best = values.index(0.9)
    checkpoint = callbacks.Checkpoint(tmp_path / "run.st", keep_best=1, monitor="val_auc")
    two = callbacks.Checkpoint(tmp_path / "two.st", keep_best=2, monitor="val_auc")
    stopping = callbacks.EarlyStopping("val_auc", patience=9)
    lower = callbacks.ReduceLROnPlateau("val_auc", patience=9)
    net().fit(X, Y, callbacks=[FakeLogs(), checkpoint, two, stopping, lower], **arguments(epochs=4))
    assert [epoch for _, epoch in checkpoint.kept] == [best]
    assert [epoch for _, epoch in two.kept] == [best, values.index(0.6)]
    assert checkpoint.file_of_epoch(best).exists()
    assert (stopping.best, stopping.best_epoch, lower.best) == (0.9, best, 0.9)


def test_a_checkpoint_within_an_epoch_has_the_outputs_that_auc_collected(tmp_path):
    y = Y % 2
    options = {**arguments(), "loss": "binary_cross_entropy", "metrics": ["auc", "precision"]}

    def one_output():
        return xpnet.Sequential([layers.Flatten(), layers.Dense(1)], X.shape[1:], "cpu", seed=2)

    want = one_output().fit(X, y, **options)
    checkpoint = callbacks.Checkpoint(tmp_path / "run", minutes=0)
    with pytest.raises(KeyboardInterrupt):
        one_output().fit(X, y, callbacks=[checkpoint, StopAt(15)], **options)
    assert dict(one_output().fit(X, y, resume_from=tmp_path / "run", **options)) == dict(want)


def test_counts_of_older_checkpoints_are_continued():
    metric = metrics.Precision()
    old = np.array([[3.0, 1.0], [0.0, 2.0]])
    restored = metric.restored(old)
    assert restored.tolist() == metric.restored(restored).tolist() == [[3, 1, 0], [0, 2, 0]]
    assert metric.result(restored) == (3 / 3 + 2 / 3) / 2


def test_a_resumed_checkpoint_remembers_the_best_epochs(tmp_path):
    def checkpoint():
        return callbacks.Checkpoint(tmp_path / "run", keep_best=1, monitor="loss")

    with pytest.raises(KeyboardInterrupt):
        net().fit(X, Y, callbacks=[checkpoint(), StopAt(15)], **arguments())
    after = checkpoint()
    net().fit(X, Y, callbacks=[after], resume_from=tmp_path / "run", **arguments())
    assert len(list(tmp_path.iterdir())) == 2 and after.file_of_epoch(after.kept[0][1]).exists()


@pytest.mark.parametrize(("every", "written"), [(1, 4), (2, 2), (3, 2), (10, 1)])
def test_a_checkpoint_is_written_every_n_epochs_and_after_the_last(tmp_path, monkeypatch, every, written):
    count = []
    monkeypatch.setattr(callbacks.Checkpoint, "_write", lambda self: count.append(self.run.state.epoch))
    net().fit(X, Y, callbacks=[callbacks.Checkpoint(tmp_path / "run", every=every)], **arguments(epochs=4))
    assert len(count) == written and count[-1] == 4


def test_a_csv_log_of_a_resumed_run_has_each_epoch_once(tmp_path):
    path, log = tmp_path / "run", tmp_path / "log.csv"
    uninterrupted = tmp_path / "uninterrupted.csv"
    net().fit(X, Y, callbacks=[callbacks.CSVLogger(uninterrupted)], **arguments(epochs=4))
    with pytest.raises(KeyboardInterrupt):
        net().fit(X, Y, callbacks=[callbacks.CSVLogger(log), callbacks.Checkpoint(path, every=2), StopAt(20)],
                  **arguments(epochs=4))  # fmt: skip
    assert log.read_text().count("\n") == 4  # the header and three epochs, the last of which is not in the checkpoint
    net().fit(X, Y, callbacks=[callbacks.CSVLogger(log), callbacks.Checkpoint(path)], resume_from=path,
              **arguments(epochs=4))  # fmt: skip

    def without_seconds(file):
        return [[cell for i, cell in enumerate(line.split(",")) if i != 1] for line in file.read_text().splitlines()]

    assert without_seconds(log) == without_seconds(uninterrupted)


# Files and arguments that are refused ---------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path):
    """The file of a run that was stopped in its second epoch."""
    with pytest.raises(KeyboardInterrupt):
        net().fit(X, Y, callbacks=[callbacks.Checkpoint(tmp_path / "run", minutes=0), StopAt(8)], **arguments())
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"optimizer": "adam"}, r"from a fit with optimizer=SGD\(.*and this one has Adam"),
        ({"loss": "mse"}, "from a fit with loss=SoftmaxCrossEntropy"),
        ({"metrics": None}, "from a fit with metrics="),
        ({"batch_size": 8}, "within an epoch with batch_size=16, which cannot be finished with 8"),
        ({"accumulate": 3}, "accumulate=1"),
        ({"shuffle": False}, "shuffle=True"),
        ({"validation_split": 0.3}, "samples=82"),
    ],
)
def test_a_checkpoint_of_a_fit_with_other_arguments_is_refused(stopped, changed, match):
    y = np.eye(3)[Y] if changed.get("loss") == "mse" else Y
    with pytest.raises(ArgumentError, match=match):
        net().fit(X, y, resume_from=stopped, **arguments(**changed))


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: net(seed=1), "from another model: seed is 0 there and 1 here"),
        (lambda: net(dtype="float64"), "dtype is 'float32' there"),
        (lambda: xpnet.Sequential([layers.Flatten(), layers.Dense(3)], (8, 8, 1), "cpu"), "layers is"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(stopped, model, match):
    with pytest.raises(ArgumentError, match=match):
        model().fit(X, Y, resume_from=stopped, **arguments())


def test_the_batch_size_may_change_at_the_end_of_an_epoch(tmp_path):
    net().fit(X, Y, callbacks=[callbacks.Checkpoint(tmp_path / "run")], **arguments(epochs=1))
    history = net().fit(X, Y, resume_from=tmp_path / "run", **arguments(epochs=2, batch_size=32))
    assert len(history["loss"]) == 2


def test_files_without_training_state_are_refused(tmp_path, stopped):
    net().save(tmp_path / "model")
    with pytest.raises(FileError, match="contains a model, as model.save writes it, but no training state"):
        net().fit(X, Y, resume_from=tmp_path / "model", **arguments())
    with pytest.raises(FileError, match="there is no such file"):
        net().fit(X, Y, resume_from=tmp_path / "nothing", **arguments())
    (tmp_path / "cut").write_bytes(stopped.read_bytes()[:-100])
    with pytest.raises(FileError, match="cut"):
        net().fit(X, Y, resume_from=tmp_path / "cut", **arguments())


def test_an_altered_step_number_is_found(tmp_path, stopped):
    content, old = stopped.read_bytes(), rb"\"step\": 7"
    assert content.count(old) == 1
    (tmp_path / "altered").write_bytes(content.replace(old, old[:-1] + b"9"))
    with pytest.raises(FileError, match="altered"):
        net().fit(X, Y, resume_from=tmp_path / "altered", **arguments())


def test_another_version_of_numpy_warns(stopped, monkeypatch):
    monkeypatch.setattr(np, "__version__", "1.99")
    with pytest.warns(UserWarning, match="NumPy was .* and is '1.99'") as caught:
        net().fit(X, Y, resume_from=stopped, **arguments())
    assert caught[0].filename == __file__


def test_a_missing_callback_warns(tmp_path):
    path = tmp_path / "run"
    net().fit(X, Y, callbacks=[callbacks.Checkpoint(path), *stateful_callbacks()], **arguments(epochs=1))
    with pytest.warns(UserWarning, match="has the state of callbacks that this fit does not have: EarlyStopping 0."):
        net().fit(X, Y, callbacks=[callbacks.ReduceLROnPlateau()], resume_from=path, **arguments(epochs=1))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"every": 0}, "every"), ({"every": 1.5}, "every"), ({"minutes": -1}, "minutes"), ({"keep_best": -1}, "keep_best"),
     ({"mode": "up"}, "mode"), ({"path": "."}, "path must name a file"), ({"path": 5}, "path must name a file")],
)  # fmt: skip
def test_invalid_arguments_of_checkpoint_are_refused(kwargs, match):
    with pytest.raises(ArgumentError, match=match):
        callbacks.Checkpoint(**{"path": "x", **kwargs})


def test_a_missing_metric_cannot_be_monitored(tmp_path):
    checkpoint = callbacks.Checkpoint(tmp_path / "run", keep_best=1)
    with pytest.raises(ArgumentError, match="Checkpoint: the logs have no 'val_loss' to monitor"):
        net().fit(X, Y, callbacks=[checkpoint], **arguments(validation_split=0.0))


def test_the_state_of_a_custom_callback_is_saved_and_restored(tmp_path):
    class Counter(callbacks.Callback):
        def on_train_begin(self, model):
            self.steps, self.seen = 0, np.zeros(3)

        def on_step_end(self, model, step):
            self.steps += 1
            self.seen += 0.5

        def state(self):
            return {"steps": self.steps, "seen": self.seen}

        def on_resume(self, model, state):
            self.steps, self.seen = state["steps"], state["seen"]

    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        net().fit(X, Y, callbacks=[Counter(), callbacks.Checkpoint(path, minutes=0), StopAt(8)], **arguments(epochs=2))
    counter = Counter()
    net().fit(X, Y, callbacks=[counter], resume_from=path, **arguments(epochs=2))
    assert counter.steps == 12 and (counter.seen == 6.0).all()


def test_a_callback_state_without_a_json_form_is_refused(tmp_path):
    class Unserializable(callbacks.Callback):
        def state(self):
            return {"thing": object()}

    with pytest.raises(ArgumentTypeError, match="what a callback's state"):
        net().fit(X, Y, callbacks=[Unserializable(), callbacks.Checkpoint(tmp_path / "run")], **arguments(epochs=1))


def test_layers_frozen_during_training_stay_frozen_after_resuming(tmp_path):
    class Freeze(callbacks.Callback):
        def on_epoch_end(self, model, epoch, logs):
            model.layers[1].trainable = epoch == 3

    uninterrupted, model = net(), net()
    want = uninterrupted.fit(X, Y, callbacks=[Freeze()], **arguments())
    checkpoint = callbacks.Checkpoint(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        net().fit(X, Y, callbacks=[Freeze(), checkpoint, StopAt(15)], **arguments())
    got = model.fit(X, Y, callbacks=[Freeze()], resume_from=tmp_path / "run", **arguments())
    assert_same_state(everything(model, got), everything(uninterrupted, want))


# Killed processes -----------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
import numpy as np
import test_resuming as t
from xpnet import callbacks
path, resume = sys.argv[1], sys.argv[2] == "resume"
model = t.net()
checkpoint = callbacks.Checkpoint(path, minutes=0)
history = model.fit(t.X, t.Y, callbacks=[checkpoint, *t.stateful_callbacks()], resume_from=path if resume else None,
                    **t.arguments(epochs=40))
np.savez(path + ".npz", **t.everything(model, history))
print("done", flush=True)
"""


@pytest.mark.sweep
def test_a_process_killed_at_20_random_moments_resumes_bit_for_bit(tmp_path):
    def start(path, mode):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(path), mode], env=environment, cwd=tmp_path,
                                stdout=subprocess.PIPE, text=True)  # fmt: skip

    def result(path):
        with np.load(f"{path}.npz") as file:
            return dict(file)

    assert start(tmp_path / "whole", "begin").communicate()[0] == "done\n"
    want = result(tmp_path / "whole")
    assert len(want["history loss"]) < 40  # it stopped early
    rng, path, killed = np.random.default_rng(), tmp_path / "run", 0
    while killed < 20:
        process = start(path, "resume" if path.exists() else "begin")
        before = path.stat().st_mtime_ns if path.exists() else 0
        while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.001)  # until it has written a checkpoint
        time.sleep(rng.uniform(0.0, 0.05))
        if process.poll() is not None:
            assert process.communicate()[0] == "done\n"
            assert_same_state(result(path), want)
            path.unlink()  # the run has finished, so the next one starts from the beginning
            continue
        process.kill()
        process.communicate()
        killed += 1
    assert start(path, "resume").communicate()[0] == "done\n"
    assert_same_state(result(path), want)
    leftovers = [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]
    assert len(leftovers) <= 20  # at most the file that each killed process was writing
    texts = safetensors.safe_open(path, framework="numpy").metadata()
    assert json.loads(texts["training"])["epoch"] == len(want["history loss"])
