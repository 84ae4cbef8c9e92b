"""Rows as readers hand them out: what is not asked for is not made.

Shapes: N rows, L row length, P document pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Block:
    """N rows of a shard with their document pieces; also what a webdataset sample decodes to."""

    tokens_NL: np.ndarray  # uint16 or uint32, as the shards have them
    word_bits: np.ndarray | None  # uint8, a bit for each token as np.packbits has them: does a word begin?
    pieces: np.ndarray  # uint32 [8, P], see PIECE_COLUMNS of shards.py

    @cached_property
    def word_start_NL(self) -> np.ndarray | None:  # noqa: N802
        """Where words begin, bool."""
        if self.word_bits is None:
            return None
        bits = np.unpackbits(self.word_bits, count=self.tokens_NL.size)
        return bits.reshape(self.tokens_NL.shape).view(bool)

    @cached_property
    def document_NL(self) -> np.ndarray:  # noqa: N802
        """Which document piece of its row a token belongs to, see `document_numbers`."""
        return document_numbers(self)


class RowBatch:
    """Rows in the order they were asked for, taken out of their blocks when looked at: tokens [N, L] in the integers of
    the shards (uint16 or uint32, to read only), word starts bool [N, L] or None, document numbers int64 [N, L] (0 is
    padding, k the k-th document piece inside the row).
    """

    def __init__(self, parts: Sequence[tuple[Block, slice | np.ndarray]], order: np.ndarray | None = None):
        """parts: rows of blocks, one behind the other; order: where in that sequence each row of the batch is."""
        self._parts, self._order = parts, order

    @property
    def tokens_NL(self) -> np.ndarray:  # noqa: N802
        parts = [block.tokens_NL[rows] for block, rows in self._parts]
        return parts[0] if len(parts) == 1 and self._order is None else self._joined(parts, parts[0].dtype)

    @property
    def word_start_NL(self) -> np.ndarray | None:  # noqa: N802
        words = [block.word_start_NL[rows] for block, rows in self._parts if block.word_start_NL is not None]
        return self._joined(words, np.bool_) if words else None

    @property
    def document_NL(self) -> np.ndarray:  # noqa: N802
        return self._joined([block.document_NL[rows] for block, rows in self._parts], np.int64)

    def _joined(self, parts: list[np.ndarray], dtype: np.typing.DTypeLike) -> np.ndarray:
        joined: np.ndarray = parts[0].astype(dtype) if len(parts) == 1 else np.concatenate(parts, dtype=dtype)
        return joined if self._order is None else joined[self._order]


def document_numbers(block: Block) -> np.ndarray:
    """int32 [N, L]: 0 for padding, k for the k-th document piece inside the row."""
    row, length = (block.pieces[i].astype(np.int64) for i in (0, 2))
    rows, row_tokens = block.tokens_NL.shape
    first_piece = np.searchsorted(row, np.arange(rows))
    number = (np.arange(len(row)) - first_piece[row] + 1).astype(np.int32)
    # Pieces are in order and without gaps between them; what is left of a row behind its last one is padding.
    filled = np.bincount(row, weights=length, minlength=rows).astype(np.int64)
    ends = np.cumsum(np.bincount(row, minlength=rows))
    values = np.insert(number, ends, 0)
    lengths = np.insert(length, ends, row_tokens - filled)
    return np.repeat(values, lengths).reshape(rows, row_tokens)
