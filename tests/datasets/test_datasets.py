"""Datasets: their contents, the folders that are searched for their files, and failing downloads."""

import dataclasses
import gc
import gzip
import hashlib
import http.server
import io
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pytest

from xpnet.datasets import (
    Split,
    blobs,
    digits,
    exam_scores,
    fashion_mnist,
    images,
    logic_gate,
    mnist,
    moons,
    perceptron_and,
    spirals,
    weight_height,
    write_idx,
    xor_with_constant,
)
from xpnet.datasets.download import Source, locate
from xpnet.errors import ArgumentError, DownloadError, FileError

REAL_DATA = os.environ.get("XPNET_DATA_DIR")  # read here, because a fixture unsets it for the tests
CONTENT = {"first.gz": gzip.compress(b"first" * 9000, mtime=0), "second.gz": gzip.compress(b"second", mtime=0)}
SHA256 = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


# The search for files: data_dir, the folder of the environment variable, the cache, the mirrors


class Mirror(http.server.ThreadingHTTPServer):
    """A mirror at 127.0.0.1. /good/NAME is the file; /altered/, /cut/, /short/ and /missing/ each fail in one way."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []

    def url(self, folder):
        return f"http://127.0.0.1:{self.server_address[1]}/{folder}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        folder, name = self.path.strip("/").split("/")
        body = complete = CONTENT[name]
        if folder == "missing":
            self.send_error(404)
            return
        if folder == "altered":
            body = complete = body[:-1] + bytes([body[-1] ^ 1])
        if folder == "short":  # a complete response with a shorter file
            body = complete = body[:-1]
        if folder == "cut":  # the connection is lost
            body = body[: len(body) // 2]
        self.send_response(200)
        self.send_header("Content-Length", str(len(complete)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the dataset "tiny" in a cache for this test; it does not exist yet."""
    pooch = pytest.importorskip("pooch")
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    return tmp_path / "cache" / "xpnet" / "tiny"


@pytest.fixture
def mirror(cache, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    gc.collect()  # causes a warning if a connection was left open


@pytest.fixture(autouse=True)
def no_shared_folder(monkeypatch):
    monkeypatch.delenv("XPNET_DATA_DIR", raising=False)


def tiny(*mirrors):
    return Source("tiny", mirrors, SHA256)


def put(folder, decompressed=False):
    folder.mkdir(parents=True)
    for name, content in CONTENT.items():
        path = folder / (name[:-3] if decompressed else name)
        path.write_bytes(gzip.decompress(content) if decompressed else content)
    return folder


@pytest.mark.parametrize("decompressed", [False, True])
def test_data_dir_is_the_folder_or_its_parent(tmp_path, decompressed):
    folder = put(tmp_path / "data" / "tiny", decompressed)
    expected = [folder / name.removesuffix(".gz" if decompressed else "") for name in CONTENT]
    assert locate(tiny(), folder) == expected
    assert locate(tiny(), str(tmp_path / "data")) == expected


def test_the_folder_with_the_name_of_the_dataset_comes_first(tmp_path):
    other, named = put(tmp_path / "data"), put(tmp_path / "data" / "tiny")
    assert locate(tiny(), other)[0].parent == named


def test_data_dir_without_the_files_is_an_error_without_a_download(tmp_path, mirror):
    (put(tmp_path / "data") / "second.gz").unlink()
    for folder in (tmp_path / "data", tmp_path / "absent"):
        with pytest.raises(FileError, match=r"tiny is not in data_dir=.*'tiny' for first.gz, second.gz") as caught:
            locate(tiny(mirror.url("good")), folder)
        assert str(folder) in str(caught.value)
    assert not mirror.requests


def test_data_dir_comes_before_the_environment(tmp_path, monkeypatch):
    explicit, shared = put(tmp_path / "explicit"), put(tmp_path / "shared" / "tiny")
    monkeypatch.setenv("XPNET_DATA_DIR", str(tmp_path / "shared"))
    assert locate(tiny(), explicit)[0].parent == explicit
    assert locate(tiny())[0].parent == shared


def test_the_environment_comes_before_the_cache_and_may_lack_the_dataset(tmp_path, monkeypatch, cache):
    put(cache)
    monkeypatch.setenv("XPNET_DATA_DIR", str(tmp_path / "shared"))
    assert locate(tiny())[0].parent == cache
    put(tmp_path / "shared" / "tiny", decompressed=True)
    assert locate(tiny())[0] == tmp_path / "shared" / "tiny" / "first"


def test_a_dataset_is_downloaded_once(mirror, cache, capsys):
    for _ in range(2):
        paths = locate(tiny(mirror.url("good")))
    assert mirror.requests == ["/good/first.gz", "/good/second.gz"]
    assert [path.read_bytes() for path in paths] == list(CONTENT.values())
    assert sorted(cache.iterdir()) == sorted(paths)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rename", [
    lambda name: name.replace("-idx", ".idx"),
    lambda name: name.replace("-idx", ".idx").removesuffix(".gz"),
    lambda name: name.upper(),
    lambda name: name.title().removesuffix(".Gz"),
])  # fmt: skip
def test_the_names_that_mirrors_give_to_the_files_of_mnist_are_found(tmp_path, rename):
    source = images.MNIST
    for name in source.sha256:
        (tmp_path / rename(name)).write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    assert locate(source, tmp_path) == [tmp_path / rename(name) for name in source.sha256]
    published = tmp_path / next(iter(source.sha256))
    published.write_bytes(b"")
    assert locate(source, tmp_path)[0] == published


