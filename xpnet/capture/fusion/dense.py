"""Dense layers: a product with the bias, ReLU, its gradient, and the gradient of the bias."""

from collections.abc import Sequence
from typing import Any

from xpnet.backends import Array
from xpnet.capture.calls import Call, given_by_name, is_array, same_view
from xpnet.capture.fusion.half_precision import half_precision_of
from xpnet.capture.fusion.matching import (
    joined,
    movable,
    needed_after,
    next_call,
    next_use,
    relu_of,
    same_elements,
    shaped,
    sum_of_rows,
)
from xpnet.capture.passes import Memory


def with_add_to_rows_relu(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """add_to_rows(a, row); relu(a, out) → add_to_rows_relu(a, row, out), if nothing else needs a + row."""
    for add in [call for call in calls if call.function == backend.add_to_rows]:
        a, row = given_by_name(add).values()
        relu, out = relu_of(calls, add, a, memory, backend)
        if relu is None or not movable(calls, add, [relu], memory):
            continue
        call = Call(backend.add_to_rows_relu, (a, row, out), reads=(a, row), writes=(a, out))
        calls = joined(calls, add, [relu], call)
    return calls


def with_relu_grad_sum_rows(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """relu_grad(grad, y, out); sum_rows(out, sums) → relu_grad_sum_rows(grad, y, out, sums)."""
    for first in [call for call in calls if call.function == backend.relu_grad]:
        second = sum_of_rows(calls, first, given_by_name(first)["out"], backend)
        if second is None or not movable(calls, first, [second], memory):
            continue
        rows, sums = given_by_name(second).values()
        arrays = [shaped(array, rows) for array in given_by_name(first).values()]
        if rows.ndim != 2 or any(a is None for a in arrays) or memory.touches(first, sums):
            continue
        grad, y, out = arrays
        call = Call(backend.relu_grad_sum_rows, (grad, y, out, sums), reads=(grad, y), writes=(out, sums))
        calls = joined(calls, first, [second], call)
    return calls


def with_matmul_bias(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """matmul(a, b, z); add_to_rows(z, row) or add_to_rows_relu(z, row, out) → matmul_bias(a, b, row, relu, out)."""
    for product in _products(calls, backend):
        a, b, z = given_by_name(product).values()
        add = next_use(calls, product, z, memory)
        if add is None or add.function not in (backend.add_to_rows, backend.add_to_rows_relu):
            continue
        given = list(given_by_name(add).values())
        relu = add.function == backend.add_to_rows_relu
        out = shaped(given[-1], z) if relu else z
        if out is None or not same_elements(given[0], z) or not movable(calls, product, [add], memory):
            continue
        if relu and any(memory.overlap(out, x) for x in product.reads):
            continue
        row = given[1]
        call = Call(backend.matmul_bias, (a, b, row, relu, out), reads=(*product.reads, row), writes=(out,))
        calls = joined(calls, product, [add], call)
    return calls


def with_matmul_relu_grad(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """matmul(a, b, grad); relu_grad(grad, y, out) → matmul_relu_grad(a, b, y, out), if nothing else needs grad."""
    for product in _small_products(calls, backend):
        a, b, grad = given_by_name(product).values()
        relu_grad = next_use(calls, product, grad, memory)
        if relu_grad is None or relu_grad.function != backend.relu_grad:
            continue
        given, y, out = given_by_name(relu_grad).values()
        y, out = shaped(y, grad), shaped(out, grad)
        if y is None or out is None or not same_elements(given, grad):
            continue
        if not movable(calls, product, [relu_grad], memory) or needed_after(calls, relu_grad, grad, memory):
            continue
        reads = (*product.reads, y)
        if any(memory.overlap(out, x) for x in reads):
            continue
        call = Call(backend.matmul_relu_grad, (a, b, y, out), reads=reads, writes=(out,))
        calls = joined(calls, product, [relu_grad], call)
    return calls


def with_matmul_sum_rows(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """matmul(a, b, out); sum_rows(b, sums) → matmul_sum_rows(a, b, out, sums)."""
    for product in _small_products(calls, backend):
        a, b, out = given_by_name(product).values()

        def sums_up(call: Call, b: Array = b) -> bool:
            return call.function == backend.sum_rows and same_view(given_by_name(call)["a"], b)

        total = next_call(calls, product, sums_up)
        if total is None or not movable(calls, product, [total], memory):
            continue
        sums = given_by_name(total)["out"]
        if memory.touches(product, sums):
            continue
        call = Call(backend.matmul_sum_rows, (a, b, out, sums), reads=product.reads, writes=(out, sums))
        calls = joined(calls, product, [total], call)
    return calls


def _products(calls: Sequence[Call], backend: Any) -> list[Call]:
    """The products of float32 matrices, with which GPUs can compute what follows."""
    products = [call for call in calls if call.function == backend.matmul]
    return [call for call in products if all(is_array(a) and a.dtype == "float32" for a in call.args)]


def _small_products(calls: Sequence[Call], backend: Any) -> list[Call]:
    """Those that do not read matrices in 16 bits: cuBLASLt, which computes these, does not compute what follows."""
    return [call for call in _products(calls, backend) if half_precision_of(call, backend) is None]
