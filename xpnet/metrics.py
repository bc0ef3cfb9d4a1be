"""Metrics: scores such as accuracy, computed from sums over samples that stay on the device until the end.

A metric turns each batch into a small array of sums, adds up those of all batches, and computes its result from the
total. Counts are exact, in 64-bit integers; sums are float64. A sample of weight w counts w times. A sample with NaN
among its outputs is never counted as correct.

Invalid arguments raise ArgumentError, targets whose shape does not fit the outputs ShapeError, and labels that are not
classes of the model DataError.
"""

import copy
import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from xpnet.backends import Array, Backend, get_backend
from xpnet.config import (
    Configured,
    checked_samples,
    choice,
    flag,
    integer,
    items_of,
    missing_method,
    number,
    real_array,
    refuse_non_finite_targets,
    resolve,
)
from xpnet.display import tables
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, shown
from xpnet.losses import BinaryCrossEntropy, Loss, SoftmaxCrossEntropy

__all__ = ["AUC", "F1", "R2", "Accuracy", "ClassReport", "CohenKappa", "ConfusionMatrix", "LogLoss",
           "MeanAbsoluteError", "MeanSquaredError", "Metric", "Precision", "Recall", "Report", "TopKAccuracy",
           "get"]  # fmt: skip


class Metric(Configured):
    """The base of every metric. A subclass defines `sums`, on the device, and may define `result`, on the host."""

    #: The key in the history and in the result of `evaluate`.
    name: str = ""
    #: In a model with several outputs: the number of the output that is scored.
    output: int | None = None
    #: Whether the result is one number, which a history can hold.
    scalar: ClassVar[bool] = True
    #: Whether merge(zeros, sums) == sums. A subclass with its own `merge` sets it to True if that holds: only then
    #: can a GPU capture the step.
    starts_from_zeros: ClassVar[bool] = True
    #: Whether `sums` returns one row per sample, (N, ...), and `result` takes the rows of all samples. They are kept in
    #: the memory of the device. A GPU then does not capture the training step.
    collects: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.collects or ("merge" in cls.__dict__ and "starts_from_zeros" not in cls.__dict__):
            cls.starts_from_zeros = False

    @abstractmethod
    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        """The sums over a batch: outputs (N, ...), targets as the loss takes them, weights (N,) or None."""
        raise missing_method(self, "sums(backend, outputs, targets, weights)")

    def merge(self, total: Array, sums: Array) -> Array:
        """Combine the sums of two parts of the data. Not called if the metric collects rows."""
        if total.shape != sums.shape:
            raise ShapeError(
                f"{type(self).__name__}: sums must return arrays of one shape for all batches, but returned "
                f"{tuple(total.shape)} and {tuple(sums.shape)}: add up the samples, or set collects = True."
            )
        return total + sums

    def restored(self, sums: Any) -> Any:
        """Convert sums from a checkpoint, a NumPy array, to the layout of `sums`, which may differ in older files."""
        return sums

    def result(self, sums: Any) -> Any:
        """The score, from the total of the sums as a NumPy array: by default sums[0] / sums[1], 0 if sums[1] is 0."""
        if sums.shape != (2,):
            raise ShapeError(
                f"{type(self).__name__}: sums must return two numbers, whose ratio is the result, not the shape "
                f"{sums.shape}; for other sums, define result(sums)."
            )
        return _ratio(sums[0], sums[1])

    def bind(self, loss: Loss | None) -> "Metric":
        """Return a copy for the outputs of a model trained with `loss`, which are logits or probabilities."""
        return copy.copy(self)

    def check_targets(self, targets: Array, outputs_shape: tuple[int, ...]) -> None:
        """Raise DataError or ShapeError for targets that this metric does not accept. Reads the device."""

    def __call__(self, outputs: Any, targets: Any, sample_weight: Any = None) -> Any:
        """The score of these arrays, computed on the host in float64."""
        backend = get_backend("cpu")
        outputs, targets, weights = checked_samples(self.name, outputs, targets, sample_weight)
        if targets.size not in (len(targets), outputs.size):
            raise ShapeError(f"{self.name}: outputs {outputs.shape} and targets {targets.shape} do not fit.")
        refuse_non_finite_targets(self.name, targets)
        self.check_targets(targets, outputs.shape)
        return self.result(backend.to_numpy(self.sums(backend, outputs, targets, weights)))


