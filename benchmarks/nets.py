"""The nets that are measured, as plain descriptions from which every library builds its own."""

from typing import NamedTuple


class Net(NamedTuple):
    """input_shape is channels-last, without the batch; every net tells ten classes apart.

    layers: ("conv", filters, kernel, "same" | "valid"), ("pool", size), ("dense", units), ("dropout", rate), ("relu",),
    ("flatten",).  optimizer: "sgd" or "adam", each library's own, with its default rate.
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
    # pytorch/examples, mnist/main.py
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
    """Samples in an epoch from end to end: MNIST's number; of images fewer, as they take so much longer."""
    return 60_000 if len(net.input_shape) == 1 else 6_400


def shapes(net: Net) -> list[tuple[tuple, tuple[int, ...], tuple[int, ...]]]:
    """(layer, its input's shape, its output's shape) from first to last."""
    result, shape = [], net.input_shape
    for layer in net.layers:
        before = shape
        match layer:
            case ("conv", filters, kernel, padding):
                lost = 0 if padding == "same" else kernel - 1
                shape = (before[0] - lost, before[1] - lost, filters)
            case ("pool", size):
                shape = (before[0] // size, before[1] // size, before[2])
            case ("flatten",):
                shape = (before[0] * before[1] * before[2],)
            case ("dense", units):
                shape = (units,)
        result.append((layer, before, shape))
    return result
