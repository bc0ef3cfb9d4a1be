"""Callbacks: code that runs between the steps and epochs of `fit`; and the history that `fit` returns."""

import contextlib
import csv
import importlib
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO

from xpnet import metrics
from xpnet.backends import Array
from xpnet.concurrency.interrupts import uninterrupted
from xpnet.config import ExplainedArguments, ExplainedAttributes, choice, flag, integer, number, python_number
from xpnet.data.files import as_path, model_path, refuse_irregular, refuse_unwritable, reporting
from xpnet.display import progress, tables
from xpnet.distributed.process_group import ProcessGroup
from xpnet.errors import (
    ArgumentError,
    ArgumentTypeError,
    FileError,
    MissingPackageError,
    ShapeError,
    StateError,
    UnknownKeyError,
    shown,
    suggestion,
)
from xpnet.layers.containers import Container
from xpnet.parameters import ParameterStore, Snapshot

__all__ = ["CSVLogger", "Callback", "Checkpoint", "EarlyStopping", "EpochLines", "ExponentialMovingAverage", "History",
           "LearningRateFinder", "ProgressBar", "ReduceLROnPlateau", "Run", "TensorBoard", "format_logs"]  # fmt: skip


_SHOWN_EPOCHS = 20  # in a notebook


class History(ExplainedAttributes, dict[str, list[float]]):
    """What `fit` returns: history["loss"], history["val_accuracy"], … are lists with one float per epoch.

    history["learning_rate"] has the learning rate of each epoch's last step. The logs of callbacks do not have it.

    seconds: the time of each epoch in seconds, without compilation.  compile_seconds: the seconds spent compiling GPU
    kernels; 0 once they are compiled, because CuPy caches them on disk.  stopped: why training ended early
    ("interrupted", "diverged", or the reason that a callback gave), or None.
    """

    _advice = "History"

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.compile_seconds = 0.0
        self.stopped: str | None = None

    def add(self, logs: Mapping[str, float], seconds: float) -> None:
        """Append the values of one epoch."""
        for name, value in logs.items():
            self.setdefault(name, []).append(value)
        self.seconds.append(seconds)

    def __missing__(self, name: Any) -> list[float]:
        hint = ""
        if isinstance(name, str):
            hint = suggestion(name, self)
            if name.startswith("val_") and not any(own.startswith("val_") for own in self):
                hint = "Give fit validation data: validation_data=(x, y) or validation_split=0.2. "
        raise UnknownKeyError(f"the history has no {shown(name)}. {hint}It has {', '.join(self) or 'no epochs yet'}.")

    def _attribute_hint(self, name: str) -> str:
        return f'Read it as history["{name}"].' if name in self else 'It is a dict itself: read history["loss"].'

    def _repr_html_(self) -> str:
        """A table of the epochs for a notebook; of many epochs, the first and the last ones."""
        last = len(self.seconds) - 1
        shown = range(last + 1) if last < _SHOWN_EPOCHS else [0, 1, None, *range(last + 4 - _SHOWN_EPOCHS, last + 1)]
        rows = [
            ["…"] * (len(self) + 2)
            if i is None
            else [str(i + 1), *[_number(values[i]) if i < len(values) else "" for values in self.values()],
                  f"{self.seconds[i]:.3g}"]
            for i in shown
        ]  # fmt: skip
        stopped = f"stopped: {self.stopped}" if self.stopped else ""
        return tables.html_table("History", ["epoch", *self, "seconds"], rows, stopped)


