"""The CPU kernels: exact at any mean, and complete.

That each equals its op's reference and its composition's gradient is tested for every op in test_ops.py.
"""

import sys
from collections import Counter
from functools import partial

import numpy as np
import pytest
import tinygrad_bn_kernels as kernels_module
from hypothesis import given
from hypothesis import strategies as st
from tinygrad_bn_kernels import MODULES, kernel, names
from tinygrad_bn_kernels.cpu.norm_terms import PROBES

from tests.tools.processes import output, python
from tests.tools.thresholds import thresholds
from tests.tools.work import batch_norm_operands, batch_norm_step
from tinygrad_bn import Tensor, functional, more_ops, nn, ops, optim, sample
from tinygrad_bn.backend import find_kernel, kernels_disabled
from tinygrad_bn.functional.normalization import block_norm
from tinygrad_bn.kernels import kernel_errors
from tinygrad_bn.tensor import OPS
from tinygrad_bn.testing import properties

SHAPES = [(37, 5), (130, 70), (6, 5, 4), (8, 3, 5, 5)]


def exact_step(*arrays, relu=False):
    """`batch_norm_step` in float64, without kernels."""
    with kernels_disabled():
        return batch_norm_step(*(a.astype(np.float64) for a in arrays), relu)


@pytest.mark.parametrize("offset", [0, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_is_exact_at_any_mean(shape, offset, driver):
    x, g, weight, bias = batch_norm_operands(shape, offset=offset)
    got = batch_norm_step(x, g, weight, bias)
    want = exact_step(x, g, weight, bias)
    scale = np.abs(weight).max() + np.abs(bias).max()
    assert np.abs(got[0] - want[0]).max() <= 1e-6 * scale
    assert np.abs(got[3] - want[3]).max() <= 1e-6 * np.abs(want[3]).max()
    for a, b in zip(got[1:3], want[1:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [3, 1e2, 1e4, 1e6, -1e6])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_batch_norm_are_exact_at_any_mean_of_the_cotangent(shape, relu, offset, driver):
    x, g, weight, bias = batch_norm_operands(shape)
    g, bias = (g + offset).astype(np.float32), bias + np.float32(3 if relu else 0)  # most pass the ReLU
    got = batch_norm_step(x, g, weight, bias, relu)
    want = exact_step(x, g, weight, bias, relu=relu)
    for a, b in zip(got[3:], want[3:], strict=True):
        assert np.abs(a - b).max() <= 1.5e-6 * np.abs(b).max()
    assert np.abs(got[3] - want[3]).max() <= 4e-7 * np.abs(want[3]).max()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_constant_cotangent_reaches_the_bias_alone(shape):
    x, g, weight, bias = batch_norm_operands(shape)
    *_, gx, gweight, gbias = batch_norm_step(x, np.full_like(g, 1e5), weight, bias)
    assert not gx.any()
    assert not gweight.any()
    np.testing.assert_array_equal(gbias, 1e5 * (x.size // shape[1]))


@pytest.mark.parametrize("value", [1e-30, 1.0, -3.3, 1e10])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_constant_channel_gives_exactly_bias(shape, value, driver):
    x, g, weight, bias = batch_norm_operands(shape)
    x[:, 0] = value
    y, _, var, gx, *_ = batch_norm_step(x, g, weight, bias)
    assert (y[:, 0] == bias[0]).all()
    assert var[0] == 0
    assert np.isfinite(gx).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e-3, 1e6, 1e12, 1e18, 1e24, 1e30])
@pytest.mark.parametrize("shape", SHAPES)
def test_channels_of_any_scale(shape, scale):
    x, g, weight, bias = batch_norm_operands(shape)
    x = (x * scale).astype(np.float32)
    got = batch_norm_step(x, g, weight, bias)
    want = exact_step(x, g, weight, bias)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("blocks", [(37, 1, 50, 1), (9, 3, 2, 40), (8, 5, 1, 60), (1, 1, 7, 1)])
@pytest.mark.parametrize(("offset", "offset_of_g"), [(0, 0), (1e3, 0), (1e6, 0), (0, 1e2), (10, 1e6), (0, -1e6)])
@pytest.mark.parametrize("centered", [True, False])
def test_blocks_are_normalised_exactly_at_any_mean(blocks, offset, offset_of_g, centered, driver):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(blocks[0], int(np.prod(blocks[1:])))) + offset).astype(np.float32)
    weight, bias = rng.normal(size=(2, blocks[1] * blocks[2])).astype(np.float32)
    offset_of_g *= centered  # without centering the gradient contains the mean
    weight[:] = 0.7 if offset_of_g else weight  # weights that differ would make the mean a part of the gradient
    g, results = (rng.normal(size=x.shape) + offset_of_g).astype(np.float32), []
    for dtype in (np.float32, np.float64):
        ts = [Tensor(a, requires_grad=True, dtype=dtype) for a in (x, weight, bias)]
        y = block_norm(*ts, blocks=blocks, eps=1e-5, centered=centered)
        y.backward(g.astype(dtype))
        results.append([y, *(t.grad for t in ts)])
    for got, want in zip(*results, strict=True):
        scale = max(np.abs(want.numpy()).max(), 1e-3 if centered else 0)
        assert np.abs(got.numpy() - want.numpy()).max() <= 3e-6 * scale


def test_every_kernel_is_as_exact_as_its_precision_allows():
    limits = {"float32": 1e-6, "float64": 1e-13}
    rows = list(kernel_errors())
    assert {(row.name, row.device) for row in rows} == set(MODULES)
    assert [row for row in rows if not row.error <= limits[row.dtype]] == []
    assert sum(row.error > 0 for row in rows if row.dtype == "float32") > len(MODULES) / 2  # something was measured


# Calls that kernels leave to NumPy, in the property's checks of 50 seeded samples of their own op.
EMPTY_OR_ONE_TERM = {"sum": 34, "sum_to": 20, "mean": 58, "sum_of_squares": 56, "mean_and_var": 16}
EMPTY_OR_ONE_TERM |= {
    "var": 58,
    "var.vjp": 84,
    "std": 58,
    "std.vjp": 84,
    "max": 16,
    "min": 16,
    "conv_with_bias.vjp": 4,
    "squared_norm": 52,
}
NO_MOMENTUM = {"sgd": 54}
TOO_SMALL_ROWS = {"argmax": 42, "argmin": 42}
NOT_TWO_MATRICES = {"matmul": 92, "linear": 100}
OF_SEVERAL_SHAPES = {"where": 70}
GRADIENT_OF_CONSTANTS = {"softmax_cross_entropy.vjp": 200, "batch_norm_inference.vjp": 300}
DECLINED = Counter(
    EMPTY_OR_ONE_TERM | TOO_SMALL_ROWS | NOT_TWO_MATRICES | OF_SEVERAL_SHAPES | GRADIENT_OF_CONSTANTS | NO_MOMENTUM
)


@pytest.mark.compiled
@pytest.mark.parametrize("name", sorted({name.removesuffix(".vjp") for name, _ in MODULES} & OPS.keys()))
def test_a_kernel_computes_its_samples_but_these(name, monkeypatch):
    kernels = {own: find_kernel(own, "cpu") for own in (name, f"{name}.vjp") if (own, "cpu") in MODULES}
    computed, declined = Counter(), Counter()

    def counting(own, /, *operands, **options):
        result = kernels[own](*operands, **options)
        (declined if result is NotImplemented else computed)[own] += 1
        return result

    for own in kernels:
        monkeypatch.setitem(kernels_module._kernels, (own, "cpu"), partial(counting, own))
    with thresholds():
        for seed in range(50):
            xs, params = OPS[name].sample(sample.RandomDraw(seed))
            properties.kernels_match_reference(OPS[name], xs, params, seed)
    assert computed.keys() == kernels.keys()
    assert declined <= DECLINED


def test_statistics_are_exact_with_an_outlier_as_first_element(driver):
    for shape in SHAPES:
        x, g, weight, bias = batch_norm_operands(shape, offset=1e4)
        x[0, :] = -1e7
        got = batch_norm_step(x, g, weight, bias)
        want = exact_step(x, g, weight, bias)
        assert np.abs(got[0] - want[0]).max() < 1e-5


def test_nan_and_inf_stay_in_their_channel(driver):
    for shape in SHAPES:
        x, g, weight, bias = batch_norm_operands(shape)
        x[2, 1] = np.nan
        x[1, 2] = np.inf
        with np.errstate(invalid="ignore"):
            y, mean, *_ = batch_norm_step(x, g, weight, bias)
        assert np.isnan(y[:, 1]).all()
        assert np.isnan(mean[1])
        assert not np.isfinite(mean[2])
        assert np.isfinite(np.delete(y, [1, 2], axis=1)).all()


def test_an_empty_batch_reads_nothing():
    y, mean, _, gx, gw, gb = batch_norm_step(*batch_norm_operands((0, 3)))
    assert y.shape == gx.shape == (0, 3)
    assert np.isnan(mean).all()
    assert gw.tolist() == gb.tolist() == [0, 0, 0]


def test_sequential_fuses_batch_norm_and_relu_unless_observed():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2))
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    fused = model(x)
    seen = []
    with nn.observe(lambda module, y: seen.append(type(module).__name__)):
        plain = model(x)
    assert seen == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "Sequential"]
    np.testing.assert_allclose(fused.numpy(), plain.numpy(), rtol=1e-5, atol=1e-6)
    assert model[1].num_batches_tracked.item() == 2
    model.eval()
    with nn.observe(lambda module, y: None):
        looked_at = model(x)
    np.testing.assert_array_equal(model(x).numpy(), looked_at.numpy())


