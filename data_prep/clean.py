"""Cleaning: texts in, lines of clean text out, or the reason why a record is dropped.

A batch is looked at as a whole (`tidy`): white space is collapsed and clean texts are told from others without a
Python call a text, and shares of letters are counted by one table look-up a character. The others are cleaned one by
one, where checks that run in C decide whether a regular expression is needed.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from .config import CleaningSection
from .errors import DataPrepError
from .tidy import tidy

# Never text: NUL would end C strings, surrogates cannot be written as UTF-8.
_NEVER = re.compile("[\x00\ud800-\udfff]+")
# Control characters that are not white space, and marks without a width: zero-width space, bidi controls,
# soft hyphen, byte-order mark, interlinear annotation. The joiners U+200C and U+200D carry meaning and stay.
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff0-\ufffb\ufffe\uffff\ud800-\udfff]+"
)
# Han, its radicals and iteration marks, bopomofo, kana, hangul; punctuation and full-width forms are not among them.
_CJK = (
    (0x1100, 0x11FF),
    (0x2E80, 0x2FD5),
    (0x3005, 0x3007),
    (0x3021, 0x3029),
    (0x3031, 0x3035),
    (0x3041, 0x318E),
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xA960, 0xA97C),
    (0xAC00, 0xD7FB),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFFDC),
    (0x1B000, 0x1B2FF),
    (0x20000, 0x3FFFD),
)
_PART_CHARACTERS = 1024**2
_MOST_MARKS, _FIRST_MARK, _LAST_MARK = 512, 0x300, 0x1EFFF
_CODE_POINTS, _LAST_WITH_LETTERS, _VARIATION_SELECTORS = 0x110000, 0x40000, (0xE0100, 0xE01F0)

DROP_REASONS = ("empty", "too_short", "too_long", "few_letters", "few_cjk")

TextFunction = Callable[[str], str | None]


class Cleaner:
    """The cleaning of a configuration. `cleaner(text)` is `(clean text, "")` or `("", reason)`; the reason is one of
    DROP_REASONS, or the import path of the user's function that dropped the text. `cleaner.all` does the same for many.
    """

    def __init__(self, section: CleaningSection) -> None:
        self._section = section
        self._unwanted = _CONTROL if section.strip_control else _NEVER
        forms: dict[str, Literal["NFC", "NFKC"] | None] = {"nfc": "NFC", "nfkc": "NFKC", "none": None}
        self._form = forms[section.unicode]
        self._longest = section.max_characters or sys.maxsize
        self._functions = [(path, load_function(path)) for path in section.functions]
        shares = (("few_letters", section.min_letter_share), ("few_cjk", section.min_cjk_share))
        self._shares = [(reason, share) for reason, share in shares if share]
        self._in_batches = section.collapse_whitespace and section.strip_control and self._form != "NFKC"
        self._in_batches &= not self._functions

    def __call__(self, text: str) -> tuple[str, str]:
        text, reason = self._clean(text)
        texts, reasons = [text.encode()], [reason]
        self._drop_few(texts, reasons)
        return texts[0].decode(), reasons[0]

    def all(self, texts: Sequence[bytes | str]) -> tuple[list[bytes], list[str]]:
        """Clean texts (UTF-8) and, in step with them, the reasons of those that are dropped ("" for the others).

        Raises UnicodeDecodeError when bytes are not UTF-8. Text that UTF-8 cannot hold (surrogates) comes as str.
        """
        raw = [text for text in texts if isinstance(text, bytes)]
        if self._in_batches and raw and len(raw) == len(texts):
            cleaned, others = tidy(raw)
            reasons = [""] * len(cleaned)
            if b"" in cleaned:
                reasons = ["" if text else "empty" for text in cleaned]
            self._drop_by_length(cleaned, reasons)
            numbers = others.tolist()
        else:
            cleaned, reasons, numbers = [b""] * len(texts), [""] * len(texts), list(range(len(texts)))
        for number in numbers:
            given = texts[number]
            text, reasons[number] = self._clean(given.decode() if isinstance(given, bytes) else given)
            cleaned[number] = text.encode()
        self._drop_few(cleaned, reasons)
        return cleaned, reasons

    def _drop_by_length(self, texts: list[bytes], reasons: list[str]) -> None:
        """Characters are only counted where the bytes leave it open."""
        least, most = self._section.min_characters, self._longest
        if least == 1 and most == sys.maxsize:
            return
        for number, text in enumerate(texts):
            if not reasons[number] and not (4 * least <= len(text) <= most):
                count = len(text.decode())
                if count < least or count > most:
                    texts[number], reasons[number] = b"", "too_short" if count < least else "too_long"

    def _drop_few(self, texts: list[bytes], reasons: list[str]) -> None:
        for name, share in self._shares:
            kept = [number for number, reason in enumerate(reasons) if not reason]
            few = _has_few([texts[number] for number in kept], share, name == "few_cjk")
            for position in np.flatnonzero(few).tolist():
                texts[kept[position]], reasons[kept[position]] = b"", name

    def _clean(self, text: str) -> tuple[str, str]:
        section = self._section
        for path, function in self._functions:
            try:
                found = function(text)
            except Exception as error:
                raise DataPrepError(
                    f"cleaning.functions: {path} raised {error!r} for {text[:40]!r}; let it return None to drop a text"
                ) from None
            if found is None:
                return "", path
            if not isinstance(found, str):
                raise DataPrepError(
                    f"cleaning.functions: {path} returned {type(found).__name__} for {text[:40]!r}; expected the text, "
                    "or None to drop it"
                )
            text = found
        collapse = section.collapse_whitespace
        plain = text.isprintable()  # then the only white space is U+0020
        if not plain and collapse:
            text = _collapse(text)  # most of what is not printable is white space
            plain = text.isprintable()
        if not plain:
            text = "".join([self._unwanted.sub("", part) for part in _parts(text)])
        if self._form and not text.isascii():
            text = _normalised(text, self._form)
        if collapse and (not plain or "  " in text or text[:1] == " " or text[-1:] == " "):
            text = _collapse(text)
        if not text or text.isspace():
            return "", "empty"
        if len(text) < section.min_characters:
            return "", "too_short"
        if len(text) > self._longest:
            return "", "too_long"
        return text, ""


def make_cleaner(section: CleaningSection) -> Cleaner:
    """Raises DataPrepError when a user's function cannot be imported."""
    return Cleaner(section)


