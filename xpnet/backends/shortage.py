"""Shortage of memory: how it is recognized, and an error that says what was asked for and what is free."""

import contextlib

from xpnet.backends.reference import Backend
from xpnet.errors import DeviceMemoryError

_NO_THREAD = "can't start new thread"


def is_shortage(error: BaseException) -> bool:
    """Whether this error of another library says that memory, or a thread, which needs memory, cannot be had."""
    if isinstance(error, RuntimeError):
        return str(error) == _NO_THREAD
    return isinstance(error, MemoryError) and not isinstance(error, DeviceMemoryError)


def shortage(what: str, error: BaseException, backend: Backend | None = None) -> DeviceMemoryError:
    """The error to raise for a shortage of memory.

    what: the beginning of the message.  backend: the device of the call, if it is known.
    """
    text, free, total = f"{what}.", None, None
    if asked := str(error).strip().rstrip("."):
        text += f" {asked}."
    on_gpu = "cupy" in type(error).__module__
    if not on_gpu:
        from xpnet.backends.cpu.backend import cpu_backend  # only if needed

        backend = cpu_backend()
    with contextlib.suppress(Exception):  # it needs memory too
        free, total = (None, None) if backend is None else backend.memory()[2:]
    if free is not None and total is not None:
        text += f" Of {size_text(total)}, {size_text(free)} are free"
        text += "; backend.free_memory() frees what CuPy caches." if on_gpu else "."
    return DeviceMemoryError(text)


def size_text(size: int) -> str:
    """1536 as "1.5 KiB"."""
    if size < 1024:
        return f"{size} bytes"
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:,.1f} {'KMGT'[power - 1]}iB"
