"""Sequential: a model of layers in a row, with fit, evaluate, predict, save and the rest; load; check_gradients."""

import contextlib
import copy
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy

from xpnet import layers as layers_
from xpnet import optimizers as optimizers_
from xpnet.backends import Array, Backend, DType, get_backend
from xpnet.callbacks import Callback, History
from xpnet.config import choice, explain_arguments, integer, number
from xpnet.data.dataset import Dataset
from xpnet.data.preparation import as_numbers, prepare, prepare_inputs
from xpnet.data.streaming import Stream, as_stream
from xpnet.distributed.mpi import process_group
from xpnet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from xpnet.errors import (
    ArgumentError,
    ArgumentTypeError,
    DeviceMemoryError,
    DistributedError,
    DivergenceError,
    ShapeError,
    StateError,
    shape_text,
)
from xpnet.layers.base import Layer
from xpnet.layers.building import build_alone
from xpnet.layers.context import Context
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.optimizers import Optimizer
from xpnet.parameters import ParameterStore
from xpnet.training import loop, model_files
from xpnet.training.arguments import FitOptions, choose_loss_and_metrics, load_dataset
from xpnet.training.evaluation import evaluate
from xpnet.training.gradient_check import relative_errors
from xpnet.training.state import TrainingState, Untrained

__all__ = ["Sequential", "check_gradients", "load"]


