"""What the ONNX standard says about operators: attributes with their defaults, and the types of inputs."""

import functools
from typing import Any, NamedTuple

import numpy
import onnx
from onnx import helper

# Older versions of the package onnx map further types to a NumPy dtype, such as bfloat16 to float32.
_OF_NUMPY = frozenset(
    onnx.TensorProto.DataType.Value(name)
    for name in ("FLOAT", "DOUBLE", "FLOAT16", "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32",
                 "UINT64")
)  # fmt: skip


class Input(NamedTuple):
    """An input of an operator.

    parameter: the type parameter, such as "T".  types: those that it may be.  same_type: whether all inputs with this
    parameter have the same type.
    """

    name: str
    parameter: str
    types: frozenset[str]
    same_type: bool


class Schema:
    """An operator as an opset defines it."""

    def __init__(self, schema: Any) -> None:
        self.since: int = schema.since_version
        #: The defaults of the attributes that have one, by name.
        self.defaults = {
            name: helper.get_attribute_value(attribute.default_value)
            for name, attribute in schema.attributes.items()
            if attribute.default_value.name
        }
        self._attributes = frozenset(schema.attributes)
        types = {t.type_param_str: frozenset(t.allowed_type_strs) for t in schema.type_constraints}
        variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
        self._inputs = [
            Input(i.name, i.type_str, types.get(i.type_str, frozenset([i.type_str])),
                  i.type_str in types and (i.option != variadic or i.is_homogeneous))
            for i in schema.inputs
        ]  # fmt: skip

    def input(self, index: int) -> Input:
        """The input at this position. The last input of some operators may be repeated."""
        return self._inputs[min(index, len(self._inputs) - 1)]

    def has(self, attribute: str) -> bool:
        """Whether the operator has this attribute in this opset."""
        return attribute in self._attributes


@functools.cache
def schema(operator: str, opset: int) -> Schema | None:
    """The operator in this opset; None if it does not exist there."""
    try:
        found = onnx.defs.get_schema(operator, opset, "")
    except Exception:  # the package's own error class moves between its versions
        return None
    return None if found.deprecated else Schema(found)


@functools.cache
def type_of(dtype: Any) -> str:
    """A NumPy dtype as the standard writes it, such as "tensor(float)"."""
    return type_name(helper.np_dtype_to_tensor_dtype(dtype))


def type_name(element: int) -> str:
    """A type of elements as the standard writes it."""
    known = element in onnx.TensorProto.DataType.values()
    return f"tensor({onnx.TensorProto.DataType.Name(element).lower() if known else element})"


def float_or_integer(element: int) -> numpy.dtype[Any] | None:
    """The dtype of NumPy for a type of elements; None for types that NumPy itself lacks, and for text."""
    return numpy.dtype(helper.tensor_dtype_to_np_dtype(element)) if element in _OF_NUMPY else None


def plain(value: Any) -> Any:
    """The value of an attribute with str for bytes and list for sequences."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, int | float | str | onnx.TensorProto) else list(value)
