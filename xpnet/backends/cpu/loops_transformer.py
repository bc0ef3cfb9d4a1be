"""Compiled loops of transformers: the softmax of attention, normalization of rows, GELU."""

import math
from typing import Any

import numpy
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from xpnet.backends.cpu.compiling import compiled, compiled_with

_VECTOR = 16  # the float32 numbers of the longest vector instructions


@compiled_with("reassoc", "nsz", "contract")
def _sum(row: Any) -> Any:
    """Σ row."""
    total = row.dtype.type(0)
    for j in range(row.size):
        total += row[j]
    return total


@compiled_with("reassoc", "nsz", "contract")
def _dot(a: Any, b: Any) -> Any:
    """Σ a · b."""
    total = a.dtype.type(0)
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@compiled
def _largest(row: Any) -> Any:
    """The largest element, as an integer of the same bits. Maxima of integers are vectorized, those of floats are not.

    If the sign bit is set, the other bits are inverted, so that integers are in the order of the floats.
    """
    sign, magnitude = row.itemsize * 8 - 1, numpy.iinfo(row.dtype).max
    largest = row.dtype.type(numpy.iinfo(row.dtype).min)
    for j in range(row.size):
        ordered = row.dtype.type(row[j] ^ ((row[j] >> sign) & magnitude))
        largest = ordered if ordered > largest else largest
    return largest ^ ((largest >> sign) & magnitude)


