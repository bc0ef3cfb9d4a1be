"""explain_step and summary(batch_size=): the calls of a step, what they cost, and that the model stays as it was."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from captured_trainings import Own

import xpnet
from xpnet import errors, layers, losses, optimizers
from xpnet.training import explanation

X, Y = np.random.default_rng(0).normal(size=(96, 6)).astype("float32"), np.arange(96) % 3


def net(*stack, shape=(6,), **options):
    return xpnet.Sequential(stack, shape, backend="cpu", seed=1, **options)


def mlp():
    return net(layers.Dense(8), layers.ReLU(), layers.Dropout(0.2), layers.BatchNorm(), layers.Dense(3))


def test_the_calls_of_a_dense_net_have_their_places_shapes_and_operations():
    explained = xpnet.explain_step(net(layers.Dense(8), layers.ReLU(), layers.Dense(3)), 32)
    products = [call for call in explained.replayed if call.operator == "matmul"]
    assert [call.place for call in products] == [
        *["0 Dense.forward", "2 Dense.forward"],
        *["2 Dense.backward", "2 Dense.backward", "0 Dense.backward"],
    ]
    assert products[0].shapes == "32×6 6×8 → 32×8"
    assert products[0].operations == 2 * 32 * 6 * 8
    assert products[0].bytes == 4 * (32 * 6 + 6 * 8 + 32 * 8)
    assert {call.place for call in explained.recorded} >= {"inputs", "loss", "metrics", "update", "1 ReLU.forward"}
    assert len(explained.replayed) <= len(explained.recorded)
    assert 0 < explained.shared_bytes < explained.temporary_bytes


def test_the_text_shows_both_lists_and_the_memory_and_notebooks_get_a_table():
    explained = xpnet.explain_step(mlp(), 16)
    assert explained.startswith(f"Recorded: {len(explained.recorded)} calls")
    assert f"\nReplayed: {len(explained.replayed)} calls" in explained
    assert "memory of a training step" in explained and "µs" not in explained
    assert "<table>" in explained._repr_html_() and "A step of 16 samples" in explained.html
    assert repr(explained) == str(explained)


def test_calls_are_measured_on_request():
    model = mlp()
    before = model.state_dict()
    explained = xpnet.explain_step(model, 16, times=True)
    assert all(call.seconds > 0 for call in explained.replayed) and "µs" in explained
    assert all(call.seconds is None for call in explained.recorded)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


@pytest.mark.parametrize(
    ("inner", "steps"),
    [
        ([layers.PositionalEmbedding(9), layers.TransformerBlock(2)], 9),
        ([layers.MaxPool1D(2), layers.LSTM(4)], 32),
        ([layers.GlobalMaxPool1D()], 32),
    ],
    ids=["positions", "downsampling", "one output"],
)
def test_sequences_of_open_length_have_as_many_steps_as_the_model_takes(inner, steps):
    model = net(layers.Embedding(7, 4), *inner, layers.Dense(7), shape=(None,))
    explained = xpnet.explain_step(model, 8, loss="softmax_cross_entropy")
    (load,) = [call for call in explained.recorded if call.name == "load x"]
    assert load.shapes.split()[-1] == f"8×{steps}"
    assert "memory of a training step: not known" not in model.summary(batch_size=8)


def test_an_explanation_leaves_the_training_as_it_was():
    def trained(explain):
        model = mlp()
        for _ in range(2):
            model.fit(X, Y, epochs=2, batch_size=16, optimizer="adam", verbose=0)
            if explain:
                xpnet.explain_step(model, 16, times=True)
                model.summary(batch_size=16)
        outputs = model.forward(X[:4], training=True)  # whose noise depends on the number of passes
        return {**model.state_dict(), "outputs": outputs}

    plain, explained = trained(explain=False), trained(explain=True)
    for name, value in plain.items():
        np.testing.assert_array_equal(explained[name], value, err_msg=name)


def test_loss_optimizer_and_metrics_are_those_of_the_latest_fit_or_the_given_ones():
    model = net(layers.Dense(3))
    assert not any(call.name == "sqrt" for call in xpnet.explain_step(model, 8).replayed)
    model.fit(X, np.eye(3)[Y], loss="mse", optimizer="adam", metrics=["mae"], verbose=0)
    latest = xpnet.explain_step(model, 8).replayed
    assert any(call.name == "sqrt" for call in latest) and not any(call.operator == "cross_entropy" for call in latest)
    assert any(call.place == "metrics" and call.name == "absolute" for call in latest)
    given = xpnet.explain_step(
        model, 8, loss=losses.SoftmaxCrossEntropy(), optimizer=optimizers.SGD(0.1), metrics=["accuracy"]
    ).replayed
    assert any(call.operator == "cross_entropy" for call in given) and not any(call.name == "sqrt" for call in given)


@pytest.mark.parametrize("stack", [
    (layers.Dense(1),), (layers.Dense(2), layers.Softmax()), (layers.Dense(4), layers.Reshape((2, 2))),
], ids=["one output", "probabilities", "a matrix"])  # fmt: skip
def test_before_any_fit_the_loss_fits_the_outputs(stack):
    operators = {call.operator for call in xpnet.explain_step(net(*stack), 8).replayed}
    assert "cross_entropy" not in operators


def test_a_layer_that_takes_integers_gets_integers():
    model = xpnet.Sequential([layers.Embedding(10, 4), layers.Flatten(), layers.Dense(2)], (5,), backend="cpu")
    assert any(call.operator == "gather" for call in xpnet.explain_step(model, 8).replayed)


def test_the_summary_tells_the_memory_of_a_step_and_more_samples_need_more():
    model = mlp()
    assert "memory" not in model.summary()

    def size(samples):
        line = model.summary(batch_size=samples).splitlines()[-1]
        assert line.startswith("memory of a training step: ")
        return float(line.split()[5]) * {"KiB": 1, "MiB": 1024}[line.split()[6].rstrip(":")]

    assert size(32) < size(512) / 3


def test_a_model_that_runs_eagerly_says_why():
    class Reads(layers.Layer):
        def forward(self, x):
            return x * float(x.max() >= 0.0)

        def backward(self, grad_y):
            return grad_y

    model = net(layers.Dense(4), Reads(), layers.Dense(3))
    with pytest.raises(errors.CaptureError, match="^the step reads values on the host$"):
        xpnet.explain_step(model)
    assert model.summary(batch_size=4).endswith(
        "memory of a training step: not known, because the step reads values on the host"
    )


EXPLAIN = {
    "explain_step": lambda model: xpnet.explain_step(model, 8),
    "summary": lambda model: model.summary(batch_size=8),
}


@pytest.mark.parametrize("explain", EXPLAIN.values(), ids=EXPLAIN.keys())
def test_no_backward_follows_an_explanation_whose_steps_have_overwritten_the_workspaces(explain):
    model = net(layers.Dense(8), layers.Tanh(), layers.Dense(3))
    model.forward(X[:8], training=True)
    explain(model)
    with pytest.raises(errors.StateError, match="backward needs a forward pass before it"):
        model.backward(np.ones((8, 3), "float32"))


@pytest.mark.parametrize("explain", EXPLAIN.values(), ids=EXPLAIN.keys())
def test_the_noise_of_passes_by_hand_is_that_without_an_explanation(explain):
    outputs = []
    for between in (lambda _: None, explain):
        model = mlp()
        model.forward(X[:8], training=True)
        between(model)
        outputs.append(model.forward(X[:8], training=True))
    np.testing.assert_array_equal(*outputs)


def test_an_explanation_frees_its_memory():
    model = mlp()
    xpnet.explain_step(model, 4096)
    assert not any(work.nbytes for layer in model.layers for work in layer._workspaces.values())


def test_a_failure_while_calls_are_measured_leaves_the_model_as_it_was(monkeypatch):
    times = iter(range(301))  # of several replays, each of fewer than 50 calls
    monkeypatch.setattr(explanation, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    model = mlp()
    before = model.state_dict()
    with pytest.raises(StopIteration):
        xpnet.explain_step(model, 8, times=True)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_calls_are_measured_while_other_threads_wait(monkeypatch):
    model, held = mlp(), []
    measured = explanation._seconds

    def seconds(plan, step):
        held.append(model.context.guard.lock._is_owned())
        return measured(plan, step)

    monkeypatch.setattr(explanation, "_seconds", seconds)
    xpnet.explain_step(model, 8, times=True)
    assert held == [True]


def test_an_explanation_undoes_what_custom_layers_change():
    class Counting(Own):
        count = 0

        def factor(self, x):
            self.count += 1
            return 1.0

    counting = Counting()
    model = net(layers.Dense(4), counting, layers.Dense(3))
    model.predict(X[:1])
    before = counting.count
    with pytest.raises(errors.CaptureError, match="each step changes the attribute 'count'"):
        xpnet.explain_step(model, 8)
    assert counting.count == before


def test_an_error_of_any_kind_is_a_reason():
    class Checking(Own):
        def factor(self, x):
            if type(x) is not np.ndarray:
                raise TypeError("x is not an array of NumPy")
            return 1.0

    class Refusing(Own):
        def factor(self, x):
            if not self.backend.to_numpy(x).any():
                raise ValueError("x is 0")
            return 1.0

    for layer, reason in ((Checking(), "TypeError: x is not an array"), (Refusing(), "ValueError: x is 0")):
        model = net(layer, layers.Dense(3))
        with pytest.raises(errors.CaptureError, match=f"^{reason}"):
            xpnet.explain_step(model, 8)
        line = model.summary(batch_size=8).splitlines()[-1]
        assert re.match(f"memory of a training step: not known, because {reason}", line)


@pytest.mark.filterwarnings("error")
def test_numbers_may_overflow_as_in_a_training():
    class Dividing(Own):
        def factor(self, x):
            return self.xp.where(x != 0, abs(x) / x, 1.0).astype(x.dtype)

    class Guarded(Dividing):
        def factor(self, x):
            with np.errstate(divide="ignore", invalid="ignore"):
                return super().factor(x)

    for layer in (Dividing(), Guarded()):
        calls = xpnet.explain_step(net(layer, layers.Dense(3)), 8).replayed
        assert any(call.place == f"0 {type(layer).__name__}.forward" for call in calls)


@pytest.mark.parametrize("batch_size", [0, -3, 2.5, "32", None])
def test_a_wrong_batch_size_is_refused(batch_size):
    with pytest.raises(errors.ArgumentError, match="batch_size"):
        xpnet.explain_step(mlp(), batch_size)
    if batch_size is not None:
        with pytest.raises(errors.ArgumentError, match="batch_size"):
            mlp().summary(batch_size=batch_size)


def test_a_model_that_is_not_built_is_refused():
    model = xpnet.Sequential([layers.Dense(2)], backend="cpu")
    for call in (lambda: xpnet.explain_step(model), lambda: model.summary(batch_size=8)):
        with pytest.raises(errors.StateError, match="not built yet"):
            call()


def test_a_step_on_a_gpu_is_a_list_of_operators(gpu):
    model = xpnet.Sequential([layers.Dense(8), layers.ReLU(), layers.Dense(3)], (6,), backend=gpu, seed=1)
    before = model.state_dict()
    explained = xpnet.explain_step(model, 32)
    assert sum(call.operator.startswith("matmul") for call in explained.replayed) == 3
    assert {"matmul_bias", "dense_cross_entropy", "whole_update"} <= {call.name for call in explained.replayed}
    assert len(explained.replayed) < len(explained.recorded)
    assert "memory of a training step" in model.summary(batch_size=32)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_calls_of_a_step_on_a_gpu_are_measured(gpu, monkeypatch, optimizer):
    monkeypatch.setattr(explanation, "_REPEATED", 2)
    stack = [layers.Conv2D(4, 3), layers.BatchNorm(), layers.ReLU(), layers.Flatten(), layers.Dropout(0.3)]
    model = xpnet.Sequential([*stack, layers.Dense(3)], (6, 6, 1), backend=gpu, seed=1)
    before = model.state_dict()
    explained = xpnet.explain_step(model, 32, optimizer=optimizer, times=True)
    assert all(call.seconds > 0 for call in explained.replayed) and "µs" in explained
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
