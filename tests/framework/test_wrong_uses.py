"""Each row of wrong_uses.md is run: its error has the type and the whole message that the table shows."""

import re
import traceback
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import tinygrad_bn
from tinygrad_bn import Tensor, capture, datasets, grad, manual_seed, nn, no_grad, optim, train
from tinygrad_bn import functional as F
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.explain import explain

TABLE = Path(__file__).with_name("wrong_uses.md").read_text(encoding="utf-8")
ROWS = re.findall(r"```python\n(.*?)\n```\n\n```text\n(\w+): (.*?)\n```\n", TABLE, re.DOTALL)
NAMES = {
    "F": F, "Tensor": Tensor, "capture": capture, "datasets": datasets, "explain": explain, "grad": grad,
    "manual_seed": manual_seed, "nn": nn, "no_grad": no_grad, "np": np, "optim": optim, "train": train,
}  # fmt: skip
FRAMEWORK = str(Path(tinygrad_bn.__file__).parent)


def error_of(code: str) -> Exception:
    """What the lines raise in a fresh namespace."""
    try:
        exec(compile(code, "<row>", "exec"), dict(NAMES))
    except Exception as error:
        return error
    raise AssertionError(f"no error:\n{code}")


def vacuous(code: str, message: str) -> bool:
    """Whether the message has no word of the code, number, quotation or "got a ...": nothing about the call."""
    words = set(re.findall(r"[a-z]{3,}", code.lower()))
    told = set(re.findall(r"[a-z]{3,}", message.lower()))
    return not (words & told or re.search(r"\d|'|got an? ", message))


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
@pytest.mark.parametrize(("code", "kind", "message"), ROWS, ids=[code.splitlines()[-1] for code, _, _ in ROWS])
def test_the_error_is_the_one_in_the_table(code, kind, message, kernels):
    with nullcontext() if kernels else kernels_disabled():
        error = error_of(code)
    assert (type(error).__name__, str(error).rstrip()) == (kind, message)
    assert traceback.extract_tb(error.__traceback__)[-1].filename.startswith(FRAMEWORK)


def test_the_table_is_whole():
    assert len({code for code, _, _ in ROWS}) == len(ROWS) == TABLE.count("```python") >= 150


@pytest.mark.parametrize(("code", "message"), [(code, message) for code, _, message in ROWS])
def test_no_message_is_vacuous(code, message):
    assert not vacuous(code, message)


def test_a_vacuous_message_is_found():
    assert vacuous("F.relu(None)", "invalid input")
