"""Checks of arguments; and Configured, which derives get_config, equality and repr from constructor arguments."""

import contextlib
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

import numpy

from xpnet.errors import ArgumentError, ArgumentTypeError, suggestion, unknown_name

__all__ = ["Configured", "as_shape", "choice", "flag", "integer", "is_custom", "is_integer", "is_number",
           "missing_method", "number", "one_or_pair", "resolve"]  # fmt: skip

T = TypeVar("T")
N = TypeVar("N", int, float)


class Configured:
    """An object that keeps every constructor argument as an attribute of the same name.

    `get_config`, equality and repr are derived from these attributes; the repr reads like the call.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        # A NumPy scalar among the arguments would turn float32 arithmetic into float64; a Python number does not.
        super().__setattr__(name, value.item() if isinstance(value, numpy.generic) else value)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, by name."""
        names = inspect.signature(type(self)).parameters
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise ArgumentTypeError(
                f"{type(self).__name__} must keep each constructor argument as an attribute of its name, or define "
                f"get_config; it does not keep {', '.join(missing)}."
            )
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A new object made from what `get_config` returned."""
        starred = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.VAR_POSITIONAL]
        named = {name: value for name, value in config.items() if name not in starred}
        return cls(*(item for name in starred for item in config[name]), **named)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, Configured)
        mine, theirs = self.get_config(), other.get_config()
        return mine.keys() == theirs.keys() and all(_same(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]  # attributes may change, so it cannot be a key of a dict

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self)).parameters
        shown: list[str] = []
        for name, value in self.get_config().items():
            default = parameters[name].default
            if parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
                shown += map(repr, value)
            elif default is inspect.Parameter.empty:
                shown.append(repr(value))
            elif isinstance(value, numpy.ndarray) or value != default:
                shown.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


# Checks. Each returns a Python value, or raises ArgumentError: "Dropout: rate must be a number of at least 0 and
# below 1, not 1.5." `owner` is the object whose argument it is, or its name; "" if the argument's name is enough.
# `also` says in the error what else the argument may be; the caller checks for that first.

#: The limits of numbers: their words in an error, and the comparison of a value with them.
_LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "at_least": ("of at least", operator.ge),
    "above": ("above", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def number(owner: Any, name: str, value: Any, *, finite: bool = False, also: str = "", **limits: float) -> float:
    """A real number within `at_least`, `above`, `at_most` and `below`, as a Python number. Refuses NaN and booleans."""
    if not (is_number(value) and _within(value, limits)) or (finite and math.isinf(value)):
        raise _refusal(owner, name, ("a finite number" if finite else "a number") + _range(limits), value, also)
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def integer(owner: Any, name: str, value: Any, *, at_least: int = 1, also: str = "", **limits: int) -> int:
    """An integer within these limits, as a Python int. 3.0 counts as 3."""
    limits = {"at_least": at_least, **limits}
    if not (is_integer(value) and _within(value, limits)):
        raise _refusal(owner, name, "an integer" + _range(limits), value, also)
    return int(value)


def one_or_pair(check: Callable[..., N], owner: Any, name: str, value: Any, **limits: Any) -> N | tuple[N, N]:
    """What `check`, one of the functions above, accepts within these limits; or (vertical, horizontal), two of them."""
    value = value.tolist() if isinstance(value, numpy.ndarray) else value
    if isinstance(value, tuple | list) and len(value) == 2:
        with contextlib.suppress(ArgumentError):  # the error below shows both
            return check(owner, name, value[0], **limits), check(owner, name, value[1], **limits)
    return check(owner, name, value, also="two, (vertical, horizontal)", **limits)


def as_shape(shape: Any) -> tuple[int, ...]:
    """(4,) from 4, [4] or (4,). Refuses anything but positive integers."""
    sizes = tuple(shape) if hasattr(shape, "__iter__") else (shape,)
    if not all(is_integer(n) and n >= 1 for n in sizes):
        raise _refusal("", "a shape", "one or more positive integers, without the batch", shape)
    return tuple(int(n) for n in sizes)


def flag(owner: Any, name: str, value: Any) -> bool:
    """A Python or NumPy boolean, as a Python bool."""
    if not isinstance(value, bool | numpy.bool_):
        raise _refusal(owner, name, "True or False", value)
    return bool(value)


def choice(owner: Any, name: str, value: Any, options: Sequence[T], *, also: str = "") -> T:
    """One of these strings, or None if it is among them."""
    if isinstance(value, str | None) and value in options:
        return value  # type: ignore[return-value]
    *first, last = [f'"{option}"' if isinstance(option, str) else str(option) for option in options]
    error = _refusal(owner, name, f"{', '.join(first)} or {last}", value, also)
    near = suggestion(value, (o for o in options if isinstance(o, str))) if isinstance(value, str) else ""
    raise ArgumentError(f"{error} {near}".strip())


def is_custom(kind: type) -> bool:
    """Whether a class is not part of xpnet."""
    return kind.__module__.partition(".")[0] != "xpnet"


class _MissingMethodError(ArgumentTypeError, NotImplementedError):
    """An ArgumentTypeError for users, and Python's error for a method that a subclass must define."""


def missing_method(owner: Any, method: str) -> ArgumentTypeError:
    """The error for a subclass that does not define `method`, written with its arguments."""
    return _MissingMethodError(f"{type(owner).__name__} must define {method}.")


def is_number(value: Any) -> bool:
    """Whether this is a real number of Python or NumPy, and not a boolean, an array or NaN."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and bool(value == value)


def is_integer(value: Any) -> bool:
    """Whether this is a real number without a fraction."""
    return is_number(value) and bool(value == value // 1)


def _within(value: Any, limits: Mapping[str, float]) -> bool:
    return all(_LIMITS[name][1](value, limit) for name, limit in limits.items())


def _range(limits: Mapping[str, float]) -> str:
    if limits.keys() == {"at_least", "at_most"}:
        return f" from {limits['at_least']} to {limits['at_most']}"
    return " and".join(f" {_LIMITS[name][0]} {limit}" for name, limit in limits.items())


def _refusal(owner: Any, name: str, expected: str, value: Any, also: str = "") -> ArgumentError:
    kind = owner if isinstance(owner, str) else type(owner).__name__
    place = f"{kind}: " if kind else ""
    return ArgumentError(f"{place}{name} must be {expected}{f', or {also}' if also else ''}, not {value!r}.")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, numpy.ndarray) or isinstance(b, numpy.ndarray):
        return numpy.array_equal(a, b)
    return bool(a == b)


def resolve(kind: str, spec: Any, table: Mapping[str, type[T]], base: type[T]) -> T:
    """`spec` itself if it is a `base`; if it is a string of `table`, a default object of that class."""
    if isinstance(spec, base):
        return spec
    if isinstance(spec, str):
        name = spec.strip().lower().replace("-", "_")
        if name not in table:
            raise unknown_name(kind, spec, table)
        return table[name]()
    if isinstance(spec, type) and issubclass(spec, base):
        raise ArgumentTypeError(f"{kind}: pass an object, {spec.__name__}(...), not the class {spec.__name__}.")
    raise ArgumentTypeError(f"{kind} must be a name ({', '.join(sorted(table))}) or an object, not {spec!r}.")
