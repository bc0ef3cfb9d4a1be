"""Constructors: which arguments are given by position and which by name, and what a call that does not fit is told."""

import inspect
import subprocess
import sys

import numpy as np
import pytest

import xpnet
from xpnet import augment, callbacks, initializers, layers, losses, metrics, optimizers, schedules
from xpnet.config import ExplainedArguments, explain_arguments, number
from xpnet.errors import ArgumentError, ArgumentTypeError, UnknownImportError, UnknownNameError

MODULES = (augment, callbacks, initializers, layers, losses, metrics, optimizers, schedules)
CLASSES = [value for module in MODULES for name in module.__all__ if isinstance(value := getattr(module, name), type)]
CLASSES = [cls for cls in CLASSES if issubclass(cls, ExplainedArguments)]
#: Neither flags nor initializers, but they follow these, or few callers use them.
BY_NAME = {"l1", "l2", "matrices", "padding_index", "parameter_rates", "projection", "tied_to"}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_flags_and_initializers_are_given_by_name_and_all_else_by_position_too(cls):
    for p in inspect.signature(cls).parameters.values():
        is_flag = isinstance(p.default, bool) or "bool" in str(p.annotation)
        by_name = is_flag or p.name.endswith("_initializer") or p.name == "name"
        if p.kind is not p.VAR_POSITIONAL and p.name not in BY_NAME:
            assert (p.kind is p.KEYWORD_ONLY) is by_name, p.name


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: layers.Dense(64, "relu"), "takes only units by position, not also 'relu'.*layers.ReLU"),
        (lambda: layers.Dense(64, 10), "takes only units by position, not also 10.*known from the layer before"),
        (lambda: layers.Dense(64, True), "use_bias="),
        (lambda: layers.Dense(64, activation="relu"), "unknown argument 'activation'. Add the activation as the next"),
        (lambda: layers.Dense(64, kernel_initializer="he_normal"), "Did you mean 'weight_initializer'"),
        (lambda: layers.Dense(in_features=3, out_features=4), "'in_features'. Leave it out"),
        (lambda: layers.Dense(out_features=4), "Did you mean 'units'"),
        (lambda: layers.Dense(4, input_shape=(3,)), "'input_shape'. Leave it out"),
        (lambda: layers.Dense(4, bias=False), "Did you mean 'use_bias'"),
        (lambda: layers.Dense(4, use_bais=False), "Did you mean 'use_bias'"),
        (lambda: layers.Dense(), "needs units"),
        (lambda: layers.Dense(4, units=4), "units is given twice"),
        (lambda: layers.Conv2D(8, 3, stride=2), "Did you mean 'strides'"),
        (lambda: layers.Conv2D(8, pool_size=2), "Did you mean 'kernel_size'"),
        (lambda: layers.Conv2D(out_channels=8, kernel_size=3), "Did you mean 'filters'"),
        (lambda: layers.Conv2D(8, 3, data_format="channels_first"), "images are"),
        (lambda: layers.MaxPool2D(kernel_size=2), "Did you mean 'pool_size'"),
        (lambda: layers.Dropout(p=0.5), "Did you mean 'rate'"),
        (lambda: layers.BatchNorm(eps=1e-3), "Did you mean 'epsilon'"),
        (lambda: layers.BatchNorm(affine=False), "Did you mean 'center' or 'scale'"),
        (lambda: layers.Embedding(input_dim=9, output_dim=2), "Did you mean 'vocabulary_size'"),
        (lambda: layers.Embedding(9, 2, "normal"), "weight_initializer="),
        (lambda: layers.Embedding(9, 2, mask_zero=True), "Did you mean 'padding_index'"),
        (lambda: layers.LSTM(hidden_size=3), "Did you mean 'units'"),
        (lambda: layers.GRU(3, go_backwards=True), "Did you mean 'reverse'"),
        (lambda: layers.TransformerBlock(2, dim_feedforward=8), "Did you mean 'mlp_ratio'"),
        (lambda: layers.LeakyReLU(alpha=0.1), "Did you mean 'negative_slope'"),
        (lambda: layers.Softmax(axis=1), "last axis"),
        (lambda: layers.ReLU(3), "takes nothing by position"),
        (lambda: layers.ReLU(inplace=True), "Leave it out"),
        (lambda: layers.AvgPool2D(2, 2, "valid", False), "count_include_pad="),
        (lambda: augment.RandomAffine(degrees=10), "Did you mean 'rotation'"),
        (lambda: optimizers.Adam(lr=0.1), "Did you mean 'learning_rate'"),
        (lambda: optimizers.Adam(betas=(0.9, 0.99)), "Did you mean 'beta1' or 'beta2'"),
        (lambda: optimizers.SGD(0.1, 0.9, 0.0, None, True), "nesterov="),
        (lambda: optimizers.RMSprop(parameter_rate={"*": 1.0}), "Did you mean 'parameter_rates'"),
        (lambda: losses.SoftmaxCrossEntropy(from_logits=True), "takes logits"),
        (lambda: metrics.Precision(avg="macro"), "Did you mean 'average'"),
        (lambda: initializers.Normal(stddev=2), "Did you mean 'std'"),
        (lambda: schedules.StepDecay(0.1, step_size=3), "Did you mean 'every'"),
        (lambda: callbacks.EarlyStopping(restore_best_weights=True), "Did you mean 'restore_best'"),
        (lambda: callbacks.Checkpoint(filepath="a"), "Did you mean 'path'"),
        (lambda: callbacks.CSVLogger("a", True), "append="),
        (lambda: xpnet.Sequential([layers.Dense(1)], inputshape=(2,)), "Did you mean 'input_shape'"),
        (lambda: xpnet.Sequential([layers.Dense(1)], device="cpu"), "Did you mean 'backend'"),
        (lambda: xpnet.Sequential([layers.Dense(1)]).fit(0, 0, batchsize=3), "fit: .*Did you mean 'batch_size'"),
        (lambda: xpnet.Sequential([layers.Dense(1)]).predict(), "Sequential.predict: needs x"),
        (lambda: xpnet.datasets.moons(n_samples=10), "moons: unknown argument 'n_samples'. Did you mean 'n'"),
        (lambda: xpnet.load("a", device="cpu"), "load: unknown argument 'device'. Did you mean 'backend'"),
    ],
)
def test_a_call_that_does_not_fit_is_told_what_would(make, hint):
    with pytest.raises(ArgumentTypeError, match=hint):
        make()


