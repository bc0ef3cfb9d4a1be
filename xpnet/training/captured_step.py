"""Captured steps: a training step becomes a CUDA graph, on devices that can capture (backends/cuda/graphs.py).

To capture a step, its layers, loss and optimizer are run once while the device captures the calls. Whatever Python
computes in that run is a constant of the graph. So a captured step is used only after a replay, one step later, did the
same as the eager step: with another batch, another learning rate and other noise. All other steps run eagerly.
"""

import gc
import itertools
import logging
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

from xpnet.backends import Array, Backend
from xpnet.concurrency.interrupts import uninterrupted
from xpnet.data.dataset import Batch, Dataset, StepData
from xpnet.errors import CaptureError
from xpnet.layers.context import Workspace
from xpnet.parameters import Snapshot
from xpnet.training.audit import audited_step
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.step import TrainingStep

_log = logging.getLogger(__name__)

_MAX_GRAPHS = 8  # of a run: one for each kind of step, and each holds memory
_TOLERANCE = 1e-3  # of the largest change that a step makes
_HALF_TOLERANCE = 5e-2  # in half precision, with its coarse rounding
_ROUNDING = 1e-4  # of the largest element of a gradient: anything smaller may be rounding
_FEW_ULPS = 8.0 * 2.0**-23  # 8 units in the last place of float32
_GRADIENT = "the gradient"
_UNSET: Any = object()

#: What CuPy and CUDA say about a call that cannot be captured, and what it means.
_CAPTURE_ERRORS = {
    "D2H transfers": "the step reads values from the device",
    "H2D transfers": "the step copies an array from the host",
    "synchronous API calls": "the step waits for the device, or copies to or from it",
    "during stream capture": "the step calls a CUDA library through CuPy; backend.matmul does not",
    "StreamCapture": "the step makes a call that a CUDA graph cannot contain",
}


class StepExecutor:
    """Runs the steps of one run: eagerly, or by a replay if this kind of step has been captured.

    fallback_reason: why no step is captured, or None.
    """

    def __init__(self, step: TrainingStep, streaming: bool) -> None:
        self._step, self._streaming = step, streaming
        single = step.model.context.group.size == 1
        self._capture = step.model.backend.graph_capture() if single else None
        self._kinds: dict[tuple[Any, ...], CapturedStep | None] = {}
        self._captured, self._first = 0, True
        self.fallback_reason: str | None = None
        own = [metric for metric in step.state.metrics if not metric.starts_from_zeros]
        if not single:
            self.fallback_reason = "several ranks sum their gradients"
        elif self._capture is None:
            self.fallback_reason = "this device does not capture steps"
        elif own:
            does = "collects the outputs of all samples" if own[-1].collects else "merges batches in its own way"
            self._fall_back(f"the metric {own[-1].name} {does}")

    @property
    def captured(self) -> int:
        """How many kinds of steps are replayed now; after `close`, how many were."""
        return self._captured or sum(kind is not None and kind.verified for kind in self._kinds.values())

    def close(self) -> None:
        """Free the memory of all graphs: the run is over."""
        self._captured = self.captured
        self._kinds.clear()

    def __call__(self, data: StepData, metrics: EpochMetrics) -> None:
        """Train on these samples, and add to these metrics."""
        if self._capture is None:
            self._run_eagerly(data, metrics)
            return
        with self._step.model.execution_context():
            captured = None
            if self.fallback_reason is None:
                # A device that is left capturing, or a step that is undone in part, cannot be used.
                captured = uninterrupted(self._captured_step, data, metrics)
            if captured is None:
                self._run_eagerly(data, metrics)
            elif captured.verified:
                captured.replay(data, metrics)
            else:
                uninterrupted(self._verify, captured, data, metrics)

    def _run_eagerly(self, data: StepData, metrics: EpochMetrics) -> None:
        if self._first:
            self._first = False
            with audited_step(self._step):
                self._run_eagerly(data, metrics)
            return
        self._step(data.batches(), data.total_weight(), metrics.add, data.batch_count)

    def _captured_step(self, data: StepData, metrics: EpochMetrics) -> "CapturedStep | None":
        """The captured step of this kind, or None. Captures the second of a kind, and again if its arrays changed."""
        trained = tuple(p.trainable for p in self._step.model.context.store.parameters)
        arrays = tuple((a.dtype, a.shape[1:]) for a in data.dataset.arrays)
        kind = (data.rows, data.batch_size, trained, arrays)
        if kind not in self._kinds:
            if len(self._kinds) < _MAX_GRAPHS:
                self._kinds[kind] = None  # the first step of a kind allocates all buffers
            return None
        captured = self._kinds[kind]
        if captured is not None and captured.fits(data, metrics):
            return captured
        try:
            self._kinds[kind] = CapturedStep(self._capture, self._step, data, metrics, self._streaming)
        except Exception as error:  # of the device, of CuPy or of a user's layer
            self._fall_back(_reason(error))
        return None

    def _verify(self, captured: "CapturedStep", data: StepData, metrics: EpochMetrics) -> None:
        """Replay the step and undo it; then run it eagerly, and see whether both did the same."""
        step, reason = self._step, None
        before = _snapshot(step, metrics)
        try:
            captured.launch(data, metrics)
            replayed = _changes(before)
        except Exception as error:
            reason = _reason(error)
        before.restore()
        self._run_eagerly(data, metrics)
        if reason is None:
            reason = _disagreement(step, before, replayed)
        if reason is None:
            captured.verified = True
        else:
            self._fall_back(reason)

    def _fall_back(self, reason: str) -> None:
        self._kinds.clear()
        self.fallback_reason = reason
        _log.warning("training steps are not captured as CUDA graphs and run eagerly, which is slower: %s", reason)


