"""Out-of-memory errors of a device, explained."""

import contextlib
from collections.abc import Iterator

from xpnet.errors import DeviceMemoryError
from xpnet.layers.containers import Container


@contextlib.contextmanager
def explaining_memory_errors(model: Container, batch_size: int | None, training: bool = False) -> Iterator[None]:
    """Turn an out-of-memory error of the model's device into DeviceMemoryError, which says what to try."""
    try:
        yield
    except Exception as error:
        if not model.backend.out_of_memory(error):
            raise
        free, total = model.backend.memory()[2:]
        smaller = 128 if batch_size is None else max(1, batch_size // 2)
        remedy = f"try batch_size={smaller}" if smaller != batch_size else "move it to a device with more"
        if training and smaller != batch_size and batch_size is not None:
            remedy += ", with accumulate=2 for as many samples per update"
        raise DeviceMemoryError(
            f"{model.backend.name} does not have enough memory for batch_size={batch_size}: {remedy}. Of its "
            f"{(total or 0) / 2**30:.1f} GiB, {(free or 0) / 2**30:.1f} GiB are free; backend.free_memory() frees "
            "what CuPy caches."
        ) from error
