"""Import an ONNX file as a model."""

from collections.abc import Sequence
from typing import Any

import onnx

from xpnet import layers
from xpnet.errors import ArgumentError, FileError
from xpnet.model import Sequential
from xpnet.onnx import operators  # noqa: F401  # registers the operators in reader.CONVERTERS
from xpnet.onnx.reader import Constant, LoadedLayer, Reader


def import_onnx(path: Any, backend: Any = "auto") -> Sequential:
    """Import an ONNX file as a model, in float32 or float64 like the file.

    The graph must be a chain of operators from one input to one output. Two branches may be added, as in residual
    networks. The model takes images with channels last, (N, H, W, C), even if the file takes channels first.

    Raises FileError if the file is missing, damaged or not ONNX, and ArgumentError for an operator, or an attribute of
    it, that no layer of xpnet supports.
    """
    try:
        file = onnx.load(str(path))
    except FileNotFoundError as error:
        raise FileError(f"{path}: there is no such file.") from error
    except Exception as error:  # protobuf raises its own errors
        raise FileError(f"{path}: this is not an ONNX file: {error}") from error
    try:
        onnx.checker.check_model(file)
    except Exception as error:
        raise FileError(f"{path}: this is not a valid ONNX file: {error}") from error
    try:
        reader = Reader(path, file)
        output = reader.read()
    except ArgumentError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
        raise FileError(f"{path}: the file is damaged, or its operators are used incorrectly: {error!r}") from error
    stack = [loaded.layer for loaded in output.layers] or [layers.Identity()]
    model = Sequential(stack, reader.input_shape, backend, dtype=reader.dtype)
    model.load_state_dict(model.state_dict() | _named_weights(output.layers, ""))
    return model


def _named_weights(chain: Sequence[LoadedLayer], prefix: str) -> dict[str, Constant]:
    """The weights of a chain of layers, by their names in the model."""
    found: dict[str, Constant] = {}
    for i, loaded in enumerate(chain):
        found |= {f"{prefix}{i}.{name}": value for name, value in loaded.weights.items()}
        if loaded.branches:
            inner, skip = loaded.branches
            found |= _named_weights(inner, f"{prefix}{i}.")
            found |= _named_weights(skip, f"{prefix}{i}.skip.") if len(skip) != 1 else {
                f"{prefix}{i}.skip.{name}": value for name, value in skip[0].weights.items()
            }  # fmt: skip
    return found
