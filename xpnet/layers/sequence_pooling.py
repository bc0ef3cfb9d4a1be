"""Pooling of sequences (N, T, C), over windows and over all steps. The sequences are pooled as images of height 1."""

from typing import Any

from xpnet.backends import Array
from xpnet.backends.reference.windows import Windows
from xpnet.config import flag, integer
from xpnet.errors import ArgumentError, shown
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape
from xpnet.layers.pooling import inverse_counts
from xpnet.layers.windows import as_image, sequence_padding, steps_and_channels, windows_on_sequence


class _Pooling(Layer):
    """The arguments that MaxPool1D and AvgPool1D share. By default the windows are adjacent."""

    splits_batch = True
    keeps_mask = False
    causal = False

    def __init__(
        self, pool_size: int = 2, strides: int | None = None, padding: str | int = "valid", *, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        self.pool_size, self.padding = integer(self, "pool_size", pool_size), sequence_padding(self, padding)
        self.strides = None if strides is None else integer(self, "strides", strides, also="None")
        if not isinstance(self.padding, str) and self.padding >= self.pool_size:  # a window could be empty
            kind = type(self).__name__
            raise ArgumentError(f"{kind}: padding must be below pool_size={shown(pool_size)}, not {shown(padding)}.")

    def build(self, input_shape: Shape) -> Shape:
        steps, channels = steps_and_channels(self, input_shape)
        if steps is not None:
            steps = self._windows(steps).grid[1]
        return (steps, channels)

    def _windows(self, steps: int) -> Windows:
        return windows_on_sequence(self, steps, self.pool_size, self.strides or self.pool_size, self.padding)


class MaxPool1D(_Pooling):
    """The largest number of each window: (N, T, C) → (N, steps, C).

    strides: defaults to pool_size.  padding: "valid", "same", or the number of steps on each side, as in Conv1D; it is
    never selected. The output length is rounded down: steps beyond the last window are ignored.
    """

    def forward(self, x: Array) -> Array:
        """(N, T, C) → (N, steps, C): y = the largest number of the window."""
        work, backend = self.work, self.backend
        work.windows, work.steps = self._windows(x.shape[1]), x.shape[1]
        y = work.buffer("y", (len(x), work.windows.grid[1], x.shape[2]))
        work.choice = work.buffer("choice", y.shape, backend.xp.uint8 if self.pool_size <= 256 else backend.xp.int32)
        backend.max_pool(as_image(x), work.windows, out=as_image(y), choice=as_image(work.choice))
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """(N, steps, C) → (N, T, C): ∂y/∂x = 1 for the largest number of the window, else 0.

        Of equal numbers, the first counts.
        """
        if not self.wants_input_grad:
            return None
        work = self.work
        grad_x = work.buffer("grad_x", (len(grad_y), work.steps, grad_y.shape[2]))
        self.backend.max_pool_grad(as_image(grad_y), as_image(work.choice), work.windows, out=as_image(grad_x))
        return grad_x


class AvgPool1D(_Pooling):
    """The mean of each window: (N, T, C) → (N, steps, C).

    The arguments are MaxPool1D's. The zeros of the padding count in the mean, as in PyTorch; with
    `count_include_pad=False` they do not.
    """

    def __init__(
        self,
        pool_size: int = 2,
        strides: int | None = None,
        padding: str | int = "valid",
        *,
        count_include_pad: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(pool_size, strides, padding, name=name)
        self.count_include_pad = flag(self, "count_include_pad", count_include_pad)

    def forward(self, x: Array) -> Array:
        """(N, T, C) → (N, steps, C): y = (Σ numbers of the window) / how many they are."""
        work = self.work
        work.windows, work.steps = self._windows(x.shape[1]), x.shape[1]
        y = work.buffer("y", (len(x), work.windows.grid[1], x.shape[2]))
        self.backend.sum_pool(as_image(x), work.windows, out=as_image(y))
        y *= self._inverse_counts()
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """(N, steps, C) → (N, T, C): ∂y/∂x = 1 / how many numbers the window has, for each of them."""
        if not self.wants_input_grad:
            return None
        work = self.work
        grad = self.xp.multiply(grad_y, self._inverse_counts(), out=work.buffer("grad", grad_y.shape))
        grad_x = work.buffer("grad_x", (len(grad_y), work.steps, grad_y.shape[2]))
        self.backend.sum_pool_grad(as_image(grad), work.windows, out=as_image(grad_x))
        return grad_x

    def _inverse_counts(self) -> Any:
        """A number, or an array (steps, 1)."""
        inverse = inverse_counts(self, self.work.windows, self.count_include_pad)
        return inverse if isinstance(inverse, float) else inverse[0]


class _GlobalPooling(Layer):
    """Pooling over all steps that count."""

    keeps_mask = False
    causal = False

    def build(self, input_shape: Shape) -> Shape:
        return (steps_and_channels(self, input_shape)[1],)


class GlobalAveragePool1D(_GlobalPooling):
    """The mean of each channel over the steps that count: (N, T, C) → (N, C). It is 0 if no step counts."""

    def forward(self, x: Array) -> Array:
        """(N, T, C) → (N, C), summed in float64."""
        work = self.work
        work.shape = x.shape
        return self.backend.mean_steps(x, self.mask, out=work.buffer("y", (len(x), x.shape[2])))

    def backward(self, grad_y: Array) -> Array | None:
        """(N, C) → (N, T, C): ∂y/∂x = 1 / the number of steps that count, for each of these."""
        if not self.wants_input_grad:
            return None
        work = self.work
        return self.backend.mean_steps_grad(grad_y, self.mask, out=work.buffer("grad_x", work.shape))


class GlobalMaxPool1D(_GlobalPooling):
    """The largest number of each channel over the steps that count: (N, T, C) → (N, C). It is 0 if no step counts."""

    def forward(self, x: Array) -> Array:
        """(N, T, C) → (N, C): y = the largest number. NaN counts as larger than any."""
        work, shape = self.work, (len(x), x.shape[2])
        work.shape, work.choice = x.shape, work.buffer("choice", shape, "int64")
        return self.backend.max_steps(x, self.mask, out=work.buffer("y", shape), choice=work.choice)

    def backward(self, grad_y: Array) -> Array | None:
        """(N, C) → (N, T, C): ∂y/∂x = 1 for the largest number, else 0. Of equal numbers, the first counts."""
        if not self.wants_input_grad:
            return None
        work = self.work
        return self.backend.max_steps_grad(grad_y, work.choice, out=work.buffer("grad_x", work.shape))
