"""The memory of captured graphs: held by the graph, never given to anybody else, and given back after the run.

On the emulated GPU, whose pools reuse freed blocks and find such faults, and where there is one, on a GPU.
"""

import functools
import gc

import numpy as np
import pytest
from strict import StrictError
from test_replay import BATCH, X, Y, emulated, fit, mlp

import xpnet
from xpnet import callbacks, layers, optimizers


class Do(callbacks.Callback):
    """Calls one function after each epoch, or after each step."""

    def __init__(self, epoch=None, step=None):
        self.epoch, self.step = epoch or (lambda model: None), step or (lambda model: None)

    def on_epoch_end(self, model, epoch, logs):
        self.epoch(model)

    def on_step_end(self, model, step):
        self.step(model)


def same_state(model, other):
    for name, value in other.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], value, err_msg=name)


# A live graph keeps what it touches ----------------------------------------------------------------------------------


def larger_passes(model):
    model.forward(X, training=True)
    model.predict(X)
    model.evaluate(X, Y)


def test_buffers_that_grow_after_the_capture_leave_the_graph_its_own(gpu):
    def trained(eager_passes):
        model = mlp(gpu)
        _, watch = fit(model, epochs=4, more=[Do(epoch=eager_passes)])
        assert watch.recorded == 2
        return model

    # The noise of a training pass depends on the step alone, so passes in between change nothing.
    same_state(trained(larger_passes), trained(lambda model: None))


class Shift(layers.Layer):
    """x + an array that the layer keeps as an attribute."""

    def build(self, input_shape):
        self.offset = self.backend.zeros(input_shape, "float32")
        return input_shape

    def forward(self, x):
        return x + self.offset

    def backward(self, grad_y):
        return grad_y


def test_an_array_that_a_layer_drops_after_the_capture_lives_as_long_as_the_graph(gpu):
    model = xpnet.Sequential([layers.Dense(24), Shift(), layers.Dense(10)], (64,), backend=gpu, seed=0)
    rest = []

    def replace(model):
        shift = model.layers[1]
        with gpu.device():
            shift.offset = gpu.zeros((24,), "float32")
            rest.append(gpu.asarray(np.full(24, np.nan, "float32")))  # takes the memory, if anybody has freed it

    history, watch = fit(model, epochs=5, more=[Do(step=replace)])
    assert watch.recorded == 2 and np.isfinite(history["loss"]).all()


def test_free_memory_between_steps_changes_nothing(gpu):
    model, calm = mlp(gpu), mlp(gpu)
    _, watch = fit(model, epochs=4, more=[Do(step=lambda model: gpu.free_memory())])
    fit(calm, epochs=4)
    assert watch.recorded == 2
    same_state(model, calm)


