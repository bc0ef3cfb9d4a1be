"""Products of matrices in lower precisions: weights stay float32, float16 scales its loss. Emulated, and on a GPU."""

import copy

import numpy as np
import pytest
from strict import StrictBackend

import xpnet
from xpnet import callbacks, datasets, layers, loss_scaling, optimizers
from xpnet.errors import ArgumentError

X, Y = (a[:200] for a in datasets.digits())
X = X.reshape(200, 64).astype("float32") / 16
PRECISIONS = ["tf32", "float16", "bfloat16"]
UNIT = {"tf32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.fixture(params=PRECISIONS)
def precision(request, gpu):
    if reason := gpu.why_no_precision(request.param):
        pytest.skip(reason)
    return request.param


def mlp(backend, precision=None, **options):
    stack = [layers.Dense(32), layers.ReLU(), layers.Dropout(0.2), layers.Dense(10)]
    return xpnet.Sequential(stack, (64,), backend=backend, precision=precision, seed=5, **options)


def cnn(backend, precision=None):
    stack = [layers.Conv2D(6, 3, groups=1), layers.ReLU(), layers.MaxPool2D(2), layers.Conv2D(6, 3, groups=2)]
    stack += [layers.Conv2DTranspose(4, 2), layers.BatchNorm(), layers.Flatten(), layers.Dense(10)]
    return xpnet.Sequential(stack, (8, 8, 1), backend=backend, precision=precision, seed=5)


@pytest.mark.parametrize("name", ["cpu", "strict"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_other_devices_refuse_it_with_the_reason(name, precision):
    backend = StrictBackend() if name == "strict" else name
    with pytest.raises(ArgumentError) as caught:
        mlp(backend, precision)
    assert str(caught.value) == (
        f'precision="{precision}" cannot be had on {name}: it is what the tensor cores of a GPU compute with; the CPU '
        "would have to imitate it, more slowly than float32 and less exactly. Leave it out."
    )
    assert mlp(backend, "float32").precision is None


@pytest.mark.parametrize(("major", "refused"), [(7, ["tf32", "bfloat16"]), (6, PRECISIONS), (8, [])])
def test_a_device_without_such_tensor_cores_refuses_it(gpu, monkeypatch, major, refused):
    if gpu.name != "emulated":
        pytest.skip("the real device is as it is")
    monkeypatch.setattr(gpu.xp.cuda.runtime, "getDeviceProperties", lambda i: {"major": major})
    for precision in PRECISIONS:
        if precision in refused:
            with pytest.raises(ArgumentError, match=f"it takes compute capability [78].0, and this device has {major}"):
                mlp(gpu, precision)
        else:
            assert mlp(gpu, precision).precision == precision


def smooth(backend, precision=None):
    """Without a kink, at which rounding would turn a gradient on or off."""
    stack = [layers.Dense(32), layers.Tanh(), layers.Dense(10)]
    return xpnet.Sequential(stack, (64,), backend=backend, precision=precision, seed=5)


@pytest.mark.parametrize("build", [smooth, cnn])
def test_outputs_and_gradients_are_off_by_its_rounding_and_no_more(gpu, precision, build, rng):
    x = X if build is smooth else X.reshape(-1, 8, 8, 1)
    results = []
    for model in (build(gpu), build(gpu, precision)):
        y = gpu.to_numpy(model.forward(x))
        grad_x = gpu.to_numpy(model.backward(np.ones_like(y) / len(y)))
        results.append([y, grad_x, *(gpu.to_numpy(p.grad) for p in model.parameters)])
        assert all(a.dtype == "float32" for a in results[-1])
    for want, got in zip(*results, strict=True):
        off, size = np.abs(got - want).max(), np.abs(want).max()
        assert off < 40 * UNIT[precision] * size + 1e-6
    assert np.abs(results[0][0] - results[1][0]).max() > UNIT[precision] / 100, "nothing was rounded"
    assert build(gpu, precision).predict(x).dtype == "float32"


@pytest.mark.parametrize("build", [mlp, cnn])
def test_it_trains_nearly_as_in_float32_and_is_played(gpu, precision, build, monkeypatch):
    x = X if build is mlp else X.reshape(-1, 8, 8, 1)
    runs = []
    for asked, graphs in ((None, "1"), (precision, "1"), (precision, "0")):
        monkeypatch.setenv("XPNET_CUDA_GRAPHS", graphs)
        model, watch = build(gpu, asked), Watch()
        history = model.fit(x, Y, epochs=6, batch_size=40, callbacks=[watch], verbose=0)
        runs.append((history["loss"], model.state_dict(), watch.recorded))
    (full, _, _), (low, state, recorded), (by_call, want, _) = runs
    np.testing.assert_allclose(low, full, rtol=0.1)
    assert low != full and recorded == 1
    np.testing.assert_allclose(low, by_call, rtol=1e-5)
    for name, value in want.items():
        assert value.dtype == "float32"
        if build is mlp:  # the bias before a BatchNorm has a gradient of rounding alone
            np.testing.assert_allclose(state[name], value, rtol=1e-3, atol=1e-5)


class Watch(callbacks.Callback):
    def on_train_end(self, model):
        assert self.run.player.why_not in (None, "this device records nothing")
        self.recorded = self.run.player.recorded


def test_it_is_left_behind_where_it_cannot_be(gpu, precision):
    model = mlp(gpu, precision)
    model.fit(X, Y, epochs=1, verbose=0)
    assert model.to("cpu").precision is None
    model.fit(X, Y, epochs=1, verbose=0)
    assert model.to(gpu).precision is None
    other = mlp(gpu, precision)
    assert other.to(gpu, "float64").precision is None and other.predict(X).dtype == "float64"
    assert copy.deepcopy(mlp(gpu, precision)).precision == precision


def test_a_file_of_it_loads_anywhere(gpu, precision, tmp_path):
    model = mlp(gpu, precision)
    model.save(tmp_path / "m.safetensors")
    assert xpnet.load(tmp_path / "m.safetensors", backend="cpu").precision is None


# float16 scales the loss ----------------------------------------------------------------------------------------------


@pytest.fixture
def half(gpu):
    if reason := gpu.why_no_precision("float16"):
        pytest.skip(reason)
    return gpu


def regression(backend, precision, optimizer):
    """A net whose gradients are far below float16's smallest numbers, and its losses in training."""
    model = xpnet.Sequential([layers.Dense(1)], (4,), backend=backend, precision=precision, seed=0)
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    y = 1e-6 * x.sum(axis=1, keepdims=True)
    model.parameters[0].value = 0.0
    return model.fit(x, y, loss="mse", optimizer=optimizer, epochs=30, batch_size=64, verbose=0)["loss"]


def test_gradients_too_small_for_it_are_not_lost(half, monkeypatch):
    full = regression(half, None, optimizers.SGD(0.05))
    scaled = regression(half, "float16", optimizers.SGD(0.05))
    assert full[-1] < 0.1 * full[0]
    np.testing.assert_allclose(scaled[:8], full[:8], rtol=0.2)
    monkeypatch.setattr(loss_scaling, "_START", 1.0)
    monkeypatch.setattr(loss_scaling, "_LARGEST", 1.0)
    lost = regression(half, "float16", optimizers.SGD(0.05))
    assert lost[-1] > 1.5 * scaled[-1], "without a scale they would be"


class Plain(optimizers.Adam):
    """Adam by its formula, without the fused update."""

    def update(self, *given):
        super().update(*given)


@pytest.mark.parametrize("optimizer", [optimizers.Adam(0.01, weight_decay=0.1), Plain(0.01, weight_decay=0.1)], ids=str)
def test_an_update_whose_gradient_overflows_is_left_out_and_halves_the_scale(half, optimizer):
    model = mlp(half, "float16")
    model.train_on_batch(X, Y, "softmax_cross_entropy", optimizer)
    scaling, memory = model._state.scaling, model._state.memory
    before, slots = model.state_dict(), [half.to_numpy(s) for s in memory.slots.values()]
    scaling.numbers[0] = 1e9
    model.train_on_batch(X, Y)
    np.testing.assert_allclose(half.to_numpy(scaling.numbers), [loss_scaling._LARGEST, 0])
    assert float(half.to_numpy(scaling.gate)) == 0 and memory.step == 2
    for name, value in before.items():
        np.testing.assert_array_equal(model.state_dict()[name], value)
    for slot, old in zip(memory.slots.values(), slots, strict=True):
        np.testing.assert_array_equal(half.to_numpy(slot), old)
    scaling.numbers[0] = 2.0**10
    model.train_on_batch(X, Y)
    assert float(half.to_numpy(scaling.gate)) == 1
    assert (model.state_dict()["0.weight"] != before["0.weight"]).any()


def test_after_many_updates_without_overflow_the_scale_is_doubled(half, monkeypatch):
    monkeypatch.setattr(loss_scaling, "_EVERY", 4)
    model = mlp(half, "float16")
    seen = []
    for _ in range(9):
        model.train_on_batch(X, Y, "softmax_cross_entropy", "sgd")
        seen.append(half.to_numpy(model._state.scaling.numbers).tolist())
    start = 2.0**16
    assert [scale / start for scale, _ in seen] == [1, 1, 1, 2, 2, 2, 2, 4, 4]
    assert [since for _, since in seen] == [1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_penalties_and_accumulation_are_not_scaled(half):
    def grads(precision, accumulate):
        model = xpnet.Sequential([layers.Dense(10, l2=0.1)], (64,), backend=half, precision=precision, seed=0)
        model.fit(X, Y, optimizer=optimizers.SGD(0.0), batch_size=200 // accumulate, accumulate=accumulate, verbose=0)
        return half.to_numpy(model.parameters[0].grad)

    want = grads(None, 1)
    for accumulate in (1, 4):
        np.testing.assert_allclose(grads("float16", accumulate), want, atol=4e-3 * np.abs(want).max())


def test_a_run_in_it_resumes_to_the_bit(half, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scaling, "_EVERY", 3)

    class Stop(callbacks.Callback):
        def on_step_end(self, model, step):
            if step == 7:
                self.run.save(tmp_path / "run.safetensors")

    def run(**options):
        model = mlp(half, "float16")
        history = model.fit(X, Y, epochs=3, batch_size=50, callbacks=[Stop()], verbose=0, **options)
        return model, history

    whole, history = run()
    again, other = run(resume_from=tmp_path / "run.safetensors")
    assert dict(history) == dict(other)
    for name, value in whole.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], value)
    np.testing.assert_array_equal(
        half.to_numpy(whole._state.scaling.numbers), half.to_numpy(again._state.scaling.numbers)
    )
