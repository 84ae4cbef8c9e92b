"""Text output: the lines themselves are shuffled, and nothing is tokenised (`shards.content: text`).

Where cleaning asks for nothing, plain text files go through without a Python object a line: line ends are found
by numpy, the lines of a chunk stay where they are, and only keys and lengths are made. A chunk with anything
unusual in it (a carriage return, a NUL, invalid UTF-8, a byte-order mark) takes the careful way of `scatter`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import xxhash
import zstandard

from .config import CleaningSection
from .dedup import Drops
from .files import atomic_file
from .fingerprint import line_sum
from .keys import key_range
from .merge import SpillSet, sorted_records
from .places import is_remote, place
from .shards import SPLITS, Manifest, ShardEntry
from .sources import BLOCK_BYTES, FileChangedError, InputFile, input_errors, is_unchanged
from .spill import Items, Records

_CHUNK_BYTES = 4 * 1024**2
_LINES = 128 * 1024  # taken at a time: what is held for each is many times a short one
_FRAME_BYTES = 2 * 1024**2  # of text behind zstd
_LINE_END = 10
# First bytes of a line that may be white space; of the longer characters the second byte decides.
_MAY_BE_BLANK = np.zeros(256, dtype=bool)
_MAY_BE_BLANK[:33] = True
_MAY_BE_BLANK[[0xC2, 0xE1, 0xE2, 0xE3]] = True
_SECOND_OF_BLANK = {0xC2: (0x85, 0xA0), 0xE1: (0x9A,), 0xE2: (0x80, 0x81), 0xE3: (0x80,)}


def leaves_text_alone(cleaning: CleaningSection) -> bool:
    """Does cleaning only take out NUL, carriage returns and empty lines?"""
    asks = (cleaning.strip_control, cleaning.collapse_whitespace, cleaning.max_characters, cleaning.functions)
    shares = (cleaning.min_letter_share, cleaning.min_cjk_share)
    return cleaning.unicode == "none" and not any((*asks, *shares, cleaning.min_characters > 1))


def is_plain_text(file: InputFile) -> bool:
    """A file of lines on this machine, not compressed."""
    return (file.format, file.compression, getattr(file, "records", "line")) == (
        "txt",
        "",
        "line",
    ) and not is_remote(file.path)


def line_name(number: int, level: int) -> str:
    """File name of a text shard; level 0 is plain text."""
    return f"part-{number:06d}.txt" + (".zst" if level else "")


def text_records(texts: list[bytes], keys: np.ndarray) -> Records:
    """Texts (UTF-8) as lines, each with its line end."""
    lengths = np.fromiter(map(len, texts), dtype=np.uint32, count=len(texts)) + np.uint32(1)
    return Records({"key": keys, "length": lengths}, np.frombuffer(b"\n".join([*texts, b""]), np.uint8), None)


def read_lines(
    file: InputFile,
    block: int,
    max_record_bytes: int,
    keys_of: Callable[[int, int, int], np.ndarray],
    book: dict[str, Any],
) -> Generator[Records, None, int | None]:
    """The lines of a block of a plain file as they are; `keys_of(block, first, count)` gives the keys. Keeps the
    book. Returns None, or the number of the first line of the block that has to take the careful way. Raises
    FileChangedError when the file changed while it was read, DataPrepError when it is gone or its storage fails.
    """
    limit, number = (block + 1) * BLOCK_BYTES, 0
    with input_errors(file), open(file.path, "rb", buffering=0) as handle:
        if not is_unchanged(file, cast(BinaryIO, handle)):
            return number
        for data, size, position in _whole_lines(handle, block, limit, max_record_bytes):
            if not size or not _is_plain(data, size, position == 0):
                return number
            values = np.frombuffer(data, np.uint8, size)
            stops = np.flatnonzero(values == _LINE_END) + 1
            if position + size > limit:  # lines that start behind the block are those of the next one
                stops = stops[: int(np.searchsorted(stops[:-1] + position, limit)) + 1]
            begin = 0
            for some in np.split(stops, range(_LINES, len(stops), _LINES)):
                lengths = np.diff(some, prepend=begin)
                if int(lengths.max()) > max_record_bytes:
                    return number
                lines, begin = values[begin : int(some[-1])], int(some[-1])
                records = _as_they_are(lines, lengths, keys_of(block, number, len(lengths)), book)
                number += len(lengths)
                if len(records):
                    yield records
            del values, lines, records
        if not is_unchanged(file, cast(BinaryIO, handle)):
            raise FileChangedError(f"{file.path}: changed while it was read")
    return None


def _whole_lines(
    handle: Any, block: int, limit: int, max_record_bytes: int
) -> Iterator[tuple[bytearray, int, int]]:
    """(buffer, bytes in it that are whole lines, position of the first) from the first line that starts in the
    block on; 0 bytes where a record is too large. A last line of the file may lack its end. The buffer is used
    again: what is to be kept must be copied before the next step.
    """
    position = max(0, block * BLOCK_BYTES - 1)
    handle.seek(position)
    buffer, held, skipping = bytearray(2 * _CHUNK_BYTES), 0, block > 0
    while True:
        if len(buffer) - held < _CHUNK_BYTES:
            buffer = buffer + bytearray(len(buffer))
        count = handle.readinto(memoryview(buffer)[held : held + _CHUNK_BYTES])
        if not count:
            break
        held += count
        if skipping:  # what is before the first line end belongs to a record of an earlier block
            end = buffer.find(b"\n", 0, held)
            done = held if end < 0 else end + 1
            buffer[: held - done] = buffer[done:held]
            held, position, skipping = held - done, position + done, end < 0
            if skipping and position < limit:
                continue
        if position >= limit:
            return
        cut = buffer.rfind(b"\n", 0, held) + 1
        if cut:
            yield buffer, cut, position
            buffer[: held - cut] = buffer[cut:held]
            held, position = held - cut, position + cut
            if position >= limit:
                return
        if held > max_record_bytes:
            yield buffer, 0, position
    if held and not skipping:
        yield buffer, held, position


def _is_plain(data: bytearray, size: int, at_start: bool) -> bool:
    if data.find(b"\r", 0, size) >= 0 or data.find(b"\0", 0, size) >= 0 or data[size - 1] != _LINE_END:
        return False
    if at_start and data.startswith(b"\xef\xbb\xbf"):
        return False
    values = np.frombuffer(data, np.uint8, size)
    if values.max() < 128:
        return True
    text = pa.LargeStringArray.from_buffers(1, pa.py_buffer(np.array([0, size])), pa.py_buffer(values))
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _as_they_are(values: np.ndarray, lengths: np.ndarray, keys: np.ndarray, book: dict[str, Any]) -> Records:
    """The lines of plain UTF-8 text but the blank ones, which are dropped as empty."""
    book["read"] += len(lengths)
    book["bytes"] += len(values)
    records = Records({"key": keys, "length": lengths.astype(np.uint32)}, values, None)
    starts = np.cumsum(lengths) - lengths
    first = values[starts]
    suspects = np.flatnonzero(_MAY_BE_BLANK[first])
    blank = [
        n
        for n, byte in zip(suspects.tolist(), first[suspects].tolist(), strict=True)
        if (byte < 33 or values[starts[n] + 1] in _SECOND_OF_BLANK[byte])
        and not values[starts[n] : starts[n] + lengths[n]].tobytes().decode().strip()
    ]
    if blank:
        book["dropped"]["empty"] += len(blank)
        kept = np.delete(np.arange(len(lengths)), blank)
        columns = {name: column[kept] for name, column in records.columns.items()}
        records = Records(columns, Items(values, lengths).take(kept), None)
    book["written"] += len(records)
    return records


def gather_text(task: Any) -> dict[str, Any]:
    """Make one text shard of a GatherTask; running it again gives the same lines."""
    path = place(task.output_folder) / task.split / line_name(task.shard, task.zstd_level)
    first, stop = key_range(task.shard, task.shards)
    spills = SpillSet(task.spill_folder, task.spills, "|u1", False, False)
    drops = Drops(task.drops_folder, task.drops, SPLITS.index(task.split))
    content, lines, size = xxhash.xxh3_128(), 0, 0
    with atomic_file(path) as file:
        writer = _PartWriter(file, task.zstd_level, not is_remote(path))
        for records in drops.left_out(
            sorted_records(spills, SPLITS.index(task.split), first, stop, task.memory_bytes)
        ):
            content.update(records.tokens.data)
            writer.add(records.tokens.data)
            lines, size = lines + len(records), size + len(records.tokens)
        writer.finish()
    shard = {
        "name": path.name,
        "rows": lines,
        "documents": lines,
        "tokens": size,
        "file_bytes": writer.file_bytes,
    }
    return {
        "shard": shard | {"content": content.hexdigest(), "file_xxh3": "", "index_xxh3": ""},
        "written_bytes": writer.file_bytes,
        "read_bytes": spills.moved["read"],
        "dropped_sum": drops.document_sum,
    }


def verify_text(manifest: Manifest, split: str, shard: ShardEntry) -> dict[str, Any]:
    """Read a text shard again: counts, content hash and sum of its lines; its problems, one line each."""
    path = place(manifest.directory) / split / shard.name
    content, lines, size, total, carry = xxhash.xxh3_128(), 0, 0, 0, b""
    problems = []
    try:
        with path.open("rb") as file:
            opened = (
                zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
                if path.suffix == ".zst"
                else file
            )
            while chunk := opened.read(_CHUNK_BYTES):
                content.update(chunk)
                size += len(chunk)
                data = carry + chunk
                cut = data.rfind(b"\n") + 1
                values, carry = np.frombuffer(data[:cut], np.uint8), data[cut:]
                lengths = np.diff(np.flatnonzero(values == _LINE_END) + 1, prepend=0)
                lines, total = lines + len(lengths), (total + line_sum(values, lengths)) % (1 << 64)
    except (OSError, zstandard.ZstdError) as error:
        problems.append(f"{path}: cannot be read ({error})")
    if not problems and (lines, size, content.hexdigest()) != (shard.documents, shard.tokens, shard.content):
        problems.append(
            f"{path}: {lines} lines of {size} bytes, the manifest says {shard.documents} of {shard.tokens}"
            if (lines, size) != (shard.documents, shard.tokens)
            else f"{path}: its content is not that of the manifest (hash differs)"
        )
    found = {"rows": lines, "documents": lines, "tokens": size, "document_sum": total, "counts": b""}
    return {"split": split, "problems": problems, **found}


class _PartWriter:
    """Writes a text shard: plain (level 0), or in zstd frames of _FRAME_BYTES of text each. In what portions the text
    comes follows from the memory of the worker, and must not be seen in the file. A frame's header tells its size, so
    that several tasks can read the file. `near`: the file is one of this machine.
    """

    def __init__(self, file: BinaryIO, level: int, near: bool = True) -> None:
        self._file, self.file_bytes = file, 0
        self._early = _EarlyWriteBack(file) if near else None
        self._compressor = zstandard.ZstdCompressor(level=level) if level else None
        self._held = bytearray()

    def add(self, data: memoryview) -> None:
        if self._compressor is None:
            self._write(data)
            return
        self._held += data
        whole = len(self._held) // _FRAME_BYTES * _FRAME_BYTES
        with memoryview(self._held) as held:
            for begin in range(0, whole, _FRAME_BYTES):
                self._write(self._compressor.compress(held[begin : begin + _FRAME_BYTES]))
        del self._held[:whole]

    def finish(self) -> None:
        if self._compressor is not None and self._held:
            self._write(self._compressor.compress(self._held))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        if self._early is not None:
            self._early.wrote(len(data))
        self.file_bytes += len(data)


class _EarlyWriteBack:
    """Asks the kernel now and then to write what is in its cache, so that the disk works while we do."""

    def __init__(self, file: BinaryIO, every_bytes: int = 32 * 1024**2) -> None:
        self._file, self._every, self._pending = file, every_bytes, 0

    def wrote(self, count: int) -> None:
        self._pending += count
        if self._pending >= self._every:
            self._file.flush()
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._pending = 0
