"""One or several: models and layers with one input take an array, those with several a list or tuple of arrays."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

#: The sizes of an array, without the batch.
Shape: TypeAlias = tuple[int, ...]
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


def as_list(values: Any) -> Any:
    """Several values as a list, as users get them; a single value unchanged."""
    return list(values) if isinstance(values, tuple) else values


def shapes_of(shape: Any) -> list[Shape]:
    """The shapes of the inputs or outputs of a layer: it has a list of them if there are several, or else one shape."""
    return shape if isinstance(shape, list) else [shape]


def first_of(values: Any) -> Any:
    """The first of several values, or the single one."""
    return values[0] if isinstance(values, list | tuple) else values
