"""docs/writing-a-layer.md: its blocks run without changes, and its layers work on every device."""

import re
from pathlib import Path

import numpy as np
import pytest
from strict import StrictBackend

import xpnet
from xpnet import layers
from xpnet.errors import ArgumentError, ShapeError

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-layer.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the tests run away from the source tree")

F32 = np.dtype("float32")


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def page():
    """The layers of the page, by name."""
    namespace = {}
    for block in blocks():
        for part in re.split(r"\n\n\n", block):
            if part.startswith(("import ", "class ")):
                exec(compile(part, PAGE.name, "exec"), namespace)
    return namespace


def test_the_blocks_of_the_page_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks():
        exec(compile(block, PAGE.name, "exec"), namespace)
    output = capsys.readouterr().out
    assert float(output.splitlines()[0].removeprefix("mean squared error: ")) < 0.02
    assert [path.name for path in tmp_path.iterdir()] == ["henon.safetensors"]


def causal(page, backend, **kwargs):
    first, second = page["CausalConv1D"](3, 2), page["CausalConv1D"](2, kernel_size=3, dilation=2)
    stack = [first, page["Firing"](), layers.Tanh(), page["DropFeatures"](0.5), second]
    return xpnet.Sequential(stack, (7, 4), backend, **kwargs)


def gated(page, backend):
    squeeze = [layers.GlobalAveragePool2D(), layers.Dense(6), layers.Sigmoid()]
    return xpnet.Sequential([layers.Conv2D(6, 3), page["Gate"](*squeeze)], (5, 4, 2), backend)


def summed(page, backend):
    return xpnet.Sequential([layers.Masking(), layers.Dense(3), page["StepSum"]()], (None, 4), backend)


def swish(page, backend):
    return xpnet.Sequential([layers.Dense(5), page["Swish"]()], (4,), backend)


CASES = pytest.mark.parametrize(
    ("make", "shape"), [(swish, (4,)), (causal, (7, 4)), (gated, (5, 4, 2)), (summed, (6, 4))]
)


@CASES
def test_gradients_of_the_layers_equal_finite_differences(page, backend, rng, make, shape):
    model, x = make(page, backend), rng.normal(size=(5, *shape))
    wrong = xpnet.check_gradients(model, x, rng.normal(size=(5, *model.output_shape)), loss="mse", inputs=True)
    assert max(wrong.values()) < 1e-6, wrong


@CASES
def test_the_layers_read_nothing_back_and_stay_float32(page, rng, make, shape):
    backend = StrictBackend()
    model, x = make(page, backend), backend.asarray(rng.normal(size=(5, *shape)), dtype=F32)
    with backend.no_host_reads(), backend.watch_dtypes() as seen:
        y = model.forward_pass(x, training=True)
        grad_x = model.backward_pass(y)
        model.backward_pass(y, input_grad=False)
        model.forward_pass(x, inference=True)
    assert grad_x.shape == x.shape
    assert F32 in seen and np.dtype("float64") not in seen


def test_the_layers_train_like_the_reference_bit_for_bit(page, reference, rng):
    x, y = rng.normal(size=(20, 7, 4)), rng.normal(size=(20, 7, 2))
    one, other = causal(page, StrictBackend()), causal(page, reference)
    logs = [model.fit(x, y, loss="mse", batch_size=6, epochs=2, verbose=0) for model in (one, other)]
    assert dict(logs[0]) == dict(logs[1])
    for name, value in one.state_dict().items():
        np.testing.assert_array_equal(value, other.state_dict()[name], err_msg=name)


@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (2, 3), (3, 4), (9, 1)])
def test_the_convolution_equals_the_sum_on_the_page(page, backend, rng, kernel_size, dilation):
    weight, x = rng.normal(size=(kernel_size, 4, 3)), rng.normal(size=(2, 7, 4))
    layer = page["CausalConv1D"](3, kernel_size, dilation, weight_initializer=weight)
    layer.build((7, 4), backend=backend, dtype="float64")
    want = np.zeros((2, 7, 3))
    for t in range(7):
        for k in range(kernel_size):
            past = t - (kernel_size - 1 - k) * dilation
            want[:, t] += x[:, past] @ weight[k] if past >= 0 else 0.0
    np.testing.assert_allclose(backend.to_numpy(layer.forward(backend.asarray(x))), want, rtol=1e-12, atol=1e-12)


def test_the_sum_leaves_out_padded_steps(page, backend, rng):
    model, x = summed(page, backend), rng.normal(size=(5, 6, 4))
    x[:, 4:] = 0.0
    np.testing.assert_allclose(model.predict(x), model.predict(x[:, :4]), rtol=1e-5, atol=1e-6)
    assert np.abs(model.predict(x) - model.predict(x[:, :3])).max() > 0.01
    model.forward(x, training=True)
    grad_x = backend.to_numpy(model.layers[-1].backward(backend.asarray(np.ones((5, 3)), dtype=F32)))
    np.testing.assert_array_equal(grad_x, np.broadcast_to(np.arange(6)[:, None] < 4, (5, 6, 3)))


def test_the_layers_can_be_saved_and_loaded(page, rng, tmp_path):
    custom = [page[name] for name in ("CausalConv1D", "Firing", "DropFeatures", "Gate")]
    for model, shape in ((causal(page, "cpu"), (7, 4)), (gated(page, "cpu"), (5, 4, 2))):
        x = rng.normal(size=(3, *shape))
        model.save(tmp_path / "m.safetensors")
        loaded = xpnet.load(tmp_path / "m.safetensors", "cpu", custom_layers=custom)
        np.testing.assert_array_equal(loaded.predict(x), model.predict(x))


def test_the_layers_refuse_invalid_arguments(page):
    with pytest.raises(ArgumentError, match="kernel_size must be an integer of at least 1, not 0"):
        page["CausalConv1D"](4, kernel_size=0)
    assert page["CausalConv1D"](np.int64(4), 2).filters == 4
    with pytest.raises(ShapeError, match=r"layer 0 \(CausalConv1D\).*\(N, 7,\).*Put Reshape"):
        xpnet.Sequential([page["CausalConv1D"](4, 2)], (7,), "cpu")
    with pytest.raises(ShapeError, match=r"Gate.*\(5, 4, 2\) with \(3,\)"):
        xpnet.Sequential([page["Gate"](layers.GlobalAveragePool2D(), layers.Dense(3))], (5, 4, 2), "cpu")
