"""The loops around the training step: fit, one batch, evaluation."""

import contextlib
import functools
import logging
import math
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import numpy

from xpnet import losses, metrics, optimizers, resume
from xpnet.backends import get_backend
from xpnet.callbacks import Callback, Checkpoint, EpochLines, ProgressBar
from xpnet.data import Samples, prepare, total_weight
from xpnet.errors import ArgumentError, ArgumentTypeError, DistributedError, DivergenceError
from xpnet.layers.base import Workspace
from xpnet.layers.containers import Sequential
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.optimizers import Optimizer
from xpnet.ranks import ALONE, Ranks
from xpnet.run import History, Run
from xpnet.step import Figures, Step, TrainingState
from xpnet.streams import Stream, Streamed, streamed

_log = logging.getLogger(__name__)

_EVALUATION_BATCH = 1024


def fit(model: Sequential, state: TrainingState, x: Any, y: Any, *, ranks: Ranks = ALONE, **options: Any) -> History:
    """The work of `Sequential.fit`: see there. `options` are those of `_begin`."""
    begin = functools.partial(_begin, model, state, x, y, ranks=ranks, **options)
    ranks.bind(model.backend)
    model.context.ranks = ranks
    try:
        run, validation, resumed = ranks.together(begin)
        _refuse_disagreement(run)
        return _train(run, validation, resumed)
    finally:
        model.context.ranks = ALONE


def _begin(
    model: Sequential,
    state: TrainingState,
    x: Any,
    y: Any,
    *,
    loss: str | Loss,
    optimizer: str | Optimizer,
    epochs: int,
    batch_size: int | None,
    validation_data: Sequence[Any] | None,
    validation_split: float,
    metrics: Any,
    callbacks: Sequence[Callback],
    shuffle: bool,
    sample_weight: Any,
    class_weight: Any,
    accumulate: int,
    resume_from: Any,
    verbose: int,
    ranks: Ranks,
) -> tuple[Run, Samples | Streamed | None, Any]:
    """All that may be refused: the run, the set to validate on, and what a checkpoint has for each callback."""
    for name, value in (("epochs", epochs), ("accumulate", accumulate), ("batch_size", batch_size)):
        if name != "batch_size" or value is not None:
            whole_number(name, value)
    chosen, measured = choose(model, loss, metrics, stacklevel=7)  # at the call of fit
    if not all(metric.scalar for metric in measured):
        raise ArgumentError("a history holds numbers only: ask evaluate() for the confusion matrix.")
    (x, y, sample_weight), held_out = _split(x, y, sample_weight, validation_data, validation_split)
    weights = class_weight if class_weight is not None else chosen.class_weight
    data = take_in(model, x, y, chosen, measured, sample_weight, weights)
    validation = None
    if held_out is not None:
        x, y, sample_weight = held_out
        names = ("validation x", "validation y")
        validation = take_in(model, x, y, chosen, measured, sample_weight, chosen.class_weight, names)
    if isinstance(data, Streamed):
        data.refuse_what_cannot_be(epochs, batch_size, resume_from is not None)
    if isinstance(validation, Streamed):
        validation.refuse_what_cannot_be(epochs, _EVALUATION_BATCH, resume_from is not None)
    everyone = _with_progress(callbacks, verbose)
    if ranks.rank:
        everyone = [callback for callback in everyone if not callback.only_on_first_rank]
    state.begin(model.context, chosen, measured, optimizers.get(optimizer))
    run = Run(model, state, data, everyone, epochs, batch_size, accumulate, shuffle, ranks)
    return run, validation, None if resume_from is None else resume.restore(resume_from, run)


