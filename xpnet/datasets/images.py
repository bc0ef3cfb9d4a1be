"""Image datasets: MNIST, Fashion-MNIST and the small digits that ship with xpnet.

Pixels are uint8, as published. Divide them by the largest value, or begin the model with `layers.Rescale`.
"""

import os
from pathlib import Path

import numpy

from xpnet.config import explain_arguments
from xpnet.datasets.download import Source, locate
from xpnet.datasets.idx import read_idx
from xpnet.datasets.samples import Samples, Split
from xpnet.errors import FileError

MNIST = Source(
    name="mnist",
    mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    sha256={
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    sizes={
        "train-images-idx3-ubyte.gz": 9_912_422,
        "train-labels-idx1-ubyte.gz": 28_881,
        "t10k-images-idx3-ubyte.gz": 1_648_877,
        "t10k-labels-idx1-ubyte.gz": 4_542,
    },
)

FASHION_MNIST = Source(
    name="fashion_mnist",
    mirrors=(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    sha256={
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
    sizes={
        "train-images-idx3-ubyte.gz": 26_421_880,
        "train-labels-idx1-ubyte.gz": 29_515,
        "t10k-images-idx3-ubyte.gz": 4_422_102,
        "t10k-labels-idx1-ubyte.gz": 5_148,
    },
)


@explain_arguments
def mnist(data_dir: str | os.PathLike[str] | None = None) -> Split:
    """Handwritten digits (LeCun, Cortes, Burges): `(x_train, y_train), (x_test, y_test) = mnist()`.

    x: (60000, 28, 28) and (10000, 28, 28) uint8, 0 for paper and 255 for ink. y: (N,) int64, the digits 0 to 9.

    data_dir: a folder with the four files, or the parent of a folder "mnist" with them; raises `FileError` if they are
    not there. Without data_dir, they are read from $XPNET_DATA_DIR/mnist or from the user's cache, and downloaded into
    the cache if they are in neither; raises `DownloadError` if that fails.
    """
    return _load(MNIST, data_dir)


@explain_arguments
def fashion_mnist(data_dir: str | os.PathLike[str] | None = None) -> Split:
    """Images of clothing (Xiao, Rasul, Vollgraf, https://arxiv.org/abs/1708.07747), with MNIST's shapes and dtypes.

    y: 0 T-shirt or top, 1 trousers, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 trainer, 8 bag, 9 ankle boot.

    data_dir: as for `mnist`, with the folder "fashion_mnist".
    """
    return _load(FASHION_MNIST, data_dir)


def digits() -> Samples:
    """1797 small handwritten digits (Alpaydin, Kaynak) that ship with xpnet: `x, y = digits()`.

    x: (1797, 8, 8) uint8, from 0 for paper to 16 for ink. y: (1797,) int64, the digits 0 to 9.
    Rows and order are those of scikit-learn's `load_digits`. Source and license are in data/README.md.
    """
    folder = Path(__file__).parent / "data"
    return _read(folder / "digits-images-idx3-ubyte.gz", folder / "digits-labels-idx1-ubyte.gz", (1797, 8, 8))


def _load(source: Source, data_dir: str | os.PathLike[str] | None) -> Split:
    train_images, train_labels, test_images, test_labels = locate(source, data_dir)
    return Split(
        train=_read(train_images, train_labels, (60_000, 28, 28)),
        test=_read(test_images, test_labels, (10_000, 28, 28)),
    )


def _read(images: Path, labels: Path, shape: tuple[int, ...]) -> Samples:
    """A file of images and one of labels. Raises FileError unless dtype, shape and labels are those of the dataset."""
    x, y = read_idx(images), read_idx(labels)
    for path, array, expected in ((images, x, shape), (labels, y, shape[:1])):
        if array.dtype != numpy.uint8 or array.shape != expected:
            raise FileError(f"{path} has {array.dtype} of shape {array.shape}; expected uint8 of shape {expected}.")
    if y.max() > 9:
        raise FileError(f"{labels} has a label {y.max()}; expected labels from 0 to 9.")
    return Samples(x, y.astype(numpy.int64))
