"""Faults of disks, folders, files and servers: an error with path and reason, the old file whole, no file left over.

Disks are full at every write, system calls fail at every call, paths are links, pipes and devices, files change while
they are read, processes are killed while they save, and servers of datasets misbehave.
"""

import contextlib
import errno
import functools
import gzip
import hashlib
import http.server
import itertools
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import xpnet
from reliability.processes import attack, read_task, tell
from reliability.results import Result, scaled
from xpnet import callbacks, datasets, layers
from xpnet.datasets import download
from xpnet.errors import DownloadError, FileError, XpnetError

_PART = "storage_faults"
_KILLS = 300  # at scale 1; of the other cases there are as many as are found
_NOBODY = 65534


def run(scale: float, seed: int, folder: Path) -> list[Result]:
    results = []
    for suite in SUITES:
        result = Result(SUITES[suite][0])
        count = scaled(_KILLS, scale, 3) if suite == "kills" else _count(suite, folder)
        step = 1 if suite == "kills" else max(1, round(1 / scale))
        task = {"suite": suite, "seed": seed, "step": step}
        attack(_PART, task, -(-count // step), folder, result, 60.0, OPENBLAS_NUM_THREADS="1")
        results.append(result)
    return results


def _count(suite: str, folder: Path) -> int:
    return sum(1 for _ in SUITES[suite][1](Subject(folder)))


# Writers -----------------------------------------------------------------------------------------------------------


class Writer(NamedTuple):
    """A function that writes a file.

    write: writes one of two contents.  whole: whether the file is replaced as a whole.  suffix: of the file.
    """

    write: Callable[["Subject", Path, int], Any]
    whole: bool = True
    suffix: str = ""


class Case(NamedTuple):
    name: str
    run: Callable[[Path], str | None]


class Subject:
    """Two models of different weights, and data for them. The writers write the first or the second."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.folder = folder
        self.x, self.y = rng.normal(size=(16, 40)).astype("float32"), rng.integers(0, 5, 16)
        self.models = [
            xpnet.Sequential([layers.Dense(60), layers.Tanh(), layers.Dense(5)], (40,), "cpu", seed) for seed in (0, 1)
        ]
        self.outputs = [model.predict(self.x) for model in self.models]

    def usable(self) -> bool:
        """Whether the models still work, and were not changed."""
        return all(
            np.array_equal(model.predict(self.x), want) for model, want in zip(self.models, self.outputs, strict=True)
        )

    def fit(self, which: int, callback: Any) -> None:
        model = xpnet.Sequential([layers.Dense(60), layers.Dense(5)], (40,), "cpu", seed=which)
        model.fit(self.x, self.y, epochs=2, verbose=0, callbacks=[callback])


@functools.cache
def _server() -> "Mirror":
    os.environ["NO_PROXY"] = "127.0.0.1"
    server = Mirror()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


def _downloaded(subject: Subject, path: Path, which: int, *kinds: str) -> None:
    """Download a file into the cache. path: its place there; which: its content."""
    import pooch

    content = CONTENTS[which]
    source = download.Source(
        path.parent.name, tuple(_server().url(f"{kind}-{which}") for kind in kinds or ("good",)),
        {path.name: hashlib.sha256(content).hexdigest()}, {path.name: len(content)},
    )  # fmt: skip
    before = pooch.os_cache
    pooch.os_cache = lambda project: path.parent.parent
    try:
        download.locate(source)
    finally:
        pooch.os_cache = before


WRITERS = {
    "save": Writer(lambda s, path, i: s.models[i].save(path)),
    "Checkpoint": Writer(lambda s, path, i: s.fit(i, callbacks.Checkpoint(path, every=9))),
    "export_onnx": Writer(lambda s, path, i: xpnet.export_onnx(s.models[i], path), suffix=".onnx"),
    "write_idx": Writer(lambda s, path, i: datasets.write_idx(path, np.full((70, 100), i, "int32"))),
    "CSVLogger": Writer(lambda s, path, i: s.fit(i, callbacks.CSVLogger(path)), whole=False),
    "download": Writer(_downloaded),
}

CONTENTS = [np.random.default_rng(i).bytes(30_000) for i in range(2)]


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


SITUATIONS = ("new", "existing", "symbolic link", "hard link")


def _situated(writer: Writer, subject: Subject, folder: Path, situation: str) -> tuple[Path, bytes | None]:
    """(a path to write, the old content of its file) in this situation."""
    folder = folder / "folder"
    folder.mkdir()
    path, target = folder / f"file{writer.suffix}", folder / f"target{writer.suffix}"
    if situation == "new":
        return path, None
    if situation == "existing":
        target = path
    writer.write(subject, target, 0)
    if situation == "symbolic link":
        path.symlink_to(target)
    elif situation == "hard link":
        os.link(target, path)
    return path, path.read_bytes()


def _checked(
    subject: Subject, writer: Writer, path: Path, old: bytes | None, act: Callable[[], Any], may_leave: bool = False
) -> str | None:
    """What is wrong after `act`, which writes the second content under a fault; None if nothing is."""
    root = path.parent
    before, failure = _names(root), None
    try:
        act()
    except XpnetError as error:
        failure = error
    except BaseException as error:
        return f"{type(error).__name__} instead of FileError: {error}"
    kept = None
    if failure is not None:
        text = str(failure)
        if not isinstance(failure, FileError):
            return f"{type(failure).__name__} instead of FileError: {text}"
        if path.name not in text or len(text) < len(str(path)) + 10:
            return f"the error names no path or no reason: {text}"
        if "Its whole new content is in" in text:
            kept = Path(text.partition("content is in ")[2].partition("\n")[0].rstrip("."))
    if writer.whole:
        now = path.read_bytes() if path.exists() else None
        new = _content(writer, subject, path)
        if failure is None and not _same(writer, now, new):
            return "no error, but not the new content"
        if kept is not None:
            if not _same(writer, kept.read_bytes(), new):
                return "the kept file does not have the new content"
            kept.unlink()
        elif now != old and not _same(writer, now, new):
            return f"the old content is lost: {None if now is None else len(now)} bytes"
    allowed = {*before, path.name}
    if (rubbish := [name for name in _names(root) if name not in allowed]) and not may_leave:
        return f"left behind: {rubbish}"
    if not subject.usable():
        return "the model has changed"
    try:
        writer.write(subject, path, 1)
    except BaseException as error:
        return f"the next write fails: {type(error).__name__}: {error}"
    if rubbish := [name for name in _names(root) if name not in allowed]:
        return f"left behind after the next write: {rubbish}"
    return None


def _content(writer: Writer, subject: Subject, path: Path) -> bytes:
    known = subject.__dict__.setdefault("contents", {})
    if id(writer) not in known:
        with tempfile.TemporaryDirectory() as folder:
            other = Path(folder, "folder", f"file{writer.suffix}")
            other.parent.mkdir()
            writer.write(subject, other, 1)
            known[id(writer)] = other.read_bytes()
    return bytes(known[id(writer)])


def _same(writer: Writer, now: bytes | None, new: bytes) -> bool:
    if writer not in (WRITERS["save"], WRITERS["Checkpoint"]) or now == new:
        return now == new
    with contextlib.suppress(Exception):  # the order of the texts and the times in them may differ
        import safetensors.numpy

        one, other = safetensors.numpy.load(now or b""), safetensors.numpy.load(new)
        return len(now or b"") >= len(new) - 99 and all(np.array_equal(one[name], other[name]) for name in other)
    return False


# A full disk and failing calls -------------------------------------------------------------------------------------

_CALLS = ("open", "fsync", "replace", "fchmod", "fchown", "ftruncate", "posix_fallocate", "unlink", "stat", "lstat",
          "fstat", "listdir", "mkdir", "readlink")  # fmt: skip
_ERRORS = (errno.ENOSPC, errno.EIO)


class Failing:
    """The n-th call of these functions of `os` on files of a folder fails."""

    def __init__(self, folder: Path, number: int, error: int) -> None:
        self.folder, self.left, self.error, self.failed = str(folder), number, error, ""

    def __enter__(self) -> "Failing":
        self.before = {name: getattr(os, name) for name in _CALLS}
        for name, function in self.before.items():
            setattr(os, name, functools.partial(self._call, name, function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.before.items():
            setattr(os, name, function)

    def _call(self, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        place = args[0] if args else ""
        if isinstance(place, int) or self.folder in os.fspath(place):
            self.left -= 1
            if self.left == 0:
                self.failed = name
                raise OSError(self.error, os.strerror(self.error), None if isinstance(place, int) else str(place))
        return function(*args, **kwargs)


def _failing_calls(subject: Subject) -> Iterator[Case]:
    for (name, writer), situation, number, error in itertools.product(
        WRITERS.items(), SITUATIONS, range(1, 26), _ERRORS
    ):

        def case(
            folder: Path, writer: Writer = writer, situation: str = situation, number: int = number, error: int = error
        ) -> str | None:  # fmt: skip
            path, old = _situated(writer, subject, folder, situation)
            failing = Failing(folder, number, error)

            def act() -> None:
                with failing:
                    writer.write(subject, path, 1)

            bad = _checked(subject, writer, path, old, act, may_leave=True)
            if bad is None or not (failing.failed == "unlink" and bad.startswith("left behind")):
                return bad and f"after a failure of os.{failing.failed}: {bad}"
            return None

        yield Case(f"{name}, {situation}: call {number} fails with {errno.errorcode[error]}", case)


def _size_limits(subject: Subject) -> Iterator[Case]:
    for (name, writer), situation, part in itertools.product(WRITERS.items(), SITUATIONS, range(24)):

        def case(
            folder: Path, writer: Writer = writer, situation: str = situation, part: int = part
        ) -> str | None:  # fmt: skip
            path, old = _situated(writer, subject, folder, situation)
            size = len(_content(writer, subject, path)) * part // 24

            def act() -> None:
                hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
                try:
                    writer.write(subject, path, 1)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

            return _checked(subject, writer, path, old, act)

        yield Case(f"{name}, {situation}: no file may grow beyond {part} / 24 of its size", case)


@contextlib.contextmanager
def _mounted(folder: Path, options: str) -> Iterator[Path]:
    place = folder / "mounted"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@functools.cache
def _may_mount() -> bool:
    refused = contextlib.suppress(OSError, subprocess.CalledProcessError)
    with tempfile.TemporaryDirectory() as folder, refused, _mounted(Path(folder), "size=64k"):
        return True
    return False


def _full_disks(subject: Subject) -> Iterator[Case]:
    if not _may_mount():
        return
    for (name, writer), situation, pages in itertools.product(WRITERS.items(), SITUATIONS, range(20)):

        def case(
            folder: Path, writer: Writer = writer, situation: str = situation, pages: int = pages
        ) -> str | None:  # fmt: skip
            with _mounted(folder, "size=512k") as disk:
                path, old = _situated(writer, subject, disk, situation)
                filler = disk / "filler"

                def act() -> None:
                    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                        while True:
                            file.write(bytes(4096))
                    os.truncate(filler, max(0, filler.stat().st_size - 4096 * pages))
                    try:
                        writer.write(subject, path, 1)
                    finally:
                        filler.unlink()

                return _checked(subject, writer, path, old, act)

        yield Case(f"{name}, {situation}: the disk has {pages} pages left", case)


# Paths -------------------------------------------------------------------------------------------------------------

READERS: dict[str, Callable[[Subject, Path], Any]] = {
    "load": lambda s, path: xpnet.load(path, "cpu"),
    "read_idx": lambda s, path: datasets.read_idx(path),
    "import_onnx": lambda s, path: xpnet.import_onnx(path, backend="cpu"),
    "resume": lambda s, path: xpnet.Sequential([layers.Dense(60), layers.Dense(5)], (40,), "cpu", seed=0).fit(
        s.x, s.y, epochs=3, verbose=0, resume_from=path
    ),
    "data_dir": lambda s, path: datasets.mnist(path),
}


@contextlib.contextmanager
def _as_nobody() -> Iterator[None]:
    if os.geteuid() == 0:
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


def _unreadable(folder: Path) -> dict[str, Path]:
    """Paths that cannot be read nor, except for the missing ones, written, by what they are."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "one").symlink_to(folder / "two")
    (folder / "two").symlink_to(folder / "one")
    (folder / "to pipe").symlink_to(folder / "pipe")
    (folder / "to device").symlink_to("/dev/full")
    (folder / "to folder").symlink_to(folder / "folder")
    (folder / "dangling into a missing folder").symlink_to(folder / "absent" / "file")
    (folder / "file").write_bytes(b"content")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as bound:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket must be short
        try:
            bound.bind("socket")
        finally:
            os.chdir(here)
    names = ["folder", "pipe", "loop", "one", "to pipe", "to device", "to folder", "dangling into a missing folder",
             "socket", "file/inside", "absent/file", "x" * 256, "y/" * 2000 + "z"]  # fmt: skip
    paths = {name[:40]: folder / name for name in names}
    return {**paths, **{device: Path(device) for device in ("/dev/null", "/dev/full", "/dev/zero")}}


def _paths(subject: Subject) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        kinds = list(_unreadable(Path(folder)))
    actions: dict[str, Callable[[Path], Any]] = {
        name: functools.partial(read, subject) for name, read in READERS.items()
    }
    actions |= {
        name: functools.partial(lambda writer, path: writer.write(subject, path, 1), writer)
        for name, writer in WRITERS.items()
        if name != "download"
    }
    for (name, action), kind in itertools.product(actions.items(), kinds):
        if name == "data_dir" and kind in ("folder", "to folder"):
            continue

        def case(folder: Path, action: Any = action, kind: str = kind, name: str = name) -> str | None:
            path = _unreadable(folder)[kind]
            before = _kinds_of(folder)
            try:
                action(path)
            except FileError as error:
                if path.name not in str(error):
                    return f"the error does not name the path: {error}"
            except BaseException as error:
                return f"{type(error).__name__} instead of FileError: {error}"
            else:
                return "it was accepted"
            if _kinds_of(folder) != before:
                return f"files have changed: {_kinds_of(folder)}"
            return None if subject.usable() else "the model has changed"

        yield Case(f"{name} of {kind}", case)
    for name, action in actions.items():
        for kind in ("no permission", "a read-only folder", "a folder that may not be entered", "a read-only disk"):
            if (kind == "a read-only disk" and not _may_mount()) or (name == "data_dir" and kind == "no permission"):
                continue

            def case(folder: Path, action: Any = action, kind: str = kind, name: str = name) -> str | None:
                reads = name in READERS
                if reads and kind in ("a read-only folder", "a read-only disk"):
                    return None
                with contextlib.ExitStack() as stack:
                    place = folder
                    if kind == "a read-only disk":
                        place = stack.enter_context(_mounted(folder, "size=512k"))
                    path = place / "file"
                    if kind != "a read-only folder":
                        path.write_bytes(b"content")
                    path_mode = {"no permission": 0}.get(kind, 0o600)
                    if path.exists():
                        path.chmod(path_mode)
                    if kind == "a read-only folder":
                        place.chmod(0o555)
                    if kind == "a folder that may not be entered":
                        place.chmod(0)
                    if kind == "a read-only disk":
                        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
                    outer = [folder, *folder.parents][:2]
                    try:
                        with _as_nobody() if kind != "a read-only disk" else contextlib.nullcontext():
                            action(path)
                    except FileError as error:
                        if "ermission" not in str(error) and "ead-only" not in str(error):
                            return f"the error does not name the reason: {error}"
                    except BaseException as error:
                        return f"{type(error).__name__} instead of FileError: {error}"
                    else:
                        return "it was accepted"
                    finally:
                        for one in outer[:1]:
                            one.chmod(0o755)
                    if path.exists() and path.read_bytes() != b"content":
                        return "the file has changed"
                    if names := [n for n in os.listdir(place) if n not in ("file", "mounted")]:
                        return f"left behind: {names}"
                return None

            yield Case(f"{name} with {kind}", case)


def _kinds_of(folder: Path) -> dict[str, int]:
    return {path.name: path.lstat().st_mode for path in folder.iterdir()}


# Files that change while they are read -----------------------------------------------------------------------------

_CHANGES = ("replaced", "overwritten", "truncated", "deleted")


def _changing_files(subject: Subject) -> Iterator[Case]:
    for name, change in itertools.product(("load", "read_idx", "import_onnx", "resume"), _CHANGES):

        def case(folder: Path, name: str = name, change: str = change) -> str | None:  # fmt: skip
            path = folder / ("file.onnx" if name == "import_onnx" else "file")
            writer = {"load": "save", "read_idx": "write_idx", "import_onnx": "export_onnx", "resume": "Checkpoint"}
            WRITERS[writer[name]].write(subject, path, 0)
            whole = path.read_bytes()
            code = _DISTURB.format(path=str(path), change=change)
            disturber = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
            assert disturber.stdin is not None
            disturber.stdin.write(whole)
            disturber.stdin.close()
            try:
                until = time.monotonic() + 1.0
                while time.monotonic() < until:
                    with contextlib.suppress(FileError):
                        READERS[name](subject, path)
            except BaseException as error:
                return f"{type(error).__name__}: {error}"
            finally:
                disturber.kill()
                disturber.wait()
            return None

        yield Case(f"{name} of a file that is {change} meanwhile", case)


_DISTURB = """
import os, sys
path, change = {path!r}, {change!r}
whole = sys.stdin.buffer.read()
while True:
    if change == "replaced":
        open(path + ".new", "wb").write(whole)
        os.replace(path + ".new", path)
    elif change == "overwritten":
        with open(path, "r+b") as file:
            file.write(bytes(len(whole)))
            file.seek(0)
            file.write(whole)
    elif change == "truncated":
        os.truncate(path, len(whole) // 3)
        with open(path, "r+b") as file:
            file.write(whole)
    else:
        os.unlink(path)
        open(path, "wb").write(whole)
"""


# Kills -------------------------------------------------------------------------------------------------------------


def _kill_saves(subject: Subject) -> Iterator[Case]:
    rng = np.random.default_rng()
    for number in itertools.count():
        situation = ("existing", "symbolic link", "hard link", "new")[number % 4]

        def case(folder: Path, situation: str = situation) -> str | None:
            writer = WRITERS[("save", "write_idx")[int(rng.integers(2))]]
            path, old = _situated(writer, subject, folder, situation)
            new = _content(writer, subject, path)
            child = os.fork()
            if not child:
                try:
                    while True:
                        writer.write(subject, path, 1)
                        writer.write(subject, path, 0)
                finally:
                    os._exit(1)
            time.sleep(float(rng.uniform(0, 0.03)))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if situation == "new" and not path.exists():
                return None
            now, first = path.read_bytes(), old
            temporaries = [p for p in path.parent.iterdir() if p.name.endswith((".tmp", ".kept"))]
            if first is None:
                writer.write(subject, folder / "first", 0)
                first = (folder / "first").read_bytes()
            known = [first, new]

            def whole(content: bytes) -> bool:
                return any(_same(writer, content, one) for one in known)

            saved = situation == "hard link" and any(whole(p.read_bytes()) for p in temporaries)
            if not whole(now) and not saved:
                return f"neither the old nor the new content: {len(now)} bytes, {len(temporaries)} temporary files"
            writer.write(subject, path, 1)
            if not _same(writer, path.read_bytes(), new):
                return "the next save has not written"
            if rubbish := [p.name for p in path.parent.iterdir() if p.name not in ("file", "target")]:
                return f"left behind after the next save: {rubbish}"
            return None

        yield Case(f"kill {number}, {situation}", case)


def _others(subject: Subject) -> Iterator[Case]:
    def lookalikes(folder: Path) -> str | None:
        """Only stale files of our own are deleted."""
        path, name = folder / "m", "m.xpnet-0123456789abcde{}.tmp"
        stays = [folder / "other.xpnet-0123456789abcdef.tmp", folder / "m.backup.tmp", folder / "m.tmp",
                 folder / "m.xpnet-0123.tmp"]  # fmt: skip
        for other in stays:
            other.write_bytes(b"mine")
        (folder / name.format(1)).symlink_to(folder / "m.backup.tmp")
        os.link(folder / "m.tmp", folder / name.format(2))
        os.mkfifo(folder / name.format(3))
        (folder / name.format(4)).mkdir()
        stays += [folder / name.format(i) for i in (1, 2, 3, 4)]
        alive, stale = folder / name.format(5), folder / name.format(6)
        alive.write_bytes(b"half")
        stale.write_bytes(b"half")
        if os.geteuid() == 0:
            foreign = folder / name.format(7)
            foreign.write_bytes(b"half")
            os.chown(foreign, 1234, 1234)
            stays.append(foreign)
        code = f"import fcntl; f = open({str(alive)!r}); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        try:
            subject.models[0].save(path)
            if missing := [p.name for p in (*stays, alive) if not p.is_symlink() and not p.exists()]:
                return f"deleted: {missing}"
            if stale.exists():
                return "a stale file was not deleted"
        finally:
            process.kill()
            process.wait()
        subject.models[0].save(path)
        return "the file of a killed process was not deleted" if alive.exists() else None

    def order(folder: Path) -> str | None:
        """The file is flushed before it is renamed, and its folder afterwards; the name cannot be guessed."""
        events: list[str] = []
        before = {name: getattr(os, name) for name in ("fsync", "replace")}

        def fsync(file: int) -> None:
            events.append("folder" if os.path.isdir(f"/proc/self/fd/{file}") else "file")
            before["fsync"](file)

        def replace(old: Any, new: Any) -> None:
            events.append(str(old))
            before["replace"](old, new)

        os.fsync, os.replace = fsync, replace  # type: ignore[assignment]
        try:
            for _ in range(2):
                subject.models[0].save(folder / "m")
        finally:
            os.fsync, os.replace = before["fsync"], before["replace"]
        kinds = ["rename" if "/" in event else event for event in events]
        if kinds != ["file", "rename", "folder"] * 2:
            return f"the order is {kinds}"
        return "the name of the temporary file is the same" if events[1] == events[4] else None

    def modes(folder: Path) -> str | None:
        for bits in (0o600, 0o640, 0o444, 0o755):
            path = folder / f"{bits:o}"
            path.write_bytes(b"old")
            path.chmod(bits)
            subject.models[0].save(path)
            if path.stat().st_mode & 0o7777 != bits:
                return f"the mode {bits:o} became {path.stat().st_mode & 0o7777:o}"
        return None

    yield Case("files that look like temporary ones", lookalikes)
    yield Case("flushes", order)
    yield Case("permissions", modes)
    for length in (200, 243, 250, 255):

        def long_name(folder: Path, length: int = length) -> str | None:  # fmt: skip
            for _ in range(2):
                subject.models[0].save(folder / ("m" * length))
            return None if len(_names(folder)) == 1 else f"left behind: {_names(folder)}"

        yield Case(f"a name of {length} characters", long_name)


# Servers -----------------------------------------------------------------------------------------------------------


class Mirror(http.server.ThreadingHTTPServer):
    """A server of datasets at 127.0.0.1. /KIND-WHICH/NAME is one of the contents; its kind says what goes wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)

    def url(self, kind: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{kind}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client may close the connection."""


SERVERS = ("missing", "altered", "short", "long", "cut", "endless", "endless after a length", "huge length", "bomb",
           "slow", "slow header", "silent", "no answer", "loop", "empty", "not HTTP", "503")  # fmt: skip


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kind, which = self.path.strip("/").split("/")[0].replace("%20", " ").rsplit("-", 1)
        body = complete = CONTENTS[int(which)]
        length: int | None = len(complete)
        headers: dict[str, str] = {}
        if kind in ("missing", "503"):
            self.send_error(404 if kind == "missing" else 503)
            return
        if kind == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        if kind == "not HTTP":
            self.wfile.write(b"\x00\x01\x02" * 100)
            return
        if kind == "no answer":
            time.sleep(30)
            return
        if kind == "slow header":
            with contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 4000:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.1)
            return
        if kind == "altered":
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif kind == "short":
            body, length = body[:-1], len(body) - 1
        elif kind == "long":
            body, length = body + b"x", len(body) + 1
        elif kind == "cut":
            body = body[: len(body) // 2]
        elif kind == "empty":
            body, length = b"", 0
        elif kind == "endless":
            length = None
        elif kind == "huge length":
            length = 2**40
        elif kind == "bomb":
            body = gzip.compress(bytes(2**27))
            headers, length = {"Content-Encoding": "gzip"}, len(body)
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        with contextlib.suppress(OSError):
            if kind in ("slow", "silent"):
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05 if kind == "slow" else 30)
            while kind in ("endless", "endless after a length", "huge length"):
                self.wfile.write(bytes(2**16))
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def _servers(subject: Subject) -> Iterator[Case]:
    for kind, situation in itertools.product(SERVERS, ("new", "existing", "next mirror")):

        def case(folder: Path, kind: str = kind, situation: str = situation) -> str | None:  # fmt: skip
            path = folder / "tiny" / "first"
            old = None
            if situation == "existing":
                _downloaded(subject, path, 0)
                old = path.read_bytes()
            download._PATIENCE, download._SILENCE = 0.5, 0.8
            began, most = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                _downloaded(subject, path, 1, kind, *(["good"] if situation == "next mirror" else []))
            except DownloadError as error:
                if situation == "next mirror":
                    return f"the next mirror was not used: {error}"
                if f"{kind}-1/first: " not in str(error):
                    return f"the error names no address: {error}"
            except BaseException as error:
                return f"{type(error).__name__} instead of DownloadError: {error}"
            else:
                # The length that is announced is right, and the rest is not read.
                if situation != "next mirror" and kind != "endless after a length":
                    return "it was accepted"
            seconds = time.monotonic() - began
            if seconds > 8:
                return f"it took {seconds:.1f} s"
            if (grown := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) > 60_000:
                return f"memory has grown by {grown} KB"
            now = path.read_bytes() if path.exists() else None
            if now != (CONTENTS[1] if situation == "next mirror" else old):
                return "the file in the cache has changed"
            time.sleep(0.1)
            if rubbish := [name for name in _names(folder) if name not in ("tiny", "tiny/first")]:
                return f"left behind: {rubbish}"
            return None

        yield Case(f"a server that is {kind}, {situation}", case)


#: By name: what the cases are, in the plural, and the cases.
SUITES: dict[str, tuple[str, Callable[[Subject], Iterator[Case]]]] = {
    "calls": ("failing system calls while writing", _failing_calls),
    "limits": ("limits of the size of a file", _size_limits),
    "disks": ("full disks", _full_disks),
    "paths": ("paths that are no files, and missing permissions", _paths),
    "changing": ("files that change while they are read", _changing_files),
    "kills": ("kills while saving", _kill_saves),
    "others": ("temporary files, flushes, permissions and long names", _others),
    "servers": ("servers of datasets that misbehave", _servers),
}


def main() -> None:
    task = read_task()
    subject = Subject(Path.cwd())
    cases = itertools.islice(SUITES[task["suite"]][1](subject), task["first"] * task["step"], None, task["step"])
    for _, case in zip(range(task["first"], task["count"]), cases, strict=False):
        tell(case=case.name)
        folder = Path(tempfile.mkdtemp(dir="/tmp"))
        folder.chmod(0o755)
        try:
            bad = case.run(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        tell(bad="a planted fault" if task.get("plant") else bad)


if __name__ == "__main__":
    main()
