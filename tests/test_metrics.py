"""Metrics against loops and results calculated by hand, also when summed over batches."""

import math

import numpy as np
import pytest
from names import missing_classes, stable_repr
from small_models import LABELS, QUIET, SAMPLES, Do, small_net, values_of

import xpnet
from xpnet import layers, losses, metrics
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError

NAN = math.nan
AVERAGES = ["macro", "micro", "weighted"]


def score(metric, backend, outputs, targets, weights=None, batch=None):
    """The metric of these arrays on a device, computed in batches of `batch` samples as in training."""
    n, total = len(outputs), None
    for start in range(0, n, batch or n):
        rows = slice(start, start + (batch or n))
        part = [
            backend.asarray(np.asarray(a)[rows]) for a in (outputs, targets, *([] if weights is None else [weights]))
        ]
        sums = metric.sums(backend, *part, *([None] if weights is None else []))
        total = sums if total is None else metric.merge(total, sums)
    return metric.result(backend.to_numpy(total))


# Loops that follow the definitions


def loop_accuracy(scores, labels, weights):
    right = [row.index(max(row)) == label for row, label in zip(scores, labels, strict=True)]
    return sum(w for r, w in zip(right, weights, strict=True) if r) / sum(weights)


def loop_top(k):
    def share(scores, labels, weights):
        total = 0.0
        for row, label, w in zip(scores, labels, weights, strict=True):
            ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
            total += w * (label in ranked[:k])
        return total / sum(weights)

    return share


def loop_confusion(scores, labels, weights):
    table = [[0.0] * len(scores[0]) for _ in scores[0]]
    for row, label, w in zip(scores, labels, weights, strict=True):
        table[label][row.index(max(row))] += w
    return table


def loop_scores(kind, average):
    def score(scores, labels, weights):
        table = loop_confusion(scores, labels, weights)
        classes, total = range(len(table)), sum(weights)

        def of(hits, predicted, actual):
            under = {"precision": predicted, "recall": actual, "f1": (predicted + actual) / 2}[kind]
            return hits / under if under else 0.0

        hits = [table[c][c] for c in classes]
        predicted = [sum(row[c] for row in table) for c in classes]
        actual = [sum(table[c]) for c in classes]
        if average == "micro":
            return of(sum(hits), sum(predicted), sum(actual))
        each = [of(*counts) for counts in zip(hits, predicted, actual, strict=True)]
        if average == "weighted":
            return sum(a * e for a, e in zip(actual, each, strict=True)) / total
        return sum(each) / len(each)

    return score


def loop_errors(power):
    def mean(outputs, targets, weights):
        each = [
            np.mean([abs(a - b) ** power for a, b in zip(*rows, strict=True)])
            for rows in zip(outputs, targets, strict=True)
        ]
        return np.dot(weights, each) / sum(weights)

    return mean


def loop_r2(outputs, targets, weights):
    scores = []
    for y, t in zip(zip(*outputs, strict=True), zip(*targets, strict=True), strict=True):
        center = sum(w * b for w, b in zip(weights, t, strict=True)) / sum(weights)
        spread = sum(w * (b - center) ** 2 for w, b in zip(weights, t, strict=True))
        scores.append(1 - sum(w * (a - b) ** 2 for w, a, b in zip(weights, y, t, strict=True)) / spread)
    return sum(scores) / len(scores)


MULTICLASS = [
    (metrics.Accuracy(), loop_accuracy),
    *[(metrics.TopKAccuracy(k), loop_top(k)) for k in (1, 2, 4, 9)],
    (metrics.ConfusionMatrix(), loop_confusion),
    *[(metrics.Precision(average), loop_scores("precision", average)) for average in AVERAGES],
    *[(metrics.Recall(average), loop_scores("recall", average)) for average in AVERAGES],
    *[(metrics.F1(average), loop_scores("f1", average)) for average in AVERAGES],
]
REGRESSION = [
    (metrics.MeanSquaredError(), loop_errors(2)),
    (metrics.MeanAbsoluteError(), loop_errors(1)),
    (metrics.R2(), loop_r2),
]


def test_every_metric_has_an_example():
    assert not missing_classes(metrics, metrics.Metric, [metric for metric, _ in [*MULTICLASS, *REGRESSION]])


