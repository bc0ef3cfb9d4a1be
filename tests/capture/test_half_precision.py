"""Half precision in captured steps on a GPU: which matrices are stored in 16 bits, and who writes them."""

import functools

import numpy as np
import pytest
from captured_trainings import X, Y, fit
from precisions import require_precision
from traced_gpu_steps import arrays, captured_steps, checked_list, names

import xpnet
from xpnet import callbacks, datasets, layers, optimizers
from xpnet.backends.cuda import choosing, matmul

PRECISIONS = ["bfloat16", "float16"]


@pytest.fixture(params=PRECISIONS)
def precision(request, gpu):
    require_precision(gpu, request.param)
    return request.param


@pytest.fixture
def large(monkeypatch):
    """Every product is large."""
    monkeypatch.setattr(matmul, "_LARGE", 0)


def mlp(gpu, precision, *between, units=24):
    stack = [layers.Dense(units), layers.ReLU(), *between, layers.Dense(units), layers.ReLU(), layers.Dense(10)]
    return xpnet.Sequential(stack, (64,), backend=gpu, precision=precision, seed=3)


def checked(gpu, precision, work, given):
    """`checked_list` in a precision."""
    with gpu.device(), gpu.matmul_precision(precision):
        return checked_list(gpu, work, given, rtol=0.02, atol=0.05)


# Small products ------------------------------------------------------------------------------------------------------


def test_small_products_round_their_matrices_themselves(gpu, precision):
    def work(backend, x, w, y, grad):
        x16 = backend.cast(x)
        backend.matmul(x16, backend.cast(w), out=y)
        backend.matmul(x16.T, backend.cast(y), out=grad)

    given = arrays(gpu, (6, 5), (5, 4), (6, 4), (5, 4))
    calls = checked(gpu, precision, work, given)
    assert names(calls) == ["matmul", "matmul"]
    assert all(a.dtype == "float32" for call in calls.calls for a in call.reads)


def test_a_rounded_copy_outlives_a_change_of_its_array(gpu, precision):
    def work(backend, x, w, y):
        x16 = backend.cast(x)
        x += 1.0
        backend.matmul(x16, backend.cast(w), out=y)

    assert names(checked(gpu, precision, work, arrays(gpu, (6, 5), (5, 4), (6, 4)))).count("cast") == 2


# Large products ------------------------------------------------------------------------------------------------------


def stored_in_halves(step):
    """For each call: how many of the arrays that it reads are in 16 bits, and how many of those that it writes."""
    counts = [[sum(a.dtype == "uint16" for a in some) for some in (c.reads, c.writes)] for c in step.calls.calls]
    return {f"{i} {name}": tuple(count) for i, (name, count) in enumerate(zip(names(step.calls), counts, strict=True))}


def test_matrices_between_large_products_are_stored_in_16_bits(gpu, precision, large, monkeypatch):
    monkeypatch.setattr(type(gpu), "fits_dense_cross_entropy", lambda *sizes: False)
    (step,) = captured_steps(mlp(gpu, precision), X[:200], Y[:200], optimizer="sgd")
    found = stored_in_halves(step)
    forward = [found[name] for name in found if name.split()[1] in ("matmul_relu_mask", "matmul_bias")]
    assert [written for _, written in forward] == [1, 1, 0]  # the logits are float32
    masks = [name for name in found if name.split()[1] in ("matmul_masked", "relu_grad_sum_rows")]
    assert [found[name] for name in masks] == [(2, 1)] * 2
    products = [found[name] for name in found if name.split()[1] in ("matmul", "matmul_sum_rows")]
    separate = sum("relu_grad" in name for name in masks)
    assert sorted(products) == [(2, 0)] * 3 + [(2, 1)] * separate  # the gradients of weights are float32
    assert list(names(step.calls)).count("to_halves") == 2  # of the samples and of the gradient of the logits
    (copies,) = [found[name] for name in found if name.endswith("whole_update")]
    assert copies == (0, 1)


def test_all_updates_of_a_step_write_one_copy_of_the_weights(gpu, precision, large):
    rated = optimizers.SGD(0.1, parameter_rates={"*.bias": 2.0})
    (step,) = captured_steps(mlp(gpu, precision), X[:200], Y[:200], optimizer=rated)
    found = stored_in_halves(step)
    assert [found[name] for name in found if name.endswith("whole_update")] == [(0, 1)] * 2
    assert step.calls.ends_with_update


def test_muon_is_captured_in_half_precision(gpu, precision):
    model = mlp(gpu, precision, layers.Dense(24))
    _, watch = fit(model, optimizer="muon")
    assert watch.fallback_reason is None and watch.captured
    assert model.evaluate(X, Y)["accuracy"] > 0.3


