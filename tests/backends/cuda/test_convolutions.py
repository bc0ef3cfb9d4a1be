"""Convolutions by kernels that gather their patches, against the reference formulas, in every precision."""

import numpy as np
import pytest
from guarded import Guarded
from nvrtc import compiled

from xpnet.backends import Backend
from xpnet.backends.cuda import convolutions
from xpnet.backends.cuda.convolutions import (
    TEMPLATES,
    Tile,
    choose_forward,
    choose_weight_grad,
    forward_kernel,
    weight_grad_kernel,
)
from xpnet.backends.reference.windows import Windows

REFERENCE = Backend("reference", np)
TOLERANCES = {"float32": 2e-6, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 2e-2}  # relative to the norm
WINDOWS = [
    Windows(image=(1, 1), grid=(1, 1), kernel=(1, 1)),
    Windows(image=(5, 6), grid=(5, 6), kernel=(3, 3), before=(1, 1)),
    Windows(image=(7, 5), grid=(4, 3), kernel=(2, 3), strides=(2, 2), before=(0, 1)),
    Windows(image=(8, 9), grid=(6, 5), kernel=(3, 2), strides=(1, 1), dilation=(2, 3), before=(1, 0)),
]
SHAPES = [(1, 4, 4), (3, 20, 12), (2, 12, 36)]  # images, channels, filters
FEW = [(3, 1, 8), (2, 3, 20)]


def normal(rng, *shape):
    return rng.normal(size=shape).astype("float32")


class Convolution:
    """The arrays of a convolution, and its results by the reference formulas in float64."""

    def __init__(self, rng, windows, images, channels, filters):
        rows = windows.kernel[0] * windows.kernel[1] * channels
        self.windows = windows
        self.x = normal(rng, images, *windows.image, channels)
        self.weight = normal(rng, rows, filters)
        self.bias = normal(rng, filters)
        self.grad = normal(rng, images, *windows.grid, filters)

    def forward(self, relu, bias=True):
        x, weight, row, out = (a.astype("float64") for a in (self.x, self.weight, self.bias, self.grad))
        return REFERENCE.convolve(x, weight, row if bias else None, self.windows, relu, out)

    def weight_grad(self):
        x, grad, out, sums = (a.astype("float64") for a in (self.x, self.grad, self.weight, self.bias))
        return REFERENCE.convolve_weight_grad(x, grad, self.windows, out, sums), sums

    def input_grad(self):
        grad, weight, out = (a.astype("float64") for a in (self.grad, self.weight, self.x))
        return REFERENCE.convolve_input_grad(grad, weight, self.windows, out)


def check(backend, convolution, arrays, precision):
    """Assert that the operators of the backend compute what the formulas compute."""
    c, windows = convolution, convolution.windows
    x, weight, bias, grad = (arrays(a.shape, "float32", a) for a in (c.x, c.weight, c.bias, c.grad))
    with backend.matmul_precision(precision):
        for row, relu in ((bias, True), (bias, False), (None, False)):
            got = backend.convolve(x, weight, row, windows, relu, arrays(c.grad.shape))
            assert_near(backend, got, c.forward(relu, row is not None), precision)
        sums = arrays(c.bias.shape)
        got = backend.convolve_weight_grad(x, grad, windows, arrays(c.weight.shape), sums)
        for values, want in zip((got, sums), c.weight_grad(), strict=True):
            assert_near(backend, values, want, precision)
        got = backend.convolve_weight_grad(x, grad, windows, arrays(c.weight.shape), None)
        assert_near(backend, got, c.weight_grad()[0], precision)
        weights = arrays(c.weight.shape, "float32", c.weight)
        got = backend.convolve_weight_grad(x, grad, windows, weights, None, add=True)
        assert_near(backend, got, c.weight + c.weight_grad()[0], precision)
        got = backend.convolve_input_grad(grad, weight, windows, arrays(c.x.shape))
        assert_near(backend, got, c.input_grad(), precision)
        y = np.maximum(c.x, 0)
        y_and_out = arrays(y.shape, "float32", y)
        got = backend.convolve_input_grad(grad, weight, windows, y_and_out, y_and_out)
        assert_near(backend, got, c.input_grad() * (y != 0), precision)


def assert_near(backend, got, want, precision):
    error = np.linalg.norm(backend.to_numpy(got) - want)
    assert error <= TOLERANCES[precision] * max(1e-3, np.linalg.norm(want))


@pytest.mark.parametrize(("images", "channels", "filters"), [*SHAPES, *FEW])
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_convolutions_equal_the_reference(guarded, rng, windows, images, channels, filters):
    check(guarded.backend, Convolution(rng, windows, images, channels, filters), guarded, "float32")


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("windows", WINDOWS[1:3], ids=str)
def test_convolutions_by_tensor_cores_equal_the_reference(guarded, rng, windows, precision):
    if guarded.backend.precision_unavailable(precision):
        pytest.skip("this device has no such precision")
    check(guarded.backend, Convolution(rng, windows, 3, 20, 12), guarded, precision)


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_many_channels_and_windows_take_several_blocks(guarded, rng, precision):
    if guarded.backend.precision_unavailable(precision):
        pytest.skip("this device has no such precision")
    windows = Windows(image=(16, 17), grid=(16, 17), kernel=(3, 3), before=(1, 1))
    check(guarded.backend, Convolution(rng, windows, 3, 72, 20), guarded, precision)


