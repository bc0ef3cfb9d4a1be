"""Constructors: each argument of every public class works as documented, or is refused by name, whatever its value.

The rows are generated: every parameter of every class with every one of VALUES. What a parameter accepts stands in
KINDS, apart from the code under test. `python tests/misuse/test_constructors.py` prints the number of rows.
"""

import copy
import inspect
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import every
import numpy as np
import pytest

import xpnet
from xpnet import augment, callbacks, initializers, layers, losses, metrics, optimizers, schedules
from xpnet.config import ExplainedArguments
from xpnet.errors import ArgumentTypeError, XpnetError
from xpnet.parameters import ParameterStore


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


VALUES: dict[str, Any] = {
    "an object": object(),
    "an object without repr": Unprintable(),
    "None": None,
    "True": True,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "0": 0,
    "1": 1,
    "-1": -1,
    "0.5": 0.5,
    "2**64": 2**64,
    "10**12": 10**12,
    "10**400": 10**400,
    "-10**5000": -(10**5000),
    "1e300": 1e300,
    "1e-300": 1e-300,
    "1j": 1j,
    "text": "nonsense",
    "empty text": "",
    "bytes": b"bytes",
    "bytes of 0 and 1": b"\0\1",
    "[1, 2]": [1, 2],
    "[]": [],
    "()": (),
    "(1, 2, 3)": (1, 2, 3),
    "nested": [[1], [2]],
    "ragged": [np.arange(3), 2],
    "a dict": {0: 1, 1: 2},
    "{}": {},
    "a set": {1, 2},
    "a range": range(2),
    "an array": np.arange(3.0),
    "an array of 0 axes": np.array(2),
    "a matrix": np.ones((2, 2)),
    "an empty array": np.zeros(0),
    "objects": np.array([None, 1], object),
    "an array of text": np.array("a"),
    "masked": np.ma.masked_array([1.0, 2.0], [0, 1]),
    "float32 nan": np.float32("nan"),
    "no time": np.datetime64("NaT", "s"),
    "a class": layers.Dense,
    "a function": lambda *given: None,
    "a layer": layers.ReLU(),
}

# What a parameter may be. -------------------------------------------------------------------------------------------

Kind = Callable[[Any], bool]
LARGEST = float(np.finfo(np.float32).max)


def number(value: Any) -> bool:
    """Whether this is a real number that is not NaN, and finite in float32 if it is finite."""
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iuf":
        value = value.item()
    real = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return real and (abs(value) == math.inf or abs(value) <= LARGEST)


def real(
    least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf, below: float = math.inf
) -> Kind:
    """A finite number within these limits."""

    def accepts(value: Any) -> bool:
        if not number(value) or abs(value) == math.inf:
            return False
        return least <= value <= most and (above == -math.inf or value > max(above, 1e-38)) and value < below

    return accepts


def whole(least: int = 1, most: int = 2**63 - 1) -> Kind:
    return lambda value: number(value) and abs(value) < math.inf and value % 1 == 0 and least <= value <= most


def pair(kind: Kind) -> Kind:
    def accepts(value: Any) -> bool:
        several = isinstance(value, list | tuple) or (type(value) is np.ndarray and value.ndim == 1)
        return kind(value) or (several and len(value) == 2 and all(map(kind, value)))

    return accepts


def one_of(*options: Any) -> Kind:
    return lambda value: isinstance(value, str | None) and value in options


def any_of(*kinds: Kind) -> Kind:
    return lambda value: any(kind(value) for kind in kinds)


def flag(value: Any) -> bool:
    return value is True or value is False


def nothing(value: Any) -> bool:
    return value is None


def extended(value: Any) -> bool:
    return number(value)


def function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(value))


def path(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def initializer(value: Any) -> bool:
    """A finite number, or an array whose shape is compared when the layer is built."""
    if isinstance(value, list | tuple | range):
        value = np.asarray(value) if not any(isinstance(item, np.ndarray) for item in value) else None
    plain = type(value) is np.ndarray and value.dtype.kind in "iuf"
    return plain or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300)


def sequence(value: Any) -> bool:
    """A list or the like, in order, that is no text and no array of several axes."""
    plain = type(value) is np.ndarray and value.ndim == 1
    return plain or isinstance(value, list | tuple | range)


def shape(value: Any) -> bool:
    sizes = list(value) if sequence(value) else [value]
    known = sizes[1:] if sequence(value) and sizes and sizes[0] is None else sizes
    return all(map(whole(1), known))


