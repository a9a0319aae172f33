"""Explanations: their numbers, which are those of plain autograd, their names, and the ways of gradients."""

import numpy as np
import pytest

from tests.tools.explained import expect_shares_that_sum, explained, images, network
from tinygrad_bn import Tensor, functional, grad, nn
from tinygrad_bn.explain import explain
from tinygrad_bn.sample import RandomDraw
from tinygrad_bn.tensor import OPS

STEPS = ["mu", "xmu", "sq", "var", "sqrtvar", "ivar", "xhat", "gammax", "out"]
BATCH_NORM_WAYS = [
    "xmu → xhat → gammax → out",
    "xmu → sq → var → sqrtvar → ivar → xhat → gammax → out",
    "mu → xmu → xhat → gammax → out",
    "mu → xmu → sq → var → sqrtvar → ivar → xhat → gammax → out",
]


def off(a, b):
    """The largest difference, relative to the largest number."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-300))


def expect_edges_that_sum(e):
    """What steps gave to their operands sums to the gradient of each operand."""
    for p in e.passes:
        size = max(np.abs(np.asarray(g)).max(initial=0) for g in p.grads.values())
        for step, gradient in p.grads.items():
            if given := [edge for (user, i), edge in p.edges.items() if user.operands[i] is step]:
                assert np.abs(sum(given) - gradient).max(initial=0) <= 1e-12 * size, step.name


@pytest.mark.parametrize("make", [network, images])
def test_a_network_is_that_of_plain_autograd(make):
    e, model, x, loss = explained(make)
    plain, x2, target = make()
    want = functional.cross_entropy(plain(x2), target)
    want.backward()
    assert off(loss, want) < 1e-14
    for (key, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        size = max(1e-3, float(np.abs(q.grad.numpy()).max()))  # the bias before a BatchNorm has none
        assert np.abs(p.grad.numpy() - q.grad.numpy()).max() < 1e-12 * size, key
        np.testing.assert_array_equal(e[key].grad, p.grad.numpy(), err_msg="the engine's own gradient")
    for (key, a), (_, b) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-12, err_msg=key)
    assert off(x.grad, x2.grad) < 1e-12
    np.testing.assert_array_equal(e["x"].grad, x.grad.numpy())
    expect_edges_that_sum(e)


@pytest.mark.parametrize("make", [network, images])
def test_the_shares_of_the_ways_sum_to_the_gradient_of_every_step(make):
    e, *_ = explained(make)
    tried = 0
    for path in e:
        if e[path].grad is not None:
            expect_shares_that_sum(e[path])
            tried += 1
    assert tried > 30


@pytest.mark.parametrize("name", sorted(name for name, op in OPS.items() if op.differentiable))
def test_every_op(name):
    """Values and gradients are those of plain autograd, and shares sum to the gradients."""
    tried = 0
    for example in range(6):
        xs, params = OPS[name].sample(RandomDraw(example))

        def tensors(xs=xs):
            return [Tensor(x, requires_grad=x.dtype.kind == "f") if hasattr(x, "dtype") else x for x in xs]

        plain, ours = tensors(), tensors()
        y = OPS[name].function(*plain, **params)
        if not y.requires_grad or not y.size:
            continue
        g = np.random.default_rng(example).normal(size=y.shape)
        y.backward(g)
        with explain() as e:
            z = OPS[name].function(*ours, **params)
            z.backward(g)
        assert off(e["z"].value, y) < 1e-12
        for i, (p, t) in enumerate(zip(plain, ours, strict=True)):
            if isinstance(p, Tensor) and p.grad is not None and p.size:
                e.name(f"operand{i}", t)
                size = max(1.0, np.abs(p.grad.numpy()).max())
                assert np.abs(e[f"operand{i}"].grad - p.grad.numpy()).max() < 1e-12 * size
                expect_shares_that_sum(e[f"operand{i}"])
                expect_shares_that_sum(e[f"operand{i}"], via=[])
                tried += 1
    assert tried or name in ("sign", "astype"), "a sample with a gradient"


def test_the_second_derivative():
    x = Tensor(np.random.default_rng(0).normal(size=(6, 2)), requires_grad=True)
    x2 = Tensor(x, requires_grad=True)

    def second(x):
        dx = grad((functional.batch_norm(x, training=True) ** 3).sum(), x, create_graph=True)
        (dx * dx).sum().backward()
        return dx

    with explain() as e:
        dx = second(x)
    want = second(x2)
    first, last = e["x"].grads
    assert off(first, want) < 1e-12
    assert off(last, x2.grad) < 1e-12
    assert off(dx, want) < 1e-12
    for name in ("x", "mu", "xhat", "∂xhat", "∂ivar"):  # the steps of the gradient have names, and gradients
        expect_shares_that_sum(e[name], via=["mu", "var"])
    assert e["∂xhat"].value.shape == e["xhat"].value.shape
    np.testing.assert_array_equal(e["∂xhat"].value, e["xhat"].grads[0])
    expect_edges_that_sum(e)


# ---- names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_steps_of_batch_norm_have_their_names(dtype):
    e, model, x, _ = explained(network, dtype)
    h = model[0](x)
    want = functional.batch_norm_steps(h, model[1].weight, model[1].bias)
    for name in STEPS:
        assert off(e[f"1.{name}"].value, getattr(want, name)) < 1e-6, name
        assert e[f"1.{name}"].grad is not None
    assert e["1.out"].value.dtype == dtype
    model.eval()
    with explain() as e:
        model(x)
    for name in ("xmu", "ivar", "xhat", "gammax", "out"):
        assert e[f"1.{name}"].value.shape in [(8, 4), (4,)]
    rm, rv = model[1].running_mean.numpy(), model[1].running_var.numpy()
    np.testing.assert_array_equal(e["1.running_mean"].value, rm)
    assert off(e["1.xmu"].value, e["0.out"].value - rm.astype(np.float64)) < 1e-6
    assert off(e["1.ivar"].value, 1 / np.sqrt(rv.astype(np.float64) + 1e-5)) < 1e-6
    assert e["1.out"].value.dtype == dtype
    assert [k for k in e if k.startswith("1.out")] == ["1.out"]


def test_a_formula_has_every_op_of_a_step_by_the_names_of_its_operands():
    e, *_ = explained()
    assert e["1.xhat"].formula == f"1.xhat = mul(1.xmu, 1.ivar):  {OPS['mul'].formula}"
    x = Tensor(np.random.default_rng(0).normal(size=(6, 2)), requires_grad=True)
    with explain() as e:
        functional.batch_norm(x, training=True)
    for view, scope in ((e["mu"], "batch_norm_training."),):
        calls = [line.split(":  ")[0] for line in view.formula.splitlines()]
        assert calls[:2] == [f"{scope}sum = sum(x, axis=(0,), keepdims=True)", f"{scope}div = div({scope}sum, 6)"]
        assert [call.split(" = ")[1].split("(")[0] for call in calls] == ["sum", "div", "sub", "sum", "div", "add"]
        assert calls[-1] == f"{view.path} = add({scope}div, {scope}div@2)"


def test_gradients_that_were_there_add_no_step():
    model, x, target = network()
    listed = []
    for _ in range(2):
        with explain() as e:
            functional.cross_entropy(model(x), target).backward()
        listed.append((list(e), e.program().count("\n"), [c.phase for c in e.calls]))
    assert listed[0][0] == listed[1][0]
    assert len(listed[1][2]) > len(listed[0][2]), "the sums are calls below the seam, of the backward pass"
    assert listed[1][2].index("backward") == listed[0][2].index("backward")
    assert set(listed[1][2][listed[1][2].index("backward") :]) == {"backward"}
    np.testing.assert_array_equal(2 * e["0.weight"].grad, model[0].weight.grad.numpy())


def test_steps_without_weight_and_bias_are_found_by_both_names():
    x = Tensor(np.random.default_rng(0).normal(size=(6, 2)), requires_grad=True)
    with explain() as e:
        y = functional.batch_norm(x, training=True)
        y.backward(np.ones((6, 2)))
    assert e["gammax"].path == e["xhat"].path
    assert e["y"].path == "y"
    assert e["out"].path == "y"


def test_names_of_the_program():
    x = Tensor([1.0, 2.0], requires_grad=True)
    with explain() as e:
        hidden = x * 3
        kept = [hidden + 1]
        (kept[0] * hidden).sum().backward()
    assert e["hidden"].value.tolist() == [3, 6]
    e.name("shifted", kept[0])
    assert e["shifted"].inputs == ["hidden"]
    assert e["hidden"].users == ["shifted", "mul"]
    assert dict(e["hidden"].paths) == {
        "hidden → shifted": pytest.approx(e["hidden"].value),
        "hidden": pytest.approx(e["shifted"].value),
    }
    with pytest.raises(KeyError, match="took no part"):
        e.name("other", Tensor([1.0]))
    with pytest.raises(ValueError, match="the name of another step"):
        e.name("hidden", kept[0])
    assert "hidden" in e
    assert "other" not in e


def test_variables_of_functions_of_the_program_are_names():
    program = """
