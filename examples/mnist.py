"""Teach a small network to read handwritten digits, and see how well it reads digits it has never seen.

    python examples/mnist.py                                  # on a GPU if one can be used, else on the CPU
    python examples/mnist.py --backend cpu --plots pictures

Only the name given to `backend=` says where the arithmetic runs; all else is the same on both devices.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy

import xpnet
from xpnet import datasets, errors, layers, optimizers, schedules

# The recipe: what decides how well the network learns, and how long that takes. Chosen on the last 5000 training
# images, held out for that, never on the test set.
HIDDEN = 128
EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 12, 128, 8e-3, 0.02

# The digits that come with xpnet are 40 times fewer: smaller batches, seen more often. Chosen by cross-validation
# within their training part.
DIGITS_EPOCHS, DIGITS_BATCH_SIZE, DIGITS_LEARNING_RATE = 20, 16, 4e-3


def build_mlp(image_shape, backend="auto", seed=0, largest_pixel=255):
    """Pixels scaled to [0, 1] → 128 ReLU units → a score for each of the ten digits. No softmax: the loss has it."""
    return xpnet.Sequential(
        [
            layers.Rescale(1 / largest_pixel),
            layers.Flatten(),
            layers.Dense(HIDDEN, weight_initializer="he_uniform"),
            layers.ReLU(),
            layers.Dense(10),
        ],
        input_shape=image_shape,
        backend=backend,
        seed=seed,
    )


MODELS = {"mlp": build_mlp}


def train(model, x, y, epochs=EPOCHS, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, verbose=2):
    """AdamW, while the learning rate climbs to its peak and then sinks to almost nothing."""
    steps_per_epoch = -(-len(x) // batch_size)  # the last batch may be smaller
    schedule = schedules.OneCycle(learning_rate, steps=epochs * steps_per_epoch)
    optimizer = optimizers.AdamW(schedule, weight_decay=WEIGHT_DECAY)
    return model.fit(
        x, y, loss="softmax_cross_entropy", optimizer=optimizer, epochs=epochs, batch_size=batch_size, verbose=verbose
    )


class Task(NamedTuple):
    """Images to learn from and to be tested on, and how to train on them."""

    name: str
    train: datasets.Samples
    test: datasets.Samples
    largest_pixel: int
    epochs: int
    batch_size: int
    learning_rate: float


def load_task(data_dir=None):
    """MNIST; where it can be neither found nor downloaded, the digits that come with xpnet."""
    try:
        split = datasets.mnist(data_dir)
    except errors.DownloadError as error:
        print(f"{error}\nMNIST is not here. To use files of your own: --data-dir FOLDER.")
        print("Training on the 1797 small digits that come with xpnet instead.\n")
        return digits_task()
    return Task("MNIST", *split, 255, EPOCHS, BATCH_SIZE, LEARNING_RATE)


def digits_task():
    """Four fifths to learn from and a fifth for the test: always the same ones, whatever the seed of the training."""
    x, y = datasets.digits()
    order = numpy.random.default_rng(0).permutation(len(x))
    rows, held_out = numpy.split(order, [round(0.8 * len(x))])
    samples = datasets.Samples(x[rows], y[rows]), datasets.Samples(x[held_out], y[held_out])
    return Task("digits", *samples, 16, DIGITS_EPOCHS, DIGITS_BATCH_SIZE, DIGITS_LEARNING_RATE)


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
    """The whole experiment; returns the accuracy on the test set."""
    backend = xpnet.get_backend(options.backend)
    for label, text in backend.describe():
        print(f"{label:9s}{text}")
    if options.plots:
        from xpnet import plots  # noqa: F401  # if matplotlib is missing, better said before the training than after it
    for folder in filter(None, (options.plots, options.save and options.save.parent)):
        folder.mkdir(parents=True, exist_ok=True)

    task = load_task(options.data_dir)
    x, y = task.train
    height, width = x.shape[1:]
    print(f"data     {task.name}: {len(x)} images of {height}×{width} pixels, and {len(task.test.x)} for the test\n")

    model = MODELS[options.model]((height, width), backend, options.seed, task.largest_pixel)
    print(model.summary(), end="\n\n")

    epochs, batch_size = options.epochs or task.epochs, options.batch_size or task.batch_size
    start = time.perf_counter()
    history = train(model, x, y, epochs, batch_size, options.learning_rate or task.learning_rate)
    print(f"trained for {time.perf_counter() - start:.1f} s\n")

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
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
        return value

    return number


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", help='"auto", "cpu", "gpu" or "gpu:1" (default: %(default)s)')
    parser.add_argument("--model", choices=MODELS, default="mlp", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=positive(int), help=f"times through the data (default: {EPOCHS} on MNIST)")
    parser.add_argument("--batch-size", type=positive(int), help=f"images an update (default: {BATCH_SIZE} on MNIST)")
    parser.add_argument(
        "--learning-rate", type=positive(float), help=f"at its peak (default: {LEARNING_RATE:g} on MNIST)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the first weights and the order of the images")
    parser.add_argument("--data-dir", type=Path, help="a folder with the four files of MNIST")
    parser.add_argument("--target-accuracy", type=float, help="fail where the accuracy on the test set is below this")
    parser.add_argument("--save", type=Path, metavar="PATH", help="write the trained model to this .safetensors file")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write pictures into this folder (needs matplotlib)")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks the sign × shall not end the run
    try:
        accuracy = run(options)
    except (errors.XpnetError, OSError) as error:
        sys.exit(f"mnist.py: {error}")
    if options.target_accuracy is not None and accuracy < options.target_accuracy:
        sys.exit(f"mnist.py: the test accuracy {accuracy:.4f} is below the target of {options.target_accuracy:g}")


if __name__ == "__main__":
    main()
