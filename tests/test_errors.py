"""Errors: a family of the library's own, whose members are also standard exceptions."""

import inspect

import pytest

import xpnet
from xpnet import datasets, errors, layers, losses, metrics, optimizers
from xpnet.errors import ArgumentError, XpnetError, unknown_name

STANDARD = {
    "ArgumentError": ValueError,
    "ShapeError": ValueError,
    "DataError": ValueError,
    "ArgumentTypeError": TypeError,
    "BackendError": RuntimeError,
    "DeviceMemoryError": MemoryError,
    "DistributedError": RuntimeError,
    "RecordingError": RuntimeError,
    "StateError": RuntimeError,
    "DivergenceError": RuntimeError,
    "MissingPackageError": ImportError,
    "FileError": OSError,
    "DownloadError": OSError,
}


def test_every_error_of_the_family_is_listed_here():
    found = {n for n, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, XpnetError)}
    assert found == {*STANDARD, "XpnetError"}


@pytest.mark.parametrize(("name", "standard"), STANDARD.items())
def test_each_error_is_also_a_standard_one(name, standard):
    error = getattr(errors, name)
    assert issubclass(error, standard) and error.__doc__
    with pytest.raises(standard, match="^why$"):
        raise error("why")


@pytest.mark.parametrize(
    ("call", "near"),
    [
        (lambda: losses.get("softmax_crossentropy"), "'softmax_cross_entropy'"),
        (lambda: optimizers.get("adamm"), "'adam' or 'adamw'"),
        (lambda: metrics.get("acuracy", None), "'accuracy'"),
        (lambda: xpnet.get_backend("gqu"), "'gpu'"),
        (lambda: datasets.logic_gate("nandd"), "'nand' or 'and'"),
        (lambda: layers.Dense(2, weight_initializer="he_normall").build((3,), backend="cpu"), "'he_normal'"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(call, near):
    with pytest.raises(ArgumentError, match=f"^unknown .* Did you mean {near}.*Known: "):
        call()


def test_a_name_like_no_other_gets_all_of_them():
    error = unknown_name("loss", "zzz", ["mse", "huber"])
    assert str(error) == "unknown loss 'zzz'. Known: huber, mse."


@pytest.mark.parametrize("spelling", ["Softmax-Cross-Entropy", " softmax_cross_entropy ", "SOFTMAX_CROSS_ENTROPY"])
def test_names_forgive_case_dashes_and_blanks(spelling):
    assert losses.get(spelling) == losses.SoftmaxCrossEntropy()
