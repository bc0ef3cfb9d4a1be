"""Plots: their contents; they need no display and do not change the state of pyplot."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import xpnet
from xpnet import callbacks, layers
from xpnet.datasets import logic_gate
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, StateError

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xpnet import plots

HISTORY = {"loss": [0.9, 0.4, 0.2], "val_loss": [1.0, 0.5, 0.4], "accuracy": [0.7, 0.8, 0.9]}
ROOT = str(Path(xpnet.__file__).parents[1])


def run(code, folder=ROOT):
    """Run code in a new interpreter without a display, where modules in `folder` come first."""
    environment = {name: value for name, value in os.environ.items() if "DISPLAY" not in name}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), ROOT])
    return subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True)


def drawn(figure):
    figure.canvas.draw()  # a failed layout causes a warning, and warnings are errors
    return True


def dense(*weights, end=(), backend="cpu"):
    """A float64 model of Dense layers with these weights (in, out) and without biases, then the layers of `end`."""
    stack = [layers.Dense(len(w[0]), use_bias=False, weight_initializer=np.array(w, float)) for w in weights]
    return xpnet.Sequential([*stack, *end], input_shape=len(weights[0]), backend=backend, dtype="float64")


def state_of(model):
    """The state that a plot must not change: the values and gradients of all parameters."""
    to_numpy = model.backend.to_numpy
    return [to_numpy(a).copy() for p in model.parameters for a in (p.value, p.grad)]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# Curves


def test_curves_draw_a_line_and_its_validation_values_dashed_in_the_same_color():
    ax = plots.curves(HISTORY)
    training, validation = ax.lines
    assert isinstance(ax, Axes)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss")
    assert training.get_color() == validation.get_color() == plots.COLORS[0]
    assert (training.get_linestyle(), validation.get_linestyle()) == ("-", "--")
    np.testing.assert_array_equal(training.get_xydata(), [[1, 0.9], [2, 0.4], [3, 0.2]])
    np.testing.assert_array_equal(validation.get_ydata(), HISTORY["val_loss"])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["training loss", "validation loss"]
    assert drawn(ax.figure)


def test_the_range_test_of_learning_rates_shows_the_suggestion():
    finder = callbacks.LearningRateFinder()
    with pytest.raises(ArgumentTypeError, match="finder must be a callbacks.LearningRateFinder, not 'x'"):
        plots.learning_rates("x")
    with pytest.raises(StateError, match="no rates yet"):
        plots.learning_rates(finder)
    finder.rates, finder.losses = [1e-3, 1e-2, 1e-1, 1.0], [3.0, 2.5, 1.0, 2.0]
    ax = plots.learning_rates(finder)
    curve, suggestion = ax.lines
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == (finder.rates, finder.losses)
    assert list(suggestion.get_xdata()) == [0.01, 0.01] and ax.get_xscale() == "log"
    finder.losses = [1.0, 2.0, 3.0, 4.0]
    assert len(plots.learning_rates(finder).lines) == 1


def test_curves_of_several_keys_have_different_colors():
    ax = plots.curves(HISTORY, ["loss", "accuracy"])
    assert ax.get_ylabel() == "loss, accuracy"
    assert [line.get_color() for line in ax.lines] == [plots.COLORS[0], plots.COLORS[0], plots.COLORS[1]]


def test_validation_values_are_drawn_once_however_they_are_named():
    history = {**HISTORY, "val_accuracy": [0.6, 0.7, 0.75]}
    for keys in (["accuracy", "val_accuracy"], ["val_accuracy", "accuracy"], ["accuracy"], ["accuracy", "accuracy"]):
        ax = plots.curves(history, keys)
        assert legend(ax) == ["training accuracy", "validation accuracy"]
        assert ax.get_ylabel() == "accuracy"
    (line,) = plots.curves(history, "val_accuracy").lines
    assert (line.get_label(), line.get_linestyle()) == ("validation accuracy", "--")
    np.testing.assert_array_equal(line.get_ydata(), history["val_accuracy"])
    several = plots.curves({"a": history}, ["loss", "val_accuracy"])
    assert legend(several) == ["a, loss", "a, loss, validation", "a, accuracy, validation"]


def test_the_learning_rate_is_drawn_only_if_it_is_named():
    history = {**HISTORY, "learning_rate": [0.1] * len(HISTORY["loss"])}
    assert not any("rate" in text for text in legend(plots.curves(history)))


def test_curves_take_what_fit_returns():
    model = xpnet.Sequential([xpnet.layers.Dense(2)], input_shape=(3,), backend="cpu")
    history = model.fit(np.eye(3), [0, 1, 0], epochs=1, verbose=0)
    ax = plots.curves(history, "accuracy")
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]  # no fractions, even for one epoch


def test_curves_of_several_runs_have_names_and_a_logarithmic_scale():
    ax = plots.curves({"lr 0.5": HISTORY, "lr 5": {"loss": [0.5] * 60}}, logy=True)
    assert legend(ax) == ["lr 0.5", "lr 0.5, validation", "lr 5"]
    assert [line.get_color() for line in ax.lines] == [plots.COLORS[0], plots.COLORS[0], plots.COLORS[1]]
    assert ax.get_yscale() == "log"
    assert (ax.lines[0].get_marker(), ax.lines[2].get_marker()) == (".", "")  # no markers with sixty points
    assert drawn(ax.figure)
    assert legend(plots.curves({"a": HISTORY}, ["accuracy", "loss"])) == [
        "a, accuracy",
        "a, loss",
        "a, loss, validation",
    ]
    with pytest.raises(ArgumentError, match="history key 'accuracy'"):
        plots.curves({"a": HISTORY, "b": {"loss": [1.0]}}, "accuracy")


def test_curves_suggest_a_known_key_for_an_unknown_one():
    with pytest.raises(ArgumentError, match=r"'los'.*mean 'loss'.*accuracy"):
        plots.curves(HISTORY, "los")
    with pytest.raises(ArgumentError, match="^logy must be True or False, not 1"):
        plots.curves(HISTORY, logy=1)


# Confusion matrix


def test_confusion_matrix_shows_counts_and_class_names():
    ax = plots.confusion_matrix([[5, 1, 0], [2, 7, 0], [0, 0, 0]], labels=["ant", "bee", "dragonfly"])
    assert isinstance(ax, Axes)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (0, 0): "5", (1, 0): "1", (0, 1): "2", (1, 1): "7"
    }  # fmt: skip
    assert [label.get_text() for label in ax.get_xticklabels()] == ["ant", "bee", "dragonfly"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ant", "bee", "dragonfly"]
    np.testing.assert_allclose(ax.images[0].get_array(), [[5 / 6, 1 / 6, 0], [2 / 9, 7 / 9, 0], [0, 0, 0]])
    assert drawn(ax.figure)


def numbers_in(ax):
    """The counts that a confusion matrix shows, {(row, column): text}."""
    return {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in ax.texts}


def test_confusion_matrix_of_true_and_predicted_classes():
    true, predicted = [0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1]
    want = {(0, 0): "2", (1, 0): "1", (1, 2): "1", (2, 1): "2"}
    text = [np.array(["ant", "bee", "cat"])[a] for a in (true, predicted)]
    for ax in (
        plots.confusion_matrix(true, predicted),
        plots.confusion_matrix(y_true=true, y_pred=predicted),
        plots.confusion_matrix(np.array(true, np.uint8)[:, None], np.eye(3)[predicted]),
        plots.confusion_matrix(*text),
        plots.confusion_matrix(true, np.array(predicted, float), class_names=["ant", "bee", "cat"]),
    ):
        assert numbers_in(ax) == want
    assert [t.get_text() for t in plots.confusion_matrix(true, predicted).get_yticklabels()] == ["0", "1", "2"]
    assert [t.get_text() for t in plots.confusion_matrix(*text).get_yticklabels()] == ["ant", "bee", "cat"]
    ordered = plots.confusion_matrix(*text, class_names=["cat", "bee", "ant", "dog"])
    assert numbers_in(ordered) == {(2, 2): "2", (1, 2): "1", (1, 0): "1", (0, 1): "2"}
    assert [t.get_text() for t in ordered.get_xticklabels()] == ["cat", "bee", "ant", "dog"]
    assert numbers_in(plots.confusion_matrix([3, 7], [7, 7], class_names=None)) == {(0, 1): "1", (1, 1): "1"}
    assert numbers_in(plots.confusion_matrix([[1, 0], [2, 3]], class_names=["no", "yes"])) == {
        (0, 0): "1", (1, 0): "2", (1, 1): "3"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, ArgumentError, "give counts"),
        (([0, 1],), {}, ShapeError, r"y_true \(2,\) and y_pred \(0,\)"),
        (([0, 1], [0]), {}, ShapeError, r"y_true \(2,\) and y_pred \(1,\)"),
        (([0, 1], [0, 0.5]), {}, DataError, "y_pred must be classes"),
        (([0, float("nan")], [0, 1]), {}, DataError, "y_true must be classes"),
        (([0, 1], [[float("nan"), 1], [0, 1]]), {}, DataError, "y_pred contains NaN"),
        (([0, 1], ["a", "b"]), {}, ArgumentTypeError, "both be numbers, or both be text"),
        (([0, 3], [0, 1]), {"class_names": ["a", "b"]}, DataError, "the class 3 is none of the 2 classes"),
        (([0, 1], [0, 1]), {"y_pred": [0, 1]}, ArgumentError, "counts, or y_true and y_pred"),
        ((np.eye(2), ["a", "b"]), {"class_names": ["a", "b"]}, ArgumentError, "give one of them"),
        ((np.ma.masked_array([0, 1], [0, 1]), [0, 1]), {}, ArgumentTypeError, "masked arrays"),
    ],
)
def test_confusion_matrix_refuses_classes_that_do_not_fit(arguments, options, error, message):
    with pytest.raises(error, match=message):
        plots.confusion_matrix(*arguments, **options)


def test_confusion_matrix_of_many_classes_has_no_numbers():
    ax = plots.confusion_matrix(np.eye(40, dtype=int))
    assert not ax.texts
    assert drawn(ax.figure)


@pytest.mark.parametrize(
    ("counts", "labels", "message"),
    [
        ([[1, 2]], None, r"\(1, 2\)"),
        ([1, 2], None, r"\(2,\)"),
        (np.ones((0, 0)), None, r"\(0, 0\)"),
        (np.eye(2), ["one"], "2 classes"),
    ],
)
def test_confusion_matrix_refuses_wrong_shapes(counts, labels, message):
    with pytest.raises(ShapeError, match=message):
        plots.confusion_matrix(counts, labels)


# Grids of images


@pytest.mark.parametrize("shape", [(5, 8, 6), (5, 8, 6, 1), (5, 8, 6, 3)])
def test_image_grid_shows_every_image_under_its_title(shape, rng):
    images = rng.random(shape)
    grid = plots.image_grid(images, titles=range(5), columns=3)
    assert grid.shape == (2, 3)
    assert all(isinstance(ax, Axes) for ax in grid.flat)
    assert [ax.get_title() for ax in grid.flat] == ["0", "1", "2", "3", "4", ""]
    np.testing.assert_array_equal(grid[1, 1].images[0].get_array(), images[4].reshape(8, 6, *shape[3:]).squeeze())
    assert not grid[1, 2].images
    assert drawn(grid[0, 0].figure)


def test_image_grid_has_one_color_scale():
    grid = plots.image_grid([np.zeros((2, 2)), np.full((2, 2), 9.0)])
    assert [ax.images[0].get_clim() for ax in grid.flat] == [(0, 9), (0, 9)]


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.ones((4, 4)), {}, r"\(4, 4\)"),
        (np.ones((2, 4, 4, 2)), {}, r"\(2, 4, 4, 2\)"),
        (np.ones((0, 4, 4)), {}, r"\(0, 4, 4\)"),
        (np.ones((2, 4, 4)), {"titles": ["one"]}, "one title per image: 2, not 1"),
        (np.ones((2, 4, 4)), {"columns": 0}, "columns must be an integer of at least 1, not 0"),
    ],
)
def test_image_grid_refuses_invalid_arguments(images, options, message):
    with pytest.raises(ArgumentError, match=message):
        plots.image_grid(images, **options)


# What a model looks at


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 1), (3, 4, 5, 3)])
def test_attribution_draws_maps_over_pale_images(shape, rng):
    maps, images = rng.normal(size=(3, 4, 5)), rng.integers(0, 256, shape, np.uint8)
    maps[2] = 0.0
    grid = plots.attribution(maps, images, titles=list("abc"), columns=2)
    assert grid.shape == (2, 2) and [ax.get_title() for ax in grid.flat] == ["a", "b", "c", ""]
    for ax, one, image in zip(grid.flat, maps, images, strict=False):
        under, over = (drawn.get_array() for drawn in ax.images)
        pale = 0.5 + 0.5 * (image - images.min() * 1.0) / np.ptp(images)
        np.testing.assert_allclose(under, np.broadcast_to(pale.reshape(4, 5, -1), (4, 5, 3)))
        np.testing.assert_allclose(over[..., 3], abs(one) / (abs(one).max() or 1.0))
        strong = over[..., 3] > 0.2
        np.testing.assert_array_equal(over[..., 2][strong] > over[..., 0][strong], one[strong] > 0)  # blue, not red
    assert not grid[1, 1].images and not grid[1, 0].images[1].get_array()[..., 3].any()
    assert drawn(grid[0, 0].figure)


def test_attribution_shows_the_channel_of_the_largest_absolute_value():
    maps = np.zeros((1, 2, 2, 3))
    maps[0, 0, 0], maps[0, 1, 1] = (1.0, -4.0, 2.0), (2.0, 1.0, -1.0)
    alone = plots.attribution(maps)[0, 0].images
    assert (alone[0].get_array() == 1.0).all()
    over = alone[1].get_array()
    np.testing.assert_allclose(over[..., 3], [[1.0, 0.0], [0.0, 0.5]])
    assert over[0, 0, 0] > over[0, 0, 2] and over[1, 1, 0] < over[1, 1, 2]


@pytest.mark.parametrize(
    ("maps", "images", "error", "message"),
    [
        (np.ones((4, 4)), None, ShapeError, r"maps must have .* not \(4, 4\)"),
        (np.ones((0, 4, 4)), None, ShapeError, r"\(0, 4, 4\)"),
        (np.full((1, 2, 2), np.nan), None, DataError, "maps contain NaN"),
        (np.ones((2, 4, 4)), np.ones((1, 4, 4)), ShapeError, r"of the maps, \(2, 4, 4\), not \(1, 4, 4\)"),
        (np.ones((2, 4, 4)), np.ones((2, 4, 4, 2)), ShapeError, r"not \(2, 4, 4, 2\)"),
    ],
)
def test_attribution_refuses_maps_and_images_that_do_not_fit(maps, images, error, message):
    with pytest.raises(error, match=message):
        plots.attribution(maps, images)


@pytest.mark.parametrize("labels", [[3, 1, 3, 2], ["b", "a", "b", "c"], np.array(["b", None, "b", "c"], object)])
def test_embedding_draws_each_class_with_its_color_and_marker(labels, backend):
    points = backend.asarray(np.arange(8.0).reshape(4, 2))
    ax = plots.embedding(points, labels, names=["w", "x", "y", "z"])
    twice = next(line for line in ax.lines if line.get_label() == str(labels[0]))
    np.testing.assert_array_equal(twice.get_xydata(), [[0, 1], [4, 5]])
    assert len({line.get_color() for line in ax.lines}) == len({line.get_marker() for line in ax.lines}) == 3
    assert legend(ax) == sorted({str(label) for label in labels})
    assert [(text.get_text(), text.xy) for text in ax.texts][1] == ("x", (2.0, 3.0))
    assert drawn(ax.figure)
    (line,) = plots.embedding([[0, 1], [2, 3]]).lines
    assert line.axes.get_legend() is None


@pytest.mark.parametrize(
    ("points", "options", "error", "message"),
    [
        (np.ones((3, 4)), {}, ShapeError, r"\(N, 2\), not \(3, 4\).*principal_components"),
        (np.ones((0, 2)), {}, ShapeError, r"\(0, 2\)"),
        (np.full((2, 2), np.inf), {}, DataError, "points contain NaN or infinity"),
        (np.ones((3, 2)), {"labels": [1, 2]}, ShapeError, r"labels must have one entry per point, \(3,\), not \(2,\)"),
        (np.ones((3, 2)), {"names": ["a"]}, ShapeError, "names must have one entry"),
        (np.ones((3, 2)), {"ax": 3}, ArgumentTypeError, "ax must be Axes"),
    ],
)
def test_embedding_refuses_invalid_arguments(points, options, error, message):
    with pytest.raises(error, match=message):
        plots.embedding(points, **options)


# Decision boundary


@pytest.mark.parametrize(("end", "threshold"), [((), 0.0), ((layers.Sigmoid,), 0.5), ((layers.Step,), 0.5)])
def test_decision_boundary_of_one_output_is_where_it_crosses_the_threshold(end, threshold, backend):
    # Class 1 is x1 > x2.
    model = dense([[1], [-1]], end=[layer() for layer in end], backend=backend)
    before = state_of(model)
    x, y = backend.asarray(np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 0.5]])), np.array([[0], [1], [1]])
    ax = plots.decision_boundary(model, x, y, threshold=threshold, labels=["above", "below"])
    assert isinstance(ax, Axes)
    region = ax.images[0].get_array()
    left, right, bottom, top = ax.images[0].get_extent()
    assert (left, right, bottom, top) == (-0.5, 2.5, -0.25, 1.25)
    across, up = np.meshgrid(np.linspace(left, right, len(region)), np.linspace(bottom, top, len(region)))
    np.testing.assert_array_equal(region, across >= up)
    line = ax.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(line[:, 0], line[:, 1], atol=0.01)
    assert [line.get_marker() for line in ax.lines] == ["o", "s"]
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), [[1, 0], [2, 0.5]])
    assert (ax.get_xlabel(), ax.get_ylabel(), legend(ax)) == ("$x_1$", "$x_2$", ["above", "below"])
    assert all(map(np.array_equal, before, state_of(model)))
    assert drawn(ax.figure)


@pytest.mark.parametrize("y", [[0, 1, 2, 2], [[0], [1], [2], [2]], np.eye(3)[[0, 1, 2, 2]]])
def test_decision_boundary_of_several_outputs_shows_the_largest(y):
    model = dense([[1, 0, -1], [0, 1, -1]])
    ax = plots.decision_boundary(model, [[1, 0], [0, 1], [-1, -1], [-2, -1]], y)
    region = ax.images[0].get_array()
    left, right, bottom, top = ax.images[0].get_extent()
    plane = np.stack(np.meshgrid(np.linspace(left, right, len(region)), np.linspace(bottom, top, len(region))), -1)
    np.testing.assert_array_equal(region, model.predict(plane.reshape(-1, 2)).argmax(1).reshape(region.shape))
    assert set(np.unique(region)) == {0, 1, 2}
    np.testing.assert_array_equal(ax.lines[2].get_xydata(), [[-1, -1], [-2, -1]])
    assert len({line.get_marker() for line in ax.lines}) == len({line.get_color() for line in ax.lines}) == 3
    assert drawn(ax.figure)


def test_decision_boundary_of_a_model_that_predicts_one_class_has_no_line():
    ax = plots.decision_boundary(dense([[0], [0]]), [[1, 1]], [0])
    assert not ax.collections
    assert drawn(ax.figure)


@pytest.mark.parametrize(
    ("model", "x", "y", "options", "error", "message"),
    [
        (dense([[1], [1]]), [[1, 2, 3]], [0], {}, ShapeError, r"\(N, 2\), not \(1, 3\)"),
        (dense([[1]] * 3), [[1, 2]], [0], {}, ShapeError, r"input_shape \(2,\).*\(3,\)"),
        (dense([[1], [1]]), [[1, 2]], [0, 1], {}, ShapeError, "1 points"),
        (dense([[1], [1]]), [[1, 2]], [0], {"labels": ["a"]}, ShapeError, "2 classes"),
        (dense([[1], [1]]), [[1, 2]], [0], {"threshold": "0"}, ArgumentError, "threshold must be a number, not '0'"),
        (xpnet.Sequential([layers.Dense(1)]), [[1, 2]], [0], {}, StateError, "input_shape"),
        (dense([[1, 1], [1, 1]], end=[layers.Reshape((2, 1))]), [[1, 2]], [0], {}, ShapeError, r"\(2, 1\)"),
    ],
)
def test_decision_boundary_refuses_invalid_arguments(model, x, y, options, error, message):
    with pytest.raises(error, match=message):
        plots.decision_boundary(model, x, y, **options)


# Cost surface

BOTH = (("0.weight", (0, 0)), ("0.weight", (1, 0)))


def test_cost_surface_is_lowest_at_the_solution_and_does_not_change_the_model(backend):
    # The least-squares solution of y = 2 x1 - x2 is (2, -1); over these points the loss is ½ (w1 - 2)² + ½ (w2 + 1)².
    x, y = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([2.0, -1.0])
    model = dense([[5], [4]], backend=backend)
    outputs = model.forward(x)
    before = state_of(model)
    path = [(5, 4), (3, 1), (2, -1)]
    ax = plots.cost_surface(model, x, y, xpnet.losses.HalfSquaredError(reduction="sum"), BOTH, path=path, points=31)
    assert isinstance(ax, Axes)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("0.weight[0, 0]", "0.weight[1, 0]")
    surface = ax.collections[0]
    lowest, highest = surface.get_paths()[0], surface.get_paths()[-1]
    assert lowest.contains_point((2, -1)) and not lowest.contains_point((5, 4))
    assert highest.contains_point((7.4, 6.4))  # the corner farthest from the solution
    assert ax.get_xlim() == (-0.5, 7.5) and ax.get_ylim() == (-3.5, 6.5)  # half of the larger extent of the path
    assert (surface.zmin, surface.zmax) == (pytest.approx(0, abs=0.02), pytest.approx((5.5**2 + 7.5**2) / 2))
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), path)
    np.testing.assert_array_equal([line.get_xydata()[0] for line in ax.lines[2:]], [path[0], path[-1]])
    assert legend(ax) == ["descent", "start", "end"]
    assert ax.figure.axes[1].get_ylabel() == "loss"
    assert all(map(np.array_equal, before, state_of(model)))
    model.backward(backend.xp.ones_like(outputs))  # the forward pass above is still valid
    assert drawn(ax.figure)


@pytest.mark.parametrize(
    ("span", "expected"), [(None, [2, 8, 1, 7]), (0.5, [4.5, 5.5, 3.5, 4.5]), (((0, 1), (2, 4)), [0, 1, 2, 4])]
)
def test_cost_surface_covers_the_span(span, expected):
    ax = plots.cost_surface(dense([[5], [4]]), np.eye(2), [0, 0], "mse", BOTH, span=span, points=3)
    assert [*ax.get_xlim(), *ax.get_ylim()] == expected


def test_cost_surface_of_a_constant_loss_is_drawn():
    model = dense([[1], [1]], [[0]])
    assert drawn(plots.cost_surface(model, np.eye(2), [0, 0], "mse", BOTH, points=3).figure)


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        ((("0.wieght", (0, 0)), BOTH[1]), {}, ArgumentError, "'0.wieght'.*mean '0.weight'"),
        ((("0.weight", (2, 0)), BOTH[1]), {}, ArgumentError, r"\(2, 0\) is not the index .* shape \(2, 1\)"),
        ((("0.weight", 0), BOTH[1]), {}, ArgumentError, r"\(0,\) is not the index .* shape \(2, 1\)"),
        ((BOTH[0],), {}, ArgumentError, "two pairs"),
        ((BOTH[0], BOTH[0]), {}, ArgumentError, "different"),
        (BOTH, {"path": [1, 2]}, ShapeError, r"shape \(N, 2\), not \(2,\)"),
        (BOTH, {"path": [(0, np.nan)]}, ShapeError, "finite"),
        (BOTH, {"span": -1}, ArgumentError, "positive"),
        (BOTH, {"span": (1, 2, 3)}, ArgumentError, r"\(\(low, high\)"),
        (BOTH, {"points": 1}, ArgumentError, "points must be an integer from 2 to 10000, not 1"),
        (BOTH, {"span": 1e300}, DataError, "smaller span"),
    ],
)
def test_cost_surface_refuses_invalid_arguments(weights, options, error, message):
    with np.errstate(all="ignore"), pytest.raises(error, match=message):
        plots.cost_surface(dense([[1], [1]]), np.eye(2), [0, 0], "mse", weights, **options)
    with pytest.raises(StateError, match="input_shape"):
        plots.cost_surface(xpnet.Sequential([layers.Dense(1)]), np.eye(2), [0, 0], "mse", BOTH)


# Activations

SIGMOID = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731


@pytest.mark.parametrize(
    ("layer", "function", "derivative"),
    [
        (layers.Sigmoid(), SIGMOID, lambda z: SIGMOID(z) * (1 - SIGMOID(z))),
        (layers.Tanh(), np.tanh, lambda z: 1 - np.tanh(z) ** 2),
        (layers.LeakyReLU(0.1), lambda z: np.where(z > 0, z, 0.1 * z), lambda z: np.where(z > 0, 1, 0.1)),
        (layers.Step(2), lambda z: z >= 2, np.ones_like),
    ],
)
def test_activation_draws_the_function_and_its_derivative(layer, function, derivative):
    ax = plots.activation(layer, low=-3, high=5)
    values, slopes = ax.lines
    z = values.get_xdata()
    assert (z[0], z[-1], ax.get_xlabel(), ax.get_ylabel()) == (-3, 5, "z", type(layer).__name__ + "(z)")
    np.testing.assert_allclose(values.get_ydata(), function(z), atol=1e-12)
    np.testing.assert_allclose(slopes.get_ydata(), derivative(z), atol=1e-12)
    assert values.get_linestyle() != slopes.get_linestyle()
    assert not layer.is_built
    assert drawn(ax.figure)


def test_the_legend_calls_the_derivative_of_step_a_surrogate():
    assert legend(plots.activation(layers.Step())) == ["Step", "surrogate derivative"]
    assert legend(plots.activation(layers.GELU("tanh"))) == ["GELU(approximate='tanh')", "derivative"]


def test_activation_does_not_change_a_layer_of_a_model():
    model = dense([[1], [1]], end=[layers.Sigmoid()])
    model.forward([[1, 2]])
    plots.activation(model.layers[1])
    assert model.backward([[1.0]])[0, 0] == pytest.approx(SIGMOID(3) * (1 - SIGMOID(3)))


@pytest.mark.parametrize(
    ("layer", "options", "error", "message"),
    [
        (layers.Softmax(), {}, ArgumentError, r"must be a function of one number.*not Softmax\(\)"),
        (layers.Dense(3), {}, ArgumentError, r"must be a function of one number.*not Dense\(3\)"),
        (layers.Sigmoid, {}, ArgumentTypeError, r"an object, with \(\)"),
        ("sigmoid", {}, ArgumentTypeError, "layers.Sigmoid"),
        (layers.Sigmoid(), {"low": 2, "high": 1}, ArgumentError, "high must be a finite number above 2, not 1"),
        (layers.Sigmoid(), {"high": np.inf}, ArgumentError, "high must be a finite number"),
    ],
)
def test_activation_refuses_invalid_arguments(layer, options, error, message):
    with pytest.raises(error, match=message):
        plots.activation(layer, **options)


# Networks


def test_network_shows_every_weight_by_width_color_and_style(backend):
    model = xpnet.Sequential(
        [
            layers.Dense(2, weight_initializer=np.array([[1.0, -2.0], [0.0, 4.0], [0.5, 0.25]])),
            layers.Tanh(),
            layers.Dense(1, weight_initializer=3.0, bias_initializer=-1.5),
        ],
        input_shape=3,
        backend=backend,
    )
    before = state_of(model)
    ax = plots.network(model)
    assert isinstance(ax, Axes)
    edges = {tuple(map(tuple, line.get_xydata().round(3))): line for line in ax.lines}
    assert len(edges) == 8
    negative, largest, none = (edges[ends] for ends in [
        ((0, 0.833), (1, 0.25)), ((0, 0.5), (1, 0.25)), ((0, 0.5), (1, 0.75))
    ])  # fmt: skip
    assert (negative.get_color(), negative.get_linestyle()) == (plots.COLORS[1], "--")
    assert (largest.get_color(), largest.get_linestyle()) == (plots.COLORS[0], "-")
    assert largest.get_linewidth() > negative.get_linewidth() > none.get_linewidth() > 0
    texts = [text.get_text() for text in ax.texts]
    for number in ("1", "−2", "0", "4", "0.5", "0.25", "3", "b = −1.5", "b = 0", "$x_{3}$", "$h_{2}$", "$y_{1}$"):
        assert number in texts, number
    assert [text for text in texts if text[0] in "iho"] == ["inputs\n", "hidden\nTanh", "outputs\n"]
    assert legend(ax) == ["positive weight", "negative weight"]
    assert all(map(np.array_equal, before, state_of(model)))
    assert drawn(ax.figure)


def test_the_numbers_of_a_network_do_not_overlap_and_are_left_out_if_there_are_too_many(rng):
    ax = plots.network(dense(rng.normal(size=(3, 4)), rng.normal(size=(4, 1))))
    drawn(ax.figure)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 3 + (4 * 3 + 4) + (3 + 4 + 1)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    many = plots.network(dense(rng.normal(size=(8, 8))))
    assert len(many.lines) == 64 and len(many.texts) == 2 + 16


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (dense(np.ones((64, 30)), np.ones((30, 10))), ArgumentError, "at most 16 units.*64-30-10.*filters"),
        (xpnet.Sequential([layers.Dense(1)]), StateError, "input_shape"),
        (
            xpnet.Sequential([layers.Dense(1)], input_shape=(2, 2), backend="cpu"),
            ArgumentError,
            r"layer 0 is Dense\(1\)",
        ),
    ],
)
def test_network_refuses_models_that_it_cannot_draw(model, error, message):
    with pytest.raises(error, match=message):
        plots.network(model)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_network_shows_the_numbers_of_an_explanation(backend, rng, samples):
    model = xpnet.Sequential(
        [layers.Dense(4), layers.Tanh(), layers.Dense(2, use_bias=False)], 3, backend, dtype="float64"
    )
    explained = xpnet.explain(model, rng.normal(size=(samples, 3)), rng.normal(size=(samples, 2)), "mse")
    model[0].weight = np.zeros((3, 4))  # the numbers are those of the explanation
    ax = plots.network(model, explanation=explained)
    assert drawn(ax.figure)
    texts = [text.get_text() for text in ax.texts]

    def short(number):
        return f"{number:.3g}".replace("-", "−")

    for p in explained.parameters.values():
        for value, gradient in zip(p.value.flat, p.gradient.flat, strict=True):
            end = f"{short(value)}, ∂ {short(gradient)}"
            assert any(text.endswith(end) for text in texts), end
    shown = {"x": explained["0"].input, "h": explained["1"].output, "y": explained["2"].output}
    for letter, values in shown.items():
        for i, value in enumerate(values[0]):
            found = [text for text in texts if text.startswith(f"${letter}_{{{i + 1}}}$ = {short(value)}")]
            assert len(found) == (samples == 1)
    assert legend(ax)[-1] == f"∂: the derivative of L = {explained.loss:.4g}"
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_network_refuses_the_explanation_of_another_model():
    model, other = dense(np.ones((2, 3)), np.ones((3, 1))), dense(np.ones((2, 2)))
    explained = xpnet.explain(other, [[1.0, 2.0]], [[0.0, 0.0]], "mse")
    with pytest.raises(ArgumentError, match=r"no 0.weight \(2, 3\)"):
        plots.network(model, explanation=explained)
    with pytest.raises(ArgumentTypeError, match="explanation must be what xpnet.explain returned, not 'yes'"):
        plots.network(model, explanation="yes")


# Filters


def test_filters_show_the_first_weights_as_one_image_per_unit_on_a_scale_around_zero(backend, rng):
    weight = rng.normal(size=(12, 5))
    model = dense(weight, np.ones((5, 1)), backend=backend)
    grid = plots.filters(model, (3, 4), columns=3)
    assert grid.shape == (2, 3)
    for unit in range(5):
        image = grid.flat[unit].images[0]
        np.testing.assert_array_equal(image.get_array(), weight[:, unit].reshape(3, 4))
        assert image.get_clim() == (-abs(weight).max(), abs(weight).max())
        assert grid.flat[unit].get_title() == str(unit)
    assert grid[0, 0].figure.axes[-1].get_ylabel() == "0.weight"
    assert drawn(grid[0, 0].figure)


def test_filters_infer_the_image_shape_where_possible():
    assert plots.filters(dense(np.ones((16, 2))))[0, 0].images[0].get_array().shape == (4, 4)
    flat = xpnet.Sequential([layers.Flatten(), layers.Dense(3)], input_shape=(2, 8), backend="cpu")
    assert plots.filters(flat)[0, 2].images[0].get_array().shape == (2, 8)
    color = xpnet.Sequential([layers.Flatten(), layers.Dense(2)], input_shape=(2, 2, 3), backend="cpu")
    grid = plots.filters(color, columns=3)
    assert [ax.get_title() for ax in grid.flat] == ["0, 0", "0, 1", "0, 2", "1, 0", "1, 1", "1, 2"]
    weight = color.state_dict()["1.weight"].reshape(2, 2, 3, 2)
    np.testing.assert_array_equal(grid[1, 2].images[0].get_array(), weight[:, :, 2, 1])


def test_filters_of_another_layer_by_name():
    grid = plots.filters(dense(np.ones((2, 4)), np.arange(8).reshape(4, 2)), name="1.weight")
    np.testing.assert_array_equal(grid[0, 1].images[0].get_array(), [[1, 3], [5, 7]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": (2, 2)}, r"product of 3.*3 inputs; not \(2, 2\)"),
        ({}, "product of 3.*3 inputs; not None"),
        ({"name": "0.bias"}, "weight '0.bias'.*0.weight"),
    ],
)
def test_filters_refuse_invalid_arguments(options, message):
    with pytest.raises(ArgumentError, match=message):
        plots.filters(dense([[1], [2], [3]]), **options)
    with pytest.raises(StateError, match="input_shape"):
        plots.filters(xpnet.Sequential([layers.Dense(1)]))


# Descents


def test_descent_draws_the_curve_and_the_steps_on_it():
    path = [6.0]
    while len(path) < 2 or abs(path[-1] - path[-2]) > 1e-5:
        path.append(path[-1] - 0.01 * (4 * path[-1] ** 3 - 9 * path[-1] ** 2))
    ax = plots.descent(lambda x: x**4 - 3 * x**3 + 2, path, low=-1)
    curve, steps, start, end = ax.lines
    x = curve.get_xdata()
    assert x[0] == -1 and x[-1] > 6
    np.testing.assert_allclose(curve.get_ydata(), x**4 - 3 * x**3 + 2)
    np.testing.assert_array_equal(steps.get_xdata(), path)
    np.testing.assert_array_equal(start.get_xydata(), [[6, 650]])
    np.testing.assert_allclose(end.get_xydata(), [[2.249965, -6.542969]], atol=1e-6)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "f(x)")
    assert legend(ax) == ["f(x)", "descent", "start", "end"]
    assert drawn(ax.figure)


def test_descent_refuses_invalid_arguments():
    with pytest.raises(ShapeError, match=r"shape \(N,\), not \(1, 2\)"):
        plots.descent(abs, [[1, 2]])
    with pytest.raises(ShapeError, match="finite"):
        plots.descent(abs, [1, np.inf])
    with pytest.raises(ArgumentError, match="high must be a finite number above 3, not 3"):
        plots.descent(abs, [1, 2], low=3, high=3)


# Graphs of models


def branched():
    x, other = xpnet.Input(4, name="x"), xpnet.Input((2, 2), name="image")
    dense = layers.Dense(3)
    h = layers.Concatenate()([dense(x), layers.Tanh(name="again")(dense(layers.Flatten()(other)))])
    return xpnet.Model([x, other], [layers.Dense(2, name="digit")(h), h], backend="cpu")


def arrows(ax):
    """(x of the start, x of the tip, x of the point farthest to the right) of each arrow, in units of the boxes."""
    paths = [patch.get_path() for patch in ax.patches]
    outlines = [path.vertices[path.codes != path.CLOSEPOLY] for path in paths]
    return [(corners[0, 0], corners[corners[:, 1].argmin(), 0], corners[:, 0].max()) for corners in outlines]


def test_a_graph_has_a_box_for_each_input_and_call_below_what_it_depends_on():
    ax = plots.model_graph(branched())
    boxes = {text.get_text().split(":")[0]: text for text in ax.texts if text.get_text()}
    assert [*boxes] == ["x", "image", "0", "1", "0#2", "again", "3", "digit"]
    assert boxes["3"].get_text() == "3: Concatenate\n(N, 6)"
    heights = [boxes[name].get_position()[1] for name in ("image", "1", "0#2", "again", "3", "digit")]
    assert heights == sorted(heights, reverse=True) and len(set(heights)) == 6
    x = {name: text.get_position()[0] for name, text in boxes.items()}
    ends = [(start, tip) for start, tip, _ in arrows(ax)]
    assert len(ends) == 7
    for pair in (("again", "3"), ("3", "digit")):
        assert any(np.allclose((x[pair[0]], x[pair[1]]), end, atol=0.05) for end in ends), pair
    assert len({text.get_position() for text in boxes.values()}) == len(boxes)
    assert drawn(ax.figure)


def test_arrows_that_skip_levels_run_beside_the_boxes():
    x = h = xpnet.Input(4)
    skipped = []
    for _ in range(3):
        skipped.append(h)
        h = layers.Tanh()(layers.Dense(4)(h))
    h = layers.Add()([layers.Add()([h, skipped[2]]), skipped[0]])  # the second skip is around the first
    ax = plots.model_graph(xpnet.Model(x, h, backend="cpu"))
    boxes = max(text.get_position()[0] for text in ax.texts)
    lanes = sorted(right for *_, right in arrows(ax) if right > boxes + 0.4)
    assert len(lanes) == 2 and lanes[0] + 0.1 < lanes[1] < ax.get_xlim()[1]
    assert len(arrows(ax)) == 10


def test_a_graph_of_a_sequential_is_a_column():
    ax = plots.model_graph(dense([[1, 0], [0, 1]], [[1], [1]], end=[layers.Sigmoid()]))
    assert [text.get_position() for text in ax.texts if text.get_text()] == [(0, 0), (0, -1), (0, -2), (0, -3)]
    with pytest.raises(StateError, match="not built"):
        plots.model_graph(xpnet.Sequential([layers.Dense(1)]))


def test_network_refuses_branches():
    x = xpnet.Input(2)
    with pytest.raises(ArgumentError, match="layers in a row, but this model has branches: see plots.model_graph"):
        plots.network(xpnet.Model(x, layers.Add()([layers.Dense(2)(x), x]), backend="cpu"))
    with pytest.raises(ArgumentError, match="layers in a row"):
        plots.network(xpnet.Model(x, [layers.Dense(2)(x), layers.Dense(2)(x)], backend="cpu"))


# All plots


def test_all_plots_draw_into_the_given_axes_or_figure():
    figure = Figure(figsize=(14, 12), layout="constrained")
    cells = iter(figure.subplots(3, 3).flat)
    model, (x, y) = dense([[1], [1]]), logic_gate("or")
    for draw in (
        lambda ax: plots.curves(HISTORY, ax=ax),
        lambda ax: plots.confusion_matrix(np.eye(3), ax=ax),
        lambda ax: plots.decision_boundary(model, x, y, ax=ax),
        lambda ax: plots.cost_surface(model, x, y, "mse", BOTH, points=3, ax=ax),
        lambda ax: plots.activation(layers.Tanh(), ax=ax),
        lambda ax: plots.network(model, ax=ax),
        lambda ax: plots.model_graph(model, ax=ax),
        lambda ax: plots.descent(abs, [1, 0], ax=ax),
    ):
        ax = next(cells)
        assert draw(ax) is ax
    assert drawn(figure)
    for grid in (plots.image_grid, lambda images, figure: plots.filters(dense(np.ones((4, 2))), figure=figure)):
        own = Figure(layout="constrained")
        assert grid(np.ones((2, 4, 4)), figure=own)[0, 0].figure is own


def test_plots_need_no_display_and_no_pyplot(tmp_path):
    code = f"""
import sys, xpnet
assert "matplotlib" not in sys.modules, "the core imports it"
from xpnet import plots
plots.curves({HISTORY}).figure.savefig({str(tmp_path / "a.png")!r})
plots.confusion_matrix([[3, 1], [0, 2]]).figure.savefig({str(tmp_path / "b.png")!r})
plots.image_grid([[[0, 1], [1, 0]]])[0, 0].figure.savefig({str(tmp_path / "c.png")!r})
model = xpnet.Sequential([xpnet.layers.Dense(4), xpnet.layers.Tanh()], input_shape=2, backend="cpu")
places = (("0.weight", (0, 0)), ("0.bias", 0))
plots.decision_boundary(model, [[0, 1]], [3]).figure.savefig({str(tmp_path / "d.png")!r})
plots.cost_surface(model, [[0, 1]], [3], "softmax_cross_entropy", places).figure.savefig({str(tmp_path / "e.png")!r})
plots.activation(xpnet.layers.Tanh()).figure.savefig({str(tmp_path / "f.png")!r})
plots.network(model).figure.savefig({str(tmp_path / "g.png")!r})
plots.filters(model, (1, 2))[0, 0].figure.savefig({str(tmp_path / "h.png")!r})
plots.descent(abs, [2, 1]).figure.savefig({str(tmp_path / "i.png")!r})
assert "matplotlib.pyplot" not in sys.modules, "pyplot keeps figures and needs a display"
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in "abcdefghi")


