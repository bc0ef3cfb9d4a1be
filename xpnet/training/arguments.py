"""The arguments of fit and evaluate: checked, completed with their defaults, and turned into datasets."""

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xpnet import losses, metrics
from xpnet.backends import get_backend
from xpnet.callbacks import Callback, EpochLines, ProgressBar
from xpnet.config import choice, flag, integer, is_custom, number, refuse_other_signatures
from xpnet.data.dataset import Dataset
from xpnet.data.preparation import prepare, structure_of
from xpnet.data.sources import length
from xpnet.data.streaming import AnyDataset, Stream, StreamingDataset, as_stream
from xpnet.data.structure import Structure, each, in_order, items
from xpnet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from xpnet.errors import ArgumentError, ArgumentTypeError, shown
from xpnet.layers.containers import Container
from xpnet.layers.structure import as_tuple, shapes_of
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.optimizers import Optimizer
from xpnet.training.output_losses import OutputLosses
from xpnet.training.outputs import last_layers
from xpnet.training.rows import Rows

LARGEST_EXPLAINED_BATCH = 2**31 - 1  # the sizes of larger arrays might not fit into 64 bits


@dataclass(frozen=True)
class FitOptions:
    """The arguments of `BaseModel.fit` except x, y and sample_weight. group: the process group of `distributed`."""

    loss: Any
    optimizer: str | Optimizer
    epochs: int
    batch_size: int | None
    validation_data: Sequence[Any] | None
    validation_split: float
    metrics: Any
    callbacks: Any
    shuffle: bool
    class_weight: Any
    accumulate: int
    resume_from: Any
    on_interrupt: str
    verbose: int
    loss_weights: Any = None
    group: ProcessGroup = SINGLE_PROCESS

    def checked(self) -> "FitOptions":
        """The same options as Python values. Raises ArgumentError or, for callbacks, ArgumentTypeError."""
        callbacks = _checked_callbacks(self.callbacks)
        for callback in callbacks if self.resume_from is not None else ():
            if callback.makes_trial:
                kind = type(callback).__name__
                raise ArgumentError(f"resume_from: a fit with {kind} is a trial, which cannot resume training.")
        return replace(
            self,
            epochs=integer("", "epochs", self.epochs),
            accumulate=integer("", "accumulate", self.accumulate),
            batch_size=checked_batch_size(self.batch_size),
            shuffle=flag("", "shuffle", self.shuffle),
            callbacks=callbacks,
            on_interrupt=choice("", "on_interrupt", self.on_interrupt, ("raise", "stop")),
            verbose=_checked_verbose(self.verbose),
        )

    def all_callbacks(self) -> list[Callback]:
        """The callbacks of this rank, including the progress display of `verbose`; last those that run last."""
        callbacks = list(self.callbacks)
        if self.verbose == 1 and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(ProgressBar())
        if self.verbose == 2:
            callbacks.append(EpochLines())
        if self.group.rank:
            callbacks = [callback for callback in callbacks if not callback.only_on_first_rank]
        return sorted(callbacks, key=lambda callback: callback.runs_last)

    @property
    def is_trial(self) -> bool:
        """Whether the model is restored after fit, because a callback makes a trial. For options that were checked."""
        return any(callback.makes_trial for callback in self.callbacks)

    @property
    def validates(self) -> bool:
        """Whether `split` gives validation data."""
        return self.validation_data is not None or self.validation_split != 0

    def split(
        self, structure: Structure, x: Any, y: Any, sample_weight: Any
    ) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any] | None]:
        """((x, y, weights) for training, the same for validation or None). A split holds out the last part."""
        if self.validation_data is not None:
            given = self.validation_data
            if self.validation_split:
                raise ArgumentError("give validation_data or validation_split, not both.")
            if not isinstance(given, list | tuple) or len(given) not in (2, 3):
                raise ArgumentError("validation_data must be (x, y) or (x, y, sample_weight).")
            x_val, y_val, weight_val = (*given, None)[:3]
            return (x, y, sample_weight), (x_val, y_val, weight_val)
        fraction = number("", "validation_split", self.validation_split, at_least=0, below=1)
        if fraction == 0:
            return (x, y, sample_weight), None
        if isinstance(x, Stream):
            raise ArgumentError("validation_split cannot split a stream: give validation_data.")
        x, y, sample_weight = structure.of_inputs(x), structure.of_outputs(y), structure.of_weights(sample_weight)
        first = items(x)[0]
        sized = hasattr(first, "shape") or hasattr(first, "__len__")
        count = length(first if sized else get_backend("cpu").asarray(first))
        cut = count - round(count * fraction)
        if not 0 < cut < count:
            raise ArgumentError(f"validation_split={fraction} of {count} samples leaves one part empty.")

        def rows(part: slice) -> tuple[Any, Any, Any]:
            x_part, y_part, weight_part = (each(lambda a: _slice(a, part), value) for value in (x, y, sample_weight))
            return x_part, y_part, weight_part

        return rows(slice(None, cut)), rows(slice(cut, None))


