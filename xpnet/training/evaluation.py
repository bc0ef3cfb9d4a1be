"""Evaluation: the loss and metrics of a dataset, by forward passes alone."""

from collections.abc import Sequence

from xpnet.data.dataset import Batch
from xpnet.data.streaming import AnyDataset
from xpnet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from xpnet.layers.containers import Container
from xpnet.layers.context import Workspace
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.training.epoch_metrics import EpochMetrics


def evaluate(
    model: Container,
    dataset: AnyDataset,
    loss: Loss,
    metrics: Sequence[Metric],
    batch_size: int | None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> EpochMetrics:
    """The loss and metrics over the samples of this rank, in a workspace separate from that of training."""
    result = EpochMetrics(model, loss, metrics)

    def add(batch: Batch) -> None:
        outputs = model.forward_pass(batch.x, inference=True)
        result.add(loss.samples(model.backend, outputs, batch.y), batch, outputs)

    for batch in dataset.batches(Workspace(model.context), batch_size, group=group):
        model.context.exclusively(add, batch)
    return result
