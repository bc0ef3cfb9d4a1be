"""PyTorch: eager, eager with channels last, compiled, or its step as a CUDA graph; fused optimizer, data in memory.

The option has the words "channels-last", "compile" and "graph"; on a GPU also "float32", "tf32" or "bfloat16" (by
autocast), the precision of matrix products and convolutions. This is a setting of the whole process, so each peer sets
its own in `settings`.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

from benchmarks.nets import RATES, Net, shapes
from benchmarks.samples import batch_of


class PyTorch:
    def __init__(self, net: Net, batch: int, device: str, option: str) -> None:
        words = option.split()
        self.tf32 = {"float32": False, "tf32": True}.get(words[-1]) if words else None
        self.bfloat16 = "bfloat16" in words
        torch.manual_seed(0)
        self.device, self.batch = torch.device("cuda" if device.startswith("gpu") else "cpu"), batch
        self.images = len(net.input_shape) == 3
        last = self.images and "channels-last" in words
        self.layout = torch.channels_last if last else torch.contiguous_format
        self.model = nn.Sequential(*_layers(net)).to(self.device, memory_format=self.layout)
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[net.optimizer]
        graph = "graph" in words and self.device.type == "cuda"
        # By default, Adam counts its steps on the host, which a graph cannot capture.
        more = {"capturable": True} if graph and net.optimizer == "adam" else {}
        self.optimizer = kind(self.model.parameters(), lr=RATES[net.optimizer], fused=True, **more)
        self.network = torch.compile(self.model) if "compile" in words else self.model
        x, y = batch_of(net, batch)
        self.x, self.y = self.tensor(x), torch.from_numpy(y).to(self.device)
        self._uploaded: tuple = ()
        if graph:
            with self.settings():
                self._replay = self._captured()

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Set the precision of this peer."""
        if self.tf32 is not None:
            torch.backends.cuda.matmul.allow_tf32 = self.tf32
            torch.backends.cudnn.allow_tf32 = self.tf32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            yield

    def _captured(self) -> Callable[[], None]:
        """The step on (self.x, self.y) as a CUDA graph, as in PyTorch's manual. Replays write to `self.outputs`."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._train(self.x, self.y)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        # "thread_local", because calls in the threads of other libraries must not invalidate this capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.outputs = self._train(self.x, self.y)
        return graph.replay

    def tensor(self, x) -> torch.Tensor:
        tensor = torch.from_numpy(x).to(self.device)
        return tensor.permute(0, 3, 1, 2).contiguous(memory_format=self.layout) if self.images else tensor

    def step(self) -> None:
        if self._replay is not None:
            self._replay()
        else:
            self._train(self.x, self.y)

    _replay: Callable[[], None] | None = None

    def _train(self, x, y) -> tuple[torch.Tensor, torch.Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        outputs = self.network(x)
        loss = functional.cross_entropy(outputs, y)
        loss.backward()
        self.optimizer.step()
        return loss, outputs

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def epoch(self, x, y) -> None:
        if not self._uploaded or self.device.type == "cpu":
            self._uploaded = self.tensor(x), torch.from_numpy(y).to(self.device)
        x, y = self._uploaded
        hits, total = torch.zeros((), dtype=torch.int64, device=self.device), torch.zeros((), device=self.device)
        for rows in torch.randperm(len(x), device=self.device).split(self.batch):
            targets = y[rows]
            if self._replay is not None and len(rows) == self.batch:
                self.x.copy_(x[rows])
                self.y.copy_(targets)
                self._replay()
                loss, outputs = self.outputs
            else:
                loss, outputs = self._train(x[rows], targets)
            with torch.no_grad():
                total += loss * len(rows)
                hits += (outputs.argmax(1) == targets).sum()
        total.item(), hits.item()

    def predict(self, x):
        with torch.inference_mode():
            return self.network(self.tensor(x)).cpu().numpy()


def _layers(net: Net) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for layer, before, _ in shapes(net):
        match layer:
            case ("conv", filters, kernel, padding):
                modules.append(nn.Conv2d(before[-1], filters, kernel, padding=padding))
            case ("dense", units):
                modules.append(nn.Linear(before[0], units))
            case ("dropout", rate):
                modules.append(nn.Dropout(rate))
            case ("flatten",):
                modules.append(nn.Flatten())
            case ("pool", size):
                modules.append(nn.MaxPool2d(size))
            case ("relu",):
                modules.append(nn.ReLU())
    return modules


def make(net: Net, batch: int, device: str, option: str) -> PyTorch:
    return PyTorch(net, batch, device, option)
