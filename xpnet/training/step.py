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
from xpnet.training.rows import Rows
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
        self.rows = Rows(model, state.loss)
        if model.context.mixup is not None and not self.rows.are_samples:
            raise ArgumentError("augment.MixUp mixes samples of one label each, not of several, as sequences have.")
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
        if count > 1 and self.rows.counted and len(self.loss.by_output) > 1:
            raise ArgumentError(
                "accumulate needs a model with one output where masks or ignored labels decide which rows count: the "
                "gradients of several outputs are divided by different sums. Use accumulate=1."
            )
        accumulated: Array = None
        # Of the batches that add up: Σ w of their rows, and what divides gradients. A sum over samples is not divided.
        counts = list[tuple[Array, Any]]() if count > 1 and self.loss.by_output[0][0].reduction != "sum" else None
        for _ in range(count):
            batch = next(batches)
            # Noise is a function of the row within the whole step.
            context.first_row, context.has_no_rows = batch.first_row, batch.has_no_rows
            per_sample, outputs, batch = self._forward_backward(batch, total, counts)
            add_metrics(per_sample, batch, outputs)
            if batch.has_no_rows:
                store.grads[...] = 0.0
            if count > 1:
                accumulated = store.grads.copy() if accumulated is None else accumulated + store.grads
        context.first_row, context.has_no_rows = 0, False
        if accumulated is not None:
            store.grads[...] = accumulated
            if counts:
                self._divide_by_counts(counts)
        if context.group.size > 1:
            for part in store.slices(lambda parameter: True):  # other models may share the vector
                context.group.all_reduce(store.grads[part])
        if self.state.loss_scale is not None:
            self.state.loss_scale.unscale(store)
        store.add_penalty_gradients(mean_total(total))

    def _forward_backward(
        self, batch: Batch, total: Any, counts: list[tuple[Array, Any]] | None
    ) -> tuple[Any, Any, Batch]:
        """Store the gradients of Σ w ℓ / total; return (ℓ, outputs, the batch with the weights w), all of rows.

        With several outputs, ℓ and the outputs are tuples.  counts: see `_row_total`.
        """
        model, loss = self.model, self.loss
        whole = model.forward_in_context(batch.x, training=True)
        outputs, batch = self.rows(whole, batch, model.output_masks())
        total = self._row_total(total, batch, outputs, counts)
        per_sample, grad = loss.samples_and_gradient(model.backend, outputs, batch.y, out=self._like("grad", outputs))
        if model.context.mixup is not None:
            per_sample, grad, batch = self._mixed(batch, outputs, per_sample, grad)
        grad = weighted_gradient(loss, grad, batch, total)
        if self.state.loss_scale is not None:
            mapped(self.state.loss_scale.scale, grad)
        model.backward_in_context(self.rows.gradient(grad, whole), input_grad=False)
        return per_sample, outputs, batch

    def _row_total(self, total: Any, batch: Batch, outputs: Any, counts: list[tuple[Array, Any]] | None) -> Any:
        """Σ w over the rows of the step, for each output, given that over its samples.

        If it depends on labels or masks, it is known only for this batch. In a step of several batches, the gradients
        are then divided by the number of rows, and `counts` gets what `_divide_by_counts` needs.
        """
        rows = self.rows
        if rows.are_samples:
            return total
        totals = tuple(of_total(total, k) * (len(own) // len(batch)) for k, own in enumerate(as_tuple(outputs)))
        if not rows.counted:
            return totals
        xp = self.model.backend.xp
        sums = xp.stack([xp.sum(weights, dtype=xp.float64) for weights in as_tuple(batch.weights)])
        if batch.has_no_rows:
            sums *= 0.0
        if counts is not None:
            counts.append((sums, totals))
            return totals
        if self.model.context.group.size > 1:
            self.model.context.group.all_reduce(sums)
        sums += sums == 0
        return tuple(sums[k, ...] for k in range(len(totals)))

    def _divide_by_counts(self, counts: list[tuple[Array, Any]]) -> None:
        """Divide the gradients of several batches by Σ w over their rows, not by the number of rows."""
        group, grads = self.model.context.group, self.model.context.store.grads
        sums = counts[0][0].copy()
        for more, _ in counts[1:]:
            sums += more
        if group.size > 1:
            group.all_reduce(sums)
        sums += sums == 0
        grads *= (counts[0][1][0] / sums[0, ...]).astype(grads.dtype)

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


def of_total(total: Any, output: int) -> Any:
    """Σ w for one output, from one Σ w for all outputs, or an array or a tuple with one for each."""
    if isinstance(total, tuple):
        return total[output]
    return total[output, ...] if getattr(total, "ndim", 0) else total


def weighted_gradient(loss: Loss, grad: Any, batch: Batch, total: Any) -> Any:
    """∂ℓ_i times λ w_i / total, or times λ w_i if the loss is a sum over samples; in place.

    λ: the factor of the loss of each output, if there are several, or 1.
    """
    for k, (one, (part, factor)) in enumerate(zip(as_tuple(grad), loss.by_output, strict=True)):
        if batch.weights is not None:
            weights = of_output(batch.weights, k)
            if part.reduction != "sum":
                share = factor / of_total(total, k)
                # Σ w is in float64, which must not promote a float32 gradient.
                weights = weights * (share.astype(one.dtype) if hasattr(share, "astype") else share)
            elif factor != 1.0:
                weights = weights * factor
            one *= weights.reshape(-1, *[1] * (one.ndim - 1))
        elif part.reduction != "sum":
            one *= factor / of_total(total, k)
        elif factor != 1.0:
            one *= factor
    return grad


def ignoring_float_errors() -> numpy.errstate:
    """No warnings of overflow, as on a GPU: the loss is checked instead."""
    return numpy.errstate(over="ignore", invalid="ignore", divide="ignore")
