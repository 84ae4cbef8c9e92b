"""Training samples from prepared shards. Position is one integer: the number of samples consumed.

Which rows make up sample range [a, b), which rank and micro-batch reads them and what of them is predicted is
arithmetic on that integer, so a run resumes exactly, at any world size.

Order: epoch 0 reads the shards as they lie on disk (they are globally shuffled already); later epochs visit blocks
of `BLOCK_ROWS` rows in the order of a keyed permutation that needs no memory, and the rows of a block in keyed order.
Shapes: N rows, L tokens a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import sentencepiece
import xxhash

from data_prep.keys import philox_words, stream_id
from data_prep.rows import RowBatch
from data_prep.shards import Manifest, SplitReader
from sutrain.continuation import Continuation
from sutrain.labelling import Labelling
from sutrain.masking import IGNORED, LabelledRows, VocabularyWords
from sutrain.mixture import Mixture

if TYPE_CHECKING:
    import torch

    from sutrain.remote import Remote

BLOCK_ROWS = 256
"""Rows that stay together in later epochs: large enough to be read in one go, small enough to mix a small corpus."""

FINGERPRINT_MODULUS = 2**48
"""Small enough that the fingerprints of thousands of ranks add up in an int64."""


class DataError(ValueError):
    """The prepared data is missing, damaged or does not fit the model; the message names what and how to mend it."""


def permuted(index: int, size: int, key: int) -> int:
    """Where a keyed permutation of range(size) sends `index`: a Feistel network with cycle walking, O(1) memory."""
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(6):
            text = f"{key},{round_number},{right}".encode()
            left, right = right, left ^ (xxhash.xxh3_64_intdigest(text) & mask)
        index = left << half_bits | right
        if index < size:
            return index


@dataclass
class Batch:
    """Consecutive samples, labelled, as tensors [N, L] (see LabelledRows) of int64 or, where they were read ahead,
    narrower integers; `document_NL` is 0 at padding."""

    first_sample: int
    inputs_NL: torch.Tensor
    labels_NL: torch.Tensor
    hidden_NL: torch.Tensor
    document_NL: torch.Tensor
    fingerprint: (
        int  # sum mod 2^48 of a hash of every row's tokens and mask: the same however rows are batched
    )
    types_NL: torch.Tensor | None = None
    idle: bool = False
    """A row without weight, for a rank that has none left when the others compute: its gradient is zero."""

    @property
    def tokens(self) -> int:
        return 0 if self.idle else int((self.document_NL > 0).sum())

    @property
    def predicted_tokens(self) -> int:
        return int((self.labels_NL >= 0).sum())

    def on(self, device: torch.device) -> dict[str, Any]:
        """What TrainingModel.forward takes, int64 and on that device; token types are None where it needs none."""
        found = {
            "tokens_BL": self.inputs_NL, "document_BL": self.document_NL, "token_types_BL": self.types_NL,
            "labels_BL": self.labels_NL, "hidden_BL": self.hidden_NL,
        }  # fmt: skip
        return {name: None if values is None else _moved(values, device) for name, values in found.items()}

    def without_weight(self) -> Batch:
        """The same rows with nothing to predict, which count for nothing."""
        labels_NL = self.labels_NL.new_full(self.labels_NL.shape, IGNORED)
        hidden_NL = self.hidden_NL.new_zeros(self.hidden_NL.shape)
        return replace(self, labels_NL=labels_NL, hidden_NL=hidden_NL, fingerprint=0, idle=True)

    def cut(self, row_tokens: int) -> Batch:
        """The same tokens and masks in shorter rows, [N·L/row_tokens, row_tokens]; documents end where rows do."""
        names = ("inputs_NL", "labels_NL", "hidden_NL", "document_NL", "types_NL")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value.reshape(-1, row_tokens) for name, value in given.items()})


class LabelledSamples(NamedTuple):
    """Consecutive samples, labelled, as arrays: what a process that reads ahead hands over."""

    first_sample: int
    rows: LabelledRows
    document_NL: np.ndarray
    fingerprint_N: np.ndarray  # uint64, see Batch

    def hold(self, first_sample: int, count: int) -> bool:
        """Whether samples [first_sample, first_sample + count) are among them."""
        at = first_sample - self.first_sample
        return 0 <= at <= at + count <= len(self.fingerprint_N)

    def part(self, first_sample: int, count: int) -> LabelledSamples:
        """Samples [first_sample, first_sample + count) of these; the arrays are views."""
        at = first_sample - self.first_sample
        part = slice(at, at + count)
        rows = self.rows.each(lambda values: values[part])
        return LabelledSamples(first_sample, rows, self.document_NL[part], self.fingerprint_N[part])

    def narrowed(self) -> LabelledSamples:
        """The same in integers of as few bytes as hold them: a third or a quarter to hand over."""
        return self._replace(rows=self.rows.each(_narrowed), document_NL=_narrowed(self.document_NL))

    def batch(self) -> Batch:
        """The same as tensors, which share the memory."""
        import torch  # not above: processes that read ahead do without it, a second and 300 MB each

        types_NL = self.rows.types_NL
        return Batch(
            self.first_sample,
            torch.from_numpy(self.rows.inputs_NL),
            torch.from_numpy(self.rows.labels_NL),
            torch.from_numpy(self.rows.hidden_NL),
            torch.from_numpy(self.document_NL),
            int(self.fingerprint_N.sum()) % FINGERPRINT_MODULUS,
            None if types_NL is None else torch.from_numpy(types_NL),
        )


def _moved(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Integers as int64, made wide where they arrive."""
    if device.type == "cuda":  # out of pinned memory: the loop goes on while they travel
        values = values.pin_memory()
    values = values.to(device, non_blocking=True)
    return values.long() if values.dtype.is_signed else values  # bools stay


