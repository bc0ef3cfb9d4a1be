"""Learning rates as functions of the step: schedule(step) → rate, where step counts updates from 0."""

import math
from abc import abstractmethod
from collections.abc import Callable

from xpnet.config import Configured, is_number, is_whole
from xpnet.errors import ArgumentError


class Schedule(Configured):
    """The base of every schedule. Any function of the step serves as one too."""

    @abstractmethod
    def __call__(self, step: int) -> float: ...


class Constant(Schedule):
    """Always `rate`."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, step: int) -> float:
        return self.rate


class StepDecay(Schedule):
    """rate · factor^⌊step / every⌋."""

    def __init__(self, rate: float, every: int, factor: float = 0.1) -> None:
        self.rate, self.every, self.factor = rate, _positive("StepDecay", "every", every), factor

    def __call__(self, step: int) -> float:
        return self.rate * self.factor ** (step // self.every)


class ExponentialDecay(Schedule):
    """rate · factor^(step / every)."""

    def __init__(self, rate: float, every: int, factor: float) -> None:
        self.rate, self.every, self.factor = rate, _positive("ExponentialDecay", "every", every), factor

    def __call__(self, step: int) -> float:
        return float(self.rate * self.factor ** (step / self.every))


class InverseTimeDecay(Schedule):
    """rate / (1 + decay · step / every)."""

    def __init__(self, rate: float, every: int, decay: float = 1.0) -> None:
        self.rate, self.every, self.decay = rate, _positive("InverseTimeDecay", "every", every), decay

    def __call__(self, step: int) -> float:
        return self.rate / (1.0 + self.decay * step / self.every)


class CosineDecay(Schedule):
    """Half a cosine from `rate` down to `final` over `steps`, and `final` after them. Loshchilov and Hutter 2016."""

    def __init__(self, rate: float, steps: int, final: float = 0.0) -> None:
        self.rate, self.steps, self.final = rate, _positive("CosineDecay", "steps", steps), final

    def __call__(self, step: int) -> float:
        return _cosine(self.rate, self.final, step / self.steps)


class LinearWarmup(Schedule):
    """In equal parts up to the first rate of `after` over `steps`, then `after`, a schedule or a number."""

    def __init__(self, steps: int, after: Callable[[int], float] | float) -> None:
        self.steps, self.after = _positive("LinearWarmup", "steps", steps), after

    def __call__(self, step: int) -> float:
        after = self.after if callable(self.after) else Constant(self.after)
        if step < self.steps:
            return after(0) * (step + 1) / self.steps
        return after(step - self.steps)


class OneCycle(Schedule):
    """Up a cosine from peak / 25 to `peak` over the first `warmup` of `steps`, down another to peak / 250 000.

    Smith and Topin 2017, "Super-convergence". The quotients are `start_factor` and `end_factor` (of the start).
    """

    def __init__(
        self, peak: float, steps: int, warmup: float = 0.3, start_factor: float = 25.0, end_factor: float = 1e4
    ) -> None:
        if not (is_number(warmup) and 0 <= warmup <= 1):
            raise ArgumentError(f"OneCycle: warmup is a fraction of the steps, between 0 and 1, not {warmup!r}.")
        self.peak, self.steps, self.warmup = peak, _positive("OneCycle", "steps", steps), warmup
        self.start_factor, self.end_factor = start_factor, end_factor

    def __call__(self, step: int) -> float:
        top = self.warmup * self.steps
        start = self.peak / self.start_factor
        if step < top:
            return _cosine(start, self.peak, step / top)
        down = self.steps - 1 - top  # the last step, not the one after it, has the lowest rate
        return _cosine(self.peak, start / self.end_factor, (step - top) / down if down > 0 else 1.0)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def _positive(schedule: str, name: str, value: int) -> int:
    if not (is_whole(value) and value >= 1):
        raise ArgumentError(f"{schedule}: {name} must be at least 1 step, not {value!r}.")
    return value
