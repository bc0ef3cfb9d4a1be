"""MultiHeadAttention: each position of a sequence gets a weighted mean over positions of this or another sequence."""

import math
from collections.abc import Sequence
from typing import Any

from xpnet.backends import Array
from xpnet.config import flag, integer, number
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer, checked_initializer
from xpnet.layers.context import Shape
from xpnet.layers.structure import first_of
from xpnet.parameters import Parameter


class MultiHeadAttention(Layer):
    """Scaled dot-product attention in several heads: (N, T, C) → (N, T, C).

        q = x @ query_weight + query_bias,   k and v likewise;   for each head, D = C / heads columns of q, k and v,
        P_ts = exp(q_t·k_s / √D) / Σ_r exp(q_t·k_r / √D),   out_t = Σ_s P_ts v_s;
        y = out @ output_weight + output_bias

    Called on a list [query (N, T, C), memory (N, S, M)], the queries come from the first sequence, and the keys and
    values from the second: cross-attention. Masked steps of x, or of memory, are not attended to.

    heads: their number, which must divide C.  causal: position t attends to positions s ≤ t + S - T only, which in
    self-attention is s ≤ t.  dropout: in training, each P_ts is 0 with this probability, else divided by 1 - dropout.
    rotary: rotates q and k by their positions, so that q_t·k_s depends on t - s: element i of a head and element
    i + D/2 are a pair, rotated by the angle t · 10000^(-2i/D).

    query_weight and output_weight are (C, C), key_weight and value_weight (M, C), the biases (C,). `use_bias=False`
    leaves all biases out.

    Vaswani et al. 2017, "Attention is all you need"; Su et al. 2021, "RoFormer: enhanced transformer with rotary
    position embedding".
    """

    _changeable = frozenset(("dropout",))
    takes_list = True
    splits_batch = True

    def __init__(
        self,
        heads: int,
        dropout: float = 0.0,
        *,
        causal: bool = False,
        rotary: bool = False,
        use_bias: bool = True,
        weight_initializer: Any = "glorot_uniform",
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.heads, self.causal = integer(self, "heads", heads), flag(self, "causal", causal)
        self.dropout = number(self, "dropout", dropout, at_least=0, below=1)
        self.rotary, self.use_bias = flag(self, "rotary", rotary), flag(self, "use_bias", use_bias)
        self.weight_initializer = checked_initializer(self, "weight_initializer", weight_initializer)

    def build(self, input_shape: Any) -> Shape:
        shapes = input_shape if isinstance(input_shape, list) else [input_shape] * 2
        if len(shapes) != 2 or any(len(shape) != 2 for shape in shapes):
            raise self.refuse("a sequence (N, T, C), or a list of two, [query, memory]", input_shape)
        (_, features), (_, memory_features) = shapes
        if features % self.heads:
            raise self.refuse(f"a number of features that heads={self.heads} divides", input_shape)
        if self.rotary and features // self.heads % 2:
            raise ArgumentError(
                f"{self._label}: rotary=True rotates pairs, so a head needs an even number of features, but {features} "
                f"features in {self.heads} heads are {features // self.heads} each."
            )
        inputs = {"query": features, "key": memory_features, "value": memory_features, "output": features}
        for part, size in inputs.items():
            weight = self.add_parameter(f"{part}_weight", (size, features), self.weight_initializer)
            setattr(self, f"{part}_weight", weight)
        for part in inputs if self.use_bias else ():
            setattr(self, f"{part}_bias", self.add_parameter(f"{part}_bias", (features,), "zeros", decay=False))
        return shapes[0]  # type: ignore[no-any-return]

    def spread_masks(self, inputs: Sequence[bool]) -> tuple[bool, ...]:
        return (inputs[0],)  # that of the query

    def output_mask(self, x: Any) -> Array | None:
        return first_of(self.mask)

    def forward(self, x: Any) -> Array:
        """See the class; q, k, v and out are (N, T, heads, D)."""
        work, backend = self.work, self.backend
        query, memory = x if isinstance(x, list | tuple) else (x, x)
        work.query, work.memory = (backend.cast(a.reshape(-1, a.shape[-1])) for a in (query, memory))
        samples, length, features = query.shape
        q = self._project(work.query, "query").reshape(samples, length, self.heads, -1)
        k = self._project(work.memory, "key").reshape(samples, memory.shape[1], self.heads, -1)
        v = self._project(work.memory, "value").reshape(k.shape)
        past = self.past
        if self.rotary:
            first = past.steps if past else 0
            self._rotate(q, first)
            self._rotate(k, first)
        mask = self.mask[1] if isinstance(self.mask, list) else self.mask
        if past:
            k, v = past.joined("keys", k), past.joined("values", v)
            mask = None if mask is None else past.joined("mask", mask)
        training = self.context.training and self.dropout
        dropout = (self.noise_key, self.dropout, self.context.first_row) if training else None
        given = q, k, v, 1.0 / math.sqrt(q.shape[-1]), self.causal, mask, dropout
        out, log_sums = work.buffer("out", q.shape), work.buffer("log_sums", (samples, self.heads, length))
        work.given, work.out, work.log_sums = given, backend.attention(*given, out, log_sums), log_sums
        return self._project(out.reshape(-1, features), "output").reshape(query.shape)

    def backward(self, grad_y: Array) -> Any:
        """y = out @ W_o + b_o, q = x @ W_q + b_q and so on are as in Dense. In between, for each head:

        out_t = Σ_s P_ts v_s gives ∂L/∂v_s = Σ_t P_ts ∂L/∂out_t and ∂L/∂P_ts = ∂L/∂out_t · v_s.

        P_t is the softmax of the scores z_ts = q_t·k_s / √D, with the Jacobian ∂P_ts/∂z_tr = P_ts (δ_sr - P_tr), so

        ∂L/∂z_ts = P_ts (∂L/∂P_ts - Σ_r P_tr ∂L/∂P_tr) = P_ts (∂L/∂P_ts - ∂L/∂out_t · out_t),

        since Σ_r P_tr v_r = out_t. Finally ∂L/∂q_t = Σ_s ∂L/∂z_ts k_s / √D and ∂L/∂k_s = Σ_t ∂L/∂z_ts q_t / √D.

        Dropout multiplies P_ts by m_ts before out_t is summed, so ∂L/∂v_s and ∂L/∂P_ts get the factor m_ts too. The
        gradient of a rotation is the rotation back. In self-attention, x has the sum of three gradients.
        """
        work, backend, several = self.work, self.backend, isinstance(self.input_shape, list)
        q, k, v, scale, causal, mask, dropout = work.given
        grad_out = work.buffer("grad_out", (grad_y.shape[0] * grad_y.shape[1], grad_y.shape[2]))
        self._project_grad(work.out.reshape(grad_out.shape), grad_y.reshape(grad_out.shape), "output", grad_out)
        grad_q, grad_k, grad_v = (work.buffer(f"grad_{part}", a.shape) for part, a in (("q", q), ("k", k), ("v", v)))
        grads = grad_out.reshape(q.shape), grad_q, grad_k, grad_v
        backend.attention_grad(q, k, v, scale, causal, mask, dropout, work.out, work.log_sums, *grads)
        if self.rotary:
            self._rotate(grad_q, back=True)
            self._rotate(grad_k, back=True)
        wants = self.wants_input_grad
        grad_query: Any = work.buffer("grad_query", work.query.shape) if wants else None
        grad_memory: Any = work.buffer("grad_memory", work.memory.shape) if wants and several else grad_query
        rows = (-1, grad_y.shape[2])
        self._project_grad(work.query, grad_q.reshape(rows), "query", grad_query)
        self._project_grad(work.memory, grad_k.reshape(rows), "key", grad_memory, add=not several)
        self._project_grad(work.memory, grad_v.reshape(rows), "value", grad_memory, add=True)
        if not wants:
            return None
        grad_query = grad_query.reshape(grad_y.shape)
        return [grad_query, grad_memory.reshape(len(grad_y), -1, work.memory.shape[1])] if several else grad_query

    def _project(self, x: Array, part: str) -> Array:
        """x @ weight + bias of this part of the parameters, for rows x."""
        weight: Parameter = getattr(self, f"{part}_weight")
        y = self.work.buffer(part, (len(x), weight.shape[1]))
        self.backend.matmul(self.backend.cast(x), self.backend.cast(weight.value), out=y)
        return self.backend.add_to_rows(y, getattr(self, f"{part}_bias").value) if self.use_bias else y

    def _project_grad(self, x: Array, grad: Array, part: str, grad_x: Array | None, add: bool = False) -> None:
        """Write the gradients of the weight and the bias. Write that of x, or add it with `add`, unless it is None."""
        backend, weight = self.backend, getattr(self, f"{part}_weight")
        rounded = backend.cast(grad)
        backend.matmul(x.T, rounded, out=weight.grad)
        if self.use_bias:
            backend.sum_rows(grad, out=getattr(self, f"{part}_bias").grad)
        if grad_x is None:
            return
        transposed = backend.cast(weight.value).T
        if add:
            backend.add_matmul(rounded, transposed, out=grad_x, scratch=self.context.scratch("term", grad_x.shape))
        else:
            backend.matmul(rounded, transposed, out=grad_x)

    def _rotate(self, x: Array, first: int = 0, back: bool = False) -> None:
        """Rotate x (N, T, heads, D) in place by the angles of its positions, which begin at `first`, or back."""
        end = first + x.shape[1]
        cosines, sines = (table[first:] for table in self.backend.rotations(end, x.shape[3] // 2, x.dtype))
        self.backend.rotate_pairs(x, cosines, -sines if back else sines, out=x)
