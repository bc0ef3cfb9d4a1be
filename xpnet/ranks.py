"""The ranks of a run: processes that train one model together, each on its rows of every batch.

Here is the run of a single one, for which there is nothing to add up. `distributed.py` has those of MPI. The same
calls, in the same order, must be made on every rank.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from xpnet.backends import Array

T = TypeVar("T")


class Ranks:
    """One process alone.

    rank: the number of this one, from 0.  size: how many there are.  synchronized: whether BatchNorm normalises by the
    batch of all ranks, rather than each by its own rows.
    """

    rank = 0
    size = 1
    synchronized = True

    def share(self, rows: int) -> slice:
        """Which of so many rows are this rank's. Where there are fewer rows than ranks, some have none."""
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def add_up(self, array: Array) -> None:
        """Make an array of the device the sum of what all ranks hold in it, in place."""

    def gather(self, what: T) -> list[T]:
        """What each rank gives, in their order, on every rank."""
        return [what]

    def of_first(self, what: T) -> T:
        """What rank 0 gives, on every rank."""
        return what

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag

    def copy_from_first(self, array: Array) -> None:
        """Make an array of the device what rank 0 holds in it, in place."""

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work`, where it succeeds on all ranks; an error on all, where it fails on any."""
        return work()

    def failed(self, error: BaseException) -> None:
        """This rank cannot go on: end the others too, which would wait for it."""

    def bind(self, backend: Any) -> None:
        """Arrays will be of this backend's device."""


ALONE = Ranks()
