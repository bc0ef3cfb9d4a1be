"""Pooling and upsampling against loops over every window: shapes, values, ties, gradients, and invalid arguments."""

import contextlib
import copy
import itertools
import math
import pickle

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
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError

# name: (function that makes the layer, shape of an image)
POOLS = {
    "max": (lambda: layers.MaxPool2D(), (4, 6, 2)),
    "max with a remainder": (lambda: layers.MaxPool2D(2), (5, 7, 3)),
    "max, overlapping": (lambda: layers.MaxPool2D(3, 1), (5, 4, 2)),
    "max, overlapping by one": (lambda: layers.MaxPool2D(3, strides=2), (7, 5, 2)),
    "max, padded": (lambda: layers.MaxPool2D(3, strides=2, padding=1), (5, 6, 2)),
    "max, unequal": (lambda: layers.MaxPool2D((2, 3), (1, 2), (1, 0)), (3, 7, 2)),
    "max, same": (lambda: layers.MaxPool2D(3, 2, "same"), (4, 5, 3)),
    "max, same, strides beyond the window": (lambda: layers.MaxPool2D(2, 3, "same"), (7, 8, 1)),
    "max of the whole": (lambda: layers.MaxPool2D((3, 4)), (3, 4, 2)),
    "max of one pixel": (lambda: layers.MaxPool2D(1), (3, 2, 2)),
    "average": (lambda: layers.AvgPool2D(), (4, 6, 2)),
    "average with a remainder": (lambda: layers.AvgPool2D((3, 2)), (5, 7, 3)),
    "average, overlapping": (lambda: layers.AvgPool2D(3, 1), (5, 4, 2)),
    "average, padded": (lambda: layers.AvgPool2D(3, 2, padding=1), (5, 6, 2)),
    "average, padded, not counted": (lambda: layers.AvgPool2D(3, 2, 1, count_include_pad=False), (5, 6, 2)),
    "average, unequal": (lambda: layers.AvgPool2D((2, 4), (1, 2), (1, 2), count_include_pad=False), (3, 7, 2)),
    "average, same": (lambda: layers.AvgPool2D(3, 2, "same"), (4, 5, 3)),
    "average, same, not counted": (lambda: layers.AvgPool2D(3, 2, "same", count_include_pad=False), (4, 5, 3)),
    "average of the whole": (lambda: layers.AvgPool2D((3, 4)), (3, 4, 2)),
}
OTHERS = {
    "global average": (lambda: layers.GlobalAveragePool2D(), (3, 5, 4)),
    "global average of one pixel": (lambda: layers.GlobalAveragePool2D(), (1, 1, 2)),
    "global maximum": (lambda: layers.GlobalMaxPool2D(), (3, 5, 4)),
    "zeros around": (lambda: layers.ZeroPadding2D(2), (3, 5, 4)),
    "zeros, unequal": (lambda: layers.ZeroPadding2D(((1, 0), (2, 3))), (2, 3, 2)),
    "nearest": (lambda: layers.Upsample2D(), (3, 2, 2)),
    "nearest, unequal": (lambda: layers.Upsample2D((1, 3)), (2, 3, 2)),
    "bilinear": (lambda: layers.Upsample2D(2, "bilinear"), (3, 4, 2)),
    "bilinear, unequal": (lambda: layers.Upsample2D((3, 4), interpolation="bilinear"), (2, 5, 1)),
    "bilinear of one pixel": (lambda: layers.Upsample2D((2, 1), "bilinear"), (1, 1, 3)),
}
CASES = {**POOLS, **OTHERS}
each_case = pytest.mark.parametrize("name", CASES)


def built(name, backend, dtype="float64"):
    make, shape = CASES[name]
    layer = make()
    layer.build(shape, backend=backend, dtype=dtype)
    layer.context.training = True
    return layer


def forward_and_backward(layer, x, grad_y):
    """(y, ∂L/∂x) as host arrays, from host arrays."""
    backend = layer.context.backend
    x, grad_y = (backend.asarray(a, dtype=layer.context.dtype) for a in (x, grad_y))
    y = layer.forward(x)
    return backend.to_numpy(y).copy(), backend.to_numpy(layer.backward(grad_y)).copy()


