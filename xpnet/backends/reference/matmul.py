"""Matrix products."""

from xpnet.backends.arrays import Array
from xpnet.backends.base import Device


class MatmulOperators(Device):
    def matmul(self, a: Array, b: Array, out: Array) -> Array:
        """out = a @ b, for matrices.

        a and b may be transposed views. out overlaps neither, and is C-contiguous or some columns of such a matrix.
        """
        if out.flags.c_contiguous:
            return self.xp.matmul(a, b, out=out)
        out[...] = self.xp.matmul(a, b)
        return out

    def add_matmul(self, a: Array, b: Array, out: Array, scratch: Array) -> Array:
        """out += a @ b, for matrices. `scratch` is a C-contiguous array in out's shape, which is overwritten."""
        out += self.matmul(a, b, out=scratch)
        return out

    def batched_matmul(self, a: Array, b: Array, out: Array) -> Array:
        """out[..., :, :] = a[..., :, :] @ b[..., :, :], for contiguous stacks of matrices; a or b may be one matrix."""
        return self.xp.matmul(a, b, out=out)

    def cast(self, a: Array) -> Array:
        """The matrix `a` in the precision of the surrounding `matmul_precision`: in half precision, a rounded copy.

        `matmul` casts by itself; casting before is faster for a matrix that is used several times.
        """
        return a

    def count_pairs(self, a: Array, b: Array, shape: tuple[int, int], weights: Array | None) -> Array:
        """counts[i, j]: how many samples have a = i and b = j, int64; or the sum of their weights, float64.

        a, b (N,): integers from 0, below shape[0] and shape[1].  weights (N,): float64 or None.
        """
        # A product of one-hot matrices, without a scatter, which would race on a GPU. float64 counts exactly to 2**53.
        xp = self.xp
        rows = (a[:, None] == xp.arange(shape[0])).astype(xp.float64)
        columns = (b[:, None] == xp.arange(shape[1])).astype(xp.float64)
        if weights is not None:
            rows *= weights[:, None]
        counts = self.matmul(rows.T, columns, out=self.empty(shape, xp.float64))
        return counts if weights is not None else counts.astype(xp.int64)
