"""BatchNorm in 1d, 2d and 3d, float32 and float64, in every mode."""

import itertools

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tinygrad_bn import Tensor, functional, grad, nn, testing
from tinygrad_bn.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d

LAYERS = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
DTYPES = st.sampled_from([np.float32, np.float64])


@st.composite
def batches(draw, dtypes=DTYPES):
    """x of (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W), at any mean and deviation."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=5, min_side=1, max_side=4))
    assume(np.prod(shape) // shape[1] >= 2)
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    mean, deviation = draw(st.sampled_from([0, 1, -30, 1e4])), draw(st.sampled_from([1, 0.1, 20]))
    return (rng.normal(size=shape) * deviation + mean).astype(draw(dtypes))


def layer_for(x, weight=None, bias=None, **options):
    layer = LAYERS[x.ndim](x.shape[1], **options).astype(x.dtype)
    if weight is not None:
        layer.weight.data, layer.bias.data = weight, bias
    return layer


def axes(x):
    return (0, *range(2, x.ndim))


def reference(x, weight, bias, eps):
    """In float64, from the same input."""
    x = x.astype(np.float64)
    mu, var = x.mean(axes(x), keepdims=True), x.var(axes(x), keepdims=True)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return (x - mu) / np.sqrt(var + eps) * np.reshape(weight, shape) + np.reshape(bias, shape)


# ---- the output --------------------------------------------------------------------------------------------


@given(batches(), st.integers(0, 999), st.sampled_from([1e-5, 1e-3, 0.5]))
def test_mean_is_bias_and_variance_is_weight_squared_var_over_var_plus_eps(x, seed, eps):
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(size=(2, x.shape[1])).astype(x.dtype)
    y = layer_for(x, weight, bias, eps=eps)(x).numpy()
    assert y.dtype == x.dtype
    wide = x.astype(np.float64)  # the reference knows its own mean only to a rounding of its size
    condition = (np.abs(wide).max(axes(x)) / np.sqrt(wide.var(axes(x)) + eps)).max()
    tolerance = (2e-6 if x.dtype == np.float32 else 1e-12) + 1e-15 * condition
    np.testing.assert_allclose(y, reference(x, weight, bias, eps), atol=tolerance, rtol=tolerance)
    y, var = y.astype(np.float64), x.astype(np.float64).var(axes(x))
    np.testing.assert_allclose(y.mean(axes(x)), bias, atol=tolerance)
    np.testing.assert_allclose(y.var(axes(x)), weight**2 * (var / (var + eps)), atol=tolerance * 10, rtol=1e-5)


@given(batches(dtypes=st.just(np.float64)), st.sampled_from([-1e3, 0.5, 2e5]))
def test_a_shift_of_the_input_changes_nothing(x, shift):
    np.testing.assert_allclose(layer_for(x)(x + shift).numpy(), layer_for(x)(x).numpy(), atol=1e-8)


@given(
    hnp.array_shapes(min_dims=2, max_dims=5, min_side=2, max_side=4),
    st.sampled_from([0.0, 1e-30, 1.0, -1e7, 1e10, 3.3]),
    DTYPES,
)
def test_a_constant_channel_gives_exactly_bias_and_finite_gradients(shape, value, dtype):
    x = Tensor(np.full(shape, value, dtype), requires_grad=True)
    bias = np.linspace(-1, 1, shape[1]).astype(dtype)
    layer = layer_for(x, np.full(shape[1], 2.0), bias)
    y = layer(x)
    assert np.array_equal(np.moveaxis(y.numpy(), 1, -1), np.broadcast_to(bias, np.moveaxis(y.numpy(), 1, -1).shape))
    y.backward(np.random.default_rng(0).normal(size=shape))
    assert np.isfinite(x.grad.numpy()).all()


@pytest.mark.parametrize("count", [3, 10, 1000])
@pytest.mark.parametrize("value", [0.1, 1e10 + 0.1, 1e15 / 3, -1e-30])
def test_a_constant_channel_that_the_sum_cannot_hold(count, value):
    y = functional.batch_norm(np.full((count, 2), value), training=True)
    assert np.abs(y).max() == 0


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(256, 3), (8, 3, 7, 7)])
def test_float32_is_exact_at_any_mean(offset, shape):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) + offset).astype(np.float32)
    t = Tensor(x, requires_grad=True)
    y = functional.batch_norm(t, training=True)
    assert np.abs(y.numpy() - reference(x, np.ones(3), np.zeros(3), 1e-5)).max() < 1e-6
    g = rng.normal(size=x.shape)
    y.backward(g)
    wide = Tensor(x, requires_grad=True, dtype=np.float64)
    functional.batch_norm(wide, training=True).backward(g.astype(np.float32))
    assert np.abs(t.grad.numpy() - wide.grad.numpy()).max() < 1e-6 * np.abs(wide.grad.numpy()).max()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("shape", [(256, 3), (8, 3, 7, 7)])
def test_second_derivatives_of_float32_at_any_mean(offset, shape, relu):
    """The gradient of ⟨gradient, v⟩ by every operand, where x, g and v have means far from 0."""
    rng = np.random.default_rng(0)
    x, g, v = (rng.normal(size=(3, *shape)) + offset).astype(np.float32)
    affine = rng.normal(size=(2, 3)).astype(np.float32)
    dw, db = rng.normal(size=(2, 3)).astype(np.float32)
    normalise = functional.batch_norm_relu if relu else functional.batch_norm_training

    def second(dtype):
        operands = [Tensor(a, requires_grad=True, dtype=dtype) for a in (x, *affine, g)]
        y = normalise(*operands[:3], eps=1e-5)
        first = grad(y, operands[:3], operands[3], create_graph=True)
        along = sum((slope * Tensor(d, dtype=dtype)).sum() for slope, d in zip(first, (v, dw, db), strict=True))
        return grad(along, operands)

    for got, want in zip(second(np.float32), second(np.float64), strict=True):
        assert got.dtype == np.float32
        assert np.abs(got.numpy() - want.numpy()).max() <= 2e-5 * np.abs(want.numpy()).max()


def test_float16_is_normalised_in_float32():
    x = (np.random.default_rng(0).normal(size=(64, 2)) * 300 + 1000).astype(np.float16)  # a square would overflow
    layer = nn.BatchNorm1d(2)
    y = layer(x)
    assert y.dtype == np.float16
    assert layer.running_var.dtype == layer.weight.dtype == np.float32
    np.testing.assert_allclose(y.numpy(), reference(x, np.ones(2), np.zeros(2), 1e-5), atol=5e-3)
    np.testing.assert_allclose(layer.running_var.numpy(), 0.9 + 0.1 * x.astype(float).var(0, ddof=1), rtol=1e-5)
    layer.eval()
    assert layer(x).dtype == np.float16


# ---- gradients ---------------------------------------------------------------------------------------------


@given(batches(dtypes=st.sampled_from([np.float16, np.float32, np.float64])))
def test_a_layer_made_of_the_steps_keeps_the_dtype(x):
    t, weight = Tensor(x, requires_grad=True), Tensor(np.full(1, 2.0, x.dtype), requires_grad=True)
    steps = functional.batch_norm_steps(t)
    assert {step.dtype for step in steps[:-1]} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(steps.out.numpy(), steps.xhat.numpy().astype(x.dtype))  # rounded once
    y = steps.out * weight + steps.xmu.astype(x.dtype)
    assert y.dtype == x.dtype
    y.sum().backward()
    assert t.grad.dtype == weight.grad.dtype == x.dtype


@given(batches(dtypes=st.just(np.float64)), st.integers(0, 999))
def test_gradients_in_training_mode_and_their_sum(x, seed):
    rng = np.random.default_rng(seed)
    weight, bias, g = rng.normal(size=x.shape[1]), rng.normal(size=x.shape[1]), rng.normal(size=x.shape)
    t = Tensor(x, requires_grad=True)
    layer = layer_for(x, weight, bias)
    layer(t).backward(g)
    # the closed form (Ioffe & Szegedy 2015, section 3)
    steps = functional.batch_norm_steps(x, weight, bias, eps=layer.eps)
    dxhat = g * np.reshape(weight, (-1,) + (1,) * (x.ndim - 2))
    scale = np.abs(dxhat * steps.ivar).max()  # of the terms, which may nearly cancel
    np.testing.assert_allclose(t.grad.numpy().sum(axes(x)), 0, atol=1e-9 * scale * x.size)
    sums = dxhat.mean(axes(x), keepdims=True), (dxhat * steps.xhat).mean(axes(x), keepdims=True)
    np.testing.assert_allclose(
        t.grad.numpy(), steps.ivar * (dxhat - sums[0] - steps.xhat * sums[1]), atol=1e-9 * scale, rtol=1e-7
    )
    np.testing.assert_allclose(layer.weight.grad.numpy(), (g * steps.xhat).sum(axes(x)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(layer.bias.grad.numpy(), g.sum(axes(x)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("weight", [[0.0, 0.0], [1.5, -0.5]], ids=["weight 0", "weight not 0"])
@pytest.mark.parametrize("constant", [False, True], ids=["", "zero variance"])
def test_first_and_second_order(mean, weight, constant):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, 2)) + mean
    if constant:
        x[:, 0] = mean
    operands = (x, np.array(weight), np.array([0.3, -0.2]))

    def f(x, w, b):
        return functional.batch_norm(x, weight=w, bias=b, training=True, eps=0.1)

    testing.gradcheck(f, *operands, allow_zero=weight[0] == 0)
    testing.gradgradcheck(f, *operands, allow_zero=True)


def test_derivatives_up_to_order_4_equal_those_of_a_taylor_fit():
    """h(t) = Σ BN(x + t v) · w: repeated `grad` against a polynomial through h on Chebyshev points."""
    x, v, w = np.random.default_rng(3).normal(size=(3, 6, 3))
    t = Tensor(np.array(0.0), requires_grad=True)
    h = (functional.batch_norm(x + t * v, training=True, eps=0.25) * w).sum()
    found = [h.item()]
    for _ in range(4):
        h = grad(h, t, create_graph=True)
        found.append(h.item())

    def value(s):
        return (np.asarray(functional.batch_norm(x + s * v, training=True, eps=0.25)) * w).sum()

    points = np.polynomial.chebyshev.chebpts1(24) * 0.6
    fit = np.polynomial.Polynomial.fit(points, [value(s) for s in points], 23, domain=[-0.6, 0.6])
    np.testing.assert_allclose(found, [fit.deriv(k)(0.0) for k in range(5)], rtol=1e-5)


def test_an_all_ones_cotangent_shows_nothing_and_is_refused():
    x = np.random.default_rng(0).normal(size=(5, 2))
    with pytest.raises(testing.VacuousCheckError, match="random cotangent"):
        testing.gradcheck(lambda x: functional.batch_norm(x, training=True), x, g=np.ones((5, 2)))
    testing.gradcheck(lambda x: functional.batch_norm(x, training=True), x)


# ---- running statistics ------------------------------------------------------------------------------------


@given(st.lists(batches(dtypes=st.just(np.float64)), min_size=1, max_size=4), st.sampled_from([0.1, 0.3, 1.0, None]))
def test_updates_equal_the_closed_form(xs, momentum):
    x0 = xs[0]
    xs = [x0, *(x0 * (k + 2) + k for k in range(len(xs) - 1))]
    layer = layer_for(x0, momentum=momentum)
    mean, var = np.zeros(x0.shape[1]), np.ones(x0.shape[1])
    for k, x in enumerate(xs, start=1):
        layer(x)
        m = 1 / k if momentum is None else momentum
        mean = (1 - m) * mean + m * x.mean(axes(x))
        var = (1 - m) * var + m * x.var(axes(x), ddof=1)
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-9)
    np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-9)
    assert layer.num_batches_tracked.item() == len(xs)


@given(batches())
def test_evaluation_is_affine_changes_nothing_and_has_a_backward(x):
    layer = layer_for(x)
    layer(x)
    layer.eval()
    before = layer.state_dict()
    t = Tensor(x, requires_grad=True)
    y = layer(t)
    y.backward(np.ones(x.shape))
    slope = 1 / np.sqrt(before["running_var"] + layer.eps)
    shape = (-1,) + (1,) * (x.ndim - 2)
    want = (x - before["running_mean"].reshape(shape)) * slope.reshape(shape)
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(t.grad.numpy(), np.broadcast_to(slope.reshape(shape), x.shape), rtol=1e-5)
    for key, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


MODES = list(itertools.product([True, False], [True, False], [True, False]))


@pytest.mark.parametrize(("training", "tracked", "frozen"), MODES)
def test_which_statistics_normalise(training, tracked, frozen):
    layer = nn.BatchNorm1d(2, track_running_stats=tracked)
    if frozen and not tracked:
        with pytest.raises(ValueError, match="no running statistics"):
            layer.freeze()
        return
    if frozen:
        layer.freeze()
    x = np.random.default_rng(0).normal(5, 2, (8, 2)).astype(np.float32)
    y = layer.train(training)(x).numpy()
    by_batch = (training and not frozen) or not tracked
    want = reference(x, np.ones(2), np.zeros(2), 1e-5) if by_batch else x / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(y, want, atol=1e-5)
    if tracked:
        assert layer.num_batches_tracked.item() == (training and not frozen)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_batch_that_is_not_finite_does_not_poison_and_is_counted(bad):
    layer = nn.BatchNorm1d(2)
    x = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    layer(x)
    before = layer.state_dict()
    x[3, 1] = bad
    with pytest.warns(RuntimeWarning, match="not finite"), np.errstate(all="ignore"):
        layer(x)
    with np.errstate(all="ignore"):
        layer(x)  # warns once, counts on
    assert layer.num_batches_skipped == 2
    assert "2 batches skipped" in repr(layer)
    for key, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


def test_an_update_in_training_does_not_disturb_a_pending_backward_of_evaluation():
    layer = nn.BatchNorm1d(2)
    x = Tensor(np.random.default_rng(0).normal(size=(8, 2)), requires_grad=True)
    y = layer.eval()(x)
    layer.train()(x)
    y.backward(np.ones((8, 2)))
    np.testing.assert_allclose(x.grad.numpy(), 1 / np.sqrt(1 + 1e-5), rtol=1e-6)


# ---- ghost batches -----------------------------------------------------------------------------------------


@given(st.integers(2, 20), st.integers(2, 6), st.sampled_from([(3,), (3, 2), (2, 2, 3)]), st.integers(0, 999))
def test_ghost_batches_are_batches_of_their_own(n, virtual, shape, seed):
    """Outputs, gradients and running statistics equal those of a plain layer given the parts in turn."""
    rng = np.random.default_rng(seed)
    x, g = rng.normal(3, 2, (2, n, *shape))
    weight, bias = rng.normal(size=(2, x.shape[1]))
    parts = max(1, n // virtual)
    ghost, plain = (layer_for(x, weight, bias, virtual_batch_size=v) for v in (virtual, None))
    t, twin = Tensor(x, requires_grad=True), Tensor(x, requires_grad=True)
    y = ghost(t)
    y.backward(g)
    cuts = [i * len(x) // parts for i in range(parts + 1)]
    assert min(np.diff(cuts)) >= min(virtual, len(x))
    for i, j in itertools.pairwise(cuts):
        part = plain(twin[i:j])
        np.testing.assert_array_equal(y.numpy()[i:j], part.numpy())
        part.backward(g[i:j])
    np.testing.assert_array_equal(t.grad.numpy(), twin.grad.numpy())
    for a, b in zip(ghost.parameters(), plain.parameters(), strict=True):
        np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-9, atol=1e-9)
    for key, value in ghost.state_dict().items():
        np.testing.assert_array_equal(value, plain.state_dict()[key])
    assert ghost.num_batches_tracked.item() == parts


def test_a_ghost_batch_of_one_image_is_instance_normalisation():
    x = np.random.default_rng(0).normal(3, 2, (4, 3, 5, 5)).astype(np.float32)
    y = nn.BatchNorm2d(3, virtual_batch_size=1)(x).numpy()
    np.testing.assert_allclose(y, nn.InstanceNorm2d(3)(x).numpy(), atol=1e-6)


def test_ghost_batches_are_for_training_only():
    x = np.random.default_rng(0).normal(3, 2, (16, 3)).astype(np.float32)
    ghost, plain = nn.BatchNorm1d(3, virtual_batch_size=4), nn.BatchNorm1d(3)
    ghost(x)
    plain.load_state_dict(ghost.state_dict())
    assert not np.allclose(ghost(x).numpy(), plain(x).numpy(), atol=0.1)
    plain.load_state_dict(ghost.state_dict())
    for a, b in ((ghost.eval(), plain.eval()), (ghost.train().freeze(), plain.train().freeze())):
        np.testing.assert_array_equal(a(x).numpy(), b(x).numpy())
    untracked = (nn.BatchNorm1d(3, track_running_stats=False, virtual_batch_size=v).eval() for v in (4, None))
    np.testing.assert_array_equal(*(layer(x).numpy() for layer in untracked))
    relu = nn.Sequential(nn.BatchNorm1d(3, virtual_batch_size=4), nn.ReLU())
    np.testing.assert_array_equal(relu(x).numpy(), np.maximum(relu[0](x).numpy(), 0))
    assert "virtual_batch_size=4" in repr(ghost)


# ---- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "old", "eps"), [("keras", 0.99, 1e-3), ("onnx", 0.9, 1e-5)])
def test_presets(preset, old, eps):
    layer = getattr(nn.BatchNorm2d, preset)(3)
    x = np.random.default_rng(0).normal(2, 3, (4, 3, 2, 2)).astype(np.float32)
    y = layer(x).numpy()
    np.testing.assert_allclose(y, reference(x, np.ones(3), np.zeros(3), eps), atol=1e-5)
    np.testing.assert_allclose(layer.running_mean.numpy(), (1 - old) * x.mean(axes(x)), rtol=1e-4)
    np.testing.assert_allclose(layer.running_var.numpy(), old + (1 - old) * x.var(axes(x)), rtol=1e-4)


def test_freezing_one_thing_leaves_the_other_and_float16_is_too_narrow_for_statistics():
    layer = nn.BatchNorm1d(2).requires_grad_(False).freeze(affine=False)
    assert not layer.weight.requires_grad
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).astype(np.float16)
    assert model[0].weight.dtype == np.float16
    assert {t.dtype for _, t in model[1].named_tensors() if t.ndim} == {np.dtype(np.float32)}
    assert nn.BatchNorm1d.keras(2, momentum=0.01).momentum == 0.99  # and no warning


def test_affine_false_and_freezing():
    layer = nn.BatchNorm1d(2, affine=False)
    assert list(layer.parameters()) == []
    assert set(layer.state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}
    layer = nn.BatchNorm1d(2)
    layer.freeze(stats=False)
    assert not layer.weight.requires_grad
    layer(np.eye(2, dtype=np.float32))
    assert layer.num_batches_tracked.item() == 1
    layer.unfreeze().freeze(affine=False)
    assert layer.weight.requires_grad
    assert "stats frozen" in repr(layer)
    assert "affine frozen" not in repr(layer)
    assert "frozen" not in repr(layer.unfreeze())


def test_repr_states_the_convention():
    assert "running = 0.9 * running + 0.1 * batch" in repr(nn.BatchNorm1d(2))
    assert "running = 0.99 * running + 0.01 * batch" in repr(nn.BatchNorm1d.keras(2))
    assert "mean of all batches" in repr(nn.BatchNorm1d(2, momentum=None))


def test_a_momentum_in_the_other_convention_warns():
    with pytest.warns(UserWarning, match=r"NEW batch.*did you mean 0\.01"):
        nn.BatchNorm1d(2, momentum=0.99)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "num_features"),
        ({"eps": 0.0}, "eps"),
        ({"eps": -1.0}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"momentum": 7.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"virtual_batch_size": 0}, "virtual_batch_size"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        nn.BatchNorm1d(**{"num_features": 2, **options})


@pytest.mark.parametrize(("layer", "shape"), [(nn.BatchNorm1d, (1, 3)), (nn.BatchNorm2d, (1, 3, 1, 1))])
def test_one_value_per_channel(layer, shape):
    bn, x = layer(3), np.ones(shape, np.float32)
    with pytest.raises(ValueError, match=r"BatchNorm.*more than one value per channel.*drop_last.*eval\(\).*freeze"):
        bn(x)
    assert bn.num_batches_tracked.item() == 0
    bn.eval()(x)
    bn.train().freeze()(x)
    untracked = layer(3, track_running_stats=False).eval()  # so the batch normalises itself, as in PyTorch
    with pytest.raises(ValueError, match="more than one value per channel"):
        untracked(x)


def test_an_empty_batch_passes_through():
    for layer in (nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)):
        x = Tensor(np.zeros((0, 3), np.float32), requires_grad=True)
        y = layer(x)
        y.backward(np.zeros((0, 3)))
        assert y.shape == x.grad.shape == (0, 3)
        assert layer.weight.grad.numpy().tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.BatchNorm1d, (2, 4), r"\(N, 3\) or \(N, 3, L\); got shape \(2, 4\)"),
        (nn.BatchNorm1d, (2, 3, 4, 4), r"got shape \(2, 3, 4, 4\)"),
        (nn.BatchNorm2d, (2, 3), r"\(N, 3, H, W\)"),
        (nn.BatchNorm3d, (2, 3, 4, 4), r"\(N, 3, D, H, W\)"),
        (nn.BatchNorm1d, (3,), "got shape"),
    ],
)
def test_wrong_shapes(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(3)(np.ones(shape, np.float32))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating-point input; got int64"):
        nn.BatchNorm1d(3)(np.ones((2, 3), np.int64))
