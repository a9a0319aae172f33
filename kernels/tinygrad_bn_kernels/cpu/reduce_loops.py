"""The loops of `reduce`, over pieces [start, stop) of rows (M, D) or of columns (A, B, C).

Narrow columns are folded: `fold` rows side by side. Several rows are read at once, so that the partial result of a
column is loaded and stored once for several elements.
"""

import numpy as np
from numba import config

from tinygrad_bn_kernels.cpu.jit import SUMS, inlined, njit
from tinygrad_bn_kernels.cpu.moments import is_finite, moments
from tinygrad_bn_kernels.cpu.reduce import SHORT

if not config.DISABLE_JIT:  # type: ignore[attr-defined]
    from tinygrad_bn_kernels.cpu.simd import evens, lanes, larger, load, mul, odds, splat, store
else:

    def lanes(array):
        """Longer than the array, so that no vector is used."""
        return array.size + 1


# Rows from this length are summed in four streams: memory delivers them faster than one.
LONG = 1 << 12

# The index of an extreme is searched in the block of this length that has it.
BLOCK = 1 << 9

# ---- sums ------------------------------------------------------------------------------------------------

EXACT = SUMS - {"arcp"}  # a quotient is not a product with the reciprocal


@inlined(fastmath=EXACT)
def _sum_of_short(row):
    total = 0.0
    for j in range(row.size):
        total += np.float64(row[j])
    return total


@inlined(fastmath=EXACT)
def _sum_of_long(row):
    quarter = row.size // 4
    r0, r1, r2, r3 = row[:quarter], row[quarter:], row[2 * quarter :], row[3 * quarter :]
    total = _sum_of_short(row[4 * quarter :])
    for j in range(quarter):
        total += (np.float64(r0[j]) + np.float64(r1[j])) + (np.float64(r2[j]) + np.float64(r3[j]))
    return total


