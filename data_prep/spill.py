"""The intermediate file between the passes: records sorted by key, in frames that an index can find.

A map task writes one spill file, a sequence of frames, and an index with the key range of every frame, so
that pass 2 reads any range of keys with a few range reads. Memory is bounded: when the budget is full, what
is there is sorted and written as a run, and the task goes on.

Frame (zstd-1 over): key u64 [n], file, block, record, tokens of each u32 [n], ids [T],
word starts as packed bits. Shapes: n records, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
import zstandard

from .packing import take_ranges
from .shards import SPLITS

FRAME_TOKENS = 128 * 1024
# Sorted by (split, run, key). bytes: in the spill file, raw_bytes: after decompression.
FRAME_INDEX = np.dtype(
    [
        ("first_key", "<u8"),
        ("last_key", "<u8"),
        ("offset", "<u8"),
        ("bytes", "<u8"),
        ("raw_bytes", "<u8"),
        ("xxh3", "<u8"),
        ("documents", "<u4"),
        ("tokens", "<u4"),
        ("run", "<u4"),
        ("split", "<u4"),
    ]
)
_COLUMNS = (
    ("key", "<u8"),
    ("file", "<u4"),
    ("block", "<u4"),
    ("record", "<u4"),
    ("length", "<u4"),
)
_RECORD_BYTES = sum(np.dtype(kind).itemsize for _, kind in _COLUMNS)


@dataclass
class Records:
    """n tokenised records in columns; tokens of all in a row [T], word starts bool [T] or None."""

    columns: dict[str, np.ndarray]
    tokens: np.ndarray
    words: np.ndarray | None

    @property
    def memory_bytes(self) -> int:
        words = 0 if self.words is None else len(self.words)
        return len(self.columns["key"]) * _RECORD_BYTES + self.tokens.nbytes + words


def spill_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"task-{number:06d}.spill"


def index_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"task-{number:06d}.index.npy"


class SpillWriter:
    """Collects records up to a budget, then writes them as a run of frames sorted by split and key."""

    def __init__(self, file: BinaryIO, budget_bytes: int) -> None:
        self._file, self._budget_bytes = file, budget_bytes
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._parts: list[tuple[Records, np.ndarray]] = []
        self._used_bytes = self._offset = self._runs = 0
        self._frames: list[tuple[Any, ...]] = []

    def add(self, records: Records, split: np.ndarray) -> None:
        self._parts.append((records, split))
        self._used_bytes += records.memory_bytes
        if self._used_bytes >= self._budget_bytes:
            self._flush()

    def finish(self) -> np.ndarray:
        """Write what is left; returns the index of frames [FRAME_INDEX]."""
        self._flush()
        frames = np.array(self._frames, dtype=FRAME_INDEX)
        return frames[np.lexsort((frames["first_key"], frames["run"], frames["split"]))]

    def _flush(self) -> None:
        if not self._parts:
            return
        records = [part for part, _ in self._parts]
        split = np.concatenate([number for _, number in self._parts])
        columns = {name: np.concatenate([r.columns[name] for r in records]) for name, _ in _COLUMNS}
        tokens = np.concatenate([r.tokens for r in records])
        words = (
            None
            if records[0].words is None
            else np.concatenate([r.words for r in records if r.words is not None])
        )
        self._parts = []
        starts = np.cumsum(columns["length"], dtype=np.int64) - columns["length"]
        for number in range(len(SPLITS)):
            chosen = np.flatnonzero(split == number)
            chosen = chosen[sort_order({name: column[chosen] for name, column in columns.items()})]
            before = np.cumsum(columns["length"][chosen], dtype=np.int64) - columns["length"][chosen]
            cuts = np.flatnonzero(np.diff(before // FRAME_TOKENS, prepend=-1))
            for frame in np.split(chosen, cuts[1:]) if len(chosen) else []:
                positions = take_ranges(starts[frame], columns["length"][frame].astype(np.int64))
                part = {name: column[frame] for name, column in columns.items()}
                self._write(
                    number, Records(part, tokens[positions], None if words is None else words[positions])
                )
        self._runs += 1
        self._used_bytes = 0

    def _write(self, split: int, records: Records) -> None:
        raw = b"".join(records.columns[name].astype(kind, copy=False).tobytes() for name, kind in _COLUMNS)
        raw += records.tokens.tobytes()
        if records.words is not None:
            raw += np.packbits(records.words).tobytes()
        data = self._compressor.compress(raw)
        self._file.write(data)
        key = records.columns["key"]
        sizes = (self._offset, len(data), len(raw), xxhash.xxh3_64_intdigest(data))
        self._frames.append((key[0], key[-1], *sizes, len(key), len(records.tokens), self._runs, split))
        self._offset += len(data)


def decode_frame(data: bytes, frame: np.void, dtype: np.dtype, has_words: bool) -> Records:
    """The records of a frame. Raises ValueError when it is damaged."""
    if xxhash.xxh3_64_intdigest(data) != int(frame["xxh3"]):
        raise ValueError("checksum differs from the index")
    raw = zstandard.ZstdDecompressor().decompress(data)
    columns, offset, n = {}, 0, int(frame["documents"])
    for name, kind in _COLUMNS:
        columns[name] = np.frombuffer(raw, kind, n, offset)
        offset += columns[name].nbytes
    tokens = np.frombuffer(raw, dtype, int(frame["tokens"]), offset)
    words = None
    if has_words:
        bits = np.frombuffer(raw, np.uint8, offset=offset + tokens.nbytes)
        words = np.unpackbits(bits, count=len(tokens)).view(bool)
    return Records(columns, tokens, words)


def sort_order(columns: dict[str, np.ndarray]) -> np.ndarray:
    """The order of the output: by key, ties by file (which stands for the source too), block and record."""
    return np.lexsort((columns["record"], columns["block"], columns["file"], columns["key"]))
