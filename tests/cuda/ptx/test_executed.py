"""Every CUDA program, executed from its PTX and compared with float64.

The interpreter raises for invalid accesses and data races, so each test checks those too.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.cuda.ptx.compile import require_compiler
from tests.cuda.ptx.programs import computed, interpreted, numbers, run, to_device, unaligned
from tinygrad_bn import Tensor, grad
from tinygrad_bn.functional.pooling import max_pool_places
from tinygrad_bn.tensor import OPS

BLOCK = 256
SIZES = st.sampled_from([1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 8 * BLOCK + 3]) | st.integers(1, 3000)
SIDES = st.sampled_from([1, 7, 31, 32, 33, 63, 65]) | st.integers(1, 80)
KINDS = st.sampled_from(["plain", "offset", "special"])
SEEDS = st.integers(0, 2**32 - 1)
EPS = 2.0**-23


def given_few(*strategies: Any) -> Callable[[Any], Any]:
    """`given` with fewer examples, as each example is many launches."""
    return lambda test: settings(max_examples=max(8, settings().max_examples // 5))(given(*strategies)(test))


@pytest.fixture(scope="module", autouse=True)
def device():
    require_compiler()
    with interpreted() as device:
        yield device


def close(found: Any, expected: Any, ulps: float = 8, scale: Any = 0.0) -> None:
    """Assert equality within `ulps` float32 units in the last place of the result, or of `scale` if that is larger."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    if found.dtype != np.float32:
        np.testing.assert_array_equal(found, expected)
        return
    with np.errstate(all="ignore"):
        rounded = expected.astype(np.float32)
        allowed = ulps * EPS * np.maximum(np.abs(expected), scale) + 2.0**-126
        near = np.isfinite(allowed) & (np.abs(found - expected) <= allowed)  # any number is within ∞ of ∞
        same = (found == rounded) | (np.isnan(found) & np.isnan(rounded)) | near
    if not same.all():
        at = tuple(int(i[0]) for i in np.nonzero(~same))
        raise AssertionError(f"{(~same).sum()} of {same.size} differ; at {at}: {found[at]} and not {expected[at]}")


def double(*arrays: np.ndarray) -> list[np.ndarray]:
    return [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays]


# ---- elementwise -----------------------------------------------------------------------------------------

UNARY = ["neg", "abs", "sign", "relu", "exp", "expm1", "log", "sqrt", "rsqrt", "tanh"]
UNARY += ["erf", "erfc", "sigmoid", "softplus", "silu", "gelu"]
BINARY = [
    "add",
    "sub",
    "mul",
    "div",
    "pow",
    "maximum",
    "minimum",
    "relu_vjp",
    "silu_vjp",
    "gelu_vjp",
    "equal",
    "not_equal",
    "less",
    "less_equal",
]


def gradient(name: str) -> Callable[..., np.ndarray]:
    """The gradient of an op of one operand: g times the slope of its composition."""

    def of(g: np.ndarray, x: np.ndarray) -> np.ndarray:
        t = Tensor(x, requires_grad=True)
        return g * grad(OPS[name].function(t).sum(), t, create_graph=True).numpy()

    return of


REFERENCES: dict[str, Callable[..., np.ndarray]] = {  # for functions that are not ops
    "identity": lambda x: x,
    "relu_vjp": lambda g, y: np.where(y <= 0, 0, g),
    "silu_vjp": gradient("silu"),
    "gelu_vjp": gradient("gelu"),
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
}


def scale_of(name: str, g: Any) -> Any:
    """The size of what a function adds: the slopes of SiLU and GELU are sums that are 0 somewhere."""
    return np.where(np.isfinite(g), np.abs(g), 0) if name in ("silu_vjp", "gelu_vjp") else 0.0


def reference(name: str, *operands: Any) -> np.ndarray:
    """The function in float64."""
    with np.errstate(all="ignore"):
        return np.asarray((REFERENCES.get(name) or OPS[name].forward)(*(np.asarray(o, np.float64) for o in operands)))


@pytest.mark.parametrize("name", [*UNARY, "identity"])
@given_few(SIZES, KINDS, SEEDS)
def test_a_function_of_one_array(name, n, kind, seed):
    x = numbers(n, kind, seed)
    expected = reference(name, x)
    for operand in (x, unaligned(x)):
        close(computed(name, operand), expected)


