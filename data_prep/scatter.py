"""Pass 1: read, clean, tokenise and key the records of one task, and spill them sorted by key.

Text is tokenised before it is moved: tokens take half the bytes. Every record read is written, dropped for
a counted reason, or quarantined with file, offset and reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .clean import make_cleaner
from .config import CleaningSection
from .dedup import HashWriter, hashes_index_path, hashes_path, repeated, selected
from .errors import DataPrepError
from .files import atomic_file, size_or_none, write_array, write_json
from .fingerprint import document_hashes, line_hashes
from .keys import share_threshold
from .measure import TaskMeter, boot_id, keep_freed_memory
from .memory import records_bytes
from .quarantine import Quarantine, cuts
from .records import Segment, clean_texts, new_book, record_keys, segment_bytes
from .shards import SPLITS, token_dtype
from .sources import FileChangedError, RawBatch, read_batches
from .spill import ORIGIN, Records, SpillWriter, index_path, spill_path
from .text import is_plain_text, read_lines, text_records
from .tokenizer import AnyTokenizer, Tokenizer, load_tokenizer
from .words import word_start_characters

_ENCODE_BYTES = 1024**2
_LONG_CHARACTERS = 32 * 1024
_HASH_SHARE = 0.2  # of what a worker fills with records, with deduplication


@dataclass(frozen=True)
class ScatterTask:
    """One task of pass 1 and all it needs to know. Without a tokenizer_path it moves text; `as_it_is` says that
    cleaning changes no ordinary line.
    """

    number: int
    segments: list[Segment]
    folder: str
    run_hash: str
    seed: int
    cleaning: CleaningSection
    tokenizer_path: str
    tokenizer_sha256: str
    segmenter: str
    validation_share: float
    memory_bytes: int
    frame_bytes: int
    codec: str
    as_it_is: bool = False
    deduplicate: bool = False
    sync: bool = True  # without it the files are only good as long as the machine runs
    algorithm: str = "key"


def manifest_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"task-{number:06d}.json"


def quarantine_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"task-{number:06d}.quarantine.jsonl"


def finished_scatter(task: ScatterTask) -> dict[str, Any] | None:
    """The manifest of a finished task, or None: it is committed last, must be of this run and this tokenizer,
    and the data must have the sizes it names.
    """
    path = manifest_path(task.folder, task.number)
    if not path.exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        mine = (manifest["run"], manifest["tokenizer"]) == (task.run_hash, task.tokenizer_sha256)
        mine &= manifest["boot"] in ("", boot_id())
        # A file that had changed and is whole again is read again.
        mine = mine and not any("file_changed" in book["quarantined"] for book in manifest["books"].values())
        sizes = {name: size_or_none(path.with_name(name)) for name in manifest["files"]}
    except (OSError, ValueError, KeyError):
        return None
    return manifest if mine and sizes == manifest["files"] else None


def scatter(task: ScatterTask) -> dict[str, Any]:
    """Run one task of pass 1 and return its manifest. Running it again gives the same records in the same
    order. A file that changed under its hands is quarantined when the task begins anew.
    """
    while True:
        try:
            return _scatter(task)
        except FileChangedError:
            continue


def _scatter(task: ScatterTask) -> dict[str, Any]:
    folder = Path(task.folder)
    tokenizer = load_tokenizer(task.tokenizer_path, task.tokenizer_sha256) if task.tokenizer_path else None
    keep_freed_memory()
    meter = TaskMeter()
    books = {str(segment.input.corpus): new_book() for segment in task.segments}
    sums = {split: {"documents": 0, "tokens": 0, "document_sum": 0} for split in SPLITS}
    cut_short: list[int] = []
    budget = records_bytes(task.memory_bytes, task.cleaning.max_record_bytes)
    hash_bytes = int(budget * _HASH_SHARE) if task.deduplicate else 0
    kinds: tuple[Callable[[str | Path, int], Path], ...] = (spill_path, index_path, quarantine_path)
    kinds += (hashes_path, hashes_index_path) if task.deduplicate else ()
    paths = [path(folder, task.number) for path in kinds]
    with ExitStack() as stack:
        spill = stack.enter_context(atomic_file(paths[0], task.sync))
        quarantine = Quarantine(stack.enter_context(atomic_file(paths[2])).write)
        hashes = None
        if task.deduplicate:
            file = stack.enter_context(atomic_file(paths[3], task.sync))
            hashes = HashWriter(file, hash_bytes)
        writer = SpillWriter(
            spill,
            budget - hash_bytes,
            task.frame_bytes,
            task.codec,
        )
        for segment in task.segments:
            book = books[str(segment.input.corpus)]
            before = cuts(book)
            for records, side in _segment_records(task, segment, tokenizer, book, quarantine, hashes):
                _account(records, side, sums)
                writer.add(records, side)
            if cuts(book) > before:
                cut_short.append(segment.file)
        quarantine.finish()
        index = writer.finish()
        with atomic_file(paths[1], task.sync) as file:
            write_array(file, index)
        if hashes is not None:
            with atomic_file(paths[4], task.sync) as file:
                write_array(file, hashes.finish())
    spilled = [path.stat().st_size for path in paths]
    manifest = {
        "task": task.number,
        "run": task.run_hash,
        "tokenizer": task.tokenizer_sha256,
        "files": {path.name: path.stat().st_size for path in paths},
        "books": books,
        "cut_short": cut_short,  # numbers of files
        "splits": sums,
        "input_bytes": sum(book["bytes"] for book in books.values()),
        "read_bytes": sum(map(segment_bytes, task.segments)),
        "written_bytes": sum(spilled),
        "raw_spill_bytes": writer.raw_bytes,
        "runs": writer.runs,
        "hash_entries": 0 if hashes is None else hashes.entries,
        "boot": "" if task.sync else boot_id(),
        "records": sum(book["read"] for book in books.values()),
        **meter.finish(),
    }
    write_json(manifest_path(folder, task.number), manifest)
    return manifest


def _segment_records(
    task: ScatterTask,
    segment: Segment,
    tokenizer: AnyTokenizer | None,
    book: dict[str, Any],
    quarantine: Quarantine,
    hashes: HashWriter | None = None,
) -> Iterator[tuple[Records, np.ndarray]]:
    """Yield Records and the split of each for every batch of a segment, and keep the book."""
    clean = make_cleaner(task.cleaning)
    file, limit = segment.input, task.cleaning.max_record_bytes
    blocks = segment.first_block, segment.stop_block

    names = task.seed, segment.corpus_name, file.relative

    def keys_of(block: int, first: int, count: int, copy: int = 0) -> np.ndarray:
        return record_keys(*names, block, first, count, task.algorithm, copy)

    def records_of(batch: RawBatch) -> Iterator[tuple[Records, np.ndarray]]:
        book["read"] += len(batch.lines)
        whole = [line for line in batch.lines if isinstance(line, bytes)]
        book["bytes"] += sum(map(len, whole)) + len(whole)
        texts, numbers = clean_texts(segment, batch, np.arange(len(batch.lines)), clean, book, quarantine)
        where = batch.block, batch.first_record, len(batch.lines)
        taken = selected(texts, numbers, where, names, segment.weight, segment.file, hashes, book)
        if not taken.texts:
            return
        places = taken.records - batch.first_record
        keys = keys_of(*where)[places]
        for part in _portions(taken.texts):
            texts, origin = taken.texts[part], (segment.file, batch.block, taken.records[part])
            if tokenizer is None:
                found = text_records(texts, keys[part])
            else:
                found = tokenise(texts, keys[part], *origin, tokenizer, task.segmenter)
            side = split_of(texts, task.seed, task.validation_share)
            for copy in range(taken.most):
                if copy:
                    again = np.flatnonzero(taken.copies[part] > copy)
                    if not len(again):
                        continue
                    other = repeated(found, again, keys_of(*where, copy)[places[part][again]])
                else:
                    again, other = np.arange(len(texts)), found
                if hashes is not None:
                    columns = other.columns["key"], other.columns["length"], side[again]
                    hashes.add(taken.hashes[part][again], *origin[:2], origin[2][again], *columns)
                yield other, side[again]
        book["written"] += int(taken.copies.sum())
        book["repeated"] += int(taken.copies.sum()) - len(taken.texts)

    if tokenizer is None and task.as_it_is and is_plain_text(file):
        for block in range(segment.first_block, segment.stop_block or file.blocks or 1):
            done = yield from _with_split(read_lines(file, block, limit, keys_of, book))
            if done is not None:
                for batch in read_batches(file, block, block + 1, limit):
                    if done and batch.lines[:1] == ["file_changed"]:  # since the quick way began
                        raise FileChangedError(f"{file.path}: changed while it was read")
                    skipped = max(0, done - batch.first_record)
                    offsets, lines = batch.offsets[skipped:], batch.lines[skipped:]
                    yield from records_of(RawBatch(batch.block, batch.first_record + skipped, offsets, lines))
    else:
        for batch in read_batches(file, *blocks, limit):
            yield from records_of(batch)


def _with_split(lines: Generator[Records, None, int | None]) -> Generator[Any, None, int | None]:
    """Each with its split, which is train: text that is moved as it is has no validation split."""
    while True:
        try:
            records = next(lines)
        except StopIteration as end:
            done: int | None = end.value
            return done
        yield records, np.zeros(len(records), dtype=np.uint8)


def tokenise(
    texts: list[bytes],
    keys: np.ndarray,
    file: int,
    block: int,
    records: np.ndarray,
    tokenizer: AnyTokenizer,
    segmenter: str,
) -> Records:
    """Tokenise texts (UTF-8) of one block into [CLS] … [SEP] documents with word starts.

    Raises DataPrepError when the pieces of a text do not add up to its characters.
    """
    where = f"file {file}, block {block}"
    if segmenter == "none":
        tokens, lengths = _documents(texts, tokenizer, where, records)
        words = None
    else:
        tokens, lengths, words = _documents_with_words(texts, tokenizer, segmenter, where, records)
    n = len(texts)
    columns = {
        "key": keys,
        "file": np.full(n, file, dtype=np.uint32),
        "block": np.full(n, block, dtype=np.uint32),
        "record": records.astype(np.uint32),
        "length": lengths.astype(np.uint32),
    }
    return Records(columns, tokens, words)


def _documents(
    texts: list[bytes], tokenizer: AnyTokenizer, where: str, records: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all documents in a row, and the number of each. Long texts are encoded part by part."""
    sizes = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    long = np.flatnonzero(sizes > _LONG_CHARACTERS).tolist()
    ids = tokenizer.ids([b"" if len(text) > _LONG_CHARACTERS else text for text in texts] if long else texts)
    for number in long:
        parts = [part.encode() for part in cut_long(texts[number].decode())]
        ids[number] = np.concatenate([one for part in _portions(parts) for one in tokenizer.ids(parts[part])])
    first, last = (np.array([tokenizer.special_ids[name]], dtype=np.int32) for name in ("[CLS]", "[SEP]"))
    rows = [first] * (2 * len(texts) + 1)
    rows[1::2] = ids
    rows[2::2] = [np.concatenate([last, first])] * len(texts)
    rows[-1] = last
    tokens = np.concatenate(rows).astype(token_dtype(tokenizer.vocab_size))
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids)) + 2
    if isinstance(tokenizer, Tokenizer):  # a vocabulary of words has no pieces that add up
        for number in tokenizer.suspects(tokens, np.cumsum(lengths) - lengths, sizes).tolist():
            text = [texts[number].decode()]
            _, found, counts = tokenizer.encode(text, exact=False)
            _check_characters(text, found, counts, where, records[[number]])
    return tokens, lengths


