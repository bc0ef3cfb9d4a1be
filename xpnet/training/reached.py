"""Reached: what user code can reach and change, besides the arrays of the model.

User code may compute with whatever it can reach: attributes and what is in them, class attributes, variables of
enclosing functions, and globals. `Reached` finds these, tells whether they have changed, and changes them back.
"""

import datetime
import decimal
import dis
import functools
import logging
import pathlib
import random
import re
import struct
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType, MappingProxyType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy

from xpnet.backends import Backend
from xpnet.capture.calls import is_array
from xpnet.config import Configured, is_custom
from xpnet.errors import CaptureError

#: Attributes that passes set, and those that distinguish one kind of step from another.
IGNORED = frozenset(("_shared_copies", "_trainable", "_workspaces", "trainable", "wants_input_grad"))
_MOST_OBJECTS = 20_000  # that user code may reach in a captured step
_MOST_BYTES = 2**20  # of arrays that it may reach: comparing them takes about 50 µs
#: Types of objects that cannot change, or whose changes do not matter.
_LEAVES = (
    bool, int, float, complex, str, bytes, range, slice, type(None), type(...), type(NotImplemented), CodeType,
    numpy.generic, numpy.dtype, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo,
    re.Pattern, pathlib.PurePath, logging.Logger, weakref.ref, type(threading.Lock()), type(threading.RLock()),
)  # fmt: skip
#: Attributes of functions and descriptors that are not written in Python: what they consist of.
_PARTS = ("__self__", "__func__", "__wrapped__", "func", "args", "keywords", "fget", "fset")
_SHARED_RANDOMNESS: Any = (random.random, numpy.random.random)  # `PythonState` compares the numbers that these draw
#: How to copy the items of containers, which `_fill` puts back.
_COPIES: dict[type, Callable[[Any], Any]] = {list: list, deque: list, set: set, bytearray: bytes, dict: dict}
_LIBRARIES = frozenset(("xpnet", "numpy", "cupy", "numba", *sys.stdlib_module_names))


class _Entered(NamedTuple):
    """An object, and what it held when it was entered.

    contents: returns what it holds now.  set_contents: makes it hold what it is given.
    """

    thing: Any
    contents: Callable[[], Any]
    before: Any
    set_contents: Callable[[Any], object]

    def is_changed(self) -> bool:
        return not _same(self.contents(), self.before)


