"""ONNX files: onnxruntime computes from them what `predict` does, and xpnet reads them back."""

import copy

import numpy as np
import pytest

import xpnet
from xpnet import augment, layers
from xpnet.errors import ArgumentError, FileError, StateError

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import TensorProto, helper  # noqa: E402

IMAGE, VECTOR = (9, 8, 4), (6,)


def norms(kind):
    return [kind(), kind(epsilon=0.1), kind(center=False), kind(scale=False)]


LAYERS = [
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
            layers.LogSoftmax(),
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
    *[(IMAGE, layers.Upsample2D(size, how)) for size in (2, (1, 3)) for how in ("nearest", "bilinear")],
    (IMAGE, layers.Residual(layers.Conv2D(4, 3, padding="same"), layers.BatchNorm(), layers.ReLU())),
    (IMAGE, layers.Residual(layers.Conv2D(6, 3, strides=2, padding="same"))),
    (VECTOR, layers.Residual(layers.Dense(5), layers.Tanh(), layers.Dense(3))),
    (VECTOR, layers.Residual(layers.Dense(3), projection=layers.Sequential([layers.Dense(4), layers.Dense(3)]))),
    (VECTOR, layers.Sequential([layers.Dense(4), layers.Sequential([layers.Tanh(), layers.Dense(2)])])),
    ((12, 12), augment.RandomAffine(shift=1.0)),
]  # fmt: skip


def trained_a_little(stack, shape, **kwargs):
    """A model whose running figures and parameters are not those of its beginning."""
    model = xpnet.Sequential([copy.deepcopy(layer) for layer in stack], shape, "cpu", seed=1, **kwargs)
    rng = np.random.default_rng(2)
    for parameter in model.parameters:
        parameter.value += 0.1 * rng.normal(size=parameter.shape)
    for _ in range(3):
        model.forward(3.0 * rng.normal(size=(16, *shape)) + 1.0, training=True)
    return model


def first(images):
    return images.transpose(0, 3, 1, 2) if images.ndim == 4 else images


