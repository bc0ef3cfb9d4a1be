"""What all pictures share: colours, markers, Axes, and data brought to the host."""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy

from xpnet.backends import get_backend
from xpnet.errors import MissingPackageError, StateError

if TYPE_CHECKING:
    from xpnet.model import Sequential

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingPackageError(
        f'xpnet.plots needs matplotlib, which cannot be imported ({error}): pip install "xpnet[plots]"'
    ) from error

# Okabe and Ito's colours, told apart by colour-blind readers too; their yellow is left out, too pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

#: For points of different classes, which never differ by colour alone.
MARKERS = "os^DvP*X<>"

Floats: TypeAlias = numpy.ndarray[Any, numpy.dtype[numpy.float64]]


def axes_or_new(ax: Axes | None, size: tuple[float, float] = (6.4, 4.8)) -> Axes:
    return Figure(figsize=size, layout="constrained").add_subplot() if ax is None else ax


def on_host(a: Any) -> numpy.ndarray[Any, Any]:
    """Whatever holds numbers, on any device, as a NumPy array."""
    return get_backend("cpu").to_numpy(a)


def require_weights(model: "Sequential") -> None:
    if not model.is_built:
        raise StateError("the model has no weights yet: give it an input_shape, or train it first.")


def padded(values: Floats, share: float) -> tuple[float, float]:
    """The range of these values, and a share of it more on either side."""
    low, high = float(values.min()), float(values.max())
    margin = share * (high - low) or 1.0
    return low - margin, high + margin


def mark_ends(ax: Axes, across: Floats, up: Floats) -> None:
    """The start of a descent as a circle, its end as a star, to be seen on any colour."""
    for place, marker, size, name in ((0, "o", 9, "start"), (-1, "*", 15, "end")):
        style: dict[str, Any] = {"color": "white", "markeredgecolor": "black", "markersize": size, "zorder": 3}
        ax.plot(across[place], up[place], marker, label=name, **style)


def legend_above(ax: Axes) -> None:
    """A legend over the picture, where it can hide nothing."""
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False)
