"""A run of `fit` as a file, and the same run going on from it, bit for bit.

The file is the model's own, with the rest of the run beside it: the optimiser's vectors, where in which epoch the run
stands, the figures so far, what callbacks remember. Order and noise need nothing, for both are functions of the seed,
the epoch and the step.
"""

import json
import re
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from xpnet import checkpoints
from xpnet.errors import ArgumentError, ArgumentTypeError, FileError

if TYPE_CHECKING:
    from xpnet.callbacks import Callback
    from xpnet.run import Run

_FORMAT = "xpnet-training-1"


def write(path: Any, run: "Run") -> None:
    """Write where a run stands, between two updates, whole or not at all. Waits for the device.

    Of several ranks the first one writes, with the figures of all of them.
    """
    state, history = run.state, run.history
    figures = run.figures.joined(run.ranks) if run.under_way and run.figures is not None else None
    if run.ranks.rank:
        return
    assert state.memory is not None
    arrays = {f"slot {name}": vector for name, vector in state.memory.slots.items()}
    if state.scaling is not None:
        arrays["loss scale"] = state.scaling.numbers
    if figures is not None:
        arrays |= {f"figures {name}": a for name, a in figures.state().items()}
        arrays |= {f"start {i}": copy for i, copy in enumerate(run.start.copies)}
    remembered: dict[str, dict[str, Any]] = {}
    for key, callback in _by_kind(run.callbacks):
        remembered[key] = {}
        for name, value in callback.state().items():
            if hasattr(value, "dtype"):
                arrays[f"callback {key} {name}"] = value
            else:
                remembered[key][name] = value
    progress = {
        "format": _FORMAT,
        "what": _what(run),
        "batches": _batches(run),
        "environment": _environment(run),
        "step": state.step,
        "epoch": state.epoch,
        "rate_factor": state.rate_factor,
        "first_epoch": run.first_epoch,
        "first_step": run.first_step,
        "under_way": run.under_way,
        "seen": run.seen,
        "elapsed": run.elapsed(),
        "history": dict(history),
        "seconds": history.seconds,
        "stopped": None if history.stopped == "interrupted" else history.stopped,
        "callbacks": remembered,
    }
    to_numpy = run.model.backend.to_numpy
    named = {checkpoints.TRAINING + name: to_numpy(a) for name, a in arrays.items()}
    try:
        text = json.dumps(progress)
    except TypeError as error:
        raise ArgumentTypeError(
            f"a checkpoint cannot hold what a callback's state() gives: {error}. Give arrays, numbers, text or lists."
        ) from error
    checkpoints.write(path, run.model, named, training=text)


def restore(path: Any, run: "Run") -> "list[tuple[Callback, dict[str, Any] | None]]":
    """Put a run that has not begun where the file's run stood. Each callback with what it remembers, or None."""
    with checkpoints.refusing_damage(path):
        arrays, texts = checkpoints.read_all(path)
        if "training" not in texts:
            raise FileError(
                f"{path}: it holds a model and no training to go on with, as model.save writes it. Train "
                "xpnet.load(path) without resume_from, or resume from a file of callbacks.Checkpoint."
            )
        progress = json.loads(texts["training"])
        if progress.get("format") != _FORMAT:
            raise FileError(f"{path}: it holds a training of another version of xpnet, {progress.get('format')!r}.")
        made_of = json.loads(texts["architecture"])
    _refuse_another_run(path, run, made_of, progress)
    with checkpoints.refusing_damage(path):
        _restore_model(run, progress, arrays, made_of["frozen"])
        _restore_place(run, progress, arrays)
        remembered: dict[str, dict[str, Any]] = {
            key: {**values, **_named(arrays, f"callback {key} ")} for key, values in progress["callbacks"].items()
        }
    present = dict(_by_kind(run.callbacks))
    missing = [key for key, values in remembered.items() if values and key not in present]
    if missing and not run.ranks.rank:  # others are without those that print or write
        text = f"{path} holds what callbacks remember that this fit is without: {', '.join(missing)}."
        warnings.warn(text, UserWarning, stacklevel=7)  # at the call of fit
    before, now = {"ranks": "1", **progress["environment"]}, _environment(run)
    other = [f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in now if now[name] != before.get(name)]
    if other:
        text = f"{path}: results will differ by rounding from those of a run that never stopped: {'; '.join(other)}."
        warnings.warn(text, UserWarning, stacklevel=7)
    return [(callback, remembered.get(key)) for key, callback in present.items()]


