"""Metrics against loops, results calculated by hand, and scikit-learn, also when summed over batches."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
from names import missing_classes, stable_repr
from small_models import LABELS, QUIET, SAMPLES, Do, small_net, values_of

import xpnet
from xpnet import layers, losses, metrics
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, XpnetError

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
        if metric.collects and total is not None:
            total = backend.xp.concatenate([total, sums])
        else:
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


def loop_kappa(power):
    def kappa(scores, labels, weights):
        table = loop_confusion(scores, labels, weights)
        classes, total = range(len(table)), sum(weights)

        def cost(i, j):
            return abs(i - j) ** power if power else float(i != j)

        observed = sum(cost(i, j) * table[i][j] for i in classes for j in classes)
        chance = sum(
            cost(i, j) * sum(table[i]) * sum(row[j] for row in table) / total for i in classes for j in classes
        )
        return 1 - observed / chance

    return kappa


def loop_auc(scores, labels, weights):
    areas = []
    for k in range(len(scores[0])):
        right = total = 0.0
        for i, j in itertools.product(range(len(labels)), repeat=2):
            if labels[i] == k and labels[j] != k:
                pair = weights[i] * weights[j]
                total += pair
                right += pair * ((scores[i][k] > scores[j][k]) + 0.5 * (scores[i][k] == scores[j][k]))
        if total:
            areas.append(right / total)
    return sum(areas) / len(areas)


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
    *[(metrics.CohenKappa(kind), loop_kappa(power)) for kind, power in ((None, 0), ("linear", 1), ("quadratic", 2))],
    (metrics.AUC(), loop_auc),
]
REGRESSION = [
    (metrics.MeanSquaredError(), loop_errors(2)),
    (metrics.MeanAbsoluteError(), loop_errors(1)),
    (metrics.R2(), loop_r2),
]


def test_every_metric_has_an_example():
    others = [metrics.ClassReport(), metrics.LogLoss()]  # compared with scikit-learn below
    assert not missing_classes(metrics, metrics.Metric, [*others, *[m for m, _ in [*MULTICLASS, *REGRESSION]]])


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
    "name",
    ["accuracy", "top_k_accuracy", "precision", "recall", "f1", "confusion_matrix", "mse", "mae", "r2", "auc",
     "log_loss", "cohen_kappa", "class_report"],
)  # fmt: skip
def test_the_name_of_a_metric_is_its_key(name):
    (metric,) = metrics.get(name, None)
    assert metric.name == name
    assert metric.scalar == (name not in ("confusion_matrix", "class_report"))


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


# Against scikit-learn

WEIGHTS = [None, np.linspace(0.1, 3, 60)]


@pytest.fixture
def sk():
    return pytest.importorskip("sklearn.metrics")


def multiclass(rng, classes=4, n=60):
    """(logits with ties, labels that do not have the last class)."""
    return rng.integers(-4, 5, (n, classes)) / 2, rng.integers(0, classes - 1, n)


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["", "weighted"])
@pytest.mark.parametrize("batch", [None, 7])
def test_auc_of_a_single_output_equals_scikit_learn(backend, rng, sk, weights, batch):
    scores, y = rng.integers(0, 9, (60, 1)) / 8, rng.integers(0, 2, 60)  # with ties
    want = sk.roc_auc_score(y, scores[:, 0], sample_weight=weights)
    for outputs, targets in ((scores, y), (scores[:, 0], y), (scores, y[:, None].astype(float)), (scores - 5, y)):
        assert score(metrics.AUC(), backend, outputs, targets, weights, batch) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["", "weighted"])
def test_auc_of_classes_is_the_mean_of_one_against_rest_over_present_classes(backend, rng, sk, weights):
    logits, y = rng.normal(size=(60, 4)), rng.integers(0, 3, 60)
    p = softmax(logits)
    want = np.mean([sk.roc_auc_score(y == k, p[:, k], sample_weight=weights) for k in range(3)])
    bound = metrics.AUC().bind(losses.SoftmaxCrossEntropy())
    assert score(metrics.AUC(), backend, p, y, weights) == pytest.approx(want, rel=1e-12)
    for targets in (y, np.eye(4)[y]):
        assert score(bound, backend, logits, targets, weights, 13) == pytest.approx(want, rel=1e-12)
    full = np.append(y[:-4], [0, 1, 2, 3])
    ovr = sk.roc_auc_score(full, p, multi_class="ovr", average="macro", sample_weight=weights)
    assert metrics.AUC()(p, full, weights) == pytest.approx(ovr, rel=1e-12)


def test_auc_of_several_yes_or_no_outputs_is_their_mean(backend, rng, sk):
    outputs, targets = rng.normal(size=(50, 3)), rng.integers(0, 2, (50, 3))
    want = sk.roc_auc_score(targets, outputs)
    for metric in (metrics.AUC(), metrics.AUC().bind(losses.BinaryCrossEntropy())):
        assert score(metric, backend, outputs, targets) == pytest.approx(want, rel=1e-12)


def test_auc_of_a_single_class_is_nan_with_a_warning(backend):
    with pytest.warns(UserWarning, match="auc: .*all of one class"):
        assert math.isnan(score(metrics.AUC(), backend, [[0.1], [0.9]], [1, 1]))
    assert math.isnan(score(metrics.AUC(), backend, [[NAN], [0.9]], [1, 0]))


@pytest.mark.parametrize("weights", WEIGHTS, ids=["", "weighted"])
@pytest.mark.parametrize("batch", [None, 7])
def test_log_loss_equals_scikit_learn(backend, rng, sk, weights, batch):
    logits, y = multiclass(rng)
    p = softmax(logits)
    want = sk.log_loss(y, p, labels=range(4), sample_weight=weights)
    logit_metric = metrics.LogLoss().bind(losses.SoftmaxCrossEntropy())
    for metric, outputs in ((metrics.LogLoss(), p), (logit_metric, logits)):
        for targets in (y, y[:, None], np.eye(4)[y]):
            assert score(metric, backend, outputs, targets, weights, batch) == pytest.approx(want, rel=1e-12)
    one, yes = 1 / (1 + np.exp(-logits[:, :1])), y > 0
    want = sk.log_loss(yes, one[:, 0], sample_weight=weights)
    binary = metrics.LogLoss().bind(losses.BinaryCrossEntropy())
    for metric, outputs in ((metrics.LogLoss(), one), (binary, logits[:, :1]), (binary, logits[:, 0])):
        assert score(metric, backend, outputs, yes.astype(float), weights, batch) == pytest.approx(want, rel=1e-12)


def test_log_loss_of_extreme_probabilities_and_logits(sk):
    p = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert metrics.LogLoss()(p, [0, 0]) == pytest.approx(sk.log_loss([0, 0], p, labels=[0, 1]), rel=1e-12)
    assert metrics.LogLoss(from_logits=True)([[0.0, 1000.0]], [0]) == 1000
    assert metrics.LogLoss(from_logits=True)([[1000.0]], [0]) == 1000
    with pytest.raises(DataError, match=r"range from -2 to 3.*from_logits=True"):
        metrics.LogLoss()([[-2.0, 3.0]], [0])


def test_log_loss_of_outputs_that_are_no_probabilities_is_nan_in_evaluation():
    model = xpnet.Sequential([layers.Dense(1)], input_shape=2, seed=0)
    assert math.isnan(model.evaluate(50 * SAMPLES[:, :2], LABELS, "mse", metrics="log_loss")["log_loss"])


@pytest.mark.parametrize("weights", WEIGHTS, ids=["", "weighted"])
@pytest.mark.parametrize("kind", [None, "linear", "quadratic"])
def test_cohen_kappa_equals_scikit_learn(backend, rng, sk, weights, kind):
    outputs, y = multiclass(rng)
    want = sk.cohen_kappa_score(y, outputs.argmax(1), weights=kind, sample_weight=weights)
    assert score(metrics.CohenKappa(kind), backend, outputs, y, weights, 7) == pytest.approx(want, rel=1e-12)
    assert math.isnan(metrics.CohenKappa(kind)([[1.0, 0.0]], [0]))


@pytest.mark.parametrize("weights", WEIGHTS, ids=["", "weighted"])
def test_the_class_report_equals_scikit_learn(backend, rng, sk, weights):
    outputs, y = multiclass(rng)
    outputs[:, 3] = -9  # a class that is neither true nor predicted
    names = ["ant", "bee", "cat", "dog"]
    want = sk.classification_report(
        y, outputs.argmax(1), output_dict=True, target_names=names[:3], sample_weight=weights, zero_division=0
    )
    report = score(metrics.ClassReport(names), backend, outputs, y, weights, 7)
    for key, theirs in [*((name, name) for name in names[:3]), ("macro", "macro avg"), ("weighted", "weighted avg")]:
        for ours, name in (("precision",) * 2, ("recall",) * 2, ("f1", "f1-score"), ("support",) * 2):
            assert report[key][ours] == pytest.approx(want[theirs][name], rel=1e-12), (key, ours)
    assert report["accuracy"] == pytest.approx(want["accuracy"], rel=1e-12)
    assert report["dog"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert report[1] is report["bee"]
    if weights is None:
        assert report["ant"]["support"] == int((y == 0).sum())
        np.testing.assert_array_equal(report.counts[:3, :3], sk.confusion_matrix(y, outputs.argmax(1)))


def test_a_class_report_is_a_table_in_text_and_html():
    report = metrics.ClassReport(["<cat>", "dog"])(np.eye(2)[[0, 0, 1]], [0, 1, 1])
    assert (
        str(report)
        == repr(report)
        == (
            "          precision  recall      f1  support\n"
            "<cat>        0.5000  1.0000  0.6667        1\n"
            "dog          1.0000  0.5000  0.6667        2\n"
            "macro        0.7500  0.7500  0.6667        3\n"
            "weighted     0.8333  0.6667  0.6667        3\n"
            "accuracy                     0.6667        3"
        )
    )
    words, number = '<td style="text-align: left">', '<td style="text-align: right">'
    cells = [f"{words}&lt;cat&gt;</td>", *(f"{number}{text}</td>" for text in ("0.5000", "1.0000", "0.6667", "1"))]
    assert f"<tr>{''.join(cells)}</tr>" in report._repr_html_()
    assert pickle.loads(pickle.dumps(report)) == copy.deepcopy(report) == report
    with pytest.raises(KeyError):
        report["mouse"]
    one = metrics.ClassReport()([0.2, 0.9, 0.8], [0, 1, 0])
    assert one.class_names == ["0", "1"]
    assert one["1"]["precision"] == 0.5


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: metrics.ClassReport("ab"), ArgumentTypeError, "class_names must be a list of names, not 'ab'"),
        (lambda: metrics.ClassReport(3), ArgumentTypeError, "class_names must be a list of names, not 3"),
        (lambda: metrics.ClassReport(["a", "a"]), ArgumentError, "differ from one another"),
        (lambda: metrics.ClassReport(["a", "macro"]), ArgumentError, "differ from one another"),
        (lambda: metrics.ClassReport(["a"])(SCORES, TRUE), ArgumentError, "there are 3 classes, but class_names"),
        (lambda: metrics.CohenKappa("cubic"), ArgumentError, "CohenKappa: weights must be"),
        (lambda: metrics.AUC(from_logits=1), ArgumentError, "AUC: from_logits must be True or False"),
        (lambda: metrics.get(3, None), ArgumentTypeError, "metrics must be a name, a Metric or a list of them, not 3"),
    ],
)
def test_invalid_arguments_of_reports_and_scores_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "binary_cross_entropy"])
def test_metrics_of_classifiers_in_evaluate_and_in_validation(backend, rng, loss, sk):
    outputs = 3 if loss == "softmax_cross_entropy" else 1
    model = xpnet.Sequential([layers.Dense(outputs)], input_shape=4, backend=backend)
    x, y = rng.normal(size=(30, 4)).astype("float32"), rng.integers(0, max(outputs, 2), 30)
    names = ["auc", "log_loss", "cohen_kappa"]
    history = model.fit(x, y, loss, "sgd", metrics=names, validation_data=(x, y), epochs=2, batch_size=8, verbose=0)
    got = model.evaluate(x, y, loss=loss, metrics=[*names, "class_report"], batch_size=7)
    for name in names:
        assert len(history[name]) == 2
        assert history[f"val_{name}"][-1] == pytest.approx(got[name], rel=1e-6)
    z = model.predict(x)
    p = softmax(z) if outputs == 3 else 1 / (1 + np.exp(-z[:, 0]))
    assert got["auc"] == pytest.approx(sk.roc_auc_score(y, p, multi_class="ovr"), rel=1e-6)
    assert got["log_loss"] == pytest.approx(sk.log_loss(y, p), rel=1e-5)
    assert got["log_loss"] == pytest.approx(got["loss"], rel=1e-5)
    assert got["class_report"]["accuracy"] == metrics.get("accuracy", losses.get(loss))[0](z, y)
    stream = [(x[i : i + 7], y[i : i + 7]) for i in range(0, 30, 7)]
    assert model.evaluate(stream, loss=loss, metrics="auc")["auc"] == got["auc"]


def test_a_class_report_cannot_be_a_history_value():
    with pytest.raises(ArgumentError, match="history holds only numbers"):
        small_net().fit(SAMPLES, LABELS, "binary_cross_entropy", metrics="class_report", **QUIET)


# Counts and sums


def test_counts_beyond_two_to_the_24_are_exact(backend):
    outputs, labels = backend.asarray(np.eye(2)[[0, 0, 1]].astype("float32")), backend.asarray(np.array([0, 0, 1]))
    for metric, want in ((metrics.ConfusionMatrix(), [[2**40 + 2, 0], [0, 1]]), (metrics.Accuracy(), 1.0)):
        sums = metric.sums(backend, outputs, labels, None)
        assert backend.to_numpy(sums).dtype == np.int64
        before = np.zeros(sums.shape, np.int64)
        before.flat[0] = 2**40
        if metric.name == "accuracy":
            before[1] = 2**40
        total = metric.merge(backend.asarray(before), sums)
        np.testing.assert_array_equal(metric.result(backend.to_numpy(total)), want)


def test_a_batch_of_more_than_two_to_the_24_samples_is_counted_exactly():
    n = 2**24 + 11
    true = np.ones(n, np.int8)
    assert xpnet.get_backend("cpu").count_pairs(true, true, (2, 3), None)[1, 1] == n


def test_weights_are_added_up_in_float64(backend):
    n = 300_000 if backend.name == "cpu" else 30_000
    model = xpnet.Sequential([layers.Dense(2)], input_shape=1, backend=backend)
    x, y = np.zeros((n, 1), "float32"), np.zeros(n, int)
    got = model.evaluate(
        x, y, "softmax_cross_entropy", metrics=["confusion_matrix"], sample_weight=np.full(n, 0.1), batch_size=50_000
    )
    assert got["confusion_matrix"].sum() == pytest.approx(n / 10, rel=1e-12)
    assert metrics.ConfusionMatrix()(np.tile([[1.0, 0.0]], (n, 1)), y, np.full(n, 0.1)).sum() == pytest.approx(
        n / 10, abs=1e-9
    )


# Dtypes


@pytest.mark.parametrize("metric", [metrics.MeanSquaredError(), losses.MeanSquaredError()], ids=repr)
def test_float16_does_not_overflow(metric):
    a = np.array([[300.0], [0.0]], np.float16)
    assert metric(a, np.zeros((2, 1), np.float16)) == 45000
    assert metric(a, np.zeros((2, 1), np.float16), np.array([1, 3], np.float16)) == 22500


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint64", "bool", "float16"])
def test_metrics_and_losses_of_small_dtypes_equal_those_of_float64(rng, dtype):
    outputs, targets = rng.integers(0, 2, (2, 20, 3)).astype(dtype)
    regression = [
        metrics.MeanSquaredError(), metrics.MeanAbsoluteError(), metrics.R2(), losses.MeanSquaredError(),
        losses.HalfSquaredError(), losses.MeanAbsoluteError(), losses.Huber(0.3), losses.BinaryCrossEntropy(0.1),
    ]  # fmt: skip
    for metric in regression:
        assert metric(outputs, targets) == metric(outputs.astype(float), targets.astype(float)), metric
    one_hot = np.eye(3)[rng.integers(0, 3, 20)]
    classifying = [losses.SoftmaxCrossEntropy(0.1), *(m for m, _ in MULTICLASS), metrics.LogLoss(from_logits=True)]
    for metric in classifying:
        want = metric(outputs.astype(float), one_hot)
        np.testing.assert_array_equal(metric(outputs, one_hot.astype(dtype)), want, err_msg=repr(metric))
        labels = one_hot.argmax(1)
        if dtype != "bool":
            np.testing.assert_array_equal(metric(outputs, labels.astype(dtype)), want, err_msg=repr(metric))


def test_uint8_labels_above_127_are_classes():
    outputs = np.eye(200)[[199, 128, 5]]
    for labels in (np.array([199, 128, 5], np.uint8), np.array([199, 128, 5], np.uint16)):
        assert metrics.Accuracy()(outputs, labels) == 1
        counts = metrics.ConfusionMatrix()(outputs, labels)
        assert (counts[199, 199], counts[128, 128], counts.sum()) == (1, 1, 3)
    with pytest.raises(DataError, match="labels range from -128 to 5"):
        metrics.Accuracy()(outputs, np.array([199, 128, 5], np.uint8).view(np.int8))


# NaN

ALL_NAN = np.full((4, 3), NAN, "float32")


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 1.0]])
def test_a_sample_with_nan_outputs_is_a_miss(backend, batch, weights):
    some = np.array([[NAN, 0, 0], [0, NAN, 1], [1, 0, NAN], [NAN, NAN, 5]], "float32")
    for labels in ([0] * 4, [0, 1, 2, 0]):
        for metric in (
            metrics.Accuracy(), metrics.TopKAccuracy(1), metrics.Recall(), metrics.Precision(), metrics.F1("micro"),
        ):  # fmt: skip
            for outputs in (ALL_NAN, some):
                assert score(metric, backend, outputs, labels, weights, batch) == 0, (metric, outputs)
        assert score(metrics.TopKAccuracy(3), backend, ALL_NAN, labels, weights, batch) == 0


@pytest.mark.parametrize("weights", [None, [1.0, 2.0]])
@pytest.mark.parametrize("label", [0, 1])
def test_a_yes_or_no_output_of_nan_is_a_miss(backend, label, weights):
    bound = metrics.Accuracy().bind(losses.BinaryCrossEntropy())
    for outputs in ([[NAN], [NAN]], [NAN, NAN]):
        for metric in (metrics.Accuracy(), bound, metrics.Accuracy(-1.0), metrics.Recall("macro"), metrics.F1()):
            assert score(metric, backend, outputs, [label, label], weights) == 0
    assert score(bound, backend, [[NAN, 1.0], [NAN, -1.0]], [[0, 1], [1, 0]]) == 0.5


@pytest.mark.parametrize("metric", [metrics.ConfusionMatrix(), metrics.ClassReport()], ids=repr)
def test_confusion_matrix_and_report_refuse_nan(backend, metric):
    with pytest.raises(DataError, match=f"{metric.name}: the outputs contain NaN.* weight of 1"):
        score(metric, backend, [[NAN, 1.0], [0.0, 1.0]], [0, 1])
    with pytest.raises(DataError, match=f"{metric.name}: the outputs contain NaN"):
        metric([NAN, 0.5], [0, 1])


def test_scores_of_nan_outputs_are_nan(backend):
    for metric in (metrics.MeanSquaredError(), metrics.MeanAbsoluteError(), metrics.R2()):
        assert math.isnan(score(metric, backend, [[NAN], [1.0]], [[1.0], [1.0]]))
    for metric in (metrics.LogLoss(), metrics.CohenKappa(), metrics.LogLoss(from_logits=True)):
        assert math.isnan(score(metric, backend, [[NAN, 1.0], [0.0, 1.0]], [0, 1]))


def test_a_model_whose_outputs_are_nan_has_accuracy_zero(backend):
    for outputs, loss in ((3, "softmax_cross_entropy"), (1, "binary_cross_entropy")):
        model = xpnet.Sequential([layers.Dense(outputs)], input_shape=2, backend=backend)
        model.parameters[0].value[...] = NAN
        assert model.evaluate(np.ones((5, 2)), np.zeros(5, int), loss)["accuracy"] == 0
        got = model.evaluate(np.ones((5, 2)), np.zeros(5, int), loss, sample_weight=np.ones(5))
        assert got["accuracy"] == 0


# Wrong arrays

ALL_METRICS = [cls() for cls in dict.fromkeys(metrics._NAMES.values())]
ALL_LOSSES = [cls() for cls in dict.fromkeys(losses._NAMES.values())]


@pytest.mark.parametrize("metric", [*ALL_METRICS, *ALL_LOSSES], ids=repr)
@pytest.mark.parametrize(
    ("outputs", "targets", "weights"),
    [
        (0.5, 1, None),
        (0.5, [1], None),
        ([0.5], 1, None),
        ([], [], None),
        (np.zeros((0, 3)), np.zeros(0, int), None),
        (np.zeros((3, 0)), np.zeros(3, int), None),
        ([[0.5, 0.5]], [[]], None),
        ([[0.5, 0.5]], [0, 1], None),
        ([[0.5, 0.5]], [[0, 1, 0]], None),
        ([[0.5, 0.5]], ["a"], None),
        (["a"], [0], None),
        ([[0.5], [0.5, 1]], [0, 1], None),
        (np.zeros((2, 2), complex), [0, 1], None),
        ([[0.5, 0.5]] * 2, [0, NAN], None),
        ([[0.5, 0.5]] * 2, [0, math.inf], None),
        ([[0.5], [0.5]], [0, 1], 1.0),
        ([[0.5], [0.5]], [0, 1], [1.0]),
        ([[0.5], [0.5]], [0, 1], [1.0, -1.0]),
        ([[0.5], [0.5]], [0, 1], [0.0, 0.0]),
        ([[0.5], [0.5]], [0, 1], [1.0, NAN]),
        ([[0.5], [0.5]], [0, 1], ["a", "b"]),
        (None, [0, 1], None),
        ([0, 1], None, None),
        ({}, {}, None),
        (np.ma.masked_array([[0.5], [0.5]], [[1], [0]]), [0, 1], None),
        ([[0.5], [0.5]], np.ma.masked_array([0, 1], [1, 0]), None),
        ([[0.5], [0.5]], [0, 1], np.ma.masked_array([1.0, 1.0], [1, 0])),
    ],
)
def test_metrics_and_losses_refuse_wrong_arrays_with_their_own_errors(metric, outputs, targets, weights):
    with pytest.raises(XpnetError) as error:
        metric(outputs, targets, weights)
    assert type(metric).__name__ in str(error.value) or getattr(metric, "name", "?") in str(error.value)


@pytest.mark.parametrize(
    "metric",
    [*(m for m in ALL_METRICS if m.name not in ("mse", "mae", "r2")), losses.SoftmaxCrossEntropy()],
    ids=repr,
)
@pytest.mark.parametrize("labels", [[0, 1.5], [0, -1], [0, 2], [0.0, 300.0], [[0], [7]]])
def test_classification_metrics_and_losses_refuse_labels_that_are_no_class(metric, labels):
    with pytest.raises(DataError, match="labels|whole numbers"):
        metric([[0.2, 0.8], [0.6, 0.4]], labels)


@pytest.mark.parametrize(
    "metric", [m for m in ALL_METRICS if m.name not in ("mse", "mae", "r2")], ids=lambda metric: metric.name
)
def test_classification_metrics_refuse_outputs_of_more_axes(metric):
    with pytest.raises(ShapeError, match=r"\(N, K\)"):
        metric(np.full((2, 3, 4), 0.25), [0, 1])


def test_metrics_that_do_not_fit_are_refused_before_training():
    for metric, message in ((metrics.F1("binary"), "two classes, not 3"), ("mse", r"mse: outputs \(12, 3\) and")):
        model = small_net(outputs=3)
        before = values_of(model)
        with pytest.raises(ArgumentError, match=message):
            model.fit(SAMPLES[:12], np.arange(12) % 3, "softmax_cross_entropy", metrics=metric, **QUIET)
        np.testing.assert_array_equal(values_of(model), before)
