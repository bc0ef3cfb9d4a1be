"""EpochMetrics: the loss and the metrics of an epoch, summed on the device."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from xpnet.backends import Array
from xpnet.data.dataset import Batch
from xpnet.distributed.process_group import ProcessGroup
from xpnet.errors import ArgumentError, ShapeError
from xpnet.layers.containers import Sequential
from xpnet.metrics import Metric


class EpochMetrics:
    """Sums for the loss and the metrics. Those of the loss are kept per batch, to find the first NaN.

    batch_sums: (3, capacity), float64, on the device: Σ w ℓ of each batch; its Σ w, if samples have weights; the
    penalties. The first `batches` columns are used.
    """

    def __init__(self, model: Sequential, metrics: Sequence[Metric], batches: int | None = None) -> None:
        """`batches`: the number of batches to expect, if it is known."""
        self._model, self._metrics = model, metrics
        self.batch_sums = model.backend.zeros((3, batches or 1024), "float64")
        self._sizes: list[int] = []  # samples of each batch
        self._has_weights = False
        self._sums: dict[str, Array] = {}

    def clear(self) -> None:
        """Start again, in the same arrays."""
        self._sizes, self._has_weights = [], False
        self.batch_sums.fill(0.0)
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
        xp, column = self._model.backend.xp, self.batches
        if column == self.batch_sums.shape[1]:
            self.batch_sums = xp.concatenate([self.batch_sums, xp.zeros_like(self.batch_sums)], axis=1)
        if not batch.has_no_rows:
            self.add_on_device(self.batch_sums, column, per_sample, batch, outputs)
        self.count_batches([0 if batch.has_no_rows else len(batch)], batch.weights is not None)

    def count_batches(self, sizes: Sequence[int], weighted: bool) -> None:
        """Count batches of these sizes, with sample weights or without."""
        self._sizes += sizes
        self._has_weights |= weighted

    def add_on_device(self, batch_sums: Array, column: int, per_sample: Array, batch: Batch, outputs: Array) -> None:
        """The part of `add` on the device: the loss goes into this column of `batch_sums`."""
        backend = self._model.backend
        if per_sample.shape != (len(batch),):
            raise ShapeError(
                f"the loss must give one number per sample, {(len(batch),)}, not {tuple(per_sample.shape)}."
            )
        weighted = per_sample if batch.weights is None else per_sample * batch.weights
        backend.sum_to(weighted, batch_sums[0, column, ...])
        penalty = self._model.context.store.penalty()
        if penalty is not None:
            batch_sums[2, column] = penalty
        if batch.weights is not None:
            backend.sum_to(batch.weights, batch_sums[1, column, ...])
        for metric in self._metrics:
            sums = metric.sums(backend, outputs, batch.y, batch.counts)
            before = self._sums.get(metric.name)
            if before is None:
                self._sums[metric.name] = sums
            elif metric.starts_from_zeros:
                before[...] = metric.merge(before, sums)
            else:
                self._sums[metric.name] = metric.merge(before, sums)

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
                sums[name] = functools.reduce(metric.merge, found)
        sizes = numpy.sum([part["sizes"] for part in parts], axis=0)
        whole.load_state_dict({**first, **sums, "steps": batches, "sizes": sizes})
        return whole

    def state_dict(self) -> dict[str, numpy.ndarray[Any, Any]]:
        """All sums so far, on the host. Waits for the device."""
        to_numpy = self._model.backend.to_numpy
        return {
            "steps": self._on_host(),
            "sizes": numpy.array(self._sizes),
            "weighted": numpy.array(self._has_weights),
            **{f"metric {name}": to_numpy(a) for name, a in self._sums.items()},
        }

    def refuse_state(self, state: Mapping[str, numpy.ndarray[Any, Any]], samples: int, like: Mapping[str, Any]) -> None:
        """Raise ArgumentError unless `state` can be what `state_dict` returns after so many samples.

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
        if not (weighted.shape in ((), (len(sizes),)) and weighted.dtype.kind == "b"):
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
        self._sizes, self._has_weights = state["sizes"].astype(int).tolist(), bool(state["weighted"].any())
        batch_sums = numpy.zeros((3, max(self.batch_sums.shape[1], 2 * self.batches)))
        batch_sums[:, : self.batches] = state["steps"]
        self.batch_sums = asarray(batch_sums)
        named = {m.name: f"metric {m.name}" for m in self._metrics}
        self._sums = {name: asarray(state[key]) for name, key in named.items() if key in state}

    def drop_sums(self) -> None:
        """Keep only the number of batches: another rank has the sums."""
        self.batch_sums.fill(0.0)
        self._sums.clear()
        self._sizes = [0] * len(self._sizes)

    def result(self, as_sum: bool = False) -> dict[str, Any]:
        """{"loss": Σ w ℓ / Σ w (or Σ w ℓ) + penalties, "accuracy": …}; {} without samples. Waits for the device."""
        if not sum(self._sizes):
            return {}
        to_numpy = self._model.backend.to_numpy
        losses, weights, penalties = self._on_host()
        weight = weights.sum() or 1.0
        loss = losses.sum() if as_sum else losses.sum() / weight
        logs: dict[str, Any] = {"loss": float(loss + (penalties * weights).sum() / weight)}
        for metric in self._metrics:
            logs[metric.name] = metric.result(to_numpy(self._sums[metric.name]))
        return logs

    def first_non_finite_batch(self) -> int | None:
        """The first batch whose loss is NaN or infinite; None if all are finite. Waits for the device."""
        finite = numpy.isfinite(self._on_host()[0])
        return None if finite.all() else int(finite.argmin())

    def _on_host(self) -> numpy.ndarray[Any, Any]:
        """The sums of the batches so far, (3, batches)."""
        batch_sums = numpy.array(self._model.backend.to_numpy(self.batch_sums[:, : self.batches]))
        if not self._has_weights:
            batch_sums[1] = self._sizes
        return batch_sums
