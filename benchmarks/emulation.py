"""Run a program with an emulated GPU and few images of MNIST, to test it without a GPU.

    python -m benchmarks.emulation benchmarks.profile --nets mlp --batch 8
    python -m benchmarks.emulation examples/mnist.py --backend gpu

The times that it prints mean nothing.
"""

import runpy
import sys
from collections.abc import Callable
from typing import Any

import numpy

import xpnet
from benchmarks.versions import ROOT
from xpnet import datasets, errors

FEW = (256, 64)  # training and test images of MNIST


def substitute(gpu: Any, set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Make `get_backend("gpu")` return `gpu`, in all imported modules of xpnet."""
    real = xpnet.get_backend

    def get_backend(backend: Any = "auto") -> Any:
        return gpu if backend == "gpu" else real(backend)

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "xpnet" and vars(module).get("get_backend") is real:
            set_attribute(module, "get_backend", get_backend)


def few_images(mnist: Callable[..., datasets.Split]) -> Callable[..., datasets.Split]:
    """A substitute for `datasets.mnist` with few images, or noise if the files are missing."""

    def load(data_dir: Any = None) -> datasets.Split:
        try:
            parts = [datasets.Samples(x[:n], y[:n]) for (x, y), n in zip(mnist(data_dir), FEW, strict=True)]
        except (errors.FileError, errors.DownloadError):
            rng = numpy.random.default_rng(0)
            shapes = [(n, 28, 28) for n in FEW]
            parts = [
                datasets.Samples(rng.integers(256, size=s, dtype="uint8"), rng.integers(10, size=s[0])) for s in shapes
            ]
        return datasets.Split(*parts)

    return load


def main(program: str, *arguments: str) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from emulated_cuda import EmulatedGPU

    substitute(EmulatedGPU())
    datasets.mnist = few_images(datasets.mnist)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
