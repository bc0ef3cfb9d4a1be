"""Layers with several inputs: sums, products, averages, maxima, concatenation and dot products."""

import itertools
from typing import Any

from xpnet.backends import Array
from xpnet.config import integer
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape


class _Merge(Layer):
    """What they have in common: at least two inputs, whose shapes agree except where an axis has the size 1.

    Along such an axis the input is repeated, as in NumPy. Its gradient is the sum over the repetitions.
    """

    takes_list = True

    def build(self, input_shape: Any) -> Shape:
        shapes = self._shapes(input_shape)
        if len({len(shape) for shape in shapes}) == 1:
            sizes = [set(axis) - {1} for axis in zip(*shapes, strict=True)]
            if all(len(different) <= 1 for different in sizes):
                return tuple(different.pop() if different else 1 for different in sizes)
        raise self.refuse("inputs of one shape, in which an axis may also have the size 1", shapes)

    def _shapes(self, input_shape: Any) -> list[Shape]:
        if not isinstance(input_shape, list) or len(input_shape) < 2:
            name = type(self).__name__
            raise self.refuse("a list of two or more inputs", input_shape, f" Call it as layers.{name}()([a, b]).")
        return input_shape

    def _sizes(self, x: list[Array]) -> tuple[int, ...]:
        """The shape of y. The steps of x decide its length if that is open, or if x continues sequences."""
        shapes: Any = self.input_shape
        sizes = self.output_shape
        if len({a.shape[1] for a, shape in zip(x, shapes, strict=True) if None in shape}) > 1:
            raise self.refuse("sequences of one length", [tuple(a.shape[1:]) for a in x])
        if None in sizes or (self.past is not None and len(sizes) > 1):
            sizes = (max(a.shape[1] for a in x), *sizes[1:])
        return (len(x[0]), *sizes)

    def _to_input(self, i: int, grad: Array) -> Array:
        """The sum of ∂L/∂y over the axes along which input i is repeated."""
        shapes: Any = self.input_shape
        before, after = shapes[i], self.output_shape
        axes = tuple(k for k, (old, new) in enumerate(zip(before, after, strict=True), 1) if old != new)
        if not axes:
            return grad
        sizes = [1 if k in axes else n for k, n in enumerate(grad.shape)]
        out = self.work.buffer(f"sum {i}", tuple(sizes))
        return self.xp.sum(grad, axis=axes, keepdims=True, out=out)


class Add(_Merge):
    """y = a + b + …: a list of (N, *shape) → (N, *shape)."""

    def forward(self, x: list[Array]) -> Array:
        return self._sum(x)

    def _sum(self, x: list[Array]) -> Array:
        a, b, *others = x
        y = self.xp.add(a, b, out=self.work.buffer("y", self._sizes(x)))
        for other in others:
            y += other
        return y

    def backward(self, grad_y: Array) -> list[Array]:
        """∂y/∂a = 1, so each input has the gradient of the sum."""
        return [self._to_input(i, grad_y) for i in range(len(self.input_shape))]


class Subtract(_Merge):
    """y = a - b: a list of two (N, *shape) → (N, *shape)."""

    def build(self, input_shape: Any) -> Shape:
        if len(self._shapes(input_shape)) > 2:
            raise self.refuse("two inputs", input_shape)
        return super().build(input_shape)

    def forward(self, x: list[Array]) -> Array:
        return self.xp.subtract(*x, out=self.work.buffer("y", self._sizes(x)))

    def backward(self, grad_y: Array) -> list[Array]:
        """∂y/∂a = 1 and ∂y/∂b = -1."""
        negative = self.xp.negative(grad_y, out=self.work.buffer("negative", grad_y.shape))
        return [self._to_input(0, grad_y), self._to_input(1, negative)]


class Multiply(_Merge):
    """y = a · b · …, element by element: a list of (N, *shape) → (N, *shape)."""

    def forward(self, x: list[Array]) -> Array:
        self.work.x = x
        a, b, *others = x
        y = self.xp.multiply(a, b, out=self.work.buffer("y", self._sizes(x)))
        for other in others:
            y *= other
        return y

    def backward(self, grad_y: Array) -> list[Array]:
        """∂L/∂a = ∂L/∂y times the product of all other inputs."""
        grads, x = [], self.work.x
        for i in range(len(x)):
            first, *others = x[:i] + x[i + 1 :]
            grad = self.xp.multiply(grad_y, first, out=self.work.buffer(f"grad_x {i}", grad_y.shape))
            for other in others:
                grad *= other
            grads.append(self._to_input(i, grad))
        return grads


