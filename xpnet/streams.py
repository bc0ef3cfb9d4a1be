"""Data that does not fit into memory: read in windows, in a thread, while the model trains on the window before."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy

from xpnet.backends.cpu import to_host
from xpnet.data import Batch, Samples, Update
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError
from xpnet.layers.base import Workspace

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
        self, work: Workspace, size: int, accumulate: int, key: Sequence[int] | None, first: int = 0
    ) -> Generator[Update]:
        """An epoch in batches of `size`, so many to an update, from sample `first` on.

        key: seeds the order of blocks, and, with its number, the permutation of each window; None keeps the order.
        """
        uploads = work.context.backend.uploads()
        if self._stream.in_batches:
            for (x, y, weights), largest in _ahead(self._joined(accumulate, first)):
                with uploads.ahead():
                    samples = self._prepare(x, y, weights, ("x of a batch", "y of a batch"))
                yield from samples.updates(work, largest, accumulate, None)
                uploads.used(*samples.arrays)
            return
        windows = self._windows(size * accumulate, key)
        rows = sum(block.stop - block.start for block in windows[0])
        begun, skipped = divmod(first, rows)
        for number, (x, y, weights) in enumerate(_ahead(self._read(window) for window in windows[begun:]), begun):
            where = f" in the window that begins with sample {windows[number][0].start}"
            with uploads.ahead():
                samples = self._prepare(x, y, weights, (f"x{where}", f"y{where}"))
            yield from samples.updates(work, size, accumulate, None if key is None else [*key, number], skipped)
            uploads.used(*samples.arrays)
            skipped = 0

    def batches(self, work: Workspace, size: int) -> Iterator[Batch]:
        """Everything once, in its order."""
        for update in self.updates(work, size, 1, None):
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

    def _read(self, window: Sequence[slice]) -> list[Any]:
        """x, y and weights of these blocks, side by side in memory."""
        return [
            None if a is None else numpy.concatenate([numpy.asarray(to_host(a[block])) for block in window])
            for a in (self._stream.x, self._stream.y, self._stream.sample_weight)
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
