"""The strict stand-in: it refuses what CuPy refuses, and otherwise computes NumPy's results bit for bit."""

import contextlib
import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strict import StrictArray, StrictBackend, StrictError

from xpnet.backends import Backend, get_backend

B = StrictBackend()
xp = B.xp
HOST = np.arange(12, dtype=np.float32).reshape(3, 4)


def device(a: Any = HOST) -> Any:
    return B.asarray(a)


def same(got: Any, expected: Any) -> None:
    """Assert that both have the same shape, dtype and bits."""
    assert isinstance(got, StrictArray)
    values, expected = B.to_numpy(got), np.asarray(expected)
    assert (values.shape, values.dtype) == (expected.shape, expected.dtype)
    assert values.tobytes() == expected.tobytes()


def refused(error: type[BaseException], call: Callable[..., Any], match: str | None = None) -> None:
    with pytest.raises(error, match=match):
        call()


# Implicit conversions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda a: np.asarray(a),
        lambda a: np.array([a, a]),
        lambda a: np.array([a[0, 0]]),
        lambda a: np.exp(a),
        lambda a: np.add(a, 1.0),
        lambda a: np.sum(a),
        lambda a: np.concatenate([a, a]),
        lambda a: np.copyto(np.empty((3, 4)), a),
        lambda a: np.ones((3, 4)).__setitem__(0, a[0]),
        lambda a: np.ones((3, 4)) + a,
        lambda a: a + np.ones((3, 4)),
        lambda a: a.__iadd__(np.ones((3, 4))),
        lambda a: np.ones((3, 4)).__iadd__(a),
        lambda a: np.ones((3, 4)) == a,
        lambda a: a == np.ones((3, 4)),
        lambda a: a * np.array(2.0),  # CuPy also refuses 0-d arrays of the host
        lambda a: a * [1, 2, 3, 4],
        lambda a: a == None,  # noqa: E711
        lambda a: a @ np.ones((4, 2)),
        lambda a: xp.add(a, np.ones((3, 4))),
        lambda a: xp.add(a, [1, 2, 3, 4]),
        lambda a: xp.exp(a, out=np.empty((3, 4))),
        lambda a: xp.sum(np.ones(3)),  # CuPy would silently return a NumPy scalar
        lambda a: xp.sum([1, 2, 3]),
        lambda a: xp.sum(1.0),
        lambda a: xp.concatenate([a, np.ones((3, 4))]),
        lambda a: xp.concatenate([[1.0], [2.0]]),
        lambda a: xp.where(a > 0, np.ones((3, 4)), a),
        lambda a: xp.where(True, a, a),
        lambda a: xp.copyto(a, np.ones((3, 4))),
        lambda a: xp.matmul(a, np.ones((4, 2))),
        lambda a: xp.dot(np.ones((2, 3)), a),
        lambda a: xp.take(a, [0, 1]),
        lambda a: xp.take(np.ones(3), xp.arange(2)),
        lambda a: xp.clip(a, [0, 0, 0, 0], 1),
        lambda a: xp.array([a[0], np.ones(4)]),
        lambda a: a.fill(np.array(1.0)),
        lambda a: a.sum(out=np.empty(())),
        lambda a: a.take(np.arange(2)),
        lambda a: a[[0, 1]],
        lambda a: a[np.arange(2)],
        lambda a: a[True],
        lambda a: range(xp.argmax(a)),  # there is no __index__
        lambda a: [1, 2, 3][xp.argmax(a)],
        lambda a: xp.zeros(xp.argmax(a)),
        lambda a: xp.arange(a[0, 1]),
        lambda a: a.reshape(xp.argmax(a), -1),
        lambda a: hash(a),
    ],
)
def test_implicit_conversions_are_refused(call: Callable[..., Any]) -> None:
    refused(TypeError, lambda: call(device()))


@pytest.mark.parametrize("value", [np.ones(4), np.array(1.0), [1, 2, 3, 4]])
def test_assignment_takes_only_device_arrays_and_scalars(value: Any) -> None:
    refused(ValueError, lambda: device().__setitem__(0, value))


