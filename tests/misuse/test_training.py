"""Wrong calls of the methods that train, evaluate and predict, and user code in them that misbehaves."""

import math
import threading

import numpy as np
import pytest
from misuse import Misuse, Subject, check

import xpnet
from xpnet import callbacks, layers, losses, metrics, optimizers, schedules
from xpnet.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    DivergenceError,
    FileError,
    ShapeError,
    StateError,
    XpnetError,
)

# Every argument of every method, with values that none of them takes ---------------------------------------------


class Thing:
    def __repr__(self):
        return "a thing"


#: Values by name. Each is wrong for every argument, apart from those that `TAKEN` lists.
VALUES = {
    "none": lambda: None,
    "text": lambda: "no such name",
    "empty_text": lambda: "",
    "bytes": lambda: b"x",
    "nan": lambda: math.nan,
    "infinity": lambda: math.inf,
    "zero": lambda: 0,
    "negative": lambda: -1,
    "huge": lambda: 2**64,
    "half": lambda: 0.5,
    "bool": lambda: True,
    "complex": lambda: 1j,
    "numpy_nan": lambda: np.float32("nan"),
    "array": lambda: np.ones(3),
    "empty_array": lambda: np.ones(0),
    "objects": lambda: np.array([None, "a"], dtype=object),
    "a_string_array": lambda: np.array(["a", "b"]),
    "list": lambda: [1],
    "empty_list": list,
    "empty_dict": dict,
    "dict": lambda: {"a": 1},
    "set": lambda: {1, 2},
    "generator": lambda: (i for i in range(3)),
    "object": Thing,
    "class": lambda: Thing,
    "function": lambda: lambda *arguments: None,
}
_FLAG = "bool"
_METRICS = "none empty_list"
_BATCH = "none huge bool"
#: {method: {argument: the values that it takes}}; a value that is larger than needed, such as 2**64, counts as all.
TAKEN = {
    "fit": {
        "x": "", "y": "", "loss": "", "optimizer": "", "epochs": "huge", "batch_size": "none huge",
        "validation_data": "none", "validation_split": "zero half", "metrics": _METRICS,
        "callbacks": "none empty_list empty_dict", "shuffle": _FLAG, "sample_weight": "none",
        "class_weight": "none array", "accumulate": "huge", "resume_from": "none", "distributed": "",
        "on_interrupt": "", "verbose": "zero bool", "loss_weights": "none",
    },
    "train_on_batch": {
        "x": "", "y": "", "loss": "none", "optimizer": "none", "metrics": _METRICS, "sample_weight": "none",
        "class_weight": "none array", "loss_weights": "none",
    },
    "evaluate": {
        "x": "", "y": "", "loss": "none", "metrics": _METRICS, "batch_size": "none huge", "sample_weight": "none",
        "loss_weights": "none",
    },
    "predict": {"x": "", "batch_size": "none huge", "as_device": _FLAG},
    "predict_proba": {"x": "", "batch_size": "none huge", "as_device": _FLAG},
    "activations": {"x": ""},
    "forward": {"x": "", "training": _FLAG},
    "backward": {"grad_output": "", "input_grad": _FLAG},
    "apply_gradients": {"optimizer": ""},
    "load_state_dict": {"state": "", "strict": _FLAG},
    "save": {"path": "text"},
    "to": {"backend": "", "dtype": "none"},
    "summary": {"batch_size": "none"},
    "check_gradients": {
        "x": "", "y": "", "loss": "", "samples": "huge", "step": "half", "inputs": _FLAG, "loss_weights": "none",
    },
    "explain_step": {"batch_size": "", "loss": "none", "optimizer": "none", "metrics": _METRICS, "times": _FLAG},
}  # fmt: skip
#: What errors call these arguments, where it is not their name.
CALLED = {"metrics": "metric", "path": "path", "resume_from": "", "state": "", "save": ""}


def call(subject, method, **changed):
    """Call a method with correct arguments, apart from these."""
    model = subject.model
    labelled, alone = {"x": subject.x, "y": subject.y}, {"x": subject.x}
    gradient = np.ones((12, 3), "float32")
    right = {
        "fit": {**labelled, "loss": "softmax_cross_entropy", "optimizer": "sgd", "verbose": 0},
        "train_on_batch": {**labelled, "loss": "softmax_cross_entropy", "optimizer": "sgd"},
        "evaluate": labelled,
        "predict": alone,
        "predict_proba": alone,
        "activations": alone,
        "forward": alone,
        "backward": {"grad_output": gradient},
        "apply_gradients": {"optimizer": "sgd"},
        "load_state_dict": {"state": model.state_dict()},
        "to": {"backend": "cpu"},
        "check_gradients": {**labelled, "loss": "softmax_cross_entropy"},
    }.get(method, {})
    if method in ("backward", "apply_gradients"):
        model.forward(subject.x, training=True)
    if method == "apply_gradients":
        model.backward(gradient)
    if method in ("check_gradients", "explain_step"):
        return getattr(xpnet, method)(model, **{**right, **changed})
    return getattr(model, method)(**{**right, **changed})


def with_value(method, argument, value):
    def wrong(subject):
        return call(subject, method, **{argument: VALUES[value]()})

    word = CALLED.get(argument, argument)
    return Misuse(f"{method}-{argument}-{value}", wrong, XpnetError, (word,) if word else ())