TILES = [Tile(64, 16, 16, 3, 16, 16), Tile(128, 32, 16, 2, 32, 32), Tile(64, 16, 16, 2, 4, 4, 4)]


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("tile", TILES)
def test_every_kind_of_tile_equals_the_reference(guarded, rng, monkeypatch, precision, tile):
    if guarded.backend.precision_unavailable(precision) or (tile.across > 0) is not (precision == "float32"):
        pytest.skip("there is no such kernel")

    def forward(precision, windows, count, channels, columns, transposed=False):
        return forward_kernel(tile, precision, transposed)

    def weight_grad(precision, windows, channels, columns):
        return weight_grad_kernel(tile, precision)

    monkeypatch.setattr(convolutions, "choose_forward", forward)
    monkeypatch.setattr(convolutions, "choose_weight_grad", weight_grad)
    for windows in WINDOWS[1:]:
        check(guarded.backend, Convolution(rng, windows, 3, 20, 36), guarded, precision)


def test_kernels_compute_them(gpu, rng):
    if gpu.name != "emulated":
        pytest.skip("the launches of a real GPU are not counted")
    with gpu.device():
        check(gpu, Convolution(rng, WINDOWS[1], 2, 4, 8), Guarded(gpu), "float32")
    assert not {"im2col", "gemm", "col2im"} & set(gpu.xp.launches)


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
@pytest.mark.parametrize(
    ("channels", "filters", "dtype"), [(4, 3, "float32"), (7, 4, "float32"), (4, 68, "float32"), (4, 4, "float64")]
)
def test_other_convolutions_use_the_formulas(gpu, rng, channels, filters, dtype, strides):
    grid = (5, 4) if strides == (1, 1) else (3, 4)
    c = Convolution(rng, Windows((6, 5), grid, (2, 2), strides), 2, channels, filters)
    with gpu.device():
        x, weight, bias, grad = (gpu.asarray(a.astype(dtype)) for a in (c.x, c.weight, c.bias, c.grad))
        assert gpu.convolution_kernel("convolve", x, weight, c.windows, grad) is None
        assert gpu.convolution_kernel("convolve_weight_grad", x, grad, c.windows, weight) is None
        got = gpu.convolve(x, weight, bias, c.windows, True, gpu.empty(grad.shape, dtype))
        assert_near(gpu, got, c.forward(True), "float32")
        got = gpu.convolve_input_grad(grad, weight, c.windows, gpu.empty(x.shape, dtype))
        assert_near(gpu, got, c.input_grad(), "float32")
        sums = gpu.empty(bias.shape, dtype)
        got = gpu.convolve_weight_grad(x, grad, c.windows, gpu.empty(weight.shape, dtype), sums)
        for values, want in zip((got, sums), c.weight_grad(), strict=True):
            assert_near(gpu, values, want, "float32")


def test_arrays_that_kernels_cannot_load_use_the_formula(gpu, rng):
    c = Convolution(rng, WINDOWS[1], 2, 4, 8)
    with gpu.device():
        shifted = gpu.empty((c.weight.size + 1,), "float32")[1:].reshape(c.weight.shape)
        shifted[...] = gpu.asarray(c.weight)
        given = gpu.asarray(c.x), shifted, gpu.asarray(c.bias), c.windows, True, gpu.empty(c.grad.shape, "float32")
        assert gpu.convolution_kernel("convolve", given[0], shifted, c.windows, given[5]) is None
        assert_near(gpu, gpu.convolve(*given), c.forward(True), "float32")


def test_nan_and_infinity_stay(gpu, rng):
    c = Convolution(rng, WINDOWS[1], 2, 4, 8)
    c.x[0, 2, 2], c.x[1, 0, 0] = np.nan, np.inf
    with gpu.device():
        x, weight, bias = (gpu.asarray(a) for a in (c.x, c.weight, c.bias))
        got = gpu.to_numpy(gpu.convolve(x, weight, bias, c.windows, True, gpu.empty(c.grad.shape, "float32")))
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(got, c.forward(True), rtol=1e-4, atol=1e-4)


def test_sums_over_many_blocks_have_the_same_bits(gpu, rng):
    windows = Windows(image=(20, 20), grid=(20, 20), kernel=(3, 3), before=(1, 1))
    for channels in (1, 4):
        c, results = Convolution(rng, windows, 8, channels, 8), []
        with gpu.device():
            x, grad = gpu.asarray(c.x), gpu.asarray(c.grad)
            for _ in range(2):
                sums, out = gpu.empty((8,), "float32"), gpu.empty(c.weight.shape, "float32")
                gpu.convolve_weight_grad(x, grad, windows, out, sums)
                results.append((gpu.to_numpy(out), gpu.to_numpy(sums)))
        for first, second, want in zip(*results, c.weight_grad(), strict=True):
            np.testing.assert_array_equal(first, second)
            np.testing.assert_allclose(first, want, rtol=1e-4, atol=1e-4)


def chosen(precision):
    """All kernels that may be chosen for windows of 3 × 3 pixels, and those of `TILES`."""
    windows, tensor = WINDOWS[1], precision != "float32"
    for columns in (16, 32, 64):
        for count in (100, 2**16):
            yield choose_forward(precision, windows, count, 1, columns)
            for transposed in (False, True):
                yield choose_forward(precision, windows, count, columns if transposed else 32, columns, transposed)
        for channels in (1, 16, 32):
            yield choose_weight_grad(precision, windows, channels, columns)
    for tile in TILES:
        if tensor is (tile.across == 0):
            yield from (forward_kernel(tile, precision), weight_grad_kernel(tile, precision))


@pytest.mark.parametrize("architecture", [75, 80, 90])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
def test_nvrtc_compiles_the_kernels(architecture, precision):
    kernels = {kernel.name: kernel for kernel in chosen(precision)}
    source = TEMPLATES + "".join(kernel.definition for kernel in kernels.values())
    cubin = compiled(source, architecture, "-DREAL=float")
    for name in kernels:
        assert name.encode() in cubin
