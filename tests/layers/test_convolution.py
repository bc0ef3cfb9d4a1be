"""Convolutions against loops over every pixel: shapes, values, gradients, memory, and invalid arguments."""

import contextlib
import copy
import itertools
import math
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from blas import blas_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import assert_reproducible
from strict import StrictBackend
from without_numba import formulas_only

import xpnet
from xpnet import layers
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError, StateError

# name: (function that makes the layer, shape of an image)
CASES = {
    "plain": (lambda: layers.Conv2D(3, 3), (5, 6, 2)),
    "the whole image": (lambda: layers.Conv2D(4, (5, 3)), (5, 3, 2)),
    "one by one": (lambda: layers.Conv2D(3, 1), (4, 3, 2)),
    "one by one with strides": (lambda: layers.Conv2D(3, 1, strides=2), (5, 4, 2)),
    "no bias": (lambda: layers.Conv2D(2, 2, use_bias=False), (4, 5, 3)),
    "unequal": (lambda: layers.Conv2D(3, (2, 3), strides=(2, 1), padding=(0, 2), dilation=(1, 2)), (5, 4, 2)),
    "same": (lambda: layers.Conv2D(2, 3, padding="same"), (4, 5, 2)),
    "same, even": (lambda: layers.Conv2D(2, (2, 4), padding="same"), (4, 5, 2)),
    "same with strides": (lambda: layers.Conv2D(3, 3, strides=2, padding="same"), (5, 4, 2)),
    "same, strides beyond the window": (lambda: layers.Conv2D(3, 2, strides=3, padding="same"), (7, 8, 1)),
    "same with dilation": (lambda: layers.Conv2D(2, 3, padding="same", dilation=(2, 3)), (5, 4, 2)),
    "padding beyond the window": (lambda: layers.Conv2D(2, 2, padding=3), (2, 3, 2)),
    "strides with a remainder": (lambda: layers.Conv2D(2, 2, strides=3), (7, 6, 2)),
    "many channels": (lambda: layers.Conv2D(2, 3, 2, padding=(1, 2)), (4, 5, 7)),
    "many channels, dilated": (lambda: layers.Conv2D(2, 3, padding="same", dilation=(2, 3)), (5, 4, 6)),
    "groups": (lambda: layers.Conv2D(6, 3, padding=1, groups=2), (4, 5, 4)),
    "groups of one filter": (lambda: layers.Conv2D(3, 2, groups=3), (4, 3, 6)),
    "as many groups as channels": (lambda: layers.Conv2D(6, 2, strides=2, groups=3), (5, 4, 3)),
    "penalties": (lambda: layers.Conv2D(2, 2, l1=0.05, l2=0.1), (3, 4, 2)),
    "one pixel": (lambda: layers.Conv2D(2, 1), (1, 1, 1)),
    "depthwise": (lambda: layers.DepthwiseConv2D(3), (5, 4, 3)),
    "depthwise, two per channel": (lambda: layers.DepthwiseConv2D(2, 2, "same", depth_multiplier=2), (5, 4, 3)),
    "depthwise, unequal": (lambda: layers.DepthwiseConv2D((3, 2), (1, 2), (2, 0), (2, 1), use_bias=False), (4, 5, 2)),
    "depthwise of one channel": (lambda: layers.DepthwiseConv2D(2, padding=1), (3, 4, 1)),
    "transposed": (lambda: layers.Conv2DTranspose(3, 3), (3, 4, 2)),
    "transposed with strides": (lambda: layers.Conv2DTranspose(2, 3, strides=(2, 3)), (3, 2, 3)),
    "transposed with gaps": (lambda: layers.Conv2DTranspose(2, 2, strides=3, output_padding=(1, 2)), (3, 2, 2)),
    "transposed with padding": (lambda: layers.Conv2DTranspose(2, 4, 2, padding=(1, 2), output_padding=1), (3, 4, 2)),
    "transposed, same": (lambda: layers.Conv2DTranspose(3, 3, strides=2, padding="same"), (3, 4, 2)),
    "transposed, same, with gaps": (lambda: layers.Conv2DTranspose(2, 2, strides=3, padding="same"), (2, 3, 2)),
    "transposed, same, dilated": (lambda: layers.Conv2DTranspose(2, 3, 2, "same", dilation=2), (3, 2, 2)),
    "transposed, dilated": (lambda: layers.Conv2DTranspose(2, (2, 3), dilation=(3, 2), use_bias=False), (2, 3, 2)),
    "transposed in groups": (lambda: layers.Conv2DTranspose(4, 3, 2, groups=2), (3, 2, 6)),
    "transposed, one by one": (lambda: layers.Conv2DTranspose(3, 1), (2, 3, 2)),
}
each_case = pytest.mark.parametrize("name", CASES)


