"""The training of examples/mnist.py, model "mlp", as a PyTorch script without a DataLoader.

    python benchmarks/peers/mnist_pytorch.py FOLDER_OF_MNIST

The same files, net, batch size, optimizer, schedule and metrics, with the data in memory. One line per epoch.
"""

import gzip
import sys
from pathlib import Path

import numpy
import torch
from torch import nn
from torch.nn import functional

BATCH, EPOCHS, PEAK_RATE, WEIGHT_DECAY = 128, 12, 8e-3, 0.02
HEADER_BYTES = {"images": 16, "labels": 8}


def read(folder: Path, part: str, kind: str) -> torch.Tensor:
    """A file of MNIST, such as ("train", "images"), as uint8."""
    (path,) = folder.glob(f"{part}-{kind}*ubyte*")
    with (gzip.open if path.suffix == ".gz" else open)(path) as file:
        content = bytearray(file.read())
    return torch.from_numpy(numpy.frombuffer(content, numpy.uint8, offset=HEADER_BYTES[kind]))


def main(folder: Path, epochs: int = EPOCHS) -> None:
    x, _ = (read(folder, part, "images").view(-1, 784) for part in ("train", "t10k"))
    y, _ = (read(folder, part, "labels").long() for part in ("train", "t10k"))
    x = x.float().div_(255)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    for epoch in range(1, epochs + 1):
        total, hits = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for rows in torch.randperm(len(x)).split(BATCH):
            targets = y[rows]
            outputs = model(x[rows])
            loss = functional.cross_entropy(outputs, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                total += loss * len(rows)
                hits += (outputs.argmax(1) == targets).sum()
        loss, accuracy = total.item() / len(x), hits.item() / len(x)
        print(f"epoch {epoch}/{EPOCHS}  loss {loss:.4f}  accuracy {accuracy:.4f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
