"""A BERT vocab.txt as tokenizer: WordPiece by the `tokenizers` library, with the ids that the vocabulary gives.

It takes the text as its model does: Chinese characters apart, control characters out, lower case and without accents
where the vocabulary knows no capitals. Ids cannot be turned back into the text, and what is not in the vocabulary is
[UNK]; but every id still stands for characters of the text, so word starts are exact.
"""

from __future__ import annotations

import hashlib
import os
from itertools import chain

import numpy as np

from .errors import DataPrepError
from .shards import SPECIAL_IDS


class WordPieceTokenizer:
    """Text to ids, with the number of characters behind every id, from the lines of a vocab.txt.

    Raises DataPrepError when the vocabulary lacks a special piece, has a piece twice, or has another piece than
    [PAD] in its first line.
    """

    def __init__(self, vocabulary: bytes, name: str = "vocab.txt") -> None:
        try:
            pieces = vocabulary.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
        except UnicodeDecodeError:
            raise DataPrepError(f"{name}: not a vocabulary: it is not UTF-8 text") from None
        ids = {piece: number for number, piece in enumerate(pieces)}
        missing = [piece for piece in SPECIAL_IDS if piece not in ids]
        if missing or ids["[PAD]"] != 0 or len(ids) != len(pieces):
            reason = f"{', '.join(missing)} missing" if missing else "[PAD] not first, or a piece twice"
            raise DataPrepError(
                f"{name}: not a BERT vocabulary ({reason}); expected one piece a line, {', '.join(SPECIAL_IDS)} "
                "among them and [PAD] first"
            )
        self.sha256 = hashlib.sha256(vocabulary).hexdigest()
        self.vocab_size = len(pieces)
        self.special_ids = {piece: ids[piece] for piece in SPECIAL_IDS}
        lowercase = not any(
            piece.isascii() and piece.lower() != piece for piece in ids.keys() - SPECIAL_IDS.keys()
        )
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the cores belong to the other workers
        from tokenizers import BertWordPieceTokenizer

        self.backend = BertWordPieceTokenizer(ids, lowercase=lowercase, strip_accents=lowercase)._tokenizer
        self._unknown_id = self.special_ids["[UNK]"]
        self._forbidden = np.array(
            [self.special_ids[piece] for piece in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")]
        )

    def ids(self, texts: list[bytes]) -> list[np.ndarray]:
        """Ids of each text (UTF-8), int32."""
        ids, _, counts = self.encode([text.decode() for text in texts])
        return np.split(ids, np.cumsum(counts)[:-1])

    def encode(self, texts: list[str], exact: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of all texts in a row (int32 [T]), characters behind each id (int64 [T]), ids of each text (int64 [N]).

        What lies between two pieces (spaces, and characters the model leaves out) counts to the one behind it, at the
        end of a text to the last. A text without any piece is one [UNK]. `exact` changes nothing here.
        """
        encoded = self.backend.encode_batch(texts, add_special_tokens=False)
        counts = np.fromiter((max(1, len(item.ids)) for item in encoded), dtype=np.int64, count=len(encoded))
        ids = np.fromiter(
            chain.from_iterable(item.ids or [self._unknown_id] for item in encoded),
            np.int32,
            int(counts.sum()),
        )
        ids[np.isin(ids, self._forbidden)] = self._unknown_id  # no text may spell a control symbol
        lengths = np.empty(len(ids), dtype=np.int64)
        begin = 0
        for text, item in zip(texts, encoded, strict=True):
            ends = [stop for _, stop in item.offsets] or [len(text)]
            ends[-1] = len(text)
            lengths[begin : begin + len(ends)] = np.diff(ends, prepend=0)
            begin += len(ends)
        return ids, lengths, counts
