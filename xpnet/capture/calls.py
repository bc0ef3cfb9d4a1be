"""Call: one call of a step; and functions that inspect its arguments and arrays."""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy

from xpnet.backends import Array
from xpnet.backends.step_numbers import current


@dataclass(eq=False)
class Call:
    """One call of a step: function(*args, **kwargs).

    Arguments are arrays, numbers and `StepNumber` objects.  result: the array that the function returned, or a tuple
    with such arrays; None if it writes its result into one of its arguments. On the CPU, a replay copies what the
    function returns into it.  reads, writes: the arrays whose elements it uses and changes.
    operator: the operator of the backend that made the call, or "".  place: the layer and its method, or "".
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    result: Array = None
    reads: tuple[Array, ...] = ()
    writes: tuple[Array, ...] = ()
    operator: str = ""
    place: str = ""
    #: For work that threads share: the calls of each part.
    parts: list[list["Call"]] | None = None
    #: Whether it may read and write anything, as the update of a custom optimizer.
    opaque: bool = False
    #: What `given_by_name` returned.
    given: dict[str, Any] | None = field(default=None, init=False, repr=False)

    def make(self, convert: Callable[[Any], Any] = current) -> Any:
        """Make the call with convert(argument) in place of each array and number. Returns what the function returns."""
        args, kwargs = mapped(convert, self.args), mapped(convert, self.kwargs)
        if hasattr(self.function, "nin"):  # a ufunc
            args, kwargs = args[:-1], {**kwargs, "out": args[-1]}
        return self.function(*args, **kwargs)

    @property
    def name(self) -> str:
        """A short name of the function."""
        function = self.function if hasattr(self.function, "__name__") else getattr(self.function, "func", None)
        return str(getattr(function, "__name__", self.function))


def memory_of(a: Array) -> Any:
    """The owner of the memory of an array. Views of the same memory have the same owner."""
    if not isinstance(a, numpy.ndarray):
        return a.data.mem  # of CuPy
    while (base := a.base) is not None and hasattr(base, "base"):
        a = base
    return a


def address_of(a: Array) -> int:
    """The address of the first element."""
    address: int = a.__array_interface__["data"][0] if isinstance(a, numpy.ndarray) else a.data.ptr
    return address


def same_view(a: Array, b: Array) -> bool:
    """Whether two arrays are the same elements in the same order."""
    return bool(address_of(a) == address_of(b) and a.shape == b.shape and a.strides == b.strides and a.dtype == b.dtype)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A value with function(item) in place of each item of the lists, tuples and dictionaries in it."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[mapped(function, item) for item in value])
    if type(value) in (list, tuple):
        return type(value)([mapped(function, item) for item in value])
    if type(value) is dict:
        return {name: mapped(function, item) for name, item in value.items()}
    return function(value)


def current_of(value: Any) -> Any:
    """A value with the current numbers in place of the StepNumbers in it."""
    return mapped(current, value)


def is_array(value: Any) -> bool:
    """Whether this is an array of NumPy or of CuPy."""
    return hasattr(value, "dtype") and hasattr(value, "strides") and not isinstance(value, numpy.generic | type)


def arrays_in(value: Any) -> Iterator[Array]:
    """The arrays in a value, and in the lists, tuples and dictionaries in it."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from arrays_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from arrays_in(item)
    elif is_array(value):
        yield value


def given_by_name(call: Call) -> dict[str, Any]:
    """The arguments of a call by the names of the function's parameters, in their order."""
    if call.given is None:
        call.given = dict(signature_of(call.function).bind(*call.args, **call.kwargs).arguments)
    return call.given


def signature_of(function: Any) -> inspect.Signature:
    """The signature of a function, of a method without `self`, or of the Python function of a compiled loop."""
    if not inspect.ismethod(function):
        return _function_signature(function)
    signature = _function_signature(function.__func__)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@functools.lru_cache(256)
def _function_signature(function: Any) -> inspect.Signature:
    try:
        return inspect.signature(getattr(function, "py_func", function))
    except ValueError:  # a function of NumPy that is written in C, before NumPy 2.4
        name = getattr(function, "__name__", "")
        if name not in _WRITTEN_IN_C or getattr(function, "__module__", "") != "numpy":
            raise
        return inspect.signature(_WRITTEN_IN_C[name])


def _dot(a: Any, b: Any, out: Any = None) -> None:
    """The signature of numpy.dot."""


def _concatenate(arrays: Any, /, axis: Any = 0, out: Any = None, *, dtype: Any = None, casting: Any = "") -> None:
    """The signature of numpy.concatenate."""


def _copyto(dst: Any, src: Any, casting: Any = "same_kind", where: Any = True) -> None:
    """The signature of numpy.copyto."""


_WRITTEN_IN_C: dict[str, Callable[..., Any]] = {"dot": _dot, "concatenate": _concatenate, "copyto": _copyto}


@functools.lru_cache(256)
def has_out(function: Any) -> bool:
    """Whether a function has the parameter `out`."""
    try:
        return "out" in signature_of(function).parameters
    except (TypeError, ValueError):
        return False
