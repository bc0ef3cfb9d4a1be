"""Sums over GPUs by NCCL."""

from typing import Any

from xpnet.backends.arrays import Array

_TYPES = {"float32": 7, "float64": 8, "int64": 4}  # ncclDataType_t
_SUM = 0  # ncclRedOp_t


class NcclCommunicator:
    """All ranks of an MPI communicator, each with its own GPU. All of them must construct it at the same time."""

    def __init__(self, backend: Any, comm: Any) -> None:
        """MPI broadcasts the id of rank 0 to the others."""
        self._backend, nccl = backend, backend.xp.cuda.nccl
        identity = comm.bcast(nccl.get_unique_id() if comm.rank == 0 else None, root=0)
        with backend.device():
            self._nccl = nccl.NcclCommunicator(comm.size, identity, comm.rank)

    def all_reduce(self, array: Array) -> bool:
        """Sum an array over all ranks in place, on the current stream. False, without doing so, if NCCL cannot."""
        kind = _TYPES.get(str(array.dtype))
        if kind is None or not array.flags.c_contiguous:
            return False
        stream, address = self._backend.xp.cuda.get_current_stream().ptr, array.data.ptr
        self._nccl.allReduce(address, address, array.size, kind, _SUM, stream)
        return True


def has_nccl(backend: Any) -> bool:
    """Whether CuPy finds NCCL."""
    try:
        return bool(backend.xp.cuda.nccl.available)
    except (ImportError, AttributeError):
        return False
