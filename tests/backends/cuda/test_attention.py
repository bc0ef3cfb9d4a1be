"""Attention by kernels that keep the scores in tiles, against the reference formulas, in every precision."""

import numpy as np
import pytest
from guarded import Guarded
from nvrtc import compiled

from xpnet.backends import Backend
from xpnet.backends.cuda.attention import TEMPLATES, Kernel

REFERENCE = Backend("reference", np)
TOLERANCES = {"float32": 2e-6, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 2e-2}  # relative to the norm
NAMES = ["attend", "attend_query_grad", "attend_key_grads"]
#: Samples, queries, keys, heads and numbers of a head; causal; masked; dropout. Blocks have 64 rows, tiles 32 or 64.
CASES = [
    ((1, 1, 3, 1, 4), False, False, False),
    ((2, 70, 70, 2, 16), True, True, False),
    ((1, 5, 131, 3, 64), False, True, True),
    ((1, 131, 70, 2, 20), True, False, True),
    ((2, 65, 129, 1, 128), True, True, True),
]


class Heads:
    """The arrays of an attention. results(backend, array, dtype): what it computes, forward and backward."""

    def __init__(self, rng, sizes, causal=False, masked=False, dropout=False):
        samples, queries, keys, heads, size = sizes
        self.q, self.grad = rng.normal(size=(2, samples, queries, heads, size))
        self.k, self.v = rng.normal(size=(2, samples, keys, heads, size))
        self.causal, self.dropout = causal, ((1, 2, 3), 0.3, 5) if dropout else None
        self.mask = rng.random((samples, keys)) < 0.7 if masked else None
        if masked:
            self.mask[0, :2] = False  # with `causal`, the first queries have no key

    def results(self, backend, array, dtype="float32"):
        q, k, v, grad = (array(a.shape, dtype, a) for a in (self.q, self.k, self.v, self.grad))
        mask = None if self.mask is None else backend.asarray(self.mask)
        out, grads = array(q.shape, dtype), [array(a.shape, dtype) for a in (q, k, v)]
        log_sums = array((len(q), q.shape[2], q.shape[1]), dtype)
        given = q, k, v, 0.4, self.causal, mask, self.dropout
        assert backend.attention(*given, out, log_sums) is out
        backend.attention_grad(*given, out, log_sums, grad, *grads)
        return [backend.to_numpy(a) for a in (out, log_sums, *grads)]


def filled(shape, dtype, fill=np.nan):
    return np.full(shape, fill, dtype)


def assert_near(results, wanted, precision):
    for got, want in zip(results, wanted, strict=True):
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got[~finite], want[~finite])
        error = np.linalg.norm(got[finite] - want[finite])
        assert error <= TOLERANCES[precision] * max(1.0, np.linalg.norm(want[finite]))


@pytest.mark.parametrize(
    ("precision", "sizes", "causal", "masked", "dropout"),
    [(precision, *case) for precision in TOLERANCES for case in (CASES if precision == "float32" else CASES[2:4])],
)
def test_attention_equals_the_reference(guarded, rng, precision, sizes, causal, masked, dropout):
    if guarded.backend.precision_unavailable(precision):
        pytest.skip("this device has no such precision")
    heads = Heads(rng, sizes, causal, masked, dropout)
    with guarded.backend.matmul_precision(precision):
        results = heads.results(guarded.backend, guarded)
        again = heads.results(guarded.backend, guarded)
    assert_near(results, heads.results(REFERENCE, filled, "float64"), precision)
    for first, second in zip(results, again, strict=True):
        np.testing.assert_array_equal(first, second)


def test_three_kernels_compute_it(gpu, rng):
    if gpu.name != "emulated":
        pytest.skip("the launches of a real GPU are not counted")
    with gpu.device():
        Heads(rng, (1, 3, 4, 2, 8)).results(gpu, Guarded(gpu))
    assert [name for name in gpu.xp.launches if name != "relu"] == [f"{name}_kernel" for name in NAMES]


def test_heads_may_be_parts_of_larger_arrays(gpu, rng):
    heads = Heads(rng, (2, 6, 6, 3, 8), causal=True)
    with gpu.device():
        packed = gpu.asarray(np.stack([heads.q, heads.k, heads.v], axis=2).astype("float32"))
        q, k, v = (packed[:, :, i] for i in range(3))
        out, log_sums = gpu.empty(q.shape, "float32"), gpu.empty((2, 3, 6), "float32")
        gpu.attention(q, k, v, 0.4, True, None, None, out, log_sums)
        grads, grad = gpu.empty(packed.shape, "float32"), gpu.asarray(heads.grad.astype("float32"))
        of_parts = [grads[:, :, i] for i in range(3)]
        assert gpu._attention_kernel("attend", (q, k, v, *of_parts), None, None, log_sums) is not None
        gpu.attention_grad(q, k, v, 0.4, True, None, None, out, log_sums, grad, *of_parts)
        results = [gpu.to_numpy(a) for a in (out, log_sums, *of_parts)]
    assert_near(results, heads.results(REFERENCE, filled, "float64"), "float32")


@pytest.mark.parametrize(("size", "dtype"), [(6, "float32"), (132, "float32"), (8, "float64")])
def test_other_heads_use_the_formula(gpu, rng, size, dtype):
    heads = Heads(rng, (2, 5, 5, 2, size), causal=True, masked=True)
    with gpu.device():
        array = gpu.asarray(heads.q.astype(dtype))
        assert gpu._attention_kernel("attend", [array], None, None, array) is None
        assert_near(
            heads.results(gpu, lambda *given: gpu.asarray(filled(*given)), dtype),
            heads.results(REFERENCE, filled, "float64"),
            "float32",
        )


def test_nan_spreads_to_the_queries_that_see_it(gpu, rng):
    heads = Heads(rng, (1, 4, 4, 1, 8), causal=True)
    heads.q[0, 1, 0, 0] = heads.k[0, 3, 0, 0] = np.nan
    with gpu.device():
        out, log_sums, *_ = heads.results(gpu, Guarded(gpu))
    for rows in (out[0, :, 0, 0], log_sums[0, 0]):
        np.testing.assert_array_equal(np.isnan(rows), [False, True, False, True])


@pytest.mark.parametrize(("architecture", "precision"), [(75, "float32"), (80, "tf32"), (90, "bfloat16")])
def test_nvrtc_compiles_the_kernels(architecture, precision):
    compile_kernels(architecture, precision, 64)


@pytest.mark.sweep
@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100])
def test_nvrtc_compiles_the_kernels_for_every_device(architecture, precision, size):
    compile_kernels(architecture, precision, size)


def compile_kernels(architecture, precision, size):
    kernels = [Kernel(name, precision, size, dropout=True) for name in NAMES]
    source = TEMPLATES + "".join(kernel.definition for kernel in kernels)
    cubin = compiled(source, architecture, "-DREAL=float")
    for kernel in kernels:
        assert f"{kernel.name}_kernel".encode() in cubin
