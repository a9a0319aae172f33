"""What a notebook shows: tensors, modules and explanations as HTML, and through Treescope."""

import re
import struct
import zlib
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tests.tools.explained import explained
from tinygrad_bn import Tensor, nn, viz
from tinygrad_bn.nn import Parameter
from tinygrad_bn.notebook import array_html


def cells(text):
    return re.findall(r"<td[^>]*>([^<]*)</td>", text)


def pixels(text):
    """The picture in a text, decoded: (rows, columns, 4)."""
    data = b64decode(re.search(r"base64,([^']*)'", text).group(1))
    assert data.startswith(b"\x89PNG")
    wide, high = struct.unpack(">II", data[16:24])
    at, parts = 8, b""
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body, check = data[at + 8 : at + 8 + size], data[at + 8 + size : at + 12 + size]
        assert struct.unpack(">I", check)[0] == zlib.crc32(kind + body)
        parts += body if kind == b"IDAT" else b""
        at += 12 + size
    rows = np.frombuffer(zlib.decompress(parts), np.uint8).reshape(high, 1 + 4 * wide)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(high, wide, 4)


class Balanced(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_small_tensor_is_a_table_of_its_numbers():
    x = Tensor([[1.0, -2.0], [0.5, np.nan]], requires_grad=True)
    text = x._repr_html_()
    assert cells(text) == ["1", "-2", "0.5", "nan"]
    assert "Tensor (2, 2) · float32 · cpu · leaf · requires_grad" in text
    alphas = re.findall(r"rgba\((\d+),\d+,\d+,([\d.]+)\)", text)
    assert alphas == [("194", "0.28"), ("43", "0.55"), ("194", "0.14"), ("208", "0.55")]
    assert "from relu" in x.relu()._repr_html_()
    assert cells(Tensor(3)._repr_html_()) == ["3"]
    assert cells(Tensor([True, False])._repr_html_()) == ["True", "False"]
    assert "no elements" in Tensor(np.zeros((0, 3)))._repr_html_()
    assert "no elements" in Tensor(np.zeros((0, 0, 0)))._repr_html_()
    assert Parameter([1.0])._repr_html_().startswith("<div><div>Parameter (1,)")


def test_a_large_tensor_is_a_picture():
    values = np.zeros((20, 30))
    values[3, 4], values[5, 6], values[7, 8] = 2, -1, np.inf
    text = Tensor(values)._repr_html_()
    picture = pixels(text)
    assert picture.shape == (20, 30, 4)
    assert picture[3, 4].tolist() == [194, 65, 12, 255]
    assert picture[5, 6].tolist() == [43, 108, 176, 137]
    assert picture[7, 8].tolist() == [208, 0, 255, 255]
    assert picture[0, 0, 3] == 20
    assert "-1 to 2, mean 0.001669; 1 of 600 are not finite" in text
    assert "shown:" not in text


def test_more_than_two_axes_are_pictures_side_by_side():
    values = np.zeros((5, 2, 4, 6))
    values[4, 1] = 1  # the tenth picture: the second of the second row
    picture = pixels(array_html(values))
    assert picture.shape == (2 * 5 - 1, 8 * 7 - 1, 4)
    lit = picture[..., 3] == 255
    assert lit[5:9, 7:13].all()
    assert lit.sum() == 24
    assert "shown: 64 of 100, 3 × 3 of 3 × 3" in array_html(np.zeros((100, 3, 3)))
    assert "shown: 1 of 1, 128 × 5 of 300 × 5" in array_html(np.zeros((300, 5)))


DTYPES = st.sampled_from([np.float16, np.float32, np.float64, np.int64, np.bool_])


@given(npst.arrays(DTYPES, npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=13)))
def test_any_array_is_shown(values):
    text = Tensor(values)._repr_html_()
    Balanced(text)
    assert str(values.dtype) in text


def test_a_module_unfolds():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()))
    model[0].bias.requires_grad = False
    text = model._repr_html_()
    Balanced(text)
    assert text.count("<details") == 4
    assert text.count(" open>") == 1, "the outermost"
    assert "0 Linear(" in text
    found = cells(text)
    assert found[:10] == [
        "0.weight", "4 × 3", "float32", "cpu", "parameter, requires_grad", "0.bias", "4", "float32", "cpu", "parameter"
    ]  # fmt: skip
    assert found[found.index("1.0.running_mean") + 4] == "buffer"
    assert found[found.index("1.0.num_batches_tracked") + 1] == "number"
    assert "<code>Sequential()</code> 24 parameters" in text

    class Named(nn.Module):
        def extra_repr(self):
            return "<script>"

    assert "&lt;script&gt;" in Named()._repr_html_()


def test_steps_and_ways_of_an_explanation():
    e, *_ = explained()
    text = e["1.var"]._repr_html_()
    Balanced(text)
    assert cells(text) == [f"{v:.4g}" for v in (*e["1.var"].value[0], *e["1.var"].grad[0])]
    assert "1.var = div(" in text
    ways = e["0.out"].paths
    text = ways._repr_html_()
    Balanced(text)
    assert text.count("→ mu →") == 2
    last = text[text.rindex("→ mu →") :]
    assert set(re.findall(r",([\d.]+)\)'", last)) == {"0.00"}, "a share that is rounding has no colour"
    Balanced(e._repr_html_())


def test_figures_are_shown():
    e, *_ = explained()
    for figure in (e.figure(), viz.subplots(1, 1, 2, 2)[0]):
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_treescope_shows_them():
    treescope = pytest.importorskip("treescope", reason="needs pip install 'tinygrad-bn[lessons]'")
    x = Tensor([[1.0, 2.0]], requires_grad=True)
    (x * 3).sum().backward()
    text = treescope.render_to_text(x)
    assert text.startswith("Tensor(")
    assert "requires_grad=True" in text
    assert "3., 3." in text
    assert "op='mul'" in treescope.render_to_text(x * 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    text = treescope.render_to_text(model)
    assert "BatchNorm1d(" in text
    assert "eps=1e-05" in text
    assert "weight=" in text
    e, *_ = explained()
    text = treescope.render_to_text(e)
    assert "'xhat'" in text
    assert "1.xhat = mul(1.xmu, 1.ivar)" in text
    assert "<script" in treescope.render_to_html(e), "the interactive page"
    assert "not renderable" not in text