def test_an_array_that_other_calls_read_is_copied_once(gpu, precision, large):
    def work(backend, x, w, v, y, z, total):
        h = backend.relu(x, out=backend.empty((6, 5), "float32"))
        backend.matmul(h, w, out=y)
        backend.matmul(h.T, v, out=z)
        total += h

    calls = checked(gpu, precision, work, arrays(gpu, (6, 5), (5, 4), (6, 4), (6, 4), (5, 4), (6, 5)))
    assert sorted(names(calls)) == ["add", "matmul", "matmul", "relu", "to_halves", "to_halves", "to_halves"]


def reads_the_result(backend, x, w, v, y, z):
    h = backend.matmul(x, w, out=backend.empty((6, 5), "float32"))
    backend.matmul(h, v, out=y)
    z += h


def overwrites_the_result(backend, x, w, v, y, z):
    h = backend.matmul(x, w, out=backend.empty((6, 5), "float32"))
    backend.matmul(h, v, out=y)
    backend.sigmoid(z, out=h)
    backend.matmul(h, v, out=y)


def uses_some_rows(backend, x, w, v, y, z):
    h = backend.matmul(x, w, out=backend.empty((6, 5), "float32"))
    backend.matmul(h[:3], v, out=y[:3])
    backend.matmul(h[3:], v, out=y[3:])


def keeps_the_result(backend, x, w, v, y, z):
    backend.matmul(backend.matmul(x, w, out=z), v, out=y)


@pytest.mark.parametrize("work", [reads_the_result, overwrites_the_result, uses_some_rows, keeps_the_result])
def test_results_that_are_not_only_factors_stay_float32(gpu, precision, large, work):
    calls = checked(gpu, precision, work, arrays(gpu, (6, 7), (7, 5), (5, 4), (6, 4), (6, 5)))
    first = next(call for call in calls.calls if call.name == "matmul")
    assert [a.dtype.name for a in first.writes] == ["float32"] and "to_halves" in names(calls)


def test_a_result_that_is_only_a_factor_is_stored_in_16_bits(gpu, precision, large):
    def work(backend, x, w, v, y):
        backend.matmul(backend.matmul(x, w, out=backend.empty((6, 5), "float32")), v, out=y)

    calls = checked(gpu, precision, work, arrays(gpu, (6, 7), (7, 5), (5, 4), (6, 4)))
    assert [call.writes[0].dtype.name for call in calls.calls if call.name == "matmul"] == ["uint16", "float32"]


@pytest.mark.parametrize("operator", ["relu", "relu_grad", "add_arrays", "multiply_arrays"])
@pytest.mark.parametrize("shape", [(6, 5), (8, 4)])
def test_operators_write_factors_in_16_bits(gpu, precision, large, operator, shape):
    def work(backend, x, z, w, y):
        h = backend.empty(shape, "float32")
        getattr(backend, operator)(*[x, z][: 1 if operator == "relu" else 2], out=h)
        backend.matmul(h, w, out=y)

    rows, columns = shape
    calls = checked(gpu, precision, work, arrays(gpu, shape, shape, (columns, 3), (rows, 3)))
    assert sorted(names(calls)) == sorted([operator, "matmul", "to_halves"])  # of the second factor
    (written,) = [call.writes for call in calls.calls if call.name == operator]
    assert [a.dtype.name for a in written] == ["uint16"]


# Masks of ReLU -------------------------------------------------------------------------------------------------------


def without_algorithms(gpu, monkeypatch, *epilogues):
    """Let cuBLASLt have no algorithms for these epilogues."""
    if gpu.name != "emulated":
        pytest.skip("a real cuBLASLt has algorithms for these products")
    lt = gpu._cublaslt_library()
    heuristics = lt.cublasLtMatmulAlgoGetHeuristic

    def propose(handle, description, *others):
        return 15 if lt._objects[description.value][7] in epilogues else heuristics(handle, description, *others)

    monkeypatch.setattr(lt, "cublasLtMatmulAlgoGetHeuristic", propose)


def dense_relu(backend, x, w, row, v, grad, z, grad_v, grad_row, grad_w, other, between=None):
    """z = relu(x @ w + row) @ v; and from the gradient of z those of v, row and w.

    between: a function of (backend, gradient of y, gradient of row, other) to call before the last product.
    """
    y, grad_y, masked = (backend.empty((len(x), w.shape[1]), "float32") for _ in range(3))
    backend.relu(backend.add_to_rows(backend.matmul(x, w, out=y), row), out=y)
    backend.matmul(y, v, out=z)
    backend.matmul(y.T, grad, out=grad_v)
    backend.matmul(grad, v.T, out=grad_y)
    backend.sum_rows(backend.relu_grad(grad_y, y, out=masked), grad_row)
    if between is not None:
        between(backend, grad_y, grad_row, other)
    backend.matmul(x.T, masked, out=grad_w)


