"""Snapshots of everything that a training step changes."""

from xpnet.parameters import Snapshot
from xpnet.training.epoch_metrics import EpochMetrics
from xpnet.training.step import TrainingStep

#: The name of the gradient in a snapshot.
GRADIENT = "the gradient"


def snapshot(step: TrainingStep, metrics: EpochMetrics) -> Snapshot:
    """Everything that a step changes, as it is now."""
    store, state, scale = step.model.context.store, step.state, step.state.loss_scale
    arrays = {GRADIENT: store.grads}
    arrays |= {f"the optimizer's {name}": vector for name, vector in state.optimizer_state.slots.items()}
    arrays |= {f"the {name}": array for name, array in metrics.arrays.items()}
    if scale is not None:
        arrays |= {"the loss scale": scale.state, "its gate": scale.gate}
    return Snapshot(store, lambda: arrays)


def follow_new_sums(states: Snapshot, metrics: EpochMetrics) -> None:
    """Let a snapshot also undo sums in arrays that were made since: in the first step, or for the first weights."""
    known = states.arrays()
    for name, array in metrics.arrays.items():
        if known.get(f"the {name}") is not array:
            states.replace(f"the {name}", array)
