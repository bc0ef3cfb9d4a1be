"""Layers with several inputs: formulas, gradients, and what they refuse."""

import copy
import functools

import every
import numpy as np
import pytest

import xpnet
from xpnet import layers
from xpnet.errors import ArgumentError, ShapeError

EXAMPLES = {
    f"{type(layer).__name__} {i}": (shapes, layer)
    for cases in every.MERGING.values()
    for i, (shapes, layer) in enumerate(cases)
}
FORMULAS = {
    "Add": lambda *x: functools.reduce(np.add, x),
    "Average": lambda *x: functools.reduce(np.add, x) / len(x),
    "Concatenate 0": lambda *x: np.concatenate(x, axis=-1),
    "Concatenate 1": lambda *x: np.concatenate(x, axis=1),
    "Dot": lambda a, b: np.einsum("...k,...k->...", a, b)[..., None],
    "Maximum": lambda *x: functools.reduce(np.maximum, x),
    "Multiply": lambda *x: functools.reduce(np.multiply, x),
    "Subtract": lambda a, b: a - b,
}


def formula(name):
    return FORMULAS.get(name) or FORMULAS[name.split()[0]]


@pytest.mark.parametrize("name", EXAMPLES)
def test_outputs_equal_the_formula_and_inputs_stay(backend, rng, name):
    shapes, layer = EXAMPLES[name]
    inputs = [xpnet.Input(shape) for shape in shapes]
    model = xpnet.Model(inputs, copy.deepcopy(layer)(inputs), backend=backend, dtype="float64")
    x = [rng.normal(size=(5, *shape)) for shape in shapes]
    given = [backend.asarray(a.copy()) for a in x]
    with backend.device():
        y = backend.to_numpy(model.forward_pass(tuple(given)))
    np.testing.assert_allclose(y, formula(name)(*x), rtol=1e-14)
    assert y.shape[1:] == model.output_shape
    for before, after in zip(x, given, strict=True):
        np.testing.assert_array_equal(before, backend.to_numpy(after))


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradients_equal_finite_differences(backend, rng, name):
    shapes, layer = EXAMPLES[name]
    x = xpnet.Input(4)
    branches = [layers.Reshape(shape)(layers.Dense(int(np.prod(shape)))(x)) for shape in shapes]
    model = xpnet.Model(x, copy.deepcopy(layer)(branches), backend=backend)
    y = rng.normal(size=(6, *model.output_shape))
    errors = xpnet.check_gradients(model, rng.normal(size=(6, 4)), y, inputs=True)
    assert len(errors) == 2 * len(shapes) + 1
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_gradient_handed_over_stays(backend, rng, name):
    shapes, layer = EXAMPLES[name]
    inputs = [xpnet.Input(shape) for shape in shapes]
    model = xpnet.Model(inputs, copy.deepcopy(layer)(inputs), backend=backend, dtype="float64")
    with backend.device():
        y = model.forward_pass(tuple(backend.asarray(rng.normal(size=(3, *shape))) for shape in shapes))
        grad = rng.normal(size=y.shape)
        given = backend.asarray(grad.copy())
        model.backward_pass(given)
    np.testing.assert_array_equal(backend.to_numpy(given), grad)


def test_the_gradient_of_a_maximum_goes_to_the_first_of_equal_inputs(backend):
    inputs = [xpnet.Input(2), xpnet.Input(2), xpnet.Input(2)]
    model = xpnet.Model(inputs, layers.Maximum()(inputs), backend=backend)
    with backend.device():
        a, b, c = (backend.asarray([values], dtype="float32") for values in ([1.0, 2.0], [1.0, 3.0], [0.0, 3.0]))
        model.forward_pass((a, b, c))
        grads = model.backward_pass(backend.asarray([[5.0, 7.0]], dtype="float32"))
    assert [backend.to_numpy(grad).tolist() for grad in grads] == [[[5.0, 0.0]], [[0.0, 7.0]], [[0.0, 0.0]]]


@pytest.mark.parametrize(
    ("layer", "shapes", "text"),
    [
        (layers.Add(), [(3,), (4,)], r"Add expects inputs of one shape, .* is \(N, 3\), \(N, 4\)"),
        (layers.Add(), [(3,), (3, 3)], "inputs of one shape"),
        (layers.Multiply(), [(3,)], "a list of two or more inputs"),
        (layers.Subtract(), [(3,), (3,), (3,)], "two inputs"),
        (layers.Dot(), [(3,), (1,)], "two inputs of one shape"),
        (layers.Concatenate(), [(3, 4), (2, 4)], "equal in all axes but axis 1"),
        (layers.Concatenate(2), [(3, 4), (3, 4)], "axis 2 does not exist: the inputs have 2 after the batch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shapes_that_do_not_fit_are_refused_when_the_layer_is_called(layer, shapes, text):
    with pytest.raises((ShapeError, ArgumentError), match=text):
        layer([xpnet.Input(shape) for shape in shapes])


def test_a_single_tensor_is_refused_with_what_to_write():
    with pytest.raises(ShapeError, match=r"a list of two or more inputs.* Call it as layers.Add\(\)\(\[a, b\]\)"):
        layers.Add()(xpnet.Input(3))
