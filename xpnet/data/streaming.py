"""Streaming datasets: data larger than memory. A thread reads the next window while the model trains."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import mmap
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import numpy

from xpnet.backends import Array
from xpnet.backends.arrays import refuse_masked
from xpnet.concurrency.memory import refuse_without_memory
from xpnet.config import integer
from xpnet.data.dataset import Batch, Dataset, StepData, total_weight
from xpnet.data.sources import has_length, host_array, length, read, sample_bytes
from xpnet.data.structure import Structure, each, items
from xpnet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError
from xpnet.layers.context import Workspace

T = TypeVar("T")

EVALUATION_BATCH = 1024  # the batch size of validation
_READ_AHEAD = 2  # windows or batches: one may be ready while the next is being read
_BLOCKS = 2**32 - 1  # a number in seeds that no window has
_MAX_LOADED_BYTES = 64 * 2**20  # a larger array on disk is streamed
_MIN_BLOCK_IN_PLACE = 2**18  # bytes: checking smaller blocks one by one takes longer than copying them into a window


class Stream:
    """Samples on disk, read while `fit`, `evaluate` or `predict` runs.

    x: an array on disk, (N, ...): a `numpy.memmap`, an HDF5 dataset, or anything with shape, dtype and slices; or a
    sparse matrix. Then y and sample_weight may be on disk or in memory. Or give only x: an iterable of batches (x, y)
    or (x, y, weight), or a function that returns a new iterable for each epoch. Samples of batches without weights have
    the weight 1. For several inputs or outputs, give lists of arrays, or dicts by name, in place of arrays.

    A thread reads arrays ahead of the training, in blocks of `block` adjacent samples, into windows of about
    `window_bytes`. With shuffle=True blocks are read in a random order, and the samples of a window are permuted. So
    samples mix within a window only: if a file is sorted by class, make blocks small, or shuffle the file once. Up to
    four windows are in memory. Each window is checked when it is read.

    On the CPU, a NumPy array or memory map in the dtype of the model, or of integers, is used where it is, without
    copies of windows, unless its blocks are smaller than 256 KB or its targets larger than 64 MB. Then each block is
    checked once per run.

    Batches are used unchanged: batch_size and shuffle of fit have no effect on them.
    """

    def __init__(
        self, x: Any, y: Any = None, sample_weight: Any = None, block: int = 1024, window_bytes: int = 64 * 2**20
    ) -> None:
        for name, given in (("x", x), ("y", y), ("sample_weight", sample_weight)):
            for array in given.values() if isinstance(given, Mapping) else [given]:
                refuse_masked(array, f"Stream: {name}")
        self.x, self.y, self.sample_weight = x, y, sample_weight
        self.block, self.window_bytes = integer(self, "block", block), integer(self, "window_bytes", window_bytes)
        if not self.in_batches:
            arrays = _parts(x)
            if y is None or not arrays or not all(hasattr(a, "shape") and hasattr(a, "dtype") for a in arrays):
                raise ArgumentTypeError(
                    "Stream: give arrays x, with a shape, a dtype and slices, and y; or batches alone."
                )
            # y and sample_weight that are in memory, such as a list or a series, become arrays.
            count = _parts(x)[0].shape[:1]
            self.y, self.sample_weight = (
                _sliceable(a, name, count) for a, name in ((y, "y"), (sample_weight, "sample_weight"))
            )
            lengths = self.lengths()
            if len(set(lengths.values())) > 1 or not next(iter(lengths.values())):
                raise DataError(f"Stream: the arrays must have the same length, above 0, but have {lengths}.")
        elif not (callable(x) or isinstance(x, Iterable)):
            raise ArgumentTypeError(f"Stream: without y, give batches: an iterable of (x, y), not {type(x).__name__}.")
        elif callable(x) and not _takes_no_arguments(x):
            raise ArgumentTypeError(
                f"Stream: the function that returns the batches must take no arguments, unlike {x!r}."
            )
        elif sample_weight is not None:
            raise ArgumentError("Stream: give the weights of batches in the batches: (x, y, weight).")

    @property
    def in_batches(self) -> bool:
        """Whether this stream has batches rather than arrays."""
        return self.y is None and not hasattr(self.x, "shape")

    def __len__(self) -> int:
        return next(iter(self.lengths().values()))

    def lengths(self) -> dict[str, int]:
        """The present number of samples of each array."""
        lengths = {}
        for name, given in (("x", self.x), ("y", self.y), ("sample_weight", self.sample_weight)):
            for i, a in enumerate(parts := _parts(given)):
                if not has_length(a):
                    raise ArgumentTypeError(
                        f"Stream: {name} must have a first axis of known length, not shape {a.shape}."
                    )
                lengths[f"{name} {i}" if len(parts) > 1 else name] = length(a)
        return lengths

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample of the array x."""
        return tuple(self.array.shape[1:])

    @property
    def array(self) -> Any:
        """The array x. Raises ArgumentError for a stream of batches."""
        if self.in_batches:
            raise ArgumentError(
                "a stream of batches has neither a length nor a shape: give the model an input_shape, and give predict "
                "an array."
            )
        return self.x

    def batches(self, key: Sequence[int] | None) -> Any:
        """An iterable of the batches of one epoch. key: of the random numbers of this epoch; None without shuffling."""
        return self.x() if callable(self.x) else self.x

    @property
    def once(self) -> bool:
        """Whether these batches can be iterated only once."""
        return self.in_batches and not callable(self.x) and iter(self.x) is self.x


