"""Operators whose inputs do not depend on the samples, computed by ONNX's reference implementation."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from xpnet.errors import ArgumentError
from xpnet.onnx.tensors import BATCH_SIZES, Constant, Varying

#: Operators of constants. None has a graph inside, and none is random.
_OF_CONSTANTS = frozenset([
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Div",
    "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "Gemm", "Greater", "GreaterOrEqual",
    "Identity", "Less", "LessOrEqual", "Log", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow",
    "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape",
    "Round", "Sigmoid", "Sign", "Size", "Slice", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose",
    "Trilu", "Unsqueeze", "Where",
])  # fmt: skip
_MOST_ELEMENTS = 2**28  # of a constant that is computed from smaller ones


def fold(node: Any, opset: int, values: Sequence[Any]) -> list[Any]:
    """The outputs of a node whose inputs are constants, perhaps ones that vary with the batch. Raises ArgumentError."""
    if node.op_type not in _OF_CONSTANTS:
        raise ArgumentError("all of its inputs are constants")
    inputs = {name: value for name, value in zip(node.input, values, strict=True) if name}
    if all(isinstance(value, numpy.ndarray) for value in inputs.values()):
        return _evaluate(node, opset, inputs)
    results = [
        _evaluate(node, opset, {name: v.values[i] if isinstance(v, Varying) else v for name, v in inputs.items()})
        for i in range(len(BATCH_SIZES))
    ]
    return [varying(values) for values in zip(*results, strict=True)]


def varying(values: Sequence[Constant]) -> Constant | Varying:
    """The value that is this for each of BATCH_SIZES."""
    first = values[0]
    same = all(value.shape == first.shape and (value == first).all() for value in values)
    return first if same else Varying(tuple(values))


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
