"""Fusion: passes over the calls of a step on a GPU, which replace operators by fewer or by fused ones.

A pass changes only the calls that are exactly those that it looks for. What they compute is equal up to rounding.
"""

from typing import Any

from xpnet.capture.calls import Call
from xpnet.capture.fusion.classification import with_cross_entropy_sums, with_dense_cross_entropy
from xpnet.capture.fusion.convolutions import with_convolutions
from xpnet.capture.fusion.dense import (
    with_add_to_rows_relu,
    with_matmul_bias,
    with_matmul_relu_grad,
    with_matmul_sum_rows,
    with_relu_grad_sum_rows,
)
from xpnet.capture.fusion.elements import with_elementwise_kernels, with_small_operations
from xpnet.capture.fusion.half_precision import copied_weights, with_half_matrices, without_casts
from xpnet.capture.fusion.normalization import with_scale_shift_relu, with_sum_rows_and_products
from xpnet.capture.fusion.pooling import with_add_to_rows_max_pool, with_relu_grad_max_pool_grad
from xpnet.capture.fusion.relu_masks import with_relu_masks
from xpnet.capture.fusion.zeros import without_zeros
from xpnet.capture.passes import Memory

__all__ = ["copied_weights", "fused", "without_zeros"]


def fused(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """The calls with fused operators in place of the sequences that these replace."""
    for fuse in (
        without_casts, with_dense_cross_entropy, with_convolutions, with_add_to_rows_relu, with_add_to_rows_max_pool,
        with_matmul_bias, with_relu_grad_max_pool_grad, with_matmul_relu_grad, with_relu_grad_sum_rows,
        with_matmul_sum_rows, with_cross_entropy_sums, with_scale_shift_relu, with_sum_rows_and_products,
        with_elementwise_kernels, with_small_operations, with_half_matrices, with_relu_masks,
    ):  # fmt: skip
        calls = fuse(calls, memory, backend)
    return calls