def test_a_subclass_of_batch_norm_keeps_its_forward_in_a_sequential():
    class Doubled(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) * 2

    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    want = 2 * np.maximum(np.asarray(nn.BatchNorm1d(3)(x)), 0)
    np.testing.assert_allclose(nn.Sequential(Doubled(3), nn.ReLU())(x).numpy(), want, rtol=1e-6)


@given(st.integers(0, 999), st.booleans(), st.sampled_from([0.0, 0.1]), st.sampled_from([np.float32, np.float64]))
def test_adams_kernel_equals_its_reference(seed, decoupled, decay, dtype):
    def run():
        rng = np.random.default_rng(seed)
        p = Tensor(rng.normal(size=(3, 5)), requires_grad=True, dtype=dtype)
        optimizer = (optim.AdamW if decoupled else optim.Adam)([p], lr=0.1, weight_decay=decay)
        for _ in range(5):
            p.grad = Tensor(rng.normal(size=(3, 5)), dtype=dtype)
            optimizer.step()
        return p.numpy()

    with kernels_disabled():
        want = run()
    np.testing.assert_allclose(
        run(), want, **({"rtol": 1e-5, "atol": 1e-6} if dtype == np.float32 else {"rtol": 1e-12})
    )


def test_every_name_of_the_table_is_found_and_a_place_is_taken_once():
    for name, device in names():
        assert callable(find_kernel(name, device))
        with pytest.raises(ValueError, match="already"):
            kernel(name, device)(lambda: None)
    with kernels_disabled():
        assert find_kernel("batch_norm_training", "cpu") is None
    assert find_kernel("batch_norm_training", "gpu") is None


