"""Trace: records the calls of one step. TracedArray: an array whose operations are recorded.

While a step is traced, the arrays that its layers, loss and optimizer see are `TracedArray` objects, and their array
module is a `TracedModule` (array_module.py). Every operation is executed as usual, and recorded with the arrays that it
reads and writes. Whatever cannot be recorded, such as reading a value on the host, raises CaptureError.
"""

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy

from xpnet.backends import Array
from xpnet.backends.step_numbers import StepNumber, current
from xpnet.capture.calls import (
    Call,
    arrays_in,
    current_of,
    has_out,
    is_array,
    mapped,
    memory_of,
    same_view,
    signature_of,
)
from xpnet.errors import CaptureError


class SideEffectError(CaptureError):
    """A step does something besides computing with arrays, which no replay would do."""


_FOREIGN = "the step writes into an array that is neither the model's nor made by self.xp"
#: Parameters of operators and loops that are written without being read.
_OUTS = frozenset((
    "out", "losses", "choice", "sums", "sigma", "slope", "normal", "inner", "grad_gamma", "grad_beta", "grad_q",
    "grad_k", "grad_v", "grad_gates", "grad_products",
))  # fmt: skip
#: Functions whose second argument decides the shape of the result.
_SHAPING = frozenset(("array_split", "broadcast_to", "pad", "repeat", "reshape", "split", "tile"))
#: Functions that may return views of their second argument.
_VIEWING = frozenset(("atleast_1d", "atleast_2d", "atleast_3d", "broadcast_arrays", "einsum"))


