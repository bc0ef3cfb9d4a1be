"""State dicts: parameters and buffers by name, checked and then loaded into a model."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy

from xpnet.backends import Array, Backend
from xpnet.data.preparation import as_numbers
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, suggestion
from xpnet.layers.context import Context
from xpnet.parameters import Buffer, Parameter


class LoadedState(NamedTuple):
    """The names that `load_state_dict` left out.

    missing: parameters and buffers of the model that the state does not have; they keep their values.  unused: names of
    the state that the model does not have.
    """

    missing: list[str]
    unused: list[str]


def load_state(context: Context, state: Mapping[str, Any], strict: bool) -> LoadedState:
    """Load arrays by name into the model of this context, as `BaseModel.load_state_dict` describes it."""
    if not isinstance(state, Mapping):
        raise ArgumentTypeError(f"the state must be a dict of arrays by name, not {type(state).__name__}.")
    own = {a.name: a for a in context.store.arrays()}
    missing = [name for name in own if name not in state]
    unused = [str(name) for name in state if name not in own]
    if strict and (missing or unused):
        hint = "".join(f"For {name!r}: {suggestion(name, missing)}" for name in unused[:1] if missing).strip()
        raise ArgumentError(
            f"the state does not fit this model: missing {missing}, unexpected {unused}. {hint} "
            "strict=False loads what fits."
        )
    context.exclusively(_assign, context, [a for name, a in own.items() if name in state], state)
    return LoadedState(missing, unused)


def _assign(context: Context, targets: list[Parameter | Buffer], state: Mapping[str, Any]) -> None:
    context.guard.refuse_beside_training()
    values = [_converted(context.backend, state[target.name], target) for target in targets]
    for target, value in zip(targets, values, strict=True):
        target.value[...] = value


def _converted(backend: Backend, value: Any, target: Parameter | Buffer) -> Array:
    """An array of the state on the device, in the dtype of its target. Refuses other shapes and too large numbers."""
    name, dtype, isfinite = target.name, target.value.dtype, backend.xp.isfinite
    given = as_numbers(backend, value, name)
    if given.shape != target.value.shape:
        raise ShapeError(f"{name} has shape {tuple(target.value.shape)}, but the state's has {tuple(given.shape)}.")
    with numpy.errstate(over="ignore"):
        new = backend.asarray(given, dtype=dtype)
    if given.dtype.kind == "f" and new.dtype != given.dtype and bool((isfinite(given) & ~isfinite(new)).any()):
        raise DataError(f"{name} of the state has numbers that are too large for {new.dtype}.")
    return new
