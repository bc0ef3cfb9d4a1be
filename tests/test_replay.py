"""Updates recorded as CUDA graphs and played: they are what the code does, and whatever is not stays call by call.

By an emulation that refuses what a real recording refuses, and where there is one, on a GPU.
"""

import copy
import logging
import re

import numpy as np
import pytest
from fake_cupy import OutOfMemoryError

import xpnet
from xpnet import callbacks, datasets, errors, layers, losses, metrics, optimizers, schedules

X, Y = (a[:203] for a in datasets.digits())
X = X.reshape(203, 64).astype("float32") / 16
IMAGES = X.reshape(-1, 8, 8, 1)
BATCH, STEPS = 20, 11  # the last of them has 3 samples


def mlp(backend, dtype="float32", **options):
    stack = [layers.Dense(24), layers.ReLU(), layers.Dropout(0.3), layers.Dense(10)]
    return xpnet.Sequential(stack, (64,), backend=backend, seed=3, dtype=dtype, **options)


def cnn(backend, dtype="float32"):
    stack = [
        *[layers.Conv2D(4, 3, padding="same"), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2)],
        *[layers.Residual(layers.Conv2D(4, 3, padding="same"), layers.Tanh()), layers.DepthwiseConv2D(3)],
        *[layers.Conv2DTranspose(4, 3, groups=2), layers.Conv2D(4, 2, groups=2), layers.Softplus()],
        *[layers.AvgPool2D(2), layers.Flatten(), layers.LayerNorm(), layers.Dense(12, l2=1e-3), layers.GELU()],
        *[layers.Dropout(0.2), layers.Dense(10, l1=1e-4)],
    ]
    return xpnet.Sequential(stack, (8, 8, 1), backend=backend, seed=3, dtype=dtype)


class Watch(callbacks.Callback):
    """Keeps what the run's player says at the end."""

    def on_train_end(self, model):
        self.why_not, self.recorded = self.run.player.why_not, self.run.player.recorded


def fit(model, x=X, y=Y, more=(), **options):
    """(history, the watch) of a run with usual options."""
    watch = Watch()
    given = {"epochs": 3, "batch_size": BATCH, "optimizer": "adam", "verbose": 0, **options}
    return model.fit(x, y, callbacks=[watch, *more], **given), watch


@pytest.fixture
def both(gpu, monkeypatch):
    """Trains the same model recorded and call by call; the state and history of each, and the watch of the first."""

    def run(build=mlp, x=X, y=Y, more=lambda: (), **options):
        results = []
        for graphs in ("1", "0"):
            monkeypatch.setenv("XPNET_CUDA_GRAPHS", graphs)
            model = build(gpu)
            history, watch = fit(model, x, y, more(), **copy.deepcopy(options))
            results.append((model.state_dict(), dict(history), watch, model))
        return results

    return run


def same(results, rtol=0.0):
    """That both came out alike, to the bit where rtol is 0."""
    (state, history, _, _), (want, want_history, _, _) = results
    for name, value in want.items():
        np.testing.assert_allclose(state[name], value, rtol=rtol, atol=rtol, err_msg=name)
    for name, values in want_history.items():
        np.testing.assert_allclose(history[name], values, rtol=rtol, err_msg=name)


# Equal ---------------------------------------------------------------------------------------------------------------

KINDS = {
    "as it is": {},
    "momentum": {"optimizer": optimizers.SGD(0.05, momentum=0.9, nesterov=True)},
    "adagrad": {"optimizer": "adagrad"},
    "rmsprop, clipped": {"optimizer": optimizers.RMSprop(0.01, clip_norm=0.5)},
    "adamw and a schedule": {"optimizer": optimizers.AdamW(schedules.OneCycle(0.02, steps=33), weight_decay=0.1)},
    "in order": {"shuffle": False},
    "accumulated": {"accumulate": 3},
    "sample weights": {"sample_weight": np.linspace(0.1, 2, 203)},
    "class weights": {"class_weight": {3: 5.0}},
    "smoothed": {"loss": losses.SoftmaxCrossEntropy(label_smoothing=0.1)},
    "probabilities": {"y": np.eye(10)[Y]},
    "squares": {"y": np.eye(10)[Y], "loss": "mse", "metrics": ["mae", "r2"]},
    "a loss that sums": {"y": np.eye(10)[Y], "loss": losses.HalfSquaredError("sum"), "optimizer": optimizers.SGD(1e-3)},
    "many metrics": {"metrics": ["accuracy", "f1", "top_k_accuracy", "precision"]},
    "in one batch": {"batch_size": None, "epochs": 6},
    "validated": {"validation_split": 0.2},
    "a lower rate on a plateau": {"more": lambda: [callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=9.0)]},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_played_is_what_the_code_does(both, options):
    results = both(**options)
    same(results)
    assert results[0][2].why_not is None and results[0][2].recorded >= 1
    assert results[1][2].recorded == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_images_and_all_kinds_of_layers(both, dtype):
    results = both(build=lambda backend: cnn(backend, dtype), x=IMAGES)
    same(results)
    assert results[0][2].recorded == 2  # the last batch of an epoch is a kind of its own, seen once an epoch