def test_error_messages_are_those_of_cupy() -> None:
    refused(TypeError, lambda: np.asarray(device()), "Implicit conversion to a NumPy array is not allowed")
    refused(TypeError, lambda: device() * HOST, "Unsupported type <class 'numpy.ndarray'>")


def test_scalars_are_accepted() -> None:
    a = device()
    same(a * 2, HOST * 2)
    same(2.5 - a, 2.5 - HOST)
    same(np.float32(2) * a, np.float32(2) * HOST)
    same(np.float64(2) * a, np.float64(2) * HOST)  # this gives float64
    a[0] = np.float32(7)
    a[1] = 8
    same(a[:2], np.array([[7] * 4, [8] * 4], dtype=np.float32))


# Names and keywords ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["errstate", "vecdot", "block", "nditer", "sum_rows", "_core"])
def test_names_that_cupy_lacks_raise_attribute_error(name: str) -> None:
    refused(AttributeError, lambda: getattr(xp, name), "module 'cupy' has no attribute")


def test_unsupported_names_raise_an_error_that_says_so() -> None:
    refused(AttributeError, lambda: xp.random, "not supported")
    refused(AttributeError, lambda: xp.put, "not supported")
    refused(AttributeError, lambda: device().scatter_add, "not supported")
    refused(AttributeError, lambda: device().newbyteorder, "'cupy.ndarray' object has no attribute")


@pytest.mark.parametrize(
    "call",
    [
        lambda a: xp.add(a, a, where=a > 0),
        lambda a: xp.exp(a, order="C"),
        lambda a: xp.exp(a, a, a),
        lambda a: xp.add(a),
        lambda a: xp.sum(a, where=a > 0),
        lambda a: xp.sum(a, initial=0),
        lambda a: xp.max(a, initial=0),
        lambda a: xp.mean(a, where=a > 0),
        lambda a: xp.take(a, xp.arange(2), mode="wrap"),
        lambda a: xp.einsum("ij->i", a, out=a),
        lambda a: xp.clip(a, min=0, max=1),
        lambda a: xp.argmax(a, 0, device(np.zeros(4, int))),  # dtype in CuPy, out in NumPy
        lambda a: xp.take_along_axis(a, xp.zeros((3, 1), dtype=xp.int64)),
        lambda a: a.sum(initial=0),
        lambda a: a.take(xp.arange(2), mode="clip"),
        lambda a: a.item(0),
    ],
)
def test_arguments_that_cupy_lacks_are_refused(call: Callable[..., Any]) -> None:
    refused(TypeError, lambda: call(device()))


def test_ufuncs_have_only_the_methods_of_cupy() -> None:
    refused(NotImplementedError, lambda: xp.maximum.reduce(device()))
    refused(NotImplementedError, lambda: xp.multiply.at(device(), xp.arange(2), 1.0))
    a = device()
    xp.add.at(a, xp.asarray([0, 0, 3]), 1.0)  # 3 wraps to 0
    expected = HOST.copy()
    expected[0] += 3
    same(a, expected)
    refused(TypeError, lambda: xp.add.at(device(np.zeros(3, np.int8)), xp.arange(2), 1))


@pytest.mark.parametrize("value", [["a"], [None], np.ones(1, np.longdouble), np.array(["2020"], dtype="datetime64[D]")])
def test_dtypes_that_cupy_lacks_are_refused(value: Any) -> None:
    refused(ValueError, lambda: B.asarray(value), "Unsupported dtype")


