"""Estimators: scikit-learn's estimator checks, pipelines and grid searches."""

import pickle
import warnings

import numpy as np
import pytest

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from sklearn.base import clone  # noqa: E402
from sklearn.datasets import load_digits, make_classification, make_regression  # noqa: E402
from sklearn.exceptions import ConvergenceWarning, NotFittedError  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from xpnet import layers, optimizers  # noqa: E402
from xpnet.errors import ArgumentError, DataError  # noqa: E402
from xpnet.estimators import XPClassifier, XPRegressor  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning"),
    # Some of the estimator checks cause deprecation warnings themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sklearn"),
]

X, Y = make_classification(200, 8, n_informative=5, n_classes=3, random_state=0)
NAMES = np.array(["ant", "bee", "cow"])[Y]


@parametrize_with_checks(
    [
        XPClassifier(backend="cpu"),
        XPClassifier((8, 8), "tanh", optimizer="sgd", learning_rate=0.1, backend="cpu"),
        XPClassifier(layers=[layers.Dense(16), layers.ELU()], optimizer=optimizers.Adam(0.01), backend="cpu"),
        XPRegressor(backend="cpu"),
        XPRegressor((20,), "logistic", optimizer=optimizers.Adam(0.01), backend="cpu"),
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
    np.testing.assert_allclose(classifier.predict_log_proba(X), np.log(proba))


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
    assert warm.fit(X, Y).model_ is model and warm.n_iter_ == 6
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


def test_the_layers_argument_is_copied():
    unbuilt = [layers.Dense(6), layers.Dropout(0.1), layers.Tanh()]
    one, two = (XPClassifier(layers=unbuilt, max_iter=2, backend="cpu").fit(X, Y) for _ in range(2))
    assert not any(layer.is_built for layer in unbuilt) and one.model_ is not two.model_
    clone(one).fit(X, Y)


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


@pytest.mark.slow
def test_the_classifier_is_as_accurate_as_mlpclassifier_on_digits():
    from sklearn.neural_network import MLPClassifier

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
