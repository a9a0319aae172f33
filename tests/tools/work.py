"""Work that kernels split over threads: for each name a function that gives the bytes of all results."""

import itertools
from functools import partial

import numpy as np
from tinygrad_bn_kernels.cpu import conv, pool, products, threads

from tinygrad_bn import Tensor, functional, optim
from tinygrad_bn.backend import find_kernel

REDUCTIONS = {
    "sum": np.sum,
    "mean": np.mean,
    "var": np.var,
    "mean_and_var": lambda x, **o: np.stack([np.mean(x, **o), np.var(x, **o)]),
    "sum_of_squares": lambda x, **o: np.sum(x * x, **o),
    "max": np.max,
    "min": np.min,
    "argmax": np.argmax,
    "argmin": np.argmin,
    "logsumexp": np.logaddexp.reduce,
}
PLACES = ("argmax", "argmin")
LAYOUTS = [np.ascontiguousarray, np.asfortranarray, lambda x: np.repeat(x, 2, axis=1)[:, ::2]]
MATRICES = [(150, 300, 130), (67, 500, 10), (10, 500, 270), (300, 7, 64), (66, 260, 49), (600, 40, 400)]


def started():
    """Whether this process has worker threads."""
    return threads._pool is not None


def matrices(seed, m, k, n, dtype, layouts=(0, 0)):
    """a (m, k), b (k, n) and a bias (n,), in two of the LAYOUTS."""
    rng = np.random.default_rng(seed)
    a, b, bias = rng.normal(size=(m, k)), rng.normal(size=(k, n)), rng.normal(size=n)
    arrays = [LAYOUTS[layout](x.astype(dtype)) for layout, x in zip(layouts, (a, b), strict=True)]
    return *arrays, bias.astype(dtype)


def batch_norm_operands(shape, seed=0, dtype=np.float32, offset=0.0):
    """x, the gradient of the output, weight and bias."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) + offset).astype(dtype)
    return x, rng.normal(size=shape).astype(dtype), *rng.normal(size=(2, shape[1])).astype(dtype)


def batch_norm_step(x, g, weight, bias, relu=False):
    """Output, mean, variance and the gradients of x, weight and bias; by the kernels unless they are disabled."""
    ts = [Tensor(a, requires_grad=True) for a in (x, weight, bias)]
    y, (mean, var) = (functional.batch_norm_relu if relu else functional.batch_norm_training).run(*ts, eps=1e-5)
    y.backward(g)
    return [np.asarray(a) for a in (y, mean, var, *(t.grad for t in ts))]


def _bytes(arrays):
    return b"".join(np.asarray(a).tobytes() for a in arrays)


def _batch_norm(shape):
    return _bytes(batch_norm_step(*batch_norm_operands(shape)))


def _reductions(shape, axis):
    """In float64 too: rounded to float32, most sums hide the order in which their terms are added."""
    x = np.random.default_rng(0).normal(size=shape)
    names = [name for name in REDUCTIONS if name not in PLACES or axis in (0, 1)]
    each = itertools.product(names, (np.float32, np.float64))
    return _bytes(find_kernel(name, "cpu")(x.astype(dtype), axis=axis) for name, dtype in each)


def _products(dtype):
    each = itertools.product(MATRICES, itertools.product(range(3), range(3)))
    return _bytes(products.product(*matrices(3, *size, dtype, layouts)) for size, layouts in each)


def _convolution():
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.normal(size=s).astype(np.float32) for s in ((33, 4, 12, 13), (10, 2, 3, 2), (10,)))
    options = {"stride": (1, 1), "padding": ((0, 0),) * 2, "dilation": (1, 1), "groups": 2}
    y = conv.conv_with_bias(x, weight, bias, **options)
    window = {"kernel": (2, 2), "out": (5, 6), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}
    pooled = pool.max_pool(y, **window)
    (gy,) = pool.max_pool_vjp(pooled * pooled, pooled, y, needs=[True], **window)
    return _bytes([y, pooled, gy, *conv.conv_with_bias_vjp(gy, y, x, weight, bias, needs=[True] * 3, **options)])


def _adam():
    x = np.random.default_rng(0).normal(size=(60, 25)).astype(np.float32)
    p = Tensor(x, requires_grad=True)
    optimizer = optim.Adam([p], lr=0.1)
    for _ in range(2):
        p.grad = Tensor(np.cos(x))
        optimizer.step()
    return _bytes([p])


def _cross_entropy():
    x = Tensor(np.random.default_rng(0).normal(size=(300, 70)), requires_grad=True, dtype=np.float32)
    loss = functional.cross_entropy(x, np.arange(300) % 70)
    loss.backward()
    return _bytes([loss, x.grad])


WORK = {
    "BatchNorm of rows": partial(_batch_norm, (300, 260)),
    "BatchNorm of images": partial(_batch_norm, (16, 6, 40, 40)),
    "reductions of columns": partial(_reductions, (41, 37), 0),
    "reductions of rows": partial(_reductions, (41, 370), 1),
    "reductions of images": partial(_reductions, (4, 5, 6, 7), (0, 2, 3)),
    "reductions of narrow columns": partial(_reductions, (999, 3), 0),
    "products in float32": partial(_products, np.float32),
    "products in float64": partial(_products, np.float64),
    "convolution and pooling": _convolution,
    "Adam": _adam,
    "cross-entropy": _cross_entropy,
}