class Reached:
    """What can be reached from some objects and be changed, as it was at one time."""

    def __init__(self, roots: Iterable[Any], kept: Iterable[Any], known: Iterable[Any], traced: bool) -> None:
        """roots: where to start.  kept: attributes to start from too, but replays read anew what their arrays contain.

        known: objects of the step, which are not entered.  traced: whether the step is to be traced. Then anything that
        prevents this raises CaptureError.

        On a GPU, a step that cannot be traced is captured as it runs. Its arrays are then part of the graph, so their
        contents need not be compared.
        """
        self._traced, self._bytes = traced, 0
        self._entered: list[_Entered] = []
        self._known = {id(thing): thing for thing in known}
        self._seen: dict[int, Any] = {id(f.__self__): f for f in _SHARED_RANDOMNESS} | self._known
        self._waiting = list(roots)
        #: Whether the model, or what belongs to it or to the run, can be reached.
        self.reaches_model = False
        for value in kept:
            if holds_array(value):
                self._enter_kept(value)
            else:
                self._waiting.append(value)
        while self._waiting:
            value = self._waiting.pop()
            self.reaches_model |= id(value) in self._known
            if self._is_new(value):
                self._waiting.extend(self._enter(value))

    def _is_new(self, value: Any) -> bool:
        """Whether to enter an object: it can change, and has not been entered before."""
        if isinstance(value, _LEAVES) or id(value) in self._seen:
            return False
        self._seen[id(value)] = value
        if len(self._seen) > _MOST_OBJECTS and self._traced:
            raise CaptureError("the user's code can reach too many objects to see whether it changes them")
        return True

    def _enter_kept(self, value: Any) -> None:
        """Enter an attribute that is or holds an array, except the arrays: `KeptArrays` traces these."""
        if type(value) in (list, tuple, dict):
            for item in self._enter(value) if self._is_new(value) else ():
                self._enter_kept(item)
        elif not is_array_or_number(value):
            self._waiting.append(value)

    def changed(self) -> str | None:
        """A description of an object that has other contents now, or None."""
        thing = next((entered.thing for entered in self._entered if entered.is_changed()), None)
        if isinstance(thing, FunctionType | type):
            return f"the variables of {thing.__name__}"
        return None if thing is None else f"an object of type {type(thing).__name__}"

    def restore(self) -> None:
        """Set the contents that have changed to what they were."""
        for entered in self._entered:
            if entered.is_changed():
                entered.set_contents(entered.before)

    def _add(self, thing: Any, contents: Callable[[], Any], set_contents: Callable[[Any], object]) -> Any:
        """Note the contents of an object, and return them."""
        before = contents()
        self._entered.append(_Entered(thing, contents, before, set_contents))
        return before

    def _enter(self, value: Any) -> Iterable[Any]:
        """Note the contents of an object, and return what is in it."""
        if isinstance(value, type):
            return self._enter_class(value) if _is_of_user(value) else ()
        if isinstance(value, numpy.ndarray) or hasattr(value, "__cuda_array_interface__"):
            return self._enter_array(value)
        if isinstance(value, numpy.random.Generator):
            bits = value.bit_generator
            self._add(value, lambda: repr(bits.state), functools.partial(_set_state, bits, bits.state))
            return ()
        if isinstance(value, numpy.random.RandomState):
            state = value.get_state()
            self._add(value, lambda: repr(value.get_state(legacy=False)), lambda _: value.set_state(state))
            return ()
        if isinstance(value, random.Random):
            self._add(value, value.getstate, value.setstate)
            return self._enter_attributes(value)
        if isinstance(value, tuple | frozenset):
            return (*value, *self._enter_attributes(value))
        for kind, copy in _COPIES.items():
            if isinstance(value, kind):
                items = self._add(value, functools.partial(copy, value), functools.partial(_fill, value))
                return (*(items.values() if kind is dict else items), *self._enter_attributes(value))
        if isinstance(value, MappingProxyType):
            return list(self._add(value, lambda: dict(value), lambda _: None).values())
        if isinstance(value, FunctionType):
            return self._enter_function(value) if _is_of_user(value) else ()
        if isinstance(value, ModuleType):
            return self._enter_variables(value, vars(value), [name for name in vars(value) if name[:2] != "__"])
        return self._enter_object(value)

    def _enter_array(self, array: Any) -> Iterable[Any]:
        on_gpu = not isinstance(array, numpy.ndarray)
        if on_gpu and not self._traced:
            return ()
        if not on_gpu and not array.flags.writeable:
            return (array.base,) if isinstance(array.base, numpy.ndarray) else ()
        if array.dtype.hasobject:
            return self._refuse("an array of objects, whose contents cannot be compared")
        self._bytes += array.nbytes
        if self._bytes > _MOST_BYTES and self._traced:
            raise CaptureError(
                "the user's code can reach too many bytes of arrays to see whether it changes them; "
                "they may be read-only (array.flags.writeable = False), or attributes of the layer"
            )
        self._entered.append(_Entered(array, lambda: array, array.copy(), functools.partial(array.__setitem__, ...)))
        return ()

    def _enter_object(self, value: Any) -> Iterable[Any]:
        kind = type(value)
        if isinstance(value, Backend) or not is_custom(kind):
            if isinstance(value, Configured):
                return self._enter_configured(value)
            self.reaches_model = True
            return ()
        if hasattr(kind, "__next__"):
            return self._refuse(f"an iterator ({kind.__name__}), which steps may advance")
        if not _hides_state(kind):
            return (kind, *self._enter_attributes(value))
        if callable(value) or hasattr(kind, "__get__"):
            parts = [getattr(value, name, None) for name in _PARTS]
            return [part for part in parts if not isinstance(part, ModuleType)]
        return self._refuse(f"an object ({kind.__name__}) whose contents cannot be compared")

    def _refuse(self, what: str) -> Iterable[Any]:
        if self._traced:
            raise CaptureError(f"the user's code can reach {what}")
        return ()

    def _enter_attributes(self, value: Any) -> Iterable[Any]:
        if type(value).__module__ == "builtins":
            return ()
        own, found = getattr(value, "__dict__", None), list[Any]()
        if own is not None and self._is_new(own):
            found += self._add(value, lambda: dict(own), functools.partial(_fill, own)).values()
        for member in _slots(type(value)):
            found += self._enter_slot(value, member, value)
        return found

    def _enter_slot(self, thing: Any, member: Any, owner: Any) -> Iterable[Any]:
        """Enter a slot of an object, or a cell of a function. owner: the object or the cell."""
        contents, fill = (functools.partial(f, member, owner) for f in (_slot, _fill_slot))
        found: list[Any] = self._add(thing, contents, fill)
        return found

    def _enter_configured(self, value: Any) -> Iterable[Any]:
        def contents() -> dict[str, Any]:
            return {name: attribute for name, attribute in vars(value).items() if name not in IGNORED}

        def set_contents(old: dict[str, Any]) -> None:
            for name in contents().keys() - old.keys():
                del vars(value)[name]
            vars(value).update(old)

        return list(self._add(value, contents, set_contents).values())

    def _enter_class(self, kind: type) -> Iterable[Any]:
        def contents() -> dict[str, Any]:
            own = vars(kind).items()
            return {name: v for name, v in own if name == "__call__" or (name[:2] != "__" and name != "_abc_impl")}

        def set_contents(old: dict[str, Any]) -> None:
            for name in contents().keys() - old.keys():
                delattr(kind, name)
            for name, value in old.items():
                setattr(kind, name, value)

        found = self._add(kind, contents, set_contents)
        return (*kind.__mro__[1:], *found.values())

    def _enter_function(self, function: Any) -> Iterable[Any]:
        found: list[Any] = [function.__defaults__, function.__kwdefaults__, function.__dict__]
        for cell in function.__closure__ or ():
            found += self._enter_slot(function, type(cell).cell_contents, cell)
        for variables, names in _namespaces(function):
            used = self._enter_variables(function, variables, [name for name in names if name in variables])
            found += [value for value in used if not isinstance(value, ModuleType)]
        return found

    def _enter_variables(self, owner: Any, variables: dict[str, Any], names: list[str]) -> Iterable[Any]:
        if _is_of_library(variables.get("__name__")):
            return ()
        contents, fill = (functools.partial(f, variables, names) for f in (_variables, _fill_variables))
        values: list[Any] = self._add(owner, contents, fill)
        return values


