"""Choices between several ways to compute a result: each is timed once on this device, and the fastest is remembered.

The ways round differently. So the choices are kept in a file in the user's cache, from which later processes make the
same choices, and compute the same bits.
"""

import contextlib
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_CALLS, _ROUNDS = 20, 4  # the calls of a way in a graph, and how often the graph is timed

Way = Callable[[], None]


class Choices:
    """The choices of one device, whose name and versions are in `identity`."""

    def __init__(self, identity: str, path: Path | None) -> None:
        self._identity, self._path = identity, path
        self._lock = threading.Lock()
        self._chosen = self._read().get(identity, {})

    def get(self, question: str) -> str | None:
        """The name of the way that was chosen; None if there is no choice yet."""
        return self._chosen.get(question)

    def set(self, question: str, name: str) -> None:
        """Remember a choice, also for later processes, unless the file cannot be written."""
        with self._lock:
            self._chosen[question] = name
            everything = self._read()
            everything[self._identity] = {**everything.get(self._identity, {}), **self._chosen}
            if self._path is not None:
                try:
                    _replace(self._path, json.dumps(everything, indent=1, sort_keys=True))
                except OSError as error:
                    _log.info("%s: cannot be written, so other processes choose anew: %s", self._path, error)

    def _read(self) -> dict[str, dict[str, str]]:
        """{identity: {question: name}} in the file, without anything that has another form."""
        if self._path is None:
            return {}
        try:
            read = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        devices = read.items() if isinstance(read, dict) else ()
        return {
            device: {question: name for question, name in chosen.items() if isinstance(name, str)}
            for device, chosen in devices
            if isinstance(chosen, dict)
        }


def fastest(xp: Any, ways: Mapping[str, Way]) -> str | None:
    """The name of the way that takes the least time on the current stream; None if no way works."""
    graphs = {name: graph for name, way in ways.items() if (graph := _graph(xp, way)) is not None}
    times = dict.fromkeys(graphs, float("inf"))
    start, end = xp.cuda.Event(), xp.cuda.Event()
    stream = xp.cuda.get_current_stream()
    for _ in range(_ROUNDS):  # each of which times every way, because a GPU that has been idle is slow at first
        for name, graph in graphs.items():
            start.record(stream)
            graph.launch()
            end.record(stream)
            end.synchronize()
            times[name] = min(times[name], float(xp.cuda.get_elapsed_time(start, end)))
    return min(times, key=lambda name: times[name], default=None)


def _graph(xp: Any, way: Way) -> Any:
    """A CUDA graph of several calls of a way; None if the way fails."""
    stream = xp.cuda.get_current_stream()
    try:
        way()
        stream.begin_capture()
        try:
            for _ in range(_CALLS):
                way()
        finally:
            graph = stream.end_capture()
        graph.launch()
    except Exception as error:  # from a library that does not support the product, or from a compiler
        _log.info("one of several ways to compute a product fails: %s", error)
        return None
    return graph


def cache_file(name: str) -> Path | None:
    """A file in $XPNET_CACHE_DIR, or else in the user's cache; None if there is no such folder."""
    if given := os.environ.get("XPNET_CACHE_DIR"):
        return Path(given).expanduser() / name
    if sys.platform == "win32":
        caches = os.environ.get("LOCALAPPDATA")
    else:
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with contextlib.suppress(RuntimeError):  # there is no home
        return Path(caches).expanduser() / "xpnet" / name if caches else None
    return None


def _replace(path: Path, text: str) -> None:
    """Write a file so that readers see the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
