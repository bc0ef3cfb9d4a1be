"""Compiled loops of the CPU: operators, or parts of them, in one pass over memory. Formulas are in ../reference.

Numba compiles these serial loops at their first call and caches the machine code. They release the GIL, so that workers
process parts of a batch in parallel. Arrays are C-contiguous. Without Numba, the reference formulas are used.
"""

import math
from typing import Any

import numpy

from xpnet.backends.cpu.compiling import compiled, compiled_with
from xpnet.backends.cpu.loops_products import ROWS_TO_PACK, pack, packed_product, panel_columns
from xpnet.backends.cpu.loops_recurrent import (
    gru_grad,
    gru_inner,
    gru_state,
    gru_sums,
    lstm_cell,
    lstm_grad,
    lstm_sums,
    rnn_grad,
)
from xpnet.backends.cpu.loops_transformer import (
    attention_probabilities,
    attention_probabilities_again,
    attention_score_grads,
    gelu,
    normalize_and_scale,
    normalize_and_scale_grad,
)

__all__ = [
    "ROWS_TO_PACK", "attention_probabilities", "attention_probabilities_again", "attention_score_grads", "gelu",
    "gru_grad", "gru_inner", "gru_state", "gru_sums", "lstm_cell", "lstm_grad", "lstm_sums",
    "normalize_and_scale", "normalize_and_scale_grad", "pack", "packed_product", "panel_columns", "rnn_grad",
]  # fmt: skip


@compiled
def im2col(x: Any, windows: Any, out: Any) -> None:
    """x (N, H, W, C) → out (N, rows, columns, kh, kw, C)."""
    strides, dilation, before = windows.strides, windows.dilation, windows.before
    _, height, width, channels = x.shape
    images, rows, columns, kh, kw, _ = out.shape
    zero = out.dtype.type(0)
    for n in range(images):
        for i in range(rows):
            for j in range(columns):
                for a in range(kh):
                    h = i * strides[0] + a * dilation[0] - before[0]
                    for b in range(kw):
                        w = j * strides[1] + b * dilation[1] - before[1]
                        if 0 <= h < height and 0 <= w < width:
                            for c in range(channels):
                                out[n, i, j, a, b, c] = x[n, h, w, c]
                        else:
                            for c in range(channels):
                                out[n, i, j, a, b, c] = zero


@compiled
def im2col_by_cell(x: Any, windows: Any, out: Any) -> None:
    """x (N, H, W, C) → out (kh, kw, C, N, rows, columns): im2col with the pixels under one cell stored together."""
    strides, dilation, before = windows.strides, windows.dilation, windows.before
    _, height, width, channels = x.shape
    kh, kw, _, images, rows, columns = out.shape
    pixels, flat = x.reshape(-1), out.reshape(-1)
    zero, step = out.dtype.type(0), strides[1] * channels
    start = 0
    for a in range(kh):
        for b in range(kw):
            shift = b * dilation[1] - before[1]
            first, end = _on_image(shift, strides[1], width, columns)
            for c in range(channels):
                for n in range(images):
                    for i in range(rows):
                        row = flat[start : start + columns]
                        start += columns
                        h = i * strides[0] + a * dilation[0] - before[0]
                        on_image = 0 <= h < height
                        if not on_image or first > 0 or end < columns:
                            row[:] = zero
                        if not on_image:
                            continue
                        source = pixels[((n * height + h) * width + first * strides[1] + shift) * channels + c :]
                        inside = row[first:end]
                        if step == 1:  # which the compiler vectorizes
                            for j in range(inside.size):
                                inside[j] = source[j]
                        else:
                            for j in range(inside.size):
                                inside[j] = source[j * step]


@compiled
def col2im_by_cell(patches: Any, windows: Any, out: Any) -> None:
    """patches (kh, kw, C, N, rows, columns) → out (N, H, W, C): col2im of patches in the layout of `im2col_by_cell`."""
    strides, dilation, before = windows.strides, windows.dilation, windows.before
    _, height, width, channels = out.shape
    kh, kw, _, images, rows, columns = patches.shape
    pixels, flat = out.reshape(-1), patches.reshape(-1)
    pixels[:] = out.dtype.type(0)
    step = strides[1] * channels
    start = 0
    for a in range(kh):
        for b in range(kw):
            shift = b * dilation[1] - before[1]
            first, end = _on_image(shift, strides[1], width, columns)
            for c in range(channels):
                for n in range(images):
                    for i in range(rows):
                        inside = flat[start + first : start + end]
                        start += columns
                        h = i * strides[0] + a * dilation[0] - before[0]
                        if 0 <= h < height:
                            target = pixels[((n * height + h) * width + first * strides[1] + shift) * channels + c :]
                            if step == 1:
                                for j in range(inside.size):
                                    target[j] += inside[j]
                            else:
                                for j in range(inside.size):
                                    target[j * step] += inside[j]


