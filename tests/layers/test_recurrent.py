"""Recurrent layers: their formulas, masks, order of steps, states, initial values, and captured training."""

import numpy as np
import pytest
from captured_trainings import fit
from small_models import assert_same_state

import xpnet
from xpnet import layers
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError
from xpnet.initializers import ForgetGate
from xpnet.layers.past import Continuation
from xpnet.training import captured_step

N, T, F, UNITS = 4, 5, 3, 2
LENGTHS = np.array([5, 2, 0, 3])  # one sample without any step
STEPS = np.arange(T) < LENGTHS[:, None]
KINDS = [layers.SimpleRNN, layers.LSTM, layers.GRU]


def sigmoid(a):
    return 1.0 / (1.0 + np.exp(-a))


def step_of(layer, x, state):
    """(h, c) after one step of one sample, from (h, c) before it; c is 0 but for an LSTM."""
    h, c = state
    a, p = x @ layer.weight.value + layer.bias.value, h @ layer.recurrent_weight.value
    match layer:
        case layers.SimpleRNN():
            return np.tanh(a + p), c
        case layers.LSTM():
            i, f, g, o = np.split(a + p, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            return sigmoid(o) * np.tanh(c), c
        case layers.GRU():
            (a_r, a_z, a_n), (p_r, p_z, p_n) = np.split(a, 3), np.split(p + layer.recurrent_bias.value, 3)
            z = sigmoid(a_z + p_z)
            return (1 - z) * np.tanh(a_n + sigmoid(a_r + p_r) * p_n) + z * h, c


def expected(layer, x, steps):
    """The states after each step, 0 where a step does not count, and the last states."""
    y, last = np.zeros((len(x), x.shape[1], layer.units)), []
    for n, sample in enumerate(x):
        state = np.zeros(layer.units), np.zeros(layer.units)
        for t in reversed(range(len(sample))) if layer.reverse else range(len(sample)):
            if steps[n, t]:
                state = step_of(layer, sample[t], state)
                y[n, t] = state[0]
        last.append(state[0])
    return y, np.array(last)


def model_of(layer, backend="cpu", shape=(None, F), masked=False, dtype="float64"):
    stack = [layers.Masking(0.0), layer] if masked else [layer]
    return xpnet.Sequential(stack, shape, backend, seed=0, dtype=dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_formulas_step_by_step(backend, rng, kind, reverse, masked):
    steps = STEPS if masked else np.ones((N, T), bool)
    x = rng.normal(size=(N, T, F)) * steps[..., None]
    whole = model_of(kind(UNITS, reverse=reverse, bias_initializer="normal"), backend, masked=masked)
    last = model_of(kind(UNITS, reverse=reverse, return_sequences=False), backend, masked=masked)
    last.load_state_dict(whole.state_dict())
    on_host = model_of(kind(UNITS, reverse=reverse), masked=masked)
    on_host.load_state_dict(whole.state_dict())
    y, final = expected(on_host.layers[-1], x, steps)
    np.testing.assert_allclose(whole.predict(x), y, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(last.predict(x), final, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(whole.predict(x[:1, :1]), y[:1, :1] if not reverse else whole.predict(x[:1, :1]))


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_masks_equal_finite_differences(rng, kind, sequences):
    steps = STEPS.copy()
    steps[0, 1] = False  # in the middle
    x = rng.normal(size=(N, T, F)) * steps[..., None]
    layer = layers.Bidirectional(kind(UNITS, return_sequences=sequences))
    model = model_of(layer, masked=True)
    y = rng.normal(size=(N, T, 2 * UNITS) if sequences else (N, 2 * UNITS))
    assert max(xpnet.check_gradients(model, x, y).values()) < 1e-6
    model.forward(x)
    grad_x = model.backward(y)
    assert (grad_x[~steps] == 0).all()
    assert (grad_x[steps] != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_can_be_read_in_parts(backend, rng, kind):
    layer = kind(UNITS)
    layer.build((None, F), backend=backend, seed=0, dtype="float64")
    x = backend.asarray(rng.normal(size=(N, T, F)))
    whole = backend.to_numpy(layer.forward(x)).copy()
    layer.context.continuation = Continuation(backend, T)
    parts = [backend.to_numpy(layer.forward(part)).copy() for part in (x[:, :2], x[:, 2:3], x[:, 3:])]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-13)
    other = kind(UNITS, reverse=True)
    other.build((None, F), backend=backend, seed=0)
    assert layer.causal and not other.causal


def test_bidirectional_joins_a_layer_and_its_copy_that_reads_backward(rng):
    x = rng.normal(size=(N, T, F))
    both = model_of(layers.Bidirectional(layers.GRU(UNITS), name="both"))
    names = ["weight", "recurrent_weight", "bias", "recurrent_bias"]
    assert [p.name for p in both.parameters] == [f"both.{way}.{n}" for way in ("forward", "backward") for n in names]
    halves = []
    for way in ("forward", "backward"):
        one = model_of(layers.GRU(UNITS, reverse=way == "backward", name="one"))
        one.load_state_dict({f"one.{n}": both.state_dict()[f"both.{way}.{n}"] for n in names})
        halves.append(one.predict(x))
    np.testing.assert_array_equal(both.predict(x), np.concatenate(halves, axis=-1))
    assert repr(layers.Bidirectional(layers.GRU(2))) == "Bidirectional(GRU(2))"


def test_what_is_not_a_sequence_or_not_recurrent_is_refused():
    with pytest.raises(ShapeError, match=r"LSTM.*expects sequences \(N, T, features\), but the input is \(N, 3\)"):
        model_of(layers.LSTM(2), shape=(3,))
    with pytest.raises(ArgumentTypeError, match="Bidirectional: layer must be a recurrent layer"):
        layers.Bidirectional(layers.Dense(2))
    with pytest.raises(ArgumentError, match="Bidirectional: layer must read forward: leave out reverse=True"):
        layers.Bidirectional(layers.LSTM(2, reverse=True))
    with pytest.raises(ShapeError, match=r"ForgetGate: is for the bias of an LSTM, \(4 · units,\)"):
        model_of(layers.GRU(2, bias_initializer=ForgetGate()))


def test_initial_states_are_remembered_and_recurrent_weights_orthonormal():
    layer = model_of(layers.LSTM(3)).layers[0]
    np.testing.assert_array_equal(layer.bias.value, [0] * 3 + [1] * 3 + [0] * 6)
    rows = layer.recurrent_weight.value
    np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_and_continued_runs_train_alike_bit_for_bit(monkeypatch, rng, kind):
    """Steps of 8 samples and a last one of 4, on layers large enough for compiled loops and threads."""
    monkeypatch.setattr(captured_step, "_FEW_STEPS", 1)
    x = rng.normal(size=(20, T, F)).astype("float32") * (rng.integers(1, T + 1, 20)[:, None] > np.arange(T))[..., None]
    y = rng.integers(0, 3, 20)

    def trained(capture, *fits):
        monkeypatch.setenv("XPNET_CAPTURE", capture)
        stack = [layers.Masking(0.0), kind(96), layers.Bidirectional(kind(5, return_sequences=False)), layers.Dense(3)]
        model = xpnet.Sequential(stack, (None, F), "cpu", seed=0)
        for epochs in fits:
            _, watch = fit(model, x, y, epochs=epochs, batch_size=8, loss="softmax_cross_entropy")
        assert (watch.captured > 0) is (capture == "1"), watch.fallback_reason
        return model.state_dict()

    eager = trained("0", 5)
    assert_same_state(trained("1", 5), eager)
    assert_same_state(trained("0", 2, 3), eager)
