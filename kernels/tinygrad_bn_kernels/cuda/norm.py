"""BatchNorm over (N, C, S): statistics, output and gradients, in three launches each way.

The first two launches sum over the parts of each channel and combine the parts: see `norm_sums`. The third is an
elementwise pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn_kernels import kernel
from tinygrad_bn_kernels.cuda import maps
from tinygrad_bn_kernels.cuda.array import DeviceArray, vectorizable
from tinygrad_bn_kernels.cuda.launch import PROGRAMS, blocks, driver, launch, program, u4
from tinygrad_bn_kernels.cuda.norm_sums import FINISH, GRADIENTS, GROUPS, LANES, relu_gradient
from tinygrad_bn_kernels.cuda.scalars import SAME
from tinygrad_bn_kernels.cuda.shim import cuda, device, load4, store4, uint32
from tinygrad_bn_kernels.cuda.strides import row_block
from tinygrad_bn_kernels.cuda.warps import THREADS, WARPS, block_reduce, plus

Scalar = Callable[..., None]

# Elements of a part: few enough for the second read to come from the cache, enough for a block of threads.
PLANE_PART = 8192
ROW_PART = 128


# ---- elementwise passes ----------------------------------------------------------------------------------
# `planes` (S > 1): each row of S elements is in one channel. `rows` (S = 1): each column is a channel.


def _output_of(word: str, relu: bool) -> Callable[[Any], Any]:
    """A device function that computes ((x − m) − low) · a + b for one row of planes, or one column of rows."""

    def build(T: Any) -> Any:
        positive = device(SAME["relu" if relu else "identity"](T))

        def planes(x, y, row, size, m, low, a, b):
            s = uint32(cuda.threadIdx.x)
            while s < size:
                i = uint32(row * size + s)
                y[i] = positive(((x[i] - m) - low) * a + b)
                s = uint32(s + cuda.blockDim.x)

        def planes4(x, y, row, size, m, low, a, b):
            s = uint32(cuda.threadIdx.x)
            while s < size:
                i = uint32((row * size + s) << uint32(2))
                x0, x1, x2, x3 = load4(x, i)
                v0, v1 = positive(((x0 - m) - low) * a + b), positive(((x1 - m) - low) * a + b)
                v2, v3 = positive(((x2 - m) - low) * a + b), positive(((x3 - m) - low) * a + b)
                store4(y, i, (v0, v1, v2, v3))
                s = uint32(s + cuda.blockDim.x)

        def rows(x, y, count, channels, c, m, low, a, b):
            row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
            while row < count:
                i = uint32(row * channels + c)
                y[i] = positive(((x[i] - m) - low) * a + b)
                row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

        named: dict[str, Scalar] = {"rows": rows, "planes": planes, "planes4": planes4}
        return device(named[word])

    return build


def _normalize(word: str, relu: bool) -> Callable[[Any], Scalar]:
    """The output, from the constants m, low and a of each channel that `FINISH` computed."""

    def build(T: Any) -> Scalar:
        output = _output_of(word, relu)(T)

        def planes(x, constants, bias, y, rows, channels, size):
            row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
            while row < rows:
                c = uint32(row % channels)
                m, low = constants[c], constants[uint32(c + channels)]
                output(x, y, row, size, m, low, constants[uint32(c + channels + channels)], bias[c])
                row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

        def rows(x, constants, bias, y, rows, channels, size):
            c = uint32(cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x)
            if c < channels:
                m, low = constants[c], constants[uint32(c + channels)]
                output(x, y, rows, channels, c, m, low, constants[uint32(c + channels + channels)], bias[c])

        return rows if word == "rows" else planes

    return build


def _infer(word: str) -> Callable[[Any], Scalar]:
    """The output, from a given mean and variance."""

    def build(T: Any) -> Scalar:
        output = _output_of(word, False)(T)

        def planes(x, mean, var, weight, bias, y, rows, channels, size, eps):
            row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
            while row < rows:
                c = uint32(row % channels)
                output(x, y, row, size, mean[c], T(0), weight[c] / math.sqrt(var[c] + eps), bias[c])
                row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

        def rows(x, mean, var, weight, bias, y, rows, channels, size, eps):
            c = uint32(cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x)
            if c < channels:
                output(x, y, rows, channels, c, mean[c], T(0), weight[c] / math.sqrt(var[c] + eps), bias[c])

        return rows if word == "rows" else planes

    return build


def _gradient(word: str, relu: bool) -> Callable[[Any], Scalar]:
    """The gradient with respect to x, from the constants of each channel that `GRADIENTS` computed."""

    def build(T: Any) -> Scalar:
        passed = relu_gradient(relu)(T)

        def planes(g, y, x, mean, constants, gx, rows, channels, size):
            row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
            while row < rows:
                c = uint32(row % channels)
                m, low, a = mean[c], constants[c], constants[uint32(c + channels)]
                shift = constants[uint32(c + uint32(2) * channels)]
                slope = constants[uint32(c + uint32(3) * channels)]
                s = uint32(cuda.threadIdx.x)
                while s < size:
                    i = uint32(row * size + s)
                    gi = passed(g[i], y[i]) if relu else g[i]
                    gx[i] = a * (gi - shift - ((x[i] - m) - low) * slope)
                    s = uint32(s + cuda.blockDim.x)
                row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

        def planes4(g, y, x, mean, constants, gx, rows, channels, size):
            row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
            while row < rows:
                c = uint32(row % channels)
                m, low, a = mean[c], constants[c], constants[uint32(c + channels)]
                shift = constants[uint32(c + uint32(2) * channels)]
                slope = constants[uint32(c + uint32(3) * channels)]
                s = uint32(cuda.threadIdx.x)
                while s < size:
                    i = uint32((row * size + s) << uint32(2))
                    g0, g1, g2, g3 = load4(g, i)
                    if relu:
                        y0, y1, y2, y3 = load4(y, i)
                        g0, g1, g2, g3 = passed(g0, y0), passed(g1, y1), passed(g2, y2), passed(g3, y3)
                    x0, x1, x2, x3 = load4(x, i)
                    g0, g1 = a * (g0 - shift - ((x0 - m) - low) * slope), a * (g1 - shift - ((x1 - m) - low) * slope)
                    g2, g3 = a * (g2 - shift - ((x2 - m) - low) * slope), a * (g3 - shift - ((x3 - m) - low) * slope)
                    store4(gx, i, (g0, g1, g2, g3))
                    s = uint32(s + cuda.blockDim.x)
                row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

        def rows(g, y, x, mean, constants, gx, rows, channels, size):
            c = uint32(cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x)
            if c < channels:
                m, low, a = mean[c], constants[c], constants[uint32(c + channels)]
                shift = constants[uint32(c + uint32(2) * channels)]
                slope = constants[uint32(c + uint32(3) * channels)]
                row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
                while row < rows:
                    i = uint32(row * channels + c)
                    gi = passed(g[i], y[i]) if relu else g[i]
                    gx[i] = a * (gi - shift - ((x[i] - m) - low) * slope)
                    row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)

        return {"rows": rows, "planes": planes, "planes4": planes4}[word]

    return build


for _word in ("rows", "planes", "planes4"):
    program(
        f"batch_norm.infer_{_word}", "f4* f4* f4* f4* f4* f4* u4 u4 u4 f4", block=(LANES, GROUPS),
        vector=_word == "planes4",
    )(_infer(_word))  # fmt: skip
    for _relu in (False, True):
        _end, _wide = f"{_word}{'_relu' * _relu}", _word == "planes4"
        program(f"batch_norm.normalize_{_end}", "f4* f4* f4* f4* u4 u4 u4", block=(LANES, GROUPS), vector=_wide)(
            _normalize(_word, _relu)
        )
        program(
            f"batch_norm.gradient_{_end}", "f4* f4* f4* f4* f4* f4* u4 u4 u4", block=(LANES, GROUPS), vector=_wide,
            registers=64 if _wide else 40,
        )(_gradient(_word, _relu))  # fmt: skip


@program("batch_norm.running", "f4* f4* f4* f4* f4* f4* u4 f4 f4", block=THREADS, shared=4 * WARPS, shuffles=8)
def RUNNING(T: Any) -> Scalar:
    """The new running statistics, or the old ones if any new one is not finite."""
    total = block_reduce(plus, reuse=False)

    def running(old_mean, old_var, mean, var, new_mean, new_var, channels, momentum, unbias):
        shared = cuda.shared.array(WARPS, T)
        thread = uint32(cuda.threadIdx.x)
        wrong = T(0)
        c = thread
        while c < channels:
            m = (T(1) - momentum) * old_mean[c] + momentum * mean[c]
            v = (T(1) - momentum) * old_var[c] + momentum * (var[c] * unbias)
            if not (m - m == T(0) and v - v == T(0)):
                wrong = T(1)
            c = uint32(c + uint32(THREADS))
        good = total(wrong, shared) == T(0)
        c = thread
        while c < channels:
            m = (T(1) - momentum) * old_mean[c] + momentum * mean[c]
            v = (T(1) - momentum) * old_var[c] + momentum * (var[c] * unbias)
            new_mean[c] = m if good else old_mean[c]
            new_var[c] = v if good else old_var[c]
            c = uint32(c + uint32(THREADS))

    return running


# ---- running them ----------------------------------------------------------------------------------------


def _split(length: int, least: int, concurrent: int) -> tuple[int, int]:
    """Number and length of the parts of `length` elements, while `concurrent` such tasks run."""
    count = max(-(-length // (8 * least)), min(-(-length // least), 4 * driver().processors // max(concurrent, 1)), 1)
    part = -(-length // count)
    return -(-length // part), part


class _Sizes:
    """The programs for x (N, C, ...), and their size arguments."""

    def __init__(self, x: DeviceArray, *others: DeviceArray) -> None:
        self.channels = x.shape[1]
        self.count = x.size // self.channels  # elements of a channel
        self.size = self.count // x.shape[0]
        self.rows = self.size == 1
        if self.rows:
            tiles = -(-self.channels // LANES)
            self.word, self.parts, part = "row", *_split(self.count, ROW_PART, tiles)
            self.part, self.work = part, self.parts * tiles
            self.numbers = u4(self.work, self.channels, self.count, part, tiles)
        else:
            by_four = self.size % 4 == 0 and vectorizable(x, *others)
            self.word, self.unit = ("plane4", 4) if by_four else ("plane", 1)
            size, count = self.size // self.unit, self.count // self.unit
            self.parts, part = _split(count, PLANE_PART // 8 // self.unit, self.channels)
            self.part, self.work = part * self.unit, self.parts * self.channels
            steps = THREADS // size, THREADS % size
            self.numbers = u4(self.work, self.channels, size, count, part, *steps)

    def sums(self, name: str, relu: bool, *args: Any) -> None:
        """Launch the program that sums over parts."""
        which = PROGRAMS[f"batch_norm.{self.word}_{name}{'_relu' * relu}"]
        launch(which, blocks(self.work, 1), *args, *self.numbers)

    def apply(self, name: str, relu: bool, *args: Any, numbers: Any = ()) -> None:
        """Launch an elementwise pass; `numbers` are its last arguments."""
        word = self.word.replace("plane", "planes").replace("row", "rows")
        which = PROGRAMS[f"batch_norm.{name}_{word}{'_relu' * relu}"]
        if self.rows:
            block, size, rows = row_block(self.channels), 1, self.count
            grid: tuple[int, ...] = blocks(rows, 4 * block[1]), -(-self.channels // block[0])
        else:
            size, rows = self.size // self.unit, self.count // self.size * self.channels
            block = row_block(size, rows)
            grid = (blocks(rows, block[1]),)
        launch(which, grid, *args, *u4(rows, self.channels, size), *numbers, block=block)


def _check_channels(x: DeviceArray, *vectors: DeviceArray | None) -> None:
    """Raise ValueError unless each vector is (C,) or None: the programs would read out of bounds."""
    given = [v for v in vectors if v is not None]
    maps.check(x, *given)
    for v in given:
        if v.shape != x.shape[1:2]:
            raise ValueError(f"x {x.shape} needs vectors of shape {x.shape[1:2]}; got {v.shape}")


def _weight(weight: DeviceArray | None, x: DeviceArray) -> DeviceArray:
    return maps.vector_or(1, weight, x.shape[1], x.dtype)


def _bias(bias: DeviceArray | None, x: DeviceArray) -> DeviceArray:
    return maps.vector_or(0, bias, x.shape[1], x.dtype)


def _forward(x: DeviceArray, weight: DeviceArray | None, bias: DeviceArray | None, eps: float, relu: bool) -> Any:
    _check_channels(x, weight, bias)
    if 0 < x.size == x.shape[1]:
        return NotImplemented  # one value per channel is an error of the composition
    y, mean, var = DeviceArray(x.shape, x.dtype), *(DeviceArray(x.shape[1:2], x.dtype) for _ in range(2))
    if not x.size:
        return y, maps.fill(mean, np.nan), maps.fill(var, np.nan)
    to = _Sizes(x)
    moments, constants = DeviceArray((to.parts, 3, to.channels), x.dtype), DeviceArray((3, to.channels), x.dtype)
    to.sums("moments", False, x, moments)
    numbers = *u4(to.channels, to.parts, to.count, to.part), x.number(eps)
    launch(FINISH, -(-to.channels // 256), moments, _weight(weight, x), mean, var, constants, *numbers)
    to.apply("normalize", relu, x, constants, _bias(bias, x), y)
    return y, mean, var


def _backward(
    g: DeviceArray, y: DeviceArray, x: DeviceArray, weight: DeviceArray | None, needs: list[bool], eps: float,
    mean: DeviceArray, var: DeviceArray, relu: bool,
) -> Any:  # fmt: skip
    gx = DeviceArray(x.shape, x.dtype) if needs[0] else None
    gweight, gbias = (DeviceArray(x.shape[1:2], x.dtype) for _ in range(2))
    if x.size:
        to = _Sizes(x, g, y)
        sums, constants = DeviceArray((to.parts, 3, to.channels), x.dtype), DeviceArray((4, to.channels), x.dtype)
        to.sums("sums", relu, g, y, x, mean, sums)
        arrays = sums, mean, var, _weight(weight, x), gweight, gbias, constants
        launch(GRADIENTS, -(-to.channels // 256), *arrays, *u4(to.channels, to.parts, to.count), x.number(eps))
        if gx is not None:
            to.apply("gradient", relu, g, y, x, mean, constants, gx)
    else:
        maps.fill(gweight, 0)
        maps.fill(gbias, 0)
    return gx, gweight if needs[1] else None, gbias if needs[2] else None


@kernel("batch_norm_training", "cuda")
def batch_norm_training(x: DeviceArray, weight: DeviceArray | None, bias: DeviceArray | None, *, eps: float) -> Any:
    """x (N, C, ...), weight and bias (C,) or None: the output, and mean and biased variance (C,) in x's dtype."""
    return _forward(x, weight, bias, eps, False)


