"""ONNX: onnxruntime computes the same outputs as `predict`, and import_onnx reads exported and foreign files."""

import copy
import os

import every
import numpy as np
import pytest

import xpnet
from xpnet import augment, layers
from xpnet.errors import ArgumentError, ArgumentTypeError, FileError, StateError

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import TensorProto, helper  # noqa: E402

IMAGE, VECTOR = (9, 8, 4), (6,)


def norms(kind):
    return [kind(), kind(epsilon=0.1), kind(center=False), kind(scale=False)]


def is_rotary(layer):
    return isinstance(layer, layers.MultiHeadAttention) and layer.rotary


#: Without those that are tested below, or in test_sequences.py.
LAYERS = [
    *[case for case in every.LAYERS if not isinstance(case[1], layers.Embedding) and not is_rotary(case[1])],
    *[(VECTOR, layer) for layer in (layers.Dense(3), layers.Dense(3, use_bias=False))],
    *[((5, 6), layer) for layer in (layers.Dense(3), layers.Dense(3, use_bias=False))],
    *[((5, 6), layer) for layer in (layers.LayerNorm(), layers.BatchNorm())],
    *[(VECTOR, layer) for layer in norms(layers.BatchNorm) + norms(layers.LayerNorm)],
    *[(IMAGE, layer) for layer in (*norms(layers.BatchNorm), layers.LayerNorm())],
    *[
        (shape, layer)
        for shape in (VECTOR, IMAGE, (3, 4))
        for layer in (
            layers.Identity(), layers.ReLU(), layers.LeakyReLU(0.2), layers.ELU(0.7), layers.GELU(),
            layers.GELU("tanh"), layers.SiLU(), layers.Softplus(), layers.Sigmoid(), layers.Tanh(), layers.Softmax(),
            layers.LogSoftmax(), layers.PReLU(), layers.PReLU(shared=True), layers.ReLU6(), layers.HardTanh(),
            layers.HardTanh(0.0, np.inf), layers.HardTanh(-np.inf, 0.5), layers.HardSigmoid(), layers.HardSwish(),
            layers.Mish(), layers.GroupNorm(1), layers.GroupNorm(1, 0.1, center=False),
            layers.Step(0.3), layers.Dropout(0.5), layers.Rescale(0.5), layers.Rescale(2.0, -1.0), layers.Flatten(),
        )
    ],
    *[(IMAGE, layer) for layer in (layers.Reshape((4, -1)), layers.Permute((2, 0, 1)), layers.Permute((1, 0, 2)))],
    *[
        (IMAGE, layers.Conv2D(6, *arguments, **more))
        for arguments, more in [
            ((3,), {}), (((2, 3),), {"padding": "same"}), ((4,), {"padding": "same", "strides": (2, 3)}),
            ((3, 2, 1), {}), ((3, 1, (0, 2)), {"dilation": (1, 2)}), ((3,), {"groups": 2, "use_bias": False}),
            ((1, 2), {}), ((2, 3, "same"), {}),
        ]
    ],
    (IMAGE, layers.DepthwiseConv2D(3)),
    (IMAGE, layers.DepthwiseConv2D(2, 2, "same", depth_multiplier=2)),
    *[
        (IMAGE, layers.Conv2DTranspose(6, *arguments, **more))
        for arguments, more in [
            ((3,), {}), ((3, 2), {}), ((3, 2, "same"), {}), ((2, 3, "same"), {}), ((4, 2, 1), {"groups": 2}),
            ((3, 2, 1), {"output_padding": 1}), (((2, 3),), {"dilation": 2, "use_bias": False}), ((4, 3, "same"), {}),
        ]
    ],
    *[
        (IMAGE, kind(*arguments))
        for kind in (layers.MaxPool2D, layers.AvgPool2D)
        for arguments in [(2,), (3, 2), (3, 2, "same"), ((2, 3), 1, 1), (4, 3, "same")]
    ],
    (IMAGE, layers.AvgPool2D(3, 2, "same", count_include_pad=False)),
    (IMAGE, layers.GlobalAveragePool2D()),
    (IMAGE, layers.GlobalMaxPool2D()),
    (IMAGE, layers.ZeroPadding2D(2)),
    (IMAGE, layers.GroupNorm(2, 0.1, scale=False)),
    *[(shape, layer) for shape in (IMAGE, (5, 6)) for layer in norms(layers.InstanceNorm)],
    *[(IMAGE, layers.Upsample2D(size, kind)) for size in (2, (1, 3)) for kind in ("nearest", "bilinear")],
    (IMAGE, layers.Residual(layers.Conv2D(4, 3, padding="same"), layers.BatchNorm(), layers.ReLU())),
    (IMAGE, layers.Residual(layers.Conv2D(6, 3, strides=2, padding="same"))),
    (VECTOR, layers.Residual(layers.Dense(5), layers.Tanh(), layers.Dense(3))),
    (VECTOR, layers.Residual(layers.Dense(3), projection=layers.Sequential([layers.Dense(4), layers.Dense(3)]))),
    (VECTOR, layers.Sequential([layers.Dense(4), layers.Sequential([layers.Tanh(), layers.Dense(2)])])),
    *[
        ((12, 12), layer)
        for layer in [
            augment.RandomAffine(shift=1.0), augment.RandomFlip(), augment.RandomCrop(2), augment.RandomErasing(),
            augment.GaussianNoise(0.1), augment.MixUp(),
        ]
    ],
]  # fmt: skip


