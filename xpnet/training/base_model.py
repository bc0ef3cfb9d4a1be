"""BaseModel: fit, evaluate, predict and the other methods that Sequential and Model have in common."""

import contextlib
import copy
import functools
import operator
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Self

import numpy

from xpnet import optimizers as optimizers_
from xpnet.backends import Array, Backend, DType, get_backend
from xpnet.callbacks import Callback, History
from xpnet.concurrency.interrupts import deferring
from xpnet.config import as_seed, choice, explain_arguments, flag, float_dtype, integer
from xpnet.data.dataset import Batch, Dataset
from xpnet.data.preparation import as_numbers, prepare_gradient, prepare_inputs, structure_of
from xpnet.data.sources import length, read
from xpnet.data.streaming import Stream, as_stream
from xpnet.data.structure import each, in_order, items
from xpnet.display.tables import Summary, summary
from xpnet.distributed.mpi import process_group
from xpnet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from xpnet.errors import (
    ArgumentError,
    ArgumentTypeError,
    DistributedError,
    DivergenceError,
    FileError,
    StateError,
    shape_text,
)
from xpnet.layers.building import build_alone, building
from xpnet.layers.containers import Container
from xpnet.layers.context import Context
from xpnet.layers.structure import Arrays, as_list, as_tuple, first_of, mapped, one_or_tuple
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.optimizers import Optimizer
from xpnet.parameters import Parameter, ParameterStore
from xpnet.training import loop, model_files, outputs
from xpnet.training.arguments import (
    LARGEST_EXPLAINED_BATCH,
    FitOptions,
    checked_batch_size,
    choose_loss_and_metrics,
    load_dataset,
)
from xpnet.training.audit import Checks
from xpnet.training.captured_inference import CapturedInference, InferencePass
from xpnet.training.device_memory import explaining_memory_errors, explaining_memory_errors_of, samples_of
from xpnet.training.evaluation import evaluate
from xpnet.training.resuming import Rollback
from xpnet.training.run import Run
from xpnet.training.state import TrainingState, Untrained
from xpnet.training.state_dicts import LoadedState, load_state

#: The model whose pass is running through the `forward` or `backward` that its subclass defines.
_running: ContextVar[Any] = ContextVar("running", default=None)


