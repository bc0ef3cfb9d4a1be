"""Datasets in memory: checked, on the device, and handed out in batches and steps."""

import functools
import math
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy

from xpnet.backends import Array, DType
from xpnet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from xpnet.layers.context import Workspace
from xpnet.layers.structure import as_tuple

_FIELDS = ("x", "y", "weights", "counts")


@dataclass
class Batch:
    """Some samples on the device. Valid until the next batch is made.

    x: inputs, an array, or a tuple of arrays if the model has several inputs.  y: targets, the same for outputs.
    weights: the weight of each sample in the loss, (N,), or (N, outputs) if it depends on the output; None if all are
    1. Weights of the rows of several outputs are a tuple, see `training/rows.py`.  counts: the weight of each sample in
    metrics, in float64, without class weights; None if all are 1 or there are no metrics.
    first_row: the index of the batch's first row in the step, over all ranks.  has_no_rows: whether this rank has no
    rows of the batch; x and y are then placeholders, which must not count.
    """

    x: Array
    y: Array
    weights: Array | None
    counts: Array | None
    first_row: int = field(default=0, kw_only=True)
    has_no_rows: bool = field(default=False, kw_only=True)

    def __len__(self) -> int:
        return len(as_tuple(self.x)[0])

    @property
    def arrays(self) -> dict[str, Array]:
        """The arrays by name: x, or x_0, x_1, … if there are several; y; weights and counts if there are any."""
        found: dict[str, Array] = {}
        for name in _FIELDS:
            value = getattr(self, name)
            if isinstance(value, tuple):
                found |= {f"{name}_{i}": a for i, a in enumerate(value)}
            elif value is not None:
                found[name] = value
        return found

    def replaced(self, new: Callable[[str, Array], Array]) -> dict[str, Any]:
        """The fields of a batch that has new(name, array) in place of each of the `arrays`."""
        fields: dict[str, Any] = {}
        for name in _FIELDS:
            value = getattr(self, name)
            if isinstance(value, tuple):
                fields[name] = tuple(new(f"{name}_{i}", a) for i, a in enumerate(value))
            else:
                fields[name] = None if value is None else new(name, value)
        return fields


