"""Text datasets: tiny Shakespeare, and an excerpt of it that ships with xpnet."""

import gzip
import io
import logging
import os
import zlib
from pathlib import Path

from xpnet.config import explain_arguments
from xpnet.data.files import read_bytes
from xpnet.datasets.download import Source, locate, sha256_of
from xpnet.errors import DownloadError, FileError

logger = logging.getLogger(__name__)

TINY_SHAKESPEARE = Source(
    name="tinyshakespeare",
    mirrors=("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",),
    sha256={"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
    sizes={"input.txt": 1_115_394},
)

_EXCERPT = Path(__file__).parent / "data" / "shakespeare.txt.gz"
_EXCERPT_SHA256 = "0b62d3dfc63e47915ffabc7bdd9788cea8033a1f051e565449ee9e7627aa553e"
_GZIP_MAGIC = b"\x1f\x8b"
_LONGEST = 2**21  # bytes: more than any of the texts


@explain_arguments
def shakespeare(data_dir: str | os.PathLike[str] | None = None) -> str:
    """Tiny Shakespeare (Karpathy's char-rnn), parts of the plays: a text of 1,115,394 characters, 65 different ones.

    By custom the first 90 % train a model and the last 10 % validate it. The plays are in the public domain.

    data_dir: a folder with input.txt, or the parent of a folder "tinyshakespeare" with it; raises `FileError` if it is
    not there. Without data_dir, it is read from $XPNET_DATA_DIR/tinyshakespeare or from the user's cache, and
    downloaded into the cache if it is in neither. If that fails, this returns the excerpt that ships with xpnet, the
    first 99,804 characters, and logs a warning.
    """
    try:
        (path,) = locate(TINY_SHAKESPEARE, data_dir)
    except DownloadError as error:
        logger.warning("using the excerpt of tiny Shakespeare that ships with xpnet: %s", error)
        return _read(_EXCERPT, _EXCERPT_SHA256)
    return _read(path, TINY_SHAKESPEARE.sha256["input.txt"])


def _read(path: Path, sha256: str) -> str:
    """The text of a file, which may be gzip-compressed. Raises FileError unless its SHA-256 is right."""
    content = read_bytes(path)
    if content.startswith(_GZIP_MAGIC):
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
                content = file.read(_LONGEST)
        except (OSError, EOFError, zlib.error) as error:
            raise FileError(f"{path} is damaged: gzip cannot decompress it ({error}).") from error
    if (actual := sha256_of(content)) != sha256:
        raise FileError(
            f"{path} is not the published text: its SHA-256 is {actual}, not {sha256}. For a text of your own, use "
            "open(path).read()."
        )
    return content.decode("ascii")
