"""Every error that a user can cause. Each is also a standard exception, so ordinary handlers work.

A message names the layer or argument, and says what was expected, what was given, and what to do about it.
"""

import difflib
from collections.abc import Iterable

__all__ = ["ArgumentError", "ArgumentTypeError", "BackendError", "CaptureError", "DataError",
           "DeviceMemoryError", "DistributedError", "DivergenceError", "DownloadError", "FileError",
           "MissingPackageError", "ShapeError", "StateError", "XpnetError", "shape_text", "suggestion",
           "unknown_name"]  # fmt: skip


class XpnetError(Exception):
    """The base of all errors raised on purpose by xpnet."""


class ArgumentError(XpnetError, ValueError):
    """An argument has an invalid value."""


class ShapeError(ArgumentError):
    """An array has the wrong shape for its use."""


class DataError(ArgumentError):
    """The data is invalid: empty, NaN or infinite, labels out of range, lengths that differ."""


class ArgumentTypeError(XpnetError, TypeError):
    """An argument has an invalid type."""


class BackendError(XpnetError, RuntimeError):
    """The requested device cannot be used; the message gives the precise reason."""


class DeviceMemoryError(XpnetError, MemoryError):
    """The device does not have enough free memory."""


class CaptureError(XpnetError, RuntimeError):
    """A training step cannot be captured as a CUDA graph. `fit` catches it and runs the step eagerly."""


class DistributedError(XpnetError, RuntimeError):
    """The ranks of a run disagree, or one of them has failed."""


class StateError(XpnetError, RuntimeError):
    """A method was called at the wrong time: before build, backward without forward, or while fit is running."""


class DivergenceError(XpnetError, FloatingPointError, RuntimeError):
    """The loss, a weight or a buffer became NaN or infinite. `fit` restores the epoch's first weights."""


class MissingPackageError(XpnetError, ImportError):
    """An optional dependency is not installed; the message gives the pip command."""


class FileError(XpnetError, OSError):
    """A file is missing, damaged or of another format."""


class DownloadError(FileError):
    """The file could not be downloaded; the message lists every address tried."""


def shape_text(shape: tuple[int, ...]) -> str:
    """(4, 5) as "(N, 4, 5)"."""
    return f"(N, {', '.join(map(str, shape))})" if shape else "(N,)"


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "Did you mean 'adam'? " if some of the known names are near this one, else ""."""
    near = difflib.get_close_matches(name.lower(), sorted(known), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(map(repr, near))}? " if near else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ArgumentError:
    """An error for a misspelled name, which suggests the nearest known ones."""
    names = sorted(known)
    return ArgumentError(f"unknown {kind} {name!r}. {suggestion(name, names)}Known: {', '.join(names)}.")
