"""Word starts: which tokens begin a word, for whole-word masking.

A token is a word start iff its first character is the first character of a word. Words are those of the
segmenter (rjieba: a dictionary and a hidden Markov model for Chinese, runs of letters or digits otherwise; it cuts
as jieba does, 26 times as fast, and keeps its dictionary inside: no cache is read from a folder that all may write),
with a space counted to the word behind it, because sentencepiece glues it there: in "▁the", or "▁" followed
by "the", the word starts at "▁".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version

import numpy as np
import xxhash

_SPACE = ord(" ")
_PROBE = (
    "南京市长江大桥位于江苏省南京市，他来到了网易杭研大厦。小明硕士毕业于中国科学院计算所，后在日本京都大学深造。"
    "结婚的和尚未结婚的都可以登记。The quick brown fox doesn't jump over 12345 lazy dogs."
    "維基百科是自由的百科全書。"
)


def segmenter_identity(segmenter: str) -> dict[str, str]:
    """Name and version of the segmenter, a hash of how it cuts a fixed text, and one of its dictionary."""
    if segmenter == "none":
        return {"segmenter": "none"}
    import rjieba  # loads its dictionary: a quarter of a second that runs without word starts do not pay

    cut = "\n".join(rjieba.cut(_PROBE, True))
    return {
        "segmenter": segmenter,
        "version": version("rjieba"),
        "probe": xxhash.xxh3_64_hexdigest(cut.encode()),
        "dictionary": _dictionary_hash(rjieba.has_word),
    }


@lru_cache(maxsize=1)
def _dictionary_hash(has_word: Callable[[str], bool]) -> str:
    """Which of 25,600 pairs of common characters the dictionary knows as words, xxh3-64.

    The dictionary is compiled into the extension, so it is asked: the file differs from platform to platform.
    """
    level_one = [
        bytes((row, cell)).decode("gb2312") for row in range(0xB0, 0xD7) for cell in range(0xA1, 0xFA)
    ]
    characters = level_one[::21][:160]
    known = bytes(has_word(a + b) for a in characters for b in characters)
    return xxhash.xxh3_64_hexdigest(known)


def word_start_characters(texts: list[str]) -> np.ndarray:
    """bool [C]: for the C characters of all texts in a row, whether a word starts there.

    The texts are cut as one, a line each: a line end always parts words, and one long call runs twice as
    fast.
    """
    import rjieba

    joined = "\n".join(texts) + "\n"
    words = rjieba.cut(joined, True)
    word_lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    starts = np.zeros(len(joined), dtype=bool)
    starts[np.cumsum(word_lengths) - word_lengths] = True
    is_space = np.frombuffer(joined.encode("utf-32-le"), dtype="<u4") == _SPACE
    starts[1:] = (starts[1:] | is_space[1:]) & ~is_space[:-1]
    text_lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)) + 1
    text_ends = np.cumsum(text_lengths)
    starts[(text_ends - text_lengths)] = True
    return np.delete(starts, text_ends - 1)
