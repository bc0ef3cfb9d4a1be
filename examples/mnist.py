"""Train a network on handwritten digits and measure its accuracy on test images.

    python examples/mnist.py                                  # on a GPU if one can be used, else on the CPU
    python examples/mnist.py --model cnn                      # a small convolutional network
    python examples/mnist.py --model resnet                   # a residual network, trained with data augmentation
    python examples/mnist.py --backend cpu --plots pictures
    mpiexec -n 2 python examples/mnist.py --distributed       # two processes share every batch

The argument `backend` selects the device; the rest of the program is the same on the CPU and on a GPU.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy

import xpnet
from xpnet import augment, datasets, errors, layers, losses, optimizers, schedules


def build_mlp(image_shape, backend="auto", seed=0, largest_pixel=255):
    """Pixels scaled to [0, 1] → 128 ReLU units → the logits of the ten digits; the loss applies the softmax."""
    return xpnet.Sequential(
        [
            layers.Rescale(1 / largest_pixel),
            layers.Flatten(),
            layers.Dense(128, weight_initializer="he_uniform"),
            layers.ReLU(),
            layers.Dense(10),
        ],
        input_shape=image_shape,
        backend=backend,
        seed=seed,
    )


def build_cnn(image_shape, backend="auto", seed=0, largest_pixel=255):
    """Two convolutions with 16 and 32 filters of 5 × 5 pixels, each followed by max-pooling, then a linear layer."""
    padding = "valid" if min(image_shape) >= 16 else "same"  # the small digits are too small for "valid"

    def convolution(filters):
        return [
            layers.Conv2D(filters, 5, padding=padding, use_bias=False, weight_initializer="he_uniform"),
            layers.MaxPool2D(2),  # first, so that the other layers have a quarter of the work
            layers.BatchNorm(),
            layers.ReLU(),
        ]

    return xpnet.Sequential(
        [
            layers.Rescale(1 / largest_pixel),
            layers.Reshape((*image_shape, 1)),
            *convolution(16),
            *convolution(32),
            layers.Flatten(),
            layers.Dense(10),
        ],
        input_shape=image_shape,
        backend=backend,
        seed=seed,
    )


def build_resnet(image_shape, backend="auto", seed=0, largest_pixel=255):
    """Convolutions with batch normalization, two of them in a residual block; every image is distorted at random."""
    padding = "valid" if min(image_shape) >= 16 else "same"
    pixel = min(image_shape) / 28  # the size of one pixel of MNIST

    def normalized(filters, size, padding="same"):
        # No bias, because the normalization would subtract it.
        convolution = layers.Conv2D(filters, size, padding=padding, use_bias=False, weight_initializer="he_normal")
        return [convolution, layers.BatchNorm()]

    return xpnet.Sequential(
        [
            layers.Rescale(1 / largest_pixel),
            augment.RandomAffine(shift=2 * pixel, rotation=12, scale=(0.15, 0.15), shear=10),
            layers.Reshape((*image_shape, 1)),
            *normalized(32, 5, padding),
            layers.ReLU(),
            layers.MaxPool2D(2),
            *normalized(64, 3),
            layers.ReLU(),
            layers.MaxPool2D(2),
            layers.Residual(*normalized(64, 3), layers.ReLU(), *normalized(64, 3)),
            layers.ReLU(),
            *normalized(128, 3, padding),
            layers.ReLU(),
            layers.GlobalAveragePool2D(),
            layers.Dense(10),
        ],
        input_shape=image_shape,
        backend=backend,
        seed=seed,
    )


class Recipe(NamedTuple):
    """A network and the hyperparameters of its training."""

    build: Callable[..., xpnet.Sequential]
    epochs: int
    batch_size: int
    learning_rate: float  # at its peak
    weight_decay: float
    label_smoothing: float = 0.0


# Chosen on 5000 held-out training images, never on the test images.
RECIPES = {
    "mlp": Recipe(build_mlp, 12, 128, 8e-3, 0.02),
    "cnn": Recipe(build_cnn, 3, 128, 1e-2, 0.1, label_smoothing=0.05),
    "resnet": Recipe(build_resnet, 12, 128, 1e-2, 0.05),
}

# The digits that ship with xpnet are 40 times fewer, so batches are smaller and epochs more. Chosen by cross-validation
# on their training part.
DIGITS_EPOCHS, DIGITS_BATCH_SIZE, DIGITS_LEARNING_RATE = 20, 16, 4e-3


def train(model, x, y, recipe, verbose=2, distributed=False):
    """Train with AdamW and a one-cycle schedule of the learning rate. Ctrl-C ends the training early."""
    steps_per_epoch = -(-len(x) // recipe.batch_size)  # rounded up, because the last batch may be smaller
    schedule = schedules.OneCycle(recipe.learning_rate, steps=recipe.epochs * steps_per_epoch)
    return model.fit(
        x,
        y,
        loss=losses.SoftmaxCrossEntropy(label_smoothing=recipe.label_smoothing),
        optimizer=optimizers.AdamW(schedule, weight_decay=recipe.weight_decay),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        distributed=distributed,
        on_interrupt="stop",
        verbose=verbose,
    )


class Task(NamedTuple):
    """Training and test images."""

    name: str
    train: datasets.Samples
    test: datasets.Samples
    largest_pixel: int


DATASETS = {"mnist": datasets.mnist, "fashion_mnist": datasets.fashion_mnist}


def load_task(name="mnist", data_dir=None):
    """MNIST or Fashion-MNIST; if it is not found and cannot be downloaded, the digits that ship with xpnet."""
    title = name.replace("_", "-").upper().replace("FASHION", "Fashion")
    try:
        return Task(title, *DATASETS[name](data_dir), 255)
    except errors.DownloadError as error:
        print(f"{error}\n{title} was not found. To use files of your own, pass --data-dir FOLDER.")
        print("Training on the 1797 small digits that ship with xpnet instead.\n")
        return digits_task()


def digits_task():
    """The digits that ship with xpnet: four fifths for training, one fifth for the test, the same for every seed."""
    x, y = datasets.digits()
    order = numpy.random.default_rng(0).permutation(len(x))
    rows, held_out = numpy.split(order, [round(0.8 * len(x))])
    return Task("digits", datasets.Samples(x[rows], y[rows]), datasets.Samples(x[held_out], y[held_out]), 16)


def recipe_for(task, model, epochs=None, batch_size=None, learning_rate=None):
    """The recipe of a model for this task, with the user's options in place of its values."""
    recipe = RECIPES[model]
    if task.name == "Fashion-MNIST":
        recipe = recipe._replace(epochs=2 * recipe.epochs)  # clothes are harder to classify than digits
    if task.name == "digits":
        recipe = recipe._replace(epochs=DIGITS_EPOCHS, batch_size=DIGITS_BATCH_SIZE, learning_rate=DIGITS_LEARNING_RATE)
    options = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    return recipe._replace(**{name: value for name, value in options.items() if value is not None})