def test_whole_numbers_as_they_come(both):
    def build(backend):
        return xpnet.Sequential([layers.Rescale(1 / 255), layers.Dense(10)], (64,), backend=backend, seed=0)

    results = both(build=build, x=(255 * X).astype("uint8"))
    same(results)
    assert results[0][2].recorded == 2


def test_distorted_images_enlarged(both):
    def build(backend):
        stack = [
            *[xpnet.augment.RandomAffine(shift=1, rotation=9), xpnet.augment.ElasticDistortion(2.0, 2.0)],
            *[layers.Upsample2D(2, "bilinear"), layers.Conv2D(2, 3, strides=2), layers.Flatten(), layers.Dense(10)],
        ]
        return xpnet.Sequential(stack, (8, 8, 1), backend=backend, seed=0)

    results = both(build=build, x=IMAGES)
    same(results)
    assert results[0][2].recorded == 2


def test_words(both, rng):
    def build(backend):
        stack = [layers.Embedding(50, 6), layers.Flatten(), layers.Dense(10)]
        return xpnet.Sequential(stack, (4,), backend=backend, seed=0)

    results = both(build=build, x=rng.integers(50, size=(203, 4)))
    same(results, rtol=1e-4)  # on a GPU the rows of the weight are added to in any order
    assert results[0][2].recorded == 2


def test_it_is_the_run_of_the_cpu(gpu):
    trajectories = []
    for backend in (gpu, "cpu"):
        model = mlp(backend, "float64")
        history, _ = fit(model, epochs=3)
        trajectories.append((history, model.state_dict()))
    np.testing.assert_allclose(trajectories[0][0]["loss"], trajectories[1][0]["loss"], rtol=1e-9)
    assert trajectories[0][0]["accuracy"] == trajectories[1][0]["accuracy"]
    for name, value in trajectories[1][1].items():
        np.testing.assert_allclose(trajectories[0][1][name], value, rtol=1e-7, atol=1e-9)


# How much there is to do ---------------------------------------------------------------------------------------------


def emulated(gpu):
    if gpu.name != "emulated":
        pytest.skip("only the emulation counts")
    return gpu.xp


class Epochs(callbacks.Callback):
    """What was launched, and how often the host had to wait, in the steps of each epoch."""

    def __init__(self, cupy):
        self._cupy, self.launches, self.reads = cupy, [], []

    def on_epoch_begin(self, model, epoch):
        self._cupy.launches.clear()
        self._before = self._cupy.device.host_reads

    def on_step_end(self, model, step):
        self._last = self._cupy.device.host_reads, list(self._cupy.launches)

    def on_epoch_end(self, model, epoch, logs):
        self.reads.append(self._last[0] - self._before)
        self.launches.append(self._last[1])


def test_an_epoch_is_a_launch_a_step_and_no_transfer(gpu):
    epochs = Epochs(emulated(gpu))
    fit(mlp(gpu), X[:200], Y[:200], epochs=4, more=[epochs])
    assert epochs.launches[-1] == ["graph"] * 10
    assert epochs.reads[-1] == epochs.reads[-2] == 0


def test_the_last_smaller_batch_is_a_graph_of_its_own(gpu):
    epochs = Epochs(emulated(gpu))
    _, watch = fit(mlp(gpu), epochs=5, more=[epochs])
    assert epochs.launches[-1] == ["graph"] * STEPS
    assert watch.recorded == 2


def test_a_long_schedule_goes_beyond_the_table_of_numbers(both):
    results = both(
        x=X[:100], y=Y[:100], batch_size=1, epochs=4, optimizer=optimizers.Adam(schedules.OneCycle(0.01, steps=400))
    )
    same(results)
    assert results[0][2].recorded == 1


