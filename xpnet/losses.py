"""Losses: one value ℓ_i per sample, and its gradient with respect to the outputs of that sample.

The loss of a batch is Σ w_i ℓ_i / Σ w_i, with w_i = 1 if no weights are given. The training step computes these sums; a
loss computes ℓ_i alone. Arrays are (N, ...) on the backend's device. If a sample has several labels, as the steps of a
sequence have, each label counts as a sample, with the weight of its sample: see `Loss.rows`.
"""

import math
import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from xpnet.backends import Array, Backend, get_backend
from xpnet.config import (
    Configured,
    checked_samples,
    choice,
    fits,
    integer,
    items_of,
    missing_method,
    number,
    refuse_non_finite_targets,
    resolve,
)
from xpnet.errors import ArgumentError, DataError, ShapeError, shape_text, shown

__all__ = ["BinaryCrossEntropy", "CosineSimilarity", "HalfSquaredError", "Huber", "KLDivergence", "Loss",
           "MeanAbsoluteError", "MeanSquaredError", "SoftmaxCrossEntropy", "TripletMargin", "get"]  # fmt: skip


class Loss(Configured):
    """The base of every loss. A subclass defines `samples` and `gradient`."""

    #: "sum" makes the loss of a batch Σ w_i ℓ_i, so that the gradient grows with the batch.
    reduction: str = "mean"
    #: Whether targets are classes, so that accuracy is reported.
    classifies: ClassVar[bool] = False
    #: Whether outputs are logits, so that the model must not end with Softmax or Sigmoid.
    takes_logits: ClassVar[bool] = False
    #: If each output is a yes-or-no answer: the threshold above which it is yes.
    decision_threshold: ClassVar[float | None] = None
    #: {class: weight} or a sequence of weights, for losses over classes.
    class_weight: Mapping[int, float] | Sequence[float] | None = None
    #: Whether each label counts as a sample where outputs are (N, ..., K).
    by_label: ClassVar[bool] = False
    #: The label of rows that do not count, if there is one.
    ignore: int | None = None

    def rows(
        self, backend: Backend, targets: Array, output_shape: tuple[int, ...]
    ) -> tuple[Array, tuple[int, ...], Array | None]:
        """(the targets of each row, the shape of a row's outputs, which rows count (R,), or None if all do).

        `samples` and `gradient` take rows: here samples; in SoftmaxCrossEntropy, a row for each label of a sample.
        targets: from `check_targets`.  output_shape: of the outputs of one sample.
        """
        return targets, output_shape, None

    @abstractmethod
    def samples(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        """The loss ℓ_i of each sample, (N,)."""
        raise missing_method(self, "samples(backend, outputs, targets)")

    @abstractmethod
    def gradient(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        """The gradients ∂ℓ_i/∂outputs_i, in the shape and dtype of the outputs, as a new array."""
        raise missing_method(self, "gradient(backend, outputs, targets), or samples_and_gradient")

    def samples_and_gradient(
        self, backend: Backend, outputs: Array, targets: Array, out: Array | None = None
    ) -> tuple[Array, Array]:
        """Return (samples, gradient). Override it if both share work; it may write the gradient into `out`."""
        return self.samples(backend, outputs, targets), self.gradient(backend, outputs, targets)

    def check_targets(self, backend: Backend, targets: Array, output_shape: tuple[int, ...]) -> Array:
        """Return targets as `samples` takes them, or raise ShapeError or DataError. Called once per dataset."""
        return _like_outputs(targets, output_shape, type(self).__name__)

    def weights_by_class(self, backend: Backend, class_weight: Any, targets: Array, classes: int) -> Array:
        """The weight of each sample's class, (N,), by default 1; for probabilities t, Σ_k t_k weight_k."""
        raise ArgumentError(f"class_weight needs a classification loss, not {type(self).__name__}.")

    @property
    def by_output(self) -> Sequence[tuple["Loss", float]]:
        """The loss of each output of the model, and its factor in the total: here, of the only output."""
        return [(self, 1.0)]

    def __call__(self, outputs: Any, targets: Any, sample_weight: Any = None) -> float:
        """The loss of these outputs as one number, computed on the host in float64."""
        backend = get_backend("cpu")
        outputs, targets, weights = checked_samples(type(self).__name__, outputs, targets, sample_weight)
        targets = self.check_targets(backend, targets, outputs.shape[1:])
        refuse_non_finite_targets(type(self).__name__, targets)
        if not (self.classifies and targets.ndim in (1, outputs.ndim - 1)):  # class numbers stay integers
            targets = targets.astype("float64")
        weights = backend.xp.ones(len(outputs)) if weights is None else weights
        if self.class_weight is not None:
            weights = weights * self.weights_by_class(backend, self.class_weight, targets, outputs.shape[-1])
        targets, shape, counted = self.rows(backend, targets, outputs.shape[1:])
        outputs = outputs.reshape(len(targets), *shape)
        weights = backend.xp.repeat(weights, len(targets) // len(weights))
        if counted is not None:
            weights = weights * counted
            if not weights.any():
                raise DataError(f"{type(self).__name__}: all labels are {self.ignore}, which are ignored.")
        losses = self.samples(backend, outputs, targets) * weights
        return float(losses.sum() / (1 if self.reduction == "sum" else weights.sum()))


class MeanSquaredError(Loss):
    """ℓ = mean over a sample's n outputs of (y - t)²."""

    def samples(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        return _mean(backend.xp, backend.xp.square(outputs - targets))

    def gradient(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        """∂ℓ/∂y = 2 (y - t) / n."""
        grad = outputs - targets
        grad *= 2.0 / _outputs_per_sample(outputs)
        return grad


class HalfSquaredError(Loss):
    """ℓ = ½ Σ over a sample's outputs of (y - t)², the usual loss in derivations of backpropagation.

    reduction: over the samples, "mean" or "sum".
    """

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = choice(self, "reduction", reduction, ("mean", "sum"))

    def samples(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        return 0.5 * _sum(backend.xp, backend.xp.square(outputs - targets))

    def gradient(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        """∂ℓ/∂y = y - t."""
        return outputs - targets


class MeanAbsoluteError(Loss):
    """ℓ = mean over a sample's n outputs of |y - t|."""

    def samples(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        return _mean(backend.xp, backend.xp.abs(outputs - targets))

    def gradient(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        """∂ℓ/∂y = sign(y - t) / n, and 0 if y = t."""
        grad = backend.xp.sign(outputs - targets)
        grad *= 1.0 / _outputs_per_sample(outputs)
        return grad


class Huber(Loss):
    """ℓ = mean over a sample's n outputs of ½ d² if |d| ≤ delta, else delta (|d| - ½ delta); d = y - t. Huber 1964."""

    def __init__(self, delta: float = 1.0) -> None:
        self.delta = number(self, "delta", delta, above=0)

    def samples(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        # With c = d clipped to ±delta, both cases are c (d - ½ c), and a large d is not squared.
        difference = outputs - targets
        clipped = backend.xp.clip(difference, -self.delta, self.delta)
        return _mean(backend.xp, clipped * (difference - 0.5 * clipped))

    def gradient(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        """∂ℓ/∂y = (d clipped to ±delta) / n."""
        grad = backend.xp.clip(outputs - targets, -self.delta, self.delta)
        grad *= 1.0 / _outputs_per_sample(outputs)
        return grad


class _JointLoss(Loss):
    """A loss that computes ℓ and its gradient together: a subclass defines `samples_and_gradient`."""

    def samples(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        return self.samples_and_gradient(backend, outputs, targets)[0]

    def gradient(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        return self.samples_and_gradient(backend, outputs, targets)[1]


class CosineSimilarity(_JointLoss):
    """ℓ = 1 - y·t / (‖y‖ ‖t‖), one minus the cosine of the angle between y and t over the last axis.

    If a sample has several vectors, outputs (N, ..., D), ℓ is the mean over them. Equal directions give 0, orthogonal
    ones 1, opposite ones 2. Norms are at least 1e-8, so that vectors of zeros give 1. This is PyTorch's
    CosineEmbeddingLoss of pairs with the label 1; the loss of Keras is smaller by 1.
    """

    def samples_and_gradient(
        self, backend: Backend, outputs: Array, targets: Array, out: Array | None = None
    ) -> tuple[Array, Array]:
        """With c = u·v for u = y / ‖y‖ and v = t / ‖t‖: ∂ℓ/∂y = (c u - v) / ‖y‖."""
        xp = backend.xp
        length, other_length = (xp.maximum(_norm(xp, a), 1e-8) for a in (outputs, targets))
        grad, direction = outputs / length, targets / other_length
        cosine = xp.sum(grad * direction, axis=-1, keepdims=True)
        grad *= cosine
        grad -= direction
        grad /= length * _outputs_per_sample(cosine)
        return _mean(xp, 1.0 - cosine), grad


class TripletMargin(_JointLoss):
    """ℓ = max(‖a - p‖ - ‖a - n‖ + margin, 0), for the vectors of an anchor a, a positive p and a negative n.

    Outputs are the three vectors of a sample in this order, (N, 3, D) or (N, 3·D). Targets are not used: the order says
    what belongs together. Pass any array of N numbers, such as zeros. As in PyTorch, 1e-6 is added to every element of
    a difference, since a norm has no gradient at 0.

    Balntas et al. 2016, "Learning local feature descriptors with triplets and shallow convolutional neural networks".
    """

    def __init__(self, margin: float = 1.0) -> None:
        self.margin = number(self, "margin", margin, above=0, finite=True)

    def samples_and_gradient(
        self, backend: Backend, outputs: Array, targets: Array, out: Array | None = None
    ) -> tuple[Array, Array]:
        """With the unit vectors u of a - p and v of a - n: ∂ℓ/∂a = u - v, ∂ℓ/∂p = -u, ∂ℓ/∂n = v; or 0 if ℓ = 0."""
        xp, triplets = backend.xp, outputs.reshape(len(outputs), 3, -1)
        u, v = (triplets[:, 0] - triplets[:, i] + 1e-6 for i in (1, 2))
        to_positive, to_negative = _norm(xp, u), _norm(xp, v)
        losses = xp.maximum(to_positive - to_negative + self.margin, 0.0)
        u *= (losses > 0) / to_positive
        v *= (losses > 0) / to_negative
        grad = xp.stack((u - v, -u, v), axis=1)
        return losses.reshape(-1), grad.reshape(outputs.shape)

    def check_targets(self, backend: Backend, targets: Array, output_shape: tuple[int, ...]) -> Array:
        if not output_shape or output_shape[0] % 3 or (len(output_shape) > 1 and output_shape[0] != 3):
            raise ShapeError(
                "TripletMargin: the model must give the vectors of an anchor, a positive and a negative, (N, 3, D) or "
                f"(N, 3·D), but gives {shape_text(output_shape)}."
            )
        return targets


class _CrossEntropy(Loss):
    """What both cross-entropies have in common: logits, classes, label smoothing."""

    classifies = True
    takes_logits = True

    def __init__(self, label_smoothing: float = 0.0, class_weight: Any = None) -> None:
        self.label_smoothing = number(self, "label_smoothing", label_smoothing, at_least=0, below=1)
        self.class_weight = class_weight
        if class_weight is not None:
            _weights_of_classes(class_weight)

    def weights_by_class(self, backend: Backend, class_weight: Any, targets: Array, classes: int) -> Array:
        binary = self.decision_threshold is not None
        if binary and targets.shape[1:] != (1,):
            raise ArgumentError("class_weight needs a single yes-or-no output; with several, use sample_weight.")
        classes = 2 if binary else classes
        given = _weights_of_classes(class_weight)
        if len(given) < classes and not hasattr(class_weight, "items"):
            raise ArgumentError(
                f"class_weight must be {{class: weight}} or a sequence of {classes} weights, one for each class, not "
                f"{shown(class_weight)}."
            )
        if max(given) >= classes:
            raise ArgumentError(f"class_weight names class {max(given)}, but the classes are 0 to {classes - 1}.")
        if binary:
            no, yes = given.get(0, 1.0), given.get(1, 1.0)
            return (no + (yes - no) * targets).reshape(-1)
        several = targets.ndim > 2 or (targets.ndim == 2 and targets.dtype.kind in "iu")
        if several:
            raise ArgumentError(
                "class_weight weights samples by their class, but here each sample has several labels: use "
                "sample_weight, or ignore= for labels that must not count."
            )
        if self.ignore is not None:
            targets = targets * (targets != self.ignore)
        dtype = targets.dtype if targets.dtype.kind == "f" else "float64"
        table = backend.asarray([given.get(k, 1.0) for k in range(classes)], dtype=dtype)
        return backend.xp.take(table, targets) if targets.ndim == 1 else backend.xp.matmul(targets, table)

    def _smoothed(self, targets: Array, classes: int) -> Array:
        e = self.label_smoothing
        return targets * (1.0 - e) + e / classes if e else targets


class BinaryCrossEntropy(_CrossEntropy):
    """ℓ = mean over a sample's n logits z of log(1 + e^z) - t z, for targets t in [0, 1].

    That is -t log σ(z) - (1 - t) log(1 - σ(z)). Each output is a separate binary classification. `label_smoothing` ε
    changes targets to t (1 - ε) + ε/2. `class_weight` {0: a, 1: b} weights the samples of a single output.
    """

    decision_threshold = 0.0

    def samples(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        xp = backend.xp
        # softplus(z) - t z. max(z, 0) - t z comes first: it is exact where t is 0 or 1.
        losses = xp.maximum(outputs, 0.0) - self._smoothed(targets, 2) * outputs
        losses += xp.log1p(xp.exp(-xp.abs(outputs)))
        return _mean(xp, losses)

    def gradient(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        """∂ℓ/∂z = (σ(z) - t) / n."""
        grad = backend.sigmoid(outputs)
        grad -= self._smoothed(targets, 2)
        grad *= 1.0 / _outputs_per_sample(outputs)
        return grad

    def check_targets(self, backend: Backend, targets: Array, output_shape: tuple[int, ...]) -> Array:
        targets = _like_outputs(targets, output_shape, "BinaryCrossEntropy")
        low, high = float(targets.min()), float(targets.max())
        if low < 0 or high > 1:
            raise DataError(
                f"BinaryCrossEntropy: targets must be in [0, 1], but they range from {low:g} to {high:g}. For two "
                'classes, number them 0 and 1; to predict numbers, pass loss="mse".'
            )
        return targets


class SoftmaxCrossEntropy(_CrossEntropy):
    """ℓ = -Σ_k t_k log softmax(z)_k, for logits z (N, K) of K classes, and labels (N,) or probabilities t (N, K).

    Logits may be (N, ..., K) with labels (N, ...) or probabilities (N, ..., K), as for each step of a sequence or each
    pixel of an image: the loss of a batch is then the mean over all labels.  ignore: a label, such as 0 or -1, that
    counts neither in the loss and its mean nor in metrics.

    `label_smoothing` ε changes targets to t (1 - ε) + ε/K. `class_weight` {class: w} multiplies the weight of each
    sample by that of its class, or by Σ_k t_k w_k; samples must then have one label each.
    """

    by_label = True

    def __init__(self, label_smoothing: float = 0.0, class_weight: Any = None, ignore: int | None = None) -> None:
        super().__init__(label_smoothing, class_weight)
        self.ignore = None if ignore is None else integer(self, "ignore", ignore, at_least=None, also="None")

    def rows(
        self, backend: Backend, targets: Array, output_shape: tuple[int, ...]
    ) -> tuple[Array, tuple[int, ...], Array | None]:
        if targets.ndim > len(output_shape):  # probabilities
            return targets.reshape(-1, *output_shape[-1:]), output_shape[-1:], None
        labels, counted = targets.reshape(-1), None
        if self.ignore is not None:
            counted = labels != self.ignore
            labels = labels * counted  # the label to ignore need not be that of a class
        return labels, output_shape[-1:], counted

    def samples(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        xp = backend.xp
        return self._of_probabilities(xp, self._probabilities(backend, outputs, targets), backend.log_softmax(outputs))

    def gradient(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        """∂ℓ/∂z = softmax(z) - t, since Σ t = 1."""
        return self.samples_and_gradient(backend, outputs, targets)[1]

    def samples_and_gradient(
        self, backend: Backend, outputs: Array, targets: Array, out: Array | None = None
    ) -> tuple[Array, Array]:
        xp = backend.xp
        grad = xp.empty_like(outputs) if out is None else out
        if targets.ndim == 1:
            losses = xp.empty(len(outputs), dtype=outputs.dtype)
            return backend.cross_entropy(outputs, targets, self.label_smoothing, losses, grad)
        t, grad = self._probabilities(backend, outputs, targets), backend.log_softmax(outputs, out=grad)
        losses = self._of_probabilities(xp, t, grad)
        xp.exp(grad, out=grad)
        grad -= t
        return losses, grad

    def check_targets(self, backend: Backend, targets: Array, output_shape: tuple[int, ...]) -> Array:
        xp, kind = backend.xp, type(self).__name__
        if not output_shape or output_shape[-1] < 2:
            other_loss = _other_loss(xp, targets) if output_shape == (1,) else ""
            advice = other_loss or (
                " End it with Flatten and Dense(K); or, for yes-or-no labels, pass "
                'loss="binary_cross_entropy", and to predict numbers, loss="mse".'
            )
            raise ShapeError(
                f"{kind}: the model must give (N, ..., K) logits of K ≥ 2 classes, but gives "
                f"{shape_text(output_shape)}.{advice}"
            )
        places, classes = output_shape[:-1], output_shape[-1]
        if not places and targets.ndim == 2 and targets.shape[1] == 1:
            targets = targets.reshape(-1)
        if fits(targets.shape[1:], places):
            if targets.dtype.kind == "f" and not bool((xp.isfinite(targets) & (targets == xp.floor(targets))).all()):
                raise DataError(
                    f"{kind}: targets {shape_text(places)} must be labels, integers from 0, but some are not whole "
                    f"numbers. {_TO_PREDICT_NUMBERS} and end the model with Dense(1)."
                )
            labels = targets
            if self.ignore is not None:
                counted = targets != self.ignore
                if not bool(counted.any()):
                    raise DataError(f"{kind}: all labels are {self.ignore}, which are ignored.")
                labels = targets[counted]
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= classes:
                advice = f", or give the last layer {high + 1} outputs" if low >= 0 else " from 0"
                numbers = f" {_TO_PREDICT_NUMBERS}." if targets.dtype.kind == "f" else ""
                raise DataError(
                    f"{kind}: labels range from {low} to {high}, but the model's {classes} outputs allow "
                    f"0 to {classes - 1}. Renumber the labels{advice}.{numbers}"
                )
            return targets.astype(xp.int64)
        if not fits(targets.shape[1:], output_shape):
            advice = " End it with Flatten and Dense(K) for one label per sample." if places else ""
            raise ShapeError(
                f"{kind}: targets must be {shape_text(places)} labels or {shape_text(output_shape)} probabilities, "
                f"but are {tuple(targets.shape)}.{advice or _other_loss(xp, targets)}"
            )
        if self.ignore is not None:
            raise DataError(f"{kind}: ignore={self.ignore} needs integer labels, but the targets are probabilities.")
        sums = targets.sum(axis=-1)
        if float(targets.min()) < 0 or float(xp.abs(sums - 1.0).max()) > 1e-3:
            raise DataError(
                f"{kind}: each row of targets must be probabilities, at least 0 and with sum 1, but "
                f"the smallest is {float(targets.min()):g}, and the sums range from {float(sums.min()):g} to "
                f"{float(sums.max()):g}.{_other_loss(xp, targets)}"
            )
        return targets

    @staticmethod
    def _of_probabilities(xp: Any, t: Array, log_p: Array) -> Array:
        """-Σ_k t_k log p_k, with 0 log 0 = 0."""
        return -xp.sum(t * xp.where(t > 0, log_p, 0.0), axis=-1)

    def _probabilities(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        """Targets as (N, K) probabilities in the dtype of the outputs, smoothed."""
        classes = outputs.shape[-1]
        if targets.ndim == 1:
            targets = (targets[:, None] == backend.xp.arange(classes)).astype(outputs.dtype)
        return self._smoothed(targets, classes)


class KLDivergence(SoftmaxCrossEntropy):
    """ℓ = Σ_k t_k (log t_k - log p_k) with p = softmax(z): the divergence of p from the probabilities t.

    Outputs are logits z (N, ..., K) or log-probabilities, since softmax(log softmax(z)) = softmax(z). Targets are
    probabilities t (N, ..., K), such as the outputs of another model, or labels (N, ...). The loss is
    SoftmaxCrossEntropy minus the entropy of t, and has the same gradient. With LogSoftmax outputs (N, K), it is
    PyTorch's KLDivLoss(reduction="batchmean").
    """

    def __init__(self, class_weight: Any = None) -> None:
        super().__init__(class_weight=class_weight)

    @staticmethod
    def _of_probabilities(xp: Any, t: Array, log_p: Array) -> Array:
        """Σ_k t_k (log t_k - log p_k), with 0 log 0 = 0."""
        return xp.sum(t * (xp.log(xp.where(t > 0, t, 1.0)) - xp.where(t > 0, log_p, 0.0)), axis=-1)


def get(spec: Any) -> Loss:
    """The loss of this name, with its defaults; or `spec` itself if it is a loss."""
    loss: Loss = resolve("loss", spec, _NAMES, Loss)  # type: ignore[type-abstract]
    choice(loss, "reduction", loss.reduction, ("mean", "sum"))  # it may have been set after construction
    weights: Any = loss.class_weight
    if isinstance(weights, str):  # evaluate would count the classes of its own samples
        _weights_of_classes(weights)
    return loss


_NAMES: dict[str, type[Loss]] = {
    "mse": MeanSquaredError,
    "mean_squared_error": MeanSquaredError,
    "half_squared_error": HalfSquaredError,
    "mae": MeanAbsoluteError,
    "mean_absolute_error": MeanAbsoluteError,
    "huber": Huber,
    "binary_cross_entropy": BinaryCrossEntropy,
    "softmax_cross_entropy": SoftmaxCrossEntropy,
    "kl_divergence": KLDivergence,
    "cosine_similarity": CosineSimilarity,
    "triplet_margin": TripletMargin,
}


_TO_PREDICT_NUMBERS = 'To predict numbers, pass loss="mse"'


def _other_loss(xp: Any, targets: Array) -> str:
    """A sentence for an error, after a space: the loss that these targets seem to need; "" if they may be classes."""
    if bool(((targets == 0) | (targets == 1)).all()):
        return ' For yes-or-no labels, pass loss="binary_cross_entropy".'
    return "" if bool((targets == xp.floor(targets)).all()) else f" {_TO_PREDICT_NUMBERS}."


def _weights_of_classes(class_weight: Any) -> dict[int, float]:
    """{class: weight}, from such a dict, a Series, or a sequence with a weight for each class."""
    if isinstance(class_weight, str):
        raise ArgumentError(
            f"class_weight of a loss must be {{class: weight}} or a sequence of weights, not {shown(class_weight)}. "
            'Give fit class_weight="balanced" instead.'
        )
    expected, pairs = "class_weight must be {class: weight} or a sequence of weights", None
    if hasattr(class_weight, "items") and not isinstance(class_weight, type):
        pairs = list(class_weight.items())
    elif hasattr(class_weight, "__getitem__") and (weights := items_of(class_weight)) is not None:
        pairs = list(enumerate(weights))
    if pairs is None:
        raise ArgumentError(f"{expected}, not {shown(class_weight)}.")
    try:
        if any(isinstance(w, str | bytes) for _, w in pairs):
            raise TypeError("weights cannot be text")
        given = {operator.index(k): float(w) for k, w in pairs}
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(f"{expected}: {error}.") from error
    if not given or min(given) < 0 or not all(0 <= w < math.inf for w in given.values()):
        raise ArgumentError(
            f"class_weight must give classes from 0 finite weights of at least 0, not {shown(class_weight)}."
        )
    return given


def _like_outputs(targets: Array, output_shape: tuple[int, ...], name: str) -> Array:
    if targets.ndim == 1 and output_shape == (1,):
        targets = targets.reshape(-1, 1)
    if not fits(targets.shape[1:], output_shape):
        raise ShapeError(
            f"{name}: targets must have the shape of the outputs, {shape_text(output_shape)}, but are "
            f"{tuple(targets.shape)}. They are not broadcast: reshape them, or change the last layer."
        )
    return targets


def _sum(xp: Any, a: Array) -> Array:
    """Σ over each sample's elements, (N,)."""
    return xp.sum(a.reshape(len(a), -1), axis=1)


def _mean(xp: Any, a: Array) -> Array:
    return _sum(xp, a) * (1.0 / _outputs_per_sample(a))


def _norm(xp: Any, a: Array) -> Array:
    """‖a‖ over the last axis, which is kept."""
    return xp.sqrt(xp.sum(xp.square(a), axis=-1, keepdims=True))


def _outputs_per_sample(a: Array) -> int:
    return int(a.size) // len(a)
