"""Checkpoint files: model files that also contain the state of a run of fit."""

import json
from collections.abc import Mapping
from typing import Any

from xpnet.data.files import as_path
from xpnet.errors import ArgumentTypeError, FileError
from xpnet.layers.containers import Sequential
from xpnet.training import model_files
from xpnet.training.model_files import Contents

_FORMAT = "xpnet-training-1"


def write(path: Any, model: Sequential, arrays: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Write a model and the state of its run atomically. Waits for the device."""
    try:
        text = json.dumps({"format": _FORMAT, **values})
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
        values = json.loads(contents.texts["training"])
        if values.get("format") != _FORMAT:
            raise FileError(f"{path}: its training is in the format {values.get('format')!r}, not {_FORMAT!r}.")
        return contents, contents.architecture, values