def test_a_run_that_is_stopped_goes_on_alike(gpu, tmp_path):
    class Stop(callbacks.Callback):
        def on_step_end(self, model, step):
            if step == 17:
                self.run.save(tmp_path / "run.safetensors")

    whole = mlp(gpu)
    history, _ = fit(whole, epochs=4, more=[Stop()])
    resumed = mlp(gpu)
    again, watch = fit(resumed, epochs=4, more=[Stop()], resume_from=tmp_path / "run.safetensors")
    assert dict(again) == dict(history) and watch.recorded == 2
    for name, value in whole.state_dict().items():
        np.testing.assert_array_equal(resumed.state_dict()[name], value)


def test_what_is_trained_may_change_between_epochs(both):
    class Freeze(callbacks.Callback):
        def on_epoch_begin(self, model, epoch):
            model.layers[0].trainable = epoch != 2

    results = both(epochs=5, more=lambda: [Freeze()])
    same(results)
    assert results[0][2].recorded >= 2


def test_the_rate_may_change_between_steps(both):
    class Slower(callbacks.Callback):
        def on_step_end(self, model, step):
            self.run.state.rate_factor *= 0.9

    results = both(epochs=3, more=lambda: [Slower()])
    same(results)
    assert results[0][2].recorded == 2


# Streams -------------------------------------------------------------------------------------------------------------


def batches():
    return ((X[i : i + 20], Y[i : i + 20]) for i in range(0, 203, 20))


@pytest.mark.parametrize(
    "x", [datasets.Stream(X, Y, block=40, window_bytes=2 * 40 * 64 * 4), batches], ids=["windows", "batches"]
)
def test_parts_of_a_stream_are_played(both, x):
    results = both(x=x, y=None, epochs=4)
    same(results)
    assert results[0][2].recorded == 2


def test_parts_come_through_pinned_memory_on_a_stream_of_their_own(gpu):
    cupy = emulated(gpu)
    stream = datasets.Stream(X, Y, block=40, window_bytes=40 * 64 * 4)  # five windows of 40, the last with 3 more
    cupy.waits.clear()
    fit(mlp(gpu), stream, None, epochs=1)
    own = next(ptr for _, ptr, _ in cupy.waits if ptr)  # of the training: it waits for the caller's stream first
    uploads = next(ptr for what, ptr, _ in cupy.waits if what == "record" and ptr not in (0, own))
    by_event = {event: ptr for what, ptr, event in cupy.waits if what == "record"}
    arrived = [event for what, ptr, event in cupy.waits if what == "wait" and ptr == own and by_event[event] == uploads]
    assert len(arrived) == 5, "the training waits for each window, and for nothing else of the uploads"
    freed = [event for what, ptr, event in cupy.waits if what == "wait" and ptr == uploads]
    assert all(by_event[event] == own for event in freed)
    assert len(freed) == 3, "the uploads wait for the training on the window before the last, whose memory they take"
    records = [event for what, ptr, event in cupy.waits if what == "record" and ptr == own]
    assert freed == records[:3], "in the order in which the windows were trained on"


def test_the_models_stream_is_ordered_with_the_callers(gpu):
    cupy = emulated(gpu)
    with cupy.cuda.Stream() as callers:
        cupy.waits.clear()
        fit(mlp(gpu), epochs=1)
        first, last = cupy.waits[:2], cupy.waits[-2:]
    own = first[1][1]
    assert first == [("record", callers.ptr, first[0][2]), ("wait", own, first[0][2])] and own not in (0, callers.ptr)
    assert last == [("record", own, last[0][2]), ("wait", callers.ptr, last[0][2])]


# Refused -------------------------------------------------------------------------------------------------------------


class Own(layers.Layer):
    """A user's layer, that does something before it passes on what comes."""

    def __init__(self, does):
        self.does = does

    def forward(self, x):
        return self.does(self, x)

    def backward(self, grad_y):
        return grad_y


def reads(layer, x):
    layer.seen = float(x.sum())
    return x


def asks_the_step(layer, x):
    return x * (1.0 + layer.context.step * 1e-3)


def brings_numbers_along(layer, x):
    return x + layer.backend.asarray(np.ones(x.shape[1:], "float32"))


def multiplies_by_cupy(layer, x):
    return layer.xp.matmul(x, layer.xp.eye(x.shape[1], dtype=x.dtype))


def counts_in_python(layer, x):
    layer.calls = getattr(layer, "calls", 0) + 1
    return x * (1.0 + 0.01 * layer.calls)


