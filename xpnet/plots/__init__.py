"""Plots of models and of their training, with matplotlib: `pip install "xpnet[plots]"`.

Every function draws into the Axes `ax`, by default those of a new figure, and returns the Axes. A notebook shows that
figure below the cell. Elsewhere, the functions show no window and do not use pyplot, so they work without a display:
`plots.curves(history).figure.savefig("loss.png")`. To see a window, pass an `ax` from `pyplot.subplots()`.
"""

from typing import TYPE_CHECKING

from xpnet.errors import module_attributes
from xpnet.plots.common import COLORS, MARKERS  # first, because it raises MissingPackageError without matplotlib
from xpnet.plots.functions import activation, descent
from xpnet.plots.graphs import model_graph
from xpnet.plots.images import attribution, filters, image_grid
from xpnet.plots.live import LivePlot
from xpnet.plots.models import cost_surface, decision_boundary
from xpnet.plots.networks import network
from xpnet.plots.points import embedding
from xpnet.plots.training import confusion_matrix, curves, learning_rates

__all__ = ["COLORS", "MARKERS", "LivePlot", "activation", "attribution", "confusion_matrix", "cost_surface", "curves",
           "decision_boundary", "descent", "embedding", "filters", "image_grid", "learning_rates", "model_graph",
           "network"]  # fmt: skip

if not TYPE_CHECKING:  # a type checker that sees __getattr__ accepts every name, misspelled ones too
    __getattr__, __dir__ = module_attributes(__name__, __all__)
