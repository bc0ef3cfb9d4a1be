"""Data that does not fit into memory: read in windows, in a thread, while the model trains on the window before."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import numpy

from xpnet.backends import Array
from xpnet.backends.cpu import to_host
from xpnet.data import Batch, Samples, Update, total_weight
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError
from xpnet.layers.base import Workspace
from xpnet.ranks import ALONE, Ranks

T = TypeVar("T")

_READ_AHEAD = 2  # windows or batches: one may be ready while the next is being read
_BLOCKS = 2**32 - 1  # the number, in seeds, of what is not a window
_SMALL = 64 * 2**20  # bytes of an array on disk that is taken into memory whole


class Stream:
    """Samples that stay where they are until they are needed, for `fit`, `evaluate` and `predict`.

    x: an array on disk, (N, ...): a `numpy.memmap`, an HDF5 dataset, anything with shape, dtype and slices; with y, and
    perhaps sample_weight, alike, in memory or not. Or batches, without y: an iterable of (x, y) or (x, y, weight); or a
    function that returns a new one for each epoch.

    Of an array, blocks of `block` samples that lie side by side are read into a window of about `window_bytes`, in a
    thread, ahead of the training. With shuffle=True blocks come in a random order and the samples of a window are
    mixed. The window is how far samples mix: of a file sorted by class make blocks small, or shuffle the file once.
    Up to four windows are in memory. Everything is checked as it comes, a window at a time.

    Batches are trained on as they come: fit's batch_size and shuffle do not touch them.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        block: int = 1024,
        window_bytes: int = 64 * 2**20,
    ) -> None:
        for name, value in (("block", block), ("window_bytes", window_bytes)):
            if isinstance(value, bool) or not isinstance(value, int | numpy.integer) or value < 1:
                raise ArgumentError(f"Stream: {name} must be a whole number of at least 1, not {value!r}.")
        self.x, self.y, self.sample_weight = x, y, sample_weight
        self.block, self.window_bytes = int(block), int(window_bytes)
        if not self.in_batches:
            if not (hasattr(x, "shape") and hasattr(x, "dtype") and y is not None):
                raise ArgumentTypeError(
                    "Stream: give arrays x, with a shape, a dtype and slices, and y; or batches alone."
                )
            arrays = {"x": x, "y": y, "sample_weight": sample_weight}
            lengths = {name: len(a) for name, a in arrays.items() if a is not None}
            if len(set(lengths.values())) > 1 or not len(x):
                raise DataError(f"Stream: the arrays must have one length, above 0, but there are {lengths}.")
        elif not (callable(x) or isinstance(x, Iterable)):
            raise ArgumentTypeError(f"Stream: without y, give batches: an iterable of (x, y), not {type(x).__name__}.")
        elif sample_weight is not None:
            raise ArgumentError("Stream: the weights of batches come with them: (x, y, weight).")

    @property
    def in_batches(self) -> bool:
        """Whether this holds batches, rather than arrays."""
        return self.y is None and not hasattr(self.x, "shape")

    def __len__(self) -> int:
        """How many samples."""
        return len(self.array)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample's x."""
        return tuple(self.array.shape[1:])

    @property
    def array(self) -> Any:
        """The array x. Raises ArgumentError where there is none, but batches."""
        if self.in_batches:
            raise ArgumentError(
                "a stream of batches tells neither its length nor a shape: give the model an input_shape; and predict "
                "takes arrays."
            )
        return self.x

    @property
    def once(self) -> bool:
        """Whether these batches can be gone through only once."""
        return self.in_batches and not callable(self.x) and iter(self.x) is self.x


