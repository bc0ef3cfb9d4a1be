"""Replayed predictions and evaluations: the same bits as eager ones, whatever happens to the model in between."""

import copy
import gc
import logging
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import every
import numpy as np
import pytest
from captured_trainings import IMAGES, X, Y, cnn, emulated_cupy, mlp

import xpnet
from xpnet import augment, callbacks, layers, losses
from xpnet.training import captured_inference
from xpnet.training.captured_inference import CapturedInference

EAGER = 2  # passes of a kind before it is captured
LOSS = "softmax_cross_entropy"


#: The devices that capture passes.
DEVICES = pytest.mark.parametrize(
    "backend", ["cpu", "emulated", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True
)


@pytest.fixture(autouse=True)
def early_captures(monkeypatch):
    monkeypatch.setattr(captured_inference, "_EAGER_ON_CPU", EAGER)
    monkeypatch.setattr(captured_inference, "_EAGER_ON_GPU", EAGER)


@pytest.fixture
def eager(monkeypatch):
    """Calls a function while nothing is captured or replayed."""

    def call(work):
        with monkeypatch.context() as patch:
            patch.setattr(CapturedInference, "replayed", lambda self, work, batch: None)
            return work()

    return call


def captured(model):
    """The captured passes that are in use."""
    kinds = model._inference._kinds
    return [kind.captured for kind in kinds if kind.captured is not None and kind.captured._verified]


def predict_often(model, x, **options):
    """The last of so many predictions that later ones are replayed."""
    for _ in range(EAGER + 3):
        outputs = model.predict(x, **options)
    return outputs


def evaluate_often(model, x=X, y=Y, loss=LOSS, metrics="accuracy", batch_size=20, **options):
    """The last of two evaluations, each of many batches."""
    for _ in range(2):
        result = model.evaluate(x, y, loss, metrics, batch_size, **options)
    return result


# Replays and eager passes --------------------------------------------------------------------------------------------


@DEVICES
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize(
    ("shape", "layer"), every.LAYERS, ids=[f"{i} {type(layer).__name__}" for i, (_, layer) in enumerate(every.LAYERS)]
)
def test_replayed_predictions_of_every_layer_are_those_of_eager_ones(backend, eager, rng, shape, layer, rows):
    model = xpnet.Sequential([copy.deepcopy(layer)], shape, backend)
    integers = bool(model.accepts_integers)
    samples = [rng.integers(0, 9, (rows, *shape)) if integers else rng.normal(size=(rows, *shape)) for _ in range(3)]
    predict_often(model, samples[0])
    (used,) = captured(model)
    for x in samples:
        np.testing.assert_array_equal(model.predict(x), eager(lambda x=x: model.predict(x)))
    assert captured(model) == [used]


@DEVICES
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("make", "x"), [(mlp, X), (cnn, IMAGES)], ids=["mlp", "cnn"])
def test_replays_use_the_weights_and_statistics_of_the_moment(backend, eager, make, x, dtype):
    model = make(backend, dtype)
    predict_often(model, x[:7])
    used = captured(model)
    changes = [
        lambda: model.fit(x, Y, batch_size=50, verbose=0),
        lambda: model.train_on_batch(x[:9], Y[:9]),
        lambda: model.load_state_dict({name: a * 1.5 for name, a in model.state_dict().items()}),
        lambda: setattr(model.parameters[-1], "value", np.arange(10)),
    ]
    for change in changes:
        before = model.predict(x[:7])
        change()
        after = model.predict(x[:7])
        assert not np.array_equal(before, after)
        np.testing.assert_array_equal(after, eager(lambda: model.predict(x[:7])))
        np.testing.assert_array_equal(model.predict_proba(x[:7]), eager(lambda: model.predict_proba(x[:7])))
    assert captured(model) == used


@DEVICES
def test_replays_take_all_inputs_that_predictions_take(backend, eager):
    model = xpnet.Sequential([layers.Rescale(1 / 16), layers.Dense(3)], (64,), backend)
    given = [(16 * X[:5]).astype(kind) for kind in ("uint8", "int64", "float32", "float64")]
    given += [np.asfortranarray(X[:5]), X[:10:2], X[:5].tolist()]
    for x in given:
        np.testing.assert_array_equal(predict_often(model, x), eager(lambda x=x: model.predict(x)))
        got = backend.to_numpy(model.predict(backend.asarray(x), as_device=True))
        np.testing.assert_array_equal(got, eager(lambda x=x: model.predict(x)))