def _documents_with_words(
    texts: list[bytes], tokenizer: AnyTokenizer, segmenter: str, where: str, records: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same, and for each id whether a word starts there."""
    ids, counts, starts = _encode([text.decode() for text in texts], tokenizer, where, records)
    lengths = counts + 2
    stops = np.cumsum(lengths)
    inner = np.ones(int(stops[-1]), dtype=bool)
    inner[stops - lengths] = False
    inner[stops - 1] = False
    tokens = np.empty(len(inner), dtype=token_dtype(tokenizer.vocab_size))
    tokens[stops - lengths] = tokenizer.special_ids["[CLS]"]
    tokens[stops - 1] = tokenizer.special_ids["[SEP]"]
    tokens[inner] = ids
    words = np.ones(len(inner), dtype=bool)
    words[inner] = starts
    return tokens, lengths, words


def _encode(
    texts: list[str], tokenizer: AnyTokenizer, where: str, records: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of all texts in a row, ids of each text, and for each id whether a word starts there. Long texts are
    encoded part by part: what an encoder needs grows with its text.
    """
    parts = [cut_long(text) for text in texts]
    flat = [part for text in parts for part in text]
    of_part = np.repeat(np.arange(len(texts)), [len(text) for text in parts])
    ids, counts, starts = [], [], []
    for portion in _portions(flat):
        some, lengths, number = tokenizer.encode(flat[portion])
        _check_characters(flat[portion], lengths, number, where, records[of_part[portion]])
        ids.append(some)
        counts.append(number)
        starts.append(word_start_characters(flat[portion])[np.cumsum(lengths) - lengths])
    total = np.bincount(of_part, weights=np.concatenate(counts), minlength=len(texts)).astype(np.int64)
    return np.concatenate(ids), total, np.concatenate(starts)


def cut_long(text: str) -> list[str]:
    """Parts of at most _LONG_CHARACTERS that join to the text: cut before a space, which no piece of an encoder that
    parts words crosses, else behind the end of a sentence or clause, else anywhere.
    """
    parts, begin = [], 0
    while len(text) - begin > _LONG_CHARACTERS:
        stop = begin + _LONG_CHARACTERS
        cut = text.rfind(" ", begin + 1, stop)
        if cut < 0:
            cut = max(text.rfind(mark, begin, stop) for mark in "。！？；，\n") + 1 or stop
        parts.append(text[begin:cut])
        begin = cut
    return [*parts, text[begin:]] if parts else [text]


def _check_characters(
    texts: list[str], lengths: np.ndarray, counts: np.ndarray, where: str, records: np.ndarray
) -> None:
    characters = np.diff(np.cumsum(lengths)[np.cumsum(counts) - 1], prepend=0)
    changed = np.flatnonzero(characters != np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)))
    if len(changed):
        raise DataPrepError(
            f"the tokenizer changes text: {texts[changed[0]][:40]!r} ({where}, record {records[changed[0]]}) came "
            f"back with {characters[changed[0]]} characters; train it with data_prep"
        )


