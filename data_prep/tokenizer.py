"""The sentencepiece tokenizer: trained once on a keyed uniform sample, or loaded; the same ids everywhere.

The model never changes text behind our back: identity normalisation, no dummy prefix, white space as it is.
All cleaning happens in `clean`. Special pieces have the ids that `shards` fixes, and [MASK] and its like
are control symbols, so no text can spell one.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from .config import TrainSection
from .errors import DataPrepError
from .shards import SPECIAL_IDS
from .wordpiece import WordPieceTokenizer

_ModelProto: Any = vars(sentencepiece_model_pb2)["ModelProto"]  # made at import, unknown to type checkers
# sentencepiece leaves out sentences longer than this, so longer ones are cut before.
_MAX_SENTENCE_BYTES = 4192
_RESERVED = "\u2585"  # what sentencepiece writes for an unknown piece; it leaves lines that hold it out
# Peak memory of the trainer per byte of its text, with the text itself: unigram 19 to 23 and BPE 13 (English) to 51
# (Chinese) were measured.
_TRAINING_COPIES = {"unigram": 26, "bpe": 55}
_SENTENCE_END = re.compile("(?<=[。！？；!?;.])")


class Tokenizer:
    """Text to ids, with the number of characters behind every id.

    Raises DataPrepError when the model cannot be read, changes the text, or has other special ids than
    SPECIAL_IDS.
    """

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError) as error:
            raise DataPrepError(f"{name}: not a sentencepiece model ({error})") from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.get_piece_size()
        self.special_ids = SPECIAL_IDS
        proto = _ModelProto.FromString(model)
        pieces = [piece.piece for piece in proto.pieces]
        changes = changes_of_text(proto)
        found = {piece: i for i, piece in enumerate(pieces[: len(SPECIAL_IDS)])}
        if found != SPECIAL_IDS:
            raise DataPrepError(
                f"{name}: the first pieces must be {SPECIAL_IDS}, found {found}; train it with data_prep, or take "
                "over its pieces with tokenizer.adopt=true"
            )
        if changes:
            raise DataPrepError(
                f"{name}: the model changes text or its characters ({', '.join(changes)}); train it with data_prep, "
                "or take over its pieces with tokenizer.adopt=true"
            )
        self._lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        # The same in bytes of UTF-8, where "▁" is a space; special pieces stand for no text.
        sizes = [len(piece.replace("\u2581", " ").encode()) for piece in pieces]
        self._byte_lengths = np.array(sizes, dtype=np.uint16)
        self._byte_lengths[list(SPECIAL_IDS.values())] = 0
        self._unknown_id = SPECIAL_IDS["[UNK]"]

    def ids(self, texts: list[bytes]) -> list[np.ndarray]:
        """Ids of each text (UTF-8), int32."""
        return self._processor.encode(texts, return_type="numpy", num_threads=1)  # type: ignore[no-any-return]

    def suspects(self, tokens: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Positions of the texts whose pieces do not add up to their bytes and that have to be looked at closely.

        tokens: ids of all texts in a row; begins: where those of each begin [n]; sizes: bytes of each [n]. Pieces for
        unknown characters may stand for anything.
        """
        found = np.add.reduceat(self._byte_lengths.take(tokens), begins, dtype=np.int64)
        wrong = np.flatnonzero(found != sizes)
        if len(wrong):
            unknown = np.add.reduceat(tokens == self._unknown_id, begins, dtype=np.int64)
            wrong = wrong[unknown[wrong] == 0]
        return wrong

    def encode(self, texts: list[str], exact: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of all texts in a row (int32 [T]), characters behind each id (int64 [T]), ids of each text
        (int64 [N]).

        The character counts of a text add up to its length; an unknown piece may stand for several characters.
        Where a text has more than one, the counts of its pieces are right only with `exact`, which costs time.
        """
        encoded = self._processor.encode(texts, return_type="numpy", num_threads=1)
        counts = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        ids = np.concatenate(encoded) if encoded else np.empty(0, np.int32)
        lengths = self._lengths[ids]
        self._measure_unknown(texts, ids, lengths, counts, exact)
        return ids, lengths, counts

    def _measure_unknown(
        self, texts: list[str], ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray, exact: bool
    ) -> None:
        """Fill in, in place, the lengths of unknown pieces: what the others leave, or by asking where there
        are more.
        """
        unknown = np.flatnonzero(ids == self._unknown_id)
        if not len(unknown):
            return
        stops = np.cumsum(counts)
        owners, firsts, times = np.unique(
            np.searchsorted(stops, unknown, side="right"), return_index=True, return_counts=True
        )
        lengths[unknown] = 0
        sums = np.concatenate([[0], np.cumsum(lengths)])
        known = sums[stops[owners]] - sums[stops[owners] - counts[owners]]
        lengths[unknown[firsts]] = [len(texts[owner]) for owner in owners.tolist()] - known
        for owner in owners[times > 1].tolist() if exact else ():
            offsets = self._processor.encode(texts[owner], return_type="offset_mapping")["offsets"]
            part = slice(int(stops[owner] - counts[owner]), int(stops[owner]))
            lengths[part] = [end - begin for begin, end in offsets]


def changes_of_text(model: Any) -> list[str]:
    """The settings of a model with which its pieces are not the characters of the text, one after the other."""
    normalizer, types = model.normalizer_spec, {piece.type for piece in model.pieces}
    findings = {
        f"normalisation {normalizer.name!r}": normalizer.name != "identity"
        or bool(normalizer.precompiled_charsmap),
        "add_dummy_prefix": normalizer.add_dummy_prefix,
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "user_defined_symbols": _ModelProto.SentencePiece.USER_DEFINED in types,
        "byte_fallback": _ModelProto.SentencePiece.BYTE in types,
    }
    return [setting for setting, present in findings.items() if present]


AnyTokenizer = Tokenizer | WordPieceTokenizer


def make_tokenizer(data: bytes, name: str) -> AnyTokenizer:
    """The tokenizer of a file's content: of a BERT vocabulary where the name ends with .txt, else sentencepiece."""
    return WordPieceTokenizer(data, name) if name.endswith(".txt") else Tokenizer(data, name)


@lru_cache(maxsize=1)
def load_tokenizer(path: str, sha256: str) -> AnyTokenizer:
    """Read a model file, once per process. Raises DataPrepError when it is not the file with this hash."""
    tokenizer = make_tokenizer(read_model(Path(path)), path)
    if tokenizer.sha256 != sha256:
        raise DataPrepError(
            f"{path}: the tokenizer is not the one this run began with (sha256 {tokenizer.sha256[:12]}…, "
            f"expected {sha256[:12]}…); put it back, or start over with --fresh"
        )
    return tokenizer


def read_model(path: Path) -> bytes:
    """Bytes of a model file. Raises DataPrepError when it is missing."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataPrepError(f"{path}: the tokenizer model cannot be read ({error.strerror})") from None


def training_bytes(section: TrainSection, text_bytes: int) -> int:
    """Estimate of the memory that training on so much text takes [bytes]."""
    return _TRAINING_COPIES[section.model] * text_bytes


def train(texts: Iterator[str], section: TrainSection) -> tuple[bytes, dict[str, int]]:
    """Train a model on texts in the order given; returns (model, {"sentences", "cut_texts", "skipped_sentences"}).

    Sentences with the character that sentencepiece keeps for itself are skipped. Raises DataPrepError when the texts
    do not support the vocabulary that is asked for.
    """
    statistics = {"sentences": 0, "cut_texts": 0, "skipped_sentences": 0}

    def sentences() -> Iterator[str]:
        for text in texts:
            parts = cut_sentences(text)
            statistics["sentences"] += len(parts)
            statistics["cut_texts"] += len(parts) > 1
            usable = [part for part in parts if _RESERVED not in part]
            statistics["skipped_sentences"] += len(parts) - len(usable)
            yield from usable

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type=section.model,
            vocab_size=section.vocab_size,
            character_coverage=section.character_coverage,
            num_threads=section.threads,
            seed_sentencepiece_size=section.seed_size,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            pad_id=SPECIAL_IDS["[PAD]"],
            unk_id=SPECIAL_IDS["[UNK]"],
            bos_id=SPECIAL_IDS["[CLS]"],
            eos_id=SPECIAL_IDS["[SEP]"],
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            bos_piece="[CLS]",
            eos_piece="[SEP]",
            control_symbols=["[MASK]"],
            unk_surface="[UNK]",
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataPrepError(_explain(str(error), section, statistics["sentences"])) from None
    return model.getvalue(), statistics


def cut_sentences(text: str, limit_bytes: int = _MAX_SENTENCE_BYTES) -> list[str]:
    """Cut a text into parts of at most `limit_bytes` UTF-8 bytes that join to it again: at line ends and
    after sentence ends where there are some, else anywhere.
    """
    if len(text) * 4 <= limit_bytes or len(text.encode()) <= limit_bytes:
        return [text] if "\n" not in text else [line for line in text.split("\n") if line]
    longest = limit_bytes // 4
    parts: list[str] = []
    for sentence in (s for line in text.split("\n") for s in _SENTENCE_END.split(line) if s):
        pieces = [sentence[i : i + longest] for i in range(0, len(sentence), longest)]
        if parts and len(pieces) == 1 and len(parts[-1]) + len(sentence) <= longest:
            parts[-1] += sentence
        else:
            parts += pieces
    return parts


def _explain(message: str, section: TrainSection, sentences: int) -> str:
    """sentencepiece reports in the words of its source code; say what to change instead."""
    wanted = f"tokenizer.train.vocab_size={section.vocab_size}"
    if found := re.search(r"Vocabulary size too high.*?<= (\d+)", message, re.S):
        return f"{wanted}: the sample supports only {found[1]} pieces; take at most that, or more text"
    if found := re.search(r"smaller than required_chars.*?(\d+) vs (\d+)", message, re.S):
        return (
            f"{wanted}: the sample has {found[2]} characters that each need a piece; take a larger "
            "vocabulary or lower tokenizer.train.character_coverage"
        )
    if not sentences:
        return "tokenizer: the sample has no text; is text_field right, and are the files not empty?"
    return f"{wanted}: training failed ({' '.join(message.split())})"
