"""Each layer against PyTorch's, with outputs and all gradients, for random configurations and shapes."""

import functools
import itertools
import zlib

import numpy as np
import pytest
import torch
import twins
from names import missing_classes
from torch.nn import functional
from twins import agree, built, compare, same

from xpnet import layers, losses
from xpnet.backends import get_backend

SEEDS = range(40)


def of(kind, arguments):
    return getattr(layers, kind)(**arguments)


# Random configurations ---------------------------------------------------------------------------------------------
# Each function draws (a layer, x, its counterpart in twins, arguments of the counterpart).


def one_or_two(rng, low, high):
    """An integer for both axes, or one for each."""
    sizes = [int(n) for n in rng.integers(low, high + 1, 2)]
    return sizes[0] if rng.random() < 0.4 else tuple(sizes)


def images(rng, channels, extents=(1, 1), padding="valid"):
    """Images (N, H, W, C) that are at least as large as a window of these extents."""
    sides = (0, 0) if isinstance(padding, str) else twins.pair(padding)
    least = [1 if padding == "same" else max(1, e - 2 * p) for e, p in zip(extents, sides, strict=True)]
    height, width = (n + int(rng.integers(0, 8)) for n in least)
    return rng.normal(size=(int(rng.choice([1, 2, 5])), height, width, channels))


def convolution(rng):
    groups = int(rng.choice([1, 1, 2, 3]))
    arguments = {
        "filters": groups * int(rng.integers(1, 5)),
        "kernel_size": one_or_two(rng, 1, 4),
        "strides": one_or_two(rng, 1, 3),
        "padding": ["valid", "same", one_or_two(rng, 0, 3)][rng.integers(3)],
        "dilation": one_or_two(rng, 1, 3) if rng.random() < 0.5 else 1,
        "groups": groups,
        "use_bias": bool(rng.random() < 0.7),
    }
    x = images(
        rng,
        groups * int(rng.integers(1, 4)),
        twins.extents(arguments["kernel_size"], arguments["dilation"]),
        arguments["padding"],
    )
    return arguments, x


GEOMETRY = ("strides", "padding", "dilation")


def conv2d(rng):
    arguments, x = convolution(rng)
    return of("Conv2D", arguments), x, twins.conv2d, {name: arguments[name] for name in (*GEOMETRY, "groups")}


def depthwise(rng):
    arguments, x = convolution(rng)
    del arguments["filters"], arguments["groups"]
    layer = of("DepthwiseConv2D", {**arguments, "depth_multiplier": int(rng.integers(1, 4))})
    return layer, x, twins.depthwise_conv2d, {name: arguments[name] for name in GEOMETRY}


