"""PyTorch's counterpart of each layer, as a differentiable function of tensors in the memory layout of xpnet.

Each function takes x (N, ..., features), and the arguments and parameters of the layer by their names.
"""

import numpy as np
import torch
from torch.nn import functional

# With oneDNN, conv2d of PyTorch 2.13 in float32 has returned uninitialized memory for one channel and a width of 1.
torch.backends.mkldnn.enabled = False

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


# Comparison --------------------------------------------------------------------------------------------------------


def tensor(a, grad=False):
    """A copy as a tensor; grad: whether autograd differentiates with respect to it."""
    return torch.from_numpy(np.array(a)).requires_grad_(grad)


def agree(ours, theirs, what="", tolerance=None, at_least=0.0):
    """Assert equal shapes and dtypes, and ‖ours - theirs‖ / ‖theirs‖ within the tolerance of the dtype.

    at_least: replaces a smaller ‖theirs‖, for results that are 0 up to rounding.
    """
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape, f"{what}: {ours.shape}, but PyTorch has {theirs.shape}"
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype}, but PyTorch has {theirs.dtype}"
    assert np.isfinite(theirs).all(), f"{what}: the result of PyTorch is not finite"
    difference, size = np.linalg.norm((ours - theirs).ravel()), np.linalg.norm(theirs.ravel())
    tolerance = TOLERANCE[str(ours.dtype)] if tolerance is None else tolerance
    assert difference <= tolerance * max(size, at_least), f"{what}: ‖difference‖ {difference:.3g} of {size:.3g}"


def built(layer, x, dtype, rng):
    """The layer, built for x on the CPU in training mode, with random parameters."""
    layer.build(x.shape[1:], backend="cpu", dtype=dtype)
    layer.context.training = True
    for parameter in layer.parameters:
        parameter.value[...] = rng.normal(size=parameter.shape)
    return layer


def same(ours, theirs, what):
    """Assert that all elements are equal."""
    np.testing.assert_array_equal(ours, theirs.detach().numpy(), err_msg=what)


def compare(layer, x, twin, rng, check=agree, theirs_in=None, **kwargs):
    """Compare the outputs for x and all gradients of a built layer with its twin, which computes in `theirs_in`."""
    dtype = layer.context.dtype
    differentiable = x.dtype.kind == "f"
    x = x.astype(dtype) if differentiable else x

    def leaf(a):
        return tensor(a if theirs_in is None else a.astype(theirs_in), grad=a.dtype.kind == "f")

    parameters = {p.name: leaf(p.value) for p in layer.parameters}
    leaves = {"x": leaf(x), **parameters}
    expected = twin(leaves["x"], **parameters, **kwargs)
    y = layer.forward(x)
    assert y.shape[1:] == layer.output_shape
    check(y, expected.to(getattr(torch, str(dtype))), "y")
    # If equality is required, use integers, because their sums are exact.
    grad_y = (rng.integers(-9, 10, y.shape) if check is same else rng.normal(size=y.shape)).astype(dtype)
    ours = {"x": layer.backward(grad_y), **{p.name: p.grad for p in layer.parameters}}
    names = [name for name in leaves if leaves[name].requires_grad]
    gradients = torch.autograd.grad(expected, [leaves[name] for name in names], tensor(grad_y).to(expected.dtype))
    for name, theirs in zip(names, gradients, strict=True):
        check(ours[name], theirs.to(getattr(torch, str(dtype))), f"gradient of {name}")


# Windows -----------------------------------------------------------------------------------------------------------


def pair(a):
    return (a, a) if isinstance(a, int) else tuple(a)


def channels_first(x):
    return x.movedim(-1, 1).contiguous()


def channels_last(x):
    return x.movedim(1, -1)


