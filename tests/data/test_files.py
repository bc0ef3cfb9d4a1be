"""Files: paths from users, whole reads, and atomic writes through links, into hard links and without permissions."""

import contextlib
import errno
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from small_models import LABELS, QUIET, SAMPLES, small_net

import xpnet
from xpnet import callbacks, datasets
from xpnet.data import files
from xpnet.errors import ArgumentError, ArgumentTypeError, DeviceMemoryError, FileError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links and permissions of POSIX")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


WRITERS = {
    "save": lambda path: small_net().save(path),
    "write_idx": lambda path: datasets.write_idx(path, np.arange(6, dtype="uint8")),
    "export_onnx": lambda path: xpnet.export_onnx(small_net(), path),
    "Checkpoint": lambda path: small_net().fit(SAMPLES, LABELS, callbacks=[callbacks.Checkpoint(path)], **QUIET),
    "CSVLogger": lambda path: small_net().fit(SAMPLES, LABELS, callbacks=[callbacks.CSVLogger(path)], **QUIET),
}


@pytest.fixture(params=WRITERS)
def write(request):
    """Each function that writes a file."""
    if request.param == "export_onnx":
        pytest.importorskip("onnx", reason="onnx is not installed")
    return WRITERS[request.param]


# Links and permissions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["absolute", "relative", "chain", "dangling", "another folder's"])
def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path, write, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    target, link = folder / "target", tmp_path / "link"
    if kind != "dangling":
        target.write_bytes(b"old")
    if kind == "relative":
        link.symlink_to("data/target")
    elif kind == "chain":
        (tmp_path / "between").symlink_to("data/target")
        link.symlink_to(tmp_path / "between")
    elif kind == "another folder's":
        (tmp_path / "other").symlink_to(folder)
        link = tmp_path / "other" / "target"
    else:
        link.symlink_to(target)
    before = names(tmp_path)
    write(link)
    assert link.read_bytes() == target.read_bytes() != b"old" and not target.is_symlink()
    assert names(tmp_path) == before and names(folder) == ["target"]
    assert kind == "another folder's" or link.is_symlink()


def test_the_target_may_be_on_another_file_system(tmp_path, write):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=other) as folder:
        target = Path(folder, "target")
        target.write_bytes(b"old")
        (tmp_path / "link").symlink_to(target)
        write(tmp_path / "link")
        assert target.read_bytes() != b"old" and names(Path(folder)) == ["target"]


def test_a_hard_link_is_kept(tmp_path, write):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"old" * 10**5)
    os.link(one, two)
    write(one)
    assert one.samefile(two) and b"old" not in two.read_bytes() and names(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o664, 0o666, 0o755])
def test_the_mode_of_an_existing_file_stays(tmp_path, write, bits):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(bits)
    write(path)
    assert mode(path) == bits and path.read_bytes() != b"old"


@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="needs an administrator")
def test_the_owner_of_an_existing_file_stays(tmp_path, write):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.chown(path, 1234, 2345)
    write(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_of_a_new_file_follows_the_umask(tmp_path, write, mask):
    before = os.umask(mask)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == 0o666 & ~mask


@pytest.mark.parametrize("name", ["m" * 243, "m" * 255, "ä" * 127, "\udcff" * 255])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path, name):
    files.write_atomically(tmp_path / name, b"new")
    files.write_atomically(tmp_path / name, b"newer")
    assert (tmp_path / name).read_bytes() == b"newer" and len(names(tmp_path)) == 1


# Refusals ------------------------------------------------------------------------------------------------------------


def test_only_regular_files_are_replaced_and_read(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name, reason in (("folder", "a folder"), ("pipe", "a named pipe"), ("link", "a named pipe"),
                         ("/dev/null", "a device")):  # fmt: skip
        for action in (small_net().save, xpnet.load, datasets.read_idx):
            with pytest.raises(FileError, match=f"it is {reason}, not a regular file") as caught:
                action(tmp_path / name)
            assert str(caught.value).startswith(str(tmp_path / name))
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert names(tmp_path) == ["folder", "link", "pipe"]


@pytest.mark.parametrize("action", [
    xpnet.load, datasets.read_idx, datasets.mnist,
    lambda path: small_net().fit(SAMPLES, LABELS, resume_from=path, **QUIET),
    lambda path: small_net().save(path), lambda path: datasets.write_idx(path, np.zeros(2)), callbacks.CSVLogger,
])  # fmt: skip
@pytest.mark.parametrize("path", [3, 1.5, True, b"m", ["m"], object, "", "a\0b", "\ud800"], ids=repr)
def test_invalid_paths_are_refused(action, path):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=r"path|data_dir|resume_from"):
        action(path)


