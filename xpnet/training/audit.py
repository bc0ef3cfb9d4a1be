"""Audit: checks of the first training step with custom layers, losses, metrics or a custom optimizer.

Code that is not part of xpnet may write into arrays that it was only given, forget a gradient, or return an array of
another shape or dtype. So in the first step each of its methods is wrapped in checks, which copy and compare arrays.
An error names the class and the method, and the model is put back. Later steps run without the checks.
"""

import contextlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from xpnet.backends import Array, Backend
from xpnet.config import is_custom
from xpnet.errors import ArgumentError, ArgumentTypeError, DivergenceError, ShapeError, StateError, shown
from xpnet.layers.base import Layer, wrong_array
from xpnet.layers.containers import Container, every_layer
from xpnet.layers.structure import as_tuple
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.parameters import Snapshot
from xpnet.training.output_losses import OutputLosses
from xpnet.training.state import TrainingState
from xpnet.training.step import TrainingStep

_log = logging.getLogger(__name__)
_ABSENT: Any = object()
_VISIBLE = 1e-6  # times a weight: a change that float32 does not round away


@contextlib.contextmanager
def audited_step(step: TrainingStep) -> Iterator[None]:
    """A context for a training step. It checks custom code whose classes were not checked before."""
    model, state = step.model, step.state
    optimizer, metrics = state.optimizer, state.metrics
    losses = [loss for loss, _ in step.loss.by_output]
    things = [*every_layer(model), *losses, optimizer, *metrics]
    kinds = custom_kinds(*things)
    if not kinds or kinds in state.audited:
        yield
        return
    checks, loss = Checks(model), step.loss
    step.loss = _audited(loss, checks)
    try:
        with _unchanged_after_an_error(model, state), checks.wrapped(metrics), _working_optimizer(model, state):
            yield
        state.audited.add(kinds)
    finally:
        step.loss = loss


@contextlib.contextmanager
def audited_update(model: Container, state: TrainingState) -> Iterator[None]:
    """A context for `apply_gradients`. It checks a custom optimizer whose class was not checked before."""
    kinds = (type(state.optimizer),)
    if not is_custom(*kinds) or kinds in state.audited:
        yield
        return
    with _unchanged_after_an_error(model, state), _working_optimizer(model, state):
        yield
    state.audited.add(kinds)


@contextlib.contextmanager
def _unchanged_after_an_error(model: Container, state: TrainingState) -> Iterator[None]:
    optimizer_state = state.optimizer_state
    before, count = Snapshot(model.context.store, lambda: optimizer_state.slots), optimizer_state.step
    try:
        yield
    except BaseException:
        before.restore()
        optimizer_state.step = count
        raise


@contextlib.contextmanager
def _working_optimizer(model: Container, state: TrainingState) -> Iterator[None]:
    """Check that the update changes something, if it is that of a custom optimizer."""
    if not is_custom(type(state.optimizer)):
        yield
        return
    store, rate = model.context.store, state.learning_rate
    before, name = Snapshot(store, lambda: state.optimizer_state.slots), type(state.optimizer).__name__
    sizes: list[tuple[float, float]] = []  # the largest element of gradients and of weights
    own = state.optimizer.update

    def update(xp: Any, w: Array, g: Array, *others: Any) -> None:
        sizes.append((float(abs(g).max()), float(abs(w).max())))
        own(xp, w, g, *others)

    with _replacing([(state.optimizer, "update", update)]):
        yield
    if not bool(model.backend.xp.isfinite(store.values).all()):
        raise DivergenceError(f"{name}: update has made weights NaN or infinite in its first step.")
    scale = state.loss_scale
    skipped = scale is not None and not bool(scale.gate)
    updated = [store.values, *state.optimizer_state.slots.values()]
    kept = [before.copies["the weights"], *(before.copies[slot] for slot in state.optimizer_state.slots)]
    trained = store.slices(lambda p: p.trainable)
    same = all(_same(model.backend, new, old) for new, old in zip(updated, kept, strict=True))
    sizes += [(float(abs(store.grads[part]).max()), float(abs(store.values[part]).max())) for part in trained]
    if same and not skipped and any(rate * g > _VISIBLE * w for g, w in sizes):
        raise ArgumentError(
            f"{name}: update has changed neither the weights nor its slots, though gradients and learning rate are "
            "not 0. Write into the arrays, as in w -= rate * g; w = w - rate * g makes a new one."
        )


def custom_kinds(*things: Any) -> tuple[type, ...]:
    """The classes of these things that are not part of xpnet."""
    return tuple(type(thing) for thing in things if is_custom(type(thing)))


