"""Tables, the program, the story, the figure and the data of the page."""

import json
import re
from string import Formatter

import numpy as np
import pytest

from tests.tools.explained import explained, images, network
from tinygrad_bn import Tensor, functional, nn, optim
from tinygrad_bn.explain import explain
from tinygrad_bn.explain.graph import folded, shown_steps
from tinygrad_bn.explain.layout import layout
from tinygrad_bn.explain.memory import memory
from tinygrad_bn.explain.page import content
from tinygrad_bn.explain.words import WORDS

MAIN = ["1.mu", "1.xmu", "1.sq", "1.var", "1.sqrtvar", "1.ivar", "1.xhat", "1.gammax", "1.out"]


@pytest.fixture(scope="module")
def e():
    return explained()[0]


class Block(nn.Module):
    def __init__(self):
        self.norm, self.lin = nn.BatchNorm1d(3), nn.Linear(3, 3, rng=np.random.default_rng(0))

    def forward(self, x):
        return x + self.lin(self.norm(x)).relu()


class Net(nn.Module):
    def __init__(self):
        self.blocks = [Block(), Block()]

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def nested():
    x = Tensor(np.random.default_rng(0).normal(size=(6, 3)), requires_grad=True)
    with explain() as e:
        y = Net().astype(np.float64)(x)
        y.backward(np.random.default_rng(1).normal(size=(6, 3)))
    return e


# ---- the graph ------------------------------------------------------------------------------------------


def test_unnamed_steps_belong_to_the_step_that_they_help_to_compute(e):
    shown = shown_steps(e)
    assert [k for k in shown if k.startswith("1.")] == ["1.weight", "1.bias", *MAIN]
    assert [s.op.name for s in shown["1.mu"].steps] == ["sum", "div", "sub", "sum", "div", "add"]
    assert shown["1.mu"].sources == ["0.out"]
    assert shown["1.xmu"].sources == ["0.out", "1.mu"]
    assert shown["1.xhat"].sources == ["1.xmu", "1.ivar"]
    assert {"x", "0.weight", "loss"} < set(shown)
    assert not any("constant" in k or "concatenate" in k for k in shown)


def test_boxes_fold(e, nested):
    default = folded(e, None)
    assert [k for k in default if k.startswith("box:")] == ["box:0", "box:2", "box:3", "box:softmax_cross_entropy"]
    assert default["box:3"].sources == ["box:2"]
    assert default["1.mu"].sources == ["box:0"]
    assert "1.xhat" not in folded(e, "0")
    assert "0.out" in folded(e, ["0", nn.BatchNorm1d])
    assert "1.xhat" in folded(e, nn.BatchNorm1d)
    everything = folded(e, lambda path, kind: True)
    assert everything.keys() == shown_steps(e).keys()
    inner = folded(nested, "blocks.1.norm")
    assert "box:blocks.0" in inner
    assert "blocks.1.norm.xhat" in inner, "what is around an open box is open"
    assert set(inner["blocks.1.out"].sources) == {"box:blocks.0", "box:blocks.1.lin"}
    assert list(folded(nested, lambda path, kind: False)) == ["x", "box:blocks.0", "box:blocks.1"]
    with pytest.raises(ValueError, match="names 'Conv', which is no box of this computation"):
        folded(e, "Conv")


def test_places_are_in_layers_without_overlap():
    sources = {
        "x": [],
        "w": [],
        "a": ["x", "w"],
        "b": ["a"],
        "c": ["b", "a"],
        "d": ["c", "x"],
        "v": [],
        "e": ["d", "v"],
    }
    placed = layout(sources, {"x": "", "w": "", "v": ""}, {})
    for key, from_ in sources.items():
        assert all(placed.place[s][0] < placed.place[key][0] for s in from_)
    assert len({(layer, round(at, 6)) for layer, at in placed.place.values()}) == len(sources)
    assert placed.place["v"][0] == placed.place["e"][0] - 1, "a given tensor stands beside its first use"
    assert {placed.place[k][1] for k in "abcde"} == {0}, "the longest way is straight"
    assert len(placed.routes["x", "d"]) == 5
    assert all(at != 0 for _, at in placed.routes["x", "d"][1:-1])
    assert layout({}, {}, {}).place == {}
    boxed = layout({"x": [], "w": [], "a": ["x", "w"]}, {"x": "", "w": "box"}, {"a": "box"})
    assert [boxed.place[k][0] for k in "xwa"] == [0, 1, 2], "x is not in the box"


