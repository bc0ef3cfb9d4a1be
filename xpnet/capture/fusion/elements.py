"""Sums and products of large arrays."""

from typing import Any

from xpnet.capture.calls import Call, is_array
from xpnet.capture.fusion.matching import in_place_of
from xpnet.capture.passes import Memory

_LARGE = 2**16  # elements: for fewer, all kernels take the same time


def with_elementwise_kernels(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """xp.add(a, b, out), xp.multiply(a, b, out) of large arrays → add_arrays, multiply_arrays, which take less time."""
    operators = {memory.xp.add: backend.add_arrays, memory.xp.multiply: backend.multiply_arrays}
    return [_elementwise(call, operators) or call for call in calls]


def _elementwise(call: Call, operators: dict[Any, Any]) -> Call | None:
    operator = operators.get(call.function)
    if operator is None or len(call.args) != 3 or call.kwargs or not all(is_array(a) for a in call.args):
        return None
    *terms, out = call.args
    alike = all((a.shape, a.dtype) == (out.shape, out.dtype) and a.flags.c_contiguous for a in call.args)
    if not alike or out.size < _LARGE or out.dtype.kind != "f":
        return None
    return in_place_of(call, Call(operator, (*terms, out), reads=tuple(terms), writes=(out,)))
