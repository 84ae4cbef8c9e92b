"""The whole pipeline: the same bytes however it is run, resumed or sized; nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import pytest
import yaml

import data_prep.gather as gather
import data_prep.run as run_module
from data_prep import plan as plan_module
from data_prep import sources
from data_prep.errors import AuditError, DataPrepError
from data_prep.executor import LocalExecutor
from data_prep.scatter import scatter
from data_prep.shards import SplitReader
from tests.data_prep.made import (
    ROOT,
    command_line,
    content_files,
    documents_of,
    make_texts,
    prepare,
    settings,
    write_jsonl,
)


@pytest.mark.parametrize(
    ("workers", "resources"),
    [
        (1, {"worker_memory_bytes": 128 * 1024**2, "task_bytes": 1_000_000_000}),
        (2, {"worker_memory_bytes": 2 * 1024**3, "task_bytes": 1}),
        (5, {"worker_memory_bytes": 128 * 1024**2, "task_bytes": 1, "spill": "none"}),
        (1, {"min_read_bytes": 10**9, "task_bytes": 1, "spill": "lz4"}),  # a third pass
    ],
)
def test_workers_memory_and_tasks_change_no_byte(corpus, prepared, tmp_path, monkeypatch, workers, resources):
    if "min_read_bytes" in resources:
        monkeypatch.setattr("data_prep.estimate._FEW_READS", 1)
    elif workers == 1:  # in this process: frames and sub-ranges so small that there are many of each
        monkeypatch.setattr("data_prep.run.frame_bytes", lambda plan: 1000)
        monkeypatch.setattr("data_prep.merge._LOADED_SHARE", 1 / 4096)
        monkeypatch.setattr("data_prep.spill._SORT_BYTES", 1400)
        monkeypatch.setattr("data_prep.scatter.records_bytes", lambda memory, record: 60_000)
        monkeypatch.setattr("data_prep.scatter._ENCODE_BYTES", 5000)
        monkeypatch.setattr("data_prep.sources.CHUNK_BYTES", 3000)
    output = tmp_path / "out"
    manifest = prepare(settings(output, [corpus], resources={"workers": workers, **resources}))
    assert len(manifest.splits["train"].shards) > 3
    assert content_files(output) == content_files(prepared)
    stages = json.loads((output / "run.json").read_text())["stages"]
    assert ("merge" in stages) == ("min_read_bytes" in resources)
    assert all(stage["hosts"] == {socket.gethostname(): stage["tasks"]} for stage in stages.values())


def test_the_order_of_tasks_changes_no_byte(corpus, prepared, tmp_path, monkeypatch):
    original = LocalExecutor.run

    def in_random_order(self, function, descriptions, *more, **named):
        mixed = random.Random(len(descriptions)).sample(descriptions, len(descriptions))
        yield from original(self, function, mixed, *more, **named)

    monkeypatch.setattr(LocalExecutor, "run", in_random_order)
    prepare(settings(tmp_path / "out", [corpus], resources={"task_bytes": 1}))
    assert content_files(tmp_path / "out") == content_files(prepared)


def test_killed_and_started_again_gives_the_same_bytes(corpus, prepared, tmp_path):
    output = tmp_path / "out"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings(output, [corpus], resources={"task_bytes": 1})))
    command = [sys.executable, "-m", "data_prep", "run", "--config", str(config)]
    watched = [".work/*/scatter/task-000000.json", ".work/*/gather/train-000001.json"]
    for name in watched:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
        while process.poll() is None and not list(output.glob(name)):
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL and not (output / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (output / ".work").rglob("*.json")}
    before[output / "tokenizer/tokenizer.model"] = (output / "tokenizer/tokenizer.model").stat().st_mtime_ns
    (work,) = (output / ".work").iterdir()
    (work / "scatter" / "task-000001.spill.tmp-0123").write_bytes(b"left over")
    (output / "train" / "shard-000007.tar.tmp-0123456789ab").write_bytes(b"left over")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert content_files(output) == content_files(prepared)
    model = output / "tokenizer/tokenizer.model"
    assert before[model] == model.stat().st_mtime_ns
    assert not (output / ".work").exists() and not list(output.rglob("*.tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 2])
def test_an_interrupt_from_the_keyboard_ends_training_at_once(tmp_path, seconds):
    """When the process that workers are forked from begins, and when the trainer is at work."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(60_000)]
    source = write_jsonl(tmp_path / "a.jsonl", [" ".join(draw.choices(words, k=60)) for _ in range(30_000)])
    train = {"model": "unigram", "vocab_size": 8000, "sample_bytes": 100_000_000}
    tree = settings(tmp_path / "out", [source], tokenizer={"train": train})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "data_prep", "run", "--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell that puts the tests into the background has them, and what they start, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    try:
        while "training takes about" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(seconds)
        started = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[0]
        assert time.monotonic() - started < 5 and process.returncode == 130
        assert "the same command goes on from here" in said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_finished_output_is_left_alone_and_a_changed_plan_refused(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    tree = settings(tmp_path / "out", [source])
    first = prepare(tree)
    stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    again = command_line(tree, tmp_path, "run")
    assert again.returncode == 0 and "is complete" in again.stderr
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp
    changed = command_line(tree | {"seed": 9}, tmp_path, "run")
    assert changed.returncode == 2 and "config.seed: was 5, is now 9" in changed.stderr
    assert "--fresh" in changed.stderr and "Traceback" not in changed.stderr
    with source.open("a") as file:
        file.write('{"text": "one more"}\n')
    grown = command_line(tree, tmp_path, "run")
    assert grown.returncode == 2 and "files.made:a.jsonl" in grown.stderr
    fresh = prepare(tree, fresh=True)
    assert fresh.records["read"] == first.records["read"] + 1


def test_a_first_run_that_failed_does_not_bind_the_second(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    tree = settings(
        tmp_path / "out", [source], tokenizer={"train": {"vocab_size": 50_000, "model": "unigram"}}
    )
    with pytest.raises(DataPrepError, match="supports only"):
        prepare(tree)
    assert "supports only" in json.loads((tmp_path / "out" / "progress.json").read_bytes())["failed"]
    prepare(settings(tmp_path / "out", [source]))


def test_a_task_that_travels_is_as_small_with_many_files_as_with_few(tmp_path, monkeypatch):
    sizes = []
    for count in (2, 300):
        tasks: list[gather.GatherTask] = []
        monkeypatch.setattr(
            run_module, "gather", lambda task, tasks=tasks: tasks.append(task) or gather.gather(task)
        )
        for name in "ab":
            for number in range(count // 2):
                texts = make_texts(600)[600 * number // (count // 2) : 600 * (number + 1) // (count // 2)]
                write_jsonl(tmp_path / str(count) / name / f"{number:03d}.jsonl", texts)
        tree = settings(tmp_path / f"out{count}", [])
        tree["corpora"] = [{"name": name, "paths": [str(tmp_path / str(count) / name)]} for name in "ab"]
        prepare(tree)
        sizes.append(max(len(pickle.dumps(task)) for task in tasks))
        sources = Counter()
        reader = SplitReader(tmp_path / f"out{count}", "train")
        for shard in range(len(reader.manifest.splits["train"].shards)):
            blocks = reader._reader(shard)
            for block in range(len(blocks.blocks)):
                pieces = blocks.read(block).pieces
                sources.update((pieces[3] == (pieces[4] >= count // 2)).tolist())
        assert set(sources) == {True}, "a document's corpus is that of its file"
    assert abs(sizes[1] - sizes[0]) < 50


def test_lost_spill_and_unbalanced_books_stop_the_run(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    original_gather = run_module.run_gather
    for damage, message in (("flip", "checksum differs from the index"), ("delete", "No such file")):

        def damaged(plan, *rest, damage=damage):
            path = plan.work_path / "scatter" / "task-000000.spill"
            if damage == "flip":
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
            else:
                path.unlink()
            return original_gather(plan, *rest)

        monkeypatch.setattr(run_module, "run_gather", damaged)
        with pytest.raises(DataPrepError, match=rf"task-000000.spill: an intermediate file.*{message}"):
            prepare(settings(tmp_path / "a", [source]), fresh=True)
    monkeypatch.undo()

    original = gather.sorted_documents
    monkeypatch.setattr(gather, "sorted_documents", lambda *a: (p for p in list(original(*a))[1:]))
    with pytest.raises(AuditError, match="pass 1 wrote"):
        prepare(settings(tmp_path / "b", [source]))


def test_no_worker_imports_torch(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(100))
    tree = settings(tmp_path / "out", [source])
    code = (
        "import sys, yaml; from data_prep.__main__ import main\n"
        f"assert main(['run', '--config', {str(tmp_path / 'c.yaml')!r}]) == 0\n"
        "assert not {'torch', 'sutrain', 'ray', 'transformers'} & set(sys.modules)"
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_many_blocks_give_the_same_bytes_for_any_tasks_also_resumed(corpus, tmp_path, monkeypatch):
    for module in (sources, plan_module):
        monkeypatch.setattr(module, "BLOCK_BYTES", 20_000)
    tree = settings(tmp_path / "one", [corpus], resources={"task_bytes": 1})
    prepare(tree)
    prepare(settings(tmp_path / "two", [corpus], resources={"task_bytes": 50_000}))
    blocks = {origin[:2] for origin, _ in documents_of(tmp_path / "one", "train")}
    assert len(blocks) > 10
    assert content_files(tmp_path / "two") == content_files(tmp_path / "one")
    finished: list[int] = []

    def scatter_some(task):
        if len(finished) == 3:
            raise KeyboardInterrupt
        finished.append(task.number)
        return scatter(task)

    tree = settings(tmp_path / "three", [corpus], resources={"task_bytes": 30_000})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "scatter", scatter_some)
        prepare(tree)
    redone: list[int] = []
    monkeypatch.setattr(run_module, "scatter", lambda task: redone.append(task.number) or scatter(task))
    prepare(settings(tmp_path / "three", [corpus], resources={"task_bytes": 70_000}))
    assert redone and not set(redone) & set(finished)
    assert content_files(tmp_path / "three") == content_files(tmp_path / "one")
