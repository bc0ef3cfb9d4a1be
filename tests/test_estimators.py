"""Estimators: scikit-learn's estimator checks, pipelines and grid searches."""

import pickle
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from scipy import sparse  # noqa: E402
from sklearn.base import clone  # noqa: E402
from sklearn.datasets import (  # noqa: E402
    load_digits,
    make_classification,
    make_multilabel_classification,
    make_regression,
)
from sklearn.exceptions import ConvergenceWarning, NotFittedError  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.neural_network import MLPClassifier, MLPRegressor  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.class_weight import compute_sample_weight  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from xpnet import Input, Model, estimators, layers, optimizers  # noqa: E402
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, DivergenceError  # noqa: E402
from xpnet.estimators import XPClassifier, XPRegressor  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning"),
    # Some of the estimator checks cause deprecation warnings themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sklearn"),
]

X, Y = make_classification(200, 8, n_informative=5, n_classes=3, random_state=0)
NAMES = np.array(["ant", "bee", "cow"])[Y]
LABELS = make_multilabel_classification(200, 8, n_classes=4, random_state=0)


@parametrize_with_checks(
    [
        XPClassifier(backend="cpu"),
        XPClassifier((8, 8), "tanh", optimizer="sgd", learning_rate=0.1, backend="cpu"),
        XPClassifier(layers=[layers.Dense(16), layers.ELU()], optimizer=optimizers.Adam(0.01), backend="cpu"),
        XPRegressor(backend="cpu"),
        XPRegressor((20,), "logistic", optimizer=optimizers.Adam(0.01), backend="cpu"),
        XPClassifier(solver="sgd", learning_rate="adaptive", learning_rate_init=0.1, backend="cpu"),
    ]
)
def test_estimators_pass_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("labels", [NAMES, Y == 1, Y * 10 - 7, Y.astype(float), NAMES.astype(object)])
def test_labels_may_have_any_type(labels):
    classifier = XPClassifier(random_state=0, learning_rate=0.01, backend="cpu").fit(X, labels)
    assert set(classifier.predict(X)) <= set(labels) and classifier.score(X, labels) > 0.9
    proba = classifier.predict_proba(X)
    assert proba.shape == (200, len(set(labels)))
    np.testing.assert_allclose(proba.sum(axis=1), 1.0)
    np.testing.assert_array_equal(classifier.classes_[proba.argmax(axis=1)], classifier.predict(X))
    np.testing.assert_allclose(classifier.predict_log_proba(X), np.log(proba), atol=1e-15)


def test_regressors_take_several_outputs():
    x, y = make_regression(150, 5, n_targets=3, random_state=0)
    y /= y.std(axis=0)
    regressor = XPRegressor(learning_rate=0.02, random_state=0, backend="cpu").fit(x, y)
    assert regressor.predict(x).shape == (150, 3) and regressor.score(x, y) > 0.95
    assert regressor.fit(x, y[:, 0]).predict(x).shape == (150,)


def test_the_dtype_of_the_inputs_is_kept():
    for dtype in ("float32", "float64"):
        classifier = XPClassifier(max_iter=2, backend="cpu").fit(X.astype(dtype), Y)
        assert classifier.model_.dtype == classifier.predict_proba(X.astype(dtype)).dtype == dtype


def test_equal_random_states_give_equal_results():
    one, two, other = (XPClassifier(max_iter=5, random_state=s, backend="cpu").fit(X, Y) for s in (3, 3, 4))
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))
    assert (one.predict_proba(X) != other.predict_proba(X)).any()
    XPClassifier(max_iter=1, random_state=np.random.RandomState(0), backend="cpu").fit(X, Y)


def test_early_stopping_stops_before_max_iter():
    settings = {"early_stopping": True, "learning_rate": 0.02, "random_state": 0, "backend": "cpu"}
    classifier = XPClassifier(**settings).fit(X, NAMES)
    assert classifier.n_iter_ < 200 and classifier.score(X, NAMES) > 0.8
    assert XPRegressor(**settings).fit(X, Y, sample_weight=np.ones(200)).n_iter_ < 200


def test_early_stopping_accepts_rare_classes():
    few = [0, 1, 2, *range(10, 20)]
    classifier = XPClassifier(early_stopping=True, max_iter=3, backend="cpu").fit(X[few], NAMES[few])
    assert classifier.n_iter_ == 3 and set(classifier.classes_) == set(NAMES[few])


def test_training_that_has_not_converged_warns():
    with pytest.warns(ConvergenceWarning, match="was still improving after max_iter=2 epochs"):
        XPClassifier(max_iter=2, backend="cpu").fit(X, Y)


def test_training_stops_when_the_loss_stops_improving():
    classifier = XPClassifier(max_iter=5000, learning_rate=0.05, random_state=0, backend="cpu").fit(X, Y)
    assert classifier.n_iter_ == len(classifier.loss_curve_) < 5000 and classifier.loss_ == classifier.loss_curve_[-1]


def test_warm_start_continues_with_the_same_model():
    warm = XPClassifier(max_iter=3, warm_start=True, random_state=0, backend="cpu")
    model = warm.fit(X, Y).model_
    assert warm.fit(X, Y).model_ is model and warm.n_iter_ == 3 and len(warm.loss_curve_) == 6 and warm.t_ == 1200
    with pytest.raises(ArgumentError, match=r"y has the unknown classes \[3\]"):
        warm.fit(X, Y + 1)
    cold = XPClassifier(max_iter=3, random_state=0, backend="cpu").fit(X, Y)
    assert cold.fit(X, Y + 1).n_iter_ == 3 and cold.classes_.tolist() == [1, 2, 3]


