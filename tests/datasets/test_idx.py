"""IDX files: arrays survive writing and reading, and damaged or foreign files are refused."""

import gzip
import os
import stat
import struct
import tempfile
import tracemalloc
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from xpnet.datasets import read_idx, write_idx
from xpnet.errors import ArgumentError, ArgumentTypeError, FileError

TYPES = ["uint8", "int8", "int16", "int32", "float32", "float64"]
SAMPLE = numpy.arange(6, dtype=numpy.int16).reshape(2, 3) - 2
PLAIN = bytes.fromhex("00000b02 00000002 00000003 fffe ffff 0000 0001 0002 0003")


@given(
    st.sampled_from(TYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    ),
    st.sampled_from(["array", "array.gz"]),
)
@settings(database=None, deadline=None)
def test_written_arrays_are_read_unchanged(array, name):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        write_idx(path, array)
        loaded = read_idx(path)
    assert loaded.dtype == array.dtype and loaded.dtype.isnative
    assert loaded.shape == array.shape
    assert loaded.tobytes() == array.tobytes()  # bytes, because NaN != NaN
    assert loaded.flags.writeable and loaded.flags.c_contiguous


def test_the_bytes_on_disk_follow_the_format(tmp_path):
    write_idx(tmp_path / "plain", SAMPLE)
    assert (tmp_path / "plain").read_bytes() == PLAIN


@pytest.mark.parametrize("array", [SAMPLE.astype(">i2"), SAMPLE.astype("<i2"), SAMPLE[::-1, ::-1][::-1, ::-1]])
def test_byte_order_and_strides_do_not_matter(tmp_path, array):
    write_idx(str(tmp_path / "plain"), array)
    assert (tmp_path / "plain").read_bytes() == PLAIN


def test_gzip_depends_on_the_content_when_reading_and_on_the_name_when_writing(tmp_path):
    write_idx(tmp_path / "a.gz", SAMPLE)
    compressed = (tmp_path / "a.gz").read_bytes()
    assert gzip.decompress(compressed) == PLAIN
    (tmp_path / "compressed").write_bytes(compressed)
    (tmp_path / "plain.gz").write_bytes(PLAIN)
    numpy.testing.assert_array_equal(read_idx(tmp_path / "compressed"), SAMPLE)
    numpy.testing.assert_array_equal(read_idx(tmp_path / "plain.gz"), SAMPLE)


def test_gzip_output_is_reproducible(tmp_path, monkeypatch):
    write_idx(tmp_path / "a.gz", SAMPLE)
    monkeypatch.setattr("time.time", lambda: 2e9)
    write_idx(tmp_path / "b.gz", SAMPLE)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


@pytest.mark.parametrize("content", [PLAIN, gzip.compress(PLAIN, mtime=0)], ids=["plain", "gzip"])
def test_every_truncation_is_refused(tmp_path, content):
    path = tmp_path / "short"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FileError, match="short"):
            read_idx(path)


def test_every_truncation_inside_a_complete_gzip_file_is_refused(tmp_path):
    path = tmp_path / "short"
    for length in range(len(PLAIN)):
        path.write_bytes(gzip.compress(PLAIN[:length], mtime=0))
        with pytest.raises(FileError, match="truncated|not an IDX file"):
            read_idx(path)


