"""The loops of `reduce`, over pieces [start, stop) of rows (M, D) or of columns (A, B, C).

Narrow columns are folded: `fold` rows side by side. Several rows are read at once, so that the partial result of a
column is loaded and stored once for several elements.
"""

import numpy as np
from numba import config

from tinygrad_bn_kernels.cpu.jit import SUMS, inlined, njit
from tinygrad_bn_kernels.cpu.moments import moments

if not config.DISABLE_JIT:  # type: ignore[attr-defined]
    from tinygrad_bn_kernels.cpu.simd import lanes, larger, load, mul, splat, store
else:

    def lanes(array):
        """Longer than the array, so that no vector is used."""
        return array.size + 1


# Rows from this length are summed in four streams: memory delivers them faster than one.
LONG = 1 << 12

# The index of an extreme is searched in the block of this length that has it.
BLOCK = 1 << 9

# ---- sums ------------------------------------------------------------------------------------------------


@inlined(fastmath=SUMS)
def _sum_of_short(row):
    total = 0.0
    for j in range(row.size):
        total += np.float64(row[j])
    return total


@inlined(fastmath=SUMS)
def _sum_of_long(row):
    quarter = row.size // 4
    r0, r1, r2, r3 = row[:quarter], row[quarter:], row[2 * quarter :], row[3 * quarter :]
    total = _sum_of_short(row[4 * quarter :])
    for j in range(quarter):
        total += (np.float64(r0[j]) + np.float64(r1[j])) + (np.float64(r2[j]) + np.float64(r3[j]))
    return total


