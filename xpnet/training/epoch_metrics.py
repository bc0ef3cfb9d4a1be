"""EpochMetrics: the loss and the metrics of an epoch, summed on the device."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from xpnet.backends import Array
from xpnet.data.dataset import Batch
from xpnet.distributed.process_group import ProcessGroup
from xpnet.errors import ShapeError
from xpnet.layers.containers import Sequential
from xpnet.metrics import Metric


class EpochMetrics:
    """Sums for the loss and the metrics. Those of the loss are kept per step, to find the first NaN.

    step_sums: (3, steps) on the device: Σ w ℓ of each step; its Σ w, if samples have weights; its penalties.
    """

    def __init__(self, model: Sequential, metrics: Sequence[Metric], steps: int | None = None) -> None:
        """`steps`: the number of steps to expect, if it is known."""
        self._model, self._metrics = model, metrics
        self.step_sums = model.backend.zeros((3, steps or 1024), "float64")
        self._sizes: list[int] = []  # samples of each step
        self._weighted = False
        self._sums: dict[str, Array] = {}

    def clear(self) -> None:
        """Start again, in the same arrays."""
        self._sizes, self._weighted = [], False
        self.step_sums.fill(0.0)
        for metric in self._metrics:
            if metric.name in self._sums and metric.starts_from_zeros:
                self._sums[metric.name].fill(0)
            else:
                self._sums.pop(metric.name, None)

    @property
    def steps(self) -> int:
        """The number of steps so far."""
        return len(self._sizes)

    @property
    def arrays(self) -> dict[str, Array]:
        """The device arrays that hold the sums, by name."""
        return {"losses": self.step_sums, **self._sums}

    def add(self, per_sample: Array, batch: Batch, outputs: Array) -> None:
        """Add a step: the loss ℓ of each sample, the batch, and the outputs of the model."""
        xp, step = self._model.backend.xp, self.steps
        if step == self.step_sums.shape[1]:
            self.step_sums = xp.concatenate([self.step_sums, xp.zeros_like(self.step_sums)], axis=1)
        if not batch.has_no_rows:
            self.add_to(self.step_sums, step, per_sample, batch, outputs)
        self.count([0 if batch.has_no_rows else len(batch)], batch.weights is not None)

    def count(self, sizes: Sequence[int], weighted: bool) -> None:
        """Count steps of these sizes, with sample weights or without."""
        self._sizes += sizes
        self._weighted |= weighted

    def add_to(self, step_sums: Array, column: int, per_sample: Array, batch: Batch, outputs: Array) -> None:
        """The part of `add` on the device: into this column of an array, and into the metrics."""
        backend = self._model.backend
        if per_sample.shape != (len(batch),):
            raise ShapeError(
                f"the loss must give one number per sample, {(len(batch),)}, not {tuple(per_sample.shape)}."
            )
        weighted = per_sample if batch.weights is None else per_sample * batch.weights
        backend.sum_to(weighted, step_sums[0, column, ...])
        penalty = self._model.context.store.penalty()
        if penalty is not None:
            step_sums[2, column] = penalty
        if batch.weights is not None:
            backend.sum_to(batch.weights, step_sums[1, column, ...])
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
        whole, first = EpochMetrics(self._model, self._metrics, max(1, self.steps)), parts[0]
        steps = numpy.sum([part["steps"] for part in parts], axis=0)
        steps[2] = numpy.max([part["steps"][2] for part in parts], axis=0)  # equal on all ranks that had rows
        sums: dict[str, Any] = {}
        for metric in self._metrics:
            name = f"metric {metric.name}"
            if found := [part[name] for part in parts if name in part]:
                sums[name] = functools.reduce(metric.merge, found)
        sizes = numpy.sum([part["sizes"] for part in parts], axis=0)
        whole.load_state_dict({**first, **sums, "steps": steps, "sizes": sizes})
        return whole

    def state_dict(self) -> dict[str, numpy.ndarray[Any, Any]]:
        """All sums so far, on the host. Waits for the device."""
        to_numpy = self._model.backend.to_numpy
        return {
            "steps": self._on_host(),
            "sizes": numpy.array(self._sizes),
            "weighted": numpy.array(self._weighted),
            **{f"metric {name}": to_numpy(a) for name, a in self._sums.items()},
        }

    def load_state_dict(self, state: Mapping[str, numpy.ndarray[Any, Any]]) -> None:
        """Continue from such sums."""
        asarray = self._model.backend.asarray
        self._sizes, self._weighted = state["sizes"].tolist(), bool(state["weighted"])
        step_sums = numpy.zeros((3, max(self.step_sums.shape[1], 2 * self.steps)))
        step_sums[:, : self.steps] = state["steps"]
        self.step_sums = asarray(step_sums)
        named = {m.name: f"metric {m.name}" for m in self._metrics}
        self._sums = {name: asarray(state[key]) for name, key in named.items() if key in state}

    def drop_sums(self) -> None:
        """Keep only the number of steps: another rank has the sums."""
        self.step_sums.fill(0.0)
        self._sums.clear()
        self._sizes = [0] * len(self._sizes)

    def result(self, as_sum: bool = False) -> dict[str, Any]:
        """{"loss": …, "accuracy": …} so far. The loss is a mean over samples, or their sum. Waits for the device."""
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

    def first_non_finite(self) -> int | None:
        """The first step whose loss is NaN or infinite; None if all are finite. Waits for the device."""
        finite = numpy.isfinite(self._on_host()[0])
        return None if finite.all() else int(finite.argmin())

    def _on_host(self) -> numpy.ndarray[Any, Any]:
        """The sums of the steps so far, (3, steps)."""
        step_sums = numpy.array(self._model.backend.to_numpy(self.step_sums[:, : self.steps]))
        if not self._weighted:
            step_sums[1] = self._sizes
        return step_sums
