"""Side effects: what user code does in a step besides computing with arrays, which no replay would do.

While a step is traced, such effects are refused with SideEffectError, and undone.
"""

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy

from xpnet.capture.calls import memory_of
from xpnet.capture.program import every_call
from xpnet.capture.trace import SideEffectError, Trace, TracedArray
from xpnet.layers.context import Workspace
from xpnet.training.attributes import Attributes, things_of
from xpnet.training.reached import holds_array, is_array_or_number
from xpnet.training.step import TrainingStep


class PythonState:
    """What user code may change in Python during a step, apart from the arrays of the model, as it is now."""

    def __init__(self, step: TrainingStep, attributes: Attributes) -> None:
        self._things = [(thing, dict(vars(thing))) for thing in things_of(step)]
        self._reached = attributes.reached
        #: None if no code of the user takes part in the step: then it is other threads that draw.
        self._randomness = _randomness() if attributes.user_code else None

    def refuse_random_numbers(self) -> None:
        """Raise SideEffectError if random numbers of NumPy or Python were drawn that all code shares."""
        if self._randomness is not None and _randomness() != self._randomness:
            raise SideEffectError("the step draws random numbers that are not the library's")

    def restore(self) -> None:
        """Undo the changes."""
        for thing, own in self._things:
            now = vars(thing)
            now.update(own)  # without a moment in which they are missing, since other threads may read them
            for name in now.keys() - own.keys():
                del now[name]
        self._reached.restore()
        if self._randomness is not None:
            _set_randomness(self._randomness)


@contextlib.contextmanager
def unchanged_python(step: TrainingStep) -> Iterator[None]:
    """A context that undoes what user code changes in Python, apart from the arrays of the model."""
    on_cpu = step.model.backend.replays_calls  # a GPU captures what cannot be traced, too
    python = PythonState(step, Attributes(step, skip_live=False, traced=on_cpu))
    try:
        yield
    finally:
        python.restore()


@contextlib.contextmanager
def refusing_the_outside(things: Sequence[Any]) -> Iterator[None]:
    """A context that raises SideEffectError at its end if user code has printed, used files or read the clock.

    things: the objects whose code is watched, with the functions of Python's standard library that it calls.
    """
    if sys.getprofile() is not None:
        raise SideEffectError("a profiler runs, so that side effects cannot be seen")
    packages, found = {type(thing).__module__.partition(".")[0] for thing in things}, list[str]()
    standard = sys.stdlib_module_names - packages

    def watch(frame: Any, event: str, function: Any) -> None:
        if event != "c_call":
            return
        while frame is not None and _package(frame) in standard:
            frame = frame.f_back
        if frame is not None and _package(frame) in packages:
            owner = getattr(function, "__self__", None)
            kind = owner if isinstance(owner, type) else type(owner)
            modules = (getattr(function, "__module__", None), kind.__module__)
            if function in _OUTSIDE or not _OUTSIDE_MODULES.isdisjoint(modules):
                found.append(function.__name__)

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)
    if found:
        raise SideEffectError(f"each step calls {found[0]}, which a replay would not do")


def _package(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", "").partition(".")[0])


_OUTSIDE = (print, open, input)
_OUTSIDE_MODULES = frozenset(("time", "datetime", "posix", "nt", "io", "_io", "_socket"))


def _randomness() -> tuple[Any, ...]:
    """The states of the random numbers of NumPy and of Python that all code shares."""
    state: Any = numpy.random.get_state(legacy=True)
    name, keys, *rest = state
    return (name, keys.tobytes(), *rest), random.getstate()


def _set_randomness(states: tuple[Any, ...]) -> None:
    (name, keys, *rest), of_python = states
    numpy.random.set_state((name, numpy.frombuffer(keys, "uint32"), *rest))
    random.setstate(of_python)


class OneStepWorkspace(Workspace):
    """The workspace of a custom layer, which must not use what an earlier step kept in it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise SideEffectError(f"a layer asks for work.{name} before the step sets it")


class KeptArrays:
    """The arrays that custom layers, losses and metrics keep as attributes, or in lists, tuples and dictionaries there.

    They are traced, and the step must not write into them.
    """

    def __init__(self, trace: Trace, things: Sequence[Any]) -> None:
        self._trace = trace
        self._kept: list[tuple[Any, str, Any, list[Any], list[TracedArray]]] = []
        for thing in things:
            for name, value in vars(thing).items():
                if name != "_workspaces" and holds_array(value):
                    wrapped: list[TracedArray] = []
                    vars(thing)[name] = traced = self._wrapped(value, wrapped)
                    self._kept.append((thing, name, traced, _contents(traced), wrapped))

    def _wrapped(self, value: Any, found: list[TracedArray]) -> Any:
        if type(value) in (list, tuple):
            return type(value)(self._wrapped(item, found) for item in value)
        if type(value) is dict:
            return {name: self._wrapped(item, found) for name, item in value.items()}
        if isinstance(value, TracedArray) or not is_array_or_number(value):
            return value
        found.append(self._trace.wrap(self._trace.xp.asarray(value)))
        return found[-1]

    def replaced(self) -> Iterator[tuple[Any, str]]:
        """The things and names of arrays that the step has replaced. Raises CaptureError if it has read them before."""
        read = {id(memory_of(a)) for call in every_call(self._trace.calls) for a in call.reads}
        for thing, name, traced, contents, wrapped in self._kept:
            now = vars(thing).get(name)
            found = _contents(now)
            if now is traced and all(a is b for a, b in zip(found, contents, strict=False)):
                continue
            outlines = [[None if hasattr(a, "dtype") else a for a in items] for items in (found, contents)]
            if outlines[0] != outlines[1] or any(id(memory_of(a.values)) in read for a in wrapped):
                raise SideEffectError(f"each step changes the attribute {name!r} of {type(thing).__name__}")
            yield thing, name


def _contents(value: Any) -> list[Any]:
    """What is in nested lists, tuples and dictionaries, and how they are nested."""
    if type(value) in (list, tuple):
        return [type(value), len(value), *(content for item in value for content in _contents(item))]
    if type(value) is dict:
        return [dict, *value, *(content for item in value.values() for content in _contents(item))]
    return [value]
