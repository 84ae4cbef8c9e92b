"""Keys: fixed vectors, random access, and a uniform order."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest

from data_prep.keys import key_range, philox_words, share_threshold, stream_id


def test_vectors_never_change():
    """Published data sets are ordered by these numbers."""
    assert [f"{w:016x}" for w in philox_words(0, 0, 0, 5).tolist()] == [
        "02f4ba6408e4d89b",
        "3dd62b0b9ca8c5b2",
        "1c8667a55d902e79",
        "907d7a052fd5b4dc",
        "809bf322883987c3",
    ]
    assert [f"{w:016x}" for w in philox_words(1234, 2**63 + 7, 10, 3).tolist()] == [
        "4a881c8a32eed591",
        "a428382ea8f71b31",
        "8a0dd29268235741",
    ]
    assert stream_id("order", "law", "a.jsonl", 0) == 0xCCC49BE3E9C9B037
    assert stream_id() == 0x2D06800538D394C2


def test_philox_is_the_published_one():
    """Known answer of Random123 (kat_vectors, philox4x64 10 rounds, counter and key all ones)."""
    ones = (1 << 64) - 1
    generator = np.random.Philox(key=np.array([ones, ones], dtype=np.uint64), counter=(1 << 256) - 2)
    expected = ["87b092c3013fe90b", "438c3c67be8d0224", "9cc7d7c69cd777b6", "a09caebf594f0ba0"]
    assert [f"{word:016x}" for word in generator.random_raw(4).tolist()] == expected


@pytest.mark.parametrize("counter", [0, 1, 3, 4, 1001])
def test_words_are_addressed_by_position(counter):
    whole = philox_words(7, 9, 0, 1100)
    assert np.array_equal(philox_words(7, 9, counter, 50), whole[counter : counter + 50])
    assert philox_words(7, 9, counter, 0).shape == (0,)


def test_streams_and_seeds_differ():
    words = {philox_words(seed, stream, 0, 1)[0] for seed in range(20) for stream in range(20)}
    assert len(words) == 400
    assert stream_id("ab", "c") != stream_id("a", "bc") != stream_id("abc")


def test_order_by_key_is_uniform_over_all_permutations():
    """Chi-square over the 120 orders of 5 records: 99.9 % of uniform shuffles stay below 172.4."""
    rounds, records = 24_000, 5
    keys = philox_words(3, stream_id("uniform"), 0, rounds * records).reshape(rounds, records)
    orders, counts = np.unique(np.argsort(keys, axis=1), axis=0, return_counts=True)
    assert len(orders) == len(list(permutations(range(records))))
    expected = rounds / 120
    assert ((counts - expected) ** 2 / expected).sum() < 172.4


def test_ranges_cover_the_key_space_once():
    for parts in (1, 2, 3, 7, 1000):
        ranges = [key_range(part, parts) for part in range(parts)]
        assert ranges[0][0] == 0 and ranges[-1][1] == 1 << 64
        assert all(a[1] == b[0] for a, b in pairwise(ranges))
        assert max(b - a for a, b in ranges) - min(b - a for a, b in ranges) <= 1


def test_share_threshold():
    assert share_threshold(0.0) == 0
    assert share_threshold(0.5) == 1 << 63
