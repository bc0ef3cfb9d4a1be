"""How the loops of the CPU are compiled: by Numba, at their first call, with a cache of the machine code."""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import config, njit

from xpnet.concurrency.memory import refuse_without_memory

if getattr(config, "DISABLE_JIT", False):
    raise ImportError("the environment variable NUMBA_DISABLE_JIT turns it off")  # so that no loop runs in Python

_log = logging.getLogger(__name__)

_OF_LLVM = 2**26  # bytes

F = TypeVar("F", bound=Callable[..., Any])

# Division as in NumPy, not as in Python, whose check for 0 would prevent vectorization.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def compiled(function: F) -> F:
    """Decorate a loop. Its cache does not notice changes in functions of other modules, which it must not call."""
    return cast(F, _cached(njit(**_OPTIONS)(function)))


def compiled_with(*fastmath: str) -> Callable[[F], F]:
    """`compiled` with flags of LLVM: "contract" allows fused multiply-add, "reassoc" and "nsz" sums in any order."""

    def decorate(function: F) -> F:
        return cast(F, _cached(njit(fastmath=set(fastmath), **_OPTIONS)(function)))

    return decorate


def _cached(loop: Any) -> Any:
    try:
        loop.enable_caching()
    except Exception as error:  # no folder is writable
        _cannot_cache(error)
    else:
        cache = getattr(loop, "_cache", None)
        for name in ("load_overload", "save_overload"):
            if hasattr(cache, name):
                setattr(cache, name, _tolerant(getattr(cache, name)))
    loop.compile = _with_memory(loop.compile)
    return loop


def _with_memory(compile_loop: Callable[..., Any]) -> Callable[..., Any]:
    """Compile or load a loop only if there is memory for that: LLVM ends the process if there is none."""

    @functools.wraps(compile_loop)
    def compile_with_memory(*args: Any) -> Any:
        refuse_without_memory(_OF_LLVM)
        return compile_loop(*args)

    return compile_with_memory


def _tolerant(access: Callable[..., Any]) -> Callable[..., Any]:
    """This access to the cache, with errors only logged: a full disk or a damaged file means compiling again."""

    @functools.wraps(access)
    def tolerant(*args: Any) -> Any:
        try:
            return access(*args)
        except Exception as error:
            return _cannot_cache(error)

    return tolerant


def _cannot_cache(error: Exception) -> None:
    global _has_warned
    if not _has_warned:
        _log.warning("Numba compiles anew in every process, because its cache cannot be used: %s. Set the environment "
                     "variable NUMBA_CACHE_DIR to a folder that can be written.", error)  # fmt: skip
    _has_warned = True


_has_warned = False