def _train(run: Run, validation: Samples | Streamed | None, resumed: Any) -> History:
    """The epochs of a run."""
    model, state, ranks, history, everyone = run.model, run.state, run.ranks, run.history, run.callbacks
    assert state.loss is not None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quietly())
        interrupted = stack.enter_context(_interruptible())
        state.running = True
        stack.callback(setattr, state, "running", False)
        stack.callback(run.player.close)
        stack.enter_context(model.backend.telling_of_compiling(functools.partial(_show_compiling, everyone)))
        for callback, memory in resumed or [(callback, None) for callback in everyone]:
            callback.run = run
            stack.callback(callback.on_train_end, model)
            if memory is None:
                callback.on_train_begin(model)
            else:
                callback.on_resume(model, memory)
        while state.epoch < run.first_epoch + run.epochs and history.stopped is None:
            run.begin_epoch()
            for callback in everyone:
                callback.on_epoch_begin(model, state.epoch)
            for _ in run.epoch():
                for callback in everyone:
                    callback.on_step_end(model, state.step)
                if _agree_to_stop(run, interrupted):
                    break
            assert run.figures is not None
            figures = run.figures.joined(ranks)
            _refuse_divergence(run, figures)
            if interrupted.is_set():
                history.stopped = "interrupted"
            if interrupted.is_set() and not run.complete:
                _log.warning("training interrupted in epoch %d; the model keeps what it has learnt", state.epoch + 1)
                break
            logs = figures.read()
            if validation is not None:
                figures = measured_figures(model, validation, state.loss, state.metrics, _EVALUATION_BATCH, ranks)
                logs |= {f"val_{k}": v for k, v in figures.joined(ranks).read().items()}
            logs = ranks.of_first(logs)
            state.epoch += 1
            history.add(logs, run.elapsed())
            history.compile_seconds = run.compile_seconds()
            run.under_way = False
            for callback in everyone:
                callback.on_epoch_end(model, state.epoch - 1, logs)
            _agree_to_stop(run, interrupted)
    return history


def _agree_to_stop(run: Run, interrupted: threading.Event) -> bool:
    """Whether any rank wants to stop: by Ctrl-C, or because a callback has said so. Then all of them do."""
    ranks, history = run.ranks, run.history
    if not ranks.any(interrupted.is_set() or history.stopped is not None):
        return False
    if any(ranks.gather(interrupted.is_set())):
        interrupted.set()
    history.stopped = next((why for why in ranks.gather(history.stopped) if why is not None), None)
    return True


def train_on_batch(model: Sequential, state: TrainingState, data: Samples) -> dict[str, float]:
    """One update from these samples as one batch; the figures from before it, the loss as it defines itself."""
    figures = Figures(model, state.metrics, steps=1)
    xp = model.backend.xp
    total = len(data) if data.weights is None else total_weight(xp, data.weights)
    batches = data.batches(Workspace(model.context), len(data))
    step, buffers = Step(model, state), model.context.store.buffers
    before = [buffer.value.copy() for buffer in buffers]
    with _quietly(), model.working():
        step.gradients(batches, total, figures)
        logs = figures.read(as_sum=step.loss.reduction == "sum")
        overflowed = _first_not_finite(model)
        if overflowed is not None or not math.isfinite(logs["loss"]):
            for buffer, value in zip(buffers, before, strict=True):
                buffer.value[...] = value
            what = f"{overflowed} became NaN or infinite" if overflowed else f"the loss is {logs['loss']}"
            raise DivergenceError(
                f"{what} before update {state.step + 1}, which is left out: scale the inputs, or "
                f"start again with a learning rate below {state.learning_rate:g}."
            )
        step.update()
    return logs


def measure(
    model: Sequential,
    data: Samples | Streamed,
    loss: Loss,
    metrics: Sequence[Metric],
    batch_size: int | None = _EVALUATION_BATCH,
    as_sum: bool = False,
) -> dict[str, Any]:
    """Loss and metrics of a set, by passes without a way back, in a workspace of their own."""
    return measured_figures(model, data, loss, metrics, batch_size).read(as_sum)


