"""Files to start an op of one's own from: `python -m tinygrad_bn new-op NAME`."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions
from keyword import iskeyword
from pathlib import Path

from tinygrad_bn.tensor import OPS

PRIMITIVE = '''"""The op `NAME`: an example, y = x / (1 + x²), to be replaced by yours."""

from tinygrad_bn.extend import REAL, check_op, elementwise, primitive


@primitive(
    # The gradient of each operand, in arithmetic of tensors: operators, and functions of tinygrad_bn.functional. Then
    # it can be differentiated again. g is the gradient of the result y. The engine undoes broadcasting and casts.
    lambda g, y, x: g * (1 - x * x) / (1 + x * x) ** 2,
    formula="y = x / (1 + x²);  ∂x = g · (1 − x²) / (1 + x²)²",  # for people: in `ops` and in `explain`
    sample=elementwise(REAL),  # the operands that tests draw: see tinygrad_bn.sample
)
def NAME(x):
    """x / (1 + x²), elementwise."""
    return x / (1 + x * x)  # on arrays: NumPy


if __name__ == "__main__":
    print(check_op(NAME))
'''

FUSED = '''"""The op `NAME`: an example, y = x / (1 + x²), to be replaced by yours, with kernels for the CPU."""

import numba
import numpy as np

from tinygrad_bn.extend import REAL, check_op, elementwise, fused, kernel


@fused(formula="y = x / (1 + x²)", sample=elementwise(REAL))  # the formula for people; the operands that tests draw
def NAME(x):
    """x / (1 + x²), elementwise."""
    # The definition, of tensors: operators, and functions of tinygrad_bn.functional. Gradients of every order follow.
    return x / (1 + x * x)


# A kernel takes and returns arrays. It may return NotImplemented for what it does not take: then the definition runs.
# A kernel for the GPU is registered for "cuda", and gets arrays of tinygrad_bn_kernels.cuda.


@numba.njit
def _forward(x, y):
    for i in range(x.size):
        y[i] = x[i] / (1 + x[i] * x[i])


@numba.njit
def _backward(g, x, gx):
    for i in range(x.size):
        s = 1 + x[i] * x[i]
        gx[i] = g[i] * (2 - s) / (s * s)


@kernel("NAME", "cpu")
def NAME_on_cpu(x):
    if x.dtype not in (np.float32, np.float64):
        return NotImplemented  # Numba has no float16
    y = np.empty(x.shape, x.dtype)
    _forward(x.reshape(-1), y.reshape(-1))
    return y


@kernel("NAME.vjp", "cpu")  # the first gradient of each operand; None where `needs` is False
def NAME_vjp_on_cpu(g, y, x, *, needs):
    if x.dtype not in (np.float32, np.float64):
        return NotImplemented
    gx = np.empty(x.shape, x.dtype)
    _backward(g.reshape(-1), x.reshape(-1), gx.reshape(-1))
    return (gx,)


if __name__ == "__main__":
    print(check_op(NAME))
'''

TEST = """from NAME import NAME

from tinygrad_bn.extend import check_op


def test_NAME():
    report = check_op(NAME)
    assert report.orders == (1, 2, 3)
"""


MODULES = "numba", "numpy", "pytest", "tinygrad_bn", "tinygrad_bn_kernels"  # also where they are not installed


def names_in(*texts: str) -> set[str]:
    """The names that programs read, import or define."""
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    found = [getattr(node, field, None) for node in nodes for field in ("id", "arg", "asname", "name")]
    return {name for name in found if isinstance(name, str)}


def write(name: str, fused: bool = False, folder: str | Path = ".") -> list[Path]:
    """Write NAME.py and test_NAME.py to a folder, and give their paths.

    Raises ValueError for a name that an op cannot have, or that an op, a module or the files themselves use;
    FileExistsError if a file is there already.
    """
    if not name.isidentifier() or iskeyword(name) or name.startswith(("_", "test_")) or name == "conftest":
        raise ValueError(f"the name of an op is an identifier that pytest does not look for; {name!r} is not")
    if name in OPS:
        raise ValueError(f"there is an op {name!r} already; choose another name")
    texts = {f"{name}.py": FUSED if fused else PRIMITIVE, f"test_{name}.py": TEST}
    if name in sys.stdlib_module_names or name in packages_distributions() or name in MODULES:
        raise ValueError(f"there is a module {name!r}, which {name}.py would hide; choose another name")
    if name in names_in(*texts.values()):
        raise ValueError(f"the files use the name {name!r} for something else; choose another name")
    paths = [Path(folder) / file for file in texts]
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} is there already: nothing was written")
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text.replace("NAME", name), encoding="utf-8")
    return paths
