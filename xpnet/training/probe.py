"""Probe: a copy of a model, in evaluation mode, for the scores of classes and gradients with respect to inputs."""

import copy
from collections.abc import Callable
from typing import Any

import numpy

from xpnet import layers
from xpnet.backends import Array
from xpnet.config import integer, is_integer, real_array
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, shape_text, shown
from xpnet.layers.base import Layer
from xpnet.layers.structure import Arrays, as_tuple, mapped
from xpnet.training.base_model import BaseModel
from xpnet.training.outputs import last_layers
from xpnet.training.state import Untrained

#: Last layers that turn scores into probabilities or their logarithms. Scores are what these take.
_PROBABILITIES = (layers.LogSoftmax, layers.Sigmoid, layers.Softmax)
#: The samples of a pass, so that memory does not grow with their number.
ROWS = 256


class Probe:
    """A copy of a built model. What happens to it changes nothing of the model.

    function: what errors call the caller.  The score of a class is its output; if the last layer is Softmax, LogSoftmax
    or Sigmoid, what this layer takes. The copy leaves that layer out.

    Raises StateError for a model that is not built, and ArgumentError for one without scores (N, K) or (N,).
    """

    def __init__(self, function: str, model: Any) -> None:
        self._function = function
        if not isinstance(model, BaseModel):
            raise ArgumentTypeError(
                f"{function}: model must be an xpnet.Sequential or an xpnet.Model, not {shown(model)}."
            )
        model._refuse_unless_complete(f"{function} has nothing to look at")
        shape: Any = model.output_shape
        if isinstance(shape, list):
            raise ArgumentError(
                f"{function}: the model has {len(shape)} outputs. Make a model of one of them, which shares the "
                f"parameters: xpnet.Model(model.inputs, model.output_of({model.output_names[0]!r}))."
            )
        if len(shape) > 1:
            raise ArgumentError(
                f"{function}: needs one score per class, outputs (N, K), but those of the model are "
                f"{shape_text(shape)}. Make a model that reduces them, for example with layers.GlobalAveragePool1D()."
            )
        # The copy needs neither the optimizer state nor the products in half precision.
        self.model = twin = copy.deepcopy(model, {id(model._state): Untrained()})
        twin.precision = twin.context.precision = None
        self.xp, self.classes = twin.backend.xp, shape[0] if shape else 1
        (last,) = last_layers(twin)
        if type(last) in _PROBABILITIES and not twin._overrides:
            vars(last).update(forward=_same, backward=_same)

    def inputs(self, x: Any) -> Arrays:
        """x, checked, on the device: an array, or a tuple of arrays if there are several inputs."""
        arrays, dtypes = self.model._inputs(x)
        return mapped(lambda a, dtype: self.model.backend.asarray(a, dtype=dtype), arrays, dtypes)

    def targets(self, target: Any, samples: int) -> Any:
        """The classes of the samples, (samples,) on the host; None stays None, which means those of the largest score.

        Raises ArgumentError, ShapeError, DataError or ArgumentTypeError for anything but one class or one per sample.
        """
        if target is None:
            return None
        if is_integer(target):
            also = "one per sample, or None"
            one = integer(self._function, "target", target, at_least=0, at_most=self.classes - 1, also=also)
            return numpy.full(samples, one)
        classes = real_array(target, f"{self._function}: target")
        if classes.dtype.kind not in "iu":
            raise ArgumentTypeError(
                f"{self._function}: target must be the number of a class, or one per sample, not {classes.dtype}."
            )
        if classes.shape != (samples,):
            raise ShapeError(
                f"{self._function}: target must be one class, or one for each of the {samples} samples, but has shape "
                f"{classes.shape}."
            )
        if classes.min() < 0 or classes.max() >= self.classes:
            raise DataError(
                f"{self._function}: target has classes from {classes.min()} to {classes.max()}, but those of the model "
                f"are 0 to {self.classes - 1}."
            )
        return classes.astype("int64")

    def gradient(self, x: Arrays, targets: Any) -> Any:
        """∂score/∂x of these samples, on the device, as `backward` of the model returns it."""
        scores = self.model.forward(x)
        rows = scores.reshape(len(scores), -1)
        chosen = rows.argmax(axis=1) if targets is None else self.model.backend.asarray(targets)
        ones = self.xp.zeros_like(rows)
        ones[self.xp.arange(len(rows)), chosen] = 1.0
        return self.model.backward(ones.reshape(scores.shape))

    def watch_tokens(self) -> Callable[[], Array]:
        """Let the Embedding layers that read the input keep their gradients.

        Returns a function that gives, after `gradient`, the norm of the gradient with respect to the vector of each
        token, in the shape of x. Raises ArgumentError if other layers read the input too.
        """
        readers = [site.layer for site in self.model.calls()[0] if 0 in as_tuple(site.inputs)]
        if not all(isinstance(layer, layers.Embedding) for layer in readers):
            others = ", ".join(layer._label for layer in readers if not isinstance(layer, layers.Embedding))
            raise ArgumentError(
                f"{self._function}: x holds integers, which have no gradient. An Embedding that reads x has one for "
                f"each token, but here {others} reads it. Use attribution.occlusion, which replaces tokens."
            )
        for layer in readers:
            vars(layer)["backward"] = _keeping_gradient(layer, layer.backward)

        def norms() -> Array:
            squares: Any = 0.0
            for layer in readers:
                grad = layer.work.token_gradient
                if layer.padding_index is not None:  # whose vector is always 0
                    grad = grad * layer.work.counted.reshape(*grad.shape[:-1], 1)
                squares = squares + (grad * grad).sum(axis=-1)
            return self.xp.sqrt(squares)

        return norms


def _same(array: Array) -> Array:
    return array


def _keeping_gradient(layer: Layer, backward: Callable[[Array], Any]) -> Callable[[Array], Any]:
    def wrapper(grad_y: Array) -> Any:
        layer.work.token_gradient = grad_y
        return backward(grad_y)

    return wrapper
