"""The libraries that are compared: a file each, imported only in the process that measures it."""

import contextlib
import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from benchmarks.nets import Net


class Peer(Protocol):
    """One library, with one net at one batch size. `make(net, batch, device, option)` in its module makes it.

    Two methods are optional: `turn()`, see the function below, and `close()`, which gives back what the peer holds.
    """

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
    """How a peer is started.

    module: under benchmarks.peers.  option: words for its `make`.  environment: variables that must be set then.
    dtype: of its samples.  precision: of its matrix products and convolutions; everything else is in float32.
    """

    module: str
    option: str = ""
    environment: dict[str, str] = {}  # noqa: RUF012  # never written to
    only_dense: bool = False
    dtype: str = "float32"
    precision: str = "float32"


KINDS = {
    "xpnet": Kind("own"),
    "xpnet-plain": Kind("own", environment={"XPNET_FAST": "0"}),  # without the extra `fast`
    "xpnet-tf32": Kind("own", "tf32", precision="tf32"),
    "xpnet-bfloat16": Kind("own", "bfloat16", precision="bfloat16"),
    "xpnet-eager": Kind("own", environment={"XPNET_CUDA_GRAPHS": "0"}),  # without a CUDA graph
    "xpnet-uint8": Kind("own", "uint8", dtype="uint8"),  # scaled in the step, as examples/mnist.py does
    "floor": Kind("floor"),  # the matrix products of the net and nothing else
    "floor-tf32": Kind("floor", "tf32", precision="tf32"),
    "floor-bfloat16": Kind("floor", "bfloat16", precision="bfloat16"),
    # On the CPU, where all work is in float32.
    "torch": Kind("pytorch"),
    "torch-channels-last": Kind("pytorch", "channels-last"),
    "torch-compile": Kind("pytorch", "compile"),
    "jax": Kind("jax_"),
    "sklearn": Kind("sklearn_", only_dense=True),
}

# On a GPU, where the defaults differ: JAX computes in TF32, PyTorch its convolutions only. So each peer says which.
_NOT_ALL_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # JAX shares the GPU with the others
for _precision in ("float32", "tf32"):
    for _name, _option in (("torch", ""), ("torch-graph", "graph "), ("torch-channels-last", "channels-last "),
                           ("torch-compile", "compile ")):  # fmt: skip
        KINDS[f"{_name}-{_precision}"] = Kind("pytorch", _option + _precision, precision=_precision)
    for _name, _option in (("jax", ""), ("jax-scan", "scan ")):
        KINDS[f"{_name}-{_precision}"] = Kind("jax_", _option + _precision, _NOT_ALL_MEMORY, precision=_precision)


def precision_of(name: str) -> str:
    """The precision of a peer's products; float32 for what is no peer."""
    return KINDS[name].precision if name in KINDS else "float32"


def compared_with(name: str) -> str:
    """Which of xpnet's figures a peer's is compared with: that of the same precision."""
    precision = precision_of(name)
    return "xpnet" if precision == "float32" or name.startswith("xpnet") else f"xpnet-{precision}"


def label(name: str) -> str:
    """A peer's name, with its precision."""
    precision = precision_of(name)
    return name if name.endswith(precision) else f"{name} ({precision})"


def can(name: str, net: Net) -> bool:
    """Whether this peer has all the net's layers."""
    return not KINDS[name].only_dense or all(layer[0] in ("dense", "relu") for layer in net.layers)


def start(name: str, net: Net, batch: int, device: str) -> Peer:
    kind = KINDS[name]
    with _environment(kind.environment):
        peer: Peer = importlib.import_module(f"benchmarks.peers.{kind.module}").make(net, batch, device, kind.option)
    return peer


def turn(peer: Peer) -> AbstractContextManager[Any]:
    """A context for the work of this peer: settings of its library that other peers in this process have changed."""
    return peer.turn() if hasattr(peer, "turn") else contextlib.nullcontext()


def close(peer: Peer) -> None:
    """Give back what the peer holds."""
    if hasattr(peer, "close"):
        peer.close()


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]