def sizes_of_reshape(value: Any) -> bool:
    sizes = list(value) if sequence(value) else [value]
    return all(whole(1)(n) or (whole(-1)(n) and n == -1) for n in sizes) and sum(n == -1 for n in sizes) < 2


def axes(value: Any) -> bool:
    given = list(value) if sequence(value) else [value]
    return bool(given) and all(map(whole(0), given)) and sorted(given) == list(range(len(given)))


def class_weights(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value)
    return value is None or (sequence(value) and len(value) > 0 and all(map(real(0), value)))


def class_names(value: Any) -> bool:
    return sequence(value) and len({str(one) for one in value}) == len(value)


def area(value: Any) -> bool:
    shares = list(value) if sequence(value) else [value]
    return len(shares) in (1, 2) and all(map(real(0, 1), shares)) and shares[0] <= shares[-1]


def padding_of_image(value: Any) -> bool:
    side = pair(whole(0))
    return side(value) or (isinstance(value, list | tuple) and len(value) == 2 and all(map(side, value)))


def rate(value: Any) -> bool:
    return real(0)(value) or function(value)


SIZE, SIZES, FROM_0, FACTOR = whole(1), pair(whole(1)), whole(0), real(0, below=1)
POSITIVE, FINITE, FROM_ZERO, PIXELS = real(above=0), real(), real(0), real(0, 10**6)

