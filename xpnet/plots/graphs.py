"""Plots of models as graphs: one box per layer, and arrows from the layers that it is called on."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path

from xpnet.errors import shape_text
from xpnet.layers.containers import Connection, Container
from xpnet.plots.common import COLORS, axes_or_new, require_weights

_WIDTH, _HEIGHT = 2.4, 0.85  # inches of the picture for each box
_EDGE = 0.24  # from the middle of a box to its edge, if the distance between two levels is 1
_LANE = 0.12  # between two arrows beside the boxes
_ARROW: dict[str, Any] = {"arrowstyle": "-|>", "color": "black", "mutation_scale": 9, "zorder": 2}


def model_graph(model: Container, ax: Axes | None = None) -> Axes:
    """The layers of a built model, with names and output shapes, below those whose outputs they are called on.

    A layer that is called several times has a box for each call: "0" and "0#2". Inputs are blue. Arrows that skip
    levels run on the right of the boxes. Raises StateError if the model is not built.
    """
    require_weights(model)
    boxes = model.connections()
    levels = _levels(boxes)
    widest = max(map(len, levels))
    ax = axes_or_new(ax, (max(3.0, _WIDTH * widest), max(2.0, _HEIGHT * len(levels))))
    places: dict[str, tuple[float, float]] = {}
    for depth, level in enumerate(levels):
        level.sort(key=lambda box: sum(places[name][0] for name in box.inputs) / max(1, len(box.inputs)))
        for k, box in enumerate(level):
            places[box.name] = k - (len(level) - 1) / 2, -float(depth)
    skips: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for box in boxes:
        title = "Input" if box.layer is None else type(box.layer).__name__
        style = {"boxstyle": "round", "facecolor": "white", "edgecolor": COLORS[0 if box.layer is None else 6]}
        text = f"{box.name}: {title}\n{shape_text(box.shape)}"
        ax.text(*places[box.name], text, ha="center", va="center", fontsize="small", bbox=style, zorder=3)
        for name in dict.fromkeys(box.inputs):
            (x, y), (end_x, end_y) = places[name], places[box.name]
            if y - end_y > 1:
                skips.append((places[name], places[box.name]))
            else:
                ax.add_patch(FancyArrowPatch(path=Path([(x, y - _EDGE), (end_x, end_y + _EDGE)]), **_ARROW))
    lanes = _lanes([(-y, -end_y) for (_, y), (_, end_y) in skips])
    for lane, ((x, y), (end_x, end_y)) in zip(lanes, skips, strict=True):
        side = widest / 2 + lane * _LANE
        start, end = x + _LANE, end_x + _LANE  # beside arrows to and from the next level
        below, above = y - 0.4, end_y + 0.4  # between two levels
        corners = [(start, y - _EDGE), (start, below), (side, below), (side, above), (end, above), (end, end_y + _EDGE)]
        ax.add_patch(FancyArrowPatch(path=Path(corners), **_ARROW))
    right = widest / 2 + _LANE * (1 + max(lanes, default=-1))
    ax.set(xlim=(-widest / 2, right), ylim=(0.5 - len(levels), 0.5))
    ax.set_axis_off()
    return ax


def _levels(boxes: list[Connection]) -> list[list[Connection]]:
    """The boxes by the length of the longest path to them from an input."""
    depths, levels = dict[str, int](), list[list[Connection]]()
    for box in boxes:  # each after those that it depends on
        depths[box.name] = depth = max((depths[name] + 1 for name in box.inputs), default=0)
        if depth == len(levels):
            levels.append([])
        levels[depth].append(box)
    return levels


def _lanes(spans: list[tuple[float, float]]) -> list[int]:
    """The lane of each span (start, end), from 0 on. Spans that overlap have different lanes, short ones the first."""
    lanes, found = list[list[tuple[float, float]]](), [0] * len(spans)
    for i in sorted(range(len(spans)), key=lambda i: spans[i][1] - spans[i][0]):
        start, end = spans[i]
        free = (k for k, lane in enumerate(lanes) if all(end <= other[0] or other[1] <= start for other in lane))
        found[i] = next(free, len(lanes))
        if found[i] == len(lanes):
            lanes.append([])
        lanes[found[i]].append(spans[i])
    return found
