"""The scale of numeric targets: a warning if a training is too short to reach it."""

from xpnet.config import is_custom
from xpnet.data.dataset import Dataset
from xpnet.layers import Dense
from xpnet.layers.structure import as_tuple
from xpnet.losses import HalfSquaredError, Huber, MeanAbsoluteError, MeanSquaredError
from xpnet.optimizers import SGD
from xpnet.training.arguments import warn
from xpnet.training.outputs import last_layers
from xpnet.training.run import Run

_LOSSES = (MeanSquaredError, HalfSquaredError, MeanAbsoluteError, Huber)
# Measured with nets of two Dense layers and Adam: beyond these limits, they explain little of the variance of y.
_LARGE_SIZE, _LARGE_SIZE_PER_REACH = 10.0, 50.0
_SMALL_DEVIATION, _SMALL_DEVIATION_TIMES_REACH = 0.05, 0.02


def warn_of_unscaled_targets(run: Run) -> None:
    """Warn if numeric targets are too large or too small for the steps of the first training. Reads the device.

    With Adam and its relatives, a step moves a weight by about the learning rate, however large the gradient is. A
    schedule, a custom optimizer, and a last layer that may scale the outputs are not judged.
    """
    state, dataset, model = run.state, run.dataset, run.model
    optimizer, steps = state.optimizer, run.updates_per_epoch
    rate = optimizer.learning_rate
    if isinstance(optimizer, SGD) or is_custom(type(optimizer)) or callable(rate) or steps is None:
        return
    if not isinstance(dataset, Dataset) or run.is_trial or state.step:
        return
    reach = rate * steps * run.epochs  # about how far Adam can move a weight
    for (loss, _), y, last in zip(state.loss.by_output, as_tuple(dataset.y), last_layers(model), strict=True):
        if type(loss) not in _LOSSES or type(last) is not Dense or (last.use_bias and bool(last.bias.value.any())):
            continue
        size, mean = (float(a.mean(dtype="float64")) for a in (abs(y), y))
        deviation = float(y.std(dtype="float64"))
        large = size > max(_LARGE_SIZE, _LARGE_SIZE_PER_REACH * reach)
        small = 0.0 < deviation < min(_SMALL_DEVIATION, _SMALL_DEVIATION_TIMES_REACH / max(reach, 1e-12))
        if large or small:
            warn(
                f"the targets have mean {mean:.3g} and standard deviation {deviation:.3g}, and {steps * run.epochs} "
                f"steps with a learning rate of {rate:g} hardly fit numbers of that size. Train on "
                "(y - y.mean()) / y.std(), and undo it after predict: prediction * y.std() + y.mean()."
            )