INTERPRETED = """
import numpy as np
from tinygrad_bn import Tensor, functional as F
x = Tensor(np.random.default_rng(0).normal(size=(5, 3)), requires_grad=True)
F.cross_entropy(F.batch_norm(x, training=True), np.zeros(5, int)).backward()
assert np.isfinite(x.grad.numpy()).all()
from tinygrad_bn_kernels.cpu.exponential import exp
with np.errstate(all="raise"):  # k is an exponent of float64, whatever x is
    got = [exp(np.float64(v)) for v in (-np.inf, np.inf, np.nan, 709.7, 0)]
np.testing.assert_allclose(got, [0, np.inf, np.nan, np.exp(709.7), 1], rtol=1e-15)
"""


def test_kernels_run_uncompiled_too():
    output(python(INTERPRETED, NUMBA_DISABLE_JIT=1))


@pytest.mark.parametrize("dtype", [">f4", "f2"])
def test_other_dtypes_have_right_answers(dtype):
    x = np.random.default_rng(0).normal(size=(70, 80)).astype(dtype)
    plain = x.astype(np.float64)
    np.testing.assert_allclose(functional.mean(x, 0).astype(float), plain.mean(0), atol=1e-3)
    np.testing.assert_allclose(functional.max(x, axis=1).astype(float), plain.max(1))
    t = Tensor(x, requires_grad=True)
    y = functional.batch_norm(t, training=True).relu()
    y.backward(np.ones(x.shape))
    np.testing.assert_allclose(y.numpy().astype(float).max(0), (plain - plain.mean(0)).max(0) / plain.std(0), rtol=1e-2)
    assert t.grad.dtype == t.dtype


