"""The tokenizer's sample: the records with the smallest keys, whoever collects them."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data_prep import inputs, sample, sources
from data_prep import plan as plan_module
from data_prep.config import CleaningSection, PrepareConfig, TrainSection
from data_prep.keys import philox_words, stream_id
from data_prep.plan import make_plan
from data_prep.records import Segment, record_keys
from data_prep.sample import (
    SampleTask,
    Shares,
    TrainTask,
    chosen_blocks,
    collect_sample,
    sample_path,
    sample_shares,
    train_tokenizer,
)
from tests.data_prep.made import make_texts, settings, write_jsonl

SAMPLE_BYTES = 20_000


def sampled_texts(folder: Path, tasks: list, shares: Shares, monkeypatch) -> list[str]:
    taken: list[str] = []

    def keep(texts, section):
        taken.extend(texts)
        raise KeyboardInterrupt

    for number, segments in enumerate(tasks):
        collect_sample(SampleTask(number, segments, str(folder), "run", 5, shares, CleaningSection()))
    monkeypatch.setattr(sample, "train", keep)
    section = TrainSection(sample_bytes=SAMPLE_BYTES)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(TrainTask(str(folder), len(tasks), section, str(folder)))
    return taken


def test_the_sample_is_the_smallest_keys_in_order(tmp_path, monkeypatch):
    texts = make_texts(1500)
    for number in range(3):
        write_jsonl(tmp_path / "raw" / f"{number}.jsonl", texts[500 * number : 500 * (number + 1)])
    plan = make_plan(PrepareConfig.model_validate(settings(tmp_path / "out", [tmp_path / "raw"])))
    streams = [stream_id("tokenizer-sample", "made", f"{number}.jsonl", 0) for number in range(3)]
    keys = np.concatenate([philox_words(5, stream, 0, 500) for stream in streams])
    expected, size = [], 0
    for number in np.argsort(keys).tolist():
        if size >= SAMPLE_BYTES:
            break
        expected.append(texts[number])
        size += len(texts[number].encode())
    segments = [segment for task in plan.tasks for segment in task]
    shares = sample_shares(plan.files, [1.0], SAMPLE_BYTES)
    assert len(segments) == 3 and 0.05 < shares.records < 0.9 and shares.blocks == 1
    for name, tasks in (("one", [segments]), ("three", [[s] for s in segments])):
        (tmp_path / name).mkdir()
        assert sampled_texts(tmp_path / name, tasks, Shares(1.0, 1.0, 1.0), monkeypatch) == expected
        found = sampled_texts(tmp_path / name, tasks, shares, monkeypatch)
        assert found == expected[: len(found)] and len(found) > 0.7 * len(expected)


def test_keys_belong_to_corpus_file_and_block():
    names = [("a", "x", 0), ("a", "x", 1), ("a", "y", 0), ("b", "x", 0)]
    keys = {name: tuple(record_keys(1, *name, 0, 8).tolist()) for name in names}
    assert len(set(keys.values())) == 4
    assert record_keys(1, "a", "x", 1, 3, 5).tolist() == list(keys["a", "x", 1][3:])


def test_only_chosen_blocks_are_read_and_every_record_has_the_same_chance(tmp_path, monkeypatch):
    """Two plain files, one zst of many frames and gz files; 60 % of the blocks, 20 % of the records."""
    for module in (sources, inputs, plan_module):
        monkeypatch.setattr(module, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(inputs, "_SPLIT_BYTES", 1)
    texts = make_texts(12_000)
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = [text.encode() + b"\n" for text in texts]
    (raw / "a.txt").write_bytes(b"".join(lines[:4000]))
    frames = [zstandard.compress(b"".join(lines[i : i + 100])) for i in range(4000, 8000, 100)]
    (raw / "b.txt.zst").write_bytes(b"".join(frames))
    for number in range(40):
        packed = gzip.compress(b"".join(lines[8000 + 100 * number : 8100 + 100 * number]))
        (raw / f"c{number:02d}.txt.gz").write_bytes(packed)
    tree = settings(tmp_path / "out", [raw], resources={"task_bytes": 1})
    plan = make_plan(PrepareConfig.model_validate(tree))
    shares = Shares(0.2, 0.6, 0.6)
    task = SampleTask(
        0, [s for t in plan.tasks for s in t], str(tmp_path), "run", 5, shares, CleaningSection()
    )
    result = collect_sample(task)
    with zstandard.open(sample_path(tmp_path, 0), "rt", encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    kinds = Counter(min(entry[1], 2) for entry in entries)
    assert all(abs(count / 4000 - 0.2) < 0.045 for count in kinds.values()), kinds
    scaled = np.array([entry[0] for entry in entries]) / 2**64
    assert scaled.max() < 0.2 and abs(scaled.mean() - 0.1) < 0.01
    blocks = {
        (segment.file, block) for segment in task.segments for block, _ in chosen_blocks(5, segment, shares)
    }
    assert {(entry[1], entry[2]) for entry in entries if entry[1] < 2} <= blocks
    assert result["input_bytes"] < 0.75 * plan.input_bytes
    again = replace(plan.files[1], frames=())  # read through where it cannot be split: the same records
    segment = Segment(1, again, "made", 0, None)
    collect_sample(replace(task, number=1, segments=[segment]))
    with zstandard.open(sample_path(tmp_path, 1), "rt", encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == [entry for entry in entries if entry[1] == 1]


@pytest.mark.parametrize("weights", [(0.1, 0.1), (20, 20), (1, 20), (0.01, 50)])
@pytest.mark.parametrize("sample_bytes", [30_000, 150_000])
def test_what_is_collected_is_what_was_asked_for_whatever_the_weights(tmp_path, weights, sample_bytes):
    for name, count in (("large", 2500), ("small", 500)):
        write_jsonl(tmp_path / name / "x.jsonl", make_texts(count))
    tree = settings(tmp_path / "out", [])
    tree["corpora"] = [
        {"name": name, "paths": [str(tmp_path / name)], "weight": weight}
        for name, weight in zip(("large", "small"), weights, strict=True)
    ]
    plan = make_plan(PrepareConfig.model_validate(tree))
    segments = [segment for task in plan.tasks for segment in task]
    shares = sample_shares(plan.files, weights, sample_bytes)
    collect_sample(SampleTask(0, segments, str(tmp_path), "run", 5, shares, CleaningSection()))
    with zstandard.open(sample_path(tmp_path, 0), "rt", encoding="utf-8") as file:
        collected = sum(len(json.loads(line)[4].encode()) for line in file)
    assert sample_bytes < collected < 1.4 * sample_bytes < plan.text_bytes


def test_no_more_than_the_sample_is_held_of_what_was_collected(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "raw" / "x.jsonl", make_texts(6000))
    plan = make_plan(PrepareConfig.model_validate(settings(tmp_path / "out", [tmp_path / "raw"])))
    sampled_texts(tmp_path, plan.tasks, Shares(1.0, 1.0, 1.0), monkeypatch)
    tracemalloc.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(
                TrainTask(str(tmp_path), 1, TrainSection(sample_bytes=SAMPLE_BYTES), str(tmp_path))
            )
        assert tracemalloc.get_traced_memory()[1] < 20 * SAMPLE_BYTES < plan.text_bytes
    finally:
        tracemalloc.stop()


def test_a_corpus_that_weighs_more_gives_more_of_the_sample(tmp_path):
    for name in ("light", "heavy"):
        write_jsonl(tmp_path / name / "x.jsonl", make_texts(3000))
    tree = settings(tmp_path / "out", [])
    tree["corpora"] = [
        {"name": name, "paths": [str(tmp_path / name)], "weight": weight}
        for name, weight in (("light", 0.5), ("heavy", 2))
    ]
    plan = make_plan(PrepareConfig.model_validate(tree))
    segments = [segment for task in plan.tasks for segment in task]
    shares = Shares(0.2, 1.0, 1.0)
    collect_sample(SampleTask(0, segments, str(tmp_path), "run", 5, shares, CleaningSection()))
    with zstandard.open(sample_path(tmp_path, 0), "rt", encoding="utf-8") as file:
        found = Counter(json.loads(line)[1] for line in file)
    assert abs(found[0] / 3000 - 0.1) < 0.03 and abs(found[1] / 3000 - 0.4) < 0.04