def test_none_is_refused_as_a_path():
    for action in (xpnet.load, datasets.read_idx, small_net().save, callbacks.CSVLogger, callbacks.Checkpoint):
        with pytest.raises((ArgumentError, ArgumentTypeError), match="not None"):
            action(None)


@pytest.mark.parametrize("suffix", [".h5", ".keras", ".pt", ".PTH", ".pkl", ".onnx", ".hdf5"])
def test_suffixes_of_other_formats_are_refused_with_a_hint(tmp_path, suffix):
    for action in (small_net().save, callbacks.Checkpoint):
        with pytest.raises(ArgumentError, match=rf"'{suffix}' of another format.*'a.safetensors'"):
            action(tmp_path / f"a{suffix}")
    with pytest.raises(ArgumentError, match="xpnet.export_onnx"):
        small_net().save("a.onnx")
    assert names(tmp_path) == []


def test_files_of_other_formats_get_a_hint(tmp_path):
    export = "export the model from that library to ONNX"
    for name, hint in (("a.onnx", "xpnet.import_onnx"), ("a.h5", f"h5 file, {export}"), ("a.pt", f"pt file, {export}")):
        (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n" * 9)
        with pytest.raises(FileError, match=f"not a model file: .*{hint}"):
            xpnet.load(tmp_path / name)
    small_net().save(tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / "m.h5")  # as earlier versions wrote it
    assert xpnet.load(tmp_path / "m.h5", "cpu").is_built


def test_each_reason_for_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"")
    reasons = {
        "missing": "there is no such file",
        "broken": "a symbolic link to .*nothing, which does not exist",
        "loop": "Too many levels of symbolic links",
        "x" * 256: "File name too long",
        "file/inside": "Not a directory",
    }
    for name, reason in reasons.items():
        for action in (xpnet.load, datasets.read_idx):
            with pytest.raises(FileError, match=reason):
                action(tmp_path / name)


def test_a_missing_folder_is_named_before_training(tmp_path):
    for callback in (callbacks.CSVLogger(tmp_path / "none" / "log"), callbacks.Checkpoint(tmp_path / "none" / "run")):
        model = small_net()
        with pytest.raises(FileError, match=r"none/\w+: cannot be written: No such file or directory; make the folder"):
            model.fit(SAMPLES, LABELS, callbacks=[callback], **QUIET)
        assert model._state.step == 0


# Failures while writing --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_nobody():
    """Without the rights of an administrator."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


@pytest.fixture
def shared():
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
        os.chmod(folder, 0o755)


def test_a_writable_file_in_a_read_only_folder_is_overwritten(shared):
    path = shared / "file"
    path.write_bytes(b"old" * 1000)
    path.chmod(0o666)
    shared.chmod(0o555)
    with as_nobody():
        files.refuse_unwritable(path)
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and names(shared) == ["file"] and mode(path) == 0o666


def test_without_permission_files_are_refused_with_the_reason(shared):
    path = shared / "file"
    path.write_bytes(b"old")
    path.chmod(0o400 if os.geteuid() == 0 else 0)
    shared.chmod(0o555)
    with as_nobody():
        for target in (path, shared / "new"):
            for action in (files.refuse_unwritable, lambda path: files.write_atomically(path, b"new")):
                with pytest.raises(FileError, match="cannot be written: Permission denied"):
                    action(target)
        for action in (xpnet.load, datasets.read_idx):
            with pytest.raises(FileError, match="cannot be read: Permission denied"):
                action(path)
    path.chmod(0o600)
    assert path.read_bytes() == b"old" and names(shared) == ["file"]


@pytest.mark.parametrize("error", [errno.EBUSY, errno.EXDEV, errno.EPERM])
def test_a_file_that_cannot_be_replaced_is_overwritten(tmp_path, monkeypatch, error):
    """A file that is a mount point of its own, or another user's in a folder such as /tmp."""

    def refuse(*args):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "replace", refuse)
    (tmp_path / "file").write_bytes(b"old content")
    files.write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and names(tmp_path) == ["file"]
    with pytest.raises(FileError, match="cannot be written"):
        files.write_atomically(tmp_path / "absent", b"new")