def test_partial_fit_trains_for_one_epoch():
    classifier = XPClassifier(random_state=0, learning_rate=0.01, backend="cpu")
    with pytest.raises(ArgumentError, match=r"y has the unknown classes \['cow'\]"):
        classifier.partial_fit(X, NAMES, classes=["ant", "bee"])
    for part in np.array_split(np.arange(200), 4) * 10:
        classifier.partial_fit(X[part], NAMES[part], classes=["ant", "bee", "cow"])
    assert classifier.n_iter_ == 40 and classifier.score(X, NAMES) > 0.8
    with pytest.raises(ArgumentError, match="classes must be those of the first call"):
        classifier.partial_fit(X, NAMES, classes=["ant"])
    regressor = XPRegressor(backend="cpu").partial_fit(X, Y).partial_fit(X, Y)
    assert regressor.n_iter_ == 2
    with pytest.raises(ArgumentError, match="must have 1 outputs per sample, as before, not 2"):
        regressor.partial_fit(X, np.column_stack([Y, Y]))


def test_class_weights_favor_the_weighted_class():
    rare = XPClassifier(max_iter=20, random_state=0, class_weight={0: 100.0, 1: 1.0, 2: 1.0}, backend="cpu").fit(X, Y)
    plain = XPClassifier(max_iter=20, random_state=0, backend="cpu").fit(X, Y)
    assert (rare.predict(X) == 0).sum() > (plain.predict(X) == 0).sum()
    XPClassifier(max_iter=2, class_weight="balanced", backend="cpu").fit(X, NAMES, sample_weight=np.ones(200))


# scikit-learn's MLPs ----------------------------------------------------------------------------------------------


def initialized_like(own, mlp, X, y, **changes):
    """Both fitted in one epoch without effect, so that a warm start begins with the initial weights of `mlp`."""
    for estimator in (own, mlp):
        estimator.set_params(max_iter=1, learning_rate_init=1e-30, warm_start=True).fit(X, y)
        estimator.t_, estimator.loss_curve_, estimator._no_improvement_count = 0, [], 0
        if not estimator.early_stopping:
            estimator.best_loss_ = np.inf
        estimator.set_params(**changes)
    dense = [layer for layer in own.model_.layers if layer.parameters]
    for layer, weight, bias in zip(dense, mlp.coefs_, mlp.intercepts_, strict=True):
        layer.weight.value, layer.bias.value = weight, bias


TARGETS = {
    "classes": (XPClassifier, MLPClassifier, NAMES),
    "two classes": (XPClassifier, MLPClassifier, Y == 1),
    "labels": (XPClassifier, MLPClassifier, LABELS[1]),
    "numbers": (XPRegressor, MLPRegressor, X[:, 0] - X[:, 1] ** 2),
    "several numbers": (XPRegressor, MLPRegressor, X[:, :3] ** 2),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "sgd", "learning_rate_init": 0.01, "momentum": 0.0},
        {"solver": "sgd", "learning_rate_init": 0.01, "momentum": 0.8, "nesterovs_momentum": False},
        {"solver": "sgd", "learning_rate_init": 0.05, "learning_rate": "invscaling", "power_t": 0.1},
        {"solver": "sgd", "learning_rate_init": 0.01, "learning_rate": "adaptive", "tol": 0.1, "n_iter_no_change": 1},
        {"solver": "adam", "learning_rate_init": 0.01, "beta_1": 0.8, "beta_2": 0.99, "epsilon": 1e-15},
        {"solver": "adam", "activation": "tanh", "hidden_layer_sizes": (7, 5), "epsilon": 1e-15, "tol": 0.05,
         "n_iter_no_change": 2, "learning_rate_init": 0.001},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)  # fmt: skip
@pytest.mark.parametrize("weighted", [False, True])
def test_training_equals_that_of_the_mlps_of_scikit_learn(target, settings, weighted):
    """From the same weights, in the same order of samples, with a strong penalty and a smaller last batch."""
    own_kind, mlp_kind, y = TARGETS[target]
    common = {"hidden_layer_sizes": (6,), "alpha": 3.0, "batch_size": 60, "shuffle": False, "random_state": 0}
    own, mlp = own_kind(**common | settings, backend="cpu"), mlp_kind(**common | settings)
    rate = settings["learning_rate_init"]
    initialized_like(own, mlp, X, y, max_iter=15, learning_rate_init=rate)
    weights = np.random.default_rng(0).integers(1, 4, 200).astype(float) if weighted else None
    for estimator in (own, mlp):
        estimator.fit(X, y, sample_weight=weights)
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if settings["solver"] == "adam" else {"rtol": 1e-9, "atol": 1e-12}
    for a, b in zip(own.coefs_ + own.intercepts_, mlp.coefs_ + mlp.intercepts_, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)
    if not weighted:  # with weights, loss_ of scikit-learn is a mean of the batches' means
        np.testing.assert_allclose(own.loss_curve_, mlp.loss_curve_, rtol=1e-6)
        assert (own.loss_, own.best_loss_) == pytest.approx((mlp.loss_, mlp.best_loss_), rel=1e-6)
        assert own.n_iter_ == mlp.n_iter_
    for name in ("t_", "n_layers_", "n_outputs_", "out_activation_", "n_features_in_"):
        assert getattr(own, name) == getattr(mlp, name), name
    np.testing.assert_allclose(own.predict(X) if own_kind is XPRegressor else own.predict_proba(X),
                               mlp.predict(X) if own_kind is XPRegressor else mlp.predict_proba(X),
                               rtol=1e-5, atol=1e-7)  # fmt: skip
    if own_kind is XPClassifier:
        np.testing.assert_array_equal(own.predict(X), mlp.predict(X))
        np.testing.assert_array_equal(own.classes_, mlp.classes_)


def test_the_penalty_is_divided_by_the_samples_of_the_batch():
    """One SGD step on zero inputs: the weights get only the gradient of the penalty, alpha · w / samples."""
    zeros = np.zeros((150, 3))
    for weights, samples in ((None, 150), (np.full(150, 0.25), 37.5)):
        settings = {"solver": "sgd", "momentum": 0, "alpha": 6.0, "max_iter": 1, "random_state": 0, "backend": "cpu"}
        step = XPRegressor((4,), learning_rate_init=1e-30, warm_start=True, **settings).fit(zeros, zeros[:, 0])
        before = step.coefs_
        step.set_params(learning_rate_init=0.5).fit(zeros, zeros[:, 0], sample_weight=weights)
        for old, new in zip(before, step.coefs_, strict=True):
            np.testing.assert_allclose(new, old * (1 - 0.5 * 6.0 / samples), rtol=1e-12)
        penalty = 0.5 * 6.0 * sum((weight**2).sum() for weight in before) / samples
        assert step.loss_ == pytest.approx(penalty, rel=1e-12)
        assert step.model_.evaluate(zeros, zeros[:, :1], loss="mse")["loss"] == 0.0  # the penalty ends with fit


def test_alpha_does_not_penalize_the_loss_of_an_optimizer_object():
    kinds = [XPRegressor(optimizer=optimizers.SGD(0.01), alpha=a, max_iter=2, random_state=0, backend="cpu")
             for a in (0.0, 100.0)]  # fmt: skip
    a, b = (kind.fit(X, Y).coefs_[0] for kind in kinds)
    np.testing.assert_array_equal(a, b)
    decayed = XPRegressor(solver="adamw", alpha=5.0, max_iter=20, random_state=0, backend="cpu").fit(X, Y)
    plain = XPRegressor(solver="adamw", alpha=0.0, max_iter=20, random_state=0, backend="cpu").fit(X, Y)
    assert np.abs(decayed.coefs_[0]).sum() < 0.95 * np.abs(plain.coefs_[0]).sum()


def test_the_names_of_scikit_learn_mean_the_same_as_ours():
    settings = {"max_iter": 3, "random_state": 0, "backend": "cpu"}
    ours = XPClassifier(optimizer="sgd", learning_rate=0.1, learning_rate_schedule="invscaling", **settings)
    theirs = XPClassifier(solver="sgd", learning_rate_init=0.1, learning_rate="invscaling", **settings)
    np.testing.assert_array_equal(ours.fit(X, Y).coefs_[0], theirs.fit(X, Y).coefs_[0])
    assert set(MLPClassifier().get_params()) - {"max_fun"} <= set(XPClassifier().get_params())
    assert set(MLPRegressor().get_params()) - {"max_fun", "loss"} <= set(XPRegressor().get_params())


@pytest.mark.parametrize("activation", [*estimators._ACTIVATIONS, layers.LeakyReLU(0.3)])
def test_activations_have_names_or_are_layers(activation):
    classifier = XPClassifier((8, 8), activation, learning_rate=0.02, random_state=0, backend="cpu").fit(X, Y)
    assert classifier.score(X, Y) > (0.6 if activation == "identity" else 0.75)
    kinds = {type(layer) for layer in classifier.model_.layers} - {layers.Dense}
    assert len(kinds) == 1
    assert not isinstance(activation, layers.Layer) or not activation.is_built


def test_attributes_have_the_types_of_those_of_scikit_learn():
    classifier = XPClassifier((6, 5), max_iter=4, random_state=0, backend="cpu").fit(X.astype("float32"), NAMES)
    assert [w.shape for w in classifier.coefs_] == [(8, 6), (6, 5), (5, 3)]
    assert [b.shape for b in classifier.intercepts_] == [(6,), (5,), (3,)]
    assert all(type(a) is np.ndarray and a.dtype == "float32" for a in classifier.coefs_ + classifier.intercepts_)
    assert (classifier.n_layers_, classifier.n_outputs_, classifier.out_activation_) == (4, 3, "softmax")
    assert (classifier.n_iter_, classifier.t_, len(classifier.loss_curve_)) == (4, 800, 4)
    assert classifier.best_loss_ == min(classifier.loss_curve_)
    assert classifier.validation_scores_ is None and classifier.best_validation_score_ is None
    x = np.maximum(X @ classifier.coefs_[0] + classifier.intercepts_[0], 0)
    x = np.maximum(x @ classifier.coefs_[1] + classifier.intercepts_[1], 0)
    logits = x @ classifier.coefs_[2] + classifier.intercepts_[2]
    np.testing.assert_array_equal(classifier.predict(X), classifier.classes_[logits.argmax(axis=1)])
    with pytest.raises(ValueError, match="read-only"):
        classifier.coefs_[0][0, 0] = 1.0
    assert not hasattr(XPClassifier(), "coefs_")