def as_stream(structure: Structure, x: Any, y: Any, sample_weight: Any, name: str = "x") -> tuple[Any, Any, Any]:
    """(Stream, None, None) for data that is not loaded into memory whole; other data unchanged.

    structure: of the model. The arrays of several inputs become a tuple.  name: what errors call x.
    """
    if isinstance(x, Stream):
        if y is not None or sample_weight is not None:
            raise ArgumentError("a Stream includes its targets and weights: give y and sample_weight to the Stream.")
        return x, None, None
    if y is None and not structure.has_arrays(x) and (callable(x) or isinstance(x, Iterable)):
        return Stream(x, y, sample_weight), None, None
    x = structure.of_inputs(x, name)
    if any(isinstance(a, numpy.memmap) and a.nbytes > _MAX_LOADED_BYTES for a in items(x)):
        return Stream(x, y, sample_weight), None, None
    return x, y, sample_weight


@dataclass
class RankWindow(Dataset):
    """One rank's rows of a window, in the order in which batches take them.

    rows: the length of the window, over all ranks.  starts: for each batch, by its place in the window, where its rows
    begin in the arrays.
    """

    rows: int
    starts: Mapping[int, int]

    def __len__(self) -> int:
        return self.rows

    def stored_rows(self, place: slice) -> slice:
        start = self.starts[place.start]
        return slice(start, start + place.stop - place.start)

    def weight(self, step: StepData) -> Array:
        backend, weights = step.work.context.backend, cast(Array, self.weights)
        xp, total = backend.xp, backend.zeros((1, *weights.shape[1:]), "float64")
        for first, size in zip(itertools.count(step.start, step.batch_size), step.batch_sizes, strict=False):
            own = step.group.rows_of(size)
            if own.start < own.stop:
                here = self.stored_rows(slice(first + own.start, first + own.stop))
                total += xp.sum(weights[here], axis=0, dtype=xp.float64)
        step.group.all_reduce(total)
        return total_weight(xp, total)


