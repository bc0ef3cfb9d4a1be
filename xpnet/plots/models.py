"""Plots of a model's predictions over two inputs, and of its loss over two weights."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm

from xpnet.config import integer, number
from xpnet.errors import ArgumentError, DataError, ShapeError, shown, unknown_name
from xpnet.losses import Loss
from xpnet.model import Sequential
from xpnet.plots.common import (
    COLORS,
    MARKERS,
    axes_or_new,
    legend_above,
    mark_ends,
    numbers_of,
    on_host,
    padded,
    require_weights,
    texts,
)

_PIXELS = 400  # along each side of a decision boundary
_MOST_POINTS = 10_000  # for each weight; a loss is computed for each pair
_MOST_MARKED_STEPS = 100


def decision_boundary(
    model: Sequential,
    x: Any,
    y: Any,
    ax: Axes | None = None,
    threshold: float = 0.5,
    labels: Sequence[Any] | None = None,
) -> Axes:
    """The predicted classes of a model with two inputs, as colors of the plane, with the points x (N, 2) on it.

    y: the classes of the points, as numbers (N,) or (N, 1), or as probabilities (N, K). labels: the names of the
    classes. threshold: the smallest output that means class 1, for a model with one output: 0 for logits. With
    several outputs, the class of the largest is predicted.
    """
    threshold = number("", "threshold", threshold)
    x, y, labels = on_host(x), on_host(y), texts("labels", labels)
    if x.ndim != 2 or x.shape[1] != 2 or not len(x):
        raise ShapeError(f"decision_boundary draws a plane, so x must have shape (N, 2), not {x.shape}.")
    require_weights(model)
    if model.input_shape != (2,):
        raise ShapeError(f"decision_boundary draws models with input_shape (2,), not {model.input_shape}.")
    if y.ndim == 0 or len(y) != len(x) or y.size == 0:
        raise ShapeError(f"y must have one class for each of the {len(x)} points, but has shape {y.shape}.")
    (left, right), (bottom, top) = (padded(column, 0.25) for column in x.T)
    x1, x2 = numpy.linspace(left, right, _PIXELS), numpy.linspace(bottom, top, _PIXELS)
    plane = numpy.stack(numpy.meshgrid(x1, x2), axis=-1)
    outputs = model.predict(plane.reshape(-1, 2), batch_size=None)
    if outputs.ndim != 2:
        raise ShapeError(f"the model's output_shape must be (classes,) or (1,), not {outputs.shape[1:]}.")
    outputs = outputs.reshape(_PIXELS, _PIXELS, -1).astype(numpy.float64)
    one = outputs.shape[-1] == 1
    classes = 2 if one else outputs.shape[-1]
    region = outputs[..., 0] >= threshold if one else outputs.argmax(axis=-1)
    if y.ndim == 2 and y.shape[1] > 1:
        y = y.argmax(axis=1)
    true = y.reshape(-1) > 0.5 if one else y.reshape(-1)
    if labels is not None and len(labels) != classes:
        raise ShapeError(f"labels must name the {classes} classes, but has {len(labels)} names.")

    ax = axes_or_new(ax)
    colors = [COLORS[k % len(COLORS)] for k in range(classes)]
    ax.imshow(
        region, cmap=ListedColormap(colors), vmin=-0.5, vmax=classes - 0.5, alpha=0.25, interpolation="nearest",
        extent=(left, right, bottom, top), origin="lower", aspect="auto",
    )  # fmt: skip
    for k in range(classes - 1):
        # Positive where the output of class k is the largest; with one output, where it means class 1.
        lead = outputs[..., 0] - threshold if one else outputs[..., k] - numpy.delete(outputs, k, axis=-1).max(axis=-1)
        if lead.min() < 0 < lead.max():
            ax.contour(x1, x2, lead, levels=[0.0], colors="black", linewidths=1.5)
    for k in range(classes):
        name = f"class {k}" if labels is None else str(labels[k])
        ax.plot(
            *x[true == k].T, MARKERS[k % len(MARKERS)], color=colors[k], markeredgecolor="white", label=name,
            markersize=9 if len(x) <= 50 else 6,
        )  # fmt: skip
    ax.set(xlabel="$x_1$", ylabel="$x_2$")
    legend_above(ax)
    return ax


def cost_surface(
    model: Sequential,
    x: Any,
    y: Any,
    loss: str | Loss,
    weights: Sequence[tuple[str, Any]],
    path: Any = None,
    span: Any = None,
    ax: Axes | None = None,
    points: int = 41,
) -> Axes:
    """The loss of x and y as a function of two of the model's weights; all others keep their values.

    The model is not changed. weights: the name of a parameter and an index for each of the two, such as
    (("0.weight", (0, 0)), ("1.bias", 0)). path: their values (w1, w2) during training, (N, 2), drawn on the surface.
    span: how far the surface extends beyond the path, or beyond the present weights; or the two ranges
    ((low, high), (low, high)). points: the number of values of each weight.

    Raises DataError if the loss is not finite everywhere.
    """
    require_weights(model)
    pairs = isinstance(weights, list | tuple) and all(isinstance(weight, list | tuple) for weight in weights)
    if not pairs or [*map(len, weights)] != [2, 2]:
        raise ArgumentError(f"weights must be two pairs of a name and an index, not {shown(weights)}.")
    elements = [_element(model, *weight) for weight in weights]
    if elements[0] == elements[1]:
        raise ArgumentError(f"weights must be two different ones, but both are {elements[0]}.")
    points = integer("", "points", points, at_least=2, at_most=_MOST_POINTS)
    model = copy.deepcopy(model)
    values = {p.name: p.value for p in model.parameters}
    present = [[float(model.backend.to_numpy(values[name][index])) for name, index in elements]]
    descent = numbers_of(present if path is None else path, "path")
    if descent.ndim != 2 or descent.shape[1] != 2 or not len(descent) or not numpy.isfinite(descent).all():
        raise ShapeError(f"path must be finite pairs (w1, w2) of shape (N, 2), not {descent.shape}.")
    if span is None:
        span = 0.5 * float(numpy.ptp(descent, axis=0).max()) or 3.0
    ranges = numbers_of(span, "span")
    if ranges.ndim == 0 and numpy.isfinite(ranges):
        ranges = numpy.stack([descent.min(axis=0) - span, descent.max(axis=0) + span], 1)
    if ranges.shape != (2, 2) or not numpy.isfinite(ranges).all() or not (ranges[:, 0] < ranges[:, 1]).all():
        raise ArgumentError(f"span must be a positive number or ((low, high), (low, high)), not {shown(span)}.")

    first, second = (numpy.linspace(low, high, points) for low, high in ranges)
    cost = numpy.empty((points, points))
    with model.backend.device():
        for column, row in numpy.ndindex(cost.shape):
            for (name, index), value in zip(elements, (first[column], second[row]), strict=True):
                values[name][index] = float(value)
            cost[row, column] = model.evaluate(x, y, loss=loss, metrics=[])["loss"]
    if not numpy.isfinite(cost).all():
        raise DataError("the loss is not finite on the whole surface. Choose a smaller span.")

    ax = axes_or_new(ax)
    # Quadratic levels are denser where the loss is low, so that the bottom of a valley is visible.
    low, high = float(cost.min()), float(cost.max())
    levels = low + max(high - low, 1e-12) * numpy.linspace(0.0, 1.0, 21) ** 2
    image = ax.contourf(first, second, cost, levels, cmap="cividis", norm=PowerNorm(0.5, levels[0], levels[-1]))
    ax.figure.colorbar(image, ax=ax, label="loss", ticks=levels[::4], format="%.2g")
    if path is not None:
        ax.plot(*descent.T, color="white", linewidth=4.5)  # an outline of the path
        marker = "." if len(descent) <= _MOST_MARKED_STEPS else ""
        ax.plot(*descent.T, color=COLORS[1], linewidth=1.8, marker=marker, label="descent")
        mark_ends(ax, *descent.T)
        legend_above(ax)
    names = [f"{name}[{', '.join(map(str, index))}]" for name, index in elements]
    ax.set(xlabel=names[0], ylabel=names[1])
    return ax


def _element(model: Sequential, name: str, index: Any) -> tuple[str, tuple[int, ...]]:
    """The name of a parameter and the index of one of its elements, checked."""
    shapes = {p.name: p.shape for p in model.parameters}
    if not isinstance(name, str) or name not in shapes:
        raise unknown_name("parameter", name, shapes)
    index = tuple(integer("weights", "an index", i, at_least=0) for i in numpy.atleast_1d(index))
    if len(index) != len(shapes[name]) or not all(i < n for i, n in zip(index, shapes[name], strict=True)):
        raise ArgumentError(f"weights: {index} is not the index of a number in {name} of shape {shapes[name]}.")
    return name, index