@kernel("batch_norm_relu", "cuda")
def batch_norm_relu(x: DeviceArray, weight: DeviceArray | None, bias: DeviceArray | None, *, eps: float) -> Any:
    """`batch_norm_training`, followed by ReLU."""
    return _forward(x, weight, bias, eps, True)


@kernel("batch_norm_inference", "cuda")
def batch_norm_inference(
    x: DeviceArray, mean: DeviceArray, var: DeviceArray, weight: DeviceArray | None, bias: DeviceArray | None, *,
    eps: float,
) -> DeviceArray:  # fmt: skip
    """x (N, C, ...) normalised by the given mean and variance (C,); weight and bias are (C,) or None."""
    _check_channels(x, mean, var, weight, bias)
    y = DeviceArray(x.shape, x.dtype)
    if x.size:
        mean, var = (v.astype(x.dtype, copy=False) for v in (mean, var))
        vectors = mean, var, _weight(weight, x), _bias(bias, x)
        _Sizes(x).apply("infer", False, x, *vectors, y, numbers=[x.number(eps)])
    return y


@kernel("batch_norm_training.vjp", "cuda")
def batch_norm_training_vjp(
    g: DeviceArray, y: DeviceArray, x: DeviceArray, weight: DeviceArray | None, bias: DeviceArray | None, *,
    needs: list[bool], eps: float, mean: DeviceArray, var: DeviceArray,
) -> Any:  # fmt: skip
    """Gradients with respect to x, weight and bias, from the saved statistics; None where `needs` is false."""
    return _backward(g, y, x, weight, needs, eps, mean, var, False)