def test_running_statistics_of_another_size_are_an_error():
    layer = nn.BatchNorm1d(4)
    layer.running_mean = nn.Buffer(np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="running statistics"):
        layer(Tensor(np.random.default_rng(0).normal(size=(5, 4)), dtype=np.float32))


def test_kernels_of_a_number_and_of_a_list():
    assert functional.erf(0.5) == pytest.approx(0.5204998778)
    assert functional.max([1.0, 2.0]) == 2


def test_kernels_that_are_called_by_themselves_check_shapes():
    p, short = np.zeros(5000), np.zeros(10)
    adam = {"beta1": 0.9, "beta2": 0.9, "step_size": 0.1, "root_scale": 1.0, "eps": 1e-8, "shrink": 1.0, "decay": 0.0}
    sgd = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "decay": 0.0, "nesterov": False}
    for name, operands, options in (
        ("adam", (p, p, short, p.copy()), adam),
        ("adam", (p, short, p.copy(), p.copy()), adam),
        ("sgd", (p, p, short), sgd),
        ("relu.vjp", (p, short, short), {"needs": [True]}),
    ):
        with pytest.raises(ValueError, match=r"one shape; got .*\(10,\)"):
            find_kernel(name, "cpu")(*operands, **options)


@pytest.mark.compiled
def test_read_only_operands_and_numpy_numbers_compile_nothing_new():
    x, target = np.random.default_rng(0).normal(size=(70, 80)).astype(np.float32), np.arange(70)

    def signatures():
        cpu = [module for name, module in sys.modules.items() if name.startswith("tinygrad_bn_kernels.cpu.")]
        return {f: len(f.signatures) for m in cpu for f in vars(m).values() if hasattr(f, "signatures")}

    def everything(x, number, integer):
        t = Tensor._of(x)
        for axis in (0, 1, None):
            functional.mean_and_var(t, axis), ops.sum(t, axis=axis), more_ops.max(t, axis=axis)
            functional.mean(t, axis), functional.var(t, axis), functional.logsumexp(t, axis)
        functional.layer_norm(t, 80, eps=number(0.0)), functional.batch_norm(t, training=True, eps=number(0.0))
        functional.batch_norm(t, np.ones(80), np.ones(80), eps=number(0.0))
        functional.cross_entropy(t, target, label_smoothing=number(0.0), ignore_index=integer(-100))

    everything(x, float, int)
    x.flags.writeable = False
    before = signatures()
    assert any(before.values())
    for number, integer in ((int, np.int32), (np.float32, np.int64)):
        everything(x, number, integer)
    assert signatures() == before


@pytest.mark.parametrize("name", ["adam", "sgd", "running_statistics", "batch_norm_training"])
@pytest.mark.parametrize("what", ["last element", "last array"])
def test_the_table_of_kernels_notices_a_mistake_in_any_of_their_results(name, what, monkeypatch):
    right = find_kernel(name, "cpu")

    def wrong(*operands, **options):
        result = right(*operands, **options)
        results = [*(result if isinstance(result, tuple) else [result]), *operands]
        arrays = [r for r in results[: -1 if name == "batch_norm_training" else None] if np.size(r) > 1]
        if name.startswith(("running", "batch")):
            arrays = [r for r in arrays if not any(r is o for o in operands)]
        (arrays[0] if what == "last element" else arrays[-1])[..., -1] *= 1.001
        return result

    monkeypatch.setitem(kernels_module._kernels, (name, "cpu"), wrong)
    monkeypatch.setattr("tinygrad_bn.kernels.MODULES", {(name, "cpu"): ""})
    assert [row.dtype for row in kernel_errors() if row.error > 1e-5] == ["float32", "float64"]


