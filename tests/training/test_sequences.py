"""Training on sequences: a label for each step, labels to ignore, padded steps, and an open sequence axis."""

import numpy as np
import pytest
from small_models import assert_same_state
from threads_as_ranks import run_on_ranks

import xpnet
from xpnet import augment, layers, losses, metrics
from xpnet.errors import ArgumentError, DataError, ShapeError
from xpnet.training import captured_step

CLASSES, N, T, F = 3, 24, 5, 4
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, T + 1, N)
STEPS = np.arange(T) < LENGTHS[:, None]
X = np.where(STEPS[..., None], RNG.normal(size=(N, T, F)), 0.0).astype("float32")
Y = RNG.integers(0, CLASSES, (N, T))
PADDED_Y = np.where(STEPS, Y, -1)
WEIGHTS = RNG.uniform(0.5, 2.0, N)
IGNORING = losses.SoftmaxCrossEntropy(ignore=-1)


def tagger(backend, *first, length=T, dtype="float32"):
    """A model with outputs for each step."""
    inner = [*first, layers.Dense(6, name="hidden"), layers.Tanh(), layers.Dense(CLASSES, name="logits")]
    return xpnet.Sequential(inner, input_shape=(length, F), backend=backend, seed=0, dtype=dtype)


def trained(model, x, y, **options):
    """The history of two epochs, in steps of which most are captured."""
    options = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0, **options}
    return model.fit(x, y, **options)


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=2e-5, err_msg=name)


