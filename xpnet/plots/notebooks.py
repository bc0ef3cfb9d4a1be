"""Figures of plots: in a notebook they show themselves as pictures; elsewhere they need no display."""

import io
from typing import Any

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xpnet.display import progress


class PlotFigure(Figure):
    """A figure that a notebook shows as a picture, and only once."""

    def _ipython_display_(self) -> None:
        from IPython.display import display
        from matplotlib import pyplot

        data, metadata = picture(self)
        pyplot.close(self)  # which would show it again at the end of the cell
        display(data, metadata=metadata, raw=True)


class PlotAxes(Axes):
    """Axes that a notebook shows as the picture of their figure, not as their name."""

    def _ipython_display_(self) -> None:
        _show(self.get_figure())


class AxesGrid(numpy.ndarray[Any, numpy.dtype[Any]]):
    """An array of Axes that a notebook shows as the picture of their figure."""

    def _ipython_display_(self) -> None:
        if not (self.size and isinstance(self.flat[0], Axes)):  # made from the grid, such as a comparison
            raise NotImplementedError  # IPython then shows its repr
        _show(self.flat[0].get_figure())


def _show(figure: Any) -> None:
    from IPython.display import display

    display(figure)


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure of this size in inches. A notebook with inline pictures shows it at the end of the cell."""
    if progress.in_notebook():
        from matplotlib import pyplot  # here, because other programs need no pyplot, which may look for a display

        if "inline" in matplotlib.get_backend():
            figure: Figure = pyplot.figure(figsize=size, layout="constrained", FigureClass=PlotFigure)
            return figure
    return PlotFigure(figsize=size, layout="constrained")


def picture(figure: Figure) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the data of a figure by MIME type, their metadata), in the formats that this notebook has for figures."""
    from IPython import get_ipython

    data: dict[str, Any] = {"text/plain": repr(figure)}
    metadata: dict[str, Any] = {}
    for kind, formatter in get_ipython().display_formatter.formatters.items():
        made = formatter(figure) if kind.startswith("image/") else None
        if isinstance(made, tuple):  # a high resolution comes with its size
            made, metadata[kind] = made
        if made is not None:
            data[kind] = made
    if len(data) == 1:
        png = io.BytesIO()
        figure.savefig(png, format="png")
        data["image/png"] = png.getvalue()
    return data, metadata
