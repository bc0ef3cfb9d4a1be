"""Estimators, plots, backends, the command line and the examples: wrong arguments end in a message that helps."""

import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xpnet
from xpnet import callbacks, layers
from xpnet.errors import XpnetError

ROOT = Path(xpnet.__file__).parents[1]
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(20, 4)), RNG.integers(0, 3, 20)


class Thing:
    pass


VALUES = {
    "none": None, "text": "no such name", "empty": "", "bytes": b"x", "nan": math.nan, "infinity": math.inf, "zero": 0,
    "negative": -1, "huge": 2**64, "half": 0.5, "bool": True, "complex": 1j, "array": np.ones(3),
    "objects": np.array([None, "a"]), "list": [1], "empty_list": [], "dict": {"a": 1}, "set": {1, 2},
    "object": Thing(), "class": Thing,
}  # fmt: skip


def check_refused(function, right, argument, taken, errors=XpnetError):
    for name, value in VALUES.items():
        if name in taken.split():
            continue
        try:
            result = function(**{**right, argument: value})
        except errors:
            continue
        except Exception as error:
            raise AssertionError(f"{argument}={name} ended in {type(error).__name__}: {error}") from error
        raise AssertionError(f"{argument}={name} was accepted, and gave {result!r:.80}")


# Estimators -----------------------------------------------------------------------------------------------------------

#: {argument of the constructors: what it takes}
ESTIMATORS = {
    "hidden_layer_sizes": "list empty_list array", "learning_rate": "half zero huge",
    "alpha": "zero half huge",
    "batch_size": "huge", "shuffle": "bool", "max_iter": "huge",
    "tol": "zero half infinity huge", "n_iter_no_change": "infinity huge",
    "early_stopping": "bool", "validation_fraction": "half", "verbose": "bool zero huge",
    "warm_start": "bool", "backend": "",
    "optimizer": "",
}  # fmt: skip


@pytest.mark.parametrize("argument", ESTIMATORS)
@pytest.mark.parametrize("kind", ["XPClassifier", "XPRegressor"])
@pytest.mark.filterwarnings("ignore")
def test_estimators_check_their_arguments_in_fit(kind, argument):
    estimators = pytest.importorskip("xpnet.estimators")
    estimator = getattr(estimators, kind)
    if argument not in inspect.signature(estimator).parameters:
        pytest.skip("this estimator has no such argument")

    def fit(**arguments):
        made = estimator(**arguments)  # never raises, as in scikit-learn
        return made.fit(X, Y)

    check_refused(fit, {"max_iter": 1, "backend": "cpu"}, argument, ESTIMATORS[argument], XpnetError)


WRONG_X = {"1d": X[:, 0], "3d": X[:, :, None], "nan": X * np.nan, "infinite": X * np.inf, "short": X[:5],
           "no_samples": X[:0], "no_features": X[:, :0], "complex": X + 0j, "text": np.full(X.shape, "a"),
           "object": Thing()}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_X)
