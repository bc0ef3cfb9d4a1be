"""Direct calls of cuBLAS: layouts of matrices, mixed precision, and the fallback to CuPy.

The tests run on an emulation of cuBLAS that follows NVIDIA's documentation, and on a real GPU.
"""

import ctypes
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from matrices import LAYOUTS, SHAPES, in_layout
from precisions import require_precision

from xpnet.backends.cuda import cublas
from xpnet.backends.cuda.cublas import HalfMatrix, matrix_layout


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("first", "second"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_matmul_accepts_every_layout_of_both_matrices(gpu, rng, shape, first, second, dtype):
    m, k, n = shape
    a, b = rng.normal(size=(m, k)).astype(dtype), rng.normal(size=(k, n)).astype(dtype)
    with gpu.device():
        out = gpu.asarray(np.full((m, n), np.nan, dtype))
        result = gpu.matmul(in_layout(gpu, a, first), in_layout(gpu, b, second), out)
    assert result is out
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(gpu.to_numpy(out), a @ b, rtol=20 * eps, atol=20 * k * eps)
    if gpu.name == "emulated":
        assert gpu.xp.launches[-1] == "gemm"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_matmul_adds_to_some_columns_of_the_output(gpu, rng, shape):
    m, k, n = shape
    a, b, c = (rng.normal(size=s).astype("float32") for s in ((m, k), (k, n), (m, n + 4)))
    with gpu.device():
        device_array = gpu.asarray(c)
        gpu.add_matmul(gpu.asarray(a), gpu.asarray(b), device_array[:, 3 : n + 3], scratch=None)
    want = c.copy()
    want[:, 3 : n + 3] += a @ b
    np.testing.assert_allclose(gpu.to_numpy(device_array), want, rtol=1e-5, atol=1e-5)


def test_matrices_that_cublas_does_not_accept_are_multiplied_by_cupy(gpu, rng):
    a, b = rng.normal(size=(6, 8)).astype("float32"), rng.normal(size=(4, 5)).astype("float32")
    with gpu.device():
        strided, out = gpu.asarray(a)[::2, ::2], gpu.empty((3, 5), "float32")
        assert matrix_layout(strided) is None
        gpu.matmul(strided, gpu.asarray(b), out)
        np.testing.assert_allclose(gpu.to_numpy(out), a[::2, ::2] @ b, rtol=1e-5)
        whole = gpu.empty((5, 3), "float64")
        gpu.matmul(gpu.asarray(b).T.astype("float64"), gpu.asarray(np.ones((4, 3))), whole)
        np.testing.assert_allclose(gpu.to_numpy(whole), b.T.astype("float64") @ np.ones((4, 3)), rtol=1e-12)


@pytest.mark.parametrize(
    ("a", "want"),
    [
        (np.zeros((3, 4)), (0, 4)),
        (np.zeros((3, 4)).T, (1, 4)),
        (np.zeros((3, 9))[:, 2:6], (0, 9)),
        (np.zeros((3, 9))[:, 2:6].T, (1, 9)),
        (np.zeros((1, 4)), (0, 4)),
        (np.zeros((4, 1)), (0, 1)),
        (np.zeros((4, 6))[:, :1], (0, 6)),
        (np.zeros((6, 4))[:1], (0, 4)),
        (np.zeros((3, 4))[:, ::-1], None),
        (np.zeros((3, 4))[::-1], None),
        (np.zeros((4, 6))[:, ::2], None),
        (np.broadcast_to(np.zeros(4), (3, 4)), None),
    ],
)
def test_matrix_layout_finds_transposition_and_leading_dimension(a, want):
    assert matrix_layout(a) == want


@pytest.mark.parametrize("precision", ["tf32", "float16", "bfloat16"])
def test_mixed_precision_rounds_matrices_but_not_sums(gpu, rng, precision):
    require_precision(gpu, precision)
    a, b = rng.normal(size=(64, 300)).astype("float32"), rng.normal(size=(300, 32)).astype("float32")
    digits = {"tf32": 10, "float16": 10, "bfloat16": 7}[precision]
    with gpu.device(), gpu.matmul_precision(precision):
        out = gpu.matmul(gpu.asarray(a), gpu.asarray(b), gpu.empty((64, 32), "float32"))
    exact = a.astype("float64") @ b.astype("float64")
    error = np.abs(gpu.to_numpy(out) - exact).max()
    size = np.sqrt((a.astype("float64") ** 2) @ (b.astype("float64") ** 2)).max()
    assert 2.0**-digits * size / 20 < error < 2.0**-digits * size * 3
    if precision == "tf32":
        return
    rounded = [_rounded(x, precision) for x in (a, b)]
    np.testing.assert_allclose(gpu.to_numpy(out), rounded[0] @ rounded[1], rtol=1e-4, atol=1e-4)


def _rounded(x, precision):
    if precision == "float16":
        return x.astype("float16").astype("float64")
    bits = x.view("uint32")
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.view("float32").astype("float64")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("a_shape", "b_shape"), [((3, 4), (5, 4, 6)), ((5, 3, 4), (4, 6)), ((5, 3, 4), (5, 4, 6)), ((2, 5, 3, 4), (4, 1))]
)
def test_batched_matmul_equals_numpy(gpu, rng, a_shape, b_shape, dtype):
    a, b = rng.normal(size=a_shape).astype(dtype), rng.normal(size=b_shape).astype(dtype)
    want = a @ b
    with gpu.device():
        for device_a in [gpu.asarray(a)] + [gpu.asarray(np.ascontiguousarray(a.T)).T] * (a.ndim == 2):
            out = gpu.batched_matmul(device_a, gpu.asarray(b), gpu.empty(want.shape, dtype))
            np.testing.assert_allclose(gpu.to_numpy(out), want, rtol=1e-5, atol=1e-5)
    if gpu.name == "emulated":
        assert "gemm" in gpu.xp.launches


