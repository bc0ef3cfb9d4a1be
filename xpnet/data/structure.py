"""Structure: the names of a model's inputs and outputs, which put lists and dicts of data in order."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from xpnet.errors import ArgumentError, ArgumentTypeError, unknown_name


def items(value: Any) -> tuple[Any, ...]:
    """A tuple of the arrays that `Structure` returned: only a tuple has several; a list is a single array."""
    return value if isinstance(value, tuple) else (value,)


def each(function: Callable[[Any], Any], value: Any) -> Any:
    """function(value), or for a tuple of several arrays the tuple of the results."""
    return tuple(map(function, value)) if isinstance(value, tuple) else function(value)


class Structure(NamedTuple):
    """The names of the inputs and outputs of a model. By default, of one with a single input and a single output.

    What its methods return is a tuple only if there is something for each of several inputs or outputs.
    """

    inputs: Sequence[str] = ("x",)
    outputs: Sequence[str] = ("y",)

    def of_inputs(self, x: Any, name: str = "x") -> Any:
        """x itself for one input, or its arrays as a tuple. Raises ArgumentError or ArgumentTypeError."""
        return in_order(name, x, self.inputs, "input")

    def has_arrays(self, x: Any) -> bool:
        """Whether x is the array of the input, or the arrays of several, rather than an iterable of batches."""
        several = len(self.inputs) > 1 and isinstance(x, list | tuple)
        return hasattr(x, "shape") or isinstance(x, Mapping) or (several and all(hasattr(a, "shape") for a in x))

    def of_outputs(self, y: Any, name: str = "y") -> Any:
        """y itself for one output, or its arrays as a tuple. Raises ArgumentError or ArgumentTypeError."""
        return in_order(name, y, self.outputs, "output")

    def of_class_weights(self, weights: Any, name: str = "class_weight") -> Any:
        """The class weights of one output, or a tuple with those of each, which may be None. "balanced" is for all."""
        by_name = isinstance(weights, Mapping) and any(isinstance(key, str) for key in weights)
        if by_name or len(self.outputs) == 1:
            return in_order(name, weights, self.outputs, "output", optional=True) if by_name else weights
        if weights is None or isinstance(weights, str):
            return (weights,) * len(self.outputs)
        if isinstance(weights, Mapping):
            first = f"{{{self.outputs[0]!r}: {dict(weights)!r}, …}}"
            raise ArgumentError(f"{name}: the model has several outputs, so give it by output, as in {first}.")
        return in_order(name, weights, self.outputs, "output")

    def of_weights(self, weights: Any, name: str = "sample_weight") -> Any:
        """Weights for all outputs, or a tuple with those of each, which may be None."""
        by_name = isinstance(weights, Mapping)
        several = len(self.outputs) > 1 and isinstance(weights, list | tuple)
        if by_name or (several and any(w is None or hasattr(w, "__len__") for w in weights)):
            return in_order(name, weights, self.outputs, "output", optional=len(weights) > 0)
        return list(weights) if isinstance(weights, tuple) else weights


def in_order(argument: str, value: Any, names: Sequence[str], kind: str, optional: bool = False) -> Any:
    """A tuple of values in the order of the names; the value itself if there is a single name.

    value: a dict by name; or, if there are several names, a list or tuple in their order.  kind: what the names are,
    "input" or "output".  optional: whether names may be missing in the dict; their value is then None.
    """
    several = len(names) > 1
    if isinstance(value, Mapping):
        for name in value:
            if name not in names:
                raise ArgumentError(f"{argument}: {unknown_name(kind, name, names)}")
        if not optional and (missing := [name for name in names if name not in value]):
            raise ArgumentError(f"{argument}: there is nothing for the {kind} {missing[0]!r}. Give {_for_each(names)}.")
        values = tuple(value.get(name) for name in names)
        return values if several else values[0]
    if not several:
        return list(value) if isinstance(value, tuple) else value
    if not isinstance(value, list | tuple):
        given = f"an array of shape {tuple(value.shape)}" if hasattr(value, "shape") else f"{value!r:.80}"
        raise ArgumentTypeError(
            f"{argument}: the model has {len(names)} {kind}s, so give a list or a dict with {_for_each(names)}, not "
            f"{given}."
        )
    if len(value) != len(names):
        raise ArgumentError(
            f"{argument}: the model has {len(names)} {kind}s, but the list has length {len(value)}. Give "
            f"{_for_each(names)}."
        )
    return tuple(value)


def label(argument: str, kind: str, names: Sequence[str], k: int) -> str:
    """What errors call the k-th array of an argument: "x", or "x (input 'image')" if there are several."""
    return f"{argument} ({kind} {names[k]!r})" if len(names) > 1 else argument


def _for_each(names: Sequence[str]) -> str:
    return f"one item for each of {', '.join(map(repr, names))}"