def padded_same(x, window, strides, value=0.0):
    """x (N, C, H, W) with the padding of "same": ceil(size / stride) windows, and the larger half of it last."""
    margins = []
    for size, extent, stride in zip(reversed(x.shape[2:]), reversed(window), reversed(strides), strict=True):
        total = max((-(-size // stride) - 1) * stride + extent - size, 0)
        margins += [total // 2, total - total // 2]
    return functional.pad(x, margins, value=value)


def extents(kernel_size, dilation):
    """The height and width of a window, including the gaps of its dilation."""
    return [d * (k - 1) + 1 for k, d in zip(pair(kernel_size), pair(dilation), strict=True)]


# Convolutions ------------------------------------------------------------------------------------------------------


def conv2d(x, weight, bias=None, strides=1, padding="valid", dilation=1, groups=1):
    x, strides, dilation = channels_first(x), pair(strides), pair(dilation)
    if padding == "same":
        x = padded_same(x, extents(weight.shape[:2], dilation), strides)
    sides = (0, 0) if isinstance(padding, str) else pair(padding)
    return channels_last(
        functional.conv2d(x, weight.permute(3, 2, 0, 1).contiguous(), bias, strides, sides, dilation, groups)
    )


def depthwise_conv2d(x, weight, bias=None, **kwargs):
    return conv2d(x, weight, bias, groups=x.shape[-1], **kwargs)


def conv2d_transpose(
    x, weight, bias=None, strides=1, padding="valid", dilation=1, groups=1, output_padding=0
):  # fmt: skip
    height, width, inputs, filters = weight.shape
    # PyTorch's weight is (in, filters / groups, kh, kw), the groups one after the other in its first axis.
    blocks = weight.reshape(height, width, inputs, groups, filters // groups).permute(3, 2, 4, 0, 1)
    theirs = blocks.reshape(groups * inputs, filters // groups, height, width).contiguous()
    strides, dilation = pair(strides), pair(dilation)
    sides = (0, 0) if isinstance(padding, str) else pair(padding)
    images = channels_first(x)
    if padding != "same":
        y = functional.conv_transpose2d(images, theirs, bias, strides, sides, pair(output_padding), groups, dilation)
        return channels_last(y)
    # The adjoint of a "same" convolution of n · s rows: drop the rows and columns that lie in the padding.
    y = functional.conv_transpose2d(images, theirs, None, strides, 0, 0, groups, dilation)
    for axis, (size, extent, stride) in enumerate(
        zip(images.shape[2:], extents((height, width), dilation), strides, strict=True), start=2
    ):
        before = max(extent - stride, 0) // 2
        missing = before + size * stride - y.shape[axis]
        if missing > 0:
            y = torch.cat([y, torch.zeros(*y.shape[:axis], missing, *y.shape[axis + 1 :], dtype=y.dtype)], axis)
        y = y.narrow(axis, before, size * stride)
    y = channels_last(y)
    return y if bias is None else y + bias


def padded_sequence(x, padding, extent, stride, value=0.0):
    """x (N, C, T) with the padding of a layer for sequences, whose windows have this extent."""
    if padding == "causal":
        sides = extent - 1, 0
    elif padding == "same":
        total = max((-(-x.shape[2] // stride) - 1) * stride + extent - x.shape[2], 0)
        sides = total // 2, total - total // 2
    else:
        sides = (0, 0) if padding == "valid" else (padding, padding)
    return functional.pad(x, sides, value=value)


def conv1d(x, weight, bias=None, strides=1, padding="valid", dilation=1, groups=1):
    x = padded_sequence(channels_first(x), padding, dilation * (len(weight) - 1) + 1, strides)
    return channels_last(functional.conv1d(x, weight.permute(2, 1, 0).contiguous(), bias, strides, 0, dilation, groups))


# Pooling -----------------------------------------------------------------------------------------------------------


def max_pool1d(x, pool_size=2, strides=None, padding="valid"):
    x = padded_sequence(channels_first(x), padding, pool_size, strides or pool_size, -torch.inf)
    return channels_last(functional.max_pool1d(x, pool_size, strides))


def avg_pool1d(x, pool_size=2, strides=None, padding="valid", count_include_pad=True):
    x, strides = channels_first(x), strides or pool_size
    mean = functional.avg_pool1d(padded_sequence(x, padding, pool_size, strides), pool_size, strides)
    ones = padded_sequence(torch.ones_like(x), padding, pool_size, strides)
    return channels_last(mean if count_include_pad else mean / functional.avg_pool1d(ones, pool_size, strides))


def global_average_pool1d(x):
    return functional.adaptive_avg_pool1d(channels_first(x), 1).flatten(1)


def global_max_pool1d(x):
    return functional.adaptive_max_pool1d(channels_first(x), 1).flatten(1)


def max_pool2d(x, pool_size=2, strides=None, padding="valid"):
    x, size = channels_first(x), pair(pool_size)
    strides = size if strides is None else pair(strides)
    if padding == "same":
        x = padded_same(x, size, strides, -torch.inf)
    elif padding != "valid":
        height, width = pair(padding)  # explicitly, because PyTorch pads by at most half a window
        x = functional.pad(x, (width, width, height, height), value=-torch.inf)
    return channels_last(functional.max_pool2d(x, size, strides))


def avg_pool2d(x, pool_size=2, strides=None, padding="valid", count_include_pad=True):
    x, size = channels_first(x), pair(pool_size)
    strides = size if strides is None else pair(strides)
    if padding == "same":
        ones = padded_same(torch.ones_like(x), size, strides)
        mean = functional.avg_pool2d(padded_same(x, size, strides), size, strides)
        return channels_last(mean if count_include_pad else mean / functional.avg_pool2d(ones, size, strides))
    sides = 0 if padding == "valid" else pair(padding)
    return channels_last(functional.avg_pool2d(x, size, strides, sides, count_include_pad=count_include_pad))


def global_average_pool2d(x):
    return functional.adaptive_avg_pool2d(channels_first(x), 1).flatten(1)


def global_max_pool2d(x):
    return functional.adaptive_max_pool2d(channels_first(x), 1).flatten(1)


def zero_padding2d(x, padding):
    vertical, horizontal = (pair(side) for side in pair(padding))
    return channels_last(functional.pad(channels_first(x), (*horizontal, *vertical)))


def upsample2d(x, size=2, interpolation="nearest"):
    corners = {"align_corners": False} if interpolation == "bilinear" else {}
    scale = tuple(float(s) for s in pair(size))
    return channels_last(functional.interpolate(channels_first(x), scale_factor=scale, mode=interpolation, **corners))


# Normalization, PReLU, Embedding, Dense -----------------------------------------------------------------------------


def batch_norm(x, gamma=None, beta=None, mean=None, variance=None, training=True, momentum=0.1, epsilon=1e-5):
    """Updates the running `mean` and `variance` in place."""
    gamma = torch.ones_like(x[0].reshape(-1, x.shape[-1])[0]) if gamma is None else gamma
    beta = torch.zeros_like(gamma) if beta is None else beta
    y = functional.batch_norm(x.movedim(-1, 1), mean, variance, gamma, beta, training, momentum, epsilon)
    return y.movedim(1, -1)


def layer_norm(x, gamma=None, beta=None, epsilon=1e-5):
    return functional.layer_norm(x, x.shape[-1:], gamma, beta, epsilon)


def group_norm(x, groups, gamma=None, beta=None, epsilon=1e-5):
    gamma = torch.ones(x.shape[-1], dtype=x.dtype) if gamma is None else gamma  # PyTorch's backward needs it
    return functional.group_norm(x.movedim(-1, 1), groups, gamma, beta, epsilon).movedim(1, -1)


def instance_norm(x, gamma=None, beta=None, epsilon=1e-5):
    return functional.instance_norm(x.movedim(-1, 1), weight=gamma, bias=beta, eps=epsilon).movedim(1, -1)


def hard_sigmoid(x):
    return functional.relu6(x + 3) / 6  # in float64, functional.hardsigmoid has the slope 1/6 of float32


def prelu(x, weight):
    return functional.prelu(x.movedim(-1, 1), weight).movedim(1, -1)


def embedding(x, weight):
    return functional.embedding(x.long(), weight)


def dense(x, weight, bias=None):
    return functional.linear(x, weight.T, bias)


# Attention -----------------------------------------------------------------------------------------------------------


def rms_norm(x, gamma, epsilon=1e-6):
    return functional.rms_norm(x, x.shape[-1:], gamma, epsilon)


def positional_embedding(x, weight):
    return x + functional.embedding(torch.arange(x.shape[1]), weight)


def rotated(x):
    """x (N, heads, T, D), with the pairs of elements i and i + D/2 as complex numbers, times e^(i angle)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * 10000.0 ** (
        -torch.arange(half, dtype=torch.float64) / half
    )
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def attention(x, heads, causal=False, rotary=False, memory=None, mask=None, **parameters):
    """nn.MultiheadAttention; if rotary, scaled_dot_product_attention. mask (N, S): where a key counts."""
    memory = x if memory is None else memory
    parts = ("query", "key", "value", "output")
    biases = [parameters.get(f"{part}_bias") for part in parts]
    weights = [parameters[f"{part}_weight"].T for part in parts]
    hidden = None
    if causal:
        hidden = torch.ones(x.shape[1], memory.shape[1], dtype=torch.bool).triu(1 + memory.shape[1] - x.shape[1])
    if not rotary:
        y, _ = functional.multi_head_attention_forward(
            x.movedim(0, 1), memory.movedim(0, 1), memory.movedim(0, 1), x.shape[2], heads, None,
            None if biases[0] is None else torch.cat(biases[:3]), None, None, False, 0.0, weights[3], biases[3],
            use_separate_proj_weight=True, q_proj_weight=weights[0], k_proj_weight=weights[1],
            v_proj_weight=weights[2], need_weights=False, attn_mask=hidden,
            key_padding_mask=None if mask is None else ~mask,
        )  # fmt: skip
        return y.movedim(0, 1)
    q, k, v = (
        functional.linear(given, weight, bias).unflatten(2, (heads, -1)).transpose(1, 2)
        for given, weight, bias in zip((x, memory, memory), weights, biases, strict=False)
    )
    out = functional.scaled_dot_product_attention(rotated(q), rotated(k), v, None if hidden is None else ~hidden)
    return functional.linear(out.transpose(1, 2).flatten(2), weights[3], biases[3])


def transformer_block(x, heads, causal, norm, activation, rotary, **parameters):
    def of(layer):
        return {name.split(".")[1]: p for name, p in parameters.items() if name.startswith(f"{layer}.")}

    norm = rms_norm if norm == "rms" else layer_norm
    h = x + attention(norm(x, **of("norm1")), heads, causal, rotary, **of("attention"))
    hidden = getattr(functional, activation)(dense(norm(h, **of("norm2")), **of("expand")))
    return h + dense(hidden, **of("contract"))
