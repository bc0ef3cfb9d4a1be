"""EpochMetrics: the loss and the metrics of an epoch, summed on the device."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from xpnet.backends import Array
from xpnet.data.dataset import Batch, total_weight
from xpnet.distributed.process_group import ProcessGroup
from xpnet.errors import ArgumentError, DataError, ShapeError
from xpnet.layers.containers import Sequential
from xpnet.metrics import Metric

_CAPACITY = 1024  # batches, if their number is not known


class EpochMetrics:
    """Sums for the loss and the metrics. Those of the loss are kept per batch, to find the first NaN.

    batch_sums: (3, capacity), float64, on the device: Σ w ℓ of each batch; its Σ w, if samples have weights; the
    penalties. The first `batches` columns are used.
    """

    def __init__(self, model: Sequential, metrics: Sequence[Metric], batches: int | None = None) -> None:
        """`batches`: the number of batches to expect, if it is known."""
        self._model, self._metrics = model, metrics
        self.batch_sums = model.backend.zeros((3, batches or _CAPACITY), "float64")
        self._sizes: list[int] = []  # samples of each batch
        self._weighted: list[bool] = []  # whether they have weights
        self._sums: dict[str, Array] = {}
        self._rows: dict[str, list[Array]] = {}  # of metrics that collect them
        self._host: numpy.ndarray[Any, Any] | None = None  # the sums of the batches, once they were read

    def clear(self) -> None:
        """Start again, in the same arrays."""
        self._sizes, self._weighted, self._host = [], [], None
        self.batch_sums.fill(0.0)
        self._rows.clear()
        for metric in self._metrics:
            if metric.name in self._sums and metric.starts_from_zeros:
                self._sums[metric.name].fill(0)
            else:
                self._sums.pop(metric.name, None)

    @property
    def batches(self) -> int:
        """The number of batches so far."""
        return len(self._sizes)

    @property
    def arrays(self) -> dict[str, Array]:
        """The device arrays that hold the sums, by name."""
        return {"losses": self.batch_sums, **self._sums}

    def add(self, per_sample: Array, batch: Batch, outputs: Array) -> None:
        """Add a batch: the loss ℓ of each sample, the batch itself, and the outputs of the model."""
        column, empty = len(self._sizes), batch.has_no_rows
        self.reserve(1)
        if not empty:
            self.add_on_device(self.batch_sums, column, per_sample, batch, outputs)
        self._host = None
        self._sizes.append(0 if empty else len(batch))
        self._weighted.append(batch.weights is not None)

    def reserve(self, batches: int) -> None:
        """Make room for so many more batches."""
        xp = self._model.backend.xp
        while len(self._sizes) + batches > self.batch_sums.shape[1]:
            self.batch_sums = xp.concatenate([self.batch_sums, xp.zeros_like(self.batch_sums)], axis=1)

    def add_replayed(self, sums: Array, sizes: Sequence[int], weighted: bool) -> None:
        """Add batches of these sizes, whose sums (3, batches) a replay has computed. weighted: they have weights."""
        first, batches = len(self._sizes), len(sizes)
        if first + batches > self.batch_sums.shape[1]:
            self.reserve(batches)
        self.batch_sums[:, first : first + batches] = sums
        self.count_batches(sizes, weighted)

    @property
    def sums_of_batch(self) -> list[Array]:
        """After one batch in metrics with room for one: `batch_sums`, and what each metric has summed."""
        of_metrics = [self._rows[m.name][0] if m.collects else self._sums[m.name] for m in self._metrics]
        return [self.batch_sums, *of_metrics]

    def add_sums(self, sums: Sequence[Array], batch: Batch) -> None:
        """Add a batch whose `sums_of_batch` a replay has computed."""
        losses, *of_metrics = sums
        self.add_replayed(losses, [len(batch)], batch.weights is not None)
        for metric, own in zip(self._metrics, of_metrics, strict=True):
            kept = metric.collects or metric.name not in self._sums  # beyond the next replay, which overwrites it
            self._merge(metric, own.copy() if kept else own)

    def count_batches(self, sizes: Sequence[int], weighted: bool) -> None:
        """Count batches of these sizes, which a replay has added on the device, with sample weights or without."""
        self._sizes += sizes
        self._weighted += [weighted] * len(sizes)
        self._host = None

    def add_on_device(self, batch_sums: Array, column: int, per_sample: Array, batch: Batch, outputs: Array) -> None:
        """The part of `add` on the device: the loss goes into this column of `batch_sums`."""
        backend = self._model.backend
        if getattr(per_sample, "shape", None) != (len(batch),):
            got = tuple(per_sample.shape) if hasattr(per_sample, "shape") else repr(per_sample)
            raise ShapeError(f"the loss must give one number per sample, {(len(batch),)}, not {got}.")
        weighted = per_sample if batch.weights is None else per_sample * batch.weights
        backend.sum_to(weighted, batch_sums[0, column, ...])
        store = self._model.context.store
        if store.penalized():
            total = len(batch) if batch.weights is None else total_weight(backend.xp, batch.weights)
            batch_sums[2, column] = store.penalty(total)
        if batch.weights is not None:
            backend.sum_to(batch.weights, batch_sums[1, column, ...])
        for metric in self._metrics:
            self._merge(metric, metric.sums(backend, outputs, batch.y, batch.counts))

    def _merge(self, metric: Metric, sums: Array) -> None:
        """Add the sums of a metric over a batch to those of the batches before."""
        if metric.collects:
            self._rows.setdefault(metric.name, []).append(sums)
            return
        before = self._sums.get(metric.name)
        merged = sums if before is None else metric.merge(before, sums)
        # Counts become floats with the first batch that has weights.
        if before is not None and metric.starts_from_zeros and merged.dtype == before.dtype:
            before[...] = merged
        else:
            self._sums[metric.name] = merged

    def over_ranks(self, group: ProcessGroup) -> "EpochMetrics":
        """The metrics over the samples of all ranks; every rank must call it. Waits for the device."""
        if group.size == 1:
            return self
        parts = group.all_gather(self.state_dict())
        whole, first = EpochMetrics(self._model, self._metrics, max(1, self.batches)), parts[0]
        batches = numpy.sum([part["steps"] for part in parts], axis=0)
        batches[2] = numpy.max([part["steps"][2] for part in parts], axis=0)  # equal on all ranks that had rows
        sums: dict[str, Any] = {}
        for metric in self._metrics:
            name = f"metric {metric.name}"
            if found := [part[name] for part in parts if name in part]:
                sums[name] = numpy.concatenate(found) if metric.collects else functools.reduce(metric.merge, found)
        sizes = numpy.sum([part["sizes"] for part in parts], axis=0)
        whole.load_state_dict({**first, **sums, "steps": batches, "sizes": sizes})
        return whole

    def state_dict(self) -> dict[str, numpy.ndarray[Any, Any]]:
        """All sums so far, on the host. Waits for the device."""
        to_numpy = self._model.backend.to_numpy
        return {
            "steps": self._on_host().copy(),
            "sizes": numpy.array(self._sizes),
            "weighted": numpy.array(self._weighted, dtype=bool),
            **{f"metric {name}": to_numpy(a) for name, a in self._sums.items()},
            **{f"metric {name}": self._joined(name) for name in self._rows},
        }

    def refuse_state(self, state: Mapping[str, numpy.ndarray[Any, Any]], samples: int, like: Mapping[str, Any]) -> None:
        """Raise ArgumentError unless `state_dict` can return this state after this number of samples.

        like: the sums of each metric over some samples.
        """
        wanted = ["steps", "sizes", "weighted", *(f"metric {m.name}" for m in self._metrics if samples)]
        if missing := [name for name in wanted if name not in state]:
            raise ArgumentError(f"its sums of the epoch lack {', '.join(missing)}.")
        sizes, steps, weighted = state["sizes"], state["steps"], state["weighted"]
        if not (sizes.ndim == 1 and (sizes >= 0).all() and sizes.sum() == samples and (sizes == sizes // 1).all()):
            raise ArgumentError(f"its batches of this epoch do not have {samples} samples.")
        if not (steps.shape == (3, len(sizes)) and steps.dtype.kind == "f"):
            raise ArgumentError(f"its sums of the batches have shape {steps.shape}, not {(3, len(sizes))}.")
        if not (weighted.shape in ((), sizes.shape) and weighted.dtype.kind == "b"):
            raise ArgumentError(f"its sums of the epoch are weighted or not, but say {weighted!r:.100}.")
        for metric in self._metrics:
            sums, own = state.get(f"metric {metric.name}"), like.get(metric.name)
            if sums is None or own is None:
                continue
            same = tuple(own.shape) == sums.shape or not metric.starts_from_zeros
            if not same or sums.ndim != own.ndim or sums.dtype.kind not in "fiub":
                raise ArgumentError(f"its sums of {metric.name} have shape {sums.shape}, not {tuple(own.shape)}.")

    def load_state_dict(self, state: Mapping[str, numpy.ndarray[Any, Any]]) -> None:
        """Restore what `state_dict` returned."""
        asarray = self._model.backend.asarray
        self._sizes = state["sizes"].astype(int).tolist()
        self._weighted = numpy.broadcast_to(state["weighted"], len(self._sizes)).tolist()  # one bool in older files
        batch_sums = numpy.zeros((3, max(self.batch_sums.shape[1], 2 * self.batches)))
        batch_sums[:, : self.batches] = state["steps"]
        self.batch_sums = asarray(batch_sums)
        self._sums, self._rows, self._host = {}, {}, None
        for metric in self._metrics:
            key = f"metric {metric.name}"
            if key in state:
                sums = asarray(metric.restored(state[key]))
                if metric.collects:
                    self._rows[metric.name] = [sums]
                else:
                    self._sums[metric.name] = sums

    def drop_sums(self) -> None:
        """Keep only the number of batches: another rank has the sums."""
        self.batch_sums.fill(0.0)
        self._sums.clear()
        self._rows.clear()
        self._sizes, self._host = [0] * len(self._sizes), None

    def result(self, as_sum: bool = False, whole: bool = True) -> dict[str, Any]:
        """{"loss": Σ w ℓ / Σ w (or Σ w ℓ) + penalties, "accuracy": …}. Waits for the device.

        {} without samples, and as long as all weights are 0. whole: False leaves out metrics that collect rows, whose
        results take long.
        """
        to_numpy = self._model.backend.to_numpy
        losses, weights, penalties = self._on_host()
        weight = _total(weights)
        if not weight:
            return {}
        loss = _total(losses) if as_sum else _total(losses) / weight
        if _total(penalties):  # none is negative
            loss += _total(penalties * weights) / weight
        logs: dict[str, Any] = {"loss": loss}
        for metric in self._metrics:
            if metric.collects and not whole:
                continue
            score = metric.result(self._joined(metric.name) if metric.collects else to_numpy(self._sums[metric.name]))
            logs[metric.name] = score.item() if getattr(score, "shape", None) == () else score  # a Python number
        return logs

    def final_result(self, as_sum: bool = False) -> dict[str, Any]:
        """`result` of a whole dataset. Raises DataError if all weights are 0."""
        result, samples = self.result(as_sum), sum(self._sizes)
        if not result and samples:
            raise DataError(
                f"the weights of all {samples} samples are 0, from sample_weight and class_weight together, "
                "so there is no mean: give some sample a weight above 0."
            )
        return result

    def first_non_finite_batch(self) -> int | None:
        """The first batch whose loss is NaN or infinite; None if all are finite. Waits for the device."""
        losses = self._on_host()[0]
        if math.isfinite(_total(losses)):
            return None
        finite = numpy.isfinite(losses)
        return None if finite.all() else int(finite.argmin())

    def _joined(self, name: str) -> numpy.ndarray[Any, Any]:
        """The rows that a metric has collected, on the host."""
        return numpy.concatenate([self._model.backend.to_numpy(rows) for rows in self._rows[name]])

    def _on_host(self) -> numpy.ndarray[Any, Any]:
        """The sums of the batches so far, (3, batches)."""
        if self._host is None:
            batch_sums = numpy.array(self._model.backend.to_numpy(self.batch_sums[:, : self.batches]))
            if True in self._weighted:
                batch_sums[1] = numpy.where(self._weighted, batch_sums[1], self._sizes)
            else:
                batch_sums[1] = self._sizes
            self._host = batch_sums
        return self._host


def _total(row: numpy.ndarray[Any, Any]) -> float:
    """The sum of a row. Of a single number, as with one batch per epoch, `sum` would take longer than the rest."""
    return float(row[0] if len(row) == 1 else row.sum())
