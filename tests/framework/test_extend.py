"""The extension kit: ops of a user's own file, their table, their tests by pytest, and files to start from."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tools.registries import registries  # noqa: F401 - for all tests of this file
from tinygrad_bn import Tensor, extend, new_op, op_table
from tinygrad_bn.__main__ import main
from tinygrad_bn.explain import explain
from tinygrad_bn.sample import RandomDraw
from tinygrad_bn.tensor import OPS
from tinygrad_bn.testing import check
from tinygrad_bn.testing.extremes import BY_ROWS, EXTREMES
from tinygrad_bn.testing.files import ops_of
from tinygrad_bn.testing.properties import third_derivatives

ROOT = Path(__file__).parents[2]
BUILT_IN = [name for name, op in OPS.items() if op.forward.__module__.startswith("tinygrad_bn.")]

WRONG = """
from tinygrad_bn.extend import REAL, elementwise, primitive

@primitive(lambda g, y, x: g * 2, formula="y = 3x", sample=elementwise(REAL))
def thrice(x):
    return x * 3
"""


def python(*arguments, folder):
    """Run Python as a user does, in a folder."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    command = [sys.executable, *arguments]
    ran = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    return ran.returncode, ran.stdout + ran.stderr


# ---- every op of this package ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_op_is_right_for_half_precision_no_many_and_large_elements_and_to_third_order(name):
    samples = [OPS[name].sample(RandomDraw(seed)) for seed in range(25)]
    for run, draw in ((third_derivatives, RandomDraw), *EXTREMES):
        if run not in BY_ROWS or check._has_rows(samples):
            with np.errstate(all="ignore"):
                for seed in (0, 7):
                    run(OPS[name], *OPS[name].sample(draw(seed)), seed)


