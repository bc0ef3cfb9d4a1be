"""The strict backend: it computes with NumPy and refuses what CuPy refuses, to find mistakes without a GPU.

`StrictBackend().xp` has the names and keywords of CuPy, which cupy_api.json records. Its arrays contain NumPy arrays
but are not NumPy arrays: they are never converted implicitly, and every call that would wait for a GPU is counted in
`host_reads`. What CuPy refuses raises TypeError, AttributeError and the like. What CuPy would silently do wrong
(compute on the wrong device, copy instead of writing in place, leave a result undefined) raises StrictError.

Results are NumPy's, bit for bit. As in CuPy, indices out of range wrap, and nothing warns.
"""

import functools
import inspect
import json
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy

from xpnet.backends import Backend
from xpnet.backends.arrays import to_host

API: dict[str, Any] = json.loads(Path(__file__).with_name("cupy_api.json").read_text(encoding="utf-8"))

HostArray = numpy.ndarray[Any, Any]

_SCALARS = (bool, int, float, complex, numpy.generic)
_DTYPES = "?bBhHiIlLqQefdFD"
_ADD_AT_DTYPES = "iIlLqQefd"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Parameters that take one or several numbers of the host, and never an array.
_HOST_PARAMETERS = _words(
    "shape newshape new_shape dimensions axis axes axis1 axis2 source destination start stop step num N M n k reps "
    "repeats pad_width shift indices_or_sections dims"
)
# Parameters that take several arrays in a tuple or list.
_SEQUENCE_PARAMETERS = _words("tup arrays arys seq operands args xi arrays_and_dtypes out")
# Functions that accept host data, that need no array, and that return Python objects without waiting for the device.
_UPLOADS = _words("array asarray asanyarray ascontiguousarray asfortranarray")
_CREATORS = _words("arange empty eye full identity indices linspace logspace ones tri tril_indices triu_indices zeros")
_INQUIRIES = _words(
    "can_cast iscomplexobj isfortran isrealobj isscalar may_share_memory min_scalar_type ndim result_type shape "
    "shares_memory size"
)
# Functions whose arguments differ between CuPy and NumPy, and which the package does not use.
_NOT_SUPPORTED = _words(
    "apply_along_axis apply_over_axes choose fromfunction load piecewise place put put_along_axis putmask "
    "ravel_multi_index save savetxt savez savez_compressed select"
)
_REDUCTIONS = _words("amax amin cumprod cumsum max mean min nanmax nanmin nansum prod ptp std sum var")
_ARG_REDUCTIONS = _words("argmax argmin nanargmax nanargmin")
_READING_FUNCTIONS = frozenset(API["synchronizes"]) - {"where"}  # where waits only if called with a condition alone
_READING_METHODS = _words("compress dump dumps nonzero tofile")


class StrictError(AssertionError):
    """An operation that would not fail on a GPU, but silently do something else."""


@functools.cache
def signature(parameters: str) -> inspect.Signature:
    """The signature of a recorded text such as "a, axis=..., out=..."."""
    recorded: inspect.Signature = inspect.signature(eval(f"lambda {parameters}: None"))
    return recorded


# The backend ---------------------------------------------------------------------------------------------------------


class _CurrentDevice(threading.local):
    index = 0  # in every new thread, as in CUDA


_current = _CurrentDevice()


