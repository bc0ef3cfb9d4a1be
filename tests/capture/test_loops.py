"""Fused loops of the CPU: the same bits as the calls that they replace, and the cases in which these stay."""

import numpy as np
import pytest
from blas import blas_threads

import xpnet
from xpnet import layers, losses
from xpnet.backends.cpu.operators import compiled_loops
from xpnet.capture.array_module import TracedModule
from xpnet.capture.loops import with_fused_loops
from xpnet.capture.passes import Memory
from xpnet.capture.program import compiled
from xpnet.capture.trace import Trace

LOOPS = compiled_loops()
pytestmark = pytest.mark.skipif(LOOPS is None, reason="Numba is not installed")


def fused_calls(trace):
    return with_fused_loops(trace.calls, Memory(trace), LOOPS)


def names(calls):
    return [call.name for call in calls]


def replayed(calls):
    compiled(calls)(0, None, *[None] * 4)


@pytest.fixture
def trace():
    made = Trace(np)
    TracedModule(made)  # which the arrays of the trace use
    return made


def bias_and_relu(trace, between=lambda a: None, after=lambda a: None, own=True):
    """The trace of add_to_rows(a, row); relu(a, out), and (row, a, out)."""
    rng = np.random.default_rng(0)
    a = (trace.own if own else lambda x: trace.wrap(x, writable=True))(np.zeros((6, 4), "float32"))
    row, out = trace.wrap(rng.normal(size=4).astype("float32")), trace.own(np.empty((6, 4), "float32"))
    result = trace.wrap(np.zeros((6, 4), "float32"), writable=True)
    trace.write(a.values, trace.wrap(rng.normal(size=(6, 4)).astype("float32")))
    trace.operator(LOOPS.add_to_rows, (a, row), {}, ("a",))
    between(a)
    trace.operator(LOOPS.relu, (a, out), {}, ("out",))
    trace.write(result.values, out)
    after(a)
    return result.values


def test_bias_and_relu_are_one_loop_with_the_same_bits(trace):
    result = bias_and_relu(trace)
    want = result.copy()
    result.fill(7)
    calls = fused_calls(trace)
    assert names(calls) == ["copyto", "add_to_rows_relu", "copyto"]
    replayed(calls)
    np.testing.assert_array_equal(result, want)


@pytest.mark.parametrize("options", [
    {"after": lambda a: a.sum()}, {"between": lambda a: a.fill(1.0)}, {"own": False},
], ids=["a is read later", "a changes in between", "a is the model's"])  # fmt: skip
def test_bias_and_relu_stay_two_loops_if_something_else_needs_the_sum(trace, options):
    bias_and_relu(trace, **options)
    assert {"add_to_rows", "relu"} <= set(names(fused_calls(trace)))


def step(metrics, loss=None, hidden=512, **options):
    """The calls of a step of a net that is large enough for compiled loops."""
    model = xpnet.Sequential([layers.Dense(hidden), layers.ReLU(), layers.Dense(10)], (64,), backend="cpu", **options)
    return xpnet.explain_step(model, 32, loss=loss, metrics=metrics).replayed


def test_the_loss_its_factor_its_sum_and_the_accuracy_are_one_call():
    with blas_threads(1):
        calls = step(["accuracy"])
    operators = [call.operator for call in calls]
    assert operators.count("cross_entropy_sums") == 1 and operators.count("add_to_rows_relu") == 1
    assert not {"cross_entropy", "count_correct", "sum_to"} & set(operators)


@pytest.mark.parametrize(("metrics", "whole"), [
    ([], False), (["log_loss"], False), (["accuracy", "top_k_accuracy"], True),
], ids=["no metrics", "another metric", "two metrics"])  # fmt: skip
def test_without_the_accuracy_only_the_factor_joins_the_loss(metrics, whole):
    calls = step(metrics)
    operators = [call.operator for call in calls]
    assert ("cross_entropy_sums" in operators) == whole and ("sum_to" in operators) != whole
    assert not any(call.place == "loss" and call.name == "multiply" for call in calls)


def test_another_loss_stays_as_it_is():
    calls = step(["mae"], losses.MeanSquaredError())
    assert any(call.place == "loss" and call.name == "multiply" for call in calls)
    assert "cross_entropy_sums" not in {call.operator for call in calls}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_training_with_fused_loops_has_the_bits_of_an_eager_one(monkeypatch, dtype, smoothing, threads):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(200, 64)), rng.integers(10, size=200)

    def trained():
        stack = [layers.Dense(512), layers.ReLU(), layers.Dense(10)]
        model = xpnet.Sequential(stack, (64,), backend="cpu", seed=2, dtype=dtype)
        loss = losses.SoftmaxCrossEntropy(label_smoothing=smoothing)
        with blas_threads(threads):
            history = model.fit(x, y, loss=loss, epochs=20, batch_size=32, metrics=["accuracy"], verbose=0)
        return model.state_dict(), dict(history)

    captured = trained()
    monkeypatch.setenv("XPNET_CAPTURE", "0")
    eager = trained()
    assert captured[1] == eager[1]
    for name, value in eager[0].items():
        np.testing.assert_array_equal(captured[0][name], value, err_msg=name)
