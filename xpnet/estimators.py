"""scikit-learn's estimators on xpnet: `XPClassifier` and `XPRegressor`, for pipelines, grid searches and all the rest.

They need the extra `sklearn`. The network is `model_` after fitting, an `xpnet.Sequential` like any other.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy

from xpnet import layers as layers_
from xpnet import optimizers
from xpnet.callbacks import Callback, EarlyStopping
from xpnet.errors import ArgumentError, MissingPackageError
from xpnet.model import Sequential

try:
    from scipy.special import softmax
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import train_test_split
    from sklearn.utils import check_random_state, column_or_1d
    from sklearn.utils.class_weight import compute_sample_weight
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise MissingPackageError(
        f'xpnet.estimators needs scikit-learn, which cannot be imported ({error}): pip install "xpnet[sklearn]"'
    ) from error

Floats = numpy.ndarray[Any, Any]

_ACTIVATIONS: dict[str, type[layers_.Layer]] = {
    "identity": layers_.Identity,
    "logistic": layers_.Sigmoid,
    "tanh": layers_.Tanh,
    "relu": layers_.ReLU,
}


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """What both have in common.

    hidden_layer_sizes: units of each hidden Dense layer.  activation: "relu", "tanh", "logistic" or "identity".
    layers: hidden layers of xpnet's instead of those two; copied, never trained themselves. The output layer is added.
    optimizer: "adam", "sgd" or another name, with `learning_rate` and weight decay `alpha`; or an xpnet optimiser, that
    has its own.
    batch_size: samples a step; "auto" is 200, or all where there are fewer.
    max_iter: epochs at most. Training ends before, where the loss (with early_stopping: the score on the held-out
    `validation_fraction`) has not become better by `tol` for `n_iter_no_change` epochs.
    warm_start: fit goes on with the network of the fit before.
    backend: "auto", "cpu", "gpu": see `xpnet.get_backend`. Inputs in float32 train in float32, all others in float64.
    random_state: decides the first weights, the order of samples and what is held out.
    verbose: print a line an epoch.
    """

    model_: Sequential
    n_iter_: int
    loss_: float
    loss_curve_: list[float]
    _loss: str
    _monitor = "val_loss"

    def __init__(
        self,
        hidden_layer_sizes: Sequence[int] = (100,),
        activation: str = "relu",
        *,
        layers: Sequence[layers_.Layer] | None = None,
        optimizer: Any = "adam",
        learning_rate: float = 0.001,
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        max_iter: int = 200,
        tol: float = 1e-4,
        n_iter_no_change: int = 10,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        warm_start: bool = False,
        backend: Any = "auto",
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.hidden_layer_sizes, self.activation, self.layers = hidden_layer_sizes, activation, layers
        self.optimizer, self.learning_rate, self.alpha = optimizer, learning_rate, alpha
        self.batch_size, self.max_iter, self.tol, self.n_iter_no_change = batch_size, max_iter, tol, n_iter_no_change
        self.early_stopping, self.validation_fraction = early_stopping, validation_fraction
        self.warm_start, self.backend, self.random_state, self.verbose = warm_start, backend, random_state, verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on X (samples, features) and y, from the beginning unless `warm_start`; returns the estimator."""
        going_on = self.warm_start and hasattr(self, "model_")
        X, y, weights = self._take_in(X, y, sample_weight, reset=not going_on)
        self._learn_targets(y, going_on)
        if not going_on:
            self._build(X.shape[1], X.dtype)
        stopper, held_out = EarlyStopping("loss", self.n_iter_no_change, self.tol, restore_best=False), None
        if self.early_stopping:
            stopper = EarlyStopping(self._monitor, self.n_iter_no_change, self.tol)
            (X, y, weights), held_out = self._hold_out(X, y, weights)
        self._train(X, y, weights, self.max_iter, held_out, [stopper])
        if stopper.waited <= self.n_iter_no_change:
            warnings.warn(
                f"{type(self).__name__}: after max_iter={self.max_iter} epochs the training was still becoming better.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any, classes: Any = None) -> Self:
        """One epoch, from where the network stands."""
        going_on = hasattr(self, "model_")
        X, y, weights = self._take_in(X, y, sample_weight, reset=not going_on)
        self._learn_targets(y, going_on, classes)
        if not going_on:
            self._build(X.shape[1], X.dtype)
        self._train(X, y, weights, 1, None, [])
        return self

    def _take_in(self, X: Any, y: Any, sample_weight: Any, reset: bool) -> tuple[Floats, Floats, Floats | None]:
        X, y = validate_data(
            self, X, y, reset=reset, dtype=[numpy.float64, numpy.float32], multi_output=True, y_numeric=False
        )
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, dtype=X.dtype)
        return X, y, sample_weight

    def _learn_targets(self, y: Floats, going_on: bool, classes: Any = None) -> None:
        """Note what y tells about the outputs; refuse what cannot be learnt."""
        raise NotImplementedError

    def _outputs(self) -> int:
        raise NotImplementedError

    def _encoded(self, y: Floats) -> Floats:
        """Targets as the loss takes them."""
        raise NotImplementedError

    def _weights(self, y: Floats, weights: Floats | None) -> Floats | None:
        return weights

    def _build(self, features: int, dtype: Any) -> None:
        if self.layers is not None:
            hidden = copy.deepcopy(list(self.layers))
        else:
            if self.activation not in _ACTIVATIONS:
                raise ArgumentError(f"activation must be one of {', '.join(_ACTIVATIONS)}, not {self.activation!r}.")
            sizes = numpy.atleast_1d(self.hidden_layer_sizes)
            hidden = [layer for n in sizes for layer in (layers_.Dense(int(n)), _ACTIVATIONS[self.activation]())]
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.model_ = Sequential(
            [*hidden, layers_.Dense(self._outputs())],
            (features,),
            self.backend,
            seed=seed,
            dtype=numpy.dtype(dtype).name,
        )
        self.n_iter_, self.loss_curve_ = 0, []

    def _train(
        self, X: Floats, y: Floats, weights: Floats | None, epochs: int, held_out: Any, callbacks: list[Callback]
    ) -> None:
        history = self.model_.fit(
            self._typed(X),
            self._encoded(y),
            loss=self._loss,
            optimizer=self._optimizer(),
            epochs=epochs,
            batch_size=min(200, len(X)) if self.batch_size == "auto" else self.batch_size,  # type: ignore[arg-type]
            sample_weight=self._weights(y, weights),
            validation_data=held_out,
            callbacks=callbacks,
            verbose=2 if self.verbose else 0,
        )
        self.n_iter_ += len(history["loss"])
        self.loss_curve_ = [*self.loss_curve_, *history["loss"]]
        self.loss_ = self.loss_curve_[-1]

    def _optimizer(self) -> optimizers.Optimizer:
        optimizer = optimizers.get(self.optimizer)
        if isinstance(self.optimizer, str):
            optimizer = type(optimizer)(self.learning_rate, weight_decay=self.alpha)  # type: ignore[call-arg]
        return optimizer

    def _hold_out(self, X: Floats, y: Floats, weights: Floats | None) -> tuple[Any, Any]:
        given = [X, y] if weights is None else [X, y, weights]
        parts = train_test_split(
            *given, test_size=self.validation_fraction, random_state=self.model_.seed, stratify=self._strata(y)
        )
        X_val, y_val, weights_val = [*parts[1::2], None][:3]
        held_out = self._typed(X_val), self._encoded(y_val), self._weights(y_val, weights_val)
        return [*parts[::2], None][:3], held_out

    def _strata(self, y: Floats) -> Floats | None:
        """By what to hold out alike parts."""
        return None

    def _raw(self, X: Any) -> Floats:
        check_is_fitted(self, "model_")
        X = validate_data(self, X, reset=False, dtype=[numpy.float64, numpy.float32])
        outputs: Floats = self.model_.predict(self._typed(X))
        return outputs

    def _typed(self, X: Floats) -> Floats:
        return numpy.asarray(X, dtype=self.model_.dtype)


class XPClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """A neural network that tells classes apart, with scikit-learn's interface.

    Labels may be of any type. class_weight: a dict, "balanced" or None. After fitting: `classes_`, `model_`, `n_iter_`,
    `loss_`, `loss_curve_`, `n_features_in_` and, of inputs that name their columns, `feature_names_in_`.
    """

    classes_: Floats
    _monitor = "val_accuracy"
    _loss = "softmax_cross_entropy"

    def __init__(
        self,
        hidden_layer_sizes: Sequence[int] = (100,),
        activation: str = "relu",
        *,
        layers: Sequence[layers_.Layer] | None = None,
        optimizer: Any = "adam",
        learning_rate: float = 0.001,
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        max_iter: int = 200,
        tol: float = 1e-4,
        n_iter_no_change: int = 10,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        class_weight: Mapping[Any, float] | str | None = None,
        warm_start: bool = False,
        backend: Any = "auto",
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            hidden_layer_sizes, activation, layers=layers, optimizer=optimizer, learning_rate=learning_rate,
            alpha=alpha, batch_size=batch_size, max_iter=max_iter, tol=tol, n_iter_no_change=n_iter_no_change,
            early_stopping=early_stopping, validation_fraction=validation_fraction, warm_start=warm_start,
            backend=backend, random_state=random_state, verbose=verbose,
        )  # fmt: skip
        self.class_weight = class_weight

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """One epoch. The first call names all classes, unless this y holds them all."""
        return self._partial_fit(X, y, sample_weight, classes)

    def predict(self, X: Any) -> Floats:
        """The class (samples,) that is most likely."""
        outputs = self._raw(X)[:, : len(self.classes_)]
        chosen: Floats = self.classes_[outputs.argmax(axis=1)]
        return chosen

    def predict_proba(self, X: Any) -> Floats:
        """The probability (samples, classes) of each class, in the order of `classes_`."""
        probabilities: Floats = softmax(self._raw(X)[:, : len(self.classes_)], axis=1)
        return probabilities

    def predict_log_proba(self, X: Any) -> Floats:
        """Its logarithm."""
        return numpy.log(self.predict_proba(X))

    def _take_in(self, X: Any, y: Any, sample_weight: Any, reset: bool) -> tuple[Floats, Floats, Floats | None]:
        X, y, weights = super()._take_in(X, y, sample_weight, reset)
        check_classification_targets(y)
        return X, column_or_1d(y, warn=True), weights

    def _learn_targets(self, y: Floats, going_on: bool, classes: Any = None) -> None:
        named = None if classes is None else numpy.unique(classes)
        if going_on and named is not None and not numpy.array_equal(named, self.classes_):
            raise ArgumentError(f"classes {named} are not those of the first call, {self.classes_}.")
        known = self.classes_ if going_on else numpy.unique(y) if named is None else named
        unknown = numpy.setdiff1d(y, known)
        if len(unknown):
            raise ArgumentError(f"y holds classes that were not named before: {unknown}; known are {known}.")
        self.classes_ = known

    def _outputs(self) -> int:
        return max(2, len(self.classes_))

    def _encoded(self, y: Floats) -> Floats:
        return numpy.searchsorted(self.classes_, y)

    def _weights(self, y: Floats, weights: Floats | None) -> Floats | None:
        if self.class_weight is None:
            return weights
        by_class: Floats = compute_sample_weight(self.class_weight, y)
        return by_class if weights is None else weights * by_class

    def _strata(self, y: Floats) -> Floats | None:
        counts = numpy.unique(y, return_counts=True)[1]
        enough = counts.min() >= 2 and len(counts) <= int(self.validation_fraction * len(y))
        return y if enough else None


class XPRegressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """A neural network that predicts numbers, one or several a sample, by least squares, with scikit-learn's interface.

    After fitting: `model_`, `n_iter_`, `loss_`, `loss_curve_`, `n_features_in_` and, of inputs that name their columns,
    `feature_names_in_`.
    """

    _one: bool
    _width: int
    _loss = "mse"

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """One epoch."""
        return self._partial_fit(X, y, sample_weight)

    def predict(self, X: Any) -> Floats:
        """The predicted numbers, (samples,) or (samples, outputs) as y was."""
        outputs = self._raw(X)
        return outputs[:, 0] if self._one else outputs

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _take_in(self, X: Any, y: Any, sample_weight: Any, reset: bool) -> tuple[Floats, Floats, Floats | None]:
        X, y, weights = super()._take_in(X, y, sample_weight, reset)
        if y.dtype.kind not in "fiub":
            y = y.astype(numpy.float64)
        return X, y, weights

    def _learn_targets(self, y: Floats, going_on: bool, classes: Any = None) -> None:
        one = y.ndim == 1
        width = 1 if one else y.shape[1]
        if going_on and width != self._width:
            raise ArgumentError(f"y has {width} outputs a sample, but had {self._width} before.")
        self._one, self._width = one, width

    def _outputs(self) -> int:
        return self._width

    def _encoded(self, y: Floats) -> Floats:
        return y.reshape(len(y), self._width)
