"""Attention on the CPU: NumPy's products of the heads, and compiled loops for the softmax and its gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy

from xpnet.backends.arrays import Array, DType
from xpnet.backends.cpu.thread_pool import ThreadPool
from xpnet.backends.reference import Backend
from xpnet.backends.reference.attention import ProbabilityDropout, by_head

_NO_MASK = numpy.empty((0, 0), dtype=bool)
_INTEGERS = {4: numpy.empty(0, numpy.int32), 8: numpy.empty(0, numpy.int64)}  # by their bytes


class CPUAttention(Backend):
    """Attention in blocks of queries, whose matrices of scores fit into a core's cache. Workers share the samples."""

    chunk_bytes: int
    threads: ThreadPool
    loops: Callable[[Sequence[Any]], Any]
    _matrix: Callable[[tuple[int, int], DType], Array]

    def attention(
        self, q: Array, k: Array, v: Array, scale: float, causal: bool, mask: Array | None,
        dropout: ProbabilityDropout | None, out: Array, log_sums: Array,
    ) -> Array:  # fmt: skip
        loops = self.loops((log_sums,))
        if loops is None:
            return super().attention(q, k, v, scale, causal, mask, dropout, out, log_sums)
        factor, past = q.dtype.type(scale), _past(q, k, causal)

        def attend(samples: slice, rows: slice) -> None:
            keys, sums = _keys(rows, k, past), log_sums[samples]
            scores, *factors = self._matrices(samples, rows, keys, q, 1 if dropout is None else 2)
            numpy.matmul(by_head(q[samples, rows]), _transposed(k[samples, keys]), out=scores)
            counts = _mask_of(mask, samples)
            loops.attention_probabilities(scores, factor, past, rows.start, counts, _INTEGERS[q.itemsize], sums)
            if dropout is not None:
                scores *= self._factors(dropout, samples, rows, q, *factors)
            numpy.matmul(scores, by_head(v[samples, keys]), out=by_head(out[samples, rows]))

        self._for_blocks(q, k, attend)
        return out

    def attention_grad(
        self, q: Array, k: Array, v: Array, scale: float, causal: bool, mask: Array | None,
        dropout: ProbabilityDropout | None, out: Array, log_sums: Array, grad: Array,
        grad_q: Array, grad_k: Array, grad_v: Array,
    ) -> None:  # fmt: skip
        loops = self.loops((log_sums,))
        if loops is None:
            super().attention_grad(q, k, v, scale, causal, mask, dropout, out, log_sums, grad, grad_q, grad_k, grad_v)
            return
        factor, past = q.dtype.type(scale), _past(q, k, causal)

        def backward(samples: slice, rows: slice) -> None:
            keys, queries, grad_rows = _keys(rows, k, past), q[samples, rows], by_head(grad[samples, rows])
            p, dp, *factors = self._matrices(samples, rows, keys, q, 2 if dropout is None else 3)
            numpy.matmul(by_head(queries), _transposed(k[samples, keys]), out=p)
            counts = _mask_of(mask, samples)
            loops.attention_probabilities_again(p, factor, past, rows.start, counts, log_sums[samples])
            numpy.matmul(grad_rows, _transposed(v[samples, keys]), out=dp)
            dropped = p
            if dropout is not None:
                dropped = self._factors(dropout, samples, rows, q, *factors)
                dp *= dropped
                dropped *= p
            whole = rows.stop - rows.start == q.shape[1]
            self._add_product(dropped, grad_rows, grad_v[samples, keys], whole)
            loops.attention_score_grads(p, factor, dp)
            numpy.matmul(dp, by_head(k[samples, keys]), out=by_head(grad_q[samples, rows]))
            self._add_product(dp, by_head(queries), grad_k[samples, keys], whole)

        self._for_blocks(q, k, backward, zeros=(grad_k, grad_v))

    def _for_blocks(
        self, q: Array, k: Array, work: Callable[[slice, slice], None], zeros: Sequence[Array] = ()
    ) -> None:
        """Call work(samples, queries) for blocks. If several have the same sample, `zeros` are set to 0 before."""
        samples, queries, heads, _ = q.shape
        query_bytes = heads * k.shape[1] * q.itemsize
        block = min(queries, max(1, self.chunk_bytes // query_bytes))
        together = max(1, self.chunk_bytes // (query_bytes * queries))

        def do_part(part: slice, _: int) -> None:
            for n in range(part.start, part.stop, together):
                some = slice(n, min(n + together, part.stop))
                if block < queries:
                    for array in zeros:
                        array[some] = 0.0
                for t in range(0, queries, block):
                    work(some, slice(t, min(t + block, queries)))

        self.threads.parallel_for(samples, do_part)

    def _matrices(self, samples: slice, rows: slice, keys: slice, q: Array, count: int) -> list[Array]:
        """`count` uninitialized arrays (N, H, queries, keys), valid until the next call."""
        shape = samples.stop - samples.start, q.shape[2], rows.stop - rows.start, keys.stop
        matrices = self._matrix((count * shape[0] * shape[1], shape[2] * shape[3]), q.dtype)
        parts = matrices.reshape(count, *shape)
        return [parts[i] for i in range(count)]

    def _factors(self, dropout: ProbabilityDropout, samples: slice, rows: slice, q: Array, out: Array) -> Array:
        """out (N, H, queries, keys) = the factors of dropout."""
        key, rate, first_row = dropout
        _, queries, heads, _ = q.shape
        whole = rows.stop - rows.start == queries  # then the rows of all heads follow one another
        parts = out.reshape(1 if whole else out.shape[0] * heads, -1, out.shape[3])
        first = (first_row + samples.start) * heads * queries + rows.start
        for i in range(len(parts)):
            self.dropout_mask(key, rate, out=parts[i], first_row=first + i * queries)
        return out

    def _add_product(self, a: Array, b: Array, out: Array, assign: bool) -> None:
        """out (N, S, H, D) += aᵀ @ b for each head, or = with `assign`; a (N, H, T, S), b (N, H, T, D)."""
        transposed = a.transpose(0, 1, 3, 2)
        if assign:
            numpy.matmul(transposed, b, out=by_head(out))
        else:
            out += by_head(numpy.matmul(transposed, b))


def _past(q: Array, k: Array, causal: bool) -> int:
    """The number p for which query t attends to the keys s ≤ t + p. Without `causal`, these are all keys."""
    return int(k.shape[1] - q.shape[1] if causal else k.shape[1])


def _keys(rows: slice, k: Array, past: int) -> slice:
    """The keys that any of these queries attends to, and at least one."""
    return slice(0, min(max(rows.stop + past, 1), k.shape[1]))


def _transposed(k: Array) -> Array:
    """k (N, S, H, D) as (N, H, D, S)."""
    return k.transpose(0, 2, 3, 1)


def _mask_of(mask: Array | None, samples: slice) -> Array:
    return _NO_MASK if mask is None else mask[samples]
