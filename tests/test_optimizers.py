"""Optimizers against loops written from the papers, one number at a time, in float64."""

import copy
import math

import every
import numpy as np
import pytest
from names import missing_classes
from small_models import LABELS, QUIET, SAMPLES, Do, assert_same_state, dense_net, small_net

import xpnet
from xpnet import layers, losses, optimizers
from xpnet.backends import Backend
from xpnet.errors import ArgumentError, ArgumentTypeError, XpnetError

RATE = 0.05


# The formulas of the papers. Each takes all gradients of one parameter and yields its value after each step.


def sgd(w, gradients, momentum=0.0, nesterov=False):
    v = np.zeros_like(w)
    for g in gradients:
        v = momentum * v + g
        w = w - RATE * (g + momentum * v if nesterov else v)
        yield w


def adagrad(w, gradients, epsilon=1e-10):
    for t in range(len(gradients)):
        total = sum(g**2 for g in gradients[: t + 1])
        w = w - RATE * gradients[t] / (np.sqrt(total) + epsilon)
        yield w


def rmsprop(w, gradients, rho=0.9, epsilon=1e-8):
    for t in range(len(gradients)):
        average = sum((1 - rho) * rho ** (t - i) * g**2 for i, g in enumerate(gradients[: t + 1]))
        w = w - RATE * gradients[t] / (np.sqrt(average) + epsilon)
        yield w


def adam(w, gradients, beta1=0.9, beta2=0.999, epsilon=1e-8, decoupled=0.0, rate=None):
    rate = RATE if rate is None else rate
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        step = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + epsilon)
        w = w - rate * step - rate * decoupled * w
        yield w


CASES = [
    (optimizers.SGD(RATE), sgd, {}),
    (optimizers.SGD(RATE, momentum=0.9), sgd, {"momentum": 0.9}),
    (optimizers.SGD(RATE, momentum=0.8, nesterov=True), sgd, {"momentum": 0.8, "nesterov": True}),
    (optimizers.Adagrad(RATE), adagrad, {}),
    (optimizers.Adagrad(RATE, epsilon=0.1), adagrad, {"epsilon": 0.1}),
    (optimizers.RMSprop(RATE), rmsprop, {}),
    (optimizers.RMSprop(RATE, rho=0.5, epsilon=0.1), rmsprop, {"rho": 0.5, "epsilon": 0.1}),
    (optimizers.Adam(RATE), adam, {}),
    (optimizers.Adam(RATE, 0.5, 0.6, 0.1), adam, {"beta1": 0.5, "beta2": 0.6, "epsilon": 0.1}),
    (optimizers.Adam(RATE, beta1=0.0), adam, {"beta1": 0.0}),
    (optimizers.AdamW(RATE, weight_decay=0.0), adam, {}),
    (  # without hidden layers
        optimizers.Muon(RATE, adamw_factor=1.0, beta2=0.999, epsilon=1e-8),
        adam,
        {},
    ),
]
each_optimizer = pytest.mark.parametrize(
    ("optimizer", "formula", "settings"), CASES, ids=lambda v: repr(v) if hasattr(v, "apply") else ""
)
DEFAULTS = [*(cls() for cls in dict.fromkeys(map(type, every.OPTIMIZERS))), optimizers.SGD(momentum=0.9)]


def test_every_optimizer_has_an_example():
    assert not missing_classes(optimizers, optimizers.Optimizer, [optimizer for optimizer, _, _ in CASES])


def test_every_optimizer_has_a_name():
    assert not missing_classes(optimizers, optimizers.Optimizer, [cls() for cls in optimizers._NAMES.values()])


def model_of(backend, rng, sizes=(3, 4, 2), dtype="float64"):
    stack = [layers.Dense(size, bias_initializer="normal") for size in sizes[1:]]
    return xpnet.Sequential(stack, input_shape=sizes[0], backend=backend, dtype=dtype)


def train(model, optimizer, gradients, state=None, factor=1.0):
    """Apply the optimizer to these gradients, one dict {name: array} per step."""
    store = model.context.store
    state = state or optimizers.OptimizerState(optimizer, store)
    for grads in gradients:
        for parameter in model.parameters:
            parameter.grad = grads[parameter.name]
        optimizer.apply(store, state, lambda: factor)
    return state


def random_gradients(rng, model, steps=6):
    return [{p.name: rng.normal(size=p.shape) for p in model.parameters} for _ in range(steps)]


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-12), ("float32", 2e-5)])
@each_optimizer
def test_optimizers_follow_the_formulas_of_the_papers(backend, rng, optimizer, formula, settings, dtype, rtol):
    model = model_of(backend, rng, dtype=dtype)
    start, gradients = model.state_dict(), random_gradients(rng, model)
    state = train(model, optimizer, gradients)
    for name, value in model.state_dict().items():
        *_, want = formula(start[name].astype("float64"), [g[name] for g in gradients], **settings)
        np.testing.assert_allclose(value, want, rtol=rtol, atol=rtol)
        assert not np.allclose(value, start[name], rtol=1e-3)
    assert state.step == len(gradients)