def distinct(rng, shape):
    """Numbers that differ by at least 0.01, so that the finite differences of `check_gradients` cause no ties."""
    return 0.01 * rng.permutation(math.prod(shape)).reshape(shape) - 0.5


def samples(rng, layer, n=3):
    return distinct(rng, (n, *layer.input_shape)), rng.normal(size=(n, *layer.output_shape))


# The formula -------------------------------------------------------------------------------------------------------


def pair(a):
    return (a, a) if isinstance(a, int) else tuple(a)


def geometry(layer, image):
    """(numbers of rows and columns of windows, padding above and to the left)."""
    size = pair(layer.pool_size)
    strides = size if layer.strides is None else pair(layer.strides)
    if layer.padding != "same":
        before = (0, 0) if layer.padding == "valid" else pair(layer.padding)
        return [(image[i] + 2 * before[i] - size[i]) // strides[i] + 1 for i in (0, 1)], before
    grid = [math.ceil(n / s) for n, s in zip(image, strides, strict=True)]
    return grid, [max((grid[i] - 1) * strides[i] + size[i] - image[i], 0) // 2 for i in (0, 1)]


def windows(layer, x):
    """For each window, ((i, j), positions of its pixels in the image, in row-major order)."""
    size, (grid, before) = pair(layer.pool_size), geometry(layer, x.shape[1:3])
    strides = size if layer.strides is None else pair(layer.strides)
    for i, j in itertools.product(*map(range, grid)):
        top, left = i * strides[0] - before[0], j * strides[1] - before[1]
        cells = itertools.product(range(top, top + size[0]), range(left, left + size[1]))
        yield (i, j), [(h, w) for h, w in cells if 0 <= h < x.shape[1] and 0 <= w < x.shape[2]]


def slow_pool(layer, x, grad_y):
    """(y, ∂L/∂x) by the definition, window by window. The first of equal maxima gets the gradient."""
    y, grad_x = np.zeros((len(x), *geometry(layer, x.shape[1:3])[0], x.shape[3])), np.zeros(x.shape)
    for (i, j), pixels in windows(layer, x):
        for n, c in np.ndindex(len(x), x.shape[3]):
            values = [x[n, h, w, c] for h, w in pixels]
            if isinstance(layer, layers.MaxPool2D):
                best = int(np.argmax(values))  # the first of equal maxima; NaN counts as the largest
                y[n, i, j, c] = values[best]
                grad_x[(n, *pixels[best], c)] += grad_y[n, i, j, c]
            else:
                count = math.prod(pair(layer.pool_size)) if layer.count_include_pad else len(pixels)
                y[n, i, j, c] = sum(values) / count
                for h, w in pixels:
                    grad_x[n, h, w, c] += grad_y[n, i, j, c] / count
    return y, grad_x


@pytest.mark.parametrize("name", POOLS)
def test_pooling_equals_loops(backend, rng, name):
    layer = built(name, backend)
    x, grad_y = samples(rng, layer)
    expected = slow_pool(layer, x, grad_y)
    assert layer.output_shape == expected[0].shape[1:]
    for got, want in zip(forward_and_backward(layer, x, grad_y), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@each_case
def test_gradients_equal_finite_differences(backend, rng, name):
    make, shape = CASES[name]
    stack = [layers.Conv2D(shape[2], 1, weight_initializer=np.eye(shape[2])[None, None]), make()]
    model = xpnet.Sequential(stack, input_shape=shape, backend=backend)
    x, y = distinct(rng, (3, *shape)), rng.normal(size=(3, *model.output_shape))
    errors = xpnet.check_gradients(model, x, y, inputs=True)
    assert errors.keys() == {"0.weight", "0.bias", "inputs"}
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize("size", [(16, 16), (19, 16)], ids=str)
def test_max_pooling_of_windows_of_more_than_255_cells(backend, rng, size):
    layer = layers.MaxPool2D(size, 1)
    layer.build((20, 17, 1), backend=backend, dtype="float64")
    x, grad_y = np.arange(340.0).reshape(1, 20, 17, 1), rng.normal(size=(1, *layer.output_shape))
    for got, want in zip(forward_and_backward(layer, x, grad_y), slow_pool(layer, x, grad_y), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_the_global_average_and_its_gradient(backend, rng):
    layer = built("global average", backend)
    x, grad_y = samples(rng, layer)
    y, grad_x = forward_and_backward(layer, x, grad_y)
    np.testing.assert_allclose(y, x.mean(axis=(1, 2)), rtol=1e-12)
    np.testing.assert_allclose(grad_x, np.broadcast_to(grad_y[:, None, None] / 15, x.shape), rtol=1e-12)


@pytest.mark.parametrize("values", [None, [-1.0, 0.0, 1.0], [0.0], [-np.inf, 0.0], [np.nan, 1.0]], ids=str)
def test_the_global_maximum_equals_a_window_of_the_whole_image(backend, rng, values):
    layer, whole = built("global maximum", backend), layers.MaxPool2D((3, 5))
    whole.build((3, 5, 4), backend=backend, dtype="float64")
    x, grad_y = samples(rng, layer)
    x = x if values is None else rng.choice(values, x.shape)
    with np.errstate(invalid="ignore"):
        expected = forward_and_backward(whole, x, grad_y[:, None, None])
    got = forward_and_backward(layer, x, grad_y)
    np.testing.assert_array_equal(got[0], expected[0][:, 0, 0])
    np.testing.assert_array_equal(got[1], expected[1])


@pytest.mark.parametrize(
    ("padding", "sides"),
    [
        (1, ((1, 1), (1, 1))), ((2, 0), ((2, 2), (0, 0))), ([[1, 0], [2, 3]], ((1, 0), (2, 3))),
        ((1, (0, 2)), ((1, 1), (0, 2))), (0, ((0, 0), (0, 0))),
    ],
    ids=str,
)  # fmt: skip
def test_zero_padding_and_its_gradient(backend, rng, padding, sides):
    layer = layers.ZeroPadding2D(padding)
    layer.build((3, 2, 2), backend=backend, dtype="float64")
    x, grad_y = samples(rng, layer)
    y, grad_x = forward_and_backward(layer, x, grad_y)
    np.testing.assert_array_equal(y, np.pad(x, ((0, 0), *sides, (0, 0))))
    (top, _), (left, _) = sides
    np.testing.assert_array_equal(grad_x, grad_y[:, top : top + 3, left : left + 2])


@pytest.mark.parametrize("padding", [-1, 1.5, "same", (1, 2, 3), ((1, 2), (3, -4)), (1, None)], ids=str)
def test_zero_padding_refuses_other_sizes(padding):
    with pytest.raises(ArgumentError, match="ZeroPadding2D: padding must be an integer of at least 0"):
        layers.ZeroPadding2D(padding)


def bilinear_matrix(size, factor):
    """(size · factor, size): the weights of the pixels in each new pixel i, centered at (i + ½) / factor - ½."""
    matrix = np.zeros((size * factor, size))
    for i in range(size * factor):
        center = min(max((i + 0.5) / factor - 0.5, 0.0), size - 1.0)
        left = math.floor(center)
        matrix[i, left] += 1 - (center - left)
        matrix[i, min(left + 1, size - 1)] += center - left
    return matrix


@pytest.mark.parametrize("name", [name for name in OTHERS if "nearest" in name or "bilinear" in name])
def test_upsampling_equals_a_matrix_product(backend, rng, name):
    layer = built(name, backend)
    x, grad_y = samples(rng, layer)
    matrix = bilinear_matrix if layer.interpolation == "bilinear" else lambda n, s: np.repeat(np.eye(n), s, axis=0)
    vertical, horizontal = (matrix(n, s) for n, s in zip(x.shape[1:3], pair(layer.size), strict=True))
    y, grad_x = forward_and_backward(layer, x, grad_y)
    np.testing.assert_allclose(y, np.einsum("ih,jw,nhwc->nijc", vertical, horizontal, x), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(
        grad_x, np.einsum("ih,jw,nijc->nhwc", vertical, horizontal, grad_y), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("size", [(3, 4, 6), (2, 1, 1), (5, 5, 1)], ids=str)
def test_average_pooling_inverts_nearest_upsampling(backend, rng, size):
    layer = xpnet.Sequential([layers.Upsample2D(3), layers.AvgPool2D(3)], size, backend, dtype="float64")
    x = rng.normal(size=(2, *size))
    np.testing.assert_allclose(layer.predict(x), x, rtol=1e-12)


# Ties, NaN, infinities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in POOLS if "max" in name])
@pytest.mark.parametrize("values", [[0.0], [-1.0, 0.0, 1.0], [-0.0, 0.0], [-np.inf, 0.0]], ids=str)
def test_the_first_of_equal_maxima_gets_the_gradient(backend, rng, name, values):
    layer = built(name, backend)
    x = rng.choice(values, (3, *layer.input_shape))
    grad_y = rng.integers(-9, 10, (3, *layer.output_shape)).astype(float)
    for got, want in zip(forward_and_backward(layer, x, grad_y), slow_pool(layer, x, grad_y), strict=True):
        np.testing.assert_array_equal(got, want)


def test_max_pooling_ignores_padding(backend):
    layer = layers.MaxPool2D(3, 2, padding=1)
    layer.build((5, 4, 1), backend=backend, dtype="float64")
    y, grad_x = forward_and_backward(layer, np.full((1, 5, 4, 1), -7.0), np.ones((1, *layer.output_shape)))
    assert (y == -7).all() and grad_x.sum() == y.size


@pytest.mark.parametrize(
    "name", ["max", "max, overlapping", "max, same", "average, padded", "global average", "nearest"]
)
def test_nan_propagates(backend, rng, name):
    layer = built(name, backend)
    x, _ = samples(rng, layer, 2)
    x[0, 1, 1, 0] = np.nan
    with np.errstate(invalid="ignore"):
        y = backend.to_numpy(layer.forward(backend.asarray(x)))
    assert np.isnan(y[0, ..., 0]).any()
    assert not np.isnan(y[1]).any() and not np.isnan(y[..., 1:]).any()
    if name in POOLS:
        with np.errstate(invalid="ignore"):
            want, _ = slow_pool(layer, x, np.zeros(y.shape))
        np.testing.assert_array_equal(np.isnan(y), np.isnan(want))


@pytest.mark.parametrize("name", [name for name in POOLS if "max" in name])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_a_gradient_of_nan_or_infinity_goes_only_to_the_maximum(backend, rng, name, value):
    layer = built(name, backend)
    x, grad_y = samples(rng, layer, 2)
    grad_y[1, 0, 0, 0] = value
    with np.errstate(invalid="ignore"):
        _, got = forward_and_backward(layer, x, grad_y)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(slow_pool(layer, x, grad_y)[1]))


# Shapes, batches, memory -------------------------------------------------------------------------------------------

few = st.integers(1, 4)
sizes = few | st.tuples(few, few)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["MaxPool2D", "AvgPool2D"]), image=st.tuples(*[st.integers(1, 12)] * 2), channels=few,
    size=sizes, strides=sizes | st.none(), padding=st.sampled_from(["valid", "same", "half"]),
)  # fmt: skip
def test_shapes_of_pooling_follow_the_arguments(kind, image, channels, size, strides, padding):
    padding = tuple(k // 2 for k in pair(size)) if padding == "half" else padding
    layer = getattr(layers, kind)(size, strides, padding)
    sides = (0, 0) if isinstance(padding, str) else padding
    steps = pair(size if strides is None else strides)
    if padding == "same":
        expected = tuple(math.ceil(n / s) for n, s in zip(image, steps, strict=True))
    else:
        expected = tuple((n + 2 * p - k) // s + 1 for n, p, k, s in zip(image, sides, pair(size), steps, strict=True))
        if any(n + 2 * p < k for n, p, k in zip(image, sides, pair(size), strict=True)):
            with pytest.raises(ShapeError, match=kind):
                layer.build((*image, channels), backend="cpu")
            return
    assert layer.build((*image, channels), backend="cpu") == (*expected, channels)
    assert layer.parameters == []
    x = np.ones((2, *image, channels), np.float32)
    assert layer.forward(x).shape == (2, *expected, channels)
    assert layer.backward(np.ones((2, *expected, channels), np.float32)).shape == x.shape


@settings(max_examples=30, deadline=None)
@given(image=st.tuples(few, few, few), size=sizes, interpolation=st.sampled_from(["nearest", "bilinear"]))
def test_shapes_of_upsampling_follow_the_arguments(image, size, interpolation):
    layer = layers.Upsample2D(size, interpolation)
    height, width = (n * s for n, s in zip(image[:2], pair(size), strict=True))
    assert layer.build(image, backend="cpu") == (height, width, image[2])
    assert layer.forward(np.ones((2, *image), np.float32)).shape == (2, height, width, image[2])
    assert layer.backward(np.ones((2, height, width, image[2]), np.float32)).shape == (2, *image)


def test_the_geometry_of_same_for_all_small_sizes(rng):
    for n, size, strides in itertools.product(range(1, 9), range(1, 6), range(1, 5)):
        for layer in (
            layers.MaxPool2D((1, size), (1, strides), "same"),
            layers.AvgPool2D((size, 1), (strides, 1), "same"),
        ):
            shape = (1, n, 1) if isinstance(layer, layers.MaxPool2D) else (n, 1, 1)
            layer.build(shape, backend="cpu", dtype="float64")
            x, grad_y = samples(rng, layer, 1)
            for got, want in zip(forward_and_backward(layer, x, grad_y), slow_pool(layer, x, grad_y), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@each_case
def test_results_do_not_depend_on_earlier_batches_of_other_sizes(backend, rng, name):
    layer = built(name, backend)
    x, grad_y = samples(rng, layer, 6)
    whole = forward_and_backward(layer, x, grad_y)
    for rows in (1, 4, 6):
        for got, want in zip(forward_and_backward(layer, x[:rows], grad_y[:rows]), whole, strict=True):
            np.testing.assert_allclose(got, want[:rows], rtol=1e-12, atol=1e-14)


@each_case
def test_the_limit_of_the_workspace_does_not_change_the_result(backend, rng, name, monkeypatch):
    layer = built(name, backend)
    x, grad_y = samples(rng, layer, 5)
    whole = forward_and_backward(layer, x, grad_y)
    monkeypatch.setattr(backend, "workspace_bytes", 1)
    for got, want in zip(forward_and_backward(layer, x, grad_y), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


@each_case
def test_compiled_loops_and_threads_agree_with_the_reference_and_one_thread(rng, name):
    layer = built(name, "cpu")
    x, grad_y = samples(rng, layer, 5)
    region = layer.context.backend.parallel_region  # as in a model
    with blas_threads(1), region():
        expected = forward_and_backward(layer, x, grad_y)
    with blas_threads(3), region():
        results = [forward_and_backward(layer, x, grad_y)]
        with formulas_only():
            results.append(forward_and_backward(layer, x, grad_y))
    for result in results:
        for got, want in zip(result, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_inference_between_forward_and_backward_does_not_change_gradients(backend, rng):
    stack = [layers.MaxPool2D(2, 1), layers.Upsample2D(2, "bilinear"), layers.AvgPool2D(3, 2, 1), layers.MaxPool2D(2)]
    model = xpnet.Sequential(stack, input_shape=(5, 4, 2), backend=backend)
    x, grad = rng.normal(size=(4, 5, 4, 2)), rng.normal(size=(4, *model.output_shape))
    gradients = []
    for disturbed in (False, True):
        model.forward(x, training=True)
        if disturbed:
            model.predict(rng.normal(size=(9, 5, 4, 2)))
        gradients.append(backend.to_numpy(model.backward(grad)).copy())
    np.testing.assert_array_equal(*gradients)


def memory_layouts(backend, a):
    """The same numbers on the device: in C order, with gaps, reversed, and with channels first."""
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]))
    wide[..., ::2] = a
    yield backend.asarray(a)
    yield backend.asarray(wide)[..., ::2]
    yield backend.asarray(a[::-1].copy())[::-1]
    yield backend.asarray(np.moveaxis(a, -1, 1).copy()).transpose(0, *range(2, a.ndim), 1)


@each_case
def test_any_memory_layout_is_accepted_and_not_modified(backend, rng, name):
    layer = built(name, backend)
    x, grad_y = samples(rng, layer)
    expected = forward_and_backward(layer, x, grad_y)
    for device_x, device_grad in zip(memory_layouts(backend, x), memory_layouts(backend, grad_y), strict=True):
        for got, want in zip(forward_and_backward(layer, device_x, device_grad), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
        np.testing.assert_array_equal(backend.to_numpy(device_x), x)
        np.testing.assert_array_equal(backend.to_numpy(device_grad), grad_y)


# Work on the device ------------------------------------------------------------------------------------------------


@each_case
def test_float32_stays_float32_and_nothing_is_read_back(backend, rng, name):
    layer = built(name, backend, dtype="float32")
    x, grad_y = (backend.asarray(a, dtype="float32") for a in samples(rng, layer))
    with contextlib.ExitStack() as stack:
        seen = set()
        if isinstance(backend, StrictBackend):
            stack.enter_context(backend.no_host_reads())
            seen = stack.enter_context(backend.watch_dtypes())
        results = layer.forward(x), layer.backward(grad_y)
    assert {a.dtype for a in results} == {np.dtype("float32")}
    assert np.dtype("float64") not in seen
    for got, want in zip(results, forward_and_backward(built(name, backend), x, grad_y), strict=True):
        np.testing.assert_allclose(backend.to_numpy(got), want, rtol=1e-5, atol=1e-5)


@each_case
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_strict_equals_the_reference_bit_for_bit(reference, name, dtype):
    results = []
    for backend in (reference, StrictBackend()):
        layer = built(name, backend, dtype)
        results.append(forward_and_backward(layer, *samples(np.random.default_rng(1), layer)))
    for got, want in zip(*results, strict=True):
        assert got.tobytes() == want.tobytes()


@each_case
def test_the_input_gradient_is_returned_only_if_wanted(backend, rng, name):
    make, shape = CASES[name]
    model = xpnet.Sequential([make(), layers.Flatten(), layers.Dense(2)], input_shape=shape, backend=backend)
    model.forward(rng.normal(size=(3, *shape)))
    assert model.backward(np.ones((3, 2)), input_grad=False) is None
    assert model.backward(np.ones((3, 2))).shape == (3, *shape)


@each_case
def test_no_memory_is_allocated_for_an_unwanted_input_gradient(backend, rng, name, allocated):
    layer = built(name, backend)
    x, grad_y = (backend.asarray(a) for a in samples(rng, layer))
    layer.forward(x)
    allocated.clear()
    layer.wants_input_grad = False
    assert layer.backward(grad_y) is None
    assert not allocated


# Configuration, files, copies --------------------------------------------------------------------------------------


@each_case
def test_config_and_repr_reproduce_the_layer(name):
    assert_reproducible(CASES[name][0]())


def test_files_copies_and_moves_keep_layers_and_predictions(backend, rng, tmp_path):
    stack = [
        layers.MaxPool2D(3, (2, 1), padding=(1, 0)),
        layers.Upsample2D((1, 2), "bilinear"),
        layers.AvgPool2D((2, 3), 1, "same", count_include_pad=False),
        layers.Conv2D(2, 1),
        layers.GlobalAveragePool2D(),
    ]
    model = xpnet.Sequential(stack, input_shape=(6, 7, 2), backend=backend)
    x = rng.normal(size=(4, 6, 7, 2))
    model.train_on_batch(x, np.zeros((4, 2)), loss="mse", optimizer="adam")
    before = model.predict(x)
    model.save(tmp_path / "m.safetensors")
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), xpnet.load(tmp_path / "m.safetensors", backend)]
    for other in others:
        assert [layer.get_config() for layer in other.layers] == [layer.get_config() for layer in model.layers]
        np.testing.assert_array_equal(other.predict(x), before)
    for target, dtype in ((StrictBackend(1), "float32"), ("cpu", "float64"), (backend, "float32")):
        np.testing.assert_allclose(model.to(target, dtype=dtype).predict(x), before, rtol=1e-4, atol=1e-6)


# Invalid arguments and shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "3", (1, 2, 3), (1,), (0, 1), (1, 2.5), True], ids=repr)
@pytest.mark.parametrize(
    ("kind", "argument"),
    [
        ("MaxPool2D", "pool_size"),
        ("MaxPool2D", "strides"),
        ("AvgPool2D", "pool_size"),
        ("AvgPool2D", "strides"),
        ("Upsample2D", "size"),
    ],
)
def test_sizes_must_be_integers_or_pairs(kind, argument, wrong):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=rf"{kind}: {argument} must be"):
        getattr(layers, kind)(**{argument: wrong})


@pytest.mark.parametrize("wrong", [-1, 1.5, "full", None, (1, 2, 3), (0, -1), True], ids=repr)
@pytest.mark.parametrize("kind", ["MaxPool2D", "AvgPool2D"])
def test_padding_must_be_a_name_an_integer_or_a_pair(kind, wrong):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=rf"{kind}: padding must be"):
        getattr(layers, kind)(3, padding=wrong)


@pytest.mark.parametrize("wrong", ["linear", "Bicubic", None, 2], ids=repr)
def test_interpolation_must_be_nearest_or_bilinear(wrong):
    with pytest.raises(
        (ArgumentError, ArgumentTypeError), match='Upsample2D: interpolation must be "nearest" or "bilinear"'
    ):
        layers.Upsample2D(2, interpolation=wrong)


@pytest.mark.parametrize("kind", ["MaxPool2D", "AvgPool2D"])
def test_a_window_that_covers_only_padding_is_refused(kind):
    with pytest.raises(ArgumentError, match=rf"{kind}.*padding"):
        getattr(layers, kind)(2, padding=2).build((4, 4, 1), backend="cpu")


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (lambda: layers.MaxPool2D(6), (5, 7, 3), "at least 6 .*high"),
        (lambda: layers.AvgPool2D((1, 8), padding=(0, 1)), (5, 5, 3), "at least 6 .*wide"),
        *(
            (make, shape, r"images \(N, H, W, channels\)")
            for make in (
                lambda: layers.MaxPool2D(),
                lambda: layers.AvgPool2D(),
                lambda: layers.GlobalAveragePool2D(),
                lambda: layers.Upsample2D(),
            )
            for shape in ((4, 4), (16,), (2, 4, 4, 1))
        ),
    ],
)
def test_invalid_shapes_are_refused_and_the_layer_is_named(make, shape, message):
    with pytest.raises(ShapeError, match=rf"{type(make()).__name__}.*{message}"):
        make().build(shape, backend="cpu")
    with pytest.raises(ShapeError, match=rf"layer 1 .*{message}"):
        xpnet.Sequential([layers.Identity(), make()], input_shape=shape, backend="cpu")