def transpose(rng):
    arguments, x = convolution(rng)
    sides, kernel = arguments["padding"], twins.pair(arguments["kernel_size"])
    if sides != "same":
        # PyTorch requires an output_padding below the stride or the dilation.
        steps = zip(twins.pair(arguments["strides"]), twins.pair(arguments["dilation"]), strict=True)
        extra = [int(rng.integers(0, max(step))) for step in steps]
        arguments["output_padding"] = extra[0] if extra[0] == extra[1] else tuple(extra)
    if not isinstance(sides, str):
        # Padding of at most half a window, so that the output is not empty.
        limits = [(extent - 1) // 2 for extent in twins.extents(kernel, arguments["dilation"])]
        arguments["padding"] = tuple(min(p, limit) for p, limit in zip(twins.pair(sides), limits, strict=True))
    common = {name: arguments[name] for name in (*GEOMETRY, "groups", "output_padding") if name in arguments}
    return of("Conv2DTranspose", arguments), x, twins.conv2d_transpose, common


def pooling(rng):
    size = one_or_two(rng, 1, 4)
    limit = min(twins.pair(size)) // 2
    arguments = {"pool_size": size, "padding": ["valid", "same", one_or_two(rng, 0, limit)][rng.integers(3)]}
    if rng.random() < 0.6:
        arguments["strides"] = one_or_two(rng, 1, 4)
    return arguments, images(rng, int(rng.integers(1, 5)), twins.pair(size), arguments["padding"])


def zero_padding(rng):
    draws = [one_or_two(rng, 0, 3), (one_or_two(rng, 0, 3), one_or_two(rng, 0, 3))]
    arguments = {"padding": draws[rng.integers(2)]}
    return of("ZeroPadding2D", arguments), images(rng, int(rng.integers(1, 5))), twins.zero_padding2d, arguments


def upsample(rng):
    arguments = {"size": one_or_two(rng, 1, 4), "interpolation": str(rng.choice(["nearest", "bilinear"]))}
    return of("Upsample2D", arguments), images(rng, int(rng.integers(1, 5))), twins.upsample2d, arguments


def sequences(rng, channels, extent=1, padding="valid"):
    """Sequences (N, T, C) that are at least as long as a window of this extent."""
    least = 1 if padding in ("same", "causal") else max(1, extent - 2 * (0 if padding == "valid" else padding))
    return rng.normal(size=(int(rng.choice([1, 2, 5])), least + int(rng.integers(0, 8)), channels))


def conv1d(rng):
    groups, size, dilation = int(rng.choice([1, 1, 2, 3])), int(rng.integers(1, 5)), int(rng.integers(1, 4))
    padding = ["valid", "same", "causal", int(rng.integers(0, 4))][rng.integers(4)]
    common = {"strides": int(rng.integers(1, 4)), "padding": padding, "dilation": dilation, "groups": groups}
    layer = layers.Conv1D(groups * int(rng.integers(1, 5)), size, use_bias=bool(rng.integers(2)), **common)
    x = sequences(rng, groups * int(rng.integers(1, 4)), dilation * (size - 1) + 1, padding)
    return layer, x, twins.conv1d, common


def sequence_pooling(rng):
    size = int(rng.integers(1, 5))
    padding = ["valid", "same", int(rng.integers(0, size))][rng.integers(3)]
    arguments = {"pool_size": size, "padding": padding, "strides": int(rng.integers(1, 5))}
    return arguments, sequences(rng, int(rng.integers(1, 5)), size, padding)


def pooling_layers(axes, windows, inputs):
    """Functions that draw the pooling layers over 1 or 2 axes.

    windows: draws the arguments of a layer, and x.  inputs: draws x with a number of channels.
    """

    def max_pool(rng):
        arguments, x = windows(rng)
        return of(f"MaxPool{axes}D", arguments), x, getattr(twins, f"max_pool{axes}d"), arguments

    def avg_pool(rng):
        arguments, x = windows(rng)
        arguments["count_include_pad"] = bool(rng.integers(2))
        return of(f"AvgPool{axes}D", arguments), x, getattr(twins, f"avg_pool{axes}d"), arguments

    def global_average_pool(rng):
        x, twin = inputs(rng, int(rng.integers(1, 5))), getattr(twins, f"global_average_pool{axes}d")
        return of(f"GlobalAveragePool{axes}D", {}), x, twin, {}

    def global_max_pool(rng):
        x, twin = inputs(rng, int(rng.integers(1, 5))), getattr(twins, f"global_max_pool{axes}d")
        return of(f"GlobalMaxPool{axes}D", {}), x, twin, {}

    draws = [max_pool, avg_pool, global_average_pool, global_max_pool]
    for draw in draws:
        draw.__name__ += f"{axes}d"
    return draws


def norm_arguments(rng):
    return {"epsilon": float(rng.choice([1e-5, 1e-3])), "center": bool(rng.integers(2)), "scale": bool(rng.integers(2))}


def rows(rng, features):
    """(N, ..., features) of any rank. At least 8 rows, because with few rows the gradient of a norm nearly cancels."""
    middle = [(), (3,), (2, 5), (3, 2, 4)][rng.integers(4)]
    return rng.normal(rng.normal(), 2.0, size=(int(rng.integers(8, 12)), *middle, features))


def batch_norm(rng):
    arguments = norm_arguments(rng)
    return of("BatchNorm", arguments), rows(rng, int(rng.integers(1, 6))), twins.batch_norm, {
        "epsilon": arguments["epsilon"]
    }  # fmt: skip


def layer_norm(rng):
    arguments = norm_arguments(rng)
    return of("LayerNorm", arguments), rows(rng, int(rng.integers(3, 9))), twins.layer_norm, {
        "epsilon": arguments["epsilon"]
    }  # fmt: skip


def group_norm(rng):
    arguments, groups = norm_arguments(rng), int(rng.integers(1, 4))
    x = rows(rng, groups * int(rng.integers(3, 6)))
    given = {"groups": groups, "epsilon": arguments["epsilon"]}
    return of("GroupNorm", {"groups": groups, **arguments}), x, twins.group_norm, given


def instance_norm(rng):
    arguments = norm_arguments(rng)
    x = rng.normal(rng.normal(), 2.0, size=(2, *rng.integers(3, 7, int(rng.integers(1, 3))), int(rng.integers(1, 5))))
    return of("InstanceNorm", arguments), x, twins.instance_norm, {"epsilon": arguments["epsilon"]}


def prelu(rng):
    shared = bool(rng.integers(2))
    return layers.PReLU(shared=shared), rows(rng, int(rng.integers(1, 6))), twins.prelu, {}


def embedding(rng):
    words, features = (int(n) for n in rng.integers(1, 9, 2))
    shape = tuple(int(n) for n in rng.integers(1, 6, rng.integers(1, 4)))
    x = rng.integers(0, words, shape).astype(rng.choice(["int64", "int32", "uint8"]))
    return layers.Embedding(words, features), x, twins.embedding, {}


def dense(rng):
    layer = layers.Dense(int(rng.integers(1, 6)), use_bias=bool(rng.integers(2)))
    return layer, rows(rng, int(rng.integers(1, 6))), twins.dense, {}


def residual(rng):
    """Residual around a convolution, a norm and an activation, or around Dense; with every kind of skip connection."""
    kind = rng.integers(5)
    images, texts = rng.normal(size=(3, 5, 4, 2)), rng.normal(size=(5, 3, 4))
    if kind == 0:
        layer = layers.Residual(layers.Conv2D(2, 3, padding="same", use_bias=False), layers.BatchNorm(), layers.Tanh())

        def twin(x, **p):
            y = twins.conv2d(x, p["0.weight"], padding="same")
            return torch.tanh(twins.batch_norm(y, p["1.gamma"], p["1.beta"])) + x

        return layer, images, twin, {}
    if kind in (1, 2):
        outputs = 4 if kind == 1 else 6
        layer = layers.Residual(layers.Dense(7), layers.Tanh(), layers.Dense(outputs))

        def twin(x, **p):
            hidden = torch.tanh(twins.dense(x, p["0.weight"], p["0.bias"]))
            skip = x if kind == 1 else twins.dense(x, p["skip.weight"])
            return twins.dense(hidden, p["2.weight"], p["2.bias"]) + skip

        return layer, texts, twin, {}
    projection = {"projection": layers.Conv2D(5, 3, 2, "same")} if kind == 3 else {}
    layer = layers.Residual(layers.Conv2D(5, 3, 2, "same"), layers.Tanh(), **projection)

    def twin(x, **p):
        inner = torch.tanh(twins.conv2d(x, p["0.weight"], p["0.bias"], 2, "same"))
        return inner + twins.conv2d(x, p["skip.weight"], p.get("skip.bias"), 2, "same")

    return layer, images, twin, {}


def rms_norm(rng):
    epsilon = float(rng.choice([1e-6, 1e-3]))
    return layers.RMSNorm(epsilon), rows(rng, int(rng.integers(3, 9))), twins.rms_norm, {"epsilon": epsilon}


def positional_embedding(rng):
    x = sequences(rng, int(rng.integers(1, 5)))
    return layers.PositionalEmbedding(x.shape[1] + int(rng.integers(3))), x, twins.positional_embedding, {}


def attention(rng):
    heads, rotary = int(rng.integers(1, 4)), bool(rng.integers(2))
    arguments = {"heads": heads, "causal": bool(rng.integers(2)), "rotary": rotary}
    x = sequences(rng, heads * (2 if rotary else 1) * int(rng.integers(1, 4)))
    return layers.MultiHeadAttention(**arguments, use_bias=bool(rng.integers(2))), x, twins.attention, arguments


def transformer_block(rng):
    heads, rotary = int(rng.integers(1, 4)), bool(rng.integers(2))
    arguments = {
        "heads": heads,
        "causal": bool(rng.integers(2)),
        "norm": str(rng.choice(["layer", "rms"])),
        "activation": str(rng.choice(["gelu", "relu", "silu"])),
        "rotary": rotary,
    }
    x = sequences(rng, heads * (2 if rotary else 1) * int(rng.integers(2, 5)))
    layer = layers.TransformerBlock(mlp_ratio=int(rng.integers(1, 5)), use_bias=bool(rng.integers(2)), **arguments)
    return layer, x, twins.transformer_block, arguments


DRAWS = [
    rms_norm,
    positional_embedding,
    attention,
    transformer_block,
    conv1d,
    *pooling_layers(1, sequence_pooling, sequences),
    conv2d,
    depthwise,
    transpose,
    *pooling_layers(2, pooling, images),
    zero_padding,
    upsample,
    batch_norm,
    layer_norm,
    group_norm,
    instance_norm,
    prelu,
    embedding,
    dense,
    residual,
]


def test_every_layer_and_every_loss_has_an_example():
    """Layers that only change the shape have no twin; Dropout has its own noise, and Step its own gradient."""
    drawn = [draw(np.random.default_rng(0))[0] for draw in DRAWS]
    without_twins = ["Dropout", "Flatten", "Masking", "Permute", "Rescale", "Reshape", "Sequential", "Slice", "Step"]
    in_graphs = ["Add", "Average", "Concatenate", "Dot", "Maximum", "Multiply", "Subtract"]  # test_parity_graphs.py
    recurrent = ["Bidirectional", "GRU", "LSTM", "SimpleRNN"]  # test_parity_recurrent.py
    elsewhere = [getattr(layers, name) for name in (*without_twins, *in_graphs, *recurrent)]
    assert not missing_classes(layers, layers.Layer, [*drawn, *(layer for layer, _ in ACTIVATIONS)], elsewhere)
    assert not missing_classes(losses, losses.Loss, [loss for loss, _, _ in LOSSES])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)