@pytest.mark.parametrize(
    ("optimizer", "formula", "settings"), CASES[:-2], ids=lambda v: repr(v) if hasattr(v, "apply") else ""
)
def test_weight_decay_is_added_to_gradients_of_weights_only(backend, rng, optimizer, formula, settings):
    optimizer = copy.copy(optimizer)
    optimizer.weight_decay = 0.3
    model = model_of(backend, rng)
    start, gradients = model.state_dict(), random_gradients(rng, model, 1)
    train(model, optimizer, gradients)
    for key, value in model.state_dict().items():
        g = gradients[0][key] + 0.3 * start[key] * ("weight" in key)
        (want,) = formula(start[key], [g], **settings)
        np.testing.assert_allclose(value, want, rtol=1e-12, atol=1e-14)


def test_adamw_decays_weights_separately_and_not_biases(backend, rng):
    model = model_of(backend, rng)
    start, gradients = model.state_dict(), random_gradients(rng, model)
    train(model, optimizers.AdamW(RATE, weight_decay=0.3), gradients)
    for key, value in model.state_dict().items():
        *_, want = adam(start[key], [g[key] for g in gradients], decoupled=0.3 * ("weight" in key))
        np.testing.assert_allclose(value, want, rtol=1e-12, atol=1e-14)


def test_a_rate_factor_scales_every_rate(backend, rng):
    model = model_of(backend, rng)
    start, gradients = model.state_dict(), random_gradients(rng, model)
    train(model, optimizers.AdamW(4 * RATE, weight_decay=0.3), gradients, factor=0.25)
    for key, value in model.state_dict().items():
        *_, want = adam(start[key], [g[key] for g in gradients], decoupled=0.3 * ("weight" in key))
        np.testing.assert_allclose(value, want, rtol=1e-12, atol=1e-14)


def test_the_first_step_of_adam_is_the_rate_times_the_sign_of_the_gradient(backend, rng):
    model = model_of(backend, rng)
    start, gradients = model.state_dict(), random_gradients(rng, model, 1)
    train(model, optimizers.Adam(0.01), gradients)
    for key, value in model.state_dict().items():
        np.testing.assert_allclose(value - start[key], -0.01 * np.sign(gradients[0][key]), rtol=1e-5)


# Muon


