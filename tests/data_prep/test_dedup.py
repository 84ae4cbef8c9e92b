"""Duplicates go by place, whoever reads them; weights repeat and thin out; adding a file moves nothing else."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from data_prep import dedup, run
from data_prep.dedup import copies_of
from data_prep.progress import RunProgress
from data_prep.shards import Manifest
from data_prep.tokenizer import Tokenizer
from tests.data_prep.made import command_line, content_files, make_texts, prepare, settings, write_jsonl
from tests.data_prep.test_owned import KilledError, kill_at
from tests.data_prep.test_run import documents_of

EXACT = {"method": "exact"}


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory) -> Path:
    """Three files in two folders; every text of `shared` is in several of them, some many times, one everywhere."""
    folder = tmp_path_factory.mktemp("repetitive")
    draw = random.Random(3)
    texts, shared = make_texts(600), make_texts(900, seed=1)[600:]
    for number, name in enumerate(("a/one.jsonl", "a/two.jsonl", "b/three.jsonl")):
        mine = texts[200 * number : 200 * (number + 1)] + draw.choices(shared, k=300) + ["the same"] * 400
        draw.shuffle(mine)
        write_jsonl(folder / name, [text + " " * draw.randint(0, 2) for text in mine])
    return folder


def two_corpora(folder: Path, output: Path, weights=(1.0, 1.0), **sections) -> dict:
    names = [("first", "a", weights[0]), ("second", "b", weights[1])]
    corpora = [{"name": name, "paths": [str(folder / part)], "weight": w} for name, part, w in names]
    return settings(output, [], **({"corpora": corpora, "deduplication": EXACT} | sections))


def texts_of(output: Path) -> dict[str, list[tuple[tuple[int, int, int], str]]]:
    tokenizer = Tokenizer((output / "tokenizer" / "tokenizer.model").read_bytes())
    return {
        split: [(o, tokenizer._processor.decode(ids[1:-1])) for o, ids in documents_of(output, split)]
        for split in ("train", "validation")
    }


class Stages(RunProgress):
    """Remembers of every stage how much work was done, and how much it was said to be."""

    ended: ClassVar[dict[str, tuple[float, float]]] = {}

    @contextmanager
    def stage(self, name: str, total: float, tasks: int, unit: str = "bytes") -> Iterator[None]:
        with super().stage(name, total, tasks, unit):
            yield
        self.ended[name] = self._done, total


def test_what_is_left_to_do_is_told_without_the_duplicates(repetitive, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RunProgress", Stages)
    prepare(two_corpora(repetitive, tmp_path / "out", resources={"task_bytes": 1}))
    for name in ("dedup", "gather"):
        done, total = Stages.ended[name]
        assert done == total > 0, name


def check_what_was_told(output: Path) -> None:
    """At the end the counts for people and for Prometheus are those of the manifest, duplicates and all."""
    told = json.loads((output / "progress.json").read_bytes())["records"]
    counted = json.loads((output / "manifest.json").read_bytes())["records"]
    assert counted["dropped"] and told == {name: counted[name] for name in told} and len(told) == 3
    assert (
        f'data_prep_records_total{{outcome="written"}} {counted["written"]}\n'
        in (output / "metrics.prom").read_text()
    )


def raw_places(folder: Path, names: list[str]) -> dict[str, tuple[int, int, int]]:
    """The first place of every text, files in the order of the manifest."""
    places: dict[str, tuple[int, int, int]] = {}
    for number, name in enumerate(names):
        for record, line in enumerate((folder / name).read_text().splitlines()):
            places.setdefault(json.loads(line)["text"].strip(), (number, 0, record))
    return places


def test_of_equal_texts_the_one_at_the_first_place_stays(repetitive, tmp_path):
    manifest = prepare(two_corpora(repetitive, tmp_path / "out"))
    found = texts_of(tmp_path / "out")
    written = [(text, origin) for side in found.values() for origin, text in side]
    assert dict(written) == raw_places(repetitive, ["a/one.jsonl", "a/two.jsonl", "b/three.jsonl"])
    assert len(written) == len(dict(written))
    first, second = manifest.sources
    assert first["dropped"]["duplicate"] + first["written"] == first["read"] == 1800
    assert second["dropped"]["duplicate"] + second["written"] == second["read"] == 900
    assert command_line(two_corpora(repetitive, tmp_path / "out"), tmp_path, "verify").returncode == 0


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.5, 0.4)])
@pytest.mark.parametrize("held_bytes", [88, 50_000_000], ids=["many", "few"])
def test_runs_tasks_and_ranges_leave_no_trace(repetitive, tmp_path, monkeypatch, weights, held_bytes):
    resources = {"workers": 1, "task_bytes": 1_000_000}
    prepare(two_corpora(repetitive, tmp_path / "one", weights, resources=resources))
    monkeypatch.setattr(
        dedup, "_SEEN_BYTES", 2_000_000
    )  # runs of a few records: most duplicates are found between
    monkeypatch.setattr(dedup, "_HELD_BYTES", held_bytes)
    monkeypatch.setattr(dedup, "_FRAME_ENTRIES", 7)
    monkeypatch.setattr(dedup, "_LOADED_COPIES", 200_000)  # several ranges
    resources = {"workers": 1, "task_bytes": 1}
    made = []
    original = dedup.dedup_tasks
    monkeypatch.setattr("data_prep.between.dedup_tasks", lambda *a: made.extend(original(*a)) or made)
    prepare(two_corpora(repetitive, tmp_path / "two", weights, resources=resources))
    assert len(made) > 3
    assert content_files(tmp_path / "one") == content_files(tmp_path / "two")
    check_what_was_told(tmp_path / "two")


@pytest.mark.parametrize("cut", ["run_merges", "gather"])
@pytest.mark.parametrize("seen_bytes", [(110, 2_000_000), (2_000_000, 110)], ids=["less", "more"])
def test_resuming_with_other_memory_after_a_power_cut_takes_up_no_stale_result(
    repetitive, tmp_path, monkeypatch, cut, seen_bytes
):
    """Pass 1 is done again and drops other duplicates by itself; drops and shards on the disk are of the first time."""
    tree = two_corpora(repetitive, tmp_path / "out", (2.5, 0.4), resources={"task_bytes": 1_000_000})
    monkeypatch.setattr(dedup, "_FRAME_ENTRIES", 7)
    monkeypatch.setattr(dedup, "_SEEN_BYTES", seen_bytes[0])
    with monkeypatch.context() as patch:
        kill_at(patch, run, cut, after=cut == "gather")
        with pytest.raises(KilledError):
            prepare(tree)
    for path in (tmp_path / "out").glob(".work/*/scatter/task-??????.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"boot": "the one before"}))
    monkeypatch.setattr(dedup, "_SEEN_BYTES", seen_bytes[1])
    prepare(tree)
    check_what_was_told(tmp_path / "out")
    monkeypatch.undo()
    prepare(tree | {"output_dir": str(tmp_path / "alone")})
    assert content_files(tmp_path / "out") == content_files(tmp_path / "alone")


def test_weights_repeat_and_thin_out_after_deduplication(repetitive, tmp_path):
    manifest = prepare(two_corpora(repetitive, tmp_path / "out", (2.5, 0.4)))
    plain = prepare(two_corpora(repetitive, tmp_path / "plain"))
    first, second = manifest.sources
    kept = [source["written"] for source in plain.sources]
    assert first["dropped"] == plain.sources[0]["dropped"]
    assert first["written"] - first["repeated"] == kept[0] and 2.3 < first["written"] / kept[0] < 2.7
    assert second["dropped"]["duplicate"] == plain.sources[1]["dropped"]["duplicate"]
    assert second["dropped"]["subsampled"] + second["written"] == kept[1]
    assert 0.3 < second["written"] / kept[1] < 0.5
    assert manifest.records["repeated"] == first["repeated"]
    found = texts_of(tmp_path / "out")
    sides = [Counter(text for _, text in found[split]) for split in found]
    assert not sides[0].keys() & sides[1].keys()
    copies = Counter(origin for side in found.values() for origin, _ in side)
    assert {copies[o] for o in copies if o[0] < 2} == {2, 3} and {copies[o] for o in copies if o[0] == 2} == {
        1
    }
    positions = [i for i, (origin, _) in enumerate(found["train"]) if origin == found["train"][0][0]]
    assert len(positions) >= 2 and positions[1] > 1  # a copy has a place of its own
    assert (
        command_line(two_corpora(repetitive, tmp_path / "out", (2.5, 0.4)), tmp_path, "verify").returncode
        == 0
    )


def test_copies_of_a_text_are_held_within_the_memory_too():
    memory_bytes, most, file = 200_000, 0, io.BytesIO()
    writer = dedup.HashWriter(file, memory_bytes)
    for batch in range(20):
        kept, hashes = writer.new([f"{batch} {i}".encode() for i in range(20)])
        for _ in range(200):
            writer.add(hashes, 0, batch, np.array(kept), np.arange(len(kept)), 1)
            held = sum(part.nbytes for part in writer._parts)
            most = max(most, 2 * held + 110 * len(writer._seen))
    frames = writer.finish()
    assert 0.9 * memory_bytes < most < memory_bytes
    assert writer.entries == frames["entries"].sum() == 20 * 200 * 20


def test_a_whole_weight_is_exact_and_a_share_is_a_share():
    names = (7, "corpus", "file", 0, 0, 20_000)
    assert set(copies_of(*names, 3.0).tolist()) == {3}
    assert abs(copies_of(*names, 0.3).mean() - 0.3) < 0.02
    assert abs(copies_of(*names, 1.5).mean() - 1.5) < 0.02
    longer = copies_of(7, "corpus", "file", 0, 0, 100, 0.3)
    assert np.array_equal(copies_of(7, "corpus", "file", 0, 40, 60, 0.3), longer[40:])


def test_a_damaged_file_of_hashes_stops_the_run(repetitive, tmp_path, monkeypatch):
    import data_prep.run as run_module
    from data_prep.errors import DataPrepError

    original = run_module.run_dedup

    def damaged(plan, *rest):
        path = plan.work_path / "scatter" / "task-000000.hashes"
        path.write_bytes(path.read_bytes()[:-40])
        return original(plan, *rest)

    monkeypatch.setattr(run_module, "run_dedup", damaged)
    with pytest.raises(DataPrepError, match="task-000000.hashes: an intermediate file is gone or damaged"):
        prepare(two_corpora(repetitive, tmp_path / "out"))


@pytest.mark.parametrize("method", ["exact", "none"])
def test_adding_a_file_moves_no_record_that_has_no_copy_in_it(repetitive, prepared, tmp_path, method):
    """With the tokenizer given, what is not new stands in the order it had."""
    folder = tmp_path / "corpus"
    texts = make_texts(500, seed=8)
    write_jsonl(folder / "m.jsonl", texts[:400])
    tokenizer = {"load": str(prepared / "tokenizer" / "tokenizer.model")}
    sections = {"tokenizer": tokenizer, "deduplication": {"method": method}}
    before = prepare(settings(tmp_path / "before", [folder], **sections))
    write_jsonl(
        folder / "a" / "new.jsonl", texts[300:]
    )  # comes before the other by name, a quarter is in both
    after = prepare(settings(tmp_path / "after", [folder], **sections))
    assert [file["path"] for file in after.files] == ["a/new.jsonl", "m.jsonl"]
    for split in ("train", "validation"):
        old = [record for (_, _, record), _ in documents_of(tmp_path / "before", split) if record < 300]
        new = [o[2] for o, _ in documents_of(tmp_path / "after", split) if o[0] == 1 and o[2] < 300]
        assert old == new
    assert after.records["written"] == before.records["written"] + (100 if method == "exact" else 200)
    assert isinstance(after, Manifest)
