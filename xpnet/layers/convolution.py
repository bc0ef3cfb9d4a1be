"""Convolutions of images (N, H, W, channels), as products of matrices.

A window slides over the image. The pixels under it, written side by side, are a row of the matrix of patches; times the
weight, a matrix of kh·kw·in rows and a column a filter, that is the output. Patches hold each pixel up to kh·kw times:
they are made for a few images at a time, and made again in backward rather than kept.

Dumoulin and Visin 2016, "A guide to convolution arithmetic for deep learning".
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from xpnet.backends import Array
from xpnet.backends.sliding import Windows
from xpnet.errors import ShapeError
from xpnet.layers.base import Layer, Shape
from xpnet.layers.grid import (
    Padding,
    Size,
    check_output_padding,
    checked_count,
    checked_padding,
    checked_size,
    image_and_channels,
    pair,
    slide,
    slide_back,
)


class Convolution(Layer):
    """What convolutions share: their arguments and parameters, and the walk over batch and groups."""

    works_in_shards = True
    windows: Windows
    patch_channels: int

    def __init__(
        self,
        filters: int,
        kernel_size: Size,
        strides: Size = 1,
        padding: Padding = "valid",
        dilation: Size = 1,
        groups: int = 1,
        use_bias: bool = True,
        weight_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        l1: float = 0.0,
        l2: float = 0.0,
    ) -> None:
        self.filters, self.groups = checked_count(self, "filters", filters), checked_count(self, "groups", groups)
        self.kernel_size = checked_size(self, "kernel_size", kernel_size)
        self.strides, self.dilation = checked_size(self, "strides", strides), checked_size(self, "dilation", dilation)
        self.padding, self.use_bias = checked_padding(self, padding), use_bias
        self.weight_initializer, self.bias_initializer = weight_initializer, bias_initializer
        self.l1, self.l2 = l1, l2

    def add_weight_and_bias(self, channels: int) -> None:
        if channels % self.groups:
            raise self.refuse(f"a number of channels that groups={self.groups} divides", f"one with {channels}")
        if self.filters % self.groups:
            place = f"layer {self.path} ({type(self).__name__})" if self.path else type(self).__name__
            raise ShapeError(f"{place}: groups={self.groups} must divide the number of filters, {self.filters}.")
        shape = (*pair(self.kernel_size), channels // self.groups, self.filters)
        self.weight = self.add_parameter("weight", shape, self.weight_initializer, l1=self.l1, l2=self.l2)
        if self.use_bias:
            self.bias = self.add_parameter("bias", (self.filters,), self.bias_initializer, decay=False)

    def in_chunks(self, images: int, work: Callable[[slice, int], None]) -> None:
        """work(rows, shard) for some images after the others: for as many at a time as have room for their patches."""
        cells = math.prod(self.windows.grid) * math.prod(self.windows.kernel)
        self.backend.in_chunks(images, cells * self.patch_channels * self.context.dtype.itemsize, work)

    def room_for_patches(self, rows: slice, shard: int) -> Array:
        """(images, rows, columns, kh, kw, channels) of one group, as it suits the device."""
        windows = self.windows
        shape = (rows.stop - rows.start, *windows.grid, *windows.kernel, self.patch_channels)
        return self.backend.lay_out_patches(self.context.scratch("patches", shape, shard))

    def blocks(self, channels: int) -> Iterator[tuple[slice, slice]]:
        """The channels of the input and the filters that belong together, group by group."""
        ins, outs = channels // self.groups, self.filters // self.groups
        return ((slice(g * ins, (g + 1) * ins), slice(g * outs, (g + 1) * outs)) for g in range(self.groups))

    def sums_by_shard(self, name: str, *shape: int) -> Array:
        """Zeros, for sums over the batch of which each shard makes its own."""
        sums = self.work.buffer(name, (self.backend.shards, *shape))
        sums[...] = 0.0
        return sums

    def add_product(self, a: Array, b: Array, sums: Array, shard: int) -> None:
        self.backend.add_matmul(a, b, out=sums, scratch=self.context.scratch("product", sums.shape, shard))

    def add_bias_grad(self, grad_rows: Array, sums: Array, shard: int) -> None:
        sums[shard] += self.backend.sum_rows(grad_rows, out=self.context.scratch("bias", (self.filters,), shard))


class Conv2D(Convolution):
    """A filter's answer to every window of an image: (N, H, W, in) → (N, rows, columns, filters).

    filters: how many.  kernel_size, strides, dilation: a number, or (vertical, horizontal).
    padding: "valid" for none; "same" for ceil(size / stride) outputs, with the odd zero at the end; or how many zeros
    on either side.  groups: block g of the filters sees only block g of the channels.
    weight is (kh, kw, in / groups, filters), bias (filters,). `l1`, `l2` penalise the weight, as Dense's do.
    """

    def build(self, input_shape: Shape) -> Shape:
        image, channels = image_and_channels(self, input_shape)
        self.windows = slide(self, image, self.kernel_size, self.strides, self.padding, self.dilation)
        self.add_weight_and_bias(channels)
        self.patch_channels = channels // self.groups
        return (*self.windows.grid, self.filters)

    def forward(self, x: Array) -> Array:
        """y[n, i, j, f] = bias[f] + Σ_abc x[n, i·s + a·d - p, j·s + b·d - p, c] · weight[a, b, c, f]

        with s strides, d dilation, p padding; or in rows, one a window: y = patches @ weight + bias.
        """
        work, backend = self.work, self.backend
        work.x = x
        weight = self.weight.value.reshape(-1, self.filters)
        y = work.buffer("y", (len(x), *self.output_shape))

        def some_images(rows: slice, shard: int) -> None:
            y_rows = y[rows].reshape(-1, self.filters)
            for channels, filters in self.blocks(x.shape[-1]):
                patches = backend.patches(x[rows, ..., channels], self.windows, self.room_for_patches(rows, shard))
                backend.matmul(patches.reshape(-1, len(weight)), weight[:, filters], out=y_rows[:, filters])
            if self.use_bias:
                backend.add_to_rows(y_rows, self.bias.value)

        self.in_chunks(len(x), some_images)
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """As for Dense, with a row for every window:

        ∂L/∂weight = patchesᵀ @ ∂L/∂y,   ∂L/∂bias = Σ_rows ∂L/∂y,   ∂L/∂patches = ∂L/∂y @ weightᵀ;

        ∂L/∂x of a pixel is the sum over all places in the patches that it was copied to.
        """
        work, backend = self.work, self.backend
        x, weight = work.x, self.weight.value.reshape(-1, self.filters)
        weight_grads = self.sums_by_shard("weight_grads", *weight.shape)
        bias_grads = self.sums_by_shard("bias_grads", self.filters)
        grad_x = work.buffer("grad_x", x.shape) if self.wants_input_grad else None

        def some_images(rows: slice, shard: int) -> None:
            grad_rows = grad_y[rows].reshape(-1, self.filters)
            for channels, filters in self.blocks(x.shape[-1]):
                patches = backend.patches(x[rows, ..., channels], self.windows, self.room_for_patches(rows, shard))
                matrix, grad = patches.reshape(-1, len(weight)), grad_rows[:, filters]
                self.add_product(matrix.T, grad, weight_grads[shard, :, filters], shard)
                if grad_x is not None:  # the patches have served: their gradient takes their room
                    backend.matmul(grad, weight[:, filters].T, out=matrix)
                    backend.fold(patches, self.windows, out=grad_x[rows, ..., channels])
            if self.use_bias:
                self.add_bias_grad(grad_rows, bias_grads, shard)

        self.in_chunks(len(x), some_images)
        self.xp.sum(weight_grads, axis=0, out=self.weight.grad.reshape(weight.shape))
        if self.use_bias:
            self.xp.sum(bias_grads, axis=0, out=self.bias.grad)
        return grad_x


class DepthwiseConv2D(Convolution):
    """A convolution of every channel by itself: (N, H, W, in) → (N, rows, columns, in · depth_multiplier).

    Conv2D with groups = in: weight is (kh, kw, 1, in · depth_multiplier), and the filters of one channel stand side by
    side. For the rest see Conv2D. Howard et al. 2017, "MobileNets".
    """

    def __init__(
        self,
        kernel_size: Size,
        strides: Size = 1,
        padding: Padding = "valid",
        dilation: Size = 1,
        depth_multiplier: int = 1,
        use_bias: bool = True,
        weight_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        l1: float = 0.0,
        l2: float = 0.0,
    ) -> None:
        self.depth_multiplier = checked_count(self, "depth_multiplier", depth_multiplier)
        super().__init__(
            self.depth_multiplier, kernel_size, strides, padding, dilation, 1,
            use_bias, weight_initializer, bias_initializer, l1, l2
        )  # fmt: skip

    def build(self, input_shape: Shape) -> Shape:
        image, channels = image_and_channels(self, input_shape)
        self.windows = slide(self, image, self.kernel_size, self.strides, self.padding, self.dilation)
        self.groups, self.filters = channels, channels * self.depth_multiplier
        self.add_weight_and_bias(channels)
        return (*self.windows.grid, self.filters)

    def forward(self, x: Array) -> Array:
        """y[n, i, j, (c, m)] = bias[(c, m)] + Σ_ab x[n, i·s + a·d - p, j·s + b·d - p, c] · weight[a, b, 0, (c, m)]."""
        work = self.work
        work.x = x
        y = work.buffer("y", (len(x), *self.output_shape))
        self.backend.depthwise(x, self._by_channel(self.weight.value[:, :, 0]), self.windows, out=self._by_channel(y))
        if self.use_bias:
            self.backend.add_to_rows(y.reshape(-1, self.filters), self.bias.value)
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """∂L/∂weight[a, b] = Σ_nij x ∂L/∂y of the pixels under cell (a, b); ∂L/∂x gathers ∂L/∂y · weight from all
        windows that a pixel lies under.
        """
        work, backend = self.work, self.backend
        grad = self._by_channel(grad_y)
        weight_grad = self._by_channel(self.weight.grad[:, :, 0])
        backend.depthwise_weight_grad(work.x, grad, self.windows, out=weight_grad)
        if self.use_bias:
            backend.sum_rows(grad_y.reshape(-1, self.filters), out=self.bias.grad)
        if not self.wants_input_grad:
            return None
        weight, grad_x = self._by_channel(self.weight.value[:, :, 0]), work.buffer("grad_x", work.x.shape)
        return backend.depthwise_input_grad(grad, weight, self.windows, out=grad_x)

    def _by_channel(self, a: Array) -> Array:
        """(..., in · depth_multiplier) as (..., in, depth_multiplier)."""
        return a.reshape(*a.shape[:-1], -1, self.depth_multiplier)


class Conv2DTranspose(Convolution):
    """The way back of a Conv2D as a layer of its own: (N, rows, columns, in) → (N, H, W, filters).

    Each pixel is spread over a window of the output, `strides` apart from its neighbour's. The output has
    (size - 1) · stride + dilation · (kernel - 1) + 1 + output_padding pixels, less `padding` on either side; with
    padding="same", size · stride.
    weight is (kh, kw, in / groups, filters), bias (filters,). Zeiler et al. 2010, "Deconvolutional networks".
    """

    def __init__(
        self,
        filters: int,
        kernel_size: Size,
        strides: Size = 1,
        padding: Padding = "valid",
        dilation: Size = 1,
        groups: int = 1,
        output_padding: Size = 0,
        use_bias: bool = True,
        weight_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        l1: float = 0.0,
        l2: float = 0.0,
    ) -> None:
        super().__init__(
            filters, kernel_size, strides, padding, dilation, groups, use_bias, weight_initializer, bias_initializer,
            l1, l2
        )  # fmt: skip
        self.output_padding = checked_size(self, "output_padding", output_padding, least=0)
        check_output_padding(self, self.output_padding, self.strides, self.dilation, self.padding)

    def build(self, input_shape: Shape) -> Shape:
        grid, channels = image_and_channels(self, input_shape)
        self.windows = slide_back(
            self, grid, self.kernel_size, self.strides, self.padding, self.dilation, self.output_padding
        )
        self.add_weight_and_bias(channels)
        self.patch_channels = self.filters // self.groups
        return (*self.windows.image, self.filters)

    def forward(self, x: Array) -> Array:
        """patches = x @ weight, a row for every pixel of x; y of a pixel is bias + the sum over all places in the
        patches that belong to it.
        """
        work, backend = self.work, self.backend
        work.x = x
        y = work.buffer("y", (len(x), *self.output_shape))
        weights = self._matrices(self.weight.value)

        def some_images(rows: slice, shard: int) -> None:
            x_rows = x[rows].reshape(-1, x.shape[-1])
            for (channels, filters), weight in zip(self.blocks(x.shape[-1]), weights, strict=True):
                patches = self.room_for_patches(rows, shard)
                backend.matmul(x_rows[:, channels], weight, out=patches.reshape(len(x_rows), -1))
                backend.fold(patches, self.windows, out=y[rows, ..., filters])
            if self.use_bias:
                backend.add_to_rows(y[rows].reshape(-1, self.filters), self.bias.value)

        self.in_chunks(len(x), some_images)
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """With the patches of ∂L/∂y, which are ∂L/∂patches:

        ∂L/∂weight = xᵀ @ ∂L/∂patches,   ∂L/∂bias = Σ_pixels ∂L/∂y,   ∂L/∂x = ∂L/∂patches @ weightᵀ.
        """
        work, backend = self.work, self.backend
        x, weights = work.x, self._matrices(self.weight.value)
        weight_grads = self.sums_by_shard("weight_grads", self.groups, *weights[0].shape)
        bias_grads = self.sums_by_shard("bias_grads", self.filters)
        grad_x = work.buffer("grad_x", x.shape) if self.wants_input_grad else None

        def some_images(rows: slice, shard: int) -> None:
            x_rows = x[rows].reshape(-1, x.shape[-1])
            for g, (channels, filters) in enumerate(self.blocks(x.shape[-1])):
                patches = backend.patches(grad_y[rows, ..., filters], self.windows, self.room_for_patches(rows, shard))
                matrix = patches.reshape(len(x_rows), -1)
                self.add_product(x_rows[:, channels].T, matrix, weight_grads[shard, g], shard)
                if grad_x is not None:
                    grad_rows = grad_x[rows].reshape(-1, x.shape[-1])
                    backend.matmul(matrix, weights[g].T, out=grad_rows[:, channels])
            if self.use_bias:
                self.add_bias_grad(grad_y[rows].reshape(-1, self.filters), bias_grads, shard)

        self.in_chunks(len(x), some_images)
        for (_, filters), grads in zip(self.blocks(x.shape[-1]), self.xp.sum(weight_grads, axis=0), strict=True):
            kh, kw, ins, _ = self.weight.shape
            self.weight.grad[..., filters] = grads.reshape(ins, kh, kw, -1).transpose(1, 2, 0, 3)
        if self.use_bias:
            self.xp.sum(bias_grads, axis=0, out=self.bias.grad)
        return grad_x

    def _matrices(self, weight: Array) -> list[Array]:
        """(in / groups, kh·kw·filters / groups) of each group."""
        turned = weight.transpose(2, 0, 1, 3)
        return [turned[..., filters].reshape(len(turned), -1) for _, filters in self.blocks(0)]
