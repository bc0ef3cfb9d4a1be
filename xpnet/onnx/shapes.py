"""Convert ONNX operators that move, join or split axes, and those that take a part of an axis."""

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy

from xpnet import layers
from xpnet.errors import ArgumentError
from xpnet.onnx import folding, patterns
from xpnet.onnx.elementwise import joined_by, plus_rows
from xpnet.onnx.reader import Node, Value, converts
from xpnet.onnx.tensors import (
    BATCH,
    BATCH_SIZES,
    Constant,
    Rearranged,
    Size,
    Tensor,
    Varying,
    axes_of,
    batch_first,
    rearranged,
    reshaped,
    transposition,
    with_batch_at,
)

# Moving axes ----------------------------------------------------------------------------------------------------------


@converts("Transpose")
def _transpose(node: Node) -> Value:
    x = node.rearranged()
    axes = len(axes_of(x).axes)
    perm = node.attribute("perm", list(range(axes - 1, -1, -1)))
    if sorted(perm) != list(range(axes)):
        raise node.error(f"in the order {perm} does not fit {axes} axes")
    if isinstance(x, Tensor) and axes > 2 and perm == transposition(axes - 1, channels_first=not x.channels_first):
        is_relabeled = x.channels_first or not isinstance(x.call.layer, layers.Reshape)
        if is_relabeled:  # what a Reshape gives, such as patches of an image, need not have its features last
            return x.with_channels_first(not x.channels_first)
    x = axes_of(x)
    return rearranged(x.tensor, [x.axes[axis] for axis in perm])


