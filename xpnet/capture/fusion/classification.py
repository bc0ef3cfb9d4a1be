"""Classification: cross-entropy with its sums, and with the last layer of a classifier."""

from collections.abc import Sequence
from typing import Any

from xpnet.backends import Array
from xpnet.capture.calls import Call, given_by_name, is_array, same_view
from xpnet.capture.fusion.matching import joined, movable, needed_after, next_call, next_use, same_elements, shaped
from xpnet.capture.passes import Memory


def with_dense_cross_entropy(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """The last Dense layer of a classifier, its cross-entropy and the gradient of the layer before it, in one call.

    matmul(h, weight, logits); add_to_rows(logits, row); cross_entropy(logits, labels, smoothing, losses, grad);
    grad *= scale; correct += count_correct(logits, labels); matmul(grad, weightᵀ, grad_h); relu_grad(grad_h, h, out)
    → dense_cross_entropy(…), if nothing else needs the logits. All but the first and the third may be missing.
    """
    for first in [call for call in calls if call.function == backend.matmul]:
        h, weight, logits = given_by_name(first).values()
        if not all(is_array(a) and a.ndim == 2 and a.flags.c_contiguous for a in (h, weight, logits)):
            continue
        if not memory.temporary(logits) or not backend.fits_dense_cross_entropy(*h.shape, weight.shape[1]):
            continue
        others, row, loss = list[Call](), None, next_use(calls, first, logits, memory)
        if loss is not None and loss.function == backend.add_to_rows and same_view(given_by_name(loss)["a"], logits):
            others, row, loss = [loss], given_by_name(loss)["row"], next_use(calls, loss, logits, memory)
        if loss is None or loss.function != backend.cross_entropy:
            continue
        outputs, labels, smoothing, losses, grad = given_by_name(loss).values()
        if not same_view(outputs, logits):
            continue
        others, scale, correct = [*others, loss], 1.0, None
        scaled = next_use(calls, loss, grad, memory)
        if scaled is not None and _is_scale(scaled, grad, memory):
            others, scale, loss = [*others, scaled], float(scaled.args[1]), scaled
        counted = _counted(calls, first, logits, labels, memory, backend)
        if counted is not None and movable(calls, first, [*others, *counted], memory):
            others, correct = [*others, *counted], counted[1].args[2]
        rest = [call for call in calls if not any(call is other for other in others)]
        if needed_after(rest, first, logits, memory) or not movable(calls, first, others, memory):
            continue
        others, grad_h, masked = _with_grad_of_input(calls, first, loss, others, (h, weight, grad), memory, backend)
        reads = tuple(a for a in (h, weight, row, labels, correct) if a is not None)
        writes = tuple(a for a in (losses, grad, correct, grad_h) if a is not None)
        arguments = (h, weight, row, labels, smoothing, scale, losses, grad, correct, grad_h, masked)
        call = Call(backend.dense_cross_entropy, arguments, reads=reads, writes=writes)
        calls = joined(calls, first, others, call)
    return calls


def _with_grad_of_input(
    calls: Sequence[Call],
    first: Call,
    last: Call,
    others: list[Call],
    arrays: tuple[Array, Array, Array],
    memory: Memory,
    backend: Any,
) -> tuple[list[Call], Array | None, bool]:
    """The calls with those for the gradient of h; the array with it, or None; whether it is masked.

    Those are matmul(grad, weightᵀ, grad_h), and perhaps relu_grad(grad_h, h, out).  last: the call that completes grad.
    others: the calls that are made directly after the first.  arrays: h, weight and grad.
    """
    h, weight, grad = arrays

    def is_grad_of_input(call: Call) -> bool:
        if call.function != backend.matmul:
            return False
        a, b, _ = given_by_name(call).values()
        return is_array(a) and is_array(b) and same_view(a, grad) and b.ndim == 2 and same_view(b.T, weight)

    product = next_call(calls, last, is_grad_of_input)
    if product is None or not movable(calls, first, [*others, product], memory):
        return others, None, False
    grad_h = given_by_name(product)["out"]
    if not grad_h.flags.c_contiguous or memory.overlap(grad_h, h):
        return others, None, False
    masks = next_use(calls, product, grad_h, memory)
    if masks is not None and masks.function == backend.relu_grad:
        incoming, y, out = given_by_name(masks).values()
        needed = needed_after(calls, masks, grad_h, memory)
        whole = same_elements(incoming, grad_h) and same_elements(y, h) and out.flags.c_contiguous
        if (
            whole
            and not needed
            and not memory.overlap(out, h)
            and movable(calls, first, [*others, product, masks], memory)
        ):
            return [*others, product, masks], shaped(out, h), True
    return [*others, product], grad_h, False


def with_cross_entropy_sums(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """Cross-entropy, the scale of its gradient, the sum of the losses and the correct predictions, in one call.

    cross_entropy(logits, labels, smoothing, losses, grad); grad *= scale; sum_to(losses, loss_sum);
    correct += count_correct(logits, labels) → cross_entropy_sums(…). The second and the last may be missing.
    """
    for first in [call for call in calls if call.function == backend.cross_entropy]:
        logits, labels, smoothing, losses, grad = given_by_name(first).values()

        def sums_up(call: Call, losses: Array = losses) -> bool:
            return call.function == backend.sum_to and same_view(given_by_name(call)["x"], losses)

        total = next_call(calls, first, sums_up)
        if total is None:
            continue
        others, scale, correct = [total], 1.0, None
        scaled = next_use(calls, first, grad, memory)
        if scaled is not None and _is_scale(scaled, grad, memory) and movable(calls, first, [scaled], memory):
            others, scale = [scaled, *others], float(scaled.args[1])
        counted = _counted(calls, first, logits, labels, memory, backend)
        if counted is not None and movable(calls, first, [*others, *counted], memory):
            others, correct = [*others, *counted], counted[1].args[2]
        if not movable(calls, first, others, memory):
            continue
        counts = () if correct is None else (correct,)
        loss_sum = given_by_name(total)["out"]
        call = Call(
            backend.cross_entropy_sums, (logits, labels, smoothing, scale, losses, grad, loss_sum, correct),
            reads=(logits, labels, *counts), writes=(losses, grad, loss_sum, *counts),
        )  # fmt: skip
        calls = joined(calls, first, others, call)
    return calls


def _is_scale(call: Call, grad: Array, memory: Memory) -> bool:
    """Whether a call is grad *= number."""
    if call.function is not memory.xp.multiply or len(call.args) != 3 or call.kwargs:
        return False
    if type(call.args[1]) not in (int, float):
        return False
    return same_view(call.args[0], grad) and same_view(call.args[2], grad)


def _counted(
    calls: Sequence[Call], first: Call, logits: Array, labels: Array, memory: Memory, backend: Any
) -> list[Call] | None:
    """The calls that add the correct predictions to a running total: count_correct, and the addition."""

    def counts(call: Call) -> bool:
        if call.function != backend.count_correct:
            return False
        outputs, own_labels = given_by_name(call).values()
        return same_view(outputs, logits) and same_view(own_labels, labels)

    count = next_call(calls, first, counts)
    if count is None:
        return None
    users = [call for call in calls if call is not count and memory.touches(call, count.result)]
    if len(users) != 1 or users[0].function is not memory.xp.add or len(users[0].args) != 3 or users[0].kwargs:
        return None
    total, counted, out = users[0].args
    if total is count.result:
        total, counted = counted, total
    if counted is not count.result or not is_array(total) or not same_view(total, out):
        return None
    return [count, users[0]]
