"""The compiled loops of the CPU against the reference formulas, and the allocations of a step."""

import copy
import gc
import re
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import every
import numpy as np
import pytest
from blas import blas_threads
from without_numba import formulas_only

import xpnet
from xpnet import layers, losses, metrics, optimizers
from xpnet.backends import Backend
from xpnet.backends.cpu import attention, operators, recurrent
from xpnet.backends.reference.windows import Windows
from xpnet.capture import loops as fusing
from xpnet.data.preparation import prepare
from xpnet.layers.context import Workspace
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.step import TrainingStep

loops = pytest.importorskip("xpnet.backends.cpu.loops", reason="Numba is not installed")

DTYPES = ["float32", "float64"]
REFERENCE = Backend("reference", np)


@pytest.fixture(params=[1, 3])
def cpu(request):
    """The CPU backend in a parallel region, with one worker and with several."""
    backend = xpnet.get_backend("cpu")
    with blas_threads(request.param), backend.parallel_region(request.param > 1):
        yield backend


def assert_close(got, want, dtype):
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(got, want, rtol=20 * eps, atol=20 * eps)


SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_and_its_gradient_equal_the_reference(cpu, rng, dtype):
    x = rng.normal(size=(7, 5)).astype(dtype)
    x[2, :] = SPECIAL
    grad = rng.normal(size=x.shape).astype(dtype)
    grad[3, :] = SPECIAL
    x[3, :] = grad[4, :] = [0, 0, 0, -1, 1]
    grad[4, 0], x[4, 0] = np.inf, 1
    y, want = cpu.relu(x, np.empty_like(x)), REFERENCE.relu(x, np.empty_like(x))
    np.testing.assert_array_equal(y, want)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(
            cpu.relu_grad(grad, y, np.empty_like(x)), REFERENCE.relu_grad(grad, want, np.empty_like(x))
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_to_rows_equals_numpy(cpu, rng, dtype):
    a, row = rng.normal(size=(7, 5)).astype(dtype), rng.normal(size=5).astype(dtype)
    np.testing.assert_array_equal(cpu.add_to_rows(a.copy(), row), a + row)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["uint8", "int64", ">i4", "float16", "bool"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_gather_converts_to_another_dtype(cpu, rng, dtype, source, shape):
    a, rows = rng.integers(200, size=(9, *shape)).astype(source), rng.integers(9, size=6)
    out = cpu.gather(a, rows, np.empty((6, *shape), dtype))
    np.testing.assert_array_equal(out, a[rows].astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 2, 37])
def test_add_rows_at_equals_the_reference_bit_for_bit(cpu, rng, dtype, features):
    grad, rows = rng.normal(size=(500, features)).astype(dtype), rng.integers(0, 6, 500)
    got, want = (np.full((7, features), np.nan, dtype) for _ in range(2))
    np.testing.assert_array_equal(cpu.add_rows_at(grad, rows, got), REFERENCE.add_rows_at(grad, rows, want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["uint8", ">i2", "float32"])
@pytest.mark.parametrize("offset", [0.0, -0.5])
def test_rescale_equals_the_reference(cpu, rng, dtype, source, offset):
    x = rng.integers(256, size=(7, 5)).astype(source)
    outs = np.empty(x.shape, dtype), np.empty(x.shape, dtype)
    assert_close(cpu.rescale(x, 1 / 255, offset, outs[0]), REFERENCE.rescale(x, 1 / 255, offset, outs[1]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 3, 10])
def test_count_correct_with_ties_and_nan_equals_the_reference(cpu, rng, dtype, classes):
    outputs = rng.integers(3, size=(400, classes)).astype(dtype)  # few values, so that many are equal
    outputs[rng.random(outputs.shape) < 0.1] = np.nan
    outputs[rng.random(outputs.shape) < 0.1] = np.inf
    labels = rng.integers(-1, classes + 1, size=400)  # some are not a class
    correct, samples = REFERENCE.count_correct(outputs, labels)
    assert correct > 0 and samples == 400
    assert cpu.count_correct(outputs, labels).tolist() == [correct, samples]
    assert cpu.count_correct(outputs, labels.astype(dtype)).tolist() == [correct, samples]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 32, 33])