# Host reads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda a: float(a[0, 0]),
        lambda a: int(a[0, 0]),
        lambda a: complex(a[0, 0]),
        lambda a: bool(xp.any(a)),
        lambda a: a[0, 0].item(),
        lambda a: a.tolist(),
        lambda a: a.tobytes(),
        lambda a: a.get(),
        lambda a: repr(a),
        lambda a: str(a),
        lambda a: f"{xp.sum(a)}",
        lambda a: list(a[0]),
        lambda a: 1.0 if a[0, 0] > 0 else 0.0,
        lambda a: B.to_numpy(a),
        lambda a: pickle.dumps(a),
        lambda a: a[a > 3],
        lambda a: a.__setitem__(a > 3, 0.0),
        lambda a: xp.nonzero(a),
        lambda a: a.nonzero(),
        lambda a: xp.where(a > 3),
        lambda a: xp.unique(a),
        lambda a: xp.bincount(a[0].astype(xp.int64)),
    ],
)
def test_host_reads_are_counted_and_can_be_forbidden(read: Callable[..., Any]) -> None:
    a, before = device(), B.host_reads
    read(a)
    assert B.host_reads == before + 1
    with B.no_host_reads(), pytest.raises(AssertionError, match="waits for the device"):
        read(a)
    assert B.host_reads == before + 1
    read(a)
    assert B.host_reads == before + 2


def test_metadata_views_and_assignments_read_nothing_back() -> None:
    a, before = device(), B.host_reads
    with B.no_host_reads():
        assert (len(a), a.shape, a.ndim, a.size, a.nbytes, a.itemsize) == (3, (3, 4), 2, 12, 48, 4)
        assert a.strides == (16, 4)
        assert a.dtype == xp.float32
        assert a.flags.c_contiguous
        assert not a.T.flags.c_contiguous
        assert a.device.id == 0
        assert xp.shape(a) == (3, 4)
        assert xp.result_type(a, xp.float64) == np.float64
        rows = [row.sum() for row in a]  # whole rows are views
        copied = copy.deepcopy(a)
        xp.where(a > 0, a, 0.0)
        B.asarray(a)
        B.asarray(HOST)
        a[1:, None] += 1
        a[xp.arange(2)] = copied[:2]
    assert B.host_reads == before
    assert all(isinstance(row, StrictArray) and row.shape == () for row in rows)


def test_reductions_stay_on_the_device() -> None:
    a = device()
    for result in (xp.sum(a), a.sum(), a.max(), xp.argmax(a), xp.all(a > 0), a[1, 2], xp.count_nonzero(a), a[0] @ a[0]):
        assert isinstance(result, StrictArray)
        assert result.shape == ()
    assert isinstance(xp.array_equal(a, a), StrictArray)
    assert isinstance(xp.allclose(a, a), StrictArray)


def test_scalar_arrays_have_no_length_and_cannot_be_iterated() -> None:
    refused(TypeError, lambda: list(device()[0, 0]))
    refused(TypeError, lambda: len(device()[0, 0]))


# Devices -----------------------------------------------------------------------------------------------------------


def test_arrays_of_two_devices_cannot_be_combined() -> None:
    one = StrictBackend(device=1)
    a, b = B.asarray(HOST), one.asarray(HOST)
    assert (one.name, one.asarray(HOST).device.id) == ("strict:1", 1)
    calls = [
        lambda: a + b,
        lambda: xp.add(a, b),
        lambda: a @ b.T,
        lambda: xp.concatenate([a, b]),
        lambda: a[one.asarray([0, 1])],
        lambda: a.__setitem__(slice(None), b),
        lambda: xp.copyto(a, b),
        lambda: xp.sum(b),
    ]
    for call in calls:
        refused(StrictError, call)
    same(B.asarray(b), HOST)  # asarray copies from the other device
    assert np.array_equal(one.to_numpy(one.asarray(a)), HOST)


def test_computing_requires_that_the_device_is_current() -> None:
    one = StrictBackend(device=1)
    b = one.asarray(HOST)
    refused(StrictError, lambda: b * 2, "device is 0")
    refused(StrictError, lambda: one.xp.zeros(3), "device is 0")
    with one.device():
        b *= 2
        refused(StrictError, lambda: xp.zeros(3), "device is 1")
        with B.device():
            xp.zeros(3)
        one.xp.zeros(3)
        thread = threading.Thread(target=lambda: seen.append(xp.zeros(3).shape))  # a thread starts at device 0
        seen: list[Any] = []
        thread.start()
        thread.join()
    assert seen == [(3,)]
    assert np.array_equal(b.get(), HOST * 2)  # reading back needs no current device


