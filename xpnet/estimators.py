"""scikit-learn estimators, for pipelines and grid searches: `pip install "xpnet[sklearn]"`.

After fitting, the attribute `model_` is the network, an `xpnet.Sequential`.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy

from xpnet import layers as layers_
from xpnet import optimizers
from xpnet.callbacks import Callback, EarlyStopping
from xpnet.config import choice, flag, integer, number
from xpnet.errors import ArgumentError, MissingPackageError, module_attributes
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

__all__ = ["XPClassifier", "XPRegressor"]

if not TYPE_CHECKING:  # a type checker that sees __getattr__ accepts every name, misspelled ones too
    __getattr__, __dir__ = module_attributes(__name__, __all__)

Array = numpy.ndarray[Any, Any]

_ACTIVATIONS: dict[str, type[layers_.Layer]] = {
    "identity": layers_.Identity,
    "logistic": layers_.Sigmoid,
    "tanh": layers_.Tanh,
    "relu": layers_.ReLU,
}


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """What both estimators have in common. XPClassifier explains the arguments."""

    model_: Sequential
    n_iter_: int
    loss_: float
    loss_curve_: list[float]
    _loss: str
    _units: int  # of the output layer
    class_weight: Mapping[Any, float] | str | None = None  # an argument of XPClassifier
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
        """Train on X (samples, features) and y, from the start unless `warm_start`. Returns the estimator."""
        continuing = flag(self, "warm_start", self.warm_start) and hasattr(self, "model_")
        X, y, weights = self._validate(X, y, sample_weight, reset=not continuing)
        self._set_targets(y, continuing)
        if not continuing:
            self._build(X.shape[1], X.dtype)
        stopper, held_out = EarlyStopping("loss", self.n_iter_no_change, self.tol, restore_best=False), None
        if flag(self, "early_stopping", self.early_stopping):
            stopper = EarlyStopping(self._monitor, self.n_iter_no_change, self.tol)
            (X, y, weights), held_out = self._hold_out(X, y, weights)
        self._train(X, y, weights, integer(self, "max_iter", self.max_iter), held_out, [stopper])
        if stopper.waited <= self.n_iter_no_change:
            warnings.warn(
                f"{type(self).__name__} was still improving after max_iter={self.max_iter} epochs. Increase max_iter.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any, classes: Any = None) -> Self:
        """Train the present network for one epoch."""
        continuing = hasattr(self, "model_")
        X, y, weights = self._validate(X, y, sample_weight, reset=not continuing)
        self._set_targets(y, continuing, classes)
        if not continuing:
            self._build(X.shape[1], X.dtype)
        self._train(X, y, weights, 1, None, [])
        return self

    def _validate(self, X: Any, y: Any, sample_weight: Any, reset: bool) -> tuple[Array, Array, Array | None]:
        X, y = validate_data(
            self, X, y, reset=reset, dtype=[numpy.float64, numpy.float32], multi_output=True, y_numeric=False
        )
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, dtype=X.dtype)
        return X, y, sample_weight

    def _set_targets(self, y: Array, continuing: bool, classes: Any = None) -> None:
        """Set `_units`, and what else describes the outputs. Raises ArgumentError for targets that do not fit."""
        raise NotImplementedError

    def _encode(self, y: Array) -> Array:
        """y as targets of the loss."""
        raise NotImplementedError

    def _effective_weights(self, y: Array, weights: Array | None) -> Array | None:
        """The weight of each sample in the loss."""
        if self.class_weight is None:
            return weights
        by_class: Array = compute_sample_weight(self.class_weight, y)
        return by_class if weights is None else weights * by_class

    def _build(self, features: int, dtype: Any) -> None:
        if self.layers is not None:
            hidden = copy.deepcopy(list(self.layers))
        else:
            activation = _ACTIVATIONS[choice(self, "activation", self.activation, list(_ACTIVATIONS))]
            sizes = [integer(self, "hidden_layer_sizes", n) for n in numpy.atleast_1d(self.hidden_layer_sizes).tolist()]
            hidden = [layer for n in sizes for layer in (layers_.Dense(n), activation())]
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        stack = [*hidden, layers_.Dense(self._units)]
        self.model_ = Sequential(stack, (features,), self.backend, seed=seed, dtype=numpy.dtype(dtype).name)
        self.n_iter_, self.loss_curve_ = 0, []

    def _train(
        self, X: Array, y: Array, weights: Array | None, epochs: int, held_out: Any, callbacks: list[Callback]
    ) -> None:
        batch_size = min(200, len(X)) if self.batch_size == "auto" else self.batch_size
        history = self.model_.fit(
            self._cast(X),
            self._encode(y),
            loss=self._loss,
            optimizer=self._optimizer(),
            epochs=epochs,
            batch_size=integer(self, "batch_size", batch_size, also='"auto"'),
            sample_weight=self._effective_weights(y, weights),
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

    def _hold_out(self, X: Array, y: Array, weights: Array | None) -> tuple[Any, Any]:
        """(X, y and weights for training, the validation data)."""
        arrays = [X, y] if weights is None else [X, y, weights]
        fraction = number(self, "validation_fraction", self.validation_fraction, above=0, below=1)
        parts = train_test_split(*arrays, test_size=fraction, random_state=self.model_.seed, stratify=self._strata(y))
        X_val, y_val, weights_val = [*parts[1::2], None][:3]
        held_out = self._cast(X_val), self._encode(y_val), self._effective_weights(y_val, weights_val)
        return [*parts[::2], None][:3], held_out

    def _strata(self, y: Array) -> Array | None:
        """The classes, if the same share of each can be held out; None for a split without classes."""
        return None

    def _predict_outputs(self, X: Any) -> Array:
        check_is_fitted(self, "model_")
        X = validate_data(self, X, reset=False, dtype=[numpy.float64, numpy.float32])
        outputs: Array = self.model_.predict(self._cast(X))
        return outputs

    def _cast(self, X: Array) -> Array:
        return numpy.asarray(X, dtype=self.model_.dtype)


class XPClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """A classifier with scikit-learn's interface, trained with softmax cross-entropy. Labels may have any type.

    hidden_layer_sizes: the units of each hidden Dense layer.  activation: "relu", "tanh", "logistic" or "identity".
    layers: hidden layers of xpnet, which replace those two arguments; fit trains a copy and adds the output layer.
    optimizer: a name such as "adam" or "sgd", used with `learning_rate` and weight decay `alpha`; or an xpnet
    optimizer, to which these two do not apply.
    batch_size: samples per step; "auto" is 200, or the number of samples if there are fewer.
    max_iter: the maximum number of epochs. Training stops earlier if the loss has not improved by `tol` for more than
    `n_iter_no_change` epochs.  early_stopping: watch the accuracy (XPRegressor: the loss) on a held-out
    `validation_fraction` instead, and restore the weights of the best epoch.
    class_weight: {label: weight}, "balanced" or None.
    warm_start: whether fit continues with the network of the previous fit.
    backend: "auto", "cpu", "gpu": see `xpnet.get_backend`. float32 inputs are trained in float32, others in float64.
    random_state: determines the initial weights, the order of the samples and which of them are held out.
    verbose: whether to print one line per epoch.

    Invalid arguments raise ArgumentError in fit. Attributes after fitting: `classes_`, `model_`, `n_iter_`, `loss_`,
    `loss_curve_`, `n_features_in_` and, if the columns of X have names, `feature_names_in_`.
    """

    classes_: Array
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
        """Train for one epoch. The first call needs `classes`, all class labels, unless its y has all of them."""
        return self._partial_fit(X, y, sample_weight, classes)

    def predict(self, X: Any) -> Array:
        """The most probable class of each sample, (samples,)."""
        outputs = self._predict_outputs(X)[:, : len(self.classes_)]
        predicted: Array = self.classes_[outputs.argmax(axis=1)]
        return predicted

    def predict_proba(self, X: Any) -> Array:
        """The probability of each class, (samples, classes), in the order of `classes_`."""
        probabilities: Array = softmax(self._predict_outputs(X)[:, : len(self.classes_)], axis=1)
        return probabilities

    def predict_log_proba(self, X: Any) -> Array:
        """The logarithm of `predict_proba`, (samples, classes)."""
        return numpy.log(self.predict_proba(X))

    def _validate(self, X: Any, y: Any, sample_weight: Any, reset: bool) -> tuple[Array, Array, Array | None]:
        X, y, weights = super()._validate(X, y, sample_weight, reset)
        check_classification_targets(y)
        return X, column_or_1d(y, warn=True), weights

    def _set_targets(self, y: Array, continuing: bool, classes: Any = None) -> None:
        given = None if classes is None else numpy.unique(classes)
        if continuing and given is not None and not numpy.array_equal(given, self.classes_):
            raise ArgumentError(f"classes must be those of the first call, {self.classes_}, not {given}.")
        known = self.classes_ if continuing else numpy.unique(y) if given is None else given
        unknown = numpy.setdiff1d(y, known)
        if len(unknown):
            raise ArgumentError(f"y has the unknown classes {unknown}. The known classes are {known}.")
        self.classes_, self._units = known, max(2, len(known))

    def _encode(self, y: Array) -> Array:
        return numpy.searchsorted(self.classes_, y)

    def _strata(self, y: Array) -> Array | None:
        counts = numpy.unique(y, return_counts=True)[1]
        enough = counts.min() >= 2 and len(counts) <= int(self.validation_fraction * len(y))
        return y if enough else None


class XPRegressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """A regressor of one or several outputs with scikit-learn's interface, trained with the mean squared error.

    Arguments and attributes are those of XPClassifier, without `class_weight` and `classes_`.
    """

    _single_output: bool
    _loss = "mse"

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train for one epoch."""
        return self._partial_fit(X, y, sample_weight)

    def predict(self, X: Any) -> Array:
        """The predicted values, (samples,) or (samples, outputs) like y."""
        outputs = self._predict_outputs(X)
        return outputs[:, 0] if self._single_output else outputs

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _validate(self, X: Any, y: Any, sample_weight: Any, reset: bool) -> tuple[Array, Array, Array | None]:
        X, y, weights = super()._validate(X, y, sample_weight, reset)
        if y.dtype.kind not in "fiub":
            y = y.astype(numpy.float64)
        return X, y, weights

    def _set_targets(self, y: Array, continuing: bool, classes: Any = None) -> None:
        outputs = 1 if y.ndim == 1 else y.shape[1]
        if continuing and outputs != self._units:
            raise ArgumentError(f"y must have {self._units} outputs per sample, as before, not {outputs}.")
        self._single_output, self._units = y.ndim == 1, outputs

    def _encode(self, y: Array) -> Array:
        return y.reshape(len(y), self._units)
