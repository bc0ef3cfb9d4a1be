"""Model files: weights and buffers in safetensors format, with the architecture as JSON in the header.

Nothing is unpickled: classes come from a fixed list and from the caller.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from xpnet import augment, initializers, layers
from xpnet.config import Configured
from xpnet.errors import ArgumentError, ArgumentTypeError, FileError, StateError

_FORMAT = "xpnet-model-2"
_TRAINING = "training/"  # the prefix of the names of arrays that belong to a run of fit


class Contents(NamedTuple):
    """What a file contains: the arrays of the model and of a run of fit, and texts; each by name."""

    model: dict[str, Any]
    run: dict[str, Any]
    texts: dict[str, str]

    @property
    def architecture(self) -> dict[str, Any]:
        return json.loads(self.texts["architecture"])  # type: ignore[no-any-return]


def write(path: Any, model: layers.Sequential, run: Mapping[str, Any] | None = None, **texts: str) -> None:
    """Write a model atomically, together with arrays of a run and texts."""
    from safetensors.numpy import save as to_bytes

    arrays = model.context.store.state() | {_TRAINING + name: a for name, a in (run or {}).items()}
    texts = {"format": _FORMAT, "architecture": json.dumps(architecture(model), sort_keys=True), **texts}
    write_atomically(path, to_bytes(arrays, metadata={**texts, "sha256": _digest(arrays, texts)}))


def architecture(model: layers.Sequential) -> dict[str, Any]:
    """The arguments that make a model, including its layers, as values for JSON; and its frozen parameters."""
    frozen = [parameter.name for parameter in model.parameters if not parameter.trainable]
    return {name: _encode(value) for name, value in {**model.get_config(), "frozen": frozen}.items()}


def read(path: Any, custom_layers: Iterable[type[layers.Layer]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the arguments that make a model and its frozen parameters, its arrays by name). Use it in `refusing_damage`."""
    known = {cls.__name__: cls for cls in _built_in()} | {f"custom {cls.__name__}": cls for cls in custom_layers}
    contents = read_all(path)
    return {name: _decode(value, known) for name, value in contents.architecture.items()}, contents.model


def read_all(path: Any) -> Contents:
    """The contents of a file that `write` wrote. Use it in `refusing_damage`."""
    from safetensors import safe_open

    if not Path(path).is_file():
        raise FileError(f"{path}: there is no such file.")
    with safe_open(path, framework="numpy") as file:
        texts = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if texts.get("format") != _FORMAT:
        raise FileError(
            f"{path}: not a model of this version of xpnet (format {texts.get('format')!r}, not {_FORMAT!r}). "
            "Load plain weights with model.load_state_dict(safetensors.numpy.load_file(path))."
        )
    if texts.pop("sha256") != _digest(arrays, texts):
        raise FileError(f"{path}: the file was altered: its content does not match the SHA-256 in its header.")
    run = {name.removeprefix(_TRAINING): arrays.pop(name) for name in list(arrays) if name.startswith(_TRAINING)}
    return Contents(arrays, run, texts)


@contextlib.contextmanager
def refusing_damage(path: Any) -> Iterator[None]:
    """Turn every error that a damaged file causes while it is read or its model is built into a FileError."""
    from safetensors import SafetensorError

    try:
        yield
    except FileError:
        raise
    except (SafetensorError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError, MemoryError,
            RecursionError, StateError) as error:  # fmt: skip
        raise FileError(f"{path}: the file is damaged or not a model file: {error}") from error


def write_atomically(path: Any, content: bytes) -> None:
    """Write to a temporary file beside `path`, then rename it: a reader sees the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _digest(arrays: dict[str, Any], texts: dict[str, str]) -> str:
    """SHA-256 of texts, names, dtypes, shapes and values, because safetensors has no checksum."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(numpy.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _built_in() -> list[type[Configured]]:
    """The fixed list of classes that a file may name."""
    named = [getattr(module, name) for module in (layers, augment) for name in module.__all__]
    return [*named, *(c for c in vars(initializers).values() if isinstance(c, type) and issubclass(c, Configured))]


def _encode(value: Any) -> Any:
    if isinstance(value, Configured):
        config = {name: _encode(item) for name, item in value.get_config().items()}
        if isinstance(value, layers.Layer) and value.name is not None:
            config["name"] = value.name  # a get_config of one's own may leave it out
        built_in = type(value) in _built_in()
        if not built_in and isinstance(value, layers.Sequential) and type(value).__module__.startswith("xpnet."):
            # A nested model is saved as a plain container.
            config = {name: config[name] for name in ("layers", "name") if name in config}
            return {"class": "Sequential", "config": config}
        custom = "" if built_in else "custom "
        return {"class": custom + type(value).__name__, "config": config}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, numpy.ndarray | numpy.generic):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ArgumentTypeError(
        f"{value!r} cannot be written to a model file: get_config may contain numbers, text and lists."
    )


def _decode(value: Any, known: dict[str, type[Configured]]) -> Any:
    if isinstance(value, list):
        return [_decode(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    if value["class"] not in known:
        name = value["class"].removeprefix("custom ")
        raise ArgumentError(
            f"it contains a layer {name!r} that xpnet does not know; pass its class: custom_layers=[{name}]"
        )
    return known[value["class"]].from_config({n: _decode(item, known) for n, item in value["config"].items()})
