"""Captured steps: a training step is captured once, and replayed from then on.

To capture a step, its layers, loss and optimizer are run once while their calls are recorded. Whatever Python computes
in that run is a constant in all replays. So a captured step is used only after a replay, one step later, did the same
as the eager step: with another batch, another learning rate and other noise. All other steps run eagerly.

On the CPU a captured step is a list of calls (`replayed_step.py`). On a GPU it is a CUDA graph (`graph_step.py`), which
rounds differently from an eager step. So there, the first step of a kind is replayed too, in place of the eager step: a
run that resumes computes the same bits as one that never stopped.
"""

import logging
import os
from contextlib import nullcontext
from operator import attrgetter
from typing import Any, NamedTuple

from xpnet.backends import Array
from xpnet.concurrency.interrupts import uninterrupted
from xpnet.data.dataset import StepData
from xpnet.errors import CaptureError
from xpnet.layers.containers import every_layer
from xpnet.parameters import Snapshot
from xpnet.training.attributes import Attributes
from xpnet.training.audit import audited_step
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.graph_step import GraphStep
from xpnet.training.replayed_step import ReplayedStep, free_workspaces
from xpnet.training.snapshots import GRADIENT, follow_new_sums, snapshot
from xpnet.training.step import TrainingStep

_log = logging.getLogger(__name__)
_TRAINABLE, _FLAG = attrgetter("trainable"), attrgetter("_trainable")

_FEW_STEPS = 50  # on the CPU, fewer replays of a small model save less time than capturing takes
_MIN_STEPS = 12  # of a kind in a run on a GPU: capturing one takes about as long as this many eager steps
_MAX_KINDS = 8  # of a run: one for each kind of step, and each holds memory
_MAX_UNUSED = 4  # captured steps that were never replayed, because attributes keep changing
_CHECKED_EVERY = 100  # replays between two checks of the attributes, if only other threads can change them
#: By precision: how much two steps may differ, as a part of the largest change that a step makes; and the rounding
#: error of a gradient, as a part of its largest element.
_TOLERANCES = {"float32": (1e-3, 1e-6), "tf32": (1e-2, 1e-3), "bfloat16": (5e-2, 1e-2), "float16": (5e-2, 1e-2)}
_FEW_ULPS = 8.0 * 2.0**-23  # 8 units in the last place of float32

#: What CuPy and CUDA say about a call that cannot be captured, and what it means.
_CAPTURE_ERRORS = {
    "D2H transfers": "the step reads values from the device",
    "H2D transfers": "the step copies an array from the host",
    "synchronous API calls": "the step waits for the device, or copies to or from it",
    "during stream capture": "the step calls a CUDA library through CuPy; backend.matmul does not",
    "StreamCapture": "the step makes a call that a CUDA graph cannot contain",
}


class StepsToCome(NamedTuple):
    """What is left of a run: `epochs` epochs, each with `steps` steps of `rows` rows and at most one other step.

    all_epochs: of the whole run, with those before it was resumed.
    """

    epochs: int
    all_epochs: int
    steps: int
    rows: int

    def of(self, rows: int) -> int:
        """About how many steps with this number of rows are left."""
        return self.epochs * self._in_an_epoch(rows)

    def in_all(self, rows: int) -> int:
        """About how many steps with this number of rows the whole run has."""
        return self.all_epochs * self._in_an_epoch(rows)

    def _in_an_epoch(self, rows: int) -> int:
        return self.steps if rows == self.rows else 1


