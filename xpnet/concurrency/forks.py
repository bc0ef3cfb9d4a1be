"""Forks: a child process has only the thread that forked, so no other thread may be in the middle of something.

A fork waits until other threads have ended their passes and training steps, as a prediction would. In the child their
calls of fit have ended.
"""

import os
import threading
import time
import weakref
from typing import Any, Protocol

_PATIENCE = 10.0  # seconds, since a thread may wait for the one that forks


class Forkable(Protocol):
    """An object of several threads, which a fork must find in a state between two passes."""

    def locks_for_fork(self) -> list[Any]:
        """The locks in the order in which other threads take them."""

    def wait_to_fork(self, waits: bool) -> None:
        """The current thread begins or ends to wait for these locks."""

    def forget_other_threads(self, has_locks: bool) -> None:
        """Called in the child. has_locks: whether no other thread had them."""


#: All objects with locks that a thread may hold for long, or that are kept in a state of a thread.
forkable: weakref.WeakSet[Forkable] = weakref.WeakSet()
_global_locks: list[Any] = []
_forking = threading.RLock()  # one thread forks at a time
_held: list[Any] = []
_unavailable: list[Forkable] = []  # those whose locks could not be had


def held_in_forks(lock: Any) -> Any:
    """Let forks wait for this lock, which lasts as long as the process. Returns it."""
    _global_locks.append(lock)
    return lock


def _before() -> None:
    _forking.acquire()
    end = time.monotonic() + _PATIENCE
    _unavailable.clear()
    for lock in _global_locks:
        _acquire(lock, end)
    for item in _all():
        item.wait_to_fork(True)
        try:
            if not all(_acquire(lock, end) for lock in item.locks_for_fork()):
                _unavailable.append(item)
        finally:
            item.wait_to_fork(False)


def _acquire(lock: Any, end: float) -> bool:
    acquired: bool = lock.acquire(blocking=False) or lock.acquire(timeout=max(0.0, end - time.monotonic()))
    if acquired:
        _held.append(lock)
    return acquired


def _release() -> None:
    while _held:
        _held.pop().release()


def _in_parent() -> None:
    _release()
    _forking.release()


def _in_child() -> None:
    _release()
    for item in _all():
        item.forget_other_threads(item not in _unavailable)
    _unavailable.clear()
    _forking.release()


def _all() -> list[Forkable]:
    while True:
        try:
            return list(forkable)
        except RuntimeError:  # another thread has added one in the meantime
            continue


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