@dataclass
class Dataset(Batch):
    """A whole checked dataset. Integer inputs keep their dtype and are converted to `x_dtype` batch by batch.

    x_dtype: a tuple if there are several inputs.  private: whether every batch is a copy, because a custom layer, loss
    or metric might write into it.
    """

    x_dtype: DType
    private: bool = field(default=False, kw_only=True)

    @property
    def samples(self) -> int:
        return len(self)

    @property
    def dtypes(self) -> dict[str, DType]:
        """The dtypes of the arrays of a batch, by name."""
        arrays = self.arrays
        inputs = dict(zip(arrays, as_tuple(self.x_dtype), strict=False))
        return {name: inputs.get(name, a.dtype) for name, a in arrays.items()}

    def digest(self) -> str:
        """The layout of the dataset and a checksum of three samples, to check that all ranks have the same data."""
        arrays, rows = self.arrays.values(), [0, len(self) // 2, len(self) - 1]
        parts = [numpy.asarray([_fingerprint(a[i]) for i in rows]) for a in arrays]
        layouts = ", ".join(f"{a.dtype} {tuple(a.shape)}" for a in arrays)
        return f"{layouts}, check {zlib.crc32(numpy.concatenate(parts).tobytes()):08x}"

    def steps(
        self,
        work: Workspace,
        batch_size: int,
        accumulate: int,
        key: Sequence[int] | None,
        first: int = 0,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> Generator["StepData"]:
        """One epoch from sample `first` on, in steps of `accumulate` batches.

        key: seeds the permutation, which is drawn on the host; None keeps the order. A single batch of all samples is
        not permuted.
        """
        order = None
        if key is not None and len(self) > batch_size:
            order = work.context.backend.asarray(numpy.random.default_rng(key).permutation(len(self)))
        for start in range(first, len(self), batch_size * accumulate):
            rows = min(batch_size * accumulate, len(self) - start)
            yield StepData(self, work, order, start, rows, batch_size, group)

    def batches(
        self,
        work: Workspace,
        batch_size: int | None,
        order: Array | None = None,
        first: int = 0,
        end: int | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> Iterator[Batch]:
        """Batches of the samples in `order` (None: as stored) from `first` to `end`: the rows of this rank in each.

        batch_size: None makes one batch.
        """
        end = len(self) if end is None else end
        batch_size, dtypes = batch_size or len(self), self.dtypes
        for start in range(first, end, batch_size):
            own = group.rows_of(min(batch_size, end - start))
            place = slice(start + own.start, start + own.stop)
            if own.start == own.stop:
                yield self._placeholder(work)
                continue
            rows = self.stored_rows(place) if order is None else order[place]
            gathered = functools.partial(self._gathered, work, dtypes, rows)
            yield Batch(**self.replaced(gathered), first_row=place.start - first)

    def stored_rows(self, place: slice) -> slice:
        """The rows of the arrays that hold these samples; a RankWindow stores only those of its rank."""
        return place

    def weight(self, step: "StepData") -> Array:
        """Σ w over the samples of a step on all ranks, in float64: a 0-d device array, or (outputs,)."""
        xp, place = step.work.context.backend.xp, slice(step.start, step.start + step.rows)
        weights: Array = self.weights
        return total_weight(xp, weights[place] if step.order is None else xp.take(weights, step.order[place], axis=0))

    def _placeholder(self, work: Workspace) -> Batch:
        zeros, dtypes = work.context.backend.zeros, self.dtypes
        return Batch(**self.replaced(lambda name, a: zeros((1, *a.shape[1:]), dtypes[name])), has_no_rows=True)

    def _gathered(self, work: Workspace, dtypes: Mapping[str, DType], rows: Any, name: str, array: Array) -> Array:
        """These rows (a slice or an index array) of an array, in a buffer unless they are a view already."""
        dtype = dtypes[name]
        if isinstance(rows, slice):
            view = array[rows]
            if view.dtype == dtype and not self.private:
                return view
            out = work.buffer(name, view.shape, dtype)
            out[...] = view
            return out
        out = work.buffer(name, (len(rows), *array.shape[1:]), dtype)
        return work.context.backend.gather(array, rows, out)


class StepData(NamedTuple):
    """The samples of one step: `rows` of a dataset from `start` on, in batches of `batch_size`.

    order: the permutation of the epoch, or None.  group: the ranks that share each batch.
    """

    dataset: Dataset
    work: Workspace
    order: Array | None
    start: int
    rows: int
    batch_size: int
    group: ProcessGroup = SINGLE_PROCESS

    @property
    def batch_count(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    @property
    def batch_sizes(self) -> list[int]:
        return [min(self.batch_size, self.rows - first) for first in range(0, self.rows, self.batch_size)]

    def batches(self) -> Iterator[Batch]:
        end = self.start + self.rows
        return self.dataset.batches(self.work, self.batch_size, self.order, self.start, end, self.group)

    def total_weight(self) -> Any:
        """Σ w over the samples of the step on all ranks: a number, or `Dataset.weight`."""
        return self.rows if self.dataset.weights is None else self.dataset.weight(self)


def total_weight(xp: Any, weights: Any) -> Any:
    """Σ w in float64; (outputs,) for weights (N, outputs), and a tuple for a tuple of weights.

    It is 1 where all weights are 0, so that such a batch has no gradient instead of 0 / 0.
    """
    if isinstance(weights, tuple):
        return tuple(total_weight(xp, own) for own in weights)
    total = xp.sum(weights, axis=0, dtype=xp.float64) if weights.ndim > 1 else xp.sum(weights, dtype=xp.float64)
    return total + (total == 0)


def mean_total(total: Any) -> Any:
    """Σ w as one number, from `total_weight`: the mean over the outputs if these have their own weights."""
    if isinstance(total, tuple):
        return sum(total) / len(total)
    return total.mean() if getattr(total, "ndim", 0) else total


def of_output(weights: Any, output: int) -> Array:
    """The weights of the samples or rows for one output, (N,)."""
    if isinstance(weights, tuple):
        return weights[output]
    return weights[:, output] if weights.ndim > 1 else weights


def _fingerprint(sample: Array) -> float:
    """A number that is unlikely to be the same for two different samples. Reads the device."""
    flat = sample.reshape(-1).astype("float64")
    return float((flat * (1.0 + flat)).sum())
