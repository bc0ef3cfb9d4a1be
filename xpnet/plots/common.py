"""Helpers of all plots: colors, markers, Axes, legends, and arrays copied to the host."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy

from xpnet.backends import get_backend
from xpnet.config import real_array
from xpnet.errors import ArgumentTypeError, MissingPackageError, StateError, shown
from xpnet.layers.containers import Container

try:
    from matplotlib.axes import Axes

    from xpnet.plots.notebooks import PlotAxes, new_figure
except ImportError as error:
    raise MissingPackageError(
        f'xpnet.plots needs matplotlib, which cannot be imported ({error}): pip install "xpnet[plots]"'
    ) from error

# The palette of Okabe and Ito, which color-blind readers can tell apart, without the yellow, too pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

#: Markers of classes, so that they do not differ by color alone.
MARKERS = "os^DvP*X<>"

Floats: TypeAlias = numpy.ndarray[Any, numpy.dtype[numpy.float64]]


def axes_or_new(ax: Axes | None, size: tuple[float, float] = (6.4, 4.8)) -> Axes:
    """`ax` itself, or the Axes of a new figure of this size in inches."""
    if ax is None:
        return new_figure(size).add_subplot(axes_class=PlotAxes)
    if not isinstance(ax, Axes):
        raise ArgumentTypeError(f"ax must be Axes of matplotlib, or None for those of a new figure, not {shown(ax)}.")
    return ax


def on_host(a: Any) -> numpy.ndarray[Any, Any]:
    """An array of any library on any device, or a list, as a NumPy array."""
    return get_backend("cpu").to_numpy(a)


def numbers_of(a: Any, name: str) -> Floats:
    """Numbers on the host, in float64. Raises ArgumentTypeError for anything else."""
    numbers: Floats = real_array(a, name).astype(numpy.float64)
    return numbers


def texts(name: str, given: Any) -> list[str] | None:
    """A sequence of names as text; None stays None."""
    if given is None:
        return None
    ordered = hasattr(given, "__len__") and hasattr(given, "__getitem__") and getattr(given, "shape", None) != ()
    if isinstance(given, str | bytes | Mapping) or not ordered:
        raise ArgumentTypeError(f"{name} must be a list of strings, not {shown(given)}.")
    return [str(text) for text in given]


def require_weights(model: Container) -> None:
    """Raise an error if this argument is not a model that is built."""
    if not isinstance(model, Container):
        raise ArgumentTypeError(f"model must be an xpnet.Sequential or an xpnet.Model, not {shown(model)}.")
    if not model.is_built:
        raise StateError("the model is not built yet: give it an input_shape, or train it first.")


def padded(values: Floats, share: float) -> tuple[float, float]:
    """The range of these values, extended on each side by this share of its length."""
    low, high = float(values.min()), float(values.max())
    margin = share * (high - low) or 1.0
    return low - margin, high + margin


def mark_ends(ax: Axes, x: Floats, y: Floats) -> None:
    """Mark the start of a descent with a circle and its end with a star, both visible on any color."""
    for index, marker, size, name in ((0, "o", 9, "start"), (-1, "*", 15, "end")):
        style: dict[str, Any] = {"color": "white", "markeredgecolor": "black", "markersize": size, "zorder": 3}
        ax.plot(x[index], y[index], marker, label=name, **style)


def legend_above(ax: Axes) -> None:
    """A legend above the Axes, where it hides nothing."""
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False)
