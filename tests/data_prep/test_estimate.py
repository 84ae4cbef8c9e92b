"""The plan's figures come from the corpus and the disk, and stand beside what the run took."""

from __future__ import annotations

import json

import pytest

from data_prep.config import PrepareConfig
from data_prep.estimate import estimate, needed_groups
from data_prep.plan import make_plan
from data_prep.shards import SplitReader
from data_prep.tokenizer import Tokenizer
from tests.data_prep.made import command_line, make_texts, prepare, settings, write_jsonl


@pytest.fixture
def tree(prepared, tmp_path) -> dict:
    source = write_jsonl(tmp_path / "raw" / "a.jsonl", make_texts(20_000))
    model = str(prepared / "tokenizer" / "tokenizer.model")
    return settings(
        tmp_path / "out",
        [source],
        tokenizer={"load": model},
        shards={"target_bytes": 10**6, "row_tokens": 128, "block_bytes": 192 * 1024},
    )


def test_the_estimate_of_bytes_is_near_what_the_run_moves(tree, tmp_path):
    plan = make_plan(PrepareConfig.model_validate(tree))
    planned = estimate(plan, _tokenizer(tree))
    prepare(tree)
    run = json.loads((tmp_path / "out" / "run.json").read_bytes())
    assert planned.passes == 2 and planned.codec == "zstd"
    for name, was in (
        ("spill_bytes", run["bytes"]["scatter_written"]),
        ("output_bytes", run["bytes"]["gather_written"]),
        ("moved_bytes", run["bytes"]["total"]),
    ):
        assert 0.5 < getattr(planned, name) / was < 2, name
    # What the tasks say they moved is what the kernel counted for them.
    assert 0.8 < run["proc_bytes"] / run["bytes"]["total"] < 1.5
    reader = SplitReader(tmp_path / "out", "train")
    shard = reader._reader(0)
    inside = sum(block[name][1] for block in shard.blocks for name in ("tokens", "words", "documents"))
    assert 1 - inside / shard.path.stat().st_size < 0.03, "headers and padding of the tar"
    assert run["planned"]["payload_bytes"] == planned.payload_bytes
    assert 0 < run["efficiency"] < 1 and run["floor_seconds"] > 0


def _tokenizer(tree: dict) -> Tokenizer:
    with open(tree["tokenizer"]["load"], "rb") as file:
        return Tokenizer(file.read())


def test_plan_prints_what_will_be_and_leaves_nothing_behind(tree, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = command_line(tree, tmp_path, "plan")
    assert result.returncode == 0, result.stderr
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "config.yaml"])
    for fact in (
        "tasks of pass 1",
        "passes",
        "memory",
        "intermediate disk",
        "bytes moved",
        "core time",
        "floor",
    ):
        assert fact in result.stdout
    result = command_line(tree | {"resources": {"memory_bytes": 100_000_000}}, tmp_path, "plan")
    assert result.returncode == 2 and "resources.memory_bytes: 100,000,000 bytes" in result.stderr


def test_plan_names_the_file_that_bounds_the_time(corpus, tmp_path):
    result = command_line(settings(tmp_path / "out", [corpus]), tmp_path, "plan")
    assert result.returncode == 0, result.stderr
    assert "cannot be split 1; the largest, c.jsonl.gz of" in " ".join(result.stdout.split())


def test_a_pass_is_added_where_reads_would_be_too_small():
    gigabyte, piece = 10**9, 128 * 1024
    assert needed_groups(100 * gigabyte, 280, 500, piece) == 280  # 700 kB a read
    groups = needed_groups(5000 * gigabyte, 10_000, 20_000, piece)  # 25 kB a read
    assert groups < 10_000 and 5000 * gigabyte // (groups * 20_000) >= piece
    assert needed_groups(10**6, 16, 100, piece) == 16, "few reads need no pass"
