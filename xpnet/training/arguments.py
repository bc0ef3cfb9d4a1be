"""The arguments of fit and evaluate: checked, completed with their defaults, and turned into datasets."""

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xpnet import losses, metrics
from xpnet.backends import get_backend
from xpnet.callbacks import Callback, EpochLines, ProgressBar
from xpnet.config import choice, flag, integer, is_custom, number
from xpnet.data.dataset import Dataset
from xpnet.data.preparation import prepare
from xpnet.data.sources import length
from xpnet.data.streaming import AnyDataset, Stream, StreamingDataset, as_stream
from xpnet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from xpnet.errors import ArgumentError, ArgumentTypeError
from xpnet.layers.containers import Container
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.optimizers import Optimizer
from xpnet.training.outputs import last_layer


@dataclass(frozen=True)
class FitOptions:
    """The arguments of `Sequential.fit` except x, y and sample_weight. group: the process group of `distributed`."""

    loss: str | Loss
    optimizer: str | Optimizer
    epochs: int
    batch_size: int | None
    validation_data: Sequence[Any] | None
    validation_split: float
    metrics: Any
    callbacks: Any
    shuffle: bool
    class_weight: Mapping[int, float] | Sequence[float] | str | None
    accumulate: int
    resume_from: Any
    on_interrupt: str
    verbose: int
    group: ProcessGroup = SINGLE_PROCESS

    def checked(self) -> "FitOptions":
        """The same options as Python values. Raises ArgumentError or, for callbacks, ArgumentTypeError."""
        return replace(
            self,
            epochs=integer("", "epochs", self.epochs),
            accumulate=integer("", "accumulate", self.accumulate),
            batch_size=checked_batch_size(self.batch_size),
            shuffle=flag("", "shuffle", self.shuffle),
            callbacks=_checked_callbacks(self.callbacks),
            on_interrupt=choice("", "on_interrupt", self.on_interrupt, ("raise", "stop")),
            verbose=integer("", "verbose", self.verbose, at_least=0, at_most=2),
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
    def validates(self) -> bool:
        """Whether `split` gives validation data."""
        return self.validation_data is not None or self.validation_split != 0

    def split(self, x: Any, y: Any, sample_weight: Any) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any] | None]:
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
        if not hasattr(x, "shape") and not hasattr(x, "__len__"):
            x = get_backend("cpu").asarray(x)
        count = length(x)
        cut = count - round(count * fraction)
        if not 0 < cut < count:
            raise ArgumentError(f"validation_split={fraction} of {count} samples leaves one part empty.")

        def rows(part: slice) -> tuple[Any, Any, Any]:
            return _slice(x, part), _slice(y, part), _slice(sample_weight, part)

        return rows(slice(None, cut)), rows(slice(cut, None))


def checked_batch_size(batch_size: Any) -> int | None:
    """The batch size as an int, or None for all samples. Raises ArgumentError."""
    return None if batch_size is None else integer("", "batch_size", batch_size, also="None")


def choose_loss_and_metrics(model: Container, loss: Any, metrics_wanted: Any) -> tuple[Loss, list[Metric]]:
    """The loss and metrics of these names or objects. Warns if the loss does not fit the last layer."""
    chosen = losses.get(loss)
    if chosen.takes_logits and model.gives_probabilities:
        warn(
            f"{type(chosen).__name__} takes logits, but the model's outputs are probabilities: leave out its layer "
            f"{type(last_layer(model)).__name__}, which the loss includes."
        )
    return chosen, metrics.get(metrics_wanted, chosen)


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
    if isinstance(loss.class_weight, str):  # evaluate would count the classes of its own samples
        raise ArgumentError(
            f"{type(loss).__name__}: class_weight must be {{class: weight}} or a sequence of weights, not "
            f'{loss.class_weight!r}. Give fit class_weight="balanced" instead.'
        )
    class_weight = loss.class_weight if class_weight is None else class_weight
    private = model.has_custom_layers or any(is_custom(type(thing)) for thing in (loss, *measured))

    def checked(x: Any, y: Any, sample_weight: Any, names: tuple[str, str], whole: bool = False) -> Dataset:
        dataset = prepare(model, x, y, loss, sample_weight, class_weight, names, whole)
        for metric in measured:
            metric.check_targets(dataset.y, (len(dataset), *model.output_shape))
        if not measured:
            dataset.counts = None
        dataset.private = private
        return dataset

    x, y, sample_weight = as_stream(x, y, sample_weight)
    if isinstance(x, Stream):
        if isinstance(class_weight, str):
            raise ArgumentError(
                f"class_weight={class_weight!r} needs all targets in memory: count the classes of the stream, and give "
                "{class: samples / (classes * samples of the class)}."
            )
        return StreamingDataset(x, checked)
    if y is None:
        raise ArgumentTypeError(
            f"{names[1]} is missing: give targets, or as {names[0]} a datasets.Stream that includes them."
        )
    return checked(x, y, sample_weight, names, whole=True)


def _checked_callbacks(given: Any) -> list[Callback]:
    """The callbacks as a list. Raises ArgumentTypeError for other objects, and ArgumentError for unknown methods."""
    one = isinstance(given, Callback | type) or not isinstance(given, Iterable | None)
    callbacks: list[Any] = [given] if one else list(given or ())
    for callback in callbacks:
        if not isinstance(callback, Callback):
            hint = "; did you mean an object, with ()?" if isinstance(callback, type) else "."
            raise ArgumentTypeError(f"callbacks must be Callback objects, or a list of them, not {callback!r}{hint}")
        own = {name for cls in type(callback).__mro__ if cls.__module__.startswith("xpnet.") for name in vars(cls)}
        for name in dir(callback):
            if name.startswith("on_") and name not in own and callable(getattr(callback, name)):
                known = [name for name in dir(Callback) if name.startswith("on_")]
                import difflib  # here, because only errors need it

                # In other libraries a step is called a batch.
                alike = name.replace("train_batch", "step").replace("batch", "step").replace("start", "begin")
                nearest = difflib.get_close_matches(alike, known, n=1, cutoff=0.0)[0]
                raise ArgumentError(
                    f"{type(callback).__name__}: fit never calls {name}. Did you mean {nearest!r}? It calls "
                    f"{', '.join(known)}; give other methods names that do not begin with on_."
                )
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
    if getattr(a, "shape", None):
        part = slice(part.start or 0, length(a) if part.stop is None else part.stop)  # an array on disk may need both
    return a[part] if hasattr(a, "__getitem__") else get_backend("cpu").asarray(a)[part]
