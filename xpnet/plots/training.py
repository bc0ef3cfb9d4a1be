"""Plots of a training run: learning curves and the confusion matrix."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator

from xpnet.config import flag
from xpnet.errors import ShapeError, unknown_name
from xpnet.plots.common import COLORS, axes_or_new, on_host

_MOST_MARKED_EPOCHS = 50
_MOST_NUMBERED_CLASSES = 25  # with more, the numbers in the cells would be too small to read


def curves(
    history: Mapping[str, Any], keys: str | Sequence[str] = "loss", ax: Axes | None = None, logy: bool = False
) -> Axes:
    """Learning curves: values of a history by epoch, and its validation values as dashed lines in the same colors.

    history: what `fit` returned, or several by name, {"lr 0.5": history, "lr 5": history}.
    keys: one name or several, such as "loss" or ("precision", "recall"). logy: whether the y axis is logarithmic.
    """
    flag("", "logy", logy)
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
            # A single epoch makes no line, so points are needed; many points would only thicken the line.
            marker = "." if len(values) <= _MOST_MARKED_EPOCHS else ""
            ax.plot(range(1, len(values) + 1), values, style, color=color, label=text, marker=marker)
    ax.set(xlabel="epoch", ylabel=", ".join(key.replace("_", " ") for key in keys))
    if logy:
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def confusion_matrix(counts: Any, labels: Sequence[Any] | None = None, ax: Axes | None = None) -> Axes:
    """The counts (K, K) of `metrics.ConfusionMatrix`: one row per true class, one column per predicted class.

    Colors show shares of the true class, on a scale that keeps small shares, the mistakes, visible.
    labels: the names of the K classes, by default their numbers. With more than 25 classes, only colors are shown.
    """
    counts = on_host(counts)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not len(counts):
        raise ShapeError(f"counts must have shape (K, K), a row and a column per class, not {counts.shape}.")
    classes = len(counts)
    names = [str(name) for name in (range(classes) if labels is None else labels)]
    if len(names) != classes:
        raise ShapeError(f"labels must name the {classes} classes of counts, but has {len(names)} names.")
    numbered = classes <= _MOST_NUMBERED_CLASSES
    side = max(3.5, 0.42 * min(classes, _MOST_NUMBERED_CLASSES))
    ax = axes_or_new(ax, (side + 1.6, side + 0.6))

    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / numpy.where(totals > 0, totals, 1)
    # aspect="auto" lets the layout fit labels and color bar; the size of the figure makes the cells nearly square.
    image = ax.imshow(shares, cmap="cividis", norm=PowerNorm(0.4, vmin=0.0, vmax=1.0), aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="share of the true class", ticks=[0.0, 0.01, 0.1, 0.3, 0.6, 1.0])
    if numbered:
        for (row, column), count in numpy.ndenumerate(counts):
            if count:  # zeros everywhere would hide the mistakes
                color = "white" if shares[row, column] < 0.15 else "black"  # in contrast to the cell
                ax.text(column, row, f"{count:.4g}", ha="center", va="center", color=color, fontsize="small")
        ax.set_xticks(range(classes), names, rotation=0 if max(map(len, names)) <= 3 else 90)
        ax.set_yticks(range(classes), names)
    ax.set(xlabel="predicted class", ylabel="true class")
    return ax