class _ClassificationMetric(Metric):
    """The base of metrics of classifiers: outputs are either one per class, (N, K), or yes-or-no answers."""

    def _has_classes(self, outputs_shape: tuple[int, ...]) -> bool:
        """Whether there is one output per class, rather than separate yes-or-no answers."""
        return len(outputs_shape) > 1 and outputs_shape[-1] > 1

    def check_targets(self, targets: Array, outputs_shape: tuple[int, ...]) -> None:
        check = _check_labels if self._has_classes(outputs_shape) else _check_yes_or_no
        check(self.name, targets, outputs_shape)


class _DecisionMetric(_ClassificationMetric):
    """The base of metrics of predicted classes. Accuracy explains how outputs become classes."""

    def __init__(self, threshold: float | None = None) -> None:
        self.threshold = None if threshold is None else number(self, "threshold", threshold, also="None")

    def bind(self, loss: Loss | None) -> Metric:
        bound = copy.copy(self)
        if self.threshold is None and loss is not None:
            bound.threshold = loss.decision_threshold
        return bound

    def _has_classes(self, outputs_shape: tuple[int, ...]) -> bool:
        return self.threshold is None and super()._has_classes(outputs_shape)

    def decide(
        self, backend: Backend, outputs: Array, targets: Array, weights: Array | None
    ) -> tuple[Array, Array, Array | None, int]:
        """(predicted classes, true classes, weights, number of classes K); the arrays are flat.

        Outputs with NaN get the class K, which no sample has.
        """
        xp = backend.xp
        if weights is not None:
            weights = weights.astype(xp.float64, copy=False)
        if self._has_classes(outputs.shape):
            classes, largest = int(outputs.shape[-1]), xp.max(outputs, axis=-1)
            predicted = xp.where(largest == largest, outputs.argmax(axis=-1), classes)
            return predicted, _labels(targets), weights, classes
        outputs = outputs.reshape(-1)
        if weights is not None and outputs.size != len(weights):
            weights = xp.repeat(weights, int(outputs.size) // len(weights))
        predicted = xp.where(outputs == outputs, (outputs > self._limit).astype(xp.int64), 2)
        return predicted, (targets.reshape(-1) > 0.5).astype(xp.int64), weights, 2

    @property
    def _limit(self) -> float:
        """The threshold between no and yes."""
        return 0.5 if self.threshold is None else self.threshold


class Accuracy(_DecisionMetric):
    """The fraction of correct predictions.

    threshold: with a number, each output is a yes-or-no answer, yes above the threshold. With None, the class of the
    largest output is predicted; a single output is compared with 0.5, or with 0 if the loss takes logits.
    """

    name = "accuracy"

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        xp = backend.xp
        if weights is None and self._has_classes(outputs.shape):
            return backend.count_correct(outputs, _labels(targets))
        if weights is None:
            true, limit = targets.reshape(outputs.shape) > 0.5, self._limit
            return _correct(xp, xp.where(true, outputs > limit, outputs <= limit), None)
        predicted, true, weights, _ = self.decide(backend, outputs, targets, weights)
        return _correct(xp, predicted == true, weights)


class TopKAccuracy(Metric):
    """The fraction of samples whose class has one of the k largest outputs. In a tie, the lower class number wins.

    NaN counts as larger than any number, and a class whose output is NaN is never among the k.
    """

    name = "top_k_accuracy"

    def __init__(self, k: int = 5) -> None:
        self.k = integer(self, "k", k)

    def check_targets(self, targets: Array, outputs_shape: tuple[int, ...]) -> None:
        _check_labels(self.name, targets, outputs_shape)

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        xp = backend.xp
        true = _labels(targets)[:, None]
        score = xp.take_along_axis(outputs, true, axis=1)
        earlier = xp.arange(outputs.shape[1])[None, :] < true
        # "not ≤" rather than ">": a NaN score is below all others.
        ahead = xp.logical_not(outputs <= score) | ((outputs == score) & earlier)
        found = (xp.sum(ahead, axis=1) < self.k) & (score == score)[:, 0]
        return _correct(xp, found, weights)


class _Counts(_DecisionMetric):
    """The base of metrics on the numbers of samples by true and predicted class."""

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        """Counts (K, K + 1): int64, or sums of weights in float64. In the last column are samples with NaN outputs."""
        predicted, true, weights, classes = self.decide(backend, outputs, targets, weights)
        return backend.count_pairs(true, predicted, (classes, classes + 1), weights)

    def restored(self, sums: Any) -> Any:
        missing = len(sums) + 1 - sums.shape[1]  # files of version 0.1 lack the last column
        return get_backend("cpu").xp.pad(sums, ((0, 0), (0, missing)))

    def _refuse_nan(self, sums: Any) -> Any:
        """The counts (K, K). Raises DataError if samples with NaN outputs were counted."""
        if sums[:, len(sums) :].any():
            raise DataError(
                f"{self.name}: the outputs contain NaN, which is no class, for samples of a total weight of "
                f"{sums[:, -1].sum():g}."
            )
        return sums[:, : len(sums)]


class ConfusionMatrix(_Counts):
    """Counts (K, K), by true class (row) and predicted class (column).

    Use it with `evaluate`, not with `fit`, whose history holds only numbers. Outputs with NaN raise DataError.

    threshold: as in Accuracy.
    """

    name = "confusion_matrix"
    scalar = False

    def result(self, sums: Any) -> Any:
        counts = self._refuse_nan(sums)
        exact = counts.max() <= 2.0**53 and not (counts % 1).any()
        return counts.astype("int64") if exact else counts


class Report(dict[str, Any]):
    """What ClassReport returns: {class name: {"precision": …, "recall": …, "f1": …, "support": …}}.

    report["macro"] and report["weighted"] have the same keys, with means over the classes that occur among targets or
    predictions; in the latter, weighted by support. report["accuracy"] is a number, and report[3] the entry of class
    number 3. `print` and notebooks show the report as a table.

    counts: the confusion matrix (K, K).  class_names: the names of the K classes.
    """

    def __init__(self, counts: Any, class_names: Sequence[str]) -> None:
        self.class_names = _names(self, class_names)
        self.counts = counts = real_array(counts, "Report: counts")
        if counts.shape != (len(self.class_names),) * 2:
            raise ShapeError(
                f"Report: counts must be a matrix with a row and a column for each of class_names, {self.class_names}."
            )
        each = []
        for k, name in enumerate(self.class_names):
            correct, predicted, actual = counts[k, k].item(), counts[:, k].sum().item(), counts[k].sum().item()
            precision, recall = _ratio(correct, predicted), _ratio(correct, actual)
            f1 = _ratio(2.0 * correct, predicted + actual)
            self[name] = {"precision": precision, "recall": recall, "f1": f1, "support": actual}
            each.append((self[name], predicted + actual > 0))
        total = counts.sum().item()
        present = [scores for scores, occurs in each if occurs]
        self["accuracy"] = _ratio(counts.diagonal().sum().item(), total)
        for average, shares in (("macro", [1.0] * len(present)), ("weighted", [s["support"] for s in present])):
            self[average] = {
                score: _ratio(sum(share * s[score] for share, s in zip(shares, present, strict=True)), sum(shares))
                for score in ("precision", "recall", "f1")
            } | {"support": total}

    def __missing__(self, key: Any) -> Any:
        if hasattr(key, "__index__") and 0 <= key < len(self.class_names):
            return self[self.class_names[key]]
        raise KeyError(key)

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        """The header and the rows of the table as text."""
        scores = ["precision", "recall", "f1"]
        rows = []
        for name in (*self.class_names, "macro", "weighted"):
            support = self[name]["support"]
            values = [f"{self[name][score]:.4f}" for score in scores]
            rows.append([name, *values, f"{support:,.{1 if support % 1 else 0}f}"])
        rows.append(["accuracy", "", "", f"{self['accuracy']:.4f}", rows[-1][-1]])
        return ["", *scores, "support"], rows

    def __str__(self) -> str:
        header, rows = self._rows()
        return tables.text_table([header, *rows], left=1)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return tables.html_table("Report by class", *self._rows(), left=1)


class ClassReport(_Counts):
    """A `Report` of precision, recall, F1 and support (the number of samples), for each class and on average.

    Use it with `evaluate`, not with `fit`. A score whose denominator is 0 is 0. Outputs with NaN raise DataError.

    class_names: the names of the classes, by default their numbers as text.  threshold: as in Accuracy.
    """

    name = "class_report"
    scalar = False

    def __init__(self, class_names: Sequence[Any] | None = None, threshold: float | None = None) -> None:
        super().__init__(threshold)
        self.class_names = None if class_names is None else _names(self, class_names)
        if self.class_names is not None:
            reserved = {"macro", "weighted", "accuracy"} & set(self.class_names)
            if reserved or len(set(self.class_names)) < len(self.class_names):
                raise ArgumentError(
                    "ClassReport: class_names must differ from one another and from macro, weighted and accuracy, but "
                    f"are {self.class_names}."
                )

    def check_targets(self, targets: Array, outputs_shape: tuple[int, ...]) -> None:
        super().check_targets(targets, outputs_shape)
        classes = outputs_shape[-1] if self._has_classes(outputs_shape) else 2
        if self.class_names is not None and len(self.class_names) != classes:
            raise ArgumentError(f"ClassReport: there are {classes} classes, but class_names are {self.class_names}.")

    def result(self, sums: Any) -> Report:
        counts = self._refuse_nan(sums)
        return Report(counts, self.class_names or [str(k) for k in range(len(counts))])


class CohenKappa(_Counts):
    """Cohen's kappa: 1 - Σ v_ij O_ij / Σ v_ij E_ij, the agreement of predictions and targets beyond chance.

    O are the counts by true class i and predicted class j, and E those expected if both were independent, with the same
    sums of rows and columns. Perfect agreement gives 1, chance gives 0. The result is NaN if targets and predictions
    are all of one class, or if outputs are NaN. Cohen 1960, 1968.

    weights: the disagreement v_ij. None: 1 unless i = j; for ordered classes, "linear": |i - j|, or "quadratic":
    (i - j)².  threshold: as in Accuracy.
    """

    name = "cohen_kappa"

    def __init__(self, weights: str | None = None, threshold: float | None = None) -> None:
        super().__init__(threshold)
        self.weights = choice(self, "weights", weights, ("linear", "quadratic", None))

    def result(self, sums: Any) -> float:
        xp, classes = get_backend("cpu").xp, len(sums)
        if sums[:, classes:].any() or not sums.any():
            return math.nan
        counts, distance = sums[:, :classes].astype("float64"), abs(xp.arange(classes)[:, None] - xp.arange(classes))
        disagreement = {None: distance != 0, "linear": distance, "quadratic": distance**2}[self.weights]
        chance = xp.outer(counts.sum(axis=1), counts.sum(axis=0)) / counts.sum()
        expected = (disagreement * chance).sum()
        return float(1.0 - (disagreement * counts).sum() / expected) if expected else math.nan


class _ConfusionScore(_Counts):
    """A score per class, computed from the confusion matrix, then averaged over the classes as Precision explains."""

    def __init__(self, average: str | None = None, threshold: float | None = None) -> None:
        super().__init__(threshold)
        self.average = choice(self, "average", average, ("macro", "micro", "weighted", "binary", None))
        self._one_output = False

    def check_targets(self, targets: Array, outputs_shape: tuple[int, ...]) -> None:
        super().check_targets(targets, outputs_shape)
        if self.average == "binary" and self._has_classes(outputs_shape) and outputs_shape[-1] != 2:
            raise ArgumentError(
                f'{type(self).__name__}: average="binary" needs two classes, not {outputs_shape[-1]}: use "macro", '
                '"weighted" or "micro".'
            )

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        self._one_output = not self._has_classes(outputs.shape)
        return super().sums(backend, outputs, targets, weights)

    def result(self, sums: Any) -> float:
        # A sample with NaN outputs is one of its class that is not found.
        correct, predicted, actual = sums.diagonal(), sums.sum(axis=0)[: len(sums)], sums.sum(axis=1)
        average = self.average or ("binary" if self._one_output else "macro")
        if average == "micro":
            return self.score(correct.sum(), predicted.sum(), actual.sum())
        each = [self.score(*counts) for counts in zip(correct, predicted, actual, strict=True)]
        if average == "binary":
            return each[1]
        shares = actual / (actual.sum() or 1) if average == "weighted" else [1.0 / len(each)] * len(each)
        return float(sum(share * value for share, value in zip(shares, each, strict=True)))

    @abstractmethod
    def score(self, correct: float, predicted: float, actual: float) -> float:
        """The score of one class, from its numbers of correct predictions, of predictions and of samples."""


class Precision(_ConfusionScore):
    """The fraction of the predictions of a class that are correct: true positives / predicted positives.

    average: "macro", the mean over the classes; "weighted", the mean weighted by the number of samples of each class;
    "micro", the score of the summed counts; "binary", the score of class 1. None is "binary" if one output decides
    between two classes, else "macro". A class whose denominator is 0 has the score 0.  threshold: as in Accuracy.
    """

    name = "precision"

    def score(self, correct: float, predicted: float, actual: float) -> float:
        return _ratio(correct, predicted)


class Recall(_ConfusionScore):
    """The fraction of the samples of a class that are found: true positives / samples. Arguments: as in Precision."""

    name = "recall"

    def score(self, correct: float, predicted: float, actual: float) -> float:
        return _ratio(correct, actual)


class F1(_ConfusionScore):
    """The harmonic mean of precision and recall. Arguments: as in Precision."""

    name = "f1"

    def score(self, correct: float, predicted: float, actual: float) -> float:
        return _ratio(2.0 * correct, predicted + actual)


class _ProbabilityMetric(_ClassificationMetric):
    """The base of metrics of probabilities.

    from_logits: whether the outputs are logits, from which softmax or sigmoid makes probabilities. None means True if
    the model was trained with a loss on logits, otherwise False.
    """

    _yes_or_no = False  # whether each output is a separate yes-or-no answer

    def __init__(self, *, from_logits: bool | None = None) -> None:
        self.from_logits = None if from_logits is None else flag(self, "from_logits", from_logits)

    def bind(self, loss: Loss | None) -> Metric:
        bound = copy.copy(self)
        if loss is not None:
            bound._yes_or_no = loss.decision_threshold is not None
            if self.from_logits is None:
                bound.from_logits = loss.takes_logits
        return bound

    def _has_classes(self, outputs_shape: tuple[int, ...]) -> bool:
        return not self._yes_or_no and super()._has_classes(outputs_shape)


class LogLoss(_ProbabilityMetric):
    """The cross-entropy: the mean of -log p, where p is the probability that the model gave to the true class.

    Outputs (N, K) are the probabilities of K classes, and targets are labels (N,) or probabilities (N, K). A single
    output is the probability of yes; so is each output of a model trained with binary_cross_entropy, and the loss of a
    sample is then the mean over its outputs.

    Probabilities are clipped to at least ε, 2⁻⁵² in float64 and 2⁻²³ in float32, as in scikit-learn; logits need no
    such limit. If outputs should be probabilities but are not in [0, 1], `fit` and `evaluate` give NaN, and calling the
    metric raises DataError; so it does if those of the classes do not add up to 1.

    from_logits: whether outputs are logits instead; None means True after a loss on logits, otherwise False.
    """

    name = "log_loss"

    def __call__(self, outputs: Any, targets: Any, sample_weight: Any = None) -> Any:
        checked, _, _ = checked_samples(self.name, outputs, targets, sample_weight)
        if not self.from_logits and (checked.min() < 0 or checked.max() > 1):
            raise DataError(
                f"{self.name}: outputs must be probabilities, but range from {checked.min():g} to {checked.max():g}. "
                "If they are logits, use LogLoss(from_logits=True)."
            )
        if not self.from_logits and self._has_classes(checked.shape) and abs(checked.sum(axis=-1) - 1).max() > 1e-3:
            raise DataError(f"{self.name}: outputs must be probabilities of classes, which add up to 1 in each sample.")
        return super().__call__(outputs, targets, sample_weight)

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        xp, classes = backend.xp, self._has_classes(outputs.shape)
        if classes and (targets.ndim == 1 or targets.shape[1] == 1):
            targets = _labels(targets)
        elif not classes:
            targets = _reshaped(self.name, targets, outputs.shape)
        if self.from_logits:
            loss = SoftmaxCrossEntropy() if classes else BinaryCrossEntropy()
            return _weighted(xp, loss.samples(backend, outputs, targets).astype(xp.float64), weights)
        epsilon = 2.0**-52 if outputs.dtype == xp.float64 else 2.0**-23
        outputs = xp.where(xp.abs(outputs - 0.5) <= 0.5 + 1e-5, outputs, math.nan)
        log_p = xp.log(xp.clip(outputs, epsilon, 1.0))
        if not classes:
            log_p = targets * log_p + (1.0 - targets) * xp.log(xp.clip(1.0 - outputs, epsilon, 1.0))
            log_p = xp.mean(log_p.reshape(len(log_p), -1), axis=1, dtype=xp.float64)
        elif targets.ndim == 1:
            log_p = xp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0].astype(xp.float64)
        else:
            log_p = xp.sum(targets * log_p, axis=1, dtype=xp.float64)
        return _weighted(xp, -log_p, weights)


