"""Training, evaluation and prediction of models with several inputs and outputs."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from precisions import require_precision
from small_models import assert_same_state
from threads_as_ranks import run_on_ranks
from two_headed import DIGIT, LOSSES, META, SCENE, SIZE, WEIGHTS, N, X, Y, fitted, two_headed

import xpnet
from xpnet import augment, callbacks, datasets, layers, losses, metrics, optimizers
from xpnet.data.streaming import StreamingDataset
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, StateError
from xpnet.training import captured_inference, captured_step
from xpnet.training.captured_step import StepExecutor

NAMED_X, NAMED_Y = {"meta": META, "scene": SCENE}, {"size": SIZE, "digit": DIGIT}


@pytest.fixture
def executors(monkeypatch):
    """What each run has captured: (kinds of steps, why none is captured)."""
    seen, close = [], StepExecutor.close

    def closed(self):
        close(self)
        seen.append((self.captured, self.fallback_reason))

    monkeypatch.setattr(StepExecutor, "close", closed)
    monkeypatch.setattr(captured_step, "_FEW_STEPS", 1)
    return seen


def cross_entropy(logits, labels):
    logits = logits - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]


# Losses --------------------------------------------------------------------------------------------------------------


def test_names_mean_the_same_as_positions(backend):
    one, other = two_headed(backend), two_headed(backend)
    weights, metric = [WEIGHTS[0], None], [["accuracy", metrics.TopKAccuracy(2)], "mae"]
    histories = [
        fitted(one, X, Y, loss=list(LOSSES.values()), loss_weights=[1.0, 0.5], metrics=metric, sample_weight=weights,
               validation_data=(X, Y, weights)),
        fitted(other, NAMED_X, NAMED_Y, loss_weights={"size": 0.5}, metrics=dict(zip(LOSSES, metric, strict=True)),
               sample_weight={"digit": WEIGHTS[0]}, validation_data=(NAMED_X, NAMED_Y, {"digit": WEIGHTS[0]})),
    ]  # fmt: skip
    assert histories[0] == histories[1]
    names = ["loss", "digit_loss", "size_loss", "digit_accuracy", "digit_top_k_accuracy", "size_mae"]
    assert list(histories[0]) == [*names, *(f"val_{name}" for name in names), "learning_rate"]
    assert_same_state(one.state_dict(), other.state_dict())
    for a, b in zip(one.predict(X), other.predict(NAMED_X), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.evaluate(X, Y) == other.evaluate(NAMED_X, NAMED_Y)


@pytest.mark.parametrize(
    ("given", "of_digit", "of_size"),
    [
        (None, np.ones(N), np.ones(N)),
        (WEIGHTS[0], WEIGHTS[0], WEIGHTS[0]),
        (list(WEIGHTS), WEIGHTS[0], WEIGHTS[1]),
        ([None, WEIGHTS[1]], np.ones(N), WEIGHTS[1]),
    ],
    ids=["no weights", "for all outputs", "for each output", "for one output"],
)
def test_losses_and_metrics_are_those_of_their_formulas(backend, given, of_digit, of_size):
    model = two_headed(backend)
    result = model.evaluate(X, Y, LOSSES, metrics=["accuracy", "mae"], loss_weights=[0.5, 2], sample_weight=given)
    logits, size = model.predict(X)
    mean = np.average
    digit_loss = mean(cross_entropy(logits, DIGIT), weights=of_digit)
    size_loss = mean((size - SIZE)[:, 0] ** 2, weights=of_size)
    penalty = 1e-3 * (model.state_dict()["1.weight"].astype(float) ** 2).sum()
    assert result == pytest.approx({
        "loss": 0.5 * digit_loss + 2 * size_loss + penalty, "digit_loss": digit_loss, "size_loss": size_loss,
        "digit_accuracy": mean(logits.argmax(axis=1) == DIGIT, weights=of_digit),
        "size_mae": mean(np.abs(size - SIZE)[:, 0], weights=of_size),
    }, rel=1e-5)  # fmt: skip


def test_a_step_descends_the_weighted_sum(backend):
    """The update of SGD is that of the gradient of Σ λ L by central differences."""
    kwargs = {"loss": LOSSES, "sample_weight": list(WEIGHTS), "loss_weights": [0.5, 2.0], "metrics": []}
    model = two_headed(backend, "float64")
    before = model.state_dict()
    name, h = "1.weight", 1e-6
    numeric = np.zeros_like(before[name])
    for index in np.ndindex(numeric.shape):
        values = []
        for sign in (1, -1):
            moved = before[name].copy()
            moved[index] += sign * h
            model.load_state_dict({**before, name: moved})
            values.append(model.evaluate(X, Y, **kwargs)["loss"])
        numeric[index] = (values[0] - values[1]) / (2 * h)
    model.load_state_dict(before)
    model.train_on_batch(X, Y, optimizer=optimizers.SGD(1.0), **kwargs)
    np.testing.assert_allclose(before[name] - model.state_dict()[name], numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weights", [None, WEIGHTS[0], list(WEIGHTS)], ids=["", "for all", "for each"])
def test_accumulated_batches_equal_a_larger_batch(backend, weights):
    one, other = two_headed(backend, "float64"), two_headed(backend, "float64")
    options = {"sample_weight": weights, "loss_weights": [0.5, 2.0], "optimizer": "sgd"}
    fitted(one, batch_size=8, accumulate=2, **options)
    fitted(other, batch_size=16, **options)
    for name, value in one.state_dict().items():
        np.testing.assert_allclose(value, other.state_dict()[name], rtol=1e-12)


def test_class_weights_belong_to_an_output(backend):
    table = {0: 3.0, 2: 0.25}
    by_class = np.array([3.0, 1.0, 0.25])[DIGIT]
    one, other = two_headed(backend, "float64"), two_headed(backend, "float64")
    fitted(one, class_weight={"digit": table}, optimizer="sgd")
    fitted(other, sample_weight=[by_class, None], optimizer="sgd")
    for name, value in one.state_dict().items():
        np.testing.assert_allclose(value, other.state_dict()[name], rtol=1e-12)
    counts = np.bincount(DIGIT)
    balanced = fitted(two_headed(backend), class_weight=["balanced", None])
    assert balanced == fitted(two_headed(backend), class_weight=[N / (len(counts) * counts), None])


def test_sums_over_samples_and_means_go_together():
    model, both = two_headed(), [losses.SoftmaxCrossEntropy(), losses.HalfSquaredError(reduction="sum")]
    result = model.evaluate(X, Y, both)
    logits, size = model.predict(X)
    assert result["digit_loss"] == pytest.approx(cross_entropy(logits, DIGIT).mean(), rel=1e-5)
    assert result["size_loss"] == pytest.approx(0.5 * ((size - SIZE) ** 2).sum(), rel=1e-5)
    errors = xpnet.check_gradients(model, X, Y, both, loss_weights=[2.0, 0.1])
    assert max(errors.values()) < 1e-6


def test_gradients_are_checked_with_respect_to_each_input():
    errors = xpnet.check_gradients(two_headed(noise=0.3), X, Y, LOSSES, inputs=True)
    assert {"inputs.scene", "inputs.meta", "digit.weight", "size.bias"} <= errors.keys()
    assert max(errors.values()) < 1e-6


def test_one_loss_is_that_of_all_outputs():
    image = xpnet.Input((5,))
    model = xpnet.Model(image, [layers.Dense(2, name=name)(image) for name in "ab"], "cpu")
    targets = [SCENE[:, :2], SCENE[:, 1:3]]
    one = model.evaluate(SCENE, targets, "mae", metrics="mse")
    assert one == model.evaluate(SCENE, targets, ["mae", "mae"], metrics={"a": "mse", "b": ["mse"]})
    assert list(one) == ["loss", "a_loss", "b_loss", "a_mse", "b_mse"]
    assert list(model.evaluate(SCENE, targets, "mae", metrics={"b": "mse"})) == ["loss", "a_loss", "b_loss", "b_mse"]


def test_a_model_with_one_input_and_output_takes_names_too(backend):
    x = xpnet.Input((5,), name="scene")
    graph = xpnet.Model(x, layers.Dense(3, name="digit")(x), backend)
    chain = xpnet.Sequential([layers.Dense(3, name="digit")], (5,), backend)
    options = {"loss": "softmax_cross_entropy", "sample_weight": WEIGHTS[0], "class_weight": {1: 2}}
    plain = fitted(chain, SCENE, DIGIT, **options)
    named = {name: {"digit": value} for name, value in {**options, "metrics": "accuracy"}.items()}
    assert fitted(graph, {"scene": SCENE}, {"digit": DIGIT}, **named) == plain
    assert list(plain) == ["loss", "accuracy", "learning_rate"]
    np.testing.assert_array_equal(graph.predict({"scene": SCENE}), chain.predict({"input_1": SCENE}))


# Passes --------------------------------------------------------------------------------------------------------------


def test_predictions_are_lists_that_do_not_depend_on_batches(backend):
    model = two_headed(backend)
    whole = model.predict(X)
    assert isinstance(whole, list) and [a.shape for a in whole] == [(N, 3), (N, 1)]
    for a, b, c in zip(whole, model.predict(X, batch_size=7), model.predict(X, as_device=True), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        assert isinstance(a, np.ndarray) and isinstance(c, backend.xp.ndarray)
        np.testing.assert_array_equal(a, backend.to_numpy(c))


def test_a_loop_by_hand_equals_train_on_batch(backend):
    one, other, optimizer = two_headed(backend, noise=0.2), two_headed(backend, noise=0.2), optimizers.Adam()
    for _ in range(3):
        one.train_on_batch(X, Y, LOSSES, optimizer, loss_weights=[1.0, 0.5])
        outputs = other.forward(X, training=True)
        assert isinstance(outputs, list)
        grads = [
            losses.get(loss).gradient(backend, y, backend.asarray(t, dtype=dtype)) * (factor / N)
            for loss, y, t, dtype, factor in zip(
                LOSSES.values(), outputs, Y, ["int64", "float32"], [1.0, 0.5], strict=True
            )
        ]
        grad_x = other.backward(dict(zip(LOSSES, grads, strict=True)))
        assert [a.shape for a in grad_x] == [SCENE.shape, META.shape]
        other.apply_gradients(optimizer)
    for name, value in one.state_dict().items():
        np.testing.assert_allclose(value, other.state_dict()[name], rtol=1e-5, atol=1e-7)


def test_predictions_of_several_threads_beside_a_training_are_exact():
    model, other = two_headed(), two_headed()
    want = other.predict(X)
    with ThreadPoolExecutor(4) as pool:
        training = pool.submit(fitted, model, epochs=20)
        predicted = [pool.submit(other.predict, NAMED_X, 8) for _ in range(20)]
        during = [pool.submit(model.predict, X) for _ in range(20)]
    assert np.isfinite(training.result()["loss"]).all()
    for result in predicted:
        for a, b in zip(result.result(), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert all(np.isfinite(a).all() for result in during for a in result.result())


def test_probabilities_of_each_output():
    x = xpnet.Input((5,))
    outputs = [layers.Dense(3, name="kind")(x), layers.Dense(1, name="odd")(x),
               layers.Softmax(name="share")(layers.Dense(4)(x))]  # fmt: skip
    model = xpnet.Model(x, outputs, "cpu")
    kind, odd, share = model.predict_proba(SCENE)
    assert [a.shape for a in (kind, odd, share)] == [(N, 3), (N, 2), (N, 4)]
    for p in (kind, odd, share):
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(share, model.predict(SCENE)[2])
    model = two_headed()
    fitted(model, epochs=1)
    with pytest.raises(ArgumentError, match="output 'size' of this model was trained with MeanSquaredError"):
        model.predict_proba(X)


def test_a_loss_on_logits_after_a_softmax_warns_with_the_name_of_the_output():
    x = xpnet.Input((5,))
    logits = layers.Dense(3, name="logits")(x)
    model = xpnet.Model(x, [logits, layers.Softmax(name="share")(logits)], "cpu")
    with pytest.warns(UserWarning, match="its output 'share' is probabilities: leave out its layer Softmax"):
        model.evaluate(SCENE, [DIGIT, DIGIT], "softmax_cross_entropy")


# Captures ------------------------------------------------------------------------------------------------------------

KINDS = {
    "plain": {},
    "weights": {"sample_weight": WEIGHTS[0]},
    "weights of each output": {"sample_weight": list(WEIGHTS), "class_weight": {"digit": "balanced"}},
    "accumulated": {"accumulate": 2},
    "all samples": {"batch_size": None},
    "not shuffled": {"shuffle": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_equal_eager_ones_bit_for_bit_on_the_cpu(kind, executors, monkeypatch):
    results = []
    for capture in ("1", "0"):
        monkeypatch.setenv("XPNET_CAPTURE", capture)
        model = two_headed(noise=0.2)
        history = fitted(model, epochs=8, loss_weights=[1.0, 0.3], validation_split=0.2, **KINDS[kind])
        results.append((history, model.state_dict()))
    assert executors[0][0] > 0 and executors[1] == (0, "the environment variable XPNET_CAPTURE=0 turns captures off")
    assert results[0][0] == results[1][0]
    assert_same_state(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_equal_eager_ones_on_a_gpu(gpu, kind, executors):
    model, other = two_headed(gpu, noise=0.2), two_headed("cpu", noise=0.2)
    options = {"epochs": 8, "loss_weights": [1.0, 0.3], "validation_split": 0.2, **KINDS[kind]}
    history, want = fitted(model, **options), fitted(other, **options)
    assert executors[0][0] > 0 and executors[0][1] is None
    for name, values in want.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-3, atol=1e-5)
    for name, value in other.state_dict().items():
        np.testing.assert_allclose(model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weights", [None, list(WEIGHTS)], ids=["", "weights of each output"])
def test_predictions_and_evaluations_are_captured(backend, monkeypatch, weights):
    monkeypatch.setattr(captured_inference, "_EAGER_ON_CPU", 2)
    model = two_headed(backend)
    options = {"loss": LOSSES, "loss_weights": [1.0, 0.5], "sample_weight": weights, "batch_size": 20}

    def results():
        evaluated = [model.evaluate(X, Y, metrics=names, **options) for names in (["accuracy", "mae"], [None, []])]
        return [*model.predict(NAMED_X, batch_size=20), *evaluated]

    for _ in range(4):
        fitted(model, epochs=1)
        got = results()
        with monkeypatch.context() as patch:
            patch.setattr(captured_inference.CapturedInference, "replayed", lambda *args: None)
            want = results()
        for a, b in zip(got, want, strict=True):
            np.testing.assert_equal(a, b)
    captured = [kind for kind in model._inference._kinds if kind.captured is not None]
    assert len(captured) == {"strict": 0, "cpu": 1}.get(backend.name, 3)


def test_a_captured_evaluation_scores_the_output_that_was_asked_for(gpu):
    """The metrics of two outputs may be equal objects, but are not the same values."""
    tensor = xpnet.Input((5,))
    model = xpnet.Model(tensor, [layers.Dense(3, name=name)(tensor) for name in "ab"], gpu)
    loss = "softmax_cross_entropy"
    for name in [*"aaaaaaaa", *"bbbbbbbb"]:
        got = model.evaluate(SCENE, [DIGIT, DIGIT], loss, metrics={name: "accuracy"})[f"{name}_accuracy"]
        assert got == np.mean(model.predict(SCENE)["ab".index(name)].argmax(axis=1) == DIGIT)


def test_a_step_is_explained_without_and_with_a_loss():
    model = two_headed()
    text = str(xpnet.explain_step(model, 8))
    assert "digit Dense.forward" in text and "load x_1" in text and "load y_0" in text
    assert str(xpnet.explain_step(model, 8, loss=LOSSES)) == text
    fitted(model, metrics={"size": ["mae"]})
    assert any(call.name == "absolute" for call in xpnet.explain_step(model, 8).replayed)


def test_the_memory_of_a_step_is_known_before_any_training(gpu):
    assert "memory of a training step" in two_headed().summary(batch_size=8)
    assert "memory of a training step" in two_headed(gpu).summary(batch_size=8)


def test_the_loss_scale_of_float16_multiplies_the_gradients_of_all_outputs(gpu):
    require_precision(gpu, "float16")
    states = []
    for precision in (None, "float16"):
        tensor = xpnet.Input((5,))
        outputs = [layers.Dense(3, name="digit")(tensor), layers.Dense(1, name="size")(tensor)]
        model = xpnet.Model(tensor, outputs, gpu, precision=precision)
        # The gradients are below the smallest numbers of float16.
        fitted(model, SCENE, Y, optimizer=optimizers.SGD(1e7), loss_weights=[1e-8, 1e-8])
        states.append(model.state_dict())
    for name, value in states[0].items():
        np.testing.assert_allclose(states[1][name], value, rtol=0.01, atol=1e-3)


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 4, 7])
@pytest.mark.parametrize("weights", [None, list(WEIGHTS)], ids=["", "weights of each output"])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, stop, weights):
    path = tmp_path / "state.safetensors"

    class Stop(callbacks.Callback):
        def on_step_end(self, model, step):
            if step == stop:
                self.run.save(path)
                raise RuntimeError

    options = {"epochs": 3, "sample_weight": weights, "loss_weights": [1.0, 0.5], "validation_split": 0.2,
               "metrics": ["accuracy", "r2"]}  # fmt: skip
    whole = two_headed(noise=0.2)
    history = fitted(whole, **options)
    stopped, resumed = two_headed(noise=0.2), two_headed(noise=0.2)
    with pytest.raises(RuntimeError):
        fitted(stopped, callbacks=[Stop()], **options)
    assert fitted(resumed, resume_from=path, **options) == history
    assert_same_state(resumed.state_dict(), whole.state_dict())
    for change in ({"loss_weights": [1.0, 0.6]}, {"metrics": ["accuracy", "mae"]}, {"loss": [LOSSES["digit"], "mae"]}):
        with pytest.raises(ArgumentError, match="the checkpoint is from a fit with"):
            fitted(two_headed(noise=0.2), resume_from=path, **{**options, **change})


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("weights", [None, list(WEIGHTS)], ids=["", "weights of each output"])
def test_ranks_train_like_one_process(size, weights):
    def train(group):
        model = two_headed(noise=0.2)
        history = fitted(model, distributed=group, sample_weight=weights, batch_size=7, validation_split=0.2)
        return history, model.state_dict()

    want = two_headed(noise=0.2)
    history = fitted(want, sample_weight=weights, batch_size=7, validation_split=0.2)
    for got, state in run_on_ranks(size, train):
        for name, values in history.items():
            np.testing.assert_allclose(got[name], values, rtol=1e-5)
        for name, value in want.state_dict().items():
            np.testing.assert_allclose(state[name], value, rtol=1e-4, atol=1e-6)


def test_callbacks_watch_the_values_of_an_output(tmp_path, capsys):
    log = tmp_path / "log.csv"
    stopping = callbacks.EarlyStopping(monitor="val_digit_accuracy", patience=0)
    fitted(two_headed(), epochs=30, callbacks=[stopping, callbacks.CSVLogger(log)], validation_split=0.3, verbose=2)
    assert stopping.run.history.stopped
    assert "val_digit_accuracy 0." in capsys.readouterr().out
    assert "digit_loss,size_loss,digit_accuracy,val_loss" in log.read_text().splitlines()[0]
    with pytest.raises(ArgumentError, match=r"no 'digit_acuracy' to monitor.*Did you mean 'digit_accuracy'"):
        fitted(two_headed(), callbacks=[callbacks.EarlyStopping(monitor="digit_acuracy")])


def test_a_loss_that_becomes_nan_in_one_output_stops_the_training():
    model = two_headed()
    before = model.state_dict()
    with pytest.raises(xpnet.errors.DivergenceError, match="the loss became NaN or infinite in epoch 1, at step [23]"):
        fitted(model, loss_weights=[0.0, 1.0], optimizer=optimizers.SGD(1e30))
    assert_same_state(model.state_dict(), before)


# Streams -------------------------------------------------------------------------------------------------------------


def in_batches(x, y, *weights):
    def of(value, rows):
        if isinstance(value, dict):
            return {name: a[rows] for name, a in value.items()}
        return [a[rows] for a in value] if isinstance(value, list) else value[rows]

    return [tuple(of(value, slice(i, i + 16)) for value in (x, y, *weights)) for i in range(0, N, 16)]


@pytest.mark.parametrize("weights", [(), (WEIGHTS[0],), (list(WEIGHTS),)], ids=["", "for all", "for each"])
def test_streams_of_structured_batches_and_arrays_equal_arrays_in_memory(backend, weights):
    given = {"sample_weight": weights[0]} if weights else {}
    want = fitted(two_headed(backend), shuffle=False, validation_data=(X, Y, *weights), **given)
    streams = [in_batches(X, Y, *weights), datasets.Stream(X, Y, *weights)]
    if not weights:
        streams += [in_batches(NAMED_X, NAMED_Y), datasets.Stream(NAMED_X, NAMED_Y)]
    for stream in streams:
        got = fitted(two_headed(backend), stream, None, shuffle=False, validation_data=(stream, None))
        for name, values in want.items():
            np.testing.assert_allclose(got[name], values, rtol=1e-6)


def test_batches_with_weights_for_all_outputs_for_each_and_without():
    batches = in_batches(X, Y)
    batches[1] = (*batches[1], WEIGHTS[0][16:32])
    batches[2] = (*batches[2], [None, WEIGHTS[1][32:48]])
    joined = np.ones((2, N))
    joined[:, 16:32], joined[1, 32:48] = WEIGHTS[0][16:32], WEIGHTS[1][32:48]
    want = fitted(two_headed(), shuffle=False, accumulate=4, sample_weight=list(joined))
    got = fitted(two_headed(), batches, None, accumulate=4)
    for name, values in want.items():
        assert got[name] == pytest.approx(values, rel=1e-6)


def test_files_that_are_mapped_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("xpnet.data.streaming._MAX_LOADED_BYTES", 100)
    files = []
    for name, array in NAMED_X.items():
        np.save(tmp_path / f"{name}.npy", array.astype("float32"))
        files.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    x = dict(zip(NAMED_X, files, strict=True))
    model, other = two_headed(), two_headed()
    fitted(model, x, NAMED_Y, batch_size=N)
    fitted(other, NAMED_X, NAMED_Y, batch_size=N)
    for a, b in zip(model.predict(x, batch_size=7), other.predict(X), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_one_mapped_input_of_several_outputs_is_used_where_it_is(monkeypatch):
    rng = np.random.default_rng(0)
    x, labels, numbers = rng.normal(size=(2048, 128)).astype("float32"), np.arange(2048) % 3, rng.normal(size=(2048, 1))
    weights = rng.uniform(size=(2, 2048))

    def history(*data, **options):
        tensor = xpnet.Input((128,))
        outputs = [layers.Dense(3, name="digit")(tensor), layers.Dense(1, name="size")(tensor)]
        return fitted(xpnet.Model(tensor, outputs, "cpu"), *data, shuffle=False, batch_size=512, epochs=2, **options)

    want = history(x, [labels, numbers], sample_weight=list(weights))
    monkeypatch.setattr(StreamingDataset, "_read", None)  # which copies windows
    got = history(datasets.Stream(x, [labels, numbers], list(weights), block=512), None)
    for name, values in want.items():
        assert got[name] == pytest.approx(values, rel=1e-6)


def test_ranks_read_their_rows_of_a_stream_of_several_arrays():
    def train(group):
        stream = datasets.Stream(X, NAMED_Y, list(WEIGHTS), block=16)
        return fitted(two_headed(), stream, None, shuffle=False, batch_size=8, distributed=group)

    want = fitted(two_headed(), shuffle=False, batch_size=8, sample_weight=list(WEIGHTS))
    for got in run_on_ranks(3, train):
        for name, values in want.items():
            assert got[name] == pytest.approx(values, rel=1e-5)


def test_the_data_of_ranks_are_compared_for_all_inputs():
    def train(group):
        scene = SCENE + group.rank
        return fitted(two_headed(), [SCENE, META] if group.rank == 0 else [scene, META], Y, distributed=group)

    with pytest.raises(xpnet.errors.DistributedError, match="the data"):
        run_on_ranks(2, train)


# Custom code ---------------------------------------------------------------------------------------------------------


class WritesInto(losses.Loss):
    def samples(self, backend, outputs, targets):
        return backend.xp.square(outputs - targets).sum(axis=1)

    def gradient(self, backend, outputs, targets):
        outputs -= targets
        return outputs


class Distance(losses.Loss):
    def samples(self, backend, outputs, targets):
        return 0.5 * backend.xp.square(outputs - targets).sum(axis=1)

    def gradient(self, backend, outputs, targets):
        return outputs - targets


class Bias(metrics.Metric):
    name = "bias"

    def sums(self, backend, outputs, targets, weights):
        assert outputs.shape[1:] == (1,)
        return backend.xp.stack([(outputs - targets).sum(), backend.xp.ones(len(outputs)).sum()])


class Scaled(layers.Layer):
    """Two inputs, of which the second scales the first."""

    def build(self, input_shapes):
        return input_shapes[0]

    def forward(self, inputs):
        self.work.inputs = inputs
        return inputs[0] * inputs[1]

    def backward(self, grad_y):
        a, b = self.work.inputs
        return [grad_y * b, (grad_y * a).sum(axis=1, keepdims=True)]


class ForgetsOne(Scaled):
    def backward(self, grad_y):
        return [super().backward(grad_y)[0], None]


def scaled(layer, backend="cpu"):
    x, scale = xpnet.Input((4,)), xpnet.Input((1,))
    h = layer([layers.Dense(3)(x), layers.Dense(1)(scale)])
    return xpnet.Model([x, scale], [layers.Dense(2, name="a")(h), layers.Dense(1, name="b")(h)], backend)


def test_custom_losses_metrics_and_layers_of_several_inputs(backend):
    x, y = [SCENE[:, :4], META[:, :1]], [DIGIT % 2, SIZE]
    model = scaled(Scaled(), backend)
    history = fitted(model, x, y, loss=["softmax_cross_entropy", Distance()], metrics=[None, Bias()], epochs=3)
    assert list(history) == ["loss", "a_loss", "b_loss", "a_accuracy", "b_bias", "learning_rate"]
    assert history["b_loss"][-1] < history["b_loss"][0]
    wanted = ["softmax_cross_entropy", Distance()]
    assert max(xpnet.check_gradients(model, x, y, wanted, samples=8, inputs=True).values()) < 1e-6


class Annealed(Distance):
    """Distance times a factor, which a callback changes."""

    def __init__(self):
        self.factor = 0.0

    def samples(self, backend, outputs, targets):
        return self.factor * super().samples(backend, outputs, targets)

    def gradient(self, backend, outputs, targets):
        return self.factor * super().gradient(backend, outputs, targets)


class Anneal(callbacks.Callback):
    def __init__(self, loss):
        self.loss = loss

    def on_epoch_begin(self, model, epoch):
        self.loss.factor = 0.25 * epoch


def test_a_custom_loss_that_a_callback_changes_is_captured_anew(executors, monkeypatch):
    results = []
    for capture in ("1", "0"):
        monkeypatch.setenv("XPNET_CAPTURE", capture)
        model, loss = two_headed(), Annealed()
        losses_ = [LOSSES["digit"], loss]
        results.append((fitted(model, loss=losses_, epochs=4, callbacks=[Anneal(loss)]), model.state_dict()))
    assert executors[0][0] > 0
    assert results[0][0] == results[1][0] and results[0][0]["size_loss"][0] == 0 < results[0][0]["size_loss"][1]
    assert_same_state(results[0][1], results[1][1])


def test_custom_code_that_misbehaves_is_named_and_nothing_changes(backend):
    model = two_headed(backend)
    before = model.state_dict()
    with pytest.raises(StateError, match="WritesInto: gradient has written into the outputs"):
        fitted(model, loss=["softmax_cross_entropy", WritesInto()])
    assert_same_state(model.state_dict(), before)
    with pytest.raises(ShapeError, match="ForgetsOne"):
        fitted(scaled(ForgetsOne(), backend), [SCENE[:, :4], META[:, :1]], [SIZE @ [[1.0, 2.0]], SIZE], loss="mse")


# Mistakes ------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "x as one array": ({"x": SCENE}, ArgumentTypeError, "x: the model has 2 inputs, so give a list or a dict"),
    "x with too many arrays": ({"x": [SCENE, META, META]}, ArgumentError, "x: the model has 2 inputs, but.* length 3"),
    "x with a misspelled name": ({"x": {"scene": SCENE, "mata": META}}, ArgumentError,
                                 "x: unknown input 'mata'. Did you mean 'meta'"),
    "x without a name": ({"x": {"scene": SCENE}}, ArgumentError, "x: there is nothing for the input 'meta'"),
    "x in another order": ({"x": [META, SCENE]}, ShapeError, r"x \(input 'scene'\) must have shape \(N, 5\)"),
    "x of other lengths": ({"x": [SCENE, META[:-1]]}, DataError,
                           r"x \(input 'scene'\) has 60 samples, but x \(input 'meta'\) has 59"),
    "x with NaN": ({"x": [SCENE, META * np.nan]}, DataError, r"x \(input 'meta'\) contains NaN"),
    "x without y": ({"y": None}, ArgumentTypeError, "y is missing: give targets"),
    "x by name without y": ({"x": NAMED_X, "y": None}, ArgumentTypeError, "y is missing: give targets"),
    "y as one array": ({"y": DIGIT}, ArgumentTypeError, "y: the model has 2 outputs"),
    "y without a name": ({"y": {"size": SIZE}}, ArgumentError, "y: there is nothing for the output 'digit'"),
    "y of another length": ({"y": [DIGIT[:5], SIZE]}, DataError, r"but y \(output 'digit'\) has 5 targets"),
    "y out of range": ({"y": [DIGIT + 1, SIZE]}, DataError, r"y \(output 'digit'\): SoftmaxCrossEntropy: labels"),
    "a loss too many": ({"loss": ["mse"] * 3}, ArgumentError, "loss: the model has 2 outputs"),
    "a loss for an unknown output": ({"loss": {**LOSSES, "sice": "mse"}}, ArgumentError, "loss: unknown output 'sice'"),
    "a missing loss": ({"loss": {"size": "mse"}}, ArgumentError, "loss: there is nothing for the output 'digit'"),
    "a negative factor": ({"loss_weights": [1, -1]}, ArgumentError, "loss_weights: size must be a finite number"),
    "a factor too many": ({"loss_weights": [1, 1, 1]}, ArgumentError, "loss_weights: the model has 2 outputs"),
    "a factor for all": ({"loss_weights": 0.5}, ArgumentTypeError, "loss_weights: the model has 2 outputs.*not 0.5."),
    "metrics of three outputs": ({"metrics": ["mse"] * 3}, ArgumentError, "metrics: the model has 2 outputs"),
    "a metric of an unknown output": ({"metrics": {"digits": "accuracy"}}, ArgumentError, "Did you mean 'digit'"),
    "a metric for the wrong output": ({"metrics": [None, "accuracy"]}, DataError, "size_accuracy: each output is"),
    "weights of an unknown output": ({"sample_weight": {"x": WEIGHTS[0]}}, ArgumentError, "sample_weight: unknown out"),
    "weights of another length": ({"sample_weight": [None, WEIGHTS[1][:3]]}, ShapeError,
                                  r"sample_weight \(output 'size'\) must have shape \(60,\)"),
    "weights of 0": ({"sample_weight": [None, 0 * WEIGHTS[1]]}, DataError, r"sample_weight \(output 'size'\) must not"),
    "class weights for all": ({"class_weight": {0: 2.0}}, ArgumentError, r"as in \{'digit': \{0: 2.0\}, …\}"),
    "class weights of numbers": ({"class_weight": {"size": {0: 2.0}}}, ArgumentError,
                                 "^output 'size': class_weight needs a classification loss"),
    "balanced classes of numbers": ({"class_weight": "balanced"}, ArgumentError, "^output 'size': class_weight needs"),
    "one array to validate": ({"validation_data": (SCENE, Y)}, ArgumentTypeError, "^validation x: the model has 2 inp"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_before_training(mistake):
    changed, error, message = MISTAKES[mistake]
    model = two_headed()
    before = model.state_dict()
    with pytest.raises(error, match=message):
        fitted(model, **{"x": X, "y": Y, **changed})
    assert_same_state(model.state_dict(), before)
    assert np.isfinite(fitted(model)["loss"]).all()


def test_mistakes_in_other_methods_are_named_too():
    model = two_headed()
    with pytest.raises(ArgumentError, match="x: unknown input 'scenes'. Did you mean 'scene'"):
        model.predict({"scenes": SCENE, "meta": META})
    outputs = model.forward(X)
    with pytest.raises(ShapeError, match=r"grad_output \(output 'size'\) must have the shape of the outp.* \(60, 1\)"):
        model.backward([outputs[0], outputs[0]])
    with pytest.raises(ArgumentError, match="batch 1 of the stream: y: there is nothing for the output 'size'"):
        fitted(model, [(X, {"digit": DIGIT})], None)
    with pytest.raises(ArgumentError, match="loss_weights are for models with several outputs"):
        xpnet.Sequential([layers.Dense(1)], (3,), "cpu").fit(META, SIZE, loss="mse", loss_weights=[1.0], verbose=0)
    x = xpnet.Input((3,))
    named = xpnet.Model(x, [layers.Dense(1, name=name)(x) for name in ("a", "a_b")], "cpu")
    metric = metrics.MeanSquaredError()
    metric.name = "b_loss"
    with pytest.raises(ArgumentError, match="would be called 'a_b_loss'"):
        named.evaluate(META, [SIZE, SIZE], "mse", metrics={"a": metric})


def test_mixup_of_one_of_several_inputs_is_refused():
    a, b = xpnet.Input((4, 4, 1)), xpnet.Input((3,))
    h = layers.Concatenate()([layers.Flatten()(augment.MixUp()(a)), b])
    model = xpnet.Model([a, b], layers.Dense(1)(h), "cpu")
    x = [np.ones((N, 4, 4, 1)), META]
    with pytest.raises(ArgumentError, match="MixUp mixes samples of one input, but this model has 2"):
        model.fit(x, SIZE, loss="mse", verbose=0)
    assert model.evaluate(x, SIZE, "mse")["loss"] > 0


@pytest.mark.parametrize("weights", [None, WEIGHTS[0]], ids=["", "weights"])
def test_mixup_mixes_the_targets_of_all_outputs(backend, weights):
    """The mean of two losses of one number each is the loss of both numbers."""
    images, targets = np.random.default_rng(0).random((N, 4, 4, 1)), np.concatenate([SIZE, META[:, :1]], axis=1)
    x = xpnet.Input((4, 4, 1))
    h = layers.Flatten()(augment.MixUp()(x))
    each = xpnet.Model(x, [layers.Dense(1, name="a")(h), layers.Dense(1, name="b")(h)], backend)
    both = xpnet.Sequential([augment.MixUp(), layers.Flatten(), layers.Dense(2)], (4, 4, 1), backend)
    weight = both.state_dict()["2.weight"]
    each.load_state_dict({"a.weight": weight[:, :1], "b.weight": weight[:, 1:]}, strict=False)
    options = {"loss": "mse", "optimizer": optimizers.SGD(0.1), "metrics": []}
    want = fitted(both, images, targets, sample_weight=weights, **options)
    of_each = None if weights is None else [weights, weights]
    options |= {"sample_weight": of_each, "loss_weights": [0.5, 0.5]}
    got = fitted(each, images, [targets[:, :1], targets[:, 1:]], **options)
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
    state = each.state_dict()
    both_weights = np.concatenate([state["a.weight"], state["b.weight"]], axis=1)
    np.testing.assert_allclose(both_weights, both.state_dict()["2.weight"], rtol=1e-4, atol=1e-6)
