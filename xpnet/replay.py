"""Updates that are recorded once and played again, on devices that can (see backends/gpu_graphs.py).

An update is recorded by doing it: the same code of layers, loss and optimiser runs once while the device takes notes.
What is Python in it is frozen, so a recording is trusted only after it has been seen to do what the code does, one
update later than it was made: with another batch, another learning rate, other noise. All else goes on call by call.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

from xpnet.backends import Array, Backend
from xpnet.data import Batch, Samples, Update
from xpnet.errors import RecordingError
from xpnet.layers.base import Workspace
from xpnet.step import Figures, Step

_log = logging.getLogger(__name__)

_KINDS = 8  # of updates, at most: each has a graph
_AGREE = 1e-3  # of the largest change that an update makes
_AGREE_HALF = 5e-2  # in half precision, whose rounding is coarse
_NOISE = 1e-4  # of the largest element of a gradient: less may be rounding
_GRADIENT = "the gradient"


class Player:
    """The updates of one run: each is done call by call, or played where its kind has been recorded.

    why_not: why nothing is recorded, or None.
    """

    def __init__(self, step: Step, streamed: bool) -> None:
        self._step, self._streamed = step, streamed
        alone = step.model.context.ranks.size == 1
        self._recorder = step.model.backend.recorder() if alone else None
        self._kinds: dict[tuple[Any, ...], Recording | None] = {}
        self._played = 0
        self.why_not: str | None = None
        if self._recorder is None:
            self.why_not = "this device records nothing" if alone else "ranks add up their gradients"
        if self._recorder:
            for metric in step.state.metrics:
                if not metric.starts_from_zeros:
                    self._give_up(f"the metric {metric.name} merges batches in a way of its own")

    @property
    def recorded(self) -> int:
        """How many kinds of updates are played by now; after `close`, how many were."""
        return self._played or sum(kind is not None and kind.trusted for kind in self._kinds.values())

    def close(self) -> None:
        """Give the memory of all graphs back: the run is over."""
        self._played = self.recorded
        self._kinds.clear()

    def __call__(self, update: Update, figures: Figures) -> None:
        """Train on these samples, and add to these figures."""
        if self._recorder is None:
            self._do(update, figures)
            return
        with self._step.model.working():
            recording = self._recording_of(update, figures) if self.why_not is None else None
            if recording is None:
                self._do(update, figures)
            elif recording.trusted:
                recording.play(update, figures)
            else:
                self._compare(recording, update, figures)

    def _do(self, update: Update, figures: Figures) -> None:
        self._step(update.batches(), update.total(), figures, update.several)

    def _recording_of(self, update: Update, figures: Figures) -> "Recording | None":
        """The recording of this kind of update, made where this is the second of its kind; None where there is none."""
        trained = tuple(p.trainable for p in self._step.model.context.store.parameters)
        arrays = tuple((a.dtype, a.shape[1:]) for a in update.samples.arrays)
        kind = (update.rows, update.size, trained, arrays)
        if kind not in self._kinds:
            if len(self._kinds) < _KINDS:
                self._kinds[kind] = None  # the first one makes all buffers
            return None
        made = self._kinds[kind]
        if made is not None and made.fits(update, figures):
            return made
        try:
            self._kinds[kind] = Recording(self._recorder, self._step, update, figures, self._streamed)
        except Exception as error:  # whatever the device, CuPy or a user's own layer has against it
            self._give_up(_reason(error))
        return None

    def _compare(self, recording: "Recording", update: Update, figures: Figures) -> None:
        """Play it and put everything back; then do the update, and see whether both came out alike."""
        step, refused = self._step, None
        before = Saved(step, figures)
        try:
            recording.launch(update, figures)
            played = before.changes()
        except Exception as error:
            refused = _reason(error)
        before.restore()
        self._do(update, figures)
        if refused is None:
            refused = before.disagreement(played, step.model.context.precision)
        if refused is None:
            recording.trusted = True
        else:
            self._give_up(refused)

    def _give_up(self, reason: str) -> None:
        self._kinds.clear()
        self.why_not = reason
        _log.warning("updates are not recorded as CUDA graphs, and run call by call, more slowly: %s", reason)


class Recording:
    """One kind of update: so many rows, in batches of one size, of samples of one layout."""

    trusted = False

    def __init__(self, recorder: Any, step: Step, update: Update, figures: Figures, streamed: bool) -> None:
        """Record it beside the training: what trying it out changes is put back."""
        self._step, samples = step, update.samples
        # The part of a stream is gone after it; the samples of each next one go where the recording looks for them.
        self._home = _copy(samples) if streamed else samples
        self._here, self._order = samples, _NOTHING
        self._tape = recorder.tape(len(samples), update.rows, update.several, figures.record)
        self._samples_of_step = Update(
            self._home, Workspace(step.model.context), self._tape.chosen, 0, update.rows, update.size
        )
        self._figures = figures.arrays
        before = Saved(step, figures)
        self._get_ready(update, figures)
        self._graph = recorder.graph()
        try:
            with _not_counted(step), self._graph.memory():
                self._once(figures)  # makes all kernels and memory there will be
        finally:
            before.restore()
        with _not_counted(step):
            self._graph.capture(lambda: self._once(figures))
        arrays = step.model.backend.xp.ndarray
        self._graph.hold(reachable(arrays, step, figures, self._tape, self._samples_of_step))

    def fits(self, update: Update, figures: Figures) -> bool:
        """Whether these samples have room where it reads them, and these figures are where it writes them."""
        here = update.samples is self._here or len(update.samples) <= len(self._home)
        now, then = figures.arrays, self._figures
        return here and now.keys() == then.keys() and all(now[name] is then[name] for name in now)

    def play(self, update: Update, figures: Figures) -> None:
        """Do this update."""
        self.launch(update, figures)
        memory = self._step.state.memory
        assert memory is not None
        self._step.model.context.at_step = memory.step  # as the code leaves it, for whoever asks for noise after this
        memory.step += 1
        figures.count(update.sizes, weighted=update.samples.weights is not None)

    def launch(self, update: Update, figures: Figures) -> None:
        """Let the device do it; nothing is counted here."""
        self._get_ready(update, figures)
        self._graph.launch()

    def _once(self, figures: Figures) -> None:
        """The update as it is recorded: of the samples that the tape has chosen, its figures left on the tape."""
        update = self._samples_of_step
        with self._tape.step():
            staged = _Staged(figures, self._tape.staged)
            self._step(update.batches(), update.total(), staged, update.several)

    def _get_ready(self, update: Update, figures: Figures) -> None:
        samples, tape = update.samples, self._tape
        if samples is not self._here:
            for home, array in zip(self._home.arrays, samples.arrays, strict=True):
                home[: len(array)] = array
            self._here, self._order = samples, _NOTHING
        if update.order is not self._order:
            xp = self._step.model.backend.xp
            tape.order[: len(samples)] = xp.arange(len(samples)) if update.order is None else update.order
            self._order = update.order
        tape.move_to(self._step.state.step, update.start, figures.steps)


_NOTHING: Any = object()


def reachable(kind: type, *things: Any) -> list[Any]:
    """All objects of this kind that can be reached from these: by attributes, containers and closures.

    It does not look into classes, modules, backends and other objects of this kind.
    """
    found, seen, waiting = [], set[int](), list(things)
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | Backend):
            continue
        seen.add(id(thing))
        if isinstance(thing, kind):
            found.append(thing)
        elif isinstance(thing, FunctionType):  # whose globals are the whole module
            waiting += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__]
        else:
            waiting += gc.get_referents(thing)
    return found


class _Staged:
    """Figures of an update that is being recorded: they go to the tape first."""

    def __init__(self, figures: Figures, staged: Array) -> None:
        self._figures, self._staged, self._column = figures, staged, 0

    def add(self, per_sample: Array, batch: Batch, outputs: Array) -> None:
        self._figures.take(self._staged, self._column, per_sample, batch, outputs)
        self._column += 1


class Saved:
    """All that an update changes, as it was, to be put back."""

    def __init__(self, step: Step, figures: Figures) -> None:
        store, memory, scaling = step.model.context.store, step.state.memory, step.state.scaling
        assert memory is not None
        self._backend = store.backend
        self._arrays = {"the weights": store.values, _GRADIENT: store.grads}
        self._arrays |= {f"the optimiser's {name}": vector for name, vector in memory.slots.items()}
        self._arrays |= {f"the buffer {buffer.name}": buffer.value for buffer in store.buffers}
        self._arrays |= {f"the {name}": array for name, array in figures.arrays.items()}
        if scaling is not None:
            self._arrays |= {"the loss scale": scaling.numbers, "its gate": scaling.gate}
        self._before = {name: array.copy() for name, array in self._arrays.items()}

    def restore(self) -> None:
        for name, array in self._arrays.items():
            array[...] = self._before[name]

    def changes(self) -> dict[str, Array]:
        """How much each array is more than it was; gradients as they are, which are nobody's sum."""
        return {
            name: array.copy() if name == _GRADIENT else array - self._before[name]
            for name, array in self._arrays.items()
        }

    def disagreement(self, played: dict[str, Array], precision: str | None) -> str | None:
        """What is otherwise now than it was after `played`, beyond rounding. Waits for the device.

        Where the gradient is nothing but rounding, as of a bias before a BatchNorm, Adam makes whole steps of it: that
        part of the weights, and of what the optimiser remembers, is left out.
        """
        xp, tolerance = self._backend.xp, _AGREE_HALF if precision in ("float16", "bfloat16") else _AGREE
        grads = xp.abs(self._arrays[_GRADIENT])
        told = grads > _NOISE * grads.max()
        for name, now in self.changes().items():
            if not now.size:
                continue
            apart, most = xp.abs(now - played[name]), float(xp.abs(now).max())
            apart = float((apart * told if apart.shape == told.shape else apart).max())
            rounding = 8.0 * 2.0**-23 * float(xp.abs(self._before[name]).max())
            if not apart <= tolerance * most + rounding and most == most:
                return (
                    f"played, it left {name} otherwise than the code did, by {apart:.3g} where it changed by {most:.3g}"
                )
        return None


@contextmanager
def _not_counted(step: Step) -> Iterator[None]:
    memory = step.state.memory
    assert memory is not None
    before = memory.step
    try:
        yield
    finally:
        memory.step = before


def _copy(samples: Samples) -> Samples:
    def copy(array: Array | None) -> Array | None:
        return None if array is None else array.copy()

    weights, counts = copy(samples.weights), copy(samples.counts)
    return replace(samples, x=samples.x.copy(), y=samples.y.copy(), weights=weights, counts=counts)


#: What CuPy and CUDA say of a call that cannot be captured, and what it means.
_REFUSALS = {
    "D2H transfers": "the step reads numbers of the device",
    "H2D transfers": "the step copies an array from the host",
    "synchronous API calls": "the step waits for the device, or copies to or from it",
    "during stream capture": "the step calls a CUDA library through CuPy; backend.matmul does not",
    "StreamCapture": "the step asks for what a CUDA graph cannot hold",
}


def _reason(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, RecordingError):
        return str(error)
    meaning = next((meaning for words, meaning in _REFUSALS.items() if words in text), None)
    return text if meaning is None else f"{meaning} ({text})"
