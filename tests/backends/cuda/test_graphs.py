"""The memory of captured graphs: a graph holds it, nothing else may use it, and it is freed after the run.

The tests run on the emulated GPU, whose pools reuse freed blocks and find memory faults, and on a real GPU.
"""

import functools
import gc
import threading

import numpy as np
import pytest
from captured_trainings import BATCH, X, Y, emulated_cupy, fit, mlp
from strict import StrictError

import xpnet
from xpnet import callbacks, layers, optimizers
from xpnet.backends.cuda.graphs import gatherable


class Do(callbacks.Callback):
    """Calls a function after each epoch, or after each step."""

    def __init__(self, epoch=None, step=None):
        self.epoch, self.step = epoch or (lambda model: None), step or (lambda model: None)

    def on_epoch_end(self, model, epoch, logs):
        self.epoch(model)

    def on_step_end(self, model, step):
        self.step(model)


def same_state(model, other):
    for name, value in other.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], value, err_msg=name)


# Live graphs ---------------------------------------------------------------------------------------------------------


def larger_passes(model):
    model.forward(X, training=True)
    model.predict(X)
    model.evaluate(X, Y)


@pytest.mark.usefixtures("exact_replays")
def test_buffers_that_grow_after_the_capture_do_not_affect_the_graph(gpu):
    def trained(eager_passes):
        model = mlp(gpu)
        _, watch = fit(model, epochs=4, more=[Do(epoch=eager_passes)])
        assert watch.captured == 2
        return model

    # The noise of a training pass depends only on the step, so additional passes change nothing.
    same_state(trained(larger_passes), trained(lambda model: None))


class Shift(layers.Layer):
    """x + an array that is an attribute of the layer."""

    def build(self, input_shape):
        self.offset = self.backend.zeros(input_shape, "float32")
        return input_shape

    def forward(self, x):
        return x + self.offset

    def backward(self, grad_y):
        return grad_y


def test_an_array_replaced_after_the_capture_stays_alive_for_the_graph(gpu):
    model = xpnet.Sequential([layers.Dense(24), Shift(), layers.Dense(10)], (64,), backend=gpu, seed=0)
    new_arrays = []

    def replace(model):
        shift = model.layers[1]
        with gpu.device():
            shift.offset = gpu.zeros((24,), "float32")
            new_arrays.append(gpu.asarray(np.full(24, np.nan, "float32")))  # gets the memory if it was freed

    history, watch = fit(model, epochs=5, more=[Do(step=replace)])
    assert watch.captured == 2 and np.isfinite(history["loss"]).all()


def test_free_memory_between_steps_changes_nothing(gpu):
    model, plain = mlp(gpu), mlp(gpu)
    _, watch = fit(model, epochs=4, more=[Do(step=lambda model: gpu.free_memory())])
    fit(plain, epochs=4)
    assert watch.captured == 2
    same_state(model, plain)


