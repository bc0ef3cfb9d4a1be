"""Callbacks: what may happen between the steps and epochs of `fit`."""

import csv
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TextIO

from xpnet.config import is_number, is_whole
from xpnet.errors import ArgumentError
from xpnet.parameters import Snapshot

if TYPE_CHECKING:
    from xpnet.layers.containers import Sequential
    from xpnet.run import Run


class Callback:
    """The base of every callback. Override what you need; every method does nothing by default.

    Epochs and steps count from 0 over the model's life, so a second fit goes on where the first ended. Device values
    should be read seldom: `self.run.logs()` waits for the GPU.
    """

    #: Whether it prints or writes, so that of several ranks only the first one calls it.
    only_on_first_rank: ClassVar[bool] = False

    #: Set by fit: epochs, steps, samples, batch_size, history, state (its learning_rate), logs() of the epoch so far.
    run: "Run"

    def on_train_begin(self, model: "Sequential") -> None:
        """Before the first epoch of this fit."""

    def on_resume(self, model: "Sequential", state: dict[str, Any]) -> None:
        """Instead, where fit goes on from a checkpoint: `state` is what `state()` gave when that was written."""
        self.on_train_begin(model)

    def on_epoch_begin(self, model: "Sequential", epoch: int) -> None:
        """Before the first step of an epoch."""

    def on_step_end(self, model: "Sequential", step: int) -> None:
        """After an update; `step` is the number of updates so far."""

    def on_epoch_end(self, model: "Sequential", epoch: int, logs: dict[str, Any]) -> None:
        """After an epoch; `logs` are its figures: "loss", "accuracy", "val_loss", …"""

    def on_train_end(self, model: "Sequential") -> None:
        """After the last epoch, also when an error or Ctrl-C ended the training."""

    def state(self) -> dict[str, Any]:
        """What it takes to go on after a stop, by name: arrays, and what JSON holds (numbers, text, lists, None)."""
        return {}

    def stop(self, reason: str) -> None:
        """End the training after this step or epoch; the reason stands in `history.stopped`."""
        self.run.history.stopped = reason


class ProgressBar(Callback):
    """A bar an epoch: samples per second, time left, loss and metrics. Silent where the stream is no terminal."""

    only_on_first_rank = True

    def __init__(self, stream: TextIO | None = None, seconds: float = 0.5) -> None:
        self.stream, self.seconds = stream, seconds
        self._bar: Any = None

    def on_epoch_begin(self, model: "Sequential", epoch: int) -> None:
        from tqdm import tqdm  # here, because most runs show no bar

        run = self.run
        self._bar = tqdm(
            total=run.samples,
            initial=run.seen,
            desc=f"epoch {epoch - run.first_epoch + 1}/{run.epochs}",
            unit=" samples",
            unit_scale=True,
            file=self.stream or sys.stderr,
            disable=None,  # off where the stream is not a terminal
            mininterval=0.1,
            leave=True,
        )
        self._next_figures = 0.0

    def show_compiling(self) -> None:
        """Say why nothing moves: kernels are being compiled, which happens once on a machine."""
        if self._bar is not None:
            self._bar.set_postfix_str("compiling kernels for the GPU, once")

    def on_step_end(self, model: "Sequential", step: int) -> None:
        if self._bar.disable:
            return
        self._bar.update(self.run.seen - self._bar.n)
        if time.monotonic() >= self._next_figures:  # reading figures waits for the device
            self._bar.set_postfix_str(format_logs(self.run.logs()))
            self._next_figures = time.monotonic() + self.seconds

    def on_epoch_end(self, model: "Sequential", epoch: int, logs: dict[str, Any]) -> None:
        self._bar.set_postfix_str(format_logs(logs))
        self._close()

    def on_train_end(self, model: "Sequential") -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class EpochLines(Callback):
    """A printed line an epoch: figures, seconds, samples per second."""

    only_on_first_rank = True

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream

    def on_epoch_end(self, model: "Sequential", epoch: int, logs: dict[str, Any]) -> None:
        run = self.run
        seconds, width = run.history.seconds[-1], len(str(run.epochs))
        print(
            f"epoch {epoch - run.first_epoch + 1:{width}d}/{run.epochs}  {format_logs(logs)}  "
            f"{seconds:.3g} s  {run.seen / seconds:,.0f} samples/s",
            file=self.stream or sys.stdout,
            flush=True,
        )


