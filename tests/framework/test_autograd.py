"""The engine: order, reuse, freeing, higher orders, and its errors."""

import gc
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn import Tensor, backend, debug, functional, grad, is_recording, no_grad


def leaf(*values):
    return Tensor(np.array(values), requires_grad=True)


def test_a_chain_of_100_000_ops():
    x = leaf(1.0)
    y = x
    for _ in range(100_000):
        y = y + 1
    y.backward()
    assert x.grad.item() == 1
    z = x
    for _ in range(100_000):
        z = z * 1.0
    del z  # and freed without a backward, by reference counting, however deep


def test_diamonds_and_reuse():
    a = leaf(3.0)
    b = a + a
    c = b + b
    d = c * b + a
    d.backward()
    assert a.grad.item() == 16 * 3 + 1  # d = 8 a² + a


@given(st.lists(st.tuples(st.sampled_from("+*-"), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_any_graph_has_the_gradient_of_forward_differentiation(program):
    """Against dual numbers, which propagate derivatives the other way round."""
    values, duals = [leaf(1.5), leaf(-0.5)], [(1.5, np.array([1.0, 0])), (-0.5, np.array([0, 1.0]))]
    leaves = values[:]
    for operator, i, j in program:
        i, j = i % len(values), j % len(values)
        (a, da), (b, db) = duals[i], duals[j]
        if operator == "+":
            values.append(values[i] + values[j]), duals.append((a + b, da + db))
        elif operator == "-":
            values.append(values[i] - values[j]), duals.append((a - b, da - db))
        else:
            values.append(values[i] * values[j] * 0.5), duals.append((a * b * 0.5, 0.5 * (da * b + a * db)))
    gradients = grad(values[-1], leaves)
    np.testing.assert_allclose([g.item() for g in gradients], duals[-1][1], rtol=1e-9, atol=1e-12)


def test_backward_accumulates_and_zero_grad_forgets():
    x = leaf(2.0)
    (x * x).backward()
    (x * x).backward()
    assert x.grad.item() == 8
    x.zero_grad()
    assert x.grad is None


def test_a_freed_graph_says_so_and_retain_graph_keeps_it():
    x = leaf(2.0)
    y = x * x
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.item() == 8
    with pytest.raises(RuntimeError, match=r"'mul' was freed .* retain_graph=True"):
        y.backward()
    with pytest.raises(RuntimeError, match="freed"):
        grad(y * 2, x)
    assert x.grad.item() == 8


def test_two_results_that_share_a_freed_part():
    x = leaf(2.0)
    h = x * x
    a, b = h + 1, h * 3
    a.backward()
    with pytest.raises(RuntimeError, match="'mul' was freed"):
        b.backward()


def test_memory_is_freed_without_the_cycle_collector():
    gc.disable()
    try:
        x = leaf(1.0)
        h = x * 2
        y = h.exp()
        refs = [weakref.ref(h), weakref.ref(y)]
        y.backward()
        del h, y
        assert all(ref() is None for ref in refs)
        y = x * 2
        ref = weakref.ref(y)
        z = y + 1
        z.backward()
        del y
        assert ref() is None  # z lives, but no longer what it was computed from
    finally:
        gc.enable()


def test_grad_touches_no_grad_and_keeps_the_graph():
    x, w = leaf(2.0), leaf(3.0)
    y = x * w
    gx, gw = grad(y, [x, w])
    assert (gx.item(), gw.item()) == (3, 2)
    assert x.grad is None
    assert grad(y, x).item() == 3
    unrelated = leaf(1.0, 2.0)
    assert grad(y, [unrelated])[0].numpy().tolist() == [0, 0]


def test_grad_by_an_intermediate_tensor_and_by_what_is_behind_it():
    x = leaf(2.0)
    h = x * 3
    y = h * h + x
    gh, gx = grad(y, [h, x])
    assert (gh.item(), gx.item()) == (12, 37)


def test_only_what_leads_to_a_target_is_computed():
    x, w = leaf(2.0), leaf(3.0)
    side = (w * 5).exp()
    y = x * 2 + side * 0
    side.data = [1.0]
    assert grad(y, x).item() == 2
    with pytest.raises(RuntimeError, match="changed"):
        grad(y, w)


@given(st.integers(1, 6), st.floats(0.5, 2))
def test_any_order_of_derivative(order, value):
    x = leaf(value)
    y = x**6 + x.log()
    for _ in range(order):
        y = grad(y, x, create_graph=True)
    power = np.prod([6 - k for k in range(order)]) * value ** (6 - order)
    log = (-1) ** (order - 1) * np.prod([max(1, k) for k in range(order)]) * value**-order
    assert np.isclose(y.item(), power + log)


def test_backward_with_create_graph_gives_a_differentiable_grad():
    x = leaf(2.0)
    (x**3).backward(create_graph=True)
    assert grad(x.grad, x).item() == 12


def test_retain_grad():
    x = leaf(2.0)
    h = (x * 3).retain_grad()
    (h * h).backward()
    assert h.grad.item() == 12
    assert x.grad.item() == 36
    with no_grad(), pytest.raises(RuntimeError, match="no gradient"):
        (x * 2).retain_grad()


def test_no_grad_and_detach():
    x = leaf(2.0)
    with no_grad():
        assert not is_recording()
        y = x * 2
    assert is_recording()
    assert not y.requires_grad
    z = (x * x).detach() * x
    z.backward()
    assert x.grad.item() == 4


def test_no_grad_is_of_one_thread():
    seen = []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append(is_recording()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_the_gradients_of_a_sum_do_not_share_memory_with_each_other_or_the_cotangent():
    a, b, g = leaf(1.0, 2.0), leaf(3.0, 4.0), np.array([1.0, 1.0])
    (a + b).backward(g)
    g[:] = 9
    assert a.grad.numpy().tolist() == b.grad.numpy().tolist() == [1, 1]
    assert not np.shares_memory(a.grad.numpy(), b.grad.numpy())


def test_a_cotangent_takes_the_dtype_of_its_tensor():
    x = Tensor(np.array([1.0, 2.0], np.float32), requires_grad=True)
    y = (x * 3).retain_grad()
    g = Tensor(np.array([0.5, 0.1]))
    assert grad(y, y, g).dtype == np.float32
    y.backward(g)
    assert y.grad.dtype == np.float32


def test_rules_of_operands_that_need_no_gradient_are_not_evaluated(monkeypatch):
    from tinygrad_bn.tensor import OPS

    def refuse(g, y, a, b):
        raise AssertionError("not needed")

    rules = OPS["matmul"].rules
    object.__setattr__(OPS["matmul"], "rules", (refuse, rules[1]))
    try:
        w = Tensor(np.ones((3, 2)), requires_grad=True)
        (Tensor(np.ones((4, 3))) @ w).sum().backward()
        assert w.grad.numpy().tolist() == [[4, 4]] * 3
    finally:
        object.__setattr__(OPS["matmul"], "rules", rules)


ERRORS = [
    (lambda: Tensor([1.0]).backward(), RuntimeError, "requires_grad=True"),
    (lambda: leaf(1.0, 2.0).backward(), ValueError, r"shape \(2,\) needs a cotangent"),
    (lambda: (leaf(1.0, 2.0) * 2).backward(np.ones(3)), ValueError, r"cotangent has shape \(3,\), the tensor \(2,\)"),
    (lambda: grad(leaf(1.0) * 2, [Tensor([1.0])]), RuntimeError, r"xs\[0\]"),
    (lambda: grad(Tensor(1.0), leaf(1.0)), RuntimeError, "no gradient to give"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), ERRORS)
def test_errors(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


@pytest.mark.parametrize("kind", ["an operand was changed", "a gradient fails"])
def test_an_error_in_a_backward_pass_names_the_op_and_in_debug_mode_the_place(kind, monkeypatch):
    x = leaf(1.0, 2.0)
    with debug():
        y = functional.exp(x * 2)  # the place
    if kind == "a gradient fails":
        vjp = backend.vjp
        monkeypatch.setattr(backend, "vjp", lambda op, *args: 1 / 0 if op.name == "mul" else vjp(op, *args))
    else:
        x.data = [3.0, 4.0]
    with pytest.raises((RuntimeError, ZeroDivisionError)) as caught:
        y.backward(np.ones(2))
    notes = "".join(caught.value.__notes__)
    assert "backward pass of mul(float64 (2,), 2)" in notes
    assert "y = functional.exp(x * 2)  # the place" in notes


def test_functions_of_arrays_give_arrays():
    a = np.array([[1.0, 2.0]])
    for f in (functional.exp, functional.softmax, functional.mean, functional.gelu):
        assert not isinstance(f(a), Tensor)
        np.testing.assert_allclose(f(a), f(Tensor(a)).numpy(), rtol=1e-15)


def test_the_backward_pass_frees_arrays_as_it_goes(monkeypatch):
    """Each result's array is freed once its gradient has been passed on."""
    from tinygrad_bn import autograd

    alive, counts = [], []
    x = y = Tensor(np.ones(3), requires_grad=True)
    for _ in range(10):
        y = y.tanh()
        alive.append(weakref.ref(y))
    pull = autograd._pull

    def counting(*args):
        counts.append(sum(ref() is not None for ref in alive))
        return pull(*args)

    monkeypatch.setattr(autograd, "_pull", counting)
    last = y.sum()
    del y
    last.backward()
    assert counts == [10, *range(10, 0, -1)]
    assert x.grad is not None


def test_a_missing_gradient_of_an_operand_is_an_error(monkeypatch):
    vjp = backend.vjp
    monkeypatch.setattr(backend, "vjp", lambda *args: vjp(*args)[:1])
    with pytest.raises(ValueError, match="shorter"):
        (leaf(2.0) * leaf(3.0)).backward()


def test_after_a_refused_backward_the_graph_is_whole():
    x, w = leaf(1.0), leaf(2.0)
    h = (x * x) * x
    y = (h * w).exp()
    w.data = [3.0]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="changed"):
            y.backward()
    assert x.grad is w.grad is None
    h.backward()  # its part of the graph is not freed
    assert x.grad.item() == 3


def test_only_tensors_can_be_differentiated():
    x = leaf(1.0)
    for args in ((3.0, x), (x * 2, np.ones(1)), (x * 2, [x, 1.0])):
        with pytest.raises(TypeError, match="a tensor by tensors"):
            grad(*args)


def test_a_tensor_frozen_in_the_forward_pass_gets_no_gradient_later():
    x, w = Tensor([2.0]), leaf(3.0)
    y = ((x * 2) * w + x * w).sum()
    x.requires_grad = True
    y.backward()
    assert w.grad.item() == 6
    assert x.grad is None


def test_create_graph_under_no_grad_does_not_depend_on_the_layout():
    for operand in (lambda a: a, lambda a: a.T):
        x = Tensor(np.arange(1.0, 5.0).reshape(2, 2), requires_grad=True)
        y = (operand(x) ** 3).sum()
        with no_grad():
            assert grad(y, x, create_graph=True).requires_grad
            y.backward(create_graph=True)
            y.backward(create_graph=True)
        assert x.grad.requires_grad


def test_a_tensor_is_refused_as_an_option():
    with pytest.raises(TypeError, match="value is an option"):
        functional.pad(leaf(1.0), width=((1, 1),), value=leaf(2.0))


def test_no_grad_decorates_a_function_that_calls_itself():
    x = Tensor(2.0, requires_grad=True)

    @no_grad()
    def power(n):
        return x * power(n - 1) if n else Tensor(1.0)

    assert power(3).item() == 8
    assert power(3).is_leaf
    assert not (x * x).is_leaf


def test_one_no_grad_inside_itself():
    off = no_grad()
    with off:
        with off:
            assert not is_recording()
        assert not is_recording()
    assert is_recording()


def test_a_result_whose_op_gives_it_no_gradient_is_passed_over():
    """A condition gets none, also where it was computed from a tensor that is asked for."""
    x, w = Tensor([1.0, 2.0], requires_grad=True), Tensor([3.0, 0.0], requires_grad=True)
    gx, gw = grad(functional.where(w * 2, x, 0.0).sum(), [x, w])
    assert gx.numpy().tolist() == [1, 0]
    assert gw.numpy().tolist() == [0, 0]
