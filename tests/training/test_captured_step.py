"""Steps captured as CUDA graphs: a replay equals the eager step, and steps that cannot be captured run eagerly.

The tests run on the emulated GPU, which refuses what a real capture refuses, and on a real GPU if there is one.
"""

import copy
import gc
import logging
import re
import threading

import every
import numpy as np
import pytest
from captured_trainings import BATCH, IMAGES, STEPS, X, Y, cnn, emulated_cupy, fit, mlp
from fake_cupy import OutOfMemoryError

import xpnet
from xpnet import callbacks, datasets, errors, layers, losses, metrics, optimizers, schedules
from xpnet.capture import branches
from xpnet.capture.trace import Trace
from xpnet.data.dataset import Dataset
from xpnet.training import captured_step, epoch_metrics
from xpnet.training.attributes import Attributes
from xpnet.training.captured_step import StepExecutor
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.graph_step import GraphStep


@pytest.fixture
def both(gpu, monkeypatch):
    """Train the same model with captured and with eager steps. Returns (state, history, watch, model) of each."""

    def run(build=mlp, x=X, y=Y, more=lambda: (), **options):
        results = []
        for graphs in ("1", "0"):
            monkeypatch.setenv("XPNET_CAPTURE", graphs)
            model = build(gpu)
            history, watch = fit(model, x, y, more(), **copy.deepcopy(options))
            results.append((model.state_dict(), dict(history), watch, model))
        return results

    return run


def same(results, rtol=1e-4):
    """Assert that both results are equal up to rounding: fused kernels sum in another order."""
    (state, history, _, _), (want, want_history, _, _) = results
    for name, value in want.items():
        np.testing.assert_allclose(state[name], value, rtol=rtol, atol=rtol, err_msg=name)
    for name, values in want_history.items():
        np.testing.assert_allclose(history[name], values, rtol=rtol, err_msg=name)


# Replays and eager steps ---------------------------------------------------------------------------------------------

KINDS = {
    "defaults": {},
    "momentum": {"optimizer": optimizers.SGD(0.05, momentum=0.9, nesterov=True)},
    "adagrad": {"optimizer": "adagrad"},
    "rmsprop, clipped": {"optimizer": optimizers.RMSprop(0.01, clip_norm=0.5)},
    "adamw and a schedule": {"optimizer": optimizers.AdamW(schedules.OneCycle(0.02, steps=33), weight_decay=0.1)},
    "muon": {"optimizer": optimizers.Muon(0.02, matrices=["*.weight"], weight_decay=0.1)},
    "rates by parameter": {"optimizer": optimizers.AdamW(0.01, parameter_rates={"*.bias": 3.0, "0.*": 0.5})},
    "in order": {"shuffle": False},
    "accumulated": {"accumulate": 3},
    "sample weights": {"sample_weight": np.linspace(0.1, 2, 203)},
    "weighted metrics": {"metrics": ["f1", "log_loss", "cohen_kappa"], "sample_weight": np.linspace(0.1, 2, 203)},
    "class weights": {"class_weight": {3: 5.0}},
    "smoothed": {"loss": losses.SoftmaxCrossEntropy(label_smoothing=0.1)},
    "probabilities": {"y": np.eye(10)[Y]},
    "squares": {"y": np.eye(10)[Y], "loss": "mse", "metrics": ["mae", "r2"]},
    "divergences": {"y": (np.eye(10)[Y] + 0.1) / 2, "loss": "kl_divergence"},
    "directions": {"y": np.eye(10)[Y], "loss": "cosine_similarity"},
    "a loss that sums": {"y": np.eye(10)[Y], "loss": losses.HalfSquaredError("sum"), "optimizer": optimizers.SGD(1e-3)},
    "many metrics": {"metrics": ["accuracy", "f1", "top_k_accuracy", "precision", "log_loss", "cohen_kappa"]},
    "in one batch": {"batch_size": None, "epochs": 6},
    "validated": {"validation_split": 0.2},
    "a lower rate on a plateau": {"more": lambda: [callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=9.0)]},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_a_replayed_step_equals_the_eager_step(both, options):
    results = both(**options)
    same(results)
    assert results[0][2].fallback_reason is None and results[0][2].captured >= 1
    assert results[1][2].captured == 0


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_replay_with_image_layers_equals_the_eager_step(both, dtype):
    # Adam would turn the rounding error of the gradient of a bias before a BatchNorm into full steps.
    results = both(build=lambda backend: cnn(backend, dtype), x=IMAGES, optimizer=optimizers.SGD(0.01))
    same(results, rtol=1e-4 if dtype == "float32" else 1e-9)
    assert results[0][2].captured == 2  # full batches, and the smaller last batch of each epoch


