"""Before a run: does every corpus give text? A wrong text_field would else be told when all of it has been read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from .config import CorpusSection
from .errors import DataPrepError
from .plan import Plan
from .sources import InputFile, parse, read_batches

_FILES, _RECORDS = 8, 1000  # that are looked at before a corpus is refused; most give a text at once
# What says that a file is not of the kind that was declared; damage and size are matters of single files.
_REASONS = ("missing_field", "field_is_not_text", "not_a_json_object", "invalid_json", "invalid_utf8")


def refuse_unreadable(plan: Plan) -> None:
    """Raises DataPrepError with a line for each corpus of which no record can be read, unless all may be lost."""
    if plan.config.quarantine.max_record_share >= 1:
        return
    problems = []
    for number, corpus in enumerate(plan.config.corpora):
        files = [
            file
            for file in plan.files
            if file.corpus == number
            and file.size_bytes
            and file.format != "parquet"  # whose column has been looked at
        ]
        chosen = files[:: max(1, len(files) // _FILES)][:_FILES]
        reasons = _reasons(chosen, plan.config.cleaning.max_record_bytes)
        if reasons:
            problems.append(f"corpora.{number} ({corpus.name}): {_problem(corpus, chosen, reasons)}")
    if problems:
        raise DataPrepError("\n".join(problems))


def _reasons(files: list[InputFile], max_record_bytes: int) -> Counter[str]:
    """Why none of the first records could be read; empty where one could."""
    reasons: Counter[str] = Counter()
    for file in files:
        for line in islice(_lines(file, max_record_bytes), _RECORDS):
            text, reason = parse(file, line)
            if text and not text.isspace():
                return Counter()
            reasons.update([reason] if reason in _REASONS else [])
    return reasons


def _lines(file: InputFile, max_record_bytes: int) -> Iterator[bytes | str]:
    for batch in read_batches(file, 0, 1, max_record_bytes):
        yield from batch.lines


def _problem(corpus: CorpusSection, files: list[InputFile], reasons: Counter[str]) -> str:
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    told = f"no record gives a text ({counts} in the beginnings of {len(files)} file(s), as {files[0].path})"
    if any(reason in reasons for reason in ("missing_field", "field_is_not_text")):
        return f"{told}; text_field is {corpus.text_field!r}{_keys(files)}; set text_field"
    return f"{told}; see format, and whether the files are UTF-8"


def _keys(files: list[InputFile]) -> str:
    """The keys of the first record that is an object."""
    for file in files:
        for line in islice(_lines(file, 2**24), _RECORDS):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                return f", a record has {', '.join(map(repr, islice(record, 20))) or 'no keys'}"
    return ""
