"""Models in and out as ONNX files. Needs the extra `tinygrad_bn[onnx]`.

`load` makes a module of a file, which can be trained further. `export` writes a module in evaluation mode, for
onnxruntime and other programs.
"""

from tinygrad_bn.onnx import combining as combining  # these enter their operators in the table
from tinygrad_bn.onnx import elementwise as elementwise
from tinygrad_bn.onnx import shapes as shapes
from tinygrad_bn.onnx import windows as windows
from tinygrad_bn.onnx.errors import OnnxError
from tinygrad_bn.onnx.graph import Graph, load
from tinygrad_bn.onnx.writing import export

__all__ = ["Graph", "OnnxError", "export", "load"]
