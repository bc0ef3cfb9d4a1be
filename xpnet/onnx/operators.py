"""Convert ONNX operators to layers: normalization, reductions, and operators with weights.

Elementwise operators are in elementwise.py, those that move or select axes in shapes.py, those on images in images.py.
"""

import math
from typing import Any

import numpy

from xpnet import layers
from xpnet.layers.base import Layer
from xpnet.onnx import attention, patterns
from xpnet.onnx.elementwise import of_floats
from xpnet.onnx.reader import Node, Value, converts
from xpnet.onnx.tensors import Constant, Tensor, copy_of, reshaped

# Over axes: softmax, normalization and reductions ---------------------------------------------------------------------


@converts("Softmax", "LogSoftmax")
def _softmax(node: Node) -> Tensor:
    x, layer = node.tensor(), getattr(layers, node.operator)()
    (axis,) = node.axes([node.attribute("axis")], len(x.shape) + 1)
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
    (axis,) = node.axes([node.attribute("axis")], len(x.shape) + 1)
    shape = x.file_shape[axis - 1 :]
    gamma, beta = (
        None if a is None else numpy.broadcast_to(a, shape).reshape(-1)
        for a in (node.constant(1, "scale"), node.optional(2, "bias"))
    )
    layer = layers.LayerNorm(epsilon=node.attribute("epsilon"), center=beta is not None)
    return _over_trailing_axes(x, axis, layer, gamma=gamma, beta=beta)


@converts("RMSNormalization")
def _rms_norm(node: Node) -> Tensor:
    x = node.tensor()
    (axis,) = node.axes([node.attribute("axis")], len(x.shape) + 1)
    gamma = numpy.broadcast_to(node.constant(1, "scale"), x.file_shape[axis - 1 :]).reshape(-1)
    return _over_trailing_axes(x, axis, layers.RMSNorm(epsilon=node.attribute("epsilon")), gamma=gamma)


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
    axes = node.axes(given or range(len(x.shape) + 1), len(x.shape) + 1)
    x, shape = of_floats(node, x), x.file_shape
    after = [1 if axis + 1 in axes else n for axis, n in enumerate(shape)]
    if not node.attribute("keepdims"):
        after = [n for axis, n in enumerate(shape) if axis + 1 not in axes]
    if node.operator == "ReduceSum" and axes == [len(shape)] and (dot := patterns.dot(x)):
        return reshaped(dot, after)
    negative = node.operator == "ReduceMin"
    x = x.add(layers.Rescale(-1.0)) if negative else x
    y = _pooled(x, axes, largest=node.operator in ("ReduceMax", "ReduceMin"))
    if node.operator == "ReduceSum":
        y = y.add(layers.Rescale(math.prod(shape[axis - 1] for axis in axes)))
    return reshaped(y.add(layers.Rescale(-1.0)) if negative else y, after)


def _pooled(x: Tensor, axes: list[int], largest: bool) -> Tensor:
    """The largest number, or the mean, over axes of the file: a vector of the others."""
    if len(x.shape) == 2 and axes == [2 if x.channels_first else 1]:  # the steps of a sequence
        return x.add(layers.GlobalMaxPool1D() if largest else layers.GlobalAveragePool1D(), channels_first=False)
    # Over the height and width of images as they are; over others, as those of an image (reduced, 1, kept).
    image, shape = x.with_features_last(), x.file_shape
    if len(shape) != 3 or axes != [2, 3]:
        reduced = [axis - 1 for axis in axes]
        kept = [axis for axis in range(len(shape)) if axis not in reduced]
        image = x.in_file_order().add(layers.Permute((*reduced, *kept)))
        image = image.add(layers.Reshape((math.prod(shape[i] for i in reduced), 1, math.prod(shape[i] for i in kept))))
    return image.add(layers.GlobalMaxPool2D() if largest else layers.GlobalAveragePool2D(), channels_first=False)


# Operators with weights -----------------------------------------------------------------------------------------------


@converts("Gemm", since=7)
def _gemm(node: Node) -> Tensor:
    x, weight, bias = node.tensor(), node.constant(1, "weight"), node.optional(2, "bias")
    if node.attribute("transA"):
        raise node.error("with transA is not supported: it moves the batch axis")
    weight = weight.T if node.attribute("transB") else weight
    if len(x.shape) != 1 and not node.is_unwrapped:
        raise node.error(f"has samples of shape {x.file_shape}, and takes vectors")
    if weight.ndim != 2 or len(weight) != x.shape[-1]:
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
def _matmul(node: Node) -> Value:
    if not any(isinstance(value, numpy.ndarray) for value in node.values):
        return attention.attend(node)
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