@pytest.mark.parametrize("fault", ["missing", "altered", "short", "cut"])
def test_the_next_mirror_is_tried(mirror, cache, fault):
    paths = locate(tiny(mirror.url(fault), mirror.url("good")))
    assert [path.read_bytes() for path in paths] == list(CONTENT.values())
    assert mirror.requests[:2] == [f"/{fault}/first.gz", "/good/first.gz"]
    assert sorted(cache.iterdir()) == sorted(paths)


def test_if_all_mirrors_fail_each_is_listed_with_its_error(mirror, cache):
    faults = {
        "missing": "404 Client Error",
        "altered": "truncated or altered",
        "short": "truncated or altered",
        "cut": "IncompleteRead",
    }
    with socket.create_server(("127.0.0.1", 0)) as closed:
        down = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    with pytest.raises(DownloadError) as caught:
        locate(tiny(*map(mirror.url, faults), down))
    lines = str(caught.value).splitlines()
    assert lines[0] == "first.gz of tiny could not be downloaded. Tried:"
    for line, (fault, reason) in zip(lines[1:], faults.items(), strict=False):
        assert line.startswith(f"  {mirror.url(fault)}first.gz: ") and reason in line
    assert lines[5].startswith(f"  {down}first.gz: ")
    assert "data_dir" in lines[6] and "XPNET_DATA_DIR" in lines[6]
    assert not list(cache.iterdir())


@pytest.mark.parametrize("content", [b"", CONTENT["first.gz"][:-9], CONTENT["first.gz"] + b"\0"])
def test_an_altered_file_in_the_cache_is_downloaded_again(mirror, cache, caplog, content):
    put(cache)
    (cache / "first.gz").write_bytes(content)
    paths = locate(tiny(mirror.url("good")))
    assert mirror.requests == ["/good/first.gz"]
    assert paths[0].read_bytes() == CONTENT["first.gz"]
    assert "SHA-256 differs" in caplog.text


def test_an_altered_file_in_the_cache_is_not_used_if_the_mirrors_fail(mirror, cache):
    put(cache)
    (cache / "first.gz").write_bytes(b"altered")
    with pytest.raises(DownloadError, match="404"):
        locate(tiny(mirror.url("missing")))
    assert (cache / "first.gz").read_bytes() == b"altered"


def test_a_cache_that_cannot_be_written_is_an_error(mirror, cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match="Not a directory|File exists"):
        locate(tiny(mirror.url("good")))


