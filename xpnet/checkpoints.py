"""A model in a safetensors file: weights and buffers by name, the architecture as JSON in the header.

Nothing is ever unpickled: classes come from a closed list and from what the caller hands in.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy

from xpnet import augment, initializers, layers
from xpnet.config import Configured
from xpnet.errors import ArgumentError, ArgumentTypeError, FileError, StateError

_FORMAT = "xpnet-model-2"
TRAINING = "training/"  # begins the names of arrays that are not the model's


def write(path: Any, model: layers.Sequential, state: dict[str, Any] | None = None, **texts: str) -> None:
    """Write a model whole or not at all: what makes it, and its arrays by name; and what else there is to keep."""
    from safetensors.numpy import save as to_bytes

    arrays = {**model.context.store.state(), **(state or {})}
    texts = {"format": _FORMAT, "architecture": json.dumps(architecture(model), sort_keys=True), **texts}
    write_atomically(path, to_bytes(arrays, metadata={**texts, "sha256": _digest(arrays, texts)}))


def architecture(model: layers.Sequential) -> dict[str, Any]:
    """What makes a model, layers among it, as JSON can hold it."""
    frozen = [parameter.name for parameter in model.parameters if not parameter.trainable]
    return {name: _encode(value) for name, value in {**model.get_config(), "frozen": frozen}.items()}


def read(path: Any, custom_layers: Iterable[type[layers.Layer]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the arguments that make a model and its frozen parameters, its arrays by name), in `refusing_damage`."""
    known = {cls.__name__: cls for cls in _built_in()} | {f"custom {cls.__name__}": cls for cls in custom_layers}
    arrays, texts = read_all(path)
    made_of = {name: _decode(value, known) for name, value in json.loads(texts["architecture"]).items()}
    return made_of, {name: a for name, a in arrays.items() if not name.startswith(TRAINING)}


def read_all(path: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """(all arrays by name, all texts) of a file of ours, in `refusing_damage`."""
    from safetensors import safe_open

    if not Path(path).is_file():
        raise FileError(f"{path}: there is no such file.")
    with safe_open(path, framework="numpy") as file:
        texts = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if texts.get("format") != _FORMAT:
        raise FileError(
            f"{path}: not a model of this version of xpnet (format {texts.get('format')!r}, not {_FORMAT!r}). "
            "Plain weights go in by model.load_state_dict(safetensors.numpy.load_file(path))."
        )
    if texts.pop("sha256") != _digest(arrays, texts):
        raise FileError(f"{path}: it was altered: its content does not have the SHA-256 in its header.")
    return arrays, texts


@contextlib.contextmanager
def refusing_damage(path: Any) -> Iterator[None]:
    """Whatever a damaged file leads to while it is read and built is a FileError with its path."""
    from safetensors import SafetensorError

    try:
        yield
    except FileError:
        raise
    except (SafetensorError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError, MemoryError,
            RecursionError, StateError) as error:  # fmt: skip
        raise FileError(f"{path}: the file is truncated, altered or foreign: {error}") from error


def write_atomically(path: Any, content: bytes) -> None:
    """Write under a temporary name beside `path`, then rename: a reader sees the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _digest(arrays: dict[str, Any], texts: dict[str, str]) -> str:
    """SHA-256 over texts, names, dtypes, shapes and values: safetensors has no checksum of its own."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(numpy.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _built_in() -> list[type[Configured]]:
    """The closed list of classes that a file may name."""
    named = [getattr(room, name) for room in (layers, augment) for name in room.__all__]
    return [*named, *(c for c in vars(initializers).values() if isinstance(c, type) and issubclass(c, Configured))]


def _encode(value: Any) -> Any:
    if isinstance(value, Configured):
        config = {name: _encode(item) for name, item in value.get_config().items()}
        built_in = type(value) in _built_in()
        if not built_in and isinstance(value, layers.Sequential) and type(value).__module__.startswith("xpnet."):
            # A nested model is a plain container to the model that holds it.
            return {"class": "Sequential", "config": {"layers": config["layers"]}}
        custom = "" if built_in else "custom "
        return {"class": custom + type(value).__name__, "config": config}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, numpy.ndarray | numpy.generic):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ArgumentTypeError(f"{value!r} cannot be written to a model file: keep numbers, text and lists in get_config.")


def _decode(value: Any, known: dict[str, type[Configured]]) -> Any:
    if isinstance(value, list):
        return [_decode(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    if value["class"] not in known:
        name = value["class"].removeprefix("custom ")
        raise ArgumentError(
            f"it holds a layer {name!r} that xpnet does not know; pass its class: custom_layers=[{name}]"
        )
    return known[value["class"]].from_config({n: _decode(item, known) for n, item in value["config"].items()})