class AUC(_ProbabilityMetric):
    """The area under the ROC curve: the probability that a sample of a class scores higher than one of another class.

    A tie counts ½. Each of K classes is compared with the rest, and the result is the mean over the classes that have
    both positive and negative samples; several yes-or-no outputs are averaged in the same way. If there is no such
    class, the result is NaN, with a warning. It is also NaN if outputs are NaN.

    from_logits: whether the scores are the softmax of the outputs; None means True after a loss on logits, otherwise
    False. It makes no difference for a single output.

    The result is exact, so all scores are kept: 16 K + 8 bytes per sample, in the device's memory until the end of the
    epoch. A GPU then runs training steps eagerly. In training, each score is computed before the update of its step.
    """

    name = "auc"
    collects = True
    _one_class_each = False  # whether targets (N, K) are probabilities, of which the largest gives the class

    def bind(self, loss: Loss | None) -> Metric:
        bound = super().bind(loss)
        bound._one_class_each = loss is not None and loss.classifies and loss.decision_threshold is None
        return bound

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        """(N, 2 K + 1): the scores, the targets as 0 or 1, and the weight of each sample."""
        xp = backend.xp
        count, columns = len(outputs), math.prod(outputs.shape[1:])
        scores = outputs.astype(xp.float64).reshape(count, columns)
        if self._has_classes(outputs.shape) and self.from_logits:
            scores = backend.softmax(scores)
        if targets.size == scores.size and not (columns > 1 and self._one_class_each):
            true = targets.reshape(scores.shape) > 0.5
        else:
            true = _labels(targets)[:, None] == xp.arange(columns)
        rows = xp.ones((count, 2 * columns + 1), dtype=xp.float64)
        rows[:, :columns] = scores
        rows[:, columns : 2 * columns] = true
        if weights is not None:
            rows[:, -1] = weights
        return rows

    def result(self, sums: Any) -> float:
        columns = sums.shape[1] // 2
        scores, positive, weights = sums[:, :columns], sums[:, columns:-1] > 0, sums[:, -1]
        if (scores != scores).any():
            return math.nan
        areas = [_area(scores[:, k], positive[:, k], weights) for k in range(columns)]
        known = [area for area in areas if area == area]
        if not known:
            warnings.warn(
                f"{self.name}: the area under the ROC curve is not defined, because the targets are all of one class.",
                UserWarning,
                stacklevel=2,
            )
            return math.nan
        return sum(known) / len(known)


