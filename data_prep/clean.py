"""Cleaning: one text in, one line of clean text out, or the reason why the record is dropped.

Checks that run in C decide whether a regular expression is needed; characters are looked at one by one only
where marks decide whether a text has enough letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Literal

from .config import CleaningSection

# Never text: NUL would end C strings, surrogates cannot be written as UTF-8.
_NEVER = re.compile("[\x00\ud800-\udfff]+")
# Control characters that are not white space, and marks without a width: zero-width space, bidi controls,
# soft hyphen, byte-order mark, interlinear annotation. The joiners U+200C and U+200D carry meaning and stay.
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff0-\ufffb\ufffe\uffff\ud800-\udfff]+"
)
_NOT_LETTER = re.compile(r"[\W\d_]+")

_LAST_BEFORE_MARKS = "\u02ff"

DROP_REASONS = ("empty", "too_short", "too_long", "few_letters")


def make_cleaner(section: CleaningSection) -> Callable[[str], tuple[str, str]]:
    """Return `clean(text) -> (clean text, "")` or `("", reason)` with a reason of DROP_REASONS."""
    unwanted = _CONTROL if section.strip_control else _NEVER
    form: Literal["NFC", "NFKC"] | None = {"nfc": "NFC", "nfkc": "NFKC", "none": None}[section.unicode]
    longest = section.max_characters or float("inf")

    def clean(text: str) -> tuple[str, str]:
        plain = text.isprintable()  # then the only white space is U+0020
        if not plain:
            text = unwanted.sub("", text)
        if form and not text.isascii():
            text = unicodedata.normalize(form, text)
        if section.collapse_whitespace and (not plain or "  " in text or text[:1] == " " or text[-1:] == " "):
            text = " ".join(text.split())
        if not text or text.isspace():
            return "", "empty"
        if len(text) < section.min_characters:
            return "", "too_short"
        if len(text) > longest:
            return "", "too_long"
        if section.min_letter_share and _has_few_letters(text, section.min_letter_share):
            return "", "few_letters"
        return text, ""

    return clean


def _has_few_letters(text: str, share: float) -> bool:
    """Are less than this share of the characters, spaces left out, letters or marks that combine with letters?"""
    wanted = share * len("".join(text.split()))
    letters = len(_NOT_LETTER.sub("", text))
    if letters >= wanted or text.isascii():
        return letters < wanted
    return letters + sum(unicodedata.category(c)[0] == "M" for c in text if c > _LAST_BEFORE_MARKS) < wanted
