"""The functions of tinygrad_bn.functional against PyTorch's: values and gradients where they are smooth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, mutually_broadcastable_shapes

from tests.peers.compare import TOLERANCE, check, peer, torch
from tinygrad_bn import functional as F

P = torch.nn.functional
DTYPES = st.sampled_from(list(TOLERANCE))
SHAPES = array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4)


def numbers(low, high):
    return st.floats(low, high, width=32)


def apart(high):  # 0 is a kink of several functions, and the subject of another test
    return numbers(-high, -0.125) | numbers(0.125, high)


# ---- elementwise ----------------------------------------------------------------------------------------

SATURATED, MODERATE, POSITIVE = apart(30.0), apart(4.0), numbers(0.125, 4.0)
ELEMENTWISE = {
    "celu": (lambda x: F.celu(x, 0.5), lambda x: P.celu(x, 0.5), SATURATED),
    "gelu_tanh": (F.gelu_tanh, lambda x: P.gelu(x, approximate="tanh"), SATURATED),
    "hardsigmoid": (F.hardsigmoid, P.hardsigmoid, SATURATED.filter(lambda x: abs(x) != 3)),
    "hardswish": (F.hardswish, P.hardswish, SATURATED.filter(lambda x: abs(x) != 3)),
    "hardtanh": (F.hardtanh, P.hardtanh, SATURATED),
    "logsigmoid": (F.logsigmoid, P.logsigmoid, SATURATED),
    "mish": (F.mish, P.mish, SATURATED),
    "relu6": (F.relu6, P.relu6, SATURATED),
    "selu": (F.selu, P.selu, SATURATED),
    "softsign": (F.softsign, P.softsign, SATURATED),
    "abs": (F.abs, torch.abs, SATURATED),
    "clip": (lambda x: F.clip(x, min=-1.0, max=0.5), lambda x: torch.clip(x, -1.0, 0.5), MODERATE),
    "elu": (lambda x: F.elu(x, 0.7), lambda x: P.elu(x, 0.7), SATURATED),
    "erf": (F.erf, torch.erf, SATURATED),
    "exp": (F.exp, torch.exp, MODERATE),
    "expm1": (F.expm1, torch.expm1, MODERATE),
    "gelu": (F.gelu, P.gelu, SATURATED),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), lambda x: P.leaky_relu(x, 0.2), SATURATED),
    "log": (F.log, torch.log, POSITIVE),
    "neg": (lambda x: -x, torch.neg, MODERATE),
    "pow": (lambda x: F.pow(x, 3), lambda x: torch.pow(x, 3), MODERATE),
    "relu": (F.relu, torch.relu, SATURATED),
    "rsqrt": (F.rsqrt, torch.rsqrt, POSITIVE),
    "sigmoid": (F.sigmoid, torch.sigmoid, SATURATED),
    "sign": (F.sign, torch.sign, SATURATED),
    "silu": (F.silu, P.silu, SATURATED),
    # PyTorch's softplus is the identity beyond its threshold, which is an approximation
    "softplus": (F.softplus, lambda x: P.softplus(x, threshold=100), SATURATED),
    "sqrt": (F.sqrt, torch.sqrt, POSITIVE),
    "tanh": (F.tanh, torch.tanh, SATURATED),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@given(data=st.data(), dtype=DTYPES)
def test_functions_of_one_operand(name, data, dtype):
    ours, theirs, elements = ELEMENTWISE[name]
    shape = data.draw(array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    check(ours, theirs, [data.draw(arrays(dtype, shape, elements=elements))], TOLERANCE[dtype])


BINARY = {
    "add": (lambda a, b: a + b, torch.add),
    "sub": (lambda a, b: a - b, torch.sub),
    "mul": (lambda a, b: a * b, torch.mul),
    "div": (lambda a, b: a / b, torch.div),
    "pow": (F.pow, torch.pow),
    "maximum": (F.maximum, torch.maximum),
    "minimum": (F.minimum, torch.minimum),
    "where": (lambda a, b: F.where(a > 2 * b, a, b), lambda a, b: torch.where(a > 2 * b, a, b)),
}


@pytest.mark.parametrize("name", BINARY)
@given(data=st.data(), dtype=DTYPES)
def test_functions_of_two_operands_broadcast(name, data, dtype):
    shapes = data.draw(mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3)).input_shapes
    check(*BINARY[name], [data.draw(arrays(dtype, s, elements=POSITIVE)) for s in shapes], TOLERANCE[dtype])


# ---- reductions -----------------------------------------------------------------------------------------

REDUCING = {
    "sum": (F.sum, torch.sum, [{}]),
    "mean": (F.mean, torch.mean, [{}]),
    "max": (F.max, torch.amax, [{}]),
    "min": (F.min, torch.amin, [{}]),
    "logsumexp": (F.logsumexp, torch.logsumexp, [{}]),
    "var": (F.var, torch.var, [{"correction": 0}, {"correction": 0.5}, {"correction": 1}]),
    "std": (F.std, torch.std, [{"correction": 0}, {"correction": 0.5}, {"correction": 1}]),
}


@pytest.mark.parametrize("name", REDUCING)
@given(data=st.data(), dtype=DTYPES, shape=SHAPES.map(lambda s: (2, *s, 3)), keepdims=st.booleans())
def test_reductions(name, data, dtype, shape, keepdims):
    ours, theirs, options = REDUCING[name]
    extra, n = data.draw(st.sampled_from(options)), len(shape)
    axis = data.draw(st.sampled_from([None, 0, -1, (0, -1), tuple(range(n)), (n - 1, 0)]))
    dim = tuple(range(n)) if axis is None else axis
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    # a few repeated values: PyTorch's amax and amin share the gradient among ties, and so do we
    x = rng.permutation(np.prod(shape)).reshape(shape) % 50 * 0.25 - 3
    check(
        lambda x: ours(x, axis=axis, keepdims=keepdims, **extra),
        lambda x: theirs(x, dim=dim, keepdim=keepdims, **extra),
        [x.astype(dtype)],
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@given(data=st.data(), dtype=DTYPES, shape=SHAPES, shift=st.sampled_from([0, 1, -1]), masked=st.booleans())
def test_softmax_and_log_softmax(name, data, dtype, shape, shift, masked):
    shift *= {"float64": 1000.0, "float32": 100.0}[dtype]  # enough for exp to overflow
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = data.draw(arrays(dtype, shape, elements=MODERATE)) + np.asarray(shift, dtype)
    if masked:
        np.moveaxis(x, axis, 0)[1:2] = -np.inf
    check(lambda x: getattr(F, name)(x, axis), lambda x: getattr(torch, name)(x, axis), [x], TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_of_large_logits_keeps_its_digits(name):
    x = np.array([[0.0, 1.0, 2.5]], np.float32) + np.float32(1e4)
    check(getattr(F, name), lambda x: getattr(torch, name)(x, -1), [x], TOLERANCE["float32"])


# ---- shapes and products --------------------------------------------------------------------------------

SHAPING = {
    "reshape": (lambda x: F.reshape(x, shape=(3, -1)), lambda x: x.reshape(3, -1), [(2, 3, 4)]),
    "flatten": (F.flatten, lambda x: x.flatten(1), [(2, 3, 4)]),
    "transpose": (lambda x: F.transpose(x, axes=(1, -1, 0)), lambda x: x.permute(1, -1, 0), [(2, 3, 4)]),
    "broadcast_to": (lambda x: F.broadcast_to(x, shape=(4, 2, 3)), lambda x: x.expand(4, 2, 3), [(2, 1)]),
    "pad": (lambda x: F.pad(x, width=((1, 2), (0, 3)), value=1.5), lambda x: P.pad(x, (0, 3, 1, 2), value=1.5),
            [(2, 3)]),
    "concatenate": (lambda *x: F.concatenate(x, -1), lambda *x: torch.cat(x, -1), [(2, 3), (2, 0), (2, 1)]),
    "stack": (lambda *x: F.stack(x, 1), lambda *x: torch.stack(x, 1), [(2, 3), (2, 3)]),
    "getitem": (lambda x: x[[0, 2, 0], 1:], lambda x: x[[0, 2, 0], 1:], [(3, 4)]),
    "matmul": (F.matmul, torch.matmul, [(2, 1, 3, 4), (5, 4, 2)]),
    "matmul, vectors": (F.matmul, torch.matmul, [(4,), (5, 4, 2)]),
    "linear": (F.linear, P.linear, [(2, 3, 4), (5, 4), (5,)]),
    "linear, no bias": (F.linear, P.linear, [(2, 4), (5, 4)]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPING)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_shapes_and_products(name, dtype):
    ours, theirs, shapes = SHAPING[name]
    rng = np.random.default_rng(1)
    check(ours, theirs, [rng.normal(size=s).astype(dtype) for s in shapes], TOLERANCE[dtype])


# ---- normalisation --------------------------------------------------------------------------------------

RUNNING = np.linspace(-1.0, 1.0, 4), np.linspace(0.5, 2.0, 4)
NORMS = {  # (x, weight, bias, eps, drawn number), and the shape of the weight for that of x
    "batch_norm": (
        lambda x, w, b, eps, k: F.batch_norm(x, None, None, w, b, training=True, eps=eps),
        lambda x, w, b, eps, k: P.batch_norm(x, None, None, w, b, training=True, eps=eps),
        lambda shape, k: shape[1:2],
    ),
    "batch_norm, by running statistics": (
        lambda x, w, b, eps, k: F.batch_norm(x, *(r.astype(x.dtype) for r in RUNNING), w, b, eps=eps),
        lambda x, w, b, eps, k: P.batch_norm(x, *map(peer, RUNNING), w, b, eps=eps),
        lambda shape, k: shape[1:2],
    ),
    "layer_norm": (
        lambda x, w, b, eps, k: F.layer_norm(x, x.shape[k:], w, b, eps),
        lambda x, w, b, eps, k: P.layer_norm(x, x.shape[k:], w, b, eps),
        lambda shape, k: shape[k:],
    ),
    "rms_norm": (
        lambda x, w, b, eps, k: F.rms_norm(x, x.shape[k:], w, eps),
        lambda x, w, b, eps, k: P.rms_norm(x, x.shape[k:], w, eps),
        lambda shape, k: shape[k:],
    ),
    "group_norm": (
        lambda x, w, b, eps, k: F.group_norm(x, 2 ** (k - 1), w, b, eps),
        lambda x, w, b, eps, k: P.group_norm(x, 2 ** (k - 1), w, b, eps),
        lambda shape, k: shape[1:2],
    ),
    "instance_norm": (
        lambda x, w, b, eps, k: F.instance_norm(x, w, b, eps),
        lambda x, w, b, eps, k: P.instance_norm(x, weight=w, bias=b, eps=eps),
        lambda shape, k: shape[1:2],
    ),
}


@pytest.mark.parametrize("name", NORMS)
@given(
    data=st.data(),
    dtype=DTYPES,
    shape=st.tuples(st.integers(2, 3), st.just(4), st.integers(3, 5), st.integers(1, 3)),
    k=st.integers(1, 3),
    eps=st.sampled_from([1e-5, 1e-2]),
    offset=numbers(-10.0, 10.0),
)
def test_normalisations(name, data, dtype, shape, k, eps, offset):
    ours, theirs, weight_shape = NORMS[name]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x = rng.normal(offset, 2, shape)
    weight = rng.normal(1, 0.5, weight_shape(shape, k)) if data.draw(st.booleans()) else None
    # PyTorch has no bias in rms_norm, and its group_norm cannot be differentiated with a bias but no weight
    biased = name != "rms_norm" and weight is not None and data.draw(st.booleans())
    bias = rng.normal(size=weight.shape) if biased else None
    check(
        lambda x, w, b: ours(x, w, b, eps, k),
        lambda x, w, b: theirs(x, w, b, eps, k),
        [a if a is None else a.astype(dtype) for a in (x, weight, bias)],
        TOLERANCE[dtype],
    )
