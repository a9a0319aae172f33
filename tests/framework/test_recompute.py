"""Parts whose results are computed again: the same bits, statistics that move once, less memory."""

import tracemalloc
from contextlib import nullcontext

import numpy as np
import pytest

from tinygrad_bn import Tensor, capture, grad, manual_seed, nn, no_grad, optim, random, transforms
from tinygrad_bn import functional as F
from tinygrad_bn.transforms import checkpoint

RNG = np.random.default_rng(0)


def blocks(width: int = 6) -> nn.Sequential:
    manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Tanh()) for _ in range(3))
    )


def outcome(model: nn.Module, run, x: np.ndarray, order: int) -> tuple[list[np.ndarray], str]:
    """The value, gradients up to an order, the statistics; and the state of the generator."""
    manual_seed(3)
    t = Tensor(x, requires_grad=True)
    y = (run(t) ** 2).sum()
    leaves = [t, *model.parameters()]
    out = [y]
    if order == 1:
        y.backward()
        out += [p.grad for p in leaves]
    else:
        slopes = grad(y, leaves, create_graph=True)
        out += [*slopes, *grad((slopes[0] ** 2).sum(), leaves)]
    return [np.array(a) for a in (*out, *model.buffers())], repr(random.generator().bit_generator.state)


@pytest.mark.parametrize("order", [1, 2])
def test_the_same_at_each_order(order):
    """The same bits at the first; at the second, sums of several terms are in another order."""
    x = RNG.normal(size=(5, 6))
    plain, again, nested = (blocks().astype(np.float64) for _ in range(3))

    def in_parts(t):
        for block in again:
            t = checkpoint(block, t)
        return t

    def one_in_another(t):
        return checkpoint(lambda t: nested[2](checkpoint(nested[1], nested[0](t))), t)

    want, generator = outcome(plain, plain, x, order)
    for model, run in ((again, in_parts), (nested, one_in_another)):
        got, after = outcome(model, run, x, order)
        assert after == generator
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0 if order == 1 else 1e-9, atol=0 if order == 1 else 1e-9)


def test_several_arguments_and_tensors_from_elsewhere():
    p = Tensor([2.0, 3.0], requires_grad=True)
    made = p * 2  # a result that the function reads
    a, b = Tensor([1.0, 4.0], requires_grad=True), Tensor([5.0, 6.0])
    y = checkpoint(lambda a, b, c, flag: (a * b * c * made).sum() if flag else None, a, b, np.float32([1, 2]), True)
    y.backward()
    assert a.grad.numpy().tolist() == [20, 72]
    assert p.grad.numpy().tolist() == [10, 96]
    assert b.grad is None


def test_nothing_is_kept_where_nothing_is_differentiated():
    model, x = blocks(), RNG.normal(size=(5, 6)).astype(np.float32)
    with no_grad():
        assert checkpoint(model, Tensor(x)).is_leaf
    y = checkpoint(lambda t: t * 2, Tensor(x))
    assert y.is_leaf
    assert not y.requires_grad


def test_a_parameter_that_changed_is_an_error():
    model = blocks()
    y = checkpoint(model, Tensor(np.ones((3, 6), np.float32))).sum()
    model[0][0].weight.data = model[0][0].weight.numpy() * 2
    with pytest.raises(RuntimeError, match=r"checkpoint of Sequential.*was changed"):
        y.backward()
    with pytest.raises(TypeError, match=r"has to return one tensor; it returned .*tuple"):
        checkpoint(lambda t: (t, t), Tensor([1.0], requires_grad=True))


def test_less_memory():
    """Twenty blocks of eight elementwise ops: kept are the borders, and one block at a time."""

    def block(t):
        for _ in range(8):
            t = F.tanh(t)
        return t

    def peak(run) -> int:
        x = Tensor(np.ones(100_000, np.float32), requires_grad=True)
        tracemalloc.start()
        t = x
        for _ in range(20):
            t = run(t)
        t.sum().backward()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak(lambda t: checkpoint(block, t)) < 0.4 * peak(block)


