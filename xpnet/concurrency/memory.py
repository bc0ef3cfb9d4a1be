"""A check before calls that, without memory, would wait for ever or end the process: new threads, LLVM, safetensors."""

import mmap

_OF_A_THREAD = 2**22  # bytes, more than a new thread takes in its first steps


def refuse_without_memory(size: int = _OF_A_THREAD) -> None:
    """Raise MemoryError if the system does not give this process `size` more bytes. The default is for a new thread."""
    try:
        mmap.mmap(-1, max(size, 1)).close()  # new pages, since not every library can use what malloc has freed
    except OSError as error:
        raise MemoryError(f"Unable to allocate {size / 2**20:.3g} MiB") from error
