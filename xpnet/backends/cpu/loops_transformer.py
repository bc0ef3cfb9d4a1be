"""Compiled loops of transformers: the softmax of attention, normalization of rows, GELU.

Sums and maxima of a row are those of `_LANES` interleaved parts, which the compiler turns into vector instructions.
Exponentials are NumPy's, between two loops.
"""

from typing import Any

import numpy

from xpnet.backends.cpu.compiling import compiled

_LANES = 16


@compiled
def _sum(row: Any, lanes: Any) -> Any:
    """Σ row."""
    whole = row.size - row.size % _LANES
    lanes[:] = 0
    for start in range(0, whole, _LANES):
        for j in range(_LANES):
            lanes[j] += row[start + j]
    total = lanes[0]
    for j in range(1, _LANES):
        total += lanes[j]
    for j in range(whole, row.size):
        total += row[j]
    return total


@compiled
def _dot(a: Any, b: Any, lanes: Any) -> Any:
    """Σ a · b."""
    whole = a.size - a.size % _LANES
    lanes[:] = 0
    for start in range(0, whole, _LANES):
        for j in range(_LANES):
            lanes[j] += a[start + j] * b[start + j]
    total = lanes[0]
    for j in range(1, _LANES):
        total += lanes[j]
    for j in range(whole, a.size):
        total += a[j] * b[j]
    return total


@compiled
def _largest(row: Any, lanes: Any, lowest: Any) -> Any:
    """The largest element, at least `lowest`. NaN does not count."""
    whole = row.size - row.size % _LANES
    lanes[:] = lowest
    for start in range(0, whole, _LANES):
        for j in range(_LANES):
            value = row[start + j]
            lanes[j] = value if value > lanes[j] else lanes[j]
    largest = lanes[0]
    for j in range(1, _LANES):
        largest = lanes[j] if lanes[j] > largest else largest
    for j in range(whole, row.size):
        largest = row[j] if row[j] > largest else largest
    return largest


# Attention: scores (N, H, queries, keys) of a block of queries, the first of which is query `first` of T. A query
# attends to the keys before `end` = its number + 1 + `past`; for attention that is not causal, `past` is large.


@compiled
def _hide(row: Any, end: int, mask: Any, n: int) -> None:
    """Set the scores of keys that are not attended to to -∞. mask (N, keys), or (0, 0) if all keys count."""
    for s in range(max(end, 0), row.size):
        row[s] = -numpy.inf
    if mask.size:
        for s in range(row.size):
            if not mask[n, s]:
                row[s] = -numpy.inf


@compiled
def attention_scores(scores: Any, scale: Any, past: int, first: int, mask: Any, log_sums: Any) -> None:
    """Scale the scores, and subtract the largest of each query, which goes into log_sums (N, H, T)."""
    samples, heads, queries, keys = scores.shape
    lanes = numpy.empty(_LANES, scores.dtype)
    lowest = numpy.finfo(scores.dtype).min
    for n in range(samples):
        for h in range(heads):
            for i in range(queries):
                row = scores[n, h, i]
                for s in range(keys):
                    row[s] *= scale
                _hide(row, first + i + 1 + past, mask, n)
                highest = _largest(row, lanes, lowest)
                log_sums[n, h, first + i] = highest
                for s in range(keys):
                    row[s] -= highest


@compiled
def attention_probabilities(scores: Any, first: int, log_sums: Any) -> None:
    """Divide the exponentials of the scores by their sum, whose logarithm is added to log_sums."""
    samples, heads, queries, keys = scores.shape
    lanes = numpy.empty(_LANES, scores.dtype)
    zero, one = scores.dtype.type(0), scores.dtype.type(1)
    for n in range(samples):
        for h in range(heads):
            for i in range(queries):
                row = scores[n, h, i]
                total = _sum(row, lanes)
                if total == zero:
                    log_sums[n, h, first + i] = numpy.inf
                    continue
                log_sums[n, h, first + i] += numpy.log(total)
                inverse = one / total
                for s in range(keys):
                    row[s] *= inverse


@compiled
def attention_scores_again(scores: Any, scale: Any, past: int, first: int, mask: Any, log_sums: Any) -> None:
    """Scale the scores, and subtract log_sums."""
    samples, heads, queries, keys = scores.shape
    for n in range(samples):
        for h in range(heads):
            for i in range(queries):
                row, log_sum = scores[n, h, i], log_sums[n, h, first + i]
                for s in range(keys):
                    row[s] = row[s] * scale - log_sum
                _hide(row, first + i + 1 + past, mask, n)


@compiled
def attention_score_grads(p: Any, scale: Any, grads: Any) -> None:
    """grads = p · (grads - Σ p · grads) · scale, for each query; grads holds the gradients of the probabilities p."""
    samples, heads, queries, keys = p.shape
    lanes = numpy.empty(_LANES, p.dtype)
    for n in range(samples):
        for h in range(heads):
            for i in range(queries):
                row, g = p[n, h, i], grads[n, h, i]
                mean = _dot(row, g, lanes)
                for s in range(keys):
                    g[s] = row[s] * (g[s] - mean) * scale