class Run(Protocol):
    """The current call of `fit`, which a callback reads as `self.run`.

    epochs: the epochs of this call.  first_epoch: the number of epochs before it.  steps: batches per epoch.
    updates_per_epoch: updates, of `accumulate` batches each.  samples: training samples; None, like steps and
    updates_per_epoch, for a stream of batches of unknown length.  seen: the samples of this epoch so far.  batch_size:
    samples per batch.  history: the epochs so far.  under_way: whether an epoch is in progress.  callbacks: all
    callbacks of this fit, in the order of their calls.  log_names: the names of the logs that fit itself makes: "loss",
    "accuracy", "val_loss", …
    """

    epochs: int
    first_epoch: int
    steps: int | None
    updates_per_epoch: int | None
    samples: int | None
    seen: int
    batch_size: int
    history: History
    under_way: bool
    callbacks: list["Callback"]
    log_names: list[str]

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step. A callback may set it, on all ranks alike, to a number of at least 0.

        That replaces a constant learning rate of the optimizer. A schedule is scaled by a factor instead, so that it
        gives this rate in the next step and keeps its form. Both stay with the model in later fits with an equal
        optimizer. Raises ArgumentError for a value that is negative, not finite, or not a number.
        """

    @learning_rate.setter
    def learning_rate(self, value: float) -> None: ...

    @property
    def state(self) -> Any:
        """`step`, `epoch`, `learning_rate` and `rate_factor` of the model."""

    def settings(self) -> Any:
        """What must be equal for a run to continue from a checkpoint of this one."""

    @property
    def group(self) -> ProcessGroup:
        """The processes that train together."""

    def logs(self) -> dict[str, Any]:
        """Return loss and metrics of the epoch so far, over the samples of this rank. Waits for the device.

        Metrics that collect rows, such as AUC, are left out: they are computed at the end of the epoch only.
        """

    def step_loss(self) -> float | None:
        """Return the loss of the latest step, from before its update; None if no sample had a weight above 0.

        All ranks must call it. Waits for the device.
        """

    def save(self, path: Any) -> None:
        """Write a checkpoint, from which `fit(..., resume_from=path)` continues. All ranks must call it.

        Raises FileError if the file cannot be written.
        """


class Callback(ExplainedArguments):
    """The base of every callback. Override what you need; every method does nothing by default.

    `epoch` counts from 0; `step` is the number of steps so far, 1 after the first. Both continue in later fits with an
    equal optimizer, and start again with another. Do not call `self.run.logs()` in every step: it waits for the GPU.
    """

    _advice = "callback"
    #: Whether it prints or writes files, so that only the first of several ranks calls it.
    only_on_first_rank: ClassVar[bool] = False
    #: Whether it is called after all other callbacks, to see their state of the same epoch; on_train_end: before them.
    runs_last: ClassVar[bool] = False
    #: Whether fit is a trial: afterwards, the model and the state of its training are as before. A trial does not
    #: validate, and a loss of NaN is no error in it.
    makes_trial: ClassVar[bool] = False
    #: The current call of fit, which sets it.
    run: Run

    def on_train_begin(self, model: Container) -> None:
        """Called before the first epoch of this fit."""

    def on_resume(self, model: Container, state: dict[str, Any]) -> None:
        """Called instead of on_train_begin if fit resumes a checkpoint, with what `state()` returned for it."""
        self.on_train_begin(model)

    def on_epoch_begin(self, model: Container, epoch: int) -> None:
        """Called before the first step of an epoch."""

    def on_step_end(self, model: Container, step: int) -> None:
        """Called after a step; `step` is the number of steps so far."""

    def on_epoch_end(self, model: Container, epoch: int, logs: dict[str, Any]) -> None:
        """Called after an epoch; `logs` are its values: "loss", "accuracy", "val_loss", …"""

    def on_train_end(self, model: Container) -> None:
        """Called after the last epoch, also if an error or Ctrl-C ended the training."""

    def ending_epoch(self, model: Container) -> AbstractContextManager[Any]:
        """Return a context for the end of an epoch: the validation, and then on_epoch_end of all callbacks."""
        return contextlib.nullcontext()

    def on_compile(self) -> None:
        """Called when kernels are about to be compiled for a GPU, which takes seconds on first use."""

    def state(self) -> dict[str, Any]:
        """Return what this callback needs to resume: arrays, and values that JSON can hold (numbers, text, lists)."""
        return {}

    def stop(self, reason: str) -> None:
        """End the training after this step or epoch; `history.stopped` holds the reason."""
        if not isinstance(reason, str):
            raise ArgumentTypeError(f"{type(self).__name__}: stop takes the reason as text, not {shown(reason)}.")
        self.run.history.stopped = reason


class ProgressBar(Callback):
    """A progress bar for each epoch: samples per second, time left, loss and metrics.

    On a terminal it takes one line; where that is narrow, counters and rates give way to the metrics. In a notebook it
    is a widget, or, without the package ipywidgets, a line per epoch. Elsewhere, as in a log file, nothing is shown.

    stream: where to print; standard error by default.  seconds: between two readings of loss and metrics.
    """

    only_on_first_rank = True

    def __init__(self, stream: TextIO | None = None, seconds: float = 0.5) -> None:
        self.stream, self.seconds = _checked_stream(self, stream), number(self, "seconds", seconds, at_least=0)
        self._bar: Any = None
        self._lines: EpochLines | None = None

    # tqdm has locks that KeyboardInterrupt could leave locked.

    def on_epoch_begin(self, model: Container, epoch: int) -> None:
        uninterrupted(self._open, epoch)

    def _open(self, epoch: int) -> None:
        run = self.run
        stream, state = self.stream or sys.stderr, (_epoch_of(run, epoch), run.samples, run.seen)
        self._lines = None
        if stream is not None and stream.isatty():
            self._bar = progress.terminal_bar(stream, *state)
        elif self.stream is None and progress.in_notebook():
            self._bar = progress.notebook_bar(*state)
            if self._bar is None:
                self._lines = EpochLines()
                self._lines.run = run
        self._next_logs = 0.0

    def on_compile(self) -> None:
        if self._bar is not None:
            self._bar.show(["compiling kernels for the GPU, once"])

    def on_step_end(self, model: Container, step: int) -> None:
        if self._bar is not None:
            uninterrupted(self._update)

    def _update(self) -> None:
        self._bar.update(self.run.seen - self._bar.n)
        if time.monotonic() >= self._next_logs:  # reading logs waits for the device
            self._bar.show(_texts(self.run.logs()))
            self._next_logs = time.monotonic() + self.seconds

    def on_epoch_end(self, model: Container, epoch: int, logs: dict[str, Any]) -> None:
        if self._bar is not None:
            uninterrupted(self._close, _texts(logs))
        if self._lines is not None:
            self._lines.on_epoch_end(model, epoch, logs)

    def on_train_end(self, model: Container) -> None:
        uninterrupted(self._close)

    def _close(self, texts: Sequence[str] = ()) -> None:
        if self._bar is not None:
            if texts:
                self._bar.show(texts)
            self._bar.close()
            self._bar = None


class EpochLines(Callback):
    """Prints one line per epoch: loss and metrics, seconds, samples per second.

    stream: where to print; standard output by default.
    """

    only_on_first_rank = True

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = _checked_stream(self, stream)

    def on_epoch_end(self, model: Container, epoch: int, logs: dict[str, Any]) -> None:
        run = self.run
        seconds, count = run.history.seconds[-1], _epoch_of(run, epoch, len(str(run.epochs)))
        print(
            f"{count}  {format_logs(logs)}  {seconds:.3g} s  {run.seen / seconds:,.0f} samples/s",
            file=self.stream or sys.stdout,
            flush=True,
        )


def _checked_stream(owner: Callback, stream: Any) -> TextIO | None:
    """The argument `stream` if it is one, or None."""
    if stream is None or all(callable(getattr(stream, method, None)) for method in ("write", "flush", "isatty")):
        return stream  # type: ignore[no-any-return]
    raise ArgumentTypeError(f"{type(owner).__name__}: stream must be a text stream, or None, not {shown(stream)}.")


class _Monitor(Callback):
    """Watches one value of the logs: has it improved?"""

    def __init__(self, monitor: str, patience: int, min_delta: float, mode: str) -> None:
        if not isinstance(monitor, str):
            raise ArgumentError(
                f'{type(self).__name__}: monitor must be a name such as "val_loss", not {shown(monitor)}.'
            )
        self.monitor, self.mode = monitor, choice(self, "mode", mode, ("auto", "min", "max"))
        self.patience = number(self, "patience", patience, at_least=0)
        self.min_delta = number(self, "min_delta", min_delta, at_least=0)

    def on_train_begin(self, model: Container) -> None:
        self._check_monitor()
        self.best: float | None = None
        self.waited = 0

    def on_resume(self, model: Container, state: dict[str, Any]) -> None:
        super().on_resume(model, state)
        best, waited = state["best"], state["waited"]
        self.best = None if best is None else number(self, "best", best)
        self.waited = integer(self, "waited", waited, at_least=0)

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def on_epoch_end(self, model: Container, epoch: int, logs: dict[str, Any]) -> None:
        value = self._monitored(logs)
        first = self.best is None and value == value  # NaN is no improvement over nothing
        if first or (self.best is not None and self._sign() * (value - self.best) > self.min_delta):
            self.best, self.waited = value, 0
            self.on_better(model, epoch)
        else:
            self.waited += 1
            if self.waited > self.patience:
                self.on_patience_lost(model, epoch)

    def _check_monitor(self) -> None:
        """Refuse a name that no log will have, before the first step.

        Callbacks of users may add logs; if there are any, the first epoch shows whether they do.
        """
        own = [callback for callback in self.run.callbacks if not type(callback).__module__.startswith("xpnet.")]
        if not any(type(callback).on_epoch_end is not Callback.on_epoch_end for callback in own):
            self._refuse_unless_in(self.run.log_names)

    def _monitored(self, logs: Mapping[str, Any]) -> float:
        self._refuse_unless_in(logs)
        value = python_number(logs[self.monitor])
        if not isinstance(value, int | float):
            raise ArgumentError(
                f"{type(self).__name__}: {self.monitor} in the logs must be a number, not {shown(value)}."
            )
        return float(value)

    def _refuse_unless_in(self, logs: Iterable[str]) -> None:
        names, wanted = [str(name) for name in logs], self.monitor
        if wanted in names:
            return
        trained = [name for name in names if not name.startswith("val_")]
        same_kind = [f"val_{name}" if wanted.startswith("val_") else name for name in trained]
        hint = ""
        if wanted not in same_kind:
            near = [name for name in same_kind if name.startswith(wanted) or wanted.startswith(name)]
            hint = f" {suggestion(wanted, near or same_kind)}".rstrip()
            metric = wanted.removeprefix("val_")
            if not near and _names_a_metric(metric):
                hint = f' Give fit metrics=["{metric}"].'
        if wanted.startswith("val_") and len(trained) == len(names):
            hint += " Give fit validation data: validation_data=(x, y) or validation_split=0.2."
        raise ArgumentError(
            f"{type(self).__name__}: the logs have no {wanted!r} to monitor, only {', '.join(names)}.{hint}"
        )

    def _sign(self) -> int:
        minimized = ("loss", "mse", "mae", "error")
        mode = ("min" if self.monitor.endswith(minimized) else "max") if self.mode == "auto" else self.mode
        return -1 if mode == "min" else 1

    def on_better(self, model: Container, epoch: int) -> None: ...

    def on_patience_lost(self, model: Container, epoch: int) -> None: ...


def _names_a_metric(name: str) -> bool:
    with contextlib.suppress(ArgumentError):
        return bool(metrics.get(name, None))
    return False


class EarlyStopping(_Monitor):
    """Stops when `monitor` has not improved by more than `min_delta` for more than `patience` epochs; NaN is the worst.

    monitor: a key of the history, such as "val_loss" or "accuracy".  mode: "min", "max", or "auto", which minimizes
    losses and errors and maximizes everything else.  restore_best: whether to restore the weights and buffers of the
    best epoch at the end. After training, `best` is the best value and `best_epoch` its epoch, counted from 0.

    fit raises ArgumentError if the logs have no `monitor`: before the first step, or, if there are callbacks of users,
    which may add logs, after the first epoch.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int = 5,
        min_delta: float = 0.0,
        mode: str = "auto",
        *,
        restore_best: bool = True,
    ) -> None:
        super().__init__(monitor, patience, min_delta, mode)
        self.restore_best = flag(self, "restore_best", restore_best)

    def on_train_begin(self, model: Container) -> None:
        self.best_epoch: int | None = None
        self._snapshot: Snapshot | None = None
        super().on_train_begin(model)

    def on_resume(self, model: Container, state: dict[str, Any]) -> None:
        super().on_resume(model, state)
        epoch = state["best_epoch"]
        self.best_epoch = None if epoch is None else integer(self, "best_epoch", epoch, at_least=0)
        if (epoch is None) != (self.best is None):
            raise ArgumentError(f"EarlyStopping: best is {self.best}, but best_epoch is {epoch}.")
        if flag(self, "with_copy", state.get("with_copy", "best 0" in state)):
            self._snapshot = Snapshot(model.context.store)
            own = self._snapshot.own_copies()
            for i, copy in enumerate(own):
                best = state[f"best {i}"]
                if (best.shape, best.dtype) != (copy.shape, copy.dtype):
                    raise ShapeError(
                        f"EarlyStopping: its copy {i} is {best.dtype} {best.shape}, not {copy.dtype} {copy.shape}."
                    )
                copy[...] = model.backend.asarray(best)
            self._snapshot.set_own_weights(own[0])

    def state(self) -> dict[str, Any]:
        best = {} if self._snapshot is None else {f"best {i}": a for i, a in enumerate(self._snapshot.own_copies())}
        return {**super().state(), "best_epoch": self.best_epoch, "with_copy": bool(best), **best}

    def on_better(self, model: Container, epoch: int) -> None:
        self.best_epoch = epoch
        if self.restore_best:
            self._snapshot = self._snapshot or Snapshot(model.context.store)
            self._snapshot.take()

    def on_patience_lost(self, model: Container, epoch: int) -> None:
        self.stop("early stopping")

    def on_train_end(self, model: Container) -> None:
        if self._snapshot is not None and self.run.history.stopped != "diverged":
            self._snapshot.restore()
        self._snapshot = None


