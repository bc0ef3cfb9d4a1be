"""A process that trains a small GPT, with xpnet or PyTorch, for `benchmarks.gpt`.

    python -m benchmarks.gpt_worker xpnet
    python -m benchmarks.gpt_worker torch

It reads one question per line and prints the answer. `step`: the seconds per step of the next steps of one training.
`memory`: the most bytes of memory that the process has held.  `loss`: that of these steps.
"""

import sys
import time
from collections.abc import Callable

import numpy as np

VOCABULARY, CONTEXT, BATCH, WIDTH, HEADS, BLOCKS = 65, 64, 12, 128, 4, 4
STEPS = 20  # of one measurement
RATE, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0


def problem() -> tuple[np.ndarray, np.ndarray]:
    """(tokens, the tokens after them), (N, CONTEXT), for one measurement. Each token depends on the one before."""
    rng = np.random.default_rng(0)
    successors = rng.integers(VOCABULARY, size=(VOCABULARY, 3))
    tokens = [rng.integers(VOCABULARY, size=STEPS * BATCH)]
    for _ in range(CONTEXT):
        tokens.append(successors[tokens[-1], rng.integers(3, size=STEPS * BATCH)])
    sequences = np.stack(tokens, axis=1)
    return sequences[:, :-1].copy(), sequences[:, 1:].copy()


def by_xpnet(answer: Callable[[float, float], bool]) -> None:
    """Train until `answer`, which is given the seconds and the loss of each epoch, returns False."""
    import xpnet
    from xpnet import callbacks, layers, optimizers

    class Answer(callbacks.Callback):
        def on_epoch_begin(self, model: object, epoch: int) -> None:
            self.begin = time.perf_counter()

        def on_epoch_end(self, model: object, epoch: int, logs: dict[str, float]) -> None:
            seconds = time.perf_counter() - self.begin
            if not answer(seconds, logs["loss"]):
                self.stop("measured")

    model = xpnet.Sequential(
        [
            layers.Embedding(VOCABULARY, WIDTH),
            layers.PositionalEmbedding(CONTEXT),
            *[layers.TransformerBlock(HEADS, use_bias=False) for _ in range(BLOCKS)],
            layers.LayerNorm(center=False),
            layers.Dense(VOCABULARY, use_bias=False),
        ],
        input_shape=(CONTEXT,),
        backend="cpu",
    )
    x, y = problem()
    optimizer = optimizers.AdamW(RATE, *BETAS, weight_decay=DECAY, clip_norm=CLIP)
    model.fit(x, y, optimizer=optimizer, epochs=10**6, batch_size=BATCH, callbacks=[Answer()], metrics=[], verbose=0)


def by_pytorch(answer: Callable[[float, float], bool]) -> None:
    """The same training with PyTorch, eager, with its fused kernels of attention and AdamW."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
            self.projections = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.output = nn.Linear(WIDTH, WIDTH, bias=False)
            self.expand = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
            self.contract = nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, t, c = x.shape
            q, k, v = (
                part.view(n, t, HEADS, -1).transpose(1, 2) for part in self.projections(self.norm1(x)).split(c, dim=2)
            )
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = x + self.output(attended.transpose(1, 2).reshape(n, t, c))
            return h + self.contract(functional.gelu(self.expand(self.norm2(h))))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
            self.blocks = nn.Sequential(*[Block() for _ in range(BLOCKS)])
            self.norm = nn.LayerNorm(WIDTH, bias=False)
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
            return self.head(self.norm(self.blocks(x)))

    torch.manual_seed(0)
    model, rng = GPT(), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, BETAS, weight_decay=DECAY, fused=True)
    x, y = map(torch.from_numpy, problem())
    while True:
        begin, losses = time.perf_counter(), []
        for rows in torch.from_numpy(rng.permutation(len(x))).split(BATCH):
            loss = functional.cross_entropy(model(x[rows]).flatten(0, 1), y[rows].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())
        if not answer(time.perf_counter() - begin, mean):
            return


def peak_memory() -> float:
    """The most bytes of memory that this process has held."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main(kind: str) -> None:
    waiting = False  # whether a question for the seconds of the next steps is not answered yet
    epochs = 0

    def answer(seconds: float, loss: float) -> bool:
        nonlocal waiting, epochs
        epochs += 1
        if epochs < 8:  # in which steps are captured and compared
            return True
        if waiting:
            print(seconds / STEPS, flush=True)
        elif epochs == 8:
            print("ready", flush=True)
        for line in sys.stdin:
            if line.strip() == "step":
                waiting = True
                return True
            print(loss if line.strip() == "loss" else peak_memory(), flush=True)
        return False

    (by_xpnet if kind == "xpnet" else by_pytorch)(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