@pytest.mark.parametrize("name", BINARY)
@given_few(SIZES, KINDS, SEEDS)
def test_a_function_of_two_arrays(name, n, kind, seed):
    a, b = numbers(n, kind, seed), numbers(n, "plain", seed + 1)
    if name == "pow":
        b = np.round(b)
    number = np.float32(1.5)
    for pair in ((a, b), (a, number), (number, a)):
        expected = reference(name, *pair)
        for operands in (pair, tuple(unaligned(o) if o.ndim else o for o in pair)):
            if name.endswith("_vjp") and not np.ndim(pair[0]):
                continue  # g is always an array
            close(
                computed(name, *(o if np.ndim(o) or not isinstance(o, np.generic) else float(o) for o in operands)),
                expected,
                scale=scale_of(name, pair[0]),
            )


@pytest.mark.parametrize("name", BINARY)
@given_few(SIDES, SIDES, KINDS, SEEDS)
def test_a_function_of_broadcast_arrays(name, n, m, kind, seed):
    a, b = numbers((3, n, 1), kind, seed), numbers((m,), "plain", seed + 1)
    close(computed(name, a, b), reference(name, a, b), scale=scale_of(name, a))
    column = numbers((n, 1), "plain", seed + 2)
    close(computed(name, column, a), reference(name, column, a), scale=scale_of(name, column))


@given_few(SIDES, SIDES, KINDS, SEEDS)
def test_where_clip_fill_and_conversions(n, m, kind, seed):
    a, b = numbers((n, m), kind, seed), numbers((m,), "plain", seed + 1)
    condition = numbers((n, 1), "plain", seed + 2) > 0
    close(run("where", condition, a, b), np.where(condition, a, b))
    for pair in ((a, -a), (a, 0.5), (0.5, a)):
        close(run("where", a > 0, *pair), np.where(a > 0, *pair).astype(np.float32))
    close(run("clip", a, min=-0.5, max=0.25), np.clip(a, -0.5, 0.25))
    close(run("pad", a, width=((1, 2), (0, 3)), value=7.0), np.pad(a, ((1, 2), (0, 3)), constant_values=7))
    close(run("astype", (a > 0), dtype=np.float32), (a > 0).astype(np.float32))


# ---- copies, gather and scatter --------------------------------------------------------------------------


@given_few(SIDES, SIDES, st.integers(1, 3), SEEDS)
def test_copies_of_strided_elements(n, m, k, seed):
    x = numbers((k, n, m), "special", seed)
    close(run("transpose", x, axes=(0, 2, 1)), x.transpose(0, 2, 1))
    close(run("transpose", x, axes=(2, 1, 0)), x.transpose(2, 1, 0))
    close(run("getitem", x, index=(slice(None), slice(None, None, -2), slice(0, None, 3))), x[:, ::-2, ::3])
    close(run("broadcast_to", x[:, :1], shape=(2, k, n, m)), np.broadcast_to(x[:, :1], (2, k, n, m)))
    close(run("concatenate", x, x[:, :, :1], axis=2), np.concatenate([x, x[:, :, :1]], axis=2))


@given_few(SIDES, SIDES, SIZES, SEEDS)
def test_gathering_and_scattering(n, width, count, seed):
    x, count = numbers((n, width), "special", seed), min(count, 300)
    index = np.random.default_rng(seed).integers(-n, n, count)
    close(run("getitem", x, index=index), x[index])
    close(run("getitem", x, index=to_device(np.array([0, n]))), np.stack([x[0], np.full(width, np.nan, "f4")]))
    values = np.round(numbers((count, width), "plain", seed) * 8)  # sums of small integers are exact in any order
    expected = np.zeros((n, width))
    np.add.at(expected, index, values)
    close(run("scatter_add", values, index=index, shape=(n, width)), expected)


# ---- reductions ------------------------------------------------------------------------------------------

SHORT, ROW_PART, COLUMN_PART = 1024, 8192, 256  # as in `reduce.py`
LENGTHS = st.sampled_from([1, 31, 32, 33, 1024, 1025, 8192, 9001, 20000]) | st.integers(1, 3000)


def check_reductions(x: np.ndarray, axis: Any) -> None:
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        total, squares, size = wide.sum(axis), (wide**2).sum(axis), np.abs(wide).sum(axis)
        close(run("sum", x, axis=axis), total, ulps=16, scale=np.where(np.isfinite(size), size, 0))
        close(run("sum_of_squares", x, axis=axis), squares, ulps=16)
        close(run("max", x, axis=axis), x.max(axis))
        close(run("min", x, axis=axis), x.min(axis))


