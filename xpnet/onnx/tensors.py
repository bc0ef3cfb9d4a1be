"""Values of an ONNX graph: tensors that layers compute, constants, and shapes that contain the size of the batch.

ONNX operators expect images with channels first, and xpnet's images have channels last, so every tensor records the
order of its axes in the file.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy

from xpnet import layers
from xpnet.backends import get_backend
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer
from xpnet.layers.context import Context, Shape
from xpnet.parameters import ParameterStore

Constant: TypeAlias = numpy.ndarray[Any, Any]


class _BatchSize:
    """A placeholder for the size of the batch in a shape."""

    def __repr__(self) -> str:
        return "N"


BATCH = _BatchSize()


class ShapeVector(NamedTuple):
    """Integers, some of which are the size of the batch, which is not known: where `batch` is 1."""

    numbers: Constant
    batch: Constant

    @property
    def dtype(self) -> numpy.dtype[Any]:
        dtype: numpy.dtype[Any] = self.numbers.dtype
        return dtype


class LoadedLayer(NamedTuple):
    """A layer, its weights by their names in xpnet, and the shape of a sample of its output.

    branches: of a sum, the layers of its two branches; `layer` is then a placeholder.
    """

    layer: Layer
    weights: dict[str, Constant]
    shape: Shape
    branches: tuple[tuple["LoadedLayer", ...], ...] = ()


class Chain(NamedTuple):
    """Layers one after the other: the last one, those before, and how many there are."""

    last: LoadedLayer
    before: "Chain | None"
    length: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of the graph: the layers that compute it from the input, and the shape of a sample in xpnet.

    dtype: in the file.  channels_first: whether the features, on the last axis in xpnet, are on axis 1 in the file.
    settled: whether the dtype affects the values, so that a cast to another dtype would change them.  compared: the
    dtype of the operands of a comparison, whose bool result xpnet has as 0 or 1 in that dtype.
    """

    chain: Chain | None
    input_shape: Shape
    shape: Shape
    dtype: numpy.dtype[Any]
    channels_first: bool = False
    settled: bool = False
    compared: numpy.dtype[Any] | None = None

    @property
    def file_shape(self) -> Shape:
        """The shape of a sample in the file."""
        return tuple(file_shape(self.shape, self.channels_first))

    @property
    def last(self) -> LoadedLayer | None:
        return self.chain.last if self.chain else None

    def add(
        self, layer: Layer, channels_first: bool | None = None, dtype: numpy.dtype[Any] | None = None, **weights: Any
    ) -> "Tensor":
        """The output of a layer with this input.

        channels_first: of the output; None means as in the input. dtype: of an Embedding's output.
        """
        given = {name: a for name, a in weights.items() if a is not None}
        dtype = dtype or self.dtype
        shape = _built_shape(layer, self.shape, given)
        computes = layer.accepts_integers is not None
        if computes and dtype.name not in ("float32", "float64"):
            raise ArgumentError(f"it computes in {dtype}, and xpnet's layers in float32 or float64")
        if any(a.dtype != dtype for a in given.values()):
            raise ArgumentError(f"its weights are not of {dtype}, as its input is")
        chain = _longer(self.chain, LoadedLayer(layer, given, shape))
        first = self.channels_first if channels_first is None else channels_first
        settled = self.settled or computes
        return Tensor(chain, self.input_shape, shape, dtype, first and len(shape) > 1, settled, self.compared)

    def replace_last(self, layer: Layer, **weights: Any) -> "Tensor":
        """The same with another layer in place of the last one."""
        chain = self.chain
        assert chain is not None
        shape = chain.before.last.shape if chain.before else self.input_shape
        before = dataclasses.replace(self, chain=chain.before, shape=shape)
        return before.add(layer, **weights)

    def with_cast(self, dtype: numpy.dtype[Any]) -> "Tensor":
        """The same in another dtype, if no layer is needed that converts it: the model reads its input in that dtype.

        Raises ArgumentError if the cast would change values.
        """
        if dtype == self.dtype:
            return self
        if self.compared is not None and dtype == self.compared:  # NumPy's float64 equals None
            return dataclasses.replace(self, dtype=dtype, compared=None)
        exact = numpy.can_cast(self.dtype, dtype, "safe")
        if self.settled or not (exact or (dtype.kind == "f" and dtype.itemsize >= 4)):
            raise ArgumentError(f"xpnet has no layer that converts {self.dtype} to {dtype}")
        return dataclasses.replace(self, dtype=dtype, settled=not exact)

    def as_comparison(self) -> "Tensor":
        """The same with 0 and 1 for False and True."""
        return dataclasses.replace(self, dtype=numpy.dtype(bool), compared=self.dtype)

    def with_sum(self, start: Chain | None, *branches: tuple[LoadedLayer, ...]) -> "Tensor":
        """The sum of two branches that begin after `start`, whose shape and order of axes this tensor has."""
        return dataclasses.replace(self, chain=_longer(start, LoadedLayer(layers.Identity(), {}, self.shape, branches)))

    def with_channels_first(self, channels_first: bool) -> "Tensor":
        """The tensor with the same values in xpnet, and another order of axes in the file."""
        return dataclasses.replace(self, channels_first=channels_first)

    def in_file_order(self) -> "Tensor":
        """The same with its axes in the order of the file, by a Permute layer."""
        axes = len(self.shape)
        return (
            self.add(layers.Permute((axes - 1, *range(axes - 1))), channels_first=False)
            if self.channels_first
            else self
        )

    def with_features_last(self) -> "Tensor":
        """The same with axis 1 of the file last, as xpnet's layers have the features, by a Permute layer."""
        axes = len(self.shape)
        if self.channels_first or axes == 1:
            return self
        return self.add(layers.Permute((*range(1, axes), 0)), channels_first=True)

    def layers_after(self, start: Chain | None) -> tuple[LoadedLayer, ...]:
        """The layers of this tensor's chain after those of an earlier one."""
        found, chain = [], self.chain
        while chain is not start:
            assert chain is not None
            found.append(chain.last)
            chain = chain.before
        return tuple(reversed(found))


