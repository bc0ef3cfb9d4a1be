"""Metrics: scores such as accuracy, computed from sums over samples that stay on the device until the end.

A metric turns each batch into a small array of sums, adds up those of all batches, and computes its result from the
total. A sample of weight w counts w times.
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from xpnet.backends import Array, Backend, get_backend
from xpnet.config import Configured, choice, integer, missing_method, number, resolve
from xpnet.errors import ArgumentError, DataError, ShapeError
from xpnet.losses import Loss

__all__ = ["F1", "R2", "Accuracy", "ConfusionMatrix", "MeanAbsoluteError", "MeanSquaredError", "Metric",
           "Precision", "Recall", "TopKAccuracy", "get"]  # fmt: skip


class Metric(Configured):
    """The base of every metric. A subclass defines `sums`, on the device, and may define `result`, on the host."""

    #: The key in the history and in the result of `evaluate`.
    name: str = ""
    #: Whether the result is one number, which a history can hold.
    scalar: ClassVar[bool] = True
    #: Whether merge(zeros, sums) == sums. A subclass with its own `merge` sets it to True if that holds: only then
    #: can a GPU capture the step.
    starts_from_zeros: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "merge" in cls.__dict__ and "starts_from_zeros" not in cls.__dict__:
            cls.starts_from_zeros = False

    @abstractmethod
    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        """The sums over a batch: outputs (N, ...), targets as the loss takes them, weights (N,) or None."""
        raise missing_method(self, "sums(backend, outputs, targets, weights)")

    def merge(self, total: Array, sums: Array) -> Array:
        """Combine the sums of two parts of the data."""
        return total + sums

    def result(self, sums: Any) -> Any:
        """The score, from the total of the sums as a NumPy array: by default sums[0] / sums[1], 0 if sums[1] is 0."""
        return _ratio(sums[0], sums[1])

    def bind(self, loss: Loss | None) -> "Metric":
        """Return a copy for the outputs of a model trained with `loss`, which are logits or probabilities."""
        return copy.copy(self)

    def check_targets(self, targets: Array, outputs_shape: tuple[int, ...]) -> None:
        """Raise DataError or ShapeError for targets that this metric does not accept. Reads the device."""

    def __call__(self, outputs: Any, targets: Any, sample_weight: Any = None) -> Any:
        """The score of these arrays, computed on the host."""
        backend = get_backend("cpu")
        outputs, targets = backend.asarray(outputs), backend.asarray(targets)
        if len(outputs) != len(targets):
            raise ShapeError(f"{self.name}: {len(outputs)} outputs but {len(targets)} targets.")
        if targets.size not in (len(targets), outputs.size):
            raise ShapeError(f"{self.name}: outputs {outputs.shape} and targets {targets.shape} do not fit.")
        weights = None if sample_weight is None else backend.asarray(sample_weight, dtype="float64")
        if outputs.dtype.kind != "f":
            outputs = outputs.astype("float64")  # unsigned integers would wrap
        self.check_targets(targets, outputs.shape)
        if weights is not None and weights.shape != (len(outputs),):
            raise ShapeError(f"{self.name}: sample_weight must have shape ({len(outputs)},), not {weights.shape}.")
        return self.result(backend.to_numpy(self.sums(backend, outputs, targets, weights)))


class _ClassMetric(Metric):
    """What metrics on classes have in common: how outputs become predicted classes, as Accuracy explains."""

    def __init__(self, threshold: float | None = None) -> None:
        self.threshold = None if threshold is None else number(self, "threshold", threshold, also="None")

    def bind(self, loss: Loss | None) -> Metric:
        bound = copy.copy(self)
        if self.threshold is None and loss is not None:
            bound.threshold = loss.decision_threshold
        return bound

    def check_targets(self, targets: Array, outputs_shape: tuple[int, ...]) -> None:
        if self._takes_largest(outputs_shape):
            _check_labels(self.name, targets, outputs_shape[-1])
            return
        _reshaped(targets, outputs_shape)
        if float(targets.min()) < 0 or float(targets.max()) > 1:
            raise DataError(
                f"{self.name}: each output is a yes-or-no answer, so targets must be in [0, 1], but they range from "
                f"{float(targets.min()):g} to {float(targets.max()):g}."
            )

    def decide(
        self, backend: Backend, outputs: Array, targets: Array, weights: Array | None
    ) -> tuple[Array, Array, Array | None, int]:
        """(predicted classes, true classes, weights, number of classes); the arrays are flat."""
        xp = backend.xp
        if self._takes_largest(outputs.shape):
            return outputs.argmax(axis=-1), _labels(targets), weights, int(outputs.shape[-1])
        predicted = outputs > (0.5 if self.threshold is None else self.threshold)
        if weights is not None and outputs.size != len(outputs):
            weights = xp.repeat(weights, int(outputs.size) // len(outputs))
        return predicted.reshape(-1).astype(xp.int64), (targets.reshape(-1) > 0.5).astype(xp.int64), weights, 2

    def _takes_largest(self, outputs_shape: tuple[int, ...]) -> bool:
        return self.threshold is None and len(outputs_shape) > 1 and outputs_shape[-1] > 1


class Accuracy(_ClassMetric):
    """The fraction of correct predictions.

    threshold: with a number, each output is a yes-or-no answer, yes above the threshold. With None, the class of the
    largest output is predicted; a single output is compared with 0.5, or with 0 if the loss takes logits.
    """

    name = "accuracy"

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        if weights is None and self._takes_largest(outputs.shape):
            return backend.count_correct(outputs, _labels(targets))
        predicted, true, weights, _ = self.decide(backend, outputs, targets, weights)
        return _correct(backend.xp, predicted == true, weights)


class TopKAccuracy(Metric):
    """The fraction of samples whose class has one of the k largest outputs. In a tie, the lower class number wins."""

    name = "top_k_accuracy"

    def __init__(self, k: int = 5) -> None:
        self.k = integer(self, "k", k)

    def check_targets(self, targets: Array, outputs_shape: tuple[int, ...]) -> None:
        _check_labels(self.name, targets, outputs_shape[-1])

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        xp = backend.xp
        true = _labels(targets)[:, None]
        score = xp.take_along_axis(outputs, true, axis=1)
        earlier = xp.arange(outputs.shape[1])[None, :] < true
        # "not ≤" rather than ">": a NaN score is below all others.
        ahead = xp.logical_not(outputs <= score) | ((outputs == score) & earlier)
        return _correct(xp, xp.sum(ahead, axis=1) < self.k, weights)


class ConfusionMatrix(_ClassMetric):
    """Counts (K, K), by true class (row) and predicted class (column).  threshold: as in Accuracy.

    Use it with `evaluate`, not with `fit`, whose history holds only numbers.
    """

    name = "confusion_matrix"
    scalar = False

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        xp = backend.xp
        predicted, true, weights, classes = self.decide(backend, outputs, targets, weights)
        numbers = xp.arange(classes)
        # A product of one-hot matrices, without a scatter, which would race on a GPU. float32 is exact up to 2**24.
        dtype = outputs.dtype if outputs.dtype.kind == "f" else xp.float64
        rows = (true[:, None] == numbers).astype(dtype)
        columns = (predicted[:, None] == numbers).astype(dtype)
        if weights is not None:
            rows *= weights[:, None].astype(dtype)
        counts = backend.matmul(rows.T, columns, out=backend.empty((classes, classes), dtype))
        return counts.astype(xp.float64)

    def result(self, sums: Any) -> Any:
        return sums if (sums % 1).any() else sums.astype("int64")


class _ConfusionScore(ConfusionMatrix):
    """A score per class, computed from the confusion matrix, then averaged over the classes as Precision explains."""

    scalar = True

    def __init__(self, average: str | None = None, threshold: float | None = None) -> None:
        super().__init__(threshold)
        self.average = choice(self, "average", average, ("macro", "micro", "weighted", "binary", None))
        self._one_output = False

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        self._one_output = not self._takes_largest(outputs.shape)
        return super().sums(backend, outputs, targets, weights)

    def result(self, sums: Any) -> float:
        correct, predicted, actual = sums.diagonal(), sums.sum(axis=0), sums.sum(axis=1)
        average = self.average or ("binary" if self._one_output else "macro")
        if average == "micro":
            return self.score(correct.sum(), predicted.sum(), actual.sum())
        each = [self.score(*counts) for counts in zip(correct, predicted, actual, strict=True)]
        if average == "binary":
            if len(each) != 2:
                raise ArgumentError(f'{type(self).__name__}: average="binary" needs two classes, not {len(each)}.')
            return each[1]
        shares = actual / actual.sum() if average == "weighted" else [1.0 / len(each)] * len(each)
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


class _MeanError(Metric):
    """The mean over all elements of a function of the error."""

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        xp = backend.xp
        errors = self.of_errors(xp, outputs - _reshaped(targets, outputs.shape)).reshape(len(outputs), -1)
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


class R2(Metric):
    """1 - Σ(y - t)² / Σ(t - mean t)², averaged over the outputs. For a constant target: 1 if exact, else 0."""

    name = "r2"
    starts_from_zeros = True

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        xp = backend.xp
        t = _reshaped(targets, outputs.shape).reshape(len(targets), -1).astype(xp.float64)
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
            scores.append(1.0 - errors / spread if spread > rounding else float(errors <= rounding))
        return float(sum(scores) / len(scores))


_NAMES: dict[str, type[Metric]] = {
    "accuracy": Accuracy,
    "top_k_accuracy": TopKAccuracy,
    "precision": Precision,
    "recall": Recall,
    "f1": F1,
    "confusion_matrix": ConfusionMatrix,
    "mse": MeanSquaredError,
    "mae": MeanAbsoluteError,
    "r2": R2,
}


def get(specs: str | Metric | Sequence[str | Metric] | None, loss: Loss | None) -> list[Metric]:
    """Metrics from names or objects, bound to a loss. None is accuracy for a classification loss, else no metric."""
    if specs is None:
        specs = ["accuracy"] if loss is not None and loss.classifies else []
    if isinstance(specs, str | Metric):
        specs = [specs]
    found = [resolve("metric", spec, _NAMES, Metric).bind(loss) for spec in specs]  # type: ignore[type-abstract]
    names = [metric.name for metric in found]
    if len(set(names)) < len(names) or {"loss", "learning_rate"} & set(names):
        raise ArgumentError(f"metrics: each needs its own name, but the names are {names}. Set `metric.name`.")
    return found


def _reshaped(targets: Array, outputs_shape: tuple[int, ...]) -> Array:
    """Targets in the shape of the outputs, which may differ in axes of length 1 only."""
    if targets.size != math.prod(outputs_shape):
        raise ShapeError(f"outputs {tuple(outputs_shape)} and targets {tuple(targets.shape)} do not fit.")
    return targets.reshape(outputs_shape)


def _check_labels(name: str, targets: Array, classes: int) -> None:
    if targets.ndim == 2 and targets.shape[1] > 1:
        if targets.shape[1] != classes:
            raise ShapeError(f"{name}: targets {tuple(targets.shape)} do not fit {classes} classes.")
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise DataError(f"{name}: labels range from {low} to {high}, but the classes are 0 to {classes - 1}.")


def _labels(targets: Array) -> Array:
    """Labels (N,) from labels (N,) or (N, 1), or from probabilities (N, K)."""
    if targets.ndim == 2 and targets.shape[1] > 1:
        return targets.argmax(axis=-1)
    return targets.reshape(-1)


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
    w = weights.astype(xp.float64)
    return xp.stack([xp.sum(per_sample * w), xp.sum(w)])


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else 0.0
