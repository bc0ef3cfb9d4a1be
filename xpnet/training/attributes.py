"""Attributes: what a captured step takes for granted of the model, the loss, the optimizer and the metrics."""

from collections.abc import Iterator
from typing import Any

from xpnet.training.audit import every_layer
from xpnet.training.step import TrainingStep

#: Attributes that passes set, and those for which steps of different kinds are captured.
_IGNORED = frozenset(("_run_backward", "_run_forward", "_trainable", "_workspaces", "backward", "forward", "trainable",
                      "wants_input_grad"))  # fmt: skip


class Attributes:
    """The attributes of everything that takes part in a step, except arrays, as they were at one time."""

    def __init__(self, step: TrainingStep) -> None:
        state = step.state
        things = [*every_layer(step.model), *step.model.context.store.parameters, step.loss, state.optimizer]
        self._things = [(thing, dict(_constants(thing))) for thing in (*things, *state.metrics)]

    def changed(self) -> str | None:
        """The name of an attribute that has another value now, or None."""
        for thing, before in self._things:
            now = vars(thing)
            for name, value in before.items():
                if now.get(name) is not value and not _equal(now.get(name), value):
                    return f"the attribute {name!r} of {type(thing).__name__}"
            if any(name not in before for name, _ in _constants(thing)):
                return f"a new attribute of {type(thing).__name__}"
        return None


def _constants(thing: Any) -> Iterator[tuple[str, Any]]:
    for name, value in vars(thing).items():
        if name not in _IGNORED and not is_array(value):
            yield name, value


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, bool | int | float | str | tuple) and a == b


def is_array(value: Any) -> bool:
    """Whether this is an array, or a list or tuple with an array in it."""
    items = value if isinstance(value, list | tuple) else [value]
    return any(hasattr(item, "dtype") for item in items)
