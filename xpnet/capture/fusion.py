"""Fusion: passes over the calls of a step on a GPU, which replace operators by fewer or by fused ones.

A pass changes only the calls that are exactly those that it looks for. What they compute is equal up to rounding.
"""

import math
from collections.abc import Sequence
from typing import Any

from xpnet.backends import Array
from xpnet.capture.calls import Call, address_of, given_by_name, is_array, same_view
from xpnet.capture.calls import position_of as _position
from xpnet.capture.passes import Memory

_LARGE = 2**16  # elements: for fewer, all kernels take the same time


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
            calls[i] = _in_place_of(call, stored)
            calls[zeros] = _in_place_of(calls[zeros], Call(_nothing, ()))
    calls = [call for call in calls if call.function is not _nothing]
    return [_copy_of_one(call, calls, memory) or call for call in calls]


def _nothing() -> None:
    """A call that is left out."""


def _fills_with_zeros(call: Call, array: Array, memory: Memory) -> bool:
    if call.function is not memory.xp.copyto or "where" in call.kwargs or is_array(call.args[1]):
        return False
    return type(call.args[1]) in (int, float) and call.args[1] == 0 and _same_elements(call.args[0], array)


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
    return _in_place_of(call, Call(memory.xp.copyto, (out, source), reads=(source,), writes=(out,)))


