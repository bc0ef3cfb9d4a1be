"""TracedModule: the array module of a step that is being traced."""

import functools
from typing import Any

import numpy

from xpnet.backends import Array
from xpnet.capture.calls import is_array, memory_of
from xpnet.capture.trace import Trace, TracedArray, has_traced, refuse_untraced, unwrapped
from xpnet.errors import CaptureError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Functions without side effects, whose results have shapes that do not depend on values.
_FUNCTIONS = _words(
    "all amax amin any argmax argmin argsort array_split atleast_1d atleast_2d atleast_3d broadcast_arrays "
    "broadcast_to clip column_stack concatenate count_nonzero cross cumprod cumsum diagonal diff dot dstack einsum "
    "expand_dims flip fliplr flipud hstack inner kron max mean median min moveaxis nan_to_num nanmax nanmean nanmin "
    "nansum outer pad prod ptp quantile ravel repeat reshape roll rollaxis rot90 sort split squeeze stack std sum "
    "swapaxes take take_along_axis tensordot tile trace transpose tril triu var vdot vstack where"
)
_CREATORS = _words("arange eye full identity indices linspace ones tri zeros")
_UNINITIALIZED = _words("empty empty_like")
_INQUIRIES = _words("can_cast finfo iinfo isscalar ndim result_type shape size issubdtype promote_types")
_REDUCTIONS = {
    "sum": "add",
    "amax": "maximum",
    "max": "maximum",
    "amin": "minimum",
    "min": "minimum",
    "prod": "multiply",
}


class TracedModule:
    """The array module of a step that is being traced."""

    ndarray = TracedArray

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        trace.module = self

    def __getattr__(self, name: str) -> Any:
        """What stands for this name of the array module. Raises CaptureError if it is not known here."""
        if name.startswith("__"):
            raise AttributeError(name)
        found = self._found(self._trace, name)
        setattr(self, name, found)
        return found

    @staticmethod
    def _found(trace: Trace, name: str) -> Any:
        xp: Any = trace.xp
        if not hasattr(xp, name):
            raise AttributeError(f"the array module has no attribute {name!r}")
        value = getattr(xp, name)
        if hasattr(value, "nin"):
            return _TracedUfunc(trace, value)
        special = getattr(_Special, name, None)
        if special is not None:
            return functools.partial(special, trace)
        if name in _REDUCTIONS and xp is numpy:
            return functools.partial(_reduction, trace, getattr(xp, _REDUCTIONS[name]))
        if name in _UNINITIALIZED:
            return lambda *args, **kwargs: trace.own(value(*unwrapped(args), **unwrapped(kwargs)))
        if name in _CREATORS:
            return functools.partial(_created, trace, value)
        if name in _FUNCTIONS:
            return lambda *args, **kwargs: trace.function(value, args, kwargs)
        if name in _INQUIRIES:
            return lambda *args, **kwargs: value(*unwrapped(args), **unwrapped(kwargs))
        if isinstance(value, type | int | float | numpy.dtype) or value is None:
            return value
        raise CaptureError(f"the step uses xp.{name}")


def _reduction(trace: Trace, ufunc: Any, a: Any, axis: Any = None, dtype: Any = None, out: Any = None,
               keepdims: Any = False, **more: Any) -> Any:  # fmt: skip
    if more or not isinstance(a, TracedArray):
        raise CaptureError(f"the step calls a reduction with {', '.join(more) or 'an array of its own'}")
    return a._reduce(ufunc, axis, dtype, out, bool(keepdims))


def _created(trace: Trace, function: Any, *args: Any, **kwargs: Any) -> TracedArray:
    """An array that is filled anew in each replay, because the step may write into it."""
    if has_traced((args, kwargs)):
        raise CaptureError(f"xp.{function.__name__} is given numbers or a shape that the step computes")
    value = function(*unwrapped(args), **unwrapped(kwargs))
    result, values = trace.own(value), _values_of(value, function.__name__)
    trace.write(value, values[0] if len(values) == 1 else trace.own(value.copy()))
    return result


def _values_of(value: Array, creator: str) -> list[Any]:
    """The number that fills an array, as a list of one; several numbers if they differ or are not known."""
    if not isinstance(value, numpy.ndarray):  # do not read it
        return [float(creator.startswith("ones"))] if creator.startswith(("zeros", "ones")) else [0, 1]
    flat = value.reshape(-1)
    if flat.size and flat.tobytes() != flat[:1].tobytes() * flat.size:  # so that 0.0 and -0.0 differ
        return [0, 1]
    return [flat[0].item()] if flat.size else [0]


