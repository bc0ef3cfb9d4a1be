"""Compiled loops for the CPU: the formulas of sliding.py and columns.py, each in one pass over memory.

Plain serial loops, which Numba makes machine code at their first call and keeps in its cache. They release the GIL, so
the parts of a batch run side by side. Arrays are C-contiguous. Without Numba the package works by the formulas.
"""

from typing import Any

import numpy
from numba import njit

_compiled = njit(nogil=True, cache=True)


@_compiled
def patches(x: Any, strides: Any, dilation: Any, before: Any, out: Any) -> None:
    """x (N, H, W, C) → out (N, rows, columns, kh, kw, C)."""
    _, height, width, channels = x.shape
    images, rows, columns, kh, kw, _ = out.shape
    for n in range(images):
        for i in range(rows):
            for j in range(columns):
                left = j * strides[1] - before[1]
                inside = left >= 0 and left + (kw - 1) * dilation[1] < width
                for a in range(kh):
                    h = i * strides[0] + a * dilation[0] - before[0]
                    if h < 0 or h >= height:
                        for b in range(kw):
                            for c in range(channels):
                                out[n, i, j, a, b, c] = 0.0
                    else:
                        for b in range(kw):
                            w = left + b * dilation[1]
                            if inside or 0 <= w < width:
                                for c in range(channels):
                                    out[n, i, j, a, b, c] = x[n, h, w, c]
                            else:
                                for c in range(channels):
                                    out[n, i, j, a, b, c] = 0.0


@_compiled
def fold(patches: Any, strides: Any, dilation: Any, before: Any, out: Any) -> None:
    """patches (N, rows, columns, kh, kw, C) → out (N, H, W, C)."""
    _, height, width, channels = out.shape
    images, rows, columns, kh, kw, _ = patches.shape
    for n in range(images):
        out[n] = 0.0
        for i in range(rows):
            for j in range(columns):
                left = j * strides[1] - before[1]
                for a in range(kh):
                    h = i * strides[0] + a * dilation[0] - before[0]
                    if 0 <= h < height:
                        for b in range(kw):
                            w = left + b * dilation[1]
                            if 0 <= w < width:
                                for c in range(channels):
                                    out[n, h, w, c] += patches[n, i, j, a, b, c]


@_compiled
def patches_of_few_channels(x: Any, strides: Any, dilation: Any, before: Any, out: Any) -> None:
    """The same, faster where a pixel is too short for copying it to be the work: each patch gathers from a small image
    with its border of zeros, from the same distances as the first patch.
    """
    images, height, width, channels = x.shape
    _, rows, columns, kh, kw, _ = out.shape
    high = max((rows - 1) * strides[0] + (kh - 1) * dilation[0] + 1, before[0] + height)
    wide = max((columns - 1) * strides[1] + (kw - 1) * dilation[1] + 1, before[1] + width) * channels
    bordered = numpy.zeros(high * wide, x.dtype)
    size = kh * kw * channels
    distances = numpy.empty(size, numpy.int64)
    for a in range(kh):
        for b in range(kw):
            for c in range(channels):
                distances[(a * kw + b) * channels + c] = a * dilation[0] * wide + b * dilation[1] * channels + c
    pixels, flat = x.reshape(-1), out.reshape(-1)
    for n in range(images):
        for h in range(height):
            start, source = (h + before[0]) * wide + before[1] * channels, (n * height + h) * width * channels
            bordered[start : start + width * channels] = pixels[source : source + width * channels]
        for i in range(rows):
            for j in range(columns):
                corner = i * strides[0] * wide + j * strides[1] * channels
                end = ((n * rows + i) * columns + j) * size
                for k in range(size):
                    flat[end + k] = bordered[corner + distances[k]]


@_compiled
def max_pool(x: Any, strides: Any, kernel: Any, before: Any, out: Any, choice: Any) -> None:
    """x (N, H, W, C) → out and choice (N, rows, columns, C)."""
    _, height, width, _ = x.shape
    images, rows, columns, channels = out.shape
    kh, kw = kernel
    for n in range(images):
        for i in range(rows):
            for j in range(columns):
                fresh = True
                for a in range(kh):
                    h = i * strides[0] + a - before[0]
                    if h < 0 or h >= height:
                        continue
                    for b in range(kw):
                        w = j * strides[1] + b - before[1]
                        if w < 0 or w >= width:
                            continue
                        cell = a * kw + b
                        for c in range(channels):
                            pixel, best, chosen = x[n, h, w, c], out[n, i, j, c], choice[n, i, j, c]
                            wins = fresh | ((not pixel <= best) & (best == best))  # NaN over all; of equals the first
                            out[n, i, j, c] = pixel if wins else best
                            choice[n, i, j, c] = cell if wins else chosen
                        fresh = False