def test_layers_other_than_dense_have_no_coefs():
    plain = XPClassifier(layers=[layers.Dense(4, use_bias=False), layers.ELU()], max_iter=2, backend="cpu").fit(X, Y)
    assert [w.shape for w in plain.coefs_] == [(8, 4), (4, 3)] and plain.n_layers_ == 3
    np.testing.assert_array_equal(plain.intercepts_[0], np.zeros(4))
    other = XPClassifier(layers=[layers.Dense(4), layers.LayerNorm()], max_iter=2, backend="cpu").fit(X, Y)
    for name in ("coefs_", "intercepts_", "n_layers_"):
        with pytest.raises(AttributeError, match=f"XPClassifier has no {name}, because the parameters of LayerNorm"):
            getattr(other, name)
    assert other.n_outputs_ == 3 and pickle.loads(pickle.dumps(other)).n_outputs_ == 3


# Probabilities and labels -----------------------------------------------------------------------------------------


def with_logits(classifier, logits):
    """The classifier, changed so that its outputs for any sample are these."""
    dense = classifier.model_.layers[-1]
    dense.weight.value, dense.bias.value = 0.0, np.array(logits)
    return classifier


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logarithms_of_probabilities_are_finite(dtype):
    x = X.astype(dtype)
    three = XPClassifier(max_iter=1, backend="cpu").fit(x, NAMES)
    expected = [[-1000.0, 0.0, -1150.0]]
    np.testing.assert_allclose(with_logits(three, [0.0, 1000.0, -150.0]).predict_log_proba(x[:1]), expected)
    two = XPClassifier(max_iter=1, backend="cpu").fit(x, NAMES == "ant")
    np.testing.assert_allclose(with_logits(two, [1000.0]).predict_log_proba(x[:1]), [[-1000.0, 0.0]])
    np.testing.assert_allclose(with_logits(two, [-200.0]).predict_log_proba(x[:1]), [[0.0, -200.0]], atol=1e-30)
    np.testing.assert_allclose(with_logits(two, [0.5]).predict_log_proba(x[:1]), [[-0.974077, -0.474077]], rtol=1e-5)
    many = XPClassifier(max_iter=1, backend="cpu").fit(x, LABELS[1])
    expected = [[-1000.0, 0.0, -150.0, np.log(0.5)]]
    np.testing.assert_allclose(
        with_logits(many, [-1000.0, 1000.0, -150.0, 0.0]).predict_log_proba(x[:1]), expected, rtol=1e-6
    )
    for classifier in (three, two, many):
        log_proba = classifier.predict_log_proba(x)
        assert log_proba.dtype == classifier.predict_proba(x).dtype == dtype
        with np.errstate(divide="ignore"):
            finite = np.isfinite(np.log(classifier.predict_proba(x)))
        np.testing.assert_allclose(np.exp(log_proba)[finite], classifier.predict_proba(x)[finite], rtol=1e-4)


@pytest.mark.parametrize("as_y", [np.array, sparse.csr_matrix, sparse.csc_array, lambda y: y.astype(bool)])
def test_each_column_of_an_indicator_matrix_is_a_label(as_y):
    x, y = LABELS
    classifier = XPClassifier(learning_rate=0.01, random_state=0, max_iter=300, backend="cpu").fit(x, as_y(y))
    assert classifier.classes_.tolist() == [0, 1, 2, 3] and classifier.n_outputs_ == 4
    assert classifier.out_activation_ == "logistic"
    proba, predicted = classifier.predict_proba(x), classifier.predict(x)
    assert proba.shape == (200, 4) and (np.abs(proba.sum(axis=1) - 1) > 0.01).any()
    assert sparse.issparse(predicted) == sparse.issparse(as_y(y))
    dense = predicted.toarray() if sparse.issparse(predicted) else predicted
    np.testing.assert_array_equal(dense, proba > 0.5)
    assert (dense == y).mean() > 0.93 and classifier.score(x, as_y(y)) == (dense == y).all(axis=1).mean() > 0.8
    stopping = XPClassifier(early_stopping=True, max_iter=5, random_state=0, backend="cpu").fit(x, as_y(y))
    assert len(stopping.validation_scores_) == 5


def test_partial_fit_trains_on_indicator_matrices():
    x, y = make_multilabel_classification(50, random_state=0)
    classifier = XPClassifier((50,), "logistic", solver="sgd", alpha=1e-5, learning_rate_init=0.2, random_state=0,
                              backend="cpu")  # fmt: skip
    for _ in range(100):
        classifier.partial_fit(x, y, classes=[0, 1, 2, 3, 4])
    assert classifier.score(x, y) > 0.9
    with pytest.raises(ArgumentError, match="must be an indicator matrix, or one label per sample, as in the first"):
        classifier.partial_fit(x, y[:, 0])
    with pytest.raises(ArgumentError, match="a column for each of the 5 labels, but has 4"):
        classifier.partial_fit(x, y[:, :4])
    with pytest.raises(ArgumentError, match="a column for each of the 5 labels, but has 4"):
        classifier.partial_fit(x, sparse.csr_matrix(y[:, :4]))
    assert not sparse.issparse(classifier.predict(x))  # refused targets change nothing
    for other in (y[:, :2] * 2, y[:, :2] * 2 - 1, y[:, :2] + y[:, 1:3]):
        with pytest.raises(ArgumentError, match="MultiOutputClassifier"):
            classifier.fit(x, other)