def test_every_metric_has_a_name():
    assert not missing_classes(metrics, metrics.Metric, [cls() for cls in metrics._NAMES.values()])


@pytest.mark.parametrize(
    "weights", [None, np.array([2, 1, 0, 3, 1, 1, 2, 5, 1, 1, 1]), np.linspace(0.1, 3, 11)], ids=["", "whole", "real"]
)
@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize(("metric", "loop"), [*MULTICLASS, *REGRESSION], ids=stable_repr)
def test_metrics_follow_their_definition_with_batches_and_weights(backend, rng, metric, loop, batch, weights):
    if metric.name in ("mse", "mae", "r2"):
        outputs, targets = rng.normal(size=(2, 11, 3))
        host_targets = targets.tolist()
    else:  # small integers, so that there are ties; class 3 never occurs
        outputs, targets = rng.integers(0, 5, (11, 4)).astype(float), rng.integers(0, 3, 11)
        host_targets = targets.tolist()
        one_hot = score(metric, backend, outputs, np.eye(4)[targets], weights, batch)
        np.testing.assert_array_equal(one_hot, score(metric, backend, outputs, targets, weights, batch))
    want = loop(outputs.tolist(), host_targets, [1.0] * 11 if weights is None else weights.tolist())
    np.testing.assert_allclose(score(metric, backend, outputs, targets, weights, batch), want, rtol=1e-12)
    if weights is not None and weights.dtype.kind == "i":
        repeated = score(metric, backend, outputs.repeat(weights, 0), targets.repeat(weights, 0))
        np.testing.assert_allclose(repeated, want, rtol=1e-12)
    if batch is None:
        np.testing.assert_allclose(metric(outputs, targets, weights), want, rtol=1e-12)


@pytest.mark.parametrize("metric", [m for m, _ in (*MULTICLASS, *REGRESSION)], ids=repr)
def test_metrics_of_float32_outputs_are_as_exact_as_of_float64(backend, rng, metric):
    outputs = rng.normal(size=(50, 4)).astype("float32")
    targets = (
        rng.normal(size=(50, 4)).astype("float32") if metric.name in ("mse", "mae", "r2") else rng.integers(0, 4, 50)
    )
    got, want = score(metric, backend, outputs, targets), metric(outputs.astype("float64"), targets)
    np.testing.assert_allclose(got, want, rtol=1e-6 if targets.dtype.kind == "f" else 0)


# Results calculated by hand

TRUE, PREDICTED = [0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1]  # the example in scikit-learn's manual
SCORES = np.eye(3)[PREDICTED]


@pytest.mark.parametrize(
    ("metric", "published"),
    [
        (metrics.Accuracy(), 2 / 6),
        (metrics.ConfusionMatrix(), [[2, 0, 0], [1, 0, 1], [0, 2, 0]]),
        (metrics.Precision(), 2 / 9),
        (metrics.Precision("micro"), 1 / 3),
        (metrics.Precision("weighted"), 2 / 9),
        (metrics.Recall(), 1 / 3),
        (metrics.Recall("weighted"), 1 / 3),
        (metrics.F1(), 4 / 15),
        (metrics.F1("micro"), 1 / 3),
        (metrics.F1("weighted"), 4 / 15),
    ],
    ids=repr,
)
def test_scores_equal_a_published_example(backend, metric, published):
    np.testing.assert_allclose(score(metric, backend, SCORES, TRUE), published, rtol=1e-15)


def test_regression_scores_equal_published_examples(backend):
    outputs, targets = [[2.5], [0.0], [2], [8]], [3, -0.5, 2, 7]
    assert score(metrics.MeanSquaredError(), backend, outputs, targets) == 0.375
    assert score(metrics.MeanAbsoluteError(), backend, outputs, targets) == 0.5
    assert score(metrics.R2(), backend, outputs, targets) == pytest.approx(0.9486081370449679, rel=1e-14)
    two = score(metrics.R2(), backend, [[0, 2], [-1, 2], [8, -5]], [[0.5, 1], [-1, 1], [7, -6]])
    assert two == pytest.approx(((1 - 1.25 / (217 / 6)) + (1 - 3 / (98 / 3))) / 2, rel=1e-14)


