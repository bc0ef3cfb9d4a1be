"""Metrics: what people read, as sums over samples that stay on the device until they are asked for.

A metric turns a batch into a small array of sums; the sums of batches add up; the figure comes from the total. With
sample weights every sample counts w times. Written against `xp`.
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from xpnet.backends import Array, Backend, get_backend
from xpnet.config import Configured, is_whole, resolve
from xpnet.errors import ArgumentError, DataError, ShapeError
from xpnet.losses import Loss


class Metric(Configured):
    """The base of every metric. A subclass writes `sums`, on the device, and `result`, on the host."""

    #: The key in histories and in what `evaluate` returns.
    name: str = ""
    #: Whether the result is one number, fit for a history.
    scalar: ClassVar[bool] = True
    #: Whether merge(zeros, sums) is sums. A metric with a `merge` of its own says so if it is: only then can a GPU
    #: record the step.
    starts_from_zeros: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "merge" in cls.__dict__ and "starts_from_zeros" not in cls.__dict__:
            cls.starts_from_zeros = False

    @abstractmethod
    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        """Sums over a batch: outputs (N, ...), targets as the loss takes them, weights (N,) or None."""

    def merge(self, total: Array, sums: Array) -> Array:
        """The sums of two batches as those of one."""
        return total + sums

    @abstractmethod
    def result(self, sums: Any) -> Any:
        """The figure, from the total of the sums as a NumPy array."""

    def bind(self, loss: Loss | None) -> "Metric":
        """A copy of this metric that reads the outputs of a model trained with `loss`."""
        return copy.copy(self)

    def check_targets(self, targets: Array, outputs_shape: tuple[int, ...]) -> None:
        """Raise DataError for targets that this metric cannot read. Reads the device."""

    def __call__(self, outputs: Any, targets: Any, sample_weight: Any = None) -> Any:
        """The figure for these arrays at once, on the host."""
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


class _Classes(Metric):
    """What metrics on classes share: deciding which class the outputs name.

    `threshold` decides each output on its own: yes where it is exceeded. None means the largest output wins, and a
    single output is decided at ½, or at 0 under a loss on logits.
    """

    def __init__(self, threshold: float | None = None) -> None:
        self.threshold = threshold

    def bind(self, loss: Loss | None) -> Metric:
        bound = copy.copy(self)
        if self.threshold is None and loss is not None:
            bound.threshold = loss.decision_threshold
        return bound

    def check_targets(self, targets: Array, outputs_shape: tuple[int, ...]) -> None:
        single = len(outputs_shape) == 1 or outputs_shape[-1] == 1
        if self.threshold is None and not single:
            _check_labels(self.name, targets, outputs_shape[-1])
            return
        _alike(targets, outputs_shape)
        if float(targets.min()) < 0 or float(targets.max()) > 1:
            raise DataError(
                f"{self.name}: each output answers yes or no, so targets must lie in [0, 1], but they run from "
                f"{float(targets.min()):g} to {float(targets.max()):g}."
            )

    def decide(
        self, backend: Backend, outputs: Array, targets: Array, weights: Array | None
    ) -> tuple[Array, Array, Array | None, int]:
        """(predicted classes, true classes, weights, number of classes), flat."""
        xp = backend.xp
        if self._largest_wins(outputs):
            return outputs.argmax(axis=-1), _labels(xp, targets), weights, int(outputs.shape[-1])
        predicted = outputs > (0.5 if self.threshold is None else self.threshold)
        if weights is not None and outputs.size != len(outputs):
            weights = xp.repeat(weights, int(outputs.size) // len(outputs))
        return predicted.reshape(-1).astype(xp.int64), (targets.reshape(-1) > 0.5).astype(xp.int64), weights, 2

    def _largest_wins(self, outputs: Array) -> bool:
        return self.threshold is None and outputs.ndim > 1 and outputs.shape[-1] > 1


class Accuracy(_Classes):
    """The share of right answers."""

    name = "accuracy"

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        if weights is None and self._largest_wins(outputs):
            return backend.count_hits(outputs, _labels(backend.xp, targets))
        predicted, true, weights, _ = self.decide(backend, outputs, targets, weights)
        return _hits(backend.xp, predicted == true, weights)

    def result(self, sums: Any) -> float:
        return _ratio(sums[0], sums[1])


class TopKAccuracy(Metric):
    """The share of samples whose class is among the k largest outputs; of equal outputs the first counts as larger."""

    name = "top_k_accuracy"

    def __init__(self, k: int = 5) -> None:
        if not (is_whole(k) and k >= 1):
            raise ArgumentError(f"TopKAccuracy: k must be at least 1, not {k!r}.")
        self.k = k

    def check_targets(self, targets: Array, outputs_shape: tuple[int, ...]) -> None:
        _check_labels(self.name, targets, outputs_shape[-1])

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        xp = backend.xp
        true = _labels(xp, targets)[:, None]
        score = xp.take_along_axis(outputs, true, axis=1)
        earlier = xp.arange(outputs.shape[1])[None, :] < true
        # "not ≤" rather than ">", so that a NaN score is beaten by all.
        ahead = xp.logical_not(outputs <= score) | ((outputs == score) & earlier)
        return _hits(xp, xp.sum(ahead, axis=1) < self.k, weights)

    def result(self, sums: Any) -> float:
        return _ratio(sums[0], sums[1])


class ConfusionMatrix(_Classes):
    """Counts (K, K): row the true class, column the predicted one. For `evaluate`; a history holds only numbers."""

    name = "confusion_matrix"
    scalar = False

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        xp = backend.xp
        predicted, true, weights, classes = self.decide(backend, outputs, targets, weights)
        numbers = xp.arange(classes)
        # A product of one-hot matrices: no scatter, which would race on a GPU. float32 counts exactly up to 2**24.
        dtype = outputs.dtype if outputs.dtype.kind == "f" else xp.float64
        rows = (true[:, None] == numbers).astype(dtype)
        columns = (predicted[:, None] == numbers).astype(dtype)
        if weights is not None:
            rows *= weights[:, None].astype(dtype)
        counts = backend.matmul(rows.T, columns, out=backend.empty((classes, classes), dtype))
        return counts.astype(xp.float64)

    def result(self, sums: Any) -> Any:
        return sums if (sums % 1).any() else sums.astype("int64")


class _FromConfusion(ConfusionMatrix):
    """A figure a class out of the confusion matrix, averaged over the classes.

    average: "macro" (the mean of the classes), "weighted" (by the size of each), "micro" (from the summed counts), or
    "binary" (of class 1 alone). None is "binary" where there are two classes decided by one output, else "macro". A
    class with nothing to divide by counts as 0.
    """

    scalar = True

    def __init__(self, average: str | None = None, threshold: float | None = None) -> None:
        super().__init__(threshold)
        if average not in (None, "macro", "micro", "weighted", "binary"):
            raise ArgumentError(
                f'{type(self).__name__}: average must be "macro", "micro", "weighted", "binary" or None, '
                f"not {average!r}."
            )
        self.average = average
        self._one_output = False

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        self._one_output = self.threshold is not None or outputs.ndim == 1 or outputs.shape[-1] == 1
        return super().sums(backend, outputs, targets, weights)

    def result(self, sums: Any) -> float:
        right, predicted, actual = sums.diagonal(), sums.sum(axis=0), sums.sum(axis=1)
        average = self.average or ("binary" if self._one_output else "macro")
        if average == "micro":
            return self.figure(right.sum(), predicted.sum(), actual.sum())
        each = [self.figure(*counts) for counts in zip(right, predicted, actual, strict=True)]
        if average == "binary":
            if len(each) != 2:
                raise ArgumentError(f'{type(self).__name__}: average="binary" needs two classes, not {len(each)}.')
            return each[1]
        shares = actual / actual.sum() if average == "weighted" else [1.0 / len(each)] * len(each)
        return float(sum(share * value for share, value in zip(shares, each, strict=True)))

    @abstractmethod
    def figure(self, right: float, predicted: float, actual: float) -> float:
        """Of one class: hits, times it was predicted, times it was true."""


class Precision(_FromConfusion):
    """hits / predicted."""

    name = "precision"

    def figure(self, right: float, predicted: float, actual: float) -> float:
        return _ratio(right, predicted)


class Recall(_FromConfusion):
    """hits / actual."""

    name = "recall"

    def figure(self, right: float, predicted: float, actual: float) -> float:
        return _ratio(right, actual)


class F1(_FromConfusion):
    """2 hits / (predicted + actual): the harmonic mean of precision and recall."""

    name = "f1"

    def figure(self, right: float, predicted: float, actual: float) -> float:
        return _ratio(2.0 * right, predicted + actual)


class _Errors(Metric):
    """The mean over every element of a function of the error."""

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        xp = backend.xp
        errors = self.of(xp, outputs - _alike(targets, outputs.shape)).reshape(len(outputs), -1)
        per_sample = xp.sum(errors, axis=1, dtype=xp.float64) * (1.0 / errors.shape[1])
        return _weighted(xp, per_sample, weights)

    @abstractmethod
    def of(self, xp: Any, errors: Array) -> Array: ...

    def result(self, sums: Any) -> float:
        return _ratio(sums[0], sums[1])


class MeanSquaredError(_Errors):
    """Mean of (y - t)² over every element."""

    name = "mse"

    def of(self, xp: Any, errors: Array) -> Array:
        return xp.square(errors)


class MeanAbsoluteError(_Errors):
    """Mean of |y - t| over every element."""

    name = "mae"

    def of(self, xp: Any, errors: Array) -> Array:
        return xp.abs(errors)


class R2(Metric):
    """1 - Σ(y - t)² / Σ(t - mean t)², averaged over outputs; an output that never varies counts 1 if met, else 0."""

    name = "r2"
    starts_from_zeros = True

    def sums(self, backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Array:
        xp = backend.xp
        t = _alike(targets, outputs.shape).reshape(len(targets), -1).astype(xp.float64)
        e = outputs.reshape(len(outputs), -1).astype(xp.float64) - t
        w = xp.ones((len(t), 1), dtype=xp.float64) if weights is None else weights[:, None].astype(xp.float64)
        count = xp.sum(xp.broadcast_to(w, t.shape), axis=0)
        mean = xp.sum(w * t, axis=0) / xp.maximum(count, 1e-300)
        spread = xp.sum(w * xp.square(t - mean), axis=0)
        return xp.stack([count, mean, spread, xp.sum(w * e * e, axis=0)])

    def merge(self, total: Array, sums: Array) -> Array:
        """Two spreads become one about the common mean (Chan et al. 1979); Σt² would lose the digits of a far mean."""
        count = total[0] + sums[0]
        share = sums[0] / (count + (count == 0))
        apart = sums[1] - total[1]
        merged = total + sums
        merged[1] = total[1] + apart * share
        merged[2] += apart * apart * total[0] * share
        return merged

    def result(self, sums: Any) -> float:
        scores = []
        for count, mean, spread, errors in sums.T:
            rounding = count * (1e-14 * mean) ** 2  # what may be left of no spread at all
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
    """Metrics from names or objects, bound to a loss; None is accuracy for a classification loss, else none."""
    if specs is None:
        specs = ["accuracy"] if loss is not None and loss.classifies else []
    if isinstance(specs, str | Metric):
        specs = [specs]
    found = [resolve("metric", spec, _NAMES, Metric).bind(loss) for spec in specs]  # type: ignore[type-abstract]
    names = [metric.name for metric in found]
    if len(set(names)) < len(names) or "loss" in names:
        raise ArgumentError(f"metrics: each needs a name of its own, but the names are {names}. Set `metric.name`.")
    return found


def _alike(targets: Array, outputs_shape: tuple[int, ...]) -> Array:
    """Targets in the outputs' shape, which may differ by axes of length 1 only."""
    if targets.size != math.prod(outputs_shape):
        raise ShapeError(f"outputs {tuple(outputs_shape)} and targets {tuple(targets.shape)} do not fit.")
    return targets.reshape(outputs_shape)


