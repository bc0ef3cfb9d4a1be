"""Operators that optimizers use on the flat vectors of all parameters: gradient clipping, fused updates."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from xpnet.backends.arrays import Array
from xpnet.backends.base import Device

Runs: TypeAlias = list[slice]  # of a flat vector
Numbers: TypeAlias = Callable[[int], Sequence[float]]  # the numbers of an update, as a function of the step


class UpdateOperators(Device):
    def clip_norm(self, grads: Array, trained: Runs, limit: float) -> None:
        """Scale the gradient in the slices `trained` by min(1, limit / its norm), without reading the norm back.

        On a GPU, float32 elements of magnitude below 1.2e-38 become 0.
        """
        xp = self.xp
        square = xp.zeros((), dtype=xp.float64)
        for run in trained:
            g = grads[run]
            largest = xp.max(xp.abs(g))
            largest = largest + (largest == 0)
            # Divided by the largest, because the square of 1e20 overflows float32.
            square += xp.sum(xp.square(g / largest), dtype=xp.float64) * xp.square(largest.astype(xp.float64))
        scale = xp.minimum(1.0, limit / xp.maximum(xp.sqrt(square), 1e-300))
        for run in trained:
            grads[run] *= scale.astype(grads.dtype)

    def fused_update(self, name: str, runs: Runs, vectors: Sequence[Array], numbers: Sequence[float]) -> bool:
        """Apply the update `name` of optimizers.py to the slices `runs` of flat vectors in one pass.

        False, without doing anything, if this device has not fused it: then the optimizer applies its formula.
        """
        return False

    def whole_update(
        self, name: str, trained: Runs, decayed: Runs, vectors: list[Array], numbers: Numbers, step: int, gate: Array,
        copy: Any = None, last: bool = True,
    ) -> bool:  # fmt: skip
        """Apply the update `name` of optimizers.py, with weight decay in the slices `decayed`, in one pass.

        numbers: what decay multiplies the weight by, what part of the weight it adds to the gradient, then the
        optimizer's own.  gate: a device array, or None; if it holds 0, nothing is updated.  copy: a `HalfMatrix`
        of a captured step, into which the new weights are also written, rounded to 16 bits; or None.  last: False if
        further calls update other parameters in the same step.

        False, without doing anything, if this device has not fused the update.
        """
        return False
