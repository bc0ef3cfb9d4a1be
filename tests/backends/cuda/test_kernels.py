"""kernels.cu against the reference formulas for many sizes, compiled by g++ with a shim, and on a real GPU.

Guards surround every array that a kernel writes (see guarded.py), so that a write outside of the array is found.
"""

import functools
import itertools
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from devices import flushes_subnormals
from nvrtc import compiled

from xpnet import layers, optimizers
from xpnet.backends import Backend
from xpnet.backends.cuda import kernels
from xpnet.backends.cuda.cublas import HalfMatrix
from xpnet.backends.reference.fused import OPERATIONS
from xpnet.backends.reference.windows import Windows
from xpnet.optimizers import OptimizerState
from xpnet.parameters import ParameterStore

REFERENCE = Backend("reference", np)
DTYPES = ["float32", "float64"]
SIZES = [1, 2, 31, 255, 256, 257, 1025]  # around the edges of warps and blocks
MATRICES = [(1, 1), (1, 300), (7, 10), (33, 31), (255, 33), (257, 32), (600, 3), (2, 1025), (1030, 4)]
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-30, -1e30]


def assert_close(backend, got, want, dtype, times=20):
    eps = np.finfo(dtype).eps
    scale = max(1.0, float(np.nanmax(np.abs(want), initial=0.0, where=np.isfinite(want)))) if want.size else 1.0
    np.testing.assert_allclose(backend.to_numpy(got), want, rtol=times * eps, atol=times * eps * scale)


def numbers(rng, shape, dtype, special=False):
    x = rng.normal(size=shape).astype(dtype)
    if special:
        flat = x.reshape(-1)
        flat[: len(SPECIAL)] = SPECIAL[: flat.size]
    return x


# Compilation and launches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90, 100])
def test_nvrtc_compiles_every_kernel(architecture, real):
    cubin = compiled(kernels.SOURCE, architecture, f"-DREAL={real}")
    for name in kernels.signatures():
        assert name.encode() in cubin


