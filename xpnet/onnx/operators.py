"""What each ONNX operator is in xpnet: a function from the values that go in to the value that comes out."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import onnx
from onnx import numpy_helper

from xpnet import layers
from xpnet.errors import ArgumentError
from xpnet.layers.base import Layer, Shape
from xpnet.onnx.reader import BATCH, Constant, Part, Reader, Value, reads

# Elements -------------------------------------------------------------------------------------------------------------

_PLAIN: dict[str, Callable[[dict[str, Any]], Layer]] = {
    "Relu": lambda a: layers.ReLU(),
    "Sigmoid": lambda a: layers.Sigmoid(),
    "Tanh": lambda a: layers.Tanh(),
    "Softplus": lambda a: layers.Softplus(),
    "LeakyRelu": lambda a: layers.LeakyReLU(a.get("alpha", 0.01)),
    "Elu": lambda a: layers.ELU(a.get("alpha", 1.0)),
    "Gelu": lambda a: layers.GELU(a.get("approximate", b"none").decode()),
}


@reads(*_PLAIN)
def _plain(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    return reader.add(reader.data(node, inputs[0]), _PLAIN[node.op_type](attributes))


@reads("Identity", "Dropout", "Cast")
def _nothing(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Any:
    return inputs[0]


@reads("Constant")
def _constant(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Constant:
    value = next(iter(attributes.values()))
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else numpy.asarray(value)


@reads("GreaterOrEqual")
def _step(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    threshold = reader.constant(node, inputs[1], "threshold")
    if threshold.size != 1:
        raise reader.refuse(node, "compares with more than one number")
    return reader.add(reader.data(node, inputs[0]), layers.Step(float(threshold.reshape(()))))


@reads("Softmax", "LogSoftmax")
def _softmax(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    value = reader.data(node, inputs[0])
    axis = attributes.get("axis", -1) % (len(value.shape) + 1)
    if axis != (1 if value.first else len(value.shape)):
        raise reader.refuse(node, f"runs over axis {axis}, not over the features")
    return reader.add(reader.settled(value), getattr(layers, node.op_type)())


@reads("Mul", "Add", "Sub", "Div")
def _arithmetic(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    a, b = inputs
    if isinstance(a, Value) and isinstance(b, Value):
        return _two_ways(reader, node, a, b)
    turned = node.op_type in ("Mul", "Add") and not isinstance(a, Value)
    value, other = reader.data(node, b if turned else a), reader.constant(node, a if turned else b, "operand")
    if other.size == 1:
        number = float(other.reshape(()))
        return reader.add(value, {
            "Mul": lambda: layers.Rescale(number), "Div": lambda: layers.Rescale(1.0 / number),
            "Add": lambda: layers.Rescale(1.0, number), "Sub": lambda: layers.Rescale(1.0, -number),
        }[node.op_type]())  # fmt: skip
    last = value.parts[-1] if value.parts else None
    if node.op_type == "Add" and last and isinstance(last.layer, layers.Dense) and not last.layer.use_bias:
        before = value._replace(parts=value.parts[:-1], shape=_shape_before(reader, value))
        return reader.add(before, layers.Dense(last.layer.units), weight=last.weights["weight"], bias=other.reshape(-1))
    raise reader.refuse(node, f"has an operand of shape {other.shape} that is no bias of a Dense")


def _shape_before(reader: Reader, value: Value) -> Shape:
    return value.parts[-2].shape if len(value.parts) > 1 else reader.input_shape


def _two_ways(reader: Reader, node: Any, a: Value, b: Value) -> Value:
    """x · sigmoid(x), or a residual sum."""
    shared = 0
    while shared < min(len(a.parts), len(b.parts)) and a.parts[shared] is b.parts[shared]:
        shared += 1
    long, short = (a, b) if len(a.parts) >= len(b.parts) else (b, a)
    way, skip = long.parts[shared:], short.parts[shared:]
    before = short._replace(parts=long.parts[:shared])
    if node.op_type == "Mul" and not skip and len(way) == 1 and isinstance(way[0].layer, layers.Sigmoid):
        return reader.add(short, layers.SiLU())
    if node.op_type != "Add" or not way:
        raise reader.refuse(node, "joins two ways of the graph that are no residual sum")
    projection = None
    if skip:
        projection = skip[0].layer if len(skip) == 1 else layers.Sequential([part.layer for part in skip])
    block = layers.Residual(*[part.layer for part in way], projection=projection)
    part = Part(block, {}, long.shape, (way, skip))
    return Value((*before.parts, part), long.shape, long.first, long.flat_of)


# Normalisation --------------------------------------------------------------------------------------------------------


@reads("BatchNormalization")
def _batch_norm(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    value = reader.settled(reader.data(node, inputs[0]))
    if len(value.shape) > 1 and not value.first:
        raise reader.refuse(node, "is over the axis after the batch, which here is not that of the features")
    gamma, beta, mean, variance = (reader.constant(node, a, "figure") for a in inputs[1:5])
    layer = layers.BatchNorm(momentum=1.0 - attributes.get("momentum", 0.9), epsilon=attributes.get("epsilon", 1e-5))
    return reader.add(value, layer, gamma=gamma, beta=beta, running_mean=mean, running_var=variance)


@reads("LayerNormalization")
def _layer_norm(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    value = reader.in_order(reader.data(node, inputs[0]))
    axis = attributes.get("axis", -1)
    if axis % (len(value.shape) + 1) != len(value.shape):
        raise reader.refuse(node, f"runs over axes from {axis} on, not over the last alone")
    layer = layers.LayerNorm(epsilon=attributes.get("epsilon", 1e-5), center=len(inputs) > 2 and inputs[2] is not None)
    return reader.add(value, layer, gamma=reader.constant(node, inputs[1], "scale"),
                      beta=reader.constant(node, inputs[2], "bias") if layer.center else None)  # fmt: skip


# Products -------------------------------------------------------------------------------------------------------------


@reads("Gemm")
def _gemm(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    value, weight = reader.data(node, inputs[0]), reader.constant(node, inputs[1], "weight")
    if attributes.get("transA", 0):
        raise reader.refuse(node, "has transA")
    weight = (weight.T if attributes.get("transB", 0) else weight) * weight.dtype.type(attributes.get("alpha", 1.0))
    bias = None
    if len(inputs) > 2 and inputs[2] is not None:
        bias = reader.constant(node, inputs[2], "bias")
        if bias.size not in (1, weight.shape[1]):
            raise reader.refuse(node, f"has a bias of shape {bias.shape}")
        bias = numpy.broadcast_to(bias.reshape(-1), weight.shape[1]) * weight.dtype.type(attributes.get("beta", 1.0))
    return _dense(reader, node, value, weight, bias)


@reads("MatMul")
def _matmul(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    return _dense(reader, node, reader.data(node, inputs[0]), reader.constant(node, inputs[1], "weight"), None)


def _dense(reader: Reader, node: Any, value: Value, weight: Constant, bias: Constant | None) -> Value:
    value = reader.in_order(value) if value.first else value
    if weight.ndim != 2 or value.shape[-1] != len(weight):
        raise reader.refuse(node, f"has a weight of shape {weight.shape} for samples of shape {value.shape}")
    if value.flat_of is not None:  # the weight's rows in the order of channels last
        height, width, channels = value.flat_of
        weight = weight.reshape(channels, height, width, -1).transpose(1, 2, 0, 3).reshape(weight.shape)
        value = value._replace(flat_of=None)
    return reader.add(value, layers.Dense(weight.shape[1], use_bias=bias is not None), weight=weight, bias=bias)


@reads("Gather")
def _gather(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Any:
    table, index = inputs
    if isinstance(index, Value):
        weight = reader.constant(node, table, "table")
        if index.parts or weight.ndim != 2 or attributes.get("axis", 0) != 0:
            raise reader.refuse(node, "is no embedding of the input")
        return reader.add(index, layers.Embedding(*weight.shape), weight=weight)
    return _picked(reader, node, table, int(reader.constant(node, index, "index").reshape(())))


@reads("Conv")
def _conv(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    value, weight = reader.image(node, inputs[0]), reader.constant(node, inputs[1], "weight")
    if weight.ndim != 4:
        raise reader.refuse(node, "is not over images")
    bias = reader.constant(node, inputs[2], "bias") if len(inputs) > 2 and inputs[2] is not None else None
    kernel, group = weight.shape[2:], attributes.get("group", 1)
    strides, dilation = tuple(attributes.get("strides", (1, 1))), tuple(attributes.get("dilations", (1, 1)))
    padding = _padding(reader, node, attributes, value.shape, kernel, strides, dilation)
    layer = layers.Conv2D(len(weight), kernel, strides, padding, dilation, group, use_bias=bias is not None)
    return reader.add(value, layer, weight=weight.transpose(2, 3, 1, 0), bias=bias)


@reads("ConvTranspose")
def _conv_transpose(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    value, weight = reader.image(node, inputs[0]), reader.constant(node, inputs[1], "weight")
    bias = reader.constant(node, inputs[2], "bias") if len(inputs) > 2 and inputs[2] is not None else None
    group, kernel = attributes.get("group", 1), weight.shape[2:]
    strides, dilation = tuple(attributes.get("strides", (1, 1))), tuple(attributes.get("dilations", (1, 1)))
    pads, extra = list(attributes.get("pads", (0, 0, 0, 0))), list(attributes.get("output_padding", (0, 0)))
    filters = weight.shape[1] * group
    ours = numpy.concatenate(numpy.split(weight, group), axis=1).transpose(2, 3, 0, 1)
    wanted = [
        (value.shape[a] - 1) * strides[a] + dilation[a] * (kernel[a] - 1) + 1 + extra[a] - pads[a] - pads[a + 2]
        for a in (0, 1)
    ]
    # What is cut off at the end and not at the beginning is the opposite of output_padding.
    ways: list[tuple[Any, Any]] = [("same", 0)]
    uneven = tuple(extra[a] - pads[a + 2] + pads[a] for a in (0, 1))
    if min(uneven) >= 0:
        ways.insert(0, ((pads[0], pads[1]), uneven))
    for padding, output_padding in ways:
        try:
            layer = layers.Conv2DTranspose(
                filters, kernel, strides, padding, dilation, group, output_padding, use_bias=bias is not None
            )
            added = reader.add(value, layer, weight=ours, bias=bias)
        except ArgumentError:
            continue
        made: Layer = type(layer).from_config(layer.get_config())
        made.build(value.shape, backend="cpu")
        if list(added.shape[:2]) == wanted and list(vars(made)["windows"].before) == pads[:2]:
            return added
    raise reader.refuse(node, f"has pads {pads} and output_padding {extra} that no Conv2DTranspose has")


def _padding(
    reader: Reader, node: Any, attributes: dict[str, Any], shape: Shape, kernel: Sequence[int], strides: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> Any:  # fmt: skip
    """xpnet's word for these pads: "valid", pixels on either side, or "same"."""
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID", b""):
        raise reader.refuse(node, f"has auto_pad {attributes['auto_pad'].decode()}: give it pads")
    pads = list(attributes.get("pads", (0, 0, 0, 0)))
    reach = [dilation[a] * (kernel[a] - 1) + 1 for a in (0, 1)]
    grid = [(shape[a] + pads[a] + pads[a + 2] - reach[a]) // strides[a] + 1 for a in (0, 1)]
    before = (pads[0], pads[1])
    if all((shape[a] + 2 * before[a] - reach[a]) // strides[a] + 1 == grid[a] for a in (0, 1)):
        return before if any(before) else "valid"
    same = [math.ceil(shape[a] / strides[a]) for a in (0, 1)]
    ours = [max((same[a] - 1) * strides[a] + reach[a] - shape[a], 0) // 2 for a in (0, 1)]
    if same == grid and ours == list(before):
        return "same"
    raise reader.refuse(node, f"has pads {pads}, neither alike on either side nor those of 'same'")


# Pooling and sizes of images ------------------------------------------------------------------------------------------


@reads("MaxPool", "AveragePool")
def _pool(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    value, size = reader.image(node, inputs[0]), tuple(attributes["kernel_shape"])
    strides = tuple(attributes.get("strides", (1, 1)))
    if any(n != 1 for n in attributes.get("dilations", ())) or len(size) != 2:
        raise reader.refuse(node, "is dilated, or not over images")
    if attributes.get("ceil_mode", 0):
        reach = [value.shape[a] + sum(attributes.get("pads", (0, 0, 0, 0))[a::2]) - size[a] for a in (0, 1)]
        if any(reach[a] % strides[a] for a in (0, 1)):
            raise reader.refuse(node, "has ceil_mode, which pools what is left over")
    padding = _padding(reader, node, attributes, value.shape, size, strides)
    if node.op_type == "MaxPool":
        return reader.add(value, layers.MaxPool2D(size, strides, padding))
    return reader.add(value, layers.AvgPool2D(size, strides, padding, bool(attributes.get("count_include_pad", 0))))


@reads("GlobalAveragePool")
def _global_average(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    value = reader.add(reader.image(node, inputs[0]), layers.GlobalAveragePool2D())
    return reader.add(value, layers.Reshape((1, 1, *value.shape)), first=True)


@reads("ReduceMean")
def _reduce_mean(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    axes = attributes.get("axes")
    if axes is None and len(inputs) > 1:
        axes = reader.constant(node, inputs[1], "axis").tolist()
    value = reader.image(node, inputs[0])
    if sorted(axis % 4 for axis in axes or ()) != [2, 3]:
        raise reader.refuse(node, f"is over axes {axes}, not over height and width")
    value = reader.add(value, layers.GlobalAveragePool2D())
    if not attributes.get("keepdims", 1):
        return value
    return reader.add(value, layers.Reshape((1, 1, *value.shape)), first=True)


@reads("Resize", "Upsample")
def _resize(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    value = reader.image(node, inputs[0])
    if len(inputs) > 3 and inputs[3] is not None:
        sizes = inputs[3] if isinstance(inputs[3], list) else list(inputs[3])
        scales = [sizes[2] / value.shape[0], sizes[3] / value.shape[1]]
    else:
        scales = [float(s) for s in reader.constant(node, inputs[2], "scale")[2:]]
    mode = attributes.get("mode", b"nearest").decode()
    place = attributes.get("coordinate_transformation_mode", b"half_pixel").decode()
    rounding = attributes.get("nearest_mode", b"round_prefer_floor").decode()
    repeats = mode == "nearest" and place == "asymmetric" and rounding == "floor"
    blends = mode == "linear" and place in ("half_pixel", "pytorch_half_pixel")
    if any(s != int(s) for s in scales) or not (repeats or blends):
        raise reader.refuse(node, f"by {scales} in mode {mode!r}, {place!r}, {rounding!r} is no Upsample2D")
    how = "nearest" if repeats else "bilinear"
    return reader.add(value, layers.Upsample2D((int(scales[0]), int(scales[1])), how))


# Shapes ---------------------------------------------------------------------------------------------------------------


@reads("Transpose")
def _transpose(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Any:
    perm = list(attributes.get("perm", ()))
    if isinstance(inputs[0], numpy.ndarray):
        return inputs[0].transpose(perm or None)
    value = reader.settled(reader.data(node, inputs[0]))
    axes = len(value.shape)
    if axes > 1 and perm == ([0, *range(2, axes + 1), 1] if value.first else [0, axes, *range(1, axes)]):
        return value._replace(first=not value.first)
    if not perm or perm[0] != 0:
        raise reader.refuse(node, f"in the order {perm} moves the batch")
    return reader.add(reader.in_order(value), layers.Permute([axis - 1 for axis in perm[1:]]))


@reads("Flatten")
def _flatten(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Value:
    if attributes.get("axis", 1) != 1:
        raise reader.refuse(node, f"from axis {attributes['axis']} on takes in the batch")
    return _flat(reader, reader.data(node, inputs[0]))


def _flat(reader: Reader, value: Value) -> Value:
    if len(value.shape) == 1:
        return value
    last = value.parts[-1].layer if value.parts else None
    if value.first and value.shape[:2] == (1, 1) and isinstance(last, layers.Reshape):  # undo it
        return Value(value.parts[:-1], value.shape[2:])
    if value.first and len(value.shape) != 3:
        value = reader.in_order(value)
    flat = reader.add(value, layers.Flatten())
    return flat._replace(flat_of=value.shape) if value.first and value.shape[2] > 1 else flat


@reads("Reshape")
def _reshape(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Any:
    if isinstance(inputs[0], numpy.ndarray):
        return inputs[0].reshape([int(n) for n in reader.constant(node, inputs[1], "shape")])
    value, target = reader.data(node, inputs[0]), list(inputs[1])
    features = math.prod(value.shape)
    batch, *sizes = target
    # The batch stays if its place says so, perhaps by the number that the file was made with, or if the rest takes all.
    stays = batch is BATCH or int(batch) in (0, -1, reader.batch_size) or -1 in sizes
    in_file = reader.sizes(value)
    sizes = [int(in_file[i] if n == 0 else n) for i, n in enumerate(sizes)]
    if -1 in sizes:
        sizes[sizes.index(-1)] = features // max(1, math.prod(n for n in sizes if n != -1))
    if not stays or math.prod(sizes) != features:
        raise reader.refuse(node, f"to {target} takes in the batch")
    if len(sizes) == 1:
        return _flat(reader, value)
    return reader.add(reader.in_order(value), layers.Reshape(sizes), first=False)


@reads("Squeeze", "Unsqueeze")
def _squeeze(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Any:
    axes = attributes.get("axes")
    if axes is None and len(inputs) > 1:
        axes = [int(n) for n in reader.constant(node, inputs[1], "axis").reshape(-1)]
    value = inputs[0]
    if isinstance(value, list):
        return value
    if isinstance(value, numpy.ndarray) or not isinstance(value, Value):
        return [value] if node.op_type == "Unsqueeze" else numpy.squeeze(value)
    on_pixels = sorted(axis % 4 for axis in axes or (2, 3)) == [2, 3]
    if node.op_type == "Squeeze" and value.first and value.shape[:2] == (1, 1) and on_pixels:
        return _flat(reader, value)
    raise reader.refuse(node, f"over axes {axes} is not known")


# Numbers of a shape, in which the batch has none yet ------------------------------------------------------------------


@reads("Shape")
def _shape(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> list[Any]:
    return [BATCH, *reader.sizes(reader.data(node, inputs[0]))]


def _picked(reader: Reader, node: Any, numbers: Any, index: int) -> Any:
    if not isinstance(numbers, list | numpy.ndarray):
        raise reader.refuse(node, "is no embedding of the input")
    return numbers[index]


@reads("Slice")
def _slice(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> Any:
    if not isinstance(inputs[0], list):
        raise reader.refuse(node, "of data is not known")
    start, end = (int(reader.constant(node, a, "bound").reshape(())) for a in inputs[1:3])
    return inputs[0][start:end]


@reads("Concat")
def _concat(reader: Reader, node: Any, inputs: list[Any], attributes: dict[str, Any]) -> list[Any]:
    if any(isinstance(a, Value) for a in inputs):
        raise reader.refuse(node, "joins two ways of the graph that are no residual sum")
    return [n for a in inputs for n in (a if isinstance(a, list) else numpy.asarray(a).reshape(-1).tolist())]
