"""Lists and dicts of data, put into the order of a model's inputs and outputs."""

import numpy as np
import pytest

from xpnet.data.structure import Structure, each, in_order, items
from xpnet.errors import ArgumentError, ArgumentTypeError

A, B = np.arange(3.0), np.arange(3)
ONE, TWO = Structure(["x"], ["y"]), Structure(["a", "b"], ["digit", "size"])


def test_lists_are_split_only_where_there_are_several():
    assert ONE.of_inputs([1, 2, 3]) == ONE.of_inputs((1, 2, 3)) == [1, 2, 3]
    assert ONE.of_inputs(A) is A and ONE.of_inputs({"x": A}) is A
    for given in ([A, B], (A, B), {"b": B, "a": A}):
        first, second = TWO.of_inputs(given)
        assert first is A and second is B
        assert TWO.of_inputs(TWO.of_inputs(given)) == (A, B)


def test_functions_of_one_and_of_several():
    assert items([1, 2]) == ([1, 2],) and items((1, 2)) == (1, 2)
    assert each(len, [1, 2]) == 2 and each(len, ([1, 2], [3])) == (2, 1)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (None, None),
        (A, A),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        ((1.0, 2.0), [1.0, 2.0]),  # of two samples
        ([A, None], (A, None)),
        ({"size": A}, (None, A)),
        ([[1.0], [2.0]], ([1.0], [2.0])),
    ],
    ids=["none", "array", "numbers", "tuple of numbers", "arrays", "dict", "lists"],
)
def test_weights_of_samples_are_for_all_outputs_or_for_each(given, want):
    found = TWO.of_weights(given)
    assert type(found) is type(want)
    assert found is want or found == want
    assert TWO.of_weights(found) is found or TWO.of_weights(found) == found


def test_weights_of_classes_belong_to_an_output():
    table = {0: 2.0}
    assert ONE.of_class_weights(table) is table and ONE.of_class_weights({"y": table}) is table
    assert TWO.of_class_weights({"digit": table}) == TWO.of_class_weights([table, None]) == (table, None)
    assert TWO.of_class_weights("balanced") == ("balanced", "balanced") and TWO.of_class_weights(None) == (None, None)
    with pytest.raises(ArgumentError, match=r"several outputs, so give it by output, as in \{'digit': \{0: 2.0\}, …\}"):
        TWO.of_class_weights(table)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"aa": A, "b": B}, ArgumentError, "^z: unknown input 'aa'. Did you mean 'a'\\? Known: a, b.$"),
        ({"a": A}, ArgumentError, "^z: there is nothing for the input 'b'. Give one item for each of 'a', 'b'.$"),
        ([A], ArgumentError, "^z: the model has 2 inputs, but the list has 1 items."),
        (A, ArgumentTypeError, r"give a list or a dict with one item for each of 'a', 'b', not an array of shape"),
        (7, ArgumentTypeError, "not 7.$"),
        (None, ArgumentTypeError, "not None.$"),
    ],
    ids=["unknown", "missing", "too few", "array", "number", "none"],
)
def test_mistakes_are_named(given, error, message):
    with pytest.raises(error, match=message):
        in_order("z", given, ["a", "b"], "input")