# What CuPy would silently do ---------------------------------------------------------------------------------------


def test_indices_out_of_range_wrap() -> None:
    a = device()
    far = xp.asarray([4, -1, 300])
    expected = HOST[[1, 2, 0]]
    same(xp.take(a, far, axis=0), expected)
    same(a.take(far, axis=0), expected)
    same(a[far], expected)
    same(a[far.astype(xp.uint8)], HOST[[1, 0, 300 % 256 % 3]])
    same(a[..., far], HOST[:, [0, 3, 0]])
    same(a[1:, None, far], HOST[1:, None, [0, 3, 0]])
    same(a[far, far], HOST[[1, 2, 0], [0, 3, 0]])
    same(a[far[0]], HOST[1])
    same(xp.take(a, far), HOST.ravel()[[4, 11, 0]])
    same(xp.take(a, 5, axis=0), HOST[2])
    same(xp.take_along_axis(a, far[:, None], axis=1), np.take_along_axis(HOST, np.array([[0], [3], [0]]), axis=1))
    a[far] = xp.zeros((3, 4), dtype=xp.float32)
    same(a, np.zeros_like(HOST))
    refused(IndexError, lambda: a[7])  # indices known on the host do not wrap
    refused(IndexError, lambda: a[far, far, far])
    refused(IndexError, lambda: a[xp.zeros(2)])
    refused(IndexError, lambda: a[a[:, 0] > 0, far])


def test_take_into_another_dtype_is_refused() -> None:
    refused(TypeError, lambda: xp.take(device(), xp.arange(2), axis=0, out=xp.empty((2, 4), dtype=xp.float64)))


def test_assigning_twice_to_an_element_is_refused() -> None:
    a = device()
    refused(StrictError, lambda: a.__setitem__(xp.asarray([0, 3]), a[:2]), "undefined")
    a[xp.asarray([0, 3])] = 5.0  # one value for both: defined
    same(a[0], np.full(4, 5, dtype=np.float32))


@pytest.mark.parametrize("name", ["matmul", "dot"])
def test_products_refuse_unsuitable_outputs(name: str) -> None:
    product, a = getattr(xp, name), device()
    out = xp.empty((3, 3), dtype=xp.float32)
    assert product(a, a.T, out=out) is out
    same(out, HOST @ HOST.T)
    refused(StrictError, lambda: product(a, a.T, out=xp.empty((3, 3), dtype=xp.float64)), "float64")
    refused(StrictError, lambda: product(a, a.T, out=xp.empty((3, 3), dtype=xp.float32).T), "C-contiguous")
    square = device(np.eye(3, dtype=np.float32))
    refused(StrictError, lambda: product(square, square, out=square), "overlaps")
    pool = xp.zeros(20, dtype=xp.float32)
    left, overlapping = pool[:12].reshape(3, 4), pool[8:17].reshape(3, 3)
    refused(StrictError, lambda: product(left, a.T, out=overlapping), "overlaps")


def test_reductions_into_another_dtype_are_refused() -> None:
    wide = xp.empty(4, dtype=xp.float64)
    for name in ("sum", "mean", "max", "std"):
        refused(StrictError, lambda name=name: getattr(xp, name)(device(), axis=0, out=wide))
        refused(StrictError, lambda name=name: getattr(device(), name)(axis=0, out=wide))
    same(xp.sum(device(), axis=0, dtype=xp.float64, out=wide), HOST.sum(axis=0, dtype=np.float64))


def test_new_memory_is_poisoned() -> None:
    assert np.isnan(xp.empty(3).get()).all()
    assert np.isnan(xp.empty_like(device()).get()).all()
    assert (xp.empty(3, dtype=xp.int32).get() == 2**31 - 1).all()


