"""First values of parameters, drawn on the host in float64, so that every device and dtype starts alike.

The last axis of a weight is its output features, the one before it its inputs; the axes before those are the window
of a convolution. So fan_in = window · inputs and fan_out = window · outputs.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy

from xpnet.config import Configured, resolve
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError

HostArray = numpy.ndarray[Any, numpy.dtype[numpy.float64]]


class Initializer(Configured):
    """Called with (shape, generator), returns a float64 array of that shape."""

    @abstractmethod
    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray: ...


class Constant(Initializer):
    """Every element is `value`; or, where `value` is an array, exactly that array, whose shape must fit."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        value = numpy.asarray(self.value, dtype=numpy.float64)
        if value.ndim and value.shape != tuple(shape):
            raise ShapeError(f"Constant: the array has shape {value.shape}, but the parameter's is {tuple(shape)}.")
        return numpy.full(shape, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and numpy.array_equal(self.value, other.value)


class Zeros(Initializer):
    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        return numpy.zeros(shape)


class Ones(Initializer):
    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        return numpy.ones(shape)


class Uniform(Initializer):
    """Uniform in [low, high)."""

    def __init__(self, low: float = -0.05, high: float = 0.05) -> None:
        if not low <= high:
            raise ArgumentError(f"Uniform: low must not exceed high, but low={low} and high={high}.")
        self.low, self.high = low, high

    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        return rng.uniform(self.low, self.high, size=shape)


class Normal(Initializer):
    """Gaussian with this mean and standard deviation."""

    def __init__(self, mean: float = 0.0, std: float = 0.05) -> None:
        if not std >= 0:
            raise ArgumentError(f"Normal: std must not be negative, but is {std}.")
        self.mean, self.std = mean, std

    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        return rng.normal(self.mean, self.std, size=shape)


class _Scaled(Initializer):
    """Zero mean and a variance set by the fans: `gain` / fan_in, or twice that over their sum."""

    gain: float

    def variance(self, shape: Sequence[int]) -> float:
        return self.gain / fans(shape)[0]


class _ScaledUniform(_Scaled):
    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        limit = math.sqrt(3.0 * self.variance(shape))  # a uniform on ±a has variance a²/3
        return rng.uniform(-limit, limit, size=shape)


class _ScaledNormal(_Scaled):
    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        return rng.normal(0.0, math.sqrt(self.variance(shape)), size=shape)


class _Glorot(_Scaled):
    """Variance 2 / (fan_in + fan_out). Glorot and Bengio 2010, "Understanding the difficulty of training…"."""

    def variance(self, shape: Sequence[int]) -> float:
        return 2.0 / sum(fans(shape))


class GlorotUniform(_Glorot, _ScaledUniform): ...


class GlorotNormal(_Glorot, _ScaledNormal): ...


class HeUniform(_ScaledUniform):
    """Variance 2 / fan_in, for ReLU. He et al. 2015, "Delving deep into rectifiers"."""

    gain = 2.0


class HeNormal(_ScaledNormal):
    """Variance 2 / fan_in, for ReLU. He et al. 2015, "Delving deep into rectifiers"."""

    gain = 2.0


class LecunUniform(_ScaledUniform):
    """Variance 1 / fan_in. LeCun et al. 1998, "Efficient BackProp"."""

    gain = 1.0


class LecunNormal(_ScaledNormal):
    """Variance 1 / fan_in. LeCun et al. 1998, "Efficient BackProp"."""

    gain = 1.0


class Orthogonal(Initializer):
    """Orthonormal columns (or rows, whichever are fewer) times `gain`. Saxe et al. 2013, "Exact solutions…"."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        rows, columns = math.prod(shape[:-1]), shape[-1]
        tall = rng.normal(size=(max(rows, columns), min(rows, columns)))
        q, r = numpy.linalg.qr(tall)
        q *= numpy.sign(numpy.diagonal(r))  # makes the draw uniform over orthogonal matrices
        return self.gain * (q if rows >= columns else q.T).reshape(shape)


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight of this shape; a vector counts as a matrix of one row."""
    window = math.prod(shape[:-2])
    inputs = shape[-2] if len(shape) > 1 else 1
    return max(1, window * inputs), max(1, window * shape[-1])


_NAMES: dict[str, type[Initializer]] = {
    "zeros": Zeros,
    "ones": Ones,
    "uniform": Uniform,
    "normal": Normal,
    "glorot_uniform": GlorotUniform,
    "glorot_normal": GlorotNormal,
    "he_uniform": HeUniform,
    "he_normal": HeNormal,
    "lecun_uniform": LecunUniform,
    "lecun_normal": LecunNormal,
    "orthogonal": Orthogonal,
}


def get(spec: Any) -> Initializer:
    """An initializer from its name, itself, or a number or array for `Constant`."""
    if isinstance(spec, str | Initializer | type):
        return resolve("initializer", spec, _NAMES, Initializer)  # type: ignore[type-abstract]
    if numpy.asarray(spec).dtype.kind not in "fiub":
        raise ArgumentTypeError(f"an initializer is a name, an Initializer, a number or an array, not {spec!r}.")
    return Constant(spec)