def load_function(path: str) -> TextFunction:
    """The function at `module:name`. It takes a text and returns it, changed or not, or None to drop it; it must
    depend on the text alone. Raises DataPrepError when there is none.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it, also in a worker process
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataPrepError(
            f"cleaning.functions: {path} cannot be imported ({error}); write module:name"
        ) from None
    if not callable(function):
        raise DataPrepError(f"cleaning.functions: {path} is not a function")
    found: TextFunction = function
    return found


def function_identity(path: str) -> str:
    """A hash of the source file that a user's function lies in: another file is another data set."""
    module = inspect.getmodule(load_function(path))
    source = inspect.getsource(module) if module is not None else path
    return hashlib.sha256(source.encode()).hexdigest()


def _parts(text: str) -> list[str]:
    """A text cut anywhere: lists of what lies in it take many times its memory."""
    return [text[begin : begin + _PART_CHARACTERS] for begin in range(0, len(text), _PART_CHARACTERS)]


def _normalised(text: str, form: Literal["NFC", "NFKC"]) -> str:
    """In a normal form of Unicode. Putting combining marks in order takes time by the square of how many follow each
    other, hours for a megabyte: a run of more than any script has is put in order by parts.
    """
    parts, begin, half = [], 0, _MOST_MARKS // 2
    for place in range(_MOST_MARKS, len(text), _MOST_MARKS):
        if text[place] in _marks() and _marks().issuperset(text[place - half : place + half]):
            parts.append(text[begin:place])
            begin = place
    return "".join([unicodedata.normalize(form, part) for part in (*parts, text[begin:])])


@lru_cache(maxsize=1)
def _marks() -> frozenset[str]:
    """Characters that are, or become, combining marks."""
    points = map(chr, range(_FIRST_MARK, _LAST_MARK + 1))
    return frozenset(
        point for point in points if unicodedata.combining(unicodedata.normalize("NFKD", point)[0])
    )


def _collapse(text: str) -> str:
    """`" ".join(text.split())`, which for a long text would make objects of ten times its size."""
    if len(text) <= _PART_CHARACTERS:
        return " ".join(text.split())
    found: list[str] = []
    space = False  # is one due before the next word?
    for part in _parts(text):
        space |= part[0].isspace()
        if words := " ".join(part.split()):
            found += [" ", words] if space and found else [words]
            space = part[-1].isspace()
    return "".join(found)


def _has_few(texts: list[bytes], share: float, cjk: bool) -> np.ndarray:
    """bool [n]: is less than this share of a text's characters, spaces left out, letters (or CJK)?"""
    few = np.ones(len(texts), dtype=bool)
    others = [number for number, text in enumerate(texts) if not (cjk and text.isascii())]  # ASCII has no CJK
    if others:
        joined = b"".join([texts[number] for number in others])
        points = np.frombuffer(joined.decode().encode("utf-32-le"), dtype="<u4")
        stops = np.cumsum([len(texts[number]) for number in others])
        begins = np.concatenate([[0], stops[:-1]])
        if len(points) < len(joined):  # positions of characters, not of bytes
            first = (np.frombuffer(joined, np.uint8) & 0xC0) != 0x80
            begins = np.concatenate([[0], np.cumsum(first)[stops[:-1] - 1]])
        counts = np.add.reduceat(_table(cjk).take(points), begins)
        few[others] = (counts >> 32) < share * (counts & 0xFFFFFFFF)
    return few


@lru_cache(maxsize=2)
def _table(cjk: bool) -> np.ndarray:
    """int64 by code point: 1 for what is not a space, plus 2^32 for a letter (or for CJK).

    A letter is any letter, letter number, or mark that combines with letters, of any script.
    """
    table = np.ones(_CODE_POINTS, dtype=np.int64)
    wanted = np.zeros(_CODE_POINTS, dtype=bool)
    if cjk:
        for first, last in _CJK:
            wanted[first : last + 1] = True
    else:
        kinds = [unicodedata.category(chr(point)) for point in range(_LAST_WITH_LETTERS)]
        wanted[:_LAST_WITH_LETTERS] = [kind[0] in "LM" or kind == "Nl" for kind in kinds]
        wanted[slice(*_VARIATION_SELECTORS)] = True
    table[wanted] += 1 << 32
    table[[point for point in range(0x3001) if chr(point).isspace()]] = 0
    return table