def streamed(x: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
    """The same three; or where they are not to be taken into memory whole, a Stream of them, None and None."""
    if isinstance(x, Stream):
        if y is not None or sample_weight is not None:
            raise ArgumentError("a Stream holds its targets and weights: give y and sample_weight to the Stream.")
    elif isinstance(x, numpy.memmap):
        if x.nbytes <= _SMALL:
            return x, y, sample_weight
        x = Stream(x, y, sample_weight)
    elif y is None and not hasattr(x, "shape") and (callable(x) or isinstance(x, Iterable)):
        x = Stream(x, None, sample_weight)
    else:
        return x, y, sample_weight
    return x, None, None


@dataclass
class Share(Samples):
    """One rank's rows of a window, in the order in which batches take them.

    rows: of the window, over all ranks.  starts: of each batch, by its place in the window, where its rows lie here.
    """

    rows: int
    starts: Mapping[int, int]

    def __len__(self) -> int:
        return self.rows

    def rows_at(self, place: slice) -> slice:
        start = self.starts[place.start]
        return slice(start, start + place.stop - place.start)

    def weight(self, update: Update) -> Array:
        backend, weights = update.work.context.backend, cast(Array, self.weights)
        xp, total = backend.xp, backend.zeros((1,), "float64")
        for first in range(update.start, update.start + update.rows, update.size):
            own = update.ranks.share(min(update.size, update.start + update.rows - first))
            if own.start < own.stop:
                here = self.rows_at(slice(first + own.start, first + own.stop))
                total += xp.sum(weights[here], dtype=xp.float64)
        update.ranks.add_up(total)
        return total_weight(xp, total)


class Streamed:
    """A stream on its way into one model. `prepare` checks a window, and puts it where the model is.

    It gives updates as `Samples` does.
    """

    def __init__(self, stream: Stream, prepare: Callable[[Any, Any, Any, tuple[str, str]], Samples]) -> None:
        self._stream, self._prepare = stream, prepare

    def refuse_what_cannot_be(self, epochs: int, batch_size: int | None, resumed: bool) -> None:
        """Raise ArgumentError for what this stream cannot do."""
        if self._stream.once and (epochs > 1 or resumed):
            what = "resumed" if resumed else f"gone through {epochs} times"
            raise ArgumentError(
                f"these batches come from an iterator, which cannot be {what}: give a list, or a function that returns "
                "a new iterator for each epoch."
            )
        if batch_size is None and not self._stream.in_batches:
            raise ArgumentError("batch_size=None would take the whole stream into memory: give a number.")

    @property
    def samples(self) -> int | None:
        """How many; None for batches, which are not counted beforehand."""
        return None if self._stream.in_batches else len(self._stream.x)

    def updates(
        self,
        work: Workspace,
        size: int,
        accumulate: int,
        key: Sequence[int] | None,
        first: int = 0,
        ranks: Ranks = ALONE,
    ) -> Generator[Update]:
        """An epoch in batches of `size`, so many to an update, from sample `first` on.

        key: seeds the order of blocks, and, with its number, the permutation of each window; None keeps the order.
        """
        uploads = work.context.backend.uploads()
        if self._stream.in_batches:
            for (x, y, weights), largest in _ahead(self._joined(accumulate, first)):
                with uploads.ahead():
                    samples = self._prepare(x, y, weights, ("x of a batch", "y of a batch"))
                yield from samples.updates(work, largest, accumulate, None, 0, ranks)
                uploads.used(*samples.arrays)
            return
        windows = self._windows(size * accumulate, key)
        begun, skipped = divmod(first, _rows_of(windows[0]))
        keys = [None if key is None else [*key, number] for number in range(len(windows))]
        shares = [_share(_rows_of(window), size, keys[i], ranks) for i, window in enumerate(windows)]
        read = _ahead(self._read(windows[i], shares[i]) for i in range(begun, len(windows)))
        for number, (x, y, weights) in enumerate(read, begun):
            where, share = f" in the window that begins with sample {windows[number][0].start}", shares[number]
            with uploads.ahead():
                samples = self._prepare(x, y, weights, (f"x{where}", f"y{where}"))
            if share is not None:
                samples = Share(**vars(samples), rows=_rows_of(windows[number]), starts=share.starts)
            own_order = keys[number] if share is None else None
            yield from samples.updates(work, size, accumulate, own_order, skipped, ranks)
            uploads.used(*samples.arrays)
            skipped = 0

    def digest(self) -> str:
        """The layout of the stream, to tell whether others have the same."""
        return "batches" if self._stream.in_batches else f"{self._stream.x.dtype} {tuple(self._stream.x.shape)}"

    def batches(self, work: Workspace, size: int, ranks: Ranks = ALONE) -> Iterator[Batch]:
        """Everything once, in its order; of each batch the rows of this rank."""
        for update in self.updates(work, size, 1, None, 0, ranks):
            yield from update.batches()

    def _windows(self, multiple: int, key: Sequence[int] | None) -> list[list[slice]]:
        """The blocks of each window, in the order of the epoch. All windows but the last hold whole updates."""
        stream, count = self._stream, len(self._stream.x)
        block = max(1, round(stream.block / multiple)) * multiple
        starts = numpy.arange(count // block)
        if key is not None:
            starts = numpy.random.default_rng([*key, _BLOCKS]).permutation(starts)
        blocks = [slice(int(i) * block, int(i + 1) * block) for i in starts]
        sample_bytes = stream.x.dtype.itemsize * math.prod(stream.x.shape[1:])
        together = max(1, stream.window_bytes // (block * max(1, sample_bytes)))
        windows = [blocks[i : i + together] for i in range(0, len(blocks), together)] or [[]]
        if count % block:
            windows[-1].append(slice(count - count % block, count))
        return windows

    def _read(self, window: Sequence[slice], share: "_Places | None") -> list[Any]:
        """x, y and weights of these blocks, or of a share of their rows, side by side in memory."""
        arrays = (self._stream.x, self._stream.y, self._stream.sample_weight)
        if share is None:
            return [
                None if a is None else numpy.concatenate([numpy.asarray(to_host(a[block])) for block in window])
                for a in arrays
            ]
        wanted = numpy.sort(share.rows)  # in the order in which they lie, which a disk likes
        back, parts, offset = numpy.searchsorted(wanted, share.rows), [], 0
        for block in window:
            end = offset + block.stop - block.start
            parts.append(wanted[(wanted >= offset) & (wanted < end)] - offset + block.start)
            offset = end
        return [
            None
            if a is None
            else numpy.concatenate([numpy.asarray(to_host(a[rows])) for rows in parts if len(rows)])[back]
            for a in arrays
        ]

    def _joined(self, accumulate: int, first: int) -> Iterator[tuple[list[Any], int]]:
        """(x, y and weights of so many batches as one, the size of the largest), from sample `first` on."""
        source = self._stream.x() if callable(self._stream.x) else self._stream.x
        if not isinstance(source, Iterable):
            raise ArgumentTypeError(f"Stream: the function must return an iterable of batches, not {source!r}.")
        batches = (_as_batch(batch) for batch in source)
        seen = 0
        while seen < first:
            batch = next(batches, None)
            if batch is None:
                raise DataError(f"the stream ends after {seen} samples, before the place of the checkpoint, {first}.")
            seen += len(batch[0])
        given = first > 0
        while group := list(itertools.islice(batches, accumulate)):
            given = True
            if len({len(batch) for batch in group}) > 1:
                raise DataError("Stream: some batches come with weights, and some without.")
            arrays = [numpy.concatenate([batch[i] for batch in group]) for i in range(len(group[0]))]
            yield [*arrays, None][:3], max(len(batch[0]) for batch in group)
        if not given:
            raise DataError("the stream gave no batches.")


class _Places(NamedTuple):
    """A rank's rows of a window, in the order in which its batches take them; and where each batch's begin."""

    rows: numpy.ndarray[Any, Any]
    starts: dict[int, int]


def _rows_of(window: Sequence[slice]) -> int:
    return sum(block.stop - block.start for block in window)


def _share(rows: int, size: int, key: Sequence[int] | None, ranks: Ranks) -> _Places | None:
    """What this rank reads of a window of so many rows, in batches of `size`; None where it is alone and reads all.

    Of a window in which it has nothing it reads one row all the same, for the sake of its layout.
    """
    if ranks.size == 1:
        return None
    order = numpy.arange(rows)
    if key is not None and rows > size:
        order = numpy.random.default_rng(key).permutation(rows)
    own, starts, count = [], {}, 0
    for start in range(0, rows, size):
        part = ranks.share(min(size, rows - start))
        if part.start < part.stop:
            starts[start + part.start] = count
            own.append(order[start + part.start : start + part.stop])
            count += len(own[-1])
    return _Places(numpy.concatenate(own) if own else order[:1], starts)


def _as_batch(batch: Any) -> list[Any]:
    if not isinstance(batch, list | tuple) or len(batch) not in (2, 3):
        raise ArgumentTypeError(f"Stream: each batch must be (x, y) or (x, y, weight), not {type(batch).__name__}.")
    arrays = [numpy.asarray(to_host(a)) for a in batch]
    if arrays[0].ndim == 0 or len(arrays[0]) == 0:
        raise DataError("Stream: a batch is empty.")
    return arrays


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """These items, each made in a thread while the ones before are used."""
    end: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="xpnet-stream") as reader:
        waiting = deque(reader.submit(next, items, end) for _ in range(_READ_AHEAD))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(reader.submit(next, items, end))
            yield item