def _area(scores: Any, positive: Any, weights: Any) -> float:
    """Σ w_p w_n ([s_p > s_n] + ½ [s_p = s_n]) / Σ w_p w_n over the pairs of a positive and a negative sample.

    NaN if there is no pair. Arrays are NumPy's.
    """
    xp = get_backend("cpu").xp
    order = scores.argsort(kind="stable")
    scores, positive, weights = scores[order], positive[order], weights[order]
    if (weights == 1).all():
        weights = weights.astype("int64")  # so that the sum is exact
    ties = xp.flatnonzero(xp.concatenate([[True], scores[1:] != scores[:-1]]))  # where each run of equal scores begins
    positives = xp.add.reduceat(weights * positive, ties)
    negatives = xp.add.reduceat(weights * ~positive, ties)
    pairs = positives.sum().item() * negatives.sum().item()
    if not pairs:
        return math.nan
    below = negatives.cumsum() - negatives
    return float((positives * (2 * below + negatives)).sum().item() / (2 * pairs))


class _RegressionMetric(Metric):
    """The base of metrics whose targets have the shape of the outputs."""

    def check_targets(self, targets: Array, outputs_shape: tuple[int, ...]) -> None:
        _reshaped(self.name, targets, outputs_shape)


class _MeanError(_RegressionMetric):
    """The mean over all elements of a function of the error."""

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        xp = backend.xp
        errors = self.of_errors(xp, outputs - _reshaped(self.name, targets, outputs.shape)).reshape(len(outputs), -1)
        per_sample = xp.sum(errors, axis=1, dtype=xp.float64) * (1.0 / errors.shape[1])
        return _weighted(xp, per_sample, weights)

    @abstractmethod
    def of_errors(self, xp: Any, errors: Array) -> Array: ...


