"""Convolutions of images (N, H, W, channels) and sequences (N, T, channels).

Dumoulin and Visin 2016, "A guide to convolution arithmetic for deep learning". The operators of the backend and their
formulas are in backends/reference/convolution.py and windows.py.
"""

from typing import Any

from xpnet.backends import Array
from xpnet.backends.reference.windows import Windows
from xpnet.config import flag, integer, one_or_pair, penalties
from xpnet.errors import ArgumentError, ShapeError, shown
from xpnet.layers.base import Layer, checked_initializer
from xpnet.layers.context import Shape
from xpnet.layers.windows import (
    Padding,
    Size,
    as_image,
    image_and_channels,
    padding_argument,
    pair,
    sequence_padding,
    steps_and_channels,
    transposed_windows,
    windows_on_image,
    windows_on_sequence,
)


class _Convolution(Layer):
    """The arguments and parameters that all convolutions share."""

    splits_batch = True

    def __init__(
        self,
        filters: int,
        groups: int,
        use_bias: bool,
        weight_initializer: Any,
        bias_initializer: Any,
        l1: float,
        l2: float,
        name: str | None,
    ) -> None:
        super().__init__(name=name)
        self.filters, self.groups = integer(self, "filters", filters), integer(self, "groups", groups)
        self.use_bias = flag(self, "use_bias", use_bias)
        self.weight_initializer = checked_initializer(self, "weight_initializer", weight_initializer)
        self.bias_initializer = checked_initializer(self, "bias_initializer", bias_initializer)
        self.l1, self.l2 = penalties(self, l1, l2)

    def add_weight_and_bias(self, kernel: tuple[int, ...], channels: int) -> None:
        if channels % self.groups:
            raise self.refuse(f"a number of channels that groups={self.groups} divides", f"one with {channels}")
        if self.filters % self.groups:
            raise ShapeError(f"{self._label}: groups={self.groups} must divide the number of filters, {self.filters}.")
        shape = (*kernel, channels // self.groups, self.filters)
        self.weight = self.add_parameter("weight", shape, self.weight_initializer, l1=self.l1, l2=self.l2)
        if self.use_bias:
            self.bias = self.add_parameter("bias", (self.filters,), self.bias_initializer, decay=False)


class Conv1D(_Convolution):
    """Applies each filter to every window of a sequence: (N, T, in) → (N, steps, filters).

    filters: the number of filters.  kernel_size, strides, dilation: integers.
    padding: "valid" for none; "same" for ceil(T / stride) outputs, with the extra zero of an odd number at the end;
    "causal" for zeros before the first step only, so that no output depends on later steps; or the number of zeros on
    each side.  groups: filters and channels are divided into this many groups, and a filter sees only the channels of
    its group.
    weight is (kernel_size, in / groups, filters), bias (filters,). `l1` and `l2` penalize the weight, as in Dense.
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int,
        strides: int = 1,
        padding: str | int = "valid",
        dilation: int = 1,
        groups: int = 1,
        *,
        use_bias: bool = True,
        weight_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        l1: float = 0.0,
        l2: float = 0.0,
        name: str | None = None,
    ) -> None:
        super().__init__(filters, groups, use_bias, weight_initializer, bias_initializer, l1, l2, name)
        self.kernel_size, self.strides = integer(self, "kernel_size", kernel_size), integer(self, "strides", strides)
        self.dilation, self.padding = integer(self, "dilation", dilation), sequence_padding(self, padding, causal=True)

    def build(self, input_shape: Shape) -> Shape:
        self.keeps_mask = self.strides == 1 and self.padding in ("same", "causal")
        self.causal = self.strides == 1 and self.padding == "causal"
        steps, channels = steps_and_channels(self, input_shape)
        self.add_weight_and_bias((self.kernel_size,), channels)
        if steps is not None:
            steps = self._windows(steps).grid[1]
        return (steps, self.filters)

    def _windows(self, steps: int) -> Windows:
        return windows_on_sequence(self, steps, self.kernel_size, self.strides, self.padding, self.dilation)

    def forward(self, x: Array) -> Array:
        """(N, T, in) → (N, steps, filters). With stride s, dilation d and p zeros before the first step,

        y[n, t, f] = bias[f] + Σ_ac x[n, t·s + a·d - p, c] · weight[a, c, f].

        It is the convolution of images of height 1.
        """
        work, bias, new = self.work, self.bias.value if self.use_bias else None, x.shape[1]
        if past := self.past:
            x = past.preceded("x", x, self.dilation * (self.kernel_size - 1))
        work.x, work.windows = as_image(x), self._windows(x.shape[1])
        y = work.buffer("y", (len(x), work.windows.grid[1], self.filters))
        weight, scratch = self.weight.value[None], self.context.scratch
        self.backend.conv2d(work.x, weight, bias, work.windows, self.groups, as_image(y), scratch)
        return y[:, -new:] if past else y

    def backward(self, grad_y: Array) -> Array | None:
        """(N, steps, filters) → (N, T, in), as for Conv2D.

        ∂L/∂weight[a, c, f] = Σ_nt x[n, t·s + a·d - p, c] · ∂L/∂y[n, t, f],   ∂L/∂bias = Σ_nt ∂L/∂y[n, t],

        and ∂L/∂x[n, u, c] is the sum of ∂L/∂y[n, t, f] · weight[a, c, f] over all t, a and f with t·s + a·d - p = u.
        """
        work, scratch = self.work, self.context.scratch
        weight, grad_weight = self.weight.value[None], self.weight.grad[None]
        grad_x = work.buffer("grad_x", work.x[:, 0].shape) if self.wants_input_grad else None
        grads = grad_weight, self.bias.grad if self.use_bias else None, None if grad_x is None else as_image(grad_x)
        self.backend.conv2d_grad(work.x, as_image(grad_y), weight, work.windows, self.groups, grads, scratch)
        return grad_x


class _ImageConvolution(_Convolution):
    """The arguments that all convolutions of images share."""

    windows: Windows

    def __init__(
        self,
        filters: int,
        kernel_size: Size,
        strides: Size = 1,
        padding: Padding = "valid",
        dilation: Size = 1,
        groups: int = 1,
        *,
        use_bias: bool = True,
        weight_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        l1: float = 0.0,
        l2: float = 0.0,
        name: str | None = None,
    ) -> None:
        super().__init__(filters, groups, use_bias, weight_initializer, bias_initializer, l1, l2, name)
        self.kernel_size = one_or_pair(integer, self, "kernel_size", kernel_size)
        self.strides = one_or_pair(integer, self, "strides", strides)
        self.dilation = one_or_pair(integer, self, "dilation", dilation)
        self.padding = padding_argument(self, padding)


class Conv2D(_ImageConvolution):
    """Applies each filter to every window of an image: (N, H, W, in) → (N, rows, columns, filters).

    filters: the number of filters.  kernel_size, strides, dilation: an integer, or a pair (vertical, horizontal).
    padding: "valid" for none; "same" for ceil(size / stride) outputs, with the extra zero of an odd number at the
    bottom or right; or the number of zeros on each side.  groups: filters and channels are divided into this many
    groups, and a filter sees only the channels of its group.
    weight is (kh, kw, in / groups, filters), bias (filters,). `l1` and `l2` penalize the weight, as in Dense.
    """

    def build(self, input_shape: Shape) -> Shape:
        image, channels = image_and_channels(self, input_shape)
        self.windows = windows_on_image(self, image, self.kernel_size, self.strides, self.padding, self.dilation)
        self.add_weight_and_bias(pair(self.kernel_size), channels)
        return (*self.windows.grid, self.filters)

    def forward(self, x: Array) -> Array:
        """(N, H, W, in) → (N, rows, columns, filters). With strides s, dilation d and padding p,

        y[n, i, j, f] = bias[f] + Σ_abc x[n, i·s + a·d - p, j·s + b·d - p, c] · weight[a, b, c, f].

        With the pixels x under each window as a row of a matrix, the patches: y = patches @ weight + bias.
        """
        work = self.work
        work.x, bias = x, self.bias.value if self.use_bias else None
        y = work.buffer("y", (len(x), *self.output_shape))
        return self.backend.conv2d(x, self.weight.value, bias, self.windows, self.groups, y, self.context.scratch)

    def backward(self, grad_y: Array) -> Array | None:
        """(N, rows, columns, filters) → (N, H, W, in). As for Dense, with a row for each window:

        ∂L/∂weight = patchesᵀ @ ∂L/∂y,   ∂L/∂bias = Σ_rows ∂L/∂y,   ∂L/∂patches = ∂L/∂y @ weightᵀ.

        A pixel's ∂L/∂x is the sum of ∂L/∂patches over all elements that are copies of the pixel.
        """
        work, weight, scratch = self.work, self.weight, self.context.scratch
        grad_x = work.buffer("grad_x", work.x.shape) if self.wants_input_grad else None
        grads = weight.grad, self.bias.grad if self.use_bias else None, grad_x
        return self.backend.conv2d_grad(work.x, grad_y, weight.value, self.windows, self.groups, grads, scratch)


class DepthwiseConv2D(_ImageConvolution):
    """Convolves each channel separately: (N, H, W, in) → (N, rows, columns, in · depth_multiplier).

    It equals a Conv2D with groups=in: weight is (kh, kw, 1, in · depth_multiplier), and the filters of a channel are
    adjacent. For the other arguments see Conv2D. Howard et al. 2017, "MobileNets".
    """

    def __init__(
        self,
        kernel_size: Size,
        strides: Size = 1,
        padding: Padding = "valid",
        dilation: Size = 1,
        depth_multiplier: int = 1,
        *,
        use_bias: bool = True,
        weight_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        l1: float = 0.0,
        l2: float = 0.0,
        name: str | None = None,
    ) -> None:
        self.depth_multiplier = integer(self, "depth_multiplier", depth_multiplier)
        super().__init__(
            self.depth_multiplier, kernel_size, strides, padding, dilation, 1, use_bias=use_bias,
            weight_initializer=weight_initializer, bias_initializer=bias_initializer, l1=l1, l2=l2, name=name
        )  # fmt: skip

    def build(self, input_shape: Shape) -> Shape:
        image, channels = image_and_channels(self, input_shape)
        self.windows = windows_on_image(self, image, self.kernel_size, self.strides, self.padding, self.dilation)
        self.groups, self.filters = channels, channels * self.depth_multiplier
        self.add_weight_and_bias(pair(self.kernel_size), channels)
        return (*self.windows.grid, self.filters)

    def forward(self, x: Array) -> Array:
        """(N, H, W, in) → (N, rows, columns, in · depth_multiplier):

        y[n, i, j, (c, m)] = bias[(c, m)] + Σ_ab x[n, i·s + a·d - p, j·s + b·d - p, c] · weight[a, b, 0, (c, m)].
        """
        work, backend = self.work, self.backend
        work.x = x
        y = work.buffer("y", (len(x), *self.output_shape))
        backend.depthwise(x, self._by_channel(self.weight.value[:, :, 0]), self.windows, out=self._by_channel(y))
        if self.use_bias:
            backend.add_to_rows(y.reshape(-1, self.filters), self.bias.value)
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """(N, rows, columns, in · depth_multiplier) → (N, H, W, in). Each output is a sum of pixel · weight, so

        ∂L/∂weight[a, b] = Σ_nij pixel · ∂L/∂y, with the pixel under cell (a, b) of each window;

        ∂L/∂x = Σ weight · ∂L/∂y over all windows that contain the pixel;   ∂L/∂bias = Σ_nij ∂L/∂y.
        """
        work, backend = self.work, self.backend
        grad, weight_grad = self._by_channel(grad_y), self._by_channel(self.weight.grad[:, :, 0])
        backend.depthwise_weight_grad(work.x, grad, self.windows, out=weight_grad)
        if self.use_bias:
            backend.sum_rows(grad_y.reshape(-1, self.filters), out=self.bias.grad)
        if not self.wants_input_grad:
            return None
        weight, grad_x = self._by_channel(self.weight.value[:, :, 0]), work.buffer("grad_x", work.x.shape)
        return backend.depthwise_input_grad(grad, weight, self.windows, out=grad_x)

    def _by_channel(self, a: Array) -> Array:
        """(..., in · depth_multiplier) → (..., in, depth_multiplier)."""
        return a.reshape(*a.shape[:-1], -1, self.depth_multiplier)


class Conv2DTranspose(_ImageConvolution):
    """The transpose of a Conv2D, which enlarges images: (N, rows, columns, in) → (N, H, W, filters).

    Each pixel of the input contributes to one window of the output; the windows are `strides` apart. Along each axis,
    the output has (size - 1) · stride + dilation · (kernel - 1) + 1 + output_padding pixels, minus `padding` on each
    side; with padding="same" it has size · stride.
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
        *,
        use_bias: bool = True,
        weight_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        l1: float = 0.0,
        l2: float = 0.0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            filters, kernel_size, strides, padding, dilation, groups, use_bias=use_bias,
            weight_initializer=weight_initializer, bias_initializer=bias_initializer, l1=l1, l2=l2, name=name
        )  # fmt: skip
        self.output_padding = one_or_pair(integer, self, "output_padding", output_padding, at_least=0)
        extra, strides, dilation = pair(self.output_padding), pair(self.strides), pair(self.dilation)
        if self.padding == "same" and extra != (0, 0):
            raise ArgumentError(
                'Conv2DTranspose: with padding="same" the output is size · stride; leave output_padding out.'
            )
        if any(extra[axis] >= max(strides[axis], dilation[axis]) for axis in (0, 1)):
            raise ArgumentError(
                "Conv2DTranspose: output_padding must be below the larger of strides and dilation, not "
                f"{shown(output_padding)}."
            )

    def build(self, input_shape: Shape) -> Shape:
        grid, channels = image_and_channels(self, input_shape)
        self.windows = transposed_windows(
            self, grid, self.kernel_size, self.strides, self.padding, self.dilation, self.output_padding
        )
        self.add_weight_and_bias(pair(self.kernel_size), channels)
        return (*self.windows.image, self.filters)

    def forward(self, x: Array) -> Array:
        """(N, rows, columns, in) → (N, H, W, filters).

        patches = x @ weight has a row for each pixel of x, with the values of one window of y. A pixel of y is bias +
        the sum of the patch elements that belong to it.
        """
        work, weight, scratch = self.work, self.weight.value, self.context.scratch
        work.x, bias = x, self.bias.value if self.use_bias else None
        y = work.buffer("y", (len(x), *self.output_shape))
        return self.backend.conv2d_transpose(x, weight, bias, self.windows, self.groups, y, scratch)

    def backward(self, grad_y: Array) -> Array | None:
        """(N, H, W, filters) → (N, rows, columns, in). ∂L/∂patches are the patches of ∂L/∂y, and

        ∂L/∂weight = xᵀ @ ∂L/∂patches,   ∂L/∂bias = Σ_pixels ∂L/∂y,   ∂L/∂x = ∂L/∂patches @ weightᵀ.
        """
        work, weight, scratch = self.work, self.weight, self.context.scratch
        grad_x = work.buffer("grad_x", work.x.shape) if self.wants_input_grad else None
        grads = weight.grad, self.bias.grad if self.use_bias else None, grad_x
        return self.backend.conv2d_transpose_grad(
            work.x, grad_y, weight.value, self.windows, self.groups, grads, scratch
        )