def built(name, backend, dtype="float64", training=True):
    """The layer of this case, built outside a model, with a bias that is not 0."""
    make, shape = CASES[name]
    layer = make()
    layer.build(shape, backend=backend, dtype=dtype)
    layer.context.training = training
    if layer.use_bias:
        layer.bias.value = np.linspace(-1, 1, layer.bias.size)
    return layer


def forward_and_backward(layer, x, grad_y):
    """{"y": y, "x": ∂L/∂x, parameter: its gradient} as host arrays, from host arrays."""
    backend = layer.context.backend
    x, grad_y = (backend.asarray(a, dtype=layer.context.dtype) for a in (x, grad_y))
    y, grad_x = layer.forward(x), layer.backward(grad_y)
    results = {"y": y, "x": grad_x, **{p.name: p.grad for p in layer.parameters}}
    return {name: backend.to_numpy(a).copy() for name, a in results.items()}


def samples(rng, layer, n=3):
    return rng.normal(size=(n, *layer.input_shape)), rng.normal(size=(n, *layer.output_shape))


def assert_close(got, want, rtol=1e-12):
    assert got.keys() == want.keys()
    for name, value in got.items():
        np.testing.assert_allclose(value, want[name], rtol=rtol, atol=rtol * np.abs(want[name]).max(), err_msg=name)


# The formula -------------------------------------------------------------------------------------------------------


def pair(a):
    return (a, a) if isinstance(a, int) else tuple(a)


def extents(layer):
    """The height and width of a window, including the gaps of its dilation."""
    return [d * (k - 1) + 1 for k, d in zip(pair(layer.kernel_size), pair(layer.dilation), strict=True)]


def same_before(count, extent, stride, size):
    """The padding of "same" above or to the left of the image: half of it, rounded down."""
    return max((count - 1) * stride + extent - size, 0) // 2


