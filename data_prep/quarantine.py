"""What could not be read: the lines of quarantine.jsonl, and how much of that a run bears."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import orjson

from .config import PrepareConfig
from .errors import DataPrepError
from .sources import FILE_REASONS, InputFile, RawBatch

_FAR_ABOVE = 10
# A line takes a hundred times the room of a record that is two brackets, so what is listed is bounded.
LISTED_OF_FILE, LISTED_OF_CORPUS = 1000, 10_000


class Quarantine:
    """Hands the lines of quarantine.jsonl to `write`: for each reason the first LISTED_OF_FILE records of a file and
    LISTED_OF_CORPUS of a corpus, and behind those of a file how many `more` there are.

    What is listed follows from the order of the records alone: a task leaves out what is too much of its own, and
    whoever joins the tasks leaves out the rest, so how the input was cut into tasks cannot be seen.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write, self._place = write, ("", "")  # the corpus and the name of the file at hand
        self._of_corpus: Counter[tuple[str, str]] = Counter()
        self._of_file: Counter[str] = Counter()
        self._more: Counter[str] = Counter()

    def put(self, corpus: str, file: InputFile, batch: RawBatch, position: int, reason: str) -> None:
        """The record at `position` of a batch; files come one after the other."""
        if self._has_room(corpus, file.relative, reason):
            self._write(_line(corpus, file, batch, position, reason))

    def join(self, lines: Iterable[bytes]) -> None:
        """What another one has written; they come in the order of their records."""
        for line in lines:
            entry = orjson.loads(line)
            place = entry["corpus"], entry["file"], entry["reason"]
            if "more" in entry:
                self._turn_to(*place[:2])
                self._more[entry["reason"]] += entry["more"]
            elif self._has_room(*place):
                self._write(line)

    def finish(self) -> None:
        """Write what is left to tell of the last file."""
        self._turn_to("", "")

    def _has_room(self, corpus: str, file: str, reason: str) -> bool:
        self._turn_to(corpus, file)
        if self._of_file[reason] >= LISTED_OF_FILE or self._of_corpus[corpus, reason] >= LISTED_OF_CORPUS:
            self._more[reason] += 1
            return False
        self._of_file[reason] += 1
        self._of_corpus[corpus, reason] += 1
        return True

    def _turn_to(self, corpus: str, file: str) -> None:
        if self._place == (corpus, file):
            return
        before = dict(zip(("corpus", "file"), self._place, strict=True))
        for reason, count in sorted(self._more.items()):
            self._write(_encoded(before | {"reason": reason, "more": count}))
        self._place, self._of_file, self._more = (corpus, file), Counter(), Counter()


def records_of_line(line: bytes) -> int:
    """How many records a line of quarantine.jsonl stands for. Raises ValueError when it is none."""
    entry = orjson.loads(line)
    if not isinstance(entry, dict) or not isinstance(count := entry.get("more", 1), int):
        raise ValueError("not a line of quarantine.jsonl")
    return count


def _line(corpus: str, file: InputFile, batch: RawBatch, position: int, reason: str) -> bytes:
    """Where the record at `position` of a batch lies, why it is lost, how it begins."""
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
    return _encoded(entry)


def _encoded(entry: dict[str, Any]) -> bytes:
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
            f"too much could not be read: {'; '.join(problems)} ({reasons}). OUTPUT/quarantine.jsonl lists them "
            f"with file and offset, up to {LISTED_OF_FILE:,} of a file for a reason, and counts the rest. "
            "Mend the input and start over with --fresh, or raise the limit and run again: "
            "finished tasks are kept"
        )
