"""Export models to ONNX files and import them: `pip install "xpnet[onnx]"`."""

from xpnet.errors import MissingPackageError

try:
    import onnx as onnx
except ImportError as error:
    raise MissingPackageError(
        f'ONNX files need the package onnx, which cannot be imported ({error}): pip install "xpnet[onnx]"'
    ) from error

from xpnet.onnx.exporting import export_onnx
from xpnet.onnx.importing import import_onnx

__all__ = ["export_onnx", "import_onnx"]
