"""Import an ONNX file as a model."""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import onnx

from xpnet import layers
from xpnet.data.files import memory_error, read_bytes
from xpnet.errors import ArgumentError, FileError, ShapeError
from xpnet.layers.tensors import Input
from xpnet.model import Model, Sequential
from xpnet.onnx import elementwise, images, operators, recurrent, shapes  # noqa: F401  # they register converters
from xpnet.onnx.reader import OpenShapes, Reader, UnsupportedError, open_sequences
from xpnet.onnx.simplifying import simplified
from xpnet.onnx.tensors import Call, calls_before, shared_key


def import_onnx(path: Any, backend: Any = "auto", *, input_shape: Any = None) -> Sequential | Model:
    """Import an ONNX file as a model, in float32 or float64 like the file.

    A chain of operators with one input and one output becomes a Sequential, and any other graph a Model, whose inputs
    and, if there are several, outputs have the names in the file. Only what the outputs depend on is read. The model
    takes images with channels last, (N, H, W, C), even if the file takes channels first. Operators with the same
    weights become one shared layer.

    backend: as in Sequential.  input_shape: of one sample of the model, such as (224, 224, 3), for a file that leaves
    the height and width open; a list of shapes if there are several inputs. Sequences (N, T, features) and (N, T) whose
    length the file leaves open give a model that takes any length, if its layers are the same for every length.

    Raises FileError if the file is missing, damaged or not ONNX, and ArgumentError for an operator that no layer of
    xpnet supports, or not with these attributes, inputs or outputs. The message names the node.
    """
    file = _read(path)
    _relax(file)
    several = isinstance(input_shape, list | tuple) and any(isinstance(shape, list | tuple) for shape in input_shape)
    given = input_shape if several or input_shape is None else [input_shape]
    try:
        open_shapes = None if given is not None else open_sequences(file)
        graph = _read_open(path, file, open_shapes) if open_shapes else _Graph.read(path, file, given)
    except UnsupportedError as error:
        raise ArgumentError(str(error)) from None
    del file.graph.node[:]
    file.graph.node.extend(graph.nodes)  # without those that the outputs do not depend on
    try:
        onnx.checker.check_model(file)
    except Exception as error:
        raise FileError(f"{path}: this is not a valid ONNX file: {error}") from error
    try:
        return _model(graph.inputs, graph.outputs, backend, graph.dtype)
    except ShapeError as error:
        if open_shapes is None:
            raise
        raise ArgumentError(f"{path}: {_DEPENDS}") from error


def _read(path: Any) -> Any:
    """The ModelProto of a file, with the data that it has in other files. Raises FileError."""
    content = read_bytes(path)
    try:
        file = onnx.ModelProto.FromString(content)
        onnx.load_external_data_for_model(file, str(Path(path).parent))
    except MemoryError as error:
        raise memory_error(path, error) from error
    except Exception as error:  # protobuf raises its own errors
        raise FileError(f"{path}: this is not an ONNX file: {error}") from error
    if not file.HasField("graph"):  # an empty file counts as an empty message
        raise FileError(f"{path}: this is not an ONNX file: it has {len(content)} bytes and no graph.")
    graph = file.graph
    texts = [[value.name for value in (*graph.input, *graph.output, *graph.initializer)]]
    texts += [[o.domain for o in file.opset_import], [text for p in file.metadata_props for text in (p.key, p.value)]]
    texts += [[n.op_type, n.domain, n.name, *n.input, *n.output, *(a.name for a in n.attribute)] for n in graph.node]
    texts += [[d.dim_param for d in value.type.tensor_type.shape.dim] for value in graph.input]
    if wrong := next((text for part in texts for text in part if not isinstance(text, str)), None):
        raise FileError(f"{path}: this is not a valid ONNX file: its text {wrong!r:.100} is not UTF-8.")
    return file


class _Graph(NamedTuple):
    """What a file computes: the calls of its inputs and outputs, by their names, and the nodes that are needed."""

    inputs: dict[str, Call]
    outputs: dict[str, Call]
    dtype: str
    nodes: list[Any]

    @classmethod
    def read(cls, path: Any, file: onnx.ModelProto, given: Sequence[Any] | None) -> "_Graph":
        """Read a file whose inputs have samples of these shapes, or those of the file. Raises UnsupportedError.

        It is raised here, before the checker calls what is not supported invalid.
        """
        reader = Reader(path, file, given)
        outputs = reader.read()
        calls = simplified([output.call for output in outputs])
        named = dict(zip(reader.output_names, calls, strict=True))
        return cls(reader.inputs, named, outputs[0].dtype.name, list(reader.nodes))

    @property
    def calls(self) -> list[Call]:
        """All calls, each after its inputs."""
        return [*self.inputs.values(), *(c for c in calls_before(self.outputs.values()) if c.layer is not None)]


