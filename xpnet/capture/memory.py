"""The memory plan: temporary arrays of a step whose lifetimes do not overlap share memory."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xpnet.backends import Array
from xpnet.capture.passes import Memory
from xpnet.capture.program import every_call
from xpnet.capture.trace import Call, address_of, is_array, mapped

_ALIGNMENT = 64  # bytes


@dataclass
class Block:
    """Memory of one owner: `size` bytes from its byte `start` on, in use from call `first` to call `last`."""

    owner: int
    start: int
    size: int
    first: int
    last: int
    offset: int = 0  # in the shared memory


class MemoryPlan:
    """Where each temporary array of some calls is placed in one piece of memory.

    size: the bytes of that piece.  unshared: the bytes that the arrays would take without sharing.  elsewhere: the
    owners of memory that is not placed in it.
    """

    def __init__(self, calls: Sequence[Call], memory: Memory, elsewhere: Collection[int] = ()) -> None:
        self._memory = memory
        self.blocks = {owner: b for owner, b in _blocks(calls, memory).items() if owner not in elsewhere}
        self.size = _place(list(self.blocks.values()))
        self.unshared = sum(_rounded(block.size) for block in self.blocks.values())

    def applied(self, calls: Sequence[Call], view: Callable[[Array, int], Array]) -> list[Call]:
        """The calls on the shared memory.

        view(array, offset): an array like this one in the shared memory, with its first element at this byte.
        """
        moved: dict[int, tuple[Array, Array]] = {}  # by id of the old array, which is kept alive

        def moved_array(value: Any) -> Any:
            if not is_array(value) or not value.size:
                return value
            if id(value) not in moved:
                block = self.blocks.get(self._memory.owner(value))
                new = value if block is None else view(value, block.offset + address_of(value) - block.start)
                moved[id(value)] = value, new
            return moved[id(value)][1]

        def move(value: Any) -> Any:
            return mapped(moved_array, value)

        def moved_call(call: Call) -> Call:
            return replace(
                call, args=move(call.args), kwargs=move(call.kwargs),
                result=move(call.result), reads=move(call.reads), writes=move(call.writes),
                parts=None if call.parts is None else [[moved_call(c) for c in part] for part in call.parts],
            )  # fmt: skip

        return [moved_call(call) for call in calls]


def _blocks(calls: Sequence[Call], memory: Memory) -> dict[int, Block]:
    """The memory that calls use from the first write to the last use, by owner; not what no call writes."""
    blocks: dict[int, Block] = {}
    written = {memory.owner(a) for call in every_call(calls) for a in call.writes}
    for position, call in enumerate(calls):
        for array in (*call.reads, *call.writes):
            _, owner, first, end = memory.extent(array)
            if owner not in written or not memory.reusable(array):
                continue
            block = blocks.setdefault(owner, Block(owner, first, end - first, position, position))
            start, stop = min(block.start, first), max(block.start + block.size, end)
            block.start, block.size, block.last = start, stop - start, position
    return blocks


def _place(blocks: list[Block]) -> int:
    """Give each block an offset: the largest first, at the lowest offset that is free in its lifetime."""
    placed: list[Block] = []
    total = 0
    for block in sorted(blocks, key=lambda b: (-b.size, b.first, b.owner)):
        offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            if other.first > block.last or block.first > other.last:
                continue
            if offset + block.size <= other.offset:
                break
            offset = max(offset, other.offset + _rounded(other.size))
        block.offset = offset
        placed.append(block)
        total = max(total, offset + _rounded(block.size))
    return total


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
