"""The passes over weights and gradients as programs for a GPU, in Triton; gpu.py launches them.

The same arithmetic as cpu.cpp: a program takes up to LINES lines of one tensor, a tile of LINES x BLOCK elements at a
time (a line runs along the last dimension; what is not factored is cut into lines of VECTOR), and leaves partial sums,
which later launches add up in order. So nothing depends on the order in which programs run, and there are no atomics.

What a GPU is short of here is instructions: at 4.8 TB/s an H200 has 25 of them a thread for every 4 bytes. So indices
are 32 bits wide and count from the program's first element, sums stay apart by element until the last tile, and
factored tensors have programs of their own, without the square roots of the others.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _chunk(chunks, c):
    """Of chunk c: (fragment, tensor, where in the fragment its first line begins, the elements [low, high) from there
    on that count, line length, its first row statistic, its first column statistic, its partial sums)."""
    at = chunks + c * 9
    low, high, line = tl.load(at + 3).to(tl.int32), tl.load(at + 4).to(tl.int32), tl.load(at + 5).to(tl.int32)
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), low, high, line,
        tl.load(at + 6), tl.load(at + 7), tl.load(at + 8),
    )  # fmt: skip


@triton.jit
def _pointer(table, fragment, begin):
    return tl.load(table + fragment).to(tl.pointer_type(tl.float32)) + begin


@triton.jit
def _tile(start, low, high, line, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """(Columns, elements, and which of them count) of the tile that begins at column `start`."""
    k = start + tl.arange(0, BLOCK)
    at = tl.arange(0, LINES)[:, None] * line + k[None, :]
    return k, at, (k < line)[None, :] & (at >= low) & (at < high)


@triton.jit
def _lines(low, high, line, LINES: tl.constexpr):
    """(Lines, and which of them have elements that count.)"""
    n = tl.arange(0, LINES)
    return n, (n * line + line > low) & (n * line < high)


@triton.jit
def square_sums(
    chunks, first_chunk, gradients, row_sums, partials, sums, FACTORED: tl.constexpr, LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    c = first_chunk + tl.program_id(0)
    fragment, _tensor, begin, low, high, line, row, _column, partial = _chunk(chunks, c)
    g = _pointer(gradients, fragment, begin)
    gg = tl.zeros([LINES, BLOCK], tl.float32)
    for start in range(0, line, BLOCK):
        k, at, inside = _tile(start, low, high, line, LINES, BLOCK)
        x = tl.load(g + at, mask=inside, other=0.0)
        square = x * x
        gg += square
        if FACTORED:
            tl.store(partials + partial + k, tl.sum(square, 0), mask=k < line)
    if FACTORED:
        n, counts = _lines(low, high, line, LINES)
        tl.store(row_sums + row + n, tl.sum(gg, 1), mask=counts)
    tl.store(sums + c, tl.sum(gg))


@triton.jit
def add_columns(groups, partials, column_sums, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """Groups: (start of the first partial sums, how many follow each other, columns, where the result goes)."""
    group = tl.program_id(0)
    start, count = tl.load(groups + group * 4), tl.load(groups + group * 4 + 1).to(tl.int32)
    columns, target = tl.load(groups + group * 4 + 2).to(tl.int32), tl.load(groups + group * 4 + 3)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([LINES, BLOCK], tl.float32)
    for first in range(0, count, LINES):
        n = first + tl.arange(0, LINES)
        inside = (n < count)[:, None] & (k < columns)[None, :]
        total += tl.load(
            partials + start + n.to(tl.int64)[:, None] * columns + k[None, :], mask=inside, other=0.0
        )
    tl.store(column_sums + target + k, tl.sum(total, 0), mask=k < columns)


@triton.jit
def add_up(ranges, sums, result, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr):
    """Sums of the chunks of every fragment, in fp64."""
    fragment = tl.program_id(0)
    first, end = tl.load(ranges + fragment * 2), tl.load(ranges + fragment * 2 + 1)
    column = tl.arange(0, 8)
    total = tl.zeros([CHUNKS, 8], tl.float64)
    for c in range(first, end, CHUNKS):
        n = c + tl.arange(0, CHUNKS)
        inside = (n < end)[:, None] & (column < COLUMNS)[None, :]
        total += tl.load(sums + n[:, None] * COLUMNS + column[None, :], mask=inside, other=0.0).to(tl.float64)
    tl.store(result + fragment * COLUMNS + column, tl.sum(total, 0).to(tl.float32), mask=column < COLUMNS)


@triton.jit
def row_factors(slabs, row_mean, row_factor, floor, ROWS: tl.constexpr):
    slab = tl.program_id(0)
    start, extent = tl.load(slabs + slab * 2), tl.load(slabs + slab * 2 + 1)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, extent, ROWS):
        n = first + tl.arange(0, ROWS)
        total += tl.load(row_mean + start + n, mask=n < extent, other=0.0)
    mean = tl.maximum(tl.sum(total) / extent.to(tl.float32), floor)
    for first in range(0, extent, ROWS):
        n = first + tl.arange(0, ROWS)
        row = tl.load(row_mean + start + n, mask=n < extent, other=1.0)
        tl.store(row_factor + start + n, 1.0 / tl.sqrt(row / mean), mask=n < extent)


@triton.jit
def adafactor_sums(
    chunks, first_chunk, gradients, weights, moments, momenta, row_factor, column_factor, sums,
    clip, new_share, epsilon, limit,
    MOMENTUM: tl.constexpr, FACTORED: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = first_chunk + tl.program_id(0)
    fragment, _tensor, begin, low, high, line, row, column, _partial = _chunk(chunks, c)
    g, w = _pointer(gradients, fragment, begin), _pointer(weights, fragment, begin)
    ww, uu = tl.zeros([LINES, BLOCK], tl.float32), tl.zeros([LINES, BLOCK], tl.float32)
    uw = tl.zeros([LINES, BLOCK], tl.float32)
    if MOMENTUM:
        m_at = _pointer(momenta, fragment, begin)
        mm, mu = tl.zeros([LINES, BLOCK], tl.float32), tl.zeros([LINES, BLOCK], tl.float32)
        mw = tl.zeros([LINES, BLOCK], tl.float32)
    if FACTORED:
        n, counts = _lines(low, high, line, LINES)
        rows = tl.load(row_factor + row + n, mask=counts, other=1.0)
    else:
        v_at = _pointer(moments, fragment, begin)
    for start in range(0, line, BLOCK):
        k, at, inside = _tile(start, low, high, line, LINES, BLOCK)
        x = tl.load(g + at, mask=inside, other=0.0) * clip
        y = tl.load(w + at, mask=inside, other=0.0)
        if FACTORED:
            columns = tl.load(column_factor + column + k, mask=k < line, other=1.0)
            u = x * tl.minimum(rows[:, None] * columns[None, :], limit)
        else:
            v = tl.load(v_at + at, mask=inside, other=1.0)
            v += new_share * (x * x + epsilon - v)
            tl.store(v_at + at, v, mask=inside)
            u = x * tl.minimum(1.0 / tl.sqrt(v), limit)
        ww += y * y
        uu += u * u
        uw += u * y
        if MOMENTUM:
            m = tl.load(m_at + at, mask=inside, other=0.0)
            mm += m * m
            mu += m * u
            mw += m * y
    tl.store(sums + c * 6, tl.sum(ww))
    tl.store(sums + c * 6 + 1, tl.sum(uu))
    tl.store(sums + c * 6 + 2, tl.sum(uw))
    if MOMENTUM:
        tl.store(sums + c * 6 + 3, tl.sum(mm))
        tl.store(sums + c * 6 + 4, tl.sum(mu))
        tl.store(sums + c * 6 + 5, tl.sum(mw))


@triton.jit
def adafactor_apply(
    chunks, first_chunk, gradients, weights, moments, momenta, row_factor, column_factor, sizes, shares, losses,
    clip, limit, keep, MOMENTUM: tl.constexpr, FACTORED: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = first_chunk + tl.program_id(0)
    fragment, tensor, begin, low, high, line, row, column, _partial = _chunk(chunks, c)
    g, w = _pointer(gradients, fragment, begin), _pointer(weights, fragment, begin)
    size, lost = tl.load(sizes + tensor), tl.load(losses + tensor)
    share = tl.load(shares + tensor) * clip
    if MOMENTUM:
        m_at = _pointer(momenta, fragment, begin)
    if FACTORED:
        n, counts = _lines(low, high, line, LINES)
        rows = tl.load(row_factor + row + n, mask=counts, other=1.0)
    else:
        v_at = _pointer(moments, fragment, begin)
    for start in range(0, line, BLOCK):
        k, at, inside = _tile(start, low, high, line, LINES, BLOCK)
        x = tl.load(g + at, mask=inside, other=0.0)
        y = tl.load(w + at, mask=inside, other=0.0)
        if FACTORED:
            columns = tl.load(column_factor + column + k, mask=k < line, other=1.0)
            u = share * x * tl.minimum(rows[:, None] * columns[None, :], limit)
        else:
            u = share * x * tl.minimum(1.0 / tl.sqrt(tl.load(v_at + at, mask=inside, other=1.0)), limit)
        if MOMENTUM:
            u += keep * tl.load(m_at + at, mask=inside, other=0.0)
            tl.store(m_at + at, u, mask=inside)
        tl.store(w + at, y - (lost * y + size * u), mask=inside)


@triton.jit
def moment_sums(
    chunks, first_chunk, gradients, weights, means, squares, sums, decays,
    clip, new1, beta2, new2, mean_scale, root_scale, epsilon, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = first_chunk + tl.program_id(0)
    fragment, tensor, begin, low, high, line, _row, _column, _partial = _chunk(chunks, c)
    g, w = _pointer(gradients, fragment, begin), _pointer(weights, fragment, begin)
    m_at, v_at = _pointer(means, fragment, begin), _pointer(squares, fragment, begin)
    decay = tl.load(decays + tensor)
    ww, rr = tl.zeros([LINES, BLOCK], tl.float32), tl.zeros([LINES, BLOCK], tl.float32)
    rw = tl.zeros([LINES, BLOCK], tl.float32)
    for start in range(0, line, BLOCK):
        _k, at, inside = _tile(start, low, high, line, LINES, BLOCK)
        x = tl.load(g + at, mask=inside, other=0.0) * clip
        y = tl.load(w + at, mask=inside, other=0.0)
        m = tl.load(m_at + at, mask=inside, other=0.0)
        v = tl.load(v_at + at, mask=inside, other=0.0)
        m += new1 * (x - m)
        v = v * beta2 + new2 * x * x
        tl.store(m_at + at, m, mask=inside)
        tl.store(v_at + at, v, mask=inside)
        r = m * mean_scale / (tl.sqrt(v) * root_scale + epsilon) + decay * y
        ww += y * y
        rr += r * r
        rw += r * y
    tl.store(sums + c * 3, tl.sum(ww))
    tl.store(sums + c * 3 + 1, tl.sum(rr))
    tl.store(sums + c * 3 + 2, tl.sum(rw))


@triton.jit
def moment_apply(
    chunks, first_chunk, weights, means, squares, decays, sizes, losses, mean_scale, root_scale, epsilon,
    LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = first_chunk + tl.program_id(0)
    fragment, tensor, begin, low, high, line, _row, _column, _partial = _chunk(chunks, c)
    w = _pointer(weights, fragment, begin)
    m_at, v_at = _pointer(means, fragment, begin), _pointer(squares, fragment, begin)
    decay, size, lost = tl.load(decays + tensor), tl.load(sizes + tensor), tl.load(losses + tensor)
    for start in range(0, line, BLOCK):
        _k, at, inside = _tile(start, low, high, line, LINES, BLOCK)
        y = tl.load(w + at, mask=inside, other=0.0)
        m = tl.load(m_at + at, mask=inside, other=0.0)
        v = tl.load(v_at + at, mask=inside, other=0.0)
        r = m * mean_scale / (tl.sqrt(v) * root_scale + epsilon) + decay * y
        tl.store(w + at, y - (lost * y + size * r), mask=inside)
