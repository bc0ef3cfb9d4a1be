"""The libraries that are compared: a file each, imported only in the process that measures it."""

import importlib
from typing import Any, NamedTuple, Protocol

from benchmarks.nets import Net


class Peer(Protocol):
    """One library, with one net at one batch size. `make(net, batch, device)` in its module makes it."""

    #: How many steps a call of `step` makes.
    steps_at_once: int = 1

    def step(self) -> None:
        """One training step on a batch that lies in memory: forward, loss, backward, update."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def epoch(self, x: Any, y: Any) -> float | None:
        """Train once through host arrays, shuffled, and learn the mean loss and the accuracy.

        On a GPU they lie on the device from the first call on. Where it took its own time, it tells the seconds.
        """

    def predict(self, x: Any) -> Any:
        """Outputs for a host array, as a host array."""


class Kind(NamedTuple):
    """How a peer is started: the module under benchmarks.peers, an option of its `make`, environment variables…"""

    module: str
    option: str = ""
    environment: dict[str, str] = {}  # noqa: RUF012  # never written to
    only_dense: bool = False
    dtype: str = "float32"  # of its samples


KINDS = {
    "xpnet": Kind("own"),
    "xpnet-plain": Kind("own", environment={"XPNET_FAST": "0"}),  # without the extra `fast`
    "xpnet-tf32": Kind("own", "tf32"),
    "xpnet-bfloat16": Kind("own", "bfloat16"),
    "xpnet-call-by-call": Kind("own", environment={"XPNET_CUDA_GRAPHS": "0"}),
    "xpnet-uint8": Kind("own", "uint8", dtype="uint8"),  # scaled in the step, as examples/mnist.py does
    "floor": Kind("floor"),  # the matrix products of the net and nothing else
    "floor-tf32": Kind("floor", "tf32"),
    "floor-bfloat16": Kind("floor", "bfloat16"),
    "torch": Kind("pytorch"),
    "torch-graph": Kind("pytorch", "graph"),
    "torch-channels-last": Kind("pytorch", "channels-last"),
    "torch-compile": Kind("pytorch", "compile"),
    "jax": Kind("jax_"),
    "jax-scan": Kind("jax_", "scan"),
    "sklearn": Kind("sklearn_", only_dense=True),
}


def can(name: str, net: Net) -> bool:
    """Whether this peer has all the net's layers."""
    return not KINDS[name].only_dense or all(layer[0] in ("dense", "relu") for layer in net.layers)


def start(name: str, net: Net, batch: int, device: str) -> Peer:
    kind = KINDS[name]
    peer: Peer = importlib.import_module(f"benchmarks.peers.{kind.module}").make(net, batch, device, kind.option)
    return peer
