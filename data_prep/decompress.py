"""Decompression in bounded pieces: gz, zst, bz2 and xz streams, and the frames of a zst file at which one may begin.

One call of a decoder may return thousands of times its input (a zstd block of 4 bytes is 128 KiB of one letter), so
every decoder is asked for at most CHUNK_BYTES at a time, zstd windows are limited, and a stream that unpacks to more
than MAX_EXPANSION times its size is refused as a decompression bomb.
"""

from __future__ import annotations

import bz2
import lzma
import mmap
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

from backports import zstd

CHUNK_BYTES = 1024**2
_READ_BYTES = 64 * 1024
_MAX_WINDOW_LOG = 27  # 128 MiB, what `zstd -d` takes without being asked
_MAX_LZMA_BYTES = 256 * 1024**2
# gzip cannot do more than about 1,030; real text stays far below 100.
MAX_EXPANSION = 500
_FREE_BYTES = 64 * 1024**2  # unpacked before the expansion is looked at
_SEEK_TABLE_MAGIC, _SKIPPABLE_MAGIC = 0x8F92EAB1, 0x184D2A5E


@dataclass(frozen=True)
class Gap:
    """Bytes of a stream that cannot be read, and why; it goes on at decompressed byte `resume` (None: it does not)."""

    reason: str
    resume: int | None = None


