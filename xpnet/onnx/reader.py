"""Read an ONNX graph as calls of layers, node by node.

Every attribute, input, output and type of a node is either honored or refused by name. A refusal is a value like any
other until the output of the graph needs it: a pattern of nodes, such as GELU's, may be a layer although its parts are
not.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy
import onnx
from onnx import helper, numpy_helper

from xpnet import layers
from xpnet.config import as_shape
from xpnet.errors import ArgumentError, FileError
from xpnet.layers.structure import Shape
from xpnet.onnx import folding, schemas
from xpnet.onnx.tensors import BATCH, Call, Constant, Rearranged, Size, Tensor, Varying, rearranged, with_features_last

#: The metadata that export_onnx writes: whether images have channels first or last in the file.
IMAGE_LAYOUT, CHANNELS_FIRST, CHANNELS_LAST = "xpnet.images", "channels first", "channels last"

_NEWEST_OPSET = 28  # later versions may give operators another meaning
_ELEMENTWISE = ("Relu", "Sigmoid", "Tanh", "Softplus", "LeakyRelu", "Elu", "Gelu", "Swish", "Cast", "Identity", "Mul",
                "Add", "Sub", "Div", "Sum", "Mean", "Neg", "Clip", "Dropout", "HardSigmoid", "HardSwish", "Mish",
                "PRelu", "Selu", "Celu", "Max", "Min", "Pow", "Abs", "Concat")  # fmt: skip
_ON_IMAGES = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool",
              "BatchNormalization", "InstanceNormalization", "GroupNormalization", "Pad", "Resize",
              "Upsample")  # fmt: skip
#: Operators that compute the same for all positions of the axes before the last one.
_ON_FEATURES = frozenset(_ELEMENTWISE) - {"Concat", "PRelu"} | {"MatMul", "Gemm", "LayerNormalization"}


class UnsupportedError(ArgumentError):
    """A file, or a node of its graph, is not supported."""


#: A value of the graph. None: an optional input that is left out.
Value: TypeAlias = Tensor | Rearranged | Constant | Varying | UnsupportedError | None


class Reader:
    """Reads the graph of one file. Values are kept by name."""

    def __init__(self, path: Any, file: onnx.ModelProto, input_shapes: Sequence[Any] | None) -> None:
        """input_shapes: of the samples in xpnet, one for each input, or None for those in the file."""
        self.path = path
        opsets = {o.version for o in file.opset_import if not o.domain}
        if len(opsets) > 1:
            raise self.error(f"opset {' and '.join(map(str, sorted(opsets)))} cannot both be those of the file")
        self.opset = max(opsets, default=0)
        if self.opset > _NEWEST_OPSET:
            raise self.error(f"opset {self.opset} is not supported, only 1 to {_NEWEST_OPSET}")
        self._graph = graph = file.graph
        self._image_layout = {p.key: p.value for p in file.metadata_props}.get(IMAGE_LAYOUT)
        self._functions = {(f.domain, f.name) for f in file.functions}
        if graph.sparse_initializer:
            raise self.error(f"the sparse initializer {graph.sparse_initializer[0].values.name!r} is not supported")
        constants = {c.name for c in graph.initializer}
        inputs = [i for i in graph.input if i.name not in constants]
        if not inputs or not graph.output:
            raise self.error("the graph must have an input and an output")
        if input_shapes is not None and len(input_shapes) != len(inputs):
            names = [i.name for i in inputs]
            raise self.error(f"input_shape must have a shape for each of the inputs {names}, not {len(input_shapes)}")
        self.output_names = [o.name for o in graph.output]
        for kind, names in (("inputs", [i.name for i in inputs]), ("outputs", self.output_names)):
            if len(set(names)) < len(names):
                raise self.error(f"the {kind} have the names {names}, one of them twice")
        #: The nodes that the outputs depend on, in the order of the file.
        self.nodes = self._needed_nodes()
        #: How often each value is read. Outputs of the graph are read once more.
        self.readers = Counter([*self.output_names, *(name for node in self.nodes for name in node.input if name)])
        self.producers: dict[str, Node] = {}  # by the names of the outputs
        self.computed: dict[Any, Any] = {}  # see Node.once
        self.values: dict[str, Value] = {}
        self.inputs: dict[str, Call] = {}  # by name
        batches = set[int]()
        for i, value in enumerate(inputs):
            batch, tensor = self._input(value, None if input_shapes is None else input_shapes[i])
            batches |= {batch} if batch else set()
            self.values[value.name], self.inputs[value.name] = tensor, tensor.call
        if len(batches) > 1:
            raise self.error(f"the inputs have batches of different sizes: {sorted(batches)}")
        self.batch_size = next(iter(batches), None)

    def read(self) -> list[Tensor]:
        """The outputs of the graph."""
        for c in self._graph.initializer:
            if schemas.float_or_integer(c.data_type) is None:
                reason = f"the initializer {c.name!r} of type {schemas.type_name(c.data_type)} is not supported"
                self.values[c.name] = self.error(reason)
                continue
            try:
                self.values[c.name] = numpy_helper.to_array(c)
            except Exception as error:
                raise FileError(f"{self.path}: the initializer {c.name!r} is damaged: {error}") from error
        for proto in self.nodes:
            schema = schemas.schema(proto.op_type, self.opset)
            if (reason := self._refusal(proto, schema)) or schema is None:
                self.values |= dict.fromkeys(proto.output, self.error_of(proto, reason))
                continue
            node = Node(self, proto, schema)
            self.values |= zip(proto.output, node.results(), strict=True)
            self.producers |= dict.fromkeys(proto.output, node)
        outputs = [self._output(name) for name in self.output_names]
        if len(dtypes := {str(output.dtype) for output in outputs}) > 1:
            raise self.error(f"the outputs have several types: {', '.join(sorted(dtypes))}")
        return outputs

    def _output(self, name: str) -> Tensor:
        output = self.values.get(name)
        if isinstance(output, UnsupportedError):
            raise output
        if isinstance(output, Rearranged):
            raise self.error(f"the output {name!r} moves the batch axis, which must be the first")
        if not isinstance(output, Tensor):
            raise self.error(f"the output {name!r} does not depend on the values of the inputs")
        if output.dtype.name not in ("float32", "float64"):
            raise self.error(f"an output of {output.dtype} is not supported, only of float32 and float64")
        # Images have channels last in the model; everything else has the order of the file.
        if len(output.shape) != 3 or self._image_layout == CHANNELS_LAST:
            return output.in_file_order()
        if not output.channels_first and self._image_layout == CHANNELS_FIRST:
            return output.add(layers.Permute((1, 2, 0)))
        return output

    def error(self, reason: str) -> UnsupportedError:
        return UnsupportedError(f"{self.path}: {reason}. xpnet imports graphs of the layers that it exports.")

    def error_of(self, proto: Any, reason: str) -> UnsupportedError:
        """An error that says what is not supported about a node."""
        name = proto.name or next(filter(None, proto.output), "")
        return self.error(f"operator {proto.op_type} {reason} (node {name!r})")

    def _refusal(self, proto: Any, schema: Any) -> str:
        """Why a node cannot be read, whatever the values of its inputs are; empty if it can."""
        if undefined := [name for name in proto.input if name and name not in self.values]:
            return f"has an input {undefined[0]!r} that nothing before it computes"
        if proto.domain or ("", proto.op_type) in self._functions:
            return f"of the domain {proto.domain!r} is not supported"
        if schema is None:
            return f"does not exist in opset {self.opset}"
        if any(a.type in (a.GRAPH, a.GRAPHS) for a in proto.attribute):
            return "with a graph inside is not supported"
        return ""

    def _input(self, value: Any, given: Any) -> tuple[int | None, Tensor]:
        """(the size of the batch or None if it is not fixed, the tensor) of an input.

        given: the shape of a sample in xpnet, or None for the one in the file.
        """
        if not value.type.HasField("tensor_type"):
            raise self.error(f"the input {value.name!r} must be a tensor")
        tensor = value.type.tensor_type
        shape: list[Any] = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
        batch, sizes = shape[:1], shape[1:]
        if not shape:
            raise self.error(f"the input {value.name!r} must have a batch axis, and is a single number")
        first = len(sizes) == 3 and (
            self._image_layout == CHANNELS_FIRST if self._image_layout else self._is_channels_first(value.name)
        )
        in_xpnet = (*sizes[1:], sizes[0]) if first else tuple(sizes)
        if given is not None:
            if not _fits(as_shape(given), in_xpnet):
                raise self.error(f"the input {value.name!r} takes samples of shape {in_xpnet}, not {as_shape(given)}")
            in_xpnet = as_shape(given)
        if not all(isinstance(n, int) and n > 0 for n in in_xpnet) or batch[0] == 0:
            raise self.error(
                f"the shape of the input {value.name!r} must be fixed except for the batch, not {shape}: give "
                "import_onnx an input_shape"
            )
        dtype = schemas.float_or_integer(tensor.elem_type)
        if dtype is None:
            raise self.error(f"an input of type {schemas.type_name(tensor.elem_type)} is not supported")
        call = Call(None, {}, (), in_xpnet)
        return batch[0] if isinstance(batch[0], int) else None, Tensor(call, dtype, first)

    def _needed_nodes(self) -> list[Any]:
        by_output = {name: node for node in self._graph.node for name in node.output if name}
        waiting, needed = list(self.output_names), set()
        while waiting:
            node = by_output.get(waiting.pop())
            if node is not None and id(node) not in needed:
                needed.add(id(node))
                waiting += node.input
        return [node for node in self._graph.node if id(node) in needed]

    def _is_channels_first(self, name: str) -> bool:
        """Whether an operator on images (N, C, H, W) reads this input, with only elementwise operators in between."""
        names = {name}
        for node in self.nodes:
            if names & set(node.input):
                if node.op_type in _ON_IMAGES:
                    return True
                if node.op_type in _ELEMENTWISE:
                    names.add(node.output[0])
        return False


class OpenShapes(NamedTuple):
    """Shapes of samples, some of which are sequences of open length.

    sizes: with None for an open length.  names: of the lengths in the file, for each input; equal ones are equal.
    """

    sizes: list[tuple[Any, ...]]
    names: list[str]

    def of_length(self, length: int) -> list[Shape]:
        """The shapes for sequences of this length, and of further ones if the lengths have several names."""
        lengths = {name: length + i for i, name in enumerate(dict.fromkeys(self.names))}
        return [
            tuple(lengths[name] if n is None else n for n in sizes)
            for sizes, name in zip(self.sizes, self.names, strict=True)
        ]


def open_sequences(file: onnx.ModelProto) -> OpenShapes | None:
    """The shapes of the inputs, if all are sequences (N, T, features), or (N, T) of integers, some of open length."""
    constants, shapes, names = {c.name for c in file.graph.initializer}, [], []
    for value in file.graph.input:
        if value.name not in constants:
            dims = value.type.tensor_type.shape.dim[1:]
            sizes = [d.dim_value if d.HasField("dim_value") else None for d in dims]
            dtype = schemas.float_or_integer(value.type.tensor_type.elem_type)
            is_sequence = len(sizes) == 2 or (len(sizes) == 1 and dtype is not None and dtype.kind in "iu")
            if not is_sequence or 0 in sizes or None in sizes[1:]:
                return None
            shapes.append(tuple(sizes))
            names.append(dims[0].dim_param or value.name)
    return OpenShapes(shapes, names) if any(None in sizes for sizes in shapes) else None


def _fits(given: Shape, sizes: Sequence[Any]) -> bool:
    """Whether a shape agrees with the sizes that a file fixes. Others are names, or 0."""
    return len(given) == len(sizes) and all(
        m in (n, 0) or not isinstance(m, int) for n, m in zip(given, sizes, strict=True)
    )


class Node:
    """A node of the graph. It notes which of its attributes and inputs have been read: the others are refused."""

    def __init__(self, reader: Reader, proto: Any, schema: schemas.Schema) -> None:
        self.proto, self.schema, self.operator = proto, schema, str(proto.op_type)
        self.opset, self.batch_size = reader.opset, reader.batch_size
        self.values: list[Value] = [reader.values[name] if name else None for name in proto.input]
        self._reader = reader
        self._given = {a.name: helper.get_attribute_value(a) for a in proto.attribute if not a.ref_attr_name}
        self._attributes_read: set[str] = set()
        self._inputs_read: set[int] = set()
        #: Whether the batch is on another axis in the file than in the inputs that this node has.
        self.is_unwrapped = False

    @property
    def version(self) -> int:
        """The opset in which this form of the operator appeared."""
        return self.schema.since

    def error(self, reason: str) -> UnsupportedError:
        """An error that says what is not supported about this node."""
        return self._reader.error_of(self.proto, reason)

    def results(self) -> list[Value]:
        """The values of the outputs."""
        try:
            return self._results()
        except UnsupportedError as error:
            return [error] * len(self.proto.output)
        except (ArgumentError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError,
                RecursionError, RuntimeError) as error:  # fmt: skip
            return [self.error(f"is not supported in this form: {error}")] * len(self.proto.output)

    def _results(self) -> list[Value]:
        given = [value for value in self.values if value is not None]
        converter, since = CONVERTERS.get(self.operator, (None, 0))
        if all(isinstance(value, numpy.ndarray | Varying) for value in given) and self.operator != "Shape":
            return folding.fold(self.proto, self.opset, self.values)
        first_error = next((value for value in given if isinstance(value, UnsupportedError)), None)
        if converter is None:
            raise first_error or self.error("is not supported")
        if self.version < since:
            raise self.error(f"of opset {self.opset} is not supported, only from opset {since} on")
        if first_error is None:
            self._check_types()
        axes = self._unwrap()
        value = converter(self)
        self._check_all_read()
        if axes and isinstance(value, Tensor):
            value = rearranged(value.in_file_order(), axes)
        values = value if isinstance(value, list) else [value]
        names = self.proto.output
        refused = [self.error(f"has an output {name!r} that is not supported") for name in names[len(values) :]]
        return [*values[: len(names)], *refused]

    def _unwrap(self) -> Sequence[Sequence[int]] | None:
        """Read rearranged inputs with the batch first if the operator is the same for all positions of the last axis.

        Returns the axes of the output in the file, or None if nothing is rearranged, or the operator is another one.
        """
        if not any(isinstance(value, Rearranged) for value in self.values) or self.operator not in _ON_FEATURES:
            return None
        is_product = self.operator in ("MatMul", "Gemm")
        if is_product and not isinstance(self.values[1], numpy.ndarray):
            return None
        values, found = list(self.values), set[Any]()
        for i, value in enumerate(self.values):
            if isinstance(value, Rearranged) and 0 not in value.axes[-1]:
                features_last = with_features_last(value)
                values[i] = features_last.tensor
                found.add(features_last.axes)
            elif value is not None and not (isinstance(value, numpy.ndarray) and value.ndim <= 1 + is_product):
                return None
        if len(found) != 1 or self._given.get("axis", -1) != -1:
            return None
        self.values, self.is_unwrapped = values, True
        (axes,) = found
        return axes  # type: ignore[no-any-return]

    def _check_types(self) -> None:
        """Refuse inputs of types that the operator does not take, or that must be the same and are not."""
        types: dict[str, str] = {}
        for i, value in enumerate(self.values):
            if value is None or isinstance(value, UnsupportedError):
                continue
            expected, kind = self.schema.input(i), schemas.type_of(value.dtype)
            if kind not in expected.types or (
                expected.same_type and types.setdefault(expected.parameter, kind) != kind
            ):
                names = ", ".join(
                    str(v.dtype) for v in self.values if v is not None and not isinstance(v, UnsupportedError)
                )
                raise self.error(f"of opset {self.opset} does not take inputs of {names}")

    def _check_all_read(self) -> None:
        for name in self._given.keys() - self._attributes_read:
            if self._given[name] != self.schema.defaults.get(name):
                raise self.error(f"with {name}={schemas.plain(self._given[name])!r} is not supported")
        for i, value in enumerate(self.values):
            if value is not None and i not in self._inputs_read:
                raise self.error(f"with the input {self.schema.input(i).name!r} is not supported")

    # What converters read ---------------------------------------------------------------------------------------------

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute, or its default in this opset, or `default` if this opset has neither."""
        if not self.schema.has(name):
            return default
        self._attributes_read.add(name)
        value = self._given.get(name, self.schema.defaults.get(name))
        return default if value is None else schemas.plain(value)

    def ignore(self, *names: str) -> None:
        """Note that these attributes and inputs do not affect the result."""
        self._attributes_read |= set(names)
        self._inputs_read |= {i for i in range(len(self.values)) if self.schema.input(i).name in names}

    def value(self, index: int) -> Tensor | Rearranged | Constant | Varying | None:
        """An input, or None if it is left out."""
        self._inputs_read.add(index)
        value = self.values[index] if index < len(self.values) else None
        if isinstance(value, UnsupportedError):
            raise value
        return value

    def tensor(self, index: int = 0) -> Tensor:
        """An input that must depend on the graph's input."""
        if isinstance(value := self.value(index), Tensor):
            return value
        if isinstance(value, Rearranged):
            raise self.error("is not supported where the batch is not on axis 0")
        raise self.error(f"with a constant as its input {self.schema.input(index).name!r} is not supported")

    def rearranged(self, index: int = 0) -> Tensor | Rearranged:
        """An input that must depend on the graph's input. Its batch may be on any axis."""
        value = self.value(index)
        return value if isinstance(value, Rearranged) else self.tensor(index)

    def image(self, sequences: bool = False) -> Tensor:
        """The first input, which must be images, or perhaps sequences, with channels first in the file."""
        image = self.tensor()
        if len(image.shape) != 3 and not (sequences and len(image.shape) == 2):
            kinds = "images (N, C, H, W)" + (" and sequences (N, C, T)" if sequences else "")
            raise self.error(f"is supported for {kinds}, not for samples of shape {image.file_shape}")
        return image.with_features_last()

    def optional(self, index: int, name: str) -> Constant | None:
        """An input that must be constant or left out."""
        value = self.value(index)
        if value is not None and not isinstance(value, numpy.ndarray):
            raise self.error(f"has a {name} that is not constant")
        return value

    def constant(self, index: int, name: str) -> Constant:
        """An input that must be constant."""
        if (value := self.optional(index, name)) is None:
            raise self.error(f"has no {name}")
        return value

    def sizes(self, index: int, name: str) -> list[Any]:
        """An input that is a vector of integers, some of which may be BATCH."""
        sizes = self.multiples(index, name)
        if any(size.of_batch and size.number != 1 for size in sizes):
            raise self.error(f"has a {name} that has a multiple of the size of the batch")
        return [BATCH if size.of_batch else size.number for size in sizes]

    def multiples(self, index: int, name: str) -> list[Size]:
        """An input that is a vector of integers, some of which may be multiples of the size of the batch."""
        value = self.value(index)
        if isinstance(value, Varying):
            return value.sizes()
        return [Size(int(n)) for n in self.constant(index, name).reshape(-1)]

    def list_of(self, name: str, index: int) -> list[int] | None:
        """Integers that are an attribute in older opsets and an input in later ones; None if they are left out."""
        if self.schema.has(name):
            numbers: list[int] | None = self.attribute(name)
            return numbers
        value = self.optional(index, name)
        return None if value is None else [int(n) for n in value.reshape(-1)]

    def axis(self, axis: int, axes: int) -> int:
        """An axis of a tensor with this number of axes, counted from 0."""
        if not -axes <= axis < axes:
            raise self.error(f"has axis {axis}, and its input has {axes} axes")
        return axis % axes

    def axes(self, given: Sequence[int], axes: int) -> list[int]:
        """Axes of a tensor with this number of axes, counted from 0, sorted. Axis 0, the batch, is refused."""
        found = sorted(self.axis(axis, axes) for axis in given)
        if 0 in found:
            raise self.error("over axis 0 is not supported: it is the batch")
        if len(set(found)) < len(found):
            raise self.error(f"has the axes {list(given)}, one of them twice")
        return found

    def is_only_reader(self, index: int) -> bool:
        """Whether nothing else reads this tensor, neither by this name nor by that of a node that passes it on."""
        call, readers = self.tensor(index).call, self._reader.readers
        values = self._reader.values.items()
        same = {n: value.tensor if isinstance(value, Rearranged) else value for n, value in values}
        names = [n for n, value in same.items() if isinstance(value, Tensor) and value.call is call]
        return sum(readers[name] for name in names) == len(names)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """compute(), but only for the first node with this key, so that nodes with the same weights share a layer."""
        if key not in self._reader.computed:
            self._reader.computed[key] = compute()
        return self._reader.computed[key]

    def is_read(self, index: int) -> bool:
        """Whether anything reads this output."""
        return self._reader.readers[self.proto.output[index]] > 0

    def source(self, index: int) -> "Node | None":
        """The node that computes an input, for patterns of several nodes."""
        return self._reader.producers.get(self.proto.input[index]) if index < len(self.proto.input) else None

    def scalar(self, index: int) -> float | None:
        """An input if it is one constant number, which adds no axis, for patterns of several nodes."""
        value = self.values[index] if index < len(self.values) else None
        if isinstance(value, numpy.ndarray) and value.size == 1 and value.ndim <= 2:
            return float(value.reshape(()))
        return None

    def read_all_inputs(self) -> None:
        """Note that a pattern has read the inputs."""
        self._inputs_read |= set(range(len(self.values)))


#: node → its first output, or a list of its outputs.
Converter: TypeAlias = Callable[[Node], Value | list[Value]]
#: operator → (its converter, the first opset whose form of the operator it knows)
CONVERTERS: dict[str, tuple[Converter, int]] = {}


def converts(*operators: str, since: int = 1) -> Callable[[Converter], Converter]:
    """Register a function that converts nodes with these operators, in their forms from an opset on."""

    def register(converter: Converter) -> Converter:
        CONVERTERS.update(dict.fromkeys(operators, (converter, since)))
        return converter

    return register