class _Monitor(Callback):
    """What follows one figure: has it become better?"""

    def __init__(self, monitor: str, patience: int, min_delta: float, mode: str) -> None:
        name = type(self).__name__
        if mode not in ("auto", "min", "max"):
            raise ArgumentError(f'{name}: mode must be "auto", "min" or "max", not {mode!r}.')
        if not (is_number(patience) and patience >= 0 and is_number(min_delta) and min_delta >= 0):
            raise ArgumentError(f"{name}: patience and min_delta must be numbers of at least 0.")
        self.monitor, self.patience, self.min_delta, self.mode = monitor, patience, min_delta, mode

    def on_train_begin(self, model: "Sequential") -> None:
        self.best: float | None = None
        self.waited = 0

    def on_resume(self, model: "Sequential", state: dict[str, Any]) -> None:
        super().on_resume(model, state)
        self.best, self.waited = state["best"], state["waited"]

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def on_epoch_end(self, model: "Sequential", epoch: int, logs: dict[str, Any]) -> None:
        value = self._figure(logs)
        first = self.best is None and value == value  # NaN is no better than nothing
        if first or (self.best is not None and self._sign() * (value - self.best) > self.min_delta):
            self.best, self.waited = value, 0
            self.on_better(model, epoch)
        else:
            self.waited += 1
            if self.waited > self.patience:
                self.on_patience_lost(model, epoch)

    def _figure(self, logs: Mapping[str, Any]) -> float:
        if self.monitor not in logs:
            hint = " Give fit validation data." if self.monitor.startswith("val_") else ""
            raise ArgumentError(
                f"{type(self).__name__}: there is no {self.monitor!r} to follow, only {', '.join(logs)}.{hint}"
            )
        return float(logs[self.monitor])

    def _sign(self) -> int:
        falls = ("loss", "mse", "mae", "error")
        mode = ("min" if self.monitor.endswith(falls) else "max") if self.mode == "auto" else self.mode
        return -1 if mode == "min" else 1

    def on_better(self, model: "Sequential", epoch: int) -> None: ...

    def on_patience_lost(self, model: "Sequential", epoch: int) -> None: ...


class EarlyStopping(_Monitor):
    """Stop when `monitor` has not become better by `min_delta` for more than `patience` epochs.

    `restore_best` puts the weights and buffers of the best epoch back. mode "auto" wants losses and errors low and
    everything else high. After training: `best`, `best_epoch`.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int = 5,
        min_delta: float = 0.0,
        mode: str = "auto",
        restore_best: bool = True,
    ) -> None:
        super().__init__(monitor, patience, min_delta, mode)
        self.restore_best = restore_best

    def on_train_begin(self, model: "Sequential") -> None:
        super().on_train_begin(model)
        self.best_epoch: int | None = None
        self._snapshot: Snapshot | None = None

    def on_resume(self, model: "Sequential", state: dict[str, Any]) -> None:
        super().on_resume(model, state)
        self.best_epoch = state["best_epoch"]
        if "best 0" in state:
            self._snapshot = Snapshot(model.context.store)
            for i, copy in enumerate(self._snapshot.copies):
                copy[...] = model.backend.asarray(state[f"best {i}"])

    def state(self) -> dict[str, Any]:
        best = {} if self._snapshot is None else {f"best {i}": a for i, a in enumerate(self._snapshot.copies)}
        return {**super().state(), "best_epoch": self.best_epoch, **best}

    def on_better(self, model: "Sequential", epoch: int) -> None:
        self.best_epoch = epoch
        if not self.restore_best:
            return
        if self._snapshot is None:
            self._snapshot = Snapshot(model.context.store)
        else:
            self._snapshot.take()

    def on_patience_lost(self, model: "Sequential", epoch: int) -> None:
        self.stop("early stopping")

    def on_train_end(self, model: "Sequential") -> None:
        if self._snapshot is not None and self.run.history.stopped != "diverged":
            self._snapshot.restore()
        self._snapshot = None


class ReduceLROnPlateau(_Monitor):
    """Multiply the learning rate by `factor` when `monitor` has not become better for more than `patience` epochs.

    The factor applies to the schedule's rate too, and stays with the model for later fits; never below `min_rate`.
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
        if not (is_number(factor) and 0 < factor < 1):
            raise ArgumentError(f"ReduceLROnPlateau: factor must lie between 0 and 1, not {factor}.")
        self.factor, self.min_rate = factor, min_rate

    def on_patience_lost(self, model: "Sequential", epoch: int) -> None:
        self.waited = 0
        state = self.run.state
        if state.learning_rate > self.min_rate:
            state.rate_factor *= max(self.factor, self.min_rate / state.learning_rate)


