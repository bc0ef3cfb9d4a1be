"""xpnet: neural networks written once against an array module `xp`, NumPy on the CPU and CuPy on a CUDA GPU."""

from typing import TYPE_CHECKING

from xpnet import (
    augment,
    callbacks,
    distributed,
    errors,
    initializers,
    layers,
    losses,
    metrics,
    optimizers,
    schedules,
)
from xpnet import backends as _backends
from xpnet import config as _config
from xpnet import model as _model
from xpnet import parameters as _parameters
from xpnet._version import __version__
from xpnet.backends import Backend, available_backends, get_backend
from xpnet.callbacks import History
from xpnet.model import Input, Model, Sequential, check_gradients, explain, explain_step, generate, load

# Imported when they are first used: attribution and the datasets, because most programs need neither; and, not in
# __all__, what needs optional dependencies.
if TYPE_CHECKING:
    from xpnet import attribution as attribution
    from xpnet import datasets as datasets
    from xpnet import estimators as estimators
    from xpnet import onnx as onnx
    from xpnet import plots as plots
    from xpnet.onnx import export_onnx as export_onnx
    from xpnet.onnx import import_onnx as import_onnx

__all__ = ["Backend", "History", "Input", "Model", "Sequential", "__version__", "attribution", "augment",
           "available_backends", "callbacks", "check_gradients", "datasets", "distributed", "errors", "explain",
           "explain_step", "generate", "get_backend", "initializers", "layers", "load", "losses", "metrics",
           "optimizers", "schedules"]  # fmt: skip

_LAZY_MODULES = ("attribution", "datasets", "estimators", "onnx", "plots")
_LAZY_FUNCTIONS = ("export_onnx", "import_onnx")
_MACHINERY = ("config", "model", "parameters")
_PUBLIC = (*__all__, "estimators", "onnx", "plots", *_LAZY_FUNCTIONS, *_MACHINERY)

if not TYPE_CHECKING:  # a type checker that sees __getattr__ accepts every name, misspelled ones too
    for _module in (augment, callbacks, distributed, initializers, layers, losses, metrics, optimizers,
                    schedules, _backends, _config, _model, _parameters):  # fmt: skip
        _module.__getattr__, _module.__dir__ = errors.module_attributes(_module.__name__, _module.__all__)

    def _load(name: str) -> object:
        from importlib import import_module

        if name in _LAZY_MODULES:
            return import_module(f"xpnet.{name}")
        return getattr(import_module("xpnet.onnx"), name) if name in _LAZY_FUNCTIONS else None

    __getattr__, __dir__ = errors.module_attributes(__name__, _PUBLIC, _load, _MACHINERY)
