"""Pass 2: one task makes one shard, all records of a contiguous range of keys, sorted, packed and written.

The range is read in sub-ranges that fit the memory budget, which the frame indexes tell before anything is
loaded. As the order is by key alone, neither the sub-ranges nor the memory behind them can be seen in the
bytes of the shard.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataPrepError
from .files import atomic_file, size_or_none, write_bytes, write_json
from .keys import key_range
from .packing import Documents, RowPacker, take_ranges
from .shards import SPLITS, ShardWriter, index_name, shard_name, token_dtype
from .spill import FRAME_INDEX, Records, decode_frame, index_path, sort_order, spill_path

_SORT_TOKENS = 1024 * 1024  # tokens put in order at a time; indices take 8 bytes each
# A loaded record is there decompressed, filtered and concatenated at the same time.
_COPIES = 4


@dataclass(frozen=True)
class GatherTask:
    """One shard of pass 2 and all it needs to know. source_of_file: corpus number of every file."""

    split: str
    shard: int
    shards: int
    run_hash: str
    tokenizer_sha256: str
    spill_folder: str
    spills: int
    output_folder: str
    work_folder: str
    source_of_file: list[int]
    row_tokens: int
    block_rows: int
    vocab_size: int
    has_words: bool
    zstd_level: int
    memory_bytes: int


def result_path(folder: str | Path, split: str, shard: int) -> Path:
    return Path(folder) / f"{split}-{shard:06d}.json"


def counts_path(folder: str | Path, split: str, shard: int) -> Path:
    return Path(folder) / f"{split}-{shard:06d}.counts"


def finished_gather(task: GatherTask) -> dict[str, Any] | None:
    """The manifest of a finished shard, or None: of this run and tokenizer, and its files have the sizes it
    names.
    """
    path = result_path(task.work_folder, task.split, task.shard)
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
        found = (result["shards"], result["run"], result["tokenizer"])
        complete = all(size_or_none(Path(name)) == size for name, size in _sizes(task, result).items())
    except (OSError, ValueError, KeyError):
        return None
    return result if complete and found == (task.shards, task.run_hash, task.tokenizer_sha256) else None


def gather(task: GatherTask) -> dict[str, Any]:
    """Make one shard and return its manifest; running it again gives the same bytes."""
    started, cpu_started = time.monotonic(), time.process_time()
    name = shard_name(task.shard)
    path = Path(task.output_folder) / task.split / name
    dtype = token_dtype(task.vocab_size)
    packer = RowPacker(task.row_tokens, task.block_rows)
    counts = np.zeros(task.vocab_size, dtype=np.int64)
    documents = tokens = 0
    with atomic_file(path) as file:
        writer = ShardWriter(file, task.split, task.shard, dtype, task.zstd_level)
        for portion in sorted_documents(task, dtype):
            documents += len(portion.lengths)
            tokens += len(portion.tokens)
            counts += np.bincount(portion.tokens, minlength=task.vocab_size)
            for block in packer.add(portion):
                writer.add(block)
        for block in packer.finish():
            writer.add(block)
        index, hashes = writer.finish()
    write_bytes(path.with_name(index_name(name)), index)
    write_bytes(counts_path(task.work_folder, task.split, task.shard), counts.astype("<u8").tobytes())
    result = {
        "split": task.split,
        "shards": task.shards,
        "run": task.run_hash,
        "tokenizer": task.tokenizer_sha256,
        "shard": {"name": name, "rows": writer.rows, "documents": documents, "tokens": tokens, **hashes},
        "index_bytes": len(index),
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }
    write_json(result_path(task.work_folder, task.split, task.shard), result)
    return result


def sorted_documents(task: GatherTask, dtype: np.dtype) -> Iterator[Documents]:
    """The documents of the task's key range in order, in portions that fit the memory budget."""
    first, stop = key_range(task.shard, task.shards)
    frames, owners = _overlapping_frames(task, first, stop)
    source_of_file = np.array(task.source_of_file, dtype=np.uint32)
    for low, high in _sub_ranges(frames, first, stop, task.memory_bytes // _COPIES):
        records = _load(task, frames, owners, low, high, dtype)
        if records is None:
            continue
        order = sort_order(records.columns)
        lengths = records.columns["length"][order].astype(np.int64)
        starts = (np.cumsum(records.columns["length"], dtype=np.int64) - records.columns["length"])[order]
        cuts = np.flatnonzero(np.diff(np.cumsum(lengths) // _SORT_TOKENS)) + 1
        for chosen in np.split(np.arange(len(order)), cuts):
            positions = take_ranges(starts[chosen], lengths[chosen])
            columns = [records.columns[name][order[chosen]] for name in ("file", "block", "record")]
            yield Documents(
                records.tokens[positions],
                None if records.words is None else records.words[positions],
                lengths[chosen],
                np.stack([source_of_file[columns[0]], *columns]),
            )


def _overlapping_frames(task: GatherTask, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Index entries of all frames with keys of [first, stop) of the split, and the spill file of each."""
    tables, owners = [np.empty(0, dtype=FRAME_INDEX)], [np.empty(0, dtype=np.int64)]
    low, high = np.uint64(first), np.uint64(stop - 1)
    for spill in range(task.spills):
        path = index_path(task.spill_folder, spill)
        try:
            frames = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataPrepError(
                f"{path}: the index of an intermediate file is gone or damaged ({error})"
            ) from None
        mine = frames["split"] == SPLITS.index(task.split)
        mine &= (frames["first_key"] <= high) & (frames["last_key"] >= low)
        tables.append(np.array(frames[mine]))
        owners.append(np.full(int(mine.sum()), spill))
    return np.concatenate(tables), np.concatenate(owners)


def _sub_ranges(frames: np.ndarray, first: int, stop: int, budget_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut [first, stop) at first keys of frames so that the frames that begin in a part fill at most the
    budget.
    """
    order = np.argsort(frames["first_key"], kind="stable")
    filled, low = 0, first
    for position in order.tolist():
        size = int(frames["raw_bytes"][position])
        key = int(frames["first_key"][position])
        if filled and filled + size > budget_bytes and key > low:
            yield low, key
            low, filled = key, 0
        filled += size
    yield low, stop


def _load(
    task: GatherTask, frames: np.ndarray, owners: np.ndarray, low: int, high: int, dtype: np.dtype
) -> Records | None:
    """All records with keys in [low, high), None where there are none. One spill file is open at a time."""
    first, last = np.uint64(low), np.uint64(high - 1)
    wanted = np.flatnonzero((frames["first_key"] <= last) & (frames["last_key"] >= first))
    parts: list[Records] = []
    for spill in np.unique(owners[wanted]).tolist():
        path = spill_path(task.spill_folder, spill)
        try:
            with path.open("rb") as file:
                for position in wanted[owners[wanted] == spill].tolist():
                    frame = frames[position]
                    file.seek(int(frame["offset"]))
                    records = decode_frame(file.read(int(frame["bytes"])), frame, dtype, task.has_words)
                    parts.append(_within(records, first, last))
        except (OSError, ValueError) as error:
            raise DataPrepError(
                f"{path}: an intermediate file is gone or damaged ({error}); remove it and run again"
            ) from None
    if not parts:
        return None
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    words = (
        np.concatenate([part.words for part in parts if part.words is not None]) if task.has_words else None
    )
    return Records(columns, np.concatenate([part.tokens for part in parts]), words)


def _within(records: Records, first: np.uint64, last: np.uint64) -> Records:
    """The records of a frame with keys in [first, last]; a frame is sorted, so they are consecutive."""
    key = records.columns["key"]
    begin, end = int(np.searchsorted(key, first, side="left")), int(np.searchsorted(key, last, side="right"))
    if begin == 0 and end == len(key):
        return records
    stops = np.concatenate([[0], np.cumsum(records.columns["length"], dtype=np.int64)])
    tokens = slice(int(stops[begin]), int(stops[end]))
    return Records(
        {name: column[begin:end].copy() for name, column in records.columns.items()},
        records.tokens[tokens].copy(),
        None if records.words is None else records.words[tokens].copy(),
    )


def _sizes(task: GatherTask, result: dict[str, Any]) -> dict[str, int]:
    shard = Path(task.output_folder) / task.split / result["shard"]["name"]
    return {
        str(shard): result["shard"]["file_bytes"],
        str(shard.with_name(index_name(shard.name))): result["index_bytes"],
        str(counts_path(task.work_folder, task.split, task.shard)): task.vocab_size * 8,
    }
