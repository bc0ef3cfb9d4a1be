"""Objects that are nothing but their constructor's arguments: comparable, printable, found by name."""

import inspect
from collections.abc import Mapping
from typing import Any, Self, TypeVar

import numpy

from xpnet.errors import ArgumentTypeError, unknown_name

T = TypeVar("T")


class Configured:
    """The rule of the house: every constructor argument is kept as an attribute of the same name.

    That gives `get_config`, equality and a repr which reads like the call that made the object.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        # A NumPy scalar among the arguments would lift float32 arithmetic to float64; a Python number never does.
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
        """The object of these arguments, as `get_config` gives them."""
        starred = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.VAR_POSITIONAL]
        named = {name: value for name, value in config.items() if name not in starred}
        return cls(*(item for name in starred for item in config[name]), **named)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, Configured)
        mine, theirs = self.get_config(), other.get_config()
        return mine.keys() == theirs.keys() and all(_same(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]  # the attributes may change, so equality does not make a key

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


def is_number(value: Any) -> bool:
    """Whether this is a real number of Python's or NumPy's: no text, no truth value, no array, no NaN."""
    return (
        isinstance(value, int | float | numpy.integer | numpy.floating)
        and not isinstance(value, bool)
        and value == value
    )


def is_whole(value: Any) -> bool:
    """Whether this is such a number without a fraction."""
    return is_number(value) and value == value // 1


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, numpy.ndarray) or isinstance(b, numpy.ndarray):
        return numpy.array_equal(a, b)
    return bool(a == b)


def resolve(kind: str, spec: Any, table: Mapping[str, type[T]], base: type[T]) -> T:
    """`spec` itself if it is a `base`; the default object of that name if it is a string of `table`."""
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
