"""PyTorch, eager: training steps of a GPT and of an LSTM, and attention by itself; bfloat16 by autocast."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

from benchmarks.sequences import GPT, LSTM, Attention, SequenceNet


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.projections = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.expand, self.contract = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        parts = self.projections(self.norm1(x)).split(c, dim=2)
        q, k, v = (part.view(n, t, self.heads, -1).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = x + self.output(attended.transpose(1, 2).reshape(n, t, c))
        return h + self.contract(functional.gelu(self.expand(self.norm2(h))))


class Transformer(nn.Module):
    def __init__(self, net: GPT) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(net.vocabulary, net.width), nn.Embedding(net.context, net.width)
        self.blocks = nn.Sequential(*[Block(net.width, net.heads) for _ in range(net.blocks)])
        self.norm = nn.LayerNorm(net.width, bias=False)
        self.head = nn.Linear(net.width, net.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions.weight)))


class PyTorchSequences:
    def __init__(self, net: SequenceNet, batch: int, device: str, precision: str) -> None:
        self.device, self.precision = torch.device("cuda" if device.startswith("gpu") else "cpu"), precision
        torch.manual_seed(0)
        self.samples = [torch.from_numpy(a).to(self.device) for a in net.samples(batch)]
        if isinstance(net, Attention):
            self._step = self._attention()
        elif isinstance(net, LSTM):
            self._step = self._training_of_lstm(net)
        else:
            self._step = self._training_of_gpt(net)

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Set the precision of this peer."""
        tf32 = self.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            yield

    def step(self) -> None:
        self._step()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _attention(self) -> Callable[[], object]:
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        q, k, v, grad = (a.to(dtype).transpose(1, 2) for a in self.samples)
        given = [a.requires_grad_() for a in (q, k, v)]

        def step() -> object:
            return torch.autograd.grad(functional.scaled_dot_product_attention(*given, is_causal=True), given, grad)

        return step

    def _training_of_lstm(self, net: LSTM) -> Callable[[], object]:
        model = nn.LSTM(net.features, net.units, batch_first=True).to(self.device)
        optimizer, (x, y) = torch.optim.SGD(model.parameters(), 0.01, fused=True), self.samples

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            functional.mse_loss(model(x)[0], y).backward()
            optimizer.step()

        return step

    def _training_of_gpt(self, net: GPT) -> Callable[[], object]:
        model = Transformer(net).to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.99), weight_decay=0.1, fused=True)
        x, y = self.samples

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return step


def make(net: SequenceNet, batch: int, device: str, option: str) -> PyTorchSequences:
    return PyTorchSequences(net, batch, device, option)