def check_all(rows, folder):
    """Check rows with new subjects, and name the row that fails."""
    for row in rows:
        try:
            check(row, Subject(folder))
        except AssertionError as error:
            raise AssertionError(f"{row.name}: {error}") from error


def refuse(what, error, function, *arguments):
    try:
        result = function(*arguments)
    except error:
        return
    except Exception as other:
        raise AssertionError(f"{what} ended in {type(other).__name__}: {other}") from other
    raise AssertionError(f"{what} was accepted, and gave {result!r:.80}")


ARGUMENTS = [(method, argument) for method, arguments in TAKEN.items() for argument in arguments]


@pytest.mark.parametrize(("method", "argument"), ARGUMENTS, ids="-".join)
def test_no_argument_takes_a_value_of_another_kind(method, argument, tmp_path):
    taken = TAKEN[method][argument].split()
    check_all((with_value(method, argument, value) for value in VALUES if value not in taken), tmp_path)


@pytest.mark.parametrize("argument", ["x", "y", "sample_weight"])
def test_a_validation_split_of_data_of_another_kind_is_refused(argument, tmp_path):
    def row(value):
        def wrong(subject):
            return call(subject, "fit", **{argument: VALUES[value](), "validation_split": 0.5})

        return Misuse(f"split-{argument}-{value}", wrong, XpnetError, ())

    check_all((row(value) for value in VALUES if (argument, value) != ("sample_weight", "none")), tmp_path)


# Data that does not fit the model or the loss ---------------------------------------------------------------------


def fits(name, error, *words, **arguments):
    """A row of `fit`. arguments: functions of the subject."""
    return Misuse(f"fit_{name}", lambda s: call(s, "fit", **{k: v(s) for k, v in arguments.items()}), error, words)


NAN = np.full((12, 4), np.nan, "float32")
ONE_HOT = np.eye(3, dtype="float32")[np.arange(12) % 3]


def with_one(array, value, at=3):
    array = np.array(array)
    array[at] = value
    return array


