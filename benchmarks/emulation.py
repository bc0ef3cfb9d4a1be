"""Run a program with an emulated GPU and few of MNIST's images, to see without a GPU that it works.

    python -m benchmarks.emulation benchmarks.profile --nets mlp --batch 8
    python -m benchmarks.emulation examples/mnist.py --backend gpu

No time that it tells means anything.
"""

import runpy
import sys
from collections.abc import Callable
from typing import Any

import numpy

import xpnet
from benchmarks.versions import ROOT
from xpnet import datasets, errors

FEW = (256, 64)  # images of MNIST, for training and for the test


def substitute(gpu: Any, put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let `get_backend("gpu")` give `gpu`, in all modules of xpnet that are loaded."""
    real = xpnet.get_backend

    def get_backend(backend: Any = "auto") -> Any:
        return gpu if backend == "gpu" else real(backend)

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "xpnet" and vars(module).get("get_backend") is real:
            put(module, "get_backend", get_backend)


def few_images(mnist: Callable[..., datasets.Split]) -> Callable[..., datasets.Split]:
    """`datasets.mnist`, with few images; noise where the files are not there."""

    def load(data_dir: Any = None) -> datasets.Split:
        try:
            return datasets.Split(
                *(datasets.Samples(x[:n], y[:n]) for (x, y), n in zip(mnist(data_dir), FEW, strict=True))
            )
        except (errors.FileError, errors.DownloadError):
            rng = numpy.random.default_rng(0)
            return datasets.Split(
                *(
                    datasets.Samples(rng.integers(256, size=(n, 28, 28), dtype="uint8"), rng.integers(10, size=n))
                    for n in FEW
                )
            )

    return load


def main(program: str, *arguments: str) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
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
