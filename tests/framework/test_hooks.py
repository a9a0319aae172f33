"""Hooks on tensors and modules: when they are called, with what, and that nothing is left of them."""

import copy
import gc
import threading
import weakref

import numpy as np
import pytest

from tests.framework.test_capture import DATA, dense, training
from tinygrad_bn import Tensor, grad, nn, optim
from tinygrad_bn import functional as F
from tinygrad_bn.captured import capture
from tinygrad_bn.explain import explain
from tinygrad_bn.gradient_hooks import HOOKS
from tinygrad_bn.transforms import grad as gradient_of


@pytest.fixture(autouse=True)
def none_before_and_after():
    gc.collect()
    assert not HOOKS
    yield
    gc.collect()
    assert not HOOKS


def test_the_gradient_is_complete_and_seen_once():
    """Also of a tensor that is used twice, of a leaf, of an intermediate result, and of the last result."""
    x = Tensor([1.0, 2.0], requires_grad=True)
    seen = []
    y = x * x
    z = (y * y + y).sum()
    for name, t in (("x", x), ("y", y), ("z", z)):
        t.register_hook(lambda g, name=name: seen.append((name, g.numpy().tolist())))
    z.backward()
    assert seen == [("z", 1.0), ("y", [3.0, 9.0]), ("x", [6.0, 36.0])]
    assert x.grad.numpy().tolist() == [6, 36]


def test_a_hook_may_return_another_gradient():
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = x * x
    y.retain_grad()
    y.register_hook(lambda g: g * 2)
    y.register_hook(lambda g: g + 1)
    x.register_hook(lambda g: -g)
    (y * 3).sum().backward()
    assert y.grad.numpy().tolist() == [7, 7]
    assert x.grad.numpy().tolist() == [-14, -28]
    assert grad((x * x).sum(), x).numpy().tolist() == [-2, -4]


def test_removed_hooks_are_not_called():
    x = Tensor([1.0], requires_grad=True)
    first, second = x.register_hook(lambda g: g * 2), x.register_hook(lambda g: g * 5)
    first.remove()
    first.remove()
    assert grad((x * x).sum(), x).item() == 10
    with x.register_hook(lambda g: g * 7):
        assert grad((x * x).sum(), x).item() == 70
    second.remove()
    assert grad((x * x).sum(), x).item() == 2
    assert not HOOKS


def test_with_create_graph_the_hook_is_differentiated():
    x = Tensor(2.0, requires_grad=True)
    kinds = []
    x.register_hook(lambda g: kinds.append(g.requires_grad) or g * g)
    dx = grad(x**3, x, create_graph=True)  # (3x²)²
    assert dx.item() == 144
    assert kinds == [True]
    x.register_hook(lambda g: None)
    assert grad(dx, x).item() == 4 * 9 * 8 * (4 * 9 * 8)  # the hook squares that too
    w = np.array([1.0, 2.0])

    def doubled(x):
        y = x * x
        y.register_hook(lambda g: g * x)
        return y.sum()

    np.testing.assert_allclose(gradient_of(doubled)(w), 2 * w * w)
    np.testing.assert_allclose(gradient_of(lambda x: gradient_of(doubled)(x).sum())(w), 4 * w)


def test_in_fused_ops_and_after_an_error():
    x = Tensor(np.random.default_rng(0).normal(size=(4, 3)), requires_grad=True)
    seen = []
    x.register_hook(lambda g: seen.append(g.numpy().copy()))
    y = F.batch_norm(x, training=True)
    (y**2 * x).sum().backward()
    np.testing.assert_array_equal(seen[0], x.grad)
    with pytest.raises(TypeError, match=r"has to return a gradient.*got an int"), x.register_hook(lambda g: 3):
        (x * x).sum().backward()
    with x.register_hook(lambda g: g.sum()), pytest.raises(ValueError, match=r"\(4, 3\) and returned float64 \(\)"):
        (x * x).sum().backward()
    with pytest.raises(TypeError, match="a hook is a function; got 3"):
        x.register_hook(3)
    with pytest.raises(RuntimeError, match="gets no gradient"):
        x.detach().register_hook(print)


def test_nothing_is_left_of_a_tensor_that_is_gone():
    x = Tensor([1.0], requires_grad=True)
    y = x * x
    y.register_hook(lambda g: g * 0)
    del y
    assert not HOOKS
    assert grad((x * x).sum(), x).item() == 2