class Scaled(layers.Layer):
    def __init__(self, factor):
        self.factor = factor + 0

    def forward(self, x):
        return x * self.factor


def test_classes_of_ones_own_explain_their_arguments_too_and_errors_inside_them_pass_through():
    with pytest.raises(ArgumentTypeError, match=r"^Scaled: unknown argument 'facter'. Did you mean 'factor'\?"):
        Scaled(facter=2)
    with pytest.raises(TypeError, match="can only concatenate") as error:
        Scaled([])
    assert not isinstance(error.value, xpnet.errors.XpnetError)
    assert list(inspect.signature(Scaled).parameters) == ["factor"]


def test_a_function_keeps_its_signature_and_name():
    @explain_arguments
    def area(width, *, height=1):
        """Width times height."""
        return width * height

    assert area(2, height=3) == 6 and area.__name__ == "area" and str(inspect.signature(area)) == "(width, *, height=1)"
    with pytest.raises(ArgumentTypeError, match="^area: unknown argument 'hight'. Did you mean 'height'"):
        area(2, hight=3)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_constructor_explains_an_unknown_argument(cls):
    with pytest.raises(ArgumentTypeError, match=f"^{cls.__name__}: unknown argument 'nonsense'"):
        cls(nonsense=1)


@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["positive", "negative"])
def test_integers_beyond_all_floats_are_no_numbers(value):
    with pytest.raises(ArgumentError, match="must be a number"):
        number("Layer", "slope", value)
    with pytest.raises(ArgumentError, match="must be a finite number"):
        number("Layer", "slope", value, finite=True)
    assert number("Layer", "slope", 10**30) == 10**30


