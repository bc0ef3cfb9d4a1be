"""TrainingState: a model's loss, metrics, optimizer state and progress; Untrained: the same before any training."""

from typing import Any, NoReturn

from xpnet.config import number
from xpnet.errors import ArgumentError
from xpnet.layers.context import Context
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.optimizers import Optimizer, OptimizerState
from xpnet.parameters import ParameterStore
from xpnet.training.loss_scaling import LossScale


class Untrained:
    """The state of a model that has never been trained. It has no loss, metrics and optimizer to default to."""

    step = epoch = 0
    last_loss = None

    @property
    def loss(self) -> NoReturn:
        raise _no_loss()

    metrics = loss

    @property
    def optimizer(self) -> NoReturn:
        raise ArgumentError('the model was never trained: give an optimizer, such as optimizer="adam".')

    def begin(
        self, context: Context, loss: Loss | None, metrics: list[Metric] | None, optimizer: Optimizer
    ) -> "TrainingState":
        """The state with which training starts."""
        return TrainingState(context, loss, metrics, optimizer)

    def follow(self, store: ParameterStore) -> None:
        """Does nothing: there is no state that depends on the store."""


class TrainingState:
    """The loss and metrics, the optimizer and its state, and how far training has come.

    epoch: epochs completed.  rate_factor: multiplies the learning rate; callbacks lower it, because an optimizer is
    configuration only.  loss_scale: with float16 only.
    """

    def __init__(self, context: Context, loss: Loss | None, metrics: list[Metric] | None, optimizer: Optimizer) -> None:
        """loss, metrics: None in a custom training loop, which computes them itself."""
        optimizer.check_parameters(context.store)
        self.last_loss, self._metrics, self.optimizer = loss, metrics, optimizer
        self.loss_scale = _loss_scale(context, None)
        self.audited: set[tuple[type, ...]] = set()  # the custom classes of steps that were checked
        self._start_afresh(context.store)

    def begin(
        self, context: Context, loss: Loss | None, metrics: list[Metric] | None, optimizer: Optimizer
    ) -> "TrainingState":
        """Continue with an equal optimizer, or start afresh with a different one. None keeps the loss and metrics."""
        optimizer.check_parameters(context.store)
        if loss is not None:
            self.last_loss, self._metrics = loss, metrics
        self.loss_scale = _loss_scale(context, self.loss_scale)
        same = self.optimizer == optimizer and tuple(self.optimizer_state.slots) == tuple(optimizer.slots)
        self.optimizer = optimizer
        if same:
            self.follow(context.store)
        else:
            self._start_afresh(context.store)
        return self

    def _start_afresh(self, store: ParameterStore) -> None:
        self.optimizer_state, self._backend = OptimizerState(self.optimizer, store), store.backend
        self.epoch, self.rate_factor = 0, 1.0

    def follow(self, store: ParameterStore) -> None:
        """Follow the store, which has moved to another backend or dtype, or has grown."""
        self.optimizer_state.move(self._backend, store)
        self._backend = store.backend

    @property
    def loss(self) -> Loss:
        if self.last_loss is None:
            raise _no_loss()
        return self.last_loss

    @property
    def metrics(self) -> list[Metric]:
        if self._metrics is None:
            raise _no_loss()
        return self._metrics

    @property
    def step(self) -> int:
        return self.optimizer_state.step

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step. Setting it replaces a constant rate, and scales a schedule."""
        return self.rate_at(self.step)

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        value = number("", "learning_rate", value, at_least=0, finite=True)
        if not callable(self.optimizer.learning_rate):
            self.optimizer_state.constant_rate, self.rate_factor = float(value), 1.0
            return
        scheduled = self.optimizer.rate(self.step)
        if value and not scheduled:
            raise ArgumentError(
                f"learning_rate cannot be set to {value!r} now: the schedule gives 0 at step {self.step}, which no "
                "factor changes. Set it at another step, or use an optimizer without a schedule."
            )
        self.rate_factor = value / scheduled if value else 0.0

    def rate_at(self, step: int) -> float:
        """The learning rate after this number of steps, as it is set now."""
        return self.optimizer.rate_for(self.optimizer_state, step) * self.rate_factor

    def update(self, store: ParameterStore, gate: Any = None) -> None:
        """Update the parameters once from their gradients. gate: see `Optimizer.apply`."""
        self.optimizer.apply(store, self.optimizer_state, lambda: self.rate_factor, gate)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loss_scale": None, "audited": set()}  # the loss scale adapts again within a few steps


def _no_loss() -> ArgumentError:
    return ArgumentError('the model was never trained: give a loss, such as loss="softmax_cross_entropy".')


def _loss_scale(context: Context, before: LossScale | None) -> LossScale | None:
    return None if context.precision != "float16" else before or LossScale(context.backend)
