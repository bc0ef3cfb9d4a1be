"""Pictures of a training, with matplotlib: `pip install "xpnet[plots]"`.

Every function draws into the `ax` it is given, or into a new figure of its own, and returns the Axes. Nothing is shown
and pyplot is never touched, so it works with no screen: `plots.curves(history).figure.savefig("loss.png")`. For a
window, hand in an `ax` from `pyplot.subplots()`.
"""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy

from xpnet import layers
from xpnet.backends import get_backend
from xpnet.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    MissingPackageError,
    ShapeError,
    StateError,
    unknown_name,
)

if TYPE_CHECKING:
    from xpnet.losses import Loss
    from xpnet.model import Sequential

try:
    from matplotlib import patheffects
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise MissingPackageError(
        f'xpnet.plots needs matplotlib, which cannot be imported ({error}): pip install "xpnet[plots]"'
    ) from error

# Okabe and Ito's colours, told apart by colour-blind readers too; their yellow is left out, too pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

#: For points of different classes, and never by colour alone.
MARKERS = "os^DvP*X<>"

_MOST_NUMBERED_CLASSES = 25  # of more, the numbers in the cells would be too small to read
_MOST_MARKED_EPOCHS = 50
_PIXELS = 300  # along each side of a plane
_MOST_DRAWN_UNITS = 16  # in a column of a network
_MOST_NUMBERED_EDGES = 20  # between two columns

_PLATE = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}  # behind numbers on lines

_Floats: TypeAlias = numpy.ndarray[Any, numpy.dtype[numpy.float64]]


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
    ax = _axes(ax)
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
    counts = numpy.asarray(counts)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not len(counts):
        raise ShapeError(f"counts must have shape (K, K), a row and a column a class, but has {counts.shape}.")
    classes = len(counts)
    names = [str(name) for name in (range(classes) if labels is None else labels)]
    if len(names) != classes:
        raise ShapeError(f"labels must name the {classes} classes of counts, but there are {len(names)}.")
    numbered = classes <= _MOST_NUMBERED_CLASSES
    side = max(3.5, 0.42 * min(classes, _MOST_NUMBERED_CLASSES))
    ax = _axes(ax, (side + 1.6, side + 0.6))

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
    return _grid(numpy.asarray(images), titles, columns, cmap, figure)


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
    x, y = _host(x), _host(y)
    if x.ndim != 2 or x.shape[1] != 2 or not len(x):
        raise ShapeError(f"decision_boundary draws a plane: x must have shape (N, 2), not {x.shape}.")
    if model.input_shape not in ((), (2,)):
        raise ShapeError(f"decision_boundary draws models with input_shape (2,), but this one has {model.input_shape}.")
    if len(y) != len(x) or y.size == 0:
        raise ShapeError(f"y must hold a class for each of the {len(x)} points, but has shape {y.shape}.")
    (left, right), (bottom, top) = (_padded(column, 0.25) for column in x.T)
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

    ax = _axes(ax)
    colors = [COLORS[k % len(COLORS)] for k in range(classes)]
    ax.pcolormesh(across, up, region, cmap=ListedColormap(colors), vmin=-0.5, vmax=classes - 0.5, alpha=0.25)
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
    _legend_above(ax)
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
    if not model.is_built:
        raise StateError("the model has no weights yet: give it an input_shape, or train it first.")
    model = copy.deepcopy(model)
    places = [_place(model, *weight) for weight in weights]
    if len(places) != 2 or places[0] == places[1]:
        raise ArgumentError(f"weights must name two different weights, each (name, index), not {weights!r}.")
    if points < 2:
        raise ArgumentError(f"points must be at least 2, not {points}.")
    values = {p.name: p.value for p in model.parameters}
    present = [[float(model.backend.to_numpy(values[name][index])) for name, index in places]]
    way = _host(present if path is None else path).astype(numpy.float64)
    if way.ndim != 2 or way.shape[1] != 2 or not len(way) or not numpy.isfinite(way).all():
        raise ShapeError(f"path must be finite pairs (w1, w2), shape (N, 2), but has shape {way.shape}.")
    if span is None:
        span = 0.5 * float(numpy.ptp(way, axis=0).max()) or 3.0
    sides = numpy.stack([way.min(axis=0) - span, way.max(axis=0) + span], 1) if numpy.ndim(span) == 0 else _host(span)
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

    ax = _axes(ax)
    image = ax.contourf(first, second, cost, levels=20, cmap="cividis")
    ax.figure.colorbar(image, ax=ax, label="loss")
    if path is not None:
        _draw_path(ax, *way.T)
        ax.legend()
    names = [f"{name}[{', '.join(map(str, index))}]" for name, index in places]
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])
    return ax