def hard_linked(folder):
    (folder / "one").write_bytes(b"old")
    os.link(folder / "one", folder / "two")
    return folder / "one"


def test_a_full_disk_leaves_a_hard_linked_file_whole(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = hard_linked(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FileError, match="cannot be written: No space left"):
        files.write_atomically(path, b"new" * 1000)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_while_overwriting_keeps_the_whole_new_content(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    path = hard_linked(tmp_path)
    monkeypatch.setattr(files, "_overwrite", fail)
    with pytest.raises(FileError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        files.write_atomically(path, b"new")
    (kept,) = (name for name in names(tmp_path) if name.endswith(".kept"))
    assert (tmp_path / kept).read_bytes() == b"new"
    assert isinstance(error, KeyboardInterrupt) or f"Its whole new content is in {tmp_path / kept}" in str(caught.value)


def test_an_interrupt_while_writing_leaves_the_old_file_alone(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_planted_temporary_file_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda n: "known")
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "file.xpnet-known.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileError, match="File exists"):
        files.write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "victim").read_bytes() == b"mine" and not (tmp_path / "file").exists()


# Reading -----------------------------------------------------------------------------------------------------------


def test_a_file_overwritten_while_it_is_loaded_never_ends_the_process(tmp_path):
    """A mapped file that gets shorter ends a process with SIGBUS."""
    program = """
import sys, threading
import xpnet
from xpnet.errors import FileError
path, done = sys.argv[1], threading.Event()
whole = open(path, "rb").read()
def disturb():
    while not done.is_set():
        with open(path, "r+b") as file:
            file.truncate(len(whole) // 3)
            file.write(whole)
thread = threading.Thread(target=disturb)
thread.start()
try:
    for _ in range(150):
        try:
            xpnet.load(path, "cpu")
        except FileError:
            pass
finally:
    done.set()
    thread.join()
print("alive")
"""
    path = tmp_path / "m"
    xpnet.Sequential([xpnet.layers.Dense(300)], (300,), "cpu").save(path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, str(path)], env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_a_memory_shortage_is_not_reported_as_a_damaged_file(tmp_path, monkeypatch):
    path, model = tmp_path / "m", small_net()
    model.fit(SAMPLES, LABELS, callbacks=[callbacks.Checkpoint(path)], **QUIET)
    datasets.write_idx(tmp_path / "a", np.zeros(3))

    def short(*args):
        raise MemoryError

    monkeypatch.setattr("safetensors.numpy.load", short)
    monkeypatch.setattr("xpnet.datasets.idx._array", short)
    for action in (
        lambda: xpnet.load(path, "cpu"),
        lambda: small_net().fit(SAMPLES, LABELS, resume_from=path, **QUIET),
        lambda: datasets.read_idx(tmp_path / "a"),
    ):
        with pytest.raises(DeviceMemoryError, match="not enough free memory to load it"):
            action()


def test_two_threads_may_write_one_file(tmp_path):
    contents = [bytes([i]) * 10000 for i in range(8)]
    threads = [threading.Thread(target=files.write_atomically, args=(tmp_path / "file", c)) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() in contents and names(tmp_path) == ["file"]


def test_ctrl_c_right_after_a_temporary_file_was_made_leaves_none(tmp_path, monkeypatch):
    really_open = os.open

    def interrupted(path, flags, mode=0o777, **options):
        file = really_open(path, flags, mode, **options)
        if str(path).endswith(".tmp"):
            os.close(file)
            raise KeyboardInterrupt
        return file

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []
