"""OutputLosses: the losses of a model with several outputs, as one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xpnet.backends import Backend
from xpnet.losses import Loss


def every_loss(loss: Loss) -> list[Loss]:
    """A loss and, if it is that of several outputs, the losses in it."""
    return [loss, *(loss.losses.values() if isinstance(loss, OutputLosses) else ())]


class OutputLosses(Loss):
    """The loss of a model with several outputs: Σ_k λ_k L_k, with a loss L_k of each output.

    losses: {output: loss}, in the order of the outputs.  loss_weights: {output: λ}.

    Outputs, targets and results are tuples, with one item for each output. The training step multiplies the gradients
    by λ, as it does by the weights of samples.
    """

    def __init__(self, losses: Mapping[str, Loss], loss_weights: Mapping[str, float]) -> None:
        self.losses, self.loss_weights = dict(losses), dict(loss_weights)

    @property
    def by_output(self) -> list[tuple[Loss, float]]:
        return [(loss, self.loss_weights[name]) for name, loss in self.losses.items()]

    def samples(self, backend: Backend, outputs: Any, targets: Any) -> Any:
        """The losses ℓ_i of the samples, (N,), for each output."""
        return tuple(loss.samples(backend, y, t) for loss, y, t in self._with(outputs, targets))

    def gradient(self, backend: Backend, outputs: Any, targets: Any) -> Any:
        return tuple(loss.gradient(backend, y, t) for loss, y, t in self._with(outputs, targets))

    def samples_and_gradient(self, backend: Backend, outputs: Any, targets: Any, out: Any = None) -> tuple[Any, Any]:
        buffers = [None] * len(outputs) if out is None else out
        pairs = [
            loss.samples_and_gradient(backend, y, t, out=buffer)
            for loss, y, t, buffer in self._with(outputs, targets, buffers)
        ]
        return tuple(samples for samples, _ in pairs), tuple(grad for _, grad in pairs)

    def _with(self, *values: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """The loss of each output, with what belongs to it."""
        return zip(self.losses.values(), *values, strict=True)
