"""GraphStep: a kind of training step as a CUDA graph (backends/cuda/graphs.py)."""

import gc
import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

from xpnet.backends import Array, Backend
from xpnet.capture.gpu import CallList
from xpnet.capture.trace import SideEffectError
from xpnet.data.dataset import Batch, Dataset, StepData
from xpnet.layers.context import Workspace
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.replayed_step import PlannedStep, is_known
from xpnet.training.side_effects import unchanged_python
from xpnet.training.snapshots import snapshot
from xpnet.training.step import TrainingStep
from xpnet.training.traced_step import traced_step

_log = logging.getLogger(__name__)
_UNSET: Any = object()


class GraphStep:
    """One kind of step: a number of rows, in batches of one size, from datasets of one layout.

    The graph is captured from the list of the step's operators. A step that cannot be traced, such as one with a layer
    that writes into an array of its own, is run itself while it is captured. A step with side effects is not captured.

    The first launch captures the graph.

    calls: the list, or None.  comparisons: how many replays did the same as the eager step.  stale: whether something
    else may have changed the weights since the latest launch, so that copies of them have to be made anew.
    """

    comparisons, stale = 0, True

    @property
    def verified(self) -> bool:
        """Whether another step than the one that was captured has been replayed as it should be."""
        return self.comparisons >= 2

    def __init__(
        self, capture: Any, step: TrainingStep, data: StepData, metrics: EpochMetrics, streaming: bool
    ) -> None:
        self._step, self._capture, dataset = step, capture, data.dataset
        # A window of a stream is freed after use, so later windows are copied into arrays that the graph reads.
        self._graph_data = _copy(dataset) if streaming else dataset
        self._metric_arrays = metrics.arrays
        self._known_optimizer, self._rates = is_known(step.state.optimizer), _UNSET
        self._loaded: Dataset | None = dataset  # the latest samples
        self._order: Any = _UNSET
        self.calls: CallList | None = None
        self._graph: Any = None

    def _capture_step(self, data: StepData, number: int, column: int, metrics: EpochMetrics) -> None:
        """Capture the step, after a warm-up run as step `number`, whose changes are undone."""
        with unchanged_python(self._step):
            try:
                self._capture_work(data, number, column, metrics, self._trace)
                return
            except SideEffectError:
                raise
            except Exception as error:  # of the trace, of CuPy or of a user's layer
                self.calls = None
                _log.info("the operators of a step cannot be listed: %s", str(error))
        with unchanged_python(self._step):
            self._capture_work(data, number, column, metrics, self._whole_step)

    def _capture_work(
        self,
        data: StepData,
        number: int,
        column: int,
        metrics: EpochMetrics,
        prepare: Callable[[EpochMetrics], Callable[[], None]],
    ) -> None:
        """Capture the work that `prepare` returns."""
        step, dataset = self._step, data.dataset
        columns = metrics.columns_per_batch * data.batch_count
        self._cells = self._capture.cells(len(dataset), data.rows, columns, metrics.batch_sums)
        self._data = StepData(
            self._graph_data, Workspace(step.model.context), self._cells.indices, 0, data.rows, data.batch_size
        )
        self._loaded, self._order = dataset, _UNSET
        self._graph = self._capture.graph()
        before = snapshot(step, metrics)
        self._load(data, number, column)
        try:
            with self._graph.memory_pool():
                work = prepare(metrics)
                self._cells.begin()
                self._run(work)  # compiles all kernels and allocates all memory
        finally:
            before.restore()
        self._graph.capture(lambda: self._run(work))
        self._graph.hold(reachable(step.model.backend.xp.ndarray, step, metrics, self._cells, self._data))

    def _trace(self, metrics: EpochMetrics) -> Callable[[], None]:
        """The list of the step's operators."""
        backend = self._step.model.backend
        with backend.lasting_memory():  # for constants
            trace = traced_step(self._step, self._data, metrics, self._cells.staged_sums, fixed=True)
        self.calls = CallList(trace, backend, rows=self._cells.indices)
        self.calls.refresh()
        trace.release()
        self._graph.hold(self.calls.arrays)
        self._cells.gathers, self._cells.ends_with_update = self.calls.gathers, self.calls.ends_with_update
        return self.calls

    def _whole_step(self, metrics: EpochMetrics) -> Callable[[], None]:
        """The step itself: on the rows in `cells.indices`, into `cells.staged_sums`."""
        step, data, counter = self._step, self._data, self._step.state.optimizer_state

        def work() -> None:
            columns, before = itertools.count(0, metrics.columns_per_batch), counter.step

            def add_metrics(per_sample: Array, batch: Batch, outputs: Array) -> None:
                metrics.add_on_device(self._cells.staged_sums, next(columns), per_sample, batch, outputs)

            try:
                step(data.batches(), data.total_weight(), add_metrics, data.batch_count)
            finally:
                counter.step = before

        return work

    def _run(self, work: Callable[[], None]) -> None:
        with self._cells.step():
            work()

    def fits(self, data: StepData, metrics: EpochMetrics) -> bool:
        """Whether the samples fit into the arrays that the graph reads, and the metrics are those that it writes."""
        loadable = data.dataset is self._loaded or len(data.dataset) <= len(self._graph_data)
        now, then = metrics.arrays, self._metric_arrays
        return loadable and now.keys() == then.keys() and all(now[name] is then[name] for name in now)

    def is_ready(self, data: StepData, metrics: EpochMetrics) -> bool:
        """Whether these samples are from the same dataset as those before, and the graph writes into these metrics."""
        sums = metrics.batch_sums
        room = metrics.has_room_for(data.batch_count)
        return data.dataset is self._loaded and sums is self._metric_arrays["losses"] and room

    def keep_only(self, dataset: Dataset) -> None:
        """Let go of the latest samples, unless they are from this dataset: windows of a stream are large."""
        if self._loaded is not dataset:
            self._loaded, self._order = None, _UNSET

    def replay(self, data: StepData, metrics: EpochMetrics) -> None:
        """Launch the graph for the next step, and count it."""
        self.launch(data, self._step.state.step, metrics.column, metrics)
        state, context = self._step.state, self._step.model.context
        context.begin_step(state.step)  # as an eager step does, for noise in callbacks
        state.optimizer_state.step += 1
        metrics.count_batches(data.batch_sizes, weighted=metrics.rows.weighted or data.dataset.weights is not None)

    def launch(self, data: StepData, number: int, column: int, metrics: EpochMetrics) -> None:
        """Launch the graph for step `number`, whose sums go into this column of the metrics, without counting it."""
        if self._graph is None:
            self._metric_arrays = metrics.arrays  # some of which may have been made since
            self._capture_step(data, number, column, metrics)
        self._load(data, number, column)
        if self.stale and self.calls is not None:
            self.calls.refresh()
        self.stale = False
        self._graph.replay()

    def _load(self, data: StepData, number: int, column: int) -> None:
        dataset, cells = data.dataset, self._cells
        new_samples = dataset is not self._loaded or data.order is not self._order
        if dataset is not self._loaded:
            for target, array in zip(self._graph_data.arrays.values(), dataset.arrays.values(), strict=True):
                target[: len(array)] = array
            self._loaded, self._order = dataset, _UNSET
        if data.order is not self._order:
            xp = self._step.model.backend.xp
            cells.order[: len(dataset)] = xp.arange(len(dataset)) if data.order is None else data.order
            self._order = data.order
        state = self._step.state
        rates = state.optimizer.learning_rate, state.optimizer_state.constant_rate, state.rate_factor
        new_numbers = rates != self._rates or not self._known_optimizer
        cells.set_position(number, data.start, column, new_samples, new_numbers)
        self._rates = rates


def listed_step(step: TrainingStep, data: StepData, metrics: EpochMetrics, sums: Array, fixed: bool) -> PlannedStep:
    """As `planned_step`, on a GPU."""
    trace = traced_step(step, data, metrics, sums, fixed)
    calls, slots = CallList(trace, step.model.backend), step.state.optimizer_state.nbytes
    return PlannedStep(
        trace, calls.calls, calls.arena.nbytes, calls.temporary_bytes, slots, metrics, rows=None, loaders={}
    )


def _copy(dataset: Dataset) -> Dataset:
    return replace(dataset, **dataset.replaced(lambda _, a: a.copy()))


def reachable(kind: type, *things: Any, without: Iterable[Any] = ()) -> list[Any]:
    """All objects of a type that can be reached from these: through attributes, containers and closures.

    The search does not enter classes, modules, backends, the objects found, and those in `without`.
    """
    found, seen, waiting = [], {id(thing) for thing in without}, list(things)
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | Backend):
            continue
        seen.add(id(thing))
        if isinstance(thing, kind):
            found.append(thing)
        elif isinstance(thing, FunctionType):  # its globals would be the whole module
            waiting += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__]
        else:
            waiting += gc.get_referents(thing)
    return found