@pytest.mark.parametrize("where", ["between epochs", "between steps"])
def test_two_models_train_in_turn_on_one_device(gpu, where):
    inner, alone, outer, calm = (mlp(gpu) for _ in range(4))

    def train_inner(model):
        if where == "between epochs" or model._state.step % 7 == 0:
            fit(inner, X[:60], Y[:60], epochs=4)

    key = "epoch" if where == "between epochs" else "step"
    _, watch = fit(outer, epochs=4, more=[Do(**{key: train_inner})])
    assert watch.recorded == 2
    fit(calm, epochs=4)
    same_state(outer, calm)
    for _ in range(4 if where == "between epochs" else 4 * 11 // 7):
        fit(alone, X[:60], Y[:60], epochs=4)
    same_state(inner, alone)


def test_repeated_runs_agree_to_the_bit(gpu):
    models = [mlp(gpu) for _ in range(3)]
    histories = [dict(fit(model, epochs=6, optimizer=optimizers.SGD(0.05, momentum=0.9))[0]) for model in models]
    assert histories[0] == histories[1] == histories[2]
    for model in models[1:]:
        same_state(model, models[0])


def test_noise_in_a_callback_is_that_of_the_step_in_a_replay_too(gpu, monkeypatch):
    def passes():
        seen, model = [], mlp(gpu)
        step = Do(step=lambda model: seen.append(gpu.to_numpy(model.forward(X[:5], training=True))))
        fit(model, epochs=4, more=[step])
        return seen

    captured = passes()
    monkeypatch.setenv("XPNET_CUDA_GRAPHS", "0")
    for got, want in zip(captured, passes(), strict=True):
        np.testing.assert_array_equal(got, want)


# After the run -------------------------------------------------------------------------------------------------------


class Counting(callbacks.Callback):
    """How many graphs are alive, and the memory that the device tells, at the end of each epoch."""

    def __init__(self, gpu):
        self.gpu, self.graphs, self.held, self.pools = gpu, [], [], []

    def on_epoch_end(self, model, epoch, logs):
        self.graphs.append(len(self.gpu.graphs))
        self.held.append(self.gpu.memory().held)
        self.pools.append(sum(graph.total_bytes for graph in self.gpu.graphs))


def test_a_run_gives_the_memory_of_its_graphs_back(gpu):
    count = Counting(gpu)
    fit(mlp(gpu), epochs=5, more=[count])
    assert count.graphs[-1] == 2 and count.pools[-1] > 0
    assert count.held[-1] >= count.pools[-1], "memory() counts the pools of graphs too"
    assert len(gpu.graphs) == 0, "though the callback still knows the run"


def test_memory_does_not_grow_from_run_to_run(gpu):
    model, used = mlp(gpu), []
    for _ in range(6):
        fit(model, epochs=3)
        gc.collect()  # a run and its callbacks know each other
        used.append(gpu.memory().used)
    assert used[-1] == used[1]


def test_a_step_that_is_not_captured_after_all_keeps_no_memory(gpu, caplog):
    class Reads(layers.Layer):
        def forward(self, x):
            self.seen = float(x.sum())
            return x

        def backward(self, grad_y):
            return grad_y

    model = xpnet.Sequential([layers.Dense(8), Reads(), layers.Dense(10)], (64,), backend=gpu, seed=0)
    count = Counting(gpu)
    _, watch = fit(model, epochs=3, more=[count])
    assert watch.recorded == 0 and count.graphs[-1] == 0


# The emulation finds such faults -------------------------------------------------------------------------------------


def captured(gpu, work, pool=None):
    """A graph of this work, whose allocations come from the pool."""
    cupy = emulated(gpu)
    stream = cupy.cuda.get_current_stream()
    with cupy.cuda.using_allocator((pool or cupy.cuda.MemoryPool()).malloc):
        stream.begin_capture()
        work()
        return stream.end_capture()


def expect_fault(gpu, words):
    """The fault that the emulation has noted, which is then forgotten."""
    (fault,) = gpu.xp.faults
    assert words in fault
    gpu.xp.faults.clear()


def test_a_freed_block_is_poisoned_and_goes_to_the_next_allocation(gpu):
    cupy = emulated(gpu)
    with gpu.device():
        a = cupy.ones(1000, dtype="float32")
        view, address = a[10:20], a.data.ptr
        del a
        assert (gpu.to_numpy(view) == 1).all(), "a view keeps the memory"
        del view
        b = cupy.cuda.get_allocator()(4000)
        assert b.address == address
        assert np.isnan(np.asarray(b).view("float32")[:1000]).all()


def test_pools_are_apart(gpu):
    cupy = emulated(gpu)
    pool = cupy.cuda.MemoryPool()
    with gpu.device():
        with cupy.cuda.using_allocator(pool.malloc):
            first = cupy.ones(100, dtype="float64").data.ptr
        other = cupy.ones(100, dtype="float64")
        assert other.data.ptr != first
        with cupy.cuda.using_allocator(pool.malloc):
            assert cupy.ones(90, dtype="float64").data.ptr == first, "rounded up to 512 bytes"
    assert pool.total_bytes() == 1024 and pool.used_bytes() == 0


def test_memory_outside_the_pool_that_was_given_back_is_a_fault(gpu):
    emulated(gpu)
    with gpu.stream():
        a = gpu.asarray(np.ones(5, "float32"))

        graph = captured(gpu, functools.partial(gpu.xp.add, a, 1, out=a))
        graph.launch()
        np.testing.assert_array_equal(gpu.to_numpy(a), 2)
        del a
        with pytest.raises(StrictError, match="given back"):
            graph.launch()
    expect_fault(gpu, "given back")


@pytest.mark.parametrize("freed", ["a temporary", "the pool"])
def test_memory_of_a_live_graph_that_somebody_else_gets_is_a_fault(gpu, freed):
    cupy = emulated(gpu)
    pool = cupy.cuda.MemoryPool()
    with gpu.stream():
        a = gpu.asarray(np.ones(5, "float32"))

        def work():
            a[...] = (a + 1) * 2

        graph = captured(gpu, work, pool)
        graph.launch()
        np.testing.assert_array_equal(gpu.to_numpy(a), 4)
        if freed == "a temporary":
            with cupy.cuda.using_allocator(pool.malloc), pytest.raises(StrictError, match="live graph"):
                cupy.ones(5, dtype="float32")
            expect_fault(gpu, "live graph touches")
        else:
            del pool
            with pytest.raises(StrictError, match="given back"):
                graph.launch()
            expect_fault(gpu, "given back")


def test_a_graph_that_is_gone_gives_its_memory_free(gpu):
    cupy = emulated(gpu)
    pool = cupy.cuda.MemoryPool()
    with gpu.stream():
        a = gpu.asarray(np.ones(5, "float32"))
        graph = captured(gpu, lambda: a + 1, pool)
        del graph
        with cupy.cuda.using_allocator(pool.malloc):
            cupy.ones(5, dtype="float32")


def test_a_capture_from_the_shared_pool_is_refused(gpu):
    cupy = emulated(gpu)
    with gpu.stream():
        a = gpu.asarray(np.ones(BATCH, "float32"))
        stream = cupy.cuda.get_current_stream()
        stream.begin_capture()
        with pytest.raises(StrictError, match="shared pool"):
            a + 1
        stream.end_capture()
