"""Mixed precision: rounded matrix products, float32 weights, and loss scaling for float16; emulated and on a GPU."""

import copy

import numpy as np
import pytest
from precisions import require_precision
from strict import StrictBackend

import xpnet
from xpnet import attribution, callbacks, datasets, layers, optimizers
from xpnet.errors import ArgumentError
from xpnet.training import loss_scaling

X, Y = (a[:200] for a in datasets.digits())
X = X.reshape(200, 64).astype("float32") / 16
PRECISIONS = ["tf32", "float16", "bfloat16"]
UNIT = {"tf32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
#: How much replays and eager steps may differ: relative, in losses, and absolute, in weights.
EQUAL = 1e-4, 1e-5
#: A replay in bfloat16 rounds less than the eager step.
REPLAYED = {"tf32": EQUAL, "float16": EQUAL, "bfloat16": (1e-3, 4e-3)}


@pytest.fixture(params=PRECISIONS)
def precision(request, gpu):
    require_precision(gpu, request.param)
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
def test_other_devices_refuse_mixed_precision_with_the_reason(name, precision):
    backend = StrictBackend() if name == "strict" else name
    with pytest.raises(ArgumentError) as caught:
        mlp(backend, precision)
    assert str(caught.value) == (
        f'precision="{precision}" is not available on {name}: it needs the tensor cores of a GPU; the CPU would '
        "have to emulate it, more slowly than float32 and less exactly. Leave it out."
    )
    assert mlp(backend, "float32").precision is None


@pytest.mark.parametrize(("major", "refused"), [(7, ["tf32", "bfloat16"]), (6, PRECISIONS), (8, [])])
def test_a_device_without_tensor_cores_for_a_precision_refuses_it(gpu, monkeypatch, major, refused):
    if gpu.name != "emulated":
        pytest.skip("the properties of a real device cannot be changed")
    monkeypatch.setattr(gpu.xp.cuda.runtime, "getDeviceProperties", lambda i: {"major": major})
    for precision in PRECISIONS:
        if precision in refused:
            with pytest.raises(ArgumentError, match=f"it needs compute capability [78].0, and this device has {major}"):
                mlp(gpu, precision)
        else:
            assert mlp(gpu, precision).precision == precision


def smooth(backend, precision=None):
    """A net without ReLU, because rounding could switch gradients of ReLU on or off."""
    stack = [layers.Dense(32), layers.Tanh(), layers.Dense(10)]
    return xpnet.Sequential(stack, (64,), backend=backend, precision=precision, seed=5)


@pytest.mark.parametrize("build", [smooth, cnn])
def test_outputs_and_gradients_differ_only_by_rounding(gpu, precision, build, rng):
    x = X if build is smooth else X.reshape(-1, 8, 8, 1)
    results = []
    for model in (build(gpu), build(gpu, precision)):
        y = gpu.to_numpy(model.forward(x))
        grad_x = gpu.to_numpy(model.backward(np.ones_like(y) / len(y)))
        results.append([y, grad_x, *(gpu.to_numpy(p.grad) for p in model.parameters)])
        assert all(a.dtype == "float32" for a in results[-1])
    for want, got in zip(*results, strict=True):
        error, size = np.abs(got - want).max(), np.abs(want).max()
        assert error < 40 * UNIT[precision] * size + 1e-6
    assert np.abs(results[0][0] - results[1][0]).max() > UNIT[precision] / 100, "no matrix product was rounded"
    assert build(gpu, precision).predict(x).dtype == "float32"


@pytest.mark.parametrize("build", [mlp, cnn])
def test_training_is_close_to_float32_and_steps_are_replayed(gpu, precision, build, monkeypatch):
    check_training(gpu, precision, build, monkeypatch, REPLAYED[precision])


@pytest.mark.usefixtures("exact_replays")
@pytest.mark.parametrize("build", [mlp, cnn])
def test_replays_round_like_eager_steps_without_operators_that_round_less(gpu, precision, build, monkeypatch):
    check_training(gpu, precision, build, monkeypatch, EQUAL)


def check_training(gpu, precision, build, monkeypatch, differences):
    x = X if build is mlp else X.reshape(-1, 8, 8, 1)
    runs = []
    for chosen, graphs in ((None, "1"), (precision, "1"), (precision, "0")):
        monkeypatch.setenv("XPNET_CAPTURE", graphs)
        model, watch = build(gpu, chosen), Watch()
        history = model.fit(x, Y, epochs=6, batch_size=40, callbacks=[watch], verbose=0)
        runs.append((history["loss"], model.state_dict(), watch.captured))
    (full, _, _), (low, state, captured), (eager, want, _) = runs
    np.testing.assert_allclose(low, full, rtol=0.1)
    assert low != full and captured == 1
    relative, absolute = differences
    np.testing.assert_allclose(low, eager, rtol=relative)
    for name, value in want.items():
        assert value.dtype == "float32"
        if build is mlp:  # the gradient of a bias before a BatchNorm is nothing but rounding errors
            np.testing.assert_allclose(state[name], value, rtol=1e-3, atol=absolute)


class Watch(callbacks.Callback):
    """Keeps how many graphs the run captured, and asserts that no step was refused."""

    def on_train_end(self, model):
        assert self.run.executor.fallback_reason in (
            None,
            "the environment variable XPNET_CAPTURE=0 turns captures off",
        )
        self.captured = self.run.executor.captured


def test_a_move_to_a_device_without_the_precision_drops_it(gpu, precision):
    model = mlp(gpu, precision)
    model.fit(X, Y, epochs=1, verbose=0)
    assert model.to("cpu").precision is None
    model.fit(X, Y, epochs=1, verbose=0)
    assert model.to(gpu).precision is None
    other = mlp(gpu, precision)
    assert other.to(gpu, "float64").precision is None and other.predict(X).dtype == "float64"
    assert copy.deepcopy(mlp(gpu, precision)).precision == precision


def test_a_model_file_with_a_precision_loads_on_the_cpu(gpu, precision, tmp_path):
    model = mlp(gpu, precision)
    model.save(tmp_path / "m.safetensors")
    assert xpnet.load(tmp_path / "m.safetensors", backend="cpu").precision is None


# Loss scaling for float16 --------------------------------------------------------------------------------------------


@pytest.fixture
def float16_gpu(gpu):
    """A GPU that supports float16."""
    require_precision(gpu, "float16")
    return gpu


def regression(backend, precision, optimizer):
    """The losses of a training whose gradients are far below the smallest numbers of float16."""
    model = xpnet.Sequential([layers.Dense(1)], (4,), backend=backend, precision=precision, seed=0)
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    y = 1e-6 * x.sum(axis=1, keepdims=True)
    model.parameters[0].value = 0.0
    return model.fit(x, y, loss="mse", optimizer=optimizer, epochs=30, batch_size=64, verbose=0)["loss"]


def test_loss_scaling_preserves_gradients_too_small_for_float16(float16_gpu, monkeypatch):
    full = regression(float16_gpu, None, optimizers.SGD(0.05))
    scaled = regression(float16_gpu, "float16", optimizers.SGD(0.05))
    assert full[-1] < 0.1 * full[0]
    np.testing.assert_allclose(scaled[:8], full[:8], rtol=0.2)
    monkeypatch.setattr(loss_scaling, "_INITIAL_SCALE", 1.0)
    monkeypatch.setattr(loss_scaling, "_MAX_SCALE", 1.0)
    unscaled = regression(float16_gpu, "float16", optimizers.SGD(0.05))
    assert unscaled[-1] > 1.5 * scaled[-1], "without scaling, the gradients must be lost"


class Plain(optimizers.Adam):
    """Adam without the fused update."""

    def update(self, *args):
        super().update(*args)


@pytest.mark.parametrize("optimizer", [optimizers.Adam(0.01, weight_decay=0.1), Plain(0.01, weight_decay=0.1)], ids=str)
def test_an_update_with_an_overflow_is_skipped_and_halves_the_scale(float16_gpu, optimizer):
    model = mlp(float16_gpu, "float16")
    model.train_on_batch(X, Y, "softmax_cross_entropy", optimizer)
    scale, optimizer_state = model._state.loss_scale, model._state.optimizer_state
    before, slots = model.state_dict(), [float16_gpu.to_numpy(s) for s in optimizer_state.slots.values()]
    scale.state[0] = 1e9
    model.train_on_batch(X, Y)
    np.testing.assert_allclose(float16_gpu.to_numpy(scale.state), [loss_scaling._MAX_SCALE, 0])
    assert float(float16_gpu.to_numpy(scale.gate)) == 0 and optimizer_state.step == 2
    for name, value in before.items():
        np.testing.assert_array_equal(model.state_dict()[name], value)
    for slot, old in zip(optimizer_state.slots.values(), slots, strict=True):
        np.testing.assert_array_equal(float16_gpu.to_numpy(slot), old)
    scale.state[0] = 2.0**10
    model.train_on_batch(X, Y)
    assert float(float16_gpu.to_numpy(scale.gate)) == 1
    assert (model.state_dict()["0.weight"] != before["0.weight"]).any()


def test_the_scale_is_doubled_after_many_updates_without_overflow(float16_gpu, monkeypatch):
    monkeypatch.setattr(loss_scaling, "_GROWTH_INTERVAL", 4)
    model = mlp(float16_gpu, "float16")
    seen = []
    for _ in range(9):
        model.train_on_batch(X, Y, "softmax_cross_entropy", "sgd")
        seen.append(float16_gpu.to_numpy(model._state.loss_scale.state).tolist())
    start = 2.0**16
    assert [scale / start for scale, _ in seen] == [1, 1, 1, 2, 2, 2, 2, 4, 4]
    assert [since for _, since in seen] == [1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_penalties_and_accumulation_are_not_scaled(float16_gpu):
    def grads(precision, accumulate):
        model = xpnet.Sequential([layers.Dense(10, l2=0.1)], (64,), backend=float16_gpu, precision=precision, seed=0)
        model.fit(X, Y, optimizer=optimizers.SGD(0.0), batch_size=200 // accumulate, accumulate=accumulate, verbose=0)
        return float16_gpu.to_numpy(model.parameters[0].grad)

    want = grads(None, 1)
    for accumulate in (1, 4):
        np.testing.assert_allclose(grads("float16", accumulate), want, atol=4e-3 * np.abs(want).max())


def test_a_run_in_float16_resumes_bit_for_bit(float16_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scaling, "_GROWTH_INTERVAL", 3)

    class Save(callbacks.Callback):
        def on_step_end(self, model, step):
            if step == 7:
                self.run.save(tmp_path / "run.safetensors")

    def run(**options):
        model = mlp(float16_gpu, "float16")
        history = model.fit(X, Y, epochs=3, batch_size=50, callbacks=[Save()], verbose=0, **options)
        return model, history

    whole, history = run()
    resumed, other = run(resume_from=tmp_path / "run.safetensors")
    assert dict(history) == dict(other)
    for name, value in whole.state_dict().items():
        np.testing.assert_array_equal(resumed.state_dict()[name], value)
    np.testing.assert_array_equal(
        float16_gpu.to_numpy(whole._state.loss_scale.state), float16_gpu.to_numpy(resumed._state.loss_scale.state)
    )


def test_explanations_and_attributions_compute_in_float32_and_leave_the_precision_of_the_model(gpu, precision):
    model, plain = mlp(gpu, precision), mlp(gpu)
    plain.load_state_dict(model.state_dict())
    for look in (
        lambda model: attribution.saliency(model, X[:3], 1),
        lambda model: attribution.occlusion(model, X[:3], 1, size=32),
        lambda model: attribution.maximize_activation(model, 1, steps=2),
        lambda model: xpnet.explain(model, X[:3], Y[:3])["0"].output,
    ):
        np.testing.assert_array_equal(look(model), look(plain))
    assert model.precision == model.context.precision == precision
