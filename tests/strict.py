"""A backend that computes with NumPy and refuses what CuPy refuses, so that GPU mistakes show where there is no GPU.

`StrictBackend().xp` has the names and keywords that data/cupy_api.json recorded from a real CuPy. Its arrays hold NumPy
arrays but are none: they convert to nothing by themselves, and whatever on a GPU would wait for the device is counted
in `host_reads`. What CuPy refuses raises what CuPy raises (TypeError, AttributeError, …); what CuPy would silently do
otherwise than meant (mix devices, copy behind your back, leave a result undefined) raises StrictError.

Results are NumPy's, bit for bit, with two exceptions that are CuPy's: indices out of range wrap, and nothing warns.
"""

import builtins
import functools
import inspect
import json
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy

from xpnet.backends import Backend
from xpnet.backends.cpu import to_host

API: dict[str, Any] = json.loads(Path(__file__).with_name("data").joinpath("cupy_api.json").read_text(encoding="utf-8"))

_DTYPES = "?bBhHiIlLqQefdFD"
_SCALARS = (bool, int, float, complex, numpy.generic)

# Parameters that take host numbers, one or several, and never an array.
_HOST_PARAMETERS = frozenset(
    "shape newshape new_shape dimensions axis axes axis1 axis2 source destination start stop step num N M n k reps "
    "repeats pad_width shift indices_or_sections dims".split()
)
# Parameters that take several arrays in a tuple or list.
_SEQUENCE_PARAMETERS = frozenset("tup arrays arys seq operands args xi condlist choicelist arrays_and_dtypes".split())
# Functions whose first argument needs not be a device array.
_UPLOADS = frozenset("array asarray asanyarray ascontiguousarray asfortranarray".split())
_CREATORS = frozenset("arange empty eye full identity indices linspace logspace ones tri tril_indices triu_indices zeros".split())
_INQUIRIES = frozenset("can_cast iscomplexobj isfortran isrealobj isscalar may_share_memory min_scalar_type ndim".split())
_INQUIRIES |= frozenset("result_type shape shares_memory size".split())
# Functions that treat their arguments otherwise in CuPy than in NumPy, and that nobody has needed yet.
_NOT_MODELLED = frozenset(
    "apply_along_axis apply_over_axes choose fromfunction load piecewise place put put_along_axis putmask "
    "ravel_multi_index save savetxt savez savez_compressed select".split()
)
# NumPy reduces in the dtype of `out`, CuPy in that of the input: they agree where `out` has the dtype of the result.
_REDUCTIONS = frozenset("amax amin cumprod cumsum max mean min nanmax nanmin nansum prod ptp std sum trace var".split())
# The third positional argument is `dtype` in CuPy and `out` in NumPy.
_ARGUMENTS_OF_INDEX = frozenset("argmax argmin nanargmax nanargmin".split())
_READING_METHODS = frozenset("nonzero compress".split())


class StrictError(AssertionError):
    """On a GPU this would not fail, but do something else than was meant."""


@functools.cache
def signature(parameters: str) -> inspect.Signature:
    """The signature that the recorded text stands for: "a, axis=..., out=..."."""
    return inspect.signature(eval(f"lambda {parameters}: None"))


# The backend -------------------------------------------------------------------------------------------------------