class _Gzip:
    """zlib with the interface that the other decoders have."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)
        self._rest = b""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        part = self._decoder.decompress(self._rest + data, max_length)
        self._rest = self._decoder.unconsumed_tail
        return part

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._rest


def _zstd() -> Any:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG})


COMPRESSIONS: dict[str, Callable[[], Any]] = {
    ".gz": _Gzip,
    ".zst": _zstd,
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(memlimit=_MAX_LZMA_BYTES),
}
_DECODER_ERRORS = (zlib.error, zstd.ZstdError, lzma.LZMAError, OSError, EOFError, ValueError)
_PADDED = (".gz", ".xz")  # zeros may follow a member


def decompressed(
    handle: BinaryIO, compression: str, frames: tuple[tuple[int, int], ...] = ()
) -> Iterator[bytes | Gap]:
    """Decompress a stream of any number of members from where the handle stands; what cannot be read is a Gap.

    frames: (compressed offset, decompressed offset) of points at which one may begin; after damage reading goes on at
    the first of them behind the damaged member.
    """
    while True:
        reason, member = yield from _until_damage(handle, compression)
        later = [frame for frame in frames if frame[0] > member]
        if not reason:
            return
        if reason == "decompression_bomb" or not later:
            yield Gap(reason)
            return
        yield Gap(reason, later[0][1])
        handle.seek(later[0][0])


def _until_damage(handle: BinaryIO, compression: str) -> Generator[bytes, None, tuple[str, int]]:
    """Yield what decodes; returns why it ended early ("" where it did not) and where the last member begins.

    What a decoder gets at a time ends at multiples of _READ_BYTES in the file, so that as much of a damaged member is
    read whether one began with it or came to it.
    """
    make_decoder = COMPRESSIONS[compression]
    decoder, fed, made, member = None, 0, 0, handle.tell()
    while data := handle.read(_READ_BYTES - handle.tell() % _READ_BYTES):
        fed, stop = fed + len(data), handle.tell()
        while data or (decoder is not None and not decoder.needs_input):
            if decoder is None:
                data = data.lstrip(b"\0") if compression in _PADDED else data
                if not data:
                    break
                decoder, member = make_decoder(), stop - len(data)
            try:
                part = decoder.decompress(data, CHUNK_BYTES)
            except _DECODER_ERRORS as error:
                return _reason(error), member
            made += len(part)
            if is_bomb(fed, made):
                return "decompression_bomb", member
            if part:
                yield part
            data = b""
            if decoder.eof:
                data, decoder = decoder.unused_data, None
    return "" if decoder is None else "truncated_compression", member


def _reason(error: Exception) -> str:
    """Nothing is wrong with a file that only asks for more memory than a reader may take."""
    told = str(error).lower()
    too_large = "too much memory" in told or "memory usage limit" in told  # of libzstd, of liblzma
    return "window_too_large" if too_large else "damaged_compression"


def is_bomb(packed_bytes: int, text_bytes: int) -> bool:
    """Does so much come out of so little that it cannot be text?"""
    return text_bytes > _FREE_BYTES and text_bytes > MAX_EXPANSION * packed_bytes


def zstd_frames(handle: BinaryIO, size_bytes: int) -> list[tuple[int, int]]:
    """(compressed offset, decompressed offset) of every frame and of the end; [] where they cannot be told without
    decompressing. From a seek table at the end, else from the frames' headers, when all of them name their size.
    """
    frames = _seek_table(handle, size_bytes) or _walk(handle, size_bytes)
    return [] if not frames or is_bomb(size_bytes, frames[-1][1]) else frames


def _seek_table(handle: BinaryIO, size_bytes: int) -> list[tuple[int, int]]:
    """The zstd seekable format: a skippable frame of (compressed, decompressed[, checksum]) at the very end."""
    if size_bytes < 17:
        return []
    handle.seek(size_bytes - 9)
    footer = handle.read(9)
    if int.from_bytes(footer[5:], "little") != _SEEK_TABLE_MAGIC:
        return []
    count, entry_bytes = int.from_bytes(footer[:4], "little"), 12 if footer[4] & 0x80 else 8
    table_bytes = count * entry_bytes
    start = size_bytes - 17 - table_bytes
    if start < 0:
        return []
    handle.seek(start)
    table = handle.read(8 + table_bytes)
    header = (_SKIPPABLE_MAGIC, table_bytes + 9)
    if (int.from_bytes(table[:4], "little"), int.from_bytes(table[4:8], "little")) != header:
        return []
    frames = [(0, 0)]
    for at in range(8, 8 + table_bytes, entry_bytes):
        packed, text = (int.from_bytes(table[at + i : at + i + 4], "little") for i in (0, 4))
        frames.append((frames[-1][0] + packed, frames[-1][1] + text))
    return frames if frames[-1][0] == start else []


def _walk(handle: BinaryIO, size_bytes: int) -> list[tuple[int, int]]:
    """Frame after frame of a local file, skippable ones passed over; touches the headers of its blocks alone."""
    try:
        descriptor = handle.fileno()
    except (OSError, AttributeError):
        return []
    frames, at, text = [], 0, 0
    with mmap.mmap(descriptor, size_bytes, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
        data.madvise(mmap.MADV_RANDOM)  # or the system reads ahead at every header, and so the whole file
        try:
            while at < size_bytes:
                with view[at:] as rest:
                    if bytes(rest[1:4]) == b"\x2a\x4d\x18" and 0x50 <= rest[0] <= 0x5F:
                        at += 8 + int.from_bytes(rest[4:8], "little")
                        continue
                    inside = zstd.get_frame_info(rest[:18]).decompressed_size
                    if inside is None:
                        return []
                    frames.append((at, text))
                    at += zstd.get_frame_size(rest)
                    text += inside
        except zstd.ZstdError:
            return []
    return [*frames, (at, text)] if at == size_bytes else []


def entry_points(frames: list[tuple[int, int]], block_bytes: int) -> tuple[tuple[int, int], ...]:
    """For every block of decompressed text the frame to begin with: the last that begins before it, as the byte before
    a block tells whether a record starts there. Empty where the frames do not help (fewer than two).
    """
    if len(frames) < 3:
        return ()
    chosen, number = [], 0
    blocks = max(1, -(-frames[-1][1] // block_bytes))
    for block in range(blocks):
        while number + 2 < len(frames) and frames[number + 1][1] < max(1, block * block_bytes):
            number += 1
        chosen.append(frames[number])
    return tuple(chosen) if any(a != b for a, b in pairwise(chosen)) else ()
