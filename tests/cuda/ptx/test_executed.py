"""The CUDA programs, executed from their PTX and compared with float64. Those of norms are in `test_executed_norms`.

The interpreter raises for invalid accesses and data races, so each test checks those too.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example
from hypothesis import strategies as st

from tests.cuda.ptx.comparison import KINDS, SEEDS, SIDES, SIZES, close, double, given_few, same_bits, same_gradients
from tests.cuda.ptx.programs import computed, interpreted, numbers, run, to_device, unaligned
from tinygrad_bn import Tensor, grad
from tinygrad_bn.functional.pooling import max_pool_places
from tinygrad_bn.tensor import OPS

pytestmark = pytest.mark.usefixtures("device")

# ---- elementwise -----------------------------------------------------------------------------------------

UNARY = ["neg", "abs", "sign", "relu", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "tanh", "sech_squared"]
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
    for low, high in ((-0.5, 0.25), (0.5, -0.25), (math.nan, 0.25), (-0.5, math.nan), (-math.inf, 0.25)):
        close(run("clip", a, min=low, max=high), np.clip(a, low, high))
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


# ---- operands that are None ------------------------------------------------------------------------------


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
