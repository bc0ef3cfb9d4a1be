"""Plots of samples as points in a plane: activations or embeddings, reduced to two numbers each."""

from collections.abc import Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes

from xpnet.errors import DataError, ShapeError
from xpnet.plots.common import COLORS, MARKERS, axes_or_new, legend_above, numbers_of, on_host, texts


def embedding(points: Any, labels: Any = None, ax: Axes | None = None, names: Sequence[Any] | None = None) -> Axes:
    """Points (N, 2) with a color and a marker for each class, such as those of `attribution.principal_components`.

    labels: the class of each point, numbers or text (N,). names: a text beside each point, such as the words of an
    Embedding. Returns the Axes. Raises ShapeError for points, labels or names of other shapes, and DataError for points
    with NaN or infinity.
    """
    values, names = numbers_of(points, "points"), texts("names", names)
    if values.ndim != 2 or values.shape[1] != 2 or not len(values):
        raise ShapeError(
            f"points must have shape (N, 2), not {values.shape}. attribution.principal_components(values).points has."
        )
    if not numpy.isfinite(values).all():
        raise DataError("points contain NaN or infinity.")
    classes = None if labels is None else on_host(labels)
    if classes is not None and classes.dtype.kind == "O":
        classes = classes.astype(str)
    for name, given in (("labels", classes), ("names", names)):
        if given is not None and numpy.shape(given) != (len(values),):
            raise ShapeError(f"{name} must have one entry per point, ({len(values)},), not {numpy.shape(given)}.")
    ax = axes_or_new(ax)
    kinds, numbers = numpy.unique(numpy.zeros(len(values)) if classes is None else classes, return_inverse=True)
    for k, kind in enumerate(kinds):
        style: dict[str, Any] = {"color": COLORS[k % len(COLORS)], "markeredgecolor": "white", "markeredgewidth": 0.4}
        ax.plot(*values[numbers == k].T, MARKERS[k % len(MARKERS)], markersize=6, label=str(kind), **style)
    for (x, y), text in zip(values, names or [], strict=False):
        ax.annotate(text, (x, y), xytext=(4, 2), textcoords="offset points", fontsize="small")
    ax.set(xlabel="component 1", ylabel="component 2")
    ax.grid(alpha=0.3)
    if classes is not None:
        legend_above(ax)
    return ax
