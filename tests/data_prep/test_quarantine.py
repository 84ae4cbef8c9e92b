"""What quarantine.jsonl lists is bounded, what it counts is exact, and neither shows how the input was cut."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import yaml

from data_prep import quarantine
from data_prep.__main__ import main
from data_prep.quarantine import LISTED_OF_FILE, Quarantine, records_of_line
from tests.data_prep.made import content_files, make_texts, prepare, settings


def joined(parts: list[list[bytes]]) -> list[bytes]:
    """The lines of tasks, each through a Quarantine of its own, then all through another."""
    found: list[bytes] = []
    whole = Quarantine(found.append)
    for part in parts:
        of_task: list[bytes] = []
        task = Quarantine(of_task.append)
        task.join(part)
        task.finish()
        whole.join(of_task)
    whole.finish()
    return found


@pytest.mark.parametrize("seed", range(20))
def test_how_the_input_was_cut_cannot_be_seen(monkeypatch, seed):
    monkeypatch.setattr(quarantine, "LISTED_OF_FILE", 5)
    monkeypatch.setattr(quarantine, "LISTED_OF_CORPUS", 12)
    draw, lines = random.Random(seed), []
    for corpus in "ab":
        for file in "xyz":
            entries = [{"corpus": corpus, "file": file, "reason": draw.choice("pq")} for _ in range(30)]
            lines += [json.dumps(entry).encode() + b"\n" for entry in entries[: draw.randint(0, 30)]]
    cuts = sorted(draw.choices(range(len(lines) + 1), k=6))
    parts = [lines[a:b] for a, b in zip([0, *cuts], [*cuts, len(lines)], strict=True)]
    found = joined(parts)
    assert found == joined([lines])
    counted: Counter[tuple] = Counter()
    listed: Counter[tuple] = Counter()
    for line in found:
        entry = json.loads(line)
        place = entry["corpus"], entry["file"], entry["reason"]
        counted[place] += records_of_line(line)
        listed[place] += "more" not in entry
    assert counted == Counter(tuple(json.loads(line).values()) for line in lines)
    assert max(listed.values()) <= 5
    assert max(Counter((c, r) for (c, _, r), n in listed.items() for _ in range(n)).values()) <= 12


def test_many_broken_lines_take_little_room_and_are_counted(prepared, tmp_path, capsys):
    """150 kB of brackets, which take 7 MB where each has a line; for one worker and for two."""
    (tmp_path / "raw").mkdir()
    for number in range(2):
        texts = [json.dumps({"text": text}) for text in make_texts(200, seed=number)]
        lines = ["[]"] * 700 + texts + (["{}"] * 50_000 if number else ["[]"] * 800)
        (tmp_path / "raw" / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    trees = []
    for workers in (1, 2):
        tree = settings(tmp_path / str(workers), [tmp_path / "raw"], quarantine={"max_record_share": 1})
        tree["tokenizer"] = {"load": str(prepared / "tokenizer" / "tokenizer.model")}
        tree["resources"] = {"workers": workers, "task_bytes": 10**9 if workers == 1 else 1}
        trees.append(tree)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(trees[1]))
    arguments = ["--config", str(tmp_path / "config.yaml")]
    assert main(["run", *arguments]) == 0
    said = capsys.readouterr().out
    assert "quarantined: missing_field 50,000, not_a_json_object 2,200\n" in said
    assert "quarantine.jsonl lists up to 1,000 of a file for a reason and counts the rest" in said
    assert prepare(trees[0]).records["quarantined"] == 52_200
    assert content_files(tmp_path / "1") == content_files(tmp_path / "2")
    lines = (tmp_path / "2" / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == 2 * LISTED_OF_FILE + 700 + 2 and sum(map(len, lines)) < 500_000
    more = [entry for line in lines if "more" in (entry := json.loads(line))]
    place = {"corpus": "made", "file": "0.jsonl", "reason": "not_a_json_object"}
    assert more == [
        place | {"more": 500},
        place | {"file": "1.jsonl", "reason": "missing_field", "more": 49_000},
    ]
    assert main(["verify", *arguments]) == 0