class _TracedUfunc:
    """A ufunc whose calls are recorded."""

    def __init__(self, trace: Trace, ufunc: Any) -> None:
        self._trace, self._ufunc = trace, ufunc
        self.__name__ = ufunc.__name__

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        if len(args) > self._ufunc.nin:
            args, out = args[: self._ufunc.nin], args[self._ufunc.nin]
        if isinstance(out, tuple):
            (out,) = out
        refuse_untraced(out)
        return self._trace.ufunc(self._ufunc, args, out, **kwargs)

    def at(self, a: TracedArray, *args: Any) -> None:
        self._trace.operator(_At(self._ufunc), (a, *args), {}, ("a",))

    def reduce(self, a: TracedArray, axis: Any = 0, dtype: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        return a._reduce(self._ufunc, axis, dtype, out, keepdims)


class _At:
    """ufunc.at as a function with a signature."""

    def __init__(self, ufunc: Any) -> None:
        self._ufunc = ufunc
        self.__name__ = f"{ufunc.__name__}.at"

    def __call__(self, a: Array, indices: Any, *b: Any) -> None:
        self._ufunc.at(a, indices, *b)


class _Special:
    """Functions of the array module that need care."""

    @staticmethod
    def copyto(trace: Trace, dst: Any, src: Any, casting: str = "same_kind", where: Any = True) -> None:
        trace.write(unwrapped(dst), src, **({} if where is True else {"where": where}))

    @staticmethod
    def zeros_like(trace: Trace, a: Any, *args: Any, **kwargs: Any) -> TracedArray:
        return _created(trace, trace.xp.zeros_like, unwrapped(a), *args, **kwargs)

    @staticmethod
    def ones_like(trace: Trace, a: Any, *args: Any, **kwargs: Any) -> TracedArray:
        return _created(trace, trace.xp.ones_like, unwrapped(a), *args, **kwargs)

    @staticmethod
    def full_like(trace: Trace, a: Any, fill_value: Any, *args: Any, **kwargs: Any) -> TracedArray:
        return _created(trace, trace.xp.full_like, unwrapped(a), fill_value, *args, **kwargs)

    @staticmethod
    def count_nonzero(trace: Trace, a: TracedArray, axis: Any = None, keepdims: bool = False) -> Any:
        nonzero: Any = a if a.dtype.kind == "b" else trace.ufunc(trace.xp.not_equal, (a, 0))
        return trace.module.sum(nonzero, axis=axis, dtype=trace.xp.int64, keepdims=keepdims)

    @staticmethod
    def asarray(trace: Trace, a: Any, dtype: Any = None, order: Any = None) -> Any:
        if order not in (None, "C"):
            raise CaptureError("the step makes an array in another order than that of C")
        if isinstance(a, TracedArray):
            same = a if dtype is None else a.astype(dtype, copy=False)
            return same if order is None or same.flags.c_contiguous else same.copy()
        value = trace.xp.asarray(_for_device(trace, a), dtype=dtype, order=order)
        if is_array(a) and memory_of(value) is memory_of(a):
            return trace.wrap(value)
        return _created(trace, trace.xp.asarray, a, dtype=dtype, order=order)

    @staticmethod
    def array(trace: Trace, a: Any, dtype: Any = None, copy: Any = True) -> Any:
        if not copy:
            return _Special.asarray(trace, a, dtype)
        if isinstance(a, TracedArray):
            return a.astype(a.dtype if dtype is None else dtype)
        return _created(trace, trace.xp.array, _for_device(trace, a), dtype=dtype)

    @staticmethod
    def ascontiguousarray(trace: Trace, a: TracedArray, dtype: Any = None) -> Any:
        dtype = a.dtype if dtype is None else dtype
        if a.flags.c_contiguous and a.dtype == dtype:
            return a
        return a._copy(trace.xp.ascontiguousarray(a.values, dtype=dtype))


def _for_device(trace: Trace, a: Any) -> Any:
    """What `asarray` is given. Raises CaptureError if it would have to be copied from the host to a GPU."""
    if trace.xp is not numpy and (not is_array(a) or isinstance(a, numpy.ndarray)):
        raise CaptureError("the step copies an array from the host")
    return a
