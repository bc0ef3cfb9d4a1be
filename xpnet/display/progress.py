"""Progress bars: one line on a terminal, whose metrics are never cut off; and the widget of a notebook."""

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

#: Layouts of the line before the metrics, the most detailed first. What matters least gives way first.
_LAYOUTS = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}",
    "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}, {rate_fmt}",
    "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}",
    "{desc}: {percentage:3.0f}%|{bar}| ",
    "{desc}: {percentage:3.0f}% ",
    "{desc}: ",
    "{short} ",
    "",
)
_LAYOUTS_WITHOUT_TOTAL = ("{desc}: {n_fmt} [{elapsed}, {rate_fmt}", "{desc}: {n_fmt} [{elapsed}", *_LAYOUTS[-3:])
_SHORTEST_BAR = 5  # characters


def in_notebook() -> bool:
    """Whether this code runs in a cell of Jupyter, or in another front end of IPython that is not a terminal."""
    ipython = sys.modules.get("IPython")
    shell = getattr(ipython, "get_ipython", lambda: None)()
    names = [cls.__name__ for cls in type(shell).__mro__]
    return shell is not None and "TerminalInteractiveShell" not in names


def terminal_bar(stream: Any, description: str, total: int | None, done: int) -> Any:
    """A bar of tqdm on one line of the terminal `stream`. `bar.show(metrics)` redraws it with these texts."""
    from tqdm import tqdm  # here, because most runs show no bar

    class Bar(tqdm):  # type: ignore[misc, unused-ignore]
        metrics: Sequence[str] = ()

        def show(self, metrics: Sequence[str]) -> None:
            self.metrics = metrics
            self.refresh()

        def __str__(self) -> str:
            return _fitted(self, dict(self.format_dict), self.metrics, _columns(self.fp))

    return Bar(total=total, initial=done, desc=description, unit=" samples", unit_scale=True, file=stream)


def notebook_bar(description: str, total: int | None, done: int) -> Any:
    """The widget of tqdm in this notebook, with `show` as above; None if the package ipywidgets cannot be used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a missing ipywidgets
        from tqdm import notebook
        from tqdm.auto import tqdm

    if not issubclass(tqdm, notebook.tqdm):
        return None

    class Widget(tqdm):  # type: ignore[misc, valid-type, unused-ignore]
        def show(self, metrics: Sequence[str]) -> None:
            self.set_postfix_str("  ".join(metrics))

    return Widget(total=total, initial=done, desc=description, unit=" samples", unit_scale=True)


def _fitted(bar: Any, values: dict[str, Any], metrics: Sequence[str], columns: int | None) -> str:
    """The line of the first layout that fits into this number of columns (None: no limit) with all metrics.

    In a narrower terminal the first metrics are left out, since the last ones are those of validation data. If even the
    last one is too long, its name is cut.
    """
    from tqdm.utils import disp_len

    def meter(layout: str, width: int | None = None) -> str:
        if not layout:
            return ""
        layout = layout.replace("{short}", values["prefix"].removeprefix("epoch "))
        return str(bar.format_meter(**{**values, "bar_format": layout, "ncols": width, "postfix": None}))

    layouts = _LAYOUTS if bar.total else _LAYOUTS_WITHOUT_TOTAL
    for first in range(max(1, len(metrics))):
        text = "  ".join(metrics[first:])
        for layout in layouts[-3:] if first else layouts:  # a detail is never kept at the cost of a metric
            opened = "[" in layout
            end = (", " if opened and text else "") + text + ("]" if opened else "")
            needed = disp_len(meter(layout.replace("{bar}", ""))) + ("{bar}" in layout) * _SHORTEST_BAR
            room = None if columns is None else columns - disp_len(end)
            if room is None or needed <= room:
                return meter(layout, room) + end
    return _cut(metrics[-1], columns or 0)


def _cut(metric: str, columns: int) -> str:
    """A metric with the end of its name left out: the figure is what matters."""
    from tqdm.utils import disp_trim

    name, _, figure = metric.rpartition(" ")
    kept = columns - len(figure) - 3  # for ".. "
    return f"{disp_trim(name, kept)}.. {figure}" if kept > 0 else figure[:columns]


def _columns(stream: Any) -> int | None:
    """The width of a terminal; one less than it has, because some wrap a full line. None if it is not known."""
    import shutil  # here, because it imports the modules of archives, and most runs show no bar

    columns = 0
    with contextlib.suppress(OSError, ValueError, AttributeError):
        columns = os.get_terminal_size(stream.fileno()).columns
    columns = columns or shutil.get_terminal_size((0, 0)).columns
    return max(1, columns - 1) if columns else None
