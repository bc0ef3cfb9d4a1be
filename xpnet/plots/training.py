"""Plots of a training run: learning curves, the learning rate finder and the confusion matrix."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator

from xpnet.backends import get_backend
from xpnet.callbacks import LearningRateFinder
from xpnet.config import flag
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, StateError, shown, unknown_name
from xpnet.plots.common import COLORS, axes_or_new, numbers_of, on_host, texts

_MOST_MARKED_EPOCHS = 50
_MOST_NUMBERED_CLASSES = 25  # with more, the numbers in the cells would be too small to read


def curves(
    history: Mapping[str, Any], keys: str | Sequence[str] = "loss", ax: Axes | None = None, logy: bool = False
) -> Axes:
    """Learning curves: values of a history by epoch, and its validation values as dashed lines in the same colors.

    history: what `fit` returned, or several by name, {"lr 0.5": history, "lr 5": history}.
    keys: one name or several, such as "loss" or ("precision", "recall"). "loss" also draws the values of "val_loss", if
    there are any; "val_loss" draws only these.
    logy: whether the y axis is logarithmic.

    In a script, save the figure: `plots.curves(history).figure.savefig("curves.png")`. `pyplot.show()` shows only
    figures of pyplot: `plots.curves(history, ax=pyplot.gca())`.
    """
    flag("", "logy", logy)
    keys = [keys] if isinstance(keys, str) else texts("keys", keys) or []
    if not keys:
        raise ArgumentError("keys must name at least one value of the history.")
    if not isinstance(history, Mapping):
        raise ArgumentTypeError(f"history must be what fit returned, or a dict of several, not {shown(history)}.")
    several = bool(history) and all(isinstance(run, Mapping) for run in history.values())
    runs = history if several else {"": history}
    for run in runs.values():
        for key in keys:
            if key not in run:
                raise unknown_name("history key", key, run)
    keys = without_repeated_measures(keys)
    ax = axes_or_new(ax)
    for i, ((title, run), key) in enumerate(itertools.product(runs.items(), keys)):
        measure = key.removeprefix("val_")
        color, name = COLORS[i % len(COLORS)], measure.replace("_", " ")
        label = name if not several else title if len(keys) == 1 else f"{title}, {name}"
        lines = [] if key != measure else [(key, label if several else f"training {name}", "-")]
        if f"val_{measure}" in run:
            lines.append((f"val_{measure}", f"{label}, validation" if several else f"validation {name}", "--"))
        for source, text, style in lines:
            values = numbers_of(run[source], f"history[{source!r}]").reshape(-1)
            # A single epoch makes no line, so points are needed; many points would only thicken the line.
            marker = "." if len(values) <= _MOST_MARKED_EPOCHS else ""
            ax.plot(range(1, len(values) + 1), values, style, color=color, label=text, marker=marker)
    ax.set(xlabel="epoch", ylabel=", ".join(key.removeprefix("val_").replace("_", " ") for key in keys))
    if logy:
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def without_repeated_measures(keys: Sequence[str]) -> list[str]:
    """The keys, each once, without those of validation values whose training values are among them."""
    return [
        key for key in dict.fromkeys(keys) if key.removeprefix("val_") == key or key.removeprefix("val_") not in keys
    ]


def learning_rates(finder: LearningRateFinder, ax: Axes | None = None) -> Axes:
    """The range test of a LearningRateFinder: the smoothed loss by learning rate, and the rate that it suggests.

    Raises StateError if fit has not run the test yet.
    """
    if not isinstance(finder, LearningRateFinder):
        raise ArgumentTypeError(f"finder must be a callbacks.LearningRateFinder, not {shown(finder)}.")
    if not finder.rates:
        raise StateError("the LearningRateFinder has no rates yet: give it to fit first, callbacks=finder.")
    ax = axes_or_new(ax)
    ax.plot(finder.rates, finder.losses, color=COLORS[0])
    if finder.suggestion is not None:
        ax.axvline(finder.suggestion, color=COLORS[1], linestyle="--", label=f"suggestion {finder.suggestion:.3g}")
        ax.legend()
    ax.set(xscale="log", xlabel="learning rate", ylabel="loss, smoothed")
    ax.grid(alpha=0.3)
    return ax


def confusion_matrix(
    counts: Any = None,
    labels: Any = None,
    ax: Axes | None = None,
    *,
    class_names: Sequence[Any] | None = None,
    y_true: Any = None,
    y_pred: Any = None,
) -> Axes:
    """The number of samples of each true class (row) and predicted class (column).

    confusion_matrix(counts): from the counts (K, K) of `metrics.ConfusionMatrix`.
    confusion_matrix(y_true, y_pred): from true classes (N,) and predicted classes (N,), numbers or text; the rows are
    the classes that occur, in sorted order. y_pred may also be the outputs (N, K) of a classifier, of which the largest
    gives the predicted class.
    class_names, or `labels` after counts: the names of the classes by number, by default the numbers themselves. For
    classes that are text, it is the order in which they are shown.

    Colors show shares of the true class, on a scale that keeps small shares, the mistakes, visible. With more than 25
    classes, only colors are shown.

    Raises ShapeError for shapes that do not fit, and DataError for classes that are not whole numbers or text, or that
    class_names does not have.
    """
    if y_true is not None or y_pred is not None:
        if counts is not None or labels is not None:
            raise ArgumentError("confusion_matrix: give counts, or y_true and y_pred.")
        counts, labels = y_true, y_pred
    if counts is None:
        raise ArgumentError("confusion_matrix: give counts (K, K), or y_true and y_pred, both (N,).")
    counts = on_host(counts)
    if counts.ndim == 1 or (counts.ndim == 2 and counts.shape[1] == 1 and len(counts) > 1):
        counts, labels = _counted(counts.reshape(-1), labels, class_names)
    elif class_names is not None:
        if labels is not None:
            raise ArgumentError("confusion_matrix: labels and class_names are the same: give one of them.")
        labels = class_names
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not len(counts):
        raise ShapeError(f"counts must have shape (K, K), a row and a column per class, not {counts.shape}.")
    classes = len(counts)
    names = texts("labels", range(classes) if labels is None else labels) or []
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


def _counted(true: Any, predicted: Any, class_names: Sequence[Any] | None) -> tuple[Any, list[Any]]:
    """(the counts (K, K) of these true and predicted classes, the names of the K classes)."""
    predicted = numpy.zeros(0) if predicted is None else on_host(predicted)
    if predicted.ndim == 2 and predicted.shape[1] > 1:
        if numpy.isnan(predicted).any():
            raise DataError("confusion_matrix: y_pred contains NaN.")
        predicted = predicted.argmax(axis=1)
    if predicted.shape not in (true.shape, (*true.shape, 1)) or not len(true):
        raise ShapeError(
            f"confusion_matrix: y_true {true.shape} and y_pred {predicted.shape} must have one class per sample."
        )
    predicted = predicted.reshape(-1)
    for name, classes in (("y_true", true), ("y_pred", predicted)):
        if classes.dtype.kind == "f" and not (classes == numpy.round(classes)).all():
            raise DataError(f"confusion_matrix: {name} must be classes, whole numbers or text, but some are not.")
    text = [classes.dtype.kind in "OSU" for classes in (true, predicted)]
    if any(text) and not all(text):
        raise ArgumentTypeError("confusion_matrix: y_true and y_pred must both be numbers, or both be text.")
    if all(text):
        true, predicted = true.astype(str), predicted.astype(str)
    found = numpy.unique(numpy.concatenate([true, predicted]))
    names: list[Any] = [f"{value:.0f}" if value.dtype.kind == "f" else str(value) for value in found]
    known: Any = found
    if class_names is not None:
        names = [str(name) for name in class_names]
        known = numpy.array(names) if all(text) else numpy.arange(len(names))
        missing = numpy.setdiff1d(found, known)
        if len(missing):
            raise DataError(
                f"confusion_matrix: the class {missing[0]} is none of the {len(names)} classes of class_names; classes "
                "that are numbers count from 0."
            )
    order = numpy.argsort(known, kind="stable")
    rows, columns = (order[numpy.searchsorted(known[order], classes)] for classes in (true, predicted))
    return get_backend("cpu").count_pairs(rows, columns, (len(names), len(names)), None), names
