"""Reading raw records: txt, jsonl and parquet, plain or compressed, here or far away, with nothing lost in silence.

A record belongs to the block of 64 MiB (BLOCK_BYTES, counted in decompressed bytes; a row group of parquet) in which
its first byte lies, and has a number inside it. That pair names a record without counting the whole file first, so
plain files, zst files of several frames and parquet can be read from any block on by several tasks. Any other
compressed file is read from its start by one task.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson

from .cut import BLANK_CONTEXT_BYTES, Cut, cut_lines, cut_paragraphs
from .decompress import COMPRESSIONS, Gap, decompressed
from .errors import DataPrepError
from .parquet import read_rows
from .places import open_to_read, stamp_of

BLOCK_BYTES = 64 * 1024**2
CHUNK_BYTES = 1024**2
_BATCH_RECORDS = 32 * 1024
# json.loads fails on deep nesting, but how deep depends on the stack below it, so on who calls.
_MAX_NESTING = 200
_JSON_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(r"[][{}]")
_PAUSES_SECONDS = (0.2, 1.0, 5.0)  # before a storage is asked once more for the state of a file
# Assumed ratio of a compressed file whose text nobody has measured, for estimates and for the tokenizer's sample.
COMPRESSION_RATIO = 4

# What reading a file to its end could not do; the other reasons are about single records.
FILE_REASONS = (
    "truncated_compression",
    "damaged_compression",
    "window_too_large",
    "decompression_bomb",
    "damaged_parquet",
    "file_changed",
)


@dataclass(frozen=True)
class InputFile:
    """One input file as it was planned. stamp: what changes with the content (modification time, ETag).

    groups: rows of each row group of a parquet file. frames: for every block of a zst file that can be split, the
    (compressed, decompressed) offset of the frame to begin with. text_bytes: decompressed size, 0 where unknown.
    """

    corpus: int
    path: str
    relative: str
    size_bytes: int
    stamp: str
    format: str
    text_field: str
    compression: str
    records: str = "line"
    groups: tuple[int, ...] = ()
    frames: tuple[tuple[int, int], ...] = ()
    text_bytes: int = 0

    @property
    def blocks(self) -> int | None:
        """Number of blocks, or None where only reading the file to its end would tell."""
        if self.format == "parquet":
            return len(self.groups) or None
        if self.compression:
            return len(self.frames) or None
        return max(1, -(-self.size_bytes // BLOCK_BYTES))

    @property
    def estimated_text_bytes(self) -> int:
        """Decompressed size, or a guess at it."""
        return self.text_bytes or self.size_bytes * (COMPRESSION_RATIO if self.compression else 1)

    def disk_bytes(self, first_block: int, stop_block: int | None) -> int:
        """Bytes on disk that reading some blocks takes, about."""
        blocks = self.blocks
        if blocks is None or (first_block == 0 and stop_block in (None, blocks)):
            return self.size_bytes
        stop = blocks if stop_block is None else min(stop_block, blocks)
        if self.frames:
            end = self.size_bytes if stop == blocks else self.frames[stop][0]
            return max(1, end - self.frames[first_block][0])
        if self.groups:
            return self.size_bytes * sum(self.groups[first_block:stop]) // max(1, sum(self.groups))
        return min(self.size_bytes, stop * BLOCK_BYTES) - first_block * BLOCK_BYTES


@dataclass(frozen=True)
class RawBatch:
    """Consecutive raw records of one block. A line is a str, the reason, where the record could not be read."""

    block: int
    first_record: int
    offsets: np.ndarray
    lines: list[bytes | str]


class FileChangedError(DataPrepError):
    """An input file did not stay the one that was planned while it was read."""


def read_batches(
    file: InputFile, first_block: int, stop_block: int | None, max_record_bytes: int
) -> Iterator[RawBatch]:
    """The raw records of blocks first_block .. stop_block - 1 (to the end where None), in order.

    Damage is a record of its own whose line is the reason, and so are blocks of a file that is not the one that was
    planned. Raises DataPrepError when the file is gone or its storage fails, which is never damage, FileChangedError
    when it changed while it was read: what came before is not to be kept, and reading again tells.
    """
    with input_errors(file), open_to_read(file.path) as handle:
        yield from _read(file, handle, first_block, stop_block, max_record_bytes)


@contextmanager
def input_errors(file: InputFile) -> Iterator[None]:
    """What keeps an input file from being read is told with its name: a task that reads has other files open, too."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno != errno.EIO else str(error)
        raise DataPrepError(f"{file.path}: cannot be read ({reason})") from None


def _read(
    file: InputFile, handle: BinaryIO, first_block: int, stop_block: int | None, max_record_bytes: int
) -> Iterator[RawBatch]:
    if not is_unchanged(file, handle):
        offset = np.array([first_block * BLOCK_BYTES], dtype=np.int64)
        yield RawBatch(first_block, 0, offset, ["file_changed"])
        return
    if file.format == "parquet":
        yield from read_rows(handle, file.text_field, first_block, stop_block, max_record_bytes)
    else:
        yield from _numbered(_cut(file, handle, first_block, stop_block, max_record_bytes), first_block)
    if not is_unchanged(file, handle):
        raise FileChangedError(f"{file.path}: changed while it was read")


