"""Layers made of layers."""

import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from xpnet.backends import Array
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError, StateError
from xpnet.layers.base import Context, Layer, Shape
from xpnet.parameters import Parameter

_WORTH_COMPILING = 2**14  # parameters from which on training takes longer than loading Numba


class Sequential(Layer):
    """Layers one after the other, as one layer. Inner names join with dots: "1.0.weight"."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        if not isinstance(layers, Iterable):
            raise ArgumentTypeError(f"{type(self).__name__}: layers must be a list of layers, not {layers!r}.")
        self.layers: tuple[Layer, ...] = tuple(layers)
        if not self.layers:
            raise ArgumentError("Sequential: give it at least one layer.")
        given: list[Any] = list(self.layers)
        for i, layer in enumerate(given):
            if not isinstance(layer, Layer):
                hint = "; did you mean an object, with ()?" if isinstance(layer, type) else "."
                raise ArgumentTypeError(f"{type(self).__name__}: item {i} is {layer!r}, not a layer{hint}")
            if any(layer is other for other in given[:i]):
                raise StateError(
                    f"Sequential: the same {type(layer).__name__} object stands at {given.index(layer)} and {i}; "
                    "one layer object has one place. Make a second layer."
                )

    def build(self, input_shape: Shape) -> Shape:
        shape = input_shape
        for i, layer in enumerate(self.layers):
            shape = layer.place(self.context, self._qualified(str(i)), shape)
        return shape

    def forward(self, x: Array) -> Array:
        for layer, shape in self._walk:
            x = layer.forward(x)
            if getattr(x, "shape", (0,))[1:] != shape:
                raise self._broken_promise(layer, shape, x)
        return x

    def backward(self, grad_y: Array) -> Array | None:
        """The chain rule: each layer turns the gradient of its output into that of its input, last layer first.

        Where nobody wants the gradient of the input, the walk ends at the first layer that has parameters; and where
        that is an Embedding, it ends there in any case, for whole numbers have no gradient.
        """
        grad: Array | None = grad_y
        learns = self._first_with_parameters
        first = 0 if self.wants_input_grad else learns
        for i in range(len(self._walk) - 1, first - 1, -1):
            layer, _ = self._walk[i]
            wanted = self.wants_input_grad or i > first
            if layer.wants_input_grad is not wanted:
                layer.wants_input_grad = wanted
            grad = layer.backward(grad)
            if grad is None and i == learns:
                return None
        return grad if self.wants_input_grad else None

    def run(self, x: Array, training: bool = False, inference: bool = False) -> Array:
        """A whole pass, for training loops: the result is a buffer, good until the next pass.

        `training` turns dropout on; `inference` is a pass without a way back, which leaves alone what an earlier
        pass has kept for its backward.
        """
        context = self.context
        before = context.training, context.inference
        context.training, context.inference = training, inference
        try:
            with self.working(len(x)):
                y = Sequential.forward(self, x)
        finally:
            if inference:
                context.training, context.inference = before
        if y.dtype != context.dtype:
            raise self._broken_promise(self.layers[-1], self.output_shape, y)
        return y

    def run_back(self, grad_y: Array, input_grad: bool = True) -> Array | None:
        """The way back of the latest `run` that was not inference; fills all gradients."""
        if self.wants_input_grad is not input_grad:
            self.wants_input_grad = input_grad
        with self.working():
            return Sequential.backward(self, grad_y)

    def working(self, samples: int | None = None) -> AbstractContextManager[Any]:
        """For a step, or a pass: on the CPU, compiled loops, where they pay; in shards where any layer works so.

        A pass of a single sample has nothing to share out, and leaves the threads to the BLAS. On a GPU, with products
        in the model's precision.
        """
        if self.context.precision is not None:
            return self.backend.products(self.context.precision)
        if self.works_in_shards or self.context.store.values.size >= _WORTH_COMPILING:
            return self.backend.working(self.works_in_shards and samples != 1)
        return nullcontext()

    def check_inputs(self, x: Array, name: str) -> None:
        """As the first layer that does not pass on whatever comes."""
        first = next((layer for layer in self.layers if layer.accepts_integers is not None), None)
        if first is not None:
            first.check_inputs(x, name)

    @functools.cached_property
    def _walk(self) -> list[tuple[Layer, Shape]]:
        """Each layer, and the shape that it gives, in the order of work.

        A MaxPool2D goes before the ReLU that it follows, which then has less to do. It is the same function:
        max(relu(a), relu(b)) = relu(max(a, b)), and gradients pass to the same pixels.
        """
        walk = [(layer, layer.output_shape) for layer in self._way]
        for i in range(1, len(walk)):
            (earlier, _), (later, shape) = walk[i - 1 : i + 1]
            if later.picks_largest and earlier.keeps_largest:
                walk[i - 1], walk[i] = (later, shape), (earlier, shape)
        return walk

    @property
    def _way(self) -> tuple[Layer, ...]:
        """The layers that stand one after the other: here, all."""
        return self.layers

    def _broken_promise(self, layer: Layer, shape: Shape, y: Any) -> ShapeError:
        got = f"{tuple(y.shape)} of {y.dtype}" if hasattr(y, "dtype") else repr(y)
        return ShapeError(
            f"layer {layer.path} ({type(layer).__name__}) was to give (N, {str(shape)[1:]} of {self.context.dtype}, as "
            f"its build says, but its forward gave {got}."
        )

    @functools.cached_property
    def _first_with_parameters(self) -> int:
        return next((i for i, (layer, _) in enumerate(self._walk) if layer.parameters), len(self._walk))

    @property
    def accepts_integers(self) -> bool | None:  # type: ignore[override]
        """As the first layer that does not pass on whatever comes."""
        return next((layer.accepts_integers for layer in self.layers if layer.accepts_integers is not None), None)

    @functools.cached_property
    def works_in_shards(self) -> bool:  # type: ignore[override]
        return any(layer.works_in_shards for layer in self.layers)

    @property
    def gives_probabilities(self) -> bool:  # type: ignore[override]
        telling = [layer for layer in self.layers if layer.accepts_integers is not None]
        return bool(telling) and telling[-1].gives_probabilities

    @property
    def parameters(self) -> list[Parameter]:
        return [parameter for layer in self.layers for parameter in layer.parameters]

    @property
    def trainable(self) -> bool:
        learning = [layer for layer in self.layers if layer.parameters]
        return any(layer.trainable for layer in learning or self.layers)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        for layer in self.layers:
            layer.trainable = value

    def forget_work(self, inference: bool = False) -> None:
        super().forget_work(inference)
        for layer in self.layers:
            layer.forget_work(inference)

    def place(self, context: Context, path: str, input_shape: Shape) -> Shape:
        for i, layer in enumerate(self.layers):
            if layer.is_built:
                raise StateError(
                    f"layer {i} of this Sequential, a {type(layer).__name__}, is built already and has "
                    "a place: one layer object has one place. Make a new layer."
                )
        return super().place(context, path, input_shape)

    def unplace(self) -> None:
        mine = self._context
        super().unplace()
        for name in ("_walk", "_first_with_parameters", "works_in_shards"):
            self.__dict__.pop(name, None)
        for layer in self.layers:
            if layer._context is mine:  # one that stands in another model stays there
                layer.unplace()

    def get_config(self) -> dict[str, Any]:
        return {"layers": list(self.layers)}
