"""Callbacks: what may happen between the steps and epochs of `fit`."""

import csv
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from xpnet.config import is_number
from xpnet.errors import ArgumentError
from xpnet.parameters import Snapshot

if TYPE_CHECKING:
    from xpnet.layers.containers import Sequential
    from xpnet.training import Run


class Callback:
    """The base of every callback. Override what you need; every method does nothing by default.

    Epochs and steps count from 0 over the model's life, so a second fit goes on where the first ended. Device values
    should be read seldom: `self.run.logs()` waits for the GPU.
    """

    #: Set by fit: epochs, steps, samples, batch_size, history, state (its learning_rate), logs() of the epoch so far.
    run: "Run"

    def on_train_begin(self, model: "Sequential") -> None:
        """Before the first epoch of this fit."""

    def on_epoch_begin(self, model: "Sequential", epoch: int) -> None:
        """Before the first step of an epoch."""

    def on_step_end(self, model: "Sequential", step: int) -> None:
        """After an update; `step` is the number of updates so far."""

    def on_epoch_end(self, model: "Sequential", epoch: int, logs: dict[str, Any]) -> None:
        """After an epoch; `logs` are its figures: "loss", "accuracy", "val_loss", …"""

    def on_train_end(self, model: "Sequential") -> None:
        """After the last epoch, also when an error or Ctrl-C ended the training."""

    def stop(self, reason: str) -> None:
        """End the training after this step or epoch; the reason stands in `history.stopped`."""
        self.run.history.stopped = reason


class ProgressBar(Callback):
    """A bar an epoch: samples per second, time left, loss and metrics. Silent where the stream is no terminal."""

    def __init__(self, stream: TextIO | None = None, seconds: float = 0.5) -> None:
        self.stream, self.seconds = stream, seconds
        self._bar: Any = None

    def on_epoch_begin(self, model: "Sequential", epoch: int) -> None:
        from tqdm import tqdm  # here, because most runs show no bar

        run = self.run
        self._bar = tqdm(
            total=run.samples,
            desc=f"epoch {epoch - run.first_epoch + 1}/{run.epochs}",
            unit=" samples",
            unit_scale=True,
            file=self.stream or sys.stderr,
            disable=None,  # off where the stream is not a terminal
            mininterval=0.1,
            leave=True,
        )
        self._next_figures = 0.0

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

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream

    def on_epoch_end(self, model: "Sequential", epoch: int, logs: dict[str, Any]) -> None:
        run = self.run
        seconds, width = run.history.seconds[-1], len(str(run.epochs))
        print(
            f"epoch {epoch - run.first_epoch + 1:{width}d}/{run.epochs}  {format_logs(logs)}  "
            f"{seconds:.3g} s  {run.samples / seconds:,.0f} samples/s",
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

    def on_epoch_end(self, model: "Sequential", epoch: int, logs: dict[str, Any]) -> None:
        if self.monitor not in logs:
            hint = " Give fit validation data." if self.monitor.startswith("val_") else ""
            raise ArgumentError(
                f"{type(self).__name__}: there is no {self.monitor!r} to follow, only {', '.join(logs)}.{hint}"
            )
        value = float(logs[self.monitor])
        first = self.best is None and value == value  # NaN is no better than nothing
        if first or (self.best is not None and self._sign() * (value - self.best) > self.min_delta):
            self.best, self.waited = value, 0
            self.on_better(model, epoch)
        else:
            self.waited += 1
            if self.waited > self.patience:
                self.on_patience_lost(model, epoch)

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


class CSVLogger(Callback):
    """A row an epoch into a CSV file: epoch, seconds, and the figures. `append` continues a file that is there."""

    def __init__(self, path: Any, append: bool = False) -> None:
        self.path, self.append = path, append
        self._file: TextIO | None = None

    def on_train_begin(self, model: "Sequential") -> None:
        self._file = open(self.path, "a" if self.append else "w", newline="", encoding="utf-8")  # noqa: SIM115
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
