"""Helpers for arguments that are one array, or a list or tuple of arrays if there are several inputs or outputs."""

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
    """function(a) for a single value a, or (function(a), function(b)) for (a, b). Further arguments match the first."""
    if isinstance(values[0], list | tuple):
        return tuple(map(function, *values))
    return function(*values)


def as_list(values: Any) -> Any:
    """Several values as a list, as users get them; a single value unchanged."""
    return list(values) if isinstance(values, tuple) else values


def shapes_of(shape: Any) -> list[Shape]:
    """A list of shapes, from the input_shape or output_shape of a layer: one shape, or a list if there are several."""
    return shape if isinstance(shape, list) else [shape]


def first_of(values: Any) -> Any:
    """The first of several values, or the single one."""
    return values[0] if isinstance(values, list | tuple) else values
