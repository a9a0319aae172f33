"""What is wrong with a file or a model."""

from __future__ import annotations

from types import ModuleType


class OnnxError(ValueError):
    """A file that is no ONNX model, is damaged, or holds what this package does not compute; or such a model."""


def library() -> ModuleType:
    """The package `onnx`, imported at first use. Raises ImportError that says how to install it."""
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError as error:
        raise ImportError("ONNX files need the package onnx: pip install 'tinygrad_bn[onnx]'") from error
    return onnx