def test_matmul_of_a_few_rows_and_a_large_transposed_matrix(cpu, rng, dtype, rows):
    a, b = rng.normal(size=(rows, 200)).astype(dtype), rng.normal(size=(300, 200)).astype(dtype)
    out = cpu.matmul(a, b.T, np.full((rows, 300), np.nan, dtype))
    np.testing.assert_allclose(out, a @ b.T, rtol=1e-5, atol=1e-3 if dtype == "float32" else 1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("classes", [2, 10])
def test_cross_entropy_equals_the_reference(cpu, rng, dtype, smoothing, classes):
    logits = (10 * rng.normal(size=(9, classes))).astype(dtype)
    logits[0, 1], logits[1, 0], logits[2, 0], logits[3, 1] = 1e4, -1e4, np.nan, np.inf
    if not smoothing:
        logits[4, 0] = -np.inf
    labels = rng.integers(classes, size=9)
    labels[4] = 1
    outs = [(np.empty(9, dtype), np.empty_like(logits)) for _ in range(2)]
    got = cpu.cross_entropy(logits, labels, smoothing, *outs[0])
    with np.errstate(invalid="ignore"):
        want = REFERENCE.cross_entropy(logits, labels, smoothing, *outs[1])
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs, dtype)
    finite = np.isfinite(logits).all(axis=1)
    assert np.isfinite(got[0][finite]).all()
    assert np.isnan(got[0][2]) and np.isnan(got[0][3])  # so that divergence is noticed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_masks_equal_the_reference(cpu, dtype, rate):
    mask = cpu.dropout_mask((5, 2**40, 3), rate, np.empty((11, 70), dtype), first_row=2**32 - 5)
    want = REFERENCE.dropout_mask((5, 2**40, 3), rate, np.empty((11, 70), dtype), first_row=2**32 - 5)
    np.testing.assert_array_equal(mask, want)
    assert len(np.unique(mask)) == 2


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize(
    ("image", "grid", "kernel", "strides", "dilation", "before"),
    [
        ((6, 7), (6, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
        ((6, 7), (4, 5), (3, 3), (1, 1), (1, 1), (0, 0)),
        ((9, 8), (3, 4), (3, 2), (3, 2), (1, 1), (0, 0)),
        ((5, 4), (5, 4), (3, 3), (1, 1), (2, 3), (2, 3)),  # a dilation larger than the image
        ((1, 1), (3, 3), (3, 3), (1, 1), (1, 1), (2, 2)),
        ((4, 4), (3, 3), (4, 4), (2, 2), (1, 1), (2, 2)),
    ],
)
def test_im2col_and_col2im_of_few_channels_equal_the_reference(
    cpu, rng, channels, image, grid, kernel, strides, dilation, before
):
    windows = Windows(image, grid, kernel, strides, dilation, before)
    x = rng.normal(size=(3, *image, channels))
    out = cpu.im2col_layout(np.full((3, *grid, *kernel, channels), np.nan))
    assert not out.flags.c_contiguous or out.size == out.shape[0]  # the layout that this test must cover
    assert np.shares_memory(out.reshape(-1, kernel[0] * kernel[1] * channels), out)
    patches = cpu.im2col(x, windows, out)
    np.testing.assert_array_equal(patches, REFERENCE.im2col(x, windows, np.empty(out.shape)))
    patches[...] = rng.normal(size=out.shape)
    images, want = np.full(x.shape, np.nan), np.empty(x.shape)
    np.testing.assert_allclose(
        cpu.col2im(patches, windows, images), REFERENCE.col2im(patches, windows, want), atol=1e-13
    )


UPDATES = [
    optimizers.SGD(0.1),
    optimizers.SGD(0.1, momentum=0.9),
    optimizers.SGD(0.1, momentum=0.8, nesterov=True),
    optimizers.Adam(0.1),
    optimizers.AdamW(0.1, weight_decay=0.1),
    optimizers.RMSprop(0.1),
]


def trained(optimizer, dtype, rng):
    """A net large enough for compiled loops, with a frozen layer in the middle, after three steps."""
    stack = [layers.Dense(128), layers.ReLU(), layers.Dense(9), layers.ReLU(), layers.Dense(128), layers.Dense(10)]
    model = xpnet.Sequential(stack, (150,), backend="cpu", dtype=dtype)
    stack[2].trainable = False
    x, y = rng.normal(size=(12, 150)), rng.integers(10, size=12)
    history = model.fit(x, y, optimizer=optimizer, batch_size=4, shuffle=False, verbose=0)
    return {**model.state_dict(), "loss": np.array(history["loss"])}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", UPDATES, ids=repr)
def test_training_with_and_without_compiled_loops_agrees(optimizer, dtype):
    compiled = trained(optimizer, dtype, np.random.default_rng(0))
    with formulas_only():
        plain = trained(optimizer, dtype, np.random.default_rng(0))
    tolerance = 1e-3 if dtype == "float32" else 1e-10  # the first steps of Adam are quotients of small numbers
    for name, value in plain.items():
        np.testing.assert_allclose(compiled[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def test_a_custom_update_of_an_optimizer_is_used():
    class AddOne(optimizers.Adam):
        def update(self, xp, w, g, slots, t, rate, k):
            w += 1.0

    after = trained(AddOne(), "float64", np.random.default_rng(0))
    before = xpnet.Sequential([layers.Dense(128)], (150,), backend="cpu", dtype="float64").state_dict()
    np.testing.assert_allclose(after["0.weight"], before["0.weight"] + 3.0)


# Allocations of a step -----------------------------------------------------------------------------------------------

CNN = [
    *[layers.Conv2D(16, 3, padding="same"), layers.ReLU(), layers.MaxPool2D(2), layers.BatchNorm()],
    *[layers.Conv2D(32, 3), layers.ReLU(), layers.MaxPool2D(2), layers.Dropout(0.25), layers.Flatten()],
    layers.Dense(10),
]
NETS = {
    "mlp": ((784,), [layers.Rescale(1 / 255), layers.Dense(128), layers.ReLU(), layers.Dense(10)], "sgd"),
    "cnn": ((28, 28, 1), CNN, "adam"),
}


@pytest.mark.parametrize("batch", [32, 128])
@pytest.mark.parametrize("source", ["uint8", "float32"])
@pytest.mark.parametrize("name", NETS)
def test_a_step_allocates_no_array_of_more_than_4_kilobytes(rng, name, source, batch):
    shape, stack, optimizer = NETS[name]
    model = xpnet.Sequential([copy.deepcopy(layer) for layer in stack], shape, backend="cpu")
    x, y = rng.integers(256, size=(2 * batch, *shape)).astype(source), rng.integers(10, size=2 * batch)
    loss = losses.SoftmaxCrossEntropy()
    accuracy = metrics.get(None, loss)
    state = model._state.begin(model.context, loss, accuracy, optimizers.get(optimizer))
    data, work, step = prepare(model, x, y, loss), Workspace(model.context), TrainingStep(model, state)
    order, sums = rng.permutation(2 * batch), EpochMetrics(model, loss, accuracy, 2)

    def train():
        step(data.batches(work, batch, order), batch, sums.add)

    largest = largest_allocations(train)
    assert max(largest.values(), default=0) <= 4096, largest.most_common(5)


def largest_allocations(work):
    """{line: the most memory that this line of Python allocates while `work` runs, whether it is freed or not}."""
    largest, before_line, line = Counter(), 0, None

    def trace(frame, event, _):
        nonlocal before_line, line
        _, peak = tracemalloc.get_traced_memory()
        if line is not None:
            largest[line] = max(largest[line], peak - before_line)
        line = (frame.f_code.co_filename, frame.f_lineno)
        tracemalloc.reset_peak()
        before_line, _ = tracemalloc.get_traced_memory()
        return trace

    outer = sys.gettrace()
    with blas_threads(1):  # with one thread, only one line runs at a time
        work()
        gc.collect()
        tracemalloc.start()
        try:
            sys.settrace(trace)
            work()
        finally:
            sys.settrace(outer)
            tracemalloc.stop()
    return largest


def test_largest_allocations_finds_a_temporary_array():
    def work():
        len(np.zeros(5000, dtype=np.uint8))

    assert 5000 <= max(largest_allocations(work).values()) < 8000


def test_every_loop_is_used():
    users = operators, attention, recurrent, fusing
    text = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in users)
    used = {*re.findall(r"(?:by_rows\(Backend|loops)\.(\w+)", text)}
    used |= {optimizer.fused(0.1, 1)[0] for optimizer in every.OPTIMIZERS}
    assert {name for name, loop in vars(loops).items() if hasattr(loop, "py_func") and not name.startswith("_")} <= used
