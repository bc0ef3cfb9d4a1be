"""Probabilities from the outputs of a classifier: logits or probabilities, of classes or of yes-or-no answers."""

from collections.abc import Callable
from typing import Any

from xpnet.backends import Array, Backend
from xpnet.errors import ArgumentError
from xpnet.layers.activations import LogSoftmax
from xpnet.layers.base import Layer
from xpnet.layers.containers import Container
from xpnet.layers.context import Shape
from xpnet.layers.graph import Graph
from xpnet.layers.structure import shapes_of
from xpnet.losses import Loss


def probabilities(model: Container, loss: Loss | None) -> Callable[[Any], Any]:
    """The function that turns outputs of the model into probabilities, as `BaseModel.predict_proba` describes it.

    loss: that of the last training, or None. Raises ArgumentError if it is not for classes. Several outputs are a list.
    """
    shapes, last = shapes_of(model.output_shape), last_layers(model)
    losses = [None] * len(shapes) if loss is None else [one for one, _ in loss.by_output]
    if len(shapes) == 1:
        return _probabilities(model.backend, shapes[0], last[0], losses[0], "this model")
    names = [f"output {name!r} of this model" for name in model.output_names]
    functions = [_probabilities(model.backend, *of_one) for of_one in zip(shapes, last, losses, names, strict=True)]
    return lambda outputs: tuple(function(a) for function, a in zip(functions, outputs, strict=True))


def _probabilities(
    backend: Backend, output_shape: Shape, last: Layer | None, loss: Loss | None, name: str
) -> Callable[[Array], Array]:
    """The function for one output, which has this last layer. name: what the error calls it."""
    single = output_shape in ((), (1,))
    if last is not None and last.gives_probabilities:
        return (lambda p: _columns(backend, 1.0 - p, p)) if single else (lambda p: p)
    if isinstance(last, LogSoftmax):
        return lambda log_p: backend.xp.exp(log_p)
    if loss is not None and not (loss.classifies or loss.takes_logits):
        raise ArgumentError(
            f"predict_proba needs a classifier, but {name} was trained with {loss!r}, whose outputs are not "
            "probabilities: use predict(x), or train with softmax_cross_entropy or binary_cross_entropy."
        )
    several = output_shape[-1:] > (1,)
    if several and (loss is None or loss.decision_threshold is None):
        return backend.softmax
    # σ(-z) = 1 - σ(z), without the cancellation.
    return (lambda z: _columns(backend, backend.sigmoid(-z), backend.sigmoid(z))) if single else backend.sigmoid


def last_layers(model: Container) -> list[Layer | None]:
    """For each output, the innermost last layer, apart from layers such as Flatten that only pass numbers on, or None.

    A container whose outputs are not those of its last layer, such as Residual, sets gives_probabilities itself.
    """
    return [_last_layer(model, k) for k in range(len(model.output_names))]


def _last_layer(layer: Any, output: int = 0) -> Layer | None:
    while layer is not None and isinstance(type(layer).gives_probabilities, property):
        if isinstance(layer, Graph):
            layer = layer.last_layer(output)
        else:
            found = [inner for inner in layer.layers if inner.accepts_integers is not None]
            layer = found[-1] if found else None
    return layer  # type: ignore[no-any-return]


def _columns(backend: Backend, no: Array, yes: Array) -> Array:
    """(N, 2) from two arrays of N elements."""
    return backend.xp.stack([no.reshape(-1), yes.reshape(-1)], axis=1)