@kernel("batch_norm_relu.vjp", "cuda")
def batch_norm_relu_vjp(
    g: DeviceArray, y: DeviceArray, x: DeviceArray, weight: DeviceArray | None, bias: DeviceArray | None, *,
    needs: list[bool], eps: float, mean: DeviceArray, var: DeviceArray,
) -> Any:  # fmt: skip
    """The same with ReLU, which passes the gradient where the output is positive."""
    return _backward(g, y, x, weight, needs, eps, mean, var, True)


@kernel("running_statistics", "cuda")
def running_statistics(
    running_mean: DeviceArray, running_var: DeviceArray, tracked: DeviceArray, mean: DeviceArray, var: DeviceArray, *,
    momentum: float, unbias: float,
) -> tuple[DeviceArray, DeviceArray, DeviceArray, bool]:  # fmt: skip
    """(1 − momentum) · running + momentum · batch, of mean and unbias · variance (C,); the old ones if not finite.

    The third result is tracked + 1. The last, whether all numbers are finite, is always True: reading it from the
    device would wait.
    """
    if not running_mean.shape == running_var.shape == mean.shape == var.shape:
        raise ValueError(
            f"running statistics {running_mean.shape}, {running_var.shape} do not match batch statistics {mean.shape}"
        )
    dtype = running_mean.dtype
    new_mean, new_var = (DeviceArray(running_mean.shape, dtype) for _ in range(2))
    arrays = [a.astype(dtype, copy=False) for a in (running_mean, running_var, mean, var)]
    numbers = *u4(mean.size), running_mean.number(momentum), running_mean.number(unbias)
    launch(RUNNING, 1, *arrays, new_mean, new_var, *numbers)
    return new_mean, new_var, maps.add(tracked, 1), True
