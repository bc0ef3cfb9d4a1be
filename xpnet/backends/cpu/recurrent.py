"""Recurrent networks on the CPU: each worker takes a part of the batch through all steps.

A step is a matrix product (loops_products.py), NumPy's tanh, and compiled loops (loops_recurrent.py) for the rest.
Formulas: ../reference.
"""

from collections.abc import Callable
from typing import Any

import numpy

from xpnet.backends.arrays import Array
from xpnet.backends.cpu.thread_pool import ThreadPool
from xpnet.backends.reference import Backend

_MIN_ROWS_TO_PACK = 32  # over all steps; packing a matrix takes as long as the product with about 20 rows


class _Product:
    """The product with one matrix, for the rows of every step."""

    def __init__(self, backend: Backend, loops: Any, matrix: Array, rows: int) -> None:
        """rows: how many rows all steps have together. Packs the matrix if that pays."""
        depth, self._columns = matrix.shape
        self._packed_product, self._empty, self._dtype = loops.packed_product, backend.empty, matrix.dtype
        self._packed = rows >= _MIN_ROWS_TO_PACK
        if self._packed:
            width = loops.panel_columns(matrix.dtype.itemsize)
            self._matrix = backend.empty((-(-self._columns // width), depth, width), matrix.dtype)
            loops.pack(matrix, self._matrix)
        else:
            self._matrix = matrix.copy()  # because products with a transposed view would be slower

    def buffer(self, rows: int) -> Array:
        """An array for products of so many rows. It may have further columns, to be ignored."""
        panels = self._matrix.shape
        return self._empty((rows, panels[0] * panels[2] if self._packed else self._columns), self._dtype)

    def __call__(self, rows: Array, out: Array) -> Array:
        """rows @ matrix, for contiguous rows. It is in `out`, an array of `buffer`, without its further columns."""
        if not self._packed:
            return numpy.matmul(rows, self._matrix, out=out)
        self._packed_product(rows, self._matrix, out)
        return out[:, : self._columns] if out.shape[1] > self._columns else out


class CPURecurrent(Backend):
    """What CPUOperators have for recurrent networks. Arrays are time-major, see the formulas."""

    threads: ThreadPool
    loops: Callable[..., Any]

    def rnn(self, gates: Array, weight: Array, mask: Array | None, hidden: Array) -> None:
        if (loops := self.loops((gates, weight, mask, hidden))) is None:
            super().rnn(gates, weight, mask, hidden)
            return
        multiply = _Product(self, loops, weight, gates[..., 0].size)

        def do_part(rows: slice, _: int) -> None:
            own_gates, states, own_mask = gates[:, rows], hidden[:, rows], _steps(mask, rows)
            product = multiply.buffer(states.shape[1])
            for t in range(len(gates)):
                state = numpy.add(multiply(states[t], product), own_gates[t], out=states[t + 1])
                numpy.tanh(state, out=state)
                self._keep(own_mask, t, states)

        self.threads.parallel_for(hidden.shape[1], do_part)

    def rnn_grad(
        self,
        grad: Array | None,
        weight: Array,
        mask: Array | None,
        hidden: Array,
        grad_gates: Array,
        grad_hidden: Array,
    ) -> None:
        if (loops := self.loops((grad, weight, mask, hidden, grad_gates, grad_hidden))) is None:
            super().rnn_grad(grad, weight, mask, hidden, grad_gates, grad_hidden)
            return
        multiply = _Product(self, loops, weight.T, grad_gates[..., 0].size)

        def do_part(rows: slice, _: int) -> None:
            state, steps, grads = grad_hidden[rows], hidden[:, rows], grad_gates[:, rows]
            own_grad, own_mask = _steps(grad, rows), _steps(mask, rows)
            product = multiply.buffer(len(state))
            for t in reversed(range(len(grads))):
                if own_grad is not None:
                    numpy.add(state, own_grad[t], out=state)
                loops.rnn_grad(state, steps[t + 1], grads[t])
                self._keep_grad(own_mask, t, grads[t], multiply(grads[t], product), state)

        self.threads.parallel_for(len(grad_hidden), do_part)

    def lstm(self, gates: Array, weight: Array, mask: Array | None, hidden: Array, cells: Array) -> None:
        if (loops := self.loops((gates, weight, mask, hidden, cells))) is None:
            super().lstm(gates, weight, mask, hidden, cells)
            return
        units, multiply = hidden.shape[2], _Product(self, loops, weight, gates[..., 0].size)

        def do_part(rows: slice, _: int) -> None:
            own_gates, states, own_cells, own_mask = gates[:, rows], hidden[:, rows], cells[:, rows], _steps(mask, rows)
            product = multiply.buffer(states.shape[1])
            tanh_cell = self.empty(states.shape[1:], gates.dtype)
            for t in range(len(gates)):
                step, cell = own_gates[t], own_cells[t + 1]
                multiply(states[t], product)
                loops.lstm_sums(step, product)
                numpy.tanh(step, out=step)
                loops.lstm_cell(step, own_cells[t], cell)
                numpy.tanh(cell, out=tanh_cell)
                numpy.multiply(step[:, 3 * units :], tanh_cell, out=states[t + 1])
                self._keep(own_mask, t, states, own_cells)

        self.threads.parallel_for(hidden.shape[1], do_part)

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
        arguments = grad, gates, weight, mask, cells, grad_gates, grad_hidden, grad_cell
        if (loops := self.loops(arguments)) is None:
            super().lstm_grad(*arguments)
            return
        multiply = _Product(self, loops, weight.T, gates[..., 0].size)

        def do_part(rows: slice, _: int) -> None:
            state, cell, own_gates, own_cells = grad_hidden[rows], grad_cell[rows], gates[:, rows], cells[:, rows]
            own_grad, own_mask, grads = _steps(grad, rows), _steps(mask, rows), grad_gates[:, rows]
            product, tanh_cell = multiply.buffer(len(state)), self.empty(state.shape, state.dtype)
            before = cell if mask is None else self.empty(state.shape, state.dtype)
            for t in reversed(range(len(gates))):
                if own_grad is not None:
                    numpy.add(state, own_grad[t], out=state)
                numpy.tanh(own_cells[t + 1], out=tanh_cell)
                loops.lstm_grad(state, own_gates[t], own_cells[t], tanh_cell, cell, grads[t], before)
                if own_mask is not None:
                    self.xp.copyto(cell, before, where=own_mask[t][:, None])
                self._keep_grad(own_mask, t, grads[t], multiply(grads[t], product), state)

        self.threads.parallel_for(len(grad_hidden), do_part)

    def gru(
        self, gates: Array, weight: Array, bias: Array | None, mask: Array | None, hidden: Array, inner: Array
    ) -> None:
        arguments = gates, weight, bias, mask, hidden, inner
        if (loops := self.loops(arguments)) is None:
            super().gru(*arguments)
            return
        units, multiply = hidden.shape[2], _Product(self, loops, weight, gates[..., 0].size)

        def do_part(rows: slice, _: int) -> None:
            own_gates, states, own_inner, own_mask = gates[:, rows], hidden[:, rows], inner[:, rows], _steps(mask, rows)
            product = multiply.buffer(states.shape[1])
            for t in range(len(gates)):
                step = own_gates[t]
                inside = multiply(states[t], product)
                if bias is not None:
                    loops.add_to_rows(inside, bias)
                loops.gru_sums(step, product, own_inner[t])
                sums, new = step[:, : 2 * units], step[:, 2 * units :]
                numpy.tanh(sums, out=sums)
                loops.gru_inner(step, own_inner[t])
                numpy.tanh(new, out=new)
                loops.gru_state(step, states[t], states[t + 1])
                self._keep(own_mask, t, states)

        self.threads.parallel_for(hidden.shape[1], do_part)

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
        arguments = grad, gates, weight, mask, hidden, inner, grad_gates, grad_products, grad_hidden
        if (loops := self.loops(arguments)) is None:
            super().gru_grad(*arguments)
            return
        multiply = _Product(self, loops, weight.T, gates[..., 0].size)

        def do_part(rows: slice, _: int) -> None:
            state, own_gates, states, own_inner = grad_hidden[rows], gates[:, rows], hidden[:, rows], inner[:, rows]
            own_grad, own_mask = _steps(grad, rows), _steps(mask, rows)
            grads, products = grad_gates[:, rows], grad_products[:, rows]
            product, direct = multiply.buffer(len(state)), self.empty(state.shape, state.dtype)
            for t in reversed(range(len(gates))):
                if own_grad is not None:
                    numpy.add(state, own_grad[t], out=state)
                loops.gru_grad(state, own_gates[t], states[t], own_inner[t], grads[t], products[t], direct)
                numpy.add(multiply(products[t], product), direct, out=direct)
                if own_mask is not None:
                    self.xp.copyto(grads[t], 0.0, where=~own_mask[t][:, None])
                self._keep_grad(own_mask, t, products[t], direct, state)

        self.threads.parallel_for(len(grad_hidden), do_part)


def _steps(a: Array | None, rows: slice) -> Array | None:
    """These samples of a (T, N, ...), or None."""
    return None if a is None else a[:, rows]
