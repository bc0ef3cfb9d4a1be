"""TracedGPU and CallList: what is recorded of a step on a GPU, and that the list computes the same on other data."""

import contextlib

import numpy as np
import pytest
from captured_trainings import IMAGES, X, cnn, fit, mlp
from traced_gpu_steps import captured_steps, listed

import xpnet
from xpnet import layers, optimizers
from xpnet.backends.cuda.cublas import HalfMatrix
from xpnet.backends.reference.windows import Windows
from xpnet.capture.calls import arrays_in, is_array
from xpnet.capture.gpu import CallList, TracedGPU, whole_operators
from xpnet.capture.passes import Memory
from xpnet.capture.trace import Trace
from xpnet.errors import CaptureError

WINDOWS = Windows((4, 4), (2, 2), (2, 2), (2, 2))
OVERLAPPING = Windows((4, 4), (3, 3), (2, 2))
KEY = (1, 2, 3)


def real(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype("float32")


def integers(count, below=3):
    return np.arange(count) % below


ZERO = np.zeros((), "float64")

ATTENTION = {**{name: real(2, 3, 2, 4) + i for i, name in enumerate("qkv")}, "scale": 0.5, "causal": True,
             "mask": np.arange(6).reshape(2, 3) != 4, "dropout": (KEY, 0.3, 1)}  # fmt: skip
STEPS = np.arange(8).reshape(4, 2) % 3 > 0

#: The arguments of each operator that is recorded as a whole.
EXAMPLES = {
    "add_arrays": {name: real(3, 4) for name in ("a", "b", "out")},
    "add_matmul": {"a": real(3, 4), "b": real(4, 5), "out": real(3, 5), "scratch": real(3, 5)},
    "add_rows_at": {"grad_rows": real(7, 5), "rows": integers(7), "out": real(4, 5)},
    "add_to_rows": {"a": real(3, 5), "row": real(5)},
    "add_to_rows_max_pool": {"x": real(2, 4, 4, 3), "row": real(3), "windows": WINDOWS, "relu": True,
                             "out": real(2, 2, 2, 3), "choice": np.zeros((2, 2, 2, 3), "uint8")},
    "add_to_rows_relu": {"a": real(3, 5), "row": real(5), "out": real(3, 5)},
    "attention": {**ATTENTION, "out": real(2, 3, 2, 4), "log_sums": real(2, 2, 3)},
    "attention_grad": {**ATTENTION, "out": real(2, 3, 2, 4), "log_sums": abs(real(2, 2, 3)),
                       **{name: real(2, 3, 2, 4) for name in ("grad", "grad_q", "grad_k", "grad_v")}},
    "batched_matmul": {"a": real(2, 3, 4), "b": real(2, 4, 5), "out": real(2, 3, 5)},
    "cast": {"a": real(3, 4)},
    "clip_norm": {"grads": real(8), "trained": [slice(0, 6)], "limit": 0.1},
    "col2im": {"patches": real(2, 2, 2, 2, 2, 3), "windows": WINDOWS, "out": real(2, 4, 4, 3)},
    "combine": {**{name: real(3, 5) for name in "gx"}, **{name: real(5) for name in ("a", "center", "b", "c")},
                "out": real(3, 5) + 1},
    "convolve": {"x": real(2, 4, 4, 4), "weight": real(16, 8), "bias": real(8), "windows": WINDOWS, "relu": True,
                 "out": real(2, 2, 2, 8)},
    "convolve_input_grad": {"grad": real(2, 3, 3, 8), "weight": real(16, 8), "windows": OVERLAPPING,
                            "out": real(2, 4, 4, 4), "y": abs(real(2, 4, 4, 4))},
    "convolve_weight_grad": {"x": real(2, 4, 4, 4), "grad": real(2, 2, 2, 8), "windows": WINDOWS, "out": real(16, 8),
                             "sums": real(8)},
    "count_correct": {"outputs": real(6, 3), "labels": integers(6)},
    "cross_entropy": {"logits": real(6, 3), "labels": integers(6), "smoothing": 0.1, "losses": real(6),
                      "grad": real(6, 3)},
    "cross_entropy_sums": {"logits": real(6, 3), "labels": integers(6), "smoothing": 0.1, "scale": 0.5,
                           "losses": real(6), "grad": real(6, 3), "loss_sum": ZERO, "correct": integers(2)},
    "dense_cross_entropy": {"h": real(6, 5), "weight": real(5, 3), "row": real(3), "labels": integers(6),
                            "smoothing": 0.1, "scale": 0.5, "losses": real(6), "grad": real(6, 3),
                            "correct": integers(2), "grad_h": real(6, 5) + 1, "masked": True},
    "dropout_mask": {"key": KEY, "rate": 0.5, "out": real(6, 3)},
    "elementwise": {"operations": [["multiply", real(5), 0.5], ["add", real(5), real(1)], ["sqrt", 4.0 + real(5)]],
                    "outs": [real(5) + 1, real(5) + 2, real(5) + 3]},
    "gather": {"a": real(6, 4), "rows": integers(3), "out": real(3, 4)},
    "gelu": {"x": real(3, 5), "out": real(3, 5), "slope": real(3, 5)},
    "gru": {"gates": real(4, 2, 9), "weight": real(3, 9), "bias": real(9), "mask": STEPS, "hidden": real(5, 2, 3),
            "inner": real(4, 2, 3)},
    "gru_grad": {"grad": real(4, 2, 3), "gates": real(4, 2, 9), "weight": real(3, 9), "mask": STEPS,
                 "hidden": real(5, 2, 3), "inner": real(4, 2, 3), "grad_gates": real(4, 2, 9),
                 "grad_products": real(4, 2, 9), "grad_hidden": real(2, 3)},
    "im2col": {"x": real(2, 4, 4, 3), "windows": WINDOWS, "out": real(2, 2, 2, 2, 2, 3)},
    "log_softmax": {"x": real(3, 5)},
    "lstm": {"gates": real(4, 2, 12), "weight": real(3, 12), "mask": STEPS, "hidden": real(5, 2, 3),
             "cells": real(5, 2, 3)},
    "lstm_grad": {"grad": real(4, 2, 3), "gates": real(4, 2, 12), "weight": real(3, 12), "mask": STEPS,
                  "cells": real(5, 2, 3), "grad_gates": real(4, 2, 12), "grad_hidden": real(2, 3),
                  "grad_cell": real(2, 3)},
    "matmul": {"a": real(3, 4), "b": real(4, 5), "out": real(3, 5)},
    "matmul_bias": {"a": real(3, 4), "b": real(4, 5), "row": real(5), "relu": True, "out": real(3, 5)},
    "matmul_relu_grad": {"a": real(3, 4), "b": real(4, 5), "y": real(3, 5), "out": real(3, 5) + 1},
    "matmul_sum_rows": {"a": real(3, 4), "b": real(4, 5), "out": real(3, 5), "sums": real(5)},
    "max_pool": {"x": real(2, 4, 4, 3), "windows": WINDOWS, "out": real(2, 2, 2, 3),
                 "choice": np.zeros((2, 2, 2, 3), "uint8")},
    "max_pool_grad": {"grad": real(2, 2, 2, 3), "choice": np.zeros((2, 2, 2, 3), "uint8"), "windows": WINDOWS,
                      "out": real(2, 4, 4, 3)},
    "moments": {"x": real(6, 3)},
    "multiply_arrays": {name: real(3, 4) for name in ("a", "b", "out")},
    "normalize_and_scale": {"x": real(3, 5), "centered": True, "epsilon": 1e-3, "gamma": real(5), "beta": real(5) + 1,
                            "normal": real(3, 5), "sigma": real(3, 1), "out": real(3, 5)},
    "normalize_and_scale_grad": {"grad": real(3, 5), "centered": True, "gamma": real(5), "normal": real(3, 5),
                                 "sigma": abs(real(3, 1)), "grad_gamma": real(5), "grad_beta": real(5),
                                 "out": real(3, 5)},
    "normalize_rows": {"x": real(3, 5), "epsilon": 1e-3, "out": real(3, 5), "sigma": real(3, 1)},
    "normalize_rows_grad": {"grad": real(3, 5), "normal": real(3, 5), "sigma": abs(real(3, 1)), "out": real(3, 5)},
    "random_bits": {"key": KEY, "rows": 3, "columns": 5},
    "relu": {"x": real(3, 5), "out": real(3, 5) + 1},
    "relu_grad": {"grad": real(3, 5), "y": real(3, 5), "out": real(3, 5)},
    "relu_grad_max_pool_grad": {"grad": real(2, 2, 2, 3), "y": real(2, 2, 2, 3),
                                "choice": np.zeros((2, 2, 2, 3), "uint8"), "windows": WINDOWS, "out": real(2, 4, 4, 3)},
    "relu_grad_sum_rows": {"grad": real(3, 5), "y": real(3, 5), "out": real(3, 5), "sums": real(5)},
    "rescale": {"x": real(3, 5), "scale": 2.0, "offset": 1.0, "out": real(3, 5)},
    "rnn": {"gates": real(4, 2, 3), "weight": real(3, 3), "mask": STEPS, "hidden": real(5, 2, 3)},
    "rnn_grad": {"grad": real(4, 2, 3), "weight": real(3, 3), "mask": STEPS, "hidden": real(5, 2, 3),
                 "grad_gates": real(4, 2, 3), "grad_hidden": real(2, 3)},
    "rotate_pairs": {"x": real(2, 3, 2, 4), "cosines": real(3, 2), "sines": real(3, 2), "out": real(2, 3, 2, 4) + 1},
    "scale_rows": {"x": real(3, 5), "epsilon": 1e-3, "out": real(3, 5), "sigma": real(3, 1)},
    "scale_rows_grad": {"grad": real(3, 5), "normal": real(3, 5), "sigma": abs(real(3, 1)), "out": real(3, 5)},
    "scale_shift_relu": {"x": real(3, 5), **{name: real(5) for name in ("center", "scale", "shift")},
                         "out": real(3, 5)},
    "scale_shift": {"x": real(3, 5), **{name: real(5) for name in ("center", "scale", "shift")}, "out": real(3, 5)},
    "sigmoid": {"x": real(3, 5)},
    "softmax": {"x": real(3, 5), "out": real(3, 5)},
    "softplus": {"x": real(3, 5), "out": real(3, 5)},
    "sum_pool": {"x": real(2, 4, 4, 3), "windows": WINDOWS, "out": real(2, 2, 2, 3)},
    "sum_pool_grad": {"grad": real(2, 2, 2, 3), "windows": WINDOWS, "out": real(2, 4, 4, 3)},
    "sum_products": {"a": real(3, 5), "b": real(3, 5), "center": real(5), "out": real(5)},
    "sum_rows_and_products": {"a": real(3, 5), "b": real(3, 5),
                              **{name: real(5) for name in ("center", "sums", "products")}},
    "sum_rows": {"a": real(3, 5), "out": real(5)},
    "sum_to": {"x": real(5), "out": ZERO},
    "whole_update": {"name": "sgd", "trained": [slice(0, 8)], "decayed": [], "vectors": [real(8), real(8) + 1],
                     "numbers": lambda step: (1.0, 0.0, 0.1), "step": 0, "gate": None},
}  # fmt: skip


def test_every_operator_of_the_gpu_has_an_example(gpu):
    assert set(whole_operators(type(gpu))) == set(EXAMPLES)


def on_device(gpu, value):
    if isinstance(value, np.ndarray):
        return gpu.asarray(value.copy())
    return [on_device(gpu, item) for item in value] if isinstance(value, list) else value


def wrapped(trace, value):
    if is_array(value):
        return trace.wrap(value, writable=True)
    return [wrapped(trace, item) for item in value] if isinstance(value, list) else value


def on_host(gpu, value):
    """Copies of the arrays in a value."""
    return [gpu.to_numpy(a).copy() for a in arrays_in(list(value.values()) if isinstance(value, dict) else value)]


def context(gpu, name):
    return gpu.matmul_precision("float16") if name == "cast" else contextlib.nullcontext()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_operator_is_one_call_that_declares_what_it_reads_and_writes(gpu, name):
    with gpu.device(), context(gpu, name):
        given = {key: on_device(gpu, value) for key, value in EXAMPLES[name].items()}
        trace = Trace(gpu.xp)
        traced = {key: wrapped(trace, value) for key, value in given.items()}
        before = on_host(gpu, given)
        getattr(TracedGPU(gpu, trace), name)(**traced)
        trace.stop()
        (call,) = trace.calls
        writes, reads = (set(map(id, arrays)) for arrays in (call.writes, call.reads))
        arrays = list(arrays_in(list(given.values())))
        for array, old, new in zip(arrays, before, on_host(gpu, given), strict=True):
            assert id(array) in writes | reads
            assert id(array) in writes or (old == new).all(), "an array that the operator writes is not declared"
        results = on_host(gpu, [call.writes])
        # The old contents of what is only written must not matter.
        for array, old in zip(arrays, before, strict=True):
            array[...] = gpu.asarray(old if id(array) in reads else np.zeros_like(old) + 77)
        again = [a for a in arrays_in(getattr(gpu, name)(**given)) if id(a) not in map(id, arrays)]
        written = [a for a in call.writes if id(a) in map(id, arrays)]
        for want, got in zip(results, on_host(gpu, [(*written, *again)]), strict=True):
            np.testing.assert_array_equal(got, want)


# Lists of calls ------------------------------------------------------------------------------------------------------


def uses_new_arrays(backend, x, out):
    xp = backend.xp
    mean, variance = backend.moments(x)
    y = xp.where(x > mean, x * variance, xp.concatenate([x[1:], x[:1]]))
    y += xp.arange(x.shape[1], dtype="float32")  # a constant
    half = xp.zeros(x.shape, dtype="float32")
    half[1:] = y[1:] * 0.5
    backend.softmax(half, out=half)
    xp.sum(half * y, axis=0, out=out[0])
    out[1] = xp.max(y, axis=0) - y.mean()
    out[2] = x[xp.argmax(x, axis=0), xp.arange(x.shape[1])]


def uses_half_precision(backend, x, out):
    half = backend.cast(x)
    assert isinstance(half, HalfMatrix)
    product = backend.empty((x.shape[1], x.shape[1]), "float32")
    backend.matmul(half.T, half, out=product)
    out[...] = product[: len(out)]


@pytest.mark.parametrize("work", [uses_new_arrays, uses_half_precision], ids=lambda work: work.__name__)
def test_a_list_computes_the_same_on_other_data(gpu, rng, work):
    first, second = (rng.normal(size=(6, 5)).astype("float32") for _ in range(2))
    with gpu.device(), gpu.matmul_precision("float16"):
        x, out = gpu.asarray(first), gpu.zeros((3, 5), "float32")
        calls = listed(gpu, work, x, out)
        x[...] = gpu.asarray(second)
        out[...] = 7.0
        for _ in range(2):
            calls()
            got, want = gpu.to_numpy(out), gpu.zeros((3, 5), "float32")
            work(gpu, x, want)
            np.testing.assert_array_equal(got, gpu.to_numpy(want))


def test_constants_are_not_computed_again(gpu):
    def work(backend, x):
        x += backend.xp.exp(backend.xp.arange(3, dtype="float32"))

    with gpu.device():
        calls = listed(gpu, work, gpu.zeros((3,), "float32"))
    assert [call.name for call in calls.calls] == [gpu.xp.add.__name__]


def test_temporary_arrays_share_memory(gpu):
    def work(backend, x, y):
        for _ in range(10):
            x = backend.relu(x, out=backend.empty(x.shape, "float32"))
        y[...] = x

    with gpu.device():
        calls = listed(gpu, work, gpu.zeros((64,), "float32"), gpu.zeros((64,), "float32"))
    assert len(calls.calls) == 10  # without the copy
    assert calls.arena.size == 2 * 64 * 4


def test_noise_is_not_a_constant(gpu):
    """The words of the step come from cells, which each replay fills."""
    with gpu.device():
        mask = gpu.zeros((4, 3), "float32")
        trace = Trace(gpu.xp)
        backend = TracedGPU(gpu, trace)
        step = xpnet.capture.device.StepPosition(xpnet.backends.step_numbers.StepNumber(lambda step: step, 3))
        trace.wrap(mask, writable=True)[...] = backend.random_bits((1, 2, step), 4, 3)
        trace.stop()
        calls = CallList(trace, gpu)
        assert calls.calls[0].name == "_noise"
        calls()
        np.testing.assert_array_equal(gpu.to_numpy(mask), gpu.to_numpy(gpu.random_bits((1, 2, 3), 4, 3)).astype("f"))


def reads(backend, x):
    float(x.sum())


def uploads(backend, x):
    x += backend.asarray(np.ones(3, "float32"))


def uploads_a_list(backend, x):
    x += backend.xp.asarray([1.0, 2.0, 3.0])


def selects(backend, x):
    return x[x > 0]


def to_the_host(backend, x):
    backend.to_numpy(x)


@pytest.mark.parametrize("work", [reads, uploads, uploads_a_list, selects, to_the_host], ids=lambda work: work.__name__)
def test_what_a_list_cannot_contain_raises(gpu, work):
    with gpu.device(), pytest.raises(CaptureError):
        listed(gpu, work, gpu.zeros((3,), "float32"))


def test_an_array_of_a_layer_is_not_written(gpu):
    with gpu.device():
        own = gpu.zeros((3,), "float32")

        def work(backend, x):
            backend.relu(x, out=own)

        with pytest.raises(CaptureError, match="neither the model's nor made by"):
            listed(gpu, work, gpu.zeros((3,), "float32"))


# Steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "x"), [(mlp, X), (cnn, IMAGES)], ids=["mlp", "cnn"])
def test_the_operators_of_a_step_are_listed(gpu, build, x):
    for step in captured_steps(build(gpu), x):
        assert step.calls is not None


class KeepsAnArray(layers.Layer):
    """Counts its passes in an array of its own, which a list of calls must not write."""

    def build(self, input_shape):
        self.passes = self.backend.zeros((1,), "float32")
        return input_shape

    def forward(self, x):
        self.passes += 1.0
        return x + 0.0 * self.passes

    def backward(self, grad_y):
        return grad_y


def test_a_step_that_cannot_be_listed_is_captured_as_it_runs(gpu):
    model = xpnet.Sequential([layers.Dense(8), KeepsAnArray(), layers.Dense(10)], (64,), backend=gpu, seed=0)
    for step in captured_steps(model):
        assert step.calls is None


class Signs(optimizers.SGD):
    """An optimizer that only its formula computes, which no graph can contain."""

    def update(self, xp, w, g, slots, t, rate, k):
        w -= rate * k * xp.sign(g)


def test_a_list_that_cannot_be_captured_does_not_change_the_training(gpu, monkeypatch):
    weights = []
    for capture in ("1", "0"):
        monkeypatch.setenv("XPNET_CAPTURE", capture)
        model = mlp(gpu)
        _, watch = fit(model, optimizer=Signs(1e-4))
        assert watch.captured == 0
        weights.append(model.state_dict()["0.weight"])
    np.testing.assert_array_equal(*weights)


def test_the_memory_plan_of_a_step_is_smaller_than_its_arrays(gpu):
    (step, *_) = captured_steps(cnn(gpu), IMAGES)
    arrays = {id(a.data.mem): a.nbytes for call in step.calls.calls for a in call.writes}
    assert step.calls.arena.nbytes > 0 and len(arrays) > 1


def test_views_have_the_owner_of_their_memory(gpu):
    with gpu.device():
        trace = Trace(gpu.xp)
        a = trace.own(gpu.zeros((4, 6), "float32"))
        memory = Memory(trace)
        view, other = a[1:, ::2].T.values, gpu.zeros((4, 6), "float32")
        assert memory.owner(view) == memory.owner(a.values) != memory.owner(other)
        assert memory.temporary(view) and not memory.temporary(other)
        assert memory.overlap(view, a[2].values) and not memory.overlap(view, a[0].values)