def test_a_single_class_is_predicted_with_certainty():
    classifier = XPClassifier(max_iter=2, backend="cpu").fit(X, np.full(200, "ant"))
    assert set(classifier.predict(X)) == {"ant"}
    np.testing.assert_array_equal(classifier.predict_proba(X), np.ones((200, 1)))
    np.testing.assert_array_equal(classifier.predict_log_proba(X), np.zeros((200, 1)))


# Sparse inputs and weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", [sparse.csr_matrix, sparse.csc_matrix, sparse.coo_array, sparse.csr_array])
@pytest.mark.parametrize("kind", [XPClassifier, XPRegressor])
def test_sparse_inputs_give_the_results_of_dense_ones(container, kind):
    x = np.where(np.abs(X) < 1, 0.0, X)
    settings = {"max_iter": 5, "batch_size": 60, "early_stopping": True, "random_state": 0, "backend": "cpu"}
    weights = np.linspace(0.5, 2, 200)
    a = kind(**settings).fit(x, Y, sample_weight=weights)
    b = kind(**settings).fit(container(x), Y, sample_weight=weights)
    np.testing.assert_array_equal(a.coefs_[0], b.coefs_[0])
    np.testing.assert_array_equal(a.predict(x), b.predict(container(x)))
    assert b.score(container(x), Y) == a.score(x, Y)
    b.set_params(early_stopping=False).partial_fit(container(x), Y)


