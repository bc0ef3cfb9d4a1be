"""Where arrays live. The only place that imports NumPy or CuPy as a choice."""

import functools
import os
import re

from xpnet.backends.arrays import Array, DType
from xpnet.backends.base import Backend
from xpnet.backends.cpu import CPUBackend
from xpnet.errors import ArgumentTypeError, unknown_name

__all__ = ["Array", "Backend", "DType", "available_backends", "get_backend"]

_cpu = CPUBackend()


def get_backend(backend: str | Backend = "auto") -> Backend:
    """The backend called `backend`: "cpu", "gpu", "gpu:1" (a device index), "auto", or a Backend, which comes back.

    "auto" is the environment variable XPNET_BACKEND where it is set; else the first GPU if it can be used, else the
    CPU, silently. "gpu" never falls back: it raises BackendError with the reason and, where there is one, the mend.
    """
    if isinstance(backend, Backend):
        return backend
    if not isinstance(backend, str):
        raise ArgumentTypeError(f'backend must be "auto", "cpu", "gpu", "gpu:N" or a Backend, not {backend!r}.')
    name, kind = backend.strip().lower(), "backend"
    if name == "auto" and (default := os.environ.get("XPNET_BACKEND", "").strip().lower()):
        name, kind = default, "backend in the environment variable XPNET_BACKEND,"
    if name == "auto":
        name = "cpu" if available_backends()["gpu"] else "gpu"
    if name == "cpu":
        return _cpu
    gpu = re.fullmatch(r"gpu(?::(\d+))?", name)
    if gpu is None:
        raise unknown_name(kind, name, ["auto", "cpu", "gpu", "gpu:1"])
    return _gpu(int(gpu[1] or 0))


def available_backends() -> dict[str, str | None]:
    """{"cpu": None, "gpu": None or the reason why it cannot be used}. Importing CuPy waits for this call."""
    from xpnet.backends import gpu

    return {"cpu": None, "gpu": gpu.why_unusable()}


@functools.cache
def _gpu(index: int) -> Backend:
    from xpnet.backends.gpu import GPUBackend

    return GPUBackend(index)
