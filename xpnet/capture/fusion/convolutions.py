"""Convolutions whose kernels gather the patches."""

import math
from collections.abc import Sequence
from typing import Any

from xpnet.backends import Array
from xpnet.capture.calls import Call, given_by_name, is_array, same_view
from xpnet.capture.fusion.matching import (
    joined,
    movable,
    needed_after,
    next_use,
    relu_of,
    same_elements,
    shaped,
    sum_of_rows,
)
from xpnet.capture.passes import Memory


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
            calls = joined(calls, gather, [product], call)
            calls = _with_bias(calls, call, memory, backend)
            calls = _with_bias_grad(calls, call, memory, backend)
    for product in [call for call in calls if call.function == backend.matmul]:
        fold = _only_use(calls, product, memory)
        if fold is None or fold.function != backend.col2im:
            continue
        call = _folded(product, fold, backend)
        if call is not None:
            calls = joined(calls, product, [fold], call)
            calls = _with_relu_grad(calls, call, memory, backend)
    return calls


def _only_use(calls: Sequence[Call], call: Call, memory: Memory) -> Call | None:
    """The call that uses the result of this one, if it is the only one, and could be made directly after it."""
    result = given_by_name(call)["out"]
    user = next_use(calls, call, result, memory)
    if user is None or needed_after(calls, user, result, memory) or not movable(calls, call, [user], memory):
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
    add = next_use(calls, convolution, out, memory)
    if add is None or add.function != backend.add_to_rows or not movable(calls, convolution, [add], memory):
        return calls
    a, bias = given_by_name(add).values()
    if not same_elements(a, out) or bias.shape != out.shape[3:] or memory.overlap(bias, out):
        return calls
    call = Call(backend.convolve, (x, weight, bias, windows, False, out), reads=(x, weight, bias), writes=(out,))
    calls = joined(calls, convolution, [add], call)
    relu, after = relu_of(calls, call, out, memory, backend)
    if relu is None or not movable(calls, call, [relu], memory) or any(memory.overlap(after, b) for b in call.reads):
        return calls
    active = Call(backend.convolve, (x, weight, bias, windows, True, after), reads=call.reads, writes=(after,))
    return joined(calls, call, [relu], active)


def _with_relu_grad(calls: list[Call], convolution: Call, memory: Memory, backend: Any) -> list[Call]:
    """Let the gradient of images continue through the ReLU that made them, if that follows it."""
    grad, weight, windows, out = convolution.args
    relu_grad = next_use(calls, convolution, out, memory)
    if relu_grad is None or relu_grad.function != backend.relu_grad:
        return calls
    before, y, after = given_by_name(relu_grad).values()
    y, after = shaped(y, out), shaped(after, out)
    if y is None or after is None or not same_elements(before, out):
        return calls
    if any(memory.overlap(after, read) for read in convolution.reads) or memory.overlap(y, out):
        return calls
    if memory.overlap(after, y) and not same_view(after, y):
        return calls
    if not movable(calls, convolution, [relu_grad], memory):
        return calls
    if needed_after(calls, relu_grad, out, memory) and not same_view(after, out):
        return calls
    arguments = (grad, weight, windows, after, y)
    call = Call(backend.convolve_input_grad, arguments, reads=(*convolution.reads, y), writes=(after,))
    return joined(calls, convolution, [relu_grad], call)


def _with_bias_grad(calls: list[Call], convolution: Call, memory: Memory, backend: Any) -> list[Call]:
    """Let the gradient of a weight also compute that of the bias, if that follows it."""
    if convolution.function != backend.convolve_weight_grad:
        return calls
    x, grad, windows, out, _, add = convolution.args
    total = sum_of_rows(calls, convolution, grad, backend)
    if total is None or not movable(calls, convolution, [total], memory):
        return calls
    sums = given_by_name(total)["out"]
    if sums.shape != grad.shape[3:] or not sums.flags.c_contiguous:
        return calls
    if memory.touches(convolution, sums):
        return calls
    call = Call(
        backend.convolve_weight_grad, (x, grad, windows, out, sums, add), reads=convolution.reads, writes=(out, sums)
    )
    return joined(calls, convolution, [total], call)
