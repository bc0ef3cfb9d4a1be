"""Embedding: a learnt vector for each of so many things, such as words."""

from typing import Any

from xpnet.backends import Array
from xpnet.errors import ArgumentTypeError, DataError
from xpnet.layers.base import Layer, Shape
from xpnet.layers.grid import checked_count


class Embedding(Layer):
    """y = weight[x], a row for each whole number: (N, ...) → (N, ..., features).

    vocabulary_size: how many there are; x holds numbers from 0 to vocabulary_size - 1. A model refuses others, and
    floats, before it computes: float32 cannot even tell 16777216 from 16777217.
    weight is (vocabulary_size, features). `l1`, `l2` ≥ 0 penalise it, as Dense's do.

    It stands first in a model, or behind layers that only rearrange. Whole numbers have no gradient: `backward` fills
    the weight's and returns None, and so does that of the model, also where the gradient of the input is asked for.
    """

    accepts_integers = True

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        weight_initializer: Any = "normal",
        l1: float = 0.0,
        l2: float = 0.0,
    ) -> None:
        self.vocabulary_size = checked_count(self, "vocabulary_size", vocabulary_size)
        self.features = checked_count(self, "features", features)
        self.weight_initializer, self.l1, self.l2 = weight_initializer, l1, l2

    def build(self, input_shape: Shape) -> Shape:
        shape = (self.vocabulary_size, self.features)
        self.weight = self.add_parameter("weight", shape, self.weight_initializer, l1=self.l1, l2=self.l2)
        return (*input_shape, self.features)

    def check_inputs(self, x: Array, name: str) -> None:
        """Refuse floats, and what is out of range: no device would, the CPU clips it and CuPy wraps it around."""
        if x.dtype.kind == "f":
            if bool((x == self.xp.floor(x)).all()):
                mend = f"These are whole, so convert them: numpy.asarray({name}, dtype='int64')."
            else:
                mend = "It is for words, classes and the like; measurements go into a Dense."
            raise DataError(f"{name} holds floats, but {self._takes()}. {mend}")
        if int(x.min()) >= 0 and int(x.max()) < self.vocabulary_size:
            return
        samples = self.backend.to_numpy(x).reshape(len(x), -1)
        outside = (samples < 0) | (samples >= self.vocabulary_size)
        first = int(outside.any(axis=1).argmax())
        value = int(samples[first][outside[first].argmax()])
        raise DataError(
            f"{name} holds {value} in sample {first}, but {self._takes()}. Number things from 0 on, and let "
            "vocabulary_size be the largest number plus 1."
        )

    def _takes(self) -> str:
        place = f"layer {self.path} (Embedding)" if self.path else "Embedding"
        return f"{place} takes whole numbers from 0 to {self.vocabulary_size - 1}"

    def forward(self, x: Array) -> Array:
        if x.dtype.kind not in "iub":
            raise ArgumentTypeError(
                f"{self._takes()}, but {x.dtype} came. Let it stand first in the model, or behind layers that only "
                "rearrange, and give the model integers."
            )
        work = self.work
        work.rows = x.reshape(-1).astype(self.xp.int64, copy=False)
        y = work.buffer("y", (len(work.rows), self.features))
        return self.backend.gather(self.weight.value, work.rows, out=y).reshape(*x.shape, self.features)

    def backward(self, grad_y: Array) -> None:
        """Row v of the weight was the output wherever x was v: ∂L/∂weight_v = Σ over x = v of ∂L/∂y."""
        self.weight.grad[...] = 0.0
        self.xp.add.at(self.weight.grad, self.work.rows, grad_y.reshape(-1, self.features))
