"""Data of other libraries as NumPy arrays: frames of pandas, polars and PyArrow; and arrays on disk, read in parts."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from xpnet.backends.arrays import to_host
from xpnet.errors import ArgumentTypeError, DataError

HostArray = numpy.ndarray[Any, Any]

#: How text becomes numbers, for errors.
HOW_TO_ENCODE = (
    "convert numbers that are text or objects with .astype(float), and categories with pandas.get_dummies, or with "
    "numpy.unique(column, return_inverse=True)"
)
_LIBRARIES = ("pandas", "polars", "pyarrow")
#: The ends of the error messages by problem. {} is replaced by the names of the columns.
_PROBLEMS = {
    "categories": "has categories{}. Use their codes (in pandas, .cat.codes) or one column per category (get_dummies).",
    "times": "contains dates or times{}. Convert them to numbers, such as seconds since the first of them.",
    "text": f"contains text or objects{{}}. Encode it first; {HOW_TO_ENCODE}.",
}


def length(a: Any) -> int:
    """The number of samples of an array or a list. Arrays on disk may have a shape but no `len`."""
    shape = getattr(a, "shape", None)
    return len(a) if shape is None else int(shape[0]) if len(shape) else 0


def array_like(a: Any, name: str) -> Any:
    """`a` as something that `asarray` accepts: frames, series and arrays on disk become NumPy arrays.

    Raises DataError for missing values, and ArgumentTypeError for columns that do not contain numbers.
    """
    if type(a).__name__ == "LazyFrame":
        raise ArgumentTypeError(f"{name} is a LazyFrame: call its collect() first.")
    library = next((root for cls in type(a).__mro__ if (root := cls.__module__.partition(".")[0]) in _LIBRARIES), None)
    if library is not None and (hasattr(a, "columns") or hasattr(a, "to_numpy")):
        return _from_table(library, a, name)
    if hasattr(a, "toarray") and hasattr(a, "nnz"):
        raise ArgumentTypeError(
            f"{name} is a sparse matrix: give {name}.toarray(), or a datasets.Stream of it, which is read in parts."
        )
    if isinstance(a, memoryview):
        return numpy.asarray(a)
    known = ("__array__", "__array_interface__", "__cuda_array_interface__", "__dlpack__")
    if hasattr(a, "shape") and hasattr(a, "__getitem__") and not any(hasattr(a, protocol) for protocol in known):
        if not has_length(a):
            raise ArgumentTypeError(f"{name} must have a first axis of known length, not shape {a.shape}.")
        return read(a, slice(0, length(a)), name)
    return a


def host_array(a: Any, name: str) -> HostArray:
    """`a` as a NumPy array. Raises DataError or ArgumentTypeError."""
    a = array_like(a, name)
    try:
        return numpy.asarray(to_host(a))
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"{name} cannot be converted to an array: {error}") from error


def read(a: Any, rows: slice | HostArray, name: str) -> HostArray:
    """These rows of an array on disk: a slice, or ascending indices. Raises DataError for another shape or dtype."""
    first, last = (rows.start, rows.stop - 1) if isinstance(rows, slice) else (int(rows[0]), int(rows[-1]))
    if isinstance(rows, slice):
        count = rows.stop - rows.start
        part = _slice(a, rows, name)
    else:
        count = len(rows)
        try:
            part = _dense(a[rows])
        except Exception:  # the array supports only slices
            part = _slice(a, slice(first, last + 1), name)[rows - first]
    expected = (count, *a.shape[1:])
    if part.shape != expected:
        raise DataError(
            f"{name}: reading the samples {first} to {last} gave the shape {part.shape}, not {expected}: the array "
            "became shorter, or its `shape` is wrong."
        )
    declared = getattr(getattr(a, "dtype", None), "kind", part.dtype.kind)
    if part.dtype.kind != declared:
        raise DataError(f"{name}: reading the samples {first} to {last} gave {part.dtype}, not {a.dtype}.")
    return part


def sample_bytes(a: Any) -> int:
    """The size of a sample of an array, or an estimate if its dtype is unknown to NumPy."""
    size = getattr(a.dtype, "itemsize", 8)
    return max(1, int(size) * int(numpy.prod(a.shape[1:], dtype=object)))


def has_length(a: Any) -> bool:
    """Whether the first axis of an array has a known length."""
    shape = a.shape
    return len(shape) > 0 and isinstance(shape[0], numbers.Integral)


def _slice(a: Any, rows: slice, name: str) -> HostArray:
    try:
        return _dense(a[rows])
    except (IndexError, ValueError) as error:
        raise DataError(f"{name}: the samples {rows.start} to {rows.stop - 1} cannot be read: {error}") from error


def _dense(part: Any) -> HostArray:
    """A part of an array or of a sparse matrix as a dense NumPy array."""
    return numpy.asarray(part.toarray() if hasattr(part, "toarray") else to_host(part))


def _from_table(library: str, a: Any, name: str) -> Any:
    if library == "pandas":
        dtypes = set(a.dtypes) if hasattr(a, "columns") else {a.dtype}
        if len(dtypes) == 1 and isinstance(dtype := dtypes.pop(), numpy.dtype) and dtype.kind in "fiub":
            return a.to_numpy()
        labels = list(a.columns) if hasattr(a, "columns") else None
        columns = [a] if labels is None else [a.iloc[:, i] for i in range(len(labels))]
    elif library == "polars":
        labels = list(a.columns) if hasattr(a, "columns") else None
        columns = [a] if labels is None else a.get_columns()
    else:
        labels = list(a.column_names) if hasattr(a, "column_names") else None
        columns = [a] if labels is None else list(a.columns)
    contents = [_COLUMNS[library](column) for column in columns]
    for problem, text in _PROBLEMS.items():
        if found := [i for i, content in enumerate(contents) if isinstance(content, str) and content == problem]:
            raise ArgumentTypeError(
                f"{name} must be an array of real numbers, but it {text.format(_in(labels, found))}"
            )
    if missing := [i for i, content in enumerate(contents) if content is None]:
        raise DataError(f"{name} has missing values (NA){_in(labels, missing)}. Fill them, or leave out their samples.")
    if labels is None:
        return contents[0]
    if not contents:
        return numpy.empty((len(a), 0))
    joined = numpy.empty((len(a), len(contents)), numpy.result_type(*contents))
    for i, content in enumerate(contents):
        joined[:, i] = content
    return joined


def _in(labels: list[Any] | None, indices: Sequence[int]) -> str:
    """ " in the columns 'a', 'b'"; "" for a series."""
    if labels is None:
        return ""
    named = ", ".join(repr(labels[i]) for i in indices[:10])
    more = f" and {len(indices) - 10} more" if len(indices) > 10 else ""
    return f" in the column{'s' if len(indices) > 1 else ''} {named}{more}"


# Each converts a column to an array. The result is None if values are missing, or a key of _PROBLEMS.


def _pandas_column(column: Any) -> Any:
    dtype = column.dtype
    kind = type(dtype).__name__
    if kind == "CategoricalDtype":
        return "categories"
    if kind in ("DatetimeTZDtype", "PeriodDtype", "IntervalDtype"):
        return "times"
    nullable = kind != "SparseDtype" and not isinstance(dtype, numpy.dtype)
    numeric = (
        dtype if isinstance(dtype, numpy.dtype) else getattr(dtype, "numpy_dtype" if nullable else "subtype", None)
    )
    if numeric is None or numeric.kind not in "fiubc":
        return "times" if numeric is not None and numeric.kind in "mM" else "text"
    return None if nullable and column.isna().any() else column.to_numpy(dtype=numeric)


def _polars_column(column: Any) -> Any:
    if str(column.dtype).startswith(("Categorical", "Enum")):
        return "categories"
    return _checked(column.to_numpy(), column.null_count())


def _pyarrow_column(column: Any) -> Any:
    if str(column.type).startswith("dictionary"):
        return "categories"
    chunked = hasattr(column, "num_chunks")
    return _checked(column.to_numpy() if chunked else column.to_numpy(zero_copy_only=False), column.null_count)


def _checked(values: HostArray, missing: int) -> Any:
    if values.dtype.kind in "mM":
        return "times"
    if values.dtype.kind not in "fiubc" and not (missing and _all_numbers(values)):
        return "text"
    return None if missing else values


def _all_numbers(values: HostArray) -> bool:
    """Whether these objects are numbers, booleans or None, as in a converted column with missing values."""
    return all(value is None or isinstance(value, numbers.Real) for value in values)


_COLUMNS: dict[str, Callable[[Any], Any]] = {
    "pandas": _pandas_column,
    "polars": _polars_column,
    "pyarrow": _pyarrow_column,
}
