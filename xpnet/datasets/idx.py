"""Read and write IDX files, the format in which MNIST is published.

A file is a header and one array. The header has two zero bytes, one byte for the type, one byte for the number of
axes, and the length of each axis as a big-endian 32-bit integer. The elements follow in C order, also big-endian.
Source: https://yann.lecun.com/exdb/mnist/.
"""

import gzip
import io
import math
import os
import struct
import zlib
from typing import Any, BinaryIO, cast

import numpy
from numpy.typing import ArrayLike, NDArray

from xpnet.backends.arrays import refuse_masked
from xpnet.data.files import as_path, memory_error, read_bytes, write_atomically
from xpnet.data.sources import host_array
from xpnet.errors import ArgumentError, ArgumentTypeError, FileError

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
_LONGEST_AXIS = 2**32 - 1
_CHUNK = 2**20  # bytes read at a time


def read_idx(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Read the array of an IDX file, which may be gzip-compressed, as a new, writable array in native byte order.

    Raises `FileError` if the file is missing, damaged or of another format. Nothing is decompressed beyond the size
    that the header announces.
    """
    content = read_bytes(path)
    try:
        if not content.startswith(_GZIP_MAGIC):
            return _array(path, io.BytesIO(content))
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            return _array(path, cast(BinaryIO, file))
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise FileError(f"{path} is damaged: gzip cannot decompress it ({error}).") from error
    except MemoryError as error:
        raise memory_error(path, error) from error


def write_idx(path: str | os.PathLike[str], array: ArrayLike) -> None:
    """Write an array of uint8, int8, int16, int32, float32 or float64, gzip-compressed if the name ends in .gz.

    array: of any library and shape, or a list. Equal arrays give equal files.

    Raises `ArgumentTypeError` for other dtypes, such as the int64 of a list of integers; `DataError` for missing values
    in a frame; `ArgumentError` for an axis of 2^32 or more; and `FileError` if the file cannot be written, which leaves
    an existing file unchanged.
    """
    target = as_path("write_idx", "path", path)
    refuse_masked(array, "array")
    array = host_array(array, "array")
    code = _CODES.get(array.dtype.newbyteorder(">"))
    if code is None:
        known = ", ".join(dtype.name for dtype in _CODES)
        raise ArgumentTypeError(
            f"an IDX file can store {known}, not {array.dtype}. Convert the array first, with array.astype(...)"
            f"{': numpy.asarray(a).astype(numpy.int32), if its numbers fit' if array.dtype.kind in 'iu' else ''}."
        )
    if max(array.shape, default=0) > _LONGEST_AXIS:
        raise ArgumentError(f"an IDX file can store axes of up to {_LONGEST_AXIS}, not the shape {array.shape}.")
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    content = header + array.astype(_TYPES[code]).tobytes()
    write_atomically(target, gzip.compress(content, mtime=0) if target.suffix == ".gz" else content)


def _array(path: Any, file: BinaryIO) -> NDArray[Any]:
    """The array of an open file. Reads at most one byte more than the header announces."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES:
        raise FileError(f"{path} is not an IDX file: it starts with {magic.hex(' ') or 'nothing'}.")
    dtype, axes = _TYPES[magic[2]], magic[3]
    lengths = file.read(4 * axes)
    if len(lengths) < 4 * axes:
        raise FileError(f"{path} is truncated: its header has {4 + len(lengths)} of {4 + 4 * axes} bytes.")
    shape = struct.unpack(f">{axes}I", lengths)
    expected = math.prod(shape) * dtype.itemsize
    data = bytearray()
    while chunk := file.read(min(_CHUNK, expected + 1 - len(data))):
        data += chunk
    if len(data) != expected:
        fault, more = ("truncated", "") if len(data) < expected else ("too long", " or more")
        raise FileError(
            f"{path} is {fault}: its header announces {expected} bytes of data, but it has {len(data)}{more}."
        )
    try:
        return numpy.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
    except ValueError as error:  # too many axes, or too long ones in an empty array
        raise FileError(f"{path} has an array of shape {shape}, which NumPy refuses: {error}.") from error
