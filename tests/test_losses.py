"""Losses: values against plain formulas, numerical stability, weights, and targets that are refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from names import missing_classes
from small_models import LABELS, QUIET, SAMPLES, small_net, values_of

import xpnet
from xpnet import layers, losses, metrics, optimizers
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError

CPU = xpnet.get_backend("cpu")
quick = settings(max_examples=60, deadline=None, database=None)


def softplus(z):
    return max(z, 0) + math.log1p(math.exp(-abs(z)))


def huber(d, delta):
    return 0.5 * d * d if abs(d) <= delta else delta * (abs(d) - 0.5 * delta)


def mean(values):
    return math.fsum(values) / len(values)


# name: (loss, function that computes the loss of one sample from lists of outputs and targets)
REGRESSION = {
    "mse": (losses.MeanSquaredError(), lambda y, t: mean([(a - b) ** 2 for a, b in zip(y, t, strict=True)])),
    "half": (losses.HalfSquaredError(), lambda y, t: 0.5 * math.fsum((a - b) ** 2 for a, b in zip(y, t, strict=True))),
    "mae": (losses.MeanAbsoluteError(), lambda y, t: mean([abs(a - b) for a, b in zip(y, t, strict=True)])),
    "huber": (losses.Huber(), lambda y, t: mean([huber(a - b, 1.0) for a, b in zip(y, t, strict=True)])),
    "huber 3": (losses.Huber(3.0), lambda y, t: mean([huber(a - b, 3.0) for a, b in zip(y, t, strict=True)])),
}


def binary(smoothing):
    def loss(z, t):
        moved = [b * (1 - smoothing) + smoothing / 2 for b in t]
        return mean([m * softplus(-a) + (1 - m) * softplus(a) for a, m in zip(z, moved, strict=True)])

    return losses.BinaryCrossEntropy(label_smoothing=smoothing), loss


def softmax(smoothing):
    def loss(z, t):
        total = max(z) + math.log(math.fsum(math.exp(a - max(z)) for a in z))
        moved = [b * (1 - smoothing) + smoothing / len(z) for b in t]
        return math.fsum(m * (total - a) for a, m in zip(z, moved, strict=True))

    return losses.SoftmaxCrossEntropy(label_smoothing=smoothing), loss


def divergence(z, t):
    total = max(z) + math.log(math.fsum(math.exp(a - max(z)) for a in z))
    return math.fsum(b * (math.log(b) - (a - total)) for a, b in zip(z, t, strict=True) if b > 0)


def one_minus_cosine(y, t):
    products = (math.fsum(a * b for a, b in zip(v, w, strict=True)) for v, w in ((y, t), (y, y), (t, t)))
    product, *squares = products
    return 1 - product / math.prod(max(math.sqrt(square), 1e-8) for square in squares)


def triplet(y, margin):
    anchor, positive, negative = np.reshape(y, (3, -1)).tolist()
    return max(
        math.dist(anchor, np.subtract(positive, 1e-6)) - math.dist(anchor, np.subtract(negative, 1e-6)) + margin, 0
    )


BINARY = {"binary": binary(0.0), "binary, smoothed": binary(0.2)}
SOFTMAX = {
    "softmax": softmax(0.0),
    "softmax, smoothed": softmax(0.2),
    "divergence": (losses.KLDivergence(), divergence),
}
ALL = {**REGRESSION, **BINARY, **SOFTMAX}
VECTORS = {
    "cosine": (losses.CosineSimilarity(), one_minus_cosine),
    "triplet": (losses.TripletMargin(), lambda y, t: triplet(y, 1.0)),
    "triplet, margin 0.2": (losses.TripletMargin(0.2), lambda y, t: triplet(y, 0.2)),
}


def test_every_loss_has_an_example():
    assert not missing_classes(losses, losses.Loss, [loss for loss, _ in (ALL | VECTORS).values()])


def test_every_loss_has_a_name():
    assert not missing_classes(losses, losses.Loss, [cls() for cls in losses._NAMES.values()])


@st.composite
def outputs_and_targets(draw, kind):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6))
    numbers = st.floats(-1e4, 1e4) | st.floats(-3, 3)
    outputs = draw(hnp.arrays(np.float64, shape, elements=numbers))
    if kind == "real":
        return outputs, draw(hnp.arrays(np.float64, shape, elements=numbers))
    targets = draw(hnp.arrays(np.float64, shape, elements=st.floats(0, 1)))
    if kind == "probabilities":
        targets[:, 0] += targets.sum(axis=1) == 0
        targets /= targets.sum(axis=1, keepdims=True)
    return outputs, targets


def close(got, want):
    # Where terms cancel, the error of the sum is relative to the largest term.
    return math.isclose(got, want, rel_tol=1e-10, abs_tol=1e-10)


@pytest.mark.parametrize("name", ALL)
@quick
@given(data=st.data())
def test_values_equal_the_formula(name, data):
    kind = "real" if name in REGRESSION else "in [0, 1]" if name in BINARY else "probabilities"
    outputs, targets = data.draw(outputs_and_targets(kind))
    loss, formula = ALL[name]
    each = [formula(y, t) for y, t in zip(outputs.tolist(), targets.tolist(), strict=True)]
    assert close(loss(outputs, targets), mean(each))
    weights = np.arange(len(each)) + 1.0
    assert close(loss(outputs, targets, weights), np.dot(weights, each) / weights.sum())
    samples, grad = loss.samples_and_gradient(CPU, outputs, targets)
    assert all(map(close, samples, each))
    np.testing.assert_allclose(grad, loss.gradient(CPU, outputs, targets), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(samples, loss.samples(CPU, outputs, targets), rtol=1e-12, atol=1e-12)


def test_the_sum_reduction_is_the_mean_times_the_number_of_samples(rng):
    y, t = rng.normal(size=(2, 5, 3))
    summed, weights = losses.HalfSquaredError(reduction="sum"), np.arange(5.0)
    assert close(summed(y, t), 0.5 * ((y - t) ** 2).sum())
    assert close(summed(y, t), 5 * losses.HalfSquaredError()(y, t))
    assert close(summed(y, t, weights), 0.5 * (weights * ((y - t) ** 2).sum(axis=1)).sum())


@pytest.mark.parametrize("name", ALL)
def test_losses_are_equal_on_every_backend(backend, rng, name):
    loss, formula = ALL[name]
    outputs, targets = rng.normal(size=(5, 4)), rng.dirichlet(np.ones(4), 5)
    want = [formula(y, t) for y, t in zip(outputs.tolist(), targets.tolist(), strict=True)]
    for dtype, rtol in (("float64", 1e-12), ("float32", 1e-5)):
        y, t = backend.asarray(outputs.astype(dtype)), backend.asarray(targets.astype(dtype))
        samples, grad = loss.samples_and_gradient(backend, y, t)
        assert (samples.dtype, samples.shape) == (dtype, (5,))
        assert (grad.dtype, grad.shape) == (dtype, (5, 4))
        np.testing.assert_allclose(backend.to_numpy(samples), want, rtol=rtol)
        np.testing.assert_array_equal(backend.to_numpy(y), outputs.astype(dtype))  # the gradient is a new array


@pytest.mark.parametrize("name", VECTORS)
def test_losses_of_vectors_are_equal_on_every_backend(backend, rng, name):
    loss, formula = VECTORS[name]
    outputs, targets = rng.normal(size=(2, 9, 6))
    want = [formula(y, t) for y, t in zip(outputs.tolist(), targets.tolist(), strict=True)]
    assert (0 in want) == (name != "cosine")  # some triplets are apart by more than the margin
    assert loss(outputs, targets) == pytest.approx(mean(want), rel=1e-12)
    for dtype, tolerance in (("float64", 1e-12), ("float32", 2e-6)):
        y, t = backend.asarray(outputs.astype(dtype)), backend.asarray(targets.astype(dtype))
        samples, grad = loss.samples_and_gradient(backend, y, t)
        assert (samples.dtype, samples.shape, grad.dtype, grad.shape) == (dtype, (9,), dtype, (9, 6))
        np.testing.assert_allclose(backend.to_numpy(samples), want, rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(backend.to_numpy(loss.samples(backend, y, t)), backend.to_numpy(samples))
        np.testing.assert_array_equal(backend.to_numpy(loss.gradient(backend, y, t)), backend.to_numpy(grad))


def test_the_cosine_of_several_vectors_per_sample_is_their_mean(backend, rng):
    y, t = rng.normal(size=(2, 5, 3, 4))
    loss = losses.CosineSimilarity()
    samples, grad = (backend.to_numpy(a) for a in loss.samples_and_gradient(backend, *map(backend.asarray, (y, t))))
    rows = loss.samples_and_gradient(CPU, y.reshape(15, 4), t.reshape(15, 4))
    np.testing.assert_allclose(samples, rows[0].reshape(5, 3).mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(grad, rows[1].reshape(5, 3, 4) / 3, rtol=1e-12)


def test_the_cosine_of_a_vector_of_zeros_is_zero(backend):
    y, t = backend.asarray([[0.0, 0.0], [3.0, 4.0]]), backend.asarray([[1.0, 0.0], [0.0, 0.0]])
    samples, grad = losses.CosineSimilarity().samples_and_gradient(backend, y, t)
    assert backend.to_numpy(samples).tolist() == [1, 1]
    assert np.isfinite(backend.to_numpy(grad)).all()


def test_triplets_may_be_one_vector(rng):
    y = rng.normal(size=(5, 3, 4))
    loss, nothing = losses.TripletMargin(), np.zeros(5)
    assert loss(y, nothing) == loss(y.reshape(5, 12), nothing)


def test_a_net_learns_from_triplets():
    rng, classes = np.random.default_rng(0), np.arange(60) % 2
    centers = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    anchors, positives = (centers[classes] + 0.3 * rng.normal(size=(60, 4)) for _ in range(2))
    negatives = centers[1 - classes] + 0.3 * rng.normal(size=(60, 4))
    model = xpnet.Sequential([layers.Dense(2)], (3, 4), "cpu", seed=0)
    x = np.stack([anchors, positives, negatives], axis=1)
    history = model.fit(
        x, np.zeros(60), loss="triplet_margin", optimizer=optimizers.Adam(0.05), epochs=10, batch_size=20, verbose=0
    )
    assert history["loss"][-1] < 0.5 * history["loss"][0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_divergence_of_equal_distributions_is_zero(backend, rng, dtype):
    logits = backend.asarray(rng.normal(size=(5, 4)).astype(dtype))
    for outputs in (logits, backend.log_softmax(logits)):
        each, grad = losses.KLDivergence().samples_and_gradient(backend, outputs, backend.softmax(logits))
        np.testing.assert_allclose(backend.to_numpy(each), 0, atol=4 * np.finfo(dtype).eps)
        np.testing.assert_allclose(backend.to_numpy(grad), 0, atol=4 * np.finfo(dtype).eps)


LARGE = [-1e4, -700.0, -100.0, 100.0, 700.0, 1e4]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("z", LARGE)
def test_binary_cross_entropy_is_exact_for_large_logits(backend, z, dtype):
    outputs, targets = backend.asarray(np.array([[z], [z]], dtype)), backend.asarray(np.array([[0], [1]], dtype))
    samples, grad = (
        backend.to_numpy(a) for a in losses.BinaryCrossEntropy().samples_and_gradient(backend, outputs, targets)
    )
    eps = np.finfo(dtype).eps
    tail = math.exp(-abs(z))
    tail = tail if tail > np.finfo(dtype).tiny else 0.0
    np.testing.assert_allclose(samples, [z, tail] if z > 0 else [tail, -z], rtol=4 * eps, atol=np.finfo(dtype).tiny)
    np.testing.assert_allclose(grad.ravel(), [1, 0] if z > 0 else [0, -1], rtol=eps, atol=1e-40)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("z", LARGE)
def test_softmax_cross_entropy_is_exact_for_large_logits(backend, z, dtype):
    outputs = backend.asarray(np.array([[z, 0, 0], [z, z, 0]], dtype))
    for label in range(3):
        targets = backend.asarray(np.array([label, label]))
        samples, grad = losses.SoftmaxCrossEntropy().samples_and_gradient(backend, outputs, targets)
        first = [0.0, z, z] if z > 0 else [math.log(2) - z, math.log(2), math.log(2)]
        second = [math.log(2), math.log(2), z + math.log(2)] if z > 0 else [-z, -z, 0.0]
        want = [first[label], second[label]]
        atol = 1e-40 if abs(z) > 100 else 1e-43 if dtype == "float64" else 1e-37
        np.testing.assert_allclose(backend.to_numpy(samples), want, rtol=4 * np.finfo(dtype).eps, atol=atol)
        probabilities = [[1, 0, 0], [0.5, 0.5, 0]] if z > 0 else [[0, 0.5, 0.5], [0, 0, 1]]
        want_grad = np.array(probabilities) - np.eye(3)[label]
        np.testing.assert_allclose(backend.to_numpy(grad), want_grad, rtol=4 * np.finfo(dtype).eps, atol=1e-40)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", REGRESSION)
def test_regression_losses_are_exact_for_large_errors(backend, name, dtype):
    y, t = np.array([[1e4], [-1e4], [1e4]], dtype), np.array([[-1e4], [0], [1e4]], dtype)
    loss, formula = REGRESSION[name]
    samples, grad = loss.samples_and_gradient(backend, backend.asarray(y), backend.asarray(t))
    want = [formula(a, b) for a, b in zip(y.tolist(), t.tolist(), strict=True)]
    np.testing.assert_allclose(backend.to_numpy(samples), want, rtol=np.finfo(dtype).eps)
    assert np.isfinite(backend.to_numpy(grad)).all()


def test_the_gradient_of_the_absolute_error_is_zero_at_its_kink():
    assert losses.MeanAbsoluteError().gradient(CPU, np.ones((1, 2)), np.ones((1, 2))).tolist() == [[0, 0]]


# Targets and weights


def test_labels_and_one_hot_targets_are_equivalent(rng):
    z, labels = rng.normal(size=(6, 3)), rng.integers(0, 3, 6)
    one_hot = np.eye(3)[labels]
    for loss in (losses.SoftmaxCrossEntropy(), losses.SoftmaxCrossEntropy(label_smoothing=0.1)):
        want = loss(z, labels)
        forms = [one_hot, one_hot.astype(int), one_hot.astype(bool), labels[:, None], labels.astype(float)]
        forms += [labels.astype("uint8"), labels.tolist()]
        assert [loss(z, form) for form in forms] == [want] * len(forms)
    assert losses.SoftmaxCrossEntropy()(z, np.full((6, 3), 1 / 3)) != pytest.approx(want)


def test_softmax_over_two_classes_equals_binary_cross_entropy(rng):
    z, t = rng.normal(size=(6, 1)), rng.integers(0, 2, 6)
    as_two = losses.SoftmaxCrossEntropy()(np.hstack([np.zeros_like(z), z]), t)
    assert close(as_two, losses.BinaryCrossEntropy()(z, t))
    assert close(as_two, losses.BinaryCrossEntropy()(z, t.astype(bool)))


def test_the_minimum_of_a_smoothed_loss_is_the_entropy_of_its_targets():
    moved = np.array([0.9 + 0.1 / 4, *[0.1 / 4] * 3])
    at_best = losses.SoftmaxCrossEntropy(label_smoothing=0.1)(np.log(moved)[None], [0])
    assert close(at_best, -(moved * np.log(moved)).sum())


def dense(backend, outputs=2, dtype="float64"):
    return xpnet.Sequential([layers.Dense(outputs)], input_shape=3, backend=backend, dtype=dtype)


WEIGHTED = [
    ("mse", 2, lambda rng: rng.normal(size=(5, 2))),
    ("half_squared_error", 2, lambda rng: rng.normal(size=(5, 2))),
    (losses.HalfSquaredError("sum"), 2, lambda rng: rng.normal(size=(5, 2))),
    ("huber", 1, lambda rng: rng.normal(size=5)),
    ("binary_cross_entropy", 1, lambda rng: rng.integers(0, 2, 5)),
    ("softmax_cross_entropy", 2, lambda rng: rng.integers(0, 2, 5)),
]


@pytest.mark.parametrize(("loss", "outputs", "draw"), WEIGHTED, ids=lambda v: v if isinstance(v, str) else "")
def test_an_integer_weight_equals_repeating_the_sample(backend, rng, loss, outputs, draw):
    x, y, weights = rng.normal(size=(5, 3)), draw(rng), np.array([1, 2, 0, 1, 3])
    weighted, repeated = dense(backend, outputs), dense(backend, outputs)
    kwargs = {"loss": loss, "optimizer": optimizers.SGD(0.0)}
    a = weighted.train_on_batch(x, y, sample_weight=weights, **kwargs)["loss"]
    b = repeated.train_on_batch(x.repeat(weights, 0), y.repeat(weights, 0), **kwargs)["loss"]
    assert close(a, b)
    assert close(a, weighted.evaluate(x, y, sample_weight=weights)["loss"])
    for ours, theirs in zip(weighted.parameters, repeated.parameters, strict=True):
        np.testing.assert_allclose(backend.to_numpy(ours.grad), backend.to_numpy(theirs.grad), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "outputs", "y", "equivalent"),
    [
        (losses.SoftmaxCrossEntropy(class_weight={1: 3}), 2, [0, 1, 1, 0, 1], [1, 3, 3, 1, 3]),
        (losses.SoftmaxCrossEntropy(class_weight=[2, 0.5]), 2, [0, 1, 1, 0, 1], [2, 0.5, 0.5, 2, 0.5]),
        (
            losses.SoftmaxCrossEntropy(class_weight=[1, 3]),
            2,
            [[0.5, 0.5], [1, 0], [0, 1], [0, 1], [0, 1]],
            [2, 1, 3, 3, 3],
        ),
        (losses.BinaryCrossEntropy(class_weight={0: 2}), 1, [0, 1, 1, 0, 1], [2, 1, 1, 2, 1]),
        (losses.BinaryCrossEntropy(class_weight=[1, 3]), 1, [0, 0.5, 1, 0, 1], [1, 2, 3, 1, 3]),
    ],
)
def test_class_weights_equal_sample_weights_by_class(backend, rng, loss, outputs, y, equivalent):
    x = rng.normal(size=(5, 3))
    by_class, by_sample = dense(backend, outputs), dense(backend, outputs)
    plain = type(loss)()
    a = by_class.train_on_batch(x, y, loss=loss, optimizer="sgd")["loss"]
    b = by_sample.train_on_batch(x, y, loss=plain, optimizer="sgd", sample_weight=equivalent)["loss"]
    assert close(a, b)
    assert close(
        by_class.evaluate(x, y, loss=loss)["loss"], by_sample.evaluate(x, y, plain, sample_weight=equivalent)["loss"]
    )
    for ours, theirs in zip(by_class.parameters, by_sample.parameters, strict=True):
        np.testing.assert_allclose(backend.to_numpy(ours.value), backend.to_numpy(theirs.value), rtol=1e-12)


def test_a_loss_called_directly_uses_its_class_weights():
    z = [[1.0, 0.0], [2.0, 0.0]]
    plain = losses.SoftmaxCrossEntropy()
    assert losses.SoftmaxCrossEntropy(class_weight={1: 3})(z, [0, 1]) == pytest.approx(plain(z, [0, 1], [1, 3]))


# Invalid targets and arguments

CE, BCE, MSE = losses.SoftmaxCrossEntropy(), losses.BinaryCrossEntropy(), losses.MeanSquaredError()


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "error", "message"),
    [
        (
            CE,
            (4, 3),
            [0, 1, 2, 3],
            DataError,
            r"labels range from 0 to 3, but the model's 3 outputs allow 0 to 2.*Renumber",
        ),
        (CE, (4, 3), [0, 1, 2, 3], DataError, "give the last layer 4 outputs"),
        (CE, (2, 3), [-1, 0], DataError, "labels range from -1 to 0"),
        (CE, (2, 3), [0.5, 1.0], DataError, r"\(N,\) must be labels, integers from 0, but some are not whole numbers"),
        (CE, (2, 3), [math.nan, 1.0], DataError, "some are not whole numbers"),
        (CE, (2, 3), np.zeros((2, 4)), ShapeError, r"\(N,\) labels or \(N, 3\) probabilities, but are \(2, 4\)"),
        (CE, (2, 3), np.zeros((2, 3, 1)), ShapeError, r"but are \(2, 3, 1\)"),
        (
            CE,
            (2, 3),
            np.full((2, 3), 0.5),
            DataError,
            "the smallest is 0.5, and the sums range from 1.5 to 1.5",
        ),
        (CE, (2, 3), np.array([[2, -1, 0], [1, 0, 0]]), DataError, "at least 0 and with sum 1, but the smallest is -1"),
        (CE, (2, 1), [0, 1], ShapeError, r"K ≥ 2 classes, but gives \(N, 1\).*binary_cross_entropy"),
        (CE, (2, 3, 4), [0, 1], ShapeError, r"\(N, 3\) labels or \(N, 3, 4\) prob.*End it with Flatten and Dense\(K\)"),
        (BCE, (2, 1), [0, 2], DataError, r"must be in \[0, 1\], but they range from 0 to 2"),
        (BCE, (2, 1), [-1, 1], DataError, "they range from -1 to 1"),
        (BCE, (2, 2), [0, 1], ShapeError, r"BinaryCrossEntropy.*shape of the outputs, \(N, 2\), but are \(2,\)"),
        (
            MSE,
            (2, 3),
            np.zeros((2, 1)),
            ShapeError,
            r"\(N, 3\), but are \(2, 1\). They are not broadcast: reshape them",
        ),
        (MSE, (2, 1), np.zeros((2, 2)), ShapeError, r"\(N, 1\), but are \(2, 2\)"),
        (losses.KLDivergence(), (2, 3), np.ones((2, 3)), DataError, "KLDivergence: each row of targets must be"),
        (losses.CosineSimilarity(), (2, 3), np.zeros(2), ShapeError, r"CosineSimilarity.*\(N, 3\), but are \(2,\)"),
        (losses.TripletMargin(), (2, 4), np.zeros(2), ShapeError, r"\(N, 3·D\), but gives \(N, 4\)"),
        (losses.TripletMargin(), (2, 6, 4), np.zeros(2), ShapeError, r"\(N, 3, D\) or .*, but gives \(N, 6, 4\)"),
        (losses.Huber(), (2, 2, 1), np.zeros((2, 2)), ShapeError, r"Huber.*\(N, 2, 1\), but are \(2, 2\)"),
    ],
)
def test_invalid_targets_are_refused(backend, loss, outputs, targets, error, message):
    with pytest.raises(error, match=message):
        loss(np.zeros(outputs), targets)
    with pytest.raises(error, match=message):
        loss.check_targets(backend, backend.asarray(targets), outputs[1:])


@pytest.mark.parametrize(("targets", "weights"), [([1.0], None), ([1.0, 1.0, 1.0], [1.0])])
def test_a_loss_called_directly_does_not_broadcast(targets, weights):
    with pytest.raises((ShapeError, DataError)):
        MSE(np.zeros((3, 1)), targets, weights)


def test_targets_of_one_output_may_be_a_vector(backend):
    checked = MSE.check_targets(backend, backend.asarray([1.0, 2.0]), (1,))
    assert backend.to_numpy(checked).tolist() == [[1], [2]]
    labels = CE.check_targets(backend, backend.asarray([[1.0], [2.0]]), (3,))
    assert backend.to_numpy(labels).tolist() == [1, 2]
    assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: losses.HalfSquaredError("average"), ArgumentError, '"mean" or "sum", not \'average\''),
        (lambda: losses.Huber(0), ArgumentError, "Huber: delta must be a number above 0, not 0"),
        (
            lambda: losses.TripletMargin(0),
            ArgumentError,
            "TripletMargin: margin must be a finite number above 0, not 0",
        ),
        (lambda: losses.Huber(math.nan), ArgumentError, "not nan"),
        (
            lambda: losses.BinaryCrossEntropy(1.0),
            ArgumentError,
            "BinaryCrossEntropy: label_smoothing must be a number of at least 0 and below 1, not 1.0",
        ),
        (
            lambda: losses.SoftmaxCrossEntropy(-0.1),
            ArgumentError,
            "SoftmaxCrossEntropy: label_smoothing must be a number of at least 0 and below 1, not -0.1",
        ),
        (lambda: losses.get("crossentropy"), ArgumentError, "unknown loss 'crossentropy'. Did you mean"),
        (lambda: losses.get(losses.Huber), ArgumentTypeError, r"pass an object, Huber\(...\)"),
        (lambda: losses.get(3), ArgumentTypeError, "loss must be a name .* or an object, not 3"),
    ],
)
def test_invalid_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mse", losses.MeanSquaredError),
        ("mean_squared_error", losses.MeanSquaredError),
        ("half_squared_error", losses.HalfSquaredError),
        ("mae", losses.MeanAbsoluteError),
        ("mean_absolute_error", losses.MeanAbsoluteError),
        ("Huber", losses.Huber),
        (" binary-cross-entropy", losses.BinaryCrossEntropy),
        ("softmax_cross_entropy", losses.SoftmaxCrossEntropy),
        ("kl_divergence", losses.KLDivergence),
        ("cosine_similarity", losses.CosineSimilarity),
        ("triplet_margin", losses.TripletMargin),
    ],
)
def test_names_give_losses_with_default_settings(name, kind):
    assert losses.get(name) == kind()
    assert losses.get(kind()) == kind()


def test_losses_with_equal_settings_are_equal():
    assert losses.Huber(2.0) == losses.Huber(2.0) != losses.Huber(1.0) != losses.MeanSquaredError()
    assert repr(losses.Huber(2.0)) == "Huber(delta=2.0)"
    assert repr(losses.SoftmaxCrossEntropy(class_weight={1: 2})) == "SoftmaxCrossEntropy(class_weight={1: 2})"
    classifying = losses.BinaryCrossEntropy | losses.SoftmaxCrossEntropy
    assert all(loss.classifies == isinstance(loss, classifying) for loss, _ in ALL.values())


@pytest.mark.parametrize("bad", [1.0, [1.0], [[1.0], [1.0]], [[1.0, 1.0]], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("loss", [losses.MeanSquaredError(), losses.SoftmaxCrossEntropy(), metrics.Accuracy()])
def test_weights_of_a_wrong_shape_are_refused_in_direct_calls(bad, loss):
    targets = np.eye(2)
    assert loss(np.eye(2), targets, [1.0, 3.0]) >= 0
    with pytest.raises(ShapeError, match="weight"):
        loss(np.eye(2), targets, bad)


class Columns(losses.MeanSquaredError):
    """Lacks the mean over the outputs of a sample."""

    def samples(self, backend, outputs, targets):
        return (outputs - targets) ** 2


class Total(Columns):
    def samples(self, backend, outputs, targets):
        return super().samples(backend, outputs, targets).sum()


@pytest.mark.parametrize("loss", [Columns(), Total()], ids=["(N, K)", "()"])
def test_a_loss_must_return_one_number_per_sample(loss):
    model, targets = small_net(), np.eye(2)[LABELS]
    before = values_of(model)
    for call in (
        lambda: model.evaluate(SAMPLES, targets, loss),
        lambda: model.fit(SAMPLES, targets, loss, **QUIET),
        lambda: model.train_on_batch(SAMPLES, targets, loss, "sgd"),
    ):
        with pytest.raises(ShapeError, match="one number per sample"):
            call()
    np.testing.assert_array_equal(values_of(model), before)


@pytest.mark.parametrize("targets", [np.array([0, 1]), np.eye(3)[[0, 1]]], ids=["numbers", "probabilities"])
def test_a_logit_of_minus_infinity_for_another_class_adds_no_loss(backend, targets):
    loss, logits = losses.SoftmaxCrossEntropy(), [[0.0, 0.0, -np.inf], [-np.inf, 1.0, 1.0]]
    assert loss(logits, targets) == pytest.approx(np.log(2), rel=1e-12)
    outputs, y = backend.asarray(np.array(logits)), backend.asarray(targets)
    per_sample, grad = loss.samples_and_gradient(backend, outputs, y)
    for ell, gradient in ((per_sample, grad), (loss.samples(backend, outputs, y), loss.gradient(backend, outputs, y))):
        np.testing.assert_allclose(backend.to_numpy(ell), np.log([2, 2]), rtol=1e-12)
        np.testing.assert_allclose(backend.to_numpy(gradient), [[-0.5, 0.5, 0], [0, -0.5, 0.5]], rtol=1e-12)


# Logarithms of probabilities that round to 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_that_differ_by_a_thousand_have_finite_losses(backend, dtype):
    logits, labels = np.array([[0.0, 1000.0], [1000.0, 0.0], [-1000.0, 1000.0]], dtype), np.array([0, 0, 0])
    device = [backend.asarray(a) for a in (logits, labels, np.eye(2, dtype=dtype)[labels])]
    loss = losses.SoftmaxCrossEntropy()
    for targets in device[1:]:
        np.testing.assert_array_equal(backend.to_numpy(loss.samples(backend, device[0], targets)), [1000, 0, 2000])
        each, grad = loss.samples_and_gradient(backend, device[0], targets)
        np.testing.assert_array_equal(backend.to_numpy(each), [1000, 0, 2000])
        np.testing.assert_array_equal(backend.to_numpy(grad), [[-1, 1], [0, 0], [-1, 1]])
    log_p = backend.to_numpy(backend.log_softmax(device[0]))
    np.testing.assert_array_equal(log_p, [[-1000, 0], [0, -1000], [-2000, 0]])
    yes = backend.asarray(np.array([[1.0], [0.0], [1.0]], dtype))
    z = backend.asarray(np.array([[-1000.0], [1000.0], [1000.0]], dtype))
    np.testing.assert_array_equal(
        backend.to_numpy(losses.BinaryCrossEntropy().samples(backend, z, yes)), [1000, 1000, 0]
    )


# Targets that are meant for another loss

FOR_NUMBERS, FOR_ANSWERS = 'pass loss="mse"', 'pass loss="binary_cross_entropy"'


@pytest.mark.parametrize(
    ("outputs", "targets", "advice", "not_advised"),
    [
        (1, [0.5, 1.5, -2.0, 3.0], FOR_NUMBERS, FOR_ANSWERS),  # loss="mse" was forgotten
        (1, [[0.5], [1.5], [-2.0], [3.0]], FOR_NUMBERS, FOR_ANSWERS),
        (1, [0, 1, 1, 0], FOR_ANSWERS, FOR_NUMBERS),
        (1, [0.0, 1.0, 1.0, 0.0], FOR_ANSWERS, FOR_NUMBERS),
        (1, [True, False, True, True], FOR_ANSWERS, FOR_NUMBERS),
        (1, [10, 20, 30, 40], 'to predict numbers, loss="mse"', None),  # numbers or classes
        (1, [0, 1, 2, 3], "End it with Flatten and Dense(K)", None),
        (3, [0.5, 1.5, 2.0, 0.0], f"{FOR_NUMBERS} and end the model with Dense(1)", FOR_ANSWERS),
        (3, [100.0, 250.0, 70.0, 3.0], FOR_NUMBERS, FOR_ANSWERS),
        (3, np.full((4, 3), 2.5), FOR_NUMBERS, FOR_ANSWERS),
        (3, np.full((4, 2), 2.5), FOR_NUMBERS, FOR_ANSWERS),
        (3, np.ones((4, 3)), FOR_ANSWERS, FOR_NUMBERS),  # several yes-or-no answers
        ((4, 2), [0, 1, 1, 0], "End it with Flatten and Dense(K)", None),
        (3, [0, 1, 2, 3], "give the last layer 4 outputs", FOR_NUMBERS),
    ],
)
def test_targets_for_another_loss_are_refused_with_its_name(backend, outputs, targets, advice, not_advised):
    last = layers.Dense(outputs) if isinstance(outputs, int) else layers.Dense(outputs[-1])
    shape = (2,) if isinstance(outputs, int) else (*outputs[:-1], 2)
    model = xpnet.Sequential([last], shape, backend)
    with pytest.raises(ArgumentError) as caught:
        model.fit(np.ones((4, *shape)), targets, verbose=0)
    assert advice in str(caught.value) and (not_advised is None or not_advised not in str(caught.value))


def test_classes_numbered_from_1_are_refused_by_binary_cross_entropy_with_advice(backend):
    model = xpnet.Sequential([layers.Dense(1)], (2,), backend)
    with pytest.raises(ArgumentError, match=r"range from 1 to 2. For two classes, number them 0 and 1; to predict"):
        model.fit(np.ones((4, 2)), [1, 2, 1, 2], loss="binary_cross_entropy", verbose=0)
