"""The tokenizer's sample: the records with the smallest keys, whoever collects them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep import sample
from data_prep.config import CleaningSection, PrepareConfig, TrainSection
from data_prep.keys import philox_words, stream_id
from data_prep.plan import make_plan
from data_prep.sample import SampleTask, TrainTask, collect_sample, sample_share, train_tokenizer
from data_prep.scatter import record_keys
from tests.data_prep.made import make_texts, settings, write_jsonl

SAMPLE_BYTES = 20_000


def sampled_texts(folder: Path, tasks: list, share: float, files: int, monkeypatch) -> list[str]:
    taken: list[str] = []

    def keep(texts, section):
        taken.extend(texts)
        raise KeyboardInterrupt

    for number, segments in enumerate(tasks):
        collect_sample(SampleTask(number, segments, str(folder), "run", 5, share, CleaningSection()))
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
    share = sample_share(plan.files, SAMPLE_BYTES)
    assert len(segments) == 3 and 0.05 < share < 0.9
    for name, tasks in (("one", [segments]), ("three", [[s] for s in segments])):
        (tmp_path / name).mkdir()
        assert sampled_texts(tmp_path / name, tasks, 1.0, 3, monkeypatch) == expected
        found = sampled_texts(tmp_path / name, tasks, share, 3, monkeypatch)
        assert found == expected[: len(found)] and len(found) > 0.7 * len(expected)


def test_keys_belong_to_corpus_file_and_block():
    names = [("a", "x", 0), ("a", "x", 1), ("a", "y", 0), ("b", "x", 0)]
    keys = {name: tuple(record_keys(1, *name, 0, 8).tolist()) for name in names}
    assert len(set(keys.values())) == 4
    assert record_keys(1, "a", "x", 1, 3, 5).tolist() == list(keys["a", "x", 1][3:])
