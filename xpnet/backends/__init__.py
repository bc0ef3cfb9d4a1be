"""Backends: one device each, with its array module, NumPy or CuPy."""

import os
import re

from xpnet.backends.arrays import Array, DType
from xpnet.backends.cpu.backend import cpu_backend
from xpnet.backends.reference import Backend
from xpnet.errors import ArgumentTypeError, shown, unknown_name

__all__ = ["Array", "Backend", "DType", "available_backends", "get_backend"]


def get_backend(backend: str | Backend = "auto") -> Backend:
    """Return the backend of this name: "cpu", "gpu", "gpu:1" (a device index) or "auto"; or a given Backend itself.

    "cuda" means "gpu", and "cuda:1" means "gpu:1".

    "auto" is the value of the environment variable XPNET_BACKEND if it is set; else the first GPU if it can be used;
    else, silently, the CPU. "gpu" never falls back: it raises BackendError with the reason and, if there is one, the
    command that fixes it.
    """
    if isinstance(backend, Backend):
        return backend
    if not isinstance(backend, str):
        raise ArgumentTypeError(f'backend must be "auto", "cpu", "gpu", "gpu:N" or a Backend, not {shown(backend)}.')
    name, kind = backend.strip().lower(), "backend"
    if name == "auto" and (default := os.environ.get("XPNET_BACKEND", "").strip().lower()):
        name, kind = default, "backend in the environment variable XPNET_BACKEND,"
    if name == "auto":
        name = "cpu" if available_backends()["gpu"] else "gpu"
    if name == "cpu":
        return cpu_backend()
    gpu = re.fullmatch(r"(?:gpu|cuda)(?::(\d+))?", name)
    if gpu is None:
        raise unknown_name(kind, name, ["auto", "cpu", "gpu", "gpu:1"], aliases=["cuda"])
    from xpnet.backends.cuda.backend import gpu_backend  # only if needed: it reads and parses kernels.cu

    return gpu_backend(int(gpu[1] or 0))


def available_backends() -> dict[str, str | None]:
    """Return {"cpu": None, "gpu": None or the reason why it cannot be used}. Imports CuPy if it is installed."""
    from xpnet.backends.cuda.probe import unavailable_reason

    return {"cpu": None, "gpu": unavailable_reason()}
