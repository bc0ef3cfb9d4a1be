"""Check arrays from users against a model, and move them to its device, once per dataset, before training."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy

from xpnet.backends import Array, Backend, DType
from xpnet.backends.arrays import to_host
from xpnet.config import choice, fits, is_custom
from xpnet.data.dataset import Dataset
from xpnet.data.sources import HOW_TO_ENCODE, array_like
from xpnet.data.structure import Structure, in_order, items, label
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError
from xpnet.layers.containers import Container
from xpnet.layers.structure import as_tuple, one_or_tuple, shapes_of
from xpnet.losses import Loss


def prepare(
    model: Container,
    x: Any,
    y: Any,
    loss: Loss,
    sample_weight: Any = None,
    class_weight: Any = None,
    names: tuple[str, str] = ("x", "y"),
    whole: bool = True,
) -> Dataset:
    """Check a dataset against the model and the loss, and put it on the device of the model.

    With several inputs or outputs, x and y are lists or dicts of arrays, sample_weight may be one, and class_weight is
    a tuple.  names: what errors call x and y.  whole: False for a part of a dataset, in which all weights may be 0.

    Raises DataError, ShapeError or ArgumentTypeError for empty data, lengths that differ, wrong shapes, NaN and
    infinity, labels out of range, and invalid weights.
    """
    backend, dtype, structure = model.backend, model.context.dtype, structure_of(model)
    x, x_dtype = prepare_inputs(model, x, names[0])
    count, outputs = len(as_tuple(x)[0]), structure.outputs
    of_x = label(names[0], "input", structure.inputs, 0), count
    parts, shapes = [one for one, _ in loss.by_output], shapes_of(model.output_shape)
    labels = [label(names[1], "output", outputs, k) for k in range(len(outputs))]
    given = items(structure.of_outputs(y, names[1]))
    targets = [_targets(model, *of_one, of_x) for of_one in zip(given, parts, shapes, labels, strict=True)]

    counts = structure.of_weights(sample_weight)
    if isinstance(counts, tuple):
        labels = [label("sample_weight", "output", outputs, k) for k in range(len(outputs))]
        each = [_sample_weights(backend, *of_one, count, dtype, whole) for of_one in zip(counts, labels, strict=True)]
        counts = _columns(backend, each, count, "float64")
    else:
        counts = _sample_weights(backend, counts, "sample_weight", count, dtype, whole)
    weights = None if counts is None else backend.asarray(counts, dtype=dtype)
    several = len(outputs) > 1
    prefixes = [f"output {name!r}: " if several else "" for name in outputs]
    of_each = zip(class_weight if several else [class_weight], parts, targets, shapes, prefixes, strict=True)
    by_class = _columns(backend, [_class_weights(backend, *of_one, dtype) for of_one in of_each], count, dtype)
    if by_class is not None:
        if weights is not None and weights.ndim < by_class.ndim:
            weights = weights[:, None]
        weights = by_class if weights is None else weights * by_class
        if whole and float(weights.max(axis=0).min()) == 0:
            raise DataError("with class_weight, no sample has a weight above 0.")
    return Dataset(x, one_or_tuple(targets), weights, counts, x_dtype)


def structure_of(model: Container) -> Structure:
    """The names of the model's inputs and outputs."""
    return Structure(model.input_names, model.output_names)


def prepare_inputs(model: Container, x: Any, name: str = "x", finite: bool = True) -> tuple[Any, Any]:
    """(x on the model's device, the dtype that its layers take), checked. `finite` refuses NaN and infinity.

    With several inputs, x is a list or a dict of arrays, and both results are tuples.
    """
    names = model.input_names
    x = in_order(name, x, names, "input")
    if len(names) == 1:  # without what several need, since a prediction of one sample is short
        return _checked_input(model, 0, x, model.input_shape, name, finite, model.accepts_integers)
    labels = [label(name, "input", names, k) for k in range(len(names))]
    shapes, integers = model.input_shape, as_tuple(model.accepts_integers)
    pairs = [_checked_input(model, k, x[k], shapes[k], labels[k], finite, integers[k]) for k in range(len(names))]
    arrays, dtypes = zip(*pairs, strict=True)
    for array, own_name in zip(arrays, labels, strict=True):
        if len(array) != len(arrays[0]):
            raise DataError(
                f"{labels[0]} has {len(arrays[0])} samples, but {own_name} has {len(array)}. They must match."
            )
    return arrays, dtypes


def prepare_gradient(model: Container, grad_output: Any, rows: int) -> Any:
    """The gradient with respect to the outputs of `rows` samples, checked, on the model's device."""
    backend, names = model.backend, model.output_names

    def checked(k: int, given: Any, shape: tuple[int, ...]) -> Array:
        name = label("grad_output", "output", names, k)
        grad = backend.asarray(as_numbers(backend, given, name), dtype=model.context.dtype)
        if not fits(grad.shape, (rows, *shape)):
            raise ShapeError(f"{name} must have the shape of the outputs, {(rows, *shape)}, not {grad.shape}.")
        return grad

    grads = items(structure_of(model).of_outputs(grad_output, "grad_output"))
    return one_or_tuple([*map(checked, range(len(grads)), grads, shapes_of(model.output_shape))])