def test_r2_of_constant_targets_is_one_if_predicted_exactly_else_zero(backend):
    assert score(metrics.R2(), backend, [[1], [1]], [[1], [1]]) == 1
    assert score(metrics.R2(), backend, [[1], [2]], [[1], [1]]) == 0
    for n in range(1, 30):  # Σt² - (Σt)²/n may differ from 0 by rounding
        constant = np.full((n, 1), 0.1)
        assert [score(metrics.R2(), backend, y, constant) for y in (constant, constant + 0.2)] == [1, 0]
    assert score(metrics.R2(), backend, [[1, 2], [1, 4]], [[1, 2], [1, 4]]) == 1


def test_r2_of_predicting_the_mean_is_zero(backend):
    assert score(metrics.R2(), backend, [[2.0]] * 3, [1.0, 2.0, 3.0]) == 0


def test_r2_is_exact_for_targets_with_a_large_mean(backend):
    t = 2000 + np.arange(20.0)  # years
    assert score(metrics.R2(), backend, t + 0.5, t) == pytest.approx(1 - 20 * 0.25 / 665, rel=1e-9)


@pytest.mark.parametrize(
    ("k", "row", "label", "hit"),
    [
        (1, [1, 1, 0], 0, True),  # among equal outputs, the first counts as the largest
        (1, [1, 1, 0], 1, False),
        (2, [1, 1, 0], 1, True),
        (2, [1, 1, 1], 2, False),
        (1, [NAN, 1, 0], 1, False),  # a NaN output counts as larger than the others
        (2, [NAN, 1, 0], 1, True),
        (2, [NAN, 1, 0], 0, False),  # but a NaN output of the true class counts as smaller
        (1, [-math.inf, math.inf, 0], 1, True),
        (3, [3, 2, 1], 2, True),
    ],
)
def test_top_k_accuracy_with_ties_and_nan(backend, k, row, label, hit):
    assert score(metrics.TopKAccuracy(k), backend, [row], [label]) == hit


# Outputs that are compared with a threshold


@pytest.mark.parametrize("shape", [(5,), (5, 1)], ids=str)
@pytest.mark.parametrize(
    ("metric", "want"),
    [
        (metrics.Accuracy(), 3 / 5),
        (metrics.Accuracy(0.8), 4 / 5),
        (metrics.ConfusionMatrix(), [[1, 1], [1, 2]]),
        (metrics.Precision(), 2 / 3),
        (metrics.Precision(threshold=0.8), 1),
        (metrics.Recall(), 2 / 3),
        (metrics.F1(), 2 / 3),
        (metrics.F1("macro"), (2 / 3 + 1 / 2) / 2),
        (metrics.F1("weighted"), (3 * 2 / 3 + 2 * 1 / 2) / 5),
        (metrics.Recall("micro"), 3 / 5),
    ],
    ids=repr,
)
def test_a_single_output_has_threshold_one_half_and_scores_the_positive_class(backend, metric, want, shape):
    outputs, targets = np.array([0.9, 0.5, 0.6, 0.1, 0.85]), np.array([1, 1, 0, 0, 1])
    for y in (targets, targets.astype(float), targets.reshape(shape)):
        np.testing.assert_allclose(score(metric, backend, outputs.reshape(shape), y), want, rtol=1e-15)


def test_the_threshold_is_zero_for_a_loss_on_logits(backend):
    outputs, targets = [[0.2], [-0.1], [0.4], [-3.0]], [1, 0, 1, 0]
    metric = metrics.Accuracy()
    bound = metric.bind(losses.BinaryCrossEntropy())
    assert score(metric, backend, outputs, targets) == 0.5
    assert score(bound, backend, outputs, targets) == 1.0
    assert (metric.threshold, bound.threshold) == (None, 0.0)
    assert metrics.Accuracy(0.3).bind(losses.BinaryCrossEntropy()).threshold == 0.3
    assert metric.bind(losses.MeanSquaredError()) == metric
    assert metrics.MeanSquaredError().bind(losses.BinaryCrossEntropy()) == metrics.MeanSquaredError()


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_each_of_several_binary_outputs_counts(backend, weights):
    outputs = np.array([[2, -1, 0.5], [-1, -2, 3], [1, 1, -1]])
    targets = np.array([[1, 0, 0], [0, 1, 1], [1, 1, 0]])
    loss, w = losses.BinaryCrossEntropy(), np.ones(3) if weights is None else np.array(weights)
    right = (outputs > 0) == targets
    hits, predicted, true = (((outputs > 0) & (targets == 1)).sum(1), (outputs > 0).sum(1), targets.sum(1))
    for metric, want in (
        (metrics.Accuracy(), (w * right.mean(1)).sum() / w.sum()),
        (metrics.Precision(), (w * hits).sum() / (w * predicted).sum()),
        (metrics.Recall(), (w * hits).sum() / (w * true).sum()),
        (metrics.F1(), 2 * (w * hits).sum() / (w * (predicted + true)).sum()),
    ):
        assert score(metric.bind(loss), backend, outputs, targets, weights) == pytest.approx(want, rel=1e-15)


