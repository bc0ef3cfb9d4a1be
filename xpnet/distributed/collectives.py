"""Collective operations on arrays of a device: through the host by MPI, or between GPUs by NCCL."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import numpy

from xpnet.backends import Backend
from xpnet.backends.arrays import Array
from xpnet.backends.cuda.nccl import NcclCommunicator, has_nccl

_log = logging.getLogger(__name__)


class HostCollective:
    """MPI. GPU arrays are copied through the host, because MPI libraries from wheels are not CUDA-aware."""

    def __init__(self, backend: Backend, comm: Any) -> None:
        self._backend, self._comm = backend, comm

    def all_reduce(self, array: Array) -> None:
        """Replace an array by its sum over all ranks."""
        with self._on_host(array) as host:
            self._comm.Allreduce(_in_place(), host)

    def broadcast(self, array: Array) -> None:
        """Replace an array by that of rank 0."""
        with self._on_host(array) as host:
            self._comm.Bcast(host, root=0)

    @contextlib.contextmanager
    def _on_host(self, array: Array) -> Iterator[Any]:
        """A context with the array as a contiguous host array, whose values are copied back at the end."""
        host = array if isinstance(array, numpy.ndarray) else self._backend.to_numpy(array)
        host = host if host.flags.c_contiguous else host.copy()
        yield host
        if host is not array:
            array[...] = self._backend.asarray(host)


class NcclCollective(HostCollective):
    """All-reduce by NCCL; broadcasts, and arrays that NCCL cannot sum, go through MPI."""

    def __init__(self, backend: Any, comm: Any) -> None:
        super().__init__(backend, comm)
        self._nccl = NcclCommunicator(backend, comm)

    def all_reduce(self, array: Array) -> None:
        if not self._nccl.all_reduce(array):
            super().all_reduce(array)


def collective(backend: Backend, comm: Any) -> HostCollective:
    """NCCL if it is installed and each rank has its own GPU, else MPI. All ranks must call it."""
    import socket  # here, because only runs of several ranks need it

    devices = comm.allgather((socket.gethostname(), getattr(backend, "index", None)))
    if any(index is None for _, index in devices):
        return HostCollective(backend, comm)
    reason = None if len(set(devices)) == len(devices) else "several ranks share a GPU"
    available = comm.allgather(reason is None and has_nccl(backend))
    if all(available):
        return NcclCollective(backend, comm)
    if comm.rank == 0:
        reason = reason or f"NCCL is missing on rank {available.index(False)}"
        _log.warning("gradients are summed through the host, which is slower: %s", reason)
    return HostCollective(backend, comm)


@functools.cache
def _in_place() -> Any:
    """MPI.IN_PLACE; None without mpi4py, where only a stand-in for MPI can be in use."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    return MPI.IN_PLACE
