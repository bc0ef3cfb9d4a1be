"""Operators on each row of a matrix: softmax, cross-entropy, correct predictions, normalization."""

from xpnet.backends.arrays import Array
from xpnet.backends.reference.elementwise import ElementwiseOperators
from xpnet.backends.reference.reductions import ReductionOperators


class RowOperators(ElementwiseOperators, ReductionOperators):
    def softmax(self, x: Array, out: Array | None = None) -> Array:
        """e^x / Σ e^x over the last axis, after subtracting the maximum, so that no exponent is positive."""
        xp = self.xp
        out = xp.subtract(x, xp.max(x, axis=-1, keepdims=True), out=out)
        xp.exp(out, out=out)
        out /= xp.sum(out, axis=-1, keepdims=True)
        return out

    def log_softmax(self, x: Array, out: Array | None = None) -> Array:
        """x - log Σ e^x over the last axis, after subtracting the maximum."""
        xp = self.xp
        out = xp.subtract(x, xp.max(x, axis=-1, keepdims=True), out=out)
        out -= xp.log(xp.sum(xp.exp(out), axis=-1, keepdims=True))
        return out

    def cross_entropy(
        self, logits: Array, labels: Array, smoothing: float, losses: Array, grad: Array
    ) -> tuple[Array, Array]:
        """losses (N,) = -Σ_k t_k log p_k and grad (N, K) = p - t, with p = softmax(logits).

        t_k = smoothing / K, plus 1 - smoothing if k is the label.
        """
        xp, share = self.xp, smoothing / logits.shape[1]
        log_p = self.log_softmax(logits, out=grad)
        of_label = xp.arange(0, logits.size, logits.shape[1]) + labels  # its place in the flat matrix
        flat = grad.reshape(-1)
        xp.multiply(flat[of_label], smoothing - 1.0, out=losses)
        if smoothing:
            losses -= share * xp.sum(log_p, axis=1)
        xp.exp(log_p, out=grad)
        flat[of_label] -= 1.0 - smoothing
        if smoothing:
            grad -= share
        return losses, grad

    def count_correct(self, outputs: Array, labels: Array) -> Array:
        """[correct, N]: how many rows of outputs (N, K) have their largest number at the label, and how many there are.

        Of equal numbers the first counts as the largest. A row with NaN is not correct, whatever its label.
        """
        xp = self.xp
        largest = xp.max(outputs, axis=-1)  # NaN if the row has any
        correct = (outputs.argmax(axis=-1) == labels) & (largest == largest)
        sums = xp.empty(2, dtype=xp.int64)
        sums[0], sums[1] = xp.count_nonzero(correct), len(outputs)
        return sums

    def normalize_rows(self, x: Array, epsilon: float, out: Array, sigma: Array) -> Array:
        """out = (x - μ) / σ, with the mean μ and σ = √(variance + epsilon) of each row; sigma (rows, 1) = σ.

        x[:, 0] is subtracted first: the rounded mean of large equal numbers can differ from them.
        """
        xp = self.xp
        xp.subtract(x, x[:, :1], out=out)
        out -= xp.mean(out, axis=-1, keepdims=True)
        sigma[...] = xp.mean(xp.square(out), axis=-1, keepdims=True)
        sigma += epsilon
        xp.sqrt(sigma, out=sigma)
        out /= sigma
        return out

    def normalize_rows_grad(self, grad: Array, normal: Array, sigma: Array, out: Array) -> Array:
        """The gradient of `normalize_rows`, x̂ = normal: out = (g - mean(g) - x̂ · mean(g · x̂)) / σ. out may be grad."""
        xp = self.xp
        xp.subtract(grad, grad[:, :1].copy(), out=out)  # as in normalize_rows; a copy, since out may be grad
        out -= xp.mean(out, axis=-1, keepdims=True)
        products = out * normal  # has the same mean as g · x̂, since mean(x̂) = 0
        mean_product = xp.mean(products, axis=-1, keepdims=True)
        out -= xp.multiply(normal, mean_product, out=products)
        out /= sigma
        return out

    def scale_rows(self, x: Array, epsilon: float, out: Array, sigma: Array) -> Array:
        """out = x / σ, with the root mean square σ = √(mean(x²) + epsilon) of each row; sigma (rows, 1) = σ."""
        xp = self.xp
        sigma[...] = xp.mean(xp.square(x, out=out), axis=-1, keepdims=True)
        sigma += epsilon
        xp.sqrt(sigma, out=sigma)
        return xp.divide(x, sigma, out=out)

    def scale_rows_grad(self, grad: Array, normal: Array, sigma: Array, out: Array) -> Array:
        """The gradient of `scale_rows`, x̂ = normal: out = (g - x̂ · mean(g · x̂)) / σ. out may be grad."""
        xp = self.xp
        mean_product = xp.mean(grad * normal, axis=-1, keepdims=True)
        xp.subtract(grad, normal * mean_product, out=out)
        out /= sigma
        return out

    def normalize_and_scale(
        self,
        x: Array,
        centered: bool,
        epsilon: float,
        gamma: Array | None,
        beta: Array | None,
        normal: Array,
        sigma: Array,
        out: Array,
    ) -> Array:
        """out = gamma · x̂ + beta, with x̂ = normal by `normalize_rows`, or by `scale_rows` if not centered. Returns out.

        x, normal, out (rows, columns), sigma (rows, 1); gamma, beta (columns,), or None for 1 and 0.
        """
        (self.normalize_rows if centered else self.scale_rows)(x, epsilon, normal, sigma)
        self.xp.multiply(normal, 1.0 if gamma is None else gamma, out=out)
        return out if beta is None else self.add_to_rows(out, beta)

    def normalize_and_scale_grad(
        self,
        grad: Array,
        centered: bool,
        gamma: Array | None,
        normal: Array,
        sigma: Array,
        grad_gamma: Array | None,
        grad_beta: Array | None,
        out: Array,
    ) -> Array:
        """The gradients of `normalize_and_scale`: of gamma and beta, unless None, and of x, in out. Returns out.

        grad_gamma[j] = Σ_i grad[i, j] · normal[i, j], grad_beta[j] = Σ_i grad[i, j]. out overlaps neither.
        """
        xp = self.xp
        if grad_beta is not None:
            self.sum_rows(grad, out=grad_beta)
        if grad_gamma is not None:
            self.sum_rows(xp.multiply(grad, normal, out=out), out=grad_gamma)
        xp.multiply(grad, 1.0 if gamma is None else gamma, out=out)
        return (self.normalize_rows_grad if centered else self.scale_rows_grad)(out, normal, sigma, out)