@intrinsic
def _float_of(context: Any, bits: Any) -> Any:
    """The float32 with the bits of an int32."""

    def cast(_: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.bitcast(given[0], ir.FloatType())

    return types.float32(types.int32), cast


float_of: Any = _float_of  # Numba passes the context
#: log 2 as a float32 with few digits, and the rest.
_LOG2_HIGH, _LOG2_LOW = numpy.float32(0.693359375), numpy.float32(-2.12194440e-4)
_E2, _E3, _E4, _E5, _E6, _E7 = (numpy.float32(1.0 / math.factorial(k)) for k in range(2, 8))


@compiled_with("contract")
def _exp_in_float32(x: Any) -> Any:
    """e^x for x ≤ 0, which the compiler vectorizes: 2^n e^r for x = n log 2 + r, |r| ≤ ½ log 2. 0 if x < -87.

    NaN for NaN: then r is NaN and n is not, since no integer would be NaN.
    """
    one, far = numpy.float32(1), numpy.float32(-87)
    near = x if x >= far else far  # not NaN
    n = numpy.floor(near * numpy.float32(1.0 / math.log(2.0)) + numpy.float32(0.5))
    r = x - n * _LOG2_HIGH - n * _LOG2_LOW
    p = _E7
    p = p * r + _E6
    p = p * r + _E5
    p = p * r + _E4
    p = p * r + _E3
    p = p * r + _E2
    p = (p * r + one) * r + one
    power = float_of(numpy.int32((numpy.int32(n) + 127) << 23))  # of Numba's int64
    return numpy.float32(0) if x < far else p * power


def _exp(x: Any) -> Any:
    """e^x for x ≤ 0, as fast as possible."""


@overload(_exp, strict=False)
def _exp_of(x: Any) -> Any:
    return (lambda x: _exp_in_float32(x)) if x == types.float32 else (lambda x: math.exp(x))


# Attention: scores (N, H, queries, keys) of a block of queries, the first of which is query `first` of all. A query
# t attends to the keys s ≤ t + `past`; if attention is not causal, `past` is the number of keys.


@compiled
def _scaled_and_masked(row: Any, scale: Any, end: int, mask: Any, n: int) -> Any:
    """The scores of the keys before `end`, times `scale`, and of some keys after it, -∞. The rest of the row becomes 0.

    mask (N, keys): False sets a score to -∞; (0, 0) if all keys count.
    """
    end = min(max(end, 0), row.size)
    for s in range(end):
        row[s] *= scale
    stop = min(-(-end // _VECTOR) * _VECTOR, row.size)
    for s in range(end, stop):
        row[s] = -numpy.inf
    for s in range(stop, row.size):
        row[s] = 0
    if mask.size:
        for s in range(end):
            row[s] = row[s] if mask[n, s] else -numpy.inf
    return row[:stop]


@compiled
def attention_probabilities(
    scores: Any, scale: Any, past: int, first: int, mask: Any, integers: Any, log_sums: Any
) -> None:
    """scores = softmax(scale · scores), and log_sums (N, H, T). integers: an array of integers of the scores' size."""
    samples, heads, queries, _ = scores.shape
    zero, one, lowest = scores.dtype.type(0), scores.dtype.type(1), numpy.finfo(scores.dtype).min
    bits, sum_bits = scores.view(integers.dtype), log_sums.view(integers.dtype)
    for n in range(samples):
        for h in range(heads):
            for i in range(queries):
                row = _scaled_and_masked(scores[n, h, i], scale, first + i + 1 + past, mask, n)
                sum_bits[n, h, first + i] = _largest(bits[n, h, i, : row.size])
                highest = log_sums[n, h, first + i]
                if not highest >= lowest:  # no key counts
                    highest = lowest
                for s in range(row.size):
                    row[s] = _exp(row[s] - highest)
                total = _sum(row)
                if total == zero:
                    log_sums[n, h, first + i] = numpy.inf
                    continue
                log_sums[n, h, first + i] = highest + math.log(total)
                inverse = one / total
                for s in range(row.size):
                    row[s] *= inverse


@compiled
def attention_probabilities_again(scores: Any, scale: Any, past: int, first: int, mask: Any, log_sums: Any) -> None:
    """scores = exp(scale · scores - log_sums)."""
    samples, heads, queries, _ = scores.shape
    for n in range(samples):
        for h in range(heads):
            for i in range(queries):
                row = _scaled_and_masked(scores[n, h, i], scale, first + i + 1 + past, mask, n)
                log_sum = log_sums[n, h, first + i]
                for s in range(row.size):
                    row[s] = _exp(row[s] - log_sum)


@compiled
def attention_score_grads(p: Any, scale: Any, grads: Any) -> None:
    """grads = p · (grads - Σ p · grads) · scale, for each query; grads holds the gradients of the probabilities p.

    The rounding of log_sums, if scores are large, multiplies all p of a query by one factor. The mean must not have it.
    """
    samples, heads, queries, keys = p.shape
    one = p.dtype.type(1)
    for n in range(samples):
        for h in range(heads):
            for i in range(queries):
                row, g = p[n, h, i], grads[n, h, i]
                total = _sum(row)
                mean = _dot(row, g) / (total if total != 0 else one)
                for s in range(keys):
                    g[s] = row[s] * (g[s] - mean) * scale


# Normalization of rows.


@compiled_with("reassoc", "nsz", "contract")
def _sum_shifted(row: Any, shift: Any) -> Any:
    """Σ (row - shift)."""
    total = row.dtype.type(0)
    for j in range(row.size):
        total += row[j] - shift
    return total


@compiled_with("reassoc", "nsz", "contract")
def _sum_of_squares(row: Any) -> Any:
    """Σ row²."""
    total = row.dtype.type(0)
    for j in range(row.size):
        total += row[j] * row[j]
    return total


@compiled
def normalize_and_scale(
    x: Any, centered: bool, epsilon: Any, gamma: Any, beta: Any, normal: Any, sigma: Any, out: Any
) -> None:
    """gamma, beta (columns,), or (0,) for none."""
    rows, columns = x.shape
    count, zero, one = x.dtype.type(columns), x.dtype.type(0), x.dtype.type(1)
    for i in range(rows):
        shift = x[i, 0] if centered else zero  # the rounded mean of large equal numbers can differ from them
        mean = _sum_shifted(x[i], shift) / count if centered else zero
        for j in range(columns):
            normal[i, j] = x[i, j] - shift - mean
        sigma[i, 0] = numpy.sqrt(_sum_of_squares(normal[i]) / count + epsilon)
        inverse = one / sigma[i, 0]
        if gamma.size:
            for j in range(columns):
                value = normal[i, j] * inverse
                normal[i, j] = value
                out[i, j] = value * gamma[j]
        else:
            for j in range(columns):
                value = normal[i, j] * inverse
                normal[i, j] = value
                out[i, j] = value
        for j in range(beta.size):
            out[i, j] += beta[j]


@compiled
def normalize_and_scale_grad(
    grad: Any, centered: bool, gamma: Any, normal: Any, sigma: Any, totals: Any, out: Any
) -> None:
    """totals (2, columns) += Σ_rows grad · normal and Σ_rows grad, in float64."""
    rows, columns = grad.shape
    products, sums = numpy.empty(columns, grad.dtype), numpy.empty(columns, grad.dtype)
    count, zero, one = grad.dtype.type(columns), grad.dtype.type(0), grad.dtype.type(1)
    for start in range(0, rows, 64):  # rows whose totals are not long enough to lose digits
        products[:] = 0
        sums[:] = 0
        for i in range(start, min(start + 64, rows)):
            for j in range(columns):
                products[j] += grad[i, j] * normal[i, j]
                sums[j] += grad[i, j]
            h = out[i]
            if gamma.size:
                for j in range(columns):
                    h[j] = grad[i, j] * gamma[j]
            else:
                for j in range(columns):
                    h[j] = grad[i, j]
            shift = h[0] if centered else zero  # as in normalize_and_scale
            mean = _sum_shifted(h, shift) / count if centered else zero
            mean_product, inverse = _dot(h, normal[i]) / count, one / sigma[i, 0]
            for j in range(columns):
                h[j] = (h[j] - shift - mean - normal[i, j] * mean_product) * inverse
        for j in range(columns):
            totals[0, j] += products[j]
            totals[1, j] += sums[j]


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


@compiled_with("contract")
def gelu(x: Any, out: Any, slope: Any) -> None:
    """out = x Φ(x), and its derivative in slope."""
    xs, outs, slopes = x.reshape(-1), out.reshape(-1), slope.reshape(-1)
    zero, half, one = numpy.float32(0), numpy.float32(0.5), numpy.float32(1)
    for i in range(xs.size):
        value = xs[i]
        near = -_FAR if value < -_FAR else _FAR if value > _FAR else value
        exponential = _exp(near * near * -half)
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
        outs[i] = (value if value > near else near) * phi  # not -∞ · 0
        slopes[i] = phi + near * exponential * _DENSITY
