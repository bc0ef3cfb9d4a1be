"""Make a chain of layers shorter without changing what it computes."""

import math
from collections.abc import Sequence

from xpnet import layers
from xpnet.layers.context import Shape
from xpnet.onnx.tensors import LoadedLayer

_ELEMENTWISE = (layers.Dropout, layers.ELU, layers.GELU, layers.HardSigmoid, layers.HardSwish, layers.HardTanh,
                layers.Identity, layers.LeakyReLU, layers.Mish, layers.ReLU, layers.Rescale, layers.Sigmoid,
                layers.SiLU, layers.Softplus, layers.Step, layers.Tanh)  # fmt: skip


def simplified(chain: Sequence[LoadedLayer], input_shape: Shape) -> list[LoadedLayer]:
    """The chain with fewer layers that only rearrange, and with its sums as Residual layers."""
    result: list[LoadedLayer] = []
    for loaded in chain:
        if loaded.branches:
            result.append(_residual(loaded, result[-1].shape if result else input_shape))
        elif isinstance(loaded.layer, layers.Permute):
            _append_permute(result, loaded.layer.axes, input_shape)
        elif isinstance(loaded.layer, layers.Reshape):
            _append_reshape(result, loaded.shape, input_shape)
        elif isinstance(loaded.layer, layers.Rescale):
            _append_rescale(result, loaded)
        elif isinstance(loaded.layer, layers.Dense):
            result.append(_after_flattened_images(result, loaded))
        else:
            result.append(loaded)
    return result


def _residual(loaded: LoadedLayer, before: Shape) -> LoadedLayer:
    long, short = sorted((simplified(branch, before) for branch in loaded.branches), key=len, reverse=True)
    if not long:
        return LoadedLayer(layers.Rescale(2.0), {}, loaded.shape)
    skip = [inner.layer for inner in short]
    projection = None if not skip else skip[0] if len(skip) == 1 else layers.Sequential(skip)
    block = layers.Residual(*[inner.layer for inner in long], projection=projection)
    return LoadedLayer(block, {}, loaded.shape, (tuple(long), tuple(short)))


def _append_permute(result: list[LoadedLayer], axes: tuple[int, ...], input_shape: Shape) -> None:
    before = result[-1].shape if result else input_shape
    shape = tuple(before[axis] for axis in axes)
    moved = [axis for axis in axes if before[axis] > 1]
    if moved == sorted(moved):
        _append_reshape(result, shape, input_shape)
    elif result and isinstance(last := result[-1].layer, layers.Permute):
        result.pop()
        _append_permute(result, tuple(last.axes[axis] for axis in axes), input_shape)
    else:
        result.append(LoadedLayer(layers.Permute(axes), {}, shape))


def _append_reshape(result: list[LoadedLayer], shape: Shape, input_shape: Shape) -> None:
    if result and isinstance(result[-1].layer, layers.Reshape):
        result.pop()
    if shape != (result[-1].shape if result else input_shape):
        result.append(LoadedLayer(layers.Flatten() if len(shape) == 1 else layers.Reshape(shape), {}, shape))


def _append_rescale(result: list[LoadedLayer], loaded: LoadedLayer) -> None:
    """x · a, then + b, as one layer; and nothing for x · a · (1 / a), as in GELU."""
    new, last = loaded.layer, result[-1].layer if result else None
    assert isinstance(new, layers.Rescale)
    if isinstance(last, layers.Rescale) and last.offset == 0:
        if new.scale == 1:
            result[-1] = loaded._replace(layer=layers.Rescale(last.scale, new.offset))
            return
        if new.offset == 0 and last.scale * new.scale == 1:
            result.pop()
            return
    result.append(loaded)


def _after_flattened_images(result: list[LoadedLayer], dense: LoadedLayer) -> LoadedLayer:
    """A Dense with the rows of its weight in another order, if that makes the Permute before a Flatten unnecessary."""
    flatten = len(result) - 1
    while flatten > 0 and isinstance(result[flatten].layer, _ELEMENTWISE):
        flatten -= 1
    permute = result[flatten - 1].layer if flatten > 0 else None
    if not isinstance(permute, layers.Permute) or not isinstance(result[flatten].layer, layers.Flatten):
        return dense
    permuted, order, weight = result[flatten - 1].shape, permute.axes, dense.weights["weight"]
    del result[flatten - 1]
    back = [order.index(axis) for axis in range(len(order))]
    units = weight.shape[1]
    rows = weight.reshape(*permuted, units).transpose(*back, len(order)).reshape(math.prod(permuted), units)
    return dense._replace(weights={**dense.weights, "weight": rows})
