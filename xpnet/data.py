"""Data on its way into a model: checked once, put on the device once, handed out in batches."""

import math
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy

from xpnet.backends import Array, Backend, DType
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError
from xpnet.layers.base import Workspace
from xpnet.layers.containers import Sequential
from xpnet.losses import Loss
from xpnet.ranks import ALONE, Ranks


@dataclass
class Batch:
    """Some samples on the device. Good until the next batch is made.

    x: inputs.  y: targets.  weights: what each sample weighs in the loss.  counts: how often it counts in metrics,
    which is its weight without its class's.  None where all are 1.  first_row: its place in the update, over all ranks.
    idle: this rank has no rows of the batch, and holds one of zeros that is not to count.
    """

    x: Array
    y: Array
    weights: Array | None
    counts: Array | None
    first_row: int = field(default=0, kw_only=True)
    idle: bool = field(default=False, kw_only=True)

    def __len__(self) -> int:
        return len(self.x)


@dataclass
class Samples(Batch):
    """A whole checked set. Integer inputs lie here as they came, and become `x_dtype` a batch at a time."""

    x_dtype: DType

    @property
    def samples(self) -> int:
        return len(self)

    def digest(self) -> str:
        """The layout of the set, and a check of some of its numbers: to tell whether others have the same."""
        rows = [0, len(self) // 2, len(self) - 1]
        parts = [numpy.asarray([_tell(a[i]) for i in rows]) for a in self.arrays]
        layouts = ", ".join(f"{a.dtype} {tuple(a.shape)}" for a in self.arrays)
        return f"{layouts}, check {zlib.crc32(numpy.concatenate(parts).tobytes()):08x}"

    @property
    def arrays(self) -> list[Array]:
        """x, y, and the weights and counts that there are."""
        return [a for a in (self.x, self.y, self.weights, self.counts) if a is not None]

    def updates(
        self,
        work: Workspace,
        size: int,
        accumulate: int,
        key: Sequence[int] | None,
        first: int = 0,
        ranks: Ranks = ALONE,
    ) -> Generator["Update"]:
        """An epoch in batches of `size`, so many to an update, from sample `first` on.

        key: seeds the permutation, drawn on the host; None keeps the order. One batch of all has no order.
        """
        order = None
        if key is not None and len(self) > size:
            order = work.context.backend.asarray(numpy.random.default_rng(key).permutation(len(self)))
        for start in range(first, len(self), size * accumulate):
            rows = min(size * accumulate, len(self) - start)
            yield Update(self, work, order, start, rows, size, ranks)

    def batches(
        self,
        work: Workspace,
        size: int,
        order: Array | None = None,
        first: int = 0,
        end: int | None = None,
        ranks: Ranks = ALONE,
    ) -> Iterator[Batch]:
        """Batches of `size`, the last one perhaps smaller, of the rows in `order`, or as they lie, from `first` on.

        Of each, the rows of this rank.
        """
        end = len(self) if end is None else end
        for start in range(first, end, size):
            own = ranks.share(min(size, end - start))
            place = slice(start + own.start, start + own.stop)
            if own.start == own.stop:
                yield self._idle(work)
                continue
            rows = self.rows_at(place) if order is None else order[place]
            yield Batch(
                _rows(work, "x", self.x, rows, self.x_dtype),
                _rows(work, "y", self.y, rows, self.y.dtype),
                None if self.weights is None else _rows(work, "weights", self.weights, rows, self.weights.dtype),
                None if self.counts is None else _rows(work, "counts", self.counts, rows, self.counts.dtype),
                first_row=place.start - first,
            )

    def rows_at(self, place: slice) -> slice:
        """Where the samples at these places of the set lie in the arrays."""
        return place

    def weight(self, update: "Update") -> Array:
        """Σ w over the samples of an update, of all ranks; without axes, on the device."""
        xp, place = update.work.context.backend.xp, slice(update.start, update.start + update.rows)
        weights: Array = self.weights
        return total_weight(xp, weights[place] if update.order is None else xp.take(weights, update.order[place]))

    def _idle(self, work: Workspace) -> Batch:
        zeros = work.context.backend.zeros
        x = zeros((1, *self.x.shape[1:]), self.x_dtype)
        y = zeros((1, *self.y.shape[1:]), self.y.dtype)
        weights = None if self.weights is None else zeros((1,), self.weights.dtype)
        return Batch(x, y, weights, weights, idle=True)


class Update(NamedTuple):
    """What one update of the parameters is made of: `rows` of the samples from `start` on, in batches of `size`.

    order: in which they are taken, or None as they lie.  ranks: that share each batch.
    """

    samples: Samples
    work: Workspace
    order: Array | None
    start: int
    rows: int
    size: int
    ranks: Ranks = ALONE

    @property
    def several(self) -> int:
        """How many batches."""
        return -(-self.rows // self.size)

    @property
    def sizes(self) -> list[int]:
        """How many samples in each of them."""
        return [min(self.size, self.rows - first) for first in range(0, self.rows, self.size)]

    def batches(self) -> Iterator[Batch]:
        end = self.start + self.rows
        return self.samples.batches(self.work, self.size, self.order, self.start, end, self.ranks)

    def total(self) -> Any:
        """Σ w over them, of all ranks: a number or a 0-d array on the device."""
        return self.rows if self.samples.weights is None else self.samples.weight(self)


def prepare(
    model: Sequential,
    x: Any,
    y: Any,
    loss: Loss,
    sample_weight: Any = None,
    class_weight: Mapping[int, float] | Sequence[float] | None = None,
    names: tuple[str, str] = ("x", "y"),
    whole: bool = True,
) -> Samples:
    """Check a set against the model and the loss, and put it where the model is.

    Refused here, before anything is trained: empty sets, lengths that differ, wrong shapes, NaN and infinity, labels
    out of range, useless weights. `names` are what the errors call the two arrays. A set that is not `whole` is a part
    of one, in which all weights may be 0.
    """
    x, x_dtype = prepare_inputs(model, x, names[0])
    backend, dtype = model.backend, model.context.dtype
    y = as_numbers(backend, y, names[1])
    if y.dtype.kind == "f":
        y = _converted(backend, y, dtype)
    if y.ndim == 0 or len(y) != len(x):
        lengths = "a single number" if y.ndim == 0 else f"{len(y)} targets"
        raise DataError(f"{names[0]} holds {len(x)} samples, but {names[1]} holds {lengths}. They must match.")
    refuse_non_finite(backend, y, names[1])
    try:
        y = loss.check_targets(backend, y, model.output_shape)
    except ArgumentError as error:
        raise type(error)(f"{names[1]}: {error}") from error
    if not (loss.classifies and y.ndim == 1):  # class numbers stay integers
        y = backend.xp.ascontiguousarray(backend.asarray(y, dtype=dtype))
    counts = None if sample_weight is None else _sample_weights(backend, sample_weight, len(x), dtype, whole)
    weights = counts
    if class_weight is not None:
        by_class = backend.asarray(loss.weights_by_class(backend, class_weight, y, model.output_shape[-1]), dtype=dtype)
        weights = by_class if weights is None else weights * by_class
        if whole and float(weights.max()) == 0:
            raise DataError("with class_weight, no sample of the set has a weight above 0.")
    return Samples(x, y, weights, counts, x_dtype)


def prepare_inputs(model: Sequential, x: Any, name: str = "x", finite: bool = True) -> tuple[Array, DType]:
    """(x on the model's device, the dtype in which the first layer wants it), checked; `finite` refuses NaN too."""
    backend = model.backend
    x = as_numbers(backend, x, name)
    expected = model.input_shape
    if tuple(x.shape[1:]) != expected or x.ndim == 0:
        sizes = ", ".join(map(str, expected))
        hint = ""
        if x.ndim and x.shape == expected:
            hint = " For a single sample, add the batch axis: x[None]."
        elif x.ndim > 1 and math.prod(x.shape[1:]) == math.prod(expected):
            hint = f" The sizes agree: reshape it, or begin the model with a layer for {tuple(x.shape[1:])}."
        raise ShapeError(f"{name} must have shape (N, {sizes}), as the model's input_shape says, but has "
                         f"{tuple(x.shape)}.{hint}")  # fmt: skip
    if len(x) == 0:
        raise DataError(f"{name} is empty: it has shape {tuple(x.shape)}.")
    if x.dtype.kind == "f":
        x = _converted(backend, x, model.context.dtype)
    if finite:
        refuse_non_finite(backend, x, name)
    model.check_inputs(x, name)
    # In one layout, so that the same numbers give the same result, by the BLAS and not by a loop around it.
    x = backend.xp.ascontiguousarray(x)
    return x, x.dtype if model.accepts_integers else model.context.dtype


def total_weight(xp: Any, weights: Array) -> Array:
    """Σ w in float64; 1 where all are 0, for a batch without weight has no gradient, rather than 0 / 0."""
    total = xp.sum(weights, dtype=xp.float64)
    return total + (total == 0)


def as_numbers(backend: Backend, a: Any, name: str) -> Array:
    """`a` as an array of numbers on the device; refuses text, objects and complex numbers."""
    try:
        array = numpy.asarray(a) if isinstance(a, list | tuple) else a
        kind = getattr(getattr(array, "dtype", None), "kind", "f")  # other libraries' dtypes have none
        if kind in "fiub":
            array = backend.asarray(array)
            kind = array.dtype.kind
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"{name} cannot be made an array: {error}") from error
    if kind not in "fiub":
        what = "text or objects" if kind in "OSU" else f"dtype {array.dtype}"
        raise ArgumentTypeError(f"{name} must be an array of real numbers, but holds {what}. Encode it first.")
    return array


def refuse_non_finite(backend: Backend, a: Array, name: str) -> None:
    """Raise DataError where `a` holds NaN or infinity. Reads the device; makes no array unless there is one."""
    if a.dtype.kind != "f" or a.size == 0:
        return
    if a.flags.c_contiguous:
        flat = a.reshape(-1)
        with numpy.errstate(over="ignore", invalid="ignore"):
            if math.isfinite(float(backend.xp.dot(flat, flat))):
                return  # in half the time; but the squares of large numbers may overflow
    if math.isfinite(float(a.min())) and math.isfinite(float(a.max())):
        return
    bad = ~backend.xp.isfinite(a.reshape(len(a), -1)).all(axis=1)
    count, first = int(bad.sum()), int(bad.argmax())
    raise DataError(
        f"{name} holds NaN or infinity, as {a.dtype}, in {count} of {len(a)} samples, first in sample {first}. "
        "Remove or replace them before training."
    )


def _converted(backend: Backend, a: Array, dtype: DType) -> Array:
    """`a` in the model's dtype; what is too large for it becomes infinite in silence, and is refused after that."""
    with numpy.errstate(over="ignore"):
        return backend.asarray(a, dtype=dtype)


def _tell(sample: Array) -> float:
    """A number that two different samples hardly share. Reads the device."""
    flat = sample.reshape(-1).astype("float64")
    return float((flat * (1.0 + flat)).sum())


def _rows(work: Workspace, name: str, array: Array, rows: Any, dtype: DType) -> Array:
    if isinstance(rows, slice):
        view = array[rows]
        if view.dtype == dtype:
            return view
        out = work.buffer(name, view.shape, dtype)
        out[...] = view
        return out
    out = work.buffer(name, (len(rows), *array.shape[1:]), dtype)
    return work.context.backend.gather(array, rows, out)


def _sample_weights(backend: Backend, weights: Any, count: int, dtype: DType, whole: bool) -> Array:
    weights = as_numbers(backend, weights, "sample_weight")
    if tuple(weights.shape) != (count,):
        raise ShapeError(f"sample_weight must have shape ({count},), one a sample, but has {tuple(weights.shape)}.")
    weights = backend.asarray(weights, dtype=dtype)
    refuse_non_finite(backend, weights, "sample_weight")
    if float(weights.min()) < 0 or (whole and float(weights.max()) == 0):
        raise DataError("sample_weight must not be negative, and not zero for all samples.")
    return weights
