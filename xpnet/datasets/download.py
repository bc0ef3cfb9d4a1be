"""Find the files of a dataset in a given folder or in the cache, or download them.

A file is downloaded to a temporary name and moved to its place once its SHA-256 is right. The SHA-256 of a cached file
is checked too, so an incomplete download or an altered cache is never used. pooch is imported only for a download.
"""

import hashlib
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpnet.data.files import as_path, read_bytes, write_atomically
from xpnet.errors import DownloadError, FileError

logger = logging.getLogger(__name__)

_ENVIRONMENT = "XPNET_DATA_DIR"


@dataclass(frozen=True)
class Source:
    """A published dataset: the name of its folder, mirrors that each offer all files, and the SHA-256 of each file."""

    name: str
    mirrors: tuple[str, ...]
    sha256: Mapping[str, str]


def locate(source: Source, data_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """The paths of a dataset's files, in the order of `source.sha256`.

    data_dir: a folder with the files, or its parent if the folder has the dataset's name. The files may be compressed
    or not, and may have the names of some mirrors, such as "train-images.idx3-ubyte". Raises `FileError` if they are
    not there, and never downloads.

    Without data_dir, they are looked for in $XPNET_DATA_DIR/<name> and in the user's cache, and otherwise downloaded
    from the mirrors in turn. Raises `DownloadError` if no mirror delivers a file.
    """
    if data_dir is not None:
        folder = _expanded(as_path("", "data_dir", data_dir))
        # The named folder comes first, because the files of MNIST and Fashion-MNIST have the same names.
        found = _find(source, folder / source.name) or _find(source, folder)
        if found is None:
            raise FileError(
                f"{source.name} is not in data_dir={str(folder)!r}. Looked there and in its subfolder {source.name!r} "
                f"for {', '.join(source.sha256)}, each with or without .gz. Leave out data_dir to download them."
            )
        return found
    if shared := os.environ.get(_ENVIRONMENT):
        folder = _expanded(shared) / source.name
        if found := _find(source, folder):
            return found
        logger.info("%s is missing or incomplete in %s; using the cache", source.name, folder)
    return [_fetch(source, name) for name in source.sha256]


def _find(source: Source, folder: Path) -> list[Path] | None:
    """The files of a dataset in one folder, compressed or not; None unless all are there."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FileError(f"{folder}: cannot be read: {error.strerror or error}.") from error
    found = []
    for name in source.sha256:
        same = [other for other in names if _plain_name(other) == _plain_name(name)]
        same.sort(key=[name, name.removesuffix(".gz")].__contains__, reverse=True)  # the published names first
        path = next((folder / other for other in same if os.path.isfile(folder / other)), None)
        if path is None:
            return None
        found.append(path)
    return found


def _plain_name(name: str) -> str:
    """A name without what differs between mirrors, as in train-images-idx3-ubyte.gz and TRAIN-IMAGES.IDX3-UBYTE."""
    return name.lower().removesuffix(".gz").replace(".idx", "-idx")


def _expanded(path: Any) -> Path:
    return Path(os.path.expanduser(path))


def _fetch(source: Source, name: str) -> Path:
    """The path of one file in the cache. Downloads it unless an intact copy is there."""
    alternative = (
        f"Or download the files of {source.name} yourself and pass their folder as data_dir, "
        f"or put them into a folder named {source.name!r} and set {_ENVIRONMENT} to its parent."
    )
    try:
        import pooch
    except ImportError as error:
        raise DownloadError(
            f"{source.name} has to be downloaded, which needs pooch: pip install pooch tqdm. {alternative}"
        ) from error

    path = _expanded(pooch.os_cache("xpnet")) / source.name / name
    if os.path.isfile(path):
        if sha256_of(read_bytes(path)) == source.sha256[name]:
            return path
        logger.warning("%s is not the published file: its SHA-256 differs; downloading it again", path)

    failures = []
    for mirror in source.mirrors:
        url = mirror + name
        logger.info("downloading %s", url)
        try:
            _download(url, path, source.sha256[name])
            return path
        except (OSError, ValueError) as error:  # every error of requests is one of these
            logger.info("%s: %s", url, error)
            # urllib3 chains its errors in one message; the last of them is the cause.
            failures.append(f"\n  {url}: {str(error).rsplit('Caused by ', 1)[-1]}")
    raise DownloadError(
        f"{name} of {source.name} could not be downloaded. Tried:{''.join(failures)}\n"
        f"Check the network connection. {alternative}"
    )


def _download(url: str, path: Path, sha256: str) -> None:
    """Download `url` to `path`, which is written only once the file is complete and its SHA-256 is right."""
    import tempfile

    import pooch

    path.parent.mkdir(parents=True, exist_ok=True)
    terminal = sys.stderr is not None and sys.stderr.isatty()
    show_progress = terminal and importlib.util.find_spec("tqdm") is not None
    with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        pooch.HTTPDownloader(progressbar=show_progress, chunk_size=1 << 16)(url, str(temporary), None)
        content = read_bytes(temporary)
        if (actual := sha256_of(content)) != sha256:
            raise ValueError(f"the downloaded file is truncated or altered: SHA-256 {actual}, not {sha256}")
        write_atomically(path, content)


def sha256_of(content: bytes) -> str:
    """The SHA-256 of these bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
