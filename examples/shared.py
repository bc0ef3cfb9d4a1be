"""What the examples of graph models share: a command line and the images."""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy
from mnist import load_task, positive, seed

import xpnet
from xpnet import errors


class Images(NamedTuple):
    """Training and test images as float32 (N, height, width, 1) with pixels in [0, 1], and their labels (N,)."""

    name: str
    x: numpy.ndarray
    y: numpy.ndarray
    x_test: numpy.ndarray
    y_test: numpy.ndarray


def as_images(name, train, test, largest_pixel):
    x, x_test = (samples.x[..., None].astype("float32") / largest_pixel for samples in (train, test))
    return Images(name, x, train.y, x_test, test.y)


def main(run, plots=False):
    """Parse the command line and call run(images, options). plots: whether the program can write pictures."""
    program = sys.modules["__main__"]
    parser = argparse.ArgumentParser(description=program.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", help='"auto", "cpu", "gpu" or "gpu:1" (default: %(default)s)')
    parser.add_argument("--seed", type=seed, default=0, help="of weights, noise and order of images (default: 0)")
    parser.add_argument("--epochs", type=positive(int), help="epochs of training (default: those of the program)")
    parser.add_argument("--data-dir", type=Path, help="a folder with the four files of MNIST")
    if plots:
        parser.add_argument("--plots", type=Path, metavar="DIR", help="write pictures there (needs matplotlib)")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # some terminals cannot print ×
    try:
        if plots and options.plots:
            from xpnet import plots as _  # noqa: F401  # fails before the training if matplotlib is missing

            options.plots.mkdir(parents=True, exist_ok=True)
        options.backend = xpnet.get_backend(options.backend)
        images = as_images(*load_task(data_dir=options.data_dir))
        height, width = images.x.shape[1:3]
        print(f"{images.name}: {len(images.x)} images of {height}×{width} pixels, {len(images.x_test)} for the test\n")
        run(images, options)
    except (errors.XpnetError, OSError) as error:
        sys.exit(f"{Path(program.__file__).name}: {error}")