def test_the_table_has_every_op_in_100_columns(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tinygrad_bn", "ops", "--no-check"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.partition("(")[0] for line in lines if line and line[0] != " "] == sorted(OPS)
    assert not {"  gradients  ∂a = g * b", "             ∂b = g * a"} - set(lines)


def test_an_entry_says_what_was_found(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tinygrad_bn", "ops", "batch_norm_training", "where"])
    main()
    words = " ".join(capsys.readouterr().out.split())
    for part in (
        "batch_norm_training(x, weight, bias, *, eps: float)",
        "fuses sum, div, sub, add, mul, sqrt, reshape",  # the mean first
        "those of its composition, of every order; those with a graph by its rules, made of ops with kernels",
        "kernels cpu: batch_norm_training, batch_norm_training.vjp; cuda: batch_norm_training",
        "checked orders 1, 2, 3; 25 samples; worst error in float32 of batch_norm_training ",
        "many elements, large numbers",
        "steps = batch_norm_steps(x, weight, bias, eps=eps)",  # the source
        "∂condition: 0 ∂a = where(condition, g, 0.0)",
    ):
        assert part in words
    assert op_table.entry("getitem", 0).gradients[0].startswith("∂x = ")


def test_a_name_or_a_file_that_is_wrong_is_an_error_in_words(tmp_path, monkeypatch):
    (tmp_path / "empty.py").write_text("x = 1")
    for what, words in (
        ("nonsense", "there is no op 'nonsense'; there are abs, "),
        ("rleu", r"there is no op 'rleu'; did you mean 'relu'\?$"),
        ("missing.py", "missing.py is no file of Python"),
        (str(tmp_path / "empty.py"), "declares no op: use primitive or fused of tinygrad_bn.extend"),
    ):
        monkeypatch.setattr(sys, "argv", ["tinygrad_bn", "ops", what])
        with pytest.raises(SystemExit, match=words):
            main()


# ---- files of users --------------------------------------------------------------------------------------


@pytest.mark.compiled
@pytest.mark.parametrize("options", [[], ["--fused"]], ids=["rules", "fused"])
def test_a_new_file_passes_as_it_is_written(options, tmp_path):
    code, said = python("-m", "tinygrad_bn", "new-op", "bump", *options, folder=tmp_path)
    assert (code, said.startswith("wrote bump.py and test_bump.py; run: ")) == (0, True), said
    code, said = python("-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "test_bump.py", folder=tmp_path)
    assert (code, "1 passed" in said) == (0, True), said
    code, said = python("-m", "tinygrad_bn", "ops", "bump.py", folder=tmp_path)
    assert (code, said.startswith("bump(x)\n  formula    y = x / (1 + x²)")) == (0, True), said
    assert "checked    orders 1, 2, 3; 25 samples" in said
    assert ("kernels    cpu: bump, bump.vjp" in said) == bool(options)


def test_nothing_is_overwritten_and_a_name_that_is_taken_is_refused(tmp_path):
    new_op.write("bump", folder=tmp_path)
    with pytest.raises(FileExistsError, match=r"bump.py is there already: nothing was written"):
        new_op.write("bump", folder=tmp_path)
    (tmp_path / "test_other.py").touch()
    with pytest.raises(FileExistsError, match=r"test_other.py"):
        new_op.write("other", folder=tmp_path)
    assert not (tmp_path / "other.py").exists()
    for name, words in (("mul", "there is an op 'mul' already"), ("a-b", "identifier"), ("class", "identifier")):
        with pytest.raises(ValueError, match=words):
            new_op.write(name, folder=tmp_path)


@pytest.mark.parametrize("fused", [False, True], ids=["rules", "fused"])
def test_a_name_that_the_files_use_or_that_hides_a_module_is_refused(fused, tmp_path):
    for name in ("numpy", "numba", "tinygrad_bn", "pytest", "random", "typing"):
        with pytest.raises(ValueError, match=f"there is a module '{name}', which {name}.py would hide; choose another"):
            new_op.write(name, fused, tmp_path)
    for name in ("check_op", "elementwise", "REAL", "x", "g", "report", *(["np", "kernel", "range"] if fused else [])):
        with pytest.raises(
            ValueError, match=f"the files use the name '{name}' for something else; choose another name"
        ):
            new_op.write(name, fused, tmp_path)
    assert not list(tmp_path.iterdir())


def test_pytest_checks_the_ops_of_a_file(tmp_path):
    new_op.write("bump", folder=tmp_path)
    (tmp_path / "wrong.py").write_text(WRONG)
    plugin = "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tinygrad_bn.testing.plugin"
    code, said = python(*plugin, "--tinygrad-ops", "bump.py", "--tinygrad-ops", "wrong.py", "bump.py", folder=tmp_path)
    assert code == 1, said
    assert "1 failed, 1 passed" in said, said
    assert "wrong.py::check_op[thrice]" in said
    assert "operand 'x': gradient" in said
    assert "smallest failing example: x = " in said
    two = (
        WRONG + WRONG.replace("thrice", "right").replace("g * 2", "g * 3") + "\ndef test_no_more():\n    assert False\n"
    )
    (tmp_path / "two.py").write_text(two)
    (tmp_path / "test_other.py").write_text("def test_other():\n    assert False\n")
    code, said = python(*plugin, "--tinygrad-ops", "two.py", folder=tmp_path)  # these ops only
    assert re.search("1 failed, 1 passed", said), said
    code, said = python(*plugin, "--tinygrad-ops", "two.py", "two.py::check_op[right]", folder=tmp_path)
    assert (code, "1 passed" in said, "failed" in said) == (0, True, False), said
    code, said = python(*plugin, "--tinygrad-ops", "bump.py", "test_other.py", folder=tmp_path)
    assert re.search("1 failed, 1 passed", said), said
    code, said = python("-m", "tinygrad_bn", "ops", "wrong.py", folder=tmp_path)
    assert (code, "checked    FAILED: operand 'x': gradient" in said) == (1, True), said


def test_a_file_that_is_loaded_twice_declares_its_ops_again(tmp_path, monkeypatch):
    new_op.write("bump", folder=tmp_path)
    assert ops_of(tmp_path / "bump.py") == ops_of(tmp_path / "bump.py") == ["bump"]
    monkeypatch.syspath_prepend(tmp_path)
    import bump  # under another name

    assert OPS["bump"] is bump.bump.op
    assert extend.check_op(bump.bump).op == "bump"
    x = Tensor([1.0, 2.0], requires_grad=True)
    e = explain(lambda x: bump.bump(x).sum(), x)
    assert "bump(x):  y = x / (1 + x²);  ∂x = g · (1 − x²) / (1 + x²)²" in e["bump"].formula


# ---- helpers of rules ------------------------------------------------------------------------------------


def test_unbroadcast_is_the_adjoint_of_broadcasting():
    g, x = np.arange(24.0).reshape(2, 3, 4), np.zeros((3, 1))
    np.testing.assert_array_equal(extend.unbroadcast(g, x), g.sum((0, 2)).reshape(3, 1))
    assert isinstance(extend.unbroadcast(Tensor(g), Tensor(x)), Tensor)
    with pytest.raises(ValueError, match=r"operand of shape \(2,\) came out as \(2, 3, 4\)"):
        extend.unbroadcast(g, np.zeros(2))


def test_kept_dims_let_a_reduction_broadcast_against_its_operand():
    @extend.primitive(
        lambda g, y, x, *, axis, keepdims: 2 * x * extend.kept(g, x, axis, keepdims),
        formula="y = Σ x²;  ∂x = 2 g · x",
        sample=extend.reducing(),
    )
    def sum_of_the_squares(x, *, axis: extend.Axis = None, keepdims: bool = False):
        return np.sum(x * x, axis=axis, keepdims=keepdims)

    with pytest.raises(IndexError, match="axis 5 is out of bounds for array of dimension 2"):
        extend.kept(np.ones(3), np.ones((3, 4)), 5, False)
    report = extend.check_op(sum_of_the_squares)
    assert report.orders == (1, 2, 3)
    assert "many_elements" in report.checks