def save_pictures(folder, model, history, x, y, counts):
    """Plot loss, accuracy, the confusion matrix, and the misclassified images with the largest losses."""
    from xpnet import plots  # imported here, because nothing else needs matplotlib

    for key in ("loss", "accuracy"):
        plots.curves(history, key).figure.savefig(folder / f"{key}.png", dpi=150)
    plots.confusion_matrix(counts).figure.savefig(folder / "confusion.png", dpi=150)

    scores = model.predict(x)
    losses = numpy.logaddexp.reduce(scores, axis=1) - scores[numpy.arange(len(y)), y]  # -log softmax of the true class
    predictions = scores.argmax(axis=1)
    worst = [i for i in losses.argsort()[::-1] if predictions[i] != y[i]][:24]
    if worst:
        grid = plots.image_grid(x[worst], [f"{y[i]} → {predictions[i]}" for i in worst])
        grid[0, 0].figure.savefig(folder / "mistakes.png", dpi=150)


def run(options):
    """Train and test. Returns the accuracy on the test images, or None on every rank except 0."""
    group, name = False, options.backend
    if options.distributed:
        group = xpnet.distributed.Communicator()
        name = group.backend(name)  # each rank on a machine takes another GPU
        if group.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # only rank 0 prints
        print(f"{'ranks':9s}{group.size} ranks share each batch")
    backend = xpnet.get_backend(name)
    for label, text in backend.describe():
        print(f"{label:9s}{text}")
    if options.plots:
        from xpnet import plots  # noqa: F401  # fails before the training if matplotlib is missing
    for folder in filter(None, (options.plots, options.save and options.save.parent)):
        folder.mkdir(parents=True, exist_ok=True)

    task = load_task(options.dataset, options.data_dir)
    x, y = task.train
    height, width = x.shape[1:]
    print(f"data     {task.name}: {len(x)} images of {height}×{width} pixels, and {len(task.test.x)} for the test\n")

    recipe = recipe_for(task, options.model, options.epochs, options.batch_size, options.learning_rate)
    model = recipe.build((height, width), backend, options.seed, task.largest_pixel)
    print(model.summary(), end="\n\n")

    start = time.perf_counter()
    history = train(model, x, y, recipe, distributed=group)
    seconds, compiling = time.perf_counter() - start, history.compile_seconds
    compilation = f", after {compiling:.1f} s of compiling kernels for the GPU, once" if compiling else ""
    print(f"trained for {seconds - compiling:.1f} s{compilation}\n")
    if group and group.rank:
        return None

    # The test images are used only here, once.
    result = model.evaluate(*task.test, metrics=["accuracy", "confusion_matrix"])
    if options.plots:
        save_pictures(options.plots, model, history, *task.test, result["confusion_matrix"])
        print(f"pictures saved in {options.plots}")
    if options.save:
        model.save(options.save)
        print(f"model saved in {options.save}")
    print(f"test accuracy: {result['accuracy']:.4f}", flush=True)
    return result["accuracy"]


