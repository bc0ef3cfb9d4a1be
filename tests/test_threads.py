"""Several threads with one model: predictions are exact, and what would disturb fit is refused."""

import copy
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from small_models import assert_same_state
from strict import StrictBackend

import xpnet
from xpnet import callbacks, layers, optimizers
from xpnet.concurrency import forks
from xpnet.errors import StateError

SIZES = (1, 3, 17, 64, 130, 33, 5, 90)


@pytest.fixture(autouse=True)
def frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Keeps(layers.Layer):
    """2 x. Keeps its input as an attribute and lets other threads run before it uses it."""

    def forward(self, x):
        self.x = x
        time.sleep(0)
        return self.x * 2.0

    def backward(self, grad_y):
        return grad_y * 2.0


def mlp(backend="cpu"):
    stack = [layers.Dense(64), layers.ReLU(), Keeps(), layers.LayerNorm(), layers.Dropout(0.3), layers.Dense(10)]
    return xpnet.Sequential(stack, (20,), backend)


def cnn(backend="cpu"):
    stack = [layers.Conv2D(8, 3), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2), layers.Flatten()]
    return xpnet.Sequential([*stack, layers.Dense(10)], (12, 12, 2), backend)


NETS = pytest.mark.parametrize("make", [mlp, cnn])


def data(model, rows, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, *model.input_shape)).astype("float32"), np.arange(rows) % 10


