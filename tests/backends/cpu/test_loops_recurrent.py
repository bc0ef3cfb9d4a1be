"""The operators of recurrent layers: compiled loops and the strict stand-in against the reference formulas."""

import inspect

import numpy as np
import pytest
from strict import StrictBackend

from xpnet.backends import get_backend

N, T, UNITS = 4, 5, 2


def arguments(dtype, gates, masked, with_grad):
    rng, steps = np.random.default_rng(1), (T, N, UNITS)

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype)

    mask = rng.random((T, N)) < 0.6 if masked else None
    grad = draw(*steps) if with_grad else None
    if masked and with_grad:
        grad *= mask[:, :, None]
    return {
        "gates": draw(T, N, gates * UNITS), "weight": draw(UNITS, gates * UNITS), "bias": draw(gates * UNITS),
        "mask": mask, "hidden": draw(T + 1, N, UNITS), "cells": draw(T + 1, N, UNITS), "inner": draw(*steps),
        "grad": grad, "grad_gates": draw(T, N, gates * UNITS), "grad_products": draw(T, N, gates * UNITS),
        "grad_hidden": draw(N, UNITS), "grad_cell": draw(N, UNITS),
    }  # fmt: skip


def results(backend, name, given):
    """All arrays after the operator and its gradient."""
    arrays = {key: None if a is None else backend.asarray(a.copy()) for key, a in given.items()}
    for operator in (getattr(backend, name), getattr(backend, f"{name}_grad")):
        with backend.device(), backend.parallel_region():
            operator(**{key: arrays[key] for key in inspect.signature(operator).parameters})
    return {key: backend.to_numpy(a) for key, a in arrays.items() if a is not None}


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "gates"), [("rnn", 1), ("lstm", 4), ("gru", 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-13)])
def test_compiled_loops_equal_the_formulas_and_the_strict_stand_in_is_exact(
    reference, dtype, tolerance, name, gates, masked, with_grad
):
    given = arguments(dtype, gates, masked, with_grad)
    exact = results(reference, name, given)
    looped, strict = results(get_backend("cpu"), name, given), results(StrictBackend(), name, given)
    for key, value in exact.items():
        np.testing.assert_array_equal(strict[key], value, err_msg=key)
        np.testing.assert_allclose(looped[key], value, rtol=tolerance, atol=tolerance, err_msg=key)