def test_without_matplotlib_the_error_names_the_command(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('made to fail')")
    done = run("import xpnet.plots", tmp_path)
    assert done.returncode == 1
    assert 'made to fail): pip install "xpnet[plots]"' in done.stderr.splitlines()[-1]
    for handled in ("ImportError", "xpnet.errors.XpnetError"):
        done = run(f"import xpnet\ntry: import xpnet.plots\nexcept {handled}: pass", tmp_path)
        assert done.returncode == 0, done.stderr


# Notebooks: tests/plots/test_notebook.py runs a real kernel


class Screen:
    """Stands in for IPython: keeps what is displayed, and which display an update replaces."""

    def __init__(self, formatters):
        self.formatters, self.shown, self.updated = formatters, [], []
        self.display_formatter = self

    def display(self, *things, metadata=None, raw=False, display_id=False):
        self.shown += things
        return self if display_id else None

    def update(self, data, metadata, raw):
        assert raw
        self.updated.append(data)


@pytest.fixture
def screen(monkeypatch):
    pyplot = importlib.import_module("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "install_repl_displayhook", lambda: None)  # needs the real IPython
    screen = Screen({"text/plain": repr, "image/png": lambda figure: None, "image/svg+xml": lambda figure: None})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: screen, version_info=(9, 0)))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=screen.display))
    return screen