class BaseModel(Container):
    """The base of Sequential and Model, which add the layers and their connections."""

    _advice = "model"

    _own_attributes = Container._own_attributes | {
        "_builder", "_checked", "_checks", "_has_gradients", "_inference", "_rows_of_forward", "_state", "_tensors",
        "history",
    }  # fmt: skip
    #: Whether a subclass has a forward or backward of its own.
    _overrides = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._overrides = (cls.forward, cls.backward) != (BaseModel.forward, BaseModel.backward)
        if cls._overrides:
            cls._run_forward = cls._run_own_forward  # type: ignore[assignment]
            cls._run_backward = cls._run_own_backward  # type: ignore[assignment]

    def _configure(self, backend: Any, seed: Any, dtype: Any, precision: Any) -> None:
        """Check the arguments that all models take, and set what they start with."""
        self.seed = secrets.randbits(32) if seed is None else as_seed("", seed, also="None")
        self.dtype, self._wanted_backend = float_dtype(dtype), get_backend(backend)
        self.precision = _checked_precision(precision, self._wanted_backend, self.dtype)
        self._state: TrainingState | Untrained = Untrained()
        self._rows_of_forward = 0
        self._has_gradients = False
        self._checks: Checks | None = None  # of custom layers, from `forward` to `backward`
        self._checked = False  # whether they are done
        self._inference = CapturedInference()
        self._builder = 0  # the thread that has built the model for data that may still be refused
        self.history: History | None = None

    def _checked_assignment(self, name: str, value: Any) -> Any:
        if name in ("layers", "name"):
            return super()._checked_assignment(name, value)
        if self.is_built:
            advice = "Use model.to(backend, dtype=...)." if name == "dtype" else f"Make a new model with {name}=..."
            raise StateError(f"{type(self).__name__}: {name} cannot change after the model is built. {advice}")
        if name == "seed":
            return as_seed("", value)
        if name == "dtype":
            return float_dtype(value)
        return _checked_precision(value, self._wanted_backend, self.dtype) if name == "precision" else value

    def _update_settings(self, **settings: Any) -> None:
        """Set attributes of this model and its shared copies. Unlike an assignment, it also works after build."""
        copies = [reference() for reference in self._shared_copies]
        for model in [self, *copies]:
            if model is not None:
                vars(model).update(settings)

    @explain_arguments
    def forward(self, x: Any, training: bool = False) -> Any:
        """Return the outputs (N, *output_shape) for inputs (N, *input_shape), as a new array on the model's device.

        With several inputs, x is a list or a dict of arrays; with several outputs, the result is a list. training=True
        turns dropout on, with other noise in each call. `backward` may follow in both cases.
        """
        if self.path or _running.get() is self:  # as a layer of another model, or in a pass
            return super().forward(x)
        training = flag("", "training", training)
        with self._explaining_shortage(x):
            x, dtype = self._inputs(x)
            return self.context.exclusively(self._forward, x, dtype, training)

    def _forward(self, x: Arrays, dtype: DType, training: bool) -> Any:
        if training:
            self.context.guard.refuse_beside_training()
        self.context.begin_forward(training)
        # A copy, since backward reads it, and the caller may change the original.
        x = mapped(lambda a, dtype: self.backend.asarray(a, dtype=dtype).copy(), x, dtype)
        with self._by_hand():
            outputs = self.forward_pass(x, training=training)
        self._rows_of_forward = len(first_of(outputs))
        self.context.end_forward()
        return as_list(mapped(lambda a: a.copy(), outputs))

    @explain_arguments
    def backward(self, grad_output: Any, input_grad: bool = True) -> Any:
        """Fill the `.grad` of every trainable parameter, given ∂L/∂y for the latest outputs y of `forward`.

        grad_output: (N, *output_shape), or a list or a dict of arrays if there are several outputs. Returns the
        gradient with respect to the inputs as a new array, or a list of arrays if there are several; None if
        input_grad=False, which saves its computation. `forward` must have been called by the same thread.
        """
        if self.path or _running.get() is self:
            return super().backward(grad_output)
        input_grad = flag("", "input_grad", input_grad)
        with self._explaining_shortage(grad_output):
            return self.context.exclusively(self._backward, grad_output, input_grad)

    def _backward(self, grad_output: Any, input_grad: bool) -> Any:
        self.context.guard.refuse_beside_training()
        self.context.check_forward()
        grad = prepare_gradient(self, grad_output, self._rows_of_forward)
        self._forget_gradients()  # until this pass is complete
        with self._by_hand():
            result = self.backward_pass(grad, input_grad)
        self._has_gradients, self._checked, self._checks = True, True, None
        return as_list(mapped(lambda a: None if a is None else a.copy(), result))

    def _forget_gradients(self) -> None:
        """Note that the gradients of this model, and of those that share parameters with it, are overwritten."""
        for store in self.context.store.sharing:
            for model in store.models:
                model._has_gradients = False

    def shared_copy(self) -> Self:
        twin = super().shared_copy()  # a layer of another model, which is trained as a whole
        vars(twin).update(_state=Untrained(), _inference=CapturedInference(), history=None)
        return twin

    def _by_hand(self) -> contextlib.AbstractContextManager[None]:
        """A context for a pass that a user calls. It checks custom layers, until `backward` was called once."""
        if self._overrides:
            return self._as_layers()
        if self._checked or not self.has_custom_layers:
            return contextlib.nullcontext()
        self._checks = self._checks or Checks(self)
        return self._checks.wrapped()

    def _run_own_forward(self, x: Array) -> Array:
        if _running.get() is self:
            return super().forward(x)
        with self._as_layers():
            y = self.forward(x)
            self.check_output(x, y)
            return y

    def _run_own_backward(self, grad_y: Array) -> Array | None:
        if _running.get() is self:
            return super().backward(grad_y)
        with self._as_layers():
            return self.backward(grad_y)

    @contextlib.contextmanager
    def _as_layers(self) -> Iterator[None]:
        """A context in which `forward` and `backward` of this class, which a subclass calls, only run the layers."""
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)

    @explain_arguments
    def fit(
        self,
        x: Any,
        y: Any = None,
        loss: Any = "softmax_cross_entropy",
        optimizer: str | Optimizer = "adam",
        epochs: int = 1,
        batch_size: int | None = 128,
        validation_data: Sequence[Any] | None = None,
        validation_split: float = 0.0,
        metrics: Any = None,
        callbacks: Sequence[Callback] = (),
        shuffle: bool = True,
        sample_weight: Any = None,
        class_weight: Any = None,
        accumulate: int = 1,
        resume_from: Any = None,
        distributed: bool | ProcessGroup = False,
        on_interrupt: str = "raise",
        verbose: int = 1,
        *,
        loss_weights: Any = None,
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
            multiplies the weights of the samples of a class, in the training loss only; "balanced" is
            w = N / (classes · samples of the class), over the classes that y contains.
        accumulate: the number of batches whose gradients are added before each update, as in one larger batch; but
            BatchNorm still normalizes each batch separately.
        resume_from: the path of a `callbacks.Checkpoint`. With the same model, data, arguments and callbacks, the run
            continues as if it had never stopped; `epochs` includes those before the stop.
        distributed: True divides each batch among the processes that mpiexec started; or pass a
            `distributed.Communicator`. Give every rank the same model, data and arguments; the first rank prints and
            writes. Except for rounding, the result does not depend on the number of ranks.
        on_interrupt: what Ctrl-C does after the current step, when `history` has all complete epochs: "raise" raises
            KeyboardInterrupt; "stop" returns, and history.stopped is "interrupted".
        verbose: 1 shows a progress bar on a terminal or in a notebook, 2 prints a line per epoch, 0 is silent.

        With several inputs, x is a list of arrays, or a dict {name of the input: array}. With several outputs, y, loss,
            metrics, sample_weight, class_weight and loss_weights are lists or dicts in the same way, by the names of
            the outputs; a single loss, metric or array of weights is for all outputs.  loss_weights: the factor of each
            output's loss in the total, by default 1. The history has the total as "loss" and, for an output "digit",
            "digit_loss" and "digit_accuracy".

        A second call with an equal optimizer continues: optimizer state, schedule and epochs belong to the model.
        A second Ctrl-C raises KeyboardInterrupt at once; the model can be used then, but may be in the middle of an
        update. If the program has its own handler of SIGINT, that handler decides.

        Raises DataError, ShapeError or ArgumentError before training if the data or the arguments are invalid, and
        StateError if fit is running on this model already. Raises DivergenceError if the loss becomes NaN or infinite,
        and restores the weights of the epoch's start. With resume_from: FileError if the file is missing, damaged or
        not a checkpoint; ArgumentError if it is of another model, optimizer, loss or metrics; a warning if NumPy, BLAS,
        threads or device differ. With distributed: DistributedError if ranks were given different arguments, or if one
        of them cannot train.
        """
        group = SINGLE_PROCESS if distributed is False else process_group(distributed)
        try:
            x, y, sample_weight = as_stream(structure_of(self), x, y, sample_weight)
            options = FitOptions(
                loss=loss, optimizer=optimizer, epochs=epochs, batch_size=batch_size, validation_data=validation_data,
                validation_split=validation_split, metrics=metrics, callbacks=callbacks, shuffle=shuffle,
                class_weight=class_weight, accumulate=accumulate, resume_from=resume_from, on_interrupt=on_interrupt,
                verbose=verbose, loss_weights=loss_weights, group=group,
            )  # fmt: skip
            run = deferring(self._fit, x, y, sample_weight, options)
        except (DistributedError, DivergenceError):
            raise  # all ranks raise it
        except BaseException as error:
            group.abort(error)
            raise
        if run.interrupted and on_interrupt == "raise":
            raise KeyboardInterrupt("training has stopped after a step; model.history has the complete epochs")
        return run.history

    def _fit(self, x: Any, y: Any, sample_weight: Any, options: FitOptions) -> Run:
        memory = explaining_memory_errors(self, options.batch_size, training=True, samples=samples_of(x))
        with self._built_for(x), memory, self.backend.stream():
            self._forget_gradients()
            return loop.fit(
                self, self._begin_training, x, y, sample_weight, options, lambda: Rollback(self, self._state)
            )

    def _begin_training(self, loss: Loss | None, metrics: list[Metric] | None, optimizer: Optimizer) -> TrainingState:
        with self.context.guard.lock:
            self._state = state = self._state.begin(self.context, loss, metrics, optimizer)
        return state

    @explain_arguments
    def train_on_batch(
        self,
        x: Any,
        y: Any,
        loss: Any = None,
        optimizer: str | Optimizer | None = None,
        metrics: Any = None,
        sample_weight: Any = None,
        class_weight: Any = None,
        *,
        loss_weights: Any = None,
    ) -> dict[str, float]:
        """Make one training step on these samples. Returns {"loss": …} and metrics, computed before the update.

        Loss, optimizer and metrics default to those of the last training.
        """
        with self._built_for(x), self._explaining_shortage(x), self.backend.device():
            chosen, measured = self._chosen(loss, metrics, loss_weights)
            wanted = self._state.optimizer if optimizer is None else optimizers_.get(optimizer)
            dataset = load_dataset(self, x, y, chosen, measured, sample_weight, class_weight)
            if not isinstance(dataset, Dataset):
                raise ArgumentTypeError("train_on_batch takes one batch of arrays, not a stream: see fit.")
            return self.context.exclusively(self._train_on_batch, chosen, measured, wanted, dataset)

    def _train_on_batch(
        self, loss: Loss, metrics: list[Metric], optimizer: Optimizer, dataset: Dataset
    ) -> dict[str, float]:
        self.context.guard.refuse_during_training()
        self._forget_gradients()
        return loop.train_on_batch(self, self._begin_training(loss, metrics, optimizer), dataset)

    @explain_arguments
    def apply_gradients(self, optimizer: str | Optimizer = "adam") -> None:
        """Update the parameters once from their gradients, in a custom training loop, after `backward`.

        This is the update of `train_on_batch`: it adds the gradients of l1 and l2 penalties, clips, decays, and counts
        the step. Optimizer state and step belong to the model: an equal optimizer continues, another one starts afresh.
        The gradients keep their values.

        Raises StateError before the first `backward`, and while fit is running; DivergenceError if a gradient is NaN or
        infinite. Then nothing changes.
        """
        self._refuse_inside()
        chosen = optimizers_.get(optimizer)
        self.context.exclusively(self._apply_gradients, chosen)

    def _apply_gradients(self, optimizer: Optimizer) -> None:
        self.context.guard.refuse_during_training()
        if not self._has_gradients:
            raise StateError(
                "apply_gradients needs gradients: call model.forward(x, training=True) and model.backward(grad_output) "
                "first."
            )
        loop.apply_gradients(self, lambda: self._begin_training(None, None, optimizer))

    @explain_arguments
    def evaluate(
        self,
        x: Any,
        y: Any = None,
        loss: Any = None,
        metrics: Any = None,
        batch_size: int | None = 1024,
        sample_weight: Any = None,
        *,
        loss_weights: Any = None,
    ) -> dict[str, Any]:
        """Return the loss and metrics of a dataset, {"loss": …, "accuracy": …}.

        By default they are those of the last training. The loss is a mean over the samples, or their sum if its
        reduction is "sum". batch_size affects memory and speed only; None takes all samples at once. Lists and dicts of
        arrays, and the names of the results of several outputs, are as in `fit`.
        """
        batch_size = checked_batch_size(batch_size)
        x, y, sample_weight = as_stream(structure_of(self), x, y, sample_weight)
        memory = explaining_memory_errors(self, batch_size, samples=samples_of(x))
        with self._built_for(x), memory, self.backend.device():
            chosen, measured = self._chosen(loss, metrics, loss_weights)
            dataset = load_dataset(self, x, y, chosen, measured, sample_weight)
            result = evaluate(self, dataset, chosen, measured, batch_size).final_result(reduced=True)
            if batch_size is None:  # buffers for the whole dataset are not kept
                self.context.exclusively(self.drop_workspaces, inference_only=True)
            return result

    @explain_arguments
    def predict(self, x: Any, batch_size: int | None = 1024, as_device: bool = False) -> Any:
        """Return the outputs (N, *output_shape) for inputs (N, *input_shape), as a NumPy array on the host.

        With several inputs, x is a list or a dict of arrays; with several outputs, the result is a list of arrays.
        as_device=True returns arrays of `backend.xp` on the model's device instead. An array on disk, or a Stream of
        one, is read batch by batch.
        """
        batch_size, as_device = checked_batch_size(batch_size), flag("", "as_device", as_device)
        with explaining_memory_errors(self, batch_size, samples=samples_of(x)):
            return self._predict(x, batch_size, as_device)

    def _predict(self, x: Any, batch_size: int | None, as_device: bool) -> Any:
        given, streamed = x, isinstance(x, Stream)
        x = in_order("x", x.array if streamed else x, self.input_names, "input")
        on_disk = streamed or any(isinstance(a, numpy.memmap) for a in items(x))
        if on_disk:
            self._ensure_built(given)
            size = batch_size or 1024
        else:
            x, dtype = self._inputs(x)
            size = batch_size or len(first_of(x))
        parts, count = [], length(items(x)[0])
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            if on_disk:
                batch, dtype = self._inputs(each(functools.partial(read, rows=rows, name="x"), x))
            else:
                batch = mapped(operator.itemgetter(rows), x)
            parts.append(self.context.exclusively(self._predict_batch, batch, dtype, as_device))
        if len(parts) == 1:
            return as_list(parts[0])
        with self.backend.device():
            join = self.backend.xp.concatenate if as_device else numpy.concatenate
            return [join(column) for column in zip(*parts, strict=True)] if isinstance(parts[0], tuple) else join(parts)

    def inference_outputs(self, x: Arrays) -> Arrays:
        """The outputs for arrays in the dtype that the layers take: buffers, valid until the next pass.

        Call it in `Context.exclusively`. Passes of a kind are captured and replayed after some time.
        """
        replayed = self._inference.replayed(InferencePass(self), Batch(x, None, None, None))
        return self.forward_pass(self._own(x), inference=True) if replayed is None else one_or_tuple(replayed)

    def _predict_batch(self, x: Arrays, dtype: DType, as_device: bool) -> Arrays:
        outputs = self.inference_outputs(mapped(self.backend.asarray, x, dtype))
        return mapped(lambda a: a.copy() if as_device else numpy.array(self.backend.to_numpy(a)), outputs)

    @explain_arguments
    def predict_proba(self, x: Any, batch_size: int | None = 1024, as_device: bool = False) -> Any:
        """Return the probabilities of a classifier for inputs (N, *input_shape). Arguments: as in `predict`.

        Outputs that are probabilities already, of a last layer such as Softmax or Sigmoid, stay as they are; those of
        LogSoftmax are log-probabilities. Other outputs are logits. The loss of the last training says of what: with
        SoftmaxCrossEntropy, of classes, (N, K) with Σ_k p_k = 1, the softmax over the last axis; with
        BinaryCrossEntropy, of separate yes-or-no answers, the sigmoid of each. Without a training, as after
        `xpnet.load`, several outputs are taken for classes, and one for a yes-or-no answer.

        A single output (N, 1) gives two columns (N, 2): the probabilities 1 - p of no and p of yes. For a model with
        several outputs, the result is a list.

        Raises ArgumentError if the model was trained with a loss that is not for classes, such as "mse".
        """
        as_device = flag("", "as_device", as_device)
        with self._built_for(x):
            probabilities = outputs.probabilities(self, self._state.last_loss)
        with explaining_memory_errors(self, checked_batch_size(batch_size), samples=samples_of(x)):
            result = probabilities(self.predict(x, batch_size, as_device=True))
            return as_list(result if as_device else mapped(lambda a: numpy.array(self.backend.to_numpy(a)), result))

    @explain_arguments
    def activations(self, x: Any) -> dict[str, numpy.ndarray[Any, Any]]:
        """Return the outputs of every layer for x (N, *input_shape), on the host: {"0": (N, *output_shape), "1": …}.

        Dropout and distortions are off, so that the entries of output layers equal `predict(x)`. A container such as
        Residual counts as one layer. A layer that is called several times has an entry for each call: "0", "0#2", ….
        """
        with self._explaining_shortage(x):
            x, dtype = self._inputs(x)
            return self.context.exclusively(self._activations, x, dtype)

    def _activations(self, x: Array, dtype: DType) -> dict[str, numpy.ndarray[Any, Any]]:
        context, outputs = self.context, {}
        with self.execution_context():
            before = context.training, context.inference
            context.training, context.inference = False, True
            try:
                values = dict(enumerate(as_tuple(self._own(mapped(self.backend.asarray, x, dtype)))))
                for layer, inputs, numbers, _ in self._sites:
                    y = layer.forward(values[inputs] if isinstance(inputs, int) else [values[i] for i in inputs])
                    values.update(zip(as_tuple(numbers), as_tuple(y), strict=True))
                    outputs[layer.path] = mapped(lambda array: numpy.array(self.backend.to_numpy(array)), y)
            finally:
                context.training, context.inference = before
        return outputs

    @explain_arguments
    def state_dict(self) -> dict[str, numpy.ndarray[Any, Any]]:
        """Return {name: copy on the host} of all parameters and buffers."""
        self._refuse_inside()
        return self.context.store.state()

    @explain_arguments
    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> LoadedState:
        """Load what `state_dict` returned, or a part of it. Returns the names that are `missing` and `unused`.

        strict: whether to refuse a state with missing or unknown names. If not, what has the same name is loaded.

        Raises ArgumentError for such names, ShapeError for other shapes, ArgumentTypeError for arrays that are not real
        numbers, and DataError for numbers too large for the model's dtype. Then nothing changes.
        """
        self._refuse_inside()
        return load_state(self.context, state, flag("", "strict", strict))

    @explain_arguments
    def save(self, path: Any) -> None:
        """Write weights, buffers and architecture to a safetensors file, which `xpnet.load` reads on any device.

        The file is replaced as a whole or not at all. A symbolic link stays, and its target is written. Raises
        FileError if it cannot be written, and ArgumentError for a suffix of another format, such as .h5 or .pt.
        """
        self._refuse_inside()
        if self._parameters or self._overrides:
            raise ArgumentTypeError(
                f"{type(self).__name__} has parameters or a forward of its own, which xpnet.load could not restore: "
                "save its state_dict(), or derive from layers.Sequential and put it into an xpnet.Sequential."
            )
        model_files.write(path, self)

    @explain_arguments
    def to(self, backend: str | Backend, dtype: str | None = None) -> Self:
        """Move parameters, optimizer state and buffers to another device or dtype; returns the model.

        A `precision` that the device or the dtype does not support is dropped.
        """
        self._refuse_inside()
        target = get_backend(backend)
        if not self.is_built:
            return self._move(target, dtype)
        return self.context.exclusively(self._move, target, dtype)

    def _move(self, target: Backend, dtype: str | None) -> Self:
        if self.is_built:
            self.context.guard.refuse_during_training()
        self._update_settings(_wanted_backend=target, dtype=float_dtype(self.dtype if dtype is None else dtype))
        self._drop_unsupported_precision()
        if self.is_built and not (target is self.backend and self.dtype == self.context.dtype):
            with target.device():
                self.context.store.move(target, self.dtype)
                for store in self.context.store.family:
                    for model in store.models:
                        model._follow_store()
        return self

    def _follow_store(self) -> None:
        """The store has moved to another device or dtype, perhaps with another model that shares it."""
        store = self.context.store
        self._update_settings(_wanted_backend=store.backend, dtype=store.dtype.name)
        self.context.backend = store.backend
        self._drop_unsupported_precision()
        self._state.follow(store)
        self.drop_workspaces()
        self.context.forward_thread = 0

    def _drop_unsupported_precision(self) -> None:
        backend, precision = self._wanted_backend, self.precision
        if precision is not None and (self.dtype != "float32" or backend.precision_unavailable(precision)):
            self._update_settings(precision=None)
        if self.is_built:
            self.context.precision = self.precision

    def _drop_precision(self) -> None:
        """From now on, compute matrix products in the model's dtype. The model must be built."""
        self._update_settings(precision=None)
        self.context.precision = None

    def drop_workspaces(self, inference_only: bool = False) -> None:
        super().drop_workspaces(inference_only)
        self._inference.drop()

    @explain_arguments
    def summary(self, batch_size: int | None = None) -> Summary:
        """Return a table with the output shape and the number of parameters of each layer.

        It is a string to print, which a notebook shows as a table. With a batch size it also says how much memory a
        training step needs, with the loss and the optimizer of the latest `fit`; before any, with SGD and a loss that
        fits the outputs. `backward` then needs another `forward`.
        """
        header, rows = self._table()
        total = sum(p.size for p in self.parameters)
        frozen = sum(p.size for p in self.parameters if not p.trainable)
        footer = f"{total:,} parameters" + (f", {frozen:,} of them frozen" if frozen else "")
        if batch_size is not None:
            batch_size = integer(self, "batch_size", batch_size, at_most=LARGEST_EXPLAINED_BATCH)
            self._refuse_unless_complete("its memory is not known")
            from xpnet.training.explanation import memory_of_a_step  # only if needed

            state = self._state
            optimizer = "sgd" if isinstance(state, Untrained) else state.optimizer
            footer += f"\n{memory_of_a_step(self, batch_size, state.last_loss, optimizer)}"
        where = f"input {shape_text(self.input_shape)}, {self.backend.name}" if self.is_built else "not built"
        return summary(f"{type(self).__name__}: {where}", header, rows, footer)

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The header and the rows of `summary`."""
        rows, counted = list[tuple[str, ...]](), set[Parameter]()
        for name, layer in zip(self._keys(), self.layers, strict=True):
            shape = shape_text(layer.output_shape) if layer.is_built else "not built"
            new = set(layer.parameters) - counted  # a tied layer may share all of its own
            counted |= new
            rows.append((name, repr(layer), shape, f"{sum(p.size for p in new):,}"))
        return ("name", "layer", "output shape", "parameters"), rows

    def _repr_html_(self) -> str:
        return self.summary().html

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_checks": None, "_inference": CapturedInference()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._context is not None and not self.path:
            self._context.store.models.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Between two passes, if other threads use the model.
        return self.context.exclusively(self._copy, memo) if self._is_complete() else self._copy(memo)

    def _copy(self, memo: dict[int, Any]) -> Self:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def _build_on(self, input_shape: Any, state: Mapping[str, Any] | None = None) -> None:
        """Build the model, with the values and buffers of `state` if it is given."""
        store = ParameterStore(self._wanted_backend, self.dtype)
        build_alone(self, Context(self._wanted_backend, store, self.seed, precision=self.precision), input_shape, state)
        store.models.add(self)

    def _refuse_inside(self) -> None:
        """Raise StateError if this is a layer of another model, which has the parameters."""
        if self.path:
            kind = type(self).__name__
            raise StateError(f"this {kind} is layer {self.path} of another model: call the whole model instead.")

    def _ensure_built(self, x: Any, on_trial: bool = False) -> None:
        """Build the model for x if it is not built. on_trial: this may be undone, unless another thread uses it too."""
        self._refuse_inside()
        if self._is_complete() and not self._builder:
            return
        with building:  # other threads wait
            if self._is_complete():
                if self._builder != threading.get_ident():
                    self._builder = 0
                return
            self.unplace()
            stream = isinstance(x, Stream)
            x = x if stream else in_order("x", x, self.input_names, "input")
            self._build_on(x.sample_shape if stream else as_numbers(self._wanted_backend, x, "x").shape[1:])
            self._builder = threading.get_ident() if on_trial else 0

    def _refuse_unless_complete(self, why: str) -> None:
        self._refuse_inside()
        if not self._is_complete():
            raise StateError(f"the model is not built yet, so {why}: give it input_shape, or call fit.")

    def _is_complete(self) -> bool:
        context = self._context
        return context is not None and context.store.allocated

    @contextlib.contextmanager
    def _built_for(self, x: Any) -> Iterator[None]:
        """Build the model for x if it is not built; undo that if x or the other arguments are refused."""
        self._ensure_built(x, on_trial=True)
        try:
            yield
        except (ArgumentError, ArgumentTypeError, FileError):
            with building:
                if self._builder == threading.get_ident() and not self._state.step:
                    self.unplace()
                    self._state = Untrained()
            raise
        finally:
            if self._builder == threading.get_ident():
                self._builder = 0

    def _own(self, x: Arrays) -> Arrays:
        """x, as a copy if a custom layer might write into it."""
        return mapped(lambda a: a.copy(), x) if self.has_custom_layers else x

    def _explaining_shortage(self, x: Any) -> contextlib.AbstractContextManager[None]:
        return explaining_memory_errors_of(self, samples_of(x) or 1)

    def _inputs(self, x: Any) -> tuple[Arrays, Any]:
        with self._built_for(x), self.backend.device():
            return prepare_inputs(self, x, finite=False)

    def _chosen(self, loss: Any, metrics: Any, loss_weights: Any = None) -> tuple[Loss, list[Metric]]:
        """The loss and metrics of these names or objects; None means those of the last training."""
        if loss is None and metrics is None and loss_weights is None:
            with self.context.guard.lock:  # both are set when fit begins
                return self._state.loss, self._state.metrics
        return choose_loss_and_metrics(self, self._state.loss if loss is None else loss, metrics, loss_weights)


def _checked_precision(precision: Any, backend: Backend, dtype: str) -> str | None:
    if choice("", "precision", precision, ("float32", "tf32", "float16", "bfloat16", None)) in ("float32", None):
        return None
    if dtype != "float32":
        raise ArgumentError(f'precision="{precision}" needs dtype="float32", which the weights keep, not {dtype}.')
    if reason := backend.precision_unavailable(precision):
        raise ArgumentError(f'precision="{precision}" is not available on {backend.name}: {reason}. Leave it out.')
    return str(precision)
