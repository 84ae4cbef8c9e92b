"""Cleaning: what is changed, and why a record is dropped."""

from __future__ import annotations

import random
import sys
import time
import unicodedata
from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from data_prep import clean
from data_prep.clean import DROP_REASONS, make_cleaner
from data_prep.config import CleaningSection
from data_prep.errors import DataPrepError
from data_prep.tidy import _table


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
    section = CleaningSection(min_characters=3, max_characters=60, min_letter_share=0.6, min_cjk_share=0.2)
    texts = ["法律 law", "", "ab", "12 34 法", "nothing of it", "法律" * 9, "\u3000", "１２３四五六七八"] * 3
    texts += ["法" * 60, "法" * 61, "a\ue000" + "法" * 60]
    cleaned, reasons = make_cleaner(section).all([text.encode() for text in texts])
    one_by_one = [make_cleaner(section)(text) for text in texts]
    assert list(zip([text.decode() for text in cleaned], reasons, strict=True)) == one_by_one
    assert set(reasons) == {"", "empty", "too_short", "too_long", "few_letters", "few_cjk"}


# What NFC composes, decomposes and reorders, white space and controls of all widths, and what is left alone.
_TRICKY = (
    "a b.e\t\n\r\x0b\x1c\x1f\x00\x07\x7f\x85\xa0\xad\u0301\u0327\u0345é\u1100\u1161\u11a8가\u09c7\u09be\u1680\u180e"
    "\u2003\u2009\u200b\u200d\u2019\u2028\u202e\u202f\u205f\u2126\u212b\u2329\u3000\u3001法律\u302a\u304b\u3099\u309aゞ\ufeff\uff0c"
    "\uffff\U0001f600\U00020000\U0002f800\U0001d15e\U000e0100"
)


@pytest.mark.parametrize("settings", [{}, {"unicode": "none"}, {"unicode": "nfkc"}, {"strip_control": False}])
def test_a_batch_of_anything_is_cleaned_like_its_texts(settings):
    draw, cleaner = random.Random(2), make_cleaner(CleaningSection(**settings))
    for alphabet in (_TRICKY, "ab  .é\u2019\xa0 ", "法律，。 \u3000a"):
        for _ in range(100):
            texts = ["".join(draw.choices(alphabet, k=draw.randint(0, 20))) for _ in range(20)]
            texts += ["法律" * draw.randint(1, 100), "plain words " * draw.randint(0, 50)]
            draw.shuffle(texts)
            cleaned, reasons = cleaner.all([text.encode() for text in texts])
            found = list(zip([text.decode() for text in cleaned], reasons, strict=True))
            assert found == [cleaner(text) for text in texts]


def test_a_large_text_and_bytes_that_are_no_text():
    cleaner = make_cleaner(CleaningSection())
    large = " 法\u0301律  e\u0301\n" * 150_000
    texts = ["a  b", " \u3000", large, "", "c"]
    cleaned, _ = cleaner.all([text.encode() for text in texts])
    assert [text.decode() for text in cleaned] == [cleaner(text)[0] for text in texts]
    for bad in (b"\xe6\xb3", b"\xff" + b"a" * 99, b"\x95" + "法律".encode() * 9, b"\xed\xa0\x80"):
        with pytest.raises(UnicodeDecodeError):
            cleaner.all([b"before", bad, "法".encode()])
    assert cleaner.all(["x\ud800y", b"z"]) == ([b"xy", b"z"], ["", ""])


def test_nothing_that_the_table_leaves_alone_is_ever_changed():
    table, seconds = _table(), {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}
    for point in range(sys.maxunicode + 1):
        parts = unicodedata.decomposition(chr(point)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            seconds.add(int(parts[1], 16))  # NFC may join it to what stands before
    alone = np.flatnonzero(table == 0).tolist()
    assert len(alone) > 40_000
    text = "".join(map(chr, alone[128:]))
    assert make_cleaner(CleaningSection())(text) == (text, "")
    assert not seconds & set(alone) and not any(map(unicodedata.combining, text))


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_combining_marks_without_end_take_no_time_without_end(form):
    """A hundred thousand in the worst order would take half a minute; what scripts have is put in order as a whole."""
    started = time.monotonic()
    for pair in ("\u0301\u0316", "\u0f73"):  # the second becomes two marks
        found = clean._normalised(f"a{pair * 50_000}b", form)
        alone = Counter("".join(unicodedata.normalize("NFKD", character) for character in found))
        assert alone == Counter(dict.fromkeys(unicodedata.normalize("NFKD", pair), 50_000)) + Counter("ab")
    assert time.monotonic() - started < 10
    draw = random.Random(0)
    alphabet = "aZ法 \u0301\u0316\u0f73\u1100\u1161\u11a8\uff9e"
    for _ in range(300):
        words = ["".join(draw.choices(alphabet, k=draw.randint(1, 200))) for _ in range(20)]
        text = "".join(draw.choice((word, "e" + "\u0323\u0302" * draw.randint(1, 120))) for word in words)
        assert clean._normalised(text, form) == unicodedata.normalize(form, text)


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
