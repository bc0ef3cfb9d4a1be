"""Sequential and Model, and functions for models: load, check_gradients, explain, explain_step and generate."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy

from xpnet import layers as layers_
from xpnet.backends import Backend, get_backend
from xpnet.config import as_seed, explain_arguments, flag, integer, number
from xpnet.data.files import as_path
from xpnet.data.preparation import prepare, structure_of
from xpnet.errors import ArgumentTypeError, StateError, shape_text, shown
from xpnet.layers.base import Layer
from xpnet.layers.graph import Graph, checked_tensors_of
from xpnet.layers.tensors import Input, Tensor
from xpnet.optimizers import Optimizer
from xpnet.training import model_files
from xpnet.training.arguments import LARGEST_EXPLAINED_BATCH, choose_loss_and_metrics, class_weights
from xpnet.training.base_model import BaseModel
from xpnet.training.gradient_check import relative_errors
from xpnet.training.state import Untrained
from xpnet.training.state_dicts import LoadedState

if TYPE_CHECKING:
    from xpnet.training.backpropagation import Explanation
    from xpnet.training.explanation import StepExplanation

__all__ = ["Input", "LoadedState", "Model", "Sequential", "check_gradients", "explain", "explain_step", "generate",
           "load"]  # fmt: skip


class Sequential(BaseModel, layers_.Sequential):
    """A model of layers in a row, on one device.

    layers: from the first to the last.
    input_shape: the shape of one sample, without the batch: (784,), (28, 28, 1). Without it, the model is built when it
        gets its first data.
    backend: "auto" (a GPU if one can be used), "cpu", "gpu", "gpu:1", or a Backend.
    seed: determines the initial weights, the order of batches and all noise. None draws one, stored in `model.seed`.
    dtype: "float32" or "float64", of weights and arithmetic.
    precision: the precision of matrix products: "tf32", "float16" or "bfloat16", on a GPU whose tensor cores support
        it; None is "float32". All need dtype="float32": the factors of a product are rounded, its sums are float32.
        Weights, their gradients, statistics and losses stay in float32; in a captured step, arrays that only large
        products read are stored in 16 bits. With "float16" the loss is scaled, and steps whose gradient overflows are
        skipped.

    Attributes: `layers`; `parameters`, a list of `parameters.Parameter`; `trainable`, False to freeze all of them; and
    `input_shape`, `output_shape`, `backend`, `seed`, `dtype`; and `history`, the History of the latest fit, or None.
    `len(model)`, `model[i]` and `model.get_layer(name)` work as in layers.Sequential.

    Several threads may predict and evaluate with one model, also while another thread trains it: they take turns, batch
    by batch, and the results are exact. What would disturb the training raises StateError.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        input_shape: int | Sequence[int] | None = None,
        backend: str | Backend = "auto",
        seed: int | None = 0,
        dtype: str = "float32",
        precision: str | None = None,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(layers, name=name)
        self._configure(backend, seed, dtype, precision)
        self._tensors: list[Tensor] = []  # the symbolic input and the outputs of all layers
        if input_shape is not None:
            self._build_on(input_shape)

    @property
    def inputs(self) -> list[Tensor]:
        """The symbolic input, in a list. See `outputs`."""
        return self._symbolic()[:1]

    @property
    def outputs(self) -> list[Tensor]:
        """The symbolic output, in a list. An `xpnet.Model` made from it shares the parameters of this model."""
        return self._symbolic()[-1:]

    def output_of(self, name: str) -> Tensor:
        """The symbolic output of the layer of this name or number."""
        return self._symbolic()[1 + self.layers.index(self._layer_here(name))]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tensors": []}  # they refer to the layers of other models made from them

    def _symbolic(self) -> list[Tensor]:
        self._refuse_unless_complete("it has no symbolic tensors")
        if self._overrides:
            raise StateError(
                f"{type(self).__name__} has a forward of its own, which no graph describes: call the whole model."
            )
        if not self._tensors:
            self._tensors = [Input(self.input_shape)]
            for layer in self.layers:
                self._tensors.append(layer(self._tensors[-1]))
        return self._tensors

    def get_config(self) -> dict[str, Any]:
        shape = self.input_shape if self.is_built else None
        config = {"layers": self.layers, "input_shape": shape, "seed": self.seed, "dtype": self.dtype}
        return self._with_name(config)

    def __repr__(self) -> str:
        where = f", backend={self.backend.name!r}" if self.is_built else ""
        name = "" if self.name is None else f", name={self.name!r}"
        return f"Sequential({list(self.layers)!r}, input_shape={self.input_shape or None}{where}{name})"


