"""The training step: batch, forward, loss and its gradient, backward, update.

It never reads a device value back: losses and hits gather in device memory, and are read once an epoch, or where
somebody looks.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy

from xpnet.backends import Array
from xpnet.data import Batch
from xpnet.errors import ShapeError, StateError
from xpnet.layers.base import Context, Workspace
from xpnet.layers.containers import Sequential
from xpnet.loss_scaling import LossScale
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.optimizers import Optimizer, OptimizerState
from xpnet.parameters import ParameterStore
from xpnet.ranks import Ranks


class TrainingState:
    """What training leaves on a model: loss and metrics, the optimiser with its memory, and how far it came."""

    def __init__(self) -> None:
        self.loss: Loss | None = None
        self.metrics: list[Metric] = []
        self.optimizer: Optimizer | None = None
        self.memory: OptimizerState | None = None
        self.scaling: LossScale | None = None  # where products are in float16
        self.epoch = 0
        self.rate_factor = 1.0  # callbacks lower the learning rate here; the optimiser is only configuration
        self.running = False

    def begin(self, context: Context, loss: Loss, metrics: list[Metric], optimizer: Optimizer) -> None:
        """Go on where an equal optimiser left off, or start afresh with another one."""
        self.refuse_running()
        self.loss, self.metrics, store = loss, metrics, context.store
        if context.precision != "float16":
            self.scaling = None
        elif self.scaling is None:
            self.scaling = LossScale(context.backend)
        if self.memory is None or self.optimizer != optimizer or tuple(self.memory.slots) != tuple(optimizer.slots):
            self.memory, self.epoch, self.rate_factor = OptimizerState(optimizer, store), 0, 1.0
        self.optimizer = optimizer

    def refuse_running(self) -> None:
        if self.running:
            raise StateError("fit is running on this model: a callback may read and evaluate it, not train or move it.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "running": False, "scaling": None}  # which finds itself again within a few updates

    @property
    def step(self) -> int:
        """Updates made."""
        return self.memory.step if self.memory else 0

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        assert self.optimizer is not None
        return self.optimizer.rate(self.step) * self.rate_factor

    def update(self, store: ParameterStore) -> None:
        """One update of the parameters from their gradients."""
        assert self.optimizer is not None
        assert self.memory is not None
        gate = None if self.scaling is None else self.scaling.gate
        self.optimizer.apply(store, self.memory, lambda: self.rate_factor, gate)


class Step:
    """One update of a model, from one batch or several whose gradients add up."""

    def __init__(self, model: Sequential, state: TrainingState) -> None:
        assert state.loss is not None
        self.model, self.loss, self.state = model, state.loss, state
        self._work = Workspace(model.context)

    def __call__(self, batches: Iterator[Batch], total: Any, figures: "TakesFigures", count: int = 1) -> None:
        """Train on `count` batches as on one. `total` is Σ w over them all, a number or a 0-d device array."""
        with self.model.working():
            self.gradients(batches, total, figures, count)
            self.update()

    def update(self) -> None:
        """Move the parameters by the gradients that are there."""
        self.state.update(self.model.context.store)

    def gradients(self, batches: Iterator[Batch], total: Any, figures: "TakesFigures", count: int = 1) -> None:
        """Fill the gradients of `count` batches and of the penalties."""
        store = self.model.context.store
        context = self.model.context
        context.at_step = self.state.step
        accumulated: Array = None
        for _ in range(count):
            batch = next(batches)
            # Noise is numbered by the rows of the whole update.
            context.first_row, context.idle = batch.first_row, batch.idle
            figures.add(*self.forward_backward(batch, total))
            if batch.idle:
                store.grads[...] = 0.0
            if count > 1:
                accumulated = store.grads.copy() if accumulated is None else accumulated + store.grads
        context.first_row, context.idle = 0, False
        if accumulated is not None:
            store.grads[...] = accumulated
        if context.ranks.size > 1:
            context.ranks.add_up(store.grads)
        if self.state.scaling is not None:
            self.state.scaling.unscale(store)
        store.add_penalty_gradients()

    def forward_backward(self, batch: Batch, total: Any) -> tuple[Array, Batch, Array]:
        """Gradients of Σ w ℓ / total into the store; (ℓ, batch, outputs)."""
        model, loss = self.model, self.loss
        outputs = model.run(batch.x, training=True)
        room = self._work.buffer("grad", outputs.shape)
        per_sample, grad = loss.samples_and_gradient(model.backend, outputs, batch.y, out=room)
        grad = weigh(loss, grad, batch, total)
        if self.state.scaling is not None:
            self.state.scaling.scale(grad)
        model.run_back(grad, input_grad=False)
        return per_sample, batch, outputs


def weigh(loss: Loss, grad: Array, batch: Batch, total: Any) -> Array:
    """∂ℓ_i times w_i / total, or times w_i where the loss is a sum over samples; in place."""
    if batch.weights is not None:
        # Σ w is summed in float64, which must not lift a float32 gradient.
        weights = batch.weights if loss.reduction == "sum" else batch.weights * (1.0 / total).astype(grad.dtype)
        grad *= weights.reshape(-1, *[1] * (grad.ndim - 1))
    elif loss.reduction != "sum":
        grad *= 1.0 / total
    return grad


class TakesFigures(Protocol):
    """Where the loss ℓ of each sample, the batch, and what the model made of it are taken in."""

    def add(self, per_sample: Array, batch: Batch, outputs: Array) -> None: ...


class Figures:
    """Loss and metrics of an epoch, summed on the device, a column a step for the loss: a NaN shows where it began."""

    def __init__(self, model: Sequential, metrics: Sequence[Metric], steps: int | None = None) -> None:
        """`steps`: how many there will be, if that is known."""
        self._model, self._metrics = model, metrics
        #: Rows: Σ w ℓ of each step; its Σ w, where samples have weights; the penalties then.
        self.record = model.backend.zeros((3, steps or 1024), "float64")
        self._sizes: list[int] = []  # samples of each step
        self._weighted = False
        self._sums: dict[str, Array] = {}

    def clear(self) -> None:
        """Begin anew, in the same arrays."""
        self._sizes, self._weighted = [], False
        self.record.fill(0.0)
        for metric in self._metrics:
            if metric.name in self._sums and metric.starts_from_zeros:
                self._sums[metric.name].fill(0)
            else:
                self._sums.pop(metric.name, None)

    @property
    def steps(self) -> int:
        """How many steps it holds."""
        return len(self._sizes)

    @property
    def arrays(self) -> dict[str, Array]:
        """What it adds up in, by name, on the device."""
        return {"losses": self.record, **self._sums}

    def add(self, per_sample: Array, batch: Batch, outputs: Array) -> None:
        """Take in a step: the loss ℓ of each sample, the batch, and what the model made of it."""
        xp, step = self._model.backend.xp, self.steps
        if step == self.record.shape[1]:
            self.record = xp.concatenate([self.record, xp.zeros_like(self.record)], axis=1)
        if batch.idle:
            self.count([0], batch.weights is not None)
            return
        self.take(self.record, step, per_sample, batch, outputs)
        self.count([len(batch)], batch.weights is not None)

    def count(self, sizes: Sequence[int], weighted: bool) -> None:
        """So many samples a step have come, with weights of their own or not."""
        self._sizes += sizes
        self._weighted |= weighted

    def take(self, record: Array, column: int, per_sample: Array, batch: Batch, outputs: Array) -> None:
        """The device's part of `add`: into this column of a record, and into the metrics."""
        backend = self._model.backend
        if per_sample.shape != (len(batch),):
            raise ShapeError(f"the loss must give one number a sample, {(len(batch),)}, not {tuple(per_sample.shape)}.")
        weighted = per_sample if batch.weights is None else per_sample * batch.weights
        backend.sum_to(weighted, record[0, column, ...])
        penalty = self._model.context.store.penalty()
        if penalty is not None:
            record[2, column] = penalty
        if batch.weights is not None:
            backend.sum_to(batch.weights, record[1, column, ...])
        for metric in self._metrics:
            sums = metric.sums(backend, outputs, batch.y, batch.counts)
            before = self._sums.get(metric.name)
            if before is None:
                self._sums[metric.name] = sums
            elif metric.starts_from_zeros:
                before[...] = metric.merge(before, sums)
            else:
                self._sums[metric.name] = metric.merge(before, sums)

    def joined(self, ranks: Ranks) -> "Figures":
        """Those of all ranks together; to be asked on each. Waits for the device."""
        if ranks.size == 1:
            return self
        parts = ranks.gather(self.state())
        whole, first = Figures(self._model, self._metrics, max(1, self.steps)), parts[0]
        steps = numpy.sum([part["steps"] for part in parts], axis=0)
        steps[2] = numpy.max([part["steps"][2] for part in parts], axis=0)  # the same on each that had rows
        sums: dict[str, Any] = {}
        for metric in self._metrics:
            name = f"metric {metric.name}"
            for part in parts:
                if name in part:
                    sums[name] = metric.merge(sums[name], part[name]) if name in sums else part[name]
        sizes = numpy.sum([part["sizes"] for part in parts], axis=0)
        whole.load_state({**first, **sums, "steps": steps, "sizes": sizes})
        return whole

    def state(self) -> dict[str, numpy.ndarray[Any, Any]]:
        """The sums so far, by name, on the host. Waits for the device."""
        to_numpy = self._model.backend.to_numpy
        return {
            "steps": self._of_steps(),
            "sizes": numpy.array(self._sizes),
            "weighted": numpy.array(self._weighted),
            **{f"metric {name}": to_numpy(a) for name, a in self._sums.items()},
        }

    def load_state(self, state: Mapping[str, numpy.ndarray[Any, Any]]) -> None:
        """Go on from such sums."""
        asarray = self._model.backend.asarray
        self._sizes, self._weighted = state["sizes"].tolist(), bool(state["weighted"])
        record = numpy.zeros((3, max(self.record.shape[1], 2 * self.steps)))
        record[:, : self.steps] = state["steps"]
        self.record = asarray(record)
        named = {m.name: f"metric {m.name}" for m in self._metrics}
        self._sums = {name: asarray(state[key]) for name, key in named.items() if key in state}

    def forget_sums(self) -> None:
        """Keep the number of steps, and let others count what was in them."""
        self.record.fill(0.0)
        self._sums.clear()
        self._sizes = [0] * len(self._sizes)

    def read(self, as_sum: bool = False) -> dict[str, Any]:
        """The figures so far; waits for the device. The loss is a mean over samples, or the sum where that is asked."""
        if not sum(self._sizes):
            return {}
        to_numpy = self._model.backend.to_numpy
        losses, weights, penalties = self._of_steps()
        weight = weights.sum() or 1.0
        loss = losses.sum() if as_sum else losses.sum() / weight
        logs: dict[str, Any] = {"loss": float(loss + (penalties * weights).sum() / weight)}
        for metric in self._metrics:
            logs[metric.name] = metric.result(to_numpy(self._sums[metric.name]))
        return logs

    def first_non_finite(self) -> int | None:
        """The first step whose loss is NaN or infinite; None if all are finite. Waits for the device."""
        finite = numpy.isfinite(self._of_steps()[0])
        return None if finite.all() else int(finite.argmin())

    def _of_steps(self) -> numpy.ndarray[Any, Any]:
        """The record so far, on the host."""
        record = numpy.array(self._model.backend.to_numpy(self.record[:, : self.steps]))
        if not self._weighted:
            record[1] = self._sizes
        return record
