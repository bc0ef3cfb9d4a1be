"""Attributes: what a captured step depends on: the model, the loss, the optimizer and the metrics.

User code may compute with whatever it can reach: attributes and what is in them, class attributes, variables of
enclosing functions, and globals. `Reached` finds these, tells whether they were changed, and changes them back.
"""

import functools
import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy

from xpnet.backends import Backend
from xpnet.capture.calls import is_array
from xpnet.config import is_custom
from xpnet.errors import CaptureError
from xpnet.training.audit import every_layer
from xpnet.training.step import TrainingStep

#: Attributes that passes set, and those for which steps of different kinds are captured.
_IGNORED = frozenset(("_trainable", "_workspaces", "trainable", "wants_input_grad"))
_METHODS = ("forward", "backward", "_run_forward", "_run_backward")  # which a trace replaces by its own
_MOST = 20_000  # objects that the code of users may reach in a captured step
_LEAVES = (bool, int, float, complex, str, bytes, range, slice, type(None), type(...), BuiltinFunctionType, ModuleType)
_OF_LIBRARIES = frozenset(("xpnet", "numpy", "cupy", "numba", *sys.stdlib_module_names))

#: The array attributes that each step replaces before it reads them, by step: (id of the object, name).
_replaced: "weakref.WeakKeyDictionary[TrainingStep, set[tuple[int, str]]]" = weakref.WeakKeyDictionary()


class Attributes:
    """The attributes of everything that takes part in a step, as they were at one time.

    live: whether to leave out what each replay reads anew: schedules, and a custom optimizer.  arrays: whether to
    compare attributes that are arrays, by identity: what is in them is read anew in each replay.  traced: as in
    `Reached`.
    """

    def __init__(self, step: TrainingStep, live: bool = True, arrays: bool = True, traced: bool = True) -> None:
        on_gpu = not step.model.backend.replays_calls  # where a graph keeps the arrays that it was captured with
        self._arrays, self._replaced = arrays and not on_gpu, _replaced.setdefault(step, set())
        optimizer = step.state.optimizer
        self._ignored = _IGNORED | {"learning_rate"} if live else _IGNORED
        things, self._context = things_of(step), step.model.context
        self._seed = self._context.seed
        if live and is_custom(type(optimizer)) and not on_gpu:
            things = [thing for thing in things if thing is not optimizer]
        self._things = [(thing, dict(self._constants(thing))) for thing in things]
        roots = (
            value
            for thing, attributes in self._things
            for value in (*([type(thing)] if is_custom(type(thing)) else ()), *attributes.values())
            if is_custom(type(thing)) or isinstance(value, FunctionType) or _is_of_user(type(value))
        )
        self.reached = Reached(roots, known=things_of(step), traced=traced and not (live and on_gpu))

    def changed(self) -> str | None:
        """The name of an attribute that has another value now, or None."""
        for thing, before in self._things:
            now = vars(thing)
            for name, value in before.items():
                current = _untraced(now.get(name))
                if current is not value and not _equal(current, value):
                    return f"the attribute {name!r} of {type(thing).__name__}"
            if any(name not in before for name, _ in self._constants(thing)):
                return f"a new attribute of {type(thing).__name__}"
        return "the seed" if self._context.seed != self._seed else self.reached.changed()

    def _constants(self, thing: Any) -> Iterator[tuple[str, Any]]:
        compared = self._arrays and is_custom(type(thing))
        for name, attribute in vars(thing).items():
            value = _untraced(attribute)
            if name in self._ignored or (value is None and name in _METHODS):
                continue
            if holds_array(value) and not (compared and (id(thing), name) not in self._replaced):
                continue
            yield name, value


def things_of(step: TrainingStep) -> list[Any]:
    """Everything that takes part in a step, and whose attributes it may use."""
    state = step.state
    parameters = step.model.context.store.parameters
    return [*every_layer(step.model), *parameters, step.loss, state.optimizer, *state.metrics]


def replaced_by(step: TrainingStep, thing: Any, name: str) -> None:
    """Each step replaces this attribute, an array or arrays, before it reads it."""
    _replaced.setdefault(step, set()).add((id(thing), name))


def _untraced(value: Any) -> Any:
    """A method of a layer, in place of the one that names its calls in a trace; None if the class defines it."""
    return getattr(value, "untraced", value)


