"""Embedding: a learned vector for each integer of a vocabulary."""

from collections.abc import Sequence
from typing import Any

from xpnet import initializers
from xpnet.backends import Array
from xpnet.config import integer, penalties
from xpnet.errors import ArgumentTypeError, DataError
from xpnet.layers.base import Layer, checked_initializer
from xpnet.layers.context import Shape


class _WithZeroRow(initializers.Initializer):
    """The values of another initializer, with one row of zeros."""

    def __init__(self, initializer: initializers.Initializer, row: int) -> None:
        self.initializer, self.row = initializer, row

    def __call__(self, shape: Sequence[int], rng: Any) -> Any:
        values = self.initializer(shape, rng).copy()
        values[self.row] = 0.0
        return values


class Embedding(Layer):
    """y = weight[x], one row per integer: (N, ...) → (N, ..., features).

    vocabulary_size: the number of rows; x holds integers from 0 to vocabulary_size - 1. A model refuses other values
    before it computes, and floats too, since float32 cannot represent every integer above 16,777,216.
    padding_index: the integer that pads short sequences. Its row of the weight is 0 and is not trained, and the layers
    after it ignore the padded steps of inputs (N, T): recurrent layers, attention, global pooling, losses and metrics.
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
        padding_index: int | None = None,
        weight_initializer: Any = "normal",
        l1: float = 0.0,
        l2: float = 0.0,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.vocabulary_size = integer(self, "vocabulary_size", vocabulary_size)
        self.features, limit = integer(self, "features", features), self.vocabulary_size - 1
        self.padding_index = padding_index
        if padding_index is not None:
            self.padding_index = integer(self, "padding_index", padding_index, at_least=0, at_most=limit, also="None")
        self.weight_initializer = checked_initializer(self, "weight_initializer", weight_initializer)
        self.l1, self.l2 = penalties(self, l1, l2)

    def build(self, input_shape: Shape) -> Shape:
        shape, initializer = (self.vocabulary_size, self.features), self.weight_initializer
        if self.padding_index is not None:
            initializer = _WithZeroRow(initializers.get(initializer), self.padding_index)
        self.weight = self.add_parameter("weight", shape, initializer, l1=self.l1, l2=self.l2)
        self.weight.is_table = True
        self.starts_mask = self.padding_index is not None and len(input_shape) == 1
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

    def start_mask(self, x: Array) -> Array:
        """x ≠ padding_index, (N, T), which forward has found."""
        counted: Array = self.work.counted
        return counted.reshape(x.shape)

    def forward(self, x: Array) -> Array:
        """y = weight[x], with x as (R,) and y as (R, features). It is 0 where x is the padding index."""
        if x.dtype.kind not in "iub":
            raise ArgumentTypeError(
                f"{self._takes()}, not {x.dtype}. Make it the first layer of the model, or put it after layers that "
                "only rearrange, and give the model integers."
            )
        work = self.work
        work.rows = x.reshape(-1).astype(self.xp.int64, copy=False)
        y = work.buffer("y", (len(work.rows), self.features))
        self.backend.gather(self.weight.value, work.rows, out=y)
        if self.padding_index is not None:
            counted = work.buffer("counted", work.rows.shape, "bool")
            work.counted = self.xp.not_equal(work.rows, self.padding_index, out=counted)
            y *= counted[:, None]  # a row that was loaded may not be 0
        return y.reshape(*x.shape, self.features)

    def backward(self, grad_y: Array) -> None:
        """y_i is row x_i of the weight, so row v gets the gradients of all rows i with x_i = v:

        ∂L/∂weight_v = Σ_{i: x_i = v} ∂L/∂y_i, and 0 for the padding index.
        """
        grad = self.weight.grad
        self.backend.add_rows_at(grad_y.reshape(-1, self.features), self.work.rows, out=grad)
        if self.padding_index is not None:
            grad[self.padding_index] = 0.0