@njit(fastmath=SUMS)
def row_sums(x, piece, partial, start, stop):
    """Σ x of each piece of a row, into partial (M, pieces)."""
    pieces = partial.shape[1]
    for item in range(start, stop):
        t = item % pieces
        row, total = x[item // pieces, t * piece : (t + 1) * piece], 0.0
        for first in range(0, row.size, 4 * LONG):  # shorter sums round less
            block = row[first : first + 4 * LONG]
            total += _sum_of_long(block) if block.size >= LONG else _sum_of_short(block)
        partial[item // pieces, t] = total


@njit(fastmath=SUMS)
def column_sums(x, rows, columns, fold, partial, start, stop):
    """Σ x of each column of a piece, into partial (A, pieces of B, C)."""
    _, b, c = x.shape
    across = (c + columns - 1) // columns
    flat = x.reshape(-1)
    for item in range(start, stop):
        a, t, first = item // (across * partial.shape[1]), item // across % partial.shape[1], item % across * columns
        width = min(columns, c - first)
        sums = np.zeros(width * fold)
        i, last = t * rows, min((t + 1) * rows, b)
        while i + 4 * fold <= last:
            k = (a * b + i) * c + first
            r0, r1, r2, r3 = flat[k:], flat[k + fold * c :], flat[k + 2 * fold * c :], flat[k + 3 * fold * c :]
            for j in range(sums.size):
                sums[j] += (np.float64(r0[j]) + np.float64(r1[j])) + (np.float64(r2[j]) + np.float64(r3[j]))
            i += 4 * fold
        while i < last:
            r0 = flat[(a * b + i) * c + first :]
            for j in range(width * min(fold, last - i)):
                sums[j] += np.float64(r0[j])
            i += fold
        out = partial[a, t, first:]
        for j in range(width):
            out[j] = sums[j]
        for f in range(1, fold):
            for j in range(width):
                out[j] += sums[f * width + j]


@njit(fastmath=SUMS)
def row_moments(x, piece, b, c, shift, partial, start, stop):
    """Σ (x − shift) and Σ (x − shift)² of each piece of a row, into partial (2, M, pieces).

    The M rows are (A, b, c); the rows along b share a shift. A shift of NaN is set to the row's first element.
    """
    pieces = partial.shape[2]
    for item in range(start, stop):
        m, t = item // pieces, item % pieces
        row, own = x[m, t * piece : (t + 1) * piece], m // (b * c) * c + m % c
        if np.isnan(shift[own]):
            shift[own] = row[0] if np.isfinite(row[0]) else 0.0
        from_ = shift[own]
        s1 = 0.0
        s2 = 0.0
        for j in range(row.size):
            d = np.float64(row[j]) - from_
            s1 += d
            s2 += d * d
        partial[0, m, t], partial[1, m, t] = s1, s2


@njit(fastmath=SUMS)
def make_finite(shift):
    """Replace NaN and infinities by 0."""
    for i in range(shift.size):
        shift[i] = shift[i] if np.isfinite(shift[i]) else 0.0


@njit(fastmath=SUMS)
def settle(sums, n, shift, var):
    """Means, into shift, and variances from sums (2, results); False if a shift was too far from its mean."""
    good = True
    for i in range(shift.size):
        shift[i], var[i], far = moments(shift[i], sums[0, i], sums[1, i], n)
        good = good and not far
    return good


@njit(fastmath=SUMS)
def column_moments(x, rows, columns, fold, shift, partial, start, stop):
    """Σ (x − shift) and Σ (x − shift)² of each column of a piece, into partial (2, A, pieces of B, C)."""
    _, b, c = x.shape
    across = (c + columns - 1) // columns
    flat = x.reshape(-1)
    for item in range(start, stop):
        a, t, first = item // (across * partial.shape[2]), item // across % partial.shape[2], item % across * columns
        width = min(columns, c - first)
        sums = np.zeros((3, width * fold))  # the shift, Σ (x − shift), Σ (x − shift)²
        for j in range(width * fold):
            sums[0, j] = shift[a * c + first + j % width]
        i, last = t * rows, min((t + 1) * rows, b)
        while i + 4 * fold <= last:
            k = (a * b + i) * c + first
            r0, r1, r2, r3 = flat[k:], flat[k + fold * c :], flat[k + 2 * fold * c :], flat[k + 3 * fold * c :]
            for j in range(width * fold):
                d0, d1 = np.float64(r0[j]) - sums[0, j], np.float64(r1[j]) - sums[0, j]
                d2, d3 = np.float64(r2[j]) - sums[0, j], np.float64(r3[j]) - sums[0, j]
                sums[1, j] += (d0 + d1) + (d2 + d3)
                sums[2, j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
            i += 4 * fold
        while i < last:
            r0 = flat[(a * b + i) * c + first :]
            for j in range(width * min(fold, last - i)):
                d = np.float64(r0[j]) - sums[0, j]
                sums[1, j] += d
                sums[2, j] += d * d
            i += fold
        for s in range(2):
            out = partial[s, a, t, first:]
            for j in range(width):
                total = 0.0
                for f in range(fold):
                    total += sums[1 + s, f * width + j]
                out[j] = total


@njit()
def _take_larger(flat, k, step, count, sign, held):
    """held = max(held, sign · row) for `count` rows that begin at k, k + step, …"""
    whole = held.size // lanes(held) * lanes(held)
    if whole:
        s = splat(sign)
        for j in range(0, whole, lanes(held)):
            best = load(held, j)
            for i in range(count):
                best = larger(best, mul(s, load(flat, k + i * step + j)))
            store(held, j, best)
    for j in range(whole, held.size):
        for i in range(count):
            v = sign * flat[k + i * step + j]
            held[j] = v if (v > held[j]) | (v != v) else held[j]


@njit()
def column_extremes(x, rows, columns, fold, sign, partial, start, stop):
    """The largest of sign · x of each column of a piece, times sign, into partial (A, pieces of B, C)."""
    _, b, c = x.shape
    across = (c + columns - 1) // columns
    flat = x.reshape(-1)
    for item in range(start, stop):
        a, t, first = item // (across * partial.shape[1]), item // across % partial.shape[1], item % across * columns
        width = min(columns, c - first)
        held = np.empty(width * fold, x.dtype)
        i, last = t * rows, min((t + 1) * rows, b)
        for j in range(width * fold):
            held[j] = sign * flat[(a * b + i) * c + first + j % width]
        while i + fold <= last:
            count = min(8, (last - i) // fold)
            _take_larger(flat, (a * b + i) * c + first, fold * c, count, sign, held)
            i += count * fold
        _take_larger(flat, (a * b + i) * c + first, 0, int(i < last), sign, held[: width * (last - i)])
        for j in range(width):
            best = held[j]
            for f in range(1, fold):
                v = held[f * width + j]
                best = v if (v > best) | (v != v) else best
            partial[a, t, first + j] = sign * best


@njit()
def column_indices(x, rows, columns, fold, sign, partial, indices, start, stop):
    """The largest of sign · x in each column of a piece, into partial, and its first index along B, into indices."""
    _, b, c = x.shape
    across = (c + columns - 1) // columns
    for item in range(start, stop):
        a, t, first = item // (across * partial.shape[1]), item // across % partial.shape[1], item % across * columns
        best, index = partial[a, t, first : first + columns], indices[a, t, first : first + columns]
        for j in range(best.size):
            best[j] = sign * x[a, t * rows, first + j]
            index[j] = t * rows
        for i in range(t * rows + 1, min((t + 1) * rows, b)):
            row = x[a, i, first:]
            for j in range(best.size):
                v, held = sign * row[j], best[j]
                wins = v > held or (v != v and held == held)
                best[j] = v if wins else held
                index[j] = i if wins else index[j]


@njit()
def _extreme(row, sign, start, stop, buffer):
    """The largest of sign · row[start:stop], which is not empty; `buffer` is as long as a vector."""
    step = lanes(row)
    best, first = sign * row[start], start + (stop - start) // (4 * step) * 4 * step
    if first > start:
        s = splat(sign)
        a, b = mul(s, load(row, start)), mul(s, load(row, start + step))
        c, d = mul(s, load(row, start + 2 * step)), mul(s, load(row, start + 3 * step))
        for i in range(start + 4 * step, first, 4 * step):
            a, b = larger(a, mul(s, load(row, i))), larger(b, mul(s, load(row, i + step)))
            c, d = larger(c, mul(s, load(row, i + 2 * step))), larger(d, mul(s, load(row, i + 3 * step)))
        store(buffer, 0, larger(larger(a, b), larger(c, d)))
        for v in buffer:
            best = v if (v > best) | (v != v) else best
    for i in range(first, stop):
        v = sign * row[i]
        best = v if (v > best) | (v != v) else best
    return best


@njit()
def row_extremes(x, sign, out, start, stop):
    """The largest of sign · x of each row of x (M, D), times sign."""
    buffer = np.empty(lanes(x), x.dtype)
    for m in range(start, stop):
        out[m] = sign * _extreme(x[m], sign, 0, x.shape[1], buffer)


@njit()
def row_indices(x, sign, out, start, stop):
    """The first index of the largest of sign · x in each row of x (M, D). Only the block that has it is searched."""
    buffer = np.empty(lanes(x), x.dtype)
    for m in range(start, stop):
        row = x[m]
        best, index = _extreme(row, sign, 0, min(BLOCK, row.size), buffer), 0
        for first in range(BLOCK, row.size, BLOCK):
            v = _extreme(row, sign, first, min(first + BLOCK, row.size), buffer)
            if v > best or (v != v and best == best):
                best, index = v, first
        while sign * row[index] != best and row[index] == row[index]:
            index += 1
        out[m] = index
