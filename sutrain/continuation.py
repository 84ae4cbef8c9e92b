"""Predicting what follows: the next token of a document, behind a prefix in context unilm.

Like masking a pure function of (seed, sample index). Shapes: N rows (samples), L tokens a row, P document pieces of
all rows. Where the prefix of a piece ends is told by word L·i + p of one Philox stream: sample i, first position p.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.keys import philox_words, stream_id
from sutrain.masking import IGNORED, LabelledRows


@dataclass(frozen=True)
class Continuation:
    """Every token of a document piece is predicted from those before it, except the first.

    With `prefixes` a piece is split at random, all places being as likely: its prefix is seen from both sides and only
    what follows is predicted, by the last token of the prefix and by those behind it (UniLM, arXiv 1905.03197;
    kexue.fm/archives/7427). A piece of one token has nothing to predict.
    """

    seed: int
    prefixes: bool = False
    stream: str = "masks"

    needs_words = False

    def __call__(self, tokens_NL: np.ndarray, document_NL: np.ndarray, first_sample: int) -> LabelledRows:
        """Label rows of the consecutive samples first_sample, first_sample + 1, …

        document_NL: which document piece of its row a token belongs to, 0 for padding.
        """
        tokens_NL = np.asarray(tokens_NL, dtype=np.int64)
        follows_NL = np.zeros(tokens_NL.shape, bool)  # the next token is of the same piece
        follows_NL[:, :-1] = (document_NL[:, 1:] == document_NL[:, :-1]) & (document_NL[:, 1:] > 0)
        types_NL = None
        if self.prefixes:
            types_NL = self._behind_prefixes(document_NL, first_sample)
            follows_NL[:, :-1] &= types_NL[:, 1:] == 1
        labels_NL = np.full_like(tokens_NL, IGNORED)
        labels_NL[:, :-1] = np.where(follows_NL[:, :-1], tokens_NL[:, 1:], IGNORED)
        return LabelledRows(tokens_NL, labels_NL, follows_NL, types_NL)

    def _behind_prefixes(self, document_NL: np.ndarray, first_sample: int) -> np.ndarray:
        """int64 [N, L]: 1 behind the prefix of a piece, 0 in it and at padding."""
        rows, length = document_NL.shape
        begins_NL = np.ones(document_NL.shape, bool)
        begins_NL[:, 1:] = document_NL[:, 1:] != document_NL[:, :-1]
        first_P = np.flatnonzero(begins_NL)
        tokens_P = np.diff(first_P, append=document_NL.size)
        words = philox_words(self.seed, stream_id(self.stream), length * first_sample, length * rows)
        # 1 .. tokens - 1, so that both parts have a token; a piece of one is all prefix
        choices_P = np.maximum(tokens_P - 1, 1).astype(np.uint64)
        prefix_P = 1 + ((words[first_P] >> np.uint64(32)) * choices_P >> np.uint64(32)).astype(np.int64)
        place_NL = (np.arange(document_NL.size) - np.repeat(first_P, tokens_P)).reshape(rows, length)
        behind_NL = place_NL >= np.repeat(prefix_P, tokens_P).reshape(rows, length)
        return (behind_NL & (document_NL > 0)).astype(np.int64)
