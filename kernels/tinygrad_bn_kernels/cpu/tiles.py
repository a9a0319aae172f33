"""The inner loops of products and convolutions. A tile is ROWS × VECTORS vectors of sums, which stay in registers.

With 16 registers it is 4 × 3: a step loads seven vectors and does twelve multiplications, which takes six cycles. With
the 32 of AVX-512 it is 8 × 2: ten loads and sixteen multiplications in eight cycles. In float32 it is then 32 numbers
wide, which divides the sizes of most layers.
"""

# Only Numba knows the types of intrinsics.
# mypy: disable-error-code="no-untyped-def"

from llvmlite import ir
from numba import types
from numba.core import cgutils

from tinygrad_bn_kernels.cpu.jit import helper
from tinygrad_bn_kernels.cpu.simd import (
    BITS,
    Vector,
    address,
    broadcast,
    call_llvm,
    intrinsic,
    lanes,
    load,
    load_from,
    no_unroll,
    store,
    store_to,
)

ROWS, VECTORS = (8, 2) if BITS == 512 else (4, 3)
INDEX = types.intp


def _moved(builder, start, count, step):
    """start + count · step, where `count`, and maybe `step`, is a constant."""
    if isinstance(step, int):
        return builder.add(start, ir.Constant(start.type, count * step))
    return builder.add(start, builder.mul(step, ir.Constant(step.type, count)))


def _multiplied(builder, tile, sums, rows, columns):
    """sums[i, j] + rows[i] · columns[j], rounded once in each lane."""
    for i, a in enumerate(rows):
        for j, b in enumerate(columns):
            k = i * VECTORS + j
            total = call_llvm(builder, "llvm.fma", tile.dtype, a.type, [a, b, builder.extract_value(sums, k)])
            sums = builder.insert_value(sums, total, k)
    return sums


@intrinsic
def _zeros(typingctx, array):
    """A tile of zeros of the array's dtype: a tuple of vectors."""
    tile = types.UniTuple(Vector(array.dtype), ROWS * VECTORS)

    def codegen(context, builder, signature, args):
        return cgutils.get_null_value(context.get_value_type(tile))

    return tile(array), codegen


@intrinsic
def _add_outer(typingctx, tile, numbers, first, stride, source, start):
    """tile[i, j] + numbers[first + i · stride] · source[start + j], for vectors j."""

    def codegen(context, builder, signature, args):
        sums, array, first, stride, flat, start = args
        vector = tile.dtype
        rows, columns = [], []
        for j in range(VECTORS):
            at = address(context, builder, source, flat, _moved(builder, start, j, vector.lanes))
            columns.append(load_from(context, builder, vector, at))
        for i in range(ROWS):
            at = address(context, builder, numbers, array, _moved(builder, first, i, stride))
            rows.append(broadcast(context, builder, vector, builder.load(at)))
        return _multiplied(builder, tile, sums, rows, columns)

    return tile(tile, numbers, INDEX, INDEX, source, INDEX), codegen


@intrinsic
def _add_inner(typingctx, tile, other, first, stride, source, offsets, r, start):
    """tile[i, j] + other[first + i · stride] · source[offsets[r + j] + start], each a vector, lane by lane."""

    def codegen(context, builder, signature, args):
        sums, left, first, stride, right, places, r, start = args
        vector = tile.dtype
        rows, columns = [], []
        for j in range(VECTORS):
            offset = builder.load(address(context, builder, offsets, places, _moved(builder, r, j, 1)))
            at = address(context, builder, source, right, builder.add(offset, start))
            columns.append(load_from(context, builder, vector, at))
        for i in range(ROWS):
            at = address(context, builder, other, left, _moved(builder, first, i, stride))
            rows.append(load_from(context, builder, vector, at))
        return _multiplied(builder, tile, sums, rows, columns)

    return tile(tile, other, INDEX, INDEX, source, offsets, INDEX, INDEX), codegen


@intrinsic
def _add_rows(typingctx, out, targets, row, to, tile):
    """out[targets[row + i] + to + j] += tile[i, j], for vectors j."""

    def codegen(context, builder, signature, args):
        flat, places, row, to, sums = args
        vector = tile.dtype
        for i in range(ROWS):
            target = builder.load(address(context, builder, targets, places, _moved(builder, row, i, 1)))
            for j in range(VECTORS):
                index = _moved(builder, builder.add(target, to), j, vector.lanes)
                at = address(context, builder, out, flat, index)
                total = builder.fadd(
                    load_from(context, builder, vector, at), builder.extract_value(sums, i * VECTORS + j)
                )
                store_to(context, builder, vector, total, at)
        return context.get_dummy_value()

    return types.void(out, targets, INDEX, INDEX, tile), codegen


@intrinsic
def _add_totals(typingctx, out, to, stride, tile):
    """out[to + i · stride + j] += the sum of the lanes of tile[i, j], added pairwise."""

    def codegen(context, builder, signature, args):
        flat, to, stride, sums = args
        scalar = context.get_value_type(tile.dtype.dtype)
        for i in range(ROWS):
            for j in range(VECTORS):
                at = address(context, builder, out, flat, _moved(builder, _moved(builder, to, i, stride), j, 1))
                terms = [ir.Constant(scalar, -0.0), builder.extract_value(sums, i * VECTORS + j)]
                name = "llvm.vector.reduce.fadd"
                total = call_llvm(builder, name, tile.dtype, scalar, terms, fastmath=("reassoc",))
                builder.store(builder.fadd(builder.load(at), total), at)
        return context.get_dummy_value()

    return types.void(out, INDEX, INDEX, tile), codegen


@helper()
def add_products(source, offsets, at, weight, first, strides, out, targets, row, to):
    """out[targets[row + i] + to + j] += Σ_r weight[i, r] · source[offsets[r] + at + j] for the i and j of a tile.

    The matrix weight[i, r] starts at `first` in a flat array and has these strides.
    """
    row_stride, column_stride = strides
    sums = _zeros(source)
    for r in range(len(offsets)):
        no_unroll()
        sums = _add_outer(sums, weight, first + r * column_stride, row_stride, source, offsets[r] + at)
    _add_rows(out, targets, row, to, sums)


@helper()
def add_inner_products(source, base, pitch, offsets, r, other, first, step, length, count, begin, end, out, to, stride):
    """out[to + i · stride + j] += Σ_k Σ_t a[k, i, t] · b[k, j, t] for ROWS i and VECTORS j.

    a[k, i, t] = other[first + k · step + i · length + t], b[k, j, t] = source[base + k · pitch + offsets[r + j] + t];
    k < count, begin ≤ t < end, a multiple of a vector long.
    """
    sums = _zeros(source)
    for k in range(count):
        for t in range(begin, end, lanes(source)):
            sums = _add_inner(sums, other, first + k * step + t, length, source, offsets, r, base + k * pitch + t)
    _add_totals(out, to, stride, sums)


@helper()
def copy(source, at, target, to, count):
    """target[to : to + count] = source[at : at + count], by vectors; the last may overlap the one before."""
    step = lanes(source)
    if count >= step:
        for i in range(0, count, step):
            j = min(i, count - step)
            store(target, to + j, load(source, at + j))
    else:
        for i in range(count):
            target[to + i] = source[at + i]