class MeanSquaredError(_MeanError):
    """The mean of (y - t)² over all elements."""

    name = "mse"

    def of_errors(self, xp: Any, errors: Array) -> Array:
        return xp.square(errors)


class MeanAbsoluteError(_MeanError):
    """The mean of |y - t| over all elements."""

    name = "mae"

    def of_errors(self, xp: Any, errors: Array) -> Array:
        return xp.abs(errors)


class R2(_RegressionMetric):
    """1 - Σ(y - t)² / Σ(t - mean t)², averaged over the outputs. For a constant target: 1 if exact, else 0."""

    name = "r2"
    starts_from_zeros = True

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        xp = backend.xp
        t = _reshaped(self.name, targets, outputs.shape).reshape(len(targets), -1).astype(xp.float64)
        e = outputs.reshape(len(outputs), -1).astype(xp.float64) - t
        w = xp.ones((len(t), 1), dtype=xp.float64) if weights is None else weights[:, None].astype(xp.float64)
        count = xp.sum(xp.broadcast_to(w, t.shape), axis=0)
        mean = xp.sum(w * t, axis=0) / xp.maximum(count, 1e-300)
        spread = xp.sum(w * xp.square(t - mean), axis=0)
        return xp.stack([count, mean, spread, xp.sum(w * e * e, axis=0)])

    def merge(self, total: Array, sums: Array) -> Array:
        """Both sums of squares about the common mean (Chan et al. 1979). Σt² would lose digits if the mean is large."""
        count = total[0] + sums[0]
        share = sums[0] / (count + (count == 0))
        difference = sums[1] - total[1]
        merged = total + sums
        merged[1] = total[1] + difference * share
        merged[2] += difference * difference * total[0] * share
        return merged

    def result(self, sums: Any) -> float:
        scores = []
        for count, mean, spread, errors in sums.T:
            rounding = count * (1e-14 * mean) ** 2  # what rounding may leave of a spread of 0
            varies = spread > rounding or errors != errors  # NaN stays
            scores.append(1.0 - errors / (spread or 1.0) if varies else float(errors <= rounding))
        return float(sum(scores) / len(scores))