def live(plot, epochs=3, **options):
    model = xpnet.Sequential([layers.Dense(2)], input_shape=(3,), backend="cpu")
    return model.fit(np.eye(3), [0, 1, 0], epochs=epochs, verbose=0, callbacks=plot, **options)


def test_a_live_plot_replaces_its_picture_after_each_epoch(screen):
    plot = plots.LivePlot(seconds=0)
    live(plot)
    (first,) = screen.shown
    assert first["image/png"].startswith(b"\x89PNG") and len(screen.updated) == 2
    assert len({first["image/png"], *(data["image/png"] for data in screen.updated)}) == 3
    live(plot, epochs=1)
    assert len(screen.shown) == 2  # another fit has a picture of its own
    live(plots.LivePlot(seconds=1000))
    assert len(screen.shown) == 3 and len(screen.updated) == 3  # the first and the last epoch


def test_a_live_plot_has_axes_for_each_measure_and_uses_the_formats_of_the_notebook(screen):
    figures = []
    screen.formatters["image/svg+xml"] = lambda figure: figures.append(figure) or "<svg/>"
    screen.formatters["image/png"] = lambda figure: (b"png", {"width": 7})
    validation = {"validation_data": (np.eye(3), [0, 1, 0])}
    metrics = ["accuracy", "log_loss", "f1"]
    live(plots.LivePlot(), 1, metrics=metrics, **validation)
    assert screen.shown[0].keys() == {"text/plain", "image/png", "image/svg+xml"}
    axes = figures[0].axes
    assert [ax.get_ylabel() for ax in axes if ax.axison] == ["loss", "accuracy", "log loss", "f1"]
    assert legend(axes[0]) == ["training loss", "validation loss"]
    assert figures[0].get_suptitle() == "epoch 1 of 1"
    live(plots.LivePlot(("val_loss", "loss", "learning_rate")), 1, **validation)
    assert [ax.get_ylabel() for ax in figures[1].axes] == ["loss", "learning rate"]


