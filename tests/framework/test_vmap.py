"""vmap gives what a loop over the samples gives: values and derivatives, of every op, in both orders of composition."""

import threading
from collections import namedtuple
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.framework.test_ops import BUILT_IN, HypothesisDraw
from tinygrad_bn import Tensor, composed, extend, manual_seed, nn, no_grad, tensor, train
from tinygrad_bn import functional as F
from tinygrad_bn.batching_rules import RULES, rule_of
from tinygrad_bn.captured import capture
from tinygrad_bn.diagnose import detect_anomaly
from tinygrad_bn.explain import explain
from tinygrad_bn.sample import RandomDraw
from tinygrad_bn.tensor import OPS
from tinygrad_bn.testing.calls import cast_real, positions
from tinygrad_bn.transforms import functional_call, grad, hessian, hvp, jacobian, jvp, vjp, vmap

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 3))
W = RNG.normal(size=(3, 2))
UNSUPPORTED = {"dropout_by_key", "running_statistics", "squared_norm", "sgd", "adam", "rmsprop", "adagrad"}
SUPPORTED = [name for name in BUILT_IN if name not in UNSUPPORTED]


def samples_of(x, size):
    """So many arrays like x, each different."""
    turned = (np.roll(x.reshape(-1), i).reshape(x.shape) for i in range(size))
    return np.stack([t * (1 - 0.1 * i) if t.dtype.kind == "f" else t for i, t in enumerate(turned)])


