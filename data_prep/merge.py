"""Several spill files read as one stream in the order of their keys, within a memory budget.

Pass 2 makes shards of that stream. Above the capacity of two passes, where every spill file holds only a few
kilobytes of a shard, `merge` first makes one long sorted file of a group of short ones: a third pass, which the
plan adds by itself. As the order is by key alone, neither the groups nor the memory can be seen in the output.
"""

from __future__ import annotations

import heapq
import json
import os
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataPrepError
from .files import atomic_file, size_or_none, write_array, write_json
from .measure import TaskMeter
from .shards import SPLITS
from .spill import (
    FRAME_INDEX,
    LOADED_OVERHEAD_BYTES,
    Records,
    SpillWriter,
    arena,
    column_kinds,
    index_path,
    load_frame,
    portions,
    sort_order,
    spill_path,
)

_LOADED_SHARE = 0.9  # the rest for what the arrays of the columns take while they are put together
_KEYS = 1 << 64


@dataclass(frozen=True)
class SpillSet:
    """Spill files `numbers` of a folder, and what their records hold."""

    folder: str
    numbers: Sequence[int]
    dtype: str
    has_words: bool
    has_origin: bool
    moved: Counter[str] = field(default_factory=Counter, compare=False)  # bytes read by this process


def sorted_records(
    spills: SpillSet, split: int, first: int, stop: int, memory_bytes: int
) -> Iterator[Records]:
    """The records of a split with keys in [first, stop) in order, in portions. Raises DataPrepError when a spill
    file is damaged or gone.
    """
    frames, owners = _overlapping_frames(spills, split, first, stop)
    for low, high in _sub_ranges(frames, spills, first, stop, int(memory_bytes * _LOADED_SHARE)):
        records = _load(spills, frames, owners, low, high)
        if len(records):
            yield from portions(records, sort_order(records.columns))


