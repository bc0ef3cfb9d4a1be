"""xpnet: training steps of a GPT and of an LSTM, and attention by itself as a CUDA graph."""

import math
from typing import Any

import xpnet
from benchmarks.peers.own import Steps
from benchmarks.sequences import GPT, LSTM, Attention, SequenceNet
from xpnet import layers, losses, optimizers


def make(net: SequenceNet, batch: int, device: str, option: str) -> Any:
    precision = option or None
    if isinstance(net, Attention):
        return AttentionSteps(net, batch, device, option or "float32")
    if isinstance(net, LSTM):
        stack, shape, loss = [layers.LSTM(net.units)], (net.steps, net.features), losses.MeanSquaredError()
        optimizer: Any = optimizers.SGD(0.01)
    else:
        assert isinstance(net, GPT)
        blocks = [layers.TransformerBlock(net.heads, use_bias=False) for _ in range(net.blocks)]
        ends = [layers.LayerNorm(center=False), layers.Dense(net.vocabulary, use_bias=False)]
        stack = [layers.Embedding(net.vocabulary, net.width), layers.PositionalEmbedding(net.context), *blocks, *ends]
        shape, loss = (net.context,), losses.SoftmaxCrossEntropy()
        optimizer = optimizers.AdamW(1e-3, 0.9, 0.99, weight_decay=0.1, clip_norm=1.0)
    model = xpnet.Sequential(stack, shape, backend=device, precision=precision)
    return Steps(model, loss, optimizer, net.samples, batch, batches=4)


class AttentionSteps:
    """Causal self-attention, forward and backward."""

    def __init__(self, net: Attention, batch: int, device: str, precision: str) -> None:
        self.backend: Any = xpnet.get_backend(device)
        q, k, v, grad = map(self.backend.asarray, net.samples(batch))
        out, *grads = (self.backend.empty(q.shape, "float32") for _ in range(4))
        log_sums = self.backend.empty((batch, net.heads, net.steps), "float32")
        given = q, k, v, 1.0 / math.sqrt(net.size), True, None, None, out, log_sums

        def work() -> None:
            with self.backend.matmul_precision(precision):
                self.backend.attention(*given)
                self.backend.attention_grad(*given, grad, *grads)

        self._graph = self.backend.graph_capture().graph()
        with self._graph.memory_pool():
            work()
        self._graph.capture(work)
        self._graph.hold([q, k, v, out, log_sums, grad, *grads])

    def step(self) -> None:
        self._graph.replay()

    def synchronize(self) -> None:
        self.backend.synchronize()
