"""Fused operators: sequences of other operators that a device may compute in one pass over memory.

Layers and losses do not call them: passes over a captured step replace the sequences by them. They are equal to the
sequences, bit for bit on the CPU and up to rounding on a GPU.
"""

from xpnet.backends.arrays import Array
from xpnet.backends.reference.elementwise import ElementwiseOperators
from xpnet.backends.reference.matmul import MatmulOperators
from xpnet.backends.reference.reductions import ReductionOperators
from xpnet.backends.reference.rows import RowOperators
from xpnet.backends.reference.windows import WindowOperators, Windows


class FusedOperators(ElementwiseOperators, MatmulOperators, ReductionOperators, WindowOperators, RowOperators):
    def add_to_rows_relu(self, a: Array, row: Array, out: Array) -> Array:
        """out[i, j] = max(a[i, j] + row[j], 0). out may be a; if it is not, the values of a are undefined afterwards.

        Replaces add_to_rows(a, row); relu(a, out).
        """
        return self.relu(self.add_to_rows(a, row), out)

    def relu_grad_sum_rows(self, grad: Array, y: Array, out: Array, sums: Array) -> Array:
        """out (rows, columns) = grad · [y ≠ 0], and sums[j] = Σ_i out[i, j]. out may be y, but not grad. Returns out.

        Replaces relu_grad(grad, y, out); sum_rows(out, sums).
        """
        self.relu_grad(grad, y, out)
        self.sum_rows(out, sums)
        return out

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

        losses (N,), grad (N, K): as in `cross_entropy`; grad must not be logits.  loss_sum: a float64 array without
        axes, set to Σ losses.  correct (2,): int64, to which `count_correct` is added; None counts nothing.

        Replaces cross_entropy(logits, labels, smoothing, losses, grad); grad *= scale; sum_to(losses, loss_sum);
        correct += count_correct(logits, labels).
        """
        self.cross_entropy(logits, labels, smoothing, losses, grad)
        grad *= scale
        self.sum_to(losses, loss_sum)
        if correct is not None:
            correct += self.count_correct(logits, labels)
        return losses, grad

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
