"""The inner loops of products and convolutions. A tile is 4 × 3 vectors of sums, kept in twelve registers.

A step loads seven vectors and does twelve multiplications, which takes a core six cycles.
"""

from numba import config

from tinygrad_bn_kernels.cpu.jit import helper

if not config.DISABLE_JIT:  # type: ignore[attr-defined]
    from tinygrad_bn_kernels.cpu.simd import add, fma, lanes, load, load_splat, no_unroll, splat, store, total

ROWS = 4
VECTORS = 3


@helper()
def four(start, step):
    """Offsets of the four rows of a tile: start, start + step, …"""
    return start, start + step, start + 2 * step, start + 3 * step


@helper()
def _add_to(out, at, x0, x1, x2):
    step = lanes(out)
    store(out, at, add(load(out, at), x0))
    store(out, at + step, add(load(out, at + step), x1))
    store(out, at + 2 * step, add(load(out, at + 2 * step), x2))


@helper()
def add_products(source, offsets, at, weight, first, strides, out, targets):
    """out[targets[i] + j] += Σ_r weight[i, r] · source[offsets[r] + at + j] for a tile: 4 rows i, 3 vectors of j.

    The matrix weight[i, r] starts at `first` in a flat array and has these strides.
    """
    row_stride, column_stride = strides
    step = lanes(source)
    zero = splat(source.dtype.type(0))
    a0, a1, a2 = zero, zero, zero
    b0, b1, b2 = zero, zero, zero
    c0, c1, c2 = zero, zero, zero
    d0, d1, d2 = zero, zero, zero
    for r in range(len(offsets)):
        no_unroll()
        start, w0 = offsets[r] + at, first + r * column_stride
        x0, x1, x2 = load(source, start), load(source, start + step), load(source, start + 2 * step)
        w = load_splat(weight, w0)
        a0, a1, a2 = fma(w, x0, a0), fma(w, x1, a1), fma(w, x2, a2)
        w = load_splat(weight, w0 + row_stride)
        b0, b1, b2 = fma(w, x0, b0), fma(w, x1, b1), fma(w, x2, b2)
        w = load_splat(weight, w0 + 2 * row_stride)
        c0, c1, c2 = fma(w, x0, c0), fma(w, x1, c1), fma(w, x2, c2)
        w = load_splat(weight, w0 + 3 * row_stride)
        d0, d1, d2 = fma(w, x0, d0), fma(w, x1, d1), fma(w, x2, d2)
    _add_to(out, targets[0], a0, a1, a2)
    _add_to(out, targets[1], b0, b1, b2)
    _add_to(out, targets[2], c0, c1, c2)
    _add_to(out, targets[3], d0, d1, d2)


@helper()
def _add_totals(row, r, x0, x1, x2):
    row[r], row[r + 1], row[r + 2] = row[r] + total(x0), row[r + 1] + total(x1), row[r + 2] + total(x2)


@helper()
def add_inner_products(source, base, pitch, offsets, r, other, first, count, length, begin, end, sums):
    """sums[i, j] += Σ_k Σ_t other[k, i, t] · source[base + k · pitch + offsets[j] + t] for a tile of `sums`.

    The rows i are `first` to first + 3, the columns j are r to r + 2; k < count, begin ≤ t < end, a multiple of a
    vector long. `other` is flat, (count, rows, length).
    """
    step, rows = lanes(source), len(sums)
    zero = splat(source.dtype.type(0))
    a0, a1, a2 = zero, zero, zero
    b0, b1, b2 = zero, zero, zero
    c0, c1, c2 = zero, zero, zero
    d0, d1, d2 = zero, zero, zero
    for k in range(count):
        start = base + k * pitch
        s0, s1, s2 = start + offsets[r], start + offsets[r + 1], start + offsets[r + 2]
        ga = (k * rows + first) * length
        gb, gc, gd = ga + length, ga + 2 * length, ga + 3 * length
        for t in range(begin, end, step):
            x0, x1, x2 = load(source, s0 + t), load(source, s1 + t), load(source, s2 + t)
            g = load(other, ga + t)
            a0, a1, a2 = fma(g, x0, a0), fma(g, x1, a1), fma(g, x2, a2)
            g = load(other, gb + t)
            b0, b1, b2 = fma(g, x0, b0), fma(g, x1, b1), fma(g, x2, b2)
            g = load(other, gc + t)
            c0, c1, c2 = fma(g, x0, c0), fma(g, x1, c1), fma(g, x2, c2)
            g = load(other, gd + t)
            d0, d1, d2 = fma(g, x0, d0), fma(g, x1, d1), fma(g, x2, d2)
    _add_totals(sums[first], r, a0, a1, a2)
    _add_totals(sums[first + 1], r, b0, b1, b2)
    _add_totals(sums[first + 2], r, c0, c1, c2)
    _add_totals(sums[first + 3], r, d0, d1, d2)


@helper()
def copy(source, at, target, to, count):
    """target[to : to + count] = source[at : at + count], by vectors; the last may overlap the one before."""
    step = lanes(source)
    if count >= step:
        for i in range(0, count, step):
            j = i if i < count - step else count - step
            store(target, to + j, load(source, at + j))
    else:
        for i in range(count):
            target[to + i] = source[at + i]
