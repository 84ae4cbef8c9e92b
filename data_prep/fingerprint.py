"""The evidence that every document is in the shards exactly once, and that results of two stages belong together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

_MIX = tuple(np.uint64(word) for word in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))


# What results are made of: the documents, the entries for deduplication, and which results they were merged from. Sizes
# and runs of intermediate files follow from memory and codec, and cannot be seen in what is made of them.
_MADE_OF = ("task", "books", "splits", "hash_entries", "group", "upstream")


def digest_of(results: Sequence[dict[str, Any]]) -> str:
    """Names what the results of a stage hold, so that what a later stage made of them is taken up with them alone.

    Which duplicates a task of pass 1 drops by itself depends on its memory, and a file may be back that had changed:
    a task that is done again need not give the result it gave before.
    """
    in_order = sorted(results, key=lambda result: int(result["task"]))
    facts = [[result.get(name) for name in _MADE_OF] for result in in_order]
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def document_sum(tokens: np.ndarray, lengths: np.ndarray, lineage: np.ndarray) -> int:
    """Order-independent fingerprint of documents: sum mod 2^64 of xxh3 over each document's ids, seeded by
    its origin.

    tokens: ids of all documents in a row, in the dtype on disk. lengths: [n]. lineage: columns file, block,
    record [3, n]. Equal sums before the shuffle and in the finished shards are the evidence that every
    document is there exactly once (as valsort does for sorted records).
    """
    return _total(document_hashes(tokens, lengths, lineage))


def document_hashes(tokens: np.ndarray, lengths: np.ndarray, lineage: np.ndarray) -> np.ndarray:
    """The hash of each document, uint64 [n], whose sum is `document_sum`."""
    data = np.ascontiguousarray(tokens).view(np.uint8).data
    stops = np.cumsum(lengths) * tokens.dtype.itemsize
    file, block, record = lineage.astype(np.uint64)
    seeds = (file << np.uint64(48)) ^ (block << np.uint64(26)) ^ record
    hash_of = xxhash.xxh3_64_intdigest
    places = zip(
        (stops - lengths * tokens.dtype.itemsize).tolist(), stops.tolist(), seeds.tolist(), strict=True
    )
    found = [hash_of(data[begin:stop], seed) for begin, stop, seed in places]
    return np.array(found, dtype=np.uint64)


def _total(hashes: np.ndarray) -> int:
    return int(np.sum(hashes, dtype=np.uint64))


def line_sum(data: np.ndarray, lengths: np.ndarray) -> int:
    """Order-independent fingerprint of lines: the sum mod 2^64 of a mix of each line's length, first and last
    eight bytes. What lies between is guarded by the checksums of frames and shards; a line that is lost or there
    twice changes the sum.
    """
    return _total(line_hashes(data, lengths))


def line_hashes(data: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The hash of each line, uint64 [n], whose sum is `line_sum`."""
    if not len(lengths):
        return np.empty(0, dtype=np.uint64)
    if len(data) < 8:
        data = np.concatenate([data, np.zeros(8, np.uint8)])
    words: np.ndarray = np.ndarray((len(data) - 7,), dtype="<u8", buffer=data, strides=(1,))
    eight, last = np.uint64(8), len(words) - 1
    stops = np.cumsum(lengths, dtype=np.int64)
    starts = stops - lengths
    lengths = lengths.astype(np.uint64)
    surplus = eight * (eight - np.minimum(lengths, eight))
    # A word that would reach over an end of the data is read inside and shifted.
    first, final = np.minimum(starts, last), np.minimum(np.maximum(stops - 8, 0), last)
    heads = (words[first] >> (eight * (starts - first).astype(np.uint64))) << surplus
    tails = words[final]
    early = stops < 8
    tails[early] <<= eight * (8 - stops[early]).astype(np.uint64)
    tails >>= surplus
    mixed = (heads * _MIX[0]) ^ (tails * _MIX[1]) ^ (lengths * _MIX[2])
    mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX[1]
    hashes: np.ndarray = mixed ^ (mixed >> np.uint64(32))
    return hashes
