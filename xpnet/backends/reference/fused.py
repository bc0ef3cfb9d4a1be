"""Fused operators: sequences of other operators that a device may compute in one pass over memory.

Layers and losses do not call them: passes over a captured step replace the sequences by them. They are equal to the
sequences, bit for bit on the CPU and up to rounding on a GPU.
"""

from collections.abc import Sequence
from typing import Any

from xpnet.backends.arrays import Array
from xpnet.backends.reference.elementwise import ElementwiseOperators
from xpnet.backends.reference.matmul import MatmulOperators
from xpnet.backends.reference.reductions import ReductionOperators
from xpnet.backends.reference.rows import RowOperators
from xpnet.backends.reference.windows import WindowOperators, Windows

#: The operations of `elementwise`, in the order of their numbers in kernels.cu, and the most that one call computes.
OPERATIONS = (
    "add", "subtract", "multiply", "divide", "sqrt", "square", "negative", "absolute", "maximum", "minimum",
)  # fmt: skip
MOST_OPERATIONS = 16


class FusedOperators(RowOperators, ElementwiseOperators, MatmulOperators, ReductionOperators, WindowOperators):
    def elementwise(self, operations: Sequence[Sequence[Any]], outs: Sequence[Array]) -> None:
        """Compute xp.name(a, out=out) or xp.name(a, b, out=out) for each operation (name, a) or (name, a, b), in order.

        name: one of `OPERATIONS`.  a, b: arrays in the shape of out, arrays of one element, or numbers. What one
        operation writes, others may read and write only in the same shape.

        Replaces these calls. Their order relative to other calls may have changed.
        """
        for (name, *operands), out in zip(operations, outs, strict=True):
            getattr(self.xp, name)(*operands, out=out)

    def add_arrays(self, a: Array, b: Array, out: Array) -> Array:
        """out = a + b, for arrays of one shape. Replaces xp.add(a, b, out). out may be a or b."""
        return self.xp.add(a, b, out=out)

    def multiply_arrays(self, a: Array, b: Array, out: Array) -> Array:
        """out = a · b, for arrays of one shape. Replaces xp.multiply(a, b, out). out may be a or b."""
        return self.xp.multiply(a, b, out=out)

    def add_to_rows_relu(self, a: Array, row: Array, out: Array) -> Array:
        """a, out (rows, columns), row (columns,): out[i, j] = max(a[i, j] + row[j], 0). Returns out.

        out may be a; otherwise the values of a are undefined afterwards.

        Replaces add_to_rows(a, row); relu(a, out).
        """
        return self.relu(self.add_to_rows(a, row), out)

    def relu_grad_sum_rows(self, grad: Array, y: Array, out: Array, sums: Array) -> Array:
        """grad, y, out (rows, columns), sums (columns,): out = grad · [y ≠ 0], sums[j] = Σ_i out[i, j]. Returns out.

        out may be y, but not grad.

        Replaces relu_grad(grad, y, out); sum_rows(out, sums).
        """
        self.relu_grad(grad, y, out)
        self.sum_rows(out, sums)
        return out

    def scale_shift_relu(self, x: Array, center: Array, scale: Array, shift: Array, out: Array) -> Array:
        """out[i, j] = max((x[i, j] - center[j]) · scale[j] + shift[j], 0). Returns out, which may be x.

        Replaces scale_shift(x, center, scale, shift, y); relu(y, out).
        """
        return self.relu(self.scale_shift(x, center, scale, shift, out), out)

    def sum_rows_and_products(self, a: Array, b: Array, center: Array, sums: Array, products: Array) -> None:
        """sums[j] = Σ_i a[i, j], products[j] = Σ_i a[i, j] · (b[i, j] - center[j]).

        Replaces sum_rows(a, sums); sum_products(a, b, center, products).
        """
        self.sum_rows(a, sums)
        self.sum_products(a, b, center, products)

    def cross_entropy_sums(
        self,
        logits: Array,
        labels: Array,
        smoothing: float,
        scale: float,
        losses: Array,
        grad: Array,
        loss_sum: Array,
        correct: Array | None,
    ) -> tuple[Array, Array]:
        """Cross-entropy with its sum and the correct predictions: (losses, grad), with grad multiplied by `scale`.

        logits (N, K), labels (N,): integers.  smoothing: as in `cross_entropy`.  scale: a number.  losses (N,),
        grad (N, K): as in `cross_entropy`; grad must not be logits.  loss_sum: a float64 array without axes, set to
        Σ losses.  correct (2,): int64, to which `count_correct` is added; None counts nothing.

        Replaces cross_entropy(logits, labels, smoothing, losses, grad); grad *= scale; sum_to(losses, loss_sum);
        correct += count_correct(logits, labels).
        """
        self.cross_entropy(logits, labels, smoothing, losses, grad)
        grad *= scale
        self.sum_to(losses, loss_sum)
        if correct is not None:
            correct += self.count_correct(logits, labels)
        return losses, grad

    def dense_cross_entropy(
        self,
        h: Array,
        weight: Array,
        row: Array | None,
        labels: Array,
        smoothing: float,
        scale: float,
        losses: Array,
        grad: Array,
        correct: Array | None,
        grad_h: Array | None,
        masked: bool,
    ) -> tuple[Array, Array]:
        """Cross-entropy of the logits h @ weight + row, with the gradient with respect to h: (losses, grad).

        h (N, depth), weight (depth, K), row (K,) or None.  labels, losses, grad, scale, correct: as in
        `cross_entropy_sums`.  grad_h (N, depth) = grad @ weightᵀ, or None; `masked` makes it 0 where h is 0.

        Replaces matmul(h, weight, logits); add_to_rows(logits, row); cross_entropy(logits, labels, smoothing, losses,
        grad); grad *= scale; correct += count_correct(logits, labels); matmul(grad, weightᵀ, grad_h);
        relu_grad(grad_h, h, grad_h).
        """
        logits = self.matmul(h, weight, self.xp.empty_like(grad))
        if row is not None:
            self.add_to_rows(logits, row)
        self.cross_entropy(logits, labels, smoothing, losses, grad)
        grad *= scale
        if correct is not None:
            correct += self.count_correct(logits, labels)
        if grad_h is not None:
            self.matmul(grad, weight.T, grad_h)
            if masked:
                grad_h *= h != 0
        return losses, grad

    def add_to_rows_max_pool(
        self, x: Array, row: Array | None, windows: Windows, relu: bool, out: Array, choice: Array
    ) -> Array:
        """out, choice = max_pool of x (N, H, W, C) + row (C,); with `relu`, out is then made positive. Returns out.

        row: None adds nothing. If it is given, the values of x are undefined afterwards.

        Replaces add_to_rows(x, row); max_pool(x, windows, pooled, choice); relu(pooled, out).
        """
        if row is not None:
            self.add_to_rows(x.reshape(-1, x.shape[3]), row)
        self.max_pool(x, windows, out, choice)
        return self.relu(out, out) if relu else out

    def relu_grad_max_pool_grad(self, grad: Array, y: Array, choice: Array, windows: Windows, out: Array) -> Array:
        """out = max_pool_grad(grad · [y ≠ 0], choice, windows). Returns out.

        Replaces relu_grad(grad, y, masked); max_pool_grad(masked, choice, windows, out).
        """
        masked = self.relu_grad(grad, y, self.xp.empty_like(grad))
        return self.max_pool_grad(masked, choice, windows, out)

    def matmul_bias(self, a: Array, b: Array, row: Array, relu: bool, out: Array) -> Array:
        """out = a @ b + row, or max(a @ b + row, 0), for matrices as in `matmul`.

        Replaces matmul(a, b, out); add_to_rows(out, row); and relu(out, out) if `relu`.
        """
        self.add_to_rows(self.matmul(a, b, out), row)
        return self.relu(out, out) if relu else out

    def matmul_relu_grad(self, a: Array, b: Array, y: Array, out: Array) -> Array:
        """out = (a @ b) · [y ≠ 0], for matrices as in `matmul`. out must not overlap y.

        Replaces matmul(a, b, grad); relu_grad(grad, y, out).
        """
        self.matmul(a, b, out)
        return self.xp.multiply(out, self.xp.not_equal(y, 0.0), out=out)

    def matmul_sum_rows(self, a: Array, b: Array, out: Array, sums: Array) -> Array:
        """out = a @ b, and sums[j] = Σ_i b[i, j], for matrices as in `matmul`. Returns out.

        Replaces matmul(a, b, out); sum_rows(b, sums).
        """
        self.matmul(a, b, out)
        self.sum_rows(b, sums)
        return out

    def convolve(self, x: Array, weight: Array, bias: Array | None, windows: Windows, relu: bool, out: Array) -> Array:
        """A convolution of images x (N, H, W, in) with a weight (kh·kw·in, filters): out (N, rows, columns, filters).

        out = patches @ weight + bias, or the positive part of that. bias (filters,) may be None.

        Replaces im2col(x, windows, patches); matmul(patches, weight, out); add_to_rows(out, bias); relu(out, out).
        """
        rows, patches = out.reshape(-1, out.shape[-1]), self._empty_patches(x, windows)
        self.matmul(self.im2col(x, windows, patches).reshape(-1, len(weight)), weight, rows)
        if bias is not None:
            self.add_to_rows(rows, bias)
        return self.relu(out, out) if relu else out

    def convolve_weight_grad(
        self, x: Array, grad: Array, windows: Windows, out: Array, sums: Array | None, add: bool = False
    ) -> Array:
        """The gradient of the weight of `convolve`, out (kh·kw·in, filters), and of the bias, sums (filters,).

        out = patchesᵀ @ grad, for grad (N, rows, columns, filters), or with `add` out += patchesᵀ @ grad.
        sums = Σ_windows grad, unless it is None.

        Replaces im2col(x, windows, patches); matmul(patchesᵀ, grad, out) or add_matmul; sum_rows(grad, sums).
        """
        rows, patches = grad.reshape(-1, grad.shape[-1]), self._empty_patches(x, windows)
        columns = self.im2col(x, windows, patches).reshape(-1, len(out)).T
        if add:
            self.add_matmul(columns, rows, out, self.empty(out.shape, out.dtype))
        else:
            self.matmul(columns, rows, out)
        if sums is not None:
            self.sum_rows(rows, sums)
        return out

    def convolve_input_grad(
        self, grad: Array, weight: Array, windows: Windows, out: Array, y: Array | None = None
    ) -> Array:
        """The gradient of the images of `convolve`: out (N, H, W, in) = col2im(grad @ weightᵀ), or that · [y ≠ 0].

        out may be y. Replaces matmul(grad, weightᵀ, patches); col2im(patches, windows, out); relu_grad(out, y, out).
        """
        rows, patches = grad.reshape(-1, grad.shape[-1]), self._empty_patches(out, windows)
        self.matmul(rows, weight.T, patches.reshape(-1, len(weight)))
        if y is None:
            return self.col2im(patches, windows, out)
        return self.relu_grad(self.col2im(patches, windows, self.empty(out.shape, out.dtype)), y, out)

    def _empty_patches(self, images: Array, windows: Windows) -> Array:
        return self.empty((len(images), *windows.grid, *windows.kernel, images.shape[3]), images.dtype)
