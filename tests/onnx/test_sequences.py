"""ONNX of sequences: open lengths, several sequences, and what a file cannot express."""

import copy

import every
import numpy as np
import pytest

import xpnet
from xpnet import layers
from xpnet.errors import ArgumentError

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def run(path, *x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: a for value, a in zip(session.get_inputs(), x, strict=True)})[0]


def changed(model):
    """The model with parameters other than the initial ones."""
    rng = np.random.default_rng(0)
    for parameter in model.parameters:
        parameter.value += 0.1 * rng.normal(size=parameter.shape)
    return model


OPEN = {
    "convolutions": [
        layers.Conv1D(6, 3, padding="causal", dilation=2), layers.Conv1D(6, 3, padding="same"), layers.ReLU(),
        layers.MaxPool1D(2, 1, padding=1), layers.Conv1D(6, 3, 2, "same"), layers.GlobalAveragePool1D(),
    ],
    "recurrent layers": [layers.GRU(5), layers.LSTM(6, reverse=True), layers.SimpleRNN(3, return_sequences=False)],
    "both directions": [
        layers.Bidirectional(layers.LSTM(3)), layers.Bidirectional(layers.GRU(2, return_sequences=False)),
    ],
    "transformer": [layers.PositionalEmbedding(9), layers.TransformerBlock(2, 2), layers.RMSNorm(), layers.Dense(3)],
    "rms": [layers.TransformerBlock(2, 2, causal=False, norm="rms", use_bias=False), layers.GlobalMaxPool1D()],
    "groups": [layers.GroupNorm(2), layers.GroupNorm(4, scale=False), layers.Conv1D(2, 1, 2, "same", 2)],
    "the last step": [layers.Dense(3), layers.Slice(-1), layers.Flatten()],
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN)
def test_a_model_of_any_length_is_exported_and_imported_as_one(tmp_path, rng, name):
    model, path = changed(xpnet.Sequential(OPEN[name], (None, 4), "cpu")), tmp_path / "m.onnx"
    xpnet.export_onnx(model, path)
    imported = xpnet.import_onnx(path, "cpu")
    assert imported.input_shape == (None, 4)
    for length in (1, 2, 9):
        x = rng.normal(size=(3, length, 4)).astype("float32")
        want = model.predict(x)
        np.testing.assert_allclose(run(path, x), want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(imported.predict(x), want, rtol=1e-4, atol=1e-5)


def test_a_language_model_with_a_tied_table_is_exported_and_imported(tmp_path, rng):
    tokens = layers.Embedding(11, 4)
    stack = [tokens, layers.PositionalEmbedding(8), layers.TransformerBlock(2, 2), layers.Dense(11, tied_to=tokens)]
    model, path = changed(xpnet.Sequential(stack, (None,), "cpu")), tmp_path / "m.onnx"
    xpnet.export_onnx(model, path)
    for length in (1, 8):
        x = rng.integers(11, size=(2, length))
        np.testing.assert_allclose(run(path, x), model.predict(x), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(xpnet.import_onnx(path, "cpu").predict(x), model.predict(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_to_another_sequence_is_exported_and_imported(tmp_path, rng, causal):
    query, memory = xpnet.Input((3, 4), name="query"), xpnet.Input((5, 6), name="memory")
    attended = layers.MultiHeadAttention(2, causal=causal)([query, memory])
    model, path = changed(xpnet.Model([query, memory], attended, "cpu")), tmp_path / "m.onnx"
    x = [rng.normal(size=(2, *shape)).astype("float32") for shape in ((3, 4), (5, 6))]
    xpnet.export_onnx(model, path)
    np.testing.assert_allclose(run(path, *x), model.predict(x), rtol=1e-4, atol=1e-5)
    imported = xpnet.import_onnx(path, "cpu")
    np.testing.assert_allclose(imported.predict(x), model.predict(x), rtol=1e-4, atol=1e-5)
    assert [type(layer) for layer in imported.layers] == [layers.MultiHeadAttention]


def test_rotated_queries_and_keys_are_exported_and_not_imported(tmp_path, rng):
    model = changed(xpnet.Sequential([layers.MultiHeadAttention(2, causal=True, rotary=True)], (5, 8), "cpu"))
    x, path = rng.normal(size=(3, 5, 8)).astype("float32"), tmp_path / "m.onnx"
    xpnet.export_onnx(model, path)
    np.testing.assert_allclose(run(path, x), model.predict(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match="operator MatMul of heads that are computed from samples of shape"):
        xpnet.import_onnx(path, "cpu")


def test_layers_that_depend_on_an_open_length_are_refused(tmp_path):
    path, kind = tmp_path / "m.onnx", onnx.TensorProto.FLOAT
    x, y = (onnx.helper.make_tensor_value_info(name, kind, ["N", "T", 4]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Flatten", ["x"], ["y"])], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 20)]), path)
    with pytest.raises(ArgumentError, match=r"depend on the length .* Give import_onnx an input_shape"):
        xpnet.import_onnx(path, "cpu")
    assert xpnet.import_onnx(path, "cpu", input_shape=(6, 4)).output_shape == (24,)


@pytest.mark.parametrize(
    ("stack", "shape", "message"),
    [
        ([layers.Masking(), layers.LSTM(2)], (3, 4), r"layer 1 \(LSTM\) leaves out the padded steps"),
        ([layers.Embedding(5, 4, padding_index=0), layers.GlobalMaxPool1D()], (3,), r"\(GlobalMaxPool1D\) leaves out"),
        ([layers.Masking(), layers.TransformerBlock(2)], (3, 4), r"\(MultiHeadAttention\) leaves out"),
        ([layers.Masking(), layers.Residual(layers.Dense(4), projection=layers.GRU(4))], (3, 4), r"\(GRU\) leaves out"),
        ([layers.MultiHeadAttention(2, rotary=True)], (None, 4), "rotary=True has an open length"),
        ([layers.Conv1D(2, 3, 2, "same", 2)], (None, 4), 'padding="same", strides and a dilation .* open length'),
    ],
)  # fmt: skip
def test_what_a_file_cannot_express_is_refused(tmp_path, stack, shape, message):
    with pytest.raises(ArgumentError, match=message):
        xpnet.export_onnx(xpnet.Sequential(stack, shape, "cpu"), tmp_path / "m.onnx")


def test_every_layer_that_a_mask_affects_is_refused(tmp_path, rng):
    affected = set()
    for shape, layer in every.LAYERS:
        if isinstance(shape, tuple) and len(shape) == 2:
            stacks = [[first, copy.deepcopy(layer)] for first in (layers.Masking(), layers.Identity())]
            masked, plain = (xpnet.Sequential(stack, shape, "cpu") for stack in stacks)
            x = rng.normal(size=(2, *shape)).astype("float32")
            x[:, -2:] = 0.0
            if not np.array_equal(masked.predict(x), plain.predict(x)):
                affected.add(type(layer))
                with pytest.raises(ArgumentError, match="leaves out the padded steps"):
                    xpnet.export_onnx(masked, tmp_path / "m.onnx")
    assert affected >= {layers.LSTM, layers.GlobalAveragePool1D, layers.MultiHeadAttention}


def test_a_causal_query_without_keys_is_refused(tmp_path):
    query, memory = xpnet.Input((5, 4)), xpnet.Input((3, 4))
    model = xpnet.Model([query, memory], layers.MultiHeadAttention(2, causal=True)([query, memory]), "cpu")
    with pytest.raises(ArgumentError, match="5 queries for 3 keys"):
        xpnet.export_onnx(model, tmp_path / "m.onnx")


def test_a_mask_that_nothing_reads_does_not_matter(tmp_path, rng):
    model = xpnet.Sequential([layers.Masking(), layers.Dense(2)], (3, 4), "cpu")
    x, path = rng.normal(size=(2, 3, 4)).astype("float32"), tmp_path / "m.onnx"
    xpnet.export_onnx(model, path)
    np.testing.assert_allclose(run(path, x), model.predict(x), rtol=1e-4, atol=1e-5)
