"""Small ONNX graphs in every form of every supported operator: equal to ONNX Runtime, or refused by name."""

import itertools
import re

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import onnx_files  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402

VECTOR, SEQUENCE, IMAGE = (4,), (3, 4), (2, 7, 6)
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


def ints(*values):
    return np.array(values, "int64")


def op(kind, inputs="x", output="y", **attributes):
    return helper.make_node(kind, inputs.split(), output.split(), name=f"{kind} of {output}", **attributes)


def ops(text):
    """Nodes with integer attributes, such as "m = MatMul x w; y = Softmax m axis=1"."""
    nodes = []
    for line in text.split("; "):
        output, call = line.split(" = ")
        kind, *words = call.split()
        attributes = {name: int(value) for name, _, value in (word.partition("=") for word in words) if value}
        nodes.append(op(kind, " ".join(word for word in words if "=" not in word), output, **attributes))
    return nodes


CASES = {}


def case(expected, name, shape, nodes, opset=20, batch="N", dtype="float32", **constants):
    """Register a graph from x to y, which must be imported ("equal") or refused in words that contain `expected`."""
    assert name not in CASES, name
    nodes = nodes if isinstance(nodes, list) else [nodes]
    CASES[name] = expected, shape, nodes, opset, batch, dtype, constants


def model_of(shape, nodes, opset=20, batch="N", dtype="float32", constants=None):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, [batch, *shape])],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("my.domain", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def sample_of(shape, batch="N", dtype="float32"):
    count = batch if isinstance(batch, int) else 3
    x = np.random.default_rng(1).normal(size=(count, *shape))
    return (x if np.dtype(dtype).kind == "f" else np.abs(9 * x)).astype(dtype)


def reference(model, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(["y"], {"x": x})[0]
    except Exception:  # of the operators and types that ONNX Runtime lacks, and of graphs that are wrong
        return None


# Elementwise, with every opset ----------------------------------------------------------------------------------------

for kind in ("Relu", "Sigmoid", "Tanh", "Softplus", "Neg"):
    for opset in (7, 13, 22):
        case("equal", f"{kind} in opset {opset}", VECTOR, op(kind), opset)
for opset in (7, 16, 22):
    case("equal", f"LeakyRelu in opset {opset}", VECTOR, op("LeakyRelu", alpha=0.3), opset)
    case("equal", f"Elu in opset {opset}", VECTOR, op("Elu", alpha=0.7), opset)
    case("equal", f"Identity in opset {opset}", VECTOR, ops("i = Identity x; y = Relu i"), opset)
case("equal", "LeakyRelu with its default", VECTOR, op("LeakyRelu"))
case("equal", "Gelu", VECTOR, op("Gelu"))
case("equal", "Gelu by tanh", VECTOR, op("Gelu", approximate="tanh"))
case("operator Erf is not supported", "Erf", VECTOR, op("Erf"))
case("equal", "Clip at 0", VECTOR, op("Clip", "x zero"), zero=np.float32(0))
case("equal", "Clip in opset 7", VECTOR, op("Clip", min=0.0), 7)
case("equal", "Clip as ReLU6", VECTOR, op("Clip", "x zero six"), zero=np.float32(0), six=np.float32(6))
case("equal", "Clip to both sides", VECTOR, op("Clip", "x a b"), a=np.float32(-0.5), b=np.float32(0.5))
case("equal", "Clip at most", VECTOR, helper.make_node("Clip", ["x", "", "b"], ["y"], name="clip"), b=np.float32(0.5))
case("equal", "Clip of everything", VECTOR, op("Clip"))
case("equal", "Clip in opset 6", VECTOR, op("Clip", min=-0.5, max=0.5), 6)
case("must be below", "Clip with crossed limits", VECTOR, op("Clip", "x a b"), a=np.float32(1), b=np.float32(0))
case("limit that is not constant", "Clip by what x gives", VECTOR, ops("m = Relu x; y = Clip x m"))
case(
    "equal",
    "Max and Min of numbers",
    VECTOR,
    ops("m = Max a x b; y = Min m c"),
    a=np.float32([-1]),
    b=np.float32(-0.5),
    c=np.float32([0.5]),
)
case("equal", "Max of x alone", VECTOR, op("Max"))
case("limit of shape (4,)", "Max of features", VECTOR, op("Max", "x c"), c=normal(4))
case("equal", "Max of two branches", VECTOR, ops("t = Tanh x; y = Max x t"))
for kind in ("HardSwish", "Mish"):
    case("equal", kind, VECTOR, op(kind), 18)
for name, attributes in {
    "its defaults": {}, "the slope of PyTorch": {"alpha": 1 / 6}, "another offset": {"alpha": 1 / 6, "beta": 0.4},
}.items():  # fmt: skip
    case("equal", f"HardSigmoid with {name}", VECTOR, op("HardSigmoid", **attributes))
for attributes in ({}, {"alpha": 2.0}):
    case("equal", f"Selu {attributes}", VECTOR, op("Selu", **attributes))
    case("equal", f"Celu {attributes}", VECTOR, op("Celu", **attributes))
case("only above 0", "Celu with a negative alpha", VECTOR, op("Celu", alpha=-1.0))
case("equal", "a batch of numbers", (), ops("r = Tanh x; y = Mul r c"), c=np.float32(0.3))
case("equal", "PRelu with one slope", VECTOR, op("PRelu", "x s"), s=np.float32([0.2]))
case("equal", "PRelu with slopes", VECTOR, op("PRelu", "x s"), s=normal(4))
for shape in [(2, 1, 1), (1, 2, 1, 1), (6,), (7, 1), (2, 7, 6), (1, 1, 1, 1)]:
    nodes = [op("Conv", "x w", "v", pads=[1] * 4), op("PRelu", "v s")]
    case("equal", f"PRelu of images with slopes {shape}", IMAGE, nodes, w=normal(2, 2, 3, 3), s=normal(*shape))
    case("equal", f"PRelu of x with slopes {shape}", IMAGE, op("PRelu", "x s"), s=normal(*shape))
case("changes the batch axis", "PRelu with slopes of samples", VECTOR, op("PRelu", "x s"), batch=3, s=normal(3, 1))
case("equal", "Dropout in opset 7", VECTOR, op("Dropout", ratio=0.3), 7)
case("equal", "Dropout in opset 12", VECTOR, op("Dropout", "x r"), 12, r=np.float32(0.3))
case("equal", "Dropout with an unused mask", VECTOR, op("Dropout", "x r", "y mask"), r=np.float32(0.3))
case("output 'mask'", "the mask of a Dropout", VECTOR, ops("d mask = Dropout x; y = Cast mask to=1"))
case("training_mode", "Dropout in training", VECTOR, op("Dropout", "x r t"), r=np.float32(0.3), t=np.array(True))
case("equal", "a step", VECTOR, ops("g = GreaterOrEqual x t; y = Cast g to=1"), t=np.float32(0.2))
case("an output of bool", "a step without a cast", VECTOR, op("GreaterOrEqual", "x t"), t=np.float32(0.2))

# Types ----------------------------------------------------------------------------------------------------------------

for name, to in [("int64", 7), ("int32", 6), ("uint8", 2), ("bool", 9), ("float16", 10)]:
    case(
        "Cast is not supported",
        f"a cast to {name} and back",
        VECTOR,
        [op("Cast", output="i", to=to), op("Cast", "i", to=1)],
    )
case("converts float32 to float64", "a cast in the middle", VECTOR, ops("r = Relu x; d = Cast r to=11; y = Neg d"))
case("equal", "a cast to the same type", VECTOR, ops("r = Relu x; y = Cast r to=1"))
for dtype in ("uint8", "int32", "bool", "float16"):
    case("equal", f"an input of {dtype}", VECTOR, ops("f = Cast x to=1; y = Neg f"), dtype=dtype)
case(
    "equal",
    "an input of float64",
    VECTOR,
    ops("n = Neg x; y = Add n c"),
    dtype="float64",
    c=np.float64([1.0, 2.0, 3.0, 4.0]),
)
case("equal", "an input of float64, computed in float32", VECTOR, ops("f = Cast x to=1; y = Neg f"), dtype="float64")
case(
    "float64",
    "a float64 input rounded to float32 and back",
    VECTOR,
    ops("f = Cast x to=1; d = Cast f to=11; y = Neg d"),
    dtype="float64",
)
case(
    "Div of int64", "a division of integers", VECTOR, ops("h = Div x two; y = Cast h to=1"), dtype="int64", two=ints(2)
)
case("does not take inputs of", "two types", VECTOR, op("Add", "x c"), c=np.float64([1.0]))
case("computes in float16", "float16", VECTOR, op("Neg"), dtype="float16")
case("output of int64", "integers as they are", SEQUENCE, op("Flatten"), dtype="int64")

# Arithmetic with constants --------------------------------------------------------------------------------------------

for kind, shape in itertools.product(("Add", "Sub", "Mul", "Div"), [(), (1,), (1, 1), (4,), (1, 4)]):
    case("equal", f"{kind} of a constant {shape}", VECTOR, op(kind, "x c"), c=np.asarray(normal(*shape) + 3))
for kind in ("Add", "Sub", "Mul"):
    case("equal", f"{kind} of a constant on the left", VECTOR, op(kind, "c x"), c=normal(4))
    case("equal", f"{kind} of a number on the left", VECTOR, op(kind, "c x"), c=np.asarray(normal()))
case("Div of a constant by a tensor", "Div of a constant on the left", VECTOR, op("Div", "c x"), c=normal(4))
for shape in [(2, 1, 1), (1, 2, 1, 1), (6,), (7, 1), (2, 7, 6), (1, 1, 1, 1)]:
    for kind in ("Mul", "Sub"):
        case(
            "equal",
            f"{kind} of images and a constant {shape}",
            IMAGE,
            [op("Conv", "x w", "v", pads=[1] * 4), op(kind, "v c")],
            c=normal(*shape),
            w=normal(2, 2, 3, 3),
        )
case(
    "equal",
    "per-channel constants as they come",
    IMAGE,
    ops("s = Sub x m; y = Div s d"),
    m=normal(2, 1, 1),
    d=normal(2, 1, 1) + 3,
)
case("changes the batch axis", "a constant (1, 1, 1) with vectors", VECTOR, op("Add", "x c"), c=normal(1, 1, 1))
case("changes the batch axis", "a constant (2, 1) with vectors", VECTOR, op("Add", "x c"), batch=2, c=normal(2, 1))
case("broadcasts samples", "a constant that widens", (3, 1), op("Add", "x c"), c=normal(4))
case("0 as a divisor", "Div by 0", VECTOR, op("Div", "x c"), c=np.float32([1, 0, 2, 3]))
case(
    "equal",
    "a constant computed from constants",
    VECTOR,
    ops("c = Add a b; d = Mul c b; y = Sub x d"),
    a=normal(4),
    b=normal(4),
)
case(
    "equal",
    "integer division of constants",
    VECTOR,
    ops("q = Div a b; f = Cast q to=1; y = Add x f"),
    a=ints(1, -7, 7, 9),
    b=ints(2, 2, -2, 4),
)
case(
    "equal",
    "a Cast chain of constants",
    VECTOR,
    ops("i = Cast a to=7; f = Cast i to=1; y = Mul x f"),
    a=np.float32([1.7, -1.7, 2.5, 3]),
)
case("equal", "a Constant node", VECTOR, [op("Constant", "", "c", value_floats=[1.0, 2.0, 3.0, 4.0]), op("Add", "x c")])
case(
    "equal",
    "Unsqueeze and Gather of constants",
    SEQUENCE,
    ops("u = Unsqueeze v ax; g = Gather u i; y = Mul x g"),
    v=normal(4),
    ax=ints(0),
    i=ints(0, 0, 0),
)
case("does not depend on the values", "a constant output", VECTOR, op("Relu", "c"), c=normal(4))

# Weights --------------------------------------------------------------------------------------------------------------

for transposed, alpha, beta in itertools.product((0, 1), (1.0, 0.5), (1.0, 2.0)):
    case(
        "equal",
        f"Gemm with transB={transposed}, alpha={alpha}, beta={beta}",
        VECTOR,
        op("Gemm", "x w c", transB=transposed, alpha=alpha, beta=beta),
        w=normal(5, 4) if transposed else normal(4, 5),
        c=normal(5),
    )
for shape in [(), (1,), (5,), (1, 5), (1, 1)]:
    case("equal", f"Gemm with C {shape}", VECTOR, op("Gemm", "x w c"), w=normal(4, 5), c=np.asarray(normal(*shape)))
for shape in [(3, 1), (3, 5)]:
    case(
        "not the same for all samples",
        f"Gemm with C {shape}",
        VECTOR,
        op("Gemm", "x w c"),
        batch=3,
        w=normal(4, 5),
        c=normal(*shape),
    )
case("transA", "Gemm with transA", VECTOR, op("Gemm", "x w", transA=1), batch=4, w=normal(4, 5))
case("constant as its input 'A'", "Gemm of a constant", VECTOR, op("Gemm", "w x"), batch=5, w=normal(3, 5))
case("equal", "Gemm without C in opset 11", VECTOR, op("Gemm", "x w"), 11, w=normal(4, 5))
case("equal", "MatMul", VECTOR, op("MatMul", "x w"), w=normal(4, 5))
case("equal", "MatMul and its bias", SEQUENCE, ops("m = MatMul x w; y = Add b m"), w=normal(4, 5), b=normal(5))
case("equal", "MatMul and one number", SEQUENCE, ops("m = MatMul x w; y = Add b m"), w=normal(4, 5), b=normal(1))
case("equal", "MatMul and a table", SEQUENCE, ops("m = MatMul x w; y = Add m b"), w=normal(4, 5), b=normal(3, 5))
case("equal", "MatMul with the weight on the left", SEQUENCE, op("MatMul", "w x"), w=normal(5, 3))
case("weight of shape", "MatMul of a vector", VECTOR, op("MatMul", "x w"), w=normal(4))
case("weight of shape", "MatMul with a stack of weights", SEQUENCE, op("MatMul", "x w"), batch=3, w=normal(3, 4, 5))
case("not constant", "MatMul of x by itself", (3, 3), op("MatMul", "x x"))
case("equal", "an embedding", VECTOR, op("Gather", "w x"), dtype="int64", w=normal(60, 3))
case(
    "supported only as an embedding",
    "a table by columns",
    VECTOR,
    op("Gather", "w x", axis=1),
    dtype="int64",
    w=normal(3, 60),
)
case("equal", "two features", VECTOR, op("Gather", "x i", axis=1), i=ints(1, 2))
for name, indices in (("features apart", ints(0, 2)), ("no features", ints())):
    case("only of one or of adjacent ones", name, VECTOR, op("Gather", "x i", axis=1), i=indices)

# Normalization and softmax --------------------------------------------------------------------------------------------

for opset, shape in itertools.product((7, 9, 14, 15), (VECTOR, SEQUENCE, IMAGE)):
    case(
        "equal",
        f"BatchNormalization of {shape} in opset {opset}",
        shape,
        op("BatchNormalization", "x g b m v", epsilon=0.01),
        opset,
        g=normal(shape[0]),
        b=normal(shape[0]),
        m=normal(shape[0]),
        v=np.abs(normal(shape[0])),
    )
four = {name: np.abs(normal(4)) for name in "gbmv"}
case(
    "in training mode",
    "BatchNormalization with outputs in opset 9",
    VECTOR,
    op("BatchNormalization", "x g b m v", "y mm vv sm sv"),
    9,
    **four,
)
case(
    "in training mode",
    "BatchNormalization with training_mode",
    VECTOR,
    op("BatchNormalization", "x g b m v", "y mm vv", training_mode=1),
    15,
    **four,
)
case(
    "with spatial=0",
    "BatchNormalization of each pixel",
    VECTOR,
    op("BatchNormalization", "x g b m v", spatial=0),
    7,
    **four,
)
for axis in (-1, 1, 2):
    shape = (3, 4) if axis == 1 else (4,)
    case(
        "equal",
        f"LayerNormalization from axis {axis}",
        SEQUENCE,
        op("LayerNormalization", "x g b", axis=axis, epsilon=0.1),
        g=normal(*shape),
        b=normal(*shape),
    )
case("equal", "LayerNormalization without a bias", SEQUENCE, op("LayerNormalization", "x g"), g=normal(4))
case(
    "axis 0",
    "LayerNormalization of the batch",
    SEQUENCE,
    op("LayerNormalization", "x g", axis=0),
    batch=2,
    g=normal(2, 3, 4),
)
case(
    "output 'mean'",
    "the mean of a LayerNormalization",
    SEQUENCE,
    ops("l mean = LayerNormalization x g; y = Add l mean"),
    g=normal(4),
)
for shape in (SEQUENCE, IMAGE, (2, 3, 4, 5)):
    case(
        "equal",
        f"InstanceNormalization of {shape}",
        shape,
        op("InstanceNormalization", "x g b", epsilon=0.1),
        g=normal(shape[0]),
        b=normal(shape[0]),
    )
for shape in ((4, 5), (4, 3, 5)):
    options = {"num_groups": 2, "epsilon": 0.1}
    case(
        "equal",
        f"GroupNormalization of {shape}",
        shape,
        op("GroupNormalization", "x g b", **options),
        21,
        g=normal(4),
        b=normal(4),
    )
old = op("GroupNormalization", "x g b", num_groups=2)
case("does not exist", "GroupNormalization in opset 18", (4, 5), old, 18, g=normal(2), b=normal(2))
for kind, opset, axis in itertools.product(("Softmax", "LogSoftmax"), (7, 11, 13), (1, 2, 3, -1, None)):
    if not (opset == 7 and axis == -1):
        attributes = {} if axis is None else {"axis": axis}
        case("equal", f"{kind} in opset {opset} over axis {axis}", IMAGE, op(kind, **attributes), opset)
case("axis 0", "Softmax over the batch", VECTOR, op("Softmax", axis=0))
case("axis 0", "Softmax over everything", VECTOR, op("Softmax", axis=0), 11)
case("equal", "Softmax over channels", IMAGE, ops("c = Conv x w; y = Softmax c axis=1"), w=normal(5, 2, 2, 2))
case("equal", "Softmax over rows", IMAGE, ops("c = Conv x w; y = Softmax c axis=2"), w=normal(5, 2, 2, 2))

# Convolutions and pooling ---------------------------------------------------------------------------------------------

CONVOLUTIONS = [
    ("equal", {}),
    ("equal", {"pads": [1, 1, 1, 1]}),
    ("equal", {"pads": [1, 0, 1, 0], "strides": [2, 1]}),
    ("equal", {"auto_pad": "SAME_UPPER"}),
    ("equal", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("equal", {"auto_pad": "SAME_LOWER"}),
    ("equal", {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    ("equal", {"auto_pad": "VALID"}),
    ("equal", {"dilations": [2, 1]}),
    ("equal", {"kernel_shape": [3, 3]}),
    ("equal", {"pads": [0, 0, 1, 0]}),
    ("equal", {"pads": [2, 1, 0, 3], "strides": [2, 1]}),
    ("equal", {"strides": [2, 2], "pads": [1, 0, 1, 1]}),
    ("pads [-1", {"pads": [-1, 0, 0, 0]}),
]
for i, (expected, attributes) in enumerate(CONVOLUTIONS):
    case(
        expected, f"Conv {i} {attributes}", IMAGE, op("Conv", "x w b", **attributes), w=normal(4, 2, 3, 3), b=normal(4)
    )
case("equal", "Conv by groups", (4, 5, 5), op("Conv", "x w", group=2), w=normal(6, 2, 3, 3))
case(
    "equal",
    "Conv of each channel, and its bias",
    (4, 5, 5),
    ops("c = Conv x w group=4; y = Add c b"),
    w=normal(4, 1, 3, 3),
    b=normal(4, 1, 1),
)
case("not constant", "Conv by what x gives", IMAGE, ops("r = Relu x; y = Conv x r"), batch=2)
TRANSPOSED = [
    ("equal", {}),
    ("equal", {"strides": [2, 2]}),
    ("equal", {"strides": [2, 3], "pads": [1, 1, 1, 1]}),
    ("equal", {"strides": [2, 2], "output_padding": [1, 1]}),
    ("equal", {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("equal", {"auto_pad": "SAME_UPPER"}),
    ("equal", {"auto_pad": "SAME_LOWER"}),
    (None, {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    ("equal", {"auto_pad": "VALID", "strides": [2, 1]}),
    (None, {"strides": [2, 2], "output_shape": [14, 12]}),
    ("equal", {"strides": [2, 2], "output_shape": [15, 13]}),
    ("equal", {"strides": [2, 2], "output_shape": [16, 14]}),
    ("equal", {"dilations": [2, 2]}),
    ("equal", {"strides": [2, 2], "pads": [1, 1, 0, 0]}),
    (None, {"strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ("not supported by Conv2DTranspose", {"strides": [2, 2], "output_shape": [30, 30]}),
    ("gaps between", {"strides": [4, 4], "auto_pad": "SAME_UPPER"}),
]
for i, (expected, attributes) in enumerate(TRANSPOSED):
    case(
        expected,
        f"ConvTranspose {i} {attributes}",
        IMAGE,
        op("ConvTranspose", "x w b", **attributes),
        w=normal(2, 4, 3, 3),
        b=normal(4),
    )
case(
    "equal",
    "ConvTranspose by groups",
    (4, 5, 5),
    op("ConvTranspose", "x w", group=2, strides=[2, 2]),
    w=normal(4, 3, 3, 3),
)
POOLS = [
    ("equal", {"strides": [2, 2]}),
    ("equal", {}),
    ("equal", {"pads": [1, 1, 1, 1]}),
    ("equal", {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("equal", {"strides": [3, 2], "ceil_mode": 1}),
    (None, {"strides": [2, 2], "ceil_mode": 1}),
    (None, {"strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
    (None, {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    ("without dilations", {"dilations": [2, 2]}),
    (None, {"pads": [0, 0, 1, 1]}),
]
for i, (expected, attributes) in enumerate(POOLS):
    case(expected, f"MaxPool {i} {attributes}", IMAGE, op("MaxPool", kernel_shape=[2, 3], **attributes))
    if "dilations" not in attributes:
        for pad in (0, 1):
            case(
                expected if expected != "equal" or "ceil_mode" not in attributes else None,
                f"AveragePool {i} {attributes} {pad}",
                IMAGE,
                op("AveragePool", kernel_shape=[2, 3], count_include_pad=pad, **attributes),
            )
for mode, value, pads in itertools.product(("constant", "reflect"), (0, 1), ([0, 0, 1, 0, 0, 0, 2, 3], [0] * 8)):
    expected = "equal" if mode == "constant" and value == 0 else "only with zeros"
    case(
        expected,
        f"Pad by {pads} in mode {mode} with {value}",
        IMAGE,
        op("Pad", "x p v", mode=mode),
        p=ints(*pads),
        v=np.float32(value),
    )
case("equal", "Pad without a value", IMAGE, op("Pad", "x p"), 13, p=ints(0, 0, 1, 1, 0, 0, 1, 1))
case("equal", "Pad in opset 2", IMAGE, op("Pad", pads=[0, 0, 1, 0, 0, 0, 2, 3]), 7)
case(
    "equal",
    "Pad of two axes",
    IMAGE,
    helper.make_node("Pad", ["x", "p", "", "a"], ["y"], name="pad"),
    p=ints(1, 0, 2, 3),
    a=ints(-1, 2),
)
for pads in ([0, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0, 0, -1, 0, 0, 0, 0, 0]):
    case("only around the height and width", f"Pad by {pads}", IMAGE, op("Pad", "x p"), batch=2, p=ints(*pads))
case("is supported for images", "Pad of vectors", VECTOR, op("Pad", "x p"), p=ints(0, 1, 0, 0))
case(
    "output 'i'",
    "the indices of a MaxPool",
    IMAGE,
    [op("MaxPool", "x", "p i", kernel_shape=[2, 2]), op("Cast", "i", to=1)],
)
for kind in ("GlobalAveragePool", "GlobalMaxPool"):
    case("equal", kind, IMAGE, op(kind))
    case("equal", f"{kind} and Flatten", IMAGE, [op(kind, output="p"), op("Flatten", "p")])
for kind, axes, keep in itertools.product(
    ("ReduceMean", "ReduceMax", "ReduceSum"), ([2, 3], [-1], [1], [1, 3]), (0, 1)
):
    case("equal", f"{kind} over {axes}, keepdims={keep}", IMAGE, op(kind, "x a", keepdims=keep), a=ints(*axes))
case("equal", "ReduceMean in opset 11", IMAGE, op("ReduceMean", axes=[2, 3], keepdims=0), 11)
case("axis 0", "ReduceMean over everything", IMAGE, op("ReduceMean"))

# Resizing -------------------------------------------------------------------------------------------------------------

SCALES = np.float32([1, 1, 2, 3])
for mode, coordinates, rounding, expected in [
    ("nearest", "asymmetric", "floor", "equal"),
    ("nearest", "half_pixel", "round_prefer_floor", "equal"),
    ("nearest", "half_pixel", "floor", "not supported by Upsample2D"),
    ("linear", "half_pixel", "floor", "equal"),
    ("linear", "pytorch_half_pixel", "floor", "equal"),
    ("linear", "align_corners", "floor", "not supported"),
    ("linear", "asymmetric", "floor", "not supported"),
    ("cubic", "half_pixel", "floor", "not supported"),
    ("nearest", "tf_crop_and_resize", "floor", "not supported"),
]:
    case(
        expected,
        f"Resize {mode}, {coordinates}, {rounding}",
        IMAGE,
        op("Resize", "x roi s", mode=mode, coordinate_transformation_mode=coordinates, nearest_mode=rounding),
        13,
        roi=np.float32([0, 0, 0, 0, 1, 1, 1, 1]),
        s=SCALES,
    )
NEAREST = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
SIZED = helper.make_node("Resize", ["x", "", "", "s"], ["y"], name="r", **NEAREST)
case("equal", "Resize to sizes", IMAGE, SIZED, batch=3, s=ints(3, 2, 14, 18))
case("changes the batch axis", "Resize of the batch to sizes", IMAGE, SIZED, batch=3, s=ints(6, 2, 14, 18))
case("changes the batch axis", "Resize to a fixed batch", IMAGE, SIZED, s=ints(3, 2, 14, 18))
for name, scales in [
    ("Resize of channels", (1, 2, 2, 2)),
    ("Resize of the batch", (2, 1, 2, 2)),
    ("Resize to smaller images", (1, 1, 0.5, 0.5)),
]:
    case(
        "not supported by Upsample2D",
        name,
        IMAGE,
        op("Resize", "x r s", **NEAREST),
        r=np.float32([]),
        s=np.float32(scales),
    )
case(
    "equal",
    "Resize with axes",
    IMAGE,
    helper.make_node("Resize", ["x", "", "s"], ["y"], name="r", axes=[3, 2], **NEAREST),
    18,
    s=np.float32([3, 2]),
)
case(
    "keep_aspect_ratio_policy",
    "Resize that keeps the ratio",
    IMAGE,
    helper.make_node(
        "Resize", ["x", "", "", "s"], ["y"], name="r", axes=[2, 3], keep_aspect_ratio_policy="not_larger", **NEAREST
    ),
    18,
    s=ints(14, 18),
)
case("equal", "Resize in opset 10", IMAGE, op("Resize", "x s", mode="nearest"), 10, s=SCALES)
case(
    "not supported by Upsample2D", "linear Resize in opset 10", IMAGE, op("Resize", "x s", mode="linear"), 10, s=SCALES
)
case("equal", "Upsample in opset 9", IMAGE, op("Upsample", "x s", mode="nearest"), 9, s=SCALES)
case("equal", "Upsample in opset 7", IMAGE, op("Upsample", mode="nearest", scales=[1.0, 1.0, 2.0, 2.0]), 7)
case("not supported by Upsample2D", "linear Upsample", IMAGE, op("Upsample", "x s", mode="linear"), 9, s=SCALES)
for mode in ("DCR", "CRD"):
    case("equal", f"DepthToSpace {mode}", (8, 2, 3), op("DepthToSpace", blocksize=2, mode=mode), 13)
case("equal", "SpaceToDepth", (2, 4, 6), op("SpaceToDepth", blocksize=2))

# Shapes ---------------------------------------------------------------------------------------------------------------

for axis, expected in [(1, "equal"), (0, "batch"), (2, "batch"), (-1, "batch"), (-2, "equal"), (-3, "batch")]:
    case(expected, f"Flatten from axis {axis}", SEQUENCE, op("Flatten", axis=axis), 13)
case("equal", "Flatten after an axis of 1", (1, 5), op("Flatten", axis=2))
for batch, target, expected in [
    ("N", (0, -1), "equal"),
    ("N", (-1, 12), "equal"),
    ("N", (0, 4, 3), "equal"),
    ("N", (-1, 2, 6), "equal"),
    ("N", (0, 0, 4), "equal"),
    ("N", (0, 0, 2, -1), "equal"),
    ("N", (-1, 6), "batch"),
    ("N", (-1,), "batch"),
    ("N", (2, -1), "batch"),
    ("N", (3, 12), "batch"),
    (3, (3, 12), "equal"),
    (3, (3, -1), "equal"),
    (3, (2, -1), "batch"),
    (3, (1, 3, 12), "batch"),
    (3, (9, 4), "batch"),
    ("N", (1, -1, 12), "batch"),
    ("N", (0, 0, 0, 0), "do not have"),
]:
    case(expected, f"Reshape of {batch} to {target}", SEQUENCE, op("Reshape", "x s"), batch=batch, s=ints(*target))
case("changes the batch axis", "Reshape of (4, 6) to (2, -1)", (6,), op("Reshape", "x s"), batch=4, s=ints(2, -1))
case("allowzero", "Reshape with allowzero", SEQUENCE, op("Reshape", "x s", allowzero=1), s=ints(0, 12))
case(
    "equal",
    "a Reshape to images",
    (98,),
    ops("i = Reshape x s; y = Conv i w"),
    s=ints(-1, 2, 7, 7),
    w=normal(3, 2, 3, 3),
)
case(
    "equal",
    "a view of the batch and a product of sizes",
    IMAGE,
    ops(
        "s = Shape x; n = Gather s zero; c = Gather s one; h = Gather s two; ch = Mul c h; n1 = Unsqueeze n a; "
        "ch1 = Unsqueeze ch a; t = Concat n1 ch1 minus axis=0; y = Reshape x t"
    ),
    zero=ints(0)[0],
    one=ints(1)[0],
    two=ints(2)[0],
    a=ints(0),
    minus=ints(-1),
)
case(
    "moves the batch axis",
    "a product with the size of the batch",
    IMAGE,
    ops("s = Shape x; nc = Slice s zero two; m = ReduceProd nc; t = Concat m minus axis=0; y = Reshape x t"),
    zero=ints(0),
    two=ints(2),
    minus=ints(-1),
)
case(
    "changes the batch axis",
    "the size of the batch on axis 1",
    SEQUENCE,
    ops("s = Shape x end=1; t = Concat m s axis=0; y = Reshape x t"),
    m=ints(-1),
)
for axes, opset, expected in [([1], 11, "equal"), ([-1, 1], 13, "equal"), ([0], 13, "batch"), ([3], 13, "equal")]:
    both = {"axes": axes} if opset < 13 else {}
    more = {} if opset < 13 else {"a": ints(*axes)}
    inputs = "x" if opset < 13 else "x a"
    case(expected, f"Unsqueeze of {axes} in opset {opset}", SEQUENCE, op("Unsqueeze", inputs, **both), opset, **more)
    case(
        expected if axes != [1] else "equal",
        f"Squeeze of {axes} in opset {opset}",
        (1, 4, 1),
        op("Squeeze", inputs, **both),
        opset,
        batch=1 if 0 in axes else "N",
        **more,
    )
case("without axes", "Squeeze without axes", (1, 4), op("Squeeze"))
case("equal", "Squeeze without axes of a fixed batch", (1, 4), op("Squeeze"), batch=2)
case("samples without an axis", "Squeeze to numbers", (1,), op("Squeeze", "x a"), a=ints(1))
for perm in [(0, 2, 1, 3), (0, 3, 2, 1), (0, 2, 3, 1), (0, 3, 1, 2), (0, 1, 2, 3)]:
    case("equal", f"Transpose by {perm}", IMAGE, op("Transpose", perm=perm))
    case(
        "equal",
        f"Transpose of a convolution by {perm}",
        IMAGE,
        [op("Conv", "x w", "c"), op("Transpose", "c", perm=perm)],
        w=normal(5, 2, 2, 2),
    )
case("moves the batch axis", "Transpose by default", SEQUENCE, op("Transpose"))
case("moves the batch axis", "Transpose of the batch", (3,), op("Transpose", perm=[1, 0]), batch=3)
case("equal", "Expand to the same shape", SEQUENCE, op("Expand", "x s"), s=ints(1, 3, 4))
case("equal", "Expand to the fixed batch", SEQUENCE, op("Expand", "x s"), batch=3, s=ints(3, 3, 4))
case("is not supported", "Expand to another batch", SEQUENCE, op("Expand", "x s"), batch=1, s=ints(3, 3, 4))
case("equal", "Expand of pixels", (2, 1, 1), op("Expand", "x s"), s=ints(3, 4))
case("equal", "Expand of rows", (2, 1, 4), op("Expand", "x s"), s=ints(1, 2, 5, 4))
case("is not supported", "Expand of channels", (1, 3, 4), op("Expand", "x s"), s=ints(1, 2, 3, 4))
case("is not supported", "Expand to more axes", SEQUENCE, op("Expand", "x s"), s=ints(2, 1, 3, 4))
case("to [3, 3, 4] is not supported", "Expand of an axis", (1, 4), op("Expand", "x s"), batch=3, s=ints(3, 3, 4))
case("equal", "Concat of one", SEQUENCE, op("Concat", axis=1))
for axis in (1, 2, -1, -2):
    case("equal", f"Concat over axis {axis}", SEQUENCE, ops(f"t = Tanh x; y = Concat x t x axis={axis}"))
    nodes = [op("Conv", "x w", "c", pads=[1] * 4), op("Transpose", "x", "t", perm=[0, 1, 2, 3])]
    nodes += ops(f"y = Concat t c axis={axis}")
    case("equal", f"Concat of images over axis {axis}", IMAGE, nodes, w=normal(2, 2, 3, 3))
case("axis 0", "Concat of batches", SEQUENCE, op("Concat", "x x", axis=0))
case("not the same for all samples", "Concat with a constant", SEQUENCE, op("Concat", "x c", axis=1), c=normal(1, 3, 4))
case("part of the batch", "Slice of the batch", SEQUENCE, op("Slice", "x s e"), s=ints(0), e=ints(1))

# Sequences ------------------------------------------------------------------------------------------------------------

for arguments in [
    {}, {"pads": [1, 1]}, {"pads": [4, 0], "dilations": [2]}, {"strides": [2], "auto_pad": "SAME_UPPER"},
    {"auto_pad": "SAME_LOWER", "kernel_shape": [3]}, {"pads": [0, 1], "strides": [2]}, {"pads": [2, 1], "group": 2},
]:  # fmt: skip
    channels = 2 // arguments.get("group", 1)
    case("equal", f"Conv of a sequence {arguments}", (2, 7), op("Conv", "x w", **arguments), w=normal(4, channels, 3))
for arguments in [{}, {"pads": [1, 1]}, {"strides": [2], "ceil_mode": 1}, {"auto_pad": "SAME_UPPER"}]:
    for kind in ("MaxPool", "AveragePool"):
        case("equal", f"{kind} of a sequence {arguments}", (2, 7), op(kind, kernel_shape=[2], **arguments))
for kind in ("GlobalAveragePool", "GlobalMaxPool"):
    case("equal", f"{kind} of a sequence", (2, 7), op(kind))
for kind in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"):
    case("equal", f"{kind} over steps", SEQUENCE, op(kind, "x a", keepdims=0), a=ints(1))
case("equal", "Pad of a sequence", (2, 7), op("Pad", "x p"), p=ints(0, 0, 1, 0, 0, 2))
case("equal", "positions", SEQUENCE, op("Add", "x c"), c=normal(3, 4))
case("equal", "positions, twice", SEQUENCE, ops("m = Add x c; y = Add d m"), c=normal(1, 3, 4), d=normal(3, 4))
case("equal", "positions before other readers", SEQUENCE, ops("m = Add x c; n = Add m c; y = Sub n m"), c=normal(3, 4))
table = {"table": normal(1, 7, 4), "zero": ints(0), "length": ints(3), "one": ints(1)}
case("equal", "the first positions", SEQUENCE, ops("p = Slice table zero length one; y = Add p x"), **table)
case("equal", "later positions", SEQUENCE, ops("p = Slice table length six one; y = Add p x"), **table, six=ints(6))
case("equal", "positions subtracted", SEQUENCE, op("Sub", "c x"), c=normal(3, 4))
for index in (0, 1):
    more = {"c": normal(1, 2, 4), "d": normal(5, 4), "zero": ints(0), "one": ints(1)}
    nodes = ops("s = Shape x; n = Slice s zero one; t = Concat n one one axis=0; e = Expand c t")
    order = ("e x", "x e")[index]
    nodes += ops(f"j = Concat {order} axis=1; p = Add j d; y = Gather p zero axis=1")
    case("equal", f"a class token {order}", SEQUENCE, nodes, **more)
parts = {"a": ints(1), "b": ints(3), "two": ints(2), "minus": ints(-1), "far": ints(2**40), "back": ints(-2)}
case("equal", "Slice of steps", SEQUENCE, op("Slice", "x a b a"), **parts)
case("equal", "Slice of features", SEQUENCE, op("Slice", "x back far two"), **parts)
case("equal", "Slice in opset 9", SEQUENCE, op("Slice", starts=[0, -2], ends=[2**40, 9], axes=[0, 1]), 9)
case("in steps", "Slice in steps", SEQUENCE, op("Slice", "x a far two two"), **parts)
case("equal", "the last step", SEQUENCE, op("Gather", "x i", axis=1), i=np.int64(-1))
case("it is the batch", "the first sample", SEQUENCE, op("Gather", "x i", axis=0), i=np.int64(0))
for split in ("p", "q"):
    nodes = [op("Split", "x s", "p q", axis=-1), op("Sigmoid", split)]
    case("equal", f"Split to {split}", SEQUENCE, nodes, s=ints(3, 1))
nodes = [op("Split", "x", "p q", axis=2, num_outputs=2), op("Sigmoid", "q", "r"), op("Mul", "p r")]
case("equal", "GLU", SEQUENCE, nodes)
case(
    "equal",
    "Split and Concat",
    SEQUENCE,
    [op("Split", "x s", "p q", axis=1), op("Concat", "p q", axis=1)],
    s=ints(1, 2),
)

WIDE = {"w": normal(4, 24), "b": normal(24), "perm": ints(0)}
case("equal", "steps first", SEQUENCE, [op("Transpose", "x", "t", perm=[1, 0, 2]), op("MatMul", "t w", "m"),
     op("Add", "m b", "a"), op("Relu", "a", "r"), op("Transpose", "r", perm=[1, 0, 2])], **WIDE)  # fmt: skip
nodes = [op("Transpose", "x", "t", perm=[1, 0, 2]), op("Softmax", "t", "s"), op("Transpose", "s", perm=[1, 0, 2])]
case("not on axis 0", "Softmax of steps first", SEQUENCE, nodes)
case("equal", "rows of samples and steps", SEQUENCE,
     ops("r = Reshape x rows; m = MatMul r w; g = Gemm m v b; y = Reshape g back"),
     rows=ints(-1, 4), w=normal(4, 5), v=normal(5, 6), b=normal(6), back=ints(-1, 3, 6))  # fmt: skip
case("changes the batch axis", "rows in other samples", SEQUENCE, ops("r = Reshape x rows; y = Reshape r back"),
     rows=ints(-1, 4), back=ints(3, -1, 4))  # fmt: skip
case("equal", "the batch merged with heads", (3, 4), [op("Reshape", "x apart", "r"),
     op("Transpose", "r", "t", perm=[0, 2, 1, 3]), op("Reshape", "t merged", "m"), op("Sigmoid", "m", "s"),
     op("Reshape", "s split", "u"), op("Transpose", "u", perm=[0, 2, 1, 3])],
     apart=ints(0, 0, 2, 2), merged=ints(-1, 3, 2), split=ints(-1, 2, 3, 2))  # fmt: skip

# Recurrent layers -----------------------------------------------------------------------------------------------------

STEPS_FIRST = op("Transpose", "x", "t", perm=[1, 0, 2])


def recurrent(
    expected, name, kind, output="Y", inputs="t w r b", directions=1, opset=20, batch="N", more=None, **given
):
    """A recurrent node of 5 units on (N, 3, 4). output: Y, (T, directions, N, 5), or Y_h, (directions, N, 5)."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    weights = {"w": normal(directions, 5 * gates, 4), "r": normal(directions, 5 * gates, 5)}
    names = ["s", ""] if output == "Y" else ["", "s"]
    node = helper.make_node(kind, inputs.split(" "), names, name=f"{kind} node", hidden_size=5, **given)
    last = op("Transpose", "s", perm=[2, 0, 1, 3] if output == "Y" else [1, 0, 2])
    weights["b"] = normal(directions, 10 * gates)
    case(expected, f"{kind}: {name}", SEQUENCE, [STEPS_FIRST, node, last], opset, batch, **weights, **(more or {}))


for kind, output in itertools.product(("LSTM", "GRU", "RNN"), ("Y", "Y_h")):
    reset = {"linear_before_reset": 1} if kind == "GRU" else {}
    for direction, opset in (("forward", 7), ("reverse", 14), ("bidirectional", 22)):
        directions = 2 if direction == "bidirectional" else 1
        recurrent("equal", f"{output}, {direction}", kind, output, directions=directions, opset=opset,
                  direction=direction, **reset)  # fmt: skip
    recurrent("equal", f"{output}, no bias", kind, output, "t w r", **reset)
    recurrent(
        "equal", f"{output}, zeros", kind, output, "t w r b  h", batch=2, more={"h": normal(1, 2, 5) * 0}, **reset
    )
    recurrent("initial_h that is not 0", f"{output}, a state", kind, output, "t w r b  h", batch=2,
              more={"h": normal(1, 2, 5)}, **reset)  # fmt: skip
    recurrent("input 'sequence_lens'", f"{output}, lengths", kind, output, "t w r b l", batch=2,
              more={"l": np.int32([3, 2])}, **reset)  # fmt: skip
    recurrent("with clip=1.0", f"{output}, clipped", kind, output, clip=1.0, **reset)
recurrent("linear_before_reset=0", "reset before the product", "GRU")
recurrent("activations", "other activations", "RNN", activations=["Relu"])
recurrent("input_forget", "coupled gates", "LSTM", input_forget=1)
recurrent("input 'P'", "peepholes", "LSTM", inputs="t w r b    p", more={"p": normal(1, 15)})
recurrent("the batch on axis 0", "samples as steps", "RNN", inputs="x w r b")

# Attention ------------------------------------------------------------------------------------------------------------

HEADS = {"sizes": ints(0, 0, 2, 2), "back": ints(0, 0, 4), "scale": np.float32(0.5), "zero": np.float32(0)}
HEADS |= {f"w{part}": normal(4, 4) for part in "qkvo"} | {f"b{part}": normal(4) for part in "qo"}
LATER = np.triu(np.ones((3, 3), bool), 1)
HEADS |= {"later": LATER, "earlier": ~LATER, "minus": np.float32(-np.inf), "big": np.float32(-1e9)}
HEADS |= {"mask": np.where(LATER, -np.inf, 0).astype("float32"), "window": np.float32([[0, -np.inf, -np.inf]] * 3)}
HEADS["one_head"] = np.stack([HEADS["mask"], np.zeros((3, 3), "float32")])[None]
SPLIT = [
    node
    for part, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3]))
    for node in [op("MatMul", f"x w{part}", f"{part}1"), op("Reshape", f"{part}1 sizes", f"{part}2"),
                 op("Transpose", f"{part}2", part, perm=perm)]
]  # fmt: skip
JOIN = [op("MatMul", "p v", "o"), op("Transpose", "o", "o1", perm=[0, 2, 1, 3]), op("Reshape", "o1 back", "o2")]
for expected, name, scores in [
    ("equal", "scaled by a factor", "m = MatMul q k; n = Mul m scale; p = Softmax n"),
    ("equal", "scaled by a divisor", "m = MatMul q k; n = Div m scale; p = Softmax n axis=3"),
    ("equal", "scaled before", "n = Mul q scale; m = MatMul n k; p = Softmax m"),
    ("equal", "causal", "m = MatMul q k; n = Add m mask; p = Softmax n"),
    ("equal", "causal, scaled after", "m = MatMul q k; n = Add mask m; l = Mul n scale; p = Softmax l"),
    ("equal", "causal, selected", "m = MatMul q k; n = Where earlier m big; p = Softmax n"),
    ("equal", "causal, replaced", "m = MatMul q k; n = Where later minus m; p = Softmax n"),
    ("equal", "causal, with Dropout", "m = MatMul q k; n = Add m mask; l = Softmax n; p = Dropout l"),
    ("not constant", "replaced by 0", "m = MatMul q k; n = Where later zero m; p = Softmax n"),
    ("not constant", "of a window", "m = MatMul q k; n = Add m window; p = Softmax n"),
    ("not constant", "causal in one head", "m = MatMul q k; n = Add m one_head; p = Softmax n"),
    ("not constant", "of a bias", "m = MatMul q k; n = Add m scale; p = Softmax n"),
    ("only over the keys", "over the queries", "m = MatMul q k; p = Softmax m axis=2"),
    ("not constant", "without softmax", "p = MatMul q k"),
]:
    nodes = [*SPLIT, *ops(scores), *JOIN]
    case(expected, f"attention {name}", SEQUENCE, [*nodes, op("MatMul", "o2 wo", "o3"), op("Add", "o3 bo")], **HEADS)
case("equal", "attention without a projection", SEQUENCE,
     [*SPLIT, *ops("m = MatMul q k; p = Softmax m"), *JOIN, op("Relu", "o2")], **HEADS)  # fmt: skip
case("equal", "attention of x itself", SEQUENCE,
     [op("Transpose", "x", "k", perm=[0, 2, 1]), *ops("m = MatMul x k; p = Softmax m; y = MatMul p x")])  # fmt: skip
case("steps", "attention across channels", SEQUENCE,
     [op("Transpose", "x", "k", perm=[0, 2, 1]), *ops("m = MatMul k x; p = Softmax m; o = MatMul p k"),
      op("Transpose", "o", perm=[0, 2, 1])])  # fmt: skip

# Root mean squares ----------------------------------------------------------------------------------------------------

RMS = "s = Mul x x; m = ReduceMean s last; e = Add m epsilon; r = Sqrt e; "
RMS_CONSTANTS = {"last": ints(-1), "epsilon": np.float32(1e-3), "one": np.float32(1), "two": np.float32(2)}
RMS_CONSTANTS["g"] = normal(4)
for name, text in [
    ("divided", RMS + "n = Div x r; y = Mul n g"),
    ("by a reciprocal", RMS + "i = Reciprocal r; n = Mul x i; y = Mul g n"),
    ("by a quotient", RMS + "i = Div one r; y = Mul i x"),
    ("of a power", RMS.replace("Mul x x", "Pow x two") + "y = Div x r"),
]:
    case("equal", f"RMSNorm {name}", SEQUENCE, ops(text), **RMS_CONSTANTS)
case("not supported", "RMS of something else", SEQUENCE, ops(RMS.replace("Mul x x", "Mul x g") + "y = Div x r"),
     **RMS_CONSTANTS)  # fmt: skip

case("only up to 65536 pixels", "Resize to billions of pixels", IMAGE, op("Resize", "x none s", mode="nearest"),
     none=np.zeros(0, "f4"), s=np.float32([1, 1, 2**20, 2**20]))  # fmt: skip

# Branches -------------------------------------------------------------------------------------------------------------

W, V = normal(4, 4), normal(4, 4)
case("equal", "a skip", VECTOR, ops("m = MatMul x w; y = Add x m"), w=W)
case("equal", "a skip on the right", VECTOR, ops("m = MatMul x w; y = Add m x"), w=W)
case("equal", "a skip subtracted", VECTOR, ops("m = MatMul x w; y = Sub x m"), w=W)
case("equal", "two branches", VECTOR, ops("m = MatMul x w; n = MatMul x v; y = Add m n"), w=W, v=V)
case(
    "equal",
    "a residual block in the skip of another",
    VECTOR,
    ops("c = MatMul x w; s = Add x c; r = Relu x; b = MatMul r v; y = Add s b"),
    w=W,
    v=V,
)
case(
    "equal",
    "a residual block inside another",
    VECTOR,
    ops("r = Relu x; c = MatMul r w; s = Add r c; t = MatMul s v; y = Add x t"),
    w=W,
    v=V,
)
case("equal", "x + x", VECTOR, op("Add", "x x"))
for kind in ("Max", "Min", "Mean", "Sum"):
    case("equal", f"{kind} of three", VECTOR, ops(f"r = Relu x; t = Tanh x; y = {kind} x r t"))
case("equal", "Min of branches and a number", VECTOR, ops("t = Tanh x; y = Min x c t"), c=np.float32(0.1))
case("equal", "Sum with constants", VECTOR, ops("t = Tanh x; y = Sum c x t c"), c=normal(4))
case("not constant", "Div of two branches", VECTOR, ops("s = Sigmoid x; y = Div x s"))
case("equal", "Abs", VECTOR, op("Abs"))
for exponent in (1, 2, 3, 4):
    case("equal", f"Pow {exponent}", VECTOR, op("Pow", "x p"), p=np.float32(exponent))
case("exponent 0.5", "Pow 0.5", VECTOR, op("Pow", "x p"), p=np.float32(0.5))
case(
    "same number of axes",
    "a sum with other axes",
    SEQUENCE,
    ops("m = ReduceMean x a keepdims=0; y = Add x m"),
    batch=3,
    a=ints(1),
)
case("equal", "a sum of three", VECTOR, ops("r = Relu x; t = Tanh x; y = Sum x r t"))
case(
    "equal",
    "a skip that broadcasts",
    (2,),
    ops("m = Gemm x w; y = Add x m"),
    w=normal(2, 1),
)
case("equal", "x and its mean", IMAGE, ops("m = ReduceMean x a keepdims=1; y = Add x m"), a=ints(2, 3))
case(
    "equal",
    "a skip around flattened images",
    IMAGE,
    ops("c = Conv x w; z = Flatten c; l = MatMul z v; y = Add z l"),
    w=normal(2, 2, 3, 3),
    v=normal(40, 40),
)
case("equal", "flattened images without a Dense", IMAGE, ops("c = Conv x w; y = Flatten c"), w=normal(2, 2, 3, 3))
case(
    "equal",
    "flattened images, then ReLU and Dense",
    IMAGE,
    ops("c = Conv x w; z = Flatten c; r = Relu z; y = MatMul r v"),
    w=normal(2, 2, 3, 3),
    v=normal(40, 5),
)
case(
    "equal",
    "flattened images, then BatchNormalization",
    IMAGE,
    ops("c = Conv x w; z = Flatten c; n = BatchNormalization z g b m v; y = MatMul n u"),
    w=normal(2, 2, 3, 3),
    u=normal(40, 5),
    **{name: np.abs(normal(40)) for name in "gbmv"},
)
case(
    "equal",
    "images that are added",
    IMAGE,
    [
        op("Conv", "x w", "c", pads=[1] * 4),
        op("Relu", "c", "r"),
        op("Conv", "r w", "d", pads=[1] * 4),
        op("Add", "d c", "s"),
        op("GlobalAveragePool", "s", "p"),
        op("Flatten", "p"),
    ],
    w=normal(2, 2, 3, 3),
)
case("equal", "a branch that a sum uses again", VECTOR, ops("m = MatMul x w; s = Sub x m; y = Add s m"), w=W)
case("equal", "a product of two branches", VECTOR, ops("r = Relu x; y = Mul r x"))
case(
    "equal",
    "a sum of two embeddings",
    VECTOR,
    ops("a = Gather w x; b = Gather v x; y = Add a b"),
    dtype="int64",
    w=normal(60, 3),
    v=normal(60, 3),
)
case("equal", "SiLU", VECTOR, ops("s = Sigmoid x; y = Mul s x"))
case("equal", "x · sigmoid(2x)", VECTOR, ops("d = Add x x; s = Sigmoid d; y = Mul s x"))
case("equal", "nodes that nothing needs", VECTOR, ops("e = Erf x; y = Relu x; f = Erf c"), c=normal(3))
case("of the domain 'my.domain'", "another domain", VECTOR, op("Relu", domain="my.domain"))
case("equal", "the standard domain by its other name", VECTOR, op("Relu", domain="ai.onnx"))
case(
    "with a graph inside",
    "If",
    VECTOR,
    helper.make_node(
        "If",
        ["c"],
        ["y"],
        name="i",
        then_branch=helper.make_graph([op("Relu", "x", "t")], "t", [], [onnx.ValueInfoProto(name="t")]),
        else_branch=helper.make_graph([op("Neg", "x", "e")], "e", [], [onnx.ValueInfoProto(name="e")]),
    ),
    c=np.array(True),
)

# Patterns of exporters ------------------------------------------------------------------------------------------------

HALF, TWO, ONE = np.float32(0.5), np.float32(2), np.float32(1)
ERF = ops("u = Div x root; e = Erf u; f = Add e one")
GELU = {"root": np.float32(2**0.5), "one": ONE, "half": HALF}
case("equal", "GELU as TorchScript writes it", VECTOR, [*ERF, op("Mul", "x f", "g"), op("Mul", "g half")], 17, **GELU)
case("equal", "GELU with the half first", VECTOR, [op("Mul", "x half", "h"), *ERF, op("Mul", "h f")], 17, **GELU)
case(
    "equal",
    "GELU with the half in the other factor",
    VECTOR,
    [*ERF, op("Mul", "half f", "h"), op("Mul", "h x")],
    17,
    **GELU,
)
case("equal", "twice GELU", VECTOR, [*ERF, op("Mul", "f x")], 17, **GELU)
case("operator Erf", "GELU of another scale", VECTOR, [*ERF, op("Mul", "x f")], 17, **GELU | {"root": np.float32(1.5)})
case("operator Erf", "GELU of another offset", VECTOR, [*ERF, op("Mul", "x f")], 17, **GELU | {"one": TWO})
case("operator Erf", "GELU times something else", VECTOR, [*ERF, op("Relu", "x", "r"), op("Mul", "r f")], 17, **GELU)
case(
    "operator Erf",
    "GELU with more axes",
    VECTOR,
    [*ERF, op("Mul", "x f")],
    17,
    **GELU | {"one": np.ones((1, 1, 1), "f4")},
)
TANH = ops("kc = Mul k c; i = Add x kc; u = Mul i beta; t = Tanh u; f = Add t one; h = Mul x half; y = Mul h f")
BETA = {"beta": np.float32((2 / np.pi) ** 0.5), "k": np.float32(0.044715), "one": ONE, "half": HALF}
CUBE, SQUARES = [op("Pow", "x three", "c")], ops("q = Mul x x; c = Mul x q")
case("equal", "GELU by tanh with a power", VECTOR, [*CUBE, *TANH], 17, three=np.float32(3), **BETA)
case("equal", "GELU by tanh with products", VECTOR, [*SQUARES, *TANH], 17, **BETA)
case("equal", "GELU by tanh with another power", VECTOR, [*CUBE, *TANH], 17, three=TWO, **BETA)
SOFTPLUS = ops("e = Exp x; s = Add e one; p = Log s")
case("equal", "Softplus by exp and log", VECTOR, [*SOFTPLUS, op("Identity", "p")], one=ONE)
case(
    "equal",
    "Softplus with a threshold",
    VECTOR,
    [*SOFTPLUS, op("Greater", "x t", "g"), op("Where", "g x p")],
    one=ONE,
    t=np.float32(20),
)
case(
    "operator Greater",
    "Softplus with a low threshold",
    VECTOR,
    [*SOFTPLUS, op("Greater", "x t", "g"), op("Where", "g x p")],
    one=ONE,
    t=np.float32(2),
)
turned = [op("Transpose", "x", "u", perm=[0, 2, 1]), op("Softplus", "u", "p"), op("Greater", "x t", "g")]
case("operator Greater", "Softplus of x, transposed", (3, 3), [*turned, op("Where", "g x p")], t=np.float32(20))
case("operator Exp", "log(2 + e^x)", VECTOR, [*SOFTPLUS, op("Identity", "p")], one=TWO)
case("equal", "the logarithm of a sigmoid", VECTOR, ops("s = Sigmoid x; y = Log s"))
# A batch that is not on axis 0, whose order a pattern of nodes must not lose.
FOR_ALL = {"merge": ints(-1, 4), "back": ints(-1, 3, 4)}
for name, nodes, more in (
    ("GELU", [op("Div", "m root", "u"), *ERF[1:], op("Mul", "m f", "g"), op("Mul", "g half", "p")], GELU),
    ("Softplus", [op("Exp", "m", "e"), op("Add", "e one", "s"), op("Log", "s", "p")], {"one": ONE}),
    ("the logarithm of a sigmoid", ops("s = Sigmoid m; p = Log s"), {}),
):
    merged = [op("Reshape", "x merge", "m"), *nodes, op("Reshape", "p back")]
    case(None, f"{name} of all steps of all samples", SEQUENCE, merged, 17, **more, **FOR_ALL)
    case(None, f"{name} of samples on axis 1", VECTOR, [op("Unsqueeze", "x first", "m"), *nodes[:-1],
         op(nodes[-1].op_type, " ".join(nodes[-1].input))], 17, **more, first=ints(0))  # fmt: skip
RELU6 = [op("Add", "x three", "a"), helper.make_node("Clip", ["a", "zero", "six"], ["c"], name="clip")]
NUMBERS = {"three": np.float32(3), "zero": np.float32(0), "six": np.float32(6)}
GATES = {
    "Sigmoid": (ops("g = Sigmoid x"), {}),
    "Softplus and Tanh": (ops("s = Softplus x; g = Tanh s"), {}),
    "log(1 + e^x) and Tanh": ([*SOFTPLUS, op("Tanh", "p", "g")], {"one": ONE}),
    "HardSigmoid": ([op("HardSigmoid", "x", "g", alpha=1 / 6)], {}),
    "ReLU6 of x + 3": ([*RELU6, op("Identity", "c", "g")], NUMBERS),
    "ReLU6 of x + 3, divided by 6": ([*RELU6, op("Div", "c six", "g")], NUMBERS),
}
for name, (nodes, constants) in GATES.items():
    case("equal", f"x times {name}", VECTOR, [*nodes, op("Mul", "x g")], **constants)
    case("equal", f"{name} times x", VECTOR, [*nodes, op("Mul", "g x")], **constants)
    apart = [*nodes, op("Relu", "x", "r"), op("Mul", "r g")]
    case("equal", f"{name} times something else", VECTOR, apart, **constants)
    turned = [*nodes, helper.make_node("Transpose", ["g"], ["t"], name="turn", perm=[0, 2, 1]), op("Mul", "x t")]
    case("equal", f"{name}, transposed", (3, 3), turned, **constants)
case(
    "equal",
    "x times ReLU6 of x + 3, then divided by 6",
    VECTOR,
    [*RELU6, op("Mul", "x c", "m"), op("Div", "m six")],
    **NUMBERS,
)
case(
    "equal",
    "x times ReLU6 of x + 2",
    VECTOR,
    [*RELU6, op("Mul", "x c")],
    **NUMBERS | {"three": TWO},
)
BY_GROUP = [op("Reshape", "x to", "r"), op("InstanceNormalization", "r g b", "n", epsilon=0.1), op("Reshape", "n back")]
GROUPS = {"to": ints(0, 2, -1), "back": ints(-1, 4, 3, 5), "g": np.ones(2, "f4"), "b": np.zeros(2, "f4")}
for name, changed in {
    "as exporters write it": {}, "with other sizes": {"back": ints(-1, 6, 2, 5)},
    "with a scale": {"g": np.float32([1, 2])}, "with an offset": {"b": np.float32([1, 0])},
    "of three parts": {"to": ints(0, 3, -1), "g": np.ones(3, "f4"), "b": np.zeros(3, "f4")},
}.items():  # fmt: skip
    case("equal", f"GroupNorm {name}", (4, 3, 5), BY_GROUP, **GROUPS | changed)
scaled = [*BY_GROUP[:2], op("Reshape", "n back", "z"), *ops("m = Mul z scale; y = Add m offset")]
case(
    "equal", "GroupNorm with gamma and beta", (4, 3, 5), scaled, **GROUPS, scale=normal(4, 1, 1), offset=normal(4, 1, 1)
)
NORM = [
    op("ReduceMean", "x", "m", axes=[-1]),
    op("Sub", "x m", "c"),
    op("Pow", "c two", "q"),
    op("ReduceMean", "q", "v", axes=[-1]),
    op("Add", "v eps", "w"),
    op("Sqrt", "w", "r"),
    op("Div", "c r", "n"),
]
PARTS = {"two": TWO, "eps": np.float32(0.01)}
case(
    "equal",
    "LayerNorm as TorchScript writes it",
    SEQUENCE,
    [*NORM, op("Mul", "n g", "h"), op("Add", "h b")],
    16,
    **PARTS,
    g=normal(4),
    b=normal(4),
)
case("equal", "LayerNorm without weights", SEQUENCE, [*NORM, op("Identity", "n")], 16, **PARTS)
case("equal", "LayerNorm without beta", VECTOR, [*NORM, op("Mul", "g n")], 16, **PARTS, g=normal(4))
case(
    "operator Sqrt",
    "LayerNorm with a cube",
    SEQUENCE,
    [*NORM, op("Identity", "n")],
    16,
    two=np.float32(3),
    eps=np.float32(0.1),
)
for axis in (1, -3):
    nodes = [op(n.op_type, " ".join(n.input), n.output[0]) for n in NORM]
    for i in (0, 3):
        nodes[i] = op("ReduceMean", " ".join(NORM[i].input), NORM[i].output[0], axes=[axis])
    nodes += ops("h = Mul n g; y = Add h b")
    by_channel = {"g": normal(2, 1, 1), "b": normal(2, 1, 1)}
    case("equal", f"LayerNorm of channels over axis {axis}", IMAGE, nodes, 16, **PARTS, **by_channel)
case(
    "equal",
    "a skip around LayerNorm",
    SEQUENCE,
    [*NORM, op("MatMul", "n a", "k"), op("Add", "k n")],
    16,
    **PARTS,
    a=normal(4, 4),
)


@pytest.mark.parametrize("name", CASES)
def test_a_small_graph_is_equal_or_refused_by_name(tmp_path, name):
    expected, shape, nodes, opset, batch, dtype, constants = CASES[name]
    model, x = model_of(shape, nodes, opset, batch, dtype, constants), sample_of(shape, batch, dtype)
    want = reference(model, x)
    got, message = onnx_files.outcome(model, x, np.float32(np.nan) if want is None else want, tmp_path / "g.onnx")
    if expected is None:  # equal or refused
        assert got != "wrong", message
    elif expected == "equal":
        assert got == "equal" and want is not None, message
    else:
        assert got == "refused" and expected in message, message
    if got == "refused":
        assert re.search(onnx_files.NAMED, message), message