@contextlib.contextmanager
def audited_evaluation(model: Container, loss: Loss, metrics: Sequence[Metric]) -> Iterator[Loss]:
    """A context for a batch of an evaluation, which checks custom metrics. It yields the loss with checks."""
    checks = Checks(model)
    with checks.wrapped_metrics(metrics):
        yield _audited(loss, checks)


def audit_loss(model: Container, loss: Loss, outputs: Any, targets: Any) -> None:
    """Check a custom loss, with the outputs and the targets of a batch."""
    checks = Checks(model)
    _audited(loss, checks).samples_and_gradient(model.backend, outputs, targets)
    for check in checks.new_arrays:
        check()


def _audited(loss: Loss, checks: "Checks") -> Any:
    """The loss with checks of the custom losses in it."""
    if isinstance(loss, OutputLosses):
        return OutputLosses({name: _audited(one, checks) for name, one in loss.losses.items()}, loss.loss_weights)
    return _AuditedLoss(loss, checks) if is_custom(type(loss)) else loss


class _AuditedLoss:
    """A custom loss in its first step."""

    def __init__(self, loss: Loss, checks: "Checks") -> None:
        self._loss, self._checks, self.reduction = loss, checks, loss.reduction
        self.by_output = [(self, 1.0)]

    def samples(self, backend: Backend, outputs: Array, targets: Array) -> Array:
        given = _Unwritten(backend, {"the outputs": outputs, "the targets": targets})
        losses = self._loss.samples(backend, outputs, targets)
        given.check(f"{type(self._loss).__name__}: samples")
        self._check_samples(backend, outputs, losses, "samples")
        return losses

    def _check_samples(self, backend: Backend, outputs: Array, losses: Any, method: str) -> None:
        if not isinstance(losses, backend.xp.ndarray) or losses.shape != (len(outputs),) or losses.dtype.kind != "f":
            what = f"{type(self._loss).__name__}: {method} must return one number per sample,"
            raise wrong_array(what, (len(outputs),), outputs.dtype, backend.xp, losses)

    def samples_and_gradient(
        self, backend: Backend, outputs: Array, targets: Array, out: Array | None = None
    ) -> tuple[Array, Array]:
        loss, name = self._loss, type(self._loss).__name__
        given = _Unwritten(backend, {"the outputs": outputs, "the targets": targets})
        if type(loss).samples_and_gradient is Loss.samples_and_gradient:
            methods = "samples", "gradient"
            losses = loss.samples(backend, outputs, targets)
            given.check(f"{name}: samples")
            grad = loss.gradient(backend, outputs, targets)
        else:
            methods = "samples_and_gradient", "samples_and_gradient"
            both = loss.samples_and_gradient(backend, outputs, targets, out=out)
            if not isinstance(both, tuple) or len(both) != 2:
                raise ArgumentTypeError(
                    f"{name}: samples_and_gradient must return (samples, gradient), not {shown(both)}."
                )
            losses, grad = both
        given.check(f"{name}: {methods[1]}")
        xp = backend.xp
        self._check_samples(backend, outputs, losses, methods[0])
        if not isinstance(grad, xp.ndarray) or grad.shape != outputs.shape or grad.dtype != outputs.dtype:
            what = f"{name}: {methods[1]} must return the gradient for the outputs,"
            raise wrong_array(what, outputs.shape, outputs.dtype, xp, grad)
        self._checks.new_arrays.append(lambda: given.check(f"{name}: {methods[1]} must return a new array, because it"))
        return losses, grad