def test_a_live_plot_shows_the_epochs_before_an_error(screen):
    class Fail(callbacks.Callback):
        def on_epoch_begin(self, model, epoch):
            if epoch == self.last:
                raise KeyError

    fail = Fail()
    for fail.last, pictures in ((0, 0), (2, 2)):
        with pytest.raises(KeyError):
            live([fail, plots.LivePlot(seconds=1000)])
        assert len(screen.shown) + len(screen.updated) == pictures


def test_a_live_plot_does_nothing_outside_of_notebooks(monkeypatch):
    monkeypatch.setattr("xpnet.plots.live.Figure", None)
    assert live(plots.LivePlot(seconds=0)) == live([])


def test_a_live_plot_refuses_wrong_arguments_before_the_first_step():
    for wrong in (3, [], {"loss": 1}):
        with pytest.raises((ArgumentError, ArgumentTypeError), match="LivePlot: keys must"):
            plots.LivePlot(wrong)
    with pytest.raises(ArgumentError, match="LivePlot: seconds must be"):
        plots.LivePlot(seconds="1")
    with pytest.raises(ArgumentError, match=r"history key 'los'.*mean 'loss'.*accuracy, learning_rate, loss"):
        live(plots.LivePlot("los"))


def test_a_notebook_shows_axes_and_grids_as_the_picture_of_their_figure(screen):
    for drawn_by in (plots.curves(HISTORY), plots.image_grid(np.zeros((3, 4, 4)))):
        drawn_by._ipython_display_()
        figure = screen.shown.pop()
        assert figure is np.ravel(drawn_by)[0].figure
        figure._ipython_display_()
        assert screen.shown.pop()["image/png"].startswith(b"\x89PNG")
    grid = plots.image_grid(np.zeros((3, 4, 4)))
    for derived in (grid[:0], grid == grid[0, 0]):
        with pytest.raises(NotImplementedError):  # IPython shows the repr
            derived._ipython_display_()
    figure = Figure()
    assert type(plots.image_grid(np.zeros((3, 4, 4)), figure=figure)) is np.ndarray  # the user's figure shows itself


def test_attribution_says_how_to_draw_features_of_a_table():
    with pytest.raises(ShapeError, match=r"not \(5, 3\)\. Draw features as bars, with pyplot\.barh"):
        plots.attribution(np.ones((5, 3)))