def run(path, x):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def close(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize(("shape", "layer"), LAYERS, ids=lambda value: repr(value))
def test_every_layer_there_and_back(tmp_path, rng, shape, layer, channels_first):
    if channels_first and len(shape) != 3:
        pytest.skip("no images")
    model, path = trained_a_little([layer], shape), tmp_path / "model.onnx"
    x = rng.normal(size=(5, *shape)).astype("float32")
    want = model.predict(x)
    xpnet.export_onnx(model, path, channels_first=channels_first)
    turned = first if channels_first else np.asarray
    for count in (1, 5):
        close(run(path, turned(x[:count])), turned(want[:count]))
    back = xpnet.import_onnx(path, "cpu")
    if channels_first and len(model.output_shape) != 3:
        assert back.output_shape == model.output_shape
    close(back.predict(x), want)


CNN = [
    layers.Rescale(0.5, 0.1), layers.Conv2D(4, 3, padding="same"), layers.BatchNorm(), layers.ReLU(),
    layers.MaxPool2D(2), layers.Residual(layers.Conv2D(4, 3, padding="same"), layers.ReLU()), layers.Dropout(0.2),
    layers.Flatten(), layers.Dense(7), layers.SiLU(), layers.Dense(3),
]  # fmt: skip


@pytest.mark.parametrize(("channels_first", "turns"), [(False, 2), (True, 1)])
def test_a_chain_of_image_layers_is_turned_only_at_its_ends(tmp_path, channels_first, turns):
    model, path = trained_a_little(CNN, IMAGE), tmp_path / "m.onnx"
    xpnet.export_onnx(model, path, channels_first=channels_first)
    file = onnx.load(path)
    assert [node.op_type for node in file.graph.node].count("Transpose") == turns
    assert {"1.weight", "1.bias", "5.0.weight", "8.weight"} <= {c.name for c in file.graph.initializer}
    back = xpnet.import_onnx(path, "cpu")
    assert "Permute" not in [type(layer).__name__ for layer in back.layers]
    x = np.random.default_rng(0).normal(size=(4, *IMAGE))
    close(back.predict(x), model.predict(x))
    back.fit(x, np.arange(4) % 3, verbose=0)  # it is a model like any other


def test_words_and_pixels_are_whole_numbers(tmp_path, rng):
    words = trained_a_little_words = xpnet.Sequential(
        [layers.Reshape((2, 2)), layers.Embedding(11, 5), layers.LayerNorm(), layers.Flatten(), layers.Dense(2)],
        (4,),
        "cpu",
    )
    assert trained_a_little_words is words
    x, path = rng.integers(11, size=(5, 4)), tmp_path / "words.onnx"
    xpnet.export_onnx(words, path)
    close(run(path, x), words.predict(x))
    pixels = xpnet.Sequential([layers.Rescale(1 / 255), layers.Flatten(), layers.Dense(3)], (4, 4), "cpu")
    x = rng.integers(256, size=(5, 4, 4), dtype=np.uint8)
    xpnet.export_onnx(pixels, path, input_dtype="uint8")
    close(run(path, x), pixels.predict(x))
    close(xpnet.import_onnx(path, "cpu").predict(x), pixels.predict(x))


def test_an_embedding_comes_back(tmp_path, rng):
    model = xpnet.Sequential(
        [layers.Embedding(11, 5), layers.LayerNorm(), layers.Flatten(), layers.Dense(2)], (4,), "cpu"
    )
    x = rng.integers(11, size=(5, 4))
    xpnet.export_onnx(model, tmp_path / "m.onnx")
    close(xpnet.import_onnx(tmp_path / "m.onnx", "cpu").predict(x), model.predict(x))


def test_doubles_stay_doubles(tmp_path, rng):
    model = trained_a_little([layers.Dense(4), layers.Tanh(), layers.Dense(2)], VECTOR, dtype="float64")
    x = rng.normal(size=(5, 6))
    xpnet.export_onnx(model, tmp_path / "m.onnx")
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), model.predict(x), rtol=1e-12)
    back = xpnet.import_onnx(tmp_path / "m.onnx", "cpu")
    assert back.dtype == "float64"
    np.testing.assert_allclose(back.predict(x), model.predict(x), rtol=1e-12)


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_has_no_meaning_in_onnx_is_refused(tmp_path):
    class Mine(layers.Layer):
        def forward(self, x):
            return x

    class Louder(layers.ReLU):
        def forward(self, x):
            return 2.0 * super().forward(x)

    for layer in (Mine(), Louder()):
        model = xpnet.Sequential([layers.Sequential([layer])], (3,), "cpu")
        with pytest.raises(ArgumentError, match=rf"layer 0.0 \({type(layer).__name__}\) has no meaning in ONNX"):
            xpnet.export_onnx(model, tmp_path / "m.onnx")
    with pytest.raises(ArgumentError, match="channels_first is for images"):
        xpnet.export_onnx(xpnet.Sequential([layers.Dense(2)], (3,), "cpu"), tmp_path / "m.onnx", channels_first=True)
    with pytest.raises(StateError, match="not built"):
        xpnet.export_onnx(xpnet.Sequential([layers.Dense(2)], backend="cpu"), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(FileError, match="there is no such file"):
        xpnet.import_onnx(tmp_path / "nothing")
    (tmp_path / "text").write_text("this is no ONNX file, though it has some length")
    with pytest.raises(FileError, match="text: "):
        xpnet.import_onnx(tmp_path / "text")
    xpnet.export_onnx(xpnet.Sequential([layers.Dense(50)], (30,), "cpu"), tmp_path / "m.onnx")
    (tmp_path / "cut").write_bytes((tmp_path / "m.onnx").read_bytes()[:-1000])
    with pytest.raises(FileError, match="cut: "):
        xpnet.import_onnx(tmp_path / "cut")


def graph(tmp_path, nodes, constants=(), sample=("N", 4), outputs=("y",)):
    value = helper.make_tensor_value_info
    inputs = [value("x", TensorProto.FLOAT, list(sample))]
    made = helper.make_graph(
        nodes, "g", inputs, [value(name, TensorProto.FLOAT, ["N", "any"]) for name in outputs],
        [onnx.numpy_helper.from_array(np.asarray(a, dtype=d), name) for name, a, d in constants],
    )  # fmt: skip
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


F = "float32"
REFUSED = {
    "an operator without a layer": ([helper.make_node("Erf", ["x"], ["y"])], [], "operator Erf has no layer here"),
    "an operand that is no bias": (
        [helper.make_node("Add", ["x", "b"], ["y"])], [("b", np.ones(4), F)], "operand of shape .* that is no bias"
    ),
    "a product of two ways": (
        [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Mul", ["r", "x"], ["y"])], [], "no residual sum"
    ),
    "a product of constants only": (
        [helper.make_node("Relu", ["a"], ["y"])], [("a", np.ones(3), F)], "works on constants only"
    ),
    "a weight that comes from the input": (
        [helper.make_node("MatMul", ["x", "x"], ["y"])], [], "has a weight that is not a constant"
    ),
    "a weight of another shape": (
        [helper.make_node("MatMul", ["x", "w"], ["y"])], [("w", np.ones((5, 2)), F)], "weight of shape .5, 2."
    ),
    "a softmax over the batch": ([helper.make_node("Softmax", ["x"], ["y"], axis=0)], [], "runs over axis 0"),
    "a shape that mixes samples": (
        [helper.make_node("Reshape", ["x", "s"], ["y"])], [("s", [2, 8], "int64")], "takes in the batch"
    ),
    "the batch moved": ([helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0])], [], "moves the batch"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_graphs_that_are_no_chains_of_our_layers_are_refused(tmp_path, name):
    nodes, constants, match = REFUSED[name]
    with pytest.raises(ArgumentError, match=match):
        xpnet.import_onnx(graph(tmp_path, nodes, constants), "cpu")


@pytest.mark.parametrize(
    ("attributes", "match"),
    [
        ({"pads": [0, 0, 0, 1]}, "neither alike on either side"),
        ({"auto_pad": "SAME_UPPER"}, "auto_pad SAME_UPPER"),
    ],
)
def test_paddings_that_we_do_not_have_are_refused(tmp_path, attributes, match):
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    path = graph(tmp_path, [node], [("w", np.ones((2, 3, 2, 2)), F)], sample=("N", 3, 6, 6))
    with pytest.raises(ArgumentError, match=match):
        xpnet.import_onnx(path, "cpu")


def test_a_graph_of_unknown_size_or_two_ends_is_refused(tmp_path):
    relu = helper.make_node("Relu", ["x"], ["y"])
    with pytest.raises(ArgumentError, match="all but the batch must be known"):
        xpnet.import_onnx(graph(tmp_path, [relu], sample=("N", "features")), "cpu")
    with pytest.raises(ArgumentError, match="1 inputs and 2 outputs"):
        xpnet.import_onnx(graph(tmp_path, [relu, helper.make_node("Tanh", ["x"], ["z"])], outputs=("y", "z")), "cpu")


# PyTorch's files ------------------------------------------------------------------------------------------------------


def torch_nets():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, ins, outs):
            super().__init__()
            self.way = nn.Sequential(
                nn.Conv2d(ins, outs, 3, padding=1, stride=2),
                nn.BatchNorm2d(outs),
                nn.ReLU(),
                nn.Conv2d(outs, outs, 3, padding=1),
            )
            self.skip = nn.Conv2d(ins, outs, 1, stride=2)

        def forward(self, x):
            return torch.relu(self.way(x) + self.skip(x))

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
        "upwards": ([nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), nn.ReLU(),
                     nn.Upsample(scale_factor=2, mode="bilinear")], (3, 5, 6)),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # the exporter warns of much
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", ["mlp", "cnn", "views", "residual", "upwards"])
def test_a_net_of_pytorchs_comes_in(tmp_path, name, dynamo):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    stack, shape = torch_nets()[name]
    net, x = torch.nn.Sequential(*stack), torch.randn(4, *shape)
    for _ in range(3):
        net(x)  # so that the running figures move
    net.eval()
    path = tmp_path / "torch.onnx"
    if dynamo:
        torch.onnx.export(net, (x,), path, dynamo=True, opset_version=20, external_data=False, verbose=False)
    else:
        torch.onnx.export(
            net, (x,), path, dynamo=False, opset_version=20, input_names=["x"], dynamic_axes={"x": {0: "N"}}
        )
    model = xpnet.import_onnx(path, "cpu")
    images = len(shape) == 3
    got = model.predict(x.numpy().transpose(0, 2, 3, 1) if images else x)
    close(first(got), net(x).detach().numpy())
