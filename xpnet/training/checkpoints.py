"""Checkpoint files: model files that also contain the state of a run of fit."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy

from xpnet.data.files import as_path
from xpnet.errors import ArgumentError, ArgumentTypeError, FileError
from xpnet.layers.containers import Container
from xpnet.training import model_files
from xpnet.training.model_files import Contents

_FORMAT = "xpnet-training-1"
_MAX_COUNT = 2**53  # larger integers are not exact as floats, in which schedules compute


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _MAX_COUNT)


def _is_magnitude(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _by_name(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def is_list_of_numbers(value: Any, length: int) -> bool:
    """Whether this is a list of `length` numbers. NaN and infinity are allowed."""
    return isinstance(value, list) and len(value) == length and all(map(_is_number, value))


#: What each value of a run must be, in words and as a test. A file may have more values, which are ignored.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "what": ("texts by name", _by_name(lambda value: isinstance(value, str))),
    "batches": ("settings by name", lambda value: isinstance(value, dict)),
    "environment": ("texts by name", _by_name(lambda value: isinstance(value, str))),
    **dict.fromkeys(("step", "epoch", "first_epoch", "first_step", "seen"), ("a count", _is_count)),
    **dict.fromkeys(("rate_factor", "last_rate", "elapsed"), ("a finite number of at least 0", _is_magnitude)),
    "constant_rate": ("a finite number of at least 0, or null", lambda value: value is None or _is_magnitude(value)),
    "under_way": ("true or false", lambda value: isinstance(value, bool)),
    "history": ("lists by name", _by_name(lambda value: isinstance(value, list))),
    "seconds": ("a list of finite numbers", lambda value: isinstance(value, list) and all(map(_is_magnitude, value))),
    "stopped": ("a text or null", lambda value: value is None or isinstance(value, str)),
    "callbacks": ("states by name", _by_name(lambda value: isinstance(value, dict))),
}

_ABSENT_IN_OLD_FILES = ("constant_rate", "last_rate")

#: What each of the batches' settings must be.
_BATCHES: dict[str, Callable[[Any], bool]] = {
    "samples": lambda value: value is None or (_is_count(value) and value > 0),
    "batch_size": lambda value: _is_count(value) and value > 0,
    "accumulate": lambda value: _is_count(value) and value > 0,
    "shuffle": lambda value: isinstance(value, bool),
}


def write(path: Any, model: Container, arrays: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Write a model and the state of its run atomically. Waits for the device."""
    try:
        text = json.dumps({"format": _FORMAT, **values}, default=_plain)
    except TypeError as error:
        raise ArgumentTypeError(
            f"a checkpoint cannot contain what a callback's state() returned: {error}. Return arrays, numbers, text or "
            "lists."
        ) from error
    model_files.write(path, model, {name: model.backend.to_numpy(a) for name, a in arrays.items()}, training=text)


def read(path: Any) -> tuple[Contents, dict[str, Any], dict[str, Any]]:
    """(the contents of the file, the architecture of the model, the values of the run).

    Raises FileError if the file is missing, damaged or not a checkpoint.
    """
    path = as_path("", "resume_from", path)
    with model_files.refusing_damage(path):
        contents = model_files.read_all(path)
        if "training" not in contents.texts:
            raise FileError(
                f"{path}: it contains a model, as model.save writes it, but no training state. Train "
                "xpnet.load(path) without resume_from, or resume from a file of callbacks.Checkpoint."
            )
        values, architecture = json.loads(contents.texts["training"]), contents.architecture
        if not isinstance(values, dict) or not isinstance(architecture, dict):
            raise FileError(f"{path}: its training state or its architecture has no names.")
        if values.get("format") != _FORMAT:
            raise FileError(f"{path}: its training is in the format {values.get('format')!r}, not {_FORMAT!r}.")
        _refuse_invalid(values)
        return contents, architecture, values


def _plain(value: Any) -> Any:
    """A NumPy scalar inside of a callback's lists as a Python number."""
    if isinstance(value, numpy.generic):
        return value.item()
    raise TypeError(f"{value!r} has no JSON form")


def _refuse_invalid(values: Mapping[str, Any]) -> None:
    """Raise ArgumentError unless these are values of a run, as `Run.state_dict` gives them, that fit together."""
    for name, (kind, fits) in _RULES.items():
        if name not in values:
            if name in _ABSENT_IN_OLD_FILES:
                continue
            raise ArgumentError(f"its training state has no {name!r}.")
        if not fits(values[name]):
            raise ArgumentError(f"its {name!r} must be {kind}, not {values[name]!r:.200}.")
    for name, known in (("what", ("optimizer", "loss", "metrics")), ("batches", tuple(_BATCHES))):
        if missing := [key for key in known if key not in values[name]]:
            raise ArgumentError(f"its {name!r} has no {', '.join(missing)}.")
    for name, fits in _BATCHES.items():
        if not fits(values["batches"][name]):
            raise ArgumentError(f"its {name!r} cannot be {values['batches'][name]!r:.200}.")
    epochs, steps = values["epoch"] - values["first_epoch"], values["step"] - values["first_step"]
    if epochs < 0 or steps < 0:
        raise ArgumentError("it ends before it begins: its epoch or its step is below the first one.")
    losses = values["history"].get("loss", [])
    timed = is_list_of_numbers(values["seconds"], epochs)
    if not (timed and is_list_of_numbers(losses, epochs) and all(map(math.isfinite, losses))):
        raise ArgumentError(f"its history must have a finite loss and a time for each of its {epochs} epochs.")
    samples, per_step = values["batches"]["samples"], values["batches"]["batch_size"] * values["batches"]["accumulate"]
    if samples is None:
        fitting = not values["under_way"] or (values["seen"] >= steps and (steps > 0 or not values["seen"]))
    elif values["under_way"]:
        seen = values["seen"]
        fitting = seen <= samples and steps == -(-seen // per_step) and (seen == samples or seen % per_step == 0)
    else:
        fitting = steps <= -(-samples // per_step)
    if not fitting:
        raise ArgumentError(f"its {values['seen']} samples and {steps} steps of this epoch do not fit together.")
