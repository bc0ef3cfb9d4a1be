"""Ctrl-C: when KeyboardInterrupt may be raised while a model computes.

Python runs a signal handler in the main thread, between any two instructions, and its own handler raises
KeyboardInterrupt there. So while a model computes, a handler of this module is installed instead, which counts the
presses.
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

    deferring: whether the handler of this module is installed.  handler: the one that it replaces.  presses: how often
    Ctrl-C was pressed and not yet raised.  patience: the number of presses that do not raise.  held: the arguments
    for a handler of the program that has to wait.
    """

    deferring = False
    handler: Callable[[int, FrameType | None], Any] = signal.default_int_handler
    presses = 0
    patience: float = 0
    held: tuple[int, FrameType | None] | None = None


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

    This holds in the main thread. If the program has its own handler of SIGINT, that is called at once instead, except
    in `uninterrupted`.
    """
    state = interrupts
    if state.deferring:  # at the end of the outermost `work`
        before = state.patience
        try:
            return work(*args, **kwargs)
        finally:
            state.patience = before
    in_main_thread = threading.get_ident() == threading.main_thread().ident
    handler: Any = _signal.getsignal(signal.SIGINT) if in_main_thread else None
    replaced = callable(handler)  # it is not if the signal is ignored or ends the process
    try:
        if replaced:
            state.handler, state.presses, state.held, state.patience, state.deferring = handler, 0, None, 1, True
            _signal.signal(signal.SIGINT, _count if handler is signal.default_int_handler else _call_program)
        return work(*args, **kwargs)
    except BaseException:
        state.patience = math.inf
        for item in list(recoverable):
            item.recover()
        raise
    finally:
        state.patience = math.inf
        if replaced:
            try:
                # `work` may have installed another handler, which stays.
                if _signal.getsignal(signal.SIGINT) in (_count, _call_program):
                    _signal.signal(signal.SIGINT, handler)
            finally:
                state.deferring, pressed, state.presses = False, state.presses, 0
            if pressed:
                raise KeyboardInterrupt
            _call_held(state)


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
        if state.held is not None and before < math.inf:
            _call_held(state)


def take_press() -> bool:
    """Whether Ctrl-C was pressed in `deferring`. The caller stops, instead of the KeyboardInterrupt at its end."""
    if not interrupts.presses:
        return False
    interrupts.presses = 0
    return True


def _count(number: int, frame: FrameType | None) -> None:
    """The handler in place of Python's own."""
    state = interrupts
    if not state.deferring:  # the program has installed this handler again
        state.handler(number, frame)
        return
    state.presses += 1
    if state.presses > state.patience:
        raise KeyboardInterrupt


def _call_program(number: int, frame: FrameType | None) -> None:
    """The handler in place of the program's own."""
    state = interrupts
    if state.deferring and state.patience == math.inf:
        state.held = number, frame
    else:
        state.handler(number, frame)


def _call_held(state: _Interrupts) -> None:
    held, state.held = state.held, None
    if held is not None:
        state.handler(*held)
