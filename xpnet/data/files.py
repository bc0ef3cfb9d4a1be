"""Files: paths from users, reading a whole file, and writing one so that no error loses data."""

import contextlib
import errno
import importlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xpnet.backends.shortage import shortage
from xpnet.errors import ArgumentError, ArgumentTypeError, DeviceMemoryError, FileError, shown

#: Errors of os.replace after which an existing file may still be writable: its folder is read-only, or the file is a
#: mount point.
_NO_RENAME = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)
#: The suffixes of other formats. A model file with one of them would mislead people and programs.
_OTHER_FORMATS = (".h5", ".hdf5", ".keras", ".pt", ".pth", ".pkl", ".pickle", ".joblib", ".onnx", ".tflite")
_NAME_BYTES = 100  # of the file's name in that of its temporary file; most systems allow 255 bytes in total
_TEMPORARY = re.compile(r"(?P<name>.+)\.xpnet-[0-9a-f]{16}\.tmp", re.DOTALL)


def as_path(owner: str, name: str, path: Any) -> Path:
    """The path of a file or folder, given as str or os.PathLike. Raises ArgumentTypeError or ArgumentError."""
    place = f"{owner}: {name}" if owner else name
    given = path
    with contextlib.suppress(TypeError):  # of a __fspath__ that does not return text
        given = os.fspath(path)
    if not isinstance(given, str):
        raise ArgumentTypeError(f"{place} must be a str or an os.PathLike, not {shown(path)}.")
    if not given:
        raise ArgumentError(f"{place} must name a file, not {shown(path)}.")
    try:
        os.fsencode(given)
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{place} has characters that no file name can have: {error}.") from error
    if "\0" in given:
        raise ArgumentError(f"{place} has a null character, which no file name can have: {path!r}.")
    return Path(given)


def model_path(owner: str, path: Any) -> Path:
    """The path of a model file to write. Raises ArgumentError for a suffix that means another format."""
    file = as_path(owner, "path", path)
    if file.suffix.lower() in _OTHER_FORMATS:
        hint = " For an ONNX file, call xpnet.export_onnx(model, path)." if file.suffix.lower() == ".onnx" else ""
        raise ArgumentError(
            f"{owner}: path has the suffix {file.suffix!r} of another format, but xpnet writes safetensors files: name "
            f"it {file.stem + '.safetensors'!r}.{hint}"
        )
    return file


def foreign_hint(path: Any) -> str:
    """The end of an error message: how to import a file with the suffix of another format; "" for other files."""
    suffix = Path(path).suffix.lower()
    if suffix == ".onnx":
        return ". Read it with xpnet.import_onnx."
    if suffix in _OTHER_FORMATS:
        return f". If another library wrote this {suffix} file, export the model from that library to ONNX."
    return ""


def read_bytes(path: Any, name: str = "path") -> bytes:
    """The content of a regular file. Raises FileError with the reason, and DeviceMemoryError if memory is short.

    The file is copied, not mapped: another process may change it while it is read.
    """
    path = as_path("", name, path)
    with _reading(path):
        size = _regular_file(path).st_size
        with open(path, "rb") as file:
            return file.read(size)  # a file that grows is not followed


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        if path.is_symlink():
            raise FileError(f"{path}: it is a symbolic link to {os.readlink(path)}, which does not exist.") from error
        raise FileError(f"{path}: there is no such file.") from error
    except MemoryError as error:
        raise memory_error(path, error) from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise memory_error(path, error) from error
        raise FileError(f"{path}: cannot be read: {_reason(error)}.") from error


def memory_error(path: Any, error: BaseException) -> DeviceMemoryError:
    """The error for an intact file that does not fit into memory."""
    return shortage(f"{path}: there is not enough free memory to load it", error)


