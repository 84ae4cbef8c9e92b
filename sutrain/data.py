"""Training samples from prepared shards. Position is one integer: the number of samples consumed.

Which rows make up sample range [a, b), which rank and micro-batch reads them and which of their words are masked is
arithmetic on that integer, so a run resumes exactly, at any world size.

Order: epoch 0 reads the shards as they lie on disk (they are globally shuffled already); later epochs visit blocks
of `BLOCK_ROWS` rows in the order of a keyed permutation that needs no memory, and the rows of a block in keyed order.
Shapes: N rows, L tokens a row.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from data_prep.keys import philox_words, stream_id
from data_prep.shards import Manifest, SplitReader
from sutrain.masking import WordMasking

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
    """Consecutive samples, masked, as int64 tensors [N, L]; `document_NL` is 0 at padding."""

    first_sample: int
    inputs_NL: torch.Tensor
    labels_NL: torch.Tensor
    hidden_NL: torch.Tensor
    document_NL: torch.Tensor
    fingerprint: (
        int  # sum mod 2^48 of a hash of every row's tokens and mask: the same however rows are batched
    )

    @property
    def predicted_tokens(self) -> int:
        return int((self.labels_NL >= 0).sum())


class Samples:
    """The endless sequence of masked samples of one split: epoch after epoch, addressed by sample number."""

    def __init__(self, directory: str | Path, split: str, seed: int, masking: WordMasking):
        """Raises DataError when the folder holds no finished data set or the split is empty."""
        self.manifest = load_manifest(directory)
        self.reader = SplitReader(directory, split)
        if len(self.reader) == 0:
            raise DataError(f"{directory}: the {split} split holds no rows; prepare more text")
        self.seed, self.masking = seed, masking

    @property
    def rows_per_epoch(self) -> int:
        return len(self.reader)

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
        """Samples [first_sample, first_sample + count), read, verified and masked."""
        numbers = self.row_numbers(first_sample, count)
        tokens_NL, word_start_NL, document_NL = self._read(numbers)
        masked = self.masking(tokens_NL, word_start_NL, first_sample)
        digests = [
            xxhash.xxh3_64_intdigest(np.stack([tokens, inputs]).tobytes())
            for tokens, inputs in zip(tokens_NL, masked.inputs_NL, strict=True)
        ]
        return Batch(
            first_sample,
            torch.from_numpy(masked.inputs_NL),
            torch.from_numpy(masked.labels_NL),
            torch.from_numpy(masked.hidden_NL),
            torch.from_numpy(document_NL),
            sum(digests) % FINGERPRINT_MODULUS,
        )

    def _read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Rows in the given order; consecutive stretches of the sorted numbers are read in one go."""
        ascending = np.argsort(numbers, kind="stable")
        ordered = numbers[ascending]
        cuts = np.flatnonzero(np.diff(ordered) != 1) + 1
        parts = [self.reader.rows(int(s[0]), int(s[-1]) + 1) for s in np.split(ordered, cuts)]
        back = np.empty_like(ascending)
        back[ascending] = np.arange(len(ascending))
        tokens_NL = np.concatenate([part.tokens_NL for part in parts]).astype(np.int64)[back]
        document_NL = np.concatenate([part.document_NL for part in parts]).astype(np.int64)[back]
        if parts[0].word_start_NL is None:
            return tokens_NL, None, document_NL
        return tokens_NL, np.concatenate([part.word_start_NL for part in parts])[back], document_NL


def word_masking(manifest: Manifest, settings: Any, seed: int, stream: str) -> WordMasking:
    """The masking of one stream of samples; `settings` has the shares (see sutrain.config.Masking)."""
    special = manifest.special_ids
    return WordMasking(
        seed=seed,
        vocab_size=manifest.vocab_size,
        special_ids=tuple(sorted(special.values())),
        mask_id=special["[MASK]"],
        predict_share=settings.predict_share,
        mask_share=settings.mask_share,
        keep_share=settings.keep_share,
        whole_words=settings.whole_words,
        stream=stream,
    )


def load_manifest(directory: str | Path) -> Manifest:
    """The manifest of a prepared data set; raises DataError with how to get one."""
    if not (Path(directory) / "manifest.json").is_file():
        raise DataError(
            f"{directory}: no manifest.json there, so no finished data set; "
            "prepare one with: python -m data_prep run --config configs/data/demo.yaml"
        )
    return Manifest.load(directory)


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is spread: rank r, micro-batch m reads a contiguous range of the batch's samples."""

    global_sequences: int
    micro_sequences: int
    world_size: int
    rank: int

    @property
    def accumulation(self) -> int:
        """Micro-batches each rank computes for one update."""
        return self.global_sequences // (self.micro_sequences * self.world_size)

    def ranges(self, samples_consumed: int) -> list[tuple[int, int]]:
        """(first sample, count) of this rank's micro-batches of the update that starts at `samples_consumed`."""
        share = self.global_sequences // self.world_size
        first = samples_consumed + self.rank * share
        return [(first + m * self.micro_sequences, self.micro_sequences) for m in range(self.accumulation)]


def prefetch(
    samples: Samples, plan: BatchPlan, samples_consumed: int, updates: int, depth: int = 2
) -> Generator[list[Batch], None, None]:
    """Yield this rank's micro-batches for each of the next `updates`, read ahead by a background thread.

    Only what is yielded counts as read: position is advanced by the caller after the optimizer step.
    """
    ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def offer(item: list[Batch] | BaseException) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for update in range(updates):
                if stopped.is_set():
                    return
                position = samples_consumed + update * plan.global_sequences
                offer([samples.batch(first, count) for first, count in plan.ranges(position)])
        except BaseException as error:  # raised again by the training loop, where the batch is missing
            offer(error)

    thread = threading.Thread(target=read, name="batch-reader", daemon=True)
    thread.start()
    try:
        for _ in range(updates):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(timeout=5)
