"""Memory for threads: Python waits for ever for a thread that runs out of memory in its first steps."""

import mmap

_FIRST_STEPS = 2**22  # bytes, more than a new thread takes


def refuse_without_memory() -> None:
    """Raise MemoryError if there is no memory for the first steps of a thread."""
    try:
        mmap.mmap(-1, _FIRST_STEPS).close()  # new pages: Python's own allocator does not use freed ones of malloc
    except OSError as error:
        raise MemoryError("there is no memory to start a thread") from error
