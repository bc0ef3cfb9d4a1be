"""Errors: their standard base classes, suggestions for misspelled names, and the checks of arguments."""

import fractions
import inspect
import math

import numpy as np
import pytest

import xpnet
from xpnet import augment, callbacks, datasets, errors, initializers, layers, losses, metrics, optimizers, schedules
from xpnet.config import choice, flag, integer, number, one_or_pair
from xpnet.errors import ArgumentError, XpnetError, unknown_name

STANDARD = {
    "ArgumentError": ValueError,
    "ShapeError": ValueError,
    "DataError": ValueError,
    "ArgumentTypeError": TypeError,
    "BackendError": RuntimeError,
    "DeviceMemoryError": MemoryError,
    "DistributedError": RuntimeError,
    "CaptureError": RuntimeError,
    "StateError": RuntimeError,
    "PositionError": IndexError,
    "UnknownNameError": AttributeError,
    "UnknownImportError": ImportError,
    "DivergenceError": RuntimeError,
    "MissingPackageError": ImportError,
    "FileError": OSError,
    "DownloadError": OSError,
}


def test_every_error_class_is_in_this_table():
    found = {n for n, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, XpnetError)}
    assert found == {*STANDARD, "XpnetError"}


@pytest.mark.parametrize(("name", "standard"), STANDARD.items())
def test_each_error_is_also_a_standard_exception(name, standard):
    error = getattr(errors, name)
    assert issubclass(error, standard) and error.__doc__
    with pytest.raises(standard, match="^why$"):
        raise error("why")


@pytest.mark.parametrize(
    ("call", "suggestion"),
    [
        (lambda: losses.get("softmax_crossentropy"), "'softmax_cross_entropy'"),
        (lambda: optimizers.get("adamm"), "'adam' or 'adamw'"),
        (lambda: metrics.get("acuracy", None), "'accuracy'"),
        (lambda: xpnet.get_backend("gqu"), "'gpu'"),
        (lambda: datasets.logic_gate("nandd"), "'nand' or 'and'"),
        (lambda: layers.Dense(2, weight_initializer="he_normall").build((3,), backend="cpu"), "'he_normal'"),
    ],
)
def test_the_nearest_name_is_suggested_for_a_misspelled_one(call, suggestion):
    with pytest.raises(ArgumentError, match=rf"^(\w+: \w+: )?unknown .* Did you mean {suggestion}.*Known: "):
        call()


def test_all_names_are_listed_if_none_is_similar():
    error = unknown_name("loss", "zzz", ["mse", "huber"])
    assert str(error) == "unknown loss 'zzz'. Known: huber, mse."


@pytest.mark.parametrize("spelling", ["Softmax-Cross-Entropy", " softmax_cross_entropy ", "SOFTMAX_CROSS_ENTROPY"])
def test_names_ignore_case_dashes_and_blanks(spelling):
    assert losses.get(spelling) == losses.SoftmaxCrossEntropy()


# The checks of arguments


@pytest.mark.parametrize(
    ("check", "value", "limits", "cleaned"),
    [
        (number, 2, {"at_least": 2, "at_most": 2}, 2),
        (number, np.float32(0.5), {"above": 0, "below": 1}, 0.5),
        (number, fractions.Fraction(1, 2), {}, 0.5),
        (number, math.inf, {"above": 0}, math.inf),
        (integer, np.int8(3), {}, 3),
        (integer, 3.0, {}, 3),
        (integer, -1, {"at_least": -1}, -1),
        (flag, np.True_, {}, True),
        (choice, "a", {"options": ("a", "b")}, "a"),
        (choice, None, {"options": ("a", None)}, None),
    ],
)
def test_valid_arguments_are_returned_as_python_values(check, value, limits, cleaned):
    got = check("Thing", "size", value, **limits)
    assert got == cleaned and type(got) is type(cleaned)