DATA = [
    fits("x_with_nan", DataError, "x contains NaN", "sample 3", x=lambda s: with_one(s.x, np.nan)),
    fits("x_with_infinity", DataError, "x contains NaN or infinity", x=lambda s: with_one(s.x, -np.inf)),
    fits("x_that_overflows_float32", DataError, "x contains NaN or infinity, as float32",
         x=lambda s: with_one(s.x.astype("float64"), 1e300)),
    fits("x_transposed", ShapeError, "(N, 4)", "(4, 12)", x=lambda s: s.x.T),
    fits("x_of_one_sample", ShapeError, "x[None]", x=lambda s: s.x[0]),
    fits("x_in_a_list", ShapeError, "not a list", x=lambda s: [s.x]),
    fits("x_3d", ShapeError, "(N, 4)", x=lambda s: s.x[:, None]),
    fits("x_ragged", ArgumentTypeError, "x cannot be converted", x=lambda s: [[1.0, 2.0], [1.0]]),
    fits("x_complex", ArgumentTypeError, "x must be an array of real numbers", x=lambda s: s.x.astype(complex)),
    fits("x_text", ArgumentTypeError, "x must be an array of real numbers", x=lambda s: s.x.astype(str)),
    fits("x_objects", ArgumentTypeError, "objects", x=lambda s: s.x.astype(object)),
    fits("x_dates", ArgumentTypeError, "datetime64", x=lambda s: s.x.astype(int).astype("datetime64[s]")),
    fits("x_structured", ArgumentTypeError, "x must be an array of real numbers",
         x=lambda s: np.zeros(12, dtype=[("a", "f4"), ("b", "f4")])),
    fits("x_masked", ArgumentTypeError, "mask", x=lambda s: np.ma.masked_array(s.x, s.x > 0)),
    fits("x_without_samples", DataError, "x is empty", x=lambda s: s.x[:0], y=lambda s: s.y[:0]),
    fits("x_shorter_than_y", DataError, "11 samples", "12 targets", x=lambda s: s.x[:-1]),
    fits("x_by_an_unknown_name", ArgumentError, "x", "'a'", x=lambda s: {"a": s.x}),
    fits("y_shorter_than_x", DataError, "12 samples", "11 targets", y=lambda s: s.y[:-1]),
    fits("y_a_number", DataError, "a single number", y=lambda s: 1),
    fits("label_too_large", DataError, "0 to 3", "0 to 2", y=lambda s: with_one(s.y, 3)),
    fits("label_negative", DataError, "-1", y=lambda s: with_one(s.y, -1)),
    fits("label_of_2_64", DataError, "18446744073709551615", y=lambda s: with_one(s.y.astype("uint64"), 2**64 - 1)),
    fits("label_large_int64", DataError, "9223372036854775807", y=lambda s: with_one(s.y, 2**63 - 1)),
    fits("label_large_float", DataError, "labels range", y=lambda s: with_one(s.y.astype("float64"), 1e30)),
    fits("labels_not_whole", DataError, "whole numbers", y=lambda s: s.y + 0.5),
    fits("labels_nan", DataError, "y contains NaN", y=lambda s: with_one(s.y.astype("float64"), np.nan)),
    fits("labels_infinite", DataError, "y contains NaN or infinity", y=lambda s: with_one(s.y.astype(float), np.inf)),
    fits("labels_text", ArgumentTypeError, "y", "numpy.unique", y=lambda s: np.array(["a", "b", "c"])[s.y]),
    fits("labels_text_list", ArgumentTypeError, "y", "numpy.unique", y=lambda s: ["a"] * 12),
    fits("labels_objects", ArgumentTypeError, "y", y=lambda s: s.y.astype(object)),
    fits("labels_with_none", ArgumentTypeError, "y", y=lambda s: [None] * 12),
    fits("labels_complex", ArgumentTypeError, "y", y=lambda s: s.y + 0j),
    fits("labels_masked", ArgumentTypeError, "mask", y=lambda s: np.ma.masked_array(s.y, s.y > 1)),
    fits("labels_2d", ShapeError, "(12, 2)", y=lambda s: np.stack([s.y, s.y], 1)),
    fits("labels_3d", ShapeError, "(12, 1, 1)", y=lambda s: s.y[:, None, None]),
    fits("labels_in_a_row", DataError, "12 samples", "1 targets", y=lambda s: s.y[None]),
    fits("one_hot_too_wide", ShapeError, "(12, 4)", y=lambda s: np.eye(4)[s.y]),
    fits("one_hot_too_narrow", ShapeError, "(12, 2)", y=lambda s: np.eye(2)[s.y % 2]),
    fits("probabilities_not_1", DataError, "1", y=lambda s: 2 * ONE_HOT),
    fits("probabilities_negative", DataError, "probabilities", y=lambda s: ONE_HOT * 2 - 1 / 3),
    fits("y_missing", ArgumentTypeError, "y", y=lambda s: None),
    fits("y_a_stream", ArgumentTypeError, "y", y=lambda s: xpnet.datasets.Stream(s.x, s.y)),
    fits("mse_of_labels", ShapeError, "(12,)", loss=lambda s: "mse"),
    fits("mse_too_narrow", ShapeError, "(12, 2)", loss=lambda s: "mse", y=lambda s: s.x[:, :2]),
    fits("mse_transposed", DataError, "12 samples", "3 targets", loss=lambda s: "mse", y=lambda s: s.x[:, :3].T),
    fits("mse_nan", DataError, "y contains NaN", loss=lambda s: "mse", y=lambda s: NAN[:, :3]),
    fits("bce_of_3", DataError, "[0, 1]", loss=lambda s: "binary_cross_entropy", y=lambda s: 3 * ONE_HOT),
    fits("triplets_of_3", ArgumentError, "loss", loss=lambda s: "triplet_margin_loss"),
    fits("loss_class", ArgumentTypeError, "MeanSquaredError(...)", loss=lambda s: losses.MeanSquaredError),
    fits("loss_dict_of_other_names", ArgumentError, "loss", "'digit'", loss=lambda s: {"digit": "mse"}),
    fits("two_losses", ArgumentTypeError, "loss", loss=lambda s: ["mse", "mse"]),
    fits("optimizer_class", ArgumentTypeError, "SGD(...)", optimizer=lambda s: optimizers.SGD),
    fits("optimizer_misspelled", ArgumentError, "Did you mean 'adam'", optimizer=lambda s: "adma"),
    fits("metric_misspelled", ArgumentError, "accuracy", metrics=lambda s: ["acuracy"]),
    fits("metric_class", ArgumentTypeError, "F1(...)", metrics=lambda s: [metrics.F1]),
    fits("metric_twice", ArgumentError, "accuracy", metrics=lambda s: ["accuracy", "accuracy"]),
    fits("metric_matrix", ArgumentError, "evaluate", metrics=lambda s: ["confusion_matrix"]),
    fits("metric_of_numbers", ShapeError, "mse", metrics=lambda s: ["mse"]),
    fits("metric_2_classes", ArgumentError, "Precision", metrics=lambda s: [metrics.Precision(average="binary")]),
    fits("weights_nan", DataError, "sample_weight", sample_weight=lambda s: with_one(np.ones(12), np.nan)),
    fits("weights_infinite", DataError, "sample_weight", sample_weight=lambda s: with_one(np.ones(12), np.inf)),
    fits("weights_overflow", DataError, "sample_weight", sample_weight=lambda s: np.full(12, 1e300)),
    fits("weights_negative", DataError, "sample_weight", sample_weight=lambda s: with_one(np.ones(12), -1)),
    fits("weights_zero", DataError, "sample_weight", sample_weight=lambda s: np.zeros(12)),
    fits("weights_false", DataError, "sample_weight", sample_weight=lambda s: np.zeros(12, bool)),
    fits("weights_short", ShapeError, "sample_weight", "(12,)", sample_weight=lambda s: np.ones(11)),
    fits("weights_2d", ShapeError, "sample_weight", "(12, 1)", sample_weight=lambda s: np.ones((12, 1))),
    fits("weights_number", ShapeError, "sample_weight", sample_weight=lambda s: 2.0),
    fits("weights_text", ArgumentTypeError, "sample_weight", sample_weight=lambda s: ["1"] * 12),
    fits("weights_complex", ArgumentTypeError, "sample_weight", sample_weight=lambda s: np.ones(12) + 0j),
    fits("weights_masked", ArgumentTypeError, "sample_weight",
         sample_weight=lambda s: np.ma.masked_array(np.ones(12), s.y)),
    fits("weights_other_output", ArgumentError, "sample_weight", sample_weight=lambda s: {"digit": np.ones(12)}),
    fits("class_weight_nan", ArgumentError, "class_weight", class_weight=lambda s: {0: np.nan}),
    fits("class_weight_negative", ArgumentError, "class_weight", class_weight=lambda s: {0: -1.0}),
    fits("class_weight_infinite", ArgumentError, "class_weight", class_weight=lambda s: {0: np.inf}),
    fits("class_weight_zero", DataError, "class_weight", class_weight=lambda s: np.zeros(3)),
    fits("class_weight_text", ArgumentError, "class_weight", class_weight=lambda s: {0: "2"}),
    fits("class_weight_numerals", ArgumentError, "class_weight", class_weight=lambda s: ["1", "1", "1"]),
    fits("class_weight_of_text", ArgumentError, "class_weight", class_weight=lambda s: {"0": 1.0}),
    fits("class_weight_of_half", ArgumentError, "class_weight", class_weight=lambda s: {0.5: 1.0}),
    fits("class_weight_short", ArgumentError, "class_weight", "3 weights", class_weight=lambda s: [1.0, 2.0]),
    fits("class_weight_long", ArgumentError, "class_weight", "class 3", class_weight=lambda s: [1.0] * 4),
    fits("class_weight_2d", ArgumentError, "class_weight", class_weight=lambda s: np.ones((3, 3))),
    fits("class_weight_none", ArgumentError, "class_weight", class_weight=lambda s: {0: None}),
    fits("class_weight_misspelled", ArgumentError, "balanced", class_weight=lambda s: "ballanced"),
    fits("class_weight_of_mse", ArgumentError, "classification", class_weight=lambda s: {0: 2.0},
         loss=lambda s: "mse", y=lambda s: s.x[:, :3]),
    fits("validation_3_arrays", ArgumentError, "validation_data", validation_data=lambda s: (s.x, s.y, None, None)),
    fits("validation_1_array", ArgumentError, "validation_data", validation_data=lambda s: (s.x,)),
    fits("validation_array", ArgumentError, "validation_data", validation_data=lambda s: s.x),
    fits("validation_dict", ArgumentError, "validation_data", validation_data=lambda s: {"x": s.x, "y": s.y}),
    fits("validation_width", ShapeError, "validation x", validation_data=lambda s: (s.x[:, :2], s.y)),
    fits("validation_labels", DataError, "validation y", validation_data=lambda s: (s.x, s.y + 3)),
    fits("validation_nan", DataError, "validation x", validation_data=lambda s: (NAN, s.y)),
    fits("validation_empty", DataError, "validation x", validation_data=lambda s: (s.x[:0], s.y[:0])),
    fits("validation_without_y", ArgumentTypeError, "validation y", validation_data=lambda s: (s.x, None)),
    fits("validation_weights", ShapeError, "sample_weight", validation_data=lambda s: (s.x, s.y, np.ones(3))),
    fits("validation_zero_weights", DataError, "sample_weight", validation_data=lambda s: (s.x, s.y, np.zeros(12))),
    fits("validation_twice", ArgumentError, "not both", validation_data=lambda s: (s.x, s.y),
         validation_split=lambda s: 0.5),
    fits("split_1", ArgumentError, "validation_split", validation_split=lambda s: 1.0),
    fits("split_too_small", ArgumentError, "validation_split", validation_split=lambda s: 1e-9),
    fits("split_negative", ArgumentError, "validation_split", validation_split=lambda s: -0.5),
    fits("split_of_different_lengths", DataError, "6 samples", "5 targets", y=lambda s: s.y[:-1],
         validation_split=lambda s: 0.5),
    fits("split_of_longer_targets", DataError, "samples", y=lambda s: [*s.y, 0, 0], validation_split=lambda s: 0.5),
    fits("split_with_short_weights", XpnetError, "sample_weight", sample_weight=lambda s: np.ones(11),
         validation_split=lambda s: 0.5),
    fits("split_with_long_weights", XpnetError, "sample_weight", sample_weight=lambda s: np.ones(15),
         validation_split=lambda s: 0.5),
    fits("split_with_number_y", XpnetError, "y", y=lambda s: 3, validation_split=lambda s: 0.5),
    fits("split_with_number_x", XpnetError, "0 samples", x=lambda s: 3, validation_split=lambda s: 0.5),
    fits("split_with_text", XpnetError, "x", x=lambda s: "abc", validation_split=lambda s: 0.5),
    fits("split_with_number_weights", XpnetError, "sample_weight", sample_weight=lambda s: 2.0,
         validation_split=lambda s: 0.5),
    fits("resume_from_a_folder", FileError, "folder", resume_from=lambda s: s.folder),
    fits("resume_from_nowhere", FileError, "no such file", resume_from=lambda s: s.folder / "none.safetensors"),
    fits("callback_class", ArgumentTypeError, "with ()", callbacks=lambda s: callbacks.EarlyStopping),
    fits("callback_text", ArgumentTypeError, "callbacks", callbacks=lambda s: "early_stopping"),
    fits("callback_twice", ArgumentError, "twice", callbacks=lambda s: [callbacks.EarlyStopping("loss")] * 2),
    fits("monitor_misspelled", ArgumentError, "loss", callbacks=lambda s: [callbacks.EarlyStopping("los")]),
    fits("monitor_without_validation", ArgumentError, "validation_data", callbacks=lambda s: callbacks.EarlyStopping()),
    fits("no_folder_for_a_checkpoint", FileError, "folder", callbacks=lambda s: callbacks.Checkpoint(s.folder / "a/b")),
    fits("no_folder_for_a_log", FileError, "a/b.csv", callbacks=lambda s: callbacks.CSVLogger(s.folder / "a/b.csv")),
    fits("loss_weights_of_one", ArgumentError, "loss_weights", loss_weights=lambda s: [1.0]),
    fits("distributed_text", ArgumentError, "distributed", distributed=lambda s: "yes"),
]  # fmt: skip


