"""Sums over processes, of arrays of a device: through the host by MPI, or between GPUs by NCCL."""

import functools
import logging
import socket
from typing import Any

import numpy

from xpnet.backends.arrays import Array
from xpnet.backends.base import Backend

_log = logging.getLogger(__name__)

_NCCL_TYPES = {"float32": 7, "float64": 8, "int64": 4}  # ncclDataType_t
_NCCL_SUM = 0  # ncclRedOp_t


class HostCollective:
    """By MPI. Arrays of a GPU go through the host: the wheels' MPI cannot reach them."""

    def __init__(self, backend: Backend, comm: Any) -> None:
        self._backend, self._comm = backend, comm

    def add_up(self, array: Array) -> None:
        host = array if isinstance(array, numpy.ndarray) else self._backend.to_numpy(array)
        if not host.flags.c_contiguous:
            host = host.copy()
        self._comm.Allreduce(_in_place(), host)
        if host is not array:
            array[...] = self._backend.asarray(host)

    def copy_from_first(self, array: Array) -> None:
        host = array if isinstance(array, numpy.ndarray) else self._backend.to_numpy(array)
        if not host.flags.c_contiguous:
            host = host.copy()
        self._comm.Bcast(host, root=0)
        if host is not array:
            array[...] = self._backend.asarray(host)


class NcclCollective(HostCollective):
    """By NCCL, on the current stream; what it does not sum goes by MPI."""

    def __init__(self, backend: Any, comm: Any) -> None:
        """Every rank at once. MPI is where they meet: rank 0's identity goes to the others."""
        super().__init__(backend, comm)
        nccl = backend.xp.cuda.nccl
        identity = comm.bcast(nccl.get_unique_id() if comm.rank == 0 else None, root=0)
        with backend.device():
            self._nccl = nccl.NcclCommunicator(comm.size, identity, comm.rank)

    def add_up(self, array: Array) -> None:
        kind = _NCCL_TYPES.get(str(array.dtype))
        if kind is None or not array.flags.c_contiguous:
            super().add_up(array)
            return
        stream, address = self._backend.xp.cuda.get_current_stream().ptr, array.data.ptr
        self._nccl.allReduce(address, address, array.size, kind, _NCCL_SUM, stream)


def collective(backend: Backend, comm: Any) -> HostCollective:
    """NCCL where each rank has a GPU of its own and NCCL is there; else MPI, through the host. Every rank at once."""
    index = getattr(backend, "index", None)
    places = comm.allgather((socket.gethostname(), index))
    if any(place[1] is None for place in places):
        return HostCollective(backend, comm)
    reason = None if len(set(places)) == len(places) else "several ranks share a GPU"
    available = comm.allgather(reason is None and _has_nccl(backend))
    if not all(available):
        reason = reason or f"NCCL is missing on rank {available.index(False)}"
        if comm.rank == 0:
            _log.warning("gradients are added up through the host, more slowly: %s", reason)
        return HostCollective(backend, comm)
    return NcclCollective(backend, comm)


def _has_nccl(backend: Any) -> bool:
    try:
        return bool(backend.xp.cuda.nccl.available)
    except (ImportError, AttributeError):
        return False


@functools.cache
def _in_place() -> Any:
    """What MPI takes for "the numbers are there already"; another communicator than mpi4py's may be without it."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    return MPI.IN_PLACE
