"""scikit-learn estimators for pipelines and grid searches: `pip install "xpnet[sklearn]"`.

After fitting, the attribute `model_` is the network, an `xpnet.Sequential` or an `xpnet.Model`.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy

from xpnet import layers as layers_
from xpnet import losses, optimizers
from xpnet.backends import Array as DeviceArray
from xpnet.backends import Backend
from xpnet.backends.arrays import refuse_masked
from xpnet.callbacks import Callback
from xpnet.config import choice, explain_arguments, flag, integer, number
from xpnet.data.streaming import Stream
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, MissingPackageError, module_attributes, shown
from xpnet.layers.tensors import Tensor
from xpnet.model import Input, Model, Sequential
from xpnet.parameters import Parameter, Snapshot
from xpnet.training.arguments import warn

try:
    from scipy.sparse import csr_matrix, issparse
    from scipy.special import log_softmax, softmax
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.model_selection import train_test_split
    from sklearn.utils import check_random_state, column_or_1d
    from sklearn.utils.class_weight import compute_sample_weight
    from sklearn.utils.multiclass import check_classification_targets, type_of_target
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
    "sigmoid": layers_.Sigmoid,
    "tanh": layers_.Tanh,
    "relu": layers_.ReLU,
    "leaky_relu": layers_.LeakyReLU,
    "elu": layers_.ELU,
    "gelu": layers_.GELU,
    "silu": layers_.SiLU,
    "softplus": layers_.Softplus,
}
_RATE = 0.001  # the default learning rate
_SMALLEST_RATE = 1e-6  # the rate from which on an adaptive schedule stops the training
_MAX_DENSE_BYTES = 256 * 2**20  # a sparse X that would be larger as a dense array is made dense in parts
_PREDICTION_ROWS = 1024  # the rows of a sparse X that are made dense at a time for a prediction


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """The base class of both estimators. XPClassifier documents the arguments."""

    model_: Sequential | Model
    n_outputs_: int
    out_activation_: str
    n_iter_: int
    t_: int
    loss_: float
    loss_curve_: list[float]
    best_loss_: float | None
    validation_scores_: list[float] | None
    best_validation_score_: float | None
    _no_improvement_count: int
    class_weight: Any = None  # an argument of XPClassifier

    @explain_arguments
    def __init__(
        self,
        hidden_layer_sizes: int | Sequence[int] = (100,),
        activation: str | layers_.Layer = "relu",
        *,
        layers: Iterable[layers_.Layer] | Callable[[Tensor], Tensor] | None = None,
        optimizer: Any = "adam",
        solver: Any = None,
        learning_rate: Any = _RATE,
        learning_rate_init: float | None = None,
        learning_rate_schedule: str = "constant",
        power_t: float = 0.5,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        shuffle: bool = True,
        max_iter: int = 200,
        tol: float = 1e-4,
        n_iter_no_change: float = 10,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        warm_start: bool = False,
        backend: Any = "auto",
        random_state: Any = None,
        verbose: bool | int = False,
    ) -> None:
        self.hidden_layer_sizes, self.activation, self.layers = hidden_layer_sizes, activation, layers
        self.optimizer, self.solver = optimizer, solver
        self.learning_rate, self.learning_rate_init = learning_rate, learning_rate_init
        self.learning_rate_schedule, self.power_t = learning_rate_schedule, power_t
        self.momentum, self.nesterovs_momentum = momentum, nesterovs_momentum
        self.beta_1, self.beta_2, self.epsilon, self.alpha = beta_1, beta_2, epsilon, alpha
        self.batch_size, self.shuffle = batch_size, shuffle
        self.max_iter, self.tol, self.n_iter_no_change = max_iter, tol, n_iter_no_change
        self.early_stopping, self.validation_fraction = early_stopping, validation_fraction
        self.warm_start, self.backend, self.random_state, self.verbose = warm_start, backend, random_state, verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on X (samples, features) and y, from the start unless `warm_start`. Returns the estimator.

        X: an array, a data frame or a sparse matrix.  sample_weight (samples,): a sample of weight w counts w times.
        Ctrl-C raises KeyboardInterrupt; the attributes then describe the completed epochs.
        """
        self._check_arguments()
        epochs = integer(self, "max_iter", self.max_iter)
        continuing = flag(self, "warm_start", self.warm_start) and hasattr(self, "model_")
        X, y, weights = self._begin(X, y, sample_weight, continuing)
        self.n_iter_ = 0
        held_out = None
        effective = self._effective_weights(y, weights)
        if self.early_stopping:
            train, rest = self._split(y)
            held_out = X[rest], y[rest], None if weights is None else weights[rest]
            X, y, effective = X[train], y[train], None if effective is None else effective[train]
        if not isinstance(self.batch_size, str) and self.batch_size > len(y):
            warnings.warn(
                f"batch_size={self.batch_size} is larger than the number of samples, {len(y)}, and is clipped to it.",
                stacklevel=2,
            )
        progress = _Progress(self, self._schedule(), held_out)
        self._train(X, y, effective, epochs, progress)
        if not progress.converged:
            warnings.warn(
                f"{type(self).__name__} was still improving after max_iter={self.max_iter} epochs. Increase max_iter.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any, classes: Any = None) -> Self:
        """Train the present network for one epoch."""
        self._check_arguments()
        if self.early_stopping:
            raise ArgumentError(
                f"{type(self).__name__}: partial_fit does not support early_stopping=True. Compute a score "
                "after each call instead."
            )
        X, y, weights = self._begin(X, y, sample_weight, hasattr(self, "model_"), classes)
        self._train(X, y, self._effective_weights(y, weights), 1, _Progress(self, self._schedule()))
        return self

    @property
    def coefs_(self) -> list[Array]:
        """The weights of the Dense layers, copies on the host: (features, units), …, (units, outputs)."""
        return [_on_host(layer.weight) for layer in self._dense_layers("coefs_")]

    @property
    def intercepts_(self) -> list[Array]:
        """The biases of the Dense layers, copies on the host: (units,), …, (outputs,)."""
        return [
            _on_host(layer.bias) if layer.use_bias else numpy.zeros(layer.units, self.model_.dtype)
            for layer in self._dense_layers("intercepts_")
        ]

    @property
    def n_layers_(self) -> int:
        """The number of layers in scikit-learn's sense: input, hidden and output layers."""
        return 1 + len(self._dense_layers("n_layers_"))

    def _dense_layers(self, wanted: str) -> list[layers_.Dense]:
        check_is_fitted(self, "model_")
        found = []
        for layer in self.model_.layers:
            if isinstance(layer, layers_.Dense):
                found.append(layer)
            elif layer.parameters:
                raise AttributeError(
                    f"{type(self).__name__} has no {wanted}, because the parameters of {type(layer).__name__} are not "
                    "one weight matrix and one bias: read model_.parameters."
                )
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    # Implemented by the two estimators ------------------------------------------------------------------------------

    def _set_targets(self, y: Array, continuing: bool, classes: Any = None) -> None:
        """Set `n_outputs_` and the other attributes of the outputs. Raises ArgumentError for incompatible targets."""
        raise NotImplementedError

    def _loss(self) -> losses.Loss:
        """The loss, a sum over the outputs of a sample."""
        raise NotImplementedError

    def _encode(self, y: Array) -> Array:
        """y as targets of the loss."""
        raise NotImplementedError

    def _decide(self, outputs: Array) -> Array:
        """The predictions for these outputs of the network."""
        raise NotImplementedError

    def _score(self, y: Array, predicted: Array, weights: Array | None) -> float:
        """The score that early stopping monitors."""
        raise NotImplementedError

    def _effective_weights(self, y: Array, weights: Array | None) -> Array | None:
        """The weight of each sample in the loss."""
        return weights

    def _strata(self, y: Array) -> Array | None:
        """y, if the held-out samples can be stratified by class; otherwise None."""
        return None

    # Arguments -------------------------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        """Raise ArgumentError for arguments that are invalid or contradict each other, before anything changes."""
        self._optimizer()
        self._schedule()
        flag(self, "early_stopping", self.early_stopping)
        flag(self, "shuffle", self.shuffle)
        number(self, "alpha", self.alpha, at_least=0, finite=True)
        number(self, "power_t", self.power_t, at_least=0)
        number(self, "tol", self.tol, at_least=0)
        if not (isinstance(self.n_iter_no_change, float) and self.n_iter_no_change == math.inf):
            integer(self, "n_iter_no_change", self.n_iter_no_change, also="infinity")
        if not (isinstance(self.batch_size, str) and self.batch_size == "auto"):
            integer(self, "batch_size", self.batch_size, also='"auto"')
        number(self, "validation_fraction", self.validation_fraction, above=0, below=1)
        if not isinstance(self.verbose, bool | numpy.bool_):
            integer(self, "verbose", self.verbose, at_least=0, also="True or False")

    def _chosen_optimizer(self) -> Any:
        """`solver`, or `optimizer` if there is none: a name or an object."""
        if self.solver is None:
            chosen, name = self.optimizer, "optimizer"
        else:
            chosen, name = self.solver, "solver"
            if self.optimizer is not chosen and self.optimizer not in ("adam", chosen):
                raise ArgumentError(
                    f"{type(self).__name__}: solver={chosen!r} and optimizer={self.optimizer!r} are two names of the "
                    "same argument: give one of them."
                )
        if isinstance(chosen, str) and chosen.lower().replace("-", "") == "lbfgs":
            raise ArgumentError(
                f'{type(self).__name__}: {name}="{chosen}" is not available, because xpnet trains on batches. Use '
                '"adam" or "sgd"; or, for a small dataset, scikit-learn\'s own MLP.'
            )
        return chosen

    def _optimizer(self) -> optimizers.Optimizer:
        chosen = self._chosen_optimizer()
        optimizer = optimizers.get(chosen)
        if not isinstance(chosen, str):
            return optimizer
        rate = self._initial_rate()
        momentum = number(self, "momentum", self.momentum, at_least=0, below=1)
        nesterov = flag(self, "nesterovs_momentum", self.nesterovs_momentum) and momentum > 0
        betas: Any = {
            "beta1": number(self, "beta_1", self.beta_1, at_least=0, below=1),
            "beta2": number(self, "beta_2", self.beta_2, at_least=0, below=1),
            "epsilon": number(self, "epsilon", self.epsilon, above=0),
        }
        if isinstance(optimizer, optimizers.SGD):
            return optimizers.SGD(rate, momentum=momentum, nesterov=nesterov)
        if isinstance(optimizer, optimizers.AdamW):
            return optimizers.AdamW(rate, **betas, weight_decay=self.alpha)
        if isinstance(optimizer, optimizers.Adam):
            return optimizers.Adam(rate, **betas)
        return type(optimizer)(rate)  # type: ignore[call-arg]

    def _initial_rate(self) -> Any:
        """The learning rate of the first epoch, a number or a schedule."""
        given = _RATE if isinstance(self.learning_rate, str) else self.learning_rate
        if self.learning_rate_init is None:
            return given
        if given not in (_RATE, self.learning_rate_init):
            raise ArgumentError(
                f"{type(self).__name__}: learning_rate={given!r} and learning_rate_init={self.learning_rate_init!r} "
                "are two names of the same argument: give one of them."
            )
        return number(self, "learning_rate_init", self.learning_rate_init, above=0)

    def _schedule(self) -> str:
        """How the rate changes from epoch to epoch: "constant", "invscaling" or "adaptive"; only SGD's does."""
        kinds = ("constant", "invscaling", "adaptive")
        schedule = choice(self, "learning_rate_schedule", self.learning_rate_schedule, kinds)
        if isinstance(self.learning_rate, str):
            named = choice(self, "learning_rate", self.learning_rate, kinds, also="a number")
            if schedule not in ("constant", named):
                raise ArgumentError(
                    f"{type(self).__name__}: learning_rate={named!r} and learning_rate_schedule={schedule!r} are two "
                    "names of the same argument: give one of them."
                )
            schedule = named
        chosen = self._chosen_optimizer()
        return (
            schedule if isinstance(chosen, str) and isinstance(optimizers.get(chosen), optimizers.SGD) else "constant"
        )

    # Training --------------------------------------------------------------------------------------------------------

    def _begin(
        self, X: Any, y: Any, sample_weight: Any, continuing: bool, classes: Any = None
    ) -> tuple[Any, Array, Array | None]:
        """Check the data, and make the network unless training continues. Returns X, y and weights, checked."""
        X, y, weights = self._validate(X, y, sample_weight, reset=not continuing)
        self._set_targets(y, continuing, classes)
        if not continuing:
            self._build(X.shape[1], X.dtype)
            self.n_iter_ = self.t_ = self._no_improvement_count = 0
            self.loss_, self.loss_curve_ = math.nan, []
            self.best_loss_ = self.validation_scores_ = self.best_validation_score_ = None
        if not self.early_stopping:
            self.best_loss_ = math.inf if self.best_loss_ is None else self.best_loss_
            self.validation_scores_ = self.best_validation_score_ = None
        elif self.validation_scores_ is None or self.best_validation_score_ is None:
            self.validation_scores_, self.best_validation_score_, self.best_loss_ = [], -math.inf, None
        return X, y, weights

    def _validate(self, X: Any, y: Any, sample_weight: Any, reset: bool) -> tuple[Any, Array, Array | None]:
        for name, array in (("X", X), ("y", y), ("sample_weight", sample_weight)):
            refuse_masked(array, name)  # scikit-learn would drop the mask
        X, y = validate_data(
            self, X, y, reset=reset, accept_sparse="csr", dtype=[numpy.float64, numpy.float32], multi_output=True
        )
        if issparse(y):
            y = y.toarray()
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, dtype=X.dtype)
        return X, y, sample_weight

    def _build(self, features: int, dtype: Any) -> None:
        layers: Any = self.layers
        output, dtype = layers_.Dense(self.n_outputs_), numpy.dtype(dtype).name
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if callable(layers) and not isinstance(layers, layers_.Layer):
            inputs = Input((features,))
            self.model_ = Model(inputs, output(layers(inputs)), self.backend, seed=seed, dtype=dtype)
            return
        if layers is not None:
            if not isinstance(layers, Iterable):
                raise ArgumentTypeError(
                    f"{type(self).__name__}: layers must be a list of layers, or a function of a symbolic tensor that "
                    f"returns another one, not {shown(layers)}."
                )
            hidden = copy.deepcopy(list(layers))
            if hidden and type(hidden[-1]) is layers_.Dense:
                warn(
                    f"{type(self).__name__}: layers ends with {hidden[-1]!r}, and fit adds the output layer, "
                    f"{output!r}, after it. Leave out the last one given, or put an activation after it."
                )
        else:
            given = self.hidden_layer_sizes
            if any(isinstance(n, layers_.Layer) for n in (given if isinstance(given, list | tuple) else [given])):
                raise ArgumentTypeError(
                    f"{type(self).__name__}: hidden_layer_sizes must be numbers of units, not {shown(given)}. Give "
                    "hidden layers as layers=[...], without the output layer, which fit adds."
                )
            sizes = [integer(self, "hidden_layer_sizes", n) for n in numpy.atleast_1d(given).tolist()]
            hidden = [layer for n in sizes for layer in (layers_.Dense(n), self._new_activation())]
        self.model_ = Sequential([*hidden, output], (features,), self.backend, seed=seed, dtype=dtype)

    def _new_activation(self) -> layers_.Layer:
        if isinstance(self.activation, layers_.Layer):
            return copy.deepcopy(self.activation)
        return _ACTIVATIONS[choice(self, "activation", self.activation, list(_ACTIVATIONS), also="a layer")]()

    def _split(self, y: Array) -> tuple[Array, Array]:
        """The samples for training and those for early stopping."""
        train, rest = train_test_split(
            numpy.arange(len(y)), test_size=self.validation_fraction, random_state=self.model_.seed,
            stratify=self._strata(y),
        )  # fmt: skip
        if len(rest) < 2:
            raise ArgumentError(
                f"{type(self).__name__}: The validation set is too small, {len(rest)} of {len(y)} samples. Increase "
                "'validation_fraction' or the size of your dataset."
            )
        return train, rest

    def _train(self, X: Any, y: Array, weights: Array | None, epochs: int, progress: "_Progress") -> None:
        samples = X.shape[0]
        data: dict[str, Any]
        if issparse(X) and samples * X.shape[1] * X.dtype.itemsize > _MAX_DENSE_BYTES:
            data = {"x": Stream(X, self._encode(y), weights)}
        else:
            data = {"x": self._dense(X), "y": self._encode(y), "sample_weight": weights}
        penalized = self._penalized()
        for parameter in penalized:
            parameter.shared_l2 = 0.5 * self.alpha
        try:
            self.model_.fit(
                **data,
                loss=self._loss(),
                optimizer=self._optimizer(),
                epochs=epochs,
                batch_size=min(200 if self.batch_size == "auto" else int(self.batch_size), samples),
                shuffle=self.shuffle,
                metrics=[],
                callbacks=[progress],
                verbose=0,
            )
        finally:
            for parameter in penalized:
                parameter.shared_l2 = 0.0

    def _penalized(self) -> list[Parameter]:
        """The parameters to which the penalty `alpha` applies: as in scikit-learn, no biases."""
        chosen = self._chosen_optimizer()
        if not isinstance(chosen, str) or isinstance(optimizers.get(chosen), optimizers.AdamW):
            return []
        return [parameter for parameter in self.model_.parameters if parameter.decay]

    # Prediction ------------------------------------------------------------------------------------------------------

    def _checked_outputs(self, X: Any) -> Array:
        check_is_fitted(self, "model_")
        refuse_masked(X, "X")
        X = validate_data(self, X, reset=False, accept_sparse="csr", dtype=[numpy.float64, numpy.float32])
        outputs = self._outputs(X)
        if numpy.isnan(outputs).any():  # argmax would choose a class
            raise DataError("the outputs for some samples of X are NaN, because its values are too large: scale them.")
        return outputs

    def _outputs(self, X: Any) -> Array:
        """The outputs of the network, (samples, outputs). A sparse X is made dense in parts."""
        if not issparse(X):
            outputs: Array = self.model_.predict(self._dense(X))
            return outputs
        starts = range(0, X.shape[0], _PREDICTION_ROWS)
        parts = [self.model_.predict(self._dense(X[i : i + _PREDICTION_ROWS])) for i in starts]
        return numpy.concatenate(parts)

    def _dense(self, X: Any) -> Array:
        return numpy.asarray(X.toarray() if issparse(X) else X, dtype=self.model_.dtype)


class XPClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """A classifier with the interface of scikit-learn's MLPClassifier. Labels may have any type.

    Several classes are trained with softmax cross-entropy; two classes, with one output and binary cross-entropy. If y
    is an indicator matrix (samples, labels) of 0 and 1, dense or sparse, each label has an output of its own, trained
    with binary cross-entropy.

    hidden_layer_sizes: the units of each hidden Dense layer.  activation: "relu", "tanh", "logistic", "identity",
    "leaky_relu", "elu", "gelu", "silu", "softplus", or a layer.
    layers: hidden layers of xpnet, which replace those two arguments; fit trains a copy and adds the output layer. Or a
    function of a symbolic tensor, X, that calls new layers and returns a tensor, as for `xpnet.Model`.
    solver or optimizer: a name such as "adam" or "sgd", used with the arguments that follow here; or an xpnet
    optimizer, to which they do not apply.
    learning_rate or learning_rate_init: the initial learning rate.  learning_rate_schedule: for "sgd" only: "constant";
    "invscaling", which after each epoch sets the rate to the initial one / (samples seen + 1)^power_t; or "adaptive",
    which divides the rate by 5 instead of stopping, until it is below 1e-6. As in MLPClassifier, `learning_rate` also
    takes these three names.
    momentum, nesterovs_momentum: for "sgd".  beta_1, beta_2, epsilon: for "adam" and "adamw".
    alpha: the L2 penalty: ½ alpha Σw² / (samples of the batch, or the sum of their weights), over all weights but the
    biases, is added to the loss of a batch. For "adamw" it is the weight decay instead.
    batch_size: samples per step; "auto" is 200, or the number of samples if there are fewer.
    shuffle: whether to draw a new order of the samples for every epoch.
    max_iter: the maximum number of epochs. Training stops earlier if the loss has not been below the lowest one minus
    `tol` for more than `n_iter_no_change` epochs.  early_stopping: monitor the score (accuracy; XPRegressor: R²) on a
    held-out `validation_fraction` instead, and restore the weights of the best epoch.
    class_weight: {label: weight}, "balanced" for samples / (classes · samples of the class), or None. For an indicator
    matrix: one dict per label, or "balanced". It applies to the loss, not to the score.
    warm_start: whether fit continues with the network of the previous fit.
    backend: "auto", "cpu", "gpu": see `xpnet.get_backend`. float32 inputs are trained in float32, others in float64.
    random_state: determines the initial weights, the order of the samples and which of them are held out.
    verbose: whether to print the loss, and the score, of every epoch.

    A sparse X that would take more than 256 MiB as a dense array is made dense in parts. Its samples are then shuffled
    as in `datasets.Stream`.

    Invalid arguments raise ArgumentError in fit. Attributes after fitting: `classes_`, `model_`, `n_iter_` (the epochs
    of the last fit, and of partial_fit since), `t_` (the training samples seen), `loss_`, `loss_curve_`, `best_loss_`
    (None with early stopping), `validation_scores_`, `best_validation_score_` (None without), `coefs_`, `intercepts_`,
    `n_layers_`, `n_outputs_`, `out_activation_`, `n_features_in_` and, if the columns of X have names,
    `feature_names_in_`. `coefs_` and `intercepts_` are read-only copies; with `layers`, they exist if all layers with
    parameters are Dense.
    """

    classes_: Array
    _multilabel: bool
    _sparse_labels: bool

    @explain_arguments
    def __init__(
        self,
        hidden_layer_sizes: int | Sequence[int] = (100,),
        activation: str | layers_.Layer = "relu",
        *,
        layers: Iterable[layers_.Layer] | Callable[[Tensor], Tensor] | None = None,
        optimizer: Any = "adam",
        solver: Any = None,
        learning_rate: Any = _RATE,
        learning_rate_init: float | None = None,
        learning_rate_schedule: str = "constant",
        power_t: float = 0.5,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        shuffle: bool = True,
        max_iter: int = 200,
        tol: float = 1e-4,
        n_iter_no_change: float = 10,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        class_weight: Mapping[Any, float] | Sequence[Mapping[Any, float]] | str | None = None,
        warm_start: bool = False,
        backend: Any = "auto",
        random_state: Any = None,
        verbose: bool | int = False,
    ) -> None:
        super().__init__(
            hidden_layer_sizes, activation, layers=layers, optimizer=optimizer, solver=solver,
            learning_rate=learning_rate, learning_rate_init=learning_rate_init,
            learning_rate_schedule=learning_rate_schedule, power_t=power_t, momentum=momentum,
            nesterovs_momentum=nesterovs_momentum, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, alpha=alpha,
            batch_size=batch_size, shuffle=shuffle, max_iter=max_iter, tol=tol, n_iter_no_change=n_iter_no_change,
            early_stopping=early_stopping, validation_fraction=validation_fraction, warm_start=warm_start,
            backend=backend, random_state=random_state, verbose=verbose,
        )  # fmt: skip
        self.class_weight = class_weight

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Train for one epoch on X, y and `sample_weight`, as in `fit`. Returns the estimator.

        classes: all class labels. The first call needs them, unless its y contains all of them.
        """
        if isinstance(self.class_weight, str):
            raise ArgumentError(
                f"{type(self).__name__}: partial_fit does not support class_weight={self.class_weight!r}, because it "
                "sees only part of the samples: give {label: weight}."
            )
        return self._partial_fit(X, y, sample_weight, classes)

    def predict(self, X: Any) -> Any:
        """The most probable class of each sample, (samples,).

        After training on an indicator matrix: the labels with a probability above ½, as an indicator matrix (samples,
        labels), which is sparse if that of fit was.
        """
        predicted = self._decide(self._checked_outputs(X))
        return csr_matrix(predicted) if self._sparse_labels else predicted

    def predict_proba(self, X: Any) -> Array:
        """The probability of each class or label, (samples, classes), in the order of `classes_`."""
        return self._per_class(softmax, self._checked_outputs(X))

    def predict_log_proba(self, X: Any) -> Array:
        """The logarithm of `predict_proba`, (samples, classes), finite even if the probability is rounded to 0."""
        return self._per_class(log_softmax, self._checked_outputs(X))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def _per_class(self, function: Any, z: Array) -> Array:
        """`function`, softmax or its logarithm, of the logits z. A sigmoid is a softmax of the logits 0 and z."""
        values: Array
        if self._multilabel:
            values = function(numpy.stack([numpy.zeros_like(z), z], axis=-1), axis=-1)[..., 1]
        elif len(self.classes_) == 2:
            values = function(numpy.concatenate([numpy.zeros_like(z), z], axis=1), axis=1)
        else:
            values = function(z, axis=1)  # for a single class: probability 1
        return values

    def _decide(self, outputs: Array) -> Array:
        if self._multilabel:
            return (outputs > 0).astype(int)
        if self.n_outputs_ > 1:
            index = outputs.argmax(axis=1)
        else:
            index = (outputs[:, 0] > 0).astype(int) if len(self.classes_) > 1 else numpy.zeros(len(outputs), int)
        predicted: Array = self.classes_[index]
        return predicted

    def _begin(
        self, X: Any, y: Any, sample_weight: Any, continuing: bool, classes: Any = None
    ) -> tuple[Any, Array, Array | None]:
        checked = super()._begin(X, y, sample_weight, continuing, classes)
        self._sparse_labels = issparse(y)  # refused targets leave it unchanged
        return checked

    def _validate(self, X: Any, y: Any, sample_weight: Any, reset: bool) -> tuple[Any, Array, Array | None]:
        X, y, weights = super()._validate(X, y, sample_weight, reset)
        check_classification_targets(y)
        if y.ndim == 1 or y.shape[1] == 1:
            return X, column_or_1d(y, warn=True), weights
        if type_of_target(y) != "multilabel-indicator" or not numpy.isin(y, (0, 1)).all():
            raise ArgumentError(
                "y must have one label per sample, or be an indicator matrix of 0 and 1. For several targets of "
                "several classes, use sklearn.multioutput.MultiOutputClassifier."
            )
        return X, y.astype(int), weights

    def _set_targets(self, y: Array, continuing: bool, classes: Any = None) -> None:
        multilabel = y.ndim == 2
        given = None if classes is None else numpy.unique(classes)
        if continuing and multilabel != self._multilabel:
            raise ArgumentError("y must be an indicator matrix, or one label per sample, as in the first call.")
        if continuing and given is not None and not numpy.array_equal(given, self.classes_):
            raise ArgumentError(f"classes must be those of the first call, {self.classes_}, not {given}.")
        present = numpy.arange(y.shape[1]) if multilabel else numpy.unique(y)
        known = self.classes_ if continuing else present if given is None else given
        unknown = numpy.setdiff1d(present, known)
        if len(unknown):
            raise ArgumentError(f"y has the unknown classes {unknown}. The known classes are {known}.")
        if multilabel and len(present) != len(known):
            raise ArgumentError(f"y must have a column for each of the {len(known)} labels, but has {len(present)}.")
        self.classes_, self._multilabel = known, multilabel
        self.n_outputs_ = len(known) if multilabel or len(known) > 2 else 1
        self.out_activation_ = "softmax" if len(known) > 2 and not multilabel else "logistic"

    def _loss(self) -> losses.Loss:
        return losses.SoftmaxCrossEntropy() if self.out_activation_ == "softmax" else _SummedBinaryCrossEntropy()

    def _encode(self, y: Array) -> Array:
        return y if self._multilabel else numpy.searchsorted(self.classes_, y)

    def _score(self, y: Array, predicted: Array, weights: Array | None) -> float:
        return float(accuracy_score(y, predicted, sample_weight=weights))

    def _effective_weights(self, y: Array, weights: Array | None) -> Array | None:
        given = self.class_weight
        if given is None:
            return weights
        by_class: Array
        if self._multilabel or not isinstance(given, Mapping):
            by_class = compute_sample_weight(given, y)
        else:
            classes = self.classes_.tolist()
            unknown = [label for label in given if label not in classes]
            # As in scikit-learn, a dict that names all classes of y may name others too: y may be part of the data.
            if unknown and not all(label in given for label in classes):
                raise ArgumentError(
                    f"{type(self).__name__}: class_weight names {unknown}, but the classes are {classes}."
                )
            table = [given.get(label, 1.0) for label in classes]
            by_class = numpy.asarray(table, dtype=numpy.float64)[self._encode(y)]
        return by_class if weights is None else weights * by_class

    def _strata(self, y: Array) -> Array | None:
        if self._multilabel:
            return None
        counts = numpy.unique(y, return_counts=True)[1]
        enough = counts.min() >= 2 and len(counts) <= int(self.validation_fraction * len(y))
        return y if enough else None


class XPRegressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """A regressor of one or several outputs with the interface of scikit-learn's MLPRegressor.

    It minimizes ½ Σ (y - target)² over the outputs; `loss_` is the mean over the outputs instead, as in MLPRegressor.
    Arguments and attributes are those of XPClassifier, without `class_weight` and `classes_`.
    """

    _single_output: bool

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train for one epoch on X, y and `sample_weight`, as in `fit`. Returns the estimator."""
        return self._partial_fit(X, y, sample_weight)

    def predict(self, X: Any) -> Array:
        """The predicted values, (samples,) or (samples, outputs) like y."""
        return self._decide(self._checked_outputs(X))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _decide(self, outputs: Array) -> Array:
        return outputs[:, 0] if self._single_output else outputs

    def _validate(self, X: Any, y: Any, sample_weight: Any, reset: bool) -> tuple[Any, Array, Array | None]:
        X, y, weights = super()._validate(X, y, sample_weight, reset)
        if y.dtype.kind not in "fiub":
            y = y.astype(numpy.float64)
        return X, y, weights

    def _set_targets(self, y: Array, continuing: bool, classes: Any = None) -> None:
        outputs = 1 if y.ndim == 1 else y.shape[1]
        if continuing and outputs != self.n_outputs_:
            raise ArgumentError(f"y must have {self.n_outputs_} outputs per sample, as before, not {outputs}.")
        self._single_output, self.n_outputs_, self.out_activation_ = y.ndim == 1, outputs, "identity"

    def _loss(self) -> losses.Loss:
        return _HalfSquaredError()

    def _encode(self, y: Array) -> Array:
        return y.reshape(len(y), self.n_outputs_)

    def _score(self, y: Array, predicted: Array, weights: Array | None) -> float:
        return float(r2_score(y, predicted, sample_weight=weights))