#: What parameters accept, by name, or by "Class.name" where that differs.
KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        ("units", "filters", "groups", "depth_multiplier", "vocabulary_size", "features", "heads", "max_length",
         "mlp_ratio", "k", "every", "steps"), SIZE,
    ),
    **dict.fromkeys(("kernel_size", "strides", "dilation", "size"), SIZES),
    **dict.fromkeys(("Conv1D.kernel_size", "Conv1D.strides", "Conv1D.dilation"), SIZE),
    **dict.fromkeys(("MaxPool1D.pool_size", "AvgPool1D.pool_size"), SIZE),
    **dict.fromkeys(("MaxPool2D.strides", "AvgPool2D.strides", "RandomCrop.size"), any_of(SIZES, nothing)),
    **dict.fromkeys(("MaxPool1D.strides", "AvgPool1D.strides"), any_of(SIZE, nothing)),
    "pool_size": SIZES,
    "padding": any_of(one_of("valid", "same"), pair(FROM_0)),
    "Conv1D.padding": any_of(one_of("valid", "same", "causal"), FROM_0),
    "MaxPool1D.padding": any_of(one_of("valid", "same"), FROM_0),
    "AvgPool1D.padding": any_of(one_of("valid", "same"), FROM_0),
    "ZeroPadding2D.padding": padding_of_image,
    "RandomCrop.padding": any_of(pair(whole(0, 10**6)), nothing),
    "RandomCrop.size": any_of(pair(whole(1, 10**6)), nothing),
    "output_padding": pair(FROM_0),
    **dict.fromkeys(
        ("use_bias", "return_sequences", "reverse", "count_include_pad", "center", "scale", "causal", "rotary",
         "shared", "horizontal", "vertical", "nesterov", "restore_best", "append"), flag,
    ),
    **dict.fromkeys(
        ("weight_initializer", "bias_initializer", "recurrent_weight_initializer", "recurrent_bias_initializer",
         "Constant.value"), initializer,
    ),
    **dict.fromkeys(("l1", "l2", "weight_decay", "decay", "final"), FROM_ZERO),
    **dict.fromkeys(("epsilon", "delta", "margin", "factor", "start_factor", "end_factor"), POSITIVE),
    "Huber.delta": any_of(POSITIVE, lambda value: number(value) and value == math.inf),
    **dict.fromkeys(("alpha", "negative_slope", "threshold", "offset", "value", "mean", "gain"), FINITE),
    **{f"{norm}.epsilon": real(above=0, below=1) for norm in
       ("BatchNorm", "LayerNorm", "InstanceNorm", "GroupNorm", "RMSNorm")},
    "Rescale.scale": FINITE,
    **dict.fromkeys(("rate", "dropout", "momentum", "beta1", "beta2", "rho", "label_smoothing"), FACTOR),
    "BatchNorm.momentum": real(0, 1),
    "OneCycle.warmup": real(0, 1),
    "RandomErasing.rate": real(0, 1),
    "RandomErasing.area": area,
    "ElasticDistortion.alpha": PIXELS,
    "ElasticDistortion.sigma": real(above=0, most=10**6),
    "MixUp.alpha": real(above=0, most=10**6),
    "GaussianNoise.deviation": real(0, 1e30),
    "RandomAffine.shift": pair(PIXELS),
    "RandomAffine.scale": pair(PIXELS),
    "RandomAffine.rotation": PIXELS,
    "RandomAffine.shear": real(0, below=90),
    "HardTanh.low": extended,
    "HardTanh.high": extended,
    "Uniform.low": FINITE,
    "Uniform.high": FINITE,
    "std": FROM_ZERO,
    "approximate": one_of("none", "tanh"),
    "norm": one_of("layer", "rms"),
    "activation": one_of("gelu", "relu", "silu"),
    "interpolation": one_of("nearest", "bilinear"),
    "reduction": one_of("mean", "sum"),
    "average": one_of("macro", "micro", "weighted", "binary", None),
    "weights": one_of("linear", "quadratic", None),
    "mode": one_of("auto", "min", "max"),
    "name": name,
    "axis": whole(-(2**63)),
    "start": whole(-(2**63)),
    "stop": any_of(whole(-(2**63)), nothing),
    "axes": axes,
    "target_shape": sizes_of_reshape,
    "padding_index": any_of(whole(0, 8), nothing),
    "ignore": any_of(whole(-(2**63)), nothing),
    "tied_to": nothing,
    "projection": any_of(nothing, lambda value: isinstance(value, layers.Layer)),
    "Bidirectional.layer": lambda value: False,
    "Sequential.layers": lambda value: False,
    "class_weight": class_weights,
    "from_logits": any_of(flag, nothing),
    "class_names": any_of(class_names, nothing),
    **dict.fromkeys(
        (f"{metric}.threshold" for metric in
         ("Accuracy", "F1", "ClassReport", "CohenKappa", "ConfusionMatrix", "Precision", "Recall")),
        any_of(extended, nothing),
    ),
    "learning_rate": rate,
    "parameter_rates": lambda value: value is None or (isinstance(value, dict) and not value),
    "matrices": lambda value: value is None or (isinstance(value, list | tuple | np.ndarray) and str(value) in "[]()"),
    "adamw_factor": FROM_ZERO,
    "smoothing": FACTOR,
    **dict.fromkeys(("lowest", "highest"), POSITIVE),
    "LearningRateFinder.steps": whole(2),
    "LearningRateFinder.limit": lambda value: number(value) and value > 1,
    "ExponentialMovingAverage.decay": FACTOR,
    **dict.fromkeys(("validate", "apply_at_end", "histograms"), flag),
    "TensorBoard.every": any_of(SIZE, nothing),
    "folder": path,
    "clip_norm": any_of(POSITIVE, nothing, lambda value: number(value) and value == math.inf),
    **{f"{schedule}.rate": FROM_ZERO for schedule in
       ("Constant", "StepDecay", "ExponentialDecay", "InverseTimeDecay", "CosineDecay")},
    "peak": FROM_ZERO,
    "after": rate,
    "path": path,
    "minutes": any_of(lambda value: number(value) and value >= 0, nothing),
    "keep_best": FROM_0,
    "monitor": lambda value: isinstance(value, str),
    **dict.fromkeys(("patience", "min_delta", "min_rate", "seconds"), lambda value: number(value) and value >= 0),
    "ReduceLROnPlateau.factor": real(above=0, below=1),
    "stream": nothing,
    # The models, Input, build and the functions
    "model.layers": lambda value: False,
    "model.inputs": lambda value: False,
    "model.outputs": lambda value: False,
    "model.input_shape": any_of(shape, nothing),
    "input_shape": shape,
    "shape": shape,
    "backend": lambda value: False,
    "seed": whole(0, 2**64 - 1),
    "model.seed": any_of(whole(0, 2**64 - 1), nothing),
    "dtype": one_of("float32", "float64"),
    "Model.dtype": one_of("float32", "float64", None),
    "precision": one_of("float32", None),
    "initializers.get.spec": initializer,
    "losses.get.spec": lambda value: False,
    "optimizers.get.spec": lambda value: False,
    "metrics.get.specs": lambda value: value is None or (isinstance(value, list | tuple) and not value),
    "metrics.get.loss": nothing,
    "Report.counts": lambda value: type(value) is np.ndarray and value.shape == (2, 2),
    "Report.class_names": lambda value: class_names(value) and len(value) == 2,
    "logs": lambda value: isinstance(value, dict),
    "optimizer": lambda value: False,
    "store": lambda value: False,
}  # fmt: skip

