"""Threads on the CPU: the parts of a batch side by side, while the BLAS inside each part keeps to one thread.

Two pools of threads that spin on the same cores ruin each other: so ours works only where the BLAS's has been told to
rest, and there are as many of ours as the BLAS would have used.
"""

import contextlib
import contextvars
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

_NOTHING = contextlib.nullcontext()


class _Here(threading.local):
    """What holds in one thread: into how many parts it splits work; None outside of `Team.working`."""

    size: int | None = None


class _Alone:
    """At work in this thread, and nothing is split. A class, for it is entered in every step of small nets."""

    __slots__ = ("_here",)

    def __init__(self, here: _Here) -> None:
        self._here = here

    def __enter__(self) -> None:
        self._here.size = 1

    def __exit__(self, *_: object) -> None:
        self._here.size = None


class Team:
    """The threads of this process. Any number of the caller's own threads may use it at once."""

    def __init__(self) -> None:
        self._forget_threads()
        os.register_at_fork(after_in_child=self._forget_threads)  # threads don't survive a fork

    def _forget_threads(self) -> None:
        self._lock = threading.Lock()
        self._users = 0  # how many callers are inside `working`
        self._threads = 1  # what the BLAS had before the first of them came
        self._limit: Any = None
        self._pool: ThreadPoolExecutor | None = None
        self._here = _Here()

    def working(self, in_parts: bool = True) -> AbstractContextManager[Any]:
        """Inside, `split` splits, and the BLAS has one thread; or, with in_parts=False, all stays with the BLAS.

        May be nested: the outermost one decides.
        """
        if self._here.size is not None:
            return _NOTHING
        return self._in_parts() if in_parts else _Alone(self._here)

    @contextlib.contextmanager
    def _in_parts(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._threads = _blas_threads()
                if self._threads > 1:
                    self._limit = _controller().limit(limits=1, user_api="blas")
            self._users += 1
            self._here.size = self._threads
        try:
            yield
        finally:
            with self._lock:
                self._here.size = None
                self._users -= 1
                if not self._users and self._limit is not None:
                    self._limit.restore_original_limits()
                    self._limit = None

    @property
    def size(self) -> int:
        """Into how many parts `split` splits, or would inside `working`."""
        here = self._here.size
        if here is not None:
            return here
        with self._lock:
            return self._threads if self._users else _blas_threads()

    @property
    def at_work(self) -> bool:
        """Whether this is inside `working`."""
        return self._here.size is not None

    @property
    def splits(self) -> bool:
        """Whether this is inside `working`, not inside a part, and there are several threads."""
        return (self._here.size or 1) > 1

    def split(self, count: int, work: Callable[[slice, int], None]) -> None:
        """work(rows, number) for `size` slices of range(count) side by side, in this thread and in the pool's."""
        parts = min(self._here.size or 1, count)
        if parts <= 1:
            work(slice(0, count), 0)
            return
        bounds = [count * i // parts for i in range(parts + 1)]
        rows = [slice(start, end) for start, end in itertools.pairwise(bounds)]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max(parts, os.cpu_count() or 1), thread_name_prefix="xpnet")

        def part(number: int) -> None:
            before, self._here.size = self._here.size, 1  # what a part calls is not split again
            try:
                work(rows[number], number)
            finally:
                self._here.size = before

        others: list[Future[None]] = []
        try:
            # With the caller's context: numpy.errstate is part of it.
            others = [self._pool.submit(contextvars.copy_context().run, part, i) for i in range(1, parts)]
            part(0)
        finally:
            for other in others:
                other.exception()  # waits: nobody writes into the caller's arrays any more after this
        for other in others:
            other.result()


@functools.cache
def _controller() -> Any:
    import threadpoolctl

    return threadpoolctl.ThreadpoolController().select(user_api="blas")


def _blas_threads() -> int:
    try:
        pools = _controller().lib_controllers
    except ImportError:  # the source tree also runs where there is little but NumPy: then the BLAS has the threads
        return 1
    return max((int(pool.get_num_threads()) for pool in pools), default=1)