def _checked_verbose(verbose: Any) -> int:
    """The argument as 0, 1 or 2; True is 1, and False is 0."""
    try:
        return integer("", "verbose", int(verbose) if isinstance(verbose, bool) else verbose, at_least=0, at_most=2)
    except ArgumentError as error:
        raise ArgumentError(f"{error} 1 shows a progress bar, 2 prints a line per epoch, 0 is silent.") from None


def checked_batch_size(batch_size: Any) -> int | None:
    """The batch size as an int, or None for all samples. Raises ArgumentError."""
    return None if batch_size is None else integer("", "batch_size", batch_size, also="None")


def choose_loss_and_metrics(
    model: Container, loss: Any, metrics_wanted: Any, loss_weights: Any = None
) -> tuple[Loss, list[Metric]]:
    """The loss and metrics of these names or objects. Warns if the loss does not fit the last layer.

    With several outputs, each argument may also be a list, or a dict by the names of the outputs.
    """
    names = model.output_names
    chosen = _loss_of_outputs(loss, loss_weights, names)
    for (one, _), last, name in zip(chosen.by_output, last_layers(model), names, strict=True):
        if one.takes_logits and last is not None and last.gives_probabilities:
            what = f"its output {name!r} is" if len(names) > 1 else "the model's outputs are"
            warn(
                f"{type(one).__name__} takes logits, but {what} probabilities: leave out its layer "
                f"{type(last).__name__}, which the loss includes."
            )
    return chosen, _metrics_of_outputs(metrics_wanted, chosen, names)


def _loss_of_outputs(spec: Any, loss_weights: Any, outputs: Sequence[str]) -> Loss:
    """One loss for each output, of this name for all of them or of a list or dict. Missing loss weights are 1."""
    if isinstance(spec, OutputLosses) and loss_weights is None:
        return spec
    if len(outputs) == 1:
        if loss_weights is not None:
            raise ArgumentError("loss_weights are for models with several outputs, and this model has one.")
        spec = spec[0] if isinstance(spec, list | tuple) and len(spec) == 1 else spec
        return losses.get(in_order("loss", spec, outputs, "output"))
    if isinstance(spec, OutputLosses):
        spec = spec.losses
    specs = [spec] * len(outputs) if isinstance(spec, str | Loss) else in_order("loss", spec, outputs, "output")
    weights = [1.0] * len(outputs)
    if loss_weights is not None:
        given = in_order("loss_weights", loss_weights, outputs, "output", optional=True)
        pairs = zip(outputs, given, strict=True)
        weights = [1.0 if w is None else number("loss_weights", name, w, at_least=0, finite=True) for name, w in pairs]
    found = {name: losses.get(one) for name, one in zip(outputs, specs, strict=True)}
    return OutputLosses(found, dict(zip(outputs, weights, strict=True)))


def _metrics_of_outputs(spec: Any, loss: Loss, outputs: Sequence[str]) -> list[Metric]:
    """The metrics of a model; those of one with several outputs are named after their outputs."""
    if not isinstance(loss, OutputLosses):
        return metrics.get(in_order("metrics", spec, outputs, "output"), loss)
    for_all = spec is None or isinstance(spec, str | Metric) or (isinstance(spec, list | tuple) and not spec)
    specs = [spec] * len(outputs) if for_all else in_order("metrics", spec, outputs, "output", optional=True)
    if isinstance(spec, Mapping):
        specs = [spec.get(name, []) for name in outputs]
    found = []
    for k, (name, one) in enumerate(loss.losses.items()):
        for metric in metrics.get(specs[k], one):
            own = copy.copy(metric)  # a metric object may score several outputs
            own.name, own.output = f"{name}_{metric.name}", k
            found.append(own)
    names = ["loss", "learning_rate", *(f"{name}_loss" for name in outputs), *(metric.name for metric in found)]
    names += [f"val_{name}" for name in names if name != "learning_rate"]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ArgumentError(f"two values of the history would be called {twice[0]!r}: rename an output or a metric.")
    return found