def in_threads(work, count=8):
    """[work(0), work(1), …], each in a thread of its own."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


# Predictions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", pytest.param(StrictBackend(), id="strict")])
@NETS
def test_predictions_and_evaluations_from_several_threads_are_exact(make, backend):
    model = make(backend)
    samples = [data(model, rows, rows) for rows in SIZES]
    outputs = [model.predict(x) for x, _ in samples]
    outputs_50 = [model.predict(x, batch_size=50) for x, _ in samples]
    hidden = [model.activations(x)["1"] for x, _ in samples]
    scores = [model.evaluate(x, y, "softmax_cross_entropy", batch_size=50) for x, y in samples]

    def work(thread):
        wrong = 0
        for i in range(24 if backend == "cpu" else 4):
            k = (thread + i) % len(samples)
            x, y = samples[k]
            wrong += not np.array_equal(model.predict(x), outputs[k])
            wrong += not np.array_equal(model.predict(x, batch_size=50), outputs_50[k])
            wrong += not np.array_equal(model.activations(x)["1"], hidden[k])
            wrong += model.evaluate(x, y, "softmax_cross_entropy", batch_size=50) != scores[k]
        return wrong

    assert in_threads(work) == [0] * 8


def test_an_estimator_predicts_from_several_threads():
    estimators = pytest.importorskip("xpnet.estimators", reason="scikit-learn is not installed")
    x, y = data(mlp(), 300)
    classifier = estimators.XPClassifier((32,), max_iter=300, tol=1.0, backend="cpu", random_state=0).fit(x, y)
    parts = [x[:n] for n in (300, 7, 120, 64)]
    want = [classifier.predict_proba(part) for part in parts]

    def work(thread):
        return sum(not np.array_equal(classifier.predict_proba(parts[i % 4]), want[i % 4]) for i in range(thread, 60))

    assert in_threads(work, 4) == [0] * 4


def test_several_threads_generate_with_one_model():
    stack = [layers.Embedding(12, 8), layers.TransformerBlock(2), layers.Dense(12)]
    model = xpnet.Sequential(stack, (None,), "cpu")
    prompts = [np.random.default_rng(n).integers(0, 12, size=(n, 4)) for n in (1, 2, 5, 3)]
    want = [xpnet.generate(model, prompt, 6) for prompt in prompts]

    def work(thread):
        return sum(not np.array_equal(xpnet.generate(model, prompts[i % 4], 6), want[i % 4]) for i in range(thread, 20))

    assert in_threads(work) == [0] * 8


@NETS
def test_several_threads_may_build_a_model_by_their_first_prediction(make):
    built = make()
    x, _ = data(built, 9)
    want = built.predict(x)
    for _ in range(5):
        model = xpnet.Sequential(copy.deepcopy(list(unbuilt(make).layers)), backend="cpu")
        for got in in_threads(lambda _, model=model: model.predict(x)):
            np.testing.assert_array_equal(got, want)


def unbuilt(make):
    model = make()
    model.unplace()
    return model


def test_a_model_that_another_thread_uses_stays_built_if_the_data_of_the_first_is_refused():
    model, x = xpnet.Sequential([layers.Dense(3)], backend="cpu"), np.ones((4, 5))
    used = []

    class Loss(xpnet.losses.MeanSquaredError):
        def check_targets(self, backend, targets, outputs_shape):
            thread = threading.Thread(target=lambda: used.append(model.predict(x)))
            thread.start()
            thread.join()
            raise xpnet.errors.DataError("refused")

    with pytest.raises(xpnet.errors.DataError, match="refused"):
        model.fit(x, np.ones((4, 3)), Loss(), verbose=0)
    np.testing.assert_array_equal(model.predict(x), used[0])
    lazy = xpnet.Sequential([layers.Dense(3)], backend="cpu")  # which no other thread uses
    with pytest.raises(xpnet.errors.DataError):
        lazy.fit(np.full((4, 5), np.nan), np.ones((4, 3)), "mse", verbose=0)
    assert not lazy.is_built


# Beside fit ----------------------------------------------------------------------------------------------------------


class Beside(callbacks.Callback):
    """Runs `work` again and again in other threads while fit runs."""

    def __init__(self, work, threads=3):
        self.stopped, self.results, self.errors = threading.Event(), [], []

        def loop():
            try:
                while not self.stopped.is_set():
                    self.results.append(work())
            except Exception as error:
                self.errors.append(error)

        self.threads = [threading.Thread(target=loop) for _ in range(threads)]

    def on_train_begin(self, model):
        for thread in self.threads:
            thread.start()

    def on_train_end(self, model):
        self.stopped.set()
        for thread in self.threads:
            thread.join()


class Outputs(callbacks.Callback):
    def __init__(self, x):
        self.x, self.seen = x, []

    def on_train_begin(self, model):
        self.seen.append(model.predict(self.x))

    def on_step_end(self, model, step):
        self.seen.append(model.predict(self.x))


@NETS
def test_predictions_beside_fit_see_whole_steps_and_do_not_disturb_it(make):
    alone, beside = make(), make()
    (x, y), (few, labels) = data(alone, 300), data(alone, 17, 1)
    arguments = {"epochs": 3, "batch_size": 32, "validation_data": (x, y), "verbose": 0}
    steps = Outputs(few)
    want = alone.fit(x, y, callbacks=[steps], **arguments)
    other = Beside(lambda: (beside.predict(few), beside.evaluate(few, labels, "softmax_cross_entropy", []))[0])
    assert beside.fit(x, y, callbacks=[other], **arguments) == want
    assert not other.errors and len(other.results) > 10
    assert all(any(np.array_equal(got, seen) for seen in steps.seen) for got in other.results)
    assert_same_state(beside.state_dict(), alone.state_dict())


def test_waiting_threads_get_their_turn_between_steps():
    model = mlp()
    x, y = data(model, 20000)
    other = Beside(lambda: model.predict(x[:1]), threads=1)
    model.fit(x, y, batch_size=5000, epochs=10, callbacks=[other], verbose=0)  # 40 steps
    assert len(other.results) >= 20


DISTURBING = {
    "fit": lambda model, x, y: model.fit(x, y, verbose=0),
    "train_on_batch": lambda model, x, y: model.train_on_batch(x, y, "softmax_cross_entropy", "adam"),
    "to": lambda model, x, y: model.to("cpu", "float64"),
    "load_state_dict": lambda model, x, y: model.load_state_dict(model.state_dict()),
    "forward": lambda model, x, y: model.forward(x, training=True),
    "backward": lambda model, x, y: (model.forward(x), model.backward(np.ones((len(x), 10)))),
    "value": lambda model, x, y: setattr(model.parameters[0], "value", 0.0),
    "grad": lambda model, x, y: setattr(model.parameters[0], "grad", 0.0),
    "unplace": lambda model, x, y: model.unplace(),
}


@pytest.mark.parametrize("name", DISTURBING)
def test_what_would_disturb_fit_in_another_thread_is_refused(name):
    alone, model = mlp(), mlp()
    x, y = data(alone, 100)
    want = alone.fit(x, y, epochs=2, verbose=0)
    refused = []

    class Disturb(callbacks.Callback):
        def on_step_end(self, model, step):
            def disturb():
                with pytest.raises(StateError, match="fit is running on this model in another thread.*copy") as caught:
                    DISTURBING[name](model, x, y)
                refused.append(caught.value)

            thread = threading.Thread(target=disturb)
            thread.start()
            thread.join()

    assert model.fit(x, y, epochs=2, callbacks=[Disturb()], verbose=0) == want
    assert len(refused) == 2
    assert_same_state(model.state_dict(), alone.state_dict())
    if name != "unplace":
        DISTURBING[name](model, x, y)  # allowed now


def test_two_threads_that_fit_one_model_train_once():
    x, y = data(mlp(), 200)
    want = mlp()
    want.fit(x, y, epochs=3, verbose=0)
    for _ in range(5):
        model, refused = xpnet.Sequential(copy.deepcopy(list(unbuilt(mlp).layers)), backend="cpu"), []

        def fit(_, model=model, refused=refused):
            try:
                model.fit(x, y, epochs=3, verbose=0)
            except StateError as error:
                refused.append(error)

        in_threads(fit, 4)
        trained = 4 - len(refused)
        assert trained >= 1 and model._state.epoch == 3 * trained and not model.context.guard.in_training
        if trained == 1:
            assert_same_state(model.state_dict(), want.state_dict())


def test_batches_of_several_threads_train_one_after_the_other():
    model = mlp()
    x, y = data(model, 64)
    in_threads(lambda _: [model.train_on_batch(x, y, "softmax_cross_entropy", "adam") for _ in range(5)], 4)
    want = mlp()
    for _ in range(20):
        want.train_on_batch(x, y, "softmax_cross_entropy", "adam")
    assert_same_state(model.state_dict(), want.state_dict())


def test_different_models_train_in_different_threads_with_one_optimizer():
    optimizer = optimizers.Adam(0.01)
    x, y = data(mlp(), 200)

    def fit(_):
        model = mlp()
        return dict(model.fit(x, y, optimizer=optimizer, epochs=3, verbose=0)), model.state_dict()

    want, state = fit(0)
    for got, trained in in_threads(fit, 4):
        assert got == want
        assert_same_state(trained, state)


def test_a_callback_serves_one_running_fit():
    stopper, model, other = callbacks.EarlyStopping("loss"), mlp(), mlp()
    x, y = data(model, 50)

    class Inner(callbacks.Callback):
        def on_epoch_begin(self, model, epoch):
            with pytest.raises(StateError, match="this EarlyStopping is in use by another fit that is running"):
                other.fit(x, y, callbacks=[stopper], verbose=0)

    model.fit(x, y, callbacks=[Inner(), stopper], epochs=2, verbose=0)
    assert stopper.best_epoch is not None
    other.fit(x, y, callbacks=[stopper], verbose=0)


def test_a_copy_made_beside_fit_has_the_weights_of_one_step():
    model = mlp()
    x, y = data(model, 300)
    few = x[:17]
    steps, other = Outputs(few), Beside(lambda: copy.deepcopy(model).predict(few))
    model.fit(x, y, epochs=3, batch_size=32, callbacks=[steps, other], verbose=0)
    assert not other.errors and other.results
    seen = [*steps.seen, model.predict(few)]
    assert all(any(np.array_equal(got, one) for one in seen) for got in other.results)


def test_a_copy_has_a_lock_of_its_own():
    model = mlp()
    x, _ = data(model, 5)
    with model.context.guard.lock:
        for twin in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(xpnet.Sequential([layers.Dense(3)], (20,), "cpu"))),
        ):
            assert twin.context.guard.lock is not model.context.guard.lock
            assert twin.parameters[0]._guard is twin.context.guard
            assert len(in_threads(lambda _, twin=twin: twin.predict(x), 2)) == 2


# Forks ---------------------------------------------------------------------------------------------------------------

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def in_child(work):
    """What a child process, which is a fork of this one, returns for the exit status work()."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of threads beside a fork
        child = os.fork()
    if not child:
        try:
            os._exit(work())
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(99)
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "it hangs"


