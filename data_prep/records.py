"""From raw records to clean texts with their shuffle keys, and the account of what became of every record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from .clean import Cleaner
from .keys import philox_words, stream_id, stripe_words
from .quarantine import Quarantine
from .sources import InputFile, RawBatch, parse


@dataclass(frozen=True)
class Segment:
    """Blocks first_block .. stop_block - 1 of file number `file` (to its end where stop_block is None)."""

    file: int
    input: InputFile
    corpus_name: str
    first_block: int
    stop_block: int | None
    weight: float = 1.0


def segment_bytes(segment: Segment) -> int:
    """Bytes on disk that a segment reads."""
    return segment.input.disk_bytes(segment.first_block, segment.stop_block)


def new_book() -> dict[str, Any]:
    """The account of one corpus: every record read is written, dropped for a reason, or quarantined for a
    reason.
    """
    return {
        "read": 0,
        "bytes": 0,
        "written": 0,
        "repeated": 0,
        "dropped": Counter(),
        "quarantined": Counter(),
    }


def outcomes(books: Iterable[dict[str, Any]]) -> Counter[str]:
    """How many records of some accounts are written (copies by weight included), dropped and quarantined."""
    found: Counter[str] = Counter()
    for book in books:
        found["written"] += book["written"]
        found["dropped"] += sum(book["dropped"].values())
        found["quarantined"] += sum(book["quarantined"].values())
    return found


def clean_texts(
    segment: Segment,
    batch: RawBatch,
    chosen: np.ndarray,
    clean: Cleaner,
    book: dict[str, Any],
    quarantine: Quarantine | None = None,
) -> tuple[list[bytes], list[int]]:
    """Clean texts (UTF-8) and record numbers of the `chosen` records (positions) of a batch; the others' fate goes
    to the book.
    """
    positions = chosen.tolist()
    places = [batch.first_record + position for position in positions]
    lines = [line for position in positions if isinstance(line := batch.lines[position], bytes)]
    cleaned = None
    if segment.input.format == "txt" and len(lines) == len(positions):  # a line is its own text
        with suppress(UnicodeDecodeError):
            cleaned = clean.all(lines)
    if cleaned is None:
        raws, places = [], []
        for position in positions:
            raw, reason = parse(segment.input, batch.lines[position])
            if raw is None:
                book["quarantined"][reason] += 1
                if quarantine is not None:
                    quarantine.put(segment.corpus_name, segment.input, batch, position, reason)
                continue
            raws.append(_encoded(raw))
            places.append(batch.first_record + position)
        cleaned = clean.all(raws)
    texts, reasons = cleaned
    if any(reasons):
        book["dropped"].update(filter(None, reasons))
        texts = [text for text, reason in zip(texts, reasons, strict=True) if not reason]
        places = [place for place, reason in zip(places, reasons, strict=True) if not reason]
    return texts, places


def _encoded(text: str) -> bytes | str:
    try:
        return text.encode()
    except UnicodeEncodeError:  # surrogates, which JSON can spell; cleaning takes them out
        return text


def record_keys(
    seed: int,
    corpus: str,
    relative: str,
    block: int,
    first: int,
    count: int,
    algorithm: str = "key",
    copy: int = 0,
) -> np.ndarray:
    """Shuffle keys of raw records first .. first + count - 1 of a block, or of another copy of them, uint64 [count]."""
    words = stripe_words if algorithm == "stripe" else philox_words
    again = ("copy", copy) if copy else ()
    return words(seed, stream_id("order", corpus, relative, block, *again), first, count)
