"""Pictures: what stands in them, that they need no screen, and that pyplot's global state is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xpnet
from xpnet.errors import ArgumentError, ShapeError

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xpnet import plots

HISTORY = {"loss": [0.9, 0.4, 0.2], "val_loss": [1.0, 0.5, 0.4], "accuracy": [0.7, 0.8, 0.9]}
ROOT = str(Path(xpnet.__file__).parents[1])


def run(code, folder=ROOT):
    """A fresh interpreter with no screen, in which modules in `folder` go first."""
    environment = {name: value for name, value in os.environ.items() if "DISPLAY" not in name}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), ROOT])
    return subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True)


def drawn(figure):
    figure.canvas.draw()  # what cannot be laid out warns here, and warnings are errors
    return True


# Curves


def test_curves_draw_a_line_with_its_validation_dashed_in_the_same_colour():
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


def test_curves_of_several_keys_have_colours_of_their_own():
    ax = plots.curves(HISTORY, ["loss", "accuracy"])
    assert ax.get_ylabel() == "loss, accuracy"
    assert [line.get_color() for line in ax.lines] == [plots.COLORS[0], plots.COLORS[0], plots.COLORS[1]]


def test_curves_take_what_fit_returns():
    model = xpnet.Sequential([xpnet.layers.Dense(2)], input_shape=(3,), backend="cpu")
    history = model.fit(np.eye(3), [0, 1, 0], epochs=1, verbose=0)
    ax = plots.curves(history, "accuracy")
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]  # one epoch is no reason for fractions


def test_curves_refuse_an_unknown_key_with_the_known_ones():
    with pytest.raises(ArgumentError, match=r"'los'.*mean 'loss'.*accuracy"):
        plots.curves(HISTORY, "los")


# Confusion matrix


def test_confusion_matrix_shows_counts_and_names():
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


def test_image_grid_keeps_images_comparable():
    grid = plots.image_grid([np.zeros((2, 2)), np.full((2, 2), 9.0)])
    assert [ax.images[0].get_clim() for ax in grid.flat] == [(0, 9), (0, 9)]


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.ones((4, 4)), {}, r"\(4, 4\)"),
        (np.ones((2, 4, 4, 2)), {}, r"\(2, 4, 4, 2\)"),
        (np.ones((0, 4, 4)), {}, r"\(0, 4, 4\)"),
        (np.ones((2, 4, 4)), {"titles": ["one"]}, "2 images"),
        (np.ones((2, 4, 4)), {"columns": 0}, "columns"),
    ],
)
def test_image_grid_refuses_what_it_cannot_show(images, options, message):
    with pytest.raises(ArgumentError, match=message):
        plots.image_grid(images, **options)


# The house rules


def test_all_draw_where_they_are_told():
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    assert plots.curves(HISTORY, ax=left) is left
    assert plots.confusion_matrix(np.eye(3), ax=right) is right
    assert drawn(figure)
    own = Figure(layout="constrained")
    assert plots.image_grid(np.ones((2, 4, 4)), figure=own)[0, 0].figure is own


def test_no_screen_and_no_pyplot(tmp_path):
    code = f"""
import sys, xpnet
assert "matplotlib" not in sys.modules, "the core imports it"
from xpnet import plots
plots.curves({HISTORY}).figure.savefig({str(tmp_path / "a.png")!r})
plots.confusion_matrix([[3, 1], [0, 2]]).figure.savefig({str(tmp_path / "b.png")!r})
plots.image_grid([[[0, 1], [1, 0]]])[0, 0].figure.savefig({str(tmp_path / "c.png")!r})
assert "matplotlib.pyplot" not in sys.modules, "pyplot keeps figures and chooses a screen"
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in "abc")


def test_without_matplotlib_the_error_names_the_command(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('made to fail')")
    done = run("import xpnet.plots", tmp_path)
    assert done.returncode == 1
    assert 'made to fail): pip install "xpnet[plots]"' in done.stderr.splitlines()[-1]
    for handled in ("ImportError", "xpnet.errors.XpnetError"):
        done = run(f"import xpnet\ntry: import xpnet.plots\nexcept {handled}: pass", tmp_path)
        assert done.returncode == 0, done.stderr