@pytest.mark.parametrize("row", DATA, ids=lambda row: row.name)
def test_data_that_does_not_fit(row, tmp_path):
    check(row, Subject(tmp_path))


# Code of the user that misbehaves ---------------------------------------------------------------------------------


def returning(value):
    return lambda *arguments, **named: value


class MyLoss(losses.Loss):
    def samples(self, backend, outputs, targets):
        return backend.xp.mean(backend.xp.square(outputs - targets), axis=-1)

    def gradient(self, backend, outputs, targets):
        return 2.0 * (outputs - targets) / 3.0


class MyMetric(metrics.Metric):
    name = "mine"

    def sums(self, backend, outputs, targets, weights):
        return backend.xp.asarray([1.0, 2.0])


class MyOptimizer(optimizers.Optimizer):
    slots = ("velocity",)

    def __init__(self, learning_rate=0.1):
        super().__init__(learning_rate, 0.0, None)

    def update(self, xp, w, g, slots, t, rate, k):
        w -= rate * g


def own(base, *arguments, **changed):
    """An object of a class with these methods or attributes."""
    return type(base.__name__, (base,), {"__module__": __name__, **changed})(*arguments)


def write_into_outputs(self, backend, outputs, targets, *others):
    outputs *= 0.0
    return np.array([1.0, 2.0]) if others else outputs[:, 0] + 1.0


