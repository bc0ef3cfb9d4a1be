"""Model files: weights and buffers in safetensors format, with the architecture as JSON in the header.

Nothing is unpickled: classes come from a fixed list and from the caller.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy

from xpnet import augment, initializers, layers
from xpnet.backends.shortage import is_shortage
from xpnet.concurrency.memory import refuse_without_memory
from xpnet.config import Configured
from xpnet.data.files import foreign_hint, memory_error, model_path, read_bytes, write_atomically
from xpnet.errors import ArgumentError, ArgumentTypeError, BackendError, DeviceMemoryError, FileError, shown
from xpnet.layers.containers import Container
from xpnet.layers.graph import Graph, numbered

_FORMAT, _GRAPH_FORMAT = "xpnet-model-2", "xpnet-model-3"  # of models in a row, and of graphs
_GRAPH = ("layers", "inputs", "calls", "outputs", "name")  # what a file has of a graph in another model
_SAFETENSORS_OVERHEAD = 2**22  # bytes that it needs beside the arrays
_TRAINING = "training/"  # the prefix of the names of arrays that belong to a run of fit


class Contents(NamedTuple):
    """What a file contains: the arrays of the model and of a run of fit, and texts; each by name."""

    model: dict[str, Any]
    run: dict[str, Any]
    texts: dict[str, str]

    @property
    def architecture(self) -> dict[str, Any]:
        return json.loads(self.texts["architecture"])  # type: ignore[no-any-return]


def write(path: Any, model: Container, run: Mapping[str, Any] | None = None, **texts: str) -> None:
    """Write a model atomically, together with arrays of a run and texts."""
    from safetensors.numpy import save as to_bytes

    path = model_path("save", path)
    arrays = model.context.store.state() | {_TRAINING + name: a for name, a in (run or {}).items()}
    described = architecture(model)
    version = _GRAPH_FORMAT if '"calls"' in json.dumps(described) else _FORMAT
    texts = {"format": version, "architecture": json.dumps(described, sort_keys=True), **texts}
    # safetensors holds the arrays three times. If memory is short it ends the process, or never returns.
    refuse_without_memory(3 * sum(a.nbytes for a in arrays.values()) + _SAFETENSORS_OVERHEAD)
    write_atomically(path, to_bytes(arrays, metadata={**texts, "sha256": _digest(arrays, texts)}))


def architecture(model: Container) -> dict[str, Any]:
    """The arguments that make a model, including its layers, as values for JSON; and its frozen parameters."""
    frozen = [parameter.name for parameter in model.parameters if not parameter.trainable]
    return _encoded({**model.get_config(), "frozen": frozen}, {})


def read(path: Any, custom_layers: Iterable[type[layers.Layer]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the arguments that make a model and its frozen parameters, its arrays by name). Use it in `refusing_damage`."""
    contents = read_all(path)
    known: dict[str, type[Configured]] = {cls.__name__: cls for cls in (*_built_in(), Graph)}
    known |= {f"custom {cls.__name__}": cls for cls in custom_layers}
    architecture = contents.architecture
    if unknown := list(dict.fromkeys(_unknown_classes(architecture, known))):
        raise FileError(
            f"{path}: it contains {'a layer' if len(unknown) == 1 else 'layers'} "
            f"{', '.join(map(repr, unknown))} that xpnet does not know. If you have the "
            f"{'class' if len(unknown) == 1 else 'classes'}, pass custom_layers=[{', '.join(unknown)}]."
        )
    decoded: list[Any] = []
    return {name: _decode(value, known, decoded) for name, value in architecture.items()}, contents.model


def checked_custom_layers(custom_layers: Any) -> list[type[layers.Layer]]:
    """The classes of custom layers, as a list. Raises ArgumentTypeError."""
    given = list(custom_layers) if isinstance(custom_layers, Iterable) else [custom_layers]
    if isinstance(custom_layers, type) or not all(isinstance(c, type) and issubclass(c, Configured) for c in given):
        raise ArgumentTypeError(
            f"custom_layers must be a list of layer classes, [MyLayer], not {shown(custom_layers)}."
        )
    return given


