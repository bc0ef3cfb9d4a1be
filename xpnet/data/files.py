"""Files: paths from users, reading a whole file, and writing one so that no error loses data."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xpnet.errors import ArgumentError, ArgumentTypeError, DeviceMemoryError, FileError, shown

#: Errors of os.replace after which an existing file may still be writable: its folder is read-only, or the file is a
#: mount point.
_NO_RENAME = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)
#: The suffixes of other formats. A model file with one of them would mislead people and programs.
_OTHER_FORMATS = (".h5", ".hdf5", ".keras", ".pt", ".pth", ".pkl", ".pickle", ".joblib", ".onnx", ".tflite")
_NAME_BYTES = 100  # of the file's name in that of its temporary file; most systems allow 255 bytes in total


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
        raise memory_error(path) from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {_reason(error)}.") from error


def memory_error(path: Any) -> DeviceMemoryError:
    """The error for an intact file that does not fit into memory."""
    return DeviceMemoryError(f"{path}: there is not enough free memory to load it.")


def write_atomically(path: Any, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the whole new one. Raises FileError with the reason.

    The content goes into a temporary file in the same folder, which then replaces the file. A symbolic link stays: its
    target is written. An existing file keeps its mode and, where the system allows it, its owner and group.

    A file that has several names (hard links), or whose folder cannot be written, is overwritten in place instead. If
    that fails halfway, the temporary file is kept: it has the whole new content, and the error names it.
    """
    path = as_path("", "path", path)
    temporary, keep = None, False
    try:
        existing, target = _target(path)
        temporary = _write_temporary(target, existing, content)
        if existing is None or (existing.st_nlink == 1 and temporary.parent == target.parent):
            try:
                os.replace(temporary, target)
                return
            except OSError as error:
                if existing is None or error.errno not in _NO_RENAME:
                    raise
        with open(target, "wb", buffering=0, opener=_open_existing) as file:
            _reserve(file.fileno(), len(content))
            keep = True
            _overwrite(file, content)
            keep = False
    except OSError as error:
        if not keep:
            raise _cannot_write(path, error) from error
        raise FileError(
            f"{path}: writing failed halfway and has damaged the file: {_reason(error)}. Its whole new content is in "
            f"{temporary}."
        ) from error
    finally:
        if temporary is not None and not keep:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def refuse_unwritable(path: Any) -> None:
    """Raise FileError if `write_atomically` could not write this file now. Nothing is changed."""
    with reporting(path):
        existing, target = _target(as_path("", "path", path))
        _write_temporary(target, existing, b"").unlink()


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


def _write_temporary(target: Path, existing: os.stat_result | None, content: bytes) -> Path:
    """Write the content to a new file beside the target, and flush it to the disk.

    If an existing target can be written but its folder cannot, the file is in the system's temporary folder.
    """
    name = f"{os.fsencode(target.name)[:_NAME_BYTES].decode(errors='ignore')}.{secrets.token_hex(8)}.tmp"
    try:
        return _write_new(target.with_name(name), existing, content)
    except OSError as error:
        if existing is None or error.errno not in _NO_RENAME:
            raise
        os.close(os.open(target, os.O_WRONLY))  # raises OSError if the target cannot be written either
        import tempfile  # here, because few files need it

        return _write_new(Path(tempfile.gettempdir(), name), existing, content)


def _write_new(path: Path, existing: os.stat_result | None, content: bytes) -> Path:
    # A new file has the mode that the umask gives. One that replaces another is private until it has the mode of that.
    mode = 0o666 if existing is None else 0o600
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        try:
            file.write(content)
            file.flush()
            if existing is not None:
                _copy_permissions(file.fileno(), existing)
            os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
    return path


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