@given_few(st.integers(1, 40), LENGTHS, KINDS, SEEDS)
@example(9, SHORT, "plain", 0)
@example(9, SHORT + 1, "plain", 0)
@example(1, ROW_PART + 1, "plain", 0)  # from here on in parts, combined by a second launch
@example(3, 9001, "plain", 0)
@example(1, 20000, "plain", 0)
def test_reductions_of_rows(rows, length, kind, seed):
    x = numbers((min(rows, 1 + 60000 // length), length), kind, seed)
    check_reductions(x, 1)
    if length > 1:
        check_reductions(x[0], None)


@given_few(st.integers(1, 3), LENGTHS, SIDES, KINDS, SEEDS)
@example(2, COLUMN_PART, 33, "plain", 0)
@example(2, COLUMN_PART + 1, 33, "plain", 0)
@example(1, 3000, 7, "plain", 0)
def test_reductions_of_columns(outer, length, width, kind, seed):
    check_reductions(numbers((outer, min(length, 1 + 60000 // width), width), kind, seed), 1)


@given_few(st.integers(1, 40), SIZES, KINDS, SEEDS)
def test_argmax_and_argmin(rows, length, kind, seed):
    x = numbers((min(rows, 1 + 20000 // length), length), kind, seed)
    x[:, length // 2] = x[:, 0]  # a tie
    for name in ("argmax", "argmin"):
        np.testing.assert_array_equal(run(name, x, axis=1), getattr(np, name)(x, 1))
        np.testing.assert_array_equal(run(name, x.T.copy(), axis=0), getattr(np, name)(x, 1))


# ---- matrix products -------------------------------------------------------------------------------------


@given_few(SIDES, st.sampled_from([1, 15, 16, 17, 33]) | st.integers(1, 40), SIDES, KINDS, SEEDS)
def test_matrix_products(rows, depth, columns, kind, seed):
    a, b = numbers((2, rows, depth), kind, seed), numbers((depth, columns), "plain", seed + 1)
    g, bias = numbers((2, rows, columns), kind, seed + 2), numbers(columns, "plain", seed + 3)
    wide_a, wide_b, wide_g = double(a, b, g)
    scale = 1e3 if kind == "offset" else 0.0

    def same(found: Any, left: Any, right: Any, plus: Any = 0.0) -> None:
        with np.errstate(all="ignore"):
            size = np.abs(left) @ np.abs(right)
            close(found, left @ right + plus, ulps=16, scale=np.maximum(np.where(np.isfinite(size), size, 0), scale))

    same(run("matmul", a, b), wide_a, wide_b)
    ga, gb = run("matmul.vjp", g, g, a, np.stack([b, b]), needs=[True, True])
    same(ga, wide_g, wide_b.T)
    same(gb, wide_a.transpose(0, 2, 1), wide_g)
    same(run("linear", a, np.ascontiguousarray(b.T), bias), wide_a, wide_b, bias)


# ---- normalisation ---------------------------------------------------------------------------------------

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


# ---- operands that are None ------------------------------------------------------------------------------


def same_bits(name: str, operands: list[Any], spelt_out: list[Any], **params: Any) -> Any:
    """The results of a kernel, which must not change if None is replaced by an array."""
    found, expected = (run(name, *xs, **params) for xs in (operands, spelt_out))
    for one, want in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
        np.testing.assert_array_equal(one, want)
    return found


def same_gradients(name: str, g: Any, y: Any, operands: list[Any], spelt_out: list[Any], **params: Any) -> None:
    """The same of a vector-Jacobian product; the gradient of an operand that is None is None."""
    given = [x is not None for x in operands]
    found = same_bits(f"{name}.vjp", [g, y, *operands], [g, y, *spelt_out], needs=given, **params)
    assert [x is not None for x in found] == given


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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_without_weight(reduction, smoothing):
    x, target = numbers((9, 40)), np.arange(9)
    options = {"smoothing": smoothing, "ignore_index": 3, "reduction": reduction}
    operands, spelt_out = [x, target, None], [x, target, np.ones(40, "f4")]
    loss, normalizer, total = same_bits("softmax_cross_entropy", operands, spelt_out, **options)
    g, saved = numbers(np.shape(loss)), {"normalizer": normalizer, "total": total}
    gx, *others = run("softmax_cross_entropy.vjp", g, loss, *operands, needs=[True, False, False], **options, **saved)
    want, *_ = run("softmax_cross_entropy.vjp", g, loss, *spelt_out, needs=[True, False, False], **options, **saved)
    np.testing.assert_array_equal(gx, want)
    assert others == [None, None]


def test_linear_without_bias():
    x, weight, g = numbers((2, 33, 20)), numbers((70, 20), seed=1), numbers((2, 33, 70), seed=2)
    operands, spelt_out = [x, weight, None], [x, weight, np.zeros(70, "f4")]
    y = same_bits("linear", operands, spelt_out)
    same_gradients("linear", g, y, operands, spelt_out)
    assert launched("linear", x, weight, None) == ["product.nt"]


# ---- losses, convolution, pooling, dropout, optimisers ---------------------------------------------------


@given_few(
    st.integers(1, 60), st.sampled_from([1, 2, 10, 33, 100]), st.sampled_from(["plain", "offset"]),
    st.sampled_from([0.0, 0.1]), st.sampled_from(["mean", "sum", "none"]), SEEDS,
)  # fmt: skip
def test_cross_entropy(rows, classes, kind, smoothing, reduction, seed):
    x, rng = numbers((rows, classes), kind, seed), np.random.default_rng(seed)
    target, weight = rng.integers(0, classes, rows), np.abs(numbers(classes, "plain", seed)) + np.float32(0.1)
    target[rng.random(rows) < 0.2] = -100
    target[0] = 0
    options = {"smoothing": smoothing, "ignore_index": -100, "reduction": reduction}
    op = OPS["softmax_cross_entropy"]
    expected, *saved = op.forward(x.astype(np.float64), target, weight.astype(np.float64), **options)
    loss, normalizer, total = run("softmax_cross_entropy", x, target, weight, **options)
    close(loss, np.asarray(expected), ulps=64, scale=10.0 * (rows if reduction == "sum" else 1))
    close(total, np.asarray(saved[1]), ulps=64)
    g = numbers(np.shape(expected), "plain", seed + 1)
    gx, *_ = run(
        "softmax_cross_entropy.vjp", g, loss, x, target, weight, needs=[True, False, False], **options,
        normalizer=normalizer, total=total,
    )  # fmt: skip
    wide = x.astype(np.float64)
    p = np.exp(wide - wide.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    q = (1 - smoothing) * np.eye(classes)[np.maximum(target, 0)] + smoothing / classes
    qw = q * weight * (target != -100)[:, None]
    whole = float(weight[target[target != -100]].sum()) if reduction == "mean" else 1.0
    expected = (g[:, None] if reduction == "none" else g) * (p * qw.sum(1, keepdims=True) - qw) / whole
    close(gx, expected, ulps=64, scale=np.abs(g).max() * weight.max() / whole)


CONVOLUTIONS = st.sampled_from([
    # channels, outputs, groups, size, kernel, stride, padding, dilation
    (1, 1, 1, (1,), (1,), (1,), ((0, 0),), (1,)),
    (4, 6, 2, (37,), (3,), (2,), ((1, 1),), (1,)),
    (3, 5, 1, (9, 11), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    (2, 4, 2, (13, 7), (3, 2), (2, 3), ((2, 1), (0, 1)), (2, 1)),
    (2, 3, 1, (5, 6, 4), (2, 3, 2), (1, 2, 1), ((1, 0), (1, 1), (0, 0)), (1, 1, 2)),
])  # fmt: skip


@given_few(st.integers(1, 5), CONVOLUTIONS, KINDS, SEEDS)
def test_convolution(n, case, kind, seed):
    kind = "plain" if kind == "special" else kind
    channels, outputs, groups, size, kernel, stride, padding, dilation = case
    x, weight = (
        numbers((n, channels, *size), kind, seed),
        numbers((outputs, channels // groups, *kernel), seed=seed + 1),
    )
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}

    def check(name: str, a: np.ndarray, b: np.ndarray, **more: Any) -> np.ndarray:
        expected, size = (OPS[name].forward(*double(f(a), f(b)), **options, **more) for f in (np.array, np.abs))
        close(run(name, a, b, **options, **more), expected, ulps=16, scale=size)
        return expected

    g = numbers(check("conv", x, weight).shape, "plain", seed + 2)
    check("conv_input", g, weight, size=size)
    check("conv_weight", x, g, kernel=kernel)


@given_few(st.integers(1, 5), KINDS, SEEDS)
def test_max_pooling(n, kind, seed):
    for size, kernel, stride, padding, dilation in (
        ((37,), (3,), (2,), (1,), (1,)),
        ((9, 70), (2, 2), (2, 2), (0, 0), (1, 1)),
        ((11, 8), (3, 2), (1, 3), (1, 1), (2, 1)),
    ):
        x = numbers((n, 3, *size), kind, seed)
        axes = zip(size, kernel, stride, padding, dilation, strict=True)
        out = tuple((m + 2 * p - d * (k - 1) - 1) // s + 1 for m, k, s, p, d in axes)
        options = {"kernel": kernel, "out": out, "stride": stride, "padding": padding, "dilation": dilation}
        places = max_pool_places(x, **options)
        expected = np.take_along_axis(x.reshape(n, 3, -1), places.reshape(n, 3, -1), 2).reshape(places.shape)
        np.testing.assert_array_equal(run("max_pool_places", x, **options), places)
        np.testing.assert_array_equal(run("max_pool", x, **options), expected)
        g = np.round(numbers(places.shape, "plain", seed + 1) * 8)  # sums of small integers are exact in any order
        gx = np.zeros((n * 3, math.prod(size)))
        np.add.at(gx, (np.arange(n * 3)[:, None], places.reshape(n * 3, -1)), g.reshape(n * 3, -1))
        (found,) = run("max_pool.vjp", g, expected, x, needs=[True], **options)
        close(found, gx.reshape(x.shape))


@given_few(SIZES, st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 2**64 - 1))
def test_dropout_keeps_the_same_elements_as_on_the_cpu(n, p, key):
    x = numbers(n, "plain", 1)
    expected = OPS["dropout_by_key"].forward(x, p=p, key=key)
    for operand in (x, unaligned(x)):
        np.testing.assert_array_equal(run("dropout_by_key", operand, p=p, key=key), expected)


@given_few(SIZES, SEEDS)
def test_optimisers(n, seed):
    p, g, m = (numbers(n, "plain", seed + k) for k in range(3))
    v = np.abs(numbers(n, "plain", seed + 3))
    wide_p, wide_g, wide_m, wide_v = double(p, g, m, v)
    beta1, beta2, step, root, eps, shrink, decay = 0.9, 0.999, 1e-3, 1.5, 1e-8, 0.99, 0.01
    device_m, device_v = to_device(m), to_device(v)
    found = run(
        "adam", p, g, device_m, device_v, beta1=beta1, beta2=beta2, step_size=step, root_scale=root, eps=eps,
        shrink=shrink, decay=decay,
    )  # fmt: skip
    d = wide_g + decay * wide_p
    wide_m, wide_v = beta1 * wide_m + (1 - beta1) * d, beta2 * wide_v + (1 - beta2) * d * d
    close(device_m.numpy(), wide_m, scale=1.0)
    close(device_v.numpy(), wide_v, scale=1.0)
    close(found, shrink * wide_p - step * wide_m / (root * np.sqrt(wide_v) + eps), scale=1 + np.abs(wide_p))
    for nesterov in (False, True):
        device_v = to_device(v)
        options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "decay": decay, "nesterov": nesterov}
        found = run("sgd", p, g, device_v, **options)
        new = 0.9 * v.astype(np.float64) + 0.8 * d
        close(device_v.numpy(), new, scale=2.0)
        close(found, wide_p - 0.1 * (d + 0.9 * new if nesterov else new), scale=1 + np.abs(wide_p))


# ---- float64 ---------------------------------------------------------------------------------------------


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


# ---- launches --------------------------------------------------------------------------------------------


def launched(name: str, *operands: Any, **params: Any) -> list[str]:
    """The programs that a kernel launches, in order."""
    with interpreted() as device:
        run(name, *operands, **params)
    return [program for program, _ in device.launches]


def test_number_of_launches():
    """A launch costs the host more than many programs cost the GPU."""
    x, vectors = numbers((4, 3, 10, 12)), np.abs(numbers((4, 3)))
    assert launched("sum", x, axis=(0, 2, 3)) == ["sum.short", "sum.columns"]  # no transposed copy
    assert launched("sum_of_squares", x, axis=(0, 2)) == ["sum_of_squares.columns", "sum.columns"]
    a, b = numbers((2, 3, 66, 40)), numbers((2, 3, 40, 9))
    for left, right in ((a, b), (a, b[0, 0]), (a[:1, :1], b), (a[:1], b[0])):  # no copy for broadcasting
        y = left @ right
        assert launched("matmul", left, right) == ["product.nn"]
        names = launched("matmul.vjp", y, y, left, right, needs=[True, True])
        assert names == ["product.nt", "product.tn"]
    assert launched("batch_norm_inference", x, *vectors, eps=1e-5) == ["batch_norm.infer_planes4"]
    options = {"smoothing": 0.1, "ignore_index": -100}
    for reduction in ("mean", "sum", "none"):
        found = launched(
            "softmax_cross_entropy", numbers((30, 5)), np.arange(30) % 5, vectors[0, :1].repeat(5), **options,
            reduction=reduction,
        )  # fmt: skip
        assert found == ["cross_entropy", "cross_entropy.total"]