def test_a_half_precision_matrix_is_cast_once_and_transposed_without_a_copy(gpu, rng):
    a = rng.normal(size=(5, 7)).astype("float32")
    with gpu.device(), gpu.matmul_precision("bfloat16"):
        device_array = gpu.asarray(a)
        half = gpu.cast(device_array)
        assert isinstance(half, HalfMatrix) and half.shape == (5, 7) and len(half) == 5
        assert gpu.cast(half) is half
        assert gpu.cast(device_array.T).shape == (7, 5)
        outs = [
            gpu.matmul(x, y, gpu.empty((7, 7), "float32")) for x, y in ((half.T, half), (device_array.T, device_array))
        ]
    np.testing.assert_array_equal(*map(gpu.to_numpy, outs))
    with gpu.device():
        assert gpu.cast(device_array) is device_array


def test_a_status_other_than_success_is_an_error():
    library = SimpleNamespace(cublasCreate_v2=lambda handle: 1)
    workspace = np.zeros(4)
    with pytest.raises(RuntimeError, match="cublasCreate_v2 failed with status 1"):
        cublas.Cublas(library, 0, workspace)


def test_without_cublas_matrices_are_multiplied_by_cupy(gpu, rng, caplog, monkeypatch):
    if gpu.name != "emulated":
        pytest.skip("a real GPU has the library")
    monkeypatch.setattr(type(gpu), "_cublas_library", lambda self: ctypes.CDLL("libcublas-missing.so"))
    a = rng.normal(size=(3, 4)).astype("float32")
    for _ in range(2):
        out = gpu.matmul(gpu.asarray(a), gpu.asarray(a).T, gpu.empty((3, 3), "float32"))
    np.testing.assert_allclose(gpu.to_numpy(out), a @ a.T, rtol=1e-6)
    assert len(caplog.records) == 1 and "cuBLAS cannot be called (OSError" in caplog.text
    assert gpu.graph_capture() is None and "cuBLAS cannot be called" in gpu.precision_unavailable("tf32")
