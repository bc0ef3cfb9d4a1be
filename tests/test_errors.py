"""Errors: their standard base classes, suggestions for misspelled names, and the checks of arguments."""

import fractions
import inspect
import math
import re

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
    "UnknownKeyError": KeyError,
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


def model_of(*stack):
    return xpnet.Sequential([layers.Dense(2), *stack], (3,), backend="cpu")


OBJECTS = {"Sequential": model_of, "Dense": lambda: model_of()[0], "Adam": optimizers.Adam}


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        ("Sequential", "compile", "arguments of fit"),
        ("Sequential", "cuda", r'to\("gpu"\)'),
        ("Sequential", "eval", "training=True"),
        ("Sequential", "zero_grad", "Leave it out"),
        ("Sequential", "predict_classes", "argmax"),
        ("Sequential", "n_iter_", r"model\.history"),
        ("Sequential", "paramters", "Did you mean 'parameters'"),
        ("Dense", "add_weight", "add_parameter"),
        ("Dense", "wieght", "Did you mean 'weight'"),
        ("Adam", "zero_grad", r"model\.apply_gradients"),
        ("Adam", "lr", "It has learning_rate"),
        ("Adam", "learning_rat", "Did you mean 'learning_rate'"),
    ],
)
def test_an_unknown_attribute_gets_a_hint(kind, name, hint):
    thing = OBJECTS[kind]()
    with pytest.raises(errors.UnknownNameError, match=f"^{kind} has no attribute '{name}'\\. .*{hint}"):
        getattr(thing, name)
    assert not hasattr(thing, name)


@pytest.mark.parametrize("name", ["refuse2", "contxt", "add_buffers", "from_confg"])
def test_helpers_for_authors_of_layers_are_not_suggested_for_models(name):
    with pytest.raises(AttributeError) as error:
        getattr(model_of(), name)
    assert not any(word in str(error.value) for word in ("'refuse'", "'context'", "'add_buffer'", "'from_config'"))


@pytest.mark.parametrize(
    ("module", "name", "hint"),
    [
        (xpnet, "nn", r"xpnet\.layers"),
        (xpnet, "no_grad", "Leave it out"),
        (xpnet, "models", r"xpnet\.Sequential"),
        (xpnet, "modle", "Did you mean 'Model'"),
        (layers, "InputLayer", r"xpnet\.Input"),
        (layers, "Normalization", r"Scale the data"),
        (callbacks, "LearningRateScheduler", "schedule"),
        (datasets, "load_iris", "scikit-learn"),
        (optimizers, "lr_scheduler", r"xpnet\.schedules"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_name_that_other_libraries_have_in_a_module_gets_a_hint(module, name, hint):
    with pytest.raises(errors.UnknownNameError, match=f"has no attribute '{name}'\\. .*{hint}"):
        getattr(module, name)


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        ("Sequential", "stop_training", r'self\.stop\("reason"\)'),
        ("Sequential", "training", "training=True"),
        ("Sequential", "requires_grad", "trainable = False"),
        ("Dense", "requires_grad", "trainable = False"),
        ("Dense", "trainabel", "Set trainable"),
        ("Dense", "trainble", "Set trainable"),
        ("Adam", "lr", "learning_rate"),
        ("Adam", "beta_1", "Set beta1"),
        ("Adam", "weigth_decay", "Set weight_decay"),
    ],
)
def test_an_assignment_that_nothing_would_read_is_refused(kind, name, hint):
    thing = OBJECTS[kind]()
    with pytest.raises(errors.UnknownNameError, match=f"^{kind} has no attribute '{name}'\\. .*{hint}"):
        setattr(thing, name, False)
    assert name not in vars(thing)


def test_users_may_set_attributes_of_their_own():
    class Own(layers.Dense):
        pass

    for thing in (model_of(), layers.Dense(2), optimizers.Adam()):
        for name in ("note", "stripes", "trainables", "scale1"):
            setattr(thing, name, 1)
            assert getattr(thing, name) == 1
    own = Own(2)
    own.training = own.trainabel = True
    assert own.training and own.trainabel


@pytest.mark.parametrize("name", ["in_features", "inFeatures", "InFeatures"])
def test_an_argument_of_other_libraries_gets_advice_in_every_spelling(name):
    with pytest.raises(
        errors.ArgumentTypeError, match=f"^Dense: unknown argument '{name}'\\. Leave it out: a layer gets"
    ):
        layers.Dense(2, **{name: 3})


def test_each_name_of_other_libraries_has_one_entry():
    for kind, table in errors._ADVICE_TABLE.items():
        names = [name for entry in table for name in entry.split()]
        assert len(names) == len(set(names)), kind
        assert names == [errors._normalized(name) for name in names]
    for ours, theirs in errors._SYNONYM_TABLE.items():
        names = [*theirs.split(), *{errors._normalized(name) for name in ours.split()}]
        assert len(names) == len(set(names)), ours
        assert names == [errors._normalized(name) for name in names]
    for module in (xpnet, layers, callbacks, datasets, optimizers):
        synonyms = {name for ours in module.__all__ for name in errors._SYNONYMS.get(ours, ())}
        assert not synonyms & errors._ADVICE.get(module.__name__, {}).keys()


@pytest.mark.parametrize(
    ("name", "module"), [("Dense", "layers"), ("Adam", "optimizers"), ("EarlyStopping", "callbacks")]
)
def test_a_name_of_a_module_that_is_looked_for_in_the_package_is_found(name, module):
    hint = f"It is in xpnet.{module}: from xpnet.{module} import {name}."
    with pytest.raises(errors.UnknownNameError, match=re.escape(hint)):
        getattr(xpnet, name)
    with pytest.raises(errors.UnknownImportError, match=re.escape(hint)):
        exec(f"from xpnet import {name}", {})