@DEVICES
def test_outputs_on_the_device_are_arrays_of_their_own(backend):
    model = mlp(backend)
    first, second = (predict_often(model, x, as_device=True) for x in (X[:20], X[20:40]))
    kept = backend.to_numpy(first).copy()
    second += 1.0
    model.predict(X[40:60])
    np.testing.assert_array_equal(backend.to_numpy(first), kept)


EVALUATIONS = {
    "accuracy": {},
    "several metrics": {"metrics": ["accuracy", "f1", "top_k_accuracy", "log_loss", "cohen_kappa", "confusion_matrix"]},
    "no metrics": {"metrics": []},
    "sample weights": {"metrics": ["f1", "log_loss"], "sample_weight": np.linspace(0, 2, 203)},
    "probabilities": {"y": np.eye(10)[Y]},
    "squares": {"y": np.eye(10)[Y], "loss": "mse", "metrics": ["mae", "r2"]},
    "a loss that sums": {"y": np.eye(10)[Y], "loss": losses.HalfSquaredError("sum"), "metrics": []},
    "a metric that collects": {"y": Y == 3, "loss": "binary_cross_entropy", "metrics": ["auc", "accuracy"], "units": 1},
}


@pytest.mark.parametrize("options", EVALUATIONS.values(), ids=EVALUATIONS.keys())
def test_replayed_evaluations_are_those_of_eager_ones(gpu, eager, options):
    options = dict(options)
    model = xpnet.Sequential(
        [layers.Dense(24, l2=1e-3), layers.ReLU(), layers.Dense(options.pop("units", 10))], (64,), gpu
    )
    got = evaluate_often(model, **options)
    assert len(captured(model)) == 1
    want = eager(lambda: evaluate_often(model, **options))
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)


def test_validation_is_replayed_and_a_history_does_not_depend_on_it(gpu, eager):
    def history(model):
        return model.fit(
            X, Y, epochs=3, batch_size=50, validation_data=(np.tile(X, (16, 1)), np.tile(Y, 16)), verbose=0
        )

    model = cnn_of_vectors(gpu)
    got = history(model)
    assert len(captured(model)) == 1
    assert dict(got) == dict(eager(lambda: history(cnn_of_vectors(gpu))))


def cnn_of_vectors(backend):
    stack = [layers.Reshape((8, 8, 1)), layers.Conv2D(4, 3), layers.BatchNorm(), layers.ReLU(), layers.Flatten()]
    return xpnet.Sequential([*stack, layers.Dense(10)], (64,), backend, seed=3)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_replays_in_mixed_precision(gpu, eager, precision):
    model = mlp(gpu, precision=precision)
    got = predict_often(model, X[:20])
    assert len(captured(model)) == 1
    np.testing.assert_array_equal(got, eager(lambda: model.predict(X[:20])))


def test_a_replay_is_one_launch_of_a_graph(gpu):
    cupy, model = emulated_cupy(gpu), mlp(gpu)
    predict_often(model, X[:20])
    before = len(cupy.launches)
    model.predict(X[20:40])
    assert cupy.launches[before:] == ["graph"]


# When a capture is used ----------------------------------------------------------------------------------------------


@DEVICES
def test_only_kinds_of_passes_that_recur_are_captured(backend):
    model = mlp(backend)
    for rows in range(1, 9):
        for _ in range(EAGER):
            model.predict(X[:rows])
    assert all(kind.captured is None for kind in model._inference._kinds)
    predict_often(model, X[:8])
    predict_often(model, X[:7])
    assert [used._results[0].shape for used in captured(model)] == [(7, 10), (8, 10)]


def test_large_passes_and_evaluations_on_the_cpu_are_eager():
    model = mlp("cpu")
    predict_often(model, np.zeros((300, 64), "float32"))
    evaluate_often(model)
    assert captured(model) == []


@DEVICES
def test_the_environment_turns_captures_off(backend, monkeypatch):
    model = mlp(backend)
    monkeypatch.setenv("XPNET_CAPTURE", "0")
    predict_often(model, X[:20])
    evaluate_often(model)
    assert captured(model) == []


@DEVICES
@pytest.mark.parametrize("thing", ["slope", "epsilon", "smoothing"])
def test_a_change_of_an_attribute_is_noticed(backend, eager, thing):
    stack = [layers.Dense(24), layers.LeakyReLU(0.1), layers.BatchNorm(), layers.Dense(10)]
    model, loss = xpnet.Sequential(stack, (64,), backend), losses.SoftmaxCrossEntropy()

    def change():
        if thing == "slope":
            model.layers[1].negative_slope = 0.4
        elif thing == "epsilon":
            model.layers[2].epsilon = 0.5
        else:
            loss.label_smoothing = 0.3

    def results():
        return predict_often(model, X[:20]), evaluate_often(model, loss=loss)

    before, _ = results(), change()
    got = results()
    assert captured(model)
    want = eager(results)
    np.testing.assert_array_equal(got[0], want[0])
    assert got[1] == want[1] != before[1]


