"""One or several: models and layers with one input take an array, those with several a list or tuple of arrays."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

#: An array, or a tuple of arrays, one for each of several inputs or outputs.
Arrays: TypeAlias = Any


def as_tuple(values: Any) -> tuple[Any, ...]:
    """(a, b) from [a, b] or (a, b); (a,) from a single value a."""
    return tuple(values) if isinstance(values, list | tuple) else (values,)


def one_or_tuple(values: Sequence[Any]) -> Any:
    """The value itself if there is one, else a tuple of all."""
    return values[0] if len(values) == 1 else tuple(values)


def mapped(function: Callable[..., Any], *values: Any) -> Any:
    """function(a) of a single value, or (function(a), function(b)) of (a, b); of several such arguments in parallel."""
    if isinstance(values[0], list | tuple):
        return tuple(map(function, *values))
    return function(*values)


def first_of(values: Any) -> Any:
    """The first of several values, or the single one."""
    return values[0] if isinstance(values, list | tuple) else values
