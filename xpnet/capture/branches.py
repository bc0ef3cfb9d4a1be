"""Branches: which calls of a step run at the same time on a GPU, on several streams.

The kernels of small nets occupy only part of a GPU. In a backward pass, the gradient of a weight and that of the input
need the same array, but not each other.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from xpnet.capture.calls import Call
from xpnet.capture.passes import Memory

STREAMS = 2

# An estimate of the seconds that a call takes, which decides only how calls are divided.
_LAUNCH, _PER_BYTE, _PER_OPERATION = 1.2e-6, 1 / 2e12, 1 / 2e13
_SWITCH = 0.8e-6  # until a stream sees that another one has finished a call
_LONG = 10e-6  # a longer call occupies the whole GPU


class Placed(NamedTuple):
    """A call on a stream, by number. after: the positions of the calls on other streams that it waits for.

    before: the positions of all calls that have ended when it begins.
    """

    call: Call
    stream: int
    after: list[int]
    before: frozenset[int]


def branches(
    calls: Sequence[Call], memory: Memory, streams: int | None = None, last_waits: bool = False
) -> list[Placed]:
    """The calls in the order in which they are made, each on the stream where it can begin first.

    Long calls are on the first stream, so that no two of them share the GPU. Of the calls that can begin, the one that
    starts the longest path to the end is next. Calls whose order matters stay in their order.

    streams: their number, by default `STREAMS`.  last_waits: whether the last call is made after all others.
    """
    streams = streams or STREAMS
    if streams == 1:
        return [Placed(call, 0, [], frozenset(range(position))) for position, call in enumerate(calls)]
    needed = _needed(calls, memory)
    if last_waits:
        needed[-1] = list(range(len(calls) - 1))
    paths = _paths_to_the_end(calls, needed)
    waiting: list[list[int]] = [[] for _ in calls]  # for each call, those that need it
    for number, others in enumerate(needed):
        for i in others:
            waiting[i].append(number)
    missing = [len(others) for others in needed]  # for each call, how many that it needs are not placed
    ready = [(-paths[number], number) for number, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    placed: list[Placed] = []
    position_of: dict[int, int] = {}  # among the placed calls
    ends: list[float] = []  # of the placed calls, in estimated seconds
    latest: list[int | None] = [None] * streams  # the latest call of each stream
    while ready:
        _, number = heapq.heappop(ready)
        before = [position_of[i] for i in needed[number]]
        starts = []
        for stream, last in enumerate(latest):
            waits = [ends[i] + (_SWITCH if placed[i].stream != stream else 0.0) for i in before]
            starts.append(max([0.0 if last is None else ends[last], *waits]))
        long = _seconds(calls[number]) > _LONG
        stream = 0 if long else min(range(streams), key=starts.__getitem__)
        placed.append(_placed(calls[number], stream, before, latest[stream], placed))
        position_of[number] = latest[stream] = len(ends)
        ends.append(starts[stream] + _seconds(calls[number]))
        for i in waiting[number]:
            missing[i] -= 1
            if not missing[i]:
                heapq.heappush(ready, (-paths[i], i))
    return placed


def _needed(calls: Sequence[Call], memory: Memory) -> list[list[int]]:
    """For each call, the positions of the earlier calls whose order with it matters."""
    needed: list[list[int]] = []
    users: dict[int, list[int]] = {}  # the calls so far that read or write memory, by its owner
    writers: dict[int, list[int]] = {}
    opaque: list[int] = []
    for position, call in enumerate(calls):
        read, written = ({memory.owner(a) for a in arrays} for arrays in (call.reads, call.writes))
        candidates = set(range(position) if call.opaque else opaque)
        candidates.update(*(writers.get(owner, ()) for owner in read), *(users.get(owner, ()) for owner in written))
        needed.append([i for i in sorted(candidates) if memory.depend(calls[i], call)])
        for owner in read | written:
            users.setdefault(owner, []).append(position)
        for owner in written:
            writers.setdefault(owner, []).append(position)
        if call.opaque:
            opaque.append(position)
    return needed


def _paths_to_the_end(calls: Sequence[Call], needed: Sequence[Sequence[int]]) -> list[float]:
    """For each call, the seconds that it and the longest chain of calls after it take."""
    rest = [0.0] * len(calls)
    paths = [0.0] * len(calls)
    for position in reversed(range(len(calls))):
        paths[position] = rest[position] + _seconds(calls[position])
        for i in needed[position]:
            rest[i] = max(rest[i], paths[position])
    return paths


def _placed(call: Call, stream: int, needed: Sequence[int], last: int | None, placed: Sequence[Placed]) -> Placed:
    before = set() if last is None else {last, *placed[last].before}
    after = []
    for i in sorted(needed, reverse=True):  # later calls first, since they may have waited for earlier ones
        if i not in before:
            after.append(i)
            before |= {i, *placed[i].before}
    return Placed(call, stream, after, frozenset(before))


def _seconds(call: Call) -> float:
    arrays = (*call.reads, *call.writes)
    size: int = sum(a.nbytes for a in arrays)
    return _LAUNCH + _PER_BYTE * size + _PER_OPERATION * operations(call)


def operations(call: Call) -> int:
    """The arithmetic of a product or a convolution, whose weight has a row for each number of a patch; 0 for others."""
    arrays = (*call.reads, *call.writes)
    if "matmul" in call.name and call.writes:
        return 2 * int(call.writes[0].size) * int(call.reads[0].shape[-1])
    if "convolve" in call.name:
        rows, filters = next(a.shape for a in arrays if a.ndim == 2)
        outputs = next(a for a in arrays if a.ndim == 4 and a.shape[3] == filters)
        return 2 * int(outputs.size) * int(rows)
    return 0
