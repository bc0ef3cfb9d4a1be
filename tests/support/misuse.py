"""Rows of misuse: a wrong call, the error that it must raise, and what must work afterwards."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import xpnet
from xpnet import layers
from xpnet.errors import XpnetError


class Subject:
    """What a row may misuse: a built model, data for it, and an empty folder. Each row gets new ones.

    x and y: arrays, or lists of arrays.  A subclass may define `build`, which sets model, x and y.
    """

    x: Any
    y: Any
    model: Any

    def __init__(self, folder: Path, backend: Any = "cpu") -> None:
        self.folder = folder
        self.build(np.random.default_rng(0), backend)

    def build(self, rng: np.random.Generator, backend: Any) -> None:
        self.x = rng.normal(size=(12, 4)).astype("float32")
        self.y = rng.integers(0, 3, 12)
        self.model = xpnet.Sequential(
            [layers.Dense(5), layers.Tanh(), layers.Dense(3)], input_shape=(4,), backend=backend, seed=0
        )

    def step(self) -> None:
        """A correct call: one step of training, and one prediction."""
        logs = self.model.train_on_batch(self.x, self.y, loss="softmax_cross_entropy", optimizer="sgd")
        assert np.isfinite(logs["loss"])
        assert all(np.isfinite(outputs).all() for outputs in _arrays(self.model.predict(self.x)))


@dataclasses.dataclass(frozen=True)
class Misuse:
    """One row."""

    #: The id of the test.
    name: str
    call: Callable[[Subject], object]
    error: type[XpnetError]
    #: What the message must contain: the argument or layer, what was expected, what came.
    words: tuple[str, ...]
    #: Whether the call may end whole steps of training before it fails. Otherwise the weights must stay as they were.
    trains: bool = False
    subject: type[Subject] = Subject


def check(row: Misuse, subject: Subject) -> None:
    """Raise AssertionError unless the row fails as it must, and the model and the data are whole afterwards."""
    subject.step()
    before = subject.model.state_dict()
    data = [(array, array.copy()) for array in (*_arrays(subject.x), *_arrays(subject.y))]
    try:
        result = row.call(subject)
    except XpnetError as error:
        message = str(error)
        assert isinstance(error, row.error), f"{type(error).__name__} instead of {row.error.__name__}: {message}"
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} instead of {row.error.__name__}: {error}") from error
    else:
        raise AssertionError(f"it was accepted, and gave {result!r:.200}")
    missing = [word for word in row.words if word not in message]
    assert not missing, f"the message does not say {missing}: {message}"
    after = subject.model.state_dict()
    assert all(np.isfinite(value).all() for value in after.values())
    if not row.trains:
        assert all((after[name] == value).all() for name, value in before.items()), "the weights have changed"
    assert all((array == old).all() for array, old in data), "the data of the user has changed"
    subject.step()


def _arrays(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]
