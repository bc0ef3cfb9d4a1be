"""Run: one running call of fit, and its state as arrays and values that a file can hold."""

import contextlib
import json
import math
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy

from xpnet._version import __version__
from xpnet.callbacks import Callback, History
from xpnet.config import is_custom
from xpnet.data.dataset import Batch, Dataset
from xpnet.data.streaming import AnyDataset, StreamingDataset
from xpnet.errors import ArgumentError, ArgumentTypeError, BackendError, FileError, XpnetError, shown
from xpnet.layers.containers import Container
from xpnet.layers.context import Workspace
from xpnet.layers.structure import one_or_tuple, shapes_of
from xpnet.parameters import Snapshot
from xpnet.training import checkpoints
from xpnet.training.arguments import FitOptions, warn
from xpnet.training.attributes import has_custom_code, schedule_may_change
from xpnet.training.captured_step import StepExecutor, StepsToCome
from xpnet.training.epoch_metrics import EpochMetrics, scored_by
from xpnet.training.model_files import architecture, names_of, refusing_damage
from xpnet.training.resuming import Settings, description, different_environment, refuse_another_run
from xpnet.training.state import TrainingState
from xpnet.training.step import TrainingStep

_ORDER_STREAM = 2  # keeps the random numbers of epoch permutations apart from those of weights


INTERRUPTED = "interrupted"  # history.stopped after Ctrl-C


