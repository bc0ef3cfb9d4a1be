"""Recurrent networks on a GPU against the reference formulas, in every precision."""

import numpy as np
import pytest
from guarded import Guarded

from xpnet.backends import Backend

REFERENCE = Backend("reference", np)
GATES = {"rnn": 1, "lstm": 4, "gru": 3}
TOLERANCES = {"float32": 5e-6, "float64": 1e-13, "tf32": 5e-3, "bfloat16": 3e-2}


class Run:
    """The arrays of a recurrent network. results(backend, arrays): what it computes, forward and backward."""

    def __init__(self, rng, name, steps, rows, units, masked):
        self.name, columns = name, GATES[name] * units
        self.gates, self.weight = rng.normal(size=(steps, rows, columns)), rng.normal(size=(units, columns)) / 2
        self.bias = rng.normal(size=columns)
        self.mask = rng.random((steps, rows)) < 0.6 if masked else None
        self.hidden, self.cells = rng.normal(size=(2, steps + 1, rows, units))
        self.grad = rng.normal(size=(steps, rows, units))
        self.grad_hidden, self.grad_cell = rng.normal(size=(2, rows, units))
        if masked:
            self.grad *= self.mask[:, :, None]

    def results(self, backend, array, dtype):
        gates, weight, bias, hidden, cells, grad, grad_hidden, grad_cell = (
            array(a.shape, dtype, a)
            for a in (self.gates, self.weight, self.bias, self.hidden, self.cells, self.grad, self.grad_hidden,
                      self.grad_cell)
        )  # fmt: skip
        mask = None if self.mask is None else backend.asarray(self.mask)
        inner, grad_gates, grad_products = (array(a.shape, dtype) for a in (self.grad, self.gates, self.gates))
        if self.name == "rnn":
            backend.rnn(gates, weight, mask, hidden)
            backend.rnn_grad(grad, weight, mask, hidden, grad_gates, grad_hidden)
            found = hidden, grad_gates, grad_hidden
        elif self.name == "lstm":
            backend.lstm(gates, weight, mask, hidden, cells)
            backend.lstm_grad(grad, gates, weight, mask, cells, grad_gates, grad_hidden, grad_cell)
            found = gates, hidden, cells, grad_gates, grad_hidden, grad_cell
        else:
            backend.gru(gates, weight, bias, mask, hidden, inner)
            backend.gru_grad(grad, gates, weight, mask, hidden, inner, grad_gates, grad_products, grad_hidden)
            found = gates, hidden, inner, grad_gates, grad_products, grad_hidden
        return [backend.to_numpy(a) for a in found]


def filled(shape, dtype, fill=np.nan):
    return np.full(shape, fill, dtype)


@pytest.mark.parametrize("precision", ["float32", "float64", "tf32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all steps", "masked"])
@pytest.mark.parametrize("name", GATES)
def test_networks_equal_the_reference(guarded, rng, name, masked, precision):
    backend = guarded.backend
    if precision != "float64" and backend.precision_unavailable(precision):
        pytest.skip("this device has no such precision")
    dtype = "float64" if precision == "float64" else "float32"
    for steps, rows, units in [(1, 1, 1), (5, 3, 7), (3, 40, 8)]:
        run = Run(rng, name, steps, rows, units, masked)
        with backend.matmul_precision("float32" if precision == "float64" else precision):
            results = run.results(backend, guarded, dtype)
        for got, want in zip(results, run.results(REFERENCE, filled, "float64"), strict=True):
            scale = max(1.0, np.abs(want).max())
            np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCES[precision] * scale)


@pytest.mark.parametrize("name", GATES)
def test_a_step_is_a_product_and_a_kernel(gpu, rng, name):
    if gpu.name != "emulated":
        pytest.skip("the launches of a real GPU are not counted")
    with gpu.device():
        Run(rng, name, 4, 3, 8, True).results(gpu, Guarded(gpu), "float32")
        launches = [name for name in gpu.xp.launches if name != "relu"]
    assert launches == ["gemm", f"{name}_step"] * 4 + [f"{name}_step_grad", "gemm"] * 4 + ["add_arrays"]
