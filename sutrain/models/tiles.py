"""Documents of many lengths as batches of equal matrices: few large products in the place of many small ones.

A CPU's small product costs more to begin than to make, and a batched one copies whatever is a slice or transposed each
time that it meets it. Here every head of a document gets rows of its own, one behind the other, filled up to a multiple
of WIDTH_STEP; the documents that then have one width are a batch. One pass over the rows makes this, another undoes it.

B batch, H heads, L sequence length, K features of a head, P rows of all batches, N matrices of a batch (its documents
times H), W their width, S the last places of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

WIDTH_STEP = 32
"""Whole tiles of a CPU's matrix units."""


class Group(NamedTuple):
    """Documents of one width."""

    documents: tuple[int, ...]  # their numbers
    width: int
    hidden_N1S: Tensor | None  # of the last places: -inf where nobody is, else 0; fp32; None if all are full


class Tiling(NamedTuple):
    """Which row of [B·L·H] is where in the batches. Of one head nothing is moved, and its matrices may be slices."""

    heads: int
    groups: tuple[Group, ...]
    index_P: Tensor | None
    inverse: Tensor | None  # [B·L·H], in P
    empty: Tensor | None  # rows of P that hold nobody, None if there are none

    def take(self, x_BHLK: Tensor) -> Tensor:
        """[P, K]; where nobody is stands a copy of somebody."""
        flat = x_BHLK.transpose(1, 2).reshape(-1, x_BHLK.shape[-1])
        return flat if self.index_P is None else flat.index_select(0, self.index_P)

    def take_gradient(self, x_BHLK: Tensor) -> Tensor:
        """[P, K] with zeros where nobody is, so that they count for nothing in sums over rows."""
        taken = self.take(x_BHLK)
        return taken if self.empty is None else taken.index_fill_(0, self.empty, 0.0)

    def batches(self, x_PK: Tensor) -> list[Tensor]:
        """[N, W, K] of every group, as views."""
        shapes = [(len(group.documents) * self.heads, group.width) for group in self.groups]
        parts = x_PK.split([count * width for count, width in shapes])
        return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]

    def put_back(self, x_PK: Tensor, rows: int) -> Tensor:
        """[B, H, L, K] of so many rows B, in the memory of [B, L, H, K]."""
        flat = x_PK if self.inverse is None else x_PK.index_select(0, self.inverse)
        return flat.view(rows, -1, self.heads, flat.shape[-1]).transpose(1, 2)


@lru_cache(maxsize=8)  # the same in every layer
def tiling(lengths: tuple[int, ...], rows: int, heads: int, device: torch.device) -> Tiling:
    """For documents of these lengths, one behind the other; or, of one length, for so many rows of it."""
    several = len(lengths) > 1
    if heads == 1:  # each document by itself, since those of one width need not lie together
        alone = [((number,), length) for number, length in enumerate(lengths)]
        members = alone if several else [(tuple(range(rows)), lengths[0])]
        return Tiling(1, tuple(Group(*member, None) for member in members), None, None, None)
    numbers: dict[int, list[int]] = {}
    if several:
        for number, length in enumerate(lengths):
            numbers.setdefault(-(-length // WIDTH_STEP) * WIDTH_STEP, []).append(number)
    else:
        numbers[lengths[0]], lengths = list(range(rows)), lengths * rows
    with torch.inference_mode(False):  # a cached inference tensor could never serve in training again
        return _build(lengths, heads, {width: tuple(found) for width, found in numbers.items()}, device)


def _build(
    lengths: Sequence[int], heads: int, numbers: dict[int, tuple[int, ...]], device: torch.device
) -> Tiling:
    starts = torch.tensor(list(accumulate(lengths[:-1], initial=0)))
    sizes = torch.tensor(lengths)
    head_H = torch.arange(heads)[:, None]
    groups, indices, filled = [], [], []
    for width, found in numbers.items():
        start_G11, size_G11 = (x[list(found)][:, None, None] for x in (starts, sizes))
        place_W = torch.arange(width)
        filled_GHW = (place_W < size_G11).expand(-1, heads, -1)
        hidden_N1S = None
        if not filled_GHW.all():
            last_GHS = filled_GHW[..., -WIDTH_STEP:]
            zeros = torch.zeros(last_GHS.shape)
            hidden_N1S = zeros.masked_fill_(~last_GHS, -torch.inf).flatten(0, 1).unsqueeze(1).to(device)
        indices.append(((start_G11 + place_W.minimum(size_G11 - 1)) * heads + head_H).flatten())
        filled.append(filled_GHW.flatten())
        groups.append(Group(found, width, hidden_N1S))
    index_P, filled_P = torch.cat(indices), torch.cat(filled)
    inverse = torch.empty(sum(lengths) * heads, dtype=torch.long)
    inverse[index_P[filled_P]] = filled_P.nonzero().squeeze(1)
    empty = (~filled_P).nonzero().squeeze(1)
    return Tiling(
        heads, tuple(groups), index_P.to(device), inverse.to(device), empty.to(device) if len(empty) else None
    )
