"""The tokenizer's training text: a keyed uniform sample of the records.

First blocks of the files are chosen by a random number that belongs to each, then records of these by theirs, so the
sample depends neither on workers nor on the order of reading, every record has the same chance (times the weight of
its corpus), and only the chosen blocks are read. Of a file that cannot be read from its middle (gz, bz2, xz) all or
nothing is. The thresholds aim a little high, as only the size on disk is known beforehand; the records with the
smallest numbers are then taken up to the size asked for. Lines that are not chosen are not even parsed.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from .clean import Cleaner, make_cleaner
from .config import CleaningSection, TrainSection
from .errors import DataPrepError
from .files import atomic_file, read_json, size_or_none, write_bytes, write_json
from .keys import philox_words, share_threshold, stream_id
from .measure import available_bytes
from .records import Segment, clean_texts, new_book
from .shards import SPECIAL_IDS
from .sources import COMPRESSION_RATIO, FileChangedError, InputFile, read_batches
from .tokenizer import Tokenizer, train, training_bytes

_HEADROOM = 1.25
# At least so much text is looked at, and this many times what is asked for, so that it comes from many places.
_LEAST_READ_BYTES, _READ_FACTOR, _LEAST_UNITS = 4 * 1024**3, 8, 64
_READ_WHOLE = (".gz", ".bz2", ".xz")


@dataclass(frozen=True)
class Shares:
    """Which share of the records of a corpus of weight 1 is looked at (of weight w, w times that, up to all), of all
    blocks, and of the files that are read whole or not at all.
    """

    records: float
    blocks: float
    files: float


@dataclass(frozen=True)
class SampleTask:
    """Collect the sampled records of some segments."""

    number: int
    segments: list[Segment]
    folder: str
    run_hash: str
    seed: int
    shares: Shares
    cleaning: CleaningSection


@dataclass(frozen=True)
class TrainTask:
    """Train the tokenizer on what `samples` tasks collected."""

    folder: str
    samples: int
    section: TrainSection
    output_folder: str


def sample_shares(files: Sequence[InputFile], weights: Sequence[float], sample_bytes: int) -> Shares:
    """The shares with which about `sample_bytes` of text come together. weights: of each corpus."""
    # A fixed guess at compressed sizes: what somebody found out about a file's inside must not change the sample.
    sizes = [file.size_bytes * (COMPRESSION_RATIO if file.compression else 1) for file in files]
    text_bytes = max(1, sum(sizes))
    blocks = min(1.0, max(_READ_FACTOR * sample_bytes, _LEAST_READ_BYTES) / text_bytes)
    whole = sum(file.compression in _READ_WHOLE for file in files)
    return Shares(
        records=_record_share(files, sizes, weights, _HEADROOM * sample_bytes, blocks),
        blocks=blocks,
        files=min(1.0, max(blocks, _LEAST_UNITS / whole)) if whole else 1.0,
    )


def _record_share(
    files: Sequence[InputFile],
    sizes: Sequence[int],
    weights: Sequence[float],
    wanted_bytes: float,
    most: float,
) -> float:
    """The share r for which `wanted_bytes` is the sum of size x min(most, r x weight) over the corpora."""
    text_bytes: Counter[float] = Counter()
    for file, size in zip(files, sizes, strict=True):
        text_bytes[weights[file.corpus]] += size
    weighted = sum(weight * size for weight, size in text_bytes.items())
    for weight, size in sorted(text_bytes.items(), reverse=True):
        if wanted_bytes * weight <= most * weighted:
            return wanted_bytes / max(1, weighted)
        # All there is of the heaviest corpus is not enough: the others have to give the rest.
        wanted_bytes, weighted = wanted_bytes - most * size, weighted - weight * size
    return math.inf


def sample_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"sample-{number:06d}.jsonl.zst"


def finished_sample(task: SampleTask) -> dict[str, Any] | None:
    """The manifest of a finished task of this run, whose file has the size it names; else None."""
    path = sample_path(task.folder, task.number)
    try:
        result: dict[str, Any] = json.loads(path.with_suffix(".json").read_bytes())
        found = (result["run"], result["file_bytes"])
    except (OSError, ValueError, KeyError):
        return None
    return result if found == (task.run_hash, size_or_none(path)) else None


def collect_sample(task: SampleTask) -> dict[str, Any]:
    """Write the sampled texts of a task as jsonl.zst lines [number, file, block, record, text], then its
    manifest.
    """
    while True:
        try:
            return _collect_sample(task)
        except FileChangedError:
            continue  # what is not as planned is passed over when the task begins anew


def _collect_sample(task: SampleTask) -> dict[str, Any]:
    clean = make_cleaner(task.cleaning)
    read, book = 0, new_book()
    path = sample_path(task.folder, task.number)
    with (
        atomic_file(path) as file,
        zstandard.ZstdCompressor(level=1).stream_writer(file, closefd=False) as stream,
    ):
        for segment in task.segments:
            for first, stop in chosen_blocks(task.seed, segment, task.shares):
                for line in _sampled_lines(task, segment, (first, stop), clean, book):
                    stream.write(line)
                read += segment.input.disk_bytes(first, stop)
    lost = book["dropped"] + book["quarantined"]
    result = {
        "run": task.run_hash,
        "file_bytes": path.stat().st_size,
        "input_bytes": read,
        "texts": book["written"],
        "lost": dict(lost),
    }
    write_json(path.with_suffix(".json"), result)
    return result


def chosen_blocks(seed: int, segment: Segment, shares: Shares) -> Iterator[tuple[int, int | None]]:
    """The blocks of a segment to read, as ranges [first, stop); (0, None) for all of a file that is read whole."""
    file = segment.input
    if file.compression in _READ_WHOLE:
        if _is_chosen(seed, segment, "file", shares.files):
            yield 0, None
    elif segment.stop_block is None:
        yield (
            segment.first_block,
            None,
        )  # a zst file that has to be read through: block after block is looked at
    else:
        for block in range(segment.first_block, segment.stop_block):
            if _is_chosen(seed, segment, block, shares.blocks):
                yield block, block + 1


def _is_chosen(seed: int, segment: Segment, unit: int | str, share: float) -> bool:
    stream = stream_id("tokenizer-blocks", segment.corpus_name, segment.input.relative, unit)
    return share >= 1 or int(philox_words(seed, stream, 0, 1)[0]) < share_threshold(share)


def _sampled_lines(
    task: SampleTask, segment: Segment, blocks: tuple[int, int | None], clean: Cleaner, book: dict[str, Any]
) -> Iterator[bytes]:
    file = segment.input
    by_file = file.compression in _READ_WHOLE
    unit = task.shares.files if by_file else task.shares.blocks
    share = min(1.0, task.shares.records * segment.weight / unit)
    for batch in read_batches(file, *blocks, task.cleaning.max_record_bytes):
        if not by_file and not _is_chosen(task.seed, segment, batch.block, unit):
            continue
        stream = stream_id("tokenizer-sample", segment.corpus_name, file.relative, batch.block)
        numbers = philox_words(task.seed, stream, batch.first_record, len(batch.lines))
        chosen = np.arange(len(numbers))
        if share < 1:
            chosen = np.flatnonzero(numbers < np.uint64(share_threshold(share)))
        texts, records = clean_texts(segment, batch, chosen, clean, book)
        book["written"] += len(texts)
        for text, record in zip(texts, records, strict=True):
            # On one scale for all files: where fewer units are chosen, or a corpus weighs more, records come sooner.
            number = float(numbers[record - batch.first_record]) * unit / segment.weight
            entry = [number, segment.file, batch.block, record, text.decode()]
            yield (json.dumps(entry, ensure_ascii=False) + "\n").encode()


def _smallest(task: TrainTask) -> tuple[list[str], int]:
    """The texts with the smallest numbers, in order, that make up `sample_bytes`, and their size [bytes]. No more than
    that is held of what was collected.
    """
    held: list[tuple[list[float], int, str]] = []  # a heap, the largest number first
    used_bytes = 0
    for number in range(task.samples):
        with zstandard.open(sample_path(task.folder, number), "rt", encoding="utf-8") as file:
            for line in file:
                *place, text = json.loads(line)
                size = len(text.encode())
                heapq.heappush(held, ([-part for part in place], size, text))
                used_bytes += size
                while used_bytes - held[0][1] >= task.section.sample_bytes:
                    used_bytes -= heapq.heappop(held)[1]
    return [text for _, _, text in sorted(held, reverse=True)], used_bytes


def refuse_too_large_a_sample(section: TrainSection, text_bytes: int) -> int:
    """Memory that training on so much text takes [bytes]. Raises DataPrepError when this machine has less."""
    needed, free = training_bytes(section, text_bytes), available_bytes()
    if needed > free:
        raise DataPrepError(
            f"tokenizer.train.sample_bytes: training on {text_bytes:,} bytes takes about {needed:,} bytes of memory, "
            f"and {free:,} are free on this machine; take a smaller sample"
        )
    return needed


def train_tokenizer(task: TrainTask) -> dict[str, Any]:
    """Train once and write tokenizer.model, then tokenizer.json, whose presence says that it is complete.

    Raises DataPrepError when the sample does not support the vocabulary.
    """
    texts, used_bytes = _smallest(task)
    needed = refuse_too_large_a_sample(task.section, used_bytes)
    model, statistics = train(iter(texts), task.section)
    tokenizer = Tokenizer(model)
    output = Path(task.output_folder)
    write_bytes(output / "tokenizer.model", model)
    description = {
        "file": "tokenizer/tokenizer.model",
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "special_ids": SPECIAL_IDS,
        "trained_on": {"records": len(texts), "bytes": used_bytes, **statistics},
        "estimated_memory_bytes": needed,
        "train": task.section.model_dump(mode="json"),
    }
    write_json(output / "tokenizer.json", description)
    return {"input_bytes": used_bytes, **read_json(output / "tokenizer.json")}
