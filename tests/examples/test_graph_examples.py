"""The examples of graph models as programs, on the digits that ship with xpnet, and their layers and losses."""

import importlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
from programs import run_program

import xpnet

EXAMPLES = Path(__file__).parents[2] / "examples"
REAL_DATA = os.environ.get("XPNET_DATA_DIR")

if not EXAMPLES.exists():
    pytest.skip("the tests run away from the source tree", allow_module_level=True)


@pytest.fixture
def module(monkeypatch):
    """A function that imports an example, as Python does when it runs one of the programs."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def figures(done):
    """The numbers of the last line that the program has printed."""
    assert (done.returncode, done.stderr) == (0, "")
    return [float(number) for number in re.findall(r"\d+\.\d+", done.stdout.splitlines()[-1])]


def run(name, folder, *arguments, **kwargs):
    return run_program(EXAMPLES / f"{name}.py", folder, *arguments, **kwargs)


@pytest.mark.sweep
def test_the_unet_finds_more_of_the_digits_than_a_threshold(tmp_path):
    overlap, threshold = figures(run("unet", tmp_path, "--epochs", 6))
    assert overlap > 0.65 > 0.6 > threshold


def test_the_siamese_network_tells_pairs_apart_and_its_encoder_classifies_digits(tmp_path):
    pairs, digits = figures(run("siamese", tmp_path))
    assert pairs > 0.92 and digits > 0.7  # 0.5 and 0.1 by chance


def test_half_of_the_pairs_show_the_same_digit(module):
    x, y = xpnet.datasets.digits()
    (first, second), same = module("siamese").pairs(np.arange(len(x)), y, 1000, np.random.default_rng(0))
    assert len(first) == len(second) == 1000 and same.mean() == 0.5
    np.testing.assert_array_equal(y[first] == y[second], same)


def test_the_autoencoder_beats_the_mean_image(tmp_path):
    loss, constant = figures(run("autoencoder", tmp_path))
    assert loss < 23.5 < 26 < constant


def test_the_two_heads_classify_digits_and_odd_numbers(tmp_path):
    digit, odd = figures(run("two_heads", tmp_path))
    assert digit > 0.96 and odd > 0.93


def test_trained_features_are_better_than_untrained_ones(tmp_path):
    trained, untrained = figures(run("transfer", tmp_path))
    assert trained > untrained + 0.02 and trained > 0.8


def test_a_new_head_leaves_the_base_as_it_was(module):
    transfer, x = module("transfer"), np.random.default_rng(0).random((64, 8, 8, 1), "float32")
    base = transfer.build((8, 8, 1), 5, "cpu")
    before = base.state_dict()
    model = transfer.with_new_head(base, 5)
    head = model.state_dict()["head.weight"]
    model.fit(x, np.arange(64) % 5, epochs=2, verbose=0)
    assert (model.state_dict()["head.weight"] != head).any()
    for name, value in base.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_gradients_of_the_autoencoder_equal_finite_differences(backend, module):
    autoencoder, x = module("autoencoder"), np.random.default_rng(0).random((5, 4, 3, 1), "float32")
    _, model = autoencoder.build((4, 3, 1), backend)
    targets = autoencoder.targets(x)
    loss = {"decoder": "binary_cross_entropy", "distribution": autoencoder.KLFromNormal()}
    errors = xpnet.check_gradients(model, x, targets, loss, loss_weights={"decoder": 12, "distribution": 1})
    assert len(errors) == 10 and max(errors.values()) < 1e-6, errors
    model.fit(x, targets, loss=loss, metrics=[], epochs=3, verbose=0)
    assert all(np.isfinite(value).all() for value in model.state_dict().values())


def test_steps_of_the_autoencoder_are_captured(module):
    autoencoder = module("autoencoder")
    _, model = autoencoder.build((8, 8, 1), "cpu")
    loss = {"decoder": "binary_cross_entropy", "distribution": autoencoder.KLFromNormal()}
    assert len(xpnet.explain_step(model, 8, loss=loss, metrics=[]).replayed) > 20  # or CaptureError, with the reason


def test_the_same_seed_gives_the_same_run(tmp_path):
    same, again, other = (
        run("autoencoder", tmp_path, "--epochs", 2, "--seed", seed).stdout.splitlines()[-1] for seed in (1, 1, 2)
    )
    assert same == again != other


@pytest.mark.parametrize("name", ["unet", "autoencoder"])
def test_pictures_are_written(tmp_path, name):
    image = pytest.importorskip("matplotlib.image")
    assert run(name, tmp_path, "--epochs", 1, "--plots", tmp_path / "new").returncode == 0
    pixels = image.imread(tmp_path / "new" / f"{name}.png")
    assert min(pixels.shape[:2]) > 150 and pixels[..., :3].std() > 0.05


def test_mistakes_are_one_line_errors(tmp_path):
    done = run("two_heads", tmp_path, "--data-dir", tmp_path / "nowhere")
    assert done.returncode == 1 and done.stderr.startswith("two_heads.py: ") and done.stderr.count("\n") == 1
    assert "argument --epochs" in run("siamese", tmp_path, "--epochs", 0).stderr


@pytest.mark.mnist
@pytest.mark.sweep
def test_the_two_heads_learn_mnist(tmp_path):
    digit, odd = figures(run("two_heads", tmp_path, "--epochs", 1, data=REAL_DATA))
    assert digit > 0.96 and odd > 0.95
