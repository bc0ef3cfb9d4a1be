"""Attribution: what a trained model looks at in its inputs.

All functions work on a copy of the model, in the mode of `predict`: dropout is off and BatchNorm normalizes by its
running statistics. Nothing of the model changes, and they may be called while `fit` trains it in another thread.

The score of a class is the output of the model for it. If the last layer is Softmax, LogSoftmax or Sigmoid, it is what
this layer takes: probabilities near 0 or 1 hardly change, and a score of one class would depend on those of all others.
"""

from typing import TYPE_CHECKING, Any

import numpy

from xpnet.config import explain_arguments, flag
from xpnet.errors import module_attributes
from xpnet.layers.structure import first_of, mapped
from xpnet.model import Model, Sequential
from xpnet.training.device_memory import explaining_memory_errors_of, samples_of
from xpnet.training.probe import ROWS, Probe

__all__ = ["saliency"]

if not TYPE_CHECKING:  # a type checker that sees __getattr__ accepts every name, misspelled ones too
    __getattr__, __dir__ = module_attributes(__name__, __all__)


@explain_arguments
def saliency(model: Sequential | Model, x: Any, target: Any = None, *, as_device: bool = False) -> Any:
    """The gradient of the score of a class with respect to the inputs x (N, *input_shape), in the shape of x.

    target: the class, an integer for all samples or one for each (N,). None is the class with the largest score of each
    sample. A model with one output has one score, so None.

    Returns a NumPy array on the host, or an array of `backend.xp` on the model's device if as_device=True. With several
    inputs, x is a list or a dict, as in `predict`, and the result is a list.

    Integers have no gradient. If layers.Embedding reads them, the result has, for each token, the norm of the gradient
    with respect to its vector; with several inputs, an input of integers has None.

    Simonyan, Vedaldi and Zisserman 2014, "Deep inside convolutional networks". Raises StateError for a model that is
    not built; ArgumentError for one without scores (N, K), or whose integers are read by other layers; and ShapeError,
    DataError, ArgumentError or ArgumentTypeError for x or a target that do not fit.
    """
    as_device = flag("saliency", "as_device", as_device)
    probe = Probe("saliency", model)
    backend = model.backend
    with explaining_memory_errors_of(model, samples_of(x) or 1), backend.device():
        arrays = probe.inputs(x)
        count, several = len(first_of(arrays)), isinstance(arrays, tuple)
        targets = probe.targets(target, count)
        token_norms = probe.watch_tokens() if not several and arrays.dtype.kind != "f" else None
        parts = []
        for start in range(0, count, ROWS):
            rows = slice(start, start + ROWS)
            found = probe.gradient(
                mapped(lambda a, rows=rows: a[rows], arrays), None if targets is None else targets[rows]
            )
            found = found if token_norms is None else token_norms()
            parts.append(
                [
                    grad if as_device or grad is None else numpy.array(backend.to_numpy(grad))
                    for grad in (found if several else [found])
                ]
            )
        join = probe.xp.concatenate if as_device else numpy.concatenate
        columns = [None if column[0] is None else join(column) for column in zip(*parts, strict=True)]
    return columns if several else columns[0]