def _checked_input(
    model: Container, k: int, x: Any, expected: Any, name: str, finite: bool, takes_integers: bool | None
) -> tuple[Array, DType]:
    """(the array of input k, checked, on the model's device; the dtype that the layer takes)."""
    backend = model.backend
    x = as_numbers(backend, x, name)
    if x.ndim == 0 or not fits(x.shape[1:], expected):
        sizes = ", ".join("T" if n is None else str(n) for n in expected)
        hint = ""
        if x.ndim and x.shape == expected:
            hint = " For a single sample, add the batch axis: x[None]."
            if x.ndim > 1:
                hint += f" If it has {len(x)} samples, input_shape must be that of one: {tuple(x.shape[1:])}."
        elif x.ndim == 4 and (*x.shape[2:], x.shape[1]) == expected:
            hint = " Images are (N, height, width, channels), channels last: numpy.moveaxis(x, 1, -1)."
        elif x.shape[:1] == (1,) and tuple(x.shape[2:]) == expected:
            hint = " The model has one input: give the array itself, not a list of it."
        elif x.ndim > 1 and None not in expected and math.prod(x.shape[1:]) == math.prod(expected):
            hint = f" The sizes agree: reshape it, or begin the model with a layer for {tuple(x.shape[1:])}."
        raise ShapeError(f"{name} must have shape (N, {sizes}), as the model's input_shape says, but has "
                         f"{tuple(x.shape)}.{hint}")  # fmt: skip
    if x.size == 0:  # no samples, or sequences without steps
        raise DataError(f"{name} is empty: it has shape {tuple(x.shape)}.")
    if x.dtype.kind == "f":
        x = _converted(backend, x, model.context.dtype)
    if finite:
        refuse_non_finite(backend, x, name)
    model.check_input(k, x, name)
    # One memory layout for equal numbers, so that BLAS is used and gives the same result.
    x = backend.xp.ascontiguousarray(x)
    return x, x.dtype if takes_integers else model.context.dtype


def as_numbers(backend: Backend, a: Any, name: str) -> Array:
    """`a` as a numeric array on the device. Raises ArgumentTypeError for text, objects and complex numbers.

    Raises DataError for missing values in a frame.
    """
    array = a if isinstance(a, numpy.ndarray) else array_like(a, name)
    try:
        array = numpy.asarray(to_host(array)) if isinstance(array, list | tuple) else array
        kind = getattr(getattr(array, "dtype", None), "kind", "f")  # dtypes of other libraries have no kind
        if kind in "fiub":
            array = backend.asarray(array)
            kind = array.dtype.kind
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"{name} cannot be converted to an array: {error}") from error
    if kind not in "fiub":
        what = "text or objects" if kind in "OSU" else f"dtype {array.dtype}"
        hint = f"; {HOW_TO_ENCODE}" if kind in "OSU" else ", as numbers" if kind in "mM" else ""
        raise ArgumentTypeError(
            f"{name} must be an array of real numbers, but it contains {what}. Encode it first{hint}."
        )
    return array


def _targets(
    model: Container, y: Any, loss: Loss, output_shape: tuple[int, ...], name: str, of_x: tuple[str, int]
) -> Array:
    """The targets of one output, checked, on the model's device. of_x: what errors call x, and its samples."""
    backend, dtype = model.backend, model.context.dtype
    y = _numbers(backend, y, name, loss)
    if y.dtype.kind == "f":
        y = _converted(backend, y, dtype)
    if y.ndim == 0 or len(y) != of_x[1]:
        lengths = "a single number" if y.ndim == 0 else f"{len(y)} targets"
        raise DataError(f"{of_x[0]} has {of_x[1]} samples, but {name} has {lengths}. They must match.")
    refuse_non_finite(backend, y, name)
    custom = is_custom(type(loss))
    try:
        y = loss.check_targets(backend, y.copy() if custom else y, output_shape)
    except ArgumentError as error:
        of_build = isinstance(error, ShapeError) and model.has_custom_layers
        hint = " Or a build method returns a wrong shape: model.summary() shows those of all layers." * of_build
        raise type(error)(f"{name}: {error}{hint}") from error
    if custom and not (isinstance(y, backend.xp.ndarray) and y.shape[:1] == of_x[1:] and y.dtype.kind in "fiub"):
        got = f"{y.dtype} of shape {tuple(y.shape)}" if hasattr(y, "dtype") else repr(y)
        raise ArgumentTypeError(
            f"{type(loss).__name__}: check_targets must return an array of numbers with {of_x[1]} targets, not {got}."
        )
    if loss.classifies and y.ndim in (1, len(output_shape)):  # class numbers stay integers
        return y
    return backend.xp.ascontiguousarray(backend.asarray(y, dtype=dtype))