_NAMES: dict[str, type[Metric]] = {
    "accuracy": Accuracy,
    "top_k_accuracy": TopKAccuracy,
    "precision": Precision,
    "recall": Recall,
    "f1": F1,
    "confusion_matrix": ConfusionMatrix,
    "class_report": ClassReport,
    "cohen_kappa": CohenKappa,
    "auc": AUC,
    "log_loss": LogLoss,
    "mse": MeanSquaredError,
    "mae": MeanAbsoluteError,
    "r2": R2,
}


def get(specs: str | Metric | Sequence[str | Metric] | None, loss: Loss | None) -> list[Metric]:
    """Metrics from names or objects, bound to a loss. None is accuracy for a classification loss, else no metric."""
    if not (loss is None or isinstance(loss, Loss)):
        raise ArgumentTypeError(f"metrics: loss must be a Loss, or None, not {shown(loss)}.")
    if specs is None:
        specs = ["accuracy"] if loss is not None and loss.classifies else []
    if isinstance(specs, str | Metric):
        specs = [specs]
    if not isinstance(specs, Sequence):
        raise ArgumentTypeError(f"metrics must be a name, a Metric or a list of them, not {shown(specs)}.")
    found = []
    for spec in specs:
        metric: Metric = resolve("metric", spec, _NAMES, Metric)  # type: ignore[type-abstract]
        bound: Any = metric.bind(loss)
        if not (isinstance(bound, Metric) and isinstance(bound.name, str) and bound.name and bound.output is None):
            raise ArgumentTypeError(
                f"{type(metric).__name__}: bind must return a Metric whose name is text and whose output is None, but "
                f"returned {shown(bound)} with the name {shown(getattr(bound, 'name', None))} and the output "
                f"{shown(getattr(bound, 'output', None))}."
            )
        found.append(bound)
    names = [metric.name for metric in found]
    taken = [name for name in names if name in ("loss", "learning_rate") or name.startswith("val_")]
    if taken or len(set(names)) < len(names):
        raise ArgumentError(
            f"metrics: each needs its own name, which no other value of the history has, but the names are {names}. "
            "Set `metric.name`."
        )
    return found


