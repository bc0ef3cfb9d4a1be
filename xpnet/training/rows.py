"""Rows: the units over which losses and metrics are means: samples, or the labels or steps of each sample."""

import math
from dataclasses import replace
from typing import Any

from xpnet.backends import Array
from xpnet.data.dataset import Batch, of_output
from xpnet.errors import ShapeError
from xpnet.layers.containers import Container
from xpnet.layers.context import Shape
from xpnet.layers.structure import as_tuple, one_or_tuple, shapes_of
from xpnet.losses import Loss


class Rows:
    """How the outputs and targets of a model become rows.

    Where a loss counts labels, (N, T, K) becomes (N·T, K). The steps of outputs with a mask become rows too, and those
    that the mask leaves out have the weight 0.

    are_samples: whether rows are samples, so that nothing changes.  per_sample: the rows of a sample, for each output;
    0 if it depends on the data.  weighted: whether rows always have weights, also if samples have none.  counted:
    whether these depend on labels or masks, so that their sum is known only after a forward pass.
    """

    def __init__(self, model: Container, loss: Loss) -> None:
        self._backend, self._dtype = model.backend, model.context.dtype
        self._losses, self._masked = [part for part, _ in loss.by_output], model.masked_outputs
        shapes = shapes_of(model.output_shape)
        several = [part.by_label and len(shape) > 1 for part, shape in zip(self._losses, shapes, strict=True)]
        self.counted = any(self._masked) or any(part.ignore is not None for part in self._losses)
        self.are_samples = not (self.counted or any(several))
        rows = [shape[:-1] if of_labels else () for of_labels, shape in zip(several, shapes, strict=True)]
        self.per_sample = [0 if None in shape else math.prod(shape) for shape in rows]
        self.weighted = self.counted or 0 in self.per_sample

    def __call__(self, outputs: Any, batch: Batch, masks: Any) -> tuple[Any, Batch]:
        """(the outputs of the rows, the batch with their targets and weights). Its x and its length stay.

        outputs, masks: of the model, an array or a tuple. A mask may be None.
        """
        if self.are_samples:
            return outputs, batch
        each = [
            self._of_output(k, *of_one, batch)
            for k, of_one in enumerate(zip(as_tuple(outputs), as_tuple(batch.y), as_tuple(masks), strict=True))
        ]
        rows, y, weights, counts = (
            None if parts[0] is None else one_or_tuple(list(parts)) for parts in zip(*each, strict=True)
        )
        return rows, replace(batch, y=y, weights=weights, counts=counts)

    def of_targets(self, k: int, targets: Array, output_shape: Shape) -> tuple[Array, tuple[int, ...]]:
        """(the targets of the rows of output k, the shape of all rows' outputs), for checked targets."""
        rows, shape, _ = self._losses[k].rows(self._backend, targets, output_shape)
        known = [n if size is None else size for size, n in zip(shape, rows.shape[1:] or shape, strict=False)]
        return rows, (len(rows), *known)

    def gradient(self, grad: Any, outputs: Any) -> Any:
        """The gradient of the rows in the shape of the outputs of the model."""
        if self.are_samples:
            return grad
        return one_or_tuple([g.reshape(y.shape) for g, y in zip(as_tuple(grad), as_tuple(outputs), strict=True)])

    def _of_output(self, k: int, outputs: Array, targets: Array, mask: Array | None, batch: Batch) -> tuple[Any, ...]:
        """(outputs, targets, weights, weights in metrics) of the rows of one output."""
        xp, loss, samples = self._backend.xp, self._losses[k], len(outputs)
        places = outputs.shape[:-1] if loss.by_label else outputs.shape[:1] if mask is None else outputs.shape[:2]
        if targets.shape[: len(places)] != places:
            raise ShapeError(f"the outputs {tuple(outputs.shape)} need targets {places}, not {tuple(targets.shape)}.")
        if mask is not None and not loss.by_label:  # steps
            outputs, targets = (a.reshape(-1, *a.shape[2:]) for a in (outputs, targets))
        targets, shape, counted = loss.rows(self._backend, targets, outputs.shape[1:])
        outputs = outputs.reshape(-1, *shape)
        if mask is not None:
            mask = xp.broadcast_to(mask.reshape(*mask.shape, *[1] * (len(places) - 2)), places).reshape(-1)
            counted = mask if counted is None else counted & mask
        each = len(outputs) // samples

        def weights(given: Array | None, always: bool, dtype: Any) -> Array | None:
            """The weights of the rows: that of the sample, or 0 for a row that does not count. None if all are 1."""
            if given is None and not always:
                return None
            rows = xp.ones((samples, each), dtype) if counted is None else counted.reshape(samples, each).astype(dtype)
            if given is not None:
                rows = rows * of_output(given, k)[:, None]
            return rows.reshape(-1)

        of_loss = weights(batch.weights, self.weighted, self._dtype)
        return outputs, targets, of_loss, weights(batch.counts, self.counted, xp.float64)
