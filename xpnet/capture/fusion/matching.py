"""Matching: questions of passes about calls and arrays, and the replacement of calls."""

from collections.abc import Sequence
from typing import Any

from xpnet.backends import Array
from xpnet.capture.calls import Call, address_of, given_by_name, same_view
from xpnet.capture.passes import Memory


def next_call(calls: Sequence[Call], call: Call, wanted: Any) -> Call | None:
    """The first later call that is wanted."""
    return next((later for later in calls[calls.index(call) + 1 :] if wanted(later)), None)


def next_use(calls: Sequence[Call], call: Call, array: Array, memory: Memory) -> Call | None:
    """The first later call that reads or writes elements of this array."""
    return next_call(calls, call, lambda later: memory.touches(later, array))


def relu_of(
    calls: Sequence[Call], call: Call, result: Array, memory: Memory, backend: Any
) -> tuple[Call | None, Array | None]:
    """relu(result, out), if only that needs this result of `call`; and out in the shape of the result. Else None."""
    relu = next_use(calls, call, result, memory)
    if relu is None or relu.function != backend.relu:
        return None, None
    x, out = given_by_name(relu).values()
    out = shaped(out, result)
    if out is None or not same_elements(x, result):
        return None, None
    if needed_after(calls, relu, result, memory) and not same_view(out, result):
        return None, None
    return relu, out


def sum_of_rows(calls: Sequence[Call], call: Call, array: Array, backend: Any) -> Call | None:
    """The first call sum_rows(array, out) after `call`."""

    def sums_up(later: Call) -> bool:
        return later.function == backend.sum_rows and same_elements(given_by_name(later)["a"], array)

    return next_call(calls, call, sums_up)


def calls_between(calls: Sequence[Call], first: Call, last: Call) -> Sequence[Call]:
    return calls[calls.index(first) + 1 : calls.index(last)]


def needed_after(calls: Sequence[Call], call: Call, array: Array, memory: Memory) -> bool:
    """Whether anything reads elements of this array after a call, before they are overwritten."""
    _, owner, first, end = memory.extent(array)
    left = [(first, end)]  # the bytes that still belong to the array
    for later in calls[calls.index(call) + 1 :]:
        if later.opaque:
            return True
        for a in later.reads:
            _, other, first, end = memory.extent(a)
            if other == owner and any(first < stop and start < end for start, stop in left):
                return True
        for a in later.writes:
            _, other, first, end = memory.extent(a)
            if other == owner and a.flags.c_contiguous:
                left = [part for piece in left for part in _without(piece, first, end)]
        if not left:
            return False
    return not memory.temporary(array)


def _without(piece: tuple[int, int], first: int, end: int) -> list[tuple[int, int]]:
    """What is left of a range without another one."""
    start, stop = piece
    return [part for part in ((start, min(stop, first)), (max(start, end), stop)) if part[0] < part[1]]


def movable(calls: Sequence[Call], first: Call, others: Sequence[Call], memory: Memory) -> bool:
    """Whether these later calls, in their order, could as well be made directly after the first."""
    for call in others:
        for between in calls[calls.index(first) + 1 : calls.index(call)]:
            if any(between is other for other in others):
                continue
            if any(memory.touches(between, a) for a in call.writes):
                return False
            if any(memory.writes(between, a) for a in call.reads):
                return False
    return True


def joined(calls: Sequence[Call], first: Call, others: Sequence[Call], call: Call) -> list[Call]:
    """The calls with this one in place of the first, and without the others."""
    kept = [c for c in calls if not any(c is other for other in others)]
    kept[kept.index(first)] = in_place_of(first, call)
    return kept


def in_place_of(old: Call, new: Call) -> Call:
    new.operator, new.place = new.name, old.place
    return new


def same_elements(a: Array, b: Array) -> bool:
    """Whether two contiguous arrays are the same elements, perhaps in other shapes."""
    contiguous = a.flags.c_contiguous and b.flags.c_contiguous
    return bool(contiguous and address_of(a) == address_of(b) and a.size == b.size and a.dtype == b.dtype)


def shaped(a: Array, like: Array) -> Array | None:
    """An array as a view in another shape; None if that would be a copy."""
    if a.shape == like.shape:
        return a
    return a.reshape(like.shape) if a.flags.c_contiguous and a.size == like.size else None