def test_another_number_of_workers_is_noticed(eager, monkeypatch):
    model = cnn("cpu")
    predict_often(model, IMAGES[:20])
    (used,) = captured(model)
    monkeypatch.setattr(type(model.backend), "workers", 3)
    np.testing.assert_array_equal(predict_often(model, IMAGES[:20]), eager(lambda: model.predict(IMAGES[:20])))
    assert len(captured(model)) == 1 and captured(model) != [used]


@DEVICES
def test_attributes_that_keep_changing_make_predictions_eager(backend, eager):
    model = xpnet.Sequential([layers.Dense(24), layers.LeakyReLU()], (64,), backend)
    for i in range(captured_inference._MAX_UNPAID + 1):
        model.layers[1].negative_slope = 0.1 * i
        predict_often(model, X[:20])
        assert len(captured(model)) == 1
    model.layers[1].negative_slope = 0.9
    np.testing.assert_array_equal(predict_often(model, X[:20]), eager(lambda: model.predict(X[:20])))
    assert captured(model) == []


@DEVICES
def test_a_replay_that_differs_is_not_used(backend, eager, monkeypatch, caplog):
    model = mlp(backend)
    monkeypatch.setattr(captured_inference, "same_bits", lambda a, b: False)
    with caplog.at_level(logging.INFO, logger="xpnet"):
        got = [predict_often(model, X[:rows]) for rows in (20, 19)]
    assert captured(model) == []
    for y, rows in zip(got, (20, 19), strict=True):
        np.testing.assert_array_equal(y, eager(lambda rows=rows: model.predict(X[:rows])))
    assert [r.message for r in caplog.records].count(
        "predictions or evaluations are not captured and run eagerly, which is slower: "
        "the replay and the eager pass differ"
    ) == 1


# Code of the user ----------------------------------------------------------------------------------------------------


