"""Attribution: what a trained model looks at, by gradients, occlusion, Grad-CAM and activation maximization; and PCA.

All functions work on a copy of the model, in inference mode as `predict`: dropout is off and BatchNorm normalizes by
its running statistics. The model itself does not change, and may be trained by `fit` in another thread meanwhile.

The score of a class is the output of the model for it. If the last layer is Softmax, LogSoftmax or Sigmoid, it is the
input of this layer: probabilities near 0 or 1 hardly change, and that of a class depends on the scores of all others.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from xpnet.backends import Array as DeviceArray
from xpnet.config import (
    as_seed,
    explain_arguments,
    fits,
    flag,
    integer,
    is_integer,
    items_of,
    number,
    one_or_pair,
    real_array,
)
from xpnet.errors import ArgumentError, DataError, ShapeError, StateError, module_attributes, shape_text, shown
from xpnet.layers.base import Layer
from xpnet.layers.structure import first_of, mapped
from xpnet.model import Model, Sequential
from xpnet.parameters import Parameter
from xpnet.training.device_memory import explaining_memory_errors_of, samples_of
from xpnet.training.probe import ROWS, Probe

__all__ = ["PrincipalComponents", "grad_cam", "maximize_activation", "occlusion", "principal_components", "saliency"]

if not TYPE_CHECKING:  # a type checker that sees __getattr__ accepts every name, misspelled ones too
    __getattr__, __dir__ = module_attributes(__name__, __all__)

Array = numpy.ndarray[Any, Any]


@explain_arguments
def saliency(model: Sequential | Model, x: Any, target: Any = None, *, as_device: bool = False) -> Any:
    """The gradient of the score of a class with respect to the inputs x (N, *input_shape), in the shape of x.

    target: the class, an integer for all samples or one for each (N,). None is the class with the largest score of each
    sample. A model with one output has one score, so None.

    Returns a NumPy array on the host, or an array of `backend.xp` on the model's device if as_device=True. With several
    inputs, x is a list or a dict, as in `predict`, and the result is a list.

    Integers have no gradient. If layers.Embedding reads them, the result has, for each token, the norm of the gradient
    with respect to its vector; with several inputs, an input of integers has None.

    Simonyan, Vedaldi and Zisserman 2014, "Deep inside convolutional networks". Raises StateError for a model that is
    not built; ArgumentError for one without scores (N, K), or whose integers are read by other layers; and ShapeError,
    DataError, ArgumentError or ArgumentTypeError for x or a target that do not fit.
    """
    as_device = flag("saliency", "as_device", as_device)
    probe = Probe("saliency", model, several=True)
    backend = model.backend
    with explaining_memory_errors_of(model, samples_of(x) or 1), backend.device():
        arrays = probe.inputs(x)
        several = isinstance(arrays, tuple)
        targets = probe.targets(target, len(first_of(arrays)))
        token_norms = probe.watch_tokens() if probe.embeds and not several else None
        parts = []
        for rows, classes in _batches(arrays, targets):
            found = probe.gradient(rows, classes)
            found = found if token_norms is None else token_norms()
            if found is None:
                raise probe.no_gradient()
            parts.append(
                [
                    grad if as_device or grad is None else numpy.array(backend.to_numpy(grad))
                    for grad in (found if several else [found])
                ]
            )
        join = probe.xp.concatenate if as_device else numpy.concatenate
        columns = [None if column[0] is None else join(column) for column in zip(*parts, strict=True)]
    return columns if several else columns[0]


@explain_arguments
def occlusion(
    model: Sequential | Model, x: Any, target: Any = None, *, size: int | Sequence[int | None],
    stride: int | Sequence[int | None] | None = None, value: float = 0.0,
) -> Array:  # fmt: skip
    """At each position of the input x, by how much the score of a class falls if a patch there is replaced by `value`.

    x: images (N, H, W, channels), with a result (N, H, W): patches of `size` pixels, or (height, width), in all
        channels.  Images (N, H, W): a size (height, width).  Sequences (N, T, features), with a result (N, T): a size
        (steps, None), all features of these steps.  Other inputs (N, features), and tokens of an Embedding (N, T), with
        a result of that shape: `size` features or tokens.
    target: as in `saliency`.  stride: from one patch to the next, by default `size`, and at most that. Where patches
        overlap, the result is the mean over them.  value: for tokens, the token that takes their place.

    Where the result is above 0, the input raises the score. Each patch needs one prediction per sample; these are
    computed in batches, so that memory does not grow with their number.

    Zeiler and Fergus 2014, "Visualizing and understanding convolutional networks". Raises the errors of `saliency`, and
    ArgumentError for a size or a stride that does not fit.
    """
    probe = Probe("occlusion", model)
    with explaining_memory_errors_of(model, samples_of(x) or 1), model.backend.device():
        arrays = probe.inputs(x)
        count, lengths = len(arrays), _lengths_to_cover(arrays.shape[1:], size)
        sizes = _one_per_axis("size", size, lengths)
        strides = sizes if stride is None else _one_per_axis("stride", stride, sizes)
        value = _replacement(probe, arrays, value)
        targets = probe.targets(target, count)
        scores = numpy.concatenate([probe.scores(rows) for rows, _ in _batches(arrays, None)])
        classes = scores.argmax(axis=1) if targets is None else targets
        scores = scores[numpy.arange(count), classes].astype(numpy.float64)
        windows = _windows(lengths, sizes, strides)
        falls, covered = numpy.zeros((count, *lengths)), numpy.zeros(lengths)
        for start in range(0, len(windows) * count, ROWS):
            numbers = numpy.arange(start, min(start + ROWS, len(windows) * count))
            samples: Any = numbers % count
            replaced = arrays[model.backend.asarray(samples)]
            parts = []  # the rows of each window
            for k in range(int(numbers[0]) // count, int(numbers[-1]) // count + 1):
                rows = slice(max(k * count - start, 0), min((k + 1) * count - start, len(numbers)))
                replaced[(rows, *windows[k])] = value
                parts.append((rows, windows[k]))
            changed = probe.scores(replaced)[numpy.arange(len(numbers)), classes[samples]]
            fall = (scores[samples] - changed).reshape(-1, *[1] * len(lengths))
            for rows, window in parts:
                falls[(samples[rows], *window)] += fall[rows]
        for window in windows:
            covered[window] += 1.0
    return (falls / covered).astype(model.dtype)


@explain_arguments
def grad_cam(model: Sequential | Model, x: Any, target: Any = None, layer: Layer | str | int | None = None) -> Array:
    """Maps (N, H, W) of the regions of images x (N, H, W, channels) that raise the score of a class.

    With the outputs A (N, h, w, filters) of a layer, a map is ReLU(Σ_k a_k A_k), where a_k is the mean of
    ∂score/∂A_k over all positions. It is then interpolated bilinearly to the height and width of x, and not scaled.
    Images may also be (N, H, W), if the model adds the channels.

    target: as in `saliency`.  layer: the layer, its name or its position; by default the last convolution, or, if it is
        in a Residual, this block.

    Selvaraju et al. 2017, "Grad-CAM: Visual explanations from deep networks via gradient-based localization". Raises
    the errors of `saliency`, ArgumentError or PositionError for a layer that is not in the model, and ShapeError for
    one whose outputs are not (N, h, w, filters).
    """
    probe = Probe("grad_cam", model)
    seen = probe.watch(layer)
    shape: Any = seen.layer.output_shape
    if isinstance(shape, list) or len(shape) != 3:
        raise ShapeError(
            f"grad_cam: needs a layer with outputs (N, h, w, filters), but those of {seen.layer._label} are "
            f"{shape_text(shape)}."
        )
    if len(model.input_shape) not in (2, 3):
        raise ShapeError(
            f"grad_cam: needs a model of images (N, H, W, channels) or (N, H, W), not {shape_text(model.input_shape)}. "
            "Begin the model with the layer after the one that makes them images."
        )
    with explaining_memory_errors_of(model, samples_of(x) or 1), model.backend.device():
        arrays = probe.inputs(x)
        height, width = arrays.shape[1:3]
        rows_to, columns_to = _interpolation(shape[0], height), _interpolation(shape[1], width)
        maps = []
        for rows, classes in _batches(arrays, probe.targets(target, len(arrays))):
            probe.gradient(rows, classes)
            weights = seen.gradient.mean(axis=(1, 2), keepdims=True)
            small = probe.xp.maximum((seen.output * weights).sum(axis=-1), 0.0)
            maps.append(rows_to @ model.backend.to_numpy(small) @ columns_to.T)
    return numpy.concatenate(maps).astype(model.dtype)


@explain_arguments
def maximize_activation(
    model: Sequential | Model, target: Any, layer: Layer | str | int | None = None, *, steps: int = 200,
    rate: float = 0.05, decay: float = 0.05, limits: Sequence[float] | None = None, start: Any = None,
    seed: int | None = 0,
) -> Array:  # fmt: skip
    """Inputs (N, *input_shape) that maximize the score of a class, found by gradient ascent from noise.

    target: the class; with several (N,), one input is made for each.  layer: a layer, its name or its position. Then
        the activation of its unit or filter `target` is maximized instead: its output, or the mean of that over all
        positions or steps.
    steps, rate: each step changes the input by about `rate` in the direction of the gradient, x += rate · g/√mean(g²).
    decay: after each step, the input is multiplied by 1 - decay. This shrinks values with small gradients, and keeps
        the input near rate / decay; without it, the input grows with every step.  limits: (low, high), to which it is
        clipped.
    start: the first input, of shape input_shape, or one for each target. None is Gaussian noise with mean 0 and
        standard deviation `rate`.  seed: of the noise, which is the same on every device. None draws new noise in each
        call.

    Erhan et al. 2009, "Visualizing higher-layer features of a deep network"; the decay is that of Yosinski et al. 2015,
    "Understanding neural networks through deep visualization". Raises the errors of `saliency`; ArgumentError for
    inputs that are integers, or arguments out of range; and StateError if the inputs become NaN or infinite.
    """
    name = "maximize_activation"
    steps, rate = integer(name, "steps", steps), number(name, "rate", rate, above=0, finite=True)
    decay = number(name, "decay", decay, at_least=0, below=1)
    seed = None if seed is None else as_seed(name, seed, also="None")
    low, high = _limits(limits)
    probe = Probe(name, model)
    if probe.embeds:
        raise probe.no_gradient()
    seen, count = None, probe.classes
    if layer is not None:
        seen = probe.watch(layer)
        shape: Any = seen.layer.output_shape
        if isinstance(shape, list):
            raise ShapeError(f"{name}: needs a layer with one output, but {seen.layer._label} has {len(shape)}.")
        count = shape[-1] if shape else 1
    units = probe.units([target] if is_integer(target) else target, count)
    if units.ndim != 1:
        raise ShapeError(f"{name}: target must be one unit or several (N,), but has shape {units.shape}.")
    with explaining_memory_errors_of(model, len(units)), model.backend.device():
        x = probe.inputs(_first_inputs(model.input_shape, len(units), start, rate, seed))
        x = x if low is None else probe.xp.clip(x, low, high)
        if seen is not None:
            seen.units = model.backend.asarray(units)
        for _ in range(steps):
            grad = probe.gradient(x, units)
            size = probe.xp.sqrt((grad * grad).mean(axis=tuple(range(1, grad.ndim)), keepdims=True))
            x = (x + grad * (rate / probe.xp.maximum(size, 1e-30))) * (1.0 - decay)
            x = x if low is None else probe.xp.clip(x, low, high)
        result = numpy.array(model.backend.to_numpy(x))
    if not numpy.isfinite(result).all():
        raise StateError(f"{name}: the inputs became NaN or infinite. The weights may be so, or choose a smaller rate.")
    return result


class PrincipalComponents(NamedTuple):
    """What `principal_components` returns, for values of N samples and F features: float64, on the host.

    points: (N, n), the coordinates along the components.  components: (n, F), orthonormal rows.  mean: (F,).
    explained: (n,), the fraction of the variance along each.  `points @ components + mean` approximates the values.
    """

    points: Array
    components: Array
    mean: Array
    explained: Array


@explain_arguments
def principal_components(values: Any, n: int = 2) -> PrincipalComponents:
    """Principal component analysis: the n directions in which the values (N, ...) vary most.

    values: those of each sample, such as an output of `model.activations(x)`; or of each word, the weight of an
        Embedding. Further axes count as features.  n: at most N and the number of features.

    The sign of each component is chosen so that its element of largest absolute value is positive. Pearson
    1901, "On lines and planes of closest fit to systems of points in space". Raises DataError for fewer than two
    samples, NaN or infinity, and ArgumentError for an n out of range.
    """
    array = real_array(values.value if isinstance(values, Parameter) else values, "principal_components: values")
    if array.ndim < 2 or len(array) < 2 or not array.size:
        raise DataError(
            f"principal_components: values must have two or more samples (N, ...), but have shape {array.shape}."
        )
    rows = array.reshape(len(array), -1).astype(numpy.float64)
    if not numpy.isfinite(rows).all():
        raise DataError("principal_components: values contain NaN or infinity.")
    n = integer("principal_components", "n", n, at_most=min(rows.shape))
    mean = rows.mean(axis=0)
    _, lengths, components = numpy.linalg.svd(rows - mean, full_matrices=False)
    components = components[:n]
    largest = abs(components).argmax(axis=1)
    components = components * numpy.where(components[numpy.arange(n), largest] < 0, -1.0, 1.0)[:, None]
    variances = lengths**2
    total = float(variances.sum())
    explained = variances[:n] / total if total else numpy.zeros(n)
    return PrincipalComponents((rows - mean) @ components.T, components, mean, explained)


def _batches(arrays: Any, targets: Any) -> Iterator[tuple[Any, Any]]:
    """(the arrays, the targets) of ROWS samples at a time; targets may be None."""
    for start in range(0, len(first_of(arrays)), ROWS):
        rows = slice(start, start + ROWS)
        yield mapped(lambda a, rows=rows: a[rows], arrays), None if targets is None else targets[rows]


def _lengths_to_cover(shape: Sequence[int], size: Any) -> tuple[int, ...]:
    """The lengths of the axes along which patches of this size are placed."""
    items = items_of(size)
    if len(shape) == 2 and (items is None or len(items) != 2):
        raise ArgumentError(
            f"occlusion: for inputs {shape_text(tuple(shape))}, size must be (height, width) if they are images, or "
            f"(steps, None) if they are sequences, not {shown(size)}."
        )
    if len(shape) not in (1, 2, 3):
        raise ShapeError(f"occlusion: cannot replace parts of inputs {shape_text(tuple(shape))}.")
    steps_only = len(shape) == 2 and items is not None and items[1] is None
    return tuple(shape[:1] if steps_only else shape[:2])


def _one_per_axis(name: str, given: Any, limits: tuple[int, ...]) -> tuple[int, ...]:
    """A size or a stride for each axis, at most these. Raises ArgumentError for others."""
    items = items_of(given)
    if len(limits) == 1 and items is not None and len(items) == 2 and items[1] is None:
        given = items[0]
    checked = one_or_pair(integer, "occlusion", name, given) if len(limits) == 2 else integer("occlusion", name, given)
    each = checked if isinstance(checked, tuple) else (checked,) * len(limits)
    if any(one > limit for one, limit in zip(each, limits, strict=True)):
        what = "the lengths of the axes" if name == "size" else "the size"
        raise ArgumentError(f"occlusion: {name} must be at most {what}, {shown(limits)}, not {shown(given)}.")
    return each


def _replacement(probe: Probe, arrays: DeviceArray, value: Any) -> float:
    """The value of what is replaced. Raises ArgumentError or DataError for one that the model does not take."""
    if arrays.dtype.kind == "f":
        return number("occlusion", "value", value, finite=True)
    token = integer("occlusion", "value", value, at_least=None)
    probe.model.check_input(0, probe.model.backend.asarray([[token]]), "value")
    return token


def _windows(lengths: Sequence[int], sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[slice, ...]]:
    """The patches that cover all positions; the last ones end with the axis."""
    windows: list[tuple[slice, ...]] = [()]
    for length, size, stride in zip(lengths, sizes, strides, strict=True):
        starts = [start for start in range(0, length, stride) if not start or start - stride + size < length]
        parts = [slice(start, min(start + size, length)) for start in starts]
        windows = [(*window, part) for window in windows for part in parts]
    return windows


def _interpolation(before: int, after: int) -> Array:
    """The matrix (after, before) of linear interpolation between pixel centers; the edge values are repeated."""
    places = ((numpy.arange(after) + 0.5) * before / after - 0.5).clip(0.0, before - 1.0)
    weights: Array = numpy.maximum(1.0 - abs(places[:, None] - numpy.arange(before)), 0.0)
    return weights


def _limits(limits: Any) -> tuple[Any, Any]:
    if limits is None:
        return None, None
    items = items_of(limits)
    if items is None or len(items) != 2:
        raise ArgumentError(f"maximize_activation: limits must be (low, high) or None, not {shown(limits)}.")
    low = number("maximize_activation", "limits: low", items[0], finite=True)
    return low, number("maximize_activation", "limits: high", items[1], above=low, finite=True)


def _first_inputs(shape: Any, count: int, start: Any, deviation: float, seed: int | None) -> Array:
    if start is None:
        if None in shape:
            raise ArgumentError(
                f"maximize_activation: the inputs {shape_text(shape)} have any number of steps. Give start=, the first "
                "input."
            )
        return numpy.random.default_rng(seed).normal(0.0, deviation, (count, *shape))
    array: Array = real_array(start, "maximize_activation: start")
    array = numpy.repeat(array[None], count, axis=0) if array.ndim == len(shape) else array
    if array.shape[:1] != (count,) or not fits(array.shape[1:], shape):
        raise ShapeError(
            f"maximize_activation: start must be one input, or one for each of the {count} targets "
            f"{shape_text(shape)}, but has shape {numpy.shape(start)}."
        )
    return array