def activation(layer: layers.Layer, ax: Axes | None = None, low: float = -6.0, high: float = 6.0) -> Axes:
    """An activation such as `layers.Tanh()` and its derivative, from the layer's own forward and backward.

    The layer itself is left alone: a new one with the same arguments is used, so it may stand in a model.
    """
    if not isinstance(layer, layers.Layer):
        hint = "; did you mean an object, with ()?" if isinstance(layer, type) else "."
        raise ArgumentTypeError(f"activation draws a layer such as layers.Sigmoid(), not {layer!r}{hint}")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ArgumentError(f"low must be less than high, both finite, but they are {low} and {high}.")
    z = numpy.linspace(low, high, 601)
    fresh = type(layer)(**layer.get_config())
    fresh.build(z.shape, backend="cpu", dtype="float64")
    # The second row shows whether an output depends on its own input alone.
    values = fresh.forward(numpy.stack([z, numpy.full_like(z, low)])) if not fresh.parameters else numpy.zeros((2, 1))
    if values.shape != (2, len(z)) or not numpy.allclose(values[1], values[0, 0], equal_nan=True):
        raise ArgumentError(f"{layer!r} is not a function of one number: draw one such as layers.Sigmoid().")
    values = values.copy()
    slopes = fresh.backward(numpy.ones((2, len(z))))

    ax = _axes(ax)
    name = type(layer).__name__
    ax.plot(z, values[0], color=COLORS[0], linewidth=2, label=repr(layer).removesuffix("()"))
    # Step has no derivative to learn by; what stands in for it must not pass for one.
    of = "what backward takes for its derivative" if isinstance(layer, layers.Step) else "its derivative"
    ax.plot(z, slopes[0], "--", color=COLORS[1], linewidth=2, label=of)
    ax.set_xlabel("z")
    ax.set_ylabel(f"{name}(z)")
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def network(model: "Sequential", ax: Axes | None = None) -> Axes:
    """A small fully connected net: a circle a unit, a line a weight, with its bias under each unit.

    A line is the wider, the larger the weight; solid and blue where it is positive, dashed and red where negative. Where
    there are few enough to read, the numbers are there too. More than 16 units in a layer are refused.
    """
    columns = _columns(model)
    most = max(len(units) for _, units, _, _ in columns)
    largest = max((float(numpy.abs(w).max()) for _, _, w, _ in columns if w.size), default=0.0) or 1.0
    ax = _axes(ax, (max(5.0, 2.4 * len(columns)), max(3.2, 0.85 * most + 1.2)))
    drawn = set()
    for k, (title, units, weight, bias) in enumerate(columns):
        heights = _heights(len(units))
        numbered = 0 < weight.size <= _MOST_NUMBERED_EDGES
        along = _clearest_place(*weight.shape) if numbered else 0.5
        for (i, j), w in numpy.ndenumerate(weight):
            start, end = _heights(len(weight))[i], heights[j]
            sign, style, color = ("negative", "--", COLORS[1]) if w < 0 else ("positive", "-", COLORS[0])
            label = None if sign in drawn else f"{sign} weight"
            drawn.add(sign)
            width = 0.5 + 3.5 * abs(w) / largest
            ax.plot([k - 1, k], [start, end], style, color=color, linewidth=width, label=label, zorder=1)
            if numbered:
                where = (k - 1 + along, start + along * (end - start))
                ax.annotate(f"{w:.3g}", where, ha="center", va="center", fontsize="small", bbox=_PLATE)
        ax.scatter([k] * len(units), heights, s=700, color="white", edgecolors="black", linewidths=1.2, zorder=3)
        for height, unit, b in zip(heights, units, bias if len(bias) else [None] * len(units), strict=True):
            ax.text(k, height, unit, ha="center", va="center", zorder=4)
            if b is not None:
                ax.annotate(
                    f"b = {b:.3g}", (k, height), (0, -17), textcoords="offset points", ha="center", va="top",
                    fontsize="small", bbox=_PLATE, zorder=4,
                )  # fmt: skip
        ax.text(k, 1.02, title, ha="center", va="bottom")
    ax.set_xlim(-0.35, len(columns) - 0.65)
    ax.set_ylim(0, 1)
    ax.set_axis_off()
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False)
    return ax


