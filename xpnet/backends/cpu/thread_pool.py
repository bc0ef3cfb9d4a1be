"""The thread pool of the CPU: workers that process parts of a batch in parallel while the BLAS uses one thread.

Two pools of threads that spin on the same cores slow each other down. So a parallel region limits the BLAS to one
thread, and has as many workers as the BLAS had threads.
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

from xpnet.concurrency.interrupts import recoverable, uninterrupted
from xpnet.concurrency.memory import refuse_without_memory

_NOTHING = contextlib.nullcontext()


class _ThreadState(threading.local):
    """How many workers this thread splits work among; None outside of parallel regions."""

    workers: int | None = None


class _SingleWorkerRegion:
    """A parallel region that splits nothing. A class, because a generator is slower to enter."""

    __slots__ = ("_state",)

    def __init__(self, state: _ThreadState) -> None:
        self._state = state

    def __enter__(self) -> None:
        self._state.workers = 1

    def __exit__(self, *_: object) -> None:
        self._state.workers = None


class _SplitRegion:
    """A parallel region that splits a batch, while the BLAS uses one thread."""

    __slots__ = ("_pool",)

    def __init__(self, pool: "ThreadPool") -> None:
        self._pool = pool

    def __enter__(self) -> None:
        uninterrupted(self._pool.enter)

    def __exit__(self, *_: object) -> None:
        uninterrupted(self._pool.leave)


class ThreadPool:
    """The thread pool of this process. Any number of the caller's threads may use it at once."""

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # a fork does not copy threads
        recoverable.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._inside: set[int] = set()  # the caller's threads that are in a parallel region that splits work
        self._blas_threads = 1  # those of the BLAS before the first of these regions
        self._limited: list[tuple[Any, int]] = []  # the BLAS libraries that use one thread now, and how many before
        self._pool: ThreadPoolExecutor | None = None
        self._state = _ThreadState()

    def parallel_region(self, split: bool = True) -> AbstractContextManager[Any]:
        """A context in which `parallel_for` splits work and the BLAS uses one thread.

        With split=False nothing is split, and the BLAS keeps its threads. Inside another region it has no effect.
        """
        if self._state.workers is not None:
            return _NOTHING
        return _SplitRegion(self) if split else _SingleWorkerRegion(self._state)

    def enter(self) -> None:
        """This thread enters a parallel region that splits work."""
        with self._lock:
            if not self._inside:
                self._limited = self._limited or [(library, library.get_num_threads()) for library in _blas_libraries()]
                self._blas_threads = max((threads for _, threads in self._limited), default=1)
                self._set_blas_threads(1)
            self._inside.add(threading.get_ident())
            self._state.workers = self._blas_threads

    def leave(self) -> None:
        """This thread leaves its parallel region. The last thread to leave gives the BLAS its threads back."""
        with self._lock:
            self._state.workers = None
            self._inside.discard(threading.get_ident())
            if not self._inside:
                self._set_blas_threads()
                self._limited = []

    def recover(self) -> None:
        """Leave the parallel region of this thread."""
        if self._state.workers is not None or self._limited:
            self.leave()

    def _set_blas_threads(self, count: int | None = None) -> None:
        """Set the threads of each BLAS library to `count`, or back to the number before if it is None."""
        for library, threads in self._limited:
            if threads > 1:
                library.set_num_threads(count or threads)

    @property
    def workers(self) -> int:
        """How many workers `parallel_for` uses, or would use in a parallel region."""
        workers = self._state.workers
        if workers is not None:
            return workers
        with self._lock:
            return self._blas_threads if self._inside else _blas_threads()

    @property
    def region_workers(self) -> int | None:
        """How many workers `parallel_for` uses here: None outside of parallel regions, and 1 inside a part."""
        return self._state.workers

    @property
    def blas_uses_one_thread(self) -> bool:
        return bool(self._limited) or _blas_threads() == 1

    def parallel_for(self, count: int, work: Callable[[slice, int], None]) -> None:
        """Call work(rows, worker) in parallel for one slice of range(count) per worker, and wait for all."""
        parts = min(self._state.workers or 1, count)
        if parts <= 1:
            work(slice(0, count), 0)
            return
        self.run_parts([functools.partial(work, rows, worker) for worker, rows in enumerate(slices(count, parts))])

    def run_parts(self, parts: list[Callable[[], None]]) -> None:
        """Call these functions in parallel, one per worker, and wait for all."""
        uninterrupted(self._run_parts, parts)

    def _run_parts(self, parts: list[Callable[[], None]]) -> None:
        with self._lock:
            if self._pool is None:
                self._pool = _started_pool(max(len(parts), os.cpu_count() or 1))
        if self._pool is None:
            for part in parts:
                self._run_part(part)
            return
        others: list[Future[None]] = []
        try:
            # In a copy of the caller's context, because numpy.errstate is part of it.
            others.extend(self._pool.submit(contextvars.copy_context().run, self._run_part, part) for part in parts[1:])
            self._run_part(parts[0])
        finally:
            _wait_for(others)  # so that no thread writes into the caller's arrays after the return
        for other in others:
            other.result()

    def _run_part(self, part: Callable[[], None]) -> None:
        before, self._state.workers = self._state.workers, 1
        try:
            part()
        finally:
            self._state.workers = before

    @contextlib.contextmanager
    def inside_a_part(self) -> Iterator[None]:
        """A context in which this thread has one worker, so that a part is not split again."""
        before, self._state.workers = self._state.workers, 1
        try:
            yield
        finally:
            self._state.workers = before


def _started_pool(count: int) -> ThreadPoolExecutor | None:
    """A pool with this number of threads, all running; None if there is no memory for them.

    A pool starts threads when they are first needed. If one cannot be started then, its work stays in the queue.
    """
    pool, go = ThreadPoolExecutor(count, thread_name_prefix="xpnet"), threading.Event()
    try:
        for _ in range(count):
            refuse_without_memory()
            pool.submit(go.wait)
    except (MemoryError, RuntimeError):
        go.set()
        pool.shutdown()
        return None
    go.set()
    return pool


def slices(count: int, parts: int) -> list[slice]:
    """range(count) in parts of equal lengths, up to 1."""
    bounds = [count * i // parts for i in range(parts + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


def _wait_for(futures: list[Future[None]]) -> None:
    """Wait for all futures, even if a signal handler raises in the meantime; then raise its error."""
    raised: BaseException | None = None
    for future in futures:
        while not future.done():
            try:
                future.exception()
            except BaseException as error:
                raised = error
    if raised is not None:
        raise raised


@functools.cache
def _blas_libraries() -> list[Any]:
    try:
        import threadpoolctl
    except ImportError:  # the source tree also runs with NumPy alone; then the BLAS keeps its threads
        return []
    return list(threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers)


def _blas_threads() -> int:
    return max((int(library.get_num_threads()) for library in _blas_libraries()), default=1)
