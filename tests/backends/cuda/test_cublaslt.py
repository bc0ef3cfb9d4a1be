"""Calls of cuBLASLt: layouts, precisions and epilogues, on an emulation and on a real GPU."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from matrices import LAYOUTS, SHAPES, in_layout
from precisions import require_precision

from xpnet.backends.cuda import cublaslt
from xpnet.backends.cuda.cublas import HalfMatrix
from xpnet.backends.cuda.cublaslt import CublasLt, LtEpilogue, LtProduct, alignment, mask_shape


@pytest.fixture
def lt(gpu):
    with gpu.device(), gpu.stream():
        yield CublasLt(gpu._cublaslt_library(), gpu.empty((2**22,), "uint8"))


def stream(gpu):
    return gpu.xp.cuda.get_current_stream().ptr


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("first", "second"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_algorithm_multiplies_matrices_of_every_layout(gpu, lt, rng, shape, first, second):
    m, k, n = shape
    a, b = rng.normal(size=(m, k)).astype("float32"), rng.normal(size=(k, n)).astype("float32")
    x, y, out = in_layout(gpu, a, first), in_layout(gpu, b, second), gpu.empty((m, n), "float32")
    product = LtProduct(lt, x, y, out, LtEpilogue(), "float32", 3)
    assert product.count > 0
    for i in range(product.count):
        out[...] = np.nan
        product(i, x, y, out, LtEpilogue(), stream(gpu))
        np.testing.assert_allclose(gpu.to_numpy(out), a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_a_row_is_added_to_some_columns(gpu, lt, rng, relu, precision):
    require_precision(gpu, precision)
    a, b, row = (rng.normal(size=s).astype("float32") for s in ((6, 20), (20, 5), (5,)))
    x, y, r = map(gpu.asarray, (a, b, row))
    out = gpu.asarray(np.full((6, 9), 7, "float32"))
    epilogue = LtEpilogue(r, relu)
    LtProduct(lt, x, y, out[:, 4:], epilogue, precision, 1)(0, x, y, out[:, 4:], epilogue, stream(gpu))
    want = a @ b + row
    tolerance = 1e-5 if precision == "float32" else 2e-2
    got = gpu.to_numpy(out)
    np.testing.assert_allclose(got[:, 4:], np.maximum(want, 0) if relu else want, rtol=tolerance, atol=tolerance)
    assert (got[:, :4] == 7).all()
    if precision == "tf32":
        assert np.abs(got[:, 4:] - want)[want > 0].max() > 1e-6


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("in_halves", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_in_16_bits_are_multiplied(gpu, lt, rng, precision, in_halves, transposed):
    require_precision(gpu, precision)
    a, b, row = (rng.normal(size=s).astype("float32") for s in ((16, 40), (40, 24), (24,)))
    with gpu.matmul_precision(precision):
        x, y, r = (gpu.cast(gpu.asarray(v)) for v in (a, b, row))
        if transposed:
            x = gpu.cast(gpu.asarray(np.ascontiguousarray(a.T))).T
        out = gpu.empty((16, 24), "float32")
        result, r = (gpu.cast(out), r) if in_halves else (out, gpu.asarray(row))
        epilogue = LtEpilogue(r, relu=True)
        LtProduct(lt, x, y, result, epilogue, precision, 1)(0, x, y, result, epilogue, stream(gpu))
        want = gpu.matmul(x, y, gpu.empty((16, 24), "float32"))
        want = np.maximum(gpu.to_numpy(want) + row, 0)
    got = decoded(gpu, result) if in_halves else gpu.to_numpy(out)
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-7 if in_halves else 1e-5)
    assert np.abs(want - np.maximum(a @ b + row, 0)).max() > 1e-4


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("columns", [128, 136])
def test_a_product_writes_the_mask_by_which_another_one_is_multiplied(gpu, lt, rng, precision, columns):
    require_precision(gpu, precision)
    a, b, c, d = (rng.normal(size=s).astype("float32") for s in ((64, 48), (48, columns), (64, 32), (columns, 32)))
    row = rng.normal(size=columns).astype("float32")
    with gpu.matmul_precision(precision):
        x, w, row16, grad, v = (gpu.cast(gpu.asarray(matrix)) for matrix in (a, b, row, c, d))
        y, out = (HalfMatrix(gpu.empty((64, columns), "uint16"), precision) for _ in range(2))
        mask = gpu.empty(mask_shape(y.shape), "uint8")
        forward, backward = LtEpilogue(row16, relu=True, mask=mask), LtEpilogue(mask=mask)
        products = [
            LtProduct(lt, x, w, y, forward, precision, 3),
            LtProduct(lt, grad, v.T, out, backward, precision, 3),
        ]
        want_y = np.maximum(decoded(gpu, x) @ decoded(gpu, w) + decoded(gpu, row16), 0)
        want = decoded(gpu, grad) @ decoded(gpu, v).T * (want_y > 0)
        assert columns % 128 or all(product.count > 0 for product in products)
        for i, j in itertools.product(*[range(product.count) for product in products]):
            y.bits[...] = out.bits[...] = 0x7FFF
            mask[...] = 0xFF
            products[0](i, x, w, y, forward, stream(gpu))
            products[1](j, grad, v.T, out, backward, stream(gpu))
            np.testing.assert_allclose(decoded(gpu, y), want_y, rtol=2**-7, atol=2**-7)
            np.testing.assert_allclose(decoded(gpu, out), want, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_the_rows_of_a_factor_are_summed(gpu, lt, rng, precision):
    require_precision(gpu, precision)
    with gpu.matmul_precision(precision):
        x, grad = (gpu.cast(gpu.asarray(rng.normal(size=(512, n)).astype("float32"))) for n in (64, 136))
    out, sums = gpu.empty((64, 136), "float32"), gpu.empty((136,), "float32")
    epilogue = LtEpilogue(sums=sums)
    product = LtProduct(lt, x.T, grad, out, epilogue, precision, 3)
    for i in range(product.count):  # none for some GPUs
        out[...] = sums[...] = np.nan
        product(i, x.T, grad, out, epilogue, stream(gpu))
        want = decoded(gpu, grad).astype("float64")
        np.testing.assert_allclose(gpu.to_numpy(sums), want.sum(axis=0), rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(gpu.to_numpy(out), decoded(gpu, x).T @ want, rtol=1e-4, atol=1e-3)


def decoded(gpu, half):
    bits = gpu.to_numpy(half.bits)
    return (
        bits.view("float16").astype("float32")
        if half.precision == "float16"
        else (bits.astype("uint32") << 16).view("float32")
    )


def test_the_addresses_may_differ_from_those_of_the_preparation(gpu, lt, rng):
    matrices = [[gpu.asarray(rng.normal(size=(4, 4)).astype("float32")) for _ in range(3)] for _ in range(2)]
    rows = [gpu.asarray(rng.normal(size=4).astype("float32")) for _ in range(2)]
    product = LtProduct(lt, *matrices[0], LtEpilogue(rows[0]), "float32", 1)
    (a, b, out), row = matrices[1], rows[1]
    product(0, a, b, out, LtEpilogue(row), stream(gpu))
    want = gpu.to_numpy(a) @ gpu.to_numpy(b) + gpu.to_numpy(row)
    np.testing.assert_allclose(gpu.to_numpy(out), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("address", "want"), [(0, 256), (4, 4), (1024, 256), (768, 256), (96, 32)])
def test_alignment_of_an_address(address, want):
    assert alignment(SimpleNamespace(data=SimpleNamespace(ptr=address))) == want


def test_a_status_other_than_success_is_an_error():
    with pytest.raises(RuntimeError, match="cublasLtCreate failed with status 3"):
        CublasLt(SimpleNamespace(cublasLtCreate=lambda handle: 3), np.zeros(4))


def test_the_version_is_that_of_the_library(gpu):
    assert cublaslt.version(gpu._cublaslt_library()) > 100000
