"""The CUDA programs of normalisations, executed from their PTX and compared with float64. See `test_executed`."""

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.cuda.ptx.comparison import KINDS, SEEDS, SIZES, close, double, given_few, same_bits, same_gradients
from tests.cuda.ptx.programs import interpreted, numbers, run

pytestmark = pytest.mark.usefixtures("device")

PLANES = st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 31, 33]), st.sampled_from([1, 4, 5, 49, 196, 197, 1024]))
ROWS = st.tuples(st.sampled_from([1, 2, 40, 129, 300]), st.sampled_from([1, 7, 32, 65]), st.just(1))
SHAPES = (PLANES | ROWS).filter(lambda shape: shape[0] * shape[2] > 1)  # one value per channel is an error


@pytest.mark.parametrize("name", ["batch_norm_training", "batch_norm_relu"])
def test_batch_norm_declines_one_value_per_channel(name):
    vector = numbers(3, "plain", 0)
    assert run(name, numbers((1, 3, 1), "plain", 1), vector, vector, eps=1e-5) is NotImplemented


def batch_norm(x, weight, bias, eps):
    """Output, mean, variance and normalised input, in float64."""
    x, weight, bias = double(x, weight, bias)
    mean, var = x.mean((0, 2)), x.var((0, 2))
    xhat = (x - mean[:, None]) / np.sqrt(var + eps)[:, None]
    return xhat * weight[:, None] + bias[:, None], mean, var, xhat


@pytest.mark.parametrize("relu", [False, True])
@given_few(SHAPES, st.sampled_from(["plain", "offset"]), SEEDS)
def test_batch_norm(relu, shape, kind, seed):
    name, eps, channels = "batch_norm_relu" if relu else "batch_norm_training", 1e-5, shape[1]
    x, g = numbers(shape, kind, seed), numbers(shape, "plain", seed + 1)
    weight, bias = numbers(channels, "plain", seed + 2), numbers(channels, "plain", seed + 3)
    expected, mean, var, xhat = batch_norm(x, weight, bias, eps)
    y, found_mean, found_var = run(name, x, weight, bias, eps=eps)
    scale = np.maximum(np.abs(xhat * weight[:, None]), np.abs(bias[:, None])) + 1
    close(y, np.maximum(expected, 0) if relu else expected, ulps=64, scale=scale)
    close(found_mean, mean, ulps=4, scale=np.sqrt(var) + 1e-3)
    close(found_var, var, ulps=32)
    passed = np.where(y > 0, g, 0).astype(np.float64) if relu else g.astype(np.float64)
    count, ivar = x.size // channels, 1 / np.sqrt(var + eps)[:, None]
    gbias, gweight = passed.sum((0, 2)), (passed * xhat).sum((0, 2))
    gx = weight[:, None] * ivar * (passed - gbias[:, None] / count - xhat * gweight[:, None] / count)
    needs = [True] * 3
    found = run(f"{name}.vjp", g, y, x, weight, bias, needs=needs, eps=eps, mean=found_mean, var=found_var)
    close(found[0], gx, ulps=64, scale=np.abs(weight[:, None] * ivar) * (1 + np.abs(passed) + np.abs(xhat)))
    close(found[1], gweight, ulps=64, scale=np.abs(passed * xhat).sum((0, 2)))
    close(found[2], gbias, ulps=64, scale=np.abs(passed).sum((0, 2)))
    y = run("batch_norm_inference", x, found_mean, found_var, weight, bias, eps=eps)
    close(y, expected, ulps=64, scale=scale + np.abs(weight[:, None] * ivar) * (0 if kind == "plain" else 1e3))


@given_few(SHAPES, SEEDS)
def test_batch_norm_of_non_finite_input_stays_in_its_channel(shape, seed):
    x, channels = numbers(shape, "plain", seed), shape[1]
    x[0, 0, 0] = np.random.default_rng(seed).choice([np.nan, np.inf, -np.inf])
    weight, bias = numbers(channels, "plain", seed + 2), numbers(channels, "plain", seed + 3)
    y, mean, var = run("batch_norm_training", x, weight, bias, eps=1e-5)
    assert np.isnan(y[:, 0]).all()
    assert np.isnan(var[0])
    assert np.isfinite(y[:, 1:]).all()
    assert np.isfinite(mean[1:]).all()


@given_few(SIZES, st.booleans(), SEEDS)
def test_running_statistics(channels, finite, seed):
    old_mean, old_var, mean, var = (numbers(channels, "plain", seed + k) for k in range(4))
    if not finite:
        var[seed % channels] = np.nan
    found = run("running_statistics", old_mean, old_var, np.array(6), mean, var, momentum=0.1, unbias=1.25)
    assert found[2] == 7
    wide = double(old_mean, old_var, mean, var)
    expected = 0.9 * wide[0] + 0.1 * wide[2], 0.9 * wide[1] + 0.1 * 1.25 * wide[3]
    for f, e, old in zip(found, expected, (old_mean, old_var), strict=False):
        close(f, e if finite else old, scale=np.abs(wide).max())