class StrictBackend(Backend):
    """device: the number of a fake GPU. As in CUDA, device 0 is the current one outside of any `backend.device()`."""

    has_streams = True  # as each device of CUDA

    _alive: ClassVar["weakref.WeakValueDictionary[int, StrictBackend]"] = weakref.WeakValueDictionary()

    def __init__(self, device: int = 0) -> None:
        super().__init__(f"strict:{device}" if device else "strict", StrictModule(self))
        self.index = device
        #: How often the host has waited for a result of the device.
        self.host_reads = 0
        #: The dtypes of all arrays with more than one element that the last `watch_dtypes` saw.
        self.seen_dtypes: set[numpy.dtype[Any]] = set()
        self._watches_dtypes = False
        self._forbids_reads = False
        self._alive[id(self)] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return _same_backend, (id(self), self.index)

    def asarray(self, a: Any, dtype: Any = None) -> Any:
        with self.device():
            if isinstance(a, StrictArray) and a._backend is self:
                return self.xp.asarray(a, dtype=dtype)
            host = a._values if isinstance(a, StrictArray) else numpy.asarray(to_host(a))
            return StrictArray(self, numpy.array(host, dtype=dtype))

    def to_numpy(self, a: Any) -> HostArray:
        return a.get() if isinstance(a, StrictArray) else numpy.asarray(to_host(a))

    @contextmanager
    def device(self) -> Iterator[None]:
        before, _current.index = _current.index, self.index
        try:
            yield
        finally:
            _current.index = before

    @contextmanager
    def no_host_reads(self) -> Iterator[None]:
        """A context in which a call that would wait for the device raises AssertionError."""
        before, self._forbids_reads = self._forbids_reads, True
        try:
            yield
        finally:
            self._forbids_reads = before

    @contextmanager
    def watch_dtypes(self) -> Iterator[set[numpy.dtype[Any]]]:
        """A context that collects the dtype of every array with more than one element, also in `seen_dtypes`."""
        seen = self.seen_dtypes = set()
        before, self._watches_dtypes = self._watches_dtypes, True
        try:
            yield seen
        finally:
            self._watches_dtypes = before

    def read(self, what: str) -> None:
        """Count one wait for the device."""
        if self._forbids_reads:
            raise AssertionError(f"{what} waits for the device, to bring a result to the host.")
        self.host_reads += 1

    def compute(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` with the NumPy arrays inside `args` and `kwargs`; wrap what it returns as device arrays."""
        if _current.index != self.index:
            raise StrictError(
                f"{getattr(function, '__name__', function)} of arrays of device {self.index}, while the current "
                f"device is {_current.index}. Enter `with backend.device():` first."
            )
        inside: dict[int, StrictArray] = {}
        args = tuple(self.unwrap(a, inside) for a in args)
        kwargs = {name: self.unwrap(a, inside) for name, a in kwargs.items()}
        with numpy.errstate(all="ignore"):  # a GPU does not warn about floating-point errors
            return self._wrap(function(*args, **kwargs), inside)

    def unwrap(self, a: Any, inside: dict[int, "StrictArray"]) -> Any:
        """`a` with NumPy arrays in place of device arrays; `inside` records which belongs to which."""
        if isinstance(a, StrictArray):
            if a._backend.index != self.index:
                raise StrictError(f"an array of device {a._backend.index} is combined with one of device {self.index}.")
            inside[id(a._values)] = a
            return a._values
        if type(a) in (list, tuple):
            return type(a)(self.unwrap(item, inside) for item in a)
        return a

    def _wrap(self, a: Any, inside: dict[int, "StrictArray"]) -> Any:
        if isinstance(a, numpy.ndarray):
            return inside[id(a)] if id(a) in inside else StrictArray(self, a)
        if isinstance(a, _SCALARS):  # CuPy returns no scalars
            return StrictArray(self, numpy.asarray(a))
        if isinstance(a, (list, tuple)):
            items = [self._wrap(item, inside) for item in a]
            return type(a)(*items) if hasattr(a, "_fields") else type(a)(items)
        return a


def _take_wrapped(a: HostArray, indices: Any, axis: Any, out: Any) -> Any:
    """numpy.take with mode="wrap", which alone would take years for 2**62: it subtracts the length again and again."""
    length = a.size if axis is None else a.shape[axis]
    return numpy.take(a, numpy.asarray(indices) % length if length else indices, axis, out, mode="wrap")


def _same_backend(key: int, device: int) -> StrictBackend:
    """For unpickling: the same backend in the same process, an equal one in another process."""
    return StrictBackend._alive.get(key) or StrictBackend(device)


# The array -----------------------------------------------------------------------------------------------------------


class Flags(NamedTuple):
    """CuPy's flags, which have no `writeable`."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool


class Device(NamedTuple):
    """The type of `array.device`."""

    id: int


class StrictArray:
    """A NumPy array with the interface of cupy.ndarray."""

    __slots__ = ("__weakref__", "_backend", "_values")
    __array_ufunc__ = None  # so that NumPy's ufuncs raise TypeError, and its operators defer to those below
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, backend: Any, values: Any, memptr: Any = None, strides: Any = None) -> None:
        """Values on a backend; or, as in CuPy, a shape, a dtype, a pointer to memory, and strides."""
        if memptr is not None:
            backend, values = memptr.backend, memptr.array(backend, values, strides)
        if values.dtype.char not in _DTYPES:
            raise ValueError(f"Unsupported dtype {values.dtype}")
        self._backend = backend
        self._values = values
        if backend._watches_dtypes and values.size > 1:
            backend.seen_dtypes.add(values.dtype)

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_function__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"numpy.{function.__name__} was given a device array. Call it from `xp`.")

    # Known to the host without waiting for the device ----------------------------------------------------------

    shape = property(lambda self: self._values.shape)
    strides = property(lambda self: self._values.strides)
    dtype = property(lambda self: self._values.dtype)
    ndim = property(lambda self: self._values.ndim)
    size = property(lambda self: self._values.size)
    nbytes = property(lambda self: self._values.nbytes)
    itemsize = property(lambda self: self._values.itemsize)
    device = property(lambda self: Device(self._backend.index))
    T = property(lambda self: StrictArray(self._backend, self._values.T))
    mT = property(lambda self: StrictArray(self._backend, self._values.mT))  # noqa: N815
    real = property(lambda self: StrictArray(self._backend, self._values.real))
    imag = property(lambda self: StrictArray(self._backend, self._values.imag))

    @property
    def flags(self) -> Flags:
        flags = self._values.flags
        return Flags(flags.c_contiguous, flags.f_contiguous, flags.owndata)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # So that the package treats it as a device array. The pointer must not be used.
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (0, False), "version": 3}

    def __len__(self) -> int:
        return len(self._values)

    @property
    def data(self) -> "MemoryPointer":
        """The pointer, as in CuPy, for emulated kernels and libraries."""
        return MemoryPointer(self._backend, _root(self._values), self._values.ctypes.data)

    def set(self, a: HostArray, stream: Any = None) -> None:
        """A copy from the host, in place."""
        if a.dtype != self.dtype or a.shape != self.shape:
            raise TypeError("set: another dtype or shape")
        self._backend.compute(operator.setitem, self, ..., StrictArray(self._backend, a))

    # Methods that wait for the device. As in CuPy, there is no __index__. --------------------------------------

    def get(self, stream: None = None, order: Any = "C", out: None = None, blocking: bool = True) -> HostArray:
        if stream is not None or out is not None:
            raise NotImplementedError(
                "get(stream=, out=) is not supported by the strict backend (tests/support/strict.py)"
            )
        return self._read("get").copy(order)

    def _read(self, what: str) -> HostArray:
        self._backend.read(what)
        return self._values

    def item(self) -> Any:
        return self._read("item").item()

    def tolist(self) -> Any:
        return self._read("tolist").tolist()

    def tobytes(self, order: Any = "C") -> bytes:
        return self._read("tobytes").tobytes(order)

    def __bool__(self) -> bool:
        return bool(self._read("bool"))

    def __int__(self) -> int:
        return int(self._read("int"))

    def __float__(self) -> float:
        return float(self._read("float"))

    def __complex__(self) -> complex:
        return complex(self._read("complex"))

    def __repr__(self) -> str:
        return repr(self._read("repr"))

    def __str__(self) -> str:
        return str(self._read("str"))

    def __format__(self, spec: str) -> str:
        return format(self._read("format"), spec)

    def __iter__(self) -> Iterator["StrictArray"]:
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d array")
        if self.ndim == 1:
            # CuPy returns 0-d views, but code that iterates over single numbers reads them on the host.
            self._backend.read("iteration over numbers")
        return (self[i] for i in range(len(self)))

    # Copies ----------------------------------------------------------------------------------------------------

    def __copy__(self) -> "StrictArray":
        return StrictArray(self._backend, self._values.copy())

    def __deepcopy__(self, memo: Any) -> "StrictArray":
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        return StrictArray, (self._backend, self.get(order="A"))

    # Elements --------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> "StrictArray":
        index, kind = self.index(key)
        if kind is None:
            return StrictArray(self._backend, self._values[index])
        if kind == "mask":
            self._backend.read("indexing with a mask")
        picked: StrictArray = self._backend.compute(lambda values: numpy.array(values[index]), self)
        return picked

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(value, (StrictArray, *_SCALARS)):
            raise ValueError(f"a device array is set to device arrays and scalars, not to {type(value)}.")
        index, kind = self.index(key)
        if kind == "mask":
            self._backend.read("assigning through a mask")
        if kind == "integers" and isinstance(value, StrictArray) and value.size > 1:
            targets = numpy.arange(self.size).reshape(self.shape)[index]
            if len(numpy.unique(targets)) < targets.size:
                raise StrictError("an element is assigned to twice; which of the values it gets is undefined in CuPy.")
        self._backend.compute(operator.setitem, self, index, value)

    def index(self, key: Any) -> tuple[Any, str | None]:
        """The index for the NumPy array inside, and which arrays it contains: "mask", "integers" or None.

        Integers in arrays wrap. The index always has an Ellipsis, so that NumPy returns 0-d views instead of scalars.
        """
        items = list(key) if isinstance(key, tuple) else [key]
        arrays = [item for item in items if isinstance(item, StrictArray)]
        masks = [array for array in arrays if array.dtype.kind == "b"]
        for item in items:
            if isinstance(item, StrictArray):
                if item.dtype.kind not in "biu":
                    raise IndexError(f"arrays used as indices must be of integer or boolean type, not {item.dtype}.")
            elif item is not None and item is not Ellipsis and not _is_basic(item):
                raise TypeError(
                    f"a device array is indexed by integers, slices, None, ... and device arrays, not by {type(item)}, "
                    "which CuPy would have to upload first."
                )
        if masks and len(arrays) > 1:
            raise IndexError("CuPy accepts one boolean array in an index, and then no other array.")
        if not any(item is Ellipsis for item in items):
            items.append(Ellipsis)
        widths = [_axes_taken(item) for item in items]
        if sum(widths) > self.ndim:
            raise IndexError(f"too many indices: {sum(widths)} for an array of {self.ndim} dimensions.")
        axis, index = 0, []
        for item, width in zip(items, widths, strict=True):
            if isinstance(item, StrictArray):
                if not masks and self.shape[axis]:
                    item = self._backend.compute(_wrapped, item, self.shape[axis])
                item = self._backend.unwrap(item, {})
            index.append(item)
            axis += self.ndim - sum(widths) if item is Ellipsis else width
        return tuple(index), "mask" if masks else "integers" if arrays else None

    # Methods and operators -------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name not in API["ndarray"]["methods"]:
            raise AttributeError(f"'cupy.ndarray' object has no attribute {name!r}")
        if not hasattr(numpy.ndarray, name) or name in _NOT_SUPPORTED:
            raise AttributeError(
                f"cupy.ndarray.{name} is not supported by the strict backend (tests/support/strict.py)"
            )
        if name in ("dot", "take"):
            return functools.partial(getattr(self._backend.xp, name), self)
        return functools.partial(self._method, name)

    def _method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        bound = _bind(f"ndarray.{name}", API["ndarray"]["methods"][name], args, kwargs)
        _check_reduction(name, self, bound)
        if name in _READING_METHODS:
            self._backend.read(name)
        return self._backend.compute(getattr(numpy.ndarray, name), self, *args, **kwargs)

    def __matmul__(self, other: Any) -> Any:
        return self._backend.xp.matmul(self, other)


class MemoryPointer(NamedTuple):
    """CuPy's pointer to the element at address `ptr`, in the memory of the array `root`."""

    backend: StrictBackend
    root: HostArray
    ptr: int

    @property
    def mem(self) -> Any:
        """The owner of the memory."""
        return self.root if self.root.base is None else self.root.base

    def __add__(self, offset: int) -> "MemoryPointer":  # type: ignore[override]
        return self._replace(ptr=self.ptr + offset)

    def array(self, shape: Any, dtype: Any, strides: Any) -> HostArray:
        """An array whose first element is here."""
        memory = self.root.reshape(-1, order="A").view("uint8")
        return numpy.ndarray(shape, dtype, memory, self.ptr - memory.ctypes.data, strides)


def _root(a: HostArray) -> HostArray:
    while isinstance(a.base, numpy.ndarray):
        a = a.base
    return a


def _wrapped(indices: HostArray, length: int) -> HostArray:
    return indices.astype(numpy.int64) % length


def _is_basic(item: Any) -> bool:
    return isinstance(item, (int, numpy.integer, slice)) and not isinstance(item, bool)


def _axes_taken(item: Any) -> int:
    """How many axes of the array an item of an index covers; the Ellipsis covers the rest."""
    if isinstance(item, StrictArray) and item.dtype.kind == "b":
        return int(item.ndim)
    return 0 if item is None or item is Ellipsis else 1


def _check_operand(a: Any) -> None:
    if not isinstance(a, (StrictArray, *_SCALARS)):
        raise TypeError(
            f"Unsupported type {type(a)}: a device array can be combined with device arrays and scalars only."
        )


def _define_operators() -> None:
    """Python's operators, as those of NumPy on the arrays inside."""

    def define(name: str, function: Callable[..., Any], swapped: bool = False) -> None:
        def method(self: StrictArray, *others: Any) -> Any:
            for other in others:
                _check_operand(other)
            return self._backend.compute(function, *((*others, self) if swapped else (self, *others)))

        method.__name__ = method.__qualname__ = f"__{name}__"
        setattr(StrictArray, method.__name__, method)

    for name in ("neg", "pos", "abs", "invert", "lt", "le", "eq", "ne", "gt", "ge"):
        define(name, getattr(operator, f"__{name}__"))
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor"):
        define(name, getattr(operator, f"__{name}__"))
        define(f"r{name}", getattr(operator, f"__{name}__"), swapped=True)
        define(f"i{name}", getattr(operator, f"__i{name}__"))
    define("divmod", divmod)
    define("rdivmod", divmod, swapped=True)


_define_operators()


# The module ----------------------------------------------------------------------------------------------------------


class StrictModule:
    """The module `cupy`, as far as NumPy has the same names."""

    ndarray = StrictArray

    def __init__(self, backend: StrictBackend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        value = self._resolve(name)
        setattr(self, name, value)
        return value

    def _resolve(self, name: str) -> Any:
        plain = name in API["same_as_numpy"] or name in API["constants"]
        function = name in API["functions"] or name in API["ufuncs"]
        if not (plain or function or name in API["classes"] or name in API["modules"]):
            raise AttributeError(f"module 'cupy' has no attribute {name!r}")
        if name in _NOT_SUPPORTED or not (plain or function):
            raise AttributeError(f"cupy.{name} is not supported by the strict backend (tests/support/strict.py)")
        if not hasattr(numpy, name):
            raise AttributeError(f"cupy.{name} exists, but numpy.{name} does not")
        if plain:
            return getattr(numpy, name)
        if name in API["ufuncs"]:
            return StrictUfunc(self._backend, name)
        if name in _UPLOADS:
            return functools.partial(self._upload, name)
        special: dict[str, Callable[..., Any]] = {
            "dot": self._product,
            "empty": self._empty,
            "empty_like": self._empty,
            "matmul": self._product,
            "take": self._take,
            "take_along_axis": self._take_along_axis,
            "where": self._where,
        }
        resolved: Any = functools.partial(special.get(name, self._call), name)
        resolved.__name__, resolved.__signature__ = name, signature(API["functions"][name])
        return resolved

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        bound = _bind(name, API["functions"][name], args, kwargs)
        if name in _INQUIRIES:
            unwrapped = [self._backend.unwrap(a, {}) for a in args]
            return getattr(numpy, name)(*unwrapped, **kwargs)
        first = next(iter(bound.arguments.values()), None)
        if name not in _CREATORS and not _holds(StrictArray, first):
            raise TypeError(f"cupy.{name} works on a device array, not on {type(first)}.")
        if name in _ARG_REDUCTIONS and len(args) > 2:
            raise TypeError(f"{name}: the third argument is dtype in CuPy and out in NumPy. Give it by its name.")
        _check_reduction(name, first, bound)
        if name in _READING_FUNCTIONS:
            self._backend.read(name)
        return self._backend.compute(getattr(numpy, name), *args, **kwargs)

    def _upload(self, name: str, a: Any, *args: Any, **kwargs: Any) -> Any:
        """asarray and similar functions, which accept host data. They copy it, as an upload does."""
        _bind(name, API["functions"][name], (None, *args), kwargs)
        if _holds(StrictArray, a) and _holds(numpy.ndarray, a):
            raise TypeError(f"cupy.{name} was given NumPy arrays and device arrays in one list.")
        array = self._backend.compute(getattr(numpy, name), a, *args, **kwargs)
        if isinstance(a, numpy.ndarray) and numpy.may_share_memory(array._values, a):
            array = array.copy(order="A")
        return array

    def _empty(self, name: str, *args: Any, **kwargs: Any) -> StrictArray:
        """New memory may contain anything. Here it contains NaN or the largest integer, which tests notice."""
        array: StrictArray = self._call(name, *args, **kwargs)
        kind = array.dtype.kind
        array._values.fill(numpy.nan if kind in "fc" else True if kind == "b" else numpy.iinfo(array.dtype).max)
        return array

    def _product(self, name: str, *args: Any, **kwargs: Any) -> Any:
        arguments = _bind(name, API["functions"][name], args, kwargs).arguments
        out = arguments.get("out")
        a, b = list(arguments.values())[:2]
        for array in (a, b) if out is None else (a, b, out):
            if not isinstance(array, StrictArray):
                raise TypeError(f"cupy.{name} works on device arrays, not on {type(array)}.")
        if out is not None:
            copies = "would copy it silently" if name == "matmul" else "refuses it"
            if out.dtype != numpy.promote_types(a.dtype, b.dtype):
                raise StrictError(f"{name}: out is {out.dtype}, for {a.dtype} and {b.dtype}; CuPy {copies}.")
            if not out.flags.c_contiguous:
                raise StrictError(f"{name}: out is not C-contiguous; CuPy {copies}.")
            if any(numpy.may_share_memory(out._values, array._values) for array in (a, b)):
                raise StrictError(f"{name}: out overlaps an input; CuPy would overwrite elements before it reads them.")
        return self._backend.compute(getattr(numpy, name), *args, **kwargs)

    def _where(self, name: str, condition: Any, x: Any = None, y: Any = None) -> Any:
        if x is None and y is None:
            self._backend.read("where of a condition alone")
            return self._call(name, condition)
        return self._call(name, condition, x, y)

    def _take(self, name: str, a: Any, indices: Any, axis: Any = None, out: Any = None) -> Any:
        _bind(name, API["functions"][name], (a, indices, axis, out), {})
        if not isinstance(a, StrictArray):
            raise TypeError(f"cupy.take works on a device array, not on {type(a)}.")
        if out is not None and out.dtype != a.dtype:
            raise TypeError("Output dtype mismatch")
        return self._backend.compute(_take_wrapped, a, indices, axis, out)

    def _take_along_axis(self, name: str, a: Any, indices: Any, axis: Any) -> Any:
        length = a.size if axis is None else a.shape[axis]
        return self._call(name, a, indices % length if length else indices, axis)


class StrictUfunc:
    """A ufunc of CuPy, with fewer keywords and methods than one of NumPy."""

    def __init__(self, backend: StrictBackend, name: str) -> None:
        self.__name__ = name
        self.nin, self.nout = getattr(numpy, name).nin, getattr(numpy, name).nout
        self._backend = backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = _bind(self.__name__, API["ufuncs"][self.__name__], args, kwargs).arguments
        for name, value in arguments.items():
            if name.startswith("x"):
                _check_operand(value)
        return self._backend.compute(getattr(numpy, self.__name__), *args, **kwargs)

    def at(self, a: StrictArray, indices: Any, b: Any = None) -> None:
        """Adds once for each occurrence of a repeated index."""
        if self.__name__ != "add":
            raise NotImplementedError(f"cupy.{self.__name__}.at is not supported by the strict backend")
        if a.dtype.char not in _ADD_AT_DTYPES:
            raise TypeError(f"cupy.add.at does not support {a.dtype}")
        _check_operand(b)
        self._backend.compute(numpy.add.at, a, a.index(indices)[0], b)

    def __getattr__(self, name: str) -> Any:
        if self.__name__ not in API["ufunc_methods"].get(name, ()):
            raise NotImplementedError(f"`cupy_{self.__name__}.{name}` is not supported yet")
        raise AttributeError(
            f"cupy.{self.__name__}.{name} is not supported by the strict backend (tests/support/strict.py)"
        )


# Arguments -----------------------------------------------------------------------------------------------------------


def _holds(kind: type, a: Any) -> bool:
    """Whether `a` is a `kind`, or a list or tuple with one in it."""
    if isinstance(a, (list, tuple)):
        return any(_holds(kind, item) for item in a)
    return isinstance(a, kind)


def _bind(function: str, parameters: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """The arguments bound to the parameters of CuPy's function; TypeError for those that it refuses."""
    try:
        bound = signature(parameters).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"cupy.{function}({parameters}): {error}") from None
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if _holds(numpy.ndarray, list(value.values()) if kind is inspect.Parameter.VAR_KEYWORD else value):
            raise TypeError(f"cupy.{function}: {name} is or holds a NumPy array. Move it with backend.asarray first.")
        if name in _HOST_PARAMETERS:
            if _holds(StrictArray, value):
                raise TypeError(f"cupy.{function}: {name} must be known on the host, not on the device.")
        elif isinstance(value, (list, tuple)) and name not in _SEQUENCE_PARAMETERS:
            raise TypeError(f"cupy.{function}: {name} must not be a {type(value).__name__}.")
    return bound


def _check_reduction(name: str, array: Any, bound: inspect.BoundArguments) -> None:
    """Require an `out` of the result's dtype: NumPy reduces in the dtype of `out`, and CuPy in that of the input."""
    out, dtype = bound.arguments.get("out"), bound.arguments.get("dtype")
    if name not in _REDUCTIONS or dtype is not None or not isinstance(out, StrictArray):
        return
    natural = getattr(numpy, name)(numpy.ones(1, dtype=array.dtype)).dtype
    if out.dtype != natural:
        raise StrictError(
            f"{name}: out is {out.dtype}, but CuPy computes in {natural} and NumPy does not. Give dtype=."
        )