def positive(kind):
    def number(text):
        if not 0 < (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
        return value

    return number


def seed(text):
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value


def fraction(text):
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value


def file_to_write(text):
    if (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, but {text} is a folder")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", help='"auto", "cpu", "gpu" or "gpu:1" (default: %(default)s)')
    parser.add_argument("--model", choices=RECIPES, default="mlp", help="(default: %(default)s)")
    parser.add_argument("--dataset", choices=DATASETS, default="mnist", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=positive(int), help="epochs of training (default: the model's recipe)")
    parser.add_argument("--batch-size", type=positive(int), help="images per step (default: the model's recipe)")
    parser.add_argument("--learning-rate", type=positive(float), help="the peak rate (default: the model's recipe)")
    parser.add_argument("--seed", type=seed, default=0, help="of initial weights and order of images (default: 0)")
    parser.add_argument("--data-dir", type=Path, help="a folder with the four files of the dataset")
    parser.add_argument("--target-accuracy", type=fraction, help="fail if the accuracy on the test images is lower")
    parser.add_argument(
        "--save", type=file_to_write, metavar="PATH", help="write the trained model to this .safetensors file"
    )
    parser.add_argument("--distributed", action="store_true", help="share batches with the other ranks of mpiexec")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write pictures into this folder (needs matplotlib)")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # some terminals cannot print ×
    try:
        accuracy = run(options)
    except (errors.XpnetError, OSError) as error:
        sys.exit(f"mnist.py: {error}")
    if None not in (options.target_accuracy, accuracy) and accuracy < options.target_accuracy:
        sys.exit(f"mnist.py: the test accuracy {accuracy:.4f} is below the target of {options.target_accuracy:g}")


if __name__ == "__main__":
    main()