class Checkpoint(_Monitor):
    """Write the whole state of the training to `path`, so that `fit(..., resume_from=path)` goes on from there.

    path: a .safetensors file, always the latest state; `xpnet.load` reads the model out of it.  every: epochs from one
    writing to the next.  minutes: after so many it is written too, in the middle of an epoch; None for never.
    keep_best: how many of the epochs that are best by `monitor` have a file of their own beside it, such as
    "run-epoch-0012.safetensors" for "run.safetensors".  mode: as of EarlyStopping.

    It is also written after the last epoch, and when Ctrl-C ends the training; every time whole or not at all.
    """

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
        if not isinstance(path, str | os.PathLike) or not Path(path).name:
            raise ArgumentError(f"Checkpoint: path must name a file, not {path!r}.")
        for name, value, least in (("every", every, 1), ("keep_best", keep_best, 0)):
            if not (is_whole(value) and value >= least):
                raise ArgumentError(f"Checkpoint: {name} must be a whole number of at least {least}, not {value!r}.")
        if minutes is not None and not (is_number(minutes) and minutes >= 0):
            raise ArgumentError(f"Checkpoint: minutes must be a number of at least 0, or None, not {minutes!r}.")
        self.path, self.every, self.minutes, self.keep_best = path, every, minutes, keep_best

    def on_train_begin(self, model: "Sequential") -> None:
        self.kept: list[tuple[float, int]] = []  # (figure, epoch), the best first
        self._written = time.monotonic()

    def on_resume(self, model: "Sequential", state: dict[str, Any]) -> None:
        self.on_train_begin(model)
        self.kept = [(value, epoch) for value, epoch in state.get("kept", [])]

    def state(self) -> dict[str, Any]:
        return {"kept": self.kept} if self.keep_best else {}

    def on_step_end(self, model: "Sequential", step: int) -> None:
        due = self.minutes is not None and time.monotonic() >= self._written + 60 * self.minutes
        if self.minutes is not None and self.run.ranks.size > 1:
            due = self.run.ranks.of_first(due)  # by one clock, for all have to write together
        if due and self.run.history.stopped is None:  # one that was stopped ends its epoch first
            self._write()

    def on_epoch_end(self, model: "Sequential", epoch: int, logs: dict[str, Any]) -> None:
        if self.keep_best:
            self._keep(self._figure(logs), epoch)
        done = epoch + 1 - self.run.first_epoch
        if done % self.every == 0 or done == self.run.epochs or self.run.history.stopped is not None:
            self._write()

    def on_train_end(self, model: "Sequential") -> None:
        if self.run.history.stopped == "interrupted" and self.run.under_way:
            self._write()

    def file_of_epoch(self, epoch: int) -> Path:
        """The file of an epoch, counted from 0, that is among the best."""
        path = Path(self.path)
        return path.with_name(f"{path.stem}-epoch-{epoch + 1:04d}{path.suffix}")

    def _write(self) -> None:
        self.run.save(self.path)
        self._written = time.monotonic()

    def _keep(self, value: float, epoch: int) -> None:
        ranked = sorted([*self.kept, (value, epoch)], key=lambda one: (-self._sign() * one[0], one[1]))
        self.kept = ranked[: self.keep_best]
        if (value, epoch) in self.kept:
            self.run.save(self.file_of_epoch(epoch))
        for _, worse in ranked[self.keep_best :]:
            if self.run.ranks.rank == 0:
                self.file_of_epoch(worse).unlink(missing_ok=True)


class CSVLogger(Callback):
    """A row an epoch into a CSV file: epoch, seconds, and the figures. `append` continues a file that is there."""

    only_on_first_rank = True

    def __init__(self, path: Any, append: bool = False) -> None:
        self.path, self.append = path, append
        self._file: TextIO | None = None

    def on_train_begin(self, model: "Sequential") -> None:
        self._open("a" if self.append else "w")

    def on_resume(self, model: "Sequential", state: dict[str, Any]) -> None:
        self._open("a")
        assert self._file is not None
        if self._file.tell() > state["size"]:  # rows of epochs that will be trained again
            self._file.truncate(state["size"])

    def state(self) -> dict[str, Any]:
        return {"size": 0 if self._file is None else self._file.tell()}

    def _open(self, mode: Literal["a", "w"]) -> None:
        self._file = open(self.path, mode, newline="", encoding="utf-8")  # noqa: SIM115
        self._writer: Any = None

    def on_epoch_end(self, model: "Sequential", epoch: int, logs: dict[str, Any]) -> None:
        assert self._file is not None
        row = {"epoch": epoch, "seconds": round(self.run.history.seconds[-1], 6), **logs}
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, fieldnames=list(row))
            if self._file.tell() == 0:
                self._writer.writeheader()
            else:
                with open(self.path, newline="", encoding="utf-8") as before:
                    columns = next(csv.reader(before))
                if columns != list(row):
                    raise ArgumentError(f"CSVLogger: {self.path} has the columns {columns}, not {list(row)}.")
        self._writer.writerow(row)
        self._file.flush()

    def on_train_end(self, model: "Sequential") -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def format_logs(logs: Mapping[str, Any]) -> str:
    """ "loss 0.1234  accuracy 0.9612"."""
    return "  ".join(
        f"{name} {value:.4g}" if 0 < value < 1e-3 else f"{name} {value:.4f}" for name, value in logs.items()
    )
