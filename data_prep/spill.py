"""The intermediate file between the passes: records sorted by key, in frames that an index can find.

A map task writes one spill file, a sequence of frames, and an index with the key range of every frame, so
that pass 2 reads any range of keys with a few range reads. Memory is bounded in bytes: when the budget is
full, what is there is sorted and written as a run, and the task goes on.

A record is a row of columns and a payload: the ids of a document, or the bytes of a line. Payloads are put in
order by `pyarrow.take`, one memcpy a record, which costs short lines no Python object and no index per byte.

Frame: key u64 [n], then the other columns u32 [n], payload [T], word starts as packed bits; stored plain, or
behind lz4 or zstd-1 as a whole. Shapes: n records, T tokens (or bytes).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute  # by `take`, which would load it with the first task and make that look large
import xxhash
import zstandard

from .shards import SPLITS

CODECS = ("none", "lz4", "zstd")
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
        ("split", "<u2"),
        ("codec", "<u2"),
    ]
)
ORIGIN = ("file", "block", "record")
# What a record takes while a run is sorted and written, beside its payload: its columns twice, its place in the
# order, and its offsets.
RECORD_OVERHEAD_BYTES = 72
# A line of text output has no lineage; its key and length are all that travels with it.
TEXT_OVERHEAD_BYTES = 48
# Beside its payload, a record that is loaded again takes its columns, its place in the order and its offset.
LOADED_OVERHEAD_BYTES = 56
_SORT_BYTES = 2 * 1024**2  # payload put in order at a time


@dataclass
class Records:
    """n records in columns (key uint64, length uint32, and where they come from); payloads of all in a row
    [T], word starts bool [T] or None.
    """

    columns: dict[str, np.ndarray]
    tokens: np.ndarray
    words: np.ndarray | None

    def __len__(self) -> int:
        return len(self.columns["key"])


class Items:
    """Payloads of different lengths behind one another, to be taken in any order."""

    def __init__(self, values: np.ndarray, lengths: np.ndarray) -> None:
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, dtype=np.int64, out=offsets[1:])
        offsets *= values.itemsize
        self._dtype = values.dtype
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(values)]
        self._array = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(lengths), buffers)

    def take(self, order: np.ndarray) -> np.ndarray:
        """The payloads at positions `order`, in a row; a copy."""
        if not len(order):
            return np.empty(0, dtype=self._dtype)
        _, offsets, data = self._array.take(pa.array(order)).buffers()
        stop = int(np.frombuffer(offsets, np.int64, len(order) + 1)[-1])
        if not stop:
            return np.empty(0, dtype=self._dtype)
        return np.frombuffer(data, self._dtype, stop // self._dtype.itemsize)


def portions(
    records: Records, order: np.ndarray, portion_bytes: int | None = None, record_bytes: int = 0
) -> Iterator[Records]:
    """The records at positions `order`, in that order, in portions of about `portion_bytes` of payload, and
    `record_bytes` for each record.
    """
    portion_bytes = portion_bytes or _SORT_BYTES
    lengths = records.columns["length"]
    tokens = Items(records.tokens, lengths)
    words = None if records.words is None else Items(records.words, lengths)
    filled = np.cumsum(lengths[order], dtype=np.int64) * records.tokens.itemsize
    filled += record_bytes * np.arange(1, len(order) + 1)
    # A record that is larger than a portion goes alone.
    cuts = np.flatnonzero(np.diff(filled // portion_bytes)) + 1
    for chosen in np.split(order, cuts) if len(order) else []:
        columns = {name: column[chosen] for name, column in records.columns.items()}
        yield Records(columns, tokens.take(chosen), None if words is None else words.take(chosen))


_arena = np.empty(0, dtype=np.uint8)


def arena(size_bytes: int) -> np.ndarray:
    """Memory for the payload of what a task holds, uint8 [size_bytes]. A process has one, which the next task takes
    over: fresh pages cost more than what is done with them.
    """
    global _arena
    if len(_arena) < size_bytes:
        _arena = np.empty(0, dtype=np.uint8)  # gone before the larger one comes
        _arena = np.empty(size_bytes, dtype=np.uint8)  # pages are only taken when they are written
    return _arena[:size_bytes]


def sort_order(columns: dict[str, np.ndarray]) -> np.ndarray:
    """The order of the output, int64 [n]: by key; ties, which are next to impossible, by file (which stands for
    the source too), block and record, or by place where records carry no origin.
    """
    order = np.argsort(columns["key"])
    sorted_keys = columns["key"][order]
    if np.any(sorted_keys[1:] == sorted_keys[:-1]):
        ties = [columns[name] for name in reversed(ORIGIN) if name in columns]
        order = np.lexsort((*ties, columns["key"]))
    return order


def column_kinds(has_origin: bool) -> tuple[tuple[str, str], ...]:
    """Names and dtypes of the columns of a frame, in order."""
    names = ("length", *ORIGIN) if has_origin else ("length",)
    return (("key", "<u8"), *((name, "<u4") for name in names))


def spill_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"task-{number:06d}.spill"


def index_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"task-{number:06d}.index.npy"


class SpillWriter:
    """Collects records up to a budget, then writes them as a run of frames sorted by split and key."""

    def __init__(self, file: BinaryIO, budget_bytes: int, frame_bytes: int, codec: str) -> None:
        self._file, self._budget_bytes, self._frame_bytes = file, budget_bytes, frame_bytes
        self._codec = CODECS.index(codec)
        self._compress = _compressor(codec)
        self._payload: np.ndarray | None = None
        self._words: np.ndarray | None = None
        self._dtype = np.dtype(np.uint8)
        self._columns: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
        self._used_bytes = self._filled_bytes = self._offset = self.runs = 0
        self._frames: list[tuple[Any, ...]] = []
        self.raw_bytes = 0

    def add(self, records: Records, split: np.ndarray) -> None:
        """Take records, each with the number of its split; writes a run first when they do not fit any more."""
        payload = np.ascontiguousarray(records.tokens).view(np.uint8)
        overhead = RECORD_OVERHEAD_BYTES if ORIGIN[0] in records.columns else TEXT_OVERHEAD_BYTES
        words = 0 if records.words is None else len(records.words)
        size = len(payload) + words + overhead * len(records)
        if self._used_bytes + size > self._budget_bytes:
            self.flush()
            if size > self._budget_bytes:  # larger than the budget by itself: a run of its own, not copied
                self._write_run(records, split)
                return
        self._dtype = records.tokens.dtype
        if self._payload is None:
            self._payload = arena(self._budget_bytes)
        begin = self._filled_bytes
        self._payload[begin : begin + len(payload)] = payload
        if records.words is not None:
            if self._words is None:
                self._words = np.empty(self._budget_bytes // self._dtype.itemsize, dtype=bool)
            start = begin // self._dtype.itemsize
            self._words[start : start + words] = records.words
        self._columns.append((records.columns, split))
        self._filled_bytes += len(payload)
        self._used_bytes += size

    def finish(self) -> np.ndarray:
        """Write what is left; returns the index of frames [FRAME_INDEX]."""
        self.flush()
        frames = np.array(self._frames, dtype=FRAME_INDEX)
        return frames[np.lexsort((frames["first_key"], frames["run"], frames["split"]))]

    def flush(self) -> None:
        """Write what is there as a run."""
        if not self._columns:
            return
        parts, self._columns = self._columns, []
        columns = {name: np.concatenate([part[name] for part, _ in parts]) for name in parts[0][0]}
        split = np.concatenate([number for _, number in parts])
        del parts
        assert self._payload is not None
        tokens = self._payload[: self._filled_bytes].view(self._dtype)
        words = None if self._words is None else self._words[: len(tokens)]
        self._write_run(Records(columns, tokens, words), split)
        self._used_bytes = self._filled_bytes = 0

    def _write_run(self, records: Records, split: np.ndarray) -> None:
        order = sort_order(records.columns)
        for number in range(len(SPLITS)):
            self.write_sorted(
                number, records, order[split[order] == number] if split.any() or number else order
            )
        self.end_run()

    def write_sorted(self, split: int, records: Records, order: np.ndarray) -> None:
        """Append the records at positions `order` to the run as frames; they must follow what it holds."""
        for portion in portions(records, order, self._frame_bytes, LOADED_OVERHEAD_BYTES):
            self._write(split, portion)

    def end_run(self) -> None:
        """What comes next starts from the smallest key again."""
        self.runs += 1

    def _write(self, split: int, records: Records) -> None:
        kinds = column_kinds(ORIGIN[0] in records.columns)
        parts = [np.ascontiguousarray(records.columns[name], dtype=kind) for name, kind in kinds]
        parts.append(records.tokens)
        if records.words is not None:
            parts.append(np.packbits(records.words))
        views = [part.view(np.uint8).data for part in parts]
        raw_bytes = sum(map(len, views))
        stored = [self._compress(b"".join(views))] if self._codec else views
        checksum = xxhash.xxh3_64()
        for data in stored:
            checksum.update(data)
            self._file.write(data)
        key, stored_bytes = records.columns["key"], sum(map(len, stored))
        sizes = (self._offset, stored_bytes, raw_bytes, checksum.intdigest())
        counts = (len(key), len(records.tokens), self.runs, split, self._codec)
        self._frames.append((key[0], key[-1], *sizes, *counts))
        self._offset += stored_bytes
        self.raw_bytes += raw_bytes


def decode_frame(
    data: bytes, frame: np.void, dtype: np.dtype, has_words: bool, has_origin: bool = True
) -> Records:
    """The records of a frame. Raises ValueError when it is damaged."""
    if xxhash.xxh3_64_intdigest(data) != int(frame["xxh3"]):
        raise ValueError("checksum differs from the index")
    raw = _decompress(data, CODECS[int(frame["codec"])], int(frame["raw_bytes"]))
    columns, offset, n = {}, 0, int(frame["documents"])
    for name, kind in column_kinds(has_origin):
        columns[name] = np.frombuffer(raw, kind, n, offset)
        offset += columns[name].nbytes
    tokens = np.frombuffer(raw, dtype, int(frame["tokens"]), offset)
    words = None
    if has_words:
        bits = np.frombuffer(raw, np.uint8, offset=offset + tokens.nbytes)
        words = np.unpackbits(bits, count=len(tokens)).view(bool)
    return Records(columns, tokens, words)


def load_frame(
    descriptor: int, frame: np.void, room: np.ndarray, has_words: bool, has_origin: bool = True
) -> Records:
    """The records of a frame, their payload at the beginning of `room`: read to there where it lies plain in the file,
    so that it is not copied. Raises ValueError when the frame is damaged.
    """
    tokens = room[: int(frame["tokens"])]
    if CODECS[int(frame["codec"])] != "none":
        records = decode_frame(read_frame(descriptor, frame), frame, room.dtype, has_words, has_origin)
        tokens[:] = records.tokens
        return Records(records.columns, tokens, records.words)
    kinds, n = column_kinds(has_origin), int(frame["documents"])
    columns = {name: np.empty(n, dtype=kind) for name, kind in kinds}
    bits = np.empty(-(-len(tokens) // 8) if has_words else 0, dtype=np.uint8)
    buffers = [part.view(np.uint8).data for part in (*columns.values(), tokens, bits)]
    if os.preadv(descriptor, buffers, int(frame["offset"])) != int(frame["bytes"]):
        raise ValueError("truncated")
    checksum = xxhash.xxh3_64()
    for buffer in buffers:
        checksum.update(buffer)
    if checksum.intdigest() != int(frame["xxh3"]):
        raise ValueError("checksum differs from the index")
    return Records(columns, tokens, np.unpackbits(bits, count=len(tokens)).view(bool) if has_words else None)


def read_frame(descriptor: int, frame: np.void) -> bytes:
    """The stored bytes of a frame. Raises ValueError when the file ends before."""
    data = os.pread(descriptor, int(frame["bytes"]), int(frame["offset"]))
    if len(data) != int(frame["bytes"]):
        raise ValueError("truncated")
    return data


def _compressor(codec: str) -> Any:
    if codec == "zstd":
        return zstandard.ZstdCompressor(level=1).compress
    if codec == "lz4":
        lz4 = pa.Codec("lz4")
        return lambda raw: lz4.compress(raw, asbytes=True)
    return None


def _decompress(data: bytes, codec: str, raw_bytes: int) -> bytes:
    if codec == "zstd":
        return zstandard.ZstdDecompressor().decompress(data)
    if codec == "lz4":
        raw: bytes = pa.Codec("lz4").decompress(data, raw_bytes, asbytes=True)
        return raw
    return data
