"""Operators of every backend against Python's arithmetic: special functions, matrix products and random bits."""

import math

import numpy as np
import pytest
from devices import flushes_subnormals
from small_models import dense_net

import xpnet
from xpnet.backends import Backend

EDGES = [0.0, 5e-324, 1e-310, 0.46875, 4.0, 26.5, 27.2, 28.0, 1e4, 1e300, math.inf]
GRID = np.concatenate([np.linspace(0, 30, 30001), np.logspace(-320, 2, 3000), EDGES, np.nextafter(EDGES[3:8], 99)])
GRID = np.concatenate([GRID, -GRID])
KEY = (7, 0x1234567890, 3)


def ulps(got, want):
    """The largest error in units of the last place of `got`'s dtype; `want` is float64."""
    distance = np.abs(got.astype(np.float64) - want)
    return (distance / np.spacing(np.abs(want).astype(got.dtype)).astype(np.float64))[want != got].max(initial=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["erf", "erfc"])
def test_erf_and_erfc_are_exact_to_a_few_ulps(backend, name, dtype):
    with np.errstate(over="ignore"):
        x = GRID.astype(dtype)
    got = backend.to_numpy(getattr(backend, name)(backend.asarray(x)))
    want = np.array([getattr(math, name)(value) for value in x.tolist()])
    assert got.dtype == dtype
    if flushes_subnormals(backend, dtype):
        flushed = (got == 0) & (np.minimum(np.abs(want), np.abs(x)) < np.finfo(dtype).tiny)
        want = np.where(flushed, np.copysign(0.0, want), want)
    assert ulps(got, want) <= 8
    assert (np.signbit(got) == np.signbit(want)).all()


@pytest.mark.parametrize("name", ["erf", "erfc"])
def test_erf_and_erfc_keep_nan(backend, name):
    assert np.isnan(backend.to_numpy(getattr(backend, name)(backend.asarray([math.nan, -math.nan])))).all()


def test_ulps_finds_wrong_last_digits():
    assert ulps(np.array([1.0 + 1e-13]), np.array([1.0])) > 400


def sigmoid(x):
    return [1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z)) for z in x]


def softplus(x):
    return [max(z, 0) + math.log1p(math.exp(-abs(z))) for z in x]


def log_softmax(x):
    total = math.fsum(math.exp(z - max(x)) for z in x)
    return [z - max(x) - math.log(total) for z in x]


def softmax(x):
    return [math.exp(z) for z in log_softmax(x)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("formula", [sigmoid, softplus, softmax, log_softmax], ids=lambda f: f.__name__)
def test_operators_equal_their_formula(backend, reference, rng, formula, dtype):
    x = np.concatenate([rng.normal(size=(5, 7)), 20 * rng.normal(size=(5, 7)), 1e4 * rng.normal(size=(2, 7))])
    x = x.astype(dtype)
    operator, device_x = getattr(backend, formula.__name__), backend.asarray(x)
    got = backend.to_numpy(operator(device_x))
    eps = np.finfo(dtype).eps
    want = np.array([formula(row) for row in x.astype(np.float64).tolist()])
    # The logarithm of a probability near 1 is only accurate absolutely.
    atol = 4 * eps if formula is log_softmax else np.finfo(dtype).tiny
    np.testing.assert_allclose(got, want, rtol=(50 if formula is softmax else 4) * eps, atol=atol)
    assert got.dtype == dtype
    out = backend.empty(x.shape, dtype)
    assert operator(device_x, out=out) is out
    np.testing.assert_array_equal(backend.to_numpy(out), got)
    np.testing.assert_array_equal(backend.to_numpy(device_x), x)
    if backend.name in ("cpu", "strict"):
        np.testing.assert_array_equal(getattr(reference, formula.__name__)(x), got)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 1, 3), (5, 64, 33)])