# ---- tables and the program -----------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_step(e, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    table = e.table()
    assert [row[0] for row in table.rows] == list(shown_steps(e))
    xhat = next(row for row in table.rows if row[0] == "1.xhat")
    assert xhat[1:3] == ("mul", "float64 8×4")
    assert xhat[3].startswith(f"{e['1.xhat'].value[0, 0]:.4g} ")
    assert f"{np.abs(e['1.xhat'].grad).max():.3g}" in xhat[4]
    assert xhat[6] == "1.xmu, 1.ivar"
    assert "1.sqrtvar" in str(table)
    assert repr(table) == str(table)
    assert e._repr_html_() == table._repr_html_()
    assert table._repr_html_().count("<tr>") == len(table.rows) + 1
    assert any(row[1] == "1 ops, folded" for row in e.table(expand="BatchNorm1d").rows)


def test_memory_is_that_of_the_arrays():
    x = Tensor(np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32), requires_grad=True)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
    with explain() as e:
        model(x).sum().backward()
    held = memory(e)
    assert held["0"].sizes == (128, 96 + 128, 128 + 64)
    assert held["1"].sizes[:2] == (128, 128 + 2 * 32), "keeps its result and, in float64, the mean and the variance"
    assert held["2"].sizes[1] == 128, "its result; its input is counted for the layer before"
    rows = e.memory().rows
    assert rows[-1][1] == f"{sum(m.sizes[0] for m in held.values()):,}"
    assert "0 Linear" in str(e.memory())
    column = {row[0]: row[5] for row in e.table().rows}
    assert e.table().head[5].endswith("bytes")
    assert {k: v for k, v in column.items() if v} == {
        "0.out": "128 / 224 / 192", "1.out": "128 / 192 / 160", "2.out": "128 / 128 / 128", "sum": "4 / 4 / 4",
    }  # fmt: skip
    folded_rows = {row[0]: row[5] for row in e.table(expand=lambda path, kind: False).rows}
    assert folded_rows["1 BatchNorm1d"] == "128 / 192 / 160"


def test_a_folded_box_holds_what_the_layers_in_it_hold(nested):
    held = memory(nested)
    inside = [m.sizes for name, m in held.items() if name.startswith("blocks.0")]
    assert len(inside) == 3
    row = next(row for row in nested.table(expand=lambda path, kind: False).rows if row[0] == "blocks.0 Block")
    assert row[5] == " / ".join(f"{sum(column):,}" for column in zip(*inside, strict=True))


def test_the_program_is_the_whole_step():
    model, x, target = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with explain() as e:
        loss = functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
    text = e.program()
    assert [line for line in text.splitlines() if not line.startswith(" ")] == ["forward:", "backward:", "update:"]
    for line in (
        "  1.xhat:float64[8,4] = mul(1.xmu, 1.ivar)",
        "  1.sqrtvar:float64[1,4] = sqrt(1.add)",
        "  1.add:float64[1,4] = add(1.var, 1e-05)",
    ):
        assert line in text.splitlines()
    assert re.search(r"= mul\.vjp\(∂1\.gammax, 1\.gammax, 1\.xhat, 1\.weight\)", text)
    assert re.search(r"∂1\.ivar:float64\[1,4\] = sum_to\(\w+, shape=\(1, 4\)\)", text)
    assert re.search(r"running_statistics\(", text)
    assert re.search(r"^  \w+:float64\[\d+\] = sgd\(", text.split("update:")[1], re.M)
    made = re.findall(r"(?<![\w.∂])(\w+):", text)
    assert not set(made) & {"x"}, "no letter is the name of a tensor of the program"


# ---- the story ------------------------------------------------------------------------------------------


def test_both_languages_tell_the_same_numbers():
    fields = {
        lang: {k: {f for _, f, _, _ in Formatter().parse(t) if f} for k, t in w.items()} for lang, w in WORDS.items()
    }
    assert fields["en"] == fields["ko"]
    assert all(re.search("[가-힣]", text) for text in WORDS["ko"].values())


