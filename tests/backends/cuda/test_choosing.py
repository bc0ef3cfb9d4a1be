"""Choices between several ways to compute a result: what is timed, remembered, and read by later processes."""

import json

import pytest

from xpnet.backends.cuda import choosing
from xpnet.backends.cuda.choosing import Choices


@pytest.fixture
def path(tmp_path):
    return tmp_path / "caches" / "products.json"


def test_a_later_process_makes_the_same_choice(path):
    first = Choices("a card", path)
    assert first.get("2x3x4") is None
    first.set("2x3x4", "cublas")
    first.set("5x3x4", "16x16 / 1")
    assert {q: Choices("a card", path).get(q) for q in ("2x3x4", "5x3x4", "1x1x1")} == {
        "2x3x4": "cublas", "5x3x4": "16x16 / 1", "1x1x1": None,
    }  # fmt: skip
    assert [file.name for file in path.parent.iterdir()] == ["products.json"]


def test_other_devices_and_versions_choose_for_themselves(path):
    Choices("a card", path).set("2x3x4", "cublas")
    other = Choices("another card", path)
    assert other.get("2x3x4") is None
    other.set("2x3x4", "cublasLt 1")
    assert Choices("a card", path).get("2x3x4") == "cublas"


def test_what_another_process_chose_meanwhile_is_kept(path):
    first, second = Choices("a card", path), Choices("a card", path)
    first.set("2x3x4", "cublas")
    second.set("5x3x4", "16x16 / 1")
    assert json.loads(path.read_text()) == {"a card": {"2x3x4": "cublas", "5x3x4": "16x16 / 1"}}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[1]", b"3", b'{"a card": 3}', b'{"a card": {"2x3x4": 3}, "b": []}'], ids=repr
)
def test_a_broken_file_is_replaced(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    choices = Choices("a card", path)
    assert choices.get("2x3x4") is None
    choices.set("2x3x4", "cublas")
    assert json.loads(path.read_text())["a card"] == {"2x3x4": "cublas"}


def test_a_file_that_cannot_be_written_is_reported(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "file").write_text("")
    choices = Choices("a card", tmp_path / "file" / "products.json")
    choices.set("2x3x4", "cublas")
    assert choices.get("2x3x4") == "cublas" and "other processes choose anew" in caplog.text


def test_a_failed_replacement_leaves_no_temporary_file(path, monkeypatch):
    def fail(*paths):
        raise OSError("no space left")

    monkeypatch.setattr(choosing.os, "replace", fail)
    Choices("a card", path).set("2x3x4", "cublas")
    assert list(path.parent.iterdir()) == []


def test_without_a_file_choices_last_as_long_as_the_process():
    choices = Choices("a card", None)
    choices.set("2x3x4", "cublas")
    assert choices.get("2x3x4") == "cublas"


@pytest.mark.parametrize(
    ("platform", "variables", "folder"),
    [
        ("linux", {"HOME": "/home/me"}, "/home/me/.cache/xpnet"),
        ("linux", {"HOME": "/home/me", "XDG_CACHE_HOME": "/caches"}, "/caches/xpnet"),
        ("linux", {"HOME": "/home/me", "XPNET_CACHE_DIR": "~/own"}, "/home/me/own"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/xpnet"),
        ("win32", {}, None),
    ],
)
def test_the_file_is_in_the_cache_of_the_user(monkeypatch, platform, variables, folder):
    for name in ("HOME", "XDG_CACHE_HOME", "XPNET_CACHE_DIR", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(choosing.sys, "platform", platform)
    file = choosing.cache_file("products.json")
    assert file is None if folder is None else file.as_posix() == f"{folder}/products.json"


# Timing --------------------------------------------------------------------------------------------------------------


def test_the_fastest_way_that_works_is_chosen(gpu):
    with gpu.device(), gpu.stream():
        x, y = gpu.asarray([1.0, 2.0]), gpu.asarray([0.0, 0.0])

        def slow():
            for _ in range(50):
                gpu.relu(x, y)

        def fails():
            raise RuntimeError("not supported")

        def fails_in_a_capture():
            gpu.to_numpy(x)

        ways = {"fails": fails, "reads": fails_in_a_capture, "slow": slow, "fast": lambda: gpu.relu(x, y)}
        assert choosing.fastest(gpu.xp, ways) == "fast"
        assert choosing.fastest(gpu.xp, {"fails": fails, "reads": fails_in_a_capture}) is None
        gpu.relu(x, y)  # the stream captures no more
        assert gpu.to_numpy(y).tolist() == [1.0, 2.0]