def test_an_interrupted_download_leaves_no_file(mirror, cache, monkeypatch):
    import pooch

    def interrupted(self, url, output_file, pooch):
        Path(output_file).write_bytes(CONTENT["first.gz"][:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        locate(tiny(mirror.url("good")))
    assert not list(cache.iterdir())


def test_without_pooch_the_error_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DownloadError, match=r"pip install pooch tqdm.*data_dir.*XPNET_DATA_DIR"):
        locate(tiny())


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_is_shown_only_on_a_terminal(mirror, monkeypatch, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    locate(tiny(mirror.url("good")))
    assert ("100%" in stream.getvalue()) == terminal


def test_importing_the_datasets_imports_no_downloader():
    code = "import sys, xpnet.datasets; print([name for name in ('pooch', 'requests', 'tqdm') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("source", [images.MNIST, images.FASHION_MNIST])
def test_published_sources_have_four_files_and_two_mirrors(source):
    assert list(source.sha256) == [f"{name}.gz" for name in NAMES]
    assert len(set(source.mirrors)) >= 2
    assert all(mirror.startswith("http") and mirror.endswith("/") for mirror in source.mirrors)
    assert all(len(bytes.fromhex(sha256)) == 32 for sha256 in source.sha256.values())


# Images


@pytest.fixture(scope="module")
def blank():
    """Arrays with the shapes of MNIST: blank images, and the labels 0 to 9 in turn."""
    return [
        numpy.zeros((60_000, 28, 28), numpy.uint8),
        numpy.arange(60_000, dtype=numpy.uint8) % 10,
        numpy.zeros((10_000, 28, 28), numpy.uint8),
        numpy.arange(10_000, dtype=numpy.uint8) % 10,
    ]


def write_set(folder, arrays):
    folder.mkdir()
    for name, array in zip(NAMES, arrays, strict=True):
        write_idx(folder / name, array)
    return folder


@pytest.mark.parametrize("load", [mnist, fashion_mnist])
def test_image_datasets_unpack_into_train_and_test(tmp_path, blank, load):
    write_set(tmp_path / load.__name__, blank)
    split = load(tmp_path)
    assert isinstance(split, Split) and split.train.x.shape == (60_000, 28, 28)
    (x_train, y_train), (x_test, y_test) = split
    for array, original in zip((x_train, y_train, x_test, y_test), blank, strict=True):
        numpy.testing.assert_array_equal(array, original)
    assert x_train.dtype == x_test.dtype == numpy.uint8
    assert y_train.dtype == y_test.dtype == numpy.int64


@pytest.mark.parametrize(
    ("index", "array", "reason"),
    [
        (0, numpy.zeros((59_999, 28, 28), numpy.uint8), r"uint8 of shape \(59999, 28, 28\); expected uint8 of shape"),
        (1, numpy.zeros(10_000, numpy.uint8), r"shape \(10000,\)"),
        (2, numpy.zeros((10_000, 784), numpy.uint8), r"shape \(10000, 784\)"),
        (3, numpy.zeros(10_000, numpy.int32), "int32"),
        (3, numpy.full(10_000, 10, numpy.uint8), "label 10; expected labels from 0 to 9"),
    ],
)
def test_wrong_shapes_dtypes_and_labels_are_refused(tmp_path, blank, index, array, reason):
    folder = write_set(tmp_path / "mnist", [*blank[:index], array, *blank[index + 1 :]])
    with pytest.raises(FileError, match=reason) as caught:
        mnist(folder)
    assert str(folder / NAMES[index]) in str(caught.value)


def test_image_datasets_are_downloaded(tmp_path, blank, mirror, monkeypatch):
    folder = write_set(tmp_path / "blank", blank)
    content = {f"{name}.gz": gzip.compress((folder / name).read_bytes(), 1) for name in NAMES}
    sha256 = {name: hashlib.sha256(compressed).hexdigest() for name, compressed in content.items()}
    monkeypatch.setattr(f"{__name__}.CONTENT", content)
    mirrors = (mirror.url("missing"), mirror.url("good"))
    monkeypatch.setattr(images, "MNIST", dataclasses.replace(images.MNIST, mirrors=mirrors, sha256=sha256))
    assert mnist().test.y[:11].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


@pytest.mark.mnist
@pytest.mark.skipif(not REAL_DATA, reason="XPNET_DATA_DIR is not set to a folder with MNIST in it")
def test_the_real_mnist_has_the_published_contents():
    (x_train, y_train), (x_test, y_test) = mnist(REAL_DATA)
    assert numpy.bincount(y_train).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert numpy.bincount(y_test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert y_train[:5].tolist() == [5, 0, 4, 1, 9] and y_test[:5].tolist() == [7, 2, 1, 0, 4]
    for x, size in ((x_train, 60_000), (x_test, 10_000)):
        assert x.shape == (size, 28, 28) and x.dtype == numpy.uint8 and (x.min(), x.max()) == (0, 255)
    assert round(x_train.mean() / 255, 4) == 0.1307 and round(x_train.std() / 255, 4) == 0.3081


def test_digits_have_the_published_contents():
    x, y = digits()
    assert x.shape == (1797, 8, 8) and x.dtype == numpy.uint8 and (x.min(), x.max()) == (0, 16)
    assert y.shape == (1797,) and y.dtype == numpy.int64
    assert y[:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert numpy.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert x[0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0] and x.sum() == 561718
    x[:] = 0
    assert digits().x.any()


# Toy problems


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("and", lambda a, b: a and b),
        ("nand", lambda a, b: not (a and b)),
        ("or", lambda a, b: a or b),
        ("nor", lambda a, b: not (a or b)),
        ("xor", lambda a, b: a != b),
        ("xnor", lambda a, b: a == b),
    ],
)
def test_logic_gates_follow_their_rule(name, rule):
    x, y = logic_gate(name)
    assert x.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert y.tolist() == [[float(rule(a, b))] for a, b in x]
    assert x.dtype == y.dtype == numpy.float64


def test_a_misspelled_gate_gets_suggestions():
    with pytest.raises(ArgumentError, match=r"unknown logic gate 'XORR'. Did you mean .*'xor'"):
        logic_gate("XORR")


@pytest.mark.parametrize(
    ("load", "x", "y"),
    [
        (perceptron_and, [[1, 1, 1], [0, 0, 0], [1, 0, 1]], [1, 0, 0]),
        (exam_scores, [[3, 5], [5, 1], [10, 2]], [0.75, 0.82, 0.93]),
        (weight_height, [[-2, -1], [25, 6], [17, 4], [-15, -6]], [1, 0, 0, 1]),
        (xor_with_constant, [[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]], [0, 1, 1, 0]),
    ],
)  # fmt: skip
def test_datasets_of_the_tutorials_have_the_published_values(load, x, y):
    samples = load()
    assert samples.x.tolist() == x and samples.y.tolist() == [[value] for value in y]
    assert samples.x.dtype == samples.y.dtype == numpy.float64


@pytest.mark.parametrize("draw", [blobs, moons, spirals])
def test_point_clouds_depend_on_their_seed(draw):
    x, y = draw(n=100, seed=3)
    assert x.shape == (100, 2) and x.dtype == numpy.float64 and y.shape == (100,) and y.dtype == numpy.int64
    counts = numpy.bincount(y)
    assert counts.max() - counts.min() <= 1
    numpy.testing.assert_array_equal(x, draw(n=100, seed=3).x)
    assert not numpy.array_equal(x, draw(n=100, seed=4).x)


def test_point_clouds_without_noise_are_on_their_curves():
    x, y = blobs(n=8, classes=4, noise=0)
    numpy.testing.assert_allclose(x[:4], [[3, 0], [0, 3], [-3, 0], [0, -3]], atol=1e-12)
    numpy.testing.assert_array_equal(x[:4], x[4:])
    assert y.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]

    x, y = moons(noise=0)
    center = numpy.where(y[:, None] == 0, [0, 0], [1, 0.5])
    numpy.testing.assert_allclose(numpy.hypot(*(x - center).T), 1)
    assert (x[y == 0, 1] >= 0).all() and (x[y == 1, 1] <= 0.5).all()

    x, y = spirals(classes=5, noise=0)
    radius = numpy.hypot(*x.T)
    turned = numpy.arctan2(x[:, 1], x[:, 0]) - 4 * radius - 2 * numpy.pi * y / 5
    numpy.testing.assert_allclose(numpy.cos(turned), 1)
    assert radius.max() <= 1


@pytest.mark.parametrize("draw", [blobs, moons, spirals])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n must be an integer from [23] to 100000000, not 0"),
        ({"n": 1}, "n must be an integer from [23] to 100000000, not 1"),
        ({"noise": -1}, "noise must be a finite number of at least 0, not -1"),
        ({"noise": float("nan")}, "noise must be a finite number of at least 0, not nan"),
        ({"seed": -1}, "seed must be an integer from 0 to 18446744073709551615, not -1"),
    ],
    ids=str,
)
def test_point_clouds_refuse_invalid_arguments(draw, wrong, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        draw(**wrong)


def test_point_clouds_need_at_least_one_class():
    with pytest.raises(ArgumentError, match="^classes must be an integer of at least 1, not 0"):
        blobs(classes=0)
    assert spirals(n=3, classes=1).y.tolist() == [0, 0, 0]
