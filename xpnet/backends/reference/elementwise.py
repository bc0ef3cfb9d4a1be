"""Elementwise operators, those that broadcast a row to all rows of a matrix, the gathering of rows and its adjoint."""

from xpnet.backends.arrays import Array
from xpnet.backends.base import Device


class ElementwiseOperators(Device):
    def relu(self, x: Array, out: Array) -> Array:
        """out = max(x, 0)."""
        return self.xp.maximum(x, 0.0, out=out)

    def relu_grad(self, grad: Array, y: Array, out: Array) -> Array:
        """out = grad · [y ≠ 0]. The gradient is kept where y is NaN, and 0 · ∞ is NaN, so that neither is hidden."""
        return self.xp.multiply(grad, self.xp.not_equal(y, 0.0, out=out), out=out)

    def sigmoid(self, x: Array, out: Array | None = None) -> Array:
        """1 / (1 + e^-x), computed as e^min(x, 0) / (1 + e^-|x|), in which nothing overflows."""
        xp = self.xp
        denominator = xp.exp(-xp.abs(x))
        denominator += 1.0
        out = xp.exp(xp.minimum(x, 0.0), out=out)
        return xp.divide(out, denominator, out=out)

    def softplus(self, x: Array, out: Array | None = None) -> Array:
        """log(1 + e^x), computed as max(x, 0) + log(1 + e^-|x|)."""
        xp = self.xp
        tail = xp.log1p(xp.exp(-xp.abs(x)))
        return xp.add(xp.maximum(x, 0.0), tail, out=out)

    def add_to_rows(self, a: Array, row: Array) -> Array:
        """a[i, j] += row[j]."""
        a += row
        return a

    def scale_shift(self, x: Array, center: Array, scale: Array, shift: Array, out: Array) -> Array:
        """out[i, j] = (x[i, j] - center[j]) · scale[j] + shift[j], without cancellation. out may be x."""
        self.xp.subtract(x, center, out=out)
        out *= scale
        out += shift
        return out

    def combine(self, g: Array, a: Array, x: Array, center: Array, b: Array, c: Array, out: Array) -> Array:
        """out[i, j] = g[i, j] · a[j] + (x[i, j] - center[j]) · b[j] + c[j]. out overlaps neither g nor x."""
        self.xp.subtract(x, center, out=out)
        out *= b
        out += c
        out += g * a
        return out

    def rescale(self, x: Array, scale: float, offset: float, out: Array) -> Array:
        """out = scale · x + offset, in out's dtype. x may hold integers."""
        out[...] = x
        out *= scale
        if offset:
            out += offset
        return out

    def gather(self, a: Array, rows: Array, out: Array) -> Array:
        """out[i] = a[rows[i]], in out's dtype. `rows` must be in range: no device checks that."""
        if a.dtype == out.dtype:
            return self.xp.take(a, rows, axis=0, out=out)
        out[...] = self.xp.take(a, rows, axis=0)
        return out

    def add_rows_at(self, grad_rows: Array, rows: Array, out: Array) -> Array:
        """The adjoint of `gather`: out (V, F) = Σ_{i: rows[i] = v} grad_rows[i], with grad_rows (R, F) and rows (R,).

        The rows must be in range. Compiled loops and kernels add in a fixed order, so each device repeats its bits. Two
        devices may round differently, and CuPy's `add.at` adds in any order.
        """
        out[...] = 0.0
        self.xp.add.at(out, rows, grad_rows)
        return out
