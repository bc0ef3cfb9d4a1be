"""Plots of small networks as graphs: one circle per unit, one line per weight."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from xpnet import layers
from xpnet.errors import ArgumentError, ArgumentTypeError, shown
from xpnet.layers.containers import Container
from xpnet.plots.common import COLORS, Floats, axes_or_new, require_weights
from xpnet.training.backpropagation import Explanation

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
    weight_grad: Floats | None = None  # in the shapes of weight and bias
    bias_grad: Floats | None = None
    values: Floats | None = None  # (units,): the outputs for one sample


def network(model: Container, ax: Axes | None = None, *, explanation: Explanation | None = None) -> Axes:
    """A small fully connected network: one circle per unit with its bias below, one line per weight.

    The width of a line grows with the size of the weight. Positive weights are solid blue lines, negative weights
    dashed red ones. Weights have their values written on them if there are at most 20 between two layers.

    explanation: what `xpnet.explain(model, x, y)` returned. Weights and biases are then those of the explanation, each
    with its gradient after ∂; and if it explains a single sample, each unit has its output below.

    Raises ArgumentError for branches, layers other than Dense and activations, layers with more than 16 units, and the
    explanation of another model.
    """
    if not (explanation is None or isinstance(explanation, Explanation)):
        raise ArgumentTypeError(f"network: explanation must be what xpnet.explain returned, not {shown(explanation)}.")
    columns = _columns(model, explanation)
    most = max(len(column.names) for column in columns)
    lines = max(column.title.count("\n") for column in columns)
    largest = max((float(numpy.abs(column.weight).max()) for column in columns[1:]), default=0.0) or 1.0
    wide, high = (2.2, 0.85) if explanation is None else (3.8, 1.2)
    ax = axes_or_new(ax, (max(5.0, wide * len(columns)), max(3.2, high * most + 1.2)))
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
                text = _with_gradient(weight, column.weight_grad, (i, j))
                ax.annotate(text, position, ha="center", va="center", fontsize="small", bbox=_LABEL_BOX)
        ax.scatter([k] * len(heights), heights, s=700, color="white", edgecolors="black", linewidths=1.2, zorder=3)
        for i, (height, name) in enumerate(zip(heights, column.names, strict=True)):
            ax.text(k, height, name, ha="center", va="center", zorder=4)
            below = [] if column.values is None else [f"{name} = {_short(column.values[i])}"]
            if column.bias.size:
                below.append(f"b = {_with_gradient(column.bias[i], column.bias_grad, i)}")
            if below:
                ax.annotate(
                    "\n".join(below), (k, height), (0, -16), textcoords="offset points", ha="center", va="top",
                    fontsize="small", bbox=_LABEL_BOX, zorder=4,
                )  # fmt: skip
        ax.text(k, 1.02, column.title + "\n" * (lines - column.title.count("\n")), ha="center", va="bottom")
    ax.set(xlim=(-0.35, len(columns) - 0.65), ylim=(0, 1))
    ax.set_axis_off()
    handles = [Line2D([], [], linestyle=style, color=color, linewidth=2, label=name) for name, style, color in _SIGNS]
    if explanation is not None:
        handles.append(Line2D([], [], linestyle="none", label=f"∂: the derivative of L = {explanation.loss:.4g}"))
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(handles), frameon=False)
    return ax


def _columns(model: Container, explanation: Explanation | None) -> list[_Column]:
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
            if explanation is not None:
                _add_gradients(columns[-1], layer, explanation)
        else:
            columns[-1].title += f"\n{type(layer).__name__}"
        if explanation is not None and explanation.samples == 1:
            if len(columns) > 1 and layer is dense[0]:
                columns[0].values = numpy.ravel(explanation[layer.path].input)
            columns[-1].values = numpy.ravel(explanation[layer.path].output)
    return columns


def _add_gradients(column: _Column, layer: layers.Dense, explanation: Explanation) -> None:
    """Take the weights and biases of a layer from an explanation, with their gradients."""
    found = []
    for p in layer.parameters:
        one = explanation.parameters.get(p.name)
        if one is None or one.value.shape != p.shape:
            raise ArgumentError(f"network: the explanation has no {p.name} {p.shape}. Give that of this model.")
        found.append(one)
    column.weight, column.weight_grad = found[0].value, found[0].gradient
    if layer.use_bias:
        column.bias, column.bias_grad = found[1].value, found[1].gradient


def _with_gradient(value: float, grads: Floats | None, place: Any) -> str:
    return _short(value) if grads is None else f"{_short(value)}, ∂ {_short(grads[place])}"


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