def test_a_replay_with_triplets_equals_the_eager_step(both):
    def build(backend):
        return xpnet.Sequential([layers.Dense(12), layers.Tanh()], (64,), backend=backend, seed=0)

    results = both(build=build, loss="triplet_margin")
    same(results)
    assert results[0][2].captured == 2


def test_a_replay_with_integer_inputs_equals_the_eager_step(both):
    def build(backend):
        return xpnet.Sequential([layers.Rescale(1 / 255), layers.Dense(10)], (64,), backend=backend, seed=0)

    results = both(build=build, x=(255 * X).astype("uint8"))
    same(results)
    assert results[0][2].captured == 2


def test_a_replay_with_distorted_images_equals_the_eager_step(both):
    def build(backend):
        stack = [
            *[xpnet.augment.RandomAffine(shift=1, rotation=9), xpnet.augment.ElasticDistortion(2.0, 2.0)],
            *[xpnet.augment.RandomFlip(), xpnet.augment.RandomCrop(1), xpnet.augment.RandomErasing()],
            *[xpnet.augment.GaussianNoise(0.1), xpnet.augment.MixUp(0.3)],
            *[layers.Upsample2D(2, "bilinear"), layers.Conv2D(2, 3, strides=2), layers.Flatten(), layers.Dense(10)],
        ]
        return xpnet.Sequential(stack, (8, 8, 1), backend=backend, seed=0)

    results = both(build=build, x=IMAGES)
    same(results)
    assert results[0][2].captured == 2


def test_a_replay_with_an_embedding_equals_the_eager_step(both, rng):
    def build(backend):
        stack = [layers.Embedding(50, 6), layers.Flatten(), layers.Dense(10)]
        return xpnet.Sequential(stack, (4,), backend=backend, seed=0)

    results = both(build=build, x=rng.integers(50, size=(203, 4)))
    same(results)
    assert results[0][2].captured == 2


@pytest.mark.parametrize("example", range(len(every.LAYERS)))
def test_a_replay_with_any_layer_equals_the_eager_step(both, rng, example):
    shape, layer = every.LAYERS[example]
    if isinstance(layer, layers.Embedding):
        pytest.skip("tested above")

    def build(backend):
        stack = [layers.Dense(shape[-1]), copy.deepcopy(layer), layers.Flatten(), layers.Dense(10)]
        return xpnet.Sequential(stack, shape, backend=backend, seed=0)

    results = both(build=build, x=rng.normal(size=(203, *shape)), optimizer=optimizers.SGD(0.01))
    same(results)
    assert results[0][2].captured == 2


def test_a_captured_run_equals_the_run_on_the_cpu_up_to_rounding(gpu):
    runs = []
    for backend in (gpu, "cpu"):
        model = mlp(backend, "float64")
        history, _ = fit(model, epochs=3)
        runs.append((history, model.state_dict()))
    np.testing.assert_allclose(runs[0][0]["loss"], runs[1][0]["loss"], rtol=1e-9)
    assert runs[0][0]["accuracy"] == runs[1][0]["accuracy"]
    for name, value in runs[1][1].items():
        np.testing.assert_allclose(runs[0][1][name], value, rtol=1e-7, atol=1e-9)


# Launches and transfers ----------------------------------------------------------------------------------------------


class Epochs(callbacks.Callback):
    """Records the launches and the host reads during the steps of each epoch."""

    def __init__(self, cupy):
        self._cupy, self.launches, self.host_reads = cupy, [], []

    def on_epoch_begin(self, model, epoch):
        self._cupy.launches.clear()
        self._before = self._cupy.device.host_reads

    def on_step_end(self, model, step):
        self._last = self._cupy.device.host_reads, list(self._cupy.launches)

    def on_epoch_end(self, model, epoch, logs):
        self.host_reads.append(self._last[0] - self._before)
        self.launches.append(self._last[1])


