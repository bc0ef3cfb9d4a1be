"""Normalization: scaling with ReLU, and the sums of its backward pass in one."""

from typing import Any

from xpnet.capture.calls import Call, given_by_name
from xpnet.capture.fusion.matching import joined, movable, relu_of, same_elements
from xpnet.capture.passes import Memory


def with_scale_shift_relu(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """scale_shift(x, …, y); relu(y, out) → scale_shift_relu(x, …, out), if nothing else needs y."""
    for scale in [call for call in calls if call.function == backend.scale_shift]:
        *given, y = given_by_name(scale).values()
        relu, out = relu_of(calls, scale, y, memory, backend)
        if relu is None or out is None or not movable(calls, scale, [relu], memory):
            continue
        if any(memory.overlap(out, x) for x in given[1:]) or (
            memory.overlap(out, given[0]) and not same_elements(out, given[0])
        ):
            continue
        call = Call(backend.scale_shift_relu, (*given, out), reads=tuple(given), writes=(out,))
        calls = joined(calls, scale, [relu], call)
    return calls


def with_sum_rows_and_products(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """sum_rows(a, sums); sum_products(a, b, center, products), in any order → sum_rows_and_products."""
    for products in [call for call in calls if call.function == backend.sum_products]:
        a, b, center, out = given_by_name(products).values()
        for total in [call for call in calls if call.function == backend.sum_rows]:
            rows, sums = given_by_name(total).values()
            first, second = sorted((products, total), key=calls.index)
            if not same_elements(rows, a) or any(memory.overlap(sums, x) for x in (a, b, center, out)):
                continue
            if memory.overlap(out, rows) or not movable(calls, first, [second], memory):
                continue
            call = Call(
                backend.sum_rows_and_products, (a, b, center, sums, out), reads=(a, b, center), writes=(sums, out)
            )
            calls = joined(calls, first, [second], call)
            break
    return calls
