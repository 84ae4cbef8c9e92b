"""Masking as a pure function of (seed, sample index): no worker state, so that resume is exact to the mask.

Shapes: N rows (samples), L tokens a row, V vocabulary, W words of all rows. The random words of sample i are words
[2·L·i, 2·L·(i+1)) of one Philox stream: the first L decide the fate of the word that starts at each position, the
other L give replacement tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from data_prep.keys import philox_words, stream_id

IGNORED = -100
"""Label of a position that carries no loss (the convention of torch's cross entropy)."""


class LabelledRows(NamedTuple):
    """Rows ready for a language model; all arrays are int64 [N, L] unless said otherwise."""

    inputs_NL: np.ndarray
    labels_NL: np.ndarray  # the token that is to be predicted from there, IGNORED elsewhere
    hidden_NL: (
        np.ndarray
    )  # bool: the input does not show it, so a right guess counts (no kept or random token)
    types_NL: np.ndarray | None = None  # context unilm: 1 behind the prefix of a document

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> LabelledRows:
        """The same with every array changed."""
        types_NL = None if self.types_NL is None else change(self.types_NL)
        return LabelledRows(change(self.inputs_NL), change(self.labels_NL), change(self.hidden_NL), types_NL)


@dataclass(frozen=True)
class VocabularyWords:
    """Word starts from the pieces alone, for shards without a column of them."""

    begins_V: np.ndarray  # bool: the piece begins a word wherever it stands
    ends_V: np.ndarray  # bool: what follows the piece begins a word

    @classmethod
    def of_pieces(cls, pieces: Sequence[str]) -> VocabularyWords:
        """BERT vocabularies: a piece begins a word unless it starts with ##. Sentencepiece: a piece begins a word where
        it starts with the space mark; since Chinese is written without spaces, also where it starts, or the one
        before it
        ends, with a character that is no letter, mark or digit of a script with spaces.
        """
        if any(piece.startswith("##") and len(piece) > 2 for piece in pieces):
            begins = [not (piece.startswith("##") and len(piece) > 2) for piece in pieces]
            return cls(np.array(begins), np.zeros(len(pieces), bool))
        begins = [not piece or piece[0] == "\u2581" or not _joins(piece[0]) for piece in pieces]
        ends = [bool(piece) and piece[-1] != "\u2581" and not _joins(piece[-1]) for piece in pieces]
        return cls(np.array(begins), np.array(ends))

    def starts(self, tokens_NL: np.ndarray) -> np.ndarray:
        """bool [N, L]: True where a word begins."""
        starts_NL = self.begins_V[tokens_NL]
        starts_NL[:, 1:] |= self.ends_V[tokens_NL[:, :-1]]
        starts_NL[:, 0] = True
        return starts_NL


def _joins(character: str) -> bool:
    """Is this a character of a word that is told from the next one by a space? (Chinese and Japanese ones are not.)"""
    if unicodedata.category(character)[0] not in "LMN":
        return False
    return not unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC"))


@dataclass(frozen=True)
class Spans:
    """Lengths of spans, in words: geometric with `stop` per word, cut off at `longest` (SpanBERT, arXiv 1907.10529)."""

    stop: float = 0.2
    longest: int = 10

    @cached_property
    def _longer(self) -> np.ndarray:
        """P(a span is longer than k words) for k = 0 .. longest - 1."""
        return (1 - self.stop) ** np.arange(self.longest, dtype=np.float64)

    def owners(self, begins_W: np.ndarray, draw_W: np.ndarray, part_W: np.ndarray) -> np.ndarray:
        """The word that begins the span each word lies in, int64 [W], -1 outside; the latest one where two meet.

        begins_W: bool, a span begins; draw_W: uniform in [0, 1), for its length; part_W: spans end where this changes.
        """
        # longer than k words with probability (1 - stop)^k
        lengths_W = np.searchsorted(-self._longer, -draw_W, side="left")
        owner_W = np.full(len(begins_W), -1, np.int64)
        words = np.arange(len(begins_W))
        for distance in range(self.longest - 1, -1, -1):
            start_W = words[: max(0, len(words) - distance)]
            reaches = begins_W[start_W] & (lengths_W[start_W] > distance)
            reaches &= part_W[start_W] == part_W[start_W + distance]
            owner_W[distance:][reaches] = start_W[reaches]
        return owner_W


@lru_cache(maxsize=16)
def begin_shares(spans: Spans, predict_share: float) -> np.ndarray:
    """With which probability the d-th word of a document begins a span, so that every word is covered with
    probability `predict_share`, float64 [D]; the last one holds for all words behind.

    A word stays uncovered when none of the words before it, and not itself, began a span that reaches it. Where a
    document begins there are few words before, so more spans must begin there.
    """
    shares: list[float] = []
    for _ in range(16 * spans.longest):
        before = shares[::-1][: spans.longest - 1]
        uncovered = np.prod([1 - p * longer for p, longer in zip(before, spans._longer[1:], strict=False)])
        shares.append(max(0.0, 1 - (1 - predict_share) / float(uncovered)))
    return np.array(shares)


@lru_cache(maxsize=64)
def _last_below(share: float) -> int:
    """The largest 64-bit number that is below `share` as a float in [0, 1), by bisection; share > 0."""
    low, high = 0, 1 << 64
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if float(middle) * 2.0**-64 < share else (low, middle)
    return low


@dataclass(frozen=True)
class WordMasking:
    """Mask whole words: a word is predicted with probability `predict_share`; of the predicted words `mask_share`
    become [MASK] tokens, `keep_share` stay as they are and the rest become random tokens, every word as a whole.

    The defaults are those of RoFormerV2 (r < 0.12 masked, < 0.135 kept, < 0.15 random;
    github.com/ZhuiyiTechnology/roformer-v2, train_mlm.py). Random tokens are drawn from the vocabulary
    without the special ids, the original draws from 1..V-1. With `spans`, stretches of words share one fate instead;
    the share of words predicted stays the same.
    """

    seed: int
    vocab_size: int
    special_ids: tuple[int, ...]
    mask_id: int
    predict_share: float = 0.15
    mask_share: float = 0.8
    keep_share: float = 0.1
    whole_words: bool = True
    stream: str = "masks"
    spans: Spans | None = None

    @property
    def needs_words(self) -> bool:
        """Does it look at where words start?"""
        return self.whole_words

    def __call__(
        self, tokens_NL: np.ndarray, word_start_NL: np.ndarray | None, first_sample: int
    ) -> LabelledRows:
        """Mask rows of the consecutive samples first_sample, first_sample + 1, …

        word_start_NL: bool, True where a word begins; None where the shards carry no word starts.
        Special tokens are never masked and end a word. Raises ValueError when whole words are asked for and not there.
        """
        tokens_NL = np.asarray(tokens_NL, dtype=np.int64)
        if self.whole_words and word_start_NL is None:
            raise ValueError(
                "masking.whole_words: the shards carry no word starts, and no tokenizer to tell them by; prepare them "
                "with words.segmenter=rjieba, or set masking.whole_words=false"
            )
        rows, length = tokens_NL.shape
        words = philox_words(self.seed, stream_id(self.stream), 2 * length * first_sample, 2 * length * rows)
        fate_NL, replacement_NL = np.moveaxis(words.reshape(rows, 2, length), 1, 0)

        first_regular = max(self.special_ids) + 1
        special_NL = (
            tokens_NL < first_regular
        )  # holds all special ids, and others only where the ids have gaps
        if first_regular > len(self.special_ids):
            special_NL &= np.isin(tokens_NL, self.special_ids)
        if not self.whole_words or word_start_NL is None:
            begins_NL = np.ones_like(special_NL)
        else:
            # What follows a special token without a start of its own takes that token's number, which nobody else uses.
            begins_NL = word_start_NL | special_NL
        shares = (
            self.predict_share, self.predict_share * (self.mask_share + self.keep_share),
            self.predict_share * self.mask_share
        )  # fmt: skip
        # 0: not predicted, 1: a random token, 2: kept, 3: [MASK]
        if self.spans is None:
            # Every position takes the random number drawn at the beginning of its word.
            begins_NL[:, 0] = True
            first_W = np.flatnonzero(begins_NL)
            fate_W = np.ascontiguousarray(fate_NL).reshape(-1)[first_W]
            becomes_W = np.zeros(len(first_W), np.uint8)
            for share in shares:
                becomes_W += fate_W <= np.uint64(_last_below(share)) if share > 0 else False
            becomes_NL = becomes_W[np.cumsum(begins_NL) - 1].reshape(rows, length)
        else:
            uniform_NL = self._fate_of_spans(self.spans, fate_NL, replacement_NL, begins_NL, special_NL)
            becomes_NL = np.zeros(tokens_NL.shape, np.uint8)
            for share in shares:
                becomes_NL += uniform_NL < share

        predicted_NL = (becomes_NL > 0) & ~special_NL
        hidden_NL = (becomes_NL == 3) & predicted_NL
        inputs_NL = np.where(hidden_NL, self.mask_id, tokens_NL)
        random_P = np.flatnonzero((becomes_NL == 1) & predicted_NL)
        replacement_P = words[random_P + (random_P // length + 1) * length]
        choices = np.uint64(self.vocab_size - first_regular)
        drawn_P = (replacement_P >> np.uint64(32)) * choices >> np.uint64(32)
        inputs_NL.reshape(-1)[random_P] = drawn_P.astype(np.int64) + first_regular
        return LabelledRows(inputs_NL, np.where(predicted_NL, tokens_NL, IGNORED), hidden_NL)

    def _fate_of_spans(
        self, spans: Spans, fate_NL: np.ndarray, replacement_NL: np.ndarray, begins_NL: np.ndarray, special_NL:
        np.ndarray
    ) -> np.ndarray:  # fmt: skip
        """A uniform number below `predict_share` for the tokens of a span, the same for all of them, and 1 elsewhere.

        Three draws are needed where a word begins: the halves of its fate say whether a span begins and how long it is,
        the half of its replacement that is not used for a token says what becomes of the span.
        """
        begins_NL = begins_NL.copy()
        begins_NL[:, 0] = True  # words do not reach over rows
        first_W = np.flatnonzero(begins_NL)
        fate_W, special_W = fate_NL.ravel()[first_W], special_NL.ravel()[first_W]
        high_W, low_W = (fate_W >> np.uint64(32)) * 2.0**-32, (fate_W & np.uint64(0xFFFFFFFF)) * 2.0**-32
        row_starts_W = first_W % begins_NL.shape[1] == 0
        # Special tokens have parts of their own, so spans end at documents.
        part_W = np.cumsum(special_W | row_starts_W | np.r_[False, special_W[:-1]])
        place_W = np.arange(len(part_W)) - np.searchsorted(part_W, part_W)
        shares_D = begin_shares(spans, self.predict_share)
        begun_W = (high_W < shares_D[np.minimum(place_W, len(shares_D) - 1)]) & ~special_W
        owner_W = spans.owners(begun_W, low_W, part_W)
        third_W = (replacement_NL.ravel()[first_W] & np.uint64(0xFFFFFFFF)) * 2.0**-32
        uniform_W = np.where(owner_W >= 0, third_W[owner_W] * self.predict_share, 1.0)
        return uniform_W[np.cumsum(begins_NL.ravel()) - 1].reshape(begins_NL.shape)
