"""Memory for what cannot be undone: Python waits for ever for a thread that has none for its first steps."""

import mmap

_OF_A_THREAD = 2**22  # bytes, more than a new thread takes in its first steps


def refuse_without_memory(size: int = _OF_A_THREAD) -> None:
    """Raise MemoryError if the system does not give this process `size` more bytes."""
    try:
        mmap.mmap(-1, size).close()  # new pages, since not everybody can use what malloc has freed
    except OSError as error:
        raise MemoryError(f"Unable to allocate {size >> 20} MiB") from error
