"""Recurrent networks: all steps of a sequence in one operator, forward and backward.

Arrays are time-major: (T, N, ...), so that each step is one contiguous matrix. `gates` is the part of the gates that
comes from the inputs, x_t W + b for all steps, which a layer computes by one matrix product. `hidden` and `cells` are
(T + 1, N, units): [0] is the state before the first step, which the caller sets, and [t + 1] the state after step t.
`mask` (T, N) is True where a step counts, or None if all do. A step that does not count keeps the state.

In the gradients, `grad` (T, N, units) is the gradient of the outputs hidden[1:], 0 at steps that do not count; None if
it is 0 everywhere. `grad_hidden` and `grad_cell` (N, units) are the gradients of the last state, and are replaced by
those of the first.
"""

from xpnet.backends.arrays import Array
from xpnet.backends.reference.elementwise import ElementwiseOperators
from xpnet.backends.reference.matmul import MatmulOperators


class RecurrentOperators(ElementwiseOperators, MatmulOperators):
    def rnn(self, gates: Array, weight: Array, mask: Array | None, hidden: Array) -> None:
        """hidden[t + 1] = tanh(gates[t] + hidden[t] @ weight).

        gates (T, N, units), weight (units, units).
        """
        xp = self.xp
        for t in range(len(gates)):
            state = self.matmul(hidden[t], weight, out=hidden[t + 1])
            state += gates[t]
            xp.tanh(state, out=state)
            self._keep(mask, t, hidden)

    def rnn_grad(
        self,
        grad: Array | None,
        weight: Array,
        mask: Array | None,
        hidden: Array,
        grad_gates: Array,
        grad_hidden: Array,
    ) -> None:
        """The gradients of `rnn`: grad_gates (T, N, units), and grad_hidden."""
        xp = self.xp
        product = self.empty(grad_hidden.shape, grad_hidden.dtype)
        for t in reversed(range(len(grad_gates))):
            if grad is not None:
                grad_hidden += grad[t]
            d = xp.multiply(hidden[t + 1], hidden[t + 1], out=grad_gates[t])
            xp.subtract(1.0, d, out=d)
            d *= grad_hidden
            self._keep_grad(mask, t, d, self._times_transposed(d, weight, product), grad_hidden)

    def lstm(self, gates: Array, weight: Array, mask: Array | None, hidden: Array, cells: Array) -> None:
        """The steps of an LSTM. The columns of a = gates[t] + hidden[t] @ weight are those of i, f, g and o:

        i, f, o = sigmoid(a),   g = tanh(a),
        cells[t + 1] = f · cells[t] + i · g,   hidden[t + 1] = o · tanh(cells[t + 1]).

        gates (T, N, 4 · units) is replaced by i, f, g, o.  weight (units, 4 · units).
        """
        xp, units = self.xp, hidden.shape[2]
        product = self.empty(gates.shape[1:], gates.dtype)
        for t in range(len(gates)):
            step, cell = gates[t], cells[t + 1]
            step += self.matmul(hidden[t], weight, out=product)
            i, f, g, o = self._gates(step, units)
            for gate in (i, f, o):
                self.sigmoid(gate, out=gate)
            xp.tanh(g, out=g)
            xp.multiply(f, cells[t], out=cell)
            cell += i * g
            xp.multiply(o, xp.tanh(cell), out=hidden[t + 1])
            self._keep(mask, t, hidden, cells)

    def lstm_grad(
        self,
        grad: Array | None,
        gates: Array,
        weight: Array,
        mask: Array | None,
        cells: Array,
        grad_gates: Array,
        grad_hidden: Array,
        grad_cell: Array,
    ) -> None:
        """The gradients of `lstm`, given its results: grad_gates (T, N, 4 · units), grad_hidden and grad_cell."""
        xp, units = self.xp, cells.shape[2]
        product = self.empty(grad_hidden.shape, grad_hidden.dtype)
        for t in reversed(range(len(gates))):
            if grad is not None:
                grad_hidden += grad[t]
            i, f, g, o = self._gates(gates[t], units)
            step = grad_gates[t]
            grad_i, grad_f, grad_g, grad_o = self._gates(step, units)
            tanh_cell = xp.tanh(cells[t + 1])
            grad_before = grad_hidden * o
            grad_before *= 1.0 - tanh_cell * tanh_cell
            grad_before += grad_cell
            xp.multiply(grad_hidden * tanh_cell, o * (1.0 - o), out=grad_o)
            xp.multiply(grad_before * g, i * (1.0 - i), out=grad_i)
            xp.multiply(grad_before * cells[t], f * (1.0 - f), out=grad_f)
            xp.multiply(grad_before * i, 1.0 - g * g, out=grad_g)
            grad_before *= f
            if mask is None:
                grad_cell[...] = grad_before
            else:
                xp.copyto(grad_cell, grad_before, where=mask[t][:, None])
            self._keep_grad(mask, t, step, self._times_transposed(step, weight, product), grad_hidden)

    def gru(
        self, gates: Array, weight: Array, bias: Array | None, mask: Array | None, hidden: Array, inner: Array
    ) -> None:
        """The steps of a GRU. The columns of a = gates[t] and b = hidden[t] @ weight + bias are those of r, z and n:

        r, z = sigmoid(a + b),   n = tanh(a + r · b),   hidden[t + 1] = (1 - z) · n + z · hidden[t].

        gates (T, N, 3 · units) is replaced by r, z, n.  weight (units, 3 · units), bias (3 · units,) or None.
        inner (T, N, units): set to b of n.
        """
        xp, units = self.xp, hidden.shape[2]
        product = self.empty(gates.shape[1:], gates.dtype)
        for t in range(len(gates)):
            state = hidden[t + 1]
            self.matmul(hidden[t], weight, out=product)
            if bias is not None:
                self.add_to_rows(product, bias)
            r, z, n = self._gates(gates[t], units)
            product_r, product_z, product_n = self._gates(product, units)
            r += product_r
            self.sigmoid(r, out=r)
            z += product_z
            self.sigmoid(z, out=z)
            inner[t] = product_n
            n += r * product_n
            xp.tanh(n, out=n)
            xp.subtract(hidden[t], n, out=state)
            state *= z
            state += n
            self._keep(mask, t, hidden)

    def gru_grad(
        self,
        grad: Array | None,
        gates: Array,
        weight: Array,
        mask: Array | None,
        hidden: Array,
        inner: Array,
        grad_gates: Array,
        grad_products: Array,
        grad_hidden: Array,
    ) -> None:
        """The gradients of `gru`, given its results: of a and b, grad_gates and grad_products, and grad_hidden.

        grad_gates and grad_products (T, N, 3 · units) differ in the columns of n only.
        """
        xp, units = self.xp, hidden.shape[2]
        product = self.empty(grad_hidden.shape, grad_hidden.dtype)
        for t in reversed(range(len(gates))):
            if grad is not None:
                grad_hidden += grad[t]
            r, z, n = self._gates(gates[t], units)
            step, products = grad_gates[t], grad_products[t]
            grad_r, grad_z, grad_n = self._gates(step, units)
            xp.multiply(grad_hidden * (1.0 - z), 1.0 - n * n, out=grad_n)
            xp.multiply(grad_n * inner[t], r * (1.0 - r), out=grad_r)
            xp.multiply(grad_hidden * (hidden[t] - n), z * (1.0 - z), out=grad_z)
            products[...] = step
            self._gates(products, units)[2][...] *= r
            self._times_transposed(products, weight, product)
            product += grad_hidden * z
            if mask is not None:
                xp.copyto(step, 0.0, where=~mask[t][:, None])
            self._keep_grad(mask, t, products, product, grad_hidden)

    def _gates(self, step: Array, units: int) -> list[Array]:
        """The columns of each gate."""
        return [step[:, start : start + units] for start in range(0, step.shape[1], units)]

    def _times_transposed(self, grad: Array, weight: Array, out: Array) -> Array:
        """out = grad @ weightᵀ."""
        return self.matmul(grad, weight.T, out=out)

    def _keep(self, mask: Array | None, t: int, *states: Array) -> None:
        """Let the states after step t be those before it, where the step does not count."""
        if mask is not None:
            skipped = ~mask[t][:, None]
            for state in states:
                self.xp.copyto(state[t + 1], state[t], where=skipped)

    def _keep_grad(self, mask: Array | None, t: int, grad_step: Array, new: Array, grad_hidden: Array) -> None:
        """grad_hidden = new. Where step t does not count, grad_hidden stays, and the gradient of the step is 0."""
        if mask is None:
            grad_hidden[...] = new
        else:
            counts = mask[t][:, None]
            self.xp.copyto(grad_hidden, new, where=counts)
            self.xp.copyto(grad_step, 0.0, where=~counts)
