"""Residual: layers with a skip connection around them."""

from typing import Any

from xpnet.backends import Array
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError, StateError, shape_text, shown
from xpnet.layers.activations import Identity
from xpnet.layers.base import Layer
from xpnet.layers.containers import Sequential
from xpnet.layers.context import Shape
from xpnet.layers.convolution import Conv2D
from xpnet.layers.dense import Dense


class Residual(Sequential):
    """y = f(x) + skip(x), where f applies the layers one after the other: (N, *input_shape) → (N, *output_shape).

    The skip is the identity if f keeps the shape. If not, it is a learned projection without a bias: for images, a
    `Conv2D` of 1 × 1 pixel with the stride that gives the output's height and width; for other shapes, which may differ
    in the last axis only, a `Dense`.  projection: another layer for the skip, such as
    `Sequential([Conv2D(64, 1, strides=2), BatchNorm()])`.

    Inner names are "1.0.weight" for the layers and "1.skip.weight" for the skip. The attribute `layers` includes both.

    He et al. 2016, "Deep residual learning for image recognition".
    """

    accepts_integers = False  # x is added to floats
    gives_probabilities = False  # a sum of probabilities is not a probability

    def __init__(self, *layers: Layer, projection: Layer | None = None, name: str | None = None) -> None:
        if not layers or isinstance(layers[0], list | tuple):
            raise ArgumentError("Residual: give it one or more layers, as in Residual(Dense(8), ReLU()).")
        if not (projection is None or isinstance(projection, Layer)):
            raise ArgumentTypeError(f"Residual: projection must be a layer, or None, not {shown(projection)}.")
        super().__init__([*layers, Identity() if projection is None else projection], name=name)
        self.projection = projection

    def _checked_assignment(self, name: str, value: Any) -> Any:
        if name == "layers" and not self.is_built:
            raise StateError("Residual: layers cannot be assigned, since the skip is among them. Make a new Residual.")
        if name == "projection" and not self.is_built:
            vars(self)["layers"] = Residual(*self._chain, projection=value).layers
            return value
        return super()._checked_assignment(name, value)

    def build(self, input_shape: Shape) -> Shape:
        shape, skip = super().build(input_shape), self.layers[-1]
        if self.projection is None and self._shared_with is None:  # a copy has the skip already
            placeholder, skip = skip, self._skip(input_shape, shape)
            skip.trainable = placeholder.trainable
            self.layers = (*self._chain, skip)
        self._placed = (*self._placed, skip)
        skip_shape = skip.place(self.context, self._qualified(self._keys()[-1]), input_shape)
        if skip_shape != shape:
            raise self._mismatch(shape, f"its projection gives {shape_text(skip_shape)}", "Give both the same shape.")
        return shape

    def forward(self, x: Array) -> Array:
        """y = f(x) + skip(x)."""
        y = super().forward(x)
        if self.mask is not None:
            self.layers[-1].work.given_mask = self.mask
        return self.xp.add(y, self.layers[-1].forward(x), out=self.work.buffer("y", y.shape))

    def backward(self, grad_y: Array) -> Array | None:
        """f(x) and skip(x) both have the gradient of their sum, ∂L/∂y, so ∂L/∂x is the sum of their gradients.

        If ∂L/∂x is not wanted, each backward ends at its first layer with parameters.
        """
        input_grad, skip = self.wants_input_grad, self.layers[-1]
        grad_x: Any = super().backward(grad_y)
        if input_grad or skip.parameters:
            skip.wants_input_grad = input_grad
            skip_grad = skip.backward(grad_y)
        return self.xp.add(grad_x, skip_grad, out=self.work.buffer("grad_x", grad_x.shape)) if input_grad else None

    @property
    def _chain(self) -> tuple[Layer, ...]:
        """The layers of f, without the skip."""
        return self.layers[:-1]

    def _skip(self, before: Shape, after: Shape) -> Layer:
        """The simplest layer from the shape `before` to the shape `after`."""
        if before == after:
            return Identity()
        if len(before) == len(after) == 3:
            for stride in range(1, max(before[:2]) + 1):
                if after[:2] == tuple(-(-size // stride) for size in before[:2]):
                    return Conv2D(after[2], 1, strides=stride, use_bias=False)
        elif before[:-1] == after[:-1] and after:
            return Dense(after[-1], use_bias=False)
        raise self._mismatch(
            after,
            f"the input is {shape_text(before)}, and no Dense or 1 × 1 convolution with a stride gives that shape",
            'Keep the leading axes, as padding="same" does for images, or give projection=, a layer that does it.',
        )

    def _mismatch(self, shape: Shape, problem: str, advice: str) -> ShapeError:
        return ShapeError(f"{self._label} adds its skip: its layers give {shape_text(shape)}, but {problem}. {advice}")

    def get_config(self) -> dict[str, Any]:
        return self._with_name({"layers": list(self.layers[:-1]), "projection": self.projection})

    def _keys(self) -> list[str]:
        *keys, _ = super()._keys()
        skip = self.layers[-1].name or "skip"
        if skip in keys:
            raise ArgumentError(f"Residual: a layer has the name {skip!r}, as the skip has. Rename it.")
        return [*keys, skip]