@pytest.mark.parametrize("make", [network, images])
@pytest.mark.parametrize("lang", ["en", "ko"])
def test_the_story_has_the_numbers_of_the_engine(make, lang):
    e = explained(make)[0]
    story = e.narrate(lang)
    c = int(np.argmax(np.abs(e["1.xhat"].grad).max(axis=(0, *range(2, e["1.xhat"].value.ndim)))))
    n = e["1.xhat"].grad[:, c].size

    def told(name, *arrays):
        paragraph = next(p for p in story.replace("−", "-").split("\n\n") if f"{name} =" in p.replace("−", "-"))
        for a in arrays:
            for v in np.ravel(a)[:6]:
                assert f"{v:.4g}" in paragraph, (name, paragraph)

    told("∂ivar", e["1.ivar"].grad[:, c], e["1.ivar"].value[:, c])
    told("∂sqrtvar", e["1.sqrtvar"].grad[:, c])
    told("∂xmu", e["1.xmu"].grad[:, c])
    told("∂mu / N", e["1.mu"].grad[:, c] / n, e["0.out"].grad[:, c])
    told("∂weight", e["1.weight"].grad[c])
    told("∂bias", e["1.bias"].grad[c])
    told("mean(∂xhat) - xhat · mean(∂xhat · xhat))", e["0.out"].grad[:, c]) if "In one line" in story else None
    dx, xhat = e["0.out"].grad[:, c], e["1.xhat"].value[:, c]
    scale = next(p for p in story.replace("−", "-").split("\n\n") if p.startswith("Σ ∂x · xhat"))
    assert scale.count(f"{(dx * xhat).sum():.4g}"[:5]) == 2, "the exact expression gives the same number"
    assert f"N = {n}" in story


def test_other_stories():
    model, x, target = network()
    model.eval()
    with explain() as e:
        functional.cross_entropy(model(x), target).backward()
    assert "there is one way only" in e.narrate()
    assert "Σ ∂x" in e.narrate("ko", of="1")
    with explain() as plain:
        c = functional.batch_norm(x, training=True)
        c.backward(np.ones_like(c))
    assert "Without a weight and a bias" in plain.narrate()
    layer = explain(nn.BatchNorm1d(3).astype(np.float64), x.numpy(), g=np.ones((8, 3)))
    assert layer.narrate().startswith("The backward pass of BatchNorm, in channel")
    assert layer.narrate("ko").startswith("배치 정규화의 역전파")
    with explain() as other:
        b = x * x
        b.sum().backward()
    assert "b = mul(float64 (8, 3), float64 (8, 3)): its gradient is [1, 1, 1, 1, 1, 1, … (24)]" in other.narrate()
    with pytest.raises(ValueError, match="lang is one of 'en', 'ko'; got 'fr'"):
        other.narrate("fr")
    with pytest.raises(ValueError, match="'0' is no BatchNorm with a gradient; there are '1'"):
        e.narrate(of="0")
    with explain() as forward:
        model(x)
    with pytest.raises(ValueError, match="no backward pass was recorded"):
        forward.narrate()


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4)])
def test_only_a_batch_norm_has_its_story(norm):
    with explain() as e:
        y = norm(Tensor(np.random.default_rng(0).normal(size=(4, 4)), requires_grad=True))
        (y * y * y).sum().backward()
    story = e.narrate()
    assert story.startswith(
        "The backward pass of BatchNorm" if isinstance(norm, nn.BatchNorm1d) else "The backward pass, from"
    )


def test_a_residual_is_not_part_of_the_story(nested):
    story = nested.narrate(of="blocks.0.norm").replace("−", "-")
    difference = float(re.search(r"difference from the steps is (\S+)\.\n", story).group(1))
    assert difference < 1e-12
    assert abs(float(re.search(r"Σ ∂x = (\S+):", story).group(1))) < 1e-12


