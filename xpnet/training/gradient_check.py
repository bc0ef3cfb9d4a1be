"""Hand-written gradients compared with central differences."""

import math
from collections.abc import Callable
from typing import Any

import numpy

from xpnet.backends import Array, Backend
from xpnet.data.dataset import Batch, Dataset, of_output
from xpnet.layers.containers import Container, every_layer
from xpnet.layers.context import Workspace
from xpnet.layers.structure import as_tuple, mapped
from xpnet.losses import Loss
from xpnet.training.audit import Checks, audit_loss, custom_kinds
from xpnet.training.rows import Rows
from xpnet.training.step import of_total, weighted_gradient


def relative_errors(
    model: Container, dataset: Dataset, loss: Loss, samples: int, step: float, inputs: bool
) -> dict[str, float]:
    """{parameter name: relative error} for a float64 model, as `xpnet.check_gradients` describes it."""
    batch, weights = next(dataset.batches(Workspace(model.context), len(dataset))), dataset.weights
    summed: Any = len(batch) if weights is None else weights.sum(axis=0)
    rows = Rows(model, loss)
    asarray, isnan, several = model.backend.asarray, model.backend.xp.isnan, isinstance(batch.x, tuple)

    def forward() -> tuple[Any, Any, Batch]:
        """(the outputs of the model, those of the rows, the batch of the rows)."""
        whole = model.forward_pass(batch.x, training=True)
        return whole, *rows(whole, batch, model.output_masks())

    def totals(outputs: Any, counted: Batch) -> Any:
        """Σ w over the rows of each output."""
        if rows.are_samples:
            return summed
        if counted.weights is None:
            return tuple(map(len, as_tuple(outputs)))
        return tuple(own.sum() for own in as_tuple(counted.weights))

    def value() -> float:
        _, outputs, counted = forward()
        per_sample, total = loss.samples(model.backend, outputs, counted.y), totals(outputs, counted)
        result = float(model.context.store.penalty() or 0.0)
        for k, (losses, (one, factor)) in enumerate(zip(as_tuple(per_sample), loss.by_output, strict=True)):
            weighted = losses if counted.weights is None else losses * of_output(counted.weights, k)
            result += factor * float(weighted.sum()) / (1.0 if one.reduction == "sum" else float(of_total(total, k)))
        return result

    def backward(inputs: bool = inputs) -> Any:
        for p in model.parameters:
            p.grad = math.nan  # stays where backward does not assign it, or adds to it
        whole, outputs, counted = forward()
        grad = loss.gradient(model.backend, outputs, counted.y)
        grad = weighted_gradient(loss, grad, counted, totals(outputs, counted))
        return model.backward_pass(rows.gradient(grad, whole), input_grad=inputs)

    def varied(x: Array, grad: Array | None) -> Array:
        """Floats in C order, because elements are changed through a flat view; integers of an Embedding as they are."""
        return x if grad is None else asarray(x, dtype=model.context.dtype).copy()

    if model.has_custom_layers:
        _perturb_constants(model)
    if custom_kinds(*(one for one, _ in loss.by_output)):
        _, first_outputs, first_batch = forward()
        audit_loss(model, loss, first_outputs, first_batch.y)
    if model.has_custom_layers:
        with Checks(model, refuse_unassigned=False).wrapped():
            backward(inputs=False)
    input_grad = backward()
    if input_grad is not None:
        batch.x = mapped(varied, batch.x, input_grad)
        input_grad = backward()
    model.context.store.add_penalty_gradients()
    arrays: dict[str, tuple[Array, Array | None]] = {
        p.name: (p.value, p.grad.copy()) for p in model.parameters if p.trainable or not bool(isnan(p.grad).all())
    }
    if inputs:
        names = [f"inputs.{name}" for name in model.input_names] if several else ["inputs"]
        grads = as_tuple(input_grad) if input_grad is not None else (None,) * len(names)
        for name, x, grad in zip(names, as_tuple(batch.x), grads, strict=True):
            if x.dtype.kind == "f":
                arrays[name] = (x, None if grad is None else grad.copy())
    scale = abs(value())
    return {
        name: _relative_error(value, array, grad, samples, step, scale, model.backend)
        for name, (array, grad) in arrays.items()
    }


def _perturb_constants(model: Container) -> None:
    """Change the parameters of users' layers whose elements are all equal, such as a factor that starts as 1.

    While the factor is 1, a backward that leaves it out gives the right gradient.
    """
    rng, backend = numpy.random.default_rng(0), model.backend
    for layer in every_layer(model):
        for p in layer._parameters if layer.is_custom else ():
            value = backend.to_numpy(p.value)
            if (value == value.flat[0]).all():
                p.value[...] = backend.asarray(value + rng.uniform(0.1, 0.5, value.shape), dtype=model.context.dtype)


def _relative_error(
    value: Callable[[], float],
    array: Array,
    grad: Array | None,
    samples: int,
    step: float,
    scale: float,
    backend: Backend,
) -> float:
    if grad is None or grad.shape != array.shape or not bool(backend.xp.isfinite(grad).all()):
        return math.inf
    analytic, flat = backend.to_numpy(grad).ravel(), array.reshape(-1)
    rng = numpy.random.default_rng(0)
    tried = rng.choice(analytic.size, size=min(samples, analytic.size), replace=False)
    numeric = []
    for i in tried.tolist():
        before = float(flat[i])
        flat[i] = before + step
        above = value()
        flat[i] = before - step
        below = value()
        flat[i] = before
        numeric.append((above - below) / (2 * step))
    difference = float(numpy.linalg.norm(analytic[tried] - numeric))
    size = float(numpy.linalg.norm(analytic[tried]) + numpy.linalg.norm(numeric))
    # Rounding leaves about 1e-11 · |L| in a difference with h = 1e-5; relative to 3e-5 · |L| that counts as right.
    return difference / max(size, 3e-5 * scale, 1e-12)