def test_results_of_elsewhere_get_their_gradients():
    """Results that the function reads, and handles of the transformations, are no leaves."""
    w = Tensor(np.ones(3), requires_grad=True)
    made = w * 1.0
    assert grad(checkpoint(lambda z: (z * made).sum(), Tensor(np.ones(3))), made).numpy().tolist() == [1, 1, 1]
    cube = transforms.grad(lambda v: checkpoint(lambda z: (z * v * v * v).sum(), Tensor(np.ones(1))))
    assert transforms.grad(cube)(2.0).item() == 12
    model, x = blocks().astype(np.float64), RNG.normal(size=(5, 6))
    state = dict(model.named_parameters())
    slopes = []
    for run in (checkpoint, lambda f, x: f(x)):
        manual_seed(1)  # of dropout
        slopes.append(
            transforms.grad(lambda s, run=run: (run(lambda z: transforms.functional_call(model, s, z), x) ** 2).sum())(
                state
            )
        )
    for name in state:
        np.testing.assert_allclose(slopes[0][name].numpy(), slopes[1][name].numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "transform", [transforms.jacobian, lambda f: transforms.vmap(transforms.grad(lambda x: f(x).sum()))]
)
def test_under_transformations_of_many_gradients(transform):
    x = RNG.normal(size=(3, 4))
    f = lambda x: F.tanh(x) * x  # noqa: E731
    np.testing.assert_allclose(transform(lambda x: checkpoint(f, x))(x).numpy(), transform(f)(x).numpy())


def test_hooks_of_what_is_read_are_called_once():
    w, seen = Tensor([1.0, 2.0], requires_grad=True), []
    with w.register_hook(lambda g: seen.append(1) or g * 10):
        checkpoint(lambda z: z * w, Tensor([1.0, 2.0], requires_grad=True)).sum().backward()
    assert (w.grad.numpy().tolist(), seen) == ([10, 20], [1])


def test_another_result_of_the_second_run_is_an_error():
    norm, x = nn.BatchNorm1d(6), Tensor(RNG.normal(size=(5, 6)).astype(np.float32), requires_grad=True)
    y = checkpoint(norm, x).sum()
    norm.eval()
    with pytest.raises(RuntimeError, match=r"other values when it ran again: a mode"):
        y.backward()
    rng = np.random.default_rng(0)
    y = checkpoint(lambda x: x * rng.normal(), x).sum()
    with pytest.raises(RuntimeError, match="other values"):
        y.backward()
    y = checkpoint(lambda x: x * np.nan, x).sum()
    y.backward()
    assert np.isnan(x.grad.numpy()).all()


def test_a_step_with_checkpoints_is_not_captured():
    x = RNG.normal(size=(5, 6)).astype(np.float32)
    ends = []
    for captures in (False, True):
        model = blocks()
        optimizer = optim.Adam(model.parameters())

        def step(x, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (checkpoint(model, Tensor(x)) ** 2).mean()
            loss.backward()
            optimizer.step()
            return loss

        run = capture(step) if captures else step
        manual_seed(1)
        with pytest.warns(UserWarning, match="not captured") if captures else nullcontext():
            losses = [run(x).item() for _ in range(8)]
        ends.append((losses, {k: v.tobytes() for k, v in model.state_dict().items()}))
    assert ends[0] == ends[1]


def test_a_result_that_is_read_beside_what_it_was_computed_from():
    """Each path is counted once."""
    x, w = Tensor([3.0], requires_grad=True), Tensor([2.0], requires_grad=True)
    made = w * 5
    checkpoint(lambda x: (x * made * w).sum(), x).backward()
    assert (x.grad.item(), w.grad.item()) == (20, 60)
    x = Tensor([3.0], requires_grad=True)
    h = x * 2
    assert grad(checkpoint(lambda x: (x * (h + h * 2)).sum(), x), x).item() == 36
    assert grad(checkpoint(lambda x: h, x).sum(), x).item() == 2
    curvature = transforms.hessian(lambda w: checkpoint(lambda x: (x * (w * w) * w).sum(), Tensor([1.0])))
    assert curvature(np.array([2.0])).numpy().tolist() == [[12]]


def test_batched_tensors_that_a_function_reads():
    x = RNG.normal(size=(3, 4))
    f = transforms.vmap(transforms.grad(lambda x: checkpoint(lambda c: (x * x * c).sum(), Tensor(2.0))))
    np.testing.assert_allclose(f(x).numpy(), 4 * x)
