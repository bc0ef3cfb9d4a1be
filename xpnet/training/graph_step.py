"""CapturedGraph steps: a kind of training step as a CUDA graph (backends/cuda/graphs.py)."""

import gc
import itertools
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

from xpnet.backends import Array, Backend
from xpnet.data.dataset import Batch, Dataset, StepData
from xpnet.layers.context import Workspace
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.snapshots import snapshot
from xpnet.training.step import TrainingStep

_UNSET: Any = object()


class GraphStep:
    """One kind of step: a number of rows, in batches of one size, from datasets of one layout."""

    verified = False

    def __init__(
        self, capture: Any, step: TrainingStep, data: StepData, metrics: EpochMetrics, streaming: bool
    ) -> None:
        """Capture the step, after a warm-up run whose changes are undone."""
        self._step, dataset = step, data.dataset
        # A window of a stream is freed after use, so later windows are copied into arrays that the graph reads.
        self._graph_data = _copy(dataset) if streaming else dataset
        self._loaded, self._order = dataset, _UNSET
        self._cells = capture.cells(len(dataset), data.rows, data.batch_count, metrics.batch_sums)
        self._data = StepData(
            self._graph_data, Workspace(step.model.context), self._cells.indices, 0, data.rows, data.batch_size
        )
        self._metric_arrays = metrics.arrays
        before = snapshot(step, metrics)
        self._load(data, step.state.step, metrics.batches)
        self._graph = capture.graph()
        try:
            with self._graph.memory_pool():
                self._run(metrics)  # compiles all kernels and allocates all memory
        finally:
            before.restore()
        self._graph.capture(lambda: self._run(metrics))
        self._graph.hold(reachable(step.model.backend.xp.ndarray, step, metrics, self._cells, self._data))

    def fits(self, data: StepData, metrics: EpochMetrics) -> bool:
        """Whether the samples fit into the arrays that the graph reads, and the metrics are those that it writes."""
        loadable = data.dataset is self._loaded or len(data.dataset) <= len(self._graph_data)
        now, then = metrics.arrays, self._metric_arrays
        return loadable and now.keys() == then.keys() and all(now[name] is then[name] for name in now)

    def replay(self, data: StepData, metrics: EpochMetrics) -> None:
        self.launch(data, self._step.state.step, metrics.batches, metrics)
        state, context = self._step.state, self._step.model.context
        context.begin_step(state.step)  # as an eager step does, for noise in callbacks
        state.optimizer_state.step += 1
        metrics.count_batches(data.batch_sizes, weighted=data.dataset.weights is not None)

    def launch(self, data: StepData, number: int, column: int, metrics: EpochMetrics) -> None:
        """Launch the graph for step `number`, whose sums go into this column of the metrics, without counting it."""
        self._load(data, number, column)
        self._graph.replay()

    def _run(self, metrics: EpochMetrics) -> None:
        """Run the step as the graph will, uncounted: on the rows in `cells.indices`, into `cells.staged_sums`."""
        counter, columns = self._step.state.optimizer_state, itertools.count()
        before = counter.step

        def add_metrics(per_sample: Array, batch: Batch, outputs: Array) -> None:
            metrics.add_on_device(self._cells.staged_sums, next(columns), per_sample, batch, outputs)

        try:
            with self._cells.step():
                self._step(self._data.batches(), self._data.total_weight(), add_metrics, self._data.batch_count)
        finally:
            counter.step = before

    def _load(self, data: StepData, number: int, column: int) -> None:
        dataset, cells = data.dataset, self._cells
        if dataset is not self._loaded:
            for target, array in zip(self._graph_data.arrays, dataset.arrays, strict=True):
                target[: len(array)] = array
            self._loaded, self._order = dataset, _UNSET
        if data.order is not self._order:
            xp = self._step.model.backend.xp
            cells.order[: len(dataset)] = xp.arange(len(dataset)) if data.order is None else data.order
            self._order = data.order
        cells.set_position(number, data.start, column)


def _copy(dataset: Dataset) -> Dataset:
    arrays = {name: getattr(dataset, name) for name in ("x", "y", "weights", "counts")}
    return replace(dataset, **{name: a.copy() for name, a in arrays.items() if a is not None})


def reachable(kind: type, *things: Any) -> list[Any]:
    """All objects of a type that can be reached from these: through attributes, containers and closures.

    The search does not enter classes, modules, backends and the objects found.
    """
    found, seen, waiting = [], set[int](), list(things)
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