def test_floating_point_errors_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(xp.log(xp.zeros(2)), [-np.inf, -np.inf])
        assert np.isnan((xp.asarray([0.0]) / 0.0).item())


# Views and copies --------------------------------------------------------------------------------------------------


def test_views_share_memory() -> None:
    flat = xp.zeros(12, dtype=xp.float32)
    view = flat[4:].reshape(2, 4)
    view[...] = 3.0
    view.T[0] += 1
    view[0, 3] *= 2  # an element is a view too
    element = view[1, 3]
    element[...] = 9.0
    flat[4:].view(xp.int32)[1] = 0
    same(flat, np.array([0, 0, 0, 0, 4, 0, 3, 6, 4, 3, 3, 9], dtype=np.float32))
    rows = flat.reshape(3, 4)[xp.asarray([0, 1])]  # arrays as indices copy
    rows.fill(7)
    assert float(flat.max()) == 9.0


def test_host_data_is_copied() -> None:
    host = HOST.copy()
    for array in (B.asarray(host), xp.asarray(host), xp.array(host), xp.ascontiguousarray(host), xp.asarray(host.T)):
        before = array.get()
        host += 1
        assert np.array_equal(array.get(), before)
    a = device()
    assert B.asarray(a) is a
    assert xp.asarray(a) is a
    B.to_numpy(a)[...] = 0
    same(a, HOST)


def test_in_place_operators_change_the_same_array() -> None:
    a = b = device()
    a += 1
    a -= a[0]
    a *= 2
    a /= 3.0
    assert a is b
    same(a, (HOST + 1 - (HOST[0] + 1)) * 2 / 3.0)
    total = t = xp.zeros((), dtype=xp.float64)
    total += xp.sum(device())
    assert total is t
    same(total, np.float64(66))
    i = xp.arange(3)
    refused(TypeError, lambda: i.__iadd__(0.5))


def test_functions_return_their_out_argument() -> None:
    a, out = device(), xp.empty((3, 4), dtype=xp.float32)
    assert xp.exp(a, out=out) is out
    assert xp.exp(a, out) is out
    assert xp.take(a, xp.arange(3), axis=0, out=out) is out
    assert xp.clip(a, 0.0, 1.0, out=out) is out


def test_deepcopy_and_pickle_keep_values_and_backend() -> None:
    a = device(np.asfortranarray(HOST))
    with B.no_host_reads():
        b = copy.deepcopy([a, B])
    assert b[1] is B
    b[0] += 1
    same(a, HOST)
    again, backend = pickle.loads(pickle.dumps((a, B)))
    assert backend is B
    same(again, HOST)
    assert again.flags.f_contiguous
    other = StrictBackend(1)
    text = pickle.dumps(other)
    del other
    revived = pickle.loads(text)
    assert (revived.name, revived.host_reads) == ("strict:1", 0)


def test_watch_dtypes_collects_the_dtypes_of_arrays() -> None:
    with B.watch_dtypes() as seen:
        a = device()
        xp.sum(a, dtype=xp.float64)  # a single number does not count
        a > 0  # noqa: B015
        assert seen == {np.dtype("f4"), np.dtype("?")}
        a * np.float64(2)
        assert np.dtype("f8") in seen
    xp.zeros(3, dtype=xp.complex64)
    assert B.seen_dtypes == {np.dtype("f4"), np.dtype("?"), np.dtype("f8")}


def test_other_backends_treat_it_as_a_device_array() -> None:
    before = B.host_reads
    assert np.array_equal(get_backend("cpu").asarray(device()), HOST)
    assert B.host_reads == before + 1


# Results -----------------------------------------------------------------------------------------------------------