@FORKS
@NETS
def test_a_child_forked_beside_fit_predicts_and_trains(make):
    alone, model, training, stop = make(), make(), threading.Event(), threading.Event()
    (x, y), (few, labels) = data(alone, 300), data(alone, 17, 1)
    steps, used = Outputs(few), callbacks.EarlyStopping("loss")
    alone.fit(x, y, epochs=3, batch_size=32, callbacks=[steps], verbose=0)

    class Slow(callbacks.Callback):
        def on_step_end(self, model, step):
            training.set()
            stop.wait(0.02)

    thread = threading.Thread(
        target=lambda: model.fit(x, y, epochs=3, batch_size=32, callbacks=[used, Slow()], verbose=0)
    )
    thread.start()
    training.wait()

    def child():
        predicted = model.predict(few)
        if not any(np.array_equal(predicted, seen) for seen in steps.seen):
            return 1
        model.train_on_batch(few, labels)
        model.fit(few, labels, callbacks=[used], verbose=0)
        return 0

    for _ in range(8):
        assert in_child(child) == 0
    stop.set()
    thread.join()
    assert_same_state(model.state_dict(), alone.state_dict())


@FORKS
def test_a_fork_in_a_callback_and_one_beside_a_waiting_thread_work(monkeypatch):
    monkeypatch.setattr(forks, "_PATIENCE", 0.2)
    model, codes = mlp(), []
    x, y = data(model, 64)

    class Fork(callbacks.Callback):
        def on_step_end(self, model, step):
            codes.append(in_child(lambda: int(not np.isfinite(model.predict(x)).all())))

    model.fit(x, y, callbacks=[Fork()], verbose=0)
    assert codes == [0]
    held, let_go = threading.Event(), threading.Event()

    class Waits(xpnet.losses.MeanSquaredError):
        def samples(self, backend, outputs, targets):
            held.set()
            let_go.wait()
            return super().samples(backend, outputs, targets)

    other = mlp()
    thread = threading.Thread(target=lambda: other.evaluate(x, np.ones((64, 10)), Waits(), metrics=[]))
    thread.start()
    held.wait()
    assert in_child(lambda: int(not np.isfinite(other.predict(x)).all())) == 0  # though it could not wait for the lock
    let_go.set()
    thread.join()
    assert np.isfinite(other.predict(x)).all()


