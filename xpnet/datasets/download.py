"""Find the files of a dataset in a given folder or in the cache, or download them.

A file is downloaded to a temporary folder, and written to its place once its SHA-256 is right. The SHA-256 of a cached
file is checked too, so an incomplete download or an altered cache is never used. pooch is imported only for a download.
"""

import hashlib
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xpnet.concurrency.memory import refuse_without_memory
from xpnet.data.files import as_path, read_bytes, write_atomically
from xpnet.errors import DownloadError, FileError

logger = logging.getLogger(__name__)

_ENVIRONMENT = "XPNET_DATA_DIR"
_LARGEST = 2**25  # bytes
_PATIENCE, _SLOWEST = 60.0, 50_000.0  # a download may take so many seconds, and one more for each so many bytes
_SILENCE = 30.0  # seconds without data after which a server is given up
_CHUNK = 2**16  # bytes


@dataclass(frozen=True)
class Source:
    """A published dataset.

    name: of its folder.  mirrors: each offers all files.  sha256, sizes: of each file; sizes are in bytes, and a file
    without one may have up to `_LARGEST`.
    """

    name: str
    mirrors: tuple[str, ...]
    sha256: Mapping[str, str]
    sizes: Mapping[str, int] = field(default_factory=dict)


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
            _download(url, path, source.sha256[name], source.sizes.get(name))
            return path
        except (OSError, ValueError) as error:  # every error of requests is one of these
            logger.info("%s: %s", url, error)
            # urllib3 chains its errors in one message; the last of them is the cause.
            failures.append(f"\n  {url}: {str(error).rsplit('Caused by ', 1)[-1]}")
    raise DownloadError(
        f"{name} of {source.name} could not be downloaded. Tried:{''.join(failures)}\n"
        f"Check the network connection. {alternative}"
    )


class _Watch:
    """Ends a download that is too large or takes too long: pooch tells it, as its progress bar, of each chunk.

    size: the bytes of the file, if they are known.
    """

    def __init__(self, size: int | None) -> None:
        self.most, self.received = _LARGEST if size is None else size, 0
        self.seconds = _PATIENCE + self.most / _SLOWEST
        self.stopped = False
        self._bar: Any = None
        if sys.stderr is not None and sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            import tqdm

            self._bar = tqdm.tqdm(ncols=79, unit="B", unit_scale=True)

    @property
    def total(self) -> int:
        return self.most

    @total.setter
    def total(self, announced: int) -> None:
        self._refuse_more_than_most(announced)
        if self._bar is not None:
            self._bar.total = announced

    def update(self, count: int) -> None:
        if self.stopped:
            raise TimeoutError
        self.received += count
        self._refuse_more_than_most(self.received - _CHUNK)  # the last chunk may be smaller
        if self._bar is not None:
            self._bar.update(count)

    def reset(self) -> None:
        self.received = 0
        if self._bar is not None:
            self._bar.reset()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _refuse_more_than_most(self, count: int) -> None:
        if count > self.most:
            raise ValueError(f"the server sends more than the {self.most:,} bytes of the file")


def _download(url: str, path: Path, sha256: str, size: int | None) -> None:
    """Download `url` to `path`, which is written only once the file is complete and its SHA-256 is right."""
    import tempfile

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="xpnet-", ignore_cleanup_errors=True) as folder:
        temporary = Path(folder, path.name)
        _receive(url, temporary, _Watch(size))
        content = read_bytes(temporary)
        if (actual := sha256_of(content)) != sha256:
            raise ValueError(f"the downloaded file is truncated or altered: SHA-256 {actual}, not {sha256}")
        write_atomically(path, content)


def _receive(url: str, path: Path, watch: _Watch) -> None:
    """Download `url` to `path`. Raises TimeoutError if that takes too long."""
    import pooch

    errors: list[BaseException] = []

    def receive() -> None:
        try:
            pooch.HTTPDownloader(progressbar=watch, chunk_size=_CHUNK, timeout=_SILENCE)(url, str(path), None)
        except BaseException as error:
            errors.append(error)

    # In a thread, because a server that sends a byte now and then never lets `HTTPDownloader` return.
    refuse_without_memory()
    thread = threading.Thread(target=receive, name="xpnet-download", daemon=True)
    try:
        thread.start()
        thread.join(watch.seconds)
    finally:
        watch.stopped = True
        watch.close()
    if thread.is_alive():
        raise TimeoutError(f"the server has not sent the file in {watch.seconds:.0f} seconds")
    if errors:
        raise errors.pop()  # an error in the list would keep the list and itself, with an open connection, alive


def sha256_of(content: bytes) -> str:
    """The SHA-256 of these bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