def test_large_sparse_inputs_are_made_dense_in_parts(monkeypatch):
    x = sparse.random(3000, 40, density=0.1, format="csr", random_state=0)
    y = (np.asarray(x.sum(axis=1)).ravel() > 2).astype(int)
    largest = 0
    dense = sparse.csr_matrix.toarray

    def counted(self, *args, **kwargs):
        nonlocal largest
        largest = max(largest, self.shape[0])
        return dense(self, *args, **kwargs)

    settings = {"max_iter": 40, "learning_rate": 0.01, "random_state": 0, "backend": "cpu"}
    whole = XPClassifier(shuffle=False, **settings).fit(x, y)
    monkeypatch.setattr(estimators, "_MAX_DENSE_BYTES", 1000)
    monkeypatch.setattr(sparse.csr_matrix, "toarray", counted)
    parts = XPClassifier(shuffle=False, **settings).fit(x, y)
    for a, b in zip(whole.coefs_, parts.coefs_, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    parts = XPClassifier(class_weight="balanced", **settings).fit(x, y)
    assert parts.score(x, y) > 0.9 and parts.t_ == 3000 * parts.n_iter_
    assert 0 < largest <= 1024


def test_class_weights_are_those_of_scikit_learn():
    rare = np.array(["a", "b", "c"])[np.repeat([0, 1, 2], [150, 40, 10])]
    settings = {"max_iter": 5, "random_state": 0, "batch_size": 50, "backend": "cpu"}
    counts = np.random.default_rng(0).integers(1, 3, 200).astype(float)
    for y in (rare, rare == "a", LABELS[1]):
        balanced = XPClassifier(class_weight="balanced", **settings).fit(X, y, sample_weight=counts)
        by_hand = XPClassifier(**settings).fit(X, y, sample_weight=counts * compute_sample_weight("balanced", y))
        np.testing.assert_allclose(balanced.coefs_[0], by_hand.coefs_[0], rtol=1e-12)
    by_label = XPClassifier(class_weight={"b": 3.0}, **settings).fit(X, rare)
    by_hand = XPClassifier(**settings).fit(X, rare, sample_weight=np.where(rare == "b", 3.0, 1.0))
    np.testing.assert_array_equal(by_label.coefs_[0], by_hand.coefs_[0])
    by_flag = XPClassifier(class_weight={True: 2.0, False: 1.0}, **settings).fit(X, rare == "a")
    by_hand = XPClassifier(**settings).fit(X, rare == "a", sample_weight=np.where(rare == "a", 2.0, 1.0))
    np.testing.assert_array_equal(by_flag.coefs_[0], by_hand.coefs_[0])
    XPClassifier(class_weight={"a": 1, "b": 2, "c": 3, "d": 4}, **settings).fit(X, rare)
    with pytest.raises(ArgumentError, match=r"class_weight names \['d'\], but the classes are \['a', 'b', 'c'\]"):
        XPClassifier(class_weight={"d": 4}, **settings).fit(X, rare)
    parted = XPClassifier(class_weight={"b": 3.0}, **settings).partial_fit(X[:5], rare[:5], classes=["a", "b", "c"])
    with pytest.raises(ArgumentError, match="partial_fit does not support class_weight='balanced'"):
        parted.set_params(class_weight="balanced").partial_fit(X, rare)


def test_scores_take_sample_weights():
    weights = np.linspace(0, 1, 200)
    classifier = XPClassifier(max_iter=3, random_state=0, backend="cpu").fit(X, Y, sample_weight=weights)
    hits = classifier.predict(X) == Y
    assert classifier.score(X, Y, sample_weight=weights) == pytest.approx((hits * weights).sum() / weights.sum())


# Stopping ---------------------------------------------------------------------------------------------------------


def test_early_stopping_of_a_regressor_watches_its_score():
    x, y = make_regression(300, 6, noise=20.0, random_state=0)
    settings = {"early_stopping": True, "learning_rate": 0.02, "max_iter": 300, "random_state": 0, "backend": "cpu"}
    regressor = XPRegressor(**settings).fit(x, y)
    scores = regressor.validation_scores_
    assert len(scores) == regressor.n_iter_ < 300 and regressor.best_loss_ is None
    assert regressor.best_validation_score_ == max(scores) > 0.9
    _, held_out = regressor._split(y)
    assert regressor.score(x[held_out], y[held_out]) == pytest.approx(max(scores), rel=1e-12)
    assert regressor.t_ == regressor.n_iter_ * 270


def test_the_best_weights_are_restored_over_warm_starts():
    classifier = XPClassifier(early_stopping=True, learning_rate=0.3, max_iter=12, warm_start=True, random_state=0,
                              backend="cpu")  # fmt: skip
    for fits in (1, 2, 3):
        classifier.set_params(n_iter_no_change=np.inf).fit(X, Y)
        assert len(classifier.validation_scores_) == 12 * fits and classifier.n_iter_ == 12
        _, held_out = classifier._split(Y)
        assert classifier.score(X[held_out], Y[held_out]) == max(classifier.validation_scores_)
        assert classifier.best_validation_score_ == max(classifier.validation_scores_)


@pytest.mark.parametrize("patience", [2, 5, 20])
def test_training_stops_when_the_loss_has_not_improved_by_tol(patience):
    settings = {"solver": "sgd", "tol": 0.01, "max_iter": 3000, "n_iter_no_change": patience, "random_state": 0}
    own, mlp = XPClassifier(backend="cpu", **settings).fit(X, Y == 1), MLPClassifier(**settings).fit(X, Y == 1)
    assert own._no_improvement_count == mlp._no_improvement_count == patience + 1
    best, waited = np.inf, 0  # by hand
    for epoch, loss in enumerate(own.loss_curve_):
        waited = waited + 1 if loss > best - 0.01 else 0
        best = min(best, loss)
        assert (waited > patience) == (epoch + 1 == own.n_iter_)


def test_infinite_patience_trains_to_the_last_epoch():
    classifier = XPClassifier(tol=1e9, n_iter_no_change=np.inf, max_iter=30, backend="cpu")
    with pytest.warns(ConvergenceWarning):
        classifier.fit(X, Y)
    assert classifier.n_iter_ == 30


def test_an_adaptive_rate_falls_before_training_stops():
    classifier = XPClassifier(solver="sgd", learning_rate="adaptive", learning_rate_init=0.1, tol=0.5, max_iter=3000,
                              random_state=0, backend="cpu").fit(X, Y)  # fmt: skip
    assert classifier.n_iter_ < 3000 and classifier.model_._state.learning_rate < 1e-6
    classifier.set_params(warm_start=True, max_iter=1).fit(X, Y)
    assert classifier.model_._state.learning_rate == pytest.approx(0.1 / 5)  # patience was lost before


def test_verbose_prints_every_epoch(capsys):
    XPClassifier(max_iter=2, verbose=True, early_stopping=True, backend="cpu").fit(X, Y)
    printed = capsys.readouterr().out
    assert "Iteration 2, loss = " in printed and printed.count("Validation score: ") == 2


def test_a_batch_larger_than_the_data_warns():
    with pytest.warns(UserWarning, match="batch_size=500 is larger than the number of samples, 200"):
        XPClassifier(batch_size=500, max_iter=2, backend="cpu").fit(X, Y)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("learning_rate", ["invscaling", "adaptive"])
def test_estimators_train_alike_on_every_backend(backend, weighted, learning_rate):
    settings = {"solver": "sgd", "learning_rate": learning_rate, "learning_rate_init": 0.1, "tol": 0.05,
                "n_iter_no_change": 1, "alpha": 2.0, "batch_size": 64, "max_iter": 12, "random_state": 0}  # fmt: skip
    weights = np.linspace(0.5, 1.5, 200) if weighted else None
    for kind, y in ((XPClassifier, NAMES), (XPClassifier, LABELS[1]), (XPRegressor, X[:, :2])):
        one = kind((5,), early_stopping=True, backend=backend, **settings).fit(X, y, sample_weight=weights)
        other = kind((5,), early_stopping=True, backend="cpu", **settings).fit(X, y, sample_weight=weights)
        np.testing.assert_allclose(one.loss_curve_, other.loss_curve_, rtol=1e-7)
        for a, b in zip(one.coefs_ + one.intercepts_, other.coefs_ + other.intercepts_, strict=True):
            assert type(a) is np.ndarray
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
        if kind is XPClassifier:
            np.testing.assert_array_equal(one.predict(X), other.predict(X))


def test_predictions_of_several_threads_are_exact():
    classifier = XPClassifier(max_iter=3, random_state=0, backend="cpu").fit(X, NAMES)
    expected = classifier.predict_proba(X)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: classifier.predict_proba(X), range(200)):
            np.testing.assert_array_equal(got, expected)


def test_divergence_is_an_error_with_and_without_early_stopping():
    for early in (False, True):
        regressor = XPRegressor((100,), "identity", solver="sgd", learning_rate_init=1.0, early_stopping=early,
                                random_state=0, backend="cpu")  # fmt: skip
        with pytest.raises(DivergenceError, match="learning rate, 1, is too high"):
            regressor.fit(X * 10, Y)
        assert np.isfinite(regressor.predict(X)).all()


