"""EpochMetrics: the loss and the metrics of an epoch, summed on the device."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from xpnet.backends import Array
from xpnet.data.dataset import Batch, mean_total, of_output, total_weight
from xpnet.distributed.process_group import ProcessGroup
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, shown
from xpnet.layers.containers import Container
from xpnet.layers.structure import as_tuple
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.training.output_losses import OutputLosses
from xpnet.training.rows import Rows

_CAPACITY = 1024  # batches, if their number is not known


class EpochMetrics:
    """Sums for the loss and the metrics. Those of the loss are kept per batch, to find the first NaN.

    batch_sums: (3, capacity), float64, on the device: Σ w ℓ of each batch; its Σ w, if samples have weights; the
    penalties. A batch has one column, or one for each output of the model, of which the first has the penalties.
    columns_per_batch: how many.  column: the next one.
    """

    def __init__(self, model: Container, loss: Loss, metrics: Sequence[Metric], batches: int | None = None) -> None:
        """`batches`: the number of batches to expect, if it is known."""
        self._model, self._loss, self._metrics = model, loss, metrics
        self.columns_per_batch, self.rows = len(loss.by_output), Rows(model, loss)
        self.batch_sums = model.backend.zeros((3, (batches or _CAPACITY) * self.columns_per_batch), "float64")
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
    def column(self) -> int:
        return len(self._sizes) * self.columns_per_batch

    @property
    def names(self) -> list[str]:
        """The names of the results."""
        losses = [f"{name}_loss" for name in self._loss.losses] if isinstance(self._loss, OutputLosses) else []
        return ["loss", *losses, *[metric.name for metric in self._metrics]]

    @property
    def arrays(self) -> dict[str, Array]:
        """The device arrays that hold the sums, by name."""
        return {"losses": self.batch_sums, **self._sums}

    def add(self, per_sample: Array, batch: Batch, outputs: Array) -> None:
        """Add a batch: the loss ℓ of each row, the batch, and the outputs of the model, as `Rows` returns them.

        With several outputs, the losses and the outputs are tuples.
        """
        column, empty = self.column, batch.has_no_rows
        self.reserve(1)
        if not empty:
            self.add_on_device(self.batch_sums, column, per_sample, batch, outputs)
        self._host = None
        self._sizes.append(0 if empty else len(batch))
        self._weighted.append(batch.weights is not None)

    def reserve(self, batches: int) -> None:
        """Make room for this number of further batches."""
        xp = self._model.backend.xp
        while not self.has_room_for(batches):
            self.batch_sums = xp.concatenate([self.batch_sums, xp.zeros_like(self.batch_sums)], axis=1)

    def has_room_for(self, batches: int) -> bool:
        return self.column + batches * self.columns_per_batch <= int(self.batch_sums.shape[1])

    def add_replayed(self, sums: Array, sizes: Sequence[int], weighted: bool) -> None:
        """Add batches of these sizes, whose sums (3, columns) a replay has computed. weighted: they have weights."""
        first, end = self.column, self.column + sums.shape[1]
        if end > self.batch_sums.shape[1]:
            self.reserve(len(sizes))
        self.batch_sums[:, first:end] = sums
        self.count_batches(sizes, weighted)

    @property
    def sums_of_batch(self) -> list[Array]:
        """After one batch in metrics with room for one: `batch_sums`, and what each metric has summed."""
        of_metrics = [self._rows[m.name][0] if m.collects else self._sums[m.name] for m in self._metrics]
        return [self.batch_sums, *of_metrics]

    def add_sums(self, sums: Sequence[Array], batch: Batch) -> None:
        """Add a batch whose `sums_of_batch` a replay has computed."""
        losses, *of_metrics = sums
        self.add_replayed(losses, [len(batch)], self.rows.weighted or batch.weights is not None)
        for metric, own in zip(self._metrics, of_metrics, strict=True):
            kept = metric.collects or metric.name not in self._sums  # beyond the next replay, which overwrites it
            self._merge(metric, own.copy() if kept else own)

    def count_batches(self, sizes: Sequence[int], weighted: bool) -> None:
        """Count batches of these sizes, which a replay has added on the device, with sample weights or without."""
        self._sizes += sizes
        self._weighted += [weighted] * len(sizes)
        self._host = None

    def add_on_device(self, batch_sums: Array, column: int, per_sample: Any, batch: Batch, outputs: Any) -> None:
        """The part of `add` on the device: the losses go into `batch_sums`, from this column on."""
        backend, weights = self._model.backend, batch.weights
        for k, (losses, rows) in enumerate(zip(as_tuple(per_sample), map(len, as_tuple(outputs)), strict=True)):
            if getattr(losses, "shape", None) != (rows,):
                got = tuple(losses.shape) if hasattr(losses, "shape") else repr(losses)
                raise ShapeError(f"the loss must give one number per sample, {(rows,)}, not {got}.")
            own = None if weights is None else of_output(weights, k)
            backend.sum_to(losses if own is None else losses * own, batch_sums[0, column + k, ...])
            if own is not None:
                backend.sum_to(own, batch_sums[1, column + k, ...])
        store = self._model.context.store
        if store.penalized():
            total = len(batch) if weights is None else mean_total(total_weight(backend.xp, weights))
            batch_sums[2, column] = store.penalty(total)
        for metric in self._metrics:
            self._merge(metric, metric.sums(backend, *scored_by(metric, outputs, batch)))

    def _merge(self, metric: Metric, sums: Array) -> None:
        """Add the sums of a metric over a batch to those of the batches before."""
        if metric.collects:
            self._rows.setdefault(metric.name, []).append(sums)
            return
        before = self._sums.get(metric.name)
        merged = sums if before is None else metric.merge(before, sums)
        if before is not None and getattr(getattr(merged, "dtype", None), "kind", "O") == "O":
            raise ArgumentTypeError(
                f"{type(metric).__name__}: merge must return an array of numbers, not {shown(merged)}."
            )
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
        whole, first = EpochMetrics(self._model, self._loss, self._metrics, max(1, self.batches)), parts[0]
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
        shape = (3, len(sizes) * self.columns_per_batch)
        if not (steps.shape == shape and steps.dtype.kind == "f"):
            raise ArgumentError(f"its sums of the batches have shape {steps.shape}, not {shape}.")
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
        batch_sums = numpy.zeros((3, max(self.batch_sums.shape[1], 2 * self.column)))
        batch_sums[:, : self.column] = state["steps"]
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

    def result(self, reduced: bool = False, whole: bool = True) -> dict[str, Any]:
        """{"loss": Σ w ℓ / Σ w + penalties, "accuracy": …}. Waits for the device.

        With several outputs: {"loss": Σ_k λ_k L_k + penalties, "digit_loss": L_0, …}, with L = Σ w ℓ / Σ w. {} without
        samples, and as long as all weights are 0.

        reduced: whether a loss with reduction="sum" is Σ w ℓ.  whole: False leaves out metrics that collect rows, whose
        results take long.
        """
        to_numpy, each = self._model.backend.to_numpy, self._losses(self._on_host(), reduced)
        if each is None:
            return {}
        loss, *parts = each
        logs: dict[str, Any] = dict(zip(self.names, [loss, *(parts if len(parts) > 1 else ())], strict=False))
        for metric in self._metrics:
            if metric.collects and not whole:
                continue
            score = metric.result(self._joined(metric.name) if metric.collects else to_numpy(self._sums[metric.name]))
            logs[metric.name] = score.item() if getattr(score, "shape", None) == () else score  # a Python number
        return logs

    def loss_of_last(self, batches: int) -> float | None:
        """The loss of the last batches, as `result` has it for all; None if all weights are 0. Waits for the device."""
        columns = batches * self.columns_per_batch
        each = self._losses(self._on_host()[:, -columns:]) if columns else None
        return None if each is None else each[0]

    def _losses(self, batch_sums: numpy.ndarray[Any, Any], reduced: bool = False) -> list[float] | None:
        """[Σ_k λ_k L_k + penalties, L_0, …] of batches with these sums; None if all weights are 0."""
        parts, loss, each = self._loss.by_output, 0.0, []
        for k, (part, factor) in enumerate(parts):
            losses, weights, _ = batch_sums[:, k :: len(parts)]
            weight = _total(weights)
            if not weight:
                return None
            each.append(_total(losses) if reduced and part.reduction == "sum" else _total(losses) / weight)
            loss += factor * each[-1]
        penalties, weights = batch_sums[2, :: len(parts)], batch_sums[1, :: len(parts)]
        if _total(penalties):  # none is negative
            loss += _total(penalties * weights) / _total(weights)
        return [loss, *each]

    def final_result(self, reduced: bool = False) -> dict[str, Any]:
        """`result` of a whole dataset. Raises DataError if all weights are 0."""
        result, samples = self.result(reduced), sum(self._sizes)
        if not result and samples:
            raise DataError(
                f"the weights of all {samples} samples are 0, from sample_weight and class_weight together, "
                "or masks leave out all of their steps, so there is no mean: give some sample a weight above 0."
            )
        return result

    def first_non_finite_batch(self) -> int | None:
        """The first batch whose loss is NaN or infinite; None if all are finite. Waits for the device."""
        losses = self._on_host()[0]
        if math.isfinite(_total(losses)):
            return None
        finite = numpy.isfinite(losses)
        return None if finite.all() else int(finite.argmin()) // self.columns_per_batch

    def _joined(self, name: str) -> numpy.ndarray[Any, Any]:
        """The rows that a metric has collected, on the host."""
        return numpy.concatenate([self._model.backend.to_numpy(rows) for rows in self._rows[name]])

    def _on_host(self) -> numpy.ndarray[Any, Any]:
        """The sums of the batches so far, (3, columns)."""
        if self._host is None:
            batch_sums = numpy.array(self._model.backend.to_numpy(self.batch_sums[:, : self.column]))
            sizes: Any = self._sizes
            weighted = self._weighted
            if self.columns_per_batch > 1:
                sizes, weighted = (numpy.repeat(a, self.columns_per_batch).tolist() for a in (sizes, weighted))
            if not self.rows.are_samples:
                sizes = numpy.multiply(sizes, numpy.tile(self.rows.per_sample, len(self._sizes)))
            batch_sums[1] = numpy.where(weighted, batch_sums[1], sizes) if True in weighted else sizes
            self._host = batch_sums
        return self._host


def scored_by(metric: Metric, outputs: Any, batch: Batch) -> tuple[Array, Array, Array | None]:
    """(outputs, targets, weights) of the output that a metric scores."""
    k, counts = metric.output, batch.counts
    if k is None:
        return outputs, batch.y, counts
    return outputs[k], batch.y[k], None if counts is None else of_output(counts, k)


def _total(row: numpy.ndarray[Any, Any]) -> float:
    """The sum of a row. Of a single number, as with one batch per epoch, `sum` would take longer than the rest."""
    return float(row[0] if len(row) == 1 else row.sum())
