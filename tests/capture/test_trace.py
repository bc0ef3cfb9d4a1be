"""The trace: a replay of each function, method and operator that it knows equals NumPy; all others are refused."""

import inspect
import operator
import threading

import numpy as np
import pytest
from traced_programs import STEP, Traced, directly, number_of, same_bits

from xpnet.backends.step_numbers import StepNumber
from xpnet.capture import array_module as module
from xpnet.capture import calls
from xpnet.capture.array_module import TracedModule
from xpnet.capture.trace import Trace, TracedArray
from xpnet.errors import CaptureError

pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")

DTYPES = {"float32": "f4", "float64": "f8", "int64": "i8", "bool": "?"}


def values(seed, dtype="f4"):
    """Two arrays (3, 4), a vector (4,) and a square matrix (3, 3), with some zeros."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=shape) * 2 for shape in ((3, 4), (3, 4), (4,), (3, 3))]
    for a in arrays:
        a[rng.random(a.shape) < 0.2] = 0.0
    return [(a > 0) if dtype == "?" else a.astype(dtype) for a in arrays]


def results(value):
    """The arrays in what a function returned."""
    items = value if isinstance(value, list | tuple) else [value]
    return [np.asarray(item.values if isinstance(item, TracedArray) else item) for item in items]


def check(function, dtype="f4"):
    """Trace a function of (xp, a, b, vector, square, number); compare its replays with NumPy, on other values."""
    traced = Traced(function, values(0, dtype), passes=False, shared=False)
    for data, step in ((0, STEP), (1, STEP + 1), (2, STEP + 40)):
        given = values(data, dtype)
        copies = [a.copy() for a in given]
        want = results(function(np, *copies, number_of(step)))
        after = traced.replay(given, step)
        got = results(traced.returned)
        assert len(got) == len(want)
        for x, y in (*zip(got, want, strict=True), *zip(after, copies, strict=True)):
            assert same_bits(x, y)


# Functions -----------------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "all": [lambda xp, a, b, v, s, n: xp.all(a > -2, axis=0)],
    "amax": [lambda xp, a, b, v, s, n: xp.amax(a, axis=1), lambda xp, a, b, v, s, n: xp.amax(a, keepdims=True)],
    "amin": [lambda xp, a, b, v, s, n: xp.amin(a)],
    "any": [lambda xp, a, b, v, s, n: xp.any(a > 2, axis=1)],
    "argmax": [lambda xp, a, b, v, s, n: xp.argmax(a, axis=1), lambda xp, a, b, v, s, n: xp.argmax(a)],
    "argmin": [lambda xp, a, b, v, s, n: xp.argmin(a, axis=0)],
    "argsort": [lambda xp, a, b, v, s, n: xp.argsort(a, axis=1, kind="stable")],
    "array_split": [lambda xp, a, b, v, s, n: [p * 2 for p in xp.array_split(a, 2)]],
    "atleast_1d": [lambda xp, a, b, v, s, n: xp.atleast_1d(a) * 2],
    "atleast_2d": [lambda xp, a, b, v, s, n: xp.atleast_2d(v) * 2],
    "atleast_3d": [lambda xp, a, b, v, s, n: xp.atleast_3d(a) * 2],
    "broadcast_arrays": [lambda xp, a, b, v, s, n: [p * 2 for p in xp.broadcast_arrays(a, v)]],
    "broadcast_to": [lambda xp, a, b, v, s, n: xp.broadcast_to(v, (3, 4)) + a],
    "clip": [lambda xp, a, b, v, s, n: xp.clip(a, -1, 1), lambda xp, a, b, v, s, n: xp.clip(a, 0, None, out=b)],
    "column_stack": [lambda xp, a, b, v, s, n: xp.column_stack([a, b])],
    "concatenate": [lambda xp, a, b, v, s, n: xp.concatenate([a, b], axis=1)],
    "count_nonzero": [lambda xp, a, b, v, s, n: xp.count_nonzero(a, axis=0)],
    "cross": [lambda xp, a, b, v, s, n: xp.cross(s, s[::-1])],
    "cumprod": [lambda xp, a, b, v, s, n: xp.cumprod(a, axis=1)],
    "cumsum": [lambda xp, a, b, v, s, n: xp.cumsum(a, axis=0), lambda xp, a, b, v, s, n: xp.cumsum(a)],
    "diagonal": [lambda xp, a, b, v, s, n: xp.diagonal(s) * 2],
    "diff": [lambda xp, a, b, v, s, n: xp.diff(a, axis=0)],
    "dot": [lambda xp, a, b, v, s, n: xp.dot(a, v), lambda xp, a, b, v, s, n: xp.dot(s, a)],
    "dstack": [lambda xp, a, b, v, s, n: xp.dstack([a, b])],
    "einsum": [
        lambda xp, a, b, v, s, n: xp.einsum("ij,ij->i", a, b), lambda xp, a, b, v, s, n: xp.einsum("ii->i", s) * 2,
    ],
    "expand_dims": [lambda xp, a, b, v, s, n: xp.expand_dims(a, 1) * 2],
    "flip": [lambda xp, a, b, v, s, n: xp.flip(a, 1) * 2],
    "fliplr": [lambda xp, a, b, v, s, n: xp.fliplr(a) * 2],
    "flipud": [lambda xp, a, b, v, s, n: xp.flipud(a) * 2],
    "hstack": [lambda xp, a, b, v, s, n: xp.hstack([a, b])],
    "inner": [lambda xp, a, b, v, s, n: xp.inner(a, v)],
    "kron": [lambda xp, a, b, v, s, n: xp.kron(a, s)],
    "max": [lambda xp, a, b, v, s, n: xp.max(a, axis=(0, 1))],
    "mean": [lambda xp, a, b, v, s, n: xp.mean(a, axis=0), lambda xp, a, b, v, s, n: xp.mean(a, out=v[0, ...])],
    "median": [lambda xp, a, b, v, s, n: xp.median(a, axis=0)],
    "min": [lambda xp, a, b, v, s, n: xp.min(a, axis=1, keepdims=True)],
    "moveaxis": [lambda xp, a, b, v, s, n: xp.moveaxis(a, 0, 1) * 2],
    "nan_to_num": [lambda xp, a, b, v, s, n: xp.nan_to_num(a / 0.0)],
    "nanmax": [lambda xp, a, b, v, s, n: xp.nanmax(a, axis=0)],
    "nanmean": [lambda xp, a, b, v, s, n: xp.nanmean(a, axis=0)],
    "nanmin": [lambda xp, a, b, v, s, n: xp.nanmin(a, axis=0)],
    "nansum": [lambda xp, a, b, v, s, n: xp.nansum(a, axis=0)],
    "outer": [lambda xp, a, b, v, s, n: xp.outer(v, v)],
    "pad": [lambda xp, a, b, v, s, n: xp.pad(a, 1)],
    "prod": [lambda xp, a, b, v, s, n: xp.prod(a, axis=0)],
    "ptp": [lambda xp, a, b, v, s, n: xp.ptp(a, axis=0)],
    "quantile": [lambda xp, a, b, v, s, n: xp.quantile(a, 0.3, axis=0)],
    "ravel": [lambda xp, a, b, v, s, n: xp.ravel(a) * 2, lambda xp, a, b, v, s, n: xp.ravel(a.T) * 2],
    "repeat": [lambda xp, a, b, v, s, n: xp.repeat(a, 2, axis=1)],
    "reshape": [lambda xp, a, b, v, s, n: xp.reshape(a, (4, 3)) * 2, lambda xp, a, b, v, s, n: xp.reshape(a.T, 12)],
    "roll": [lambda xp, a, b, v, s, n: xp.roll(a, 1, axis=1)],
    "rollaxis": [lambda xp, a, b, v, s, n: xp.rollaxis(a, 1) * 2],
    "rot90": [lambda xp, a, b, v, s, n: xp.rot90(a) * 2],
    "sort": [lambda xp, a, b, v, s, n: xp.sort(a, axis=1)],
    "split": [lambda xp, a, b, v, s, n: [p * 2 for p in xp.split(a, 3)]],
    "squeeze": [lambda xp, a, b, v, s, n: xp.squeeze(a[:1]) * 2],
    "stack": [lambda xp, a, b, v, s, n: xp.stack([a, b], axis=1)],
    "std": [lambda xp, a, b, v, s, n: xp.std(a, axis=0)],
    "sum": [
        lambda xp, a, b, v, s, n: xp.sum(a, axis=0), lambda xp, a, b, v, s, n: xp.sum(a, dtype="float64"),
        lambda xp, a, b, v, s, n: xp.sum(a, axis=0, out=v), lambda xp, a, b, v, s, n: xp.sum(a, 1, keepdims=True),
    ],
    "swapaxes": [lambda xp, a, b, v, s, n: xp.swapaxes(a, 0, 1) * 2],
    "take": [
        lambda xp, a, b, v, s, n: xp.take(a, xp.asarray([0, 2]), axis=0), lambda xp, a, b, v, s, n: xp.take(a, [1, 0]),
        lambda xp, a, b, v, s, n: xp.take(a, xp.argmax(a, axis=0), axis=1, mode="clip"),
    ],
    "take_along_axis": [lambda xp, a, b, v, s, n: xp.take_along_axis(a, xp.argsort(b, axis=1), axis=1)],
    "tensordot": [lambda xp, a, b, v, s, n: xp.tensordot(a, b, ([1], [1]))],
    "tile": [lambda xp, a, b, v, s, n: xp.tile(a, (2, 1))],
    "trace": [lambda xp, a, b, v, s, n: xp.trace(s)],
    "transpose": [lambda xp, a, b, v, s, n: xp.transpose(a) * 2],
    "tril": [lambda xp, a, b, v, s, n: xp.tril(s)],
    "triu": [lambda xp, a, b, v, s, n: xp.triu(s, 1)],
    "var": [lambda xp, a, b, v, s, n: xp.var(a, axis=1, keepdims=True)],
    "vdot": [lambda xp, a, b, v, s, n: xp.vdot(a, b)],
    "vstack": [lambda xp, a, b, v, s, n: xp.vstack([a, v])],
    "where": [lambda xp, a, b, v, s, n: xp.where(a > b, a, v), lambda xp, a, b, v, s, n: xp.where(a > 0, 1.0, b)],
    # Functions that make arrays, which the step may write into:
    "arange": [lambda xp, a, b, v, s, n: _plus(xp.arange(4), v.astype("i8"))],
    "eye": [lambda xp, a, b, v, s, n: _plus(xp.eye(3), s)],
    "full": [lambda xp, a, b, v, s, n: _plus(xp.full((3, 4), 2.5), a)],
    "identity": [lambda xp, a, b, v, s, n: _plus(xp.identity(3), s)],
    "indices": [lambda xp, a, b, v, s, n: xp.indices((2, 3)) * 2],
    "linspace": [lambda xp, a, b, v, s, n: _plus(xp.linspace(0, 1, 4), v)],
    "ones": [lambda xp, a, b, v, s, n: _plus(xp.ones((3, 4)), a)],
    "tri": [lambda xp, a, b, v, s, n: _plus(xp.tri(3), s)],
    "zeros": [lambda xp, a, b, v, s, n: _plus(xp.zeros((3, 4)), a), lambda xp, a, b, v, s, n: xp.zeros((0, 3))],
    "empty": [lambda xp, a, b, v, s, n: _filled(xp.empty((2, 3), "f4"), 3.0)],
    "empty_like": [lambda xp, a, b, v, s, n: _filled(xp.empty_like(a), -1.0)],
    "zeros_like": [
        lambda xp, a, b, v, s, n: _plus(xp.zeros_like(a), a), lambda xp, a, b, v, s, n: xp.zeros_like(a, "f8") + a,
        lambda xp, a, b, v, s, n: xp.zeros_like(np.ones(4)) + v,
    ],
    "ones_like": [
        lambda xp, a, b, v, s, n: _plus(xp.ones_like(a), a), lambda xp, a, b, v, s, n: xp.ones_like(a, "f8") + a,
    ],
    "full_like": [
        lambda xp, a, b, v, s, n: _plus(xp.full_like(a, 2.0), a),
        lambda xp, a, b, v, s, n: xp.full_like(a, 2, "f8") + a,
    ],
    "copyto": [lambda xp, a, b, v, s, n: xp.copyto(a, b), lambda xp, a, b, v, s, n: xp.copyto(a, v, where=b > 0)],
    "asarray": [
        lambda xp, a, b, v, s, n: xp.asarray(a), lambda xp, a, b, v, s, n: xp.asarray(a, "f8") * 2,
        lambda xp, a, b, v, s, n: _plus(xp.asarray([[1.0], [2.0], [3.0]]), s[:, :1]),
        lambda xp, a, b, v, s, n: xp.copysign(v[:2], xp.asarray([0.0, -0.0], "f4")),
        lambda xp, a, b, v, s, n: (xp.asarray(a, order="C"), xp.asarray(a.T, order="C").reshape(-1)),
    ],
    "array": [
        lambda xp, a, b, v, s, n: _plus(xp.array(a), b), lambda xp, a, b, v, s, n: xp.array([1, 2, 3]) * 2,
        lambda xp, a, b, v, s, n: (_plus(xp.array(a, copy=True), b), xp.array(a, copy=None) * 2),
    ],
    "ascontiguousarray": [
        lambda xp, a, b, v, s, n: xp.ascontiguousarray(a.T), lambda xp, a, b, v, s, n: xp.ascontiguousarray(a),
        lambda xp, a, b, v, s, n: xp.ascontiguousarray(a, dtype="f8"),
    ],
    # Questions whose answers do not depend on values:
    "can_cast": [lambda xp, a, b, v, s, n: xp.can_cast("f4", "f8")],
    "finfo": [lambda xp, a, b, v, s, n: a + xp.finfo(a.dtype).eps],
    "iinfo": [lambda xp, a, b, v, s, n: xp.iinfo("i4").max],
    "isscalar": [lambda xp, a, b, v, s, n: xp.isscalar(a)],
    "ndim": [lambda xp, a, b, v, s, n: xp.ndim(a)],
    "result_type": [lambda xp, a, b, v, s, n: a.astype(xp.result_type(a, "f8"))],
    "shape": [lambda xp, a, b, v, s, n: xp.shape(a)[0]],
    "size": [lambda xp, a, b, v, s, n: xp.size(a)],
    "issubdtype": [lambda xp, a, b, v, s, n: xp.issubdtype(a.dtype, xp.floating)],
    "promote_types": [lambda xp, a, b, v, s, n: a.astype(xp.promote_types(a.dtype, "f8"))],
}  # fmt: skip


def _plus(made, a):
    made += a
    return made


def _filled(a, number):
    a.fill(number)
    return a


def test_every_function_that_the_trace_knows_has_an_example():
    known = module._FUNCTIONS | module._CREATORS | module._UNINITIALIZED | module._INQUIRIES
    special = {name for name in vars(module._Special) if not name.startswith("_")}
    assert set(FUNCTIONS) == known | special | set(module._REDUCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function(name):
    for function in FUNCTIONS[name]:
        check(function)
        check(function, "f8")


#: NumPy does not ask its arguments how to compute these.
NOT_ASKED = {
    *("arange", "eye", "full", "identity", "indices", "linspace", "ones", "tri", "zeros", "empty", "asarray", "array"),
    *("ascontiguousarray", "finfo", "iinfo", "can_cast", "isscalar", "issubdtype", "promote_types"),
}


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in NOT_ASKED])
def test_a_function_through_numpy(name):
    """NumPy passes what it is given on to the array."""

    class Through:
        def __init__(self, xp):
            self.xp = xp

        def __getattr__(self, attribute):
            return getattr(np if attribute == name else self.xp, attribute)

    for function in FUNCTIONS[name]:
        check(lambda xp, *args, function=function: function(Through(xp), *args))


UFUNCS = sorted(name for name in dir(np) if isinstance(getattr(np, name), np.ufunc) and getattr(np, name).nout == 1)


@pytest.mark.parametrize("name", UFUNCS)
def test_a_ufunc(name):
    ufunc, checked = getattr(np, name), 0
    for dtype in ("f4", "f8", "i8", "?"):
        a, b, v, s = values(0, dtype)
        args = {"matvec": (a, v), "vecmat": (v, a.T), "matmul": (s, a)}.get(name, (a, b)[: ufunc.nin])
        try:
            ufunc(*args)
        except (TypeError, ValueError):
            continue
        checked += 1

        def call(xp, a, b, v, s, n):
            args = {"matvec": (a, v), "vecmat": (v, a.T), "matmul": (s, a)}.get(name, (a, b)[: ufunc.nin])
            result = getattr(xp, name)(*args)
            out = xp.empty(result.shape, result.dtype)
            getattr(xp, name)(*args, out=out)
            return result, out

        check(call, dtype)
    assert checked or name in ("isnat",)


def test_ufuncs_with_arguments():
    check(lambda xp, a, b, v, s, n: xp.add(a, v, out=b))
    check(lambda xp, a, b, v, s, n: xp.add(a, v, b))
    check(lambda xp, a, b, v, s, n: xp.add(a, 1, dtype="f8"))
    check(lambda xp, a, b, v, s, n: xp.add(a, n))
    check(lambda xp, a, b, v, s, n: xp.add.reduce(a))
    check(lambda xp, a, b, v, s, n: xp.maximum.reduce(a, axis=1, keepdims=True))
    check(lambda xp, a, b, v, s, n: np.add.reduce(a, axis=0))
    check(lambda xp, a, b, v, s, n: np.add.reduce(a, 1, "f8"))
    check(lambda xp, a, b, v, s, n: xp.add.at(v, xp.asarray([0, 0, 2]), 1.0))
    check(lambda xp, a, b, v, s, n: np.subtract.at(v, [1, 1], s[0, :2]))
    check(lambda xp, a, b, v, s, n: xp.negative.at(v, [1, 2]))
    check(lambda xp, a, b, v, s, n: xp.divide(a, b, out=xp.zeros_like(a), where=b != 0))


# Methods, operators, attributes --------------------------------------------------------------------------------------

METHODS = {
    "all": lambda a, b, v, s: (a > -1).all(axis=0), "any": lambda a, b, v, s: (a > 1).any(),
    "argmax": lambda a, b, v, s: a.argmax(axis=1), "argmin": lambda a, b, v, s: a.argmin(),
    "argsort": lambda a, b, v, s: a.argsort(axis=1, kind="stable"), "astype": lambda a, b, v, s: a.astype("f8"),
    "clip": lambda a, b, v, s: a.clip(-1, 1), "clip with out": lambda a, b, v, s: a.clip(0, out=b),
    "copy": lambda a, b, v, s: _plus(a.copy(), b), "copy in order F": lambda a, b, v, s: a.copy("F"),
    "cumprod": lambda a, b, v, s: a.cumprod(axis=0), "cumsum": lambda a, b, v, s: a.cumsum(),
    "diagonal": lambda a, b, v, s: s.diagonal() * 2, "dot": lambda a, b, v, s: a.dot(v),
    "fill": lambda a, b, v, s: a.fill(2), "flatten": lambda a, b, v, s: _plus(a.flatten(), 1),
    "flatten of T": lambda a, b, v, s: a.T.flatten(), "max": lambda a, b, v, s: a.max(axis=0),
    "mean": lambda a, b, v, s: a.mean(axis=0), "min": lambda a, b, v, s: a.min(axis=1),
    "prod": lambda a, b, v, s: a.prod(axis=0), "ravel": lambda a, b, v, s: _plus(a.ravel(), 1),
    "ravel of T": lambda a, b, v, s: a.T.ravel(), "repeat": lambda a, b, v, s: a.repeat(2),
    "reshape": lambda a, b, v, s: _plus(a.reshape(4, 3), 1), "reshape of T": lambda a, b, v, s: a.T.reshape(-1),
    "squeeze": lambda a, b, v, s: a[:1].squeeze() * 2, "squeeze an axis": lambda a, b, v, s: a[:1].squeeze(0) * 2,
    "std": lambda a, b, v, s: a.std(axis=0), "sum": lambda a, b, v, s: a.sum(axis=1, keepdims=True),
    "sum with dtype": lambda a, b, v, s: a.sum(dtype="f8"), "swapaxes": lambda a, b, v, s: a.swapaxes(0, 1) * 2,
    "take": lambda a, b, v, s: a.take([0, 2], axis=0), "trace_": lambda a, b, v, s: np.trace(s),
    "transpose": lambda a, b, v, s: a.transpose() * 2, "transpose axes": lambda a, b, v, s: a.transpose(1, 0) * 2,
    "var": lambda a, b, v, s: a.var(axis=0), "T": lambda a, b, v, s: a.T * 2, "mT": lambda a, b, v, s: a.mT * 2,
    "getitem": lambda a, b, v, s: (a[1] * 2, a[:, 1:3] * 2, a[..., None] * 2, a[1, 2] * 2, a[::-1, ::2] * 2),
    "getitem by arrays": lambda a, b, v, s: (a[[0, 2]], a[[0, 1], [1, 2]], a[np.array([1]), 1:]),
    "getitem by a list of conditions": lambda a, b, v, s: a[:, [True, False, True, False]],
    "getitem by traced arrays": lambda a, b, v, s: a[a.argmax(axis=0)],
    "getitem by arrays without axes": lambda a, b, v, s: (a[np.array(1), np.array(2)], v[v.argmax()] * 2),
    "iteration": lambda a, b, v, s: [row * 2 for row in a],
    "len": lambda a, b, v, s: a * len(a), "shape": lambda a, b, v, s: a / a.shape[1],
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_method(name):
    for dtype in ("f4", "f8"):
        check(lambda xp, a, b, v, s, n: METHODS[name](a, b, v, s), dtype)


def test_assignments():
    def assign(xp, a, b, v, s, n):
        a[0] = 1.0
        a[1:, ::2] = b[1:, ::2]
        b[[0, 2]] = v
        b[xp.argmax(b, axis=0)[:2], [0, 1]] += 1.0
        s[...] = s.T.copy()
        s[0] += 2.0
        s[:, 1] -= s[:, 0]
        v[2] = a[0, 1]
        v[...] = n
        a[1, 1] = n

    check(assign)
    check(assign, "f8")


BINARY = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.lt,
    operator.le, operator.gt, operator.ge, operator.eq, operator.ne,
]  # fmt: skip
IN_PLACE = [operator.iadd, operator.isub, operator.imul, operator.ifloordiv, operator.imod]
INTEGER = [operator.and_, operator.or_, operator.xor]


@pytest.mark.parametrize("function", BINARY, ids=lambda f: f.__name__)
def test_a_binary_operator(function):
    for dtype in ("f4", "f8", "i8"):
        for other in (2, -1.5, np.float32(3), True):
            check(lambda xp, a, b, v, s, n, other=other: (function(a, other), function(other, a)), dtype)
        check(lambda xp, a, b, v, s, n: (function(a, b), function(a, v), function(v, a)), dtype)
        check(lambda xp, a, b, v, s, n: function(a, np.arange(4.0)), dtype)


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda f: f.__name__)
def test_an_operator_in_place(function):
    for dtype in ("f4", "f8", "i8"):
        check(lambda xp, a, b, v, s, n: (function(a, b), function(b, v), function(s, 3)), dtype)


@pytest.mark.parametrize("function", INTEGER, ids=lambda f: f.__name__)
def test_an_operator_of_integers(function):
    for dtype in ("i8", "?"):
        check(lambda xp, a, b, v, s, n: (function(a, b), function(True, a), function(a, True)), dtype)


def test_other_operators():
    check(lambda xp, a, b, v, s, n: (s @ a, a @ v, a @ b.T))
    check(lambda xp, a, b, v, s, n: np.arange(3.0) @ s)
    check(lambda xp, a, b, v, s, n: (-a, abs(a)))
    check(lambda xp, a, b, v, s, n: ~(a > 0))
    check(lambda xp, a, b, v, s, n: (a << 1, a >> 1, 1 << abs(a) % 4, ~a), "i8")
    for exponent in (2, 3, 0.5, -1, 0, 2.0, 1):
        check(lambda xp, a, b, v, s, n, e=exponent: a**e)
        check(lambda xp, a, b, v, s, n, e=exponent: abs(a) ** (b * e))
        check(lambda xp, a, b, v, s, n, e=exponent: (operator.ipow(a, e), operator.ipow(b[0], v)) if e > 0 else a)
    check(lambda xp, a, b, v, s, n: operator.ipow(abs(a), n))
    check(lambda xp, a, b, v, s, n: 2.0**a)
    check(lambda xp, a, b, v, s, n: abs(a) ** n)


def test_numbers_of_the_step():
    check(lambda xp, a, b, v, s, n: (a * n, n * a, a + (1 - 0.9**n), a / (n + 1), (-2) ** (n - 0.5) + a))
    check(lambda xp, a, b, v, s, n: (a - -n, a * (3 - n) * (n - 3), a * (n / 2), a * (2 / n)))
    check(lambda xp, a, b, v, s, n: xp.multiply(a, n, out=b))


# What is refused -----------------------------------------------------------------------------------------------------

REFUSED = {
    "an unknown function": lambda xp, a, b: xp.linalg.norm(a),
    "unique": lambda xp, a, b: xp.unique(a),
    "nonzero": lambda xp, a, b: xp.nonzero(a),
    "where with one argument": lambda xp, a, b: xp.where(a > 0),
    "random numbers": lambda xp, a, b: xp.random.random(3),
    "a condition": lambda xp, a, b: a[a > 0],
    "a condition beside a slice": lambda xp, a, b: a[:, a[0] > 0],
    "two results": lambda xp, a, b: xp.modf(a),
    "accumulate": lambda xp, a, b: np.add.accumulate(a),
    "outer": lambda xp, a, b: np.add.outer(a, b),
    "reduceat": lambda xp, a, b: np.add.reduceat(a, [0, 1]),
    "an unknown method": lambda xp, a, b: a.sort(),
    "a view of other elements": lambda xp, a, b: a.view("i4"),
    "data": lambda xp, a, b: a.data,
    "the interface": lambda xp, a, b: a.flat,
    "another trace": lambda xp, a, b: np.linalg.trace(a[:, :3]),
    "another diagonal": lambda xp, a, b: np.linalg.diagonal(a[:, :3]),
    "through numpy": lambda xp, a, b: np.linalg.inv(a[:, :3]),
    "a list of arrays": lambda xp, a, b: xp.asarray([a.sum(), b.sum()]),
    "an array of numbers of the step": lambda xp, a, b: xp.full((3,), a[0, 0]),
    "full_like": lambda xp, a, b: xp.full_like(a, b[0, 0]),
    "linspace": lambda xp, a, b: xp.linspace(0, a[0, 0], 3),
    "a repetition": lambda xp, a, b: xp.repeat(a, b[:, 0].astype("i8") ** 0, axis=0),
    "a repetition by the method": lambda xp, a, b: a.repeat(xp.argmax(b), axis=0),
    "tiles": lambda xp, a, b: xp.tile(a, (xp.argmax(b), 1)),
    "a shape": lambda xp, a, b: xp.reshape(a, (-1, xp.argmax(b) * 0 + 2)),
    "a shape of the method": lambda xp, a, b: a.reshape(-1, xp.argmax(b) * 0 + 2),
    "a slice": lambda xp, a, b: a[: xp.argmax(b)],
    "shares_memory": lambda xp, a, b: np.shares_memory(a, b),
    "a power of a number": lambda xp, a, b: a.sum() ** 2,
    "a power of a number in place": lambda xp, a, b: operator.ipow(a.sum(), 2),
    "a change in place": lambda xp, a, b: xp.nan_to_num(a, copy=False),
    "a median that may sort its input": lambda xp, a, b: xp.median(a, axis=0, overwrite_input=True),
    "a rotation by values": lambda xp, a, b: xp.rot90(a, xp.argmax(b)),
    "a diagonal by values": lambda xp, a, b: xp.diagonal(a, xp.argmax(b) * 0),
    "an order": lambda xp, a, b: a.reshape(-1, order="F"),
    "an array in an order": lambda xp, a, b: xp.asarray(a, order="F"),
    "initial": lambda xp, a, b: xp.sum(a, initial=3.0),
    "writing into another array": lambda xp, a, b: xp.add(a, b, out=np.empty((3, 4), "f4")),
    "adding to another array": lambda xp, a, b: operator.iadd(np.empty((3, 4), "f4"), a),
    "a number of the step in a function": lambda xp, a, b: xp.clip(a, 0, StepNumber(number_of, 1.0)),
    "a number of the step at indices": lambda xp, a, b: a.__setitem__([0], StepNumber(number_of, 1.0)),
    "other errors of NumPy": lambda xp, a, b: _with_errors_raised(a, b),
    **{f"{f.__name__}()": lambda xp, a, b, f=f: f(a[0, 0]) for f in (float, int, bool, complex, operator.index)},
    "if": lambda xp, a, b: 1 if (a > 0).any() else 2,
    "in": lambda xp, a, b: 1.0 in a,
    "item": lambda xp, a, b: a[0, 0].item(),
    "tolist": lambda xp, a, b: a.tolist(),
    "tobytes": lambda xp, a, b: a.tobytes(),
    "asarray": lambda xp, a, b: np.asarray(a),
    "array": lambda xp, a, b: np.array([a, b]),
    "a format": lambda xp, a, b: f"{a[0, 0]:.3f}" if not isinstance(a[0, 0], TracedArray) else float(a[0, 0]),
    "range": lambda xp, a, b: list(range(a[0, 0].astype("i8"))),
    "max of Python": lambda xp, a, b: max(a[0, 0], a[0, 1]),
}  # fmt: skip


def _with_errors_raised(a, b):
    with np.errstate(under="raise"):
        return a + b


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_escape_the_trace_is_refused(name):
    trace = Trace(np)
    a, b, *_ = (trace.wrap(values, writable=True) for values in values(0))
    with pytest.raises(CaptureError):
        REFUSED[name](TracedModule(trace), a, b)


def test_only_arrays_of_the_model_and_of_the_step_are_written():
    trace = Trace(np)
    xp, (given, *_) = TracedModule(trace), values(0)
    x, before = trace.wrap(given), given.copy()
    for write in (
        lambda: x.fill(0), lambda: operator.iadd(x, 1), lambda: x.__setitem__(0, 1.0), lambda: xp.negative(x, out=x),
        lambda: x.__setitem__([0, 1], 2.0), lambda: xp.copyto(x, 1.0), lambda: xp.sum(x, axis=0, out=x[0]),
        lambda: xp.add.at(x, [0], 1.0), lambda: x.T[0].fill(3.0), lambda: xp.clip(x, 0, 1, out=x),
        lambda: xp.copyto(np.empty((3, 4)), x), lambda: operator.ipow(x, 2),
    ):  # fmt: skip
        with pytest.raises(CaptureError, match="neither the model's nor made"):
            write()
    np.testing.assert_array_equal(given, before)
    y = x.copy()
    y += 1  # made in the step


def test_names_that_the_array_module_lacks_are_attribute_errors():
    xp = TracedModule(Trace(np))
    assert not hasattr(xp, "no_such_function")
    with pytest.raises(AttributeError):
        Trace(np).wrap(np.ones(3)).no_such_method()


# Other threads, and later --------------------------------------------------------------------------------------------


def use_plainly(trace, traced):
    """Use a traced array as an ordinary one."""
    assert not trace.active
    assert float(traced[0, 1]) == 1.0 and bool(traced[0, 1]) and int(traced[0, 2]) == 2 and 3.0 in traced
    assert traced.tolist() == np.arange(12.0).reshape(3, 4).tolist() and traced[0, 3].item() == 3.0
    np.testing.assert_array_equal(np.asarray(traced), np.arange(12.0).reshape(3, 4))
    for result in (traced + 1, np.exp(traced), traced.sum(axis=0), traced.copy(), traced[[0, 1]], np.stack([traced])):
        assert type(result) is np.ndarray
    assert traced.tobytes() == np.asarray(traced).tobytes() and traced.view("i8").shape == (3, 4)
    for _ in range(2):
        traced[0, 0] = 0.0
        traced += 0
    assert type((traced * 2).max() ** 2) is np.float64


def test_after_the_trace_arrays_are_plain_and_nothing_is_recorded():
    trace = Trace(np)
    traced = trace.wrap(np.arange(12.0).reshape(3, 4))
    traced + 1
    trace.stop()
    use_plainly(trace, traced)
    assert len(trace.calls) == 1


def test_in_other_threads_arrays_are_plain_and_nothing_is_recorded():
    trace = Trace(np)
    traced, failures = trace.wrap(np.arange(12.0).reshape(3, 4)), []

    def use():
        try:
            use_plainly(trace, traced)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not failures, failures
    assert not trace.calls and trace.active


def test_a_traced_step_computes_what_an_eager_one_does():
    def function(xp, a, b, v, s, n):
        a += xp.tanh(b) * v
        s[...] = (a @ b.T) / n

    traced = Traced(function, values(3))
    assert all(map(same_bits, traced.after, directly(function, values(3), STEP)))


@pytest.mark.parametrize("name", calls._WRITTEN_IN_C)
def test_functions_that_had_no_signature_before_numpy_2_4_have_the_same_parameters(name, monkeypatch):
    try:
        want = list(inspect.signature(getattr(np, name)).parameters)
    except ValueError:
        pytest.skip("this NumPy has no signature to compare with")
    python_signature = inspect.signature

    def signature(function):
        if function is getattr(np, name):
            raise ValueError("no signature found")
        return python_signature(function)

    monkeypatch.setattr(inspect, "signature", signature)
    assert list(calls._function_signature.__wrapped__(getattr(np, name)).parameters) == want