def test_a_class_that_is_never_predicted_or_never_true_scores_zero(backend):
    scores, labels = np.eye(3)[[0, 0, 1]], [0, 0, 0]
    assert score(metrics.Precision(), backend, scores, labels) == 1 / 3
    assert score(metrics.Recall(), backend, scores, labels) == pytest.approx(2 / 9)
    assert score(metrics.F1(), backend, scores, labels) == pytest.approx(0.8 / 3)


def test_the_confusion_matrix_has_integers_unless_weighted(backend):
    assert score(metrics.ConfusionMatrix(), backend, SCORES, TRUE).dtype == np.int64
    weighted = score(metrics.ConfusionMatrix(), backend, SCORES, TRUE, [0.5] * 6)
    assert weighted.tolist() == [[1, 0, 0], [0.5, 0, 0.5], [0, 1, 0]]


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "binary_cross_entropy", "mse"])
def test_evaluate_equals_the_metrics_called_directly(backend, rng, loss):
    outputs = 3 if loss == "softmax_cross_entropy" else 1
    model = xpnet.Sequential([layers.Dense(outputs)], input_shape=4, backend=backend)
    x, y = rng.normal(size=(30, 4)), rng.integers(0, max(outputs, 2), 30)
    names = ["mse", "mae", "r2"] if loss == "mse" else ["accuracy", "precision", "recall", "f1", "confusion_matrix"]
    got = model.evaluate(x, y, loss=loss, metrics=names, batch_size=7)
    assert got.keys() == {"loss", *names}
    for metric in metrics.get(names, losses.get(loss)):
        np.testing.assert_allclose(got[metric.name], metric(model.predict(x), y), rtol=1e-6)


# Arguments


def test_the_default_metric_is_accuracy_for_classification_and_none_otherwise():
    assert metrics.get(None, losses.SoftmaxCrossEntropy()) == [metrics.Accuracy()]
    assert metrics.get(None, losses.BinaryCrossEntropy()) == [metrics.Accuracy(0.0)]
    assert metrics.get(None, losses.MeanSquaredError()) == metrics.get(None, None) == []
    assert metrics.get("mae", None) == metrics.get(metrics.MeanAbsoluteError(), None) == [metrics.MeanAbsoluteError()]


@pytest.mark.parametrize(
    "name", ["accuracy", "top_k_accuracy", "precision", "recall", "f1", "confusion_matrix", "mse", "mae", "r2"]
)
def test_the_name_of_a_metric_is_its_key(name):
    (metric,) = metrics.get(name, None)
    assert metric.name == name
    assert metric.scalar == (name != "confusion_matrix")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: metrics.TopKAccuracy(0), ArgumentError, "TopKAccuracy: k must be an integer of at least 1, not 0"),
        (lambda: metrics.F1("mean"), ArgumentError, "F1: average must be .* not 'mean'"),
        (lambda: metrics.Recall("binary")(SCORES, TRUE), ArgumentError, "needs two classes, not 3"),
        (lambda: metrics.get("acuracy", None), ArgumentError, "unknown metric 'acuracy'. Did you mean 'accuracy'"),
        (lambda: metrics.get([metrics.F1], None), ArgumentTypeError, r"pass an object, F1\(...\)"),
        (
            lambda: metrics.get(["mse", "mse"], None),
            ArgumentError,
            r"each needs its own name.*\['mse', 'mse'\]. Set `metric.name`",
        ),
        (lambda: metrics.Accuracy()([[0, 1]], [0, 1]), ShapeError, "accuracy: 1 outputs but 2 targets"),
    ],
)
def test_invalid_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("metric", "outputs", "targets", "weights"),
    [
        (metrics.R2(), np.zeros((3, 1)), np.arange(6.0).reshape(3, 2), None),
        (metrics.Accuracy(), np.eye(2), [0, 1], [1.0]),
        (metrics.MeanSquaredError(), np.zeros((3, 1)), np.zeros((3, 2)), None),
    ],
    ids=["outputs", "weights", "error class"],
)
def test_metrics_called_directly_do_not_broadcast(metric, outputs, targets, weights):
    with pytest.raises(ShapeError):
        metric(outputs, targets, weights)


