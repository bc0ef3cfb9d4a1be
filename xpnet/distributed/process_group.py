"""ProcessGroup: the processes that train one model together, each on its rows of every batch.

This module has the group of a single process, in which collective operations do nothing. `mpi.py` has the group over
MPI. All ranks must call the same operations in the same order.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from xpnet.backends import Array

T = TypeVar("T")


class ProcessGroup:
    """A single process.

    rank: the number of this process, from 0.  size: the number of processes.  synchronized: whether BatchNorm
    normalizes by the batch of all ranks, rather than each rank by its own rows.
    """

    rank = 0
    size = 1
    synchronized = True

    def rows_of(self, rows: int) -> slice:
        """The rows of a batch of `rows` that this rank works on. With fewer rows than ranks, some ranks have none."""
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def all_reduce(self, array: Array) -> None:
        """Replace a device array by its sum over all ranks, in place."""

    def broadcast(self, array: Array) -> None:
        """Replace a device array by that of rank 0, in place."""

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in order of rank."""
        return [value]

    def broadcast_value(self, value: T) -> T:
        """The value of rank 0."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Call `work` on every rank. If it fails on one rank, every rank raises."""
        return work()

    def abort(self, error: BaseException) -> None:
        """Abort all ranks, because the others would wait for this one forever."""

    def bind(self, backend: Any) -> None:
        """Prepare for arrays of this backend."""


SINGLE_PROCESS = ProcessGroup()