#: Parameters whose valid values another argument, or its default, may exclude already in the constructor.
JOINT = {
    "LearningRateFinder.lowest", "LearningRateFinder.highest",
    "HardTanh.low", "HardTanh.high", "Uniform.low", "Uniform.high", "SGD.nesterov", "Conv2DTranspose.output_padding",
    "Conv2DTranspose.strides", "Conv2DTranspose.padding", "Conv2DTranspose.dilation", "Embedding.vocabulary_size",
    *(f"{kind}.{parameter}" for kind in ("MaxPool1D", "MaxPool2D", "AvgPool1D", "AvgPool2D")
      for parameter in ("padding", "pool_size")),
    "Checkpoint.path", "CSVLogger.path", "TensorBoard.folder",
}  # fmt: skip

# The classes, and how their objects are used. -----------------------------------------------------------------------


class Target(NamedTuple):
    """What is called.

    make(**arguments) returns an object, which use(object, arguments) then uses; that raises AssertionError if the
    object does not do what its documentation says of these arguments.
    """

    name: str
    make: Callable[..., Any]
    parameters: tuple[str, ...]
    arguments: dict[str, Any]
    use: Callable[[Any, dict[str, Any]], None]


RNG = np.random.default_rng(0)
X, LABELS = RNG.normal(size=(8, 4)).astype("float32"), np.arange(8) % 3
FRACTION = (LABELS > 0).astype("float32")


def _normalized(a: dict[str, Any], x: Any, axis: Any, center: bool = True) -> Any:
    mean = x.mean(axis=axis, keepdims=True) if center else 0.0
    return (x - mean) / np.sqrt(np.square(x - mean).mean(axis=axis, keepdims=True) + a["epsilon"])


def _pads(padding: Any) -> list[tuple[int, int]]:
    return [(0, 0), *(((p, p) if np.ndim(p) == 0 else tuple(p)) for p in np.broadcast_to(padding, 2)), (0, 0)]


#: The documented formula of a layer in inference, in float64: (arguments, x) → y.
FORMULAS: dict[type, Callable[[dict[str, Any], Any], Any]] = {
    layers.Step: lambda a, x: (x >= a["threshold"]) * 1.0,
    layers.LeakyReLU: lambda a, x: np.where(x > 0, x, a["negative_slope"] * x),
    layers.ELU: lambda a, x: np.where(x > 0, x, a["alpha"] * np.expm1(np.minimum(x, 0))),
    layers.HardTanh: lambda a, x: np.clip(x, a["low"], a["high"]),
    layers.Rescale: lambda a, x: a["scale"] * x + a["offset"],
    layers.Dropout: lambda a, x: x,
    layers.Masking: lambda a, x: x,
    layers.Slice: lambda a, x: np.moveaxis(np.moveaxis(x[0:], a["axis"] % (x.ndim - 1) + 1, 0)[
        slice(int(a["start"]), None if a["stop"] is None else int(a["stop"]))], 0, a["axis"] % (x.ndim - 1) + 1),
    layers.Reshape: lambda a, x: x.reshape(len(x), *np.atleast_1d(a["target_shape"]).astype(int)),
    layers.Permute: lambda a, x: x.transpose(0, *(int(axis) + 1 for axis in np.atleast_1d(a["axes"]))),
    layers.LayerNorm: lambda a, x: _normalized(a, x, -1),
    layers.InstanceNorm: lambda a, x: _normalized(a, x, (1, 2)),
    layers.RMSNorm: lambda a, x: _normalized(a, x, -1, center=False),
    layers.BatchNorm: lambda a, x: x / np.sqrt(1 + a["epsilon"]),
    augment.GaussianNoise: lambda a, x: x,
    augment.MixUp: lambda a, x: x,
    augment.RandomAffine: lambda a, x: x,
    augment.ElasticDistortion: lambda a, x: x,
    augment.RandomErasing: lambda a, x: x,
    augment.RandomFlip: lambda a, x: x,
}  # fmt: skip


def use_layer(given_shape: Any) -> Callable[[Any, dict[str, Any]], None]:
    def use(layer: Any, arguments: dict[str, Any]) -> None:
        rng = np.random.default_rng(0)
        shapes = given_shape if isinstance(given_shape, list) else [given_shape]
        x = [rng.normal(size=(2, *one)).astype("float32") for one in shapes]
        if isinstance(layer, layers.Embedding):
            x = [rng.integers(0, min(9, layer.vocabulary_size), size=(2, *one)) for one in shapes]
        layer.build(given_shape, backend="cpu", seed=0)
        formula = FORMULAS.get(type(layer))
        huge = any(number(value) and abs(value) > 1e6 for value in arguments.values())
        with np.errstate(all="ignore" if huge else "raise", under="ignore"):
            for training in (False, True):
                layer.context.training = training
                y = layer.forward(x if isinstance(given_shape, list) else x[0])
                assert y.shape == (2, *layer.output_shape) and y.dtype == "float32", (y.shape, y.dtype)
                assert huge or np.isfinite(y).all(), "an output is not finite"
                if formula is not None and not training:
                    with np.errstate(all="ignore"):
                        expected = np.asarray(formula(arguments, x[0].astype("float64")), "float32")
                    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
                layer.backward(np.ones_like(y))
                assert huge or all(np.isfinite(p.grad).all() for p in layer.parameters), "a gradient is not finite"

    return use