def changed_model(stack, shape, **kwargs):
    """A model whose parameters and running statistics differ from the initial ones."""
    model = xpnet.Sequential([copy.deepcopy(layer) for layer in stack], shape, "cpu", seed=1, **kwargs)
    rng = np.random.default_rng(2)
    for parameter in model.parameters:
        parameter.value += 0.1 * rng.normal(size=parameter.shape)
    for _ in range(3):
        model.forward(3.0 * rng.normal(size=(16, *shape)) + 1.0, training=True)
    return model


def to_channels_first(x):
    return x.transpose(0, 3, 1, 2) if x.ndim == 4 else x


def run(path, x):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def assert_close(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize(("shape", "layer"), LAYERS, ids=lambda value: repr(value))
def test_exported_and_imported_layers_compute_the_same(tmp_path, rng, shape, layer, channels_first):
    if channels_first and len(shape) != 3:
        pytest.skip("only images have channels first")
    model, path = changed_model([layer], shape), tmp_path / "model.onnx"
    x = rng.normal(size=(5, *shape)).astype("float32")
    want = model.predict(x)
    xpnet.export_onnx(model, path, channels_first=channels_first)
    in_file = to_channels_first if channels_first else np.asarray
    for count in (1, 5):
        assert_close(run(path, in_file(x[:count])), in_file(want[:count]))
    imported = xpnet.import_onnx(path, "cpu")
    if channels_first and len(model.output_shape) != 3:
        assert imported.output_shape == model.output_shape
    assert_close(imported.predict(x), want)


CNN = [
    layers.Rescale(0.5, 0.1), layers.Conv2D(4, 3, padding="same"), layers.BatchNorm(), layers.ReLU(),
    layers.MaxPool2D(2), layers.Residual(layers.Conv2D(4, 3, padding="same"), layers.ReLU()), layers.Dropout(0.2),
    layers.Flatten(), layers.Dense(7), layers.SiLU(), layers.Dense(3),
]  # fmt: skip


@pytest.mark.parametrize(("channels_first", "transposes"), [(False, 2), (True, 1)])
def test_image_layers_are_transposed_only_at_their_ends(tmp_path, channels_first, transposes):
    model, path = changed_model(CNN, IMAGE), tmp_path / "m.onnx"
    xpnet.export_onnx(model, path, channels_first=channels_first)
    file = onnx.load(path)
    assert [node.op_type for node in file.graph.node].count("Transpose") == transposes
    assert {"1.weight", "1.bias", "5.0.weight", "8.weight"} <= {c.name for c in file.graph.initializer}
    imported = xpnet.import_onnx(path, "cpu")
    assert "Permute" not in [type(layer).__name__ for layer in imported.layers]
    x = np.random.default_rng(0).normal(size=(4, *IMAGE))
    assert_close(imported.predict(x), model.predict(x))
    imported.fit(x, np.arange(4) % 3, verbose=0)  # an imported model can be trained


def test_models_with_integer_inputs_can_be_exported(tmp_path, rng):
    words = xpnet.Sequential(
        [layers.Reshape((2, 2)), layers.Embedding(11, 5), layers.LayerNorm(), layers.Flatten(), layers.Dense(2)],
        (4,),
        "cpu",
    )
    x, path = rng.integers(11, size=(5, 4)), tmp_path / "words.onnx"
    xpnet.export_onnx(words, path)
    assert_close(run(path, x), words.predict(x))
    pixels = xpnet.Sequential([layers.Rescale(1 / 255), layers.Flatten(), layers.Dense(3)], (4, 4), "cpu")
    x = rng.integers(256, size=(5, 4, 4), dtype=np.uint8)
    xpnet.export_onnx(pixels, path, input_dtype="uint8")
    assert_close(run(path, x), pixels.predict(x))
    assert_close(xpnet.import_onnx(path, "cpu").predict(x), pixels.predict(x))


def test_an_embedding_is_imported(tmp_path, rng):
    model = xpnet.Sequential(
        [layers.Embedding(11, 5), layers.LayerNorm(), layers.Flatten(), layers.Dense(2)], (4,), "cpu"
    )
    x = rng.integers(11, size=(5, 4))
    xpnet.export_onnx(model, tmp_path / "m.onnx")
    assert_close(xpnet.import_onnx(tmp_path / "m.onnx", "cpu").predict(x), model.predict(x))


@pytest.mark.parametrize("padding_index", [None, 2])
def test_a_tied_table_is_exported_transposed(tmp_path, rng, padding_index):
    table = layers.Embedding(6, 6, padding_index=padding_index)
    inner = [layers.Dense(6), layers.Tanh(), layers.Dense(6, tied_to=table, bias_initializer="normal")]
    model = xpnet.Sequential([table, *inner], (4,), "cpu")
    model.layers[0].weight = rng.normal(size=(6, 6))  # a row of the padding index, too, which has no effect
    x, path = rng.integers(6, size=(5, 4)), tmp_path / "m.onnx"
    xpnet.export_onnx(model, path)
    assert_close(run(path, x), model.predict(x))
    assert_close(xpnet.import_onnx(path, "cpu").predict(x), model.predict(x))


def test_float64_models_are_exported_in_float32_or_float64(tmp_path, rng):
    model = changed_model([layers.Dense(4), layers.Tanh(), layers.Dense(2)], VECTOR, dtype="float64")
    x, path = rng.normal(size=(5, 6)), tmp_path / "m.onnx"
    xpnet.export_onnx(model, path)
    assert_close(run(path, x.astype("float32")), model.predict(x).astype("float32"))
    assert xpnet.import_onnx(path, "cpu").dtype == "float32"
    xpnet.export_onnx(model, path, dtype="float64")
    np.testing.assert_allclose(run(path, x), model.predict(x), rtol=1e-12)
    imported = xpnet.import_onnx(path, "cpu")
    assert imported.dtype == "float64"
    np.testing.assert_allclose(imported.predict(x), model.predict(x), rtol=1e-12)
    with pytest.raises(ArgumentError, match='dtype must be "float32" or "float64"'):
        xpnet.export_onnx(model, path, dtype="float16")
    model.parameters[0].value[0, 0] = 1e300
    with pytest.raises(ArgumentError, match="0.weight is too large for float32"):
        xpnet.export_onnx(model, path)


def test_a_float64_model_of_images_runs_in_onnxruntime(tmp_path, rng):
    stack = [layers.Conv2D(3, 3), layers.ELU(), layers.AvgPool2D(2), layers.Flatten(), layers.Dense(2)]
    model = changed_model(stack, IMAGE, dtype="float64")  # ONNX Runtime has none of the first three in float64
    x = rng.normal(size=(5, *IMAGE)).astype("float32")
    xpnet.export_onnx(model, tmp_path / "m.onnx")
    assert_close(run(tmp_path / "m.onnx", x), model.predict(x).astype("float32"))


# Models and files that are refused ------------------------------------------------------------------------------------


def test_models_that_cannot_be_exported_are_refused(tmp_path):
    class Custom(layers.Layer):
        def forward(self, x):
            return x

    class Subclass(layers.ReLU):
        def forward(self, x):
            return 2.0 * super().forward(x)

    for layer in (Custom(), Subclass()):
        model = xpnet.Sequential([layers.Sequential([layer])], (3,), "cpu")
        with pytest.raises(ArgumentError, match=rf"layer 0.0 \({type(layer).__name__}\) cannot be exported to ONNX"):
            xpnet.export_onnx(model, tmp_path / "m.onnx")
    with pytest.raises(ArgumentError, match=r"channels_first=True is for models of images .* not of inputs \(3,\)"):
        xpnet.export_onnx(xpnet.Sequential([layers.Dense(2)], (3,), "cpu"), tmp_path / "m.onnx", channels_first=True)
    with pytest.raises(StateError, match="not built"):
        xpnet.export_onnx(xpnet.Sequential([layers.Dense(2)], backend="cpu"), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def changed_file(path, change):
    """A file of a Dense layer and a ReLU, in which `change` has changed the ModelProto, or its bytes."""
    xpnet.export_onnx(xpnet.Sequential([layers.Dense(2), layers.ReLU()], (3,), "cpu"), path)
    file = onnx.load(path)
    content = change(file)
    path.write_bytes(content if isinstance(content, bytes) else file.SerializeToString())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="it is a named pipe"):
        xpnet.import_onnx(tmp_path / "pipe")


@pytest.mark.parametrize(("change", "reason"), [
    (lambda f: f.graph.output.append(f.graph.output[0]), r"the outputs have the names \['y', 'y'\], one of them twice"),
    (lambda f: f.graph.input.append(f.graph.input[0]), "the inputs have the names"),
    (lambda f: f.opset_import.append(helper.make_opsetid("", 7)), "opset 7 and 20 cannot both be those of the file"),
    (lambda f: f.opset_import.append(helper.make_opsetid("ai.onnx", 7)), "opset 7 and 20 cannot both"),
    (lambda f: f.SerializeToString().replace(b"relu", b"re\xffu"), "its text b?'re.*u.*' is not UTF-8"),
])  # fmt: skip
def test_contradictions_and_texts_that_are_none_are_refused(tmp_path, change, reason):
    changed_file(tmp_path / "m.onnx", change)
    with pytest.raises((ArgumentError, FileError), match=reason):
        xpnet.import_onnx(tmp_path / "m.onnx")


def test_missing_damaged_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileError, match="there is no such file"):
        xpnet.import_onnx(tmp_path / "nothing")
    with pytest.raises(FileError, match="it is a folder, not a regular file"):
        xpnet.import_onnx(tmp_path)
    with pytest.raises(ArgumentTypeError, match=r"path must be a str or an os.PathLike, not None"):
        xpnet.import_onnx(None)
    (tmp_path / "text").write_text("this is not an ONNX file, though it has some length")
    with pytest.raises(FileError, match="text: "):
        xpnet.import_onnx(tmp_path / "text")
    xpnet.export_onnx(xpnet.Sequential([layers.Dense(50)], (30,), "cpu"), tmp_path / "m.onnx")
    (tmp_path / "cut").write_bytes((tmp_path / "m.onnx").read_bytes()[:-1000])
    with pytest.raises(FileError, match="cut: "):
        xpnet.import_onnx(tmp_path / "cut")


