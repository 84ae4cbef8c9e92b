"""A contiguous run of a flattened tensor, as few dense boxes.

A fragment of a matrix is a ragged first row, some full rows and a ragged last row:

    . . . x x x        box [1, 3]
    x x x x x x    →   box [2, 6]
    x x x x x x
    x x . . . .        box [1, 2]

In n dimensions there are at most 2n - 1 boxes. Inside a box everything is ordinary tensor arithmetic (a sum
over rows or columns, a broadcast product), so a rank computes with its ragged slice as others do with whole
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """Elements [starts, starts + sizes) of a tensor; in its fragment they start at `position`."""

    position: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def of_flat(self, flat: Tensor) -> Tensor:
        """The box as a view of the fragment's flat values."""
        return flat.narrow(0, self.position, prod(self.sizes)).view(self.sizes)

    def of_whole(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor that faces the box; dimensions of size 1 in `whole` broadcast.

        So for row statistics of shape [N, 1] this is the part that belongs to the rows of the box.
        """
        for dimension, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            if whole.shape[dimension] > 1:
                whole = whole.narrow(dimension, start, size)
        return whole


def boxes_of_run(shape: Sequence[int], offset: int, length: int) -> list[Box]:
    """Boxes that make up elements [offset, offset + length) of a flattened tensor, in order."""
    return _boxes(tuple(shape) or (1,), offset, length, 0)


def _boxes(shape: tuple[int, ...], offset: int, length: int, position: int) -> list[Box]:
    if length == 0:
        return []
    if len(shape) == 1:
        return [Box(position, (offset,), (length,))]
    inner = prod(shape[1:])
    first, skipped = divmod(offset, inner)
    if skipped or length < inner:  # a part of one slab of the first dimension, then the rest
        part = min(length, inner - skipped)
        slab = [
            Box(box.position, (first, *box.starts), (1, *box.sizes))
            for box in _boxes(shape[1:], skipped, part, position)
        ]
        return slab + _boxes(shape, offset + part, length - part, position + part)
    slabs = length // inner
    full = Box(position, (first,) + (0,) * (len(shape) - 1), (slabs, *shape[1:]))
    done = slabs * inner
    return [full, *_boxes(shape, offset + done, length - done, position + done)]
