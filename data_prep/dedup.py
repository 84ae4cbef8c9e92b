"""Exact deduplication by content, and corpora that are repeated or thinned out by weight.

Pass 1 writes, beside the spill file, an entry for every record: the 128-bit hash of its clean text, its place and its
key. Between the passes every range of hashes is looked through by one task, and of all records with one text the one
at the smallest place (file, block, record) stays: never the one that came first. The others are told to pass 2 by
their keys, which leaves them out. Nothing but hashes moves, and tokens are not read twice.

Memory is bounded: entries are written in sorted runs, and as a record whose text the same run has already seen is
dropped at once, a text that comes a million times fills no range. Where runs end cannot be seen in the result.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
import zstandard

from .errors import DataPrepError
from .files import atomic_file, size_or_none, write_array, write_json
from .fingerprint import digest_of, document_sum, line_sum
from .keys import philox_words, share_threshold, stream_id
from .measure import TaskMeter
from .shards import SPLITS
from .spill import ORIGIN, Items, Records

# high, low: the hash. length: of the record in tokens (or bytes), 0 for one that its corpus' weight leaves out.
_ENTRY = np.dtype(
    [
        ("high", "<u8"),
        ("low", "<u8"),
        ("key", "<u8"),
        ("file", "<u4"),
        ("block", "<u4"),
        ("record", "<u4"),
        ("length", "<u4"),
        ("split", "<u4"),
    ]
)
_FRAME = np.dtype(
    [("first", "<u8"), ("last", "<u8"), ("offset", "<u8"), ("bytes", "<u8"), ("entries", "<u8")]
)
_DROP_ROWS = ("split", "key", "length")
_FRAME_ENTRIES = 8192
# A text seen takes a bytes object and its place in a set; an entry, of each copy, is there as collected and sorted.
_SEEN_BYTES, _HELD_BYTES = 110, 2 * _ENTRY.itemsize
_LOADED_COPIES = 5
_HASHES = 1 << 64


def hashes_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"task-{number:06d}.hashes"


def hashes_index_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"task-{number:06d}.hashes.npy"


def copies_of(
    seed: int, corpus: str, relative: str, block: int, first: int, count: int, weight: float
) -> np.ndarray:
    """How often raw records first .. first + count - 1 of a block are taken for a weight: its whole part, and once
    more with the probability of what is left; int64 [count].
    """
    words = philox_words(seed, stream_id("weight", corpus, relative, block), first, count)
    return int(weight) + (words < np.uint64(share_threshold(weight % 1.0))).astype(np.int64)


class HashWriter:
    """Collects the entries of a task of pass 1 and writes them in runs sorted by hash."""

    def __init__(self, file: BinaryIO, memory_bytes: int) -> None:
        self._file, self._memory_bytes = file, memory_bytes
        self._seen: set[bytes] = set()
        self._parts: list[np.ndarray] = []
        self._offset = self._held = self.entries = 0
        self._frames: list[tuple[int, ...]] = []
        self._compressor = zstandard.ZstdCompressor(level=1)

    def new(self, texts: list[bytes]) -> tuple[list[int], np.ndarray]:
        """Positions of the texts (UTF-8) that this run has not seen, and their hashes, uint64 [n, 2]."""
        self._keep_within_memory()
        seen, kept, digests = self._seen, [], []
        for position, digest in enumerate(map(xxhash.xxh3_128_digest, texts)):
            if digest not in seen:
                seen.add(digest)
                kept.append(position)
                digests.append(digest)
        return kept, np.frombuffer(b"".join(digests), dtype=">u8").astype("<u8").reshape(-1, 2)

    def add(
        self,
        hashes: np.ndarray,
        file: int,
        block: int,
        records: np.ndarray,
        keys: np.ndarray | int = 0,
        lengths: np.ndarray | int = 0,
        split: np.ndarray | int = 0,
    ) -> None:
        """An entry for each of n copies of records; without keys for records that are not taken."""
        entries = np.empty(len(hashes), dtype=_ENTRY)
        entries["high"], entries["low"] = hashes[:, 0], hashes[:, 1]
        columns = (("key", keys), ("file", file), ("block", block), ("record", records))
        for name, values in (*columns, ("length", lengths), ("split", split)):
            entries[name] = values
        self._parts.append(entries)
        self._held += len(entries)
        self.entries += len(entries)
        self._keep_within_memory()

    def finish(self) -> np.ndarray:
        """Write what is left; returns the index of the frames."""
        self._flush()
        return np.array(self._frames, dtype=_FRAME)

    def _keep_within_memory(self) -> None:
        """End the run where it is full; also within a batch, whose copies may be many times its texts."""
        if _SEEN_BYTES * len(self._seen) + _HELD_BYTES * self._held >= self._memory_bytes:
            self._flush()

    def _flush(self) -> None:
        if self._parts:
            entries = np.concatenate(self._parts)
            entries = entries[np.argsort(entries["high"], kind="stable")]
            for begin in range(0, len(entries), _FRAME_ENTRIES):
                frame = entries[begin : begin + _FRAME_ENTRIES]
                columns = b"".join(frame[name].tobytes() for name in _ENTRY.names or ())
                data = self._compressor.compress(columns)
                self._file.write(data)
                ends = int(frame["high"][0]), int(frame["high"][-1])
                self._frames.append((*ends, self._offset, len(data), len(frame)))
                self._offset += len(data)
        self._parts, self._seen, self._held = [], set(), 0


@dataclass(frozen=True)
class Selection:
    """Texts that are taken, with their record numbers [n], copies [n], and hashes [n, 2] where there is
    deduplication.
    """

    texts: list[bytes]
    records: np.ndarray
    copies: np.ndarray
    hashes: np.ndarray

    @property
    def most(self) -> int:
        return int(self.copies.max(initial=0))


def selected(
    texts: list[bytes],
    numbers: list[int],
    where: tuple[int, int, int],
    names: tuple[int, str, str],
    weight: float,
    file: int,
    writer: HashWriter | None,
    book: dict[str, Any],
) -> Selection:
    """What deduplication (so far as this run of the task knows) and weight leave of clean texts; keeps the book.

    where: block, first record and number of records of the batch. names: seed, corpus and relative name of the file.
    """
    records = np.array(numbers, dtype=np.int64)
    hashes = np.empty((0, 2), dtype=np.uint64)
    if writer is not None:
        kept, hashes = writer.new(texts)
        if len(kept) < len(texts):
            book["dropped"]["duplicate"] += len(texts) - len(kept)
            texts, records = [texts[position] for position in kept], records[kept]
    if weight == 1.0:
        return Selection(texts, records, np.ones(len(texts), dtype=np.int64), hashes)
    copies = copies_of(*names, *where, weight)[records - where[1]]
    taken = np.flatnonzero(copies)
    if len(taken) < len(texts):
        book["dropped"]["subsampled"] += len(texts) - len(taken)
        if writer is not None:
            left = np.flatnonzero(copies == 0)
            writer.add(hashes[left], file, where[0], records[left])
            hashes = hashes[taken]
        texts = [texts[position] for position in taken.tolist()]
    return Selection(texts, records[taken], copies[taken], hashes)


@dataclass(frozen=True)
class DedupTask:
    """Find the duplicates among the hashes first .. stop - 1 (their upper 64 bits) of all tasks of pass 1, whose
    results `upstream` names.
    """

    number: int
    first: int
    stop: int
    scatter_folder: str
    scatter_tasks: int
    folder: str
    run_hash: str
    upstream: str
    file_stops: list[int]  # Plan.file_stops


def dedup_tasks(
    scattered: list[dict[str, Any]],
    scatter_folder: Path,
    folder: Path,
    run_hash: str,
    file_stops: list[int],
    memory: int,
) -> list[DedupTask]:
    """As few tasks as the memory of a worker allows."""
    size = sum(result["hash_entries"] for result in scattered) * _ENTRY.itemsize * _LOADED_COPIES
    count = max(1, -(-size // memory))
    cuts = [part * _HASHES // count for part in range(count + 1)]
    same = (str(scatter_folder), len(scattered), str(folder), run_hash, digest_of(scattered), file_stops)
    return [DedupTask(n, cuts[n], cuts[n + 1], *same) for n in range(count)]


def drops_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"drops-{number:06d}.npy"


def finished_dedup(task: DedupTask) -> dict[str, Any] | None:
    """The manifest of a finished task of this run, these results of pass 1 and this range, or None."""
    path = drops_path(task.folder, task.number)
    try:
        manifest: dict[str, Any] = json.loads(path.with_suffix(".json").read_bytes())
        found = (manifest["run"], manifest["upstream"], manifest["range"], manifest["file_bytes"])
    except (OSError, ValueError, KeyError):
        return None
    expected = (task.run_hash, task.upstream, [task.first, task.stop], size_or_none(path))
    return manifest if found == expected else None


def find_duplicates(task: DedupTask) -> dict[str, Any]:
    """Write the keys of the records of a range that are not to stay; returns the manifest, whose books and splits
    correct those of pass 1.
    """
    meter = TaskMeter()
    moved: Counter[str] = Counter()
    entries = np.concatenate([np.empty(0, _ENTRY), *_entries(task, moved)])
    looked_through = len(entries)
    place = ("record", "block", "file", "low", "high")
    entries = entries[np.lexsort([entries[name] for name in place])]
    begins = np.ones(len(entries), dtype=bool)
    begins[1:] = (entries["high"][1:] != entries["high"][:-1]) | (entries["low"][1:] != entries["low"][:-1])
    first = np.flatnonzero(begins)[np.cumsum(begins) - 1]
    leaves = np.zeros(len(entries), dtype=bool)
    for name in ("file", "block", "record"):
        leaves |= entries[name] != entries[name][first]
    gone = entries[leaves]
    del entries, begins, first, leaves
    taken = gone[gone["length"] > 0]
    taken = taken[np.lexsort((taken["key"], taken["split"]))]
    drops = np.stack([taken[name].astype("<u8") for name in _DROP_ROWS])
    path = drops_path(task.folder, task.number)
    with atomic_file(path) as file:
        write_array(file, drops)
    manifest = {
        "run": task.run_hash,
        "upstream": task.upstream,
        "range": [task.first, task.stop],
        "file_bytes": size_or_none(path),
        "entries": looked_through,
        "books": _corrections(gone, task.file_stops),
        "splits": {
            split: {
                "documents": -int((taken["split"] == number).sum()),
                "tokens": -int(taken["length"][taken["split"] == number].sum(dtype=np.int64)),
                "document_sum": 0,  # pass 2 sees the documents and takes it off
            }
            for number, split in enumerate(SPLITS)
        },
        "read_bytes": moved["read"],
        "written_bytes": size_or_none(path) or 0,
        **meter.finish(),
    }
    write_json(path.with_suffix(".json"), manifest)
    return manifest


def _entries(task: DedupTask, moved: Counter[str]) -> Iterator[np.ndarray]:
    first, last = np.uint64(task.first), np.uint64(task.stop - 1)
    for number in range(task.scatter_tasks):
        path = hashes_path(task.scatter_folder, number)
        try:
            frames = np.load(hashes_index_path(task.scatter_folder, number), allow_pickle=False)
            with path.open("rb") as file:
                for frame in frames[(frames["first"] <= last) & (frames["last"] >= first)]:
                    file.seek(int(frame["offset"]))
                    data = zstandard.ZstdDecompressor().decompress(file.read(int(frame["bytes"])))
                    moved["read"] += int(frame["bytes"])
                    entries, at = np.empty(int(frame["entries"]), _ENTRY), 0
                    for name in _ENTRY.names or ():
                        entries[name] = np.frombuffer(data, _ENTRY[name], len(entries), at)
                        at += entries[name].nbytes
                    yield entries[(entries["high"] >= first) & (entries["high"] <= last)]
        except (OSError, ValueError, zstandard.ZstdError) as error:
            raise DataPrepError(
                f"{path}: an intermediate file is gone or damaged ({error}); remove it and run again"
            ) from None


def _corrections(gone: np.ndarray, file_stops: list[int]) -> dict[str, Any]:
    """What the books of pass 1 have to be changed by, for each corpus: copies that are not written after all."""
    books: dict[str, Any] = {}
    sources = np.searchsorted(file_stops, gone["file"], side="right")
    new_place = np.ones(len(gone), dtype=bool)
    new_place[1:] = np.any(
        [gone[name][1:] != gone[name][:-1] for name in ("high", "low", "file", "block", "record")], axis=0
    )
    for source in np.unique(sources).tolist():
        mine = sources == source
        records, copies = int((new_place & mine).sum()), int((mine & (gone["length"] > 0)).sum())
        thinned = int((mine & (gone["length"] == 0)).sum())
        books[str(source)] = {
            "read": 0,
            "bytes": 0,
            "written": -copies,
            "repeated": -(copies - (records - thinned)),
            "dropped": {"duplicate": records} | ({"subsampled": -thinned} if thinned else {}),
            "quarantined": {},
        }
    return books


@dataclass
class Drops:
    """Which records of a split pass 2 leaves out, and what it has left out so far. number: drop files of a folder."""

    folder: str
    number: int
    split: int
    tables: list[np.ndarray] = field(default_factory=list)
    document_sum: int = 0

    def __post_init__(self) -> None:
        for number in range(self.number):
            table = np.load(drops_path(self.folder, number), mmap_mode="r", allow_pickle=False)
            begin, end = np.searchsorted(table[0], np.array([self.split, self.split + 1], dtype=np.uint64))
            if begin < end:
                self.tables.append(table[1:, begin:end])

    def left_out(self, portions: Iterator[Records]) -> Iterator[Records]:
        """Records in the order of their keys without those that leave, whose sum is kept."""
        for records in portions:
            leaves = self._leaving(records.columns["key"], records.columns["length"])
            if leaves.any():
                gone = _take(records, np.flatnonzero(leaves))
                self.document_sum = (self.document_sum + records_sum(gone)) % (1 << 64)
                records = _take(records, np.flatnonzero(~leaves))
            if len(records):
                yield records

    def _leaving(self, keys: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        leaves = np.zeros(len(keys), dtype=bool)
        for table in self.tables:
            begin = int(np.searchsorted(table[0], keys[0], side="left"))
            end = int(np.searchsorted(table[0], keys[-1], side="right"))
            if begin < end:
                drop = table[:, begin:end]
                at = np.minimum(np.searchsorted(drop[0], keys), end - begin - 1)
                leaves |= (drop[0][at] == keys) & (drop[1][at] == lengths)
        return leaves


def records_sum(records: Records) -> int:
    """The order-independent fingerprint of documents, or of lines."""
    lengths = records.columns["length"].astype(np.int64)
    if ORIGIN[0] not in records.columns:
        return line_sum(records.tokens, lengths)
    return document_sum(records.tokens, lengths, np.stack([records.columns[name] for name in ORIGIN]))


def _take(records: Records, positions: np.ndarray) -> Records:
    lengths = records.columns["length"]
    columns = {name: column[positions] for name, column in records.columns.items()}
    words = None if records.words is None else Items(records.words, lengths).take(positions)
    return Records(columns, Items(records.tokens, lengths).take(positions), words)


def repeated(records: Records, chosen: np.ndarray, keys: np.ndarray) -> Records:
    """Another copy of the records at positions `chosen`, with keys of its own."""
    copy = _take(records, chosen)
    return Records(copy.columns | {"key": keys}, copy.tokens, copy.words)