def _read_open(path: Any, file: onnx.ModelProto, given: OpenShapes) -> _Graph:
    """Read a file of sequences of open lengths: for some lengths, which must all give the same layers."""
    graphs = [_Graph.read(path, file, given.of_length(length)) for length in (2, 3)]
    tables = [c.layer.max_length for c in graphs[0].calls if isinstance(c.layer, layers.PositionalEmbedding)]
    graphs.append(_Graph.read(path, file, given.of_length(min(tables, default=_LONG))))
    if not all(_are_equal(graphs[0], graph) for graph in graphs[1:]):
        raise UnsupportedError(f"{path}: {_DEPENDS}")
    inputs = zip(graphs[0].inputs.values(), given.sizes, strict=True)
    opened = {call: dataclasses.replace(call, shape=shape) for call, shape in inputs}
    for call in graphs[0].calls:
        if call.layer is not None:
            opened[call] = dataclasses.replace(call, inputs=tuple(opened[before] for before in call.inputs))
    first = graphs[0]
    return first._replace(
        inputs={name: opened[call] for name, call in first.inputs.items()},
        outputs={name: opened[call] for name, call in first.outputs.items()},
    )


_DEPENDS = (
    "the layers depend on the length of the sequences, which the file leaves open. Give import_onnx an input_shape."
)
_LONG = 1031  # steps: more than a mask that excludes distant steps is likely to include


def _are_equal(a: _Graph, b: _Graph) -> bool:
    """Whether the calls have the same layers, inputs and weights."""
    calls, others = a.calls, b.calls
    if len(calls) != len(others):
        return False
    place, other_place = ({call: i for i, call in enumerate(order)} for order in (calls, others))
    return all(
        repr(one.layer) == repr(two.layer)
        and [place[before] for before in one.inputs] == [other_place[before] for before in two.inputs]
        and one.weights.keys() == two.weights.keys()
        and all(numpy.array_equal(w, two.weights[name], equal_nan=True) for name, w in one.weights.items())
        for one, two in zip(calls, others, strict=True)
    )


def _model(inputs: dict[str, Call], outputs: dict[str, Call], backend: Any, dtype: str) -> Sequential | Model:
    """The model that computes these calls, with their weights. inputs, outputs: by their names in the file."""
    calls = [call for call in calls_before(outputs.values()) if call.layer is not None]
    first: dict[Any, Call] = {}  # of the calls that share a layer
    layer_of = {call: first.setdefault(shared_key(call), call).layer for call in calls}
    chain = [*inputs.values(), *calls]
    is_chain = all(call.inputs == (before,) for before, call in itertools.pairwise(chain))
    model: Sequential | Model
    if is_chain and len(inputs) == len(outputs) == 1 and len(first) == len(calls):
        stack = [call.layer for call in calls] or [layers.Identity()]
        model = Sequential(stack, chain[0].shape, backend, dtype=dtype)
    else:
        model = _graph(inputs, outputs, layer_of, backend, dtype)
    weights = [(call.layer.path, name, a) for call in first.values() for name, a in call.weights.items()]
    model.load_state_dict({f"{path}.{name}": a for path, name, a in weights})
    return model


def _graph(
    inputs: dict[str, Call], outputs: dict[str, Call], layer_of: dict[Call, layers.Layer], backend: Any, dtype: str
) -> Model:
    """The model of these calls. Several outputs are named after the layers that give them, so these get their names."""
    names = _names({**inputs, **outputs})
    tensors = {call: Input(call.shape, name=names[name]) for name, call in inputs.items()}
    symbolic_inputs = list(tensors.values())
    named = {call: name for name, call in outputs.items()} if len(outputs) > 1 else {}
    uses = Counter(layer_of.values())
    for call, layer in layer_of.items():
        if call in named and uses[layer] == 1:
            layer.name = names[named[call]]
        given = [tensors[before] for before in call.inputs]
        tensors[call] = layer(given if len(given) > 1 else given[0])
    symbolic_outputs = []
    for name, call in outputs.items():
        # An input, and the output of a layer with another name, need a layer of this name.
        needs_layer = call.layer is None or (named and layer_of[call].name != names[name])
        symbolic_outputs.append(layers.Identity(name=names[name])(tensors[call]) if needs_layer else tensors[call])
    return Model(symbolic_inputs, symbolic_outputs, backend, dtype=dtype)


def _names(names: Iterable[str]) -> dict[str, str | None]:
    """Names for inputs and layers that are like those in the file; None where there is no such name."""
    found: dict[str, str | None] = {}
    for name in names:
        valid = re.sub(r"\W+", "_", name)
        found[name] = None if valid.isdigit() or valid in found.values() else valid
    return found


def _relax(file: onnx.ModelProto) -> None:
    """Correct details that ONNX's checker would refuse and that do not affect the model."""
    file.ir_version = max(file.ir_version, 4)  # in version 3, initializers had to be inputs as well
    for output in file.graph.output:  # may lack a shape
        output.type.CopyFrom(onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, []))
    for named in (*file.opset_import, *file.graph.node):
        if named.domain == "ai.onnx":  # another name of the standard operators
            named.domain = ""
