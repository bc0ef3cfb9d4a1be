"""Plots of models as graphs: one box per layer, and arrows from the layers that it is called on."""

from typing import Any

from matplotlib.axes import Axes

from xpnet.errors import shape_text
from xpnet.layers.containers import Connection, Container
from xpnet.plots.common import COLORS, axes_or_new, require_weights

_WIDTH, _HEIGHT = 2.4, 0.85  # inches of the picture for each box
_ARROW: dict[str, Any] = {"arrowstyle": "-|>", "color": "black", "shrinkA": 14, "shrinkB": 14}


def model_graph(model: Container, ax: Axes | None = None) -> Axes:
    """The layers of a built model, with names and output shapes, below those whose outputs they are called on.

    A layer that is called several times has a box for each call: "0" and "0#2". Inputs are blue.
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
    for box in boxes:
        title = "Input" if box.layer is None else type(box.layer).__name__
        style = {"boxstyle": "round", "facecolor": "white", "edgecolor": COLORS[0 if box.layer is None else 6]}
        text = f"{box.name}: {title}\n{shape_text(box.shape)}"
        ax.text(*places[box.name], text, ha="center", va="center", fontsize="small", bbox=style, zorder=3)
        for name in dict.fromkeys(box.inputs):
            ax.annotate("", places[box.name], places[name], arrowprops=_ARROW, zorder=2)
    ax.set(xlim=(-widest / 2, widest / 2), ylim=(0.5 - len(levels), 0.5))
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
