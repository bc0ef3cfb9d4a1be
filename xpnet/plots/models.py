"""What a model does, over the plane of two inputs and over two of its weights."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm

from xpnet.errors import ArgumentError, DataError, ShapeError, unknown_name
from xpnet.plots.common import COLORS, MARKERS, axes_or_new, legend_above, mark_ends, on_host, padded, require_weights

if TYPE_CHECKING:
    from xpnet.losses import Loss
    from xpnet.model import Sequential

_PIXELS = 400  # along each side of a plane
_MOST_MARKED_STEPS = 100


def decision_boundary(
    model: "Sequential",
    x: Any,
    y: Any,
    ax: Axes | None = None,
    threshold: float = 0.5,
    labels: Sequence[Any] | None = None,
) -> Axes:
    """The plane of a model with two inputs, coloured by the class it predicts, with the points x (N, 2) on it.

    y: their classes, as numbers (N,) or (N, 1), or as probabilities (N, K). labels: the names of the classes.
    threshold: of a model with one output, from where on that means class 1: 0 for logits. Of several the largest wins.
    """
    x, y = on_host(x), on_host(y)
    if x.ndim != 2 or x.shape[1] != 2 or not len(x):
        raise ShapeError(f"decision_boundary draws a plane: x must have shape (N, 2), not {x.shape}.")
    require_weights(model)
    if model.input_shape != (2,):
        raise ShapeError(f"decision_boundary draws models with input_shape (2,), but this one has {model.input_shape}.")
    if len(y) != len(x) or y.size == 0:
        raise ShapeError(f"y must hold a class for each of the {len(x)} points, but has shape {y.shape}.")
    (left, right), (bottom, top) = (padded(column, 0.25) for column in x.T)
    across, up = numpy.linspace(left, right, _PIXELS), numpy.linspace(bottom, top, _PIXELS)
    plane = numpy.stack(numpy.meshgrid(across, up), axis=-1)
    outputs = model.predict(plane.reshape(-1, 2), batch_size=None)
    if outputs.ndim != 2:
        raise ShapeError(
            f"decision_boundary needs one output a class, or one in all, not {outputs.shape[1:]} a sample."
        )
    outputs = outputs.reshape(_PIXELS, _PIXELS, -1).astype(numpy.float64)
    one = outputs.shape[-1] == 1
    classes = 2 if one else outputs.shape[-1]
    region = outputs[..., 0] >= threshold if one else outputs.argmax(axis=-1)
    if y.ndim == 2 and y.shape[1] > 1:
        y = y.argmax(axis=1)
    true = y.reshape(-1) > 0.5 if one else y.reshape(-1)
    if labels is not None and len(labels) != classes:
        raise ShapeError(f"labels must name the {classes} classes, but there are {len(labels)}.")

    ax = axes_or_new(ax)
    colors = [COLORS[k % len(COLORS)] for k in range(classes)]
    ax.imshow(
        region, cmap=ListedColormap(colors), vmin=-0.5, vmax=classes - 0.5, alpha=0.25, interpolation="nearest",
        extent=(left, right, bottom, top), origin="lower", aspect="auto",
    )  # fmt: skip
    for k in range(classes - 1):
        # Above 0 where class k + 1 wins.
        lead = outputs[..., 0] - threshold if one else outputs[..., k] - numpy.delete(outputs, k, axis=-1).max(axis=-1)
        if lead.min() < 0 < lead.max():
            ax.contour(across, up, lead, levels=[0.0], colors="black", linewidths=1.5)
    for k in range(classes):
        name = f"class {k}" if labels is None else str(labels[k])
        ax.plot(
            *x[true == k].T, MARKERS[k % len(MARKERS)], color=colors[k], markeredgecolor="white", label=name,
            markersize=9 if len(x) <= 50 else 6,
        )  # fmt: skip
    ax.set_xlabel("$x_1$")
    ax.set_ylabel("$x_2$")
    legend_above(ax)
    return ax


def cost_surface(
    model: "Sequential",
    x: Any,
    y: Any,
    loss: "str | Loss",
    weights: Sequence[tuple[str, Any]],
    path: Any = None,
    span: Any = None,
    ax: Axes | None = None,
    points: int = 41,
) -> Axes:
    """The loss of x and y over two of the model's weights, all others as they are. The model stays as it is.

    weights: a name and an index each, such as (("0.weight", (0, 0)), ("1.bias", 0)).
    path: the pairs (w1, w2) of a descent, first to last, drawn on the surface.
    span: how far to each side of the path, or of the present weights, the surface reaches; or what it covers,
    ((low, high), (low, high)). points: how many steps each weight takes there.
    """
    require_weights(model)
    if len(weights) != 2 or any(len(weight) != 2 for weight in weights):
        raise ArgumentError(f"weights must be two pairs, each of a name and an index, not {weights!r}.")
    places = [_place(model, *weight) for weight in weights]
    if places[0] == places[1]:
        raise ArgumentError(f"weights must be two different ones, but both are {places[0]}.")
    model = copy.deepcopy(model)
    if points < 2:
        raise ArgumentError(f"points must be at least 2, not {points}.")
    values = {p.name: p.value for p in model.parameters}
    present = [[float(model.backend.to_numpy(values[name][index])) for name, index in places]]
    way = on_host(present if path is None else path).astype(numpy.float64)
    if way.ndim != 2 or way.shape[1] != 2 or not len(way) or not numpy.isfinite(way).all():
        raise ShapeError(f"path must be finite pairs (w1, w2), shape (N, 2), but has shape {way.shape}.")
    if span is None:
        span = 0.5 * float(numpy.ptp(way, axis=0).max()) or 3.0
    sides = numpy.stack([way.min(axis=0) - span, way.max(axis=0) + span], 1) if numpy.ndim(span) == 0 else on_host(span)
    if sides.shape != (2, 2) or not (sides[:, 0] < sides[:, 1]).all():
        raise ArgumentError(f"span must be a positive number or ((low, high), (low, high)), not {span!r}.")

    first, second = (numpy.linspace(low, high, points) for low, high in sides)
    cost = numpy.empty((points, points))
    with model.backend.device():
        for column, row in numpy.ndindex(cost.shape):
            for (name, index), value in zip(places, (first[column], second[row]), strict=True):
                values[name][index] = float(value)
            cost[row, column] = model.evaluate(x, y, loss=loss, metrics=[])["loss"]
    if not numpy.isfinite(cost).all():
        raise DataError("the loss is not finite everywhere on this surface: choose a smaller span.")

    ax = axes_or_new(ax)
    # Levels lie closer the lower the loss, so that the bottom of a valley has a shape.
    low, high = float(cost.min()), float(cost.max())
    levels = low + max(high - low, 1e-12) * numpy.linspace(0.0, 1.0, 21) ** 2
    image = ax.contourf(first, second, cost, levels, cmap="cividis", norm=PowerNorm(0.5, levels[0], levels[-1]))
    ax.figure.colorbar(image, ax=ax, label="loss", ticks=levels[::4], format="%.2g")
    if path is not None:
        ax.plot(*way.T, color="white", linewidth=4.5)  # a seam between the path and the colours beneath
        ax.plot(
            *way.T,
            color=COLORS[1],
            linewidth=1.8,
            marker="." if len(way) <= _MOST_MARKED_STEPS else "",
            label="descent",
        )
        mark_ends(ax, *way.T)
        legend_above(ax)
    names = [f"{name}[{', '.join(map(str, index))}]" for name, index in places]
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])
    return ax


def _place(model: "Sequential", name: str, index: Any) -> tuple[str, tuple[int, ...]]:
    """A weight's name and index, checked."""
    shapes = {p.name: p.shape for p in model.parameters}
    if name not in shapes:
        raise unknown_name("parameter", name, shapes)
    index = tuple(int(i) for i in numpy.atleast_1d(index))
    if len(index) != len(shapes[name]) or not all(0 <= i < n for i, n in zip(index, shapes[name], strict=True)):
        raise ArgumentError(
            f"weights: {name} has shape {shapes[name]}, and {index} is not the place of a number in it."
        )
    return name, index
