"""Pictures of a training, with matplotlib: `pip install "xpnet[plots]"`.

Every function draws into the `ax` it is given, or into a new figure of its own, and returns the Axes. Nothing is shown
and pyplot is never touched, so it works with no screen: `plots.curves(history).figure.savefig("loss.png")`. For a
window, hand in an `ax` from `pyplot.subplots()`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from xpnet.errors import ArgumentError, MissingPackageError, ShapeError, unknown_name


try:
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise MissingPackageError(
        f'xpnet.plots needs matplotlib, which cannot be imported ({error}): pip install "xpnet[plots]"'
    ) from error

# Okabe and Ito's colours, told apart by colour-blind readers too; their yellow is left out, too pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_MOST_NUMBERED_CLASSES = 25  # of more, the numbers in the cells would be too small to read


def curves(history: Mapping[str, Sequence[float]], keys: str | Sequence[str] = "loss", ax: Axes | None = None) -> Axes:
    """Figures of a history epoch by epoch, each with its validation twin, where it has one, dashed in the same colour.

    keys: one name or several, such as "loss" or ("precision", "recall").
    """
    keys = [keys] if isinstance(keys, str) else list(keys)
    for key in keys:
        if key not in history:
            raise unknown_name("history key", key, history)
    if ax is None:
        ax = Figure(layout="constrained").add_subplot()
    for i, key in enumerate(keys):
        color, name = COLORS[i % len(COLORS)], key.replace("_", " ")
        twins = [(key, "training " + name, "-")]
        if f"val_{key}" in history:
            twins.append((f"val_{key}", "validation " + name, "--"))
        for source, label, style in twins:
            values = history[source]
            # Points too, for a single epoch makes no line.
            ax.plot(range(1, len(values) + 1), values, style, color=color, label=label, marker=".")
    ax.set_xlabel("epoch")
    ax.set_ylabel(", ".join(key.replace("_", " ") for key in keys))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def confusion_matrix(counts: Any, labels: Sequence[Any] | None = None, ax: Axes | None = None) -> Axes:
    """Counts (K, K), as `metrics.ConfusionMatrix` gives them: a row a true class, a column a predicted one.

    Colours are shares of the true class, on a scale that keeps small shares visible: they are the mistakes.
    labels: the names of the K classes, in place of their numbers. More than 25 classes show by their colours alone.
    """
    counts = numpy.asarray(counts)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not len(counts):
        raise ShapeError(f"counts must have shape (K, K), a row and a column a class, but has {counts.shape}.")
    classes = len(counts)
    names = [str(name) for name in (range(classes) if labels is None else labels)]
    if len(names) != classes:
        raise ShapeError(f"labels must name the {classes} classes of counts, but there are {len(names)}.")
    numbered = classes <= _MOST_NUMBERED_CLASSES
    if ax is None:
        side = max(3.5, 0.42 * min(classes, _MOST_NUMBERED_CLASSES))
        ax = Figure(figsize=(side + 1.6, side + 0.6), layout="constrained").add_subplot()

    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / numpy.where(totals > 0, totals, 1)
    # aspect="auto" lets the layout fit labels and colour bar exactly; the figure's shape makes the cells about square.
    image = ax.imshow(shares, cmap="cividis", norm=PowerNorm(0.4, vmin=0.0, vmax=1.0), aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="share of the true class", ticks=[0.0, 0.01, 0.1, 0.3, 0.6, 1.0])
    if numbered:
        for (row, column), count in numpy.ndenumerate(counts):
            if count:  # a page full of zeros hides what matters
                color = "white" if shares[row, column] < 0.15 else "black"  # whichever the cell's own colour shows up
                ax.text(column, row, f"{count:.4g}", ha="center", va="center", color=color, fontsize="small")
        upright = max(map(len, names)) <= 3
        ax.set_xticks(range(classes), names, rotation=0 if upright else 90)
        ax.set_yticks(range(classes), names)
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class")
    return ax


def image_grid(
    images: Any,
    titles: Sequence[Any] | None = None,
    columns: int = 8,
    cmap: str = "gray",
    figure: Figure | None = None,
) -> Any:
    """Images (N, H, W), (N, H, W, 1) or, in colour, (N, H, W, 3), side by side in rows of `columns`.

    titles: a text above each. cmap: the colours of images without colour, over their common range.
    figure: where to draw, instead of a new one. Returns the Axes of all cells, (rows, columns), as a NumPy array.
    """
    images = numpy.asarray(images)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)) or not images.size:
        raise ShapeError(f"images must be some of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), not {images.shape}.")
    if titles is not None and len(titles) != len(images):
        raise ShapeError(f"titles must be one an image: there are {len(titles)}, but {len(images)} images.")
    if columns < 1:
        raise ArgumentError(f"columns must be at least 1, not {columns}.")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    if figure is None:
        height = images.shape[1] / images.shape[2] + (0.0 if titles is None else 0.2)
        figure = Figure(figsize=(columns + 0.2, rows * height + 0.05), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    low, high = images.min(), images.max()
    for i, ax in enumerate(grid.flat):
        ax.set_axis_off()
        if i < len(images):
            ax.imshow(images[i], cmap=cmap, vmin=low, vmax=high)
            if titles is not None:
                ax.set_title(str(titles[i]), fontsize="medium", pad=3)
    return grid