def expect_same(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def looped(function, batched, args):
    """The results of each sample, one after the other."""
    results = [function(*(a[i] if b else a for a, b in zip(args, batched, strict=True))) for i in range(2)]
    many = isinstance(results[0], tuple)
    return [np.stack(part) for part in (zip(*results, strict=True) if many else [results])]


class Case:
    """An op as a function of those operands that are there; some are the same for both samples."""

    def __init__(self, name, data):
        self.op = OPS[name]
        xs, self.params = self.op.sample(HypothesisDraw(data))
        self.xs = cast_real(xs, np.float64)
        self.there = [i for i, x in enumerate(xs) if x is not None]
        constant = {2} if name == "softmax_cross_entropy" else set()  # the weights of the classes
        self.batched = [data.draw(st.booleans()) and i not in constant for i in self.there]
        self.batched[0] |= not any(self.batched)
        pairs = zip(self.there, self.batched, strict=True)
        self.args = [samples_of(self.xs[i], 2) if b else self.xs[i] for i, b in pairs]
        self.axes = tuple(0 if b else None for b in self.batched)
        real = positions(self.op, xs) if self.op.differentiable else []
        self.real = [self.there.index(i) for i in real if i not in constant]  # to differentiate by

    def value(self, *some):
        full = list(self.xs)
        for i, x in zip(self.there, some, strict=True):
            full[i] = x if isinstance(x, Tensor) else Tensor(x)
        return tensor.apply(self.op, full, self.params)[0]

    def replaced(self, some, ts):
        full = list(some)
        for i, t in zip(self.real, ts, strict=True):
            full[i] = t
        return full

    def pulled(self, g, *some):
        """The vjp by the real operands."""
        return vjp(lambda *ts: self.value(*self.replaced(some, ts)), *(some[i] for i in self.real))[1](g)

    def pulled_twice(self, g, *some):
        vs, some = some[: len(self.real)], some[len(self.real) :]
        first = lambda g, *ts: self.pulled(g, *self.replaced(some, ts))  # noqa: E731
        return vjp(first, g, *(some[i] for i in self.real))[1](vs)

    def whole(self, *ts):
        return vmap(self.value, self.axes)(*self.replaced(self.args, ts))


@pytest.mark.parametrize("name", SUPPORTED)
@given(data=st.data(), seed=st.integers(0, 99))
def test_an_op_under_vmap_is_the_loop_over_samples(name, data, seed):
    """Its value, its vjp, the vjp of that, and the vjp around it."""
    case = Case(name, data)
    args, axes, batched, real = case.args, case.axes, case.batched, case.real
    got = vmap(case.value, axes)(*args)
    expect_same(got, looped(case.value, batched, args)[0])
    if not real or got.dtype.kind != "f":
        return
    rng = np.random.default_rng(seed)
    g, vs = rng.normal(size=got.shape), [rng.normal(size=args[i].shape) for i in real]

    wants = looped(case.pulled, [True, *batched], [g, *args])
    for part, want in zip(vmap(case.pulled, (0, *axes))(g, *args), wants, strict=True):
        expect_same(part, want)

    given_all, of_real = [g, *vs, *args], [batched[i] for i in real]
    twice = vmap(case.pulled_twice, (0, *(axes[i] for i in real), *axes))(*given_all)
    for part, want in zip(twice, looped(case.pulled_twice, [True, *of_real, *batched], given_all), strict=True):
        expect_same(part, want)

    around = vjp(case.whole, *(args[i] for i in real))[1](g)
    for b, part, want in zip(of_real, around, wants, strict=True):  # samples of an operand that is the same add up
        expect_same(part, want if b else want.sum(axis=0))


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_an_op_without_a_rule_is_named(name):
    xs, params = OPS[name].sample(RandomDraw(0))
    with pytest.raises(NotImplementedError, match=f"vmap has no rule for the op '{name}'"):
        vmap(lambda x: tensor.apply(OPS[name], [x, *xs[1:]], params)[0])(np.stack([xs[0], xs[0]]))


def test_every_op_is_supported_or_named_here():
    """A fused op runs by its rule or as its composition; one of a user, once for each sample."""
    assert {name for name in BUILT_IN if name not in RULES and not OPS[name].fused} == UNSUPPORTED
    assert {name for name in BUILT_IN if not OPS[name].fused and rule_of(OPS[name]) is None} == UNSUPPORTED
    assert set(RULES) <= set(BUILT_IN)


def curve(x):
    return (F.tanh(x @ W) ** 2).sum()


def both(a, b):
    return F.tanh(a * b).sum() + (a[0] * b[1])


@pytest.mark.parametrize("transform", [grad, hessian, jacobian, lambda f: lambda x: hvp(f, x, x)])
def test_derivatives_of_each_sample(transform):
    expect_same(vmap(transform(curve))(X), np.stack([transform(curve)(x) for x in X]))


def test_compositions_in_both_orders():
    by_weight = lambda w, x: (F.tanh(x @ w) ** 2).sum()  # noqa: E731
    each = vmap(grad(by_weight), (None, 0))(W, X)
    expect_same(each, np.stack([grad(by_weight)(W, Tensor(x)) for x in X]))
    whole = grad(lambda w: vmap(lambda x: by_weight(w, x))(X).sum())(W)
    np.testing.assert_allclose(whole, each.numpy().sum(axis=0), rtol=1e-12)
    y, moved = vmap(lambda x, v: jvp(curve, (x,), (v,)))(X, X)
    expect_same(moved, np.stack([jvp(curve, (x,), (x,))[1] for x in X]))
    expect_same(y, np.stack([curve(Tensor(x)) for x in X]))
    around = jvp(vmap(curve), (X,), (X,))[1]
    expect_same(around, moved)
    third = grad(lambda x: grad(lambda x: grad(curve)(x).sum())(x).sum())
    expect_same(vmap(third)(X), np.stack([third(x) for x in X]))
    outside = grad(lambda x: vmap(lambda x: grad(lambda x: grad(curve)(x).sum())(x).sum())(x).sum())
    expect_same(outside(X), vmap(third)(X))


def test_nested_calls():
    want = np.stack([[grad(both)(a, b) for b in X] for a in X])
    expect_same(vmap(lambda a: vmap(lambda b: grad(both)(a, b))(X))(X), want)
    expect_same(vmap(vmap(grad(both), (None, 0)), (0, None))(X, X), want)
    expect_same(vmap(lambda a: grad(lambda a: vmap(lambda b: both(a, b))(X).sum())(a))(X), want.sum(axis=1))
    expect_same(vmap(lambda a: vmap(lambda b: a * 1)(X))(X), np.repeat(X[:, None], 5, axis=1))


def test_a_pull_on_many_cotangents_is_a_jacobian():
    f = lambda x: F.tanh(x @ W)  # noqa: E731
    _, pull = vjp(f, X[0])
    expect_same(vmap(pull)(np.eye(2))[0], jacobian(f)(X[0]))
    each = vmap(lambda x: vmap(vjp(f, x)[1])(np.eye(2))[0])(X)
    expect_same(each, np.stack([jacobian(f)(x) for x in X]))
    p = Tensor(W, requires_grad=True)
    _, pull = vjp(lambda x: F.tanh(x @ p), X[0])
    vmap(pull)(np.eye(2))[0].sum().backward()
    want = grad(lambda w: jacobian(lambda x: F.tanh(x @ w))(X[0]).sum())(W)
    np.testing.assert_allclose(p.grad, want, rtol=1e-12)


def test_axes_and_nests():
    a, b = RNG.normal(size=(3, 5)), RNG.normal(size=(2, 5, 4))
    got = vmap(lambda a, b: {"sum": a.sum() + b, "b": (b, a)}, (1, -2), {"sum": 2, "b": (0, 1)})(a, b)
    expect_same(got["sum"], a.sum(axis=0)[None, None] + b.transpose(0, 2, 1))
    expect_same(got["b"][0], b.transpose(1, 0, 2))
    expect_same(got["b"][1], a)
    got = vmap(lambda n, k: n["w"] * n["x"][0] * k, ({"w": None, "x": [0]}, None))({"w": X[0], "x": [X]}, 2.0)
    expect_same(got, X[0] * X * 2)
    expect_same(vmap(lambda x: Tensor(X[0]))(X), np.repeat(X[:1], 5, axis=0))
    assert vmap(lambda x: Tensor(2.0), out_axes=None)(X).shape == ()
    assert vmap(lambda x: x.sum())(np.zeros((0, 3))).shape == (0,)


@pytest.mark.parametrize("index", [
    ([0, 1], slice(None), [1, 0]), ([0, 1], None, 1), (0, slice(None), np.array([[0, 1], [1, 1]])),
    (slice(None), [1, 0], [0, 1]), (Ellipsis, [1, 1]), (np.array([True, False]), slice(None), [1]),
])  # fmt: skip
def test_arrays_in_an_index_with_something_between_them(index):
    """NumPy puts their axes first. The gradient goes the way back."""
    x = RNG.normal(size=(4, 2, 3, 2))
    want = np.stack([part[index] for part in x])
    expect_same(vmap(lambda x: x[index])(x), want)
    g = RNG.normal(size=want.shape)
    got = vmap(lambda x, g: vjp(lambda x: x[index], x)[1](g)[0])(x, g)
    expect_same(got, np.stack([vjp(lambda x: x[index], a)[1](b)[0] for a, b in zip(x, g, strict=True)]))


def test_an_index_of_each_sample():
    at = np.array([2, 0, 1, 1, 0])
    expect_same(vmap(lambda x, i: x[i])(X, at), X[np.arange(5), at])
    expect_same(vmap(lambda i: Tensor(X)[i, [0, 1]])(at), X[at[:, None], [0, 1]])
    slope = vmap(grad(lambda x, i: (x[i] ** 2).sum()))(X, at)
    want = np.zeros_like(X)
    want[np.arange(5), at] = 2 * X[np.arange(5), at]
    expect_same(slope, want)
    with pytest.raises(NotImplementedError, match="integers and arrays only"):
        vmap(lambda x, i: x[:, i])(np.zeros((5, 2, 3)), at)
    with pytest.raises(NotImplementedError, match="a mask would give each sample a shape of its own"):
        vmap(lambda x: x[x > 0])(X)


def cnn():
    manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    ).astype(np.float64)  # fmt: skip


