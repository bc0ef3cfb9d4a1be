"""Ctrl-C: after it the model is whole and can be used, wherever and however often it was pressed."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
from small_models import assert_same_state

import xpnet
from xpnet import callbacks, layers
from xpnet.concurrency.interrupts import deferring, interrupts, uninterrupted
from xpnet.errors import ArgumentError

X = np.random.default_rng(0).normal(size=(200, 6)).astype("float32")
Y = np.arange(200) % 3
ARGUMENTS = {"epochs": 5, "batch_size": 20, "verbose": 0}


def press():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def default_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    assert not interrupts.deferring


def net(backend="cpu"):
    stack = [layers.Dense(16), layers.ReLU(), layers.Dropout(0.2), layers.Dense(3)]
    return xpnet.Sequential(stack, (6,), backend)


class PressAt(callbacks.Callback):
    """Presses Ctrl-C at one call of a method."""

    def __init__(self, method, count=1, times=1):
        self.calls, self.ended = 0, 0

        def on_call(*_):
            self.calls += 1
            if self.calls == count:
                for _ in range(times):
                    press()

        setattr(self, method, on_call)
        if method != "on_train_end":
            self.on_train_end = self._end

    def _end(self, model):
        self.ended += 1


def test_ctrl_c_raises_after_the_step_and_leaves_the_history(backend):
    model, callback = net(backend), PressAt("on_step_end", 14)
    with pytest.raises(KeyboardInterrupt, match="model.history has the complete epochs"):
        model.fit(X, Y, callbacks=[callback], **ARGUMENTS)
    assert callback.calls == 14 and callback.ended == 1
    assert model.history.stopped == "interrupted" and len(model.history["loss"]) == 1
    assert not model.context.guard.in_training and np.isfinite(model.predict(X)).all()
    stopped = net(backend)
    history = stopped.fit(X, Y, callbacks=[PressAt("on_step_end", 14)], on_interrupt="stop", **ARGUMENTS)
    assert history is stopped.history and dict(history) == dict(model.history)
    assert_same_state(stopped.state_dict(), model.state_dict())
    assert model.fit(X, Y, verbose=0).stopped is None


@pytest.mark.parametrize(
    ("method", "epochs"),
    [("on_train_begin", 0), ("on_epoch_begin", 0), ("on_step_end", 0), ("on_epoch_end", 1), ("on_train_end", 5)],
)
def test_ctrl_c_in_any_callback(method, epochs):
    model = net()
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, callbacks=[PressAt(method)], **ARGUMENTS)
    assert len(model.history.get("loss", [])) == epochs
    history = net().fit(X, Y, callbacks=[PressAt(method)], on_interrupt="stop", **ARGUMENTS)
    assert history.stopped == "interrupted" and dict(history) == dict(model.history)


def test_ctrl_c_during_validation_completes_the_epoch(monkeypatch):
    model = net()
    evaluate = xpnet.training.loop.evaluate

    def interrupted(*args):
        press()
        return evaluate(*args)

    monkeypatch.setattr(xpnet.training.loop, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, validation_data=(X, Y), **ARGUMENTS)
    assert len(model.history["val_loss"]) == 1


def test_ctrl_c_between_epochs_writes_a_checkpoint(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        net().fit(X, Y, callbacks=[callbacks.Checkpoint(path, every=99), PressAt("on_epoch_end", 2)], **ARGUMENTS)
    resumed, whole = net(), net()
    want = whole.fit(X, Y, **ARGUMENTS)
    assert resumed.fit(X, Y, resume_from=path, **ARGUMENTS) == want
    assert_same_state(resumed.state_dict(), whole.state_dict())


def test_a_second_ctrl_c_raises_at_once_and_callbacks_end():
    model, callback = net(), PressAt("on_step_end", 3, times=2)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, callbacks=[callback], on_interrupt="stop", **ARGUMENTS)
    assert callback.ended == 1 and model.history.stopped == "interrupted" and not model.context.guard.in_training
    assert model.fit(X, Y, verbose=0).stopped is None


def test_a_second_ctrl_c_while_callbacks_end_is_raised_after_them():
    ended = PressAt("on_step_end", 3)
    model = net()
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, callbacks=[ended, PressAt("on_train_end")], on_interrupt="stop", **ARGUMENTS)
    assert ended.ended == 1 and not model.context.guard.in_training


def test_a_loop_of_fits_and_a_grid_search_stop_at_the_first_ctrl_c():
    fits = []

    def fit_often():
        for _ in range(4):
            fits.append(net())
            fits[-1].fit(X, Y, callbacks=[PressAt("on_step_end", 3)], **ARGUMENTS)

    with pytest.raises(KeyboardInterrupt):
        fit_often()
    assert len(fits) == 1
    model_selection = pytest.importorskip("sklearn.model_selection", reason="scikit-learn is not installed")
    from xpnet import estimators

    class Counted(estimators.XPClassifier):
        fits = 0

        def fit(self, X, y):
            Counted.fits += 1
            threading.Timer(0.05, press).start()
            return super().fit(X, y)

    search = model_selection.GridSearchCV(
        Counted(max_iter=10**6, n_iter_no_change=10**6, backend="cpu"), {"alpha": [0.1, 0.2]}, cv=2
    )
    with pytest.raises(KeyboardInterrupt):
        search.fit(X, Y)
    assert Counted.fits == 1 and not hasattr(search, "best_score_")


def test_on_interrupt_is_checked():
    with pytest.raises(ArgumentError, match='on_interrupt must be "raise" or "stop", not'):
        net().fit(X, Y, on_interrupt="ignore", verbose=0)


def test_ctrl_c_during_a_prediction_raises_after_the_batch():
    class Pressing(layers.Layer):
        calls, pressing = 0, False

        def forward(self, x):
            self.calls += 1
            if self.pressing:
                press()
                self.calls += 100  # the pass goes on
            return x

        def backward(self, grad_y):
            return grad_y

    middle = Pressing()
    model = xpnet.Sequential([middle, layers.Dense(3)], (6,), "cpu")
    want = model.predict(X)
    for work in (
        lambda: model.predict(X, batch_size=50),
        lambda: model.evaluate(X, Y, "softmax_cross_entropy", batch_size=50),
        lambda: model.activations(X),
        lambda: model.forward(X),
        lambda: model.train_on_batch(X, Y, "softmax_cross_entropy", "sgd"),
    ):
        middle.pressing, middle.calls = True, 0
        with pytest.raises(KeyboardInterrupt):
            work()
        assert middle.calls == 101
        middle.pressing = False
    assert model._state.step == 1 and not np.array_equal(model.predict(X), want)


def test_ctrl_c_does_not_stop_a_fit_in_another_thread():
    result = []
    thread = threading.Thread(target=lambda: result.append(net().fit(X, Y, epochs=50, batch_size=5, verbose=0)))
    thread.start()
    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            press()
    thread.join()
    assert result[0].stopped is None and len(result[0]["loss"]) == 50


@pytest.mark.parametrize("raises", [False, True])
def test_a_handler_of_the_program_decides(raises):
    pressed = []

    def handler(number, frame):
        pressed.append(number)
        if raises:
            raise ZeroDivisionError

    signal.signal(signal.SIGINT, handler)
    model = net()
    try:
        if raises:
            with pytest.raises(ZeroDivisionError):
                model.fit(X, Y, callbacks=[PressAt("on_step_end", 3)], **ARGUMENTS)
        else:
            assert model.fit(X, Y, callbacks=[PressAt("on_step_end", 3)], **ARGUMENTS).stopped is None
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert pressed == [signal.SIGINT] and not model.context.guard.in_training
    assert model.fit(X, Y, verbose=0).stopped is None


def test_a_handler_that_a_callback_installs_stays():
    class Install(callbacks.Callback):
        def on_train_begin(self, model):
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    net().fit(X, Y, callbacks=[Install()], **ARGUMENTS)
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is signal.SIG_IGN


# The module itself ---------------------------------------------------------------------------------------------------


def test_sections_defer_ctrl_c_to_their_end():
    log = []

    def twice():
        press()
        log.append("first press")
        uninterrupted(section)
        log.append("not reached")

    def section():
        press()
        log.append("second press")

    with pytest.raises(KeyboardInterrupt):
        deferring(twice)
    assert log == ["first press", "second press"]


def test_ctrl_c_during_an_error_raises_keyboard_interrupt():
    def failing():
        press()
        raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt) as caught:
        deferring(failing)
    assert isinstance(caught.value.__context__, ZeroDivisionError)


# Anywhere ------------------------------------------------------------------------------------------------------------


class Trials:
    """Presses Ctrl-C once or twice at random moments, and checks the model after each time."""

    def __init__(self, seed):
        self.random, self.rng = random.Random(seed), np.random.default_rng(seed)
        image = (12, 12, 2)
        conv = [layers.Conv2D(8, 3), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2), layers.Flatten()]
        self.cases = []
        for stack, shape in (
            ([layers.Dense(5), layers.Tanh(), layers.Dense(10)], (7,)),
            ([layers.Dense(200), layers.ReLU(), layers.Dropout(0.2), layers.Dense(10)], (100,)),
            ([*conv, layers.Dense(10)], image),
        ):
            model = xpnet.Sequential(stack, shape, "cpu")
            x, y = self.rng.normal(size=(300, *shape)).astype("float32"), np.arange(300) % 10
            model.fit(x, y, "softmax_cross_entropy", verbose=0)
            began = time.perf_counter()
            for work in WORK.values():
                work(model, x, y)
            self.cases.append((model, x, y, (time.perf_counter() - began) / len(WORK)))
        self.blas = self.blas_threads()

    @staticmethod
    def blas_threads():
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]

    def run(self):
        model, x, y, seconds = self.random.choice(self.cases)
        name = self.random.choice(list(WORK))
        delays = [self.random.uniform(0, seconds)]
        if self.random.random() < 0.7:
            delays.append(self.random.choice([0, 1e-5, 1e-4, self.random.uniform(0, seconds / 5)]))
        self.interrupt(lambda: WORK[name](model, x, y), delays)
        threads, out = xpnet.get_backend("cpu").threads, []
        assert not model.context.guard.in_training, name
        assert self.blas_threads() == self.blas, name
        assert threads.region_workers is None, name
        values = model.context.store.values.copy()
        assert np.isfinite(values).all(), name
        other = threading.Thread(target=lambda: out.append(model.predict(x[:50])), daemon=True)
        other.start()
        other.join(60)
        assert out, f"{name}: the lock of the model is held"
        twin = xpnet.Sequential(
            [type(layer).from_config(layer.get_config()) for layer in model.layers], model.input_shape, "cpu"
        )
        twin.load_state_dict(model.state_dict())
        np.testing.assert_array_equal(out[0], twin.predict(x[:50]), err_msg=name)
        np.testing.assert_array_equal(model.context.store.values, values, err_msg=name)
        model.train_on_batch(x[:20], y[:20])

    @staticmethod
    def interrupt(work, delays):
        done = []

        def presses():
            for delay in delays:
                time.sleep(delay)
                press()
            done.append(True)

        def until_done():
            while not done:
                time.sleep(1e-4)
            time.sleep(2e-4)

        thread = threading.Thread(target=presses)
        try:
            try:
                try:
                    thread.start()
                    work()
                except KeyboardInterrupt:
                    until_done()
                until_done()
            except KeyboardInterrupt:
                until_done()
        except KeyboardInterrupt:  # there are two presses at most
            until_done()


WORK = {
    "fit": lambda model, x, y: model.fit(x, y, epochs=2, batch_size=32, verbose=0),
    "fit and validate": lambda model, x, y: model.fit(
        x,
        y,
        batch_size=32,
        validation_data=(x, y),
        callbacks=[callbacks.EarlyStopping()],
        on_interrupt="stop",
        verbose=0,
    ),
    "predict": lambda model, x, y: [model.predict(x, batch_size=32) for _ in range(3)],
    "evaluate": lambda model, x, y: [model.evaluate(x, y, batch_size=32) for _ in range(3)],
    "train_on_batch": lambda model, x, y: [model.train_on_batch(x[:64], y[:64]) for _ in range(8)],
    "by hand": lambda model, x, y: [
        (model.forward(x[:64], training=True), model.backward(np.ones((64, 10)))) for _ in range(8)
    ],
}


def run_trials(seed, count):
    """In a process of its own, with two BLAS threads."""
    code = f"import test_interrupts as t; trials = t.Trials({seed}); [trials.run() for _ in range({count})]"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent / "support"), str(Path(xpnet.__file__).parents[1])])
    env = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_ctrl_c_at_a_random_moment_leaves_everything_usable():
    run_trials(0, 40)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(1, 7))
def test_ctrl_c_at_many_random_moments_leaves_everything_usable(seed):
    run_trials(seed, 300)
