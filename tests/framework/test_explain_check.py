"""Gradients by hand against the engine's, the four ways to compute a gradient, and the quiz."""

import io
import sys

import numpy as np
import pytest

from demos import quiz
from demos.__main__ import main
from tinygrad_bn import Tensor, functional, nn
from tinygrad_bn.explain import compare_gradients, explain

rng = np.random.default_rng(0)
X, G = rng.normal(2, 1.5, (2, 6, 3))
STEPS = ["mu", "xmu", "sq", "var", "sqrtvar", "ivar", "xhat", "gammax", "out"]
N = 6


@pytest.fixture(scope="module")
def e():
    x, weight = Tensor(X, requires_grad=True), Tensor(np.array([0.5, -1.0, 2.0]), requires_grad=True)
    with explain() as e:
        out = functional.batch_norm(x, weight=weight, training=True)
        out.backward(G)
    return e


@pytest.fixture(scope="module")
def v(e):
    return {name: e[name].value for name in STEPS}


@pytest.fixture(scope="module")
def g(e):
    return {name: e[name].grad for name in STEPS}


def test_right_gradients(e, v, g):
    by_hand = {
        "dgammax": G,
        "dvar": (g["xhat"] * v["xmu"]).sum(0, keepdims=True) * -0.5 * v["ivar"] ** 3,
        "dxmu": g["xhat"] * v["ivar"] + g["sq"] * 2 * v["xmu"],
        "∂mu": -g["xmu"].sum(0, keepdims=True),
        "x": v["ivar"] * (g["xhat"] - g["xhat"].mean(0) - v["xhat"] * (g["xhat"] * v["xhat"]).mean(0)),
    }
    verdict = e.check(by_hand)
    assert verdict.right
    assert verdict["dgammax"].verdict == "exact"
    assert verdict["x"].verdict == "close"
    assert verdict["x"].difference < 1e-12
    assert e.check(dx=e["x"].grad.tolist())["dx"].verdict == "exact"
    assert str(verdict).splitlines()[0] == "dgammax   exact"


WRONG = {
    "the sign is flipped": ("sqrtvar", lambda v, g: -g["sqrtvar"]),
    "6 times too large": ("sq", lambda v, g: g["sq"] * N),
    "6 times too small": ("var", lambda v, g: g["var"] / N),
    "counted twice": ("sqrtvar", lambda v, g: g["sqrtvar"] * 2),
    "6/5 of the right one": ("var", lambda v, g: g["var"] * N / (N - 1)),
    "0.3 times the right one": ("var", lambda v, g: g["var"] * 0.3),
    "its path is dropped": ("ivar", lambda v, g: g["ivar"] * 0),
    "a path is lost: xmu → sq → var": ("xmu", lambda v, g: g["xhat"] * v["ivar"]),
    "a path is lost: x → mu → xmu → xhat": ("x", lambda v, g: g["xmu"]),
    "a path is counted twice: xmu → xhat": ("xmu", lambda v, g: g["xmu"] + g["xhat"] * v["ivar"]),
    "the sign of a path is flipped: x → mu → xmu → xhat": ("x", lambda v, g: g["xmu"] - g["mu"] / N),
    "summed backwards, over axis 0": ("mu", lambda v, g: -g["xmu"]),
    "keepdims=True": ("mu", lambda v, g: g["mu"].ravel()),
    "has to be (1, 3)": ("var", lambda v, g: np.ones((2, 2))),
    "the gradient is not finite": ("var", lambda v, g: g["var"] * np.nan),
    "no simple reason found": ("var", lambda v, g: g["var"] * 0 + [[7.0, -3.0, 11.0]]),
    "every sample is off by the same": ("xhat", lambda v, g: g["xhat"] + [1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_gradients_get_a_reason(reason, e, v, g):
    name, wrong = WRONG[reason]
    verdict = e.check({f"d{name}": wrong(v, g)})
    finding = verdict[f"d{name}"]
    assert finding.verdict == "wrong"
    assert reason in finding.reason.replace("batch_norm_training.", "")
    assert finding.reason in str(verdict)
    assert not verdict.right


def test_what_cannot_be_checked(e):
    with pytest.raises(KeyError, match="no step is called 'vaar'; near ones are batch_norm_training"):
        e.check(dvaar=1)
    with pytest.raises(TypeError, match="dvar has to be an array of real numbers; got a str"):
        e.check(dvar="g")
    with explain() as forward:
        y = Tensor([1.0]) + 1
    with pytest.raises(ValueError, match="no backward pass reached 'y'"):
        forward.check(dy=y)


# ---- four ways to compute a gradient --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2)], ids=repr
)
def test_methods_agree(layer, dtype):
    layer = layer.astype(dtype)
    before = layer.state_dict()
    compared = compare_gradients(layer, X.astype(dtype))
    assert compared
    for tensor, by in compared.gradients.items():
        assert list(by) == ["composed", "fused", *(["closed form"] * isinstance(layer, nn.BatchNorm1d)), "differences"]
        assert compared.ulps(tensor, "fused") < 100
        assert np.nanmax(compared.errors[tensor]) < 1e-6
        assert np.isfinite(by["differences"]).sum() == min(40, by["composed"].size)
    for key, value in before.items():
        np.testing.assert_array_equal(layer.state_dict()[key], value)
    text = str(compared)
    assert "differences" in text
    assert "<table>" in compared._repr_html_()


def test_a_wrong_rule_is_seen():
    class Wrong(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x - x.mean(axis=0).detach())  # loses the way through the mean: here without effect

    assert compare_gradients(Wrong(3), X)

    class Lost(nn.Module):
        def forward(self, x):
            return x / (x * x).mean(axis=0).sqrt().detach()

    compared = compare_gradients(Lost(), X)
    assert not compared
    assert compared.ulps("x", "fused") < 100
    assert compared.ulps("x", "differences") > 1e10


def test_images():
    assert compare_gradients(nn.BatchNorm2d(2), rng.normal(size=(2, 2, 3, 2)), g=rng.normal(size=(2, 2, 3, 2)))


def test_wrong_arguments():
    with pytest.raises(TypeError, match="takes a module; got a function"):
        compare_gradients(lambda x: x, X)
    with pytest.raises(TypeError, match="has to be floating-point; got int64"):
        compare_gradients(nn.BatchNorm1d(3), np.ones((4, 3), np.int64))


# ---- the quiz -------------------------------------------------------------------------------------------


def test_all_answers_of_the_quiz_are_right(capsys):
    assert main(["quiz", "--answers"]) == 0
    said = capsys.readouterr().out
    assert said.count("exact") + said.count("close") == len(quiz.STEPS)
    assert "wrong" not in said
    assert {*STEPS, "weight", "bias", "x"} - {"out"} == set(quiz.STEPS)


def test_the_quiz_asks_until_it_is_right(capsys, monkeypatch):
    typed = [
        "-dout",
        "dout",
        "?",
        "1 / 0",
        "",
        "!",
        "dgammax * weight",
        *[a for _, _, a in list(quiz.STEPS.values())[3:]],
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    assert main(["quiz"]) == 0
    said = capsys.readouterr().out
    for part in ("the sign is flipped", "dgammax   exact", "ZeroDivisionError", "summed", "That is the backward pass"):
        assert part in said


@pytest.mark.parametrize("typed", ["q\n", "dout\n"])
def test_the_quiz_can_be_left(typed, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert main(["quiz"]) == 0
    assert "That is" not in capsys.readouterr().out
