"""Branches: independent calls of a captured step on a GPU are made on several streams, and dependent ones in order."""

from types import SimpleNamespace

import numpy as np
import pytest
from captured_trainings import IMAGES, X, cnn, fit, mlp
from traced_gpu_steps import captured_steps, listed

from xpnet.capture import branches
from xpnet.capture.array_module import TracedModule
from xpnet.capture.passes import Memory
from xpnet.capture.trace import Trace


def test_the_gradients_of_a_weight_and_of_the_input_are_computed_beside_each_other(gpu):
    calls = captured_steps(mlp(gpu), X)[0].calls
    products = [place for place in calls._placed if "matmul" in place.call.name]
    assert {place.stream for place in products} == {0, 1}
    update = calls._placed[-1]
    assert update.call.name == "whole_update" and len(update.before) == len(calls.calls) - 1


@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize(
    ("build", "x"), [(mlp, X), pytest.param(cnn, IMAGES, marks=pytest.mark.sweep)], ids=["mlp", "cnn"]
)
def test_a_call_waits_for_all_calls_whose_arrays_it_shares(gpu, monkeypatch, build, x, streams):
    monkeypatch.setattr(branches, "STREAMS", streams)
    for step in captured_steps(build(gpu), x):
        memory, places = Memory(SimpleNamespace(xp=gpu.xp, temporary=set())), step.calls._placed
        for position, (place, call) in enumerate(zip(places, step.calls.calls, strict=True)):
            for other, earlier in enumerate(step.calls.calls[:position]):  # in the memory that the graph uses
                assert other in place.before or not memory.depend(earlier, call), (earlier, call)
            ended = {i for i in range(position) if places[i].stream == place.stream} | set(place.after)
            assert place.before == ended.union(*(places[i].before for i in ended))


def test_a_chain_of_calls_stays_on_one_stream(gpu):
    def work(backend, x, y):
        for _ in range(3):
            backend.relu(x, out=y)
            backend.softplus(y, out=x)

    calls = listed(gpu, work, *[gpu.asarray(np.ones((4, 4), "float32")) for _ in range(2)])
    assert {place.stream for place in calls._placed} == {0}


@pytest.mark.parametrize(("size", "streams"), [(2**10, {0, 1}), (2**22, {0})])
def test_only_short_calls_share_the_gpu(gpu, size, streams):
    def work(backend, x, y, z):
        backend.relu(x, out=y)
        backend.softplus(x, out=z)

    calls = listed(gpu, work, *[gpu.asarray(np.ones(size, "float32")) for _ in range(3)])
    assert {place.stream for place in calls._placed} == streams


def test_a_missing_dependency_is_found_by_the_emulation(gpu, monkeypatch):
    if gpu.name != "emulated":
        pytest.skip("a real GPU may or may not show it")
    monkeypatch.setattr(Memory, "depend", lambda self, a, b: False)
    _, watch = fit(mlp(gpu))
    assert "differ" in watch.fallback_reason


def test_the_time_to_divide_calls_grows_with_their_number_not_with_its_square(monkeypatch):
    trace = Trace(np)
    xp, counted, depend = TracedModule(trace), [], Memory.depend
    values = [trace.wrap(np.ones(4), writable=True)]
    for _ in range(100):
        values.append(xp.tanh(values[-1]))
    grad = values[-1]
    for value in reversed(values):
        grad = grad * value
    monkeypatch.setattr(Memory, "depend", lambda self, a, b: counted.append(a) or depend(self, a, b))
    placed = branches.branches(trace.calls, Memory(trace))
    assert len(placed) == len(trace.calls) == 201
    assert len(counted) < 3 * len(placed)
