"""Masks of ReLU: large products in 16 bits write and apply them, instead of a kernel that masks the gradient."""

from collections.abc import Sequence
from typing import Any

from xpnet.backends.cuda.cublas import HalfMatrix, elements
from xpnet.capture.calls import Call, given_by_name, is_array, same_view
from xpnet.capture.fusion.half_precision import rounded_weight
from xpnet.capture.fusion.matching import calls_between, in_place_of, movable, needed_after, next_use
from xpnet.capture.passes import Memory


def with_relu_masks(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """Let large products write the mask of a ReLU, apply it, and sum the rows of the masked gradient.

    matmul_bias(a, b, row, True, y); …; matmul(c, d, grad); relu_grad_sum_rows(grad, y, out, sums); …;
    matmul(e, out, w) → matmul_relu_mask(a, b, row, y, mask); …; matmul_masked(c, d, mask, out); …;
    matmul_sum_rows(e, out, w, sums), if nothing else needs grad, and cuBLASLt has algorithms for that.
    """
    for last in [call for call in calls if _is_in_halves(call, backend.relu_grad_sum_rows)]:
        grad, y, out, sums = last.args
        product = _producer(calls, last, grad, memory)
        if product is None or product.function != backend.matmul or next_use(calls, product, grad.bits, memory) != last:
            continue
        first = _producer(calls, product, y, memory)
        if first is None or first.function != backend.matmul_bias or not given_by_name(first)["relu"]:
            continue
        if needed_after(calls, last, grad.bits, memory) or not movable(calls, product, [last], memory):
            continue
        if any(memory.overlap(out.bits, a) for a in product.reads):
            continue
        (a, b, row, _, _), (c, d, _) = given_by_name(first).values(), given_by_name(product).values()
        row = rounded_weight(row, calls, backend)
        mask = backend.relu_mask((a, b, row, y), (c, d, None, out))
        if mask is None:
            continue
        memory.own(mask)
        reads = (a.bits, b.bits, elements(row))
        new = {
            first: Call(backend.matmul_relu_mask, (a, b, row, y, mask), reads=reads, writes=(y.bits, mask)),
            product: Call(backend.matmul_masked, (c, d, mask, out), reads=(*product.reads, mask), writes=(out.bits,)),
            last: Call(backend.sum_rows, (out, sums), reads=(out.bits,), writes=(sums,)),
        }
        calls = [in_place_of(call, new[call]) if call in new else call for call in calls]
        calls = _with_sums(calls, new[last], memory, backend)
    return calls


def _is_in_halves(call: Call, function: Any) -> bool:
    return bool(call.function == function and isinstance(call.args[0], HalfMatrix))


def _producer(calls: Sequence[Call], user: Call, matrix: HalfMatrix, memory: Memory) -> Call | None:
    """The last call before `user` that writes elements of a matrix, if its result is this matrix."""
    before = calls[: calls.index(user)]
    producer = next((call for call in reversed(before) if memory.writes(call, matrix.bits)), None)
    out = given_by_name(producer).get("out") if producer is not None and not producer.opaque else None
    return producer if isinstance(out, HalfMatrix) and same_view(out.bits, matrix.bits) else None


def _with_sums(calls: list[Call], total: Call, memory: Memory, backend: Any) -> list[Call]:
    """sum_rows(b, sums); …; matmul(a, b, out) → …; matmul_sum_rows(a, b, out, sums), for a float32 out."""
    half, sums = total.args
    for product in calls[calls.index(total) + 1 :]:
        if not _is_in_halves(product, backend.matmul):
            continue
        a, b, out = given_by_name(product).values()
        if not same_view(b.bits, half.bits) or not is_array(out):
            continue
        between = calls_between(calls, total, product)
        if memory.touches(product, sums) or any(
            memory.touches(call, sums) or memory.writes(call, half.bits) for call in between
        ):
            return calls
        new = Call(backend.matmul_sum_rows, (a, b, out, sums), reads=product.reads, writes=(out, sums))
        return [in_place_of(call, new) if call is product else call for call in calls if call is not total]
    return calls
