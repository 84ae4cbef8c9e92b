"""Pass 2: one task makes one shard, all records of a contiguous range of keys, sorted, packed and written.

The range is read in sub-ranges that fit the memory budget, which the frame indexes tell before anything is
loaded. As the order is by key alone, neither the sub-ranges nor the memory behind them can be seen in the
bytes of the shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .dedup import Drops
from .files import atomic_file, size_or_none, write_bytes, write_json
from .keys import key_range
from .measure import TaskMeter, keep_freed_memory
from .merge import SpillSet, sorted_records
from .packing import Documents, RowPacker
from .places import place
from .shards import SPLITS, ShardWriter, index_name, shard_name, token_dtype
from .spill import ORIGIN
from .text import gather_text


@dataclass(frozen=True)
class GatherTask:
    """One shard of pass 2 and all it needs to know. file_stops: Plan.file_stops; vocab_size: 0 for
    text; upstream: names the results of pass 1 that it is made of.
    """

    split: str
    shard: int
    shards: int
    run_hash: str
    upstream: str
    tokenizer_sha256: str
    spill_folder: str
    spills: Sequence[int]
    output_folder: str
    work_folder: str
    file_stops: list[int]
    row_tokens: int
    block_rows: int
    vocab_size: int
    has_words: bool
    zstd_level: int
    memory_bytes: int
    drops: int = 0
    drops_folder: str = ""


def result_path(folder: str | Path, split: str, shard: int) -> Path:
    return Path(folder) / f"{split}-{shard:06d}.json"


def counts_path(folder: str | Path, split: str, shard: int) -> Path:
    return Path(folder) / f"{split}-{shard:06d}.counts"


def finished_gather(task: GatherTask) -> dict[str, Any] | None:
    """The manifest of a finished shard, or None: of this run, tokenizer and pass 1, and its files have the
    sizes it names.
    """
    path = result_path(task.work_folder, task.split, task.shard)
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
        found = (result["shards"], result["run"], result["upstream"], result["tokenizer"])
        complete = all(size_or_none(place(name)) == size for name, size in _sizes(task, result).items())
    except (OSError, ValueError, KeyError):
        return None
    expected = (task.shards, task.run_hash, task.upstream, task.tokenizer_sha256)
    return result if complete and found == expected else None


def gather(task: GatherTask) -> dict[str, Any]:
    """Make one shard and return its manifest; running it again gives the same bytes."""
    keep_freed_memory()
    meter = TaskMeter()
    made = _gather_tokens(task) if task.vocab_size else gather_text(task)
    result = {
        "split": task.split,
        "shards": task.shards,
        "run": task.run_hash,
        "upstream": task.upstream,
        "tokenizer": task.tokenizer_sha256,
        **made,
        **meter.finish(),
    }
    write_json(result_path(task.work_folder, task.split, task.shard), result)
    return result


def _gather_tokens(task: GatherTask) -> dict[str, Any]:
    name = shard_name(task.shard)
    path = place(task.output_folder) / task.split / name
    dtype = token_dtype(task.vocab_size)
    spills = SpillSet(task.spill_folder, task.spills, dtype.str, task.has_words, True)
    packer = RowPacker(task.row_tokens, task.block_rows)
    counts = np.zeros(task.vocab_size, dtype=np.int64)
    drops = Drops(task.drops_folder, task.drops, SPLITS.index(task.split))
    documents = tokens = 0
    with atomic_file(path) as file:
        writer = ShardWriter(file, task.split, task.shard, dtype, task.zstd_level)
        for portion in sorted_documents(task, spills, drops):
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
    return {
        "shard": {"name": name, "rows": writer.rows, "documents": documents, "tokens": tokens, **hashes},
        "index_bytes": len(index),
        "written_bytes": hashes["file_bytes"] + len(index),
        "read_bytes": spills.moved["read"],
        "dropped_sum": drops.document_sum,
    }


def sorted_documents(task: GatherTask, spills: SpillSet, drops: Drops) -> Iterator[Documents]:
    """The documents of the task's key range in order, but the duplicates, in portions that fit the memory budget."""
    first, stop = key_range(task.shard, task.shards)
    for records in drops.left_out(
        sorted_records(spills, SPLITS.index(task.split), first, stop, task.memory_bytes)
    ):
        origin = [records.columns[name] for name in ORIGIN]
        source = np.searchsorted(task.file_stops, origin[0], side="right").astype(np.uint32)
        lengths = records.columns["length"].astype(np.int64)
        yield Documents(records.tokens, records.words, lengths, np.stack([source, *origin]))


def _sizes(task: GatherTask, result: dict[str, Any]) -> dict[str, int]:
    """The files of a finished shard and their sizes."""
    shard = place(task.output_folder) / task.split / result["shard"]["name"]
    sizes = {str(shard): result["shard"]["file_bytes"]}
    if task.vocab_size:
        sizes[str(shard.with_name(index_name(shard.name)))] = result["index_bytes"]
        sizes[str(counts_path(task.work_folder, task.split, task.shard))] = task.vocab_size * 8
    return sizes