def test_explain_shows_the_same_nodes():
    x = Tensor([[1.0], [3.0]], requires_grad=True)

    def told():
        with explain() as e:
            (x * x).sum().backward()
        x.zero_grad()
        return [str(step) for step in e.steps], len(e.passes)

    before = told()
    with x.register_hook(lambda g: g):
        assert told() == before
    assert len(before[0]) == 3


def test_hooks_of_modules():
    layer = nn.Linear(2, 2)
    calls = []
    before = layer.register_forward_pre_hook(lambda module, args: calls.append((module, len(args))) or args[0] * 2)
    after = layer.register_forward_hook(lambda module, args, y: y + args[0].sum())
    x = Tensor([[1.0, 2.0]])
    plain = layer.forward(x * 2) + (x * 2).sum()
    np.testing.assert_array_equal(layer(x), plain)
    assert calls == [(layer, 1)]
    np.testing.assert_array_equal(copy.deepcopy(layer)(x), layer.forward(x))
    before.remove()
    np.testing.assert_array_equal(layer(x), layer.forward(x) + x.sum())
    after.remove()
    np.testing.assert_array_equal(layer(x), layer.forward(x))
    with layer.register_forward_pre_hook(lambda module, args: (args[0] * 0,)):
        np.testing.assert_array_equal(layer(x), layer.forward(x * 0))


def test_the_gradient_of_a_layers_output():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    norms = []
    remember = lambda g: norms.append(float((g * g).sum().item()))  # noqa: E731
    handles = [m.register_forward_hook(lambda module, args, y: y.register_hook(remember) and None) for m in model]
    model(np.ones((5, 3), np.float32)).sum().backward()
    assert len(norms) == 3
    assert norms[0] == 10
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("inside", [True, False])
def test_a_step_with_hooks_is_not_captured(inside):
    model = dense()
    calls = []
    optimizer = optim.SGD(model.parameters(), 0.1)
    if inside:

        def loss(outputs, y):
            outputs.register_hook(lambda g: calls.append(1))
            return F.cross_entropy(outputs, y)

        with pytest.warns(UserWarning, match="not captured"):
            step = run(capture(training(model, optimizer, loss)))
        assert "calls" in str(step)
    else:
        step = run(capture(training(model, optimizer)), before=True)
        with next(model.parameters()).register_hook(lambda g: calls.append(1)):
            run(step)
    assert len(calls) == 6
    optimizer.zero_grad()


def run(step, before=False):
    for x, y in DATA[:6]:
        step(x, y)
    assert not before or step.programs
    return step


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [1, 2])
def test_hooks_of_layers_that_would_be_fused(layer, training):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU()).train(training)
    x, seen = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32), []
    want = model(x).numpy()
    with model[layer].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape)):
        np.testing.assert_allclose(model(x).numpy(), want, rtol=1e-6)
    with model[layer].register_forward_hook(lambda module, args, y: y * 0):
        assert not model(x).numpy().any()
    assert seen == [(4, 2)]


def test_nothing_is_left_of_hooks_that_were_removed():
    x = Tensor([1.0], requires_grad=True)
    before = len(weakref.finalize._registry)
    for _ in range(100):
        with x.register_hook(print):
            assert len(weakref.finalize._registry) == before + 1
    assert len(weakref.finalize._registry) == before


def test_threads_register_while_others_differentiate():
    x, stop, errors = Tensor([1.0], requires_grad=True), threading.Event(), []

    def register():
        while not stop.is_set():
            handles = [x.register_hook(lambda g: g) for _ in range(5)]
            for handle in handles:
                handle.remove()

    def differentiate():
        try:
            for _ in range(500):
                assert grad((x * x).sum(), x).item() == 2
        except Exception as error:
            errors.append(error)

    others = [threading.Thread(target=register) for _ in range(2)]
    workers = [threading.Thread(target=differentiate) for _ in range(2)]
    for thread in (*others, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()
    assert not errors


def test_a_hook_gets_a_gradient_of_the_right_dtype_and_device():
    x = Tensor([1.0], requires_grad=True)
    with x.register_hook(lambda g: g.astype(np.float64)), pytest.raises(ValueError, match="returned float64"):
        (x * x).sum().backward()
