"""Hand-written gradients against central differences, for anyone who writes a layer."""

import copy
from typing import TYPE_CHECKING, Any

import numpy

from xpnet import training
from xpnet.backends import Array
from xpnet.data import Batch, prepare
from xpnet.errors import ArgumentError
from xpnet.layers.base import Workspace
from xpnet.losses import Loss
from xpnet.step import weigh

if TYPE_CHECKING:
    from xpnet.model import Sequential


def check_gradients(
    model: "Sequential", x: Any, y: Any, loss: str | Loss = "mse", samples: int = 40, step: float = 1e-5,
    inputs: bool = False
) -> dict[str, float]:  # fmt: skip
    """{parameter name: relative error} of backward against (L(w + h) - L(w - h)) / 2h.

    On a float64 copy of the model, in training mode, with the masks of dropout held still. `samples` elements of each
    parameter are tried, drawn with a fixed seed; `step` is h. `inputs` adds an entry "inputs" for the gradient by x,
    where there is one.
    The error is ‖a - n‖ / (‖a‖ + ‖n‖); below 1e-6 is right, above 1e-4 wrong, unless a kink lies within h.
    """
    training.whole_number("samples", samples)
    if not step > 0:
        raise ArgumentError(f"step must be positive, not {step!r}.")
    model._ensure_built(x)
    model = copy.deepcopy(model).to(model.backend, dtype="float64")
    chosen, _ = training.choose(model, loss, [])
    with model.backend.device():
        data = prepare(model, x, y, chosen, None, chosen.class_weight)
        batch = next(data.batches(Workspace(model.context), len(data)))
        summed = len(batch) if batch.weights is None else batch.weights.sum()
        total = 1.0 if chosen.reduction == "sum" else float(summed)

        def value() -> float:
            per_sample = chosen.samples(model.backend, model.run(batch.x, training=True), batch.y)
            weighted = per_sample if batch.weights is None else per_sample * batch.weights
            return float(weighted.sum()) / total + float(model.context.store.penalty() or 0.0)

        def backward() -> Array | None:
            outputs = model.run(batch.x, training=True)
            grad = weigh(chosen, chosen.gradient(model.backend, outputs, batch.y), batch, summed)
            return model.run_back(grad, input_grad=inputs)

        input_grad = backward()
        if input_grad is not None:  # there is none by the whole numbers of an Embedding
            # Floats, in C order: elements are nudged through a flat view.
            batch.x = model.backend.asarray(batch.x, dtype=model.context.dtype).copy()
            input_grad = backward()
        model.context.store.add_penalty_gradients()
        places = {p.name: (p.value, p.grad.copy()) for p in model.parameters}
        if input_grad is not None:
            places["inputs"] = (batch.x, input_grad.copy())
        scale = abs(value())
        return {name: _error(value, *place, samples, step, scale, model, batch) for name, place in places.items()}


def _error(
    value: Any, array: Array, grad: Array, samples: int, step: float, scale: float, model: "Sequential", batch: Batch
) -> float:
    to_numpy = model.backend.to_numpy
    analytic, flat = to_numpy(grad).ravel(), array.reshape(-1)
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
    # Rounding leaves about 1e-16 · L / h in a difference: a gradient of nothing but that counts as right.
    return difference / max(size, 3e-5 * scale, 1e-12)