class Model(BaseModel, Graph):
    """A model of layers that are called on symbolic tensors: any graph without cycles, with several inputs and outputs.

        image, meta = xpnet.Input((28, 28, 1), name="image"), xpnet.Input((5,), name="meta")
        h = layers.Flatten()(layers.Conv2D(8, 3)(image))
        h = layers.Dense(32)(layers.Concatenate()([h, meta]))
        model = xpnet.Model([image, meta], layers.Dense(10, name="digit")(h))

    inputs, outputs: a symbolic tensor or a list of them. The attributes are always lists.
    backend, seed, dtype, precision: as in Sequential. If the model shares layers with other models, backend="auto" and
        dtype=None are the backend and the dtype of these.

    A layer that is called several times has its parameters once, and the gradients of all uses add up. Models made from
    the same tensors share parameters: training one changes the others. `Model(model.inputs, tensor)`, with an
    intermediate tensor, is the part of `model` that computes this tensor. A model is a layer: it can be called on
    tensors, and stays usable by itself. Frozen layers (`layer.trainable = False`) are frozen in all models.

    Layers are numbered in the postorder of a depth-first search from the outputs; `name=` replaces the number. Names
    belong to each model: the same parameter may be "0.weight" in one and "3.weight" in another.

    Methods and other attributes are those of Sequential. `input_names` has the name of each Input, or "input_1", …;
    `output_names` has the names or numbers of the layers that compute the outputs. `input_shape` is a list if there are
    several inputs, and `output_shape` if there are several outputs.
    """

    def __init__(
        self,
        inputs: Tensor | Sequence[Tensor],
        outputs: Tensor | Sequence[Tensor],
        backend: str | Backend = "auto",
        seed: int | None = 0,
        dtype: str | None = None,
        precision: str | None = None,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(inputs, outputs, name=name)
        self._begin(backend, seed, dtype, precision)

    def _begin(
        self, backend: Any, seed: Any, dtype: Any, precision: Any, state: Mapping[str, Any] | None = None
    ) -> None:
        """Check the arguments, and build the model, with the values of `state` if it is given."""
        shared = next((layer.context for layer in self.layers if layer.is_built), None)
        if shared is not None:
            backend = shared.store.backend if isinstance(backend, str) and backend == "auto" else backend
            dtype = shared.store.dtype.name if dtype is None else dtype
        self._configure(backend, seed, "float32" if dtype is None else dtype, precision)
        shapes = [tensor.shape for tensor in self.inputs]
        self._build_on(shapes if len(shapes) > 1 else shapes[0], state)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "seed": self.seed, "dtype": self.dtype}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], backend: str | Backend = "auto", state: Mapping[str, Any] | None = None
    ) -> Self:
        """Make a new model from what `get_config` returned. state: {name: array} to use instead of initial values."""
        model = cls.__new__(cls)
        Graph.__init__(model, *checked_tensors_of(config, ("seed", "dtype")), name=config.get("name"))
        model._begin(backend, config["seed"], config["dtype"], None, state)
        return model

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        rows, counted = list[tuple[str, ...]](), set[Any]()
        for name, layer, shape, inputs in self.connections():
            parameters = [] if layer is None else layer.parameters
            new = [p for p in parameters if p not in counted]
            counted.update(new)
            count = "shared" if parameters and not new else f"{sum(p.size for p in new):,}"
            what = "Input" if layer is None else repr(layer)
            if isinstance(layer, BaseModel):
                what = f"{type(layer).__name__} of {len(layer)} layers"
            rows.append((name, what, ", ".join(inputs), shape_text(shape), count))
        return ("name", "layer", "inputs", "output shape", "parameters"), rows


