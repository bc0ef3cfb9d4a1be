"""The return types of the dataset functions."""

from typing import Any, NamedTuple

from numpy.typing import NDArray


class Samples(NamedTuple):
    """Inputs x (N, ...) and targets y (N,) or (N, outputs); unpacks as `x, y`."""

    x: NDArray[Any]
    y: NDArray[Any]


class Split(NamedTuple):
    """Training and test samples; unpacks as `(x_train, y_train), (x_test, y_test)`."""

    train: Samples
    test: Samples