def names_of(value: Any, what: str, known: Iterable[str]) -> list[str]:
    """A list from a file, which must contain only these names."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ArgumentError(f"its {what} are {value!r}, not a list of names.")
    if unknown := sorted(set(value).difference(known)):
        raise ArgumentError(f"its {what} include {', '.join(unknown)}, which the model does not have.")
    return value


def read_all(path: Any) -> Contents:
    """The contents of a file that `write` wrote. Use it in `refusing_damage`."""
    from safetensors.numpy import load as from_bytes

    content = read_bytes(path)
    refuse_without_memory(len(content) + _SAFETENSORS_OVERHEAD)
    arrays = from_bytes(content)  # copies; it also checks the header, which is JSON after its length
    texts = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    del content
    if texts.get("format") not in (_FORMAT, _GRAPH_FORMAT):
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
    """Turn every error that a damaged file causes while it is read or its model is built into a FileError.

    Too little memory is no fault of the file: it raises DeviceMemoryError.
    """
    try:
        yield
    except (FileError, BackendError):
        raise
    except DeviceMemoryError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise DeviceMemoryError(f"{path}: {error}") from error
    except Exception as error:
        if is_shortage(error):
            raise memory_error(path, error) from error
        raise FileError(f"{path}: the file is damaged or not a model file: {error}{foreign_hint(path)}") from error


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


def _encoded(config: Mapping[str, Any], seen: dict[Any, int]) -> dict[str, Any]:
    """A config in the order in which `_decode` finds it in a file, where keys are sorted."""
    return {name: _encode(config[name], seen) for name in sorted(config)}


def _identity(layer: layers.Layer) -> Any:
    """Equal for layers that are the same, or share their parameters as two parts of a copied model do."""
    if isinstance(layer, Container):
        return type(layer), *map(_identity, layer.layers)
    return type(layer), *([id(parameter.root) for parameter in layer.parameters] or [id(layer)])


def _encode(value: Any, seen: dict[Any, int]) -> Any:
    """seen: the layers encoded before, numbered in the order in which each was complete."""
    if isinstance(value, Configured):
        if isinstance(value, layers.Layer) and (number := seen.get(_identity(value))) is not None:
            return {"same": number}
        if isinstance(value, layers.Dense) and value.tied_to is not None and _identity(value.tied_to) not in seen:
            raise ArgumentError(
                f"{value!r} is tied to an Embedding that is not in this model, so the model cannot be saved: save one "
                "that has both layers."
            )
        config = _encoded(value.get_config(), seen)
        if isinstance(value, layers.Layer) and value.name is not None:
            config["name"] = value.name  # a custom get_config may leave it out
        built_in = type(value) in _built_in()
        if isinstance(value, layers.Layer):
            seen[_identity(value)] = len(seen)
        if not built_in and isinstance(value, Container) and type(value).__module__.startswith("xpnet."):
            # A nested model is saved as a plain container.
            kind, names = ("Graph", _GRAPH) if isinstance(value, Graph) else ("Sequential", ("layers", "name"))
            return {"class": kind, "config": {name: config[name] for name in names if name in config}}
        custom = "" if built_in else "custom "
        return {"class": custom + type(value).__name__, "config": config}
    if isinstance(value, list | tuple):
        return [_encode(item, seen) for item in value]
    if isinstance(value, numpy.ndarray | numpy.generic):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ArgumentTypeError(
        f"{value!r} cannot be written to a model file: get_config may contain numbers, text and lists."
    )


def _unknown_classes(value: Any, known: Mapping[str, type[Configured]]) -> Iterator[str]:
    """The names of the classes in an encoded value that are not known."""
    if isinstance(value, dict) and "class" in value:
        if value["class"] not in known:
            yield str(value["class"]).removeprefix("custom ")
        value = value.get("config", {})
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _unknown_classes(item, known)


def _decode(value: Any, known: Mapping[str, type[Configured]], decoded: list[Any]) -> Any:
    """decoded: the layers so far, numbered as by `_encode`."""
    if isinstance(value, list):
        return [_decode(item, known, decoded) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"same"}:
        return numbered("layer", decoded, value["same"])
    if value.keys() != {"class", "config"}:
        raise ArgumentError(f"an object in its architecture has {', '.join(map(repr, value))}, not 'class', 'config'.")
    config = {name: _decode(item, known, decoded) for name, item in value["config"].items()}
    try:
        made = known[value["class"]].from_config(config)
        if isinstance(made, layers.Layer):
            decoded.append(made)
        return made
    except MemoryError:
        raise
    except Exception as error:
        name = value["class"].removeprefix("custom ")
        raise ArgumentError(f"its layer {name} cannot be made from its arguments, {config}: {error}") from error