@compiled
def _on_image(shift: int, stride: int, size: int, windows: int) -> tuple[int, int]:
    """(first, end) of the windows whose cell, at pixel window · stride + shift, is on the image."""
    first = max(0, -(shift // stride))
    return min(first, windows), max(min(first, windows), min(windows, (size - 1 - shift) // stride + 1))


@compiled
def col2im(patches: Any, windows: Any, out: Any) -> None:
    """patches (N, rows, columns, kh, kw, C) → out (N, H, W, C)."""
    strides, dilation, before = windows.strides, windows.dilation, windows.before
    _, height, width, channels = out.shape
    images, rows, columns, kh, kw, _ = patches.shape
    zero = out.dtype.type(0)
    for n in range(images):
        out[n] = zero
        for i in range(rows):
            for j in range(columns):
                for a in range(kh):
                    h = i * strides[0] + a * dilation[0] - before[0]
                    if h < 0 or h >= height:
                        continue
                    for b in range(kw):
                        w = j * strides[1] + b * dilation[1] - before[1]
                        if 0 <= w < width:
                            for c in range(channels):
                                out[n, h, w, c] += patches[n, i, j, a, b, c]


@compiled
def max_pool(x: Any, windows: Any, out: Any, choice: Any) -> None:
    """x (N, H, W, C) → out and choice (N, rows, columns, C)."""
    (kh, kw), strides, before = windows.kernel, windows.strides, windows.before
    _, height, width, _ = x.shape
    images, rows, columns, channels = out.shape
    if kh == kw == 2 and strides == (2, 2) and before == (0, 0) and 2 * rows <= height and 2 * columns <= width:
        _max_pool_2x2(x, out, choice)
        return
    for n in range(images):
        for i in range(rows):
            for j in range(columns):
                fresh = True
                top, left = i * strides[0] - before[0], j * strides[1] - before[1]
                for a in range(max(0, -top), min(kh, height - top)):
                    for b in range(max(0, -left), min(kw, width - left)):
                        h, w, cell = top + a, left + b, a * kw + b
                        for c in range(channels):
                            pixel, best, chosen = x[n, h, w, c], out[n, i, j, c], choice[n, i, j, c]
                            wins = fresh | ((not pixel <= best) & (best == best))  # NaN wins; else the first of equals
                            out[n, i, j, c] = pixel if wins else best
                            choice[n, i, j, c] = cell if wins else chosen
                        fresh = False


@compiled
def _max_pool_2x2(x: Any, out: Any, choice: Any) -> None:
    """max_pool with a window and strides of 2 × 2, without branches."""
    images, rows, columns, channels = out.shape
    for n in range(images):
        for i in range(rows):
            for j in range(columns):
                p0, p1 = x[n, 2 * i, 2 * j], x[n, 2 * i, 2 * j + 1]
                p2, p3 = x[n, 2 * i + 1, 2 * j], x[n, 2 * i + 1, 2 * j + 1]
                largest, chosen = out[n, i, j], choice[n, i, j]
                for c in range(channels):  # from the last pixel to the first, so that the first of equal pixels wins
                    best, cell = p3[c], 3
                    if (p2[c] >= best) | (p2[c] != p2[c]):
                        best, cell = p2[c], 2
                    if (p1[c] >= best) | (p1[c] != p1[c]):
                        best, cell = p1[c], 1
                    if (p0[c] >= best) | (p0[c] != p0[c]):
                        best, cell = p0[c], 0
                    largest[c], chosen[c] = best, cell


@compiled
def max_pool_grad(grad: Any, choice: Any, windows: Any, out: Any) -> None:
    """grad and choice (N, rows, columns, C) → out (N, H, W, C)."""
    (kh, kw), strides, before = windows.kernel, windows.strides, windows.before
    _, height, width, _ = out.shape
    images, rows, columns, channels = grad.shape
    zero = out.dtype.type(0)
    for n in range(images):
        out[n] = zero
        for i in range(rows):
            for j in range(columns):
                for a in range(kh):  # the clipped ranges of max_pool would be 20 % slower here
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


@compiled
def gather(a: Any, rows: Any, out: Any) -> None:
    for i in range(rows.size):
        source, target = a[rows[i]], out[i]
        for j in range(target.size):
            target[j] = source[j]


@compiled
def add_rows_at(grad_rows: Any, rows: Any, first: int, end: int, out: Any) -> None:
    """The columns from `first` to before `end` of out (V, F) = Σ_{i: rows[i] = v} grad_rows[i]."""
    out[:, first:end] = out.dtype.type(0)
    for i in range(rows.size):
        source, target = grad_rows[i, first:end], out[rows[i], first:end]
        for j in range(target.size):
            target[j] += source[j]


@compiled
def rescale(x: Any, scale: Any, offset: Any, out: Any) -> None:
    xs, outs = x.reshape(-1), out.reshape(-1)
    number = out.dtype.type
    if offset == number(0):
        for i in range(xs.size):
            outs[i] = number(xs[i]) * scale
    else:
        for i in range(xs.size):
            outs[i] = number(xs[i]) * scale + offset


@compiled
def count_correct(outputs: Any, labels: Any) -> int:
    rows, classes = outputs.shape
    correct = 0
    for i in range(rows):
        label, beaten = labels[i], 0
        if label < 0 or label >= classes:
            continue
        score = outputs[i, label]
        for k in range(classes):  # without branches, because no processor could predict them
            other = outputs[i, k]
            beaten += ((k >= label) & (other == score)) | (other < score)  # nothing is true of NaN
        correct += beaten == classes
    return correct


@compiled
def relu(x: Any, out: Any) -> None:
    xs, outs = x.reshape(-1), out.reshape(-1)
    zero = out.dtype.type(0)
    for i in range(xs.size):
        value = xs[i]
        outs[i] = zero if value <= zero else value  # NaN stays


@compiled
def relu_grad(grad: Any, y: Any, out: Any) -> None:
    grads, ys, outs = grad.reshape(-1), y.reshape(-1), out.reshape(-1)
    zero, one = out.dtype.type(0), out.dtype.type(1)
    for i in range(grads.size):
        outs[i] = grads[i] * (one if ys[i] != zero else zero)


@compiled
def cross_entropy(logits: Any, labels: Any, confidence: Any, share: Any, scale: Any, losses: Any, grad: Any) -> None:
    """The target of class k is `share`, plus `confidence` if k is the label. The gradient is multiplied by `scale`."""
    rows, classes = logits.shape
    zero = logits.dtype.type(0)
    for i in range(rows):
        z, g = logits[i], grad[i]
        largest = z[0]
        for k in range(1, classes):
            if not z[k] <= largest:  # NaN too
                largest = z[k]
        total, shifted = zero, zero
        for k in range(classes):
            shift = z[k] - largest
            shifted += shift
            g[k] = math.exp(shift)
            total += g[k]
        log_total, label = math.log(total), labels[i]
        loss = confidence * (log_total - (z[label] - largest))
        if share != zero:  # 0 · ∞ would be NaN
            loss += share * (classes * log_total - shifted)
        losses[i] = loss
        at_label = (g[label] / total - share - confidence) * scale
        for k in range(classes):
            g[k] = (g[k] / total - share) * scale
        g[label] = at_label


@compiled
def cross_entropy_sums(
    logits: Any, labels: Any, confidence: Any, share: Any, scale: Any, losses: Any, grad: Any
) -> int:
    """`cross_entropy`; returns `count_correct`."""
    cross_entropy(logits, labels, confidence, share, scale, losses, grad)
    return count_correct(logits, labels)


# Updates of the flat vectors, whose formulas are in optimizers.py.


@compiled_with("reassoc", "nsz")
def add_squares(g: Any, totals: Any) -> None:
    """totals (1,) += Σ g² in float64."""
    total = 0.0
    for i in range(g.size):
        total += numpy.float64(g[i]) * numpy.float64(g[i])
    totals[0] += total


@compiled
def sgd(w: Any, g: Any, rate: Any) -> None:
    for i in range(w.size):
        w[i] -= rate * g[i]


@compiled
def momentum(w: Any, g: Any, v: Any, rate: Any, mu: Any, nesterov: Any) -> None:
    """`nesterov` is 1 for Nesterov's direction g + mu v, else 0."""
    for i in range(w.size):
        v[i] = mu * v[i] + g[i]
        direction = g[i] + mu * v[i] if nesterov else v[i]
        w[i] -= rate * direction


@compiled
def adagrad(w: Any, g: Any, s: Any, rate: Any, epsilon: Any) -> None:
    for i in range(w.size):
        s[i] += g[i] * g[i]
        w[i] -= rate * (g[i] / (math.sqrt(s[i]) + epsilon))


@compiled
def rmsprop(w: Any, g: Any, s: Any, rate: Any, rho: Any, epsilon: Any) -> None:
    one = w.dtype.type(1)
    for i in range(w.size):
        s[i] = rho * s[i] + (one - rho) * (g[i] * g[i])
        w[i] -= rate * (g[i] / (math.sqrt(s[i]) + epsilon))


@compiled
def adam(w: Any, g: Any, m: Any, s: Any, rate: Any, beta1: Any, beta2: Any, epsilon: Any) -> None:
    """rate and epsilon include both bias corrections."""
    one = w.dtype.type(1)
    for i in range(w.size):
        m[i] += (one - beta1) * (g[i] - m[i])
        s[i] = beta2 * s[i] + (one - beta2) * (g[i] * g[i])
        w[i] -= rate * (m[i] / (math.sqrt(s[i]) + epsilon))


@compiled
def dropout_mask(row_hash: Any, word: Any, threshold: Any, kept: Any, out: Any) -> None:
    """out (rows, columns) = kept where the bits of `random_bits` are at least `threshold`, else 0."""
    rows, columns = out.shape
    zero = out.dtype.type(0)
    for i in range(rows):
        for j in range(columns):
            bits = _hash32(row_hash[i] ^ _hash32(numpy.uint32(j) ^ word))
            out[i, j] = kept if bits >= threshold else zero


@compiled
def _hash32(h: Any) -> Any:
    h = numpy.uint32((h ^ (h >> numpy.uint32(16))) * numpy.uint32(0x7FEB352D))
    h = numpy.uint32((h ^ (h >> numpy.uint32(15))) * numpy.uint32(0x846CA68B))
    return h ^ (h >> numpy.uint32(16))


@compiled
def add_to_rows(a: Any, row: Any) -> None:
    rows, columns = a.shape
    for i in range(rows):
        for j in range(columns):
            a[i, j] += row[j]


@compiled
def add_to_rows_relu(a: Any, row: Any, out: Any) -> None:
    rows, columns = a.shape
    zero = out.dtype.type(0)
    for i in range(rows):
        for j in range(columns):
            value = a[i, j] + row[j]
            out[i, j] = zero if value <= zero else value  # NaN stays


@compiled
def scale_shift(x: Any, center: Any, scale: Any, shift: Any, out: Any) -> None:
    rows, columns = x.shape
    for i in range(rows):
        for j in range(columns):
            out[i, j] = (x[i, j] - center[j]) * scale[j] + shift[j]


@compiled
def combine(g: Any, a: Any, x: Any, center: Any, b: Any, c: Any, out: Any) -> None:
    rows, columns = g.shape
    for i in range(rows):
        for j in range(columns):
            out[i, j] = g[i, j] * a[j] + (x[i, j] - center[j]) * b[j] + c[j]


# Sums over many rows: blocks of rows are summed in the matrix's dtype, and the sums of the blocks in float64.

_BLOCK_ROWS = 64


@compiled
def add_rows(x: Any, totals: Any) -> None:
    """totals (columns,) += Σ_rows x."""
    rows, columns = x.shape
    block = numpy.empty(columns, x.dtype)
    for start in range(0, rows, _BLOCK_ROWS):
        block[:] = 0
        for i in range(start, min(start + _BLOCK_ROWS, rows)):
            for j in range(columns):
                block[j] += x[i, j]
        for j in range(columns):
            totals[j] += block[j]


@compiled
def add_powers(x: Any, shift: Any, totals: Any) -> None:
    """totals (2, columns) += Σ_rows (x - shift) and Σ_rows (x - shift)²."""
    rows, columns = x.shape
    first, second = numpy.empty(columns, x.dtype), numpy.empty(columns, x.dtype)
    for start in range(0, rows, _BLOCK_ROWS):
        first[:] = 0
        second[:] = 0
        for i in range(start, min(start + _BLOCK_ROWS, rows)):
            for j in range(columns):
                deviation = x[i, j] - shift[j]
                first[j] += deviation
                second[j] += deviation * deviation
        for j in range(columns):
            totals[0, j] += first[j]
            totals[1, j] += second[j]


@compiled
def add_products(a: Any, b: Any, center: Any, totals: Any) -> None:
    """totals (columns,) += Σ_rows a · (b - center)."""
    rows, columns = a.shape
    block = numpy.empty(columns, a.dtype)
    for start in range(0, rows, _BLOCK_ROWS):
        block[:] = 0
        for i in range(start, min(start + _BLOCK_ROWS, rows)):
            for j in range(columns):
                block[j] += a[i, j] * (b[i, j] - center[j])
        for j in range(columns):
            totals[j] += block[j]
