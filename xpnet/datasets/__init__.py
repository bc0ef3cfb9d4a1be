"""Datasets: MNIST and Fashion-MNIST, tiny Shakespeare, small digits that ship with xpnet, and toy problems.

Each function returns NumPy arrays, or a text. Only `mnist`, `fashion_mnist` and `shakespeare` may need a download.
`CharTokenizer` and `SubwordTokenizer` turn texts into arrays. `Stream` reads data of your own that does not fit into
memory.
"""

from typing import TYPE_CHECKING

from xpnet.data.streaming import Stream
from xpnet.datasets.idx import read_idx, write_idx
from xpnet.datasets.images import digits, fashion_mnist, mnist
from xpnet.datasets.samples import Samples, Split
from xpnet.datasets.text import shakespeare
from xpnet.datasets.tokens import CharTokenizer, RandomWindows, SubwordTokenizer, token_windows
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
from xpnet.errors import module_attributes

__all__ = ["CharTokenizer", "RandomWindows", "Samples", "Split", "Stream", "SubwordTokenizer", "blobs", "digits",
           "exam_scores", "fashion_mnist", "logic_gate", "mnist", "moons", "perceptron_and", "read_idx", "shakespeare",
           "spirals", "token_windows", "weight_height", "write_idx", "xor_with_constant"]  # fmt: skip

if not TYPE_CHECKING:  # a type checker that sees __getattr__ accepts every name, misspelled ones too
    __getattr__, __dir__ = module_attributes(__name__, __all__)
