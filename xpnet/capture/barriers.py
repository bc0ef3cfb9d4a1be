"""Passes for several threads: long calls are shared among them, and they wait for one another as rarely as possible."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from xpnet.backends import Array
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
    bounds = [len(out) * i // count for i in range(count + 1)]  # as in ThreadPool.parallel_for
    parts = []
    for start, end in itertools.pairwise(bounds):
        args = [a[start:end] if is_array(a) and a.ndim == out.ndim and len(a) == len(out) else a for a in call.args]
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
        later = _Node.of(call, memory)
        places = [i for i, node in enumerate(joined) if node.parts] if later.parts else []
        joined = next((found for i in places if (found := _joined_at(joined, i, later))), [*joined, later])
    return [node.call for node in joined]


class _Region:
    """The memory of some arrays: first and last bytes, by the owner of the memory."""

    def __init__(self, memory: Memory, arrays: Iterable[Array]) -> None:
        self._extents: dict[int, set[tuple[int, int]]] = {}
        for array in arrays:
            _, owner, first, end = memory.extent(array)
            self._extents.setdefault(owner, set()).add((first, end))

    def overlaps(self, other: "_Region") -> bool:
        mine, others = self._extents, other._extents
        if len(others) < len(mine):
            mine, others = others, mine
        return any(
            first < other_end and other_first < end
            for owner, extents in mine.items()
            if owner in others
            for first, end in extents
            for other_first, other_end in others[owner]
        )

    def add(self, other: "_Region") -> None:
        for owner, extents in other._extents.items():
            self._extents.setdefault(owner, set()).update(extents)


@dataclass
class _Node:
    """A call, or several joined ones, with the memory that it reads and writes as a whole and in each of its parts."""

    call: Call
    reads: _Region
    writes: _Region
    parts: "list[tuple[_Region, _Region]]"

    @staticmethod
    def of(call: Call, memory: Memory) -> "_Node":
        parts = [
            tuple(_Region(memory, (a for c in part for a in getattr(c, what))) for what in ("reads", "writes"))
            for part in call.parts or ()
        ]
        return _Node(call, _Region(memory, call.reads), _Region(memory, call.writes), parts)  # type: ignore[arg-type]

    def depends_on(self, other: "_Node") -> bool:
        """Whether the order of the two matters."""
        if self.call.opaque or other.call.opaque:
            return True
        return (
            self.writes.overlaps(other.writes) or self.writes.overlaps(other.reads) or self.reads.overlaps(other.writes)
        )

    def needs_other_parts_of(self, other: "_Node") -> bool:
        """Whether a part of this parallel work depends on parts of the other one that another thread does."""
        return len(self.parts) != len(other.parts) or any(
            writes.overlaps(other_writes) or writes.overlaps(other_reads) or reads.overlaps(other_writes)
            for i, (reads, writes) in enumerate(self.parts)
            for j, (other_reads, other_writes) in enumerate(other.parts)
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
        self.reads.add(other.reads)
        self.writes.add(other.writes)
        for mine, others in zip(self.parts, other.parts, strict=True):
            for region, more in zip(mine, others, strict=True):
                region.add(more)


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