def _numbers(backend: Backend, y: Any, name: str, loss: Loss) -> Array:
    """y as an array of numbers. Raises ArgumentTypeError for class names, with the code that numbers them."""
    try:
        return as_numbers(backend, y, name)
    except ArgumentTypeError as error:
        kind = getattr(getattr(y, "dtype", None), "kind", "O" if isinstance(y, list | tuple) else "")
        with contextlib.suppress(ValueError):  # a list of lists of several lengths
            first = numpy.asarray(y, dtype=object).reshape(-1)[0] if loss.classifies and kind in "OSUT" else None
            if isinstance(first, str | bytes):
                raise ArgumentTypeError(
                    f"{error} If strings such as {first!r} are class names, number them: "
                    "classes, y = numpy.unique(y, return_inverse=True)."
                ) from error
        raise


def refuse_non_finite(backend: Backend, a: Array, name: str) -> None:
    """Raise DataError if `a` contains NaN or infinity. Reads the device."""
    if a.dtype.kind != "f" or a.size == 0:
        return
    if a.flags.c_contiguous:
        flat = a.reshape(-1)
        with numpy.errstate(over="ignore", invalid="ignore"):
            if math.isfinite(float(backend.xp.dot(flat, flat))):
                return  # takes half the time of minimum and maximum, but squares of large numbers may overflow
    if math.isfinite(float(a.min())) and math.isfinite(float(a.max())):
        return
    bad = ~backend.xp.isfinite(a.reshape(len(a), -1)).all(axis=1)
    count, first = int(bad.sum()), int(bad.argmax())
    raise DataError(
        f"{name} contains NaN or infinity, as {a.dtype}, in {count} of {len(a)} samples, first in sample {first}. "
        "Remove or replace them before training."
    )


def _converted(backend: Backend, a: Array, dtype: DType) -> Array:
    """`a` in a dtype. Values that overflow become infinite without a warning; `refuse_non_finite` finds them."""
    with numpy.errstate(over="ignore"):
        return backend.asarray(a, dtype=dtype)


def _class_weights(
    backend: Backend, class_weight: Any, loss: Loss, y: Array, output_shape: tuple[int, ...], prefix: str, dtype: DType
) -> Array | None:
    """The weight of each sample's class, (N,), for one output. prefix: of errors."""
    try:
        if isinstance(class_weight, str):
            class_weight = _balanced(backend, class_weight, loss, y, output_shape)
        if class_weight is None:
            return None
        return backend.asarray(loss.weights_by_class(backend, class_weight, y, output_shape[-1]), dtype=dtype)
    except ArgumentError as error:
        raise type(error)(f"{prefix}{error}") from error


def _columns(backend: Backend, weights: Sequence[Array | None], count: int, dtype: DType) -> Array | None:
    """(N, outputs) from weights (N,) of each output, or None for 1; those of a single output as they are."""
    if len(weights) == 1 or not any(w is not None for w in weights):
        return weights[0]
    ones = backend.xp.ones(count, dtype=dtype)
    return backend.xp.stack([ones if w is None else w for w in weights], axis=1)


def _balanced(
    backend: Backend, class_weight: str, loss: Loss, y: Array, output_shape: tuple[int, ...]
) -> dict[int, float]:
    """{class: samples / (classes · samples of the class)}, over the classes that y contains, as in scikit-learn.

    y: checked by the loss. Probabilities count as parts of samples.
    """
    choice("", "class_weight", class_weight, ["balanced"], also="{class: weight} or a sequence of weights")
    if not loss.classifies:
        raise ArgumentError(f"class_weight needs a classification loss, not {type(loss).__name__}.")
    targets, classes = backend.to_numpy(y), output_shape[-1]
    if targets.ndim == 1:
        counts = numpy.bincount(targets, minlength=classes).astype(numpy.float64)
    elif loss.decision_threshold is None:
        counts = targets.sum(axis=0, dtype=numpy.float64)
    elif classes == 1:
        yes = float(targets.sum(dtype=numpy.float64))
        counts = numpy.array([len(targets) - yes, yes])
    else:
        raise ArgumentError("class_weight needs a single yes-or-no output; with several, use sample_weight.")
    present = numpy.flatnonzero(counts > 0)
    return {int(k): float(counts.sum() / (len(present) * counts[k])) for k in present}


def _sample_weights(backend: Backend, weights: Any, name: str, count: int, dtype: DType, whole: bool) -> Array | None:
    """Weights (N,) in float64, in which metrics add them up. They must also be finite in `dtype`, that of the loss."""
    if weights is None:
        return None
    weights = as_numbers(backend, weights, name)
    if tuple(weights.shape) != (count,):
        raise ShapeError(f"{name} must have shape ({count},), one per sample, but has shape {tuple(weights.shape)}.")
    converted = _converted(backend, weights, dtype)
    refuse_non_finite(backend, converted, name)
    if float(converted.min()) < 0 or (whole and float(converted.max()) == 0):
        raise DataError(f"{name} must not be negative, and not zero for all samples.")
    return backend.asarray(weights, dtype="float64")
