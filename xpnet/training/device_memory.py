"""Errors for a shortage of memory in a call of a model, which also free the buffers that the call has left."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from xpnet.backends.shortage import is_shortage, shortage
from xpnet.data.sources import length
from xpnet.layers.containers import Container

_MOVE = "move it to a device with more"


def explaining_memory_errors(
    model: Container, batch_size: int | None, training: bool = False, samples: int | None = None
) -> AbstractContextManager[None]:
    """A context that turns a shortage of memory in a call with batches into DeviceMemoryError, which says what to try.

    batch_size: of the call, perhaps not checked yet; None is all samples.  samples: their number, if it is known.
    """

    def need() -> str:
        largest = min((n for n in (batch_size, samples) if n is not None), default=None)
        smaller = 128 if largest is None else max(1, largest // 2)
        remedy = f"try batch_size={smaller}" if smaller != batch_size else _MOVE
        if training and smaller != batch_size and batch_size is not None:
            remedy += ", with accumulate=2 for as many samples per update"
        return f"batch_size={batch_size}: {remedy}"

    return _explaining(model, need)


def explaining_memory_errors_of(model: Container, samples: int, what: str = "samples") -> AbstractContextManager[None]:
    """The same for a call that takes all its samples at once."""
    remedy = f"give fewer at a time, such as {samples // 2}" if samples > 1 else _MOVE
    return _explaining(model, lambda: f"{samples} {what}: {remedy}")


@contextlib.contextmanager
def _explaining(model: Container, need: Callable[[], str]) -> Iterator[None]:
    """need: returns what the memory was needed for, and what to try."""
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        _free(model)
        place = model.backend.name if model.backend.out_of_memory(error) else "the host"
        raise shortage(f"{place} does not have enough memory for {need()}", error, model.backend) from error


def samples_of(x: Any) -> int | None:
    """The number of samples of an argument, if it is known before it is checked."""
    with contextlib.suppress(Exception):
        if isinstance(x, Mapping):
            x = next(iter(x.values()))
        elif isinstance(x, list | tuple) and hasattr(x[0], "shape"):  # several arrays
            x = x[0]
        return length(x)
    return None


def _free(model: Container) -> None:
    """Free the buffers of passes, which may have grown for the batch that did not fit."""
    with contextlib.suppress(Exception):
        context = model.context
        context.exclusively(model.drop_workspaces, inference_only=context.guard.in_training)
        if not context.guard.in_training:
            context.forward_thread = 0
        context.backend.free_memory()
