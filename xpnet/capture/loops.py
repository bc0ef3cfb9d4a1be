"""Fusing compiled loops of the CPU: one loop in place of several calls, with the same bits."""

from dataclasses import replace
from typing import Any

import numpy

from xpnet.backends import Array
from xpnet.capture.calls import Call, same_view
from xpnet.capture.passes import Memory
from xpnet.capture.program import every_call


def with_fused_loops(calls: list[Call], memory: Memory, loops: Any) -> list[Call]:
    """The calls with fused loops. loops: the compiled loops."""
    order = {id(call): position for position, call in enumerate(every_call(calls))}
    calls = _with_bias_and_relu(calls, memory, loops, list(every_call(calls)), order)
    return _with_whole_loss(calls, memory, loops)


def _with_bias_and_relu(
    calls: list[Call], memory: Memory, loops: Any, flat: list[Call], order: dict[int, int]
) -> list[Call]:
    """add_to_rows(a, row) and relu(a, out) as one loop, if nothing else needs a."""
    result: list[Call] = []
    for call in calls:
        if call.parts is not None:
            parts = [_with_bias_and_relu(part, memory, loops, flat, order) for part in call.parts]
            result.append(replace(call, parts=parts))
            continue
        before = result[-1] if result else None
        if before is not None and before.function is loops.add_to_rows and call.function is loops.relu:
            (a, row), (x, out) = before.args, call.args
            later = flat[order[id(call)] + 1 :]
            whole = memory.extent(a)[1:] == memory.extent(x)[1:] and memory.temporary(a)
            if whole and not memory.overlap(a, out) and not any(memory.touches(other, a) for other in later):
                result[-1] = replace(
                    call, function=loops.add_to_rows_relu, args=(a, row, out.reshape(a.shape)), reads=(a, row),
                    writes=(a, out), operator="add_to_rows_relu", place=before.place,
                )  # fmt: skip
                continue
        result.append(call)
    return result


def _with_whole_loss(calls: list[Call], memory: Memory, loops: Any) -> list[Call]:
    """Cross-entropy with the factor of its gradient; and with the sum of the losses and the correct predictions."""
    position = next((i for i, call in enumerate(calls) if call.function is loops.cross_entropy), None)
    if position is None:
        return calls
    loss = calls[position]
    logits, labels, confidence, share, scale, losses, grad = loss.args
    rest = calls[position + 1 :]
    if rest and _scales(rest[0], grad) and scale == 1:
        scale = grad.dtype.type(rest.pop(0).args[1])
        loss = replace(loss, args=(logits, labels, confidence, share, scale, losses, grad))
    parts = _sum_and_count(rest, logits, labels, losses)
    if parts is not None:
        total, count, addition = parts
        loss_sum, correct = total.args[3], addition.args[0]
        between = rest[: rest.index(addition)]
        moved = [call for call in between if call is not total and call is not count]
        if not any(
            any(memory.writes(call, a) for a in (logits, labels, losses))
            or any(memory.touches(call, a) for a in (loss_sum, correct))
            for call in moved
        ):
            arrays = (logits, labels, confidence, share, scale, losses, grad)
            loss = replace(
                loss, function=_loss_and_sums,
                args=(loops.cross_entropy_sums, *arrays, loss_sum, correct[:1], correct[1:]),
                reads=(logits, labels, correct), writes=(losses, grad, loss_sum, correct),
                operator="cross_entropy_sums",
            )  # fmt: skip
            rest = [call for call in rest if call not in (total, count, addition)]
    return [*calls[:position], loss, *rest]


def _scales(call: Call, grad: Array) -> bool:
    """Whether a call multiplies all of the gradient by a number."""
    return (
        call.function is numpy.multiply
        and not call.kwargs
        and call.result is None
        and type(call.args[1]) is float
        and isinstance(call.args[0], numpy.ndarray)
        and same_view(call.args[0], grad)
        and same_view(call.args[2], grad)
    )


def _sum_and_count(calls: list[Call], logits: Array, labels: Array, losses: Array) -> tuple[Call, Call, Call] | None:
    """The calls that sum the losses in float64, count the correct predictions, and add these to a total."""
    total = count = None
    for call in calls:
        if call.function == numpy.add.reduce and same_view(call.args[0], losses) and call.args[2] == numpy.float64:
            total = call
        elif call.name == "count_correct" and all(map(same_view, call.args, (logits, labels))):
            count = call
        elif total is not None and count is not None and call.function is numpy.add:
            a, b, out = call.args
            if b is count.result and isinstance(a, numpy.ndarray) and same_view(a, out):
                uses = [other for other in calls if any(x is b for x in (*other.reads, *other.writes))]
                return (total, count, call) if len(uses) == 2 else None
    return None


def _loss_and_sums(
    loop: Any, logits: Array, labels: Array, confidence: Any, share: Any, scale: Any, losses: Array, grad: Array,
    loss_sum: Array, hits: Array, rows: Array,
) -> None:  # fmt: skip
    hits += loop(logits, labels, confidence, share, scale, losses, grad)
    rows += len(logits)
    numpy.add.reduce(losses, None, numpy.float64, loss_sum)
