"""Values of an ONNX graph: tensors that layers compute, constants, and constants that depend on the size of the batch.

ONNX operators expect images with channels first, and xpnet's images have channels last, so every tensor records the
order of its axes in the file. Recurrent operators expect the batch on axis 1, and attention often merges it with the
heads: such tensors are `Rearranged`.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
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


#: The batches for which values that depend on the size of the batch are computed.
BATCH_SIZES = (1, 2, 3, 1009)


class Size(NamedTuple):
    """The size of an axis: `number`, times the size of the batch if `of_batch`."""

    number: int
    of_batch: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Varying:
    """A value that depends only on the size of the batch, such as a shape: what it is for each of BATCH_SIZES."""

    values: tuple[Constant, ...]

    @property
    def dtype(self) -> numpy.dtype[Any]:
        dtype: numpy.dtype[Any] = self.values[0].dtype
        return dtype

    def sizes(self) -> list[Size]:
        """The value as sizes of axes. Raises ArgumentError if it is not a vector of them."""
        columns = zip(*(value.reshape(-1).tolist() for value in self.values), strict=True)
        return [_size(column) for column in columns]

    def of_one_sample(self) -> Constant | None:
        """The value for a batch of 1, if a larger batch has it repeated along axis 0; None otherwise."""
        first = self.values[0]
        for batch, value in zip(BATCH_SIZES, self.values, strict=True):
            if value.shape != (batch, *first.shape[1:]) or (value != first).any():
                return None
        return first


def _size(numbers: Sequence[int]) -> Size:
    """The size of an axis that is these numbers for BATCH_SIZES."""
    first = numbers[0]  # for a batch of 1
    for size in (Size(first), Size(first, of_batch=True)):
        if all(n == first * (batch if size.of_batch else 1) for n, batch in zip(numbers, BATCH_SIZES, strict=True)):
            return size
    raise ArgumentError(f"it computes {', '.join(map(str, numbers))} from batches of {BATCH_SIZES}")


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A call of a layer on the outputs of earlier calls; or an input of the graph, which has no layer and no inputs.

    layer: None for an input.  weights: by their names in xpnet. Equal layers with the same weights become one shared
    layer.  shape: of a sample of the output.
    """

    layer: Any
    weights: dict[str, Constant]
    inputs: tuple["Call", ...]
    shape: Shape


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of the graph: the call that computes it, with the order of its axes in xpnet.

    dtype: in the file.  channels_first: whether the features, on the last axis in xpnet, are on axis 1 in the file.
    settled: whether the dtype affects the values, so that a cast to another dtype would change them.  compared: the
    dtype of the operands of a comparison, whose bool result xpnet has as 0 or 1 in that dtype.
    """

    call: Call
    dtype: numpy.dtype[Any]
    channels_first: bool = False
    settled: bool = False
    compared: numpy.dtype[Any] | None = None

    @property
    def shape(self) -> Shape:
        """The shape of a sample in xpnet."""
        return self.call.shape

    @property
    def file_shape(self) -> Shape:
        """The shape of a sample in the file."""
        return tuple(file_shape(self.shape, self.channels_first))

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
        if computes:
            _check_floats(dtype)
        if any(a.dtype != dtype for a in given.values()):
            raise ArgumentError(f"its weights are not of {dtype}, as its input is")
        first = self.channels_first if channels_first is None else channels_first
        call = Call(layer, given, (self.call,), shape)
        return Tensor(call, dtype, first and len(shape) > 1, self.settled or computes, self.compared)

    def replace_last(self, layer: Layer, **weights: Any) -> "Tensor":
        """The same with another layer in place of the last one, which has one input."""
        (before,) = self.call.inputs
        return dataclasses.replace(self, call=before).add(layer, **weights)

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

    def with_channels_first(self, channels_first: bool) -> "Tensor":
        """The tensor with the same values in xpnet, and another order of axes in the file."""
        return dataclasses.replace(self, channels_first=channels_first)

    def in_file_order(self) -> "Tensor":
        """The same with its axes in the order of the file, by a Permute layer."""
        return self._permuted if self.channels_first else self

    def with_features_last(self) -> "Tensor":
        """The same with axis 1 of the file last, as xpnet's layers have the features, by a Permute layer."""
        return self if self.channels_first or len(self.shape) == 1 else self._permuted

    @functools.cached_property
    def _permuted(self) -> "Tensor":
        """The same in the other order of axes: one call for all uses, so that attention recognizes what they share."""
        axes = range(len(self.shape))
        order = (axes[-1], *axes[:-1]) if self.channels_first else (*axes[1:], 0)
        return self.add(layers.Permute(order), channels_first=not self.channels_first)


@dataclasses.dataclass(frozen=True, eq=False)
class Rearranged:
    """A tensor whose batch is not on axis 0 of the file, or shares an axis with features.

    tensor: the same with the batch first, in the order of the file.  axes: for each axis of the file, the axes of the
    tensor that it consists of, the outermost first. Axis 0 is the batch. Axes of size 1 may be missing.
    """

    tensor: Tensor
    axes: tuple[tuple[int, ...], ...]

    @property
    def dtype(self) -> numpy.dtype[Any]:
        """The dtype in the file."""
        return self.tensor.dtype

    @property
    def sizes(self) -> list[Size]:
        """The shape in the file, with the batch."""
        shape = self.tensor.shape
        return [Size(math.prod(shape[axis - 1] for axis in group if axis), 0 in group) for group in self.axes]


def axes_of(x: Tensor | Rearranged) -> Rearranged:
    """x with a description of its axes."""
    if isinstance(x, Rearranged):
        return x
    return Rearranged(x.in_file_order(), tuple((axis,) for axis in range(len(x.shape) + 1)))


