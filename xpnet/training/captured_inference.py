"""Captured inference: on a GPU, the passes of predictions and evaluations are captured as CUDA graphs, and replayed.

The first passes of a kind run eagerly, since capturing takes as long as a few dozen replays save. Then one pass is
captured while it runs, and the next one is run both ways: only if both give the same numbers is the graph used from
then on. A graph contains the kernels of the eager pass, so replays do not change a bit of the results. It reads the
weights where the model has them, and its inputs from arrays that each pass is copied to.

Only models of built-in layers are captured: other code may do anything in a pass. On the CPU passes stay eager.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from xpnet.backends import Array
from xpnet.capture.program import INPUTS
from xpnet.concurrency.interrupts import uninterrupted
from xpnet.config import is_custom
from xpnet.data.dataset import Batch
from xpnet.errors import CaptureError
from xpnet.layers.containers import Sequential, every_layer
from xpnet.layers.context import Workspace
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.training.captured_step import reason_of
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.graph_step import reachable
from xpnet.training.reached import IGNORED, holds_array, same_item

_log = logging.getLogger(__name__)

_EAGER_PASSES = 4  # of a kind, before it is captured
_MAX_KINDS = 8  # of a model; the one that was used least recently is dropped
_FEW_REPLAYS = 50  # a graph that is dropped after fewer did not pay
_MAX_UNPAID = 4  # such graphs of a model, because sizes of batches or attributes keep changing
_LARGEST_INPUT = 2**26  # bytes: computing on more takes longer than launching the kernels


class InferencePass(NamedTuple):
    """What is computed from each batch: the outputs of a model; or with a loss, its sums and those of the metrics."""

    model: Sequential
    loss: Loss | None = None
    metrics: Sequence[Metric] = ()

    def __call__(self, batch: Batch) -> list[Array]:
        """The outputs, in a buffer; or what `EpochMetrics.sums_of` returns. Runs eagerly."""
        outputs = self.model.forward_pass(batch.x, inference=True)
        if self.loss is None:
            return [outputs]
        per_sample = self.loss.samples(self.model.backend, outputs, batch.y)
        return EpochMetrics(self.model, self.metrics, 1).sums_of(per_sample, batch, outputs)

    @property
    def things(self) -> list[Any]:
        """All objects that take part and whose attributes it may use, without the model itself."""
        layers = [layer for layer in every_layer(self.model) if layer is not self.model]
        if self.loss is None:
            return layers
        return [*layers, *self.model.context.store.parameters, self.loss, *self.metrics]

    @property
    def runs_user_code(self) -> bool:
        """Whether code that is not part of xpnet takes part."""
        things = [self.model, *self.things]
        return any(is_custom(type(thing)) or _replaces_methods(thing) for thing in things)


class CapturedInference:
    """The captured passes of one model. `replayed` is called by one thread at a time, in `Context.exclusively`."""

    def __init__(self) -> None:
        self._kinds: list[_Kind] = []  # the one that was used last is at the end
        self._inputs: Workspace | None = None  # for all kinds, whose passes never run at the same time
        self._unpaid, self._fallback_reason = 0, ""

    def replayed(self, work: InferencePass, batch: Batch) -> list[Array] | None:
        """The results of a pass, valid until the next one; None if it has to run eagerly.

        batch.x may have another dtype than the layers compute in, as in `Backend.asarray`.
        """
        model = work.model
        capture = model.backend.graph_capture()
        if capture is None or self._fallback_reason or batch.has_no_rows or batch.x.nbytes > _LARGEST_INPUT:
            return None
        return uninterrupted(self._replayed, capture, work, batch) if model.context.group.size == 1 else None

    def drop(self) -> None:
        """Free the memory of all graphs."""
        self._kinds.clear()
        self._inputs = None

    def _replayed(self, capture: Any, work: InferencePass, batch: Batch) -> list[Array] | None:
        kind = self._kind_of(work, batch)
        kind.passes += 1
        if kind.passes <= _EAGER_PASSES:
            return None
        try:
            with capture.stream():
                if kind.graph is None:
                    if work.runs_user_code:
                        raise CaptureError("code that is not part of xpnet takes part")
                    self._inputs = self._inputs or Workspace(work.model.context)
                    kind.graph = _PassGraph(capture, work, batch, self._inputs)
                    return None
                return kind.graph.replay(work, batch)
        except Exception as error:  # of the device or of CuPy
            if work.model.backend.out_of_memory(error):
                self.drop()
            self._fall_back(reason_of(error))
            return None

    def _kind_of(self, work: InferencePass, batch: Batch) -> "_Kind":
        """The kind of a pass, which becomes the one that was used last. Drops a graph that is out of date."""
        described = _described(work, batch)
        kind = next((kind for kind in self._kinds if kind.described == described), None)
        if kind is None:
            kind = _Kind(described)
            if len(self._kinds) == _MAX_KINDS:
                self._drop(self._kinds[0])
        elif kind.graph is not None and kind.graph.is_outdated(work):
            self._drop(kind)
            kind = _Kind(described)
        else:
            self._kinds.remove(kind)
        self._kinds.append(kind)
        return kind

    def _drop(self, kind: "_Kind") -> None:
        self._kinds.remove(kind)
        self._unpaid += kind.graph is not None and kind.passes < _FEW_REPLAYS
        if self._unpaid > _MAX_UNPAID:
            self._fall_back("sizes of batches, or attributes, keep changing")

    def _fall_back(self, reason: str) -> None:
        self.drop()
        self._fallback_reason = reason
        _log.warning("predictions and evaluations are not captured and run eagerly, which is slower: %s", reason)


class _Kind:
    """Passes that compute the same from batches of one layout.

    passes: how many there were.  graph: of a pass; None until it is captured.
    """

    def __init__(self, described: tuple[Any, ...]) -> None:
        self.described, self.passes = described, 0
        self.graph: _PassGraph | None = None


def _described(work: InferencePass, batch: Batch) -> tuple[Any, ...]:
    context = work.model.context
    layout = [(name, a.shape, a.dtype) for name, a in _arrays_of(batch)]
    return layout, context.dtype, context.precision, work.loss, list(work.metrics)


def _arrays_of(batch: Batch) -> Iterator[tuple[str, Array]]:
    """The names and arrays of a batch, without those that it does not have."""
    for name in INPUTS:
        if (array := getattr(batch, name)) is not None:
            yield name, array


class _PassGraph:
    """The graph of an inference pass, with the arrays that it reads and writes."""

    def __init__(self, capture: Any, work: InferencePass, batch: Batch, inputs: Workspace) -> None:
        """Capture a pass, after a warm-up run. inputs: holds the arrays that this and other graphs read."""
        self._values = work.model.context.store.values
        self._attributes = [_attributes_of(thing) for thing in work.things]
        self._batch = replace(batch, **{name: inputs.buffer(name, a.shape, a.dtype) for name, a in _arrays_of(batch)})
        self._results: list[Array] = []
        self._graph, self._verified = capture.graph(), False
        self._load(batch)
        with self._graph.memory_pool():
            work(self._batch)  # compiles all kernels and allocates all memory
        self._graph.capture(lambda: self._results.extend(work(self._batch)))
        self._graph.hold(self._arrays(work))

    def _arrays(self, work: InferencePass) -> list[Array]:
        """All arrays that the graph may use, apart from those that it has allocated itself."""
        context, layers = work.model.context, list(every_layer(work.model))
        scratch = [array for key, array in context._scratch.items() if key[0]]  # of inference
        of_training = [context, *[layer._workspaces.get(False) for layer in layers]]
        roots = [*work.things, work.model._workspaces, self._values, self._batch, self._results, scratch]
        return reachable(context.backend.xp.ndarray, *roots, without=of_training)

    def is_outdated(self, work: InferencePass) -> bool:
        """Whether the model has moved, or an attribute that the pass may use has changed."""
        if work.model.context.store.values is not self._values:
            return True
        for now, count, constants in self._attributes:
            if len(now) != count:
                return True
            for name, value in constants.items():
                current = now.get(name)
                if current is not value and not same_item(current, value):
                    return True
        return False

    def replay(self, work: InferencePass, batch: Batch) -> list[Array]:
        """The results of this batch, valid until the next pass. Raises CaptureError if they are not those of `work`."""
        self._load(batch)
        eager = None if self._verified else [a.copy() for a in work(self._batch)]
        self._graph.replay()
        if eager is not None:
            if not all(_same_numbers(a, b) for a, b in zip(eager, self._results, strict=True)):
                raise CaptureError("the replay and the eager pass differ")
            self._verified = True
        return self._results

    def _load(self, batch: Batch) -> None:
        for name, array in _arrays_of(batch):
            getattr(self._batch, name)[...] = array


def _attributes_of(thing: Any) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """The attributes of an object, as they are at any time; their number now; and those that no pass sets, as now."""
    own = vars(thing)
    return own, len(own), {name: v for name, v in own.items() if name not in IGNORED and not holds_array(v)}


def _replaces_methods(thing: Any) -> bool:
    """Whether an attribute of the object takes the place of a method of its class."""
    return any(callable(value) and callable(getattr(type(thing), name, None)) for name, value in vars(thing).items())


def _same_numbers(a: Array, b: Array) -> bool:
    """Whether two arrays are equal, where NaN equals NaN. Waits for the device."""
    return bool(((a == b) | ((a != a) & (b != b))).all())