class Trace:
    """The calls of one step, in order, and the arrays that were made for them."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        #: The array module that the step sees, a TracedModule.
        self.module: Any = None
        self.calls: list[Call] = []
        #: The memory that the step may write to, by id: that of arrays made in the step, and that of the model.
        self._writable: dict[int, Array] = {}
        #: The memory made in the step, by id.
        self.temporary: dict[int, Array] = {}
        self._thread, self._recording = threading.get_ident(), True
        self._operator, self._place = "", ""
        self._errors = numpy.geterr()

    @property
    def active(self) -> bool:
        """Whether operations are recorded: in the thread of the trace, until `stop`."""
        return self._recording and threading.get_ident() == self._thread

    @property
    def place(self) -> str:
        """The layer and the method that run now, or another place in the step."""
        return self._place

    @property
    def in_operator(self) -> bool:
        """Whether an operator of the backend is running."""
        return bool(self._operator)

    def stop(self) -> None:
        """Record no more. TracedArrays that are still around now behave like their arrays."""
        self._recording, self.module = False, None

    def release(self) -> None:
        """Forget all calls and arrays, whose memory is large, even if something still refers to the trace."""
        self.calls = []
        self._writable.clear()
        self.temporary.clear()

    # Arrays ----------------------------------------------------------------------------------------------------------

    def wrap(self, values: Array, writable: bool = False) -> "TracedArray":
        """An array from outside of the step. writable: whether the step may write into it."""
        if writable:
            memory = memory_of(values)
            self._writable[id(memory)] = memory
        return TracedArray(self, values)

    def own(self, values: Array) -> "TracedArray":
        """An array that was made in the step."""
        memory = memory_of(values)
        self._writable[id(memory)] = self.temporary[id(memory)] = memory
        return TracedArray(self, values)

    def refuse_foreign(self, values: Array) -> None:
        """Raise CaptureError if the step must not write into this array."""
        if id(memory_of(values)) not in self._writable:
            raise CaptureError(_FOREIGN)

    # Records ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def within(self, operator: str = "", place: str = "") -> Iterator[None]:
        """A context in which calls are recorded as part of this operator, or of this place in the model."""
        before = self._operator, self._place
        self._operator, self._place = operator or self._operator, place or self._place
        try:
            yield
        finally:
            self._operator, self._place = before

    def record(self, call: Call) -> None:
        """Append a call, with its operator and place. Raises CaptureError if NumPy's handling of errors was changed."""
        if numpy.geterr() != self._errors:
            raise CaptureError("the step changes how NumPy handles floating-point errors")
        call.operator, call.place = self._operator, self._place
        self.calls.append(call)

    def ufunc(self, function: Any, args: tuple[Any, ...], out: Any = None, **kwargs: Any) -> Any:
        """Call a ufunc, and record it with an array for its result."""
        given = tuple(map(unwrapped, args))
        now, now_kwargs = tuple(map(current, given)), {name: unwrapped(value) for name, value in kwargs.items()}
        if not self.active:
            return function(*now, out=unwrapped(out), **now_kwargs)
        if function.nout != 1:
            raise CaptureError(f"xp.{function.__name__} returns several arrays")
        if out is None:
            target = self.xp.asarray(function(*now, **now_kwargs))
            result = self.own(target)
        else:
            result, target = out, unwrapped(out)
            self.refuse_foreign(target)
            function(*now, out=target, **now_kwargs)
        reads = (*arrays_in(now), *arrays_in(now_kwargs))
        self.record(Call(function, (*given, target), now_kwargs, reads=reads, writes=(target,)))
        return result

    def function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of the array module that is not a ufunc, and record it unless it returns views."""
        now, now_kwargs = unwrapped(args), unwrapped(kwargs)
        if not self.active:
            return function(*now, **now_kwargs)
        name = function.__name__
        if name == "where" and len(args) + len(kwargs) < 3:
            raise CaptureError("xp.where with one argument returns an array whose shape depends on values")
        if name in _SHAPING and has_traced((args[1:], kwargs)):
            raise CaptureError(f"xp.{name} is given a shape that depends on values")
        if any(isinstance(n, StepNumber) for n in (*args, *kwargs.values())):
            raise CaptureError(f"xp.{name} is given a number that changes from step to step")
        named = has_out(function) or name == "nan_to_num"
        bound = signature_of(function).bind(*now, **now_kwargs).arguments if named else {}
        if not bound.get("copy", True) or bound.get("overwrite_input", False):
            raise CaptureError(f"xp.{name} changes the array that it is given")
        reads = tuple(
            arrays_in([value for key, value in bound.items() if key != "out"] if bound else (now, now_kwargs))
        )
        if (target := bound.get("out")) is not None:
            result = kwargs.get("out", next((a for a in args if unwrapped(a) is target), None))
            self.refuse_foreign(target)
            function(*now, **now_kwargs)
            self.record(Call(function, now, now_kwargs, reads=reads, writes=(target,)))
            return result
        value = function(*now, **now_kwargs)
        if isinstance(value, list | tuple):
            if not all(self._is_view(a, reads) for a in value):
                raise CaptureError(f"xp.{name} returns several arrays")
            return type(value)(TracedArray(self, a) for a in value)
        value = self.xp.asarray(value)
        if self._is_view(value, reads):
            if name not in _VIEWING and has_traced((args[1:], kwargs)):
                raise CaptureError(f"xp.{name} is given an axis that depends on values")
            return TracedArray(self, value)
        result = self.own(value)
        # NumPy's take copies twice into `out`, unless its mode is given.
        if has_out(function) and (name != "take" or "mode" in bound or self.xp is not numpy):
            self.record(Call(function, now, {**now_kwargs, "out": value}, reads=reads, writes=(value,)))
        else:
            self.record(Call(function, now, now_kwargs, value, reads, (value,)))
        return result

    def operator(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        writes: tuple[str, ...] = ("out",),
        updates: tuple[str, ...] = (),
    ) -> Any:
        """Call an operator or a compiled loop as a whole.

        writes: the parameters that it writes.  updates: those of them whose old values it needs, although their names
        say that it does not.  Arrays that it returns, other than those it was given, are new in each replay.
        """
        given, given_kwargs = unwrapped(args), unwrapped(kwargs)
        if not self.active:
            return function(*current_of(given), **current_of(given_kwargs))
        bound = signature_of(function).bind(*given, **given_kwargs).arguments
        written = tuple(a for name in writes for a in arrays_in(bound.get(name)))
        only_written = _OUTS.intersection(writes).difference(updates)
        reads = tuple(arrays_in([value for name, value in bound.items() if name not in only_written]))
        for array in written:
            self.refuse_foreign(array)
        value = function(*current_of(given), **current_of(given_kwargs))
        call = Call(function, given, given_kwargs, reads=reads, writes=written)
        self.record(call)
        if isinstance(value, numpy.generic):
            value = self.xp.asarray(value)
        known = {id(a.values): a for a in _traced_in((args, kwargs))}
        known |= {id(a): a for a in arrays_in((given, given_kwargs)) if id(a) not in known}
        new = [a for a in arrays_in(value) if id(a) not in known]
        if new:
            call.result, call.writes = value, (*written, *new)
        return mapped(lambda a: known[id(a)] if id(a) in known else self.own(a) if is_array(a) else a, value)

    def write(self, target: Array, value: Any, **kwargs: Any) -> None:
        """Copy a value (an array or a number) into an array."""
        given = unwrapped(value)
        if self.active:
            self.refuse_foreign(target)
        self.xp.copyto(target, current(given), casting="unsafe", **unwrapped(kwargs))
        if self.active:
            reads = (*arrays_in(given), *arrays_in(unwrapped(kwargs)))
            named = {"casting": "unsafe", **unwrapped(kwargs)}
            self.record(Call(self.xp.copyto, (target, given), named, reads=reads, writes=(target,)))

    def _is_view(self, value: Any, of: tuple[Array, ...]) -> bool:
        memory = memory_of(value)
        return any(memory is memory_of(a) for a in of)


class TracedArray:
    """An array of a step that is being traced."""

    __slots__ = ("__weakref__", "trace", "values")
    __hash__ = object.__hash__
    __array_priority__ = 1000  # above that of CuPy's arrays, whose operators leave the work to those here

    def __init__(self, trace: Trace, values: Array) -> None:
        self.trace, self.values = trace, values

    # Known without reading elements ----------------------------------------------------------------------------------

    shape = property(lambda self: self.values.shape)
    dtype = property(lambda self: self.values.dtype)
    ndim = property(lambda self: self.values.ndim)
    size = property(lambda self: self.values.size)
    nbytes = property(lambda self: self.values.nbytes)
    itemsize = property(lambda self: self.values.itemsize)
    strides = property(lambda self: self.values.strides)
    flags = property(lambda self: self.values.flags)
    device = property(lambda self: self.values.device)
    T = property(lambda self: TracedArray(self.trace, self.values.T))
    mT = property(lambda self: TracedArray(self.trace, self.values.mT))  # noqa: N815

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator["TracedArray"]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<an array {self.shape} of {self.dtype} in a step that is being captured>"

    # What cannot be recorded -----------------------------------------------------------------------------------------

    def _read(name: str) -> Any:  # type: ignore[misc]  # noqa: N805
        def read(self: "TracedArray", *args: Any, **kwargs: Any) -> Any:
            if self.trace.active:
                raise CaptureError("the step reads values on the host")
            return getattr(self.values, name)(*args, **kwargs)

        return read

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        if self.trace.active:
            raise CaptureError("the step gives an array to a function that is not the array module's")
        return numpy.asarray(self.values, *args)

    __float__, __int__, __index__ = map(_read, ("__float__", "__int__", "__index__"))
    __complex__, __bool__, __contains__ = map(_read, ("__complex__", "__bool__", "__contains__"))
    item, tolist, tobytes, get = map(_read, ("item", "tolist", "tobytes", "get"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if not hasattr(self.values, name):
            raise AttributeError(f"{type(self.values).__name__!r} object has no attribute {name!r}")
        if not self.trace.active:
            return getattr(self.values, name)
        raise CaptureError(f"the step uses the attribute {name!r} of an array")

    def __array_ufunc__(self, function: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if not self.trace.active:
            return getattr(function, method)(*unwrapped(args), **unwrapped(kwargs))
        out: Any = kwargs.pop("out", (None,))[0]
        refuse_untraced(out)
        if method == "__call__":
            return self.trace.ufunc(function, args, out, **kwargs)
        if method == "reduce":
            return self._reduce(function, **dict(zip(("axis", "dtype"), args[1:], strict=False)), out=out, **kwargs)
        if method == "at":
            return getattr(self.trace.module, function.__name__).at(*args)
        raise CaptureError(f"the step calls {function.__name__}.{method}")

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if not self.trace.active:
            return function(*unwrapped(args), **unwrapped(kwargs))
        name = function.__name__
        if getattr(self.trace.xp, name, None) is not function:  # as of numpy.linalg.trace
            raise CaptureError(f"the step uses {function.__module__}.{name}")
        return getattr(self.trace.module, name)(*args, **kwargs)

    # Operations ------------------------------------------------------------------------------------------------------

    def _reduce(self, function: Any, axis: Any = 0, dtype: Any = None, out: Any = None, keepdims: Any = False) -> Any:
        trace, target = self.trace, unwrapped(out)
        if trace.xp is not numpy:
            raise CaptureError(f"the step calls {function.__name__}.reduce")
        reduce, values = function.reduce, self.values
        if target is None:
            target = trace.xp.asarray(reduce(values, axis, dtype, None, keepdims))
            if not trace.active:
                return target
            out = trace.own(target)
        else:
            trace.refuse_foreign(target)
            reduce(values, axis, dtype, target, keepdims)
        trace.record(Call(reduce, (values, axis, dtype, target, keepdims), reads=(values,), writes=(target,)))
        return out

    def __getitem__(self, key: Any) -> Any:
        trace, given = self.trace, unwrapped(key)
        if (view := _basic(given)) is not None:
            return TracedArray(trace, self.values[view])
        if _has_booleans(given):
            raise CaptureError("the step selects elements by a condition, so that a shape depends on values")
        value = self.values[given]
        if not trace.active:
            return value
        value = trace.xp.asarray(value)  # which NumPy makes a number if it has no axes
        reads = (self.values, *arrays_in(given))
        trace.record(Call(operator.getitem, (self.values, given), result=value, reads=reads, writes=(value,)))
        return trace.own(value)

    def __setitem__(self, key: Any, value: Any) -> None:
        trace, given = self.trace, unwrapped(key)
        if (view := _basic(given)) is not None:
            target, source = self.values[view], unwrapped(value)
            if not (is_array(source) and same_view(target, source)):  # as after a[i] += b
                trace.write(target, value)
            return
        source = unwrapped(value)
        if isinstance(source, StepNumber):
            raise CaptureError("the step assigns a number that changes from step to step to selected elements")
        if trace.active:
            trace.refuse_foreign(self.values)
        self.values[given] = source
        reads = (self.values, *arrays_in(given), *arrays_in(source))
        if trace.active:
            trace.record(Call(operator.setitem, (self.values, given, source), reads=reads, writes=(self.values,)))

    def reshape(self, *shape: Any, **kwargs: Any) -> Any:
        if kwargs.get("order", "C") != "C" and self.trace.active:
            raise CaptureError("the step reshapes an array in another order than that of C")
        view = self.values.reshape(*shape, **kwargs)
        return self._view_or_copy(view)

    def ravel(self) -> Any:
        return self._view_or_copy(self.values.ravel())

    def _view_or_copy(self, result: Array) -> Any:
        if memory_of(result) is memory_of(self.values) or not self.trace.active:
            return TracedArray(self.trace, result)
        traced = self.trace.own(result)
        self.trace.write(result.reshape(self.shape), self)  # a copy is contiguous
        return traced

    def transpose(self, *axes: Any) -> "TracedArray":
        return TracedArray(self.trace, self.values.transpose(*axes))

    def swapaxes(self, a: int, b: int) -> "TracedArray":
        return TracedArray(self.trace, self.values.swapaxes(a, b))

    def squeeze(self, axis: Any = None) -> "TracedArray":
        return TracedArray(self.trace, self.values.squeeze(axis))

    def astype(self, dtype: Any, copy: bool = True) -> Any:
        if not copy and self.dtype == dtype:
            return self
        return self._copy(self.values.astype(dtype))

    def copy(self, order: str = "C") -> Any:
        return self._copy(self.values.copy(order))

    def flatten(self) -> Any:
        flat = self.values.flatten()
        if not self.trace.active:
            return flat
        traced = self.trace.own(flat)
        self.trace.write(flat.reshape(self.shape), self)
        return traced

    def _copy(self, result: Array) -> Any:
        if not self.trace.active:
            return result
        traced = self.trace.own(result)
        self.trace.write(result, self.values)
        return traced

    def fill(self, value: Any) -> None:
        self.trace.write(self.values, value)

    def clip(self, low: Any = None, high: Any = None, out: Any = None) -> Any:
        return self.trace.function(self.trace.xp.clip, (self, low, high), {} if out is None else {"out": out})

    def _method(name: str) -> Any:  # type: ignore[misc]  # noqa: N805
        def method(self: "TracedArray", *args: Any, **kwargs: Any) -> Any:
            if not self.trace.active:
                return getattr(self.values, name)(*unwrapped(args), **unwrapped(kwargs))
            return getattr(self.trace.module, name)(self, *args, **kwargs)

        return method

    all, any, argmax, argmin, argsort = map(_method, ("all", "any", "argmax", "argmin", "argsort"))
    cumprod, cumsum, dot = map(_method, ("cumprod", "cumsum", "dot"))
    max, mean = map(_method, ("max", "mean"))
    min, prod, repeat, std, sum = map(_method, ("min", "prod", "repeat", "std", "sum"))
    take, trace_, var, diagonal = map(_method, ("take", "trace", "var", "diagonal"))


def _operator(name: str, reflected: bool = False, in_place: bool = False) -> Any:
    function = getattr(numpy, name)

    def method(self: TracedArray, *other: Any) -> Any:
        if other and not (isinstance(other[0], _OPERANDS) or is_array(other[0])):
            return NotImplemented
        args = (*other, self) if reflected else (self, *other)
        if name == "power" and not isinstance(other[0], StepNumber) and not reflected:
            return _power(self, other[0], in_place)
        ufunc = function if self.trace.xp is numpy else getattr(self.trace.xp, name)
        return self.trace.ufunc(ufunc, args, self if in_place else None)

    return method


def _power(a: TracedArray, exponent: Any, in_place: bool) -> Any:
    """a ** exponent as the array computes it, which is not the ufunc `power` for some exponents."""
    function: Any = operator.ipow if in_place else operator.pow
    if not a.ndim:
        raise CaptureError("the step raises a number on the device to a power: multiply it, or use xp.square")
    if not a.trace.active:
        return function(a.values, unwrapped(exponent))
    return a.trace.operator(function, (a, exponent), {}, ("a",) if in_place else ())


_OPERANDS = (bool, int, float, numpy.generic, numpy.ndarray, TracedArray, StepNumber)
for _name, _function in {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "power", "matmul": "matmul", "and": "bitwise_and", "or": "bitwise_or",
    "xor": "bitwise_xor", "lshift": "left_shift", "rshift": "right_shift",
}.items():  # fmt: skip
    setattr(TracedArray, f"__{_name}__", _operator(_function))
    setattr(TracedArray, f"__r{_name}__", _operator(_function, reflected=True))
    if _name != "matmul":
        setattr(TracedArray, f"__i{_name}__", _operator(_function, in_place=True))
for _name, _function in {
    "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal",
    "neg": "negative", "abs": "absolute", "invert": "invert",
}.items():  # fmt: skip
    setattr(TracedArray, f"__{_name}__", _operator(_function))


def _basic(key: Any) -> Any:
    """The key of a view, even of a single element; None if this key selects elements by arrays."""
    keys = key if isinstance(key, tuple) else (key,)
    if all(item is None or item is Ellipsis or isinstance(item, slice) or _is_integer(item) for item in keys):
        return keys if Ellipsis in keys else (*keys, Ellipsis)
    return None


def _is_integer(item: Any) -> bool:
    return isinstance(item, int | numpy.integer) and not isinstance(item, bool)


def _has_booleans(key: Any) -> bool:
    keys = key if isinstance(key, tuple) else (key,)
    return any(isinstance(item, bool) or getattr(getattr(item, "dtype", None), "kind", "") == "b" for item in keys)


def unwrapped(value: Any) -> Any:
    """A value with arrays in place of the TracedArrays in it."""
    return mapped(lambda item: item.values if isinstance(item, TracedArray) else item, value)


def refuse_untraced(out: Any) -> None:
    """Raise CaptureError if this is an array that is not traced."""
    if out is not None and not isinstance(out, TracedArray):
        raise CaptureError(_FOREIGN)


def has_traced(value: Any) -> bool:
    """Whether this is a TracedArray, or a list, tuple or dictionary with one in it."""
    if isinstance(value, list | tuple):
        return any(map(has_traced, value))
    return isinstance(value, TracedArray) or (isinstance(value, dict) and any(map(has_traced, value.values())))


def _traced_in(value: Any) -> list["TracedArray"]:
    """The TracedArrays in a value, and in the lists, tuples and dictionaries in it."""
    found: list[TracedArray] = []
    mapped(lambda item: found.append(item) if isinstance(item, TracedArray) else None, value)
    return found