def _names(owner: Any, class_names: Any) -> list[str]:
    """The argument class_names, names of any type, as text."""
    items = items_of(class_names)
    if items is None:
        kind = type(owner).__name__
        raise ArgumentTypeError(f"{kind}: class_names must be a list of names, not {shown(class_names)}.")
    return [str(name) for name in items]


def _reshaped(name: str, targets: Array, outputs_shape: tuple[int, ...]) -> Array:
    """Targets in the shape of the outputs, which may differ in axes of length 1 only."""
    if targets.size != math.prod(outputs_shape):
        raise ShapeError(f"{name}: outputs {tuple(outputs_shape)} and targets {tuple(targets.shape)} do not fit.")
    return targets.reshape(outputs_shape)


def _check_yes_or_no(name: str, targets: Array, outputs_shape: tuple[int, ...]) -> None:
    _reshaped(name, targets, outputs_shape)
    if float(targets.min()) < 0 or float(targets.max()) > 1:
        raise DataError(
            f"{name}: each output is a yes-or-no answer, so targets must be in [0, 1], but they range from "
            f"{float(targets.min()):g} to {float(targets.max()):g}."
        )


def _check_labels(name: str, targets: Array, outputs_shape: tuple[int, ...]) -> None:
    if len(outputs_shape) != 2:
        raise ShapeError(f"{name}: outputs must have shape (N, K), with an output per class, not {outputs_shape}.")
    classes = outputs_shape[1]
    if targets.ndim > 1 and math.prod(targets.shape[1:]) > 1:
        if targets.shape[1:] != (classes,):
            raise ShapeError(f"{name}: targets {tuple(targets.shape)} do not fit {classes} classes.")
        return
    low, high = float(targets.min()), float(targets.max())
    if targets.dtype.kind == "f" and bool((targets != targets.round()).any()):
        raise DataError(f"{name}: labels must be whole numbers, but some are not; they range from {low:g} to {high:g}.")
    low, high = int(low), int(high)
    if low < 0 or high >= classes:
        raise DataError(f"{name}: labels range from {low} to {high}, but the classes are 0 to {classes - 1}.")


def _labels(targets: Array) -> Array:
    """Integer labels (N,) from labels (N,) or (N, 1), or from probabilities (N, K)."""
    if targets.ndim == 2 and targets.shape[1] > 1:
        return targets.argmax(axis=-1)
    labels = targets.reshape(-1)
    return labels if labels.dtype.kind == "i" and labels.itemsize == 8 else labels.astype("int64")


def _correct(xp: Any, correct: Array, weights: Array | None) -> Array:
    """[correct predictions, samples]: int64, or float64 if samples have weights."""
    if weights is None:
        sums = xp.empty(2, dtype=xp.int64)
        sums[0], sums[1] = xp.count_nonzero(correct), correct.size
        return sums
    return _weighted(xp, correct.astype(xp.float64), weights)


def _weighted(xp: Any, per_sample: Array, weights: Array | None) -> Array:
    """[Σ w · value, Σ w] over the samples."""
    if weights is None:
        return xp.stack([xp.sum(per_sample), xp.full((), len(per_sample), dtype=xp.float64)])
    w = weights.astype(xp.float64, copy=False)
    return xp.stack([xp.sum(per_sample * w), xp.sum(w)])


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else 0.0
