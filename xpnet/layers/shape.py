"""Layers that rearrange features, or change their scale."""

import math
from collections.abc import Iterable, Sequence

from xpnet.backends import Array
from xpnet.config import is_number, is_whole
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer, Shape


class Reshape(Layer):
    """(N, *shape) → (N, *target_shape); one size of target_shape may be -1, for whatever remains."""

    accepts_integers = None

    def __init__(self, target_shape: Sequence[int]) -> None:
        sizes = tuple(target_shape) if isinstance(target_shape, Iterable) else (target_shape,)
        self.target_shape = sizes
        if sizes.count(-1) > 1 or not all(is_whole(n) and (n >= 1 or n == -1) for n in sizes):
            raise ArgumentError(f"Reshape: sizes must be positive, one of them may be -1, not {self.target_shape}.")

    def build(self, input_shape: Shape) -> Shape:
        features, known = math.prod(input_shape), math.prod(n for n in self.target_shape if n != -1)
        fits = features % known == 0 if -1 in self.target_shape else features == known
        if not fits:
            raise self.refuse(f"as many features as {self.target_shape} holds", f"(N, {str(input_shape)[1:]}")
        return tuple(features // known if n == -1 else n for n in self.target_shape)

    def forward(self, x: Array) -> Array:
        return x.reshape(len(x), *self.output_shape)

    def backward(self, grad_y: Array) -> Array:
        """The same numbers in the input's shape."""
        return grad_y.reshape(len(grad_y), *self.input_shape)


class Flatten(Reshape):
    """(N, *shape) → (N, features), the last axis running fastest."""

    def __init__(self) -> None:
        super().__init__((-1,))


class Permute(Layer):
    """Reorder the axes after the batch, numbered from 0: Permute((2, 0, 1)) turns (N, H, W, C) into (N, C, H, W)."""

    accepts_integers = None

    def __init__(self, axes: Sequence[int]) -> None:
        self.axes = tuple(axes) if isinstance(axes, Iterable) else (axes,)
        if not all(is_whole(axis) for axis in self.axes) or sorted(self.axes) != list(range(len(self.axes))):
            raise ArgumentError(f"Permute: axes must be 0 to {len(self.axes) - 1} in some order, not {self.axes}.")

    def build(self, input_shape: Shape) -> Shape:
        if len(input_shape) != len(self.axes):
            raise self.refuse(f"{len(self.axes)} axes after the batch", f"(N, {str(input_shape)[1:]}")
        return tuple(input_shape[axis] for axis in self.axes)

    def forward(self, x: Array) -> Array:
        return self._copy("y", x, self.axes)

    def backward(self, grad_y: Array) -> Array:
        """The inverse permutation."""
        return self._copy("grad_x", grad_y, [self.axes.index(axis) for axis in range(len(self.axes))])

    def _copy(self, name: str, x: Array, axes: Sequence[int]) -> Array:
        view = x.transpose(0, *(axis + 1 for axis in axes))
        out = self.work.buffer(name, view.shape, x.dtype)
        out[...] = view
        return out


class Rescale(Layer):
    """y = scale · x + offset; on integer inputs too, as `Rescale(1 / 255)` on uint8 images."""

    accepts_integers = True

    def __init__(self, scale: float, offset: float = 0.0) -> None:
        if not (is_number(scale) and is_number(offset)):
            raise ArgumentError(f"Rescale: scale and offset must be numbers, not {scale!r} and {offset!r}.")
        self.scale, self.offset = scale, offset

    def forward(self, x: Array) -> Array:
        return self.backend.rescale(x, self.scale, self.offset, out=self.work.buffer("y", x.shape))

    def backward(self, grad_y: Array) -> Array | None:
        """∂y/∂x = scale."""
        if not self.wants_input_grad:
            return None
        return self.xp.multiply(grad_y, self.scale, out=self.work.buffer("grad_x", grad_y.shape))