def _slots(kind: type) -> list[MemberDescriptorType]:
    """The slots of the objects of a class."""
    return [
        member
        for base in kind.__mro__
        for name, member in vars(base).items()
        if type(member) is MemberDescriptorType and name[:2] != "__"
    ]


def _hides_state(kind: type) -> bool:
    """Whether objects of a class are larger than their attributes need: then a class written in C keeps state there."""
    pointers = (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0) + len(_slots(kind))
    return kind.__itemsize__ > 0 or kind.__basicsize__ > object.__basicsize__ + pointers * struct.calcsize("P")


def _namespaces(function: FunctionType) -> list[tuple[dict[str, Any], set[str]]]:
    """The variables of the modules that a function uses, each with the names that it may use there."""
    variables, names = function.__globals__, _names(function.__code__)
    parts = str(variables.get("__package__") or "").split(".")
    packages = ["", *(".".join(parts[: i + 1]) + "." for i in range(len(parts)) if parts[0])]
    waiting = [sys.modules.get(f"{package}{name}") for package in packages for name in names.imports]
    waiting += [variables.get(name) for name in names.globals]
    found = {id(variables): (variables, names.globals)}
    while waiting:
        module = waiting.pop()
        if isinstance(module, ModuleType) and _is_of_user(module) and id(vars(module)) not in found:
            found[id(vars(module))] = vars(module), names.all
            waiting += [vars(module).get(name) for name in names.all]
    return list(found.values())


