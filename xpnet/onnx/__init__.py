"""Export models to ONNX files and import them: `pip install "xpnet[onnx]"`."""

from typing import TYPE_CHECKING

from xpnet.errors import MissingPackageError, module_attributes

try:
    import onnx as onnx
except ImportError as error:
    raise MissingPackageError(
        f'ONNX files need the package onnx, which cannot be imported ({error}): pip install "xpnet[onnx]"'
    ) from error

from xpnet.onnx.exporting import export_onnx
from xpnet.onnx.importing import import_onnx

__all__ = ["export_onnx", "import_onnx"]

if not TYPE_CHECKING:  # a type checker that sees __getattr__ accepts every name, misspelled ones too
    __getattr__, __dir__ = module_attributes(__name__, __all__)
