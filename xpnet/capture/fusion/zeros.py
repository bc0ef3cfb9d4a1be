"""Results that are added to zeros, and sums over an axis of length 1."""

from collections.abc import Sequence
from typing import Any

from xpnet.backends import Array
from xpnet.capture.calls import Call, given_by_name, is_array, same_view
from xpnet.capture.fusion.matching import in_place_of, same_elements
from xpnet.capture.passes import Memory


def without_zeros(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """Store a result in place of adding it to zeros; copy in place of a sum over an axis of length 1.

    The gradients of convolutions are such sums, over parts of the batch and over threads.
    """
    calls = list(calls)
    for i, call in enumerate(calls):
        if call.function == backend.add_matmul:
            given = given_by_name(call)
            a, b, out = given["a"], given["b"], given["out"]
            stored = Call(backend.matmul, (a, b, out), reads=(a, b), writes=(out,))
        elif call.function is memory.xp.add and len(call.args) == 3 and is_array(call.args[1]) and not call.kwargs:
            total, term, out = call.args
            same = is_array(total) and same_view(total, out) and (term.shape, term.dtype) == (out.shape, out.dtype)
            if not same or memory.overlap(term, out):
                continue
            stored = Call(memory.xp.copyto, (out, term), reads=(term,), writes=(out,))
        else:
            continue
        zeros = next((j for j in range(i - 1, -1, -1) if memory.touches(calls[j], out)), None)
        if zeros is not None and _fills_with_zeros(calls[zeros], out, memory):
            calls[i] = in_place_of(call, stored)
            calls[zeros] = in_place_of(calls[zeros], Call(_nothing, ()))
    calls = [call for call in calls if call.function is not _nothing]
    return [_copy_of_one(call, calls, memory) or call for call in calls]


def _nothing() -> None:
    """A call that is left out."""


def _fills_with_zeros(call: Call, array: Array, memory: Memory) -> bool:
    if call.function is not memory.xp.copyto or "where" in call.kwargs or is_array(call.args[1]):
        return False
    return type(call.args[1]) in (int, float) and call.args[1] == 0 and same_elements(call.args[0], array)


def _copy_of_one(call: Call, calls: Sequence[Call], memory: Memory) -> Call | None:
    """The copy that equals a sum over an axis of length 1; None if the call is anything else."""
    if call.function is not memory.xp.sum:
        return None
    given = given_by_name(call)
    a, axis, out = given["a"], given.get("axis"), given.get("out")
    if out is None or given.get("dtype") is not None or type(axis) is not int or a.shape[axis] != 1:
        return None
    if a.dtype != out.dtype or not a.flags.c_contiguous:
        return None
    source = a.reshape(out.shape)
    written = (b for other in calls for b in other.writes if b.shape == source.shape and same_view(b, source))
    source = next(written, source)  # the same object, so that the copy can be left out
    return in_place_of(call, Call(memory.xp.copyto, (out, source), reads=(source,), writes=(out,)))
