"""Whole nets against PyTorch's: from equal weights, 20 training steps give equal losses and weights."""

import numpy as np
import pytest
import torch
import twins
from names import missing_classes
from torch.nn import functional

import xpnet
from xpnet import layers, optimizers

STEPS, BATCH = 20, 8


def plain_cnn():
    """Convolutions, pooling and Dense."""
    stack = [
        layers.Conv2D(6, 3, padding="same"),
        layers.ReLU(),
        layers.MaxPool2D(2),
        layers.Conv2D(8, (3, 2), strides=(2, 1), dilation=(1, 2)),
        layers.GELU(),
        layers.AvgPool2D(3, 1, padding=1),
        layers.Flatten(),
        layers.Dense(4),
    ]

    def twin(x, p):
        x = functional.relu(twins.conv2d(x, p["0.weight"], p["0.bias"], padding="same"))
        x = twins.max_pool2d(x)
        x = functional.gelu(twins.conv2d(x, p["3.weight"], p["3.bias"], strides=(2, 1), dilation=(1, 2)))
        x = twins.avg_pool2d(x, 3, 1, 1)
        return twins.dense(x.flatten(1), p["7.weight"], p["7.bias"])

    return stack, (11, 9, 3), twin


def residual_cnn():
    """Batch normalization, groups, depthwise convolution, residual blocks, global pooling."""
    stack = [
        layers.Conv2D(8, 3, 2, "same", use_bias=False),
        layers.BatchNorm(),
        layers.SiLU(),
        layers.Residual(
            layers.DepthwiseConv2D(3, padding=1, use_bias=False), layers.BatchNorm(), layers.Conv2D(8, 1, groups=2)
        ),
        layers.GlobalAveragePool2D(),
        layers.LayerNorm(),
        layers.Dense(4),
    ]

    def twin(x, p, training=True):
        def norm(x, name):
            arrays = (p[f"{name}.{array}"] for array in ("gamma", "beta", "running_mean", "running_var"))
            return twins.batch_norm(x, *arrays, training=training)

        x = twins.conv2d(x, p["0.weight"], strides=2, padding="same")
        x = functional.silu(norm(x, "1"))
        y = norm(twins.depthwise_conv2d(x, p["3.0.weight"], padding=1), "3.1")
        x = x + twins.conv2d(y, p["3.2.weight"], p["3.2.bias"], groups=2)
        x = twins.layer_norm(twins.global_average_pool2d(x), p["5.gamma"], p["5.beta"])
        return twins.dense(x, p["6.weight"], p["6.bias"])

    return stack, (9, 8, 2), twin


def down_and_up():
    """Downsampling by strides and pooling, upsampling by transposed convolution and Upsample2D."""
    stack = [
        layers.Conv2D(5, 4, 2, "same"),
        layers.Tanh(),
        layers.Conv2DTranspose(3, 3, 2, "same"),
        layers.LeakyReLU(0.1),
        layers.Upsample2D(2, "bilinear"),
        layers.MaxPool2D(4, 3, "same"),
        layers.Upsample2D((1, 2)),
        layers.Flatten(),
        layers.Dense(4),
    ]

    def twin(x, p):
        x = torch.tanh(twins.conv2d(x, p["0.weight"], p["0.bias"], 2, "same"))
        x = functional.leaky_relu(twins.conv2d_transpose(x, p["2.weight"], p["2.bias"], 2, "same"), 0.1)
        x = twins.max_pool2d(twins.upsample2d(x, 2, "bilinear"), 4, 3, "same")
        return twins.dense(twins.upsample2d(x, (1, 2)).flatten(1), p["8.weight"], p["8.bias"])

    return stack, (6, 8, 2), twin


def words():
    """An embedding of integers, followed by Dense layers."""
    stack = [layers.Embedding(12, 5), layers.Dense(6), layers.Tanh(), layers.Flatten(), layers.Dense(4)]

    def twin(x, p):
        x = torch.tanh(twins.dense(twins.embedding(x, p["0.weight"]), p["1.weight"], p["1.bias"]))
        return twins.dense(x.flatten(1), p["4.weight"], p["4.bias"])

    return stack, (7,), twin


class Muon:
    """The published algorithm in float64, for arrays in the layout of xpnet; PyTorch's own computes in bfloat16."""

    def __init__(self, parameters, rate):
        weights = [p for p in parameters if p.dim() > 1]
        self._matrices, self._rate = {p: torch.zeros_like(p) for p in weights[1:-1]}, rate
        others = [p for p in parameters if p not in self._matrices]
        self._adamw = torch.optim.AdamW(others, 0.015 * rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)

    def zero_grad(self):
        self._adamw.zero_grad()
        for p in self._matrices:
            p.grad = None

    @torch.no_grad()
    def step(self):
        self._adamw.step()
        for p, momentum in self._matrices.items():
            momentum.lerp_(p.grad, 0.05)
            u = p.grad.lerp(momentum, 0.95).reshape(-1, p.shape[-1]).T
            x = u / u.norm()
            if u.shape[0] > u.shape[1]:
                x = x.T
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            if u.shape[0] > u.shape[1]:
                x = x.T
            p -= self._rate * max(1.0, u.shape[0] / u.shape[1]) ** 0.5 * x.T.reshape(p.shape)


