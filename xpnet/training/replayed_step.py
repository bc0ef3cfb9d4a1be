"""ReplayedStep: a kind of training step on the CPU, as a list of calls that one function makes."""

import contextlib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import numpy

from xpnet.backends import Array, Backend
from xpnet.capture.barriers import with_fewer_barriers, with_shared_elements
from xpnet.capture.calls import Call
from xpnet.capture.loops import with_fused_loops
from xpnet.capture.memory import MemoryPlan
from xpnet.capture.passes import Memory, for_numpy, simplified
from xpnet.capture.program import compiled
from xpnet.capture.trace import Trace
from xpnet.config import is_custom
from xpnet.data.dataset import Dataset, StepData
from xpnet.errors import CaptureError
from xpnet.layers.containers import Container, every_layer
from xpnet.optimizers import Optimizer
from xpnet.training.attributes import has_custom_code
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.side_effects import unchanged_python
from xpnet.training.snapshots import snapshot
from xpnet.training.step import TrainingStep
from xpnet.training.traced_step import loader, traced_step

# Planning n calls takes about 7e-8 · n² seconds, and a replay saves about 3e-7 · n, as measured with LSTMs.
_FEW_CALLS, _CALLS_PER_REPLAY = 2000, 5
_LARGE = 2**24  # bytes of freed memory: fewer are not worth the time that returning them takes


@dataclass
class PlannedStep:
    """The calls of a step, and what they need.

    trace: with the recorded calls.  calls: those after all passes.  shared_bytes: of the memory of temporary arrays.
    temporary_bytes: the same without sharing.  slot_bytes: of the vectors that the optimizer keeps.
    metrics: those that the step adds to.  rows: the rows of the traced step.  loaders: see `program.compiled`, by the
    names of the inputs.
    """

    trace: Trace
    calls: list[Call]
    shared_bytes: int
    temporary_bytes: int
    slot_bytes: int
    metrics: EpochMetrics
    rows: Any
    loaders: dict[str, Any]


def planned_step(
    step: TrainingStep, data: StepData, metrics: EpochMetrics, sums: Array, fixed: bool, replays: int | None = None
) -> PlannedStep:
    """Trace a step, simplify its calls, and place them in memory. The caller undoes what the step has changed.

    sums: (3, batches), float64, where the calls put the sums of each batch.  fixed: whether steps share one dataset.
    replays: how many are to come, if planning must pay.
    Raises CaptureError, or an error of the user's code, if the step cannot be traced.
    """
    backend: Any = step.model.backend
    trace = traced_step(step, data, metrics, sums, fixed)
    count = len(trace.calls)
    if replays is not None and count > max(_FEW_CALLS, _CALLS_PER_REPLAY * replays):
        trace.release()
        raise CaptureError(f"the step makes {count:,} calls: planning them takes longer than {replays:,} replays save")
    calls, plan = planned(trace, backend)
    place = slice(data.start, data.start + data.rows)
    return PlannedStep(
        trace,
        calls,
        plan.size,
        plan.unshared,
        step.state.optimizer_state.nbytes,
        metrics,
        place if data.order is None else data.order[place],
        loaders_of(backend, data.dataset, data.order is not None),
    )


def planned(trace: Trace, backend: Backend) -> tuple[list[Call], MemoryPlan]:
    """The traced calls after all passes, and the plan by which they share memory."""
    memory = Memory(trace)
    calls = with_fewer_barriers(with_shared_elements(simplified(trace.calls, memory), memory), memory)
    loops = backend.loops(())  # type: ignore[attr-defined]  # on the CPU
    if loops is not None:
        calls = with_fused_loops(calls, memory, loops)
    plan = MemoryPlan(calls, memory)
    shared = backend.empty((plan.size,), "uint8")
    return for_numpy(plan.applied(calls, functools.partial(_view, shared))), plan


