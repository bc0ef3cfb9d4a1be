"""Dense with the table of an Embedding: outputs, added gradients, names, copies, files, freezing, and refusals."""

import copy
import pickle

import numpy as np
import pytest
from captured_trainings import fit
from small_models import assert_same_state

import xpnet
from xpnet import layers, optimizers
from xpnet.errors import ArgumentError, ArgumentTypeError, FileError, ShapeError, StateError
from xpnet.training import captured_step

V, F, T = 9, 4, 5


def stack(embedding, **options):
    inner = [embedding, layers.Dense(6, name="hidden"), layers.Tanh(), layers.Dense(F), layers.GlobalAveragePool1D()]
    return [*inner, layers.Dense(V, tied_to=embedding, name="head", **options)]


def sequential(backend="cpu", padding_index=None, **options):
    inner = stack(layers.Embedding(V, F, padding_index=padding_index), **options)
    return xpnet.Sequential(inner, (T,), backend)


def nested(backend="cpu", padding_index=None, **options):
    embedding, *inner, head = stack(layers.Embedding(V, F, padding_index=padding_index), **options)
    return xpnet.Sequential([embedding, layers.Sequential([*inner, layers.Sequential([head])])], (T,), backend)


def graph(backend="cpu", padding_index=None, **options):
    x = y = xpnet.Input((T,))
    for layer in stack(layers.Embedding(V, F, padding_index=padding_index), **options):
        y = layer(y)
    return xpnet.Model(x, y, backend)


MODELS = [sequential, nested, graph]
each_model = pytest.mark.parametrize("make", MODELS)


def data(rng, rows=40):
    return rng.integers(0, V, (rows, T)), rng.integers(0, V, rows)


@each_model
@pytest.mark.parametrize("padding_index", [None, 3])
def test_both_uses_train_one_table(backend, rng, make, padding_index):
    model, (x, y) = make(backend, padding_index), data(rng)
    assert [p.shape for p in model.parameters if p.name == "0.weight"] == [(V, F)]
    assert len(model.parameters) == 6
    assert f"{sum(p.size for p in model.parameters):,} parameters" in model.summary()
    errors = xpnet.check_gradients(model, x[:7], y[:7], "softmax_cross_entropy", samples=V * F)
    assert max(errors.values()) < 1e-6
    before = model.state_dict()["0.weight"]
    model.fit(x, y, optimizer=optimizers.AdamW(0.01, weight_decay=0.1), batch_size=8, epochs=2, verbose=0)
    after = model.state_dict()["0.weight"]
    changed = (before != after).any(axis=1)
    assert changed.tolist() == [row != padding_index for row in range(V)]
    if padding_index is not None:
        assert not after[padding_index].any()


def test_the_output_is_the_product_with_the_transposed_table(rng):
    model, (x, _) = sequential(padding_index=3), data(rng)
    features = xpnet.Model(model.inputs, model.output_of("4")).predict(x)
    table, bias = (model.state_dict()[name] for name in ("0.weight", "head.bias"))
    np.testing.assert_allclose(model.predict(x), features @ table.T + bias, rtol=1e-5, atol=1e-6)
    model.parameters[0].value[3] = 1.0  # such as a loaded row of the padding index, which has no effect
    np.testing.assert_allclose(model.predict(x), features @ table.T + bias, rtol=1e-5, atol=1e-6)


@each_model
def test_captured_steps_equal_eager_ones(backend, make, rng, monkeypatch):
    monkeypatch.setattr(captured_step, "_FEW_STEPS", 1)
    (x, y), states = data(rng), []
    for capture in ("1", "0"):
        monkeypatch.setenv("XPNET_CAPTURE", capture)
        model = make(backend, padding_index=3)
        _, watch = fit(model, x, y, batch_size=8)
        assert bool(watch.captured) is (capture == "1" and backend.name != "strict")
        states.append(model.state_dict())
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


