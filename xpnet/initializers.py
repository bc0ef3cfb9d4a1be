"""Initializers: the first values of parameters, drawn on the host in float64, the same for every device and dtype.

The last axis of a weight is its output features, the axis before it its input features; any axes before them are the
window of a convolution. So fan_in = window · inputs and fan_out = window · outputs.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy

from xpnet.backends.arrays import refuse_masked, to_host
from xpnet.config import Configured, as_shape, is_number, number, python_number, resolve
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError, shown

__all__ = ["Constant", "ForgetGate", "GlorotNormal", "GlorotUniform", "HeNormal", "HeUniform", "Initializer",
           "LecunNormal", "LecunUniform", "Normal", "Ones", "Orthogonal", "Uniform", "Zeros", "fans",
           "get"]  # fmt: skip

HostArray = numpy.ndarray[Any, numpy.dtype[numpy.float64]]


class Initializer(Configured):
    """The base of every initializer: called with (shape, generator), it returns a float64 array of that shape."""

    @abstractmethod
    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray: ...


class Constant(Initializer):
    """Every element is `value`. If `value` is an array, it must have the shape of the parameter."""

    def __init__(self, value: Any) -> None:
        _check_finite("Constant: value", "", value)
        self.value = value

    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        value = numpy.asarray(to_host(self.value), dtype=numpy.float64)
        if value.ndim and value.shape != tuple(shape):
            raise ShapeError(f"Constant: the array has shape {value.shape}, but the parameter's is {tuple(shape)}.")
        return numpy.full(shape, value)


class Zeros(Initializer):
    """Every element is 0."""

    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        return numpy.zeros(shape)


class Ones(Initializer):
    """Every element is 1."""

    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        return numpy.ones(shape)


class Uniform(Initializer):
    """Uniform in [low, high)."""

    def __init__(self, low: float = -0.05, high: float = 0.05) -> None:
        self.low = number(self, "low", low, finite=True)
        self.high = number(self, "high", high, at_least=self.low, finite=True)

    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        return rng.uniform(self.low, self.high, size=shape)


class Normal(Initializer):
    """A normal distribution with this mean and standard deviation."""

    def __init__(self, mean: float = 0.0, std: float = 0.05) -> None:
        self.mean = number(self, "mean", mean, finite=True)
        self.std = number(self, "std", std, at_least=0, finite=True)

    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        return rng.normal(self.mean, self.std, size=shape)


class _Scaled(Initializer):
    """Mean 0, and a variance that depends on the fans: `gain` / fan_in, unless a subclass says otherwise."""

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
    """Variance 2 / (fan_in + fan_out)."""

    def variance(self, shape: Sequence[int]) -> float:
        return 2.0 / sum(fans(shape))


class GlorotUniform(_Glorot, _ScaledUniform):
    """Uniform in ±√(6 / (fan_in + fan_out)). Glorot, Bengio 2010, "Understanding the difficulty of training…"."""


class GlorotNormal(_Glorot, _ScaledNormal):
    """Normal with variance 2 / (fan_in + fan_out). Glorot, Bengio 2010, "Understanding the difficulty of training…"."""


class HeUniform(_ScaledUniform):
    """Uniform in ±√(6 / fan_in), for ReLU. He et al. 2015, "Delving deep into rectifiers"."""

    gain = 2.0


class HeNormal(_ScaledNormal):
    """Normal with variance 2 / fan_in, for ReLU. He et al. 2015, "Delving deep into rectifiers"."""

    gain = 2.0


class LecunUniform(_ScaledUniform):
    """Uniform in ±√(3 / fan_in). LeCun et al. 1998, "Efficient BackProp"."""

    gain = 1.0


class LecunNormal(_ScaledNormal):
    """Normal with variance 1 / fan_in. LeCun et al. 1998, "Efficient BackProp"."""

    gain = 1.0


class Orthogonal(Initializer):
    """Orthonormal columns, or rows if these are fewer, times `gain`. Saxe et al. 2013, "Exact solutions…"."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = number(self, "gain", gain, finite=True)

    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        rows, columns = math.prod(shape[:-1]), (1, *shape)[-1]
        tall = rng.normal(size=(max(rows, columns), min(rows, columns)))
        q, r = numpy.linalg.qr(tall)
        q *= numpy.sign(numpy.diagonal(r))  # so that all orthogonal matrices are equally likely
        return self.gain * (q if rows >= columns else q.T).reshape(shape)


class ForgetGate(Initializer):
    """For the bias of an LSTM (4 · units,): `value` for the forget gate, which is the second of four, and 0 otherwise.

    Gers, Schmidhuber and Cummins 2000, "Learning to forget".
    """

    def __init__(self, value: float = 1.0) -> None:
        self.value = number(self, "value", value, finite=True)

    def __call__(self, shape: Sequence[int], rng: numpy.random.Generator) -> HostArray:
        if len(shape) != 1 or shape[0] % 4:
            raise ShapeError(f"ForgetGate: is for the bias of an LSTM, (4 · units,), not for a shape {tuple(shape)}.")
        bias = numpy.zeros((4, shape[0] // 4))
        bias[1] = self.value
        return bias.reshape(-1)


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight of this shape; a vector counts as a matrix of one row, a number as one of 1 × 1."""
    if None in (sizes := as_shape(shape)):
        raise ShapeError(f"fans: shape must be that of a weight, not {shown(shape)}.")
    *window, inputs, outputs = (1, 1, *sizes)
    return math.prod((*window, inputs)), math.prod((*window, outputs))


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
    "forget_gate": ForgetGate,
}


def get(spec: Any) -> Initializer:
    """The initializer of this name; `spec` itself if it is one; `Constant(spec)` for a number or an array."""
    if isinstance(spec, str | Initializer | type):
        return resolve("initializer", spec, _NAMES, Initializer)  # type: ignore[type-abstract]
    _check_finite("an initializer", "a name, an Initializer, ", spec)
    return Constant(spec)


def _check_finite(what: str, other_types: str, value: Any) -> None:
    """Raise ArgumentTypeError or ArgumentError unless `value` is a finite real number or an array of them.

    other_types: says in the error what else it may be.
    """
    refuse_masked(value, what)
    try:
        given = python_number(value)
        array = numpy.asarray(float(given) if is_number(given) else to_host(value))
    except OverflowError as error:
        raise ArgumentError(f"{what} must be finite, but this one is too large.") from error
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"{what} cannot be converted to an array: {error}") from error
    if array.dtype.kind not in "fiub" or isinstance(value, bool):
        given = f"an array of {array.dtype}" if array.ndim else shown(value)
        raise ArgumentTypeError(f"{what} must be {other_types}a number or an array of real numbers, not {given}.")
    if not numpy.isfinite(array).all():
        raise ArgumentError(f"{what} must be finite, but this one contains NaN or infinity.")