class ReduceLROnPlateau(_Monitor):
    """Multiplies the learning rate by `factor` when `monitor` has not improved for more than `patience` epochs.

    The factor applies to the rate of a schedule too, and stays with the model in later fits; the rate never falls below
    `min_rate`.  monitor, min_delta, mode: as in EarlyStopping.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 3,
        min_delta: float = 0.0,
        mode: str = "auto",
        min_rate: float = 0.0,
    ) -> None:
        super().__init__(monitor, patience, min_delta, mode)
        self.factor = number(self, "factor", factor, above=0, below=1)
        self.min_rate = number(self, "min_rate", min_rate, at_least=0)

    def on_patience_lost(self, model: Container, epoch: int) -> None:
        self.waited = 0
        state = self.run.state
        if state.learning_rate > self.min_rate:
            state.rate_factor *= max(self.factor, self.min_rate / state.learning_rate)


class Checkpoint(_Monitor):
    """Writes the whole state of the training to `path`, so that `fit(..., resume_from=path)` continues from there.

    path: a .safetensors file, which always has the latest state; `xpnet.load` reads the model from it.  every: epochs
    between two checkpoints.  minutes: also write within an epoch, at this interval; None for never.
    keep_best: how many of the best epochs by `monitor` have their own files beside `path`, such as
    "run-epoch-0012.safetensors" for "run.safetensors".  monitor, mode: as in EarlyStopping.

    It also writes after the last epoch, and when Ctrl-C ends the training. A file is replaced as a whole or not at all.
    fit raises FileError, before the first step, if `path` cannot be written.
    """

    runs_last = True

    def __init__(
        self,
        path: Any,
        every: int = 1,
        minutes: float | None = None,
        keep_best: int = 0,
        monitor: str = "val_loss",
        mode: str = "auto",
    ) -> None:
        super().__init__(monitor, patience=0, min_delta=0.0, mode=mode)
        if not isinstance(path, str | os.PathLike) or not model_path("Checkpoint", path).name:
            raise ArgumentError(f"Checkpoint: path must name a file, not {shown(path)}.")
        self.path, self.every = path, integer(self, "every", every)
        self.minutes = None if minutes is None else number(self, "minutes", minutes, at_least=0, also="None")
        self.keep_best = integer(self, "keep_best", keep_best, at_least=0)

    def on_train_begin(self, model: Container) -> None:
        if self.keep_best:
            self._check_monitor()
        self.kept: list[tuple[float, int]] = []  # (value, epoch), the best first
        self._written, self._written_step = time.monotonic(), -1
        if self.run.group.rank == 0:
            refuse_unwritable(self.path)
        self.run.settings()  # which may refuse a loss, a metric or an optimizer of the user

    def on_resume(self, model: Container, state: dict[str, Any]) -> None:
        self.on_train_begin(model)
        for value, epoch in state.get("kept", []):
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ArgumentError(f"Checkpoint: the value of a kept epoch must be a number, not {shown(value)}.")
            last = self.run.state.epoch - 1
            self.kept.append((float(value), integer(self, "a kept epoch", epoch, at_least=0, at_most=last)))

    def state(self) -> dict[str, Any]:
        return {"kept": self.kept} if self.keep_best else {}

    def on_step_end(self, model: Container, step: int) -> None:
        due = self.minutes is not None and time.monotonic() >= self._written + 60 * self.minutes
        if self.minutes is not None and self.run.group.size > 1:
            due = self.run.group.broadcast_value(due)  # clocks differ, and all ranks must write together
        if due and self.run.history.stopped is None:  # otherwise the epoch ends first
            self._write()

    def on_epoch_end(self, model: Container, epoch: int, logs: dict[str, Any]) -> None:
        if self.keep_best:
            self._keep(self._monitored(logs), epoch)
        done = epoch + 1 - self.run.first_epoch
        if done % self.every == 0 or done == self.run.epochs or self.run.history.stopped is not None:
            self._write()

    def on_train_end(self, model: Container) -> None:
        if self.run.history.stopped == "interrupted" and self._written_step != self.run.state.step:
            self._write()

    def file_of_epoch(self, epoch: int) -> Path:
        """The file of one of the best epochs, counted from 0."""
        path = Path(self.path)
        return path.with_name(f"{path.stem}-epoch-{epoch + 1:04d}{path.suffix}")

    def _write(self) -> None:
        self.run.save(self.path)
        self._written, self._written_step = time.monotonic(), self.run.state.step

    def _keep(self, value: float, epoch: int) -> None:
        def rank(one: tuple[float, int]) -> tuple[float, int]:
            return (math.inf if math.isnan(one[0]) else -self._sign() * one[0], one[1])  # NaN is the worst

        ranked = sorted([*self.kept, (value, epoch)], key=rank)
        self.kept = ranked[: self.keep_best]
        if (value, epoch) in self.kept:
            self.run.save(self.file_of_epoch(epoch))
        if self.run.group.rank == 0:
            for _, worse in ranked[self.keep_best :]:
                with reporting(self.file_of_epoch(worse)):
                    self.file_of_epoch(worse).unlink(missing_ok=True)


class ExponentialMovingAverage(Callback):
    """Averages the weights over the steps: average ← d · average + (1 - d) · weights, after each step k = 1, 2, …

    d = min(decay, (1 + k) / (10 + k)), so that the first weights are soon forgotten. Buffers of floats, such as running
    means and variances, are averaged too; those of integers are taken as they are. Polyak and Juditsky 1992; Tarvainen
    and Valpola 2017, "Mean teachers are better role models". Training itself is not changed.

    decay: the average is over about the last 1 / (1 - decay) steps.  validate: whether the averages are in the model
    while an epoch ends, so that validation, EarlyStopping, the callbacks of users and the model in a file of Checkpoint
    have them; the trained weights are put back before the next epoch.  apply_at_end: whether the model ends with the
    averages, also after Ctrl-C, unless the loss has diverged or an EarlyStopping restores the best epoch.

    After training, `apply()` writes the averages into the model, and `restore()` puts the trained weights back;
    `applied` says whether the model has the averages, and `updates` is the number of steps in them. A later fit starts
    a new average, from the weights that the model has then.
    """

    def __init__(self, decay: float = 0.999, *, validate: bool = False, apply_at_end: bool = True) -> None:
        self.decay = number(self, "decay", decay, at_least=0, below=1)
        self.validate, self.apply_at_end = flag(self, "validate", validate), flag(self, "apply_at_end", apply_at_end)
        self.updates = 0
        self.applied = False  # whether the averages are in the model, and the trained weights here
        self._store: ParameterStore | None = None

    def on_train_begin(self, model: Container) -> None:
        store = self._store = model.context.store
        self.updates, self.applied, self._values = 0, False, store.values
        self._weights, self._scratch = store.values.copy(), store.values.copy()
        self._buffers = [buffer.value.copy() for buffer in store.buffers]

    def on_resume(self, model: Container, state: dict[str, Any]) -> None:
        self.on_train_begin(model)
        store = model.context.store
        self.updates = integer(self, "updates", state["updates"], at_least=0)
        self._load(store, state, "", self._weights, self._buffers)
        if "trained weights" in state:  # the model in the file has the averages
            self._load(store, state, "trained ", store.values, [buffer.value for buffer in store.buffers])

    def _load(
        self, store: ParameterStore, state: Mapping[str, Any], prefix: str, weights: Array, buffers: list[Array]
    ) -> None:
        """Write the arrays whose names have this prefix into these arrays."""
        named = {"weights": store.gathered(weights), **{f"buffer {i}": buffer for i, buffer in enumerate(buffers)}}
        for name, own in named.items():
            found = state[prefix + name]
            if (found.shape, found.dtype) != (tuple(own.shape), own.dtype):
                raise ShapeError(
                    f"ExponentialMovingAverage: its {prefix}{name} is {found.dtype} {found.shape}, not {own.dtype} "
                    f"{tuple(own.shape)}."
                )
            if name == "weights":
                store.scatter(store.backend.asarray(found), weights)
            else:
                own[...] = store.backend.asarray(found)

    def state(self) -> dict[str, Any]:
        store = self._trained_store()
        kept, inside = (self._weights, self._buffers), (store.values, [buffer.value for buffer in store.buffers])
        by_prefix = {"": inside, "trained ": kept} if self.applied else {"": kept}
        arrays: dict[str, Any] = {}
        for prefix, (weights, buffers) in by_prefix.items():
            arrays[f"{prefix}weights"] = store.gathered(weights)
            arrays |= {f"{prefix}buffer {i}": buffer for i, buffer in enumerate(buffers)}
        return {"updates": self.updates, **arrays}

    def on_step_end(self, model: Container, step: int) -> None:
        self.updates += 1
        part = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        store, xp = self._trained_store(), model.backend.xp
        for own in store.slices(lambda parameter: True):  # other models may share the vector
            change = xp.subtract(store.values[own], self._weights[own], out=self._scratch[own])
            change *= part
            self._weights[own] += change
        for buffer, average in zip(store.buffers, self._buffers, strict=True):
            if average.dtype.kind == "f":
                average += part * (buffer.value - average)
            else:
                average[...] = buffer.value

    @contextlib.contextmanager
    def ending_epoch(self, model: Container) -> Iterator[None]:
        if not self.validate:
            yield
            return
        uninterrupted(self._swap)
        try:
            yield
        finally:
            uninterrupted(self._swap)

    def on_train_end(self, model: Container) -> None:
        restored = any(isinstance(one, EarlyStopping) and one.restore_best for one in self.run.callbacks)
        if self.apply_at_end and not restored and self.run.history.stopped != "diverged" and self._store is not None:
            uninterrupted(self._swap)

    def apply(self) -> None:
        """Write the averages into the model that was trained, and keep its own weights for `restore`.

        Raises StateError before training, while fit is running, or if the model was moved or grew since.
        """
        self._refuse_changed()
        if not self.applied:
            self._swap()

    def restore(self) -> None:
        """Write the weights that were trained back into the model. Raises StateError as `apply` does."""
        self._refuse_changed()
        if self.applied:
            self._swap()

    def _swap(self) -> None:
        """Exchange the averages and what the model has."""
        store = self._trained_store()
        pairs = [(store.values[own], self._weights[own]) for own in store.slices(lambda parameter: True)]
        pairs += [(buffer.value, average) for buffer, average in zip(store.buffers, self._buffers, strict=True)]
        with store.guard.lock, store.backend.device():
            for array, kept in pairs:
                copy = array.copy()
                array[...] = kept
                kept[...] = copy
        self.applied = not self.applied

    def _trained_store(self) -> ParameterStore:
        if self._store is None:
            raise StateError("ExponentialMovingAverage: there are no averages before fit has trained with it.")
        return self._store

    def _refuse_changed(self) -> None:
        store = self._trained_store()
        store.guard.refuse_during_training()
        if store.values is not self._values:
            raise StateError(
                "ExponentialMovingAverage: the model was moved to another backend or dtype, or a model that shares its "
                "layers was made, since it was trained: call apply or restore before that."
            )


class LearningRateFinder(Callback):
    """Finds a learning rate by a range test: fit trains with rates that grow from step to step, and the loss is noted.

        finder = callbacks.LearningRateFinder()
        model.fit(x, y, optimizer=optimizers.SGD(momentum=0.9), callbacks=finder)
        model.fit(x, y, optimizer=optimizers.SGD(finder.suggestion, momentum=0.9), epochs=20)

    lowest, highest: the rates of the first and the last step; they grow exponentially.  steps: the length of the test,
    or all steps of fit if these are fewer.  smoothing: the loss is averaged over about the last 1 / (1 - smoothing)
    steps.  limit: the test ends earlier if the averaged loss exceeds limit times its lowest value, and also if the loss
    is NaN or infinite.

    After the test, the model is as it was before fit, bit for bit: its weights and buffers, the optimizer's state, the
    step, which also determines the noise of later steps, and the history. Only arrays and attributes that custom layers
    keep are not restored. fit does not validate in a test, and returns the history of the test. It raises
    ArgumentError for a Checkpoint or resume_from. Smith 2017, "Cyclical learning rates for training neural networks".

    After fit, `rates` and `losses` are lists with the rate and the smoothed loss of each step. `suggestion` is the rate
    at which the smoothed loss falls fastest per decade; None if it never fell. `plots.learning_rates(finder)` shows
    all three.
    """

    makes_trial = True

    def __init__(
        self,
        lowest: float = 1e-7,
        highest: float = 10.0,
        steps: int = 100,
        smoothing: float = 0.8,
        limit: float = 4.0,
    ) -> None:
        self.lowest = number(self, "lowest", lowest, above=0, finite=True)
        self.highest = number(self, "highest", highest, above=self.lowest, finite=True)
        self.steps = integer(self, "steps", steps, at_least=2)
        self.smoothing = number(self, "smoothing", smoothing, at_least=0, below=1)
        self.limit = number(self, "limit", limit, above=1)
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, model: Container) -> None:
        run = self.run
        if any(isinstance(callback, Checkpoint) for callback in run.callbacks):
            raise ArgumentError("LearningRateFinder: fit without Checkpoint, which would save the model of the test.")
        self.rates, self.losses, self._average, self._lowest_loss = [], [], 0.0, math.inf
        self._total = self.steps
        if run.updates_per_epoch is not None:
            self._total = min(self.steps, run.epochs * run.updates_per_epoch)
        run.learning_rate = self.lowest

    def on_step_end(self, model: Container, step: int) -> None:
        loss, done = self.run.step_loss(), len(self.rates)
        if loss is None:
            return  # all samples have the weight 0
        if not math.isfinite(loss):
            self.stop("the loss is NaN or infinite")
            return
        self._average = self.smoothing * self._average + (1.0 - self.smoothing) * loss
        smoothed = self._average / (1.0 - self.smoothing ** (done + 1))
        self.rates.append(self._rate(done))
        self.losses.append(smoothed)
        self._lowest_loss = min(self._lowest_loss, smoothed)
        if smoothed > self.limit * self._lowest_loss:
            self.stop("the loss has grown")
        elif done + 1 == self._total:
            self.stop("the range of learning rates was tested")
        else:
            self.run.learning_rate = self._rate(done + 1)

    def _rate(self, step: int) -> float:
        share = step / max(1, self._total - 1)
        return float(self.lowest ** (1.0 - share) * self.highest**share)

    @property
    def suggestion(self) -> float | None:
        """The rate at which the smoothed loss falls fastest, up to its minimum; None if it never fell."""
        losses, near = self.losses, max(1, len(self.losses) // 20)
        if not losses:
            return None
        last = min(losses.index(min(losses)), len(losses) - 1 - near)
        slopes = {i: losses[i + near] - losses[i - near] for i in range(near, last + 1)}
        steepest = min(slopes, key=slopes.__getitem__, default=None)
        return None if steepest is None or slopes[steepest] >= 0 else self.rates[steepest]


class CSVLogger(Callback):
    """Writes a CSV file with one row per epoch: epoch, seconds, loss and metrics.

    path: the file; seconds are those of the epoch.  append: whether to add rows to a file that exists already.

    fit raises FileError, before the first step, if the file cannot be written, and ArgumentError, after the first
    epoch, if an existing file has other columns.
    """

    only_on_first_rank = True

    def __init__(self, path: Any, *, append: bool = False) -> None:
        self.path, self.append = as_path("CSVLogger", "path", path), flag(self, "append", append)
        self._file: Any = None

    def on_train_begin(self, model: Container) -> None:
        self._open("a" if self.append else "w")

    def on_resume(self, model: Container, state: dict[str, Any]) -> None:
        size = integer(self, "the size of the file", state["size"], at_least=0)
        refuse_irregular(self.path)
        with reporting(self.path), contextlib.suppress(FileNotFoundError), open(self.path, "rb") as before:
            if 0 < size <= before.seek(0, os.SEEK_END):  # it may have been shortened
                before.seek(size - 1)
                if before.read(1) != b"\n":
                    raise ArgumentError(f"CSVLogger: {self.path} has no row that ends after {size} bytes.")
        self._open("a", size)

    def state(self) -> dict[str, Any]:
        return {"size": 0 if self._file is None else self._file.tell()}

    def _open(self, mode: str, size: int | None = None) -> None:
        with reporting(self.path):
            refuse_irregular(self.path)
            self._file = open(self.path, mode, newline="", encoding="utf-8")  # noqa: SIM115
        self._writer: Any = None
        self._resumed_size = size

    def on_epoch_begin(self, model: Container, epoch: int) -> None:
        with reporting(self.path):
            if self._resumed_size is not None and self._file.tell() > self._resumed_size:
                self._file.truncate(self._resumed_size)  # rows of epochs that are trained again
                self._file.seek(0, os.SEEK_END)
        self._resumed_size = None

    def on_epoch_end(self, model: Container, epoch: int, logs: dict[str, Any]) -> None:
        row = {"epoch": epoch, "seconds": round(self.run.history.seconds[-1], 6), **logs}
        with reporting(self.path):
            if self._writer is None:
                self._writer = csv.DictWriter(self._file, fieldnames=list(row))
                if self._file.tell() == 0:
                    self._writer.writeheader()
                else:
                    columns = self._columns()
                    if columns != list(row):
                        raise ArgumentError(f"CSVLogger: {self.path} has the columns {columns}, not {list(row)}.")
            self._writer.writerow(row)
            self._file.flush()

    def _columns(self) -> list[str]:
        try:
            with open(self.path, newline="", encoding="utf-8") as before:
                return next(csv.reader(before), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise FileError(f"{self.path}: this is not a CSV file: {error}.") from error

    def on_train_end(self, model: Container) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with reporting(self.path):
                file.close()


class TensorBoard(Callback):
    """Writes the logs as event files for TensorBoard: `tensorboard --logdir folder`.

    folder: made if it does not exist; each fit adds a file to it.  every: also write the loss and the learning rate
    at this interval in steps, as "step/loss" and "step/learning_rate", which waits for the device; None for never.
    histograms: whether to write a histogram of each parameter after each epoch.

    After each epoch, its logs and the learning rate are written. All curves are over the number of steps. After a
    resumption, TensorBoard leaves out what the stopped run had written beyond the checkpoint.

    It needs the package tensorboardX: pip install "xpnet[tensorboard]". Without it, fit raises MissingPackageError; if
    the folder cannot be written, FileError; both before the first step.
    """

    def __init__(self, folder: Any, every: int | None = None, *, histograms: bool = False) -> None:
        self.folder = as_path("TensorBoard", "folder", folder)
        self.every = None if every is None else integer(self, "every", every, also="None")
        self.histograms = flag(self, "histograms", histograms)
        self._writer: Any = None

    def on_train_begin(self, model: Container) -> None:
        self._open(None)

    def on_resume(self, model: Container, state: dict[str, Any]) -> None:
        self._open(self.run.state.step + 1)

    def _open(self, first_step: int | None) -> None:
        """Begin a file. first_step: TensorBoard ignores earlier files from this step on; None if it shows all."""
        self._writer = None
        if self.run.group.rank:
            return
        try:
            package: Any = importlib.import_module("tensorboardX")
        except ImportError as error:
            raise MissingPackageError(
                f"callbacks.TensorBoard needs the package tensorboardX, which cannot be imported ({error}): "
                'pip install "xpnet[tensorboard]"'
            ) from error
        with reporting(self.folder):
            self._writer = uninterrupted(package.SummaryWriter, os.fspath(self.folder), purge_step=first_step)

    def on_step_end(self, model: Container, step: int) -> None:
        if self.every is None or step % self.every:
            return
        loss = self.run.step_loss()  # of all ranks
        logs = {"step/learning_rate": self.run.state.rate_at(step - 1)}
        self._write(logs if loss is None else {"step/loss": loss, **logs}, step)

    def on_epoch_end(self, model: Container, epoch: int, logs: dict[str, Any]) -> None:
        step = self.run.state.step
        self._write({**logs, "learning_rate": self.run.history["learning_rate"][-1]}, step)
        if self._writer is None:
            return
        if self.histograms:
            for p in model.parameters:
                uninterrupted(self._writer.add_histogram, p.name, model.backend.to_numpy(p.value), step)
        with reporting(self.folder):
            uninterrupted(self._writer.flush)

    def _write(self, logs: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in logs.items():
                uninterrupted(self._writer.add_scalar, name, value, step)

    def on_train_end(self, model: Container) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with reporting(self.folder):
                uninterrupted(writer.close)


def format_logs(logs: Mapping[str, Any]) -> str:
    """Return loss and metrics as a line of text: "loss 0.1234  accuracy 0.9612"."""
    if not isinstance(logs, Mapping):
        raise ArgumentTypeError(f"format_logs: logs must be a dict such as {{'loss': 0.1}}, not {shown(logs)}.")
    return "  ".join(_texts(logs))


def _texts(logs: Mapping[str, Any]) -> list[str]:
    """Return the logs as texts: "loss 0.1234", "accuracy 0.9612"."""
    return [f"{name} {_number(value)}" for name, value in logs.items()]


def _number(value: Any) -> str:
    value = python_number(value)
    if not isinstance(value, int | float):
        return f"{value!r:.20}"  # that a callback has put into the logs
    return f"{value:{'.4g' if 0 < value < 1e-3 else '.4f'}}"


def _epoch_of(run: Run, epoch: int, width: int = 0) -> str:
    """Return "epoch 3/20", counted from the first epoch of this fit. width: the least width of the first number."""
    return f"epoch {epoch - run.first_epoch + 1:{width}d}/{run.epochs}"
