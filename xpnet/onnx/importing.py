"""An ONNX file as a model: a chain of layers, with Residual where two ways of the graph are added."""

from collections.abc import Sequence
from typing import Any

import onnx

from xpnet import layers
from xpnet.checkpoints import refusing_damage
from xpnet.errors import ArgumentError, FileError
from xpnet.model import Sequential
from xpnet.onnx import operators  # noqa: F401  # fills the reader's table
from xpnet.onnx.reader import Constant, Part, Reader


def import_onnx(path: Any, backend: Any = "auto") -> Sequential:
    """The model of an ONNX file, in float32 or float64 as the file has it.

    The graph is a chain of known operators from one input to one output; two ways of it may be added, as in residual
    networks. Images of the model are channels last, (N, H, W, C), also where the file's are channels first: transpose
    what you give it.

    Raises FileError for a file that is missing, damaged or no ONNX, and ArgumentError for an operator, or a use of one,
    that has no layer here: the message names it.
    """
    with refusing_damage(path):
        try:
            file = onnx.load(str(path))
        except FileNotFoundError as error:
            raise FileError(f"{path}: there is no such file.") from error
        except Exception as error:  # protobuf has errors of its own
            raise FileError(f"{path}: this is no ONNX file: {error}") from error
        try:
            onnx.checker.check_model(file)
        except onnx.checker.ValidationError as error:
            raise FileError(f"{path}: this is no valid ONNX file: {error}") from error
    try:
        reader = Reader(path, file)
        value = reader.read()
    except ArgumentError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
        raise FileError(f"{path}: the file is altered, or no ONNX that can be read: {error!r}") from error
    model = Sequential(
        [part.layer for part in value.parts] or [layers.Identity()], reader.input_shape, backend, dtype=reader.dtype
    )
    state = model.state_dict()
    state.update(_named(value.parts, ""))
    model.load_state_dict(state)
    return model


def _named(parts: Sequence[Part], prefix: str) -> dict[str, Constant]:
    """The weights of a chain by the names that they have in the model."""
    found: dict[str, Constant] = {}
    for i, part in enumerate(parts):
        found |= {f"{prefix}{i}.{name}": value for name, value in part.weights.items()}
        if part.ways:
            way, skip = part.ways
            found |= _named(way, f"{prefix}{i}.")
            found |= _named(skip, f"{prefix}{i}.skip.") if len(skip) != 1 else {
                f"{prefix}{i}.skip.{name}": value for name, value in skip[0].weights.items()
            }  # fmt: skip
    return found
