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
    "empty_list": lambda: [],
    "empty_dict": lambda: {},
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
        "on_interrupt": "", "verbose": "zero", "loss_weights": "none",
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
    return Misuse(
        f"fit_{name}", lambda s: call(s, "fit", **{k: v(s) for k, v in arguments.items()}), error, words
    )


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
    fits("weights_masked", ArgumentTypeError, "sample_weight", sample_weight=lambda s: np.ma.masked_array(np.ones(12), s.y)),
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
    fits("split_of_different_lengths", DataError, "6 samples", "5 targets", y=lambda s: s.y[:-1], validation_split=lambda s: 0.5),
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