class Run:
    """One call of `fit`. `callbacks.Run` lists what callbacks may use of it."""

    def __init__(self, model: Container, state: TrainingState, dataset: AnyDataset, options: FitOptions) -> None:
        self.model, self.state, self.dataset, self.group = model, state, dataset, options.group
        self.callbacks: list[Callback] = options.all_callbacks()
        self.is_trial = options.is_trial
        self.epochs, self.first_epoch, self.shuffle = options.epochs, state.epoch, options.shuffle
        self.history, self.on_interrupt = History(), options.on_interrupt
        self.running = self.interrupted = False
        self.process = os.getpid()
        self.samples, self.batch_size, self.accumulate = dataset.samples, options.batch_size or 1, options.accumulate
        self.steps: int | None = None
        self.updates_per_epoch: int | None = None
        if dataset.samples is not None:
            self.batch_size = min(options.batch_size or dataset.samples, dataset.samples)
            self.steps = math.ceil(dataset.samples / self.batch_size)
            self.accumulate = min(options.accumulate, self.steps)
            self.updates_per_epoch = math.ceil(self.steps / self.accumulate)
        self.seen, self.complete = 0, False  # samples of this epoch, and whether these are all
        self._step_batches = 0  # of the latest step
        self.under_way = False
        self.last_rate = state.learning_rate  # of the latest step
        self.metrics = EpochMetrics(model, state.loss, state.metrics, self.steps)
        self.log_names = self.metrics.names
        if options.validates:
            self.log_names = [*self.log_names, *(f"val_{name}" for name in self.log_names)]
        #: The model at the beginning of the epoch, and the number of steps that it had made.
        self.epoch_start = Snapshot(model.context.store, lambda: state.optimizer_state.slots)
        self.first_step = state.step
        step, callbacks = TrainingStep(model, state), self.callbacks
        between_epochs = [code for c in callbacks for code in (type(c), c.on_epoch_begin, c.on_epoch_end)]
        #: Whether user code runs between epochs.
        self._user_code = any(map(is_custom, between_epochs)) or (options.validates and has_custom_code(step))
        after_steps = [type(state.optimizer), *[c.on_step_end for c in callbacks]]
        user_code = any(map(is_custom, after_steps)) or schedule_may_change(step)
        #: Runs the steps; `executor.fallback_reason` says why none is captured.
        self.executor = StepExecutor(step, isinstance(dataset, StreamingDataset), user_code)
        self._work = Workspace(model.context)
        self.resumed_from: Any = None  # the path of a checkpoint
        self.start_clock()
        self._compiled_before = model.backend.compile_seconds

    @property
    def learning_rate(self) -> float:
        return self.state.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self.state.learning_rate = value

    def logs(self) -> dict[str, Any]:
        """Loss and metrics of the epoch so far, over the samples of this rank. Waits for the device.

        Metrics that collect rows, such as AUC, are computed at the end of the epoch only.
        """
        return self.metrics.result(whole=False)

    def step_loss(self) -> float | None:
        """The loss of the latest step, from before its update; None if no sample had a weight above 0.

        All ranks must call it. Waits for the device.
        """
        return self.metrics.over_ranks(self.group).loss_of_last(self._step_batches)

    def elapsed(self) -> float:
        """Seconds of the epoch so far, without compilation, and without the time between a stop and its resumption."""
        return time.perf_counter() - self._began - (self.model.backend.compile_seconds - self._compiled)

    def start_clock(self, elapsed: float = 0.0) -> None:
        """The epoch begins now, or continues after this number of seconds."""
        self._began, self._compiled = time.perf_counter() - elapsed, self.model.backend.compile_seconds

    def compile_seconds(self) -> float:
        """Seconds of compiling kernels since the run began."""
        return self.model.backend.compile_seconds - self._compiled_before

    def begin_epoch(self) -> None:
        """Begin an epoch, unless a resumed one is in progress."""
        if not self.under_way:
            self.epoch_start.take()
            self.under_way, self.first_step = True, self.state.step
            self.start_clock()
            self.seen, self.complete = 0, False
            self.metrics.clear()

    def epoch(self) -> Iterator[None]:
        """Train the rest of the epoch, and yield after each step."""
        key = [self.model.context.seed, _ORDER_STREAM, self.state.epoch] if self.shuffle else None
        to_come = None
        if self.samples is not None:
            rows, epochs = self.batch_size * self.accumulate, self.first_epoch + self.epochs - self.state.epoch
            to_come = StepsToCome(epochs, self.epochs, self.samples // rows, rows)
        self.executor.begin_epoch(to_come, self._user_code)
        steps = self.dataset.steps(self._work, self.batch_size, self.accumulate, key, self.seen, self.group)
        guard = self.model.context.guard
        with contextlib.closing(steps):
            for data in steps:
                if guard.passing:
                    with guard.turnstile:
                        pass  # threads that wait for a prediction go first
                with guard.lock:
                    self.executor(data, self.metrics)
                self.seen, self._step_batches = self.seen + data.rows, data.batch_count
                self.complete = self.seen == self.samples
                yield
        self.complete = True

    # State -----------------------------------------------------------------------------------------------------------

    def save(self, path: Any) -> None:
        """Write a checkpoint, from which `fit(..., resume_from=path)` continues. The first rank writes it."""
        arrays, values = self.state_dict()
        if not self.group.rank:
            checkpoints.write(path, self.model, arrays, values)

    def resume(self, path: Any) -> list[tuple[Callback, dict[str, Any] | None]]:
        """Continue from a checkpoint. Returns each callback with its state in the file, or None.

        The whole file is checked before anything changes. Raises FileError or ArgumentError if it does not belong to
        this run, and warns if results will differ from those of a run that never stopped.
        """
        contents, architecture, values = checkpoints.read(path)
        own = self.settings()
        refuse_another_run(path, own, architecture, values)
        with refusing_damage(path):
            frozen = names_of(architecture["frozen"], "frozen parameters", (p.name for p in self.model.parameters))
            self.model.context.store.refuse_state(contents.model)
            self._refuse_state(contents.run, values)
        self.resumed_from = path
        for array in self.model.context.store.arrays():
            array.value[...] = self.model.backend.asarray(contents.model[array.name])
        for parameter in self.model.parameters:
            parameter.trainable = parameter.name not in frozen
        self.load_state_dict(contents.run, values)
        states = {
            name: {**state, **_with_prefix(contents.run, f"callback {name} ")}
            for name, state in values["callbacks"].items()
        }
        present = self.named_callbacks()
        missing = [name for name, state in states.items() if state and name not in present]
        if missing and not self.group.rank:  # other ranks have no callbacks that print or write
            warn(f"{path} has the state of callbacks that this fit does not have: {', '.join(missing)}.")
        if different := different_environment(own, values):
            warn(
                f"{path}: results will differ by rounding from those of a run that never stopped: "
                f"{'; '.join(different)}."
            )
        return [(callback, states.get(name)) for name, callback in present.items()]

    def resume_callback(self, callback: Callback, state: dict[str, Any]) -> None:
        """Give a callback its state. Raises FileError if it does not accept it."""
        name = type(callback).__name__
        try:
            callback.on_resume(self.model, state)
        except (FileError, BackendError, MemoryError):
            raise
        except Exception as error:
            text = str(error) if isinstance(error, XpnetError) else repr(error)
            raise FileError(f"{self.resumed_from}: the state of {name} in it was refused: {text}") from error

    def _refuse_state(self, arrays: Mapping[str, numpy.ndarray[Any, Any]], values: Mapping[str, Any]) -> None:
        """Raise ArgumentError unless these are arrays of this run that fit these values, which are valid."""
        for name, array in self._state_arrays(values["under_way"]).items():
            if name not in arrays:
                raise ArgumentError(f"it has no array {name!r}.")
            found, expected = arrays[name], (tuple(array.shape), numpy.dtype(array.dtype))
            if (found.shape, found.dtype) != expected:
                raise ArgumentError(
                    f"its array {name!r} has shape {found.shape} and dtype {found.dtype}, not {expected[0]} and "
                    f"{expected[1]}."
                )
        scale = arrays.get("loss scale")
        if scale is not None and not (scale.shape == (2,) and numpy.isfinite(scale).all() and scale[0] >= 1):
            raise ArgumentError(f"its loss scale {scale} is invalid.")
        epochs, history = values["epoch"] - values["first_epoch"], values["history"]
        measured = self.metrics.names
        for name in [*history, *(measured if epochs else [])]:
            own_name = name.removeprefix("val_") in [*measured, "learning_rate"]  # others are those of callbacks
            if own_name and not checkpoints.is_list_of_numbers(history.get(name), epochs):
                raise ArgumentError(f"its history must have {epochs} numbers of {name}, one per epoch.")
        if values["under_way"]:
            self.metrics.refuse_state(_with_prefix(arrays, "figures "), values["seen"], self._sums_of_one_sample())

    def _sums_of_one_sample(self) -> dict[str, Any]:
        """The sums of each metric over one sample, for their shapes; {} for a stream, and for outputs of any length."""
        data, model = self.dataset, self.model
        if not isinstance(data, Dataset) or any(None in shape for shape in shapes_of(model.output_shape)):
            return {}
        zeros, sample = model.backend.zeros, Batch(**data.replaced(lambda _, a: a[:1]))
        shapes = shapes_of(model.output_shape)
        outputs = one_or_tuple([zeros((1, *shape), model.context.dtype) for shape in shapes])
        sums = {}
        for metric in self.state.metrics:
            with contextlib.suppress(Exception):  # a custom metric that fails on such outputs is not compared
                rows = self.metrics.rows(outputs, sample, one_or_tuple([None] * len(shapes)))
                sums[metric.name] = metric.sums(model.backend, *scored_by(metric, *rows))
        return sums

    def settings(self) -> Settings:
        """What must be equal for this run to continue."""
        state = self.state
        metrics: Any = state.metrics
        if self.metrics.columns_per_batch > 1:  # of several outputs
            metrics = {metric.name: metric for metric in metrics}
        what = {"optimizer": state.optimizer, "loss": state.loss, "metrics": metrics}
        return Settings(
            architecture(self.model),
            {name: description(value) for name, value in what.items()},
            {name: getattr(self, name) for name in ("samples", "batch_size", "accumulate", "shuffle")},
            {**self.model.backend.environment(), "ranks": str(self.group.size)},
        )

    def rank_settings(self) -> dict[str, Any]:
        """What must be equal on all ranks, by the names that errors use."""
        model, state, settings = self.model, self.state, self.settings()
        check = zlib.crc32(json.dumps(settings.model).encode())
        shared = [name for name, callback in self.named_callbacks().items() if not callback.only_on_first_rank]
        return {
            "the version of xpnet": __version__,
            "the version of NumPy": numpy.__version__,
            "the seed": model.context.seed,
            "the model": f"{len(model.layers)} layers, check {check:08x}",
            "dtype and precision": f"{model.context.dtype}, {model.context.precision}",
            **settings.training,
            **settings.batches,
            "epochs": self.epochs,
            "the epoch": state.epoch,
            "the step": state.step,
            "callbacks": ", ".join(shared),
            "on_interrupt": self.on_interrupt,
            "the data": self.dataset.digest(),
        }

    def named_callbacks(self) -> dict[str, Callback]:
        """{"EarlyStopping 0": callback, …}, numbered within each class."""
        names = [type(callback).__name__ for callback in self.callbacks]
        return {f"{name} {names[:i].count(name)}": self.callbacks[i] for i, name in enumerate(names)}

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(arrays on the device, values for JSON): all it takes to continue, between two steps. Waits for the device.

        All ranks must call it; the first rank gets the metrics of all.
        """
        state, history, settings = self.state, self.history, self.settings()
        arrays = self._state_arrays()
        if state.loss_scale is not None:
            arrays["loss scale"] = state.loss_scale.state
        if self.under_way:
            metrics = self.metrics.over_ranks(self.group)
            arrays |= {f"figures {name}": a for name, a in metrics.state_dict().items()}  # named so in the file format
        callback_values: dict[str, dict[str, Any]] = {}
        for key, callback in self.named_callbacks().items():
            callback_values[key] = {}
            for name, value in _checked_state(callback).items():
                if hasattr(value, "dtype"):
                    arrays[f"callback {key} {name}"] = value
                else:
                    callback_values[key][name] = value
        return arrays, {
            "what": settings.training,
            "batches": settings.batches,
            "environment": settings.environment,
            "step": state.step,
            "epoch": state.epoch,
            "rate_factor": state.rate_factor,
            "constant_rate": state.optimizer_state.constant_rate,
            "last_rate": self.last_rate,
            "first_epoch": self.first_epoch,
            "first_step": self.first_step,
            "under_way": self.under_way,
            "seen": self.seen,
            "elapsed": self.elapsed(),
            "history": dict(history),
            "seconds": history.seconds,
            "stopped": None if history.stopped == INTERRUPTED else history.stopped,
            "callbacks": callback_values,
        }

    def _state_arrays(self, under_way: bool | None = None) -> dict[str, Any]:
        """The vectors of the optimizer and the copies from the start of the epoch, for this model's parameters only."""
        gathered = self.model.context.store.gathered
        arrays = {f"slot {name}": gathered(vector) for name, vector in self.state.optimizer_state.slots.items()}
        if self.under_way if under_way is None else under_way:
            for i, (name, copy) in enumerate(self.epoch_start.copies.items()):
                arrays[f"start {i}"] = gathered(copy) if self._is_flat(name) else copy
        return arrays

    def _is_flat(self, name: str) -> bool:
        """Whether this array of a snapshot is as long as the flat vectors: the weights, or of the optimizer."""
        return name == "the weights" or name in self.state.optimizer_state.slots

    def load_state_dict(self, arrays: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Continue where a run with this state stopped. The states of callbacks are not loaded here."""
        state, store, asarray = self.state, self.model.context.store, self.model.backend.asarray
        for name, vector in state.optimizer_state.slots.items():
            store.scatter(asarray(arrays[f"slot {name}"]), vector)
        if state.loss_scale is not None and "loss scale" in arrays:
            state.loss_scale.state[...] = asarray(arrays["loss scale"])
        state.optimizer_state.step, state.epoch = values["step"], values["epoch"]
        # Files of earlier versions do not have the rates.
        state.rate_factor, state.optimizer_state.constant_rate = values["rate_factor"], values.get("constant_rate")
        self.last_rate = values.get("last_rate", state.learning_rate)
        self.first_epoch, self.first_step = values["first_epoch"], values["first_step"]
        self.history.update(values["history"])
        if "learning_rate" not in self.history and values["seconds"]:
            self.history["learning_rate"] = [math.nan] * len(values["seconds"])
        self.history.seconds, self.history.stopped = values["seconds"], values["stopped"]
        if not values["under_way"]:
            self.epoch_start.take()
            return
        self.under_way, self.seen = True, values["seen"]
        self.start_clock(values["elapsed"])
        self.metrics.load_state_dict(_with_prefix(arrays, "figures "))
        if self.group.rank:  # the first rank counts them
            self.metrics.drop_sums()
        for i, (name, copy) in enumerate(self.epoch_start.copies.items()):
            start = asarray(arrays[f"start {i}"])
            if self._is_flat(name):
                store.scatter(start, copy)
            else:
                copy[...] = start


def _checked_state(callback: Callback) -> Mapping[str, Any]:
    state, kind = callback.state(), type(callback).__name__
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ArgumentTypeError(f"{kind}: state must return a dict with text as keys, not {shown(state)}.")
    for name, value in state.items():
        if hasattr(value, "dtype") and getattr(value.dtype, "kind", "f") not in "fiub":
            raise ArgumentTypeError(f"{kind}: {name} in its state is not an array of numbers, but of {value.dtype}.")
    return state


def _with_prefix(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