def f(x):
    hidden = x * 3
    x = hidden + 1
    return (hidden * x).sum()
"""
    functions: dict = {}
    exec(compile(program, "<stdin>", "exec"), functions)
    e = explain(functions["f"], np.array([1.0, 2.0]))
    assert list(e) == ["x", "hidden", "add", "mul", "result"], "an argument that is assigned again keeps its meaning"
    assert e["hidden"].grad.tolist() == [7, 13]


@pytest.mark.parametrize(
    ("name", "message"),
    [("1.xhta", "near ones are 1.xhat"), ("xhatt", "near ones are 1.xhat"), ("weight", "is the name of 3 steps"),
     ("!", "there are x, 0.weight")],
)  # fmt: skip
def test_unknown_names(name, message):
    e, *_ = explained()
    with pytest.raises(KeyError, match=message):
        e[name]
    with pytest.raises(TypeError, match="found by its name"):
        e[3]


def test_arrays_that_a_module_is_given_are_called_as_its_parameters():
    class Gate(nn.Module):
        def forward(self, left, right):
            return left * right

    class Outer(nn.Module):
        def __init__(self):
            self.gate, self.linear = Gate(), nn.Linear(2, 2)

        def forward(self, samples, mask):
            return self.gate(self.linear(samples), mask)

    with explain() as e:
        Outer()(np.ones((3, 2), np.float32), [[0.0, 1.0]])
    assert [name for name in e if "." not in name] == ["samples", "mask"]
    assert e["gate.out"].inputs == ["linear.out", "mask"]
    tensors = [Tensor(np.ones((3, 2), np.float32)), Tensor(np.ones((3, 2), np.float32))]
    mine = tensors[1]
    with explain() as e:
        Outer()(*tensors)
    assert [name for name in e if "." not in name] == ["samples", "mine"], "a name of the program's comes first"
    assert e["mask"].path == "mine"
    del mine
    with pytest.raises(ValueError, match="reached 'samples': it does not require a gradient"):
        len(e["samples"].paths)


def test_a_layer_with_two_places_has_the_name_of_the_first():
    linear = nn.Linear(3, 3, rng=np.random.default_rng(0)).astype(np.float64)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    with explain() as e:
        model(np.ones((2, 3))).sum().backward()
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    np.testing.assert_array_equal(e["0.weight"].grad, linear.weight.grad.numpy())
    assert {"0.out", "0.out@2"} <= set(e)
    expect_shares_that_sum(e["0.weight"])


def test_wrong_calls_say_what_is_right():
    e, *_ = explained()
    t = Tensor([1.0])
    for arguments in (("x", 3), (3, t)):
        with pytest.raises(TypeError, match=r"name\(\) takes a string and a tensor; got"):
            e.name(*arguments)
    with pytest.raises(KeyError, match=r"'1' is a module or a fused op; its steps are 1\.weight, 1\.bias, "):
        e["1"]
    with pytest.raises(TypeError, match="takes a function or a module first; got a ndarray"):
        explain(np.ones(3))
    assert list(e["0.out"].paths(via="1.var")) == list(e["0.out"].paths(via=["1.var"]))
    with explain() as running:
        hidden = t * 2
        with pytest.raises(KeyError) as error:
            running["hidden"]
    assert "still recording" in error.value.__notes__[0]
    assert running["hidden"].value.tolist() == hidden.numpy().tolist()


def test_the_cast_of_a_cotangent_is_no_step():
    x = Tensor(np.ones((2, 2), np.float32), requires_grad=True)
    with explain() as e:
        y = x * 3
        y.backward(np.ones((2, 2)))
    assert [*e] == ["x", "y"]
    assert {c.name: c.phase for c in e.calls}["astype"] == "backward"
    g = Tensor(np.ones((2, 2)), requires_grad=True)
    with explain() as e:  # g may be differentiated
        y = x * 3
        dx = grad(y, x, g, create_graph=True)
        (dx * dx).sum().backward()
    np.testing.assert_array_equal(e["g"].grad, g.grad.numpy())
    expect_shares_that_sum(e["g"])


def test_modules_in_modules_and_a_module_that_is_called_twice():
    class Block(nn.Module):
        def __init__(self):
            self.norm, self.lin = nn.BatchNorm1d(3), nn.Linear(3, 3)

        def forward(self, x):
            return x + self.lin(self.norm(x)).relu()

    class Net(nn.Module):
        def __init__(self):
            self.blocks = [Block(), Block()]

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.blocks[1](x)

    net, x = Net().astype(np.float64), Tensor(np.random.default_rng(0).normal(size=(5, 3)), requires_grad=True)
    with explain() as e:
        net(x).backward(np.random.default_rng(1).normal(size=(5, 3)))
    for path in ("blocks.0.norm.xhat", "blocks.1.norm.xhat", "blocks.1.norm.xhat@2", "blocks.1.out@2", "blocks.0.out"):
        assert e[path].value.shape == (5, 3)
    assert e.kinds["blocks.0.norm"] == "BatchNorm1d"
    assert len(e["x"].paths) > 1
    expect_shares_that_sum(e["x"])
    np.testing.assert_array_equal(e["x"].grad, x.grad.numpy())


# ---- ways -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "0.out"])
def test_batch_norm_has_four_ways(name):
    e, *_ = explained()
    ways = e[name].paths
    assert list(ways) == [f"{name} → {way}" for way in BATCH_NORM_WAYS]
    assert np.abs(ways[f"{name} → {BATCH_NORM_WAYS[3]}"]).max() < 1e-16, "Σ xmu = 0"
    if name == "0.out":  # by hand
        dxhat, ivar, xmu, dsq = e["1.xhat"].grad, e["1.ivar"].value, e["1.xmu"].value, e["1.sq"].grad
        direct, variance, mean, _ = ways.values()
        assert off(direct, dxhat * ivar) < 1e-12
        assert off(variance, dsq * 2 * xmu) < 1e-12
        assert off(mean, np.broadcast_to(-(dxhat * ivar).mean(0), mean.shape)) < 1e-12
    assert list(e[name].paths(via=["1.var", "1.mu"])) == [name, f"{name} → var", f"{name} → mu", f"{name} → mu → var"]
    with pytest.raises(KeyError, match="there is no way"):
        ways["x"]


def test_a_tensor_that_is_used_twice_by_one_op():
    a = Tensor([3.0], requires_grad=True)
    with explain() as e:
        b = a + a
        c = b * b
        c.backward()
    assert e["a"].grad.tolist() == [24]
    assert {way: share.tolist() for way, share in e["a"].paths(via=["b"]).items()} == {"a → b": [24]}


def test_too_many_ways_and_none():
    x = Tensor([1.0], requires_grad=True)
    with explain() as e:
        y = x
        names = {}
        for i in range(8):
            p, q = y * 1, y * 0.5
            names |= {f"p{i}": p, f"q{i}": q}
            y = p + q
        y.backward()
        z = x * 2
    for name, t in names.items():
        if name not in e:
            e.name(name, t)
    with pytest.raises(ValueError, match="more than 64 ways"):
        len(e["x"].paths)
    assert len(e["x"].paths(via=["p0"])) == 2
    with pytest.raises(ValueError, match="no backward pass reached 'z'"):
        len(e["z"].paths)
    assert z.item() == 2