def orthogonal(u, steps=5):
    """The iteration of Jordan et al. 2024, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / np.sqrt((x**2).sum())
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def muon(w, gradients, momentum=0.95, nesterov=True, steps=5, decoupled=0.0, rate=RATE):
    m = np.zeros_like(w)
    inputs, outputs = int(np.prod(w.shape[:-1])), w.shape[-1]
    for g in gradients:
        m = momentum * m + (1 - momentum) * g
        u = momentum * m + (1 - momentum) * g if nesterov else m
        direction = orthogonal(u.reshape(inputs, outputs), steps).reshape(w.shape)
        w = w - rate * decoupled * w - rate * max(1, outputs / inputs) ** 0.5 * direction
        yield w


MUONS = [
    {},
    {"momentum": 0.5, "nesterov": False, "decoupled": 0.3},
    {"momentum": 0.0, "steps": 3},
]


@pytest.mark.parametrize("settings", MUONS, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-10), ("float32", 1e-4)])
def test_muon_follows_the_formula_for_matrices_and_that_of_adamw_for_the_others(backend, rng, settings, dtype, rtol):
    model = model_of(backend, rng, (5, 4, 7, 3, 6), dtype)
    given = {"weight_decay" if name == "decoupled" else name: value for name, value in settings.items()}
    optimizer = optimizers.Muon(RATE, **given, adamw_factor=0.5, beta1=0.8, beta2=0.9, epsilon=1e-7)
    start, gradients = model.state_dict(), random_gradients(rng, model)
    train(model, optimizer, gradients)
    for name, value in model.state_dict().items():
        w, own = start[name].astype("float64"), [g[name] for g in gradients]
        if name in ("1.weight", "2.weight"):
            *_, want = muon(w, own, **settings)
        else:
            decay = settings.get("decoupled", 0.0) * name.endswith("weight")
            *_, want = adam(w, own, rate=RATE / 2, beta1=0.8, beta2=0.9, epsilon=1e-7, decoupled=decay)
        np.testing.assert_allclose(value, want, rtol=rtol, atol=rtol)
        assert not np.allclose(value, start[name], rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(6, 6), (3, 9), (9, 3), (1, 4)], ids=str)
def test_the_update_of_a_matrix_is_nearly_orthogonal_whatever_the_size_of_the_gradient(backend, rng, shape, scale):
    """The published iteration takes singular values to about 0.7 to 1.2, from 0.01 of the norm on."""
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    u = (left * np.linspace(1.0, 0.1, min(shape))) @ right
    matrix = backend.asarray((scale * u).astype("float32"))
    with backend.device():
        x = backend.to_numpy(optimizers._orthogonalized(backend, matrix, 5)).astype("float64")
    values = np.linalg.svd(x, compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    np.testing.assert_allclose(x, orthogonal(u), atol=1e-3)


def test_the_update_of_a_zero_gradient_is_zero(backend):
    with backend.device():
        zeros = backend.to_numpy(optimizers._orthogonalized(backend, backend.zeros((3, 5), "float32"), 5))
    assert not zeros.any()


def matrices_of(model, **kwargs):
    return {p.name for p in optimizers.Muon(**kwargs)._matrices_of(model.context.store)}


def test_the_matrices_of_muon_are_the_weights_of_hidden_layers():
    stack = [
        *[layers.Conv2D(4, 3), layers.BatchNorm(), layers.PReLU(), layers.Conv2D(6, 3), layers.Flatten()],
        *[layers.Dense(5), layers.ReLU(), layers.Dense(3)],
    ]
    model = xpnet.Sequential(stack, (8, 8, 1), "cpu")
    assert matrices_of(model) == {"3.weight", "5.weight"}
    assert matrices_of(model, matrices=["0.*", "7.*"]) == {"0.weight", "7.weight"}
    model.layers[7].trainable = False
    assert matrices_of(model) == {"3.weight", "5.weight"}
    embedding = layers.Embedding(9, 8)
    inside = [layers.PositionalEmbedding(6), layers.TransformerBlock(2)]
    block = [f"{part}_weight" for part in ("query", "key", "value", "output")]
    block = {*(f"2.attention.{name}" for name in block), "2.expand.weight", "2.contract.weight"}
    for last in (layers.Dense(9), layers.Dense(9, tied_to=embedding)):
        stack = [embedding, *inside, last]
        assert matrices_of(xpnet.Sequential([*stack], (6,), "cpu")) == block
        embedding = layers.Embedding(9, 8)
        inside = [layers.PositionalEmbedding(6), layers.TransformerBlock(2)]


def test_muon_trains_convolutions_as_matrices_of_patches(backend, rng):
    stack = [layers.Conv2D(2, 1), layers.Conv2D(5, 2), layers.Flatten(), layers.Dense(2)]
    model = xpnet.Sequential(stack, (3, 3, 1), backend, dtype="float64")
    start, gradients = model.state_dict(), random_gradients(rng, model)
    train(model, optimizers.Muon(RATE), gradients)
    *_, want = muon(start["1.weight"], [g["1.weight"] for g in gradients])
    np.testing.assert_allclose(model.state_dict()["1.weight"], want, rtol=1e-10, atol=1e-12)


def test_rates_by_parameter_scale_matrices_and_vectors_of_muon(backend, rng):
    models = [model_of(backend, rng, (3, 4, 4, 2)) for _ in range(2)]
    start, gradients = models[0].state_dict(), random_gradients(rng, models[0], 1)
    for model, rates in zip(models, (None, {"1.weight": 0.5, "*.bias": 2.0, "2.weight": 0.0}), strict=True):
        train(model, optimizers.Muon(RATE, parameter_rates=rates), gradients)
    plain, rated = (model.state_dict() for model in models)
    for name in start:
        factor = {"0.weight": 1.0, "1.weight": 0.5, "2.weight": 0.0}.get(name, 2.0)
        np.testing.assert_allclose(rated[name] - start[name], factor * (plain[name] - start[name]), atol=1e-15)


@pytest.mark.parametrize("depth", [2, 3])
def test_captured_and_eager_steps_of_muon_are_equal_bit_for_bit(monkeypatch, depth):
    states = []
    for capture in ("1", "0"):
        monkeypatch.setenv("XPNET_CAPTURE", capture)
        stack = [layer for _ in range(depth) for layer in (layers.Dense(6), layers.Tanh())]
        model, captured = xpnet.Sequential([*stack, layers.Dense(2)], (4,), "cpu"), []
        watch = Do(lambda c, m, captured=captured: captured.append(c.run.executor.captured), "on_epoch_end")
        model.fit(SAMPLES, LABELS, optimizer="muon", callbacks=[watch], epochs=30, **QUIET)
        assert bool(captured[-1]) == (capture == "1")
        states.append(model.state_dict())
    assert_same_state(*states)


# Rates by parameter


RATES = {"0.weight": 0.5, "0.*": 0.0, "*.bias": 3.0}  # the first pattern that matches counts
FACTORS = {"0.weight": 0.5, "0.bias": 0.0, "1.weight": 1.0, "1.bias": 3.0}


def with_rates(optimizer, rates):
    return type(optimizer).from_config({**optimizer.get_config(), "parameter_rates": rates})


@each_optimizer
def test_rates_by_parameter_scale_the_rates_of_the_formulas(backend, rng, monkeypatch, optimizer, formula, settings):
    model = model_of(backend, rng)
    start, gradients = model.state_dict(), random_gradients(rng, model)
    train(model, with_rates(optimizer, RATES), gradients)
    for name, value in model.state_dict().items():
        monkeypatch.setitem(globals(), "RATE", 0.05 * FACTORS[name])
        *_, want = formula(start[name], [g[name] for g in gradients], **settings)
        np.testing.assert_allclose(value, want, rtol=1e-12, atol=1e-14)
        assert np.array_equal(value, start[name]) == (FACTORS[name] == 0)


@pytest.mark.parametrize("kind", [optimizers.SGD, optimizers.AdamW])
def test_rates_by_parameter_scale_weight_decay_too(backend, rng, kind):
    model = model_of(backend, rng)
    start, zeros = model.state_dict(), [{p.name: np.zeros(p.shape) for p in model.parameters}]
    train(model, kind(RATE, weight_decay=0.3, parameter_rates=RATES), zeros)
    for name, value in model.state_dict().items():
        kept = 1 - RATE * FACTORS[name] * 0.3 * name.endswith("weight")
        np.testing.assert_allclose(value, kept * start[name], rtol=1e-12)


def test_clipping_does_not_depend_on_rates_by_parameter(backend, rng):
    models = [model_of(backend, rng) for _ in range(2)]
    start, gradients = models[0].state_dict(), random_gradients(rng, models[0], 1)
    for model, rates in zip(models, (None, RATES), strict=True):
        train(model, optimizers.SGD(RATE, clip_norm=0.5, parameter_rates=rates), gradients)
    plain, rated = (model.state_dict() for model in models)
    for name, factor in FACTORS.items():
        change = factor * (plain[name] - start[name])
        np.testing.assert_allclose(rated[name] - start[name], change, rtol=1e-12, atol=1e-15)


def test_frozen_parameters_stay_frozen_whatever_their_rate(backend, rng):
    model = model_of(backend, rng)
    model.layers[1].trainable = False
    start = model.state_dict()
    train(model, optimizers.AdamW(parameter_rates={"1.*": 5.0}), random_gradients(rng, model))
    for name, value in model.state_dict().items():
        assert np.array_equal(value, start[name]) == name.startswith("1")


def test_captured_and_eager_steps_with_rates_by_parameter_are_equal_bit_for_bit(monkeypatch):
    states = []
    for capture in ("1", "0"):
        monkeypatch.setenv("XPNET_CAPTURE", capture)
        model, reasons = small_net(), []
        watch = Do(lambda c, m, reasons=reasons: reasons.append(c.run.executor.captured), "on_epoch_end")
        rated = optimizers.AdamW(0.01, parameter_rates={"*.bias": 2.0, "0.weight": 0.5})
        model.fit(SAMPLES, LABELS, optimizer=rated, callbacks=[watch], epochs=30, **QUIET)
        assert bool(reasons[-1]) == (capture == "1")
        states.append(model.state_dict())
    assert_same_state(*states)


def test_a_new_dict_of_rates_is_followed_and_keeps_the_state():
    model, optimizer = small_net(), optimizers.SGD(0.1, momentum=0.9)
    model.fit(SAMPLES, LABELS, optimizer=optimizer, **QUIET)
    slots, before = model._state.optimizer_state, model.state_dict()
    optimizer.parameter_rates = {"0.*": 0.0}
    model.fit(SAMPLES, LABELS, optimizer=optimizer, **QUIET)
    assert model._state.optimizer_state is slots
    for name, value in model.state_dict().items():
        assert np.array_equal(value, before[name]) == name.startswith("0")


def test_new_patterns_of_matrices_are_checked_as_the_argument_is():
    model, optimizer = small_net(), optimizers.Muon()
    with pytest.raises(ArgumentTypeError, match="^Muon: matrices must be patterns of parameter names.*, not 3"):
        optimizer.matrices = 3
    optimizer.matrices = "2.w*"  # one pattern
    assert {p.name for p in optimizer._matrices_of(model.context.store)} == {"2.weight"}


@pytest.mark.parametrize("rates", [{"*": -1.0}, {"*": math.nan}, {"*": "high"}, {0: 1.0}, [1.0]])
def test_a_new_dict_of_rates_is_checked_as_the_argument_is(rates):
    optimizer, error = (
        optimizers.SGD(0.1),
        pytest.raises((ArgumentError, ArgumentTypeError), match="^SGD: .*parameter_rates must be a"),
    )
    with error:
        optimizer.parameter_rates = rates
    if not isinstance(rates, dict):
        return
    optimizer.parameter_rates = {"*": 1.0}
    optimizer.parameter_rates.clear()
    optimizer.parameter_rates.update(rates)
    with error:
        small_net().fit(SAMPLES, LABELS, optimizer=optimizer, **QUIET)


@pytest.mark.parametrize(
    "train_with",
    [
        lambda model, optimizer: model.fit(SAMPLES, LABELS, optimizer=optimizer, **QUIET),
        lambda model, optimizer: model.train_on_batch(SAMPLES, LABELS, "softmax_cross_entropy", optimizer),
    ],
    ids=["fit", "train_on_batch"],
)
def test_a_pattern_without_a_parameter_is_refused_and_changes_nothing(train_with):
    model = small_net()
    model.fit(SAMPLES, LABELS, optimizer="adam", **QUIET)
    before, state = model.state_dict(), dict(vars(model._state))
    with pytest.raises(ArgumentError) as caught:
        train_with(model, optimizers.SGD(parameter_rates={"0.weihgt": 2.0}))
    assert str(caught.value) == (
        "SGD: parameter_rates: no parameter matches '0.weihgt'. Did you mean '0.weight' or '2.weight'? The model has "
        "0.weight, 0.bias, 2.weight, 2.bias."
    )
    assert_same_state(model.state_dict(), before)
    assert vars(model._state) == state


# Clipping


@pytest.mark.parametrize("limit", [0.1, 1.0, 1e9])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clipping_scales_the_whole_gradient_to_the_norm_limit(backend, rng, limit, dtype):
    model = model_of(backend, rng, dtype=dtype)
    (gradients,) = random_gradients(rng, model, 1)
    gradients = {key: g.astype(dtype) for key, g in gradients.items()}
    train(model, optimizers.SGD(RATE, clip_norm=limit), [gradients])
    norm = math.sqrt(math.fsum(float(v) ** 2 for g in gradients.values() for v in g.ravel()))
    for p in model.parameters:
        got = backend.to_numpy(p.grad)
        if limit > norm:
            np.testing.assert_array_equal(got, gradients[p.name])
        else:
            np.testing.assert_allclose(got, gradients[p.name] * limit / norm, rtol=10 * np.finfo(dtype).eps)


def test_clipping_a_zero_gradient_changes_nothing(backend, rng):
    model = model_of(backend, rng, dtype="float32")
    start = model.state_dict()
    train(model, optimizers.SGD(RATE, clip_norm=1.0), [{p.name: np.zeros(p.shape) for p in model.parameters}])
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value, start[key])


def test_clipping_excludes_weight_decay_and_frozen_parameters(backend, rng):
    model = model_of(backend, rng)
    model.layers[0].trainable = False
    start, (gradients,) = model.state_dict(), random_gradients(rng, model, 1)
    train(model, optimizers.SGD(RATE, clip_norm=0.5, weight_decay=0.3), [gradients])
    norm = math.sqrt(sum((gradients[key] ** 2).sum() for key in ("1.weight", "1.bias")))
    want = start["1.weight"] - RATE * (gradients["1.weight"] * 0.5 / norm + 0.3 * start["1.weight"])
    np.testing.assert_allclose(model.state_dict()["1.weight"], want, rtol=1e-12, atol=1e-14)


# Frozen parameters, long vectors, optimizer state


@pytest.mark.parametrize("frozen", [["0.weight"], ["0.bias", "1.weight"], ["1.bias"], ["0.weight", "1.bias"]], ids=str)
@pytest.mark.parametrize("optimizer", [*DEFAULTS, optimizers.Adam(weight_decay=0.1, clip_norm=0.1)], ids=repr)
def test_only_frozen_parameters_stay_unchanged(backend, rng, optimizer, frozen):
    model = model_of(backend, rng)
    for p in model.parameters:
        p.trainable = p.name not in frozen
    start = model.state_dict()
    train(model, optimizer, random_gradients(rng, model, 2))
    for key, value in model.state_dict().items():
        assert np.array_equal(value, start[key]) == (key in frozen)


def test_an_update_with_all_parameters_frozen_does_nothing(backend, rng):
    model = model_of(backend, rng)
    model.trainable = False
    start = model.state_dict()
    train(model, optimizers.AdamW(clip_norm=1.0), random_gradients(rng, model, 1))
    assert all(np.array_equal(value, start[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "optimizer", [*DEFAULTS, optimizers.SGD(momentum=0.9, nesterov=True, weight_decay=0.1, clip_norm=1.0)], ids=repr
)
def test_updates_in_chunks_equal_one_update_of_the_whole_vector_bit_for_bit(optimizer):
    cpu, whole = xpnet.get_backend("cpu"), Backend("reference", np)
    sizes = (181, 200, 3)  # 36 200 weights: two chunks of 16384 and a part of a third
    models = [model_of(b, None, sizes, "float32") for b in (cpu, whole)]
    assert cpu.chunk_elements == 16384 < models[0].parameters[0].size / 2
    assert whole.chunk_elements is None
    gradients = random_gradients(np.random.default_rng(0), models[0], 3)
    for model in models:
        model.layers[1].trainable = False
        train(model, optimizer, gradients)
    ours, theirs = (model.state_dict() for model in models)
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])
    model = model_of(cpu, None, sizes, "float32")
    changed = ours["0.weight"] != model.state_dict()["0.weight"]
    assert changed.mean() > 0.99


@pytest.mark.parametrize("optimizer", DEFAULTS, ids=repr)
def test_backends_agree_with_the_reference_bit_for_bit_or_to_rounding_on_gpus(backend, reference, rng, optimizer):
    models = [model_of(b, rng, dtype="float32") for b in (backend, reference)]
    gradients = random_gradients(rng, models[0])
    for model in models:
        train(model, optimizer, gradients)
    for got, want in zip(models[0].parameters, models[1].parameters, strict=True):
        if backend.name.startswith("gpu"):
            np.testing.assert_allclose(backend.to_numpy(got.value), want.value, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(backend.to_numpy(got.value), want.value)


def test_the_state_of_an_optimizer_belongs_to_the_model(backend, rng):
    adam_, models = optimizers.Adam(), [model_of(backend, rng) for _ in range(2)]
    gradients = random_gradients(rng, models[0], 4)
    before = vars(adam_).copy()
    first = train(models[0], adam_, gradients)
    states = train(models[1], adam_, gradients[:2])
    train(models[1], adam_, gradients[2:], state=states)
    assert vars(adam_) == before
    assert (first.step, states.step) == (4, 4)
    for a, b in zip(models[0].parameters, models[1].parameters, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(a.value), backend.to_numpy(b.value))


@pytest.mark.parametrize("optimizer", DEFAULTS, ids=repr)
def test_training_continues_unchanged_after_a_move(backend, rng, optimizer):
    cpu = xpnet.get_backend("cpu")
    stayed, moved = model_of(cpu, rng), model_of(cpu, rng)
    gradients = random_gradients(rng, stayed)
    train(stayed, optimizer, gradients)
    state = train(moved, optimizer, gradients[:3])
    moved.to(backend)
    state.move(cpu, moved.context.store)
    train(moved, optimizer, gradients[3:], state)
    for key, value in moved.state_dict().items():
        np.testing.assert_allclose(value, stayed.state_dict()[key], rtol=1e-14)


@pytest.mark.parametrize("optimizer", DEFAULTS, ids=repr)
def test_the_state_has_only_the_vectors_of_the_formula(rng, optimizer):
    slots = {
        optimizers.SGD: ("velocity",) if getattr(optimizer, "momentum", 0.0) else (),
        optimizers.Adagrad: ("squares",),
        optimizers.RMSprop: ("squares",),
        optimizers.Adam: ("means", "squares"),
        optimizers.AdamW: ("means", "squares"),
        optimizers.Muon: ("means", "squares"),
    }[type(optimizer)]
    state = optimizers.OptimizerState(optimizer, model_of("cpu", rng).context.store)
    assert tuple(state.slots) == slots
    assert not any(slot.any() for slot in state.slots.values())


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adam", "adamw", "muon"])
def test_every_optimizer_solves_a_least_squares_problem(backend, rng, name):
    optimizer = optimizers.get(name)
    optimizer.learning_rate, optimizer.weight_decay = (
        {"sgd": 0.3, "adagrad": 1.0, "adamw": 0.1, "muon": 0.1 / 0.015}.get(name, 0.03),
        0.0,
    )
    x, w = rng.normal(size=(64, 2)), np.array([[1.0], [-2.0]])
    model = xpnet.Sequential([layers.Dense(1)], input_shape=2, backend=backend, dtype="float64")
    for _ in range(150):
        model.train_on_batch(x, x @ w + 0.5, loss="mse", optimizer=optimizer)
    np.testing.assert_allclose(model.state_dict()["0.weight"], w, atol=0.05)
    np.testing.assert_allclose(model.state_dict()["0.bias"], [0.5], atol=0.05)


# Penalties of layers


def test_penalties_of_trainable_weights_are_added_to_loss_and_gradient(backend, rng):
    stack = [layers.Dense(3, bias_initializer=1.0, l1=0.1, l2=0.2), layers.Dense(1, l2=5.0)]
    model = xpnet.Sequential(stack, input_shape=2, backend=backend, dtype="float64")
    stack[1].trainable = False
    w = model.state_dict()["0.weight"]
    penalty = 0.1 * np.abs(w).sum() + 0.2 * (w**2).sum()
    assert float(model.context.store.penalty()) == pytest.approx(penalty, rel=1e-14)
    model.context.store.grads[...] = 0
    model.context.store.add_penalty_gradients()
    np.testing.assert_allclose(backend.to_numpy(stack[0].weight.grad), 0.1 * np.sign(w) + 0.4 * w, rtol=1e-14)
    assert not any(backend.to_numpy(p.grad).any() for p in model.parameters[1:])
    x, y = rng.normal(size=(4, 2)), rng.normal(size=(4, 1))
    plain = losses.MeanSquaredError()(model.predict(x), y)
    assert model.evaluate(x, y, loss="mse")["loss"] == pytest.approx(plain + penalty, rel=1e-12)
    assert model.evaluate(x, y, loss="mse", batch_size=3)["loss"] == pytest.approx(plain + penalty, rel=1e-12)


@pytest.mark.parametrize(("l1", "l2"), [(0.5, 0.0), (0.0, 0.5)])
def test_l1_and_l2_penalties_work_alone(backend, l1, l2):
    model = xpnet.Sequential([layers.Dense(1, weight_initializer=-3.0, l1=l1, l2=l2)], 2, backend, dtype="float64")
    model.context.store.add_penalty_gradients()
    assert float(model.context.store.penalty()) == l1 * 6 + l2 * 18
    assert backend.to_numpy(model.parameters[0].grad).tolist() == [[-l1 - 6 * l2]] * 2


@pytest.mark.parametrize("weight", [None, 2.5])
def test_a_shared_penalty_is_divided_by_the_weight_of_the_samples_of_each_step(backend, weight):
    """Batches of 4 samples: shared_l2 / (4 · weight) is the same as l2."""
    x, y = np.random.default_rng(0).normal(size=(2, 20, 3))
    weights = None if weight is None else np.full(20, weight)
    settings = {"loss": "mse", "optimizer": optimizers.SGD(0.1), "epochs": 4, "batch_size": 4, "sample_weight": weights}
    fitted, l2 = [], 0.3
    for shared in (False, True):
        model = xpnet.Sequential([layers.Dense(3, l2=0.0 if shared else l2)], (3,), backend, dtype="float64")
        model.layers[0].weight.shared_l2 = l2 * 4 * (weight or 1.0) if shared else 0.0
        history = model.fit(x, y, verbose=0, **settings)["loss"]
        fitted.append((history, model.state_dict()["0.weight"]))
    (curve, values), (shared_curve, shared_values) = fitted
    np.testing.assert_allclose(shared_curve, curve, rtol=1e-12)
    np.testing.assert_allclose(shared_values, values, rtol=1e-12)


def test_the_penalty_is_none_without_penalized_layers(backend, rng):
    assert model_of(backend, rng).context.store.penalty() is None


# Invalid arguments


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: optimizers.SGD(-0.1),
            ArgumentError,
            "SGD: learning_rate must be a finite number of at least 0, or a schedule, not -0.1",
        ),
        (lambda: optimizers.Adam(math.nan), ArgumentError, "Adam: learning_rate .* not nan"),
        (
            lambda: optimizers.AdamW(weight_decay=-1),
            ArgumentError,
            "AdamW: weight_decay must be a finite number of at least 0, not -1",
        ),
        (
            lambda: optimizers.RMSprop(clip_norm=0),
            ArgumentError,
            "RMSprop: clip_norm must be a number above 0, or None for no clipping, not 0",
        ),
        (
            lambda: optimizers.SGD(momentum=1.0),
            ArgumentError,
            "SGD: momentum must be a number of at least 0 and below 1, not 1.0",
        ),
        (lambda: optimizers.SGD(nesterov=True), ArgumentError, "nesterov=True needs a momentum above 0"),
        (lambda: optimizers.RMSprop(rho=-0.1), ArgumentError, "RMSprop: rho"),
        (lambda: optimizers.Adam(beta1=1.0), ArgumentError, "Adam: beta1"),
        (lambda: optimizers.AdamW(beta2=1.5), ArgumentError, "AdamW: beta2"),
        (
            lambda: optimizers.Adagrad(parameter_rates={"*.bias": -1.0}),
            ArgumentError,
            r"^Adagrad: the factor of '\*.bias' in parameter_rates must be a finite number of at least 0, not -1.0",
        ),
        (
            lambda: optimizers.Adam(parameter_rates={"*": math.inf}),
            ArgumentError,
            "finite number of at least 0, not inf",
        ),
        (
            lambda: optimizers.Adam(parameter_rates={"*": math.nan}),
            ArgumentError,
            "finite number of at least 0, not nan",
        ),
        (lambda: optimizers.Adam(parameter_rates=2.0), ArgumentTypeError, "parameter_rates must be a dict of patterns"),
        (lambda: optimizers.Adam(parameter_rates={0: 2.0}), ArgumentTypeError, "must be a dict of patterns"),
        (
            lambda: optimizers.Muon(momentum=1.0),
            ArgumentError,
            "Muon: momentum must be a number of at least 0 and below",
        ),
        (lambda: optimizers.Muon(steps=0), ArgumentError, "Muon: steps must be an integer of at least 1"),
        (lambda: optimizers.Muon(adamw_factor=-1), ArgumentError, "Muon: adamw_factor must be a finite number"),
        (
            lambda: optimizers.Muon(matrices=[1]),
            ArgumentTypeError,
            "Muon: matrices must be patterns of parameter names",
        ),
        (lambda: optimizers.Muon(matrices=1), ArgumentTypeError, "Muon: matrices must be patterns"),
        (
            lambda: small_net().fit(SAMPLES, LABELS, optimizer=optimizers.Muon(matrices=["1.weight"]), **QUIET),
            ArgumentError,
            r"Muon: matrices: no parameter matches '1.weight'. Did you mean '2.weight' or '0.weight'",
        ),
        (lambda: optimizers.get("adaam"), ArgumentError, "unknown optimizer 'adaam'. Did you mean 'adam'"),
        (lambda: optimizers.get(optimizers.Adam), ArgumentTypeError, r"pass an object, Adam\(...\)"),
    ],
)
def test_invalid_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_optimizers_with_equal_settings_are_equal():
    assert optimizers.get("adam") == optimizers.Adam() != optimizers.Adam(0.1) != optimizers.AdamW(0.1)
    assert repr(optimizers.SGD(0.1, momentum=0.9)) == "SGD(learning_rate=0.1, momentum=0.9)"


@pytest.mark.parametrize("size", [1e24, 1e37, 1e-30])
def test_clipping_scales_huge_gradients_and_keeps_tiny_ones(size):
    model = dense_net(weight_initializer="zeros")
    store, optimizer = model.context.store, optimizers.SGD(1.0, clip_norm=0.5)
    model.parameters[0].grad = size
    optimizer.apply(store, optimizers.OptimizerState(optimizer, store))
    expected = min(0.5, np.sqrt(8) * size)
    np.testing.assert_allclose(np.linalg.norm(store.values.astype("float64")), expected, rtol=1e-6)


def test_a_learning_rate_changed_between_fits_keeps_the_state():
    model, optimizer = small_net(), optimizers.Adam(0.01)
    model.fit(SAMPLES, LABELS, optimizer=optimizer, epochs=2, **QUIET)
    memory = model._state.optimizer_state
    optimizer.learning_rate = 0.5
    epochs = []
    model.fit(SAMPLES, LABELS, optimizer=optimizer, callbacks=[Do(lambda c, m: epochs.append(m._state.epoch))], **QUIET)
    assert model._state.optimizer_state is memory and set(epochs) == {2}
    assert (model._state.epoch, model._state.step, model._state.learning_rate) == (3, 12, 0.5)


def test_momentum_enabled_between_fits_starts_with_a_fresh_state():
    model, optimizer = small_net(), optimizers.SGD(0.1)
    model.fit(SAMPLES, LABELS, optimizer=optimizer, epochs=2, **QUIET)
    optimizer.momentum = 0.9
    fresh = small_net()
    fresh.load_state_dict(model.state_dict())
    model.fit(SAMPLES, LABELS, optimizer=optimizer, **QUIET)
    fresh.fit(SAMPLES, LABELS, optimizer=optimizers.SGD(0.1, momentum=0.9), **QUIET)
    assert (model._state.epoch, model._state.step) == (1, 4)
    assert_same_state(model.state_dict(), fresh.state_dict())


@pytest.mark.parametrize(("name", "value"), [("learning_rate", -1.0), ("weight_decay", math.nan), ("clip_norm", 0)])
def test_settings_that_are_properties_of_a_users_class_are_checked(name, value):
    own = type("Own", (optimizers.SGD,), {name: property(lambda self: value, lambda self, new: None)})
    with pytest.raises(ArgumentError, match=f"Own: {name} must be"):
        small_net().fit(SAMPLES, LABELS, optimizer=own(), **QUIET)


@pytest.mark.parametrize("name", ["learning_rate", "momentum", "clip_norm"])
def test_a_setting_that_was_deleted_is_named(name):
    optimizer = optimizers.SGD(0.1)
    delattr(optimizer, name)
    with pytest.raises(XpnetError, match=f"SGD has no attribute '{name}'"):
        small_net().fit(SAMPLES, LABELS, optimizer=optimizer, **QUIET)