class ReplayedStep:
    """One kind of step: a number of rows, in batches of one size, from datasets of one layout.

    comparisons: how many replays did the same as the eager step.  stale: see GraphStep, which has copies of weights.
    """

    comparisons, stale = 0, False

    @property
    def verified(self) -> bool:
        """Whether another step than the one that was captured has been replayed as it should be."""
        return self.comparisons >= 1

    def __init__(
        self, step: TrainingStep, data: StepData, metrics: EpochMetrics, streaming: bool, replays: int | None = None
    ) -> None:
        """Trace the step, and undo it. Arguments and errors: see `planned_step`."""
        self._step, self._runs_user_code = step, not is_known(step.state.optimizer)
        self._state, self._context = step.state.optimizer_state, step.model.context
        self._backend, self._batch_sizes = step.model.backend, data.batch_sizes
        self._rows, self._weighted = data.rows, metrics.rows.weighted or data.dataset.weights is not None
        self._sums = step.model.backend.zeros((3, metrics.columns_per_batch * data.batch_count), "float64")
        self._metric_arrays = {name: a for name, a in metrics.arrays.items() if name != "losses"}
        before = snapshot(step, metrics)
        # The traced step has its own workspaces, but custom code may use what an earlier step kept.
        if not has_custom_code(step):
            free_workspaces(step.model)
        try:
            plan = planned_step(step, data, metrics, self._sums, not streaming, replays)
        finally:
            before.restore()
        self._program = compiled(plan.calls, plan.loaders)
        self._dataset: Dataset | None = data.dataset
        self._loaders: Iterable[Any] = plan.loaders.values()
        plan.trace.release()

    def fits(self, data: StepData, metrics: EpochMetrics) -> bool:
        """Whether the calls write into these metrics."""
        now, then = metrics.arrays, self._metric_arrays
        return len(now) == len(then) + 1 and all(now.get(name) is then[name] for name in then)

    def is_ready(self, data: StepData, metrics: EpochMetrics) -> bool:
        """Whether these samples are from the same dataset as those before."""
        return data.dataset is self._dataset

    def keep_only(self, dataset: Dataset) -> None:
        """Let go of the latest samples, unless they are from this dataset: windows of a stream are large."""
        if self._dataset is not dataset:
            self._dataset, self._loaders = None, ()

    def launch(self, data: StepData, number: int, column: int, metrics: EpochMetrics) -> None:
        """Make the calls of step `number`, whose sums go into this column of the metrics, without counting it."""
        counted, self._state.step = self._state.step, number  # which the update of a custom optimizer reads
        try:
            with unchanged_python(self._step) if self._runs_user_code else contextlib.nullcontext():
                self._compute(data, number)
        finally:
            self._state.step = counted
        metrics.batch_sums[:, column : column + self._sums.shape[1]] = self._sums

    def replay(self, data: StepData, metrics: EpochMetrics) -> None:
        """Make the calls of the next step, and count it."""
        state = self._state
        self._compute(data, state.step)
        state.step += 1
        metrics.add_replayed(self._sums, self._batch_sizes, self._weighted)

    def _compute(self, data: StepData, number: int) -> None:
        if data.dataset is not self._dataset:
            self._dataset = data.dataset
            self._loaders = loaders_of(self._backend, data.dataset, data.order is not None).values()
        order, place = data.order, slice(data.start, data.start + self._rows)
        self._context.begin_step(number)
        self._program(number, place if order is None else order[place], *self._loaders)


def is_known(optimizer: Optimizer) -> bool:
    """Whether an optimizer and its schedule are part of xpnet."""
    rate = optimizer.learning_rate
    own_schedule = callable(rate) and is_custom(rate if isinstance(rate, FunctionType | MethodType) else type(rate))
    return not (is_custom(type(optimizer)) or own_schedule)


def free_workspaces(model: Container) -> None:
    """Free what the layers keep from a training step, which a replay does not use.

    Custom layers keep it, since they may use it in a later step, though they should not.
    """
    context, freed = model.context, 0
    for layer in every_layer(model):
        if is_custom(type(layer)):
            continue
        work = layer._workspaces.pop(False, None)
        freed += 0 if work is None else work.nbytes
    context.forward_thread = 0
    scratch = context._scratch
    for key in [key for key in scratch if not key[0]]:  # not of inference
        freed += scratch.pop(key).nbytes
    if freed > _LARGE:
        context.backend.free_memory()


def loaders_of(backend: Backend, dataset: Dataset, ordered: bool) -> dict[str, Any]:
    """The loaders of a dataset, see `program.compiled`. ordered: whether rows are an index array, not a slice."""
    dtypes = dataset.dtypes
    return {name: loader(backend, a, dtypes[name], ordered) for name, a in dataset.arrays.items()}


def _view(arena: Array, array: Array, offset: int) -> Array:
    """An array like this one, at a byte of the arena."""
    low = sum(min(0, (n - 1) * stride) for n, stride in zip(array.shape, array.strides, strict=True))
    return numpy.ndarray(array.shape, array.dtype, arena, offset - low, array.strides)