def _narrowed(values: np.ndarray) -> np.ndarray:
    """Integers from IGNORED on, as int16 or int32, whatever holds the largest; bools as they are."""
    if values.dtype == np.bool_:
        return values
    return values.astype(np.int16 if values.max(initial=0) < 2**15 else np.int32)


class Samples:
    """The endless sequence of labelled samples of one split: epoch after epoch, addressed by sample number."""

    def __init__(
        self, directory: str | Path, split: str, seed: int, labelling: Labelling, remote: Remote | None = None
    ):
        """Raises DataError when the folder holds no finished data set or the split is empty."""
        self.manifest = load_manifest(directory)
        self._opened = (directory, split, seed, labelling, remote)
        self.reader = SplitReader(directory, split) if remote is None else remote.reader(split)
        self.rows_per_epoch = len(self.reader)
        if self.rows_per_epoch == 0:
            raise DataError(f"{directory}: the {split} split holds no rows; prepare more text")
        self.seed, self.labelling = seed, labelling
        told = self.manifest.has_words or not labelling.needs_words
        self.vocabulary = None if told else vocabulary_words(Path(directory))

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the files itself.
        return _open_again, (self.manifest.content_hash, *self._opened)

    @property
    def manifests(self) -> list[Manifest]:
        return [self.manifest]

    def row_numbers(self, first_sample: int, count: int) -> np.ndarray:
        """Which rows of the split the samples [first_sample, first_sample + count) are, int64 [count]."""
        pieces, sample, end = [], first_sample, first_sample + count
        while sample < end:
            epoch, place = divmod(sample, self.rows_per_epoch)
            order, start = self._block_order(epoch, place // BLOCK_ROWS)
            inside = place - place // BLOCK_ROWS * BLOCK_ROWS
            piece = (start + order)[inside : inside + end - sample]
            pieces.append(piece)
            sample += len(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _block_order(self, epoch: int, block: int) -> tuple[np.ndarray, int]:
        """(order of the rows inside, first row) of the block visited as number `block` in `epoch`."""
        full_blocks, rest = divmod(self.rows_per_epoch, BLOCK_ROWS)
        rows = BLOCK_ROWS if block < full_blocks else rest
        if epoch == 0:
            return np.arange(rows), block * BLOCK_ROWS
        # The short block at the end stays last: a permutation of equal blocks needs no table.
        if block < full_blocks:
            block = permuted(block, full_blocks, stream_id("blocks", self.seed, epoch))
        keys = philox_words(self.seed, stream_id("rows", epoch), block * BLOCK_ROWS, rows)
        return np.argsort(keys, kind="stable"), block * BLOCK_ROWS

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples [first_sample, first_sample + count), read, verified and labelled."""
        return self.labelled(first_sample, count).batch()

    def labelled(self, first_sample: int, count: int) -> LabelledSamples:
        """Samples [first_sample, first_sample + count), read, verified and labelled."""
        return label(self.labelling, first_sample, *self.read(first_sample, count))

    def rows(self, first_sample: int, count: int) -> RowBatch:
        """The rows of samples [first_sample, first_sample + count), verified; their columns are made when looked at."""
        if first_sample + count <= self.rows_per_epoch:  # epoch 0 is in the order of the disk
            return self.reader.rows(first_sample, first_sample + count)
        return self.reader.take(self.row_numbers(first_sample, count))

    def read(self, first_sample: int, count: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """(tokens, word starts or None, document numbers) of samples [first_sample, first_sample + count), [N, L]."""
        rows = self.rows(first_sample, count)
        tokens_NL = rows.tokens_NL.astype(np.int64)
        words_NL = rows.word_start_NL if self.labelling.needs_words else None
        if words_NL is None and self.vocabulary is not None:
            words_NL = self.vocabulary.starts(tokens_NL)
        return tokens_NL, words_NL, rows.document_NL


def _open_again(content_hash: str, *opened: Any) -> Samples:
    """The same samples in another process. Raises DataError where another data set has taken the place."""
    samples = Samples(*opened)
    if samples.manifest.content_hash != content_hash:
        raise DataError(f"{samples.manifest.directory}: another data set than the run began with")
    return samples


class MixedSamples:
    """The samples of several data sets mixed by weight, addressed by their number in the mixture."""

    def __init__(self, corpora: Sequence[Samples], weights: Sequence[float], seed: int, labelling: Labelling):
        """Raises DataError, naming the difference, for data sets that cannot be mixed."""
        self.corpora, self.labelling = list(corpora), labelling
        self.mixture = Mixture(tuple(weights), seed)
        self.manifest = self.corpora[0].manifest
        for other in (corpus.manifest for corpus in self.corpora[1:]):
            for name in ("vocab_size", "row_tokens", "special_ids", "tokenizer"):
                if getattr(other, name) != getattr(self.manifest, name):
                    raise DataError(
                        f"{other.directory}: {name} differs from {self.manifest.directory}; prepare both with one "
                        "tokenizer and one row length"
                    )

    def __reduce__(self) -> tuple[Any, ...]:
        return MixedSamples, (self.corpora, self.mixture.weights, self.mixture.seed, self.labelling)

    @property
    def manifests(self) -> list[Manifest]:
        return [corpus.manifest for corpus in self.corpora]

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all data sets together."""
        return sum(corpus.rows_per_epoch for corpus in self.corpora)

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples [first_sample, first_sample + count), read, verified and labelled."""
        return self.labelled(first_sample, count).batch()

    def labelled(self, first_sample: int, count: int) -> LabelledSamples:
        """Samples [first_sample, first_sample + count), read, verified and labelled."""
        # The samples of a data set inside a stretch of the mixture are consecutive in that data set.
        corpus_N, number_N = self.mixture.assign(first_sample, count)
        tokens_NL = np.empty((count, self.manifest.row_tokens), np.int64)
        document_NL, words_NL = np.empty_like(tokens_NL), np.empty(tokens_NL.shape, bool)
        has_words = True
        for index, corpus in enumerate(self.corpora):
            mine = np.flatnonzero(corpus_N == index)
            if len(mine):
                tokens_NL[mine], words, document_NL[mine] = corpus.read(int(number_N[mine[0]]), len(mine))
                has_words &= words is not None
                words_NL[mine] = True if words is None else words
        return label(self.labelling, first_sample, tokens_NL, words_NL if has_words else None, document_NL)


def label(
    labelling: Labelling, first_sample: int, tokens_NL: np.ndarray, word_start_NL: np.ndarray | None,
    document_NL: np.ndarray,
) -> LabelledSamples:  # fmt: skip
    """Rows as the samples first_sample, first_sample + 1, …"""
    if isinstance(labelling, Continuation):
        rows = labelling(tokens_NL, document_NL, first_sample)
    else:
        rows = labelling(tokens_NL, word_start_NL, first_sample)
    types_NL = rows.types_NL
    hashed = np.stack([tokens_NL, rows.inputs_NL, *([] if types_NL is None else [types_NL])], axis=1)
    fingerprint_N = np.array([xxhash.xxh3_64_intdigest(row) for row in hashed], np.uint64)
    return LabelledSamples(first_sample, rows, document_NL, fingerprint_N)


def open_samples(data: Any, seed: int, labelling: Labelling) -> Samples | MixedSamples:
    """The training samples of a run; `data` is that section of its configuration. Raises DataError."""
    samples = Samples(data.dir, "train", seed, labelling, remote_of(data))
    if not data.others:
        return samples
    others = [Samples(other.dir, "train", seed, labelling) for other in data.others]
    weights = [data.weight, *(other.weight for other in data.others)]
    return MixedSamples([samples, *others], weights, seed, labelling)


def open_manifest(data: Any) -> Manifest:
    """The manifest of data.dir, brought there first where the shards lie elsewhere.

    Raises DataError, ShardError, or ConfigError (see Remote.mirror).
    """
    if (remote := remote_of(data)) is not None:
        remote.mirror()
    return load_manifest(data.dir)


def remote_of(data: Any) -> Remote | None:
    """Where the shards of data.dir come from when they are not there."""
    if data.remote is None:
        return None
    from sutrain.remote import Remote  # a fifth of a second, in every process that reads ahead too

    return Remote(data.remote, data.dir, data.cache_bytes, readers=1 + data.workers)


def vocabulary_words(directory: Path) -> VocabularyWords | None:
    """Word starts by the pieces of the data set's tokenizer; None where the folder has neither kind of vocabulary."""
    model, vocabulary = directory / "tokenizer/tokenizer.model", directory / "tokenizer/vocab.txt"
    if model.is_file():
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        return VocabularyWords.of_pieces(
            [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
        )
    if vocabulary.is_file():
        return VocabularyWords.of_pieces(vocabulary.read_text(encoding="utf-8").splitlines())
    return None


def load_manifest(directory: str | Path) -> Manifest:
    """The manifest of a prepared data set; raises DataError with how to get one."""
    if not (Path(directory) / "manifest.json").is_file():
        raise DataError(
            f"{directory}: no manifest.json there, so no finished data set; "
            "prepare one with: python -m data_prep run --config configs/data/demo.yaml"
        )
    return Manifest.load(directory)
