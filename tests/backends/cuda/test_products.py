"""The products of captured steps: products.cu against NumPy, and the choice between it, cuBLAS and cuBLASLt."""

import json
import re

import numpy as np
import pytest
from captured_trainings import fit, mlp
from matrices import LAYOUTS, in_layout
from nvrtc import compiled
from precisions import require_precision

import xpnet
from xpnet.backends.cuda import products
from xpnet.backends.cuda.backend import GPUBackend
from xpnet.backends.cuda.choosing import Choices
from xpnet.backends.cuda.cublas import HalfMatrix
from xpnet.backends.cuda.products import TILINGS, Epilogue, Product

SHAPES = [(1, 1, 1), (5, 3, 7), (33, 50, 10), (64, 130, 48), (1, 70, 9), (40, 1, 33), (128, 10, 36)]
TRANSPOSED = [("rows", "rows"), ("transposed", "rows"), ("rows", "transposed"), ("transposed", "transposed")]
TOLERANCES = {"float32": 2e-6, "tf32": 2e-3, "bfloat16": 16e-3, "float16": 2e-3}
PRECISIONS = {
    name: ["tf32", "bfloat16", "float16"] if tiling.tensor else ["float32"] for name, tiling in TILINGS.items()
}
EVERY_TILING = [(name, precision) for name, precisions in PRECISIONS.items() for precision in precisions]
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-30, -1e30]


@pytest.fixture
def guarded(guarded):
    """Arrays for the kernels of a stream."""
    assert guarded.backend.products_unavailable is None
    with guarded.backend.stream():
        yield guarded
        guarded.check()


def close(gpu, got, a, b, want, precision="float32"):
    """Assert that a product is correct up to the rounding of its precision."""
    scale = np.sqrt((a.astype("float64") ** 2) @ (b.astype("float64") ** 2)).max() + 1e-30
    np.testing.assert_allclose(gpu.to_numpy(got), want, rtol=1e-5, atol=scale * TOLERANCES[precision])


def matrices(rng, m, k, n):
    return rng.normal(size=(m, k)).astype("float32"), rng.normal(size=(k, n)).astype("float32")