@pytest.mark.sweep
@pytest.mark.parametrize("where", ["between epochs", "between steps"])
def test_two_models_can_train_alternately_on_one_device(gpu, where):
    inner, inner_alone, outer, outer_alone = (mlp(gpu) for _ in range(4))

    def train_inner(model):
        if where == "between epochs" or model._state.step % 7 == 0:
            fit(inner, X[:60], Y[:60], epochs=4)

    key = "epoch" if where == "between epochs" else "step"
    _, watch = fit(outer, epochs=4, more=[Do(**{key: train_inner})])
    assert watch.captured == 2
    fit(outer_alone, epochs=4)
    same_state(outer, outer_alone)
    for _ in range(4 if where == "between epochs" else 4 * 11 // 7):
        fit(inner_alone, X[:60], Y[:60], epochs=4)
    same_state(inner, inner_alone)


def test_repeated_runs_are_equal_bit_for_bit(gpu):
    models = [mlp(gpu) for _ in range(3)]
    histories = [dict(fit(model, epochs=6, optimizer=optimizers.SGD(0.05, momentum=0.9))[0]) for model in models]
    assert histories[0] == histories[1] == histories[2]
    for model in models[1:]:
        same_state(model, models[0])


@pytest.mark.usefixtures("exact_replays")
def test_a_training_pass_in_a_callback_has_the_noise_of_the_step(gpu, monkeypatch):
    def passes():
        seen, model = [], mlp(gpu)
        step = Do(step=lambda model: seen.append(gpu.to_numpy(model.forward(X[:5], training=True))))
        fit(model, epochs=4, more=[step])
        return seen

    captured = passes()
    monkeypatch.setenv("XPNET_CAPTURE", "0")
    for got, want in zip(captured, passes(), strict=True):
        np.testing.assert_array_equal(got, want)


# The samples and the numbers of a step -------------------------------------------------------------------------------


@pytest.mark.parametrize("ends_with_update", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_the_last_kernel_of_a_step_prepares_the_next(gpu, rng, shift, ends_with_update):
    """shift: of the arrays in memory, so that the widest copies are not possible."""
    kinds = [("float32", (8,)), ("float32", (3, 2)), ("int64", ()), ("float64", (3,))]
    if shift:
        kinds = [("uint8", (5,)), ("bool", (16,)), ("float32", (4,)), ("int32", (1,))]
    arrays = [rng.integers(2, size=(10, *shape)).astype(dtype) for dtype, shape in kinds]
    order = rng.permutation(10)
    with gpu.stream():
        sums = gpu.zeros((3, 9), "float64")
        cells = gpu.graph_capture().cells(10, 4, 1, sums)
        outs = [gpu.zeros((4, *a.shape[1:]), "float32" if a.dtype == "uint8" else a.dtype) for a in arrays]
        memory = [gpu.zeros((a.size + shift,), a.dtype) for a in arrays]
        for whole, a in zip(memory, arrays, strict=True):
            whole[shift:] = gpu.asarray(a.ravel())
        sources = [whole[shift:].reshape(a.shape) for whole, a in zip(memory, arrays, strict=True)]
        assert all(gatherable(*pair) for pair in zip(sources, outs, strict=True))
        cells.gathers, cells.ends_with_update = list(zip(sources, outs, strict=True)), ends_with_update
        cells.order[...] = gpu.asarray(order)
        weights, gradient = gpu.zeros((9000,), "float32"), gpu.zeros((9000,), "float32")
        gradient += 1.0
        expected = 0.0

        def run(number, first, prepared):
            nonlocal expected
            launched = len(getattr(gpu.xp, "launches", ()))
            cells.set_position(number, first, number + 1)
            assert gpu.name == "gpu" or ("begin_step" not in gpu.xp.launches[launched:]) == prepared
            rows = order[first : first + 4]
            np.testing.assert_array_equal(gpu.to_numpy(cells.indices)[: len(rows)], rows)
            for a, out in zip(arrays, outs, strict=True):
                np.testing.assert_array_equal(gpu.to_numpy(out)[: len(rows)], a[rows])
            cells.staged_sums[...] = gpu.asarray([[number], [number + 10], [number + 20]])
            with cells.step():
                update = ("sgd", [slice(0, 8999)], [], [weights, gradient], lambda step: (1.0, 0.0, -1.0 - step))
                assert gpu.whole_update(*update, number, None)
            expected += 1.0 + number if number else 0.0  # the numbers of the first step are not known before it
            np.testing.assert_array_equal(gpu.to_numpy(weights), [expected] * 8999 + [0.0])
            assert gpu.to_numpy(sums[:, number + 1]).tolist() == [number, number + 10, number + 20]

        run(0, 5, prepared=False)
        run(1, 0, prepared=False)
        run(2, 4, prepared=True)
        run(3, 8, prepared=True)  # only two samples are left
        run(4, 2, prepared=False)


def test_other_arrays_are_not_gathered_by_the_last_kernel(gpu):
    with gpu.device():
        for source, out in [("int16", "int32"), ("uint8", "float64"), ("float64", "float32")]:
            assert not gatherable(gpu.zeros((4, 3), source), gpu.zeros((2, 3), out))
        assert not gatherable(gpu.zeros((4, 3), "float32")[:, :2], gpu.zeros((2, 2), "float32"))
        assert not gatherable(gpu.zeros((4, 0), "float32"), gpu.zeros((2, 0), "float32"))


# After the run -------------------------------------------------------------------------------------------------------


class Counting(callbacks.Callback):
    """Records the number of live graphs and the memory that the device reports, at the end of each epoch."""

    def __init__(self, gpu):
        self.gpu, self.graphs, self.held, self.pools = gpu, [], [], []

    def on_epoch_end(self, model, epoch, logs):
        self.graphs.append(len(self.gpu.graphs))
        self.held.append(self.gpu.memory().held)
        self.pools.append(sum(graph.pool.total_bytes() for graph in self.gpu.graphs))


def test_the_memory_of_graphs_is_freed_after_the_run(gpu):
    count = Counting(gpu)
    fit(mlp(gpu), epochs=5, more=[count])
    assert count.graphs[-1] == 2 and count.pools[-1] > 0
    assert count.held[-1] >= count.pools[-1], "memory() must include the pools of graphs"
    assert len(gpu.graphs) == 0, "graphs must be freed although the callback still refers to the run"


@pytest.mark.sweep
def test_memory_does_not_grow_over_several_runs(gpu):
    model, used = mlp(gpu), []
    for _ in range(6):
        fit(model, epochs=3)
        gc.collect()  # a run and its callbacks refer to each other
        used.append(gpu.memory().used)
    assert used[-1] == used[1]


def test_a_graph_may_outlive_the_thread_that_captured_it(gpu):
    capture, graphs = gpu.graph_capture(), []
    with gpu.device():
        a, sums = gpu.asarray(np.ones((4096, 3), "float32")), gpu.zeros((3,), "float32")

    def make():
        graph = capture.graph()
        with capture.stream():
            with graph.memory_pool():
                gpu.sum_rows(a, sums)  # its blocks count themselves in memory of the thread
            graph.capture(lambda: gpu.sum_rows(a, sums))
        graphs.append(graph)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    gc.collect()
    with gpu.device():
        a *= 2.0
    with capture.stream():
        graphs[0].replay()
    np.testing.assert_array_equal(gpu.to_numpy(sums), 8192.0)


def test_a_failed_capture_keeps_no_memory(gpu, caplog):
    class ReadsTheDevice(layers.Layer):
        def forward(self, x):
            self.seen = float(x.sum())
            return x

        def backward(self, grad_y):
            return grad_y

    model = xpnet.Sequential([layers.Dense(8), ReadsTheDevice(), layers.Dense(10)], (64,), backend=gpu, seed=0)
    count = Counting(gpu)
    _, watch = fit(model, epochs=3, more=[count])
    assert watch.captured == 0 and count.graphs[-1] == 0


# Faults that the emulation must find ---------------------------------------------------------------------------------


def captured(gpu, work, pool=None):
    """A graph of this work, which allocates from the pool."""
    cupy = emulated_cupy(gpu)
    stream = cupy.cuda.get_current_stream()
    with cupy.cuda.using_allocator((pool or cupy.cuda.MemoryPool()).malloc):
        stream.begin_capture()
        work()
        return stream.end_capture()


def expect_fault(gpu, text):
    """Assert that the emulation has recorded one fault with this text, and remove it."""
    (fault,) = gpu.xp.faults
    assert text in fault
    gpu.xp.faults.clear()


def test_a_freed_block_is_poisoned_and_reused_by_the_next_allocation(gpu):
    cupy = emulated_cupy(gpu)
    with gpu.device():
        a = cupy.ones(1000, dtype="float32")
        view, address = a[10:20], a.data.ptr
        del a
        assert (gpu.to_numpy(view) == 1).all(), "a view must keep the memory alive"
        del view
        b = cupy.cuda.get_allocator()(4000)
        assert b.address == address
        assert np.isnan(np.asarray(b).view("float32")[:1000]).all()


def test_pools_do_not_share_memory(gpu):
    cupy = emulated_cupy(gpu)
    pool = cupy.cuda.MemoryPool()
    with gpu.device():
        with cupy.cuda.using_allocator(pool.malloc):
            first = cupy.ones(100, dtype="float64").data.ptr
        other = cupy.ones(100, dtype="float64")
        assert other.data.ptr != first
        with cupy.cuda.using_allocator(pool.malloc):
            assert cupy.ones(90, dtype="float64").data.ptr == first, "sizes must be rounded up to 512 bytes"
    assert pool.total_bytes() == 1024 and pool.used_bytes() == 0


def test_a_replay_after_memory_outside_the_pool_was_freed_is_a_fault(gpu):
    emulated_cupy(gpu)
    with gpu.stream():
        a = gpu.asarray(np.ones(5, "float32"))

        graph = captured(gpu, functools.partial(gpu.xp.add, a, 1, out=a))
        graph.launch()
        np.testing.assert_array_equal(gpu.to_numpy(a), 2)
        del a
        with pytest.raises(StrictError, match="memory was freed"):
            graph.launch()
    expect_fault(gpu, "memory was freed")


@pytest.mark.parametrize("freed", ["a temporary", "the pool"])
def test_an_allocation_of_memory_that_a_live_graph_uses_is_a_fault(gpu, freed):
    cupy = emulated_cupy(gpu)
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
            expect_fault(gpu, "live graph uses")
        else:
            del pool
            with pytest.raises(StrictError, match="memory was freed"):
                graph.launch()
            expect_fault(gpu, "memory was freed")


def test_the_memory_of_a_deleted_graph_can_be_allocated(gpu):
    cupy = emulated_cupy(gpu)
    pool = cupy.cuda.MemoryPool()
    with gpu.stream():
        a = gpu.asarray(np.ones(5, "float32"))
        graph = captured(gpu, lambda: a + 1, pool)
        del graph
        with cupy.cuda.using_allocator(pool.malloc):
            cupy.ones(5, dtype="float32")


def test_a_capture_from_the_default_pool_is_refused(gpu):
    cupy = emulated_cupy(gpu)
    with gpu.stream():
        a = gpu.asarray(np.ones(BATCH, "float32"))
        stream = cupy.cuda.get_current_stream()
        stream.begin_capture()
        with pytest.raises(StrictError, match="default pool"):
            a + 1
        stream.end_capture()
