"""What could not be read: a line in quarantine.jsonl for each record, and how much of that a run bears."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from .config import PrepareConfig
from .errors import DataPrepError
from .sources import FILE_REASONS, InputFile, RawBatch

_FAR_ABOVE = 10


def quarantine_line(corpus: str, file: InputFile, batch: RawBatch, position: int, reason: str) -> bytes:
    """One line of quarantine.jsonl: where the record at `position` of a batch lies, why it is lost, how it begins."""
    line = batch.lines[position]
    entry = {
        "corpus": corpus,
        "file": file.relative,
        "offset": int(batch.offsets[position]),
        "block": batch.block,
        "record": batch.first_record + position,
        "reason": reason,
        "excerpt": "" if isinstance(line, str) else line[:160].decode(errors="replace"),
    }
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode(errors="replace")


def lost_records(book: dict[str, Any]) -> int:
    """Records of an account that are lost by themselves, not with the end of a damaged file."""
    return sum(count for reason, count in book["quarantined"].items() if reason not in FILE_REASONS)


def cuts(book: dict[str, Any]) -> int:
    """How often reading a file of an account ended early, or went on behind damage."""
    return sum(count for reason, count in book["quarantined"].items() if reason in FILE_REASONS)


def is_hopeless(config: PrepareConfig, read: int, lost: int, input_share: float) -> bool:
    """Of the records read in this share of the input, are so many lost that the section `quarantine` will forbid it
    whatever comes? Records may be of other sizes in the rest, hence far above what is allowed.
    """
    return lost > _FAR_ABOVE * config.quarantine.max_record_share * read / max(input_share, 1e-9)


def check_losses(config: PrepareConfig, files: int, cut_short: int, books: list[dict[str, Any]]) -> None:
    """Raises DataPrepError when more is lost than the section `quarantine` allows. files: of the input; cut_short: how
    many of them were not read to the end, or not without a gap; books: one for each corpus.
    """
    limits, problems = config.quarantine, []
    read = sum(book["read"] for book in books)
    lost: Counter[str] = Counter()
    for corpus, book in zip(config.corpora, books, strict=True):
        lost.update({f"{corpus.name}: {reason}": count for reason, count in book["quarantined"].items()})
    records = sum(map(lost_records, books))
    for what, count, total, limit, key in (
        ("records", records, read, limits.max_record_share, "max_record_share"),
        ("files cut short", cut_short, files, limits.max_file_share, "max_file_share"),
    ):
        if count > limit * total:
            problems.append(
                f"{count:,} of {total:,} {what}, {count / total:.3%}, above quarantine.{key}={limit}"
            )
    if problems:
        reasons = ", ".join(f"{key} {count:,}" for key, count in lost.most_common(8))
        raise DataPrepError(
            f"too much could not be read: {'; '.join(problems)} ({reasons}). OUTPUT/quarantine.jsonl has every one "
            "with file and offset. Mend the input and start over with --fresh, or raise the limit and run again: "
            "finished tasks are kept"
        )
