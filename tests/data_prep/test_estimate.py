"""The plan's figures come from the corpus and the disk, and stand beside what the run took."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from data_prep import between, run
from data_prep.config import PrepareConfig
from data_prep.estimate import estimate, needed_groups
from data_prep.memory import records_bytes
from data_prep.plan import Plan, choose_codec, frame_bytes, make_plan
from data_prep.progress import RunProgress
from data_prep.shards import SplitReader
from data_prep.sources import InputFile
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


def disk_of(tree: dict, free_bytes: int, monkeypatch) -> Plan:
    """The plan of a run that has written 3,000 bytes to its work folder and 500 to its output."""
    plan = make_plan(PrepareConfig.model_validate(tree))
    for path, size_bytes in ((plan.work_path / "scatter" / "x", 3000), (plan.config.output_path / "y", 500)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size_bytes))
    for module in (between, run):
        monkeypatch.setattr(module, "free_bytes", lambda path: free_bytes)
    return plan


@pytest.fixture
def several_tasks(corpus, tmp_path) -> dict:
    return settings(tmp_path / "out", [corpus], resources={"task_bytes": 1})


@pytest.mark.parametrize("work", [None, "work"])
def test_what_a_full_disk_lacks_counts_every_file_once(several_tasks, tmp_path, monkeypatch, work):
    plan = disk_of(several_tasks | {"work_dir": work and str(tmp_path / work)}, 0, monkeypatch)
    expected = plan.spill_bytes + plan.output_bytes - 3500
    assert between.missing_bytes(plan) == f"about {expected:,} bytes more are needed"


def test_files_that_vanish_while_they_are_counted_do_no_harm(tree, monkeypatch):
    plan = disk_of(tree, 0, monkeypatch)
    original = between._files_below

    def vanishing(folder):
        for path in original(folder):
            path.unlink()
            yield path

    monkeypatch.setattr(between, "_files_below", vanishing)
    assert "bytes more are needed" in between.missing_bytes(plan)


def test_an_output_far_away_takes_no_room_here(several_tasks, tmp_path, monkeypatch):
    far = several_tasks | {"output_dir": "memory://out", "work_dir": str(tmp_path / "work")}
    plan = disk_of(far, 0, monkeypatch)
    assert between.missing_bytes(plan) == f"about {plan.spill_bytes - 3000:,} bytes more are needed"
    for free, lines in ((plan.spill_bytes, 0), (plan.spill_bytes - 1, 2)):
        monkeypatch.setattr(run, "free_bytes", lambda path, free=free: free)
        console = Console(file=io.StringIO(), width=1000)
        run.warn_of_a_small_disk(plan, RunProgress(None, 60, console))
        assert console.file.getvalue().count("MB free, about") == lines


@pytest.mark.parametrize("content", ["tokens", "text"])
def test_on_a_disk_that_takes_nothing_intermediate_files_are_compressed(several_tasks, content):
    several_tasks["shards"] |= {"content": content}
    plan = make_plan(PrepareConfig.model_validate(several_tasks))
    assert [choose_codec(plan, speed) for speed in (math.nan, 1e7, 1e11)] == ["zstd", "zstd", "none"]


@pytest.mark.parametrize("gigabytes", [0.01, 1, 30, 1000])
@pytest.mark.parametrize("memory", [128, 256, 1024])
@pytest.mark.parametrize("target", [1, 256, 4096])
def test_a_frame_of_every_run_fits_the_memory_of_pass_2(tmp_path, gigabytes, memory, target):
    """memory of a worker and target_bytes of a shard in MiB; records with their columns are twice their payload."""
    tree = settings(tmp_path / "out", [tmp_path / "a.txt"], resources={"worker_memory_bytes": memory * 2**20})
    tree["shards"] |= {"target_bytes": target * 2**20}
    config, size = PrepareConfig.model_validate(tree), int(gigabytes * 1e9)
    file = InputFile(0, "a.txt", "a.txt", size, "", "txt", "text", "")
    plan = Plan(config, [file], [], [[]] * (1 + size // 2**30))
    held = records_bytes(memory * 2**20, 2**20)
    for runs in (0, 2, 400):  # 0: as many as pass 1 makes, each of which fills the memory
        bytes_each, runs = frame_bytes(plan, runs), runs or max(len(plan.tasks), size // held)
        assert bytes_each == 4096 or 2 * bytes_each * runs <= held / 2
        assert 4096 <= bytes_each <= 2**19


def test_a_pass_is_added_where_reads_would_be_too_small():
    gigabyte, piece = 10**9, 128 * 1024
    assert needed_groups(100 * gigabyte, 280, 500, piece) == 280  # 700 kB a read
    groups = needed_groups(5000 * gigabyte, 10_000, 20_000, piece)  # 25 kB a read
    assert groups < 10_000 and 5000 * gigabyte // (groups * 20_000) >= piece
    assert needed_groups(10**6, 16, 100, piece) == 16, "few reads need no pass"
