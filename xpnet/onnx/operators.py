"""Convert ONNX operators to layers: for each operator, a function from a node to its first output.

Elementwise operators are in elementwise.py, and those on images in images.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy

from xpnet import layers
from xpnet.layers.base import Layer
from xpnet.onnx import patterns
from xpnet.onnx.elementwise import joined_by, of_floats
from xpnet.onnx.reader import Node, Value, converts
from xpnet.onnx.tensors import BATCH, Constant, ShapeVector, Tensor, copy_of, transposition

# Over axes: softmax, normalization and reductions ---------------------------------------------------------------------


@converts("Softmax", "LogSoftmax")
def _softmax(node: Node) -> Tensor:
    x, layer = node.tensor(), getattr(layers, node.operator)()
    (axis,) = _axes(node, [node.attribute("axis")], len(x.shape) + 1)
    if node.version < 13:  # over all axes from this one on
        return _over_trailing_axes(x, axis, layer)
    if axis == (1 if x.channels_first else len(x.shape)):
        return x.add(layer)
    axes = list(range(len(x.shape)))
    moved = axes.pop(axis - 2 if x.channels_first else axis - 1)
    order = (*axes, moved)
    y = x.add(layers.Permute(order), channels_first=False).add(layer)
    return y.add(layers.Permute([order.index(i) for i in range(len(order))]), channels_first=x.channels_first)


def _over_trailing_axes(x: Tensor, axis: int, layer: Layer, **weights: Any) -> Tensor:
    """A layer over all axes from this one on together. The batch is axis 0."""
    x = x.in_file_order()
    if axis == len(x.shape):
        return x.add(layer, **weights)
    return x.add(layers.Reshape((*x.shape[: axis - 1], -1))).add(layer, **weights).add(layers.Reshape(x.shape))


def _axes(node: Node, given: Sequence[int], axes: int) -> list[int]:
    """Axes counted from 0, sorted. The batch must not be among them."""
    found = sorted(node.axis(axis, axes) for axis in given)
    if 0 in found:
        raise node.error("over axis 0 is not supported: it is the batch")
    if len(set(found)) < len(found):
        raise node.error(f"has the axes {list(given)}, one of them twice")
    return found


@converts("BatchNormalization", since=7)
def _batch_norm(node: Node) -> Tensor:
    if node.attribute("training_mode", 0) or any(node.proto.output[1:]):
        raise node.error("in training mode is not supported")
    gamma, beta, mean, variance = (node.constant(index, "parameter") for index in range(1, 5))
    layer = layers.BatchNorm(momentum=1.0 - node.attribute("momentum"), epsilon=node.attribute("epsilon"))
    x = node.tensor().with_features_last()
    return x.add(layer, gamma=gamma, beta=beta, running_mean=mean, running_var=variance)


@converts("LayerNormalization")
def _layer_norm(node: Node) -> Tensor:
    x = node.tensor()
    (axis,) = _axes(node, [node.attribute("axis")], len(x.shape) + 1)
    shape = x.file_shape[axis - 1 :]
    gamma, beta = (
        None if a is None else numpy.broadcast_to(a, shape).reshape(-1)
        for a in (node.constant(1, "scale"), node.optional(2, "bias"))
    )
    layer = layers.LayerNorm(epsilon=node.attribute("epsilon"), center=beta is not None)
    return _over_trailing_axes(x, axis, layer, gamma=gamma, beta=beta)


@converts("InstanceNormalization")
def _instance_norm(node: Node) -> Tensor:
    gamma, beta = node.constant(1, "scale"), node.constant(2, "bias")
    layer = layers.InstanceNorm(epsilon=node.attribute("epsilon"))
    return node.tensor().with_features_last().add(layer, gamma=gamma, beta=beta)


@converts("GroupNormalization", since=21)  # before, one scale and bias per group
def _group_norm(node: Node) -> Tensor:
    gamma, beta = node.constant(1, "scale"), node.constant(2, "bias")
    layer = layers.GroupNorm(node.attribute("num_groups"), epsilon=node.attribute("epsilon"))
    return node.tensor().with_features_last().add(layer, gamma=gamma, beta=beta)


@converts("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum")
def _reduce(node: Node) -> Tensor:
    x, given = node.tensor(), node.list_of("axes", 1)
    if not given and node.attribute("noop_with_empty_axes"):
        return x
    axes = _axes(node, given or range(len(x.shape) + 1), len(x.shape) + 1)
    x, shape = of_floats(node, x), x.file_shape
    after = [1 if axis + 1 in axes else n for axis, n in enumerate(shape)]
    if not node.attribute("keepdims"):
        after = [n for axis, n in enumerate(shape) if axis + 1 not in axes]
    if node.operator == "ReduceSum" and axes == [len(shape)] and (dot := patterns.dot(x)):
        return _reshaped(node, dot, after)
    # Over the height and width of images as they are; over others, as those of an image (reduced, 1, kept).
    image = x.with_features_last()
    if len(shape) != 3 or axes != [2, 3]:
        reduced = [axis - 1 for axis in axes]
        kept = [axis for axis in range(len(shape)) if axis not in reduced]
        image = x.in_file_order().add(layers.Permute((*reduced, *kept)))
        image = image.add(layers.Reshape((math.prod(shape[i] for i in reduced), 1, math.prod(shape[i] for i in kept))))
    if node.operator == "ReduceMax":
        y = image.add(layers.GlobalMaxPool2D(), channels_first=False)
    elif node.operator == "ReduceMin":
        y = (
            image.add(layers.Rescale(-1.0))
            .add(layers.GlobalMaxPool2D(), channels_first=False)
            .add(layers.Rescale(-1.0))
        )
    else:
        y = image.add(layers.GlobalAveragePool2D(), channels_first=False)
        if node.operator == "ReduceSum":
            y = y.add(layers.Rescale(math.prod(image.shape[:2])))
    return _reshaped(node, y.with_channels_first(False), after)


# Operators with weights -----------------------------------------------------------------------------------------------


@converts("Gemm", since=7)
def _gemm(node: Node) -> Tensor:
    x, weight, bias = node.tensor(), node.constant(1, "weight"), node.optional(2, "bias")
    if node.attribute("transA"):
        raise node.error("with transA is not supported: it moves the batch axis")
    weight = weight.T if node.attribute("transB") else weight
    if len(x.shape) != 1:
        raise node.error(f"has samples of shape {x.file_shape}, and takes vectors")
    if weight.ndim != 2 or len(weight) != x.shape[0]:
        raise node.error(f"has a weight of shape {weight.shape} for samples of shape {x.file_shape}")
    units, alpha, beta = weight.shape[1], node.attribute("alpha"), node.attribute("beta")
    if bias is not None:
        rows = bias if bias.ndim == 2 else bias.reshape((1,) * (2 - min(bias.ndim, 2)) + bias.shape)
        if rows.ndim != 2 or rows.shape[0] != 1 or rows.shape[1] not in (1, units):
            raise node.error(
                f"has a bias of shape {bias.shape} for {units} outputs, which is not the same for all samples"
            )
        bias = _times(numpy.broadcast_to(rows[0], units), beta)
    layer = layers.Dense(units, use_bias=bias is not None)
    return x.add(layer, weight=_times(weight, alpha), bias=bias)


def _times(weight: Constant, factor: float) -> Constant:
    """Not copied by a factor of 1, so that nodes with the same weight share a layer."""
    return weight if factor == 1 else weight * weight.dtype.type(factor)


@converts("MatMul")
def _matmul(node: Node) -> Tensor:
    if isinstance(node.value(0), numpy.ndarray):
        return _matmul_from_left(node)
    x, weight = node.tensor().in_file_order(), node.constant(1, "weight")
    if weight.ndim != 2 or x.shape[-1] != len(weight):
        raise node.error(f"has a weight of shape {weight.shape} for samples of shape {x.shape}")
    return x.add(layers.Dense(weight.shape[1], use_bias=False), weight=weight)


def _matmul_from_left(node: Node) -> Tensor:
    """weight @ x: a Dense layer over the second axis from the end."""
    weight, x = node.constant(0, "weight"), node.tensor(1).in_file_order()
    axes = len(x.shape)
    if axes < 2 or weight.ndim != 2 or weight.shape[1] != x.shape[-2]:
        raise node.error(f"has a weight of shape {weight.shape} to the left of samples of shape {x.shape}")
    swap = layers.Permute((*range(axes - 2), axes - 1, axes - 2))
    y = x.add(swap).add(layers.Dense(len(weight), use_bias=False), weight=weight.T)
    return y.add(copy_of(swap))


@converts("Gather")
def _gather(node: Node) -> Tensor:
    table, index, axis = node.value(0), node.value(1), node.attribute("axis")
    if isinstance(index, Tensor) and isinstance(table, numpy.ndarray) and table.ndim == 2 and axis == 0:
        return index.in_file_order().add(layers.Embedding(*table.shape), dtype=table.dtype, weight=table)
    raise node.error("is supported only as an embedding: of the rows of a constant (rows, features)")


# Shapes ---------------------------------------------------------------------------------------------------------------


@converts("Transpose")
def _transpose(node: Node) -> Tensor:
    x = node.tensor()
    axes = len(x.shape)
    perm = node.attribute("perm", list(range(axes, -1, -1)))
    if sorted(perm) != list(range(axes + 1)) or perm[0] != 0:
        raise node.error(f"in the order {perm} moves the batch axis")
    if axes > 1 and perm == transposition(axes, channels_first=not x.channels_first):
        return x.with_channels_first(not x.channels_first)
    return x.in_file_order().add(layers.Permute([axis - 1 for axis in perm[1:]]))


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


@converts("Flatten")
def _flatten(node: Node) -> Tensor:
    x = node.tensor()
    axis, shape = node.attribute("axis"), x.file_shape
    axis += len(shape) + 1 if axis < 0 else 0
    if axis == 0 or math.prod(shape[: axis - 1]) != 1:
        raise node.error(f"with axis {axis} flattens the batch axis")
    return _reshaped(node, x, [math.prod(shape[axis - 1 :])])


@converts("Reshape", since=5)
def _reshape(node: Node) -> Tensor:
    x, target = node.tensor(), node.sizes(1, "shape")
    shape: list[Any] = [BATCH, *x.file_shape]
    if 0 in target and node.attribute("allowzero", 0):
        raise node.error(f"to {target} with allowzero is not supported")
    node.ignore("allowzero")
    if any(n == 0 and i >= len(shape) for i, n in enumerate(target)):
        raise node.error(f"to {target} copies a size of an axis that samples of shape {x.file_shape} do not have")
    target = [shape[i] if n == 0 else n for i, n in enumerate(target)]
    batch, sizes = target[:1], target[1:]
    if not sizes or BATCH in sizes or target.count(-1) > 1 or any(n < -1 for n in sizes):
        raise node.error(f"to {target} changes the batch axis")
    features = math.prod(x.shape)
    # The batch axis is kept if it is symbolic, copied, or the fixed size of the batch; or if it is inferred, and all
    # features are on the other axes.
    if batch[0] is BATCH or batch[0] == node.batch_size:
        known = math.prod(n for n in sizes if n != -1)
        sizes = [features // known if n == -1 else n for n in sizes]
        kept = math.prod(sizes) == features
    else:
        kept = batch[0] == -1 and math.prod(sizes) == features
    if not kept:
        raise node.error(f"of samples of shape {x.file_shape} to {target} changes the batch axis")
    return patterns.group_norm(node, sizes) or _reshaped(node, x, sizes)


@converts("Squeeze")
def _squeeze(node: Node) -> Tensor:
    x, given = node.tensor(), node.list_of("axes", 1)
    shape = x.file_shape
    if given is None:
        if node.batch_size in (None, 1):
            raise node.error("without axes would remove the batch axis of a single sample")
        given = [axis for axis, n in enumerate((0, *shape)) if n == 1]
    axes = _axes(node, given, len(shape) + 1)
    if any(shape[axis - 1] != 1 for axis in axes):
        raise node.error(f"removes the axes {axes} of samples of shape {shape}, which are not all 1")
    return _reshaped(node, x, [n for axis, n in enumerate(shape) if axis + 1 not in axes])


@converts("Unsqueeze")
def _unsqueeze(node: Node) -> Tensor:
    x, given = node.tensor(), node.list_of("axes", 1) or []
    axes = _axes(node, given, len(x.shape) + 1 + len(given))
    sizes = list(x.file_shape)
    for axis in axes:
        sizes.insert(axis - 1, 1)
    return _reshaped(node, x, sizes)


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


@converts("Concat", since=4)
def _concat(node: Node) -> Tensor:
    tensors = [node.tensor(i) for i in range(len(node.values))]
    first = any(x.channels_first for x in tensors)
    axes = len(tensors[0].shape)
    (axis,) = _axes(node, [node.attribute("axis")], axes + 1)
    if len(tensors) == 1:
        return tensors[0]
    position = axis - 1 if not first else axes - 1 if axis == 1 else axis - 2
    return joined_by(node, layers.Concatenate(position), tensors)


@converts("Shape")
def _shape(node: Node) -> Value:
    x = node.value(0)
    if isinstance(x, Tensor):
        shape: list[Any] = [BATCH, *x.file_shape]
    elif x is not None:
        shape = list(x.numbers.shape if isinstance(x, ShapeVector) else x.shape)
    shape = shape[slice(node.attribute("start", 0), node.attribute("end"))]
    numbers = numpy.array([0 if n is BATCH else n for n in shape], numpy.int64)
    batch = numpy.array([n is BATCH for n in shape], numpy.int64)
    return ShapeVector(numbers, batch) if batch.any() else numbers


def _reshaped(node: Node, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """x with samples of another shape, in the order of the file."""
    if not sizes:
        raise node.error("leaves samples without an axis, which is not supported")
    return x.in_file_order().add(layers.Reshape(sizes) if len(sizes) > 1 else layers.Flatten())