class CapturedStep:
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
        before = _snapshot(step, metrics)
        self._load(data, metrics)
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
        self.launch(data, metrics)
        state, context = self._step.state, self._step.model.context
        context.begin_step(state.step)  # as an eager step does, for noise in callbacks
        state.optimizer_state.step += 1
        metrics.count_batches(data.batch_sizes, weighted=data.dataset.weights is not None)

    def launch(self, data: StepData, metrics: EpochMetrics) -> None:
        """Launch the graph for this step, without counting the step."""
        self._load(data, metrics)
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

    def _load(self, data: StepData, metrics: EpochMetrics) -> None:
        dataset, cells = data.dataset, self._cells
        if dataset is not self._loaded:
            for target, array in zip(self._graph_data.arrays, dataset.arrays, strict=True):
                target[: len(array)] = array
            self._loaded, self._order = dataset, _UNSET
        if data.order is not self._order:
            xp = self._step.model.backend.xp
            cells.order[: len(dataset)] = xp.arange(len(dataset)) if data.order is None else data.order
            self._order = data.order
        cells.set_position(self._step.state.step, data.start, metrics.batches)


def _snapshot(step: TrainingStep, metrics: EpochMetrics) -> Snapshot:
    """Everything that a step changes, as it is now."""
    store, state, scale = step.model.context.store, step.state, step.state.loss_scale
    arrays = {_GRADIENT: store.grads}
    arrays |= {f"the optimizer's {name}": vector for name, vector in state.optimizer_state.slots.items()}
    arrays |= {f"the {name}": array for name, array in metrics.arrays.items()}
    if scale is not None:
        arrays |= {"the loss scale": scale.state, "its gate": scale.gate}
    return Snapshot(store, lambda: arrays)


def _changes(before: Snapshot) -> dict[str, Array]:
    """How much a step has changed each array; for the gradient, which a step overwrites, its new value."""
    return {**before.changes(), _GRADIENT: before.arrays()[_GRADIENT].copy()}


def _disagreement(step: TrainingStep, before: Snapshot, replayed: dict[str, Array]) -> str | None:
    """A sentence if the eager step and the replay differ by more than rounding, else None. Waits for the device.

    Elements whose gradient is only rounding error, such as of a bias before a BatchNorm, are ignored in the weights and
    in the optimizer's state, because Adam turns such gradients into full steps.
    """
    xp, half = step.model.backend.xp, step.model.context.precision in ("float16", "bfloat16")
    grads = xp.abs(step.model.context.store.grads)
    significant = grads > _ROUNDING * grads.max()
    for name, eager in _changes(before).items():
        if not eager.size:
            continue
        difference, most = xp.abs(eager - replayed[name]), float(xp.abs(eager).max())
        if difference.shape == significant.shape:
            difference = difference * significant
        largest = float(difference.max())
        rounding = _FEW_ULPS * float(xp.abs(before.copies[name]).max())
        if not largest <= (_HALF_TOLERANCE if half else _TOLERANCE) * most + rounding and most == most:
            return (
                f"the replay and the eager step differ in {name} by {largest:.3g}; the eager step changed it by "
                f"{most:.3g}"
            )
    return None


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


def _reason(error: Exception) -> str:
    if isinstance(error, CaptureError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    meaning = next((meaning for words, meaning in _CAPTURE_ERRORS.items() if words in text), None)
    return text if meaning is None else f"{meaning} ({text})"
