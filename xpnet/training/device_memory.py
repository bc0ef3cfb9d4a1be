"""A shortage of memory in a model's call, explained; and the memory that the call has left behind, freed."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from xpnet.backends.shortage import is_shortage, shortage
from xpnet.data.sources import length
from xpnet.layers.containers import Container
from xpnet.layers.structure import first_of


@contextlib.contextmanager
def explaining_memory_errors(
    model: Container, batch_size: int | None, training: bool = False, samples: int | None = None
) -> Iterator[None]:
    """Turn a shortage of memory in a call with batches into DeviceMemoryError, which says what to try.

    batch_size: of the call; None is all samples.  samples: their number, if it is known.
    """
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        _free(model)
        largest = min((n for n in (batch_size, samples) if n is not None), default=None)
        smaller = 128 if largest is None else max(1, largest // 2)
        remedy = f"try batch_size={smaller}" if smaller != batch_size else "move it to a device with more"
        if training and smaller != batch_size and batch_size is not None:
            remedy += ", with accumulate=2 for as many samples per update"
        raise shortage(_what(model, f"batch_size={batch_size}: {remedy}", error), error, model.backend) from error


@contextlib.contextmanager
def explaining_memory_errors_of(model: Container, samples: int, what: str = "samples") -> Iterator[None]:
    """The same for a call that takes all its samples at once."""
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        _free(model)
        remedy = f"give fewer at a time, such as {samples // 2}" if samples > 1 else "move it to a device with more"
        raise shortage(_what(model, f"{samples} {what}: {remedy}", error), error, model.backend) from error


def samples_of(x: Any) -> int | None:
    """The number of samples of an argument, if it is known before it is checked."""
    with contextlib.suppress(Exception):
        return length(first_of(list(x.values()) if isinstance(x, Mapping) else x) if _is_several(x) else x)
    return None


def _is_several(x: Any) -> bool:
    """Whether an argument consists of several arrays."""
    return isinstance(x, Mapping) or (isinstance(x, list | tuple) and len(x) > 0 and hasattr(x[0], "shape"))


def _what(model: Container, of: str, error: BaseException) -> str:
    name = model.backend.name if model.backend.out_of_memory(error) else "the host"
    return f"{name} does not have enough memory for {of}"


def _free(model: Container) -> None:
    """Free the buffers of passes, which may have grown for the batch that did not fit."""
    with contextlib.suppress(Exception):
        context = model.context
        context.exclusively(model.drop_workspaces, inference_only=context.guard.in_training)
        if not context.guard.in_training:
            context.forward_thread = 0
        context.backend.free_memory()