class StreamingDataset:
    """A stream that is read for one model. It yields steps and batches as `Dataset` does.

    prepare: checks the arrays of a window and moves them to the device of the model.  structure: of that model.
    """

    def __init__(
        self,
        stream: Stream,
        prepare: Callable[[Any, Any, Any, tuple[str, str]], Dataset],
        structure: Structure = Structure(),  # noqa: B008  # it cannot be changed
    ) -> None:
        self._stream, self._prepare, self._structure = stream, prepare, structure
        self._count = None if stream.in_batches else len(stream)
        if not stream.in_batches:
            self._x, self._y = structure.of_inputs(stream.x), structure.of_outputs(stream.y)
            self._weights = structure.of_weights(stream.sample_weight)
        self._whole: Dataset | None = None
        self._filled: set[tuple[int, int]] = set()  # the blocks of `_whole` that are checked and have their targets

    def refuse_unsupported(self, epochs: int, batch_size: int | None, resumed: bool) -> None:
        """Raise ArgumentError if this stream does not support these arguments of fit."""
        if self._stream.once and (epochs > 1 or resumed):
            what = "resumed" if resumed else f"iterated {epochs} times"
            raise ArgumentError(
                f"these batches come from an iterator, which cannot be {what}: give a list, or a function that returns "
                "a new iterator for each epoch."
            )
        if batch_size is None and not self._stream.in_batches:
            raise ArgumentError("batch_size=None would load the whole stream into memory: give a number.")

    @property
    def samples(self) -> int | None:
        """The number of samples; None for batches, whose number is not known in advance."""
        return self._count

    def steps(
        self,
        work: Workspace,
        batch_size: int,
        accumulate: int,
        key: Sequence[int] | None,
        first: int = 0,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> Generator[StepData]:
        """One epoch from sample `first` on, in steps of `accumulate` batches.

        key: seeds the order of blocks and, with the number of the window, its permutation; None keeps the order.
        """
        uploads = work.context.backend.uploads()
        if self._stream.in_batches:
            for (x, y, weights), largest, where in _read_ahead(self._joined(accumulate, first, key)):
                with uploads.prefetch(), _placed(where):
                    dataset = self._prepare(x, y, weights, ("x of a batch", "y of a batch"))
                yield from dataset.steps(work, largest, accumulate, None, 0, group)
                uploads.release(*dataset.arrays.values())
            return
        windows = self._windows(batch_size * accumulate, key)
        keys = [None if key is None else [*key, number] for number in range(len(windows))]

        def read_window(number: int) -> tuple[int, _RankRows | None, list[Any]]:
            part = _rank_rows(_length(windows[number]), batch_size, keys[number], group)
            return number, part, self._read(windows[number], part)

        begun, skipped = divmod(first, _length(windows[0]))
        on_host = work.context.backend.xp is numpy
        if on_host and group.size == 1 and (whole := self._in_place(windows[0][0])) is not None:
            for number, new in enumerate(_read_ahead(map(self._load, windows[begun:])), begun):
                self._fill(whole, new)
                order = numpy.concatenate([numpy.arange(block.start, block.stop) for block in windows[number]])
                if (order_key := keys[number]) is not None and len(order) > batch_size:
                    order = order[numpy.random.default_rng(order_key).permutation(len(order))]
                for start in range(skipped, len(order), batch_size * accumulate):
                    rows = min(batch_size * accumulate, len(order) - start)
                    yield StepData(whole, work, order, start, rows, batch_size, group)
                skipped = 0
            return
        for number, part, (x, y, weights) in _read_ahead(map(read_window, range(begun, len(windows)))):
            where = f" in the window that begins with sample {windows[number][0].start}"
            with uploads.prefetch():
                dataset = self._prepare(x, y, weights, (f"x{where}", f"y{where}"))
            if part is not None:  # its rows are in the order of the batches already
                dataset = RankWindow(**vars(dataset), rows=_length(windows[number]), starts=part.starts)
            order_key = keys[number] if part is None else None
            yield from dataset.steps(work, batch_size, accumulate, order_key, skipped, group)
            uploads.release(*dataset.arrays.values())
            skipped = 0

    def digest(self) -> str:
        """The layout of the stream, to check that all ranks have the same data."""
        if self._stream.in_batches:
            return "batches"
        return ", ".join(f"{a.dtype} {tuple(a.shape)}" for a in items(self._x))

    def batches(self, work: Workspace, batch_size: int | None, group: ProcessGroup = SINGLE_PROCESS) -> Iterator[Batch]:
        """All samples once, in order; of each batch, the rows of this rank. batch_size: None is 1024."""
        for step in self.steps(work, batch_size or EVALUATION_BATCH, 1, None, 0, group):
            yield from step.batches()

    def _windows(self, multiple: int, key: Sequence[int] | None) -> list[list[slice]]:
        """The blocks of each window, in the order of the epoch. All windows but the last consist of whole steps."""
        stream, count = self._stream, self._count or 0
        if set(lengths := stream.lengths().values()) != {count}:
            raise DataError(f"Stream: the arrays had {count} samples when this run began, but now have {[*lengths]}.")
        block = max(1, round(stream.block / multiple)) * multiple
        starts = numpy.arange(count // block)
        if key is not None:
            starts = numpy.random.default_rng([*key, _BLOCKS]).permutation(starts)
        blocks = [slice(int(i) * block, int(i + 1) * block) for i in starts]
        per_window = max(1, stream.window_bytes // (block * sum(map(sample_bytes, items(self._x)))))
        windows = [blocks[i : i + per_window] for i in range(0, len(blocks), per_window)] or [[]]
        if count % block:
            windows[-1].append(slice(count - count % block, count))
        return windows

    def _in_place(self, block: slice) -> Dataset | None:
        """The whole stream as one dataset, whose x is the array of the stream itself; None if it has to be copied.

        Batches are then gathered from that array, such as a mapped file, and no window is copied. The model must take
        its rows as they are: in its dtype or as integers. Targets and weights are in memory; a block is checked, and
        its targets are filled in, before its first use.
        """
        x, count = self._x, self._count or 0
        if not (isinstance(x, numpy.ndarray) and x.flags.c_contiguous and x.flags.aligned):
            return None
        if x[block].nbytes < _MIN_BLOCK_IN_PLACE:
            return None
        if self._whole is None:
            one = slice(block.start, block.start + 1)
            first = self._prepare_block(one, self._targets(one))
            if not (isinstance(first.x, numpy.ndarray) and numpy.may_share_memory(first.x, x)):
                return None
            if count * sum(a.nbytes for name, a in first.arrays.items() if name != "x") > _MAX_LOADED_BYTES:
                return None
            self._whole = dataclasses.replace(
                first,
                **first.replaced(
                    lambda name, a: numpy.asarray(x) if name == "x" else numpy.empty((count, *a.shape[1:]), a.dtype)
                ),
            )
        return self._whole

    def _load(self, window: Sequence[slice]) -> list[tuple[slice, tuple[Any, Any]]]:
        """(block, its y and weights) for each new block. Brings the x of all into memory, if x is a mapped file."""
        for block in window:
            pages = numpy.asarray(self._x)[block].reshape(-1).view(numpy.uint8)[:: mmap.PAGESIZE]
            pages.max()  # reads a byte of each page
        new = [block for block in window if (block.start, block.stop) not in self._filled]
        return [(block, self._targets(block)) for block in new]

    def _fill(self, whole: Dataset, new: Sequence[tuple[slice, tuple[Any, Any]]]) -> None:
        """Check these blocks, and put their targets and weights into the whole dataset."""
        for block, given in new:
            values = self._prepare_block(block, given).arrays
            for name, kept in whole.arrays.items():
                if name != "x":
                    kept[block] = values[name]
            self._filled.add((block.start, block.stop))

    def _targets(self, block: slice) -> tuple[Any, Any]:
        """y and weights of a block."""
        y = each(lambda a: read(a, block, "y"), self._y)
        return y, each(lambda a: None if a is None else read(a, block, "sample_weight"), self._weights)

    def _prepare_block(self, block: slice, targets: tuple[Any, Any]) -> Dataset:
        where = f" in the block that begins with sample {block.start}"
        return self._prepare(numpy.asarray(self._x)[block], *targets, (f"x{where}", f"y{where}"))

    def _read(self, window: Sequence[slice], part: "_RankRows | None") -> list[Any]:
        """x, y and weights of these blocks, or of a rank's rows of them, concatenated in memory."""
        places: list[Any] = list(window)
        order: Any = slice(None)
        if part is not None:
            wanted = numpy.sort(part.rows)  # in the order on disk, in which reading is fastest
            order, places, offset = numpy.searchsorted(wanted, part.rows), [], 0
            for block in window:
                end = offset + block.stop - block.start
                places.append(wanted[(wanted >= offset) & (wanted < end)] - offset + block.start)
                offset = end
            places = [rows for rows in places if len(rows)]

        def joined(name: str, a: Any) -> Any:
            return None if a is None else numpy.concatenate([read(a, place, name) for place in places])[order]

        arrays = {"x": self._x, "y": self._y, "sample_weight": self._weights}
        return [each(functools.partial(joined, name), a) for name, a in arrays.items()]

    def _joined(self, accumulate: int, first: int, key: Sequence[int] | None) -> Iterator[tuple[list[Any], int, str]]:
        """(x, y and weights of the batches of a step, the size of the largest, "batch 3"), from sample `first` on."""
        source = self._stream.batches(key)
        if not isinstance(source, Iterable):
            raise ArgumentTypeError(f"Stream: the function must return an iterable of batches, not {source!r}.")
        batches = _checked_batches(source, self._structure)
        seen, number, any_batch = 0, 0, first > 0
        while seen < first:
            batch = next(batches, None)
            if batch is None:
                raise DataError(
                    f"the stream ends after {seen} samples, before the position of the checkpoint, {first}."
                )
            seen += _samples(batch)
            number += 1
        while together := list(itertools.islice(batches, accumulate)):
            any_batch = True
            if any(len(batch) == 3 for batch in together):  # samples without a weight count once
                together = [[*batch, numpy.ones(_samples(batch))][:3] for batch in together]
            arrays = [_joined(values) for values in zip(*together, strict=True)]
            where = f"batch {number + 1}" + (f" to {number + len(together)}" if len(together) > 1 else "")
            number += len(together)
            yield [*arrays, None][:3], max(map(_samples, together)), where
        if not any_batch:
            raise DataError("the stream gave no batches.")


AnyDataset: TypeAlias = Dataset | StreamingDataset


class _RankRows(NamedTuple):
    """A rank's rows of a window, in the order in which its batches take them; and where each batch begins."""

    rows: numpy.ndarray[Any, Any]
    starts: dict[int, int]


def _length(window: Sequence[slice]) -> int:
    return sum(block.stop - block.start for block in window)


def _rank_rows(rows: int, batch_size: int, key: Sequence[int] | None, group: ProcessGroup) -> _RankRows | None:
    """What this rank reads of a window of `rows`; None for a single process, which reads all of it.

    A rank without rows reads one row, to learn the layout.
    """
    if group.size == 1:
        return None
    order = numpy.arange(rows)
    if key is not None and rows > batch_size:
        order = numpy.random.default_rng(key).permutation(rows)
    own, starts, count = [], {}, 0
    for start in range(0, rows, batch_size):
        part = group.rows_of(min(batch_size, rows - start))
        if part.start < part.stop:
            starts[start + part.start] = count
            own.append(order[start + part.start : start + part.stop])
            count += len(own[-1])
    return _RankRows(numpy.concatenate(own) if own else order[:1], starts)


def _joined(values: Sequence[Any]) -> Any:
    """The arrays of several batches as one. Weights may be those of all outputs in some of the batches."""
    outputs = next((len(value) for value in values if isinstance(value, tuple)), 0)
    if not outputs:
        return numpy.concatenate(values)
    tuples = [value if isinstance(value, tuple) else (value,) * outputs for value in values]
    return tuple(map(numpy.concatenate, zip(*tuples, strict=True)))


def _samples(batch: Sequence[Any]) -> int:
    return len(items(batch[0])[0])


def _checked_batches(source: Iterable[Any], structure: Structure) -> Iterator[list[Any]]:
    """The batches as arrays. Raises DataError if the samples of one do not have the shape of those before it."""
    shapes: dict[tuple[str, int], tuple[int, ...]] = {}
    for number, batch in enumerate(source, 1):
        with _placed(f"batch {number}"):
            arrays = _as_batch(batch, structure)
            for name, value in zip(("x", "y", "weight"), arrays, strict=False):
                for k, a in enumerate(items(value)):
                    before = shapes.setdefault((name, k), a.shape[1:])
                    if a.shape[1:] != before:
                        raise DataError(
                            f"a sample of {name} has shape {a.shape[1:]}, but in the batches before, {before}."
                        )
        yield arrays


@contextlib.contextmanager
def _placed(where: str) -> Iterator[None]:
    """Put the place in the stream before the messages of errors about its data."""
    try:
        yield
    except (ArgumentError, ArgumentTypeError) as error:
        raise type(error)(f"{where} of the stream: {error}") from error


def _as_batch(batch: Any, structure: Structure) -> list[Any]:
    if not isinstance(batch, list | tuple) or len(batch) not in (2, 3):
        raise ArgumentTypeError(f"Stream: each batch must be (x, y) or (x, y, weight), not {type(batch).__name__}.")
    given = [("x", structure.of_inputs(batch[0])), ("y", structure.of_outputs(batch[1]))]
    if any(a is None for _, value in given for a in items(value)):
        raise ArgumentTypeError("Stream: a batch has None in place of inputs or targets.")
    if len(batch) == 3 and batch[2] is not None:
        given.append(("weight", structure.of_weights(batch[2])))

    def converted(name: str, a: Any) -> Any:
        return None if a is None else host_array(a, f"{name} of a batch")

    arrays = [each(functools.partial(converted, name), value) for name, value in given]
    first = items(arrays[0])[0]
    if first.ndim == 0 or len(first) == 0:
        raise DataError("Stream: a batch is empty.")
    return [each(lambda a: numpy.ones(len(first)) if a is None else a, value) for value in arrays]


def _takes_no_arguments(function: Any) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # of some functions in C
        pass
    return True


def _parts(given: Any) -> list[Any]:
    """The arrays of an argument: one, or those of several inputs or outputs."""
    if isinstance(given, Mapping):
        return list(given.values())
    if isinstance(given, list | tuple):
        return [a for a in given if a is not None]
    return [] if given is None else [given]


def _sliceable(a: Any, name: str, count: Any) -> Any:
    """An array that can be sliced by position, or several. count: (N,), the first axis of each."""
    if isinstance(a, Mapping):
        return {key: _sliceable(one, name, count) for key, one in a.items()}
    if isinstance(a, list | tuple) and a and all(one is None or getattr(one, "shape", ())[:1] == count for one in a):
        return [_sliceable(one, name, count) for one in a]
    if a is None or (hasattr(a, "shape") and hasattr(a, "__getitem__") and not hasattr(a, "iloc")):
        return a
    return host_array(a, name)


def _read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; a thread makes the next ones while the caller uses the current one."""
    end: Any = object()
    refuse_without_memory()
    with ThreadPoolExecutor(1, thread_name_prefix="xpnet-stream") as reader:
        waiting = deque(reader.submit(next, items, end) for _ in range(_READ_AHEAD))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(reader.submit(next, items, end))
            yield item