def write_into_targets(self, backend, outputs, targets, *others):
    targets *= 0
    return np.array([1.0, 2.0]) if others else outputs[:, 0] + 1.0


def write_into_checked_targets(self, backend, targets, output_shape):
    targets *= 2


WRONG_ARRAYS = {
    "none": returning(None),
    "text": returning("x"),
    "list": returning([1.0] * 12),
    "number": returning(1.0),
    "short": returning(np.ones(5, "float32")),
    "objects": returning(np.array([None] * 12)),
    "integers": returning(np.ones(12, int)),
    "other_arguments": lambda self: None,
    "writes_into_outputs": write_into_outputs,
    "writes_into_targets": write_into_targets,
}
#: {method of a loss: the calls that use it}
LOSS_METHODS = {
    "samples": "fit train_on_batch evaluate check_gradients",
    "gradient": "fit train_on_batch check_gradients",
    "samples_and_gradient": "fit train_on_batch",
    "check_targets": "fit train_on_batch evaluate check_gradients",
}


def with_loss(name, call_name, loss, *words, error=XpnetError):
    def wrong(subject):
        subject.y = subject.x[:, :3].copy()
        return call(subject, call_name, loss=loss())

    def whole(subject):
        labels = subject.y
        try:
            wrong(subject)
        finally:
            subject.y = labels

    return Misuse(f"{call_name}_{name}", whole, error, words)


LOSSES = [
    with_loss(f"{method}_{name}", call_name, lambda m=method, f=function: own(MyLoss, **{m: f}), "MyLoss")
    for method, calls in LOSS_METHODS.items()
    for name, function in WRONG_ARRAYS.items()
    for call_name in calls.split()
    if not (method == "check_targets" and name in ("integers", "writes_into_outputs", "writes_into_targets"))
] + [
    with_loss("targets_written", "fit", lambda: own(MyLoss, check_targets=write_into_checked_targets), "check_targets"),
    with_loss("reduction", "fit", lambda: own(MyLoss, reduction="mode"), "reduction", '"mean" or "sum"'),
    with_loss("reduction_none", "evaluate", lambda: own(MyLoss, reduction=None), "reduction"),
    with_loss("class_weight", "fit", lambda: own(MyLoss, class_weight=3), "class_weight"),
    with_loss("a_method_that_is_a_number", "fit", lambda: own(MyLoss, samples=3), "samples must be a method"),
]  # fmt: skip


def with_metric(row, /, *words, error=XpnetError, trains=False, **changed):
    return [
        Misuse(f"{method}_metric_{row}",
               lambda s, m=method: call(s, m, metrics=[own(MyMetric, **changed)], **BATCHES.get(m, {})),
               error, words, trains=trains and method == "fit")
        for method in ("fit", "evaluate", "train_on_batch")
        if not (trains and method == "train_on_batch")
    ]  # fmt: skip


