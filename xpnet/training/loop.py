"""The training loop: epochs of steps, validation, callbacks; and a single step on one batch."""

import contextlib
import functools
import logging
import math
import os
import threading
from collections.abc import Callable
from typing import Any

from xpnet import optimizers
from xpnet.backends import Array
from xpnet.callbacks import Callback
from xpnet.concurrency.forks import held_in_forks
from xpnet.concurrency.interrupts import interrupts, take_press, uninterrupted
from xpnet.data.dataset import Dataset, total_weight
from xpnet.data.preparation import structure_of
from xpnet.data.streaming import EVALUATION_BATCH, AnyDataset, StreamingDataset
from xpnet.distributed.process_group import SINGLE_PROCESS
from xpnet.errors import ArgumentError, DataError, DivergenceError, StateError
from xpnet.layers.containers import Container
from xpnet.layers.context import Workspace
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.optimizers import Optimizer
from xpnet.training.arguments import FitOptions, choose_loss_and_metrics, load_dataset, warn
from xpnet.training.audit import audited_step, audited_update
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.evaluation import evaluate
from xpnet.training.resuming import Rollback, refuse_unequal_settings
from xpnet.training.run import INTERRUPTED, Run
from xpnet.training.state import TrainingState
from xpnet.training.step import TrainingStep, ignoring_float_errors
from xpnet.training.target_scale import warn_of_unscaled_targets

_log = logging.getLogger(__name__)

#: Sets and returns the model's training state for this loss, these metrics and this optimizer.
BeginTraining = Callable[[Loss, list[Metric], Optimizer], TrainingState]
CallbackStates = list[tuple[Callback, dict[str, Any] | None]]

_attaching = held_in_forks(threading.Lock())


def fit(
    model: Container,
    begin: BeginTraining,
    x: Any,
    y: Any,
    sample_weight: Any,
    options: FitOptions,
    rollback: Callable[[], Rollback],
) -> Run:
    """What `BaseModel.fit` does with a built model, in `interrupts.deferring`.

    rollback: copies the model before a checkpoint is loaded. It is restored if the checkpoint is refused.
    """
    group, backend, context, training = options.group, model.backend, model.context, object()
    guard = context.guard
    try:
        with guard.lock:
            guard.begin_training(training)
            guard.stream = backend.current_stream()
            backend.wait_for(None)  # passes of other threads
        group.bind(backend)
        context.group = group
        with contextlib.ExitStack() as trial, contextlib.ExitStack() as undo:
            options = group.run_on_all(options.checked)
            if options.resume_from is not None:
                undo.callback(rollback().restore)
            if options.is_trial:
                trial.callback(uninterrupted, rollback().restore)
            run, validation, states = group.run_on_all(lambda: _prepare(model, begin, x, y, sample_weight, options))
            if group.size > 1:
                refuse_unequal_settings(group, run.rank_settings())
                _broadcast_model(run)
            _train(run, validation, states, accepted=undo.pop_all)
            return run
    finally:
        interrupts.patience = math.inf
        with guard.lock, backend.in_turn(None):
            if guard.end_training(training):
                context.group, context.first_row, context.has_no_rows = SINGLE_PROCESS, 0, False


def _prepare(
    model: Container, begin: BeginTraining, x: Any, y: Any, sample_weight: Any, options: FitOptions
) -> tuple[Run, AnyDataset | None, CallbackStates | None]:
    """Check all arguments. Returns the run, the validation dataset, and callback states from a checkpoint."""
    if model.parameters and not any(parameter.trainable for parameter in model.parameters):
        warn("nothing in this model is trainable, so fit changes no weights: set trainable = True on a layer.")
    loss, metrics = choose_loss_and_metrics(model, options.loss, options.metrics, options.loss_weights)
    if not all(metric.scalar for metric in metrics):
        raise ArgumentError("a history holds only numbers: use evaluate() for a confusion matrix.")
    structure = structure_of(model)
    (x, y, sample_weight), held_out = options.split(structure, x, y, sample_weight)
    dataset = load_dataset(model, x, y, loss, metrics, sample_weight, options.class_weight)
    validation = None
    if held_out is not None:
        x, y, sample_weight = held_out
        validation = load_dataset(model, x, y, loss, metrics, sample_weight, names=("validation x", "validation y"))
    for data, batch_size in ((dataset, options.batch_size), (validation, EVALUATION_BATCH)):
        if isinstance(data, StreamingDataset):
            data.refuse_unsupported(options.epochs, batch_size, options.resume_from is not None)
    run = Run(model, begin(loss, metrics, optimizers.get(options.optimizer)), dataset, options)
    if options.resume_from is None:
        warn_of_unscaled_targets(run)
        return run, validation, None
    with model.context.guard.lock:
        return run, validation, run.resume(options.resume_from)


