"""Which documents a row of a prepared data set is made of, and where each comes from."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.shards import PIECE_COLUMNS, Block, Manifest, ShardError, ShardReader, SplitReader
from sutrain.remote import Remote


@dataclass(frozen=True)
class Piece:
    """The part of a document inside one row: `start`, `length` in tokens; `source` … `record` name the document in
    the raw files (docs/data_format.md), `piece` counts its parts."""

    start: int
    length: int
    source: int
    file: int
    block: int
    record: int
    piece: int


class PieceReader:
    """Random access to the pieces of the rows of one split, by row number in disk order. Raises ShardError."""

    def __init__(
        self, directory: str | Path, split: str, cached_blocks: int = 16, remote: Remote | None = None
    ) -> None:
        """remote: where the shards come from when they are not in `directory`."""
        self.manifest = Manifest.load(directory)
        if split not in self.manifest.splits:
            raise ShardError(f"{directory}: no split {split!r}; there are {', '.join(self.manifest.splits)}")
        rows = SplitReader(directory, split) if remote is None else remote.reader(split)
        self._open = rows.open_shard
        self._entries = self.manifest.splits[split].shards
        self._stops = np.cumsum([entry.rows for entry in self._entries], dtype=np.int64)
        self._shards: dict[int, ShardReader] = {}
        self._blocks: OrderedDict[tuple[int, int], Block] = OrderedDict()
        self._cached_blocks = cached_blocks

    def row(self, number: int) -> tuple[np.ndarray, list[Piece]]:
        """(tokens [L], pieces in order) of one row. Raises IndexError outside of the split."""
        if not 0 <= number < (int(self._stops[-1]) if len(self._stops) else 0):
            raise IndexError(f"row {number} of {int(self._stops[-1]) if len(self._stops) else 0}")
        shard = int(np.searchsorted(self._stops, number, side="right"))
        inside = number - int(self._stops[shard]) + self._entries[shard].rows
        if shard not in self._shards:
            self._shards[shard] = self._open(self._entries[shard])
        reader = self._shards[shard]
        block_number = int(np.searchsorted(reader.first_rows, inside, side="right")) - 1
        block = self._block(shard, block_number)
        row = inside - int(reader.first_rows[block_number])
        mine = block.pieces[:, block.pieces[PIECE_COLUMNS.index("row")] == row]
        pieces = [
            Piece(**dict(zip(PIECE_COLUMNS[1:], map(int, column[1:]), strict=True))) for column in mine.T
        ]
        return block.tokens_NL[row], sorted(pieces, key=lambda piece: piece.start)

    def _block(self, shard: int, number: int) -> Block:
        key = (shard, number)
        if key not in self._blocks:
            self._blocks[key] = self._shards[shard].read(number)
            if len(self._blocks) > self._cached_blocks:
                self._blocks.popitem(last=False)
        return self._blocks[key]