def common_chain(a: Chain | None, b: Chain | None) -> Chain | None:
    """The longest chain that both begin with."""
    while a is not b:
        if a is not None and (b is None or a.length >= b.length):
            a = a.before
        elif b is not None:
            b = b.before
    return a


def _longer(chain: Chain | None, loaded: LoadedLayer) -> Chain:
    return Chain(loaded, chain, chain.length + 1 if chain else 1)


def layer_depths(chain: Sequence[LoadedLayer], depth: int = 0) -> dict[int, int]:
    """How many branches each layer of a chain is nested in, by the id of the LoadedLayer."""
    found: dict[int, int] = {}
    for loaded in chain:
        found[id(loaded)] = depth
        for branch in loaded.branches:
            found |= layer_depths(branch, depth + 1)
    return found


def copy_of(layer: Layer) -> Layer:
    """A new layer with the same arguments as one that is not built."""
    return copy.copy(layer)


def file_shape(shape: Sequence[int], channels_first: bool) -> list[int]:
    """The shape that a sample of this shape has in the file."""
    return [shape[-1], *shape[:-1]] if channels_first else list(shape)


def transposition(axes: int, channels_first: bool) -> list[int]:
    """The permutation that moves channels to the front, or back to the end, of samples with so many axes."""
    return [0, axes, *range(1, axes)] if channels_first else [0, *range(2, axes + 1), 1]


def _built_shape(layer: Layer, shape: Shape, weights: dict[str, Constant]) -> Shape:
    """The layer's output shape. Every parameter and buffer must be among the weights, and nothing else."""
    backend = get_backend("cpu")
    store = ParameterStore(backend, "float32")  # declares parameters, and allocates none
    output: Shape = copy_of(layer).place(Context(backend, store, 0), "", shape)
    declared = {p.name: p.shape for p in store.parameters} | {b.name: b.value.shape for b in store.buffers}
    given = {name: a.shape for name, a in weights.items()}
    if declared != given:
        raise ArgumentError(f"{type(layer).__name__} has the weights {declared}, and the file gives {given}")
    return output