def test_an_epoch_has_one_launch_per_step_and_no_transfer(gpu):
    epochs = Epochs(emulated_cupy(gpu))
    fit(mlp(gpu), X[:200], Y[:200], epochs=4, more=[epochs])
    assert epochs.launches[-1] == ["begin_step", *["graph"] * 10]
    assert epochs.host_reads[-1] == epochs.host_reads[-2] == 0


def test_attributes_are_not_compared_in_every_step(gpu, monkeypatch):
    compared, changed = [], Attributes.changed
    monkeypatch.setattr(Attributes, "changed", lambda self: compared.append(self) or changed(self))
    _, watch = fit(mlp(gpu), X[:200], Y[:200], batch_size=5, epochs=4)
    assert watch.captured == 1
    assert len(compared) <= 8, "once per epoch, and while a step is captured"


def test_the_smaller_last_batch_has_its_own_graph(gpu):
    epochs = Epochs(emulated_cupy(gpu))
    _, watch = fit(mlp(gpu), epochs=5, more=[epochs])
    assert epochs.launches[-1] == ["begin_step", *["graph"] * (STEPS - 1), "begin_step", "graph"]
    assert watch.captured == 2


def test_schedules_may_be_longer_than_the_table_of_step_values(both):
    results = both(
        x=X[:100], y=Y[:100], batch_size=1, epochs=4, optimizer=optimizers.Adam(schedules.OneCycle(0.01, steps=400))
    )
    same(results)
    assert results[0][2].captured == 1


def test_a_resumed_captured_run_equals_an_uninterrupted_one(gpu, tmp_path):
    class Save(callbacks.Callback):
        def on_step_end(self, model, step):
            if step == 17:
                self.run.save(tmp_path / "run.safetensors")

    whole = mlp(gpu)
    history, _ = fit(whole, epochs=4, more=[Save()])
    resumed = mlp(gpu)
    continued, watch = fit(resumed, epochs=4, more=[Save()], resume_from=tmp_path / "run.safetensors")
    assert watch.captured == 2
    same([(model.state_dict(), dict(h), None, None) for model, h in ((resumed, continued), (whole, history))])


def test_layers_may_be_frozen_between_epochs(both):
    class Freeze(callbacks.Callback):
        def on_epoch_begin(self, model, epoch):
            model.layers[0].trainable = epoch != 2

    results = both(epochs=5, more=lambda: [Freeze()])
    same(results)
    assert results[0][2].captured >= 2


def test_the_learning_rate_may_change_between_steps(both):
    class Slower(callbacks.Callback):
        def on_step_end(self, model, step):
            self.run.state.rate_factor *= 0.9

    results = both(epochs=3, more=lambda: [Slower()])
    same(results)
    assert results[0][2].captured == 2


# Streams -------------------------------------------------------------------------------------------------------------


def batches():
    return ((X[i : i + 20], Y[i : i + 20]) for i in range(0, 203, 20))


@pytest.mark.parametrize(
    "x", [datasets.Stream(X, Y, block=40, window_bytes=2 * 40 * 64 * 4), batches], ids=["windows", "batches"]
)
def test_steps_of_a_streaming_dataset_are_replayed(both, x):
    results = both(x=x, y=None, epochs=4)
    same(results)
    assert results[0][2].captured == 2


def test_an_epoch_of_a_stream_may_have_more_batches_than_the_metrics_have_room_for(both, monkeypatch):
    monkeypatch.setattr(epoch_metrics, "_CAPACITY", 4)
    results = both(x=batches, y=None, epochs=3)
    same(results)
    assert results[0][2].captured == 2


