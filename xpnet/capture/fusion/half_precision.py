"""Half precision: products that round their matrices themselves."""

from collections.abc import Sequence
from typing import Any

from xpnet.backends import Array
from xpnet.capture.calls import Call, given_by_name, is_array, same_view
from xpnet.capture.fusion.matching import calls_between, in_place_of
from xpnet.capture.passes import Memory, without_unused_results


def without_casts(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """cast(x) → x16; matmul(x16, y16, out) → matmul(x, y, out), which rounds x and y, if these are still the same."""
    calls = list(calls)
    casts = [call for call in calls if call.function == backend.cast and call.result is not None]
    for i, call in enumerate(calls):
        if call.function != backend.matmul:
            continue
        *rounded, out = given_by_name(call).values()
        a, b = (_unrounded(calls, casts, call, matrix, memory) for matrix in rounded)
        if a is not None and b is not None:
            calls[i] = in_place_of(call, Call(backend.matmul, (a, b, out), reads=(a, b), writes=(out,)))
    return without_unused_results(calls, memory)


def _unrounded(calls: Sequence[Call], casts: Sequence[Call], user: Call, matrix: Any, memory: Memory) -> Array | None:
    """The float32 matrix of which a call uses this rounded copy; None if it has changed since."""
    if is_array(matrix):
        return matrix
    for cast in casts:
        bits, (x,) = cast.result.bits, cast.args
        source = x if same_view(matrix.bits, bits) else x.T if same_view(matrix.bits, bits.T) else None
        if source is not None:
            changed = any(memory.writes(call, x) for call in calls_between(calls, cast, user))
            return None if changed else source
    return None
