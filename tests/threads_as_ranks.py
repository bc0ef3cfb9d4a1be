"""MPI's communicator among the threads of one process: for tests of what each rank does, where there is no MPI."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from xpnet.distributed import Communicator

T = TypeVar("T")


class _Meeting:
    def __init__(self, size: int) -> None:
        self.barrier, self.given = threading.Barrier(size, timeout=60), [None] * size


class ThreadComm:
    """The few methods of mpi4py's that are called."""

    def __init__(self, meeting: _Meeting, rank: int, size: int) -> None:
        self._meeting, self.rank, self.size = meeting, rank, size

    def allgather(self, what: Any) -> list[Any]:
        self._meeting.given[self.rank] = what
        self._meeting.barrier.wait()
        everything = list(self._meeting.given)
        self._meeting.barrier.wait()
        return everything

    def allreduce(self, number: int) -> int:
        return sum(self.allgather(number))

    def bcast(self, what: Any, root: int) -> Any:
        return self.allgather(what)[root]

    def Allreduce(self, in_place: Any, array: np.ndarray) -> None:  # noqa: N802
        assert array.flags.c_contiguous
        array[...] = sum(self.allgather(array.copy()))

    def Bcast(self, array: np.ndarray, root: int) -> None:  # noqa: N802
        array[...] = self.allgather(array.copy())[root]

    def Abort(self, status: int) -> None:  # noqa: N802
        self._meeting.barrier.abort()


def on_ranks(size: int, work: Callable[[Communicator], T], **options: Any) -> list[T]:
    """What `work` returns on each rank. Its first error is raised; those of others, who waited for it, are not."""
    meeting, results, errors = _Meeting(size), [None] * size, []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Communicator(ThreadComm(meeting, rank, size), **options))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results  # type: ignore[return-value]