def test_matmul_accepts_transposed_views(backend, rng, dtype, shape):
    n, k, m = shape
    a, b = rng.normal(size=(n, k)).astype(dtype), rng.normal(size=(k, m)).astype(dtype)
    for left in (backend.asarray(a), backend.asarray(a.T.copy()).T):
        for right in (backend.asarray(b), backend.asarray(b.T.copy()).T):
            out = backend.empty((n, m), dtype)
            assert backend.matmul(left, right, out=out) is out
            want = np.array(
                [[math.fsum(float(x) * float(y) for x, y in zip(row, col, strict=True)) for col in b.T] for row in a]
            )
            np.testing.assert_allclose(
                backend.to_numpy(out), want, rtol=0, atol=10 * math.sqrt(k) * np.finfo(dtype).eps
            )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sum_rows_works_with_changing_batch_sizes(backend, rng, dtype):
    for rows in (3, 1, 50, 7):  # also a smaller batch after a larger one
        a = rng.normal(size=(rows, 4)).astype(dtype)
        out = backend.empty((4,), dtype)
        backend.sum_rows(backend.asarray(a), out=out)
        want = [math.fsum(column) for column in a.T.tolist()]
        np.testing.assert_allclose(backend.to_numpy(out), want, rtol=0, atol=50 * np.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("source", "target"), [("float32", "float32"), ("float64", "float32"), ("uint8", "float32"), ("int64", "int64")]
)
def test_gather_picks_rows_and_converts(backend, rng, source, target):
    a, rows = rng.integers(0, 255, (6, 2, 3)).astype(source), [5, 0, 0, 3]
    out = backend.empty((4, 2, 3), target)
    assert backend.gather(backend.asarray(a), backend.asarray(rows), out) is out
    np.testing.assert_array_equal(backend.to_numpy(out), a[rows].astype(target))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_add_rows_at_adds_rows_with_equal_indices(backend, rng, dtype):
    for size, count, features in [(4, 1, 1), (7, 300, 5), (3, 20, 33)]:
        grad, rows = rng.normal(size=(count, features)).astype(dtype), rng.integers(0, size - 1, count)
        want = [[math.fsum(column) for column in grad[rows == v].T.tolist()] for v in range(size)]
        out = backend.asarray(np.full((size, features), np.nan, dtype))
        for _ in range(2):  # it assigns, and repeats bit for bit
            assert backend.add_rows_at(backend.asarray(grad), backend.asarray(rows), out=out) is out
            np.testing.assert_allclose(backend.to_numpy(out), want, rtol=0, atol=300 * np.finfo(dtype).eps)
        first = backend.to_numpy(out).copy()
        backend.add_rows_at(backend.asarray(grad), backend.asarray(rows), out=out)
        np.testing.assert_array_equal(backend.to_numpy(out), first)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_means_and_maxima_are_over_the_steps_that_count(backend, rng, dtype, masked):
    x, grad = rng.normal(size=(5, 6, 3)).astype(dtype), rng.normal(size=(5, 3)).astype(dtype)
    x[1, 2:4] = 9.0  # of equal numbers the first is chosen
    counted = rng.random((5, 6)) < 0.6 if masked else np.ones((5, 6), bool)
    counted[0] = not masked
    x[~counted] = np.nan
    mask = backend.asarray(counted) if masked else None
    mean, largest, choice = (backend.empty((5, 3), t) for t in (dtype, dtype, "int64"))
    backend.mean_steps(backend.asarray(x), mask, out=mean)
    backend.max_steps(backend.asarray(x), mask, out=largest, choice=choice)
    grads = backend.empty((2, *x.shape), dtype)
    backend.mean_steps_grad(backend.asarray(grad), mask, out=grads[0])
    backend.max_steps_grad(backend.asarray(grad), choice, out=grads[1])
    mean, largest, choice, grads = map(backend.to_numpy, (mean, largest, choice, grads))
    for n in range(5):
        steps = np.flatnonzero(counted[n])
        if not len(steps):
            assert not mean[n].any() and not largest[n].any() and (choice[n] == -1).all() and not grads[:, n].any()
            continue
        inner = x[n, steps]
        np.testing.assert_allclose(mean[n], inner.mean(axis=0), rtol=50 * np.finfo(dtype).eps, atol=1e-7)
        np.testing.assert_array_equal(largest[n], inner.max(axis=0))
        np.testing.assert_array_equal(choice[n], steps[inner.argmax(axis=0)])
        np.testing.assert_allclose(grads[0, n], counted[n][:, None] * grad[n] / len(steps), rtol=1e-6)
        np.testing.assert_array_equal(grads[1, n], (np.arange(6)[:, None] == choice[n]) * grad[n])


def test_cpu_memory_starts_on_a_cache_line():
    cpu = xpnet.get_backend("cpu")
    for shape in [(1,), (3, 5), (1000,)]:
        assert cpu.empty(shape, "float32").ctypes.data % 64 == 0
        assert not cpu.zeros(shape, "float64").any()
        assert cpu.zeros(shape, "float64").shape == shape