def test_gradients_of_each_sample_of_a_convolutional_network():
    model, x, y = cnn().eval(), RNG.normal(size=(5, 1, 6, 6)), RNG.integers(0, 4, 5)
    state = dict(model.named_parameters())
    loss = lambda p, x, y: F.cross_entropy(functional_call(model, p, x[None]), y[None])  # noqa: E731
    each = vmap(grad(loss), (None, 0, 0))(state, x, y)
    total = grad(lambda p: F.cross_entropy(functional_call(model, p, x), y, reduction="sum"))(state)
    for name, slopes in each.items():
        np.testing.assert_allclose(slopes.numpy().sum(axis=0), total[name], rtol=1e-9, atol=1e-12, err_msg=name)
        expect_same(slopes.numpy()[1], grad(loss)(state, Tensor(x[1]), Tensor(y[1]))[name])


@contextmanager
def no_op(name):
    """In this block the engine does not run this op."""
    real = tensor.backend.forward

    def forward(op, *others):
        assert op.name != name
        return real(op, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor.backend, "forward", forward)
        yield


def test_by_products_of_each_sample():
    x = RNG.normal(size=(4, 6, 3))
    mean, var = vmap(lambda x: tuple(F.batch_norm_training.run(x, None, None, eps=0.1)[1]))(x)
    expect_same(mean, x.mean(1))
    expect_same(var, x.var(1))
    target = RNG.integers(0, 3, (4, 6))

    def loss(x, target):
        y, saved = F.softmax_cross_entropy.run(x, target, None, ignore_index=2)
        return y, *saved

    found = vmap(loss)(x, target)
    for i in range(4):
        for part, want in zip(found, loss(Tensor(x[i]), target[i]), strict=True):
            expect_same(part.numpy()[i], np.asarray(want))


