"""Random ONNX graphs with branches, merges, shared weights, several inputs and outputs: equal to ONNX Runtime, or
refused by name."""

import re

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import onnx_files  # noqa: E402
from random_onnx import RandomGraph, in_file, run, with_branches  # noqa: E402

import xpnet  # noqa: E402
from xpnet import layers  # noqa: E402


def check(graph, path, outputs):
    want = [graph.outputs[name] for name in outputs]
    got, message = onnx_files.outcome(graph.model(*outputs), list(graph.x.values()), want, path, rtol=1e-3, atol=1e-4)
    assert got != "wrong", message
    assert got == "equal" or re.search(onnx_files.NAMED, message), message
    if got == "equal":
        check_again(xpnet.import_onnx(path, "cpu"), path)
    return got


def check_again(model, path):
    """Export what was imported, for images in both orders of axes, and compare it with ONNX Runtime."""
    shapes = model.input_shape if isinstance(model.input_shape, list) else [model.input_shape]
    x = [np.random.default_rng(0).normal(size=(3, *shape)).astype("float32") for shape in shapes]
    want = model.predict(x if len(x) > 1 else x[0])
    for channels_first in {False, any(len(shape) == 3 for shape in shapes)}:
        xpnet.export_onnx(model, path, channels_first=channels_first)
        given = zip(onnx.load(path).graph.input, x, strict=True)
        outputs = run(onnx.load(path), {value.name: in_file(a, channels_first) for value, a in given})
        for got, y in zip(outputs, want if isinstance(want, list) else [want], strict=True):
            np.testing.assert_allclose(got, in_file(y, channels_first), rtol=1e-3, atol=1e-4)
        imported = xpnet.import_onnx(path, "cpu")
        assert sum(p.size for p in imported.parameters) <= sum(p.size for p in model.parameters)


def test_attention_on_a_sequence_that_was_pooled_is_imported_again(tmp_path):
    """The exporter permutes the sequence once for queries, keys and values, which have one tensor."""
    model = xpnet.Sequential(
        [layers.MaxPool1D(3), layers.Permute((1, 0)), layers.MultiHeadAttention(3)], (9, 4), backend="cpu"
    )
    xpnet.export_onnx(model, tmp_path / "g.onnx")
    assert isinstance(xpnet.import_onnx(tmp_path / "g.onnx", "cpu").layers[-1], layers.MultiHeadAttention)
    check_again(model, tmp_path / "g.onnx")


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(300))
def test_a_random_graph_is_equal_or_refused_by_name(tmp_path, seed):
    graph = RandomGraph(seed)
    check(graph, tmp_path / "g.onnx", [next(reversed(graph.outputs))])


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(400))
def test_a_random_graph_with_branches_is_equal_or_refused_by_name(tmp_path, seed):
    graph, outputs = with_branches(seed)
    check(graph, tmp_path / "g.onnx", outputs)


def test_many_random_graphs_with_branches_are_imported(tmp_path):
    found = []
    for seed in range(12):
        graph, outputs = with_branches(seed)
        found.append(check(graph, tmp_path / "g.onnx", outputs))
    assert found.count("equal") >= 4
