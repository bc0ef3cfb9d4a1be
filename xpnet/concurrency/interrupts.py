"""Ctrl-C: when KeyboardInterrupt may be raised while a model computes.

Python runs a signal handler in the main thread, between any two instructions, and its own handler raises
KeyboardInterrupt there. So while a model computes, a handler of this module is installed instead, which counts.
"""

import importlib
import math
import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_signal: Any = importlib.import_module("_signal")  # `signal` converts handlers to enums, which takes longer than a pass


class _Interrupts(threading.local):
    """Ctrl-C in the current thread, which is the main one: other threads get no signals.

    presses: how often it was pressed and not yet raised.  patience: the number of presses that raise nothing now.
    deferring: whether the handler of this module is installed.
    """

    presses = 0
    patience: float = 0
    deferring = False


#: An assignment to `interrupts.patience` cannot be interrupted. So a `finally` that begins with one runs to its end,
#: which a function that is called there would not: Python may raise when it enters the function.
interrupts = _Interrupts()


class Recoverable(Protocol):
    def recover(self) -> None:
        """Leave every context that this thread may not have left, because it was interrupted on the way out."""


#: Objects that keep a state for each thread.
recoverable: weakref.WeakSet[Recoverable] = weakref.WeakSet()


def deferring(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `work`. The first Ctrl-C in it raises KeyboardInterrupt only at its end; a second one raises at once.

    This holds in the main thread, unless the program has its own handler of SIGINT.
    """
    state = interrupts
    if state.deferring:  # at the end of the outermost `work`
        before = state.patience
        try:
            return work(*args, **kwargs)
        finally:
            state.patience = before
    if threading.current_thread() is not threading.main_thread():
        return work(*args, **kwargs)
    if _signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return work(*args, **kwargs)
    try:
        state.presses, state.patience, state.deferring = 0, 1, True
        _signal.signal(signal.SIGINT, _count)
        return work(*args, **kwargs)
    finally:
        state.patience = math.inf
        if state.presses:
            for item in list(recoverable):
                item.recover()
        state.deferring, pressed = False, state.presses
        state.presses = 0
        if _signal.getsignal(signal.SIGINT) is _count:
            _signal.signal(signal.SIGINT, signal.default_int_handler)
        if pressed or state.presses:
            raise KeyboardInterrupt


def uninterrupted(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `work`, which is short. Inside `deferring`, Ctrl-C raises KeyboardInterrupt at its end, not in it."""
    state = interrupts
    before = state.patience
    try:
        state.patience = math.inf
        return work(*args, **kwargs)
    finally:
        state.patience = before
        if state.presses > before:
            raise KeyboardInterrupt


def take_press() -> bool:
    """Whether Ctrl-C was pressed in `deferring`. The caller stops, instead of the KeyboardInterrupt at its end."""
    pressed = interrupts.presses > 0
    interrupts.presses = 0
    return pressed


def _count(number: int, frame: FrameType | None) -> None:
    interrupts.presses += 1
    if interrupts.presses > interrupts.patience:
        raise KeyboardInterrupt