def rearranged(tensor: Tensor, axes: Sequence[Sequence[int]]) -> Tensor | Rearranged:
    """A tensor whose axes, the batch as axis 0, are joined in these groups. One with the batch first is a Tensor.

    Axes of size 1 may be missing. Raises ArgumentError if the batch would be the only axis.
    """
    shape = tensor.shape
    groups = tuple(tuple(axis for axis in group if axis == 0 or shape[axis - 1] != 1) for group in axes)
    if groups[0] != (0,):
        return Rearranged(tensor, groups)
    order = [axis - 1 for group in groups for axis in group if axis]
    order += [axis for axis in range(len(shape)) if axis not in order]
    y = tensor if order == sorted(order) else tensor.add(layers.Permute(order))
    sizes = [math.prod(shape[axis - 1] for axis in group) for group in groups[1:]]
    return y if sizes == list(y.shape) else reshaped(y, sizes)


def with_features_last(x: Rearranged) -> Rearranged:
    """x with its last axis in the file as the last axis of the tensor. The batch must not be on that axis."""
    before, features = [axis for group in x.axes[:-1] for axis in group if axis], x.axes[-1]
    tensor = rearranged(x.tensor, [(0,), *([axis] for axis in before), features])
    assert isinstance(tensor, Tensor)
    place = {0: 0} | {axis: 1 + i for i, axis in enumerate(before)}
    axes = [tuple(place[axis] for axis in group) for group in x.axes[:-1]]
    return Rearranged(tensor, (*axes, (len(before) + 1,)))


def batch_first(x: Tensor | Rearranged) -> tuple[Tensor, int]:
    """x with the batch first, in the order of the file otherwise, and the axis of the batch in the file.

    Raises ArgumentError if the batch has no axis of its own.
    """
    x = axes_of(x)
    if (0,) not in x.axes:
        raise ArgumentError("an axis has both the batch and features")
    position = x.axes.index((0,))
    first = rearranged(x.tensor, [(0,), *x.axes[:position], *x.axes[position + 1 :]])
    assert isinstance(first, Tensor)
    return first, position


def with_batch_at(x: Tensor, position: int) -> Tensor | Rearranged:
    """The reverse of `batch_first`."""
    if position == 0:
        return x
    axes = [(axis,) for axis in range(1, len(x.shape) + 1)]
    return Rearranged(x.in_file_order(), (*axes[:position], (0,), *axes[position:]))


def reshaped(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """x with samples of another shape, in the order of the file. Raises ArgumentError if they have no axis."""
    if not sizes:
        raise ArgumentError("it leaves samples without an axis")
    return x.in_file_order().add(layers.Reshape(sizes) if len(sizes) > 1 else layers.Flatten())


def joined(layer: Layer, tensors: Sequence[Tensor], **weights: Constant) -> Tensor:
    """The output of a layer with several inputs, which have one dtype and one order of axes."""
    first = tensors[0]
    _check_floats(first.dtype)
    shape = _built_shape(layer, [x.shape for x in tensors], weights)
    call = Call(layer, weights, tuple(x.call for x in tensors), shape)
    return Tensor(call, first.dtype, first.channels_first, settled=True)


def calls_before(outputs: Iterable[Call]) -> list[Call]:
    """All calls that these depend on, and they themselves, each after its inputs."""
    order, seen = list[Call](), set[Call]()
    waiting = [(call, False) for call in reversed(list(outputs))]
    while waiting:
        call, inputs_done = waiting.pop()
        if inputs_done:
            order.append(call)
        elif call not in seen:
            seen.add(call)
            waiting.append((call, True))
            waiting += [(before, False) for before in reversed(call.inputs)]
    return order


def copy_of(layer: Layer) -> Layer:
    """A new layer with the same arguments as one that is not built."""
    return copy.deepcopy(layer)


def file_shape(shape: Sequence[int], channels_first: bool) -> list[int]:
    """The shape that a sample of this shape has in the file."""
    return [shape[-1], *shape[:-1]] if channels_first else list(shape)


def transposition(axes: int, channels_first: bool) -> list[int]:
    """The permutation that moves channels to the front, or back to the end, of samples with this number of axes."""
    return [0, axes, *range(1, axes)] if channels_first else [0, *range(2, axes + 1), 1]


def _check_floats(dtype: numpy.dtype[Any]) -> None:
    if dtype.name not in ("float32", "float64"):
        raise ArgumentError(f"it computes in {dtype}, and xpnet's layers in float32 or float64")


def _built_shape(layer: Layer, shape: Shape | list[Shape], weights: dict[str, Constant]) -> Shape:
    """The layer's output shape. Every parameter and buffer must be among the weights, and nothing else."""
    backend = get_backend("cpu")
    store = ParameterStore(backend, "float32")  # declares parameters, and allocates none
    output: Shape = copy_of(layer).place(Context(backend, store, 0), "", shape)
    declared = {p.name: p.shape for p in store.parameters} | {b.name: b.value.shape for b in store.buffers}
    given = {name: a.shape for name, a in weights.items()}
    if declared != given:
        raise ArgumentError(f"{type(layer).__name__} has the weights {declared}, and the file gives {given}")
    return output


def shared_key(call: Call) -> Any:
    """What all calls of one layer have in common: its arguments, and the memory of its weights."""
    if not call.weights:
        return call
    weights = [(name, a.__array_interface__["data"], a.shape, a.strides) for name, a in call.weights.items()]
    return type(call.layer), repr(call.layer), *weights