def measured_figures(
    model: Sequential,
    data: Samples | Streamed,
    loss: Loss,
    metrics: Sequence[Metric],
    batch_size: int | None,
    ranks: Ranks = ALONE,
) -> Figures:
    """The same before they are read: of several ranks, each has those of its own samples."""
    size = batch_size or (len(data) if isinstance(data, Samples) else _EVALUATION_BATCH)
    figures = Figures(model, metrics)
    for batch in data.batches(Workspace(model.context), size, ranks=ranks):
        outputs = model.run(batch.x, inference=True)
        per_sample = loss.samples(model.backend, outputs, batch.y)
        figures.add(per_sample, batch, outputs)
    return figures


def _refuse_disagreement(run: Run) -> None:
    """Raise DistributedError where ranks were given different models, data or arguments; then all begin alike."""
    ranks, store, state = run.ranks, run.model.context.store, run.state
    if ranks.size == 1:
        return
    told = ranks.gather(resume.what_ranks_share(run))
    for rank, other in enumerate(told):
        for name, value in other.items():
            if value != told[0][name]:
                raise DistributedError(
                    f"rank {rank} has {name} = {value}, but rank 0 has {told[0][name]}: give every rank the same."
                )
    assert state.memory is not None
    for array in (store.values, *state.memory.slots.values(), *(buffer.value for buffer in store.buffers)):
        ranks.copy_from_first(array)
    if not run.under_way:
        run.start.take()


def choose(model: Sequential, loss: Any, metrics_wanted: Any, stacklevel: int = 4) -> tuple[Loss, list[Metric]]:
    """The loss and the metrics meant, with a warning where loss and last layer do not go together."""
    chosen = losses.get(loss)
    if chosen.takes_logits and model.gives_probabilities:
        warnings.warn(
            f"{type(chosen).__name__} takes logits, but the model ends in probabilities: leave out its layer "
            f"{_layer_of_probabilities(model)}; the loss does its work.",
            UserWarning,
            stacklevel=stacklevel,
        )
    return chosen, metrics.get(metrics_wanted, chosen)


def take_in(
    model: Sequential,
    x: Any,
    y: Any,
    loss: Loss,
    measured: Sequence[Metric],
    sample_weight: Any = None,
    class_weight: Any = None,
    names: tuple[str, str] = ("x", "y"),
) -> Samples | Streamed:
    """A set, checked against the model, the loss and the metrics: at once, or where it is a stream, as it comes."""

    def checked(x: Any, y: Any, sample_weight: Any, names: tuple[str, str], whole: bool = False) -> Samples:
        data = prepare(model, x, y, loss, sample_weight, class_weight, names, whole)
        for metric in measured:
            metric.check_targets(data.y, (len(data), *model.output_shape))
        return data

    x, y, sample_weight = streamed(x, y, sample_weight)
    if isinstance(x, Stream):
        return Streamed(x, checked)
    if y is None:
        raise ArgumentTypeError(
            f"{names[1]} is missing: give targets, or as {names[0]} a datasets.Stream that holds both."
        )
    return checked(x, y, sample_weight, names, whole=True)


def _split(
    x: Any, y: Any, sample_weight: Any, validation_data: Any, validation_split: float
) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any] | None]:
    """((x, y, weights) to train on, the same to validate on or None). A split holds out the last part."""
    if validation_data is not None:
        if validation_split:
            raise ArgumentError("give validation_data or validation_split, not both.")
        if not isinstance(validation_data, list | tuple) or len(validation_data) not in (2, 3):
            raise ArgumentError("validation_data must be (x, y) or (x, y, sample_weight).")
        x_val, y_val, weight_val = (*validation_data, None)[:3]
        return (x, y, sample_weight), (x_val, y_val, weight_val)
    if validation_split == 0:
        return (x, y, sample_weight), None
    if isinstance(x, Stream):
        raise ArgumentError("validation_split cannot cut a stream: keep some samples apart and give validation_data.")
    if not isinstance(validation_split, int | float) or not 0 < validation_split < 1:
        raise ArgumentError(f"validation_split must be at least 0 and below 1, not {validation_split}.")
    if not hasattr(x, "__len__"):
        x = get_backend("cpu").asarray(x)
    count = len(x)
    cut = count - round(count * validation_split)
    if not 0 < cut < count:
        raise ArgumentError(f"validation_split={validation_split} of {count} samples leaves one part empty.")
    head, tail = slice(None, cut), slice(cut, None)
    parts = [[None if a is None else _slice(a, part) for a in (x, y, sample_weight)] for part in (head, tail)]
    return tuple(parts[0]), tuple(parts[1])  # type: ignore[return-value]


