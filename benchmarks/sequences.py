"""The networks on sequences that are measured on a GPU, described in data, from which each library builds its own."""

from typing import NamedTuple, TypeAlias

import numpy


class GPT(NamedTuple):
    """A transformer that predicts the next token, with AdamW and clipping, without biases."""

    blocks: int = 6
    width: int = 384
    heads: int = 6
    context: int = 256
    vocabulary: int = 65

    def samples(self, count: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(tokens, next tokens), (count, context)."""
        tokens = numpy.random.default_rng(0).integers(self.vocabulary, size=(count, self.context + 1))
        return tokens[:, :-1].copy(), tokens[:, 1:].copy()


class LSTM(NamedTuple):
    """One LSTM, whose outputs have a squared error, with SGD."""

    features: int = 128
    units: int = 256
    steps: int = 128

    def samples(self, count: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(inputs (count, steps, features), targets (count, steps, units))."""
        rng = numpy.random.default_rng(0)
        x, y = (rng.random((count, self.steps, size), dtype=numpy.float32) for size in (self.features, self.units))
        return x, y


class Attention(NamedTuple):
    """Causal self-attention by itself, forward and backward."""

    heads: int = 6
    size: int = 64
    steps: int = 256

    def samples(self, count: int) -> list[numpy.ndarray]:
        """Queries, keys, values and the gradient of the results, (count, steps, heads, size)."""
        rng = numpy.random.default_rng(0)
        return [rng.standard_normal((count, self.steps, self.heads, self.size), dtype=numpy.float32) for _ in range(4)]


SequenceNet: TypeAlias = GPT | LSTM | Attention

NETS: dict[str, SequenceNet] = {"attention": Attention(), "gpt": GPT(), "lstm": LSTM()}
SMALL: dict[str, SequenceNet] = {  # for an emulated GPU
    "attention": Attention(2, 8, 5), "gpt": GPT(1, 16, 2, 6, 11), "lstm": LSTM(3, 4, 5),
}  # fmt: skip
