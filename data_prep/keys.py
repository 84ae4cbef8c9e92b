"""Random numbers that are functions: Philox4x64-10 words addressed by (seed, stream, position).

Order is a sort by a random key. The key of a record is a function of the seed, of the file and block that
hold it and of its number there, so workers, memory, retries and the order of completion cannot enter the
shuffled order. Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Only the raw
words are used: numpy keeps them fixed between versions (NEP 19), while the methods of
`numpy.random.Generator` may change.
"""

from __future__ import annotations

import numpy as np
import xxhash

_MASK = (1 << 64) - 1
STRIPES = 1024
_STRIPE_SHIFT = 64 - 10


def philox_words(seed: int, stream: int, counter: int, n: int) -> np.ndarray:
    """Words counter .. counter + n - 1 of a stream, uint64 [n]; the Philox key is (seed, stream).

    Word i of a stream is word i % 4 of the Philox block at counter i // 4 + 1 (numpy steps before it draws).
    """
    generator = np.random.Philox(
        key=np.array([seed & _MASK, stream & _MASK], dtype=np.uint64), counter=counter // 4
    )
    skip = counter % 4
    return generator.random_raw(n + skip)[skip:]


def stripe_words(seed: int, stream: int, counter: int, n: int) -> np.ndarray:
    """Keys of the stratified method, uint64 [n]: every group of STRIPES neighbours has one record in each of
    STRIPES equal ranges of keys. Not a uniform shuffle: two neighbours in the output rarely come from one group.
    (jianlin.su, kexue.fm/8662: files are shuffled one by one, then dealt out a line from each in turn.)
    """
    first, stop = counter // STRIPES, -(-(counter + n) // STRIPES)
    words = philox_words(seed, stream, first * STRIPES, (stop - first) * STRIPES).reshape(-1, STRIPES)
    ranks = np.argsort(np.argsort(words, axis=1), axis=1).astype(np.uint64)
    inside = words & np.uint64((1 << _STRIPE_SHIFT) - 1)
    keys = ((ranks << np.uint64(_STRIPE_SHIFT)) | inside).reshape(-1)
    return keys[counter - first * STRIPES :][:n]


def stream_id(*parts: str | int) -> int:
    """The 64-bit number of a stream: xxh3 of the parts as text, each behind its length (so no two lists
    collide).
    """
    digest = xxhash.xxh3_64()
    for part in parts:
        data = str(part).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.intdigest()


def key_range(part: int, parts: int) -> tuple[int, int]:
    """The keys [first, stop) of part `part` when the 64-bit key space is cut into `parts` equal ranges."""
    return -(-(part << 64) // parts), -(-((part + 1) << 64) // parts)


def share_threshold(share: float) -> int:
    """The bound below which a uniform 64-bit number falls with probability `share` (exact for 0 and 1)."""
    return int(share * (1 << 53)) << 11
