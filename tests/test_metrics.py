"""Metrics against loops, against figures worked out by hand, and summed over batches."""

import math

import numpy as np
import pytest
from names import shown

import xpnet
from xpnet import layers, losses, metrics
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError

NAN = math.nan
AVERAGES = ["macro", "micro", "weighted"]


def figure(metric, backend, outputs, targets, weights=None, batch=None):
    """The metric over these arrays on a device, `batch` samples at a time, as training takes it."""
    n, total = len(outputs), None
    for start in range(0, n, batch or n):
        rows = slice(start, start + (batch or n))
        part = [
            backend.asarray(np.asarray(a)[rows]) for a in (outputs, targets, *([] if weights is None else [weights]))
        ]
        sums = metric.sums(backend, *part, *([None] if weights is None else []))
        total = sums if total is None else metric.merge(total, sums)
    return metric.result(backend.to_numpy(total))


# Loops, from the definitions.


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
        centre = sum(w * b for w, b in zip(weights, t, strict=True)) / sum(weights)
        spread = sum(w * (b - centre) ** 2 for w, b in zip(weights, t, strict=True))
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


@pytest.mark.parametrize(
    "weights", [None, np.array([2, 1, 0, 3, 1, 1, 2, 5, 1, 1, 1]), np.linspace(0.1, 3, 11)], ids=["", "whole", "real"]
)
@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize(("metric", "loop"), [*MULTICLASS, *REGRESSION], ids=shown)
def test_metrics_follow_their_definition_over_batches_and_weights(backend, rng, metric, loop, batch, weights):
    if metric.name in ("mse", "mae", "r2"):
        outputs, targets = rng.normal(size=(2, 11, 3))
        host_targets = targets.tolist()
    else:  # small whole numbers, so that there are ties; class 3 is never true
        outputs, targets = rng.integers(0, 5, (11, 4)).astype(float), rng.integers(0, 3, 11)
        host_targets = targets.tolist()
        one_hot = figure(metric, backend, outputs, np.eye(4)[targets], weights, batch)
        np.testing.assert_array_equal(one_hot, figure(metric, backend, outputs, targets, weights, batch))
    want = loop(outputs.tolist(), host_targets, [1.0] * 11 if weights is None else weights.tolist())
    np.testing.assert_allclose(figure(metric, backend, outputs, targets, weights, batch), want, rtol=1e-12)
    if weights is not None and weights.dtype.kind == "i":
        repeated = figure(metric, backend, outputs.repeat(weights, 0), targets.repeat(weights, 0))
        np.testing.assert_allclose(repeated, want, rtol=1e-12)
    if batch is None:
        np.testing.assert_allclose(metric(outputs, targets, weights), want, rtol=1e-12)


@pytest.mark.parametrize("metric", [m for m, _ in (*MULTICLASS, *REGRESSION)], ids=repr)
def test_metrics_read_float32_outputs_as_exactly_as_float64(backend, rng, metric):
    outputs = rng.normal(size=(50, 4)).astype("float32")
    targets = (
        rng.normal(size=(50, 4)).astype("float32") if metric.name in ("mse", "mae", "r2") else rng.integers(0, 4, 50)
    )
    got, want = figure(metric, backend, outputs, targets), metric(outputs.astype("float64"), targets)
    np.testing.assert_allclose(got, want, rtol=1e-6 if targets.dtype.kind == "f" else 0)


# Figures worked out by hand.

LABELS, PREDICTED = [0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1]  # the example in scikit-learn's manual
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
def test_figures_of_a_well_known_example(backend, metric, published):
    np.testing.assert_allclose(figure(metric, backend, SCORES, LABELS), published, rtol=1e-15)


