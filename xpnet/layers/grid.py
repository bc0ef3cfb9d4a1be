"""The arguments of layers that slide windows over images: sizes, strides, padding; and where the windows then stand."""

import math
from collections.abc import Sequence
from typing import TypeAlias

from xpnet.backends.sliding import Pair, Windows
from xpnet.config import is_whole
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer, Shape

Size: TypeAlias = int | Sequence[int]
Padding: TypeAlias = str | Size


def checked_size(layer: Layer, name: str, value: Size, least: int = 1) -> int | Pair:
    """A whole number of at least `least`, or (vertical, horizontal) of such, as given."""
    given = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(given) != 2 or not all(is_whole(n) and n >= least for n in given):
        kind = type(layer).__name__
        raise ArgumentError(f"{kind}: {name} must be a whole number of at least {least}, or a pair, not {value!r}.")
    vertical, horizontal = int(given[0]), int(given[1])
    return (vertical, horizontal) if isinstance(value, tuple | list) else vertical


def checked_count(layer: Layer, name: str, value: int) -> int:
    """A whole number of at least 1."""
    if not (is_whole(value) and value >= 1):
        raise ArgumentError(f"{type(layer).__name__}: {name} must be a whole number of at least 1, not {value!r}.")
    return int(value)


def checked_padding(layer: Layer, value: Padding) -> str | int | Pair:
    """ "valid", "same", or how many pixels on either side, one number or (vertical, horizontal)."""
    if isinstance(value, str):
        if value.strip().lower() in ("valid", "same"):
            return value.strip().lower()
        kind = type(layer).__name__
        raise ArgumentError(f'{kind}: padding must be "valid", "same" or a number of pixels, not {value!r}.')
    return checked_size(layer, "padding", value, least=0)


def pair(size: int | Pair) -> Pair:
    return (size, size) if isinstance(size, int) else size


def image_and_channels(layer: Layer, input_shape: Shape) -> tuple[Pair, int]:
    """((H, W), C), or the error that says what is missing."""
    if len(input_shape) != 3:
        hint = " Put Reshape((height, width, 1)) before it." if len(input_shape) == 2 else ""
        got = f"(N, {str(input_shape)[1:]}"
        raise layer.refuse("images (N, H, W, channels)", got, hint)
    height, width, channels = input_shape
    return (height, width), channels


def check_output_padding(
    layer: Layer, extra: int | Pair, strides: int | Pair, dilation: int | Pair, padding: str | int | Pair
) -> None:
    """Refuse more pixels than the windows can reach, and any beside "same", which leaves no choice."""
    kind = type(layer).__name__
    if padding == "same" and pair(extra) != (0, 0):
        raise ArgumentError(f'{kind}: with padding="same" the output is size · stride; leave output_padding out.')
    if any(pair(extra)[axis] >= max(pair(strides)[axis], pair(dilation)[axis]) for axis in (0, 1)):
        raise ArgumentError(f"{kind}: output_padding must be below strides or dilation, but it is {extra!r}.")


def slide(
    layer: Layer,
    image: Pair,
    kernel_size: int | Pair,
    strides_: int | Pair,
    padding: str | int | Pair,
    dilation_: int | Pair = 1,
) -> Windows:
    """Windows over an image: "same" gives ceil(size / stride) of them, with the odd pixel of padding at the end."""
    kernel, strides, dilation = pair(kernel_size), pair(strides_), pair(dilation_)
    grid, before = [0, 0], [0, 0]
    for axis in (0, 1):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        if padding == "same":
            grid[axis] = math.ceil(image[axis] / strides[axis])
            before[axis] = _before_same(grid[axis], strides[axis], reach, image[axis])
            continue
        before[axis] = 0 if isinstance(padding, str) else pair(padding)[axis]
        room = image[axis] + 2 * before[axis] - reach
        if room < 0:
            which = ("high", "wide")[axis]
            raise layer.refuse(
                f"images of at least {reach - 2 * before[axis]} pixels {which}, the reach of its window "
                '(padding="same" takes any)',
                f"{image[axis]} {which}",
            )
        grid[axis] = room // strides[axis] + 1
    return Windows(image, (grid[0], grid[1]), kernel, strides, dilation, (before[0], before[1]))


def slide_back(
    layer: Layer,
    grid: Pair,
    kernel_size: int | Pair,
    strides_: int | Pair,
    padding: str | int | Pair,
    dilation_: int | Pair,
    extra: int | Pair,
) -> Windows:
    """The windows of a transposed convolution: on the smallest image, and `extra` pixels more, that has this grid."""
    kernel, strides, dilation = pair(kernel_size), pair(strides_), pair(dilation_)
    image, before = [0, 0], [0, 0]
    for axis in (0, 1):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        if padding == "same":
            image[axis] = grid[axis] * strides[axis]
            before[axis] = _before_same(grid[axis], strides[axis], reach, image[axis])
            continue
        before[axis] = 0 if isinstance(padding, str) else pair(padding)[axis]
        image[axis] = (grid[axis] - 1) * strides[axis] + reach - 2 * before[axis] + pair(extra)[axis]
        if image[axis] < 1:
            raise layer.refuse(f"images of which padding={padding!r} leaves something", f"{grid[0]}×{grid[1]}")
    return Windows((image[0], image[1]), grid, kernel, strides, dilation, (before[0], before[1]))


def _before_same(count: int, stride: int, reach: int, size: int) -> int:
    return max((count - 1) * stride + reach - size, 0) // 2