def _numbered(cuts: Iterator[Cut], first_block: int) -> Iterator[RawBatch]:
    """Give the records the numbers that they have in their blocks. A batch is never of so many that what is held for
    each of them, some hundred bytes, adds up to more than a worker has.
    """
    block, number = first_block, 0
    for batch, offsets in cuts:
        begin = 0
        while begin < len(batch):
            if offsets[begin] // BLOCK_BYTES != block:
                block, number = int(offsets[begin] // BLOCK_BYTES), 0
            end = min(int(np.searchsorted(offsets, (block + 1) * BLOCK_BYTES)), begin + _BATCH_RECORDS)
            yield RawBatch(block, number, offsets[begin:end], batch[begin:end])
            number += end - begin
            begin = end


def _cut(
    file: InputFile, handle: BinaryIO, first_block: int, stop_block: int | None, max_record_bytes: int
) -> Iterator[Cut]:
    """The records that start in the blocks, with their offsets."""
    limit = None if stop_block is None else stop_block * BLOCK_BYTES
    first = first_block * BLOCK_BYTES
    paragraphs = file.records == "paragraph"
    # What lies just before the block tells whether a record starts with its first byte.
    start = max(0, first - (BLANK_CONTEXT_BYTES if paragraphs else 1))
    chunks = _from(file, handle, start)
    if paragraphs:
        return cut_paragraphs(chunks, start, limit, max_record_bytes, first)
    return cut_lines(chunks, start, limit, max_record_bytes, first_block > 0, file.format == "jsonl")


def _from(file: InputFile, handle: BinaryIO, start: int) -> Iterator[bytes | Gap]:
    """The decompressed stream from byte `start` on."""
    if not file.compression:
        handle.seek(start)
        yield from _chunks(handle)
        return
    frames = tuple(dict.fromkeys(file.frames))
    packed, position = max((frame for frame in frames if frame[1] <= start), default=(0, 0))
    handle.seek(packed)
    for chunk in decompressed(handle, file.compression, frames):
        if isinstance(chunk, Gap):
            if chunk.resume is None or chunk.resume > start:
                yield chunk
            position = position if chunk.resume is None else chunk.resume
            continue
        if position + len(chunk) > start:
            yield chunk[max(0, start - position) :]
        position += len(chunk)


def _chunks(handle: BinaryIO) -> Iterator[bytes]:
    while chunk := handle.read(CHUNK_BYTES):
        yield chunk


def parse(file: InputFile, line: bytes | str) -> tuple[str | None, str]:
    """The text of a raw record and "", or None and the reason for its quarantine."""
    if isinstance(line, str):
        return None, line
    if file.format == "jsonl" and line.count(b"[") + line.count(b"{") <= _MAX_NESTING:
        try:
            value = orjson.loads(line)[file.text_field]
            if isinstance(value, str):
                return value, ""
        except (ValueError, KeyError, TypeError):
            pass  # the careful way below tells what is wrong
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return None, "invalid_utf8"
    if file.format != "jsonl" or not text or text.isspace():
        return text, ""
    if text.count("[") + text.count("{") > _MAX_NESTING and _nesting(text) > _MAX_NESTING:
        return None, "nested_too_deep"
    try:
        record = json.loads(text)
    except ValueError:
        return None, "invalid_json"
    if not isinstance(record, dict):
        return None, "not_a_json_object"
    if file.text_field not in record:
        return None, "missing_field"
    value = record[file.text_field]
    return (value, "") if isinstance(value, str) else (None, "field_is_not_text")


def _nesting(text: str) -> int:
    """Depth of the brackets outside of strings."""
    brackets = _BRACKET.findall(_JSON_STRING.sub("", text))
    return max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)


def is_unchanged(file: InputFile, handle: BinaryIO) -> bool:
    """Is an open file the one that was planned? A file that is gone is not. Raises OSError when the storage does not
    tell, asked again and again: to take that for a change would lose what is there.
    """
    for pause in (*_PAUSES_SECONDS, None):
        try:
            return stamp_of(file.path, handle) == (file.size_bytes, file.stamp)
        except FileNotFoundError:
            break
        except OSError:
            if pause is None:
                raise
            time.sleep(pause)
    return False


def format_of(path: Path | str) -> tuple[str, str]:
    """(format, compression suffix) by the name of a file, in capitals or not; format is "" where the name does
    not tell.
    """
    path = Path(str(path))
    suffix = path.suffix.lower()
    compression = suffix if suffix in COMPRESSIONS else ""
    suffix = path.with_suffix("").suffix.lower() if compression else suffix
    if suffix in (".parquet", ".pq"):
        return ("", "") if compression else ("parquet", "")
    return {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl"}.get(suffix, ""), compression
