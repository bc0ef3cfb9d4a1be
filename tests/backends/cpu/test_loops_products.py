"""Compiled matrix products against float64, for every kind of vector registers."""

import importlib.util

import numpy as np
import pytest

import xpnet

loops_products = pytest.importorskip("xpnet.backends.cpu.loops_products", reason="Numba is not installed")
import llvmlite.binding  # noqa: E402
from numba import njit  # noqa: E402

from xpnet.backends.cpu import compiling  # noqa: E402


@pytest.fixture(params=["this processor", "avx512f", "avx", "none"])
def products(request, monkeypatch):
    """The module, as it is on processors with these registers. LLVM divides those that this processor lacks."""
    if request.param == "this processor":
        return loops_products
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: {request.param: True})
    monkeypatch.setattr(compiling, "compiled", njit)  # the cache of machine code does not depend on features
    spec = importlib.util.spec_from_file_location("loops_products_elsewhere", loops_products.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def multiply(products, a, b, out=None):
    """(a @ b, the columns beyond those of b), in an array with the columns of all panels."""
    width = products.panel_columns(b.itemsize)
    packed = np.full((-(-b.shape[1] // width), len(b), width), np.nan, b.dtype)
    products.pack(b, packed)
    out = np.full((len(a), len(packed) * width), np.nan, b.dtype)
    products.packed_product(a, packed, out)
    return out[:, : b.shape[1]], out[:, b.shape[1] :]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products_of_all_sizes(products, dtype):
    rng = np.random.default_rng(0)
    tolerance = 1e-5 if dtype == "float32" else 1e-14
    for rows in (*range(1, 26), 70):
        for depth, columns in ((0, 5), (1, 1), (7, 33), (40, 64), (3, 100)):
            a, b = rng.normal(size=(rows, depth)).astype(dtype), rng.normal(size=(depth, columns)).astype(dtype)
            for left in (a, np.asfortranarray(a)):
                for right in (b, np.asfortranarray(b)):
                    product, beyond = multiply(products, left, right)
                    expected = a.astype("float64") @ b.astype("float64")
                    assert np.allclose(product, expected, rtol=tolerance, atol=depth * tolerance)
                    assert not beyond.any()


def test_a_row_does_not_depend_on_the_number_of_rows(products):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(61, 50)), rng.normal(size=(50, 40))
    together, _ = multiply(products, a, b)
    for start, stop in ((0, 1), (1, 8), (5, 30), (60, 61)):
        part, _ = multiply(products, a[start:stop], b)
        assert (part == together[start:stop]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 2])
def test_matmul_with_many_rows(threads, dtype, monkeypatch):
    backend = xpnet.get_backend("cpu")
    used = []
    product = backend._packed_matmul
    monkeypatch.setattr(backend, "_packed_matmul", lambda *args: used.append(args) or product(*args), raising=False)
    rng = np.random.default_rng(0)
    with backend.parallel_region():
        monkeypatch.setattr(backend.threads._state, "workers", threads)
        for rows, depth, columns in ((128, 20, 64), (300, 0, 64), (1100, 40, 32), (300, 128, 256)):
            a, b = rng.normal(size=(rows, depth)).astype(dtype), rng.normal(size=(depth, columns)).astype(dtype)
            wide = np.zeros((rows, columns + 3), dtype)
            for out in (np.empty((rows, columns), dtype), wide[:, 2:-1]):
                for left in (a, np.asfortranarray(a)):
                    for right in (b, np.asfortranarray(b)):
                        used.clear()
                        out[...] = np.nan
                        backend.matmul(left, right, out=out)
                        assert used
                        assert np.allclose(out, a.astype("float64") @ b, rtol=1e-4, atol=1e-4)
            assert not wide[:, :2].any()
            assert not wide[:, -1].any()
