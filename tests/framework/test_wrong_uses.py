"""Each row of wrong_uses.md is run: its error has the type, the message and the notes of the table; nothing changes.

The last statement of a row is the wrong use. The calls in it are made one by one before, so that what they make can be
compared before and after the error.
"""

import ast
import inspect
import re
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinygrad_bn
from tinygrad_bn import Tensor, capture, checkpoint, cuda, datasets, grad, manual_seed, nn, no_grad, optim, train, viz
from tinygrad_bn import functional as F
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.explain import explain
from tinygrad_bn.sample import REAL, elementwise
from tinygrad_bn.tensor import OPS, fused, primitive

TABLE = Path(__file__).with_name("wrong_uses.md").read_text(encoding="utf-8")
ROWS = re.findall(r"```python\n(.*?)\n```\n\n```text\n(\w+): (.*?)\n```\n", TABLE, re.DOTALL)
MODULES = {
    "F": F, "capture": capture, "checkpoint": checkpoint, "cuda": cuda, "datasets": datasets, "explain": explain,
    "elementwise": elementwise, "fused": fused, "grad": grad, "manual_seed": manual_seed, "nn": nn, "no_grad": no_grad,
    "np": np, "optim": optim, "primitive": primitive, "REAL": REAL, "Tensor": Tensor, "train": train, "viz": viz,
}  # fmt: skip
FRAMEWORK = str(Path(tinygrad_bn.__file__).parent)


class Hoisting(ast.NodeTransformer):
    """Replaces the calls in an expression, the innermost first, by names; `assignments` makes them."""

    def __init__(self, outermost: ast.AST) -> None:
        self.outermost, self.assignments = outermost, list[ast.stmt]()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if node is self.outermost:
            return node
        name = f"made_{len(self.assignments)}"
        self.assignments.append(ast.Assign([ast.Name(name, ast.Store())], node))
        return ast.Name(name, ast.Load())

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node


def statements(code: str) -> list[ast.Module]:
    """The statements of a row, its last one with the calls in it before."""
    *before, last = ast.parse(code).body
    hoisting = Hoisting(getattr(last, "value", None))
    if isinstance(last, ast.Expr | ast.Assign | ast.AugAssign):
        last = hoisting.visit(last)
    whole = [ast.Module([statement], []) for statement in (*before, *hoisting.assignments, last)]
    return [ast.fix_missing_locations(module) for module in whole]


def state_of(value: Any) -> Any:
    """What may not change by an error: values, gradients, modes, and states of optimisers, schedules and generators."""
    if isinstance(value, Tensor):
        gradient = None if value.grad is None else value.grad.numpy().tobytes()
        return value.numpy().tobytes(), str(value.dtype), value.shape, gradient, value.requires_grad, id(value.node)
    if isinstance(value, nn.Module):
        tensors = {name: state_of(t) for name, t in value.named_tensors()}
        return tensors, [(name, m.training) for name, m in value.named_modules()], value.extra_repr()
    if isinstance(value, optim.Optimizer | optim.Schedule):
        return repr(value.state_dict())
    if isinstance(value, list | tuple):
        return [state_of(item) for item in value]
    return repr(value) if isinstance(value, np.ndarray | dict | datasets.Batches) else None


def error_of(code: str) -> tuple[Exception, dict[str, Any], list[str]]:
    """What the lines raise, what they had made by then, and the names of what the error changed."""
    space = dict(MODULES)
    for statement in statements(code):
        before = {name: state_of(value) for name, value in space.items()}
        try:
            exec(compile(statement, "<row>", "exec"), space)
        except Exception as error:
            changed = [name for name, state in before.items() if state_of(space[name]) != state]
            return error, {name: value for name, value in space.items() if name not in MODULES}, changed
    raise AssertionError(f"no error:\n{code}")