def _overlapping_frames(spills: SpillSet, split: int, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Index entries of all frames with keys of [first, stop) of the split, and the spill file of each."""
    tables, owners = [np.empty(0, dtype=FRAME_INDEX)], [np.empty(0, dtype=np.int64)]
    for spill in spills.numbers:
        path = index_path(spills.folder, spill)
        try:
            frames = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataPrepError(
                f"{path}: the index of an intermediate file is gone or damaged ({error})"
            ) from None
        for begin, end in _parts_within(frames, split, first, stop - 1):
            tables.append(np.array(frames[begin:end]))
            owners.append(np.full(end - begin, spill))
    return np.concatenate(tables), np.concatenate(owners)


def _parts_within(frames: np.ndarray, split: int, low: int, high: int) -> Iterator[tuple[int, int]]:
    """The frames [begin, end) of each run of a split that may hold keys of low .. high, by halving: of an index that
    lies on the disk only a few pages are read.
    """

    def find(field: str, value: int, begin: int, end: int, after: bool = False) -> int:
        search = bisect_right if after else bisect_left
        return search(range(end), value, begin, end, key=lambda number: int(frames[field][number]))

    begin, last = (find("split", number, 0, len(frames)) for number in (split, split + 1))
    while begin < last:
        end = find("run", int(frames["run"][begin]), begin, last, after=True)
        # In a run frames follow one another, so their first keys grow, and their last keys too.
        start, stop = find("last_key", low, begin, end), find("first_key", high, begin, end, after=True)
        if start < stop:
            yield start, stop
        begin = end


def loaded_bytes(frames: np.ndarray, has_words: bool) -> np.ndarray:
    """Memory that the records of frames take once they are loaded, int64 [frames]."""
    size = frames["raw_bytes"].astype(np.int64) + LOADED_OVERHEAD_BYTES * frames["documents"].astype(np.int64)
    return size + frames["tokens"] if has_words else size


def _sub_ranges(
    frames: np.ndarray, spills: SpillSet, first: int, stop: int, budget_bytes: int
) -> Iterator[tuple[int, int]]:
    """Cut [first, stop) at first keys of frames so that the frames of a part, with those that reach into it from the
    part before, fill at most the budget. What reaches over a cut is loaded again; where that is more than half of the
    budget, as much again begins in a part, so that nothing is read over and over. However many keys fall together, a
    range is cut as long as more than one key is left.
    """
    order = np.argsort(frames["first_key"], kind="stable")
    sizes = loaded_bytes(frames, spills.has_words)
    reaching: list[tuple[int, int]] = []  # a heap of (last key, size) of what is loaded
    begun = before = held = 0
    low = first
    for position in order.tolist():
        size = int(sizes[position])
        key = int(frames["first_key"][position])
        if begun and held + size > budget_bytes and begun >= min(before, budget_bytes) and key > low:
            yield low, key
            while reaching and reaching[0][0] < key:
                held -= heapq.heappop(reaching)[1]
            low, before, begun = key, held, 0
        heapq.heappush(reaching, (int(frames["last_key"][position]), size))
        begun, held = begun + size, held + size
    yield low, stop


def _load(spills: SpillSet, frames: np.ndarray, owners: np.ndarray, low: int, high: int) -> Records:
    """All records with keys in [low, high). One spill file is open at a time."""
    first, last = np.uint64(low), np.uint64(high - 1)
    wanted = np.flatnonzero((frames["first_key"] <= last) & (frames["last_key"] >= first))
    chosen, dtype = frames[wanted], np.dtype(spills.dtype)
    room = int(chosen["tokens"].sum(dtype=np.int64))  # for whole frames
    tokens = arena(room * dtype.itemsize).view(dtype)
    words = np.empty(room, dtype=bool) if spills.has_words else None
    spills.moved["read"] += int(chosen["bytes"].sum(dtype=np.int64))
    rows = int(chosen["documents"].sum(dtype=np.int64))
    columns = {name: np.empty(rows, dtype=kind) for name, kind in column_kinds(spills.has_origin)}
    filled = row = 0
    for spill in np.unique(owners[wanted]).tolist():
        path = spill_path(spills.folder, spill)
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                for frame in chosen[owners[wanted] == spill]:
                    records = load_frame(
                        descriptor, frame, tokens[filled:], spills.has_words, spills.has_origin
                    )
                    part, begin, end = _within(records, first, last)
                    count = end - begin
                    if begin:
                        tokens[filled : filled + count] = tokens[filled + begin : filled + end]
                    if words is not None and records.words is not None:
                        words[filled : filled + count] = records.words[begin:end]
                    taken = part.stop - part.start
                    for name, column in columns.items():
                        column[row : row + taken] = records.columns[name][part]
                    filled, row = filled + count, row + taken
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            raise DataPrepError(
                f"{path}: an intermediate file is gone or damaged ({error}); remove it and run again"
            ) from None
    columns = {name: column[:row] for name, column in columns.items()}
    return Records(columns, tokens[:filled], None if words is None else words[:filled])


def _within(records: Records, first: np.uint64, last: np.uint64) -> tuple[slice, int, int]:
    """Which records of a frame have keys in [first, last], and the tokens [begin, end) they hold; a frame is
    sorted, so they are consecutive.
    """
    key, lengths = records.columns["key"], records.columns["length"]
    if key[0] >= first and key[-1] <= last:
        return slice(0, len(key)), 0, len(records.tokens)
    begin, end = int(np.searchsorted(key, first, side="left")), int(np.searchsorted(key, last, side="right"))
    before = int(lengths[:begin].sum(dtype=np.int64))
    return slice(begin, end), before, before + int(lengths[begin:end].sum(dtype=np.int64))


@dataclass(frozen=True)
class MergeTask:
    """Make spill file `number` of `folder` out of a group of others, which results named by `upstream` belong to."""

    number: int
    spills: SpillSet
    folder: str
    run_hash: str
    upstream: str
    memory_bytes: int
    frame_bytes: int
    codec: str


def merged_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"task-{number:06d}.merged.json"


def finished_merge(task: MergeTask) -> dict[str, Any] | None:
    """The manifest of a finished merge of this run and this group of the same results, or None."""
    path = merged_path(task.folder, task.number)
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        sizes = {name: size_or_none(path.with_name(name)) for name in manifest["files"]}
        found = (manifest["run"], manifest["upstream"], manifest["group"])
    except (OSError, ValueError, KeyError):
        return None
    mine = found == (task.run_hash, task.upstream, list(task.spills.numbers))
    return manifest if mine and sizes == manifest["files"] else None


def merge(task: MergeTask) -> dict[str, Any]:
    """Run one task of the pass between; returns its manifest. Running it again gives the same records."""
    meter = TaskMeter()
    paths = [path(task.folder, task.number) for path in (spill_path, index_path)]
    with atomic_file(paths[0]) as file:
        writer = SpillWriter(file, 1024, task.frame_bytes, task.codec)
        for split in range(len(SPLITS)):
            for records in sorted_records(task.spills, split, 0, _KEYS, task.memory_bytes):
                writer.write_sorted(split, records, np.arange(len(records)))
        writer.end_run()
        index = writer.finish()
        with atomic_file(paths[1]) as table:
            write_array(table, index)
    manifest = {
        "task": task.number,
        "run": task.run_hash,
        "upstream": task.upstream,
        "group": list(task.spills.numbers),
        "files": {path.name: path.stat().st_size for path in paths},
        "read_bytes": task.spills.moved["read"],
        "written_bytes": sum(path.stat().st_size for path in paths),
        **meter.finish(),
    }
    write_json(merged_path(task.folder, task.number), manifest)
    return manifest