# Names of modules


@pytest.mark.parametrize(
    ("module", "name", "ours"),
    [
        (xpnet, "layer", "layers"),
        (xpnet, "sequential", "Sequential"),
        (xpnet, "optimisers", "optimizers"),
        (layers, "Conv2d", "Conv2D"),
        (layers, "BatchNormalization", "BatchNorm"),
        (layers, "AveragePooling1D", "AvgPool1D"),
        (layers, "Attention", "MultiHeadAttention"),
        (layers, "BatchNorm2d", "BatchNorm"),
        (layers, "Linear", "Dense"),
        (layers, "relu", "ReLU"),
        (layers, "MaxPooling2D", "MaxPool2D"),
        (layers, "ConvTranspose2d", "Conv2DTranspose"),
        (layers, "Dens", "Dense"),
        (losses, "CrossEntropyLoss", "SoftmaxCrossEntropy"),
        (losses, "MSELoss", "MeanSquaredError"),
        (losses, "L1Loss", "MeanAbsoluteError"),
        (losses, "BCEWithLogitsLoss", "BinaryCrossEntropy"),
        (optimizers, "adam", "Adam"),
        (optimizers, "RMSProp", "RMSprop"),
        (metrics, "Acuracy", "Accuracy"),
        (metrics, "F1Score", "F1"),
        (callbacks, "ModelCheckpoint", "Checkpoint"),
        (schedules, "CosineAnnealingLR", "CosineDecay"),
        (schedules, "StepLR", "StepDecay"),
        (initializers, "KaimingNormal", "HeNormal"),
        (augment, "RandomRotation", "RandomAffine"),
        (xpnet.datasets, "load_mnist", "mnist"),
        (xpnet.errors, "ShpeError", "ShapeError"),
    ],
)
def test_an_unknown_name_of_a_module_gets_the_nearest_one_suggested(module, name, ours):
    with pytest.raises(UnknownNameError, match=f"has no attribute '{name}'. Did you mean '{ours}'"):
        getattr(module, name)
    with pytest.raises(UnknownImportError, match=f"'{name}' from '{module.__name__}'. Did you mean '{ours}'"):
        exec(f"from {module.__name__} import {name}")
    assert not hasattr(module, name)


@pytest.mark.parametrize(
    ("get", "name", "ours"),
    [
        (losses.get, "crossentropy", "softmax_cross_entropy"),
        (losses.get, "MSELoss", "mse"),
        (losses.get, "bce", "binary_cross_entropy"),
        (lambda name: metrics.get(name, None), "acc", "accuracy"),
        (initializers.get, "xavier_uniform", "glorot_uniform"),
        (initializers.get, "kaiming", "he_normal' or 'he_uniform"),
        (xpnet.get_backend, "cdua", "cuda' or 'cpu"),
    ],
)
def test_names_of_other_libraries_get_ours_suggested(get, name, ours):
    with pytest.raises(ArgumentError, match=f"Did you mean '{ours}'"):
        get(name)


TYPED = """
from xpnet import Sequential, layers, losses, optimizers
model = Sequential([layers.Dense(3, name="a"), layers.ReLU(name="b"), layers.Flatten(name="c")], name="m")
layer: layers.Layer = model[0]
some: tuple[layers.Layer, ...] = model[1:]
layers.Dense(3, 4)
layers.Dense(3, activation="relu")
optimizers.Adam(lr=0.1)
layers.Conv2d
model.fit([], [], batchsize=3)
"""


def test_type_checkers_see_the_true_signatures(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "typed.py").write_text(TYPED, encoding="utf-8")
    (tmp_path / "xpnet").symlink_to(next(iter(xpnet.__path__)))
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "typed.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = [line.split(":")[1] for line in done.stdout.splitlines() if ": error:" in line]
    assert sorted(set(found), key=int) == ["6", "7", "8", "9", "10"], done.stdout + done.stderr


@pytest.mark.parametrize("value", [np.True_, np.False_])
def test_flags_of_numpy_are_accepted(value):
    assert layers.Dense(3, use_bias=value).use_bias is bool(value)