@inlined()
def _rows_of(item, results, pieces, piece, b, c, d):
    """Of a piece: its result and number, its first row, their number, and its first and last element in a row.

    One piece is all rows of a result; several are a part of a row each, in the order of memory.
    """
    result, t = (item % results, item // results) if pieces > 1 else (item, 0)
    row, count, start, stop = 0, b, 0, d
    if pieces > 1:
        parts = (d + piece - 1) // piece
        row, count, start, stop = t // parts, 1, t % parts * piece, min((t % parts + 1) * piece, d)
    m = (result // c * b + row) * c + result % c if b > 1 else result
    return result, t, m, count, start, stop


@inlined()
def _place(item, pieces, across):
    """(a, t, i) of a piece of columns: a of A, and its number t along B and i along C."""
    above, i = (item // across, item % across) if across > 1 else (item, 0)
    return (above // pieces, above % pieces, i) if pieces > 1 else (above, 0, i)


@njit(fastmath=EXACT)
def row_sums(x, piece, b, c, n, partial, start, stop):
    """Σ x / n of each piece of rows, into partial (results, pieces). The M rows are (A, b, c); b is reduced too."""
    d = x.shape[1]
    for item in range(start, stop):
        result, t, m, count, first, last = _rows_of(item, partial.shape[0], partial.shape[1], piece, b, c, d)
        total = 0.0
        for i in range(m, m + count * c, c):
            if d < LONG and d <= piece:
                for j in range(d):
                    total += np.float64(x[i, j])
            else:
                for k in range(first, last, 4 * LONG):  # shorter sums round less
                    total += _sum_of_long(x[i, k : min(k + 4 * LONG, last)])
        partial[result, t] = total / n


@njit(fastmath=EXACT)
def column_sums(x, rows, columns, fold, n, partial, start, stop):
    """Σ x / n of each column of a piece, into partial (A, pieces of B, C)."""
    _, b, c = x.shape
    flat, space = x.reshape(-1), np.empty(columns * fold)
    for item in range(start, stop):
        a, t, i = _place(item, partial.shape[1], (c + columns - 1) // columns)
        first, width = i * columns, min(columns, c - i * columns)
        sums = space[: width * fold]
        i, last = t * rows, min((t + 1) * rows, b)
        r0, filled = flat[(a * b + i) * c + first :], width * min(fold, last - i)
        for j in range(sums.size):
            sums[j] = np.float64(r0[j]) if j < filled else 0.0
        i += fold
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
        for f in range(1, fold):
            for j in range(width):
                sums[j] += sums[f * width + j]
        if n != 1:
            for j in range(width):
                sums[j] /= n
        out = partial[a, t, first:]
        for j in range(width):
            out[j] = sums[j]


@njit(fastmath=SUMS)
def row_moments(x, piece, b, c, shift, partial, start, stop):
    """Σ (x − shift) and Σ (x − shift)² of each piece of rows, into partial (2, results, pieces): see `row_sums`.

    A shift of NaN is set to the first element.
    """
    d = x.shape[1]
    for item in range(start, stop):
        result, t, m, count, first, last = _rows_of(item, partial.shape[1], partial.shape[2], piece, b, c, d)
        if np.isnan(shift[result]):
            shift[result] = x[m, first] if is_finite(x[m, first]) else 0.0
        from_ = shift[result]
        s1 = 0.0
        s2 = 0.0
        for i in range(m, m + count * c, c):
            row = x[i, first:last]
            r1 = 0.0
            r2 = 0.0
            for j in range(row.size):
                e = np.float64(row[j]) - from_
                r1 += e
                r2 += e * e
            s1 += r1
            s2 += r2
        partial[0, result, t], partial[1, result, t] = s1, s2


@njit(fastmath=SUMS)
def make_finite(shift):
    """Replace NaN and infinities by 0."""
    for i in range(shift.size):
        shift[i] = shift[i] if is_finite(shift[i]) else 0.0


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
    flat, size = x.reshape(-1), columns * fold
    shifts, firsts, squares = np.empty(size), np.empty(size), np.empty(size)
    for item in range(start, stop):
        a, t, i = _place(item, partial.shape[2], (c + columns - 1) // columns)
        first, width = i * columns, min(columns, c - i * columns)
        from_, s1, s2 = shifts[: width * fold], firsts[: width * fold], squares[: width * fold]
        for f in range(fold):
            for j in range(width):
                from_[f * width + j], s1[f * width + j], s2[f * width + j] = shift[a * c + first + j], 0, 0
        i, last = t * rows, min((t + 1) * rows, b)
        while i + 4 * fold <= last:
            k = (a * b + i) * c + first
            r0, r1, r2, r3 = flat[k:], flat[k + fold * c :], flat[k + 2 * fold * c :], flat[k + 3 * fold * c :]
            for j in range(s1.size):
                d0, d1 = np.float64(r0[j]) - from_[j], np.float64(r1[j]) - from_[j]
                d2, d3 = np.float64(r2[j]) - from_[j], np.float64(r3[j]) - from_[j]
                s1[j] += (d0 + d1) + (d2 + d3)
                s2[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
            i += 4 * fold
        while i < last:
            r0 = flat[(a * b + i) * c + first :]
            for j in range(width * min(fold, last - i)):
                d = np.float64(r0[j]) - from_[j]
                s1[j] += d
                s2[j] += d * d
            i += fold
        for f in range(1, fold):
            for j in range(width):
                s1[j] += s1[f * width + j]
                s2[j] += s2[f * width + j]
        first_sums, second_sums = partial[0, a, t, first:], partial[1, a, t, first:]
        for j in range(width):
            first_sums[j], second_sums[j] = s1[j], s2[j]


@inlined()
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
    flat, space, s = x.reshape(-1), np.empty(columns * fold, x.dtype), x.dtype.type(sign)
    for item in range(start, stop):
        a, t, i = _place(item, partial.shape[1], (c + columns - 1) // columns)
        first, width = i * columns, min(columns, c - i * columns)
        i, last = t * rows, min((t + 1) * rows, b)
        side = fold if i + fold <= last else 1
        held, row = space[: width * side], flat[(a * b + i) * c + first :]
        for j in range(held.size):
            held[j] = s * row[j]
        i += side
        while i < last:
            count = max(1, min(8, (last - i) // side))
            _take_larger(flat, (a * b + i) * c + first, side * c, count, s, held[: width * min(side, last - i)])
            i += count * side
        for f in range(1, side):
            for j in range(width):
                v = held[f * width + j]
                held[j] = v if (v > held[j]) | (v != v) else held[j]
        out = partial[a, t, first:]
        for j in range(width):
            out[j] = s * held[j]


@njit()
def column_indices(x, rows, columns, fold, sign, partial, indices, start, stop):
    """The largest of sign · x in each column of a piece, into partial, and its first index along B, into indices."""
    _, b, c = x.shape
    flat, s = x.reshape(-1), x.dtype.type(sign)
    space, numbers = np.empty(columns * fold, x.dtype), np.empty(columns * fold, np.int32)
    for item in range(start, stop):
        a, t, i = _place(item, partial.shape[1], (c + columns - 1) // columns)
        first, width = i * columns, min(columns, c - i * columns)
        top, last = t * rows, min((t + 1) * rows, b)
        side = fold if top + fold <= last else 1
        held, at, row = space[: width * side], numbers[: width * side], flat[(a * b + top) * c + first :]
        for j in range(held.size):
            held[j], at[j] = s * row[j], 0
        for i in range(top + side, last, side):
            row, number = flat[(a * b + i) * c + first :], np.int32(i - top)
            for j in range(width * min(side, last - i)):
                v = s * row[j]
                wins = (v > held[j]) | ((v != v) & (held[j] == held[j]))
                held[j] = v if wins else held[j]
                at[j] = number if wins else at[j]
        for f in range(1, side):
            for j in range(width):
                v, best, number = held[f * width + j], held[j], at[f * width + j] + np.int32(f)
                earlier = (number < at[j]) & ((v == best) | (v != v))
                wins = (v > best) | ((v != v) & (best == best)) | earlier
                held[j] = v if wins else best
                at[j] = number if wins else at[j]
        best, index = partial[a, t, first:], indices[a, t, first:]
        for j in range(width):
            best[j] = held[j]
            index[j] = top + at[j]


@inlined()
def _extreme(flat, sign, start, stop, buffer):
    """The largest of sign · flat[start:stop], which is not empty; `buffer` is as long as a vector."""
    step = lanes(flat)
    if stop - start < step:
        best = sign * flat[start]
        for i in range(start + 1, stop):
            v = sign * flat[i]
            best = v if (v > best) | (v != v) else best
        return best
    s, last = splat(sign), stop - step
    a = mul(s, load(flat, last))
    if stop - start >= 4 * step:
        b, c, d = a, a, a
        for i in range(start, last - 3 * step, 4 * step):
            a, b = larger(a, mul(s, load(flat, i))), larger(b, mul(s, load(flat, i + step)))
            c, d = larger(c, mul(s, load(flat, i + 2 * step))), larger(d, mul(s, load(flat, i + 3 * step)))
        a = larger(larger(a, b), larger(c, d))
        start += (stop - start - 1) // (4 * step) * 4 * step
    for i in range(start, last, step):
        a = larger(a, mul(s, load(flat, i)))
    for _ in range(4):  # lane 0 gets the largest of up to 16
        a = larger(evens(a, a), odds(a, a))
    store(buffer, 0, a)
    return buffer[0]


@njit()
def row_extremes(x, piece, b, c, sign, partial, start, stop):
    """The largest of sign · x of each piece of rows, times sign, into partial (results, pieces): see `row_sums`."""
    d, flat, buffer, s = x.shape[1], x.reshape(-1), np.empty(lanes(x), x.dtype), x.dtype.type(sign)
    for item in range(start, stop):
        result, t, m, count, first, last = _rows_of(item, partial.shape[0], partial.shape[1], piece, b, c, d)
        best = s * x[m, first]
        for i in range(m, m + count * c, c):
            if d < buffer.size and d <= piece:
                for j in range(d):
                    v = s * x[i, j]
                    best = v if (v > best) | (v != v) else best
            else:
                v = _extreme(flat, s, i * d + first, i * d + last, buffer)
                best = v if (v > best) | (v != v) else best
        partial[result, t] = s * best


@njit()
def row_indices(x, piece, b, c, sign, partial, indices, start, stop):
    """The largest of sign · x of each piece of rows, into partial, and its first index in the row, into indices.

    Each result has one row: b is 1. Only the block that has the largest is searched.
    """
    d, flat, buffer, s = x.shape[1], x.reshape(-1), np.empty(lanes(x), x.dtype), x.dtype.type(sign)
    for item in range(start, stop):
        result, t, m, _, first, last = _rows_of(item, partial.shape[0], partial.shape[1], piece, b, c, d)
        if d < SHORT and d <= piece:
            best, index = s * x[m, 0], 0
            for j in range(1, d):
                v = s * x[m, j]
                wins = (v > best) | ((v != v) & (best == best))
                best, index = v if wins else best, j if wins else index
        else:
            index, end = m * d + first, m * d + last
            best = _extreme(flat, s, index, min(index + BLOCK, end), buffer)
            for k in range(index + BLOCK, end, BLOCK):
                v = _extreme(flat, s, k, min(k + BLOCK, end), buffer)
                if v > best or (v != v and best == best):
                    best, index = v, k
            while s * flat[index] != best and flat[index] == flat[index]:
                index += 1
            index -= m * d
        partial[result, t], indices[result, t] = best, index
