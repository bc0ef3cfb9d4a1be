"""Plots of functions of one variable: activations, and gradient descent on a curve."""

from collections.abc import Callable
from typing import Any

import numpy
from matplotlib.axes import Axes

from xpnet import layers
from xpnet.config import number, python_number
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError, shown
from xpnet.plots.common import COLORS, axes_or_new, mark_ends, numbers_of, padded


def activation(layer: Any, ax: Axes | None = None, low: float = -6.0, high: float = 6.0) -> Axes:
    """An activation such as `layers.Tanh()` and its derivative, computed by the layer's forward and backward.

    The layer may belong to a model: the plot uses a new layer with the same arguments. low, high: the limits of the
    z axis. Raises ArgumentError for a layer that is not an elementwise function, or has parameters.
    """
    if not isinstance(layer, layers.Layer):
        hint = "; did you mean an object, with ()?" if isinstance(layer, type) else "."
        raise ArgumentTypeError(f"layer must be an activation such as layers.Sigmoid(), not {layer!r}{hint}")
    low, high = _limits(low, high)
    z = numpy.linspace(low, high, 601)
    fresh = type(layer)(**layer.get_config())
    fresh.build(z.shape, backend="cpu", dtype="float64")
    # The second row is constant, and shows whether each output depends only on its own input.
    values = fresh.forward(numpy.stack([z, numpy.full_like(z, low)])) if not fresh.parameters else numpy.zeros((2, 1))
    if values.shape != (2, len(z)) or not numpy.allclose(values[1], values[0, 0], equal_nan=True):
        raise ArgumentError(f"layer must be a function of one number, such as layers.Sigmoid(), not {layer!r}.")
    values = values.copy()
    slopes: Any = fresh.backward(numpy.ones((2, len(z))))

    ax = axes_or_new(ax)
    ax.plot(z, values[0], color=COLORS[0], linewidth=2, label=repr(layer).removesuffix("()"))
    # The derivative of Step is 0, so its backward uses another function.
    label = "surrogate derivative" if isinstance(layer, layers.Step) else "derivative"
    ax.plot(z, slopes[0], "--", color=COLORS[1], linewidth=2, label=label)
    ax.set(xlabel="z", ylabel=f"{type(layer).__name__}(z)")
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def descent(
    function: Callable[[float], Any],
    path: Any,
    ax: Axes | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Axes:
    """The curve of a function of one number, with the steps of gradient descent on it.

    path: the values of x during the descent, (N,).  low, high: the limits of the x axis, by default just beyond path.
    """
    if not callable(function):
        raise ArgumentTypeError(f"function must be a function of one number, not {shown(function)}.")
    points = numbers_of(path, "path")
    if points.ndim != 1 or not len(points) or not numpy.isfinite(points).all():
        raise ShapeError(f"path must be finite numbers of shape (N,), not {points.shape}.")
    default_low, default_high = padded(points, 0.3)
    low, high = _limits(default_low if low is None else low, default_high if high is None else high)
    x = numpy.linspace(low, high, 400)
    ax = axes_or_new(ax)
    ax.plot(x, [_value(function, value) for value in x], color=COLORS[0], linewidth=2, label="f(x)")
    heights = numpy.array([_value(function, value) for value in points])
    ax.plot(points, heights, ":", color=COLORS[1], linewidth=1, marker=".", markersize=7, label="descent")
    mark_ends(ax, points, heights)
    ax.set(xlabel="x", ylabel="f(x)")
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def _value(function: Callable[[float], Any], x: Any) -> float:
    given = function(float(x))
    value = python_number(given)
    if not isinstance(value, int | float):
        raise ArgumentTypeError(f"function must return a number, not {shown(given)}.")
    return float(value)


def _limits(low: Any, high: Any) -> tuple[float, float]:
    low = number("", "low", low, finite=True)
    return float(low), float(number("", "high", high, above=low, finite=True))
