"""The evidence that every document is in the shards exactly once."""

from __future__ import annotations

import numpy as np
import xxhash


def document_sum(tokens: np.ndarray, lengths: np.ndarray, lineage: np.ndarray) -> int:
    """Order-independent fingerprint of documents: sum mod 2^64 of xxh3 over each document's ids, seeded by
    its origin.

    tokens: ids of all documents in a row, in the dtype on disk. lengths: [n]. lineage: columns file, block,
    record [3, n]. Equal sums before the shuffle and in the finished shards are the evidence that every
    document is there exactly once (as valsort does for sorted records).
    """
    if not len(lengths):
        return 0
    data = np.ascontiguousarray(tokens).view(np.uint8).data
    stops = np.cumsum(lengths) * tokens.dtype.itemsize
    file, block, record = lineage.astype(np.uint64)
    seeds = (file << np.uint64(48)) ^ (block << np.uint64(26)) ^ record
    begin, total = 0, 0
    for stop, seed in zip(stops.tolist(), seeds.tolist(), strict=True):
        total += xxhash.xxh3_64_intdigest(data[begin:stop], seed)
        begin = stop
    return total & ((1 << 64) - 1)
