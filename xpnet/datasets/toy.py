"""Toy datasets: the problems of the tutorials in docs/tutorials.md, and two-dimensional point clouds.

Arrays are float64, except the labels of the point clouds, which are int64.
"""

import math

import numpy
from numpy.typing import ArrayLike, NDArray

from xpnet.config import as_seed, explain_arguments, integer, number
from xpnet.datasets.samples import Samples
from xpnet.errors import unknown_name

_MOST_SAMPLES = 10**8  # of a point cloud: more do not fit into memory

# The outputs for the inputs 00, 01, 10 and 11.
_GATES = {
    "and": (0, 0, 0, 1),
    "nand": (1, 1, 1, 0),
    "or": (0, 1, 1, 1),
    "nor": (1, 0, 0, 0),
    "xor": (0, 1, 1, 0),
    "xnor": (1, 0, 0, 1),
}


@explain_arguments
def logic_gate(name: str) -> Samples:
    """The truth table of "and", "nand", "or", "nor", "xor" or "xnor": x (4, 2) in the order 00, 01, 10, 11; y (4, 1).

    A single neuron can learn all but xor and xnor, because a straight line separates their zeros from their ones.
    """
    if not isinstance(name, str) or name not in _GATES:
        raise unknown_name("logic gate", name, _GATES)
    return _samples([[0, 0], [0, 1], [1, 0], [1, 1]], _GATES[name])


def perceptron_and() -> Samples:
    """Three of the eight rows of a three-input AND, from which a perceptron learns the rest: x (3, 3), y (3, 1).

    From "Basics of Neural Networks" by Ganesh KT, 2020.
    """
    return _samples([[1, 1, 1], [0, 0, 0], [1, 0, 1]], [1, 0, 0])


def exam_scores() -> Samples:
    """Hours of sleep and study, and the score in a test: x (3, 2) in hours, y (3, 1) in hundreds of points.

    From "Basics of Neural Networks" by Ganesh KT, 2020: scores are divided by 100, hours are not scaled.
    """
    return _samples([[3, 5], [5, 1], [10, 2]], [0.75, 0.82, 0.93])


def weight_height() -> Samples:
    """Weight and height of Alice, Bob, Charlie and Diana: x (4, 2), y (4, 1), 1 for female.

    The columns of x are weight in pounds minus 135 and height in inches minus 66.

    From "An Introduction to Neural Networks" by Victor Zhou, https://victorzhou.com/blog/intro-to-neural-networks/.
    """
    return _samples([[-2, -1], [25, 6], [17, 4], [-15, -6]], [1, 0, 0, 1])


def xor_with_constant() -> Samples:
    """XOR with a third input that is always 1, so that a network without biases can learn it: x (4, 3), y (4, 1).

    From a tutorial that trains a two-layer network in plain NumPy for 1500 iterations.
    """
    return _samples([[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]], [0, 1, 1, 0])


@explain_arguments
def blobs(n: int = 300, classes: int = 3, noise: float = 0.5, seed: int = 0) -> Samples:
    """Gaussian clouds with centers evenly spaced on a circle of radius 3: x (n, 2), y (n,) int64.

    noise: the standard deviation of each cloud. Classes alternate row by row, so every slice is balanced.
    """
    generator, y = _generator_and_labels(n, classes, noise, seed)
    x = 3.0 * _on_circle(2.0 * math.pi * y / classes)
    return Samples(x + noise * generator.standard_normal(x.shape), y)


@explain_arguments
def moons(n: int = 300, noise: float = 0.1, seed: int = 0) -> Samples:
    """Two interleaved half circles: x (n, 2), y (n,) int64, 0 for the upper and 1 for the lower.

    noise: the standard deviation of the noise added to each coordinate. Classes alternate row by row.
    """
    generator, y = _generator_and_labels(n, 2, noise, seed)
    upper = _on_circle(math.pi * generator.random(len(y)))
    x = numpy.where(y[:, None] == 0, upper, numpy.array([1.0, 0.5]) - upper)
    return Samples(x + noise * generator.standard_normal(x.shape), y)


@explain_arguments
def spirals(n: int = 300, classes: int = 3, noise: float = 0.2, seed: int = 0) -> Samples:
    """Spiral arms that wind about the origin by two thirds of a turn: x (n, 2) in the unit circle, y (n,) int64.

    noise: the standard deviation of the angle, in radians. Classes alternate row by row.
    """
    generator, y = _generator_and_labels(n, classes, noise, seed)
    radius = generator.random(len(y))
    angle = 2.0 * math.pi * y / classes + 4.0 * radius + noise * generator.standard_normal(len(y))
    return Samples(radius[:, None] * _on_circle(angle), y)


def _samples(x: ArrayLike, y: ArrayLike) -> Samples:
    """These rows as float64, the targets as one column."""
    return Samples(numpy.array(x, dtype=numpy.float64), numpy.array(y, dtype=numpy.float64).reshape(-1, 1))


def _generator_and_labels(
    n: int, classes: int, noise: float, seed: int
) -> tuple[numpy.random.Generator, NDArray[numpy.int64]]:
    """A random generator, and the labels 0, 1, … in turn, (n,). Checks the arguments."""
    n = integer("", "n", n, at_least=integer("", "classes", classes), at_most=_MOST_SAMPLES)
    number("", "noise", noise, at_least=0, finite=True)
    return numpy.random.default_rng(as_seed("", seed)), numpy.arange(n) % classes


def _on_circle(angle: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """The points (n, 2) of the unit circle at these angles (n,), in radians."""
    return numpy.stack([numpy.cos(angle), numpy.sin(angle)], axis=1)