def test_no_flipped_bit_of_a_gzip_file_changes_the_array(tmp_path):
    path, content = tmp_path / "flipped", gzip.compress(PLAIN, mtime=0)
    refused = 0
    for bit in range(8 * len(content)):
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        try:  # some bits of the gzip header have no effect on the data, such as the time
            numpy.testing.assert_array_equal(read_idx(path), SAMPLE)
        except FileError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 8 * (len(content) - 10)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "starts with nothing"),
        (b"\x89PNG\r\n\x1a\n", "not an IDX file: it starts with 89 50 4e 47"),
        (bytes.fromhex("00000a01 00000001 00"), "not an IDX file"),
        (bytes.fromhex("00000803 00000001 00000001"), "header has 12 of 16 bytes"),
        (PLAIN[:-1], "truncated: its header announces 12 bytes of data, but it has 11"),
        (PLAIN + b"\0", "too long: its header announces 12 bytes of data, but it has 13"),
        (gzip.compress(PLAIN, mtime=0) + b"rubbish", "damaged"),
        (gzip.compress(PLAIN + b"\0", mtime=0), "too long"),
        (struct.pack(">BBBB255I", 0, 0, 8, 255, *[2**32 - 1] * 255), "truncated"),
        (struct.pack(">BBBB65I", 0, 0, 8, 65, *[1] * 65) + b"\0", "NumPy refuses"),
        (struct.pack(">BBBB4I", 0, 0, 8, 4, 0, *[2**32 - 1] * 3), "NumPy refuses"),
    ],
)
def test_foreign_files_are_refused_with_path_and_reason(tmp_path, content, reason):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(FileError, match=reason) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, OSError)


@given(st.binary(max_size=64))
@settings(database=None, deadline=None)
def test_any_bytes_give_an_array_or_a_file_error(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "any")
        path.write_bytes(b"\0\0" + content)
        try:
            read_idx(path)
        except FileError as error:
            assert str(path) in str(error)


def test_missing_files_and_folders_are_file_errors(tmp_path):
    with pytest.raises(FileError, match=r"absent: there is no such file"):
        read_idx(tmp_path / "absent")
    with pytest.raises(FileError, match="cannot be read"):
        read_idx(tmp_path)
    with pytest.raises(FileError, match=r"absent.*cannot be written: No such file"):
        write_idx(tmp_path / "absent" / "array", SAMPLE)


@pytest.mark.parametrize("dtype", ["bool", "uint16", "int64", "float16", "complex64", "datetime64[s]", "U3"])
def test_dtypes_that_the_format_lacks_are_refused(tmp_path, dtype):
    with pytest.raises(ArgumentTypeError, match=r"an IDX file can store uint8.*, not .*astype"):
        write_idx(tmp_path / "array", numpy.zeros(3, dtype))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_only_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "array"
    write_idx(path, SAMPLE)

    def broken(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(FileError, match=r"array: cannot be written: No space left"):
        write_idx(path, SAMPLE + 1)
    assert path.read_bytes() == PLAIN
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="this platform has no POSIX permissions")
def test_a_written_file_has_ordinary_permissions(tmp_path):
    write_idx(tmp_path / "array", SAMPLE)
    (tmp_path / "plain").write_bytes(b"")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_lists_and_arrays_of_other_libraries_are_written(tmp_path):
    write_idx(tmp_path / "list", [[1.5, 2.0], [3.0, 4.0]])
    numpy.testing.assert_array_equal(read_idx(tmp_path / "list"), [[1.5, 2.0], [3.0, 4.0]])
    write_idx(tmp_path / "number", numpy.float32(3))
    assert read_idx(tmp_path / "number").shape == ()
    with pytest.raises(ArgumentTypeError, match=r"not int64.*astype\(numpy.int32\), if its numbers fit"):
        write_idx(tmp_path / "integers", [1, 2, 3])
    for value in ([[1.0], [1.0, 2.0]], ["a"], None, object()):
        with pytest.raises(ArgumentTypeError, match="array"):
            write_idx(tmp_path / "wrong", value)
    assert not (tmp_path / "wrong").exists() and not (tmp_path / "integers").exists()


@pytest.mark.parametrize("shape", [(2**32,), (0, 2**40), (2**62, 0)])
def test_axes_that_the_format_cannot_store_are_refused(tmp_path, shape):
    with pytest.raises(ArgumentError, match=r"axes of up to 4294967295, not the shape"):
        write_idx(tmp_path / "array", numpy.broadcast_to(numpy.uint8(0), shape))
    assert not list(tmp_path.iterdir())


def test_a_compressed_file_is_not_decompressed_beyond_its_announced_size(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(PLAIN + bytes(2**28)))
    tracemalloc.start()
    with pytest.raises(FileError, match="too long: its header announces 12 bytes of data, but it has 13 or more"):
        read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24
