"""The whole pipeline: the same bytes however it is run, resumed or sized; bad input; nothing lost."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
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
from data_prep.tokenizer import Tokenizer
from tests.data_prep.made import (
    ROOT,
    command_line,
    content_files,
    make_texts,
    prepare,
    settings,
    write_jsonl,
)


def documents_of(output: Path, split: str) -> list[tuple[tuple[int, int, int], list[int]]]:
    """((file, block, record), ids) of every document of a split, in the order on disk."""
    reader = SplitReader(output, split)
    found: list[tuple[tuple[int, int, int], list[int]]] = []
    for shard in range(len(reader.manifest.splits[split].shards)):
        blocks = reader._reader(shard)
        for number in range(len(blocks.blocks)):
            block = blocks.read(number)
            for row, start, length, _, file, block_number, record, piece in block.pieces.T.tolist():
                tokens = block.tokens_NL[row, start : start + length].tolist()
                if piece:
                    assert found[-1][0] == (file, block_number, record)
                    found[-1][1].extend(tokens)
                else:
                    found.append(((file, block_number, record), tokens))
    return found


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


def test_the_order_of_tasks_changes_no_byte(corpus, prepared, tmp_path, monkeypatch):
    original = LocalExecutor.run

    def in_random_order(self, function, descriptions, *more, **named):
        mixed = random.Random(len(descriptions)).sample(descriptions, len(descriptions))
        yield from original(self, function, mixed, *more, **named)

    monkeypatch.setattr(LocalExecutor, "run", in_random_order)
    prepare(settings(tmp_path / "out", [corpus], resources={"task_bytes": 1}))
    assert content_files(tmp_path / "out") == content_files(prepared)


def test_every_document_is_there_once_and_decodes_to_its_text(prepared):
    texts = make_texts(3000)
    tokenizer = Tokenizer((prepared / "tokenizer" / "tokenizer.model").read_bytes())
    documents = documents_of(prepared, "train") + documents_of(prepared, "validation")
    names = [file["path"] for file in SplitReader(prepared, "train").manifest.files]
    bases = {"a.jsonl": 0, "sub/b.jsonl": 1200, "c.jsonl.gz": 2200}
    numbers = [bases[names[file]] + record for (file, _, record), _ in documents]
    assert sorted(numbers) == list(range(3000))
    for number, (_, ids) in list(zip(numbers, documents, strict=True))[::50]:
        assert ids[0] == 2 and ids[-1] == 3
        assert tokenizer._processor.decode(ids[1:-1]) == texts[number]


def test_neighbours_come_from_the_files_as_chance_would_have_it(prepared):
    """The share of neighbours from one file is that of independent draws, within four standard deviations."""
    files = np.array([file for (file, _, _), _ in documents_of(prepared, "train")])
    shares = np.bincount(files) / len(files)
    expected = float((shares**2).sum())
    found = float((files[1:] == files[:-1]).mean())
    assert abs(found - expected) < 4 * (expected * (1 - expected) / len(files)) ** 0.5
    thirds = np.array_split(files, 3)
    counts = np.array([np.bincount(third, minlength=3) for third in thirds])
    chances = np.outer([len(third) for third in thirds], shares)
    assert ((counts - chances) ** 2 / chances).sum() < 18.5  # chi-square, 4 degrees of freedom, 99.9 %


def test_another_seed_gives_another_order(corpus, prepared, tmp_path):
    prepare(settings(tmp_path / "out", [corpus], seed=6))
    ours, others = (documents_of(folder, "train")[:100] for folder in (prepared, tmp_path / "out"))
    assert [origin for origin, _ in ours] != [origin for origin, _ in others]


def test_copies_of_a_text_are_on_one_side(tmp_path):
    texts = make_texts(400)
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", texts if number else texts[::-1])
    prepare(
        settings(tmp_path / "out", [tmp_path / "*.jsonl"], shards={"validation_share": 0.3, "row_tokens": 64})
    )
    sides = [
        Counter(tuple(ids) for _, ids in documents_of(tmp_path / "out", split))
        for split in ("train", "validation")
    ]
    assert not sides[0].keys() & sides[1].keys()
    assert set(sides[0].values()) == set(sides[1].values()) == {3}
    assert 0.2 < len(sides[1]) / 400 < 0.4


def test_bad_input_is_dropped_or_quarantined_and_its_neighbours_stay(tmp_path):
    good = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in make_texts(200)]
    bad = [
        b'{"text": "cut off',
        b'{"body": "other field"}',
        b'{"text": "\xff\xfe"}',
        b'["no object"]',
        b'{"text": 7}',
        b'{"text": "' + b"long " * 1000 + b'"}',
    ]
    dropped = [b"", b'{"text": " "}', b'{"text": "x"}']
    lines = [line for pair in zip(good[:9], bad + dropped, strict=True) for line in pair] + good[9:]
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join(lines))
    output = tmp_path / "out"
    cleaning = {"max_record_bytes": 2000, "min_characters": 2}
    manifest = prepare(settings(output, [tmp_path / "a.jsonl"], cleaning=cleaning))
    source = manifest.sources[0]
    assert (source["read"], source["written"]) == (209, 200)
    assert source["dropped"] == {"empty": 2, "too_short": 1}
    assert source["quarantined"] == {
        "field_is_not_text": 1,
        "invalid_json": 1,
        "invalid_utf8": 1,
        "missing_field": 1,
        "not_a_json_object": 1,
        "record_too_large": 1,
    }
    entries = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    data = (tmp_path / "a.jsonl").read_bytes()
    assert [data[entry["offset"] :].startswith(line) for entry, line in zip(entries, bad, strict=True)] == [
        True
    ] * 6
    assert 'data_prep_records_total{outcome="quarantined"} 6' in (output / "metrics.prom").read_text()


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpora": [{"name": "x", "paths": ["/nowhere/*.jsonl"]}]}, "/nowhere/*.jsonl: no such file"),
        ({"sed": 3}, "sed: unknown key; did you mean 'seed'?"),
        ({"seed": "many"}, "seed: "),
        ({"shards": {"row_tokens": 2, "zstd_level": 99}}, "shards.zstd_level: "),
        ({"tokenizer": {"train": {"vocab_size": 50_000}}}, "the sample supports only"),
        ({"tokenizer": {"load": "/nowhere.model"}}, "/nowhere.model: the tokenizer model cannot be read"),
        ({"corpora": [{"name": "x", "paths": ["SOURCE"], "text_field": "body"}]}, "missing_field"),
        ({"output_dir": "/proc/nothing"}, "/proc/nothing"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, change, message):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    tree = settings(tmp_path / "out", [source]) | change
    result = command_line(json.loads(json.dumps(tree).replace("SOURCE", str(source))), tmp_path, "run")
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_empty_input_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    for command in ("plan", "run"):
        result = command_line(settings(tmp_path / "out", [tmp_path / "a.txt"]), tmp_path, command)
        assert result.returncode == 2 and "the input is empty" in result.stderr


def test_a_first_run_that_failed_does_not_bind_the_second(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    tree = settings(
        tmp_path / "out", [source], tokenizer={"train": {"vocab_size": 50_000, "model": "unigram"}}
    )
    with pytest.raises(DataPrepError, match="supports only"):
        prepare(tree)
    assert "supports only" in json.loads((tmp_path / "out" / "progress.json").read_bytes())["failed"]
    prepare(settings(tmp_path / "out", [source]))


def test_a_tokenizer_can_be_loaded_and_words_left_out(prepared, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("\n".join(make_texts(200)))
    model = prepared / "tokenizer" / "tokenizer.model"
    manifest = prepare(
        settings(tmp_path / "out", [source], tokenizer={"load": str(model)}, words={"segmenter": "none"})
    )
    assert manifest.tokenizer["sha256"] == SplitReader(prepared, "train").manifest.tokenizer["sha256"]
    assert SplitReader(tmp_path / "out", "train").rows(0, 3).word_start_NL is None


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


def test_a_truncated_file_costs_one_record_and_the_books_balance(tmp_path):
    texts = make_texts(2000)
    plain = write_jsonl(tmp_path / "whole.jsonl", texts[:300])
    packed = gzip.compress(write_jsonl(tmp_path / "cut.tmp", texts[300:]).read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    manifest = prepare(settings(tmp_path / "out", [plain, tmp_path / "cut.jsonl.gz"]))
    source = manifest.sources[0]
    assert source["quarantined"] == {"truncated_compression": 1}
    assert source["read"] == source["written"] + 1 and 600 < source["written"] < 2000
    result = command_line(settings(tmp_path / "out", [plain]), tmp_path, "verify")
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


def test_deep_nesting_is_quarantined_alike_by_any_workers(tmp_path):
    good = [json.dumps({"text": text}, ensure_ascii=False) for text in make_texts(300)]
    deep = [f'{{"a": {"[" * n}{"]" * n}, "text": "level {n}"}}' for n in range(150, 1050, 10)]
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text("\n".join([*good, *deep]) + "\n")
    for workers in (1, 2):
        manifest = prepare(
            settings(
                tmp_path / str(workers),
                [tmp_path / "*.jsonl"],
                resources={"workers": workers, "task_bytes": 1},
            )
        )
    assert manifest.sources[0]["quarantined"] == {"nested_too_deep": 2 * 85}
    assert content_files(tmp_path / "1") == content_files(tmp_path / "2")


def test_paths_at_home_and_forbidden_places(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "raw" / "a.jsonl", make_texts(300))
    monkeypatch.setenv("HOME", str(tmp_path))
    tree = settings("~/out", ["~/raw"]) | {"work_dir": "~/scratch"}
    tree["corpora"][0]["root"] = "~"
    prepare(tree)
    model = tmp_path / "m.model"
    model.write_bytes((tmp_path / "out" / "tokenizer" / "tokenizer.model").read_bytes())
    prepare(settings("~/out2", ["~/raw"], tokenizer={"load": "~/m.model"}))
    assert (tmp_path / "scratch").is_dir() and not (ROOT / "~").exists()
    long_name = command_line(settings(tmp_path / ("x" * 300), ["~/raw"]), tmp_path, "plan")
    assert long_name.returncode == 2 and "File name too long" in long_name.stderr
    assert long_name.stderr.startswith("error: /") and "Traceback" not in long_name.stderr
