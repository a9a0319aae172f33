"""Any computation by name: values, gradients, the ways by which they arrive, in words and pictures."""

from tinygrad_bn.explain.compare import compare_gradients
from tinygrad_bn.explain.explanation import Explanation, View, explain

__all__ = ["Explanation", "View", "compare_gradients", "explain"]