SHAPES = [(8, 8), (8, 16), (16,), (16, 8), (8, 8), (8, 8), (16, 8), (16,), (8, 16), (16,)]
MASKED = ["matmul", "matmul", "matmul_masked", "matmul_relu_mask"]
NOT_MASKED = ["matmul", "matmul", "matmul", "matmul", "matmul_bias", "relu_grad_sum_rows"]


def operators(gpu, precision, work):
    """The sorted names of the operators of dense_relu, without copies in 16 bits."""
    with gpu.device(), gpu.stream():
        calls = checked(gpu, precision, work, arrays(gpu, *SHAPES))
    if gpu.name != "emulated":
        pytest.skip("a real cuBLASLt may have no algorithms for such small products")
    return sorted(name for name in names(calls) if name != "to_halves")


def test_products_write_and_apply_the_mask_of_relu(gpu, precision, large):
    assert operators(gpu, precision, dense_relu) == sorted([*MASKED, "matmul_sum_rows"])


def test_masked_layers_read_their_bias_from_the_copy_of_the_weights(gpu, precision, large):
    if gpu.name != "emulated":
        pytest.skip("a real cuBLASLt may have no algorithms for such small products")
    (step,) = captured_steps(mlp(gpu, precision), X[:200], Y[:200], optimizer="sgd")
    update = step.calls.calls[-1].kwargs["copy"].bits
    forward = [call for call in step.calls.calls if call.name == "matmul_relu_mask"]
    rows = [call.args[2].bits for call in forward]
    assert rows and all(row.data.mem is update.data.mem for row in rows)


def reads_the_sums(backend, grad_y, grad_row, other):
    backend.sigmoid(grad_row, out=other)


def test_sums_that_others_read_at_once_are_not_delayed(gpu, precision, large):
    found = operators(gpu, precision, functools.partial(dense_relu, between=reads_the_sums))
    assert found == sorted([*MASKED, "sum_rows", "sigmoid", "matmul"])


def reads_the_gradient(backend, grad_y, grad_row, other):
    backend.sum_rows(grad_y, other)


def test_a_gradient_that_others_read_is_not_masked(gpu, precision, large):
    found = operators(gpu, precision, functools.partial(dense_relu, between=reads_the_gradient))
    assert "matmul_masked" not in found and "matmul_relu_mask" not in found


def computes_the_result_late(backend, x, w, row, v, grad, z, grad_v, grad_row, grad_w, other):
    y, grad_y, masked = (backend.empty((len(x), w.shape[1]), "float32") for _ in range(3))
    backend.matmul(grad, v.T, out=grad_y)
    backend.relu(backend.add_to_rows(backend.matmul(x, w, out=y), row), out=y)
    backend.matmul(y, v, out=z)
    backend.sum_rows(backend.relu_grad(grad_y, y, out=masked), grad_row)
    backend.matmul(x.T, masked, out=grad_w)


def test_a_gradient_that_is_older_than_the_result_of_relu_is_not_masked(gpu, precision, large):
    found = operators(gpu, precision, computes_the_result_late)
    assert found == ["matmul", "matmul", "matmul", "matmul_bias", "relu_grad_sum_rows"]


def relu_without_a_product(backend, x, w, row, v, grad, z, grad_v, grad_row, grad_w, other):
    y, grad_y, masked = (backend.empty((len(x), w.shape[1]), "float32") for _ in range(3))
    backend.sigmoid(backend.matmul(x, w, out=y), out=y)
    backend.relu(y, out=y)
    backend.matmul(y, v, out=z)
    backend.matmul(grad, v.T, out=grad_y)
    backend.sum_rows(backend.relu_grad(grad_y, y, out=masked), grad_row)
    backend.matmul(x.T, masked, out=grad_w)


def test_only_a_product_writes_the_mask_of_relu(gpu, precision, large):
    found = operators(gpu, precision, relu_without_a_product)
    assert found == ["matmul", "matmul", "matmul", "matmul", "relu", "relu_grad_sum_rows", "sigmoid"]


@pytest.mark.parametrize("epilogue", [134, 136], ids=["relu with mask", "masked"])
def test_without_an_algorithm_for_masks_a_kernel_masks_the_gradient(gpu, precision, large, monkeypatch, epilogue):
    without_algorithms(gpu, monkeypatch, epilogue)
    assert operators(gpu, precision, dense_relu) == NOT_MASKED


def test_without_an_algorithm_for_sums_a_kernel_sums_the_rows(gpu, precision, large, monkeypatch):
    without_algorithms(gpu, monkeypatch, 256)
    assert "matmul_sum_rows" in operators(gpu, precision, dense_relu)


