"""Captured inference: passes of predictions and evaluations are captured, and replayed from then on.

On a GPU they are captured as CUDA graphs. A graph contains the kernels of the eager pass. It reads the weights where
the model has them, and its inputs from arrays into which each batch is copied. On the CPU, only predictions of small
inputs are captured, as lists of calls, because for larger ones the Python code of the layers takes a small part of the
time. In both cases a replay does not change a bit of the results.

The first passes of a kind run eagerly, because capturing takes as long as many replays save: 4 of them on a GPU, 300 on
the CPU. The next pass is also captured, and the one after it runs both ways. Only if both give the same bits is the
capture used from then on. Models with code that is not part of xpnet stay eager, because such code may do anything.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from xpnet.backends import Array
from xpnet.capture.program import compiled
from xpnet.concurrency.interrupts import uninterrupted
from xpnet.config import is_custom
from xpnet.data.dataset import Batch
from xpnet.errors import CaptureError
from xpnet.layers.containers import Container, every_layer
from xpnet.layers.context import Workspace
from xpnet.layers.structure import as_tuple
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.training.captured_step import is_turned_off, reason_of, same_bits
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.graph_step import reachable
from xpnet.training.output_losses import every_loss
from xpnet.training.reached import IGNORED, holds_array, same_item
from xpnet.training.replayed_step import planned
from xpnet.training.traced_step import traced_outputs

_log = logging.getLogger(__name__)

_EAGER_ON_GPU, _EAGER_ON_CPU = 4, 300  # passes of a kind, before it is captured
_LARGEST_ON_GPU, _LARGEST_ON_CPU = 2**26, 2**16  # bytes of x: with more, a pass spends its time on computing
_MAX_KINDS = 8  # of a model; the one that was used least recently is dropped
_MAX_UNPAID = 4  # captures of a model that failed, or were dropped before they saved time


class InferencePass(NamedTuple):
    """What is computed from each batch: the outputs of a model; or with a loss, its sums and those of the metrics."""

    model: Container
    loss: Loss | None = None
    metrics: Sequence[Metric] = ()

    def __call__(self, batch: Batch) -> list[Array]:
        """The outputs, in a buffer; or the `EpochMetrics.sums_of_batch`. Runs eagerly."""
        outputs = self.model.forward_pass(batch.x, inference=True)
        if self.loss is None:
            return list(as_tuple(outputs))
        sums = EpochMetrics(self.model, self.loss, self.metrics, batches=1)
        outputs, batch = sums.rows(outputs, batch, self.model.output_masks(inference=True))
        sums.add(self.loss.samples(self.model.backend, outputs, batch.y), batch, outputs)
        return sums.sums_of_batch

    @property
    def things(self) -> list[Any]:
        """All objects that take part and whose attributes it may use, without the model itself."""
        layers = [layer for layer in every_layer(self.model) if layer is not self.model]
        if self.loss is None:
            return layers
        return [*layers, *self.model.context.store.parameters, *every_loss(self.loss), *self.metrics]


class CapturedInference:
    """The captured passes of one model. Use it in `Context.exclusively`."""

    def __init__(self) -> None:
        self._kinds: list[_Kind] = []  # the one that was used last comes first
        self._inputs: Workspace | None = None  # of all graphs: their passes never run at the same time
        self._unpaid, self._logged = 0, False
        self.audited: set[tuple[type, ...]] = set()  # the custom losses and metrics of evaluations that were checked

    def replayed(self, work: InferencePass, batch: Batch) -> list[Array] | None:
        """The results of a pass, valid until the next one; None if it has to run eagerly."""
        context = work.model.context
        on_cpu, size = context.backend.replays_calls, sum(a.nbytes for a in as_tuple(batch.x))
        if size > (_LARGEST_ON_CPU if on_cpu else _LARGEST_ON_GPU) or self._unpaid > _MAX_UNPAID:
            return None
        if on_cpu:
            return self._replayed(None, work, batch) if work.loss is None and not is_turned_off() else None
        capture = context.backend.graph_capture()
        if capture is None or batch.has_no_rows or context.group.size > 1:
            return None
        # A device that is left capturing, or a lock that is left locked, cannot be used.
        return uninterrupted(self._replayed, capture, work, batch)

    def drop(self) -> None:
        """Free the memory of all captured passes."""
        self._kinds.clear()
        self._inputs = None

    def _replayed(self, capture: Any, work: InferencePass, batch: Batch) -> list[Array] | None:
        """As `replayed`. capture: makes graphs; None on the CPU."""
        kind = self._kind_of(work, batch)
        kind.passes += 1
        if kind.captured is None and (kind.refused or kind.passes <= (_EAGER_ON_GPU if capture else _EAGER_ON_CPU)):
            return None
        try:
            if kind.captured is not None:
                return kind.captured.replay(work, batch)
            if _has_custom_code(work):
                raise CaptureError("code that is not part of xpnet takes part")
            if capture is None:
                kind.captured = uninterrupted(_CallsOfPass, work, batch)
            else:
                self._inputs = self._inputs or Workspace(work.model.context)
                kind.captured = _GraphOfPass(capture, work, batch, self._inputs)
        except Exception as error:  # of the trace, of the device or of CuPy
            kind.captured, kind.refused = None, True
            self._log(reason_of(error))
            self._count_unpaid()
        return None

    def _kind_of(self, work: InferencePass, batch: Batch) -> "_Kind":
        """The kind of a pass, which becomes the one that was used last. Forgets a capture that is out of date."""
        layout = {name: (a.shape, a.dtype) for name, a in batch.arrays.items()}
        metrics = [(metric.output, metric) for metric in work.metrics]
        described, kinds = (layout, work.loss, metrics), self._kinds
        position = next((i for i, kind in enumerate(kinds) if kind.described == described), None)
        kind = _Kind(described) if position is None else kinds.pop(position)
        if kind.captured is not None and kind.captured.is_outdated(work):
            self._count_dropped(kind)
            kind = _Kind(described)
        if len(kinds) == _MAX_KINDS:
            self._count_dropped(kinds.pop())
        kinds.insert(0, kind)
        return kind

    def _count_dropped(self, kind: "_Kind") -> None:
        if kind.captured is not None and kind.passes < kind.captured.pays_after:
            self._count_unpaid()

    def _count_unpaid(self) -> None:
        self._unpaid += 1
        if self._unpaid > _MAX_UNPAID:
            self.drop()
            self._log("attributes, or the sizes of batches, keep changing")

    def _log(self, reason: str) -> None:
        if not self._logged:
            _log.info("predictions or evaluations are not captured and run eagerly, which is slower: %s", reason)
        self._logged = True


class _Kind:
    """Passes that compute the same from batches of one layout.

    passes: how many there were.  captured: such a pass, or None.  refused: whether it cannot be captured.
    """

    def __init__(self, described: tuple[Any, ...]) -> None:
        self.described, self.passes, self.refused = described, 0, False
        self.captured: _CapturedPass | None = None


class _CapturedPass:
    """A captured pass, with what it depends on.

    pays_after: the passes after which capturing has saved time.
    """

    pays_after: int

    def __init__(self, work: InferencePass) -> None:
        context = work.model.context
        self._values, self._precision = context.store.values, context.precision
        self._attributes = [_attributes_of(thing) for thing in work.things]
        self._batch: Batch | None = None  # that a replay reads; None if that is the batch itself
        self._results: list[Array] = []
        self._verified = False

    def is_outdated(self, work: InferencePass) -> bool:
        """Whether the model has moved, or an attribute that the pass may use has changed."""
        context = work.model.context
        if context.store.values is not self._values or context.precision != self._precision:
            return True
        for now, names, constants in self._attributes:
            if not now.keys() <= names:
                return True
            for name, value in constants:
                current = now.get(name)
                if current is not value and not same_item(current, value):
                    return True
        return False

    def replay(self, work: InferencePass, batch: Batch) -> list[Array]:
        """The results of this batch, valid until the next pass. Raises CaptureError if they are not those of `work`."""
        self._run(work, batch)
        if not self._verified:
            results = [a.copy() for a in self._results]
            eager = work(batch if self._batch is None else self._batch)
            if not all(map(same_bits, results, eager)):
                raise CaptureError("the replay and the eager pass differ")
            self._verified = True
        return self._results

    def _run(self, work: InferencePass, batch: Batch) -> None:
        """Compute the results of this batch."""
        raise NotImplementedError


class _CallsOfPass(_CapturedPass):
    """A prediction on the CPU, as a list of calls."""

    pays_after = 1000

    def __init__(self, work: InferencePass, batch: Batch) -> None:
        super().__init__(work)
        model, backend = work.model, work.model.backend
        self._results = [backend.empty(a.shape, a.dtype) for a in work(batch)]
        with model.execution_context(len(batch)):
            trace = traced_outputs(model, batch, self._results)
            calls, _ = planned(trace, backend)
        self._loaders = [functools.partial(_load, k) for k in range(len(batch.arrays))]
        self._program = compiled(calls, batch.arrays)
        trace.release()
        self._workers = _workers_of(model)

    def is_outdated(self, work: InferencePass) -> bool:
        return super().is_outdated(work) or _workers_of(work.model) != self._workers

    def _run(self, work: InferencePass, batch: Batch) -> None:
        with work.model.execution_context(len(batch)):
            self._program(0, as_tuple(batch.x), *self._loaders)


def _load(k: int, inputs: Sequence[Array], out: Array) -> None:
    """Copy one of the inputs of a pass."""
    out[...] = inputs[k]


def _workers_of(model: Container) -> int:
    """Into how many parts a pass divides the batch."""
    return model.backend.workers if model.splits_batch else 1


class _GraphOfPass(_CapturedPass):
    """A pass on a GPU, as a CUDA graph, with the arrays that it reads and writes."""

    pays_after = 50

    def __init__(self, capture: Any, work: InferencePass, batch: Batch, inputs: Workspace) -> None:
        """Capture a pass, after a warm-up run. inputs: holds the arrays that this and other graphs read."""
        super().__init__(work)
        self._capture, self._graph = capture, capture.graph()
        self._batch = replace(batch, **batch.replaced(lambda name, a: inputs.buffer(name, a.shape, a.dtype)))
        self._inputs = list(self._batch.arrays.values())
        with capture.stream():
            self._load(batch)
            with self._graph.memory_pool():
                work(self._batch)  # compiles all kernels and allocates all memory
            self._graph.capture(lambda: self._results.extend(work(self._batch)))
        self._graph.hold(self._arrays(work))

    def _arrays(self, work: InferencePass) -> list[Array]:
        """All arrays that the graph may use, apart from those that only it has used."""
        context, layers = work.model.context, list(every_layer(work.model))
        scratch = [array for key, array in context._scratch.items() if key[0]]  # of inference
        of_training = [context, *[layer._workspaces.get(False) for layer in layers]]
        roots = [*work.things, work.model._workspaces, self._values, self._batch, self._results, scratch]
        return reachable(context.backend.xp.ndarray, *roots, without=of_training)

    def _run(self, work: InferencePass, batch: Batch) -> None:
        with self._capture.stream():
            self._load(batch)
            self._graph.replay()

    def _load(self, batch: Batch) -> None:
        for own, array in zip(self._inputs, batch.arrays.values(), strict=True):
            own[...] = array


def _attributes_of(thing: Any) -> tuple[dict[str, Any], frozenset[str], list[tuple[str, Any]]]:
    """The attributes of an object, as they are at any time; the names that it may have; those that no pass sets."""
    own = vars(thing)
    constants = [(name, v) for name, v in own.items() if name not in IGNORED and not holds_array(v)]
    return own, IGNORED.union(own), constants


def _has_custom_code(work: InferencePass) -> bool:
    """Whether a class that takes part, or a method that an object has in place of its class's, is not part of xpnet."""
    return any(
        is_custom(type(thing))
        or any(callable(value) and callable(getattr(type(thing), name, None)) for name, value in vars(thing).items())
        for thing in (work.model, *work.things)
    )
