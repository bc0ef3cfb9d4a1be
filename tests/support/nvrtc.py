"""Compiles kernels as CuPy does, for any GPU, whether or not this machine has one."""

import pytest

from xpnet.backends.cuda.kernels import with_waits


def compiled(source, architecture, *options):
    """The machine code of the kernels in a source, for an architecture like 90. Skips the test without a compiler."""
    compiler = pytest.importorskip("cupy.cuda.compiler", reason="CuPy is not installed")
    program = compiler._NVRTCProgram(with_waits(source), "kernels.cu", method="cubin")
    try:
        cubin, _ = program.compile([f"-arch=sm_{architecture}", *options])
    except ImportError as error:  # CuPy's wheel does not include the compiler
        pytest.skip(f"NVRTC is not installed: {str(error).splitlines()[0]}")
    return cubin
