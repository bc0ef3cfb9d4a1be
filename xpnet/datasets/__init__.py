"""Data to learn from: MNIST and its relatives, digits that come with xpnet, the tutorials' toy problems.

Each function returns NumPy arrays; only `mnist` and `fashion_mnist` may have to download. `Stream` is for data of your
own that does not fit into memory.
"""

from xpnet.datasets.idx import read_idx, write_idx
from xpnet.datasets.images import digits, fashion_mnist, mnist
from xpnet.datasets.samples import Samples, Split
from xpnet.datasets.toy import (
    blobs,
    exam_scores,
    logic_gate,
    moons,
    perceptron_and,
    spirals,
    weight_height,
    xor_with_constant,
)
from xpnet.streams import Stream

__all__ = [
    "Samples",
    "Split",
    "Stream",
    "blobs",
    "digits",
    "exam_scores",
    "fashion_mnist",
    "logic_gate",
    "mnist",
    "moons",
    "perceptron_and",
    "read_idx",
    "spirals",
    "weight_height",
    "write_idx",
    "xor_with_constant",
]