@explain_arguments
def load(path: Any, backend: str | Backend = "auto", custom_layers: Iterable[type[Layer]] = ()) -> Sequential | Model:
    """Load the model that `save` wrote, a Sequential or a Model, onto `backend`, whatever device it was saved from.

    custom_layers: the classes of your own layers in it. Raises FileError if the file is missing, damaged or not a model
    file, and DeviceMemoryError if there is not enough memory for it. Code from the file is never run.
    """
    backend = get_backend(backend)  # first, because these errors are not about the file
    path, custom_layers = as_path("load", "path", path), model_files.checked_custom_layers(custom_layers)
    with model_files.refusing_damage(path):
        architecture, state = model_files.read(path, custom_layers)
        frozen = architecture.pop("frozen")
        model: Sequential | Model
        if "calls" in architecture:
            model = Model.from_config(architecture, backend, state)
        else:
            input_shape = architecture.pop("input_shape")
            model = Sequential(backend=backend, **architecture)
            model._build_on(input_shape, state)
        frozen = model_files.names_of(frozen, "frozen parameters", (p.name for p in model.parameters))
        for parameter in model.parameters:
            parameter.trainable = parameter.name not in frozen
    return model


def _check_model(function: str, model: Any) -> None:
    """Raise ArgumentTypeError if this argument of the function is not a model."""
    if not isinstance(model, BaseModel):
        raise ArgumentTypeError(f"{function}: model must be an xpnet.Sequential or an xpnet.Model, not {shown(model)}.")


@explain_arguments
def check_gradients(
    model: Sequential | Model, x: Any, y: Any, loss: Any = "mse", samples: int = 40, step: float = 1e-5,
    inputs: bool = False, *, loss_weights: Any = None
) -> dict[str, float]:  # fmt: skip
    """Compare backward with finite differences, (L(w + h) - L(w - h)) / 2h. Returns {parameter name: relative error}.

    It uses a float64 copy of the model, in training mode, with the same dropout masks in every pass. In the copy, a
    parameter of a custom layer whose elements are all equal, such as ones, gets other values, because a factor of 0 or
    1 that backward forgets would go unnoticed.

    samples: how many elements of each parameter are tried, the same in every call.  step: h.  inputs: whether to check
    the gradient with respect to x too, as the entry "inputs"; integers have none. With several inputs or outputs, the
    arguments may be lists or dicts, as in `fit`; the entry of an input "image" is then "inputs.image".

    The error is ‖a - n‖ / (‖a‖ + ‖n‖), with the gradients a of backward and n of the differences. Below 1e-6 the
    gradient is right, above 1e-4 it is wrong, unless the loss has a kink within h. It is infinite if backward does not
    assign the whole gradient: gradients are filled with NaN before, so that one that is forgotten, written in part or
    added to is found, and the log says so in words. It is also infinite for inputs whose gradient is None or has
    another shape. Other mistakes in custom layers raise the same errors as in a first training step.
    """
    _check_model("check_gradients", model)
    samples, inputs = integer("", "samples", samples), flag("", "inputs", inputs)
    step = number("", "step", step, at_least=1e-12, at_most=1)
    model._ensure_built(x)
    twin = copy.deepcopy(model).to(model.backend, dtype="float64")
    chosen, _ = choose_loss_and_metrics(twin, loss, [], loss_weights)
    with twin.backend.device():
        dataset = prepare(twin, x, y, chosen, None, class_weights(structure_of(twin), chosen, None))
        dataset.private = True  # elements of x are varied
        return relative_errors(twin, dataset, chosen, samples, step, inputs)


@explain_arguments
def explain(
    model: Sequential | Model, x: Any, y: Any, loss: Any = None, optimizer: str | Optimizer | float | None = None, *,
    loss_weights: Any = None,
) -> "Explanation":  # fmt: skip
    """Explain backpropagation number by number: what each layer computes in a training step on these samples.

    Returns a text to print, which a notebook shows as a table. For each layer it has the input, the output, the local
    derivative, the upstream gradient ∂L/∂y and the downstream gradient ∂L/∂x; for each parameter its value, its
    gradient and its update. `explained["0"]` is layer 0, with these as attributes, NumPy arrays on the host:
    `input`, `output`, `local`, `upstream`, `downstream`, and `parameters["weight"]` with `value`, `gradient` and
    `update`. `explained.loss` is L, `explained.parameters` has the parameters by their full names, such as "0.weight",
    and `plots.network(model, explanation=explained)` draws a small network with the numbers.

    x, y: one or more samples, as in `fit`, also for several inputs or outputs. Give one sample as a batch of one.
    loss: as in `fit`.  optimizer: as in `fit`, or a learning rate, for gradient descent.  None means those of the
    latest training, which the step would continue; before any, SGD and a loss that fits the outputs.

    L is the mean over the samples, as in `fit`, or their sum if the reduction of the loss is "sum". Gradients are those
    of L; penalties, clipping and weight decay change only updates. The pass is that of the next training step: dropout
    is on, with the noise of that step, and BatchNorm normalizes by the batch. It runs on a copy: the model and its
    optimizer state, buffers and noise stay as they are.

    Raises DataError, ShapeError or ArgumentError if the data or the arguments are invalid.
    """
    from xpnet.training import backpropagation  # only if needed

    _check_model("explain", model)
    with model._built_for(x):
        return backpropagation.explain(model, x, y, loss, optimizer, loss_weights)


