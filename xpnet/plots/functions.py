"""Functions of one number: activations, and what a descent runs down."""

import math
from collections.abc import Callable
from typing import Any

import numpy
from matplotlib.axes import Axes

from xpnet import layers
from xpnet.errors import ArgumentError, ArgumentTypeError, ShapeError
from xpnet.plots.common import COLORS, axes_or_new, mark_ends, on_host, padded


def activation(layer: Any, ax: Axes | None = None, low: float = -6.0, high: float = 6.0) -> Axes:
    """An activation such as `layers.Tanh()` and its derivative, from the layer's own forward and backward.

    The layer itself is left alone: a new one with the same arguments is used, so it may stand in a model.
    """
    if not isinstance(layer, layers.Layer):
        hint = "; did you mean an object, with ()?" if isinstance(layer, type) else "."
        raise ArgumentTypeError(f"activation draws a layer such as layers.Sigmoid(), not {layer!r}{hint}")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ArgumentError(f"low must be less than high, both finite, but they are {low} and {high}.")
    z = numpy.linspace(low, high, 601)
    fresh = type(layer)(**layer.get_config())
    fresh.build(z.shape, backend="cpu", dtype="float64")
    # The second row shows whether an output depends on its own input alone.
    values = fresh.forward(numpy.stack([z, numpy.full_like(z, low)])) if not fresh.parameters else numpy.zeros((2, 1))
    if values.shape != (2, len(z)) or not numpy.allclose(values[1], values[0, 0], equal_nan=True):
        raise ArgumentError(f"{layer!r} is not a function of one number: draw one such as layers.Sigmoid().")
    values = values.copy()
    slopes: Any = fresh.backward(numpy.ones((2, len(z))))

    ax = axes_or_new(ax)
    name = type(layer).__name__
    ax.plot(z, values[0], color=COLORS[0], linewidth=2, label=repr(layer).removesuffix("()"))
    # Step has no derivative to learn by; what stands in for it must not pass for one.
    of = "what backward takes for its derivative" if isinstance(layer, layers.Step) else "its derivative"
    ax.plot(z, slopes[0], "--", color=COLORS[1], linewidth=2, label=of)
    ax.set_xlabel("z")
    ax.set_ylabel(f"{name}(z)")
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
    """The curve of a function of one number, and on it the points x (N,) of a descent, first to last.

    low, high: where the curve begins and ends; by default a little beyond the points.
    """
    way = on_host(path).astype(numpy.float64)
    if way.ndim != 1 or not len(way) or not numpy.isfinite(way).all():
        raise ShapeError(f"path must be finite numbers, shape (N,), but has shape {way.shape}.")
    around = padded(way, 0.3)
    low, high = (around[0] if low is None else low), (around[1] if high is None else high)
    if not low < high:
        raise ArgumentError(f"low must be less than high, but they are {low} and {high}.")
    curve = numpy.linspace(low, high, 400)
    ax = axes_or_new(ax)
    ax.plot(curve, [float(function(float(at))) for at in curve], color=COLORS[0], linewidth=2, label="f(x)")
    heights = numpy.array([float(function(float(at))) for at in way])
    ax.plot(way, heights, ":", color=COLORS[1], linewidth=1, marker=".", markersize=7, label="descent")
    mark_ends(ax, way, heights)
    ax.set_xlabel("x")
    ax.set_ylabel("f(x)")
    ax.grid(alpha=0.3)
    ax.legend()
    return ax
