"""The time that CuPy spends compiling kernels: some seconds on a new machine, later 0, since it caches them on disk."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_log = logging.getLogger(__name__)


class CompileWatch:
    """Wraps CuPy's cache of compiled kernels: after `load` finds nothing, CuPy compiles the kernel and calls `save`.

    seconds: how long this process has compiled so far.
    """

    def __init__(self, cache: Any) -> None:
        self._cache, self._started = cache, dict[int, float]()
        self.seconds = 0.0
        self._listeners: list[Callable[[], None]] = []

    @contextmanager
    def on_compile(self, listener: Callable[[], None]) -> Iterator[None]:
        """A context in which `listener` is called before each compilation."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def load(self, name: str) -> Any:
        """The compiled kernel of this name, or None; then CuPy compiles it."""
        compiled = self._cache.load(name)
        if compiled is None:
            self._started[threading.get_ident()] = time.perf_counter()
            if not self.seconds:
                _log.info("compiling CUDA kernels for their first use on this machine; CuPy caches them on disk")
            for listener in list(self._listeners):
                listener()
        return compiled

    def save(self, name: str, compiled: Any, source: str) -> None:
        started = self._started.pop(threading.get_ident(), None)
        if started is not None:
            self.seconds += time.perf_counter() - started
        self._cache.save(name, compiled, source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def watch(cupy: Any) -> CompileWatch | None:
    """The one watch of this CuPy, installed by the first call; None if this CuPy has no such cache.

    The cache is private to CuPy (14.1 and later). Without it, the time of compiling counts as training.
    """
    with contextlib.suppress(AttributeError):
        compiler = cupy.cuda.compiler
        cache = compiler._kernel_cache_backend
        if not isinstance(cache, CompileWatch):
            cache = CompileWatch(cache)
            compiler._set_kernel_cache_backend(cache)
        return cache
    return None
