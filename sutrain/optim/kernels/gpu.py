"""The passes over weights and gradients as Triton kernels (gpu_programs.py), a few launches for all tensors of a model.

Checked against the eager passes in Triton's interpreter, and compiled for GPUs. It has never run on one, so `auto` does
not take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import gpu_programs as programs
from .layout import Factors, Layout, State

LINES, BLOCK, VECTOR = 32, 64, 512
"""Of a tile: lines of one tensor, columns; and the line length of what is not factored."""
CHUNKS, ROWS = 128, 1024
"""Partial sums of chunks, and row statistics, that are added up at once."""
Numbers = tuple[int, ...]
LONGEST_LINE = 2**31 // LINES - BLOCK
NO_LIMIT = 3e38


class TritonKernels:
    """The methods of EagerKernels; the gradients keep their values."""

    def __init__(self, layout: Layout, first: State, second: State):
        """Raises ValueError for tensors factored over other than their last two dimensions, or with endless lines."""
        self._layout, self._state_alive = layout, (first, second)
        self._device = layout.buffers[0].device
        chunks, factored, groups, slabs, ranges = _tables(layout)
        self._launches = [(0, factored, True), (factored, len(chunks) - factored, False)]
        self._columns = max((columns for _, _, columns, _ in groups), default=0)
        self._partials = torch.empty(sum(n * c for _, n, c, _ in groups), device=self._device)
        self._sums = torch.zeros(len(chunks) * 6, device=self._device)
        self._chunks, self._groups = self._table(chunks, 9), self._table(groups, 4)
        self._slabs, self._ranges = self._table(slabs, 2), self._table(ranges, 2)
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
        self._launch(programs.square_sums, self._gradients, row_sums, self._partials, self._sums)
        if len(self._groups):
            grid = (len(self._groups), triton.cdiv(self._columns, BLOCK))
            programs.add_columns[grid](self._groups, self._partials, column_sums, LINES=LINES, BLOCK=BLOCK)
        return self._added_up(1).view(-1)

    def factors(self, row_mean: Tensor, column_mean: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        row_factor = torch.zeros_like(row_mean)
        if len(self._slabs):
            programs.row_factors[(len(self._slabs),)](self._slabs, row_mean, row_factor, floor, ROWS=ROWS)
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
            programs.adafactor_sums, self._gradients, self._weights, *self._state, *factors, self._sums,
            clip, new_share, epsilon, min(limit, NO_LIMIT), MOMENTUM=self._momentum,
        )  # fmt: skip
        return self._added_up(6)

    def adafactor_apply(
        self, factors: tuple[Tensor, Tensor], clip: float, limit: float, keep: float, numbers: Tensor
    ) -> None:
        self._launch(
            programs.adafactor_apply, self._gradients, self._weights, *self._state, *factors, *numbers,
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
            programs.moment_sums, self._gradients, self._weights, *self._state, self._sums, decays,
            clip, 1.0 - betas[0], betas[1], 1.0 - betas[1], *scales, epsilon,
        )  # fmt: skip
        return self._added_up(3)

    def moment_apply(
        self, scales: tuple[float, float], epsilon: float, decays: Tensor, numbers: Tensor
    ) -> None:
        self._launch(programs.moment_apply, self._weights, *self._state, decays, *numbers, *scales, epsilon)

    def _launch(self, kernel: Any, *arguments: Any, **constants: bool) -> None:
        for first, count, factored in self._launches:
            if count:
                if "FACTORED" in kernel.arg_names:  # where it makes a difference
                    constants["FACTORED"] = factored
                kernel[(count,)](self._chunks, first, *arguments, **constants, LINES=LINES, BLOCK=BLOCK)

    def _added_up(self, columns: int) -> Tensor:
        result = torch.empty(len(self._layout.fragments), columns, device=self._device)
        if len(result):
            programs.add_up[(len(result),)](self._ranges, self._sums, result, COLUMNS=columns, CHUNKS=CHUNKS)
        return result

    def _table(self, lines: Sequence[Numbers], width: int) -> Tensor:
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


def _tables(
    layout: Layout,
) -> tuple[list[Numbers], int, list[Numbers], list[Numbers], list[tuple[int, int]]]:
    """Chunks, see gpu_programs, those of factored tensors first and long lines before short ones (what begins last
    should not take long), and how many of them are factored; groups, see add_columns; slabs of row statistics (start,
    extent); the range of chunks of every fragment."""
    chunks: list[Numbers] = []
    groups: list[Numbers] = []
    slabs: list[Numbers] = []
    ranges = [(0, 0)] * len(layout.fragments)
    owned = [(i, f, layout.factors[f.tensor]) for i, f in enumerate(layout.fragments)]
    partials = 0
    for index, fragment, own in sorted(
        ((i, f, own) for i, f, own in owned if own is not None), key=lambda x: -x[2].shape[-1]
    ):
        _refuse_other_layouts(fragment.name, own)
        rows, columns = own.shape[-2:]
        before, begin, end = len(chunks), fragment.offset, fragment.offset + fragment.length
        lines = range(begin // columns, -(-end // columns))
        for slab in range(lines.start // rows, -(-lines.stop // rows)):
            low, high = max(lines.start, slab * rows), min(lines.stop, (slab + 1) * rows)
            start, target = partials, own.column_start + slab * columns
            for n in range(low, high, LINES):
                first, last = n * columns, min(n + LINES, high) * columns
                inside = max(0, begin - first), min(end, last) - first
                statistics = own.row_start + n, target, partials
                chunks.append((index, fragment.tensor, first - begin, *inside, columns, *statistics))
                partials += columns
            groups.append((start, (partials - start) // columns, columns, target))
            slabs.append((own.row_start + slab * rows, rows))
        ranges[index] = before, len(chunks)
    factored, step = len(chunks), LINES * VECTOR
    for index, fragment, factors in owned:
        if factors is None:
            before = len(chunks)
            for at in range(0, fragment.length, step):
                inside = 0, min(step, fragment.length - at)
                chunks.append((index, fragment.tensor, at, *inside, VECTOR, 0, 0, 0))
            ranges[index] = before, len(chunks)
    return chunks, factored, groups, slabs, ranges


def _refuse_other_layouts(name: str, factors: Factors) -> None:
    reason = ""
    if (factors.row, factors.column) != (len(factors.shape) - 2, len(factors.shape) - 1):
        reason = "the Triton passes factor the last two dimensions only"
    elif factors.shape[-1] > LONGEST_LINE:
        reason = f"lines of {factors.shape[-1]} elements are too long for the Triton passes"
    if reason:
        raise ValueError(f"{name}: {reason}; use kernels: eager")
