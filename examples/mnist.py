"""Teach a network to read handwritten digits, and see how well it reads digits it has never seen.

    python examples/mnist.py                                  # on a GPU if one can be used, else on the CPU
    python examples/mnist.py --model cnn                      # a small convolutional network
    python examples/mnist.py --model resnet                   # a better one, which sees every image distorted anew
    python examples/mnist.py --backend cpu --plots pictures
    mpiexec -n 2 python examples/mnist.py --distributed       # two processes share every batch

Only the name given to `backend=` says where the arithmetic runs; all else is the same on both devices.
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
    """Pixels scaled to [0, 1] → 128 ReLU units → a score for each of the ten digits. No softmax: the loss has it."""
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
    """16 filters of 5 × 5 pixels, then 32 over what those found; each time the strongest of 2 × 2 answers goes on."""
    padding = "valid" if min(image_shape) >= 16 else "same"  # of the small digits, windows inside leave nothing

    def convolution(filters):
        return [
            layers.Conv2D(filters, 5, padding=padding, use_bias=False, weight_initializer="he_uniform"),
            layers.MaxPool2D(2),  # before the rest, which then has a quarter of the work
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
    """Normalised convolutions, two of them with a way around; every image is distorted anew whenever it is seen."""
    padding = "valid" if min(image_shape) >= 16 else "same"
    pixel = min(image_shape) / 28  # shifts, in MNIST's pixels

    def normalised(filters, size, padding="same"):
        # No bias: the normalisation would take it away again.
        convolution = layers.Conv2D(filters, size, padding=padding, use_bias=False, weight_initializer="he_normal")
        return [convolution, layers.BatchNorm()]

    return xpnet.Sequential(
        [
            layers.Rescale(1 / largest_pixel),
            augment.RandomAffine(shift=2 * pixel, rotation=12, scale=(0.15, 0.15), shear=10),
            layers.Reshape((*image_shape, 1)),
            *normalised(32, 5, padding),
            layers.ReLU(),
            layers.MaxPool2D(2),
            *normalised(64, 3),
            layers.ReLU(),
            layers.MaxPool2D(2),
            layers.Residual(*normalised(64, 3), layers.ReLU(), *normalised(64, 3)),
            layers.ReLU(),
            *normalised(128, 3, padding),
            layers.ReLU(),
            layers.GlobalAveragePool2D(),
            layers.Dense(10),
        ],
        input_shape=image_shape,
        backend=backend,
        seed=seed,
    )


class Recipe(NamedTuple):
    """A network and how to train it, which decides how well it learns and how long that takes."""

    build: Callable[..., xpnet.Sequential]
    epochs: int
    batch_size: int
    learning_rate: float  # at its peak
    weight_decay: float
    label_smoothing: float = 0.0


# Chosen on the last 5000 training images, held out for that, never on the test set.
RECIPES = {
    "mlp": Recipe(build_mlp, 12, 128, 8e-3, 0.02),
    "cnn": Recipe(build_cnn, 3, 128, 1e-2, 0.1, label_smoothing=0.05),
    "resnet": Recipe(build_resnet, 12, 128, 1e-2, 0.05),
}

# The digits that come with xpnet are 40 times fewer: smaller batches, seen more often. Chosen by cross-validation
# within their training part.
DIGITS_EPOCHS, DIGITS_BATCH_SIZE, DIGITS_LEARNING_RATE = 20, 16, 4e-3


def train(model, x, y, recipe, verbose=2, distributed=False):
    """AdamW, while the learning rate climbs to its peak and then sinks to almost nothing."""
    steps_per_epoch = -(-len(x) // recipe.batch_size)  # the last batch may be smaller
    schedule = schedules.OneCycle(recipe.learning_rate, steps=recipe.epochs * steps_per_epoch)
    return model.fit(
        x,
        y,
        loss=losses.SoftmaxCrossEntropy(label_smoothing=recipe.label_smoothing),
        optimizer=optimizers.AdamW(schedule, weight_decay=recipe.weight_decay),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        distributed=distributed,
        verbose=verbose,
    )


class Task(NamedTuple):
    """Images to learn from and to be tested on."""

    name: str
    train: datasets.Samples
    test: datasets.Samples
    largest_pixel: int


DATASETS = {"mnist": datasets.mnist, "fashion_mnist": datasets.fashion_mnist}


def load_task(name="mnist", data_dir=None):
    """MNIST, or the clothes in its shape; where they can be neither found nor downloaded, the digits of xpnet."""
    title = name.replace("_", "-").upper().replace("FASHION", "Fashion")
    try:
        return Task(title, *DATASETS[name](data_dir), 255)
    except errors.DownloadError as error:
        print(f"{error}\n{title} is not here. To use files of your own: --data-dir FOLDER.")
        print("Training on the 1797 small digits that come with xpnet instead.\n")
        return digits_task()


def digits_task():
    """Four fifths to learn from and a fifth for the test: always the same ones, whatever the seed of the training."""
    x, y = datasets.digits()
    order = numpy.random.default_rng(0).permutation(len(x))
    rows, held_out = numpy.split(order, [round(0.8 * len(x))])
    return Task("digits", datasets.Samples(x[rows], y[rows]), datasets.Samples(x[held_out], y[held_out]), 16)


def recipe_for(task, model, epochs=None, batch_size=None, learning_rate=None):
    """The recipe of a model for this task, with what the user wants otherwise."""
    recipe = RECIPES[model]
    if task.name == "Fashion-MNIST":
        recipe = recipe._replace(epochs=2 * recipe.epochs)  # clothes are harder to tell apart than digits
    if task.name == "digits":
        recipe = recipe._replace(epochs=DIGITS_EPOCHS, batch_size=DIGITS_BATCH_SIZE, learning_rate=DIGITS_LEARNING_RATE)
    wanted = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    return recipe._replace(**{name: value for name, value in wanted.items() if value is not None})


def save_pictures(folder, model, history, x, y, counts):
    """Loss, accuracy, what was taken for what, and the images that the model got most wrong."""
    from xpnet import plots  # here, because only this needs matplotlib

    for key in history:
        plots.curves(history, key).figure.savefig(folder / f"{key}.png", dpi=150)
    plots.confusion_matrix(counts).figure.savefig(folder / "confusion.png", dpi=150)

    scores = model.predict(x)
    losses = numpy.logaddexp.reduce(scores, axis=1) - scores[numpy.arange(len(y)), y]  # -log softmax at the truth
    guesses = scores.argmax(axis=1)
    worst = [i for i in losses.argsort()[::-1] if guesses[i] != y[i]][:24]
    if worst:
        grid = plots.image_grid(x[worst], [f"{y[i]} → {guesses[i]}" for i in worst])
        grid[0, 0].figure.savefig(folder / "mistakes.png", dpi=150)


def run(options):
    """The whole experiment; returns the accuracy on the test set, or None on all ranks but the first."""
    ranks, name = False, options.backend
    if options.distributed:
        from xpnet.distributed import Communicator  # here, because it needs mpi4py

        ranks = Communicator()
        name = ranks.backend(name)  # of several GPUs, each rank takes its own
        if ranks.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until this process ends
        print(f"{'ranks':9s}{ranks.size} ranks share each batch")
    backend = xpnet.get_backend(name)
    for label, text in backend.describe():
        print(f"{label:9s}{text}")
    if options.plots:
        from xpnet import plots  # noqa: F401  # if matplotlib is missing, better said before the training than after it
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
    history = train(model, x, y, recipe, distributed=ranks)
    seconds, compiling = time.perf_counter() - start, history.compile_seconds
    first_use = f", after {compiling:.1f} s of compiling kernels for the GPU, once" if compiling else ""
    print(f"trained for {seconds - compiling:.1f} s{first_use}\n")
    if ranks and ranks.rank:
        return None

    # The test images are looked at once, here, after all choices have been made.
    result = model.evaluate(*task.test, metrics=["accuracy", "confusion_matrix"])
    if options.plots:
        save_pictures(options.plots, model, history, *task.test, result["confusion_matrix"])
        print(f"pictures are in {options.plots}")
    if options.save:
        model.save(options.save)
        print(f"the model is in {options.save}")
    print(f"test accuracy: {result['accuracy']:.4f}", flush=True)
    return result["accuracy"]


def positive(kind):
    def number(text):
        if not 0 < (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
        return value

    return number


def seed(text):
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must not be below 0, not {text}")
    return value


def fraction(text):
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value


def file_to_write(text):
    if (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", help='"auto", "cpu", "gpu" or "gpu:1" (default: %(default)s)')
    parser.add_argument("--model", choices=RECIPES, default="mlp", help="(default: %(default)s)")
    parser.add_argument("--dataset", choices=DATASETS, default="mnist", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=positive(int), help="times through the data (default: the model's recipe)")
    parser.add_argument("--batch-size", type=positive(int), help="images an update (default: the model's recipe)")
    parser.add_argument("--learning-rate", type=positive(float), help="at its peak (default: the model's recipe)")
    parser.add_argument("--seed", type=seed, default=0, help="decides the first weights and the order of the images")
    parser.add_argument("--data-dir", type=Path, help="a folder with the four files of the dataset")
    parser.add_argument(
        "--target-accuracy", type=fraction, help="fail where the accuracy on the test set is below this"
    )
    parser.add_argument(
        "--save", type=file_to_write, metavar="PATH", help="write the trained model to this .safetensors file"
    )
    parser.add_argument("--distributed", action="store_true", help="share batches with other processes of mpiexec")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write pictures into this folder (needs matplotlib)")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks the sign × shall not end the run
    try:
        accuracy = run(options)
    except (errors.XpnetError, OSError) as error:
        sys.exit(f"mnist.py: {error}")
    if None not in (options.target_accuracy, accuracy) and accuracy < options.target_accuracy:
        sys.exit(f"mnist.py: the test accuracy {accuracy:.4f} is below the target of {options.target_accuracy:g}")


if __name__ == "__main__":
    main()
