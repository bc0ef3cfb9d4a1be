"""Explanations of backpropagation: the values and gradients of each layer for some samples, and the updates."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy

from xpnet import layers, optimizers
from xpnet.config import number
from xpnet.data.dataset import Dataset, total_weight
from xpnet.display.tables import Group, grouped_html_table, grouped_text_table
from xpnet.errors import ArgumentTypeError, no_layer_at, unknown_name
from xpnet.layers.base import Layer
from xpnet.layers.containers import Container, every_layer
from xpnet.layers.context import Workspace
from xpnet.layers.structure import as_list, mapped
from xpnet.losses import Loss
from xpnet.training.arguments import load_dataset
from xpnet.training.audit import audited_step
from xpnet.training.device_memory import explaining_memory_errors
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.explanation import fitting_loss
from xpnet.training.state import TrainingState, Untrained
from xpnet.training.step import TrainingStep, ignoring_float_errors

_MOST_SHOWN = 12  # numbers of an array; of a larger one, a table shows the mean and so on

#: Layers that compute each output from the one input at its place, so that ∂y/∂x has the shape of x.
_ELEMENTWISE = (layers.Dropout, layers.ELU, layers.GELU, layers.HardSigmoid, layers.HardSwish, layers.HardTanh,
                layers.Identity, layers.LeakyReLU, layers.Mish, layers.PReLU, layers.PositionalEmbedding, layers.ReLU,
                layers.ReLU6, layers.Rescale, layers.SiLU, layers.Sigmoid, layers.Softplus, layers.Step,
                layers.Tanh)  # fmt: skip


@dataclass(frozen=True)
class ParameterExplanation:
    """What `explain` says about a parameter p: arrays on the host, in the shape of p.

    value: p before the step.  gradient: ∂L/∂p.  update: what the step adds to p.
    """

    value: numpy.ndarray[Any, Any]
    gradient: numpy.ndarray[Any, Any]
    update: numpy.ndarray[Any, Any]


class _Parameters(dict[str, ParameterExplanation]):
    """Parameters by name. An unknown name raises ArgumentError with a suggestion."""

    def __missing__(self, name: Any) -> ParameterExplanation:
        raise unknown_name("parameter", name, self)


@dataclass(eq=False)
class LayerExplanation:
    """What `explain` says about a layer: arrays on the host, or None for what does not exist.

    name: in the model, such as "1.0".  layer: its class, as text.  input, output: x (N, *input_shape) and
    y (N, *output_shape).  local: ∂y/∂x; for an elementwise layer in the shape of x, so that
    downstream = upstream · local; for Dense its weight (in, out), so that downstream = upstream @ localᵀ; None for
    other layers.  upstream: ∂L/∂y.  downstream: ∂L/∂x.  parameters: {name: ParameterExplanation}; those that several
    layers share are with the first of them.

    Where a layer has several inputs or outputs, each is a list of arrays.
    """

    name: str
    layer: str
    input: Any = None
    output: Any = None
    local: numpy.ndarray[Any, Any] | None = None
    upstream: Any = None
    downstream: Any = None
    parameters: dict[str, ParameterExplanation] = field(default_factory=_Parameters)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """The quantity, the shape and the values of each array, as text."""
        names = {
            "input x": self.input,
            "output y": self.output,
            "local ∂y/∂x": self.local,
            "upstream ∂L/∂y": self.upstream,
            "downstream ∂L/∂x": self.downstream,
        }
        for name, p in self.parameters.items():
            names |= {name: p.value, f"gradient ∂L/∂{name}": p.gradient, f"update of {name}": p.update}
        for name, value in names.items():
            several = isinstance(value, list)
            for k, array in enumerate(value if several else [value], 1):
                shape = "" if array is None else str(array.shape)
                yield f"{name}, {k}" if several else name, shape, "—" if array is None else _text(array)


class Explanation:
    """What `xpnet.explain` returns: a text to print, which a notebook shows as a table.

    `explained["0"]` or `explained[0]` is the `LayerExplanation` of layer 0.  loss: L.  layers: {name:
    LayerExplanation}, of containers too, in order.  parameters: {name: ParameterExplanation} of the whole model.
    samples: their number.
    """

    def __init__(
        self,
        loss: float,
        loss_name: str,
        samples: int,
        layers: dict[str, LayerExplanation],
        parameters: dict[str, ParameterExplanation],
        update: str,
    ) -> None:
        self.loss, self.samples, self.layers, self.parameters = loss, samples, layers, parameters
        of_samples = f"{loss_name} of {samples} sample{'s' * (samples != 1)}"
        self._title = f"L = {_number(loss)}, {of_samples}; updates by {update}"

    def __getitem__(self, name: str | int) -> LayerExplanation:
        """The explanation of the layer of this name, or at this position of the model.

        Raises ArgumentError if there is none of this name, and PositionError if there is none at this position.
        """
        if isinstance(name, int | numpy.integer):
            outer = [one for path, one in self.layers.items() if "." not in path]
            try:
                return outer[name]
            except IndexError:
                raise no_layer_at(name, "the model", len(outer)) from None
        if not isinstance(name, str) or name not in self.layers:
            raise unknown_name("layer", name, list(self.layers))
        return self.layers[name]

    def _table(self) -> tuple[tuple[str, ...], list[Group]]:
        """The header, and the rows of each layer."""
        header = ("layer", "quantity", "shape", "values")
        return header, [(f"{one.name} {one.layer}", list(one.rows())) for one in self.layers.values()]

    def __str__(self) -> str:
        return f"{self._title}\n{grouped_text_table(*self._table())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return grouped_html_table(self._title, *self._table())


class _Recorder:
    """Copies what the layers of a model take and return in a training step."""

    def __init__(self, model: Container) -> None:
        self._model, self.found, self.gradients = model, dict[str, LayerExplanation](), dict[str, Any]()
        model.run_in_given_order()
        for layer in every_layer(model):
            if layer is not model:
                self.found[layer.path] = one = LayerExplanation(layer.path, _named(layer))
                vars(layer)["forward"] = self._forward(one, layer.forward)
                vars(layer)["backward"] = self._backward(one, layer, layer.backward)
        vars(model)["backward_in_context"] = self._whole_backward(model.backward_in_context)

    def host(self, arrays: Any) -> Any:
        """Copies on the host: an array, a list of arrays, or None."""
        to_numpy = self._model.backend.to_numpy
        return as_list(mapped(lambda a: None if a is None else numpy.array(to_numpy(a)), arrays))

    def _forward(self, one: LayerExplanation, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def wrapper(x: Any) -> Any:
            one.input = self.host(x)
            y = forward(x)
            one.output = self.host(y)
            return y

        return wrapper

    def _backward(self, one: LayerExplanation, layer: Layer, backward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def wrapper(grad_y: Any) -> Any:
            one.upstream = self.host(grad_y)
            if type(layer) in _ELEMENTWISE:
                one.local = self.host(backward(layer.xp.ones_like(grad_y)))
            elif type(layer) is layers.Dense:
                one.local = self.host(layer.work.weight)  # (in, out), also of one that is tied
            grad_x = backward(grad_y)
            one.downstream = self.host(grad_x)
            return grad_x

        return wrapper

    def _whole_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """Backward of the model, which also computes ∂L/∂x. The gradients are those of L, without penalties."""

        def wrapper(grad_y: Any, input_grad: bool = True) -> Any:
            grad_x = backward(grad_y, True)
            self.gradients = {p.name: self.host(p.grad) for p in self._model.parameters}
            return grad_x

        return wrapper


def explain(model: Any, x: Any, y: Any, loss: Any, optimizer: Any, loss_weights: Any) -> Explanation:
    """What `xpnet.explain` returns, for a built model."""
    if isinstance(optimizer, Real):
        optimizer = optimizers.SGD(number("explain", "optimizer", optimizer, at_least=0, finite=True))
    elif optimizer is None:
        optimizer = "sgd" if isinstance(model._state, Untrained) else model._state.optimizer
    if loss is None and model._state.last_loss is None:
        loss = fitting_loss(model)
    chosen, _ = model._chosen(loss, [], loss_weights)
    with explaining_memory_errors(model, None), model.backend.device():
        twin = copy.deepcopy(model)
        twin._drop_precision()  # products are in the dtype of the model
        dataset = load_dataset(twin, x, y, chosen, [])
        if not isinstance(dataset, Dataset):
            raise ArgumentTypeError("explain takes one batch of arrays, not a stream.")
        return twin.context.exclusively(_explained, twin, dataset, chosen, optimizers.get(optimizer))  # type: ignore[no-any-return]


def _explained(model: Any, dataset: Dataset, loss: Loss, optimizer: Any) -> Explanation:
    """The explanation of a training step, which changes the model."""
    recorder = _Recorder(model)
    state: TrainingState = model._begin_training(loss, [], optimizer)
    step, metrics = TrainingStep(model, state), EpochMetrics(model, loss, [], batches=1)
    total = len(dataset) if dataset.weights is None else total_weight(model.backend.xp, dataset.weights)
    update = f"{type(optimizer).__name__} at a rate of {_number(state.learning_rate)}"
    values = {p.name: recorder.host(p.value) for p in model.parameters}
    with ignoring_float_errors(), model.execution_context(), audited_step(step):
        step.gradients(dataset.batches(Workspace(model.context), len(dataset)), total, metrics.add)
        value = metrics.result(reduced=True)["loss"]
        step.update()
    explained = _Parameters()
    for p in model.parameters:
        change = recorder.host(p.value) - values[p.name]
        explained[p.name] = ParameterExplanation(values[p.name], recorder.gradients[p.name], change)
    listed = set[str]()
    for layer in every_layer(model):
        for p in layer._parameters if layer is not model else ():
            if p.name not in listed:
                listed.add(p.name)
                recorder.found[layer.path].parameters[p.name.rpartition(".")[2]] = explained[p.name]
    names = " + ".join(type(one).__name__ for one, _ in loss.by_output)
    return Explanation(value, names, len(dataset), recorder.found, explained, update)


def _named(layer: Layer) -> str:
    """The class of a layer; of a container, with the number of its layers."""
    name = type(layer).__name__
    return f"{name} of {len(layer)} layers" if isinstance(layer, Container) else name


def _text(array: numpy.ndarray[Any, Any]) -> str:
    """The numbers of a small array; the least, the mean and the greatest of a large one."""
    if array.size <= _MOST_SHOWN:
        return _numbers(array.tolist())
    limits = {"min": array.min(), "mean": array.mean(dtype="float64"), "max": array.max()}
    return ", ".join(f"{name} {_number(float(value))}" for name, value in limits.items())


def _numbers(values: Any) -> str:
    return f"[{', '.join(map(_numbers, values))}]" if isinstance(values, list) else _number(values)


def _number(value: float) -> str:
    """With 4 significant digits."""
    return f"{value + 0.0:.4g}"  # not "-0"