def close_weights(one, other):
    for name, value in one.state_dict().items():
        np.testing.assert_allclose(value, other.state_dict()[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_each_label_counts_as_a_sample(backend):
    one = tagger(backend)
    rows = xpnet.Sequential(
        [layers.Dense(6, name="hidden"), layers.Tanh(), layers.Dense(CLASSES, name="logits")],
        input_shape=(F,), backend=backend, seed=0,
    )  # fmt: skip
    flat = X.reshape(-1, F), Y.reshape(-1)
    for weights in (None, WEIGHTS):
        by_row = None if weights is None else np.repeat(weights, T)
        close(
            trained(one, X, Y, sample_weight=weights),
            trained(rows, *flat, batch_size=4 * T, sample_weight=by_row),
        )
        close_weights(one, rows)
        names = ["accuracy", metrics.TopKAccuracy(2), "log_loss"]
        scores = one.evaluate(X, Y, metrics=names, sample_weight=weights)
        close(scores, rows.evaluate(*flat, metrics=names, sample_weight=by_row))
    probabilities = np.eye(CLASSES)[Y]
    close(one.evaluate(X, probabilities), one.evaluate(X, Y))
    counts = one.evaluate(X, Y, metrics=metrics.ConfusionMatrix())["confusion_matrix"]
    assert counts.sum() == N * T


@pytest.mark.parametrize("accumulate", [1, 2])
def test_masked_steps_and_ignored_labels_do_not_count(backend, accumulate, monkeypatch):
    monkeypatch.setattr(captured_step, "_FEW_STEPS", 1)
    masked, ignoring = tagger(backend, layers.Masking()), tagger(backend)
    options = {"batch_size": 4 // accumulate, "accumulate": accumulate, "sample_weight": WEIGHTS}
    kept = trained(ignoring, X, PADDED_Y, loss=IGNORING, **options)
    close(trained(masked, X, Y, **options), kept)
    close_weights(masked, ignoring)

    logits = ignoring.predict(X).astype("float64")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = STEPS * WEIGHTS[:, None]
    loss = -(np.take_along_axis(log_p, Y[..., None], -1)[..., 0] * counted).sum() / counted.sum()
    accuracy = ((logits.argmax(-1) == Y) * counted).sum() / counted.sum()
    scores = {"loss": loss, "accuracy": accuracy}
    close(masked.evaluate(X, Y, sample_weight=WEIGHTS, batch_size=10), scores)
    close(ignoring.evaluate(X, PADDED_Y, sample_weight=WEIGHTS, batch_size=10), scores)
    assert IGNORING(logits, PADDED_Y, WEIGHTS) == pytest.approx(loss, rel=1e-5)


def test_a_mask_leaves_out_steps_of_every_loss(backend):
    masked = tagger(backend, layers.Masking(), dtype="float64")
    targets = RNG.normal(size=(N, T, CLASSES))
    errors = np.square(masked.predict(X) - targets).mean(-1)
    assert masked.evaluate(X, targets, loss="mse")["loss"] == pytest.approx(errors[STEPS].mean())
    found = xpnet.check_gradients(masked, X[:3], targets[:3], loss="mse")
    assert max(found.values()) < 1e-6
    found = xpnet.check_gradients(masked, X[:3], PADDED_Y[:3], loss=IGNORING)
    assert max(found.values()) < 1e-6


def test_a_loss_that_is_a_sum_adds_the_steps_of_all_batches_up(backend):
    targets, loss = RNG.normal(size=(N, T, CLASSES)), losses.HalfSquaredError(reduction="sum")
    models = [tagger(backend, layers.Masking()) for _ in range(2)]
    for model, accumulate in zip(models, (1, 2), strict=True):
        sgd = xpnet.optimizers.SGD(0.01)
        trained(model, X, targets, loss=loss, optimizer=sgd, batch_size=4 // accumulate, accumulate=accumulate)
    close_weights(*models)


def test_ranks_divide_by_the_labels_of_all(backend):
    single = tagger("cpu", layers.Masking())
    history = trained(single, X, Y, batch_size=9)

    def on_rank(communicator):
        model = tagger("cpu", layers.Masking())
        return trained(model, X, Y, batch_size=9, distributed=communicator), model

    for own, model in run_on_ranks(2, on_rank) if backend.name == "cpu" else ():
        close(own, history)
        close_weights(model, single)


def test_several_outputs_have_masks_of_their_own(backend):
    x = xpnet.Input((T, F), name="x")
    h = layers.Dense(6, name="hidden")(layers.Masking()(x))
    tags, score = layers.Dense(CLASSES, name="tags")(h), layers.Dense(1, name="score")(layers.GlobalMaxPool1D()(h))
    model = xpnet.Model(x, [tags, score], backend=backend, seed=0)
    assert model.masked_outputs == (True, False)
    targets = [Y, RNG.normal(size=(N, 1))]
    options = {"loss": ["softmax_cross_entropy", "mse"], "loss_weights": [1.0, 0.5]}
    history = trained(model, X, targets, **options)
    scores, (logits, out) = model.evaluate(X, targets), model.predict(X)
    assert scores["tags_loss"] == pytest.approx(IGNORING(logits, PADDED_Y), rel=1e-5)
    assert scores["score_loss"] == pytest.approx(np.square(out - targets[1]).mean(), rel=1e-5)
    assert history["tags_loss"][1] < history["tags_loss"][0]
    with pytest.raises(ArgumentError, match="accumulate needs a model with one output"):
        trained(model, X, targets, accumulate=2, **options)


def test_masks_travel_through_layers_that_keep_the_steps(backend):
    def mask_after(*inner):
        model = xpnet.Sequential([layers.Masking(), *inner], input_shape=(T, F), backend=backend, seed=0)
        model.forward(X)
        mask = model.output_masks()
        assert model.masked_outputs == (mask is not None,)
        return None if mask is None else backend.to_numpy(mask)

    block = layers.TransformerBlock(2)
    for inner in ([layers.Dropout(0.5), layers.Residual(layers.Dense(F))], [layers.Sequential([block])],
                  [layers.Conv1D(4, 3, padding="causal"), layers.Reshape((T, 2, 2))]):  # fmt: skip
        np.testing.assert_array_equal(mask_after(*inner), STEPS)
    for inner in (layers.Flatten(), layers.Conv1D(4, 2), layers.MaxPool1D(2), layers.GlobalAveragePool1D(),
                  layers.Permute((1, 0))):  # fmt: skip
        assert mask_after(inner) is None
    a, b = xpnet.Input((T, F)), xpnet.Input((T, F))
    both = xpnet.Model([a, b], layers.Add()([layers.Masking()(a), layers.Masking()(b)]), backend=backend, seed=0)
    both.forward([X, X[::-1].copy()])
    np.testing.assert_array_equal(backend.to_numpy(both.output_masks()), STEPS & STEPS[::-1])


def test_cross_attention_ignores_padded_memory_and_keeps_the_mask_of_the_query(backend):
    query, memory = xpnet.Input((T, F), name="query"), xpnet.Input((3, F), name="memory")
    hidden = [layers.Masking()(query), layers.Masking()(memory)]
    model = xpnet.Model([query, memory], layers.MultiHeadAttention(1)(hidden), backend=backend, seed=0)
    short = np.where(STEPS[:, :3, None], X[:, :3], 0.0)
    y, other = model.predict([X, short]), np.where(short == 0.0, 0.0, 2.0 * short)
    other[:, 0] = short[:, 0]
    alone = LENGTHS == 1  # only the first step of the memory counts
    np.testing.assert_allclose(y[alone], model.predict([X, other])[alone], rtol=1e-6)
    assert not np.allclose(y[~alone], model.predict([X, other])[~alone])
    model.forward([X, short])
    np.testing.assert_array_equal(backend.to_numpy(model.output_masks()), STEPS)
    targets = RNG.normal(size=(N, T, F))
    errors = np.square(y.astype("float64") - targets).mean(-1)
    assert model.evaluate([X, short], targets, loss="mse")["loss"] == pytest.approx(errors[STEPS].mean(), rel=1e-5)


def test_a_sequence_may_have_any_length(backend, tmp_path):
    model, fixed = tagger(backend, length=None), tagger(backend)
    assert model.input_shape == (None, F) and model.output_shape == (None, CLASSES)
    assert "(N, T, 6)" in model.summary()
    close(trained(model, X, Y), trained(fixed, X, Y))
    trained(model, X[:, :2], Y[:, :2])
    path = tmp_path / "m.safetensors"
    model.save(path)
    loaded = xpnet.load(path, backend=backend)
    for length in (1, T, 9):
        x = RNG.normal(size=(2, length, F)).astype("float32")
        np.testing.assert_array_equal(model.predict(x), loaded.predict(x))
    assert_same_state(model.state_dict(), loaded.state_dict())
    with pytest.raises(ShapeError, match=r"x must have shape \(N, T, 4\).*has \(2, 3, 5\)"):
        model.predict(np.zeros((2, 3, 5)))
    with pytest.raises(ShapeError, match="need targets"):
        trained(model, X, Y[:, 1:])


def test_sequences_without_steps_and_of_different_lengths_are_refused():
    with pytest.raises(DataError, match=r"x is empty: it has shape \(2, 0, 4\)"):
        tagger("cpu", length=None).predict(X[:2, :0])
    a, b = xpnet.Input((None, F)), xpnet.Input((None, F))
    for merge in (layers.Add(), layers.Concatenate(), layers.Dot()):
        model = xpnet.Model([a, b], merge([a, b]), backend="cpu")
        assert model.predict([X, X]).shape[:2] == (N, T)
        for other in (X[:, :3], X[:, :1]):
            with pytest.raises(ShapeError, match="sequences of one length"):
                model.predict([X, other])
    with pytest.raises(ShapeError, match=r"inputs of one shape, .*the input is \(N, T, 4\), \(N, 5, 4\)"):
        layers.Add()([a, xpnet.Input((T, F))])


@pytest.mark.parametrize("layer", [layers.Flatten(), layers.Reshape((-1,)), layers.Permute((1, 0))], ids=repr)
def test_layers_that_need_a_length_refuse_an_open_axis(layer):
    with pytest.raises(ShapeError, match=r"the input is \(N, T, 4\)"):
        xpnet.Sequential([layer], input_shape=(None, F), backend="cpu")


def test_labels_of_pixels(backend):
    x, y = RNG.normal(size=(6, 4, 4, 2)).astype("float32"), RNG.integers(0, CLASSES, (6, 4, 4))
    model = xpnet.Sequential(
        [layers.Conv2D(CLASSES, 3, padding="same")], input_shape=(4, 4, 2), backend=backend, seed=0
    )
    history = trained(model, x, y, epochs=4, batch_size=2)
    assert history["loss"][-1] < history["loss"][0]
    accuracy = (model.predict(x).argmax(-1) == y).mean()
    assert model.evaluate(x, y)["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"y": np.full((N, T), -1), "loss": IGNORING}, DataError, "all labels are -1"),
        ({"y": np.full((N, T), 7), "loss": IGNORING}, DataError, "labels range from 7 to 7"),
        ({"y": np.eye(CLASSES)[Y], "loss": IGNORING}, DataError, "needs integer labels"),
        ({"y": Y, "class_weight": {0: 2.0}}, ArgumentError, "several labels"),
        ({"y": Y[:, :2]}, ShapeError, r"must be \(N, 5\) labels or \(N, 5, 3\)"),
        ({"y": Y[:, 0]}, ShapeError, "End it with Flatten and Dense"),
    ],
)
def test_targets_that_do_not_fit_sequences_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        tagger("cpu").fit(X, epochs=1, verbose=0, **arguments)


def test_mixup_refuses_samples_of_several_labels():
    with pytest.raises(ArgumentError, match="one label each"):
        tagger("cpu", augment.MixUp()).fit(X, Y, verbose=0)
