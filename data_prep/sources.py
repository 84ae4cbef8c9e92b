"""Reading raw records: txt (a record a line) and jsonl, plain or compressed, streaming, with nothing lost.

A record belongs to the block of 64 MiB (BLOCK_BYTES, counted in decompressed bytes) in which its first byte
lies, and has a number inside it. That pair names a record without counting the whole file first, so plain
files can be read from any block on by several tasks. A compressed file is read from its start by one task.
"""

from __future__ import annotations

import bz2
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard

from .errors import DataPrepError

BLOCK_BYTES = 64 * 1024**2
CHUNK_BYTES = 1024**2
# One call of a decoder may return a few thousand times its input, so compressed input is fed in small pieces.
_COMPRESSED_CHUNK_BYTES = 16 * 1024
_MAX_WINDOW_BYTES = 128 * 1024**2
# json.loads fails on deep nesting, but how deep depends on the stack below it, so on who calls.
_MAX_NESTING = 200
_JSON_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(r"[][{}]")
_UTF8_MARK = b"\xef\xbb\xbf"

COMPRESSIONS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj(),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}
_DECODER_ERRORS = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError, ValueError)


@dataclass(frozen=True)
class InputFile:
    """One input file as it was planned."""

    corpus: int
    path: str
    relative: str
    size_bytes: int
    mtime_ns: int
    format: str
    text_field: str
    compression: str

    @property
    def blocks(self) -> int | None:
        """Number of 64 MiB blocks, or None where only reading the file to its end would tell."""
        return None if self.compression else max(1, -(-self.size_bytes // BLOCK_BYTES))


@dataclass(frozen=True)
class RawBatch:
    """Consecutive raw records of one block. A line is None where the record was larger than the limit."""

    block: int
    first_record: int
    offsets: np.ndarray
    lines: list[bytes | None]


class DamagedStreamError(Exception):
    """A compressed stream that ends early or does not decode: (reason, offset of the record that it cuts)."""

    def __init__(self, reason: str, offset_bytes: int = -1) -> None:
        super().__init__(reason, offset_bytes)
        self.reason, self.offset_bytes = reason, offset_bytes


def read_batches(
    file: InputFile, first_block: int, stop_block: int | None, max_record_bytes: int
) -> Iterator[RawBatch]:
    """The raw records of blocks first_block .. stop_block - 1 (to the end where None), in order.

    Raises DataPrepError when the file is gone or is not the one that was planned, DamagedStreamError (after
    everything that could be read) when a compressed file is damaged.
    """
    try:
        handle = open(file.path, "rb")  # noqa: SIM115 (closed below, also when the consumer stops early)
    except OSError as error:
        raise DataPrepError(f"{file.path}: cannot be read ({os.strerror(error.errno or 0)})") from None
    with handle:
        _check_unchanged(file, handle)
        limit = None if stop_block is None else stop_block * BLOCK_BYTES
        if file.compression:
            lines = _lines(_decompressed(handle, file.compression), 0, limit, max_record_bytes, False)
        else:
            # The byte before the block tells whether a record starts with its first byte.
            start = max(0, first_block * BLOCK_BYTES - 1)
            handle.seek(start)
            lines = _lines(_chunks(handle), start, limit, max_record_bytes, first_block > 0)
        block, number = first_block, 0
        for batch, offsets in lines:
            begin = 0
            while begin < len(batch):
                if offsets[begin] // BLOCK_BYTES != block:
                    block, number = int(offsets[begin] // BLOCK_BYTES), 0
                end = int(np.searchsorted(offsets, (block + 1) * BLOCK_BYTES))
                yield RawBatch(block, number, offsets[begin:end], batch[begin:end])
                number += end - begin
                begin = end
        _check_unchanged(file, handle)


def parse(file: InputFile, line: bytes | None) -> tuple[str | None, str]:
    """The text of a raw record and "", or None and the reason for its quarantine."""
    if line is None:
        return None, "record_too_large"
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return None, "invalid_utf8"
    if file.format == "txt" or not text or text.isspace():
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


def _lines(
    chunks: Iterator[bytes], start: int, limit: int | None, max_record_bytes: int, inside_record: bool
) -> Iterator[tuple[list[bytes | None], np.ndarray]]:
    """Cut a stream that begins at byte `start` into lines (without their ends) and their byte offsets [n].

    Only lines that start before `limit`. With `inside_record`, bytes up to the first line end belong to an
    earlier record and are skipped. How the stream is cut into chunks does not matter.
    """
    carry, position = b"", start  # the unfinished line, and the byte it starts at
    skipping, large_at = inside_record, -1  # throwing a record away; where it starts if it was too large
    try:
        for chunk in chunks:
            data, carry = carry + chunk, b""
            if skipping:
                end = data.find(b"\n")
                if end < 0:
                    position += len(data)
                    if limit is not None and position >= limit:
                        break  # what follows the record starts behind the limit, however long it is
                    continue
                if large_at >= 0:
                    yield [None], np.array([large_at], dtype=np.int64)
                data, position = data[end + 1 :], position + end + 1
                skipping, large_at = False, -1
            if limit is not None and position >= limit:
                return
            cut = data.rfind(b"\n") + 1
            if cut:
                lines = data[: cut - 1].split(b"\n")
                lengths = np.fromiter(map(len, lines), dtype=np.int64, count=len(lines)) + 1
                offsets = position + np.cumsum(lengths) - lengths
                kept = len(lines) if limit is None else int(np.searchsorted(offsets, limit))
                yield _finish(lines[:kept], position, max_record_bytes), offsets[:kept]
                data, position = data[cut:], position + cut
                if limit is not None and position >= limit:
                    return
            if len(data) > max_record_bytes:
                skipping, large_at = True, position
                position += len(data)
            else:
                carry = data
    except DamagedStreamError as damage:
        raise DamagedStreamError(damage.reason, large_at if large_at >= 0 else position) from None
    if large_at >= 0:
        yield [None], np.array([large_at], dtype=np.int64)
    elif carry:
        yield _finish([carry], position, max_record_bytes), np.array([position], dtype=np.int64)


def _finish(lines: list[bytes], position: int, max_record_bytes: int) -> list[bytes | None]:
    """Take off carriage returns and a byte-order mark at the file's start; None for what is too large."""
    if position == 0 and lines and lines[0].startswith(_UTF8_MARK):
        lines[0] = lines[0][len(_UTF8_MARK) :]
    finished: list[bytes | None] = [line[:-1] if line.endswith(b"\r") else line for line in lines]
    if lines and max(map(len, lines)) > max_record_bytes:
        finished = [
            None if len(line) > max_record_bytes else kept for line, kept in zip(lines, finished, strict=True)
        ]
    return finished


def _chunks(handle: BinaryIO) -> Iterator[bytes]:
    while chunk := handle.read(CHUNK_BYTES):
        yield chunk


def _decompressed(handle: BinaryIO, compression: str) -> Iterator[bytes]:
    """Decompress a stream of any number of members; yields what could be read before it raises
    DamagedStreamError.
    """
    make_decoder = COMPRESSIONS[compression]
    decoder, parts, part_bytes = None, [], 0
    reason = ""
    while not reason and (data := handle.read(_COMPRESSED_CHUNK_BYTES)):
        while data:
            if decoder is None:
                data = (
                    data.lstrip(b"\0") if compression in (".gz", ".xz") else data
                )  # padding between members
                if not data:
                    break
                decoder = make_decoder()
            try:
                part = decoder.decompress(data)
            except _DECODER_ERRORS:
                reason = "damaged_compression"
                break
            parts.append(part)
            part_bytes += len(part)
            data, decoder = (decoder.unused_data, None) if decoder.eof else (b"", decoder)
        if part_bytes >= CHUNK_BYTES:
            yield b"".join(parts)
            parts, part_bytes = [], 0
    if part_bytes:
        yield b"".join(parts)
    if reason or decoder is not None:
        raise DamagedStreamError(reason or "truncated_compression")


def _check_unchanged(file: InputFile, handle: BinaryIO) -> None:
    now = os.fstat(handle.fileno())
    if (now.st_size, now.st_mtime_ns) != (file.size_bytes, file.mtime_ns):
        raise DataPrepError(
            f"{file.path}: changed since the run was planned ({file.size_bytes} bytes then, {now.st_size} "
            "now, or another time stamp); put the planned file back, or start over with --fresh"
        )


def format_of(path: Path) -> tuple[str, str]:
    """(format, compression suffix) by the name of a file, in capitals or not; format is "" where the name does
    not tell.
    """
    suffix = path.suffix.lower()
    compression = suffix if suffix in COMPRESSIONS else ""
    suffix = path.with_suffix("").suffix.lower() if compression else suffix
    return {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl"}.get(suffix, ""), compression