class Sequential(layers_.Sequential):
    """A model of layers in a row, on one device.

    layers: from the first to the last.
    input_shape: the shape of one sample, without the batch: (784,), (28, 28, 1). Without it, the model is built when it
        gets its first data.
    backend: "auto" (a GPU if one can be used), "cpu", "gpu", "gpu:1", or a Backend.
    seed: determines the initial weights, the order of batches and all noise. None draws one, stored in `model.seed`.
    dtype: "float32" or "float64", of weights and arithmetic.
    precision: the precision of matrix products: "tf32", "float16" or "bfloat16", on a GPU whose tensor cores support
        it; None is "float32". All need dtype="float32": weights, gradients and everything else stay in float32; the
        factors of a product are rounded, its sums are float32. With "float16" the loss is scaled, and steps whose
        gradient overflows are skipped.

    Attributes: `layers`; `parameters`, a list of `parameters.Parameter`; `trainable`, False to freeze all of them; and
    `input_shape`, `output_shape`, `backend`, `seed`, `dtype`.

    One thread at a time may use a model; different models may be used by different threads.
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
        self.seed = secrets.randbits(32) if seed is None else integer("", "seed", seed, at_least=0, also="None")
        self.dtype, self._wanted_backend = _dtype_name(dtype), get_backend(backend)
        self.precision = _checked_precision(precision, self._wanted_backend, self.dtype)
        self._state: TrainingState | Untrained = Untrained()
        self._rows_of_forward: int | None = None
        if input_shape is not None:
            self._build_on(input_shape)

    @explain_arguments
    def forward(self, x: Any, training: bool = False) -> Array:
        """Return the outputs (N, *output_shape) for inputs (N, *input_shape), as a new array on the model's device.

        training=True turns dropout on. `backward` may follow in both cases.
        """
        if self.path:  # as a layer of another model
            return super().forward(x)
        x, dtype = self._inputs(x)
        with self.backend.device():
            self._rows_of_forward = None  # until this pass is complete
            x = self.backend.asarray(x, dtype=dtype).copy()  # backward reads it, and the caller may change the original
            outputs = self.forward_pass(x, training=training)
            self._rows_of_forward = len(outputs)
            return outputs.copy()

    @explain_arguments
    def backward(self, grad_output: Any, input_grad: bool = True) -> Array | None:
        """Fill every parameter's `.grad`, given the gradient of a loss with respect to the latest outputs of `forward`.

        grad_output: (N, *output_shape). Returns the gradient with respect to the inputs as a new array; None if
        input_grad=False, which saves its computation.
        """
        if self.path:
            return super().backward(grad_output)
        if self._rows_of_forward is None:
            raise StateError("backward needs a forward pass before it: call model.forward(x) first.")
        with self.backend.device():
            grad = as_numbers(self.backend, grad_output, "grad_output")
            grad = self.backend.asarray(grad, dtype=self.context.dtype)
            expected = (self._rows_of_forward, *self.output_shape)
            if tuple(grad.shape) != expected:
                raise ShapeError(f"grad_output must have the shape of the outputs, {expected}, not {grad.shape}.")
            result = self.backward_pass(grad, input_grad)
            return None if result is None else result.copy()

    @explain_arguments
    def fit(
        self,
        x: Any,
        y: Any = None,
        loss: str | Loss = "softmax_cross_entropy",
        optimizer: str | Optimizer = "adam",
        epochs: int = 1,
        batch_size: int | None = 128,
        validation_data: Sequence[Any] | None = None,
        validation_split: float = 0.0,
        metrics: Any = None,
        callbacks: Sequence[Callback] = (),
        shuffle: bool = True,
        sample_weight: Any = None,
        class_weight: Mapping[int, float] | Sequence[float] | None = None,
        accumulate: int = 1,
        resume_from: Any = None,
        distributed: bool | ProcessGroup = False,
        verbose: int = 1,
    ) -> History:
        """Train on x (N, *input_shape) and y. Returns a History, with the loss and metrics of every epoch.

        y: class numbers (N,), probabilities (N, K), or targets in the shape of the outputs, depending on the loss.
        Data larger than memory: pass x and y as `numpy.memmap`. Or pass, as x alone, a `datasets.Stream`; an iterable
            of batches (x, y) or (x, y, weight); or a function that returns a new iterable for each epoch.
        loss, optimizer, metrics: names or objects. metrics=None is accuracy for classification losses, otherwise none.
        batch_size: samples per batch; the last batch of an epoch may be smaller; None makes one batch of all samples.
        validation_data: (x, y) or (x, y, sample_weight).  validation_split: instead, the fraction of x and y that is
            held out, from their end.
        shuffle: whether to draw a new order for every epoch, from the seed.
        sample_weight (N,): a sample of weight w counts w times, in loss and metrics.  class_weight {class: w}:
            multiplies the weights of the samples of a class, in the training loss only.
        accumulate: the number of batches whose gradients are added before each update, as in one larger batch; but
            BatchNorm still normalizes each batch separately.
        resume_from: the path of a `callbacks.Checkpoint`. With the same model, data, arguments and callbacks, the run
            continues as if it had never stopped; `epochs` includes those before the stop.
        distributed: True divides each batch among the processes that mpiexec started; or pass a
            `distributed.Communicator`. Give every rank the same model, data and arguments; the first rank prints and
            writes. Except for rounding, the result does not depend on the number of ranks.
        verbose: 1 shows a progress bar on a terminal, 2 prints a line per epoch, 0 is silent.

        A second call with an equal optimizer continues: optimizer state, schedule and epochs belong to the model.
        Ctrl-C ends training after the current step, and fit returns; a second one raises KeyboardInterrupt at once.

        Raises DataError, ShapeError or ArgumentError before training if the data or the arguments are invalid. Raises
        DivergenceError if the loss becomes NaN or infinite, and restores the weights of the epoch's start. With
        resume_from: FileError if the file is missing, damaged or not a checkpoint; ArgumentError if it is of another
        model, optimizer, loss or metrics; a warning if NumPy, BLAS, threads or device differ. With distributed:
        DistributedError if ranks were given different arguments, or if one of them cannot train.
        """
        group = SINGLE_PROCESS if distributed is False else process_group(distributed)
        try:
            x, y, sample_weight = as_stream(x, y, sample_weight)
            options = FitOptions(
                loss=loss, optimizer=optimizer, epochs=epochs, batch_size=batch_size, validation_data=validation_data,
                validation_split=validation_split, metrics=metrics, callbacks=callbacks, shuffle=shuffle,
                class_weight=class_weight, accumulate=accumulate, resume_from=resume_from, verbose=verbose, group=group,
            )  # fmt: skip
            memory = self._enough_memory_for(batch_size, training=True)
            with self._built_for(x), memory, self.backend.stream():
                self._rows_of_forward = None
                return loop.fit(self, self._begin_training, x, y, sample_weight, options)
        except (DistributedError, DivergenceError):
            raise  # all ranks raise it
        except BaseException as error:
            group.abort(error)
            raise

    def _begin_training(self, loss: Loss, metrics: list[Metric], optimizer: Optimizer) -> TrainingState:
        self._state = state = self._state.begin(self.context, loss, metrics, optimizer)
        return state

    @explain_arguments
    def train_on_batch(
        self,
        x: Any,
        y: Any,
        loss: str | Loss | None = None,
        optimizer: str | Optimizer | None = None,
        metrics: Any = None,
        sample_weight: Any = None,
        class_weight: Mapping[int, float] | Sequence[float] | None = None,
    ) -> dict[str, float]:
        """Make one training step on these samples. Returns {"loss": …} and metrics, computed before the update.

        Loss, optimizer and metrics default to those of the last training.
        """
        with self._built_for(x), self._enough_memory_for(None), self.backend.device():
            chosen, measured = self._chosen(loss, metrics)
            wanted = self._state.optimizer if optimizer is None else optimizers_.get(optimizer)
            dataset = load_dataset(self, x, y, chosen, measured, sample_weight, class_weight)
            if not isinstance(dataset, Dataset):
                raise ArgumentTypeError("train_on_batch takes one batch of arrays, not a stream: see fit.")
            self._rows_of_forward = None
            return loop.train_on_batch(self, self._begin_training(chosen, measured, wanted), dataset)

    @explain_arguments
    def evaluate(
        self,
        x: Any,
        y: Any = None,
        loss: str | Loss | None = None,
        metrics: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
    ) -> dict[str, Any]:
        """Return the loss and metrics of a dataset, {"loss": …, "accuracy": …}.

        By default they are those of the last training. batch_size=None takes all samples at once. The loss is a mean
        over the samples, or their sum if its reduction is "sum".
        """
        if batch_size is not None:
            batch_size = integer("", "batch_size", batch_size, also="None")
        x, y, sample_weight = as_stream(x, y, sample_weight)
        with self._built_for(x), self._enough_memory_for(batch_size), self.backend.device():
            chosen, measured = self._chosen(loss, metrics)
            dataset = load_dataset(self, x, y, chosen, measured, sample_weight)
            result = evaluate(self, dataset, chosen, measured, batch_size).result(chosen.reduction == "sum")
            if batch_size is None:
                self.drop_workspaces(inference_only=True)  # buffers for the whole dataset are not kept
            return result

    @explain_arguments
    def predict(self, x: Any, batch_size: int | None = 1024, as_device: bool = False) -> Array:
        """Return the outputs (N, *output_shape) for inputs (N, *input_shape), as a NumPy array on the host.

        as_device=True returns an array of `backend.xp` on the model's device instead. An array on disk, or a Stream of
        one, is read batch by batch.
        """
        if batch_size is not None:
            batch_size = integer("", "batch_size", batch_size, also="None")
        on_disk = isinstance(x, Stream | numpy.memmap)
        if on_disk:
            self._ensure_built(x)
            x, size = (x.array if isinstance(x, Stream) else x), batch_size or 1024
        else:
            x, dtype = self._inputs(x)
            size = batch_size or len(x)
        parts = []
        for start in range(0, len(x), size):
            batch = x[start : start + size]
            if on_disk:
                batch, dtype = self._inputs(batch)
            with self._enough_memory_for(size), self.backend.device():
                outputs = self.forward_pass(self.backend.asarray(batch, dtype=dtype), inference=True)
                parts.append(outputs.copy() if as_device else numpy.array(self.backend.to_numpy(outputs)))
        with self.backend.device():
            join = self.backend.xp.concatenate if as_device else numpy.concatenate
            return parts[0] if len(parts) == 1 else join(parts)

    @explain_arguments
    def activations(self, x: Any) -> dict[str, numpy.ndarray[Any, Any]]:
        """Return the outputs of every layer for x (N, *input_shape), on the host: {"0": (N, *output_shape), "1": …}.

        Dropout and distortions are off, so the last entry equals `predict(x)`. A Residual counts as one layer.
        """
        x, dtype = self._inputs(x)
        context, outputs = self.context, {}
        with self.backend.device(), self.execution_context():
            before = context.training, context.inference
            context.training, context.inference = False, True
            try:
                x = self.backend.asarray(x, dtype=dtype)
                for layer in self.layers:
                    x = layer.forward(x)
                    outputs[layer.path] = numpy.array(self.backend.to_numpy(x))
            finally:
                context.training, context.inference = before
        return outputs

    def state_dict(self) -> dict[str, numpy.ndarray[Any, Any]]:
        """Return {name: copy on the host} of all parameters and buffers."""
        self._refuse_inside()
        return self.context.store.state()

    @explain_arguments
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned. If a name or shape does not match, nothing changes."""
        self._refuse_inside()
        if not isinstance(state, Mapping):
            raise ArgumentTypeError(f"the state must be a dict of arrays by name, not {type(state).__name__}.")
        own = {a.name: a for a in self.context.store.arrays()}
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise ArgumentError(f"the state does not fit this model: missing {missing}, unexpected {unknown}.")
        with self.backend.device():
            new = {name: as_numbers(self.backend, state[name], name) for name in own}
            for name, target in own.items():
                shape, given = tuple(target.value.shape), tuple(new[name].shape)
                if given != shape:
                    raise ShapeError(f"{name} has shape {shape}, but the state's has {given}.")
            for name, target in own.items():
                target.value[...] = self.backend.asarray(new[name], dtype=target.value.dtype)

    @explain_arguments
    def save(self, path: Any) -> None:
        """Write weights, buffers and architecture to a safetensors file, which `xpnet.load` reads on any device."""
        self._refuse_inside()
        model_files.write(path, self)

    @explain_arguments
    def to(self, backend: str | Backend, dtype: str | None = None) -> "Sequential":
        """Move parameters, optimizer state and buffers to another device or dtype; returns the model.

        A `precision` that the device or the dtype does not support is dropped.
        """
        self._refuse_inside()
        self._state.refuse_running()
        target = get_backend(backend)
        self._wanted_backend, self.dtype = target, _dtype_name(dtype or self.dtype)
        if self.precision is not None and (self.dtype != "float32" or target.precision_unavailable(self.precision)):
            self.precision = None
        if self.is_built:
            self.context.precision = self.precision
        if self.is_built and not (target is self.backend and self.dtype == self.context.dtype):
            source = self.context.backend
            with target.device():
                self.context.store.move(target, self.dtype)
                self._state.move(source, self.context.store)
            self.context.backend = target
            self.drop_workspaces()
            self._rows_of_forward = None
        return self

    def summary(self) -> str:
        """Return a table with the output shape and the number of parameters of each layer."""
        rows = [("layer", "output shape", "parameters")]
        for layer in self.layers:
            shape = shape_text(layer.output_shape) if layer.is_built else "not built"
            rows.append((repr(layer), shape, f"{sum(p.size for p in layer.parameters):,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        total = sum(p.size for p in self.parameters)
        frozen = sum(p.size for p in self.parameters if not p.trainable)
        lines.append(f"{total:,} parameters" + (f", {frozen:,} of them frozen" if frozen else ""))
        return "\n".join(lines)

    def get_config(self) -> dict[str, Any]:
        shape = self.input_shape if self.is_built else None
        config = {"layers": self.layers, "input_shape": shape, "seed": self.seed, "dtype": self.dtype}
        return self._with_name(config)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rows_of_forward": None}  # workspaces are not copied

    def __repr__(self) -> str:
        where = f", backend={self.backend.name!r}" if self.is_built else ""
        name = "" if self.name is None else f", name={self.name!r}"
        return f"Sequential({list(self.layers)!r}, input_shape={self.input_shape or None}{where}{name})"

    def _build_on(self, input_shape: Any) -> None:
        store = ParameterStore(self._wanted_backend, self.dtype)
        build_alone(self, Context(self._wanted_backend, store, self.seed, precision=self.precision), input_shape)

    def _refuse_inside(self) -> None:
        """Raise StateError if this is a layer of another model, which has the parameters."""
        if self.path:
            raise StateError(f"this Sequential is layer {self.path} of another model: call the whole model instead.")

    def _ensure_built(self, x: Any) -> None:
        self._refuse_inside()
        if not self.is_built:
            stream = isinstance(x, Stream)
            self._build_on(x.sample_shape if stream else as_numbers(self._wanted_backend, x, "x").shape[1:])

    @contextlib.contextmanager
    def _built_for(self, x: Any) -> Iterator[None]:
        """Build the model for x if it is not built; undo that if x or the other arguments are refused."""
        fresh = not self.is_built
        self._ensure_built(x)
        try:
            yield
        except ArgumentError:
            if fresh and not self._state.step:
                self.unplace()
            raise

    @contextlib.contextmanager
    def _enough_memory_for(self, batch_size: int | None, training: bool = False) -> Iterator[None]:
        """Turn the device's error for too little memory into DeviceMemoryError, which says what to try."""
        try:
            yield
        except Exception as error:
            if not self.backend.out_of_memory(error):
                raise
            free, total = self.backend.memory()[2:]
            smaller = 128 if batch_size is None else max(1, batch_size // 2)
            remedy = f"try batch_size={smaller}" if smaller != batch_size else "move it to a device with more"
            if training and smaller != batch_size and batch_size is not None:
                remedy += ", with accumulate=2 for as many samples per update"
            raise DeviceMemoryError(
                f"{self.backend.name} does not have enough memory for batch_size={batch_size}: {remedy}. Of its "
                f"{(total or 0) / 2**30:.1f} GiB, {(free or 0) / 2**30:.1f} GiB are free; backend.free_memory() frees "
                "what CuPy caches."
            ) from error

    def _inputs(self, x: Any) -> tuple[Array, DType]:
        with self._built_for(x), self.backend.device():
            return prepare_inputs(self, x, finite=False)

    def _chosen(self, loss: Any, metrics: Any) -> tuple[Loss, list[Metric]]:
        """The loss and metrics of these names or objects; None means those of the last training."""
        if loss is None and metrics is None:
            return self._state.loss, self._state.metrics
        return choose_loss_and_metrics(self, self._state.loss if loss is None else loss, metrics)


@explain_arguments
def load(path: Any, backend: str | Backend = "auto", custom_layers: Iterable[type[Layer]] = ()) -> Sequential:
    """Load the model that `Sequential.save` wrote, onto `backend`, whatever device it was saved from.

    custom_layers: the classes of your own layers in it. Raises FileError if the file is missing, damaged or not a model
    file. Code from the file is never run.
    """
    backend = get_backend(backend)  # first, because its errors are not about the file
    with model_files.refusing_damage(path):
        architecture, state = model_files.read(path, custom_layers)
        frozen = architecture.pop("frozen")
        model = Sequential(backend=backend, **architecture)
        model.load_state_dict(state)
        for parameter in model.parameters:
            parameter.trainable = parameter.name not in frozen
    return model


@explain_arguments
def check_gradients(
    model: Sequential, x: Any, y: Any, loss: str | Loss = "mse", samples: int = 40, step: float = 1e-5,
    inputs: bool = False
) -> dict[str, float]:  # fmt: skip
    """Compare backward with finite differences, (L(w + h) - L(w - h)) / 2h. Returns {parameter name: relative error}.

    It uses a float64 copy of the model, in training mode, with the same dropout masks in every pass. samples: how many
    elements of each parameter are tried, the same in every call.  step: h.  inputs: whether to check the gradient with
    respect to x too, as the entry "inputs"; integers have none.

    The error is ‖a - n‖ / (‖a‖ + ‖n‖), with the gradients a of backward and n of the differences. Below 1e-6 the
    gradient is right, above 1e-4 it is wrong, unless the loss has a kink within h.
    """
    samples = integer("", "samples", samples)
    number("", "step", step, above=0)
    model._ensure_built(x)
    twin = copy.deepcopy(model).to(model.backend, dtype="float64")
    chosen, _ = choose_loss_and_metrics(twin, loss, [])
    with twin.backend.device():
        dataset = prepare(twin, x, y, chosen, None, chosen.class_weight)
        return relative_errors(twin, dataset, chosen, samples, step, inputs)


def _dtype_name(dtype: Any) -> str:
    with contextlib.suppress(TypeError):
        dtype = None if dtype is None else numpy.dtype(dtype).name
    return choice("", "dtype", dtype, ("float32", "float64"))


def _checked_precision(precision: Any, backend: Backend, dtype: str) -> str | None:
    if choice("", "precision", precision, ("float32", "tf32", "float16", "bfloat16", None)) in ("float32", None):
        return None
    if dtype != "float32":
        raise ArgumentError(f'precision="{precision}" needs dtype="float32", which the weights keep, not {dtype}.')
    if reason := backend.precision_unavailable(precision):
        raise ArgumentError(f'precision="{precision}" is not available on {backend.name}: {reason}. Leave it out.')
    return str(precision)