class Counts(layers.Layer):
    """Multiplies by the number of its passes so far, and decides by a value of its input."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * float(self.calls) if float(x[0, 0]) > 0 else -x

    def backward(self, grad_y):
        return grad_y


@DEVICES
def test_a_custom_layer_runs_in_each_pass(backend):
    model = xpnet.Sequential([layers.Dense(3, bias_initializer=9.0), Counts()], (64,), backend)
    first = model.predict(X[:20])
    for passes in range(2, 9):
        np.testing.assert_allclose(model.predict(X[:20]), passes * first, rtol=1e-6)
    assert captured(model) == []


@DEVICES
def test_a_method_that_replaces_one_of_a_layer_runs_in_each_pass(backend):
    model, calls = mlp(backend), []
    forward = model.layers[0].forward
    predict_often(model, X[:20])
    model.layers[0].forward = lambda x: (calls.append(len(x)), forward(x))[1]
    predict_often(model, X[:20])
    assert calls == [20] * (EAGER + 3)


def test_a_custom_metric_leaves_predictions_captured(gpu):
    class Own(xpnet.metrics.Accuracy):
        def sums(self, *args):
            seen.append(self)
            return super().sums(*args)

    model, seen = mlp(gpu), []
    evaluate_often(model, metrics=[Own()])
    assert len(seen) == 22 and captured(model) == []
    predict_often(model, X[:20])
    assert len(captured(model)) == 1


@DEVICES
def test_noise_and_distortions_stay_off(backend, eager):
    stack = [
        augment.RandomFlip(),
        augment.MixUp(),
        layers.Flatten(),
        layers.Dense(24),
        layers.Dropout(0.5),
        layers.Dense(10),
    ]
    model = xpnet.Sequential(stack, (8, 8, 1), backend)
    for _ in range(3):
        model.fit(IMAGES, Y, batch_size=50, verbose=0)
        got = predict_often(model, IMAGES[:20])
        np.testing.assert_array_equal(got, eager(lambda: model.predict(IMAGES[:20])))
    assert len(captured(model)) == 1


# Copies, moves and memory --------------------------------------------------------------------------------------------


@DEVICES
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_captures_of_its_own(backend, copied):
    model = mlp(backend)
    want = predict_often(model, X[:20])
    twin = copied(model)
    assert captured(twin) == []
    model.parameters[0].value = 0.0
    np.testing.assert_array_equal(predict_often(twin, X[:20]), want)
    assert not np.array_equal(model.predict(X[:20]), want)


@DEVICES
def test_a_model_that_moves_is_captured_anew(backend, eager):
    model = mlp(backend)
    for dtype in ("float32", "float64", "float32"):
        model.to(backend, dtype)
        assert captured(model) == []
        got = predict_often(model, X[:20])
        assert len(captured(model)) == 1 and got.dtype == dtype
        np.testing.assert_array_equal(got, eager(lambda: model.predict(X[:20])))
    used = weakref.ref(captured(model)[0])
    model.to("cpu", "float64")
    assert used() is None
    model.predict(X[:20])


def test_the_memory_of_graphs_is_counted_and_freed(gpu):
    model = mlp(gpu)
    model.predict(X)
    before = gpu.memory().used
    graph = graph_of(model)
    assert graph() in gpu.graphs and gpu.memory().used >= before + X[:100].nbytes
    gc.disable()
    try:
        model.evaluate(X, Y, LOSS, batch_size=None)  # frees the buffers of inference
        assert graph() is None
        graph = graph_of(model)
        del model
        assert graph() is None
    finally:
        gc.enable()


def graph_of(model):
    """A weak reference to the graph of a prediction."""
    predict_often(model, X[:100])
    return weakref.ref(captured(model)[0]._graph)


def test_the_graph_that_was_used_least_recently_is_dropped(gpu):
    model = mlp(gpu)
    graph = graph_of(model)
    for rows in range(1, captured_inference._MAX_KINDS + 3):
        predict_often(model, X[:rows])
        predict_often(model, X[:1])
    assert graph() is None
    assert {used._results[0].shape[0] for used in captured(model)} == {1, 4, 5, 6, 7, 8, 9, 10}


def test_buffers_that_grow_leave_graphs_intact(gpu, eager):
    model = mlp(gpu)
    predict_often(model, X[:20])
    model.predict(X)
    model.fit(X, Y, batch_size=None, verbose=0)
    gpu.free_memory()
    np.testing.assert_array_equal(model.predict(X[:20]), eager(lambda: model.predict(X[:20])))


# Threads -------------------------------------------------------------------------------------------------------------


@DEVICES
def test_threads_share_the_captures_of_a_model(backend, eager):
    models = [mlp(backend), cnn_of_vectors(backend)]
    sizes = (1, 20, 33)

    def results(model):
        return [model.predict(X[:n]) for n in sizes], model.evaluate(X, Y, LOSS, batch_size=50)

    want = [eager(lambda model=model: results(model)) for model in models]

    def work(thread):
        model, (outputs, scores) = models[thread % 2], want[thread % 2]
        for _ in range(6):
            got, got_scores = results(model)
            assert all(map(np.array_equal, got, outputs)) and got_scores == scores

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert all(map(captured, models))


def test_a_graph_outlives_the_thread_that_captured_it(gpu, eager):
    model = cnn_of_vectors(gpu)
    thread = threading.Thread(target=predict_often, args=(model, X[:20]))
    thread.start()
    thread.join()
    del thread
    gc.collect()
    gpu.free_memory()
    assert len(captured(model)) == 1
    np.testing.assert_array_equal(model.predict(X[:20]), eager(lambda: model.predict(X[:20])))


@DEVICES
def test_predictions_and_evaluations_by_callbacks_do_not_disturb_fit(backend, eager):
    class Look(callbacks.Callback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, model, step):
            self.seen.append((model.predict(X[:20]).tolist(), model.evaluate(X[:60], Y[:60], LOSS, batch_size=20)))

    def run():
        model, look = cnn_of_vectors(backend), Look()
        history = model.fit(X, Y, epochs=2, batch_size=20, callbacks=[look], verbose=0)
        return model, (dict(history), look.seen)

    (model, got), (_, want) = run(), eager(run)
    assert got == want and captured(model)


def test_predictions_beside_fit_are_replayed_between_its_steps(gpu):
    model, other = mlp(gpu), mlp(gpu)
    want = other.fit(X, Y, epochs=3, batch_size=20, verbose=0)
    predict_often(model, X[:20])
    stop, seen = threading.Event(), []

    def predict():
        while not stop.is_set():
            seen.append(model.predict(X[:20]))

    class Beside(callbacks.Callback):
        def on_train_begin(self, model):
            thread.start()

        def on_train_end(self, model):
            stop.set()
            thread.join()

    thread = threading.Thread(target=predict)
    assert dict(model.fit(X, Y, epochs=3, batch_size=20, callbacks=[Beside()], verbose=0)) == dict(want)
    assert len(seen) > 3 and len(captured(model)) == 1
    np.testing.assert_array_equal(model.predict(X[:20]), other.predict(X[:20]))
