"""Sequential, the front door: build, forward, backward, fit, evaluate, predict, save, move."""

import contextlib
import importlib
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy

from xpnet import checkpoints, training
from xpnet import layers as layers_
from xpnet import optimizers as optimizers_
from xpnet.backends import Array, Backend, DType, get_backend
from xpnet.callbacks import Callback
from xpnet.data import Samples, as_numbers, prepare_inputs
from xpnet.errors import (
    ArgumentError,
    ArgumentTypeError,
    DeviceMemoryError,
    DistributedError,
    DivergenceError,
    ShapeError,
    StateError,
    unknown_name,
)
from xpnet.layers.base import Context, Layer, Shape, as_shape
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.optimizers import Optimizer
from xpnet.parameters import ParameterStore
from xpnet.ranks import ALONE, Ranks
from xpnet.run import History
from xpnet.step import TrainingState
from xpnet.streams import Stream, streamed


class Sequential(layers_.Sequential):
    """A model: layers one after the other, on one device.

    layers: what stands in it, first to last.
    input_shape: of one sample, without the batch: (784,), (28, 28, 1). Without it the model is built at its first data.
    backend: "auto" (a GPU if one can be used), "cpu", "gpu", "gpu:1", or a Backend.
    seed: decides the initial weights, the order of batches and all noise; None draws one, kept in `model.seed`.
    dtype: "float32" or "float64", of weights and arithmetic.
    precision: of the products of matrices, on a GPU whose tensor cores have it: "tf32", "float16" or "bfloat16", beside
        a dtype of float32, in which weights, gradients and all else stay. Factors are rounded, sums are float32. With
        "float16" the loss is scaled, and an update whose gradient overflows is left out. None is "float32".

    One thread at a time may use a model; several models may run in as many threads.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        input_shape: int | Sequence[int] | None = None,
        backend: str | Backend = "auto",
        seed: int | None = 0,
        dtype: str = "float32",
        precision: str | None = None,
    ) -> None:
        super().__init__(layers)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | numpy.integer) or seed < 0):
            raise ArgumentError(f"seed must be a whole number of at least 0, or None, not {seed!r}.")
        self.seed = secrets.randbits(32) if seed is None else int(seed)
        self.dtype, self._wanted_backend = _dtype_name(dtype), get_backend(backend)
        self.precision = _checked_precision(precision, self._wanted_backend, self.dtype)
        self._state = TrainingState()
        self._rows_of_forward: int | None = None
        if input_shape is not None:
            self._build_on(as_shape(input_shape))

    # The two passes --------------------------------------------------------------------------------------------

    def forward(self, x: Any, training: bool = False) -> Array:
        """Outputs (N, *output_shape) for inputs (N, *input_shape), as a fresh array on the model's device.

        training=True turns dropout on. `backward` may follow either way.
        """
        if self.path:  # inside another model this is a layer like any other
            return super().forward(x)
        x, dtype = self._inputs(x)
        with self.backend.device():
            self._rows_of_forward = None  # until this pass is through
            x = self.backend.asarray(x, dtype=dtype).copy()  # backward reads it, whatever the caller does meanwhile
            outputs = self.run(x, training=training)
            self._rows_of_forward = len(outputs)
            return outputs.copy()

    def backward(self, grad_output: Any, input_grad: bool = True) -> Array | None:
        """From the gradient of a loss by the outputs of the latest `forward`: fill every parameter's `.grad`.

        Returns the gradient by the inputs, a fresh array; None where `input_grad=False`, which saves its work.
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
            result = self.run_back(grad, input_grad)
            return None if result is None else result.copy()

    # Training --------------------------------------------------------------------------------------------------

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
        distributed: bool | Ranks = False,
        verbose: int = 1,
    ) -> History:
        """Train on x (N, *input_shape) and y; return the figures of every epoch.

        y: class numbers (N,), probabilities (N, K), or targets in the outputs' shape, as the loss takes them.
        Data larger than memory: x and y on disk as `numpy.memmap`; or as x alone a `datasets.Stream`, or batches: an
            iterable of (x, y) or (x, y, weight), or a function that returns a new one for each epoch.
        loss, optimizer, metrics: names or objects. metrics=None is accuracy for losses over classes, else none.
        batch_size: samples a step; the last step of an epoch takes what is left; None is the whole set.
        validation_data: (x, y) or (x, y, sample_weight); or validation_split: the last part of x and y, held out.
        shuffle: a new order every epoch, drawn from the seed.
        sample_weight (N,): counts a sample w times, in loss and metrics. class_weight {class: w}: in the training loss.
        accumulate: batches whose gradients add up to one update, as one batch that many times as large.
        resume_from: the path of a `callbacks.Checkpoint`. Given the same model, data, arguments and callbacks, the run
            goes on as if it had never stopped; `epochs` counts those before the stop too.
        distributed: True shares each batch with the other processes that mpiexec has started; or a
            `distributed.Communicator`. Every rank gives the same model, data and arguments; the first one prints and
            writes. Any number of ranks makes the same run.
        verbose: 1 a progress bar on a terminal, 2 a printed line an epoch, 0 nothing.

        Called again with an equal optimiser it goes on: momenta, schedule and epochs belong to the model. Ctrl-C ends
        after the current step; a second one raises.

        Raises DataError, ShapeError or ArgumentError before training where the data or the arguments cannot work, and
        DivergenceError where the loss becomes NaN or infinite, with the weights of the epoch's start put back. With
        resume_from: FileError for a file that is missing, damaged or holds no training; ArgumentError where it is of
        another model, optimiser, loss or metrics; a warning where NumPy, BLAS, threads or device are others. With
        distributed: DistributedError where ranks were given different things, or one of them cannot train.
        """
        ranks = ALONE
        if distributed is not False:  # whose room opens only here, for it needs mpi4py
            ranks = importlib.import_module("xpnet.distributed").of(distributed)
        try:
            return self._fit_on(
                ranks, x, y, loss=loss, optimizer=optimizer, epochs=epochs, batch_size=batch_size,
                validation_data=validation_data, validation_split=validation_split, metrics=metrics,
                callbacks=callbacks, shuffle=shuffle, sample_weight=sample_weight, class_weight=class_weight,
                accumulate=accumulate, resume_from=resume_from, verbose=verbose,
            )  # fmt: skip
        except (DistributedError, DivergenceError):
            raise  # which all ranks do
        except BaseException as error:
            ranks.failed(error)
            raise

    def _fit_on(self, ranks: Ranks, x: Any, y: Any, *, sample_weight: Any, **options: Any) -> History:
        x, y, sample_weight = streamed(x, y, sample_weight)
        memory = self._enough_memory_for(options["batch_size"], training=True)
        with self._built_for(x), memory, self.backend.stream():
            self._rows_of_forward = None
            return training.fit(self, self._state, x, y, sample_weight=sample_weight, ranks=ranks, **options)

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
        """One update from these samples; {"loss": …} and metrics from before it. Defaults as in the last training."""
        with self._built_for(x), self._enough_memory_for(None), self.backend.device():
            chosen, measured = self._chosen(loss, metrics)
            wanted = self._state.optimizer if optimizer is None else optimizers_.get(optimizer)
            if wanted is None:
                raise ArgumentError('the model was never trained: say which optimizer, such as optimizer="adam".')
            weights = class_weight if class_weight is not None else chosen.class_weight
            data = training.take_in(self, x, y, chosen, measured, sample_weight, weights)
            if not isinstance(data, Samples):
                raise ArgumentTypeError("train_on_batch takes one batch of arrays, not a stream: see fit.")
            self._rows_of_forward = None
            self._state.begin(self.context, chosen, measured, wanted)
            return training.train_on_batch(self, self._state, data)

    def evaluate(
        self,
        x: Any,
        y: Any = None,
        loss: str | Loss | None = None,
        metrics: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
    ) -> dict[str, Any]:
        """{"loss": …, "accuracy": …} of a set. Loss and metrics default to those of the last training.

        batch_size=None takes the whole set in one step. A loss with reduction="sum" gives its sum here.
        """
        if batch_size is not None:
            training.whole_number("batch_size", batch_size)
        x, y, sample_weight = streamed(x, y, sample_weight)
        with self._built_for(x), self._enough_memory_for(batch_size), self.backend.device():
            chosen, measured = self._chosen(loss, metrics)
            data = training.take_in(self, x, y, chosen, measured, sample_weight, chosen.class_weight)
            result = training.measure(self, data, chosen, measured, batch_size, as_sum=chosen.reduction == "sum")
            if batch_size is None:
                self.forget_work(inference=True)  # room for the whole set is not kept
            return result

    def predict(self, x: Any, batch_size: int | None = 1024, as_device: bool = False) -> Array:
        """Outputs (N, *output_shape) for inputs (N, *input_shape), as a NumPy array on the host.

        as_device=True leaves them on the model's device, an array of its `backend.xp`. An array on disk, or a Stream of
        one, is read a batch at a time.
        """
        if batch_size is not None:
            training.whole_number("batch_size", batch_size)
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
                outputs = self.run(self.backend.asarray(batch, dtype=dtype), inference=True)
                parts.append(outputs.copy() if as_device else numpy.array(self.backend.to_numpy(outputs)))
        with self.backend.device():
            join = self.backend.xp.concatenate if as_device else numpy.concatenate
            return parts[0] if len(parts) == 1 else join(parts)

    def activations(self, x: Any) -> dict[str, numpy.ndarray[Any, Any]]:
        """What each layer makes of x (N, *input_shape), on the host: {"0": (N, *its output shape), "1": …}.

        Dropout and distortions do nothing, as in `predict`, which gives the last entry. A Residual counts as one layer.
        """
        x, dtype = self._inputs(x)
        context, made = self.context, {}
        with self.backend.device(), self.working():
            before = context.training, context.inference
            context.training, context.inference = False, True
            try:
                x = self.backend.asarray(x, dtype=dtype)
                for layer in self.layers:
                    x = layer.forward(x)
                    made[layer.path] = numpy.array(self.backend.to_numpy(x))
            finally:
                context.training, context.inference = before
        return made

    # State -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, numpy.ndarray[Any, Any]]:
        """{name: copy on the host} of all parameters and buffers."""
        self._refuse_inside()
        return self.context.store.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take parameters and buffers from such a dict. All names and shapes must agree; otherwise nothing changes."""
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
                if tuple(new[name].shape) != tuple(target.value.shape):
                    raise ShapeError(
                        f"{name} has shape {tuple(target.value.shape)}, but the state's has {tuple(new[name].shape)}."
                    )
            for name, target in own.items():
                target.value[...] = self.backend.asarray(new[name], dtype=target.value.dtype)

    def save(self, path: Any) -> None:
        """Write weights, buffers and architecture to a safetensors file. `xpnet.load` reads it, on any device."""
        self._refuse_inside()
        checkpoints.write(path, self)

    def to(self, backend: str | Backend, dtype: str | None = None) -> "Sequential":
        """Move parameters, optimiser state and buffers to another device, or another dtype; returns the model.

        A precision that there is not on that device, or not beside that dtype, is left behind.
        """
        self._refuse_inside()
        self._state.refuse_running()
        target = get_backend(backend)
        self._wanted_backend, self.dtype = target, _dtype_name(dtype or self.dtype)
        if self.precision is not None and (self.dtype != "float32" or target.why_no_precision(self.precision)):
            self.precision = None
        if self.is_built:
            self.context.precision = self.precision
        if self.is_built and not (target is self.backend and self.dtype == self.context.dtype):
            source = self.context.backend
            with target.device():
                self.context.store.move(target, self.dtype)
                if self._state.memory is not None:
                    self._state.memory.move(source, self.context.store)
            self.context.backend = target
            self.forget_work()
            self._rows_of_forward = None
        return self

    def summary(self) -> str:
        """A table: layer, output shape, parameters."""
        rows = [("layer", "output shape", "parameters")]
        rows += [_summary_row(layer) for layer in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        total = sum(p.size for p in self.parameters)
        frozen = sum(p.size for p in self.parameters if not p.trainable)
        lines.append(f"{total:,} parameters" + (f", {frozen:,} of them frozen" if frozen else ""))
        return "\n".join(lines)

    def get_config(self) -> dict[str, Any]:
        shape = self.input_shape if self.is_built else None
        return {"layers": self.layers, "input_shape": shape, "seed": self.seed, "dtype": self.dtype}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rows_of_forward": None}  # what forward kept is not copied

    def __repr__(self) -> str:
        where = f", backend={self.backend.name!r}" if self.is_built else ""
        return f"Sequential({list(self.layers)!r}, input_shape={self.input_shape or None}{where})"

    # Inside ----------------------------------------------------------------------------------------------------

    def _build_on(self, input_shape: Shape) -> None:
        backend = self._wanted_backend
        store = ParameterStore(backend, self.dtype)
        with backend.device():
            self.place(Context(backend, store, self.seed, precision=self.precision), "", input_shape)
            store.allocate(self.seed)

    def _refuse_inside(self) -> None:
        """Inside another model this is a layer: its parameters lie in that model's store."""
        if self.path:
            raise StateError(f"this Sequential is layer {self.path} of another model: call the whole model instead.")

    def _ensure_built(self, x: Any) -> None:
        self._refuse_inside()
        if not self.is_built:
            stream = isinstance(x, Stream)
            self._build_on(as_shape(x.sample_shape if stream else as_numbers(self._wanted_backend, x, "x").shape[1:]))

    @contextlib.contextmanager
    def _built_for(self, x: Any) -> Iterator[None]:
        """Built for x, if not built before; and unbuilt again where x or its companions are refused."""
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
        """A device that has not enough raises DeviceMemoryError, with what to try."""
        try:
            yield
        except Exception as error:
            if not self.backend.out_of_memory(error):
                raise
            free, total = self.backend.memory()[2:]
            smaller = 128 if batch_size is None else max(1, batch_size // 2)
            mend = f"try batch_size={smaller}" if smaller != batch_size else "move it to a device with more"
            if training and smaller != batch_size and batch_size is not None:
                mend += ", with accumulate=2 for the same updates"
            raise DeviceMemoryError(
                f"{self.backend.name} has not enough memory for batch_size={batch_size}: {mend}. Of its "
                f"{(total or 0) / 2**30:.1f} GiB, {(free or 0) / 2**30:.1f} are free; backend.free_memory() gives back "
                "what CuPy only holds."
            ) from error

    def _inputs(self, x: Any) -> tuple[Array, DType]:
        with self._built_for(x), self.backend.device():
            return prepare_inputs(self, x, finite=False)

    def _chosen(self, loss: Any, metrics: Any) -> tuple[Loss, list[Metric]]:
        last = self._state
        if loss is None and last.loss is None:
            raise ArgumentError('the model was never trained: say which loss, such as loss="softmax_cross_entropy".')
        if loss is None and metrics is None and last.loss is not None:
            return last.loss, last.metrics
        return training.choose(self, last.loss if loss is None else loss, metrics)


def load(path: Any, backend: str | Backend = "auto", custom_layers: Iterable[type[Layer]] = ()) -> Sequential:
    """The model that `Sequential.save` wrote, on `backend`; it may come from another device.

    custom_layers: the classes of layers of your own that stand in it. Raises FileError for a file that is missing,
    truncated, altered or foreign, and never runs code from it.
    """
    backend = get_backend(backend)  # first, for its errors are not the file's
    with checkpoints.refusing_damage(path):
        architecture, state = checkpoints.read(path, custom_layers)
        frozen = architecture.pop("frozen")
        model = Sequential(backend=backend, **architecture)
        model.load_state_dict(state)
        for parameter in model.parameters:
            parameter.trainable = parameter.name not in frozen
    return model


def _dtype_name(dtype: Any) -> str:
    try:
        name = "" if dtype is None else str(numpy.dtype(dtype).name)
    except TypeError:
        name = ""
    if name not in ("float32", "float64"):
        raise ArgumentError(f'dtype must be "float32" or "float64", not {dtype!r}.')
    return name


def _checked_precision(precision: Any, backend: Backend, dtype: str) -> str | None:
    if precision is None or precision == "float32":
        return None
    if precision not in ("tf32", "float16", "bfloat16"):
        raise unknown_name("precision", str(precision), ["float32", "tf32", "float16", "bfloat16"])
    if dtype != "float32":
        raise ArgumentError(
            f'precision="{precision}" goes with dtype="float32", in which the weights stay, not {dtype}.'
        )
    if reason := backend.why_no_precision(precision):
        raise ArgumentError(f'precision="{precision}" cannot be had on {backend.name}: {reason}. Leave it out.')
    return str(precision)


def _summary_row(layer: Layer) -> tuple[str, str, str]:
    shape = "(N, " + ", ".join(map(str, layer.output_shape)) + ")" if layer.is_built else "not built"
    return repr(layer), shape, f"{sum(p.size for p in layer.parameters):,}"