class StepExecutor:
    """Runs the steps of one run: eagerly, or by a replay if this kind of step has been captured.

    fallback_reason: why no step is captured, or None.
    """

    def __init__(self, step: TrainingStep, streaming: bool, user_code: bool = False) -> None:
        """step: what to run.  streaming: whether the dataset is a stream.

        user_code: whether code that is not part of xpnet runs after each step. It may change anything, so attributes
        are compared before each step. For each new window of a stream they are compared anyway.
        """
        self._step, self._streaming, self._user_code = step, streaming, user_code
        self._to_come: StepsToCome | None = None
        backend, model = step.model.backend, step.model
        single = model.context.group.size == 1
        self._capture = backend.graph_capture() if single else None
        self._on_cpu = single and backend.replays_calls and not is_turned_off()
        region = model.execution_context() if self._on_cpu else None  # outside of any other
        self._region = None if isinstance(region, nullcontext) else region
        self._kinds: dict[tuple[Any, ...], ReplayedStep | GraphStep | int] = {}  # or how many steps ran eagerly
        self._ready: dict[int, ReplayedStep | GraphStep] = {}  # steps to replay without further checks, by their rows
        self._latest: ReplayedStep | GraphStep | None = None  # if only it has changed the weights since
        self._until_check, self._unused = _CHECKED_EVERY, 0
        self._attributes: Attributes | None = None  # as they were captured
        self._captured, self._first = 0, True
        self.fallback_reason: str | None = None
        own = [metric for metric in step.state.metrics if not metric.starts_from_zeros]
        if not single:
            self.fallback_reason = "several ranks sum their gradients"
        elif self._capture is None and is_turned_off():
            self.fallback_reason = "the environment variable XPNET_CAPTURE=0 turns captures off"
        elif self._capture is None and not self._on_cpu:
            self.fallback_reason = "this device does not capture steps"
        elif own:
            does = "collects the outputs of all samples" if own[-1].collects else "merges batches in its own way"
            self.fallback_reason = f"the metric {own[-1].name} {does}"
        if self._capture is not None and self.fallback_reason is not None:
            _warn(self.fallback_reason)

    @property
    def captured(self) -> int:
        """How many kinds of steps are replayed now; after `close`, how many were."""
        return self._captured or sum(not isinstance(kind, int) and kind.verified for kind in self._kinds.values())

    def begin_epoch(self, to_come: StepsToCome | None, user_code: bool) -> None:
        """Begin an epoch.

        to_come: what is left of the run, if that is known.  user_code: whether user code has run since the last epoch.
        """
        self._to_come, self._latest = to_come, None
        if user_code:
            self._until_check = 0

    def close(self) -> None:
        """Free the memory of all captured steps: the run is over."""
        self._captured = self.captured
        self._drop()

    def __call__(self, data: StepData, metrics: EpochMetrics) -> None:
        """Train on these samples, and add to these metrics."""
        ready = self._ready.get(data.rows)
        if ready is None or self._until_check <= 0 or not ready.is_ready(data, metrics):
            self._run(data, metrics)
            return
        self._until_check -= 1
        if ready is not self._latest:
            ready.stale, self._latest = True, ready
        if self._region is None:
            ready.replay(data, metrics)
            return
        with self._region:
            ready.replay(data, metrics)

    def _run(self, data: StepData, metrics: EpochMetrics) -> None:
        self._latest = None
        if self._until_check <= 0:
            self._ready.clear()  # also those of other kinds, for which something else may have changed
        if self.fallback_reason is not None:
            self._run_eagerly(data, metrics)
            return
        if self._streaming:
            for kind in self._kinds.values():
                if not isinstance(kind, int):
                    kind.keep_only(data.dataset)
        metrics.reserve(data.batch_count)  # a graph writes into the array that it was captured with
        with self._step.model.execution_context():
            # A device that is left capturing, or a step that is undone in part, cannot be used.
            captured = uninterrupted(self._captured_step, data, metrics)
            if captured is not None:
                captured.stale = True
            if captured is None:
                self._run_eagerly(data, metrics)
            elif captured.verified:
                captured.replay(data, metrics)
                self._unused = 0
            else:
                uninterrupted(self._compare, captured, data, metrics)
        if captured is not None and captured.verified and not self._user_code:
            self._ready[data.rows] = captured
        else:
            self._ready.pop(data.rows, None)

    def _run_eagerly(self, data: StepData, metrics: EpochMetrics) -> None:
        if self._first:
            self._first = False
            with audited_step(self._step):
                self._run_eagerly(data, metrics)
            return
        self._step(data.batches(), data.total_weight(), metrics.add, data.batch_count)

    def _captured_step(self, data: StepData, metrics: EpochMetrics) -> "ReplayedStep | GraphStep | None":
        """The captured step of this kind, or None."""
        self._until_check = _CHECKED_EVERY
        if self._attributes is not None and (changed := self._attributes.changed()):
            self._forget(changed)
            if self.fallback_reason is not None:
                return None
        model = self._step.model  # a frozen BatchNorm computes otherwise, and may have no parameters
        trained = (*map(_TRAINABLE, model.context.store.parameters), *map(_FLAG, every_layer(model)))
        arrays = tuple((a.dtype, a.shape[1:]) for a in data.dataset.arrays.values())
        kind = (data.rows, data.batch_size, trained, arrays, data.order is None)
        captured = self._kinds.get(kind, 0)
        if not isinstance(captured, int) and captured.fits(data, metrics):
            return captured
        if captured == 0 and len(self._kinds) >= _MAX_KINDS:
            return None
        return (self._captured_on_cpu if self._on_cpu else self._captured_on_gpu)(kind, data, metrics)

    def _captured_on_cpu(self, kind: tuple[Any, ...], data: StepData, metrics: EpochMetrics) -> None:
        """Capture the second step of a kind, and again if its arrays have changed, if that pays. The step is eager."""
        eager = self._kinds.get(kind, 0)
        steps = None if self._to_come is None else self._to_come.of(data.rows)
        if isinstance(eager, int):
            steps = eager if steps is None else steps
            if eager == 0 or steps < _FEW_STEPS:  # the first step of a kind allocates all buffers
                self._kinds[kind] = eager + 1
                return
        try:
            self._kinds[kind] = ReplayedStep(self._step, data, metrics, self._streaming, steps)
            self._attributes = Attributes(self._step)
        except Exception as error:  # of a user's layer
            self._fall_back(reason_of(error))

    def _captured_on_gpu(self, kind: tuple[Any, ...], data: StepData, metrics: EpochMetrics) -> GraphStep | None:
        """A step of this kind that `launch` will capture; None if capturing it does not pay."""
        if self._to_come is not None and self._to_come.in_all(data.rows) < _MIN_STEPS:
            return None
        captured = self._kinds[kind] = GraphStep(self._capture, self._step, data, metrics, self._streaming)
        return captured

    def _forget(self, changed: str) -> None:
        """Drop all captured steps, which were captured before this attribute was changed."""
        self._drop()
        self._unused += 1
        if self._unused > _MAX_UNUSED:
            self._fall_back(f"{changed} keeps changing between steps")

    def _compare(self, captured: "ReplayedStep | GraphStep", data: StepData, metrics: EpochMetrics) -> None:
        """Run the step eagerly and undo it; then replay it. Undo the replay unless both did the same."""
        step, reason = self._step, None
        states, number, column = snapshot(step, metrics), step.state.step, metrics.column
        self._run_eagerly(data, metrics)
        follow_new_sums(states, metrics)
        changes = {} if self._on_cpu else _changes(step, states)
        states.swap()  # the copies are now those after the eager step
        try:
            if self._on_cpu:
                free_workspaces(step.model)
            captured.launch(data, number, column, metrics)
            reason = _difference(states) if self._on_cpu else _disagreement(step, states, changes)
            if captured.comparisons == 0:
                self._attributes = Attributes(step)
        except Exception as error:  # of the device, of CuPy or of a user's layer
            reason = reason_of(error)
        step.model.context.begin_step(number)  # for passes in callbacks, since the capture was a step too
        if reason is None:
            captured.comparisons += 1
        else:
            states.restore()
            self._fall_back(reason)

    def _drop(self) -> None:
        """Forget all captured steps, and the attributes with which they were captured."""
        self._kinds.clear()
        self._ready.clear()
        self._attributes = self._latest = None

    def _fall_back(self, reason: str) -> None:
        self._drop()
        self.fallback_reason = reason
        if self._capture is not None or reason not in _told:
            _told.add(reason)
            _warn(reason)