@_compiled
def max_pool_2x2(x: Any, out: Any, choice: Any) -> None:
    """The same for windows of 2 × 2 side by side, without branches."""
    images, rows, columns, channels = out.shape
    for n in range(images):
        for i in range(rows):
            for j in range(columns):
                p0, p1 = x[n, 2 * i, 2 * j], x[n, 2 * i, 2 * j + 1]
                p2, p3 = x[n, 2 * i + 1, 2 * j], x[n, 2 * i + 1, 2 * j + 1]
                largest, chosen = out[n, i, j], choice[n, i, j]
                for c in range(channels):
                    best, cell = p3[c], 3
                    if (p2[c] >= best) | (p2[c] != p2[c]):
                        best, cell = p2[c], 2
                    if (p1[c] >= best) | (p1[c] != p1[c]):
                        best, cell = p1[c], 1
                    if (p0[c] >= best) | (p0[c] != p0[c]):
                        best, cell = p0[c], 0
                    largest[c], chosen[c] = best, cell


@_compiled
def unpool_max(grad: Any, choice: Any, strides: Any, kernel: Any, before: Any, out: Any) -> None:
    """grad and choice (N, rows, columns, C) → out (N, H, W, C)."""
    _, height, width, _ = out.shape
    images, rows, columns, channels = grad.shape
    kh, kw = kernel
    zero = out.dtype.type(0)
    for n in range(images):
        out[n] = zero
        for i in range(rows):
            for j in range(columns):
                for a in range(kh):
                    h = i * strides[0] + a - before[0]
                    if h < 0 or h >= height:
                        continue
                    for b in range(kw):
                        w = j * strides[1] + b - before[1]
                        if w < 0 or w >= width:
                            continue
                        cell = a * kw + b
                        for c in range(channels):
                            value, chosen = grad[n, i, j, c], choice[n, i, j, c]
                            out[n, h, w, c] += value if chosen == cell else zero


@_compiled
def relu(x: Any, out: Any) -> None:
    """max(x, 0), for flat arrays."""
    zero = out.dtype.type(0)
    for i in range(x.size):
        value = x[i]
        out[i] = zero if value <= zero else value


@_compiled
def relu_grad(grad: Any, y: Any, out: Any) -> None:
    """grad where y ≠ 0, else 0, for flat arrays."""
    zero = out.dtype.type(0)
    for i in range(grad.size):
        value, after = grad[i], y[i]
        out[i] = value if after != zero else zero


@_compiled
def add_to_rows(a: Any, row: Any) -> None:
    """a (rows, columns) += row (columns,)."""
    rows, columns = a.shape
    for i in range(rows):
        for j in range(columns):
            a[i, j] += row[j]


@_compiled
def sum_columns(x: Any, sums: Any) -> None:
    """sums (columns,) in float64 += Σ_rows x."""
    rows, columns = x.shape
    for i in range(rows):
        for j in range(columns):
            sums[j] += x[i, j]


@_compiled
def sum_powers(x: Any, shift: Any, sums: Any) -> None:
    """sums (2, columns) in float64 += Σ_rows (x - shift) and Σ_rows (x - shift)²."""
    rows, columns = x.shape
    for i in range(rows):
        for j in range(columns):
            deviation = sums.dtype.type(x[i, j]) - shift[j]
            sums[0, j] += deviation
            sums[1, j] += deviation * deviation


@_compiled
def sum_products(a: Any, b: Any, center: Any, sums: Any) -> None:
    """sums (columns,) in float64 += Σ_rows a · (b - center)."""
    rows, columns = a.shape
    for i in range(rows):
        for j in range(columns):
            sums[j] += a[i, j] * (b[i, j] - center[j])


@_compiled
def scale_shift(x: Any, scale: Any, shift: Any, out: Any) -> None:
    """out = x · scale + shift by column."""
    rows, columns = x.shape
    for i in range(rows):
        for j in range(columns):
            out[i, j] = x[i, j] * scale[j] + shift[j]


@_compiled
def combine(g: Any, a: Any, x: Any, b: Any, c: Any, out: Any) -> None:
    """out = g · a + x · b + c by column."""
    rows, columns = g.shape
    for i in range(rows):
        for j in range(columns):
            out[i, j] = g[i, j] * a[j] + x[i, j] * b[j] + c[j]
