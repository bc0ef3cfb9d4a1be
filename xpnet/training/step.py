"""TrainingStep: forward, loss, backward, and the update of the parameters.

A step never reads a device value back. Losses and metrics are summed in device memory, and read once per epoch or on
request.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import numpy

from xpnet.backends import Array
from xpnet.data.dataset import Batch
from xpnet.layers.containers import Container
from xpnet.layers.context import Workspace
from xpnet.losses import Loss
from xpnet.training.state import TrainingState

#: Takes the loss ℓ of each sample, the batch, and the outputs of the model.
AddMetrics: TypeAlias = Callable[[Array, Batch, Array], None]


class TrainingStep:
    """One step of a model, on one batch or on several whose gradients add up."""

    def __init__(self, model: Container, state: TrainingState) -> None:
        self.model, self.loss, self.state = model, state.loss, state
        self._work = Workspace(model.context)

    def __call__(self, batches: Iterator[Batch], total: Any, add_metrics: AddMetrics, count: int = 1) -> None:
        """Make one update from `count` batches. `total` is Σ w over all of them, a number or a 0-d device array."""
        with self.model.execution_context():
            self.gradients(batches, total, add_metrics, count)
            self.update()

    def update(self) -> None:
        """Update the parameters from their gradients. The loss scale may skip it, on the device."""
        scale = self.state.loss_scale
        self.state.update(self.model.context.store, None if scale is None else scale.gate)

    def gradients(self, batches: Iterator[Batch], total: Any, add_metrics: AddMetrics, count: int = 1) -> None:
        """Fill the gradients of `count` batches and of the penalties."""
        context = self.model.context
        store = context.store
        context.begin_step(self.state.step)
        accumulated: Array = None
        for _ in range(count):
            batch = next(batches)
            # Noise is a function of the row within the whole step.
            context.first_row, context.has_no_rows = batch.first_row, batch.has_no_rows
            per_sample, outputs, batch = self._forward_backward(batch, total)
            add_metrics(per_sample, batch, outputs)
            if batch.has_no_rows:
                store.grads[...] = 0.0
            if count > 1:
                accumulated = store.grads.copy() if accumulated is None else accumulated + store.grads
        context.first_row, context.has_no_rows = 0, False
        if accumulated is not None:
            store.grads[...] = accumulated
        if context.group.size > 1:
            context.group.all_reduce(store.grads)
        if self.state.loss_scale is not None:
            self.state.loss_scale.unscale(store)
        store.add_penalty_gradients(total)

    def _forward_backward(self, batch: Batch, total: Any) -> tuple[Array, Array, Batch]:
        """Store the gradients of Σ w ℓ / total; return (ℓ, outputs, the batch with the weights w)."""
        model, loss = self.model, self.loss
        outputs = model.forward_in_context(batch.x, training=True)
        buffer = self._work.buffer("grad", outputs.shape)
        per_sample, grad = loss.samples_and_gradient(model.backend, outputs, batch.y, out=buffer)
        if model.context.mixup is not None:
            per_sample, grad, batch = self._mixed(batch, outputs, per_sample, grad)
        grad = weighted_gradient(loss, grad, batch, total)
        if self.state.loss_scale is not None:
            self.state.loss_scale.scale(grad)
        model.backward_in_context(grad, input_grad=False)
        return per_sample, outputs, batch

    def _mixed(self, batch: Batch, outputs: Array, per_sample: Array, grad: Array) -> tuple[Array, Array, Batch]:
        """The losses, gradients and weights of samples that augment.MixUp has mixed, given those of their own targets.

        With the shares λ and the partners j: w_i ℓ_i = λ_i w_i ℓ(ŷ_i, t_i) + (1 - λ_i) w_j ℓ(ŷ_i, t_j).
        """
        backend, work, mixup = self.model.backend, self._work, self.model.context.mixup
        own, partners = mixup.shares, mixup.partners
        other = 1.0 - own
        y = backend.gather(batch.y, partners, out=work.buffer("other y", batch.y.shape, batch.y.dtype))
        buffer = work.buffer("other grad", outputs.shape)
        other_losses, other_grad = self.loss.samples_and_gradient(backend, outputs, y, out=buffer)
        if batch.weights is not None:
            own, other = own * batch.weights, other * backend.xp.take(batch.weights, partners)
            weights = own + other
            scale = 1.0 / (weights + (weights == 0))
            own, other, batch = own * scale, other * scale, replace(batch, weights=weights)
        shape = (-1, *[1] * (grad.ndim - 1))
        grad *= own.reshape(shape)
        other_grad *= other.reshape(shape)
        grad += other_grad
        return per_sample * own + other_losses * other, grad, batch


def weighted_gradient(loss: Loss, grad: Array, batch: Batch, total: Any) -> Array:
    """∂ℓ_i times w_i / total, or times w_i if the loss is a sum over samples; in place."""
    if batch.weights is not None:
        # Σ w is in float64, which must not promote a float32 gradient.
        weights = batch.weights if loss.reduction == "sum" else batch.weights * (1.0 / total).astype(grad.dtype)
        grad *= weights.reshape(-1, *[1] * (grad.ndim - 1))
    elif loss.reduction != "sum":
        grad *= 1.0 / total
    return grad


def ignoring_float_errors() -> numpy.errstate:
    """No warnings of overflow, as on a GPU: the loss is checked instead."""
    return numpy.errstate(over="ignore", invalid="ignore", divide="ignore")