def text_of(error: Exception) -> str:
    """The message, and each note in a line."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())]).rstrip()


def vacuous(code: str, made: dict[str, Any], text: str) -> bool:
    """Whether the text leaves out what was called, or what came."""
    names = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    names |= {k.arg for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) for k in node.keywords}
    names |= {node.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)}
    names |= {type(value).__name__ for value in made.values()} | PARAMETERS
    constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    came = {*map(repr, constants), *(c for c in constants if isinstance(c, str) and len(c) > 2)}
    came |= {str(value.shape) for value in made.values() if hasattr(value, "shape")}
    came |= {str(value.dtype) for value in made.values() if hasattr(value, "dtype")}
    came |= {type(value).__name__ for value in made.values()}
    named = names & set(re.findall(r"\w+", text))
    got = any(re.search(rf"(?<!\w){re.escape(c)}(?!\w)", text) for c in came) or re.search(GOT, text)
    return not (named and got)


def parameters() -> set[str]:
    """The names of the arguments of public functions and classes, but for single letters."""
    every = [f for module in (F, nn, nn.init, optim, train, datasets, viz) for f in vars(module).values()]
    own = [f for f in every if inspect.isroutine(f) or (inspect.isclass(f) and not issubclass(f, Exception))]
    public = [f for f in own if f.__module__.startswith("tinygrad_bn")]
    found = {name for f in public for name in inspect.signature(f).parameters}
    return {name for name in found - {"shape"} if len(name) > 1}


# Ways to say what came without the word "got".
GOT = (
    r"\bgot\b|unknown: |missing|\bempty\b|\bNone\b|no samples|no parameters|has no\b|needs a|another|not finite|freed|"
    r"0-d|this one is|is (a|an|the) |is \w+, not|list of tensors|returned|cannot hold|assignment"
)
PARAMETERS = parameters() | {
    *OPS,
    "assignment",
    "cotangent",
    "cross",
    "item",
    "op",
    "state",
    "targets",
    "tensor",
    "tensors",
}


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
@pytest.mark.parametrize(("code", "kind", "message"), ROWS, ids=[code.splitlines()[-1] for code, _, _ in ROWS])
def test_the_error_is_the_one_in_the_table(code, kind, message, kernels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tinygrad_bn.tensor, "OPS", OPS)
    known = dict(OPS)
    try:
        with nullcontext() if kernels else kernels_disabled():
            error, made, changed = error_of(code)
    finally:
        OPS.clear()
        OPS.update(known)
    assert (type(error).__name__, text_of(error)) == (kind, message)
    assert traceback.extract_tb(error.__traceback__)[-1].filename.startswith(FRAMEWORK)
    assert changed == []
    assert not vacuous(code, made, message)


def test_the_table_is_whole():
    assert len({code for code, _, _ in ROWS}) == len(ROWS) == TABLE.count("```python") >= 150


@pytest.mark.parametrize(
    "text", ["invalid input", "relu failed", "got (2, 3)", "something of shape (2, 3) is wrong", "relu: bad operand"]
)
def test_a_vacuous_message_is_found(text):
    assert vacuous("F.relu(made_0)", {"made_0": np.ones((2, 3))}, text)
    assert not vacuous("F.relu(made_0)", {"made_0": np.ones((2, 3))}, "relu takes no operand of shape (2, 3)")


class Spoiling(nn.Module):
    """Its forward changes something, and then fails."""

    def __init__(self, spoil: Any) -> None:
        self.layer, self.spoil = nn.BatchNorm1d(2), spoil

    def forward(self, x: Tensor) -> Tensor:
        self.spoil(self.layer, x)
        raise ValueError("spoilt")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer, x: setattr(layer.weight, "data", np.zeros(2)),
        lambda layer, x: setattr(layer.running_mean, "data", np.ones(2)),
        lambda layer, x: layer.eval(),
        lambda layer, x: setattr(layer.bias, "grad", Tensor(np.ones(2))),
        lambda layer, x: layer.weight.__setattr__("requires_grad", False),
    ],
)
def test_a_change_by_an_error_is_found(spoil, monkeypatch):
    monkeypatch.setitem(MODULES, "model", Spoiling(spoil))
    assert error_of("model(Tensor([[1.0, 2.0]]))")[2] == ["model"]
    monkeypatch.setitem(MODULES, "model", Spoiling(lambda layer, x: setattr(x, "data", x.numpy() + 1)))
    assert error_of("model(Tensor([[1.0, 2.0]]))")[2] == ["made_0"]
    monkeypatch.setitem(MODULES, "model", Spoiling(lambda layer, x: None))
    assert error_of("model(Tensor([[1.0, 2.0]]))")[2] == []
