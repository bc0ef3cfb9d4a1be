"""xpnet: neural networks written once against an array module `xp`, NumPy on the CPU and CuPy on a CUDA GPU."""

from typing import Any

from xpnet import (
    augment,
    callbacks,
    datasets,
    errors,
    initializers,
    layers,
    losses,
    metrics,
    optimizers,
    schedules,
)
from xpnet.backends import Backend, available_backends, get_backend
from xpnet.gradient_check import check_gradients
from xpnet.model import Sequential, load
from xpnet.run import History

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "History",
    "Sequential",
    "__version__",
    "augment",
    "available_backends",
    "callbacks",
    "check_gradients",
    "datasets",
    "errors",
    "get_backend",
    "initializers",
    "layers",
    "load",
    "losses",
    "metrics",
    "optimizers",
    "schedules",
]


def __getattr__(name: str) -> Any:
    """The rooms with extras of their own, opened where somebody asks for them."""
    from importlib import import_module

    if name in ("distributed", "estimators", "onnx", "plots"):
        return import_module(f"xpnet.{name}")
    if name in ("export_onnx", "import_onnx"):
        return getattr(import_module("xpnet.onnx"), name)
    raise AttributeError(f"module 'xpnet' has no attribute {name!r}")
