"""Max-pooling with the bias before it and the ReLU after it, and its gradient."""

from collections.abc import Sequence
from typing import Any

from xpnet.backends import Array
from xpnet.capture.calls import Call, given_by_name
from xpnet.capture.fusion.matching import (
    calls_between,
    joined,
    movable,
    needed_after,
    next_use,
    relu_of,
    same_elements,
    shaped,
)
from xpnet.capture.passes import Memory


def with_add_to_rows_max_pool(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """add_to_rows(x, row); max_pool(x, windows, pooled, choice); relu(pooled, out) → add_to_rows_max_pool(…).

    The first or the last may be missing. Nothing else needs x + row and what is pooled.
    """
    for pool in [call for call in calls if call.function == backend.max_pool]:
        x, windows, pooled, choice = given_by_name(pool).values()
        add = _sum_for(calls, pool, x, memory, backend)
        relu, positive = relu_of(calls, pool, pooled, memory, backend)
        first, others = (pool, []) if add is None else (add, [pool])
        others += [] if relu is None else [relu]
        if not others or not movable(calls, first, others, memory):
            continue
        row = None if add is None else given_by_name(add)["row"]
        out = pooled if relu is None else positive
        if memory.overlap(out, x):
            continue
        reads, changed = ((x,), ()) if row is None else ((x, row), (x,))
        call = Call(
            backend.add_to_rows_max_pool, (x, row, windows, relu is not None, out, choice),
            reads=reads, writes=(*changed, out, choice),
        )  # fmt: skip
        calls = joined(calls, first, others, call)
    return calls


def _sum_for(calls: Sequence[Call], pool: Call, x: Array, memory: Memory, backend: Any) -> Call | None:
    """The call add_to_rows(x, row) whose result only `pool` needs."""
    for add in [call for call in calls if call.function == backend.add_to_rows]:
        a, row = given_by_name(add).values()
        if next_use(calls, add, a, memory) is pool and same_elements(a, x) and len(row) == x.shape[-1]:
            return None if needed_after(calls, pool, x, memory) else add
    return None


def with_relu_grad_max_pool_grad(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """relu_grad(grad, y, masked); max_pool_grad(masked, choice, windows, out) → relu_grad_max_pool_grad(…)."""
    for first in [call for call in calls if call.function == backend.relu_grad]:
        masked = given_by_name(first)["out"]
        second = next_use(calls, first, masked, memory)
        if second is None or second.function != backend.max_pool_grad:
            continue
        pooled, choice, windows, out = given_by_name(second).values()
        arrays = [shaped(given_by_name(first)[name], pooled) for name in ("grad", "y")]
        if not same_elements(masked, pooled) or any(a is None for a in arrays):
            continue
        if needed_after(calls, second, masked, memory) or memory.touches(first, out):
            continue
        reads = (*arrays, choice)
        if any(memory.writes(between, a) for a in reads for between in calls_between(calls, first, second)):
            continue
        call = Call(backend.relu_grad_max_pool_grad, (*reads, windows, out), reads=reads, writes=(out,))
        calls = joined(calls, second, [first], call)
    return calls