class Average(Add):
    """y = (a + b + …) / n for n inputs: a list of (N, *shape) → (N, *shape)."""

    def forward(self, x: list[Array]) -> Array:
        y = self._sum(x)
        y *= 1.0 / len(x)
        return y

    def backward(self, grad_y: Array) -> list[Array]:
        """∂y/∂a = 1 / n."""
        grad = self.xp.multiply(grad_y, 1.0 / len(self.input_shape), out=self.work.buffer("grad_x", grad_y.shape))
        return super().backward(grad)


class Maximum(_Merge):
    """y = max(a, b, …), element by element: a list of (N, *shape) → (N, *shape)."""

    def forward(self, x: list[Array]) -> Array:
        a, b, *others = x
        self.work.x = x
        self.work.y = y = self.xp.maximum(a, b, out=self.work.buffer("y", self._sizes(x)))
        for other in others:
            self.xp.maximum(y, other, out=y)
        return y

    def backward(self, grad_y: Array) -> list[Array]:
        """∂y/∂a is 1 where a is the maximum, else 0. If several inputs are equal there, it is 1 for the first of them.

        Each input takes its part of the gradient from what those before it have left.
        """
        xp, work, grads = self.xp, self.work, []
        left = grad_y
        for i, x in enumerate(work.x):
            grad = xp.multiply(left, x == work.y, out=work.buffer(f"grad_x {i}", grad_y.shape))
            if i < len(work.x) - 1:
                left = xp.subtract(left, grad, out=work.buffer("left", grad_y.shape))
            grads.append(self._to_input(i, grad))
        return grads


class Concatenate(_Merge):
    """Joins its inputs along an axis: a list of (N, ..., size, ...) → (N, ..., sum of sizes, ...).

    axis: counted from 0 after the batch, or from the end if negative. All other axes must be equal.
    """

    def __init__(self, axis: int = -1, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.axis = integer(self, "axis", axis, at_least=None)

    def build(self, input_shape: Any) -> Shape:
        shapes = self._shapes(input_shape)
        axes = len(shapes[0])
        if not -axes <= self.axis < axes:
            raise ArgumentError(
                f"Concatenate: axis {self.axis} does not exist: the inputs have {axes} after the batch."
            )
        axis = self.axis % axes
        self.causal = axis > 0 or axes == 1
        if axis == 0 and None in [shape[0] for shape in shapes]:
            raise self.refuse("inputs of fixed length along the axis that it joins", shapes)
        if len({(*shape[:axis], None, *shape[axis + 1 :]) for shape in shapes}) > 1:
            raise self.refuse(f"inputs that are equal in all axes but axis {axis}", shapes)
        stops = list(itertools.accumulate(shape[axis] for shape in shapes))
        self._parts = [
            (*[slice(None)] * (axis + 1), slice(start, stop)) for start, stop in itertools.pairwise([0, *stops])
        ]
        return (*shapes[0][:axis], stops[-1], *shapes[0][axis + 1 :])

    def forward(self, x: list[Array]) -> Array:
        y = self.work.buffer("y", self._sizes(x))
        for part, given in zip(self._parts, x, strict=True):
            y[part] = given
        return y

    def backward(self, grad_y: Array) -> list[Array]:
        """Each input has its part of ∂L/∂y, copied, since layers compute faster with contiguous arrays."""
        grads = []
        for i, part in enumerate(self._parts):
            given = grad_y[part]
            grad = self.work.buffer(f"grad_x {i}", given.shape)
            grad[...] = given
            grads.append(grad)
        return grads


class Dot(_Merge):
    """y = Σ_k a_k b_k, the dot product over the last axis: two (N, ..., features) → (N, ..., 1)."""

    def build(self, input_shape: Any) -> Shape:
        shapes = self._shapes(input_shape)
        if len(shapes) > 2 or shapes[0] != shapes[1] or not shapes[0]:
            raise self.refuse("two inputs of one shape (N, ..., features)", shapes)
        return (*shapes[0][:-1], 1)

    def forward(self, x: list[Array]) -> Array:
        xp, work, sizes = self.xp, self.work, self._sizes(x)
        work.x = x
        product = xp.multiply(*x, out=work.buffer("product", x[0].shape))
        return xp.sum(product, axis=-1, keepdims=True, out=work.buffer("y", sizes))

    def backward(self, grad_y: Array) -> list[Array]:
        """∂L/∂a = b · ∂L/∂y, and ∂L/∂b = a · ∂L/∂y."""
        xp, work = self.xp, self.work
        a, b = work.x
        grad_a = xp.multiply(b, grad_y, out=work.buffer("grad_a", a.shape))
        grad_b = xp.multiply(a, grad_y, out=work.buffer("grad_b", b.shape))
        return [grad_a, grad_b]
