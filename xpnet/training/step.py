"""TrainingStep: forward, loss, backward, and the update of the parameters.

A step never reads a device value back. Losses and metrics are summed in device memory, and read once per epoch or on
request.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import numpy

from xpnet.backends import Array
from xpnet.data.dataset import Batch, mean_total, of_output
from xpnet.errors import ArgumentError
from xpnet.layers.containers import Container
from xpnet.layers.context import Workspace
from xpnet.layers.structure import as_tuple, mapped, one_or_tuple
from xpnet.losses import Loss
from xpnet.training.state import TrainingState

#: Takes the loss ℓ of each sample, the batch, and the outputs of the model. Losses and outputs may be tuples.
AddMetrics: TypeAlias = Callable[[Any, Batch, Any], None]


class TrainingStep:
    """One step of a model, on one batch or on several whose gradients add up."""

    def __init__(self, model: Container, state: TrainingState) -> None:
        if model.context.mixup is not None and len(model.input_names) > 1:
            raise ArgumentError(
                f"augment.MixUp mixes samples of one input, but this model has {len(model.input_names)}: their targets "
                "would be mixed, and the other inputs not. Leave it out."
            )
        self.model, self.loss, self.state = model, state.loss, state
        self._work = Workspace(model.context)

    def __call__(self, batches: Iterator[Batch], total: Any, add_metrics: AddMetrics, count: int = 1) -> None:
        """Make one update from `count` batches. `total` is Σ w over all of them, see `total_weight`."""
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
            for part in store.slices(lambda parameter: True):  # other models may share the vector
                context.group.all_reduce(store.grads[part])
        if self.state.loss_scale is not None:
            self.state.loss_scale.unscale(store)
        store.add_penalty_gradients(mean_total(total))

    def _forward_backward(self, batch: Batch, total: Any) -> tuple[Any, Any, Batch]:
        """Store the gradients of Σ w ℓ / total; return (ℓ, outputs, the batch with the weights w).

        With several outputs, ℓ and the outputs are tuples.
        """
        model, loss = self.model, self.loss
        outputs = model.forward_in_context(batch.x, training=True)
        per_sample, grad = loss.samples_and_gradient(model.backend, outputs, batch.y, out=self._like("grad", outputs))
        if model.context.mixup is not None:
            per_sample, grad, batch = self._mixed(batch, outputs, per_sample, grad)
        grad = weighted_gradient(loss, grad, batch, total)
        if self.state.loss_scale is not None:
            mapped(self.state.loss_scale.scale, grad)
        model.backward_in_context(grad, input_grad=False)
        return per_sample, outputs, batch

    def _like(self, name: str, arrays: Any) -> Any:
        """A buffer in the shape and dtype of an array, or one for each of several arrays."""
        if not isinstance(arrays, tuple):
            return self._work.buffer(name, arrays.shape, arrays.dtype)
        return tuple(self._work.buffer(f"{name} {k}", a.shape, a.dtype) for k, a in enumerate(arrays))

    def _mixed(self, batch: Batch, outputs: Any, per_sample: Any, grad: Any) -> tuple[Any, Any, Batch]:
        """The losses, gradients and weights of samples that augment.MixUp has mixed, given those of their own targets.

        With the shares λ and the partners j: w_i ℓ_i = λ_i w_i ℓ(ŷ_i, t_i) + (1 - λ_i) w_j ℓ(ŷ_i, t_j).
        """
        backend, mixup, weights = self.model.backend, self.model.context.mixup, batch.weights
        own, partners = mixup.shares, mixup.partners
        other = 1.0 - own
        y = mapped(lambda a, out: backend.gather(a, partners, out=out), batch.y, self._like("other y", batch.y))
        buffer = self._like("other grad", outputs)
        other_losses, other_grad = self.loss.samples_and_gradient(backend, outputs, y, out=buffer)
        if weights is not None:
            shares = (-1, *[1] * (weights.ndim - 1))
            own = own.reshape(shares) * weights
            other = other.reshape(shares) * backend.xp.take(weights, partners, axis=0)
            weights = own + other
            scale = 1.0 / (weights + (weights == 0))
            own, other, batch = own * scale, other * scale, replace(batch, weights=weights)
        both = zip(*map(as_tuple, (per_sample, other_losses, grad, other_grad)), strict=True)
        losses = []
        for k, (losses_k, other_losses_k, grad_k, other_grad_k) in enumerate(both):
            own_k, other_k = of_output(own, k), of_output(other, k)
            shape = (-1, *[1] * (grad_k.ndim - 1))
            grad_k *= own_k.reshape(shape)
            other_grad_k *= other_k.reshape(shape)
            grad_k += other_grad_k
            losses.append(losses_k * own_k + other_losses_k * other_k)
        return one_or_tuple(losses), grad, batch


def weighted_gradient(loss: Loss, grad: Any, batch: Batch, total: Any) -> Any:
    """∂ℓ_i times λ w_i / total, or times λ w_i if the loss is a sum over samples; in place.

    λ: the factor of the loss of each output, if there are several, or 1.
    """
    for k, (one, (part, factor)) in enumerate(zip(as_tuple(grad), loss.by_output, strict=True)):
        if batch.weights is not None:
            weights = of_output(batch.weights, k)
            if part.reduction != "sum":
                # Σ w is in float64, which must not promote a float32 gradient.
                own_total = total[k, ...] if getattr(total, "ndim", 0) else total
                weights = weights * (factor / own_total).astype(one.dtype)
            elif factor != 1.0:
                weights = weights * factor
            one *= weights.reshape(-1, *[1] * (one.ndim - 1))
        elif part.reduction != "sum":
            one *= factor / total
        elif factor != 1.0:
            one *= factor
    return grad


def ignoring_float_errors() -> numpy.errstate:
    """No warnings of overflow, as on a GPU: the loss is checked instead."""
    return numpy.errstate(over="ignore", invalid="ignore", divide="ignore")
