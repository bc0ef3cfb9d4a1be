"""Where a data set's files are: in a folder of the user's, in the cache, or still on the network.

Only files whose SHA-256 is known are fetched, each under a temporary name until it is found whole, so neither a
broken download nor an altered cache is ever used. pooch, which fetches, is imported only when something has to be.
"""

import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xpnet.errors import DownloadError, FileError

logger = logging.getLogger(__name__)

_ENVIRONMENT = "XPNET_DATA_DIR"


@dataclass(frozen=True)
class Source:
    """A published data set: its folder's name, addresses that each hold every file, and each file's SHA-256."""

    name: str
    mirrors: tuple[str, ...]
    sha256: Mapping[str, str]


def locate(source: Source, data_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Paths of a data set's files, in the source's order.

    data_dir: a folder with the files, or one that holds them in a folder of the set's name. Files may be unpacked
    there. What is given is taken at its word: if the files are not in it, that is a `FileError`, never a download.

    Without it, the places are $XPNET_DATA_DIR/<name>, then the user's cache, then the mirrors in turn
    (`DownloadError` if none of them gives the file).
    """
    if data_dir is not None:
        folder = Path(data_dir).expanduser()
        # The named folder first: MNIST and its relatives give their files the same names.
        found = _find(source, folder / source.name) or _find(source, folder)
        if found is None:
            raise FileError(
                f"{source.name} is not in data_dir={str(folder)!r}. Looked there and in its folder {source.name!r} "
                f"for {', '.join(source.sha256)}, each with or without .gz. Without data_dir they are downloaded."
            )
        return found
    if shared := os.environ.get(_ENVIRONMENT):
        folder = Path(shared).expanduser() / source.name
        if found := _find(source, folder):
            return found
        logger.info("%s is not complete in %s; using the cache", source.name, folder)
    return [_fetch(source, name) for name in source.sha256]


def _find(source: Source, folder: Path) -> list[Path] | None:
    """The files of a set in one folder, packed or unpacked, or None unless all are there."""
    found = []
    for name in source.sha256:
        packed = folder / name
        path = next((path for path in (packed, packed.with_suffix("")) if os.path.isfile(path)), None)
        if path is None:
            return None
        found.append(path)
    return found


def _fetch(source: Source, name: str) -> Path:
    """One file in the cache, downloaded first unless it is there and whole."""
    help_yourself = (
        f"Or fetch the files of {source.name} yourself and give their folder as data_dir, "
        f"or put them into a folder {source.name!r} and set {_ENVIRONMENT} to the folder around it."
    )
    try:
        import pooch
    except ImportError as error:
        raise DownloadError(
            f"{source.name} has to be downloaded, which needs pooch: pip install pooch tqdm. {help_yourself}"
        ) from error

    path = Path(pooch.os_cache("xpnet")).expanduser() / source.name / name
    if os.path.isfile(path):
        if pooch.file_hash(path) == source.sha256[name]:
            return path
        logger.warning("%s is not the published file (its SHA-256 differs); downloading it again", path)

    failures = []
    for mirror in source.mirrors:
        url = mirror + name
        logger.info("downloading %s", url)
        try:
            _download(url, path, source.sha256[name])
            return path
        except (OSError, ValueError) as error:  # all of requests' errors are one of these
            logger.info("%s: %s", url, error)
            # Of a chain of urllib3's errors, the last one says what happened.
            failures.append(f"\n  {url}: {str(error).rsplit('Caused by ', 1)[-1]}")
    raise DownloadError(
        f"{name} of {source.name} could not be downloaded. Tried:{''.join(failures)}\n"
        f"Check the network connection. {help_yourself}"
    )


def _download(url: str, path: Path, sha256: str) -> None:
    """Fetch one address into one path, which changes only once the whole file is here."""
    import pooch

    path.parent.mkdir(parents=True, exist_ok=True)
    watched = sys.stderr is not None and sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
    with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        pooch.HTTPDownloader(progressbar=watched, chunk_size=1 << 16)(url, str(temporary), None)
        actual = pooch.file_hash(temporary)
        if actual != sha256:
            raise ValueError(f"the file that came is truncated or altered: SHA-256 {actual}, not {sha256}")
        os.replace(temporary, path)
