"""Graph models as ONNX files: several inputs and outputs, shared layers, merges, images in both orders of axes."""

import copy

import every
import numpy as np
import pytest
import random_graphs

import xpnet
from xpnet import layers
from xpnet.errors import ArgumentError

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

RNG = np.random.default_rng(0)


def samples(shape, dtype="float32", count=5):
    if dtype == "float32":
        return RNG.normal(size=(count, *shape)).astype(dtype)
    return RNG.integers(0, 7, size=(count, *shape)).astype(dtype)


def in_file(x, channels_first):
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if channels_first and x.ndim == 4 else x


def as_list(x):
    return x if isinstance(x, list) else [x]


def close(got, want):
    for a, b in zip(as_list(got), as_list(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def check(model, path, x, channels_first=False, **kwargs):
    """Export the model, compare it with ONNX Runtime and with the imported model, and return the latter."""
    rng = np.random.default_rng(1)
    for parameter in model.parameters:
        parameter.value += 0.1 * rng.normal(size=parameter.shape)
    want = model.predict(x)
    xpnet.export_onnx(model, path, channels_first=channels_first, **kwargs)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    given = dict(zip(names, (in_file(a, channels_first) for a in as_list(x)), strict=True))
    close(session.run(None, given), [in_file(a, channels_first) for a in as_list(want)])
    imported = xpnet.import_onnx(path, "cpu")
    close(imported.predict(x), want)
    assert sum(p.size for p in imported.parameters) == sum(p.size for p in model.parameters)
    return imported


@pytest.mark.parametrize("seed", range(30))
def test_a_random_graph_is_exported_and_imported(tmp_path, seed):
    graph = random_graphs.random_graph(seed)
    model = random_graphs.model_of(graph, backend="cpu")
    x = [samples((size,)) for size in graph.inputs]
    imported = check(model, tmp_path / "m.onnx", random_graphs.one_or_list(x))
    assert len(imported.parameters) == len(model.parameters)  # shared layers are shared


MERGES = [example for examples in every.MERGING.values() for example in examples]


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize(("shapes", "layer"), MERGES, ids=lambda value: repr(value))
def test_a_merge_layer_is_exported_and_imported(tmp_path, shapes, layer, channels_first):
    if channels_first and not any(len(shape) == 3 for shape in shapes):
        pytest.skip("only images have channels first")
    inputs = [xpnet.Input(shape) for shape in shapes]
    model = xpnet.Model(inputs, copy.deepcopy(layer)(inputs), "cpu")
    imported = check(model, tmp_path / "m.onnx", [samples(shape) for shape in shapes], channels_first)
    assert type(layer) in [type(inner) for inner in imported.layers]


#: Without embeddings, which take integers, and without weights that the import copies or cannot read.
SHARED = [
    (shape, layer)
    for shape, layer in every.LAYERS
    if not isinstance(layer, layers.Embedding | layers.Residual)
    and not (isinstance(layer, layers.Conv2DTranspose) and layer.groups > 1)
    and not (isinstance(layer, layers.MultiHeadAttention) and layer.rotary)
]


@pytest.mark.parametrize(
    ("shape", "layer"), [*SHARED, ((5, 6, 4), layers.Conv2DTranspose(4, 2, strides=2))], ids=lambda value: repr(value)
)
def test_a_shared_layer_stays_shared(tmp_path, shape, layer):
    x, inputs = samples(shape), [xpnet.Input(shape), xpnet.Input(shape)]
    once, twice = copy.deepcopy(layer), copy.deepcopy(layer)
    path = tmp_path / "m.onnx"
    xpnet.export_onnx(xpnet.Sequential([once], shape, "cpu"), path)
    alone = xpnet.import_onnx(path, "cpu")
    model = xpnet.Model(inputs, [twice(tensor) for tensor in inputs], "cpu")
    xpnet.export_onnx(model, path)
    imported = xpnet.import_onnx(path, "cpu")
    close(imported.predict([x, 2.0 * x]), model.predict([x, 2.0 * x]))
    assert [p.shape for p in imported.parameters] == [p.shape for p in alone.parameters]


def conv(filters, size=3, **more):
    return layers.Conv2D(filters, size, padding="same", **more)


def unet():
    x = xpnet.Input((8, 8, 2))
    a = layers.ReLU()(layers.BatchNorm()(conv(4)(x)))
    b = layers.ReLU()(conv(6)(layers.MaxPool2D(2)(a)))
    up = layers.Conv2DTranspose(4, 2, strides=2)(b)
    return x, conv(1, 1)(layers.Concatenate()([a, up, layers.Upsample2D(2)(b)]))


def gates():
    """Squeeze-and-excitation, a spatial gate, and the difference of two branches."""
    x = xpnet.Input((6, 5, 4))
    h = conv(4)(x)
    gate = layers.Sigmoid()(layers.Dense(4)(layers.ReLU()(layers.Dense(2)(layers.GlobalAveragePool2D()(h)))))
    h = layers.Multiply()([h, layers.Reshape((1, 1, 4))(gate)])
    h = layers.Multiply()([h, layers.Sigmoid()(conv(1)(h))])
    return x, layers.Subtract()([layers.Maximum()([h, x]), layers.Average()([h, x, conv(4)(x)])])


def orders():
    """Images that are rearranged in one branch only."""
    x = xpnet.Input((6, 6, 3))
    turned = layers.Permute((1, 0, 2))(x)
    rows = layers.LayerNorm()(layers.Reshape((6, 18))(x))
    flat = layers.Concatenate()([layers.Flatten()(conv(2)(turned)), layers.Flatten()(rows)])
    return x, layers.Dense(3)(layers.Add()([flat, layers.Dense(180)(layers.GlobalMaxPool2D()(conv(4)(x)))]))


def concatenations():
    x = xpnet.Input((4, 4, 4))
    h = conv(4)(x)
    parts = [layers.Concatenate(axis)([x, h, h]) for axis in (0, 1, 2)]
    return x, layers.Add()([layers.GlobalAveragePool2D()(conv(5)(part)) for part in parts])


def residual():
    x = xpnet.Input((6, 6, 3))
    h = layers.Residual(conv(4), layers.ReLU(), projection=layers.Conv2D(4, 1))(x)
    return x, layers.Dense(2)(layers.Flatten()(layers.Residual(conv(4), layers.BatchNorm())(h)))


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("tensors", [unet, gates, orders, concatenations, residual], ids=lambda f: f.__name__)
def test_branches_of_images_are_exported_and_imported(tmp_path, tensors, channels_first):
    x, y = tensors()
    check(xpnet.Model(x, y, "cpu"), tmp_path / "m.onnx", samples(x.shape), channels_first)


def test_layers_that_compare_two_images_stay_shared(tmp_path):
    a, b = xpnet.Input((8, 8, 1), name="left"), xpnet.Input((8, 8, 1), name="right")
    stack = [conv(3), layers.ReLU(), layers.MaxPool2D(2), layers.Flatten(), layers.Dense(4)]
    trunk = xpnet.Sequential(stack, (8, 8, 1), "cpu")
    model = xpnet.Model([a, b], layers.Dot()([trunk(a), trunk(b)]), "cpu")
    for channels_first in (False, True):
        x = [samples((8, 8, 1)), samples((8, 8, 1))]
        imported = check(model, tmp_path / "m.onnx", x, channels_first)
        assert imported.input_names == ["left", "right"]
        kinds = [type(layer).__name__ for layer in imported.layers]
        assert "Dot" in kinds and kinds.count("Dense") == kinds.count("Conv2D") == 1
        imported.fit(x, np.zeros((5, 1)), loss="mse", verbose=0)  # can be trained


def test_inputs_and_outputs_have_their_names(tmp_path):
    image, meta = xpnet.Input((6, 6, 1), name="image"), xpnet.Input((5,), name="digit")
    h = layers.Concatenate()([layers.Flatten()(conv(2)(image)), meta])
    shared = layers.Dense(3, name="shared")
    outputs = [layers.Dense(4, name="digit")(h), layers.Sigmoid()(h), shared(h), shared(layers.ReLU()(h)), h]
    model = xpnet.Model([image, meta], outputs, "cpu")
    imported = check(model, tmp_path / "m.onnx", [samples((6, 6, 1)), samples((5,))])
    assert imported.input_names == ["image", "digit"]
    file = onnx.load(tmp_path / "m.onnx")
    names = [value.name for value in file.graph.output]
    assert [value.name for value in file.graph.input] == ["image", "digit"]
    assert names == ["digit_output", *model.output_names[1:]]
    assert imported.output_names[0] == "digit_output" and imported.output_names[2:4] == ["shared", "shared_2"]


def test_one_input_and_output_without_names_are_x_and_y(tmp_path):
    x = xpnet.Input((4,))
    check(xpnet.Model(x, layers.Add()([x, layers.Tanh()(x)]), "cpu"), tmp_path / "m.onnx", samples((4,)))
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [graph.input[0].name, graph.output[0].name] == ["x", "y"]


def test_models_inside_models_are_exported(tmp_path):
    a, b = xpnet.Input((4,)), xpnet.Input((4,))
    h = layers.Dense(4)(a)
    two = xpnet.Model([a, b], [layers.Add()([h, b]), layers.Tanh()(h)], "cpu")
    x, z = xpnet.Input((4,)), xpnet.Input((4,))
    first = two([x, z])
    second = two([first[1], first[0]])
    check(xpnet.Model([x, z], [*second, first[0]], "cpu"), tmp_path / "m.onnx", [samples((4,)), samples((4,))])


def test_a_subclass_is_exported_unless_it_has_a_forward_of_its_own(tmp_path):
    class Kept(xpnet.Model):
        pass

    class Doubled(xpnet.Model):
        def forward(self, x, training=False):
            return 2.0 * super().forward(x, training)

    x = xpnet.Input((4,))
    check(Kept(x, layers.Dense(3)(x), "cpu"), tmp_path / "m.onnx", samples((4,)))
    with pytest.raises(ArgumentError, match=r"\(Doubled\) cannot be exported"):
        xpnet.export_onnx(Doubled(x, layers.Dense(3)(x), "cpu"), tmp_path / "m.onnx")


def test_integers_that_are_looked_up_and_pixels_that_are_scaled(tmp_path):
    words, pixels = xpnet.Input((3,), name="words"), xpnet.Input((4, 4), name="pixels")
    scaled = layers.Dense(5)(layers.Rescale(1 / 255)(layers.Flatten()(pixels)))
    looked_up = layers.Add()([layers.Embedding(7, 5)(words), layers.Embedding(7, 5)(words)])
    y = layers.Concatenate()([layers.Flatten()(looked_up), scaled, words])
    model = xpnet.Model([words, pixels], y, "cpu")
    x = [samples((3,), "int64"), samples((4, 4), "uint8")]
    check(model, tmp_path / "m.onnx", x, input_dtype=[None, "uint8"])
    with pytest.raises(ArgumentError, match=r"input_dtype must have a dtype for each of the inputs \[.*\], not 3"):
        xpnet.export_onnx(model, tmp_path / "m.onnx", input_dtype=[None] * 3)


def file_of(tmp_path, nodes, inputs, outputs, **constants):
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "g", [value(name, kind, shape) for name, kind, shape in inputs],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [onnx.numpy_helper.from_array(a, name) for name, a in constants.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def node(kind, inputs, output, **attributes):
    return onnx.helper.make_node(kind, inputs.split(), [output], name=f"{kind} of {output}", **attributes)


FLOAT = 1


def test_nodes_with_one_weight_share_a_layer_only_where_all_weights_are_the_same(tmp_path):
    w, b, c = samples((4,), count=4), samples((), count=4), samples((), count=4)
    nodes = [
        node("Gemm", "x w b", "p"), node("Gemm", "p w b", "q"), node("Gemm", "q w c", "r"),
        node("MatMul", "r w", "m"), node("Add", "m b", "s"),
        node("MatMul", "s w", "n"), node("Identity", "n", "i"), node("Add", "i b", "t"), node("Relu", "n", "u"),
        node("Add", "t u", "y"),
    ]  # fmt: skip
    path = file_of(tmp_path, nodes, [("x", FLOAT, ["N", 4])], ["y"], w=w, b=b, c=c)
    model, x = xpnet.import_onnx(path, "cpu"), samples((4,))
    close(model.predict(x), onnxruntime.InferenceSession(path).run(None, {"x": x})[0])
    dense = [layer for layer in model.layers if isinstance(layer, layers.Dense)]
    # The Gemm with c has its own weight, and so has the product n, which is read without b too.
    assert len(dense) == 3 and [layer.use_bias for layer in dense].count(False) == 1


def test_a_weight_for_flattened_images_and_for_vectors_stays_shared(tmp_path):
    kernel, w = samples((2, 2, 2), count=3), samples((4,), count=12)
    flat = [node("Conv", "x kernel", "c"), node("Flatten", "c", "f"), node("MatMul", "f w", "a")]
    for second, permutes in [("z", 1), ("g", 0)]:
        nodes = [*flat, node("Relu", "c", "r"), node("Flatten", "r", "g"), node("MatMul", f"{second} w", "b")]
        path = file_of(
            tmp_path, [*nodes, node("Mul", "a b", "y")], [("x", FLOAT, ["N", 2, 3, 3]), ("z", FLOAT, ["N", 12])], ["y"],
            kernel=kernel, w=w,
        )  # fmt: skip
        model, x, z = xpnet.import_onnx(path, "cpu"), samples((2, 3, 3)), samples((12,))
        want = onnxruntime.InferenceSession(path).run(None, {"x": x, "z": z})[0]
        close(model.predict([x.transpose(0, 2, 3, 1), z]), want)
        kinds = [type(layer).__name__ for layer in model.layers]
        assert kinds.count("Dense") == 1 and kinds.count("Permute") == permutes


def test_an_input_that_is_an_output_and_one_that_nothing_reads(tmp_path):
    inputs = [("a.1", FLOAT, ["N", 4]), ("7", FLOAT, ["N", 2]), ("unused", FLOAT, ["N", 3])]
    nodes = [node("Identity", "a.1", "same"), node("Relu", "7", "out/1"), node("Identity", "out/1", "again")]
    model = xpnet.import_onnx(file_of(tmp_path, nodes, inputs, ["same", "out/1", "again"]), "cpu")
    x = [samples((4,)), samples((2,)), samples((3,))]
    a, b, c = model.predict(x)
    close([a, b, c], [x[0], np.maximum(x[1], 0), np.maximum(x[1], 0)])
    assert model.input_names == ["a_1", "input_2", "unused"] and model.output_names == ["same", "out_1", "again"]


def test_the_shapes_of_several_inputs_are_given(tmp_path):
    nodes = [
        node("Conv", "x w", "c"),
        node("ReduceMean", "c axes", "m", keepdims=0),
        node("Concat", "m z", "y", axis=1),
    ]
    inputs = [("x", FLOAT, ["N", 3, "H", "W"]), ("z", FLOAT, ["N", "size"])]
    axes = np.array([2, 3], "int64")
    path = file_of(tmp_path, nodes, inputs, ["y"], w=samples((3, 2, 2), count=4), axes=axes)
    x, z = samples((3, 5, 6)), samples((2,))
    want = onnxruntime.InferenceSession(path).run(None, {"x": x, "z": z})[0]
    for shapes in ([(5, 6, 3), (2,)], ([5, 6, 3], 2)):
        model = xpnet.import_onnx(path, "cpu", input_shape=shapes)
        close(model.predict([x.transpose(0, 2, 3, 1), z]), want)
    with pytest.raises(ArgumentError, match="a shape for each of the inputs .*'x', 'z'.*, not 1"):
        xpnet.import_onnx(path, "cpu", input_shape=(5, 6, 3))


@pytest.mark.parametrize(
    ("inputs", "outputs", "match"),
    [
        ([("x", FLOAT, [2, 4]), ("z", FLOAT, [3, 4])], ["y"], r"the inputs have batches of different sizes: \[2, 3\]"),
        ([("x", FLOAT, [2, 4]), ("z", FLOAT, [])], ["y"], "the input 'z' must have a batch axis"),
        ([("x", FLOAT, ["N", 3, 4]), ("z", FLOAT, ["N", 4])], ["y"], r"Add of samples of shapes \(3, 4\), \(4,\)"),
        ([("x", FLOAT, ["N", 4]), ("z", FLOAT, ["N", 3])], ["y"], "operator Add is not supported in this form"),
        ([("x", FLOAT, ["N", 4]), ("z", 11, ["N", 4])], ["y"], "Add of opset 20 does not take inputs of"),
        ([("x", FLOAT, ["N", 4]), ("z", FLOAT, ["N", 4])], ["y", "e"], "operator Erf is not supported"),
        ([("x", 11, ["N", 4]), ("z", 11, ["N", 4])], ["y", "f"], "the outputs have several types: float32, float64"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(tmp_path, inputs, outputs, match):
    nodes = [node("Add", "x z", "y"), node("Erf", "x", "e"), node("Cast", "x", "f", to=1)]
    with pytest.raises(ArgumentError, match=match):
        xpnet.import_onnx(file_of(tmp_path, nodes, inputs, outputs), "cpu")
