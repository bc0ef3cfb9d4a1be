"""A small net as circles and lines."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from xpnet import layers
from xpnet.errors import ArgumentError
from xpnet.plots.common import COLORS, Floats, axes_or_new, require_weights

if TYPE_CHECKING:
    from xpnet.model import Sequential

_MOST_DRAWN_UNITS = 16  # in a column
_MOST_NUMBERED_EDGES = 20  # between two columns
_SIGNS: tuple[tuple[str, Any, str], ...] = (("positive weight", "-", COLORS[0]), ("negative weight", "--", COLORS[1]))
_CLEAR = 0.1  # of the picture's height, between two numbers
_PLATE = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}  # behind numbers on lines


@dataclass
class _Column:
    title: str
    names: list[str]  # of its units
    weight: Floats  # (units before, units)
    bias: Floats  # (units,), or empty


def network(model: "Sequential", ax: Axes | None = None) -> Axes:
    """A small fully connected net: a circle a unit, a line a weight, and under each unit its bias.

    A line is the wider, the larger the weight is; solid and blue where it is positive, dashed and red where negative.
    Where they are few enough to read, the numbers are there too. More than 16 units in a layer are refused.
    """
    columns = _columns(model)
    most = max(len(column.names) for column in columns)
    lines = max(column.title.count("\n") for column in columns)
    largest = max((float(numpy.abs(column.weight).max()) for column in columns[1:]), default=0.0) or 1.0
    ax = axes_or_new(ax, (max(5.0, 2.2 * len(columns)), max(3.2, 0.85 * most + 1.2)))
    for k, column in enumerate(columns):
        heights = _heights(len(column.names))
        numbered = column.weight.size <= _MOST_NUMBERED_EDGES
        along = _clearest_place(*column.weight.shape)
        for (i, j), weight in numpy.ndenumerate(column.weight):
            start, end = _heights(len(column.weight))[i], heights[j]
            _, style, color = _SIGNS[bool(weight < 0)]
            width = 0.5 + 3.5 * abs(weight) / largest
            ax.plot([k - 1, k], [start, end], style, color=color, linewidth=width, zorder=1)
            if numbered:
                where = (k - 1 + along, start + along * (end - start))
                ax.annotate(_short(weight), where, ha="center", va="center", fontsize="small", bbox=_PLATE)
        ax.scatter([k] * len(heights), heights, s=700, color="white", edgecolors="black", linewidths=1.2, zorder=3)
        for height, name in zip(heights, column.names, strict=True):
            ax.text(k, height, name, ha="center", va="center", zorder=4)
        for height, bias in zip(heights, column.bias, strict=False):
            ax.annotate(
                f"b = {_short(bias)}", (k, height), (0, -16), textcoords="offset points", ha="center", va="top",
                fontsize="small", bbox=_PLATE, zorder=4,
            )  # fmt: skip
        ax.text(k, 1.02, column.title + "\n" * (lines - column.title.count("\n")), ha="center", va="bottom")
    ax.set_xlim(-0.35, len(columns) - 0.65)
    ax.set_ylim(0, 1)
    ax.set_axis_off()
    handles = [Line2D([], [], linestyle=style, color=color, linewidth=2, label=name) for name, style, color in _SIGNS]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False)
    return ax


def _columns(model: "Sequential") -> list[_Column]:
    """The inputs, and each Dense layer with the activations after it."""
    require_weights(model)
    dense = [layer for layer in model.layers if isinstance(layer, layers.Dense) and len(layer.input_shape) == 1]
    for i, layer in enumerate(model.layers):
        if layer not in dense and (layer.parameters or math.prod(layer.input_shape) != math.prod(layer.output_shape)):
            raise ArgumentError(f"network draws Dense layers and activations between them, but layer {i} is {layer!r}.")
    sizes = [math.prod(model.input_shape), *(layer.units for layer in dense)]
    if max(sizes) > _MOST_DRAWN_UNITS:
        raise ArgumentError(
            f"network draws at most {_MOST_DRAWN_UNITS} units a layer, but this model is {'-'.join(map(str, sizes))}: "
            "see model.summary(), or plots.filters for the first weights."
        )
    to_numpy, nothing = model.backend.to_numpy, numpy.zeros((0, 0))
    columns = [_Column("inputs", _names("x", sizes[0]), nothing, nothing.ravel())]
    for layer in model.layers:
        if isinstance(layer, layers.Dense):
            title, letter = ("outputs", "y") if layer is dense[-1] else ("hidden", "h")
            bias = to_numpy(layer.bias.value) if layer.use_bias else nothing.ravel()
            columns.append(_Column(title, _names(letter, layer.units), to_numpy(layer.weight.value), bias))
        else:
            columns[-1].title += f"\n{type(layer).__name__}"
    return columns


def _names(letter: str, count: int) -> list[str]:
    return [f"${letter}_{{{i + 1}}}$" for i in range(count)]


def _heights(count: int) -> Floats:
    """Where the units of a column stand, top to bottom, in a picture of height 1."""
    return 1.0 - (numpy.arange(count) + 0.5) / count


def _clearest_place(before: int, after: int) -> float:
    """The share of the way between two columns where numbers on all edges stand clear of each other.

    Halfway there, if they do; for where edges cross, so would their numbers.
    """
    ways = numpy.linspace(0.25, 0.75, 51)
    start, end = _heights(before)[:, None, None], _heights(after)[None, :, None]
    heights = numpy.sort((start + ways * (end - start)).reshape(-1, len(ways)), axis=0)
    gaps = numpy.diff(heights, axis=0).min(axis=0, initial=_CLEAR)
    return float(min(zip(-gaps.round(6), abs(ways - 0.5), ways, strict=True))[2])


def _short(number: float) -> str:
    return f"{number:.3g}".replace("-", "\N{MINUS SIGN}")
