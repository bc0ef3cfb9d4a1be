"""Reductions over the rows of a matrix: sums and moments. All but `sum_rows` add in float64, for long batches."""

from xpnet.backends.arrays import Array
from xpnet.backends.base import Device


class ReductionOperators(Device):
    def sum_rows(self, a: Array, out: Array) -> Array:
        """out[j] = Σ_i a[i, j]."""
        return self.xp.sum(a, axis=0, out=out)

    def sum_to(self, x: Array, out: Array) -> None:
        """out = Σ x (N,), where out is a float64 array without axes."""
        out[...] = x.sum(dtype=self.xp.float64)

    def moments(self, x: Array) -> tuple[Array, Array]:
        """(mean, variance) of each column of x (rows, columns). The variance is Σ (x - mean)² / rows.

        In two passes, because E[x²] - E[x]² loses the digits of a variance that is small compared to the mean.
        """
        mean = self._mean(x)
        deviations = x - mean
        return mean, self._mean(self.xp.square(deviations, out=deviations))

    def _mean(self, x: Array) -> Array:
        return self.xp.mean(x, axis=0, dtype=self.xp.float64, out=self.xp.empty(x.shape[1:], dtype=x.dtype))

    def sum_products(self, a: Array, b: Array, center: Array, out: Array) -> Array:
        """out[j] = Σ_i a[i, j] · (b[i, j] - center[j]). With the mean as center, a large mean costs no digits."""
        return self.xp.sum(a * (b - center), axis=0, dtype=self.xp.float64, out=out)