def is_turned_off() -> bool:
    """Whether the environment says that nothing is to be captured."""
    return os.environ.get("XPNET_CAPTURE") == "0"


def _warn(reason: str) -> None:
    _log.warning("training steps are not captured and run eagerly, which is slower: %s", reason)


_told: set[str] = set()  # reasons on the CPU, where an eager step costs little: each is told once per process


def _difference(states: Snapshot) -> str | None:
    """A sentence if the arrays differ in a single bit from their copies, after the eager step, else None."""
    for name, array in states.arrays().items():
        if not same_bits(array, states.copies[name]):
            return f"the replay and the eager step differ in {name}"
    return None


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays have the same bits, apart from those of a NaN. Waits for the device."""
    bits = f"u{a.itemsize}"
    return bool(((a.view(bits) == b.view(bits)) | ((a != a) & (b != b))).all())


class _Change(NamedTuple):
    """How a step changes an array: the changes, the largest one, and the largest element before."""

    array: Array
    most: float
    size: float


def _changes(step: TrainingStep, states: Snapshot) -> dict[str, _Change]:
    """What a step has changed, by the names of the arrays."""
    changes = {}
    for name, array in states.arrays().items():
        array, before, xp = _own(step, array), _own(step, states.copies[name]), step.model.backend.xp
        if array.size:
            change = array.copy() if name == GRADIENT else array - before
            changes[name] = _Change(change, float(xp.abs(change).max()), float(xp.abs(before).max()))
    return changes


def _own(step: TrainingStep, array: Array) -> Array:
    """The array. If other models share it, with zeros in place of their parameters, which the step does not change."""
    store = step.model.context.store
    if array.shape != store.grads.shape or len(store.family) == 1:
        return array
    own = step.model.backend.xp.zeros_like(array)
    for part in store.slices(lambda parameter: True):
        own[part] = array[part]
    return own


def _parts(step: TrainingStep, array: Array) -> list[Array]:
    """The part of each parameter if this is an array of all parameters, else the whole array; flat."""
    store = step.model.context.store
    if array.shape == store.grads.shape:
        return [array[parameter.slot] for parameter in store.parameters]
    return [array.reshape(-1)]


def _norm(xp: Any, a: Array) -> float:
    return float(xp.sqrt(xp.sum(xp.square(a.astype("float64")))))


def _disagreement(step: TrainingStep, states: Snapshot, changes: dict[str, _Change]) -> str | None:
    """A sentence if arrays differ by more than rounding from their copies, after the eager step. Waits for the device.

    Rounding has two effects that are larger than itself. Adam turns a small gradient into a full step, and with it the
    rounding error of the gradient; so the weights and the optimizer's state may differ more where the gradient is
    small, such as that of a bias before a BatchNorm. And where the input of a ReLU is almost 0, or two pixels of a
    max-pooling window are almost equal, rounding decides which way the gradient of one sample takes. So a few elements
    may differ more, if the norm of what they differ by is small for each parameter.
    """
    xp, (tolerance, rounding) = step.model.backend.xp, _TOLERANCES[step.model.context.precision or "float32"]
    grads = xp.abs(_own(step, states.copies[GRADIENT]))
    relative_error = rounding * grads.max() / xp.maximum(grads, 1e-30)
    for name, (change, most, size) in changes.items():
        difference = xp.abs(_own(step, states.arrays()[name]) - _own(step, states.copies[name]))
        of_parameters = difference.shape == grads.shape and name != GRADIENT
        share = tolerance + relative_error if of_parameters else tolerance
        allowed = share * most + _FEW_ULPS * size
        if most != most or bool((difference <= allowed).all()):
            continue
        excess = xp.where(difference <= allowed, 0.0, difference - allowed)  # NaN stays
        pairs = zip(_parts(step, excess), _parts(step, change), strict=True)
        if not all(_norm(xp, rest) <= tolerance * _norm(xp, part) for rest, part in pairs):
            largest = float(xp.where(difference <= allowed, 0.0, difference).max())
            return (
                f"the replay and the eager step differ in {name} by {largest:.3g}; the eager step changed it by "
                f"{most:.3g}"
            )
    return None


def reason_of(error: Exception) -> str:
    """Why a step that raises this error cannot be captured."""
    if isinstance(error, CaptureError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    meaning = next((meaning for words, meaning in _CAPTURE_ERRORS.items() if words in text), None)
    return text if meaning is None else f"{meaning} ({text})"