@explain_arguments
def explain_step(
    model: Sequential | Model, batch_size: int = 32, *, loss: Any = None, optimizer: str | Optimizer | None = None,
    metrics: Any = None, times: bool = False,
) -> "StepExplanation":  # fmt: skip
    """Explain what a training step of a built model computes: the calls that it makes, and the memory that they need.

    `fit` soon stops running the layers in Python: it replays a list of calls, which were recorded, simplified and
    placed in memory; on a GPU as a CUDA graph. This function records a step on samples of zeros, and returns the list
    before and after: a string to print, which a notebook shows as a table. Its attributes `recorded` and `replayed` are
    lists of calls, with the place in the model, the arrays, the bytes and the operations of each. The model does not
    change, but `backward` then needs another `forward`. Sequences of open length have 32 steps, or fewer if a
    PositionalEmbedding takes no more.

    batch_size: the samples of the step.  loss, optimizer, metrics: as in `fit`. None means that of the latest `fit`, or
    before any, SGD and a loss that fits the outputs.  times: also measure each call, in several replays; on a GPU, each
    call by itself, although some run at the same time.

    Raises CaptureError, with the reason, for a model whose steps `fit` would run eagerly.
    """
    from xpnet.training import explanation  # only if needed

    _check_model("explain_step", model)
    batch_size = integer("explain_step", "batch_size", batch_size, at_most=LARGEST_EXPLAINED_BATCH)
    model._refuse_unless_complete("there is no step to explain")
    state = model._state
    if optimizer is None:
        optimizer = "sgd" if isinstance(state, Untrained) else state.optimizer
    if loss is None and state.last_loss is None:
        loss = explanation.fitting_loss(model)
    chosen, measured = model._chosen(loss, metrics)
    return explanation.explain(model, batch_size, chosen, measured, optimizer, flag("explain_step", "times", times))


@explain_arguments
def generate(
    model: Sequential | Model, prompt: Any, length: int, temperature: float = 1.0, top_k: int | None = None,
    seed: int | None = 0,
) -> numpy.ndarray[Any, Any]:  # fmt: skip
    """Continue sequences of tokens: returns the prompt and `length` more tokens, (N, T + length) int64, on the host.

    model: takes tokens (N, T) and predicts the next one: it has one input, and its outputs are the logits of all tokens
        after each step (N, T, vocabulary), or after the last one (N, vocabulary).
    prompt: (N, T) integers, the same number of tokens for all sequences.
    temperature: divides the logits; below 1 makes likely tokens more likely, and 0 always takes the likeliest one.
    top_k: draw only from the top_k likeliest tokens; of equally likely ones, from those with smaller numbers.
    seed: of the draws, which are the same on every device, up to rounding. None draws another one in each call.

    A model sees as many of the last tokens as its input_shape says, or as its PositionalEmbedding has positions. Until
    there are more, each step computes the new token only: attention keeps the keys and values of earlier tokens, a
    recurrent layer its state, a causal convolution its last inputs. After that, and for a model with layers that are
    not part of xpnet, each step computes the whole context. Layers of your own must not depend on later steps.

    Raises ArgumentError for a model that is not of this kind, or has outputs after each step that depend on later
    steps; ShapeError, DataError or ArgumentTypeError for a prompt that the model does not take; StateError for a model
    that is not built, or whose outputs are NaN.
    """
    from xpnet.training.generation import generated  # only if needed

    _check_model("generate", model)
    length = integer("generate", "length", length, at_least=0)
    temperature = number("generate", "temperature", temperature, at_least=0, finite=True)
    top_k = None if top_k is None else integer("generate", "top_k", top_k, also="None")
    seed = None if seed is None else as_seed("generate", seed, also="None")
    model._refuse_unless_complete("it cannot generate")
    tokens: numpy.ndarray[Any, Any] = generated(model, prompt, length, temperature, top_k, seed)
    return tokens