UNARY = [
    "abs",
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "square",
    "tanh",
    "sign",
    "floor",
    "ceil",
    "rint",
    "negative",
    "isfinite",
    "isnan",
    "reciprocal",
    "sin",
]
BINARY = [
    "add",
    "subtract",
    "multiply",
    "divide",
    "maximum",
    "minimum",
    "power",
    "copysign",
    "hypot",
    "fmod",
    "not_equal",
    "less",
    "logical_and",
]
REDUCTIONS = [
    "sum",
    "mean",
    "max",
    "min",
    "prod",
    "std",
    "var",
    "argmax",
    "argmin",
    "any",
    "all",
    "cumsum",
    "count_nonzero",
]
OPERATORS: list[Callable[..., Any]] = [
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: a * b,
    lambda a, b: a / b,
    lambda a, b: a // b,
    lambda a, b: a % b,
    lambda a, b: a**2,
    lambda a, b: 2 ** (a / 64),
    lambda a, b: divmod(a, b)[1],
    lambda a, b: a <= b,
    lambda a, b: (a < b) | (a == b) & ~(a > b),
    lambda a, b: abs(-a) + 1,
    lambda a, b: 1.0 / (b + 3),
    lambda a, b: a[0] * b[:, ::-1],
    lambda a, b: a.sum(axis=-1, keepdims=True) - b.max(axis=0),
    lambda a, b: a @ b.T,
    lambda a, b: a.astype("f8").mean() * b,
    lambda a, b: a.T.reshape(-1).repeat(2),
    lambda a, b: a.transpose(1, 0)[:, None].squeeze(axis=1),
]
MODULE_CALLS: list[Callable[..., Any]] = [
    lambda xp, a, b: xp.where(a > b, a, 0.0),
    lambda xp, a, b: xp.clip(a, -1.0, 1.0),
    lambda xp, a, b: xp.concatenate([a, b], axis=1),
    lambda xp, a, b: xp.stack([a, b]),
    lambda xp, a, b: xp.einsum("ij,kj->ik", a, b),
    lambda xp, a, b: xp.tensordot(a, b, axes=([1], [1])),
    lambda xp, a, b: xp.broadcast_to(a[:, None], (len(a), 2, a.shape[1])),
    lambda xp, a, b: xp.pad(a, ((1, 0), (0, 2))),
    lambda xp, a, b: xp.repeat(a, 3, axis=0),
    lambda xp, a, b: xp.take(a, xp.arange(len(a))[::-1], axis=0),
    lambda xp, a, b: xp.full(a.shape, 2.5, dtype=a.dtype) * a,
    lambda xp, a, b: xp.zeros_like(a),
    lambda xp, a, b: xp.moveaxis(a, 0, -1),
    lambda xp, a, b: xp.sort(a, axis=-1),
    lambda xp, a, b: xp.argsort(a, axis=-1),
    lambda xp, a, b: xp.split(a, [1], axis=1)[1],
    lambda xp, a, b: xp.linspace(0, 1, 7),
    lambda xp, a, b: xp.eye(3),
    lambda xp, a, b: xp.meshgrid(a[0], b[:, 0], indexing="ij")[1],
    lambda xp, a, b: xp.array([a[0, 0], b[0, 0]]),
    lambda xp, a, b: xp.array([[1, 2], [3, 4]], dtype=xp.float16),
    lambda xp, a, b: xp.finfo(a.dtype).max * (a > 0) if a.dtype.kind == "f" else a,
]
DTYPES = st.sampled_from([np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8])
PAIRS = st.tuples(hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), DTYPES, DTYPES).flatmap(
    lambda drawn: st.tuples(*(hnp.arrays(dtype, drawn[0], elements=_numbers(dtype)) for dtype in drawn[1:]))
)


def _numbers(dtype: Any) -> Any:
    return hnp.from_dtype(np.dtype(dtype), min_value=0 if dtype is np.uint8 else -60, max_value=60)