class _Names(NamedTuple):
    """The names in the code of a function and of the functions in it: all, those of globals, those after `import`."""

    all: set[str]
    globals: set[str]
    imports: set[str]


@functools.lru_cache(4096)
def _names(code: CodeType) -> _Names:
    found = _Names(set(code.co_names), set(), set())
    for instruction in dis.get_instructions(code):
        if "GLOBAL" in instruction.opname or instruction.opname == "LOAD_NAME":
            found.globals.add(instruction.argval)
        elif instruction.opname in ("IMPORT_NAME", "IMPORT_FROM"):
            found.imports.add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for names, more in zip(found, _names(inner), strict=True):
                names |= more
    return found


def _slot(member: Any, owner: Any) -> list[Any]:
    """What a slot or a cell holds, as a list of one; [] if it is empty."""
    try:
        return [member.__get__(owner, type(owner))]
    except (AttributeError, ValueError):
        return []


def _set_state(bits: Any, state: Any, _: Any) -> None:
    bits.state = state


def _fill(value: Any, old: Any) -> None:
    value.clear()
    (value.update if isinstance(value, set | dict) else value.extend)(old)


def _fill_slot(member: Any, owner: Any, old: list[Any]) -> None:
    if old:
        member.__set__(owner, old[0])


def _variables(variables: dict[str, Any], names: list[str]) -> list[Any]:
    return [variables.get(name) for name in names]


def _fill_variables(variables: dict[str, Any], names: list[str], old: list[Any]) -> None:
    variables.update(zip(names, old, strict=True))


def _is_of_user(thing: Any) -> bool:
    """Whether a class, a function or a module is not part of xpnet, of Python or of an array module."""
    return not _is_of_library(thing.__name__ if isinstance(thing, ModuleType) else thing.__module__)


def _is_of_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


def may_run(value: Any) -> bool:
    """Whether an attribute is code of the user, or an object that may run such code."""
    if isinstance(value, _LEAVES):
        return False
    if isinstance(value, MethodType | functools.partial):
        return may_run(value.__func__ if isinstance(value, MethodType) else value.func)
    return _is_of_user(value if isinstance(value, FunctionType) else type(value)) and not isinstance(value, Backend)


def _same(a: Any, b: Any) -> bool:
    """Whether contents are the same: the same objects, equal numbers and strings, or arrays with the same bits."""
    if isinstance(a, numpy.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and numpy.array_equal(_bytes_of(a), _bytes_of(b))
    if hasattr(a, "__cuda_array_interface__"):
        return bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_item, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(map(same_item, a.values(), map(b.__getitem__, a)))
    return bool(a == b)  # sets, strings, bytes, and states of generators


def _bytes_of(array: Any) -> Any:
    """The bytes of an array, in place if it is contiguous."""
    return numpy.ascontiguousarray(array).reshape(-1).view("uint8")


def same_item(a: Any, b: Any) -> bool:
    return a is b or _equal(a, b)


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same_item, a, b))
    return bool(isinstance(a, bool | int | float | str | numpy.generic) and repr(a) == repr(b))


def holds_array(value: Any) -> bool:
    """Whether this is an array or a number of the array module, or a list, tuple or dictionary with one in it.

    Subclasses of these, such as named tuples, do not count: they are compared like all other objects.
    """
    items: Iterable[Any] = [value]
    if type(value) in (list, tuple):
        items = value
    elif type(value) is dict:
        items = value.values()
    return any(map(is_array_or_number, items))


def is_array_or_number(value: Any) -> bool:
    """Whether this is an array or a number of the array module."""
    return is_array(value) or isinstance(value, numpy.generic)