def test_outputs_and_gradients_equal_those_of_pytorch(draw, seed, dtype):
    rng = np.random.default_rng([zlib.crc32(draw.__name__.encode()), seed])
    layer, x, twin, arguments = draw(rng)
    # The gradient of a key_bias is 0, since softmax does not change if all scores do by the same number.
    check = functools.partial(agree, at_least=10.0) if draw in (attention, transformer_block) else agree
    compare(built(layer, x, dtype, rng), x, twin, rng, check, **arguments)


# Attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("seed", SEEDS[:20])
def test_cross_attention_and_padded_keys_equal_those_of_pytorch(seed, dtype):
    rng = np.random.default_rng(seed)
    heads, samples, queries, keys = (int(rng.integers(1, 6)) for _ in range(4))
    query = rng.normal(size=(samples, queries, heads * 3)).astype(dtype)
    memory = rng.normal(size=(samples, keys, 5)).astype(dtype)
    mask = rng.random((samples, keys)) < 0.7
    mask[:, 0] = True  # PyTorch gives NaN to a query without any key
    layer = layers.MultiHeadAttention(heads, use_bias=bool(seed % 2))
    layer.build([query.shape[1:], memory.shape[1:]], backend="cpu", dtype=dtype)
    for parameter in layer.parameters:
        parameter.value[...] = rng.normal(size=parameter.shape)
    if seed % 4 > 1:
        layer.work.given_mask = [None, mask]
    leaves = [twins.tensor(query, grad=True), twins.tensor(memory, grad=True)]
    parameters = {p.name: twins.tensor(p.value, grad=True) for p in layer.parameters}
    padding = torch.from_numpy(mask) if seed % 4 > 1 else None
    expected = twins.attention(leaves[0], heads, memory=leaves[1], mask=padding, **parameters)
    y = layer.forward([query, memory])
    agree(y, expected, "y")
    grad = rng.normal(size=y.shape).astype(dtype)
    ours = [*layer.backward(grad), *(p.grad for p in layer.parameters)]
    gradients = torch.autograd.grad(expected, [*leaves, *parameters.values()], torch.from_numpy(grad))
    for mine, theirs, name in zip(ours, gradients, ["query", "memory", *parameters], strict=True):
        agree(mine, theirs, name, at_least=10.0)


