"""Schedules: learning rates as functions of the step, schedule(step) → rate. `step` counts updates from 0."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from xpnet.config import Configured, integer, number, rate_or_schedule, scheduled_rate

__all__ = ["Constant", "CosineDecay", "ExponentialDecay", "InverseTimeDecay", "LinearWarmup", "OneCycle",
           "Schedule", "StepDecay"]  # fmt: skip


class Schedule(Configured):
    """The base of every schedule. `__call__(step)` returns the rate of that step; any such function works as well."""

    @abstractmethod
    def __call__(self, step: int) -> float: ...


class Constant(Schedule):
    """Always `rate`."""

    def __init__(self, rate: float) -> None:
        self.rate = _rate(self, "rate", rate)

    def __call__(self, step: int) -> float:
        return self.rate


class StepDecay(Schedule):
    """rate · factor^⌊step / every⌋, with `every` steps from one decay to the next."""

    def __init__(self, rate: float, every: int, factor: float = 0.1) -> None:
        self.rate, self.every = _rate(self, "rate", rate), integer(self, "every", every)
        self.factor = number(self, "factor", factor, above=0, finite=True)

    def __call__(self, step: int) -> float:
        return self.rate * _power(self.factor, step // self.every)


class ExponentialDecay(Schedule):
    """rate · factor^(step / every): it falls in each step, by `factor` over `every` steps."""

    def __init__(self, rate: float, every: int, factor: float) -> None:
        self.rate, self.every = _rate(self, "rate", rate), integer(self, "every", every)
        self.factor = number(self, "factor", factor, above=0, finite=True)

    def __call__(self, step: int) -> float:
        return self.rate * _power(self.factor, step / self.every)


class InverseTimeDecay(Schedule):
    """rate / (1 + decay · step / every)."""

    def __init__(self, rate: float, every: int, decay: float = 1.0) -> None:
        self.rate, self.every = _rate(self, "rate", rate), integer(self, "every", every)
        self.decay = number(self, "decay", decay, at_least=0, finite=True)

    def __call__(self, step: int) -> float:
        return self.rate / (1.0 + self.decay * step / self.every)


class CosineDecay(Schedule):
    """Half a cosine from `rate` falling to `final` over `steps`, then `final`. Loshchilov and Hutter 2016."""

    def __init__(self, rate: float, steps: int, final: float = 0.0) -> None:
        self.rate, self.steps = _rate(self, "rate", rate), integer(self, "steps", steps)
        self.final = _rate(self, "final", final)

    def __call__(self, step: int) -> float:
        return _cosine(self.rate, self.final, step / self.steps)


class LinearWarmup(Schedule):
    """Rises linearly over `steps` to the first rate of `after`, then follows `after`, a schedule or a number."""

    def __init__(self, steps: int, after: Callable[[int], float] | float) -> None:
        self.steps, self.after = integer(self, "steps", steps), rate_or_schedule(self, "after", after)

    def __call__(self, step: int) -> float:
        after = self.after if callable(self.after) else Constant(self.after)
        if step < self.steps:
            return scheduled_rate(self, after, 0) * (step + 1) / self.steps
        return scheduled_rate(self, after, step - self.steps)


class OneCycle(Schedule):
    """Rises along half a cosine to `peak` in the first part of `steps`, then falls along another one.

    It starts at peak / start_factor and ends at (peak / start_factor) / end_factor. warmup: the fraction of `steps` in
    which it rises. Smith and Topin 2017, "Super-convergence".
    """

    def __init__(
        self, peak: float, steps: int, warmup: float = 0.3, start_factor: float = 25.0, end_factor: float = 1e4
    ) -> None:
        self.peak, self.steps = _rate(self, "peak", peak), integer(self, "steps", steps)
        self.warmup = number(self, "warmup", warmup, at_least=0, at_most=1)
        self.start_factor = number(self, "start_factor", start_factor, above=0, finite=True)
        self.end_factor = number(self, "end_factor", end_factor, above=0, finite=True)

    def __call__(self, step: int) -> float:
        rising = self.warmup * self.steps  # steps in which the rate rises
        start = self.peak / self.start_factor
        if step < rising:
            return _cosine(start, self.peak, step / rising)
        falling = self.steps - 1 - rising  # so that the last step has the lowest rate
        return _cosine(self.peak, start / self.end_factor, (step - rising) / falling if falling > 0 else 1.0)


def _rate(owner: Any, name: str, value: Any) -> float:
    return float(number(owner, name, value, at_least=0, finite=True))


def _power(factor: float, exponent: float) -> float:
    """factor ** exponent, infinite if it is too large for a float."""
    try:
        return math.pow(factor, exponent)
    except OverflowError:
        return math.inf


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
