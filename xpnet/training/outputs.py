"""Probabilities from the outputs of a classifier: logits or probabilities, of classes or of yes-or-no answers."""

from collections.abc import Callable
from typing import Any

from xpnet.backends import Array, Backend
from xpnet.errors import ArgumentError
from xpnet.layers.activations import LogSoftmax
from xpnet.layers.containers import Container
from xpnet.losses import Loss


def probabilities(model: Container, loss: Loss | None) -> Callable[[Array], Array]:
    """The function that turns outputs of the model into probabilities, as `Sequential.predict_proba` describes it.

    loss: that of the last training, or None. Raises ArgumentError if it is not for classes.
    """
    backend, single = model.backend, model.output_shape in ((), (1,))
    last = last_layer(model)
    if last is not None and last.gives_probabilities:
        return (lambda p: _columns(backend, 1.0 - p, p)) if single else (lambda p: p)
    if isinstance(last, LogSoftmax):
        return lambda log_p: backend.xp.exp(log_p)
    if loss is not None and not (loss.classifies or loss.takes_logits):
        raise ArgumentError(
            f"predict_proba needs a classifier, but this model was trained with {loss!r}, whose outputs are not "
            "probabilities: use predict(x), or train with softmax_cross_entropy or binary_cross_entropy."
        )
    several = model.output_shape[-1:] > (1,)
    if several and (loss is None or loss.decision_threshold is None):
        return backend.softmax
    # σ(-z) = 1 - σ(z), without the cancellation.
    return (lambda z: _columns(backend, backend.sigmoid(-z), backend.sigmoid(z))) if single else backend.sigmoid


def last_layers(model: Any) -> list[Any]:
    """For each output, the innermost last layer, apart from layers such as Flatten that only pass numbers on, or None.

    A container whose outputs are not those of its last layer, such as Residual, sets gives_probabilities itself.
    """
    return [last_layer(model)]


def last_layer(layer: Any) -> Any:
    """The innermost last layer of a layer with one output, as in `last_layers`."""
    while isinstance(type(layer).gives_probabilities, property):
        found = [inner for inner in layer.layers if inner.accepts_integers is not None]
        if not found:
            return None
        layer = found[-1]
    return layer


def _columns(backend: Backend, no: Array, yes: Array) -> Array:
    """(N, 2) from two arrays of N elements."""
    return backend.xp.stack([no.reshape(-1), yes.reshape(-1)], axis=1)
