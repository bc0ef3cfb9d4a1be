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

_FORMAT = "xpnet-model-1"


def write(path: Any, architecture: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a model whole or not at all: the arguments that make it, layers among them, and its arrays by name."""
    from safetensors.numpy import save as to_bytes

    encoded = json.dumps({name: _encode(value) for name, value in architecture.items()}, sort_keys=True)
    metadata = {"format": _FORMAT, "architecture": encoded, "sha256": _digest(state)}
    write_atomically(path, to_bytes(state, metadata=metadata))


def read(path: Any, custom_layers: Iterable[type[layers.Layer]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(architecture, state) as `write` took them, in `refusing_damage`."""
    from safetensors import safe_open

    known = {cls.__name__: cls for cls in _built_in()} | {f"custom {cls.__name__}": cls for cls in custom_layers}
    if not Path(path).is_file():
        raise FileError(f"{path}: there is no such file.")
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get("format") != _FORMAT:
        raise FileError(
            f"{path}: not a model of this version of xpnet (format {metadata.get('format')!r}, not {_FORMAT!r}). "
            "Plain weights go in by model.load_state_dict(safetensors.numpy.load_file(path))."
        )
    if metadata["sha256"] != _digest(state):
        raise FileError(f"{path}: the weights were altered: they do not have the SHA-256 in the file's header.")
    architecture = json.loads(metadata["architecture"])
    return {name: _decode(value, known) for name, value in architecture.items()}, state


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


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and values: safetensors has no checksum of its own."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} {state[name].shape}".encode())
        digest.update(numpy.ascontiguousarray(state[name]).tobytes())
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
