"""Import an ONNX file as a model."""

from collections.abc import Iterable, Iterator
from typing import Any

import onnx

from xpnet import layers
from xpnet.errors import ArgumentError, FileError
from xpnet.model import Sequential
from xpnet.onnx import images, operators  # noqa: F401  # they register operators in reader.CONVERTERS
from xpnet.onnx.reader import Reader, UnsupportedError
from xpnet.onnx.simplifying import simplified
from xpnet.onnx.tensors import Constant, LoadedLayer


def import_onnx(path: Any, backend: Any = "auto") -> Sequential:
    """Import an ONNX file as a model, in float32 or float64 like the file.

    The graph must be a chain of operators from one input to one output. Two branches may be added, as in residual
    networks. Only what the output depends on is read. The model takes images with channels last, (N, H, W, C), even if
    the file takes channels first. Weights that several operators share become separate. backend: as in Sequential.

    Raises FileError if the file is missing, damaged or not ONNX, and ArgumentError for an operator that no layer of
    xpnet supports, or not with these attributes, inputs or outputs. The message names the node.
    """
    try:
        file = onnx.load(str(path))
    except FileNotFoundError as error:
        raise FileError(f"{path}: there is no such file.") from error
    except Exception as error:  # protobuf raises its own errors
        raise FileError(f"{path}: this is not an ONNX file: {error}") from error
    _relax(file)
    try:
        reader = Reader(path, file)
        output = reader.read()  # names what is not supported before the checker calls it invalid
    except UnsupportedError as error:
        raise ArgumentError(str(error)) from None
    nodes = list(reader.nodes)
    del file.graph.node[:]
    file.graph.node.extend(nodes)  # without those that the output does not depend on
    try:
        onnx.checker.check_model(file)
    except Exception as error:
        raise FileError(f"{path}: this is not a valid ONNX file: {error}") from error
    chain = simplified(output.layers_after(None), reader.input_shape)
    stack = [loaded.layer for loaded in chain] or [layers.Identity()]
    model = Sequential(stack, reader.input_shape, backend, dtype=output.dtype.name)
    model.load_state_dict(dict(_weights(chain)))
    return model


def _relax(file: onnx.ModelProto) -> None:
    """Correct details that ONNX's checker would refuse and that do not affect the model."""
    file.ir_version = max(file.ir_version, 4)  # in version 3, initializers had to be inputs as well
    for output in file.graph.output:  # may lack a shape
        output.type.CopyFrom(onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, []))
    for named in (*file.opset_import, *file.graph.node):
        if named.domain == "ai.onnx":  # another name of the standard operators
            named.domain = ""


def _weights(chain: Iterable[LoadedLayer]) -> Iterator[tuple[str, Constant]]:
    """(name in the built model, values) of all weights of these layers."""
    for loaded in chain:
        yield from ((f"{loaded.layer.path}.{name}", value) for name, value in loaded.weights.items())
        for branch in loaded.branches:
            yield from _weights(branch)