@pytest.mark.parametrize(
    ("check", "value", "limits", "expected"),
    [
        (number, -1, {"at_least": 0, "below": 1}, "a number of at least 0 and below 1"),
        (number, 1, {"at_least": 0, "below": 1}, "a number of at least 0 and below 1"),
        (number, 0, {"above": 0, "at_most": 5}, "a number above 0 and at most 5"),
        (number, 2, {"at_least": 0, "at_most": 1}, "a number from 0 to 1"),
        (number, math.inf, {"finite": True}, "a finite number"),
        *[(number, value, {}, "a number") for value in (math.nan, True, "1", None, [1], np.float64("nan"))],
        *[(integer, value, {}, "an integer of at least 1") for value in (0, 1.5, True, "1", None, math.inf, math.nan)],
        (integer, -1, {"at_least": 0, "also": "None"}, "an integer of at least 0, or None"),
        (integer, 7, {"at_most": 6}, "an integer from 1 to 6"),
        *[(flag, value, {}, "True or False") for value in (0, 1, None, "yes", 1.0)],
        (choice, "c", {"options": ("a", "b", None)}, '"a", "b" or None'),
        (choice, 3, {"options": ("a", "b")}, '"a" or "b"'),
    ],
)
def test_an_error_names_the_argument_the_expectation_and_the_value(check, value, limits, expected):
    for owner, place in (("Thing", "Thing: "), (losses.Huber(), "Huber: "), ("", "")):
        with pytest.raises(ArgumentError) as error:
            check(owner, "size", value, **limits)
        assert str(error.value) == f"{place}size must be {expected}, not {value!r}."


def test_the_nearest_choice_is_suggested():
    with pytest.raises(ArgumentError, match="must be \"mean\" or \"sum\", not 'maen'. Did you mean 'mean'\\?$"):
        losses.HalfSquaredError("maen")


@pytest.mark.parametrize("value", [2, (2, 3), [2, 3], np.array([2, 3])], ids=repr)
def test_one_or_pair_accepts_one_size_or_two(value):
    assert one_or_pair(integer, "", "size", value) == (tuple(value) if np.ndim(value) else 2)


@pytest.mark.parametrize("value", [0, (1, 0), (1, 2, 3), (), "ab"], ids=repr)
def test_the_error_for_a_pair_of_sizes_shows_both(value):
    with pytest.raises(ArgumentError) as error:
        one_or_pair(integer, "", "size", value)
    assert str(error.value).endswith(f"an integer of at least 1, or two, (vertical, horizontal), not {value!r}.")


REQUIRED = {
    "filters": 2,
    "folder": "runs",
    "groups": 2,
    "heads": 2,
    "kernel_size": 2,
    "units": 2,
    "path": "model.safetensors",
}


def flags():
    """(class, its required arguments, a flag of its constructor) for every flag of every public class."""
    for module in (augment, callbacks, initializers, layers, losses, metrics, optimizers, schedules):
        for name in module.__all__:
            parameters = inspect.signature(getattr(module, name)).parameters.values()
            for flag_ in (p.name for p in parameters if isinstance(p.default, bool)):
                yield (
                    getattr(module, name),
                    {p.name: REQUIRED.get(p.name) for p in parameters if p.default is p.empty},
                    flag_,
                )


@pytest.mark.parametrize(
    ("kind", "required", "name"), [*flags()], ids=lambda v: getattr(v, "__name__", "" if isinstance(v, dict) else v)
)
@pytest.mark.parametrize("value", [1, 0, None, "no"])
def test_every_flag_accepts_only_booleans(kind, required, name, value):
    kind(**required, **{name: np.False_})
    with pytest.raises(ArgumentError, match=f"^{kind.__name__}: {name} must be True or False, not {value!r}"):
        kind(**required, **{name: value})


@pytest.mark.parametrize("bad", ["a", None, True, np.nan, np.full(2, 0.5), 1j], ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        layers.Dense,
        lambda bad: xpnet.Sequential([layers.Dense(1, l1=bad)], (2,), "cpu"),
        layers.Dropout,
        layers.LeakyReLU,
        layers.ELU,
        layers.Step,
        layers.Rescale,
        layers.Reshape,
        layers.Permute,
        losses.Huber,
        losses.SoftmaxCrossEntropy,
        optimizers.SGD,
        lambda bad: optimizers.SGD(0.1, momentum=bad),
        lambda bad: optimizers.Adam(epsilon=bad),
        lambda bad: optimizers.Adam(weight_decay=bad),
        lambda bad: schedules.CosineDecay(0.1, bad),
        metrics.TopKAccuracy,
        lambda bad: callbacks.EarlyStopping(patience=bad),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(make, bad):
    with pytest.raises(ArgumentError):
        make(bad)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("compile", "fit"),
        ("cuda", "to"),
        ("eval", "forward"),
        ("zero_grad", "apply_gradients"),
        ("paramters", "parameters"),
    ],
)
def test_an_unknown_attribute_of_a_model_gets_a_suggestion(name, meant):
    model = xpnet.Sequential([layers.Dense(2)], (3,), backend="cpu")
    with pytest.raises(AttributeError, match=f"Sequential has no attribute '{name}'. Did you mean '{meant}'"):
        getattr(model, name)
    assert not hasattr(model, name)
