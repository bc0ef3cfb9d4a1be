"""Statistics and linear maps of the columns of a matrix (rows, columns): what batch normalisation is made of.

Sums are made in float64, for a batch of images has many rows; results have the dtype of the matrix. These are the
references of the primitives of a device.
"""

from typing import Any

from xpnet.backends.arrays import Array


def moments(xp: Any, x: Array) -> tuple[Array, Array]:
    """The mean of each column, and its variance Σ (x - mean)² / rows.

    In two passes: E[x²] - E[x]² would lose the digits of a variance that is small beside the mean.
    """
    mean = _mean(xp, x)
    deviations = x - mean
    return mean, _mean(xp, xp.square(deviations, out=deviations))


def _mean(xp: Any, x: Array) -> Array:
    return xp.mean(x, axis=0, dtype=xp.float64, out=xp.empty(x.shape[1:], dtype=x.dtype))


def scale_shift(xp: Any, x: Array, scale: Array, shift: Array, out: Array) -> Array:
    """out[i, j] = x[i, j] · scale[j] + shift[j]. out may be x."""
    xp.multiply(x, scale, out=out)
    out += shift
    return out


def sum_products(xp: Any, a: Array, b: Array, center: Array, out: Array) -> Array:
    """out[j] = Σ_i a[i, j] · (b[i, j] - center[j]), which keeps the digits that a large mean of b would cost."""
    return xp.sum(a * (b - center), axis=0, dtype=xp.float64, out=out)


def combine(xp: Any, g: Array, a: Array, x: Array, b: Array, c: Array, out: Array) -> Array:
    """out[i, j] = g[i, j] · a[j] + x[i, j] · b[j] + c[j]. out overlaps neither g nor x."""
    xp.multiply(x, b, out=out)
    out += c
    out += g * a
    return out