OPTIMIZERS = [
    (optimizers.SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    (optimizers.SGD(0.05, momentum=0.9), lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)),
    (optimizers.SGD(0.05, 0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True)),
    (optimizers.Adagrad(0.05), lambda p: torch.optim.Adagrad(p, 0.05)),
    (optimizers.RMSprop(0.01), lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.9)),
    (optimizers.Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    (optimizers.AdamW(0.01, weight_decay=0.0), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.0)),
    (optimizers.Muon(0.02), lambda p: Muon(p, 0.02)),
]


def test_every_optimizer_has_an_example():
    assert not missing_classes(optimizers, optimizers.Optimizer, [ours for ours, _ in OPTIMIZERS])


@pytest.mark.parametrize(("ours", "theirs"), OPTIMIZERS, ids=lambda a: repr(a) if hasattr(a, "get_config") else "")
@pytest.mark.parametrize("net", [plain_cnn, residual_cnn, down_and_up, words], ids=lambda net: net.__name__)
def test_twenty_steps_give_the_losses_and_weights_of_pytorch(net, ours, theirs):
    rng = np.random.default_rng(0)
    stack, shape, twin = net()
    model = xpnet.Sequential(stack, input_shape=shape, backend="cpu", dtype="float64")
    state = {name: twins.tensor(value) for name, value in model.state_dict().items()}
    optimizer = theirs([state[p.name].requires_grad_() for p in model.parameters])
    size = (STEPS, BATCH, *shape)
    batches = rng.integers(0, 12, size) if net is words else rng.normal(size=size)
    labels = rng.integers(0, 4, (STEPS, BATCH))
    for x, y in zip(batches, labels, strict=True):
        got = model.train_on_batch(x, y, loss="softmax_cross_entropy", optimizer=ours)["loss"]
        optimizer.zero_grad()
        loss = functional.cross_entropy(twin(twins.tensor(x), state), twins.tensor(y))
        loss.backward()
        optimizer.step()
        assert got == pytest.approx(loss.item(), rel=1e-9, abs=0)
    for name, value in model.state_dict().items():
        twins.agree(value, state[name], name, tolerance=1e-7)
    mode = {"training": False} if net is residual_cnn else {}
    twins.agree(model.predict(batches[0]), twin(twins.tensor(batches[0]), state, **mode), "predictions", 1e-8)


GROUPED = [
    (optimizers.SGD, {"momentum": 0.9, "weight_decay": 0.1}, torch.optim.SGD),
    (optimizers.Adam, {"weight_decay": 0.1}, torch.optim.Adam),
    (optimizers.AdamW, {"weight_decay": 0.1}, torch.optim.AdamW),
]


@pytest.mark.parametrize(("ours", "settings", "theirs"), GROUPED, ids=lambda a: getattr(a, "__name__", ""))
def test_rates_by_parameter_equal_the_parameter_groups_of_pytorch(ours, settings, theirs):
    """PyTorch's groups also say which parameters decay: here weights, as in xpnet."""
    rng = np.random.default_rng(1)
    stack, shape, twin = words()
    model = xpnet.Sequential(stack, input_shape=shape, backend="cpu", dtype="float64")
    state = {name: twins.tensor(value).requires_grad_() for name, value in model.state_dict().items()}
    factor = {"0.weight": 0.5, "1.weight": 1.0, "1.bias": 1.0, "4.weight": 0.0, "4.bias": 1.0}
    decay = settings["weight_decay"]
    groups = [
        {"params": [tensor], "lr": 0.02 * factor[name], "weight_decay": decay * name.endswith("weight")}
        for name, tensor in state.items()
    ]
    optimizer = theirs(groups, lr=0.02, **settings)
    mine = ours(0.02, **settings, parameter_rates={"0.*": 0.5, "4.weight": 0.0})
    for _ in range(STEPS):
        x, y = rng.integers(0, 12, (BATCH, *shape)), rng.integers(0, 4, BATCH)
        model.train_on_batch(x, y, loss="softmax_cross_entropy", optimizer=mine)
        optimizer.zero_grad()
        functional.cross_entropy(twin(twins.tensor(x), state), twins.tensor(y)).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        twins.agree(value, state[name], name, tolerance=1e-7)


@pytest.mark.parametrize("weights", [[0.5, 2.0, 1.0, 0.0]])
def test_a_step_with_class_weights_equals_that_of_pytorch(weights):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 3)), rng.integers(0, 4, 9)
    model = xpnet.Sequential([layers.Dense(4)], input_shape=3, backend="cpu", dtype="float64")
    weight, bias = (twins.tensor(p.value, grad=True) for p in model.parameters)
    kwargs = {"loss": "softmax_cross_entropy", "optimizer": optimizers.SGD(1.0)}
    got = model.train_on_batch(x, y, class_weight=weights, **kwargs)["loss"]
    expected = functional.cross_entropy(
        twins.tensor(x) @ weight + bias, twins.tensor(y), torch.tensor(weights, dtype=torch.float64)
    )
    expected.backward()
    assert got == pytest.approx(expected.item(), rel=1e-12)
    for before, p in zip((weight, bias), model.parameters, strict=True):
        twins.agree(p.value, before - before.grad, p.name)
