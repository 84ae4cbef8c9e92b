"""Reading spill files by range of keys: what an index finds by halving is what looking at every frame finds."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest

from data_prep import merge
from data_prep import run as run_module
from data_prep.merge import _parts_within
from data_prep.spill import CODECS, FRAME_INDEX, Items, Records, SpillWriter, decode_frame
from tests.data_prep.made import prepare, settings
from tests.data_prep.test_owned import KilledError, kill_at


def test_frames_of_a_range_are_found_by_halving():
    draw = np.random.default_rng(0)
    for _ in range(200):
        entries = []
        for split in (0, 1):
            for run in range(draw.integers(0, 4)):
                count = int(draw.integers(0, 8))
                keys = np.sort(draw.integers(0, 60, 2 * count)).reshape(-1, 2)
                entries += [(low, high, 0, 0, 0, 0, 0, 0, run, split, 0) for low, high in keys.tolist()]
        frames = np.array(entries, dtype=FRAME_INDEX)
        low, high = sorted(draw.integers(0, 60, 2).tolist())
        for split in (0, 1):
            mine = (frames["split"] == split) & (frames["first_key"] <= high) & (frames["last_key"] >= low)
            found = [n for begin, end in _parts_within(frames, split, low, high) for n in range(begin, end)]
            assert found == np.flatnonzero(mine).tolist()


@pytest.mark.parametrize("runs", [1, 5, 20, 60])
def test_what_is_loaded_at_a_time_fits_the_budget_and_little_is_loaded_twice(runs):
    """Runs of 40 frames of 1,000 bytes each; of every run a frame reaches over a cut."""
    draw, budget = np.random.default_rng(runs), 60_000
    keys = np.sort(draw.integers(0, 2**64, (runs, 41), dtype=np.uint64), axis=1)
    frames = np.zeros(40 * runs, dtype=FRAME_INDEX)
    frames["first_key"], frames["last_key"] = keys[:, :-1].reshape(-1), keys[:, 1:].reshape(-1) - np.uint64(1)
    frames["raw_bytes"] = 1000
    spills = merge.SpillSet("", range(runs), "<u2", False, True)
    parts = list(merge._sub_ranges(frames, spills, 0, 2**64, budget))
    assert [low for low, _ in parts] == [0, *(high for _, high in parts[:-1])] and parts[-1][1] == 2**64
    loaded = [
        1000
        * int(((frames["first_key"] <= np.uint64(high - 1)) & (frames["last_key"] >= np.uint64(low))).sum())
        for low, high in parts
    ]
    assert max(loaded) <= (budget if runs <= 30 else 2 * budget)
    assert sum(loaded) <= 2.1 * 1000 * len(frames)


def test_a_finished_merge_is_taken_up_with_the_results_it_was_made_of_alone(corpus, tmp_path, monkeypatch):
    done: list[merge.MergeTask] = []
    monkeypatch.setattr("data_prep.estimate._FEW_READS", 1)
    monkeypatch.setattr("data_prep.between.merge", lambda task: done.append(task) or merge.merge(task))
    kill_at(monkeypatch, run_module, "run_gather")
    with pytest.raises(KilledError):
        prepare(settings(tmp_path / "out", [corpus], resources={"min_read_bytes": 10**9, "task_bytes": 1}))
    assert merge.finished_merge(done[0]) is not None
    assert merge.finished_merge(replace(done[0], upstream="other")) is None


def test_frames_of_short_records_are_no_larger_than_others_when_they_are_loaded():
    columns = {"key": np.arange(20_000, dtype=np.uint64), "length": np.full(20_000, 2, dtype=np.uint32)}
    writer = SpillWriter(io.BytesIO(), 10**7, 16_000, "none")
    writer.add(Records(columns, np.zeros(40_000, dtype=np.uint8), None), np.zeros(20_000, dtype=np.uint8))
    frames = writer.finish()
    assert int(frames["documents"].sum()) == 20_000
    assert merge.loaded_bytes(frames, False).max() < 20_000


def test_payloads_are_taken_in_any_order_whatever_their_length():
    draw = np.random.default_rng(1)
    for dtype in (np.uint8, np.uint16, np.uint32):
        lengths = draw.integers(0, 9, 200).astype(np.uint32)
        values = draw.integers(0, 200, int(lengths.sum())).astype(dtype)
        parts = np.split(values, np.cumsum(lengths)[:-1])
        order = draw.permutation(200)
        assert (Items(values, lengths).take(order) == np.concatenate([parts[n] for n in order])).all()
        assert len(Items(values, lengths).take(order[:0])) == 0


def test_what_was_spilled_comes_back_by_every_codec_also_when_it_is_larger_than_the_budget():
    draw = np.random.default_rng(2)
    for codec in CODECS:
        file = io.BytesIO()
        writer = SpillWriter(file, 4000, 512, codec)
        written = {}
        for size in (3, 40, 3000, 2, 5):
            keys = draw.integers(0, 2**63, 4).astype(np.uint64)
            lengths = np.array([size, 0, 1, size], dtype=np.uint32)
            tokens = draw.integers(0, 60_000, int(lengths.sum())).astype(np.uint16)
            origin = {name: np.arange(4, dtype=np.uint32) for name in ("file", "block", "record")}
            writer.add(
                Records({"key": keys, "length": lengths, **origin}, tokens, None), np.array([0, 1, 0, 1])
            )
            written |= dict(zip(keys.tolist(), np.split(tokens, np.cumsum(lengths)[:-1]), strict=True))
        frames = writer.finish()
        assert writer.runs >= 2 and set(frames["split"].tolist()) == {0, 1}
        found = {}
        for frame in frames:
            offset = int(frame["offset"])
            records = decode_frame(
                file.getvalue()[offset : offset + int(frame["bytes"])], frame, np.dtype("<u2"), False
            )
            assert (np.diff(records.columns["key"].astype(np.float64)) >= 0).all()
            parts = np.split(records.tokens, np.cumsum(records.columns["length"])[:-1])
            found |= dict(zip(records.columns["key"].tolist(), parts, strict=True))
        assert found.keys() == written.keys()
        assert all((found[key] == written[key]).all() for key in found)
