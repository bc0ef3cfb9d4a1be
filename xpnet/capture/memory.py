"""The memory plan: temporary arrays of a step whose lifetimes do not overlap share memory."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xpnet.backends import Array
from xpnet.capture.calls import Call, is_array, mapped
from xpnet.capture.passes import Memory
from xpnet.capture.program import every_call

_ALIGNMENT = 64  # bytes


@dataclass
class Block:
    """Memory of one owner: `size` bytes from its byte `start` on.

    owner: the id of the owner.  users: the positions of the calls that use it, in ascending order.
    """

    owner: int
    start: int
    size: int
    users: list[int]
    offset: int = 0  # in the shared memory


class MemoryPlan:
    """Where each temporary array of some calls is placed in one piece of memory.

    size: the bytes of that piece.  unshared: the bytes that the arrays would take without sharing.  elsewhere: the
    owners of memory that is not placed in it.  before: for each call, those that have ended when it begins; None means
    all calls before it.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        memory: Memory,
        elsewhere: Collection[int] = (),
        before: Sequence[Collection[int]] | None = None,
    ) -> None:
        self._memory = memory
        self.blocks = {owner: b for owner, b in _blocks(calls, memory).items() if owner not in elsewhere}
        self.size = _place(list(self.blocks.values()), before)
        self.unshared = sum(_rounded(block.size) for block in self.blocks.values())

    def applied(self, calls: Sequence[Call], view: Callable[[Array, int], Array]) -> list[Call]:
        """The calls on the shared memory. view(array, offset): an array like this one at a byte of the memory."""
        mover = _Mover(self, view)
        return [mover.call(call) for call in calls]

    def offset(self, array: Array) -> int | None:
        """The byte of the shared memory at which an array begins; None if it is elsewhere."""
        _, owner, first, _ = self._memory.extent(array)
        block = self.blocks.get(owner)
        return None if block is None else block.offset + first - block.start


class _Mover:
    """Replaces arrays by views of the shared memory. A class, because recursive functions would keep all of them."""

    def __init__(self, plan: MemoryPlan, view: Callable[[Array, int], Array]) -> None:
        self._plan, self._view = plan, view
        self._moved: dict[int, tuple[Array, Array]] = {}  # by id of the old array, which is kept alive

    def call(self, call: Call) -> Call:
        return replace(
            call, args=self.value(call.args), kwargs=self.value(call.kwargs),
            result=self.value(call.result), reads=self.value(call.reads), writes=self.value(call.writes),
            parts=None if call.parts is None else [[self.call(c) for c in part] for part in call.parts],
        )  # fmt: skip

    def value(self, value: Any) -> Any:
        return mapped(self._array, value)

    def _array(self, value: Any) -> Any:
        if not is_array(value) or not value.size:
            return value
        if id(value) not in self._moved:
            offset = self._plan.offset(value)
            self._moved[id(value)] = value, value if offset is None else self._view(value, offset)
        return self._moved[id(value)][1]


def _blocks(calls: Sequence[Call], memory: Memory) -> dict[int, Block]:
    """The memory that calls use from the first write to the last use, by owner; not what no call writes."""
    blocks: dict[int, Block] = {}
    written = {memory.owner(a) for call in every_call(calls) for a in call.writes}
    for position, call in enumerate(calls):
        for array in (*call.reads, *call.writes):
            _, owner, first, end = memory.extent(array)
            if owner not in written or not memory.reusable(array):
                continue
            block = blocks.setdefault(owner, Block(owner, first, end - first, []))
            start, stop = min(block.start, first), max(block.start + block.size, end)
            block.start, block.size = start, stop - start
            block.users.append(position)
    return blocks


def _place(blocks: list[Block], before: Sequence[Collection[int]] | None) -> int:
    """Give each block an offset: the largest first, at the lowest offset that is free in its lifetime."""

    def ends_before(block: Block, other: Block) -> bool:
        if before is None or block.users[-1] >= other.users[0]:
            return block.users[-1] < other.users[0]
        return all(user in before[later] for user in block.users for later in other.users)

    placed: list[Block] = []
    total = 0
    for block in sorted(blocks, key=lambda b: (-b.size, b.users[0], b.owner)):
        offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            if ends_before(block, other) or ends_before(other, block):
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