def _slice(a: Any, part: slice) -> Any:
    if hasattr(a, "iloc"):  # of a pandas frame, a[part] would be columns
        return a.iloc[part]
    return a[part] if hasattr(a, "__getitem__") else get_backend("cpu").asarray(a)[part]


def _with_progress(callbacks: Sequence[Callback], verbose: int) -> list[Callback]:
    if verbose not in (0, 1, 2):
        raise ArgumentError(f"verbose must be 0, 1 or 2, not {verbose!r}.")
    callbacks = [callbacks] if isinstance(callbacks, Callback) else callbacks or ()
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ArgumentTypeError(f"callbacks must be Callback objects, not {callback!r}.")
    everyone = list(callbacks)
    if verbose == 1 and not any(isinstance(c, ProgressBar) for c in everyone):
        everyone.append(ProgressBar())
    if verbose == 2:
        everyone.append(EpochLines())
    return sorted(everyone, key=lambda c: isinstance(c, Checkpoint))  # last, to see what the others remember


def _show_compiling(callbacks: Sequence[Callback]) -> None:
    for callback in callbacks:
        if isinstance(callback, ProgressBar):
            callback.show_compiling()


def _refuse_divergence(run: Run, figures: Figures) -> None:
    step, what = figures.first_non_finite(), "loss"
    if step is None:
        values = run.model.context.store.values
        overflowed = _first_not_finite(run.model)
        if overflowed is None and bool(run.model.backend.xp.isfinite(values).all()):
            return
        what = overflowed or "weights"
        step = (
            figures.steps - 1
        )  # the last update, whose loss nobody has seen yet; or some step, seen at the epoch's end
    state = run.state
    assert state.memory is not None
    epoch, rate = state.epoch, state.learning_rate
    run.history.stopped = "diverged"
    run.start.restore()
    state.memory.step = run.first_step
    if what == "loss" and state.step == 0 and step == 0:
        cause = "before any update, so the inputs or the initial weights are too large: scale the inputs"
    else:
        cause = (
            f"most likely because the learning rate is too high ({rate:g} by then): lower it, or clip the gradient "
            "with clip_norm"
        )
    of_all = f" of {run.steps}" if run.steps else ""
    raise DivergenceError(
        f"the {what} became NaN or infinite in epoch {epoch + 1}, at step {step + 1}{of_all}, {cause}. "
        "The model holds the weights of the epoch's start again."
    )


def _first_not_finite(model: Sequential) -> str | None:
    """The name of a buffer, such as a running variance, that holds NaN or infinity. Reads the device."""
    for buffer in model.context.store.buffers:
        if not bool(model.backend.xp.isfinite(buffer.value).all()):
            return buffer.name
    return None


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; a second one raises KeyboardInterrupt. Only in the main thread."""
    event = threading.Event()
    default = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or default is not signal.default_int_handler:
        yield event
        return

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, default)

    signal.signal(signal.SIGINT, ask_to_stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, default)


def _quietly() -> numpy.errstate:
    """A GPU does not warn of overflow, so neither does training on the CPU: the loss shows it, and is watched."""
    return numpy.errstate(over="ignore", invalid="ignore", divide="ignore")


def _layer_of_probabilities(model: Sequential) -> str:
    """The name of the last layer that does not merely pass on what comes."""
    layer: Any = model
    while isinstance(layer, Sequential):
        layer = next(inner for inner in reversed(layer.layers) if inner.accepts_integers is not None)
    return type(layer).__name__


def whole_number(name: str, value: Any) -> None:
    """Refuse what is not an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | numpy.integer) or value < 1:
        raise ArgumentError(f"{name} must be a whole number of at least 1, not {value!r}.")
