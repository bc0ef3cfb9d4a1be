"""The time that CuPy takes to compile kernels: seconds on a fresh machine, later none, since it keeps them on disk."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_log = logging.getLogger(__name__)


class CompileWatch:
    """Stands before CuPy's cache of compiled kernels: what is not there is compiled now, and saved after that.

    seconds: spent on compiling so far, by this process.
    """

    def __init__(self, cache: Any) -> None:
        self._cache, self._begun = cache, dict[int, float]()
        self.seconds = 0.0
        self._listeners: list[Callable[[], None]] = []

    @contextmanager
    def telling(self, listener: Callable[[], None]) -> Iterator[None]:
        """Inside, call `listener` whenever a kernel is about to be compiled."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def load(self, name: str) -> Any:
        """The compiled kernel of this name, or None, whereupon CuPy compiles it."""
        compiled = self._cache.load(name)
        if compiled is None:
            self._begun[threading.get_ident()] = time.perf_counter()
            if not self.seconds:
                _log.info("compiling CUDA kernels for their first use on this machine; CuPy keeps them on disk")
            for listener in list(self._listeners):
                listener()
        return compiled

    def save(self, name: str, compiled: Any, source: str) -> None:
        """Keep a kernel that was compiled."""
        begun = self._begun.pop(threading.get_ident(), None)
        if begun is not None:
            self.seconds += time.perf_counter() - begun
        self._cache.save(name, compiled, source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def watch(cupy: Any) -> CompileWatch | None:
    """The watch over this CuPy, put there by the first call; None where this CuPy has no such cache.

    The place of the cache is private to CuPy (14.1 and later): without it, compiling is not told apart from training.
    """
    with contextlib.suppress(AttributeError):
        compiler = cupy.cuda.compiler
        cache = compiler._kernel_cache_backend
        if not isinstance(cache, CompileWatch):
            cache = CompileWatch(cache)
            compiler._set_kernel_cache_backend(cache)
        return cache
    return None
