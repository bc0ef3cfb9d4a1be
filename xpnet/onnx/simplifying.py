"""Fewer layers that compute the same."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy

from xpnet import layers
from xpnet.layers.context import Shape
from xpnet.onnx.tensors import Call, Constant, calls_before, shared_key

_ELEMENTWISE = (layers.Dropout, layers.ELU, layers.GELU, layers.HardSigmoid, layers.HardSwish, layers.HardTanh,
                layers.Identity, layers.LeakyReLU, layers.Mish, layers.ReLU, layers.Rescale, layers.Sigmoid,
                layers.SiLU, layers.Softplus, layers.Step, layers.Tanh)  # fmt: skip


def simplified(outputs: Sequence[Call]) -> list[Call]:
    """The outputs, computed with fewer layers that only rearrange, and fewer factors."""
    calls, new = calls_before(outputs), dict[Call, Call]()
    readers = Counter([*outputs, *(before for call in calls for before in call.inputs)])
    for call in calls:
        inputs = tuple(new[before] for before in call.inputs)
        match call.layer:
            case layers.Permute(axes=axes):
                new[call] = _permuted(inputs[0], axes)
            case layers.Reshape():
                new[call] = _reshaped(inputs[0], call.shape)
            case layers.Rescale() as rescale:
                new[call] = _rescaled(inputs[0], rescale)
            case layers.Dense() if readers[call.inputs[0]] == 1 and _is_unprojected(inputs[0]):
                new[call] = _projected(inputs[0], call)
            case layers.Slice(axis=axis):
                only = readers[call.inputs[0]] == 1
                new[call] = _sliced(inputs[0], *_bounds(call), axis, only)
            case layers.Concatenate(axis=axis):
                new[call] = _concatenated(inputs, axis, call)
            case _:
                new[call] = dataclasses.replace(call, inputs=inputs) if inputs else call
    return _with_reordered_rows([new[call] for call in outputs])


def _permuted(x: Call, axes: tuple[int, ...]) -> Call:
    shape = tuple(x.shape[axis] for axis in axes)
    moved = [axis for axis in axes if x.shape[axis] > 1]
    if moved == sorted(moved):
        return _reshaped(x, shape)
    if isinstance(x.layer, layers.Permute):
        return _permuted(x.inputs[0], tuple(x.layer.axes[axis] for axis in axes))
    if axes == (1, 0) and isinstance(x.layer, layers.Reshape) and isinstance(x.inputs[0].layer, layers.Permute):
        image, order = x.inputs[0].inputs[0], x.inputs[0].layer.axes  # pixels as a sequence
        if order == (len(order) - 1, *range(len(order) - 1)) and x.shape[0] == image.shape[-1]:
            return _reshaped(image, shape)
    return Call(layers.Permute(axes), {}, (x,), shape)


def _reshaped(x: Call, shape: Shape) -> Call:
    if isinstance(x.layer, layers.Reshape):
        (x,) = x.inputs
    if shape == x.shape:
        return x
    return Call(layers.Flatten() if len(shape) == 1 else layers.Reshape(shape), {}, (x,), shape)


def _rescaled(x: Call, new: layers.Rescale) -> Call:
    """x · a, then + b, as one layer; and nothing for x · a · (1 / a), as in GELU."""
    last = x.layer
    if isinstance(last, layers.Rescale) and last.offset == 0:
        if new.scale == 1:
            return Call(layers.Rescale(last.scale, new.offset), {}, x.inputs, x.shape)
        if new.offset == 0 and last.scale * new.scale == 1:
            return x.inputs[0]
    return Call(new, {}, (x,), x.shape)


# Attention ------------------------------------------------------------------------------------------------------------


def _is_unprojected(x: Call) -> bool:
    """Whether x is attention whose output projection is the identity."""
    if not isinstance(x.layer, layers.MultiHeadAttention) or x.weights.get("output_bias", numpy.zeros(1)).any():
        return False
    weight = x.weights["output_weight"]
    return bool((weight == numpy.eye(len(weight))).all())


def _projected(x: Call, dense: Call) -> Call:
    """Attention with the weights of a Dense layer that follows as its output projection."""
    weight, bias = dense.weights["weight"], dense.weights.get("bias")
    if weight.shape[0] != weight.shape[1]:
        return dataclasses.replace(dense, inputs=(x,))
    weights, layer = x.weights | {"output_weight": weight}, x.layer
    if bias is not None:
        zeros = {f"{part}_bias": numpy.zeros_like(bias) for part in ("query", "key", "value")}
        weights = zeros | weights | {"output_bias": bias}
        layer = layers.MultiHeadAttention.from_config({**layer.get_config(), "use_bias": True})
    return Call(layer, weights, x.inputs, dense.shape)


# Parts of an axis -----------------------------------------------------------------------------------------------------


def _bounds(call: Call) -> tuple[int, int | None]:
    """(start, stop) of a Slice, counted from 0 if the size of the axis is known."""
    slice_, size = call.layer, call.inputs[0].shape[call.layer.axis]
    return (slice_.start, slice_.stop) if size is None else slice(slice_.start, slice_.stop).indices(size)[:2]


def _sliced(x: Call, start: int, stop: int | None, axis: int, only: bool) -> Call:
    """Elements start to stop - 1 along an axis. only: whether nothing else reads x."""
    axis, layer, size = axis % len(x.shape), x.layer, x.shape[axis]
    if (start, stop) == (0, size):
        return x
    if axis == 0 and only and isinstance(layer, _RECURRENT) and (start, stop) == _last_step(layer, size):
        config = layer.get_config()
        last = type(layer).from_config({**config, "return_sequences": False})
        return _reshaped(Call(last, x.weights, x.inputs, x.shape[1:]), (1, *x.shape[1:]))
    if size is not None and stop is not None:
        if isinstance(layer, layers.Concatenate) and layer.axis % len(x.shape) == axis:
            for before in x.inputs:  # one of them may contain the whole part
                if start >= 0 and stop <= before.shape[axis]:
                    return _sliced(before, start, stop, axis, only=False)
                start, stop = start - before.shape[axis], stop - before.shape[axis]
            start, stop = start + size, stop + size
        if axis == 0 and isinstance(layer, layers.Reshape) and len(x.inputs[0].shape) == 1:
            step = math.prod(x.shape[1:])
            part = _sliced(x.inputs[0], start * step, stop * step, 0, only=False)
            return _reshaped(part, (stop - start, *x.shape[1:]))
    is_last = size is not None and (start, stop) == (size - 1, size)  # written so for sequences of any length
    taken = layers.Slice(-1, axis=axis) if is_last else layers.Slice(start, stop, axis)
    return Call(taken, {}, (x,), taken.shape_for(x.shape))


_RECURRENT = (layers.LSTM, layers.GRU, layers.SimpleRNN)


def _last_step(layer: Any, steps: int | None) -> tuple[int, int | None]:
    """(start, stop) of the step after which a recurrent layer has its last state."""
    if layer.reverse:
        return 0, 1
    return (-1, None) if steps is None else (steps - 1, steps)


def _concatenated(inputs: tuple[Call, ...], axis: int, call: Call) -> Call:
    """Inputs joined along an axis: what they are parts of, if they are all of it, in order."""
    first = inputs[0].inputs[0] if isinstance(inputs[0].layer, layers.Slice) else None
    stop: int | None = 0
    for part in inputs:
        is_next = isinstance(part.layer, layers.Slice) and part.inputs[0] is first
        if not is_next or part.layer.axis % len(part.shape) != axis % len(call.shape) or _bounds(part)[0] != stop:
            return dataclasses.replace(call, inputs=inputs)
        stop = _bounds(part)[1]
    return first if first is not None and first.shape == call.shape else dataclasses.replace(call, inputs=inputs)


# Flattened images -----------------------------------------------------------------------------------------------------


class _Flattened(NamedTuple):
    """What a Dense layer reads: images in an order of axes for which a Permute is needed, flattened.

    images: before the Permute.  axes: of the Permute.  elementwise: the calls after the Flatten, last one first.
    """

    images: Call
    axes: tuple[int, ...]
    elementwise: list[Call]


def _with_reordered_rows(outputs: list[Call]) -> list[Call]:
    """The outputs with the rows of Dense layers in another order where this makes a Permute before them unnecessary."""
    calls = calls_before(outputs)
    readers = Counter([*outputs, *(before for call in calls for before in call.inputs)])
    dense = [call for call in calls if isinstance(call.layer, layers.Dense)]
    found = {call: _flattened(call.inputs[0], readers) for call in dense}
    uses: dict[object, set[object]] = {}  # of each weight: the axes and shapes of the images that it is used for
    for call, flattened in found.items():
        uses.setdefault(shared_key(call), set()).add(flattened and (flattened.axes, flattened.images.shape))
    rows: dict[object, Constant] = {}  # reordered once for all calls with the same weight
    flat: dict[Call, Call] = {}  # images, flattened in their own order
    new: dict[Call, Call] = {}
    for call in calls:
        inputs, weights, flattened = tuple(new[before] for before in call.inputs), call.weights, found.get(call)
        if flattened and len(uses[key := shared_key(call)]) == 1:
            if key not in rows:
                rows[key] = _reordered(weights["weight"], flattened)
            images = new[flattened.images]
            x = flat.setdefault(images, Call(layers.Flatten(), {}, (images,), (math.prod(images.shape),)))
            for before in reversed(flattened.elementwise):
                x = dataclasses.replace(before, inputs=(x,))
            inputs, weights = (x,), {**weights, "weight": rows[key]}
        new[call] = dataclasses.replace(call, inputs=inputs, weights=weights) if inputs else call
    return [new[call] for call in outputs]


def _flattened(x: Call, readers: Counter[Call]) -> _Flattened | None:
    """How a Dense layer's input comes from flattened images, if nothing else reads what is computed in between."""
    elementwise = []
    while isinstance(x.layer, _ELEMENTWISE) and readers[x] == 1:
        elementwise.append(x)
        (x,) = x.inputs
    if isinstance(x.layer, layers.Flatten):
        (permute,) = x.inputs
        if isinstance(permute.layer, layers.Permute):
            return _Flattened(permute.inputs[0], permute.layer.axes, elementwise)
    return None


def _reordered(weight: Constant, flattened: _Flattened) -> Constant:
    """The rows of the weight in the order that the images have before the Permute."""
    axes, shape, units = flattened.axes, flattened.images.shape, weight.shape[1]
    permuted, back = [shape[axis] for axis in axes], [axes.index(axis) for axis in range(len(axes))]
    return weight.reshape(*permuted, units).transpose(*back, len(axes)).reshape(math.prod(shape), units)