def write_atomically(path: Any, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the whole new one. Raises FileError with the reason.

    The content goes into a temporary file in the same folder, which then replaces the file. A symbolic link stays: its
    target is written. An existing file keeps its mode and, where the system allows it, its owner and group.

    A file that has several names (hard links), or whose folder cannot be written, is overwritten in place instead. If
    that fails halfway, a file with the whole new content is kept, and the error names it.

    Temporary files that killed processes have left for this path are deleted: a process that runs has locked its own.
    """
    path = as_path("", "path", path)
    temporary, overwriting = _Temporary(), False
    try:
        try:
            existing, target = _target(path)
            temporary.write(target, existing, content)
            if not temporary.replaces(target, existing):
                with open(target, "wb", buffering=0, opener=_open_existing) as file:
                    _reserve(file.fileno(), len(content))
                    overwriting = True
                    _overwrite(file, content)
                    overwriting = False
            _flush_folder(target.parent)
        finally:
            kept = temporary.close(keep=overwriting)
    except OSError as error:
        if not overwriting:
            raise _cannot_write(path, error) from error
        raise FileError(
            f"{path}: writing failed halfway and has damaged the file: {_reason(error)}. Its whole new content is in "
            f"{kept}."
        ) from error
    _delete_stale(target)


def refuse_unwritable(path: Any) -> None:
    """Raise FileError if `write_atomically` could not write this file now. Nothing is changed."""
    temporary = _Temporary()
    with reporting(path):
        try:
            existing, target = _target(as_path("", "path", path))
            temporary.write(target, existing, b"")
        finally:
            temporary.close()


def refuse_irregular(path: Any) -> None:
    """Raise FileError if this is a folder, a pipe, a socket or a device; a pipe would be waited for."""
    with reporting(path), contextlib.suppress(FileNotFoundError):
        _regular_file(as_path("", "path", path))


@contextlib.contextmanager
def reporting(path: Any) -> Iterator[None]:
    """Turn an OSError while this file is written into a FileError with the path and the reason."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def _regular_file(path: Path) -> os.stat_result:
    """The status of a file, or of the target of a link. Raises OSError for folders, pipes, sockets and devices."""
    status = os.stat(path)
    if stat.S_ISREG(status.st_mode):
        return status
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
    raise OSError(errno.EINVAL, f"it is {kind}, not a regular file")


def _target(path: Path) -> tuple[os.stat_result | None, Path]:
    """(the status of the file, None if it does not exist; its path with all symbolic links resolved)."""
    try:
        status: os.stat_result | None = _regular_file(path)
    except FileNotFoundError:
        status = None
    return status, Path(os.path.realpath(path))


class _Temporary:
    """A new file with the content to write. It is locked, so that other processes know that this one lives."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._file: Any = None

    def write(self, target: Path, existing: os.stat_result | None, content: bytes) -> None:
        """Write the content beside the target, and flush it to the disk.

        If an existing target can be written but its folder cannot, the file is in the system's temporary folder.
        """
        try:
            self._write(target.parent, target.name, existing, content)
        except OSError as error:
            if existing is None or error.errno not in _NO_RENAME or self.path is not None:
                raise
            os.close(os.open(target, os.O_WRONLY))  # raises OSError if the target cannot be written either
            import tempfile  # here, because few files need it

            self._write(Path(tempfile.gettempdir()), target.name, existing, content)

    def _write(self, folder: Path, name: str, existing: os.stat_result | None, content: bytes) -> None:
        short = os.fsencode(name)[:_NAME_BYTES].decode(errors="ignore")
        # A new file has the mode that the umask gives. One that replaces another is private until it has that mode.
        mode = 0o666 if existing is None else 0o600
        while self.path is None:
            path = folder / f"{short}.xpnet-{secrets.token_hex(8)}.tmp"
            self._file = open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
            self.path = path
            _lock(self._file.fileno(), wait=True)
            if not _is_at(self._file.fileno(), path):  # another process took it for a stale one before it was locked
                self.close()
        self._file.write(content)
        self._file.flush()
        if existing is not None:
            _copy_permissions(self._file.fileno(), existing)
        os.fsync(self._file.fileno())

    def replaces(self, target: Path, existing: os.stat_result | None) -> bool:
        """Rename this file to the target; False if the target must be overwritten in place instead."""
        assert self.path is not None
        if existing is not None and (existing.st_nlink > 1 or self.path.parent != target.parent):
            return False
        try:
            os.replace(self.path, target)
        except OSError as error:
            if existing is None or error.errno not in _NO_RENAME:
                raise
            return False
        self.path = None
        return True

    def close(self, keep: bool = False) -> Path | None:
        """Delete the file unless it has become the target. keep: give it a lasting name instead, and return it."""
        path, self.path = self.path, None
        kept = None
        if path is not None:
            with contextlib.suppress(OSError):
                if keep:
                    kept = path
                    os.replace(path, path.with_suffix(".kept"))
                    kept = path.with_suffix(".kept")
                else:
                    path.unlink()
        if self._file is not None:
            with contextlib.suppress(OSError):  # it was flushed before, or writing it has failed
                self._file.close()
        return kept


def _lock(file: int, wait: bool) -> bool:
    """Lock a file until it is closed or this process ends. False if another process has locked it."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):  # not on Windows, nor on every file system of a network
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file), os.lstat(path))
    return False


def _delete_stale(target: Path) -> None:
    """Delete the temporary files that killed processes of this user have left for a target, which is complete now."""
    if not hasattr(os, "geteuid"):  # on Windows
        return
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            match = _TEMPORARY.fullmatch(name)
            if match is not None and match["name"] == target.name:
                with contextlib.suppress(OSError):
                    _delete_if_stale(target.with_name(name))


def _delete_if_stale(path: Path) -> None:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_uid != os.geteuid():
        return
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if _lock(file, wait=False) and _is_at(file, path):
            os.unlink(path)
    finally:
        os.close(file)


def _flush_folder(folder: Path) -> None:
    """Flush the new name of a file to the disk, where the system can do that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # a folder may be writable but not readable
        return
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(file)


def _copy_permissions(file: int, existing: os.stat_result) -> None:
    if not hasattr(os, "fchown"):
        return
    new = os.fstat(file)
    if (new.st_uid, new.st_gid) != (existing.st_uid, existing.st_gid):
        try:
            os.fchown(file, existing.st_uid, existing.st_gid)
        except OSError:  # only an administrator may give a file away
            with contextlib.suppress(OSError):
                os.fchown(file, -1, existing.st_gid)
    os.fchmod(file, stat.S_IMODE(existing.st_mode))


def _open_existing(path: str, flags: int) -> int:
    """Open a file without making or truncating it."""
    return os.open(path, flags & ~(os.O_CREAT | os.O_TRUNC))


def _reserve(file: int, size: int) -> None:
    """Make room for a larger content, so that a full disk is noticed before anything is overwritten."""
    before = os.fstat(file).st_size
    if hasattr(os, "posix_fallocate") and size > before:
        try:
            os.posix_fallocate(file, before, size - before)
        except OSError as error:
            os.ftruncate(file, before)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # other errors: it is not supported here
                raise


def _overwrite(file: Any, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    file.truncate(len(content))
    os.fsync(file.fileno())


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _cannot_write(path: Any, error: OSError) -> FileError:
    folder = Path(path).parent
    missing = error.errno == errno.ENOENT and not folder.exists()
    return FileError(f"{path}: cannot be written: {_reason(error)}{f'; make the folder {folder}' if missing else ''}.")
