"""Reproducibility: one seed gives the same batches, masks and weights on every device."""

import numpy as np
import pytest
from custom_layers import Spy
from small_models import assert_same_state
from strict import StrictBackend

import xpnet
from xpnet import callbacks, datasets, layers, losses, optimizers, schedules
from xpnet.backends import Backend

X, Y = (a[:200] for a in datasets.digits())
ONE_HOT = np.eye(10)[Y]
WEIGHT = np.random.default_rng(0).integers(0, 4, 200)


def digits_mlp(backend, seed=0, dtype="float32"):
    return xpnet.Sequential(
        [layers.Rescale(1 / 16), layers.Flatten(), layers.Dense(24, l2=1e-4), layers.ReLU(), layers.Dropout(0.3),
         layers.Dense(16), layers.GELU(), layers.Dense(10)], (8, 8), backend, seed=seed, dtype=dtype)  # fmt: skip


def trained(backend, seed=0, dtype="float32", y=Y, **kwargs):
    model = digits_mlp(backend, seed, dtype)
    history = model.fit(X, y, **({"optimizer": "adam", "epochs": 3, "batch_size": 32, "verbose": 0} | kwargs))
    return model.state_dict(), history


def test_runs_with_equal_seeds_are_equal_bit_for_bit(backend):
    (one, logs), (other, same) = trained(backend), trained(backend)
    assert_same_state(one, other)
    assert dict(logs) == dict(same)


def test_runs_with_different_seeds_differ(backend):
    def start(seed):
        return digits_mlp(backend, seed).state_dict()["2.weight"]

    assert not np.array_equal(start(0), start(1))
    one, other = digits_mlp(backend, 0), digits_mlp(backend, 1)
    other.load_state_dict(one.state_dict())  # with equal weights, the order of samples and the masks still differ
    for model in (one, other):
        model.fit(X, Y, batch_size=32, verbose=0)
    assert not np.array_equal(one.state_dict()["2.weight"], other.state_dict()["2.weight"])


def test_the_global_generator_of_numpy_does_not_affect_a_run():
    one, _ = trained("cpu")
    np.random.seed(5)
    np.random.random(3)
    other, _ = trained("cpu")
    assert_same_state(one, other)


CONFIGURATIONS = {
    "sgd": {"optimizer": optimizers.SGD(0.1)},
    "nesterov": {"optimizer": optimizers.SGD(0.05, momentum=0.9, nesterov=True, weight_decay=0.01)},
    "adagrad": {"optimizer": "adagrad"},
    "rmsprop": {"optimizer": "rmsprop"},
    "adam, a schedule, clipping": {"optimizer": optimizers.Adam(schedules.CosineDecay(0.01, 20), clip_norm=0.5)},
    "adamw": {"optimizer": optimizers.AdamW(0.01)},
    "float64": {"dtype": "float64"},
    "sample weights": {"sample_weight": WEIGHT},
    "class weights": {"class_weight": {3: 5.0}},
    "accumulation": {"accumulate": 3},
    "accumulation and weights": {"accumulate": 2, "sample_weight": WEIGHT},
    "full batch": {"batch_size": None},
    "in order, with validation": {"shuffle": False, "validation_split": 0.2},
    "probabilities": {"y": ONE_HOT, "loss": losses.SoftmaxCrossEntropy(label_smoothing=0.1)},
    "binary": {"y": ONE_HOT, "loss": "binary_cross_entropy"},
    "squares": {"y": ONE_HOT, "loss": "mse", "metrics": ["mae", "r2"]},
    "a sum": {"y": ONE_HOT, "loss": losses.HalfSquaredError("sum"), "optimizer": optimizers.SGD(1e-3)},
    "huber": {"y": ONE_HOT, "loss": "huber"},
}


@pytest.mark.parametrize("kwargs", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_strict_trains_like_the_reference_bit_for_bit(reference, kwargs):
    (one, logs), (other, same) = trained(StrictBackend(), **kwargs), trained(reference, **kwargs)
    assert_same_state(one, other)
    assert dict(logs) == dict(same)


@pytest.mark.parametrize("kwargs", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_fast_operators_of_the_cpu_agree_with_the_reference(reference, kwargs):
    kwargs = kwargs | {"dtype": "float64"}
    (one, logs), (other, same) = trained("cpu", **kwargs), trained(reference, **kwargs)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-7, atol=1e-9, err_msg=name)
    for name in logs:
        np.testing.assert_allclose(logs[name], same[name], rtol=1e-7)


# Batches and masks -------------------------------------------------------------------------------------------------


def batches_and_masks(backend, **kwargs):
    """The batches, and where the masks of two dropout layers are not zero."""
    batch, first, second = Spy(), Spy(), Spy()
    model = xpnet.Sequential(
        [batch, layers.Dense(3, weight_initializer=0.0, bias_initializer=1.0), layers.Dropout(0.5), first,
         layers.Dropout(0.2), second, layers.Dense(1)], (1,), backend, seed=7)  # fmt: skip
    model.layers[1].trainable = False
    x = np.arange(50.0)[:, None]
    model.fit(x, x, loss="mse", optimizer=optimizers.SGD(1e-9), batch_size=16, epochs=2, verbose=0, **kwargs)
    return batch.seen, [a != 0 for a in first.seen], [a != 0 for a in second.seen]


def test_batches_and_masks_equal_those_of_the_reference(backend, reference, eager_steps):
    for mine, theirs in zip(batches_and_masks(backend), batches_and_masks(reference), strict=True):
        assert len(mine) == len(theirs) == 8
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_masks_differ_by_step_and_by_layer():
    _, first, second = batches_and_masks("cpu")
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], second[0])
    assert 0.4 < np.concatenate(first).mean() < 0.6


# Host reads --------------------------------------------------------------------------------------------------------


class NoReadsInside(callbacks.Callback):
    """Forbids host reads from the first step of an epoch to its last."""

    def on_epoch_begin(self, model, epoch):
        self.guard = model.backend.no_host_reads()
        self.guard.__enter__()
        self.steps = 0

    def on_step_end(self, model, step):
        self.steps += 1
        if self.steps == -(-self.run.steps // self.run.accumulate):
            self.guard.__exit__(None, None, None)


@pytest.mark.parametrize("kwargs", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_steps_read_nothing_back(kwargs):
    guard = NoReadsInside()
    trained(StrictBackend(), callbacks=[guard], **kwargs)
    assert guard.steps > 0


def test_the_guard_against_host_reads_finds_one():
    class Reader(callbacks.Callback):
        def on_step_end(self, model, step):
            self.run.logs()

    with pytest.raises(AssertionError, match="host"):
        trained(StrictBackend(), callbacks=[NoReadsInside(), Reader()])


@pytest.mark.parametrize("kwargs", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_host_reads_per_epoch_do_not_depend_on_the_number_of_steps(kwargs):
    def reads(batch_size, epochs):
        backend = StrictBackend()
        model = digits_mlp(backend, dtype=kwargs.get("dtype", "float32"))
        before = backend.host_reads
        rest = {k: v for k, v in kwargs.items() if k not in ("dtype", "y", "batch_size")}
        model.fit(X, kwargs.get("y", Y), epochs=epochs, batch_size=batch_size, verbose=0, **rest)
        return backend.host_reads - before

    assert reads(100, 3) - reads(100, 2) == reads(20, 3) - reads(20, 2) < 12


class Watch(callbacks.Callback):
    """Collects the dtypes of all arrays created in the steps of an epoch except the first."""

    def on_step_end(self, model, step):
        if step == 1:
            self.watch = model.backend.watch_dtypes()
            self.seen = self.watch.__enter__()
        if step == self.run.steps // self.run.accumulate:
            self.watch.__exit__(None, None, None)


@pytest.mark.parametrize("kwargs", [c for n, c in CONFIGURATIONS.items() if n not in ("float64", "full batch")],
                         ids=[n for n in CONFIGURATIONS if n not in ("float64", "full batch")])  # fmt: skip
def test_steps_of_a_float32_model_create_no_float64_arrays(kwargs):
    watch = Watch()
    trained(StrictBackend(), callbacks=[watch], **(kwargs | {"epochs": 1, "metrics": []}))
    assert np.dtype("float32") in watch.seen and np.dtype("float64") not in watch.seen


# On a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adam", optimizers.AdamW(0.001, clip_norm=1.0)], ids=str)
def test_cpu_and_gpu_agree_over_3_epochs(optimizer):
    x, y = datasets.digits()
    cpu, gpu = (digits_mlp(name) for name in ("cpu", "gpu"))
    assert_same_state(cpu.state_dict(), gpu.state_dict())
    on_cpu, on_gpu = (
        m.fit(x, y, optimizer=optimizer, epochs=3, validation_split=0.1, verbose=0) for m in (cpu, gpu)
    )  # fmt: skip
    np.testing.assert_allclose(on_gpu["loss"], on_cpu["loss"], atol=1e-3)
    np.testing.assert_allclose(on_gpu["val_loss"], on_cpu["val_loss"], atol=1e-3)
    np.testing.assert_allclose(gpu.predict(x), cpu.predict(x), atol=1e-2)


@pytest.mark.gpu
def test_the_gpu_backend_agrees_with_the_reference_on_cupy():
    import cupy

    plain = Backend("plain", cupy)
    plain.to_numpy = cupy.asnumpy
    (one, logs), (other, same) = trained("gpu", dtype="float64"), trained(plain, dtype="float64")
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-7, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(logs["loss"], same["loss"], rtol=1e-7)