def test_a_column_of_labels_is_accepted():
    assert metrics.Accuracy()(np.eye(3), [[0], [1], [2]]) == 1.0


@pytest.mark.parametrize("dtype", ["uint8", "uint64", "int64"])
def test_errors_of_unsigned_integers_do_not_wrap(dtype):
    def ints(a):
        return np.array(a, dtype)

    assert metrics.MeanAbsoluteError()(ints([0, 5]), ints([1, 3])) == 1.5
    assert metrics.MeanSquaredError()(ints([[0]]), ints([[20]])) == 400
    assert metrics.R2()(ints([0, 5]), ints([1, 3])) == -1.5
    assert metrics.MeanSquaredError()(np.zeros((1, 1)), ints([[20]])) == 400


@pytest.mark.parametrize(
    "metric",
    [metrics.Accuracy(), metrics.TopKAccuracy(2), metrics.ConfusionMatrix(), metrics.Precision(), metrics.F1()],
    ids=lambda metric: metric.name,
)
@pytest.mark.parametrize("labels", [[0, 3], [-1, 0], [[0], [3]], [0, 255]])
def test_labels_out_of_range_are_refused(metric, labels):
    with pytest.raises(DataError, match="labels"):
        metric(np.eye(3)[[0, 1]], labels)


@pytest.mark.parametrize("metric", [metrics.Accuracy, metrics.ConfusionMatrix, metrics.Precision, metrics.Recall])
@pytest.mark.parametrize("outputs", [[0.2, 0.9], [[0.2], [0.9]]])
def test_metrics_of_one_output_refuse_targets_outside_0_to_1(metric, outputs):
    for targets in ([0, 2], [-1, 1]):
        with pytest.raises(DataError, match=r"\[0, 1\]"):
            metric()(outputs, targets)


def test_training_and_evaluation_refuse_accuracy_of_targets_outside_0_to_1():
    model, invalid = small_net(outputs=1), LABELS * 5.0
    before = values_of(model)
    with pytest.raises(DataError, match="accuracy"):
        model.fit(SAMPLES, invalid, loss="mse", metrics="accuracy", **QUIET)
    with pytest.raises(DataError, match="accuracy"):
        model.fit(SAMPLES, LABELS, loss="mse", metrics="accuracy", validation_data=(SAMPLES, invalid), **QUIET)
    with pytest.raises(DataError, match="accuracy"):
        model.train_on_batch(SAMPLES, invalid, "mse", "sgd", metrics="accuracy")
    with pytest.raises(DataError, match="accuracy"):
        model.evaluate(SAMPLES, invalid, loss="mse", metrics="accuracy")
    np.testing.assert_array_equal(values_of(model), before)
    assert 0 <= model.evaluate(SAMPLES, LABELS, loss="mse", metrics="accuracy")["accuracy"] <= 1


def test_a_metric_object_can_be_shared_by_models_with_different_outputs():
    shared, y3 = metrics.Precision(), np.arange(20) % 3
    ternary = small_net(outputs=3)
    separate = ternary.evaluate(SAMPLES, y3, "softmax_cross_entropy", metrics=metrics.Precision())
    evaluations = []

    def evaluate(callback, model):
        evaluations.append(ternary.evaluate(SAMPLES, y3, "softmax_cross_entropy", metrics=shared))

    one = small_net(outputs=1).fit(SAMPLES, LABELS, "mse", metrics=metrics.Precision(), **QUIET)
    other = small_net(outputs=1).fit(SAMPLES, LABELS, "mse", metrics=shared, callbacks=[Do(evaluate)], **QUIET)
    assert other == one and evaluations == [separate] * 4