def test_altered_files_raise_errors_of_xpnet(tmp_path, rng):
    model = xpnet.Sequential([layers.Conv2D(2, 3), layers.BatchNorm(), layers.Flatten(), layers.Dense(2)], IMAGE, "cpu")
    xpnet.export_onnx(model, tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    for _ in range(300):
        altered = bytearray(content)
        altered[rng.integers(len(altered))] = rng.integers(256)
        (tmp_path / "altered").write_bytes(altered)
        try:
            xpnet.import_onnx(tmp_path / "altered", "cpu")  # a weight may differ
        except (ArgumentError, FileError) as error:
            assert "altered: " in str(error)


def graph(tmp_path, nodes, constants=(), sample=("N", 4), outputs=("y",)):
    value = helper.make_tensor_value_info
    inputs = [value("x", TensorProto.FLOAT, list(sample))]
    content = helper.make_graph(
        nodes, "g", inputs, [value(name, TensorProto.FLOAT, ["N", "any"]) for name in outputs],
        [onnx.numpy_helper.from_array(np.asarray(a, dtype=d), name) for name, a, d in constants],
    )  # fmt: skip
    onnx.save(
        helper.make_model(content, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "g.onnx"
    )
    return tmp_path / "g.onnx"


F = "float32"
REFUSED = {
    "an operator without a layer": ([helper.make_node("Erf", ["x"], ["y"])], [], "operator Erf is not supported"),
    "a quotient of two branches": (
        [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Div", ["r", "x"], ["y"])], [],
        "operator Div by a tensor that is not constant is not supported"
    ),
    "an output that is constant": (
        [helper.make_node("Relu", ["a"], ["y"])], [("a", np.ones(3), F)], "does not depend on the values of the input"
    ),
    "a weight that depends on the input": (
        [helper.make_node("MatMul", ["x", "x"], ["y"])], [], "has a weight that is not constant"
    ),
    "a weight of another shape": (
        [helper.make_node("MatMul", ["x", "w"], ["y"])], [("w", np.ones((5, 2)), F)], "weight of shape .5, 2."
    ),
    "a softmax over the batch": (
        [helper.make_node("Softmax", ["x"], ["y"], axis=0)], [], "Softmax over axis 0 is not supported"
    ),
    "a shape that mixes samples": (
        [helper.make_node("Reshape", ["x", "s"], ["y"])], [("s", [2, 8], "int64")], "changes the batch axis"
    ),
    "a transposed batch": ([helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0])], [], "moves the batch axis"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_graphs_are_refused(tmp_path, name):
    nodes, constants, match = REFUSED[name]
    with pytest.raises(ArgumentError, match=match):
        xpnet.import_onnx(graph(tmp_path, nodes, constants), "cpu")


def test_a_graph_of_unknown_shape_is_refused_without_an_input_shape(tmp_path, rng):
    relu = helper.make_node("Relu", ["x"], ["y"])
    with pytest.raises(
        ArgumentError, match=r"'x' must be fixed except for the batch, not \['N', 'features'\]: give .* input_shape"
    ):
        xpnet.import_onnx(graph(tmp_path, [relu], sample=("N", "features")), "cpu")
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    weight = rng.normal(size=(2, 3, 3, 3)).astype("float32")
    file = graph(tmp_path, [conv], [("w", weight, F)], sample=("N", 3, "height", "width"))
    x = rng.normal(size=(2, 7, 6, 3)).astype("float32")
    assert_close(
        to_channels_first(xpnet.import_onnx(file, "cpu", input_shape=(7, 6, 3)).predict(x)),
        run(file, to_channels_first(x)),
    )
    for shape in [(7, 6, 4), (7, 6), (3, 7, 6)]:
        with pytest.raises(ArgumentError, match=r"takes samples of shape \('height', 'width', 3\), not"):
            xpnet.import_onnx(file, "cpu", input_shape=shape)
    with pytest.raises(ArgumentError, match=r"input_shape must have a shape for each of the inputs \['x'\], not 2"):
        xpnet.import_onnx(file, "cpu", input_shape=[(7, 6, 3), (7, 6, 3)])


# Files of PyTorch -----------------------------------------------------------------------------------------------------


def torch_nets():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.stack = nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, stride=2),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1),
            )
            self.skip = nn.Conv2d(inputs, outputs, 1, stride=2)

        def forward(self, x):
            return torch.relu(self.stack(x) + self.skip(x))

    class Skip(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    class Normalize(nn.Module):
        def forward(self, x):
            return (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)

    class View(nn.Module):
        def forward(self, x):
            return x.view(x.size(0), -1)

    return {
        "mlp": ([nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 3), nn.GELU(), nn.LayerNorm(3),
                 nn.Dropout()], (6,)),
        "cnn": ([nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3),
                 nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 3, 10), nn.LogSoftmax(1)], (3, 12, 10)),
        "views": ([nn.Conv2d(2, 4, 3), nn.ELU(), nn.AvgPool2d(2), View(), nn.BatchNorm1d(36), nn.Linear(36, 3)],
                  (2, 8, 8)),
        "residual": ([Block(3, 4), Block(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)], (3, 8, 8)),
        "activations": ([nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 3), nn.LayerNorm(3),
                         nn.LeakyReLU(0.2)], (5, 6)),
        "skip of flattened images": ([nn.Conv2d(3, 2, 3), nn.Flatten(), Skip(nn.Linear(72, 72)), nn.Linear(72, 3)],
                                     (3, 8, 8)),
        "skips in skips": ([Skip(Skip(nn.Conv2d(3, 3, 3, padding=1)), Skip(nn.ReLU(), nn.Conv2d(3, 3, 1))),
                            nn.BatchNorm2d(3), nn.MaxPool2d(3, 2, 1)], (3, 8, 8)),
        "channel constants": ([Normalize(), nn.Conv2d(3, 4, 3)], (3, 8, 8)),
        "upsampling": ([nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), nn.ReLU(),
                     nn.Upsample(scale_factor=2, mode="bilinear")], (3, 5, 6)),
        "mobile net": ([nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU6(),
                        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Hardswish(), nn.Conv2d(8, 4, 1), nn.PReLU(4),
                        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.Hardsigmoid()], (3, 9, 8)),
        "norms": ([nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Mish(), nn.Conv2d(8, 6, 3),
                   nn.InstanceNorm2d(6, affine=True), nn.SELU(), nn.PixelShuffle(1), nn.GroupNorm(3, 6)], (3, 9, 8)),
    }  # fmt: skip


