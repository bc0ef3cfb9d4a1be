"""The memory plan: arrays that are alive at the same time do not overlap, and replays in it are equal."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_programs import Program
from traced_programs import Traced, same_bits

from xpnet.capture.calls import Call
from xpnet.capture.memory import Block, MemoryPlan, _place
from xpnet.capture.passes import Memory
from xpnet.capture.trace import Trace

pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")

LIFETIMES = st.lists(st.tuples(st.integers(1, 500), st.integers(0, 12), st.integers(0, 12)), max_size=25)


def overlap(a, b):
    return a.offset < b.offset + b.size and b.offset < a.offset + a.size


def assert_apart(blocks):
    for i, a in enumerate(blocks):
        for b in blocks[:i]:
            if a.users[0] <= b.users[-1] and b.users[0] <= a.users[-1]:
                assert not overlap(a, b), (a, b)


@settings(max_examples=300, deadline=None)
@given(LIFETIMES)
def test_blocks_that_are_in_use_at_the_same_time_do_not_overlap(lifetimes):
    blocks = [Block(i, 0, size, sorted((a, b))) for i, (size, a, b) in enumerate(lifetimes)]
    total = _place(blocks, None)
    assert_apart(blocks)
    assert all(block.offset % 64 == 0 and block.offset + block.size <= total for block in blocks)
    assert total <= sum(-(-block.size // 64) * 64 for block in blocks)


@settings(max_examples=300, deadline=None)
@given(LIFETIMES, st.integers(0, 2**13))
def test_blocks_of_calls_that_run_beside_each_other_do_not_overlap(lifetimes, seed):
    streams = np.random.default_rng(seed).integers(2, size=13)
    before = [{i for i in range(j) if streams[i] == streams[j]} for j in range(13)]  # no stream waits for the other
    blocks = [Block(i, 0, size, sorted((a, b))) for i, (size, a, b) in enumerate(lifetimes)]
    _place(blocks, before)
    for i, a in enumerate(blocks):
        for b in blocks[:i]:
            if {*streams[a.users]} != {*streams[b.users]} or len({*streams[a.users]}) > 1:
                assert not overlap(a, b), (a, b)
    assert_apart(blocks)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_blocks_of_random_programs_do_not_overlap_and_hold_their_arrays(seed):
    with np.errstate(all="ignore"):
        traced = Traced(Program(seed), Program(seed).arrays(0))
    blocks = list(traced.plan.blocks.values())
    assert_apart(blocks)
    low = traced.arena.__array_interface__["data"][0]
    for call in traced.calls:
        for array in (*call.reads, *call.writes):
            if np.shares_memory(array, traced.arena) and array.size:
                first, end = np.lib.array_utils.byte_bounds(array)
                assert low <= first and end <= low + traced.plan.size
    assert traced.plan.size <= traced.plan.unshared


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 1000))
def test_random_programs_are_replayed_alike_in_shared_and_in_separate_memory(seed, step):
    program, results = Program(seed), []
    with np.errstate(all="ignore"):
        for shared in (False, True):
            traced = Traced(program, program.arrays(0), shared=shared)
            results.append([traced.replay(program.arrays(data), step) for data in (1, 2, 1)])
    for a, b in zip(*results, strict=True):
        assert all(map(same_bits, a, b))
    for results_of_one in results:
        assert all(map(same_bits, results_of_one[0], results_of_one[2]))  # nothing is kept from replay to replay


def chain(xp, a, *_):
    for _ in range(6):
        a[...] = xp.tanh(xp.exp(a) + 1.0)


def test_a_chain_of_operations_takes_the_memory_of_two_arrays():
    a = np.ones((64, 64), "f4")
    traced = Traced(lambda xp, a, n: chain(xp, a), [a], passes=False)
    assert traced.plan.size <= 2 * a.nbytes and traced.plan.unshared == 18 * a.nbytes


def test_what_no_call_writes_and_what_the_model_holds_keep_their_memory():
    table = np.arange(12.0).reshape(3, 4)

    def function(xp, a, n):
        a += xp.asarray(table) * n

    traced = Traced(function, [np.zeros((3, 4))])
    kept = [array for call in traced.calls for array in (*call.reads, *call.writes)]
    assert any(np.array_equal(array, table) for array in kept)
    assert all(not np.shares_memory(a, traced.arena) for a in traced.arrays)
    for step in (1, 2):
        (a,) = traced.replay([np.ones((3, 4))], step)
        np.testing.assert_array_equal(a, 1 + table * (step + 0.5))


def test_memory_of_which_a_part_is_constant_is_not_shared():
    def function(xp, a, n):
        table = xp.empty((2, 3), "f8")
        table[0] = 2.0  # made once
        table[1] = a[0]
        a[1] = table[0] * table[1]
        a[2] = xp.exp(xp.exp(a[1]) * n)

    traced = Traced(function, [np.ones((3, 3))])
    for step in (1, 2):
        with np.errstate(over="ignore"):
            (a,) = traced.replay([np.full((3, 3), 0.5)], step)
        assert a[1].tolist() == [1.0, 1.0, 1.0]


def test_views_with_negative_strides_and_without_elements_are_moved():
    def function(xp, a, n):
        b = xp.exp(a)
        a[...] = b[::-1, ::-1] + b.T[::2][:0].sum()

    traced = Traced(function, [np.zeros((3, 4))], passes=False)
    (a,) = traced.replay([np.arange(12.0).reshape(3, 4)], 1)
    np.testing.assert_array_equal(a, np.exp(np.arange(12.0).reshape(3, 4))[::-1, ::-1])


def test_calls_inside_parallel_work_are_moved_and_live_as_long_as_all_of_it():
    trace = Trace(np)
    a, b, c = (trace.own(np.zeros(16)).values for _ in range(3))
    parts = [
        [Call(np.exp, (a[half], b[half]), reads=(a[half],), writes=(b[half],))] for half in (slice(0, 8), slice(8, 16))
    ]
    work = Call(len, (), parts=parts, reads=(a[:8], a[8:]), writes=(b[:8], b[8:]))
    calls = [
        Call(np.copyto, (a, 1.0), writes=(a,)), work, Call(np.copyto, (c, 2.0), writes=(c,)),
        Call(np.add, (b, c, c), reads=(b, c), writes=(c,)),
    ]  # fmt: skip
    memory = Memory(trace)
    plan = MemoryPlan(calls, memory)
    assert_apart(list(plan.blocks.values()))
    assert plan.size == 2 * 128  # c takes the memory of a
    arena = np.zeros(plan.size, "uint8")
    moved = plan.applied(calls, lambda array, offset: np.ndarray(array.shape, array.dtype, arena, offset))
    inner = [array for part in moved[1].parts for call in part for array in (*call.args, *call.reads, *call.writes)]
    assert all(np.shares_memory(array, arena) for array in inner)