def filters(
    model: "Sequential",
    image_shape: Sequence[int] | None = None,
    name: str | None = None,
    columns: int = 8,
    figure: Figure | None = None,
) -> Any:
    """What each unit of the first layer looks for: its weights as an image, blue above 0, white at 0 and red below.

    image_shape: (H, W) or (H, W, C) of the inputs, if the model's input_shape does not say; C images a unit.
    name: of another weight than the first, such as "2.weight". Returns the Axes of all cells, as `image_grid` does.
    """
    if not model.is_built:
        raise StateError("the model has no weights yet: give it an input_shape, or train it first.")
    known = {p.name: p for p in model.parameters if len(p.shape) in (2, 4)}
    if not known or (name is not None and name not in known):
        raise unknown_name("weight", str(name), known)
    parameter = known[next(iter(known)) if name is None else name]
    weight = model.backend.to_numpy(parameter.value)
    if weight.ndim == 2:
        features, units = weight.shape
        side = math.isqrt(features)
        guesses = [shape for shape in (model.input_shape, (side, side)) if len(shape) in (2, 3)]
        shape = tuple(image_shape) if image_shape else next((s for s in guesses if math.prod(s) == features), ())
        if len(shape) not in (2, 3) or math.prod(shape) != features:
            raise ShapeError(
                f"{parameter.name} has {features} inputs, which image_shape={image_shape} does not arrange: "
                f"give (H, W) or (H, W, C) with a product of {features}."
            )
        weight = weight.reshape(*shape[:2], -1, units)
    height, width, channels, units = weight.shape
    images = weight.transpose(3, 2, 0, 1).reshape(-1, height, width)
    titles = [f"{unit}" if channels == 1 else f"{unit}, {c}" for unit in range(units) for c in range(channels)]
    bound = float(numpy.abs(images).max()) or 1.0
    grid = _grid(images, titles, columns, "RdBu", figure, (-bound, bound))
    grid[0, 0].figure.colorbar(grid[0, 0].images[0], ax=grid, label=parameter.name, shrink=0.8)
    return grid


