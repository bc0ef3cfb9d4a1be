"""Embedding: a learned vector for each integer of a vocabulary."""

from typing import Any

from xpnet.backends import Array
from xpnet.config import integer, penalties
from xpnet.errors import ArgumentTypeError, DataError
from xpnet.layers.base import Layer
from xpnet.layers.context import Shape


class Embedding(Layer):
    """y = weight[x], one row per integer: (N, ...) → (N, ..., features).

    vocabulary_size: the number of rows; x holds integers from 0 to vocabulary_size - 1. A model refuses other values
    before it computes, and floats too, since float32 cannot represent every integer above 16,777,216.
    weight is (vocabulary_size, features). `l1`, `l2` ≥ 0 penalize it, as in Dense.

    It must be the first layer of a model, or follow layers that only rearrange. Integers have no gradient: `backward`
    fills the gradient of the weight and returns None, and so does `backward` of the model.
    """

    accepts_integers = True

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        *,
        weight_initializer: Any = "normal",
        l1: float = 0.0,
        l2: float = 0.0,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.vocabulary_size = integer(self, "vocabulary_size", vocabulary_size)
        self.features = integer(self, "features", features)
        self.weight_initializer, (self.l1, self.l2) = weight_initializer, penalties(self, l1, l2)

    def build(self, input_shape: Shape) -> Shape:
        shape = (self.vocabulary_size, self.features)
        self.weight = self.add_parameter("weight", shape, self.weight_initializer, l1=self.l1, l2=self.l2)
        return (*input_shape, self.features)

    def check_inputs(self, x: Array, name: str) -> None:
        """Refuse floats, and integers out of range, which the CPU would clip and a GPU would use to read elsewhere."""
        if x.dtype.kind == "f":
            if bool((x == self.xp.floor(x)).all()):
                advice = f"All are whole numbers, so convert them: numpy.asarray({name}, dtype='int64')."
            else:
                advice = "Embedding is for words, classes and similar; use Dense for measurements."
            raise DataError(f"{name} holds floats, but {self._takes()}. {advice}")
        if int(x.min()) >= 0 and int(x.max()) < self.vocabulary_size:
            return
        samples = self.backend.to_numpy(x).reshape(len(x), -1)
        outside = (samples < 0) | (samples >= self.vocabulary_size)
        first = int(outside.any(axis=1).argmax())
        value = int(samples[first][outside[first].argmax()])
        raise DataError(
            f"{name} holds {value} in sample {first}, but {self._takes()}. Number the words from 0, and set "
            "vocabulary_size to the largest number plus 1."
        )

    def _takes(self) -> str:
        return f"{self._label} takes integers from 0 to {self.vocabulary_size - 1}"

    def forward(self, x: Array) -> Array:
        """y = weight[x], with x as (R,) and y as (R, features)."""
        if x.dtype.kind not in "iub":
            raise ArgumentTypeError(
                f"{self._takes()}, not {x.dtype}. Make it the first layer of the model, or put it after layers that "
                "only rearrange, and give the model integers."
            )
        work = self.work
        work.rows = x.reshape(-1).astype(self.xp.int64, copy=False)
        y = work.buffer("y", (len(work.rows), self.features))
        return self.backend.gather(self.weight.value, work.rows, out=y).reshape(*x.shape, self.features)

    def backward(self, grad_y: Array) -> None:
        """y_i is row x_i of the weight, so row v gets the gradients of all rows i with x_i = v:

        ∂L/∂weight_v = Σ_{i: x_i = v} ∂L/∂y_i.
        """
        self.weight.grad[...] = 0.0
        self.xp.add.at(self.weight.grad, self.work.rows, grad_y.reshape(-1, self.features))
