"""Attributes: those of the layers, parameters, loss, optimizer and metrics, on which a captured step depends."""

import weakref
from collections.abc import Iterator
from typing import Any

from xpnet.config import is_custom
from xpnet.errors import CaptureError
from xpnet.layers.containers import every_layer
from xpnet.training.output_losses import every_loss
from xpnet.training.reached import IGNORED, Reached, holds_array, may_run, same_item
from xpnet.training.step import TrainingStep

_METHODS = ("forward", "backward", "_run_forward", "_run_backward")  # which a trace replaces by its own
#: The array attributes that each step replaces before it reads them, by step: (id of the object, name).
_replaced: "weakref.WeakKeyDictionary[TrainingStep, set[tuple[int, str]]]" = weakref.WeakKeyDictionary()


class Attributes:
    """The attributes of everything that takes part in a step, as they were at one time.

    skip_live: whether to leave out what each replay reads anew: the learning rate, and a custom optimizer.  arrays:
    whether to compare arrays too, by identity, since replays read their elements anew.  traced: as in `Reached`.
    """

    def __init__(self, step: TrainingStep, skip_live: bool = True, arrays: bool = True, traced: bool = True) -> None:
        on_gpu = not step.model.backend.replays_calls  # where a graph keeps the arrays that it was captured with
        self._arrays, self._replaced = arrays and not on_gpu, _replaced.setdefault(step, set())
        optimizer = step.state.optimizer
        self._ignored = IGNORED | {"learning_rate"} if skip_live else IGNORED
        things, self._context = things_of(step), step.model.context
        self._seed = self._context.seed
        if skip_live and is_custom(type(optimizer)) and not on_gpu:
            things = [thing for thing in things if thing is not optimizer]
        self._things = [(thing, dict(self._constants(thing))) for thing in things]
        custom = [(thing, constants) for thing, constants in self._things if is_custom(type(thing))]
        roots = [type(thing) for thing, _ in custom]
        roots += [value for _, values in self._things for value in values.values() if may_run(value)]
        # Where arrays are not compared, the other items of a list with arrays still are.
        attributes = [constants.items() if arrays else self._values(thing) for thing, constants in custom]
        kept = [value for values in attributes for _, value in values]
        #: All names of built-in things, for a quick look for new attributes.
        self._names = [frozenset() if is_custom(type(thing)) else frozenset(vars(thing)) for thing in things]
        #: Whether code of the user takes part in the step.
        self.user_code = bool(roots)
        known = (*things_of(step), *step.model.context.store.buffers)
        self.reached = Reached(roots, kept, known, traced=traced and not (skip_live and on_gpu))

    def changed(self) -> str | None:
        """A description of something that has another value now, or None."""
        for (thing, before), names in zip(self._things, self._names, strict=True):
            now = vars(thing)
            for name, value in before.items():
                current = now.get(name)
                if current is not value and not same_item(_untraced(current), value):
                    return f"the attribute {name!r} of {type(thing).__name__}"
            if now.keys() != names and any(name not in before for name, _ in self._constants(thing)):
                return f"a new attribute of {type(thing).__name__}"
        return "the seed" if self._context.seed != self._seed else self.reached.changed()

    def _constants(self, thing: Any) -> Iterator[tuple[str, Any]]:
        """The names and values of the attributes to compare."""
        compared = self._arrays and is_custom(type(thing))
        for name, value in self._values(thing):
            if not holds_array(value) or (compared and (id(thing), name) not in self._replaced):
                yield name, value

    def _values(self, thing: Any) -> Iterator[tuple[str, Any]]:
        """The names and values of attributes, as they are without a trace."""
        for name, attribute in vars(thing).items():
            value = _untraced(attribute)
            if name not in self._ignored and not (value is None and name in _METHODS):
                yield name, value


def things_of(step: TrainingStep) -> list[Any]:
    """All objects that take part in a step and whose attributes it may use."""
    state = step.state
    parameters = step.model.context.store.parameters
    return [*every_layer(step.model), *parameters, *every_loss(step.loss), state.optimizer, *state.metrics]


def has_custom_code(step: TrainingStep) -> bool:
    """Whether any object that takes part in a step is not part of xpnet."""
    return any(is_custom(type(thing)) for thing in things_of(step))


def schedule_may_change(step: TrainingStep) -> bool:
    """Whether a schedule of the user may change what the steps depend on, besides the learning rate."""
    rate = step.state.optimizer.learning_rate
    if not (callable(rate) and may_run(rate)):
        return False
    if has_custom_code(step):
        return True
    try:
        return Reached([rate], (), things_of(step), traced=True).reaches_model
    except CaptureError:
        return True


def mark_replaced(step: TrainingStep, thing: Any, name: str) -> None:
    """Note that each step replaces this attribute, an array or several, before it reads it."""
    _replaced.setdefault(step, set()).add((id(thing), name))


def _untraced(value: Any) -> Any:
    """A method of a layer, in place of the one that names its calls in a trace; None if the class defines it."""
    return getattr(value, "untraced", value)