class Reached:
    """What can be reached from some objects and be changed, as it was at one time."""

    def __init__(self, roots: Iterable[Any], known: Iterable[Any], traced: bool) -> None:
        """known: objects to leave out.  traced: whether to raise CaptureError for what prevents a trace of the step.

        On a GPU, a step that cannot be traced is captured as it runs. Its arrays are then part of the graph, so their
        contents do not matter.
        """
        self._traced = traced
        #: For each: the object, a function that returns its contents, these contents, and a function that sets them.
        self._contents: list[tuple[Any, Callable[[], Any], Any, Callable[[Any], object]]] = []
        self._seen: dict[int, Any] = {id(thing): thing for thing in known}
        waiting = list(roots)
        while waiting:
            value = waiting.pop()
            if isinstance(value, _LEAVES) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            if len(self._seen) > _MOST and traced:
                raise CaptureError("the user's code can reach too many objects to see whether it changes them")
            waiting.extend(self._enter(value))

    def changed(self) -> str | None:
        """The type of an object that has other contents now, or None."""
        for thing, contents, before, _ in self._contents:
            if not _same(contents(), before):
                kind = type(thing).__name__
                return f"the variables of {thing.__name__}" if isinstance(thing, FunctionType | type) else f"a {kind}"
        return None

    def restore(self) -> None:
        """Set the contents that have changed to what they were."""
        for _, contents, before, set_contents in self._contents:
            if not _same(contents(), before):
                set_contents(before)

    def _add(self, thing: Any, contents: Callable[[], Any], set_contents: Callable[[Any], object]) -> Any:
        before = contents()
        self._contents.append((thing, contents, before, set_contents))
        return before

    def _enter(self, value: Any) -> Iterable[Any]:
        """Note the contents of an object, and return what is in it."""
        if isinstance(value, numpy.ndarray):
            if not value.dtype.hasobject:
                self._add(value, value.copy, functools.partial(_write, value))
            return ()
        if isinstance(value, Backend):
            return ()
        if hasattr(value, "dtype") and hasattr(value, "strides"):
            if self._traced and hasattr(value, "__cuda_array_interface__"):
                self._add(value, value.copy, functools.partial(_write, value))
            return ()
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
            return self._enter_object(value)
        if isinstance(value, tuple | frozenset):
            return value
        if isinstance(value, list | deque):
            return list(self._add(value, lambda: list(value), functools.partial(_fill, value)))
        if isinstance(value, set | bytearray):
            return list(self._add(value, value.copy, functools.partial(_fill, value)))
        if isinstance(value, dict):
            return list(self._add(value, lambda: dict(value), functools.partial(_fill, value)).values())
        if isinstance(value, FunctionType):
            return self._enter_function(value) if _is_of_user(value) else ()
        if isinstance(value, MethodType):
            return (value.__self__, value.__func__)
        if isinstance(value, functools.partial):
            return (value.func, value.args, value.keywords)
        if isinstance(value, staticmethod | classmethod):
            return (value.__func__,)
        if isinstance(value, property):
            return (value.fget, value.fset)
        if isinstance(value, type):
            return self._enter_class(value) if _is_of_user(value) else ()
        if hasattr(type(value), "__next__") and self._traced:
            kind = type(value).__name__
            raise CaptureError(f"the user's code can reach an iterator ({kind}), which steps may advance")
        if isinstance(value, SimpleNamespace) or _is_of_user(type(value)):
            return (type(value), *self._enter_object(value))
        return ()

    def _enter_object(self, value: Any) -> Iterable[Any]:
        own = getattr(value, "__dict__", None)
        found: list[Any] = [] if own is None else [own]
        for kind in filter(_is_of_user, type(value).__mro__):
            for name, member in vars(kind).items():
                if type(member) is MemberDescriptorType and name[:2] != "__":
                    contents, fill = (
                        functools.partial(_slot, member, value),
                        functools.partial(_fill_slot, member, value),
                    )
                    found += self._add(value, contents, fill)
        return found

    def _enter_class(self, kind: type) -> Iterable[Any]:
        def contents() -> dict[str, Any]:
            return {name: value for name, value in vars(kind).items() if name[:2] != "__" or name == "__call__"}

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
            member = type(cell).cell_contents
            contents, fill = functools.partial(_slot, member, cell), functools.partial(_fill_slot, member, cell)
            found += self._add(function, contents, fill)
        names, variables = set(_names(function.__code__)), function.__globals__
        for module in [variables, *(vars(m) for n in names if isinstance(m := variables.get(n), ModuleType))]:
            if module is not variables and module.get("__name__", "").partition(".")[0] in _OF_LIBRARIES:
                continue
            used = [name for name in names if name in module]
            found += self._add(
                function, functools.partial(_variables, module, used), functools.partial(_fill_variables, module, used)
            )
        return found


def _slot(descriptor: Any, owner: Any) -> list[Any]:
    """What a slot or a cell holds, as a list of one; [] if it is empty."""
    try:
        return [descriptor.__get__(owner, type(owner))]
    except (AttributeError, ValueError):
        return []


def _write(array: Any, old: Any) -> None:
    array[...] = old


def _set_state(bits: Any, state: Any, _: Any) -> None:
    bits.state = state


def _fill(value: Any, old: Any) -> None:
    value.clear()
    (value.update if isinstance(value, set | dict) else value.extend)(old)


def _fill_slot(member: Any, thing: Any, old: list[Any]) -> None:
    if old:
        member.__set__(thing, old[0])


def _fill_variables(variables: dict[str, Any], names: list[str], old: list[Any]) -> None:
    variables.update(zip(names, old, strict=True))


def _variables(variables: dict[str, Any], names: list[str]) -> list[Any]:
    return [variables.get(name) for name in names]


def _names(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes in the code of a function, and of the functions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_of_user(thing: Any) -> bool:
    """Whether a class or a function is not part of xpnet, of Python or of its array modules."""
    return (thing.__module__ or "").partition(".")[0] not in _OF_LIBRARIES


def _same(a: Any, b: Any) -> bool:
    """Whether contents are the same: the same objects, equal numbers and texts, or the bits of an array."""
    if isinstance(a, numpy.ndarray):
        return bool(a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes())
    if hasattr(a, "__cuda_array_interface__"):
        return bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same_item, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(map(_same_item, a.values(), map(b.__getitem__, a)))
    return bool(a == b)  # of sets, texts, and states of generators


def _same_item(a: Any, b: Any) -> bool:
    return a is b or _equal(a, b)


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same_item, a, b))
    return bool(isinstance(a, bool | int | float | str | numpy.generic) and repr(a) == repr(b))


def holds_array(value: Any) -> bool:
    """Whether this is an array or a number of the array module, or a list, tuple or dictionary with one in it."""
    items: Iterable[Any] = [value]
    if isinstance(value, list | tuple):
        items = value
    elif isinstance(value, dict):
        items = value.values()
    return any(map(is_array_or_number, items))


def is_array_or_number(value: Any) -> bool:
    """Whether this is an array or a number of the array module."""
    return is_array(value) or isinstance(value, numpy.generic)
