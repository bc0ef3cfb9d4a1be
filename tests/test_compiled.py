"""The CPU's compiled loops against the formulas they are twins of; and a step that allocates nothing of size."""

import copy
import gc
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from blas import limited_to
from without_numba import formulas_only

import xpnet
from xpnet import layers, losses, metrics, optimizers
from xpnet.backends import Backend
from xpnet.backends.sliding import Windows
from xpnet.data import prepare
from xpnet.layers.base import Workspace
from xpnet.step import Figures, Step

kernels = pytest.importorskip("xpnet.backends.cpu_kernels", reason="Numba is not installed")

DTYPES = ["float32", "float64"]
REFERENCE = Backend("reference", np)


@pytest.fixture(params=[1, 3])
def cpu(request):
    """The CPU's backend at work in one part, and in several."""
    backend = xpnet.get_backend("cpu")
    with limited_to(request.param), backend.working(request.param > 1):
        yield backend


def close(got, want, dtype):
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(got, want, rtol=20 * eps, atol=20 * eps)


SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_and_its_gradient(cpu, rng, dtype):
    x = rng.normal(size=(7, 5)).astype(dtype)
    x[2, :] = SPECIAL
    grad = rng.normal(size=x.shape).astype(dtype)
    y, want = cpu.relu(x, np.empty_like(x)), REFERENCE.relu(x, np.empty_like(x))
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(
        cpu.relu_grad(grad, y, np.empty_like(x)), REFERENCE.relu_grad(grad, want, np.empty_like(x))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_added_to_every_row(cpu, rng, dtype):
    a, row = rng.normal(size=(7, 5)).astype(dtype), rng.normal(size=5).astype(dtype)
    np.testing.assert_array_equal(cpu.add_to_rows(a.copy(), row), a + row)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["uint8", "int64", ">i4", "float16", "bool"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_rows_gathered_into_another_dtype(cpu, rng, dtype, given, shape):
    a, rows = rng.integers(200, size=(9, *shape)).astype(given), rng.integers(9, size=6)
    out = cpu.gather(a, rows, np.empty((6, *shape), dtype))
    np.testing.assert_array_equal(out, a[rows].astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["uint8", ">i2", "float32"])
@pytest.mark.parametrize("offset", [0.0, -0.5])
def test_rescale(cpu, rng, dtype, given, offset):
    x = rng.integers(256, size=(7, 5)).astype(given)
    rooms = np.empty(x.shape, dtype), np.empty(x.shape, dtype)
    close(cpu.rescale(x, 1 / 255, offset, rooms[0]), REFERENCE.rescale(x, 1 / 255, offset, rooms[1]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 3, 10])
def test_hits_with_ties_and_nan(cpu, rng, dtype, classes):
    outputs = rng.integers(3, size=(400, classes)).astype(dtype)  # few numbers, so that many are equal
    outputs[rng.random(outputs.shape) < 0.1] = np.nan
    outputs[rng.random(outputs.shape) < 0.1] = np.inf
    labels = rng.integers(-1, classes + 1, size=400)  # some belong to no output
    hits, samples = REFERENCE.count_hits(outputs, labels)
    assert hits > 0 and samples == 400
    assert cpu.count_hits(outputs, labels).tolist() == [hits, samples]
    assert cpu.count_hits(outputs, labels.astype(dtype)).tolist() == [hits, samples]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 32, 33])
def test_a_few_rows_times_a_large_transposed_matrix(cpu, rng, dtype, rows):
    a, b = rng.normal(size=(rows, 200)).astype(dtype), rng.normal(size=(300, 200)).astype(dtype)
    out = cpu.matmul(a, b.T, np.full((rows, 300), np.nan, dtype))
    np.testing.assert_allclose(out, a @ b.T, rtol=1e-5, atol=1e-3 if dtype == "float32" else 1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("classes", [2, 10])
def test_cross_entropy(cpu, rng, dtype, smoothing, classes):
    logits = (10 * rng.normal(size=(9, classes))).astype(dtype)
    logits[0, 1], logits[1, 0], logits[2, 0], logits[3, 1] = 1e4, -1e4, np.nan, np.inf
    if not smoothing:
        logits[4, 0] = -np.inf
    labels = rng.integers(classes, size=9)
    labels[4] = 1
    rooms = [(np.empty(9, dtype), np.empty_like(logits)) for _ in range(2)]
    got = cpu.cross_entropy(logits, labels, smoothing, *rooms[0])
    with np.errstate(invalid="ignore"):
        want = REFERENCE.cross_entropy(logits, labels, smoothing, *rooms[1])
    for ours, theirs in zip(got, want, strict=True):
        close(ours, theirs, dtype)
    finite = np.isfinite(logits).all(axis=1)
    assert np.isfinite(got[0][finite]).all()
    assert np.isnan(got[0][2]) and np.isnan(got[0][3])  # a net that diverges must show


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_masks_are_the_same_bits(cpu, dtype, rate):
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
        ((5, 4), (5, 4), (3, 3), (1, 1), (2, 3), (2, 3)),  # a dilation beyond the image
        ((1, 1), (3, 3), (3, 3), (1, 1), (1, 1), (2, 2)),
        ((4, 4), (3, 3), (4, 4), (2, 2), (1, 1), (2, 2)),
    ],
)
def test_patches_of_few_channels_and_the_way_back(cpu, rng, channels, image, grid, kernel, strides, dilation, before):
    windows = Windows(image, grid, kernel, strides, dilation, before)
    x = rng.normal(size=(3, *image, channels))
    room = cpu.lay_out_patches(np.full((3, *grid, *kernel, channels), np.nan))
    assert not room.flags.c_contiguous or room.size == room.shape[0]  # the layout this test is about
    assert np.shares_memory(room.reshape(-1, kernel[0] * kernel[1] * channels), room)
    patches = cpu.patches(x, windows, room)
    np.testing.assert_array_equal(patches, REFERENCE.patches(x, windows, np.empty(room.shape)))
    patches[...] = rng.normal(size=room.shape)
    folded, want = np.full(x.shape, np.nan), np.empty(x.shape)
    np.testing.assert_allclose(cpu.fold(patches, windows, folded), REFERENCE.fold(patches, windows, want), atol=1e-13)