def hash32(h):
    """The hash lowbias32 by C. Wellons, of a Python integer."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        h = (h ^ h >> shift) * factor % 2**32
    return h


def test_random_bits_are_the_documented_hash_and_never_change(backend):
    got = backend.to_numpy(backend.random_bits(KEY, 3, 4, first_row=2**33 + 1))
    word = 0
    for part in KEY:
        word = hash32(hash32(word ^ part % 2**32) ^ part >> 32 ^ 0x5BD1E995)
    rows = [hash32(hash32(row >> 32 ^ word) ^ row % 2**32) for row in range(2**33 + 1, 2**33 + 4)]
    columns = [hash32(column ^ hash32(word ^ 0x9E3779B9)) for column in range(4)]
    assert got.dtype == np.uint32
    assert got.tolist() == [[hash32(row ^ column) for column in columns] for row in rows]
    # The result of the first version. Later versions must reproduce the masks of saved runs.
    assert backend.to_numpy(backend.random_bits((0, 1, 2), 1, 3)).tolist() == [[2164882793, 1893556194, 3032537736]]


@pytest.mark.parametrize("first_row", [0, 5, 2**32 - 3])
def test_parts_of_a_batch_get_the_random_bits_of_the_whole_batch(backend, first_row):
    whole = backend.to_numpy(backend.random_bits(KEY, 10, 6, first_row))
    parts = [backend.random_bits(KEY, 4, 6, first_row), backend.random_bits(KEY, 6, 6, first_row + 4)]
    np.testing.assert_array_equal(np.concatenate([backend.to_numpy(part) for part in parts]), whole)


@pytest.mark.parametrize("change", [0, 1, 2, "high half", "rows"])
def test_random_bits_differ_by_seed_layer_step_and_row(backend, change):
    key, first_row = list(KEY), 0
    if change == "rows":
        first_row = 2**32
    elif change == "high half":
        key[0] += 2**32
    else:
        key[change] += 1
    same = backend.to_numpy(backend.random_bits(KEY, 100, 100)) == backend.to_numpy(
        backend.random_bits(key, 100, 100, first_row)
    )
    assert same.sum() <= 2


def test_random_bits_are_uniform_and_uncorrelated():
    bits = Backend("reference", np).random_bits((0, 1, 2), 512, 512)
    for shift in (0, 12, 24):  # χ² of 255 degrees of freedom has mean 255 and standard deviation 22.6
        counts = np.bincount((bits >> shift & 255).ravel(), minlength=256)
        expected = bits.size / 256
        assert abs((np.square(counts - expected) / expected).sum() - 255) < 5 * 22.6
    uniform = bits / 2**32 - 0.5
    assert abs(uniform.mean()) < 5 * math.sqrt(1 / 12 / bits.size)
    for neighbor in (np.roll(uniform, 1, 0), np.roll(uniform, 1, 1), np.roll(uniform, (1, 1), (0, 1)), uniform.T):
        off_diagonal = (uniform * neighbor)[~np.eye(512, dtype=bool)]
        assert abs(off_diagonal.mean()) < 5 / 12 / math.sqrt(bits.size / 2)
    assert len(np.unique(bits)) > 0.9999 * bits.size


def test_the_gradient_of_a_bias_is_exact_over_many_rows():
    n, model = 200_000, dense_net(units=1, inputs=1)
    model.forward(np.zeros((n, 1), "float32"))
    model.backward(np.full((n, 1), 0.1), input_grad=False)
    np.testing.assert_allclose(model.layers[0].bias.grad, n * float(np.float32(0.1)), rtol=1e-6)


@pytest.mark.parametrize("columns", [1, 2, 64])
def test_a_sum_over_many_rows_is_exact(columns):
    backend = xpnet.get_backend("cpu")
    out = backend.sum_rows(np.full((200_000, columns), 0.1, np.float32), np.empty(columns, np.float32))
    np.testing.assert_allclose(out, np.float32(0.1) * 200_000.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_with_nan_is_never_correct(backend, dtype):
    nan = math.nan
    outputs = np.array([[nan, nan], [nan, 1], [1, nan], [1, 1], [-math.inf, -math.inf], [0, math.inf]], dtype)
    for labels, want in (([0] * 6, 2), ([1] * 6, 1)):
        got = backend.count_correct(backend.asarray(outputs), backend.asarray(np.array(labels)))
        assert backend.to_numpy(got).tolist() == [want, 6]
        clean = backend.count_correct(backend.asarray(outputs[3:]), backend.asarray(np.array(labels[3:])))
        assert backend.to_numpy(clean).tolist() == [want, 3]


@pytest.mark.parametrize("weighted", [False, True])
def test_count_pairs_counts_by_both_numbers(backend, rng, weighted):
    a, b, weights = rng.integers(0, 3, 50), rng.integers(0, 4, 50), rng.random(50)
    want = np.zeros((3, 4))
    np.add.at(want, (a, b), weights if weighted else 1)
    device = [backend.asarray(array) for array in (a, b, weights)]
    got = backend.to_numpy(backend.count_pairs(device[0], device[1], (3, 4), device[2] if weighted else None))
    assert got.dtype == (np.float64 if weighted else np.int64)
    np.testing.assert_allclose(got, want, rtol=1e-14)