BATCHES = {"fit": {"batch_size": 5}, "evaluate": {"batch_size": 5}}
METRICS = [
    row
    for rows in [
        *(with_metric(f"sums_{name}", "sums", sums=WRONG_ARRAYS[name])
          for name in ("none", "text", "list", "number", "objects", "other_arguments", "writes_into_outputs",
                       "writes_into_targets")),
        *(with_metric(f"result_{name}", "result", result=returning(value))
          for name, value in {"none": None, "text": "x", "list": [1.0], "array": np.ones(2)}.items()),
        with_metric("sums_empty", "two numbers", "define result", sums=returning(np.ones(0))),
        with_metric("sums_2d", "two numbers", sums=returning(np.ones((2, 2)))),
        with_metric("result_other_arguments", "MyMetric", "result(self, sums)", result=lambda self: 1.0),
        with_metric("sums_by_sample", "one shape for all batches", trains=True,
                    sums=lambda self, backend, outputs, targets, weights: outputs[:, 0], result=returning(1.0)),
        *(with_metric(f"merge_{name}", "merge", "MyMetric", trains=True, merge=returning(value))
          for name, value in {"none": None, "text": "x", "list": [1.0, 2.0], "objects": np.array([None])}.items()),
        with_metric("merge_other_arguments", "merge", "MyMetric", merge=lambda self: 1.0),
        *(with_metric(f"bind_{name}", "bind", bind=returning(value))
          for name, value in {"none": None, "text": "x"}.items()),
        *(with_metric(f"name_{i}", "name", name=value)
          for i, value in enumerate([3, None, "", ["a"], "loss", "learning_rate", "val_loss"])),
        with_metric("output", "output", output=3),
        with_metric("check_targets", "MyMetric", "check_targets", check_targets=lambda self: None),
    ]
    for row in rows
]  # fmt: skip


def with_optimizer(name, make, *words, error=XpnetError, trains=False):
    return [
        Misuse(f"{method}_optimizer_{name}",
               lambda s, m=method: call(s, m, optimizer=make(), **({"batch_size": 4} if m == "fit" else {})),
               error, words, trains=trains)
        for method in (("fit",) if trains else ("fit", "train_on_batch", "apply_gradients"))
    ]  # fmt: skip


def changed(optimizer, **attributes):
    for name, value in attributes.items():
        setattr(optimizer, name, value)
    return optimizer


def zero_the_gradient(self, xp, w, g, slots, t, rate, k):
    g.fill(0.0)


def make_a_new_array(self, xp, w, g, slots, t, rate, k):
    w = w - rate * g


def write_nan(self, xp, w, g, slots, t, rate, k):
    w.fill(math.nan)


class WithoutSuper(optimizers.Optimizer):
    def __init__(self):
        pass

    update = MyOptimizer.update


RATES = {"none": None, "text": "x", "nan": math.nan, "infinity": math.inf, "negative": -0.1, "bool": True,
         "array": np.ones(2), "complex": 1j, "list": [0.1]}  # fmt: skip
OPTIMIZERS = [
    row
    for rows in [
        *(with_optimizer(f"update_{f.__name__}", lambda f=f: own(MyOptimizer, update=f), "MyOptimizer: update has")
          for f in (zero_the_gradient, make_a_new_array, write_nan)),
        with_optimizer("update_other_arguments", lambda: own(MyOptimizer, update=lambda self, w, g: None), "update"),
        with_optimizer("without_update", lambda: own(MyOptimizer, update=optimizers.Optimizer.update), "update"),
        with_optimizer("without_super", WithoutSuper, "super().__init__"),
        *(with_optimizer(f"slots_{i}", lambda v=value: own(MyOptimizer, slots=v), "slots")
          for i, value in enumerate([3, None, "velocity", ("a", "a"), (1, 2), ("the weights",)])),
        *(with_optimizer(f"rate_{name}", lambda v=value: own(MyOptimizer, rate=returning(v)), "number")
          for name, value in RATES.items()),
        *(with_optimizer(f"schedule_{name}", lambda v=value: optimizers.SGD(returning(v)), "SGD", "number")
          for name, value in RATES.items()),
        *(with_optimizer(f"nested_schedule_{name}",
                         lambda v=value: optimizers.SGD(schedules.LinearWarmup(3, returning(v))), "LinearWarmup")
          for name, value in RATES.items()),
        with_optimizer("schedule_later_nan", lambda: optimizers.SGD(lambda step: 0.1 if step < 2 else math.nan),
                       "step 2", trains=True),
        with_optimizer("schedule_without_a_step", lambda: optimizers.SGD(lambda: 0.1), "one argument, the step"),
        with_optimizer("schedule_of_two", lambda: optimizers.SGD(lambda epoch, step: 0.1), "one argument, the step"),
        with_optimizer("schedule_class", lambda: optimizers.SGD(schedules.Constant), "learning_rate"),
        *(with_optimizer(f"learning_rate_{name}", lambda v=value: changed(optimizers.SGD(), learning_rate=v),
                         "SGD: learning_rate") for name, value in RATES.items()),
        *(with_optimizer(f"weight_decay_{name}", lambda v=value: changed(optimizers.SGD(), weight_decay=v),
                         "SGD: weight_decay") for name, value in RATES.items()),
        *(with_optimizer(f"clip_norm_{name}", lambda v=value: changed(optimizers.SGD(), clip_norm=v),
                         "SGD: clip_norm") for name, value in RATES.items() if name not in ("none", "infinity")),
    ]
    for row in rows
]  # fmt: skip


@pytest.mark.parametrize("row", [*LOSSES, *METRICS, *OPTIMIZERS], ids=lambda row: row.name)
def test_code_of_the_user_that_misbehaves(row, tmp_path):
    check(row, Subject(tmp_path))


