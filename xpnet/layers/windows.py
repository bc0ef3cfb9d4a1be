"""The arguments of layers that slide windows over images or sequences, and the geometry of these windows."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from xpnet.backends import Array
from xpnet.backends.reference.windows import Pair, Windows
from xpnet.config import choice, integer, one_or_pair
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape

Size: TypeAlias = int | Sequence[int]  # an integer for both axes, or (vertical, horizontal)
Padding: TypeAlias = str | Size
OneOrPair: TypeAlias = int | Pair

_LARGE_WINDOW = 1024  # cells along an axis: larger windows must fit the input, since operators loop over all cells
_FARTHEST = 2**31 - 1  # positions are 32-bit integers on a GPU


def padding_argument(layer: Layer, value: Padding) -> str | OneOrPair:
    """The argument `padding`: "valid", "same", or the number of pixels on each side, one or (vertical, horizontal)."""
    if isinstance(value, str):
        return choice(layer, "padding", value.strip().lower(), ("valid", "same"), also="a number of pixels")
    return one_or_pair(integer, layer, "padding", value, at_least=0)


def sequence_padding(layer: Layer, value: str | int, *, causal: bool = False) -> str | int:
    """The argument `padding` of a layer for sequences: as for images, or "causal" where that is possible."""
    if isinstance(value, str):
        options = ("valid", "same", "causal") if causal else ("valid", "same")
        return choice(layer, "padding", value.strip().lower(), options, also="a number of steps")
    return integer(layer, "padding", value, at_least=0)


def pair(size: OneOrPair) -> Pair:
    return (size, size) if isinstance(size, int) else size


def image_and_channels(layer: Layer, input_shape: Shape) -> tuple[Pair, int]:
    """((H, W), C) of an input shape (H, W, C)."""
    if len(input_shape) != 3:
        hint = " Put Reshape((height, width, 1)) before it." if len(input_shape) == 2 else ""
        raise layer.refuse("images (N, H, W, channels)", input_shape, hint)
    height, width, channels = input_shape
    if height is None:
        raise layer.refuse("images of one size", input_shape, " Only sequences (N, T, features) may have any length.")
    return (height, width), channels


def windows_on_image(
    layer: Layer, image: Pair, kernel: OneOrPair, strides: OneOrPair, padding: str | OneOrPair, dilation: OneOrPair = 1
) -> Windows:
    """The windows of a convolution or pooling. "same" gives ceil(size / stride) windows per axis."""
    kernel, strides, dilation = pair(kernel), pair(strides), pair(dilation)
    grid, before = [0, 0], [0, 0]
    for axis in (0, 1):
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        grid[axis], before[axis] = _windows_on_axis(image[axis], axis, extent, strides[axis], padding)
        word = ("high", "wide")[axis]
        if grid[axis] < 1:
            raise layer.refuse(
                f"images at least {extent - 2 * before[axis]} pixels {word}, the extent of its window "
                '(padding="same" takes any size)',
                f"{image[axis]} {word}",
                " Images are (N, height, width, channels), channels last.",
            )
        if kernel[axis] > max(_LARGE_WINDOW, 2 * image[axis]):
            half = -(-kernel[axis] // 2)
            raise layer.refuse(f"images at least {half} pixels {word}, half of its window", f"{image[axis]} {word}")
    return _checked(layer, Windows(image, (grid[0], grid[1]), kernel, strides, dilation, (before[0], before[1])))


def steps_and_channels(layer: Layer, input_shape: Shape) -> tuple[Any, int]:
    """(T, C) of an input shape (T, C). T is None if it may be any."""
    if len(input_shape) != 2:
        hint = " Put Reshape((steps, 1)) before it." if len(input_shape) == 1 else ""
        raise layer.refuse("sequences (N, T, channels)", input_shape, hint)
    return input_shape


def windows_on_sequence(
    layer: Layer, steps: int, kernel: int, stride: int, padding: str | int, dilation: int = 1
) -> Windows:
    """The windows of a convolution or pooling on a sequence, as windows on an image of height 1: see `as_image`.

    "causal" pads only before the first step, so that no window reaches beyond the step where it ends.
    """
    extent = dilation * (kernel - 1) + 1
    if padding == "causal":
        windows, before = -(-steps // stride), extent - 1
    else:
        windows, before = _windows_on_axis(steps, 1, extent, stride, padding)
    if windows < 1:
        raise layer.refuse(
            f"sequences of at least {extent - 2 * before} steps, the extent of its window "
            '(padding="same" takes any length)',
            f"one of {steps}",
            " Sequences are (N, steps, channels), channels last.",
        )
    if padding != "causal" and kernel > max(_LARGE_WINDOW, 2 * steps):
        raise layer.refuse(f"sequences of at least {-(-kernel // 2)} steps, half of its window", f"one of {steps}")
    return _checked(layer, Windows((1, steps), (1, windows), (1, kernel), (1, stride), (1, dilation), (0, before)))


def as_image(sequences: Array) -> Array:
    """(N, T, C) → (N, 1, T, C), a view: images of height 1."""
    return sequences[:, None]


def transposed_windows(
    layer: Layer,
    grid: Pair,
    kernel_size: OneOrPair,
    strides: OneOrPair,
    padding: str | OneOrPair,
    dilation: OneOrPair,
    output_padding: OneOrPair,
) -> Windows:
    """The windows of a transposed convolution: a pixel of its input is a window on the image that is its output.

    The image is the smallest one with this grid of windows, plus `output_padding` pixels.
    """
    kernel, strides, dilation, extra = pair(kernel_size), pair(strides), pair(dilation), pair(output_padding)
    image, before = [0, 0], [0, 0]
    for axis in (0, 1):
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        same = grid[axis] * strides[axis]
        before[axis] = _padding_before(padding, axis, grid[axis], strides[axis], extent, same)
        fitting = (grid[axis] - 1) * strides[axis] + extent - 2 * before[axis] + extra[axis]
        image[axis] = same if padding == "same" else fitting
        if image[axis] < 1:
            raise layer.refuse(
                f"images large enough that padding={padding!r} leaves some output", f"{grid[0]}×{grid[1]}"
            )
    return _checked(layer, Windows((image[0], image[1]), grid, kernel, strides, dilation, (before[0], before[1])))


def _checked(layer: Layer, windows: Windows) -> Windows:
    """The windows. Raises ArgumentError if a position under them is too large for an index."""
    for image, grid, kernel, stride, dilation, before in zip(*windows, strict=True):
        if image + grid * stride + kernel * dilation + before > _FARTHEST:
            raise ArgumentError(
                f"{type(layer).__name__}: its windows reach farther than {_FARTHEST} pixels or steps. Choose a smaller "
                "kernel, strides, padding or dilation."
            )
    return windows


def _windows_on_axis(size: int, axis: int, extent: int, stride: int, padding: str | OneOrPair) -> tuple[int, int]:
    """(the number of windows, the padding before the first), along one axis. Too large windows give 0 or fewer."""
    same = -(-size // stride)
    before = _padding_before(padding, axis, same, stride, extent, size)
    return same if padding == "same" else (size + 2 * before - extent) // stride + 1, before


def _padding_before(padding: str | OneOrPair, axis: int, windows: int, stride: int, extent: int, size: int) -> int:
    """The padding above or to the left. If that of "same" is odd, the other side gets the extra pixel."""
    if padding == "same":
        return max((windows - 1) * stride + extent - size, 0) // 2
    return 0 if isinstance(padding, str) else pair(padding)[axis]