TORCH_NETS = ["mlp", "cnn", "views", "residual", "activations", "skip of flattened images", "skips in skips",
              "channel constants", "upsampling", "mobile net", "norms"]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # the exporter gives many warnings
@pytest.mark.parametrize(("dynamo", "opset"), [(False, 11), (False, 16), (False, 20), (True, 18), (True, 20)])
@pytest.mark.parametrize("name", TORCH_NETS)
def test_a_network_of_pytorch_is_imported(tmp_path, name, dynamo, opset):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    stack, shape = torch_nets()[name]
    net, x = torch.nn.Sequential(*stack), torch.randn(4, *shape)
    for _ in range(3):
        net(x)  # changes the running statistics
    net.eval()
    path = tmp_path / "torch.onnx"
    if dynamo:
        torch.onnx.export(net, (x,), path, dynamo=True, opset_version=opset, external_data=False, verbose=False)
    else:
        torch.onnx.export(
            net, (x,), path, dynamo=False, opset_version=opset, input_names=["x"], dynamic_axes={"x": {0: "N"}}
        )
    model = xpnet.import_onnx(path, "cpu")
    expected = {"norms": ["GroupNorm", "InstanceNorm"], "mobile net": ["ReLU6", "HardSwish", "PReLU", "HardSigmoid"]}
    assert set(expected.get(name, [])) <= {type(layer).__name__ for layer in model.layers}
    images = len(shape) == 3
    got = model.predict(x.numpy().transpose(0, 2, 3, 1) if images else x)
    assert_close(to_channels_first(got), net(x).detach().numpy())


