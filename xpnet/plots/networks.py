"""Plots of small networks as graphs: one circle per unit, one line per weight."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from xpnet import layers
from xpnet.errors import ArgumentError
from xpnet.layers.containers import Container
from xpnet.plots.common import COLORS, Floats, axes_or_new, require_weights

_MOST_DRAWN_UNITS = 16  # in one layer
_MOST_LABELED_WEIGHTS = 20  # between two layers
_SIGNS: tuple[tuple[str, Any, str], ...] = (("positive weight", "-", COLORS[0]), ("negative weight", "--", COLORS[1]))
_DISTANCE = 0.1  # between two labels, as a share of the picture's height
_LABEL_BOX = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}


@dataclass
class _Column:
    """One layer of the picture."""

    title: str
    names: list[str]  # of its units
    weight: Floats  # (units of the previous column, units)
    bias: Floats  # (units,), or empty


def network(model: Container, ax: Axes | None = None) -> Axes:
    """A small fully connected network: one circle per unit with its bias below, one line per weight.

    The width of a line grows with the size of the weight. Positive weights are solid blue lines, negative weights
    dashed red ones. Weights have their values written on them if there are at most 20 between two layers. Raises
    ArgumentError for branches, layers other than Dense and activations, and layers with more than 16 units.
    """
    columns = _columns(model)
    most = max(len(column.names) for column in columns)
    lines = max(column.title.count("\n") for column in columns)
    largest = max((float(numpy.abs(column.weight).max()) for column in columns[1:]), default=0.0) or 1.0
    ax = axes_or_new(ax, (max(5.0, 2.2 * len(columns)), max(3.2, 0.85 * most + 1.2)))
    for k, column in enumerate(columns):
        heights = _heights(len(column.names))
        labeled = column.weight.size <= _MOST_LABELED_WEIGHTS
        share = _label_position(*column.weight.shape)
        for (i, j), weight in numpy.ndenumerate(column.weight):
            start, end = _heights(len(column.weight))[i], heights[j]
            _, style, color = _SIGNS[bool(weight < 0)]
            width = 0.5 + 3.5 * abs(weight) / largest
            ax.plot([k - 1, k], [start, end], style, color=color, linewidth=width, zorder=1)
            if labeled:
                position = (k - 1 + share, start + share * (end - start))
                ax.annotate(_short(weight), position, ha="center", va="center", fontsize="small", bbox=_LABEL_BOX)
        ax.scatter([k] * len(heights), heights, s=700, color="white", edgecolors="black", linewidths=1.2, zorder=3)
        for height, name in zip(heights, column.names, strict=True):
            ax.text(k, height, name, ha="center", va="center", zorder=4)
        for height, bias in zip(heights, column.bias, strict=False):
            ax.annotate(
                f"b = {_short(bias)}", (k, height), (0, -16), textcoords="offset points", ha="center", va="top",
                fontsize="small", bbox=_LABEL_BOX, zorder=4,
            )  # fmt: skip
        ax.text(k, 1.02, column.title + "\n" * (lines - column.title.count("\n")), ha="center", va="bottom")
    ax.set(xlim=(-0.35, len(columns) - 0.65), ylim=(0, 1))
    ax.set_axis_off()
    handles = [Line2D([], [], linestyle=style, color=color, linewidth=2, label=name) for name, style, color in _SIGNS]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False)
    return ax


def _columns(model: Container) -> list[_Column]:
    """A column for the inputs, and one for each Dense layer with the activations after it."""
    require_weights(model)
    if any(len(inputs) != 1 or inputs[0] != before.name for before, (*_, inputs) in pairwise(model.connections())):
        raise ArgumentError("network draws only layers in a row, but this model has branches: see plots.model_graph.")
    dense = [layer for layer in model.layers if isinstance(layer, layers.Dense) and len(layer.input_shape) == 1]
    for i, layer in enumerate(model.layers):
        if layer not in dense and (layer.parameters or math.prod(layer.input_shape) != math.prod(layer.output_shape)):
            raise ArgumentError(f"network draws only Dense layers and activations, but layer {i} is {layer!r}.")
    sizes = [math.prod(model.input_shape), *(layer.units for layer in dense)]
    if max(sizes) > _MOST_DRAWN_UNITS:
        raise ArgumentError(
            f"network draws at most {_MOST_DRAWN_UNITS} units per layer, but this model is "
            f"{'-'.join(map(str, sizes))}. See model.summary(), or plots.filters for the first weights."
        )
    to_numpy, empty = model.backend.to_numpy, numpy.zeros((0, 0))
    columns = [_Column("inputs", _names("x", sizes[0]), empty, empty.ravel())]
    for layer in model.layers:
        if isinstance(layer, layers.Dense):
            title, letter = ("outputs", "y") if layer is dense[-1] else ("hidden", "h")
            bias = to_numpy(layer.bias.value) if layer.use_bias else empty.ravel()
            columns.append(_Column(title, _names(letter, layer.units), to_numpy(layer.weight.value), bias))
        else:
            columns[-1].title += f"\n{type(layer).__name__}"
    return columns


def _names(letter: str, count: int) -> list[str]:
    return [f"${letter}_{{{i + 1}}}$" for i in range(count)]


def _heights(count: int) -> Floats:
    """The heights of the units of a column, from top to bottom, in a picture of height 1."""
    return 1.0 - (numpy.arange(count) + 0.5) / count


def _label_position(before: int, after: int) -> float:
    """The position of labels on the lines between two columns, from 0 to 1, where they do not overlap.

    It is as near to the middle as possible: labels overlap where lines cross.
    """
    shares = numpy.linspace(0.25, 0.75, 51)
    start, end = _heights(before)[:, None, None], _heights(after)[None, :, None]
    heights = numpy.sort((start + shares * (end - start)).reshape(-1, len(shares)), axis=0)
    distances = numpy.diff(heights, axis=0).min(axis=0, initial=_DISTANCE)
    return float(min(zip(-distances.round(6), abs(shares - 0.5), shares, strict=True))[2])


def _short(number: float) -> str:
    return f"{number:.3g}".replace("-", "\N{MINUS SIGN}")
