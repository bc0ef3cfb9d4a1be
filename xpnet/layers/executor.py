"""Executor: runs the layers of a container, forward and backward, in a chain or any other acyclic graph."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from xpnet.backends import Array
from xpnet.config import fits
from xpnet.errors import ShapeError, shape_text
from xpnet.layers.structure import Arrays, as_tuple, one_or_tuple
from xpnet.parameters import Parameter

_TRAINABLE = attrgetter("trainable")


class CallSite(NamedTuple):
    """One call of a layer: it takes some values of the graph and computes others. Values are numbered, inputs first.

    inputs, outputs: the number of a value, or a tuple of numbers if the layer takes or returns a list.  shape: of the
    output; () if the layer returns a list, whose shapes the executor does not check.
    """

    layer: Any
    inputs: int | tuple[int, ...]
    outputs: int | tuple[int, ...]
    shape: tuple[int, ...]


class _BackwardCall(NamedTuple):
    """One call of backward.

    outputs, inputs: as in CallSite. Backward takes the gradients of the outputs and returns those of the inputs.
    wants: whether any gradient of an input is wanted.  required: for each input, True if a trained parameter needs its
    gradient, False if only ∂L/∂x does, None if nothing does.  assigned: the parameters whose gradients an earlier call
    of backward has assigned, because the layer is called several times.
    """

    layer: Any
    outputs: int | tuple[int, ...]
    inputs: int | tuple[int, ...]
    wants: bool
    required: tuple[bool | None, ...]
    assigned: list[Parameter]


class Executor:
    """The calls of the layers of one container, in order.

    The container, whose workspace and device it uses, is an argument: if it were kept, models would be freed only by
    the garbage collector.

    sites: each after those that it depends on.  inputs: the number of inputs.  outputs: which values are the outputs.
    """

    def __init__(self, sites: Sequence[CallSite], inputs: int, outputs: Sequence[int]) -> None:
        self.sites, self._inputs, self.outputs = list(sites), inputs, tuple(outputs)
        self._values = inputs + sum(len(as_tuple(site.outputs)) for site in sites)
        used = {i for site in sites for i in as_tuple(site.inputs)}
        #: For each value, whether it has a mask; empty if none has.
        self.masked: list[bool] = []
        self._unused = [i for i in range(inputs) if i not in used]
        self._parameters: list[Parameter] | None = None  # of all layers
        self._plans: dict[tuple[bool, ...], list[_BackwardCall]] = {}

    def forward(self, container: Any, x: Any) -> Arrays:
        """The outputs for one array, or for a list or tuple of arrays if there are several inputs."""
        values: list[Any] = [None] * self._values
        if self._inputs == 1:
            values[0] = x
        else:
            values[: self._inputs] = x
        masks = self._given_masks(container) if self.masked else None
        whole = container.context.continuation is None  # otherwise, x has fewer steps
        for layer, inputs, outputs, shape in self.sites:
            given = values[inputs] if isinstance(inputs, int) else [values[i] for i in inputs]
            if masks is not None:
                layer.work.given_mask = masks[inputs] if isinstance(inputs, int) else _any([masks[i] for i in inputs])
            y = layer.forward(given)
            if whole and isinstance(outputs, int) and getattr(y, "shape", (0,))[1:] != shape and not _fits(y, shape):
                raise layer.wrong_output((len(values[0]), *shape), container.context.dtype, y)
            if layer.is_custom:
                layer.check_output(given, y)
            if isinstance(outputs, int):
                values[outputs] = y
            else:
                for i, value in zip(outputs, y, strict=True):
                    values[i] = value
            if masks is not None:
                own = layer.output_mask(given)
                for k, i in enumerate(as_tuple(outputs)):
                    masks[i] = own[k] if isinstance(own, tuple) else own
        if masks is not None:
            container.work.output_masks = one_or_tuple([masks[i] for i in self.outputs])
        return values[self.outputs[0]] if len(self.outputs) == 1 else tuple(values[i] for i in self.outputs)

    def spread_masks(self, inputs: Sequence[bool]) -> tuple[bool, ...]:
        """Decide which values have a mask, given which inputs have one. Returns that for the outputs."""
        self.masked = [*inputs, *[False] * (self._values - len(inputs))]
        for site in self.sites:
            spread = site.layer.spread_masks([self.masked[i] for i in as_tuple(site.inputs)])
            for i, masked in zip(as_tuple(site.outputs), spread, strict=True):
                self.masked[i] = masked
        outputs = tuple(self.masked[i] for i in self.outputs)
        if not any(self.masked):
            self.masked = []
        return outputs

    def _given_masks(self, container: Any) -> list[Any]:
        """A list for the masks of all values, with those of the inputs."""
        masks: list[Any] = [None] * self._values
        given = container.mask
        if given is not None:
            masks[: self._inputs] = as_tuple(given)
        return masks

    def backward(self, container: Any, grad_y: Any, input_grad: bool) -> Any:
        """The gradients of the inputs, given those of the outputs; None if they are not wanted or do not exist.

        Where a value is used several times, its gradient is the sum of the gradients of its uses.
        """
        if self._parameters is None:
            self._parameters = list(dict.fromkeys(p for site in self.sites for p in site.layer.parameters))
        parameters: list[Parameter] = self._parameters
        key = (input_grad, *map(_TRAINABLE, parameters))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._planned(input_grad)
        grads: list[Array | None] = [None] * self._values
        given = grad_y if isinstance(grad_y, list | tuple) else (grad_y,)
        for i, grad in zip(self.outputs, given, strict=True):
            _add(container, grads, i, grad)
        for layer, outputs, inputs, wants, required, assigned in plan:
            if layer.wants_input_grad is not wants:  # an assignment takes longer than this test
                layer.wants_input_grad = wants
            if isinstance(outputs, int):
                grad = grads[outputs]
            else:
                grad = _completed(container, grads, outputs, layer.output_shape)
            if grad is None:  # only integers depend on it
                continue
            grad_x = _backward_again(container, layer, grad, assigned) if assigned else layer.backward(grad)
            if not wants:
                continue
            if isinstance(inputs, int) and grad_x is not None:
                _add(container, grads, inputs, grad_x)
            else:
                self._distribute(container, grads, layer, inputs, required, grad_x)
        if not input_grad:
            return None
        for i in self._unused:
            grads[i] = _zeros(container, i, (len(given[0]), *(n or 1 for n in container.input_shape[i])))
        return grads[0] if self._inputs == 1 else tuple(grads[: self._inputs])

    def _planned(self, input_grad: bool) -> list[_BackwardCall]:
        """The calls of backward, last layer first, without those whose results nothing trained and no input needs."""
        trained = [False] * self._values
        for site in self.sites:
            own = any(map(_TRAINABLE, site.layer.parameters))
            for i in as_tuple(site.outputs):
                trained[i] = own or any(trained[j] for j in as_tuple(site.inputs))
        plan, assigned = list[_BackwardCall](), set[Parameter]()
        for layer, inputs, outputs, _ in reversed(self.sites):
            if not input_grad and not any(trained[i] for i in as_tuple(outputs)):
                continue
            required = tuple(trained[i] or (False if input_grad else None) for i in as_tuple(inputs))
            again = [p for p in layer.parameters if p in assigned]
            plan.append(_BackwardCall(layer, outputs, inputs, required.count(None) < len(required), required, again))
            assigned.update(layer.parameters)
        return plan

    def _distribute(
        self,
        container: Any,
        grads: list[Array | None],
        layer: Any,
        inputs: Any,
        required: tuple[bool | None, ...],
        grad_x: Any,
    ) -> None:
        """Add the gradients that a layer returned to those of its inputs. Refuse a missing one that is needed."""
        several = isinstance(inputs, tuple)
        if several and not (isinstance(grad_x, list | tuple) and len(grad_x) == len(inputs)):
            raise _wrong_gradients(layer, len(inputs), grad_x)
        for position, (i, needed) in enumerate(zip(as_tuple(inputs), required, strict=True)):
            grad = grad_x[position] if several else grad_x
            if needed is None:
                continue
            if grad is not None:
                _add(container, grads, i, grad)
            elif needed or not (i < self._inputs or layer.accepts_integers):
                raise _missing_gradient(layer, position if several else None)


def _any(masks: list[Any]) -> list[Any] | None:
    """These masks, or None if there is none."""
    return None if all(mask is None for mask in masks) else masks


def _fits(y: Any, shape: tuple[Any, ...]) -> bool:
    """Whether y, (N, ...), has this shape, in which the first axis may be None."""
    return None in shape and hasattr(y, "shape") and fits(y.shape[1:], shape)


def _missing_gradient(layer: Any, position: int | None) -> ShapeError:
    shape, what = layer.input_shape, "∂L/∂x"
    if position is not None:
        shape, what = shape[position], f"∂L/∂x of input {position}"
    return ShapeError(
        f"{layer._label}: backward must return {what}, {shape_text(shape)}, since wants_input_grad is True, but it "
        "returned None."
    )


def _wrong_gradients(layer: Any, count: int, got: Any) -> ShapeError:
    what = (
        f"{len(got)} of them" if isinstance(got, list | tuple) else "an array" if hasattr(got, "shape") else repr(got)
    )
    return ShapeError(
        f"{layer._label}: backward must return a list of {count} gradients, one for each input, but returned {what}."
    )


def _add(container: Any, grads: list[Array | None], i: int, grad: Array) -> None:
    """Add a gradient to that of value i. The sum is in a buffer of the container: the layers own what they return."""
    before = grads[i]
    if before is None:
        grads[i] = grad
    else:
        grads[i] = container.xp.add(before, grad, out=container.work.buffer(f"gradient {i}", grad.shape))


def _completed(container: Any, grads: list[Array | None], outputs: tuple[int, ...], shapes: Any) -> list[Array] | None:
    """The gradients of all outputs of a layer, with zeros for those that have none; or None."""
    known = next((grads[i] for i in outputs if grads[i] is not None), None)
    if known is None:
        return None
    pairs = zip(outputs, shapes, strict=True)
    return [_zeros(container, i, (len(known), *shape)) if grads[i] is None else grads[i] for i, shape in pairs]


def _zeros(container: Any, i: int, shape: tuple[int, ...]) -> Array:
    """The gradient of a value that nothing depends on."""
    zeros = container.work.buffer(f"gradient {i}", shape)
    zeros[...] = 0.0
    return zeros


def _backward_again(container: Any, layer: Any, grad: Any, assigned: list[Parameter]) -> Any:
    """Call backward of a layer that is called several times, and add the gradients of these parameters up."""
    xp, work = container.xp, container.work
    kept = []
    for i, p in enumerate(assigned):
        before = work.buffer(f"{i} of {layer.path}", p.shape)
        before[...] = p.grad
        kept.append((p.grad, before))
    grad_x = layer.backward(grad)
    for now, before in kept:
        xp.add(now, before, out=now)
    return grad_x
