"""Packing documents into rows: concatenated in key order and cut every L tokens, so nothing is padded or
lost inside.

A document is [CLS] t1 … tn [SEP]. A piece is the part of a document inside one row. Only the last row of a
shard is padded. Packing sees a stream of documents in whatever portions memory allows; the blocks do not
depend on the portions.

Shapes: T tokens, n documents, N rows, L row length, P pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .shards import SPECIAL_IDS, Block


@dataclass(frozen=True)
class Documents:
    """n documents: ids of all in a row [T], word starts bool [T] or None, tokens of each [n], and where
    each comes from: source, file, block, record, uint32 [4, n].
    """

    tokens: np.ndarray
    word_starts: np.ndarray | None
    lengths: np.ndarray
    origin: np.ndarray


class RowPacker:
    """Turns documents into blocks of `block_rows` rows of `row_tokens` tokens."""

    def __init__(self, row_tokens: int, block_rows: int) -> None:
        self._row_tokens, self._block_rows = row_tokens, block_rows
        self._tokens: list[np.ndarray] = []
        self._words: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._origins: list[np.ndarray] = []
        self._pending = 0
        self._before_first = 0  # tokens of the first pending document that went into earlier blocks

    def add(self, documents: Documents) -> Iterator[Block]:
        """Take documents and yield the blocks that are full."""
        self._tokens.append(documents.tokens)
        if documents.word_starts is not None:
            self._words.append(documents.word_starts)
        self._lengths.append(np.asarray(documents.lengths, dtype=np.int64))
        self._origins.append(documents.origin)
        self._pending += len(documents.tokens)
        block_tokens = self._row_tokens * self._block_rows
        if self._pending >= block_tokens:
            yield from self._cut(self._pending // block_tokens * block_tokens)

    def finish(self) -> Iterator[Block]:
        """Yield what is left, the last row padded."""
        if self._pending:
            yield from self._cut(self._pending)

    def _cut(self, taken: int) -> Iterator[Block]:
        """Yield the first `taken` pending tokens as blocks and keep the rest."""
        tokens = np.concatenate(self._tokens)
        words = np.concatenate(self._words) if self._words else None
        lengths, origin = np.concatenate(self._lengths), np.concatenate(self._origins, axis=1)
        # Documents as intervals of the pending stream; the first may have begun in an earlier block.
        stops = np.cumsum(lengths) - self._before_first
        starts = stops - lengths
        block_tokens = self._row_tokens * self._block_rows
        for begin in range(0, taken, block_tokens):
            end = min(begin + block_tokens, taken)
            first = int(np.searchsorted(stops, begin, side="right"))
            last = int(np.searchsorted(starts, end, side="left"))
            pieces = self._pieces(starts[first:last] - begin, end - begin, origin[:, first:last])
            yield Block(
                self._rows(tokens[begin:end], SPECIAL_IDS["[PAD]"]),
                None if words is None else np.packbits(self._rows(words[begin:end], False)),
                pieces,
            )
        keep = int(np.searchsorted(stops, taken, side="right"))
        self._before_first = int(taken - starts[keep]) if keep < len(starts) else 0
        self._tokens = [tokens[taken:].copy()]
        self._words = [words[taken:].copy()] if words is not None else []
        self._lengths, self._origins = [lengths[keep:]], [origin[:, keep:]]
        self._pending -= taken

    def _rows(self, flat: np.ndarray, padding: int | bool) -> np.ndarray:
        missing = -len(flat) % self._row_tokens
        return np.pad(flat, (0, missing), constant_values=padding).reshape(-1, self._row_tokens)

    def _pieces(self, starts: np.ndarray, filled: int, origin: np.ndarray) -> np.ndarray:
        """The table of pieces, uint32 [8, P], of a block with `filled` tokens in which documents start at
        `starts` (negative: in an earlier block).
        """
        length = self._row_tokens
        begins = np.union1d(np.maximum(starts, 0), np.arange(0, filled, length))
        owners = np.searchsorted(starts, begins, side="right") - 1
        rows = begins // length
        pieces = np.empty((8, len(begins)), dtype=np.uint32)
        pieces[0], pieces[1] = rows, begins % length
        pieces[2] = np.diff(begins, append=filled)
        pieces[3:7] = origin[:, owners]
        pieces[7] = rows - starts[owners] // length
        return pieces