def slow_convolution(layer, x, weight):
    """The definition, as loops over windows, their cells and the filters."""
    strides, dilation, kernel = pair(layer.strides), pair(layer.dilation), weight.shape[:2]
    size, extent = x.shape[1:3], extents(layer)
    if layer.padding == "same":
        grid = [math.ceil(n / s) for n, s in zip(size, strides, strict=True)]
        before = [same_before(*numbers) for numbers in zip(grid, extent, strides, size, strict=True)]
    else:
        before = [0, 0] if layer.padding == "valid" else pair(layer.padding)
        grid = [(size[i] + 2 * before[i] - extent[i]) // strides[i] + 1 for i in (0, 1)]
    filters, channels = weight.shape[3], weight.shape[2]
    groups = x.shape[3] // channels
    y = np.zeros((len(x), *grid, filters))
    for i, j, a, b, f in itertools.product(*map(range, (*grid, *kernel, filters))):
        row = i * strides[0] + a * dilation[0] - before[0]
        column = j * strides[1] + b * dilation[1] - before[1]
        if 0 <= row < size[0] and 0 <= column < size[1]:
            first = f // (filters // groups) * channels
            y[:, i, j, f] += x[:, row, column, first : first + channels] @ weight[a, b, :, f]
    return y


def slow_transpose(layer, x, weight):
    """The definition: every input pixel is added to a window of a canvas, of which the output is a part."""
    strides, dilation, kernel = pair(layer.strides), pair(layer.dilation), weight.shape[:2]
    grid, extent = x.shape[1:3], extents(layer)
    if layer.padding == "same":
        size = [n * s for n, s in zip(grid, strides, strict=True)]
        before = [same_before(*numbers) for numbers in zip(grid, extent, strides, size, strict=True)]
    else:
        before, extra = [0, 0] if layer.padding == "valid" else pair(layer.padding), pair(layer.output_padding)
        size = [(grid[i] - 1) * strides[i] + extent[i] + extra[i] - 2 * before[i] for i in (0, 1)]
    filters, channels = weight.shape[3], weight.shape[2]
    groups = x.shape[3] // channels
    canvas = np.zeros((len(x), *(2 * before[i] + size[i] + extent[i] for i in (0, 1)), filters))
    for i, j, a, b, f in itertools.product(*map(range, (*grid, *kernel, filters))):
        first = f // (filters // groups) * channels
        row, column = i * strides[0] + a * dilation[0], j * strides[1] + b * dilation[1]
        canvas[:, row, column, f] += x[:, i, j, first : first + channels] @ weight[a, b, :, f]
    return canvas[:, before[0] : before[0] + size[0], before[1] : before[1] + size[1]]


@each_case
def test_outputs_equal_those_of_loops(backend, rng, name):
    layer = built(name, backend)
    x, grad_y = samples(rng, layer)
    results = forward_and_backward(layer, x, grad_y)
    slow = slow_transpose if isinstance(layer, layers.Conv2DTranspose) else slow_convolution
    want = slow(layer, x, backend.to_numpy(layer.weight.value))
    if layer.use_bias:
        want += backend.to_numpy(layer.bias.value)
    assert layer.output_shape == want.shape[1:]
    np.testing.assert_allclose(results["y"], want, rtol=1e-12, atol=1e-12)


@each_case
def test_gradients_equal_finite_differences(backend, rng, name):
    make, shape = CASES[name]
    model = xpnet.Sequential([make()], input_shape=shape, backend=backend)
    x, y = rng.normal(size=(3, *shape)), rng.normal(size=(3, *model.output_shape))
    errors = xpnet.check_gradients(model, x, y, inputs=True, samples=15)
    assert errors.keys() == {*(p.name for p in model.parameters), "inputs"}
    assert max(errors.values()) < 1e-6


def test_gradients_through_several_convolutions_equal_finite_differences(backend, rng):
    """Arrays that a layer keeps for backward must not be overwritten by later layers of other sizes and kinds."""
    stack = [
        layers.Conv2D(4, 3, padding="same"),
        layers.Tanh(),
        layers.Conv2D(6, (1, 2), strides=2, groups=2),
        layers.Tanh(),
        layers.DepthwiseConv2D(2, padding="same"),
        layers.Conv2DTranspose(3, 3, strides=2, groups=3),
        layers.Tanh(),
        layers.Conv2D(2, 5, padding=2),
    ]
    model = xpnet.Sequential(stack, input_shape=(6, 7, 2), backend=backend)
    x, y = rng.normal(size=(2, 6, 7, 2)), rng.normal(size=(2, *model.output_shape))
    assert max(xpnet.check_gradients(model, x, y, inputs=True, samples=15).values()) < 1e-6


@pytest.mark.parametrize(
    "arguments", [{}, {"strides": 2}, {"padding": "same", "strides": (3, 2)}, {"padding": 1}], ids=str
)
def test_a_transposed_convolution_is_the_adjoint_of_a_convolution(backend, rng, arguments):
    """⟨conv(u), v⟩ = ⟨u, transpose(v)⟩ with the weight's last two axes exchanged, if the windows cover the image."""
    weight = rng.normal(size=(3, 3, 2, 4))
    convolution = layers.Conv2D(4, 3, weight_initializer=weight, use_bias=False, **arguments)
    transpose = layers.Conv2DTranspose(2, 3, weight_initializer=weight.swapaxes(2, 3), use_bias=False, **arguments)
    image = (9, 8, 2) if "same" in arguments.values() else (7, 9, 2)
    grid = convolution.build(image, backend=backend, dtype="float64")
    assert transpose.build(grid, backend=backend, dtype="float64") == image
    u, v = rng.normal(size=(2, *image)), rng.normal(size=(2, *grid))
    y = backend.to_numpy(convolution.forward(backend.asarray(u)))
    x = backend.to_numpy(transpose.forward(backend.asarray(v)))
    assert (y * v).sum() == pytest.approx((u * x).sum(), rel=1e-12)


def test_a_depthwise_convolution_equals_one_with_a_group_per_channel(backend, rng):
    weight, x = rng.normal(size=(3, 2, 1, 6)), rng.normal(size=(2, 5, 4, 3))
    depthwise = layers.DepthwiseConv2D((3, 2), padding="same", depth_multiplier=2, weight_initializer=weight)
    grouped = layers.Conv2D(6, (3, 2), padding="same", groups=3, weight_initializer=weight)
    for layer in (depthwise, grouped):
        layer.build(x.shape[1:], backend=backend, dtype="float64")
    grad_y = rng.normal(size=(2, *grouped.output_shape))
    assert_close(forward_and_backward(depthwise, x, grad_y), forward_and_backward(grouped, x, grad_y))


def test_a_one_by_one_convolution_equals_dense(backend, rng):
    weight, x, grad_y = rng.normal(size=(4, 5)), rng.normal(size=(3, 2, 6, 4)), rng.normal(size=(3, 2, 6, 5))
    dense = layers.Dense(5, weight_initializer=weight)
    pixel = layers.Conv2D(5, 1, weight_initializer=weight[None, None])
    for layer in (dense, pixel):
        layer.build(x.shape[1:], backend=backend, dtype="float64")
    got = forward_and_backward(pixel, x, grad_y)
    got["weight"] = got["weight"][0, 0]
    assert_close(got, forward_and_backward(dense, x, grad_y))


# Shapes, names, geometry -------------------------------------------------------------------------------------------

few = st.integers(1, 4)
sizes = few | st.tuples(few, few)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["Conv2D", "DepthwiseConv2D", "Conv2DTranspose"]), image=st.tuples(*[st.integers(1, 12)] * 2),
    kernel=sizes, strides=sizes, dilation=sizes, padding=st.sampled_from(["valid", "same", 0, 1, (0, 2), (3, 1)]),
    groups=st.integers(1, 3), inputs=few, outputs=few, use_bias=st.booleans(),
)  # fmt: skip
def test_shapes_and_parameters_follow_the_arguments(
    kind, image, kernel, strides, dilation, padding, groups, inputs, outputs, use_bias
):
    geometry = {"strides": strides, "padding": padding, "dilation": dilation, "use_bias": use_bias}
    channels = groups * inputs
    if kind == "DepthwiseConv2D":
        layer = layers.DepthwiseConv2D(kernel, depth_multiplier=outputs, **geometry)
        in_channels, filters = 1, channels * outputs
    else:
        in_channels, filters = inputs, groups * outputs
        layer = getattr(layers, kind)(filters, kernel, groups=groups, **geometry)
    expected = []
    sides = (0, 0) if isinstance(padding, str) else pair(padding)
    for n, s, extent, p in zip(image, pair(strides), extents(layer), sides, strict=True):
        if padding == "same":
            expected.append(n * s if kind == "Conv2DTranspose" else math.ceil(n / s))
        elif kind == "Conv2DTranspose":
            expected.append((n - 1) * s + extent - 2 * p)
        else:
            expected.append((n + 2 * p - extent) // s + 1)
    if min(expected) < 1:
        with pytest.raises(ShapeError, match=kind):
            layer.build((*image, channels), backend="cpu")
        return
    assert layer.build((*image, channels), backend="cpu") == (*expected, filters)
    shapes = {"weight": (*pair(kernel), in_channels, filters), **({"bias": (filters,)} if use_bias else {})}
    assert {p.name: p.shape for p in layer.parameters} == shapes
    assert {p.name: p.decay for p in layer.parameters} == {name: name == "weight" for name in shapes}
    x = np.ones((2, *image, channels), np.float32)
    assert layer.forward(x).shape == (2, *expected, filters)
    assert layer.backward(np.ones((2, *expected, filters), np.float32)).shape == x.shape


@pytest.mark.parametrize(
    ("size", "kernel", "strides", "before", "after"),
    [
        (5, 3, 1, 1, 1),
        (5, 3, 2, 1, 1),
        (4, 3, 2, 0, 1),
        (4, 2, 1, 0, 1),
        (5, 4, 1, 1, 2),
        (4, 1, 2, 0, 0),
        (7, 2, 3, 0, 1),
    ],
)
def test_the_extra_zero_of_same_is_on_the_last_side(backend, rng, size, kernel, strides, before, after):
    """As in TensorFlow's documentation."""
    weight, x = rng.normal(size=(kernel, 1, 1, 1)), rng.normal(size=(1, size, 1, 1))
    same, valid = (
        layers.Conv2D(1, (kernel, 1), (strides, 1), padding, weight_initializer=weight) for padding in ("same", "valid")
    )
    padded = np.pad(x, [(0, 0), (before, after), (0, 0), (0, 0)])
    outputs = []
    for layer, image in ((same, x), (valid, padded)):
        layer.build(image.shape[1:], backend=backend, dtype="float64")
        outputs.append(backend.to_numpy(layer.forward(backend.asarray(image))))
    np.testing.assert_allclose(*outputs, rtol=1e-12)


def test_the_geometry_of_same_for_all_small_sizes(rng):
    for size, kernel, strides, dilation in itertools.product(range(1, 9), range(1, 6), range(1, 5), (1, 2)):
        weight, x = rng.normal(size=(1, kernel, 1, 1)), rng.normal(size=(1, 1, size, 1))
        arguments = ((1, kernel), (1, strides), "same", (1, dilation))
        layer = layers.Conv2D(1, *arguments, weight_initializer=weight)
        assert layer.build(x.shape[1:], backend="cpu", dtype="float64") == (1, math.ceil(size / strides), 1)
        np.testing.assert_allclose(layer.forward(x), slow_convolution(layer, x, weight), rtol=1e-12, atol=1e-12)
        transpose = layers.Conv2DTranspose(1, *arguments, weight_initializer=weight)
        assert transpose.build(x.shape[1:], backend="cpu", dtype="float64") == (1, size * strides, 1)
        np.testing.assert_allclose(transpose.forward(x), slow_transpose(transpose, x, weight), rtol=1e-12, atol=1e-12)


def test_the_fans_of_a_weight_include_the_window():
    layer = layers.Conv2D(50, (3, 5))
    layer.build((9, 9, 20), backend="cpu")
    limit = math.sqrt(6 / (15 * 20 + 15 * 50))
    assert 0.99 * limit < np.abs(layer.weight.value).max() <= limit
    assert not layer.bias.value.any()


# Batches and memory ------------------------------------------------------------------------------------------------


@each_case
def test_chunks_do_not_change_the_result(backend, rng, name, monkeypatch):
    layer = built(name, backend)
    x, grad_y = samples(rng, layer, 7)
    results = []
    for bound in (2**40, 1, 3 * 8 * math.prod(layer.output_shape[:2]) * math.prod(layer.weight.shape[:3])):
        monkeypatch.setattr(backend, "workspace_bytes", bound)
        results.append(forward_and_backward(layer, x, grad_y))
    for other in results[1:]:
        assert_close(other, results[0])


def peak_bytes(call):
    """The most memory that NumPy used during this call, beyond what it used before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.Conv2D(4, 5, padding="same"),
        lambda: layers.Conv2D(4, 5, padding="same", groups=2),
        lambda: layers.Conv2DTranspose(4, 5, padding="same"),
        lambda: layers.DepthwiseConv2D(5, padding="same"),
    ],
    ids=["plain", "groups", "transposed", "depthwise"],
)
def test_im2col_respects_workspace_bytes(backend, rng, monkeypatch, make):
    """Without a limit, the im2col matrix of this batch would take 25 times as much memory as its images."""
    if backend.name.startswith("gpu"):
        pytest.skip("tracemalloc sees the host's memory")
    image = (12, 12, 4)
    x = backend.asarray(rng.normal(size=(32, *image)), dtype="float32")
    bound = 2 * 25 * x.nbytes // len(x)
    layer = make()
    layer.build(image, backend=backend)

    def step():
        layer.drop_workspaces()
        layer.backward(layer.forward(x))

    step()
    monkeypatch.setattr(backend, "workspace_bytes", bound)
    # y, ∂L/∂x, some temporary arrays of the same size, and two im2col matrices: 8 + 2 · 2 · 25 / 32 < 12 < 25.
    assert peak_bytes(step) < 12 * x.nbytes
    allocated, empty = [], backend.empty

    def counted(shape, dtype):
        allocated.append(math.prod(shape) * np.dtype(dtype).itemsize)
        return empty(shape, dtype)

    monkeypatch.setattr(backend, "empty", counted)
    step()
    assert sum(allocated) < bound + 3 * x.nbytes


@each_case
def test_threads_and_chunks_do_not_change_the_result(rng, name, monkeypatch):
    """On the CPU, workers process parts of a batch in parallel, as many as the BLAS has threads."""
    layer = built(name, "cpu")
    x, grad_y = samples(rng, layer, 7)
    results = []
    for threads, bound in ((1, 2**40), (3, 2**40), (3, 1)):
        monkeypatch.setattr(layer.context.backend, "workspace_bytes", bound)
        with blas_threads(threads):
            results.append(forward_and_backward(layer, x, grad_y))
    for other in results[1:]:
        assert_close(other, results[0])


@each_case
def test_compiled_loops_agree_with_the_reference(rng, name):
    layer = built(name, "cpu")
    x, grad_y = samples(rng, layer)
    with layer.context.backend.parallel_region():  # as in a model
        compiled = forward_and_backward(layer, x, grad_y)
        with formulas_only():
            assert_close(compiled, forward_and_backward(layer, x, grad_y))


@each_case
def test_results_do_not_depend_on_earlier_batches_of_other_sizes(backend, rng, name):
    layer = built(name, backend)
    x, grad_y = samples(rng, layer, 6)
    for rows in (6, 1, 4, 6):
        fresh = built(name, backend)
        fresh.weight.value = layer.weight.value
        assert_close(
            forward_and_backward(layer, x[:rows], grad_y[:rows]), forward_and_backward(fresh, x[:rows], grad_y[:rows])
        )


@each_case
def test_gradients_of_single_images_add_up_to_those_of_the_batch(backend, rng, name):
    layer = built(name, backend)
    x, grad_y = samples(rng, layer, 5)
    whole = forward_and_backward(layer, x, grad_y)
    parts = [forward_and_backward(layer, x[i : i + 1], grad_y[i : i + 1]) for i in range(5)]
    joined = {
        name: np.concatenate([p[name] for p in parts]) if name in ("y", "x") else sum(p[name] for p in parts)
        for name in whole
    }
    assert_close(joined, whole, rtol=1e-11)


def test_inference_between_forward_and_backward_does_not_change_gradients(backend, rng):
    stack = [layers.Conv2D(3, 3, groups=1), layers.Conv2DTranspose(4, 2, groups=1), layers.DepthwiseConv2D(2)]
    model = xpnet.Sequential(stack, input_shape=(5, 4, 2), backend=backend)
    x, grad = rng.normal(size=(4, 5, 4, 2)), rng.normal(size=(4, *model.output_shape))
    gradients = []
    for disturbed in (False, True):
        model.forward(x, training=True)
        if disturbed:
            model.predict(rng.normal(size=(9, 5, 4, 2)))
        grad_x = model.backward(grad)
        gradients.append([backend.to_numpy(a).copy() for a in (grad_x, *(p.grad for p in model.parameters))])
    for got, want in zip(*gradients, strict=True):
        np.testing.assert_array_equal(got, want)


def memory_layouts(backend, a):
    """The same numbers on the device: in C order, with gaps, reversed, and with channels first."""
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]))
    wide[..., ::2] = a
    yield backend.asarray(a)
    yield backend.asarray(wide)[..., ::2]
    yield backend.asarray(a[::-1, :, ::-1].copy())[::-1, :, ::-1]
    yield backend.asarray(a.transpose(0, 3, 1, 2).copy()).transpose(0, 2, 3, 1)


@each_case
def test_any_memory_layout_is_accepted_and_not_modified(backend, rng, name):
    layer = built(name, backend)
    x, grad_y = samples(rng, layer)
    want = forward_and_backward(layer, x, grad_y)
    for device_x, device_grad in zip(memory_layouts(backend, x), memory_layouts(backend, grad_y), strict=True):
        assert_close(forward_and_backward(layer, device_x, device_grad), want)
        np.testing.assert_array_equal(backend.to_numpy(device_x), x)
        np.testing.assert_array_equal(backend.to_numpy(device_grad), grad_y)


def test_models_trained_in_threads_equal_models_trained_sequentially():
    def train(seed):
        model = xpnet.Sequential([layers.Conv2D(3, 3), layers.Conv2DTranspose(2, 3)], (6, 5, 2), "cpu", seed)
        rng = np.random.default_rng(seed)
        for _ in range(10):
            trained(model, rng)
        return [p.value.copy() for p in model.parameters]

    with blas_threads(2):
        sequential = [train(seed) for seed in range(4)]
        for got, want in zip(train(0), sequential[0], strict=True):
            np.testing.assert_array_equal(got, want)  # a run is repeatable bit for bit
        with ThreadPoolExecutor(4) as pool:
            concurrent = list(pool.map(train, range(4)))
    for expected, results in zip(sequential, concurrent, strict=True):
        for got, want in zip(results, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_integer_images_are_converted_to_floats(backend):
    x = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    model = xpnet.Sequential([layers.Conv2D(2, 3)], input_shape=(4, 5, 3), backend=backend)
    np.testing.assert_array_equal(model.predict(x), model.predict(x.astype("float32")))


# Work on the device ------------------------------------------------------------------------------------------------


@each_case
def test_float32_stays_float32_and_nothing_is_read_back(backend, rng, name):
    layer = built(name, backend, dtype="float32")
    x, grad_y = (backend.asarray(a, dtype="float32") for a in samples(rng, layer))
    strict = isinstance(backend, StrictBackend)
    with contextlib.ExitStack() as stack:
        if strict:
            stack.enter_context(backend.no_host_reads())
        seen = stack.enter_context(backend.watch_dtypes()) if strict else set()
        y, grad_x = layer.forward(x), layer.backward(grad_y)
    assert {a.dtype for a in (y, grad_x, *(p.grad for p in layer.parameters))} == {np.dtype("float32")}
    assert np.dtype("float64") not in seen
    wide = built(name, backend)
    for ours, theirs in zip(wide.parameters, layer.parameters, strict=True):
        ours.value = theirs.value
    narrow = {"y": y, "x": grad_x, **{p.name: p.grad for p in layer.parameters}}
    assert_close(
        {key: backend.to_numpy(a) for key, a in narrow.items()}, forward_and_backward(wide, x, grad_y), rtol=1e-5
    )


@each_case
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_strict_equals_the_reference_bit_for_bit(reference, rng, name, dtype):
    results = []
    for backend in (reference, StrictBackend()):
        layer = built(name, backend, dtype)
        results.append(forward_and_backward(layer, *samples(np.random.default_rng(1), layer)))
    for key, value in results[0].items():
        assert value.tobytes() == results[1][key].tobytes(), key


@each_case
def test_backward_without_input_grad_computes_the_same_parameter_gradients(backend, rng, name):
    make, shape = CASES[name]
    model = xpnet.Sequential([make()], input_shape=shape, backend=backend, dtype="float64")
    x, grad = rng.normal(size=(3, *shape)), rng.normal(size=(3, *model.output_shape))
    gradients = []
    for wanted in (True, False):
        model.forward(x)
        assert (model.backward(grad, input_grad=wanted) is None) == (not wanted)
        gradients.append([backend.to_numpy(p.grad).copy() for p in model.parameters])
        model.context.store.grads[...] = 0
    for got, want in zip(*gradients, strict=True):
        np.testing.assert_array_equal(got, want)


@each_case
def test_no_memory_is_allocated_for_an_unwanted_input_gradient(backend, rng, name, allocated):
    layer = built(name, backend)
    x, grad_y = (backend.asarray(a) for a in samples(rng, layer))
    layer.forward(x)
    allocated.clear()
    layer.wants_input_grad = False
    assert layer.backward(grad_y) is None
    assert x.shape not in allocated


@pytest.mark.parametrize("name", ["plain", "groups", "depthwise", "transposed with padding"])
def test_backward_before_forward_is_refused(name, rng):
    with pytest.raises(StateError, match=r"backward uses work\.\w+, but .* no forward pass came before"):
        built(name, "cpu").backward(np.ones((1, *built(name, "cpu").output_shape)))


# Configuration, files, copies --------------------------------------------------------------------------------------


@each_case
def test_config_and_repr_reproduce_the_layer(name):
    assert_reproducible(CASES[name][0]())


def all_kinds(backend, **kwargs):
    stack = [
        layers.Conv2D(4, (3, 2), strides=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2),
        layers.Conv2DTranspose(2, 3, 2, output_padding=(0, 1), groups=2),
        layers.Conv2D(2, 1, use_bias=False),
    ]
    return xpnet.Sequential(stack, input_shape=(6, 7, 2), backend=backend, **kwargs)


def trained(model, rng, steps=1):
    x = rng.normal(size=(4, *model.input_shape))
    for _ in range(steps):
        model.train_on_batch(x, np.zeros((4, *model.output_shape)), loss="mse", optimizer="adam")
    return x


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(backend, rng, copied):
    model = all_kinds(backend)
    x = trained(model, rng)
    before = model.predict(x)
    other = copied(model)
    np.testing.assert_array_equal(other.predict(x), before)
    trained(other, rng)
    assert (other.predict(x) != before).any()
    np.testing.assert_array_equal(model.predict(x), before)


def test_a_loaded_model_has_the_same_layers_and_predictions(backend, rng, tmp_path):
    model = all_kinds(backend)
    x = trained(model, rng)
    model.save(tmp_path / "m.safetensors")
    loaded = xpnet.load(tmp_path / "m.safetensors", backend=backend)
    assert [layer.get_config() for layer in loaded.layers] == [layer.get_config() for layer in model.layers]
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))


def test_a_model_continues_on_another_device_or_dtype(backend, rng):
    model = all_kinds(backend)
    x = trained(model, rng)
    before = model.predict(x)
    for target, dtype in ((StrictBackend(1), "float32"), ("cpu", "float64"), (backend, "float32")):
        model.to(target, dtype=dtype)
        np.testing.assert_allclose(model.predict(x), before, rtol=1e-4, atol=1e-6)
    trained(model, rng)
    assert (model.predict(x) != before).any()


# Invalid arguments and shapes --------------------------------------------------------------------------------------

NOT_SIZES = [0, -1, 1.5, "3", None, (1, 2, 3), (1,), (0, 1), (1, 2.5), (), True]


@pytest.mark.parametrize("wrong", NOT_SIZES, ids=repr)
@pytest.mark.parametrize("argument", ["kernel_size", "strides", "dilation"])
@pytest.mark.parametrize("kind", ["Conv2D", "DepthwiseConv2D", "Conv2DTranspose"])
def test_sizes_must_be_integers_or_pairs(kind, argument, wrong):
    arguments = {"kernel_size": 3, **({} if kind == "DepthwiseConv2D" else {"filters": 2})}
    with pytest.raises((ArgumentError, ArgumentTypeError), match=rf"{kind}: {argument} must be"):
        getattr(layers, kind)(**{**arguments, argument: wrong})


@pytest.mark.parametrize("wrong", [-1, 1.5, "full", None, (1, 2, 3), (0, -1), (1,), True], ids=repr)
@pytest.mark.parametrize("kind", ["Conv2D", "DepthwiseConv2D", "Conv2DTranspose"])
def test_padding_must_be_a_name_an_integer_or_a_pair(kind, wrong):
    arguments = {"kernel_size": 3, **({} if kind == "DepthwiseConv2D" else {"filters": 2})}
    with pytest.raises((ArgumentError, ArgumentTypeError), match=rf"{kind}: padding must be"):
        getattr(layers, kind)(padding=wrong, **arguments)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "3", None, (2, 2), True], ids=repr)
@pytest.mark.parametrize(
    ("kind", "argument"),
    [
        ("Conv2D", "filters"),
        ("Conv2D", "groups"),
        ("Conv2DTranspose", "filters"),
        ("Conv2DTranspose", "groups"),
        ("DepthwiseConv2D", "depth_multiplier"),
    ],
)
def test_counts_must_be_positive_integers(kind, argument, wrong):
    arguments = {"kernel_size": 3, **({} if kind == "DepthwiseConv2D" else {"filters": 2})}
    with pytest.raises((ArgumentError, ArgumentTypeError), match=rf"{kind}: {argument} must be"):
        getattr(layers, kind)(**{**arguments, argument: wrong})


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (lambda: layers.Conv2D(4, 3, groups=2), (5, 5, 3), "groups"),
        (lambda: layers.Conv2D(3, 3, groups=2), (5, 5, 4), "groups"),
        (lambda: layers.Conv2DTranspose(4, 3, groups=2), (5, 5, 3), "groups"),
        (lambda: layers.Conv2DTranspose(3, 3, groups=2), (5, 5, 4), "groups"),
        (lambda: layers.Conv2D(4, 6), (5, 7, 3), r"at least 6 .*high.* 5"),
        (lambda: layers.Conv2D(4, (1, 3), dilation=3), (5, 6, 3), r"at least 7 .*wide.* 6"),
        (lambda: layers.Conv2D(4, 8, padding=1), (6, 5, 3), r"at least 6 .*wide"),
        (lambda: layers.DepthwiseConv2D(6), (5, 5, 3), "at least 6"),
        (lambda: layers.Conv2DTranspose(4, 3, padding=2), (2, 5, 3), "padding"),
        (lambda: layers.Conv2DTranspose(4, 3, padding=(0, 3)), (5, 4, 3), "padding"),
        (lambda: layers.Conv2D(4, 3), (5, 5), r"images \(N, H, W, channels\), but the input is \(N, 5, 5\)"),
        (lambda: layers.Conv2D(4, 3), (25,), r"images \(N, H, W, channels\), but the input is \(N, 25\)"),
        (lambda: layers.Conv2DTranspose(4, 3), (2, 5, 5, 3), "images"),
        (lambda: layers.DepthwiseConv2D(3), (5, 5), "images"),
    ],
)
def test_invalid_shapes_are_refused_and_the_layer_is_named(make, shape, message):
    with pytest.raises((ShapeError, ArgumentError), match=rf"{type(make()).__name__}.*{message}"):
        make().build(shape, backend="cpu")
    with pytest.raises(ArgumentError, match=rf"layer 1 .*{message}"):
        xpnet.Sequential([layers.Identity(), make()], input_shape=shape, backend="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_padding": -1}, "output_padding must be"),
        ({"output_padding": 1.5}, "output_padding must be"),
        ({"output_padding": 1}, "output_padding must be below the larger of strides and dilation"),
        ({"output_padding": (1, 3), "strides": 3}, "output_padding must be below the larger of strides and dilation"),
        ({"output_padding": 1, "strides": 2, "padding": "same"}, "leave output_padding out"),
    ],
)
def test_output_padding_must_be_below_strides_or_dilation(arguments, message):
    with pytest.raises(ArgumentError, match=f"Conv2DTranspose: .*{message}"):
        layers.Conv2DTranspose(2, 3, **arguments)


@pytest.mark.parametrize("make", [lambda: layers.Conv2D(2, 6, groups=2), lambda: layers.DepthwiseConv2D(6)])
def test_a_layer_can_be_built_after_a_refused_shape(make):
    layer = make()
    for wrong in ((5, 5, 2), (8, 8), (5, 5, 4)):
        with pytest.raises(ArgumentError):
            layer.build(wrong, backend="cpu")
    layer.build((8, 7, 4), backend="cpu")
    assert layer.forward(np.ones((1, 8, 7, 4), np.float32)).shape == (1, *layer.output_shape)


def test_depth_multiplier_may_be_an_integral_float():
    layer = layers.DepthwiseConv2D(3, depth_multiplier=2.0)
    assert xpnet.Sequential([layer], (8, 8, 4), "cpu").output_shape == (6, 6, 8)


@pytest.mark.parametrize("more", [{"dilation": 2**62}, {"strides": 2**40}, {"padding": 2**31}])
def test_windows_that_reach_beyond_32_bits_are_refused(more):
    for layer, shape in (
        (layers.Conv2D(1, 2, **{"padding": "same"} | more), (4, 4, 1)),
        (layers.Conv1D(1, 2, **{"padding": "same"} | more), (4, 1)),
    ):
        with pytest.raises(ArgumentError, match="windows reach farther than 2147483647 pixels"):
            layer.build(shape, backend="cpu")
