"""Problems small enough to follow by hand: those of the classic tutorials, and clouds of points to draw.

Everything is float64, but for the integer labels of the clouds.
"""

import math

import numpy
from numpy.typing import ArrayLike, NDArray

from xpnet.datasets.samples import Samples
from xpnet.errors import ArgumentError, unknown_name

# Outputs for the inputs 00, 01, 10, 11.
_GATES = {
    "and": (0, 0, 0, 1),
    "nand": (1, 1, 1, 0),
    "or": (0, 1, 1, 1),
    "nor": (1, 0, 0, 0),
    "xor": (0, 1, 1, 0),
    "xnor": (1, 0, 0, 1),
}


def logic_gate(name: str) -> Samples:
    """The truth table of "and", "nand", "or", "nor", "xor" or "xnor": x (4, 2) in the order 00, 01, 10, 11; y (4, 1).

    All but xor and xnor can be learnt by one neuron: a line parts their zeros from their ones.
    """
    if name not in _GATES:
        raise unknown_name("logic gate", name, _GATES)
    return _samples([[0, 0], [0, 1], [1, 0], [1, 1]], _GATES[name])


def perceptron_and() -> Samples:
    """Three of the eight rows of a three-input AND, enough for a perceptron to learn the rest: x (3, 3), y (3, 1).

    From "Basics of Neural Networks" by Ganesh KT, 2020.
    """
    return _samples([[1, 1, 1], [0, 0, 0], [1, 0, 1]], [1, 0, 0])


def exam_scores() -> Samples:
    """Hours of sleep and of study against the score in a test: x (3, 2) in hours, y (3, 1) as a share of 100 points.

    As used in "Basics of Neural Networks" by Ganesh KT, 2020: scores divided by 100, hours not scaled.
    """
    return _samples([[3, 5], [5, 1], [10, 2]], [0.75, 0.82, 0.93])


def weight_height() -> Samples:
    """Weight less 135 pounds and height less 66 inches of Alice, Bob, Charlie and Diana: x (4, 2); y (4, 1), 1 female.

    From "An Introduction to Neural Networks" by Victor Zhou, https://victorzhou.com/blog/intro-to-neural-networks/.
    """
    return _samples([[-2, -1], [25, 6], [17, 4], [-15, -6]], [1, 0, 0, 1])


def xor_with_constant() -> Samples:
    """XOR with a third input that is always 1, so that a net without biases can learn it: x (4, 3), y (4, 1).

    From the tutorial of a two-layer network in plain NumPy, which trains it for 1500 iterations.
    """
    return _samples([[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]], [0, 1, 1, 0])


def blobs(n: int = 300, classes: int = 3, noise: float = 0.5, seed: int = 0) -> Samples:
    """Round clouds whose centres lie evenly on a circle of radius 3: x (n, 2), y (n,) int64.

    noise: the standard deviation of each cloud. The classes take turns, row by row, so any slice is balanced.
    """
    generator, y = _begin(n, classes, noise, seed)
    x = 3.0 * _on_circle(2.0 * math.pi * y / classes)
    return Samples(x + noise * generator.standard_normal((n, 2)), y)


def moons(n: int = 300, noise: float = 0.1, seed: int = 0) -> Samples:
    """Two half circles that reach into each other: x (n, 2), y (n,) int64, 0 the upper and 1 the lower.

    noise: the standard deviation added to each coordinate. The classes take turns, row by row.
    """
    generator, y = _begin(n, 2, noise, seed)
    upper = _on_circle(math.pi * generator.random(n))
    x = numpy.where(y[:, None] == 0, upper, numpy.array([1.0, 0.5]) - upper)
    return Samples(x + noise * generator.standard_normal((n, 2)), y)


def spirals(n: int = 300, classes: int = 3, noise: float = 0.2, seed: int = 0) -> Samples:
    """Arms of a galaxy, wound about the origin by two thirds of a turn: x (n, 2) within the unit circle, y (n,) int64.

    noise: the standard deviation of the angle, in radians. The classes take turns, row by row.
    """
    generator, y = _begin(n, classes, noise, seed)
    radius = generator.random(n)
    angle = 2.0 * math.pi * y / classes + 4.0 * radius + noise * generator.standard_normal(n)
    return Samples(radius[:, None] * _on_circle(angle), y)


def _samples(x: ArrayLike, y: ArrayLike) -> Samples:
    """Written-out rows as float64, the targets as one column."""
    return Samples(numpy.array(x, dtype=numpy.float64), numpy.array(y, dtype=numpy.float64).reshape(-1, 1))


def _begin(n: int, classes: int, noise: float, seed: int) -> tuple[numpy.random.Generator, NDArray[numpy.int64]]:
    """The arguments checked, then the random stream and the labels 0, 1, ... in turn."""
    if classes < 1 or n < classes:
        raise ArgumentError(f"n={n} points in classes={classes}: expected at least one class, and a point for each.")
    if not 0 <= noise < math.inf:
        raise ArgumentError(f"noise={noise} is a standard deviation: expected 0 or more, and finite.")
    if seed < 0:
        raise ArgumentError(f"seed={seed}: expected a whole number, 0 or more.")
    return numpy.random.default_rng(seed), numpy.arange(n, dtype=numpy.int64) % classes


def _on_circle(angle: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Angles (n,) in radians as points (n, 2) of the unit circle."""
    return numpy.stack([numpy.cos(angle), numpy.sin(angle)], axis=1)
