"""Hand-written gradients compared with central differences."""

import math
from collections.abc import Callable

import numpy

from xpnet.backends import Array, Backend
from xpnet.data.dataset import Dataset
from xpnet.layers.containers import Container
from xpnet.layers.context import Workspace
from xpnet.losses import Loss
from xpnet.training.step import weighted_gradient


def relative_errors(
    model: Container, dataset: Dataset, loss: Loss, samples: int, step: float, inputs: bool
) -> dict[str, float]:
    """{parameter name: relative error} for a float64 model, as `xpnet.check_gradients` describes it."""
    batch = next(dataset.batches(Workspace(model.context), len(dataset)))
    summed = len(batch) if batch.weights is None else batch.weights.sum()
    total = 1.0 if loss.reduction == "sum" else float(summed)

    def value() -> float:
        per_sample = loss.samples(model.backend, model.forward_pass(batch.x, training=True), batch.y)
        weighted = per_sample if batch.weights is None else per_sample * batch.weights
        return float(weighted.sum()) / total + float(model.context.store.penalty() or 0.0)

    def backward() -> Array | None:
        for p in model.parameters:
            p.grad = math.nan  # stays where backward does not assign it, or adds to it
        outputs = model.forward_pass(batch.x, training=True)
        grad = weighted_gradient(loss, loss.gradient(model.backend, outputs, batch.y), batch, summed)
        return model.backward_pass(grad, input_grad=inputs)

    input_grad = backward()
    if input_grad is not None:  # there is none for the integers of an Embedding
        # Floats in C order, because elements are changed through a flat view.
        batch.x = model.backend.asarray(batch.x, dtype=model.context.dtype).copy()
        input_grad = backward()
    model.context.store.add_penalty_gradients()
    isnan = model.backend.xp.isnan
    arrays: dict[str, tuple[Array, Array | None]] = {
        p.name: (p.value, p.grad.copy()) for p in model.parameters if p.trainable or not bool(isnan(p.grad).all())
    }
    if inputs and batch.x.dtype.kind == "f":
        arrays["inputs"] = (batch.x, None if input_grad is None else input_grad.copy())
    scale = abs(value())
    return {
        name: _relative_error(value, array, grad, samples, step, scale, model.backend)
        for name, (array, grad) in arrays.items()
    }


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