UPDATES = [
    optimizers.SGD(0.1),
    optimizers.SGD(0.1, momentum=0.9),
    optimizers.SGD(0.1, momentum=0.8, nesterov=True),
    optimizers.Adam(0.1),
    optimizers.AdamW(0.1, weight_decay=0.1),
    optimizers.RMSprop(0.1),
]


def trained(optimizer, dtype, rng):
    """A net large enough for compiled loops, with a frozen layer in its middle, after three steps."""
    stack = [layers.Dense(128), layers.ReLU(), layers.Dense(9), layers.ReLU(), layers.Dense(128), layers.Dense(10)]
    model = xpnet.Sequential(stack, (150,), backend="cpu", dtype=dtype)
    stack[2].trainable = False
    x, y = rng.normal(size=(12, 150)), rng.integers(10, size=12)
    history = model.fit(x, y, optimizer=optimizer, batch_size=4, shuffle=False, verbose=0)
    return {**model.state_dict(), "loss": np.array(history["loss"])}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", UPDATES, ids=repr)
def test_training_with_and_without_them_agrees(optimizer, dtype):
    compiled = trained(optimizer, dtype, np.random.default_rng(0))
    with formulas_only():
        plain = trained(optimizer, dtype, np.random.default_rng(0))
    tolerance = 1e-3 if dtype == "float32" else 1e-10  # Adam's first steps divide small numbers by small numbers
    for name, value in plain.items():
        np.testing.assert_allclose(compiled[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def test_an_optimiser_with_an_update_of_its_own_is_not_passed_over():
    class Backwards(optimizers.Adam):
        def update(self, xp, w, g, slots, t, rate, k):
            w += 1.0

    kept = trained(Backwards(), "float64", np.random.default_rng(0))
    begun = xpnet.Sequential([layers.Dense(128)], (150,), backend="cpu", dtype="float64").state_dict()
    np.testing.assert_allclose(kept["0.weight"], begun["0.weight"] + 3.0)


def test_small_nets_do_without_and_never_load_them(tmp_path):
    import subprocess

    program = """
import sys, numpy, xpnet
from xpnet import layers
model = xpnet.Sequential([layers.Dense(8), layers.ReLU(), layers.Dense(2)], (4,), backend="cpu")
model.fit(numpy.ones((6, 4)), numpy.ones(6, int), verbose=0)
assert "numba" not in sys.modules
model = xpnet.Sequential([layers.Dense(800), layers.ReLU(), layers.Dense(2)], (40,), backend="cpu")
model.fit(numpy.ones((6, 40)), numpy.ones(6, int), verbose=0)
assert "numba" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


# What a step allocates -----------------------------------------------------------------------------------------------

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
@pytest.mark.parametrize("given", ["uint8", "float32"])
@pytest.mark.parametrize("name", NETS)
def test_a_steady_step_makes_no_array_of_more_than_4_kilobytes(rng, name, given, batch):
    shape, stack, optimizer = NETS[name]
    model = xpnet.Sequential([copy.deepcopy(layer) for layer in stack], shape, backend="cpu")
    x, y = rng.integers(256, size=(2 * batch, *shape)).astype(given), rng.integers(10, size=2 * batch)
    loss, state = losses.SoftmaxCrossEntropy(), model._state
    accuracy = metrics.get(None, loss)
    state.begin(model.context, loss, accuracy, optimizers.get(optimizer))
    data, work, step = prepare(model, x, y, loss), Workspace(model.context), Step(model, state)
    order, figures = rng.permutation(2 * batch), Figures(model, accuracy, 2)

    def train():
        step(data.batches(work, batch, order), batch, figures)

    largest = largest_allocations(train)
    assert max(largest.values(), default=0) <= 4096, largest.most_common(5)


def largest_allocations(work):
    """The memory that each line of Python takes for itself at most, given back or not, while `work` runs."""
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
    with limited_to(1):  # one thread, one line at a time
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


def test_the_tool_of_that_test_sees_an_array_that_comes_and_goes():
    def work():
        len(np.zeros(5000, dtype=np.uint8))

    assert 5000 <= max(largest_allocations(work).values()) < 8000
