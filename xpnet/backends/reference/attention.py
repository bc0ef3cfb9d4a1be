"""Attention: softmax(scale · q kᵀ) v and its gradients for blocks of queries; rotary positions."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from xpnet.backends.arrays import Array, DType
from xpnet.backends.reference.random import RandomOperators

#: (key, rate, first_row): the noise of the probabilities, the rate of dropout, the number of the first sample.
ProbabilityDropout: TypeAlias = tuple[Sequence[Any], float, int]

_BLOCK = 64  # queries: no device stores more rows of probabilities of a head at a time


class AttentionOperators(RandomOperators):
    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        scale: float,
        causal: bool,
        mask: Array | None,
        dropout: ProbabilityDropout | None,
        out: Array,
        log_sums: Array,
    ) -> Array:
        """out = softmax(scale · q kᵀ) v for each head. Returns out.

        q, out (N, T, H, D); k, v (N, S, H, D): the last axis is contiguous, the others may be strided.  log_sums
        (N, H, T): log Σ_s exp(scale · q·k_s), which `attention_grad` needs.

        causal: query t attends to the keys s ≤ t + S - T only.  mask (N, S), bool, or None: True where a key counts.
        Where it does not, k and v must still be finite: the layer's products would spread NaN in any case.  A query
        without any key gives 0, with ∞ in log_sums.  dropout: multiplies the probabilities by 0, or by 1 / (1 - rate);
        the noise of query t of head h of sample n is that of row ((first_row + n) · H + h) · T + t of `random_bits`,
        and its columns are the keys.
        """
        xp, lowest = self.xp, self.lowest(q.dtype)
        for rows, keys, scores in self._scores(q, k, scale, causal, mask):
            highest = xp.maximum(xp.max(scores, axis=-1, keepdims=True), lowest)  # finite without any key
            scores -= highest
            xp.exp(scores, out=scores)
            total = xp.sum(scores, axis=-1, keepdims=True)
            empty = total == 0
            total += empty
            log_sums[:, :, rows] = xp.where(empty, xp.inf, highest + xp.log(total))[..., 0]
            scores /= total
            if dropout is not None:
                scores *= self._dropout_factors(dropout, rows, keys, log_sums.shape, k.dtype)
            out[:, rows] = xp.matmul(scores, by_head(v[:, keys])).transpose(0, 2, 1, 3)
        return out

    def attention_grad(
        self,
        q: Array,
        k: Array,
        v: Array,
        scale: float,
        causal: bool,
        mask: Array | None,
        dropout: ProbabilityDropout | None,
        out: Array,
        log_sums: Array,
        grad: Array,
        grad_q: Array,
        grad_k: Array,
        grad_v: Array,
    ) -> None:
        """The gradients of q, k and v, given grad (N, T, H, D), that of out. The arguments are those of `attention`.

        The probabilities are computed again, P = exp(scale · q kᵀ - log_sums). With M, the factors of dropout, and
        dP = M ∘ (grad vᵀ), the gradient of scale · q kᵀ is dS = P ∘ (dP - D), D_t = Σ_s P_ts dP_ts = grad_t·out_t:

            grad_q = scale · dS k,   grad_k = scale · dSᵀ q,   grad_v = (M ∘ P)ᵀ grad.
        """
        xp = self.xp
        grad_k[...] = 0.0
        grad_v[...] = 0.0
        for rows, keys, p in self._scores(q, k, scale, causal, mask):
            grad_rows = by_head(grad[:, rows])
            p -= log_sums[:, :, rows, None]
            xp.exp(p, out=p)
            dp = xp.matmul(grad_rows, by_head(v[:, keys]).swapaxes(2, 3))
            dropped = p
            if dropout is not None:
                factors = self._dropout_factors(dropout, rows, keys, log_sums.shape, k.dtype)
                dp *= factors
                dropped = p * factors
            grad_v[:, keys] += xp.matmul(dropped.swapaxes(2, 3), grad_rows).transpose(0, 2, 1, 3)
            dp -= xp.sum(grad_rows * by_head(out[:, rows]), axis=-1, keepdims=True)
            dp *= p
            dp *= scale
            grad_q[:, rows] = xp.matmul(dp, by_head(k[:, keys])).transpose(0, 2, 1, 3)
            grad_k[:, keys] += xp.matmul(dp.swapaxes(2, 3), by_head(q[:, rows])).transpose(0, 2, 1, 3)

    def rotate_pairs(self, x: Array, cosines: Array, sines: Array, out: Array) -> Array:
        """Rotate each pair (x_i, x_{i+F}) of the last axis by its angle. Returns out.

        x, out (N, T, H, 2F); cosines, sines (T, F): those of the angles:

            out_i = x_i cos - x_{i+F} sin,   out_{i+F} = x_i sin + x_{i+F} cos.

        out may be x.
        """
        half = cosines.shape[1]
        cosines, sines = cosines[:, None], sines[:, None]
        a, b = x[..., :half], x[..., half:]
        rotated = a * sines + b * cosines
        out[..., :half] = a * cosines - b * sines
        out[..., half:] = rotated
        return out

    def _scores(
        self, q: Array, k: Array, scale: float, causal: bool, mask: Array | None
    ) -> Iterator[tuple[slice, slice, Array]]:
        """(queries, keys, scores (N, H, queries, keys)) for each block of queries; -∞ where no query attends."""
        xp, queries, length = self.xp, q.shape[1], k.shape[1]
        for start in range(0, queries, _BLOCK):
            rows = slice(start, min(start + _BLOCK, queries))
            last = rows.stop + length - queries  # the first key after those of the block's last query, if causal
            keys = slice(0, min(max(last, 1), length) if causal else length)
            scores = xp.matmul(by_head(q[:, rows]), by_head(k[:, keys]).swapaxes(2, 3))
            scores *= scale
            if causal:
                future = xp.arange(keys.stop) > xp.arange(start, rows.stop)[:, None] + (length - queries)
                xp.copyto(scores, -xp.inf, where=future)
            if mask is not None:
                xp.copyto(scores, -xp.inf, where=~mask[:, None, None, keys])
            yield rows, keys, scores

    def _dropout_factors(
        self, dropout: ProbabilityDropout, rows: slice, keys: slice, shape: Sequence[int], dtype: DType
    ) -> Array:
        """The factors of dropout for these queries and keys of all heads, (N, H, queries, keys). shape: (N, H, T)."""
        key, rate, first_row = dropout
        samples, heads, queries = shape
        factors = self.xp.empty((samples, heads, rows.stop - rows.start, keys.stop), dtype=dtype)
        for n in range(samples):
            for h in range(heads):
                first = ((first_row + n) * heads + h) * queries + rows.start
                self.dropout_mask(key, rate, out=factors[n, h], first_row=first)
        return factors


def by_head(x: Array) -> Array:
    """x (N, T, H, D) as (N, H, T, D)."""
    return x.transpose(0, 2, 1, 3)
