"""Cutting a stream of bytes into records: a line each, or what stands between blank lines.

The stream comes in chunks of any size, with a Gap where bytes cannot be read. A record that cannot be had is the reason
why, a str, in the place of its bytes, so that nothing disappears between two records. How the stream is cut into
chunks, and where a reader begins, does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np

from .decompress import Gap

_UTF8_MARK = b"\xef\xbb\xbf"
_BLANK_LINES = re.compile(rb"\n(?:\r?\n)+")
_LEADING_LINE_ENDS = re.compile(rb"(?:\r?\n)*")
BLANK_CONTEXT_BYTES = 3  # of what lies before a record, to tell a blank line with either kind of line end

Cut = tuple[list[bytes | str], np.ndarray]


def cut_lines(
    chunks: Iterable[bytes | Gap],
    start: int,
    limit: int | None,
    max_record_bytes: int,
    inside_record: bool,
    fragments_parse: bool,
) -> Iterator[Cut]:
    """Lines (without their ends) of a stream that begins at byte `start`, and their byte offsets [n].

    Only lines that start before `limit`. With `inside_record`, bytes up to the first line end belong to an earlier
    record and are skipped. Behind a gap the first line may lack its beginning: with `fragments_parse` it is given out,
    as its parser will tell, otherwise it is lost as beside_damage.
    """
    carry, position = b"", start  # the unfinished line, and the byte it starts at
    # Throwing a line away: why and from where (lost_at < 0: it belongs to somebody else).
    skipping, reason, lost_at = inside_record, "", -1
    for chunk in chunks:
        if isinstance(chunk, Gap):
            if lost_at >= 0 or not skipping:
                yield [chunk.reason], np.array([lost_at if lost_at >= 0 else position], dtype=np.int64)
            carry, skipping, lost_at = b"", False, -1
            if chunk.resume is None:
                return
            position = chunk.resume
            if limit is not None and position >= limit:
                return
            if not fragments_parse:
                skipping, reason, lost_at = True, "beside_damage", position
            continue
        data, carry = carry + chunk, b""
        if skipping:
            end = data.find(b"\n")
            if end < 0:
                position += len(data)
                if limit is not None and position >= limit:
                    break  # what follows the record starts behind the limit, however long it is
                continue
            if lost_at >= 0:
                yield [reason], np.array([lost_at], dtype=np.int64)
            data, position = data[end + 1 :], position + end + 1
            skipping, lost_at = False, -1
        if limit is not None and position >= limit:
            return
        cut = data.rfind(b"\n") + 1
        if cut:
            lines = data[: cut - 1].split(b"\n")
            lengths = np.fromiter(map(len, lines), dtype=np.int64, count=len(lines)) + 1
            offsets = position + np.cumsum(lengths) - lengths
            kept = len(lines) if limit is None else int(np.searchsorted(offsets, limit))
            yield _finish(lines[:kept], position, max_record_bytes, b"\r" in data), offsets[:kept]
            data, position = data[cut:], position + cut
            if limit is not None and position >= limit:
                return
        if len(data) > max_record_bytes:
            skipping, reason, lost_at = True, "record_too_large", position
            position += len(data)
        else:
            carry = data
    if lost_at >= 0:
        yield [reason], np.array([lost_at], dtype=np.int64)
    elif carry:
        yield _finish([carry], position, max_record_bytes, True), np.array([position], dtype=np.int64)


def _finish(lines: list[bytes], position: int, max_record_bytes: int, returns: bool) -> list[bytes | str]:
    """Take off carriage returns, if there are any, and a byte-order mark at the file's start; a reason for what is
    too large.
    """
    if position == 0 and lines and lines[0].startswith(_UTF8_MARK):
        lines[0] = lines[0][len(_UTF8_MARK) :]
    finished: list[bytes | str] = [*lines]
    if returns:
        finished = [line[:-1] if line.endswith(b"\r") else line for line in lines]
    if lines and max(map(len, lines)) > max_record_bytes:
        finished = [
            "record_too_large" if len(line) > max_record_bytes else kept
            for line, kept in zip(lines, finished, strict=True)
        ]
    return finished


def cut_paragraphs(
    chunks: Iterable[bytes | Gap], start: int, limit: int | None, max_record_bytes: int, first: int
) -> Iterator[Cut]:
    """Records between blank lines, and their byte offsets [n]; `start` is the byte at which the stream begins, and
    only records that start at `first` .. `limit` - 1 are given out (start is 0 or first - BLANK_CONTEXT_BYTES).

    A blank line is an empty one, with or without a carriage return.
    """
    buffer, position = b"", start
    between, lost_at, reason = start == 0, -1, ""  # between records: only line ends have been seen
    foreign = start > 0  # the record at the buffer's start began somewhere before
    for chunk in _with_end(chunks):
        if isinstance(chunk, Gap):
            if not foreign:
                yield [chunk.reason], np.array([lost_at if lost_at >= 0 else position], dtype=np.int64)
            if chunk.resume is None or (limit is not None and chunk.resume >= limit):
                return
            buffer, position, between = b"", chunk.resume, False
            lost_at, reason, foreign = position, "beside_damage", False
            continue
        ended = chunk == b""
        buffer += chunk
        records: list[bytes | str] = []
        offsets: list[int] = []
        at, done = 0, False
        while True:
            if between:
                at = _match_end(_LEADING_LINE_ENDS, buffer, at)
                if len(buffer) - at < 2 and not ended:
                    break  # a carriage return whose line end has not come yet
                between = False
            if limit is not None and not foreign and lost_at < 0 and position + at >= limit:
                done = True
                break
            found = _BLANK_LINES.search(buffer, at)
            if found is None or (found.end() > len(buffer) - 2 and not ended):
                break
            if not foreign:
                records.append(
                    reason
                    if lost_at >= 0
                    else _paragraph(buffer[at : found.start()], position + at, max_record_bytes)
                )
                offsets.append(lost_at if lost_at >= 0 else position + at)
            at, foreign, lost_at = found.end(), False, -1
        if done:
            yield from _chosen(records, offsets, first)
            return
        buffer, position = buffer[at:], position + at
        if not between and (foreign or lost_at >= 0 or len(buffer) > max_record_bytes):
            if not foreign and lost_at < 0:
                lost_at, reason = position, "record_too_large"
            blank = _BLANK_LINES.search(buffer)  # one at the end may go on
            spare = blank.start() if blank else max(0, len(buffer) - BLANK_CONTEXT_BYTES)
            buffer, position = buffer[spare:], position + spare
            if foreign and limit is not None and position >= limit:
                return
        if ended and not foreign and not between:
            last = buffer.rstrip(b"\r\n")
            if lost_at >= 0 or last:
                records.append(reason if lost_at >= 0 else _paragraph(last, position, max_record_bytes))
                offsets.append(lost_at if lost_at >= 0 else position)
        yield from _chosen(records, offsets, first)


def _with_end(chunks: Iterable[bytes | Gap]) -> Iterator[bytes | Gap]:
    """The chunks, and an empty one at the end of the stream."""
    for chunk in chunks:
        if chunk != b"":
            yield chunk
    yield b""


def _match_end(pattern: re.Pattern[bytes], data: bytes, at: int) -> int:
    found = pattern.match(data, at)
    return at if found is None else found.end()


def _paragraph(data: bytes, position: int, max_record_bytes: int) -> bytes | str:
    data = data.rstrip(b"\r")
    if position == 0:
        data = data.removeprefix(_UTF8_MARK)
    return "record_too_large" if len(data) > max_record_bytes else data


def _chosen(records: list[bytes | str], offsets: list[int], first: int) -> Iterator[Cut]:
    skipped = sum(offset < first for offset in offsets)
    if skipped < len(records):
        yield records[skipped:], np.array(offsets[skipped:], dtype=np.int64)
