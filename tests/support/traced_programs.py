"""Programs on arrays, run directly on NumPy, and as a trace that is simplified, placed, compiled and replayed."""

import functools
from types import SimpleNamespace

import numpy as np

from xpnet.backends.step_numbers import StepNumber
from xpnet.capture.array_module import TracedModule
from xpnet.capture.memory import MemoryPlan
from xpnet.capture.passes import Memory, for_numpy, simplified
from xpnet.capture.program import compiled
from xpnet.capture.trace import Trace
from xpnet.training.replayed_step import _view

STEP = 7  # the step that is traced
NO_LOADERS = (None, None, None, None)


def same_bits(a, b):
    """Whether two arrays have one shape, one dtype and the same bits, apart from the payloads of NaN."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind != "f":
        return bool((a == b).all())
    nan = np.isnan(a) & np.isnan(b)
    return bool((nan | ((a == b) & (np.signbit(a) == np.signbit(b)))).all())


class Traced:
    """The trace of function(xp, *arrays, number), and its replays.

    The arrays are those of a model, which the function may write.  number: the step plus 0.5, which changes from step
    to step.
    """

    def __init__(self, function, arrays, passes=True, shared=True):
        self.arrays = [a.copy() for a in arrays]
        self.trace = trace = Trace(np)
        before = [a.copy() for a in self.arrays]
        number = StepNumber(number_of, number_of(STEP))
        self.returned = function(TracedModule(trace), *[trace.wrap(a, writable=True) for a in self.arrays], number)
        trace.stop()
        self.after = [a.copy() for a in self.arrays]
        for a, values in zip(self.arrays, before, strict=True):
            a[...] = values
        self.memory = Memory(trace)
        self.calls = simplified(trace.calls, self.memory) if passes else list(trace.calls)
        self.arena = None
        if shared:
            self.plan = MemoryPlan(self.calls, self.memory)
            self.arena = np.full(self.plan.size + 64, 0xFF, "uint8")
            offset = -self.arena.__array_interface__["data"][0] % 64
            self.arena = self.arena[offset : offset + self.plan.size]
            self.calls = self.plan.applied(self.calls, functools.partial(_view, self.arena))
        if passes:
            self.calls = for_numpy(self.calls)
        self.program = compiled(self.calls)

    def replay(self, arrays, step):
        """What the arrays are after a replay that finds these values in them."""
        for a, values in zip(self.arrays, arrays, strict=True):
            a[...] = values
        if self.arena is not None:
            self.arena.fill(0xFF)  # nothing stays from one replay to the next
        self.program(step, None, *NO_LOADERS)
        return [a.copy() for a in self.arrays]


def number_of(step):
    return step + 0.5


def directly(function, arrays, step):
    """What the arrays are after the function has run on copies of them, without a trace."""
    arrays = [a.copy() for a in arrays]
    function(np, *arrays, number_of(step))
    return arrays


def names(calls):
    """The names of the functions that are called."""
    return [call.name for call in calls]


def inspect(function, *arrays):
    """The calls of a function before and after all passes, as lists of names."""
    traced = Traced(function, arrays, shared=False)
    return SimpleNamespace(before=names(traced.trace.calls), after=names(traced.calls), traced=traced)
