"""Evaluation: the loss and metrics of a dataset, by forward passes alone."""

from collections.abc import Sequence

from xpnet.data.dataset import Batch
from xpnet.data.streaming import AnyDataset
from xpnet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from xpnet.layers.containers import Container
from xpnet.layers.context import Workspace
from xpnet.losses import Loss
from xpnet.metrics import Metric
from xpnet.training.audit import audited_evaluation, custom_kinds
from xpnet.training.captured_inference import CapturedInference, InferencePass
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
    result, inference = EpochMetrics(model, loss, metrics), InferencePass(model, loss, metrics)
    kinds = custom_kinds(*(one for one, _ in loss.by_output), *metrics)
    captured: CapturedInference = model._inference  # type: ignore[attr-defined]  # of every model

    def add(batch: Batch) -> None:
        if kinds and kinds not in captured.audited:
            with audited_evaluation(model, loss, metrics) as checked_loss:
                add_eagerly(batch, checked_loss)
            captured.audited.add(kinds)
            return
        sums = captured.replayed(inference, batch)
        if sums is not None:
            result.add_sums(sums, batch)
        else:
            add_eagerly(batch, loss)

    def add_eagerly(batch: Batch, loss: Loss) -> None:
        outputs = model.forward_pass(batch.x, inference=True)
        outputs, batch = result.rows(outputs, batch, model.output_masks(inference=True))
        result.add(loss.samples(model.backend, outputs, batch.y), batch, outputs)

    for batch in dataset.batches(Workspace(model.context), batch_size, group=group):
        model.context.exclusively(add, batch)
    return result