# Pooling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_ties_of_max_pooling_are_resolved_like_in_pytorch(seed):
    """With integers from a small set, overlapping windows and padding, the gradients must be equal."""
    rng = np.random.default_rng(seed)
    arguments, x = pooling(rng)
    arguments["strides"] = one_or_two(rng, 1, 2)
    x = rng.integers(-1, 2, x.shape).astype("float64")
    compare(built(of("MaxPool2D", arguments), x, "float64", rng), x, twins.max_pool2d, rng, same, **arguments)


def test_max_pooling_propagates_nan_like_pytorch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 6, 7, 2))
    x[rng.random(x.shape) < 0.1] = np.nan
    layer = built(layers.MaxPool2D(3, 2, "same"), x, "float64", rng)
    np.testing.assert_array_equal(layer.forward(x), twins.max_pool2d(twins.tensor(x), 3, 2, "same"))


# Normalization -----------------------------------------------------------------------------------------------------


def buffers(layer):
    return {buffer.name: buffer.value for buffer in layer.context.store.buffers}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("seed", SEEDS[:10])
def test_running_statistics_equal_those_of_pytorch(seed, dtype):
    rng = np.random.default_rng(seed)
    momentum = [0.1, 0.3, 1.0][seed % 3]
    x = rows(rng, 4)
    layer = built(layers.BatchNorm(momentum=momentum), x, dtype, rng)
    running = {
        "mean": torch.zeros(4, dtype=getattr(torch, dtype)),
        "variance": torch.ones(4, dtype=getattr(torch, dtype)),
    }
    for _ in range(5):
        compare(layer, x, twins.batch_norm, rng, momentum=momentum, **running)
        agree(buffers(layer)["running_mean"], running["mean"], "running_mean")
        agree(buffers(layer)["running_var"], running["variance"], "running_var")
        x = rng.normal(rng.normal(size=4), 3.0, size=x.shape)
    layer.context.training = False
    for batch in (x, x[:1]):
        compare(layer, batch, twins.batch_norm, rng, training=False, **running)
    agree(buffers(layer)["running_mean"], running["mean"], "running_mean", tolerance=1e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
@pytest.mark.parametrize(
    ("kind", "twin"), [("BatchNorm", twins.batch_norm), ("LayerNorm", twins.layer_norm)], ids=["batch", "layer"]
)
def test_norms_of_inputs_with_a_large_mean_are_exact(kind, twin, offset):
    """A variance computed as E x² - (E x)² would be useless in float32. This tolerance is stricter than PyTorch's."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4096, 5)) + offset
    check = functools.partial(agree, tolerance=3e-6 * max(1.0, offset))
    compare(built(of(kind, {}), x, "float32", rng), x, twin, rng, check, theirs_in="float64")


def test_layer_norm_is_the_same_in_training_and_inference():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3, 5))
    layer = built(layers.LayerNorm(), x, "float64", rng)
    layer.context.training = False
    compare(layer, x, twins.layer_norm, rng)


# Activations and losses --------------------------------------------------------------------------------------------

ACTIVATIONS = [
    (layers.Identity(), lambda x: x * 1.0),
    (layers.Sigmoid(), torch.sigmoid),
    (layers.Tanh(), torch.tanh),
    (layers.ReLU(), functional.relu),
    (layers.LeakyReLU(0.2), lambda x: functional.leaky_relu(x, 0.2)),
    (layers.ReLU6(), functional.relu6),
    (layers.HardTanh(-0.5, 2.0), lambda x: functional.hardtanh(x, -0.5, 2.0)),
    (layers.HardSigmoid(), twins.hard_sigmoid),
    (layers.HardSwish(), functional.hardswish),
    (layers.Mish(), functional.mish),
    (layers.ELU(0.7), lambda x: functional.elu(x, 0.7)),
    (layers.GELU(), functional.gelu),
    (layers.GELU(approximate="tanh"), lambda x: functional.gelu(x, approximate="tanh")),
    (layers.SiLU(), functional.silu),
    (layers.Softplus(), lambda x: functional.softplus(x, threshold=50)),
    (layers.Softmax(), lambda x: functional.softmax(x, -1)),
    (layers.LogSoftmax(), lambda x: functional.log_softmax(x, -1)),
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", [(1, 3), (7, 5), (2, 3, 4), (2, 5, 3, 2)], ids=str)
@pytest.mark.parametrize(("layer", "twin"), ACTIVATIONS, ids=lambda a: repr(a) if isinstance(a, layers.Layer) else "")
def test_activations_equal_those_of_pytorch(layer, twin, shape, dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * 3
    compare(built(type(layer)(**layer.get_config()), x, dtype, rng), x, twin, rng)


def binary(z, t, e=0.0):
    return functional.binary_cross_entropy_with_logits(z, t * (1 - e) + e / 2, reduction="none").mean(1)


def divergence(z, t):
    return functional.kl_div(functional.log_softmax(z, -1), t, reduction="none").sum(1)


def triplet(y, margin):
    return functional.triplet_margin_loss(*y.chunk(3, 1), margin=margin, reduction="none")


# loss, counterpart that computes the loss of each sample, kind of targets
LOSSES = [
    (losses.MeanSquaredError(), lambda y, t: functional.mse_loss(y, t, reduction="none").mean(1), "real"),
    (losses.HalfSquaredError(), lambda y, t: functional.mse_loss(y, t, reduction="none").sum(1) / 2, "real"),
    (losses.MeanAbsoluteError(), lambda y, t: functional.l1_loss(y, t, reduction="none").mean(1), "real"),
    (losses.Huber(), lambda y, t: functional.huber_loss(y, t, reduction="none").mean(1), "real"),
    (losses.Huber(0.4), lambda y, t: functional.huber_loss(y, t, delta=0.4, reduction="none").mean(1), "real"),
    (losses.BinaryCrossEntropy(), binary, "fractions"),
    (losses.BinaryCrossEntropy(0.1), lambda z, t: binary(z, t, 0.1), "fractions"),
    (losses.SoftmaxCrossEntropy(), lambda z, t: functional.cross_entropy(z, t, reduction="none"), "labels"),
    (losses.SoftmaxCrossEntropy(), lambda z, t: functional.cross_entropy(z, t, reduction="none"), "probabilities"),
    (losses.KLDivergence(), divergence, "probabilities"),
    (losses.CosineSimilarity(), lambda y, t: 1 - functional.cosine_similarity(y, t), "real"),
    (losses.TripletMargin(), lambda y, t: triplet(y, 1.0), "triplets"),
    (losses.TripletMargin(0.3), lambda y, t: triplet(y, 0.3), "triplets"),
    *(
        (
            losses.SoftmaxCrossEntropy(0.1),
            lambda z, t: functional.cross_entropy(z, t, reduction="none", label_smoothing=0.1),
            kind,
        )
        for kind in ("labels", "probabilities")
    ),
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("loss", "twin", "kind"), LOSSES, ids=itertools.count())
def test_losses_and_their_gradients_equal_those_of_pytorch(loss, twin, kind, dtype):
    rng, backend = np.random.default_rng(0), get_backend("cpu")
    for n, k in ((1, 2), (7, 3), (20, 10)) if kind != "triplets" else ((1, 6), (7, 3), (20, 15)):
        outputs = (3 * rng.normal(size=(n, k))).astype(dtype)
        targets = {
            "real": lambda: rng.normal(size=(n, k)),  # noqa: B023
            "triplets": lambda: np.zeros(n),  # noqa: B023
            "fractions": lambda: rng.random((n, k)),  # noqa: B023
            "probabilities": lambda: rng.dirichlet(np.ones(k), n),  # noqa: B023
            "labels": lambda: rng.integers(0, k, n),  # noqa: B023
        }[kind]()
        targets = targets if kind == "labels" else targets.astype(dtype)
        leaf = twins.tensor(outputs, grad=True)
        theirs = twin(leaf, twins.tensor(targets))
        (gradient,) = torch.autograd.grad(theirs.sum(), [leaf])
        agree(loss.samples(backend, outputs, targets), theirs, "samples")
        agree(loss.gradient(backend, outputs, targets), gradient, "gradient")
        both = loss.samples_and_gradient(backend, outputs, targets)
        agree(both[0], theirs, "samples of both")
        agree(both[1], gradient, "gradient of both")


@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 7, 3), (3, 2, 4, 6)], ids=str)
def test_cross_entropy_of_several_labels_per_sample_ignores_like_pytorch(shape):
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=shape), rng.integers(0, shape[-1], shape[:-1])
    y[rng.random(y.shape) < 0.3] = -1
    y.flat[0] = 0
    loss = losses.SoftmaxCrossEntropy(ignore=-1)
    twin = functional.cross_entropy(torch.from_numpy(np.moveaxis(z, -1, 1)), torch.from_numpy(y), ignore_index=-1)
    assert loss(z, y) == pytest.approx(twin.item(), rel=1e-12)