def test_regression_figures_by_hand(backend):
    outputs, targets = [[2.5], [0.0], [2], [8]], [3, -0.5, 2, 7]
    assert figure(metrics.MeanSquaredError(), backend, outputs, targets) == 0.375
    assert figure(metrics.MeanAbsoluteError(), backend, outputs, targets) == 0.5
    assert figure(metrics.R2(), backend, outputs, targets) == pytest.approx(0.9486081370449679, rel=1e-14)
    two = figure(metrics.R2(), backend, [[0, 2], [-1, 2], [8, -5]], [[0.5, 1], [-1, 1], [7, -6]])
    assert two == pytest.approx(((1 - 1.25 / (217 / 6)) + (1 - 3 / (98 / 3))) / 2, rel=1e-14)


def test_r2_of_an_output_that_never_varies_is_one_if_met_else_zero(backend):
    assert figure(metrics.R2(), backend, [[1], [1]], [[1], [1]]) == 1
    assert figure(metrics.R2(), backend, [[1], [2]], [[1], [1]]) == 0
    for n in range(1, 30):  # though rounding may leave a little of Σt² - (Σt)²/n
        same = np.full((n, 1), 0.1)
        assert [figure(metrics.R2(), backend, y, same) for y in (same, same + 0.2)] == [1, 0]
    assert figure(metrics.R2(), backend, [[1, 2], [1, 4]], [[1, 2], [1, 4]]) == 1


def test_r2_of_predicting_the_mean_is_zero(backend):
    assert figure(metrics.R2(), backend, [[2.0]] * 3, [1.0, 2.0, 3.0]) == 0


def test_r2_keeps_its_digits_where_the_mean_is_far_from_zero(backend):
    t = 2000 + np.arange(20.0)  # years
    assert figure(metrics.R2(), backend, t + 0.5, t) == pytest.approx(1 - 20 * 0.25 / 665, rel=1e-9)


@pytest.mark.parametrize(
    ("k", "row", "label", "hit"),
    [
        (1, [1, 1, 0], 0, True),  # of equal outputs the first counts as larger
        (1, [1, 1, 0], 1, False),
        (2, [1, 1, 0], 1, True),
        (2, [1, 1, 1], 2, False),
        (1, [NAN, 1, 0], 1, False),  # NaN beats what is compared with it
        (2, [NAN, 1, 0], 1, True),
        (2, [NAN, 1, 0], 0, False),  # and is beaten where it is the answer
        (1, [-math.inf, math.inf, 0], 1, True),
        (3, [3, 2, 1], 2, True),
    ],
)
def test_top_k_with_ties_and_nan(backend, k, row, label, hit):
    assert figure(metrics.TopKAccuracy(k), backend, [row], [label]) == hit


# One output, or several that are decided one by one.


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
def test_a_single_output_is_decided_at_a_half_and_scored_for_yes(backend, metric, want, shape):
    outputs, targets = np.array([0.9, 0.5, 0.6, 0.1, 0.85]), np.array([1, 1, 0, 0, 1])
    for y in (targets, targets.astype(float), targets.reshape(shape)):
        np.testing.assert_allclose(figure(metric, backend, outputs.reshape(shape), y), want, rtol=1e-15)


def test_under_a_loss_on_logits_the_threshold_is_zero(backend):
    outputs, targets = [[0.2], [-0.1], [0.4], [-3.0]], [1, 0, 1, 0]
    metric = metrics.Accuracy()
    bound = metric.bind(losses.BinaryCrossEntropy())
    assert figure(metric, backend, outputs, targets) == 0.5
    assert figure(bound, backend, outputs, targets) == 1.0
    assert (metric.threshold, bound.threshold) == (None, 0.0)
    assert metrics.Accuracy(0.3).bind(losses.BinaryCrossEntropy()).threshold == 0.3
    assert metric.bind(losses.MeanSquaredError()) == metric
    assert metrics.MeanSquaredError().bind(losses.BinaryCrossEntropy()) == metrics.MeanSquaredError()


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_several_yes_or_no_outputs_count_one_by_one(backend, weights):
    outputs = np.array([[2, -1, 0.5], [-1, -2, 3], [1, 1, -1]])
    targets = np.array([[1, 0, 0], [0, 1, 1], [1, 1, 0]])
    loss, w = losses.BinaryCrossEntropy(), np.ones(3) if weights is None else np.array(weights)
    right = (outputs > 0) == targets
    hits, said, true = (((outputs > 0) & (targets == 1)).sum(1), (outputs > 0).sum(1), targets.sum(1))
    for metric, want in (
        (metrics.Accuracy(), (w * right.mean(1)).sum() / w.sum()),
        (metrics.Precision(), (w * hits).sum() / (w * said).sum()),
        (metrics.Recall(), (w * hits).sum() / (w * true).sum()),
        (metrics.F1(), 2 * (w * hits).sum() / (w * (said + true)).sum()),
    ):
        assert figure(metric.bind(loss), backend, outputs, targets, weights) == pytest.approx(want, rel=1e-15)


