"""Cleaning: what is changed, and why a record is dropped."""

from __future__ import annotations

import pytest

from data_prep.clean import DROP_REASONS, make_cleaner
from data_prep.config import CleaningSection


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        ({}, "  two\twords\r\nand　more ", "two words and more"),
        ({}, "a\u200bb\ufeffc\u202ed\xade\x07f", "abcdef"),
        ({}, "a\u200db", "a\u200db"),
        ({}, "e\u0301", "\xe9"),
        ({}, "e\u200b\u0301", "\xe9"),
        ({}, "x\x00y\ud800z", "xyz"),
        ({"strip_control": False}, "x\x00y\ud800z\u200b", "xyz\u200b"),
        ({"unicode": "nfkc"}, "ＡＢＣ，①", "ABC,1"),
        ({"unicode": "nfc"}, "ＡＢＣ，①", "ＡＢＣ，①"),
        ({"unicode": "none"}, "e\u0301", "e\u0301"),
        ({"collapse_whitespace": False}, " a\n b ", " a\n b "),
        ({}, "a \x07 b", "a b"),
    ],
)
def test_text_is_cleaned(settings, text, expected):
    assert make_cleaner(CleaningSection(**settings))(text) == (expected, "")


@pytest.mark.parametrize(
    ("settings", "text", "reason"),
    [
        ({}, "", "empty"),
        ({}, " \n\t\u3000", "empty"),
        ({}, "\u200b\x00", "empty"),
        ({"collapse_whitespace": False}, " \n", "empty"),
        ({"min_characters": 3}, "ab", "too_short"),
        ({"max_characters": 3}, "abcd", "too_long"),
        ({"min_letter_share": 0.5}, "12345 法律", "few_letters"),
    ],
)
def test_every_drop_has_a_reason(settings, text, reason):
    assert make_cleaner(CleaningSection(**settings))(text) == ("", reason)
    assert reason in DROP_REASONS


def test_letters_of_any_script_count():
    clean = make_cleaner(CleaningSection(min_letter_share=0.8))
    assert clean("法律保护 law") == ("法律保护 law", "")


def test_combining_marks_count_as_letters_and_spaces_do_not_count():
    hindi = "यह एक साधारण हिन्दी वाक्य है जिसमें कोई संख्या नहीं है"
    strict = make_cleaner(CleaningSection(min_letter_share=1.0))
    assert strict(hindi) == (hindi, "") and strict("a b c d e") == ("a b c d e", "")
    assert make_cleaner(CleaningSection(min_letter_share=0.5))("१२३ ४५६ ह") == ("", "few_letters")
