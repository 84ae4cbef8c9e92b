"""The tokenizer's training text: a keyed uniform sample of the records.

A record is in the sample iff a random number that belongs to it lies under a threshold, so the sample
depends neither on workers nor on the order of reading, and every record has the same chance. The threshold
aims a little high (only the size on disk is known beforehand); the records with the smallest numbers are
then taken up to the size asked for. Lines that are not chosen are not even parsed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from .clean import make_cleaner
from .config import CleaningSection, TrainSection
from .files import atomic_file, read_json, size_or_none, write_bytes, write_json
from .keys import philox_words, share_threshold, stream_id
from .scatter import Segment, clean_texts, new_book, segment_bytes
from .shards import SPECIAL_IDS
from .sources import FileChangedError, InputFile, read_batches
from .tokenizer import Tokenizer, train

# Assumed ratio of compressed files; a fixed guess, so that the sample stays a function of the input alone.
_COMPRESSION_RATIO = 4
_HEADROOM = 1.25


@dataclass(frozen=True)
class SampleTask:
    """Collect the sampled records of some segments."""

    number: int
    segments: list[Segment]
    folder: str
    run_hash: str
    seed: int
    share: float
    cleaning: CleaningSection


@dataclass(frozen=True)
class TrainTask:
    """Train the tokenizer on what `samples` tasks collected."""

    folder: str
    samples: int
    section: TrainSection
    output_folder: str


def sample_share(files: Sequence[InputFile], sample_bytes: int) -> float:
    """The share of records to look at so that about `sample_bytes` of text come together, 1 for all."""
    text_bytes = sum(file.size_bytes * (_COMPRESSION_RATIO if file.compression else 1) for file in files)
    return min(1.0, _HEADROOM * sample_bytes / max(1, text_bytes))


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
            for line in _sampled_lines(task, segment, clean, book):
                stream.write(line)
            read += segment_bytes(segment)
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


def _sampled_lines(task: SampleTask, segment: Segment, clean: Any, book: dict[str, Any]) -> Iterator[bytes]:
    file = segment.input
    for batch in read_batches(file, segment.first_block, segment.stop_block, task.cleaning.max_record_bytes):
        stream = stream_id("tokenizer-sample", segment.corpus_name, file.relative, batch.block)
        numbers = philox_words(task.seed, stream, batch.first_record, len(batch.lines))
        chosen = np.arange(len(numbers))
        if task.share < 1:
            chosen = np.flatnonzero(numbers < np.uint64(share_threshold(task.share)))
        texts, records = clean_texts(segment, batch, chosen, clean, book)
        book["written"] += len(texts)
        for text, record in zip(texts, records, strict=True):
            entry = [int(numbers[record - batch.first_record]), segment.file, batch.block, record, text]
            yield (json.dumps(entry, ensure_ascii=False) + "\n").encode()


def train_tokenizer(task: TrainTask) -> dict[str, Any]:
    """Train once and write tokenizer.model, then tokenizer.json, whose presence says that it is complete.

    Raises DataPrepError when the sample does not support the vocabulary.
    """
    entries, used_bytes = [], 0
    for number in range(task.samples):
        with zstandard.open(sample_path(task.folder, number), "rt", encoding="utf-8") as file:
            entries += [json.loads(line) for line in file]
    entries.sort(key=lambda entry: entry[:4])
    texts: list[str] = []
    for entry in entries:
        if used_bytes >= task.section.sample_bytes:
            break
        texts.append(entry[4])
        used_bytes += len(entry[4].encode())
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
        "train": task.section.model_dump(mode="json"),
    }
    write_json(output / "tokenizer.json", description)
    return {"input_bytes": used_bytes, **read_json(output / "tokenizer.json")}
