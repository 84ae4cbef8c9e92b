"""The passes over weights and gradients as Triton kernels, a few launches for all tensors of a model.

The same arithmetic as cpu.cpp, cut alike: a program takes up to LINES lines of one tensor (a line runs along the last
dimension; what is not factored is cut into lines of VECTOR), leaves partial sums, and later launches add these up in
order. So nothing depends on the order in which programs run, and there are no atomics.

Checked against the eager passes in Triton's interpreter, and compiled for GPUs. It has never run on one, so `auto` does
not take it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Layout, State

LINES, BLOCK, VECTOR = 16, 256, 4096
NO_LIMIT = 3e38


@triton.jit
def _tile(chunks, fragments, c, LINES: tl.constexpr):
    """Of chunk c: (fragment, tensor, first element, end, line length, row statistic of line 0 or -1, absolute lines,
    which of them count)."""
    fragment = tl.load(chunks + c * 5)
    first = tl.load(chunks + c * 5 + 1)
    count = tl.load(chunks + c * 5 + 2)
    begin = tl.load(fragments + fragment * 5 + 1)
    end = begin + tl.load(fragments + fragment * 5 + 2)
    line = tl.load(fragments + fragment * 5 + 3)
    row_start = tl.load(fragments + fragment * 5 + 4)
    lines = first + tl.arange(0, LINES)
    return (
        fragment,
        tl.load(fragments + fragment * 5),
        begin,
        end,
        line,
        row_start,
        lines,
        lines < first + count,
    )


@triton.jit
def _pointer(table, fragment):
    return tl.load(table + fragment).to(tl.pointer_type(tl.float32))


@triton.jit
def _square_sums(
    chunks, fragments, gradients, weights, row_sums, partials, sums, LINES: tl.constexpr, BLOCK: tl.constexpr
):
    c = tl.program_id(0)
    fragment, _, begin, end, line, row_start, lines, counts = _tile(chunks, fragments, c, LINES)
    partial = tl.load(chunks + c * 5 + 3)
    g, w = _pointer(gradients, fragment), _pointer(weights, fragment)
    factored_line = tl.where(
        row_start >= 0, line, 0
    )  # as limits of indices: masks of scalars are not for all
    rows = tl.zeros([LINES], tl.float32)
    weight_rows = tl.zeros([LINES], tl.float32)
    for start in range(0, line, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = lines[:, None] * line + k[None, :]
        inside = counts[:, None] & (k < line)[None, :] & (at >= begin) & (at < end)
        x = tl.load(g + (at - begin), mask=inside, other=0.0)
        y = tl.load(w + (at - begin), mask=inside, other=0.0)
        rows += tl.sum(x * x, 1)
        weight_rows += tl.sum(y * y, 1)
        tl.store(partials + partial + k, tl.sum(x * x, 0), mask=k < factored_line)
    tl.store(row_sums + row_start + lines, rows, mask=counts & (lines + row_start >= lines))
    tl.store(sums + c * 5, tl.sum(rows))
    tl.store(sums + c * 5 + 1, tl.sum(weight_rows))


@triton.jit
def _add_columns(groups, partials, column_sums, BLOCK: tl.constexpr):
    """Groups: (start of the first partial sums, how many follow each other, columns, where the result goes)."""
    group = tl.program_id(0)
    start, count = tl.load(groups + group * 4), tl.load(groups + group * 4 + 1)
    columns, target = tl.load(groups + group * 4 + 2), tl.load(groups + group * 4 + 3)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(count):
        total += tl.load(partials + start + i * columns + k, mask=k < columns, other=0.0)
    tl.store(column_sums + target + k, total, mask=k < columns)


@triton.jit
def _add_up(ranges, sums, result, COLUMNS: tl.constexpr):
    """Sums of the chunks of every fragment, in order, in fp64."""
    fragment = tl.program_id(0)
    column = tl.arange(0, 8)
    total = tl.zeros([8], tl.float64)
    for c in range(tl.load(ranges + fragment), tl.load(ranges + fragment + 1)):
        total += tl.load(sums + c * 5 + column, mask=column < COLUMNS, other=0.0).to(tl.float64)
    tl.store(result + fragment * COLUMNS + column, total.to(tl.float32), mask=column < COLUMNS)


@triton.jit
def _row_factors(slabs, row_mean, row_factor, floor, BLOCK: tl.constexpr):
    slab = tl.program_id(0)
    start, extent = tl.load(slabs + slab * 2), tl.load(slabs + slab * 2 + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, extent, BLOCK):
        n = first + tl.arange(0, BLOCK)
        total += tl.load(row_mean + start + n, mask=n < extent, other=0.0)
    mean = tl.maximum(tl.sum(total) / extent.to(tl.float32), floor)
    for first in range(0, extent, BLOCK):
        n = first + tl.arange(0, BLOCK)
        row = tl.load(row_mean + start + n, mask=n < extent, other=1.0)
        tl.store(row_factor + start + n, 1.0 / tl.sqrt(row / mean), mask=n < extent)


@triton.jit
def _inverse_root(row_start, rows, columns, v, limit):
    """1/√V of a tile: from its factors, or from the whole second moment where row_start is negative."""
    factored = rows[:, None] * columns[None, :]
    return tl.minimum(tl.where(row_start >= 0, factored, 1.0 / tl.sqrt(v)), limit)


@triton.jit
def _adafactor_sums(
    chunks, fragments, gradients, weights, moments, momenta, row_factor, column_factor, sums,
    clip, new_share, epsilon, limit, MOMENTUM: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    fragment, _, begin, end, line, row_start, lines, counts = _tile(chunks, fragments, c, LINES)
    column_start = tl.load(chunks + c * 5 + 4)
    g, w = _pointer(gradients, fragment), _pointer(weights, fragment)
    v_at = _pointer(moments, fragment)
    factored_line, whole_end = tl.where(row_start >= 0, line, 0), tl.where(row_start >= 0, begin, end)
    rows = tl.load(row_factor + row_start + lines, mask=counts & (lines + row_start >= lines), other=1.0)
    uu, uw, mm = tl.zeros([LINES], tl.float32), tl.zeros([LINES], tl.float32), tl.zeros([LINES], tl.float32)
    mu, mw = tl.zeros([LINES], tl.float32), tl.zeros([LINES], tl.float32)
    for start in range(0, line, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = lines[:, None] * line + k[None, :]
        inside = counts[:, None] & (k < line)[None, :] & (at >= begin) & (at < end)
        x = tl.load(g + (at - begin), mask=inside, other=0.0) * clip
        y = tl.load(w + (at - begin), mask=inside, other=0.0)
        v = tl.load(v_at + (at - begin), mask=inside & (at < whole_end), other=1.0)
        v += new_share * (x * x + epsilon - v)
        tl.store(v_at + (at - begin), v, mask=inside & (at < whole_end))
        columns = tl.load(column_factor + column_start + k, mask=k < factored_line, other=1.0)
        u = tl.where(inside, x * _inverse_root(row_start, rows, columns, v, limit), 0.0)
        uu += tl.sum(u * u, 1)
        uw += tl.sum(u * y, 1)
        if MOMENTUM:
            m = tl.load(_pointer(momenta, fragment) + (at - begin), mask=inside, other=0.0)
            mm += tl.sum(m * m, 1)
            mu += tl.sum(m * u, 1)
            mw += tl.sum(m * y, 1)
    tl.store(sums + c * 5, tl.sum(uu))
    tl.store(sums + c * 5 + 1, tl.sum(uw))
    tl.store(sums + c * 5 + 2, tl.sum(mm))
    tl.store(sums + c * 5 + 3, tl.sum(mu))
    tl.store(sums + c * 5 + 4, tl.sum(mw))


@triton.jit
def _adafactor_apply(
    chunks, fragments, gradients, weights, moments, momenta, row_factor, column_factor, sizes, shares, losses,
    clip, limit, keep, MOMENTUM: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    fragment, tensor, begin, end, line, row_start, lines, counts = _tile(chunks, fragments, c, LINES)
    column_start = tl.load(chunks + c * 5 + 4)
    g, w = _pointer(gradients, fragment), _pointer(weights, fragment)
    size, lost = tl.load(sizes + tensor), tl.load(losses + tensor)
    share = tl.load(shares + tensor) * clip
    factored_line, whole_end = tl.where(row_start >= 0, line, 0), tl.where(row_start >= 0, begin, end)
    rows = tl.load(row_factor + row_start + lines, mask=counts & (lines + row_start >= lines), other=1.0)
    for start in range(0, line, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = lines[:, None] * line + k[None, :]
        inside = counts[:, None] & (k < line)[None, :] & (at >= begin) & (at < end)
        x = tl.load(g + (at - begin), mask=inside, other=0.0)
        y = tl.load(w + (at - begin), mask=inside, other=0.0)
        v = tl.load(_pointer(moments, fragment) + (at - begin), mask=inside & (at < whole_end), other=1.0)
        columns = tl.load(column_factor + column_start + k, mask=k < factored_line, other=1.0)
        u = share * x * _inverse_root(row_start, rows, columns, v, limit)
        if MOMENTUM:
            m_at = _pointer(momenta, fragment)
            u += keep * tl.load(m_at + (at - begin), mask=inside, other=0.0)
            tl.store(m_at + (at - begin), u, mask=inside)
        tl.store(w + (at - begin), y - (lost * y + size * u), mask=inside)


@triton.jit
def _moment_sums(
    chunks, fragments, gradients, weights, means, squares, sums, decays,
    clip, new1, beta2, new2, mean_scale, root_scale, epsilon, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    fragment, tensor, begin, end, line, _, lines, counts = _tile(chunks, fragments, c, LINES)
    g, w = _pointer(gradients, fragment), _pointer(weights, fragment)
    m_at, v_at = _pointer(means, fragment), _pointer(squares, fragment)
    decay = tl.load(decays + tensor)
    rr, rw = tl.zeros([LINES], tl.float32), tl.zeros([LINES], tl.float32)
    for start in range(0, line, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = lines[:, None] * line + k[None, :]
        inside = counts[:, None] & (k < line)[None, :] & (at >= begin) & (at < end)
        x = tl.load(g + (at - begin), mask=inside, other=0.0) * clip
        y = tl.load(w + (at - begin), mask=inside, other=0.0)
        m = tl.load(m_at + (at - begin), mask=inside, other=0.0)
        v = tl.load(v_at + (at - begin), mask=inside, other=0.0)
        m += new1 * (x - m)
        v = v * beta2 + new2 * x * x
        tl.store(m_at + (at - begin), m, mask=inside)
        tl.store(v_at + (at - begin), v, mask=inside)
        r = m * mean_scale / (tl.sqrt(v) * root_scale + epsilon) + decay * y
        rr += tl.sum(r * r, 1)
        rw += tl.sum(r * y, 1)
    tl.store(sums + c * 5, tl.sum(rr))
    tl.store(sums + c * 5 + 1, tl.sum(rw))


@triton.jit
def _moment_apply(
    chunks, fragments, weights, means, squares, decays, sizes, losses, mean_scale, root_scale, epsilon,
    LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    fragment, tensor, begin, end, line, _, lines, counts = _tile(chunks, fragments, c, LINES)
    w, m_at, v_at = _pointer(weights, fragment), _pointer(means, fragment), _pointer(squares, fragment)
    decay, size, lost = tl.load(decays + tensor), tl.load(sizes + tensor), tl.load(losses + tensor)
    for start in range(0, line, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = lines[:, None] * line + k[None, :]
        inside = counts[:, None] & (k < line)[None, :] & (at >= begin) & (at < end)
        y = tl.load(w + (at - begin), mask=inside, other=0.0)
        m = tl.load(m_at + (at - begin), mask=inside, other=0.0)
        v = tl.load(v_at + (at - begin), mask=inside, other=0.0)
        r = m * mean_scale / (tl.sqrt(v) * root_scale + epsilon) + decay * y
        tl.store(w + (at - begin), y - (lost * y + size * r), mask=inside)


class TritonKernels:
    """The methods of EagerKernels; the gradients keep their values."""

    def __init__(self, layout: Layout, first: State, second: State):
        """Raises ValueError for tensors that are factored over other than their last two dimensions."""
        self._layout, self._state_alive = layout, (first, second)
        self._device = layout.buffers[0].device
        fragments, chunks, groups, slabs, ranges = _tables(layout)
        self._columns = max((columns for _, _, columns, _ in groups), default=0)
        self._partials = torch.empty(sum(n * c for _, n, c, _ in groups), device=self._device)
        self._sums = torch.empty(len(chunks), 5, device=self._device)
        self._fragments, self._chunks = self._table(fragments, 5), self._table(chunks, 5)
        self._groups, self._slabs = self._table(groups, 4), self._table(slabs, 2)
        self._ranges = torch.tensor(ranges, dtype=torch.int64, device=self._device)
        self._state = [self._pointers(state) for state in (first, second)]
        self._momentum = second is not None
        self._known: dict[str, tuple[list[int], Tensor]] = {}

    def begin(self, gradients: list[Tensor]) -> None:
        self._gradients_alive = gradients
        self._gradients = self._in_buffers("gradients", gradients)
        self._weights = self._in_buffers("weights", self._layout.buffers)

    def end(self) -> None:
        self._gradients_alive = []

    def square_sums(self, row_sums: Tensor, column_sums: Tensor) -> Tensor:
        self._launch(_square_sums, self._gradients, self._weights, row_sums, self._partials, self._sums)
        if len(self._groups):
            grid = (len(self._groups), triton.cdiv(self._columns, BLOCK))
            _add_columns[grid](self._groups, self._partials, column_sums, BLOCK=BLOCK)
        return self._added_up(2)

    def factors(self, row_mean: Tensor, column_mean: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        row_factor = torch.zeros_like(row_mean)
        if len(self._slabs):
            _row_factors[(len(self._slabs),)](self._slabs, row_mean, row_factor, floor, BLOCK=BLOCK)
        return row_factor, column_mean.rsqrt()

    def adafactor_sums(
        self,
        factors: tuple[Tensor, Tensor],
        clip: float,
        new_share: float,
        epsilon: float,
        limit: float,
        weighted: bool,
    ) -> Tensor:
        self._launch(
            _adafactor_sums, self._gradients, self._weights, *self._state, *factors, self._sums,
            clip, new_share, epsilon, min(limit, NO_LIMIT), MOMENTUM=self._momentum,
        )  # fmt: skip
        return self._added_up(5)

    def adafactor_apply(
        self, factors: tuple[Tensor, Tensor], clip: float, limit: float, keep: float, numbers: Tensor
    ) -> None:
        self._launch(
            _adafactor_apply, self._gradients, self._weights, *self._state, *factors, *numbers,
            clip, min(limit, NO_LIMIT), keep, MOMENTUM=self._momentum,
        )  # fmt: skip

    def moment_sums(
        self,
        clip: float,
        betas: tuple[float, float],
        scales: tuple[float, float],
        epsilon: float,
        decays: Tensor,
        weighted: bool,
    ) -> Tensor:
        self._launch(
            _moment_sums, self._gradients, self._weights, *self._state, self._sums, decays,
            clip, 1.0 - betas[0], betas[1], 1.0 - betas[1], *scales, epsilon,
        )  # fmt: skip
        return self._added_up(2)

    def moment_apply(
        self, scales: tuple[float, float], epsilon: float, decays: Tensor, numbers: Tensor
    ) -> None:
        self._launch(_moment_apply, self._weights, *self._state, decays, *numbers, *scales, epsilon)

    def _launch(self, kernel: Any, *arguments: Any, **constants: bool) -> None:
        if len(self._chunks):
            grid = (len(self._chunks),)
            kernel[grid](self._chunks, self._fragments, *arguments, **constants, LINES=LINES, BLOCK=BLOCK)

    def _added_up(self, columns: int) -> Tensor:
        result = torch.zeros(len(self._layout.fragments), columns, device=self._device)
        if len(result):
            _add_up[(len(result),)](self._ranges, self._sums, result, COLUMNS=columns)
        return result

    def _table(self, lines: list[tuple[int, ...]], width: int) -> Tensor:
        return torch.tensor(lines, dtype=torch.int64, device=self._device).view(-1, width)

    def _pointers(self, state: State) -> Tensor:
        addresses = [0 if t is None else t.data_ptr() for t in state or [None] * len(self._layout.fragments)]
        return torch.tensor(addresses, dtype=torch.int64, device=self._device)

    def _in_buffers(self, key: str, buffers: list[Tensor]) -> Tensor:
        """Where every fragment begins; sent to the device only when something has moved."""
        starts = [buffer.data_ptr() for buffer in buffers]
        if key not in self._known or self._known[key][0] != starts:
            owned = zip(self._layout.fragments, self._layout.buffer_of, strict=True)
            addresses = [starts[buffer] + 4 * fragment.start for fragment, buffer in owned]
            self._known[key] = (
                starts,
                torch.tensor(addresses, dtype=torch.int64, device=self._device),
            )
        return self._known[key][1]


def _tables(layout: Layout) -> tuple[list, list, list, list, list[int]]:
    """Fragments (tensor, offset, length, line, row statistic of line 0 or -1); chunks (fragment, first line, lines,
    where their column sums go, where their column statistics are); groups, see _add_columns; slabs of row statistics
    (start, extent); the range of chunks of every fragment."""
    fragments, chunks, groups, slabs, ranges = [], [], [], [], [0]
    partials = 0
    for index, fragment in enumerate(layout.fragments):
        factors = layout.factors[fragment.tensor]
        first, last = fragment.offset, fragment.offset + fragment.length
        if factors is None:
            fragments.append((fragment.tensor, first, fragment.length, VECTOR, -1))
            lines = range(first // VECTOR, -(-last // VECTOR), LINES)
            chunks += [(index, n, min(LINES, -(-last // VECTOR) - n), 0, 0) for n in lines]
            ranges.append(len(chunks))
            continue
        shape = factors.shape
        if (factors.row, factors.column) != (len(shape) - 2, len(shape) - 1):
            raise ValueError(
                f"{fragment.name}: the Triton passes factor the last two dimensions only; use kernels: eager"
            )
        rows, columns = shape[-2:]
        fragments.append((fragment.tensor, first, fragment.length, columns, factors.row_start))
        begin, end = first // columns, -(-last // columns)
        for slab in range(begin // rows, -(-end // rows)):
            low, high = max(begin, slab * rows), min(end, (slab + 1) * rows)
            start, target = partials, factors.column_start + slab * columns
            for n in range(low, high, LINES):
                chunks.append((index, n, min(LINES, high - n), partials, target))
                partials += columns
            groups.append((start, (partials - start) // columns, columns, target))
            slabs.append((factors.row_start + slab * rows, rows))
        ranges.append(len(chunks))
    return fragments, chunks, groups, slabs, ranges