def _check_labels(name: str, targets: Array, classes: int) -> None:
    if targets.ndim == 2 and targets.shape[1] > 1:
        if targets.shape[1] != classes:
            raise ShapeError(f"{name}: targets {tuple(targets.shape)} do not fit {classes} classes.")
    elif int(targets.min()) < 0 or int(targets.max()) >= classes:
        low, high = int(targets.min()), int(targets.max())
        raise DataError(f"{name}: labels run from {low} to {high}, but there are {classes} classes, from 0.")


def _labels(xp: Any, targets: Array) -> Array:
    """Class numbers (N,) from class numbers (N,) or (N, 1), or from probabilities (N, K)."""
    if targets.ndim == 2 and targets.shape[1] > 1:
        return targets.argmax(axis=-1)
    return targets.reshape(-1)


def _hits(xp: Any, right: Array, weights: Array | None) -> Array:
    """[hits, samples]: int64, or float64 where samples have weights."""
    if weights is None:
        sums = xp.empty(2, dtype=xp.int64)
        sums[0], sums[1] = xp.count_nonzero(right), right.size
        return sums
    return _weighted(xp, right.astype(xp.float64), weights)


def _weighted(xp: Any, per_sample: Array, weights: Array | None) -> Array:
    if weights is None:
        return xp.stack([xp.sum(per_sample), xp.full((), len(per_sample), dtype=xp.float64)])
    w = weights.astype(xp.float64)
    return xp.stack([xp.sum(per_sample * w), xp.sum(w)])


def _ratio(over: float, under: float) -> float:
    return float(over / under) if under else 0.0
