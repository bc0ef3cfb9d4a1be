"""Operators whose inputs are all known: constants, computed by ONNX's reference implementation, and shapes."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from xpnet.errors import ArgumentError
from xpnet.onnx.tensors import Constant, ShapeVector

#: Operators of constants. None has a graph inside, and none is random.
_OF_CONSTANTS = frozenset([
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Div",
    "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "Gemm", "Greater", "GreaterOrEqual",
    "Identity", "Less", "LessOrEqual", "Log", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow",
    "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape",
    "Round", "Sigmoid", "Sign", "Size", "Slice", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose",
    "Unsqueeze", "Where",
])  # fmt: skip
#: Operators that only move the elements of a shape. Their first input is the shape; of Concat, all are.
_OF_SHAPES = frozenset(["Cast", "Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze"])
_MOST_ELEMENTS = 2**28  # of a constant that is computed from smaller ones


def fold(node: Any, opset: int, values: Sequence[Any]) -> list[Any]:
    """The outputs of a node whose inputs have these values, constants and shapes. Raises ArgumentError."""
    inputs = dict(zip(node.input, values, strict=True))
    inputs.pop("", None)
    if all(isinstance(value, numpy.ndarray) for value in inputs.values()):
        if node.op_type not in _OF_CONSTANTS:
            raise ArgumentError("all of its inputs are constants")
        return _evaluate(node, opset, inputs)
    moved = set(node.input if node.op_type == "Concat" else node.input[:1])
    vectors = {name: value for name, value in inputs.items() if isinstance(value, ShapeVector)}
    if node.op_type not in _OF_SHAPES or not vectors.keys() <= moved:
        raise ArgumentError("it computes with the size of the batch")
    zeros = {name: numpy.zeros_like(inputs[name]) for name in moved - vectors.keys()}
    (numbers,) = _evaluate(node, opset, inputs | {name: vector.numbers for name, vector in vectors.items()})
    (batch,) = _evaluate(node, opset, inputs | zeros | {name: vector.batch for name, vector in vectors.items()})
    if numbers.dtype.kind != "i":
        raise ArgumentError(f"it makes the size of the batch {numbers.dtype}")
    return [ShapeVector(numbers, batch) if batch.any() else numbers]


def _evaluate(node: Any, opset: int, inputs: dict[str, Any]) -> list[Constant]:
    if _size(node, list(inputs.values())) > _MOST_ELEMENTS:
        raise ArgumentError(f"it gives more than {_MOST_ELEMENTS} elements")
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = helper.make_graph([node], "constants", [_info(n, a) for n, a in inputs.items()], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        with numpy.errstate(all="ignore"):
            results = iter(ReferenceEvaluator(model).run(None, inputs))
    except Exception as error:  # of any class
        raise ArgumentError(f"it cannot be computed from these constants: {error}") from error
    return [numpy.asarray(next(results) if name else 0) for name in node.output]


def _info(name: str, a: Constant) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)


def _size(node: Any, inputs: list[Constant]) -> int:
    """About how many elements the result has."""
    if node.op_type in ("ConstantOfShape", "Expand"):
        return math.prod(map(int, inputs[-1]))
    if node.op_type == "Tile":
        return inputs[0].size * math.prod(map(int, inputs[1]))
    if node.op_type == "Range":
        start, end, step = (float(a.reshape(())) for a in inputs)
        return int(abs((end - start) / step)) if step else 0
    return math.prod(max(sizes) for sizes in itertools.zip_longest(*(a.shape[::-1] for a in inputs), fillvalue=1))