def _restore_model(run: "Run", progress: Mapping[str, Any], arrays: Mapping[str, Any], frozen: Sequence[str]) -> None:
    """Weights, buffers, what is frozen, and what the optimiser remembers."""
    state, backend = run.state, run.model.backend
    assert state.memory is not None
    for own in run.model.context.store.arrays():
        own.value[...] = backend.asarray(arrays[own.name])
    for parameter in run.model.parameters:
        parameter.trainable = parameter.name not in frozen
    for name, vector in state.memory.slots.items():
        vector[...] = backend.asarray(arrays[f"{checkpoints.TRAINING}slot {name}"])
    scale = arrays.get(f"{checkpoints.TRAINING}loss scale")
    if state.scaling is not None and scale is not None:
        state.scaling.numbers[...] = backend.asarray(scale)
    state.memory.step, state.epoch, state.rate_factor = progress["step"], progress["epoch"], progress["rate_factor"]


def _restore_place(run: "Run", progress: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Where in which epoch the run stands, and its figures."""
    run.first_epoch, run.first_step = progress["first_epoch"], progress["first_step"]
    run.history.update(progress["history"])
    run.history.seconds, run.history.stopped = progress["seconds"], progress["stopped"]
    if progress["under_way"]:
        run.under_way, run.seen = True, progress["seen"]
        run.start_clock(progress["elapsed"])
        run.figures = run.new_figures()
        run.figures.load_state(_named(arrays, "figures "))
        if run.ranks.rank:  # they are on the first rank's account
            run.figures.forget_sums()
        start = _named(arrays, "start ")
        for i, copy in enumerate(run.start.copies):
            copy[...] = run.model.backend.asarray(start[str(i)])
    else:
        run.start.take()


def _named(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Those of the training's arrays whose names begin so, by the rest of their names."""
    prefix = checkpoints.TRAINING + prefix
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


def _refuse_another_run(path: Any, run: "Run", made_of: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
    own = json.loads(json.dumps(checkpoints.architecture(run.model)))
    for name, value in own.items():
        if name != "frozen" and value != made_of.get(name):  # callbacks may freeze, as the training goes on
            raise ArgumentError(
                f"{path}: the checkpoint is of another model: {name} is {made_of.get(name)!r} there and {value!r} "
                "here. Make the model as it was made then; or take only its weights, by xpnet.load."
            )
    for name, text in _what(run).items():
        if text != progress["what"][name]:
            raise ArgumentError(
                f"{path}: the checkpoint is of a fit with {name}={progress['what'][name]}, and this one has {text}. "
                "Give fit the same; or begin anew with the weights alone, by xpnet.load."
            )
    for name, value in _batches(run).items():
        if progress["under_way"] and value != progress["batches"][name]:
            raise ArgumentError(
                f"{path}: the checkpoint stands in the middle of an epoch with {name}={progress['batches'][name]}, "
                f"which cannot be finished with {value}."
            )


def _what(run: "Run") -> dict[str, str]:
    """What must be the same for a run to go on."""
    state = run.state
    return {
        name: re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # functions of a user's own have no better name
        for name, value in (("optimizer", state.optimizer), ("loss", state.loss), ("metrics", state.metrics))
    }


def _batches(run: "Run") -> dict[str, Any]:
    """What must be the same for an epoch to go on."""
    return {
        "samples": run.samples,
        "batch_size": run.batch_size,
        "accumulate": run.accumulate,
        "shuffle": run.shuffle,
    }


def _environment(run: "Run") -> dict[str, str]:
    """What must be the same for a run to repeat itself bit for bit."""
    return {**run.model.backend.environment(), "ranks": str(run.ranks.size)}


def what_ranks_share(run: "Run") -> dict[str, str]:
    """What must be the same on all ranks, by name; of the data its layout and some of its numbers."""
    model, state = run.model, run.state
    layout = json.dumps(checkpoints.architecture(model))
    return {
        "the version of xpnet": sys.modules["xpnet"].__version__,
        "the version of NumPy": numpy.__version__,
        "the seed": str(model.context.seed),
        "the model": f"{len(model.layers)} layers, check {zlib.crc32(layout.encode()):08x}",
        "dtype and precision": f"{model.context.dtype}, {model.context.precision}",
        **_what(run),
        **{name: str(value) for name, value in _batches(run).items()},
        "epochs": str(run.epochs),
        "the epoch": str(state.epoch),
        "the step": str(state.step),
        "callbacks": ", ".join(key for key, c in _by_kind(run.callbacks) if not c.only_on_first_rank),
        "the data": run.data.digest(),
    }


def _by_kind(callbacks: "Sequence[Callback]") -> "Iterator[tuple[str, Callback]]":
    """("EarlyStopping 0", callback), … numbered within each class."""
    counts: dict[str, int] = {}
    for callback in callbacks:
        name = type(callback).__name__
        counts[name] = counts.get(name, -1) + 1
        yield f"{name} {counts[name]}", callback
