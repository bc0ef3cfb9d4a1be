"""Communicator: a process group over MPI.

    mpiexec -n 2 python train.py                      # a script that calls model.fit(..., distributed=True)

Every rank holds the whole model and works on its rows of each batch. The gradient of a batch is a sum over its rows, so
one all-reduce of the flat gradient per step is enough; every rank then makes the same update. Needs mpi4py (extra
`mpi`) and an MPI library: the cluster's own, or the one that comes with the extra.
"""

import os
import platform
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from xpnet.backends import Array, Backend, available_backends
from xpnet.config import choice
from xpnet.distributed.collectives import HostCollective, collective
from xpnet.distributed.process_group import ProcessGroup
from xpnet.errors import ArgumentError, ArgumentTypeError, DistributedError, MissingPackageError

T = TypeVar("T")


class Communicator(ProcessGroup):
    """A process group over MPI, for `fit(..., distributed=...)`: by default all processes that mpiexec started.

    comm: an mpi4py communicator.  batch_norm: "synchronized" normalizes by the whole batch, so that the result does not
    depend on the number of ranks; "per rank" normalizes by each rank's own rows and needs no communication.
    """

    _collective: HostCollective  # set by bind

    def __init__(self, comm: Any = None, batch_norm: str = "synchronized") -> None:
        choice(self, "batch_norm", batch_norm, ("synchronized", "per rank"))
        self._comm = _world() if comm is None else comm
        if not all(hasattr(self._comm, name) for name in ("rank", "size", "allgather", "bcast")):
            raise ArgumentTypeError(f"Communicator: comm must be a communicator of mpi4py, not {comm!r}.")
        self.rank, self.size = int(self._comm.rank), int(self._comm.size)
        self.synchronized = batch_norm == "synchronized"
        self._failure_is_known = False  # on all ranks, so that none of them waits for another
        self._bound_to: Backend | None = None

    @property
    def local_rank(self) -> int:
        """The number of this process among those on the same machine. Communicates: all ranks must read it."""
        names = self._comm.allgather(platform.node())
        return sum(name == names[self.rank] for name in names[: self.rank])

    def backend(self, name: str = "auto") -> str:
        """The name of the device for this rank.

        "gpu", or "auto" with a usable GPU, becomes "gpu:k": the ranks of one machine take its GPUs in turn. "auto"
        without one becomes "cpu". Other names are returned unchanged. All ranks must call it.
        """
        local = self.local_rank  # before any return, because it communicates
        wants_gpu = name == "gpu" or (name == "auto" and available_backends()["gpu"] is None)
        if not wants_gpu:
            return "cpu" if name == "auto" else name
        from xpnet.backends.cuda.probe import device_count

        count = device_count()
        return f"gpu:{local % count}" if count else "gpu"

    def bind(self, backend: Backend) -> None:
        if self._bound_to is not backend:
            self._collective, self._bound_to = collective(backend, self._comm), backend

    def all_reduce(self, array: Array) -> None:
        self._collective.all_reduce(array)

    def broadcast(self, array: Array) -> None:
        self._collective.broadcast(array)

    def all_gather(self, value: T) -> list[T]:
        gathered: list[T] = self._comm.allgather(value)
        return gathered

    def broadcast_value(self, value: T) -> T:
        first: T = self._comm.bcast(value, root=0)
        return first

    def any(self, flag: bool) -> bool:
        return bool(self._comm.allreduce(int(flag)))

    def run_on_all(self, work: Callable[[], T]) -> T:
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        failures = self.all_gather(None if error is None else f"{type(error).__name__}: {error}")
        self._failure_is_known = any(failures)
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise DistributedError(f"rank {rank} cannot train: {failure}")
        return result

    def abort(self, error: BaseException) -> None:
        if self.size > 1 and not self._failure_is_known:
            print(f"rank {self.rank} of {self.size} has failed and ends the other ranks:", file=sys.stderr)
            traceback.print_exception(error)
            sys.stderr.flush()
            self._comm.Abort(1)


def process_group(distributed: Any) -> ProcessGroup:
    """The group for fit's argument `distributed`: all ranks of MPI if it is True, or the given Communicator."""
    if isinstance(distributed, ProcessGroup):
        return distributed
    if distributed is True:
        return Communicator()
    raise ArgumentError(f"distributed must be True, False or a Communicator, not {distributed!r}.")


def started_by_mpi() -> bool:
    """Whether Open MPI, MPICH or Slurm started this process, according to environment variables."""
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "SLURM_STEP_NUM_TASKS"))


def _world() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py may be installed without an MPI library
        raise MissingPackageError(
            f'distributed training needs mpi4py and an MPI library ({error}). Run: pip install "xpnet[mpi]"'
        ) from error
    return MPI.COMM_WORLD
