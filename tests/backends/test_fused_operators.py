"""Fused operators against the sequences of operators that they replace: the same bits, or close on a real GPU."""

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest
from blas import blas_threads
from without_numba import formulas_only

import xpnet
from xpnet.backends import Backend
from xpnet.backends.reference.fused import FusedOperators

SHAPES = [(1, 1), (1, 5), (7, 1), (9, 10), (64, 300), (1500, 6), (5000, 3)]
MATRICES = [
    *[(shape, "contiguous") for shape in SHAPES],
    *[(shape, layout) for shape in ((9, 10), (5000, 3)) for layout in ("by columns", "every other column")],
]
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0]


def every_array(test):
    """Run the test with both dtypes, and matrices of many shapes and memory layouts."""
    test = pytest.mark.parametrize("dtype", ["float32", "float64"])(test)
    return pytest.mark.parametrize(("shape", "layout"), MATRICES)(test)


def contexts(backend):
    """Where operators of this backend differ: on the CPU, in parallel regions with and without loops and workers."""
    yield contextlib.nullcontext()
    for threads in (1, 3) if backend.name == "cpu" else ():
        with blas_threads(threads):
            yield backend.parallel_region(threads > 1)
            with formulas_only():
                yield backend.parallel_region(threads > 1)


def on_device(backend, a, layout):
    """A copy of `a` on the device; matrices in this memory layout."""
    if a.ndim != 2 or layout == "contiguous":
        return backend.asarray(a.copy())
    if layout == "by columns":
        return backend.asarray(a.T.copy()).T
    wide = backend.asarray(np.repeat(a, 2, axis=1))
    return wide[:, ::2]


def compare(backend, fused, sequence, layout, *arrays):
    """Call both with copies of the arrays; whatever is returned must be equal."""
    for context in contexts(backend):
        with context, backend.device(), np.errstate(all="ignore"):
            got, want = (f(*[on_device(backend, a, layout) for a in arrays]) for f in (fused, sequence))
        for a, b in zip(got, want, strict=True):
            a, b = backend.to_numpy(a), backend.to_numpy(b)
            assert a.dtype == b.dtype
            if backend.name in ("cpu", "strict", "emulated"):
                np.testing.assert_array_equal(a, b)
                number = ~np.isnan(a)
                np.testing.assert_array_equal(np.signbit(a)[number], np.signbit(b)[number])
            else:
                eps = np.finfo(arrays[0].dtype).eps
                scale = max(1.0, np.abs(b, where=np.isfinite(b), out=np.zeros(b.shape)).max())
                np.testing.assert_allclose(a, b, rtol=100 * eps, atol=100 * eps * scale)


def numbers(rng, shape, dtype):
    x = rng.normal(size=shape).astype(dtype)
    flat = x.reshape(-1)
    flat[: len(SPECIAL)] = SPECIAL[: flat.size]
    return x


@every_array
@pytest.mark.parametrize("in_place", [False, True])
def test_add_to_rows_relu(backend, rng, shape, in_place, layout, dtype):
    a, row, out = numbers(rng, shape, dtype), numbers(rng, shape[1:], dtype)[::-1], np.full(shape, 7, dtype)

    def fused(a, row, out):
        out = a if in_place else out
        result = backend.add_to_rows_relu(a, row, out)
        assert result is out
        return [result]

    def sequence(a, row, out):
        backend.add_to_rows(a, row)
        return [backend.relu(a, out=a if in_place else out)]

    compare(backend, fused, sequence, layout, a, row, out)


@every_array
@pytest.mark.parametrize("in_place", [False, True])
def test_relu_grad_sum_rows(backend, rng, shape, in_place, layout, dtype):
    grad, y = numbers(rng, shape, dtype), np.maximum(numbers(rng, shape, dtype)[::-1], 0)
    out, sums = np.full(shape, 7, dtype), np.full(shape[1:], 7, dtype)

    def fused(grad, y, out, sums):
        out = y if in_place else out
        result = backend.relu_grad_sum_rows(grad, y, out, sums)
        assert result is out
        return [result, sums]

    def sequence(grad, y, out, sums):
        out = backend.relu_grad(grad, y, out=y if in_place else out)
        return [out, backend.sum_rows(out, out=sums)]

    compare(backend, fused, sequence, layout, grad, y, out, sums)


def logits_and_labels(rng, shape, dtype, special):
    """Logits with many ties; `special`: also with NaN, infinities, and a row of equal numbers."""
    logits = rng.integers(4, size=shape).astype(dtype) - rng.integers(2, size=shape[:1])[:, None].astype(dtype) / 8
    if special:
        logits[rng.random(shape) < 0.05] = np.inf
        logits[rng.random(shape) < 0.05] = -np.inf
        logits[rng.random(shape) < 0.05] = np.nan
        logits[0], logits[-1] = 1, np.nan
    return logits, rng.integers(shape[1], size=shape[0])


@every_array
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("smoothing", "scale", "counted"), [(0.0, 1 / 3, True), (0.1, 1.0, True), (0.1, 1e-3, False)])
def test_cross_entropy_sums(backend, rng, shape, special, smoothing, scale, counted, layout, dtype):
    logits, labels = logits_and_labels(rng, shape, dtype, special)
    arrays = [np.full(shape[0], 7, dtype), np.full(shape, 7, dtype), np.full((3, 2), 7.0), np.array([5, 2**40])]

    def fused(logits, labels, losses, grad, sums, correct):
        given = correct if counted else None
        result = backend.cross_entropy_sums(logits, labels, smoothing, scale, losses, grad, sums[1, 1, ...], given)
        assert result[0] is losses and result[1] is grad
        return [losses, grad, sums, correct]

    def sequence(logits, labels, losses, grad, sums, correct):
        backend.cross_entropy(logits, labels, smoothing, losses, grad)
        grad *= scale
        backend.sum_to(losses, sums[1, 1, ...])
        if counted:
            correct += backend.count_correct(logits, labels)
        return [losses, grad, sums, correct]

    compare(backend, fused, sequence, layout, logits, labels, *arrays)


def test_only_passes_use_fused_operators():
    names = [name for name in vars(FusedOperators) if not name.startswith("_")]
    assert "add_to_rows_relu" in names and all(callable(getattr(Backend, name)) for name in names)
    package, used = Path(xpnet.__file__).parent, rf"\.({'|'.join(names)})\b"
    for path in [*package.glob("*.py"), *package.glob("layers/*.py")]:
        assert not re.search(used, path.read_text(encoding="utf-8")), path