class _Progress(Callback):
    """Updates the attributes of an estimator after each epoch, and applies the stopping rule of scikit-learn's MLPs.

    schedule: of the learning rate, see `_schedule`.  held_out: (X, y, weights) of early stopping: the rule monitors
    their score instead of the loss.  converged: whether the rule has stopped the training.
    """

    def __init__(self, estimator: _Estimator, schedule: str, held_out: tuple[Any, Array, Any] | None = None):
        self.estimator, self.schedule, self.held_out, self.converged = estimator, schedule, held_out, False
        self._best: Snapshot | None = None

    def on_train_begin(self, model: Any) -> None:
        if self.estimator.n_iter_ == 0 and self.schedule != "constant":
            self._scale_rate(1.0)
        if self.held_out is not None:
            self._best = Snapshot(model.context.store)

    def on_epoch_end(self, model: Any, epoch: int, logs: dict[str, Any]) -> None:
        own, state = self.estimator, self.run.state
        own.n_iter_ += 1
        own.t_ += self.run.samples or 0
        own.loss_ = logs["loss"]
        own.loss_curve_.append(own.loss_)
        self._print(f"Iteration {own.n_iter_}, loss = {own.loss_:.8f}")
        own._no_improvement_count = 0 if self._improved() else own._no_improvement_count + 1
        if self.schedule == "invscaling":
            self._scale_rate((own.t_ + 1.0) ** -own.power_t)
        if own._no_improvement_count <= own.n_iter_no_change:
            return
        if self.schedule == "adaptive" and state.learning_rate > _SMALLEST_RATE:
            self._scale_rate(state.rate_factor / 5.0)
            own._no_improvement_count = 0
            self._print(f"The learning rate is reduced to {state.learning_rate:.6g}.")
        else:
            self.converged = True
            what = "loss" if self.held_out is None else "validation score"
            self._print(f"The {what} has not improved by tol={own.tol:g} for {own.n_iter_no_change} epochs: stopping.")
            self.stop("converged")

    def on_train_end(self, model: Any) -> None:
        if self._best is not None and self.run.history.stopped != "diverged":
            self._best.restore()

    def _scale_rate(self, factor: float) -> None:
        """Set the learning rate to SGD's initial rate times this factor, from the next step on."""
        state = self.run.state
        for velocity in state.optimizer_state.slots.values():
            velocity *= state.rate_factor / factor  # keeps rate · v, which is scikit-learn's velocity
        state.rate_factor = factor

    def _improved(self) -> bool:
        """Whether the loss or the score of this epoch is better, by `tol`, than the best one before it."""
        own = self.estimator
        if self.held_out is None:
            before = math.inf if own.best_loss_ is None else own.best_loss_
            own.best_loss_ = min(before, own.loss_)
            return own.loss_ <= before - own.tol
        X, y, weights = self.held_out
        predicted = own._outputs(X)
        finite = bool(numpy.isfinite(predicted).all())
        score = own._score(y, own._decide(predicted), weights) if finite else math.nan
        assert own.validation_scores_ is not None
        assert own.best_validation_score_ is not None
        assert self._best is not None
        own.validation_scores_.append(score)
        self._print(f"Validation score: {score:f}")
        before = own.best_validation_score_
        if score > before:
            own.best_validation_score_ = score
            self._best.take()
        return score >= before + own.tol

    def _print(self, text: str) -> None:
        if self.estimator.verbose:
            print(text)


class _HalfSquaredError(losses.HalfSquaredError):
    """HalfSquaredError with its value, but not its gradient, divided by the number of outputs, as in scikit-learn."""

    def samples(self, backend: Backend, outputs: DeviceArray, targets: DeviceArray) -> DeviceArray:
        return super().samples(backend, outputs, targets) * (1.0 / outputs.shape[-1])


class _SummedBinaryCrossEntropy(losses.BinaryCrossEntropy):
    """BinaryCrossEntropy, summed over the logits of a sample instead of averaged."""

    def samples(self, backend: Backend, outputs: DeviceArray, targets: DeviceArray) -> DeviceArray:
        return super().samples(backend, outputs, targets) * float(outputs.shape[-1])

    def gradient(self, backend: Backend, outputs: DeviceArray, targets: DeviceArray) -> DeviceArray:
        """∂ℓ/∂z = σ(z) - t."""
        grad = super().gradient(backend, outputs, targets)
        grad *= float(outputs.shape[-1])
        return grad


def _on_host(parameter: Parameter) -> Array:
    """A read-only copy: writing to it would not change the network."""
    array = numpy.array(parameter._backend.to_numpy(parameter.value))  # type: ignore[union-attr]
    array.flags.writeable = False
    return array