# Normalization of rows.


@compiled
def normalize_and_scale(
    x: Any, centered: bool, epsilon: Any, gamma: Any, beta: Any, normal: Any, sigma: Any, out: Any
) -> None:
    """gamma, beta (columns,), or (0,) for none."""
    rows, columns = x.shape
    lanes = numpy.empty(_LANES, x.dtype)
    count, zero, one = x.dtype.type(columns), x.dtype.type(0), x.dtype.type(1)
    for i in range(rows):
        values, result, y = x[i], normal[i], out[i]
        shift = values[0] if centered else zero  # the rounded mean of large equal numbers can differ from them
        for j in range(columns):
            result[j] = values[j] - shift
        if centered:
            mean = _sum(result, lanes) / count
            for j in range(columns):
                result[j] -= mean
        deviation = numpy.sqrt(_dot(result, result, lanes) / count + epsilon)
        sigma[i, 0] = deviation
        inverse = one / deviation
        for j in range(columns):
            result[j] *= inverse
        if gamma.size:
            for j in range(columns):
                y[j] = result[j] * gamma[j]
        else:
            for j in range(columns):
                y[j] = result[j]
        if beta.size:
            for j in range(columns):
                y[j] += beta[j]


@compiled
def normalize_and_scale_grad(
    grad: Any, centered: bool, gamma: Any, normal: Any, sigma: Any, sums: Any, out: Any
) -> None:
    """sums (2, columns) += Σ_rows grad · normal and Σ_rows grad, in float64.  out: (0, 0) if it is not wanted."""
    rows, columns = grad.shape
    lanes = numpy.empty(_LANES, grad.dtype)
    products, totals = numpy.empty(columns, grad.dtype), numpy.empty(columns, grad.dtype)
    h = numpy.empty(columns, grad.dtype)
    count, one = grad.dtype.type(columns), grad.dtype.type(1)
    for start in range(0, rows, 64):
        products[:] = 0
        totals[:] = 0
        for i in range(start, min(start + 64, rows)):
            g, x = grad[i], normal[i]
            for j in range(columns):
                products[j] += g[j] * x[j]
                totals[j] += g[j]
            if not out.size:
                continue
            y, inverse = out[i], one / sigma[i, 0]
            if gamma.size:
                for j in range(columns):
                    h[j] = g[j] * gamma[j]
            else:
                for j in range(columns):
                    h[j] = g[j]
            if centered:
                first = h[0]  # as in normalize_and_scale
                for j in range(columns):
                    h[j] -= first
                mean = _sum(h, lanes) / count
                for j in range(columns):
                    h[j] -= mean
            mean_product = _dot(h, x, lanes) / count
            for j in range(columns):
                y[j] = (h[j] - x[j] * mean_product) * inverse
        for j in range(columns):
            sums[0, j] += products[j]
            sums[1, j] += totals[j]


# GELU in float32.

#: erfc(z) e^(z²) = t · Σ c_k t^k for z ≥ 0 and t = 1 / (1 + 0.36 z), with a relative error below 6e-8; fitted for it.
_TAIL = (
    0.20310825309128228, 0.20310829453204365, 0.18993019841491385, 0.16406774001768912, 0.12207961734477418,
    0.10914701723374083, -0.033378112740646906, 0.1483480753107864, -0.14469999202405381, 0.03828892368795458,
)  # fmt: skip
_TAIL_SCALE = numpy.float32(0.36 * 0.5**0.5)
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9 = (numpy.float32(c) for c in _TAIL)
_DENSITY = numpy.float32(0.3989422804014327)  # 1 / √(2π)
_FAR = numpy.float32(40.0)  # from here on, Φ(-x) is 0


@compiled
def gelu_exponents(x: Any, out: Any) -> None:
    """out = -x²/2, for |x| of at most 40."""
    xs, outs = x.reshape(-1), out.reshape(-1)
    half = numpy.float32(-0.5)
    for i in range(xs.size):
        near = -_FAR if xs[i] < -_FAR else _FAR if xs[i] > _FAR else xs[i]
        outs[i] = near * near * half


@compiled
def gelu(x: Any, out: Any, slope: Any) -> None:
    """slope holds e^(-x²/2), and gets the derivative of out = x Φ(x)."""
    xs, outs, slopes = x.reshape(-1), out.reshape(-1), slope.reshape(-1)
    zero, half, one = numpy.float32(0), numpy.float32(0.5), numpy.float32(1)
    for i in range(xs.size):
        value, exponential = xs[i], slopes[i]
        near = -_FAR if value < -_FAR else _FAR if value > _FAR else value
        t = one / (one + _TAIL_SCALE * abs(near))
        p = _C9
        p = p * t + _C8
        p = p * t + _C7
        p = p * t + _C6
        p = p * t + _C5
        p = p * t + _C4
        p = p * t + _C3
        p = p * t + _C2
        p = p * t + _C1
        p = p * t + _C0
        tail = half * exponential * t * p  # Φ(-|x|)
        phi = one - tail if near > zero else tail
        outs[i] = (value if value > near else near) * phi
        slopes[i] = phi + near * exponential * _DENSITY