def test_algorithms_that_fail_are_not_used(gpu, precision, large, monkeypatch, caplog):
    def multiply(lt, description, *others):
        return 15 if library._objects[description.value][7] == 136 else works(lt, description, *others)

    if gpu.name != "emulated":
        pytest.skip("a real cuBLASLt has algorithms that work")
    library = gpu._cublaslt_library()
    works = library.cublasLtMatmul
    monkeypatch.setattr(library, "cublasLtMatmul", multiply)
    monkeypatch.setattr(gpu, "fastest", functools.partial(choosing.fastest, gpu.xp))
    caplog.set_level("INFO")
    assert operators(gpu, precision, dense_relu) == NOT_MASKED
    assert "fails: cublasLtMatmul failed with status 15" in caplog.text


@pytest.mark.parametrize("relu", [False, True])
def test_without_an_algorithm_of_cublaslt_a_result_is_rounded_afterwards(gpu, precision, monkeypatch, rng, relu):
    if gpu.name != "emulated":
        pytest.skip("a real cuBLASLt has algorithms for these products")
    monkeypatch.setattr(gpu._cublaslt_library(), "cublasLtMatmulAlgoGetHeuristic", lambda *arguments: 15)
    a, b, row = (rng.normal(size=shape).astype("float32") for shape in ((6, 7), (7, 5), (5,)))
    with gpu.device(), gpu.stream(), gpu.step_cells(object()), gpu.matmul_precision(precision):
        x, y, r = map(gpu.asarray, (a, b, row))
        out = gpu.cast(gpu.empty((6, 5), "float32"))
        gpu.matmul_bias(gpu.cast(x), gpu.cast(y), r, relu, out)
        exact = gpu.matmul_bias(gpu.cast(x), gpu.cast(y), r, relu, gpu.empty((6, 5), "float32"))
        np.testing.assert_array_equal(gpu.to_numpy(out.bits), gpu.to_numpy(gpu.cast(exact).bits))


def test_only_large_products_in_16_bits_read_such_matrices(gpu, precision):
    with gpu.device(), gpu.stream():
        sizes = {"large": (2**9, 2**9, 2**9), "small": (2**9, 2**9, 2**8)}
        with gpu.matmul_precision(precision):
            assert {name: gpu.half_precision_of(*size) for name, size in sizes.items()} == {
                "large": precision,
                "small": None,
            }
        with gpu.matmul_precision("tf32"):
            assert gpu.half_precision_of(*sizes["large"]) is None


# Training ------------------------------------------------------------------------------------------------------------


class AfterEachStep(callbacks.Callback):
    """Could change the weights after each step, so that all copies are made anew. captured: the kinds of steps."""

    def on_step_end(self, model, step):
        self.captured = self.run.executor.captured


def test_the_copy_of_the_weights_is_always_that_of_the_latest_weights(gpu, precision, large):
    """Each epoch has batches of two sizes, and each of these kinds of steps has a copy of its own."""
    after, runs = AfterEachStep(), []
    for more in ([], [after]):
        model = mlp(gpu, precision)
        history = model.fit(X, Y, epochs=5, batch_size=20, optimizer="adam", callbacks=more, verbose=0)
        runs.append((history["loss"], gpu.to_numpy(model.context.store.values).copy()))
    assert after.captured == 2 and runs[0][0] == runs[1][0]
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("stored", [False, True], ids=["rounded by products", "stored in 16 bits"])
def test_losses_are_those_of_float32_up_to_a_percent(gpu, precision, stored, monkeypatch):
    if stored:
        monkeypatch.setattr(matmul, "_LARGE", 0)
    x, y = datasets.digits()
    x = x.reshape(len(x), 64).astype("float32") / 16
    losses = []
    for chosen in (None, precision):
        history, watch = fit(mlp(gpu, chosen, units=64), x, y, batch_size=64)
        assert watch.captured and watch.fallback_reason is None
        losses.append(history["loss"])
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.01)


# Tied tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_index", [None, 1])
def test_a_tied_table_trains_like_in_eager_steps(gpu, precision, large, monkeypatch, rng, padding_index):
    x, y, states = rng.integers(0, 8, (60, 5)), rng.integers(0, 8, (60, 5)), []
    for capture in ("1", "0"):
        monkeypatch.setenv("XPNET_CAPTURE", capture)
        table = layers.Embedding(8, 16, padding_index=padding_index)
        inner = [layers.Dense(16), layers.Tanh(), layers.Dense(8, tied_to=table)]
        model = xpnet.Sequential([table, *inner], (5,), gpu, precision=precision)
        _, watch = fit(model, x, y, optimizer="sgd", batch_size=10)
        assert bool(watch.captured) is (capture == "1")
        states.append(model.state_dict())
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], rtol=0.02, atol=1e-3, err_msg=name)