@pytest.mark.filterwarnings("ignore")
def test_estimators_refuse_data_as_scikit_learn_does(name):
    estimators = pytest.importorskip("xpnet.estimators")
    fitted, wrong = estimators.XPClassifier(max_iter=1, backend="cpu").fit(X, Y), WRONG_X[name]
    before = fitted.model_.state_dict()
    calls = [
        lambda: estimators.XPClassifier(max_iter=1, backend="cpu").fit(wrong, Y),
        lambda: fitted.partial_fit(wrong, Y),
    ]
    if name != "short":
        calls += [lambda: fitted.predict(wrong), lambda: fitted.predict_proba(wrong)]
    for call in calls:
        with pytest.raises((ValueError, TypeError)):
            call()
    assert all((fitted.model_.state_dict()[key] == value).all() for key, value in before.items())
    assert fitted.predict(X).shape == (20,)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: e.XPClassifier().predict(X), "not fitted"),
        (lambda e: e.XPRegressor().predict(X), "not fitted"),
        (lambda e: e.XPClassifier(max_iter=1, backend="cpu").fit(X, Y).predict(X[:, :2]), "features"),
        (lambda e: e.XPClassifier(max_iter=1, backend="cpu").partial_fit(X, Y, classes=[0, 1]), "classes"),
        (lambda e: e.XPClassifier(max_iter=1, backend="cpu").fit(X, Y[:5]), "samples"),
        (lambda e: e.XPClassifier(max_iter=1, backend="cpu").fit(X, None), "requires y"),
        (lambda e: e.XPClassifier(max_iter=1, backend="cpu").fit(X, X[:, 0]), "continuous"),
        (lambda e: e.XPClassifier(sizes=3), "sizes"),
        (lambda e: e.XPClassifier().set_params(sizes=3), "sizes"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrong_use_of_estimators_is_explained(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call(pytest.importorskip("xpnet.estimators"))


# Plots ----------------------------------------------------------------------------------------------------------------


def plot_arguments():
    model = xpnet.Sequential([layers.Dense(3), layers.Tanh(), layers.Dense(2)], (2,), "cpu")
    x, y = X[:, :2], Y % 2
    history = model.fit(x, y, epochs=2, verbose=0)
    weights = [("0.weight", (0, 0)), ("0.weight", (0, 1))]
    wide = xpnet.Sequential([layers.Dense(3)], (16,), "cpu")
    return {
        "curves": {"history": history},
        "confusion_matrix": {"counts": np.eye(2, dtype=int)},
        "decision_boundary": {"model": model, "x": x, "y": y},
        "cost_surface": {"model": model, "x": x, "y": y, "loss": "softmax_cross_entropy", "weights": weights,
                         "points": 2},
        "activation": {"layer": layers.Tanh()},
        "descent": {"function": lambda x: x * x, "path": [1.0, 0.5]},
        "image_grid": {"images": np.ones((5, 4, 4))},
        "attribution": {"maps": np.ones((5, 4, 4)), "images": np.ones((5, 4, 4))},
        "embedding": {"points": np.ones((3, 2)), "labels": [0, 1, 1]},
        "filters": {"model": wide, "image_shape": (4, 4)},
        "network": {"model": model},
        "model_graph": {"model": model},
    }  # fmt: skip


#: {plot: {argument: what it takes}}
PLOTS = {
    "curves": {"history": "", "keys": "", "ax": "none", "logy": "bool"},
    "confusion_matrix": {"counts": "", "labels": "none objects", "ax": "none"},
    "decision_boundary": {"model": "", "x": "", "y": "", "ax": "none", "labels": "none objects",
                          "threshold": "infinity zero negative half huge"},
    "cost_surface": {"model": "", "x": "", "y": "", "loss": "none", "weights": "", "path": "none", "ax": "none",
                     "span": "none half bool", "points": ""},
    "activation": {"layer": "", "ax": "none", "low": "zero negative half", "high": "zero negative half huge"},
    "descent": {"path": "array list", "ax": "none", "low": "none zero negative half", "high": "none half huge"},
    "image_grid": {"images": "", "titles": "none", "columns": "huge", "cmap": "", "figure": "none"},
    "attribution": {"maps": "", "images": "none", "titles": "none", "columns": "huge", "figure": "none"},
    "embedding": {"points": "", "labels": "none array", "ax": "none", "names": "none array"},
    "filters": {"model": "", "image_shape": "none", "name": "none", "columns": "huge", "figure": "none"},
    "network": {"model": "", "ax": "none"},
    "model_graph": {"model": "", "ax": "none"},
}  # fmt: skip


@pytest.mark.parametrize("name", PLOTS)
def test_plots_refuse_arguments_of_another_kind(name):
    pytest.importorskip("matplotlib")
    right = plot_arguments()[name]
    function = getattr(xpnet.plots, name)
    function(**right)
    for argument, taken in PLOTS[name].items():
        check_refused(function, right, argument, taken)


def test_a_function_that_returns_no_number_has_no_curve():
    pytest.importorskip("matplotlib")
    with pytest.raises(XpnetError, match="function must return a number, not None"):
        xpnet.plots.descent(lambda x: None, [1.0])


# Backends, functions of models, and the command line ------------------------------------------------------------------

GRADIENTS = {"x": X[:, :4], "y": Y, "loss": "softmax_cross_entropy"}
NET = xpnet.Sequential([layers.Dense(5), layers.Dense(3)], (4,), "cpu")
CNN = xpnet.Sequential(
    [layers.Conv2D(2, 3, name="conv"), layers.GlobalAveragePool2D(), layers.Dense(3)], (5, 5, 1), "cpu"
)
ATTRIBUTION = {"model": NET, "x": X, "target": 1}
FUNCTIONS = {
    "saliency": (
        xpnet.attribution.saliency,
        ATTRIBUTION,
        {"model": "", "x": "", "target": "none zero", "as_device": "bool"},
    ),
    "occlusion": (
        xpnet.attribution.occlusion,
        {**ATTRIBUTION, "size": 2},
        {"model": "", "x": "", "target": "none zero", "size": "", "stride": "none", "value": "zero negative half huge"},
    ),
    "grad_cam": (
        xpnet.attribution.grad_cam,
        {"model": CNN, "x": np.ones((2, 5, 5, 1)), "target": 1},
        {"model": "", "x": "", "target": "none zero", "layer": "none zero"},
    ),
    "maximize_activation": (
        xpnet.attribution.maximize_activation,
        {"model": NET, "target": 1, "steps": 1},
        {
            "model": "",
            "target": "zero list",
            "layer": "none zero negative",
            "rate": "half huge",
            "decay": "zero half",
            "limits": "none",
            "start": "none",
            "seed": "none zero",
        },
    ),
    "principal_components": (xpnet.attribution.principal_components, {"values": X}, {"values": "", "n": ""}),
    "get_backend": (xpnet.get_backend, {}, {"backend": ""}),
    "check_gradients": (xpnet.check_gradients, GRADIENTS, {"model": ""}),
    "explain_step": (xpnet.explain_step, {}, {"model": ""}),
    "generate": (xpnet.generate, {"prompt": np.ones((1, 3), int), "length": 2}, {"model": ""}),
    "ProgressBar": (callbacks.ProgressBar, {}, {"stream": "none", "seconds": "infinity zero half huge"}),
    "Communicator": (xpnet.distributed.Communicator, {}, {"comm": "none"}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_refuse_arguments_of_another_kind(name):
    function, right, arguments = FUNCTIONS[name]
    first = next(iter(inspect.signature(function).parameters))
    for argument, taken in arguments.items():
        check_refused(function, right, first if name == "get_backend" else argument, taken)


COMMANDS = {
    "xpnet_alone": ["-m", "xpnet"],
    "xpnet_unknown": ["-m", "xpnet", "inof"],
    "xpnet_option": ["-m", "xpnet", "info", "--all"],
    "mnist_backend": ["examples/mnist.py", "--backend", "gqu", "--dataset", "digits"],
    "mnist_no_gpu": ["examples/mnist.py", "--backend", "gpu:99", "--dataset", "digits"],
    "mnist_model": ["examples/mnist.py", "--model", "mpl"],
    "mnist_epochs": ["examples/mnist.py", "--epochs", "0"],
    "mnist_batch_size": ["examples/mnist.py", "--batch-size", "many"],
    "mnist_rate": ["examples/mnist.py", "--learning-rate", "nan"],
    "mnist_rate_infinite": ["examples/mnist.py", "--learning-rate", "inf"],
    "mnist_seed": ["examples/mnist.py", "--seed", "-1"],
    "mnist_target": ["examples/mnist.py", "--target-accuracy", "90"],
    "mnist_data_dir": ["examples/mnist.py", "--data-dir", "no/such/folder"],
    "mnist_plots": ["examples/mnist.py", "--plots", "LICENSE/pictures", "--dataset", "digits"],
    "gpt_config": ["examples/gpt.py", "--config", "huge"],
    "gpt_steps": ["examples/gpt.py", "--steps", "-3"],
    "gpt_data_dir": ["examples/gpt.py", "--data-dir", "no/such/folder"],
    "gpt_sample": ["examples/gpt.py", "--sample", "0"],
    "gpt_save": ["examples/gpt.py", "--save", "a.h5", "--steps", "1"],
    "gpt_save_nowhere": ["examples/gpt.py", "--save", "LICENSE/a.safetensors", "--steps", "1"],
    "gpt_backend": ["examples/gpt.py", "--backend", "gqu"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_arguments_of_programs_end_without_a_traceback(name):
    command, own = [sys.executable, *COMMANDS[name]], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr and len(done.stderr.strip()) > 10, done.stderr[-600:]