def test_windows_are_uploaded_on_a_separate_stream(gpu, monkeypatch):
    cupy = emulated_cupy(gpu)
    monkeypatch.setattr(branches, "STREAMS", 1)
    stream = datasets.Stream(X, Y, block=40, window_bytes=40 * 64 * 4)  # five windows of 40 samples; the last has 43
    assert gpu.driver is not None  # whose check waits for streams too
    cupy.waits.clear()
    fit(mlp(gpu), stream, None, epochs=1)
    own = next(ptr for _, ptr, _ in cupy.waits if ptr)  # of the training, which first waits for the caller's stream
    uploads = next(ptr for kind, ptr, _ in cupy.waits if kind == "record" and ptr not in (0, own))
    by_event = {event: ptr for kind, ptr, event in cupy.waits if kind == "record"}
    arrived = [event for kind, ptr, event in cupy.waits if kind == "wait" and ptr == own and by_event[event] == uploads]
    assert len(arrived) == 5, "the training must wait exactly once for the upload of each window"
    freed = [event for kind, ptr, event in cupy.waits if kind == "wait" and ptr == uploads]
    assert all(by_event[event] == own for event in freed)
    assert len(freed) == 3, "an upload must wait for the training on the window whose memory it reuses"
    records = [event for kind, ptr, event in cupy.waits if kind == "record" and ptr == own]
    assert freed == records[:3], "the uploads must wait in the order of the training"


def test_the_stream_of_the_model_is_ordered_with_that_of_the_caller(gpu):
    cupy = emulated_cupy(gpu)
    with cupy.cuda.Stream() as outer:
        cupy.waits.clear()
        fit(mlp(gpu), epochs=1)
        first, last = cupy.waits[:2], cupy.waits[-2:]
    own = first[1][1]
    assert first == [("record", outer.ptr, first[0][2]), ("wait", own, first[0][2])] and own not in (0, outer.ptr)
    assert last == [("record", own, last[0][2]), ("wait", outer.ptr, last[0][2])]


def test_a_prediction_beside_fit_is_ordered_with_the_stream_of_the_training(gpu):
    cupy, model, waits = emulated_cupy(gpu), mlp(gpu), []

    class Predict(callbacks.Callback):
        def on_step_end(self, model, step):
            cupy.waits.clear()
            thread = threading.Thread(target=lambda: model.predict(X[:5]))
            thread.start()
            thread.join()
            waits.append([*cupy.waits, cupy.cuda.get_current_stream().ptr])

    fit(model, epochs=1, more=[Predict()])
    assert waits
    for (before, own, first), (after, stream, waited), *end, training in waits:
        assert (before, own, after, stream, waited) == ("record", training, "wait", 0, first)
        assert [kind for kind, *_ in end[-2:]] == ["record", "wait"] and [ptr for _, ptr, _ in end[-2:]] == [
            0,
            training,
        ]
    cupy.waits.clear()
    model.predict(X[:4])  # another kind of pass, which is eager
    assert not cupy.waits  # after fit, all is in the default stream


# Fallback to eager steps ---------------------------------------------------------------------------------------------


class Custom(layers.Layer):
    """A custom layer whose forward calls a function. Its backward returns the gradient unchanged."""

    def __init__(self, function):
        self.function = function

    def forward(self, x):
        return self.function(self, x)

    def backward(self, grad_y):
        return grad_y


def host_reads(layer, x):
    layer.seen = float(x.sum())
    return x


def uses_the_step_number(layer, x):
    return x * (1.0 + layer.context.step * 1e-3)


def uploads_an_array(layer, x):
    return x + layer.backend.asarray(np.ones(x.shape[1:], "float32"))


def calls_matmul_of_cupy(layer, x):
    return layer.xp.matmul(x, layer.xp.eye(x.shape[1], dtype=x.dtype))


def counts_calls_in_python(layer, x):
    layer.calls = getattr(layer, "calls", 0) + 1
    return x * (1.0 + 0.01 * layer.calls)