def use_initializer(made: Any, arguments: dict[str, Any]) -> None:
    size = (8,) if isinstance(made, initializers.ForgetGate) else (2, 2)
    values = made(size, np.random.default_rng(0))
    assert values.shape == size and values.dtype == "float64" and np.isfinite(values).all()
    if isinstance(made, initializers.Constant):
        assert (values == np.asarray(arguments["value"], "float64")).all()
    if isinstance(made, initializers.ForgetGate):
        assert values.tolist() == [0, 0, arguments["value"], arguments["value"], 0, 0, 0, 0]
    if isinstance(made, initializers.Uniform):
        assert (values >= arguments["low"]).all() and (values <= arguments["high"]).all()
    if isinstance(made, initializers.Orthogonal):
        gain = float(arguments["gain"])
        np.testing.assert_allclose(values.T @ values, np.eye(2) * gain**2, rtol=1e-9, atol=1e-9 * gain**2)


def use_loss(made: Any, arguments: dict[str, Any]) -> None:
    outputs, targets = X, X * 0.5
    if isinstance(made, losses.SoftmaxCrossEntropy):
        targets = LABELS
    elif isinstance(made, losses.BinaryCrossEntropy):
        outputs, targets = X[:, :1], FRACTION
    elif isinstance(made, losses.TripletMargin):
        outputs, targets = np.concatenate([X, X, X * 0.5], axis=1), np.zeros(8)
    with np.errstate(under="ignore"):
        value = made(outputs, targets)
    assert math.isfinite(value)
    if isinstance(made, losses.Huber):
        d = np.abs(outputs.astype("float64") - targets)
        delta = float(arguments["delta"])
        expected = np.where(d <= delta, d**2 / 2, delta * (d - delta / 2) if delta < math.inf else 0).mean()
        assert value == pytest.approx(expected, rel=1e-5)
    if isinstance(made, losses.HalfSquaredError):
        half = 0.5 * np.square(outputs - targets).sum()
        assert value == pytest.approx(half if arguments["reduction"] == "sum" else half / 8, rel=1e-5)


def use_metric(made: Any, arguments: dict[str, Any]) -> None:
    by_threshold = arguments.get("threshold") is not None
    outputs, targets = (X[:, 0], FRACTION) if by_threshold or arguments.get("average") == "binary" else (X, LABELS)
    if isinstance(made, metrics.AUC | metrics.LogLoss):
        outputs, targets = 1 / (1 + np.exp(-X[:, 0])), FRACTION
    value = made(outputs, targets)
    if isinstance(made, metrics.TopKAccuracy):
        ranks = (X[np.arange(8), LABELS][:, None] < X).sum(axis=1)
        assert value == (ranks < arguments["k"]).mean()
    if isinstance(made, metrics.Accuracy) and by_threshold:
        assert value == ((X[:, 0] > arguments["threshold"]) == (FRACTION > 0.5)).mean()


def use_optimizer(made: Any, arguments: dict[str, Any]) -> None:
    model = xpnet.Sequential([layers.Dense(3)], (4,), "cpu")
    before = model.state_dict()["0.weight"].astype("float64")
    with np.errstate(all="ignore"):
        model.train_on_batch(X, LABELS, loss="softmax_cross_entropy", optimizer=made)
    after = model.state_dict()["0.weight"]
    assert np.isfinite(after).all()
    if type(made) is optimizers.SGD and arguments["clip_norm"] is None and not arguments["weight_decay"]:
        shown = 1 / (1 + np.exp(-X[:, :1])) * 0  # the gradient from the softmax, in float64
        z = X.astype("float64") @ before + shown
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(8), LABELS] -= 1
        change = -float(arguments["learning_rate"]) * (X.T.astype("float64") @ p / 8)
        if type(arguments["nesterov"]) is bool and arguments["nesterov"]:
            change *= 1 + float(arguments["momentum"])
        np.testing.assert_allclose(after, before + change, rtol=1e-4, atol=1e-6 * (1 + np.abs(change).max()))