REFUSED = {
    "a read": (reads, r"^the step (reads numbers of the device|waits for the device)"),
    "the step": (asks_the_step, "^a layer asks for the number of the step$"),
    "a transfer": (brings_numbers_along, r"^the step (copies an array from the host|waits for the device)"),
    "a product of CuPy's": (multiplies_by_cupy, r"^the step calls a CUDA library.*cuBLAS API during stream capture"),
    "what is Python": (counts_in_python, "^played, it left the .* otherwise than the code did"),
}


@pytest.mark.parametrize(("does", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_a_layer_that_cannot_be_recorded_runs_call_by_call_and_it_is_said_once(gpu, caplog, does, why):
    model = xpnet.Sequential([layers.Dense(8), Own(does), layers.Dense(10)], (64,), backend=gpu, seed=0)
    with caplog.at_level(logging.WARNING):
        history, watch = fit(model, epochs=4)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "updates are not recorded as CUDA graphs, and run call by call, more slowly: "
    )
    assert watch.recorded == 0
    assert re.search(why, watch.why_not), watch.why_not
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize("does", [reads, asks_the_step, multiplies_by_cupy], ids=lambda f: f.__name__)
def test_it_then_trains_as_if_nothing_had_been_tried(both, does):
    def build(backend):
        stack = [layers.Dense(8), layers.BatchNorm(), Own(does), layers.Dropout(0.2), layers.Dense(10)]
        return xpnet.Sequential(stack, (64,), backend=backend, seed=0)

    same(both(build=build, epochs=4, optimizer=optimizers.SGD(0.1, momentum=0.9)))


def test_an_optimiser_of_a_users_own_runs_call_by_call(gpu, caplog):
    class Signs(optimizers.SGD):
        def update(self, xp, w, g, slots, t, rate, k):
            w -= rate * xp.sign(g)

    _, watch = fit(mlp(gpu), optimizer=Signs(0.001))
    assert watch.why_not == "Signs has no fused update" and len(caplog.records) == 1


def test_a_metric_that_merges_in_its_own_way_runs_call_by_call(gpu):
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
    assert watch.why_not == "the metric largest merges batches in a way of its own"
    assert history["largest"][0] > 0


def test_the_environment_turns_it_off_without_a_word(gpu, monkeypatch, caplog):
    monkeypatch.setenv("XPNET_CUDA_GRAPHS", "0")
    _, watch = fit(mlp(gpu))
    assert watch.recorded == 0 and watch.why_not == "this device records nothing" and not caplog.records


@pytest.mark.parametrize("backend", ["cpu"])
def test_other_devices_record_nothing(backend):
    _, watch = fit(mlp(backend), epochs=1)
    assert watch.why_not == "this device records nothing"


def test_many_kinds_of_updates_do_not_fill_the_memory(gpu):
    sizes = [*range(5, 25)] * 3

    def batches():
        return ((X[:n], Y[:n]) for n in sizes)

    _, watch = fit(mlp(gpu), batches, None, epochs=2)
    assert watch.why_not is None and watch.recorded == 8


def test_a_run_that_diverges_is_stopped_as_ever(gpu):
    model = mlp(gpu)
    with pytest.raises(errors.DivergenceError, match=r"in epoch 1, at step \d+ of 11"):
        fit(model, epochs=5, optimizer=optimizers.SGD(1e30))
    assert np.isfinite(model.state_dict()["0.weight"]).all()


# Memory --------------------------------------------------------------------------------------------------------------


def test_memory_is_told_and_given_back(gpu):
    memory = gpu.memory()
    assert 0 <= memory.used <= memory.held and 0 < memory.free <= memory.total
    gpu.free_memory()
    if gpu.name == "emulated":
        assert gpu.xp.get_default_memory_pool().freed == gpu.xp.get_default_pinned_memory_pool().freed == 1


@pytest.mark.parametrize("method", ["fit", "predict", "evaluate", "train_on_batch"])
def test_too_little_memory_is_an_error_that_says_what_to_try(gpu, monkeypatch, method):
    emulated(gpu)
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
    said = {
        "fit": "batch_size=100: try batch_size=50, with accumulate=2 for the same updates.",
        "train_on_batch": "batch_size=None: try batch_size=128.",
    }
    assert str(caught.value) == (
        f"emulated has not enough memory for {said.get(method, 'batch_size=100: try batch_size=50.')} Of its 8.0 GiB, "
        "3.0 are free; backend.free_memory() gives back what CuPy only holds."
    )
    assert isinstance(caught.value, MemoryError)