REFUSED = {
    "a read": (host_reads, r"^the step (reads values from the device|waits for the device)"),
    "the step": (uses_the_step_number, "^a layer reads the number of the step$"),
    "a transfer": (uploads_an_array, r"^the step (copies an array from the host|waits for the device)"),
    "a matrix product of CuPy": (
        calls_matmul_of_cupy,
        r"^the step calls a CUDA library.*cuBLAS API during stream capture",
    ),
    "Python state": (counts_calls_in_python, "^each step changes the attribute 'calls' of Custom$"),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_step_that_cannot_be_captured_runs_eagerly_and_warns_once(gpu, caplog, function, reason):
    model = xpnet.Sequential([layers.Dense(8), Custom(function), layers.Dense(10)], (64,), backend=gpu, seed=0)
    with caplog.at_level(logging.WARNING):
        history, watch = fit(model, epochs=4)
    (record,) = caplog.records
    assert record.getMessage().startswith("training steps are not captured and run eagerly, which is slower: ")
    assert watch.captured == 0
    assert re.search(reason, watch.fallback_reason), watch.fallback_reason
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize("function", [host_reads, uses_the_step_number, calls_matmul_of_cupy], ids=lambda f: f.__name__)
def test_a_failed_capture_does_not_change_the_training(both, function):
    def build(backend):
        stack = [layers.Dense(8), layers.BatchNorm(), Custom(function), layers.Dropout(0.2), layers.Dense(10)]
        return xpnet.Sequential(stack, (64,), backend=backend, seed=0)

    same(both(build=build, epochs=4, optimizer=optimizers.SGD(0.1, momentum=0.9)))


def test_a_custom_optimizer_runs_eagerly(gpu, caplog):
    class Signs(optimizers.SGD):
        def update(self, xp, w, g, slots, t, rate, k):
            w -= rate * xp.sign(g)

    _, watch = fit(mlp(gpu), optimizer=Signs(0.001))
    assert watch.fallback_reason == "Signs has no fused update" and len(caplog.records) == 1


def test_a_metric_with_a_custom_merge_runs_eagerly(gpu):
    class Largest(metrics.Metric):
        name = "largest"

        def sums(self, backend, outputs, targets, weights):
            return outputs.max().reshape(1)

        def merge(self, total, sums):
            return total * (total >= sums) + sums * (total < sums)

        def result(self, sums):
            return float(sums[0])

    model = mlp(gpu)
    history, watch = fit(model, metrics=[Largest()])
    assert watch.fallback_reason == "the metric largest merges batches in its own way"
    assert history["largest"][0] > 0


def test_what_a_run_used_is_freed_at_its_end_without_the_garbage_collector(backend, monkeypatch):
    monkeypatch.setattr(captured_step, "_FEW_STEPS", 1)
    kinds = (Dataset, EpochMetrics, StepExecutor, Trace)

    def alive():
        return [type(thing).__name__ for thing in gc.get_objects() if type(thing) in kinds]

    model = mlp(backend)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        model.fit(X, Y, epochs=3, batch_size=BATCH, verbose=0)
        if backend.name != "strict":
            xpnet.explain_step(model, BATCH)
        assert alive() == before
    finally:
        gc.enable()


def test_the_environment_turns_capture_off_without_a_warning(gpu, monkeypatch, caplog):
    monkeypatch.setenv("XPNET_CAPTURE", "0")
    _, watch = fit(mlp(gpu))
    assert watch.captured == 0 and not caplog.records
    assert watch.fallback_reason == "the environment variable XPNET_CAPTURE=0 turns captures off"


def test_the_number_of_captured_graphs_is_limited(gpu):
    sizes = [*range(5, 25)] * 3

    def batches():
        return ((X[:n], Y[:n]) for n in sizes)

    _, watch = fit(mlp(gpu), batches, None, epochs=2)
    assert watch.fallback_reason is None and watch.captured == 8


def test_a_captured_run_that_diverges_is_stopped(gpu):
    model = mlp(gpu)
    with pytest.raises(errors.DivergenceError, match=r"in epoch 1, at step \d+ of 11"):
        fit(model, epochs=5, optimizer=optimizers.SGD(1e30))
    assert np.isfinite(model.state_dict()["0.weight"]).all()


# Memory --------------------------------------------------------------------------------------------------------------


def test_memory_is_reported_and_can_be_freed(gpu):
    memory = gpu.memory()
    assert 0 <= memory.used <= memory.held and 0 < memory.free <= memory.total
    gpu.free_memory()
    if gpu.name == "emulated":
        assert gpu.xp.get_default_memory_pool().freed == gpu.xp.get_default_pinned_memory_pool().freed == 1


@pytest.mark.parametrize("method", ["fit", "predict", "evaluate", "train_on_batch"])
def test_the_error_for_too_little_memory_suggests_a_batch_size(gpu, monkeypatch, method):
    emulated_cupy(gpu)
    model = mlp(gpu)

    def full(*args, **kwargs):
        raise OutOfMemoryError("Out of memory allocating 512 bytes")

    monkeypatch.setattr(model.layers[0], "forward", full)
    calls = {
        "fit": lambda: model.fit(X, Y, batch_size=100, verbose=0),
        "predict": lambda: model.predict(X, batch_size=100),
        "evaluate": lambda: model.evaluate(X, Y, loss="softmax_cross_entropy", batch_size=100),
        "train_on_batch": lambda: model.train_on_batch(X, Y, "softmax_cross_entropy", "sgd"),
    }
    with pytest.raises(errors.DeviceMemoryError) as caught:
        calls[method]()
    fewer = len(X) // 2
    advice = {
        "fit": "batch_size=100: try batch_size=50, with accumulate=2 for as many samples per update.",
        "train_on_batch": f"{len(X)} samples: give fewer at a time, such as {fewer}.",
    }
    assert str(caught.value) == (
        f"emulated does not have enough memory for {advice.get(method, 'batch_size=100: try batch_size=50.')} "
        "Out of memory allocating 512 bytes. Of 8.0 GiB, 3.0 GiB are free; backend.free_memory() frees what CuPy "
        "caches."
    )
    assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("metrics", [[], ["accuracy", "top_k_accuracy"]], ids=["no metrics", "metrics"])
def test_each_kind_of_step_is_captured_once(gpu, monkeypatch, metrics):
    captured, capture_step = [], GraphStep._capture_step

    def recorded(self, data, *arguments):
        captured.append(data.rows)
        capture_step(self, data, *arguments)

    monkeypatch.setattr(GraphStep, "_capture_step", recorded)
    fit(mlp(gpu), metrics=metrics)
    assert captured == [BATCH, len(X) % BATCH]


def test_the_steps_of_short_runs_are_not_captured(gpu, monkeypatch):
    monkeypatch.setattr(captured_step, "_MIN_STEPS", 12)
    _, watch = fit(mlp(gpu), epochs=2)  # 20 steps with full batches, 2 with 3 samples
    assert watch.captured == 1
    _, watch = fit(mlp(gpu), epochs=1)
    assert watch.captured == 0 and watch.fallback_reason is None


# The comparison with the eager step ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("below", "captured"), [(1e-5, 2), (1.1, 0)])
def test_weights_may_differ_where_the_gradient_is_almost_rounding(gpu, monkeypatch, below, captured):
    """below: the part of the largest gradient below which weights differ, by 1 % of the learning rate."""
    launch = GraphStep.launch

    def inexact(self, *arguments):
        launch(self, *arguments)
        store, xp = self._step.model.context.store, gpu.xp
        size = xp.abs(store.grads)
        store.values += 1e-5 * (size < below * size.max())

    monkeypatch.setattr(GraphStep, "launch", inexact)
    _, watch = fit(mlp(gpu), optimizer=optimizers.Adam(1e-3))
    assert watch.captured == captured
    assert captured or "differ in the weights" in watch.fallback_reason


@pytest.mark.parametrize(("parameter", "elements", "captured"), [(0, 2, 2), (-1, None, 0)])
def test_a_few_elements_of_a_gradient_may_differ_by_more(gpu, monkeypatch, parameter, elements, captured):
    """elements: how many of this parameter's gradient differ, by 0.2 % of the largest gradient; None means all."""
    launch = GraphStep.launch

    def inexact(self, *arguments):
        launch(self, *arguments)
        model = self._step.model
        largest = float(gpu.xp.abs(model.context.store.grads).max())
        model.parameters[parameter].grad.reshape(-1)[:elements] += 0.002 * largest

    monkeypatch.setattr(GraphStep, "launch", inexact)
    _, watch = fit(mlp(gpu), optimizer="sgd")
    assert watch.captured == captured
    assert captured or "differ in the gradient" in watch.fallback_reason