def _broadcast_model(run: Run) -> None:
    """Give all ranks the model of rank 0."""
    for array in run.epoch_start.arrays().values():
        run.group.broadcast(array)
    if not run.under_way:
        run.epoch_start.take()


def _train(
    run: Run, validation: AnyDataset | None, states: CallbackStates | None, accepted: Callable[[], object]
) -> None:
    """The epochs of a run, and what callbacks do before and after them. `accepted` is called before the first epoch."""
    model, callbacks, begun = run.model, run.callbacks, list[Callback]()
    model.history = run.history
    with ignoring_float_errors(), model.backend.on_compile(functools.partial(_call_on_compile, callbacks)):
        try:
            _attach(run)
            for callback, state in states or [(callback, None) for callback in callbacks]:
                begun.append(callback)
                if state is None:
                    callback.on_train_begin(model)
                else:
                    run.resume_callback(callback, state)
            accepted()
            _train_epochs(run, validation)
        finally:
            interrupts.patience = math.inf
            run.running = False
            with contextlib.ExitStack() as stack:
                stack.callback(run.executor.close)
                for callback in begun:
                    stack.callback(_end, callback, model)
            if interrupts.presses and run.history.stopped is None:  # a KeyboardInterrupt is on its way
                run.history.stopped = INTERRUPTED
    if not run.interrupted and take_press():  # at the very end
        run.interrupted, run.history.stopped = True, run.history.stopped or INTERRUPTED


def _attach(run: Run) -> None:
    """Give the callbacks their run. Raises StateError if another one uses them now."""
    with _attaching:
        for callback in run.callbacks:
            other: Any = getattr(callback, "run", None)
            if getattr(other, "running", False) and other.process == os.getpid():  # it may have been before a fork
                raise StateError(
                    f"this {type(callback).__name__} is in use by another fit that is running: give each fit its own."
                )
        for callback in run.callbacks:
            callback.run = run
        run.running = True


def _end(callback: Callback, model: Container) -> None:
    """Call on_train_end. It is interrupted only if Ctrl-C is pressed twice in it."""
    try:
        interrupts.patience = interrupts.presses + 1
        callback.on_train_end(model)
    finally:
        interrupts.patience = math.inf


def _train_epochs(run: Run, validation: AnyDataset | None) -> None:
    model, state, group, history, callbacks = run.model, run.state, run.group, run.history, run.callbacks
    _share_stop_request(run)
    while state.epoch < run.first_epoch + run.epochs and history.stopped is None:
        run.begin_epoch()
        for callback in callbacks:
            callback.on_epoch_begin(model, state.epoch)
        for _ in run.epoch():
            if callbacks:  # which may change it
                run.last_rate = state.rate_at(state.step - 1)
            for callback in callbacks:
                callback.on_step_end(model, state.step)
            if (group.size > 1 or interrupts.presses or history.stopped is not None) and _share_stop_request(run):
                break
        metrics = run.metrics.over_ranks(group)
        if not run.is_trial:
            _refuse_divergence(run, metrics)
        if run.interrupted and not run.complete:
            _log.warning("training was interrupted in epoch %d; the model keeps its weights", state.epoch + 1)
            break
        logs = _final_result(run, metrics)
        with contextlib.ExitStack() as ending:
            for callback in callbacks:
                ending.enter_context(callback.ending_epoch(model))
            if validation is not None and not run.is_trial:
                metrics = evaluate(model, validation, state.loss, state.metrics, EVALUATION_BATCH, group)
                logs |= {f"val_{name}": value for name, value in metrics.over_ranks(group).final_result().items()}
            logs = group.broadcast_value(logs)
            if not callbacks:
                run.last_rate = state.rate_at(state.step - 1)
            state.epoch += 1
            history.add({**logs, "learning_rate": run.last_rate}, run.elapsed())
            history.compile_seconds = run.compile_seconds()
            run.under_way = False
            _share_stop_request(run)
            for callback in callbacks:
                callback.on_epoch_end(model, state.epoch - 1, logs)
        _share_stop_request(run)


def _call_on_compile(callbacks: list[Callback]) -> None:
    for callback in callbacks:
        callback.on_compile()


def _share_stop_request(run: Run) -> bool:
    """Tell all ranks of a Ctrl-C or of a callback's stop on any rank. Returns whether there was one."""
    group, history = run.group, run.history
    run.interrupted |= take_press()
    if not group.any(run.interrupted or history.stopped is not None):
        return False
    run.interrupted = group.any(run.interrupted)
    reasons = [why for why in group.all_gather(history.stopped) if why is not None]
    history.stopped = INTERRUPTED if run.interrupted else reasons[0]
    return True


