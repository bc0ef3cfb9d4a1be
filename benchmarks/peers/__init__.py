"""The peers: the libraries that are measured. Each has its module, which is imported only when it is measured."""

import contextlib
import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from benchmarks.nets import Net
from benchmarks.sequences import SequenceNet


class Peer(Protocol):
    """One library with one network at one batch size. `make(net, batch, device, option)` of its module creates it.

    Two methods are optional: `settings()`, see the function below, and `close()`, which releases resources.
    """

    #: The number of training steps that a call of `step` makes.
    steps_per_call: int = 1

    def step(self) -> None:
        """One training step on a batch in the device's memory: forward, loss, backward, update."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def epoch(self, x: Any, y: Any) -> float | None:
        """Train for one epoch on shuffled host arrays, and compute the mean loss and the accuracy.

        On a GPU, the arrays stay on the device after the first call. Returns the seconds if it measures them itself.
        """

    def predict(self, x: Any) -> Any:
        """Outputs for a host array, as a host array."""


class Kind(NamedTuple):
    """How a peer is created.

    module: its module in benchmarks.peers.  option: an argument of `make`, of several words.  environment: environment
    variables to set before.  only_dense: whether it supports only dense layers.  dtype: of the samples.
    precision: of matrix products and convolutions; everything else is in float32.
    """

    module: str
    option: str = ""
    environment: dict[str, str] = {}  # noqa: RUF012  # never changed
    only_dense: bool = False
    dtype: str = "float32"
    precision: str = "float32"


KINDS = {
    "xpnet": Kind("own"),
    "xpnet-plain": Kind("own", environment={"XPNET_FAST": "0"}),  # without compiled loops
    "xpnet-tf32": Kind("own", "tf32", precision="tf32"),
    "xpnet-bfloat16": Kind("own", "bfloat16", precision="bfloat16"),
    "xpnet-eager": Kind("own", environment={"XPNET_CAPTURE": "0"}),  # without a CUDA graph
    "xpnet-uint8": Kind("own", "uint8", dtype="uint8"),  # scaled in the step, as examples/mnist.py does
    "floor": Kind("floor"),  # only the matrix products of the network, a lower bound of the time
    "floor-tf32": Kind("floor", "tf32", precision="tf32"),
    "floor-bfloat16": Kind("floor", "bfloat16", precision="bfloat16"),
    # On the CPU, where everything is in float32.
    "torch": Kind("pytorch"),
    "torch-channels-last": Kind("pytorch", "channels-last"),
    "torch-compile": Kind("pytorch", "compile"),
    "jax": Kind("jax_"),
    "sklearn": Kind("sklearn_", only_dense=True),
}

# On a GPU, the precision is explicit, because the defaults differ: JAX uses TF32, PyTorch only for convolutions.
_NOT_ALL_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # JAX shares the GPU with other peers
KINDS["torch-bfloat16"] = Kind("pytorch", "bfloat16", precision="bfloat16")
for _precision in ("float32", "tf32"):
    for _name, _option in (("torch", ""), ("torch-graph", "graph "), ("torch-channels-last", "channels-last "),
                           ("torch-compile", "compile ")):  # fmt: skip
        KINDS[f"{_name}-{_precision}"] = Kind("pytorch", _option + _precision, precision=_precision)
    for _name, _option in (("jax", ""), ("jax-scan", "scan ")):
        KINDS[f"{_name}-{_precision}"] = Kind("jax_", _option + _precision, _NOT_ALL_MEMORY, precision=_precision)


def precision_of(name: str) -> str:
    """The precision of a peer's matrix products; float32 for a name that is not a peer's."""
    return KINDS[name].precision if name in KINDS else "float32"


def compared_with(name: str) -> str:
    """The name of the xpnet measurement that a peer is compared with, which has the same precision."""
    precision = precision_of(name)
    return "xpnet" if precision == "float32" or name.startswith("xpnet") else f"xpnet-{precision}"


def label(name: str) -> str:
    """A peer's name, with its precision."""
    precision = precision_of(name)
    return name if name.endswith(precision) else f"{name} ({precision})"


def can(name: str, net: Net) -> bool:
    """Whether this peer supports all layers of the network."""
    return not KINDS[name].only_dense or all(layer[0] in ("dense", "relu") for layer in net.layers)


def start(name: str, net: Net | SequenceNet, batch: int, device: str) -> Peer:
    kind = KINDS[name]
    module = kind.module if isinstance(net, Net) else f"{kind.module}_sequences"
    with _environment(kind.environment):
        peer: Peer = importlib.import_module(f"benchmarks.peers.{module}").make(net, batch, device, kind.option)
    return peer


def settings(peer: Peer) -> AbstractContextManager[Any]:
    """A context with the settings of this peer, which other peers in the same process may have changed."""
    return peer.settings() if hasattr(peer, "settings") else contextlib.nullcontext()


def close(peer: Peer) -> None:
    """Release the resources of a peer."""
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
