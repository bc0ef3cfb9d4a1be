"""Datasets in memory: checked, on the device, and handed out in batches and steps."""

import math
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy

from xpnet.backends import Array, DType
from xpnet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from xpnet.layers.context import Workspace


@dataclass
class Batch:
    """Some samples on the device. Valid until the next batch is made.

    x: inputs.  y: targets.  weights: the weight of each sample in the loss; None if all are 1.  counts: its weight in
    metrics, in float64, without class weights; None if all are 1 or there are no metrics.  first_row: the index of the
    batch's first row in the step, over all ranks.  has_no_rows: whether this rank has no rows of the batch; x and y are
    then placeholders, which must not count.
    """

    x: Array
    y: Array
    weights: Array | None
    counts: Array | None
    first_row: int = field(default=0, kw_only=True)
    has_no_rows: bool = field(default=False, kw_only=True)

    def __len__(self) -> int:
        return len(self.x)


@dataclass
class Dataset(Batch):
    """A whole checked dataset. Integer inputs keep their dtype and are converted to `x_dtype` batch by batch.

    private: whether every batch is a copy, because a custom layer, loss or metric might write into it.
    """

    x_dtype: DType
    private: bool = field(default=False, kw_only=True)

    @property
    def samples(self) -> int:
        return len(self)

    @property
    def arrays(self) -> list[Array]:
        """x, y, and weights and counts if there are any."""
        return [a for a in (self.x, self.y, self.weights, self.counts) if a is not None]

    def digest(self) -> str:
        """The layout of the dataset and a checksum of three samples, to check that all ranks have the same data."""
        rows = [0, len(self) // 2, len(self) - 1]
        parts = [numpy.asarray([_fingerprint(a[i]) for i in rows]) for a in self.arrays]
        layouts = ", ".join(f"{a.dtype} {tuple(a.shape)}" for a in self.arrays)
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
        batch_size, weights, counts, copy = batch_size or len(self), self.weights, self.counts, self.private
        for start in range(first, end, batch_size):
            own = group.rows_of(min(batch_size, end - start))
            place = slice(start + own.start, start + own.stop)
            if own.start == own.stop:
                yield self._placeholder(work)
                continue
            rows = self.stored_rows(place) if order is None else order[place]
            yield Batch(
                _gathered(work, "x", self.x, rows, self.x_dtype, copy),
                _gathered(work, "y", self.y, rows, self.y.dtype, copy),
                None if weights is None else _gathered(work, "weights", weights, rows, weights.dtype, copy),
                None if counts is None else _gathered(work, "counts", counts, rows, counts.dtype, copy),
                first_row=place.start - first,
            )

    def stored_rows(self, place: slice) -> slice:
        """The rows of the arrays that hold these samples; a RankWindow stores only those of its rank."""
        return place

    def weight(self, step: "StepData") -> Array:
        """Σ w over the samples of a step on all ranks, as a 0-d device array."""
        xp, place = step.work.context.backend.xp, slice(step.start, step.start + step.rows)
        weights: Array = self.weights
        return total_weight(xp, weights[place] if step.order is None else xp.take(weights, step.order[place]))

    def _placeholder(self, work: Workspace) -> Batch:
        zeros = work.context.backend.zeros
        x = zeros((1, *self.x.shape[1:]), self.x_dtype)
        y = zeros((1, *self.y.shape[1:]), self.y.dtype)
        weights = None if self.weights is None else zeros((1,), self.weights.dtype)
        return Batch(x, y, weights, weights, has_no_rows=True)


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
        """Σ w over the samples of the step on all ranks: a number, or a 0-d device array."""
        return self.rows if self.dataset.weights is None else self.dataset.weight(self)


def total_weight(xp: Any, weights: Array) -> Array:
    """Σ w in float64; 1 if all weights are 0, so that such a batch has no gradient instead of 0 / 0."""
    total = xp.sum(weights, dtype=xp.float64)
    return total + (total == 0)


def _gathered(work: Workspace, name: str, array: Array, rows: Any, dtype: DType, copy: bool) -> Array:
    """These rows (a slice or an index array) in a dtype, in a buffer unless they are a view already."""
    if isinstance(rows, slice):
        view = array[rows]
        if view.dtype == dtype and not copy:
            return view
        out = work.buffer(name, view.shape, dtype)
        out[...] = view
        return out
    out = work.buffer(name, (len(rows), *array.shape[1:]), dtype)
    return work.context.backend.gather(array, rows, out)


def _fingerprint(sample: Array) -> float:
    """A number that is unlikely to be the same for two different samples. Reads the device."""
    flat = sample.reshape(-1).astype("float64")
    return float((flat * (1.0 + flat)).sum())