# ---- pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expand", [None, "BatchNorm1d", lambda path, kind: False, lambda path, kind: True])
def test_the_figure_has_every_visible_step(e, nested, expand, tmp_path):
    for explanation in (e, nested):
        figure = explanation.figure(expand)
        texts = {t.get_text() for t in figure.axes[0].texts}
        nodes = folded(explanation, expand)
        for node in nodes.values():
            if node.step and node.step.op:
                assert node.name in texts
        pictures = sum(1 + any(n.step in p.grads for p in explanation.passes) for n in nodes.values() if n.step)
        assert len(figure.axes[0].images) == pictures
        figure.savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 10_000 or expand
    with pytest.raises(ValueError, match="nothing was computed"):
        explain(lambda x: x, 1).figure()


def test_the_page_has_every_number_and_asks_no_network(e, tmp_path):
    path = e.html(tmp_path / "page.html")
    text = path.read_text("utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "http://www.w3.org/2000/svg" in text  # a name, the only address
    assert len(re.findall(r"https?://", text)) == 1
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1))
    assert data == content(e)
    for name in ("1.xhat", "1.var", "x", "loss"):
        assert data["nodes"][name]["value"]["rows"] == np.atleast_2d(e[name].value)[:12, :8].tolist()
        assert data["nodes"][name]["grad"]["rows"] == np.atleast_2d(e[name].grad)[:12, :8].tolist()
    assert data["nodes"]["1.xhat"]["line"].startswith("explained.py:")
    assert [k for k, box in data["boxes"].items() if box["open"]] == ["1"]
    assert list(data["paths"]) == ["x", "0.out", "1.out", "2.out", "3.out"]  # the last ones part in the softmax
    shares = np.sum([p["share"]["rows"] for p in data["paths"]["x"]], axis=0)
    np.testing.assert_allclose(shares, e["x"].grad, atol=1e-15)
    assert data["paths"]["x"][0]["steps"] == ["x", "1.xmu", "1.xhat", "1.gammax", "1.out"]


def test_numbers_that_are_not_finite_are_words(tmp_path):
    x = Tensor([1.0, 0.0], requires_grad=True)
    with np.errstate(divide="ignore"), explain() as e:
        y = x.log()
        y.backward([1.0, 1.0])
    assert content(e)["nodes"]["y"]["value"]["rows"] == [[0.0, "-inf"]]
    assert "</script>" not in json.dumps(content(e))
    e.html(tmp_path / "page.html")


def test_explaining_images_is_complete():
    e = explained(images)[0]
    for path in ("0.out", "1.xhat", "3.out", "4.out", "5.xhat", "9.out"):
        assert content(e)["nodes"][path]["grad"] is not None


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_alone_is_told_although_its_scope_is_that_of_the_loss(shape, training):
    layer, x = (
        nn.BatchNorm1d(3).train(training),
        Tensor(np.random.default_rng(0).normal(size=shape), requires_grad=True),
    )
    with explain() as e:
        (layer(x) ** 2).sum().backward()
    assert e.narrate().startswith("The backward pass of BatchNorm")


def test_the_story_of_a_layer_in_evaluation_has_the_numbers_of_its_channel():
    layer, rng = nn.BatchNorm2d(3).astype(np.float64).eval(), np.random.default_rng(0)
    layer.running_var.data = np.array([0.25, 1.0, 4.0])
    x = Tensor(rng.normal(size=(2, 3, 2, 1)), requires_grad=True)
    with explain() as e:
        (layer(x) * np.array([0.0, 0.0, 1.0]).reshape(3, 1, 1)).sum().backward()
    story = e.narrate()
    assert "in channel 3 of 3, over N = 4 values" in story
    assert "ivar = 0.5" in story


class Twice(nn.Module):
    def __init__(self):
        self.lin = nn.Linear(2, 2, rng=np.random.default_rng(0))

    def forward(self, x):
        return self.lin(functional.tanh(self.lin(x)))


def explained_twice():
    x = Tensor(np.ones((3, 2), np.float32), requires_grad=True)
    with explain() as e:
        Twice()(x).sum().backward()
    return e


def test_a_folded_box_that_is_used_twice_is_drawn():
    e = explained_twice()
    assert {"box:lin"} < folded(e, ()).keys()  # it comes after itself, through tanh
    assert len(e.figure().axes) > 0
