"""How a training went: curves of its history, and the confusion matrix of its end."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator

from xpnet.errors import ShapeError, unknown_name
from xpnet.plots.common import COLORS, axes_or_new, on_host

_MOST_MARKED_EPOCHS = 50
_MOST_NUMBERED_CLASSES = 25  # of more, the numbers in the cells would be too small to read


def curves(
    history: Mapping[str, Any], keys: str | Sequence[str] = "loss", ax: Axes | None = None, logy: bool = False
) -> Axes:
    """Figures of a history epoch by epoch, each with its validation twin, where it has one, dashed in the same colour.

    history: what `fit` returned, or several runs by their names, {"lr 0.5": history, "lr 5": history}.
    keys: one name or several, such as "loss" or ("precision", "recall"). logy: a logarithmic scale for them.
    """
    keys = [keys] if isinstance(keys, str) else list(keys)
    several = bool(history) and all(isinstance(run, Mapping) for run in history.values())
    runs = history if several else {"": history}
    for run in runs.values():
        for key in keys:
            if key not in run:
                raise unknown_name("history key", key, run)
    ax = axes_or_new(ax)
    for i, ((title, run), key) in enumerate(itertools.product(runs.items(), keys)):
        color, name = COLORS[i % len(COLORS)], key.replace("_", " ")
        label = name if not several else title if len(keys) == 1 else f"{title}, {name}"
        lines = [(key, label if several else f"training {name}", "-")]
        if f"val_{key}" in run:
            lines.append((f"val_{key}", f"{label}, validation" if several else f"validation {name}", "--"))
        for source, text, style in lines:
            values = run[source]
            # Points too, for a single epoch makes no line; but of many they would only make it fat.
            marker = "." if len(values) <= _MOST_MARKED_EPOCHS else ""
            ax.plot(range(1, len(values) + 1), values, style, color=color, label=text, marker=marker)
    ax.set_xlabel("epoch")
    ax.set_ylabel(", ".join(key.replace("_", " ") for key in keys))
    if logy:
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def confusion_matrix(counts: Any, labels: Sequence[Any] | None = None, ax: Axes | None = None) -> Axes:
    """Counts (K, K), as `metrics.ConfusionMatrix` gives them: a row a true class, a column a predicted one.

    Colours are shares of the true class, on a scale that keeps small shares visible: they are the mistakes.
    labels: the names of the K classes, in place of their numbers. More than 25 classes show by their colours alone.
    """
    counts = on_host(counts)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not len(counts):
        raise ShapeError(f"counts must have shape (K, K), a row and a column a class, but has {counts.shape}.")
    classes = len(counts)
    names = [str(name) for name in (range(classes) if labels is None else labels)]
    if len(names) != classes:
        raise ShapeError(f"labels must name the {classes} classes of counts, but there are {len(names)}.")
    numbered = classes <= _MOST_NUMBERED_CLASSES
    side = max(3.5, 0.42 * min(classes, _MOST_NUMBERED_CLASSES))
    ax = axes_or_new(ax, (side + 1.6, side + 0.6))

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
