"""Reshape, Flatten, Permute, Slice and Rescale: layers that rearrange or select features, or change their scale."""

import math
from collections.abc import Sequence
from typing import Any

from xpnet.backends import Array
from xpnet.config import integer, is_integer, items_or_one, number
from xpnet.errors import ArgumentError, ShapeError, shown
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape


class Reshape(Layer):
    """(N, *shape) → (N, *target_shape). One size of target_shape may be -1; it is computed from the others."""

    accepts_integers = None
    causal = False

    def __init__(self, target_shape: Sequence[int], *, name: str | None = None) -> None:
        super().__init__(name=name)
        sizes = items_or_one(target_shape)
        if not all(is_integer(n) and (1 <= n < 2**63 or n == -1) for n in sizes) or sizes.count(-1) > 1:
            raise ArgumentError(
                f"Reshape: target_shape must be positive integers, one of which may be -1, not {shown(target_shape)}."
            )
        self.target_shape = tuple(int(n) for n in sizes)

    def build(self, input_shape: Shape) -> Shape:
        if None in input_shape:
            hint = " Pool over the steps, or take the last state of a recurrent layer."
            raise self.refuse("inputs of one size", input_shape, hint)
        features, known = math.prod(input_shape), math.prod(n for n in self.target_shape if n != -1)
        fits = features % known == 0 if -1 in self.target_shape else features == known
        if not fits:
            raise self.refuse(f"as many features as {self.target_shape} has", input_shape)
        return tuple(features // known if n == -1 else n for n in self.target_shape)

    def forward(self, x: Array) -> Array:
        return x.reshape(len(x), *self.output_shape)

    def backward(self, grad_y: Array) -> Array:
        """∂L/∂x is ∂L/∂y in the shape of x."""
        return grad_y.reshape(len(grad_y), *self.input_shape)


class Flatten(Reshape):
    """(N, *shape) → (N, features), in row-major order."""

    keeps_mask = False

    def __init__(self, *, name: str | None = None) -> None:
        super().__init__((-1,), name=name)


class Permute(Layer):
    """Reorder the axes after the batch, numbered from 0: Permute((2, 0, 1)) turns (N, H, W, C) into (N, C, H, W)."""

    accepts_integers = None
    causal = False

    def __init__(self, axes: Sequence[int], *, name: str | None = None) -> None:
        super().__init__(name=name)
        given = items_or_one(axes)
        self.axes = tuple(integer(self, "each of the axes", axis, at_least=0) for axis in given)
        if not given or sorted(self.axes) != list(range(len(self.axes))):
            last = max(len(self.axes) - 1, 0)
            raise ArgumentError(f"Permute: axes must be 0 to {last} in some order, not {shown(axes)}.")

    @property
    def _keeps_mask(self) -> bool:
        return self.axes[0] == 0

    def build(self, input_shape: Shape) -> Shape:
        if len(input_shape) != len(self.axes):
            raise self.refuse(f"{len(self.axes)} axes after the batch", input_shape)
        if None in input_shape and self.axes[0] != 0:
            raise self.refuse("a fixed length, since only the first axis may have any", input_shape)
        return tuple(input_shape[axis] for axis in self.axes)

    def forward(self, x: Array) -> Array:
        return self._copy("y", x, self.axes)

    def backward(self, grad_y: Array) -> Array:
        """∂L/∂x is ∂L/∂y with the inverse permutation of the axes."""
        return self._copy("grad_x", grad_y, [self.axes.index(axis) for axis in range(len(self.axes))])

    def _copy(self, name: str, x: Array, axes: Sequence[int]) -> Array:
        view = x.transpose(0, *(axis + 1 for axis in axes))
        out = self.work.buffer(name, view.shape, x.dtype)
        out[...] = view
        return out


class Slice(Layer):
    """Elements start to stop - 1 of an axis: (N, ..., size, ...) → (N, ..., stop - start, ...).

    Negative numbers count from the end, as in Python, and stop=None is the end: Slice(-1) takes the last step of a
    sequence (N, T, C) → (N, 1, C).  axis: counted from 0 after the batch, or from the end if negative.
    """

    accepts_integers = None

    def __init__(self, start: int, stop: int | None = None, axis: int = 0, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.start = integer(self, "start", start, at_least=None)
        self.stop = None if stop is None else integer(self, "stop", stop, at_least=None)
        self.axis = integer(self, "axis", axis, at_least=None)

    def build(self, input_shape: Shape) -> Shape:
        axes = len(input_shape)
        if not -axes <= self.axis < axes:
            raise self.refuse(f"an axis {self.axis} after the batch", input_shape)
        axis, size = self.axis % axes, self._size(input_shape[self.axis % axes])
        if size == 0:
            raise self._refusal(input_shape)
        self._part = (*[slice(None)] * (axis + 1), slice(self.start, self.stop))
        self.keeps_mask = self.causal = axis > 0
        return (*input_shape[:axis], size, *input_shape[axis + 1 :])

    def _refusal(self, shape: Shape) -> ShapeError:
        return self.refuse(f"elements from {self.start} to {self.stop} along axis {self.axis}", shape)

    def _size(self, size: Any) -> Any:
        """The size of the part of an axis of this size. None: any."""
        if size is not None:
            return len(range(size)[self.start : self.stop])
        if self.stop is None:
            return -self.start if self.start < 0 else None
        return max(self.stop - self.start, 0) if (self.start < 0) == (self.stop < 0) else None

    def forward(self, x: Array) -> Array:
        part, self.work.shape = x[self._part], x.shape
        axis = len(self._part) - 1
        taken, expected = part.shape[axis], self.output_shape[axis - 1]
        if not taken or expected not in (None, taken):
            raise self._refusal(x.shape[1:])
        y = self.work.buffer("y", part.shape, x.dtype)
        y[...] = part
        return y

    def backward(self, grad_y: Array) -> Array | None:
        """∂L/∂x is ∂L/∂y in the part that was taken, and 0 elsewhere."""
        if not self.wants_input_grad:
            return None
        grad_x = self.work.buffer("grad_x", self.work.shape)
        grad_x.fill(0.0)
        grad_x[self._part] = grad_y
        return grad_x


class Rescale(Layer):
    """y = scale · x + offset, for any shape. x may hold integers: Rescale(1 / 255) scales uint8 images to [0, 1]."""

    _changeable = frozenset(("scale", "offset"))
    accepts_integers = True

    def __init__(self, scale: float, offset: float = 0.0, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.scale = number(self, "scale", scale, finite=True)
        self.offset = number(self, "offset", offset, finite=True)

    def forward(self, x: Array) -> Array:
        return self.backend.rescale(x, self.scale, self.offset, out=self.work.buffer("y", x.shape))

    def backward(self, grad_y: Array) -> Array | None:
        """∂y/∂x = scale, so ∂L/∂x = scale · ∂L/∂y."""
        if not self.wants_input_grad:
            return None
        return self.xp.multiply(grad_y, self.scale, out=self.work.buffer("grad_x", grad_y.shape))
