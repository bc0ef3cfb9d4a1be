"""Every error a user can cause. Each is also a standard exception, so ordinary handlers work.

A message names the layer or argument, says what was expected and what came, and ends with the next thing to try.
"""

import difflib
from collections.abc import Iterable


class XpnetError(Exception):
    """The base of all errors raised on purpose by xpnet."""


class ArgumentError(XpnetError, ValueError):
    """An argument has a value that cannot work."""


class ShapeError(ArgumentError):
    """An array has the wrong shape for the place it is used in."""


class DataError(ArgumentError):
    """The data cannot be trained on: empty, NaN or infinite, labels out of range, lengths that differ."""


class ArgumentTypeError(XpnetError, TypeError):
    """An argument is of a type that cannot work."""


class BackendError(XpnetError, RuntimeError):
    """The device asked for cannot be used; the message holds the precise reason."""


class DeviceMemoryError(XpnetError, MemoryError):
    """The device has not enough memory for what was asked."""


class RecordingError(XpnetError, RuntimeError):
    """A training step cannot be recorded, and runs call by call. Never leaves `fit`."""


class DistributedError(XpnetError, RuntimeError):
    """The ranks of a run do not agree, or one of them has failed."""


class StateError(XpnetError, RuntimeError):
    """A call came at the wrong moment: before build, backward without forward, a layer used twice."""


class DivergenceError(XpnetError, FloatingPointError, RuntimeError):
    """The loss became NaN or infinite; the model holds the weights of the epoch's start again."""


class MissingPackageError(XpnetError, ImportError):
    """An optional package is not installed; the message holds the pip command."""


class FileError(XpnetError, OSError):
    """A file is missing, truncated, altered or foreign."""


class DownloadError(FileError):
    """Nothing could be downloaded; the message lists every address tried."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ArgumentError:
    """An error for a misspelt name, which offers the nearest known ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return ArgumentError(f"unknown {kind} {name!r}. {hint}Known: {', '.join(names)}.")
