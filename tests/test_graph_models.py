"""Models of graphs: training, sharing between models, names, copies, files, and what they refuse."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import random_graphs
from captured_trainings import Watch
from seeds import seeds
from small_models import QUIET, assert_same_state
from strict import StrictBackend
from threads_as_ranks import run_on_ranks

import xpnet
from xpnet import callbacks, layers, optimizers
from xpnet.backends.cpu.operators import CPUOperators
from xpnet.backends.reference import Backend
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError, StateError
from xpnet.layers.structure import as_tuple
from xpnet.training import model_files

X = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(24, 2)).astype("float32")
SEEDS = range(8)
MORE_SEEDS = seeds(len(SEEDS), 50)


def autoencoder(backend="cpu"):
    """(encoder, decoder, autoencoder): the last is made of the other two."""
    x, z = xpnet.Input(4), xpnet.Input(2)
    encoder = xpnet.Model(x, layers.Dense(2)(layers.Tanh()(layers.Dense(5)(x))), backend=backend, name="encoder")
    decoder = xpnet.Model(z, layers.Dense(4)(layers.Tanh()(layers.Dense(5)(z))), backend=backend, name="decoder")
    x = xpnet.Input(4)
    return encoder, decoder, xpnet.Model(x, decoder(encoder(x)))


def heads(backend="cpu", **kwargs):
    """(body, model, other): two models with heads of their own on one body."""
    x = xpnet.Input(4)
    h = layers.BatchNorm()(layers.Dense(6, name="body")(x))
    body = xpnet.Model(x, h, backend=backend, **kwargs)
    return body, xpnet.Model(x, layers.Dense(2)(h)), xpnet.Model(x, layers.Dense(3, name="head")(layers.ReLU()(h)))


def targets(model):
    return np.random.default_rng(2).normal(size=(len(X), *model.output_shape)).astype("float32")


def train(model, **kwargs):
    return model.fit(X, targets(model), loss="mse", **{**QUIET, **kwargs})


# A chain, and graphs ------------------------------------------------------------------------------------------------

CHAINS = {
    "mlp": ((6,), lambda: [layers.Dense(8), layers.ReLU(), layers.Dropout(0.2), layers.Dense(3)]),
    "cnn": (
        (8, 8, 2),
        lambda: [
            layers.Conv2D(4, 3),
            layers.BatchNorm(),
            layers.ReLU(),
            layers.MaxPool2D(2),
            layers.Flatten(),
            layers.Dense(3),
        ],
    ),
}


def chain(make, shape, backend):
    """(a Sequential, a Model of the same layers)."""
    x = y = xpnet.Input(shape)
    for layer in make():
        y = layer(y)
    return xpnet.Sequential(make(), shape, backend), xpnet.Model(x, y, backend)


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_as_model_captures_the_operators_of_the_sequential(name):
    shape, make = CHAINS[name]
    row, graph = (xpnet.explain_step(model, 8) for model in chain(make, shape, "cpu"))
    for calls, expected in ((graph.recorded, row.recorded), (graph.replayed, row.replayed)):
        assert [(c.operator, c.name, c.shapes) for c in calls] == [(c.operator, c.name, c.shapes) for c in expected]
    assert len(row.recorded) > 10


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_as_model_trains_like_the_sequential_bit_for_bit(backend, rng, name):
    shape, make = CHAINS[name]
    row, graph = chain(make, shape, backend)
    x, y = rng.normal(size=(20, *shape)).astype("float32"), rng.integers(0, 3, 20)
    for model in (row, graph):
        model.fit(x, y, epochs=3, **QUIET)
    assert_same_state(graph.state_dict(), row.state_dict())
    np.testing.assert_array_equal(graph.predict(x), row.predict(x))


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_of_random_graphs_equal_finite_differences(backend, seed):
    graph = random_graphs.random_graph(seed)
    model = random_graphs.model_of(graph, backend=backend)
    errors = xpnet.check_gradients(model, *random_graphs.data_of(graph, 5), inputs=True)
    assert {*errors} > {p.name for p in model.parameters}
    assert len(errors) == len(model.parameters) + len(graph.inputs)
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("seed", MORE_SEEDS)
def test_random_graphs_are_bit_identical_on_the_strict_stand_in(monkeypatch, seed):
    # The BLAS, which sums the rows on the CPU, adds them in an order that depends on the processor.
    monkeypatch.setattr(CPUOperators, "sum_rows", Backend.sum_rows)
    states, graph = [], random_graphs.random_graph(seed)
    for backend in (xpnet.get_backend("cpu"), StrictBackend()):
        model = random_graphs.model_of(graph, backend=backend)
        model.fit(*random_graphs.data_of(graph, 12), loss="mse", epochs=3, **QUIET)
        states.append(model.state_dict())
    assert_same_state(*states)


def check_replays(backend, monkeypatch, seed):
    """A replay equals eager steps up to rounding; on the CPU, fit itself compares the bits."""
    states, graph = [], random_graphs.random_graph(seed)
    for capture in ("1", "0"):
        monkeypatch.setenv("XPNET_CAPTURE", capture)
        model, watch = random_graphs.model_of(graph, backend=backend), Watch()
        options = {"optimizer": optimizers.SGD(0.01, clip_norm=1.0), "epochs": 6, "callbacks": [watch], **QUIET}
        model.fit(*random_graphs.data_of(graph, 80), loss="mse", **options)
        captures = capture == "1" and (backend.replays_calls or backend.graph_capture() is not None)
        assert bool(watch.captured) == captures, watch.fallback_reason
        states.append(model.state_dict())
    for name, value in states[1].items():
        np.testing.assert_allclose(states[0][name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.usefixtures("exact_replays")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_graph_is_replayed(backend, monkeypatch, seed):
    check_replays(backend, monkeypatch, seed)


@pytest.mark.usefixtures("exact_replays")
@pytest.mark.parametrize("seed", MORE_SEEDS[len(SEEDS) :])
def test_more_random_graphs_are_replayed_on_a_gpu(gpu, monkeypatch, seed):
    check_replays(gpu, monkeypatch, seed)


@pytest.mark.parametrize("seed", MORE_SEEDS)
def test_a_random_graph_resumes_to_the_bit(tmp_path, seed):
    graph, stop = random_graphs.random_graph(seed), int(np.random.default_rng(seed).integers(1, 16))
    whole, first, second = (random_graphs.model_of(graph, backend="cpu") for _ in range(3))
    x, y = random_graphs.data_of(graph, 20)

    class Stop(callbacks.Callback):
        def on_step_end(self, model, step):
            if step == stop:
                self.run.save(tmp_path / "state")
                self.run.history.stopped = "test"

    options = {"loss": "mse", "epochs": 4, **QUIET}
    whole.fit(x, y, **options)
    first.fit(x, y, callbacks=[Stop()], **options)
    second.fit(x, y, resume_from=tmp_path / "state", **options)
    assert_same_state(second.state_dict(), whole.state_dict())


def test_a_layer_called_twice_has_other_noise_in_each_call(backend):
    x, dropout = xpnet.Input(64), layers.Dropout(0.5)
    model = xpnet.Model(x, layers.Concatenate()([dropout(x), dropout(x)]), backend=backend)
    y = backend.to_numpy(model.forward(np.ones((3, 64)), training=True))
    first, second = y[:, :64], y[:, 64:]
    assert (first != second).any()
    alone = xpnet.Sequential([layers.Dropout(0.5)], 64, backend)
    np.testing.assert_array_equal(first, backend.to_numpy(alone.forward(np.ones((3, 64)), training=True)))


def test_a_layer_may_be_called_on_tensors_of_several_shapes(backend, rng):
    x, relu, conv = xpnet.Input((6, 6, 2)), layers.ReLU(), layers.Conv2D(2, 3)
    a = relu(conv(x))
    b = relu(conv(a))
    pooled = [layers.GlobalAveragePool2D()(tensor) for tensor in (a, b)]
    model = xpnet.Model(x, layers.Dense(2)(layers.Add()(pooled)), backend=backend)
    assert [a.shape, b.shape] == [(4, 4, 2), (2, 2, 2)]
    assert [p.name for p in model.parameters] == ["0.weight", "0.bias", "5.weight", "5.bias"]
    errors = xpnet.check_gradients(model, rng.normal(size=(3, 6, 6, 2)), rng.normal(size=(3, 2)), inputs=True)
    assert max(errors.values()) < 1e-5


def test_an_attribute_set_later_applies_to_all_calls(backend):
    x, slope = xpnet.Input(2), layers.LeakyReLU(0.1)
    model = xpnet.Model(x, layers.Concatenate()([slope(x), slope(x)]), backend=backend)
    slope.negative_slope = 0.5
    np.testing.assert_array_equal(model.predict([[-2.0, 4.0]]), [[-1.0, 4.0, -1.0, 4.0]])


# Models that share layers -------------------------------------------------------------------------------------------


def test_models_of_the_same_tensors_share_parameters_live(backend):
    body, model, other = heads(backend)
    before = other.predict(X), body.predict(X)
    train(model, epochs=2)
    for shared, kept in ((other, before[0]), (body, before[1])):
        assert abs(shared.predict(X) - kept).max() > 1e-4
    state, others = model.state_dict(), other.state_dict()
    for name in ("body.weight", "body.bias"):
        np.testing.assert_array_equal(state[name], others[name])
    np.testing.assert_array_equal(state["1.running_mean"], others["1.running_mean"])
    assert {*state} - {*others} == {"2.weight", "2.bias"}
    assert {*others} - {*state} == {"head.weight", "head.bias"}


def test_gradients_that_another_model_has_overwritten_are_not_applied():
    _, model, other = heads()
    overwriting = [
        lambda: other.backward(other.forward(X)),
        lambda: other.train_on_batch(X, targets(other), "mse", "sgd"),
        lambda: train(other),
    ]
    for overwrite in overwriting:
        model.backward(model.forward(X, training=True))
        overwrite()
        with pytest.raises(StateError, match="apply_gradients needs gradients"):
            model.apply_gradients("sgd")
    model.backward(model.forward(X, training=True))
    model.apply_gradients("sgd")


def test_gradients_of_another_model_do_not_disturb_captured_steps(gpu):
    _, model, other = heads(gpu)
    watch = Watch()
    other.parameters[-1].grad = np.nan
    train(model, epochs=3, callbacks=[watch])
    assert watch.fallback_reason is None


def test_training_one_model_leaves_the_own_layers_of_another(backend):
    _, model, other = heads(backend)
    head = {name: value for name, value in other.state_dict().items() if name.startswith("head")}
    train(model, optimizer=optimizers.AdamW(0.1, weight_decay=0.5, clip_norm=0.1))
    assert_same_state(head, {name: other.state_dict()[name] for name in head})


def test_a_model_trains_alike_whether_its_store_has_grown_or_not(backend):
    results = []
    for grows in (False, True):
        x = xpnet.Input(4)
        h = layers.Dense(6)(x)
        model = xpnet.Model(x, layers.Dense(2)(h), backend=backend)
        train(model, epochs=2)
        if grows:
            xpnet.Model(x, layers.Dense(1)(h))
        train(model, epochs=2)
        results.append(model.state_dict())
    assert_same_state(*results)


def test_a_checkpoint_holds_the_own_parameters_only(tmp_path):
    """So a run of a model that shares layers resumes in one that does not, as after `xpnet.load`."""

    def model_alone():
        x = xpnet.Input(4)
        h = layers.BatchNorm()(layers.Dense(6, name="body")(x))
        return xpnet.Model(x, layers.Dense(2)(h), backend="cpu")

    class Stop(callbacks.Callback):
        def on_step_end(self, model, step):
            if step == 7:
                self.run.save(tmp_path / "state")
                self.run.history.stopped = "test"

    whole = model_alone()
    train(whole, epochs=3)
    _, sharing, _ = heads()
    train(sharing, epochs=3, callbacks=[Stop()])
    for resumed in (model_alone(), heads()[1], xpnet.load(tmp_path / "state", backend="cpu")):
        train(resumed, epochs=3, resume_from=tmp_path / "state")
        assert_same_state(resumed.state_dict(), whole.state_dict())


def test_early_stopping_keeps_the_own_parameters_only(tmp_path):
    def run(model, epochs, **kwargs):
        early, checkpoint = callbacks.EarlyStopping("loss", restore_best=True), callbacks.Checkpoint(tmp_path / "state")
        train(model, epochs=epochs, optimizer=optimizers.Adam(0.2), callbacks=[early, checkpoint], **kwargs)

    whole = heads()[1]
    run(whole, 6)
    run(heads()[1], 3)
    x = xpnet.Input(4)
    h = layers.BatchNorm()(layers.Dense(6, name="body")(x))
    other = xpnet.Model(x, layers.Dense(9, name="head")(h), backend="cpu")  # before the model, unlike in heads
    resumed, before = xpnet.Model(x, layers.Dense(2)(h)), other.state_dict()["head.weight"]
    run(resumed, 6, resume_from=tmp_path / "state")
    assert_same_state(resumed.state_dict(), whole.state_dict())
    np.testing.assert_array_equal(other.state_dict()["head.weight"], before)


def test_an_autoencoder_trains_its_parts_which_stay_usable(backend):
    encoder, decoder, whole = autoencoder(backend)
    before = encoder.predict(X)
    whole.fit(X, X, loss="mse", epochs=3, **QUIET)
    assert abs(encoder.predict(X) - before).max() > 1e-4
    np.testing.assert_allclose(decoder.predict(encoder.predict(X)), whole.predict(X), rtol=1e-6, atol=1e-7)
    assert whole.get_layer("encoder") is encoder
    assert whole.get_layer("decoder.2") is decoder.layers[2]
    assert whole.parameters[0].name == "encoder.0.weight"
    train(encoder)
    np.testing.assert_allclose(decoder.predict(encoder.predict(X)), whole.predict(X), rtol=1e-6, atol=1e-7)


def test_predictions_are_captured_anew_when_the_store_grows(backend):
    x = xpnet.Input(4)
    h = layers.Dense(4)(x)
    model = xpnet.Model(x, layers.Tanh()(h), backend=backend)
    data = np.tile(X, (200, 1))
    expected = [model.predict(data, batch_size=64) for _ in range(3)][-1]
    other = xpnet.Model(x, layers.Dense(2)(h))
    np.testing.assert_array_equal(model.predict(data, batch_size=64), expected)
    train(other)
    changed = model.predict(data, batch_size=64)
    assert abs(changed - expected).max() > 1e-5
    np.testing.assert_array_equal(changed, copy.deepcopy(model).predict(data, batch_size=64))


def test_a_model_is_freed_without_the_garbage_collector():
    encoder, decoder, whole = autoencoder()
    train(encoder)
    watched = [weakref.ref(thing) for thing in (whole, encoder, *encoder.layers, *whole.inner_layers)]
    tensor = encoder.outputs[0]
    gc.disable()
    try:
        del encoder, decoder, whole
        assert [ref() is None for ref in watched[:2]] == [True, True]
        assert watched[2]() is not None  # a tensor keeps the layers that compute it
        del tensor
        assert not any(ref() for ref in watched)
    finally:
        gc.enable()


def test_the_parameters_of_models_that_are_gone_take_no_memory():
    x = xpnet.Input(4)
    h = layers.Dense(4)(x)
    base = xpnet.Model(x, h, backend="cpu")
    for _ in range(5):
        head = xpnet.Model(x, layers.Dense(4)(h))
    gc.collect()
    last = xpnet.Model(x, layers.Dense(4)(h))
    assert last.context.store.values is base.context.store.values is head.context.store.values
    assert base.context.store.values.size == 3 * (16 + 16)  # the weights and biases, padded, of three layers


def test_models_that_were_built_apart_join_when_a_third_connects_them(backend):
    a, b = xpnet.Input(4), xpnet.Input(4)
    left = xpnet.Model(a, layers.Dense(3)(layers.BatchNorm()(a)), backend=backend)
    right = xpnet.Model(b, layers.Dense(3)(b), backend=backend, seed=1)
    kept, alone = [], []
    for model in (left, right):
        train(model, optimizer=optimizers.Adam(0.1))
        alone.append(copy.deepcopy(model))
        kept.append(model.predict(X))
    x = xpnet.Input(4)
    both = xpnet.Model(x, layers.Dense(1)(layers.Add()([left(x), right(x)])))
    for model, twin, before in zip((left, right), alone, kept, strict=True):
        np.testing.assert_array_equal(model.predict(X), before)
        train(model, optimizer=optimizers.Adam(0.1))  # continues with its optimizer's state
        train(twin, optimizer=optimizers.Adam(0.1))
        assert_same_state(model.state_dict(), twin.state_dict())
    before = left.predict(X), right.predict(X)
    train(both)
    assert abs(left.predict(X) - before[0]).max() > 0
    assert abs(right.predict(X) - before[1]).max() > 0


def test_ranks_share_the_gradients_of_a_model_that_shares_layers():
    results = []
    for ranks in (1, 2):

        def work(group):
            _, model, other = heads()
            kept = other.state_dict()["head.weight"]
            model.fit(
                X, targets(model), loss="mse", epochs=2, distributed=group, optimizer=optimizers.SGD(0.1), **QUIET
            )
            np.testing.assert_array_equal(other.state_dict()["head.weight"], kept)
            return model.state_dict()

        results.append(run_on_ranks(ranks, work)[0])
    for name, value in results[0].items():
        np.testing.assert_allclose(results[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_copy_of_a_nested_model_does_not_train_like_that_model():
    encoder, _, whole = autoencoder()
    train(encoder)
    nested = next(layer for layer in whole.inner_layers if layer.name == "encoder")
    assert nested is not encoder
    assert nested.history is None
    assert encoder.history is not None
    assert nested._state is not encoder._state
    encoder.layers[0].note = "an attribute"
    assert nested.inner_layers[0].note == "an attribute"


def test_part_of_a_trained_model_is_a_model(backend):
    row = xpnet.Sequential([layers.Dense(5), layers.Tanh(), layers.Dense(2)], 4, backend)
    train(row)
    features = xpnet.Model(row.inputs, row.output_of("1"))
    np.testing.assert_array_equal(features.predict(X), row.activations(X)["1"])
    deeper = xpnet.Model(features.inputs, layers.Dense(3, name="new")(features.outputs[0]))
    assert [p.name for p in deeper.parameters] == ["0.weight", "0.bias", "new.weight", "new.bias"]
    train(deeper)
    np.testing.assert_array_equal(features.predict(X), row.activations(X)["1"])


def test_a_model_in_a_sequential_shares_its_parameters(backend):
    encoder, _, _ = autoencoder(backend)
    row = xpnet.Sequential([encoder, layers.Dense(1)], 4, backend)
    before = encoder.predict(X)
    train(row)
    assert abs(encoder.predict(X) - before).max() > 1e-4
    assert row[0] is encoder
    np.testing.assert_array_equal(row.activations(X)["encoder"], encoder.predict(X))


def test_frozen_layers_are_frozen_in_all_models(backend):
    body, model, other = heads(backend)
    body.trainable = False
    before = body.state_dict()
    train(model)
    train(other)
    assert_same_state(body.state_dict(), before)  # also the running statistics
    with pytest.warns(UserWarning, match="nothing in this model is trainable"):
        train(body)
    assert not any(p.trainable for p in body.parameters)
    assert model.parameters[-1].trainable


def test_a_frozen_batch_norm_without_parameters_keeps_its_statistics(backend):
    model = xpnet.Sequential([layers.BatchNorm(center=False, scale=False), layers.Dense(2)], 4, backend)
    model[0].trainable = False
    before = model.state_dict()
    train(model)
    after = model.state_dict()
    for name in ("0.running_mean", "0.running_var"):
        np.testing.assert_array_equal(after[name], before[name])


def test_models_that_share_layers_agree_on_backend_and_dtype():
    x = xpnet.Input(4)
    h = layers.Dense(3)(x)
    base = xpnet.Model(x, h, backend="cpu", dtype="float64")
    assert xpnet.Model(x, layers.ReLU()(h)).dtype == "float64"
    with pytest.raises(ArgumentError, match="shared with a model in float64 on cpu, but this model is in float32"):
        xpnet.Model(x, layers.ReLU()(h), dtype="float32")
    assert base.predict(X).dtype == "float64"


def test_models_that_share_layers_move_together():
    body, model, _ = heads()
    train(model)
    expected = model.predict(X), body.predict(X)
    target = StrictBackend()
    body.to(target)
    assert model.backend is target and model.context.backend is target
    np.testing.assert_array_equal(model.predict(X), expected[0])
    np.testing.assert_array_equal(body.predict(X), expected[1])
    train(model)  # the optimizer's state follows


# Names, copies and files --------------------------------------------------------------------------------------------


def test_layers_are_numbered_by_a_walk_from_the_outputs_and_names_belong_to_each_model():
    x = xpnet.Input(4)
    a, b = layers.Dense(4), layers.Dense(4)
    first, second = a(x), b(x)
    one = xpnet.Model(x, layers.Add()([first, second]), backend="cpu")
    other = xpnet.Model(x, layers.Add()([second, first]))
    assert one.layers[:2] == (a, b)
    assert other.layers[:2] == (b, a)
    np.testing.assert_array_equal(one.state_dict()["0.weight"], other.state_dict()["1.weight"])
    assert [p.name for p in other.parameters] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert other.get_layer("1") is a


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_continues_alone_and_alike(copied):
    _, _, model = heads()
    train(model)
    twin = copied(model)
    kept = twin.predict(X)
    np.testing.assert_array_equal(kept, model.predict(X))
    train(model)
    np.testing.assert_array_equal(kept, twin.predict(X))
    train(twin)
    assert_same_state(twin.state_dict(), model.state_dict())
    part = xpnet.Model(twin.inputs, twin.output_of("body"))
    np.testing.assert_array_equal(part.predict(X), twin.activations(X)["body"])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_file_restores_a_random_graph(tmp_path, seed):
    graph = random_graphs.random_graph(seed)
    model, (x, _) = random_graphs.model_of(graph, backend="cpu"), random_graphs.data_of(graph, 5)
    expected = as_tuple(model.predict(x))
    for saved in (model, copy.deepcopy(model)):
        saved.save(tmp_path / "m.safetensors")
        loaded = xpnet.load(tmp_path / "m.safetensors", backend="cpu")
        assert [p.name for p in loaded.parameters] == [p.name for p in model.parameters]
        for got, want in zip(as_tuple(loaded.predict(x)), expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_file_restores_nested_and_shared_models(tmp_path):
    encoder, _, _ = autoencoder()
    x, shared = xpnet.Input(4), layers.Dense(4)
    siamese = layers.Concatenate()([encoder(shared(x)), encoder(layers.Tanh()(shared(shared(x))))])
    model = xpnet.Model(x, layers.Dense(2)(siamese))
    train(model)
    model.layers[-1].trainable = False
    model.save(tmp_path / "m.safetensors")
    loaded = xpnet.load(tmp_path / "m.safetensors", backend="cpu")
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))
    assert [p.trainable for p in loaded.parameters] == [p.trainable for p in model.parameters]
    train(loaded)


def test_only_files_with_graphs_have_the_new_format(tmp_path):
    encoder, _, _ = autoencoder()
    plain = xpnet.Sequential([layers.Dense(2)], 4, "cpu")
    nested = xpnet.Sequential([encoder, layers.Dense(2)], 4, "cpu")
    for model, expected in ((plain, "xpnet-model-2"), (encoder, "xpnet-model-3"), (nested, "xpnet-model-3")):
        model.save(tmp_path / "m.safetensors")
        assert model_files.read_all(tmp_path / "m.safetensors").texts["format"] == expected
        loaded = xpnet.load(tmp_path / "m.safetensors", backend="cpu")
        assert type(loaded) is type(model)
        np.testing.assert_array_equal(loaded.predict(X), model.predict(X))


def test_a_file_restores_a_model_that_two_nested_models_contain(tmp_path):
    x = xpnet.Input(4)
    inner = xpnet.Model(x, layers.Tanh()(layers.Dense(4)(x)), backend="cpu")
    outer = xpnet.Model(x, layers.Add()([inner(x), inner(inner(x))]))
    model = xpnet.Model(x, layers.Multiply()([outer(x), inner(x)]))
    train(model)
    model.save(tmp_path / "m.safetensors")
    loaded = xpnet.load(tmp_path / "m.safetensors", backend="cpu")
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))
    assert [p.name for p in loaded.parameters] == [p.name for p in model.parameters] == ["0.0.0.weight", "0.0.0.bias"]


class Doubled(xpnet.Model):
    """Twice the outputs of the graph."""

    def forward(self, x, training=False):
        return 2.0 * super().forward(x)

    def backward(self, grad_output, input_grad=True):
        return super().backward(2.0 * grad_output)


def test_a_file_restores_a_nested_model_with_a_forward_of_its_own(tmp_path):
    x = xpnet.Input(4)
    model = xpnet.Model(x, layers.Tanh()(Doubled(x, layers.Dense(3)(x), backend="cpu")(x)))
    train(model)
    model.save(tmp_path / "m.safetensors")
    loaded = xpnet.load(tmp_path / "m.safetensors", backend="cpu", custom_layers=[Doubled])
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))
    inner = model.layers[0]
    np.testing.assert_allclose(np.tanh(inner.predict(X)), model.predict(X), rtol=1e-6)


def test_a_very_deep_graph_is_copied_and_saved(tmp_path):
    x = h = xpnet.Input(4)
    for _ in range(300):
        h = layers.Add()([h, layers.Dense(4)(h)])
    model = xpnet.Model(x, h, backend="cpu")
    model.save(tmp_path / "m.safetensors")
    for other in (copy.deepcopy(model), pickled(model), xpnet.load(tmp_path / "m.safetensors", backend="cpu")):
        np.testing.assert_array_equal(other.predict(X), model.predict(X))


def test_activations_and_summary_name_every_call():
    encoder, _, _ = autoencoder()
    x = xpnet.Input(4, name="x")
    model = xpnet.Model(x, layers.Add(name="sum")([encoder(x), encoder(layers.Dense(4)(x))]))
    assert [*model.activations(X)] == ["encoder", "1", "encoder#2", "sum"]
    np.testing.assert_array_equal(model.activations(X)["sum"], model.predict(X))
    lines = model.summary().splitlines()
    assert any(line.split()[0] == "encoder#2" and line.endswith("  shared") for line in lines)
    assert any(line.split()[0] == "sum" and "  encoder, encoder#2  " in line for line in lines)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: layers.Dense(3)(X), ArgumentTypeError, "Dense: a layer is called on symbolic tensors"),
        (lambda: layers.Add()(xpnet.Input(3), xpnet.Input(3)), ArgumentTypeError, "Add: give several inputs as one"),
        (lambda: xpnet.Model([layers.Dense(3)], (4,)), ArgumentTypeError, "Layers in a row make an xpnet.Sequential"),
        (lambda: layers.Dense(3)([]), ArgumentTypeError, "called on symbolic tensors"),
        (lambda: layers.Conv2D(3, 3)(xpnet.Input(4)), ShapeError, r"Conv2D expects .* is \(N, 4\)"),
        (lambda: xpnet.Model([], []), ArgumentTypeError, "inputs must be a symbolic tensor or a list"),
        (lambda: xpnet.Model(xpnet.Input(3), "x"), ArgumentTypeError, "outputs must be a symbolic tensor"),
        (lambda: xpnet.Model(xpnet.Input(3), layers.ReLU()(xpnet.Input(3))), ArgumentError, "not among the inputs"),
        (
            lambda: layers.Dense(3)([xpnet.Input(4), xpnet.Input(4)]),
            ShapeError,
            "expects one input.*Concatenate",
        ),
        (lambda: chain(CHAINS["mlp"][1], 6, "cpu")[1]([xpnet.Input(6)] * 2), ShapeError, "Model expects 1 input"),
        (lambda: xpnet.Input((3, 0)), ArgumentError, "a shape must be"),
        (lambda: xpnet.Input(3, name="a.b"), ArgumentError, "Input: name must be text without dots"),
    ],
    ids=range(12),
)
def test_mistakes_are_explained(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def test_more_mistakes_are_explained():
    x, y = xpnet.Input(4, name="x"), xpnet.Input(4)
    with pytest.raises(ArgumentError, match="is an input and an output"):
        xpnet.Model(x, x)
    with pytest.raises(ArgumentError, match="two of the inputs have the name 'x'"):
        xpnet.Model([x, xpnet.Input(4, name="x")], layers.ReLU()(x))
    with pytest.raises(ArgumentError, match="two of the inputs have the name 'input_2'"):
        xpnet.Model([xpnet.Input(4, name="input_2"), y], layers.ReLU()(y))
    with pytest.raises(ArgumentError, match="two of the layers have the name 'a'"):
        xpnet.Model(x, layers.ReLU(name="a")(layers.ReLU(name="a")(x)))
    dense = layers.Dense(3)
    xpnet.Model(x, dense(x), backend="cpu")
    with pytest.raises(ShapeError, match=r"layer 0 \(Dense\) is called again, .* need a weight of shape \(5, 3\)"):
        dense(xpnet.Input(5))


def test_a_shared_store_cannot_grow_while_it_trains():
    x = xpnet.Input(4)
    h = layers.Dense(3)(x)
    model = xpnet.Model(x, h, backend="cpu")

    class Grow(callbacks.Callback):
        def on_step_end(self, model, step):
            with pytest.raises(StateError, match="fit is running"):
                xpnet.Model(x, layers.Dense(2)(h))

    train(model, callbacks=[Grow()])
    assert xpnet.Model(x, layers.Dense(2)(h)).predict(X).shape == (24, 2)