class Checks:
    """The checks of the layers of one model, and of metrics.

    refuse_unassigned: whether a gradient that backward does not assign raises StateError; otherwise it is logged.
    """

    def __init__(self, model: Container, refuse_unassigned: bool = True) -> None:
        self._model, self._backend = model, model.backend
        self._refuse_unassigned = refuse_unassigned
        self._inputs: dict[Layer, Any] = {}
        self._finite: dict[Layer, bool] = {}  # of layers whose backward was called: whether its inputs are finite
        #: Called before backward, when the gradients of the losses were weighted in place.
        self.new_arrays: list[Callable[[], None]] = []

    def wrapped_metrics(self, metrics: Sequence[Metric]) -> contextlib.AbstractContextManager[None]:
        """A context in which `sums` of custom metrics are wrapped in checks."""
        custom = [metric for metric in metrics if is_custom(type(metric))]
        return _replacing([(metric, "sums", self._sums(metric, metric.sums)) for metric in custom])

    @contextlib.contextmanager
    def wrapped(self, metrics: Sequence[Metric] = ()) -> Iterator[None]:
        """A context in which methods are wrapped in checks."""
        wrappers: list[tuple[Any, str, Callable[..., Any]]] = []

        def wrap(thing: Any, method: str, wrapper: Callable[..., Any]) -> None:
            wrappers.append((thing, method, wrapper))

        model = self._model
        wrap(model, "backward_in_context", self._backward_pass(model.backward_in_context))
        for layer in every_layer(model):
            forward, backward = ("_run_forward", "_run_backward") if layer is model else ("forward", "backward")
            if layer.is_custom:
                wrap(layer, forward, self._forward(layer, getattr(layer, forward)))
            if layer.is_custom or layer._parameters:
                wrap(layer, backward, self._backward(layer, getattr(layer, backward)))
        with _replacing(wrappers), self.wrapped_metrics(metrics):
            yield

    def _forward(self, layer: Layer, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def wrapper(x: Any) -> Any:
            given = _Unwritten(self._backend, {"its input x": x})
            y = forward(x)
            given.check(f"{layer._label}: forward")
            layer.check_output(x, y)
            self._inputs[layer] = x
            return y

        return wrapper

    def _backward(self, layer: Layer, backward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def wrapper(grad_y: Any) -> Any:
            x = self._inputs.get(layer)
            if not layer.is_custom or x is None:
                self._finite[layer] = False
                return backward(grad_y)
            isfinite = self._backend.xp.isfinite
            self._finite[layer] = all(bool(isfinite(a).all()) for a in (*as_tuple(grad_y), *as_tuple(x)))
            given = _Unwritten(self._backend, {"grad_y": grad_y, "its input x": x})
            values = [(p, p.value.copy()) for p in layer._parameters]
            try:
                grad_x = backward(grad_y)
            except ValueError as error:
                _refuse_broadcast(layer, error)
                raise
            given.check(f"{layer._label}: backward")
            for p, before in values:
                if not _same(self._backend, p.value, before):
                    p.value[...] = before
                    raise StateError(
                        f"{layer._label}: backward changes the value of {p.name}. Write its gradient, "
                        f"self.{_attribute(p.name)}.grad[...] = ...; the optimizer changes the value."
                    )
            if layer.wants_input_grad:
                several = isinstance(x, list)
                grads = as_tuple(grad_x) if several else (grad_x,)
                if len(grads) != len(as_tuple(x)):
                    what = f"{layer._label}: backward must return a list of {len(x)} gradients, one for each input,"
                    raise ShapeError(f"{what} not {shown(grad_x)}.")
                for i, (grad, of_x) in enumerate(zip(grads, as_tuple(x), strict=True)):
                    what = f"∂L/∂x of input {i}" if several else "∂L/∂x"
                    self._check_gradient(layer, what, grad, of_x)
            return grad_x

        return wrapper

    def _check_gradient(self, layer: Layer, what: str, grad: Any, x: Array) -> None:
        """Raise ShapeError unless this can be the gradient of this input of a layer; integers have none.

        what: the name of the gradient in the error.
        """
        xp, dtype = self._backend.xp, layer.context.dtype
        right = isinstance(grad, xp.ndarray) and grad.shape == x.shape and grad.dtype == dtype
        if x.dtype.kind == "f" and not right:
            raise wrong_array(f"{layer._label}: backward must return {what},", x.shape, dtype, xp, grad)

    def _backward_pass(self, backward_pass: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(grad_y: Any, input_grad: bool = True) -> Any:
            while self.new_arrays:
                self.new_arrays.pop()()
            store, isnan = self._model.context.store, self._backend.xp.isnan
            self._finite = {}
            for p in store.parameters:
                p.grad = math.nan  # stays where backward does not assign it, or adds to it
            try:
                grad_x = backward_pass(grad_y, input_grad)
                for layer in every_layer(self._model):
                    for p in layer._parameters:
                        if p.trainable and bool(isnan(p.grad).any()):
                            self._report_unassigned(layer, p.name)
            except BaseException:
                store.grads[...] = 0.0
                raise
            for p in store.parameters:
                if not p.trainable and bool(isnan(p.grad).any()):
                    p.grad = 0.0
            return grad_x

        return wrapper

    def _report_unassigned(self, layer: Layer, name: str) -> None:
        """Raise StateError because backward leaves NaN in this gradient, or log the same text."""
        if layer not in self._finite:
            around = [other._label for other in every_layer(self._model) if other is not layer and _holds(other, layer)]
            text = (
                f"{around[-1] if around else layer._label}: its backward does not call backward of {layer._label}, so "
                f"{name} has no gradient. Call super().backward(grad_y), or backward of each layer."
            )
        elif self._finite[layer]:
            text = (
                f"{layer._label}: backward leaves NaN in the gradient of {name}. It must assign all of it, as in "
                f"self.{_attribute(name)}.grad[...] = ...; it must not add to it, because it is not 0 before."
            )
        else:  # NaN may be the result
            return
        if self._refuse_unassigned:
            raise StateError(text)
        _log.warning("%s", text)

    def _sums(self, metric: Metric, sums: Callable[..., Any]) -> Callable[..., Any]:
        name = type(metric).__name__

        def wrapper(backend: Backend, outputs: Array, targets: Array, weights: Array | None) -> Any:
            arrays = {"the outputs": outputs, "the targets": targets, "the weights": weights}
            given = _Unwritten(backend, arrays)
            result = sums(backend, outputs, targets, weights)
            given.check(f"{name}: sums")
            if not isinstance(result, backend.xp.ndarray) or result.dtype.kind not in "fiub":
                raise ArgumentTypeError(
                    f"{name}: sums must return an array of numbers on the model's device, not {shown(result)}."
                )
            score = metric.result(backend.to_numpy(result)) if metric.scalar else 0.0
            if not isinstance(score, int | float) and not (hasattr(score, "item") and score.shape == ()):
                raise ArgumentTypeError(
                    f"{name}: result must return one number, not {shown(score)}; if it is meant to be more, set "
                    "scalar = False, and use the metric with evaluate."
                )
            return result

        return wrapper


@contextlib.contextmanager
def _replacing(wrappers: Sequence[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """A context in which these methods of objects are replaced: (object, name, wrapper)."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for thing, method, wrapper in wrappers:
            attributes = vars(thing)
            replaced.append((attributes, method, attributes.get(method, _ABSENT)))
            wrapper.is_check = True  # type: ignore[attr-defined]  # copies and pickles leave it out
            attributes[method] = wrapper
        yield
    finally:
        for attributes, method, before in reversed(replaced):
            if before is _ABSENT:
                del attributes[method]
            else:
                attributes[method] = before


class _Unwritten:
    """Arrays that a method may read and must not write."""

    def __init__(self, backend: Backend, arrays: dict[str, Any]) -> None:
        """arrays: by what errors call them; a value may be a list of arrays, or None."""
        self._backend = backend
        self._arrays = [(name, a, a.copy()) for name, given in arrays.items() for a in as_tuple(given) if a is not None]

    def check(self, method: str) -> None:
        """Raise StateError if an array has changed."""
        for name, now, before in self._arrays:
            if not _same(self._backend, now, before):
                raise StateError(
                    f"{method} has written into {name}, which belongs to other layers or to the user. Compute a new "
                    "array, as in y = 2.0 * x, or write into a buffer of its own, self.work.buffer(name, shape)."
                )


def _refuse_broadcast(layer: Layer, error: ValueError) -> None:
    """Raise ShapeError if this error of a layer's backward says that an array does not fit into a gradient.

    NumPy and CuPy name both shapes, but no array.
    """
    shapes = re.search(r"could not broadcast .* from shape (\([\d, ]*\)) into shape (\([\d, ]*\))", str(error))
    if shapes is None:
        return
    given, expected = (tuple(map(int, re.findall(r"\d+", text))) for text in shapes.groups())
    names = [_attribute(p.name) for p in layer._parameters if p.shape == expected]
    if not names:
        return
    hint = ""
    if len(given) > len(expected) and given[len(given) - len(expected) :] == expected:
        hint = f" Sum over the samples, as in self.{names[0]}.grad[...] = self.xp.sum(..., axis=0)."
    raise ShapeError(
        f"{layer._label}: backward writes an array of shape {given} into one of shape {expected}, the shape of the "
        f"gradient of {' and of '.join(names)}.{hint}"
    ) from error


def _attribute(parameter: str) -> str:
    """The attribute of its layer that holds the parameter of this name, "weight" of "1.0.weight"."""
    return parameter.rpartition(".")[2]


def _holds(container: Layer, layer: Layer) -> bool:
    return any(inner is layer for inner in every_layer(container))


def _same(backend: Backend, a: Array, b: Array) -> bool:
    """Whether two arrays of one shape are equal, with NaN equal to NaN."""
    if a.dtype.kind != "f":
        return bool((a == b).all())
    return bool(((a == b) | (backend.xp.isnan(a) & backend.xp.isnan(b))).all())
