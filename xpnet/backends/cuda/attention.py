"""Attention by kernels that keep the scores in tiles: which kernel computes what, and its launch.

attention.cu has the templates of the kernels. Each instance that a network needs is a module of its own, which is
compiled when it is first used.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy

from xpnet.backends.arrays import Array
from xpnet.backends.cuda.kernels import read_source
from xpnet.backends.cuda.launching import KernelLauncher
from xpnet.backends.reference.attention import ProbabilityDropout

TEMPLATES = read_source("random.cu", "instructions.cu", "attention.cu")

_FLOAT32 = numpy.dtype("float32")
_WORD = 4  # bytes
_QUAD = 4  # numbers that kernels load at once
_ROWS, _THREADS = 64, 128  # of a block
_MOST_TILES = 2**16 - 1  # of an axis of the grid
_SIZES = (16, 32, 64, 128)  # of heads; zeros are added to others
_FIRST_CAPABILITY = 8  # with the tensor cores that instructions.cu uses
_SHARED_MEMORY = 48 * 2**10  # bytes of a block that every device has
_GIVEN = (
    "Heads q, Heads k, Heads v, Sizes sizes, const Byte* mask, double scale, const double* word, "
    "Index first_row, Word threshold, double kept, "
)
_ARGUMENTS = {
    "attend": _GIVEN + "Heads out, float* log_sums",
    "attend_query_grad": _GIVEN + "Heads out, const float* log_sums, Heads grad, Heads grad_q, float* products",
    "attend_key_grads": _GIVEN + "const float* log_sums, Heads grad, const float* products, Heads grad_k, Heads grad_v",
}


class Kernel(NamedTuple):
    """An instance of a template of attention.cu, for heads of at most `size` numbers."""

    name: str
    precision: str
    size: int
    dropout: bool

    @property
    def columns(self) -> int:
        """The rows of a tile. Sums of larger heads leave fewer registers and less shared memory for them."""
        return 64 if self.name == "attend" and self.size < 128 else 32

    @property
    def definition(self) -> str:
        """The C++ text that follows the templates."""
        numbers = f"{self.size}, {self.columns}>"
        product = f"Exact<{numbers}" if self.precision == "float32" else f"Tensor<{self.precision.upper()}, {numbers}"
        names = ", ".join(argument.split()[-1] for argument in _ARGUMENTS[self.name].split(","))
        function = f"{self.name}<{product}, {str(self.dropout).lower()}, {self.shared_bytes // _WORD}>"
        head = f"KERNEL __launch_bounds__({_THREADS}) {self.name}_kernel({_ARGUMENTS[self.name]})"
        return f"\n{head} {{\n    {function}({names});\n}}\n"

    @property
    def shared_bytes(self) -> int:
        """The shared memory of a block: what `words_of_…` of attention.cu returns."""
        tensor, each = self.precision != "float32", 1 if self.precision in ("float32", "tf32") else 2
        inner = self.size // each + (8 if tensor else 4)
        outer = (self.size + 8) // each if tensor else inner
        both = inner if each == 1 else inner + outer
        scratch = 0 if tensor else _ROWS * (self.columns + 4)
        own, tiles = {
            "attend": (inner, inner + outer),
            "attend_query_grad": (2 * inner, both + inner),
            "attend_key_grads": (2 * inner, 2 * both),
        }[self.name]
        return _WORD * (_ROWS * own + self.columns * tiles + scratch)


class CUDAAttention(KernelLauncher):
    """A backend on CuPy with kernels for attention."""

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
        kernel = self._attention_kernel("attend", (q, k, v, out), mask, dropout, log_sums)
        if kernel is None:
            return super().attention(q, k, v, scale, causal, mask, dropout, out, log_sums)
        given = self._attention_arguments(q, k, v, scale, causal, mask, dropout)
        self._launch_attention(kernel, q, {**given, "out": _heads(out), "log_sums": log_sums})
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
        arrays = (q, k, v, out, grad, grad_q, grad_k, grad_v)
        of_queries, of_keys = (
            self._attention_kernel(name, arrays, mask, dropout, log_sums)
            for name in ("attend_query_grad", "attend_key_grads")
        )
        if of_queries is None or of_keys is None:
            given = q, k, v, scale, causal, mask, dropout
            super().attention_grad(*given, out, log_sums, grad, grad_q, grad_k, grad_v)
            return
        arguments = self._attention_arguments(q, k, v, scale, causal, mask, dropout)
        products = self.xp.empty(log_sums.shape, dtype=_FLOAT32)
        arguments |= {"log_sums": log_sums, "products": products, "grad": _heads(grad)}
        self._launch_attention(of_queries, q, {**arguments, "out": _heads(out), "grad_q": _heads(grad_q)})
        self._launch_attention(of_keys, k, {**arguments, "grad_k": _heads(grad_k), "grad_v": _heads(grad_v)})

    def _attention_kernel(
        self, name: str, heads: Sequence[Array], mask: Array | None, dropout: Any, log_sums: Array
    ) -> Kernel | None:
        """The kernel of this name for arrays (N, T or S, H, D); None if only the formula accepts them."""
        size, steps = heads[0].shape[3], max(a.shape[1] for a in heads)
        contiguous = log_sums.flags.c_contiguous and (mask is None or (mask.flags.c_contiguous and mask.dtype == bool))
        fits = contiguous and log_sums.dtype == _FLOAT32 and size <= _SIZES[-1] and steps <= _ROWS * _MOST_TILES
        if not (fits and all(map(_loads_quads, heads))) or self.kernels_unavailable:
            return None
        precision = self.thread.precision if self.capability >= _FIRST_CAPABILITY else None
        padded = next(most for most in _SIZES if size <= most)
        kernel = Kernel(name, precision or "float32", padded, dropout is not None)
        most_bytes = self.properties.get("sharedMemPerBlockOptin", _SHARED_MEMORY)
        return kernel if kernel.shared_bytes <= most_bytes else None

    def _attention_arguments(
        self,
        q: Array,
        k: Array,
        v: Array,
        scale: float,
        causal: bool,
        mask: Array | None,
        dropout: ProbabilityDropout | None,
    ) -> dict[str, Any]:
        """The arguments that all three kernels have."""
        noise: dict[str, Any] = {"word": None, "first_row": 0, "threshold": 0, "kept": 1.0}
        if dropout is not None:
            key, rate, first_row = dropout
            word, threshold = self.step_word(key), int(rate * 2**32)
            noise = {"word": word, "first_row": first_row, "threshold": threshold, "kept": 1.0 / (1.0 - rate)}
        sizes = [q.shape[2], q.shape[1], k.shape[1], q.shape[3], int(causal)]
        arrays = {"q": _heads(q), "k": _heads(k), "v": _heads(v)}
        return {**arrays, "sizes": sizes, "mask": mask, "scale": scale, **noise}

    def _launch_attention(self, kernel: Kernel, rows: Array, given: dict[str, Any]) -> None:
        """Launch a kernel whose blocks have rows of this array (N, T, H, D)."""
        grid = len(rows) * rows.shape[2], -(-rows.shape[1] // _ROWS)
        name, shared_bytes = f"{kernel.name}_kernel", kernel.shared_bytes
        self.instances(kernel, TEMPLATES).launch(name, _FLOAT32, grid, (_THREADS,), given, shared_bytes)


def _loads_quads(a: Array) -> bool:
    """Whether kernels can load four numbers at once from an array (N, T, H, D)."""
    strides = [stride for stride, size in zip(a.strides[:3], a.shape[:3], strict=True) if size > 1]
    aligned = all(stride % (_QUAD * _WORD) == 0 for stride in (a.data.ptr, *strides))
    return bool(aligned and a.dtype == _FLOAT32 and a.size and a.shape[3] % _QUAD == 0 and a.strides[3] == _WORD)


def _heads(a: Array) -> list[int]:
    """The fields of a struct Heads."""
    return [a.data.ptr, *[stride // a.itemsize for stride in a.strides[:3]]]