def fused(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """The calls with fused operators in place of the sequences that these replace."""
    for fuse in (
        with_dense_cross_entropy, with_convolutions, with_add_to_rows_relu, with_add_to_rows_max_pool, with_matmul_bias,
        with_relu_grad_max_pool_grad, with_matmul_relu_grad, with_relu_grad_sum_rows, with_matmul_sum_rows,
        with_cross_entropy_sums, with_elementwise_kernels,
    ):  # fmt: skip
        calls = fuse(calls, memory, backend)
    return calls


def with_add_to_rows_relu(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """add_to_rows(a, row); relu(a, out) → add_to_rows_relu(a, row, out), if nothing else needs a + row."""
    for add in [call for call in calls if call.function == backend.add_to_rows]:
        a, row = given_by_name(add).values()
        relu = _next_use(calls, add, a, memory)
        if relu is None or relu.function != backend.relu:
            continue
        x, out = given_by_name(relu).values()
        out = _shaped(out, a)
        if out is None or not _same_elements(x, a) or not _movable(calls, add, [relu], memory):
            continue
        if _needed_after(calls, relu, a, memory) and not same_view(out, a):
            continue
        call = Call(backend.add_to_rows_relu, (a, row, out), reads=(a, row), writes=(a, out))
        calls = _joined(calls, add, [relu], call)
    return calls


def with_relu_grad_sum_rows(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """relu_grad(grad, y, out); sum_rows(out, sums) → relu_grad_sum_rows(grad, y, out, sums)."""
    for first in [call for call in calls if call.function == backend.relu_grad]:
        out = given_by_name(first)["out"]

        def sums_up(call: Call, out: Array = out) -> bool:
            return call.function == backend.sum_rows and _same_elements(given_by_name(call)["a"], out)

        second = _next(calls, first, sums_up)
        if second is None or not _movable(calls, first, [second], memory):
            continue
        rows, sums = given_by_name(second).values()
        arrays = [_shaped(array, rows) for array in given_by_name(first).values()]
        if rows.ndim != 2 or any(a is None for a in arrays) or memory.touches(first, sums):
            continue
        grad, y, out = arrays
        call = Call(backend.relu_grad_sum_rows, (grad, y, out, sums), reads=(grad, y), writes=(out, sums))
        calls = _joined(calls, first, [second], call)
    return calls


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
        others, row, loss = list[Call](), None, _next_use(calls, first, logits, memory)
        if loss is not None and loss.function == backend.add_to_rows and same_view(given_by_name(loss)["a"], logits):
            others, row, loss = [loss], given_by_name(loss)["row"], _next_use(calls, loss, logits, memory)
        if loss is None or loss.function != backend.cross_entropy:
            continue
        outputs, labels, smoothing, losses, grad = given_by_name(loss).values()
        if not same_view(outputs, logits):
            continue
        others, scale, correct = [*others, loss], 1.0, None
        scaled = _next_use(calls, loss, grad, memory)
        if scaled is not None and _is_scale(scaled, grad, memory):
            others, scale, loss = [*others, scaled], float(scaled.args[1]), scaled
        counted = _counted(calls, first, logits, labels, memory, backend)
        if counted is not None and _movable(calls, first, [*others, *counted], memory):
            others, correct = [*others, *counted], counted[1].args[2]
        rest = [call for call in calls if not any(call is other for other in others)]
        if _needed_after(rest, first, logits, memory) or not _movable(calls, first, others, memory):
            continue
        others, grad_h, masked = _with_grad_of_input(calls, first, loss, others, (h, weight, grad), memory, backend)
        reads = tuple(a for a in (h, weight, row, labels, correct) if a is not None)
        writes = tuple(a for a in (losses, grad, correct, grad_h) if a is not None)
        arguments = (h, weight, row, labels, smoothing, scale, losses, grad, correct, grad_h, masked)
        call = Call(backend.dense_cross_entropy, arguments, reads=reads, writes=writes)
        calls = _joined(calls, first, others, call)
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

    product = _next(calls, last, is_grad_of_input)
    if product is None or not _movable(calls, first, [*others, product], memory):
        return others, None, False
    grad_h = given_by_name(product)["out"]
    if not grad_h.flags.c_contiguous or memory.overlap(grad_h, h):
        return others, None, False
    masks = _next_use(calls, product, grad_h, memory)
    if masks is not None and masks.function == backend.relu_grad:
        incoming, y, out = given_by_name(masks).values()
        needed = _needed_after(calls, masks, grad_h, memory)
        whole = _same_elements(incoming, grad_h) and _same_elements(y, h) and out.flags.c_contiguous
        if (
            whole
            and not needed
            and not memory.overlap(out, h)
            and _movable(calls, first, [*others, product, masks], memory)
        ):
            return [*others, product, masks], _shaped(out, h), True
    return [*others, product], grad_h, False


def with_add_to_rows_max_pool(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """add_to_rows(x, row); max_pool(x, windows, pooled, choice); relu(pooled, out) → add_to_rows_max_pool(…).

    The first or the last may be missing. Nothing else needs x + row and what is pooled.
    """
    for pool in [call for call in calls if call.function == backend.max_pool]:
        x, windows, pooled, choice = given_by_name(pool).values()
        add = _sum_for(calls, pool, x, memory, backend)
        relu = _relu_of(calls, pool, pooled, memory, backend)
        first, others = (pool, []) if add is None else (add, [pool])
        others += [] if relu is None else [relu]
        if not others or not _movable(calls, first, others, memory):
            continue
        row = None if add is None else given_by_name(add)["row"]
        out = pooled if relu is None else _shaped(given_by_name(relu)["out"], pooled)
        if memory.overlap(out, x):
            continue
        reads, changed = ((x,), ()) if row is None else ((x, row), (x,))
        call = Call(
            backend.add_to_rows_max_pool, (x, row, windows, relu is not None, out, choice),
            reads=reads, writes=(*changed, out, choice),
        )  # fmt: skip
        calls = _joined(calls, first, others, call)
    return calls


def _sum_for(calls: Sequence[Call], pool: Call, x: Array, memory: Memory, backend: Any) -> Call | None:
    """The call add_to_rows(x, row) whose result only `pool` needs."""
    for add in [call for call in calls if call.function == backend.add_to_rows]:
        a, row = given_by_name(add).values()
        if _next_use(calls, add, a, memory) is pool and _same_elements(a, x) and len(row) == x.shape[-1]:
            return None if _needed_after(calls, pool, x, memory) else add
    return None


def _relu_of(calls: Sequence[Call], pool: Call, pooled: Array, memory: Memory, backend: Any) -> Call | None:
    """The call relu(pooled, out) that is the only one that needs `pooled`."""
    relu = _next_use(calls, pool, pooled, memory)
    if relu is None or relu.function != backend.relu:
        return None
    x, out = given_by_name(relu).values()
    out = _shaped(out, pooled)
    if out is None or not _same_elements(x, pooled):
        return None
    return None if _needed_after(calls, relu, pooled, memory) and not same_view(out, pooled) else relu


def with_relu_grad_max_pool_grad(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """relu_grad(grad, y, masked); max_pool_grad(masked, choice, windows, out) → relu_grad_max_pool_grad(…)."""
    for first in [call for call in calls if call.function == backend.relu_grad]:
        masked = given_by_name(first)["out"]
        second = _next_use(calls, first, masked, memory)
        if second is None or second.function != backend.max_pool_grad:
            continue
        pooled, choice, windows, out = given_by_name(second).values()
        arrays = [_shaped(given_by_name(first)[name], pooled) for name in ("grad", "y")]
        if not _same_elements(masked, pooled) or any(a is None for a in arrays):
            continue
        if _needed_after(calls, second, masked, memory) or memory.touches(first, out):
            continue
        reads = (*arrays, choice)
        if any(memory.writes(between, a) for a in reads for between in _between(calls, first, second)):
            continue
        call = Call(backend.relu_grad_max_pool_grad, (*reads, windows, out), reads=reads, writes=(out,))
        calls = _joined(calls, second, [first], call)
    return calls


def _between(calls: Sequence[Call], first: Call, last: Call) -> Sequence[Call]:
    return calls[_position(calls, first) + 1 : _position(calls, last)]


def with_matmul_bias(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """matmul(a, b, z); add_to_rows(z, row) or add_to_rows_relu(z, row, out) → matmul_bias(a, b, row, relu, out)."""
    for product in _products(calls, backend):
        a, b, z = given_by_name(product).values()
        add = _next_use(calls, product, z, memory)
        if add is None or add.function not in (backend.add_to_rows, backend.add_to_rows_relu):
            continue
        given = list(given_by_name(add).values())
        relu = add.function == backend.add_to_rows_relu
        out = _shaped(given[-1], z) if relu else z
        if out is None or not _same_elements(given[0], z) or not _movable(calls, product, [add], memory):
            continue
        if relu and any(memory.overlap(out, x) for x in product.reads):
            continue
        row = given[1]
        call = Call(backend.matmul_bias, (a, b, row, relu, out), reads=(*product.reads, row), writes=(out,))
        calls = _joined(calls, product, [add], call)
    return calls


def _products(calls: Sequence[Call], backend: Any) -> list[Call]:
    """The products of float32 matrices, with which GPUs can compute what follows."""
    products = [call for call in calls if call.function == backend.matmul]
    return [call for call in products if all(is_array(a) and a.dtype == "float32" for a in call.args)]


def with_matmul_relu_grad(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """matmul(a, b, grad); relu_grad(grad, y, out) → matmul_relu_grad(a, b, y, out), if nothing else needs grad."""
    for product in _products(calls, backend):
        a, b, grad = given_by_name(product).values()
        relu_grad = _next_use(calls, product, grad, memory)
        if relu_grad is None or relu_grad.function != backend.relu_grad:
            continue
        given, y, out = given_by_name(relu_grad).values()
        y, out = _shaped(y, grad), _shaped(out, grad)
        if y is None or out is None or not _same_elements(given, grad):
            continue
        if not _movable(calls, product, [relu_grad], memory) or _needed_after(calls, relu_grad, grad, memory):
            continue
        reads = (*product.reads, y)
        if any(memory.overlap(out, x) for x in reads):
            continue
        call = Call(backend.matmul_relu_grad, (a, b, y, out), reads=reads, writes=(out,))
        calls = _joined(calls, product, [relu_grad], call)
    return calls


def with_matmul_sum_rows(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """matmul(a, b, out); sum_rows(b, sums) → matmul_sum_rows(a, b, out, sums)."""
    for product in _products(calls, backend):
        a, b, out = given_by_name(product).values()

        def sums_up(call: Call, b: Array = b) -> bool:
            return call.function == backend.sum_rows and same_view(given_by_name(call)["a"], b)

        total = _next(calls, product, sums_up)
        if total is None or not _movable(calls, product, [total], memory):
            continue
        sums = given_by_name(total)["out"]
        if memory.touches(product, sums):
            continue
        call = Call(backend.matmul_sum_rows, (a, b, out, sums), reads=product.reads, writes=(out, sums))
        calls = _joined(calls, product, [total], call)
    return calls


def with_cross_entropy_sums(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """Cross-entropy, the scale of its gradient, the sum of the losses and the correct predictions, in one call.

    cross_entropy(logits, labels, smoothing, losses, grad); grad *= scale; sum_to(losses, loss_sum);
    correct += count_correct(logits, labels) → cross_entropy_sums(…). The second and the last may be missing.
    """
    for first in [call for call in calls if call.function == backend.cross_entropy]:
        logits, labels, smoothing, losses, grad = given_by_name(first).values()

        def sums_up(call: Call, losses: Array = losses) -> bool:
            return call.function == backend.sum_to and same_view(given_by_name(call)["x"], losses)

        total = _next(calls, first, sums_up)
        if total is None:
            continue
        others, scale, correct = [total], 1.0, None
        scaled = _next_use(calls, first, grad, memory)
        if scaled is not None and _is_scale(scaled, grad, memory) and _movable(calls, first, [scaled], memory):
            others, scale = [scaled, *others], float(scaled.args[1])
        counted = _counted(calls, first, logits, labels, memory, backend)
        if counted is not None and _movable(calls, first, [*others, *counted], memory):
            others, correct = [*others, *counted], counted[1].args[2]
        if not _movable(calls, first, others, memory):
            continue
        counts = () if correct is None else (correct,)
        loss_sum = given_by_name(total)["out"]
        call = Call(
            backend.cross_entropy_sums, (logits, labels, smoothing, scale, losses, grad, loss_sum, correct),
            reads=(logits, labels, *counts), writes=(losses, grad, loss_sum, *counts),
        )  # fmt: skip
        calls = _joined(calls, first, others, call)
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

    count = _next(calls, first, counts)
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


# Convolutions --------------------------------------------------------------------------------------------------------


def with_convolutions(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """Convolutions whose kernels gather the patches, if the backend has such kernels and nothing else needs patches.

    im2col(x, windows, patches); matmul(patches, weight, out); add_to_rows(out, bias); relu(out, y)
    → convolve(x, weight, bias, windows, relu, y). The last two may be missing.
    im2col(x, windows, patches); matmul(patchesᵀ, grad, out); sum_rows(grad, sums)
    → convolve_weight_grad(x, grad, windows, out, sums). The last may be missing. Likewise for add_matmul.
    matmul(grad, weightᵀ, patches); col2im(patches, windows, out); relu_grad(out, y, grad_x)
    → convolve_input_grad(grad, weight, windows, grad_x, y). The last may be missing.
    """
    for gather in [call for call in calls if call.function == backend.im2col]:
        product = _only_use(calls, gather, memory)
        if product is None or product.function not in (backend.matmul, backend.add_matmul):
            continue
        call = _gathered(gather, product, backend)
        if call is not None:
            calls = _joined(calls, gather, [product], call)
            calls = _with_bias(calls, call, memory, backend)
            calls = _with_bias_grad(calls, call, memory, backend)
    for product in [call for call in calls if call.function == backend.matmul]:
        fold = _only_use(calls, product, memory)
        if fold is None or fold.function != backend.col2im:
            continue
        call = _folded(product, fold, backend)
        if call is not None:
            calls = _joined(calls, product, [fold], call)
            calls = _with_relu_grad(calls, call, memory, backend)
    return calls


def _only_use(calls: Sequence[Call], call: Call, memory: Memory) -> Call | None:
    """The call that uses the result of this one, if it is the only one, and could be made directly after it."""
    result = given_by_name(call)["out"]
    user = _next_use(calls, call, result, memory)
    if user is None or _needed_after(calls, user, result, memory) or not _movable(calls, call, [user], memory):
        return None
    return user


def _gathered(gather: Call, product: Call, backend: Any) -> Call | None:
    """The convolution, or gradient of its weight, that equals im2col and a product; None if they are neither."""
    x, windows, patches = given_by_name(gather).values()
    a, b, out = list(given_by_name(product).values())[:3]
    if not (is_array(a) and is_array(b) and patches.flags.c_contiguous):
        return None
    rows, add = _rows(patches), product.function == backend.add_matmul
    if same_view(a, rows) and not add:
        images = _images(out, patches)
        if images is not None and backend.convolution_kernel("convolve", x, b, windows, images):
            arguments = (x, b, None, windows, False, images)
            return Call(backend.convolve, arguments, reads=(x, b), writes=(images,))
    elif same_view(a, rows.T):
        grad = _images(b, patches)
        if grad is not None and backend.convolution_kernel("convolve_weight_grad", x, grad, windows, out):
            reads = (x, grad, out) if add else (x, grad)
            return Call(backend.convolve_weight_grad, (x, grad, windows, out, None, add), reads=reads, writes=(out,))
    return None


def _folded(product: Call, fold: Call, backend: Any) -> Call | None:
    """The gradient of a convolution's images that equals a product and col2im; None if they are not that."""
    a, b, product_rows = given_by_name(product).values()
    patches, windows, out = given_by_name(fold).values()
    if not (is_array(a) and is_array(b) and patches.flags.c_contiguous and same_view(product_rows, _rows(patches))):
        return None
    grad, weight = _images(a, patches), b.T
    if grad is None or not backend.convolution_kernel("convolve_input_grad", grad, weight, windows, out):
        return None
    return Call(backend.convolve_input_grad, (grad, weight, windows, out), reads=(grad, weight), writes=(out,))


def _rows(patches: Array) -> Array:
    """Contiguous patches (N, rows, columns, kh, kw, channels) as a matrix with a row for each window."""
    return patches.reshape(math.prod(patches.shape[:3]), -1)


def _images(rows: Array, patches: Array) -> Array | None:
    """A matrix with a row for each window as images of the windows; None if it is not contiguous."""
    return rows.reshape(*patches.shape[:3], -1) if rows.flags.c_contiguous else None


def _with_bias(calls: list[Call], convolution: Call, memory: Memory, backend: Any) -> list[Call]:
    """Let a convolution add the bias, and apply ReLU, if these follow it."""
    if convolution.function != backend.convolve:
        return calls
    x, weight, _, windows, _, out = convolution.args
    add = _next_use(calls, convolution, out, memory)
    if add is None or add.function != backend.add_to_rows or not _movable(calls, convolution, [add], memory):
        return calls
    a, bias = given_by_name(add).values()
    if not _same_elements(a, out) or bias.shape != out.shape[3:] or memory.overlap(bias, out):
        return calls
    call = Call(backend.convolve, (x, weight, bias, windows, False, out), reads=(x, weight, bias), writes=(out,))
    calls = _joined(calls, convolution, [add], call)
    relu = _next_use(calls, call, out, memory)
    if relu is None or relu.function != backend.relu or not _movable(calls, call, [relu], memory):
        return calls
    before, after = given_by_name(relu).values()
    after = _shaped(after, out)
    if after is None or not _same_elements(before, out) or any(memory.overlap(after, b) for b in call.reads):
        return calls
    if _needed_after(calls, relu, out, memory) and not same_view(after, out):
        return calls
    active = Call(backend.convolve, (x, weight, bias, windows, True, after), reads=call.reads, writes=(after,))
    return _joined(calls, call, [relu], active)


def _with_relu_grad(calls: list[Call], convolution: Call, memory: Memory, backend: Any) -> list[Call]:
    """Let the gradient of images continue through the ReLU that made them, if that follows it."""
    grad, weight, windows, out = convolution.args
    relu_grad = _next_use(calls, convolution, out, memory)
    if relu_grad is None or relu_grad.function != backend.relu_grad:
        return calls
    before, y, after = given_by_name(relu_grad).values()
    y, after = _shaped(y, out), _shaped(after, out)
    if y is None or after is None or not _same_elements(before, out):
        return calls
    if any(memory.overlap(after, read) for read in convolution.reads) or memory.overlap(y, out):
        return calls
    if memory.overlap(after, y) and not same_view(after, y):
        return calls
    if not _movable(calls, convolution, [relu_grad], memory):
        return calls
    if _needed_after(calls, relu_grad, out, memory) and not same_view(after, out):
        return calls
    arguments = (grad, weight, windows, after, y)
    call = Call(backend.convolve_input_grad, arguments, reads=(*convolution.reads, y), writes=(after,))
    return _joined(calls, convolution, [relu_grad], call)


def _with_bias_grad(calls: list[Call], convolution: Call, memory: Memory, backend: Any) -> list[Call]:
    """Let the gradient of a weight also compute that of the bias, if that follows it."""
    if convolution.function != backend.convolve_weight_grad:
        return calls
    x, grad, windows, out, _, add = convolution.args

    def sums_up(call: Call) -> bool:
        return call.function == backend.sum_rows and _same_elements(given_by_name(call)["a"], grad)

    total = _next(calls, convolution, sums_up)
    if total is None or not _movable(calls, convolution, [total], memory):
        return calls
    sums = given_by_name(total)["out"]
    if sums.shape != grad.shape[3:] or not sums.flags.c_contiguous:
        return calls
    if memory.touches(convolution, sums):
        return calls
    call = Call(
        backend.convolve_weight_grad, (x, grad, windows, out, sums, add), reads=convolution.reads, writes=(out, sums)
    )
    return _joined(calls, convolution, [total], call)


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
    return _in_place_of(call, Call(operator, (*terms, out), reads=tuple(terms), writes=(out,)))


# Properties of calls and arrays ---------------------------------------------------------------------------------------


def _next(calls: Sequence[Call], call: Call, wanted: Any) -> Call | None:
    """The first later call that is wanted."""
    return next((later for later in calls[_position(calls, call) + 1 :] if wanted(later)), None)


def _next_use(calls: Sequence[Call], call: Call, array: Array, memory: Memory) -> Call | None:
    """The first later call that reads or writes elements of this array."""
    return _next(calls, call, lambda later: memory.touches(later, array))


def _needed_after(calls: Sequence[Call], call: Call, array: Array, memory: Memory) -> bool:
    """Whether anything reads elements of this array after a call, before they are overwritten."""
    _, owner, first, end = memory.extent(array)
    left = [(first, end)]  # the bytes that still belong to the array
    for later in calls[_position(calls, call) + 1 :]:
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


def _movable(calls: Sequence[Call], first: Call, others: Sequence[Call], memory: Memory) -> bool:
    """Whether these later calls, in their order, could as well be made directly after the first."""
    for call in others:
        for between in calls[_position(calls, first) + 1 : _position(calls, call)]:
            if any(between is other for other in others):
                continue
            if any(memory.touches(between, a) for a in call.writes):
                return False
            if any(memory.writes(between, a) for a in call.reads):
                return False
    return True


def _joined(calls: Sequence[Call], first: Call, others: Sequence[Call], call: Call) -> list[Call]:
    """The calls with this one in place of the first, and without the others."""
    kept = [c for c in calls if not any(c is other for other in others)]
    kept[_position(kept, first)] = _in_place_of(first, call)
    return kept


def _in_place_of(old: Call, new: Call) -> Call:
    new.operator, new.place = new.name, old.place
    return new


def _same_elements(a: Array, b: Array) -> bool:
    """Whether two contiguous arrays are the same elements, perhaps in other shapes."""
    contiguous = a.flags.c_contiguous and b.flags.c_contiguous
    return bool(contiguous and address_of(a) == address_of(b) and a.size == b.size and a.dtype == b.dtype)


def _shaped(a: Array, like: Array) -> Array | None:
    """An array as a view in another shape; None if that would be a copy."""
    if a.shape == like.shape:
        return a
    return a.reshape(like.shape) if a.flags.c_contiguous and a.size == like.size else None
