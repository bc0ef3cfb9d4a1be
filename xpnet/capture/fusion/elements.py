"""Sums and products of large arrays, and operations on small ones."""

from typing import Any

from xpnet.backends import Array
from xpnet.backends.reference.fused import MOST_OPERATIONS, OPERATIONS
from xpnet.capture.calls import Call, is_array, same_view
from xpnet.capture.fusion.matching import in_place_of
from xpnet.capture.passes import Memory

_LARGE = 2**16  # elements; with fewer, all kernels take the same time
_SMALL = 2**14  # elements; up to here, a kernel computes 16 operations in little more time than one
_OTHER_NAMES = {"true_divide": "divide", "abs": "absolute"}


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


def with_small_operations(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """xp.add, xp.multiply and others on small arrays → elementwise, which computes several of them.

    They are made as late as possible, directly before a call that needs any of them, and before the last call.
    """
    fused: list[Call] = []
    waiting: list[Call] = []

    def make_them() -> None:
        fused.extend(waiting if len(waiting) < 2 else [_together(waiting, backend)])
        waiting.clear()

    for call in calls:
        if _is_small(call, memory):
            if len(waiting) == MOST_OPERATIONS or not all(_by_element(memory, other, call) for other in waiting):
                make_them()
            waiting.append(call)
            continue
        if call is calls[-1] or any(memory.depend(other, call) for other in waiting):
            make_them()
        fused.append(call)
    make_them()
    return fused


def _is_small(call: Call, memory: Memory) -> bool:
    """Whether `elementwise` can make a call."""
    *operands, out = call.args or (None,)
    if not hasattr(call.function, "nin") or _name(call) not in OPERATIONS or call.kwargs or not is_array(out):
        return False
    arrays = [a for a in call.args if is_array(a)]
    numbers = [a for a in operands if not is_array(a)]
    alike = all(a.dtype == out.dtype and a.flags.c_contiguous and a.size in (1, out.size) for a in arrays)
    shapes = all(a.shape == out.shape for a in arrays if a.size > 1)
    in_place = all(same_view(a, out) for a in arrays[:-1] if memory.overlap(a, out))
    real = out.dtype in ("float32", "float64") and all(type(number) in (int, float) for number in numbers)
    return real and alike and shapes and in_place and 0 < out.size <= _SMALL and bool(arrays[:-1])


def _by_element(memory: Memory, first: Call, second: Call) -> bool:
    """Whether the order of two small calls matters only element by element, in arrays of the same size."""
    if first.args[-1].dtype != second.args[-1].dtype:
        return False

    def apart(a: Array, b: Array) -> bool:
        whole = a.size == first.args[-1].size == b.size == second.args[-1].size
        return not memory.overlap(a, b) or (whole and same_view(a.reshape(-1), b.reshape(-1)))

    pairs = [(a, b) for a in first.writes for b in (*second.reads, *second.writes)]
    pairs += [(a, b) for a in first.reads for b in second.writes]
    return all(apart(a, b) for a, b in pairs)


def _together(calls: list[Call], backend: Any) -> Call:
    operations, outs = [(_name(call), *call.args[:-1]) for call in calls], [call.args[-1] for call in calls]
    reads = tuple(a for call in calls for a in call.reads)
    return in_place_of(calls[0], Call(backend.elementwise, (operations, outs), reads=reads, writes=tuple(outs)))


def _name(call: Call) -> str:
    return _OTHER_NAMES.get(call.name.removeprefix("cupy_"), call.name.removeprefix("cupy_"))