def test_a_class_never_predicted_or_never_true_counts_as_zero(backend):
    scores, labels = np.eye(3)[[0, 0, 1]], [0, 0, 0]
    assert figure(metrics.Precision(), backend, scores, labels) == 1 / 3
    assert figure(metrics.Recall(), backend, scores, labels) == pytest.approx(2 / 9)
    assert figure(metrics.F1(), backend, scores, labels) == pytest.approx(0.8 / 3)


def test_the_confusion_matrix_counts_in_whole_numbers_unless_weighted(backend):
    assert figure(metrics.ConfusionMatrix(), backend, SCORES, LABELS).dtype == np.int64
    weighted = figure(metrics.ConfusionMatrix(), backend, SCORES, LABELS, [0.5] * 6)
    assert weighted.tolist() == [[1, 0, 0], [0.5, 0, 0.5], [0, 1, 0]]


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "binary_cross_entropy", "mse"])
def test_evaluate_gives_what_the_metrics_give_by_themselves(backend, rng, loss):
    outputs = 3 if loss == "softmax_cross_entropy" else 1
    model = xpnet.Sequential([layers.Dense(outputs)], input_shape=4, backend=backend)
    x, y = rng.normal(size=(30, 4)), rng.integers(0, max(outputs, 2), 30)
    names = ["mse", "mae", "r2"] if loss == "mse" else ["accuracy", "precision", "recall", "f1", "confusion_matrix"]
    got = model.evaluate(x, y, loss=loss, metrics=names, batch_size=7)
    assert got.keys() == {"loss", *names}
    for metric in metrics.get(names, losses.get(loss)):
        np.testing.assert_allclose(got[metric.name], metric(model.predict(x), y), rtol=1e-6)


# What is given and what is refused.


def test_without_a_choice_classifiers_get_accuracy_and_others_nothing():
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
        (lambda: metrics.TopKAccuracy(0), ArgumentError, "k must be at least 1, not 0"),
        (lambda: metrics.F1("mean"), ArgumentError, "F1: average must be .* not 'mean'"),
        (lambda: metrics.Recall("binary")(SCORES, LABELS), ArgumentError, "needs two classes, not 3"),
        (lambda: metrics.get("acuracy", None), ArgumentError, "unknown metric 'acuracy'. Did you mean 'accuracy'"),
        (lambda: metrics.get([metrics.F1], None), ArgumentTypeError, r"pass an object, F1\(...\)"),
        (
            lambda: metrics.get(["mse", "mse"], None),
            ArgumentError,
            r"name of its own.*\['mse', 'mse'\]. Set `metric.name`",
        ),
        (lambda: metrics.Accuracy()([[0, 1]], [0, 1]), ShapeError, "accuracy: 1 outputs but 2 targets"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(make, error, message):
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
def test_metrics_called_by_hand_broadcast_nothing(metric, outputs, targets, weights):
    with pytest.raises(ShapeError):
        metric(outputs, targets, weights)


def test_a_column_of_labels_is_read_as_labels():
    assert metrics.Accuracy()(np.eye(3), [[0], [1], [2]]) == 1.0
