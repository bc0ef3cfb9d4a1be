"""Data-parallel training on MPI: every rank holds the whole model, and works on its rows of each batch.

    mpiexec -n 2 python train.py                      # with model.fit(..., distributed=True) in it

The gradient of a batch is the sum over its rows, so ranks that each sum their own need one all-reduce of the flat
vector a step, and then make the same update. Needs mpi4py (extra `mpi`), and an MPI: the cluster's, or the extra's own.
"""

import os
import platform
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from xpnet.backends import Array, Backend, available_backends
from xpnet.backends.collectives import HostCollective, collective
from xpnet.errors import ArgumentError, DistributedError, MissingPackageError
from xpnet.ranks import Ranks

__all__ = ["Communicator"]

T = TypeVar("T")


class Communicator(Ranks):
    """The ranks of an MPI communicator, by default all processes that mpiexec has started.

    comm: an mpi4py communicator.  batch_norm: "synchronized" normalises by the whole batch, so that any number of ranks
    makes the same run; "per rank" by each rank's own rows, without waiting for the others.
    """

    def __init__(self, comm: Any = None, batch_norm: str = "synchronized") -> None:
        if batch_norm not in ("synchronized", "per rank"):
            raise ArgumentError(f'batch_norm must be "synchronized" or "per rank", not {batch_norm!r}.')
        self._comm = _world() if comm is None else comm
        self.rank, self.size = int(self._comm.rank), int(self._comm.size)
        self.synchronized = batch_norm == "synchronized"
        self._collective: HostCollective | None = None
        self._all_know = False  # that one of them has failed, so that none waits for it
        self._bound_to: Backend | None = None

    @property
    def local_rank(self) -> int:
        """The number of this process among those on the same machine."""
        names = self._comm.allgather(platform.node())
        return sum(name == names[self.rank] for name in names[: self.rank])

    def backend(self, name: str = "auto") -> str:
        """The name of this rank's device: "gpu:k" where a GPU is asked for, or "auto" finds one; else "cpu".

        To be asked on every rank. Ranks on one machine take its GPUs in turn.
        """
        local = self.local_rank
        usable = name == "gpu" or (name == "auto" and available_backends()["gpu"] is None)
        if not usable:
            return "cpu" if name == "auto" else name
        from xpnet.backends.gpu import device_count

        count = device_count()
        return f"gpu:{local % count}" if count else "gpu"

    def bind(self, backend: Backend) -> None:
        if self._bound_to is not backend:
            self._collective, self._bound_to = collective(backend, self._comm), backend

    def add_up(self, array: Array) -> None:
        assert self._collective is not None
        self._collective.add_up(array)

    def copy_from_first(self, array: Array) -> None:
        assert self._collective is not None
        self._collective.copy_from_first(array)

    def gather(self, what: T) -> list[T]:
        gathered: list[T] = self._comm.allgather(what)
        return gathered

    def of_first(self, what: T) -> T:
        first: T = self._comm.bcast(what, root=0)
        return first

    def any(self, flag: bool) -> bool:
        return bool(self._comm.allreduce(int(flag)))

    def together(self, work: Callable[[], T]) -> T:
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        failures = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        self._all_know = any(failures)
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise DistributedError(f"rank {rank} cannot train: {failure}")
        return result

    def failed(self, error: BaseException) -> None:
        if self.size > 1 and not self._all_know:
            print(f"rank {self.rank} of {self.size} has failed, and ends the others:", file=sys.stderr)
            traceback.print_exception(error)
            sys.stderr.flush()
            self._comm.Abort(1)


def _world() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py may be there, and no MPI for it
        raise MissingPackageError(
            f'distributed training needs mpi4py and an MPI ({error}). Run: pip install "xpnet[mpi]"'
        ) from error
    return MPI.COMM_WORLD


def of(distributed: Any) -> Ranks:
    """What fit's argument `distributed` means: all ranks of MPI for True, or a Communicator itself."""
    if isinstance(distributed, Ranks):
        return distributed
    if distributed is True:
        return Communicator()
    raise ArgumentError(f"distributed must be True, False or a Communicator, not {distributed!r}.")


def started_by_mpi() -> bool:
    """Whether an mpiexec (of Open MPI, MPICH, or Slurm) has started this process, as the environment tells."""
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "SLURM_STEP_NUM_TASKS"))
