"""The loops of attention, normalization, GELU and clipping on the CPU, against the reference formulas in float64."""

import numpy as np
import pytest
from blas import blas_threads

import xpnet
from xpnet.backends import Backend

loops_transformer = pytest.importorskip("xpnet.backends.cpu.loops_transformer", reason="Numba is not installed")

REFERENCE = Backend("reference", np)
TOLERANCE = {"float32": 2e-6, "float64": 1e-14}
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, -45.0, 50.0]


@pytest.fixture(params=[1, 3])
def cpu(request):
    """The CPU backend in a parallel region, with one worker and with several."""
    backend = xpnet.get_backend("cpu")
    with blas_threads(request.param), backend.parallel_region(request.param > 1):
        yield backend


def assert_close(got, want, dtype):
    size = np.abs(want[np.isfinite(want)]).max(initial=1.0)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * size)


def attend(backend, q, k, v, grad, causal, mask, dropout, scale=0.3):
    """The output, the logarithms of the sums, and the gradients of q, k and v."""
    out, log_sums = np.full_like(q, np.nan), np.full((len(q), q.shape[2], q.shape[1]), np.nan, q.dtype)
    grads = [np.full_like(a, np.nan) for a in (q, k, v)]
    given = q, k, v, scale, causal, mask, dropout
    backend.attention(*given, out, log_sums)
    backend.attention_grad(*given, out, log_sums, grad, *grads)
    return out, log_sums, *grads


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [None, ((1, 2, 3), 0.3, 5)], ids=["kept", "dropped"])
@pytest.mark.parametrize("chunk_bytes", [2**20, 2000])  # all queries at once, and a few at a time
def test_attention_equals_the_reference(cpu, rng, monkeypatch, dtype, causal, dropout, chunk_bytes):
    monkeypatch.setattr(cpu, "chunk_bytes", chunk_bytes)
    for samples, queries, keys, heads, size in ((3, 7, 19, 2, 5), (2, 33, 33, 3, 16), (2, 1, 9, 1, 4), (4, 6, 3, 2, 4)):
        q, k, v, grad = (
            rng.normal(size=(samples, length, 2 * heads, size)).astype(dtype)[:, :, ::2]
            for length in (queries, keys, keys, queries)
        )
        some = rng.random((samples, keys)) < 0.6
        some[0] = False
        for mask in (None, some):
            got = attend(cpu, q, k, v, grad, causal, mask, dropout)
            exact = (a.astype("float64") for a in (q, k, v, grad))
            for mine, want in zip(got, attend(REFERENCE, *exact, causal, mask, dropout), strict=True):
                assert_close(mine, want, dtype)


def test_gradients_of_nearly_certain_queries_lose_no_more_digits_than_in_the_formula(cpu, rng):
    q, k, v, grad = (rng.normal(size=(4, 40, 2, 8)).astype("float32") for _ in range(4))
    q *= 40.0  # one probability is almost 1, and the gradients of the scores are small differences
    exact = attend(REFERENCE, *(a.astype("float64") for a in (q, k, v, grad)), True, None, None)
    mine, formula = (attend(backend, q, k, v, grad, True, None, None) for backend in (cpu, REFERENCE))
    for name, own, other, want in zip(("q", "k"), mine[2:], formula[2:], exact[2:], strict=False):
        assert np.linalg.norm(own - want) <= 2.0 * np.linalg.norm(other - want), f"grad_{name}"


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_attention_of_any_scale_equals_the_reference(cpu, rng, scale):
    arrays = rng.normal(size=(4, 2, 21, 1, 4)).astype("float32")
    mask = rng.random((2, 21)) < 0.6
    wanted = attend(REFERENCE, *arrays.astype("float64"), True, mask, None, scale)
    for got, want in zip(attend(cpu, *arrays, True, mask, None, scale), wanted, strict=True):
        assert_close(got, want, "float32")


def test_exp_in_float32():
    x = np.concatenate([np.linspace(-86.9, 0, 9001), [np.nan, -87.01, -1e30, -np.inf]]).astype("float32")
    got = np.array([loops_transformer._exp_in_float32(value) for value in x])
    want = np.exp(x.astype("float64"))
    want[-3:] = 0
    np.testing.assert_allclose(got, want, rtol=3e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gelu_equals_the_reference(cpu, dtype):
    x = np.concatenate([np.linspace(-12, 12, 20001), SPECIAL]).astype(dtype).reshape(-1, 4)
    (y, slope), (want, want_slope) = ((np.empty(x.shape, kind), np.empty(x.shape, kind)) for kind in (dtype, "float64"))
    REFERENCE.gelu(x.astype("float64"), want, want_slope)
    cpu.gelu(x, y, slope)
    np.testing.assert_allclose(y, want, rtol=1e-6 if dtype == "float32" else 1e-12, atol=1e-10)
    np.testing.assert_allclose(slope, want_slope, rtol=1e-6 if dtype == "float32" else 1e-12, atol=3e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("parameters", [False, True])
def test_normalization_equals_the_reference(cpu, rng, dtype, centered, parameters):
    for rows, columns in ((70, 19), (2, 1), (5, 64)):
        x, grad = (rng.normal(size=(rows, columns)).astype(dtype) for _ in range(2))
        gamma, beta = rng.normal(size=(2, columns)).astype(dtype) if parameters else (None, None)

        def results(backend, x, grad, gamma, beta, centered=centered):
            normal, y, grad_x = np.full((3, *x.shape), np.nan, x.dtype)
            sigma, grads = np.empty((len(x), 1), x.dtype), np.full((2, x.shape[1]), np.nan, x.dtype)
            backend.normalize_and_scale(x, centered, 1e-3, gamma, beta, normal, sigma, y)
            kept = (None, None) if gamma is None else grads
            backend.normalize_and_scale_grad(grad, centered, gamma, normal, sigma, *kept, grad_x)
            return normal, y, sigma, grad_x, *([] if gamma is None else grads)

        exact = [None if a is None else a.astype("float64") for a in (x, grad, gamma, beta)]
        for got, want in zip(results(cpu, x, grad, gamma, beta), results(REFERENCE, *exact), strict=True):
            assert_close(got, want, dtype)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e25])
def test_clipping_equals_the_reference_for_large_numbers_too(cpu, rng, size):
    grads = (size * rng.normal(size=5000)).astype("float32")
    got, want, runs = grads.copy(), grads.astype("float64"), [slice(0, 3000), slice(3016, 5000)]
    cpu.clip_norm(got, runs, 0.7)
    REFERENCE.clip_norm(want, runs, 0.7)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (got[3000:3016] == grads[3000:3016]).all()
