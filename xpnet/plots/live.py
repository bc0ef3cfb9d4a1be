"""Learning curves that a notebook redraws while a model trains."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from xpnet.callbacks import Callback
from xpnet.config import number
from xpnet.display import progress
from xpnet.errors import ArgumentError, unknown_name
from xpnet.layers.containers import Container
from xpnet.plots.common import texts
from xpnet.plots.notebooks import picture
from xpnet.plots.training import curves, without_repeated_measures

_COLUMNS = 3  # of Axes side by side


class LivePlot(Callback):
    """Draws the learning curves in a notebook while a model trains: `model.fit(x, y, callbacks=plots.LivePlot())`.

    It redraws one figure after each epoch, and the last one stays. Outside a notebook it neither draws nor prints:
    there, use verbose=2, and draw the curves after fit, `plots.curves(history).figure.savefig(path)`.

    keys: what to draw, a key of the history or several, each with its validation values in Axes of its own, such as
    ("loss", "accuracy"); by default the loss and all metrics.  seconds: the shortest time between two drawings; the
    last epoch is always drawn.

    fit raises ArgumentError, before the first step, if the history will not have one of the keys.
    """

    only_on_first_rank = True

    def __init__(self, keys: str | Sequence[str] | None = None, seconds: float = 1.0) -> None:
        self.keys = [keys] if isinstance(keys, str) else texts("LivePlot: keys", keys)
        if self.keys == []:
            raise ArgumentError("LivePlot: keys must name at least one value of the history, or be None.")
        self.seconds = number(self, "seconds", seconds, at_least=0)

    def on_train_begin(self, model: Container) -> None:
        self._display: Any = None
        self._drawn, self._next = 0, 0.0  # epochs drawn; when to draw next
        known = [*self.run.log_names, "learning_rate"]
        for key in self.keys or ():
            if key not in known:
                raise unknown_name("history key", key, known)

    def on_epoch_end(self, model: Container, epoch: int, logs: dict[str, Any]) -> None:
        if time.monotonic() >= self._next:
            self._draw()

    def on_train_end(self, model: Container) -> None:
        self._draw()

    def _draw(self) -> None:
        history = self.run.history
        epochs = len(history.seconds)
        if epochs <= self._drawn or not progress.in_notebook():
            return
        from IPython.display import display

        keys = without_repeated_measures(self.keys or [key for key in history if key != "learning_rate"])
        columns = min(len(keys), _COLUMNS)
        rows = -(-len(keys) // columns)
        figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.3), layout="constrained")
        for ax, key in itertools.zip_longest(figure.subplots(rows, columns, squeeze=False).flat, keys):
            if key is None:
                ax.set_axis_off()
            else:
                curves(history, key, ax=ax)
        figure.suptitle(f"epoch {epochs} of {self.run.epochs}")
        data, metadata = picture(figure)
        if self._display is None:
            self._display = display(data, metadata=metadata, raw=True, display_id=True)
        else:
            self._display.update(data, metadata=metadata, raw=True)
        self._drawn, self._next = epochs, time.monotonic() + self.seconds