class StrictBackend(Backend):
    """`device` numbers a pretended GPU. As with CuPy, device 0 is current until a `with backend.device()`."""

    _all: weakref.WeakValueDictionary[int, "StrictBackend"] = weakref.WeakValueDictionary()

    def __init__(self, device: int = 0) -> None:
        super().__init__(f"strict:{device}" if device else "strict", StrictModule(self))
        self.index = device
        #: How often the host had to wait for the device's answer.
        self.host_reads = 0
        #: The dtypes of all arrays of more than one element that the last `watch_dtypes` saw.
        self.seen_dtypes: set[numpy.dtype[Any]] = set()
        self._watching = False
        self._reads_forbidden = False
        self._all[id(self)] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return _same_backend, (id(self), self.index)

    def asarray(self, a: Any, dtype: Any = None) -> "StrictArray":
        with self.device():
            if isinstance(a, StrictArray) and a._backend is self:
                return self.xp.asarray(a, dtype=dtype)  # type: ignore[no-any-return]
            host = a._values if isinstance(a, StrictArray) else numpy.asarray(to_host(a))
            return StrictArray(self, numpy.array(host, dtype=dtype))

    def to_numpy(self, a: Any) -> numpy.ndarray[Any, Any]:
        return a.get() if isinstance(a, StrictArray) else numpy.asarray(to_host(a))

    @contextmanager
    def device(self) -> Iterator[None]:  # type: ignore[override]
        before, _current.device = _current.device, self.index
        try:
            yield
        finally:
            _current.device = before

    @contextmanager
    def no_host_reads(self) -> Iterator[None]:
        """Inside, the first call that would wait for the device raises AssertionError on the spot."""
        before, self._reads_forbidden = self._reads_forbidden, True
        try:
            yield
        finally:
            self._reads_forbidden = before

    @contextmanager
    def watch_dtypes(self) -> Iterator[set[numpy.dtype[Any]]]:
        """Collects the dtype of every array of more than one element that is made inside; see also `seen_dtypes`."""
        self.seen_dtypes = set()
        before, self._watching = self._watching, True
        try:
            yield self.seen_dtypes
        finally:
            self._watching = before

    def read(self, what: str) -> None:
        """Count one wait for the device."""
        if self._reads_forbidden:
            raise AssertionError(f"{what} reads a device array back to the host, and waits for the device.")
        self.host_reads += 1

    def compute(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function` on the NumPy arrays inside `args` and `kwargs`; what it returns becomes device arrays again."""
        if _current.device != self.index:
            raise StrictError(
                f"{getattr(function, '__name__', function)} was asked of device {self.index} while device "
                f"{_current.device} is current. Enter `with backend.device():` first."
            )
        inside: dict[int, StrictArray] = {}
        args = tuple(self._unwrap(a, inside) for a in args)
        kwargs = {name: self._unwrap(a, inside) for name, a in kwargs.items()}
        with numpy.errstate(all="ignore"):  # a GPU raises no floating-point warnings
            return self._wrap(function(*args, **kwargs), inside)

    def _unwrap(self, a: Any, inside: dict[int, "StrictArray"]) -> Any:
        if isinstance(a, StrictArray):
            if a._backend.index != self.index:
                raise StrictError(f"an array of device {a._backend.index} met one of device {self.index}: {a.shape}.")
            inside[id(a._values)] = a
            return a._values
        if type(a) in (list, tuple):
            return type(a)(self._unwrap(item, inside) for item in a)
        return a

    def _wrap(self, a: Any, inside: dict[int, "StrictArray"]) -> Any:
        if isinstance(a, numpy.ndarray):
            return inside.get(id(a)) or StrictArray(self, a)
        if isinstance(a, (*_SCALARS,)):  # CuPy has no scalars: every result is an array
            return StrictArray(self, numpy.asarray(a))
        if isinstance(a, (list, tuple)):
            items = [self._wrap(item, inside) for item in a]
            return type(a)(*items) if hasattr(a, "_fields") else type(a)(items)
        return a


class _CurrentDevice(threading.local):
    device = 0  # in every new thread, as in CUDA


_current = _CurrentDevice()


def _same_backend(key: int, device: int) -> StrictBackend:
    return StrictBackend._all.get(key) or StrictBackend(device)


# The array ---------------------------------------------------------------------------------------------------------


class Flags(NamedTuple):
    """What CuPy's `flags` tell; there is no `writeable`."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool


class Device(NamedTuple):
    id: int


def _implicit() -> NoReturn:
    raise TypeError(
        "Implicit conversion to a NumPy array is not allowed. "
        "Please use `.get()` to construct a NumPy array explicitly."
    )


class StrictArray:
    """A NumPy array behind the interface of cupy.ndarray."""

    __slots__ = ("__weakref__", "_backend", "_values")
    __array_ufunc__ = None  # NumPy's operators and ufuncs leave the field to ours, and theirs raise TypeError
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, backend: StrictBackend, values: numpy.ndarray[Any, Any]) -> None:
        if values.dtype.char not in _DTYPES:
            raise ValueError(f"Unsupported dtype {values.dtype}")
        self._backend = backend
        self._values = values
        if backend._watching and values.size > 1:
            backend.seen_dtypes.add(values.dtype)

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        _implicit()

    def __array_function__(self, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"numpy.{function.__name__} was given a device array. Use `xp`.")

    # What the host knows without asking the device

    shape = property(lambda self: self._values.shape)
    strides = property(lambda self: self._values.strides)
    dtype = property(lambda self: self._values.dtype)
    ndim = property(lambda self: self._values.ndim)
    size = property(lambda self: self._values.size)
    nbytes = property(lambda self: self._values.nbytes)
    itemsize = property(lambda self: self._values.itemsize)
    device = property(lambda self: Device(self._backend.index))
    T = property(lambda self: self._view(self._values.T))
    mT = property(lambda self: self._view(self._values.mT))
    real = property(lambda self: self._view(self._values.real))
    imag = property(lambda self: self._view(self._values.imag))

    @property
    def flags(self) -> Flags:
        flags = self._values.flags
        return Flags(flags.c_contiguous, flags.f_contiguous, flags.owndata)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # So that the library takes it for what it stands for; nobody may follow the pointer.
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (0, False), "version": 3}

    def __len__(self) -> int:
        return len(self._values)

    # What makes the host wait for the device. There is no __index__, as in CuPy.

    def get(self, stream: None = None, order: Any = "C", out: None = None, blocking: bool = True) -> Any:
        self._backend.read("get")
        return self._values.copy(order)

    def _read(self, what: str) -> Any:
        self._backend.read(what)
        return self._values

    def item(self) -> Any:
        return self._read("item").item()

    def tolist(self) -> Any:
        return self._read("tolist").tolist()

    def tobytes(self, order: Any = "C") -> bytes:
        return self._read("tobytes").tobytes(order)  # type: ignore[no-any-return]

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
            # CuPy hands out 0-d views; whoever walks over single numbers wants them on the host.
            self._backend.read("iteration over numbers")
        return (self[i] for i in range(len(self)))

    # Copies

    def __copy__(self) -> "StrictArray":
        return StrictArray(self._backend, self._values.copy())

    def __deepcopy__(self, memo: Any) -> "StrictArray":
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        return StrictArray, (self._backend, self.get(order="A"))

    # Elements

    def __getitem__(self, key: Any) -> "StrictArray":
        index, kind = self._index(key)
        if kind == "b":
            self._backend.read("indexing with a mask")
        picked = self._values[index]
        return self._view(numpy.array(picked) if kind else picked)

    def __setitem__(self, key: Any, value: Any) -> None:
        index, kind = self._index(key)
        if not isinstance(value, (StrictArray, *_SCALARS)):
            raise ValueError(f"a device array takes device arrays and scalars, not {type(value)}")
        if kind == "b":
            self._backend.read("assigning through a mask")
        if kind == "i" and isinstance(value, StrictArray) and value.size > 1:
            targets = numpy.arange(self.size).reshape(self.shape)[index]
            if len(numpy.unique(targets)) < targets.size:
                raise StrictError("an index occurs twice: which of its values is stored is undefined in CuPy.")
        self._backend.compute(operator.setitem, self, index, value)

    def _index(self, key: Any) -> tuple[Any, str]:
        """The index for the NumPy array inside, and "i", "b" or "": what dtype the arrays in it have, if any.

        It ends in an Ellipsis, which makes NumPy return 0-d views instead of scalars.
        """
        items = list(key) if isinstance(key, tuple) else [key]
        index: list[Any] = []
        masks, wrapped = 0, []
        for item in items:
            if isinstance(item, StrictArray):
                item = self._backend.compute(lambda values: [values], item)[0]._values  # checks its device
                if item.dtype.kind == "b":
                    masks += 1
                elif item.dtype.kind in "iu":
                    wrapped.append(len(index))
                else:
                    raise IndexError(f"arrays used as indices must be of integer or boolean type, not {item.dtype}")
            elif isinstance(item, (bool, numpy.bool)) or not (
                item is None or item is Ellipsis or isinstance(item, (int, numpy.integer, slice))
            ):
                raise TypeError(
                    f"a device array is indexed with integers, slices, None, ... and device arrays, not {type(item)}; "
                    "CuPy would upload it, and wait."
                )
            index.append(item)
        if masks > 1 or (masks and wrapped):
            raise IndexError("CuPy takes one boolean array in an index, and no other array beside it")
        if not any(item is Ellipsis for item in index):
            index.append(Ellipsis)
        used = [item.ndim if getattr(item, "dtype", None) == bool else item not in (None, Ellipsis) for item in
                [None if i in wrapped else item for i, item in enumerate(index)]]
        for i in wrapped:
            used[i] = 1
        for i in wrapped:
            before_ellipsis = i < next(j for j, item in enumerate(index) if item is Ellipsis)
            axis = sum(used[:i]) if before_ellipsis else self.ndim - sum(used[i:])
            index[i] = index[i] % self.shape[axis] if index[i].size else index[i].astype(numpy.intp)
        return tuple(index), "b" if masks else "i" if wrapped else ""

    def _view(self, values: numpy.ndarray[Any, Any]) -> "StrictArray":
        return StrictArray(self._backend, values)

    # Methods

    def __getattr__(self, name: str) -> Any:
        methods = API["ndarray"]["methods"]
        if name not in methods:
            raise AttributeError(f"'cupy.ndarray' object has no attribute {name!r}")
        if not hasattr(numpy.ndarray, name) or name in _NOT_MODELLED:
            raise AttributeError(f"cupy.ndarray.{name} is not modelled by the strict stand-in (tests/strict.py)")
        if name in ("take", "dot"):
            return functools.partial(getattr(self._backend.xp, name), self)
        return functools.partial(self._method, name)

    def _method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        bound = _bind(f"ndarray.{name}", API["ndarray"]["methods"][name], args, kwargs)
        _check_reduction(name, self, bound, len(args) + 1)
        if name in _READING_METHODS:
            self._backend.read(name)
        return self._backend.compute(getattr(numpy.ndarray, name), self, *args, **kwargs)

    def __matmul__(self, other: Any) -> Any:
        return self._backend.xp.matmul(self, other)


def _operand(a: Any) -> None:
    if not isinstance(a, (StrictArray, *_SCALARS)):
        raise TypeError(f"Unsupported type {type(a)}: a device array meets only device arrays and scalars.")


def _define_operators() -> None:
    """Give StrictArray the operators of Python, each NumPy's own on the arrays inside."""

    def define(name: str, function: Callable[..., Any], swapped: bool = False) -> None:
        def method(self: StrictArray, *others: Any) -> Any:
            for other in others:
                _operand(other)
            return self._backend.compute(function, *((*others, self) if swapped else (self, *others)))

        method.__name__ = method.__qualname__ = f"__{name}__"
        setattr(StrictArray, method.__name__, method)

    for name in ("neg", "pos", "abs", "invert", "lt", "le", "eq", "ne", "gt", "ge"):
        define(name, getattr(operator, name))
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor"):
        function = getattr(operator, f"__{name}__")
        define(name, function)
        define(f"r{name}", function, swapped=True)
        define(f"i{name}", getattr(operator, f"__i{name}__"))
    define("divmod", builtins.divmod)
    define("rdivmod", builtins.divmod, swapped=True)


_define_operators()


# The module --------------------------------------------------------------------------------------------------------


class StrictModule:
    """What `import cupy as xp` gives, as far as NumPy has it too."""

    ndarray = StrictArray

    def __init__(self, backend: StrictBackend) -> None:
        self._backend = weakref.proxy(backend)

    def __getattr__(self, name: str) -> Any:
        made = self._make(name)
        setattr(self, name, made)
        return made

    def _make(self, name: str) -> Any:
        recorded = (API["functions"], API["ufuncs"], API["same_as_numpy"], API["constants"])
        if name.startswith("_") or not any(name in names for names in (*recorded, API["classes"], API["modules"])):
            raise AttributeError(f"module 'cupy' has no attribute {name!r}")
        if name in _NOT_MODELLED or not any(name in names for names in recorded):
            raise AttributeError(f"cupy.{name} is not modelled by the strict stand-in (tests/strict.py)")
        if not hasattr(numpy, name):
            raise AttributeError(f"cupy.{name} exists, but numpy.{name} does not")
        if name in API["same_as_numpy"] or name in API["constants"]:
            return getattr(numpy, name)
        if name in API["ufuncs"]:
            return StrictUfunc(self._backend, name)
        special = {"matmul": self._product, "dot": self._product, "where": self._where, "take": self._take}
        special |= {"take_along_axis": self._take_along_axis, "empty": self._empty, "empty_like": self._empty}
        return functools.partial(self._upload if name in _UPLOADS else special.get(name, self._call), name)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        bound = _bind(name, API["functions"][name], args, kwargs)
        first = next(iter(bound.arguments.values()), None)
        if name not in _CREATORS | _INQUIRIES and not _holds_device_array(first):
            raise TypeError(f"cupy.{name} works on a device array, not on {type(first)}")
        _check_reduction(name, first, bound, len(args))
        if name in API["synchronises"] and name != "where":
            self._backend.read(name)
        function = getattr(numpy, name)
        if name in _INQUIRIES:  # about what the host knows, answered in Python objects
            inside: dict[int, StrictArray] = {}
            return function(*(self._backend._unwrap(a, inside) for a in args), **kwargs)
        return self._backend.compute(function, *args, **kwargs)

    def _upload(self, name: str, a: Any, *args: Any, **kwargs: Any) -> Any:
        """asarray and its kin: the ways by which host data may enter."""
        if isinstance(a, StrictArray) or (isinstance(a, (list, tuple)) and _holds_device_array(a)):
            return self._call(name, a, *args, **kwargs) if isinstance(a, StrictArray) else self._nested(name, a, args, kwargs)
        _bind(name, API["functions"][name], (None, *args), kwargs)
        made = self._backend.compute(getattr(numpy, name), a, *args, **kwargs)
        if numpy.may_share_memory(made._values, numpy.asarray(a)):
            made = made.copy()
        return made
