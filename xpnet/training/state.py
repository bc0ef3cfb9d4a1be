"""TrainingState: a model's loss, metrics, optimizer state and progress; Untrained: the same before any training."""

from typing import Any, NoReturn

from xpnet.backends import Backend
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
    running = False

    @property
    def loss(self) -> NoReturn:
        raise ArgumentError('the model was never trained: give a loss, such as loss="softmax_cross_entropy".')

    metrics = loss

    @property
    def optimizer(self) -> NoReturn:
        raise ArgumentError('the model was never trained: give an optimizer, such as optimizer="adam".')

    def begin(self, context: Context, loss: Loss, metrics: list[Metric], optimizer: Optimizer) -> "TrainingState":
        """The state with which training starts."""
        return TrainingState(context, loss, metrics, optimizer)

    def move(self, source: Backend, store: ParameterStore) -> None:
        """Does nothing: there is no state to move."""


class TrainingState:
    """The loss and metrics, the optimizer and its state, and how far training has come.

    epoch: epochs completed.  rate_factor: multiplies the learning rate; callbacks lower it, because an optimizer is
    configuration only.  loss_scale: with float16 only.
    """

    def __init__(self, context: Context, loss: Loss, metrics: list[Metric], optimizer: Optimizer) -> None:
        self.loss, self.metrics, self.optimizer = loss, metrics, optimizer
        self._guard, self.loss_scale = context.guard, _loss_scale(context, None)
        self._start_afresh(context.store)

    def begin(self, context: Context, loss: Loss, metrics: list[Metric], optimizer: Optimizer) -> "TrainingState":
        """Continue with an equal optimizer, or start afresh with a different one."""
        self.loss, self.metrics, self.loss_scale = loss, metrics, _loss_scale(context, self.loss_scale)
        same = self.optimizer == optimizer and tuple(self.optimizer_state.slots) == tuple(optimizer.slots)
        self.optimizer = optimizer
        if not same:
            self._start_afresh(context.store)
        return self

    def _start_afresh(self, store: ParameterStore) -> None:
        self.optimizer_state = OptimizerState(self.optimizer, store)
        self.epoch, self.rate_factor = 0, 1.0

    def move(self, source: Backend, store: ParameterStore) -> None:
        """Follow the store, which has moved from `source` to another backend or dtype."""
        self.optimizer_state.move(source, store)

    @property
    def running(self) -> bool:
        """Whether fit is running."""
        return self._guard.in_training

    @property
    def step(self) -> int:
        return self.optimizer_state.step

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.optimizer.rate(self.step) * self.rate_factor

    def update(self, store: ParameterStore) -> None:
        """Update the parameters once from their gradients."""
        gate = None if self.loss_scale is None else self.loss_scale.gate
        self.optimizer.apply(store, self.optimizer_state, lambda: self.rate_factor, gate)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loss_scale": None}  # the loss scale adapts again within a few steps


def _loss_scale(context: Context, before: LossScale | None) -> LossScale | None:
    return None if context.precision != "float16" else before or LossScale(context.backend)
