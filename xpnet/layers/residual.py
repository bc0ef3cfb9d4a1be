"""Residual: layers beside which the input goes on."""

from typing import Any

from xpnet.backends import Array
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError
from xpnet.layers.activations import Identity
from xpnet.layers.base import Layer, Shape
from xpnet.layers.containers import Sequential
from xpnet.layers.convolution import Conv2D
from xpnet.layers.dense import Dense


class Residual(Sequential):
    """y = layers(x) + skip(x), with the layers one after the other.

    The skip is the identity where input and output have the same shape. Where they don't, it is learnt, without a bias:
    of images a `Conv2D` of 1 × 1 pixel, with the stride that gives the output's height and width; of other shapes that
    differ in the last axis only, a `Dense`. Or `projection` is the skip, a layer of your own such as
    `Sequential([Conv2D(64, 1, strides=2), BatchNorm()])`.

    Inner names are "1.0.weight" for the layers and "1.skip.weight" for the skip, which is the last of `layers`.

    He et al. 2016, "Deep residual learning for image recognition".
    """

    accepts_integers = False  # x is added to floats
    gives_probabilities = False  # two probabilities are none

    def __init__(self, *layers: Layer, projection: Layer | None = None) -> None:
        if not layers or isinstance(layers[0], list | tuple):
            raise ArgumentError("Residual: give it one or more layers, as in Residual(Dense(8), ReLU()).")
        if not (projection is None or isinstance(projection, Layer)):
            raise ArgumentTypeError(f"Residual: projection must be a layer, or None, not {projection!r}.")
        super().__init__([*layers, Identity() if projection is None else projection])
        self.projection = projection

    def build(self, input_shape: Shape) -> Shape:
        *way, skip = self.layers
        shape = input_shape
        for i, layer in enumerate(way):
            shape = layer.place(self.context, self._qualified(str(i)), shape)
        if self.projection is None:
            trainable, skip = skip.trainable, self._skip(input_shape, shape)
            skip.trainable = trainable
            self.layers = (*way, skip)
        across = skip.place(self.context, self._qualified("skip"), input_shape)
        if across != shape:
            raise self._mismatch(shape, f"its projection gives {_text(across)}", "Both must give the same shape.")
        return shape

    def _skip(self, before: Shape, after: Shape) -> Layer:
        """What makes `after` of `before`, in its simplest form."""
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
            f"the input is {_text(before)}, and no stride of a 1 × 1 convolution or Dense brings it there",
            'Keep the leading axes, as padding="same" does for images, or give projection=, a layer that does it.',
        )

    def _mismatch(self, shape: Shape, beside: str, mend: str) -> ShapeError:
        place = f"layer {self.path} (Residual)" if self.path else "Residual"
        return ShapeError(f"{place} adds two ways: its layers give {_text(shape)}, but {beside}. {mend}")

    def forward(self, x: Array) -> Array:
        y = super().forward(x)
        return self.xp.add(y, self.layers[-1].forward(x), out=self.work.buffer("y", y.shape))

    @property
    def _way(self) -> tuple[Layer, ...]:
        return self.layers[:-1]

    def backward(self, grad_y: Array) -> Array | None:
        """Both ways have the gradient of their sum: ∂L/∂x is what the layers make of ∂L/∂y, plus what the skip does.

        Where nobody wants ∂L/∂x, each way ends at its first layer that has parameters.
        """
        way, skip = [layer for layer, _ in self._walk], self.layers[-1]
        wanted = self.wants_input_grad
        grad: Any = grad_y
        while way and (wanted or any(layer.parameters for layer in way)):
            layer = way.pop()
            layer.wants_input_grad = wanted or any(earlier.parameters for earlier in way)
            grad = layer.backward(grad)
        if wanted or skip.parameters:
            skip.wants_input_grad = wanted
            across = skip.backward(grad_y)
        return self.xp.add(grad, across, out=self.work.buffer("grad_x", grad.shape)) if wanted else None

    def get_config(self) -> dict[str, Any]:
        return {"layers": list(self.layers[:-1]), "projection": self.projection}


def _text(shape: Shape) -> str:
    return f"(N, {', '.join(map(str, shape))})"