def test_one_tensor_for_two_arguments():
    x = Tensor(X)
    expect_same(vmap(lambda a, b: a * b.sum(), (0, None))(x, x), X * X.sum())


@pytest.mark.parametrize("transform", [lambda f: f, grad, hessian, lambda f: lambda x: hvp(f, x, x)])
@pytest.mark.parametrize("loss", ["batch norm", "cross-entropy"])
def test_a_batch_of_batches_of_batches(loss, transform):
    x, target = RNG.normal(size=(2, 3, 4, 2)), np.array([0, 1, 1, 0])
    if loss == "batch norm":
        f = transform(lambda x: (F.batch_norm(x, training=True, eps=0.1) ** 3).sum())
    else:
        f = transform(lambda x: F.cross_entropy(x, target))
    expect_same(vmap(vmap(f))(x), np.stack([[f(Tensor(part)).numpy() for part in row] for row in x]))


def test_a_primitive_of_a_user_runs_for_each_sample():
    """Its derivatives too."""
    before = set(OPS)

    @extend.primitive(lambda g, y, x: g * cosine(x), formula="y = sin x", sample=extend.elementwise(extend.REAL))
    def sine(x):
        return np.sin(x)

    @extend.primitive(lambda g, y, x: -g * sine(x), formula="y = cos x", sample=extend.elementwise(extend.REAL))
    def cosine(x):
        return np.cos(x)

    try:
        expect_same(vmap(grad(lambda x: sine(x).sum()))(X), np.cos(X))
        expect_same(vmap(vmap(grad(grad(sine))))(X), -np.sin(X))
    finally:
        for name in OPS.keys() - before:
            del OPS[name]


def test_an_ensemble_trained_in_functional_style():
    """Parameters for each member, and what is no array of samples stays as it is."""
    layer, x = nn.Linear(3, 2).astype(np.float64), X
    weights = RNG.normal(size=(4, 2, 3))
    call = vmap(lambda w, x: (functional_call(layer, {"weight": w}, x), x), in_axes=(0, None), out_axes=(0, None))
    y, same = call(weights, x)
    expect_same(y, np.stack([x @ w.T + layer.bias.numpy() for w in weights]))
    expect_same(same, x)


def test_updates_and_leaves_inside():
    def f(x):
        y = x * 2
        y += 1
        assert not y.is_leaf
        return (y * y).sum()

    expect_same(vmap(grad(f))(X), 4 * (2 * X + 1))


def test_vmap_in_a_step_is_not_captured():
    step = capture(vmap(grad(curve)))
    with pytest.warns(UserWarning, match="vmap inside of a step is not captured"):
        first = step(X)
    expect_same(step(X), first)
    expect_same(first, np.stack([grad(curve)(x) for x in X]))
    data = (X.astype(np.float32), np.array([0, 1, 0, 1, 1]))
    history = train.fit(
        nn.Linear(3, 2), data, epochs=3, batch_size=5, progress=False,
        loss=lambda out, y: F.cross_entropy(out, y) + 0 * vmap(grad(lambda o: (o**2).sum()))(out).sum(),
    )  # fmt: skip
    assert len(history) == 3


@pytest.mark.parametrize("look", [explain, detect_anomaly])
def test_a_jacobian_is_the_same_when_something_looks_on(look):
    f = jacobian(lambda x: F.batch_norm(x, training=True, eps=0.1))
    want = f(X)
    with look():
        expect_same(f(X), want)


def test_models_in_parallel():
    """Batches of their own through BatchNorm in training: its statistics are those of each batch."""
    layer, x = nn.BatchNorm2d(3, track_running_stats=False).astype(np.float64), RNG.normal(size=(4, 6, 3, 2, 2))
    fused = vmap(layer)(x)
    expect_same(fused, np.stack([layer(Tensor(part)) for part in x]))
    with composed(), no_op("batch_norm_training"):
        np.testing.assert_allclose(vmap(layer)(x), fused, rtol=1e-12)
    tracking = nn.BatchNorm2d(3)
    before = tracking.running_mean.numpy().tobytes()
    with pytest.raises(NotImplementedError, match=r"'running_statistics': .*track_running_stats=False"):
        vmap(tracking)(x)
    assert tracking.running_mean.numpy().tobytes() == before