def descent(
    function: Callable[[float], Any],
    path: Any,
    ax: Axes | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Axes:
    """The curve of a function of one number, and on it the points x (N,) of a descent, first to last.

    low, high: where the curve begins and ends; by default a little beyond the points.
    """
    way = _host(path).astype(numpy.float64)
    if way.ndim != 1 or not len(way) or not numpy.isfinite(way).all():
        raise ShapeError(f"path must be finite numbers, shape (N,), but has shape {way.shape}.")
    around = _padded(way, 0.3)
    low, high = (around[0] if low is None else low), (around[1] if high is None else high)
    if not low < high:
        raise ArgumentError(f"low must be less than high, but they are {low} and {high}.")
    curve = numpy.linspace(low, high, 400)
    ax = _axes(ax)
    ax.plot(curve, [float(function(float(at))) for at in curve], color=COLORS[0], linewidth=2, label="f(x)")
    _draw_path(ax, way, numpy.array([float(function(float(at))) for at in way]))
    ax.set_xlabel("x")
    ax.set_ylabel("f(x)")
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


# Inside --------------------------------------------------------------------------------------------------------


def _axes(ax: Axes | None, size: tuple[float, float] = (6.4, 4.8)) -> Axes:
    return Figure(figsize=size, layout="constrained").add_subplot() if ax is None else ax


def _host(a: Any) -> numpy.ndarray[Any, Any]:
    """Whatever holds numbers, on any device, as a NumPy array."""
    return get_backend("cpu").to_numpy(a)


def _padded(values: _Floats, share: float) -> tuple[float, float]:
    """The range of these values, and a share of it more on either side."""
    low, high = float(values.min()), float(values.max())
    margin = share * (high - low) or 1.0
    return low - margin, high + margin


def _grid(
    images: numpy.ndarray[Any, Any],
    titles: Sequence[Any] | None,
    columns: int,
    cmap: str,
    figure: Figure | None,
    limits: tuple[float, float] | None = None,
) -> Any:
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
    low, high = (images.min(), images.max()) if limits is None else limits
    for i, ax in enumerate(grid.flat):
        ax.set_axis_off()
        if i < len(images):
            ax.imshow(images[i], cmap=cmap, vmin=low, vmax=high)
            if titles is not None:
                ax.set_title(str(titles[i]), fontsize="medium", pad=3)
    return grid


def _draw_path(ax: Axes, across: _Floats, up: _Floats) -> None:
    """A descent, its steps joined, on whatever is drawn already: a white seam parts it from the colours beneath."""
    seam = [patheffects.withStroke(linewidth=4, foreground="white")]
    marker = "." if len(across) <= 100 else ""
    ax.plot(across, up, color=COLORS[1], linewidth=1.8, marker=marker, path_effects=seam, label="descent")
    for place, marker, name in ((0, "o", "start"), (-1, "*", "end")):
        size = 9 if marker == "o" else 15
        ax.plot(
            across[place], up[place], marker, color="white", markeredgecolor="black", markersize=size, label=name,
            zorder=3,
        )  # fmt: skip


def _place(model: "Sequential", name: str, index: Any) -> tuple[str, tuple[int, ...]]:
    """A weight's name and index, checked."""
    shapes = {p.name: p.shape for p in model.parameters}
    if name not in shapes:
        raise unknown_name("parameter", name, shapes)
    index = tuple(index) if isinstance(index, Sequence) else (index,)
    if len(index) != len(shapes[name]) or not all(0 <= i < n for i, n in zip(index, shapes[name], strict=True)):
        raise ArgumentError(
            f"weights: {name} has shape {shapes[name]}, and {index} is not the place of a number in it."
        )
    return name, index


_Column: TypeAlias = tuple[str, list[str], _Floats, _Floats]


def _columns(model: "Sequential") -> list[_Column]:
    """(title, names of units, weights from the column before, biases) for the inputs and each Dense layer."""
    if not model.is_built:
        raise StateError("the model has no weights yet: give it an input_shape, or train it first.")
    dense = [layer for layer in model.layers if isinstance(layer, layers.Dense)]
    for i, layer in enumerate(model.layers):
        weightless = not layer.parameters and math.prod(layer.input_shape) == math.prod(layer.output_shape)
        if not (weightless or (layer in dense and len(layer.input_shape) == 1)):
            raise ArgumentError(f"network draws Dense layers and activations between them, but layer {i} is {layer!r}.")
    sizes = [math.prod(model.input_shape), *(layer.units for layer in dense)]
    if max(sizes) > _MOST_DRAWN_UNITS:
        raise ArgumentError(
            f"network draws at most {_MOST_DRAWN_UNITS} units a layer, but this model is {'-'.join(map(str, sizes))}: "
            "see model.summary(), or plots.filters for the first weights."
        )
    none = numpy.zeros((0, 0))
    columns: list[_Column] = [("inputs", [f"$x_{{{i + 1}}}$" for i in range(sizes[0])], none, none[0:0, 0])]
    for layer in model.layers:
        if layer not in dense:
            title, *rest = columns[-1]
            columns[-1] = (f"{title}\n{type(layer).__name__}", *rest)
            continue
        last = layer is dense[-1]
        letter, title = ("y", "outputs") if last else ("h", "hidden")
        names = [f"${letter}_{{{j + 1}}}$" for j in range(layer.units)]
        weight, bias = layer.weight.value, layer.bias.value if layer.use_bias else none[0:0, 0]
        columns.append((title, names, model.backend.to_numpy(weight), model.backend.to_numpy(bias)))
    return columns


def _heights(count: int) -> _Floats:
    """Where the units of a column stand, top to bottom, in a picture of height 1."""
    return 1.0 - (numpy.arange(count) + 0.5) / count


def _clearest_place(before: int, after: int) -> float:
    """The share of the way from column to column where the numbers on all edges stand farthest apart."""
    ways = numpy.linspace(0.2, 0.8, 61)
    start, end = _heights(before)[:, None, None], _heights(after)[None, :, None]
    heights = numpy.sort((start + ways * (end - start)).reshape(-1, len(ways)), axis=0)
    gaps = numpy.diff(heights, axis=0)
    return float(ways[gaps.min(axis=0).argmax()]) if len(gaps) else 0.5
