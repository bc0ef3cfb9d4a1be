"""Probe: a copy of a model, in evaluation mode, for scores of classes, outputs of inner layers, and their gradients."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy

from xpnet import layers
from xpnet.backends import Array
from xpnet.config import integer, is_custom, is_integer, real_array
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, StateError, shape_text, shown
from xpnet.layers.base import Layer
from xpnet.layers.containers import Container, every_layer
from xpnet.layers.structure import Arrays, as_list, as_tuple, mapped
from xpnet.training.base_model import BaseModel
from xpnet.training.outputs import last_layers
from xpnet.training.state import Untrained

#: Last layers that turn scores, their inputs, into probabilities or the logarithms of these.
_PROBABILITIES = (layers.LogSoftmax, layers.Sigmoid, layers.Softmax)
_CONVOLUTIONS = (layers.Conv2D, layers.Conv2DTranspose, layers.DepthwiseConv2D)
#: The samples of a pass, so that memory does not grow with their number.
ROWS = 256


@dataclass(eq=False)
class Watched:
    """An inner layer of the copy, and what the latest pass has shown of it: arrays on the device.

    units: (N,), or None. `Probe.gradient` is that of these units of the layer if they are given, otherwise that of the
    scores.  output: (N, *output_shape).  gradient: that of the units or scores with respect to output.
    """

    layer: Layer
    units: Array = None
    output: Array = None
    gradient: Array = None


class Probe:
    """A copy of a built model, so that passes change nothing in the model itself.

    function: the name of the caller in errors.  several: whether the model may have several inputs.  The score of a
    class is its output; if the last layer is Softmax, LogSoftmax or Sigmoid, the input of this layer, which the copy
    leaves out.

    Raises ArgumentTypeError for anything but a model, StateError for a model that is not built, and ArgumentError for
    one without scores (N, K) or (N,), or with several inputs if it must have one.
    """

    def __init__(self, function: str, model: Any, several: bool = False) -> None:
        self._function, self._original = function, model
        self._watched: Watched | None = None
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
        if len(model.input_names) > 1 and not several:
            raise ArgumentError(f"{function}: the model has {len(model.input_names)} inputs, but must have one.")
        if len(shape) > 1:
            raise ArgumentError(
                f"{function}: needs one score per class, outputs (N, K), but those of the model are "
                f"{shape_text(shape)}. Make a model that reduces them, for example with layers.GlobalAveragePool1D()."
            )
        # The copy needs neither the optimizer state nor mixed precision.
        state = model._state  # kept, so that no other object has its id
        self.model = twin = copy.deepcopy(model, {id(state): Untrained()})
        twin._drop_precision()
        self.xp, self.classes = twin.backend.xp, shape[0] if shape else 1
        last: Any = last_layers(twin)[0]
        own = [one for one in every_layer(twin) if _has_own_passes(one)]
        if type(last) in _PROBABILITIES and not any(last in every_layer(one) for one in own):
            vars(last).update(forward=_same, backward=_same)
        inner = [one for one in every_layer(twin) if not isinstance(one, Container)]
        self.embeds = any(isinstance(one, layers.Embedding) for one in inner)
        self._keeps_integers = self.embeds or any(one.is_custom and one.accepts_integers for one in inner)

    def inputs(self, x: Any) -> Arrays:
        """x, checked, on the device: an array, or a tuple of arrays if there are several inputs.

        Integers stay integers only if a layer may need them: an Embedding, or one that is not part of xpnet.
        """
        arrays, dtypes = self.model._inputs(x)
        if not self._keeps_integers:
            dtypes = mapped(lambda a: self.model.context.dtype, arrays)
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
        classes = self.units(target, self.classes)
        if classes.shape != (samples,):
            raise ShapeError(
                f"{self._function}: target must be one class, or one for each of the {samples} samples, but has shape "
                f"{classes.shape}."
            )
        return classes

    def units(self, target: Any, count: int) -> Any:
        """Integers from 0 to count - 1, as a NumPy array. Raises DataError or ArgumentTypeError for others."""
        units = real_array(target, f"{self._function}: target")
        if not units.size:
            raise DataError(f"{self._function}: target is empty.")
        if units.dtype.kind not in "iu":
            raise ArgumentTypeError(f"{self._function}: target must be integers, not {units.dtype}.")
        if units.min() < 0 or units.max() >= count:
            raise DataError(
                f"{self._function}: target must be from 0 to {count - 1}, but is from {units.min()} to {units.max()}."
            )
        return units.astype("int64")

    def scores(self, x: Arrays) -> Any:
        """The scores (N, K) of these samples, on the host."""
        scores = self.model.predict(x, batch_size=None)
        return scores.reshape(len(scores), -1)

    def gradient(self, x: Arrays, targets: Any) -> Any:
        """∂score/∂x of these samples: a new array on the device, a list if there are several inputs, None of integers.

        targets: their classes on the host, or None for those of the largest score. If a watched layer has units, the
        mean of each over all places or steps is differentiated instead, and targets are not used. Raises StateError if
        a watched layer did not run, which a `forward` of a subclass may leave out.
        """
        return self.model.context.exclusively(self._gradient, x, targets)

    def _gradient(self, x: Arrays, targets: Any) -> Any:
        # Passes, since `forward` and `backward` of a subclass need not turn training mode off.
        model, seen = self.model, self._watched
        with contextlib.nullcontext() if model._overrides else model._by_hand():
            scores = model.forward_pass(model._own(x))
            rows = scores.reshape(len(scores), -1)
            if seen is not None and seen.units is not None:
                grad = self.xp.zeros_like(rows)  # scores may also depend on x around the watched layer
            else:
                chosen = rows.argmax(axis=1) if targets is None else model.backend.asarray(targets)
                grad = _mean_gradient(self.xp, rows, chosen)
            grad = model.backward_pass(grad.reshape(scores.shape))
        model._checked, model._checks = True, None
        if seen is not None and (seen.output is None or seen.gradient is None):
            raise StateError(f"{self._function}: {seen.layer._label} did not run, so there is nothing to see.")
        return as_list(mapped(lambda a: None if a is None else a.copy(), grad))

    def no_gradient(self, why: str = "") -> ArgumentError:
        """The error for inputs that are integers."""
        return ArgumentError(
            f"{self._function}: the inputs are integers, which have no gradient{why}. attribution.saliency takes "
            "tokens that only layers.Embedding reads, and attribution.occlusion all inputs."
        )

    def watch(self, layer: Any) -> Watched:
        """Record what later passes show of a layer; at most one layer of a probe.

        layer: the object, its name or its position. None is the last convolution with an image as output, or, if it is
        in a Residual, this block.
        """
        found = self._last_convolution(self.model) if layer is None else self._twin_of(layer)
        self.model.run_in_given_order()
        self._watched = seen = Watched(found)
        forward, backward = found.forward, found.backward

        def watched_forward(x: Any) -> Any:
            y = forward(x)
            seen.output = y.copy() if hasattr(y, "copy") else y
            return y

        def watched_backward(grad_y: Any) -> Any:
            grad_y = grad_y if seen.units is None else _mean_gradient(self.xp, seen.output, seen.units)
            seen.gradient = grad_y.copy()
            return backward(grad_y)

        vars(found).update(forward=watched_forward, backward=watched_backward)
        return seen

    def _last_convolution(self, container: Container) -> Layer:
        found = _last_convolution(container)
        if found is None:
            raise ArgumentError(
                f"{self._function}: the model has no convolution with an image (N, h, w, channels) as output. Give "
                "layer=, the layer whose output to use."
            )
        return found

    def _twin_of(self, layer: Any) -> Layer:
        """The layer of the copy that stands for this layer of the model."""
        model = self._original
        if isinstance(layer, str):
            found = model.get_layer(layer)
        elif is_integer(layer):
            found = model[int(layer)]
        elif isinstance(layer, Layer):
            found = layer
        else:
            raise ArgumentTypeError(
                f"{self._function}: layer must be a layer of the model, its name or its position, not {shown(layer)}."
            )
        path = _path_of(model, found) or next((one.path for one in every_layer(model) if one is found), None)
        if not path:
            raise ArgumentError(f"{self._function}: {shown(layer)} is not a layer of this model.")
        return next(one for one in every_layer(self.model) if one.path == path)

    def watch_tokens(self) -> Callable[[], Array]:
        """Let the Embedding layers that read the input keep their gradients.

        Returns a function that gives, after `gradient`, the norm of the gradient with respect to the vector of each
        token, in the shape of x. Raises ArgumentError if other layers read the input too.
        """
        readers = list(_readers(self.model, {0}))
        if other := next((layer for layer in readers if not isinstance(layer, layers.Embedding)), None):
            raise self.no_gradient(f", and {other._label} reads them too")
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


def _mean_gradient(xp: Any, outputs: Array, units: Array) -> Array:
    """The gradient, with respect to outputs (N, ..., C), of the mean over the axes between of unit units[n], (N,)."""
    rows = outputs.reshape(len(outputs), -1, outputs.shape[-1])
    grad = xp.zeros_like(rows)
    grad[xp.arange(len(rows)), :, units] = 1.0 / rows.shape[1]
    return grad.reshape(outputs.shape)


def _last_convolution(container: Container) -> Layer | None:
    for layer in reversed(container.inner_layers):
        if isinstance(layer, _CONVOLUTIONS):
            return layer
        if isinstance(layer, Container) and (found := _last_convolution(layer)) is not None:
            return layer if isinstance(layer, layers.Residual) else found
    return None


def _path_of(container: Container, layer: Layer, prefix: str = "") -> str | None:
    """The path of a layer in the attribute `layers` of a model or of the containers in it, where it is called first."""
    for key, inner in zip(container._keys(), container.layers, strict=True):
        if inner is layer:
            return f"{prefix}{key}"
        if isinstance(inner, Container) and (found := _path_of(inner, layer, f"{prefix}{key}.")) is not None:
            return found
    return None


def _readers(container: Container, inputs: set[int]) -> Iterator[Any]:
    """The layers that read these inputs of a container, by their numbers; of inner containers, those inside."""
    for site in container.calls()[0]:
        inner = {k for k, i in enumerate(as_tuple(site.inputs)) if i in inputs}
        if inner and isinstance(site.layer, Container) and not _has_own_passes(site.layer):
            yield from _readers(site.layer, inner)
        elif inner:
            yield site.layer


def _has_own_passes(layer: Layer) -> bool:
    """Whether this is a container whose outputs may not be those of its last layer, since its class is a user's."""
    kind = type(layer)
    return isinstance(layer, Container) and (is_custom(kind.forward) or is_custom(kind.backward))


def _same(array: Array) -> Array:
    return array


def _keeping_gradient(layer: Layer, backward: Callable[[Array], Any]) -> Callable[[Array], Any]:
    def wrapper(grad_y: Array) -> Any:
        layer.work.token_gradient = grad_y
        return backward(grad_y)

    return wrapper