@pytest.mark.parametrize("layouts", TRANSPOSED, ids=lambda layouts: " ".join(layouts))
@pytest.mark.parametrize(("name", "precision"), EVERY_TILING)
def test_every_tiling_multiplies(guarded, rng, name, precision, layouts):
    gpu, tiling = guarded.backend, TILINGS[name]
    require_precision(gpu, precision)
    for shape in SHAPES:
        for parts in (1, 2, 5):
            a, b = matrices(rng, *shape)
            x, y = (in_layout(gpu, matrix, layout) for matrix, layout in zip((a, b), layouts, strict=True))
            out, sums = guarded((len(a), b.shape[1])), guarded((b.shape[1],))
            product = Product(x, y, out, precision, Epilogue(sums=sums))
            assert product.accepted()
            assert gpu.products().by_kernel(product, tiling, parts) == Epilogue()
            close(gpu, out, a, b, a.astype("float64") @ b, precision)
            np.testing.assert_allclose(gpu.to_numpy(sums), b.sum(0, dtype="float64"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_parts_of_larger_matrices_are_multiplied(guarded, rng, first, second):
    gpu, tiling = guarded.backend, TILINGS["8x16"]
    a, b = matrices(rng, 21, 37, 19)
    out = guarded((21, 30))
    product = Product(in_layout(gpu, a, first), in_layout(gpu, b, second), out[:, 4:23], "float32", Epilogue())
    gpu.products().by_kernel(product, tiling, 2)
    close(gpu, out[:, 4:23], a, b, a.astype("float64") @ b)
    assert np.isnan(gpu.to_numpy(out)[:, [*range(4), *range(23, 30)]]).all()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("follows", ["row", "row relu", "mask", "mask in place"])
def test_what_follows_a_product(guarded, rng, follows, parts):
    gpu, tiling = guarded.backend, TILINGS["8x16"]
    a, b = matrices(rng, 20, 30, 18)
    row, mask = rng.normal(size=18).astype("float32"), (rng.random((20, 18)) < 0.5).astype("float32")
    out, want = guarded((20, 18)), a.astype("float64") @ b
    if "row" in follows:
        epilogue = Epilogue(row=gpu.asarray(row), relu="relu" in follows)
        want = np.maximum(want + row, 0) if epilogue.relu else want + row
    else:
        out[...] = gpu.asarray(mask)
        epilogue = Epilogue(mask=out if "place" in follows else gpu.asarray(mask))
        want = want * mask
    gpu.products().by_kernel(Product(gpu.asarray(a), gpu.asarray(b), out, "float32", epilogue), tiling, parts)
    close(gpu, out, a, b, want)


def test_numbers_that_are_not_finite_are_not_hidden(guarded):
    gpu, size = guarded.backend, len(SPECIAL)
    numbers = gpu.asarray(np.array(SPECIAL, "float32").reshape(1, -1))
    one, out = gpu.asarray(np.ones((1, 1), "float32")), guarded((1, size))
    with np.errstate(all="ignore"):
        for epilogue, formula in (
            (Epilogue(row=gpu.zeros((size,), "float32"), relu=True), lambda x: np.where(x <= 0, 0, x)),
            (Epilogue(mask=gpu.asarray(np.array([[0, 0, 1, np.nan, 1, -1, 0]], "float32"))),
             lambda x: x * np.array([[0, 0, 1, 1, 1, 1, 0]], "float32")),
        ):  # fmt: skip
            gpu.products().by_kernel(Product(one, numbers, out, "float32", epilogue), TILINGS["8x16"], 1)
            want = formula(np.array([SPECIAL], "float32"))
            np.testing.assert_allclose(gpu.to_numpy(out), want, rtol=1e-6)


def test_the_same_product_has_the_same_bits(guarded, rng):
    gpu, stream_products = guarded.backend, guarded.backend.products()
    a, b = map(gpu.asarray, matrices(rng, 40, 300, 20))
    outs = [guarded((40, 20)) for _ in range(2)]
    for out in outs:
        stream_products.by_kernel(Product(a, b, out, "float32", Epilogue()), TILINGS["8x16"], 7)
    np.testing.assert_array_equal(*map(gpu.to_numpy, outs))
    assert not gpu.to_numpy(stream_products._tickets).any()


# The choice ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def choosing(gpu, monkeypatch):
    """A function that makes the ways with these beginnings of names the fastest; it returns the questions asked."""

    def choose(*beginnings):
        asked = []

        def fastest(ways):
            asked.append(sorted(ways))
            return next((name for start in beginnings for name in ways if name.startswith(start)), "cublas")

        monkeypatch.setattr(gpu, "choices", Choices("test", None))
        monkeypatch.setattr(gpu, "fastest", fastest)
        return asked

    return choose


@pytest.mark.parametrize("way", ["cublas", "cublasLt", "8x16"])
def test_a_captured_training_uses_the_fastest_way(gpu, choosing, way):
    asked = choosing(way)
    model = mlp(gpu)
    (history, watch), chosen = fit(model), gpu.choices._chosen
    assert watch.captured and watch.fallback_reason is None
    assert len(asked) == len(chosen) > 0
    assert any(name.startswith(way) for name in chosen.values())
    choosing("cublas")
    np.testing.assert_allclose(fit(mlp(gpu))[0]["loss"], history["loss"], rtol=1e-4)


def test_a_product_for_which_cublaslt_has_no_algorithm_has_other_ways(gpu, choosing, monkeypatch):
    if gpu.name != "emulated":
        pytest.skip("a real cuBLASLt has algorithms for these products")
    monkeypatch.setattr(gpu._cublaslt_library(), "cublasLtMatmulAlgoGetHeuristic", lambda *arguments: 15)
    asked = choosing("cublas")
    _, watch = fit(mlp(gpu))
    assert watch.captured and watch.fallback_reason is None
    assert asked and not any(name.startswith("cublasLt") for ways in asked for name in ways)


def test_a_remembered_choice_is_not_timed_again(gpu, choosing):
    first = choosing("8x16")
    fit(mlp(gpu))
    remembered, again = gpu.choices, choosing("8x16")
    gpu.choices = remembered
    fit(mlp(gpu))
    assert first and not again


def test_a_remembered_way_that_no_longer_exists_is_replaced(gpu, choosing):
    choosing("cublasLt")
    fit(mlp(gpu))
    unknown = dict.fromkeys(gpu.choices._chosen, "of another version")
    asked = choosing("cublasLt")
    gpu.choices._chosen = unknown
    fit(mlp(gpu))
    assert len(asked) == len(unknown) and "of another version" not in unknown.values()


def test_eager_products_are_not_timed(gpu, choosing, rng):
    asked = choosing("8x16")
    with gpu.device():
        a, b = map(gpu.asarray, matrices(rng, 20, 30, 18))
        gpu.matmul(a, b, gpu.empty((20, 18), "float32"))
        out = gpu.matmul_bias(a, b, gpu.zeros((18,), "float32"), True, gpu.empty((20, 18), "float32"))
    want = np.maximum(gpu.to_numpy(a) @ gpu.to_numpy(b), 0)
    np.testing.assert_allclose(gpu.to_numpy(out), want, rtol=1e-5, atol=1e-5)
    assert not asked


def test_nothing_is_timed_during_a_capture(gpu, choosing, rng):
    asked = choosing("8x16")
    with gpu.device(), gpu.stream(), gpu.step_cells(object()):
        a, b = map(gpu.asarray, matrices(rng, 20, 30, 18))
        out = gpu.empty((20, 18), "float32")
        gpu.cublas(), gpu.products_unavailable  # prepared, as by a rehearsal
        stream = gpu.xp.cuda.get_current_stream()
        stream.begin_capture()
        gpu.matmul(a, b, out)
        graph = stream.end_capture()
        assert not asked
        gpu.matmul(a, b, gpu.empty((20, 18), "float32"))
        assert len(asked) == 1
        graph.launch()
    np.testing.assert_allclose(gpu.to_numpy(out), gpu.to_numpy(a) @ gpu.to_numpy(b), rtol=1e-5, atol=1e-5)


def test_the_precision_and_the_layout_are_parts_of_the_question(gpu, rng):
    with gpu.device():
        a, b = map(gpu.asarray, matrices(rng, 8, 8, 8))
        given = [(a, b, "float32"), (a, b, "tf32"), (a.T, b, "float32"), (a, b.T, "float32")]
        out, row = gpu.empty((8, 8), "float32"), gpu.zeros((8,), "float32")
        asked = [Product(x, y, out, precision, Epilogue()).question() for x, y, precision in given]
        asked += [
            Product(a, b, out, "float32", e).question() for e in (Epilogue(row=row), Epilogue(row=row, relu=True))
        ]
        asked += [Product(a, b, out, "float32", e).question() for e in (Epilogue(mask=out), Epilogue(sums=row))]
    assert len(set(asked)) == len(asked)
    assert asked[0].startswith("8x8x8 N8 N8 N8") and asked[-3].endswith("float32 row relu")


@pytest.mark.parametrize("case", ["float64", "strided", "empty", "strided row"])
def test_other_matrices_are_not_accepted(gpu, case):
    with gpu.device():
        dtype, size = "float64" if case == "float64" else "float32", 0 if case == "empty" else 4
        a, b, out = (gpu.zeros(shape, dtype) for shape in ((3, size), (size, 5), (3, 5)))
        row = gpu.zeros((10,), "float32")[::2] if case == "strided row" else None
        if case == "strided":
            a = gpu.zeros((6, 8), dtype)[::2, ::2]
        assert not Product(a, b, out, "float32", Epilogue(row=row)).accepted()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_products_of_matrices_in_16_bits_have_ways_and_questions_of_their_own(gpu, rng, precision):
    require_precision(gpu, precision)
    with gpu.device(), gpu.stream(), gpu.matmul_precision(precision):
        a, b = map(gpu.asarray, matrices(rng, 16, 16, 16))
        out, x, y = gpu.empty((16, 16), "float32"), gpu.cast(a), gpu.cast(b)
        whole, factors, all_three = (
            Product(*given, precision, Epilogue()) for given in ((a, b, out), (x, y, out), (x, y, gpu.cast(out)))
        )
        assert len({product.question() for product in (whole, factors, all_three)}) == 3
        assert all(product.accepted() for product in (whole, factors, all_three))
        assert not any(Product(*given, precision, Epilogue()).accepted() for given in ((x, b, out), (a, y, out)))
        ways = [gpu.products().ways(product) for product in (whole, factors, all_three)]
    assert ["cublas" in some for some in ways] == [True, True, False]
    assert [any(name.startswith("tensor") for name in some) for some in ways] == [True, False, False]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_every_way_sums_the_rows_of_a_factor_in_16_bits(gpu, rng, precision):
    require_precision(gpu, precision)
    with gpu.device(), gpu.stream(), gpu.matmul_precision(precision):
        a, b = map(gpu.asarray, matrices(rng, 64, 48, 128))
        x, y, out = gpu.cast(a), gpu.cast(b), gpu.empty((64, 128), "float32")
        want = gpu.to_numpy(gpu.matmul(x, y, gpu.empty((64, 128), "float32")))
        want_sums = gpu.to_numpy(gpu.sum_rows(y, gpu.empty((128,), "float32")))
        ways = []
        for in_halves in (False, True):  # cuBLASLt sums up in the dtype of the result
            sums = gpu.empty((128,), "float32")
            result = gpu.cast(out) if in_halves else out
            product = Product(x, y, result, precision, Epilogue(sums=sums))
            ways.append(gpu.products().ways(product))
            for way in ways[-1].values():
                out[...] = sums[...] = np.nan
                gpu._compute(product, way)
                np.testing.assert_allclose(gpu.to_numpy(sums), want_sums, rtol=1e-5, atol=1e-5)
                if not in_halves:
                    np.testing.assert_allclose(gpu.to_numpy(out), want, rtol=1e-4, atol=1e-4)
    assert "cublas" in ways[0] and not any("with sums" in name for name in ways[1])
    if gpu.name == "emulated":
        assert any("with sums" in name for name in ways[0])


def test_only_products_of_matrices_in_16_bits_accept_a_mask_of_bits(gpu, rng):
    require_precision(gpu, "bfloat16")
    with gpu.device(), gpu.stream(), gpu.matmul_precision("bfloat16"):
        a, b = map(gpu.asarray, matrices(rng, 16, 16, 136))
        out, x, y = gpu.empty((16, 136), "float32"), gpu.cast(a), gpu.cast(b)
        mask, narrow = gpu.empty((16, 32), "uint8"), gpu.empty((16, 17), "uint8")
        assert Product(x, y, gpu.cast(out), "bfloat16", Epilogue(bits=mask)).accepted()
        for given in ((x, y, gpu.cast(out), narrow), (x, y, out, mask), (a, b, out, mask)):
            assert not Product(*given[:3], "bfloat16", Epilogue(bits=given[3])).accepted()


def test_a_product_with_a_mask_that_cublaslt_cannot_compute_raises(gpu, rng):
    with gpu.device(), gpu.stream(), gpu.matmul_precision("bfloat16"):
        x, y, out = (HalfMatrix(gpu.zeros((16, 16), "uint16"), "bfloat16") for _ in range(3))
        with pytest.raises(RuntimeError, match="no algorithm for a product with a mask of ReLU"):
            gpu.matmul_masked(x, y, gpu.zeros((16, 2), "uint8"), out)


def test_without_cublaslt_products_are_computed_by_cublas(gpu, monkeypatch, caplog, rng):
    def missing(self):
        raise OSError("no such library")

    if gpu.name != "emulated":
        pytest.skip("a real GPU has the library")
    monkeypatch.setattr(type(gpu), "_cublaslt_library", missing)
    _, watch = fit(mlp(gpu))
    assert watch.captured and watch.fallback_reason is None
    assert caplog.text.count("cuBLASLt cannot be called (OSError") == 1


def test_choices_are_those_of_the_device_and_the_versions(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("XPNET_CACHE_DIR", str(tmp_path))
    choices = type(gpu).choices.func(gpu)
    choices.set("1x2x3", "cublas")
    ((identity, chosen),) = json.loads((tmp_path / "products.json").read_text()).items()
    assert chosen == {"1x2x3": "cublas"}
    assert re.fullmatch(rf".+, CUDA \d+ and \d+, cuBLASLt \d+, xpnet {re.escape(xpnet.__version__)}", identity)


def test_a_device_times_the_ways(gpu, rng):
    with gpu.device(), gpu.stream():
        a, b = map(gpu.asarray, matrices(rng, 64, 64, 64))
        out = gpu.empty((64, 64), "float32")
        product = Product(a, b, out, "float32", Epilogue())
        names = gpu.products().ways(product)
        assert GPUBackend.fastest(gpu, names) in names


@pytest.mark.parametrize("architecture", [75, 80, 90, 100])
@pytest.mark.parametrize(("name", "precision"), EVERY_TILING)
def test_nvrtc_compiles_every_tiling(architecture, name, precision):
    for a, b in [(0, 0), (1, 0), (0, 1)]:
        options = products.macros(TILINGS[name], precision, a, b)
        assert b"product" in compiled(products.SOURCE, architecture, "-DREAL=float", *options)