def _both(call: Callable[..., Any], *hosts: Any) -> None:
    """Assert that `call` returns or raises the same on device arrays as on NumPy arrays."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = call(np, *hosts)
        except (TypeError, ValueError) as error:
            return refused(type(error), lambda: call(xp, *map(B.asarray, hosts)))
        with B.no_host_reads():
            got = call(xp, *map(B.asarray, hosts))
        return same(got, expected)


@settings(max_examples=20, deadline=None)
@given(PAIRS)
@pytest.mark.parametrize("name", UNARY)
def test_unary_functions_equal_numpy(name: str, pair: Any) -> None:
    _both(lambda m, a, b: getattr(m, name)(a), *pair)


@settings(max_examples=20, deadline=None)
@given(PAIRS)
@pytest.mark.parametrize("name", BINARY)
def test_binary_functions_equal_numpy(name: str, pair: Any) -> None:
    _both(lambda m, a, b: getattr(m, name)(a, b), *pair)
    _both(lambda m, a, b: getattr(m, name)(a, 2), *pair)
    _both(lambda m, a, b: getattr(m, name)(0.5, b), *pair)
    _both(lambda m, a, b: getattr(m, name)(a[0, 0], b), *pair)


@settings(max_examples=20, deadline=None)
@given(PAIRS, st.sampled_from([None, 0, 1, -1]))
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_equal_numpy(name: str, pair: Any, axis: Any) -> None:
    _both(lambda m, a, b: getattr(m, name)(a, axis=axis), *pair)


@settings(max_examples=20, deadline=None)
@given(PAIRS)
@pytest.mark.parametrize("number", range(len(OPERATORS)))
def test_operators_and_methods_equal_numpy(number: int, pair: Any) -> None:
    _both(lambda m, a, b: OPERATORS[number](a, b), *pair)


@settings(max_examples=20, deadline=None)
@given(PAIRS)
@pytest.mark.parametrize("number", range(len(MODULE_CALLS)))
def test_module_functions_equal_numpy(number: int, pair: Any) -> None:
    _both(MODULE_CALLS[number], *pair)


@settings(deadline=None)
@given(st.data())
def test_indexing_equals_numpy(data: st.DataObject) -> None:
    host = data.draw(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=4)))
    index = data.draw(hnp.basic_indices(host.shape, allow_newaxis=True, allow_ellipsis=True))
    same(B.asarray(host)[index], host[index])
    a, expected = B.asarray(host), host.copy()
    a[index] = 3.0
    expected[index] = 3.0
    same(a, expected)
    integers = data.draw(hnp.integer_array_indices(host.shape))
    same(B.asarray(host)[tuple(map(B.asarray, integers))], host[integers])
    mask = data.draw(hnp.arrays(bool, host.shape))
    same(B.asarray(host)[B.asarray(mask)], host[mask])
    with contextlib.suppress(StrictError):  # raised if an index occurs twice
        a[tuple(map(B.asarray, integers))] = B.asarray(host[integers])
        expected[integers] = host[integers]
        same(a, expected)


def test_operators_equal_the_reference_bit_for_bit(rng: np.random.Generator) -> None:
    reference = Backend("reference", np)
    x = (8 * rng.standard_normal((7, 5))).astype(np.float32)
    for name in ("sigmoid", "softplus", "softmax", "log_softmax", "erf", "erfc"):
        with B.no_host_reads(), B.watch_dtypes() as seen:
            got = getattr(B, name)(B.asarray(x))
        assert np.dtype("f8") not in seen
        same(got, getattr(reference, name)(x))
    with B.no_host_reads():
        noise = B.random_bits((2**40, 3, 5), 6, 4, first_row=2**32 - 3)
        product = B.matmul(B.asarray(x.T), B.asarray(x), out=B.empty((5, 5), np.float32))
        sums = B.sum_rows(B.asarray(x), out=B.empty((5,), np.float32))
        rows = B.gather(B.asarray(x), B.asarray([2, 0]), out=B.empty((2, 5), np.float64))
    same(noise, reference.random_bits((2**40, 3, 5), 6, 4, first_row=2**32 - 3))
    same(product, reference.matmul(x.T, x, out=np.empty((5, 5), np.float32)))
    same(sums, reference.sum_rows(x, out=np.empty(5, np.float32)))
    same(rows, x[[2, 0]].astype(np.float64))
