"""Whole-word masking as a pure function of (seed, sample index): no worker state, so that resume is exact to the mask.

Shapes: N rows (samples), L tokens a row. The random words of sample i are words [2·L·i, 2·L·(i+1)) of one Philox
stream: the first L decide the fate of the word that starts at each position, the other L give replacement tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.keys import philox_words, stream_id

IGNORED = -100
"""Label of a position that carries no loss (the convention of torch's cross entropy)."""


@dataclass(frozen=True)
class MaskedRows:
    """Rows ready for a masked language model; all arrays are int64 [N, L] unless said otherwise."""

    inputs_NL: np.ndarray
    labels_NL: np.ndarray  # the original token where it is to be predicted, IGNORED elsewhere
    hidden_NL: np.ndarray  # bool: the input shows [MASK] there (neither the kept nor a random token)


@dataclass(frozen=True)
class WordMasking:
    """Mask whole words: a word is predicted with probability `predict_share`; of the predicted words `mask_share`
    become [MASK] tokens, `keep_share` stay as they are and the rest become random tokens, every word as a whole.

    The defaults are those of RoFormerV2 (r < 0.12 masked, < 0.135 kept, < 0.15 random;
    github.com/ZhuiyiTechnology/roformer-v2, train_mlm.py). Random tokens are drawn from the vocabulary
    without the special ids, the original draws from 1..V-1.
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

    def __call__(
        self, tokens_NL: np.ndarray, word_start_NL: np.ndarray | None, first_sample: int
    ) -> MaskedRows:
        """Mask rows of the consecutive samples first_sample, first_sample + 1, …

        word_start_NL: bool, True where a word begins; None where the shards carry no word starts.
        Special tokens are never masked and end a word. Raises ValueError when whole words are asked for and not there.
        """
        if self.whole_words and word_start_NL is None:
            raise ValueError(
                "masking.whole_words: the shards carry no word starts; prepare them with words.segmenter=rjieba, "
                "or set masking.whole_words=false"
            )
        tokens_NL = np.asarray(tokens_NL, dtype=np.int64)
        rows, length = tokens_NL.shape
        words = philox_words(self.seed, stream_id(self.stream), 2 * length * first_sample, 2 * length * rows)
        fate_NL, replacement_NL = np.moveaxis(words.reshape(rows, 2, length), 1, 0)

        special_NL = np.isin(tokens_NL, self.special_ids)
        if not self.whole_words or word_start_NL is None:
            begins_NL = np.ones_like(special_NL)
        else:
            # What follows a special token without a start of its own takes that token's number, which nobody else uses.
            begins_NL = word_start_NL | special_NL
        # Every position takes the random number drawn at the beginning of its word.
        positions_NL = np.where(begins_NL, np.arange(length), 0)
        word_NL = np.maximum.accumulate(positions_NL, axis=1)
        uniform_NL = np.take_along_axis(fate_NL, word_NL, axis=1) * 2.0**-64

        predicted_NL = (uniform_NL < self.predict_share) & ~special_NL
        shown_below = self.predict_share * self.mask_share
        kept_below = self.predict_share * (self.mask_share + self.keep_share)
        hidden_NL = predicted_NL & (uniform_NL < shown_below)
        random_NL = predicted_NL & (uniform_NL >= kept_below)

        first_regular = max(self.special_ids) + 1
        choices = np.uint64(self.vocab_size - first_regular)
        random_tokens_NL = ((replacement_NL >> np.uint64(32)) * choices >> np.uint64(32)).astype(np.int64)
        inputs_NL = np.where(random_NL, random_tokens_NL + first_regular, tokens_NL)
        inputs_NL[hidden_NL] = self.mask_id
        return MaskedRows(inputs_NL, np.where(predicted_NL, tokens_NL, IGNORED), hidden_NL)
