"""ReplayedStep: a kind of training step on the CPU, as a list of calls that one function makes."""

import contextlib
import functools
from types import FunctionType, MethodType
from typing import Any

import numpy

from xpnet.backends import Array
from xpnet.capture.memory import MemoryPlan
from xpnet.capture.passes import Memory, for_numpy, simplified
from xpnet.capture.program import INPUTS, compiled
from xpnet.config import is_custom
from xpnet.data.dataset import Dataset, StepData
from xpnet.optimizers import Optimizer
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.snapshots import snapshot
from xpnet.training.step import TrainingStep
from xpnet.training.traced_step import loader, traced_step, unchanged_python


class ReplayedStep:
    """One kind of step: a number of rows, in batches of one size, from datasets of one layout."""

    verified = False

    def __init__(self, step: TrainingStep, data: StepData, metrics: EpochMetrics, streaming: bool) -> None:
        """Trace the step, and undo it. Raises CaptureError, or an error of the user's code, if that is not possible."""
        self._step, self._runs_user_code = step, not _is_known(step.state.optimizer)
        self._state, self._context = step.state.optimizer_state, step.model.context
        self._backend, self._batch_sizes = step.model.backend, data.batch_sizes
        self._rows, self._weighted = data.rows, data.dataset.weights is not None
        self._sums = step.model.backend.zeros((3, data.batch_count), "float64")
        self._metric_arrays = {name: a for name, a in metrics.arrays.items() if name != "losses"}
        before = snapshot(step, metrics)
        try:
            trace = traced_step(step, data, metrics, self._sums, fixed=not streaming)
        finally:
            before.restore()
        memory = Memory(trace)
        calls = simplified(trace.calls, memory)
        plan = MemoryPlan(calls, memory)
        arena = step.model.backend.empty((plan.size,), "uint8")
        #: The calls of a replay, and the bytes of their temporary arrays.
        self.calls, self.memory = for_numpy(plan.applied(calls, functools.partial(_view, arena))), plan.size
        self._program = compiled(self.calls)
        self.dataset: Dataset = data.dataset
        self._loaders = self._loaders_of(data.dataset, data.order)

    def _loaders_of(self, dataset: Dataset, order: Array | None) -> list[Any]:
        arrays = [getattr(dataset, name) for name in INPUTS]
        dtypes = [dataset.x_dtype, *[None if a is None else a.dtype for a in arrays[1:]]]
        return [loader(self._backend, a, t, order is not None) for a, t in zip(arrays, dtypes, strict=True)]

    def fits(self, data: StepData, metrics: EpochMetrics) -> bool:
        """Whether the calls write into these metrics."""
        now, then = metrics.arrays, self._metric_arrays
        return len(now) == len(then) + 1 and all(now.get(name) is then[name] for name in then)

    def launch(self, data: StepData, number: int, column: int, metrics: EpochMetrics) -> None:
        """Make the calls of step `number`, whose sums go into this column of the metrics, without counting it."""
        counted, self._state.step = self._state.step, number  # which the update of a custom optimizer reads
        try:
            with unchanged_python(self._step) if self._runs_user_code else contextlib.nullcontext():
                self._compute(data, number)
        finally:
            self._state.step = counted
        metrics.batch_sums[:, column : column + len(self._batch_sizes)] = self._sums

    def replay(self, data: StepData, metrics: EpochMetrics) -> None:
        """Make the calls of the next step, and count it."""
        state = self._state
        self._compute(data, state.step)
        state.step += 1
        metrics.add_replayed(self._sums, self._batch_sizes, self._weighted)

    def _compute(self, data: StepData, number: int) -> None:
        if data.dataset is not self.dataset:
            self.dataset, self._loaders = data.dataset, self._loaders_of(data.dataset, data.order)
        order, place = data.order, slice(data.start, data.start + self._rows)
        self._context.begin_step(number)
        self._program(number, place if order is None else order[place], *self._loaders)


def _is_known(optimizer: Optimizer) -> bool:
    """Whether an optimizer and its schedule are part of xpnet."""
    rate = optimizer.learning_rate
    return not (is_custom(type(optimizer)) or is_custom(type(rate)) or isinstance(rate, FunctionType | MethodType))


def _view(arena: Array, array: Array, offset: int) -> Array:
    """An array like this one in the arena, with its first element at this byte."""
    return numpy.ndarray(array.shape, array.dtype, arena, offset, array.strides)
