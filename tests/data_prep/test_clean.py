"""Cleaning: what is changed, and why a record is dropped."""

from __future__ import annotations

import random
import unicodedata

import pytest
from pydantic import ValidationError

from data_prep.clean import DROP_REASONS, make_cleaner
from data_prep.config import CleaningSection
from data_prep.errors import DataPrepError


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
        ({"min_cjk_share": 0.5}, "l 法律", "l 法律"),
        ({"min_cjk_share": 1.0}, "〇々かなカナ한국 㐀𠀀", "〇々かなカナ한국 㐀𠀀"),
        ({"functions": ["tests.data_prep.functions:first_line"]}, " one  \n two", "one"),
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
        ({"min_cjk_share": 0.5}, "law 法律", "few_cjk"),
        ({"functions": ["tests.data_prep.functions:no_laws"]}, "a law", "tests.data_prep.functions:no_laws"),
    ],
)
def test_every_drop_has_a_reason(settings, text, reason):
    assert make_cleaner(CleaningSection(**settings))(text) == ("", reason)
    assert reason in (*DROP_REASONS, *settings.get("functions", ()))


def test_letters_of_any_script_count():
    clean = make_cleaner(CleaningSection(min_letter_share=0.8))
    assert clean("法律保护 law") == ("法律保护 law", "")


def test_combining_marks_count_as_letters_and_spaces_do_not_count():
    hindi = "यह एक साधारण हिन्दी वाक्य है जिसमें कोई संख्या नहीं है"
    strict = make_cleaner(CleaningSection(min_letter_share=1.0))
    assert strict(hindi) == (hindi, "") and strict("a b c d e") == ("a b c d e", "")
    assert make_cleaner(CleaningSection(min_letter_share=0.5))("१२३ ४५६ ह") == ("", "few_letters")


def test_a_batch_is_cleaned_like_its_texts():
    section = CleaningSection(min_characters=3, min_letter_share=0.6, min_cjk_share=0.2)
    texts = ["法律 law", "", "ab", "12 34 法", "nothing of it", "法律" * 9, "\u3000", "１２３四五六七八"] * 3
    together = make_cleaner(section).all(texts)
    assert list(zip(*together, strict=True)) == [make_cleaner(section)(text) for text in texts]
    assert set(together[1]) == {"", "empty", "too_short", "few_letters", "few_cjk"}


def test_the_share_is_the_one_counted_character_by_character():
    draw = random.Random(1)
    alphabet = "aZ é法ノ한,，。１1½Ⅷ〇 \u0301\u3000ह्\U00020000\U0001f600_"
    for share in (0.3, 0.5, 0.7):
        cleaner = make_cleaner(CleaningSection(min_letter_share=share, unicode="none"))
        for _ in range(300):
            text = "".join(draw.choices(alphabet, k=draw.randint(1, 12))).strip()
            kinds = [unicodedata.category(c) for c in text if not c.isspace()]
            letters = sum(kind[0] in "LM" or kind == "Nl" for kind in kinds)
            if kinds:
                assert (cleaner(text)[1] == "few_letters") == (letters < share * len(kinds)), text


def test_functions_that_are_no_use_are_told():
    for path, message in (
        ("tests.data_prep.functions:nothing", "cannot be imported"),
        ("no.such.module:clean", "cannot be imported"),
        ("tests.data_prep.functions:NUMBER", "is not a function"),
    ):
        with pytest.raises(DataPrepError, match=message):
            make_cleaner(CleaningSection(functions=[path]))
    for name, message in (("broken", "raised ValueError"), ("length", "returned int")):
        with pytest.raises(DataPrepError, match=message):
            make_cleaner(CleaningSection(functions=[f"tests.data_prep.functions:{name}"]))("text")
    with pytest.raises(ValidationError):
        CleaningSection(functions=["no colon"])