def split_of(texts: list[bytes], seed: int, validation_share: float) -> np.ndarray:
    """0 train, 1 validation, uint8 [N], by the hash of the UTF-8 of the clean text: its copies fall on one side."""
    if not validation_share:
        return np.zeros(len(texts), dtype=np.uint8)
    hashes = [xxhash.xxh3_64_intdigest(text, seed) for text in texts]
    return (np.array(hashes, dtype=np.uint64) < np.uint64(share_threshold(validation_share))).astype(np.uint8)


def _account(records: Records, side: np.ndarray, totals: dict[str, dict[str, int]]) -> None:
    """Add records to the totals of their splits."""
    lengths = records.columns["length"].astype(np.int64)
    if ORIGIN[0] in records.columns:
        hashes = document_hashes(
            records.tokens, lengths, np.stack([records.columns[name] for name in ORIGIN])
        )
    else:
        hashes = line_hashes(records.tokens, lengths)
    for number, split in enumerate(SPLITS):
        mine, total = side == number, totals[split]
        total["documents"] += int(mine.sum())
        total["tokens"] += int(lengths[mine].sum())
        found = int(hashes[mine].sum(dtype=np.uint64))
        total["document_sum"] = (total["document_sum"] + found) % (1 << 64)


def _portions(texts: Sequence[str | bytes]) -> list[slice]:
    """Slices of about 1 MiB of text, so that intermediate lists stay small whatever the batch."""
    bytes_each = 3 if texts and isinstance(texts[0], str) else 1  # of a character, or of a byte
    sizes = np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)) * bytes_each)
    cuts = [0, *(np.flatnonzero(np.diff(sizes // _ENCODE_BYTES)) + 1).tolist(), len(texts)]
    return [slice(a, b) for a, b in pairwise(cuts) if a < b]