def test_the_gradient_of_a_long_half_precision_mean():
    x = Tensor(np.ones(70_000), requires_grad=True, dtype=np.float16)
    functional.mean(x).backward()
    np.testing.assert_allclose(x.grad.numpy().astype(float), 1 / 70_000, rtol=1e-2)


def test_only_gradients_that_are_needed_are_computed():
    for name, shape in [("batch_norm_training", (6, 5)), ("batch_norm_relu", (6, 5, 4))]:
        x, g, weight, bias = batch_norm_operands(shape)
        _, mean, var = find_kernel(name, "cpu")(x, weight, bias, eps=1e-5)
        saved = {"eps": 1e-5, "mean": mean, "var": var}
        pull = find_kernel(f"{name}.vjp", "cpu")
        none, *rest = pull(g, None, x, weight, bias, needs=[False, True, True], **saved)
        _, *want = pull(g, None, x, weight, bias, needs=[True, True, True], **saved)
        assert none is None
        np.testing.assert_array_equal(rest, want)


def looked_at(channels):
    """The elements (n, s) from which the backward pass estimates a common offset of gradients (C, N, S)."""
    _, n, size = channels.shape
    return [divmod(t * (n * size - 1) // (PROBES - 1), size) for t in range(PROBES)]


@pytest.mark.parametrize("shape", SHAPES)
def test_behind_a_relu_only_positive_outputs_count(shape, driver):
    """Large gradients of outputs that are 0 do not count, nor do those at the probed places."""
    x, g, weight, bias = batch_norm_operands(shape)
    channels, gradients = (np.moveaxis(a.reshape(*shape[:2], -1), 1, 0) for a in (x, g))
    for i, j in looked_at(channels):
        channels[:, i, j], gradients[:, i, j] = -3, 1e6
    weight, bias[0] = np.ones_like(weight), -50  # all of channel 0 is 0
    got = batch_norm_step(x, g, weight, bias, relu=True)
    want = exact_step(x, g, weight, bias, relu=True)
    for a, b in zip(got[3:], want[3:], strict=True):
        assert np.abs(a - b).max() <= 1e-6 * np.abs(b).max()
    assert not got[3][:, 0].any()
    assert got[4][0] == got[5][0] == 0


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(50_000, 2), (50, 2, 1000)])
def test_a_few_large_gradients_do_not_change_the_others(shape, relu, driver):
    x, g, weight, bias = batch_norm_operands(shape)
    gradients, large = np.moveaxis(g.reshape(*shape[:2], -1), 1, 0), np.zeros(shape, bool)
    marks = np.moveaxis(large.reshape(*shape[:2], -1), 1, 0)
    for i, j in looked_at(gradients):
        gradients[:, i, j], marks[:, i, j] = 1e6, True
    got = batch_norm_step(x, g, weight, bias, relu)
    want = exact_step(x, g, weight, bias, relu=relu)
    for a, b in zip((got[3][~large], *got[4:]), (want[3][~large], *want[4:]), strict=True):
        assert np.abs(a - b).max() <= 1e-6 * np.abs(b).max()


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_infinite_element_leaves_the_mean_infinite(shape, place, driver):
    x, g, weight, bias = batch_norm_operands(shape)
    x[(0, 0, *[place] * (x.ndim - 2))] = np.inf
    x[:, 1] += 1e5
    x[0, 1] = 0  # so that its channel is summed again
    with np.errstate(invalid="ignore"):
        mean = batch_norm_step(x, g, weight, bias)[1]
    assert mean[0] == np.inf
    assert np.isfinite(mean[1:]).all()
