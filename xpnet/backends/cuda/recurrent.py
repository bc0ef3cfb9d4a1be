"""Recurrent networks on a GPU: each step is a product and one kernel, for the states and the gates."""

from collections.abc import Callable
from typing import Any, TypeAlias

from xpnet.backends.arrays import Array
from xpnet.backends.cuda.launching import fused
from xpnet.backends.cuda.matmul import CUDAMatmul

#: What a kernel needs besides the arrays of all networks, for a step.
StepArrays: TypeAlias = Callable[[int], dict[str, Any]]

_THREADS = 128  # of a block: states are small, and more blocks occupy more of the device


class CUDARecurrent(CUDAMatmul):
    """A backend on CuPy with kernels for recurrent networks."""

    @fused
    def rnn(self, gates: Array, weight: Array, mask: Array | None, hidden: Array) -> None:
        self._run("rnn_step", lambda t: {}, gates, weight, mask, hidden)

    @fused
    def lstm(self, gates: Array, weight: Array, mask: Array | None, hidden: Array, cells: Array) -> None:
        def arrays(t: int) -> dict[str, Any]:
            return {"cell_before": cells[t], "cell": cells[t + 1]}

        self._run("lstm_step", arrays, gates, weight, mask, hidden)

    @fused
    def gru(
        self, gates: Array, weight: Array, bias: Array | None, mask: Array | None, hidden: Array, inner: Array
    ) -> None:
        def arrays(t: int) -> dict[str, Any]:
            return {"bias": bias, "inner": inner[t]}

        self._run("gru_step", arrays, gates, weight, mask, hidden)

    @fused
    def rnn_grad(
        self,
        grad: Array | None,
        weight: Array,
        mask: Array | None,
        hidden: Array,
        grad_gates: Array,
        grad_hidden: Array,
    ) -> None:
        def arrays(t: int) -> dict[str, Any]:
            return {"state": hidden[t + 1], "out": grad_gates[t]}

        self._run_back("rnn_step_grad", arrays, grad, weight, mask, grad_gates, grad_hidden)

    @fused
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
        def arrays(t: int) -> dict[str, Any]:
            of_cells = {"cell_before": cells[t], "cell": cells[t + 1], "grad_cell": grad_cell}
            return {"gates": gates[t], "grad_gates": grad_gates[t], **of_cells}

        self._run_back("lstm_step_grad", arrays, grad, weight, mask, grad_gates, grad_hidden)

    @fused
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
        def arrays(t: int) -> dict[str, Any]:
            results = {"grad_gates": grad_gates[t], "grad_products": grad_products[t]}
            return {"gates": gates[t], "before": hidden[t], "inner": inner[t], **results}

        self._run_back("gru_step_grad", arrays, grad, weight, mask, grad_products, grad_hidden)

    def _run(
        self, name: str, arrays: StepArrays, gates: Array, weight: Array, mask: Array | None, hidden: Array
    ) -> None:
        """Make all steps forward."""
        product, weight = self.xp.empty(gates.shape[1:], dtype=gates.dtype), self.cast(weight)
        for t in range(len(gates)):
            self.matmul(self.cast(hidden[t]), weight, out=product)
            given = {"gates": gates[t], "product": product, "before": hidden[t], "mask": _step(mask, t), **arrays(t)}
            self.launch(name, hidden[t + 1], threads=_THREADS, **given)

    def _run_back(
        self,
        name: str,
        arrays: StepArrays,
        grad: Array | None,
        weight: Array,
        mask: Array | None,
        grad_products: Array,
        grad_hidden: Array,
    ) -> None:
        """Make all steps backward. grad_products: of hidden @ weight at each step, which the kernels compute."""
        product: Array | None = None
        transposed = self.cast(weight).T
        for t in reversed(range(len(grad_products))):
            given = {"grad": _step(grad, t), "product": product, "mask": _step(mask, t), **arrays(t)}
            self.launch(name, grad_hidden, threads=_THREADS, grad_hidden=grad_hidden, **given)
            product = self.xp.empty_like(grad_hidden) if product is None else product
            self.matmul(self.cast(grad_products[t]), transposed, out=product)
        self.add_arrays(grad_hidden, product, out=grad_hidden)


def _step(a: Array | None, t: int) -> Array | None:
    return None if a is None else a[t]
