"""Export a model to an ONNX file.

ONNX operators expect images with channels first; xpnet's images have channels last. A Transpose node is added only
before a layer that needs the other order, so there is none inside a chain of image layers.
"""

from typing import Any

import numpy
import onnx
from onnx import helper

from xpnet import layers
from xpnet.config import choice, flag
from xpnet.data.files import write_atomically
from xpnet.errors import ArgumentError, ArgumentTypeError, StateError
from xpnet.layers.containers import Container
from xpnet.layers.graph import Graph
from xpnet.layers.structure import as_tuple, shapes_of
from xpnet.onnx import attention, layer_nodes, recurrent  # noqa: F401  # they register layers in EXPORTERS
from xpnet.onnx.reader import CHANNELS_FIRST, CHANNELS_LAST, IMAGE_LAYOUT
from xpnet.onnx.writer import FileTensor, GraphWriter


def export_onnx(
    model: Container,
    path: Any,
    *,
    channels_first: bool = False,
    input_dtype: Any = None,
    dtype: str | None = None,
) -> None:
    """Write a model to an ONNX file that computes what `predict` does: the output "y" from the input "x".

    Inputs and outputs of an xpnet.Model have their names, `model.input_names` and `model.output_names`; if there is one
    without a name, it is "x" or "y" too.

    channels_first: whether images in inputs and outputs are (N, channels, H, W), as in most other tools, rather than
    channels last. input_dtype: the dtype of x, such as "uint8" for a model that begins with Rescale; a list of them
    if there are several inputs. None means int64 for an input that an Embedding reads, and the file's dtype otherwise.
    dtype: "float32" or "float64", in which the file computes. None means float32, also for a float64 model, whose
    outputs then differ in the seventh digit: ONNX Runtime has no float64 version of many operators, such as Conv,
    AveragePool and Elu, and cannot run files that need them.

    Raises ArgumentError for a layer that has no ONNX equivalent, such as a layer of your own, and for a weight that is
    too large for float32; and StateError for a model that is not built.
    """
    if not isinstance(model, Container):
        raise ArgumentTypeError(f"model must be an xpnet model, not {model!r}.")
    if not model.is_built:
        raise StateError("the model is not built yet: give it an input_shape, or train it first.")
    shapes = shapes_of(model.input_shape)
    if flag("", "channels_first", channels_first) and not any(len(shape) == 3 for shape in shapes):
        given = ", ".join(map(str, shapes))
        raise ArgumentError(f"channels_first=True is for models of images (H, W, channels), not of inputs {given}.")
    computes = numpy.dtype(choice("", "dtype", "float32" if dtype is None else dtype, ("float32", "float64")))
    input_names, output_names = _names(model)
    graph = GraphWriter(model, computes, [*input_names, *output_names])
    inputs = [
        FileTensor(name, kind, shape, channels_first and len(shape) == 3)
        for name, kind, shape in zip(input_names, _input_dtypes(model, input_dtype, computes), shapes, strict=True)
    ]
    outputs = as_tuple(graph.add_layer(model, inputs if len(inputs) > 1 else inputs[0]))
    file = graph.finish(inputs, [
        graph.output(graph.transposed(y, channels_first=channels_first and len(y.shape) == 3), name)
        for y, name in zip(outputs, output_names, strict=True)
    ])  # fmt: skip
    helper.set_model_props(file, {IMAGE_LAYOUT: CHANNELS_FIRST if channels_first else CHANNELS_LAST})
    onnx.checker.check_model(file, full_check=True)
    write_atomically(path, file.SerializeToString())


def _names(model: Container) -> tuple[list[str], list[str]]:
    """The names of the inputs and of the outputs in the file."""
    inputs, outputs = ["x"], ["y"]
    if isinstance(model, Graph) and (len(model.inputs) > 1 or model.inputs[0].name is not None):
        inputs = model.input_names
    if isinstance(model, Graph) and (len(model.outputs) > 1 or not model.output_names[0].isdigit()):
        outputs = [f"{name}_output" if name in inputs else name for name in model.output_names]
    return inputs, outputs


def _input_dtypes(model: Container, given: Any, computes: numpy.dtype[Any]) -> list[numpy.dtype[Any]]:
    """The dtype of each input: the given one, or else int64 for an Embedding and the dtype of the file for others."""
    names = model.input_names
    each = [*given] if isinstance(given, list | tuple) else [given] * len(names)
    if len(each) != len(names):
        raise ArgumentError(f"input_dtype must have a dtype for each of the inputs {names}, not {len(each)}.")
    try:
        return [
            numpy.dtype(dtype) if dtype is not None else numpy.dtype("int64") if _embeds(model, i) else computes
            for i, dtype in enumerate(each)
        ]
    except TypeError as error:
        raise ArgumentError(f"input_dtype must be a dtype such as 'uint8', not {given!r}.") from error


def _embeds(layer: layers.Layer, position: int) -> bool:
    """Whether an Embedding reads this input, with only layers in between that pass numbers on."""
    if not isinstance(layer, Container):
        return isinstance(layer, layers.Embedding)
    passed_on = {position}
    for inner, inputs, outputs, _ in layer.calls()[0]:
        for k, i in enumerate(as_tuple(inputs)):
            if i in passed_on and _embeds(inner, k):
                return True
            if i in passed_on and inner.accepts_integers is None:
                passed_on.update(as_tuple(outputs))
    return False
