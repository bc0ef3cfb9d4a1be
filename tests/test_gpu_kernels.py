"""kernels.cu against the formulas in xp, over odd sizes: by g++ and a shim, and where there is one, on a GPU.

Every array that a kernel writes stands between guards, so that a write beside it shows.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from devices import flushes_subnormals

from xpnet import layers, optimizers
from xpnet.backends import Backend, gpu_kernels
from xpnet.backends.sliding import Windows
from xpnet.optimizers import OptimizerState
from xpnet.parameters import ParameterStore

REFERENCE = Backend("reference", np)
DTYPES = ["float32", "float64"]
SIZES = [1, 2, 31, 255, 256, 257, 1025]  # around the edges of warps and blocks
MATRICES = [(1, 1), (1, 300), (7, 10), (33, 31), (255, 33), (257, 32), (600, 3), (2, 1025)]
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-30, -1e30]
ARCHITECTURES = [75, 80, 86, 89, 90, 100]
GUARD = 64


class Guarded:
    """Arrays on the device with guards before and after."""

    def __init__(self, backend):
        self.backend, self._whole = backend, []

    def __call__(self, shape, dtype="float32", fill=None):
        size = int(np.prod(shape))
        values = np.full(size + 2 * GUARD, 77, dtype=dtype)
        if fill is not None:
            values[GUARD : GUARD + size] = np.asarray(fill).ravel()
        whole = self.backend.asarray(values)
        self._whole.append((whole, size))
        return whole[GUARD : GUARD + size].reshape(shape)

    def check(self):
        for whole, size in self._whole:
            values = self.backend.to_numpy(whole)
            beside = np.concatenate([values[:GUARD], values[GUARD + size :]])
            assert (beside == np.array(77).astype(values.dtype)).all(), "written beside the array"


@pytest.fixture
def room(gpu):
    assert gpu.why_no_kernels is None and gpu.why_no_cublas is None
    guarded = Guarded(gpu)
    with gpu.device():
        yield guarded
        guarded.check()


def close(backend, got, want, dtype, times=20):
    eps = np.finfo(dtype).eps
    scale = max(1.0, float(np.nanmax(np.abs(want), initial=0.0, where=np.isfinite(want)))) if want.size else 1.0
    np.testing.assert_allclose(backend.to_numpy(got), want, rtol=times * eps, atol=times * eps * scale)


def numbers(rng, shape, dtype, special=False):
    x = rng.normal(size=shape).astype(dtype)
    if special:
        flat = x.reshape(-1)
        flat[: len(SPECIAL)] = SPECIAL[: flat.size]
    return x


# Compiled by NVIDIA's own compiler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles_every_kernel(architecture, real):
    compiler = pytest.importorskip("cupy.cuda.compiler", reason="CuPy is not installed")
    program = compiler._NVRTCProgram(gpu_kernels.SOURCE, "kernels.cu", method="cubin")
    try:
        cubin, _ = program.compile([f"-arch=sm_{architecture}", f"-DREAL={real}"])
    except ImportError as error:  # CuPy's wheel brings no compiler
        pytest.skip(f"NVRTC is not installed: {str(error).splitlines()[0]}")
    for name in gpu_kernels.signatures():
        assert name.encode() in cubin


def test_the_signatures_are_those_of_the_text():
    signatures = gpu_kernels.signatures()
    assert set(signatures) == set(re.findall(r"^KERNEL (\w+)", gpu_kernels.SOURCE, re.MULTILINE))
    assert [tuple(p) for p in signatures["relu"]] == [("real", True, "x"), ("Index", False, "n"), ("real", True, "out")]
    assert len(signatures["patches"]) == 17 and signatures["patches"][3] == ("int", False, "height")
    assert signatures["to_float16"][2] == ("unsigned short", True, "out")


def test_arguments_that_do_not_fit_are_refused(room):
    launch = room.backend._kernels.launch
    x, y = room((4,)), room((4,), "float64")
    with pytest.raises(TypeError, match="relu: out must be a contiguous array of real, not float64"):
        launch("relu", np.dtype("float32"), (1,), (32,), x, 4, y)
    with pytest.raises(TypeError, match="relu: x must be a contiguous array of real"):
        launch("relu", np.dtype("float32"), (1,), (32,), x[::2], 2, x)
    with pytest.raises(TypeError, match="relu takes 3 arguments, not 2"):
        launch("relu", np.dtype("float32"), (1,), (32,), x, x)


# Elements -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["relu", "sigmoid", "softplus"])
def test_functions_of_an_element(room, rng, name, size, dtype):
    x = numbers(rng, (size,), dtype, special=True)
    with np.errstate(all="ignore"):
        want = getattr(REFERENCE, name)(x, out=np.empty_like(x))
    close(room.backend, getattr(room.backend, name)(room(size, dtype, x), out=room(size, dtype)), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_of_relu(room, rng, size, dtype):
    grad, y = numbers(rng, (size,), dtype), np.maximum(numbers(rng, (size,), dtype), 0)
    y[-1] = np.nan
    got = room.backend.relu_grad(room(size, dtype, grad), room(size, dtype, y), room(size, dtype))
    np.testing.assert_array_equal(room.backend.to_numpy(got), np.where(y != 0, grad, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["uint8", "real"])
@pytest.mark.parametrize("size", SIZES)
def test_rescale(room, rng, size, given, dtype):
    x = rng.integers(256, size=size).astype("uint8" if given == "uint8" else dtype)
    want = REFERENCE.rescale(x, 1 / 255, -0.5, np.empty(size, dtype))
    got = room.backend.rescale(room(size, x.dtype, x), 1 / 255, -0.5, room(size, dtype))
    close(room.backend, got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_a_row_added_to_rows_and_rows_summed(room, rng, shape, dtype):
    a, row = numbers(rng, shape, dtype), numbers(rng, shape[1:], dtype)
    got = room.backend.add_to_rows(room(shape, dtype, a), room(shape[1:], dtype, row))
    np.testing.assert_array_equal(room.backend.to_numpy(got), a + row)
    sums = room.backend.sum_rows(room(shape, dtype, a), room(shape[1:], dtype))
    close(room.backend, sums, a.sum(axis=0, dtype="float64"), dtype)


@pytest.mark.parametrize("rows", [255, 256, 257, 5000, 70_000])
def test_sums_of_many_rows_come_in_parts_and_always_alike(room, rng, rows):
    a = numbers(rng, (rows, 3), "float32") + 100
    there = room(a.shape, "float32", a)
    first, second = (room.backend.to_numpy(room.backend.sum_rows(there, room((3,)))) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, a.sum(axis=0, dtype="float64"), rtol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_sum_in_double(room, rng, size, dtype):
    x, out = numbers(rng, (size,), dtype), room((), "float64")
    room.backend.sum_to(room(size, dtype, x), out)
    np.testing.assert_allclose(float(room.backend.to_numpy(out)), x.sum(dtype="float64"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
@pytest.mark.parametrize(
    ("given", "dtype"),
    [("uint8", "uint8"), ("bool", "bool"), ("float32", "float32"), ("int64", "int64"), ("float64", "float64"),
     ("uint8", "float32"), ("uint8", "float64"), ("int32", "float32"), ("int16", "int16")],
)  # fmt: skip
def test_rows_gathered(room, rng, rows, shape, given, dtype):
    a, index = rng.integers(2 if given == "bool" else 200, size=(9, *shape)).astype(given), rng.integers(9, size=rows)
    there, out = room(a.shape, given, a), room((rows, *shape), dtype)
    assert room.backend.gather(there, room.backend.asarray(index), out) is out
    np.testing.assert_array_equal(room.backend.to_numpy(out), a[index].astype(dtype))


# Rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmaxes(room, rng, name, shape, dtype):
    x = 10 * numbers(rng, shape, dtype)
    x[0, 0] = -np.inf if shape[1] > 1 else 3
    x[-1, -1] = 1e4
    want = getattr(REFERENCE, name)(x)
    close(room.backend, getattr(room.backend, name)(room(shape, dtype, x), room(shape, dtype)), want, dtype, 200)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [s for s in MATRICES if s[1] > 1])
def test_cross_entropy_its_gradient_and_the_hits(room, rng, shape, smoothing, dtype):
    backend, logits, labels = room.backend, 5 * numbers(rng, shape, dtype), rng.integers(shape[1], size=shape[0])
    there, labels_there = room(shape, dtype, logits), room(shape[0], "int64", labels)
    losses, grad = backend.cross_entropy(there, labels_there, smoothing, room(shape[0], dtype), room(shape, dtype))
    want = REFERENCE.cross_entropy(logits, labels, smoothing, np.empty(shape[0], dtype), np.empty_like(logits))
    close(backend, losses, want[0], dtype, 200)
    close(backend, grad, want[1], dtype, 50)
    hits = backend.to_numpy(backend.count_hits(there, labels_there))
    np.testing.assert_array_equal(hits, [(logits.argmax(axis=1) == labels).sum(), shape[0]])
    assert hits.dtype == "int64"


@pytest.mark.parametrize("classes", [1, 2, 3, 10])
def test_hits_with_ties_and_nan(room, rng, classes):
    outputs = rng.integers(3, size=(1300, classes)).astype("float32")
    outputs[rng.random(outputs.shape) < 0.1] = np.nan
    outputs[rng.random(outputs.shape) < 0.1] = np.inf
    labels = rng.integers(-1, classes + 1, size=1300)
    got = room.backend.count_hits(room(outputs.shape, "float32", outputs), room(1300, "int64", labels))
    np.testing.assert_array_equal(room.backend.to_numpy(got), REFERENCE.count_hits(outputs, labels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in MATRICES if s[1] > 1])
def test_rows_normalised(room, rng, shape, dtype):
    x, grad = 3 + 2 * numbers(rng, shape, dtype), numbers(rng, shape, dtype)
    normal, sigma = np.empty_like(x), np.empty((shape[0], 1), dtype)
    REFERENCE.normalize_rows(x.astype("float64"), 1e-5, normal, sigma)
    backend, sigma_there = room.backend, room((shape[0], 1), dtype)
    got = backend.normalize_rows(room(shape, dtype, x), 1e-5, room(shape, dtype), sigma_there)
    close(backend, got, normal, dtype, 100)
    close(backend, sigma_there, sigma, dtype, 100)
    there = room(shape, dtype, grad)
    arguments = room(shape, dtype, normal), room((shape[0], 1), dtype, sigma)
    want = REFERENCE.normalize_rows_grad(grad, normal, sigma, np.empty_like(grad))
    close(backend, backend.normalize_rows_grad(there, *arguments, out=there), want, dtype, 100)


# Columns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_moments_and_sums_of_columns(room, rng, shape, dtype):
    x, b, center = 1000 + numbers(rng, shape, dtype), numbers(rng, shape, dtype), numbers(rng, shape[1:], dtype)
    exact, backend = x.astype("float64"), room.backend
    mean, variance = backend.moments(room(shape, dtype, x))
    np.testing.assert_allclose(backend.to_numpy(mean), exact.mean(axis=0), rtol=8 * np.finfo(dtype).eps)
    np.testing.assert_allclose(backend.to_numpy(variance), exact.var(axis=0), rtol=1e-6, atol=1e-9)
    arguments = room(shape, dtype, x), room(shape, dtype, b), room(shape[1:], dtype, center)
    want = (exact * (b.astype("float64") - center)).sum(axis=0)
    close(backend, backend.sum_products(*arguments, room(shape[1:], dtype)), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_linear_maps_of_columns(room, rng, shape, dtype):
    g, x, (a, b, c) = numbers(rng, shape, dtype), numbers(rng, shape, dtype), numbers(rng, (3, shape[1]), dtype)
    there, (a_, b_, c_) = room(shape, dtype, x), (room(shape[1:], dtype, v) for v in (a, b, c))
    want = REFERENCE.scale_shift(x, a, b, np.empty_like(x))
    close(room.backend, room.backend.scale_shift(there, a_, b_, room(shape, dtype)), want, dtype)
    want = REFERENCE.combine(g, a, x, b, c, np.empty_like(x))
    got = room.backend.combine(room(shape, dtype, g), a_, there, b_, c_, room(shape, dtype))
    close(room.backend, got, want, dtype)


# Windows ------------------------------------------------------------------------------------------------------------

WINDOWS = [
    Windows(image=(1, 1), grid=(1, 1), kernel=(1, 1)),
    Windows(image=(5, 6), grid=(3, 4), kernel=(3, 3)),
    Windows(image=(5, 6), grid=(5, 6), kernel=(3, 3), before=(1, 1)),
    Windows(image=(7, 5), grid=(4, 3), kernel=(2, 3), strides=(2, 2), before=(0, 1)),
    Windows(image=(9, 8), grid=(3, 3), kernel=(2, 2), strides=(3, 3)),  # pixels between windows
    Windows(image=(8, 9), grid=(4, 3), kernel=(3, 2), strides=(1, 2), dilation=(2, 3), before=(1, 0)),
    Windows(image=(4, 4), grid=(2, 2), kernel=(17, 16), strides=(1, 1), before=(13, 12)),  # more than 256 cells
]
IMAGES = [(1, 1), (3, 2), (2, 33)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("images", "channels"), IMAGES)
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_patches_and_their_adjoint(room, rng, windows, images, channels, dtype):
    shape = (images, *windows.grid, *windows.kernel, channels)
    x, grad = numbers(rng, (images, *windows.image, channels), dtype), numbers(rng, shape, dtype)
    backend, want = room.backend, REFERENCE.patches(x, windows, np.empty(shape, dtype))
    got = backend.patches(room(x.shape, dtype, x), windows, room(shape, dtype))
    np.testing.assert_array_equal(backend.to_numpy(got), want)
    got = backend.fold(room(shape, dtype, grad), windows, room(x.shape, dtype))
    close(backend, got, REFERENCE.fold(grad, windows, np.empty_like(x)), dtype)


@pytest.mark.parametrize("windows", WINDOWS[1:4], ids=str)
def test_patches_of_some_of_the_channels(room, rng, windows):
    x, part = numbers(rng, (2, *windows.image, 7), "float32"), slice(2, 5)
    shape, backend = (2, *windows.grid, *windows.kernel, 3), room.backend
    launched = getattr(backend.xp, "launches", [])
    whole = room(x.shape, "float32", x)
    got = backend.patches(whole[..., part], windows, room(shape))
    np.testing.assert_array_equal(
        backend.to_numpy(got), REFERENCE.patches(x[..., part], windows, np.empty(shape, "float32"))
    )
    backend.fold(got, windows, out=whole[..., part])
    want = x.copy()
    REFERENCE.fold(backend.to_numpy(got), windows, out=want[..., part])
    close(backend, whole, want, "float32")
    assert backend.name == "gpu" or {"patches", "fold"} <= set(launched)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("images", "channels"), IMAGES)
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_pooling_there_and_back(room, rng, windows, images, channels, dtype):
    x = rng.integers(4, size=(images, *windows.image, channels)).astype(dtype)  # few numbers, so that many are equal
    x.reshape(-1)[::11] = np.nan
    shape, cells = (images, *windows.grid, channels), windows.kernel[0] * windows.kernel[1]
    choices, backend = np.dtype("uint8" if cells <= 256 else "int32"), room.backend
    want, chosen = np.empty(shape, dtype), np.zeros(shape, choices)
    REFERENCE.max_pool(x, windows, want, chosen)
    there, choice = room(x.shape, dtype, x), room(shape, choices)
    np.testing.assert_array_equal(backend.to_numpy(backend.max_pool(there, windows, room(shape, dtype), choice)), want)
    np.testing.assert_array_equal(backend.to_numpy(choice), chosen)
    grad = numbers(rng, shape, dtype)
    grad_there = room(shape, dtype, grad)
    got = backend.unpool_max(grad_there, choice, windows, room(x.shape, dtype))
    close(backend, got, REFERENCE.unpool_max(grad, chosen, windows, np.empty_like(x)), dtype)
    x = numbers(rng, x.shape, dtype)
    got = backend.sum_pool(room(x.shape, dtype, x), windows, room(shape, dtype))
    close(backend, got, REFERENCE.sum_pool(x, windows, np.empty(shape, dtype)), dtype)
    got = backend.unpool_sum(grad_there, windows, room(x.shape, dtype))
    close(backend, got, REFERENCE.unpool_sum(grad, windows, np.empty_like(x)), dtype)


# Noise --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 257), (300, 5)])
@pytest.mark.parametrize("first_row", [0, 5, 2**32 - 2])
def test_noise_is_that_of_the_reference_bit_for_bit(room, shape, first_row):
    key = (2**40 + 1, 12345, 7)
    want = REFERENCE.random_bits(key, *shape, first_row)
    np.testing.assert_array_equal(room.backend.to_numpy(room.backend.random_bits(key, *shape, first_row)), want)
    for dtype in DTYPES:
        want = REFERENCE.dropout_mask(key, 0.3, np.empty(shape, dtype), first_row)
        got = room.backend.dropout_mask(key, 0.3, room(shape, dtype), first_row)
        np.testing.assert_array_equal(room.backend.to_numpy(got), want)


# Updates ------------------------------------------------------------------------------------------------------------

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
    """Three parameters, of which the middle one is frozen and the last does not decay."""
    store = ParameterStore(backend, dtype)
    alone = layers.Dense(1)
    alone._context = type("C", (), {"store": store})()
    for name, shape, decay in (("a", (9, 37), True), ("b", (50,), True), ("c", (700,), False)):
        alone.add_parameter(name, shape, "normal", decay=decay)
    store.parameters[1].trainable = not frozen
    with backend.device():
        store.allocate(3)
    return store


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=[f"{type(o).__name__}-{i}" for i, o in enumerate(OPTIMIZERS)])
def test_updates_of_part_of_the_vectors(gpu, rng, optimizer, dtype):
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
        assert gpu.xp.launches.count(fused) == 4, "one launch an update"


@pytest.mark.parametrize("large", [1e15, 1e19, 3e38])
@pytest.mark.parametrize("limit", [1.0, 1e-3])
def test_the_norm_of_large_gradients_does_not_overflow(gpu, limit, large):
    for dtype, most in (("float32", large), ("float64", 1e300)):
        grad = np.array([most, -most / 2, 0, 3, 5, 7], dtype)
        with gpu.device():
            there = gpu.asarray(grad)
            gpu.clip_norm(there, [slice(0, 3), slice(4, 6)], limit)
        trained = np.delete(gpu.to_numpy(there), 3)
        scale = limit / (np.abs(grad).max() * np.sqrt(1.25))
        # Where subnormals are flushed, the smaller elements become 0 beside one of 3e38.
        atol = np.finfo(dtype).tiny if flushes_subnormals(gpu, dtype) else 1e-44
        np.testing.assert_allclose(trained, np.delete(grad, 3).astype("float64") * scale, rtol=1e-6, atol=atol)
        assert gpu.to_numpy(there)[3] == 3


# Halves -------------------------------------------------------------------------------------------------------------


def test_halves_are_rounded_to_the_nearest_as_numpy_does(gpu, rng):
    x = np.concatenate([
        rng.normal(size=3000), 1e5 * rng.normal(size=500), 1e-5 * rng.normal(size=500), 1e-8 * rng.normal(size=500),
        [0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e30, np.inf, -np.inf, 2**-24, 2**-25, 1.5 * 2**-25, 6.1e-5, 6.09e-5],
        np.arange(2048, 4096) + 0.5,
    ]).astype("float32")  # fmt: skip
    with gpu.device(), np.errstate(over="ignore"):
        with gpu.products("float16"):
            bits = gpu.to_numpy(gpu.operand(gpu.asarray(x)).bits)
        np.testing.assert_array_equal(bits, x.astype("float16").view("uint16"))
        with gpu.products("bfloat16"):
            bits = gpu.to_numpy(gpu.operand(gpu.asarray(x)).bits)
    back = (bits.astype("uint32") << 16).view("float32")
    spacing = np.spacing(np.abs(x.astype("float32"))).astype("float64") * 2**16
    finite = np.isfinite(x)
    apart = np.abs(back[finite].astype("float64") - x[finite])
    assert (apart <= spacing[finite] / 2).all()
    assert not (bits[finite] & 1)[apart == spacing[finite] / 2].any(), "ties go to even"
    np.testing.assert_array_equal(back[np.isinf(x)], x[np.isinf(x)])


def test_nan_stays_nan_in_halves(gpu):
    x = np.array([np.nan, -np.nan, np.frombuffer(np.uint32(0x7F800001).tobytes(), "float32")[0]], "float32")
    with gpu.device():
        for precision, dtype in (("float16", 2), ("bfloat16", 14)):
            with gpu.products(precision):
                bits = gpu.to_numpy(gpu.operand(gpu.asarray(x)).bits)
            as_float = bits.view("float16") if dtype == 2 else (bits.astype("uint32") << 16).view("float32")
            assert np.isnan(as_float).all()


# All of them --------------------------------------------------------------------------------------------------------


def test_no_kernel_is_without_use():
    folder = Path(gpu_kernels.__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("gpu_*.py"))
    sized = {f"{name}_{n}" for name in ("gather", "max_pool", "unpool_max") for n in (1, 4, 8)}
    named = {*re.findall(r'"(\w+)"', text), *sized, "to_float16", "to_bfloat16"}
    named |= {optimizer.fused(0.1, 1)[0] for optimizer in OPTIMIZERS}
    assert set(gpu_kernels.signatures()) <= named


def test_without_a_compiler_the_formulas_do_the_work(gpu, caplog, rng):
    if gpu.name != "emulated":
        pytest.skip("the real compiler is there")

    def broken(**kwargs):
        raise RuntimeError("no compiler here")

    gpu.xp.RawModule = broken
    x = rng.normal(size=(3, 4)).astype("float32")
    for _ in range(2):
        np.testing.assert_array_equal(gpu.to_numpy(gpu.relu(gpu.asarray(x), gpu.empty((3, 4), "float32"))), x.clip(0))
    assert gpu.xp.launches == [] and gpu.recorder() is None
    assert [r.getMessage() for r in caplog.records] == [
        "emulated: kernels.cu does not compile (RuntimeError: no compiler here); CuPy's own functions do the work, "
        "more slowly"
    ]