def test_each_op_runs_once():
    called = []
    real = tensor.backend.forward

    def counting(op, arrays, params, again=False):
        called.append(op.name)
        return real(op, arrays, params, again)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor.backend, "forward", counting)
        vmap(curve)(X)
    assert called.count("tanh") == called.count("matmul") == 1


def test_without_a_graph_and_in_threads():
    with no_grad():
        assert not vmap(curve)(Tensor(X, requires_grad=True)).requires_grad
        expect_same(vmap(grad(curve))(X), np.stack([grad(curve)(x) for x in X]))
    results = [None] * 4

    def work(i):
        results[i] = vmap(grad(curve))(X * (i + 1)).numpy()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in enumerate(results):
        expect_same(result, vmap(grad(curve))(X * (i + 1)))


def hooked(x):
    y = x * x
    y.register_hook(lambda g: g * 10)
    return y.sum()


def leaked():
    kept = []
    vmap(lambda x: kept.append(x) or x)(X)
    return kept[0] * 2


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: vmap(curve, None)(X), ValueError, "None for all"),
        (lambda: vmap(both)(X, X[:2]), ValueError, "argument 0 has 5, argument 1 has 2"),
        (lambda: vmap(both, (0,))(X, X), ValueError, "1 axes for 2 arguments"),
        (lambda: vmap(curve, 2)(X), ValueError, r"argument 0 of shape \(5, 3\) has no axis 2"),
        (lambda: vmap(curve)(1.0), ValueError, "has no axis of samples"),
        (lambda: vmap(curve, "0")(X), TypeError, "an axis of samples has to be an integer"),
        (lambda: vmap(curve, ([0, 1],))(X), ValueError, "do not have the form of argument 0"),
        (lambda: vmap(lambda x: x, out_axes=3)(X), ValueError, "has no axis 3"),
        (lambda: vmap(lambda x: x, out_axes=None)(X), ValueError, "differs from sample to sample"),
        (lambda: vmap(lambda x: 3)(X), TypeError, "has to return tensors; it returned an int"),
        (lambda: vmap(lambda x: x if x.sum() > 0 else -x)(X), TypeError, "cannot read it or branch on it"),
        (lambda: vmap(lambda x: x.numpy())(X), TypeError, "cannot read it"),
        (lambda: vmap(lambda x: np.asarray(x))(X), TypeError, "cannot read it"),
        (lambda: vmap(lambda x: x * x.item())(X), TypeError, "cannot read it"),
        (lambda: vmap(lambda x: x.sum().backward())(Tensor(X, requires_grad=True)), RuntimeError, "transforms: grad"),
        (lambda: vmap(lambda x: F.cross_entropy(x[None], np.array([0]), x))(X), NotImplementedError, "class weights"),
        (leaked, RuntimeError, "after the call; return it"),
        (lambda: vmap(grad(hooked))(X), NotImplementedError, "has no hooks"),
        (lambda: vmap(lambda x: x.sum(axis=1))(X), IndexError, "axis 1 is out of bounds for a sample of 1 axes"),
        (lambda: vmap(lambda x: x.max(axis=-2))(X), IndexError, "axis -2 is out of bounds"),
        (lambda: vmap(lambda x: F.stack([x, x], axis=3))(X), IndexError, "axis 3 is out of bounds"),
        (lambda: vmap(lambda x: x.transpose(1))(X), IndexError, "axis 1 is out of bounds"),
        (lambda: vmap(lambda x: (x * 2).retain_grad())(X), NotImplementedError, "keeps no gradient"),
        (lambda: vmap(both, [0, None])(X, X), TypeError, r"is a tuple; got the list \[0, None\]"),
        (lambda: vmap(lambda x: F.dropout(x))(X), NotImplementedError, "'dropout_by_key'"),
        (lambda: vmap(lambda x: x @ Tensor(X))(X), ValueError, "matmul"),
    ],
)  # fmt: skip
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_axes_in_named_tuples():
    Pair = namedtuple("Pair", "a b")
    y = vmap(lambda p: Pair(p.b, p.a), in_axes=(Pair(0, 1),), out_axes=Pair(1, 0))(Pair(X, X.T))
    expect_same(y.a, X.T)
    expect_same(y.b, X)


def test_a_hook_that_reads_its_gradient_in_a_jacobian():
    seen = []

    def f(x):
        y = x * x
        y.register_hook(lambda g: seen.append(g.numpy()))
        return y * 2

    expect_same(jacobian(f)(X[0]), np.diag(4 * X[0]))
    assert len(seen) == 3
