"""Where the row and column statistics of each tensor lie, and how a fragment runs through rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from ..fragments import Fragment, FragmentMap

State = list[Tensor] | list[Tensor | None] | None
"""One kind of optimizer state: flat fp32 values of every fragment, None where a fragment has none."""


@dataclass(frozen=True)
class Factors:
    """Row and column statistics of one tensor, in two flat arrays that hold those of all tensors end to end.

    Row statistics have the shape of the tensor with the column dimension 1, and the other way round.
    """

    tensor: int
    shape: tuple[int, ...]
    row: int
    column: int
    row_start: int
    column_start: int

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(1 if d == self.column else size for d, size in enumerate(self.shape))

    @property
    def column_shape(self) -> tuple[int, ...]:
        return tuple(1 if d == self.row else size for d, size in enumerate(self.shape))

    def rows(self, flat: Tensor) -> Tensor:
        """View of this tensor's row statistics."""
        return flat.narrow(0, self.row_start, prod(self.row_shape)).view(self.row_shape)

    def columns(self, flat: Tensor) -> Tensor:
        """View of this tensor's column statistics."""
        return flat.narrow(0, self.column_start, prod(self.column_shape)).view(self.column_shape)


@dataclass(frozen=True)
class Layout:
    """The fragments of a process, and the factors of every tensor (None: not factored), by tensor index."""

    fragments: list[Fragment]
    buffers: list[Tensor]
    buffer_of: list[int]
    """Index of the buffer that each fragment lies in."""
    factors: list[Factors | None]
    rows: int
    """Length of the flat array of row statistics."""
    columns: int

    @classmethod
    def of(cls, fragments: FragmentMap, pairs: Sequence[tuple[int, int] | None]) -> Layout:
        """pairs: (row dimension < column dimension), or None, of all tensors of the model, in order."""
        factors: list[Factors | None] = []
        rows = columns = 0
        for tensor, (shape, pair) in enumerate(zip(fragments.shapes.values(), pairs, strict=True)):
            if pair is None:
                factors.append(None)
                continue
            own = Factors(tensor, tuple(shape), *pair, rows, columns)
            factors.append(own)
            rows, columns = rows + prod(own.row_shape), columns + prod(own.column_shape)
        index = {id(buffer): position for position, buffer in enumerate(fragments.buffers)}
        buffer_of = [index[id(fragment.buffer)] for fragment in fragments.fragments]
        return cls(fragments.fragments, fragments.buffers, buffer_of, factors, rows, columns)

    @property
    def factored(self) -> list[Factors]:
        return [factors for factors in self.factors if factors is not None]