#: The documented formulas of schedules: (arguments, step) → rate.
SCHEDULES: dict[type, Callable[[dict[str, Any], int], float]] = {
    schedules.Constant: lambda a, s: a["rate"],
    schedules.StepDecay: lambda a, s: a["rate"] * float(a["factor"]) ** (s // a["every"]),
    schedules.ExponentialDecay: lambda a, s: a["rate"] * float(a["factor"]) ** (s / a["every"]),
    schedules.InverseTimeDecay: lambda a, s: a["rate"] / (1 + a["decay"] * s / a["every"]),
    schedules.CosineDecay: lambda a, s: a["final"] + (a["rate"] - a["final"]) * 0.5 * (
        1 + math.cos(math.pi * min(s / a["steps"], 1))),
    schedules.LinearWarmup: lambda a, s: a["after"] * min((s + 1) / a["steps"], 1),
}  # fmt: skip


def use_schedule(made: Any, arguments: dict[str, Any]) -> None:
    for step in (0, 1, 2, 5, 10):
        value = made(step)
        assert type(value) is float and 0 <= value < math.inf, (step, value)
        if type(made) in SCHEDULES and not callable(arguments.get("after")):
            assert value == pytest.approx(SCHEDULES[type(made)](arguments, step), rel=1e-9), step


def use_callback(made: Any, arguments: dict[str, Any]) -> None:
    model = xpnet.Sequential([layers.Dense(3)], (4,), "cpu")
    model.fit(X, LABELS, epochs=2, batch_size=4, callbacks=[made], verbose=0, validation_data=(X, LABELS))


def use_model(model: Any, arguments: dict[str, Any]) -> None:
    y = model.predict(X) if not model.is_built else model.predict(np.ones((2, *(n or 3 for n in model.input_shape))))
    assert np.isfinite(y).all() and y.dtype == model.dtype


def use_tensor(tensor: Any, arguments: dict[str, Any]) -> None:
    expected = arguments["shape"] if sequence(arguments["shape"]) else [arguments["shape"]]
    assert list(tensor.shape) == list(expected)
    model = xpnet.Model(tensor, layers.ReLU()(tensor), backend="cpu")
    if math.prod(n or 1 for n in tensor.shape) < 1000:
        x = np.ones((2, *(n or 3 for n in tensor.shape)), "float32")
        assert (model.predict(x) == x).all()


def built(**arguments: Any) -> Any:
    layer = layers.Dense(3)
    layer.build(**arguments)
    return layer


def use_built(layer: Any, arguments: dict[str, Any]) -> None:
    x = np.ones((2, *(n or 3 for n in layer.input_shape)), layer.context.dtype)
    assert layer.forward(x).shape[-1] == 3


def use_nothing(made: Any, arguments: dict[str, Any]) -> None:
    """For functions: that they have returned is enough."""


def use_fans(made: Any, arguments: dict[str, Any]) -> None:
    sizes = (1, 1, *np.atleast_1d(arguments["shape"]).astype(int))
    assert made == (math.prod(sizes[:-1]), math.prod(sizes[:-2]) * sizes[-1])


def parameters_of(thing: Any) -> tuple[str, ...]:
    signature = inspect.signature(thing).parameters.values()
    return tuple(p.name for p in signature if p.kind is not p.VAR_POSITIONAL)


def defaults_of(thing: Any, given: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(thing).parameters.values()
    return {p.name: given.get(p.name, p.default) for p in signature if p.kind is not p.VAR_POSITIONAL}


AUGMENT = [
    augment.ElasticDistortion(2.0, 1.0), augment.GaussianNoise(0.1), augment.MixUp(), augment.RandomAffine(),
    augment.RandomCrop(), augment.RandomErasing(), augment.RandomFlip(),
]  # fmt: skip

#: Arguments that have no default.
REQUIRED = {"value": 0.5, "rate": 0.1, "every": 3, "factor": 0.5, "steps": 4, "after": 0.1, "peak": 0.2}


def layer_targets() -> Iterator[Target]:
    examples = {type(layer): (shape_, layer) for shape_, layer in reversed(every.LAYERS)}
    examples |= {kind: found[0] for kind, found in every.MERGING.items()}
    examples |= {type(layer): ((5, 6, 2), layer) for layer in AUGMENT}
    for kind, (shape_, layer) in examples.items():
        parameters = parameters_of(kind)
        arguments = {n: v for n, v in {"name": None, **layer.get_config()}.items() if n in parameters}
        arguments = {**defaults_of(kind, {}), **arguments}

        def make(kind: Any = kind, layer: Any = layer, **given: Any) -> Any:
            inner = copy.deepcopy(layer.get_config()["layers"]) if kind is layers.Residual else []
            given = {n: copy.deepcopy(v) if isinstance(v, layers.Layer | list) else v for n, v in given.items()}
            return kind(*inner, **given)

        yield Target(kind.__name__, make, parameters, arguments, use_layer(shape_))


def object_targets() -> Iterator[Target]:
    uses = {
        initializers: (initializers.Initializer, use_initializer),
        losses: (losses.Loss, use_loss),
        metrics: (metrics.Metric, use_metric),
        optimizers: (optimizers.Optimizer, use_optimizer),
        schedules: (schedules.Schedule, use_schedule),
        callbacks: (callbacks.Callback, use_callback),
    }
    for module, (base, use) in uses.items():
        for public in module.__all__:
            kind = getattr(module, public)
            if isinstance(kind, type) and issubclass(kind, base) and kind is not base:
                given = dict(REQUIRED, path="a.csv" if kind is callbacks.CSVLogger else "a.safetensors", folder="logs")
                if kind is optimizers.SGD:
                    given["momentum"] = 0.5
                yield Target(public, kind, parameters_of(kind), defaults_of(kind, given), use)


def other_targets() -> Iterator[Target]:
    def sequential(layers_: Any = None, **given: Any) -> Any:
        return xpnet.Sequential(**{"layers": [layers.Dense(3)], **given})

    def graph(**given: Any) -> Any:
        x = xpnet.Input(4)
        return xpnet.Model(**{"inputs": x, "outputs": layers.Dense(3)(x), **given})

    store = ParameterStore(xpnet.get_backend("cpu"), "float32")
    names = ("input_shape", "backend", "seed", "dtype", "precision", "name")
    given = {"input_shape": (4,), "backend": "cpu", "seed": 0, "dtype": "float32", "precision": None, "name": None}
    yield Target("model", sequential, ("layers", *names), given, use_model)
    without = {n: v for n, v in given.items() if n != "input_shape"}
    yield Target("Model", graph, ("inputs", "outputs", *names[1:]), without, use_model)
    yield Target("Input", xpnet.Input, ("shape", "name"), {"shape": 4, "name": None}, use_tensor)
    building = {n: given[n] for n in ("input_shape", "backend", "seed", "dtype")}
    yield Target("build", built, tuple(building), building, use_built)
    yield Target("initializers.get", initializers.get, ("spec",), {}, use_nothing)
    yield Target("losses.get", losses.get, ("spec",), {}, use_nothing)
    yield Target("optimizers.get", optimizers.get, ("spec",), {}, use_nothing)
    yield Target("metrics.get", metrics.get, ("specs", "loss"), {"specs": "accuracy", "loss": None}, use_nothing)
    yield Target("fans", initializers.fans, ("shape",), {}, use_fans)
    report = {"counts": np.ones((2, 2)), "class_names": ["a", "b"]}
    yield Target("Report", metrics.Report, tuple(report), report, use_nothing)
    yield Target("format_logs", callbacks.format_logs, ("logs",), {}, use_nothing)
    state = {"optimizer": optimizers.SGD(), "store": store}
    yield Target("OptimizerState", optimizers.OptimizerState, tuple(state), state, use_nothing)


def targets() -> list[Target]:
    found = [*layer_targets(), *object_targets(), *other_targets()]
    return [target for target in found if target.parameters]


TARGETS = targets()


def kind_of(target: str, parameter: str) -> Kind:
    """What the parameter accepts. A model has the kinds "model.…" apart from its own."""
    own = [f"{target}.{parameter}", *([f"model.{parameter}"] if target == "Model" else []), parameter]
    return next(KINDS[key] for key in own if key in KINDS)


def names_of(target: str, parameter: str) -> set[str]:
    """The words of which a message must contain one, so that the reader knows which argument is wrong."""
    words = {parameter, parameter.removesuffix("_initializer")}
    if parameter == "spec":
        words |= {"optimizer", "loss", "initializer"}
    return words | {{"layers": "layer", "input_shape": "shape", "specs": "metric"}.get(parameter, parameter)}


def fault_of(target: Target, parameter: str, value: Any) -> str | None:
    """What is wrong with a row, or None: its outcome, or its time."""
    for _ in range(2):  # a second time if the first one takes long, perhaps because of another program
        start = time.monotonic()
        fault = fault_of_outcome(target, parameter, value)
        seconds = time.monotonic() - start
        if fault or seconds <= 5:
            return fault
    return f"took {seconds:.0f} s"


def fault_of_outcome(target: Target, parameter: str, value: Any) -> str | None:
    """What is wrong with the outcome of a row, or None."""
    accepts = kind_of(target.name, parameter)(value)
    arguments, made = {**target.arguments, parameter: value}, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = target.make(**arguments)
            target.use(made, arguments)
    except XpnetError as error:
        message = str(error)
        if accepts and made is None and f"{target.name}.{parameter}" not in JOINT and target.use in (
            use_layer, use_initializer, use_loss, use_metric, use_optimizer, use_schedule, use_callback
        ):  # fmt: skip
            return f"refused, although it is valid: {message:.200}"
        words = names_of(target.name, parameter) | ({target.name, "weight", "layer", "input"} if accepts else set())
        if not any(word in message for word in words):
            return f"the error does not name it: {type(error).__name__}: {message:.200}"
        if len(message) > 1500:
            return f"the message has {len(message):,} characters"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    else:
        if not accepts:
            return "accepted, although it is invalid"
    return None


def fault_of_assignment(target: Target, parameter: str, value: Any) -> str | None:
    """What is wrong if the value is assigned to the attribute of an object, or None: the constructor must agree."""
    expected, refusal = None, None
    try:
        expected = target.make(**{**target.arguments, parameter: value})
    except XpnetError as error:
        refusal = error
    made = target.make(**target.arguments)
    try:
        setattr(made, parameter, value)
    except XpnetError as error:
        same = refusal is not None and (type(error), str(error)) == (type(refusal), str(refusal))
        return None if same else f"its assignment raises {type(error).__name__}: {str(error)[:200]}"
    except BaseException as error:
        return f"its assignment raises {type(error).__name__}: {str(error)[:200]}"
    if refusal is not None:
        return "its assignment is accepted, although the constructor refuses it"
    values = [getattr(one, parameter) for one in (made, expected)]
    same = repr(values[0]) == repr(values[1]) if isinstance(values[0], layers.Layer) else np.array_equal(*values)
    return None if same else "its assignment sets another value than the constructor does"


def is_assigned(target: Target) -> bool:
    """Whether its arguments can be assigned later: not those of functions, nor what contains layers."""
    return (isinstance(target.make, type) and issubclass(target.make, ExplainedArguments)) or (
        target.use.__qualname__.startswith("use_layer.") and target.name not in ("Bidirectional", "Sequential")
    )


def rows_of(target: Target) -> Iterator[tuple[str, str, Any]]:
    for parameter in target.parameters:
        for text, value in VALUES.items():
            yield parameter, text, value


def count_rows() -> int:
    """How many calls and assignments these tests make."""
    return sum(map(rows_in, TARGETS))


def rows_in(target: Target) -> int:
    return len(target.parameters) * len(VALUES) * (2 if is_assigned(target) else 1)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_each_argument_works_or_is_refused_by_name(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faults_of = [fault_of, *([fault_of_assignment] if is_assigned(target) else [])]
    faults = [f"{parameter}={text}: {fault}" for parameter, text, value in rows_of(target)
              for one in faults_of if (fault := one(target, parameter, value))]  # fmt: skip
    assert not faults, "\n".join([f"{len(faults)} rows of {target.name}:", *faults])


@pytest.mark.parametrize("target", list(filter(is_assigned, TARGETS)), ids=lambda target: target.name)
def test_a_subclass_that_does_not_call_the_constructor_of_its_base_is_refused(target):
    kind = type(target.make(**target.arguments))
    own = type("Own", (kind,), {"__init__": lambda self: None})
    if all(hasattr(kind, parameter) for parameter in target.parameters):  # the class has values for all of them
        assert isinstance(own(), kind)
        return
    with pytest.raises(
        ArgumentTypeError, match=r"^Own: its constructor must call super\(\).__init__\(.*\), which sets "
    ):
        own()
    with pytest.raises(ArgumentTypeError, match=r"^Own: "):  # also as the base of another class
        type("Derived", (own,), {"__init__": lambda self: own.__init__(self)})()


def test_every_public_class_has_rows():
    names = {target.name for target in TARGETS}
    bases = {"Layer", "Distortion", "Initializer", "Loss", "Metric", "Optimizer", "Schedule", "Callback"}
    for module in (augment, callbacks, initializers, layers, losses, metrics, optimizers, schedules):
        for public in module.__all__:
            kind = getattr(module, public)
            if isinstance(kind, type) and public not in bases and parameters_of(kind) and public != "Run":
                assert public in names, f"{module.__name__}.{public}"


if __name__ == "__main__":
    print(f"{count_rows():,} rows of {len(TARGETS)} classes and functions in {os.path.relpath(Path(__file__))}")
