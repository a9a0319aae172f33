"""An op that is declared again, as by a cell of a notebook, and what becomes of its kernels."""

import numpy as np
import pytest
from tinygrad_bn_kernels import kernel

from tests.tools.registries import registries  # noqa: F401 - for all tests of this file
from tinygrad_bn import testing

OP = """
@fused(formula="y", sample=elementwise(REAL))
def twice(x):
    return x * FACTOR
"""
KERNEL = """
@kernel("twice", "cpu")
def twice_on_cpu(x):
    return x * FACTOR
"""


def cell(text, factor, module="__main__"):
    """Run a cell of a notebook, whose file is named by its contents."""
    text = f"from tinygrad_bn.extend import *\n{text}".replace("FACTOR", str(float(factor)))
    space = {"__name__": module}
    exec(compile(text, f"<cell {hash(text)}>", "exec"), space)
    return space.get("twice")


@pytest.mark.parametrize("text", [OP + KERNEL, KERNEL + OP], ids=["below", "above"])
def test_a_cell_with_a_kernel_that_runs_again_replaces_both(text):
    for factor in (2, 2, 3, 4):
        op = cell(text, factor)
        assert testing.check_op(op, examples=3).kernels == {"twice": 3}
        assert op(np.ones(2)).tolist() == [factor, factor]


def test_a_kernel_of_an_op_that_was_another_goes():
    cell(OP + KERNEL, 2)
    op = cell(OP, 3)
    assert op(np.ones(1)) == [3]
    assert testing.check_op(op, examples=3).kernels == {}
    op = cell(KERNEL + OP, 3)  # a kernel is added above
    assert testing.check_op(op, examples=3).kernels == {"twice": 3}


def test_a_kernel_in_a_cell_of_its_own_stays_while_the_op_is_the_same():
    cell(OP, 2)
    cell(KERNEL, 2)
    assert testing.check_op(cell(OP, 2), examples=3).kernels == {"twice": 3}
    assert testing.check_op(cell(OP, 3), examples=3).kernels == {}


def test_a_kernel_of_another_file_is_not_replaced():
    cell(OP + KERNEL, 2, "here")
    with pytest.raises(ValueError, match="'twice' has a kernel for 'cpu' already, in here; name your op otherwise"):
        cell(KERNEL.replace("x *", "x + 0 *"), 2, "there")
    with pytest.raises(ValueError, match=r"'mean' has a kernel for 'cpu' already, in tinygrad_bn_kernels.cpu.reduce"):
        kernel("mean", "cpu")(lambda x: x)


def test_a_kernel_whose_name_was_corrected_does_not_count():
    misspelt = OP + KERNEL.replace('"twice"', '"twice.vpj"')
    with pytest.raises(testing.GradcheckError, match=r"'twice.vpj' belongs to no op and never runs; is it 'twice.vjp'"):
        testing.check_op(cell(misspelt, 2), examples=3)
    right = KERNEL.replace('"twice"', '"twice.vjp"').replace("(x)", "(g, y, x, *, needs)").replace("x * F", "g * F")
    op = cell(OP + right.replace("return g * FACTOR", "return [g * FACTOR]"), 2)
    assert testing.check_op(op, examples=3).kernels == {"twice.vjp": 3}