@each_model
@pytest.mark.parametrize("copied", ["file", "deepcopy", "pickle", "to", "submodel", "copy of a submodel"])
def test_copies_are_tied_too(backend, rng, tmp_path, make, copied):
    model, (x, y) = make(backend), data(rng)
    model.save(tmp_path / "m")
    other = {
        "file": lambda: xpnet.load(tmp_path / "m", backend),
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(pickle.dumps(model)) if backend.name == "cpu" else copy.deepcopy(model),
        "to": lambda: copy.deepcopy(model).to(backend, "float64").to(backend, "float32"),
        "submodel": lambda: xpnet.Model(model.inputs, model.outputs, backend),
        "copy of a submodel": lambda: copy.deepcopy(xpnet.Model(model.inputs, model.outputs, backend)),
    }[copied]()
    for _ in range(2):
        assert_same_state(other.state_dict(), model.state_dict())
        np.testing.assert_allclose(other.predict(x), model.predict(x), rtol=1e-5, atol=1e-6)
        for trained in [model] if copied == "submodel" else [model, other]:
            trained.fit(x, y, batch_size=8, verbose=0)
    other.save(tmp_path / "other")
    again = xpnet.load(tmp_path / "other", backend)
    assert_same_state(again.state_dict(), other.state_dict())
    again.parameters[0].value *= 2.0
    assert not np.allclose(again.predict(x) - other.predict(x), 0.0)


@each_model
def test_a_run_is_resumed_exactly(make, rng, tmp_path):
    x, y = data(rng)
    one, options = make(), {"batch_size": 8, "verbose": 0, "optimizer": "adam"}
    one.fit(x, y, epochs=4, **options)
    stopped, resumed = make(), make()
    stopped.fit(x, y, epochs=2, callbacks=xpnet.callbacks.Checkpoint(tmp_path / "run"), **options)
    resumed.fit(x, y, epochs=4, resume_from=tmp_path / "run", **options)
    assert_same_state(resumed.state_dict(), one.state_dict())


def test_a_frozen_table_is_frozen_for_both(rng):
    model, (x, y) = sequential(), data(rng)
    model.layers[0].trainable = False
    before = model.state_dict()
    model.fit(x, y, verbose=0)
    after = model.state_dict()
    assert [name for name in before if (before[name] == after[name]).all()] == ["0.weight"]


def test_a_model_with_the_head_only_shares_the_table_but_cannot_be_saved(rng, tmp_path):
    model = graph()
    features = xpnet.Input((F,))
    head = xpnet.Model(features, model.get_layer("head")(features))
    x = rng.normal(size=(3, F)).astype("float32")
    np.testing.assert_allclose(head.predict(x), x @ model.state_dict()["0.weight"].T, rtol=1e-5, atol=1e-6)
    with pytest.raises(ArgumentError, match=r"tied to an Embedding that is not in this model.*save one that has both"):
        head.save(tmp_path / "head")


TABLE = layers.Embedding(V, F)
REFUSED = {
    "no embedding": (lambda: layers.Dense(V, tied_to=3), ArgumentTypeError, "tied_to must be a layers.Embedding"),
    "units": (lambda: layers.Dense(8, tied_to=TABLE), ArgumentError, "units must be 9, the vocabulary_size"),
    "initializer": (
        lambda: layers.Dense(V, tied_to=TABLE, weight_initializer=np.ones((V, F))),
        ArgumentError,
        "give weight_initializer, l1 and l2 to the Embedding",
    ),
    "penalty": (lambda: layers.Dense(V, tied_to=TABLE, l2=0.1), ArgumentError, "give weight_initializer, l1 and l2"),
    "features": (
        lambda: xpnet.Sequential([TABLE, layers.Dense(3), layers.Dense(V, tied_to=TABLE)], T),
        ShapeError,
        r"layer 2 \(Dense\) expects 4 features, as the Embedding in tied_to has, but the input is \(N, 5, 3\)",
    ),
    "another model": (
        lambda: xpnet.Sequential([layers.Dense(V, tied_to=layers.Embedding(V, F))], F, "cpu"),
        StateError,
        r"layer 0 \(Dense\) is tied to Embedding, which is not built. It must come before this layer",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_tied_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_file_with_a_missing_table_is_refused(tmp_path, monkeypatch):
    model = sequential()
    monkeypatch.setitem(vars(model.layers[-1]), "tied_to", None)
    model.save(tmp_path / "m")
    with pytest.raises(FileError, match=r"lacks arrays of this model: head\.weight"):
        xpnet.load(tmp_path / "m")
