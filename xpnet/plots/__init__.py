"""Pictures of models and of their training, with matplotlib: `pip install "xpnet[plots]"`.

Every function draws into the `ax` it is given, or into a new figure of its own, and returns the Axes. Nothing is shown
and pyplot is never touched, so it works with no screen: `plots.curves(history).figure.savefig("loss.png")`. For a
window, hand in an `ax` from `pyplot.subplots()`.
"""

from xpnet.plots.common import COLORS, MARKERS  # first, for it says so where matplotlib is missing
from xpnet.plots.functions import activation, descent
from xpnet.plots.images import filters, image_grid
from xpnet.plots.models import cost_surface, decision_boundary
from xpnet.plots.networks import network
from xpnet.plots.training import confusion_matrix, curves

__all__ = [
    "COLORS",
    "MARKERS",
    "activation",
    "confusion_matrix",
    "cost_surface",
    "curves",
    "decision_boundary",
    "descent",
    "filters",
    "image_grid",
    "network",
]
