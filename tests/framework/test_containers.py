"""Modules in lists and dictionaries, and tables of vectors."""

import numpy as np
import pytest

from tinygrad_bn import Tensor, nn
from tinygrad_bn import functional as F


class Blocks(nn.Module):
    def __init__(self):
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.heads = nn.ModuleDict({"left": nn.Linear(3, 1), "right": nn.Linear(3, 2)})

    def forward(self, x):
        for block in self.blocks:
            x = F.tanh(block(x))
        return F.concatenate([head(x) for head in self.heads.values()], axis=1)


def test_keys_and_gradients_of_parts():
    model = Blocks()
    names = ["blocks.0", "blocks.1", "blocks.2", "heads.left", "heads.right"]
    assert list(model.state_dict()) == [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    model(np.ones((4, 3), np.float32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    other = Blocks()
    other.load_state_dict(model.state_dict())
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    np.testing.assert_array_equal(other(x).numpy(), model(x).numpy())


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList])
def test_lists(kind):
    a, b, c, d = (nn.Linear(2, 2) for _ in range(4))
    found = kind(a, b) if kind is nn.Sequential else kind([a, b])
    assert found.append(c) is found
    assert list(found) == [a, b, c] == list(found.extend([]))
    found.insert(1, d)
    assert list(found) == [a, d, b, c]
    assert (found[1], found[-1], len(found)) == (d, c, 4)
    assert type(found[1:3]) is kind
    assert list(found[1:3]) == [d, b]
    found[1] = c
    assert list(found) == [a, c, b, c]
    assert [name for name, _ in found.named_children()] == ["0", "1", "2", "3"]
    for wrong in (lambda: found.append(3), lambda: found.insert(0, nn.ReLU), lambda: found.extend([None])):
        with pytest.raises(TypeError, match=f"{kind.__name__} takes modules; module"):
            wrong()
    with pytest.raises(IndexError, match="there is no module 4"):
        found[4] = a
    assert list(found) == [a, c, b, c]


def test_a_list_has_no_forward_and_takes_several():
    with pytest.raises(TypeError, match="defines no forward"):
        nn.ModuleList([nn.ReLU()])(np.ones(2))
    with pytest.raises(TypeError, match=r"as in ModuleList\(\[a, b\]\)"):
        nn.ModuleList(3)


def test_dictionaries():
    a, b = nn.ReLU(), nn.Linear(1, 1)
    found = nn.ModuleDict({"a": a})
    found["b"] = b
    assert (list(found.keys()), list(found.values()), list(found.items())) == (["a", "b"], [a, b], [("a", a), ("b", b)])
    assert "b" in found
    del found["b"]
    assert (list(found), len(found), "b" in found) == (["a"], 1, False)
    with pytest.raises(KeyError, match="no module 'b'; there are a"):
        found["b"]
    for name, error in (
        ("x.y", TypeError),
        (3, TypeError),
        ("", TypeError),
        ("keys", KeyError),
        ("training", KeyError),
    ):
        with pytest.raises(error):
            found[name] = a
    with pytest.raises(TypeError, match="'c' is a function"):
        found.update({"c": lambda x: x})
    with pytest.raises(TypeError, match="by name in a dictionary"):
        nn.ModuleDict([a])
    assert list(found) == ["a"]


@pytest.mark.parametrize("padding", [None, 1, -2])
def test_a_table_of_vectors(padding):
    table = nn.Embedding(4, 3, padding_idx=padding, rng=np.random.default_rng(0))
    rows = np.array([[1, 2, 2], [0, 1, 3]])
    place = padding if padding is None else padding % 4
    assert padding is None or not table.weight.numpy()[place].any()
    y = table(rows)
    np.testing.assert_array_equal(y.numpy(), table.weight.numpy()[rows])
    g = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    y.backward(g)
    want = np.zeros((4, 3))
    np.add.at(want, rows, g)
    if padding is not None:
        want[place] = 0
    np.testing.assert_allclose(table.weight.grad.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nn.Embedding(4, 3)(np.array([0, 4])), IndexError, "from 0 to 3; got 0 to 4"),
        (lambda: nn.Embedding(4, 3)(np.array([-1])), IndexError, "got -1 to -1"),
        (lambda: nn.Embedding(4, 3)(np.array([0.5])), TypeError, "takes integers.*got float64"),
        (lambda: nn.Embedding(4, 3, padding_idx=4), ValueError, "padding_idx"),
        (lambda: nn.Embedding(0, 3), ValueError, "num_embeddings"),
        (lambda: nn.GELU("fast"), ValueError, "'none' or 'tanh'"),
        (lambda: nn.Hardtanh(1, 1), ValueError, "less than max_val"),
        (lambda: F.hardtanh(np.ones(2), 2, 1), ValueError, "less than max_value"),
        (lambda: nn.CELU(0), ValueError, "cannot be 0"),
        (lambda: F.celu(np.ones(2), 0), ValueError, "cannot be 0"),
        (lambda: F.mish(np.ones(2, int)), TypeError, "floating-point"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_training_with_a_table_is_captured():
    from tinygrad_bn import optim
    from tinygrad_bn.captured import capture

    ends = []
    for captures in (False, True):
        rng = np.random.default_rng(0)
        table, head = nn.Embedding(5, 4, rng=rng), nn.Linear(4, 2, rng=rng)
        optimizer = optim.SGD([*table.parameters(), *head.parameters()], lr=0.5)

        def step(rows, y, table=table, head=head, optimizer=optimizer):
            loss = F.cross_entropy(head(table(rows)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        run = capture(step) if captures else step
        losses = [run(rng.integers(0, 5, 6), rng.integers(0, 2, 6)).item() for _ in range(6)]
        ends.append((losses, table.weight.numpy().tobytes()))
    assert ends[0] == ends[1]


ACTIVATIONS = [
    F.celu,
    F.gelu_tanh,
    F.hardsigmoid,
    F.hardswish,
    F.hardtanh,
    F.logsigmoid,
    F.mish,
    F.relu6,
    F.selu,
    F.softsign,
]


@pytest.mark.parametrize("f", ACTIVATIONS)
def test_activations_in_half_precision_round_once(f):
    x = np.random.default_rng(0).normal(size=50).astype(np.float16) * 4
    y = f(Tensor(x))
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y.numpy(), f(x.astype(np.float32)).astype(np.float16))
