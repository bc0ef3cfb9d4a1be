"""The IDX format, in which MNIST and its relatives are published: a short header, then one array.

The header is two zero bytes, a byte for the type, a byte for the number of axes, then each axis's length as a
big-endian 32-bit integer. The elements follow row by row, big-endian too. In memory everything is native.
"""

import gzip
import math
import os
import secrets
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from xpnet.errors import ArgumentTypeError, FileError

_TYPES: dict[int, numpy.dtype[Any]] = {
    0x08: numpy.dtype(">u1"),
    0x09: numpy.dtype(">i1"),
    0x0B: numpy.dtype(">i2"),
    0x0C: numpy.dtype(">i4"),
    0x0D: numpy.dtype(">f4"),
    0x0E: numpy.dtype(">f8"),
}
_CODES = {dtype: code for code, dtype in _TYPES.items()}
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: str | os.PathLike[str]) -> NDArray[Any]:
    """The array in an IDX file, gzip-compressed or not, as a fresh, writable array of native byte order.

    A file that is missing, truncated, altered, too long or of another format raises `FileError`.
    """
    content = _read_bytes(Path(path))
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _TYPES:
        raise FileError(f"{path} is not an IDX file: it starts with {content[:4].hex(' ') or 'nothing'}.")
    dtype, axes = _TYPES[content[2]], content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise FileError(f"{path} is truncated: its header has {len(content)} of {start} bytes.")
    shape = struct.unpack_from(f">{axes}I", content, 4)
    size, expected = len(content) - start, math.prod(shape) * dtype.itemsize
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        raise FileError(f"{path} is {fault}: its header promises {expected} bytes of data, it holds {size}.")
    try:
        return numpy.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
    except ValueError as error:  # more axes, or longer ones beside an empty one, than NumPy can hold
        raise FileError(f"{path} holds an array of shape {shape}, which NumPy refuses: {error}.") from error


def write_idx(path: str | os.PathLike[str], array: NDArray[Any]) -> None:
    """Write an array of uint8, int8, int16, int32, float32 or float64; gzip-compressed if the name ends in .gz.

    The same array gives the same bytes, and the file appears whole or not at all.
    """
    code = _CODES.get(array.dtype.newbyteorder(">"))
    if code is None:
        known = ", ".join(dtype.name for dtype in _CODES)
        raise ArgumentTypeError(f"IDX holds {known}, not {array.dtype}. Convert first, with array.astype(...).")
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    content = header + array.astype(_TYPES[code]).tobytes()
    path = Path(path)
    _replace(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _read_bytes(path: Path) -> bytes:
    """A file's content, unpacked if it is gzip: told by its first bytes, since names lie."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP_MAGIC) else content
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise FileError(f"{path} is damaged: it cannot be unpacked as gzip ({error}).") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from error


def _replace(path: Path, content: bytes) -> None:
    """Write beside the target, then rename: a reader never meets half a file."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