@converts("DepthToSpace", "SpaceToDepth")
def _depth_to_space(node: Node) -> Tensor:
    x, block = node.tensor().in_file_order(), node.attribute("blocksize")
    if len(x.shape) != 3:
        raise node.error(f"is supported for images (N, C, H, W), not for samples of shape {x.shape}")
    channels, height, width = x.shape
    channels_first = node.attribute("mode", "DCR") == "CRD"
    if node.operator == "DepthToSpace":
        inner = channels // block**2
        apart = (inner, block, block, height, width) if channels_first else (block, block, inner, height, width)
        order = (0, 3, 1, 4, 2) if channels_first else (2, 3, 0, 4, 1)
        shape = (inner, height * block, width * block)
    else:
        apart = (channels, height // block, block, width // block, block)
        order = (0, 2, 4, 1, 3) if channels_first else (2, 4, 0, 1, 3)
        shape = (channels * block**2, height // block, width // block)
    return x.add(layers.Reshape(apart)).add(layers.Permute(order)).add(layers.Reshape(shape)).with_features_last()


# Joining and splitting axes -------------------------------------------------------------------------------------------


@converts("Flatten")
def _flatten(node: Node) -> Tensor:
    x = node.tensor()
    axis, shape = node.attribute("axis"), x.file_shape
    axis += len(shape) + 1 if axis < 0 else 0
    if axis == 0 or math.prod(shape[: axis - 1]) != 1:
        raise node.error(f"with axis {axis} flattens the batch axis")
    return reshaped(x, [math.prod(shape[axis - 1 :])])


@converts("Reshape", since=5)
def _reshape(node: Node) -> Value:
    x, target = node.rearranged(), node.multiples(1, "shape")
    shape = axes_of(x).sizes
    if Size(0) in target and node.attribute("allowzero", 0):
        raise node.error(f"to {_text(target)} with allowzero is not supported")
    node.ignore("allowzero")
    if any(size == Size(0) and i >= len(shape) for i, size in enumerate(target)):
        raise node.error(f"to {_text(target)} copies sizes of axes that samples {_text(shape)} do not have")
    target = [shape[i] if size == Size(0) else size for i, size in enumerate(target)]
    if isinstance(x, Tensor) and (sizes := _of_samples(x, target, node.batch_size)):
        return patterns.group_norm(node, sizes) or reshaped(x, sizes)
    groups = _grouped(axes_of(x), target, node.batch_size)
    if groups is None:
        raise node.error(f"of {_text(shape)} to {_text(target)} changes the batch axis")
    return rearranged(*groups)


def _of_samples(x: Tensor, target: Sequence[Size], batch_size: int | None) -> list[int] | None:
    """The shape of a sample after a Reshape of x to this shape, or None if it does not keep the batch on axis 0."""
    batch = batch_size or _ANY_BATCH
    numbers = _numbers(target, batch, batch * math.prod(x.shape))
    is_batch = target[0].of_batch or target[0].number in (-1, batch_size)
    return numbers[1:] if is_batch and numbers[0] == batch and not any(n.of_batch for n in target[1:]) else None


def _text(sizes: Sequence[Size]) -> str:
    """A shape in the file, for messages."""
    names = [("N" if size.number == 1 else f"{size.number}N") if size.of_batch else str(size.number) for size in sizes]
    return f"({', '.join(names)})"


@dataclasses.dataclass(eq=False)
class _Part:
    """A part of an axis of a tensor."""

    size: int


#: In place of the size of the batch if the file does not fix it. No axis is likely to be a multiple of it.
_ANY_BATCH = 1_000_003


def _grouped(x: Rearranged, target: Sequence[Size], batch_size: int | None) -> tuple[Tensor, list[list[int]]] | None:
    """(tensor, axes) with which `rearranged` gives x in the shape `target`; None if not every batch has that shape.

    Axes are split into parts, so that each axis of the target is a sequence of parts. The batch is never split.
    """
    batch = batch_size or _ANY_BATCH
    parts = [[_Part(batch)], *([_Part(n)] for n in x.tensor.shape)]  # of each axis of x.tensor
    whole_batch, waiting = parts[0][0], deque(part for group in x.axes for axis in group for part in parts[axis])
    groups = list[list[_Part]]()
    for size in _numbers(target, batch, total=batch * math.prod(x.tensor.shape)):
        group, left = list[_Part](), size
        # The last condition takes a batch of 1, which any group could have, as an axis of its own.
        while left > 1 or (left == batch and not group and waiting and waiting[0] is whole_batch):
            if not waiting:
                return None
            part = waiting.popleft()
            if left % part.size and part.size % left == 0 and part is not whole_batch:
                rest, part.size = _Part(part.size // left), left
                (axis,) = [axis for axis in parts if part in axis]
                axis.insert(axis.index(part) + 1, rest)
                waiting.appendleft(rest)
            if left % part.size:
                return None
            left //= part.size
            group.append(part)
        groups.append(group)
    if any(part.size != 1 for part in waiting):
        return None
    if batch_size is None and any(
        size.number != -1 and size.of_batch != (whole_batch in group)
        for size, group in zip(target, groups, strict=True)
    ):
        return None
    order = [part for axis in parts for part in axis]
    sizes = [part.size for part in order[1:]]
    tensor = x.tensor if sizes == list(x.tensor.shape) else reshaped(x.tensor, sizes)
    return tensor, [[order.index(part) for part in group] for group in groups]


def _numbers(target: Sequence[Size], batch: int, total: int) -> list[int]:
    """The sizes as numbers, for a batch of this size. -1 stands for what is left of the total."""
    numbers = [size.number * batch if size.of_batch else size.number for size in target]
    known = -math.prod(numbers) if -1 in numbers else math.prod(numbers)
    if numbers.count(-1) > 1 or known < 1 or total % known:
        raise ArgumentError(f"it changes the batch axis: the shape {_text(target)} does not fit every batch")
    return [total // known if n == -1 else n for n in numbers]


@converts("Squeeze")
def _squeeze(node: Node) -> Value:
    x, given = node.rearranged(), node.list_of("axes", 1)
    whole = axes_of(x)
    if given is None:
        if node.batch_size in (None, 1):
            raise node.error("without axes would remove the batch axis of a single sample")
        given = [axis for axis, size in enumerate(whole.sizes) if size == Size(1)]
    axes = [node.axis(axis, len(whole.axes)) for axis in given]
    if any(whole.sizes[axis] != Size(1) for axis in axes):
        raise node.error(f"removes the axes {axes} of {_text(whole.sizes)}, which are not all 1; axis 0 is the batch")
    return rearranged(whole.tensor, [group for axis, group in enumerate(whole.axes) if axis not in axes])


@converts("Unsqueeze")
def _unsqueeze(node: Node) -> Value:
    x, given = axes_of(node.rearranged()), node.list_of("axes", 1) or []
    axes = sorted(node.axis(axis, len(x.axes) + len(given)) for axis in given)
    if len(set(axes)) < len(axes):
        raise node.error(f"has the axes {given}, one of them twice")
    groups = list(x.axes)
    for axis in axes:
        groups.insert(axis, ())
    return rearranged(x.tensor, groups)


@converts("Expand")
def _expand(node: Node) -> Tensor:
    """Copies of images of one row or column; a shape that changes nothing."""
    x, target = node.tensor(), node.sizes(1, "shape")
    shape: list[Any] = [node.batch_size or BATCH, *x.file_shape]
    sizes = [1] * (len(shape) - len(target)) + [node.batch_size or n if n is BATCH else n for n in target]
    times: dict[int, Any] = {axis: n for axis, (n, m) in enumerate(zip(sizes, shape, strict=False)) if n not in (1, m)}
    is_image = len(shape) == 4 and times.keys() <= {2, 3} and all(shape[axis] == 1 for axis in times)
    if len(target) > len(shape) or (times and not is_image):
        raise node.error(f"of samples of shape {x.file_shape} to {target} is not supported")
    return x.with_features_last().add(layers.Upsample2D((times.get(2, 1), times.get(3, 1)))) if times else x


@converts("Shape")
def _shape(node: Node) -> Value:
    x = node.value(0)
    part = slice(node.attribute("start", 0), node.attribute("end"))
    if isinstance(x, numpy.ndarray):
        return numpy.array(x.shape[part], numpy.int64)
    if isinstance(x, Varying):
        return folding.varying([numpy.array(value.shape[part], numpy.int64) for value in x.values])
    sizes = axes_of(node.rearranged()).sizes[part]
    return folding.varying([numpy.array(_numbers(sizes, batch, 0), numpy.int64) for batch in BATCH_SIZES])


# Joining tensors, and parts of them -----------------------------------------------------------------------------------


@converts("Concat", since=4)
def _concat(node: Node) -> Value:
    given = [node.value(i) for i in range(len(node.values))]
    if len(given) == 2 and not all(isinstance(x, Tensor | Rearranged) for x in given):
        return _with_constant_steps(node)
    if any(isinstance(x, Rearranged) for x in given):
        return _concat_rearranged(node, [node.rearranged(i) for i in range(len(given))])
    tensors = [node.tensor(i) for i in range(len(given))]
    first = any(x.channels_first for x in tensors)
    axes = len(tensors[0].shape)
    (axis,) = node.axes([node.attribute("axis")], axes + 1)
    if len(tensors) == 1:
        return tensors[0]
    position = axis - 1 if not first else axes - 1 if axis == 1 else axis - 2
    return joined_by(node, layers.Concatenate(position), tensors)


def _concat_rearranged(node: Node, given: Sequence[Tensor | Rearranged]) -> Value:
    tensors, positions = zip(*map(batch_first, given), strict=True)
    axis = _axis_of_sample(node, node.attribute("axis"), given[0])
    if len(set(positions)) > 1:
        raise node.error(f"has the batch on the axes {positions}")
    if len(tensors) == 1:
        return given[0]
    return with_batch_at(joined_by(node, layers.Concatenate(axis), tensors), positions[0])


def _with_constant_steps(node: Node) -> Tensor:
    """Constant steps, such as a class token, before or after a sequence (N, T, C): zeros to which they are added."""
    index = 0 if isinstance(node.value(1), Tensor) else 1
    steps, x = _of_one_sample(node, index), node.tensor(1 - index).in_file_order()
    (axis,) = node.axes([node.attribute("axis")], len(x.shape) + 1)
    if len(x.shape) != 2 or axis != 1 or steps.shape[2:] != x.shape[1:]:
        raise node.error(f"of samples of shape {x.shape} and a constant of shape {steps.shape} is not supported")
    count, (length, features) = steps.shape[1], x.shape
    before, after = (count, 0) if index == 0 else (0, count)
    image = x.add(layers.Reshape((length, 1, features))).add(layers.ZeroPadding2D(((before, after), (0, 0))))
    zeros = numpy.zeros((length, features), x.dtype)
    return plus_rows(
        reshaped(image, (length + count, features)), numpy.concatenate([steps[0], zeros][:: 1 - 2 * index])
    )


def _of_one_sample(node: Node, index: int) -> Constant:
    """An input that is the same for all samples, as that of one sample."""
    value = node.value(index)
    if isinstance(value, Varying):
        one = value.of_one_sample()
    elif isinstance(value, numpy.ndarray) and value.ndim and len(value) == node.batch_size:
        one = value[:1] if (value == value[:1]).all() else None
    else:
        one = None
    if one is None:
        raise node.error("of a tensor and a constant that is not the same for all samples is not supported")
    return one


@converts("Gather")
def _gather(node: Node) -> Value:
    table, index, axis = node.value(0), node.value(1), node.attribute("axis")
    if isinstance(index, Tensor) and isinstance(table, numpy.ndarray) and table.ndim == 2 and axis == 0:
        return index.in_file_order().add(layers.Embedding(*table.shape), dtype=table.dtype, weight=table)
    if not isinstance(table, Tensor | Rearranged) or not isinstance(index, numpy.ndarray):
        raise node.error("is supported only as an embedding, of the rows of a constant (rows, features), or of a part")
    size = axes_of(table).sizes[node.axis(axis, len(axes_of(table).axes))].number
    numbers = [int(n) + (size if n < 0 else 0) for n in index.reshape(-1)]
    if index.ndim > 1 or not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise node.error(f"of the elements {index.tolist()} is not supported, only of one or of adjacent ones")
    part = _part(node, table, axis, numbers[0], numbers[-1] + 1)
    if index.ndim == 1:
        return part
    whole = axes_of(part)
    dropped = node.axis(axis, len(whole.axes))
    return rearranged(whole.tensor, [group for i, group in enumerate(whole.axes) if i != dropped])


@converts("Slice")
def _slice(node: Node) -> Value:
    x = node.rearranged()
    starts, stops = node.list_of("starts", 1) or [], node.list_of("ends", 2) or []
    axes = node.list_of("axes", 3)
    steps = None if node.version < 10 else node.optional(4, "step")
    if len(starts) != len(stops) or len(axes or starts) != len(starts) or (steps is not None and (steps != 1).any()):
        raise node.error(f"from {starts} to {stops} along {axes} in steps {steps} is not supported")
    for axis, start, stop in zip(range(len(starts)) if axes is None else axes, starts, stops, strict=True):
        whole = axes_of(x)
        size = whole.sizes[node.axis(axis, len(whole.axes))]
        if not (start == 0 and stop >= _END):
            if size.of_batch:
                raise node.error("of a part of the batch is not supported")
            x = _part(node, x, axis, *slice(start, stop).indices(size.number)[:2])
    return x


_END = 2**31 - 1  # as the stop of a Slice: the end of an axis of any size


@converts("Split", since=2)
def _split(node: Node) -> list[Value]:
    x, count = node.rearranged(), len(node.proto.output)
    whole, axis = axes_of(x), node.attribute("axis")
    size = whole.sizes[node.axis(axis, len(whole.axes))].number
    sizes = node.list_of("split", 1)
    if sizes is None:
        if node.attribute("num_outputs", count) != count:
            raise node.error(f"has {count} outputs, and not num_outputs")
        largest = math.ceil(size / count)
        sizes = [largest] * (count - 1) + [size - largest * (count - 1)]
    if sum(sizes) != size or len(sizes) != count:
        raise node.error(f"of {size} elements into {sizes} is not supported")
    stops = itertools.accumulate(sizes)
    return [_part(node, x, axis, stop - n, stop) for n, stop in zip(sizes, stops, strict=True)]


def _part(node: Node, x: Tensor | Rearranged, axis: int, start: int, stop: int) -> Tensor | Rearranged:
    """Elements start to stop - 1 along an axis of the file."""
    axis = _axis_of_sample(node, axis, x)
    tensor, position = batch_first(x)
    if (start, stop) == (0, tensor.shape[axis]):
        return x
    if not 0 <= start < stop <= tensor.shape[axis]:
        raise node.error(f"of the elements {start} to {stop} of {tensor.shape[axis]} is not supported")
    return with_batch_at(tensor.add(layers.Slice(start, stop, axis)), position)


def _axis_of_sample(node: Node, axis: int, x: Tensor | Rearranged) -> int:
    """The axis of `batch_first`, without the batch, for an axis of the file."""
    groups = axes_of(x).axes
    axis = node.axis(axis, len(groups))
    if 0 in groups[axis]:
        raise node.error(f"along axis {axis} is not supported: it is the batch")
    return axis - sum(0 in group for group in groups[:axis])
