"""Passes for several threads: long calls are shared among them, and they wait for one another as rarely as possible."""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from xpnet.backends import Array
from xpnet.backends.cpu.thread_pool import slices
from xpnet.capture.calls import Call, is_array, same_view
from xpnet.capture.passes import EXACT, Memory

_FEW_ELEMENTS = 2**14  # a call on fewer is not worth sharing among threads


def with_shared_elements(calls: list[Call], memory: Memory) -> list[Call]:
    """Share long elementwise calls among threads, if other work of the step is shared."""
    example = next((call for call in calls if call.parts is not None), None)
    return calls if example is None else [_shared(call, example, memory) for call in calls]


def _shared(call: Call, example: Call, memory: Memory) -> Call:
    """A call in as many parts as another one has; the call itself if it cannot be divided, or is not worth it."""
    if call.function not in EXACT or call.kwargs or call.result is not None:
        return call
    out, count = call.args[-1], len(example.parts or ())
    if out.size < _FEW_ELEMENTS or len(out) < count:
        return call
    if not all(same_view(a, out) or not memory.overlap(a, out) for a in call.reads):
        return call  # a part would read what another one has written
    parts = []
    for rows in slices(len(out), count):
        args = [a[rows] if is_array(a) and a.ndim == out.ndim and len(a) == len(out) else a for a in call.args]
        reads = tuple(a for a in args[:-1] if is_array(a))
        parts.append([replace(call, args=tuple(args), reads=reads, writes=(args[-1],))])
    return replace(call, function=example.function, args=(), parts=parts)


def with_fewer_barriers(calls: list[Call], memory: Memory) -> list[Call]:
    """Join parallel work with earlier parallel work, where each part needs only what its own thread wrote.

    Calls in between move before or after both, as far as they do not depend on one of them. The first work that allows
    it is joined: so a product for the gradient of a weight, which needs the work of all threads, waits until the end.
    """
    joined: list[_Node] = []
    for call in calls:
        later = _Node(call, memory)
        places = [i for i, node in enumerate(joined) if node.parts] if later.parts else []
        found = next((found for i in places if (found := _joined_at(joined, i, later))), None)
        joined = found or joined
        if found is None:
            joined.append(later)
    return [node.call for node in joined]


class _Region:
    """The bytes of some arrays: by the owner of the memory, the limits of separate extents, in increasing order."""

    def __init__(self, memory: Memory, arrays: Iterable[Array]) -> None:
        extents: dict[int, list[tuple[int, int]]] = {}
        for array in arrays:
            _, owner, first, end = memory.extent(array)
            if first < end:
                extents.setdefault(owner, []).append((first, end))
        self._limits = {owner: _limits(found) for owner, found in extents.items()}

    def overlaps(self, other: "_Region") -> bool:
        return any(_overlap(self._limits[owner], other._limits[owner]) for owner in self._limits.keys() & other._limits)

    def add(self, other: "_Region") -> None:
        for owner, limits in other._limits.items():
            mine = self._limits.get(owner, [])
            self._limits[owner] = _limits([*_extents(mine), *_extents(limits)])


def _limits(extents: list[tuple[int, int]]) -> list[int]:
    """[first, end, first, end, ...] of extents that are merged where they overlap or are adjacent."""
    limits: list[int] = []
    for first, end in sorted(extents):
        if limits and first <= limits[-1]:
            limits[-1] = max(limits[-1], end)
        else:
            limits += first, end
    return limits


def _extents(limits: list[int]) -> Iterator[tuple[int, int]]:
    return zip(limits[::2], limits[1::2], strict=True)


def _overlap(a: list[int], b: list[int]) -> bool:
    """Whether an extent of one list overlaps one of the other: it begins inside of it, or contains a limit."""
    short, long = sorted((a, b), key=len)
    for first, end in _extents(short):
        position = bisect.bisect_right(long, first)
        if position % 2 or (position < len(long) and long[position] < end):
            return True
    return False


class _Access:
    """The memory that some calls read and write."""

    def __init__(self, memory: Memory, calls: Sequence[Call]) -> None:
        self.reads = _Region(memory, (a for call in calls for a in call.reads))
        self.writes = _Region(memory, (a for call in calls for a in call.writes))

    def conflicts(self, other: "_Access") -> bool:
        """Whether the order of the two matters."""
        return (
            self.writes.overlaps(other.writes) or self.writes.overlaps(other.reads) or self.reads.overlaps(other.writes)
        )

    def add(self, other: "_Access") -> None:
        self.reads.add(other.reads)
        self.writes.add(other.writes)


class _Node:
    """A call, or several joined ones, with the memory that the whole and each of its parts access."""

    def __init__(self, call: Call, memory: Memory) -> None:
        self.call, self.whole = call, _Access(memory, [call])
        self.parts = [_Access(memory, part) for part in call.parts or ()]

    def depends_on(self, other: "_Node") -> bool:
        """Whether the order of the two matters."""
        return self.call.opaque or other.call.opaque or self.whole.conflicts(other.whole)

    def needs_other_parts_of(self, other: "_Node") -> bool:
        """Whether a part of this parallel work depends on parts of the other one that another thread does."""
        return len(self.parts) != len(other.parts) or any(
            part.conflicts(other_part)
            for i, part in enumerate(self.parts)
            for j, other_part in enumerate(other.parts)
            if i != j
        )

    def join(self, other: "_Node") -> None:
        """Add the parts of other work at the end of these parts."""
        a, b = self.call, other.call
        self.call = replace(
            a, parts=[[*x, *y] for x, y in zip(a.parts or (), b.parts or (), strict=True)],
            reads=(*a.reads, *b.reads), writes=(*a.writes, *b.writes),
            operator=f"{a.operator}, {b.operator}", place=f"{a.place.split(' … ')[0]} … {b.place}",
        )  # fmt: skip
        self.whole.add(other.whole)
        for part, other_part in zip(self.parts, other.parts, strict=True):
            part.add(other_part)


def _joined_at(nodes: list[_Node], position: int, later: _Node) -> list[_Node] | None:
    """These nodes with `later` joined to the one at a position; None if it cannot be."""
    first, after, before = nodes[position], list[_Node](), list[_Node]()
    if later.needs_other_parts_of(first):
        return None
    for node in nodes[position + 1 :]:
        waits = any(node.depends_on(earlier) for earlier in (first, *after))
        (after if waits else before).append(node)
    if any(later.depends_on(node) for node in after):
        return None
    first.join(later)
    return [*nodes[:position], *before, first, *after]
