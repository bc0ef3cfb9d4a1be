"""Read and write IDX files, the format in which MNIST is published.

A file is a header and one array. The header has two zero bytes, one byte for the type, one byte for the number of
axes, and the length of each axis as a big-endian 32-bit integer. The elements follow in C order, also big-endian.
Source: https://yann.lecun.com/exdb/mnist/.
"""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from xpnet.backends.arrays import refuse_masked
from xpnet.errors import ArgumentTypeError, FileError
from xpnet.training.model_files import write_atomically

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
    """Read the array of an IDX file, which may be gzip-compressed, as a new, writable array in native byte order.

    Raises `FileError` if the file is missing, damaged or of another format.
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
        raise FileError(f"{path} is {fault}: its header announces {expected} bytes of data, but it has {size}.")
    try:
        return numpy.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
    except ValueError as error:  # too many axes, or too long ones in an empty array
        raise FileError(f"{path} has an array of shape {shape}, which NumPy refuses: {error}.") from error


def write_idx(path: str | os.PathLike[str], array: NDArray[Any]) -> None:
    """Write an array of uint8, int8, int16, int32, float32 or float64, gzip-compressed if the name ends in .gz.

    Equal arrays give equal files. Raises `ArgumentTypeError` for other dtypes, and `FileError` if the file cannot be
    written; an existing file is then unchanged.
    """
    refuse_masked(array, "array")
    code = _CODES.get(array.dtype.newbyteorder(">"))
    if code is None:
        known = ", ".join(dtype.name for dtype in _CODES)
        raise ArgumentTypeError(
            f"an IDX file can store {known}, not {array.dtype}. Convert the array first, with array.astype(...)."
        )
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    content = header + array.astype(_TYPES[code]).tobytes()
    write_atomically(path, gzip.compress(content, mtime=0) if Path(path).suffix == ".gz" else content)


def _read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed if it starts with the magic number of gzip, whatever its name."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP_MAGIC) else content
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise FileError(f"{path} is damaged: gzip cannot decompress it ({error}).") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from error
