"""Tiny Shakespeare: the published file, the excerpt that ships with xpnet, and files that are refused."""

import gzip
import os

import pytest

from xpnet.data.files import read_bytes
from xpnet.datasets import shakespeare, text
from xpnet.datasets.download import sha256_of
from xpnet.errors import DownloadError, FileError

DATA_DIR = os.environ.get("XPNET_DATA_DIR", "")
HAS_TEXT = os.path.isfile(os.path.join(DATA_DIR, "tinyshakespeare", "input.txt"))


@pytest.fixture
def offline(monkeypatch):
    def fail(source, data_dir):
        raise DownloadError("the network is down")

    monkeypatch.setattr(text, "locate", fail)


def test_without_a_network_the_excerpt_is_used_with_a_warning(offline, caplog):
    excerpt = shakespeare()
    assert len(excerpt) == 99_804
    assert excerpt.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n")
    assert excerpt.endswith("Will you be gone?\n")
    assert len(set(excerpt)) == 61
    assert "ships with xpnet: the network is down" in caplog.text


@pytest.mark.skipif(not HAS_TEXT, reason="XPNET_DATA_DIR, a folder with the real tiny Shakespeare, is not set")
def test_the_published_text_begins_with_the_excerpt(offline, monkeypatch, tmp_path):
    excerpt = shakespeare()
    monkeypatch.undo()
    whole = shakespeare()
    assert (len(whole), len(set(whole))) == (1_115_394, 65)
    assert whole.startswith(excerpt)
    (tmp_path / "input.txt.gz").write_bytes(gzip.compress(whole.encode()))
    assert shakespeare(tmp_path) == whole


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("input.txt", b"Once upon a time", r"is not the published text: its SHA-256 is .*use open\(path\)"),
        ("input.txt.gz", gzip.compress(b"Once upon a time", mtime=0)[:-9], "is damaged: gzip cannot decompress it"),
        ("input.txt.gz", gzip.compress(b"\0" * 2**23, mtime=0), "is not the published text"),
        ("other.txt", b"", "tinyshakespeare is not in data_dir"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=message):
        shakespeare(tmp_path)


def test_the_bundled_file_is_the_one_that_the_readme_describes():
    readme = (text._EXCERPT.parent / "README.md").read_text(encoding="utf-8")
    assert sha256_of(read_bytes(text._EXCERPT)) in readme
    assert sha256_of(shakespeare_excerpt()) in readme


def shakespeare_excerpt():
    return gzip.decompress(text._EXCERPT.read_bytes())
