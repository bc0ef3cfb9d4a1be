"""A communicator whose ranks are threads of one process, for tests of the distributed code without MPI."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from xpnet.distributed import Communicator

T = TypeVar("T")


class _Rendezvous:
    def __init__(self, size: int) -> None:
        self.barrier, self.values = threading.Barrier(size, timeout=60), [None] * size


class ThreadComm:
    """The methods of mpi4py's communicator that xpnet calls."""

    def __init__(self, rendezvous: _Rendezvous, rank: int, size: int) -> None:
        self._rendezvous, self.rank, self.size = rendezvous, rank, size

    def allgather(self, value: Any) -> list[Any]:
        self._rendezvous.values[self.rank] = value
        self._rendezvous.barrier.wait()
        values = list(self._rendezvous.values)
        self._rendezvous.barrier.wait()
        return values

    def allreduce(self, number: int) -> int:
        return sum(self.allgather(number))

    def bcast(self, value: Any, root: int) -> Any:
        return self.allgather(value)[root]

    def Allreduce(self, in_place: Any, array: np.ndarray) -> None:  # noqa: N802
        assert array.flags.c_contiguous
        array[...] = sum(self.allgather(array.copy()))

    def Bcast(self, array: np.ndarray, root: int) -> None:  # noqa: N802
        array[...] = self.allgather(array.copy())[root]

    def Abort(self, status: int) -> None:  # noqa: N802
        self._rendezvous.barrier.abort()


def run_on_ranks(size: int, work: Callable[[Communicator], T], **options: Any) -> list[T]:
    """Run `work` on each rank and return the results. Raise its first error, not those of the ranks that waited."""
    rendezvous, results, errors = _Rendezvous(size), [None] * size, []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Communicator(ThreadComm(rendezvous, rank, size), **options))
        except BaseException as error:
            errors.append(error)
            rendezvous.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results  # type: ignore[return-value]
