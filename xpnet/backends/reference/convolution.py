"""Convolutions of images (N, H, W, C) and their gradients, by im2col and matrix products.

The pixels under a window form a row of the patch matrix (windows, kh·kw·channels). The patches hold each pixel up to
kh·kw times, so they are made for a few images at a time (`Device.in_chunks`), and made again for the gradients.
Chellapilla, Puri and Simard 2006, "High performance convolutional neural networks for document processing".

In groups, block g of the filters sees only block g of the input channels. `scratch(name, shape, worker)` returns an
uninitialized array, which may be overwritten by the next operator.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

from xpnet.backends.arrays import Array
from xpnet.backends.reference.elementwise import ElementwiseOperators
from xpnet.backends.reference.matmul import MatmulOperators
from xpnet.backends.reference.reductions import ReductionOperators
from xpnet.backends.reference.windows import WindowOperators, Windows

Scratch: TypeAlias = Callable[[str, tuple[int, ...], int], Array]
Gradients: TypeAlias = tuple[Array, Array | None, Array | None]  # of weight, bias and x; None is not computed


class ConvolutionOperators(ElementwiseOperators, MatmulOperators, ReductionOperators, WindowOperators):
    def conv2d(
        self, x: Array, weight: Array, bias: Array | None, windows: Windows, groups: int, out: Array, scratch: Scratch
    ) -> Array:
        """x (N, H, W, in), weight (kh, kw, in / groups, filters), bias (filters,) → out (N, rows, columns, filters).

        out[n, i, j] = patch of window (i, j) of image n @ weight + bias.
        """
        matrix = weight.reshape(-1, weight.shape[3])
        blocks = _blocks(x.shape[3], weight.shape[3], groups)

        def convolve(rows: slice, worker: int) -> None:
            out_rows = out[rows].reshape(-1, out.shape[3])
            for inputs, filters in blocks:
                patches = self._im2col(x[rows, ..., inputs], windows, scratch, worker)
                self.matmul(patches.reshape(-1, len(matrix)), matrix[:, filters], out=out_rows[:, filters])
            if bias is not None:
                self.add_to_rows(out_rows, bias)

        self.in_chunks(len(x), _patch_bytes(windows, weight.shape[2], weight), convolve)
        return out

    def conv2d_grad(
        self, x: Array, grad: Array, weight: Array, windows: Windows, groups: int, grads: Gradients, scratch: Scratch
    ) -> Array | None:
        """The adjoints of `conv2d` in weight, bias and x, given the gradient `grad` of its output; returns grad_x.

        grad_weight = patchesᵀ @ grad,   grad_bias = Σ_windows grad,   grad_x = col2im(grad @ weightᵀ).
        """
        grad_weight, grad_bias, grad_x = grads
        matrix = weight.reshape(-1, weight.shape[3])
        blocks = _blocks(x.shape[3], weight.shape[3], groups)
        weight_sums = self._sums("weight_sums", matrix.shape, scratch)
        bias_sums = self._sums("bias_sums", grad.shape[3:], scratch)

        def add_gradients(rows: slice, worker: int) -> None:
            grad_rows = grad[rows].reshape(-1, grad.shape[3])
            for inputs, filters in blocks:
                patches = self._im2col(x[rows, ..., inputs], windows, scratch, worker)
                patch_rows, grad_block = patches.reshape(-1, len(matrix)), grad_rows[:, filters]
                sums = weight_sums[worker, :, filters]
                self.add_matmul(patch_rows.T, grad_block, sums, scratch("matmul", sums.shape, worker))
                if grad_x is not None:  # the patches are not needed any more: their gradient overwrites them
                    self.matmul(grad_block, matrix[:, filters].T, out=patch_rows)
                    self.col2im(patches, windows, out=grad_x[rows, ..., inputs])
            if grad_bias is not None:
                bias_sums[worker] += self.sum_rows(grad_rows, out=scratch("bias_sum", grad_bias.shape, worker))

        self.in_chunks(len(x), _patch_bytes(windows, weight.shape[2], weight), add_gradients)
        self.xp.sum(weight_sums, axis=0, out=grad_weight.reshape(matrix.shape))
        if grad_bias is not None:
            self.xp.sum(bias_sums, axis=0, out=grad_bias)
        return grad_x

    def conv2d_transpose(
        self, x: Array, weight: Array, bias: Array | None, windows: Windows, groups: int, out: Array, scratch: Scratch
    ) -> Array:
        """x (N, rows, columns, in), weight (kh, kw, in / groups, filters), bias (filters,) → out (N, H, W, filters).

        out = col2im(x @ weight) + bias: the adjoint of a `conv2d` with the same windows on out.
        """
        blocks = _blocks(x.shape[3], weight.shape[3], groups)
        matrices = _transposed_matrices(weight, blocks)

        def convolve(rows: slice, worker: int) -> None:
            x_rows = x[rows].reshape(-1, x.shape[3])
            for (inputs, filters), matrix in zip(blocks, matrices, strict=True):
                patches = self._patches(len(x[rows]), windows, weight.shape[3] // groups, scratch, worker)
                self.matmul(x_rows[:, inputs], matrix, out=patches.reshape(len(x_rows), -1))
                self.col2im(patches, windows, out=out[rows, ..., filters])
            if bias is not None:
                self.add_to_rows(out[rows].reshape(-1, out.shape[3]), bias)

        self.in_chunks(len(x), _patch_bytes(windows, weight.shape[3] // groups, weight), convolve)
        return out

    def conv2d_transpose_grad(
        self, x: Array, grad: Array, weight: Array, windows: Windows, groups: int, grads: Gradients, scratch: Scratch
    ) -> Array | None:
        """The adjoints of `conv2d_transpose` in weight, bias and x; returns grad_x. With the patches of `grad`:

        grad_weight = xᵀ @ patches,   grad_bias = Σ_pixels grad,   grad_x = patches @ weightᵀ.
        """
        grad_weight, grad_bias, grad_x = grads
        blocks = _blocks(x.shape[3], weight.shape[3], groups)
        matrices = _transposed_matrices(weight, blocks)
        weight_sums = self._sums("weight_sums", (groups, *matrices[0].shape), scratch)
        bias_sums = self._sums("bias_sums", grad.shape[3:], scratch)

        def add_gradients(rows: slice, worker: int) -> None:
            x_rows = x[rows].reshape(-1, x.shape[3])
            for g, (inputs, filters) in enumerate(blocks):
                patch_rows = self._im2col(grad[rows, ..., filters], windows, scratch, worker).reshape(len(x_rows), -1)
                sums = weight_sums[worker, g]
                self.add_matmul(x_rows[:, inputs].T, patch_rows, sums, scratch("matmul", sums.shape, worker))
                if grad_x is not None:
                    self.matmul(patch_rows, matrices[g].T, out=grad_x[rows].reshape(x_rows.shape)[:, inputs])
            if grad_bias is not None:
                grad_rows = grad[rows].reshape(-1, grad.shape[3])
                bias_sums[worker] += self.sum_rows(grad_rows, out=scratch("bias_sum", grad_bias.shape, worker))

        self.in_chunks(len(x), _patch_bytes(windows, weight.shape[3] // groups, weight), add_gradients)
        kh, kw, ins, _ = weight.shape
        for (_, filters), sums in zip(blocks, self.xp.sum(weight_sums, axis=0), strict=True):
            grad_weight[..., filters] = sums.reshape(ins, kh, kw, -1).transpose(1, 2, 0, 3)
        if grad_bias is not None:
            self.xp.sum(bias_sums, axis=0, out=grad_bias)
        return grad_x

    def _im2col(self, images: Array, windows: Windows, scratch: Scratch, worker: int) -> Array:
        """The patches of some images in one group: (images, rows, columns, kh, kw, channels)."""
        return self.im2col(images, windows, self._patches(len(images), windows, images.shape[3], scratch, worker))

    def _patches(self, images: int, windows: Windows, channels: int, scratch: Scratch, worker: int) -> Array:
        """Memory for these patches."""
        return self.im2col_layout(scratch("patches", (images, *windows.grid, *windows.kernel, channels), worker))

    def _sums(self, name: str, shape: tuple[int, ...], scratch: Scratch) -> Array:
        """(workers, *shape) of zeros: each worker sums over its images, and the sums are added at the end."""
        sums = scratch(name, (self.workers, *shape), 0)
        sums[...] = 0.0
        return sums


def _blocks(channels: int, filters: int, groups: int) -> list[tuple[slice, slice]]:
    """The input channels and the filters of each group."""
    ins, outs = channels // groups, filters // groups
    return [(slice(g * ins, (g + 1) * ins), slice(g * outs, (g + 1) * outs)) for g in range(groups)]


def _patch_bytes(windows: Windows, channels: int, weight: Array) -> int:
    """The size of one image's patches in one group."""
    return math.prod(windows.grid) * math.prod(windows.kernel) * channels * int(weight.dtype.itemsize)


def _transposed_matrices(weight: Array, blocks: list[tuple[slice, slice]]) -> list[Array]:
    """The weight of each group as a matrix (in / groups, kh·kw·filters / groups)."""
    channels_first = weight.transpose(2, 0, 1, 3)
    return [channels_first[..., filters].reshape(len(channels_first), -1) for _, filters in blocks]