class Interrupting(layers.Layer):
    """y = x; behaves like Ctrl-C in one of the training passes, counted over all copies."""

    passes, of_signal = 0, False

    def __init__(self, after):
        self.after = after

    def build(self, input_shape):
        return input_shape

    def forward(self, x):
        if self.context.training:
            Interrupting.passes += 1
            if Interrupting.passes == self.after:
                if self.of_signal:
                    signal.raise_signal(signal.SIGINT)
                else:
                    raise KeyboardInterrupt
        return x

    def backward(self, grad_y):
        return grad_y


@pytest.mark.parametrize("of_signal", [False, True])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_ctrl_c_is_raised_and_the_attributes_describe_completed_epochs(monkeypatch, of_signal, early_stopping):
    monkeypatch.setattr(Interrupting, "of_signal", of_signal)
    for after, epochs in ((1, 0), (5, 1), (9, 2)):
        monkeypatch.setattr(Interrupting, "passes", 0)
        classifier = XPClassifier(layers=[layers.Dense(4), Interrupting(after)], batch_size=50, random_state=0,
                                  early_stopping=early_stopping, backend="cpu")  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            classifier.fit(X, Y)
        assert classifier.n_iter_ == len(classifier.loss_curve_) == epochs and classifier.t_ == epochs * (
            180 if early_stopping else 200
        )
        assert np.isnan(classifier.loss_) if epochs == 0 else classifier.loss_ == classifier.loss_curve_[-1]
        assert np.isfinite(classifier.predict_proba(X)).all()
        assert all(p.shared_l2 == 0 for p in classifier.model_.parameters)
        pickle.dumps(classifier)
        classifier.fit(X, Y)
        assert classifier.n_iter_ > epochs


@pytest.mark.parametrize("of_signal", [False, True])
def test_ctrl_c_ends_a_grid_search(monkeypatch, of_signal):
    monkeypatch.setattr(Interrupting, "of_signal", of_signal)
    monkeypatch.setattr(Interrupting, "passes", 0)
    network = XPClassifier(layers=[layers.Dense(4), Interrupting(4)], max_iter=3, backend="cpu")
    with pytest.raises(KeyboardInterrupt):
        GridSearchCV(network, {"alpha": [1e-4, 1e-3]}, cv=2).fit(X, Y)
    assert Interrupting.passes == 4


def test_partial_fit_refuses_early_stopping():
    with pytest.raises(ArgumentError, match="partial_fit does not support early_stopping=True"):
        XPClassifier(early_stopping=True, backend="cpu").partial_fit(X, Y)


def test_a_validation_set_of_one_sample_is_refused():
    with pytest.raises(ArgumentError, match="The validation set is too small, 1 of 2 samples"):
        XPRegressor(early_stopping=True, backend="cpu").fit(X[:2], Y[:2])


def test_the_layers_argument_is_copied():
    unbuilt = [layers.Dense(6), layers.Dropout(0.1), layers.Tanh()]
    one, two = (XPClassifier(layers=unbuilt, max_iter=2, backend="cpu").fit(X, Y) for _ in range(2))
    assert not any(layer.is_built for layer in unbuilt) and one.model_ is not two.model_
    clone(one).fit(X, Y)


def with_a_shortcut(x):
    h = layers.Dense(4)(x)
    return layers.Concatenate()([layers.Tanh()(h), x])


def test_layers_may_be_a_function_that_makes_a_graph():
    network = XPClassifier(layers=with_a_shortcut, max_iter=3, random_state=0, backend="cpu").fit(X, Y)
    assert isinstance(network.model_, Model) and [w.shape for w in network.coefs_] == [(8, 4), (12, 3)]
    copied = pickle.loads(pickle.dumps(network))
    np.testing.assert_array_equal(copied.predict_proba(X), network.predict_proba(X))
    np.testing.assert_array_equal(clone(network).fit(X, Y).predict_proba(X), network.predict_proba(X))
    with pytest.raises(ArgumentTypeError, match="a layer is called on symbolic tensors"):
        XPClassifier(layers=lambda x: [layers.Dense(3)], backend="cpu").fit(X, Y)
    with pytest.raises(ArgumentTypeError, match="XPClassifier: layers must be a list of layers, or a function"):
        XPClassifier(layers=with_a_shortcut(Input(8)), backend="cpu").fit(X, Y)


def test_estimators_work_in_pipelines_grid_searches_and_pickles():
    pipeline = make_pipeline(StandardScaler(), XPClassifier(learning_rate=0.01, random_state=0, backend="cpu"))
    search = GridSearchCV(
        pipeline, {"xpclassifier__alpha": [1e-4, 1e-1], "xpclassifier__max_iter": [20]}, cv=3, n_jobs=2
    )
    assert search.fit(X, NAMES).best_score_ > 0.7
    assert cross_val_score(pipeline, X, NAMES, cv=3).mean() > 0.7
    copied = pickle.loads(pickle.dumps(pipeline.fit(X, NAMES)))
    np.testing.assert_array_equal(copied.predict_proba(X), pipeline.predict_proba(X))


