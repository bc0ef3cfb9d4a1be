"""Compiled loops of recurrent networks: what a step computes between its matrix product and its tanh.

Each inner loop reads and writes few arrays, or the compiler would not vectorize it. σ(a) = (1 + tanh(a / 2)) / 2, so
that NumPy's tanh computes all gates: their sums are halved before it, and completed after it.
"""

from typing import Any

from xpnet.backends.cpu.compiling import compiled


@compiled
def lstm_sums(gates: Any, product: Any) -> None:
    """gates (N, 4 · units) = (gates + product) / 2, but in the columns of g, the third of four, without the half.

    product may have further columns, as in gru_sums.
    """
    samples, columns = gates.shape
    half, units = gates.dtype.type(0.5), columns // 4
    for n in range(samples):
        a, b = gates[n], product[n]
        for j in range(2 * units):
            a[j] = (a[j] + b[j]) * half
        for j in range(2 * units, 3 * units):
            a[j] += b[j]
        for j in range(3 * units, columns):
            a[j] = (a[j] + b[j]) * half


@compiled
def lstm_cell(gates: Any, before: Any, cell: Any) -> None:
    """Complete i, f and o of gates (N, 4 · units): cell = f · before + i · g."""
    samples, units = cell.shape
    half = cell.dtype.type(0.5)
    for n in range(samples):
        i, f, g, o = (
            gates[n, :units],
            gates[n, units : 2 * units],
            gates[n, 2 * units : 3 * units],
            gates[n, 3 * units :],
        )
        for j in range(units):
            i[j] = i[j] * half + half
        for j in range(units):
            f[j] = f[j] * half + half
        for j in range(units):
            o[j] = o[j] * half + half
        for j in range(units):
            cell[n, j] = f[j] * before[n, j] + i[j] * g[j]


@compiled
def lstm_grad(
    grad: Any, gates: Any, before: Any, tanh_cell: Any, grad_cell: Any, grad_gates: Any, grad_before: Any
) -> None:
    """The gradients of the gates' sums and of the cells before the step. grad: of the state after it."""
    samples, units = before.shape
    one = before.dtype.type(1)
    for n in range(samples):
        i, f, g, o = (
            gates[n, :units],
            gates[n, units : 2 * units],
            gates[n, 2 * units : 3 * units],
            gates[n, 3 * units :],
        )
        row = grad_gates[n]
        grad_i, grad_f, grad_g, grad_o = (
            row[:units],
            row[units : 2 * units],
            row[2 * units : 3 * units],
            row[3 * units :],
        )
        h, c, t, previous = grad[n], grad_before[n], tanh_cell[n], before[n]
        for j in range(units):
            c[j] = grad_cell[n, j] + h[j] * o[j] * (one - t[j] * t[j])
        for j in range(units):
            grad_o[j] = h[j] * t[j] * (o[j] * (one - o[j]))
        for j in range(units):
            grad_i[j] = c[j] * g[j] * (i[j] * (one - i[j]))
        for j in range(units):
            grad_g[j] = c[j] * i[j] * (one - g[j] * g[j])
        for j in range(units):
            grad_f[j] = c[j] * previous[j] * (f[j] * (one - f[j]))
        for j in range(units):
            c[j] *= f[j]


@compiled
def gru_sums(gates: Any, product: Any, inner: Any) -> None:
    """gates (N, 3 · units) = (gates + product) / 2 in the columns of r and z. inner = those of product for n."""
    samples, units = inner.shape
    half = gates.dtype.type(0.5)
    for n in range(samples):
        a, b, last = gates[n], product[n], product[n, 2 * units : 3 * units]
        for j in range(2 * units):
            a[j] = (a[j] + b[j]) * half
        for j in range(units):
            inner[n, j] = last[j]


@compiled
def gru_inner(gates: Any, inner: Any) -> None:
    """Complete r and z of gates (N, 3 · units), and add r · inner to n."""
    samples, units = inner.shape
    half = inner.dtype.type(0.5)
    for n in range(samples):
        r, z, new = gates[n, :units], gates[n, units : 2 * units], gates[n, 2 * units :]
        for j in range(units):
            r[j] = r[j] * half + half
        for j in range(units):
            z[j] = z[j] * half + half
        for j in range(units):
            new[j] += r[j] * inner[n, j]


@compiled
def gru_state(gates: Any, before: Any, hidden: Any) -> None:
    """hidden = n + z · (before - n), for gates r, z, n (N, 3 · units)."""
    samples, units = hidden.shape
    for n in range(samples):
        z, new = gates[n, units : 2 * units], gates[n, 2 * units :]
        for j in range(units):
            hidden[n, j] = new[j] + z[j] * (before[n, j] - new[j])


@compiled
def gru_grad(
    grad: Any, gates: Any, before: Any, inner: Any, grad_gates: Any, grad_products: Any, grad_before: Any
) -> None:
    """The gradients of a and b, and that part of ∂L/∂before which does not come from b."""
    samples, units = before.shape
    one = before.dtype.type(1)
    for n in range(samples):
        r, z, new = gates[n, :units], gates[n, units : 2 * units], gates[n, 2 * units :]
        grad_r, grad_z, grad_n = grad_gates[n, :units], grad_gates[n, units : 2 * units], grad_gates[n, 2 * units :]
        h, b, previous, products = grad[n], inner[n], before[n], grad_products[n]
        for j in range(units):
            grad_n[j] = h[j] * (one - z[j]) * (one - new[j] * new[j])
        for j in range(units):
            grad_r[j] = grad_n[j] * b[j] * (r[j] * (one - r[j]))
        for j in range(units):
            grad_z[j] = h[j] * (previous[j] - new[j]) * (z[j] * (one - z[j]))
        for j in range(2 * units):
            products[j] = grad_gates[n, j]
        for j in range(units):
            products[2 * units + j] = grad_n[j] * r[j]
        for j in range(units):
            grad_before[n, j] = h[j] * z[j]


@compiled
def rnn_grad(grad: Any, hidden: Any, out: Any) -> None:
    """out = grad · (1 - hidden²)."""
    samples, units = out.shape
    one = out.dtype.type(1)
    for n in range(samples):
        for j in range(units):
            out[n, j] = grad[n, j] * (one - hidden[n, j] * hidden[n, j])
