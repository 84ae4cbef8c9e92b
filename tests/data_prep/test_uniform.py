"""The order on disk is a uniform shuffle: statistics of a real run, read back from its shards, which `stripe` fails."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from data_prep.keys import STRIPES, philox_words, stripe_words
from data_prep.shards import SplitReader
from tests.data_prep.made import prepare, settings

_FILE_RECORDS = 1000
# 99.9 % bounds of chi-square with 119 degrees of freedom, below and above.
_LEAST, _MOST = 76.6, 172.4


def places_in_order(tmp_path: Path, model: Path, files: int, algorithm: str, workers: int) -> np.ndarray:
    """Place in the output of every record, int64 [files, records of a file], of a run over that many files."""
    raw = tmp_path / "raw"
    if not raw.exists():
        raw.mkdir()
        for number in range(files):
            (raw / f"{number:04d}.txt").write_text("\n".join(f"法 {i}" for i in range(_FILE_RECORDS)) + "\n")
    output = tmp_path / algorithm
    tree = settings(
        output,
        [raw],
        tokenizer={"load": str(model)},
        words={"segmenter": "none"},
        shuffle={"algorithm": algorithm},
        shards={"validation_share": 0, "target_bytes": 2_000_000, "row_tokens": 512},
        resources={"workers": workers},
    )
    prepare(tree)
    reader = SplitReader(output, "train")
    origins = []
    for shard in range(len(reader.manifest.splits["train"].shards)):
        blocks = reader._reader(shard)
        for number in range(len(blocks.blocks)):
            pieces = blocks.read(number).pieces
            origins.append(pieces[[4, 6]][:, pieces[7] == 0])
    file, record = np.concatenate(origins, axis=1).astype(np.int64)
    assert len(file) == files * _FILE_RECORDS
    places = np.full((files, _FILE_RECORDS), -1)
    places[file, record] = np.arange(len(file))
    assert (places >= 0).all(), "a record is missing"
    return places


def chi_square_of_orders(groups: np.ndarray) -> float:
    """Of the 120 orders in which the places of groups of five, [groups, 5], come."""
    order = np.argsort(groups, axis=1)
    code = {tuple(p): n for n, p in enumerate(permutations(range(5)))}
    table = np.full(5**5, -1)
    for order_of, number in code.items():
        table[sum(value * 5**k for k, value in enumerate(order_of))] = number
    counts = np.bincount(table[(order * 5 ** np.arange(5)).sum(axis=1)], minlength=120)
    expected = len(groups) / 120
    return float(((counts - expected) ** 2 / expected).sum())


def neighbours_from_one_file(places: np.ndarray) -> float:
    """How many standard deviations the number of neighbours from one file is from that of a uniform order."""
    files = np.empty(places.size, dtype=np.int64)
    files[places] = np.arange(len(places))[:, None]
    found = int((files[1:] == files[:-1]).sum())
    chance = (places.shape[1] - 1) / (places.size - 1)
    expected = chance * (places.size - 1)
    return (found - expected) / math.sqrt(expected * (1 - chance))


def statistics(places: np.ndarray) -> dict[str, float]:
    return {
        "adjacent": chi_square_of_orders(places.reshape(-1, 5)),
        "across_files": chi_square_of_orders(places.T.reshape(-1, 5)),
        "neighbours": neighbours_from_one_file(places),
    }


def rejected_by(found: dict[str, float]) -> list[str]:
    """The statistics by which an order is not uniform."""
    bounds = {"adjacent": (_LEAST, _MOST), "across_files": (_LEAST, _MOST), "neighbours": (-4, 4)}
    return [name for name, (least, most) in bounds.items() if not least < found[name] < most]


def check(tmp_path: Path, prepared: Path, files: int, workers: int) -> dict[str, object]:
    """The order by key passes every statistic; the same test of the stratified method finds that it is none."""
    model = prepared / "tokenizer" / "tokenizer.model"
    found = {
        algorithm: statistics(places_in_order(tmp_path, model, files, algorithm, workers))
        for algorithm in ("key", "stripe")
    }
    assert rejected_by(found["key"]) == [], found
    # Of two records of one file, stripes hardly ever put one behind the other; orders of five do not show that.
    assert "neighbours" in rejected_by(found["stripe"]), found
    assert found["stripe"]["neighbours"] < -10, found
    return {**found, "stripe_rejected_by": rejected_by(found["stripe"])}


def test_a_hundred_thousand_records_are_in_uniform_order(tmp_path, prepared):
    check(tmp_path, prepared, 100, 1)


@pytest.mark.slow
def test_a_million_records_are_in_uniform_order(tmp_path, prepared, evidence):
    """Orders of 200,000 disjoint groups of five, adjacent and across files, and sources of neighbours."""
    evidence(records=1_000_000, groups=200_000, bounds=[_LEAST, _MOST], **check(tmp_path, prepared, 1000, 2))


def test_stripes_have_one_of_every_group_and_do_not_depend_on_the_cut():
    keys = stripe_words(3, 5, 0, 4 * STRIPES)
    for group in keys.reshape(4, STRIPES):
        assert sorted((group >> np.uint64(54)).tolist()) == list(range(STRIPES))
    for begin, count in ((0, 10), (1000, 100), (1023, 2), (2500, 1596)):
        assert (stripe_words(3, 5, begin, count) == keys[begin : begin + count]).all()
    assert (keys != philox_words(3, 5, 0, 4 * STRIPES)).any()