def test_data_frames_keep_their_column_names():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(X, columns=[f"c{i}" for i in range(8)])
    pipeline = make_pipeline(StandardScaler(), XPRegressor(max_iter=3, backend="cpu")).set_output(transform="pandas")
    pipeline.fit(frame, Y)
    assert list(pipeline[-1].feature_names_in_) == list(frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        pipeline[-1].predict(frame[frame.columns[::-1]])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"activation": "rely"}, "XPClassifier: activation must be \"identity\", .* not 'rely'.*mean 'relu'"),
        ({"optimizer": "adm"}, "'adam'"),
        ({"solver": "lbfgs"}, 'solver="lbfgs" is not available, because xpnet trains on batches. Use "adam" or "sgd"'),
        ({"optimizer": "L-BFGS"}, 'optimizer="L-BFGS" is not available'),
        ({"solver": "sgd", "optimizer": "rmsprop"}, "solver='sgd' and optimizer='rmsprop' are two names of the same"),
        ({"learning_rate": 0.1, "learning_rate_init": 0.2}, "learning_rate=0.1 and learning_rate_init=0.2 are two"),
        ({"learning_rate": "adaptive", "learning_rate_schedule": "invscaling"}, "are two names of the same argument"),
        ({"learning_rate": "adaptiv"}, "learning_rate must be .*or a number, not 'adaptiv'.*mean 'adaptive'"),
        ({"learning_rate_schedule": 3}, "learning_rate_schedule must be"),
        ({"alpha": -1.0}, "XPClassifier: alpha must be a finite number of at least 0, not -1.0"),
        ({"solver": "sgd", "momentum": 1.5}, "XPClassifier: momentum must be a number of at least 0 and below 1"),
        ({"beta_1": 1.0}, "XPClassifier: beta_1 must be a number of at least 0 and below 1, not 1.0"),
        ({"tol": np.nan}, "XPClassifier: tol must be a number of at least 0, not nan"),
        ({"n_iter_no_change": 0}, "n_iter_no_change must be an integer of at least 1, or infinity, not 0"),
        ({"shuffle": "yes"}, "XPClassifier: shuffle must be True or False, not 'yes'"),
        ({"verbose": "a lot"}, "XPClassifier: verbose must be an integer of at least 0, or True or False"),
        ({"hidden_layer_sizes": (8, 0)}, "XPClassifier: hidden_layer_sizes must be an integer of at least 1, not 0"),
        ({"batch_size": "all"}, "XPClassifier: batch_size must be an integer of at least 1, or \"auto\", not 'all'"),
        ({"max_iter": 0}, "XPClassifier: max_iter must be an integer of at least 1, not 0"),
        ({"early_stopping": 1}, "XPClassifier: early_stopping must be True or False, not 1"),
        (
            {"early_stopping": True, "validation_fraction": 1.0},
            "XPClassifier: validation_fraction must be a number above 0 and below 1, not 1.0",
        ),
    ],
)
def test_invalid_arguments_are_refused(arguments, match):
    with pytest.raises(ArgumentError, match=match):
        XPClassifier(backend="cpu", **arguments).fit(X, Y)


def test_predict_before_fit_is_an_error():
    with pytest.raises(NotFittedError):
        XPClassifier().predict(X)


@pytest.mark.sweep
@pytest.mark.parametrize("alpha", [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0])
def test_alpha_affects_accuracy_as_in_mlpclassifier(alpha):
    estimators_alpha = pytest.importorskip("benchmarks.estimators_alpha", reason="only in a clone")
    own, theirs = estimators_alpha.mean_accuracies(alpha)
    print(f"alpha {alpha:g}: XPClassifier {own:.4f}, MLPClassifier {theirs:.4f}")
    assert abs(own - theirs) < 0.02


@pytest.mark.sweep
@pytest.mark.slow
def test_the_classifier_is_as_accurate_as_mlpclassifier_on_digits():
    x, y = load_digits(return_X_y=True)
    own, theirs = (
        cross_val_score(make_pipeline(StandardScaler(), kind), x, y, cv=5).mean()
        for kind in (XPClassifier(random_state=0, backend="cpu"), MLPClassifier(random_state=0))
    )
    print(f"XPClassifier {own:.4f}, MLPClassifier {theirs:.4f}")
    assert own > theirs - 0.01


def test_predictions_of_nan_outputs_are_refused():
    X, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    for estimator in (XPClassifier((3,)), XPRegressor((3,))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            estimator.set_params(max_iter=1).fit(X, y)
        estimator.model_.parameters[0].value[...] = np.nan
        with pytest.raises(DataError, match="outputs for some samples of X are NaN"):
            estimator.predict(X)


NET = layers.Sequential([layers.Dense(4), layers.ReLU(), layers.Dense(2)])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: XPClassifier(lr=0.1), "XPClassifier: unknown argument 'lr'. Did you mean 'learning_rate'"),
        (lambda: XPRegressor(epochs=5), "XPRegressor: unknown argument 'epochs'.*max_iter"),
        (lambda: XPClassifier(model=NET), r"unknown argument 'model'.*layers=\[\.\.\.\]"),
        (lambda: XPClassifier(NET).fit(X, Y), r"hidden_layer_sizes must be numbers of units.*layers=\[\.\.\.\]"),
        (lambda: XPClassifier(NET.layers).fit(X, Y), "hidden_layer_sizes must be numbers of units"),
    ],
    ids=["lr", "epochs", "model", "a model by position", "layers by position"],
)
def test_arguments_of_other_libraries_and_models_are_explained(call, match):
    with pytest.raises(ArgumentTypeError, match=match):
        call()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_an_output_layer_among_the_hidden_layers_warns():
    with pytest.warns(UserWarning, match=r"layers ends with Dense\(2\), and fit adds the output layer") as caught:
        XPClassifier(layers=NET.layers, max_iter=1, backend="cpu").fit(X, Y)
    assert caught[0].filename == __file__
