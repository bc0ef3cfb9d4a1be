"""Convert ONNX operators on images (N, C, H, W) to layers: convolutions, pooling and resizing.

Convolutions and pooling may also be those of sequences (N, C, T).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from xpnet import layers
from xpnet.errors import ArgumentError
from xpnet.layers.context import Shape
from xpnet.onnx.reader import Node, converts
from xpnet.onnx.tensors import BATCH, Constant, Tensor, copy_of

# Convolutions and pooling ---------------------------------------------------------------------------------------------


@converts("Conv")
def _conv(node: Node) -> Tensor:
    x, weight, bias = node.image(sequences=True), node.constant(1, "weight"), node.optional(2, "bias")
    axes = len(x.shape) - 1
    kernel = _kernel(node, weight, axes)
    strides, dilation = (_sizes(node, name, axes) for name in ("strides", "dilations"))
    x, padding = _padded(node, x, kernel, strides, dilation, zeros=True, causal=axes == 1)
    more = {"groups": node.attribute("group"), "use_bias": bias is not None}
    layer: layers.Layer
    if axes == 1:
        layer = layers.Conv1D(len(weight), kernel[0], strides[0], padding, dilation[0], **more)
    else:
        layer = layers.Conv2D(len(weight), kernel, strides, padding, dilation=dilation, **more)
    return x.add(layer, weight=weight.transpose(*range(2, weight.ndim), 1, 0), bias=bias)


@converts("ConvTranspose")
def _conv_transpose(node: Node) -> Tensor:
    x, weight, bias = node.image(), node.constant(1, "weight"), node.optional(2, "bias")
    kernel, strides, dilation = _kernel(node, weight, 2), _sizes(node, "strides", 2), _sizes(node, "dilations", 2)
    groups = node.attribute("group")
    before, wanted = _transposed_geometry(node, x.shape, kernel, strides, dilation)
    full = [(x.shape[a] - 1) * strides[a] + dilation[a] * (kernel[a] - 1) + 1 for a in (0, 1)]
    extra = tuple(wanted[a] - full[a] + 2 * before[a] for a in (0, 1))
    # Padding is symmetric in Conv2DTranspose; less padding at the end than at the beginning is more output_padding.
    candidates: list[tuple[Any, Any]] = [("same", 0)]
    if min(*extra, *before) >= 0:
        candidates.insert(0, (tuple(before), extra))
    for padding, output_padding in candidates:
        try:
            layer = layers.Conv2DTranspose(
                weight.shape[1] * groups, kernel, strides, padding, dilation=dilation, groups=groups,
                output_padding=output_padding, use_bias=bias is not None,
            )  # fmt: skip
            built: Any = copy_of(layer)
            shape = built.build(x.shape, backend="cpu")
        except ArgumentError:
            continue
        if list(shape[:2]) == wanted and list(built.windows.before) == before:
            ours = weight.reshape(groups, -1, *weight.shape[1:]).transpose(3, 4, 1, 0, 2)
            return x.add(layer, weight=ours.reshape(*kernel, -1, layer.filters), bias=bias)
    raise node.error(f"with padding {before} before and outputs of {wanted} pixels is not supported by Conv2DTranspose")


def _transposed_geometry(
    node: Node, shape: Shape, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The padding before, and the size of the output, of a ConvTranspose; each (vertical, horizontal)."""
    automatic, pads = node.attribute("auto_pad"), node.attribute("pads")
    extra, wanted = node.attribute("output_padding", [0, 0]), node.attribute("output_shape")
    if not len(extra) == 2 or not len(pads or [0] * 4) == 4 or (wanted is not None and len(wanted) != 2):
        raise node.error(f"has pads {pads}, output_padding {extra} and output_shape {wanted}, and takes images")
    full = [(shape[a] - 1) * strides[a] + dilation[a] * (kernel[a] - 1) + 1 + extra[a] for a in (0, 1)]
    if automatic in ("SAME_UPPER", "SAME_LOWER") and wanted is None:
        wanted = [shape[a] * strides[a] for a in (0, 1)]
        if any(wanted[a] > full[a] for a in (0, 1)):  # the standard and ONNX Runtime disagree
            raise node.error(f"with auto_pad {automatic} and gaps between its windows is not supported")
    if wanted is None:
        pads = [0, 0, 0, 0] if automatic == "VALID" or pads is None else pads
        return pads[:2], [full[a] - pads[a] - pads[a + 2] for a in (0, 1)]
    total = [max(full[a] - wanted[a], 0) for a in (0, 1)]
    if automatic == "SAME_UPPER":
        return [n // 2 for n in total], list(wanted)
    return [n - n // 2 for n in total], list(wanted)


def _kernel(node: Node, weight: Constant, axes: int) -> tuple[int, ...]:
    """The size of the windows of a convolution along each of its axes, from the shape of the weight."""
    if weight.ndim != axes + 2:
        raise node.error(f"is not supported with a weight of shape {weight.shape}")
    if (kernel := node.attribute("kernel_shape")) is not None and kernel != list(weight.shape[2:]):
        raise node.error(f"has kernel_shape {kernel} and a weight of shape {weight.shape}")
    return tuple(weight.shape[2:])


def _sizes(node: Node, name: str, axes: int) -> tuple[int, ...]:
    """An attribute that has a number for each axis of the windows; 1 by default."""
    numbers = tuple(node.attribute(name, (1,) * axes))
    if len(numbers) != axes:
        raise node.error(f"has {name} {list(numbers)}, and takes {axes} of them")
    return numbers


def _padded(
    node: Node, x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int], zeros: bool,
    causal: bool = False,
) -> tuple[Tensor, Any]:  # fmt: skip
    """(x, the argument `padding` of a layer for a node): "valid", the pixels or steps on both sides, "same", "causal".

    zeros: whether the padding is zeros, so that a separate layer can add it if the argument cannot express it.
    causal: whether the layer has that option.
    """
    shape: Sequence[Any] = x.shape
    axes = range(len(kernel))
    automatic, pads = node.attribute("auto_pad"), node.attribute("pads", [0, 0] * len(kernel))
    reach = [dilation[a] * (kernel[a] - 1) + 1 for a in axes]
    if shape[0] is None:
        return x, _padding_of_open(node, automatic, pads, reach[0] if causal else 0)
    same = [math.ceil(shape[a] / strides[a]) for a in axes]
    total = [max((same[a] - 1) * strides[a] + reach[a] - shape[a], 0) for a in axes]
    if automatic == "SAME_UPPER" or (automatic == "SAME_LOWER" and not any(n % 2 for n in total)):
        return x, "same" if any(total) else "valid"
    if automatic == "SAME_LOWER" and zeros:
        automatic, pads = "NOTSET", [*(n - n // 2 for n in total), *(n // 2 for n in total)]
    if automatic not in ("NOTSET", "VALID", ""):
        raise node.error(f"with auto_pad {automatic} and padding {total} is not supported")
    pads = [0, 0] * len(kernel) if automatic == "VALID" else pads
    if len(pads) != 2 * len(kernel) or min(pads) < 0:
        raise node.error(f"with pads {pads} is not supported")
    before, after = pads[: len(kernel)], pads[len(kernel) :]
    travel = [shape[a] + before[a] + after[a] - reach[a] for a in axes]  # how far the window moves
    grid = [travel[a] // strides[a] + 1 for a in axes]
    if node.attribute("ceil_mode"):
        grid = [_ceil_windows(node, shape[a], before[a], travel[a], strides[a]) for a in axes]
    if causal and pads == [reach[0] - 1, 0] and any(pads):
        return x, "causal"
    if all((shape[a] + 2 * before[a] - reach[a]) // strides[a] + 1 == grid[a] for a in axes):
        return x, _one_or_pair(before) if any(before) else "valid"
    if same == grid and all(total[a] // 2 == before[a] for a in axes):
        return x, "same"
    if zeros and all(grid[a] == travel[a] // strides[a] + 1 for a in axes):
        return _zero_padded(x, list(zip(before, after, strict=True))), "valid"
    raise node.error(f'has pads {pads}, which are neither the same on both sides nor those of "same"')


def _padding_of_open(node: Node, automatic: str, pads: Sequence[int], reach: int) -> str | int:
    """The argument `padding` for sequences of any length. reach: of a window, if the layer can be causal, else 0."""
    if automatic == "SAME_UPPER":
        return "same"
    pads = [0, 0] if automatic == "VALID" else pads
    if automatic in ("NOTSET", "VALID", "") and not node.attribute("ceil_mode"):
        if pads[0] == pads[1]:
            return pads[0] or "valid"
        if reach and list(pads) == [reach - 1, 0]:
            return "causal"
    raise node.error(f"with pads {pads} on sequences of open length is not supported: give import_onnx an input_shape")


def _one_or_pair(sizes: Sequence[int]) -> Any:
    return sizes[0] if len(sizes) == 1 else tuple(sizes)


def _zero_padded(x: Tensor, sides: Sequence[tuple[int, int]]) -> Tensor:
    """Images or sequences with zeros around them. sides: how many before and after, along each axis."""
    if len(x.shape) == 3:
        return x.add(layers.ZeroPadding2D(tuple(sides)))
    image = x.add(layers.Reshape((*x.shape[:1], 1, *x.shape[1:]))).add(layers.ZeroPadding2D((sides[0], (0, 0))))
    return image.add(layers.Reshape((image.shape[0], image.shape[2])))


def _ceil_windows(node: Node, size: int, before: int, travel: int, stride: int) -> int:
    """The number of windows if the last one may extend beyond the padding."""
    windows = -(-travel // stride) + 1
    if (windows - 1) * stride >= size + before:  # some versions leave out a window that begins beyond the image
        raise node.error("with ceil_mode and a window that begins beyond the image is not supported")
    if travel % stride and node.attribute("count_include_pad"):
        raise node.error("with ceil_mode and count_include_pad is not supported if a window extends beyond the padding")
    return windows


@converts("MaxPool", "AveragePool")
def _pool(node: Node) -> Tensor:
    x = node.image(sequences=True)
    axes, size = len(x.shape) - 1, tuple(node.attribute("kernel_shape"))
    strides = _sizes(node, "strides", axes)
    node.ignore("storage_order")  # of the second output
    if len(size) != axes or any(n != 1 for n in node.attribute("dilations", (1,))):
        raise node.error(f"with kernel_shape {list(size)} is supported only along {axes} axes, and without dilations")
    counted = bool(node.attribute("count_include_pad", 0))
    x, padding = _padded(node, x, size, strides, (1,) * axes, zeros=counted)
    window = (_one_or_pair(size), _one_or_pair(strides), padding)
    if node.operator == "MaxPool":
        return x.add(layers.MaxPool1D(*window) if axes == 1 else layers.MaxPool2D(*window))
    kind = layers.AvgPool1D if axes == 1 else layers.AvgPool2D
    return x.add(kind(*window, count_include_pad=counted))


@converts("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(node: Node) -> Tensor:
    x, largest = node.image(sequences=True), node.operator == "GlobalMaxPool"
    if len(x.shape) == 2:
        y = x.add(layers.GlobalMaxPool1D() if largest else layers.GlobalAveragePool1D(), channels_first=False)
    else:
        y = x.add(layers.GlobalMaxPool2D() if largest else layers.GlobalAveragePool2D(), channels_first=False)
    return y.add(layers.Reshape((*[1] * (len(x.shape) - 1), *y.shape)), channels_first=True)


@converts("Pad", since=2)
def _pad(node: Node) -> Tensor:
    x, mode, pads = node.image(sequences=True), node.attribute("mode"), node.list_of("pads", 1) or []
    if node.version < 11:
        value = node.attribute("value")
    else:
        value = 0 if (constant := node.optional(2, "value")) is None else float(constant.reshape(()))
    given = node.optional(3, "list of axes") if node.version >= 18 else None
    count = len(x.shape) + 1
    axes = [node.axis(int(axis), count) for axis in (range(count) if given is None else given)]
    if mode != "constant" or value != 0:
        raise node.error(f"in mode {mode!r} with the value {value} is not supported, only with zeros")
    if len(pads) != 2 * len(axes) or len(set(axes)) < len(axes):
        raise node.error(f"has pads {pads} for the axes {axes}")
    sides = [(0, 0)] * count
    for i, axis in enumerate(axes):
        sides[axis] = pads[i], pads[i + len(axes)]
    if any(any(side) for side in sides[:2]) or min(pads, default=0) < 0:
        raise node.error(
            f"with pads {pads} is not supported, only around the height and width of images, or the steps of sequences"
        )
    return _zero_padded(x, sides[2:]) if any(pads) else x


# Resizing -------------------------------------------------------------------------------------------------------------


_MOST_PIXELS = 2**16


@converts("Resize", "Upsample", since=7)
def _resize(node: Node) -> Tensor:
    x, old = node.image(), node.version < 11
    if node.operator == "Resize" and not old:
        node.ignore("roi", "cubic_coeff_a", "extrapolation_value")  # of modes that are refused
        mode, rounding = node.attribute("mode"), node.attribute("nearest_mode")
        coordinates, antialias = node.attribute("coordinate_transformation_mode"), node.attribute("antialias", 0)
        scales, sizes = _resize_scales(node, x)
    else:
        mode, rounding, coordinates, antialias = node.attribute("mode"), "floor", "asymmetric", 0
        scales = node.attribute("scales") if node.version == 7 else node.constant(1, "scale").tolist()
        sizes = [math.floor(n * s) for n, s in zip((1, *x.file_shape), scales, strict=True)]
    times = [sizes[a + 2] // x.shape[a] for a in (0, 1)]
    fits = all(times[a] >= 1 and times[a] * x.shape[a] == sizes[a + 2] for a in (0, 1)) and scales[:2] == [1, 1]
    if max(sizes) > _MOST_PIXELS:  # whose positions are compared one by one below
        raise node.error(f"to {sizes} is not supported, only up to {_MOST_PIXELS} pixels along an axis")
    known = mode in ("nearest", "linear") and not antialias
    for a in (0, 1) if fits and known else ():
        centers = [_source_pixel(coordinates, i, x.shape[a], sizes[a + 2], scales[a + 2]) for i in range(sizes[a + 2])]
        known &= None not in centers
        if times[a] > 1 and known:
            known = _repeats(centers, times[a], rounding) if mode == "nearest" else _blends(centers, times[a])
    if not fits or not known:
        raise node.error(
            f"by {scales} to {sizes} in mode {mode!r}, {coordinates!r}, {rounding!r} is not supported by Upsample2D"
        )
    return x.add(layers.Upsample2D(tuple(times), "nearest" if mode == "nearest" else "bilinear"))


def _resize_scales(node: Node, x: Tensor) -> tuple[list[float], list[int]]:
    """The scales of the four axes, and the sizes of the result, with 1 for the batch."""
    axes = [node.axis(axis, 4) for axis in node.attribute("axes", range(4))]
    before, scales = [1, *x.file_shape], [1.0] * 4
    given = node.optional(2, "scale")
    if given is not None and given.size:
        factors = given.tolist()
        if len(factors) != len(axes):
            raise node.error(f"has {len(factors)} scales for {len(axes)} axes")
        scales = [dict(zip(axes, factors, strict=True)).get(axis, 1.0) for axis in range(4)]
        node.ignore("keep_aspect_ratio_policy")
        return scales, [math.floor(n * s) for n, s in zip(before, scales, strict=True)]
    target = dict(zip(axes, node.sizes(3, "size"), strict=True))
    if 0 in target and target[0] not in (BATCH, node.batch_size):
        raise node.error(f"to {list(target.values())} changes the batch axis")
    sizes = [1, *(int(target.get(axis, before[axis])) for axis in (1, 2, 3))]
    return [size / n for size, n in zip(sizes, before, strict=True)], sizes


def _source_pixel(mode: str, i: int, before: int, after: int, scale: float) -> float | None:
    """The position of pixel i of the result in the image, in a mode of ONNX; None in an unknown mode."""
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and after > 1):
        return (i + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return 0.0
    if mode == "half_pixel_symmetric":
        return before / 2 * (1 - after / (before * scale)) + (i + 0.5) / scale - 0.5
    if mode == "align_corners":
        return i * (before - 1) / (after - 1) if after > 1 else 0.0
    return i / scale if mode == "asymmetric" else None


def _repeats(centers: Sequence[Any], times: int, rounding: str) -> bool:
    """Whether nearest-neighbor interpolation repeats each pixel `times` times, as Upsample2D does."""
    nearest: dict[str, Callable[[float], int]] = {
        "round_prefer_floor": lambda c: math.ceil(c - 0.5), "round_prefer_ceil": lambda c: math.floor(c + 0.5),
        "floor": math.floor, "ceil": math.ceil,
    }  # fmt: skip
    last = len(centers) // times - 1
    return rounding in nearest and all(
        min(max(nearest[rounding](c), 0), last) == i // times for i, c in enumerate(centers)
    )


def _blends(centers: Sequence[Any], times: int) -> bool:
    """Whether linear interpolation at these centers is that of Upsample2D."""
    return all(math.isclose(c, (i + 0.5) / times - 0.5, abs_tol=1e-6) for i, c in enumerate(centers))