def load_dataset(
    model: Container,
    x: Any,
    y: Any,
    loss: Loss,
    measured: Sequence[Metric],
    sample_weight: Any = None,
    class_weight: Any = None,
    names: tuple[str, str] = ("x", "y"),
) -> AnyDataset:
    """The dataset of these arrays, checked; a stream is checked later. class_weight: None means that of the loss."""
    structure = structure_of(model)
    class_weight = class_weights(structure, loss, class_weight)
    things = [*(one for one, _ in loss.by_output), *measured]
    private = model.has_custom_layers or any(is_custom(type(thing)) for thing in things)

    def checked(x: Any, y: Any, sample_weight: Any, names: tuple[str, str], whole: bool = False) -> Dataset:
        dataset = prepare(model, x, y, loss, sample_weight, class_weight, names, whole)
        rows = Rows(model, loss)
        for metric in measured:
            k = metric.output or 0
            y = as_tuple(dataset.y)[k]
            y = y.copy() if is_custom(type(metric)) else y
            metric.check_targets(*rows.of_targets(k, y, shapes_of(model.output_shape)[k]))
        if not measured:
            dataset.counts = None
        dataset.private = private
        return dataset

    x, y, sample_weight = as_stream(structure, x, y, sample_weight, names[0])
    if isinstance(x, Stream):
        if any(isinstance(weight, str) for weight in items(class_weight)):
            raise ArgumentError(
                'class_weight="balanced" needs all targets in memory: count the classes of the stream, and give '
                "{class: samples / (classes * samples of the class)}."
            )
        return StreamingDataset(x, checked, structure)
    if y is None:
        raise ArgumentTypeError(
            f"{names[1]} is missing: give targets, or as {names[0]} a datasets.Stream that includes them."
        )
    return checked(x, y, sample_weight, names, whole=True)


def class_weights(structure: Structure, loss: Loss, given: Any) -> Any:
    """The weights of the classes, for one output, or a tuple for several. None means those of the loss."""
    for one, _ in loss.by_output:
        losses.get(one)  # checks what was set since the last training
    given = structure.of_class_weights(given)
    if not isinstance(loss, OutputLosses):
        return loss.class_weight if given is None else given
    pairs = zip(given, loss.losses.values(), strict=True)
    return tuple(one.class_weight if weight is None else weight for weight, one in pairs)


def _checked_callbacks(given: Any) -> list[Callback]:
    """The callbacks as a list. Raises ArgumentTypeError for other objects, and ArgumentError for unknown methods."""
    several = isinstance(given, Iterable) and not (isinstance(given, str | Mapping) or hasattr(given, "shape"))
    callbacks: list[Any] = [] if given is None else list(given) if several else [given]
    for callback in callbacks:
        if not isinstance(callback, Callback):
            hint = ": derive its class from xpnet.callbacks.Callback."
            if isinstance(callback, type) and issubclass(callback, Callback):
                hint = "; did you mean an object, with ()?"
            raise ArgumentTypeError(
                f"callbacks must be Callback objects, or a list of them, not {shown(callback)}{hint}"
            )
        refuse_other_signatures(callback, Callback)
        own = {name for cls in type(callback).__mro__ if cls.__module__.startswith("xpnet.") for name in vars(cls)}
        for name in dir(callback):
            if name.startswith("on_") and name not in own and callable(getattr(callback, name)):
                known = [name for name in dir(Callback) if name.startswith("on_") and name != "on_compile"]
                import difflib  # here, because only errors need it

                # In other libraries a step is called a batch.
                alike = name.replace("train_batch", "step").replace("batch", "step").replace("start", "begin")
                nearest = difflib.get_close_matches(alike, known, n=1, cutoff=0.0)[0]
                raise ArgumentError(
                    f"{type(callback).__name__}: fit never calls {name}. Did you mean {nearest!r}? It calls "
                    f"{', '.join(known)}; give other methods names that do not begin with on_."
                )
    if len({id(callback) for callback in callbacks}) < len(callbacks):
        raise ArgumentError("callbacks: the same object is there twice, so fit would call it twice: give it once.")
    return callbacks


def warn(text: str) -> None:
    """Issue a UserWarning that points to the line outside this package that called into it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "xpnet":
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)


def _slice(a: Any, part: slice) -> Any:
    if a is None:
        return None
    if hasattr(a, "iloc"):  # a[part] of a pandas frame would be columns
        return a.iloc[part]
    a = a if hasattr(a, "__getitem__") else get_backend("cpu").asarray(a)
    if getattr(a, "shape", None) == ():
        return a  # a number, which is refused later
    if hasattr(a, "shape"):
        part = slice(part.start or 0, length(a) if part.stop is None else part.stop)  # an array on disk may need both
    return a[part]