HOOKS = ["on_train_begin", "on_epoch_begin", "on_step_end", "on_epoch_end", "on_train_end"]
FIT = {"loss": "softmax_cross_entropy", "optimizer": "sgd", "batch_size": 4, "epochs": 2, "verbose": 0}


def with_callback(name, error, *words, others=lambda folder: (), trains=True, **methods):
    def wrong(subject):
        callback = own(callbacks.Callback, **methods)
        return subject.model.fit(subject.x, subject.y, callbacks=[callback, *others(subject.folder)], **FIT)

    return Misuse(f"callback_{name}", wrong, error, words, trains=trains)


def checkpoint(folder):
    return [callbacks.Checkpoint(folder / "run.safetensors")]


def set_rate(value):
    def hook(self, *arguments):
        self.run.learning_rate = value

    return hook


def change_logs(**changes):
    return lambda self, model, epoch, logs: logs.update(changes)


def misuse_the_model(action):
    return lambda self, model, *arguments: action(model)


GRADIENT = np.ones((12, 3), "float32")
DURING_FIT = {
    "fit": lambda m: m.fit(np.ones((6, 4)), np.zeros(6, int), verbose=0),
    "train_on_batch": lambda m: m.train_on_batch(np.ones((6, 4)), np.zeros(6, int), "softmax_cross_entropy", "sgd"),
    "apply_gradients": lambda m: m.apply_gradients("sgd"),
    "to": lambda m: m.to("cpu", dtype="float64"),
}
CALLBACKS = [
    *(with_callback(f"rate_{name}_{hook}", ArgumentError, "learning_rate", "finite", **{hook: set_rate(value)})
      for name, value in RATES.items() for hook in ("on_train_begin", "on_step_end", "on_epoch_end")),
    *(with_callback(f"{hook}_other_arguments", ArgumentTypeError, hook, "self, model", trains=False,
                    **{hook: lambda self: None}) for hook in HOOKS),
    *(with_callback(f"{hook}_number", ArgumentTypeError, f"{hook} must be a method", trains=False, **{hook: 3})
      for hook in HOOKS),
    *(with_callback(name, ArgumentError, name, "Did you mean", right, trains=False, **{name: lambda self: None})
      for name, right in {"on_batch_end": "on_step_end", "on_epoch_start": "on_epoch_begin",
                          "on_training_end": "on_train_end", "on_train_batch_end": "on_step_end"}.items()),
    *(with_callback(f"{name}_in_{hook}", StateError, "fit is running", **{hook: misuse_the_model(action)})
      for name, action in DURING_FIT.items() for hook in HOOKS),
    *(with_callback(f"state_{name}", XpnetError, "state", others=checkpoint, state=returning(value))
      for name, value in {"none": None, "text": "x", "list": [1], "numbered": {1: 2}, "texts": {"a": np.array(["x"])},
                          "objects": {"a": np.array([None])}, "object": {"a": Thing()}, "set": {"a": {1}}}.items()),
    *(with_callback(f"monitored_{name}", ArgumentError, "loss", "number",
                    others=lambda folder: [callbacks.EarlyStopping("loss")], on_epoch_end=change_logs(loss=value))
      for name, value in {"none": None, "text": "x", "array": np.ones(3)}.items()),
    with_callback("logs_cleared", ArgumentError, "loss", others=lambda folder: [callbacks.EarlyStopping("loss")],
                  on_epoch_end=lambda self, model, epoch, logs: logs.clear()),
    *(with_callback(f"stop_{i}", ArgumentTypeError, "stop", "text",
                    on_step_end=lambda self, model, step, v=value: self.stop(v)) for i, value in enumerate([None, 3])),
    with_callback("nan_weights", DivergenceError, "NaN",
                  on_step_end=lambda self, model, step: model.parameters[0].value.fill(math.nan)),
]  # fmt: skip


@pytest.mark.parametrize("row", CALLBACKS, ids=lambda row: row.name)
def test_callbacks_that_misbehave(row, tmp_path):
    check(row, Subject(tmp_path))


def test_logs_of_any_kind_are_printed(tmp_path, capsys):
    subject = Subject(tmp_path)
    callback = own(callbacks.Callback, on_epoch_end=change_logs(note="good", nothing=None, several=np.ones(2)))
    subject.model.fit(subject.x, subject.y, callbacks=[callback], **{**FIT, "verbose": 2})
    assert "note 'good'  nothing None  several array([1., 1.])" in capsys.readouterr().out


class OwnError(Exception):
    pass


def raising(error):
    def method(self, *arguments, **named):
        raise error

    return method


OWN_CODE = {
    **{f"callback_{hook}": lambda f, hook=hook: {"callbacks": [own(callbacks.Callback, **{hook: f})]}
       for hook in HOOKS},
    **{f"metric_{m}": lambda f, m=m: {"metrics": [own(MyMetric, **{m: f})], "batch_size": 5}
       for m in ("sums", "result", "bind", "check_targets", "merge")},
    "optimizer_update": lambda f: {"optimizer": own(MyOptimizer, update=f)},
    "optimizer_rate": lambda f: {"optimizer": own(MyOptimizer, rate=f)},
    "schedule": lambda f: {"optimizer": optimizers.SGD(lambda step: f(None))},
    **{f"loss_{m}": lambda f, m=m: {"loss": own(MyLoss, **{m: f}), "targets": True}
       for m in ("samples", "gradient", "check_targets")},
}  # fmt: skip


