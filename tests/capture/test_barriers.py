"""Passes for several threads: which parallel work is joined, and which calls are shared among threads."""

import numpy as np

from xpnet.capture.barriers import _Region, with_fewer_barriers, with_shared_elements
from xpnet.capture.calls import Call
from xpnet.capture.passes import Memory
from xpnet.capture.trace import Trace


def parallel(*parts):
    """Parallel work: for each part, the (reads, writes) of one call."""
    lists = [[Call(lambda: None, (), reads=tuple(reads), writes=tuple(writes))] for reads, writes in parts]
    calls = [call for part in lists for call in part]
    return Call(
        lambda parts: None, (), parts=lists, reads=tuple(a for c in calls for a in c.reads),
        writes=tuple(a for c in calls for a in c.writes),
    )  # fmt: skip


def test_parallel_work_is_joined_where_each_part_needs_its_own_results_only():
    trace = Trace(np)
    a, b, c = (trace.own(np.zeros(8)).values for _ in range(3))
    memory = Memory(trace)
    first = parallel(([a[:4]], [b[:4]]), ([a[4:]], [b[4:]]))
    follows = {
        "the same parts": (parallel(([b[:4]], [c[:4]]), ([b[4:]], [c[4:]])), True),
        "a part of the other": (parallel(([b[:5]], [c[:4]]), ([b[4:]], [c[4:]])), False),
        "all of the results": (parallel(([b], [c[:4]]), ([b], [c[4:]])), False),
        "writes what the other reads": (parallel(([b[:4]], [a[4:]]), ([b[4:]], [a[:4]])), False),
        "writes what the other writes": (parallel(([c[:4]], [b[4:]]), ([c[4:]], [b[:4]])), False),
        "three parts": (parallel(([b[:4]], [c[:4]]), ([b[4:]], [c[4:6]]), ([], [c[6:]])), False),
        "reads what both read": (parallel(([a], [c[:4]]), ([a], [c[4:]])), True),
    }
    for name, (second, joined) in follows.items():
        calls = with_fewer_barriers([first, second], memory)
        assert len(calls) == (1 if joined else 2), name
        if joined:
            assert [len(part) for part in calls[0].parts] == [2, 2]
    last = follows["the same parts"][0]
    for array, place in ((a, 1), (b, None), (c, 0)):
        between = Call(np.add, (array, 1, array), reads=(array,), writes=(array,))
        calls = with_fewer_barriers([first, between, last], memory)
        if place is None:  # it depends on both
            assert [call.parts is None for call in calls] == [False, True, False]
        else:
            assert len(calls) == 2 and calls[place] is between  # it depends on one alone
    other = trace.own(np.zeros(8)).values
    between = Call(np.add, (other, 1, other), reads=(other,), writes=(other,))
    assert with_fewer_barriers([first, between, last], memory)[0] is between
    user = Call(lambda: None, (), opaque=True)
    assert len(with_fewer_barriers([first, user, last], memory)) == 3


def test_work_that_needs_all_threads_comes_after_a_chain_of_work_that_does_not():
    trace = Trace(np)
    a, b, c, d = (trace.own(np.zeros(8)).values for _ in range(4))
    halves = slice(None, 4), slice(4, None)
    chain = [parallel(*[([x[half]], [y[half]]) for half in halves]) for x, y in ((a, b), (b, c))]
    sums = parallel(*[([b], [d[half]]) for half in halves])
    calls = with_fewer_barriers([chain[0], sums, chain[1]], Memory(trace))
    assert [call.reads for call in calls] == [(*chain[0].reads, *chain[1].reads), sums.reads]
    overwrites = parallel(*[([a[half]], [b[half]]) for half in halves])  # what the sums read
    assert len(with_fewer_barriers([chain[0], sums, overwrites], Memory(trace))) == 3


def test_an_empty_view_depends_on_nothing():
    trace = Trace(np)
    a, b = (trace.own(np.zeros(8)).values for _ in range(2))
    first = parallel(([], [a[:4]]), ([], [a[4:]]))
    second = parallel(([a[:0]], [b[:4]]), ([a[:0], a[8:]], [b[4:]]))
    assert len(with_fewer_barriers([first, second], Memory(trace))) == 1


def test_regions_overlap_where_two_of_their_arrays_do(rng):
    trace = Trace(np)
    memory, owners = Memory(trace), [trace.own(np.zeros(40, "uint8")).values for _ in range(2)]
    found = set()
    for _ in range(300):
        starts, lengths = rng.integers(0, 38, (4, 3)), rng.integers(0, 3, (4, 3))
        arrays = [
            [owners[rng.integers(2)][i : i + n] for i, n in zip(*both, strict=True)]
            for both in zip(starts, lengths, strict=True)
        ]
        mine, more, *others = (_Region(memory, some) for some in arrays)
        mine.add(more)
        for other, of_other in zip(others, arrays[2:], strict=True):
            want = any(np.shares_memory(a, b) for a in arrays[0] + arrays[1] for b in of_other)
            assert mine.overlaps(other) == other.overlaps(mine) == want
            found.add(want)
    assert found == {True, False}


def test_long_elementwise_calls_are_shared_with_the_same_bits(rng):
    x, row, out = rng.normal(size=(301, 64)), rng.normal(size=64), np.empty((301, 64))
    other = Call(print, (), parts=[[], [], []])
    want, exponential = np.multiply(x, row), np.exp(x)
    calls = {
        "multiply": Call(np.multiply, (x, row, out), reads=(x, row), writes=(out,)),
        "short": Call(np.multiply, (x[:9], 2.0, out[:9]), reads=(x[:9],), writes=(out[:9],)),
        "not rounded alike": Call(np.exp, (x, exponential), reads=(x,), writes=(exponential,)),
    }
    memory = Memory(Trace(np))
    assert with_shared_elements([*calls.values()], memory) == [*calls.values()]  # there are no threads
    _, shared, *rest = with_shared_elements([other, *calls.values()], memory)
    assert rest == [calls["short"], calls["not rounded alike"]]
    assert shared.function is print and [len(part) for part in shared.parts] == [1, 1, 1]
    assert [part[0].args[2].shape[0] for part in shared.parts] == [100, 100, 101]
    for part in shared.parts:
        assert part[0].reads[1] is row and part[0].writes == part[0].args[2:]
        part[0].make()
    np.testing.assert_array_equal(out, want)


def test_calls_that_read_what_they_write_elsewhere_are_not_shared(rng):
    a = rng.normal(size=(301, 64))
    other = Call(print, (), parts=[[], []])
    for read in (a[:1], a[0], a[::-1]):  # NumPy copies these before it writes
        call = Call(np.subtract, (a, read, a), reads=(a, read), writes=(a,))
        assert with_shared_elements([other, call], Memory(Trace(np)))[1] is call
