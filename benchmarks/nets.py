"""The networks that are measured, described in data, from which each library builds its own."""

from typing import NamedTuple


class Net(NamedTuple):
    """A classifier of ten classes. input_shape has channels last and no batch axis.

    layers: ("conv", filters, kernel, "same" | "valid"), ("pool", size), ("dense", units), ("dropout", rate), ("relu",),
    ("flatten",).  optimizer: "sgd" or "adam", with the learning rate in RATES.
    """

    input_shape: tuple[int, ...]
    layers: tuple[tuple, ...]
    optimizer: str


def _mlp(*widths: int) -> tuple[tuple, ...]:
    hidden = [layer for width in widths for layer in (("dense", width), ("relu",))]
    return (*hidden, ("dense", 10))


NETS = {
    "mlp": Net((784,), _mlp(128), "sgd"),
    "mlp-wide": Net((784,), _mlp(512, 512), "sgd"),
    "mlp-4096": Net((784,), _mlp(4096, 4096, 4096), "sgd"),  # for a GPU
    "cnn": Net(
        (28, 28, 1),
        (
            *(("conv", 16, 3, "same"), ("relu",), ("pool", 2)),
            *(("conv", 32, 3, "same"), ("relu",), ("pool", 2)),
            *(("flatten",), ("dense", 10)),
        ),
        "adam",
    ),
    # The network of mnist/main.py in pytorch/examples.
    "torch-example": Net(
        (28, 28, 1),
        (
            *(("conv", 32, 3, "valid"), ("relu",), ("conv", 64, 3, "valid"), ("relu",), ("pool", 2), ("dropout", 0.25)),
            *(("flatten",), ("dense", 128), ("relu",), ("dropout", 0.5), ("dense", 10)),
        ),
        "adam",
    ),
}

RATES = {"sgd": 0.01, "adam": 0.001}
CLASSES = 10


def epoch_size(net: Net) -> int:
    """The number of samples in a measured epoch: that of MNIST, or fewer for the slower convolutional networks."""
    return 60_000 if len(net.input_shape) == 1 else 6_400


def shapes(net: Net) -> list[tuple[tuple, tuple[int, ...], tuple[int, ...]]]:
    """(layer, input shape, output shape) for each layer."""
    result, shape = [], net.input_shape
    for layer in net.layers:
        before = shape
        match layer:
            case ("conv", filters, kernel, padding):
                border = 0 if padding == "same" else kernel - 1
                shape = (before[0] - border, before[1] - border, filters)
            case ("pool", size):
                shape = (before[0] // size, before[1] // size, before[2])
            case ("flatten",):
                shape = (before[0] * before[1] * before[2],)
            case ("dense", units):
                shape = (units,)
        result.append((layer, before, shape))
    return result