# Forward and backward ------------------------------------------------------------------------------------------------


def test_backward_belongs_to_the_thread_that_called_forward():
    model = mlp()
    x, _ = data(model, 8)
    model.forward(x)
    in_threads(lambda _: model.predict(x), 2)  # does not disturb it
    model.backward(np.ones((8, 10)))
    thread = threading.Thread(target=lambda: model.forward(2 * x))
    model.forward(x)
    thread.start()
    thread.join()
    with pytest.raises(StateError, match="another thread has called forward since"):
        model.backward(np.ones((8, 10)))


def test_a_step_between_forward_and_backward_is_noticed():
    class AcrossSteps(callbacks.Callback):
        def on_step_end(self, model, step):
            if step > 1:
                with pytest.raises(StateError, match="needs a forward pass before it"):
                    model.backward(np.ones((8, 10)))
            model.forward(x[:8])

    model = mlp()
    x, y = data(model, 100)
    model.fit(x, y, batch_size=32, callbacks=[AcrossSteps()], verbose=0)


def test_a_layer_outside_a_model_returns_new_arrays(backend):
    layer, x = layers.Dense(3), backend.asarray(np.ones((4, 5), np.float32))
    layer.build((5,), backend=backend)
    first, grad = layer.forward(x), layer.backward(backend.asarray(np.ones((4, 3), np.float32)))
    kept, kept_grad = backend.to_numpy(first).copy(), backend.to_numpy(grad).copy()
    layer.forward(2.0 * x)
    layer.backward(backend.asarray(np.full((4, 3), 5, np.float32)))
    np.testing.assert_array_equal(backend.to_numpy(first), kept)
    np.testing.assert_array_equal(backend.to_numpy(grad), kept_grad)


def test_several_threads_use_a_layer_outside_a_model():
    layer = layers.Conv2D(4, 3)
    layer.build((9, 9, 2), backend="cpu")
    inputs = [np.random.default_rng(n).normal(size=(n, 9, 9, 2)).astype("float32") for n in SIZES]
    want = [layer.forward(x) for x in inputs]

    def work(thread):
        return sum(not np.array_equal(layer.forward(inputs[i % 8]), want[i % 8]) for i in range(thread, 40))

    assert in_threads(work) == [0] * 8