@given_few(
    st.integers(1, 20), st.integers(1, 3), st.sampled_from([1, 3, 40]), st.sampled_from([1, 7, 300]), KINDS,
    st.booleans(), SEEDS,
)  # fmt: skip
def test_block_norm(n, groups, planes, size, kind, centered, seed):
    kind = "plain" if kind == "special" else kind
    shape, blocks = (n, groups * planes, size), (n, groups, planes, size)
    x, g = numbers(shape, kind, seed), numbers(shape, "plain", seed + 1)
    weight, bias = (numbers(groups * planes, "plain", seed + k) for k in (2, 3))
    options = {"blocks": blocks, "eps": 1e-5, "centered": centered}
    y, mean, var = run("block_norm", x, weight, bias, **options)
    wide = x.astype(np.float64).reshape(n * groups, -1)
    expected_mean = wide.mean(1) if centered else np.zeros(n * groups)
    expected_var = ((wide - expected_mean[:, None]) ** 2).mean(1)
    ivar = 1 / np.sqrt(expected_var + 1e-5)
    xhat = ((wide - expected_mean[:, None]) * ivar[:, None]).reshape(shape)
    scale = np.abs(xhat * weight[:, None]) + np.abs(bias[:, None]) + 1
    close(y, xhat * weight[:, None] + bias[:, None].astype(np.float64), ulps=64, scale=scale)
    close(var, expected_var, ulps=32)
    gx, gweight, gbias = run("block_norm.vjp", g, y, x, weight, bias, needs=[True] * 3, **options, mean=mean, var=var)
    gw, h = (a.reshape(n * groups, -1) for a in (g * weight[:, None].astype(np.float64), xhat))
    center = gw.mean(1, keepdims=True) if centered else 0
    expected = ivar[:, None] * (gw - center - h * (gw * h).mean(1, keepdims=True))
    scale = ivar[:, None] * (1 + np.abs(gw) + np.abs(h) * (1 + np.abs(gw * h).mean(1, keepdims=True)))
    close(gx, expected.reshape(shape), ulps=64, scale=scale.reshape(shape))
    close(gweight, (g * xhat).sum((0, 2)), ulps=64, scale=np.abs(g * xhat).sum((0, 2)) + n * size)
    close(gbias, g.astype(np.float64).sum((0, 2)), ulps=64, scale=np.abs(g).sum((0, 2)))


@pytest.mark.parametrize(("with_weight", "with_bias"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("shape", [(5, 6, 1), (5, 6, 7)])
def test_norms_without_weight_or_bias(shape, with_weight, with_bias):
    x, g, vectors = numbers(shape), numbers(shape, seed=1), numbers((4, 6), seed=2)
    weight, bias = (v if there else None for v, there in zip(vectors, (with_weight, with_bias), strict=False))
    operands, spelt_out = [x, weight, bias], [x, np.ones(6, "f4"), np.zeros(6, "f4")]
    spelt_out = [o if o is not None else s for o, s in zip(operands, spelt_out, strict=True)]
    for name, options in (
        ("batch_norm_training", {}),
        ("batch_norm_relu", {}),
        ("block_norm", {"blocks": (5, 2, 3, shape[2]), "centered": True}),
    ):
        y, mean, var = same_bits(name, operands, spelt_out, eps=1e-5, **options)
        same_gradients(name, g, y, operands, spelt_out, eps=1e-5, **options, mean=mean, var=var)
    given = vectors[2], np.abs(vectors[3])
    same_bits("batch_norm_inference", [x, *given, *operands[1:]], [x, *given, *spelt_out[1:]], eps=1e-5)


@given_few(st.integers(1, 3), st.integers(1, 3), st.integers(1, 600), SEEDS)
def test_float64_uses_128_bit_accesses_too(n, channels, size, seed):
    x, weight = (numbers(shape, "offset", seed).astype(np.float64) for shape in ((n, channels, 4 * size), channels))
    with interpreted() as device:
        found = [*run("batch_norm_training", x, weight, weight, eps=1e-5), run("exp", -x)]
    assert {name for name, _ in device.launches} >= {
        "batch_norm.plane4_moments",
        "batch_norm.normalize_planes4",
        "exp.a4",
    }
    mean, var = x.mean((0, 2)), x.var((0, 2))
    y = (x - mean[:, None]) / np.sqrt(var[:, None] + 1e-5) * weight[:, None] + weight[:, None]
    for one, want in zip(found, (y, mean, var, np.exp(-x)), strict=True):
        np.testing.assert_allclose(one, want, rtol=1e-9, atol=1e-9)