def test_signatures_are_parsed_from_the_source():
    signatures = kernels.signatures()
    assert set(signatures) == set(re.findall(r"^KERNEL (\w+)", kernels.SOURCE, re.MULTILINE))
    assert [tuple(p) for p in signatures["sigmoid"]] == [
        ("real", True, "x"), ("Index", False, "n"), ("real", True, "out"),
    ]  # fmt: skip
    assert len(signatures["im2col"]) == 7 and signatures["im2col"][3] == ("Windows", False, "windows")
    assert signatures["to_float16"][2] == ("unsigned short", True, "out")


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 28, 196, 641, 65535, 65537, 2**30, 2**31 - 1])
def test_a_division_as_a_multiplication_is_exact(n, rng):
    *_, (divisor, multiplier, shift) = kernels.axes(n)
    i = np.unique(
        np.concatenate([[0, 2**31 - 1], rng.integers(2**31, size=1000), n * rng.integers(2**31 // n, size=99)])
    )
    i = np.unique(np.concatenate([i, i[i > 0] - 1])).astype("uint64")
    quotient = ((i * np.uint64(multiplier) >> np.uint64(32)) + i) >> np.uint64(shift)
    np.testing.assert_array_equal(quotient, i // np.uint64(n))
    assert divisor == n and multiplier < 2**32 and (quotient + i < 2**32).all()


def test_invalid_arguments_of_a_kernel_are_refused(guarded):
    launch = guarded.backend.kernels.launch
    x, y = guarded((4,)), guarded((4,), "float64")
    with pytest.raises(TypeError, match="sigmoid: out must be a contiguous array of real, not float64"):
        launch("sigmoid", np.dtype("float32"), (1,), (32,), {"x": x, "n": 4, "out": y})
    with pytest.raises(TypeError, match="sigmoid: x must be a contiguous array of real"):
        launch("sigmoid", np.dtype("float32"), (1,), (32,), {"x": x[::2], "n": 2, "out": x})
    with pytest.raises(TypeError, match=r"sigmoid: missing arguments \['n'\], unknown arguments \[\]"):
        launch("sigmoid", np.dtype("float32"), (1,), (32,), {"x": x, "out": x})
    with pytest.raises(TypeError, match=r"sigmoid: missing arguments \[\], unknown arguments \['y'\]"):
        launch("sigmoid", np.dtype("float32"), (1,), (32,), {"x": x, "y": x, "n": 4, "out": x})


# Elements -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["relu", "sigmoid", "softplus"])
def test_elementwise_functions_equal_the_reference(guarded, rng, name, size, dtype):
    x = numbers(rng, (size,), dtype, special=True)
    with np.errstate(all="ignore"):
        want = getattr(REFERENCE, name)(x, out=np.empty_like(x))
    assert_close(
        guarded.backend, getattr(guarded.backend, name)(guarded(size, dtype, x), out=guarded(size, dtype)), want, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_of_relu_equals_the_formula(guarded, rng, size, dtype):
    grad, y = numbers(rng, (size,), dtype), np.maximum(numbers(rng, (size,), dtype), 0)
    y[-1] = np.nan
    grad[: size // 4] = np.inf
    got = guarded.backend.relu_grad(guarded(size, dtype, grad), guarded(size, dtype, y), guarded(size, dtype))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(guarded.backend.to_numpy(got), grad * (y != 0))  # NaN for 0 · ∞


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gelu_and_its_slope_equal_the_reference(guarded, rng, size, dtype):
    x = numbers(rng, (size,), dtype, special=True)
    want = [np.empty(size), np.empty(size)]
    with np.errstate(all="ignore"):
        REFERENCE.gelu(x.astype("float64"), *want)
    out, slope = guarded((size,), dtype), guarded((size,), dtype)
    assert guarded.backend.gelu(guarded((size,), dtype, x), out, slope) is out
    for got, exact in zip((out, slope), want, strict=True):
        assert_close(guarded.backend, got, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocabulary", "count", "features"), [(1, 1, 1), (3, 300, 5), (7, 1000, 132), (40, 9, 36)])
def test_rows_added_at_indices_equal_the_reference(guarded, rng, vocabulary, count, features, dtype):
    rows, grad_rows = rng.integers(vocabulary, size=count), numbers(rng, (count, features), dtype)
    want = REFERENCE.add_rows_at(grad_rows.astype("float64"), rows, np.empty((vocabulary, features)))
    arguments = guarded(grad_rows.shape, dtype, grad_rows), guarded(rows.shape, "int64", rows)
    got, again = (guarded.backend.add_rows_at(*arguments, guarded(want.shape, dtype)) for _ in range(2))
    assert_close(guarded.backend, got, want, dtype)
    np.testing.assert_array_equal(*map(guarded.backend.to_numpy, (got, again)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_pairs_equal_the_reference(guarded, rng, dtype):
    x, (cosines, sines) = numbers(rng, (2, 5, 3, 14), dtype), numbers(rng, (2, 5, 7), dtype)
    want = REFERENCE.rotate_pairs(x, cosines, sines, np.empty_like(x))
    in_place = guarded(x.shape, dtype, x)
    angles = guarded(cosines.shape, dtype, cosines), guarded(sines.shape, dtype, sines)
    assert_close(guarded.backend, guarded.backend.rotate_pairs(in_place, *angles, guarded(x.shape, dtype)), want, dtype)
    assert_close(guarded.backend, guarded.backend.rotate_pairs(in_place, *angles, in_place), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["uint8", "real"])
@pytest.mark.parametrize("size", SIZES)
def test_rescale_equals_the_reference(guarded, rng, size, source, dtype):
    x = rng.integers(256, size=size).astype("uint8" if source == "uint8" else dtype)
    want = REFERENCE.rescale(x, 1 / 255, -0.5, np.empty(size, dtype))
    got = guarded.backend.rescale(guarded(size, x.dtype, x), 1 / 255, -0.5, guarded(size, dtype))
    assert_close(guarded.backend, got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_add_to_rows_and_sum_rows_equal_numpy(guarded, rng, shape, dtype):
    a, row = numbers(rng, shape, dtype), numbers(rng, shape[1:], dtype)
    got = guarded.backend.add_to_rows(guarded(shape, dtype, a), guarded(shape[1:], dtype, row))
    np.testing.assert_array_equal(guarded.backend.to_numpy(got), a + row)
    sums = guarded.backend.sum_rows(guarded(shape, dtype, a), guarded(shape[1:], dtype))
    assert_close(guarded.backend, sums, a.sum(axis=0, dtype="float64"), dtype)


@pytest.mark.parametrize("columns", [3, 4, 36, 300])
@pytest.mark.parametrize("rows", [255, 256, 257, 5000, 70_000])
def test_sums_of_many_rows_are_exact_and_reproducible(guarded, rng, rows, columns):
    if rows * columns > 300_000:
        pytest.skip("the emulation would take seconds")
    a = numbers(rng, (rows, columns), "float32") + 100
    backend, device_array = guarded.backend, guarded(a.shape, "float32", a)
    first, second = (backend.to_numpy(backend.sum_rows(device_array, guarded((columns,)))) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, a.sum(axis=0, dtype="float64"), rtol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sum_to_adds_in_double_precision(guarded, rng, size, dtype):
    x, out = numbers(rng, (size,), dtype), guarded((), "float64")
    guarded.backend.sum_to(guarded(size, dtype, x), out)
    np.testing.assert_allclose(float(guarded.backend.to_numpy(out)), x.sum(dtype="float64"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
@pytest.mark.parametrize(
    ("source", "dtype"),
    [("uint8", "uint8"), ("bool", "bool"), ("float32", "float32"), ("int64", "int64"), ("float64", "float64"),
     ("uint8", "float32"), ("uint8", "float64"), ("int32", "float32"), ("int16", "int16")],
)  # fmt: skip
def test_gather_equals_numpy(guarded, rng, rows, shape, source, dtype):
    a, index = rng.integers(2 if source == "bool" else 200, size=(9, *shape)).astype(source), rng.integers(9, size=rows)
    device_array, out = guarded(a.shape, source, a), guarded((rows, *shape), dtype)
    assert guarded.backend.gather(device_array, guarded.backend.asarray(index), out) is out
    np.testing.assert_array_equal(guarded.backend.to_numpy(out), a[index].astype(dtype))


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmaxes_equal_the_reference(guarded, rng, name, shape, dtype):
    x = 10 * numbers(rng, shape, dtype)
    x[0, 0] = -np.inf if shape[1] > 1 else 3
    x[-1, -1] = 1e4
    want = getattr(REFERENCE, name)(x)
    assert_close(
        guarded.backend,
        getattr(guarded.backend, name)(guarded(shape, dtype, x), guarded(shape, dtype)),
        want,
        dtype,
        200,
    )


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [*MATRICES, (1030, 16), (1100, 72)])
def test_relu_grad_sum_rows_in_16_bits(guarded, rng, shape, precision):
    gpu = guarded.backend
    with gpu.device(), gpu.matmul_precision(precision):
        a, b = numbers(rng, shape, "float32"), numbers(rng, shape, "float32")
        a[:, ::2] *= 1e-6  # subnormal in float16
        grad, y = gpu.cast(gpu.asarray(a)), gpu.cast(gpu.asarray(b))
        y.bits[:, ::3] = 0
        out, sums = HalfMatrix(guarded(shape, "uint16"), precision), guarded(shape[1:])
        gpu.relu_grad_sum_rows(grad, y, out, sums)
    assert_launched(gpu, *[f"to_{precision}"] * 2, "relu_grad_sum_rows_in_16_bits")
    want = np.where(gpu.to_numpy(y.bits) == 0, 0, gpu.to_numpy(grad.bits))
    np.testing.assert_array_equal(gpu.to_numpy(out.bits) & 0x7FFF, want & 0x7FFF)
    assert_close(gpu, sums, exact(want, precision).sum(axis=0), "float32")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [*MATRICES, (1030, 16), (1100, 72)])
def test_sum_rows_in_16_bits(guarded, rng, shape, precision):
    gpu = guarded.backend
    with gpu.device(), gpu.matmul_precision(precision):
        a, sums = gpu.cast(gpu.asarray(numbers(rng, shape, "float32"))), guarded(shape[1:])
        gpu.sum_rows(a, sums)
    assert_launched(gpu, f"to_{precision}", "sum_rows_in_16_bits")
    assert_close(gpu, sums, exact(gpu.to_numpy(a.bits), precision).sum(axis=0), "float32")


def exact(bits, precision):
    """The numbers of 16 bits as float64."""
    numbers = bits.view("float16") if precision == "float16" else (bits.astype("uint32") << 16).view("float32")
    return numbers.astype("float64")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [s for s in MATRICES if s[1] > 1])
def test_cross_entropy_and_count_correct_equal_the_reference(guarded, rng, shape, smoothing, dtype):
    backend, logits, labels = guarded.backend, 5 * numbers(rng, shape, dtype), rng.integers(shape[1], size=shape[0])
    device_array, device_labels = guarded(shape, dtype, logits), guarded(shape[0], "int64", labels)
    losses, grad = backend.cross_entropy(
        device_array, device_labels, smoothing, guarded(shape[0], dtype), guarded(shape, dtype)
    )
    want = REFERENCE.cross_entropy(logits, labels, smoothing, np.empty(shape[0], dtype), np.empty_like(logits))
    assert_close(backend, losses, want[0], dtype, 200)
    assert_close(backend, grad, want[1], dtype, 50)
    correct = backend.to_numpy(backend.count_correct(device_array, device_labels))
    np.testing.assert_array_equal(correct, [(logits.argmax(axis=1) == labels).sum(), shape[0]])
    assert correct.dtype == "int64"


@pytest.mark.parametrize("classes", [1, 2, 3, 10])
def test_count_correct_with_ties_and_nan_equals_the_reference(guarded, rng, classes):
    outputs = rng.integers(3, size=(1300, classes)).astype("float32")
    outputs[rng.random(outputs.shape) < 0.1] = np.nan
    outputs[rng.random(outputs.shape) < 0.1] = np.inf
    labels = rng.integers(-1, classes + 1, size=1300)
    got = guarded.backend.count_correct(guarded(outputs.shape, "float32", outputs), guarded(1300, "int64", labels))
    np.testing.assert_array_equal(guarded.backend.to_numpy(got), REFERENCE.count_correct(outputs, labels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in MATRICES if s[1] > 1])
@pytest.mark.parametrize("name", ["normalize_rows", "scale_rows"])
def test_normalized_rows_and_their_gradient_equal_the_reference(guarded, rng, name, shape, dtype):
    x, grad = 3 + 2 * numbers(rng, shape, dtype), numbers(rng, shape, dtype)
    normal, sigma = np.empty_like(x, "float64"), np.empty((shape[0], 1))
    getattr(REFERENCE, name)(x.astype("float64"), 1e-5, normal, sigma)
    normal, sigma = normal.astype(dtype), sigma.astype(dtype)
    backend, device_sigma = guarded.backend, guarded((shape[0], 1), dtype)
    got = getattr(backend, name)(guarded(shape, dtype, x), 1e-5, guarded(shape, dtype), device_sigma)
    assert_close(backend, got, normal, dtype, 100)
    assert_close(backend, device_sigma, sigma, dtype, 100)
    device_array = guarded(shape, dtype, grad)
    arguments = guarded(shape, dtype, normal), guarded((shape[0], 1), dtype, sigma)
    want = getattr(REFERENCE, f"{name}_grad")(grad, normal, sigma, np.empty_like(grad))
    got = getattr(backend, f"{name}_grad")(device_array, *arguments, out=device_array)
    assert_close(backend, got, want, dtype, 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in MATRICES if s[1] > 1])
@pytest.mark.parametrize(
    ("centered", "scaled", "shifted"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_rows_normalized_and_scaled_equal_the_reference(guarded, rng, shape, centered, scaled, shifted, dtype):
    def forward_and_backward(backend, array):
        gamma, beta = (array(shape[1:], a) if given else None for a, given in ((rows[0], scaled), (rows[1], shifted)))
        sums = [array(shape[1:]) if given else None for given in (scaled, shifted)]
        normal, sigma, out = array(shape), array((shape[0], 1)), array(shape)
        y = backend.normalize_and_scale(array(shape, x), centered, 1e-5, gamma, beta, normal, sigma, out)
        back = array(shape)
        backend.normalize_and_scale_grad(array(shape, grad), centered, gamma, normal, sigma, *sums, back)
        return [a for a in (y, normal, sigma, back, *sums) if a is not None]

    x, grad, rows = 3 + 2 * numbers(rng, shape, dtype), numbers(rng, shape, dtype), numbers(rng, (2, shape[1]), dtype)
    want = forward_and_backward(REFERENCE, lambda shape, fill=0: np.full(shape, fill, "float64"))
    got = forward_and_backward(guarded.backend, lambda shape, fill=None: guarded(shape, dtype, fill))
    for a, b in zip(got, want, strict=True):
        assert_close(guarded.backend, a, b, dtype, 100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_features_are_normalized_to_zero(guarded, dtype):
    x, out, normal, sigma = (guarded((3, 7), dtype, 1e7 / 3) for _ in range(4))
    guarded.backend.normalize_and_scale(x, True, 1e-5, None, None, normal, sigma[:, :1].copy(), out)
    assert not guarded.backend.to_numpy(out).any()


# Columns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_moments_and_sum_products_equal_numpy(guarded, rng, shape, dtype):
    x, b, center = 1000 + numbers(rng, shape, dtype), numbers(rng, shape, dtype), numbers(rng, shape[1:], dtype)
    exact, backend = x.astype("float64"), guarded.backend
    mean, variance = backend.moments(guarded(shape, dtype, x))
    np.testing.assert_allclose(backend.to_numpy(mean), exact.mean(axis=0), rtol=8 * np.finfo(dtype).eps)
    np.testing.assert_allclose(backend.to_numpy(variance), exact.var(axis=0), rtol=1e-6, atol=1e-9)
    arguments = guarded(shape, dtype, x), guarded(shape, dtype, b), guarded(shape[1:], dtype, center)
    want = (exact * (b.astype("float64") - center)).sum(axis=0)
    assert_close(backend, backend.sum_products(*arguments, guarded(shape[1:], dtype)), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_scale_shift_and_combine_equal_the_reference(guarded, rng, shape, dtype):
    g, x, (a, b, c, m) = numbers(rng, shape, dtype), numbers(rng, shape, dtype), numbers(rng, (4, shape[1]), dtype)
    device_array = guarded(shape, dtype, x)
    device_a, device_b, device_c, device_m = (guarded(shape[1:], dtype, v) for v in (a, b, c, m))
    want = REFERENCE.scale_shift(x, m, a, b, np.empty_like(x))
    assert_close(
        guarded.backend,
        guarded.backend.scale_shift(device_array, device_m, device_a, device_b, guarded(shape, dtype)),
        want,
        dtype,
    )
    want = REFERENCE.combine(g, a, x, m, b, c, np.empty_like(x))
    got = guarded.backend.combine(
        guarded(shape, dtype, g), device_a, device_array, device_m, device_b, device_c, guarded(shape, dtype)
    )
    assert_close(guarded.backend, got, want, dtype)


# Fused operators ------------------------------------------------------------------------------------------------------


def assert_launched(backend, *names):
    """Assert that the last kernels were these. `kernels_unavailable` has launched a relu before."""
    if backend.name == "emulated":
        assert backend.xp.launches[1:] == list(names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_add_to_rows_relu_is_one_kernel(guarded, rng, shape, dtype):
    a, row = numbers(rng, shape, dtype, special=True), numbers(rng, shape[1:], dtype)
    device_array, out = guarded(shape, dtype, a), guarded(shape, dtype)
    guarded.backend.add_to_rows_relu(device_array, guarded(shape[1:], dtype, row), out)
    assert_launched(guarded.backend, "add_to_rows_relu")
    np.testing.assert_array_equal(guarded.backend.to_numpy(out), np.maximum(a + row, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "formula"), [("add_arrays", np.add), ("multiply_arrays", np.multiply)])
def test_arrays_are_combined_by_one_kernel(guarded, rng, name, formula, size, dtype):
    a, b = numbers(rng, (size,), dtype, special=True), numbers(rng, (size,), dtype)
    device_array = guarded(size, dtype, a)
    getattr(guarded.backend, name)(device_array, guarded(size, dtype, b), device_array)
    assert_launched(guarded.backend, name)
    np.testing.assert_array_equal(guarded.backend.to_numpy(device_array), formula(a, b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 300])
def test_small_operations_are_one_kernel(guarded, rng, size, dtype):
    """All operations, on arrays, on one element and on numbers; the last ones on results of the first."""
    a, b, one = numbers(rng, (size,), dtype, special=True), numbers(rng, (size,), dtype), numbers(rng, (1,), dtype)

    def operations(a, b, one, outs):
        yield from ((name, a, b) if getattr(np, name).nin == 2 else (name, b) for name in OPERATIONS)
        yield from (("multiply", outs[0], 0.1), ("subtract", 2, b), ("divide", one, outs[2]), ("add", a, one))

    count = len(OPERATIONS) + 4
    wanted = [np.zeros(size, dtype) for _ in range(count)]
    outs = [guarded(size, dtype) for _ in range(count)]
    arrays = [guarded(array.shape, dtype, array) for array in (a, b, one)]
    with np.errstate(all="ignore"):
        REFERENCE.elementwise(list(operations(a, b, one, wanted)), wanted)
    guarded.backend.elementwise(list(operations(*arrays, outs)), outs)
    assert_launched(guarded.backend, "elementwise")
    for got, want in zip(outs, wanted, strict=True):
        np.testing.assert_array_equal(guarded.backend.to_numpy(got), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_scale_shift_relu_is_one_kernel(guarded, rng, shape, dtype):
    x, rows = numbers(rng, shape, dtype, special=True), [numbers(rng, shape[1:], dtype) for _ in range(3)]
    out = guarded(shape, dtype)
    arrays = [guarded(a.shape, dtype, a) for a in (x, *rows)]
    with np.errstate(all="ignore"):
        want = REFERENCE.scale_shift_relu(x, *rows, np.empty_like(x))
    guarded.backend.scale_shift_relu(*arrays, out)
    assert_launched(guarded.backend, "scale_shift_relu")
    np.testing.assert_allclose(guarded.backend.to_numpy(out), want, rtol=1e-5 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_sum_rows_and_products_is_one_kernel(guarded, rng, shape, dtype):
    a, b, center = numbers(rng, shape, dtype), numbers(rng, shape, dtype), numbers(rng, shape[1:], dtype)
    arrays = [guarded(array.shape, dtype, array) for array in (a, b, center)]
    sums, products = guarded(shape[1:], dtype), guarded(shape[1:], dtype)
    guarded.backend.sum_rows_and_products(*arrays, sums, products)
    assert_launched(guarded.backend, "sum_rows_and_products")
    a, b = a.astype("float64"), b.astype("float64")
    tolerance = 1e-4 if dtype == "float32" else 1e-9
    for got, want in ((sums, a.sum(0)), (products, (a * (b - center)).sum(0))):
        np.testing.assert_allclose(guarded.backend.to_numpy(got), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_relu_grad_sum_rows_is_one_kernel(guarded, rng, shape, dtype):
    grad, y = numbers(rng, shape, dtype), np.maximum(numbers(rng, shape, dtype), 0)
    out, sums = guarded(shape, dtype), guarded(shape[1:], dtype)
    guarded.backend.relu_grad_sum_rows(guarded(shape, dtype, grad), guarded(shape, dtype, y), out, sums)
    assert_launched(guarded.backend, "relu_grad_sum_rows")
    want = grad * (y != 0)
    np.testing.assert_array_equal(guarded.backend.to_numpy(out), want)
    assert_close(guarded.backend, sums, want.sum(axis=0, dtype="float64"), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [*MATRICES, (32, 10), (100, 81), (128, 65), (900, 10), (8193, 1)])
def test_cross_entropy_sums_is_one_kernel_or_two(guarded, rng, shape, smoothing, dtype):
    backend, rows = guarded.backend, shape[0]
    logits, labels = 5 * numbers(rng, shape, dtype), rng.integers(shape[1], size=rows)
    logits[0, :2] = [40, 40][: shape[1]]
    losses, grad, loss_sum = guarded(rows, dtype), guarded(shape, dtype), guarded((), "float64")
    correct = guarded(2, "int64", [3, 2**40])
    inputs = guarded(shape, dtype, logits), guarded(rows, "int64", labels)
    backend.cross_entropy_sums(*inputs, smoothing, 1 / rows, losses, grad, loss_sum, correct)
    assert_launched(backend, "cross_entropy_sums", *["sum_to"] * (logits.size > 2**13))
    want = REFERENCE.cross_entropy(logits, labels, smoothing, np.empty(rows, dtype), np.empty_like(logits))
    assert_close(backend, losses, want[0], dtype, 200)
    np.testing.assert_allclose(backend.to_numpy(grad), want[1] / rows, rtol=0, atol=200 / rows * np.finfo(dtype).eps)
    np.testing.assert_allclose(backend.to_numpy(loss_sum), backend.to_numpy(losses).sum(dtype="float64"), rtol=1e-13)
    hits = (logits.argmax(axis=1) == labels).sum()
    np.testing.assert_array_equal(backend.to_numpy(correct), [3 + hits, 2**40 + rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 31, 2), (9, 128, 10), (5, 300, 16), (3, 520, 3), (20, 1100, 10)])
@pytest.mark.parametrize("options", ["all", "no bias", "no gradient", "no mask"])
def test_dense_cross_entropy_is_one_kernel(guarded, rng, options, shape, smoothing, dtype):
    (rows, depth, classes), backend = shape, guarded.backend
    h, weight = np.maximum(numbers(rng, (rows, depth), dtype), 0), numbers(rng, (depth, classes), dtype)
    row, labels = numbers(rng, classes, dtype) if options != "no bias" else None, rng.integers(classes, size=rows)
    weight[0] = np.where(np.arange(classes) == 1, np.inf, weight[0]) if options == "no bias" else weight[0]
    want = [np.empty(rows, dtype), np.empty((rows, classes), dtype), np.array([3, 2**40]), np.empty_like(h)]
    want[3] = None if options == "no gradient" else want[3]
    inputs = [None if a is None else guarded(a.shape, dtype, a) for a in (h, weight, row)]
    got = [None if a is None else guarded(a.shape, a.dtype, a) for a in want]
    targets = (smoothing, 1 / rows)
    masked = options != "no mask"
    backend.dense_cross_entropy(*inputs, guarded(rows, "int64", labels), *targets, *got, masked)
    assert_launched(backend, "dense_cross_entropy")
    with np.errstate(invalid="ignore"):
        REFERENCE.dense_cross_entropy(h, weight, row, labels, *targets, *want, masked)
    np.testing.assert_array_equal(backend.to_numpy(got[2]), want[2])
    for mine, reference in zip(got, want, strict=True):
        if mine is not None:
            assert_close(backend, mine, reference, dtype, 500)


@pytest.mark.parametrize("rows", [100, 5000])
def test_cross_entropy_sums_is_reproducible(guarded, rng, rows):
    logits, labels = guarded((rows, 7), "float32", rng.normal(size=(rows, 7))), guarded(rows, "int64")
    labels[...] = 3
    results = []
    for _ in range(2):
        losses, grad, loss_sum = guarded(rows), guarded((rows, 7)), guarded((), "float64")
        guarded.backend.cross_entropy_sums(logits, labels, 0.1, 1 / rows, losses, grad, loss_sum, None)
        results.append([guarded.backend.to_numpy(a).tobytes() for a in (losses, grad, loss_sum)])
    assert results[0] == results[1]


# Windows --------------------------------------------------------------------------------------------------------------

WINDOWS = [
    Windows(image=(1, 1), grid=(1, 1), kernel=(1, 1)),
    Windows(image=(5, 6), grid=(3, 4), kernel=(3, 3)),
    Windows(image=(5, 6), grid=(5, 6), kernel=(3, 3), before=(1, 1)),
    Windows(image=(7, 5), grid=(4, 3), kernel=(2, 3), strides=(2, 2), before=(0, 1)),
    Windows(image=(9, 8), grid=(3, 3), kernel=(2, 2), strides=(3, 3)),  # pixels between windows
    Windows(image=(7, 9), grid=(3, 3), kernel=(2, 3), strides=(2, 3)),  # adjacent, with a row below the last
    Windows(image=(8, 9), grid=(4, 3), kernel=(3, 2), strides=(1, 2), dilation=(2, 3), before=(1, 0)),
    Windows(image=(4, 4), grid=(2, 2), kernel=(17, 16), strides=(1, 1), before=(13, 12)),  # more than 256 cells
]
IMAGES = [(1, 1), (3, 2), (2, 33), (2, 12)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("images", "channels"), IMAGES)
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_im2col_and_col2im_equal_the_reference(guarded, rng, windows, images, channels, dtype):
    shape = (images, *windows.grid, *windows.kernel, channels)
    x, grad = numbers(rng, (images, *windows.image, channels), dtype), numbers(rng, shape, dtype)
    backend, want = guarded.backend, REFERENCE.im2col(x, windows, np.empty(shape, dtype))
    got = backend.im2col(guarded(x.shape, dtype, x), windows, guarded(shape, dtype))
    np.testing.assert_array_equal(backend.to_numpy(got), want)
    got = backend.col2im(guarded(shape, dtype, grad), windows, guarded(x.shape, dtype))
    assert_close(backend, got, REFERENCE.col2im(grad, windows, np.empty_like(x)), dtype)


@pytest.mark.parametrize(("channels", "first", "count"), [(7, 2, 3), (12, 4, 8), (12, 2, 8), (10, 0, 8)])
@pytest.mark.parametrize("windows", WINDOWS[1:4], ids=str)
def test_im2col_and_col2im_of_some_channels_equal_the_reference(guarded, rng, windows, channels, first, count):
    x, part = numbers(rng, (2, *windows.image, channels), "float32"), slice(first, first + count)
    shape, backend = (2, *windows.grid, *windows.kernel, count), guarded.backend
    launched = getattr(backend.xp, "launches", [])
    whole = guarded(x.shape, "float32", x)
    got = backend.im2col(whole[..., part], windows, guarded(shape))
    np.testing.assert_array_equal(
        backend.to_numpy(got), REFERENCE.im2col(x[..., part], windows, np.empty(shape, "float32"))
    )
    backend.col2im(got, windows, out=whole[..., part])
    want = x.copy()
    REFERENCE.col2im(backend.to_numpy(got), windows, out=want[..., part])
    assert_close(backend, whole, want, "float32")
    assert backend.name == "gpu" or {"im2col", "col2im"} <= {name.removesuffix("_of_few") for name in launched}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("images", "channels"), IMAGES)
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_pooling_and_its_gradient_equal_the_reference(guarded, rng, windows, images, channels, dtype):
    x = rng.integers(4, size=(images, *windows.image, channels)).astype(dtype)  # few values, so that many are equal
    x.reshape(-1)[::11] = np.nan
    shape, cells = (images, *windows.grid, channels), windows.kernel[0] * windows.kernel[1]
    choices, backend = np.dtype("uint8" if cells <= 256 else "int32"), guarded.backend
    want, chosen = np.empty(shape, dtype), np.zeros(shape, choices)
    REFERENCE.max_pool(x, windows, want, chosen)
    device_array, choice = guarded(x.shape, dtype, x), guarded(shape, choices)
    np.testing.assert_array_equal(
        backend.to_numpy(backend.max_pool(device_array, windows, guarded(shape, dtype), choice)), want
    )
    np.testing.assert_array_equal(backend.to_numpy(choice), chosen)
    grad = numbers(rng, shape, dtype)
    device_grad = guarded(shape, dtype, grad)
    got = backend.max_pool_grad(device_grad, choice, windows, guarded(x.shape, dtype))
    assert_close(backend, got, REFERENCE.max_pool_grad(grad, chosen, windows, np.empty_like(x)), dtype)
    x = numbers(rng, x.shape, dtype)
    got = backend.sum_pool(guarded(x.shape, dtype, x), windows, guarded(shape, dtype))
    assert_close(backend, got, REFERENCE.sum_pool(x, windows, np.empty(shape, dtype)), dtype)
    got = backend.sum_pool_grad(device_grad, windows, guarded(x.shape, dtype))
    assert_close(backend, got, REFERENCE.sum_pool_grad(grad, windows, np.empty_like(x)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("images", "channels"), IMAGES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_fused_pooling_is_one_kernel(guarded, rng, windows, biased, relu, images, channels, dtype):
    x = rng.integers(-4, 4, size=(images, *windows.image, channels)).astype(dtype)
    x.reshape(-1)[::11] = np.nan
    row = numbers(rng, channels, dtype) if biased else None
    shape, cells = (images, *windows.grid, channels), windows.kernel[0] * windows.kernel[1]
    choices, backend = np.dtype("uint8" if cells <= 256 else "int32"), guarded.backend
    want, chosen = np.empty(shape, dtype), np.zeros(shape, choices)
    arrays = guarded(x.shape, dtype, x), None if row is None else guarded(channels, dtype, row)
    out, choice = guarded(shape, dtype), guarded(shape, choices)
    backend.add_to_rows_max_pool(*arrays, windows, relu, out, choice)
    assert_launched(backend, "max_pool")
    REFERENCE.add_to_rows_max_pool(x, row, windows, relu, want, chosen)
    np.testing.assert_array_equal(backend.to_numpy(out), want)
    np.testing.assert_array_equal(backend.to_numpy(choice), chosen)
    grad, grad_x = numbers(rng, shape, dtype), guarded(x.shape, dtype)
    backend.relu_grad_max_pool_grad(guarded(shape, dtype, grad), out, choice, windows, grad_x)
    want = REFERENCE.relu_grad_max_pool_grad(grad, want, chosen, windows, np.empty_like(x))
    assert_close(backend, grad_x, want, dtype)


@pytest.mark.parametrize("channels", [4, 8])
def test_arrays_at_any_address_are_accepted(guarded, rng, channels):
    """A thread loads four elements at a time only where their address allows that."""
    backend, windows = guarded.backend, WINDOWS[2]

    def shifted(values):
        memory = guarded(values.size + 1, values.dtype)
        memory[1:] = backend.asarray(values.ravel())
        return memory[1:].reshape(values.shape)

    x, row = numbers(rng, (3, *windows.image, channels), "float32"), numbers(rng, channels, "float32")
    grad = numbers(rng, (3, *windows.grid, channels), "float32")
    patches = np.empty((3, *windows.grid, *windows.kernel, channels), "float32")
    choice = np.zeros(grad.shape, "uint8")
    cases = {
        "im2col": (x, windows, patches), "sum_pool": (x, windows, grad.copy()),
        "max_pool_grad": (grad, choice, windows, x.copy()), "sum_pool_grad": (grad, windows, x.copy()),
        "add_to_rows_max_pool": (x.copy(), row, windows, True, grad.copy(), choice.copy()),
        "relu": (x, x.copy()), "relu_grad": (x, np.maximum(x, 0), x.copy()), "add_to_rows": (x.copy(), row),
        "sum_rows": (x.reshape(-1, channels), row.copy()),
        "relu_grad_sum_rows": (*[x.reshape(-1, channels)] * 2, x.reshape(-1, channels).copy(), row.copy()),
    }  # fmt: skip
    for name, given in cases.items():
        device = [shifted(a) if isinstance(a, np.ndarray) else a for a in given]
        getattr(backend, name)(*device)
        getattr(REFERENCE, name)(*given)
        for got, want in zip(device, given, strict=True):
            if isinstance(want, np.ndarray) and not (name == "add_to_rows_max_pool" and want.shape == x.shape):
                np.testing.assert_allclose(backend.to_numpy(got), want, rtol=1e-5, atol=1e-5, err_msg=name)


# Random numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 257), (300, 5)])
@pytest.mark.parametrize("first_row", [0, 5, 2**32 - 2])
def test_random_bits_equal_the_reference(guarded, shape, first_row):
    key = (2**40 + 1, 12345, 7)
    want = REFERENCE.random_bits(key, *shape, first_row)
    np.testing.assert_array_equal(guarded.backend.to_numpy(guarded.backend.random_bits(key, *shape, first_row)), want)
    for dtype in DTYPES:
        want = REFERENCE.dropout_mask(key, 0.3, np.empty(shape, dtype), first_row)
        got = guarded.backend.dropout_mask(key, 0.3, guarded(shape, dtype), first_row)
        np.testing.assert_array_equal(guarded.backend.to_numpy(got), want)


# Updates --------------------------------------------------------------------------------------------------------------

OPTIMIZERS = [
    optimizers.SGD(0.1),
    optimizers.SGD(0.1, momentum=0.9, weight_decay=0.3),
    optimizers.SGD(lambda step: 0.1 / (1 + step), momentum=0.9, nesterov=True),
    optimizers.Adagrad(0.1, weight_decay=0.3),
    optimizers.RMSprop(0.01),
    optimizers.Adam(0.01, weight_decay=0.3, clip_norm=0.7),
    optimizers.AdamW(0.01, weight_decay=0.3),
    optimizers.SGD(0.1, clip_norm=1e9),
]


def store_of(backend, dtype, frozen=True):
    """Three parameters: the middle one is frozen, and the last has no weight decay."""
    store = ParameterStore(backend, dtype)
    layer = layers.Dense(1)
    layer._context = type("C", (), {"store": store})()
    for name, shape, decay in (("a", (9, 37), True), ("b", (50,), True), ("c", (700,), False)):
        layer.add_parameter(name, shape, "normal", decay=decay)
    store.parameters[1].trainable = not frozen
    with backend.device():
        store.allocate(3)
    return store


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=[f"{type(o).__name__}-{i}" for i, o in enumerate(OPTIMIZERS)])
def test_fused_updates_of_trainable_slices_equal_the_reference(gpu, rng, optimizer, dtype):
    stores = [store_of(backend, dtype) for backend in (gpu, REFERENCE)]
    states = [OptimizerState(optimizer, store) for store in stores]
    for _ in range(4):
        grad = rng.normal(size=stores[0].grads.shape).astype(dtype)
        for store, state in zip(stores, states, strict=True):
            with store.backend.device():
                store.grads[...] = store.backend.asarray(grad)
                optimizer.apply(store, state, lambda: 0.5)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(gpu.to_numpy(stores[0].values), stores[1].values, rtol=100 * eps, atol=100 * eps)
    for name, vector in states[0].slots.items():
        np.testing.assert_allclose(gpu.to_numpy(vector), states[1].slots[name], rtol=100 * eps, atol=100 * eps)
    assert states[0].step == states[1].step == 4
    if gpu.name == "emulated":
        fused, _ = optimizer.fused(0.1, 1)
        assert gpu.xp.launches.count(fused) == 4, "there must be one launch per update"


@pytest.mark.parametrize("large", [1e15, 1e19, 3e38])
@pytest.mark.parametrize("limit", [1.0, 1e-3])
def test_the_norm_of_large_gradients_does_not_overflow(gpu, limit, large):
    for dtype, largest in (("float32", large), ("float64", 1e300)):
        grad = np.array([largest, -largest / 2, 0, 3, 5, 7], dtype)
        with gpu.device():
            device_array = gpu.asarray(grad)
            gpu.clip_norm(device_array, [slice(0, 3), slice(4, 6)], limit)
        trained = np.delete(gpu.to_numpy(device_array), 3)
        scale = limit / (np.abs(grad).max() * np.sqrt(1.25))
        # Where subnormals are flushed, elements much smaller than 3e38 become 0.
        atol = np.finfo(dtype).tiny if flushes_subnormals(gpu, dtype) else 1e-44
        np.testing.assert_allclose(trained, np.delete(grad, 3).astype("float64") * scale, rtol=1e-6, atol=atol)
        assert gpu.to_numpy(device_array)[3] == 3


# Half precision -------------------------------------------------------------------------------------------------------


def test_casts_to_half_precision_round_to_nearest_even(gpu, rng):
    x = np.concatenate([
        rng.normal(size=3000), 1e5 * rng.normal(size=500), 1e-5 * rng.normal(size=500), 1e-8 * rng.normal(size=500),
        [0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e30, np.inf, -np.inf, 2**-24, 2**-25, 1.5 * 2**-25, 6.1e-5, 6.09e-5],
        np.arange(2048, 4096) + 0.5,
    ]).astype("float32")  # fmt: skip
    with gpu.device(), np.errstate(over="ignore"):
        with gpu.matmul_precision("float16"):
            bits = gpu.to_numpy(gpu.cast(gpu.asarray(x)).bits)
        np.testing.assert_array_equal(bits, x.astype("float16").view("uint16"))
        with gpu.matmul_precision("bfloat16"):
            bits = gpu.to_numpy(gpu.cast(gpu.asarray(x)).bits)
    rounded = (bits.astype("uint32") << 16).view("float32")
    spacing = np.spacing(np.abs(x.astype("float32"))).astype("float64") * 2**16
    finite = np.isfinite(x)
    error = np.abs(rounded[finite].astype("float64") - x[finite])
    assert (error <= spacing[finite] / 2).all()
    assert not (bits[finite] & 1)[error == spacing[finite] / 2].any(), "ties must be rounded to even"
    np.testing.assert_array_equal(rounded[np.isinf(x)], x[np.isinf(x)])


def test_nan_stays_nan_in_half_precision(gpu):
    x = np.array([np.nan, -np.nan, np.frombuffer(np.uint32(0x7F800001).tobytes(), "float32")[0]], "float32")
    with gpu.device():
        for precision, dtype in (("float16", 2), ("bfloat16", 14)):
            with gpu.matmul_precision(precision):
                bits = gpu.to_numpy(gpu.cast(gpu.asarray(x)).bits)
            as_float = bits.view("float16") if dtype == 2 else (bits.astype("uint32") << 16).view("float32")
            assert np.isnan(as_float).all()


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS[1:7:2], ids=lambda optimizer: type(optimizer).__name__)
def test_an_update_writes_a_copy_of_the_new_weights(gpu, rng, precision, optimizer):
    store = store_of(gpu, "float32")
    with gpu.device(), gpu.matmul_precision(precision):
        copy = HalfMatrix(gpu.empty(store.values.shape, "uint16"), precision)
        store.grads[...] = gpu.asarray(rng.normal(size=store.grads.shape).astype("float32"))
        whole_update, before = gpu.whole_update, gpu.to_numpy(store.values).copy()
        gpu.whole_update = functools.partial(whole_update, copy=copy)
        optimizer.apply(store, OptimizerState(optimizer, store), lambda: 0.5)
        np.testing.assert_array_equal(gpu.to_numpy(copy.bits), gpu.to_numpy(gpu.cast(store.values).bits))
    assert (gpu.to_numpy(store.values) != before).any()


# Use of the kernels ---------------------------------------------------------------------------------------------------


def test_every_kernel_is_used():
    folder = Path(kernels.__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    named = {*re.findall(r'"(\w+)"|by_kernel\(Backend\.(\w+)', text)}
    named = {*itertools.chain(*named), "to_float16", "to_bfloat16"}
    named |= {optimizer.fused(0.1, 1)[0] for optimizer in OPTIMIZERS}
    assert set(kernels.signatures()) <= named


def test_without_a_compiler_the_reference_formulas_are_used(gpu, caplog, rng):
    if gpu.name != "emulated":
        pytest.skip("a real GPU has a compiler")

    def broken(**kwargs):
        raise RuntimeError("no compiler here")

    gpu.xp.RawModule = broken
    x = rng.normal(size=(3, 4)).astype("float32")
    for _ in range(2):
        np.testing.assert_array_equal(gpu.to_numpy(gpu.relu(gpu.asarray(x), gpu.empty((3, 4), "float32"))), x.clip(0))
    assert gpu.xp.launches == [] and gpu.graph_capture() is None
    assert [r.getMessage() for r in caplog.records] == [
        "emulated: kernels.cu does not compile (RuntimeError: no compiler here); CuPy's own functions are used "
        "instead, which are slower"
    ]


def test_two_threads_compile_a_module_once():
    made = []

    class Module:
        def __init__(self, code, options):
            made.append(options)
            time.sleep(0.05)  # so that the other thread arrives

        def get_function(self, name):
            return SimpleNamespace(shared_size_bytes=0)

    module = kernels.Kernels(SimpleNamespace(RawModule=Module), lambda *launch: None, "KERNEL nothing(Index n) {}")
    threads = [
        threading.Thread(target=module.launch, args=("nothing", np.dtype("float32"), (1,), (1,), {"n": 1}))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