TORCH_ACTIVATIONS = [
    ("CELU", 0.6), ("ELU", 0.7), ("GELU",), ("GELU", "tanh"), ("Hardsigmoid",), ("Hardswish",), ("Hardtanh", -0.7, 1.2),
    ("LeakyReLU", 0.2), ("LogSigmoid",), ("LogSoftmax", -1), ("Mish",), ("PReLU",), ("PReLU", 8), ("RReLU",), ("ReLU",),
    ("ReLU6",), ("SELU",), ("SiLU",), ("Sigmoid",), ("Softmax", -1), ("Softmin", -1), ("Softplus",), ("Softplus", 2.0),
    ("Tanh",), ("Tanhshrink",),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [13, 20])
@pytest.mark.parametrize(("name", "arguments"), [(name, rest) for name, *rest in TORCH_ACTIVATIONS], ids=str)
def test_an_activation_of_pytorch_is_imported(tmp_path, name, arguments, opset):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    activation, x = getattr(torch.nn, name)(*arguments).eval(), torch.linspace(-6, 6, 48).reshape(6, 8)
    path = tmp_path / "torch.onnx"
    torch.onnx.export(
        activation, (x,), path, dynamo=False, opset_version=opset, input_names=["x"], dynamic_axes={"x": {0: "N"}}
    )
    assert_close(xpnet.import_onnx(path, "cpu").predict(x), activation(x).detach().numpy())