def train_on_batch(model: Container, state: TrainingState, dataset: Dataset) -> dict[str, float]:
    """One step on these samples as one batch; loss and metrics from before the update, with the loss's reduction.

    Use it in `Context.exclusively`.
    """
    metrics = EpochMetrics(model, state.loss, state.metrics, batches=1)
    total = len(dataset) if dataset.weights is None else total_weight(model.backend.xp, dataset.weights)
    batches = dataset.batches(Workspace(model.context), len(dataset))
    step, before = TrainingStep(model, state), [buffer.value.copy() for buffer in model.context.store.buffers]
    with ignoring_float_errors(), model.execution_context(), audited_step(step):
        try:
            step.gradients(batches, total, metrics.add)
            try:
                logs = metrics.final_result(reduced=True)
            except DataError:  # no sample counts
                _restore_buffers(model, before)
                raise
            _refuse_divergent_batch(model, state, logs["loss"], before)
            step.update()
        finally:
            interrupts.patience = math.inf
    return logs


def _refuse_divergent_batch(model: Container, state: TrainingState, loss: float, buffers: list[Array]) -> None:
    """If the loss or a buffer is not finite, restore the buffers and raise DivergenceError."""
    overflowed = _first_non_finite_buffer(model)
    if overflowed is None and math.isfinite(loss):
        return
    _restore_buffers(model, buffers)
    what = f"{overflowed} became NaN or infinite" if overflowed else f"the loss is {loss}"
    raise DivergenceError(
        f"{what} before step {state.step + 1}, which was skipped: scale the inputs and targets, or start afresh with a "
        f"learning rate below {state.learning_rate:g}."
    )


def _restore_buffers(model: Container, buffers: list[Array]) -> None:
    for buffer, value in zip(model.context.store.buffers, buffers, strict=True):
        buffer.value[...] = value


def apply_gradients(model: Container, begin: Callable[[], TrainingState]) -> None:
    """One update from the current gradients, which keep their values. Reads the device."""
    store = model.context.store
    for p in store.parameters:
        if p.trainable and not bool(model.backend.xp.isfinite(p.grad).all()):
            raise DivergenceError(
                f"the gradient of {p.name} contains NaN or infinity, so nothing was updated: scale the inputs "
                "and targets, or start afresh with a lower learning rate."
            )
    with ignoring_float_errors(), model.execution_context():
        grads, state = store.grads.copy(), begin()
        model.context.begin_step(state.step)  # with it, the noise of the next pass is that of the next step
        try:
            with audited_update(model, state):
                store.add_penalty_gradients()
                state.update(store)
        finally:
            store.grads[...] = grads  # without penalties, clipping and weight decay


def _final_result(run: Run, metrics: EpochMetrics) -> dict[str, Any]:
    """The logs of the epoch. If no sample had a weight above 0, restore its start and raise DataError."""
    try:
        return metrics.final_result()
    except DataError:
        _undo_epoch(run)
        raise


def _undo_epoch(run: Run) -> None:
    run.epoch_start.restore()
    run.state.optimizer_state.step = run.first_step


def _refuse_divergence(run: Run, metrics: EpochMetrics) -> None:
    """If loss, weights or buffers are not finite, restore the start of the epoch and raise DivergenceError."""
    step, what = metrics.first_non_finite_batch(), "loss"
    if step is None:
        store, isfinite = run.model.context.store, run.model.backend.xp.isfinite
        parts = [store.values[part] for part in store.slices(lambda parameter: True)]
        overflowed = _first_non_finite_buffer(run.model)
        # A sum of squares is finite only if all terms are; it may overflow though they are.
        if overflowed is None and all(math.isfinite(part.dot(part)) or isfinite(part).all() for part in parts):
            return
        what, step = overflowed or "weights", metrics.batches - 1  # it is known only at the end of the epoch
    state = run.state
    epoch, rate = state.epoch, state.learning_rate
    run.history.stopped = "diverged"
    _undo_epoch(run)
    if what == "loss" and state.step == 0 and step == 0:
        cause = "before any update, so inputs, targets or initial weights are too large: scale the inputs and targets"
    else:
        cause = (
            f"most likely because the learning rate, {rate:g}, is too high, or because inputs or targets are not "
            "scaled: scale them, lower the rate, or clip the gradient with clip_norm"
        )
    of_all = f" of {run.steps}" if run.steps else ""
    raise DivergenceError(
        f"the {what} became NaN or infinite in epoch {epoch + 1}, at step {step + 1}{of_all}, {cause}. "
        "The weights of the epoch's start were restored."
    )


def _first_non_finite_buffer(model: Container) -> str | None:
    """The name of a buffer, such as a running variance, that contains NaN or infinity. Reads the device."""
    isfinite = model.backend.xp.isfinite
    return next((b.name for b in model.context.store.buffers if not bool(isfinite(b.value).all())), None)
