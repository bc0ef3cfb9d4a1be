"""examples/mnist.py as a program, with and without MNIST."""

import os
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from programs import run_program

import xpnet

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "mnist.py"
REAL_DATA = os.environ.get("XPNET_DATA_DIR")


def run(folder, *arguments, **kwargs):
    return run_program(EXAMPLE, folder, *arguments, **kwargs)


def accuracy_of(done):
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"test accuracy: [01]\.\d{4}", last), last
    return float(last.split()[-1])


def assert_one_error_line(done):
    assert done.returncode == 1
    assert done.stderr.startswith("mnist.py: ")
    assert done.stderr.count("\n") == 1
    assert "accuracy:" not in done.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run without MNIST and without internet access: (the finished process, the path of its model)."""
    folder = tmp_path_factory.mktemp("digits")
    path = folder / "models" / "mnist.safetensors"
    return run(folder, "--save", path), path


def test_without_mnist_the_example_learns_the_bundled_digits(digits):
    done, _ = digits
    assert (done.returncode, done.stderr) == (0, "")
    assert accuracy_of(done) >= 0.97


def test_without_mnist_the_example_prints_the_mirrors_and_the_option(digits):
    text = digits[0].stdout
    assert "https://ossci-datasets.s3.amazonaws.com/mnist/" in text
    assert "https://storage.googleapis.com/cvdf-datasets/mnist/" in text
    assert "--data-dir" in text
    assert "digits that ship with xpnet instead" in text


def test_the_example_prints_device_data_model_and_epochs(digits):
    text = digits[0].stdout
    assert re.search(r"^device +\S", text, re.MULTILINE)
    assert "digits: 1438 images of 8×8 pixels, and 359 for the test" in text
    assert "9,610 parameters" in text
    assert re.search(r"^epoch +1/\d+  loss .*accuracy .* s  [\d,]+ samples/s$", text, re.MULTILINE)
    assert re.search(r"^trained for \d+\.\d s$", text, re.MULTILINE)


def test_the_saved_model_predicts_like_the_trained_one(digits):
    done, path = digits
    example = runpy.run_path(str(EXAMPLE))
    task = example["digits_task"]()
    loaded = xpnet.load(path, backend="cpu").predict(task.test.x)
    assert f"{(loaded.argmax(axis=1) == task.test.y).mean():.4f}" == f"{accuracy_of(done):.4f}"

    recipe = example["recipe_for"](task, "mlp")
    model = recipe.build((8, 8), backend="cpu", seed=0, largest_pixel=16)
    example["train"](model, *task.train, recipe, verbose=0)
    np.testing.assert_allclose(loaded, model.predict(task.test.x), rtol=1e-3, atol=1e-3)


def test_the_split_of_the_digits_has_no_overlap_and_is_fixed():
    digits_task = runpy.run_path(str(EXAMPLE))["digits_task"]
    task = digits_task()
    assert len(task.train.x) + len(task.test.x) == 1797
    both = np.concatenate([task.train.x, task.test.x]).reshape(1797, -1)
    everything = xpnet.datasets.digits().x.reshape(1797, -1)
    np.testing.assert_array_equal(np.unique(both, axis=0), np.unique(everything, axis=0))
    np.testing.assert_array_equal(task.test.y, digits_task().test.y)


def test_the_example_fails_below_the_target_accuracy(tmp_path):
    done = run(tmp_path, "--epochs", 1, "--target-accuracy", 0.999)
    assert done.returncode == 1
    assert re.fullmatch(r"mnist\.py: the test accuracy 0\.\d{4} is below the target of 0\.999\n", done.stderr)
    assert accuracy_of(done) < 0.999


@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_convolutional_networks_learn_the_bundled_digits(tmp_path, model):
    done = run(tmp_path, "--model", model, "--epochs", 3)
    assert (done.returncode, done.stderr) == (0, "")
    assert accuracy_of(done) >= 0.9


def test_options_override_the_recipe():
    example = runpy.run_path(str(EXAMPLE))
    task, recipe_for = example["digits_task"](), example["recipe_for"]
    assert recipe_for(task, "cnn", epochs=2, learning_rate=0.1)[1:4] == (2, example["DIGITS_BATCH_SIZE"], 0.1)


def test_the_example_writes_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    done = run(tmp_path, "--epochs", 3, "--plots", tmp_path / "new" / "pictures")
    assert done.returncode == 0, done.stderr
    assert accuracy_of(done) > 0.5
    files = {path.name: imread(path) for path in (tmp_path / "new" / "pictures").iterdir()}
    assert sorted(files) == ["accuracy.png", "confusion.png", "loss.png", "mistakes.png"]
    for name, pixels in files.items():
        assert min(pixels.shape[:2]) > 150, name
        assert pixels[..., :3].std() > 0.05, f"{name} is blank"


def test_pictures_without_matplotlib_fail_before_the_training(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('made to fail')")
    done = run(tmp_path, "--plots", tmp_path, first_on_path=tmp_path)
    assert_one_error_line(done)
    assert 'pip install "xpnet[plots]"' in done.stderr
    assert "epoch" not in done.stdout


def test_a_wrong_data_dir_is_an_error_without_a_fallback(tmp_path):
    done = run(tmp_path, "--data-dir", tmp_path / "nowhere")
    assert_one_error_line(done)
    assert "nowhere" in done.stderr
    assert "digits" not in done.stdout


def test_a_missing_gpu_is_an_error(tmp_path):
    if xpnet.available_backends()["gpu"] is None:
        pytest.skip("this machine has a GPU")
    done = run(tmp_path, "--backend", "gpu")
    assert_one_error_line(done)
    assert '"gpu" cannot be used' in done.stderr


@pytest.mark.parametrize(
    "wrong",
    [["--epochs", 0], ["--batch-size", -1], ["--learning-rate", "fast"], ["--model", "none"], ["--dataset", "none"]],
)
def test_invalid_options_are_refused(tmp_path, wrong):
    done = run(tmp_path, *wrong)
    assert done.returncode == 2
    assert f"argument {wrong[0]}" in done.stderr


@pytest.mark.mnist
@pytest.mark.slow
def test_the_example_reaches_its_target_on_the_real_mnist(tmp_path):
    done = run(tmp_path, "--epochs", 1, "--target-accuracy", 0.95, data=REAL_DATA)
    assert done.returncode == 0, done.stderr
    assert "MNIST: 60000 images of 28×28 pixels, and 10000 for the test" in done.stdout
    assert accuracy_of(done) >= 0.95