@pytest.mark.parametrize("pool", [
    layers.MaxPool2D(2), layers.MaxPool2D(3, 2, 1), layers.MaxPool2D(2, padding="same"), layers.MaxPool1D(3, 2, 1),
])  # fmt: skip
def test_pooling_before_relu_equals_relu_before_pooling_bit_for_bit(backend, rng, pool):
    class PlainReLU(layers.ReLU):
        """A subclass, which may compute something else and is therefore not reordered."""

    x = rng.integers(-3, 3, size=(5, 7, 6, 3)).astype(np.float32)  # many ties, and windows without a positive number
    x[0, 0, 0, 0] = np.nan
    x, results = x[:, :, 0] if isinstance(pool, layers.MaxPool1D) else x, []
    for relu in (layers.ReLU, PlainReLU):
        stack = [relu(), type(pool)(**pool.get_config()), relu(), layers.Flatten()]
        model = xpnet.Sequential(stack, x.shape[1:], backend)
        order = [type(site.layer).__name__ for site in model._executor.sites]
        assert (order.index(type(pool).__name__) == 0) == (relu is layers.ReLU)
        y = backend.to_numpy(model.forward(x, training=True))
        results.append((y, backend.to_numpy(model.backward(np.arange(y.size, dtype="float32").reshape(y.shape) - 50))))
    for reordered, plain in zip(*results, strict=True):
        np.testing.assert_array_equal(reordered, plain)


def test_the_mean_of_many_pixels_is_exact(backend):
    size = 512 if backend.name == "cpu" else 256
    x = np.full((1, size, size, 3), 0.1, np.float32)
    for layer in (layers.GlobalAveragePool2D(), layers.AvgPool2D(size)):
        model = xpnet.Sequential([layer], (size, size, 3), backend)
        np.testing.assert_allclose(model.predict(x).ravel(), 0.1, rtol=1e-6)