@pytest.mark.parametrize("where", OWN_CODE)
@pytest.mark.parametrize(
    "error",
    [kind("mine") for kind in (OwnError, TypeError, KeyError, AssertionError)],
    ids=repr,
)
def test_an_error_of_the_user_passes_unchanged(where, error, tmp_path):
    subject, arguments = Subject(tmp_path), OWN_CODE[where](raising(error))
    targets = subject.x[:, :3] if arguments.pop("targets", False) else subject.y
    subject.step()
    before = subject.model.state_dict()
    with pytest.raises(type(error)) as raised:
        subject.model.fit(subject.x, targets, **{**FIT, **arguments})
    assert raised.value is error
    after = subject.model.state_dict()
    if "merge" not in where and "on_step_end" not in where and "_end" not in where:
        assert all((after[name] == value).all() for name, value in before.items())
    subject.step()


# Losses and metrics by themselves ---------------------------------------------------------------------------------

OUTPUTS = np.random.default_rng(0).normal(size=(6, 3))
LABELS = np.array([0, 1, 2, 0, 1, 2])
TARGETS_OF = {
    losses: {"BinaryCrossEntropy": OUTPUTS > 0, "KLDivergence": LABELS, "SoftmaxCrossEntropy": LABELS},
    metrics: {name: LABELS for name in metrics.__all__ if name not in ("R2", "MeanSquaredError", "MeanAbsoluteError")},
}
WRONG_SAMPLES = {
    **{name: value for name, value in VALUES.items() if name not in ("none", "array")},
    "none": lambda: None,
    "a_scalar": lambda: np.array(2.0),
    "no_samples": lambda: np.ones((0, 3)),
    "no_columns": lambda: np.ones((6, 0)),
    "five_samples": lambda: np.ones((5, 3)),
    "of_objects": lambda: np.full((6, 3), None),
    "complex_array": lambda: np.ones((6, 3)) + 1j,
    "masked": lambda: np.ma.masked_array(np.ones((6, 3)), True),
}
LOSSES_AND_METRICS = [
    (module, name)
    for module in TARGETS_OF
    for name in module.__all__
    if isinstance(getattr(module, name), type) and name not in ("Loss", "Metric", "Report")
]


@pytest.mark.parametrize(("module", "name"), LOSSES_AND_METRICS, ids=lambda v: v if isinstance(v, str) else "")
def test_losses_and_metrics_refuse_what_is_not_samples(module, name):
    thing, targets = getattr(module, name)(), TARGETS_OF[module].get(name, OUTPUTS[::-1])
    outputs = np.full((6, 3), 1 / 3) if name == "LogLoss" else OUTPUTS
    thing(outputs, targets)
    weights = {"negative_weights": lambda: -np.ones(6), "zero_weights": lambda: np.zeros(6),
               "huge_weights": lambda: np.full(6, 1e300), "nan_weights": lambda: np.full(6, np.nan)}  # fmt: skip
    for what, make in WRONG_SAMPLES.items():
        for place in range(2):
            given = [make() if i == place else right for i, right in enumerate((outputs, targets))]
            refuse(f"{what} as argument {place}", XpnetError, thing, *given)
    for what, make in {**WRONG_SAMPLES, **weights}.items():
        if what != "none":
            refuse(f"{what} as weights", XpnetError, thing, outputs, targets, make())


def test_whole_weights_beyond_integers_stay_numbers_in_a_confusion_matrix():
    weights = np.array([2.0**70, 1.0, 1.0])
    matrix = metrics.ConfusionMatrix()(np.eye(2)[[0, 1, 1]], [0, 1, 1], weights)
    assert matrix.tolist() == [[2.0**70, 0.0], [0.0, 2.0]]


def test_log_loss_refuses_probabilities_that_do_not_add_up():
    with pytest.raises(DataError, match="log_loss: outputs must be probabilities of classes, which add up to 1"):
        metrics.LogLoss()(np.ones((6, 4)), LABELS)


# Threads ----------------------------------------------------------------------------------------------------------


def test_beside_fit_calls_are_refused_or_exact(tmp_path):
    subject = Subject(tmp_path)
    model, x, started, finish = subject.model, subject.x, threading.Event(), threading.Event()

    def hold(self, model, step):
        started.set()
        finish.wait(30)

    fitting = threading.Thread(
        target=model.fit, args=(x, subject.y), kwargs={**FIT, "callbacks": [own(callbacks.Callback, on_step_end=hold)]}
    )
    fitting.start()
    assert started.wait(30)
    try:
        weights = model.state_dict()
        for name, action in {
            **DURING_FIT,
            "load_state_dict": lambda m: m.load_state_dict(weights),
            "forward": lambda m: m.forward(x, training=True),
            "backward": lambda m: m.backward(GRADIENT),
        }.items():
            refuse(f"{name} beside fit", StateError, action, model)
        twin = xpnet.Sequential(
            [layers.Dense(5), layers.Tanh(), layers.Dense(3)], input_shape=(4,), backend="cpu", seed=1
        )
        twin.load_state_dict(weights)
        np.testing.assert_array_equal(model.predict(x), twin.predict(x))
        with pytest.raises(ShapeError):
            model.predict(x[:, :2])
        after = model.state_dict()
        assert all((after[name] == value).all() for name, value in weights.items())
    finally:
        finish.set()
        fitting.join()
    subject.step()
